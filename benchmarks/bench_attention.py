"""Attention in training on a CPU, in bfloat16: PyTorch's own against `llama.attend`, which computes short sentences in
float32.

    python -m benchmarks.bench_attention [--rounds 9]

For sentences of several lengths, in turn: a forward and a backward pass of SmolLM2's attention (9 heads, 3 for keys and
values, of 64), and of its first six layers as a classifier with adapters. Writes
benchmarks/results/attention-cpu.json.
"""

import argparse
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

import llama
import lora
from benchmarks.measure import machine, ratio, seconds, write
from classifier import ClassifierConfig, LlamaEmbeddingClassifier
from config import LlamaConfig, LoraConfig, RunConfig
from llama import Llama, attend
from training import device as devices
from training.device import Device

HEADS, KV_HEADS, HEAD_DIM, TOKENS = 9, 3, 64, 2048  # so many tokens in a batch
LENGTHS = (8, 16, 32, 64, 128, 256, 512, 1024)


def in_turn(options: argparse.Namespace, do: Callable[[], object]) -> dict:
    """The seconds of `do()` without and with the change of type, and how many times as fast it is with it."""
    spent: dict[str, list[float]] = {"bfloat16": [], "float32": []}
    for turn in range(1 + options.rounds):
        for name, short in (("bfloat16", 0), ("float32", max(LENGTHS))):
            llama.SHORT = short
            once = seconds(do)
            if turn:  # the first one warms up
                spent[name].append(once)
    return {"seconds": spent, "times_as_fast": ratio(spent["bfloat16"], spent["float32"])}


def one_layer(length: int) -> Callable[[], object]:
    """A forward and a backward pass of attention."""
    query, key, value = (torch.randn(TOKENS // length, length, n, HEAD_DIM).bfloat16().transpose(1, 2).requires_grad_()
                         for n in (HEADS, KV_HEADS, KV_HEADS))
    return lambda: attend(query, key, value, None, True, 0.0).sum().backward()


def classifier(length: int) -> Callable[[], object]:
    """A forward and a backward pass of the whole classifier; random weights."""
    stack = Llama(LlamaConfig(49152, 576, 6, HEADS, KV_HEADS, 1536, max_seq_len=2048))
    model = LlamaEmbeddingClassifier(ClassifierConfig(5, list("abcde"), "last", "ce", 0.0, None, stack.config), stack)
    lora.add(stack, LoraConfig(8, 16.0))
    device = Device(torch.device("cpu"), torch.bfloat16)
    devices.accelerate(RunConfig(), model, device)
    tokens = torch.randint(49152, (TOKENS // length, length))

    def step() -> Tensor:
        with device.autocast():
            loss = model(tokens).mean()
        loss.backward()
        return loss

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    result: dict = {"machine": machine(), "tokens": TOKENS, "attention": {}, "classifier": {}}
    for name, make in (("attention", one_layer), ("classifier", classifier)):
        for length in LENGTHS:
            found = in_turn(options, make(length))
            result[name][length] = found
            faster = found["times_as_fast"]
            print(f"{name}, {length} tokens: {1000 * median(found['seconds']['bfloat16']):.1f} ms in bfloat16, "
                  f"{1000 * median(found['seconds']['float32']):.1f} with attention in float32: "
                  f"{faster['of_medians']:.2f} times as fast ({faster['all'][0]:.2f} to {faster['all'][-1]:.2f})",
                  flush=True)
    write("attention-cpu", result)


if __name__ == "__main__":
    main()
