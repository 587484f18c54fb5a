"""--option search: many runs over a space of options, each an ordinary one; then the best again with new seeds, and the
command that repeats the winner."""

import math
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from commands import defaults, finalists, inputs, lr_find, one_run, results, trial
from commands import job as jobs
from commands import space as spaces
from commands import storage as storages
from commands.inputs import Inputs
from commands.search_pages import ABOUT, TABLE
from commands.space import Space
from commands.storage import hidden
from commands.study import Plan, Trials
from commands.trial import Ground, Outcome
from config import InputError, RunConfig, counted, duration
from formats import files, weights
from training import clock, frozen, loggers, logs, run_folder
from training import device as devices
from training.bar import Bar
from training.course import course_of
from training.run_folder import RUN_FILE
from training.streams import without_readers

N_TRIALS = 20
FIRST = 3  # when so many trials have failed, and none has come out, the search ends
ANY_RATE = "log:1e-7..1e-2"  # --option lr_find tries these
DATABASE = "search.db"
# No number of a trial depends on these, or the checksums of the data say what they name.
PLACES = {"option", "output_dir", "plots", "logger", "train", "dev", "pretrained_model_path"}


@without_readers()
def run(config: RunConfig) -> int:
    """Search, or go on with the search that is in the folder. Returns 0 when all trials of this process are done."""
    results.check_outputs(config)
    loggers.check_installed(config)
    asked = text = spaces.read(config.space) if config.space else ""
    is_auto = spaces.has_auto(text)
    if is_auto and config.method == "grid":
        raise InputError("--method grid: lr=auto is a continuous range; type the rates, such as lr=1e-4|3e-4|1e-3, or "
                         "take another --method")
    space = spaces.parse(spaces.with_rates(text, ANY_RATE))
    objective = objective_of(config)
    check_seeds(config)
    # No trial has folds, so nothing is cut or held out for them.
    whole = inputs.load(replace(config, folds=None, fold=None), need=("train", "dev"))
    if not text:
        rate, _ = defaults.rate_of(config, config.n_layers or whole.weights.config.n_layers)
        text = spaces.default_space(len(whole.splits["train"]), rate, config.ordinal, config.given)
        space = spaces.parse(text)
        logs.notice(f"space :: {text} (chosen, since no --space was typed)")
    typed, config = config, defaults.with_defaults(config, whole, {one.name for one in space})
    for line in spaces.no_effect_anywhere(space, typed):
        logs.warn(f"no effect: {line}")
    logs.notice(frozen.notice(config))
    for line in spaces.check(space, replace(config, given=typed.given)):
        logs.warn(line)
    ground = Ground(trial.base_config(config, objective), trial.without_test(whole), devices.choose_device(config),
                    objective)
    plan = plan_of(config, text, space, ground)  # what cannot be is refused before anything is written
    folder = folder_of(config)
    before = finalists.read_about(folder / ABOUT)
    storage = config.storage or f"sqlite:///{quote((folder / DATABASE).as_posix(), safe='/: ')}"
    kept = storages.name_in(storage, folder)
    if before.get("storage", kept) != kept:
        raise InputError(f"--output_dir {folder}: its trials are those of the storage {before['storage']}, and this "
                         f"one is {kept}; name that one, or another --output_dir")
    if is_auto:
        known = before.get("space") if before.get("asked") == asked else None
        text = known if isinstance(known, str) else spaces.with_rates(text, rates_of(ground))
        logs.notice(f"space :: {text} (the rates are the range test's)")
        plan = plan_of(config, text, spaces.parse(text), ground)
    trials = Trials(plan, storage, folder)
    files.write_json(folder / ABOUT, {**before, "command": command_of(typed), "method": config.method, "asked": asked,
                                      "space": text, "objective": objective, "prune": plan.prune, "storage": kept})
    if config.trials and trials.n_wanted < config.trials:
        logs.notice(f"--trials {config.trials}: the space has {counted(trials.n_wanted, 'point')}, and each is tried "
                    "once")
    logs.say(f"search :: {folder}, {counted(trials.n_wanted, 'trial')} by {config.method}, pruning: {plan.prune}, "
             f"{objective} decides")
    warn_of_room(folder, trials.n_wanted - len(trials.all()), config, whole)
    with going_on(command_of(typed)):
        ground = replace(ground, baselines=one_run.compute_baselines(inputs.limit_train(config, ground.inputs)))
        search(config, trials, ground)
        return finalists.finish(config, trials, ground, whole)


