"""What runs in C against PyTorch in float64, and whole models with it against the same models without."""

import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import kernels
from classifier import LlamaEmbeddingClassifier, classification_loss
from llama import Linear, RMSNorm, rotary_table, rotate

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no C compiler here")


@pytest.fixture(autouse=True)
def switched_on(plain_pytorch):
    kernels.switch(True)


def close(ours, judge, dtype):
    """To float32's rounding; bfloat16 has 8 bits, and a sum of many of them loses one or two more."""
    tolerance = 3e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ours.double(), judge.double(), rtol=tolerance, atol=tolerance)


def gradients(function, *inputs):
    """The output and each input's gradient, for one random gradient of the output."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out.dtype))
    return [out.detach(), *(x.grad for x in inputs)]


SIZES = st.tuples(st.integers(1, 3), st.integers(1, 40), st.sampled_from([2, 6, 16, 34, 64]))


@settings(max_examples=30, deadline=None)
@given(SIZES, st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([1, 2, 3]), st.floats(1e-3, 1e3))
def test_rms_norm_is_pytorchs(size, autocast, threads, scale):
    torch.manual_seed(0)
    x, weight = torch.randn(size) * scale, torch.rand(size[-1]) + 0.5
    judge = gradients(lambda a, w: F.rms_norm(a, size[-1:], w, 1e-6), x.double(), weight.double())
    torch.set_num_threads(threads)
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast == torch.bfloat16):
            ours = gradients(lambda a, w: kernels.RMSNorm.apply(a, w, 1e-6), x, weight)
    finally:
        torch.set_num_threads(1)
    assert ours[0].dtype == autocast and ours[1].dtype == ours[2].dtype == torch.float32
    # The gradient of x is a difference: its rounding goes by the size of what is subtracted, 1 / scale.
    for a, b, size_of in zip(ours, judge, (1, scale, math.sqrt(x.numel())), strict=True):
        close(a * (size_of if size_of == scale else 1 / size_of), b * (size_of if size_of == scale else 1 / size_of),
              autocast)


@settings(max_examples=30, deadline=None)
@given(SIZES, st.integers(1, 3), st.sampled_from([torch.float32, torch.bfloat16]))
def test_rotary_positions_are_the_plain_ones(size, heads, dtype):
    """The judge is the complex product, in the type's own precision; a rotation's gradient is the one back."""
    torch.manual_seed(0)
    x = torch.randn(size[0], size[1], heads, size[2]).to(dtype)
    table = rotary_table(size[2], 64, 10000.0, torch.device("cpu"))[: size[1]]
    ours = gradients(lambda a: rotate(a, table), x)
    kernels.switch(False)
    judge = gradients(lambda a: rotate(a, table), x)
    kernels.switch(True)
    for a, b in zip(ours, judge, strict=True):
        assert a.dtype == dtype
        close(a, b, dtype)


@settings(max_examples=30, deadline=None)
@given(SIZES, st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([1e-3, 1.0, 30.0, 200.0]),
       st.sampled_from([1, 2, 3]))
def test_swiglu_is_pytorchs(size, dtype, scale, threads):
    torch.manual_seed(0)
    a, b = (torch.randn(size) * scale).to(dtype), torch.randn(size).to(dtype)
    judge = gradients(lambda x, y: F.silu(x) * y, a.double(), b.double())
    torch.set_num_threads(threads)
    try:
        ours = gradients(kernels.SwiGLU.apply, a, b)
    finally:
        torch.set_num_threads(1)
    for x, y in zip(ours, judge, strict=True):
        close(x, y, dtype)


def test_values_at_the_edge():
    """Infinite and very large gates give what PyTorch gives; a NaN stays one, in bfloat16 too."""
    a = torch.tensor([-torch.inf, -200.0, -88.5, -0.0, 88.5, 200.0, torch.inf, torch.nan])
    ours, judge = kernels.SwiGLU.apply(a, torch.ones(8)), F.silu(a)
    torch.testing.assert_close(ours[1:], judge[1:], equal_nan=True, rtol=1e-5, atol=1e-30)
    x = torch.tensor([[1.0, torch.nan], [3e38, 1.0], [0.0, 0.0]])
    with torch.autocast("cpu", torch.bfloat16):
        out = kernels.RMSNorm.apply(x, torch.ones(2), 1e-6)
    assert out[0].isnan().all() and (out[2] == 0).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.sampled_from([2, 6, 16, 34, 576]), st.sampled_from([torch.float32, torch.bfloat16]),
       st.sampled_from([1, 2, 3]))
def test_one_vector_times_a_matrix(rows, dim, dtype, threads):
    torch.manual_seed(0)
    linear, x = Linear(dim, rows).to(dtype), torch.randn(1, 1, dim).to(dtype)
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            ours = linear(x)
    finally:
        torch.set_num_threads(1)
    close(ours, x.double() @ linear.weight.detach().double().T, dtype)
    assert ours.shape == (1, 1, rows) and ours.dtype == dtype


# --------------------------------------------------------------------------- whole models


def loss_and_gradients(on: bool, dtype=torch.float32, **more):
    kernels.switch(on)
    torch.manual_seed(0)
    llama = tiny.llama(n_layers=3, attention=more.get("attention", "causal")).train()
    config = SimpleNamespace(num_labels=4, hidden_dropout_prob=0.2, pooling=more.get("pooling", "last"))
    model = LlamaEmbeddingClassifier(config, llama).train()
    llama.tok_embeddings.sparse = more.get("sparse", False)
    llama.grad_checkpoint = more.get("grad_checkpoint", False)
    lengths = torch.tensor([9, 1, 5, 17])
    batch = {"tokens": tiny.tokens(4, 17), "lengths": lengths, "labels": torch.tensor([0, 3, 1, 2])}
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        losses = classification_loss(model, batch)
    losses.mean().backward()
    return losses.detach(), {n: p.grad.to_dense() for n, p in model.named_parameters() if p.grad is not None}


WAYS = [{}, {"pooling": "mean", "attention": "bidirectional"}, {"sparse": True}, {"grad_checkpoint": True}]


@pytest.mark.parametrize("more", WAYS)
def test_a_model_with_c_has_the_plain_models_loss_and_gradients(more):
    plain_losses, plain = loss_and_gradients(False, **{**more, "sparse": False})
    losses, ours = loss_and_gradients(True, **more)
    close(losses, plain_losses, torch.float32)
    assert ours.keys() == plain.keys()
    for name in plain:
        size = plain[name].abs().max()
        close(ours[name] / size, plain[name] / size, torch.float32)


@pytest.mark.parametrize("more", WAYS)
def test_in_bfloat16_it_is_as_near_to_float32_as_the_plain_model(more):
    exact_losses, exact = loss_and_gradients(False, **{**more, "sparse": False})
    plain_losses, plain = loss_and_gradients(False, torch.bfloat16, **{**more, "sparse": False})
    losses, ours = loss_and_gradients(True, torch.bfloat16, **more)
    assert not torch.equal(losses, plain_losses) and (losses - exact_losses).norm() < 0.05 * exact_losses.norm()
    error, plain_error = (math.sqrt(sum(float((found[n] - exact[n]).pow(2).sum() / exact[n].pow(2).sum())
                                        for n in exact)) for found in (ours, plain))
    assert error < 1.2 * plain_error


def test_generation_with_c_is_the_plain_one():
    model = tiny.llama(n_layers=3)
    ours = model.generate(tiny.tokens(1, 5), 40, 0.0)
    kernels.switch(False)
    assert torch.equal(ours, model.generate(tiny.tokens(1, 5), 40, 0.0))


def test_bfloat16_weights_generate_too():
    """The logits of a step by the C and by PyTorch's bfloat16, near each other."""
    model = tiny.llama(n_layers=2).bfloat16()
    found = []
    for on in (True, False):
        kernels.switch(on)
        with torch.inference_mode():
            found.append(model(tiny.tokens(1, 1))[0].float())
    torch.testing.assert_close(*found, rtol=0.05, atol=0.05 * float(found[1].abs().max()))
    assert model.generate(tiny.tokens(1, 5), 40, 0.0).shape == (1, 45)


def test_norm_weights_in_other_types_are_read_right():
    norm = RMSNorm(6).bfloat16()
    x = torch.randn(3, 6).bfloat16()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        ours = norm(x)
        kernels.switch(False)
        torch.testing.assert_close(ours, norm(x), rtol=0.02, atol=0.02)
