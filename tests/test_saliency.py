"""training/saliency.py: gradient times input against finite differences and a linear model, deletion against the
predictions of the shortened sentence."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_sentences
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import nn

from classifier import LlamaEmbeddingClassifier
from config import RunConfig
from llama import load_pretrained
from tokenizer import Tokenizer
from training import device as devices
from training import saliency

TEXT = "the film is very good and long"


@pytest.fixture(scope="module")
def device():
    return devices.choose_device(RunConfig(option="predict", device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return Tokenizer(tokenizer_model=tiny_model)


def classifier(folder, n_classes: int = 3, pooling: str = "last", loss: str = "ce") -> LlamaEmbeddingClassifier:
    torch.manual_seed(0)
    settings = SimpleNamespace(num_labels=n_classes, hidden_dropout_prob=0.3, pooling=pooling, loss=loss)
    model = LlamaEmbeddingClassifier(settings, load_pretrained(folder)).eval()
    with torch.no_grad():
        model.classifier_head.weight.mul_(100 if loss == "ordinal" else 20)  # so that the classes differ
    return model


class Linear(nn.Module):
    """The sum of the tokens' embeddings, and one linear layer: what each token adds is known exactly."""

    def __init__(self, n_words: int, n_classes: int = 4):
        super().__init__()
        torch.manual_seed(1)
        self.llama = SimpleNamespace(tok_embeddings=nn.Embedding(n_words, 8))
        self.head = nn.Linear(8, n_classes)

    def forward(self, tokens, lengths):
        at = torch.arange(tokens.shape[1]) < lengths[:, None]
        return self.head((self.llama.tok_embeddings(tokens) * at[:, :, None]).sum(1)).log_softmax(-1)


# --------------------------------------------------------------------------- gradient times input


@pytest.mark.parametrize("n_classes, pooling, loss", [
    (2, "last", "ce"), (60, "mean", "ce"), (3, "max", "ce"), (3, "last", "ordinal"), (5, "mean", "ordinal")])
def test_gradient_times_input_is_the_slope_along_the_embedding(tiny_model, tokenizer, device, n_classes, pooling, loss):
    """d margin / d s, where one token's embedding is s times itself, at s = 1: by central differences."""
    model = classifier(tiny_model, n_classes, pooling, loss)
    tokens = np.array(tokenizer.encode(TEXT, bos=False, eos=False), dtype=np.int32)
    log_probs, found = saliency.gradient_times_input(model, tokens, device)
    first, second = np.argsort(-log_probs)[:2]
    batch, lengths = torch.from_numpy(tokens.astype(np.int64))[None], torch.tensor([len(tokens)])

    def margin(at: int, s: float) -> float:
        def scale(module, given, out):
            out = out.clone()
            out[0, at] *= s
            return out
        handle = model.llama.tok_embeddings.register_forward_hook(scale)
        with torch.no_grad():
            out = model(batch, lengths)[0].double().numpy()
        handle.remove()
        return out[first] - out[second]

    # In float32 a smaller step would be lost in the rounding.
    want = [(margin(i, 1.02) - margin(i, 0.98)) / 0.04 for i in range(len(tokens))]
    np.testing.assert_allclose(found, want, atol=0.02 * np.abs(want).max())
    assert np.abs(want).max() > 0.02


def test_gradient_times_input_is_exact_where_the_model_is_linear(tokenizer, device):
    """... where it is what deleting the token loses, too; and all of them and the bias are the margin."""
    model = Linear(tokenizer.n_words)
    tokens = np.array(tokenizer.encode(TEXT, bos=False, eos=False), dtype=np.int32)
    log_probs, found = saliency.gradient_times_input(model, tokens, device)
    first, second = np.argsort(-log_probs)[:2]
    with torch.no_grad():
        way = model.head.weight[first] - model.head.weight[second]
        want = model.llama.tok_embeddings.weight[torch.from_numpy(tokens).long()] @ way
        bias = float(model.head.bias[first] - model.head.bias[second])
    np.testing.assert_allclose(found, want.numpy(), atol=1e-5)
    assert found.sum() + bias == pytest.approx(log_probs[first] - log_probs[second], abs=1e-4)


def test_both_measures_are_the_same_where_the_model_is_linear(tokenizer, device):
    """Words in front of which there is a space have the same tokens whatever stands before them."""
    model = Linear(tokenizer.n_words)
    (one,) = saliency.decisions(model, tokenizer, [TEXT], device, 128, None)
    np.testing.assert_allclose(one.gradient[1:], one.deletion[1:], atol=1e-4)
    assert one.units == tuple(TEXT.split()) and one.agreement > 0.7 and len(one.log_probs) == 4


