"""Predictions in the file's order, their scores, and the baselines."""

import numpy as np
import pytest
import torch
from conftest import tiny_sentences, write_split
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
    assert found["majority"] == pytest.approx((split.labels == 2).mean())
    pipeline = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=200))
    assert found["tfidf"] == pytest.approx(pipeline.fit(sentences, labels).score(split.sentences, split.labels))
