"""What runs in C against PyTorch in float64, and whole models with it against the same models without."""

import copy
import ctypes
import hashlib
import math
import os
import pickle
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import fused
from classifier import LlamaEmbeddingClassifier, classification_loss
from config import RopeScaling
from llama import PLAIN, KVCache, Linear, RMSNorm, rotary_table

pytestmark = pytest.mark.skipif(fused.library() is None, reason="no C compiler here")


IN_C = fused.Operations(PLAIN)


def accelerated(model):
    assert fused.accelerate(model) and fused.is_accelerated(model)
    return model


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
            ours = gradients(lambda a, w: fused.RMSNorm.apply(a, w, 1e-6), x, weight)
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
    ours = gradients(lambda a: IN_C.rotate(a, table), x)
    judge = gradients(lambda a: PLAIN.rotate(a, table), x)
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
        ours = gradients(fused.SwiGLU.apply, a, b)
    finally:
        torch.set_num_threads(1)
    for x, y in zip(ours, judge, strict=True):
        close(x, y, dtype)


def test_values_at_the_edge():
    """Very large gates give what PyTorch gives; what is not finite stays so, a NaN in bfloat16 too."""
    a = torch.tensor([-200.0, -88.5, -0.0, 88.5, 200.0, torch.inf, torch.nan])
    ours, judge = fused.SwiGLU.apply(a, torch.ones(7)), F.silu(a)
    torch.testing.assert_close(ours, judge, equal_nan=True, rtol=1e-5, atol=1e-30)
    assert not fused.SwiGLU.apply(torch.tensor([-torch.inf]), torch.ones(1)).isfinite().any()
    x = torch.tensor([[1.0, torch.nan], [3e38, 1.0], [0.0, 0.0]])
    with torch.autocast("cpu", torch.bfloat16):
        out = fused.RMSNorm.apply(x, torch.ones(2), 1e-6)
    assert out[0].isnan().all() and (out[2] == 0).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 70), st.sampled_from([2, 6, 16, 34, 576]), st.sampled_from([torch.float32, torch.bfloat16]),
       st.sampled_from([1, 2, 3]))
def test_one_vector_times_a_matrix(rows, dim, dtype, threads):
    torch.manual_seed(0)
    linear, x = accelerated(Linear(dim, rows)).to(dtype), torch.randn(1, 1, dim).to(dtype)
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            ours = linear(x)
    finally:
        torch.set_num_threads(1)
    close(ours, x.double() @ linear.weight.detach().double().T, dtype)
    assert ours.shape == (1, 1, rows) and ours.dtype == dtype


def test_bfloat16_is_rounded_to_the_nearest_and_of_two_to_the_even_one():
    linear, step = accelerated(Linear(2, 1)).bfloat16(), 2.0**-8  # half of bfloat16's distance behind 1
    with torch.inference_mode():
        linear.weight.fill_(1.0)
        found = [float(linear(torch.tensor([[[a, b]]]).bfloat16())) for a, b in (
            (1.0, step), (1 + 2 * step, step), (1.0, step * 1.125), (-1.0, -step))]
    assert found == [1.0, 1 + 4 * step, 1 + 2 * step, -1.0]


# --------------------------------------------------------------------------- whole models


def loss_and_gradients(on: bool, dtype=torch.float32, **more):
    torch.manual_seed(0)
    llama = tiny.llama(n_layers=3, attention=more.get("attention", "causal")).train()
    config = SimpleNamespace(num_labels=4, hidden_dropout_prob=0.2, pooling=more.get("pooling", "last"))
    model = LlamaEmbeddingClassifier(config, llama).train()
    assert not on or fused.accelerate(model)
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


def greedy(model, n: int, steps: list) -> torch.Tensor:
    """n greedy tokens after five; `steps` grows by each that the decoder took."""
    real = fused.Decoder.step
    fused.Decoder.step = lambda self, *arguments: steps.append(1) or real(self, *arguments)
    try:
        return model.generate(tiny.tokens(1, 5), n, 0.0)
    finally:
        fused.Decoder.step = real


SHAPES = [{}, {"n_kv_heads": 4}, {"n_kv_heads": 1}, {"hidden_dim": 16}, {"n_heads": 16, "n_kv_heads": 8},
          {"max_seq_len": 7}, {"tie_embeddings": True}, {"head_dim": 4}, {"head_dim": 24, "hidden_dim": 16},
          {"dim": 34, "head_dim": 8}, {"rope_scaling": RopeScaling("linear", 3.0)}]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_generation_with_c_is_the_plain_one(shape, threads):
    model = tiny.llama(n_layers=3, **shape)
    plain, steps = greedy(model, 40, []), []
    accelerated(model)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(greedy(model, 40, steps), plain)
    finally:
        torch.set_num_threads(1)
    assert len(steps) == (2 if shape == {"max_seq_len": 7} else 39)  # beyond the context every position changes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("more", [{}, {"head_dim": 6}, {"head_dim": 20}], ids=str)
