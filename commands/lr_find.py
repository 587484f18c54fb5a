"""--option lr_find: the learning-rate range test, and with --confirm short trainings that decide between rates."""

import csv
import math
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from commands import defaults, inputs, plot, rate_pictures, results
from commands import job as jobs
from commands.classification import ClassificationTask
from commands.confirm import CONFIRM_SEEDS, at_rate, at_the_edge, confirm
from config import InputError, RunConfig, counted, options
from formats import files
from training import device as devices
from training import logs, run_folder, trainer
from training.checks import untouched
from training.device import Device
from training.run_folder import RESULT
from training.streams import without_readers
from training.task import Job

FEWEST = 10  # steps with a finite loss, for a range test to say anything
PICTURES = ("lr_find.csv", "lr_find.png")


@without_readers()
def run(config: RunConfig) -> int:
    results.check_outputs(config)
    found = inputs.limit_train(config, inputs.load(config, need=("train", "dev")))
    config = defaults.with_defaults(config, found)
    jobs.schedule_of(config, found.steps_per_epoch(config))  # --confirm and the command that is printed use it
    device = devices.choose_device(config)
    folder = run_folder.open_run(config)
    with folder.lock():
        new = [folder.path / name for name in PICTURES if not (folder.path / name).exists()]
        try:
            lr_find(lambda changed: jobs.build_job(changed, found, device), config, device, folder.path, found)
        except BaseException:
            for path in new:
                path.unlink(missing_ok=True)
            if [*folder.path.iterdir()] == [folder.lock_file]:
                with suppress(OSError):  # Windows removes no file that is open
                    folder.lock_file.unlink()
                    folder.path.rmdir()
            raise
    return 0


def lr_find(make_job: Callable[[RunConfig], Job[ClassificationTask]], config: RunConfig, device: Device,
            folder: Path, read: inputs.Inputs) -> None:
    """The range test, repeated over --lr_repeats seeds; writes lr_find.csv, lr_find.png and result.json, prints the
    range and the command that would use it. --confirm trains briefly at rates across it, and the command has the rate
    that is the best one of them, if that can be told from chance.

    Raises InputError when the loss was finite for too few steps to say anything.
    """
    tests, curves, found = [], [], []
    for i in range(config.lr_repeats):
        points = range_test(make_job(replace(config, seed=config.seed + i)), config, device)
        if len(points) < FEWEST:
            raise InputError(f"--lr_min {config.lr_min:g}: the loss was finite for {counted(len(points), 'step')} "
                             "only; begin lower")
        tests.append(points)
        curves.append(smooth([loss for _, loss in points]))
        found.append(suggestion(points))
        logs.say(f"range test {i + 1} of {config.lr_repeats}: {len(points)} steps, steepest at {found[-1][1]:.1e}")
        if min(curves[-1]) == curves[-1][0]:
            logs.warn("the loss never fell: this says nothing about a good rate; try others, or more --lr_steps")
    low, best, high = (math.exp(float(np.median(np.log([f[k] for f in found])))) for k in range(3))
    result: dict[str, Any] = {"low": low, "steepest": best, "high": high, "each": found}
    spread = f"{min(f[1] for f in found):.1e} to {max(f[1] for f in found):.1e} over {config.lr_repeats} seeds"
    logs.say(f"lr range :: {low:.1e} to {high:.1e}, steepest {best:.1e}" + (f" ({spread})" if len(found) > 1 else ""))
    if not 2 * config.lr_min < best < config.lr_max / 2:
        logs.warn(f"the loss fell fastest at an end of the rates that were tried, which says little: widen --lr_min "
                  f"{config.lr_min:g} and --lr_max {config.lr_max:g}, or take more --lr_steps")
    choice = best
    if config.confirm:
        confirmed = confirm(make_job, config, device, low, high)
        result |= {"confirmed": confirmed.rates, "decided": confirmed.lr, "undecided": confirmed.doubt}
        choice = confirmed.lr or best
        if confirmed.doubt:
            logs.say(f"confirm :: undecided: {confirmed.doubt}. The command below has the range test's steepest rate, "
                     "which nothing confirms")
        else:
            logs.say(f"confirm :: decided: lr {choice:.1e} has the lowest dev loss with each of {CONFIRM_SEEDS} seeds, "
                     f"by more than chance{at_the_edge(confirmed)}")
    files.write_atomically(folder / "lr_find.csv", lambda path: _write_tests(path, config.seed, tests, curves),
                           follow=False)
    with plot.drawing():
        plot.save(rate_pictures.range_test(tests, curves, low, high, choice, len(read.names),
                                            jobs.about(config, read)),
                  folder / "lr_find.png")
    files.write_json(folder / RESULT, result)
    logs.say(f"written :: {folder / 'lr_find.csv'}, {folder / 'lr_find.png'}")
    chosen = at_rate(config, choice)
    words = {"lr": f"{chosen.lr:.1e}", **({"head_lr": f"{chosen.head_lr:.1e}"} if chosen.head_lr else {})}
    label = "not confirmed" if result.get("undecided") else "use it"
    logs.say(f"{label} :: {command(config, **words)}")


