"""What turns gradients into weights: learning-rate schedules, parameter groups, and optimizers, all from scratch.

A schedule is a pure function of the optimizer step, so a resumed run has the rate that it would have had.
"""

import ctypes
import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import kernels

# --------------------------------------------------------------------------- learning-rate schedules
#
# Each is a function of t = 0, 1, 2, ..., n: optimizer steps since the warmup, of n that remain. The value is a factor
# on the base rate; t = 0 is what the first update uses. A decay to `min_lr_ratio` (r) is there at t = n, just behind
# the last update, so that no update is spent at a rate of 0. Where "u" stands, it is the number of optimizer steps in
# one unit of `step_size`, `milestones`, `gamma` and `decay_rate`: 1, or an epoch's steps with schedule_every="epoch".


def constant(t: int, n: int) -> float:
    """1"""
    return 1.0


def linear(t: int, n: int, *, min_lr_ratio: float = 0.0) -> float:
    """1 - (1 - r) t/n"""
    return 1.0 - (1.0 - min_lr_ratio) * t / n


def cosine(t: int, n: int, *, min_lr_ratio: float = 1e-3) -> float:
    """r + (1 - r) (1 + cos(pi t/n)) / 2

    Loshchilov and Hutter 2017 (SGDR, arXiv 1608.03983), equation 5, one cycle.
    """
    return between(1.0, min_lr_ratio, t / n)


def cosine_restarts(t: int, n: int, *, cycles: int = 1, cycle_mult: float = 1.0, cycle_decay: float = 1.0,
                    min_lr_ratio: float = 1e-3) -> float:
    """r + (peak_k - r) (1 + cos(pi t_k/n_k)) / 2 in cycle k = 0 .. N-1, peak_k = max(r, decay^k), n_k ~ mult^k

    Loshchilov and Hutter 2017 (SGDR, arXiv 1608.03983), equation 5. The lengths n_k share the n steps in the
    proportions mult^k; cycle k begins at a whole step, the nearest one, so that a restart is always at its peak.
    """
    # Shares relative to the last cycle: mult ** k itself may overflow.
    shares = [cycle_mult ** -(cycles - 1 - k) for k in range(cycles)]
    starts = [round(n * s / sum(shares)) for s in itertools.accumulate(shares, initial=0.0)]
    k = max(k for k in range(cycles) if starts[k] <= t)
    return between(max(min_lr_ratio, cycle_decay**k), min_lr_ratio, (t - starts[k]) / max(1, starts[k + 1] - starts[k]))


def linear_cosine(t: int, n: int, *, min_lr_ratio: float = 1e-3) -> float:
    """(a + 1 - t/n) (1 + cos(2 pi c t/n)) / 2 + b with a = 0, c = 1/2 periods and b = r: it begins at 1 + r

    Bello et al. 2017 (Neural optimizer search, arXiv 1709.07417) with TensorFlow's defaults
    (tf.compat.v1.train.linear_cosine_decay: alpha 0, num_periods 0.5, beta 0.001).
    """
    return (1.0 - t / n) * between(1.0, 0.0, t / n) + min_lr_ratio


