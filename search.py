"""Before a run is paid for: its plan, the learning-rate range test, and the proof that it can be resumed.

All of them go through the one training loop (`trainer.Loop`).
"""

import csv
import json
import math
import os
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from checkpoint import write_atomically, write_json
from config import RunConfig, counted, options
from dataset import sha256
from trainer import SIGNALS, Device, Loop, peak_memory, predict, stoppable, untouched, warn


def _axes(title: str, x: str, y: str):
    """A figure of matplotlib that needs no screen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def _draw(figure, path: Path) -> None:
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"), follow=False)


# --------------------------------------------------------------------------- the plan


def rates(run: SimpleNamespace, n_steps: int) -> list[float]:
    """The learning rate of each step of the run, the largest of the parameter groups'."""
    top = max(group["lr"] for group in run.optimizer.param_groups)
    return [top * run.schedule(i, []) for i in range(n_steps)]


def plan(run: SimpleNamespace, config: RunConfig, device: Device, folder: Path, n_train: int,
         idle: list[str], warmup: int, n_runs: int = 1) -> None:
    """Print what a run would do, time two of its steps, and draw its schedule to plan.png; nothing is trained.

    `idle`: the options that were given and have no effect here. `n_runs`: how many such runs are asked for.
    """
    steps = run.steps_an_epoch * config.epochs
    lr = rates(run, steps)
    trainable = [p for p in run.model.parameters() if p.requires_grad]
    n, bytes_each = sum(p.numel() for p in trainable), 4
    moments = {"adamw": 2, "sgd": 1 if config.momentum else 0, "lion": 1, "adafactor": 0}[config.optimizer]
    loop = Loop(run.task, run.optimizer, run.schedule, config, device, folder, keep_states=False)
    seconds = []
    with untouched(run.model, run.optimizer):
        run.model.train()
        windows = run.task.order(0)
        longest = max(windows, key=lambda rows: len(rows) * loop.lengths[rows].max())
        for rows in [longest, *windows[:2]]:  # the longest warms up, and shows how much memory is needed
            begin = time.perf_counter()
            loop.accumulate(rows)
            run.optimizer.step()
            seconds.append(time.perf_counter() - begin)
    step_seconds = sum(seconds[1:]) / len(seconds[1:])
    memory = n * bytes_each * (2 + moments + (1 if config.ema else 0))
    print(f"plan :: {counted(n_train, 'sentence')}, {config.batch_size * config.grad_accum} a step "
          f"({config.batch_size} x {config.grad_accum}), {counted(run.steps_an_epoch, 'step')} an epoch, {steps} in "
          "all")
    print(f"plan :: {config.scheduler}, warmup {counted(warmup, 'step')}, lr {lr[0]:.2e} at the start, {max(lr):.2e} "
          f"at the peak, {lr[-1]:.2e} at the end")
    print(f"plan :: {n / 1e6:.1f}M trainable parameters; weights, gradients and {config.optimizer}'s state take "
          f"{memory / 2**30:.2f} GiB; with the longest batch, {peak_memory(device) / 2**30:.2f} GiB were in use")
    print(f"plan :: about {step_seconds:.2f} s a step on {device}: {step_seconds * run.steps_an_epoch / 60:.1f} min an "
          f"epoch, {step_seconds * steps / 60:.1f} min in all, evaluation not counted")
    if n_runs > 1:
        print(f"plan :: {n_runs} such runs, one after another: {n_runs * step_seconds * steps / 60:.1f} min")
    if config.scheduler == "plateau":
        print(f"plan :: plateau: the rate falls when {config.monitor} gets no better, which nobody knows beforehand; "
              "the lr above and the picture are those of a run that always does")
    for line in idle:
        print(f"plan :: no effect: {line}")
    figure, axes = _axes(f"{config.scheduler}, warmup {warmup} of {steps} steps", "optimizer step", "learning rate")
    axes.plot(lr)
    _draw(figure, folder / "plan.png")
    print(f"plan :: {folder / 'plan.png'}", flush=True)


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


