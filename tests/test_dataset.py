"""Cutting into tokens and batches, the order of rows, augmentation and class balance."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_sentences, write_split
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight

import dataset
from formats.labels import Classes
from tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return Tokenizer(tokenizer_model=tiny_model)


# --------------------------------------------------------------------------- splits


def test_a_label_that_train_does_not_have_is_refused_with_its_line(tmp_path, tokenizer):
    train = dataset.load_split(write_split(tmp_path / "t.txt", [(0, "a"), (1, "b")]), tokenizer, 64)
    path = write_split(tmp_path / "d.txt", [(0, "a"), (2, "b"), (2, "c")])
    with pytest.raises(ValueError, match=r"d\.txt:2: the label 2 is not in .*t\.txt, so no model"):
        dataset.load_split(path, tokenizer, 64, classes=train.classes)
    classes = Classes(["x", "y", "z"], ["0", "1", "2"], Path("names.json"), False)
    dev = dataset.load_split(path, tokenizer, 64, classes=classes)
    with pytest.raises(ValueError, match=r"d\.txt:2: the label 2 is not in .*t\.txt, so no model"):
        dataset.check_labels(dev, train)  # with a name, and without a training sentence


def test_a_long_sentence_is_cut_and_counted_and_an_empty_one_keeps_a_token(tokenizer):
    long = "very " * 200
    whole = tokenizer.encode(long, bos=False, eos=False)
    tokens, n_cut = dataset.tokenize([long, "good", ""], tokenizer, context=50)
    extra = int(tokenizer.add_bos)
    assert n_cut == 1 and len(tokens[0]) == 50 and tokens[0][extra:].tolist() == whole[: 50 - extra]
    assert len(tokens[2]) >= 1
    tokens, n_cut = dataset.tokenize([long, "good"], tokenizer, context=50, max_sentence_len=7)
    assert n_cut == 1 and len(tokens[0]) == 7 + extra


# --------------------------------------------------------------------------- batches


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=700), st.integers(1, 40), st.integers(0, 9), st.integers(0, 9))
def test_an_epoch_has_every_row_once_in_batches_of_one_size(lengths, batch_size, seed, epoch):
    batches = dataset.epoch_order(np.array(lengths), batch_size, seed, epoch)
    sizes = [len(b) for b in batches]
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // batch_size)
    assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1


def test_the_order_depends_on_seed_and_epoch_alone_and_wastes_little():
    lengths = np.random.default_rng(0).integers(3, 60, 5000)
    order = [b.tolist() for b in dataset.epoch_order(lengths, 32, seed=1, epoch=2)]
    assert order == [b.tolist() for b in dataset.epoch_order(lengths, 32, seed=1, epoch=2)]
    assert order != [b.tolist() for b in dataset.epoch_order(lengths, 32, seed=1, epoch=3)]
    assert order != [b.tolist() for b in dataset.epoch_order(lengths, 32, seed=2, epoch=2)]
    padded = sum(len(b) * lengths[b].max() for b in order)
    assert padded < 1.06 * lengths.sum()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=300), st.integers(1, 2000))
def test_evaluation_has_every_row_once_within_the_budget(lengths, budget):
    lengths = np.array(lengths)
    batches = list(dataset.length_order(lengths, budget))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert all(len(b) * lengths[b].max() <= budget or len(b) == 1 for b in batches)


def test_a_batch_is_padded_on_the_right(tmp_path, tokenizer):
    split = dataset.load_split(write_split(tmp_path / "a.txt", tiny_sentences(5, 3)), tokenizer, 64)
    batch = dataset.make_batch(split, np.array([4, 1]), pad_id=9)
    assert batch["index"].tolist() == [4, 1] and batch["tokens"].dtype == torch.int64
    for row, i in enumerate([4, 1]):
        n = len(split.tokens[i])
        assert batch["lengths"][row] == n and batch["labels"][row] == split.labels[i]
        assert batch["tokens"][row, :n].tolist() == split.tokens[i].tolist()
        assert (batch["tokens"][row, n:] == 9).all()


def test_a_balanced_order_draws_each_class_equally_often():
    labels = np.repeat([0, 1, 3], [20, 200, 1780])
    drawn = np.concatenate([np.concatenate(dataset.epoch_order(np.full(2000, 5), 32, 1, epoch, labels))
                            for epoch in range(10)])
    counts = np.bincount(labels[drawn])
    assert len(drawn) == 20_000 and counts[2] == 0
    for count in counts[[0, 1, 3]]:
        assert abs(count - 20_000 / 3) < 5 * np.sqrt(20_000 * 2 / 9)  # five deviations of a binomial
    sizes = [len(b) for b in dataset.epoch_order(np.full(2000, 5), 32, 1, 0, labels)]
    assert len(sizes) == 63 and set(sizes) == {31, 32}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=200))
def test_class_weights_are_scikit_learns_balanced_ones(labels):
    labels = np.array(labels)
    weights, classes = dataset.class_weights(labels), np.unique(labels)
    np.testing.assert_allclose(weights[classes], compute_class_weight("balanced", classes=classes, y=labels))
    assert weights.sum() == pytest.approx(weights[classes].sum()) and weights[labels].mean() == pytest.approx(1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(5, 30), min_size=2, max_size=5), st.integers(2, 5), st.integers(0, 9))
def test_every_row_is_in_one_fold_and_each_has_its_share_of_every_class(counts, n, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    parts = dataset.folds(labels, n, seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels))) and len(parts) == n
    for part in parts:
        found = np.bincount(labels[part], minlength=len(counts))
        assert all(count // n <= f <= -(-count // n) for f, count in zip(found, counts, strict=True))
    assert all((a == b).all() for a, b in zip(parts, dataset.folds(labels, n, seed), strict=True))


def test_more_folds_than_a_class_has_sentences_are_refused():
    with pytest.raises(ValueError, match="--folds 4: .* 3 of class 2"):
        dataset.folds(np.array([0] * 9 + [2] * 3), 4, 0)


def test_a_fold_takes_its_dev_from_both_files_and_leaves_test_alone(tmp_path, tokenizer):
    splits = {name: dataset.load_split(write_split(tmp_path / f"{name}.txt", tiny_sentences(n, i)), tokenizer, 64)
              for i, (name, n) in enumerate({"train": 30, "dev": 12, "test": 9}.items())}
    both = sorted(splits["train"].sentences + splits["dev"].sentences)
    held_out = []
    for i in range(3):
        part = dataset.fold(splits, 3, i, seed=5)
        assert sorted(part["train"].sentences + part["dev"].sentences) == both
        assert part["test"] is splits["test"]
        for split in (part["train"], part["dev"]):
            tokens, _ = dataset.tokenize(split.sentences, tokenizer, 64)
            assert all((a == b).all() for a, b in zip(tokens, split.tokens, strict=True))
            known = dict(zip(splits["train"].sentences + splits["dev"].sentences,
                             np.concatenate((splits["train"].labels, splits["dev"].labels)), strict=True))
            assert [known[s] for s in split.sentences] == split.labels.tolist()
        held_out += part["dev"].sentences
    assert sorted(held_out) == both


def test_a_limit_is_a_random_part_in_the_files_order(tmp_path, tokenizer):
    split = dataset.load_split(write_split(tmp_path / "a.txt", [(i % 2, f"n {i}") for i in range(40)]), tokenizer, 64)
    numbers = [[int(s.split()[1]) for s in dataset.limit(split, 10, seed).sentences] for seed in (0, 0, 1)]
    assert numbers[0] == numbers[1] != numbers[2] and numbers[0] == sorted(set(numbers[0])) != list(range(10))
    assert len(numbers[0]) == 10 and len(dataset.limit(split, 99, 0)) == 40


@pytest.mark.parametrize("labels, names", [([0, 1], ["0", "1"]), ([0, 3], ["0", "3"]), ([2, 1, 10], ["1", "2", "10"]),
                                           ([1, -1], ["-1", "1"]), ([0, 1000], ["0", "1000"]), ([1, 1], None)])
def test_without_names_the_classes_are_the_labels_that_occur(tmp_path, tokenizer, labels, names):
    path = write_split(tmp_path / "a.txt", [(i, "x") for i in labels])
    if names:
        split = dataset.load_split(path, tokenizer, 64)
        assert split.classes.names == names and [names[i] for i in split.labels] == [str(label) for label in labels]
    else:
        with pytest.raises(ValueError, match=r"a\.txt: all labels are 1"):
            dataset.load_split(path, tokenizer, 64)


# --------------------------------------------------------------------------- augmentation


def augmented(n=20_000, length=6, keep=1, **rates):
    """n versions of the sentence 0 1 2 ..."""
    rates = {"delete": 0.0, "swap": 0.0, "replace": 0.0, "neighbours": None, **rates}
    change = dataset.Augmentation(keep=keep, **rates)
    random = np.random.default_rng(0)
    return [change(np.arange(length, dtype=np.int32), random) for _ in range(n)]


def near(count, n, p):
    """Within five standard deviations of what a binomial has."""
    return abs(count - n * p) < 5 * np.sqrt(n * p * (1 - p))


def test_words_are_deleted_at_their_rate_and_keep_their_order():
    rows = augmented(delete=0.3)
    assert near(sum(6 - len(row) for row in rows), 5 * len(rows), 0.3)
    for i in range(1, 6):
        assert near(sum(i in row for row in rows), len(rows), 0.7)
    assert all((np.diff(row) > 0).all() for row in rows)


def test_neighbours_change_places_at_their_rate():
    rows = augmented(swap=0.2, length=3)  # a begin token and two words: one pair
    assert near(sum(row.tolist() == [0, 2, 1] for row in rows), len(rows), 0.2)
    assert all(sorted(row.tolist()) == list(range(9)) for row in augmented(n=200, swap=0.5, length=9))


def test_words_are_replaced_at_their_rate_by_one_of_their_neighbours():
    neighbours = np.arange(6, dtype=np.int32)[:, None] * 10 + np.array([[100, 200, 300]], dtype=np.int32)
    rows = np.stack(augmented(replace=0.25, neighbours=neighbours))
    replaced = rows[:, 1:] >= 100
    assert near(replaced.sum(), replaced.size, 0.25)
    assert set(rows[:, 3].tolist()) == {3, 130, 230, 330}
    assert near((rows[:, 3] == 230).sum(), len(rows), 0.25 / 3)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.integers(0, 1), st.floats(0, 0.99), st.floats(0, 0.99), st.integers(0, 99))
def test_the_begin_token_stays_and_so_does_a_word(length, keep, delete, swap, seed):
    change = dataset.Augmentation(delete, swap, 0.0, None, keep)
    tokens = np.arange(length, dtype=np.int32)
    row = change(tokens, np.random.default_rng(seed))
    assert row[:keep].tolist() == tokens[:keep].tolist() and len(row) >= min(length, keep + 1)
    assert tokens.tolist() == list(range(length)), "the sentence itself is not changed"
    assert set(row.tolist()) <= set(tokens.tolist()) and row.dtype == np.int32


def test_augmentation_depends_on_the_row_and_the_epoch_and_not_on_the_batch(tmp_path, tokenizer):
    split = dataset.load_split(write_split(tmp_path / "a.txt", tiny_sentences(12, 3)), tokenizer, 64)
    change = dataset.Augmentation(0.3, 0.3, 0.0, None, 0)

    def rows_of(batches, epoch):
        made = [dataset.make_batch(split, np.array(rows), 0, change, (7, epoch)) for rows in batches]
        return {int(i): row[:n].tolist() for b in made for i, row, n in zip(b["index"], b["tokens"], b["lengths"],
                                                                          strict=True)}

    whole = rows_of([list(range(12))], 0)
    assert rows_of([[3, 1], [0], [11, 10, 9, 8, 7, 6, 5, 4, 2]], 0) == whole != rows_of([list(range(12))], 1)
    assert whole != {i: t.tolist() for i, t in enumerate(split.tokens)}


@pytest.mark.parametrize("n", [3, 50, 1500])  # more than a block of 1024
def test_near_neighbours_are_scikit_learns(n):
    from sklearn.neighbors import NearestNeighbors

    embedding = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    occurring = np.sort(np.random.default_rng(0).permutation(2000)[:n])
    ours = dataset.near_neighbours(embedding, np.repeat(occurring, 2), k=4)
    k = min(4, n - 1)
    assert ours.shape == (2000, k) and ours.dtype == np.int32
    search = NearestNeighbors(n_neighbors=k + 1, metric="cosine").fit(embedding.numpy()[occurring])
    theirs = occurring[search.kneighbors(embedding.numpy()[occurring], return_distance=False)[:, 1:]]
    assert (ours[occurring] == theirs).mean() > 0.999  # but for ties in rounding
    others = np.setdiff1d(np.arange(2000), occurring)
    assert (ours[others] == others[:, None]).all()


def test_one_word_alone_is_its_own_neighbour():
    assert (dataset.near_neighbours(torch.randn(4, 3), np.array([2, 2])) == np.arange(4)[:, None]).all()
