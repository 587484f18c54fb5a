"""The pictures of one run: curves.png and confusion.png in its folder, and the same curves in a report."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from commands import plot
from commands.plot import DEV, GREY, INK, TRAIN
from training import logs
from training.run_folder import CONFUSION, CURVES, RunFolder

LOSSES, ACCURACIES, RATE = ("train_loss", "dev_loss"), ("train_acc", "dev_acc"), "lr"  # columns of epochs.jsonl
MOST_CLASSES = 60  # in the confusion matrix: of more, those with the most mistakes
NUMBERED_CELLS = 12  # classes: up to so many, each cell has its number
LONGEST_NAME = 18  # characters of a class's name; a wide one counts as two


@dataclass(frozen=True)
class Curves:
    """The evaluations of a run: `epochs` (N,), and for each column of `logs.EpochRecord` its values (N,), NaN where
    there is none. `best`: the epoch that was chosen."""

    epochs: tuple[float, ...]
    columns: Mapping[str, tuple[float, ...]]
    best: float | None = None

    def value_at(self, column: str, epoch: float | None) -> float:
        """NaN where there is no such evaluation."""
        values = self.columns.get(column, ())
        return values[self.epochs.index(epoch)] if epoch in self.epochs and values else math.nan


def read_curves(lines: Sequence[Mapping[str, Any]], best: float | None) -> Curves:
    """The lines of epochs.jsonl as curves. A line without an epoch is damaged, and left out."""
    whole = [line for line in lines if isinstance(line.get("epoch"), int | float)]
    columns = {name: tuple(_number(line.get(name)) for line in whole) for name in (*LOSSES, *ACCURACIES, RATE)}
    return Curves(tuple(float(line["epoch"]) for line in whole), columns, best)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


# --------------------------------------------------------------------------- curves


def draw_curves(figure: Any, curves: Curves, n_classes: int | None, with_rate: bool = True) -> list[Any]:
    """Loss, accuracy and, `with_rate`, learning rate over the epochs, one below the other. Returns their axes."""
    ratios = (3, 3, 1.4)[: 2 + with_rate]
    every = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios)
    loss, accuracy = every[:2]
    _lines(loss, curves, LOSSES)
    plot.fit(loss, *(curves.columns.get(name, ()) for name in LOSSES))
    if n_classes and n_classes > 1:
        plot.chance_line(loss, math.log(n_classes), n_classes)
    loss.set_ylabel("loss")
    _lines(accuracy, curves, ACCURACIES)
    plot.fit(accuracy, *(curves.columns.get(name, ()) for name in ACCURACIES), least=0, most=1.02)
    accuracy.set_ylabel("accuracy")
    if with_rate:
        _draw_rate(every[2], curves)
    every[-1].set_xlabel("epoch")
    fit_epochs(every[-1], curves.epochs)
    chosen = curves.value_at("dev_acc", curves.best)
    if curves.best is not None and curves.best in curves.epochs:
        for axes in every:
            axes.axvline(curves.best, color=GREY, linestyle=(0, (2, 2)), linewidth=1, zorder=1)
        accuracy.plot([curves.best], [chosen], color=INK, marker="*", markersize=11, linestyle="none", zorder=5,
                      label=f"best: epoch {curves.best:g}, dev {chosen:.3f}")
    for axes in (loss, accuracy):
        plot.legend_above(axes)
    return list(every)


def _draw_rate(axes: Any, curves: Curves) -> None:
    rates = curves.columns.get(RATE, ())
    axes.plot(curves.epochs, rates or [math.nan] * len(curves.epochs), **plot.Line(INK, (), ".").options(
        len(curves.epochs)))
    plot.fit(axes, (*rates, 0.0) if np.isfinite(rates).any() else ())
    axes.set_ylabel("lr")
    plot.plain_numbers(axes.yaxis)


def _lines(axes: Any, curves: Curves, columns: Sequence[str]) -> None:
    for name, line in zip(columns, (TRAIN, DEV), strict=True):
        values = curves.columns.get(name, ())
        if values and np.isfinite(values).any():
            axes.plot(curves.epochs, values, label="training" if line is TRAIN else "dev", **line.options(len(values)))


def fit_epochs(axes: Any, epochs: Sequence[float]) -> None:
    """Whole epochs on the x axis, also where there is only one."""
    from matplotlib.ticker import MaxNLocator

    low, high = (min(epochs), max(epochs)) if epochs else (0.0, 0.0)
    around = 0.03 * (high - low) or 0.5
    axes.set_xlim(low - around, high + around)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, min_n_ticks=1))
    if high == low:
        axes.set_xticks([low], [f"{low:g}"])


# --------------------------------------------------------------------------- the confusion matrix


def draw_confusion(counts: np.ndarray, names: Sequence[str], title: str) -> Any:
    """A figure of the confusion matrix `counts` (C, C): a row for each true class, a column for each prediction. A
    cell's colour is its share of the row."""
    n_all = len(names)
    kept = list(range(n_all))
    if n_all > MOST_CLASSES:
        mistakes = counts.sum(0) + counts.sum(1) - 2 * counts.diagonal()
        kept = sorted(np.argsort(-mistakes, kind="stable")[:MOST_CLASSES].tolist())
        title += f"; of {n_all} classes the {MOST_CLASSES} with the most mistakes"
    cells, n = counts[np.ix_(kept, kept)], len(kept)
    share = cells / np.maximum(1, counts[kept].sum(1, keepdims=True))
    written = [cut(names[i]) for i in kept]
    has_names = plot.can_draw(written)
    rows = [(f"{i} {name}" if n > NUMBERED_CELLS else name) if has_names else str(i)
            for i, name in zip(kept, written, strict=True)]
    columns = rows if n <= NUMBERED_CELLS else [str(i) for i in kept]
    step = 0.62 if n <= NUMBERED_CELLS else max(0.19, 7 / n)
    figure = plot.figure(max(5.2, step * n + 3), max(4.2, step * n + 1.8), title, "compressed")
    axes = figure.subplots()
    axes.grid(False)
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=share.max() or 1)
    size = 9 if n <= 30 else 7
    axes.set_xticks(range(n), columns, rotation=90 if n > NUMBERED_CELLS or max(map(len, columns)) > 5 else 0,
                    fontsize=size)
    axes.set_yticks(range(n), rows, fontsize=size)
    axes.set_xlabel("prediction")
    axes.set_ylabel("true class")
    if n <= NUMBERED_CELLS:
        for i, j in np.ndindex(n, n):
            axes.text(j, i, f"{cells[i, j]:g}", ha="center", va="center", fontsize=8,
                      color="white" if share[i, j] > 0.55 * share.max() else INK)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    return figure


