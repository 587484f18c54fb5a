"""The texts of a file with their labels, in whatever format it is, and the labels' names from a JSON file."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from config import InputError
from formats import columns, delimited, rows
from formats.columns import Usual
from formats.rows import Rows, refuse
from formats.text import decode, decode_any, numbered_lines, read_bytes, read_text, split_lines

__all__ = ["SEPARATOR", "Table", "decode", "read_label_names", "read_table", "read_text", "split_lines"]

SEPARATOR = " ||| "
FORMAT = "expected `label ||| sentence`, for example `3 ||| a charming film`"
KINDS = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".txt": "plain"}


@dataclass(frozen=True)
class Table:
    """The texts of a file, in its order, and their labels as the file writes them (None where there are none)."""

    path: Path
    texts: list[str]
    labels: list[str] | None
    lines: list[int]  # the line of the file where each begins, from 1 (Parquet: the row)
    description: str  # one line for a person: "CSV, delimiter `;`, gb18030, text in 评论, label in 标签"
    is_plain: bool  # `label ||| sentence`, or one sentence a line
    encoding: str = "utf-8"
    columns: tuple[str, ...] = ()  # all that there are


def read_table(path: str | Path, text_column: str | None = None, label_column: str | None = None, *,
               labelled: bool = True, usual: Usual = (None, None)) -> Table:
    """The texts of a file: `label ||| sentence` lines, CSV, TSV, JSON lines or Parquet, each also compressed with gzip.

    Space around a text or a label is no part of it. With `labelled=False`, a row without a label has "" for it;
    plain lines without ` ||| ` are one text each, and an empty one stays. `usual`: the columns that are taken where
    none was typed and the table has them. Raises InputError with the file and the
    lines: for rows of another width than the first, empty texts and labels, invalid JSON, bytes in no known encoding,
    a column that is not there or cannot be told, and a file without a row.
    """
    path = Path(path)
    raw = read_bytes(path)
    typed = [name for words in (text_column, label_column, *usual) for name in columns.typed_names(words)]
    if raw.startswith(b"PAR1") or kind_by_name(path) == "parquet":
        encoding, found = "utf-8", rows.read_parquet(path, raw)
    else:
        content, encoding = decode_any(raw, path)
        kind = kind_of(path, content, typed, labelled)
        if kind == "plain":
            return _plain(path, content, encoding, labelled)
        if kind == "jsonl":
            found = rows.read_jsonl(path, content)
        else:
            found = delimited.read_delimited(path, content, typed, "\t" if kind == "tsv" else "")
    if not found.cells:
        raise InputError(f"{path}: there is no row in the file{' below its header' if found.has_header else ''}")
    at, label = columns.find(path, found, text_column, label_column, labelled, usual)
    return _of_columns(path, found, at, label, labelled, encoding)


def kind_by_name(path: Path) -> str:
    """plain, csv, tsv, jsonl or parquet by the end of the name (in front of .gz); "" where that says nothing."""
    name = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return KINDS.get(name.suffix.lower(), "")


def kind_of(path: Path, content: str, typed: list[str], labelled: bool) -> str:
    """plain, csv, tsv or jsonl: by the file's name, else by what is in it. A .txt is plain lines, but where no line has
    a ` ||| `, and columns were typed or the first line names both (a spreadsheet's "Unicode text")."""
    kind = kind_by_name(path)
    if kind not in ("", "plain"):
        return kind
    start = [line for line in split_lines(content[:20_000]) if line.strip()][:20]
    if any(SEPARATOR in line for line in start):
        return "plain"
    if not kind and start and start[0].lstrip().startswith("{"):
        return "jsonl"
    if typed:
        return "csv"
    delimiter = delimited.find_delimiter(content, typed)
    names = columns.known_names(start[0].split(delimiter)) if delimiter else 0
    # Commas alone make no table of a person's sentences.
    needed = 0 if labelled and not kind else 1 if not kind else 2
    return "csv" if delimiter and names >= needed else "plain"


# --------------------------------------------------------------------------- plain lines


def _plain(path: Path, content: str, encoding: str, labelled: bool) -> Table:
    """`label ||| sentence` lines; blank ones are skipped. A sentence may hold ` ||| ` again."""
    lines = numbered_lines(content)
    if not labelled and not (lines and all(SEPARATOR in line for _, line in lines)):
        every = split_lines(content)
        if not every[-1]:
            every.pop()  # behind the last line's end there is no line
        if not every:
            raise InputError(f"{path}: there is no sentence in it; write one a line")
        return Table(path, [line.strip() for line in every], None, list(range(1, len(every) + 1)),
                     f"one sentence a line, {encoding}", True, encoding)
    labels, sentences, faults = [], [], []
    for number, line in lines:
        label, separator, sentence = (part.strip() for part in line.partition(SEPARATOR))
        labels.append(label)
        sentences.append(sentence)
        if not separator:
            faults.append(f"{path}:{number}: no ` ||| ` in {line[:60]!r}; {FORMAT}")
        elif not label:
            faults.append(f"{path}:{number}: the label is empty; {FORMAT}")
        elif not sentence:
            faults.append(f"{path}:{number}: the sentence is empty; {FORMAT}")
    refuse(faults)
    if not sentences:
        raise InputError(f"{path}: there is no sentence in the file; {FORMAT}")
    return Table(path, sentences, [one_line(label) for label in labels], [number for number, _ in lines],
                 f"`label ||| sentence`, {encoding}", True, encoding)


# --------------------------------------------------------------------------- columns


def _of_columns(path: Path, found: Rows, at: list[int], label: int | None, labelled: bool, encoding: str) -> Table:
    """The texts, from the columns `at`, and the labels, from the column `label`, of rows with named cells."""
    texts = [" ".join(part for i in at if (part := (row[i] or "").strip())) for row in found.cells]
    labels = [one_line(row[label] or "") for row in found.cells] if label is not None else None
    names = {i: found.columns[i] or str(i + 1) for i in [*at, *([] if label is None else [label])]}
    faults = []
    for number, row, sentence in zip(found.lines, found.cells, texts, strict=True):
        for i in [*at, *([label] if label is not None and labelled else [])]:
            if row[i] is None and (labelled or len(at) == 1):
                faults.append(f"{path}:{number}: there is no {names[i]!r} in this row")
                break
        else:
            if labelled and not sentence:
                faults.append(f"{path}:{number}: the text in {' and '.join(repr(names[i]) for i in at)} is empty")
            elif labelled and label is not None and not (row[label] or "").strip():
                faults.append(f"{path}:{number}: the label in {names[label]!r} is empty")
    refuse(faults)
    if labels is not None and not any(labels):
        labels = None
    kind = found.description if found.description in ("JSON lines", "Parquet") else f"CSV, {found.description}"
    said = [kind, encoding, f"text in {' and '.join(names[i] for i in at)}"]
    said += [f"label in {names[label]}"] if label is not None else []
    return Table(path, texts, labels, found.lines, ", ".join(said), False, encoding,
                 tuple(name or str(i + 1) for i, name in enumerate(found.columns)))


def one_line(label: str) -> str:
    """A label with its spaces and line ends as single spaces."""
    return re.sub(r"\s+", " ", label).strip()


# --------------------------------------------------------------------------- the labels' names


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
