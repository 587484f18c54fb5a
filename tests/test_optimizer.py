"""Schedules, parameter groups and optimizers against PyTorch's, transformers', and the papers written out in NumPy."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler
from transformers import optimization as hf

import kernels
from classifier import LlamaEmbeddingClassifier
from config import LlamaConfig
from llama import Llama
from optimizer import (
    OPTIMIZERS,
    SCHEDULE_OPTIONS,
    SCHEDULES,
    SGD,
    Adafactor,
    AdamW,
    Lion,
    lr_scale,
    make_schedule,
    parameter_groups,
)

# --------------------------------------------------------------------------- schedules

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
    mine = make_schedule("plateau", total_steps=100, patience=patience, plateau_mode=mode, min_lr_ratio=low)
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
    by_epoch = {"total_steps": 40, "steps_an_epoch": 10, "schedule_every": "epoch"}
    smooth = ours("linear", 40)
    assert ours("linear", 40, **by_epoch) == [smooth[i // 10 * 10] for i in range(40)]
    for name, options in {"step": {"step_size": 2}, "multistep": {"milestones": (1, 3)}, "exponential": {"gamma": 0.5},
                          "natural_exp": {"decay_rate": 0.3}, "inverse_time": {"decay_rate": 0.3}}.items():
        per_epoch = ours(name, 4, **options)
        np.testing.assert_allclose(ours(name, 40, **by_epoch, **options), np.repeat(per_epoch, 10), rtol=1e-12)


def test_by_epoch_a_warmup_goes_by_steps_and_does_not_shift_the_epochs():
    rates = ours("step", 40, steps_an_epoch=10, schedule_every="epoch", step_size=1, gamma=0.5, warmup_steps=4)
    assert rates == [0.25, 0.5, 0.75] + [1.0] * 7 + [0.5] * 10 + [0.25] * 10 + [0.125] * 10
    rates = ours("step", 40, steps_an_epoch=10, schedule_every="epoch", step_size=1, gamma=0.5, warmup_steps=20)
    assert rates[19:] == [1.0] * 11 + [0.5] * 10


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 60), st.data())
def test_any_schedule_is_finite_within_its_bounds_and_continuous_behind_the_warmup(name, total, data):
    total = data.draw(st.sampled_from([total, 1, 2, 3, 4, 5]))
    warmup = data.draw(st.integers(0, total))
    options = {"warmup_steps": warmup, "warmup_start": data.draw(st.floats(0, 1)),
               "steps_an_epoch": data.draw(st.integers(1, 20)),
               "schedule_every": data.draw(st.sampled_from(["step", "epoch"])), **NEEDED.get(name, {})}
    choices = {"min_lr_ratio": st.floats(0, 1), "cycles": st.integers(1, 9), "cycle_mult": st.floats(1, 1e300),
               "cycle_decay": st.floats(0.01, 1), "step_size": st.integers(1, 99), "gamma": st.floats(1e-9, 1),
               "decay_rate": st.floats(1e-9, 1e9), "power": st.floats(0.01, 99), "decay_fraction": st.floats(1e-3, 1),
               "pct_start": st.floats(1e-3, 0.999), "cyclic_mode": st.sampled_from(["triangular", "triangular2"])}
    for key in set(SCHEDULE_OPTIONS[name]) & set(choices):
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
    assert SCHEDULES[name].__doc__.splitlines()[0].strip()
    wanted = {"constant": (), "cosine": ("min_lr_ratio",), "step": ("step_size", "gamma"), "one_cycle": ("pct_start",),
              "cyclic": ("cycles", "cyclic_mode", "min_lr_ratio"), "inverse_sqrt": ()}
    assert SCHEDULE_OPTIONS[name] == wanted.get(name, SCHEDULE_OPTIONS[name])


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
    ("plateau", {"patience": -1}, "--patience"),
    ("plateau", {"plateau_mode": "mean"}, "--plateau_mode"),
    ("constant", {"gamma": 7.0}, "--gamma"),
    ("constant", {"gama": 0.5}, "gama"),
    ("constant", {"total_steps": 0}, "0 steps"),
])
def test_nonsense_is_refused_by_its_options_name(name, options, message):
    with pytest.raises(ValueError) as error:
        make_schedule(name, **{"total_steps": 40, **options})
    assert message in str(error.value)


def test_the_rate_grows_with_the_batch_or_its_root():
    assert lr_scale("linear", 512, 128) == 4.0 and lr_scale("sqrt", 512, 128) == 2.0
    for bad in (("cubic", 8, 8), ("linear", 0, 8), ("sqrt", 8, 0)):
        with pytest.raises(ValueError):
            lr_scale(*bad)


# --------------------------------------------------------------------------- parameter groups


@pytest.fixture(scope="module")
def classifier():
    config = LlamaConfig(vocab_size=50, dim=8, n_layers=3, n_heads=2, n_kv_heads=1, hidden_dim=16, max_seq_len=8)
    return LlamaEmbeddingClassifier(SimpleNamespace(num_labels=3, hidden_dropout_prob=0.0), Llama(config))


def test_each_parameter_has_the_rate_and_the_decay_of_its_place(classifier):
    groups = parameter_groups(classifier, 1e-3, 0.1, layerwise_lr_decay=0.5, head_lr=7e-3)
    of = {id(p): group for group in groups for p in group["params"]}
    trained = dict(classifier.named_parameters())
    assert len(of) == len(trained) == sum(len(group["params"]) for group in groups)
    for name, p in trained.items():
        layer = next((i for i in range(3) if f"layers.{i}." in name), None)
        rate = 7e-3 if name.startswith("classifier_head") else 1e-3 * (
            0.125 if "embeddings" in name else 0.5 ** (2 - layer) if layer is not None else 1)
        decay = 0.0 if "norm" in name or "bias" in name else 0.1
        assert (of[id(p)]["lr"], of[id(p)]["weight_decay"]) == (pytest.approx(rate), decay), name
    assert [(g["name"]) for g in groups] == [
        "embeddings", "layer 0", "layer 0, no decay", "layer 1", "layer 1, no decay", "layer 2",
        "layer 2 to top, no decay", "head", "head, no decay"]


def test_equal_groups_are_one_and_a_tied_parameter_is_in_it_once(classifier):
    (group,) = parameter_groups(classifier, 1e-3, 0.1, decay_all=True)
    assert [id(p) for p in group["params"]] == [id(p) for p in classifier.parameters()]
    assert (group["name"], group["lr"], group["weight_decay"]) == ("embeddings to head", 1e-3, 0.1)
    assert [g["name"] for g in parameter_groups(classifier, 1e-3, 0.1)] == [
        "embeddings to head", "layer 0 to head, no decay"]
    AdamW(parameter_groups(classifier, 1e-3, 0.1)).step()


def test_frozen_parameters_are_in_no_group(classifier):
    frozen = copy.deepcopy(classifier)
    frozen.llama.requires_grad_(False)
    groups = parameter_groups(frozen, 1e-3, 0.1, layerwise_lr_decay=0.5)
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in frozen.classifier_head.parameters()}


@pytest.mark.parametrize("bad", [{"layerwise_lr_decay": 0.0}, {"layerwise_lr_decay": 1.1}, {"head_lr": -1.0}])
def test_groups_of_nonsense_are_refused(classifier, bad):
    with pytest.raises(ValueError):
        parameter_groups(classifier, 1e-3, 0.1, **bad)


# --------------------------------------------------------------------------- optimizers


def train(make, dtype=torch.float64, steps=50):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1)).to(dtype)
    x, y = torch.randn(20, 5, dtype=dtype), torch.randn(20, 1, dtype=dtype)
    optimizer = make(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).pow(2).mean().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_without_decay_and_eps_it_is_torch_adam():
    """With eps near zero the efficient form and PyTorch's agree."""
    ours = train(lambda p: AdamW(p, lr=1e-2, eps=1e-30))
    torch.testing.assert_close(ours, train(lambda p: torch.optim.Adam(p, lr=1e-2, eps=1e-30)), rtol=1e-10, atol=1e-12)


