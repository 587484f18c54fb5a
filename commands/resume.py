"""--resume: the options of a run that goes on. Other options, and data that has changed, are refused by name."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from config import InputError, RunConfig, contradiction
from formats import files
from training import saved, state
from training.run_folder import RUN_FILE, RunFolder, asks_for_series, options_of

# A file of args.json, and the option that names it.
OPTION_OF = {"train": "train", "dev": "dev", "test": "test", "label_names": "label_names", "tokenizer": "tokenizer",
             "weights": "pretrained_model_path"}


def resumed(config: RunConfig) -> RunConfig:
    """The options of the run, or of the series of --seeds or --folds, that is resumed. Raises InputError or
    FileNotFoundError, naming what has changed."""
    folder = RunFolder(config.resume or "")
    if not folder.has_run():
        raise FileNotFoundError(f"{folder}: there is no run here (no {RUN_FILE}){saved.near_run(folder.path)}")
    folder.check()
    if folder.is_finished():
        runs = folder.read_result().get("runs")
        raise InputError(f"{folder}: all its runs are finished; evaluate one with --option evaluate --run "
                         f"{folder.path / runs[0]}" if runs else
                         f"{folder}: the run is finished; evaluate it with --option evaluate --run {folder}")
    with folder.lock():  # is it still going? said at once, before everything is read
        described = state.read_description(folder)
    run = same_run(config, folder, described)
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
    if missing := {"train", "dev", "weights", "tokenizer"} - used.keys():
        raise InputError(f"{folder.args}: no run is described here (its files lack {', '.join(sorted(missing))})")
    asked = {n: getattr(config, n) for n in sorted(config.given - {"resume", "option"})}
    changed: dict[str, Any] = {"dataset": None, "resume": str(folder)}
    gone = []
    for name, option in OPTION_OF.items():
        if name not in used:
            continue
        # One that has moved may be named anew: its checksum says that it is the same.
        path = Path(asked.pop(option, used[name]["path"]))
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
    return replace(RunConfig(**{**options, **changed}), given=frozenset(described["given"]))
