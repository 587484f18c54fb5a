"""How long a run will take, found out before it is paid for; and how many of its steps fit into --max_minutes."""

import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import lora
from commands import job as jobs
from commands.classification import ClassificationTask
from config import InputError, RunConfig, duration
from dataset import Split, length_order
from formats import files
from training import clock, gradients, logs
from training import state as states
from training.checks import untouched
from training.clock import Times
from training.course import Course, course_of
from training.device import Device
from training.task import Job
from training.trainer import Loop

LONG = 600.0  # seconds: of a run above it, a person wants to know before
MARGIN = 0.1  # of --max_minutes: an estimate is not exact
ENOUGH = 10.0  # seconds: what takes that long is not timed twice
SAMPLE_BYTES = 32 << 20  # written to see how fast the disk is


@dataclass(frozen=True)
class Measured:
    """`times` of a run, and the bytes of the optimizer's state."""

    times: Times
    state_bytes: int


# --------------------------------------------------------------------------- is it worth the seconds?


def may_be_long(job: Job[ClassificationTask], config: RunConfig, n_runs: int = 1) -> bool:
    """Could these runs take longer than LONG on a slow computer: 1e9 operations a second, 20 ms a step besides, 1e8
    bytes a second to the disk? Of small ones nothing is measured."""
    course, n = course_of(config, job.steps_per_epoch), sum(p.numel() for p in job.model.parameters())
    learned = int(job.task.lengths.sum()) * course.steps / job.steps_per_epoch
    scored = int(job.task.dev.lengths.sum() + job.task.sample.lengths.sum()) * course.n_evaluations()
    seconds = n * (6 * learned + 2 * scored) / 1e9 + 0.02 * course.steps + 16 * n * course.n_evaluations() / 1e8
    return n_runs * seconds > LONG


# --------------------------------------------------------------------------- measuring


