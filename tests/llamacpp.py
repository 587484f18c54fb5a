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
        self.server = module.Server(wanted)

    def tokens(self, text: str) -> list[int]:
        """The token numbers of a text, the begin token in front where the file says so."""
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        request = Request(f"{self.server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as answer:
            return json.load(answer)["tokens"]

    def continued(self, tokens: list[int], n: int, n_probs: int = 5) -> tuple[list[int], list[dict[int, float]]]:
        """n tokens, greedily; and of each step the log-probabilities of the likeliest."""
        answer = self.server.handle_completions({"prompt": tokens, "n_predict": n, "temperature": 0, "n_probs": n_probs,
                                                 "cache_prompt": False, "ignore_eos": False})
        steps = answer["choices"][0]["logprobs"]["content"]
        return [one["id"] for one in steps], [{top["id"]: top["logprob"] for top in one["top_logprobs"]}
                                              for one in steps]
