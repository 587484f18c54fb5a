"""--option inspect from end to end: of data, of a run, in the report's card; bad input; hostile text."""

import csv
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, tiny_sentences, write_split
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

import minllama
import run_llama
from commands import inputs as run_inputs
from commands import inspect_run
from dataset import Split
from tokenizer import Tokenizer

HOSTILE = "<script>alert(1)</script> ``` | \x1b[31mred\x1b[0m"


def inspect(capsys, folder: Path, *words) -> tuple[str, dict]:
    """What is printed, and inspect.json."""
    code = run_llama.main(["--option", "inspect", *map(str, words)])
    out = capsys.readouterr()
    assert code == 0, out.err
    assert (folder / "inspect.md").is_file()
    return out.out, json.loads((folder / "inspect.json").read_text("utf-8"))


def refusal(capsys, *words) -> str:
    assert run_llama.main(["--option", "inspect", *map(str, words)]) == 2
    return capsys.readouterr().err


# --------------------------------------------------------------------------- data


@pytest.fixture
def dirty(tmp_path, monkeypatch) -> dict[str, Path]:
    """Files in which is: one sentence three times in train; four dev sentences of train, of which one is to the letter
    and one has another label; one sentence with two labels in train; one word; no word."""
    monkeypatch.chdir(tmp_path)
    extra = [(0, "A fine, bright day."), (0, "a fine bright day"), (0, "A fine, bright day."), (2, "It is so."),
             (1, "it is so"), (1, "Plain!"), (1, "..."), (2, "who knows where")]
    train = write_split(tmp_path / "dirty-train.txt", tiny_sentences(60, 0) + extra)
    known = {"".join(c for c in text if c.isalpha()) for _, text in tiny_sentences(60, 0)}
    dev = [row for row in tiny_sentences(200, 1) if "".join(c for c in row[1] if c.isalpha()) not in known][:30]
    leaked = [(2, "who knows where"), (0, "a fine bright day!"), (1, "Who knows, where?"), (2, "IT IS SO")]
    return {"train": train, "dev": write_split(tmp_path / "dirty-dev.txt", dev + leaked)}


def test_what_is_wrong_with_data_is_found(dirty, tiny_model, capsys, tmp_path):
    out, found = inspect(capsys, tmp_path / "runs" / "inspect", "--train", dirty["train"], "--dev", dirty["dev"],
                         "--tokenizer", tiny_model, "--max_sentence_len", 9)
    rows = {name: [line.split(" ||| ") for line in path.read_text("utf-8").splitlines()]
            for name, path in dirty.items()}
    for name in rows:
        counts = Counter(label for label, _ in rows[name])
        assert found["classes"][name] == [counts[label] for label in found["classes"]["names"]]
    inside = Counter("".join(c for c in text.lower() if c.isalnum()) or text for _, text in rows["train"])
    assert found["copies"]["train"]["near"] == sum(inside.values()) - len(inside)
    assert {k: found["leak"]["dev"][k] for k in ("exact", "near", "same_label")} == {
        "exact": 1, "near": 4, "same_label": 3}
    assert found["leak"]["dev"]["lines"] == [31, 32, 33, 34]
    assert [one["text"] for one in found["contradictions"]["examples"]] == ["It is so.", "who knows where"]
    assert found["contradictions"]["lines"] == 6
    assert found["short"]["train"] == {"no_word": 1, "one_word": 1, "lines": [67, 66]}
    encode = Tokenizer(tokenizer_model=tiny_model).encode
    lengths = {name: [len(encode(text, False, False)) for _, text in rows[name]] for name in rows}
    assert found["lengths"]["cut"] == {"9": {name: sum(n > 9 for n in lengths[name]) for name in rows}}
    assert found["lengths"]["dev"]["longest"] == max(lengths["dev"])
    for said in ("classes :: 3, of 68 train, 34 dev sentences", "with the label that train has for it",
                 "contradictions :: 2 sentences", "dirty-train.txt:67", "--max_sentence_len 9 cuts"):
        assert said in out
    assert len(out.splitlines()) < 60, "about one screen"


