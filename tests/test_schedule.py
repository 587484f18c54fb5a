"""Schedules against PyTorch's, transformers' and TensorFlow's, and the rule of the warmup."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler
from transformers import optimization as hf

from schedule import SCHEDULERS, SCHEDULES, lr_scale, make_schedule, warmup_length

NEEDED = {"step": {"step_size": 2}, "multistep": {"milestones": (1, 3)}, "exponential": {"gamma": 0.9},
          "natural_exp": {"decay_rate": 0.1}, "inverse_time": {"decay_rate": 0.5}}


def ours(name, steps, **options):
    factor = make_schedule(name, **{"total_steps": steps, **options})
    return [factor(i) for i in range(steps)]


def reference(make, steps, lr=1.0):
    """The rates that somebody else's scheduler gives to the first updates."""
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler, rates = make(sgd), []
    for _ in range(steps):
        rates.append(float(sgd.param_groups[0]["lr"]))
        sgd.step()
        scheduler.step()
    return rates


THEIRS = {
    "constant": ({}, lambda o: hf.get_constant_schedule(o)),
    "linear": ({}, lambda o: hf.get_linear_schedule_with_warmup(o, 0, 40)),
    "linear to 0.1": ({"min_lr_ratio": 0.1}, lambda o: lr_scheduler.LinearLR(o, 1.0, 0.1, total_iters=40)),
    "cosine": ({}, lambda o: lr_scheduler.CosineAnnealingLR(o, 40, eta_min=1e-3)),
    "cosine to 0.2": ({"min_lr_ratio": 0.2},
                      lambda o: hf.get_cosine_with_min_lr_schedule_with_warmup(o, 0, 40, min_lr_rate=0.2)),
    "cosine_restarts": ({"cycles": 4, "min_lr_ratio": 0.0},
                        lambda o: hf.get_cosine_with_hard_restarts_schedule_with_warmup(o, 0, 40, num_cycles=4)),
    "cosine_restarts to 0.1": ({"cycles": 2, "cycle_mult": 3.0, "min_lr_ratio": 0.1},
                               lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=10, T_mult=3, eta_min=0.1)),
    "step": ({"step_size": 7, "gamma": 0.5}, lambda o: lr_scheduler.StepLR(o, 7, 0.5)),
    "step by 0.1": ({"step_size": 7}, lambda o: lr_scheduler.StepLR(o, 7)),
    "multistep": ({"milestones": [10, 25, 33]}, lambda o: lr_scheduler.MultiStepLR(o, [10, 25, 33])),
    "exponential": ({"gamma": 0.9}, lambda o: lr_scheduler.ExponentialLR(o, 0.9)),
    "natural_exp": ({"decay_rate": 0.2}, lambda o: lr_scheduler.LambdaLR(o, lambda i: np.exp(-0.2 * i))),
    "inverse_time": ({"decay_rate": 0.2}, lambda o: lr_scheduler.LambdaLR(o, lambda i: 1 / (1 + 0.2 * i))),
    "polynomial": ({"power": 2.0}, lambda o: lr_scheduler.PolynomialLR(o, 40, power=2.0)),
    "polynomial to 0.05": ({"power": 3.0, "min_lr_ratio": 0.05}, lambda o:
                           hf.get_polynomial_decay_schedule_with_warmup(o, 0, 40, lr_end=0.05, power=3.0)),
    "inverse_sqrt": ({}, lambda o: hf.get_inverse_sqrt_schedule(o, 0)),
    "cyclic": ({"cycles": 2}, lambda o: lr_scheduler.CyclicLR(o, 0.1, 1.0, step_size_up=10)),
    "cyclic, odd": ({"cycles": 3, "min_lr_ratio": 0.3}, lambda o: lr_scheduler.CyclicLR(o, 0.3, 1.0, 40 / 6)),
    "cyclic, triangular2": ({"cycles": 5, "cyclic_mode": "triangular2", "min_lr_ratio": 0.0},
                            lambda o: lr_scheduler.CyclicLR(o, 0.0, 1.0, step_size_up=4, mode="triangular2")),
    "one_cycle": ({}, lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=41)),
    "one_cycle from 0.12": ({"pct_start": 0.12}, lambda o: lr_scheduler.OneCycleLR(o, 1.0, 41, pct_start=0.12)),
    "wsd": ({}, lambda o: hf.get_wsd_schedule(o, 0, 8, 40, decay_type="linear")),
    "wsd to 0.1": ({"decay_fraction": 0.5, "min_lr_ratio": 0.1},
                   lambda o: hf.get_wsd_schedule(o, 0, 20, 40, decay_type="linear", min_lr_ratio=0.1)),
}


