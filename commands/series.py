"""--seeds and --folds: several runs, one after another, and what they say together."""

import shlex
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import dataset
from commands import one_run
from commands.inputs import Inputs, limit_train
from config import InputError, RunConfig
from formats import files
from training import clock, logs, run_folder, state
from training.device import Device
from training.run_folder import RunFolder, options_of

# What may differ between the options of a series and those of its runs: where things are.
PLACES = {"output_dir", "overwrite", "resume", "dev_out", "test_out", "dataset", "train", "dev", "test", "label_names",
          "tokenizer", "pretrained_model_path", "adapter"}


@dataclass(frozen=True)
class Run:
    """One of the runs that were asked for: its folder's name in the series ("" where it is the only one), its options
    and its inputs."""

    name: str
    config: RunConfig
    inputs: Inputs


def runs_of(config: RunConfig, inputs: Inputs) -> list[Run]:
    """The runs that --seeds or --folds ask for; without them, one.

    --train_limit draws each run's sentences with the run's own seed, so that it is the run that one gets alone.
    """
    def part(i: int, n: int) -> Inputs:
        limited = limit_train(config, inputs)
        return replace(limited, splits=dataset.fold(limited.splits, n, i, config.seed))

    if config.folds and config.fold is None:
        return [Run(f"fold-{i}", replace(config, fold=i), part(i, config.folds)) for i in range(config.folds)]
    if config.folds and config.fold is not None:
        return [Run(f"fold-{config.fold}", config, part(config.fold, config.folds))]
    if config.seeds:
        each = [replace(config, seed=seed, seeds=None) for seed in range(config.seed, config.seed + config.seeds)]
        return [Run(f"seed-{one.seed}", one, limit_train(one, inputs)) for one in each]
    return [Run("", config, limit_train(config, inputs))]


def repeat(config: RunConfig, inputs: Inputs, runs: list[Run], device: Device) -> int:
    """The runs one after another, each in a folder inside the series' own, then the summary.

    The series' args.json is there before its first run, so that --resume can finish what was stopped: it reads the
    results of the runs that are finished, goes on with the one that is not, and starts the missing ones.
    """
    folder = RunFolder(config.resume) if config.resume else run_folder.open_run(config)
    for one in runs:
        files.check_plain(folder.path / one.name, is_folder=True)
    members = [replace(one, config=replace(one.config, output_dir=str(folder.path / one.name), dev_out=None,
                                           test_out=None, resume=None)) for one in runs]
    if not config.resume:
        for one in members:
            run_folder.open_run(one.config)  # one that is in the way is refused, or replaced, before the first begins
    with folder.lock():
        if not config.resume:
            folder.describe(run_folder.environment(config, str(device), inputs.checksums(), "not used"))
        results: dict[str, dict[str, Any]] = {}
        deadline, n_left = clock.deadline_of(config), sum(not is_finished(one) for one in members)
        n_to_say = n_left
        try:
            for one in members:
                logs.say(f"{one.name}:")
                began, is_new = time.monotonic(), not is_finished(one)
                share = None if deadline is None else began + (deadline - began) / max(1, n_left)
                results[one.name] = finish(one, device, folder, n_to_say, share)
                if is_new:
                    n_left, n_to_say = n_left - 1, 0
                if deadline is not None:  # another process may have spent some of it
                    deadline -= max(0.0, results[one.name]["seconds"] - (time.monotonic() - began))
                if has_diverged(results[one.name]):
                    logs.say(f"{one.name} diverged: its accuracies are those of the weights from before that")
        except KeyboardInterrupt:  # between two runs, or the second ^C in one
            logs.notice(f"go on with: python run_llama.py --resume {shlex.quote(str(folder))}")
            raise
        summary = summarise(results, folder, "folds" if config.folds else "seeds")
        folder.save_result(summary)
    return exit_code(*results.values())


def is_finished(one: Run) -> bool:
    folder = RunFolder(one.config.output_dir or "")
    return folder.has_run() and folder.is_finished()


