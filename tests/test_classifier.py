"""classifier.py: a sentence's probabilities depend on nothing but the sentence; prompting equals transformers."""

import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, kl_div

from classifier import LlamaEmbeddingClassifier, LlamaZeroShotClassifier, OrdinalHead, classification_loss, pool
from llama import load_pretrained
from tokenizer import Tokenizer

POOLINGS = ("last", "mean", "max", "first")
SETTINGS = {"num_labels": 5, "hidden_dropout_prob": 0.1}


def classifier(pooling="last", attention="causal", **more):
    torch.manual_seed(0)
    config = SimpleNamespace(**SETTINGS, pooling=pooling)
    model = LlamaEmbeddingClassifier(config, tiny.llama(attention=attention, **more))
    model.classifier_head.weight.data.mul_(20)  # the start is nearly uniform: too flat to see a difference in
    return model.eval()


def padded(sentences, pad, width=0):
    """Sentences (lists of tokens) as (tokens, lengths), padded on the right."""
    width = max(width, *map(len, sentences))
    rows = torch.tensor([s + [pad] * (width - len(s)) for s in sentences])
    return rows, torch.tensor([len(s) for s in sentences])


def sentences(n, pad, seed=0):
    """Of many lengths; a third of them end in the padding token, and one consists of it."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(n):
        length = int(torch.randint(1, 40, (1,), generator=draw))
        row = torch.randint(tiny.VOCAB, (length,), generator=draw).tolist()
        rows.append(row[:-1] + [pad] if i % 3 == 0 else row)
    return [*rows[:-1], [pad, pad]]


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("pad", [0, 7])
def test_probabilities_are_the_same_alone_in_a_batch_of_64_and_in_any_order(pooling, attention, pad):
    model, rows = classifier(pooling, attention), sentences(64, pad)
    with torch.no_grad():
        batch = model(*padded(rows, pad)).exp()
        order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
        shuffled = model(*padded([rows[i] for i in order], pad, width=55)).exp()
        alone = torch.cat([model(torch.tensor([row])) for row in rows]).exp()
    torch.testing.assert_close(batch, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(shuffled, batch[order], rtol=0, atol=1e-5)
    torch.testing.assert_close(batch.sum(1), torch.ones(64))
    assert pooling == "first" and attention == "causal" or batch.std(0).min() > 0.01  # sentences do differ


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(0, 3), st.sampled_from(POOLINGS))
def test_pooling_equals_a_loop_over_the_sentences(lengths, more, kind):
    hidden = torch.randn(len(lengths), max(lengths) + more, 3, generator=torch.Generator().manual_seed(sum(lengths)))
    one = {"last": lambda h: h[-1], "first": lambda h: h[0], "mean": lambda h: h.mean(0), "max": lambda h: h.max(0)[0]}
    want = torch.stack([one[kind](row[:n]) for row, n in zip(hidden, lengths, strict=True)])
    torch.testing.assert_close(pool(hidden, torch.tensor(lengths), kind), want)


def test_an_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match="'middle'.* last, mean, max or first"):
        pool(torch.zeros(1, 2, 3), torch.tensor([2]), "middle")


@pytest.mark.parametrize("n", [2, 5, 30])
def test_the_first_loss_is_near_that_of_guessing(n):
    model = LlamaEmbeddingClassifier(SimpleNamespace(num_labels=n, hidden_dropout_prob=0.0), tiny.llama())
    loss = torch.nn.functional.nll_loss(model(tiny.tokens(200, 9)), tiny.tokens(200, vocab=n))
    assert loss.item() == pytest.approx(math.log(n), abs=0.02)


def test_dropout_is_drawn_in_training_only():
    model, ids = classifier(), tiny.tokens(2, 5)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    tiny.hf_model().save_pretrained(path)
    return path


@pytest.mark.parametrize(("option", "trained"), [("pretrain", False), ("finetune", True)])
def test_a_plain_namespace_makes_a_classifier_and_pretrain_freezes_its_llama(folder, option, trained):
    model = LlamaEmbeddingClassifier(SimpleNamespace(pretrained_model_path=str(folder), option=option, **SETTINGS))
    assert {p.requires_grad for p in model.llama.parameters()} == {trained}
    assert {p.requires_grad for p in model.classifier_head.parameters()} == {True}
    ids = tiny.tokens(2, 6)
    assert model(ids).shape == (2, 5)
    with torch.no_grad():
        want = tiny.hf_model()(ids).logits
        torch.testing.assert_close(load_pretrained(folder)(ids)[0], want, rtol=0, atol=1e-4)


# --------------------------------------------------------------------------- prompting


class Words:
    """A tokenizer whose words are numbers."""

    def encode_continuation(self, text):
        return [int(word) for word in text.split()]


LABELS = ["5", "17 3", "17 4", "9 8 7 6", "0"]


def direct(theirs, prompt, label):
    """log p(label | prompt): prompt and label through transformers in one go, without padding."""
    label = [int(word) for word in label.split()]
    with torch.no_grad():
        log_p = theirs(torch.tensor([prompt + label])).logits[0].log_softmax(-1)
    return sum(log_p[len(prompt) - 1 + i, token].item() for i, token in enumerate(label))


@pytest.mark.parametrize("pad", [0, 17])
def test_label_scores_equal_transformers_whatever_else_is_in_the_batch(folder, pad):
    model = LlamaZeroShotClassifier(SimpleNamespace(pretrained_model_path=str(folder)), Words(), LABELS).eval()
    prompts = sentences(7, pad)
    want = torch.tensor([[direct(tiny.hf_model(), prompt, label) for label in LABELS] for prompt in prompts])
    with torch.no_grad():
        torch.testing.assert_close(model(*padded(prompts, pad)), want, rtol=0, atol=1e-4)
        torch.testing.assert_close(model(*padded(prompts[::-1], pad, width=50)), want.flip(0), rtol=0, atol=1e-4)
        alone = torch.cat([model(torch.tensor([prompt])) for prompt in prompts])
    torch.testing.assert_close(alone, want, rtol=0, atol=1e-4)
    assert not any(p.requires_grad for p in model.llama.parameters())


def test_a_label_without_a_token_is_refused():
    with pytest.raises(ValueError, match=r"\[' '\]"):
        LlamaZeroShotClassifier(None, Words(), ["3", " "], tiny.llama())


# --------------------------------------------------------------------------- losses


def scores_model(scores, again=None):
    """A stand-in for a classifier: fixed scores, other ones at its second call."""
    left = [scores, scores if again is None else again]
    return lambda tokens, lengths: left.pop(0).log_softmax(1)


def drawn(n=40, classes=5, seed=0):
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, classes, generator=draw) * 3
    return scores, {"tokens": None, "lengths": None, "labels": torch.randint(classes, (n,), generator=draw)}


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_the_loss_is_pytorchs_cross_entropy_smoothed_too(smoothing):
    scores, batch = drawn()
    ours = classification_loss(scores_model(scores), batch, label_smoothing=smoothing)
    want = cross_entropy(scores, batch["labels"], label_smoothing=smoothing, reduction="none")
    torch.testing.assert_close(ours, want)


def test_r_drop_is_the_papers_formula():
    """Two passes: the mean of their losses, and alpha times half of KL(p || q) + KL(q || p), by PyTorch's kl_div."""
    (scores, batch), (again, _) = drawn(), drawn(seed=1)
    ours = classification_loss(scores_model(scores, again), batch, label_smoothing=0.1, r_drop=0.7)
    p, q = scores.log_softmax(1), again.log_softmax(1)
    both = [cross_entropy(s, batch["labels"], label_smoothing=0.1, reduction="none") for s in (scores, again)]
    divergence = sum(kl_div(a, b, log_target=True, reduction="none").sum(1) for a, b in ((p, q), (q, p)))
    torch.testing.assert_close(ours, (both[0] + both[1]) / 2 + 0.7 * divergence / 2)


