"""What turns gradients into weights: parameter groups and optimizers, all from scratch."""

import ctypes
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fused

# --------------------------------------------------------------------------- parameter groups


def parameter_groups(model: nn.Module, lr: float, weight_decay: float, layerwise_lr_decay: float = 1.0,
                     head_lr: float | None = None, decay_all: bool = False) -> list[dict[str, Any]]:
    """Groups for an optimizer: {"name", "lr", "weight_decay", "params"}, of what requires a gradient, in model order.

        lr d^L for the embeddings;   lr d^(L - 1 - l) for layer l of L;   lr for the last norm;   `head_lr` or lr

    for `classifier_head`, where d is `layerwise_lr_decay` (Howard and Ruder 2018, arXiv 1801.06146, section 3.2;
    Clark et al. 2020 (ELECTRA), arXiv 2003.10555, where the top layer is already one step down). Norms
    and biases, the parameters of one dimension, have no weight decay unless `decay_all`. Parameters with the same
    rate and decay share a group, and a tied parameter is in one group only.

    Raises ValueError for d outside (0, 1] and for a rate or a decay below 0.
    """
    if not 0 < layerwise_lr_decay <= 1:
        raise ValueError(f"--layerwise_lr_decay {layerwise_lr_decay} must be above 0 and at most 1")
    if lr < 0 or weight_decay < 0 or (head_lr is not None and head_lr < 0):
        raise ValueError(f"lr {lr}, head_lr {head_lr} and weight_decay {weight_decay} must all be 0 or more")
    named = list(model.named_parameters())  # a tied parameter under its first name only
    n_layers = 1 + max((layer for name, _ in named if (layer := _layer(name)) is not None), default=-1)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    parts: dict[tuple[float, float], list[str]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        part, depth = _place(name, n_layers)
        rate = head_lr if part == "head" and head_lr is not None else lr * layerwise_lr_decay**depth
        key = (rate, weight_decay if decay_all or parameter.dim() > 1 else 0.0)
        group = groups.setdefault(key, {"name": "", "lr": rate, "weight_decay": key[1], "params": []})
        group["params"].append(parameter)
        parts.setdefault(key, []).append(part)
    for key, group in groups.items():
        first, last = parts[key][0], parts[key][-1]
        group["name"] = (first if first == last else f"{first} to {last}") + (", no decay" if not key[1] else "")
    return list(groups.values())


def _layer(name: str) -> int | None:
    """The number of the layer that a parameter belongs to."""
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def _place(name: str, n_layers: int) -> tuple[str, int]:
    """A parameter's part of the model, and how many decays of the rate it is below the top."""
    layer = _layer(name)
    if layer is not None:
        return f"layer {layer}", n_layers - 1 - layer
    if "tok_embeddings" in name:
        return "embeddings", n_layers
    return ("head" if name.startswith("classifier_head") else "top"), 0


# --------------------------------------------------------------------------- optimizers


def _loss(closure: Callable[[], Any] | None) -> Any:
    """What a step returns: the closure's loss, with its gradients computed."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _check_not_negative(**values: float) -> None:
    if not all(value >= 0 for value in values.values()):
        raise ValueError(", ".join(f"{k} {v}" for k, v in values.items()) + " must all be 0 or more")


def _check_betas(betas: tuple[float, float]) -> None:
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas {betas} must be at least 0 and below 1")


def _with_gradient(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The group's parameters that have a gradient, and it."""
    for p in group["params"]:
        if p.grad is not None:
            if p.grad.is_sparse:
                raise ValueError(f"{type(optimizer).__name__} wants dense gradients")
            yield p, p.grad


class _Moments(NamedTuple):
    """One parameter's part in a step of AdamW; the tensors have one shape."""

    p: Tensor
    g: Tensor
    m: Tensor
    v: Tensor
    step_size: float
    active: Tensor | None = None  # (rows,) bool: which have had a gradient, where that is sparse


def _without_compiler(optimizer: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """PyTorch wraps these methods so that torch.compile leaves them alone, and the wrapper imports the compiler at its
    first call: two seconds of every run. Nothing here compiles an optimizer."""
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        method = getattr(torch.optim.Optimizer, name)
        setattr(optimizer, name, getattr(method, "__wrapped__", method))
    return optimizer


@_without_compiler
class AdamW(torch.optim.Optimizer):
    """Adam (Kingma and Ba 2015, arXiv 1412.6980) with decoupled weight decay (Loshchilov and Hutter 2019, 1711.05101).

        m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2
        p = p - lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)     (the efficient form, end of section 2)
        p = p - lr weight_decay p

    The decay comes after the update and is scaled by lr alone. `correct_bias=False` leaves out the two factors
    1 - b^t. Raises ValueError for a value out of range.

    With `fused=True`, float32 on the CPU is updated by ten lines of C (`fused.c`), in one pass over memory where
    PyTorch makes seven; everything else, and all of it without a C compiler, by `eager_adamw`. The two agree to
    rounding, and a state does not say which it was: it can be loaded for either.

    A sparse gradient, an embedding's, is the dense one of mostly zeros: rows that had a gradient at an earlier step
    move on with their moments. Only those that never had one are passed over, which without weight decay is exact.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        *,
        fused: bool = False,
    ):
        _check_not_negative(lr=lr, eps=eps, weight_decay=weight_decay)
        _check_betas(betas)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
                                  "correct_bias": correct_bias})
        self.is_fused = fused

    def __getstate__(self) -> dict[str, Any]:
        """What a copy keeps: PyTorch's has the defaults, the groups and the state only."""
        return {**super().__getstate__(), "is_fused": self.is_fused}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = _loss(closure)
        library = fused.library() if self.is_fused else None
        calls = []
        for group in self.param_groups:
            eager = []
            for p in group["params"]:
                if p.grad is None:
                    continue
                moments = self._count(p, p.grad, group)
                if library and _fits_fused(moments):
                    calls.append((moments, group))
                else:
                    eager.append(moments._replace(g=moments.g.to_dense()))
            eager_adamw(eager, group)
        if library and calls:
            _run_fused(library, calls)
        return loss

    def _count(self, p: nn.Parameter, g: Tensor, group: dict[str, Any]) -> _Moments:
        """Count one step of p with the gradient g; its state begins at zero. Works out its step size."""
        state = self.state[p]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state["step"] += 1
        step_size = group["lr"]
        if group["correct_bias"]:
            beta1, beta2 = group["betas"]
            step_size *= (1 - beta2 ** state["step"]) ** 0.5 / (1 - beta1 ** state["step"])
        if g.is_sparse and group["weight_decay"]:
            g = g.to_dense()  # every row decays
        elif g.is_sparse:
            g = g.coalesce()
            if "active" not in state:
                state["active"] = ((state["exp_avg"] != 0) | (state["exp_avg_sq"] != 0)).any(1)
            state["active"] = state["active"].bool()  # PyTorch loads every tensor of a state in the parameter's type
            state["active"][g._indices()[0]] = True
        if not g.is_sparse:
            state.pop("active", None)  # a dense step moves rows that this does not know of
        return _Moments(p, g, state["exp_avg"], state["exp_avg_sq"], step_size, state.get("active"))


def eager_adamw(moments: list[_Moments], group: dict[str, Any]) -> None:
    """AdamW's formula, in place, in PyTorch's operations on lists of tensors.

    On a GPU the whole group is one list, so that a kernel is started for many tensors and not for each. Elsewhere
    that gains nothing, and one tensor at a time keeps the memory for sqrt(v) small.
    """
    beta1, beta2 = group["betas"]
    on_gpu = all(one.p.is_cuda for one in moments)
    for part in [moments] if on_gpu and moments else [[one] for one in moments]:
        p, g, m, v, step_sizes, _ = (list(column) for column in zip(*part, strict=True))
        torch._foreach_lerp_(m, g, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, g, g, 1 - beta2)
        denominators = torch._foreach_sqrt(v)
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_addcdiv_(p, m, denominators, [-s for s in step_sizes])
        if group["weight_decay"]:
            torch._foreach_mul_(p, 1 - group["lr"] * group["weight_decay"])


def _fits_fused(moments: _Moments) -> bool:
    """Is all of it float32 on the CPU without holes?"""
    g = moments.g._values() if moments.g.is_sparse else moments.g
    tensors = (moments.p, g, moments.m, moments.v)
    return fused.supports(*tensors) and all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors)


def _run_fused(library: ctypes.CDLL, calls: list[tuple[_Moments, dict[str, Any]]]) -> None:
    """Each of PyTorch's number of threads does its equal part of every tensor; C runs outside Python's lock."""
    threads = torch.get_num_threads()
    rows = {id(moments): _rows(moments) for moments, _ in calls if moments.g.is_sparse}

    def work(thread: int) -> None:
        for moments, group in calls:
            p, g, m, v, step_size = moments[:5]
            (beta1, beta2), keep = group["betas"], 1 - group["lr"] * group["weight_decay"]
            numbers = (1 - beta1, beta2, 1 - beta2, step_size, group["eps"], keep)
            n = len(rows[id(moments)][0]) if g.is_sparse else p.numel()
            dim = p.shape[-1] if g.is_sparse else 1
            part = max(-(-n // threads), (1 << 14) // dim)  # no part so small that calling costs more than computing
            begin, end = min(n, thread * part), min(n, (thread + 1) * part)
            if begin == end:
                continue
            if g.is_sparse:
                active, places, zeros = rows[id(moments)]
                library.adamw_rows(end - begin, dim, *(t.data_ptr() + begin * 8 for t in (active, places)),
                                   p.data_ptr(), g._values().data_ptr(), m.data_ptr(), v.data_ptr(), zeros.data_ptr(),
                                   *numbers)
            else:
                library.adamw(end - begin, *(t.data_ptr() + begin * 4 for t in (p, g, m, v)), *numbers)

    if threads == 1:
        work(0)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))  # the list raises what a thread raised
    torch.autograd.graph.increment_version([moments.p for moments, _ in calls])  # autograd did not see the writing


def _rows(moments: _Moments) -> tuple[Tensor, Tensor, Tensor]:
    """The rows that have had a gradient at any step (N,), where in the present gradient each is, or -1 (N,), and a row
    of zeros. All other rows have moments of 0, and without decay they stay as they are."""
    touched, active = moments.g._indices()[0], moments.active
    assert active is not None  # which a sparse gradient has
    places = torch.full((len(active),), -1)
    places[touched] = torch.arange(len(touched))
    rows = active.nonzero()[:, 0]
    return rows, places[rows], moments.p.new_zeros(moments.p.shape[-1])


@_without_compiler
class SGD(torch.optim.Optimizer):
    """Stochastic gradient descent with momentum mu (Sutskever et al. 2013), as torch.optim.SGD with dampening 0.

        g = g + weight_decay p;   b = mu b + g  (b = g at first);   p = p - lr b,  or p - lr (g + mu b) with nesterov

    With `decoupled` the decay is AdamW's instead: it comes after the update, p = p - lr weight_decay p. Raises
    ValueError for a value out of range, nesterov without momentum, and a sparse gradient.
    """

    def __init__(self, params: Iterable, lr: float = 1e-3, momentum: float = 0.0, nesterov: bool = False,
                 weight_decay: float = 0.0, decoupled: bool = False):
        _check_not_negative(lr=lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and not momentum:
            raise ValueError("nesterov needs a momentum above 0")
        super().__init__(params, {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay,
                                  "decoupled": decoupled})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = _loss(closure)
        for group in self.param_groups:
            for p, update in _with_gradient(self, group):
                if group["weight_decay"] and not group["decoupled"]:
                    update = update.add(p, alpha=group["weight_decay"])
                if group["momentum"]:
                    update = self._momentum(p, update, group)
                p.add_(update, alpha=-group["lr"])
                if group["weight_decay"] and group["decoupled"]:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
        return loss

    def _momentum(self, p: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = gradient.clone()
        else:
            state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        buffer = state["momentum_buffer"]
        return gradient.add(buffer, alpha=group["momentum"]) if group["nesterov"] else buffer


@_without_compiler
class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2): the sign of an interpolated momentum.

        u = sign(b1 m + (1 - b1) g);   p = p - lr (u + weight_decay p);   m = b2 m + (1 - b2) g

    It wants a rate 3 to 10 times smaller than AdamW's, and a decay as much larger (section 5). Raises ValueError for
    a value out of range and for a sparse gradient.
    """

    def __init__(self, params: Iterable, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99),
                 weight_decay: float = 0.0):
        _check_not_negative(lr=lr, weight_decay=weight_decay)
        _check_betas(betas)
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = _loss(closure)
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p, gradient in _with_gradient(self, group):
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                update = state["exp_avg"].lerp(gradient, 1 - beta1).sign_()
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
                state["exp_avg"].lerp_(gradient, 1 - beta2)
        return loss


@_without_compiler
class Adafactor(torch.optim.Optimizer):
    """Adafactor (Shazeer and Stern 2018, arXiv 1804.04235, algorithms 4 and 5): v in the memory of a row and a column.

        b2 = 1 - t^decay_rate;   R = b2 R + (1 - b2) mean_columns(g^2 + eps1);   C likewise over the rows
        u = g / sqrt(R C / mean(R));   u = u / max(1, rms(u) / clip_threshold)
        p = p - lr weight_decay p - lr u            lr: times max(eps2, rms(p)) with `scale_parameter`

    A parameter of one dimension has a whole v. The same as transformers' Adafactor with relative_step=False and
    beta1=None: the rate is the schedule's, and there is no momentum. Raises ValueError for a value out of range and
    for a sparse gradient.
    """

    def __init__(self, params: Iterable, lr: float = 1e-3, eps: tuple[float, float] = (1e-30, 1e-3),
                 clip_threshold: float = 1.0, decay_rate: float = -0.8, weight_decay: float = 0.0,
                 scale_parameter: bool = False):
        _check_not_negative(lr=lr, eps1=eps[0], eps2=eps[1], weight_decay=weight_decay)
        if clip_threshold <= 0 or decay_rate >= 0:
            raise ValueError(f"clip_threshold {clip_threshold} must be above 0 and decay_rate {decay_rate} below")
        super().__init__(params, {"lr": lr, "eps": eps, "clip_threshold": clip_threshold, "decay_rate": decay_rate,
                                  "weight_decay": weight_decay, "scale_parameter": scale_parameter})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient."""
        loss = _loss(closure)
        for group in self.param_groups:
            for p, gradient in _with_gradient(self, group):
                update = gradient * self._inverse_root(p, gradient, group)
                update /= (_rms(update) / group["clip_threshold"]).clamp_(min=1)
                scale: Tensor | float = 1.0
                if group["scale_parameter"]:
                    scale = _rms(p).clamp_(min=group["eps"][1])
                    update *= scale
                p.mul_(1 - group["lr"] * group["weight_decay"] * scale).sub_(update, alpha=group["lr"])
        return loss

    def _inverse_root(self, p: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> Tensor:
        """1 / sqrt(v), which broadcasts to p's shape, after v has seen the gradient."""
        state = self.state[p]
        squared = gradient.square().add_(group["eps"][0])
        if not state:
            state["step"] = 0
            if p.dim() > 1:
                state["exp_avg_sq_row"] = squared.new_zeros(p.shape[:-1])
                state["exp_avg_sq_col"] = squared.new_zeros(p.shape[:-2] + p.shape[-1:])
            else:
                state["exp_avg_sq"] = torch.zeros_like(squared)
        state["step"] += 1
        weight = state["step"] ** group["decay_rate"]  # 1 - b2
        if p.dim() < 2:
            return state["exp_avg_sq"].lerp_(squared, weight).rsqrt()
        row = state["exp_avg_sq_row"].lerp_(squared.mean(-1), weight)
        column = state["exp_avg_sq_col"].lerp_(squared.mean(-2), weight)
        return (row / row.mean(-1, keepdim=True)).rsqrt_()[..., None] * column.rsqrt()[..., None, :]


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": AdamW, "sgd": SGD, "lion": Lion, "adafactor": Adafactor}
