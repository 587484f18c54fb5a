"""Predictions and their scores, and the baselines that every result is held against."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from config import InputError, counted
from dataset import Split, length_order, make_batch
from training import comparisons
from training.bar import Bar
from training.device import Device
from training.kept import Activations
from training.signals import SIGNALS


@torch.inference_mode()
def predict(model: nn.Module, split: Split, pad_id: int, device: Device, label: str | None = "eval",
            batch_size: int | None = None, kept: Activations | None = None) -> Tensor:
    """The model's output for every row of the split, in the file's order: (N, C) float32 on the CPU.

    Rows are run in the order of their length, with little padding, and put back. The model is left in the mode
    (training or evaluation) that it was in. `label`: what the progress bar says; None, for a caller that is no training
    run: no bar, and signals are left alone. `batch_size`: so many rows at once at most. `kept`: what a frozen
    first part gives for the split.
    """
    was_training = model.training
    model.eval()
    batches = list(length_order(split.lengths, max_rows=batch_size))
    parts = []
    with Bar(label, len(batches), is_kept=False) if label is not None else nullcontext() as bar:
        for i, rows in enumerate(batches, 1):
            if bar:
                SIGNALS.check()
            batch = make_batch(split, rows, pad_id)
            if kept is not None:
                batch["below"] = kept.batch(rows)
            batch = device.put(batch)
            with device.autocast():
                parts.append(model(*(batch[name] for name in ("tokens", "lengths", "below") if name in batch)).float())
            if bar:
                bar.update(f"{label}: batch {i} of {len(batches)}")
    model.train(was_training)
    together = torch.cat(parts).cpu()
    result = torch.empty_like(together)
    result[torch.from_numpy(np.concatenate(batches))] = together
    return result


def check_finite(outputs: Tensor, what: str) -> None:
    """Raises InputError for log-probabilities (N, C) that a sound model cannot give: a NaN, or a row without a class
    that is possible."""
    bad = outputs.isnan().any(1) | ~torch.isfinite(outputs.max(1).values)
    if bad.any():
        raise InputError(f"{what}: the output for {int(bad.sum())} of {counted(len(outputs), 'sentence')} is not "
                         "finite (NaN or infinity): the weights are damaged, or the training has diverged; nothing is "
                         "written")


def score(log_probs: Tensor, labels: np.ndarray, ordinal: bool = False) -> dict[str, float]:
    """acc, macro f1 (over the classes that occur in the labels or the predictions) and mean loss of
    log-probabilities (N, C). `ordinal` adds, for classes that have an order, the mean absolute error `mae`, the
    quadratic weighted kappa `qwk` (Cohen 1968) and `off_by_one`, the part that is at most one class off."""
    from sklearn.metrics import f1_score

    predicted = log_probs.argmax(1).numpy()
    result = {
        "loss": float(nn.functional.nll_loss(log_probs, torch.from_numpy(labels))),
        "acc": float((predicted == labels).mean()),
        "f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),
    }
    if ordinal:
        distance = np.abs(predicted - labels)
        # 1 - E|y - p|^2 / E|y - p'|^2, with p' drawn independently of y: no matrix of all pairs of classes is needed.
        y, p, n = labels.astype(np.int64), predicted.astype(np.int64), len(labels)
        by_chance = int(n * ((y @ y) + (p @ p)) - 2 * y.sum() * p.sum())  # n^2 times the expectation, exactly
        kappa = 1 - n * int(distance @ distance) / by_chance if by_chance else 0.0  # all of one class, and rightly so
        result |= {"mae": float(distance.mean()), "qwk": kappa,
                   "off_by_one": float((distance <= 1).mean())}
    return result


MATRIX_CLASSES = 1000  # the matrix of 100,000 classes would take 75 GiB


def confusion(labels: Sequence[int], predicted: Sequence[int], n: int) -> dict[str, list]:
    """The confusion matrix of n classes as result.json has it: a row for each true label, a column for each prediction.
    Of more than MATRIX_CLASSES, only the pairs that occur: [label, prediction, how often]."""
    counts = Counter(zip(labels, predicted, strict=True))
    if n > MATRIX_CLASSES:
        return {"confusion_pairs": [[*pair, count] for pair, count in sorted(counts.items())]}
    return {"confusion_matrix": [[counts[label, guess] for guess in range(n)] for label in range(n)]}


@dataclass(frozen=True)
class ClassScores:
    """Of each of C classes, arrays (C,): `precision` and `recall`, NaN where nothing was predicted to be of the class
    or nothing is; `f1`, NaN where both is so; `n`, how many examples have the label."""

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    n: np.ndarray


def per_class(labels: np.ndarray, predicted: np.ndarray, n_classes: int) -> ClassScores:
    """The scores of each class, from labels and predictions (N,)."""
    n, guessed = (np.bincount(values, minlength=n_classes) for values in (labels, predicted))
    right = np.bincount(labels[labels == predicted], minlength=n_classes)
    with np.errstate(invalid="ignore"):  # 0 / 0 is NaN
        return ClassScores(right / guessed, right / n, 2 * right / (n + guessed), n)


def most_confused(labels: np.ndarray, predicted: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    """(label, prediction, how often) of the wrong predictions, the most frequent first, `most` of them at most."""
    wrong = labels != predicted
    pairs = Counter(zip(labels[wrong].tolist(), predicted[wrong].tolist(), strict=True))
    ranked = sorted(((*pair, count) for pair, count in pairs.items()), key=lambda row: (-row[2], row))
    return ranked[:most]


@dataclass(frozen=True)
class Paired:
    """Two classifiers on the same examples: how many only the first gets right, how many only the second, and how
    likely so unequal a split is where the two are equally good."""

    only_first: int
    only_second: int
    p: float


def mcnemar(first: np.ndarray, second: np.ndarray) -> Paired:
    """McNemar's exact test (`comparisons.mcnemar_p`) of which examples (N,) each of two classifiers gets right."""
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    return Paired(only_first, only_second, comparisons.mcnemar_p(only_first, only_second))