@pytest.fixture(params=["eager", "native"])
def way(request, monkeypatch):
    """Both ways through AdamW; the second is only there with a C compiler."""
    if request.param == "native" and kernels.library() is None:
        pytest.skip("no C compiler here")
    kernels.switch(request.param == "native")
    return request.param


@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_step_is_the_papers_formula(way, correct_bias, weight_decay):
    """In float64, which the C does not do, to 1e-12; in float32 to 1e-5."""
    lr, (b1, b2), eps = 1e-2, (0.8, 0.95), 1e-3
    random = np.random.default_rng(1)
    p, m, v = random.normal(size=(4, 3)), np.zeros((4, 3)), np.zeros((4, 3))
    double, single = torch.nn.Parameter(torch.tensor(p)), torch.nn.Parameter(torch.tensor(p).float())
    adamw = AdamW([double, single], lr=lr, betas=(b1, b2), eps=eps, weight_decay=weight_decay,
                  correct_bias=correct_bias)
    for t in range(1, 20):
        g = random.normal(size=p.shape)
        double.grad, single.grad = torch.tensor(g), torch.tensor(g).float()
        adamw.step()
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        rate = lr * np.sqrt(1 - b2**t) / (1 - b1**t) if correct_bias else lr
        p = p - rate * m / (np.sqrt(v) + eps)
        p = p - lr * weight_decay * p  # after the update, scaled by lr alone
    np.testing.assert_allclose(double.detach().numpy(), p, rtol=1e-12)
    np.testing.assert_allclose(single.detach().numpy(), p, rtol=1e-5, atol=1e-7)


