"""Are probabilities what they say? Of the sentences that a classifier is 0.8 sure of, 8 in 10 should be right.

No torch: N sentences, C classes, numpy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LOWEST, HIGHEST = 0.01, 100.0  # temperatures that are looked at
CHANCE_DRAWS = 200


@dataclass(frozen=True)
class Bin:
    """The n sentences whose confidence (the probability of the class that was predicted) is above `low` and at most
    `high`: their mean confidence, and the share that is right; both NaN where there are none."""

    low: float
    high: float
    n: int
    confidence: float
    accuracy: float


def reliability(probabilities: np.ndarray, labels: np.ndarray, n_bins: int = 10) -> list[Bin]:
    """The bins of a reliability diagram, equally wide, from probabilities (N, C) and labels (N,)
    (Guo et al. 2017, arXiv 1706.04599, section 2)."""
    confidence, right = _confidence(probabilities, labels)
    return _bins(confidence, right, n_bins)


def ece(probabilities: np.ndarray, labels: np.ndarray, n_bins: int = 10) -> float:
    """The expected calibration error: how far confidence and accuracy lie apart, from 0 to 1, the mean over the
    sentences' bins (Guo et al. 2017, eq. 3)."""
    return error_of(reliability(probabilities, labels, n_bins))


def error_of(bins: Sequence[Bin]) -> float:
    """The expected calibration error of a diagram's bins, 0 to 1; those without a sentence do not count."""
    total = sum(one.n for one in bins)
    return sum(one.n * abs(one.accuracy - one.confidence) for one in bins if one.n) / total if total else 0.0


def ece_by_chance(probabilities: np.ndarray, n_bins: int = 10) -> float:
    """The ECE that these probabilities (N, C) would show if they were exactly true, for the sentences are few: the mean
    of CHANCE_DRAWS draws of which are right."""
    confidence = probabilities.max(1)
    random = np.random.default_rng(0)
    return float(np.mean([error_of(_bins(confidence, random.random(len(confidence)) < confidence, n_bins))
                          for _ in range(CHANCE_DRAWS)]))


def temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T whose softmax(logits / T) has the lowest mean NLL of the labels (N,), from 0.01 to 100 (Guo et al. 2017,
    eq. 9). Above 1 the classifier is too sure of itself, below 1 it is not sure enough.

    `logits` (N, C): or log-probabilities, which are logits. A probability p becomes one by log(p).
    """
    # In b = 1 / T the NLL is convex, so its slope rises and has one zero, which halving an interval finds.
    scores = _finite(logits)
    of_label = scores[np.arange(len(labels)), labels]

    def slope(b: float) -> float:
        """d NLL / d b: the mean score under softmax(b * scores), minus the score of the label."""
        return float(((_softmax(b * scores) * scores).sum(1) - of_label).mean())

    low, high = 1 / HIGHEST, 1 / LOWEST
    if slope(low) >= 0:
        return HIGHEST
    if slope(high) <= 0:
        return LOWEST
    for _ in range(100):
        middle = float(np.sqrt(low * high))
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return 1 / float(np.sqrt(low * high))


def scaled(logits: np.ndarray, t: float | np.ndarray) -> np.ndarray:
    """Probabilities (N, C) of logits or log-probabilities at a temperature: one number, or one for each row (N, 1)."""
    return _softmax(_finite(logits) / t)


@dataclass(frozen=True)
class Mended:
    """ECE without and with a temperature. `t`: fitted on all sentences. `after`: each half of the sentences with the
    temperature that was fitted on the other half, for fitting and measuring on the same sentences flatters."""

    t: float
    before: float
    after: float
    by_chance: float
    halves: tuple[float, float]  # the temperatures of the two halves

    def helps(self) -> bool:
        """Not where there is nothing but chance to mend, and not where it makes the ECE no smaller."""
        return self.before > self.by_chance and self.after < self.before


def mended(logits: np.ndarray, labels: np.ndarray, n_bins: int = 10) -> Mended:
    """What a temperature does for logits (N, C), N of 2 or more: two-fold cross-validation, the halves drawn at random.
    """
    order = np.random.default_rng(0).permutation(len(labels))
    halves = order[::2], order[1::2]
    fitted = [temperature(logits[rows], labels[rows]) for rows in halves]
    t = np.empty((len(labels), 1))
    t[halves[0]], t[halves[1]] = fitted[1], fitted[0]
    now = scaled(logits, 1.0)
    return Mended(temperature(logits, labels), ece(now, labels, n_bins), ece(scaled(logits, t), labels, n_bins),
                  ece_by_chance(now, n_bins), (fitted[0], fitted[1]))


# --------------------------------------------------------------------------- parts of it


def _confidence(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return probabilities.max(1), probabilities.argmax(1) == labels


def _bins(confidence: np.ndarray, right: np.ndarray, n_bins: int) -> list[Bin]:
    edges = np.linspace(0, 1, n_bins + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, n_bins - 1)
    n = np.bincount(place, minlength=n_bins)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN
        mean = np.bincount(place, confidence, n_bins) / n
        accuracy = np.bincount(place, right, n_bins) / n
    return [Bin(float(edges[i]), float(edges[i + 1]), int(n[i]), float(mean[i]), float(accuracy[i]))
            for i in range(n_bins)]


def _finite(logits: np.ndarray) -> np.ndarray:
    """In float64; a class that is impossible (minus infinity) is only extremely unlikely."""
    return np.maximum(np.asarray(logits, dtype=np.float64), -1e9)


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)
