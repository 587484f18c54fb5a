"""What the curve of one run says: its verdict with the numbers behind it, its gaps, and what patience would have done.

The rules and the reason of each threshold stand in docs/report.md. An accuracy on n sentences has the standard error
sqrt(p (1 - p) / n): what lies within it is chance, and says nothing.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import NormalDist

from config import counted
from formats.past_run import Epoch, PastRun

ERRORS = 3.0  # standard errors by which something must change before it counts as real
JUMP = 2.5  # standard errors of a fall that may be a jump, at least; two that are made good again are no chance
FALLS = 0.11  # falls that chance may make in a whole run: the more neighbours it has, the deeper a fall must be
FAR_JUMP = 5.0  # one of these is enough
TREND = 2.5  # standard errors of a slope at the end, where the best evaluation is among the last ones too
TAIL = 0.6  # the part of the evaluations in which that slope is looked for
DIVERGED = 1.1  # the training loss at the end, as a multiple of the first epoch's
UNEVEN = 1.25  # one class for all has a loss of -ln(its accuracy), up to a quarter more with uneven classes
FITTED = 0.25  # of the way from guessing to 1: training accuracy below it is no fit
MEMORISED = 0.2  # training accuracy above dev at the end, without a gain on dev for it
STANDS_STILL = 3  # evaluations with the very same accuracies: the predictions are constant
SHORTEST = 3  # evaluations below which nothing is said of a trend


@dataclass(frozen=True)
class Verdict:
    """`name`: underfitting, good, overfitting, unstable, diverged, collapsed, still improving, or "none" where there is
    too little to judge. `epoch`: from which on, of overfitting and collapsed. `evidence`: the numbers, in words."""

    name: str
    evidence: str
    epoch: float | None = None

    def words(self) -> str:
        return f"{self.name} from epoch {self.epoch:g}" if self.epoch is not None else self.name


@dataclass(frozen=True)
class Patience:
    """What --patience N would have done: the evaluations and seconds that it would have saved (None: not known), and
    the dev accuracy that it would have missed. `by`: what it was played through on; `monitor`: what the run itself
    would have looked at."""

    n: int
    saved: int
    seconds: float | None
    missed: float
    by: str = "dev_acc"
    monitor: str = "dev_acc"

    def words(self) -> str:
        by = "" if self.by == self.monitor == "dev_acc" else f" (by {self.by})" if self.by == self.monitor else (
            f" (by dev accuracy: {self.monitor}, which the run looks at, is not known of every evaluation)")
        if not self.saved:
            return f"saves nothing{by}"
        seconds = "" if self.seconds is None else f" (about {self.seconds:.0f} s)"
        misses = f"misses {self.missed:.3f} of the peak" if self.missed else "misses nothing"
        return f"saves {counted(self.saved, 'evaluation')}{seconds}, and {misses}{by}"


def error_of(acc: float, n: int) -> float:
    """The standard error of an accuracy on n sentences. Near 0 and 1 it is that of one more right or wrong one."""
    acc = min(max(acc, 1 / (n + 2)), 1 - 1 / (n + 2))
    return math.sqrt(acc * (1 - acc) / n)


def gap(epoch: Epoch) -> float:
    """Training accuracy above dev accuracy."""
    return epoch.train_acc - epoch.dev_acc


def patience(run: PastRun, n: int) -> Patience:
    """The run again with --patience n: it stops after n evaluations without a new best by --monitor, which must be
    better by more than --min_delta. Where the monitor is not known of every evaluation, dev accuracy stands for it."""
    monitor = run.monitor or "dev_acc"
    values = _monitored(run.epochs, monitor)
    by = monitor if values else "dev_acc"
    values = values or [e.dev_acc for e in run.epochs]
    delta = _number(run.options.get("min_delta")) if by == monitor else 0.0  # in units of the monitor
    stop, kept = _played(values, delta, n)
    saved = len(run.epochs) - stop
    seconds = None if run.seconds is None or not run.epochs else run.seconds * saved / len(run.epochs)
    missed = 0.0
    if kept is not None and saved:
        at_the_end = _played(values, delta, len(values))[1]
        missed = run.epochs[kept if at_the_end is None else at_the_end].dev_acc - run.epochs[kept].dev_acc
    return Patience(n, saved, seconds, max(0.0, missed), by, monitor)


def _played(values: Sequence[float], delta: float, n: int) -> tuple[int, int | None]:
    """How many evaluations there are until n in a row are no better than the best by more than delta, and the place of
    the best then; None where all values are NaN."""
    kept, since = None, 0
    for i, value in enumerate(values):
        if kept is None and not math.isnan(value) or kept is not None and value > values[kept] + delta:
            kept, since = i, 0
        else:
            since += 1
        if since >= n:
            return i + 1, kept
    return len(values), kept


def _monitored(epochs: Sequence[Epoch], monitor: str) -> list[float]:
    """The monitor of each evaluation, more being better; [] where one of them is not known."""
    if monitor == "dev_acc":
        return [e.dev_acc for e in epochs]
    losses = [-e.dev_loss for e in epochs if e.dev_loss is not None] if monitor == "dev_loss" else []
    return losses if len(losses) == len(epochs) else []


def _number(text: str | None) -> float:
    try:
        return float(text or 0.0)
    except ValueError:
        return 0.0


def kept_another(run: PastRun) -> str:
    """A note where the run kept another epoch than the one with the best dev accuracy, as with --monitor dev_loss; ""
    where it did not. (By dev accuracy without --min_delta that is a contradiction, which the report names as one.)"""
    best, kept = run.best(), next((e for e in run.epochs if e.number == run.said_best), None)
    if best is None or kept is None or not best.dev_acc > kept.dev_acc or (
            run.monitor in ("", "dev_acc") and not _number(run.options.get("min_delta"))):
        return ""
    by = run.monitor or "dev_acc"
    return (f"the run kept epoch {kept.number:g} (dev {kept.dev_acc:.3f}), chosen by {by}; its best dev accuracy, by "
            f"which it is ranked here, is that of epoch {best.number:g} ({best.dev_acc:.3f})")


def verdict(run: PastRun, n: int) -> Verdict:
    """The verdict on a run whose dev set has n sentences; the first rule that holds decides."""
    epochs = run.epochs
    if not epochs:
        return Verdict("none", "no epochs are known")
    for rule in (_diverged, _collapsed, _unstable, _overfits, _still_improving, _underfits):
        if found := rule(run, n):
            return found
    last = epochs[-1]
    if len(epochs) < SHORTEST:
        many = "one evaluation" if len(epochs) == 1 else f"{len(epochs)} evaluations"
        return Verdict("none", f"{many}: too few for a verdict")
    return Verdict("good", f"dev {last.dev_acc:.3f} at the end, {max(e.dev_acc for e in epochs):.3f} at its best: "
                           f"within chance of each other; training {last.train_acc:.3f}")


# --------------------------------------------------------------------------- the rules, in their order


def _diverged(run: PastRun, n: int) -> Verdict | None:
    first, last = run.epochs[0], run.epochs[-1]
    for epoch in run.epochs:
        for what, value in (("training loss", epoch.train_loss), ("dev accuracy", epoch.dev_acc)):
            if not math.isfinite(value):
                return Verdict("diverged", f"the {what} of epoch {epoch.number:g} is {value:g}")
    if run.stopped == "diverged":
        return Verdict("diverged", f"the run says so itself; its last training loss is {last.train_loss:.3f}")
    of_one_class = -UNEVEN * math.log(max(last.dev_acc, 1e-9))  # a loss that a collapsed run has as well
    if len(run.epochs) > 1 and last.train_loss > DIVERGED * max(first.train_loss, of_one_class):
        return Verdict("diverged", f"the training loss rose from {first.train_loss:.3f} (epoch {first.number:g}) to "
                                   f"{last.train_loss:.3f} (epoch {last.number:g})")
    return None


def _collapsed(run: PastRun, n: int) -> Verdict | None:
    """Every prediction is one class: the line says it, or the accuracies stand still where nothing is learned, or both
    of them have fallen, by more than chance, and not come back."""
    epochs, last = run.epochs, run.epochs[-1]
    if last.collapsed:
        return Verdict("collapsed", "every prediction is one class, as the run says itself", _since(
            epochs, lambda e: e.collapsed))
    if last.train_acc > fitted_from(run):
        return None
    same = _since(epochs, lambda e: (e.dev_acc, e.train_acc) == (last.dev_acc, last.train_acc))
    if sum(e.number >= same for e in epochs) >= STANDS_STILL:
        return Verdict("collapsed", f"dev stays {last.dev_acc:.3f} and training {last.train_acc:.3f} to the last digit:"
                                    " the predictions do not change", same)
    if run.majority is not None and len(epochs) >= 2 and all(
            abs(e.dev_acc - run.majority) < 0.0015 for e in epochs[-2:]):
        return Verdict("collapsed", f"dev is {last.dev_acc:.3f}, the share of the most frequent class", _since(
            epochs, lambda e: abs(e.dev_acc - run.majority) < 0.0015))  # type: ignore[operator]
    best, top = max(e.dev_acc for e in epochs), max(e.train_acc for e in epochs)
    far_dev, far_train = (ERRORS * math.sqrt(2) * error_of(acc, n) for acc in (best, top))

    def has_fallen(epoch: Epoch) -> bool:
        return best - epoch.dev_acc > far_dev and top - epoch.train_acc > far_train

    if has_fallen(last) and (len(epochs) < 2 * SHORTEST or has_fallen(epochs[-2])):
        start = _since(epochs, has_fallen)
        return Verdict("collapsed", f"dev fell from {best:.3f} to {last.dev_acc:.3f} and training from {top:.3f} to "
                                    f"{last.train_acc:.3f}, and neither came back", start)
    return None


def _unstable(run: PastRun, n: int) -> Verdict | None:
    """Falls beyond chance that are made good again: of dev accuracy, or of the training loss (a rise of a tenth)."""
    epochs = run.epochs
    falls, far = [], 0
    jump = max(JUMP, NormalDist().inv_cdf(1 - FALLS / max(1, len(epochs) - 2)))
    later_dev = _from_behind(max, [e.dev_acc for e in epochs])
    later_loss = _from_behind(min, [e.train_loss for e in epochs])
    for i in range(1, len(epochs) - 1):
        error = math.sqrt(2) * error_of((epochs[i - 1].dev_acc + epochs[i].dev_acc) / 2, n)
        fall = epochs[i - 1].dev_acc - epochs[i].dev_acc
        again = later_dev[i + 1] - epochs[i].dev_acc
        loss_rose = epochs[i].train_loss > DIVERGED * epochs[i - 1].train_loss + 0.02
        loss_fell = later_loss[i + 1] < epochs[i].train_loss / DIVERGED
        if fall > jump * error and again > jump * error or loss_rose and loss_fell:
            falls.append(epochs[i])
            far += fall > FAR_JUMP * error and again > FAR_JUMP * error
    if len(falls) < 2 and not far:
        return None
    where = ", ".join(f"{e.number:g}" for e in falls[:5])
    low = min(falls, key=lambda e: e.dev_acc)
    error = math.sqrt(2) * error_of(low.dev_acc, n)
    return Verdict("unstable", f"it falls back and recovers at epoch {where}: dev {low.dev_acc:.3f} at epoch "
                               f"{low.number:g}, {max(e.dev_acc for e in epochs):.3f} at its best (chance between two "
                               f"evaluations: {2 * error:.3f})")


def _overfits(run: PastRun, n: int) -> Verdict | None:
    """Dev falls by more than chance while training does not; or training goes far ahead, and dev gains nothing."""
    epochs, last = run.epochs, run.epochs[-1]
    if len(epochs) < SHORTEST:
        return None
    k = max(1, round(len(epochs) / 4))
    devs = [e.dev_acc for e in epochs]
    starts, sums = range(len(epochs) - 2 * k + 1), [0.0, *accumulate(devs)]
    means = [(sums[i + k] - sums[i]) / k for i in starts]
    at = max(starts, key=lambda i: means[i])
    top, end = means[at], sum(devs[-k:]) / k
    error = error_of(top, n)
    start = _since(epochs, lambda e: e.dev_acc < top - error)
    trained = sum(e.train_acc for e in epochs[-k:]) / k - sum(e.train_acc for e in epochs[at: at + k]) / k
    if top - end > ERRORS * error * math.sqrt(2 / k) and trained > -2 * error * math.sqrt(2 / k):
        of = f"the last {k} evaluations have {end:.3f} on average" if k > 1 else f"the last evaluation has {end:.3f}"
        return Verdict("overfitting", f"dev {top:.3f} around its best epochs; {of}: {(top - end):.3f} less, and chance "
                       f"explains {2 * error * math.sqrt(2 / k):.3f}; training {last.train_acc:.3f}", start)
    level = max(means)
    reached = next(i for i, e in enumerate(epochs) if e.dev_acc >= level - error)
    since = last.train_acc - epochs[reached].train_acc
    ahead = max(MEMORISED, ERRORS * math.hypot(error_of(last.train_acc, n), error_of(last.dev_acc, n)))
    if gap(last) > ahead and since > MEMORISED / 2 and not _rises(devs, n):
        return Verdict("overfitting", f"training {last.train_acc:.3f} against dev {last.dev_acc:.3f} at the end; since "
                       f"epoch {epochs[reached].number:g} training gained {since:.3f} and dev nothing beyond chance",
                       epochs[min(reached + 1, len(epochs) - 1)].number)
    return None


def _still_improving(run: PastRun, n: int) -> Verdict | None:
    devs = [e.dev_acc for e in run.epochs]
    if run.stopped in ("patience", "diverged", "pruned") or not _rises(devs, n):
        return None
    best = run.best()
    assert best is not None
    k = _tail(devs)
    return Verdict("still improving", f"dev rose from {devs[-k]:.3f} to {devs[-1]:.3f} over the last {k} "
                   f"evaluations, and was best ({best.dev_acc:.3f}) at epoch {best.number:g}, the last being epoch "
                   f"{run.epochs[-1].number:g}")


def _underfits(run: PastRun, n: int) -> Verdict | None:
    last, limit = run.epochs[-1], fitted_from(run)
    best = max(e.dev_acc for e in run.epochs)
    if run.majority is not None and best < run.majority + error_of(run.majority, n):
        return Verdict("underfitting", f"dev is {best:.3f} at its best, and always answering the most frequent class "
                                       f"has {run.majority:.3f}: nothing was learned that holds there (training "
                                       f"{last.train_acc:.3f})")
    if not last.train_acc < limit:  # a NaN is not below it
        return None
    return Verdict("underfitting", f"training accuracy is {last.train_acc:.3f} at the end, and guessing gives about "
                                   f"{guessing(run):.3f}: it has learned little of its training sentences (dev "
                                   f"{last.dev_acc:.3f})")


# --------------------------------------------------------------------------- what the rules share


def guessing(run: PastRun) -> float:
    """The accuracy of guessing: the most frequent class's share where it is known, else 1/C for the smallest number of
    classes C with which the largest training loss would be that of guessing, ln(C), but for a twentieth."""
    if run.majority is not None:
        return run.majority
    loss = max((e.train_loss for e in run.epochs if math.isfinite(e.train_loss)), default=0.0)
    return 1 / max(2, math.ceil(math.exp(min(0.95 * loss, 20))))


def fitted_from(run: PastRun) -> float:
    """From which training accuracy on a run has fitted anything."""
    return guessing(run) + FITTED * (1 - guessing(run))


def _tail(devs: Sequence[float]) -> int:
    """How many evaluations at the end a trend is looked for in."""
    return min(len(devs), max(SHORTEST, math.ceil(TAIL * len(devs))))


def _rises(devs: Sequence[float], n: int) -> bool:
    """Does dev rise at the end, by more than chance? The slope of a straight line through the last evaluations,
    against its standard error; and the last third holds the best one."""
    if len(devs) < SHORTEST:
        return False
    k = _tail(devs)
    tail, middle = devs[-k:], (k - 1) / 2
    spread = sum((i - middle) ** 2 for i in range(k))
    slope = sum((i - middle) * acc for i, acc in enumerate(tail)) / spread
    is_last = devs.index(max(devs)) >= len(devs) - max(1, -(-len(devs) // 3))
    return is_last and slope > TREND * error_of(max(devs), n) / math.sqrt(spread)


def _from_behind(choose: Callable[[float, float], float], values: Sequence[float]) -> list[float]:
    """For each place the largest (or smallest) value from there to the end."""
    return list(accumulate(reversed(values), choose))[::-1]


def _since(epochs: Sequence[Epoch], holds: Callable[[Epoch], bool]) -> float:
    """The first epoch from which on it holds for all; the last epoch where it does not hold there."""
    i = len(epochs)
    while i and holds(epochs[i - 1]):
        i -= 1
    return epochs[min(i, len(epochs) - 1)].number
