"""Learning-rate schedules, each a pure function of the optimizer step: a resumed run goes on with the rate it had.

A schedule stands in one place: a function below, under `@register()`. Its name is the choice of --scheduler, and each
argument that is annotated with an `Option` is an option of the command line, which config/ makes from it.
"""

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, NamedTuple, TypeVar, get_args, get_origin

REQUIRED = inspect.Parameter.empty  # the default of an option that must be given
DEFAULT_WARMUP = 0.06  # of the run (Liu et al. 2019, RoBERTa, arXiv 1907.11692, table 10)


class Check(NamedTuple):
    """A condition on an option's value, and the words that finish the sentence "it must be ..."."""

    holds: Callable[[Any], bool]
    words: str


class Need(NamedTuple):
    """A condition on all the options together, and what is said when it does not hold; {lr} stands for --lr's value."""

    holds: Callable[[Any], bool]
    words: str

    def said(self, name: str, options: Any) -> str:
        """The words for the option `name`, with the values of the `options`."""
        return self.words.format(name=name, **{k: "not given" if v is None else v for k, v in vars(options).items()})


# The upper limits keep every product of options inside a float32 and an int64.
POSITIVE = Check(lambda x: 0 < x <= 1e30, "above 0 and at most 1e30")
NOT_NEGATIVE = Check(lambda x: 0 <= x <= 1e30, "0 or more, and at most 1e30")
AT_LEAST_ONE = Check(lambda x: isinstance(x, int) and 1 <= x < 2**31, "1 or more, and below 2^31")
INSIDE = Check(lambda x: 0 < x < 1, "above 0 and below 1")
FRACTION = Check(lambda x: 0 < x <= 1, "above 0 and at most 1")
FRACTION_OR_ZERO = Check(lambda x: 0 <= x <= 1, "between 0 and 1")
FINITE_FROM_ONE = Check(lambda x: 1 <= x < math.inf, "1 or more")
RISING = Check(lambda xs: all(isinstance(x, int) for x in xs) and all(a < b for a, b in itertools.pairwise((0, *xs))),
               "whole numbers from 1, each larger than the one before")


@dataclass(frozen=True)
class Option:
    """An option of the command line: its help, the values it accepts, what it needs to have an effect, the options of
    which only one may be given, and what other programs call it. Type and default are those of the argument."""

    help: str
    check: Check | None = None
    needs: tuple[Need, ...] = ()
    choices: tuple[str, ...] = ()
    one_of: tuple[str, ...] = ()
    also: str = ""
    metavar: str | None = None
    type: Any = None
    default: Any = REQUIRED


class Schedule(NamedTuple):
    """`factor` on the base rate, with its own `options`; `default_warmup` is the part of a run that warms up when the
    user says nothing. A schedule that is not `by_step` is not a function of the step."""

    factor: Callable[..., float]
    options: dict[str, Option]
    default_warmup: float = DEFAULT_WARMUP
    by_step: bool = True


SCHEDULES: dict[str, Schedule] = {}
Factor = TypeVar("Factor", bound=Callable[..., float])


def options_of(function: Callable[..., Any]) -> dict[str, Option]:
    """The arguments of a function that are annotated with an `Option`, by name."""
    return {name: replace(get_args(p.annotation)[1], type=get_args(p.annotation)[0], default=p.default)
            for name, p in inspect.signature(function).parameters.items() if get_origin(p.annotation) is Annotated}


def register(default_warmup: float = DEFAULT_WARMUP, by_step: bool = True) -> Callable[[Factor], Factor]:
    """A decorator that puts a function into SCHEDULES under its name."""
    def add(function: Factor) -> Factor:
        SCHEDULES[function.__name__] = Schedule(function, options_of(function), default_warmup, by_step)
        return function
    return add


# Options that several schedules share.
MinLrRatio = Annotated[float, Option("the lowest rate, times lr", FRACTION_OR_ZERO)]
Gamma = Annotated[float, Option("the factor of a cut", FRACTION)]
DecayRate = Annotated[float, Option("how fast the rate decays, k in the formula", POSITIVE)]
Cycles = Annotated[int, Option("how many cycles the run has", AT_LEAST_ONE)]
SEVERAL = (Need(lambda options: (options.cycles or 1) > 1, "there is one cycle only; give --cycles"),)

