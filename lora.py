"""Low-rank adapters (LoRA): the pretrained weights stay as they are, and beside some matrices a product of two thin
ones is trained. Three variants: LoRA, rsLoRA (another scale) and DoRA (magnitude and direction apart).

Shapes: a matrix W (out, in), its adapter A (r, in) and B (out, r).
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from config import LORA_TARGETS, InputError, LlamaConfig, LoraConfig
from formats import adapters
from formats.adapters import Adapter, row_norms
from llama import Linear, Llama

ADAPTER = ("lora_a", "lora_b", "magnitude")  # the last part of the adapters' names


class LoRALinear(Linear):
    """A matrix product with an adapter: W x + s B A x (Hu et al. 2021, arXiv 2106.09685, eq. 3), s = config.scale.

    With `config.dora` each row of W + s B A is scaled to a learned length m (Liu et al. 2024, arXiv 2402.09353, eq. 5):

        m (W x + s B A x) / |W + s B A|

    where |.| is each row's norm, a constant for the gradient (section 4.3). The dropout is in front of A alone.

    Parameters: `weight` (out, in), frozen, maybe in bfloat16; `lora_a` (r, in); `lora_b` (out, r), at first 0, so that
    nothing changes; with DoRA `magnitude` (out,), at first the rows' norms. Those are in float32.
    """

    def __init__(self, linear: Linear, config: LoraConfig):
        """Takes over the weight of `linear`."""
        with torch.device("meta"):  # the parent's own weight is not wanted
            super().__init__(linear.in_features, linear.out_features)
        self.ops = linear.ops
        self.weight = linear.weight
        self.weight.requires_grad_(False)
        self.scale, self.dropout = config.scale, config.dropout
        self.lora_a = nn.Parameter(torch.empty(config.r, linear.in_features))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, config.r))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as PEFT does: uniform in +- 1 / sqrt(in)
        self.magnitude = nn.Parameter(row_norms(linear.weight.detach())) if config.dora else None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) to (..., out)."""
        out = self.ops.linear(x, self.weight)
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_a)
        out = torch.addmm(out.flatten(0, -2), low.flatten(0, -2), self.lora_b.T, alpha=self.scale).view(out.shape)
        if self.magnitude is None:
            return out
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            norms = row_norms(adapters.effective(self.weight, self.lora_a, self.lora_b, self.scale))
        return out * (self.magnitude / norms).to(out.dtype)


def add(llama: Llama, config: LoraConfig) -> None:
    """Freeze a Llama and put adapters beside its matrices, in place. Raises ValueError where it has some already."""
    if has_adapters(llama):
        raise ValueError("this model has adapters already")
    llama.requires_grad_(False)
    for layer in llama.layers:
        for target in config.targets:
            part, _, name = LORA_TARGETS[target].partition(".")
            parent = layer.get_submodule(part)
            setattr(parent, name, LoRALinear(getattr(parent, name), config))


def has_adapters(model: nn.Module) -> bool:
    """Has this model, or one inside it, adapters?"""
    return next(adapted(model), None) is not None


def adapted(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The matrices with adapters, with their names."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


def is_adapter(name: str) -> bool:
    """Is this the name of an adapter's parameter?"""
    return name.rpartition(".")[2] in ADAPTER


def merge(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the same model without adapters, by their names, in float32: where there was one, W + s B A (and
    with DoRA its rows scaled). The model stays as it is. Raises InputError for numbers that are not finite."""
    weights = {name: tensor.detach().float() for name, tensor in model.state_dict().items() if not is_adapter(name)}
    for name, module in adapted(model):
        with torch.no_grad():
            weights[f"{name}.weight"] = adapters.merged(name, module.weight, module.lora_a, module.lora_b, module.scale,
                                                        module.magnitude)
    return weights


def check(adapter: Adapter, config: LlamaConfig) -> None:
    """Raises InputError where an adapter is not one for a Llama of this shape."""
    with torch.device("meta"):
        llama = Llama(replace(config, n_layers=adapter.n_layers))
        add(llama, adapter.config)
    check_shapes(llama, adapter)


def check_shapes(llama: Llama, adapter: Adapter) -> dict[str, nn.Parameter]:
    """The adapters' parameters of a model. Raises InputError where those of an adapter are of other shapes, which means
    another base."""
    own = {name: parameter for name, parameter in llama.named_parameters() if is_adapter(name)}
    for name in sorted(own.keys() | adapter.tensors.keys()):
        wanted, found = own.get(name), adapter.tensors.get(name)
        if wanted is None or found is None or wanted.shape != found.shape:
            shapes = [None if one is None else tuple(one.shape) for one in (found, wanted)]
            raise InputError(f"{adapter.path}: its {name} has the shape {shapes[0]}, and this model wants {shapes[1]}; "
                             "is the adapter for another base?")
    return own


def load(llama: Llama, adapter: Adapter) -> None:
    """Put the numbers of an adapter into a model that has such adapters, in place. Raises as `check_shapes`."""
    with torch.no_grad():
        for name, parameter in check_shapes(llama, adapter).items():
            parameter.copy_(adapter.tensors[name])


def hold_base(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the frozen matrices of a model with adapters in `dtype`, in place: those are what autocast's products want,
    and it has not to cast them at each one. Norms stay in float32."""
    if has_adapters(model):
        for name, parameter in model.named_parameters():
            if not is_adapter(name) and name.startswith("llama.") and parameter.dim() > 1:
                parameter.data = parameter.data.to(dtype)


def without_base(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the `state_dict` of a classifier with adapters those and the head; of one without adapters all."""
    if not any(map(is_adapter, state)):
        return state
    return {name: tensor for name, tensor in state.items() if is_adapter(name) or not name.startswith("llama.")}
