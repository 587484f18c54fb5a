"""llama.py: its parts against closed forms and transformers, the whole against transformers, and `generate`."""


import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import fused
from config import RopeScaling
from llama import (
    SHORT,
    KVCache,
    RMSNorm,
    apply_rotary_emb,
    attend,
    load_pretrained,
    rotary_frequencies,
    rotary_table,
)


def max_difference(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


# --------------------------------------------------------------------------- parts


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_rmsnorm_equals_that_of_transformers(eps):
    tiny.transformers()
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    ours, theirs = RMSNorm(24, eps), LlamaRMSNorm(24, eps)
    weight = torch.rand(24, generator=torch.Generator().manual_seed(0))
    ours.weight.data, theirs.weight.data = weight, weight
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1)) * 3
    torch.testing.assert_close(ours(x), theirs(x))


def test_rmsnorm_is_computed_in_float32_so_squares_that_overflow_float16_do_no_harm():
    norm = RMSNorm(8).half()
    out = norm(torch.full((1, 8), 6e4).half())
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), torch.ones(1, 8), rtol=1e-3, atol=0)


def turned(x, head_dim, theta):
    """Each adjacent pair as one complex number, times exp(i * position * theta^(-2j / d)), in double precision."""
    place = torch.arange(x.shape[1], dtype=torch.float64)[:, None, None]
    j = torch.arange(head_dim // 2, dtype=torch.float64)
    angles = place * theta ** (-2 * j / head_dim)
    pairs = torch.complex(x[..., 0::2].double(), x[..., 1::2].double()) * torch.exp(1j * angles)
    return torch.stack((pairs.real, pairs.imag), -1).flatten(-2).float()


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_rotary_positions_turn_pairs_by_position_times_frequency(theta):
    random = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 40, 3, 16, generator=random), torch.randn(2, 40, 1, 16, generator=random)
    new_query, new_key = apply_rotary_emb(query, key, 16, 40, theta)
    torch.testing.assert_close(new_query, turned(query, 16, theta), rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(new_key, turned(key, 16, theta), rtol=1e-4, atol=2e-5)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([8, 64, 128]), st.sampled_from([1e4, 5e5]), st.floats(1, 64), st.floats(0.1, 4),
       st.floats(0.1, 9), st.integers(2, 10**5))
def test_scaled_frequencies_are_those_of_transformers(head_dim, theta, factor, low, more, original):
    hf = tiny.transformers()
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for kind, numbers in (("linear", {}), ("llama3", {"low_freq_factor": low, "high_freq_factor": low + more,
                                                      "original_max_seq_len": original})):
        theirs = {"rope_type": kind, "rope_theta": theta, "factor": factor,
                  **{name.replace("max_seq_len", "max_position_embeddings"): n for name, n in numbers.items()}}
        shape = hf.LlamaConfig(hidden_size=4 * head_dim, num_attention_heads=4, rope_parameters=theirs)
        want, scale = ROPE_INIT_FUNCTIONS[kind](shape, device="cpu")
        got = rotary_frequencies(head_dim, theta, RopeScaling(kind, factor, **numbers), torch.device("cpu"))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
        assert scale == 1.0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 23), st.integers(0, 99))
def test_a_product_of_rotated_vectors_depends_on_their_distance_only(i, j, shift, seed):
    random = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(8, generator=random).expand(1, 64, 1, 8) for _ in range(2))
    query, key = (x[0, :, 0] for x in apply_rotary_emb(query, key, 8, 64))
    assert (query[i] @ key[j]).item() == pytest.approx((query[i + shift] @ key[j + shift]).item(), abs=1e-4)


def test_more_tokens_than_the_context_are_refused():
    x = torch.zeros(1, 9, 1, 4)
    with pytest.raises(ValueError, match="9 tokens.* 8"):
        apply_rotary_emb(x, x, 4, 8)
    with pytest.raises(ValueError, match="9 tokens.* 8"):
        tiny.llama(max_seq_len=8)(tiny.tokens(1, 9))


def test_a_model_that_has_generated_can_still_be_trained():
    """The table of rotary positions is kept: made in inference mode first, it must not break a later backward."""
    rotary_table.cache_clear()
    model = tiny.llama()
    model.generate(tiny.tokens(1, 3), 2, temperature=0)
    model(tiny.tokens(1, 5))[0].sum().backward()
    assert model.layers[0].attention.wq.weight.grad.abs().sum() > 0