# --------------------------------------------------------------------------- deletion


@pytest.mark.parametrize("n_classes, loss", [(2, "ce"), (60, "ce"), (3, "ordinal")])
def test_deletion_is_what_the_shortened_sentence_says(tiny_model, tokenizer, device, n_classes, loss):
    model = classifier(tiny_model, n_classes, "last", loss)
    (one,) = saliency.decisions(model, tokenizer, [TEXT], device, 128, None)

    def said(text: str) -> np.ndarray:
        tokens = torch.tensor([tokenizer.encode(text, bos=tokenizer.add_bos, eos=False)])
        with torch.no_grad():
            return model(tokens)[0].double().numpy()

    words = TEXT.split()
    np.testing.assert_allclose(one.log_probs, said(TEXT), atol=1e-5)
    assert (one.first, one.second) == tuple(np.argsort(-said(TEXT))[:2])
    for i, word in enumerate(words):
        shorter = said(" ".join(words[:i] + words[i + 1:]))
        assert one.units[i] == word
        assert one.deletion[i] == pytest.approx(one.margin - (shorter[one.first] - shorter[one.second]), abs=1e-4)
    assert one.agreement == pytest.approx(spearmanr(one.gradient, one.deletion).statistic)
    assert np.abs(one.deletion).max() > 1e-3


@pytest.mark.parametrize("text, begin, end, want", [
    ("a fine film", 2, 6, "a film"), ("a fine film", 0, 1, "fine film"), ("a fine film", 7, 11, "a fine"),
    ("very good.", 5, 9, "very ."), ("很好看", 1, 2, "很看"), ("good", 0, 4, "")])
def test_without(text, begin, end, want):
    assert saliency.without(text, begin, end) == want


@pytest.mark.parametrize("text", ["很好看的电影", "good", "!", "好", "a 好 film", " x  ", "é"])
def test_texts_of_one_word_and_of_no_spaces(tiny_model, tokenizer, device, text):
    (one,) = saliency.decisions(classifier(tiny_model), tokenizer, [text], device, 128, None)
    assert "".join(one.units) == text.replace(" ", "")
    assert np.isfinite(one.gradient).all() and np.isfinite(one.deletion).all() and len(one.deletion) == len(one.units)
    assert one.agreement is None or len(one.units) > 2


def test_only_what_the_model_sees_is_looked_at(tiny_model, tokenizer, device):
    model = classifier(tiny_model)
    whole = tokenizer.spans(TEXT)
    (one,) = saliency.decisions(model, tokenizer, [TEXT], device, 128, 3)
    assert one.is_cut and one.text == TEXT[:whole[2][1]]
    (same,) = saliency.decisions(model, tokenizer, [TEXT], device, 128, len(whole))
    assert not same.is_cut and same.text == TEXT
    (long,) = saliency.decisions(model, tokenizer, ["good " * 300], device, 128, None)
    assert long.is_cut and len(long.units) <= saliency.MOST_UNITS


# --------------------------------------------------------------------------- words and tokens


@given(st.text("ab 好看!", max_size=20), st.integers(1, 5), st.integers(1, 8))
def test_every_token_belongs_to_the_unit_that_it_is_in(text, size, most):
    spans = [(i, min(i + size, len(text))) for i in range(0, len(text), size)]
    units, unit_of = saliency.units_of(text, spans, most)
    assert len(units) <= most and "".join(text[a:b] for a, b in units).replace(" ", "") == text.replace(" ", "")
    for (begin, end), unit in zip(spans, unit_of, strict=True):
        letters = [i for i in range(begin, end) if text[i] != " "]
        assert unit is not None or not letters
        assert all(units[unit][0] <= i < units[unit][1] for i in letters)


def test_the_spans_of_tokens_are_where_their_text_is(tokenizer):
    for _, text in tiny_sentences(20, 3):
        spans, ids = tokenizer.spans(text), tokenizer.encode(text, bos=False, eos=False)
        assert [text[a:b] for a, b in spans] == [tokenizer.decode([i]) for i in ids]


def test_an_agreement_needs_three_words_that_differ():
    one = saliency.Decision("a b", 0, 1, np.zeros(2), ("a", "b"), np.zeros(2), np.zeros(2), False)
    assert one.agreement is None and one.is_same_word
    three = replace(one, units=("a", "b", "c"), gradient=np.array([1.0, 2, 3]), deletion=np.array([3.0, 2, 1]))
    assert three.agreement == pytest.approx(-1) and not three.is_same_word
    assert replace(three, deletion=np.ones(3)).agreement is None
