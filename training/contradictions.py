"""What a log says of a run and what its epochs say: a number that was copied wrongly is named, with both."""

import bisect
import math

from formats.past_run import Claim, PastRun


def contradictions(run: PastRun) -> list[str]:
    """A line for each disagreement. Where epochs are missing from the log, a number that none of the others has may be
    that of a missing one, and nothing is said of it."""
    found = [f"its heading says {name} {value}, its command line {run.options[name]}"
             for name, value in sorted(run.heading.items()) if run.options.get(name, value) != value]
    best = run.best()
    is_whole = not any("not in the log" in note for note in run.notes)
    if best is not None and run.said_best is not None and run.monitor in ("", "dev_acc"):
        at = next((e for e in run.epochs if e.number == run.said_best), None)
        if at is not None and best.dev_acc - at.dev_acc > 0.0005:
            found.append(f"the run says that epoch {at.number:g} is the best (dev {at.dev_acc:.3f}); epoch "
                         f"{best.number:g} has {best.dev_acc:.3f}")
    devs = sorted(e.dev_acc for e in run.epochs if math.isfinite(e.dev_acc))
    by_number = {e.number: e.dev_acc for e in run.epochs}
    if run.dev is not None and devs and is_whole and abs(_nearest(devs, run.dev) - run.dev) > 0.0015:
        found.append(f"dev acc at the end is {run.dev:.3f}, and no epoch has that; the best one has {devs[-1]:.3f}")
    for claim in dict.fromkeys(run.claims):
        if line := _against(run, claim, devs, by_number, is_whole):
            found.append(line)
    return found


def _against(run: PastRun, claim: Claim, devs: list[float], by_number: dict[float, float], is_whole: bool) -> str:
    """What is wrong with a claim; "" where it agrees, or where there is nothing to compare it with. `devs`: the dev
    accuracies in rising order; `by_number`: that of each epoch."""
    said = f"line {claim.line} says {claim.what}"
    if claim.what == "best epoch":
        best, at = run.best(), by_number.get(claim.value)
        if best is None or at is None and not is_whole or at is not None and at >= best.dev_acc:
            return ""
        has = "which the log does not have" if at is None else f"which has dev {at:.3f}"
        return f"{said} is {claim.value:g}, {has}; epoch {best.number:g} is the best, with {best.dev_acc:.3f}"
    text = f"{claim.value:.{min(claim.decimals, 6)}f}"
    if claim.what == "test":
        if run.test is None or _agree(claim, run.test):
            return ""
        return f"{said} {text}; the run itself printed {run.test:.3f}"
    if not devs or not is_whole:
        return ""
    allowed = [devs[-1]] if claim.what == "best dev" else [
        _nearest(devs, claim.value), *([] if run.dev is None else [run.dev])]
    if any(_agree(claim, acc) for acc in allowed):
        return ""
    return f"{said} {text}; the best epoch has {devs[-1]:.3f}"


def _nearest(devs: list[float], value: float) -> float:
    """The accuracy that is nearest to a value, of some in rising order."""
    i = bisect.bisect_left(devs, value)
    return min(devs[max(0, i - 1): i + 1], key=lambda acc: abs(acc - value))


def _agree(claim: Claim, acc: float) -> bool:
    """Are the two the same number, as far as it is written out?"""
    return abs(claim.value - acc) <= 0.5 * 10.0**-claim.decimals + 0.00051