def finish(one: Run, device: Device, series: RunFolder, n_runs: int, deadline: float | None) -> dict[str, Any]:
    """The result of one run of a series: read where the run is finished, else it is gone on with, or started; see
    `one_run.train` for `n_runs` and `deadline`.

    Raises InputError when the run in its folder is not the series' own.
    """
    folder = RunFolder(one.config.output_dir or "")
    if not folder.has_run():
        return one_run.train(one.config, one.inputs, device, series, n_runs, deadline)
    described = state.read_description(folder)
    saved = options_of(described)
    other = [f"--{name} is {saved[name]} there, {getattr(one.config, name)} in {series}" for name in sorted(saved)
             if name not in PLACES and saved[name] != getattr(one.config, name)
             and not (name == "max_steps" and one.config.max_minutes)]  # which found out how many
    used, own = described["files"], state.read_description(series)["files"]
    other += [f"{used[name]['path'] if name in used else 'nothing'} is its {name} file" for name in own
              if name not in used or used[name].get("sha256") != own[name].get("sha256")]
    if other:
        raise InputError(f"{folder}: this run is not one of {series}: {'; '.join(other)}; move the folder away, and "
                         "resume again")
    if folder.is_finished():
        logs.notice(f"{folder} is finished: its result is taken as it is")
        return folder.read_result()
    config = replace(one.config, resume=str(folder), max_steps=saved["max_steps"])
    return one_run.train(config, one.inputs, device, series, n_runs, deadline)


# --------------------------------------------------------------------------- what they say together


def has_diverged(result: dict[str, Any]) -> bool:
    """Did the training of this result.json end because it diverged?"""
    return result["stopped"] == "diverged"


def exit_code(*results: dict[str, Any]) -> int:
    """3 where a run has diverged, else 0."""
    return 3 if any(map(has_diverged, results)) else 0


def summarise(results: dict[str, dict[str, Any]], folder: RunFolder, unit: str) -> dict[str, Any]:
    """Print mean and standard deviation of the accuracies of a series' runs, and return what its result.json holds.

    Of runs that diverged it says which they are, and what the others give alone. A fold's accuracy is flattered by the
    choice of the best epoch on that same fold: the last epoch's, which nobody chose, is printed too.
    """
    diverged = [name for name, result in results.items() if has_diverged(result)]
    summary: dict[str, Any] = {"runs": list(results), "diverged": diverged}
    for split in ("dev", "test"):
        if all(split in result for result in results.values()):
            summary[split] = mean_and_deviation([result[split]["acc"] for result in results.values()])
    healthy = [result for name, result in results.items() if name not in diverged]
    if diverged:
        without = {split: mean_and_deviation([result[split]["acc"] for result in healthy])
                   for split in ("dev", "test") if split in summary and healthy}
        summary["without_diverged"] = without
        said = ", ".join(f"{split} acc {in_words(without[split])}" for split in without)
        logs.say(f"diverged :: {', '.join(diverged)}, {len(diverged)} of {len(results)} {unit}"
                 + (f"; without {'it' if len(diverged) == 1 else 'them'}: {said}" if said else ""))
    if unit == "folds":
        summary["dev_epoch"] = "the best of each fold, chosen on that same fold"
        last = [result["last_dev_acc"] if "last_dev_acc" in result else
                one_run.last_dev_acc(RunFolder(folder.path / name)) for name, result in results.items()]
        known = [acc for acc in last if acc is not None]
        if len(known) == len(last):
            summary["dev_last_epoch"] = mean_and_deviation(known)
            logs.say(f"last epoch :: dev acc {in_words(summary['dev_last_epoch'])} over {len(results)} folds")
        stopped = any(result["stopped"] == "patience" for result in results.values())
        logs.notice("dev acc is that of each fold's best epoch, chosen on that same fold, and so a little too high; "
                    "the last epoch's is not chosen" + (", but --patience stopped on the fold too (--patience 0: all "
                                                    "epochs)" if stopped else ""))
    for split in ("dev", "test"):
        if split in summary:
            logs.say(f"{split} acc :: {in_words(summary[split])} over {len(results)} {unit}")
    return summary


def mean_and_deviation(values: list[float]) -> dict[str, Any]:
    """The accuracies with their mean and their (sample) standard deviation, which one value alone does not have."""
    return {"acc": values, "mean": statistics.mean(values),
            "std": statistics.stdev(values) if len(values) > 1 else None}


def in_words(found: dict[str, Any]) -> str:
    """0.412 +- 0.030, of `mean_and_deviation`."""
    return f"{found['mean']:.3f}" + ("" if found["std"] is None else f" +- {found['std']:.3f}")
