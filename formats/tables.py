"""Labelled sentences and label names from text files: `label ||| sentence` a line, and a JSON list of names."""

import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path

from config import InputError, counted

SEPARATOR = " ||| "
FORMAT = "expected `label ||| sentence`, for example `3 ||| a charming film`"

def read_text(path: str | Path) -> str:
    """A UTF-8 file, with or without a byte order mark. Raises InputError, naming the line, for other bytes."""
    return decode(Path(path).read_bytes(), path)


def decode(raw: bytes, path: str | Path) -> str:
    """`read_text` of bytes that are already here; `path` is for the message."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len(split_lines(raw[: error.start].decode("utf-8-sig")))
        raise InputError(f"{path}:{line}: the bytes {raw[error.start:error.end]!r} are not UTF-8; save the file as "
                         "UTF-8") from None


def split_lines(text: str) -> list[str]:
    """The lines of a text with the line ends of Unix, Windows or the old Mac, in any mixture. (str.splitlines would
    also cut at characters that a sentence may hold, such as U+2028.)"""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def read_lines(path: str | Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, each with its number from 1."""
    return [(number, line) for number, line in enumerate(split_lines(read_text(path)), 1) if line.strip()]


def read_label_names(path: Path | None) -> list[str] | None:
    """The JSON list of the labels' names. None without a path."""
    if path is None:
        return None
    text = read_text(path)
    try:
        names = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f'{path}: not JSON ({error}); expected a list such as ["bad", "good"]') from None
    if isinstance(names, dict):  # {"0": "bad", "1": "good"}
        names = [names.get(str(i)) for i in range(len(names))]
    if (not isinstance(names, list) or len(names) < 2
            or not all(isinstance(n, str) and n.strip() and n.isprintable() for n in names)
            or len(set(names)) < len(names)):
        raise InputError(f'{path}: expected a JSON list of two or more different names, such as ["bad", "good"]')
    return names


def read_examples(path: Path, n_labels: int | None, labels_file: Path | None = None) -> tuple[list[int], list[str]]:
    """Labels and sentences of a `label ||| sentence` file, in its order; blank lines are skipped.

    A sentence may hold ` ||| ` again. Raises InputError that lists the first ten bad lines: no separator, a label
    that is not an integer or not in 0 .. n_labels - 1, an empty sentence; and for a file with no sentence.
    """
    labels: list[int] = []
    sentences: list[str] = []
    faults: list[str] = []
    for number, line in read_lines(path):
        label, separator, sentence = line.partition(SEPARATOR)
        sentence = sentence.strip()
        fault = None
        if not separator:
            fault = f"no ` ||| ` in {line[:60]!r}; {FORMAT}"
        elif not re.fullmatch(r"[+-]?[0-9]{1,9}", label.strip()):
            fault = f"the label {label.strip()[:30]!r} is not an integer; {FORMAT}"
        elif int(label) < 0 or (n_labels and int(label) >= n_labels):
            top = f"0 to {n_labels - 1}, one for each name in {labels_file}" if n_labels else "0 or more"
            fault = f"the label {int(label)} is out of range; labels are {top}"
        elif not sentence:
            fault = f"the sentence is empty; {FORMAT}"
        if fault:
            faults.append(f"{path}:{number}: {fault}")
        else:
            labels.append(int(label))
            sentences.append(sentence)
    if faults:
        more = [f"... and {counted(len(faults) - 10, 'more line')} with such a fault"] if len(faults) > 10 else []
        raise InputError("\n".join(faults[:10] + more))
    if not sentences:
        raise InputError(f"{path}: there is no sentence in the file; {FORMAT}")
    return labels, sentences



# TEMPORARY, until the branch with the tables is merged: its own `Table` and `read_table` replace what follows.


@dataclass(frozen=True)
class Table:
    path: Path
    texts: list[str]
    labels: list[str] | None
    lines: list[int]
    description: str
    is_plain: bool


def read_table(path: str | Path, text_column: str | None = None, label_column: str | None = None,
               labelled: bool = True) -> Table:
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    text, label = text_column or "text", label_column or "label"
    if not rows or text not in rows[0]:
        raise InputError(f"{path}: there is no column {text}")
    return Table(Path(path), [row[text] for row in rows], [row[label] for row in rows] if label in rows[0] else None,
                 list(range(2, len(rows) + 2)), "CSV", False)
