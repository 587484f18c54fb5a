"""training/calibration.py: ECE by hand, its bounds, and the temperature against scipy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from training import calibration


def two_classes(confidences) -> np.ndarray:
    return np.array([[c, 1 - c] for c in confidences])


def test_ece_of_a_case_that_is_counted_by_hand():
    """Four sentences at 0.75, of which two are right; two at 0.95, both right: (4 * 0.25 + 2 * 0.05) / 6."""
    p = two_classes([0.75] * 4 + [0.95] * 2)
    labels = np.array([0, 0, 1, 1, 0, 0])
    assert calibration.ece(p, labels) == pytest.approx((4 * 0.25 + 2 * 0.05) / 6)
    bins = calibration.reliability(p, labels)
    assert len(bins) == 10 and [one.n for one in bins] == [0] * 7 + [4, 0, 2]
    assert (bins[7].accuracy, bins[7].confidence) == pytest.approx((0.5, 0.75))
    assert (bins[9].accuracy, bins[9].confidence) == pytest.approx((1, 0.95)) and np.isnan(bins[0].accuracy)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(2, 60), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_ece_is_the_definition_and_lies_between_0_and_1(n, n_classes, n_bins, seed):
    random = np.random.default_rng(seed)
    p, labels = random.dirichlet(np.ones(n_classes) / 3, n), random.integers(n_classes, size=n)
    confidence, right = p.max(1), p.argmax(1) == labels
    want = 0.0
    for i in range(n_bins):
        inside = (confidence > i / n_bins) & (confidence <= (i + 1) / n_bins)
        if inside.any():
            want += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    found = calibration.ece(p, labels, n_bins)
    assert 0 <= found <= 1 and found == pytest.approx(want, abs=1e-9)
    assert found >= abs(confidence.mean() - right.mean()) - 1e-9, "what the mean alone shows"
    bins = calibration.reliability(p, labels, n_bins)
    assert sum(one.n for one in bins) == n
    assert sum(one.n * one.accuracy for one in bins if one.n) == pytest.approx(right.sum())
    assert calibration.ece(p, p.argmax(1), 1) == pytest.approx(1 - confidence.mean(), abs=1e-9)


@pytest.mark.parametrize("n_classes", [2, 5, 60])
@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_the_temperature_is_scipys(n_classes, factor):
    random = np.random.default_rng(n_classes)
    logits = random.normal(size=(400, n_classes)) * 2
    labels = np.array([random.choice(n_classes, p=row) for row in softmax(logits, 1)])
    logits *= factor  # the logits that the labels were drawn from, too large or too small
    want = minimize_scalar(lambda t: -log_softmax(logits / t, 1)[np.arange(400), labels].mean(), bounds=(0.05, 50),
                           method="bounded", options={"xatol": 1e-8}).x
    assert calibration.temperature(logits, labels) == pytest.approx(want, rel=1e-4)
    assert calibration.temperature(log_softmax(logits, 1), labels) == pytest.approx(want, rel=1e-4)
    np.testing.assert_allclose(calibration.scaled(logits, want), softmax(logits / want, 1), atol=1e-12)


def test_a_temperature_that_nothing_bounds_stays_finite():
    logits = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, -np.inf]])
    assert calibration.temperature(logits, np.array([0, 1, 0])) == calibration.LOWEST  # all are right
    assert calibration.temperature(logits, np.array([1, 0, 1])) == calibration.HIGHEST


def test_what_mends_a_half_was_fitted_on_the_other_half():
    """Of logits that are three times too large, ECE falls to what is chance. Of labels that nothing explains it cannot
    be measured on what was fitted: each half's own temperature is not used on it."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(2000, 4)) * 1.5
    labels = np.array([random.choice(4, p=row) for row in softmax(logits, 1)])
    found = calibration.mended(3 * logits, labels)
    assert found.t == pytest.approx(3, rel=0.15) and found.before > 0.15
    assert found.after < 0.04 and found.by_chance < 0.02
    assert calibration.mended(logits, labels).before < 2 * calibration.mended(logits, labels).by_chance
    order = np.random.default_rng(0).permutation(2000)
    first = order[::2]
    t = calibration.temperature(3 * logits[first], labels[first])
    assert found.halves[0] == pytest.approx(t)
    rest = order[1::2]
    both = np.concatenate([calibration.scaled(3 * logits[first], found.halves[1]),
                           calibration.scaled(3 * logits[rest], t)])
    assert found.after == pytest.approx(calibration.ece(both, np.concatenate([labels[first], labels[rest]])))
