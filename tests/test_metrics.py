"""Predictions in the file's order, their scores, and the baselines."""

import math

import numpy as np
import pytest
import torch
from conftest import tiny_sentences, write_split
from hypothesis import given
from hypothesis import strategies as st
from loops import CPU

import dataset
from tokenizer import Tokenizer
from training import metrics
from training.device import Device


@pytest.fixture
def tokenizer(tiny_model):
    return Tokenizer(tokenizer_model=tiny_model)


def test_predictions_are_in_file_order_and_equal_one_sentence_at_a_time(parts):
    model, splits, tokenizer = parts
    model.train()  # and the mode comes back
    together = metrics.predict(model, splits["dev"], tokenizer.pad_id, CPU)
    assert model.training
    model.eval()
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor(t, dtype=torch.long)[None]) for t in splits["dev"].tokens])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_the_scores_are_scikit_learns():
    from sklearn.metrics import accuracy_score, cohen_kappa_score, f1_score, log_loss, mean_absolute_error

    log_probs = torch.log_softmax(torch.randn(50, 4, generator=torch.Generator().manual_seed(0)), 1)
    labels = np.random.default_rng(0).integers(0, 4, 50)
    scores, predicted = metrics.score(log_probs, labels), log_probs.argmax(1).numpy()
    assert scores["acc"] == pytest.approx(accuracy_score(labels, predicted))
    assert scores["f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    probabilities = log_probs.double().softmax(1).numpy()
    assert scores["loss"] == pytest.approx(log_loss(labels, probabilities), rel=1e-5)
    ordinal = metrics.score(log_probs, labels, ordinal=True)
    assert ordinal["mae"] == pytest.approx(mean_absolute_error(labels, predicted))
    assert ordinal["qwk"] == pytest.approx(cohen_kappa_score(labels, predicted, weights="quadratic"))
    assert ordinal["off_by_one"] == pytest.approx((abs(labels - predicted) <= 1).mean())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_processors_log_probabilities(parts):
    model, splits, tokenizer = parts
    on_cpu = metrics.predict(model, splits["dev"], tokenizer.pad_id, CPU)
    gpu = Device(torch.device("cuda"), torch.float32)
    on_gpu = metrics.predict(model.to("cuda"), splits["dev"], tokenizer.pad_id, gpu)
    torch.testing.assert_close(on_gpu, on_cpu, rtol=0, atol=1e-4)


def test_the_baselines_are_the_majority_and_scikit_learns_pipeline(tmp_path, tokenizer):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    train = tiny_sentences(60, 0) + [(2, "good")] * 5
    split = dataset.load_split(write_split(tmp_path / "dev.txt", tiny_sentences(40, 1)), tokenizer, 64)
    labels, sentences = zip(*train, strict=True)
    found = metrics.baselines(labels, list(sentences), {"dev": split})["dev"]
    assert found.majority == pytest.approx((split.labels == 2).mean())
    pipeline = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=200))
    assert found.tfidf == pytest.approx(pipeline.fit(sentences, labels).score(split.sentences, split.labels))
    assert (found.predicted == pipeline.predict(split.sentences)).all()
    assert found.values() == {"majority": found.majority, "tfidf": found.tfidf}


def test_without_words_the_baseline_predicts_the_majority_for_each_sentence(tmp_path, tokenizer):
    split = dataset.load_split(write_split(tmp_path / "dev.txt", tiny_sentences(9, 1)), tokenizer, 64)
    found = metrics.baselines([1, 1, 0], ["a", "b", "c"], {"dev": split})["dev"]
    assert (found.predicted == np.ones(9)).all() and found.tfidf == found.majority


@given(st.data())
def test_the_scores_of_each_class_are_scikit_learns(data):
    from sklearn.metrics import f1_score, precision_recall_fscore_support

    n, c = data.draw(st.integers(1, 60)), data.draw(st.integers(2, 6))
    labels, predicted = (np.array(data.draw(st.lists(st.integers(0, c - 1), min_size=n, max_size=n))) for _ in "ab")
    found = metrics.per_class(labels, predicted, c)
    judge = precision_recall_fscore_support(labels, predicted, labels=range(c), zero_division=np.nan)
    for ours, theirs in zip((found.precision, found.recall, found.f1, found.n), judge, strict=True):
        np.testing.assert_allclose(ours, theirs)
    macro = f1_score(labels, predicted, average="macro")
    assert np.nanmean(found.f1) == pytest.approx(macro), "the table's mean is the macro-F1 that is printed"


def test_the_pairs_confused_most_are_scikit_learns_matrix_without_its_diagonal():
    from sklearn.metrics import confusion_matrix

    draw = np.random.default_rng(0)
    labels, predicted = draw.integers(0, 5, 200), draw.integers(0, 5, 200)
    judge = confusion_matrix(labels, predicted)
    assert metrics.confusion(labels.tolist(), predicted.tolist(), 5)["confusion_matrix"] == judge.tolist()
    np.fill_diagonal(judge, 0)
    found = metrics.most_confused(labels, predicted, 4)
    assert [count for *_, count in found] == sorted(judge.ravel().tolist(), reverse=True)[:4]
    assert all(judge[label, guess] == count for label, guess, count in found)
    assert len(metrics.most_confused(labels, predicted, 99)) == (judge > 0).sum()


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80))
def test_mcnemar_is_the_sum_of_the_binomials_tails(pairs):
    """Fair coins: twice the chance of so few heads or fewer, and never more than 1."""
    first, second = map(np.array, zip(*pairs, strict=True))
    found = metrics.mcnemar(first, second)
    assert found.only_first == sum(a and not b for a, b in pairs)
    assert found.only_second == sum(b and not a for a, b in pairs)
    n, least = found.only_first + found.only_second, min(found.only_first, found.only_second)
    tail = sum(math.comb(n, k) for k in range(least + 1)) / 2 ** n
    assert found.p == pytest.approx(min(1.0, 2 * tail))


def test_mcnemar_of_a_published_table():
    """Agresti, Categorical Data Analysis, table 11.1: 150 and 86 who changed their mind; z^2 = 17.36 by chi-squared,
    whose tail is 3.1e-5: the exact value must be close to it."""
    first = np.array([True] * 150 + [False] * 86 + [True] * 794)
    second = np.array([False] * 150 + [True] * 86 + [True] * 794)
    assert metrics.mcnemar(first, second).p == pytest.approx(3.1e-5, rel=0.25)
