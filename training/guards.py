"""When has a training run gone wrong? Rules that act only on evidence that no healthy run shows.

Pure functions of losses and scores: the training loop asks them and acts. docs/guards.md counts their
false alarms and hits.
"""

import math
from collections.abc import Sequence
from typing import Any

REMEMBERED = 320  # sentences whose losses the test of divergence looks at
PER_STEP = 32  # sentences of one step among them, at most: so they come from ten steps or more
TRIMMED = 0.3  # this part of them, those with the highest losses, is left out: wrong labels cannot raise an alarm
ABOVE = 1.2  # a typical loss this many times that of guessing means that training has diverged
ENOUGH = 64  # sentences of an epoch whose mean loss says something
WORSE = 1.15  # the same for the mean loss of an epoch, if all predictions are one class
FAR_WORSE = 1.5  # the same with predictions of several classes, if the dev loss is no better than guessing
NO_BETTER = 0.95  # the dev loss is no better than guessing when it is this many times that of guessing, or more
STUCK = 1.02  # the same after a rollback
NOT_FINITE_IN_A_ROW = 3
ERRORS = 3.0  # standard errors by which an accuracy must fall before the fall counts as real


def remember(recent: list[float], losses: Sequence[float]) -> list[float]:
    """The last REMEMBERED losses of single sentences, with those of one more step, evenly spread over it."""
    stride = -(-len(losses) // PER_STEP)
    return [*recent, *losses[::stride]][-REMEMBERED:]


def typical(losses: Sequence[float]) -> float:
    """The mean of the losses without the highest TRIMMED part (a trimmed mean, Tukey 1962)."""
    kept = sorted(losses)[: max(1, round((1 - TRIMMED) * len(losses)))]
    return math.fsum(kept) / len(kept)


def guessing_loss(n_classes: int, first_loss: float | None) -> float:
    """What training starts from: ln(C), or the loss of the first step, before any update, where that is larger."""
    return max(math.log(n_classes), first_loss or 0.0)


def divergence(recent: Sequence[float], guessing: float, not_finite_in_a_row: int) -> str:
    """What shows that the run has diverged, or "".

    Steps that are not finite count by themselves. High losses count when most sentences have them: the typical loss of
    the last REMEMBERED sentences is far above that of guessing.
    """
    if not_finite_in_a_row >= NOT_FINITE_IN_A_ROW:
        return f"{not_finite_in_a_row} steps in a row were not finite"
    if len(recent) == REMEMBERED and typical(recent) > ABOVE * guessing:
        return (f"the loss of most of the last {REMEMBERED} sentences is {typical(recent):.3g} on average, where "
                f"guessing has {guessing:.3g}")
    return ""


def is_spike(losses: Sequence[float], guessing: float) -> bool:
    """Did most sentences of one step have a far higher loss than guessing? Of a few sentences nothing can be said."""
    return len(losses) >= 8 and typical(losses) > 2 * guessing


def decline(scores: dict[str, Any], best: dict[str, Any], is_one_class: bool, n_dev: int, mean_loss: float,
            guessing: float, had_rollback: bool) -> str:
    """What an evaluation shows that a rollback should undo, or "".

    `scores` and `best`: its columns, and those of the best evaluation so far. `is_one_class`: is every prediction the
    same class? `mean_loss` is that of a whole epoch of ENOUGH sentences, else nan: a healthy run may begin with many
    bad steps.
    Every prediction being one class is no evidence by itself: so begins each healthy run whose classes are unequal.
    Training must have got worse: the mean loss is above that of guessing, or an earlier evaluation was better, its
    accuracy by more than chance explains and its training loss too. A healthy run has no rollback, so after one less
    evidence is enough.
    """
    if not math.isfinite(scores["dev_loss"]):
        return "the dev loss is not finite"
    most = STUCK if had_rollback else FAR_WORSE
    if (is_one_class and mean_loss > WORSE * guessing) or (
            mean_loss > most * guessing and scores["dev_loss"] > NO_BETTER * guessing):
        return f"the mean loss of the epoch is {mean_loss:.3g}, where guessing has {guessing:.3g}"
    if not is_one_class or math.isnan(mean_loss) or not best or best["train_loss"] is None:
        return ""
    a, b = scores["dev_acc"], best["dev_acc"]
    error = math.sqrt((a * (1 - a) + b * (1 - b)) / n_dev)
    if b - a > ERRORS * error and scores["train_loss"] > best["train_loss"]:
        return f"dev acc is {a:.3f} after {b:.3f}"
    return ""


def is_healthy(recent: Sequence[float], guessing: float, not_finite_in_a_row: int) -> bool:
    """May a rollback return to the state of now? Stricter than the alarms: the mean of the last losses must not be
    worse than guessing."""
    mean = math.fsum(recent) / len(recent) if recent else 0.0
    return not not_finite_in_a_row and mean <= WORSE * guessing
