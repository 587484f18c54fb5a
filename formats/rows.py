"""Rows of named cells, and two formats that name them themselves: JSON lines and Parquet."""

import io
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import InputError, counted
from formats import text

SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character, which JSON can write and UTF-8 cannot


@dataclass(frozen=True)
class Rows:
    """The cells of a table, row by row. A cell is None where the row has no such value. `lines`: where each row begins
    in the file, from 1 (Parquet: the row). Without a header the columns are called 1, 2, 3, ..."""

    columns: list[str]
    cells: list[list[str | None]]
    lines: list[int]
    description: str
    has_header: bool = True

    def column(self, i: int) -> list[str | None]:
        return [row[i] for row in self.cells]


def refuse(faults: list[str], n: int = 0) -> None:
    """Raises InputError that lists the first ten faults and counts the others; without a fault, nothing. `n`: how many
    there are, where only the first are given."""
    if faults:
        n = max(n, len(faults))
        more = [f"... and {counted(n - 10, 'more line')} with such a fault"] if n > 10 else []
        raise InputError("\n".join(faults[:10] + more))


def cell_of(value: Any) -> str | None:
    """A value of JSON or Parquet as a CSV file would write it. None for none, and for a number that is none (NaN).
    Raises ValueError for a list or an object."""
    if value is None or isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, list | dict):
        raise ValueError(f"is a {'list' if isinstance(value, list) else 'JSON object'}")
    return SURROGATE.sub("\ufffd", str(value))


# --------------------------------------------------------------------------- JSON lines


def read_jsonl(path: Path, content: str) -> Rows:
    """One JSON object a line; its keys are the columns, those of all lines together. Raises InputError, with the lines,
    for what is no JSON object."""
    records, lines, faults = [], [], []
    for number, line in text.numbered_lines(content):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            faults.append(f"{path}:{number}: not JSON ({error}); expected one object a line, such as "
                          '{"text": "a fine film", "label": "good"}')
            continue
        if isinstance(value, dict):
            records.append(value)
            lines.append(number)
        else:
            faults.append(f"{path}:{number}: a JSON {type(value).__name__}; expected one object a line, such as "
                          '{"text": "a fine film", "label": "good"}')
    refuse(faults)
    columns = list(dict.fromkeys(key for record in records for key in record))
    return _rows_of(columns, [[record.get(name) for name in columns] for record in records], lines, "JSON lines")


def _rows_of(columns: list[str], values: list[list[Any]], lines: list[int], description: str) -> Rows:
    """Rows of plain values. A column with a list or an object in it is left out: it is neither text nor label."""
    nested = {i for row in values for i, value in enumerate(row) if isinstance(value, list | dict)}
    kept = [i for i in range(len(columns)) if i not in nested]
    return Rows([columns[i] for i in kept], [[cell_of(row[i]) for i in kept] for row in values], lines, description)


# --------------------------------------------------------------------------- Parquet


def read_parquet(path: Path, raw: bytes) -> Rows:
    """A Parquet file, through pyarrow. Raises InputError where pyarrow is missing, and for a damaged file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(f"{path}: a Parquet file is read with pyarrow, which is not installed: pip install pyarrow"
                         ) from None
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(raw))
        values = [column.to_pylist() for column in table.columns]
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: pyarrow cannot read this as Parquet ({str(error).splitlines()[0]})") from None
    rows = [list(row) for row in zip(*values, strict=True)]
    return _rows_of(table.column_names, rows, list(range(1, len(rows) + 1)), "Parquet")
