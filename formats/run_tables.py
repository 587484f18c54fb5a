"""A table of past experiments, CSV, TSV or Markdown, to runs: one row a run, options in columns, one score."""

import csv
import re
from collections.abc import Sequence

from config import InputError
from formats import log_lines
from formats.past_run import NAMES, NUMBER, PastRun, name_of_column, plain

NAME_COLUMNS = {"", "run", "name", "try", "experiment", "exp", "id", "no", "nr", "trial", "model"}
# Columns of results and remarks, which are no options.
RESULT_WORDS = {"acc", "accuracy", "f1", "loss", "dev", "test", "train", "val", "valid", "validation", "score", "best",
                "time", "seconds", "minutes", "note", "notes", "comment", "comments", "remark", "result", "verdict",
                "rank", "date", "gap", "peak", "mae", "qwk"}
LONGEST = 1_000_000  # characters of one cell


def read_runs(text: str, name: str, score: str | None) -> tuple[list[PastRun], list[str]]:
    """The runs of all tables in a text, and a line for each row that has no score. `score`: the title of the column
    with the score; without it, the last column with numbers. No table: ([], []).

    Raises InputError for a table without a number, and where no column has the title.
    """
    runs: list[PastRun] = []
    faults: list[str] = []
    for header, rows in _markdown(text) or _separated(text, name):
        own, missing = _runs_of(header, rows, name, score)
        runs += own
        faults += missing
    return runs, faults


def _markdown(text: str) -> list[tuple[list[str], list[tuple[int, list[str]]]]]:
    """The Markdown tables of a text: each the titles of its columns, and its rows with their lines."""
    tables: list[tuple[list[str], list[tuple[int, list[str]]]]] = []
    before: list[str] | None = None
    is_open = False
    for number, line in log_lines.lines_of(text):
        is_in_table = "|" in line
        cells = [_decimal_point(cell, "|") for cell in log_lines.cells_of(line)] if is_in_table else []
        if is_in_table and before is not None and log_lines.is_ruler(cells):
            tables.append((before, []))
            is_open = True
        elif is_in_table and is_open:
            tables[-1][1].append((number, cells))
        else:
            is_open = False
        before = cells if is_in_table else None
    return tables


def _separated(text: str, name: str) -> list[tuple[list[str], list[tuple[int, list[str]]]]]:
    """The one table of a CSV or TSV file, as `_markdown` gives it. [] where the first line has one column only."""
    lines = text.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    first = next((line for line in lines if line.strip()), "")
    delimiter = max("\t;,", key=lambda sign: (first.count(sign), sign == "\t"))
    if not first.count(delimiter):
        return []
    csv.field_size_limit(LONGEST)
    reader = csv.reader(lines, delimiter=delimiter)
    rows: list[tuple[int, list[str]]] = []
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append((reader.line_num, [_decimal_point(log_lines.bare(cell), delimiter) for cell in cells]))
    except csv.Error as error:
        raise InputError(f"{name}:{reader.line_num}: this row cannot be read ({error})") from None
    if not rows:
        return []
    header = [cell.strip() for cell in rows[0][1]]
    if any(log_lines.is_row(line) for line in lines[:3]) or len(rows) < 2 or all(_number(cell) for cell in header):
        return []
    return [(header, rows[1:])]


def _decimal_point(cell: str, delimiter: str) -> str:
    """0,412 as 0.412, where the comma does not part the columns; between commas, a cell in quotes that begins so."""
    number = r"[-+]?0,\d+" if delimiter == "," else r"[-+]?\d+,\d+%?"
    return cell.replace(",", ".") if re.fullmatch(number, cell) else cell


def _number(cell: str) -> float | None:
    """The number in a cell, without the emoji, the arrow, the +- or the (words) behind it. 40.8% is 0.408. None for
    other text."""
    kept = re.sub(r"~~.{0,100}?~~", "", cell[:200])  # struck out
    kept = re.sub(r"\s*(±|\+-|\+/-|(?<=[\d%*])\s*\().{0,40}", "", kept)
    kept = "".join(sign for sign in kept if sign.isascii()).strip(" *_`~!?()")
    found = re.fullmatch(rf"({NUMBER})\s*(%?)", kept, re.IGNORECASE)
    return float(found[1]) / (100 if found[2] else 1) if found else None


def _runs_of(header: Sequence[str], rows: Sequence[tuple[int, list[str]]], name: str,
             score: str | None) -> tuple[list[PastRun], list[str]]:
    if not rows:
        return [], []
    at = _score_column(header, rows, name, score)
    names = [name_of_column(title) for title in header]
    runs, faults = [], []
    numeric = _numeric(header, rows)
    for number, cells in rows:
        if any(cell.strip() for cell in cells[len(header):]):
            faults.append(f"{name}:{number}: this row has {len(cells)} cells, and the table {len(header)} columns; the "
                          "row is left out")
            continue
        value = _number(cells[at]) if at < len(cells) else None
        if value is None:
            faults.append(f"{name}:{number}: there is no number in the column {header[at]!r}; the row is left out")
            continue
        own, found = "", {}
        for i, cell in enumerate(cells[:len(header)]):
            words = {*re.findall(r"[a-z0-9]+", header[i].casefold())}
            if header[i].casefold().strip("# .") in NAME_COLUMNS:
                own = own or cell
            elif i != at and cell and not _is_result(words, names[i], i in numeric):
                found[names[i]] = plain(log_lines.bare(cell))
        runs.append(PastRun(name=own[:200] or f"row {number}", source=f"{name}:{number}", options=found,
                            known_by="table", given=frozenset(found), score=value, score_column=header[at]))
    return runs, faults


def _is_result(words: set[str], name: str, is_numeric: bool) -> bool:
    """Is a column with these words in its title a result or a remark? `dev`, `test` and `train` are options too: with
    numbers in them they are results. So is a column without a title."""
    if name in NAMES.values():
        return is_numeric and len(words) == 1 and words <= RESULT_WORDS
    return not words or bool(words & RESULT_WORDS)


def _numeric(header: Sequence[str], rows: Sequence[tuple[int, list[str]]]) -> list[int]:
    """The columns with numbers in at least half of their filled cells."""
    found = []
    for i in range(len(header)):
        filled = [cells[i] for _, cells in rows if i < len(cells) and cells[i].strip(" -–—")]
        if 2 * sum(_number(cell) is not None for cell in filled) >= max(1, len(filled)):
            found.append(i)
    return found


def _score_column(header: Sequence[str], rows: Sequence[tuple[int, list[str]]], name: str, score: str | None) -> int:
    titles = [title.casefold().strip() for title in header]
    if score is not None:
        if score.casefold().strip() not in titles:
            raise InputError(f"{name}: there is no column {score!r}; there are {', '.join(header[:30])} (--score)")
        at = titles.index(score.casefold().strip())
    else:
        numeric = _numeric(header, rows)
        if not numeric:
            raise InputError(f"{name}: there is no column with numbers in the table; expected one row a run, with its "
                             "score (--score NAME)")
        at = numeric[-1]
    if not any(at < len(cells) and _number(cells[at]) is not None for _, cells in rows):
        raise InputError(f"{name}: there is no number in the column {header[at]!r} (--score)")
    return at