@pytest.mark.parametrize("case", THEIRS)
def test_a_schedule_is_the_one_that_others_wrote(case):
    options, make = THEIRS[case]
    name = case.replace(",", " ").split()[0]
    total = 41 if name == "one_cycle" else 40  # theirs counts one step beyond the run
    mine = [make_schedule(name, total_steps=total, **options)(i) for i in range(40)]
    np.testing.assert_allclose(mine, reference(make, 40), rtol=1e-11, atol=1e-15)


def test_linear_cosine_is_tensorflows():
    """tf.compat.v1.train.linear_cosine_decay's documentation, with its defaults."""
    alpha, beta, num_periods, decay_steps = 0.0, 0.001, 0.5, 40
    wanted = []
    for global_step in range(decay_steps):
        linear_decay = (decay_steps - global_step) / decay_steps
        cosine_decay = 0.5 * (1 + np.cos(np.pi * 2 * num_periods * global_step / decay_steps))
        wanted.append((alpha + linear_decay) * cosine_decay + beta)
    np.testing.assert_allclose(ours("linear_cosine", 40), wanted, rtol=1e-12)


def test_each_restart_is_lower_and_longer():
    rates = ours("cosine_restarts", 70, cycles=3, cycle_mult=2.0, cycle_decay=0.5, min_lr_ratio=0.0)
    assert [rates[i] for i in (0, 10, 30)] == [1.0, 0.5, 0.25]
    assert all(a > b for i, (a, b) in enumerate(zip(rates, rates[1:], strict=False), 1) if i not in (10, 30))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1) | st.just(math.nan), max_size=30), st.integers(0, 4), st.sampled_from(["max", "min"]),
       st.sampled_from([0.0, 0.1]))
def test_plateau_is_torchs(history, patience, mode, low):
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = lr_scheduler.ReduceLROnPlateau(sgd, mode, 0.5, patience, threshold=0, min_lr=low, eps=0)
    mine = make_schedule("plateau", total_steps=100, plateau_patience=patience, plateau_mode=mode, min_lr_ratio=low)
    for i, value in enumerate(history):
        theirs.step(value)
        assert mine(i, history[: i + 1]) == sgd.param_groups[0]["lr"]


