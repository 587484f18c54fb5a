"""What the tests share: a tiny Llama on disk with its tokenizer, and a tiny data set."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import kernels  # noqa: E402

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start
torch.set_num_threads(1)  # the models are tiny: a second thread only waits

WORDS = {0: ["awful", "bad", "dull"], 1: ["fine", "plain", "usual", "mixed"], 2: ["good", "great", "charming"]}


def tiny_sentences(n: int, seed: int) -> list[tuple[int, str]]:
    """n labelled sentences whose class can be told from one word; lengths differ."""
    import random

    draw = random.Random(seed)
    rows = []
    for i in range(n):
        label = i % 3
        words = ["the film is"] + ["very"] * draw.randrange(4) + [draw.choice(WORDS[label])]
        rows.append((label, " ".join(words + ["and long"] * draw.randrange(5))))
    return rows


@pytest.fixture(autouse=True)
def plain_pytorch():
    """Each test begins and ends without the C of kernels.py."""
    kernels.switch(False)
    yield
    kernels.switch(False)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A Hugging Face folder: a random Llama of 2 layers and dim 32, and a byte-level BPE tokenizer.json."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("tiny-model")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator([s for _, s in tiny_sentences(200, 0)] * 3, trainer)
    backend.save(str(folder / "tokenizer.json"))
    vocabulary, dim, hidden = backend.get_vocab_size(), 32, 64
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=draw) * 0.05

    state = {"model.embed_tokens.weight": normal(vocabulary, dim) * 10, "model.norm.weight": torch.ones(dim)}
    for i in range(2):
        for name, shape in {"self_attn.q_proj": (dim, dim), "self_attn.k_proj": (dim // 2, dim),
                            "self_attn.v_proj": (dim // 2, dim), "self_attn.o_proj": (dim, dim),
                            "mlp.gate_proj": (hidden, dim), "mlp.up_proj": (hidden, dim),
                            "mlp.down_proj": (dim, hidden)}.items():
            state[f"model.layers.{i}.{name}.weight"] = normal(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"model.layers.{i}.{name}.weight"] = torch.ones(dim)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llama", "vocab_size": vocabulary, "hidden_size": dim, "intermediate_size": hidden,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    }), encoding="utf-8")
    return folder


def write_split(path: Path, rows: list[tuple[int, str]]) -> Path:
    path.write_text("".join(f"{label} ||| {sentence}\n" for label, sentence in rows), encoding="utf-8", newline="\n")
    return path


@pytest.fixture
def tiny_data(tmp_path) -> dict[str, Path]:
    """Files of 96, 30 and 33 sentences in three classes, and their label names."""
    files = {name: write_split(tmp_path / f"toy-{name}.txt", tiny_sentences(n, seed))
             for seed, (name, n) in enumerate({"train": 96, "dev": 30, "test": 33}.items())}
    files["label_names"] = tmp_path / "toy-label-mapping.json"
    files["label_names"].write_text('["bad", "fine", "good"]', encoding="utf-8")
    return files
