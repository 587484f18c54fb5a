"""Scores as a person reads them, and what evaluate prints of them."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_sentences, write_split
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support

import run_llama
from commands import scores
from training import metrics

# --------------------------------------------------------------------------- the text


@pytest.mark.parametrize("text, columns", [
    ("good", 4), ("很好", 4), ("좋다", 4), ("ｗｉｄｅ", 8), ("é", 1), ("e\u0301", 1),
    ("😀", 2), ("", 0), ("a\u200db", 2)])
def test_the_width_of_a_text_is_what_a_terminal_gives_it(text, columns):
    assert scores.width(text) == columns


@given(st.text(), st.integers(2, 30))
def test_a_fitted_text_has_exactly_its_columns_and_keeps_its_beginning(text, columns):
    fitted = scores.fitted(text, columns)
    assert scores.width(fitted) == columns
    if scores.width(text) <= columns:
        assert fitted.rstrip(" ") == text.rstrip(" ")
    else:
        assert text.startswith(fitted.rstrip(" ").removesuffix("…")) and "…" in fitted


@pytest.mark.parametrize("found, n, text", [
    (metrics.Paired(180, 78, 2.04e-10), 1101, "+0.093, more than chance (right where it is wrong 180, wrong where it "
                                              "is right 78; exact McNemar p = 2e-10)"),
    (metrics.Paired(20, 27, 0.3817), 100, "-0.070, within chance (right where it is wrong 20, wrong where it is right "
                                          "27; exact McNemar p = 0.38)"),
    (metrics.Paired(0, 0, 1.0), 9, "+0.000, within chance (right where it is wrong 0, wrong where it is right 0; exact "
                                   "McNemar p = 1)"),
    (metrics.Paired(4000, 0, 0.0), 8000, "+0.500, more than chance (right where it is wrong 4000, wrong where it is "
                                         "right 0; exact McNemar p < 1e-99)")])
def test_a_comparison_says_its_size_its_verdict_and_its_numbers(found, n, text):
    assert scores.comparison(found, n) == text


def table_of(labels, predicted, names):
    return scores.class_table(metrics.per_class(np.array(labels), np.array(predicted), len(names)), names)


def test_the_table_of_classes_is_aligned_whatever_their_names():
    lines = table_of([0, 0, 1, 1], [0, 1, 1, 1], ["很好", "a name that is far too long for a column", "😀"])
    assert [scores.width(line) for line in lines] == [scores.width(lines[0])] * 4
    assert lines[1].split() == ["很好", "1.000", "0.500", "0.667", "2"]
    assert lines[3].split() == ["😀", "-", "-", "-", "0"]
    assert "a name that is far too …" in lines[2]


def test_of_many_classes_the_table_has_the_worst_and_says_so():
    names = [f"class {i}" for i in range(40)]
    labels = [*range(39), 39, 39, 39]
    predicted = [i if i >= 5 else i + 5 for i in range(39)] + [39, 39, 0]
    lines = table_of(labels, predicted, names)
    assert lines[0] == "of 40 classes, the 30 with the lowest F1" and len(lines) == 2 + 30
    judge = f1_score(labels, predicted, average=None)
    assert [line[:9].strip() for line in lines[2:]] == [names[i] for i in np.argsort(judge, kind="stable")[:30]]
    assert len(table_of(labels, predicted, names[:30] + ["x"] * 10)) == 32
    # Classes that nobody has seen are not among the worst.
    more = table_of([0, 1] * 3, [0, 0, 1, 1, 0, 1], [f"class {i}" for i in range(31)])
    assert more[0] == "of 31 classes, the 2 with the lowest F1" and len(more) == 4


def test_the_matrix_has_names_over_its_columns_or_numbers_where_they_are_long():
    short = scores.matrix([[50, 2], [3, 1000]], ["bad", "很好"])
    assert [line.split() for line in short] == [["bad", "很好"], ["bad", "50", "2"], ["很好", "3", "1000"]]
    assert len({scores.width(line) for line in short}) == 1
    long = scores.matrix([[50, 2], [3, 4]], ["very negative", "very positive"])
    assert [line.split() for line in long] == [["0", "1"], ["0", "very", "negative", "50", "2"],
                                               ["1", "very", "positive", "3", "4"]]
    assert len({scores.width(line) for line in long}) == 1


# --------------------------------------------------------------------------- evaluate, from end to end


def read_rows(path):
    rows = [line.split(" ||| ", 1) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return np.array([int(label) for label, _ in rows]), [sentence for _, sentence in rows]


def section(out, title):
    """The indented lines behind a title."""
    lines = out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(title)) + 1
    end = next((i for i in range(at, len(lines)) if not lines[i].startswith("  ")), len(lines))
    return [line.split() for line in lines[at:end]]


@pytest.fixture
def run(tiny_arguments, tiny_data, capsys):
    """A finished run in the folder `run`, and what it printed: its training sentences do not tell all."""
    rows = [*tiny_sentences(40, 8), (2, "a film"), (0, "good"), (1, "awful and long")]
    write_split(Path("few-train.txt"), rows)
    tiny_arguments[tiny_arguments.index("--train") + 1] = "few-train.txt"
    assert run_llama.main(["--option", "finetune", *tiny_arguments, "--output_dir", "run",
                           "--label_names", str(tiny_data["label_names"])]) == 0
    return capsys.readouterr().out


def evaluated(capsys, *more):
    assert run_llama.main(["--option", "evaluate", "--run", "run", *more]) == 0
    streams = capsys.readouterr()
    return streams.out, streams.err


def test_evaluate_prints_scikit_learns_tables_of_each_split(run, tiny_data, capsys):
    out, _ = evaluated(capsys)
    for name in ("dev", "test"):
        labels, _ = read_rows(tiny_data[name])
        predicted, _ = read_rows(f"run/{name}-predictions.txt")
        assert f"{name} macro-F1 :: {f1_score(labels, predicted, average='macro'):.3f}" in out.splitlines()
        assert f"{name} predictions :: {Path('run') / f'{name}-predictions.txt'}" in out.splitlines()
        head, *rows = section(out, f"{name} classes ::")
        assert head == ["precision", "recall", "f1", "n"]
        judge = np.array(precision_recall_fscore_support(labels, predicted, zero_division=np.nan)).T
        expected = [["-" if math.isnan(value) else f"{value:.3f}" for value in row[:3]] + [f"{row[3]:.0f}"]
                    for row in judge]
        assert [row[0] for row in rows] == ["bad", "fine", "good"] and [row[1:] for row in rows] == expected
        head, *rows = section(out, f"{name} confusion ::")
        assert head == ["bad", "fine", "good"]
        assert [list(map(int, row[1:])) for row in rows] == confusion_matrix(labels, predicted).tolist()


def test_each_split_is_compared_with_tf_idf_sentence_by_sentence(run, tiny_data, capsys):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    labels, sentences = read_rows("few-train.txt")
    by_words = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=200))
    by_words.fit(sentences, labels)
    out, err = evaluated(capsys)
    result = json.loads(Path("run/result.json").read_text(encoding="utf-8"))
    assert result["baselines"].keys() == {"dev", "test"} and result["baselines"]["dev"].keys() == {"majority", "tfidf"}
    for name in ("dev", "test"):
        labels, sentences = read_rows(tiny_data[name])
        ours = read_rows(f"run/{name}-predictions.txt")[0] == labels
        theirs = by_words.predict(sentences) == labels
        better, worse = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
        assert better + worse, "the test tells nothing"
        line = next(line for line in out.splitlines() if line.startswith(f"{name} vs tf-idf ::"))
        assert f"right where it is wrong {better}, wrong where it is right {worse};" in line
        assert line.startswith(f"{name} vs tf-idf :: {ours.mean() - theirs.mean():+.3f}, ")
        assert line in run.splitlines()
        tail = sum(math.comb(better + worse, k) for k in range(min(better, worse) + 1)) / 2 ** (better + worse)
        assert result[name]["vs_tfidf"] == {"only_first": better, "only_second": worse,
                                            "p": pytest.approx(min(1, 2 * tail))}
    assert "not compared" not in err


def test_without_the_runs_training_sentences_the_known_baselines_stand_alone(run, capsys):
    said = re.findall("^(?:dev|test) baselines :: .*$", run, re.M)
    train = Path("few-train.txt")
    whole = train.read_text(encoding="utf-8")
    train.write_text(whole + "0 ||| awful\n", encoding="utf-8")
    for why in ("has changed", "is not there any more"):
        out, err = evaluated(capsys)
        assert re.findall("^(?:dev|test) baselines :: .*$", out, re.M) == said and "vs tf-idf" not in out
        assert f"not compared with tf-idf sentence by sentence: the run's training file {train.resolve()} {why}" in err
        train.unlink(missing_ok=True)
    train.write_text(whole, encoding="utf-8")
    assert "vs tf-idf" in evaluated(capsys)[0]


def test_other_files_are_held_against_what_the_run_was_trained_on(run, tiny_data, capsys):
    out, err = evaluated(capsys, "--test", str(tiny_data["test"]))
    for kind in ("baselines", "vs tf-idf"):
        (line,) = (line for line in run.splitlines() if line.startswith(f"test {kind} ::"))
        assert line in out.splitlines()
    assert f"test predictions :: {Path('run/toy-test-predictions.txt')}" in out.splitlines()
    Path("few-train.txt").unlink()
    out, err = evaluated(capsys, "--test", str(tiny_data["test"]))
    assert "tf-idf" not in out and "without baselines: the run's training file" in err


def test_of_more_than_twelve_classes_the_pairs_confused_most_are_named(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [(i % 13, f"the film is {'very ' * (i % 13)}good") for i in range(52)]
    for name in ("train", "dev"):
        write_split(Path(f"many-{name}.txt"), rows)
    assert run_llama.main(["--option", "finetune", "--train", "many-train.txt", "--dev", "many-dev.txt", "--epochs",
                           "1", "--pretrained_model_path", str(tiny_model), "--output_dir", "run"]) == 0
    capsys.readouterr()
    out, _ = evaluated(capsys)
    labels, predicted = read_rows("many-dev.txt")[0], read_rows("run/dev-predictions.txt")[0]
    matrix = confusion_matrix(labels, predicted, labels=range(13))
    pairs = section(out, "dev confused most ::")
    assert "dev confusion ::" not in out and 0 < len(pairs) <= 10
    for label, *words, count, of, n in pairs:
        assert words[:2] == ["taken", "for"] and of == "of" and label != words[2]
        assert matrix[int(label), int(words[2])] == int(count) and matrix[int(label)].sum() == int(n)


def test_prompt_compares_with_tf_idf_too(tiny_arguments, tiny_data, capsys):
    assert run_llama.main(["--option", "prompt", *tiny_arguments]) == 0
    out = capsys.readouterr().out
    for name in ("dev", "test"):
        assert re.search(f"^{name} vs tf-idf :: .* chance ", out, re.M)
        assert f"{name} predictions :: toy-{name}-prompting-output.txt" in out.splitlines()