def test_a_decoding_step_is_as_near_to_float64_as_the_plain_one(dtype, threads, more):
    """The states of eight tokens, one after the other."""
    exact = tiny.llama(n_layers=3, **more).double()
    model = accelerated(tiny.llama(n_layers=3, **more).to(dtype))
    plain = tiny.llama(n_layers=3, **more).to(dtype)
    tokens, found = tiny.tokens(1, 8), {}
    table = model.angles(8, torch.device("cpu"))
    torch.set_num_threads(threads)
    with torch.inference_mode():
        judge = exact.hidden(tokens)
        for on in (True, False):
            caches = [KVCache(1, 8, model.config, dtype, torch.device("cpu")) for _ in model.layers]
            decoder = fused.Decoder(model, caches) if on else None
            states = []
            for i in range(8):
                if on:
                    assert fused.Decoder.supports(model, caches)
                    states.append(model.norm(decoder.step(model.tok_embeddings(tokens[:, i : i + 1]), i, table[i])))
                else:
                    states.append(plain.hidden(tokens[:, i : i + 1], caches=caches, start=i))
            found[on] = float((torch.cat(states, 1).double() - judge).norm() / judge.norm())
    torch.set_num_threads(1)
    assert found[True] < (1e-5 if dtype == torch.float32 else 1.2 * found[False])


