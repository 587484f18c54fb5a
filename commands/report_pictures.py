"""The pictures of a report, as SVG inside of its page: the curves of all runs together, and those of each run.

Nothing here imports torch.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from commands import plot, run_pictures
from commands.plot import BLUE, GREY, INK, LINES, VERMILION
from config import counted
from formats.past_run import PastRun
from training import calibration, logs, pairs

MOST_DRAWN = 30  # runs in the picture of all, and cards with curves: a picture takes about a tenth of a second
MOST_EXAMINED = 5  # cards with the accuracy by length and the calibration
MOST_COLOURED = len(LINES)  # the best ones; the others stand grey behind them
LENGTH_BINS = 5
WIDTH = 4.6  # inches


@dataclass(frozen=True)
class Pictures:
    """What the page shows. `together`: (title, SVG) of all runs; `legend`: (rank, colour, SVG dashes) of those in
    colour; `note`: which are drawn; `cards`: (title, SVG) for the card of each rank."""

    together: tuple[tuple[str, str], ...] = ()
    legend: tuple[tuple[int, str, str], ...] = ()
    note: str = ""
    cards: Mapping[int, tuple[tuple[str, str], ...]] = field(default_factory=dict)


def draw(runs: Sequence[PastRun]) -> Pictures:
    """The pictures of runs that stand in the order of their rank, the first being 1. A picture that cannot be drawn is
    left out, and one warning says so."""
    drawn = [(rank, run) for rank, run in enumerate(runs, 1) if run.epochs]
    if not drawn:
        return Pictures()
    shown, faults = drawn[:MOST_DRAWN], []

    def attempt(name: str, description: str, picture: Callable[..., Any], *arguments: Any) -> str:
        try:
            return plot.svg(picture(*arguments), name, description)
        except Exception as error:  # a report without a picture is a report
            faults.append(f"{type(error).__name__}: {error}")
            return ""

    try:
        with plot.drawing():
            together = [(title, attempt(name, f"{title} of {counted(len(shown), 'run')} over the epochs",
                                        together_of, shown, column))
                        for name, title, column in (("all-dev", "dev accuracy", "dev_acc"),
                                                    ("all-loss", "training loss", "train_loss"))]
            cards: dict[int, tuple[tuple[str, str], ...]] = {}
            for rank, run in shown:
                found = [("curves", attempt(f"run-{rank}-curves", f"loss and accuracy of run {rank}",
                                            curves_of, run))]
                is_examined = len(cards) < MOST_EXAMINED
                if is_examined and ((by_length := length_bins(run)) or run.reliability):
                    found.append(("dev sentences", attempt(
                        f"run-{rank}-dev", f"accuracy by sentence length, and calibration, of run {rank}",
                        quality_of, run, by_length)))
                cards[rank] = tuple((title, svg) for title, svg in found if svg)
    except ImportError as error:
        logs.warn(f"the report has no pictures: {error}")
        return Pictures()
    if faults:
        logs.warn(f"{counted(len(faults), 'picture')} of the report could not be drawn ({faults[0]})")
    coloured = shown[:MOST_COLOURED]
    legend = tuple((rank, "currentColor" if line.colour == INK else line.colour,
                    " ".join(f"{2 * x:g}" for x in line.dashes))
                   for (rank, _), line in zip(coloured, LINES, strict=False))
    note = ""
    if len(drawn) > len(shown):
        note = f"The best {len(shown)} of {len(drawn)} runs with curves are drawn, here and on their cards. "
    if len(shown) > len(coloured):
        note += f"The best {len(coloured)} have a colour, the others are grey. "
    if len(shown) > MOST_EXAMINED:  # and where they are known
        note += f"Accuracy by sentence length and calibration are on the best {MOST_EXAMINED} cards."
    return Pictures(tuple((title, svg) for title, svg in together if svg), legend, note.strip(), cards)


# --------------------------------------------------------------------------- all runs together


def together_of(runs: Sequence[tuple[int, PastRun]], column: str) -> Any:
    """A figure of one column of all runs over the epochs; behind the end of each line in colour its rank."""
    figure = plot.page_figure(WIDTH, 3.0, bottom=0.15, top=0.97)
    axes = figure.subplots()
    every, ends = [], []
    for i, (rank, run) in reversed(list(enumerate(runs))):
        curves = curves_from(run)
        values = curves.columns[column]
        every.append(values)
        if i < MOST_COLOURED:
            axes.plot(curves.epochs, values, zorder=3 + (MOST_COLOURED - i) / 10, **LINES[i].options(len(values)))
            finite = [(x, y) for x, y in zip(curves.epochs, values, strict=True) if math.isfinite(y)]
            if finite:
                ends.append((*finite[-1], rank, LINES[i].colour))
        else:
            axes.plot(curves.epochs, values, color=GREY, alpha=0.5, linewidth=0.8, zorder=2)
    plot.fit(axes, *every, **({"least": 0.0, "most": 1.02} if column == "dev_acc" else {}))
    run_pictures.fit_epochs(axes, [epoch.number for _, run in runs for epoch in run.epochs])
    axes.set(xlabel="epoch", ylabel="dev accuracy" if column == "dev_acc" else "training loss")
    number_the_ends(axes, ends)
    return figure


def number_the_ends(axes: Any, ends: Sequence[tuple[float, float, int, str]]) -> None:
    """Write the rank of each line to the right of the axes, at the height where it ends, and none over another.
    `ends`: (x, y, rank, colour)."""
    gap = 0.065  # of the axes' height: a line of text
    to_axes = axes.transScale + axes.transLimits
    wanted = sorted((min(1.0, max(0.0, float(to_axes.transform((x, y))[1]))), x, rank, colour)
                    for x, y, rank, colour in ends)
    at: list[float] = []
    for height, *_ in wanted:
        at.append(max(height, at[-1] + gap) if at else height)
    too_high = max(0.0, at[-1] - 1) if at else 0.0
    for i in reversed(range(len(at))):  # what was pushed out at the top is pushed back
        at[i] = min(at[i], (at[i + 1] - gap) if i + 1 < len(at) else at[i] - too_high)
    for place, (height, x, rank, colour) in zip(at, wanted, strict=True):
        start = float(to_axes.transform((x, 1))[0])
        axes.plot([start, 1.02], [height, place], color=colour, linewidth=0.6, alpha=0.6, transform=axes.transAxes,
                  clip_on=False)
        axes.text(1.03, place, str(rank), transform=axes.transAxes, va="center", fontsize=8)


# --------------------------------------------------------------------------- one run


def curves_from(run: PastRun) -> run_pictures.Curves:
    """The evaluations of a run as curves, under the names of the columns of epochs.jsonl."""
    best = run.best()
    return run_pictures.read_curves(
        [{"epoch": e.number, "train_loss": e.train_loss, "train_acc": e.train_acc, "dev_loss": e.dev_loss,
          "dev_acc": e.dev_acc, "lr": e.lr} for e in run.epochs], best.number if best else None)


def curves_of(run: PastRun) -> Any:
    """Loss and accuracy; the rate is in the run's own curves.png."""
    figure = plot.page_figure(WIDTH, 3.6, bottom=0.13, top=0.93, hspace=0.28)
    run_pictures.draw_curves(figure, curves_from(run), run.n_classes, with_rate=False)
    return figure


