"""What --run names to runs: run folders, folders of them, logs, tables. What cannot be read is named, and the rest is
reported.

Nothing here imports torch.
"""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from config import InputError
from formats import files, past_run, run_logs, run_tables
from formats.past_run import Epoch, PastRun
from training import logs
from training.run_folder import RunFolder, asks_for_series, has_changed

DEEPEST = 4  # folders inside a folder in which runs are looked for
MOST = 10**9  # no run has more sentences or epochs: a larger number is damage
NOT_WALKED = {"best", "last"}


@dataclass
class Found:
    """The runs that could be read, and a line for each thing that could not."""

    runs: list[PastRun] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def read(paths: tuple[str, ...], score: str | None) -> Found:
    """The runs of every path, each with a name of its own."""
    found = Found()
    taken: set[Path] = set()
    for typed in paths:
        path = Path(typed)
        try:
            if path.resolve() in taken:
                found.faults.append(f"{typed}: it is named twice; it is reported once")
                continue
            taken.add(path.resolve())
            if path.is_dir():
                _read_folder(path, found, taken)
            elif path.exists():
                _read_file(path, score, found)
            else:
                found.faults.append(f"{typed}: there is no such folder or file")
        except InputError as error:
            found.faults.append(str(error))
        except OSError as error:
            found.faults.append(f"{typed}: {error.strerror}" if error.strerror else str(error))
    found.runs = _told_apart(found.runs, found.faults)
    return found


def _told_apart(runs: list[PastRun], faults: list[str]) -> list[PastRun]:
    """Runs of the same name get where they come from behind it."""
    count = Counter(run.name for run in runs)
    twice = [name for name, n in count.items() if n > 1]
    if twice:
        shown = ", ".join(twice[:5]) + (f" and {len(twice) - 5} more" if len(twice) > 5 else "")
        faults.append(f"several runs are called {shown}: where each comes from stands behind its name")
    return [replace(run, name=f"{run.name} ({run.source})") if count[run.name] > 1 else run for run in runs]


# --------------------------------------------------------------------------- files


def _read_file(path: Path, score: str | None, found: Found) -> None:
    if not path.is_file():
        raise InputError(f"{path}: this is not a regular file")
    text = past_run.decode(path.read_bytes(), path)
    runs = run_logs.read_runs(text, str(path))
    if runs:
        found.runs += [replace(run, name=path.name + run.name.removeprefix(str(path)))
                       if run.name.startswith(str(path)) else run for run in runs]
        return
    rows, faults = run_tables.read_runs(text, str(path), score)
    if not rows and not faults:
        empty = "there is no line `epoch 0: train loss :: ...` in it, and no table" if text.strip() else "it is empty"
        raise InputError(f"{path}: {empty}; expected a log, a table of experiments, or the folder of a run")
    found.runs += rows
    found.faults += faults


# --------------------------------------------------------------------------- folders


def _read_folder(path: Path, found: Found, taken: set[Path]) -> None:
    """A run, or all runs inside the folder."""
    places = list(_runs_in(path, DEEPEST))
    if not places:
        logs_there = sorted(p.name for p in path.iterdir() if p.suffix in (".log", ".txt", ".md", ".csv", ".tsv"))
        hint = f"; the files in it are named one by one, such as {path / logs_there[0]}" if logs_there else ""
        raise InputError(f"{path}: there is no run in this folder (no args.json){hint}")
    for place in places:
        if place != path and place.resolve() in taken:
            continue
        taken.add(place.resolve())
        name = place.resolve().name if place == path else str(place.relative_to(path))
        is_in_series = place != path and RunFolder(path).has_run()
        try:
            found.runs.append(of_folder(RunFolder(place), f"{path.resolve().name}/{name}" if is_in_series else name))
        except (InputError, OSError) as error:
            found.faults.append(str(error))


def _runs_in(path: Path, depth: int) -> Iterator[Path]:
    """The run folders at a path: itself, or those of its series, or those below it. Links are not followed."""
    folder = RunFolder(path)
    if folder.has_run():
        try:
            is_series = asks_for_series(files.read_json(folder.args).get("options") or {})
        except (ValueError, AttributeError):
            is_series = False
        if not is_series:
            yield path
            return
    if depth:
        for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False) and entry.name not in NOT_WALKED and not entry.name.startswith("."):
                yield from _runs_in(Path(entry.path), depth - 1)


