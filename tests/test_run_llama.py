"""The program from end to end, on a tiny model and tiny data."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, tiny_sentences

import run_llama

EPOCH_LINE = (r"epoch (\d+): train loss :: \d+\.\d{3}, train acc :: \d\.\d{3}, dev acc :: \d\.\d{3}, "
              r"lr :: \d\.\d\de-\d\d")


@pytest.fixture
def arguments(tiny_model, tiny_data, tmp_path, monkeypatch):
    """The command line of a tiny run, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return ["--pretrained-model-path", str(tiny_model), "--batch_size", "16", "--lr", "3e-3", "--epochs", "3",
            "--train", str(tiny_data["train"]), "--dev", str(tiny_data["dev"]), "--test", str(tiny_data["test"])]


def finetune(arguments, *more):
    assert run_llama.main(["--option", "finetune", *arguments, *more]) == 0


def read_lines(path):
    return Path(path).read_text(encoding="utf-8").splitlines()


def test_finetune_leaves_a_run_that_evaluate_and_predict_use(arguments, tiny_data, capsys):
    finetune(arguments, "--output_dir", "run", "--dev_out", "out/dev.txt", "--epochs", "8", "--lr", "1e-2")
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert [int(m[1]) for m in re.finditer(f"^{EPOCH_LINE}$", out, re.M)] == list(range(8))
    assert re.fullmatch(r"baseline :: majority \d\.\d{3}, tf-idf \+ logistic regression \d\.\d{3}", lines[-3])
    assert lines[-2].startswith("dev acc :: ") and lines[-1].startswith("test acc :: ")

    run = Path("run")
    assert {p.name for p in run.iterdir()} == {
        ".lock", "args.json", "steps.jsonl", "epochs.jsonl", "events.jsonl", "result.json", "best", "last",
        "test-predictions.txt"}
    assert {p.name for p in (run / "best").iterdir()} == {
        "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"}
    args = json.loads((run / "args.json").read_text(encoding="utf-8"))
    assert args["options"]["lr"] == 1e-2 and set(args["files"]) == {
        "train", "dev", "test", "label_names", "weights", "tokenizer"}

    # The printed accuracy is that of the best epoch, and that of the predictions, line by line with the input.
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    epochs = [json.loads(line) for line in read_lines(run / "epochs.jsonl")]
    best = max(epochs, key=lambda e: (e["dev_acc"], -e["dev_loss"]))
    assert result["best_epoch"] == best["epoch"] and result["dev"]["acc"] == pytest.approx(best["dev_acc"])
    truth, predicted = read_lines(tiny_data["dev"]), read_lines("out/dev.txt")
    assert [t.partition(" ||| ")[2] for t in truth] == [p.partition(" ||| ")[2] for p in predicted]
    hits = sum(t[0] == p[0] for t, p in zip(truth, predicted, strict=True))
    assert result["dev"]["acc"] == pytest.approx(hits / len(truth))
    assert sum(map(sum, result["dev"]["confusion_matrix"])) == len(truth)
    assert result["dev"]["acc"] > 0.8, "the words give the class away: a model that learns gets them"

    assert run_llama.main(["--option", "evaluate", "--run", "run"]) == 0
    again = capsys.readouterr().out.splitlines()
    assert again[-3:] == lines[-3:]

    Path("in.txt").write_text("\n".join(t.partition(" ||| ")[2] for t in truth) + "\n", encoding="utf-8")
    assert run_llama.main(["--option", "predict", "--run", "run", "--input", "in.txt"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == [p[0] for p in predicted]
    assert [row[1] for row in rows] == [["bad", "fine", "good"][int(row[0])] for row in rows]
    assert all(abs(sum(map(float, row[2].split())) - 1) < 1e-5 for row in rows)


def test_two_runs_with_one_seed_are_the_same(arguments):
    finetune(arguments, "--output_dir", "a", "--dropout", "0.1")
    finetune(arguments, "--output_dir", "b", "--dropout", "0.1")
    finetune(arguments, "--output_dir", "c", "--dropout", "0.1", "--seed", "7")

    def steps(run):
        lines = map(json.loads, read_lines(f"{run}/steps.jsonl"))
        return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]

    assert steps("a") == steps("b") != steps("c")


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("pooling", ["mean", "max", "first"])
def test_every_pooling_and_attention_survives_saving(arguments, pooling, attention, capsys):
    finetune(arguments, "--epochs", "1", "--pooling", pooling, "--attention", attention, "--n_layers", "1")
    trained = capsys.readouterr().out.splitlines()[-2:]
    assert run_llama.main(["--option", "evaluate", "--run", "runs/finetune-1-0.003"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == trained


def test_train_limit_and_full_train_eval(arguments, capsys):
    finetune(arguments, "--train_limit", "20", "--train_eval", "full", "--epochs", "1")
    steps = read_lines("runs/finetune-1-0.003/steps.jsonl")
    assert len(steps) == 2


def test_without_a_test_file_only_dev_is_reported(arguments, capsys):
    at = arguments.index("--test")
    finetune(arguments[:at] + arguments[at + 2:], "--epochs", "1")
    streams = capsys.readouterr()
    assert streams.out.splitlines()[-1].startswith("dev acc ::") and "no test file" in streams.err


def test_without_label_names_the_numbers_are_the_names(arguments, tiny_data, capsys):
    tiny_data["label_names"].unlink()
    finetune(arguments, "--epochs", "1", "--output_dir", "run")
    result = json.loads(Path("run/result.json").read_text(encoding="utf-8"))
    assert result["label_names"] == ["0", "1", "2"]


def test_generate_writes_two_files_and_greedy_is_the_same_each_time(arguments, capsys):
    texts = []
    command = ["--option", "generate", *arguments, "--prefix", "the film is", "--max_new_tokens", "9"]
    for _ in range(2):
        assert run_llama.main(command) == 0
        texts.append([Path(f"generated-sentence-temp-{t}.txt").read_text(encoding="utf-8") for t in (0, 1)])
    assert texts[0] == texts[1]
    assert all(text.startswith("the film is") for text in texts[0])


def test_prompt_does_not_depend_on_the_batch(arguments, monkeypatch, capsys):
    import trainer

    for budget in (4096, 1):
        monkeypatch.setattr(trainer, "length_order", lambda lengths, budget=budget, f=trainer.length_order: f(
            lengths, budget))
        assert run_llama.main(["--option", "prompt", *arguments, "--dev_out", f"dev-{budget}.txt"]) == 0
        monkeypatch.undo()
        monkeypatch.chdir(Path(arguments[-1]).parent)
    assert read_lines("dev-4096.txt") == read_lines("dev-1.txt")
    assert Path("toy-test-prompting-output.txt").exists()


# --------------------------------------------------------------------------- bad input


def refused(capsys, *argv):
    """The message of a refused command line: one exit code, no traceback, nothing on stdout but what was loaded."""
    assert run_llama.main(list(argv)) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("run_llama.py: error: ") or "run_llama.py: error: " in err
    return err


def test_bad_files_are_refused_before_a_run_folder_is_made(arguments, tiny_data, capsys):
    def replaced(option, path):
        at = arguments.index(option)
        return ["--option", "finetune", *arguments[: at + 1], str(path), *arguments[at + 2:]]

    bad = Path("bad.txt")
    for content, words in ((b"no label here\n", "bad.txt:1"), (b"7 ||| a\n", "out of range"), (b"", "no sentence"),
                           (b"0 ||| \xff\xfe\n", "UTF-8"), (b"x ||| a\n", "no integer")):
        bad.write_bytes(content)
        assert words in refused(capsys, *replaced("--dev", bad))
    assert "no such file" in refused(capsys, *replaced("--train", "nowhere.txt"))
    assert "prepare.py stories42M" in refused(capsys, *replaced("--pretrained-model-path", "stories42M.pt"))
    assert "has 2 layers" in refused(capsys, "--option", "finetune", *arguments, "--n_layers", "3")
    assert "--dev is missing" in refused(capsys, "--option", "finetune", *arguments[:10])
    (Path("sst-train.txt")).write_text("0 ||| a\n1 ||| b\n", encoding="utf-8")
    assert "not in sst-train.txt" in refused(capsys, *replaced("--train", "sst-train.txt"))
    assert not Path("runs").exists()


def test_a_run_folder_that_holds_a_run_is_refused(arguments, capsys):
    finetune(arguments, "--epochs", "1", "--output_dir", "run")
    before = Path("run/steps.jsonl").read_text(encoding="utf-8")
    assert "--overwrite" in refused(capsys, "--option", "finetune", *arguments, "--output_dir", "run")
    assert Path("run/steps.jsonl").read_text(encoding="utf-8") == before
    finetune(arguments, "--epochs", "1", "--output_dir", "run", "--overwrite")


def test_evaluate_and_predict_say_what_they_need(arguments, capsys):
    assert "--run" in refused(capsys, "--option", "evaluate")
    assert "no saved classifier" in refused(capsys, "--option", "evaluate", "--run", "nowhere")
    assert "--input" in refused(capsys, "--option", "predict", "--run", "x")


def test_an_output_file_that_cannot_be_written_is_refused_first(arguments, capsys):
    Path("folder").mkdir()
    assert "it is a folder" in refused(capsys, "--option", "finetune", *arguments, "--dev_out", "folder")


def test_an_error_inside_a_library_keeps_its_traceback(arguments, monkeypatch):
    monkeypatch.setitem(run_llama.OPTIONS, "generate", lambda config: int("x"))
    # The call is made by the test, which is no room of ours.
    with pytest.raises(ValueError, match="invalid literal"):
        run_llama.main([])


def test_predict_reads_stdin_and_keeps_stdout_clean(arguments):
    """As a process: a blank line in the middle keeps its place, and a closed stdout is no error."""
    finetune(arguments, "--epochs", "1", "--output_dir", "run")
    sentences = [s for _, s in tiny_sentences(4, 9)]
    sentences[2] = ""
    command = [sys.executable, str(ROOT / "run_llama.py"), "--option", "predict", "--run", "run", "--input", "-"]
    done = subprocess.run(command, input="\n".join(sentences).encode(), capture_output=True, timeout=120)
    assert done.returncode == 0 and len(done.stdout.decode().splitlines()) == 4
    empty = subprocess.run(command, input=b"", capture_output=True, timeout=120)
    assert empty.returncode == 2 and b"Traceback" not in empty.stderr and empty.stdout == b""