@dataclass(frozen=True)
class Baseline:
    """What costs nothing, on one split: the accuracy of training's most frequent label, that of TF-IDF with logistic
    regression, and the labels (N,) that the latter predicts; None where only its accuracy is known."""

    majority: float
    tfidf: float
    predicted: np.ndarray | None = None

    def values(self) -> dict[str, float]:
        """As the JSON object of result.json."""
        return {"majority": self.majority, "tfidf": self.tfidf}


class WordClassifier:
    """TF-IDF of words and word pairs with logistic regression, scikit-learn's defaults otherwise. `has_learned`: False
    where there is one class alone, or no sentence has a word of two letters."""

    def __init__(self, labels: Sequence[int] | np.ndarray, sentences: Sequence[str]):
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        self._vectorizer, self.has_learned = TfidfVectorizer(ngram_range=(1, 2)), False
        self._words: Any = None
        if len(set(labels)) > 1:
            try:
                self._words = LogisticRegression(max_iter=200).fit(self._vectorizer.fit_transform(sentences), labels)
                self.has_learned = True
            except ValueError:  # no sentence has a word of two letters: there is nothing to learn from words
                pass

    def predict(self, sentences: Sequence[str]) -> np.ndarray:
        """The class of each sentence, (N,)."""
        return self._words.predict(self._vectorizer.transform(sentences))

    def probabilities(self, sentences: Sequence[str], n_classes: int) -> np.ndarray:
        """The probability of each class, (N, C); 0 for a class that was not in training."""
        result = np.zeros((len(sentences), n_classes))
        result[:, self._words.classes_] = self._words.predict_proba(self._vectorizer.transform(sentences))
        return result


def baselines(labels: Sequence[int] | np.ndarray, sentences: list[str],
              tests: Mapping[str, Split]) -> dict[str, Baseline]:
    """The baselines of each split, learned from the training labels and sentences.

    Words and word pairs, scikit-learn's defaults otherwise.
    """
    majority = np.bincount(labels).argmax()
    words = WordClassifier(labels, sentences)
    result = {}
    for name, split in tests.items():
        predicted = words.predict(split.sentences) if words.has_learned else np.full(len(split), majority)
        result[name] = Baseline(float((split.labels == majority).mean()), float((split.labels == predicted).mean()),
                                predicted)
    return result
