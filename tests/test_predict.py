"""predict: its formats, its choices, labels that the input carries, and an open pipe."""

import csv
import gzip
import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, tiny_sentences, write_split

import run_llama
from commands import answers
from commands.predict import Labels
from minllama import load

NAMES = ["bad", "fine", "good"]
TEXTS = ["a good film", "", '=1+1, "quoted"', "-- 好 🎬", "dull\ttab", "x ||| y"]


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "names.json").write_text(json.dumps(NAMES), encoding="utf-8")
    assert run_llama.main(["--option", "finetune", *inputs, "--label_names", str(folder / "names.json"), "--epochs",
                           "1", "--lr", "3e-3", "--batch_size", "16", "--output_dir", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def predict(run, tmp_path, capsys):
    """predict(texts or a file, options) gives stdout and stderr."""
    def answer(given, options="", code=0):
        path = given
        if not isinstance(given, Path):
            path = tmp_path / "in.txt"
            path.write_text("\n".join(given), encoding="utf-8")
        capsys.readouterr()
        argv = ["--option", "predict", "--run", str(run), "--input", str(path), *options.split()]
        assert run_llama.main(argv) == code
        return capsys.readouterr()
    return answer


@pytest.fixture(scope="module")
def expected(run) -> np.ndarray:
    """The probabilities of TEXTS."""
    return load(run).predict_proba(TEXTS)


# --------------------------------------------------------------------------- the formats


def test_output_format_says_how_the_answers_are_written(predict, expected):
    label = expected.argmax(1).tolist()
    assert predict(TEXTS).out == predict(TEXTS, "--output_format tsv").out == "".join(
        f"{i}\t{NAMES[i]}\t{' '.join(f'{p:.6f}' for p in row)}\n" for i, row in zip(label, expected, strict=True))

    for i, line in enumerate(predict(TEXTS, "--output_format jsonl").out.splitlines()):
        found = json.loads(line)
        assert (found["text"], found["label"], found["name"]) == (TEXTS[i], label[i], NAMES[label[i]])
        assert list(found["probabilities"]) == NAMES
        assert list(found["probabilities"].values()) == pytest.approx(expected[i], abs=1e-6)

    header, *rows = csv.reader(io.StringIO(predict(TEXTS, "--output_format csv").out))
    assert header == ["text", "label", "name", "p_bad", "p_fine", "p_good"]
    for i, row in enumerate(rows):
        safe = f"'{TEXTS[i]}" if TEXTS[i][:1] in ("=", "-") else TEXTS[i]
        assert row[:3] == [safe, str(label[i]), NAMES[label[i]]]
        assert [float(p) for p in row[3:]] == pytest.approx(expected[i], abs=1e-6)
    assert len(rows) == len(TEXTS)


def test_top_k_gives_the_likeliest_first(predict, expected):
    for k in (1, 2, 99):
        order = (-expected).argsort(1, kind="stable")[:, :k].tolist()
        pairs = [[(NAMES[j], f"{expected[i][j]:.6f}") for j in row] for i, row in enumerate(order)]
        columns = [line.split("\t") for line in predict(TEXTS, f"--top_k {k}").out.splitlines()]
        assert columns == [[str(row[0]), NAMES[row[0]], *(word for pair in pairs[i] for word in pair)]
                           for i, row in enumerate(order)]
        header, *rows = csv.reader(io.StringIO(predict(TEXTS, f"--top_k {k} --output_format csv").out))
        assert header[3:5] == ["name_1", "p_1"] and len(header) == 3 + 2 * min(k, 3)
        assert [row[3:] for row in rows] == [row[2:] for row in columns]
        found = [json.loads(line) for line in predict(TEXTS, f"--top_k {k} --output_format jsonl").out.splitlines()]
        assert [[*one["probabilities"]] for one in found] == [[name for name, _ in row] for row in pairs]


def test_threshold_says_unsure_below_it(predict, run):
    rows = tiny_sentences(30, 5)
    best = load(run).predict_proba([s for _, s in rows])
    at = float(np.median(best.max(1)))
    is_sure, is_right = best.max(1) >= at, best.argmax(1) == [label for label, _ in rows]
    file = write_split(run.parent / "in.txt", rows)
    found = predict(file, f"--threshold {at!r}")
    answered = [line.split("\t")[:2] for line in found.out.splitlines()]
    assert answered == [[str(i), NAMES[i]] if sure else ["-1", "unsure"]
                        for i, sure in zip(best.argmax(1).tolist(), is_sure, strict=True)]
    right = int((is_sure & is_right).sum())
    assert 0 < is_sure.sum() < 30 and found.err.endswith(
        f"scored :: {right} of {is_sure.sum()} right ({right / is_sure.sum():.3f}), {30 - is_sure.sum()} unsure\n")
    assert predict(file, "--threshold 1").err.endswith("scored :: 0 of 0 right, 30 unsure\n")


# --------------------------------------------------------------------------- labels in the input


def test_labels_in_the_input_are_scored_and_no_part_of_the_sentence(predict, run, tmp_path):
    rows = tiny_sentences(12, 8)
    sentences = [s for _, s in rows]
    plain = predict(sentences)
    assert "label" not in plain.err and "scored" not in plain.err
    right = int((load(run).predict_proba(sentences).argmax(1) == [label for label, _ in rows]).sum())
    for name in (str, NAMES.__getitem__):
        found = predict([f"{name(label)} ||| {s}" for label, s in rows])
        assert found.out == plain.out
        assert "in.txt: 12 of 12 have a label, which is not part of the sentence\n" in found.err
        assert found.err.endswith(f"scored :: {right} of 12 right ({right / 12:.3f})\n")
    odd = predict([f"9 ||| {sentences[0]}", f"good ||| {sentences[2]}", "x"])
    assert "1 of 3 have a label that the run does not know" in odd.err and "1 of 3 have a label, which" in odd.err
    assert odd.out.splitlines()[1] == plain.out.splitlines()[2]

    table = tmp_path / "in.csv"
    with open(table, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *((s, NAMES[label]) for label, s in rows)])
    found = predict(table)
    assert found.out == plain.out and found.err.endswith(f"scored :: {right} of 12 right ({right / 12:.3f})\n")


# --------------------------------------------------------------------------- a stream


def test_other_encodings_are_read_and_said(predict, tmp_path):
    texts = ["good", "好电影", "bad"]
    plain = predict(texts)
    for encoding, words in (("utf-8-sig", ""), ("utf-16", ""), ("gb18030", "read as GB18030")):
        (tmp_path / "in.txt").write_bytes("\n".join(texts).encode(encoding))
        found = predict(tmp_path / "in.txt")
        assert found.out == plain.out and words in found.err
    (tmp_path / "in.txt").write_bytes(b"good\ncaf\xe9\n")
    found = predict(tmp_path / "in.txt", code=2)
    assert found.out.count("\n") <= 1 and "in.txt:2: the bytes" in found.err


def test_the_same_lines_are_answered_the_same_when_compressed(predict, tmp_path):
    text = b"a good film ||| a bad plot\n\ngood ||| the film is good\n"
    (tmp_path / "in.txt").write_bytes(text)
    (tmp_path / "zipped.txt.gz").write_bytes(gzip.compress(text))
    found = predict(tmp_path / "in.txt")
    assert predict(tmp_path / "zipped.txt.gz").out == found.out and found.out.count("\n") == 3
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(text)[:-9])
    assert "cut.txt.gz: it cannot be decompressed" in predict(tmp_path / "cut.txt.gz", code=2).err