# --------------------------------------------------------------------------- the schedules
#
# Each is a function of t = 0, 1, 2, ..., n: optimizer steps since the warmup, of n that remain. The value is a factor
# on the base rate; t = 0 is what the first update uses. A decay to `min_lr_ratio` (r) is there at t = n, just behind
# the last update, so that no update is spent at a rate of 0. Where "u" stands, it is the number of optimizer steps in
# one unit of `step_size`, `milestones`, `gamma` and `decay_rate`: 1, or an epoch's steps with schedule_every="epoch".


@register(default_warmup=0.0, by_step=False)
def constant(t: int, n: int) -> float:
    """1"""
    return 1.0


@register()
def linear(t: int, n: int, *, min_lr_ratio: MinLrRatio = 0.0) -> float:
    """1 - (1 - r) t/n"""
    return 1.0 - (1.0 - min_lr_ratio) * t / n


@register()
def cosine(t: int, n: int, *, min_lr_ratio: MinLrRatio = 1e-3) -> float:
    """r + (1 - r) (1 + cos(pi t/n)) / 2

    Loshchilov and Hutter 2017 (SGDR, arXiv 1608.03983), equation 5, one cycle.
    """
    return between(1.0, min_lr_ratio, t / n)


@register()
def cosine_restarts(
    t: int, n: int, *, cycles: Cycles = 1,
    cycle_mult: Annotated[float, Option("each cycle's length, times the last", FINITE_FROM_ONE, SEVERAL)] = 1.0,
    cycle_decay: Annotated[float, Option("each cycle's peak, times the last", FRACTION, SEVERAL)] = 1.0,
    min_lr_ratio: MinLrRatio = 1e-3,
) -> float:
    """r + (peak_k - r) (1 + cos(pi t_k/n_k)) / 2 in cycle k = 0 .. N-1, peak_k = max(r, decay^k), n_k ~ mult^k

    Loshchilov and Hutter 2017 (SGDR, arXiv 1608.03983), equation 5. The lengths n_k share the n steps in the
    proportions mult^k; cycle k begins at a whole step, the nearest one, so that a restart is always at its peak.
    """
    # Shares relative to the last cycle: mult ** k itself may overflow.
    shares = [cycle_mult ** -(cycles - 1 - k) for k in range(cycles)]
    starts = [round(n * s / sum(shares)) for s in itertools.accumulate(shares, initial=0.0)]
    k = max(k for k in range(cycles) if starts[k] <= t)
    return between(max(min_lr_ratio, cycle_decay**k), min_lr_ratio, (t - starts[k]) / max(1, starts[k + 1] - starts[k]))


@register()
def linear_cosine(t: int, n: int, *, min_lr_ratio: MinLrRatio = 1e-3) -> float:
    """(a + 1 - t/n) (1 + cos(2 pi c t/n)) / 2 + b with a = 0, c = 1/2 periods and b = r: it begins at 1 + r

    Bello et al. 2017 (Neural optimizer search, arXiv 1709.07417) with TensorFlow's defaults
    (tf.compat.v1.train.linear_cosine_decay: alpha 0, num_periods 0.5, beta 0.001).
    """
    return (1.0 - t / n) * between(1.0, 0.0, t / n) + min_lr_ratio


