"""The pictures of learning rates before a run: the range test of lr_find, and the schedule of --plan."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from commands import plot
from commands.plot import BLUE, GREEN, GREY, INK, SKY, VERMILION

MOST_EPOCH_MARKS = 15


def range_test(tests: Sequence[Sequence[tuple[float, float]]], smoothed: Sequence[Sequence[float]], low: float,
               high: float, suggested: float, n_classes: int, about: str) -> Any:
    """A figure of the loss of each step of each range test over its learning rate: the range that they suggest, and the
    rate that the printed command has. `about`: data and layers."""
    seeds = f", {len(tests)} seeds" if len(tests) > 1 else ""
    figure = plot.figure(7, 4.2, f"learning-rate range test: {about}{seeds}")
    axes = figure.subplots()
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss")
    plot.plain_numbers(axes.xaxis)
    for i, (points, means) in enumerate(zip(tests, smoothed, strict=True)):
        rates = [lr for lr, _ in points]
        axes.plot(rates, [loss for _, loss in points], color=SKY, alpha=0.6, linewidth=0.8,
                  label=None if i else "each step")
        axes.plot(rates, means, color=BLUE, linewidth=2, label=None if i else "smoothed")
    fit_fall(axes, smoothed)
    axes.axvspan(low, high, facecolor=GREEN, alpha=0.12, label=f"range {low:.1e} to {high:.1e}")
    for edge in (low, high):
        axes.axvline(edge, color=GREEN, linestyle=(0, (1, 1.5)), linewidth=1.2)
    axes.axvline(suggested, color=VERMILION, linewidth=1.8, linestyle=(0, (5, 2)), label=f"suggested {suggested:.1e}")
    at = [float(np.interp(math.log(suggested), [math.log(lr) for lr, _ in points], means))
          for points, means in zip(tests, smoothed, strict=True)]
    axes.plot([suggested], [np.median(at)], marker="*", markersize=13, color=VERMILION, markeredgecolor=INK,
              linestyle="none", zorder=5)
    plot.chance_line(axes, math.log(n_classes), n_classes)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure


def fit_fall(axes: Any, smoothed: Sequence[Sequence[float]]) -> None:
    """Fit the y axis to the fall of the smoothed losses: from where they begin to where they are lowest. Where the loss
    explodes behind it, the curve leaves the picture."""
    falls = [means[: int(np.argmin(means)) + 1] for means in smoothed]
    highest, lowest = max(map(max, falls)), min(map(min, falls))
    fall = highest - lowest
    if fall <= 0.02 * abs(highest):  # it never fell: show what it did instead
        plot.fit(axes, *smoothed)
        return
    axes.set_ylim(lowest - 0.15 * fall, highest + 0.3 * fall)


def schedule(rates: Sequence[float], steps_per_epoch: int, title: str) -> Any:
    """A figure of the learning rate of each optimizer step, with the ends of the epochs marked."""
    from matplotlib.ticker import MaxNLocator

    figure = plot.figure(7, 4, title)
    axes = figure.subplots()
    axes.set(xlabel="optimizer step", ylabel="learning rate")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.plot(range(1, len(rates) + 1), rates, color=BLUE, linewidth=2, marker="o" if len(rates) <= 30 else "",
              markersize=4)
    plot.fit(axes, [*rates, 0.0])
    axes.set_xlim(0, len(rates) + 1)
    plot.plain_numbers(axes.yaxis)
    n_epochs = len(rates) // steps_per_epoch
    every = next(n for power in itertools.count() for n in (10**power, 2 * 10**power, 5 * 10**power)
                 if n * MOST_EPOCH_MARKS >= n_epochs)
    ends = [epoch * steps_per_epoch for epoch in range(every, n_epochs + 1, every)]
    axes.grid(False, axis="x")
    for end in ends:
        axes.axvline(end, color=GREY, linestyle=":", linewidth=1, zorder=1)
    top = axes.secondary_xaxis("top")
    top.set_xticks(ends, [str(end // steps_per_epoch) for end in ends], fontsize=8)
    top.set_xlabel("epochs done" if ends else "less than one epoch")
    return figure


def free_path(path: Path) -> Path:
    """The path, or with -2, -3, ... behind its name the first that is not there: a picture replaces no other one."""
    names = itertools.chain([path], (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in itertools.count(2)))
    return next(name for name in names if not name.exists() and not name.is_symlink())