# --------------------------------------------------------------------------- before it begins


def objective_of(config: RunConfig) -> str:
    """The number that decides. Raises InputError for one that the trials do not have."""
    objective = config.objective or config.monitor
    is_ordinal = config.ordinal or config.loss == "ordinal" or config.monitor in ("dev_mae", "dev_qwk")
    if objective in ("dev_mae", "dev_qwk") and "monitor" in config.given and not is_ordinal:
        raise InputError(f"--objective {objective} beside --monitor {config.monitor} needs --ordinal: the labels "
                         "have an order")
    return objective


def check_seeds(config: RunConfig) -> None:
    """Raises InputError for a --seed behind which there are no more seeds for the trials and the finalists."""
    most = 2**63 - (config.seeds or 1) - config.final_seeds
    if config.seed > most:
        raise InputError(f"--seed {config.seed}: the seeds behind it are needed too; it must be {most} at most")


def folder_of(config: RunConfig) -> Path:
    """The search's folder, made where it is not there. Raises OSError for one in which nothing can be written, and for
    that of a run."""
    folder = Path(config.output_dir or "runs/search")
    files.check_writable(folder / ABOUT, "--output_dir")
    for name in (ABOUT, TABLE, DATABASE):
        files.check_plain(folder / name)
    if (folder / RUN_FILE).exists():
        raise FileExistsError(f"{folder}: there is a run in this folder; choose another --output_dir for the search")
    return folder


def plan_of(config: RunConfig, text: str, space: Space, ground: Ground) -> Plan:
    """What the search is. Raises InputError for a point at which no run can be, and for a grid without end."""
    if config.method == "grid":
        spaces.grid(space)
    n_evaluations = 1
    for point in spaces.corners(space):
        at = spaces.configured(ground.config, point)
        try:
            if at.pretrained_model_path == ground.config.pretrained_model_path:
                weights.check_n_layers(ground.inputs.weights, at.n_layers)
                frozen.check_run(at, at.n_layers or ground.inputs.weights.config.n_layers)
            n_evaluations = max(n_evaluations, n_evaluations_of(at, ground.inputs))
        except InputError as error:
            raise InputError(f"--space: there is no run at {spaces.in_words(point)}: {error}") from None
    by_method = {"hyperband": "hyperband", "bohb": "hyperband", "grid": "none"}
    n_seeds = config.seeds or 1
    fixed = {name: getattr(ground.config, name) for name in sorted(ground.config.given - PLACES)}
    data = {name: one["sha256"] for name, one in ground.inputs.checksums().items()}
    name = {"space": text, "objective": ground.objective, "data": data, "options": fixed, "number of seeds": n_seeds}
    return Plan(space, config.method, config.prune or by_method.get(config.method, "median"), ground.rises,
                config.trials or (spaces.MOST_POINTS if config.method == "grid" else N_TRIALS),
                n_evaluations * n_seeds, config.seed, name)


def rates_of(ground: Ground) -> str:
    """The interval of the range test (see --option lr_find) as a range of a space."""
    config = replace(ground.config, option="lr_find")
    with logs.doing("testing the range of the learning rate"):
        points = lr_find.range_test(jobs.build_job(config, ground.inputs, ground.device), config, ground.device)
    if len(points) < lr_find.FEWEST:
        raise InputError(f"--space lr=auto: the loss was finite for {counted(len(points), 'step')} of the range test "
                         "only; type the rates")
    low, _, high = lr_find.suggestion(points)
    return f"log:{low:.1e}..{high:.1e}"


def warn_of_room(folder: Path, n_trials: int, config: RunConfig, found: Inputs) -> None:
    """Each trial keeps its best weights: say so where they may not fit."""
    bytes_each = sum(map(math.prod, found.weights.shapes.values())) * (2 if config.save_dtype == "bfloat16" else 4)
    free = shutil.disk_usage(folder).free
    if n_trials * bytes_each > free:
        logs.warn(f"{counted(n_trials, 'trial')} may keep {n_trials * bytes_each / 1e9:.1f} GB of weights in {folder}, "
                  f"where {free / 1e9:.1f} GB are free; --save_dtype bfloat16 halves them")


