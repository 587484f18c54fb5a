"""Before a run is paid for: its plan, the learning-rate range test, and the proof that it can be resumed.

All of them go through the one training loop (`trainer.Loop`).
"""

import csv
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from checkpoint import write_json
from config import RunConfig, options
from dataset import sha256
from trainer import Device, Loop, untouched, warn


def _axes(title: str, x: str, y: str):
    """A figure of matplotlib that needs no screen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


# --------------------------------------------------------------------------- the plan


def rates(run: SimpleNamespace, n_steps: int) -> list[float]:
    """The learning rate of each step of the run, the largest of the parameter groups'."""
    top = max(group["lr"] for group in run.optimizer.param_groups)
    return [top * run.schedule(i, []) for i in range(n_steps)]


def plan(run: SimpleNamespace, config: RunConfig, device: Device, folder: Path, n_train: int,
         idle: list[str], warmup: int) -> None:
    """Print what a run would do, time two of its steps, and draw its schedule to plan.png; nothing is trained.

    `idle`: the options that were given and have no effect here.
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
        for rows in run.task.order(0)[:3]:
            begin = time.perf_counter()
            loop.accumulate(rows)
            run.optimizer.step()
            seconds.append(time.perf_counter() - begin)
    step_seconds = sum(seconds[1:] or seconds) / len(seconds[1:] or seconds)  # the first one warms up
    memory = n * bytes_each * (2 + moments + (1 if config.ema else 0))
    print(f"plan :: {n_train} sentences, {config.batch_size * config.grad_accum} a step "
          f"({config.batch_size} x {config.grad_accum}), {run.steps_an_epoch} steps an epoch, {steps} in all")
    print(f"plan :: {config.scheduler}, warmup {warmup} steps, lr {lr[0]:.2e} at the start, {max(lr):.2e} at the peak, "
          f"{lr[-1]:.2e} at the end")
    print(f"plan :: {n / 1e6:.1f}M trainable parameters; weights, gradients and {config.optimizer}'s state take "
          f"{memory / 2**30:.2f} GiB, activations come on top")
    print(f"plan :: about {step_seconds:.2f} s a step on {device}: {step_seconds * run.steps_an_epoch / 60:.1f} min an "
          f"epoch, {step_seconds * steps / 60:.1f} min in all, evaluation not counted")
    for line in idle:
        print(f"plan :: no effect: {line}")
    figure, axes = _axes(f"{config.scheduler}, warmup {warmup} of {steps} steps", "optimizer step", "learning rate")
    axes.plot(lr)
    figure.savefig(folder / "plan.png", dpi=110)
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

    Ends early when the smoothed loss has exploded or is not finite. Weights, optimizer, random states and mode are
    afterwards as they were.
    """
    points: list[tuple[float, float]] = []
    top = max(group["lr"] for group in run.optimizer.param_groups)

    def factor(step: int, history: list[float]) -> float:
        return config.lr_min * (config.lr_max / config.lr_min) ** (step / (config.lr_steps - 1)) / top

    def after_step(step: int, lr: float, loss: float) -> bool:
        if not math.isfinite(loss):
            return True
        points.append((lr, loss))
        so_far = smooth([loss for _, loss in points])
        return step >= config.lr_steps or (step > 10 and so_far[-1] > EXPLODED * min(so_far))

    one = replace(config, epochs=math.ceil(config.lr_steps / run.steps_an_epoch), guards="off", patience=0,
                  eval_every=1.0, ema=0.0)
    task = replace(run.task, evaluate=lambda: {"train_acc": 0.0, "dev_acc": 0.0, "dev_loss": 0.0, config.monitor: 0.0},
                   save_best=lambda: None)
    with untouched(run.model, run.optimizer), tempfile.TemporaryDirectory() as folder:
        loop = Loop(task, run.optimizer, factor, one, device, Path(folder), after_step, keep_states=False, quiet=True)
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
    range and the command that would use it. --confirm trains briefly at rates across it and ranks them by dev loss.

    Raises ValueError when the loss was finite for too few steps to say anything.
    """
    tests, found = [], []
    for i in range(config.lr_repeats):
        points = range_test(make_run(replace(config, seed=config.seed + i)), config, device)
        if len(points) < 10:
            raise ValueError(f"--lr_min {config.lr_min:g}: the loss was finite for {len(points)} steps only; begin "
                             "lower")
        tests.append(points)
        found.append(suggestion(points))
        print(f"range test {i + 1} of {config.lr_repeats}: {len(points)} steps, steepest at {found[-1][1]:.1e}",
              flush=True)
    low, best, high = (math.exp(float(np.median(np.log([f[k] for f in found])))) for k in range(3))
    with open(folder / "lr_find.csv", "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["seed", "lr", "loss", "smoothed"])
        for i, points in enumerate(tests):
            smoothed = smooth([loss for _, loss in points])
            rows.writerows([config.seed + i, lr, loss, mean] for (lr, loss), mean in zip(points, smoothed, strict=True))
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
    figure.savefig(folder / "lr_find.png", dpi=110)
    result: dict[str, Any] = {"low": low, "steepest": best, "high": high, "each": found}
    print(f"lr range :: {low:.1e} to {high:.1e}, steepest {best:.1e} ({folder / 'lr_find.png'})")
    if config.confirm:
        ranked = confirm(make_run, config, device, low, high)
        result["confirmed"] = ranked
        best = ranked[0]["lr"]
    write_json(folder / "result.json", result)
    print(f"use it :: {command(config, lr=f'{best:.1e}')}", flush=True)


def confirm(make_run: Callable[[RunConfig], SimpleNamespace], config: RunConfig, device: Device, low: float,
            high: float, n: int = 4) -> list[dict[str, float]]:
    """Train --lr_steps steps, with the run's own schedule squeezed into them, at n rates from a tenth of `low`, where
    fine-tuning may want it, to `high`. Returns {lr, dev_loss, dev_acc}, the lowest dev loss first."""
    ranked = []
    for lr in np.geomspace(low, high, n):
        run = make_run(replace(config, lr=float(lr), epochs=1))
        windows = run.task.order(0)[: config.lr_steps]
        task = replace(run.task, order=lambda epoch, windows=windows: windows)
        short = replace(config, lr=float(lr), epochs=1, patience=0, eval_every=1.0)
        with tempfile.TemporaryDirectory() as folder:
            stretch = run.steps_an_epoch / len(windows)
            loop = Loop(task, run.optimizer, partial(_stretched, run.schedule, stretch), short, device, Path(folder),
                        keep_states=False, quiet=True)
            best = loop.run()
        scores = best or {"dev_loss": math.inf, "dev_acc": 0.0}
        ranked.append({"lr": float(lr), "dev_loss": scores["dev_loss"], "dev_acc": scores["dev_acc"]})
        print(f"confirm :: lr {lr:.1e}: dev loss {scores['dev_loss']:.3f}, dev acc {scores['dev_acc']:.3f} after "
              f"{len(windows)} steps", flush=True)
    return sorted(ranked, key=lambda r: r["dev_loss"])


def _stretched(schedule: Callable, stretch: float, step: int, history: list[float]) -> float:
    return schedule(int(step * stretch), history)


def command(config: RunConfig, **changed: Any) -> str:
    """The command line that fine-tunes with the options that were given, and these changed."""
    skip = {"option", "lr", "lr_min", "lr_max", "lr_steps", "lr_repeats", "confirm", "output_dir", "overwrite"}
    words = ["python run_llama.py --option finetune"]
    for f in options():
        value = changed.get(f.name, getattr(config, f.name) if f.name in config.given - skip else None)
        if value is not None and value is not False:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words.append(f"--{f.name}" + ("" if value is True else f' "{text}"' if " " in text else f" {text}"))
    return " ".join(words)


# --------------------------------------------------------------------------- the proof of the resume


def verify_resume(config: RunConfig, folder: Path, program: Path, kills: int = 3) -> int:
    """Run once straight, once killed at `kills` random moments and resumed; compare the weights and steps.jsonl.

    Returns 0 when they are the same to the bit, 1 when not.
    """
    given = {name: getattr(config, name) for name in config.given - {"option", "output_dir", "overwrite", "resume"}}
    words = []
    for name, value in given.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        words += [] if value is False else [f"--{name}"] + ([] if value is True else [text])
    base = [sys.executable, str(program)]
    straight, stopped = folder / "straight", folder / "stopped"

    def run(*arguments: str, kill_at: int | None = None) -> bool:
        """One process; killed once its steps.jsonl has kill_at lines. Did it reach its end?"""
        process = subprocess.Popen([*base, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while kill_at is not None and process.poll() is None:
            log = stopped / "steps.jsonl"
            if log.exists() and log.read_bytes().count(b"\n") >= kill_at:
                process.kill()
                break
            time.sleep(0.02)
        errors = process.communicate()[1].decode("utf-8", errors="replace")
        if process.returncode not in (0, 3) and kill_at is None:
            raise ValueError(f"the run itself failed:\n{errors.strip().splitlines()[-1] if errors.strip() else ''}")
        return process.returncode in (0, 3)

    print("verify :: the straight run", flush=True)
    run("--option", "finetune", *words, "--output_dir", str(straight))
    n_steps = len(_steps(straight))
    moments = sorted(random.Random(config.seed).randrange(1, max(2, n_steps)) for _ in range(kills))
    for i, moment in enumerate(moments):
        start = ["--resume", str(stopped)] if i else ["--option", "finetune", *words, "--output_dir", str(stopped)]
        print(f"verify :: killed after step {moment} of {n_steps}", flush=True)
        if run(*start, kill_at=moment):
            warn("it was finished before it could be killed")
            break
    if not (stopped / "result.json").exists():
        started = (stopped / "last").is_dir()
        run(*(["--resume", str(stopped)] if started else
              ["--option", "finetune", *words, "--output_dir", str(stopped), "--overwrite"]))
    same_weights = sha256(straight / "best/model.safetensors") == sha256(stopped / "best/model.safetensors")
    same_steps = _steps(straight) == _steps(stopped)
    print(f"verify :: best weights {'identical' if same_weights else 'DIFFER'}, steps.jsonl "
          f"{'identical' if same_steps else 'DIFFERS'} ({n_steps} steps)", flush=True)
    write_json(folder / "result.json", {"same_weights": same_weights, "same_steps": same_steps, "killed_at": moments})
    return 0 if same_weights and same_steps else 1


def _steps(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's steps.jsonl, without their times."""
    lines = [json.loads(line) for line in (run / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
