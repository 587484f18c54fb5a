"""What `--option inspect` found, as lines for a terminal, as Markdown and as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from commands.scores import fitted, width
from config import shown
from formats import files
from training import logs
from training.run_folder import INSPECTED as NAMES

WIDEST = 100  # columns of a sentence on the terminal


@dataclass(frozen=True)
class Section:
    """One finding. `summary` stands behind its title; `lines` below it, of which the terminal shows the first `shown`;
    `values`: the same for programs; `brief`: what a run's card in the report says of it."""

    title: str
    summary: str
    lines: Sequence[str] = ()
    values: dict[str, Any] = field(default_factory=dict)
    shown: int = 12
    brief: str = ""


def tell(sections: Sequence[Section]) -> None:
    """Everything on stdout: `title :: summary`, then the lines."""
    for section in sections:
        more = len(section.lines) - section.shown
        rest = [f"and {more} more: {NAMES[0]}"] if more > 0 else []
        logs.say(shown("\n  ".join([f"{section.title} :: {section.summary}", *section.lines[:section.shown], *rest])))


def write(folder: Path, title: str, sections: Sequence[Section], values: dict[str, Any]) -> None:
    """inspect.md and inspect.json into a folder."""
    lines = [f"# {_plain(title)}"]
    for section in sections:  # as indented code: no mark in a sentence has a meaning, and columns stay columns
        lines += ["", f"## {section.title}", "", f"    {_plain(section.summary)}",
                  *(f"    {_plain(line)}" for line in section.lines)]
    files.write_text(folder / NAMES[0], "\n".join(line.rstrip() for line in lines) + "\n", follow=False)
    files.write_json(folder / NAMES[1], {**values, **{s.title: s.values for s in sections}})
    for name in NAMES:
        logs.say(f"inspect :: {folder / name}")


def _plain(text: str) -> str:
    return shown(text).replace("\n", " ")


def quoted(text: str, columns: int = WIDEST) -> str:
    """A sentence on one line, cut where it is too wide."""
    line = " ".join(shown(text).split())
    return f'"{line}"' if width(line) <= columns else f'"{fitted(line, columns)}"'


def percent(n: int, of: int) -> str:
    """12.5% as text; of nothing 0.0%."""
    share = 100 * n / of if of else 0.0
    return "<0.1%" if 0 < share < 0.05 else f"{share:.1f}%"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns with a head, the first to the left, the others to the right."""
    widths = [max(width(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    return [fitted(row[0], widths[0]) + "".join(
        f"  {' ' * (columns - width(cell))}{cell}" for cell, columns in zip(row[1:], widths[1:], strict=True))
        for row in (heads, *rows)]