def test_r_drop_adds_nothing_without_dropout_and_something_with_it():
    model = classifier()
    batch = {"tokens": tiny.tokens(6, 9), "lengths": torch.full((6,), 9), "labels": torch.arange(6) % 5}
    plain, twice = (classification_loss(model, batch, r_drop=a) for a in (0.0, 5.0))
    torch.testing.assert_close(plain, twice)
    model.train()
    assert (classification_loss(model, batch, r_drop=50.0) > plain + 1e-3).all()


# --------------------------------------------------------------------------- ordered classes


def ordinal_head(first, gaps, weight=((1.0,),), dtype=torch.float64):
    head = OrdinalHead(len(weight[0]), len(gaps) + 2).to(dtype)
    with torch.no_grad():
        head.weight.copy_(torch.tensor(weight))
        head.first_cut.fill_(first)
        head.gaps.copy_(torch.tensor(gaps, dtype=dtype))
    return head


finite = st.floats(-8, 8)


@settings(max_examples=80, deadline=None)
@given(finite, st.lists(finite, max_size=5), st.lists(st.floats(-12, 12), min_size=1, max_size=6))
def test_ordinal_probabilities_are_differences_of_sigmoids_and_sum_to_one(first, gaps, scores):
    head, scores = ordinal_head(first, gaps), torch.tensor(scores, dtype=torch.float64)[:, None]
    cuts = [first]
    for gap in gaps:
        cuts.append(cuts[-1] + math.log1p(math.exp(gap)))
    below = torch.sigmoid(torch.tensor(cuts, dtype=torch.float64) - scores)
    below = torch.cat((torch.zeros(len(scores), 1), below, torch.ones(len(scores), 1)), 1)
    probabilities = head(scores).exp()
    torch.testing.assert_close(probabilities, below.diff(dim=1), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(len(scores), dtype=torch.float64))


