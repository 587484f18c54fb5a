"""search.html: a search in pictures, from its trials.csv and search.json. --option report writes it.

Nothing here imports torch.
"""

import csv
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from commands import plot
from commands.plot import BLUE, GREY, VERMILION
from config import InputError, shown
from formats import files
from training import logs

PAGE, TABLE, ABOUT = "search.html", "trials.csv", "search.json"
ENOUGH = 20  # complete trials, for the importance of a parameter to say something
TEMPLATE = Path(__file__).with_name("search.html")
FIXED = ("number", "state", "reason", "evaluations", "seconds", "folder")  # columns of trials.csv that are no parameter
WIDTH = 7.0  # inches
MOST_ACROSS = 4  # slices beside each other
MOST_DRAWN = 2000  # trials
APART = 0.3  # of an axis, between two of its numbers


@dataclass(frozen=True)
class Search:
    """A search as its folder has it. `rows`: of trials.csv; `names`: of its parameters; `facts`: what stands on top;
    `finalists`: (trial, score in the search, mean, spread and number of the new seeds); `is_log`: of the
    parameters that have a range, is its scale logarithmic?"""

    objective: str
    rows: tuple[dict[str, str], ...]
    columns: tuple[str, ...]
    names: tuple[str, ...]
    importances: dict[str, float]
    facts: tuple[tuple[str, str], ...]
    finalists: tuple[tuple[int, float, float, float, int], ...] = ()
    is_log: dict[str, bool] = field(default_factory=dict)

    @property
    def n_complete(self) -> int:
        return sum(row["state"] == "complete" for row in self.rows)

    @property
    def rises(self) -> bool:
        return self.objective not in ("dev_loss", "dev_mae")

    def score(self, row: dict[str, str]) -> float:
        """NaN for a trial without one."""
        try:
            return float(row[self.objective])
        except ValueError:
            return math.nan

    def drawn(self) -> list[dict[str, str]]:
        """The trials with a score."""
        return [row for row in self.rows if math.isfinite(self.score(row))][:MOST_DRAWN]


def is_search(path: Path) -> bool:
    """Is this the folder of a search?"""
    return (path / ABOUT).is_file() and (path / TABLE).is_file()


def read(path: Path) -> Search:
    """The search in a folder. Raises InputError for one that is damaged, and OSError for a link in it."""
    for name in (ABOUT, TABLE):
        files.check_plain(path / name)
    about = files.read_json(path / ABOUT)
    objective = about.get("objective")
    try:
        with open(path / TABLE, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows = tuple({k: v for k, v in row.items() if isinstance(k, str) and isinstance(v, str)} for row in reader)
            columns = tuple(reader.fieldnames or ())
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path / TABLE}: it cannot be read ({error})") from None
    if not isinstance(objective, str) or not {objective, *FIXED} <= {*columns} or any(
            len(row) < len(columns) for row in rows):
        raise InputError(f"{path / TABLE}: this is not what a search writes")
    known = about.get("importances")
    importances = {str(k): float(v) for k, v in known.items() if isinstance(v, int | float)} if isinstance(
        known, dict) else {}
    shown_names = {"winner": "winner: trial", "winner_run": "its run", "repeat": "the command that repeats it"}
    facts = [(shown_names.get(what, what), str(about[what])) for what in (
        "command", "space", "method", "prune", "objective", "winner", "winner_run", "repeat")
        if about.get(what) is not None]
    if isinstance(about.get("test"), dict) and isinstance(about["test"].get("acc"), float):
        facts.append(("the winner's accuracy on the test split, looked at once", f"{about['test']['acc']:.3f}"))
    names = tuple(name for name in columns if name not in (*FIXED, objective))
    ranges = re.findall(r"(\w+)(?:\[[^]]*\])?=([^|\s]*?)\.\.", str(about.get("space", "")))
    is_log = {name: "log:" in begin for name, begin in ranges}
    return Search(objective, rows, columns, names, importances, tuple(facts), finalists_of(about), is_log)


def finalists_of(about: dict[str, Any]) -> tuple[tuple[int, float, float, float, int], ...]:
    """The finalists that a search.json names, the winner first; those that make no sense are left out."""
    found = []
    for one in about.get("finalists") or ():
        try:
            scores = [float(score) for score in one["scores"].values()]
            spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
            found.append((int(one["trial"]), float(one["before"]), statistics.mean(scores), spread, len(scores)))
        except (TypeError, KeyError, ValueError, AttributeError, statistics.StatisticsError):
            continue
    return tuple(found)


