"""How fast a step of AdamW is: ours, and PyTorch's fused and foreach, in turn, on SmolLM2-135M's shapes.

    python -m benchmarks.bench_optimizer [--layers 30] [--device cpu] [--rounds 21] [--threads N]

Prints each one's median and the ratio of ours to it, with the quartiles of the ratio of the steps that stood next to
each other, and writes benchmarks/results/optimizer-<cpu|cuda>.json. On a busy machine the medians wander; the ratios
of neighbours do so less.
"""

import argparse
import time
from statistics import median

import torch

import fused
from benchmarks.measure import machine, ratio, seconds, write
from config import counted
from optimizer import AdamW

VOCABULARY, DIM, KV, HIDDEN = 49152, 576, 192, 1536


def shapes(layers: int) -> list[tuple[int, ...]]:
    layer = [(DIM, DIM), (KV, DIM), (KV, DIM), (DIM, DIM), (HIDDEN, DIM), (HIDDEN, DIM), (DIM, HIDDEN), (DIM,), (DIM,)]
    return [(VOCABULARY, DIM), *layer * layers, (DIM,)]


def parameters(layers: int, device: str) -> list[torch.nn.Parameter]:
    """The model's parameters, each with a random gradient."""
    draw = torch.Generator(device).manual_seed(0)
    found = [torch.nn.Parameter(torch.randn(s, generator=draw, device=device) * 0.02) for s in shapes(layers)]
    for p in found:
        p.grad = torch.randn(p.shape, generator=draw, device=device) * 1e-3
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=21, help="steps of each, after two that do not count")
    parser.add_argument("--threads", type=int, help="default: PyTorch's")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    start = time.perf_counter()
    native = options.device == "cpu" and fused.library() is not None
    compiling = time.perf_counter() - start
    variants = {"ours": lambda p, lr: AdamW(p, lr=lr, fused=native),
                "fused": lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True),
                "foreach": lambda p, lr: torch.optim.AdamW(p, lr=lr, foreach=True)}
    made = {name: make(parameters(options.layers, options.device), lr=1e-5) for name, make in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(2 + options.rounds):
        for name, optimizer in made.items():
            times[name].append(seconds(optimizer.step, options.device))
    times = {name: found[2:] for name, found in times.items()}
    size = sum(p.numel() for p in made["ours"].param_groups[0]["params"])
    how = f"C, compiled in {compiling:.2f} s" if native else "eager PyTorch"
    threads = counted(torch.get_num_threads(), "thread")
    print(f"{size / 1e6:.1f}M parameters on {options.device}, {threads}; ours: {how}")
    result = {"machine": machine(options.device), "layers": options.layers, "parameters": size, "native": native,
              "compile_seconds": compiling if native else None, "rounds": options.rounds, "optimizers": {}}
    for name, found in times.items():
        against = ratio(times["ours"], found)
        low, high = against["quartiles"]
        print(f"{name:8} {median(found) * 1e3:8.1f} ms ({min(found) * 1e3:.1f} to {max(found) * 1e3:.1f})   ours / it "
              f"{against['of_medians']:.2f}, of neighbours {against['median_of_pairs']:.2f} ({low:.2f} to {high:.2f})")
        result["optimizers"][name] = {"median_seconds": median(found), "ours_over_it": against, "seconds": found}
    write(f"optimizer-{options.device}", result)


if __name__ == "__main__":
    main()