def test_plateau_begins_with_the_briefest_history_and_a_warmup():
    factor = make_schedule("plateau", total_steps=50, warmup_steps=4)
    assert [factor(i) for i in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factor(40, [0.5, 0.4, 0.4, 0.4]) == 1.0 and factor(40, [0.5, 0.4, 0.4, 0.4, 0.4]) == 0.5


WARMED = {
    "constant": lambda o: hf.get_constant_schedule_with_warmup(o, 8),
    "linear": lambda o: hf.get_linear_schedule_with_warmup(o, 8, 40),
    "inverse_sqrt": lambda o: hf.get_inverse_sqrt_schedule(o, 8),
    "cosine": lambda o: hf.get_cosine_with_min_lr_schedule_with_warmup(o, 8, 40, min_lr_rate=1e-3),
    "wsd": lambda o: hf.get_wsd_schedule(o, 8, 8, 40, decay_type="linear"),
}


@pytest.mark.parametrize("name", WARMED)
def test_a_warmup_is_transformers_without_its_step_at_zero(name):
    options = {"decay_fraction": 0.25} if name == "wsd" else {}
    mine, theirs = ours(name, 40, warmup_steps=8, **options), reference(WARMED[name], 40)
    np.testing.assert_allclose(mine[:8], theirs[1:9], rtol=1e-12)
    np.testing.assert_allclose(mine[8:], theirs[8:], rtol=1e-12)


def test_a_warmup_that_starts_above_zero_is_torchs_linear_and_constant():
    linear = reference(lambda o: lr_scheduler.LinearLR(o, 0.25, 1.0, total_iters=6), 9)
    np.testing.assert_allclose(ours("constant", 8, warmup_steps=6, warmup_start=0.25), linear[1:], rtol=1e-12)
    flat = reference(lambda o: lr_scheduler.ConstantLR(o, 0.25, total_iters=6), 8)
    assert ours("constant", 8, warmup_steps=6, warmup_start=0.25, warmup_kind="constant") == flat


def test_by_epoch_the_factor_is_a_staircase_and_the_units_are_epochs():
    by_epoch = {"total_steps": 40, "steps_per_epoch": 10, "schedule_every": "epoch"}
    smooth = ours("linear", 40)
    assert ours("linear", 40, **by_epoch) == [smooth[i // 10 * 10] for i in range(40)]
    for name, options in {"step": {"step_size": 2}, "multistep": {"milestones": (1, 3)}, "exponential": {"gamma": 0.5},
                          "natural_exp": {"decay_rate": 0.3}, "inverse_time": {"decay_rate": 0.3}}.items():
        per_epoch = ours(name, 4, **options)
        np.testing.assert_allclose(ours(name, 40, **by_epoch, **options), np.repeat(per_epoch, 10), rtol=1e-12)


def test_by_epoch_a_warmup_goes_by_steps_and_does_not_shift_the_epochs():
    rates = ours("step", 40, steps_per_epoch=10, schedule_every="epoch", step_size=1, gamma=0.5, warmup_steps=4)
    assert rates == [0.25, 0.5, 0.75] + [1.0] * 7 + [0.5] * 10 + [0.25] * 10 + [0.125] * 10
    rates = ours("step", 40, steps_per_epoch=10, schedule_every="epoch", step_size=1, gamma=0.5, warmup_steps=20)
    assert rates[19:] == [1.0] * 11 + [0.5] * 10


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 60), st.data())
def test_any_schedule_is_finite_within_its_bounds_and_continuous_behind_the_warmup(name, total, data):
    total = data.draw(st.sampled_from([total, 1, 2, 3, 4, 5]))
    warmup = data.draw(st.integers(0, total))
    options = {"warmup_steps": warmup, "warmup_start": data.draw(st.floats(0, 1)),
               "steps_per_epoch": data.draw(st.integers(1, 20)),
               "schedule_every": data.draw(st.sampled_from(["step", "epoch"])), **NEEDED.get(name, {})}
    choices = {"min_lr_ratio": st.floats(0, 1), "cycles": st.integers(1, 9), "cycle_mult": st.floats(1, 1e300),
               "cycle_decay": st.floats(0.01, 1), "step_size": st.integers(1, 99), "gamma": st.floats(1e-9, 1),
               "decay_rate": st.floats(1e-9, 1e9), "power": st.floats(0.01, 99), "decay_fraction": st.floats(1e-3, 1),
               "pct_start": st.floats(1e-3, 0.999), "cyclic_mode": st.sampled_from(["triangular", "triangular2"])}
    for key in set(SCHEDULES[name].options) & set(choices):
        if data.draw(st.booleans()):
            options[key] = data.draw(choices[key])
    factor = make_schedule(name, total_steps=total, **options)
    top = 2.0 if name == "linear_cosine" else 1.0  # TensorFlow adds its beta on top
    rates = [factor(i) for i in range(total + 3)]
    assert all(type(rate) is float and 0 <= rate <= top + 1e-12 for rate in rates), rates
    if 0 < warmup:
        assert rates[warmup - 1] == pytest.approx(rates[warmup], abs=1e-12)


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_restarts", "polynomial", "wsd"])
def test_a_decay_arrives_just_behind_the_last_update_and_stays(name):
    factor = make_schedule(name, total_steps=30, warmup_steps=7, min_lr_ratio=0.125)
    assert factor(29) > factor(30) == factor(99) == pytest.approx(0.125, rel=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedules_first_line_is_its_formula_and_its_options_are_known(name):
    assert SCHEDULES[name].factor.__doc__.splitlines()[0].strip()
    wanted = {"constant": (), "cosine": ("min_lr_ratio",), "step": ("step_size", "gamma"), "one_cycle": ("pct_start",),
              "cyclic": ("cycles", "cyclic_mode", "min_lr_ratio"), "inverse_sqrt": ()}
    assert tuple(SCHEDULES[name].options) == wanted.get(name, tuple(SCHEDULES[name].options))


@pytest.mark.parametrize("name, options, message", [
    ("cosin", {}, "--scheduler cosin"),
    ("step", {}, "--scheduler step needs --step_size"),
    ("multistep", {"milestones": ()}, "--scheduler multistep needs --milestones"),
    ("exponential", {"gamma": None}, "--scheduler exponential needs --gamma"),
    ("natural_exp", {}, "--scheduler natural_exp needs --decay_rate"),
    ("cosine", {"warmup_steps": 50}, "--warmup_steps 50 is beyond the run's 40 steps"),
    ("cosine", {"warmup_steps": -1}, "--warmup_steps"),
    ("cosine", {"warmup_kind": "cubic"}, "--warmup_kind"),
    ("cosine", {"warmup_start": 1.5}, "--warmup_start"),
    ("cosine", {"warmup_kind": "constant", "warmup_steps": 3}, "--warmup_start"),
    ("cosine", {"schedule_every": "day"}, "--schedule_every"),
    ("cosine", {"min_lr_ratio": 1.5}, "--min_lr_ratio"),
    ("cosine", {"min_lr_ratio": math.nan}, "--min_lr_ratio"),
    ("cosine_restarts", {"cycles": 0}, "--cycles"),
    ("cosine_restarts", {"cycle_mult": 0.5}, "--cycle_mult"),
    ("cosine_restarts", {"cycle_decay": 0.0}, "--cycle_decay"),
    ("step", {"step_size": 0}, "--step_size"),
    ("step", {"step_size": 3, "gamma": 1.5}, "--gamma"),
    ("multistep", {"milestones": (10, 5)}, "--milestones"),
    ("multistep", {"milestones": (0, 5)}, "--milestones"),
    ("inverse_time", {"decay_rate": -1.0}, "--decay_rate"),
    ("polynomial", {"power": 0.0}, "--power"),
    ("wsd", {"decay_fraction": 0.0}, "--decay_fraction"),
    ("cyclic", {"cyclic_mode": "round"}, "--cyclic_mode"),
    ("one_cycle", {"pct_start": 1.0}, "--pct_start"),
    ("plateau", {"plateau_patience": -1}, "--plateau_patience"),
    ("plateau", {"plateau_mode": "mean"}, "--plateau_mode"),
    ("constant", {"gamma": 7.0}, "--gamma"),
    ("constant", {"gama": 0.5}, "gama"),
    ("constant", {"total_steps": 0}, "0 steps"),
])
def test_nonsense_is_refused_by_its_options_name(name, options, message):
    with pytest.raises(ValueError) as error:
        make_schedule(name, **{"total_steps": 40, **options})
    assert message in str(error.value)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_warmup_is_a_part_of_the_run_where_the_schedule_does_not_begin_low(name):
    """RoBERTa's 6% (table 10)."""
    assert warmup_length(name, 10, 50) == (0 if name in ("constant", "cyclic", "one_cycle") else 30)
    assert warmup_length(name, 10, 50, warmup_ratio=0.1) == warmup_length(name, 10, 50, warmup_epochs=1.0) == 50
    assert warmup_length(name, 10, 50, warmup_steps=0) == 0 and warmup_length(name, 1, 7, warmup_steps=7) == 7


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="--warmup_steps 2 is beyond the run's 1 step, which come from --epochs 1"):
        warmup_length("linear", 1, 1, warmup_steps=2)
    with pytest.raises(ValueError, match="--warmup_epochs 3.5 is beyond the run's 21 steps"):
        warmup_length("linear", 3, 7, warmup_epochs=3.5)


def test_the_rate_grows_with_the_batch_or_its_root():
    assert lr_scale("linear", 512, 128) == 4.0 and lr_scale("sqrt", 512, 128) == 2.0
    for bad in (("cubic", 8, 8), ("linear", 0, 8), ("sqrt", 8, 0)):
        with pytest.raises(ValueError):
            lr_scale(*bad)