def cut(name: str) -> str:
    """A class's name, short enough to stand beside its row; of a long one its middle is left out, as names often differ
    at their ends."""
    longest = LONGEST_NAME // 2 if any(ord(c) > 0x1100 for c in name) else LONGEST_NAME
    return plot.one_line(name, longest)


def matrix_of(scores: Mapping[str, Any], n_classes: int) -> np.ndarray:
    """The confusion matrix (C, C) of a split in a result.json, which has many classes as pairs."""
    if "confusion_matrix" in scores:
        return np.array(scores["confusion_matrix"])
    counts = np.zeros((n_classes, n_classes))
    for label, guess, count in scores["confusion_pairs"]:
        counts[label, guess] = count
    return counts


# --------------------------------------------------------------------------- into the run's folder


def draw(folder: RunFolder, result: Mapping[str, Any], about: str) -> None:
    """Write curves.png and confusion.png of a run that is finished. `about`: its data and layers, for the titles.

    The pictures come last and are worth no run: whatever goes wrong with them is one warning.
    """
    try:
        with plot.drawing():
            curves = read_curves(logs.read_log(folder.epochs), result["best_epoch"])
            # With margins that are given: finding them out takes as long as drawing.
            figure = plot.figure(7, 6.4, f"{folder.path.name}: {about}", layout="none")
            figure.subplots_adjust(left=0.14, right=0.98, top=0.92, bottom=0.075, hspace=0.17)
            for axes in draw_curves(figure, curves, len(result["label_names"])):
                axes.yaxis.set_label_coords(-0.115, 0.5)
            plot.save(figure, folder.path / CURVES)
            dev = result["dev"]
            counts = matrix_of(dev, len(result["label_names"]))
            plot.save(draw_confusion(counts, result["label_names"], f"{folder.path.name}: {int(counts.sum()):,} dev "
                                     f"sentences, accuracy {dev['acc']:.3f}"), folder.path / CONFUSION)
    except Exception as error:  # also an ImportError, a full disk, and what a font or a number does to matplotlib
        with suppress(OSError):
            logs.warn(f"the pictures could not be drawn ({type(error).__name__}: {error}); the run is not affected "
                      "(--plots off draws none)")