@pytest.mark.parametrize("n", [2, 3, 7])
def test_an_ordinal_head_begins_with_all_classes_equally_likely(n):
    torch.testing.assert_close(OrdinalHead(4, n)(torch.zeros(1, 4)).exp(), torch.full((1, n), 1 / n))


@settings(max_examples=60, deadline=None)
@given(st.floats(-1e4, 1e4), st.lists(st.floats(-60, 1e3), max_size=4), st.floats(-100, 100))
def test_gradients_of_an_ordinal_head_are_finite_however_extreme_its_score(score, gaps, first):
    head = ordinal_head(first, gaps, dtype=torch.float32)
    x = torch.full((len(gaps) + 2, 1), score, requires_grad=True)
    out = head(x)
    torch.nn.functional.nll_loss(out, torch.arange(len(out))).backward()
    for tensor in (out, x.grad, *(p.grad for p in head.parameters())):
        assert torch.isfinite(tensor).all()


def test_an_ordinal_head_learns_an_order():
    """y = the number of thresholds below x: one score is enough, and its sign and cuts are what was put in."""
    torch.manual_seed(0)
    x = torch.linspace(-3, 3, 400)[:, None]
    labels = (x > torch.tensor([-1.5, 0.0, 0.5])).sum(1)
    head = OrdinalHead(1, 4)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        torch.nn.functional.nll_loss(head(x), labels).backward()
        optimizer.step()
    assert (head(x).argmax(1) == labels).float().mean() > 0.97
    cuts = torch.cat((head.first_cut, head.first_cut + torch.nn.functional.softplus(head.gaps).cumsum(0)))
    torch.testing.assert_close((cuts / head.weight[0]).detach(), torch.tensor([-1.5, 0.0, 0.5]), rtol=0, atol=0.05)


def test_the_cuts_have_the_heads_rate():
    from optimizer import parameter_groups

    config = SimpleNamespace(num_labels=4, hidden_dropout_prob=0.0, loss="ordinal")
    model = LlamaEmbeddingClassifier(config, tiny.llama())
    rates = {id(p): group["lr"] for group in parameter_groups(model, 1e-5, 0.1, head_lr=1e-3)
             for p in group["params"]}
    assert {name.partition(".")[0] for name, p in model.named_parameters() if rates[id(p)] == 1e-3} == {
        "classifier_head"}
    assert len([r for r in rates.values() if r == 1e-3]) == 3


def test_a_prompted_model_in_bfloat16_gives_under_autocast_what_the_same_in_float32_gives(tiny_model):
    """Its last product is in float32 all the same: in bfloat16, close scores would be equal."""
    tokenizer = Tokenizer(tokenizer_model=tiny_model)
    half, wide = load_pretrained(tiny_model, dtype=torch.bfloat16), load_pretrained(tiny_model)
    wide.load_state_dict(half.state_dict())
    ids = tiny.tokens(3, 9)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = (LlamaZeroShotClassifier(None, tokenizer, ["good film", "bad"], model)(ids)
                     for model in (half, wide))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