def step(t: int, n: int, *, step_size: int, gamma: float = 0.1, unit: int = 1) -> float:
    """gamma^floor(t / (u step_size))"""
    return gamma ** (t // (unit * step_size))


def multistep(t: int, n: int, *, milestones: Sequence[int], gamma: float = 0.1, unit: int = 1) -> float:
    """gamma^(number of milestones <= t/u)"""
    return gamma ** sum(t >= milestone * unit for milestone in milestones)


def exponential(t: int, n: int, *, gamma: float, unit: int = 1) -> float:
    """gamma^(t/u)"""
    return gamma ** (t / unit)


def natural_exp(t: int, n: int, *, decay_rate: float, unit: int = 1) -> float:
    """exp(-k t/u), k = decay_rate (tf.compat.v1.train.natural_exp_decay)"""
    return math.exp(-decay_rate * t / unit)


def inverse_time(t: int, n: int, *, decay_rate: float, unit: int = 1) -> float:
    """1 / (1 + k t/u), k = decay_rate (tf.keras.optimizers.schedules.InverseTimeDecay)"""
    return 1.0 / (1.0 + decay_rate * t / unit)


def polynomial(t: int, n: int, *, power: float = 1.0, min_lr_ratio: float = 0.0) -> float:
    """r + (1 - r) (1 - t/n)^power"""
    return min_lr_ratio + (1.0 - min_lr_ratio) * (1.0 - t / n) ** power


def inverse_sqrt(t: int, n: int, *, timescale: int = 10_000) -> float:
    """sqrt(s / (s + t)), s = warmup_steps, or 10000 without a warmup

    Vaswani et al. 2017 (arXiv 1706.03762), equation 3; the 10000 is transformers' get_inverse_sqrt_schedule's.
    """
    return math.sqrt(timescale / (timescale + t))


def cyclic(t: int, n: int, *, cycles: int = 1, cyclic_mode: str = "triangular", min_lr_ratio: float = 0.1) -> float:
    """r + (1 - r) h (1 - |2 frac(t N/n) - 1|), N cycles; h = 1, or 2^-floor(t N/n) for triangular2

    Smith 2017 (arXiv 1506.01186), section 3: up for half a cycle and down for the other; it begins at r.
    """
    cycle, place = divmod(t * cycles / n, 1.0)
    height = 1.0 if cyclic_mode == "triangular" else 0.5**cycle
    return min_lr_ratio + (1.0 - min_lr_ratio) * height * (1.0 - abs(2.0 * place - 1.0))


def one_cycle(t: int, n: int, *, pct_start: float = 0.3) -> float:
    """half a cosine from 1/25 up to 1 at t = pct_start n - 1, then half a cosine down to 1/250000 at t = n - 1

    Smith and Topin 2018 (arXiv 1708.07120), as torch.optim.lr_scheduler.OneCycleLR has it with div_factor 25 and
    final_div_factor 1e4. The one decay that ends at the last update, and not behind it.
    """
    first, peak, last, low = 1 / 25, pct_start * n - 1, n - 1, 1 / 25 / 1e4
    if t <= peak:
        return between(first, 1.0, t / peak if peak else 1.0)
    return between(1.0, low, min(1.0, (t - peak) / (last - peak)))


def wsd(t: int, n: int, *, decay_fraction: float = 0.2, min_lr_ratio: float = 0.0) -> float:
    """1, then over the last d = decay_fraction n steps r + (1 - r) (n - t)/d

    Warmup, stable, decay: Hu et al. 2024 (MiniCPM, arXiv 2404.06395); the linear decay is that of
    Haegele et al. 2024 (arXiv 2405.18392).
    """
    return min_lr_ratio + (1.0 - min_lr_ratio) * min(1.0, (n - t) / (decay_fraction * n))


def plateau(history: Sequence[float], *, gamma: float = 0.5, patience: int = 3, plateau_mode: str = "max",
            min_lr_ratio: float = 0.0) -> float:
    """max(r, gamma^k), k = how often `history` went more than `patience` values without a new best

    A function of the dev metric's values so far, oldest first, and of nothing else. Counted as
    torch.optim.lr_scheduler.ReduceLROnPlateau does with threshold 0: the count begins anew after each cut.
    """
    best, bad, cuts = -math.inf, 0, 0
    for value in history:
        value = value if plateau_mode == "max" else -value
        best, bad = (value, 0) if value > best else (best, bad + 1)
        if bad > patience:
            cuts, bad = cuts + 1, 0
    return max(min_lr_ratio, gamma**cuts)


def between(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` at progress 0 to `end` at progress 1."""
    return end + (start - end) * (1.0 + math.cos(math.pi * progress)) / 2.0


SCHEDULES: dict[str, Callable[..., float]] = {f.__name__: f for f in (
    constant, linear, cosine, cosine_restarts, linear_cosine, step, multistep, exponential, natural_exp, inverse_time,
    polynomial, inverse_sqrt, cyclic, one_cycle, wsd, plateau)}

# What `make_schedule` works out itself; every other argument of a schedule is an option of that name.
_DERIVED = ("t", "n", "unit", "timescale", "history")

SCHEDULE_OPTIONS: dict[str, tuple[str, ...]] = {
    name: tuple(p for p in inspect.signature(f).parameters if p not in _DERIVED) for name, f in SCHEDULES.items()}


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and value >= least


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "min_lr_ratio": (lambda v: 0 <= v <= 1, "between 0 and 1"),
    "cycles": (lambda v: _whole(v, 1), "a whole number from 1"),
    "cycle_mult": (lambda v: 1 <= v < math.inf, "1 or more"),
    "cycle_decay": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "step_size": (lambda v: _whole(v, 1), "a whole number from 1"),
    "milestones": (lambda v: all(_whole(m, 1) for m in v) and all(a < b for a, b in itertools.pairwise(v)),
                   "whole numbers from 1, each larger than the one before"),
    "gamma": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "decay_rate": (lambda v: 0 < v < math.inf, "above 0"),
    "power": (lambda v: 0 < v < math.inf, "above 0"),
    "decay_fraction": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "cyclic_mode": (lambda v: v in ("triangular", "triangular2"), "triangular or triangular2"),
    "pct_start": (lambda v: 0 < v < 1, "between 0 and 1"),
    "patience": (lambda v: _whole(v, 0), "a whole number from 0"),
    "plateau_mode": (lambda v: v in ("max", "min"), "max or min"),
}


def make_schedule(name: str, *, total_steps: int, steps_an_epoch: int = 1, warmup_steps: int = 0,
                  warmup_kind: str = "linear", warmup_start: float = 0.0, schedule_every: str = "step",
                  **options: Any) -> Callable[..., float]:
    """The schedule `name` with a warmup in front: factor(i) or factor(i, history), on the base rate, for step i.

        i < W, linear:    start + (f(0) - start) (i + 1) / W      i < W, constant:    start
        i >= W:           f(t) of n steps, t = i - W and n = total - W

    W is `warmup_steps`, start is `warmup_start`, and f is the schedule; f(0), where the last step of a linear warmup
    arrives, is 1 for all but cyclic and one_cycle, which begin low, and linear_cosine, which begins at 1 + r. The
    step that would have the rate 0 is left out. A step beyond the run has the last value, f(n).

    schedule_every="epoch" makes a staircase: f has the value of the epoch's first step, and `step_size`, `milestones`,
    and the unit of `gamma` and `decay_rate` are epochs; they are optimizer steps otherwise. The schedule's epoch 0 is
    then the one in which the warmup ends: with E = `steps_an_epoch` and B = E floor(W / E), t = E floor(i / E) - B
    and n = total - B. The warmup itself goes by steps.

    `options` are those of SCHEDULE_OPTIONS; None or () leaves the schedule's default, and what it has no use for is
    checked and ignored. `history` is the dev metric's values so far, which plateau wants and no other.

    Raises ValueError, naming the option, for a value out of range and for one that is missing.
    """
    function = SCHEDULES.get(name)
    if function is None:
        raise ValueError(f"--scheduler {name} is none of {', '.join(SCHEDULES)}")
    _check_steps(total_steps, steps_an_epoch, warmup_steps, warmup_kind, warmup_start, schedule_every)
    given = {key: value for key, value in options.items() if value not in (None, (), [])}
    for key, value in given.items():
        if key not in _CHECKS:
            raise ValueError(f"no schedule has an option {key}")
        holds, wanted = _CHECKS[key]
        if not holds(value):
            raise ValueError(f"--{key} {value} must be {wanted}")
    used = {key: given[key] for key in SCHEDULE_OPTIONS[name] if key in given}
    parameters = inspect.signature(function).parameters
    for key in SCHEDULE_OPTIONS[name]:
        if key not in used and parameters[key].default is inspect.Parameter.empty:
            raise ValueError(f"--scheduler {name} needs --{key}")
    by_epoch = schedule_every == "epoch"
    if "unit" in parameters and by_epoch:
        used["unit"] = steps_an_epoch
    if "timescale" in parameters and warmup_steps:
        used["timescale"] = warmup_steps
    begin = warmup_steps // steps_an_epoch * steps_an_epoch if by_epoch else warmup_steps
    n = max(1, total_steps - begin)

    def behind_warmup(i: int, history: Sequence[float]) -> float:
        if function is plateau:
            return plateau(history, **used)
        at = i // steps_an_epoch * steps_an_epoch if by_epoch else i
        return function(min(max(0, at - begin), n), n, **used)

    def factor(i: int, history: Sequence[float] = ()) -> float:
        if i >= warmup_steps:
            return behind_warmup(i, history)
        if warmup_kind == "constant":
            return warmup_start
        top = behind_warmup(begin, history)
        return warmup_start + (top - warmup_start) * ((i + 1) / warmup_steps)

    return factor


def _check_steps(total_steps: int, steps_an_epoch: int, warmup_steps: int, warmup_kind: str, warmup_start: float,
                 schedule_every: str) -> None:
    if total_steps < 1 or steps_an_epoch < 1:
        raise ValueError(f"a run of {total_steps} steps, {steps_an_epoch} an epoch, has no schedule")
    if warmup_steps < 0:
        raise ValueError(f"--warmup_steps {warmup_steps} must be 0 or more")
    if warmup_steps > total_steps:
        raise ValueError(f"--warmup_steps {warmup_steps} is beyond the run's {total_steps} steps")
    if warmup_kind not in ("linear", "constant"):
        raise ValueError(f"--warmup_kind {warmup_kind} must be linear or constant")
    if not 0 <= warmup_start <= 1:
        raise ValueError(f"--warmup_start {warmup_start} must be between 0 and 1")
    if warmup_steps and warmup_kind == "constant" and warmup_start == 0:
        raise ValueError("--warmup_kind constant needs a --warmup_start above 0, or nothing is learned in it")
    if schedule_every not in ("step", "epoch"):
        raise ValueError(f"--schedule_every {schedule_every} must be step or epoch")


def lr_scale(kind: str, effective_batch: int, base_batch: int) -> float:
    """The factor on the learning rate for a batch of B = `effective_batch` where it was tuned at `base_batch`.

    "linear": B / base (Goyal et al. 2017, arXiv 1706.02677, section 2.1); "sqrt": sqrt(B / base), which keeps the
    variance of an update (Krizhevsky 2014, arXiv 1404.5997). Raises ValueError for another kind or a batch
    below 1.
    """
    if effective_batch < 1 or base_batch < 1:
        raise ValueError(f"batches of {effective_batch} and {base_batch} sentences must be 1 or more")
    if kind == "linear":
        return effective_batch / base_batch
    if kind == "sqrt":
        return math.sqrt(effective_batch / base_batch)
    raise ValueError(f"the learning rate scales linear or sqrt with the batch, not {kind}")


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


def _loss(closure: Callable[[], Tensor] | None) -> Tensor | None:
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


def _with_gradient(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> Iterator[nn.Parameter]:
    """The group's parameters that have a gradient."""
    for p in group["params"]:
        if p.grad is not None:
            if p.grad.is_sparse:
                raise ValueError(f"{type(optimizer).__name__} wants dense gradients")
            yield p


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

    After `kernels.switch(True)`, float32 on the CPU is updated by ten lines of C (`kernels.c`), in one pass over memory
    where PyTorch makes seven; everything else by `eager_adamw`. The two agree to rounding.

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
    ):
        _check_not_negative(lr=lr, eps=eps, weight_decay=weight_decay)
        _check_betas(betas)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
                                  "correct_bias": correct_bias})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient."""
        loss = _loss(closure)
        calls = []
        for group in self.param_groups:
            eager = []
            for p in group["params"]:
                if p.grad is None:
                    continue
                moments = self._count(p, group)
                if _suits_native(moments):
                    calls.append((moments, group))
                else:
                    eager.append(moments._replace(g=moments.g.to_dense()))
            eager_adamw(eager, group)
        if calls:
            _run_native(kernels.library(), calls)
        return loss

    def _count(self, p: nn.Parameter, group: dict[str, Any]) -> _Moments:
        """Count one step of p, whose state begins at zero, and work out its step size."""
        state = self.state[p]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        state["step"] += 1
        step_size = group["lr"]
        if group["correct_bias"]:
            beta1, beta2 = group["betas"]
            step_size *= (1 - beta2 ** state["step"]) ** 0.5 / (1 - beta1 ** state["step"])
        g = p.grad
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


def _suits_native(moments: _Moments) -> bool:
    """Is C switched on, and all of it float32 on the CPU without holes?"""
    g = moments.g._values() if moments.g.is_sparse else moments.g
    tensors = (moments.p, g, moments.m, moments.v)
    return kernels.suits(*tensors) and all(t.dtype == torch.float32 and t.is_contiguous() for t in tensors)


def _run_native(library: ctypes.CDLL, calls: list[tuple[_Moments, dict[str, Any]]]) -> None:
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
    touched = moments.g._indices()[0]
    places = torch.full((len(moments.active),), -1)
    places[touched] = torch.arange(len(touched))
    rows = moments.active.nonzero()[:, 0]
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
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient."""
        loss = _loss(closure)
        for group in self.param_groups:
            for p in _with_gradient(self, group):
                update = p.grad
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
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient."""
        loss = _loss(closure)
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in _with_gradient(self, group):
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                update = state["exp_avg"].lerp(p.grad, 1 - beta1).sign_()
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])
                state["exp_avg"].lerp_(p.grad, 1 - beta2)
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
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update of every parameter that has a gradient."""
        loss = _loss(closure)
        for group in self.param_groups:
            for p in _with_gradient(self, group):
                update = p.grad * self._inverse_root(p, group)
                update /= (_rms(update) / group["clip_threshold"]).clamp_(min=1)
                if group["scale_parameter"]:
                    scale = _rms(p).clamp_(min=group["eps"][1])
                    update *= scale
                else:
                    scale = 1.0
                p.mul_(1 - group["lr"] * group["weight_decay"] * scale).sub_(update, alpha=group["lr"])
        return loss

    def _inverse_root(self, p: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """1 / sqrt(v), which broadcasts to p's shape, after v has seen the gradient."""
        state = self.state[p]
        squared = p.grad.square().add_(group["eps"][0])
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


OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"adamw": AdamW, "sgd": SGD, "lion": Lion, "adafactor": Adafactor}
