"""Where a classifier is wrong: its surest mistakes, the classes that it confuses, its accuracy by length and by class.

No torch: N sentences, C classes, numpy.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np


def surest_mistakes(probabilities: np.ndarray, labels: np.ndarray, most: int) -> list[int]:
    """The rows of (N, C) that are wrong, the most confident first. Of log-probabilities they are the same."""
    predicted = probabilities.argmax(1)
    wrong = np.flatnonzero(predicted != labels)
    return wrong[np.argsort(-probabilities[wrong, predicted[wrong]], kind="stable")][:most].tolist()


@dataclass(frozen=True)
class Confused:
    """Two classes that are taken for each other, more often than any others: how many sentences of `first` are taken
    for `second`, and the other way round."""

    first: int
    second: int
    as_second: int
    as_first: int


def most_confused_pair(labels: np.ndarray, predicted: np.ndarray) -> Confused | None:
    """The pair with the most mistakes in both directions together; None where nothing is wrong."""
    ways = Counter((a, b) for a, b in zip(labels.tolist(), predicted.tolist(), strict=True) if a != b)
    if not ways:
        return None
    pairs = Counter[tuple[int, int]]()
    for (a, b), n in ways.items():
        pairs[min(a, b), max(a, b)] += n
    a, b = min(pairs, key=lambda pair: (-pairs[pair], pair))
    first, second = (a, b) if ways[a, b] >= ways[b, a] else (b, a)
    return Confused(first, second, ways[first, second], ways[second, first])


@dataclass(frozen=True)
class Group:
    """The n sentences of `shortest` to `longest` tokens, and the share of them that is right."""

    shortest: int
    longest: int
    n: int
    accuracy: float


def by_length(lengths: np.ndarray, is_right: np.ndarray, most: int = 4) -> list[Group]:
    """The sentences in `most` groups of about the same size at most, from short to long; sentences of one length are
    in one group. Both arguments (N,)."""
    edges = np.unique(np.quantile(lengths, np.linspace(0, 1, most + 1)[1:], method="lower"))
    place = np.searchsorted(edges, lengths, side="left")
    return [Group(int(lengths[place == i].min()), int(lengths[place == i].max()), int((place == i).sum()),
                  float(is_right[place == i].mean())) for i in range(len(edges)) if (place == i).any()]