# --------------------------------------------------------------------------- the whole


def test_forward_gives_logits_and_hidden_states():
    logits, hidden = tiny.llama()(tiny.tokens(2, 7))
    assert logits.shape == (2, 7, tiny.VOCAB) and hidden.shape == (2, 7, tiny.DIM)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_logits_and_hidden_states_equal_transformers(tmp_path, kv_heads):
    theirs = tiny.hf_model(kv_heads=kv_heads, tied=False)
    theirs.save_pretrained(tmp_path)
    ids = tiny.tokens(3, tiny.CONTEXT)
    logits, hidden = load_pretrained(tmp_path)(ids)
    with torch.no_grad():
        want = theirs(ids, output_hidden_states=True)
    assert max_difference(logits, want.logits) < 1e-4
    assert max_difference(hidden, want.hidden_states[-1]) < 1e-4


@pytest.mark.parametrize("in_c", [False, True])
def test_weights_in_bfloat16_give_under_autocast_what_the_same_in_float32_give(in_c):
    """So only half the memory is needed where nothing is trained: what the layers add up stays in float32."""
    half = tiny.llama().bfloat16()
    wide = tiny.llama()
    wide.load_state_dict(half.state_dict())
    for model in (half, wide):
        if in_c:
            fused.accelerate(model)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = (model.hidden(tiny.tokens(3, 20)) for model in (half, wide))
    assert got.dtype == torch.float32 and torch.equal(got, want)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 11), st.integers(0, 99))
def test_a_later_token_never_changes_earlier_logits(place, seed):
    model, ids = tiny.llama(), tiny.tokens(1, 12, seed=seed)
    other = ids.clone()
    other[0, place] = (other[0, place] + 1) % tiny.VOCAB
    before, after = model(ids)[0], model(other)[0]
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.allclose(before[:, place:], after[:, place:])


def test_with_bidirectional_attention_the_last_token_changes_the_first_hidden_state():
    model, ids = tiny.llama(attention="bidirectional"), tiny.tokens(1, 6)
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % tiny.VOCAB
    assert not torch.allclose(model.hidden(ids)[:, 0], model.hidden(other)[:, 0])


def test_bidirectional_attention_equals_transformers_with_an_all_zero_mask(tmp_path):
    theirs = tiny.hf_model()
    theirs.save_pretrained(tmp_path)
    ids, lengths = tiny.tokens(2, 10), torch.tensor([10, 6])
    mask = torch.zeros(2, 1, 10, 10)  # transformers adds a 4-dimensional mask to the scores as it is
    mask[1, :, :, 6:] = torch.finfo(torch.float32).min
    with torch.no_grad():
        want = theirs(ids, attention_mask=mask).logits
        got = load_pretrained(tmp_path, attention="bidirectional")(ids, lengths)[0]
    assert max_difference(got[0], want[0]) < 1e-4 and max_difference(got[1, :6], want[1, :6]) < 1e-4


# --------------------------------------------------------------------------- generate


def naive(model, ids, n):
    """Greedy, without a cache: the whole window through the model for every token."""
    for _ in range(n):
        last = model(ids[:, -model.config.max_seq_len :])[0][:, -1]
        ids = torch.cat((ids, last.argmax(-1, keepdim=True)), dim=1)
    return ids


@pytest.mark.parametrize("length", [1, 5, 15, 16, 17, 30])
def test_generating_with_the_cache_equals_without_also_beyond_the_context(length):
    model, ids = tiny.llama(max_seq_len=16), tiny.tokens(2, length)
    assert torch.equal(model.generate(ids, 25, temperature=0), naive(model, ids, 25))