def test_the_hardest_are_those_of_scikit_learn(dirty, tiny_model, capsys, tmp_path):
    out, found = inspect(capsys, tmp_path, "--train", dirty["train"], "--dev", dirty["dev"], "--tokenizer", tiny_model,
                         "--output_dir", tmp_path)
    (y, x), (dev_y, dev_x) = (([int(line[0]) for line in lines], [line[6:] for line in lines]) for lines in (
        path.read_text("utf-8").splitlines() for path in dirty.values()))
    words = TfidfVectorizer(ngram_range=(1, 2))
    model = LogisticRegression(max_iter=200).fit(words.fit_transform(x), y)
    p = model.predict_proba(words.transform(dev_x))
    hard = np.argsort(p[np.arange(len(dev_y)), dev_y], kind="stable")
    hard = [i for i in hard if p[i].argmax() != dev_y[i]]
    examples = found["hardest"]["examples"]
    assert hard and [one["line"] for one in examples] == [int(i) + 1 for i in hard]
    assert examples[0]["probability"] == pytest.approx(p[hard[0], dev_y[hard[0]]])
    assert found["hardest"]["tfidf"] == pytest.approx((p.argmax(1) == dev_y).mean())
    assert found["hardest"]["tfidf_without_leak"] == pytest.approx((p.argmax(1) == dev_y)[:30].mean())


def test_without_a_dev_file_that_of_finetune_is_held_out(inputs, tmp_path, capsys):
    words = inputs[:inputs.index("--dev")]
    out, found = inspect(capsys, tmp_path, *words, "--output_dir", tmp_path)
    assert run_llama.main(["--option", "finetune", *words, "--epochs", "1", "--output_dir", str(tmp_path / "run"),
                           "--device", "cpu"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("dev ::"))
    assert line in out.splitlines()
    held = [json.loads(line) for line in (tmp_path / "run/dev-split.jsonl").read_text("utf-8").splitlines()]
    assert sum(found["classes"]["dev"]) == len(held) > 0


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_every_format_that_finetune_reads(kind, tmp_path, tiny_model, capsys):
    rows, path = [(f"class {label}", text) for label, text in tiny_sentences(60, 0)], tmp_path / f"reviews.{kind}"
    with open(path, "w", encoding="utf-8", newline="") as file:
        if kind == "csv":
            csv.writer(file).writerows([("stars", "said"), *rows])
        else:
            file.writelines(json.dumps({"stars": label, "said": text}) + "\n" for label, text in rows)
    _, found = inspect(capsys, tmp_path, "--train", path, "--text_column", "said", "--label_column", "stars",
                       "--tokenizer", tiny_model, "--output_dir", tmp_path)
    assert found["classes"]["names"] == ["class 0", "class 1", "class 2"]
    assert sum(found["classes"]["train"] + found["classes"]["dev"]) == 60


def test_without_a_tokenizer_words_are_counted_and_nothing_is_fetched(dirty, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_inputs, "ROOT", tmp_path)
    monkeypatch.setattr(run_inputs.prepare, "weights_path", lambda name: tmp_path / "models" / f"{name}.gguf")
    monkeypatch.setattr(run_inputs.prepare, "fetch", lambda name: pytest.fail("it fetches"))
    out, found = inspect(capsys, tmp_path, "--train", dirty["train"], "--dev", dirty["dev"], "--output_dir", tmp_path)
    assert found["lengths"]["unit"] == "word" and "lengths :: in words: there is no tokenizer" in out
    words = [len(line[6:].split()) for line in dirty["train"].read_text("utf-8").splitlines()]
    assert found["lengths"]["train"]["longest"] == max(words)


def test_sixty_classes_and_text_without_spaces(tmp_path, tiny_model, capsys):
    rows = [(i % 60, f"第{i}部电影很好看" if i % 2 else HOSTILE.replace("1", str(i))) for i in range(600)]
    out, found = inspect(capsys, tmp_path, "--train", write_split(tmp_path / "x.txt", rows), "--tokenizer", tiny_model,
                         "--output_dir", tmp_path)
    assert len(found["classes"]["names"]) == 60 and "and 48 more: inspect.md" in out
    page = (tmp_path / "inspect.md").read_text("utf-8")
    assert "\x1b" not in out + page
    lines = [line for line in page.splitlines() if line]
    assert all(line.startswith(("    ", "# ", "## ")) for line in lines), "a sentence is code, and nothing else"


# --------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    subprocess.run([sys.executable, str(ROOT / "run_llama.py"), "--option", "finetune", *inputs, "--lr", "1e-3",
                    "--epochs", "1", "--batch_size", "16", "--device", "cpu", "--dtype", "float32", "--head_bias",
                    "--output_dir", str(folder)], capture_output=True, text=True, check=True)
    return folder


