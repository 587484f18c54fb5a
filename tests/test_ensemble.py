"""Several runs as one: evaluate and predict with several --run, judged by the runs' own answers and numpy."""

import csv
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from conftest import ROOT, tiny_sentences
from scipy.stats import binomtest

import run_llama
from commands import ensemble
from minllama import load
from training import comparisons

NAMES = ["bad", "fine", "good"]
TEXTS = ["a good film", "dull and long", "x ||| y", "the film is a mixed one", "great"]


def write_named(path: Path, n: int, seed: int, names=NAMES) -> Path:
    path.write_text("".join(f"{names[label]} ||| {text}\n" for label, text in tiny_sentences(n, seed)),
                    encoding="utf-8", newline="\n")
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model) -> Path:
    """A folder with the runs a, b and c: b has another seed; c another model, tokenizer, length and order of the
    labels. `other` has other labels."""
    folder = tmp_path_factory.mktemp("ensemble")
    files = {name: write_named(folder / f"toy-{name}.txt", n, seed)
             for seed, (name, n) in enumerate({"train": 96, "dev": 60, "test": 63}.items())}
    model = tiny.write_model(folder / "model", ["good film bad dull one"] * 9, layers=1)
    strange = write_named(folder / "other-train.txt", 60, 1, ["bad", "fine", "superb"])

    def train(name: str, *argv: str, train: Path = files["train"], dev: Path = files["dev"]) -> None:
        assert run_llama.main([
            "--option", "finetune", "--train", str(train), "--dev", str(dev), "--test",
            str(files["test"] if train == files["train"] else train), "--epochs", "2", "--lr", "3e-3", "--batch_size",
            "16", "--device", "cpu", "--dtype", "float32", "--output_dir", str(folder / name), *argv]) == 0

    common = ("--pretrained_model_path", str(tiny_model))
    train("a", *common)
    train("b", *common, "--seed", "7")
    (folder / "names.json").write_text('["good", "bad", "fine"]', encoding="utf-8")
    train("c", "--pretrained_model_path", str(model), "--label_names", str(folder / "names.json"),
          "--max_sentence_len", "5")
    train("other", *common, train=strange, dev=strange)
    return folder


@pytest.fixture
def main(made, tmp_path, monkeypatch, capsys):
    """main(command, runs, options) gives stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(command, runs, *argv, code=0):
        capsys.readouterr()
        assert run_llama.main(["--option", command, "--run", *(str(made / run) for run in runs),
                               *map(str, argv)]) == code
        return capsys.readouterr()
    return call


def mean_of(runs: list[Path], texts: list[str]) -> np.ndarray:
    """The mean of the runs' own probabilities, columns in the order of NAMES."""
    each = []
    for run in runs:
        model = load(run)
        columns = [model.classes_.tolist().index(name) for name in NAMES]
        each.append(model.predict_proba(texts)[:, columns].astype(np.float64))
    return np.mean(each, axis=0)


def labelled(path: Path) -> tuple[np.ndarray, list[str]]:
    rows = [line.partition(" ||| ") for line in path.read_text(encoding="utf-8").splitlines()]
    return np.array([NAMES.index(label) for label, _, _ in rows]), [text for _, _, text in rows]


# --------------------------------------------------------------------------- predict


