"""The trials of a search in a storage that several processes share, through Optuna: which point comes next, who works
on which trial, what has come out.

What Optuna stores is what its own tools read. Two things are ours. A point is drawn before its trial exists, by a
sampler whose seed is that of the search and the trial's number: so a search that was killed goes on as the one that was
not. And a process holds a lock on each trial that it works on: a trial whose lock is free is nobody's.
"""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from commands import space as spaces
from commands.space import Parameter, Range, Space
from commands.storage import HEARTBEAT, check_address, faults_named, file_of, hidden, lock_of, open_storage
from config import InputError
from formats import files

STUDY = "minllama"  # one in a storage
DRAWS = 20  # of a point, until one that no trial has had yet
BY_CHANCE = 5  # trials, before a sampler that learns begins
WORKED_ON = ".trial.lock"


@dataclass(frozen=True)
class Plan:
    """What a search is, beside its storage. `name`: what the storage must agree on, by what it is called for a
    person; `n_evaluations`: of a trial that is not ended before."""

    space: Space
    method: str
    prune: str
    rises: bool
    n_trials: int
    n_evaluations: int
    seed: int
    name: dict[str, Any] = field(default_factory=dict)


# --------------------------------------------------------------------------- the trials


class Trials:
    """The trials of a search. `folder`: where this process has the runs of those that it begins.

    Raises InputError for a storage of another search, naming what is other.
    """

    def __init__(self, plan: Plan, storage: str, folder: Path):
        import optuna

        check_address(storage)
        self.plan, self.storage, self.folder = plan, storage, folder
        self.lock = lock_of(storage, folder)
        self.points = spaces.grid(plan.space) if plan.method == "grid" else None
        self.n_points = len(self.points) if self.points is not None else count(plan.space)
        with files.locked(self.lock, waits=True), faults_named(storage):
            self.kept = open_storage(storage)
            self.study = optuna.create_study(
                storage=self.kept, study_name=STUDY, load_if_exists=True, pruner=make_pruner(plan),
                direction="maximize" if plan.rises else "minimize", sampler=optuna.samplers.RandomSampler())
            self._check_same()

    def _check_same(self) -> None:
        known, own = self.study.user_attrs.get("search"), json.loads(json.dumps(self.plan.name))
        if known is None and not self.study.get_trials(deepcopy=False):
            self.study.set_user_attr("search", own)
        elif known != own:
            raise InputError(f"--storage {hidden(self.storage)}: it belongs to another search: "
                             f"{'; '.join(differences(known, own))}; name another --storage or --output_dir for this "
                             "one")

    @property
    def n_wanted(self) -> int:
        """How many trials the search has in all: no more than there are points."""
        return self.plan.n_trials if self.n_points is None else min(self.plan.n_trials, self.n_points)

    def all(self) -> list[Any]:
        """Every trial (Optuna's FrozenTrial) that somebody has worked on, by number."""
        with faults_named(self.storage):
            return [one for one in self.study.get_trials(deepcopy=False)
                    if one.number < self.plan.n_trials or "folder" in one.user_attrs]

    def folder_of(self, number: int) -> Path:
        """Where this process has the run of a trial that it begins."""
        return self.folder / f"trial-{number:04d}"

    def _home(self, one: Any) -> Path:
        """Where the run of a trial is, whoever has begun it."""
        return Path(one.user_attrs.get("folder", self.folder_of(one.number)))

    def _running(self) -> list[Any]:
        """The trials that somebody has begun, and nobody has ended."""
        from optuna.trial import TrialState

        return self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))

    @contextmanager
    def take(self) -> Iterator[tuple[Any, dict[str, Any], Path] | None]:
        """A trial to work on, its point and its folder; None where there is none. One that a process left behind comes
        before a new one. Inside, it belongs to this process."""
        with ExitStack() as stack:
            with files.locked(self.lock, waits=True), faults_named(self.storage):
                found = self._left_behind(stack) or self._new(stack)
                # With the lock held: whoever draws the next point must know this one.
                point = spaces.walk(self.plan.space, partial(suggest, found[0])) if found else {}
            if found:
                trial, folder = found
                stack.enter_context(self._heartbeat(trial))
                yield trial, point, folder
            else:
                yield None

    def _new(self, stack: ExitStack) -> tuple[Any, Path] | None:
        from optuna.trial import TrialState

        trials = self.study.get_trials(deepcopy=False)
        if not any(one.state == TrialState.WAITING for one in trials):  # one that a killed process has drawn
            if len(trials) >= self.n_wanted:
                return None
            self.study.enqueue_trial(propose(self.plan, self.points, self.n_points, trials))
        trial = self.study.ask()
        if trial.number >= self.plan.n_trials:  # a machine that shares no file with this one was faster
            self.study.tell(trial, state=TrialState.FAIL)
            return None
        return trial, self._begin(trial, stack)

    def _begin(self, trial: Any, stack: ExitStack) -> Path:
        """Take the lock of a trial that this process works on in its own folder."""
        folder = self.folder_of(trial.number)
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(files.locked(folder / WORKED_ON, waits=True))
        trial.set_user_attr("folder", str(folder.resolve()))
        return folder

    def _left_behind(self, stack: ExitStack) -> tuple[Any, Path] | None:
        """A trial that is called running and that nobody works on: its lock is free, or where its folder is on another
        machine, there has been no sign of life."""
        import optuna

        for one in self._running():
            folder = self._home(one)
            lock = folder / WORKED_ON
            if lock.is_file():
                inner = ExitStack()
                is_free = inner.enter_context(files.locked(lock))
                if is_free and self.kept.get_trial(one._trial_id).state == optuna.trial.TrialState.RUNNING:
                    stack.enter_context(inner)
                    trial = optuna.trial.Trial(self.study, one._trial_id)
                    trial.set_user_attr("folder", str(folder.resolve()))
                    return trial, folder
                inner.close()
            elif self._is_silent(one):
                trial = optuna.trial.Trial(self.study, one._trial_id)
                return trial, self._begin(trial, stack)
        return None

    def _is_silent(self, one: Any) -> bool:
        """Has a trial whose folder is not here given no sign of life for long?"""
        if "://" in self.storage and one._trial_id in self.kept._get_stale_trial_ids(self.study._study_id):
            return True
        if "folder" in one.user_attrs:
            return False  # in a journal there are no signs of life, and its folder may be mounted elsewhere
        if file_of(self.storage):
            return True  # its lock is held from the first sign of a trial until it has a folder
        began = one.datetime_start
        return began is None or time.time() - began.timestamp() > 2 * HEARTBEAT

    def others(self) -> int:
        """How many trials other processes work on just now."""
        n = 0
        with files.locked(self.lock, waits=True), faults_named(self.storage):
            for one in self._running():
                lock = self._home(one) / WORKED_ON
                if lock.is_file():
                    with files.locked(lock) as is_free:
                        n += not is_free
                else:
                    n += not self._is_silent(one)
        return n

    @contextmanager
    def _heartbeat(self, trial: Any) -> Iterator[None]:
        from optuna.storages._heartbeat import get_heartbeat_thread

        with get_heartbeat_thread(trial._trial_id, self.study._storage):
            yield

    # ----------------------------------------------------------------------- what comes out

    def report(self, trial: Any, value: float, n: int) -> bool:
        """Tell of the n-th evaluation of a trial, counted from 1; is it so far behind that it ends here?"""
        with faults_named(self.storage):
            trial.report(value, n)  # one that a trial has reported before it was killed stays
            return bool(trial.should_prune())

    def tell(self, trial: Any, state: str, score: float | None, **about: Any) -> None:
        """How a trial has ended: complete, pruned or failed."""
        from optuna.trial import TrialState

        with faults_named(self.storage), suppress(optuna_finished()):
            for name, value in about.items():
                trial.set_user_attr(name, value)
            if score is not None:
                trial.set_user_attr("score", score)
            states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
            self.study.tell(trial, score if state == "complete" else None, state=states[state])


