"""Labelled sentences to tokens to length-bucketed batches; augmentation and class balance."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from config import InputError
from formats import labels as class_labels
from formats.labels import Classes
from formats.tables import Table, read_table
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Split:
    """One tokenised file. `tokens[i]` is a 1-d int32 array, never empty; `labels` (N,) int64; file order. `lines`:
    where each sentence begins in the file; `classes`: what the labels are, None where it has none."""

    path: Path
    sentences: list[str]
    tokens: list[np.ndarray]
    labels: np.ndarray
    n_cut: int  # how many sentences were longer than the limit
    lines: Sequence[int] = ()
    classes: Classes | None = None

    @property
    def written(self) -> list[str]:
        """How the file writes each class."""
        return self.classes.written if self.classes else [str(i) for i in range(int(self.labels.max()) + 1)]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sentence, (N,) int64."""
        return np.fromiter((len(t) for t in self.tokens), dtype=np.int64, count=len(self.tokens))

    def take(self, rows: np.ndarray) -> "Split":
        """The split of these rows, in their order."""
        return replace(self, sentences=[self.sentences[i] for i in rows], tokens=[self.tokens[i] for i in rows],
                       labels=self.labels[rows], lines=[self.lines[i] for i in rows] if self.lines else ())


def tokenize(
    sentences: list[str], tokenizer: Tokenizer, context: int, max_sentence_len: int | None = None
) -> tuple[list[np.ndarray], int]:
    """Each sentence's tokens, the begin token in front where the model was trained with one.

    Cut after max_sentence_len tokens (the begin token not counted) or at the model's context. Returns the arrays
    and how many sentences were cut. A sentence without any token becomes the end (or padding) token, so that the
    pooling always has something to look at.
    """
    limit = context if max_sentence_len is None else min(context, max_sentence_len + int(tokenizer.add_bos))
    stand_in = tokenizer.eos_id if tokenizer.eos_id >= 0 else tokenizer.pad_id
    rows = tokenizer.encode_batch(sentences, bos=tokenizer.add_bos, eos=False)
    return [np.asarray(row[:limit] or [stand_in], dtype=np.int32) for row in rows], sum(len(r) > limit for r in rows)


def load_split(path: Path, tokenizer: Tokenizer, context: int, max_sentence_len: int | None = None,
               classes: Classes | None = None) -> Split:
    """A file of labelled sentences (see `tables.read_table`), tokenised once. `classes`: None for those of the file
    itself."""
    table = read_table(path)
    return split_of(table, classes or class_labels.learned(table), tokenizer, context, max_sentence_len)


def split_of(table: Table, classes: Classes, tokenizer: Tokenizer, context: int,
             max_sentence_len: int | None = None) -> Split:
    """A table that has been read, tokenised. Raises InputError, with the lines, for labels of no class."""
    labels = np.asarray(classes.numbers(table), dtype=np.int64)
    tokens, n_cut = tokenize(table.texts, tokenizer, context, max_sentence_len)
    return Split(table.path, table.texts, tokens, labels, n_cut, table.lines, classes)


def as_jsonl(split: Split) -> str:
    """A split as JSON lines, which `tables.read_table` reads again: {"label": "good", "text": "a fine film"}."""
    rows = zip(split.labels.tolist(), split.sentences, strict=True)
    return "".join(json.dumps({"label": split.written[label], "text": text}, ensure_ascii=False) + "\n"
                   for label, text in rows)


def check_labels(split: Split, train: Split) -> None:
    """Raises InputError, with the line, for a label that the training sentences do not have."""
    unknown = ~np.isin(split.labels, train.labels)
    if unknown.any():
        at = int(unknown.argmax())
        known = [split.written[i] for i in np.unique(train.labels)]
        label = split.written[split.labels[at]]
        near = class_labels.near_name(label, known)
        raise InputError(f"{split.path}:{split.lines[at]}: the label {label} is not in {train.path}, so no model can "
                         f"learn it; check both files{f'; did you mean {near}?' if near else ''}")


