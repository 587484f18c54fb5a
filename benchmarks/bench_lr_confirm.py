"""How often `lr_find --confirm` recommends a rate that is no better than the others, and how often one that is.

    python -m benchmarks.bench_lr_confirm [--repeats 200] [--steps 30]

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
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import machine, write
from classifier import ClassifierConfig, LlamaEmbeddingClassifier
from commands import confirm
from commands.classification import ClassificationTask
from config import LlamaConfig, RunConfig
from dataset import Split
from llama import Llama
from optimizer import AdamW
from training.device import Device
from training.task import Job

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


@dataclass(frozen=True)
class Words:
    """All that a task asks of a tokenizer."""

    add_bos: bool = False
    pad_id: int = 0


def jobs(train: Split, dev: Split, weights: dict, is_equal: bool) -> Callable[[RunConfig], Job[ClassificationTask]]:
    """A function that makes the job of a config, as commands.job.build_job does."""
    def make_job(config: RunConfig) -> Job[ClassificationTask]:
        lr = config.lr
        if is_equal:  # one rate, and for each of the five that it goes by another training noise
            config = replace(config, lr=RATE, seed=abs(hash((config.seed, lr))))
        torch.manual_seed(config.seed)
        llama = tiny_llama()
        llama.load_state_dict(weights)
        settings = ClassifierConfig(CLASSES, list("abc"), "mean", "ce", 0.1, None, llama.config)
        model = LlamaEmbeddingClassifier(settings, llama)
        task = ClassificationTask(config, model, settings, Words(), train, dev, CPU, np.random.default_rng(config.seed))
        return Job(model, task, AdamW(model.parameters(), lr=config.lr), lambda step, history: 1.0, len(task.order(0)))
    return make_job


def tiny_llama() -> Llama:
    return Llama(LlamaConfig(vocab_size=WORDS, dim=16, n_layers=1, n_heads=2, hidden_dim=32, max_seq_len=16))


def confirmed(case: str, seed: int, steps: int, n_train: int = 240, n_dev: int = 200) -> confirm.Confirmed:
    """One repetition."""
    random = np.random.default_rng([list(CASES).index(case), seed])
    train, dev = (sentences(n, case == "noise", random) for n in (n_train, n_dev))
    torch.manual_seed(seed)
    weights = tiny_llama().state_dict()
    config = RunConfig(epochs=10, batch_size=16, lr=RATE, lr_steps=steps, guards="off", seed=seed)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return confirm.confirm(jobs(train, dev, weights, case == "equal"), config, CPU, *CASES[case])


def is_right(case: str, found: confirm.Confirmed) -> bool:
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
