"""A person's own data, end to end: tables of every kind, labels by name, no dev file, and what is said of the data."""

import csv
import gzip
import json
import os
import random
import re
from pathlib import Path

import pytest
from conftest import WORDS, tiny_sentences, write_split

import run_llama
from formats import files
from training.trainer import Loop

NAMES = ["bad", "fine", "good"]


@pytest.fixture
def model(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return ["--pretrained_model_path", str(tiny_model), "--batch_size", "16", "--lr", "3e-3", "--epochs", "2",
            "--device", "cpu", "--dtype", "float32"]


def rows(n: int, seed: int, start: int = 0) -> list[tuple[int, str]]:
    """As tiny_sentences, and no two the same."""
    return [(label, f"{text} {i}") for i, (label, text) in enumerate(tiny_sentences(n, seed), start)]


def write_csv(path: str, found, header=("text", "label"), encoding="utf-8", **how) -> str:
    with open(path, "w", encoding=encoding, newline="") as file:
        csv.writer(file, **how).writerows([header, *((text, NAMES[label]) for label, text in found)])
    return path


def call(capsys, *argv, code: int = 0):
    capsys.readouterr()
    assert run_llama.main([str(word) for word in argv]) == code, capsys.readouterr().err
    return capsys.readouterr()


def weights(run) -> str:
    return files.sha256(Path(run, "best/model.safetensors"))


def losses(run) -> list[float]:
    return [json.loads(line)["loss"] for line in Path(run, "steps.jsonl").read_text(encoding="utf-8").splitlines()]


def read(path) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines()


def in_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


# --------------------------------------------------------------------------- formats


def test_every_format_is_the_same_run(model, capsys):
    """... as plain lines with numbers and the names beside them."""
    for name, n, seed in (("train", 96, 0), ("dev", 30, 1)):
        found = rows(n, seed, 1000 * seed)
        write_split(Path(f"toy-{name}.txt"), found)
        write_csv(f"toy-{name}.csv", found, delimiter=";", encoding="utf-8-sig")
        write_csv(f"toy-{name}.tsv", found, delimiter="\t", encoding="utf-16")
        write_split(Path(f"named-{name}.txt"), [(NAMES[label], text) for label, text in found])
        lines = "".join(json.dumps({"sentence": text, "class": NAMES[label]}) + "\n" for label, text in found)
        Path(f"toy-{name}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    Path("names.json").write_text(json.dumps(NAMES), encoding="utf-8")
    for kind in ("txt", "csv", "tsv", "jsonl.gz", "named"):
        data = f"toy-{{}}.{kind}" if kind != "named" else "named-{}.txt"
        said = call(capsys, "--option", "finetune", *model, "--train", data.format("train"), "--dev",
                    data.format("dev"), "--output_dir", kind,
                    *(["--label_names", "names.json"] if kind == "txt" else []))
        assert (weights(kind), losses(kind)) == (weights("txt"), losses("txt")), kind
        assert in_json(f"{kind}/best/config.json")["label_names"] == NAMES
        assert ("labels :: bad 32, fine 32, good 32" in said.err) == (kind != "txt")
        assert ("delimiter `;`, utf-8-sig, text in text, label in label" in said.err) == (kind == "csv")
        number = {str(i): name for i, name in enumerate(NAMES)}
        predicted = [line.split(" ||| ") for line in read(f"{kind}/dev-predictions.txt")]
        if kind != "txt":  # the label as the file writes it
            assert predicted == [[number[label], text] for label, text in
                                 (line.split(" ||| ") for line in read("txt/dev-predictions.txt"))]


def test_the_columns_that_were_typed_are_read(model, capsys):
    """Two columns of text joined, and labels from the one that was named, in every split and by evaluate."""
    draw = random.Random(0)
    for name, n, seed in (("train", 96, 0), ("dev", 30, 1), ("test", 21, 2)):
        with open(f"{name}.csv", "w", encoding="utf-8", newline="") as file:
            out = csv.writer(file)
            out.writerow(["title", "text", "label", "stars"])
            found = list(enumerate(rows(n, seed)))
            out.writerows([f"T{i}", text, draw.choice("xy"), label + 1] for i, (label, text) in found)
        write_split(Path(f"{name}-joined.txt"), [(label, f"T{i} {text}") for i, (label, text) in found])
    options = ["--text_column", "title,text", "--label_column", "stars"]
    data = [word for name in ("train", "dev", "test") for word in (f"--{name}", f"{name}.csv")]
    call(capsys, "--option", "finetune", *model, *data, *options, "--output_dir", "run")
    joined = [word.replace(".csv", "-joined.txt") for word in data]
    call(capsys, "--option", "finetune", *model, *joined, "--output_dir", "plain")
    assert losses("run") == losses("plain")
    assert in_json("run/best/config.json")["label_names"] == ["1", "2", "3"]
    want = [line.replace(line[0], str(int(line[0]) + 1), 1) for line in read("plain/test-predictions.txt")]
    assert read("run/test-predictions.txt") == want
    before = in_json("run/result.json")["test"]["acc"]
    said = call(capsys, "--option", "evaluate", "--run", "run")
    assert f"test acc :: {before:.3f}" in said.out
    for more in ([], options):  # the run's own columns are taken where a file has them
        said = call(capsys, "--option", "evaluate", "--run", "run", "--test", "test.csv", *more)
        assert f"test acc :: {before:.3f}" in said.out and "text in title and text, label in stars" in said.err
        assert re.search("test vs tf-idf ::", said.out), "its training file is read as the run read it"
    write_split(Path("other.txt"), [(label + 1, text) for label, text in rows(21, 5)])
    said = call(capsys, "--option", "evaluate", "--run", "run", "--test", "other.txt", "--text_column", "phrase")
    assert "test vs tf-idf ::" in said.out
    sentences = [line.partition(" ||| ")[2] for line in read("test-joined.txt")]
    Path("sentences.txt").write_text("\n".join(sentences), encoding="utf-8")
    answers = [call(capsys, "--option", "predict", "--run", "run", "--input", file, *more).out
               for file, *more in (("test.csv",), ("test.csv", *options), ("sentences.txt",))]
    assert answers[0] == answers[1] == answers[2]
    assert "no such column" in call(capsys, "--option", "finetune", *model, *data, "--text_column", "txt", code=2).err
    other = call(capsys, "--option", "finetune", *model, *data, "--output_dir", "other")
    assert "labels :: x " in other.err, "without the options, the column called label"


def test_labels_stay_numbers_and_holes_are_no_classes(model, capsys):
    found = [(("-1", "2", "5")[label], text) for label, text in rows(60, 0)]
    write_split(Path("a-train.txt"), found)
    write_split(Path("a-dev.txt"), found[:20])
    said = call(capsys, "--option", "finetune", *model, "--train", "a-train.txt", "--dev", "a-dev.txt", "--output_dir",
                "run")
    assert "labels :: -1 20, 2 20, 5 20" in said.err
    assert in_json("run/result.json")["label_names"] == ["-1", "2", "5"]
    assert {line.split(" ||| ")[0] for line in read("run/dev-predictions.txt")} <= {"-1", "2", "5"}


def test_evaluate_prompt_and_lr_find_read_tables(model, capsys):
    write_csv("train.csv", rows(60, 0))
    write_csv("dev.csv", rows(20, 1, 100))
    call(capsys, "--option", "finetune", *model, "--train", "train.csv", "--dev", "dev.csv", "--output_dir", "run")
    accuracy = in_json("run/result.json")["dev"]["acc"]
    write_split(Path("numbers.txt"), rows(20, 1, 100))
    for other in ("dev.csv", "numbers.txt"):
        said = call(capsys, "--option", "evaluate", "--run", "run", "--train", "train.csv", "--dev", other)
        assert f"dev acc :: {accuracy:.3f}" in said.out and "dev baselines :: majority" in said.out
    assert read("run/train-dev-predictions.txt")[0].split(" ||| ")[0] in "012", "as numbers.txt writes it"
    with open("dev.csv", "a", encoding="utf-8") as file:
        file.write("a film,goood\n")
    err = call(capsys, "--option", "evaluate", "--run", "run", "--dev", "dev.csv", code=2).err
    assert "dev.csv:22: the label 'goood' is none of the 3 in" in err and "did you mean good?" in err
    err = call(capsys, "--option", "finetune", *model, "--train", "train.csv", "--dev", "dev.csv", code=2).err
    assert "dev.csv:22: the label goood is not in train.csv, so no model can learn it" in err
    write_csv("dev.csv", rows(20, 1, 100))
    said = call(capsys, "--option", "prompt", *model[:2], "--train", "train.csv", "--dev", "dev.csv")
    assert "dev acc :: " in said.out and "baseline :: majority" in said.out
    said = call(capsys, "--option", "lr_find", *model, "--train", "train.csv", "--lr_steps", "12")
    assert "held out" in said.out and "lr range ::" in said.out


def test_a_text_with_line_ends_is_one_line_of_the_predictions(model, capsys):
    write_csv("train.csv", rows(60, 0))
    write_csv("dev.csv", [(0, "bad\nand\r\nlong"), (2, "good ||| film")])
    call(capsys, "--option", "finetune", *model, "--train", "train.csv", "--dev", "dev.csv", "--output_dir", "run")
    assert [line.partition(" ||| ")[2] for line in read("run/dev-predictions.txt")] == ["bad and long", "good ||| film"]


# --------------------------------------------------------------------------- no dev


@pytest.fixture
def held_out(model, capsys):
    """A run on 150 rows of a CSV without a dev file."""
    write_csv("my.csv", rows(150, 0))
    write_csv("other.csv", rows(20, 1, 1000))
    return call(capsys, "--option", "finetune", *model, "--train", "my.csv", "--test", "other.csv", "--output_dir",
                "run")


def test_a_held_out_dev_is_said_stored_and_gives_the_same_run(model, held_out, capsys):
    stored = {name: [json.loads(line) for line in read(f"run/{name}-split.jsonl")] for name in ("train", "dev")}
    n = len(stored["dev"])
    assert (f"dev :: {n} of 150 sentences of my.csv held out (the same ones each time, by a hash of the text); "
            "--dev FILE names others") in held_out.out
    everything = sorted((row["text"], row["label"]) for split in stored.values() for row in split)
    assert everything == sorted((text, NAMES[label]) for label, text in rows(150, 0))
    assert {row["label"] for row in stored["dev"]} == set(NAMES) and 5 < n < 30
    assert [line.partition(" ||| ")[2] for line in read("run/dev-predictions.txt")] == [row["text"]
                                                                                       for row in stored["dev"]]
    args = in_json("run/args.json")
    assert "dev" not in args["files"] and args["splits"] == {
        name: files.sha256(Path(f"run/{name}-split.jsonl")) for name in stored}
    again = ["--train", "run/train-split.jsonl", "--dev", "run/dev-split.jsonl", "--test", "other.csv"]
    call(capsys, "--option", "finetune", *model, *again, "--output_dir", "again")
    assert weights("again") == weights("run") and losses("again") == losses("run")
    assert read("again/dev-predictions.txt") == read("run/dev-predictions.txt")
    os.rename("run", "moved")
    Path("my.csv").unlink()
    said = call(capsys, "--option", "evaluate", "--run", "moved")
    for name in ("dev", "test"):
        assert f"{name} acc :: {in_json('again/result.json')[name]['acc']:.3f}" in said.out
    assert "warning" not in said.err


def test_without_dev_and_test_nothing_is_invented(model, held_out, capsys):
    said = call(capsys, "--option", "finetune", *model, "--train", "my.csv", "--output_dir", "alone")
    assert "there is no test file" in said.err and "test" not in in_json("alone/result.json")
    assert not Path("alone/test-predictions.txt").exists()
    data = ["--train", "my.csv", "--dev", "other.csv"]
    said = call(capsys, "--option", "finetune", *model, *data, "--output_dir", "named")
    assert "held out" not in said.out and not Path("named/dev-split.jsonl").exists()


def test_a_run_with_a_held_out_dev_is_resumed(model, held_out, capsys, monkeypatch):
    real, seen = Loop.evaluate, []

    def evaluate(self, *given, **more):
        seen.append(1)
        real(self, *given, **more)
        if len(seen) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Loop, "evaluate", evaluate)
    argv = ["--option", "finetune", *model, "--train", "my.csv", "--test", "other.csv", "--save_every", "1"]
    assert run_llama.main([*argv, "--output_dir", "stopped"]) == 130
    assert not Path("stopped/result.json").exists()
    Path("stopped/dev-split.jsonl").unlink()
    said = call(capsys, "--resume", "stopped")
    assert "held out" in said.out
    assert weights("stopped") == weights("run") and losses("stopped") == losses("run")
    assert read("stopped/dev-split.jsonl") == read("run/dev-split.jsonl")


def test_seeds_limits_folds_and_a_plan_work_without_dev(model, held_out, capsys):
    base = ["--option", "finetune", *model, "--train", "my.csv", "--epochs", "1"]
    call(capsys, *base, "--seeds", "2", "--train_limit", "40", "--output_dir", "seeds")
    assert read("seeds/seed-1338/train-split.jsonl") == read("run/train-split.jsonl"), "all of it, not the 40"
    again = [word if word != "my.csv" else "run/train-split.jsonl" for word in base]
    call(capsys, *again, "--dev", "run/dev-split.jsonl", "--train_limit", "40", "--seed", "1338", "--output_dir", "one")
    assert losses("seeds/seed-1338") == losses("one")
    said = call(capsys, *base, "--folds", "3", "--output_dir", "folds")
    assert "held out" not in said.out and "over 3 folds" in said.out
    texts = [line.partition(" ||| ")[2] for i in range(3) for line in read(f"folds/fold-{i}/dev-predictions.txt")]
    assert sorted(texts) == sorted(text for _, text in rows(150, 0))
    assert not list(Path("folds").glob("*/dev-split.jsonl"))
    said = call(capsys, *base, "--plan", "--output_dir", "plan")
    assert "held out" in said.out and not Path("plan/dev-split.jsonl").exists()


def test_a_run_folders_own_split_is_kept_safe(model, held_out, capsys):
    again = ["--option", "finetune", *model, "--train", "run/train-split.jsonl", "--dev", "run/dev-split.jsonl"]
    err = call(capsys, *again, "--output_dir", "run", "--overwrite", code=2).err
    assert "--overwrite would remove it" in err and Path("run/train-split.jsonl").exists()
    err = call(capsys, *again, "--dev_out", "run/dev-split.jsonl", code=2).err
    assert "run/dev-split.jsonl" in err.replace(os.sep, "/")
    call(capsys, "--option", "finetune", *model, "--train", "my.csv", "--dev", "other.csv", "--output_dir", "run",
         "--overwrite")
    assert not Path("run/dev-split.jsonl").exists(), "of the run before"


@pytest.mark.parametrize("found", [rows(9, 0), [(i % 3, "all the same") for i in range(40)]])
def test_too_few_sentences_ask_for_dev(model, capsys, found):
    write_csv("few.csv", found)
    assert "--dev" in call(capsys, "--option", "finetune", *model, "--train", "few.csv", code=2).err
    assert not Path("runs").exists()


# --------------------------------------------------------------------------- what is said of the data


def warnings(capsys, model, *argv) -> list[str]:
    said = call(capsys, "--option", "finetune", *model, *argv, "--epochs", "1")
    return [line for line in said.err.splitlines() if line.startswith("warning: ")]


def test_what_is_silently_wrong_is_said_once_with_a_count(model, capsys):
    found = rows(60, 0)
    write_csv("train.csv", found)
    write_csv("clean.csv", rows(20, 1, 100))
    assert not warnings(capsys, model, "--train", "train.csv", "--dev", "clean.csv")
    assert warnings(capsys, model, "--train", "train.csv", "--dev", "train.csv") == [
        "warning: dev is the training file, or has the same sentences: it says nothing about others"]
    write_split(Path("copy.txt"), [(NAMES[label], text) for label, text in found])
    assert "dev is the training file" in warnings(capsys, model, "--train", "train.csv", "--dev", "copy.txt")[0]
    write_csv("some.csv", [*rows(18, 1, 100), *((label, text.upper() + " ") for label, text in found[:2])])
    data = ["--train", "train.csv", "--dev", "some.csv", "--test", "some.csv"]
    assert warnings(capsys, model, *data) == [f"warning: 2 of 20 {name} sentences are in the training file too"
                                              for name in ("dev", "test")]
    (line,) = warnings(capsys, model, *data[:4], "--folds", "2", "--fold", "0")
    assert line.startswith("warning: 2 of 80 sentences are copies of others; they may be on both sides of a fold")
    write_csv("damaged.csv", [*found, (0, "caf\ufffd"), (1, "\ufffd\ufffd")])
    (line,) = warnings(capsys, model, "--train", "damaged.csv", "--dev", "clean.csv")
    assert line.startswith("warning: damaged.csv: 2 of 62 sentences with the replacement character U+FFFD")
    write_split(Path("stray.txt"), [*((NAMES[label], text) for label, text in found), ("gooood", "a film")])
    (line,) = warnings(capsys, model, "--train", "stray.txt", "--dev", "clean.csv")
    assert "gooood (once, stray.txt:61, a misspelling of good?)" in line
    (line, other) = warnings(capsys, model, "--train", "train.csv", "--dev", "clean.csv", "--max_sentence_len", "9")
    for said, name in ((line, "train"), (other, "clean")):
        match = re.fullmatch(rf"warning: {name}\.csv: (\d+) of (\d+) sentences cut to 9 tokens \((.*)%\)", said)
        assert float(match[3]) == pytest.approx(100 * int(match[1]) / int(match[2]), rel=0.06)


def test_a_label_column_of_many_values_is_refused(model, capsys):
    with open("ids.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label", "mood"), *((text, f"id{i}", WORDS[label][0])
                                                                 for i, (label, text) in enumerate(rows(40, 0)))])
    err = call(capsys, "--option", "finetune", *model, "--train", "ids.csv", code=2).err
    assert "ids.csv: 40 different labels in 40 rows" in err and "its columns are text, label, mood" in err
    call(capsys, "--option", "finetune", *model, "--train", "ids.csv", "--label_column", "mood")