def _write_tests(path: Path, seed: int, tests: list[list[tuple[float, float]]], curves: list[list[float]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["seed", "lr", "loss", "smoothed"])
        for i, (points, smoothed) in enumerate(zip(tests, curves, strict=True)):
            rows.writerows([seed + i, lr, loss, mean] for (lr, loss), mean in zip(points, smoothed, strict=True))


# --------------------------------------------------------------------------- the range test

SMOOTHING = 0.9
EXPLODED = 4.0  # a smoothed loss this many times the lowest one ends the test


def smooth(losses: list[float]) -> list[float]:
    """The exponential moving average with its bias corrected (Kingma and Ba 2015, section 3)."""
    mean, result = 0.0, []
    for i, loss in enumerate(losses):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        result.append(mean / (1 - SMOOTHING ** (i + 1)))
    return result


def range_test(job: Job, config: RunConfig, device: Device) -> list[tuple[float, float]]:
    """(rate, loss) of each step while the rate grows from lr_min to lr_max (Smith 2017, arXiv 1506.01186, section 3.3):

        lr_i = lr_min (lr_max / lr_min)^(i / (lr_steps - 1))

    The rate is that of --lr: what --head_lr, --layerwise_lr_decay and --lr_scaling make of it grows in proportion. Ends
    early when the smoothed loss has exploded or is not finite. Weights, optimizer, random states and mode are
    afterwards as they were.
    """
    points: list[tuple[float, float]] = []

    def rate(step: int) -> float:
        return config.lr_min * (config.lr_max / config.lr_min) ** (step / (config.lr_steps - 1))

    def has_exploded(step: int, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        points.append((rate(step - 1), loss))
        so_far = smooth([loss for _, loss in points])
        return step > 10 and so_far[-1] > EXPLODED * min(so_far)

    rising = replace(job, schedule=lambda step, history: rate(step) / config.lr)
    with untouched(job.model, job.optimizer):
        trainer.fit(rising, replace(config, guards="off", ema=0.0), device, max_steps=config.lr_steps, evaluate=False,
                    on_step=has_exploded)
    return points


def suggestion(points: list[tuple[float, float]]) -> tuple[float, float, float]:
    """(low, steepest, high): where the smoothed loss falls fastest per factor of the rate, and the range around it,
    from a tenth of that rate to a third of the one with the lowest loss."""
    rates, losses = [lr for lr, _ in points], smooth([loss for _, loss in points])
    lowest = max(1, int(np.argmin(losses)))
    slope = np.gradient(losses, np.log(rates))
    steepest = rates[int(np.argmin(slope[: lowest + 1]))]
    high = max(rates[lowest] / 3, steepest)
    return steepest / 10, steepest, high


def command(config: RunConfig, **changed: Any) -> str:
    """The command line that fine-tunes with the options that were given, and these changed."""
    skip = {"option", "lr", "lr_min", "lr_max", "lr_steps", "lr_repeats", "confirm", "output_dir", "overwrite"}
    words = ["python run_llama.py --option finetune"]
    for f in options():
        value = changed.get(f.name, getattr(config, f.name) if f.name in config.given - skip else None)
        for word in run_folder.option_words(f.name, value):
            if not re.fullmatch(r"[\w./,:+-]+", word):  # the shell would read something into it
                word = subprocess.list2cmdline([word]) if os.name == "nt" else shlex.quote(word)
            words.append(word)
    return " ".join(words)
