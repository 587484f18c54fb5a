"""Which column of a table has the texts, and which the labels: by the name that was typed, by the usual names, else by
what is in them."""

import difflib
import re
from pathlib import Path

from config import InputError
from formats.rows import Rows

# As they are compared: without case, spaces, `_` and `-`. The first name of each list settles it; two others are a
# doubt.
TEXT = ("text", "sentence", "review", "content", "comment", "body", "tweet", "message", "texts", "sentences", "reviews",
        "comments", "tweets", "messages", "reviewtext", "reviewbody", "headline", "utterance", "document",
        "文本", "句子", "评论", "内容", "评价", "正文", "文字", "评论内容", "text文本")
LABEL = ("label", "class", "sentiment", "category", "target", "rating", "stars", "score", "labels", "ratings",
         "intent", "topic", "polarity", "emotion", "classification",
         "标签", "类别", "情感", "分类", "评分", "星级", "情绪", "类型", "极性")


Usual = tuple[str | None, str | None]  # the columns of texts and of labels, as they were once typed


def plain(name: str) -> str:
    """A column's name as names are compared."""
    return re.sub(r"[\s_-]+", "", name).casefold()


def known_names(cells: list[str]) -> int:
    """How many of these cells are usual names of a column of texts or labels."""
    return sum(plain(cell) in TEXT or plain(cell) in LABEL for cell in cells)


def typed_names(typed: str | None) -> list[str]:
    """The names in `a,b`, and the whole too, which is one name where a column is called so."""
    return [] if typed is None else [typed.strip(), *(part.strip() for part in typed.split(","))]


# --------------------------------------------------------------------------- found


def find(path: Path, rows: Rows, text_column: str | None, label_column: str | None, labelled: bool,
         usual: Usual = (None, None)) -> tuple[list[int], int | None]:
    """The columns that make the text, in their order, and that of the labels. `labelled`: labels are needed; else they
    are looked for by their name alone. `usual`: the columns of texts and labels that are taken where none was typed and
    the table has them. Raises InputError that shows the columns."""
    text_column, label_column = (typed or (name if _has(rows, name) else None) for typed, name in zip(
        (text_column, label_column), usual, strict=True))
    label = _typed(path, rows, "label_column", label_column)[0] if label_column else None
    text = [i for name in _split(rows, text_column) for i in _typed(path, rows, "text_column", name)]
    if label is not None and label in text:
        raise InputError(f"{path}: --text_column and --label_column both name the column {_shown(rows, label)}")
    if label is None:
        by_name = _named(rows, LABEL, text)
        label = by_name[0] if len(by_name) == 1 else None
    if not text:
        by_name = _named(rows, TEXT, [label])
        text = by_name if len(by_name) == 1 else _texts_by_content(rows, by_name or _others(rows, [label]))
    if label is None and labelled and text:
        label = _label_by_content(rows, _named(rows, LABEL, text) or _others(rows, text))
    if not text or labelled and label is None:
        what = "texts" if not text else "labels"
        listed = "\n".join(f"  {_shown(rows, i)}, for example {_example(rows, i)}" for i in range(len(rows.columns)))
        raise InputError(f"{path}: which column has the {what}? Say it with --text_column NAME --label_column NAME "
                         f"({'names' if rows.has_header else 'here numbers'}). The columns are:\n{listed}")
    return text, label


def _has(rows: Rows, typed: str | None) -> bool:
    """Does the table have all the columns that these words name?"""
    there = set(map(plain, rows.columns)) if rows.has_header else set()
    return typed is not None and all(plain(name) in there for name in _split(rows, typed))


def _split(rows: Rows, typed: str | None) -> list[str]:
    """--text_column a,b is two columns, where none is called `a,b`."""
    if typed is None:
        return []
    return [typed] if typed.strip() in map(str.strip, rows.columns) else [part for part in typed.split(",") if part]


def _typed(path: Path, rows: Rows, option: str, name: str) -> list[int]:
    """The column that an option names: exactly, else in other case, else by its number."""
    name = name.strip()
    exact = [i for i, column in enumerate(rows.columns) if column.strip() == name]
    found = exact or [i for i, column in enumerate(rows.columns) if plain(column) == plain(name)]
    if not found and name.isascii() and name.isdigit() and 1 <= int(name) <= len(rows.columns):
        found = [int(name) - 1]
    if len(found) == 1:
        return found
    if found:
        raise InputError(f"{path}: --{option} {name}: {len(found)} columns are called so; give its number, from 1")
    there = ", ".join(_shown(rows, i) for i in range(len(rows.columns)))
    known = {plain(column): column for column in rows.columns}
    near = difflib.get_close_matches(plain(name), known, n=1, cutoff=0.6)
    hint = f"; did you mean {known[near[0]]}?" if near and rows.has_header else ""
    header = "" if rows.has_header else "the file has no header, so a column is named by its number; "
    raise InputError(f"{path}: --{option} {name}: there is no such column; {header}the columns are {there}{hint}")


def _named(rows: Rows, names: tuple[str, ...], taken: list[int] | list[int | None]) -> list[int]:
    """The columns with one of these names; the first name alone where a column has it."""
    if not rows.has_header:
        return []
    found = [i for i in _others(rows, taken) if plain(rows.columns[i]) in names]
    return [i for i in found if plain(rows.columns[i]) == names[0]] or found


def _others(rows: Rows, taken: list[int] | list[int | None]) -> list[int]:
    return [i for i in range(len(rows.columns)) if i not in taken]


def _texts_by_content(rows: Rows, candidates: list[int]) -> list[int]:
    """The one column that is alone, or has long and mostly different values while the others have short ones; else
    []."""
    if len(candidates) == 1:
        return candidates
    lengths = {i: _mean_length(rows, i) for i in candidates}
    ranked = sorted(candidates, key=lambda i: -lengths[i])
    longest = ranked[0] if ranked else -1
    if not ranked or not rows.cells or lengths[longest] < 2 * lengths[ranked[1]] or lengths[longest] < 6:
        return []
    return [longest] if 2 * len(set(rows.column(longest))) > len(rows.cells) else []


def _label_by_content(rows: Rows, candidates: list[int]) -> int | None:
    """The one column that is alone, or has few different values while the others have many, or one; else None."""
    if len(candidates) == 1:
        return candidates[0]
    few = [i for i in candidates if 2 <= len(set(rows.column(i))) <= max(2, min(len(rows.cells) // 2, 100))
           and _mean_length(rows, i) < 40]
    return few[0] if len(few) == 1 else None


def _mean_length(rows: Rows, i: int) -> float:
    return sum(len(cell or "") for cell in rows.column(i)) / max(1, len(rows.cells))


def _shown(rows: Rows, i: int) -> str:
    return rows.columns[i] or f"number {i + 1}, without a name"


def _example(rows: Rows, i: int) -> str:
    value = next((cell for cell in rows.column(i) if cell), "")
    return repr(value if len(value) <= 40 else value[:37] + "...")
