"""The answers of predict and serve: the class of a text, its probabilities, and how they are written."""

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

UNSURE = "unsure"  # the name where no class is likely enough; its label is -1


@dataclass(frozen=True)
class Answer:
    """`label`: the class's number, `name` its name (-1 and "unsure" where a threshold was not reached); `ranked`:
    (name, probability) of the classes that were asked for, the likeliest first with top_k, else in the classes'
    order."""

    label: int
    name: str
    ranked: list[tuple[str, float]]

    def values(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"label": self.label, "name": self.name,
                "probabilities": {name: round(p, 6) for name, p in self.ranked}}


def answer(row: Sequence[float], names: Sequence[str], top_k: int | None = None,
           threshold: float | None = None) -> Answer:
    """The answer that the probabilities (C,) of a text give. A top_k above C means all."""
    best = max(range(len(row)), key=lambda i: row[i])
    every = list(zip(names, row, strict=True))
    ranked = every if top_k is None else sorted(every, key=lambda pair: -pair[1])[:top_k]
    if threshold is not None and row[best] < threshold:
        return Answer(-1, UNSURE, ranked)
    return Answer(best, names[best], ranked)


# --------------------------------------------------------------------------- the formats


def tsv_line(text: str, found: Answer, is_top: bool) -> str:
    """label, name, and all probabilities in one column; with top_k instead name, p, name, p, ..., a column each."""
    if is_top:
        columns = [word for name, p in found.ranked for word in (name, f"{p:.6f}")]
    else:
        columns = [" ".join(f"{p:.6f}" for _, p in found.ranked)]
    return "\t".join([str(found.label), found.name, *columns]) + "\n"


def jsonl_line(text: str, found: Answer, is_top: bool) -> str:
    """One JSON object."""
    return json.dumps({"text": text, **found.values()}, ensure_ascii=False) + "\n"


def csv_line(text: str, found: Answer, is_top: bool) -> str:
    """text, label, name, and a column for each probability; with top_k instead name, p, name, p, ..."""
    columns = [word for name, p in found.ranked for word in ([_plain(name)] if is_top else []) + [f"{p:.6f}"]]
    return _csv_row([_plain(text), found.label, _plain(found.name), *columns])


def csv_header(names: Sequence[str], top_k: int | None) -> str:
    if top_k is None:
        columns = [f"p_{name}" for name in names]
    else:
        columns = [f"{what}_{i + 1}" for i in range(min(top_k, len(names))) for what in ("name", "p")]
    return _csv_row(["text", "label", "name", *columns])


def _plain(text: str) -> str:
    """A text that a spreadsheet would run as a formula, with an apostrophe in front. A number, as -1, is none."""
    is_formula = text.lstrip().startswith(("=", "+", "-", "@")) and not re.fullmatch(r"[+-]?[0-9.,]+", text.strip())
    return f"'{text}" if is_formula else text


def _csv_row(values: list[Any]) -> str:
    row = io.StringIO()
    csv.writer(row, lineterminator="\r\n").writerow(values)  # so that both characters are quoted inside of a text
    return row.getvalue().removesuffix("\r\n") + "\n"


LINES: dict[str, Callable[[str, Answer, bool], str]] = {"tsv": tsv_line, "jsonl": jsonl_line, "csv": csv_line}
