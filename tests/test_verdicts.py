"""training/verdicts.py: curves with known answers under the noise of a dev set, and what patience would have done."""

from collections import Counter

import numpy as np
import pytest
from curves import DRAWS, N, curves, flat_curves

from training import verdicts


def test_there_are_thirty_curves_of_every_verdict():
    count = Counter(curve.verdict for curve in curves())
    assert sum(count.values()) == 30 and len(count) == 7 and min(count.values()) >= 4


@pytest.mark.parametrize("curve", curves(), ids=lambda curve: curve.name)
def test_the_verdict_is_right_under_the_noise_of_a_dev_set(curve):
    """Of each curve, and so of each class, at least 0.9."""
    rng = np.random.default_rng(0)
    found = Counter(verdicts.verdict(curve.draw(rng), N).name for _ in range(DRAWS))
    assert found[curve.verdict] >= 0.9 * DRAWS, dict(found)


def test_a_flat_noisy_curve_is_not_overfitting():
    rng = np.random.default_rng(1)
    for curve in flat_curves():
        found = Counter(verdicts.verdict(curve.draw(rng), N).name for _ in range(DRAWS))
        assert found["overfitting"] < 0.05 * DRAWS, (curve.name, dict(found))