@dataclass(frozen=True)
class LengthBin:
    """The n dev sentences that have `low` to `high` of a unit ("words"), and the share of them that is right."""

    low: int
    high: int
    n: int
    accuracy: float
    unit: str

    def interval(self) -> tuple[float, float]:
        """95% (Wilson 1927)."""
        z = 1.96
        middle = (self.accuracy + z * z / (2 * self.n)) / (1 + z * z / self.n)
        half = z / (1 + z * z / self.n) * math.sqrt(self.accuracy * (1 - self.accuracy) / self.n
                                                    + z * z / (4 * self.n * self.n))
        return min(self.accuracy, middle - half), max(self.accuracy, middle + half)  # at 0 and 1 but for rounding


def length_bins(run: PastRun) -> list[LengthBin]:
    """The accuracy of a run by the length of the dev sentences, in about equally large parts; [] where its predictions
    or its dev file cannot be read."""
    is_right = pairs.which_are_right(run)
    if not is_right or run.predictions is None:
        return []
    unit, found = sentence_lengths(run.predictions)
    lengths, right = np.array(found), np.array(is_right)
    if len(lengths) != len(right):
        return []
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, LENGTH_BINS + 1)[1:], method="higher"))  # longest of each
    at = np.searchsorted(edges, lengths, side="left")
    return [LengthBin(int(lengths[at == i].min()), int(lengths[at == i].max()), int((at == i).sum()),
                      float(right[at == i].mean()), unit) for i in range(len(edges)) if (at == i).any()]


def sentence_lengths(path: Path) -> tuple[str, list[int]]:
    """The unit, and the length of each sentence of a `label ||| sentence` file in it: words, or characters where most
    are Chinese or Japanese, which have no spaces between words."""
    lines = path.read_text(encoding="utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    sentences = [line.partition(" ||| ")[2] for line in lines if line.strip()]
    characters = "".join(sentences)
    if sum(ord(c) >= 0x2E80 for c in characters) > len(characters) / 2:
        return "characters", [len(sentence) for sentence in sentences]
    return "words", [len(sentence.split()) for sentence in sentences]


def quality_of(run: PastRun, by_length: Sequence[LengthBin]) -> Any:
    """A figure with accuracy by sentence length, a reliability diagram, or both."""
    n_panels = bool(by_length) + bool(run.reliability)
    figure = plot.page_figure(WIDTH, 2.3, bottom=0.2, top=0.9, left=0.09, right=0.97, wspace=0.24)
    panels = iter(np.atleast_1d(figure.subplots(1, n_panels)))
    if by_length:
        _draw_lengths(next(panels), by_length)
    if run.reliability:
        _draw_reliability(next(panels), run)
    return figure


def _draw_lengths(axes: Any, bins: Sequence[LengthBin]) -> None:
    low, high = np.array([one.interval() for one in bins]).T
    middle = np.array([one.accuracy for one in bins])
    axes.errorbar(range(len(bins)), middle, yerr=(middle - low, high - middle), color=BLUE, marker="o", markersize=5,
                  linestyle="none", capsize=3)
    plot.fit(axes, low, high, least=0, most=1.02)
    axes.set_xticks(range(len(bins)), [f"{one.low}-{one.high}" if one.low < one.high else str(one.low) for one in bins],
                    fontsize=7)
    axes.set_xlim(-0.5, len(bins) - 0.5)
    axes.set_title("accuracy by length (95%)")
    axes.set_xlabel(f"{bins[0].unit} in the sentence")


def _draw_reliability(axes: Any, run: PastRun) -> None:
    bins = [calibration.Bin(low, high, int(n), confidence, accuracy)
            for low, high, n, confidence, accuracy in run.reliability if n]
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=(0, (2, 2)), linewidth=1)
    axes.plot([one.confidence for one in bins], [one.accuracy for one in bins], color=VERMILION, marker="o",
              markersize=4, linewidth=1.2)
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="confidence")
    axes.set_title(f"share right, ECE {calibration.error_of(bins):.3f}")
