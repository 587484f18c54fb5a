"""How the time of a training step grows with the sequence length, the batch, the layers, and with runs side by side.

    python -m benchmarks.bench_scaling [--rounds 5] [--dtype float32] [--device cpu]

SmolLM2-135M's width with random weights: forward, backward, clipping and AdamW. One thing grows by doubling, the others
stay (4 layers, batch 4 for the length; 24 tokens elsewhere; the embedding is left out, its update is the same at every
size). The exponent is the slope of log time over log size, by least squares and of the last doubling: 1 is linear, and
attention alone would be 2. Side by side: P processes of one thread each, samples/s of all together. Writes
benchmarks/results/scaling-<device>.json.
"""

import argparse
import json
import os
import subprocess
import sys
from statistics import median

import numpy as np
import torch

import fused
from benchmarks.measure import ROOT, machine, seconds, write
from classifier import ClassifierConfig, LlamaEmbeddingClassifier, classification_loss
from config import LlamaConfig
from llama import Llama
from optimizer import AdamW
from training.gradients import clip_

SIZES = {"length": [16, 32, 64, 128, 256, 512, 1024], "batch": [1, 2, 4, 8, 16, 32, 64], "layers": [1, 2, 4, 8, 16]}


class Step:
    """One training step of a model of some layers on a batch of some rows and tokens."""

    def __init__(self, layers: int, batch: int, length: int, device: str, dtype: torch.dtype):
        torch.manual_seed(0)
        llama = Llama(LlamaConfig(dim=576, n_layers=layers, n_heads=9, n_kv_heads=3, hidden_dim=1536, vocab_size=512,
                                  max_seq_len=2048, tie_embeddings=True))
        settings = ClassifierConfig(5, list("abcde"), "mean", "ce", 0.1, None, llama.config)
        self.model = LlamaEmbeddingClassifier(settings, llama).to(device).train()
        in_c = device == "cpu" and fused.accelerate(self.model)
        self.optimizer, self.device, self.dtype = AdamW(self.model.parameters(), lr=1e-5, fused=in_c), device, dtype
        self.batch = {"tokens": torch.randint(512, (batch, length), device=device),
                      "lengths": torch.full((batch,), length, device=device),
                      "labels": torch.zeros(batch, dtype=torch.long, device=device)}

    def __call__(self) -> None:
        with torch.autocast(self.device, dtype=self.dtype, enabled=self.dtype != torch.float32):
            loss = classification_loss(self.model, self.batch).mean()
        loss.backward()
        clip_(list(self.model.parameters()), 1.0, 0.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def growth(what: str, options: argparse.Namespace, dtype: torch.dtype) -> dict:
    """The median seconds of a step at each size, taken in turn, and the exponents."""
    shape = {"layers": 4, "batch": 4, "length": 24}
    steps = {size: Step(**{**shape, what: size}, device=options.device, dtype=dtype) for size in SIZES[what]}
    times: dict[int, list[float]] = {size: [] for size in steps}
    for turn in range(options.rounds + 1):
        for size, step in steps.items():
            spent = seconds(step, options.device)
            if turn:
                times[size].append(spent)
    medians = {size: median(found) for size, found in times.items()}
    x, y = np.log(list(medians)), np.log(list(medians.values()))
    result = {"seconds": times, "medians": medians, "exponent": float(np.polyfit(x, y, 1)[0]),
              "exponent_of_the_last_doubling": float((y[-1] - y[-2]) / (x[-1] - x[-2]))}
    print(f"{what:10}", ", ".join(f"{size}: {t * 1e3:.0f} ms" for size, t in medians.items()))
    print(f"{'':10} exponent {result['exponent']:.2f}, of the last doubling "
          f"{result['exponent_of_the_last_doubling']:.2f}", flush=True)
    return result


def side_by_side(options: argparse.Namespace) -> dict:
    """Samples/s of 1, 2, ... processes at once, up to the processor's number."""
    rates = {}
    for count in [n for n in (1, 2, 4, 8) if n <= (os.cpu_count() or 1)]:
        command = [sys.executable, "-m", "benchmarks.bench_scaling", "--worker", "--dtype", options.dtype]
        running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(count)]
        rates[count] = sum(json.loads(process.communicate()[0]) for process in running)
    print(f"{'processes':10}", ", ".join(f"{n}: {rate:.1f} samples/s" for n, rate in rates.items()))
    return {"samples_per_second": rates}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    if options.worker:
        torch.set_num_threads(1)
        step = Step(4, 16, 24, "cpu", dtype)
        step()
        print(16 / median(seconds(step) for _ in range(15)))
        return
    result = {"machine": machine(options.device), "dtype": options.dtype,
              **{what: growth(what, options, dtype) for what in SIZES}}
    if options.device == "cpu":
        result["processes"] = side_by_side(options)
    write(f"scaling-{options.device}", result)


if __name__ == "__main__":
    main()
