"""--confirm: train briefly at several rates, and say which is the best only where chance does not explain it."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from commands.classification import ClassificationTask
from config import RunConfig
from training import logs, trainer
from training.course import course_of
from training.device import Device
from training.signals import stoppable
from training.task import InOneEpoch, Job


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


def confirm(make_job: Callable[[RunConfig], Job[ClassificationTask]], config: RunConfig, device: Device, low: float,
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
            log_probs, labels, steps = short_run(make_job, replace(at_rate(config, lr), seed=seed), device)
            outputs[-1].append(log_probs)
            said = "it diverged" if log_probs is None else (
                f"dev loss {_losses(log_probs, labels).mean():.3f}, dev acc "
                f"{(log_probs.argmax(1) == labels).mean():.3f} after {steps} steps")
            logs.say(f"confirm :: lr {lr:.1e}, seed {seed}: {said}")
        best, reason = doubt(lrs, outputs[-1], labels)
        if not reason and seed > config.seed and best != first:
            reason = (f"with seed {seed - 1} lr {lrs[first]:.1e} is best, with seed {seed} lr {lrs[best]:.1e}; more "
                      "--lr_steps may decide between them")
        if reason:
            break
        first = best
    ranked: list[dict[str, Any]] = []
    for lr, each in zip(lrs, zip(*outputs, strict=True), strict=True):
        whole = [log_probs for log_probs in each if log_probs is not None]
        diverged = len(whole) < len(each)
        ranked.append({"lr": lr,
                       "dev_loss": None if diverged else float(np.mean([_losses(o, labels) for o in whole])),
                       "dev_acc": None if diverged else float(np.mean([o.argmax(1) == labels for o in whole]))})
    ranked.sort(key=lambda rate: math.inf if rate["dev_loss"] is None else rate["dev_loss"])
    return Confirmed(None if reason else lrs[first], reason, ranked)


def short_run(make_job: Callable[[RunConfig], Job[ClassificationTask]], config: RunConfig,
              device: Device) -> tuple[np.ndarray | None, np.ndarray, int]:
    """Train --lr_steps steps, but none more than the run itself has, with the run's own schedule squeezed into them.

    Returns the log-probabilities of the dev sentences (N, C), or None where the training diverged; the labels (N,);
    the number of steps.
    """
    job = make_job(config)
    total = course_of(config, job.steps_per_epoch).steps
    steps = min(config.lr_steps, total)
    batches = [rows for epoch in range(-(-steps // job.steps_per_epoch)) for rows in job.task.order(epoch)][:steps]
    squeezed = Job(job.model, InOneEpoch(job.task, batches), job.optimizer,
                   lambda step, history: job.schedule(step * total // steps, history), steps, job.is_trained)
    loop = trainer.fit(squeezed, config, device, max_steps=steps, evaluate=False)
    if loop.progress.stopped == "diverged":
        return None, job.task.dev.labels, steps
    with loop.average.in_place(), stoppable():
        log_probs = job.task.predict(job.task.dev, "dev").double().numpy()
    return log_probs if np.isfinite(log_probs).all() else None, job.task.dev.labels, steps


def doubt(lrs: list[float], outputs: list[np.ndarray | None], labels: np.ndarray) -> tuple[int, str]:
    """(index of the rate with the lowest dev loss, what speaks against calling it the best; "" when nothing does).

    `outputs`: for each rate the log-probabilities (N, C), or None. Two tests on the sentences, both paired and
    one-sided, each at a level of CHANCE divided by how many there could have been (Bonferroni).

    Does it know the sentences at all? Its loss against the one to expect if the same labels were dealt out among them
    at random: that is no better for a model which has only learned how frequent the labels are. And is its loss lower
    than that of each other rate?
    """
    there = {i: log_probs for i, log_probs in enumerate(outputs) if log_probs is not None}
    if not there:
        return -1, "the training diverged at every rate; a lower --lr_min and --lr_max may decide"
    losses = {i: _losses(log_probs, labels) for i, log_probs in there.items()}
    best = min(there, key=lambda i: losses[i].mean())
    frequencies = np.bincount(labels, minlength=there[best].shape[1]) / len(labels)
    p = _p_value(-there[best] @ frequencies - losses[best])
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


def at_the_edge(confirmed: Confirmed) -> str:
    tried = [rate["lr"] for rate in confirmed.rates]
    sides = {min(tried): "lowest", max(tried): "highest"}
    return f"; it is the {sides[confirmed.lr]} that was tried" if confirmed.lr in sides else ""


