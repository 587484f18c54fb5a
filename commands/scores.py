"""Scores as a person reads them: lines and aligned tables, wide characters counted as such."""

import unicodedata
from collections.abc import Sequence

import numpy as np

from training.comparisons import Difference
from training.metrics import Baseline, ClassScores, Paired

NAME_WIDTH = 24  # columns that a class's name has
HEAD_WIDTH = 8  # of a column of the matrix; where a name is longer, the columns have numbers
MATRIX_CLASSES = 12  # of more, the matrix is too wide for a terminal
TABLE_CLASSES = 30  # of more, the table has only the worst
PAIRS = 10  # that are confused most
CHANCE = 0.05  # how often chance may pass for a difference

# --------------------------------------------------------------------------- lines


def baselines_text(found: Baseline) -> str:
    """The baselines of one split, as they are printed."""
    return f"majority {found.majority:.3f}, tf-idf + logistic regression {found.tfidf:.3f}"


def comparison(found: Paired, n: int) -> str:
    """How much better than the baseline on n sentences, and whether chance explains it."""
    return (f"{(found.only_first - found.only_second) / n:+.3f}, {_verdict(found.p)} (right where it is wrong "
            f"{found.only_first}, wrong where it is right {found.only_second}; exact McNemar p {p_text(found.p)})")


def gain(found: Difference) -> str:
    """How much an ensemble gains, with the interval, and whether chance explains it."""
    return f"{found.words()}, {_verdict(found.p)}"


def _verdict(p: float) -> str:
    return "more than chance" if p < CHANCE else "within chance"


def p_text(p: float) -> str:
    """= 0.034, or < 1e-99."""
    return "< 1e-99" if p < 1e-99 else f"= {p:.1g}" if p < 0.01 else f"= {p:.2g}"


# --------------------------------------------------------------------------- tables


def width(text: str) -> int:
    """How many columns of a terminal a text takes: Chinese, Japanese and Korean characters take two, and marks that
    are put on the character before take none."""
    return sum(0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else 1 + (unicodedata.east_asian_width(c) in "WF")
               for c in text)


def fitted(text: str, columns: int) -> str:
    """The text in exactly so many columns: filled up with spaces, or cut, with … for what is left out."""
    if width(text) > columns:
        while width(text) > columns - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (columns - width(text))


def class_table(found: ClassScores, names: Sequence[str]) -> list[str]:
    """Precision, recall, F1 and n of each class, a line each; of more than TABLE_CLASSES, of those with the lowest F1
    (a class that is neither in the labels nor predicted has none)."""
    rows, title = list(range(len(names))), ""
    if len(names) > TABLE_CLASSES:
        ranked = np.argsort(found.f1, kind="stable")  # NaN is last
        rows = [int(row) for row in ranked if found.n[row] or not np.isnan(found.f1[row])][:TABLE_CLASSES]
        title = f"of {len(names)} classes, the {len(rows)} with the lowest F1"
    columns = _name_columns([names[row] for row in rows])
    lines = [title] if title else []
    lines.append(fitted("", columns) + "  precision  recall     f1       n")
    for row in rows:
        precision, recall, f1 = ("-" if np.isnan(value) else f"{value:.3f}" for value in (
            found.precision[row], found.recall[row], found.f1[row]))
        lines.append(f"{fitted(names[row], columns)}  {precision:>9}  {recall:>6}  {f1:>5}  {found.n[row]:>6}")
    return lines


def matrix(counts: Sequence[Sequence[int]], names: Sequence[str]) -> list[str]:
    """The confusion matrix: a row for each true class, a column for each prediction. Its columns are headed with the
    names, or where one is too long for that with numbers, which then stand in front of the rows too."""
    heads, rows = list(names), list(names)
    if max(map(width, names)) > HEAD_WIDTH:
        heads = [str(i) for i in range(len(names))]
        rows = [f"{i:>{len(heads[-1])}} {name}" for i, name in enumerate(names)]
    columns = _name_columns(rows)
    cell = max(*map(width, heads), *(len(str(count)) for row in counts for count in row))
    lines = [fitted("", columns) + "".join("  " + " " * (cell - width(head)) + head for head in heads)]
    for row, line in zip(rows, counts, strict=True):
        lines.append(fitted(row, columns) + "".join(f"  {count:>{cell}}" for count in line))
    return lines


def confused_pairs(pairs: Sequence[tuple[int, int, int]], n: np.ndarray, names: Sequence[str]) -> list[str]:
    """The pairs of `metrics.most_confused`, a line each. `n` (C,): how many examples each class has."""
    columns = _name_columns([names[i] for pair in pairs for i in pair[:2]])
    return [f"{fitted(names[label], columns)}  taken for  {fitted(names[guess], columns)}  {count:>5} of {n[label]}"
            for label, guess, count in pairs]


def _name_columns(names: Sequence[str]) -> int:
    return min(NAME_WIDTH, max(map(width, names), default=0))
