"""What is odd about labelled sentences, before anything is trained on them: classes, copies, contradictions, lengths.

Nothing here imports torch. Everything takes time in proportion to the sentences: copies are found by their folded text.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from formats import holdout, words

SHORTEST = 1  # words: sentences with so many at most are listed


@dataclass(frozen=True)
class Part:
    """The N sentences of one split (train, dev, test) with their classes' numbers. `keys`: what is the same for all
    near copies of a sentence, see `holdout.without_marks`."""

    name: str
    path: Path
    texts: Sequence[str]
    labels: Sequence[int]
    lines: Sequence[int]  # of the file, from 1
    keys: Sequence[str] = field(default=())

    def __post_init__(self) -> None:
        if not self.keys:
            object.__setattr__(self, "keys", [holdout.without_marks(text) for text in self.texts])

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, name: str, rows: Sequence[int]) -> "Part":
        """The split of these rows, under another name."""
        return Part(name, self.path, [self.texts[i] for i in rows], [self.labels[i] for i in rows],
                    [self.lines[i] for i in rows], [self.keys[i] for i in rows])

    def place(self, row: int) -> str:
        """file:line of a sentence."""
        return f"{self.path.name}:{self.lines[row]}"


def balance(part: Part, n_classes: int) -> list[int]:
    """How many sentences each class has."""
    counts = Counter(part.labels)
    return [counts[label] for label in range(n_classes)]


# --------------------------------------------------------------------------- copies


@dataclass(frozen=True)
class Copies:
    """Of one split, how many sentences are copies of an earlier one in it: `exact` to the letter, `near` counts those
    too. `most`: a sentence with the most near copies and how many of them there are, itself included."""

    exact: int
    near: int
    most: str
    n_most: int


def copies_inside(part: Part) -> Copies:
    """Copies inside a split."""
    counts = Counter(part.keys)
    key, n = counts.most_common(1)[0]
    return Copies(len(part) - len(set(part.texts)), len(part) - len(counts), part.texts[part.keys.index(key)], n)


@dataclass(frozen=True)
class Leak:
    """How many sentences of a split are in another one (train): `exact` to the letter, `near` counts those too;
    `same_label`: of the near ones, those whose label a copy in train has as well. `rows`: the near ones."""

    exact: int
    near: int
    same_label: int
    rows: tuple[int, ...]


def leak(train: Part, part: Part) -> Leak:
    """Sentences of `part` that are in train."""
    known: dict[str, set[int]] = defaultdict(set)
    for key, label in zip(train.keys, train.labels, strict=True):
        known[key].add(label)
    rows = tuple(row for row, key in enumerate(part.keys) if key in known)
    texts = set(train.texts)
    return Leak(sum(part.texts[row] in texts for row in rows), len(rows),
                sum(part.labels[row] in known[part.keys[row]] for row in rows), rows)


@dataclass(frozen=True)
class Contradiction:
    """Near copies of one sentence with more than one label: (split, row) of each."""

    places: tuple[tuple[str, int], ...]


def contradictions(parts: Mapping[str, Part]) -> list[Contradiction]:
    """The sentences that stand in the data with different labels, inside a split or across them, in the order in which
    they first occur."""
    labels: dict[str, set[int]] = defaultdict(set)
    for part in parts.values():
        for key, label in zip(part.keys, part.labels, strict=True):
            labels[key].add(label)
    found: dict[str, list[tuple[str, int]]] = {key: [] for key, several in labels.items() if len(several) > 1}
    for name, part in parts.items():
        for row, key in enumerate(part.keys):
            if key in found:
                found[key].append((name, row))
    return [Contradiction(tuple(places)) for places in found.values()]


# --------------------------------------------------------------------------- lengths


def short_ones(part: Part) -> tuple[list[int], list[int]]:
    """The rows without any word (nothing but marks), and those of one word."""
    counts = [words.count(text) for text in part.texts]
    return ([row for row, n in enumerate(counts) if n < SHORTEST], [row for row, n in enumerate(counts)
                                                                    if n == SHORTEST])


def n_cut(lengths: np.ndarray, limit: int) -> int:
    """How many of the lengths (N,) are above a limit."""
    return int((lengths > limit).sum())


def limits_worth_a_look(lengths: np.ndarray, most: int = 3) -> list[int]:
    """Limits that cut some sentences and not most of them: powers of two below the longest, the largest first."""
    longest = int(lengths.max())
    limits = [2**k for k in range(20, 2, -1) if 2**k < longest]
    return [limit for limit in limits if 2 * n_cut(lengths, limit) < len(lengths)][:most]


# --------------------------------------------------------------------------- the hardest


def hardest(probabilities: np.ndarray, labels: Sequence[int], most: int) -> list[int]:
    """The rows whose label has the lowest probability, of (N, C), the lowest first."""
    of_label = probabilities[np.arange(len(labels)), np.asarray(labels)]
    return np.argsort(of_label, kind="stable")[:most].tolist()
