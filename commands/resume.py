"""--resume: the options of a run that goes on. Other options, and data that has changed, are refused by name."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from commands import job as jobs
from config import InputError, RunConfig, contradiction
from formats import files
from training import logs, saved, state
from training.run_folder import RUN_FILE, RunFolder, asks_for_series, options_of
from training.trainer import Loop

# A file of args.json, and the option that names it.
OPTION_OF = {"train": "train", "dev": "dev", "test": "test", "label_names": "label_names", "tokenizer": "tokenizer",
             "weights": "pretrained_model_path", "adapter": "adapter"}


# What may be another value than the run began with.
EXTENDABLE = ("epochs", "max_steps", "patience", "keep_state")


def resumed(config: RunConfig) -> RunConfig:
    """The options of the run, or of the series of --seeds or --folds, that is resumed. Raises InputError or
    FileNotFoundError, naming what has changed."""
    folder = RunFolder(config.resume or "")
    if not folder.has_run():
        raise FileNotFoundError(f"{folder}: there is no run here (no {RUN_FILE}){saved.near_run(folder.path)}")
    folder.check()
    goes_on = config.given & {*EXTENDABLE}
    if folder.is_finished():
        runs = folder.read_result().get("runs")
        if runs or not goes_on:
            raise InputError(f"{folder}: all its runs are finished; evaluate one with --option evaluate --run "
                             f"{folder.path / runs[0]}" if runs else
                             f"{folder}: the run is finished; evaluate it with --option evaluate --run {folder}")
        if not state.has_states(folder.last):
            raise InputError(f"{folder}: the run is finished and was not run with --keep_state, so its state is gone; "
                             f"--option finetune --pretrained_model_path {folder} starts a new run from it")
    with folder.lock():  # is it still going? said at once, before everything is read
        described = state.read_description(folder)
    run = same_run(config, folder, described)
    if goes_on:
        check_length(run, folder)
    if fault := contradiction(run):
        raise InputError(f"{folder.args}: {fault}")
    for name in folder.outside(run):
        if name not in config.given and not asks_for_series(vars(run)):
            path = getattr(run, name)
            raise InputError(f"--resume {folder}: the run writes --{name} {path}, which is outside of its folder; type "
                             f"--{name} {path} again if that is what you want")
    return run


def same_run(config: RunConfig, folder: RunFolder, described: dict[str, Any]) -> RunConfig:
    """The options that args.json describes, and of the typed ones those that may be others: where files have moved to,
    and where a run's predictions go. Raises InputError for what has changed."""
    used, options = described["files"], options_of(described)
    needed = {"train", "weights", "tokenizer"}
    if "splits" not in described and not options["folds"] and not options["seeds"]:
        needed.add("dev")
    if missing := needed - used.keys():
        raise InputError(f"{folder.args}: no run is described here (its files lack {', '.join(sorted(missing))})")
    if "max_minutes" in config.given and config.max_minutes != options["max_minutes"]:
        raise InputError(f"--resume {folder}: --max_minutes is laid out when a run begins, and cannot be changed; "
                         "--epochs N or --max_steps N says how far it goes on")
    asked = {n: getattr(config, n) for n in sorted(config.given - {"resume", "option"})}
    changed: dict[str, Any] = {"dataset": None, "resume": str(folder)}
    if not asks_for_series(options):
        changed |= {name: asked.pop(name) for name in EXTENDABLE if name in asked}
        if options["max_minutes"] and changed.keys() & {"epochs", "max_steps"}:  # what is typed now decides
            changed = {"max_steps": None, **changed, "max_minutes": None}
    gone = []
    for name, option in OPTION_OF.items():
        if name not in used:
            continue
        # One that has moved may be named anew: its checksum says that it is the same. A name from the hub is no path.
        typed = asked.pop(option, None)
        is_a_name = typed == options.get(option) and not Path(typed or "").exists()
        path = Path(used[name]["path"] if typed is None or is_a_name else typed)
        digest = files.sha256(path) if path.is_file() or path.is_dir() else None
        if digest and digest == used[name].get("sha256", digest):
            changed[option] = str(path)
        else:
            gone.append(f"{path} has changed or is gone (where the same has moved to, say --{option} PATH)")
    if not asks_for_series(options):  # a run's predictions may go elsewhere; those of a series are in its runs' folders
        changed |= {name: asked.pop(name) for name in ("dev_out", "test_out") if name in asked}
    differences = [f"--{n} is {options[n]} in the run, {value} now" for n, value in asked.items()
                   if value != options[n]]
    if differences or gone:
        raise InputError(f"--resume {folder}: what has changed since: {'; '.join([*differences, *gone])}")
    return replace(config_of(described), **changed)


def config_of(described: dict[str, Any]) -> RunConfig:
    """The options that an args.json describes."""
    return RunConfig(**options_of(described), given=frozenset(described["given"]))


def check_length(run: RunConfig, folder: RunFolder) -> None:
    """Raises InputError for a run that cannot go on until where it is asked to: it is beyond that, or has diverged."""
    progress = state.newest_progress(folder.last)
    if progress is None:
        return
    if progress.stopped == "diverged":
        raise InputError(f"--resume {folder}: the run has diverged, and more steps do not mend that; start another one "
                         "with a lower --lr")
    done = progress.epoch + (progress.window > 0)
    if done > run.epochs:
        raise InputError(f"--resume {folder} --epochs {run.epochs}: the run has begun its epoch {done} already (epochs "
                         f"counted from 1); give it {done} or more")
    if run.max_steps and progress.step > run.max_steps:
        raise InputError(f"--resume {folder} --max_steps {run.max_steps}: the run has done {progress.step} steps "
                         f"already; give it {progress.step} or more")


# --------------------------------------------------------------------------- longer than the run began


def extend(described: dict[str, Any], config: RunConfig, folder: RunFolder, loop: Loop) -> dict[str, Any]:
    """Where a run goes on with other values of `EXTENDABLE` options than its args.json describes, write them there, and
    return the new description. `loop`: the run, as its state and --patience have it. Says it where the run is not the
    one that one gets with these options from the start. Raises InputError where nothing more is left to train."""
    before = config_of(described)
    changes = {n: getattr(config, n) for n in (*EXTENDABLE, "max_minutes") if getattr(config, n) != getattr(before, n)}
    if not changes:
        return described
    if folder.is_finished() and (loop.is_at_end() or loop.progress.stopped):
        typed = ", ".join(f"--{name} {value}" for name, value in changes.items())
        what = "a larger --patience, or 0" if loop.progress.stopped == "patience" else "more --epochs"
        raise InputError(f"--resume {folder}: the run is finished, and with {typed} there is nothing more to train; "
                         f"give it {what}")
    then, now = (jobs.schedule_of(one, loop.job.steps_per_epoch) for one in (before, config))
    if any(then(step, []) != now(step, []) for step in range(loop.progress.step)):
        old, new = (f"{one.epochs} epochs" if one.max_steps is None else f"{one.max_steps} steps"
                    for one in (before, config))
        logs.notice(f"the {config.scheduler} schedule was laid over {old}: the steps so far had other rates than in a "
                    f"run of {new}; from here on it is that of {new}")
    loop.described = folder.extend(described, changes, loop.progress.step)
    return loop.described
