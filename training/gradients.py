"""A step's gradients: clipping, where they are not finite, and how far an update moves each layer."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lora
from formats.memory import is_out_of_memory
from training.device import Device


def clip_(parameters: Sequence[nn.Parameter], max_norm: float, max_value: float) -> Tensor:
    """Scale the gradients so that their norm is at most max_norm (Pascanu et al. 2013, arXiv 1211.5063), after clamping
    each number to max_value; 0 switches either off. Returns the norm before scaling, a tensor."""
    gradients = []
    for p in parameters:
        if p.grad is not None and p.grad.is_sparse:
            p.grad = p.grad.coalesce()  # a word's numbers in one place: added, and then clamped
        if p.grad is not None:
            gradients.append(numbers_of(p.grad))
    if max_value:
        torch._foreach_clamp_max_(gradients, max_value)
        torch._foreach_clamp_min_(gradients, -max_value)
    norm = nn.utils.get_total_norm(gradients)
    if max_norm and (norm.is_cuda or not norm <= max_norm):  # a GPU is not waited for
        torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm


def numbers_of(gradient: Tensor) -> Tensor:
    """A gradient's numbers; of a sparse one, the rows that there are."""
    return gradient._values() if gradient.is_sparse else gradient


def layer_group(name: str) -> str:
    """`llama.layers.3.attention.wq.weight` to `llama.layers.3`; other names to what stands before the last dot."""
    parts = name.split(".")
    return ".".join(parts[: parts.index("layers") + 2]) if "layers" in parts else name.rpartition(".")[0]


def update_ratios(model: nn.Module, before: list[Tensor]) -> dict[str, float]:
    """|update| / |weight| of each layer group over one step; about 1e-3 is healthy (Karpathy's rule of thumb).

    `before`: the trainable parameters as they were before the step. Adapters are left out: they begin at zero, so that
    their first steps are large beside them, and small beside the matrices that they belong to."""
    sums: dict[str, list[float]] = {}
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for (name, p), old in zip(named, before, strict=True):
        if lora.is_adapter(name):
            continue
        pair = sums.setdefault(layer_group(name), [0.0, 0.0])
        pair[0] += float((p.detach() - old).float().pow(2).sum())
        pair[1] += float(old.float().pow(2).sum())
    return {name: math.sqrt(update / weight) if weight else 0.0 for name, (update, weight) in sums.items()}


SAMPLE = 2**14  # numbers of a parameter: enough for a histogram


def sampled(model: nn.Module) -> dict[str, np.ndarray]:
    """Some numbers of the present gradient of each layer group, float32 arrays: of each parameter at most SAMPLE, in
    equal distances. Nothing is drawn and nothing changed."""
    found: dict[str, list[np.ndarray]] = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            numbers = numbers_of(p.grad).detach().flatten()
            some = numbers[:: -(-numbers.numel() // SAMPLE) or 1]
            found.setdefault(layer_group(name), []).append(some.float().cpu().numpy().copy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def find_not_finite(model: nn.Module, device: Device, losses_of: Callable[[dict[str, Tensor]], Tensor],
                    batches: Iterable[dict[str, Tensor]]) -> str:
    """Where a number that is not finite came up in a step's batches, in words: the output of a module, the loss, or a
    parameter's gradient. `losses_of(batch)` gives a batch's losses (B,); one more forward pass of each is made."""
    try:
        for batch in batches:
            if found := _first_bad_output(model, device, losses_of, batch):
                return found
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return "there is not enough memory to look where"
    bad = [name for name, p in model.named_parameters()
           if p.grad is not None and not torch.isfinite(numbers_of(p.grad)).all()]
    return f"the gradient of {bad[0]}" if bad else "the gradient"


def _first_bad_output(model: nn.Module, device: Device, losses_of: Callable[[dict[str, Tensor]], Tensor],
                      batch: dict[str, Tensor]) -> str:
    """The first module whose output is not finite, or the loss, or "". The random state is restored."""
    found: list[str] = []

    def look(name: str) -> Callable:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not found and any(isinstance(t, Tensor) and not torch.isfinite(t).all() for t in tensors):
                found.append(f"the output of {name or type(module).__name__}")
        return hook

    handles = [m.register_forward_hook(look(name)) for name, m in model.named_modules() if not any(m.children())]
    try:
        with torch.random.fork_rng(devices=[device.where] if device.is_cuda else []), torch.no_grad():
            with device.autocast():
                losses = losses_of(batch)
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    return "" if torch.isfinite(losses).all() else "the loss"
