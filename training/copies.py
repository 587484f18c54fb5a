"""Which runs of a report are one run over again, such as a run's log beside its folder."""

from collections.abc import Sequence

from formats.past_run import PastRun
from training.pairs import options_of

NOT_KNOWN = ("", "heading", "partly")  # how the options of a run are known that may have others


def copies(runs: Sequence[PastRun]) -> list[tuple[PastRun, PastRun]]:
    """The runs that are another one over again, each with that other one: their epochs have the same numbers, and so
    have their options, or those of one are not known. To compare them would count one run twice."""
    alike: dict[object, list[PastRun]] = {}
    for run in runs:
        if len(run.epochs) > 1:
            alike.setdefault(tuple((e.number, e.scores()) for e in run.epochs), []).append(run)
    found: list[tuple[PastRun, PastRun]] = []
    for same in alike.values():
        kept: list[PastRun] = []
        for run in sorted(same, key=lambda one: one.known_by in NOT_KNOWN):
            first = next((one for one in kept if _may_be(run, one)), None)
            if first is None:
                kept.append(run)
            else:
                found.append((run, first))
    return found


def _may_be(run: PastRun, other: PastRun) -> bool:
    """May runs with the same numbers be one run, by what is known of their options? By those that were typed, where one
    is a log's; where things are, and that they were typed at all, makes no run another one."""
    if run.known_by in NOT_KNOWN:
        return all(other.options.get(name, value) == value for name, value in options_of(run).items())
    if run.known_by == other.known_by:
        return options_of(run) == options_of(other)
    return all(a.options.get(name) == value for a, b in ((run, other), (other, run)) for name, value in
               options_of(b).items() if name in b.given)