def n_evaluations_of(config: RunConfig, found: Inputs) -> int:
    """How many evaluations a run has, where nothing ends it. Raises InputError where there is no such schedule."""
    n = min(config.train_limit or len(found.splits["train"]), len(found.splits["train"]))
    steps = -(-n // (config.batch_size * config.grad_accum))
    jobs.schedule_of(config, steps)
    return course_of(config, steps).n_evaluations()


def command_of(typed: RunConfig) -> str:
    """The command of this search; typed again, it goes on, and typed elsewhere beside it, both work on it."""
    words = ["python", "run_llama.py", "--option", "search"]
    for name in sorted(typed.given - {"option"}):
        value = getattr(typed, name)
        words += run_folder.option_words(name, hidden(value) if name == "storage" else value)
    return shlex.join(words)


@contextmanager
def going_on(command: str) -> Iterator[None]:
    """Inside, whatever stops the search says how it goes on."""
    try:
        yield
    except (SystemExit, KeyboardInterrupt):
        logs.notice(f"stopped; the search goes on with: {command}")
        raise


# --------------------------------------------------------------------------- the trials


def search(config: RunConfig, trials: Trials, ground: Ground) -> None:
    """Work on trials until there is none left, or the time is over. Raises what a trial has failed with where the first
    three have failed and none has come out."""
    seeds = [config.seed + i for i in range(config.seeds or 1)]
    each = trials.plan.n_evaluations // len(seeds)
    deadline = None if config.timeout is None else clock.command_began + config.timeout
    n_done = sum(one.state.is_finished() for one in trials.all())
    with Bar("search", trials.n_wanted, n_done) as bar:
        while True:
            if deadline is not None and time.monotonic() > deadline:
                logs.notice(f"--timeout: {duration(config.timeout or 0)} are over; no other trial is begun")
                return
            with trials.take() as taken:
                if taken is None:
                    return
                asked, point, folder = taken
                began = time.monotonic()
                outcome = trial.run_trial(point, folder, seeds, each, ground, partial(trials.report, asked), deadline)
                seconds = time.monotonic() - began
                planned = len(seeds) * n_evaluations_of(spaces.configured(ground.config, point), ground.inputs)
                trials.tell(asked, outcome.state, outcome.score, reason=outcome.reason,
                            evaluations=outcome.n_evaluations, planned=planned, seconds=round(seconds, 2))
            found = trials.all()
            logs.say(line_of(asked.number, outcome, point, seconds, found, ground))
            finalists.write_table(found, trials, ground)
            bar.update(f"search: {sum(one.state.is_finished() for one in found)} of {trials.n_wanted} trials")
            check_first(found, outcome)
            del outcome  # its error may hold a model


def line_of(number: int, outcome: Outcome, point: dict[str, Any], seconds: float, found: list[Any], ground: Ground,
            ) -> str:
    """trial 7 :: dev_acc 0.412, lr 3.2e-05, batch_size 16, 45 s; the best is trial 3 with 0.430"""
    score = "failed" if outcome.score is None else f"{ground.objective} {outcome.score:.3f}"
    how = f" ({outcome.reason})" if outcome.state != "complete" else ""
    leaders = finalists.ranked(found, ground.rises)
    leader = f"; the best is trial {leaders[0].number} with {leaders[0].value:.3f}" if leaders else ""
    return f"trial {number} :: {score}{how}, {spaces.in_words(point)}, {duration(seconds)}{leader}"


def check_first(found: list[Any], outcome: Outcome) -> None:
    """Raises the error of the trial that has just failed, where the first three have, and none has come out."""
    if outcome.state != "failed" or any(one.state.name in ("COMPLETE", "PRUNED") for one in found):
        return
    first = found[:FIRST]
    if len(first) < FIRST or any(one.state.name != "FAIL" for one in first):
        return
    reasons = "; ".join(f"trial {one.number}: {one.user_attrs.get('reason', 'unknown')}" for one in first)
    said = f"the first {FIRST} trials have failed, so the search ends: {reasons}"
    if outcome.error is None or isinstance(outcome.error, InputError):
        raise InputError(said)
    logs.notice(said)
    raise outcome.error