def limit(split: Split, n: int, seed: int) -> Split:
    """A random n of the split's rows, in their order; all of them where there are no more."""
    rows = np.random.default_rng(seed).permutation(len(split))[:n]
    return split.take(np.sort(rows))


def fold(splits: dict[str, Split], n: int, i: int, seed: int) -> dict[str, Split]:
    """Train and dev (where there is one) together, cut into n parts with their share of every class: part i is dev, the
    others are train."""
    parts_of = [splits[name] for name in ("train", "dev") if name in splits]
    both = replace(splits["train"], sentences=[s for split in parts_of for s in split.sentences],
                   tokens=[t for split in parts_of for t in split.tokens], lines=(),
                   labels=np.concatenate([split.labels for split in parts_of]))
    parts = folds(both.labels, n, seed, "--train and --dev together have" if "dev" in splits else "--train has")
    others = np.sort(np.concatenate([part for k, part in enumerate(parts) if k != i]))
    return {**splits, "train": both.take(others), "dev": both.take(parts[i])}


# --------------------------------------------------------------------------- batches


def make_batch(
    split: Split, rows: np.ndarray, pad_id: int, augment: Callable | None = None, seed: Sequence[int] = ()
) -> dict[str, torch.Tensor]:
    """One batch: tokens (B, T) int64 padded on the right, lengths (B,), labels (B,), index (B,), the rows.

    Each row that is augmented has random numbers of its own, from (seed, row), so that it does not matter how the rows
    are cut into batches.
    """
    tokens = [split.tokens[i] for i in rows]
    if augment:
        tokens = [augment(t, np.random.default_rng([*seed, i])) for t, i in zip(tokens, rows, strict=True)]
    lengths = np.fromiter((len(t) for t in tokens), dtype=np.int64, count=len(tokens))
    padded = np.full((len(tokens), lengths.max()), pad_id, dtype=np.int64)
    for row, sentence in enumerate(tokens):
        padded[row, : len(sentence)] = sentence
    return {"tokens": torch.from_numpy(padded), "lengths": torch.from_numpy(lengths),
            "labels": torch.from_numpy(split.labels[rows]), "index": torch.as_tensor(rows)}


BUCKET = 50  # batches in a bucket: wide enough to find neighbours in length, narrow enough to stay random