def measure(job: Job[ClassificationTask], config: RunConfig, device: Device, splits: dict[str, Split], place: Path,
            with_longest: bool = False) -> Measured:
    """Seconds of a step and of an evaluation, from real ones; everything is left as it was. `place`: a folder on the
    disk that the run writes to. Where they take long, parts of them are timed, and scaled with the tokens.
    `with_longest`: train on the longest batch too, to see how much memory that needs."""
    task, loop = job.task, Loop(job, replace(config, ema=0.0), device)
    windows = task.order(0)
    by_length = sorted(windows, key=lambda rows: int(task.lengths[rows].max()))
    mean_tokens = sum(_padded(rows, task.lengths) for rows in windows) / len(windows)
    typical = by_length[len(windows) // 2]
    typical = typical[: loop.rows_per_pass(typical)]
    batches = list(length_order(task.dev.lengths))
    scored = batches[len(batches) // 2]
    used = {"train": np.union1d(typical, by_length[-1]) if with_longest else typical, "dev": scored}

    def train(rows: np.ndarray) -> None:
        job.optimizer.zero_grad(set_to_none=True)
        loop.accumulate(rows)
        _wait(device)

    with untouched(job.model, job.optimizer), task.keeping_only(used):
        job.model.train()
        if with_longest:
            train(by_length[-1])
        step = _seconds_per_token(train, typical, task.lengths) * mean_tokens
        updates = []
        for _ in range(2):  # the first one makes the optimizer's state
            began = time.perf_counter()
            gradients.clip_(loop.parameters, config.max_grad_norm, config.max_grad_value)
            job.optimizer.step()
            _wait(device)
            updates.append(time.perf_counter() - began)
        step += min(updates)
        kept = [value for moments in job.optimizer.state.values() for value in moments.values()
                if isinstance(value, Tensor)]
        state_bytes = sum(value.numel() * value.element_size() for value in kept)
        token = _seconds_per_token(lambda rows: task.predict(task.dev, "estimate", rows), scored, task.dev.lengths)
        first = 0.0  # of a token in a frozen first part that is computed once
        if task.keeps:
            first = _seconds_per_token(lambda rows: task.first_part("dev", rows=rows), scored, task.dev.lengths)
    best = sum(t.numel() for t in lora.without_base(job.model.state_dict()).values())
    stored = best * (2 if config.save_dtype == "bfloat16" else 4)
    trained = sum(t.numel() * t.element_size() for t in states.trained(job.model).values())
    state = trained * (2 if config.ema else 1) + state_bytes
    disk = _seconds_per_byte(place, min(int(stored + state), SAMPLE_BYTES))
    tokens = {name: _tokens_of(split) for name, split in {**splits, "train": task.sample}.items()}
    if config.save_every:
        step += disk * state / config.save_every
    evaluation = token * (tokens["train"] + tokens["dev"]) + disk * (stored + state)
    once = 1.0 + disk * (state + stored) + token * tokens["dev"] + (token + first) * tokens.get("test", 0)
    once += first * (_tokens_of(task.train) + tokens["dev"])
    checks = 100 * config.overfit_batch + 12 * config.check_gradients + 10 * config.auto_batch
    return Measured(Times(step, evaluation, once + checks * step), state_bytes)


def _padded(rows: np.ndarray, lengths: np.ndarray) -> int:
    return len(rows) * int(lengths[rows].max())


def _tokens_of(split: Split) -> int:
    """Padded tokens in the batches in which a split is evaluated."""
    return sum(_padded(rows, split.lengths) for rows in length_order(split.lengths))


def _seconds_per_token(run: Callable[[np.ndarray], object], rows: np.ndarray, lengths: np.ndarray) -> float:
    """Of a pass as large as the run's own: a smaller one would say too much, since each pass costs something that does
    not grow with its tokens (under autocast, every weight is cast). The first one warms up; where it takes longer than
    ENOUGH, it is not done again."""
    seconds = math.inf
    for _ in range(2):
        began = time.perf_counter()
        run(rows)
        seconds = min(seconds, time.perf_counter() - began)
        if seconds > ENOUGH:
            break
    return seconds / _padded(rows, lengths)


def _seconds_per_byte(place: Path, n: int) -> float:
    """To write a file, flushed to the disk, and to read it once more for its checksum."""
    with tempfile.TemporaryDirectory(dir=place, prefix=".", suffix=".tmp") as folder:
        path, data = Path(folder) / "file", bytes(n)
        began = time.perf_counter()
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        files.sha256(path)
        return (time.perf_counter() - began) / n


def _wait(device: Device) -> None:
    if device.is_cuda:
        torch.cuda.synchronize(device.where)


# --------------------------------------------------------------------------- what is said


def long_run(times: Times, course: Course, done: int, config: RunConfig, n_runs: int, n_layers: int, tokens: float,
             device: Device) -> str:
    """The line before a run that takes longer than LONG, with the options that make it shorter; "" for a shorter one.
    `n_runs`: one after another, of which the first has `done` steps already; `tokens`: in a sentence of typical
    length."""
    whole = times.of(course)
    seconds = times.of(course, done) + (n_runs - 1) * whole
    if seconds <= LONG:
        return ""
    epochs = course.steps / course.steps_per_epoch
    shorter = []
    if device.is_cpu and torch.cuda.is_available():
        shorter.append("--use_gpu")
    if n_layers > 4:
        shorter.append("--n_layers 4")
    if tokens > 192:
        shorter.append("--max_sentence_len 128")
    if epochs > 1:
        shorter.append(f"--epochs {1 if epochs <= 3 else 3}")
    if times.evaluation * course.n_evaluations() > whole / 3:
        shorter += [words for words, helps in (("--eval_every 1", config.eval_every < 1),
                                               ("--train_eval sample", config.train_eval == "full")) if helps]
    shorter.append("--max_minutes 10")
    of_what = f"{epochs:.3g} epochs of {duration(whole / epochs)}, " if epochs > 1 else ""
    who = "these runs" if n_runs > 1 else "this run" if not done else "what is left of this run"
    of_what = f"{n_runs} of {duration(whole)}, " if n_runs > 1 else of_what
    *others, last = shorter
    options = f"{', '.join(others)} or {last} make" if others else f"{last} makes"
    return f"{who} will take about {duration(seconds)} ({of_what}evaluation counted); {options} it shorter"


def fitted(config: RunConfig, job: Job[ClassificationTask], times: Times, deadline: float
           ) -> tuple[RunConfig, Job[ClassificationTask]]:
    """The options and the job of a run that is over by then: with --max_steps, and the schedule laid over them, where
    not all of the steps fit. Raises InputError where not even one does."""
    course, now = course_of(config, job.steps_per_epoch), time.monotonic()
    twice = times.evaluation + times.once  # behind the last step nothing can be left out: it may take twice as long
    n = clock.steps_that_fit(times, course, (1 - MARGIN) * (deadline - now) - twice)
    if n == 0:
        shortest = (times.of(Course(1, job.steps_per_epoch, config.eval_every)) + twice) / (1 - MARGIN)
        least = now - clock.command_began + clock.START_AND_END + shortest
        raise InputError(f"--max_minutes {config.max_minutes:g}: not even one step and one evaluation fit into it; it "
                         f"takes {math.ceil(least / 6) / 10:g} at least (before the first step "
                         f"{duration(now - clock.command_began)}, a step {times.step:.2g} s, an evaluation "
                         f"{times.evaluation:.2g} s, the end {times.once:.2g} s)")
    if n == course.steps:
        return config, job
    logs.notice(f"--max_minutes {config.max_minutes:g}: {n} of {course.steps} steps fit "
                f"({n / job.steps_per_epoch:.1f} of {course.steps / job.steps_per_epoch:.3g} epochs); the schedule is "
                "laid over them")
    config = replace(config, max_steps=n)
    return config, replace(job, schedule=jobs.schedule_of(config, job.steps_per_epoch))
