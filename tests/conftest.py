"""What the tests share: a tiny Llama on disk with its tokenizer, and a tiny data set."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import tiny  # noqa: E402

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
    return tiny.write_model(tmp_path_factory.mktemp("tiny-model"), [s for _, s in tiny_sentences(200, 0)] * 3)


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