def write(path: Path, folder: Path) -> Path:
    """Write search.html of the search in `path` into `folder`; returns where it is. A picture that cannot be drawn is
    left out, and a warning says so."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    search = read(path)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["shown"] = shown
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(search=search, enough=ENOUGH, pictures=pictures(search), svg=Markup)
    files.write_text(folder / PAGE, text, follow=False)
    return folder / PAGE


# --------------------------------------------------------------------------- the pictures


def pictures(search: Search) -> list[tuple[str, str]]:
    """(title, SVG) of each picture."""
    rows = search.drawn()
    if not rows:
        return []
    all_of_them: list[tuple[str, str, Callable[..., Any]]] = [
        ("History", "the score of each trial, and the best so far", history),
        ("Parallel coordinates", "a line for each trial through its parameters to its score", parallel),
        ("Slices", "the score over each parameter", slices)]
    if search.importances:
        all_of_them.append(("Importance", "how much of the differences each parameter explains", importance))
    found = []
    try:
        with plot.drawing():
            for title, description, draw in all_of_them:
                try:
                    found.append((title, plot.svg(draw(search, rows), title.split()[0].lower(), description)))
                except Exception as error:  # a page without a picture is a page
                    logs.warn(f"the picture `{title}` could not be drawn ({type(error).__name__}: {error})")
    except ImportError as error:
        logs.warn(f"{PAGE} has no pictures: {error}")
    return found


def history(search: Search, rows: Sequence[dict[str, str]]) -> Any:
    """The score over the trial's number; trials that were ended early are crosses."""
    figure = plot.page_figure(WIDTH, 3.0, bottom=0.15)
    axes = figure.subplots()
    for state, colour, marker in (("complete", BLUE, "o"), ("pruned", GREY, "x")):
        some = [row for row in rows if row["state"] == state]
        axes.plot([int(row["number"]) for row in some], [search.score(row) for row in some], marker, color=colour,
                  markersize=4, linestyle="", label=state)
    best: list[float] = []
    done = [row for row in rows if row["state"] == "complete"]
    for row in done:
        best.append((max if search.rises else min)([search.score(row), *best[-1:]]))
    last = [int(rows[-1]["number"])] if done else []
    axes.step([*(int(row["number"]) for row in done), *last], best + best[-1:], where="post", color=VERMILION,
              label="best so far")
    axes.xaxis.get_major_locator().set_params(integer=True)
    plot.legend_above(axes)
    axes.set(xlabel="trial", ylabel=search.objective)
    return figure


def positions(values: Sequence[str], is_log: bool | None = None) -> tuple[list[float], list[tuple[float, str]]]:
    """Where values stand between 0 and 1 ("" is NaN), and some of them with their places. What is no number stands in
    the order of the words. `is_log`: the scale; None: logarithmic for numbers that span a hundredfold."""
    there = sorted({value for value in values if value})
    try:
        numbers = sorted({float(value) for value in there})
    except ValueError:
        numbers = []
    if not there:
        return [math.nan] * len(values), []
    if not numbers:
        place = {value: i / max(1, len(there) - 1) for i, value in enumerate(there)}
        return [place.get(value, math.nan) for value in values], [(at, value) for value, at in place.items()]
    is_log = numbers[0] > 0 and (numbers[-1] >= 100 * numbers[0] if is_log is None else is_log)
    scaled = math.log if is_log else float
    low, high = scaled(numbers[0]), scaled(numbers[-1])
    found = [(scaled(float(value)) - low) / ((high - low) or 1) if value else math.nan for value in values]
    places = [((scaled(x) - low) / ((high - low) or 1), f"{x:.3g}") for x in numbers]
    marked = [places[0]]
    for one in places[1:-1]:  # texts that are nearer would stand on each other
        if one[0] - marked[-1][0] >= APART <= places[-1][0] - one[0]:
            marked.append(one)
    return found, marked + places[-1:] if len(places) > 1 else marked


def parallel(search: Search, rows: Sequence[dict[str, str]]) -> Any:
    """A line a trial; the best tenth stand out."""
    figure = plot.page_figure(WIDTH, 3.4, left=0.06, right=0.94, bottom=0.12)
    axes = figure.subplots()
    names = [*search.names, search.objective]
    places = [positions([row[name] for row in rows], search.is_log.get(name)) for name in names]
    ranked = sorted(range(len(rows)), key=lambda i: -search.score(rows[i]) if search.rises else search.score(rows[i]))
    best = {*ranked[: max(1, len(rows) // 10)]}
    for i in reversed(ranked):
        axes.plot(range(len(names)), [place[0][i] for place in places], color=BLUE if i in best else GREY,
                  alpha=1.0 if i in best else 0.35, linewidth=1.8 if i in best else 0.8, zorder=3 if i in best else 2)
    for x, (_, marks) in enumerate(places):
        axes.axvline(x, color=GREY, linewidth=0.8)
        for at, text in marks:
            axes.text(x + 0.03, at, text, fontsize=7, va="center")
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks([])
    axes.grid(False)
    return figure


def slices(search: Search, rows: Sequence[dict[str, str]]) -> Any:
    """The score over each parameter."""
    n = len(search.names)
    across = min(MOST_ACROSS, n)
    down = -(-n // across)
    figure = plot.page_figure(WIDTH, 2.2 * down, right=0.98, bottom=0.2 / down, top=0.97, wspace=0.45,
                              hspace=0.5)
    grid = figure.subplots(down, across, squeeze=False)
    for i, name in enumerate(search.names):
        axes = grid[i // across][i % across]
        places, marks = positions([row[name] for row in rows], search.is_log.get(name))
        axes.plot(places, [search.score(row) for row in rows], "o", color=BLUE, markersize=3, alpha=0.7)
        axes.set_xticks([at for at, _ in marks], [text for _, text in marks])
        axes.set_xlim(-0.08, 1.08)
        axes.set(xlabel=name, ylabel=search.objective if i % across == 0 else "")
    for i in range(n, down * across):
        grid[i // across][i % across].set_axis_off()
    return figure


def importance(search: Search, rows: Sequence[dict[str, str]]) -> Any:
    """A bar for each parameter."""
    found = sorted(search.importances.items(), key=lambda pair: pair[1])
    figure = plot.page_figure(WIDTH, 0.8 + 0.3 * len(found), left=0.3, bottom=0.5 / (0.8 + 0.3 * len(found)))
    axes = figure.subplots()
    axes.barh([name for name, _ in found], [value for _, value in found], color=BLUE)
    axes.set(xlabel="importance")
    return figure
