"""Parameter groups and optimizers against PyTorch's, transformers', and the papers written out in NumPy."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import optimization as hf

import fused
from classifier import LlamaEmbeddingClassifier
from config import OPTIMIZERS as OPTIMIZER_NAMES
from config import LlamaConfig
from llama import Llama
from optimizer import OPTIMIZERS, SGD, Adafactor, AdamW, Lion, parameter_groups

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
        "layer 2 to top, no decay", "head"]


def test_the_optimizers_are_those_of_the_command_line():
    assert tuple(OPTIMIZERS) == OPTIMIZER_NAMES


def test_equal_groups_are_one_and_a_tied_parameter_is_in_it_once(classifier):
    (group,) = parameter_groups(classifier, 1e-3, 0.1, decay_all=True)
    assert [id(p) for p in group["params"]] == [id(p) for p in classifier.parameters()]
    assert (group["name"], group["lr"], group["weight_decay"]) == ("embeddings to head", 1e-3, 0.1)
    assert [g["name"] for g in parameter_groups(classifier, 1e-3, 0.1)] == [
        "embeddings to head", "layer 0 to top, no decay"]
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
    if request.param == "native" and fused.library() is None:
        pytest.skip("no C compiler here")
    return request.param == "native"


@pytest.mark.parametrize("correct_bias", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_step_is_the_papers_formula(way, correct_bias, weight_decay):
    """In float64, which the C does not do, to 1e-12; in float32 to 1e-5."""
    lr, (b1, b2), eps = 1e-2, (0.8, 0.95), 1e-3
    random = np.random.default_rng(1)
    p, m, v = random.normal(size=(4, 3)), np.zeros((4, 3)), np.zeros((4, 3))
    double, single = torch.nn.Parameter(torch.tensor(p)), torch.nn.Parameter(torch.tensor(p).float())
    adamw = AdamW([double, single], lr=lr, betas=(b1, b2), eps=eps, weight_decay=weight_decay,
                  correct_bias=correct_bias, fused=way)
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


def adamw_run(shapes, native, threads=1, steps=4):
    """Parameters and state after some steps of float32 on random gradients, one of them not there at first."""
    draw = torch.Generator().manual_seed(3)
    params = [torch.nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]
    half = len(params) // 2
    adamw = AdamW([{"params": params[:half], "lr": 3e-3}, {"params": params[half:], "weight_decay": 0.0}], lr=1e-2,
                  weight_decay=0.1, fused=native)
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
    if fused.library() is None:
        pytest.skip("no C compiler here")
    eager, native = adamw_run(SHAPES, False), adamw_run(SHAPES, True)
    for a, b in zip(eager, native, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert any(not torch.equal(a, b) for a, b in zip(eager, native, strict=True))  # it was another way
    for threads in (1, 2, 3):
        assert all(map(torch.equal, native, adamw_run(SHAPES, True, threads)))


def test_the_native_way_takes_only_what_it_can():
    """What is not float32 or not in one piece goes through PyTorch, with the same result."""
    if fused.library() is None:
        pytest.skip("no C compiler here")
    values, gradients = torch.randn(6, 4), torch.randn(6, 4)
    found = []
    for native in (True, False):
        params = [torch.nn.Parameter(values.t().clone(memory_format=torch.preserve_format)),
                  torch.nn.Parameter(values.t().contiguous()), torch.nn.Parameter(values.t().double().contiguous())]
        for p in params:
            p.grad = gradients.t().to(p.dtype)  # never in one piece
        AdamW(params, lr=0.1, fused=native).step()
        found.append([p.detach() for p in params])
    assert all(map(torch.equal, *found))


def test_autograd_sees_that_a_native_step_wrote(way):
    p = torch.nn.Parameter(torch.ones(3))
    y = (p * p).sum()
    p.grad = torch.ones(3)
    AdamW([p], fused=way).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_dense_steps_between_sparse_ones_are_not_forgotten():
    """Each step's gradient is sparse or dense (a compiler that is gone, a decay that was switched on)."""
    if fused.library() is None:
        pytest.skip("no C compiler here")
    found = []
    for kinds in ((False,) * 4, (True, False, True, True)):
        torch.manual_seed(0)
        table = torch.nn.Embedding(6, 4)
        adamw = AdamW(table.parameters(), lr=0.1, fused=True)
        for word, table.sparse in zip((0, 1, 2, 2), kinds, strict=True):
            adamw.zero_grad()
            table(torch.tensor([word])).pow(2).sum().backward()
            adamw.step()
        found.append(table.weight.detach())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_without_a_compiler_it_goes_on(monkeypatch):
    monkeypatch.setenv("CC", "/nowhere/cc")
    fused._compiled.cache_clear()
    try:
        p = torch.nn.Parameter(torch.ones(3))
        adamw = AdamW([p], lr=0.5, fused=True)
        for _ in range(2):
            p.grad = torch.ones(3)
            adamw.step()
        assert fused.library() is None and "/nowhere/cc" in fused.fault()
    finally:
        fused._compiled.cache_clear()
    torch.testing.assert_close(p.detach(), torch.zeros(3), rtol=0, atol=1e-4)


def test_no_state_says_which_way_it_was():
    """States on disk hold the groups, and are compared with a run's settings; a copy goes the same way."""
    states = []
    for native in (False, True):
        p = torch.nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        adamw = AdamW([p], lr=0.1, fused=native)
        adamw.step()
        states.append(adamw.state_dict())
        assert "fused" not in adamw.defaults and not any("fused" in group for group in adamw.param_groups)
        other = AdamW([torch.nn.Parameter(torch.ones(3))], lr=0.3, fused=not native)
        other.load_state_dict(states[-1])
        assert copy.deepcopy(adamw).is_fused == native and other.is_fused != native
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"][0].keys() == states[1]["state"][0].keys()


def embedding_run(sparse: bool, native: bool, weight_decay: float = 0.0, state=None):
    """A table of which each step touches a few rows, by AdamW at changing rates: the table after each step."""
    torch.manual_seed(0)
    table = torch.nn.Embedding(40, 6, sparse=sparse)
    adamw = AdamW(table.parameters(), lr=0.1, weight_decay=weight_decay, fused=native)
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
    if native and fused.library() is None:
        pytest.skip("no C compiler here")
    dense, _ = embedding_run(False, False, weight_decay)
    sparse, (_, state) = embedding_run(True, native, weight_decay)
    for a, b in zip(dense, sparse, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    if not weight_decay:
        moved = (sparse[-1] != sparse[0]).any(1)
        assert (state["state"][0]["active"] == moved).all() and 0 < moved.sum() < 40  # the others were passed over


def test_a_sparse_run_goes_on_from_a_dense_one_and_between_the_two_ways():
    if fused.library() is None:
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