@register()
def step(t: int, n: int, *, step_size: Annotated[int, Option("how long between two cuts", AT_LEAST_ONE)],
         gamma: Gamma = 0.1, unit: int = 1) -> float:
    """gamma^floor(t / (u step_size))"""
    return gamma ** (t // (unit * step_size))


@register()
def multistep(
    t: int, n: int, *,
    milestones: Annotated[tuple[int, ...], Option("where the cuts are, as 10,25,40", RISING, metavar="N,N,...")],
    gamma: Gamma = 0.1, unit: int = 1,
) -> float:
    """gamma^(number of milestones <= t/u)"""
    return gamma ** sum(t >= milestone * unit for milestone in milestones)


@register()
def exponential(t: int, n: int, *, gamma: Gamma, unit: int = 1) -> float:
    """gamma^(t/u)"""
    return gamma ** (t / unit)


@register()
def natural_exp(t: int, n: int, *, decay_rate: DecayRate, unit: int = 1) -> float:
    """exp(-k t/u), k = decay_rate (tf.compat.v1.train.natural_exp_decay)"""
    return math.exp(-decay_rate * t / unit)


@register()
def inverse_time(t: int, n: int, *, decay_rate: DecayRate, unit: int = 1) -> float:
    """1 / (1 + k t/u), k = decay_rate (tf.keras.optimizers.schedules.InverseTimeDecay)"""
    return 1.0 / (1.0 + decay_rate * t / unit)


@register()
def polynomial(t: int, n: int, *, power: Annotated[float, Option("the exponent of the decay; 1 is linear", POSITIVE)]
               = 1.0, min_lr_ratio: MinLrRatio = 0.0) -> float:
    """r + (1 - r) (1 - t/n)^power"""
    return min_lr_ratio + (1.0 - min_lr_ratio) * (1.0 - t / n) ** power


@register()
def inverse_sqrt(t: int, n: int, *, timescale: int = 10_000) -> float:
    """sqrt(s / (s + t)), s = warmup_steps, or 10000 without a warmup

    Vaswani et al. 2017 (arXiv 1706.03762), equation 3; the 10000 is transformers' get_inverse_sqrt_schedule's.
    """
    return math.sqrt(timescale / (timescale + t))


@register(default_warmup=0.0)  # it begins low itself
def cyclic(
    t: int, n: int, *, cycles: Cycles = 1,
    cyclic_mode: Annotated[str, Option("equal triangles, or each half as high as the one before",
                                       choices=("triangular", "triangular2"))] = "triangular",
    min_lr_ratio: MinLrRatio = 0.1,
) -> float:
    """r + (1 - r) h (1 - |2 frac(t N/n) - 1|), N cycles; h = 1, or 2^-floor(t N/n) for triangular2

    Smith 2017 (arXiv 1506.01186), section 3: up for half a cycle and down for the other; it begins at r.
    """
    cycle, place = divmod(t * cycles / n, 1.0)
    height = 1.0 if cyclic_mode == "triangular" else 0.5**cycle
    return min_lr_ratio + (1.0 - min_lr_ratio) * height * (1.0 - abs(2.0 * place - 1.0))


@register(default_warmup=0.0)  # it begins low itself
def one_cycle(t: int, n: int, *,
              pct_start: Annotated[float, Option("the part of the run that rises", INSIDE)] = 0.3) -> float:
    """half a cosine from 1/25 up to 1 at t = pct_start n - 1, then half a cosine down to 1/250000 at t = n - 1

    Smith and Topin 2018 (arXiv 1708.07120), as torch.optim.lr_scheduler.OneCycleLR has it with div_factor 25 and
    final_div_factor 1e4. The one decay that ends at the last update, and not behind it.
    """
    first, peak, last, low = 1 / 25, pct_start * n - 1, n - 1, 1 / 25 / 1e4
    if t <= peak:
        return between(first, 1.0, t / peak if peak else 1.0)
    return between(1.0, low, min(1.0, (t - peak) / (last - peak)))


@register()
def wsd(t: int, n: int, *,
        decay_fraction: Annotated[float, Option("the part of the run that decays", FRACTION)] = 0.2,
        min_lr_ratio: MinLrRatio = 0.0) -> float:
    """1, then over the last d = decay_fraction n steps r + (1 - r) (n - t)/d

    Warmup, stable, decay: Hu et al. 2024 (MiniCPM, arXiv 2404.06395); the linear decay is that of
    Haegele et al. 2024 (arXiv 2405.18392).
    """
    return min_lr_ratio + (1.0 - min_lr_ratio) * min(1.0, (n - t) / (decay_fraction * n))


@register(by_step=False)
def plateau(
    history: Sequence[float], *, gamma: Gamma = 0.5,
    plateau_patience: Annotated[int, Option("evaluations without a new best before a cut", NOT_NEGATIVE)] = 3,
    plateau_mode: str = "max", min_lr_ratio: MinLrRatio = 0.0,
) -> float:
    """max(r, gamma^k), k = how often `history` went more than `plateau_patience` values without a new best

    A function of the dev metric's values so far, oldest first, and of nothing else; "max": larger is better. Counted as
    torch.optim.lr_scheduler.ReduceLROnPlateau does with threshold 0: the count begins anew after each cut.
    """
    best, bad, cuts = -math.inf, 0, 0
    for value in history:
        value = value if plateau_mode == "max" else -value
        best, bad = (value, 0) if value > best else (best, bad + 1)
        if bad > plateau_patience:
            cuts, bad = cuts + 1, 0
    return max(min_lr_ratio, gamma**cuts)


def between(start: float, end: float, progress: float) -> float:
    """Half a cosine from `start` at progress 0 to `end` at progress 1."""
    return end + (start - end) * (1.0 + math.cos(math.pi * progress)) / 2.0


SCHEDULERS = tuple(SCHEDULES)

# --------------------------------------------------------------------------- with a warmup in front

WARMUPS = ("warmup_steps", "warmup_epochs", "warmup_ratio")
HAS_WARMUP = Need(lambda options: warmup_steps(options, 10**6) > 0, "there is no warmup")
BY_STEP = Need(lambda options: SCHEDULES[options.scheduler].by_step, "--scheduler {scheduler} does not go by the step")


def run_length(epochs: int, steps_per_epoch: int, max_steps: int | None = None) -> int:
    """The optimizer steps of a run, which `max_steps` only shortens."""
    return min(epochs * steps_per_epoch, max_steps or epochs * steps_per_epoch)


def warmup_length(
    scheduler: str, epochs: int, steps_per_epoch: int, max_steps: int | None = None, *,
    warmup_steps: Annotated[int | None, Option(
        "optimizer steps in front in which the rate rises", NOT_NEGATIVE, one_of=WARMUPS)] = None,
    warmup_epochs: Annotated[float | None, Option(
        "the same in epochs", NOT_NEGATIVE, one_of=WARMUPS)] = None,
    warmup_ratio: Annotated[float | None, Option(
        f"the same as a part of the run (default: {DEFAULT_WARMUP}; 0 for constant and for those that begin low)",
        FRACTION_OR_ZERO, one_of=WARMUPS, also="warmup warmup_proportion")] = None,
) -> int:
    """The warmup in optimizer steps, from whichever of the three was given. Raises ValueError where it is longer than
    the run."""
    total = run_length(epochs, steps_per_epoch, max_steps)
    source = f"--epochs {epochs}" if total == epochs * steps_per_epoch else f"--max_steps {max_steps}"
    for name, value, unit in (("warmup_steps", warmup_steps, 1), ("warmup_epochs", warmup_epochs, steps_per_epoch)):
        if (value or 0) * unit > total:
            raise ValueError(f"--{name} {value:g} is beyond the run's {total} step{'' if total == 1 else 's'}, "
                             f"which come from {source}")
    if warmup_steps is not None:
        return warmup_steps
    if warmup_epochs is not None:
        return round(warmup_epochs * steps_per_epoch)
    ratio = SCHEDULES[scheduler].default_warmup if warmup_ratio is None else warmup_ratio
    return int(ratio * epochs * steps_per_epoch) if total == epochs * steps_per_epoch else int(ratio * total)


def make_schedule(
    name: str, *, total_steps: int, steps_per_epoch: int = 1, warmup_steps: int = 0,
    warmup_kind: Annotated[str, Option(
        "rise steadily, or stay at --warmup_start", choices=("linear", "constant"), needs=(HAS_WARMUP,))] = "linear",
    warmup_start: Annotated[float, Option(
        "where the warmup begins, times lr", FRACTION_OR_ZERO, needs=(HAS_WARMUP,))] = 0.0,
    schedule_every: Annotated[str, Option(
        "change the rate each optimizer step, or each epoch", choices=("step", "epoch"), needs=(BY_STEP,))] = "step",
    plateau_mode: str = "max", **options: Any,
) -> Callable[..., float]:
    """The schedule `name` with a warmup in front: factor(i) or factor(i, history), on the base rate, for step i.

        i < W, linear:    start + (f(0) - start) (i + 1) / W      i < W, constant:    start
        i >= W:           f(t) of n steps, t = i - W and n = total - W

    W is `warmup_steps`, start is `warmup_start`, and f is the schedule; f(0), where the last step of a linear warmup
    arrives, is 1 for all but cyclic and one_cycle, which begin low, and linear_cosine, which begins at 1 + r. The
    step that would have the rate 0 is left out. A step beyond the run has the last value, f(n).

    schedule_every="epoch" makes a staircase: f has the value of the epoch's first step, and `step_size`, `milestones`,
    and the unit of `gamma` and `decay_rate` are epochs; they are optimizer steps otherwise. The schedule's epoch 0 is
    then the one in which the warmup ends: with E = `steps_per_epoch` and B = E floor(W / E), t = E floor(i / E) - B
    and n = total - B. The warmup itself goes by steps.

    `options` are the schedules' own; None or () leaves the schedule's default, and what it has no use for is checked
    and ignored. `history` is the dev metric's values so far, which plateau wants and no other.

    Raises ValueError, naming the option, for a value out of range and for one that is missing.
    """
    if name not in SCHEDULES:
        raise ValueError(f"--scheduler {name} is none of {', '.join(SCHEDULES)}")
    if total_steps < 1 or steps_per_epoch < 1:
        raise ValueError(f"a run of {total_steps} steps, {steps_per_epoch} an epoch, has no schedule")
    if warmup_steps < 0:
        raise ValueError(f"--warmup_steps {warmup_steps} must be 0 or more")
    if warmup_steps > total_steps:
        raise ValueError(f"--warmup_steps {warmup_steps} is beyond the run's {total_steps} steps")
    given = {key: value for key, value in options.items() if value not in (None, (), [])}
    check_values({"warmup_kind": warmup_kind, "warmup_start": warmup_start, "schedule_every": schedule_every, **given})
    if warmup_steps and warmup_kind == "constant" and warmup_start == 0:
        raise ValueError("--warmup_kind constant needs a --warmup_start above 0, or nothing is learned in it")
    if plateau_mode not in ("max", "min"):
        raise ValueError(f"--plateau_mode {plateau_mode} must be max or min")
    f, own = SCHEDULES[name].factor, SCHEDULES[name].options
    for key, option in own.items():
        if key not in given and option.default is REQUIRED:
            raise ValueError(f"--scheduler {name} needs --{key}")
    used = {key: given[key] for key in own if key in given}
    by_epoch = schedule_every == "epoch"
    derived = {"unit": steps_per_epoch if by_epoch else 1, "plateau_mode": plateau_mode}
    if warmup_steps:
        derived["timescale"] = warmup_steps
    parameters = inspect.signature(f).parameters
    used |= {key: value for key, value in derived.items() if key in parameters}
    begin = warmup_steps // steps_per_epoch * steps_per_epoch if by_epoch else warmup_steps
    n = max(1, total_steps - begin)

    def after_warmup(i: int, history: Sequence[float]) -> float:
        if "history" in parameters:
            return f(history, **used)
        at = i // steps_per_epoch * steps_per_epoch if by_epoch else i
        return f(min(max(0, at - begin), n), n, **used)

    def factor(i: int, history: Sequence[float] = ()) -> float:
        if i >= warmup_steps:
            return after_warmup(i, history)
        if warmup_kind == "constant":
            return warmup_start
        top = after_warmup(begin, history)
        return warmup_start + (top - warmup_start) * ((i + 1) / warmup_steps)

    return factor


# --------------------------------------------------------------------------- from the command line


def command_line_options() -> dict[str, Option]:
    """Every option but --scheduler, by name: the warmup's, then the schedules' own. Those are None by default, which
    leaves each schedule its own default; the help lists these."""
    found = {**options_of(warmup_length), **options_of(make_schedule)}
    for key in dict.fromkeys(key for one in SCHEDULES.values() for key in one.options):
        users = {name: one.options[key] for name, one in SCHEDULES.items() if key in one.options}
        defaults = ", ".join(f"{name}: {'needed' if o.default is REQUIRED else o.default}" for name, o in users.items())
        first = next(iter(users.values()))
        found[key] = replace(first, help=f"{first.help} ({defaults})", needs=(_used(key), *first.needs),
                             type=first.type | None, default=None)
    return found


def check_values(values: dict[str, Any]) -> None:
    """Raises ValueError for an option that there is not, and for a value that it does not accept."""
    known = command_line_options()
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"no schedule has an option {key}")
        choices, check = known[key].choices, known[key].check
        if choices and value not in choices or check and not check.holds(value):
            raise ValueError(f"--{key} {value} must be {check.words if check else ' or '.join(choices)}")


def _used(key: str) -> Need:
    return Need(lambda options: key in SCHEDULES[options.scheduler].options,
                "--scheduler {scheduler} does not use it")


def warmup_steps(options: Any, steps_per_epoch: int) -> int:
    """`warmup_length` of a run; `options` has the options of the command line as attributes."""
    return warmup_length(options.scheduler, options.epochs, steps_per_epoch, options.max_steps,
                         **{name: getattr(options, name) for name in WARMUPS})


def from_options(options: Any, steps_per_epoch: int, monitor_rises: bool) -> Callable[..., float]:
    """`make_schedule` of a run, from all the `command_line_options`; is a larger value of what --monitor watches
    better? Raises ValueError, naming the options, where there can be no such schedule."""
    given = {name: getattr(options, name) for name in command_line_options() if name not in WARMUPS}
    return make_schedule(
        options.scheduler, total_steps=run_length(options.epochs, steps_per_epoch, options.max_steps),
        steps_per_epoch=steps_per_epoch,
        warmup_steps=warmup_steps(options, steps_per_epoch), plateau_mode="max" if monitor_rises else "min", **given)


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
