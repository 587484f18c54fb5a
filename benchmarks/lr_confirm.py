"""How often `lr_find --confirm` recommends a rate that is no better than the others, and how often one that is.

    python benchmarks/lr_confirm.py [--repeats 200] [--steps 30]

A tiny random Llama and sentences of random words, new ones in each repetition. Prints the counts and writes
benchmarks/results/lr_confirm.json. The cases:

    noise     the labels are drawn without a look at the sentences: no rate is better, every recommendation is false
    equal     a word decides the label, and all five rates are secretly one: every recommendation is false
    highest   a word decides, and only the highest of the five rates is large enough to learn it in time
    middle    a word decides, and only the middle one learns it: below nothing moves, above it diverges
"""

import argparse
import contextlib
import io
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
# Without this file's folder, in which there is another optimizer.py.
sys.path = [str(ROOT), *(p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent)]
import search  # noqa: E402
from benchmarks.measure import machine, write  # noqa: E402
from classifier import LlamaEmbeddingClassifier, classification_loss  # noqa: E402
from config import LlamaConfig, RunConfig  # noqa: E402
from dataset import Split, epoch_order, make_batch  # noqa: E402
from llama import Llama  # noqa: E402
from optimizer import AdamW  # noqa: E402
from trainer import Device, Task  # noqa: E402

CPU = Device(torch.device("cpu"), torch.float32)
CLASSES, WORDS, RATE = 3, 40, 3e-3  # RATE: one that learns the word in 30 steps
# low and high: what confirm makes its five rates from, low / 10 to high.
CASES = {"noise": (1e-3, 1e-1), "equal": (1e-3, 1e-1), "highest": (RATE / 1e3, RATE),
         "middle": (RATE / 1e5, RATE * 1e6)}


def sentences(n: int, is_noise: bool, random: np.random.Generator) -> Split:
    """n sentences of 3 to 9 random words. Word 0, 1 or 2, which stands in each, is its class; with noise it is not."""
    labels, words = random.integers(CLASSES, size=n), random.integers(CLASSES, size=n)
    tokens = [random.integers(CLASSES, WORDS, size=random.integers(3, 10)).astype(np.int32) for _ in range(n)]
    for i, sentence in enumerate(tokens):
        sentence[random.integers(len(sentence))] = words[i] if is_noise else labels[i]
    return Split(Path("random"), [""] * n, tokens, labels, 0)


def runs(train: Split, dev: Split, weights: dict, is_equal: bool):
    """A function that makes the run of a config, as run_llama.start does."""
    def make_run(config: RunConfig) -> SimpleNamespace:
        lr = config.lr
        if is_equal:  # one rate, and for each of the five that it goes by another training noise
            config = replace(config, lr=RATE, seed=abs(hash((config.seed, lr))))
        torch.manual_seed(config.seed)
        llama = tiny_llama()
        llama.load_state_dict(weights)
        settings = SimpleNamespace(num_labels=CLASSES, hidden_dropout_prob=0.1, pooling="mean")
        model = LlamaEmbeddingClassifier(settings, llama)
        task = Task(model, train, class_names=list("abc"), n_dev=len(dev), evaluate=dict, save_best=lambda: None,
                    order=lambda epoch: epoch_order(train.lengths, config.batch_size, config.seed, epoch),
                    make_batch=lambda rows, epoch: make_batch(train, rows, 0),
                    losses=lambda batch: classification_loss(model, batch))
        return SimpleNamespace(model=model, task=task, optimizer=AdamW(model.parameters(), lr=config.lr),
                               schedule=lambda step, history: 1.0, steps_an_epoch=len(task.order(0)), dev=dev, pad_id=0)
    return make_run


def tiny_llama() -> Llama:
    return Llama(LlamaConfig(vocab_size=WORDS, dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_seq_len=16))


def confirmed(case: str, seed: int, steps: int, n_train: int = 240, n_dev: int = 200) -> search.Confirmed:
    """One repetition."""
    random = np.random.default_rng([list(CASES).index(case), seed])
    train, dev = (sentences(n, case == "noise", random) for n in (n_train, n_dev))
    torch.manual_seed(seed)
    weights = tiny_llama().state_dict()
    config = RunConfig(epochs=10, batch_size=16, lr=RATE, lr_steps=steps, guards="off", seed=seed)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return search.confirm(runs(train, dev, weights, case == "equal"), config, CPU, *CASES[case])


def is_right(case: str, found: search.Confirmed) -> bool:
    """Is the recommended rate the one that learns?"""
    return case in ("highest", "middle") and found.lr is not None and abs(math.log(found.lr / RATE)) < 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {"machine": machine(), "repeats": options.repeats, "steps": options.steps, "cases": {}}
    for case in CASES:
        found = [confirmed(case, seed, options.steps) for seed in range(options.repeats)]
        decided = sum(one.lr is not None for one in found)
        right = sum(is_right(case, one) for one in found)
        print(f"{case:8} {decided:4} of {options.repeats} decided, {right} of them for the rate that learns; "
              f"{decided - right} false", flush=True)
        result["cases"][case] = {"decided": decided, "right": right, "false": decided - right}
    write("lr_confirm", result)


if __name__ == "__main__":
    main()
