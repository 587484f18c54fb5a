"""Are probabilities what they say? Of the sentences that a classifier is 0.8 sure of, 8 in 10 should be right.

No torch: N sentences, C classes, numpy.
"""

from dataclasses import dataclass

import numpy as np


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
    confidence, is_right = probabilities.max(1), probabilities.argmax(1) == labels
    edges = np.linspace(0, 1, n_bins + 1)
    at = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, n_bins - 1)
    found = []
    for i in range(n_bins):
        inside = at == i
        n = int(inside.sum())
        means = (float(confidence[inside].mean()), float(is_right[inside].mean())) if n else (float("nan"),) * 2
        found.append(Bin(float(edges[i]), float(edges[i + 1]), n, *means))
    return found


def ece(probabilities: np.ndarray, labels: np.ndarray, n_bins: int = 10) -> float:
    """The expected calibration error: how far confidence and accuracy lie apart, from 0 to 1, the mean over the
    sentences' bins (Guo et al. 2017, eq. 3)."""
    bins = [one for one in reliability(probabilities, labels, n_bins) if one.n]
    return float(sum(one.n * abs(one.confidence - one.accuracy) for one in bins) / len(labels))
