"""A trial of a search: the run that one gets with the same options typed by hand, in an ordinary run folder."""

import gc
import math
import shlex
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from commands import inputs as run_inputs
from commands import one_run
from commands import space as spaces
from commands.inputs import Inputs
from config import InputError, RunConfig, options
from formats.memory import is_out_of_memory
from training import logs, metrics, run_folder, state
from training.device import Device
from training.run_folder import RunFolder
from training.trainer import MORE_IS_BETTER

LOG = "trial.log"  # what the run says
READ_ANEW = ("max_sentence_len", "pretrained_model_path", "tokenizer")  # with another one, inputs differ


@dataclass(frozen=True)
class Ground:
    """What all trials share. `config`: the options of a trial without those of the space; `inputs`: without the test
    split, which no trial sees; `baselines`: of those inputs, computed once."""

    config: RunConfig
    inputs: Inputs
    device: Device
    objective: str
    baselines: dict[str, metrics.Baseline] = field(default_factory=dict)

    @property
    def rises(self) -> bool:
        """Is a larger number better?"""
        return self.objective in MORE_IS_BETTER

    def best(self, values: list[float]) -> float:
        """The best of an objective's values; NaN where none is a number."""
        numbers = [value for value in values if not math.isnan(value)]
        return (max if self.rises else min)(numbers, default=math.nan)


@dataclass(frozen=True)
class Outcome:
    """How a trial has ended: complete, pruned or failed, with a `reason`; its `score`, and how many evaluations it had.
    `error`: what it failed with."""

    state: str
    reason: str
    score: float | None
    n_evaluations: int
    error: Exception | None = None


def base_config(config: RunConfig, objective: str) -> RunConfig:
    """The options of a trial, as if they had been typed, from those of the search: without its own, and without what
    no trial has, which is the test file and a folder."""
    own = {f.name: f.default for f in options()
           if f.metadata["only"] == ("search",) or "search" not in f.metadata["only"]}
    changed: dict[str, Any] = {**own, "option": "finetune", "test": None, "seeds": None, "output_dir": None}
    given = config.given - changed.keys() | {"option", "seed"}
    if "monitor" not in given and config.monitor != objective:
        changed["monitor"] = objective
        given |= {"monitor"}
    if "plots" not in given:
        changed["plots"] = "off"
        given |= {"plots"}
    return replace(config, **changed, given=frozenset(given))


def without_test(inputs: Inputs) -> Inputs:
    """The same inputs, where nobody can look at the test split."""
    splits = {name: split for name, split in inputs.splits.items() if name != "test"}
    return replace(inputs, splits=splits, files=replace(inputs.files, test=None))


def command(config: RunConfig) -> str:
    """The command of a run."""
    words = ["python", "run_llama.py", "--option", "finetune"]
    for name in sorted(config.given - {"option"}):
        words += run_folder.option_words(name, getattr(config, name))
    return shlex.join(words)


def scores_of(folder: Path, objective: str) -> list[float]:
    """The objective at each evaluation of the run in a folder."""
    found = [line.get(objective) for line in logs.read_log(RunFolder(folder).epochs)]
    return [float(value) for value in found if isinstance(value, int | float)]


# --------------------------------------------------------------------------- a run in its folder


def free_memory() -> None:
    """Free what earlier runs have left: their models, optimizers and loops hold each other, and would pile up until
    Python looks for such circles by itself."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_once(config: RunConfig, ground: Ground, on_evaluation: Callable[[int, logs.EpochRecord], str] | None = None,
             ) -> dict[str, Any]:
    """The result of the run that these options ask for, in the folder that they name: read where it is finished, else
    gone on with from its own saved state, or begun. Raises InputError where another run is there."""
    free_memory()
    folder = RunFolder(config.output_dir or "")
    folder.path.mkdir(parents=True, exist_ok=True)
    with logs.into(folder.path / LOG):
        if folder.has_run():
            saved = run_folder.options_of(state.read_description(folder))
            other = [f"--{name} is {saved[name]} there, {getattr(config, name)} here" for name in sorted(saved)
                     if name != "output_dir" and saved[name] != getattr(config, name)]
            if other:
                raise InputError(f"{folder}: this run is not one of this search: {'; '.join(other)}; move the folder "
                                 "away")
            if folder.is_finished():
                return folder.read_result()
            config = replace(config, resume=str(folder))
        inputs, baselines = ground.inputs, ground.baselines
        if any(getattr(config, name) != getattr(ground.config, name) for name in READ_ANEW):
            inputs, baselines = without_test(run_inputs.load(config, need=("train", "dev"))), {}
        if config.train_limit and any(getattr(config, n) != getattr(ground.config, n) for n in ("train_limit", "seed")):
            baselines = {}  # other sentences
        inputs = run_inputs.limit_train(config, inputs)
        return one_run.train(config, inputs, ground.device, n_runs=0, known=baselines or None,
                             on_evaluation=on_evaluation)


# --------------------------------------------------------------------------- a trial


def run_trial(point: dict[str, Any], folder: Path, seeds: list[int], n_evaluations: int, ground: Ground,
              report: Callable[[float, int], bool], deadline: float | None) -> Outcome:
    """Train at a point of the space with each seed, one after another; the score is the mean of their best evaluations.

    `report(value, n)` is told of each evaluation, n-th of `n_evaluations` for each seed, and says whether the trial is
    to end there; of the second seed on, the value is the mean with what the seeds before it had. `deadline`: on
    time.monotonic(). Raises OSError: where no file can be written, the next trial cannot either.
    """
    done: list[float] = []
    n_done, reason = 0, ""
    failure: Exception | None = None
    for i, seed in enumerate(seeds):
        def on_evaluation(n: int, record: logs.EpochRecord, i: int = i) -> str:
            value = logs.columns(record)[ground.objective]
            is_behind = report(statistics.mean([*done, value]), i * n_evaluations + n)
            if deadline is not None and time.monotonic() > deadline:
                return "timeout"
            return "pruned" if is_behind else ""

        config = replace(spaces.configured(ground.config, point), seed=seed,
                         output_dir=str(folder / f"seed-{seed}" if len(seeds) > 1 else folder))
        try:
            result = run_once(config, ground, on_evaluation)
        except Exception as error:
            if isinstance(error, OSError) and not is_out_of_memory(error):
                raise
            failure = error
        if failure:
            break
        values = scores_of(Path(config.output_dir or ""), ground.objective)
        n_done += len(values)
        done.append(ground.best(values))
        reason = result["stopped"]
        if reason in ("pruned", "timeout", "diverged"):
            break
        if i + 1 < len(seeds) and deadline is not None and time.monotonic() > deadline:
            reason = "timeout"
            break
    if failure:
        return Outcome("failed", reason_of(failure), None, n_done, failure)
    score = statistics.mean(done)
    if reason == "diverged" or math.isnan(score):
        return Outcome("failed", "diverged" if reason == "diverged" else "no evaluation gave a number", None, n_done)
    return Outcome("pruned" if reason in ("pruned", "timeout") else "complete", reason, score, n_done)


def reason_of(error: Exception) -> str:
    """Why a trial has failed, on one line."""
    said = str(error).strip().partition("\n")[0][:300]
    if is_out_of_memory(error):
        return f"out of memory: {said or type(error).__name__}"
    return said if isinstance(error, InputError) else f"{type(error).__name__}: {said}"
