"""What the benchmarks share: the machine and its limits, taking turns, ratios with their spread, results as JSON."""

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def need(*paths: str) -> None:
    """End with what to do where a file that is measured with is not there."""
    for path in paths:
        if not (ROOT / path).is_file():
            raise SystemExit(f"{path} is not here; `python data/prepare.py movies smollm2-135m` fetches the data and "
                             "the model, stories42M the tokenizer of --classic")


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = platform.processor()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    return {"platform": platform.platform(), "python": platform.python_version(), "torch": torch.__version__,
            "cpu": cpu, "cpu_capability": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if device == "cuda" else None}


def seconds(do: Callable[[], Any], device: str = "cpu", times: int = 1) -> float:
    """How long `do()` takes, the device's work included; the mean of `times` calls in a row."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(times):
        do()
    synchronize()
    return (time.perf_counter() - start) / times


def matrix_rate(dtype: torch.dtype, device: str = "cpu", tokens: int = 2048, dim: int = 576,
                hidden: int = 1536) -> float:
    """FLOP/s of a product of the model's shape, (tokens, dim) by (dim, hidden): the best of seven."""
    x = torch.randn(tokens, dim, device=device).to(dtype)
    weight = torch.randn(hidden, dim, device=device).to(dtype)
    times = [seconds(lambda: torch.nn.functional.linear(x, weight), device, times=3) for _ in range(8)]
    return 2 * tokens * dim * hidden / min(times[1:])


def bandwidth(device: str = "cpu") -> float:
    """Bytes a second of reading memory, 512 MiB of it: the best of seven."""
    x = torch.ones(1 << 27, device=device)
    times = [seconds(x.sum, device) for _ in range(8)]
    return x.numel() * x.element_size() / min(times[1:])


def limits(dtype: torch.dtype, device: str = "cpu") -> dict[str, float]:
    """The machine's own limits, measured now: matrix products in float32 and in `dtype`, and memory."""
    return {"float32_flop_per_second": matrix_rate(torch.float32, device),
            "flop_per_second": matrix_rate(dtype, device), "dtype": str(dtype).removeprefix("torch."),
            "bytes_per_second": bandwidth(device)}


def ratio(ours: list[float], other: list[float]) -> dict[str, Any]:
    """ours / other: of the medians, and, pair by pair of neighbours in time, the smallest, the median, the largest."""
    pairs = sorted(a / b for a, b in zip(ours, other, strict=True))
    low, _, high = quantiles(pairs, n=4) if len(pairs) > 3 else (pairs[0], 0, pairs[-1])
    return {"of_medians": median(ours) / median(other), "median_of_pairs": median(pairs), "quartiles": [low, high],
            "all": pairs}


def write(name: str, result: dict[str, Any]) -> None:
    """benchmarks/results/<name>.json"""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path.relative_to(ROOT)}")
