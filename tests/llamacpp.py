"""llama.cpp as a judge, in this process, through the wheel `xllamacpp`."""

import json
from pathlib import Path
from urllib.request import Request, urlopen

import pytest


class Judge:
    """A GGUF in llama.cpp, on one core, its keys and values in float32."""

    def __init__(self, path: Path, context: int):
        module = pytest.importorskip("xllamacpp", reason="llama.cpp is the judge here, and xllamacpp is not installed")
        wanted = module.CommonParams()
        wanted.model.path, wanted.n_ctx, wanted.n_parallel, wanted.port = str(path), context, 1, 0
        wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = 1
        wanted.n_gpu_layers, wanted.verbosity, wanted.warmup, wanted.fit_params = 0, 0, False, False
        wanted.cache_type_k = wanted.cache_type_v = module.ggml_type.GGML_TYPE_F32
        wanted.flash_attn_type = module.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = module.Server(wanted)

    def tokens(self, text: str) -> list[int]:
        """The token numbers of a text, the begin token in front where the file says so."""
        return self._asked("tokenize", content=text, add_special=True, parse_special=True)["tokens"]

    def continued(self, tokens: list[int], n: int) -> tuple[list[int], dict[int, dict[int, float]]]:
        """n tokens, greedily; and by step the log-probabilities of the five likeliest. It says none for a step that
        ends inside a letter (a byte of several), nor for an end token."""
        found: list[int] = []
        likeliest = {}
        for step in range(n):
            answer = self._asked("completion", prompt=tokens + found, n_predict=1, temperature=0, n_probs=5,
                                 cache_prompt=False, return_tokens=True)
            found += answer["tokens"]
            for one in answer.get("completion_probabilities", []):
                likeliest[step] = {top["id"]: top["logprob"] for top in one["top_logprobs"]}
        return found, likeliest

    def _asked(self, what: str, **values) -> dict:
        request = Request(f"{self.server.listening_address}/{what}", json.dumps(values).encode(),
                          {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as answer:
            return json.load(answer)
