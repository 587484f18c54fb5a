"""Pictures of a run: all of matplotlib is here."""

from pathlib import Path
from typing import Any

from formats import files


def axes(title: str, x: str, y: str) -> tuple[Any, Any]:
    """A figure of matplotlib that needs no screen, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    found = figure.add_subplot(title=title, xlabel=x, ylabel=y)
    found.grid(alpha=0.3)
    return figure, found


def save(figure: Any, path: Path) -> None:
    files.write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"), follow=False)


def schedule(rates: list[float], title: str, path: Path) -> None:
    """The learning rate of each optimizer step."""
    figure, found = axes(title, "optimizer step", "learning rate")
    found.plot(rates)
    save(figure, path)


def range_test(tests: list[list[tuple[float, float]]], smoothed: list[list[float]], low: float, best: float,
               high: float, path: Path) -> None:
    """The loss of each step of each range test over its learning rate, with the range that they suggest."""
    figure, found = axes("learning-rate range test", "learning rate", "training loss")
    for points, means in zip(tests, smoothed, strict=True):
        rates = [lr for lr, _ in points]
        found.plot(rates, [loss for _, loss in points], alpha=0.2, color="tab:blue")
        found.plot(rates, means, color="tab:blue")
    found.axvspan(low, high, color="tab:green", alpha=0.15, label=f"range {low:.1e} to {high:.1e}")
    found.axvline(best, color="tab:red", label=f"steepest {best:.1e}")
    found.set_xscale("log")
    found.set_ylim(0, min(found.get_ylim()[1], 2 * max(points[0][1] for points in tests)))
    found.legend()
    save(figure, path)