def adamw_run(shapes, threads=1, steps=4):
    """Parameters and state after some steps of float32 on random gradients, one of them not there at first."""
    draw = torch.Generator().manual_seed(3)
    params = [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]
    half = len(params) // 2
    adamw = AdamW([{"params": params[:half], "lr": 3e-3}, {"params": params[half:], "weight_decay": 0.0}], lr=1e-2,
                  weight_decay=0.1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for i in range(steps):
            for p in params:
                p.grad = torch.randn(p.shape, generator=draw)
            if i == 0:
                params[0].grad = None
            adamw.step()
    finally:
        torch.set_num_threads(before)
    state = [t for p in params for t in (p.detach(), adamw.state[p]["exp_avg"], adamw.state[p]["exp_avg_sq"])]
    return [t.clone() for t in state]


SHAPES = [(40, 31), (37,), (1,), (0,), (300, 301), ()]


def test_both_ways_agree_and_the_number_of_threads_changes_no_bit():
    if kernels.library() is None:
        pytest.skip("no C compiler here")
    eager = adamw_run(SHAPES)
    kernels.switch(True)
    native = adamw_run(SHAPES)
    for a, b in zip(eager, native, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert any(not torch.equal(a, b) for a, b in zip(eager, native, strict=True))  # it was another way
    for threads in (1, 2, 3):
        assert all(map(torch.equal, native, adamw_run(SHAPES, threads)))


def test_the_native_way_takes_only_what_it_can():
    """What is not float32 or not in one piece goes through PyTorch, with the same result."""
    if kernels.library() is None:
        pytest.skip("no C compiler here")
    values, gradients = torch.randn(6, 4), torch.randn(6, 4)
    found = []
    for native in (True, False):
        kernels.switch(native)
        params = [torch.nn.Parameter(values.t().clone(memory_format=torch.preserve_format)),
                  torch.nn.Parameter(values.t().contiguous()), torch.nn.Parameter(values.t().double().contiguous())]
        for p in params:
            p.grad = gradients.t().to(p.dtype)  # never in one piece
        AdamW(params, lr=0.1).step()
        found.append([p.detach() for p in params])
    assert all(map(torch.equal, *found))


def test_autograd_sees_that_a_native_step_wrote(way):
    p = torch.nn.Parameter(torch.ones(3))
    y = (p * p).sum()
    p.grad = torch.ones(3)
    AdamW([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_dense_steps_between_sparse_ones_are_not_forgotten():
    """Each step's gradient is sparse or dense (a compiler that is gone, a decay that was switched on)."""
    if kernels.library() is None:
        pytest.skip("no C compiler here")
    found = []
    for kinds in ((False,) * 4, (True, False, True, True)):
        kernels.switch(True)
        torch.manual_seed(0)
        table = torch.nn.Embedding(6, 4)
        adamw = AdamW(table.parameters(), lr=0.1)
        for word, table.sparse in zip((0, 1, 2, 2), kinds, strict=True):
            adamw.zero_grad()
            table(torch.tensor([word])).pow(2).sum().backward()
            adamw.step()
        found.append(table.weight.detach())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_without_a_compiler_it_goes_on(monkeypatch):
    monkeypatch.setenv("CC", "/nowhere/cc")
    kernels._compiled.cache_clear()
    try:
        kernels.switch(True)
        p = torch.nn.Parameter(torch.ones(3))
        adamw = AdamW([p], lr=0.5)
        for _ in range(2):
            p.grad = torch.ones(3)
            adamw.step()
    finally:
        kernels._compiled.cache_clear()
    torch.testing.assert_close(p.detach(), torch.zeros(3), rtol=0, atol=1e-4)
    assert not kernels.is_on()


def embedding_run(sparse: bool, native: bool, weight_decay: float = 0.0, state=None):
    """A table of which each step touches a few rows, by AdamW at changing rates: the table after each step."""
    kernels.switch(native)
    torch.manual_seed(0)
    table = torch.nn.Embedding(40, 6, sparse=sparse)
    adamw = AdamW(table.parameters(), lr=0.1, weight_decay=weight_decay)
    if state:
        table.load_state_dict(state[0])
        adamw.load_state_dict(copy.deepcopy(state[1]))
    draw, found = torch.Generator().manual_seed(1), []
    for step in range(8):
        words = torch.randint(0, 20, (2, 5), generator=draw)
        adamw.zero_grad()
        for row in words:  # two micro-batches, with words that occur twice
            (table(row) * torch.randn(5, 6, generator=draw)).sum().backward()
        adamw.param_groups[0]["lr"] = 0.1 / (step + 1)
        adamw.step()
        found.append(table.weight.detach().clone())
    return found, copy.deepcopy((table.state_dict(), adamw.state_dict()))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_sparse_gradient_is_the_dense_one(native, weight_decay):
    """torch.optim.SparseAdam is not: rows without a gradient stand still there, though their momentum goes on."""
    if native and kernels.library() is None:
        pytest.skip("no C compiler here")
    dense, _ = embedding_run(False, False, weight_decay)
    sparse, (_, state) = embedding_run(True, native, weight_decay)
    for a, b in zip(dense, sparse, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    if not weight_decay:
        moved = (sparse[-1] != sparse[0]).any(1)
        assert (state["state"][0]["active"] == moved).all() and 0 < moved.sum() < 40  # the others were passed over


def test_a_sparse_run_goes_on_from_a_dense_one_and_between_the_two_ways():
    if kernels.library() is None:
        pytest.skip("no C compiler here")
    _, begun = embedding_run(False, False)
    judge, later = embedding_run(False, False, state=begun)
    last, _ = embedding_run(False, False, state=later)
    for native in (True, False):
        found, then = embedding_run(True, native, state=begun)
        torch.testing.assert_close(found[-1], judge[-1], rtol=1e-5, atol=1e-6)
        found, _ = embedding_run(True, not native, state=then)
        torch.testing.assert_close(found[-1], last[-1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [
    {}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"weight_decay": 0.1},
    {"momentum": 0.5, "nesterov": True, "weight_decay": 0.1}])
def test_sgd_is_torchs(options):
    ours, theirs = (train(lambda p, make=make: make(p, lr=0.05, **options)) for make in (SGD, torch.optim.SGD))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_decoupled_sgd_decays_after_the_update():
    p = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    p.grad = torch.tensor([1.0], dtype=torch.float64)
    SGD([p], lr=0.5, weight_decay=0.1, decoupled=True).step()
    assert p.item() == pytest.approx((2 - 0.5) * (1 - 0.05), rel=1e-12)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_lion_is_algorithm_2(weight_decay):
    lr, (b1, b2) = 1e-2, (0.9, 0.99)
    random = np.random.default_rng(1)
    p, m = random.normal(size=(4, 3)), np.zeros((4, 3))
    ours = torch.nn.Parameter(torch.tensor(p))
    lion = Lion([ours], lr=lr, betas=(b1, b2), weight_decay=weight_decay)
    for _ in range(30):
        g = random.normal(size=p.shape)
        ours.grad = torch.tensor(g)
        lion.step()
        c = b1 * m + (1 - b1) * g
        p = p - lr * (np.sign(c) + weight_decay * p)
        m = b2 * m + (1 - b2) * g
    np.testing.assert_allclose(ours.detach().numpy(), p, rtol=1e-12)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1}, {"scale_parameter": True, "weight_decay": 0.1},
                                     {"clip_threshold": 0.5, "decay_rate": -0.5, "eps": (1e-3, 1e-2)}])
def test_adafactor_is_transformers(options):
    theirs = train(lambda p: hf.Adafactor(p, lr=1e-2, relative_step=False, **{"scale_parameter": False, **options}))
    torch.testing.assert_close(train(lambda p: Adafactor(p, lr=1e-2, **options)), theirs, rtol=1e-10, atol=1e-12)


def test_adafactor_keeps_a_row_and_a_column():
    p = torch.nn.Parameter(torch.ones(30, 20))
    p.grad = torch.ones(30, 20)
    adafactor = Adafactor([p])
    adafactor.step()
    assert sum(t.numel() for t in adafactor.state[p].values() if torch.is_tensor(t)) == 50


OPTIONS = {"adamw": {"weight_decay": 0.01}, "sgd": {"momentum": 0.9, "nesterov": True}, "lion": {"weight_decay": 0.01},
           "adafactor": {"scale_parameter": True}}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_without_gradient_stays(name):
    p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = OPTIMIZERS[name]([p, q], lr=0.1, weight_decay=0.1)
    p.sum().backward()
    optimizer.step()
    assert torch.equal(q, torch.ones(3)) and not torch.equal(p, torch.ones(3))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_saved_state_goes_on_where_it_was(way, name, tmp_path):
    def run(split):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(6)), torch.nn.Parameter(torch.randn(4, 3))]
        optimizer = OPTIMIZERS[name](params, lr=0.1, **OPTIONS[name])
        for i in range(8):
            if i == split:
                torch.save(optimizer.state_dict(), tmp_path / "state.pt")
                optimizer = OPTIMIZERS[name](params, lr=0.5)
                optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            for p in params:
                p.grad = torch.sin(p.detach() + i)
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in params])

    assert torch.equal(run(split=4), run(split=None)) and torch.equal(run(split=None), run(split=None))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_returns_the_closures_loss_and_wants_dense_gradients(name):
    p = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = OPTIMIZERS[name]([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert optimizer.step() is None and optimizer.step(closure).item() == 4.0 and p.item() < 2
    if name == "adamw":  # knows what to do with one: above
        return
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="dense"):
        OPTIMIZERS[name](embedding.parameters()).step()


@pytest.mark.parametrize("make, bad", [
    (AdamW, {"lr": -1.0}), (AdamW, {"eps": -1e-9}), (AdamW, {"weight_decay": -1.0}), (AdamW, {"betas": (1.0, 0.9)}),
    (SGD, {"lr": -1.0}), (SGD, {"momentum": -0.1}), (SGD, {"nesterov": True}), (Lion, {"betas": (0.9, -0.1)}),
    (Lion, {"lr": math.nan}), (Adafactor, {"clip_threshold": 0.0}), (Adafactor, {"decay_rate": 0.8}),
    (Adafactor, {"eps": (-1e-30, 1e-3)})])
def test_values_out_of_range_are_refused(make, bad):
    with pytest.raises(ValueError):
        make([torch.nn.Parameter(torch.ones(1))], **bad)
