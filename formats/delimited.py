"""CSV and its relatives to rows: the delimiter, the quoting and the header are found out.

Python's csv module cuts the text; its Sniffer is not used, because it takes letters for delimiters and the first of two
sentences for a header.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from config import InputError, counted
from formats import columns, rows
from formats.rows import Rows

DELIMITERS = "\t;|,"  # of two that cut as evenly, the first: `fine;3,5` has a decimal comma
SAMPLE, SAMPLE_SIZE = 200, 1_000_000  # rows, and characters, that decide on the delimiter
NO_DELIMITER = "\x1f"  # for one column alone: ASCII's unit separator, which no text has

# How quotes can be meant, in the order in which they are tried; the first that has no fault is taken.
QUOTED: dict[str, Any] = {"strict": True}
ESCAPED: dict[str, Any] = {"strict": True, "doublequote": False, "escapechar": "\\"}
UNQUOTED: dict[str, Any] = {"quoting": csv.QUOTE_NONE}
LOOSE: dict[str, Any] = {}
QUOTING = {"": QUOTED, r"quotes written as \"": ESCAPED, "quotes are plain characters": UNQUOTED,
           "quotes used loosely": LOOSE}

csv.field_size_limit(2**31 - 1)  # a text of any length

Record = tuple[int, list[str]]  # the line where it begins, and its cells


def records(content: str, delimiter: str, **quoting: Any) -> Iterator[Record]:
    """Each row that is not blank. Raises csv.Error."""
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, **quoting)
    begins = 1
    for cells in reader:
        if any(cell.strip() for cell in cells):
            yield begins, cells
        begins = reader.line_num + 1


def read_delimited(path: Path, content: str, typed: list[str], prefers: str = "") -> Rows:
    """The rows of a CSV or TSV file. `typed`: the columns' names that a person gave; `prefers`: a delimiter that the
    file's name says. Raises InputError, with the lines, for rows of another number of columns than the first."""
    content, n_removed, excels = _without_sep_line(content)
    delimiter = excels or find_delimiter(content, typed, prefers)
    found, style = _cut(content, delimiter or NO_DELIMITER)
    found = [(line + n_removed, cells) for line, cells in found]
    if not found:
        raise InputError(f"{path}: there is no row in the file")
    width = _width(found)
    rows.refuse([_ragged(path, line, cells, width, delimiter) for line, cells in found
                 if len(_trimmed(cells, width)) != width])
    table: list[list[str | None]] = [[cell.strip() for cell in _trimmed(cells, width)] for _, cells in found]
    lines = [line for line, _ in found]
    first = [cell or "" for cell in table[0]]
    has_header = is_header(first, [[cell or "" for cell in row] for row in table[1:]], typed)
    names = first if has_header else [str(i + 1) for i in range(width)]
    if has_header:
        table, lines = table[1:], lines[1:]
    mark = "one column" if not delimiter else "delimiter tab" if delimiter == "\t" else f"delimiter `{delimiter}`"
    said = [word for word in (mark, style, "" if has_header else "no header") if word]
    return Rows(names, table, lines, ", ".join(said), has_header)


def _without_sep_line(content: str) -> tuple[str, int, str]:
    """Excel's first line `sep=;` says the delimiter: the rest, how many lines are gone, and that delimiter or ""."""
    match = re.match(r'"?sep=([^\r\n])"?[\t;|,]*(\r\n|\r|\n)', content, re.IGNORECASE)
    return (content[match.end():], 1, match[1]) if match else (content, 0, "")


# --------------------------------------------------------------------------- the delimiter


def find_delimiter(content: str, typed: list[str], prefers: str = "") -> str:
    """The delimiter that cuts most of the first rows into the same number of columns, two or more; "" where none cuts
    half of them so. One that finds known names in the first row goes before the others."""
    wanted = {columns.plain(name) for name in typed}
    best, most = "", (0, False, 0.5, False, -SAMPLE)
    start = content if len(content) <= SAMPLE_SIZE else _whole_lines(content)
    for delimiter in DELIMITERS:
        first, even, is_strict, n_odd = _sample(start, delimiter)
        cells = [columns.plain(cell) for cell in first]
        n_names = columns.known_names(first) + sum(cell in wanted for cell in cells)
        score = (n_names, even > 0.5 and delimiter == prefers, even, is_strict, -n_odd)
        if len(first) > 1 and even and score > most:
            best, most = delimiter, score
    return best


def _whole_lines(content: str) -> str:
    """The first lines of a long text, up to SAMPLE_SIZE; of one whose first line is longer, its beginning."""
    end = max(content.rfind(mark, 0, SAMPLE_SIZE) for mark in "\r\n") + 1
    return content[: end or SAMPLE_SIZE]