def dev_of(folder: Path) -> tuple[list[str], list[int]]:
    path = json.loads((folder / "args.json").read_text("utf-8"))["files"]["dev"]["path"]
    rows = [line.split(" ||| ") for line in Path(path).read_text("utf-8").splitlines()]
    return [text for _, text in rows], [int(label) for label, _ in rows]


def test_what_is_said_of_a_run_is_what_it_predicts(finished, capsys):
    out, found = inspect(capsys, finished, "--run", finished)
    result = json.loads((finished / "result.json").read_text("utf-8"))
    for name in ("dev", "test"):
        assert found["accuracy"][name] == {"n": result[name]["n"], "accuracy": pytest.approx(result[name]["acc"])}
        groups = found["by length"][name]
        assert sum(g["n"] * g["accuracy"] for g in groups) / result[name]["n"] == pytest.approx(result[name]["acc"])
    texts, labels = dev_of(finished)
    p = minllama.load(finished).predict_proba(texts)
    wrong = [i for i in np.argsort(-p.max(1), kind="stable") if p[i].argmax() != labels[i]]
    assert wrong and [one["text"] for one in found["surest mistakes"]["examples"]] == [texts[i] for i in wrong]
    assert found["surest mistakes"]["examples"][0]["probability"] == pytest.approx(p[wrong[0]].max(), abs=1e-5)
    matrix = np.array(result["dev"]["confusion_matrix"])
    for label, name in enumerate(minllama.load(finished).classes_):
        assert found["by class"][name] == {"n": matrix[label].sum(), "accuracy": pytest.approx(
            matrix[label, label] / matrix[label].sum())}
    both = matrix + matrix.T - 2 * np.diag(np.diag(matrix))
    assert found["confused most"]["mistakes"] == both.max() and found["confused most"]["of"] == len(wrong)
    confidence, right = p.max(1), p.argmax(1) == np.array(labels)
    inside = [(confidence > i / 10) & (confidence <= (i + 1) / 10) for i in range(10)]
    assert found["calibration"]["ece"] == pytest.approx(sum(
        one.mean() * abs(confidence[one].mean() - right[one].mean()) for one in inside if one.any()), abs=1e-5)
    assert found["calibration"]["temperature"] > 0 and "measured on halves of dev" in out
    assert [one["text"] for one in found["words"]["examples"]] == [texts[i] for i in wrong[:5]]
    assert 30 < len(out.splitlines()) < 90, "about two screens"


def test_the_words_of_the_sentences_that_were_typed(finished, tmp_path, capsys):
    mine = tmp_path / "mine.txt"
    mine.write_text("the film is very good\n很好看\ngood\n", encoding="utf-8")
    out, found = inspect(capsys, tmp_path, "--run", finished, "--input", mine, "--output_dir", tmp_path)
    examples = found["words"]["examples"]
    assert [[word["word"] for word in one["words"]] for one in examples] == [
        "the film is very good".split(), ["很", "好", "看"], ["good"]]
    p = np.log(minllama.load(finished).predict_proba(["the film is very good", "the film is very"]).astype(float))
    first, second = np.argsort(-p[0])[:2]
    lost = (p[0, first] - p[0, second]) - (p[1, first] - p[1, second])
    assert examples[0]["words"][-1]["deletion"] == pytest.approx(lost, abs=1e-4)
    assert examples[0]["margin"] == pytest.approx(p[0, first] - p[0, second], abs=1e-4)
    assert examples[2]["rank_correlation"] is None and "words :: of --input" in out


def test_the_columns_of_the_input_are_those_that_were_typed_else_the_runs_own(finished, inputs, tmp_path, capsys):
    """As predict takes them."""
    (tmp_path / "mine.csv").write_text("title,remark\nthe film,a word\ngood,another word\n", encoding="utf-8")

    def words_of(run: Path, *more) -> list[str]:
        _, found = inspect(capsys, tmp_path, "--run", run, "--input", tmp_path / "mine.csv", *more, "--output_dir",
                           tmp_path)
        return [one["text"] for one in found["words"]["examples"]]

    assert words_of(finished, "--text_column", "title") == ["the film", "good"]
    assert words_of(finished, "--text_column", "remark") == ["a word", "another word"]
    train = tmp_path / "train.csv"
    with open(train, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("title", "remark", "label"), *((text, f"no {i}", label) for i, (label, text) in
                                                                    enumerate(tiny_sentences(40, 3)))])
    assert run_llama.main(["--option", "finetune", *inputs[:2], "--train", str(train), "--text_column", "title",
                           "--epochs", "1", "--device", "cpu", "--output_dir", str(tmp_path / "own")]) == 0
    capsys.readouterr()
    assert words_of(tmp_path / "own") == ["the film", "good"]


