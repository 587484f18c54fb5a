"""Where a run computes and in which precision; its memory and its random numbers there."""

import os
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fused
import lora
from config import InputError, RunConfig, counted
from formats.memory import is_out_of_memory
from training import logs


@dataclass(frozen=True)
class Device:
    """Where the tensors are, and the precision of the matrix products there."""

    where: torch.device
    dtype: torch.dtype

    @property
    def is_cpu(self) -> bool:
        return self.where.type == "cpu"

    @property
    def is_cuda(self) -> bool:
        return self.where.type == "cuda"

    def autocast(self) -> AbstractContextManager:
        """Matrix products in `dtype`, everything that needs it in float32."""
        return torch.autocast(self.where.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def put(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch on the device; from pinned memory and without waiting where that is a GPU."""
        if self.is_cuda:
            return {k: v.pin_memory().to(self.where, non_blocking=True) for k, v in batch.items()}
        return {k: v.to(self.where) for k, v in batch.items()}

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.where) if self.is_cuda else counted(torch.get_num_threads(), "thread")
        return f"{self.where} ({name}), {str(self.dtype).removeprefix('torch.')}"


def is_fast_at_bfloat16(where: torch.device) -> bool:
    """A GPU with bfloat16 units, or a processor with AVX512_BF16 or AMX; elsewhere it is emulated, and far slower."""
    if where.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if where.type != "cpu":
        return False
    probes = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(probe() for probe in probes if probe)


def choose_device(config: RunConfig) -> Device:
    """What --device, --use_gpu and --dtype ask for. Without a GPU, --use_gpu warns and the CPU is used.

    Raises InputError for a --device that is not there.
    """
    name = config.device or ("cuda" if config.use_gpu else "cpu")
    if config.use_gpu and not config.device and not torch.cuda.is_available():
        logs.warn("--use_gpu: there is no GPU that this torch can use; running on the CPU")
        name = "cpu"
    try:
        where = torch.device(name)
        torch.zeros(1, device=where)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        where = None
    if where is None or where.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"--device {name}: this torch has no such device here; it can be cpu, cuda, cuda:N or mps")
    fast = is_fast_at_bfloat16(where)
    if config.dtype == "auto":
        return Device(where, torch.bfloat16 if fast else torch.float32)
    if config.dtype == "bfloat16" and not fast and config.option != "generate":  # which multiplies vectors, in C
        logs.warn(f"--dtype bfloat16: {where} only emulates it, which can be a hundred times slower than float32")
    return Device(where, getattr(torch, config.dtype))


def set_switches(config: RunConfig) -> None:
    """--deterministic and --detect_anomaly, which PyTorch keeps for the whole process."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is computed
    if config.deterministic or torch.are_deterministic_algorithms_enabled():  # the call itself imports for two seconds
        torch.use_deterministic_algorithms(config.deterministic)
    torch.autograd.set_detect_anomaly(config.detect_anomaly)


# --------------------------------------------------------------------------- random numbers


def random_state(device: Device) -> dict[str, Tensor]:
    """PyTorch's random state, of the CPU and of the device."""
    state = {"cpu": torch.get_rng_state()}
    if device.is_cuda:
        state["cuda"] = torch.cuda.get_rng_state(device.where)
    if device.where.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(device: Device, state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device.where)
    if "mps" in state:
        torch.mps.set_rng_state(state["mps"])


# --------------------------------------------------------------------------- memory


def free_memory(device: Device) -> int | None:
    """Bytes that are free for a batch; None where that cannot be told."""
    if device.is_cuda:
        return torch.cuda.mem_get_info(device.where)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def peak_memory(device: Device) -> int:
    """The most bytes that were in use so far: of the GPU, or of the process."""
    if device.is_cuda:
        return torch.cuda.max_memory_allocated(device.where)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# --------------------------------------------------------------------------- compiled operations


LARGE = 1_000_000  # parameters of a model for which compiling fused.c, a second, is worth it


def wants_fused(config: RunConfig, where: str, n_parameters: int) -> bool:
    """Does a model of that size on a device of that type run in C?"""
    return config.kernels == "auto" and where == "cpu" and n_parameters >= LARGE


def accelerate(config: RunConfig, model: nn.Module, device: Device) -> bool:
    """Let a model run in C where that is wanted, and hold the base of adapters in the device's precision; the same
    choice in every command. Returns whether it is as wanted: without a compiler it is not."""
    lora.hold_base(model, device.dtype)
    wanted = wants_fused(config, device.where.type, sum(p.numel() for p in model.parameters()))
    return not wanted or fused.accelerate(model)