def range_test(run: SimpleNamespace, config: RunConfig, device: Device) -> list[tuple[float, float]]:
    """(rate, loss) of each step while the rate grows from lr_min to lr_max (Smith 2017, arXiv 1506.01186, section 3.3):

        lr_i = lr_min (lr_max / lr_min)^(i / (lr_steps - 1))

    The rate is that of --lr: what --head_lr, --layerwise_lr_decay and --lr_scaling make of it grows in proportion. Ends
    early when the smoothed loss has exploded or is not finite. Weights, optimizer, random states and mode are
    afterwards as they were.
    """
    points: list[tuple[float, float]] = []

    def rate(step: int) -> float:
        return config.lr_min * (config.lr_max / config.lr_min) ** (step / (config.lr_steps - 1))

    def after_step(step: int, _: float, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        points.append((rate(step - 1), loss))
        so_far = smooth([loss for _, loss in points])
        return step >= config.lr_steps or (step > 10 and so_far[-1] > EXPLODED * min(so_far))

    one = replace(config, epochs=math.ceil(config.lr_steps / run.steps_an_epoch), guards="off", patience=0,
                  eval_every=1.0, ema=0.0)
    task = replace(run.task, evaluate=lambda: {"train_acc": 0.0, "dev_acc": 0.0, "dev_loss": 0.0, config.monitor: 0.0},
                   save_best=lambda: None)
    with untouched(run.model, run.optimizer), tempfile.TemporaryDirectory() as folder:
        loop = Loop(task, run.optimizer, lambda step, history: rate(step) / config.lr, one, device, Path(folder),
                    after_step, keep_states=False, quiet=True)
        loop.run()
    return points


def suggestion(points: list[tuple[float, float]]) -> tuple[float, float, float]:
    """(low, steepest, high): where the smoothed loss falls fastest per factor of the rate, and the range around it,
    from a tenth of that rate to a third of the one with the lowest loss."""
    rates_, losses = [lr for lr, _ in points], smooth([loss for _, loss in points])
    lowest = max(1, int(np.argmin(losses)))
    slope = np.gradient(losses, np.log(rates_))
    steepest = rates_[int(np.argmin(slope[: lowest + 1]))]
    high = max(rates_[lowest] / 3, steepest)
    return steepest / 10, steepest, high


def lr_find(make_run: Callable[[RunConfig], SimpleNamespace], config: RunConfig, device: Device, folder: Path) -> None:
    """The range test, repeated over --lr_repeats seeds; writes lr_find.csv, lr_find.png and result.json, prints the
    range and the command that would use it. --confirm trains briefly at rates across it, and the command has the rate
    that is the best one of them, if that can be told from chance.

    Raises ValueError when the loss was finite for too few steps to say anything.
    """
    tests, found = [], []
    for i in range(config.lr_repeats):
        points = range_test(make_run(replace(config, seed=config.seed + i)), config, device)
        if len(points) < 10:
            raise ValueError(f"--lr_min {config.lr_min:g}: the loss was finite for {counted(len(points), 'step')} "
                             "only; begin lower")
        tests.append(points)
        found.append(suggestion(points))
        print(f"range test {i + 1} of {config.lr_repeats}: {len(points)} steps, steepest at {found[-1][1]:.1e}",
              flush=True)
        smoothed = smooth([loss for _, loss in points])
        if min(smoothed) == smoothed[0]:
            warn("the loss never fell: this says nothing about a good rate; try others, or more --lr_steps")
    low, best, high = (math.exp(float(np.median(np.log([f[k] for f in found])))) for k in range(3))
    result: dict[str, Any] = {"low": low, "steepest": best, "high": high, "each": found}
    spread = f"{min(f[1] for f in found):.1e} to {max(f[1] for f in found):.1e} over {config.lr_repeats} seeds"
    print(f"lr range :: {low:.1e} to {high:.1e}, steepest {best:.1e}" + (f" ({spread})" if len(found) > 1 else ""))
    choice = best
    if config.confirm:
        confirmed = confirm(make_run, config, device, low, high)
        result |= {"confirmed": confirmed.rates, "decided": confirmed.lr, "undecided": confirmed.doubt}
        choice = confirmed.lr or best
        if confirmed.doubt:
            print(f"confirm :: undecided: {confirmed.doubt}. The command below has the range test's steepest rate, "
                  "which nothing confirms", flush=True)
        else:
            print(f"confirm :: decided: lr {choice:.1e} has the lowest dev loss with each of {CONFIRM_SEEDS} seeds, by "
                  f"more than chance{_at_the_edge(confirmed)}", flush=True)
    write_atomically(folder / "lr_find.csv", lambda path: _write_tests(path, config.seed, tests), follow=False)
    figure, axes = _axes("learning-rate range test", "learning rate", "training loss")
    for points in tests:
        losses = [loss for _, loss in points]
        axes.plot([lr for lr, _ in points], losses, alpha=0.2, color="tab:blue")
        axes.plot([lr for lr, _ in points], smooth(losses), color="tab:blue")
    axes.axvspan(low, high, color="tab:green", alpha=0.15, label=f"range {low:.1e} to {high:.1e}")
    axes.axvline(best, color="tab:red", label=f"steepest {best:.1e}")
    axes.set_xscale("log")
    axes.set_ylim(0, min(axes.get_ylim()[1], 2 * max(points[0][1] for points in tests)))
    axes.legend()
    _draw(figure, folder / "lr_find.png")
    write_json(folder / "result.json", result)
    print(f"written :: {folder / 'lr_find.csv'}, {folder / 'lr_find.png'}")
    chosen = at_rate(config, choice)
    words = {"lr": f"{chosen.lr:.1e}", **({"head_lr": f"{chosen.head_lr:.1e}"} if chosen.head_lr else {})}
    print(f"use it :: {command(config, **words)}", flush=True)


def _write_tests(path: Path, seed: int, tests: list[list[tuple[float, float]]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["seed", "lr", "loss", "smoothed"])
        for i, points in enumerate(tests):
            smoothed = smooth([loss for _, loss in points])
            rows.writerows([seed + i, lr, loss, mean] for (lr, loss), mean in zip(points, smoothed, strict=True))


def at_rate(config: RunConfig, lr: float) -> RunConfig:
    """The same options with another --lr, and --head_lr in the proportion that it had."""
    return replace(config, lr=lr, head_lr=config.head_lr and config.head_lr * lr / config.lr)


CONFIRM_SEEDS = 3
CONFIRM_RATES = 5
CHANCE = 0.05  # how often --confirm may take chance for a difference


@dataclass(frozen=True)
class Confirmed:
    """What --confirm found: the best rate, or None and why not; every rate's {lr, dev_loss, dev_acc}, the means over
    the seeds, the lowest dev loss first. Where a training diverged the two are None, and come last."""

    lr: float | None
    doubt: str
    rates: list[dict[str, Any]]


def confirm(make_run: Callable[[RunConfig], SimpleNamespace], config: RunConfig, device: Device, low: float,
            high: float) -> Confirmed:
    """Which of CONFIRM_RATES rates is the best, from a tenth of `low`, where fine-tuning may want it, to `high`?

    Each trains briefly, once for each of CONFIRM_SEEDS seeds. A rate is the best only if it has the lowest dev loss
    with every seed (of five equal ones, the same one wins three times by chance in 1 of 25 cases), and each time by
    more than chance on the dev sentences (see `doubt`). It ends with the first seed that leaves a doubt.
    """
    lrs = [float(lr) for lr in np.geomspace(low / 10, high, CONFIRM_RATES)]
    outputs: list[list[np.ndarray | None]] = []
    first, reason = -1, ""
    for seed in range(config.seed, config.seed + CONFIRM_SEEDS):
        outputs.append([])
        for lr in lrs:
            log_probs, labels, steps = short_run(make_run, replace(at_rate(config, lr), seed=seed), device)
            outputs[-1].append(log_probs)
            said = "it diverged" if log_probs is None else (
                f"dev loss {_losses(log_probs, labels).mean():.3f}, dev acc "
                f"{(log_probs.argmax(1) == labels).mean():.3f} after {steps} steps")
            print(f"confirm :: lr {lr:.1e}, seed {seed}: {said}", flush=True)
        best, reason = doubt(lrs, outputs[-1], labels)
        if not reason and seed > config.seed and best != first:
            reason = (f"with seed {seed - 1} lr {lrs[first]:.1e} is best, with seed {seed} lr {lrs[best]:.1e}; more "
                      "--lr_steps may decide between them")
        if reason:
            break
        first = best
    rates_ = []
    for lr, each in zip(lrs, zip(*outputs, strict=True), strict=True):
        diverged = any(log_probs is None for log_probs in each)
        rates_.append({"lr": lr,
                       "dev_loss": None if diverged else float(np.mean([_losses(o, labels) for o in each])),
                       "dev_acc": None if diverged else float(np.mean([o.argmax(1) == labels for o in each]))})
    rates_.sort(key=lambda rate: math.inf if rate["dev_loss"] is None else rate["dev_loss"])
    return Confirmed(None if reason else lrs[first], reason, rates_)


def short_run(make_run: Callable[[RunConfig], SimpleNamespace], config: RunConfig,
              device: Device) -> tuple[np.ndarray | None, np.ndarray, int]:
    """Train --lr_steps steps, but none more than the run itself has, with the run's own schedule squeezed into them.

    Returns the log-probabilities of the dev sentences (N, C), or None where the training diverged; the labels (N,);
    the number of steps.
    """
    run, found = make_run(config), []
    total = run.steps_an_epoch * config.epochs
    windows = [rows for epoch in range(config.epochs) if epoch * run.steps_an_epoch < config.lr_steps
               for rows in run.task.order(epoch)][: config.lr_steps]

    def evaluate() -> dict[str, float]:
        found.append(predict(run.model, run.dev, run.pad_id, device, "dev").double().numpy())
        return {"train_acc": 0.0, "dev_acc": 0.0, "dev_loss": 0.0, config.monitor: 0.0}

    task = replace(run.task, order=lambda epoch: windows, evaluate=evaluate)
    short = replace(config, epochs=1, patience=0, eval_every=1.0)
    with tempfile.TemporaryDirectory() as folder:
        Loop(task, run.optimizer, lambda step, history: run.schedule(step * total // len(windows), history), short,
             device, Path(folder), keep_states=False, quiet=True).run()
    log_probs = found[-1] if found and np.isfinite(found[-1]).all() else None
    return log_probs, run.dev.labels, len(windows)


def doubt(lrs: list[float], outputs: list[np.ndarray | None], labels: np.ndarray) -> tuple[int, str]:
    """(index of the rate with the lowest dev loss, what speaks against calling it the best; "" when nothing does).

    `outputs`: for each rate the log-probabilities (N, C), or None. Two tests on the sentences, both paired and
    one-sided, each at a level of CHANCE divided by how many there could have been (Bonferroni).

    Does it know the sentences at all? Its loss against the one to expect if the same labels were dealt out among them
    at random: that is no better for a model which has only learned how frequent the labels are. And is its loss lower
    than that of each other rate?
    """
    there = [i for i, log_probs in enumerate(outputs) if log_probs is not None]
    if not there:
        return -1, "the training diverged at every rate; a lower --lr_min and --lr_max may decide"
    losses = {i: _losses(outputs[i], labels) for i in there}
    best = min(there, key=lambda i: losses[i].mean())
    frequencies = np.bincount(labels, minlength=outputs[best].shape[1]) / len(labels)
    p = _p_value(-outputs[best] @ frequencies - losses[best])
    if p > CHANCE / len(lrs):
        return best, (f"no rate has learned anything yet that {len(labels)} dev sentences can tell from chance (lr "
                      f"{lrs[best]:.1e}: p = {p:.2g}); more --lr_steps, a wider range (--lr_min, --lr_max) or more dev "
                      "sentences may decide")
    p, other = max(((_p_value(losses[i] - losses[best]), i) for i in there if i != best), default=(0.0, best))
    if p > CHANCE / (len(lrs) - 1):
        return best, (f"{len(labels)} dev sentences do not tell lr {lrs[best]:.1e} from lr {lrs[other]:.1e} (dev loss "
                      f"{losses[best].mean():.4f} and {losses[other].mean():.4f}: p = {p:.2g}); more --lr_steps or "
                      "more dev sentences may decide")
    return best, ""


def _losses(log_probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Each sentence's loss (N,)."""
    return -log_probs[np.arange(len(labels)), labels]


def _p_value(gains: np.ndarray) -> float:
    """How likely a mean gain this far above 0 is where there is none in truth: Student's paired t-test, one-sided."""
    from scipy.stats import ttest_1samp

    if len(gains) < 2 or np.ptp(gains) == 0:
        return 1.0
    return float(ttest_1samp(gains, 0.0, alternative="greater").pvalue)


def _at_the_edge(confirmed: Confirmed) -> str:
    tried = [rate["lr"] for rate in confirmed.rates]
    sides = {min(tried): "lowest", max(tried): "highest"}
    return f"; it is the {sides[confirmed.lr]} that was tried" if confirmed.lr in sides else ""


def command(config: RunConfig, **changed: Any) -> str:
    """The command line that fine-tunes with the options that were given, and these changed."""
    skip = {"option", "lr", "lr_min", "lr_max", "lr_steps", "lr_repeats", "confirm", "output_dir", "overwrite"}
    words = ["python run_llama.py --option finetune"]
    for f in options():
        value = changed.get(f.name, getattr(config, f.name) if f.name in config.given - skip else None)
        if value is not None and value is not False:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            if not re.fullmatch(r"[\w./,:+-]+", text):  # the shell would read something into it
                text = subprocess.list2cmdline([text]) if os.name == "nt" else shlex.quote(text)
            words.append(f"--{f.name}" + ("" if value is True else f" {text}"))
    return " ".join(words)


# --------------------------------------------------------------------------- the proof of the resume


def verify_resume(config: RunConfig, folder: Path, program: Path, kills: int = 3) -> int:
    """Run once straight, once killed after `kills` random steps and resumed; compare the best weights, the last state
    (weights, optimizer, random numbers), and steps.jsonl.

    Returns 0 when they are the same to the bit, 1 when not. A signal ends this program and the one that it runs.
    Raises ValueError when the run fails by itself, and when it cannot be killed.
    """
    given = {name: getattr(config, name) for name in config.given - {"option", "output_dir", "overwrite", "resume"}}
    words = []
    for name, value in given.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words += [] if value is False else [f"--{name}"] + ([] if value is True else [text])
    base = [sys.executable, str(program)]
    straight, stopped = folder / "straight", folder / "stopped"

    def steps_done() -> int:
        log = stopped / "steps.jsonl"
        return log.read_bytes().count(b"\n") if log.exists() else 0

    def run(*arguments: str, kill_after: float = math.inf) -> bool:
        """One process; killed once its steps.jsonl has `kill_after` lines. Was it killed, and did not end by itself?"""
        with tempfile.TemporaryFile() as errors:  # a pipe that nobody reads would fill up and stop the process
            process = subprocess.Popen([*base, *arguments], stdout=subprocess.DEVNULL, stderr=errors)
            try:
                while process.poll() is None and steps_done() < kill_after:
                    SIGNALS.check()
                    time.sleep(0.02)
            finally:
                is_killed = process.poll() is None
                process.kill()
                code = process.wait()
            errors.seek(0)
            said = errors.read().decode("utf-8", errors="replace").strip()
        if code in (0, 3):
            return False
        if not is_killed:
            raise ValueError(f"the run itself failed:\n{said.splitlines()[-1] if said else f'exit code {code}'}")
        return True

    with stoppable(None):
        print("verify :: the straight run", flush=True)
        run("--option", "finetune", *words, "--output_dir", str(straight))
        n_steps, killed_at = len(_steps(straight)), []
        moments = range(1, max(2, n_steps))
        for moment in sorted(random.Random(config.seed).sample(moments, min(kills, len(moments)))):
            start = ["--resume", str(stopped)] if killed_at else ["--option", "finetune", *words, "--output_dir",
                                                                  str(stopped)]
            # A resumed run has the lines of the one before, until it cuts them off: only a later one is its own.
            if not run(*start, kill_after=max(moment, steps_done() + 1)):
                warn(f"it was finished before it could be killed after step {moment}")
                break
            killed_at.append(steps_done())
            print(f"verify :: killed after step {killed_at[-1]} of {n_steps}", flush=True)
        if not (stopped / "result.json").exists():
            run("--resume", str(stopped))
    same = {"weights": sha256(straight / "best/model.safetensors") == sha256(stopped / "best/model.safetensors"),
            "state": _state(straight) == _state(stopped), "steps": _steps(straight) == _steps(stopped)}
    said = {name: "identical" if is_same else "DIFFERENT" for name, is_same in same.items()}
    print(f"verify :: best weights {said['weights']}, last state {said['state']}, steps.jsonl {said['steps']} "
          f"({n_steps} steps)", flush=True)
    write_json(folder / "result.json", {**{f"same_{name}": is_same for name, is_same in same.items()},
                                        "killed_at": killed_at})
    if not killed_at:
        raise ValueError("nothing is proved: the run was finished before it could be killed; give it more --epochs")
    return 0 if all(same.values()) else 1


def _state(run: Path) -> list[str]:
    """The checksum of the tensors in the state that a finished run leaves."""
    return [sha256(path) for path in (run / "last").glob("step-*/tensors.safetensors")]


def _steps(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's steps.jsonl, without their times."""
    lines = [json.loads(line) for line in (run / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