def test_each_row_of_a_batch_is_continued_as_it_would_be_alone():
    model, ids = tiny.llama(), tiny.tokens(2, 6)
    both = model.generate(ids, 20, temperature=0)
    assert torch.equal(both, torch.cat([model.generate(row[None], 20, temperature=0) for row in ids]))
    assert torch.equal(both[:, :6], ids) and both.shape == (2, 26)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampled_tokens_are_as_frequent_as_the_softmax_says(temperature):
    model, n = tiny.llama(vocab_size=5), 20_000
    model.tok_embeddings.weight.data /= 3  # flatter: every word should be seen
    prompt = tiny.tokens(1, 3, vocab=5)
    want = (model(prompt)[0][0, -1] / temperature).softmax(-1)
    torch.manual_seed(0)
    sampled = model.generate(prompt.expand(n, -1), 1, temperature)[:, -1]
    seen = torch.bincount(sampled, minlength=5) / n
    assert want.min() > 0.001  # else the test would see nothing
    assert ((seen - want).abs() < 5 * (want * (1 - want) / n).sqrt()).all()  # five standard errors


def test_zero_new_tokens_give_the_prompt_back():
    ids = tiny.tokens(1, 4)
    assert torch.equal(tiny.llama().generate(ids, 0), ids)


@pytest.mark.parametrize(("attention", "length", "temperature"),
                         [("causal", 3, -0.1), ("causal", 0, 1.0), ("bidirectional", 3, 1.0)])
def test_generate_refuses_what_it_cannot_do(attention, length, temperature):
    with pytest.raises(ValueError, match="generate wants"):
        tiny.llama(attention=attention).generate(tiny.tokens(1, length), 1, temperature)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_one_position_a_row_is_that_of_the_whole_sentences(attention, grad_checkpoint):
    """What spares the last layer's work: the state, and every gradient, at any position."""
    model = tiny.llama(attention=attention, n_layers=3, n_kv_heads=2).train()
    model.grad_checkpoint = grad_checkpoint
    tokens, lengths, at = tiny.tokens(4, 11), torch.tensor([11, 1, 7, 4]), torch.tensor([10, 0, 3, 3])
    found = []
    for states in (lambda: model.hidden(tokens, lengths, at=at)[:, 0],
                   lambda: model.hidden(tokens, lengths)[torch.arange(4), at]):
        model.zero_grad()
        out = states()
        out.pow(3).sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for ours, judge in zip(*found, strict=True):
        torch.testing.assert_close(ours, judge, rtol=1e-4, atol=1e-4 * float(judge.abs().max()))


def test_one_position_of_a_cached_token_is_that_of_the_whole_sentence():
    """And after the first window there is one token at a time, or an error."""
    model = tiny.llama(n_layers=2)
    tokens = tiny.tokens(2, 8)
    caches = [KVCache(2, 8, model.config, torch.float32, torch.device("cpu")) for _ in model.layers]
    with torch.no_grad():
        model.hidden(tokens[:, :7], caches=caches)
        ours = model.hidden(tokens[:, 7:], caches=caches, start=7, at=torch.tensor([0, 0]))
        torch.testing.assert_close(ours[:, 0], model.hidden(tokens)[:, 7])
        with pytest.raises(ValueError, match="one token at a time"):
            model.hidden(tokens[:, 5:], caches=caches, start=5)


@pytest.mark.parametrize("length, is_wide", [(9, True), (SHORT, True), (SHORT + 1, False)])
@pytest.mark.parametrize("kind", ["causal", "masked"])
def test_short_sentences_in_bfloat16_have_float32s_gradients(length, is_wide, kind):
    """... rounded once, to the bit; long ones, and those without a gradient, have PyTorch's for bfloat16."""
    torch.manual_seed(0)
    shape = {"query": 4, "key": 2, "value": 2}
    own = [torch.randn(1, heads, length, 8).bfloat16().requires_grad_() for heads in shape.values()]
    mask = None if kind == "causal" else (torch.arange(length) < length - 2)[None, None, None]
    wide = [x.detach().float().requires_grad_() for x in own]
    out = F.scaled_dot_product_attention(*wide, mask, 0.0, mask is None, enable_gqa=True).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(*own, mask, mask is None, 0.0)
    with torch.no_grad():
        plain = F.scaled_dot_product_attention(*own, mask, 0.0, mask is None, enable_gqa=True)
        assert torch.equal(attend(*own, mask, mask is None, 0.0), plain)
    assert found.dtype == torch.bfloat16 and torch.equal(found, out if is_wide else plain)
    found.float().sin().sum().backward()
    out.float().sin().sum().backward()
    same = [torch.equal(a.grad, b.grad.bfloat16()) for a, b in zip(own, wide, strict=True)]
    assert all(same) if is_wide else not all(same)