@pytest.mark.parametrize("runs", ["ab", "abc", "cab"])
@pytest.mark.filterwarnings("ignore:.* cut to")
def test_several_runs_answer_with_the_mean_of_their_probabilities(main, made, tmp_path, runs):
    (tmp_path / "in.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    expected = mean_of([made / run for run in runs], TEXTS)
    assert not np.allclose(expected, mean_of([made / runs[0]], TEXTS), atol=1e-3), "one run alone says something else"
    found = [json.loads(line) for line in main("predict", runs, "--input", tmp_path / "in.txt", "--output_format",
                                               "jsonl").out.splitlines()]
    assert [one["text"] for one in found] == TEXTS
    assert np.allclose([[one["probabilities"][name] for name in NAMES] for one in found], expected, atol=2e-6)
    order = ["good", "bad", "fine"] if runs[0] == "c" else NAMES
    assert [list(one["probabilities"]) for one in found] == [order] * len(TEXTS)
    assert [one["label"] for one in found] == [order.index(NAMES[i]) for i in expected.argmax(1)]


def test_formats_top_k_and_threshold_are_those_of_one_run(main, made, tmp_path):
    (tmp_path / "in.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    expected = mean_of([made / "a", made / "b"], TEXTS)
    said = main("predict", "ab", "--input", tmp_path / "in.txt", "--output_format", "csv", "--top_k", "2").out
    rows = list(csv.reader(io.StringIO(said)))
    assert rows[0] == ["text", "label", "name", "name_1", "p_1", "name_2", "p_2"]
    assert [[row[3], row[5]] for row in rows[1:]] == [[NAMES[i] for i in np.argsort(-p)[:2]] for p in expected]
    limit = float(np.median(expected.max(1)))
    said = main("predict", "ab", "--input", tmp_path / "in.txt", "--threshold", repr(limit + 1e-9)).out
    assert [line.split("\t")[1] == "unsure" for line in said.splitlines()] == (expected.max(1) < limit + 1e-9).tolist()


def test_a_pipe_is_answered_as_a_file_is(main, made, tmp_path):
    path = made / "toy-dev.txt"
    from_file = main("predict", "ab", "--input", path)
    piped = subprocess.run([sys.executable, str(ROOT / "run_llama.py"), "--option", "predict", "--run", str(made / "a"),
                            str(made / "b"), "--input", "-"], input=path.read_bytes(), capture_output=True,
                           cwd=tmp_path, check=True)
    def numbers(said: str) -> list[list[float]]:
        return [[float(p) for p in line.split("\t")[2].split()] for line in said.splitlines()]
    assert np.allclose(numbers(from_file.out), numbers(piped.stdout.decode()), atol=2e-6)
    labels, texts = labelled(path)
    right = int((mean_of([made / "a", made / "b"], texts).argmax(1) == labels).sum())
    assert f"scored :: {right} of 60 right" in from_file.err and f"scored :: {right} of 60 right" in str(piped.stderr)


def test_what_is_cut_is_said_of_the_run_that_cuts(main, made, tmp_path):
    (tmp_path / "in.txt").write_text("word " * 50 + "\nshort", encoding="utf-8")
    assert f"1 sentence cut to 5 tokens for {made / 'c'}" in main("predict", "ac", "--input", tmp_path / "in.txt").err


def test_a_file_has_one_run_in_memory_after_another(main, made, tmp_path, monkeypatch):
    import gc
    import weakref

    models, at_once = [], []
    real = ensemble.Member.load

    def watched(self):
        gc.collect()
        at_once.append(sum(model() is not None for model in models))
        run = real(self)
        models.append(weakref.ref(run.model))
        return run

    monkeypatch.setattr(ensemble.Member, "load", watched)
    (tmp_path / "in.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    main("predict", "abc", "--input", tmp_path / "in.txt")
    main("evaluate", "abc")
    assert len(at_once) == 6 and max(at_once) == 0


# --------------------------------------------------------------------------- evaluate


@pytest.mark.filterwarnings("ignore:.* cut to")
def test_evaluate_says_each_accuracy_the_ensembles_and_the_gain(main, made, tmp_path):
    before = {path: path.stat().st_mtime_ns for run in "abc" for path in (made / run).iterdir()}
    out = main("evaluate", "abc").out
    for name, n in (("dev", 60), ("test", 63)):
        labels, texts = labelled(made / f"toy-{name}.txt")
        right = np.array([mean_of([made / run], texts).argmax(1) == labels for run in "abc"])
        together = mean_of([made / run for run in "abc"], texts)
        ours = together.argmax(1) == labels
        for run, accuracy in zip("abc", right.mean(1), strict=True):
            assert f"{name} run :: {accuracy:.3f} {made / run}\n" in out
        assert f"\n{name} acc :: {ours.mean():.3f}\n" in out
        best = int(right.mean(1).argmax())
        gained, lost = int((ours & ~right[best]).sum()), int((right[best] & ~ours).sum())
        line = re.search(rf"^{name} vs best run :: (.*)$", out, re.M)[1]
        assert line.startswith(f"{ours.mean() - right[best].mean():+.3f} (95%: ")
        assert f"{made / 'abc'[best]} has {right[best].mean():.3f}; right where it is wrong {gained}, wrong where " \
               f"it is right {lost}" in line
        p = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
        assert float(line.rpartition("= ")[2]) == pytest.approx(p, rel=0.06)
        line = re.search(rf"^{name} vs mean run :: (.*)$", out, re.M)[1]
        assert line.startswith(f"{ours.mean() - right.mean():+.3f} (95%: ")
        assert f"the mean of the runs is {right.mean():.3f}; paired over {n} sentences" in line
        written = (tmp_path / f"ensemble-{name}-predictions.txt").read_text(encoding="utf-8").splitlines()
        assert written == [f"{NAMES[i]} ||| {text}" for i, text in zip(together.argmax(1), texts, strict=True)]
        assert f"{name} predictions :: ensemble-{name}-predictions.txt" in out
    assert before == {path: path.stat().st_mtime_ns for run in "abc" for path in (made / run).iterdir()}


def test_the_order_of_the_labels_does_not_matter(main, made):
    keep = r"^(?:dev|test) (?:acc|run|macro-F1) :: .*$"
    one, other = (re.findall(keep, main("evaluate", runs).out, re.M) for runs in ("ac", "ca"))
    assert sorted(one) == sorted(other) and len(one) == 8


def test_files_that_are_typed_are_scored_and_written_where_it_was_said(main, made, tmp_path):
    labels, texts = labelled(made / "toy-test.txt")
    together = mean_of([made / "a", made / "b"], texts)
    out = main("evaluate", "ab", "--test", made / "toy-test.txt", "--test_out", tmp_path / "mine.txt").out
    assert f"\ntest acc :: {(together.argmax(1) == labels).mean():.3f}\n" in out and "dev acc" not in out
    assert len((tmp_path / "mine.txt").read_text(encoding="utf-8").splitlines()) == 63
    assert "was trained on it" in main("evaluate", "ab", "--dev", made / "toy-train.txt").err


# --------------------------------------------------------------------------- what is refused


def test_other_labels_are_refused_with_both_lists(main, made):
    (made / "in.txt").write_text("good", encoding="utf-8")
    for argv in (["evaluate", ["a", "other"]], ["predict", ["a", "other"], "--input", made / "in.txt"]):
        said = main(*argv, code=2)
        assert not said.out and "Traceback" not in said.err
        assert "its labels are bad, fine, superb, and those of" in said.err and "are bad, fine, good;" in said.err


def test_a_run_that_is_named_twice_or_missing_is_refused_before_anything_is_computed(main, made):
    assert "named twice" in main("evaluate", ["a", "b", "a/best"], code=2).err
    said = main("evaluate", ["a", "nothing"], code=2)
    assert str(made / "nothing") in said.err and not said.out


def test_runs_with_other_files_need_one_that_is_typed(main, made, tmp_path, tiny_model):
    small = write_named(tmp_path / "small-dev.txt", 20, 8)
    assert run_llama.main(["--option", "finetune", "--pretrained_model_path", str(tiny_model), "--train",
                           str(made / "toy-train.txt"), "--dev", str(small), "--epochs", "1", "--output_dir",
                           str(made / "small")]) == 0
    said = main("evaluate", ["a", "small"], code=2).err
    assert f"{made / 'small'} has another dev file than {made / 'a'}; name the file" in said
    assert "\ndev acc :: " in main("evaluate", ["a", "small"], "--dev", small).out


def test_serve_still_uses_one(main, made):
    assert "--option serve uses one --run, and 2 are given" in main("serve", "ab", code=2).err


# --------------------------------------------------------------------------- a series


@pytest.mark.parametrize("kind", ["seed", "fold"])
def test_the_folder_of_a_series_is_its_runs(main, made, tmp_path, tiny_model, kind):
    argv = ["--option", "finetune", "--pretrained_model_path", str(tiny_model), "--train", str(made / "toy-train.txt"),
            "--dev", str(made / "toy-dev.txt"), "--test", str(made / "toy-test.txt"), "--epochs", "1", "--lr", "3e-3",
            "--output_dir", str(made / kind), f"--{kind}s", "2"]
    assert run_llama.main(argv) == 0
    labels, texts = labelled(made / "toy-test.txt")
    members = sorted((made / kind).glob(f"{kind}-*"))
    assert len(members) == 2
    accuracy = (mean_of(members, texts).argmax(1) == labels).mean()
    if kind == "fold":
        said = main("evaluate", [kind], code=2).err
        assert "each has another dev" in said and f"--test {made / 'toy-test.txt'}" in said
        assert "was trained on it, or on a part" in main("evaluate", [kind], "--dev", made / "toy-dev.txt").err
    out = main("evaluate", [kind], "--test", made / "toy-test.txt").out
    assert "ensemble :: 2 runs" in out and f"\ntest acc :: {accuracy:.3f}\n" in out
    found = main("predict", [kind], "--input", made / "toy-test.txt")
    assert f"scored :: {round(accuracy * 63)} of 63 right" in found.err
    (members[1] / "result.json").unlink()
    assert "1 of 2 runs are finished, and 2 are used" in main("predict", [kind], "--input", made / "toy-test.txt").err


# --------------------------------------------------------------------------- the interval over sentences


def test_the_gain_over_sentences_is_mcnemars_interval_where_each_gain_is_whole():
    gains = [1.0] * 9 + [-1.0] * 4 + [0.0] * 87
    paired, found = comparisons.paired(4, 9, 100), comparisons.over_sentences(gains)
    assert (found.value, found.low, found.high) == pytest.approx((paired.value, paired.low, paired.high))


def test_the_gain_over_sentences_covers_the_truth_19_times_of_20():
    draw = np.random.default_rng(0)
    values, chances = np.array([-1.0, -0.6, -0.2, 0.0, 0.4, 0.8]), np.array([0.05, 0.07, 0.1, 0.6, 0.1, 0.08])
    truth, hits, n_draws = float(values @ chances), 0, 2000
    for _ in range(n_draws):
        found = comparisons.over_sentences(draw.choice(values, 200, p=chances).tolist())
        hits += found.low <= truth <= found.high
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0) or math.isclose(found.p, 0.05, rel_tol=1e-4)
    assert 0.94 <= hits / n_draws <= 0.965


def test_the_scores_of_an_order_do_not_depend_on_which_run_comes_first(main, made, tiny_model):
    assert run_llama.main(["--option", "finetune", "--pretrained_model_path", str(tiny_model), "--train",
                           str(made / "toy-train.txt"), "--dev", str(made / "toy-dev.txt"), "--test",
                           str(made / "toy-test.txt"), "--epochs", "1", "--loss", "ordinal", "--device", "cpu",
                           "--output_dir", str(made / "ordinal")]) == 0
    keep = r"^(?:dev|test) mae :: .*$"
    one, other = (re.findall(keep, main("evaluate", runs).out, re.M) for runs in (["a", "ordinal"], ["ordinal", "a"]))
    assert one == other and len(one) == 2
    labels, texts = labelled(made / "toy-dev.txt")
    guesses = mean_of([made / "a", made / "ordinal"], texts).argmax(1)
    assert one[0].startswith(f"dev mae :: {np.abs(guesses - labels).mean():.3f}, ")
    assert not re.findall(keep, main("evaluate", "ab").out, re.M)
    said = main("evaluate", ["c", "ordinal"])
    assert not re.findall(keep, said.out, re.M) and "has the labels in another order" in said.err