def test_dtype_is_what_it_computes_in(finished, tmp_path, capsys):
    calibrations = [inspect(capsys, tmp_path, "--run", finished, "--output_dir", tmp_path, *more)[1]["calibration"]
                    for more in ((), ("--dtype", "float32"), ("--dtype", "bfloat16"))]
    assert calibrations[0] == calibrations[1] != calibrations[2], "float32, unless it is typed"


def test_other_files_and_one_file_alone(finished, tmp_path, capsys):
    other = write_split(tmp_path / "other.txt", tiny_sentences(12, 5))
    out, found = inspect(capsys, tmp_path, "--run", finished, "--test", other, "--output_dir", tmp_path)
    assert found["accuracy"]["test"]["n"] == 12 and "dev" not in found["accuracy"]
    assert "too few for a temperature" in out


def test_a_best_alone_needs_a_file(finished, tmp_path, capsys):
    best = tmp_path / "copy"
    best.mkdir()
    for path in (finished / "best").iterdir():
        (best / path.name).write_bytes(path.read_bytes())
    assert "which dev file the run used is not known" in refusal(capsys, "--run", best)
    _, found = inspect(capsys, best, "--run", best, "--dev", write_split(tmp_path / "d.txt", tiny_sentences(30, 5)))
    assert found["accuracy"]["dev"]["n"] == 30