def epoch_order(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int, balance: np.ndarray | None = None
) -> list[np.ndarray]:
    """The rows of each batch of one epoch, every row once; a pure function of its arguments.

    The rows are shuffled, sorted by length inside buckets of BUCKET batches, cut into batches and the batches are
    shuffled: little padding, and still another order each epoch. N rows make ceil(N / batch_size) batches whose
    sizes differ by one at most, so that a last, short batch does not weigh its sentences more than the others.

    `balance`, the labels (N,): N rows are drawn instead, with replacement, each class equally often on average.
    """
    random = np.random.default_rng([seed, epoch])
    rows = random.permutation(len(lengths))
    if balance is not None:
        rows = random.choice(len(lengths), size=len(lengths), p=class_weights(balance)[balance] / len(lengths))
    n_batches = -(-len(rows) // batch_size)
    batches = []
    for bucket in np.array_split(np.arange(n_batches), -(-n_batches // BUCKET)):
        # The rows of these batches: the same cuts as array_split of all rows would make.
        start, end = (-(-len(rows) * int(edge) // n_batches) for edge in (bucket[0], bucket[-1] + 1))
        part = rows[start:end]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += np.array_split(part, len(bucket))
    return [batches[i] for i in random.permutation(len(batches))]


def class_weights(labels: np.ndarray) -> np.ndarray:
    """N / (classes * count) of each class that occurs, 0 for the others (King and Zeng 2001; scikit-learn's
    "balanced"). Their mean over the sentences is 1."""
    counts = np.bincount(labels)
    return np.divide(len(labels), (counts > 0).sum() * counts, out=np.zeros(len(counts)), where=counts > 0)


def folds(labels: np.ndarray, n: int, seed: int, source: str = "there are") -> list[np.ndarray]:
    """The rows 0 .. N - 1 cut at random into n parts of one size, each with its share of every class.

    Raises InputError for a class that has fewer rows than there are parts: some of them would go without it. `source`:
    what has the rows, for the message."""
    from sklearn.model_selection import StratifiedKFold

    counts = np.bincount(labels)
    rare = min(np.flatnonzero(counts), key=lambda label: counts[label])
    if counts[rare] < n:
        raise InputError(f"--folds {n}: each needs a sentence of every class, and {source} {counts[rare]} of class "
                         f"{rare}")
    if seed >= 2**32:  # scikit-learn takes no larger one
        seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    cut = StratifiedKFold(n, shuffle=True, random_state=seed)
    return [rows for _, rows in cut.split(np.zeros(len(labels)), labels)]


# --------------------------------------------------------------------------- augmentation


@dataclass(frozen=True)
class Augmentation:
    """Random changes to a training sentence's tokens (after Wei and Zou 2019, arXiv 1901.11196): each is deleted with
    probability `delete`; `swap` of them change places with the next; each is replaced with probability `replace` by
    one of its `neighbours` (V, k). The first `keep` tokens (the begin token) stay, and at least one of the others."""

    delete: float
    swap: float
    replace: float
    neighbours: np.ndarray | None
    keep: int

    def __call__(self, tokens: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Another version of one sentence (T,)."""
        start, rest = tokens[: self.keep], tokens[self.keep :].copy()
        if self.replace and self.neighbours is not None:
            chosen = random.random(len(rest)) < self.replace
            pick = random.integers(0, self.neighbours.shape[1], len(rest))
            rest[chosen] = self.neighbours[rest[chosen], pick[chosen]]
        for place in np.flatnonzero(random.random(max(0, len(rest) - 1)) < self.swap):
            rest[[place, place + 1]] = rest[[place + 1, place]]
        kept = random.random(len(rest)) >= self.delete
        if len(rest) and not kept.any():
            kept[random.integers(len(rest))] = True
        return np.concatenate((start, rest[kept]))


def near_neighbours(embedding: torch.Tensor, tokens: np.ndarray, k: int = 5) -> np.ndarray:
    """For each word of the vocabulary its k nearest by cosine in the embedding (V, D), itself left out, among the
    `tokens` that occur; (V, k) int32. Words that do not occur stand for themselves."""
    occurring = torch.from_numpy(np.unique(tokens)).long()
    k = min(k, len(occurring) - 1)
    result = np.tile(np.arange(len(embedding), dtype=np.int32)[:, None], (1, max(k, 1)))
    if k < 1:
        return result
    vectors = torch.nn.functional.normalize(embedding.detach().float().cpu()[occurring], dim=1)
    for start in range(0, len(occurring), 1024):
        part = vectors[start : start + 1024] @ vectors.T
        part[torch.arange(len(part)), torch.arange(start, start + len(part))] = -torch.inf
        result[occurring[start : start + 1024].numpy()] = occurring[part.topk(k).indices].numpy()
    return result


EVAL_TOKENS = 4096  # padded tokens in an evaluation batch: no gradients are kept, so it can be large


def length_order(lengths: np.ndarray, max_tokens: int = EVAL_TOKENS, max_rows: int | None = None
                 ) -> Iterator[np.ndarray]:
    """Rows for evaluation, longest first, in batches of at most max_tokens padded tokens (one row at least) and, where
    it is given, max_rows rows."""
    rows = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(rows):
        size = max(1, min(max_rows or len(rows), max_tokens // int(lengths[rows[start]])))
        yield rows[start : start + size]
        start += size