def of_folder(folder: RunFolder, name: str) -> PastRun:
    """The run in a folder, also one that is unfinished or that an older version made: what that did not write is
    unknown. Accuracies and losses have the decimals that are printed, as in the run's log.

    Raises InputError for a folder that has no evaluation, and OSError for a link in it.
    """
    folder.check()
    described = files.read_json(folder.args)
    options = described.get("options")
    if not isinstance(options, dict):
        raise InputError(f"{folder.args}: this is not what a run writes (no options)")
    if options.get("option", "finetune") != "finetune":
        raise InputError(f"{folder}: it is the folder of --option {options['option']}, which is no fine-tuning run")
    notes = []
    result: dict[str, Any] = {}
    if folder.result.is_file():
        result = files.read_json(folder.result)
    else:
        notes.append("the run is not finished (no result.json)")
    notes += [f"{path.name} was changed after the run wrote it" for path, values in (
        (folder.args, described), (folder.result, result)) if has_changed(values)]
    lines = logs.read_log(folder.epochs)
    epochs = {epoch.number: epoch for line in lines if (epoch := _epoch(line))}
    if len(epochs) < len(lines):
        notes.append(f"{len(lines) - len(epochs)} of the {len(lines)} lines of {folder.epochs.name} cannot be used")
    dev, test = (_accuracy(result, split) for split in ("dev", "test"))
    if not epochs and dev is None:
        raise InputError(f"{folder}: the run has no evaluation yet (nothing in {folder.epochs.name})")
    dev_path, dev_sha256 = _dev_file(folder, described, options)
    given = described.get("given")
    return PastRun(
        name=name, source=str(folder.path), options={past_run.option_name(k): past_run.plain(_switch(v))
                                                     for k, v in options.items() if v is not None},
        known_by="folder", given=frozenset(str(g) for g in given) if isinstance(given, list) else frozenset(),
        epochs=tuple(epochs[n] for n in sorted(epochs)), dev=dev, test=test,
        said_best=_number(result.get("best_epoch")), monitor=str(options.get("monitor", "")),
        planned=_count(options.get("epochs")),
        stopped=str(result.get("stopped", "")), majority=_rounded(_inside(result, "baselines", "dev", "majority")),
        n_dev=_count(_inside(result, "dev", "n")) or _n_held_out(folder, described),
        seconds=_number(result.get("train_seconds")) or _seconds(lines),
        predictions=folder.predictions("dev") if dev_path and folder.predictions("dev").is_file() else None,
        dev_file=dev_path, dev_sha256=dev_sha256, n_classes=_n_classes(result), reliability=_reliability(result),
        notes=tuple(notes), inspected=_inspected(folder))


def _dev_file(folder: RunFolder, described: dict[str, Any], options: dict[str, Any]) -> tuple[Path | None, str]:
    """The file of the run's dev sentences and its checksum; "" where it is not known. Where dev was held out, it lies
    in the run folder. The runs of --folds have another dev each, which is no file, and are known by how it was cut."""
    held_out = _inside(described, "splits", "dev")
    if options.get("folds") is not None:
        cut = [_inside(described, "files", name, "sha256") for name in ("train", "dev")] + [options.get("seed")]
        return None, f"{options['folds']} folds of {hashlib.sha256(repr(cut).encode()).hexdigest()}"
    if isinstance(held_out, str):
        return folder.split("dev"), held_out
    path, sha256 = (_inside(described, "files", "dev", name) for name in ("path", "sha256"))
    return (Path(path) if isinstance(path, str) else None), sha256 if isinstance(sha256, str) else ""


def _n_held_out(folder: RunFolder, described: dict[str, Any]) -> int | None:
    """The dev sentences of an unfinished run that has them in its folder."""
    if not isinstance(_inside(described, "splits", "dev"), str) or not folder.split("dev").is_file():
        return None
    return folder.split("dev").read_bytes().count(b"\n") or None


def _inspected(folder: RunFolder) -> tuple[tuple[str, str], ...]:
    """What the run's inspect.json says in short; nothing where it is about other weights than those that lie here."""
    path = folder.path / "inspect.json"
    if path.is_symlink() or not path.is_file():
        return ()
    try:
        values = files.read_json(path)
    except (InputError, OSError):
        return (("inspect.json", "it cannot be read; --option inspect writes it anew"),)
    if values.get("best") != (files.manifest_digest(folder.best) or ""):
        return (("inspect.json", "it is about other weights; --option inspect writes it anew"),)
    card = values.get("card")
    pairs = [pair for pair in card if isinstance(pair, list)] if isinstance(card, list) else []
    return tuple((pair[0], pair[1]) for pair in pairs if len(pair) == 2 and all(isinstance(x, str) for x in pair))


def _epoch(line: dict[str, Any]) -> Epoch | None:
    """A line of epochs.jsonl with the decimals of its printed line; None for one that is damaged."""
    number, loss, train, dev, lr = (_number(line.get(k)) for k in ("epoch", "train_loss", "train_acc", "dev_acc", "lr"))
    if number is None or train is None or dev is None or "train_loss" not in line:
        return None
    return Epoch(number, math.nan if loss is None else round(loss, 3), round(train, 3), round(dev, 3),
                 None if lr is None else float(f"{lr:.2e}"), dev_loss=_number(line.get("dev_loss")))


def _switch(value: Any) -> Any:
    return ("on" if value else "off") if isinstance(value, bool) else value


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and not abs(value) > 1e300 else None


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 < value <= MOST else None


def _rounded(value: Any) -> float | None:
    number = _number(value)
    return None if number is None else round(number, 3)


def _inside(values: Any, *names: str) -> Any:
    for name in names:
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _n_classes(result: dict[str, Any]) -> int | None:
    names = result.get("label_names")
    return len(names) if isinstance(names, list) and names else None


def _reliability(result: dict[str, Any]) -> tuple[tuple[float, ...], ...]:
    """The bins of dev with a sentence in them; () where one of them is damaged, or an older version wrote none."""
    bins = _inside(result, "calibration", "dev")
    whole = isinstance(bins, list) and all(
        isinstance(one, list) and len(one) == 5 and all(_number(x) is not None for x in one) for one in bins)
    return tuple(tuple(one) for one in bins) if whole and sum(one[2] for one in bins) > 0 else ()


def _accuracy(result: dict[str, Any], split: str) -> float | None:
    value = _rounded(_inside(result, split, "acc"))
    return value if value is not None and 0 <= value <= 1 else None


def _seconds(lines: list[dict[str, Any]]) -> float | None:
    return _number(lines[-1].get("seconds")) if lines else None