def test_json_lines_by_either_name_are_a_table_and_some_labels_are_scored(predict, tmp_path):
    rows = [{"text": "good", "label": "good"}, {"text": "bad", "label": ""}]
    for name in ("in.jsonl", "in.ndjson"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        found = predict(tmp_path / name)
        assert found.out == predict(["good", "bad"]).out and f"{name}: 1 of 2 have a label" in found.err


def test_utf_16_without_a_mark_is_read_and_latin_1_is_not_chinese(predict, tmp_path):
    (tmp_path / "in.txt").write_bytes("a good film\nbad\n".encode("utf-16-le"))
    assert predict(tmp_path / "in.txt").out == predict(["a good film", "bad"]).out
    (tmp_path / "in.txt").write_bytes("th\u00e9\u00e2tre bon\nun tr\u00e8s bon film\n".encode("latin-1"))
    assert "in.txt:1: the bytes" in predict(tmp_path / "in.txt", code=2).err


def test_columns_of_what_has_lines_are_refused(predict):
    for option in ("--text_column body", "--label_column q"):
        assert "has lines" in predict(["x"], option, code=2).err


def test_a_label_is_a_place_only_where_no_class_is_a_number():
    stars = Labels("x", ["1", "2", "3"])
    assert [stars.add(label) for label in ("0", "1", "3.0", "+3", None)] == [False, True, True, True, False]
    assert list(stars.known) == [None, 0, 2, 2, None]
    named = Labels("x", ["bad", "good"])
    assert [named.add(label) for label in ("0", "good", "2")] == [True, True, False]
    assert list(named.known) == [0, 1, None]


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX's")
def test_a_line_on_an_open_pipe_is_answered_before_the_next_and_an_interrupt_ends_it(run):
    """Were answers kept back, the first readline would wait for ever."""
    process = subprocess.Popen([sys.executable, str(ROOT / "run_llama.py"), "--option", "predict", "--run", str(run),
                                "--input", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for text in ("a good film\n", "\n", "好\r\n"):
        process.stdin.write(text.encode())
        process.stdin.flush()
        assert len(process.stdout.readline().split(b"\t")) == 3
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.endswith(b"interrupted\n")


def test_what_a_spreadsheet_would_compute_is_text():
    one = answers.answer([1.0], ["=a"])
    for text in ("=1", "+1+A1", "@a", "-A1", " =1", "\t=1"):
        assert answers.csv_line(text, one, False).lstrip('"').startswith("'"), text


def test_a_number_is_no_formula_and_a_lone_return_stays_in_its_cell():
    found = answers.answer([0.9, 0.1], ["-1", "0"], 2)
    line = answers.csv_line("x\ry", found, True)
    assert list(csv.reader(io.StringIO(line, newline=""))) == [["x\ry", "0", "-1", "-1", "0.900000", "0", "0.100000"]]