def test_an_ordinal_run(inputs, tmp_path, capsys):
    assert run_llama.main(["--option", "finetune", *inputs, "--loss", "ordinal", "--epochs", "1", "--device", "cpu",
                           "--output_dir", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    out, found = inspect(capsys, tmp_path / "run", "--run", tmp_path / "run")
    assert found["words"]["examples"] and found["calibration"]["temperature"] > 0


def test_the_card_in_the_report_has_it_while_it_is_about_these_weights(finished, tmp_path, capsys):
    inspect(capsys, finished, "--run", finished)
    values = json.loads((finished / "inspect.json").read_text("utf-8"))

    def card() -> str:
        assert run_llama.main(["--option", "report", "--run", str(finished), "--output_dir", str(tmp_path)]) == 0
        return (tmp_path / "report.html").read_text("utf-8")

    page = card()
    assert "taken for" in page and "the margin that is lost without a word" in page
    values["card"][0][1] = HOSTILE
    (finished / "inspect.json").write_text(json.dumps(values), encoding="utf-8")
    assert "<script>" not in card() and "alert(1)" in card()
    for change, said in (({"best": "0"}, "it is about other weights"), ({"card": [1, ["a"], {}]}, None)):
        (finished / "inspect.json").write_text(json.dumps({**values, **change}), encoding="utf-8")
        assert "taken for" not in card() and (said is None or said in card())
    (finished / "inspect.json").write_text("{", encoding="utf-8")
    assert "it cannot be read" in card()


def test_a_run_that_is_replaced_takes_its_inspection_with_it(inputs, tmp_path, capsys):
    words = ["--option", "finetune", *inputs, "--epochs", "1", "--device", "cpu", "--output_dir", str(tmp_path / "run")]
    assert run_llama.main(words) == 0
    capsys.readouterr()
    inspect(capsys, tmp_path / "run", "--run", tmp_path / "run")
    assert run_llama.main([*words, "--overwrite"]) == 0
    assert not (tmp_path / "run/inspect.json").exists() and not (tmp_path / "run/inspect.md").exists()


def test_the_card_is_about_the_runs_own_sentences(finished, tmp_path, capsys):
    other = write_split(tmp_path / "other.txt", tiny_sentences(30, 5))
    for words, has_card in (([], True), (["--dev", other], False), (["--test", other], False)):
        _, found = inspect(capsys, finished, "--run", finished, *words)
        assert bool(found["card"]) == has_card, words


def test_no_temperature_is_fitted_on_sentences_that_were_learned(finished, inputs, tmp_path, capsys):
    train = inputs[inputs.index("--train") + 1]
    out, found = inspect(capsys, tmp_path, "--run", finished, "--dev", train, "--output_dir", tmp_path)
    assert "temperature" not in found["calibration"] and "the run was trained on these sentences" in out


def test_a_fold_is_looked_at_on_sentences_that_it_has_not_seen(inputs, tmp_path, capsys):
    """Most of its dev file it was trained on: test alone is looked at, and without a test file one must be named."""
    words = [str(word) for word in inputs]
    dev, at = words[words.index("--dev") + 1], words.index("--test")
    for name, own in (("with", words), ("without", words[:at] + words[at + 2:])):
        assert run_llama.main(["--option", "finetune", *own, "--epochs", "1", "--device", "cpu", "--folds", "2",
                               "--dtype", "float32", "--output_dir", str(tmp_path / name)]) == 0
    capsys.readouterr()
    fold = tmp_path / "with" / "fold-0"
    assert run_llama.main(["--option", "inspect", "--run", str(fold)]) == 0
    said = capsys.readouterr()
    found = json.loads((fold / "inspect.json").read_text("utf-8"))
    assert list(found["accuracy"]) == ["test"] and "dev is not looked at" in said.err
    assert found["accuracy"]["test"]["accuracy"] == pytest.approx(
        json.loads((fold / "result.json").read_text("utf-8"))["test"]["acc"])
    assert all(text.startswith("test: ") for _, text in found["card"])
    assert "name sentences that it has not seen" in refusal(capsys, "--run", tmp_path / "without" / "fold-0")
    _, found = inspect(capsys, tmp_path, "--run", fold, "--dev", dev, "--output_dir", tmp_path)
    assert "temperature" not in found["calibration"], "a part of it was learned"


def looked_at(log_probs: np.ndarray, labels: np.ndarray) -> inspect_run.Looked:
    split = Split(Path("dev.txt"), ["a"] * len(labels), [np.array([1])] * len(labels), labels, 0)
    return inspect_run.Looked("dev", split, log_probs, np.exp(log_probs), log_probs.argmax(1))


def test_a_temperature_that_helps_nothing_is_not_recommended():
    """Probabilities that are true, and such that are far too sure."""
    for seed in range(20):
        random = np.random.default_rng(seed)
        p = random.uniform(.5, 1, 200)
        labels = (random.random(200) > p).astype(int)
        section = inspect_run.on_calibration([looked_at(np.log(np.stack([p, 1 - p + 1e-9], 1)), labels)])
        values = section.values
        is_needed = values["ece"] > values["ece_by_chance"] and values["ece_after"] < values["ece"]
        assert values["temperature_helps"] == is_needed
        assert ("no temperature is needed" in section.summary) != is_needed == ("divide" in " ".join(section.lines))
        assert ("with temperature" in section.summary) == is_needed
    p = random.uniform(.95, 1, 400)
    labels = (random.random(400) > .6).astype(int)
    section = inspect_run.on_calibration([looked_at(np.log(np.stack([p, 1 - p + 1e-9], 1)), labels)])
    assert section.values["temperature_helps"] and "with temperature" in section.summary


# --------------------------------------------------------------------------- bad input


def test_bad_input_is_one_clear_message(dirty, finished, tmp_path, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("good\n\nbad\n", encoding="utf-8")
    half = tmp_path / "half.txt"
    half.write_text("0 ||| a film\n1 ||| \n", encoding="utf-8")
    for words, said in (([], "needs data to look at"), (["--dev", dirty["dev"]], "needs data to look at"),
                        (["--train", tmp_path / "gone.txt"], "there is no such file"),
                        (["--train", half], "half.txt:2: the sentence is empty"),
                        (["--run", tmp_path / "gone"], "no saved classifier"),
                        (["--run", finished, finished], "uses one --run"),
                        (["--run", finished, "--input", empty], "empty.txt:2: the sentence is empty"),
                        (["--run", finished, "--input", "-"], "inspect reads a file"),
                        (["--run", finished, "--input", tmp_path / "gone.txt"], "there is no such file")):
        err = refusal(capsys, *words)
        assert said in err and "Traceback" not in err and err.count("error:") == 1, (words, err)


def test_the_standard_librarys_inspect_is_not_hidden():
    code = "import commands.inspect, inspect; assert inspect.signature and inspect is not commands.inspect"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
