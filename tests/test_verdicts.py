"""training/verdicts.py: curves with known answers under the noise of a dev set, and what patience would have done."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from curves import DRAWS, Curve, N, curves, flat_curves

from formats.past_run import Epoch, PastRun
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


@pytest.mark.parametrize("n_epochs", [20, 60, 100, 200])
@pytest.mark.parametrize("dev, n", [(.42, N), (.90, 245)])
def test_a_flat_curve_is_not_unstable_however_long_it_is(n_epochs, dev, n):
    rng = np.random.default_rng(0)
    curve = Curve("flat", "good", np.linspace(1.5, 1.2, n_epochs), np.full(n_epochs, dev + .05),
                  np.full(n_epochs, dev))
    found = Counter(verdicts.verdict(curve.draw(rng, n), n).name for _ in range(300))
    assert found["unstable"] <= .02 * 300, dict(found)


# --------------------------------------------------------------------------- few evaluations, no numbers


def test_a_dev_accuracy_that_guessing_reaches_is_not_good():
    devs = [.352, .355, .349, .344]
    run = replace(past(devs, majority=.364), epochs=tuple(
        replace(e, train_acc=.53 + .003 * i) for i, e in enumerate(past(devs).epochs)))
    assert verdicts.verdict(run, 1110).name == "underfitting"
    assert verdicts.verdict(replace(run, majority=.30), 1110).name == "good"


def past(devs: list[float], **more) -> PastRun:
    losses = more.pop("losses", [None] * len(devs))
    return PastRun("a", "a", epochs=tuple(Epoch(i, 1.5 - .1 * i, .3 + .1 * i, dev, dev_loss=loss)
                                          for i, (dev, loss) in enumerate(zip(devs, losses, strict=True))), **more)


def test_two_evaluations_are_no_trend():
    assert verdicts.verdict(past([.30, .45]), N).name == "none"
    assert verdicts.verdict(past([.30, .38, .45]), N).name == "still improving"


def test_what_is_not_a_number_is_named():
    found = verdicts.verdict(past([.30, .40, float("nan")]), N)
    assert (found.name, found.evidence) == ("diverged", "the dev accuracy of epoch 2 is nan")
    run = past([.40, .42, .43])
    lost = replace(run, epochs=tuple(replace(epoch, train_acc=float("nan")) for epoch in run.epochs))
    assert verdicts.verdict(lost, N).name != "underfitting"


# --------------------------------------------------------------------------- patience


def test_patience_looks_at_the_monitor():
    """Dev loss is best at epoch 1, dev accuracy at epoch 5: with --monitor dev_loss the run stops at epoch 3."""
    devs, losses = [.30, .40, .39, .38, .37, .45], [1.5, 1.2, 1.3, 1.4, 1.5, 1.6]
    found = verdicts.patience(past(devs, losses=losses, monitor="dev_loss"), 2)
    assert (found.saved, found.missed, found.words()) == (
        2, 0.0, "saves 2 evaluations, and misses nothing (by dev_loss)")
    unknown = verdicts.patience(past(devs, monitor="dev_loss"), 2)
    assert unknown.missed == pytest.approx(.05) and "by dev accuracy: dev_loss" in unknown.words()
    plain = verdicts.patience(past(devs, losses=losses, monitor="dev_acc"), 2)
    assert (plain.saved, plain.words()) == (2, "saves 2 evaluations, and misses 0.050 of the peak")


def test_patience_asks_for_min_delta():
    devs = [.30, .40, .405, .409, .414, .50]
    assert verdicts.patience(past(devs), 3).saved == 0
    found = verdicts.patience(past(devs, options={"min_delta": "0.02"}), 3)
    assert (found.saved, found.missed) == (1, pytest.approx(.10))


def test_an_epoch_that_was_kept_and_is_not_the_best_is_noted():
    devs = [.30, .40, .45]
    said = verdicts.kept_another(past(devs, said_best=1, monitor="dev_loss"))
    assert "kept epoch 1 (dev 0.400), chosen by dev_loss" in said and "epoch 2 (0.450)" in said
    assert not verdicts.kept_another(past(devs, said_best=2, monitor="dev_loss"))
    assert verdicts.kept_another(past(devs, said_best=1, options={"min_delta": "0.1"}))
    assert not verdicts.kept_another(past(devs, said_best=1))  # this is a contradiction, and is named as one