def test_a_model_with_an_adapter_or_a_hook_is_not_decoded_in_c():
    class Adapted(Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model = tiny.llama(n_layers=2)
    model.layers[0].attention.wq.__class__ = Adapted
    plain, steps = greedy(model, 10, []), []
    assert torch.equal(greedy(accelerated(model), 10, steps), plain) and not steps
    hooked = accelerated(tiny.llama(n_layers=2))
    hooked.layers[1].feed_forward.w2.register_forward_hook(lambda *_: None)
    greedy(hooked, 5, steps)
    assert not steps


def test_what_c_does_not_fit_goes_the_plain_way():
    """Gates of two types, vectors with holes, tables that are too short, frozen weights of another type."""
    feed_forward, x = tiny.llama(n_layers=1).layers[0].feed_forward, torch.randn(2, 3, tiny.DIM)
    feed_forward.w1.forward = lambda x: F.linear(x, feed_forward.w1.weight).bfloat16()
    plain = feed_forward(x)
    torch.testing.assert_close(accelerated(feed_forward)(x), plain)
    linear, wide = accelerated(Linear(16, 4)), torch.randn(16, 2)
    with torch.inference_mode():
        torch.testing.assert_close(linear(wide[:, 0]), linear.weight @ wide[:, 0])
    query = torch.randn(1, 5, 2, 8)
    with pytest.raises(RuntimeError):
        IN_C.rotate(query, rotary_table(8, 64, 10000.0, torch.device("cpu"))[:3])
    weight = (torch.rand(6) + 0.5).bfloat16()
    ours = gradients(lambda a, w: fused.RMSNorm.apply(a, w, 1e-6), torch.randn(4, 6), weight)
    assert ours[1].isfinite().all() and ours[1].abs().max() < 100 and ours[2].dtype == torch.bfloat16


def test_norm_weights_in_other_types_are_read_right():
    norm = RMSNorm(6).bfloat16()
    x = torch.randn(3, 6).bfloat16()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        plain = norm(x)
        torch.testing.assert_close(accelerated(norm)(x), plain, rtol=0.02, atol=0.02)


@pytest.fixture
def calls(monkeypatch):
    """Grows by the name of each function of fused.c that a model calls."""
    names, real = [], fused._call
    monkeypatch.setattr(fused, "_call", lambda name, *arguments: names.append(name) or real(name, *arguments))
    return names


def test_one_models_acceleration_is_no_other_models(calls):
    """One that was made before, and one made after."""
    before, model = tiny.llama(), accelerated(tiny.llama())
    after = tiny.llama()
    for plain in (before, after):
        logits, _ = plain(tiny.tokens(2, 9))
        logits.sum().backward()
        plain.generate(tiny.tokens(1, 5), 3, 0.0)
        assert not calls and not fused.is_accelerated(plain)
    ours, _ = model(tiny.tokens(2, 9))
    ours.sum().backward()
    model.generate(tiny.tokens(1, 5), 3, 0.0)
    assert set(calls) == {"rms_norm", "rms_norm_back", "rotate", "swiglu", "swiglu_back", "matvec", "decode"}
    close(ours, logits, torch.float32)
    assert not torch.equal(ours, logits)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_accelerated_too_and_has_weights_of_its_own(copied, calls):
    model = accelerated(tiny.llama())
    expected, _ = model(tiny.tokens(2, 9))
    other = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    calls.clear()
    assert fused.is_accelerated(other) and torch.equal(other(tiny.tokens(2, 9))[0], expected) and calls


def test_acceleration_changes_no_state_and_other_weights_can_be_loaded():
    """Twice is once; weights from the device "meta" on are assigned, as a finished run's are."""
    model, source = tiny.llama(), tiny.llama(seed=1)
    names = list(model.state_dict())
    expected = accelerated(source)(tiny.tokens(2, 9))[0]
    accelerated(accelerated(model))
    assert model.ops.plain is PLAIN and list(model.state_dict()) == names
    with torch.device("meta"):
        empty = accelerated(type(model)(model.config)).eval()
    layer = empty.layers[0]
    layer.feed_forward(layer.ffn_norm(torch.empty(2, 9, tiny.DIM, device="meta")))  # the plain way: nothing to compute
    for target, assign in ((model, False), (empty, True)):
        target.load_state_dict(source.state_dict(), assign=assign)
        assert torch.equal(target(tiny.tokens(2, 9))[0], expected)


def test_nothing_is_accelerated_that_is_no_llama_or_without_a_compiler(monkeypatch, calls):
    assert not fused.accelerate(torch.nn.Linear(2, 2))
    model = tiny.llama()
    monkeypatch.setattr(fused, "library", lambda: None)
    assert not fused.accelerate(model) and not fused.is_accelerated(model) and not fused.supports(torch.ones(1))
    model.generate(tiny.tokens(1, 5), 3, 0.0)
    assert not calls


# --------------------------------------------------------------------------- compiled once

posix = pytest.mark.skipif(os.name == "nt", reason="the compiler of these tests is a shell script")
TINY = "float twice(float x) { return 2 * x; }\n"


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Compiles a tiny file, in a cache of the test's own; returns the commands that compiled (and not those that asked
    for the version)."""
    log, cc, source = tmp_path / "log", tmp_path / "cc", tmp_path / "tiny.c"
    cc.write_text(f'#!/bin/sh\necho "$@" >> "{log}"\nexec cc "$@"\n', encoding="utf-8")
    cc.chmod(0o755)
    source.write_text(TINY, encoding="utf-8")
    log.touch()
    for name, value in {"CC": cc, "HOME": tmp_path, "XDG_CACHE_HOME": tmp_path / "cache"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(fused, "SOURCE", source)
    monkeypatch.setattr(fused, "_SIGNATURES", {"twice": [ctypes.c_float]})
    return lambda: [line for line in log.read_text(encoding="utf-8").splitlines() if "-o" in line.split()]


def works():
    """Is there a library now that a new process would have?"""
    found, fault = fused._find()
    found.twice.restype = ctypes.c_float
    assert fault == ""
    return found.twice(21.0) == 42.0


@posix
def test_a_second_start_compiles_nothing(compiled):
    assert works() and len(compiled()) == 1
    assert works() and len(compiled()) == 1
    (file,) = fused._cache().iterdir()
    assert file.stat().st_mode & 0o777 == 0o600 and fused._cache().stat().st_mode & 0o777 == 0o700


@posix
@pytest.mark.parametrize("what", ["source", "flags", "compiler", "processor"])
def test_what_it_was_compiled_from_and_for_decides(what, compiled, monkeypatch):
    assert works()
    if what == "source":
        fused.SOURCE.write_text(TINY + "/* */", encoding="utf-8")
    elif what == "flags":
        monkeypatch.setattr(fused, "_FLAGS", [*fused._FLAGS, "-g0"])
    elif what == "compiler":
        monkeypatch.setattr(fused, "compiler", lambda: "cc 99")
    else:
        monkeypatch.setattr(fused, "_processor", lambda: "another")
    assert works() and len(compiled()) == 2
    assert works() and len(compiled()) == 2


@posix
@pytest.mark.parametrize("damage", ["a flipped bit", "cut off", "empty", "does not load", "others can write it",
                                    "another's", "a link"])
def test_a_damaged_or_foreign_file_is_compiled_anew(damage, compiled, tmp_path, monkeypatch):
    assert works()
    (file,) = fused._cache().iterdir()
    content, stem = file.read_bytes(), file.stem
    if damage in ("a flipped bit", "cut off", "empty"):
        file.unlink()  # and not written over: this process has it mapped
    if damage == "a flipped bit":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut off":
        file.write_bytes(content[:1000])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "does not load":
        key = stem.partition("-")[0]
        file.unlink()
        (file.parent / f"{key}-{hashlib.sha256(b'x').hexdigest()}.so").write_bytes(b"x")
    elif damage == "others can write it":
        file.chmod(0o666)
    elif damage == "another's":
        real = os.lstat
        monkeypatch.setattr(os, "lstat", lambda path: SimpleNamespace(
            st_mode=real(path).st_mode, st_uid=real(path).st_uid + (Path(path).suffix == ".so")))
    else:
        os.rename(file, tmp_path / "elsewhere")
        os.symlink(tmp_path / "elsewhere", file)
    assert works() and len(compiled()) == 2
    assert [path.read_bytes() for path in file.parent.iterdir()] == [content]
    if damage != "another's":  # which the new one is too
        assert works() and len(compiled()) == 2


@posix
@pytest.mark.parametrize("fault", ["others can write it", "another's", "a link", "a file", "full", "no home"])
def test_without_a_cache_it_is_compiled_at_each_start(fault, compiled, tmp_path, monkeypatch):
    place = tmp_path / "cache" / "minllama"
    place.mkdir(parents=True, mode=0o700)
    if fault == "others can write it":
        place.chmod(0o777)
    elif fault == "another's":
        monkeypatch.setattr(os, "getuid", lambda: place.stat().st_uid + 1)
    elif fault == "a link":
        place.rename(tmp_path / "elsewhere")
        place.symlink_to(tmp_path / "elsewhere")
    elif fault == "a file":
        place.rmdir()
        place.touch()
    elif fault == "full":
        def full(**_):
            raise OSError(28, "No space left on device")
        monkeypatch.setattr(fused.tempfile, "mkstemp", full)
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: exec("raise RuntimeError"))
    assert works() and works() and len(compiled()) == 2
    assert place.is_file() or not list(place.iterdir())


@posix
def test_first_starts_at_once_spoil_nothing(compiled):
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: works(), range(4)))
    before = len(compiled())
    assert works() and len(compiled()) == before
    for file in fused._cache().iterdir():
        assert file.stem.endswith(hashlib.sha256(file.read_bytes()).hexdigest())


@posix
def test_where_nothing_may_be_executed_it_says_so_at_once(compiled, tmp_path, monkeypatch):
    monkeypatch.setattr(fused, "_is_noexec", lambda folder: True)
    found, fault = fused._find()
    assert found is None and not compiled()
    assert fault == (f"{tempfile.gettempdir()} is mounted noexec: what is compiled there cannot be loaded (set TMPDIR "
                     "to a folder on another file system)")


@posix
def test_a_temporary_folder_without_execution_is_no_hindrance_where_there_is_a_cache(compiled, monkeypatch):
    load = fused._load
    monkeypatch.setattr(fused, "_is_noexec", lambda folder: folder == Path(tempfile.gettempdir()))

    def noexec(path):
        if fused._cache() not in path.parents:
            raise OSError(f"{path}: failed to map segment from shared object")
        return load(path)

    monkeypatch.setattr(fused, "_load", noexec)
    assert works() and len(compiled()) == 1
    monkeypatch.setattr(fused, "_cache", lambda: None)
    assert fused._find()[0] is None and len(compiled()) == 1


@posix
def test_a_compiler_that_took_too_long_does_not_decide_for_ever(compiled, monkeypatch):
    run, calls = subprocess.run, []

    def slow(command, **more):
        if "-o" in command:
            calls.append(command)
            if len(calls) == 1:
                raise subprocess.TimeoutExpired(command, 60)
        return run(command, **more)

    monkeypatch.setattr(fused.subprocess, "run", slow)
    assert works() and len(calls) == 2 and not list(fused._cache().iterdir())
    assert works() and works() and len(calls) == 3


@posix
def test_a_compiler_that_does_not_work_is_named(compiled, monkeypatch):
    for command in ("/nowhere/cc", "false", '"'):
        monkeypatch.setenv("CC", command)
        assert fused._find() == (None, f"the C compiler `{command}` does not work here ($CC names another)")