def propose(plan: Plan, points: list[dict[str, Any]] | None, n_points: int | None, trials: list[Any]) -> dict[str, Any]:
    """The point of the next trial. It depends on the trials so far, the seed and the trial's number alone. `points`: of
    a grid; `n_points`: of the space, where they can be counted."""
    import optuna

    number = len(trials)
    had = [one.params for one in trials]
    if points is not None:
        return next(point for point in points if point not in had)
    point: dict[str, Any] = {}
    for draw in range(DRAWS):
        study = optuna.create_study(
            study_name=STUDY, direction="maximize" if plan.rises else "minimize", pruner=make_pruner(plan),
            sampler=make_sampler(plan, (plan.seed * 1_000_003 + number + draw * 7_919) % 2**32))
        study.add_trials(trials)
        point = spaces.walk(plan.space, partial(suggest, study.ask()))
        if point not in had:
            return point
    if n_points is not None and n_points <= 1000:  # chance hits the last ones of a small space seldom
        return next((one for one in spaces.grid(plan.space) if one not in had), point)
    return point


def optuna_finished() -> type[Exception]:
    """What Optuna raises where another process has ended the trial meanwhile."""
    from optuna.exceptions import UpdateFinishedTrialError

    return UpdateFinishedTrialError


def differences(known: Any, own: dict[str, Any]) -> list[str]:
    """What another search has other than this one, for a person."""
    if not isinstance(known, dict):
        return ["another program made it"]
    found = []
    for name, value in own.items():
        there = known.get(name)
        if isinstance(value, dict) and isinstance(there, dict):
            other = [one for one in sorted(value.keys() | there) if value.get(one) != there.get(one)]
            found += [f"the file {one} is another one" if name == "data" else
                      f"--{one} is {there.get(one, 'not typed')} there, {value.get(one, 'not typed')} here"
                      for one in other]
        elif there != value:
            found.append(f"the {name} is {there} there, {value} here")
    return found


def count(space: Space) -> int | None:
    """How many points a space has; None where a range has no steps, and where there are too many to matter."""
    if any(one.values() is None for one in space):
        return None
    try:
        return len(spaces.grid(space))
    except InputError:
        return None


def suggest(trial: Any, one: Parameter) -> Any:
    """What a trial has for a part of the space."""
    domain = one.domain
    if not isinstance(domain, Range):
        return trial.suggest_categorical(one.name, domain)
    if domain.is_whole:
        return trial.suggest_int(one.name, domain.low, domain.high, step=domain.step or 1, log=domain.is_log)
    value = trial.suggest_float(one.name, domain.low, domain.high, step=domain.step, log=domain.is_log)
    return float(f"{value:.12g}") if domain.step else value


def make_sampler(plan: Plan, seed: int) -> Any:
    """What draws the points of a method."""
    import optuna

    if plan.method in ("tpe", "bohb"):
        return optuna.samplers.TPESampler(seed=seed, n_startup_trials=BY_CHANCE, multivariate=True, constant_liar=True,
                                          group=any(one.conditions for one in plan.space))
    if plan.method == "gp":
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=BY_CHANCE, warn_independent_sampling=False)
    return optuna.samplers.RandomSampler(seed=seed)


def make_pruner(plan: Plan) -> Any:
    """What ends trials early."""
    import optuna

    if plan.prune == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1)
    if plan.prune == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    if plan.prune == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=1, max_resource=plan.n_evaluations, reduction_factor=3)
    return optuna.pruners.NopPruner()