def _sample(content: str, delimiter: str) -> tuple[list[str], float, bool, int]:
    """The first row's cells; which part of the first rows have the most frequent number of columns, or 0 where that is
    one; is every quote there where this delimiter would have it; and how many rows have a cell with half a pair of
    quotes? Of the ways to read quotes, the most even one."""
    best: tuple[list[str], float, bool, int] = ([], 0.0, False, 0)
    for quoting in (QUOTED, LOOSE, UNQUOTED):
        counts: Counter[int] = Counter()
        first: list[str] = []
        n_odd = 0
        try:
            for _, cells in records(content, delimiter, **quoting):
                first = first or cells
                counts[len(cells)] += 1
                n_odd += any(cell.count('"') % 2 for cell in cells)
                if counts.total() == SAMPLE:
                    break
        except csv.Error:
            continue
        width, n = max(counts.items(), key=lambda item: (item[1], item[0]), default=(1, 0))
        even = n / counts.total() if width > 1 else 0.0
        if not best[0] or even > best[1]:
            best = first, even, quoting is QUOTED, n_odd
    return best


# --------------------------------------------------------------------------- quotes


def _cut(content: str, delimiter: str) -> tuple[list[Record], str]:
    """All rows, and how their quotes are meant, in words: the first way in which every row is sound and as wide as the
    others; where there is none, the one with the fewest others."""
    best: list[Record] = []
    fewest, style = len(content) + 1, ""
    for words, quoting in QUOTING.items():
        if quoting is not QUOTED and '"' not in content:
            break
        if quoting is ESCAPED and '\\"' not in content:
            continue
        try:
            found = list(records(content, delimiter, **quoting))
        except csv.Error:
            continue
        width = _width(found)
        n_ragged = sum(len(_trimmed(cells, width)) != width for _, cells in found)
        if delimiter == "\t":  # a tab is seldom part of a text: whole rows stand between two plain quotes
            n_ragged += sum(len(line.split(delimiter)) == width > 1
                            for _, cells in found for cell in cells for line in re.split("[\r\n]+", cell)[1:])
        if n_ragged < fewest:
            best, fewest, style = found, n_ragged, words
        if not n_ragged:
            break
    return best, style


def _width(found: list[Record]) -> int:
    """How many columns a table has: as many cells as most of its rows, and one less for each empty one at the end that
    every row has (a spreadsheet's delimiter at the end of each line)."""
    width = Counter(len(cells) for _, cells in found).most_common(1)[0][0] if found else 0
    while width > 1 and not any(cell.strip() for _, cells in found for cell in cells[width - 1 : width]):
        width -= 1
    return width


def _trimmed(cells: list[str], width: int) -> list[str]:
    """A row without the empty cells behind its last column."""
    n = len(cells)
    while n > width and not cells[n - 1].strip():
        n -= 1
    return cells[:n]


def _ragged(path: Path, line: int, cells: list[str], width: int, delimiter: str) -> str:
    mark = "a tab" if delimiter == "\t" else f"`{delimiter}`"
    return (f"{path}:{line}: {counted(len(cells), 'column')}, and most rows have {width}, in "
            f"{delimiter.join(cells)[:60]!r}; a text with {mark} in it stands in double quotes")


# --------------------------------------------------------------------------- the header

NUMBER = re.compile(r"[+-]?\d+([.,]\d+)?%?")


def is_header(first: list[str], others: list[list[str]], typed: list[str]) -> bool:
    """Does the first row name the columns? It does where it has a name that was typed, or a usual one; it does not
    where one of its cells is a number, is empty, or comes again in its column or in the row. Else it does where its
    cells are shorter than what stands below them, or a column has numbers below it."""
    wanted = {columns.plain(name) for name in typed if not name.isdigit()}
    if any(columns.plain(cell) in wanted for cell in first):
        return True
    if [cell for cell in first if cell] == [str(i) for i in range(len(first) - (not first[0]))]:
        return True  # 0, 1, ... are the names that a pandas table without names is written with
    if columns.known_names(first):  # `topic` may also be the first row's label
        return not any(cell and cell == row[i] for row in others for i, cell in enumerate(first))
    if any(not cell or NUMBER.fullmatch(cell) for cell in first) or len(set(first)) < len(first):
        return False
    below = [[row[i] for row in others] for i in range(len(first))]
    if not others or any(cell in column for cell, column in zip(first, below, strict=True)):
        return False
    if any(all(NUMBER.fullmatch(cell) for cell in column) for column in below):
        return True
    lengths = [sum(map(len, column)) / len(column) for column in below]
    i = max(range(len(first)), key=lambda i: lengths[i])  # the column of the texts, if there is one
    return len(first[i]) < 30 and 2 * len(first[i]) < lengths[i]
