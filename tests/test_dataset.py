"""Reading, cutting into batches, the order of rows, and the baselines."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_sentences, write_split
from hypothesis import given, settings
from hypothesis import strategies as st

import dataset
from config import parse_args
from data import prepare
from tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return Tokenizer(tokenizer_model=tiny_model)


# --------------------------------------------------------------------------- reading


def test_a_sentence_may_hold_the_separator_and_blank_lines_and_a_bom_are_skipped(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff1 ||| one ||| two\r\n\r\n0 |||  three  \n".encode())
    assert dataset.read_examples(path, 2) == ([1, 0], ["one ||| two", "three"])


@pytest.mark.parametrize("line, words", [
    ("no separator", "no ` ||| `"),
    ("x ||| a", "is no integer"),
    ("1.5 ||| a", "is no integer"),
    ("² ||| a", "is no integer"),
    ("--1 ||| a", "is no integer"),
    ("-1 ||| a", "out of range"),
    ("3 ||| a", "out of range"),
    ("1 |||   ", "sentence is empty"),
    ("1 |||    \t ", "sentence is empty"),
])
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path, line, words):
    path = write_split(tmp_path / "a.txt", [(0, "fine")])
    path.write_text(path.read_text(encoding="utf-8") + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        dataset.read_examples(path, 3, Path("names.json"))
    assert f"{path}:3: " in str(error.value)


def test_of_many_bad_lines_ten_are_shown_and_all_counted(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("bad\n" * 25, encoding="utf-8")
    with pytest.raises(ValueError) as error:
        dataset.read_examples(path, 3)
    assert str(error.value).count("\n") == 10 and "15 more" in str(error.value)


def test_an_empty_file_and_other_bytes_are_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n \n")
    with pytest.raises(ValueError, match="no sentence"):
        dataset.read_examples(path, 3)
    path.write_bytes(b"0 ||| fine\n1 ||| caf\xe9\n")
    with pytest.raises(ValueError, match=r"a\.txt:2: .*UTF-8"):
        dataset.read_examples(path, 3)


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "[]", '["one"]', "[1, 2]", '"bad good"'])
def test_label_names_must_be_a_list_of_names(tmp_path, text):
    path = tmp_path / "names.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"names\.json"):
        dataset.read_label_names(path)


def test_a_label_that_train_does_not_have_is_refused_with_its_line(tmp_path, tokenizer):
    train = dataset.load_split(write_split(tmp_path / "t.txt", [(0, "a"), (1, "b")]), tokenizer, 64)
    dev = dataset.load_split(write_split(tmp_path / "d.txt", [(0, "a"), (2, "b"), (2, "c")]), tokenizer, 64)
    with pytest.raises(ValueError, match=r"d\.txt:2: the label 2"):
        dataset.check_labels(dev, train)


def test_a_long_sentence_is_cut_and_counted_and_an_empty_one_keeps_a_token(tokenizer):
    long = "very " * 200
    whole = tokenizer.encode(long, bos=False, eos=False)
    tokens, n_cut = dataset.tokenize([long, "good", ""], tokenizer, context=50)
    extra = int(tokenizer.add_bos)
    assert n_cut == 1 and len(tokens[0]) == 50 and tokens[0][extra:].tolist() == whole[: 50 - extra]
    assert len(tokens[2]) >= 1
    tokens, n_cut = dataset.tokenize([long, "good"], tokenizer, context=50, max_sentence_len=7)
    assert n_cut == 1 and len(tokens[0]) == 7 + extra


# --------------------------------------------------------------------------- which files


def test_typed_paths_never_mix_with_another_data_set(tiny_data):
    files = dataset.find_files(parse_args(["--train", str(tiny_data["train"]), "--dev", str(tiny_data["dev"])]))
    assert files.test is None and files.name == "toy" and files.label_names == tiny_data["label_names"]


def test_sst_is_used_where_it_is_and_movies_where_not(tmp_path, monkeypatch):
    real = prepare.dataset_paths
    monkeypatch.setattr(prepare, "dataset_paths", lambda name: real(name, tmp_path))
    fetched = []

    def fetch(name):
        fetched.append(name)
        for path in real(name, tmp_path).values():
            path.write_text("0 ||| a\n", encoding="utf-8")

    monkeypatch.setattr(prepare, "fetch", fetch)
    files = dataset.find_files(parse_args([]))
    assert files.name == "movies" and fetched == ["movies"] and "prepare.py sst" in files.notice
    for split in ("train", "dev"):
        write_split(tmp_path / f"sst-{split}.txt", [(0, "a")])
    files = dataset.find_files(parse_args([]))
    assert files.name == "sst" and files.test is None and not files.notice and fetched == ["movies"]


@pytest.mark.parametrize("typed, words", [
    (["--dataset", "sst"], "prepare.py sst"),
    (["--dataset", "mine"], "can be fetched: movies"),
    (["--train", "data/sst-train.txt"], "prepare.py sst"),
    (["--dev", "nowhere.txt"], "check --dev"),
])
def test_a_missing_file_names_the_command_that_fetches_it(tmp_path, monkeypatch, typed, words):
    monkeypatch.chdir(tmp_path)
    real = prepare.dataset_paths
    monkeypatch.setattr(prepare, "dataset_paths", lambda name: real(name, tmp_path))
    with pytest.raises(FileNotFoundError, match="no such file") as error:
        dataset.find_files(parse_args(typed))
    assert words in str(error.value)


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


# --------------------------------------------------------------------------- baselines


def test_the_baselines_are_the_majority_and_scikit_learns_pipeline(tmp_path, tokenizer):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    train = tiny_sentences(60, 0) + [(2, "good")] * 5
    split = dataset.load_split(write_split(tmp_path / "dev.txt", tiny_sentences(40, 1)), tokenizer, 64)
    labels, sentences = zip(*train, strict=True)
    found = dataset.baselines(labels, list(sentences), {"dev": split})["dev"]
    assert found["majority"] == pytest.approx((split.labels == 2).mean())
    pipeline = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=200))
    assert found["tfidf"] == pytest.approx(pipeline.fit(sentences, labels).score(split.sentences, split.labels))
