"""The program from end to end, on a tiny model and tiny data."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, tiny_sentences

import dataset
import fused
import optimizer
import run_llama
from commands import generate, prompt
from commands import inputs as inputs_room
from commands import job as jobs
from config import COMMANDS, RunConfig, no_effect, options, parse_args
from config.parser import which_command
from schedule import SCHEDULERS, make_schedule, warmup_steps
from training import device, metrics

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


def of_splits(out):
    """The lines of the splits' scores that a run's end and evaluate have in common, in their order."""
    names = "(dev|test) (acc|baselines|vs tf-idf|mae|predictions) :: "
    return [line for line in out.splitlines() if re.match(names, line)]


def read_lines(path):
    return Path(path).read_text(encoding="utf-8").splitlines()


def test_finetune_leaves_a_run_that_evaluate_and_predict_use(arguments, tiny_data, capsys):
    finetune(arguments, "--output_dir", "run", "--dev_out", "out/dev.txt", "--epochs", "8", "--lr", "1e-2")
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert [int(m[1]) for m in re.finditer(f"^{EPOCH_LINE}$", out, re.M)] == list(range(8))
    said = r"majority \d\.\d{3}, tf-idf \+ logistic regression \d\.\d{3}"
    versus = r"vs tf-idf :: [+-]\d\.\d{3}, (more than|within) chance \(right where it is wrong \d+, .*\)"
    for line, form in zip(lines[-10:], (
            f"baseline :: {said}", r"best :: epoch \d, counted from 0, of 8 \(chosen by dev_acc\), stopped: finished",
            r"dev acc :: \d\.\d{3}", f"dev baselines :: {said}", f"dev {versus}",
            f"dev predictions :: {re.escape(str(Path('out/dev.txt')))}",
            r"test acc :: \d\.\d{3}", f"test baselines :: {said}", f"test {versus}",
            f"test predictions :: {re.escape(str(Path('run/test-predictions.txt')))}"), strict=True):
        assert re.fullmatch(form, line), line

    run = Path("run")
    assert {p.name for p in run.iterdir()} == {
        ".lock", "args.json", "steps.jsonl", "epochs.jsonl", "events.jsonl", "result.json", "best",
        "test-predictions.txt", "curves.png", "confusion.png"}
    assert {p.name for p in (run / "best").iterdir()} == {
        "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "manifest.json"}
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
    again = capsys.readouterr().out
    assert of_splits(again) == [line.replace(str(Path("out/dev.txt")), str(Path("run/dev-predictions.txt")))
                                for line in of_splits(out)]

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
    trained = of_splits(capsys.readouterr().out)
    assert run_llama.main(["--option", "evaluate", "--run", "runs/finetune-1-0.003"]) == 0
    assert of_splits(capsys.readouterr().out) == trained and len(trained) == 8


def test_train_limit_and_full_train_eval(arguments, capsys):
    finetune(arguments, "--train_limit", "20", "--train_eval", "full", "--epochs", "1")
    steps = read_lines("runs/finetune-1-0.003/steps.jsonl")
    assert len(steps) == 2


def test_a_class_that_train_limit_leaves_out_is_named(arguments, capsys):
    finetune(arguments, "--train_limit", "2", "--epochs", "1", "--output_dir", "two")
    err = capsys.readouterr().err
    assert re.search(r"--train_limit 2 with seed 1337 leaves no training sentence of: (bad|fine|good)", err)


def test_without_a_test_file_only_dev_is_reported(arguments, capsys):
    at = arguments.index("--test")
    finetune(arguments[:at] + arguments[at + 2:], "--epochs", "1")
    streams = capsys.readouterr()
    assert of_splits(streams.out)[0].startswith("dev acc ::") and "\ntest " not in streams.out
    assert "no test file" in streams.err


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
    for budget in (4096, 1):
        monkeypatch.setattr(metrics, "length_order", lambda lengths, max_rows, budget=budget, f=dataset.length_order: f(
            lengths, budget, max_rows))
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
                           (b"0 ||| \xff\xfe\n", "UTF-8"), (b"x ||| a\n", "not an integer")):
        bad.write_bytes(content)
        assert words in refused(capsys, *replaced("--dev", bad))
    assert "no such file" in refused(capsys, *replaced("--train", "nowhere.txt"))
    assert "prepare.py stories42M" in refused(capsys, *replaced("--pretrained-model-path", "stories42M.pt"))
    assert "has 2 layers" in refused(capsys, "--option", "finetune", *arguments, "--n_layers", "3")
    assert "--train is missing" in refused(capsys, "--option", "finetune", *arguments[:8], *arguments[10:])
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


def with_file(arguments, option, path, content=None):
    """The arguments with another file, which has this content."""
    if content is not None:
        Path(path).write_text(content, encoding="utf-8")
    at = arguments.index(option)
    return [*arguments[: at + 1], str(path), *arguments[at + 2:]]


@pytest.mark.parametrize("has_names", [True, False])
def test_a_label_without_training_sentences_is_refused_in_every_split_before_the_training(arguments, tiny_data, capsys,
                                                                                          has_names):
    """With a name too: what no sentence teaches cannot be learned. A name that nobody uses is harmless."""
    tiny_data["label_names"].unlink()
    if has_names:
        Path("toy-label-mapping.json").write_text('["bad", "fine", "good", "new"]', encoding="utf-8")
    for split in ("dev", "test"):
        file = with_file(arguments, f"--{split}", f"toy-{split}-more.txt", "0 ||| bad\n\n3 ||| new\n1 ||| plain\n")
        for option in ("finetune", "lr_find"):
            err = refused(capsys, "--option", option, *file)
            assert f"toy-{split}-more.txt:3: the label 3 is not in {tiny_data['train']}" in err
    assert not Path("runs").exists()
    finetune(arguments, "--epochs", "1", "--output_dir", "run")
    result = result_of("run")
    assert result["label_names"] == (["bad", "fine", "good", "new"] if has_names else ["0", "1", "2"])
    one_class = with_file(arguments, "--test", "ones.txt", "1 ||| plain\n1 ||| fine\n")
    finetune(one_class, "--epochs", "1", "--output_dir", "ones")

    more = Path("more.txt")
    more.write_text("0 ||| bad\n4 ||| new\n", encoding="utf-8")
    for run in ("run", "run/best"):
        err = refused(capsys, "--option", "evaluate", "--run", run, "--test", str(more))
        assert f"more.txt:2: the label 4 is out of range; labels are 0 to {3 if has_names else 2}" in err
        assert f"{Path('run/best/config.json')}" in err
    err = refused(capsys, "--option", "prompt", *with_file(arguments, "--test", more))
    assert "more.txt:2: the label 4 is out of range" in err
    # Of three classes, one of which dev does not have: prompting learns nothing, and answers.
    some = with_file(arguments, "--dev", "some.txt", "0 ||| bad\n2 ||| good\n")
    assert run_llama.main(["--option", "prompt", *some]) == 0


def test_evaluate_names_runs_near_the_one_that_is_not_there(arguments, capsys):
    finetune(arguments, "--epochs", "1", "--lr", "1e-4")
    run = Path("runs/finetune-1-0.0001")
    for typed in ("runs/finetune-1-1e-4", "runs/finetune-1-1e-04", "finetune-1-0.0001", "runs/fintune-1-1E-4",
                  "runs/finetune-1-0.0001-2"):
        for command in (["--option", "evaluate", "--run", typed], ["--resume", typed]):
            assert f"did you mean {run}?" in refused(capsys, *command), command
    for typed in ("nowhere", "runs/x", "elsewhere/y"):
        for command in (["--option", "evaluate", "--run", typed], ["--resume", typed]):
            assert "did you mean" not in refused(capsys, *command), command
    assert f"name one of them: --run {run}" in refused(capsys, "--option", "evaluate", "--run", "runs")


def test_each_split_stands_beside_its_own_baselines(arguments, tiny_data, capsys):
    """The old line is about test; those of the splits are scikit-learn's on that split, in --option evaluate too."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    def read(path):
        rows = [line.split(" ||| ") for line in read_lines(path)]
        return [s for _, s in rows], [int(label) for label, _ in rows]

    train = [*tiny_sentences(40, 8), (2, "a film"), (0, "good"), (1, "awful and long")]  # it does not know all
    arguments = with_file(arguments, "--train", "few-train.txt", "".join(f"{label} ||| {s}\n" for label, s in train))
    dev = tiny_sentences(30, 1)[:20] + [(2, "the film is bad")] * 9
    arguments = with_file(arguments, "--dev", "few-dev.txt", "".join(f"{label} ||| {s}\n" for label, s in dev))
    finetune(arguments, "--epochs", "1", "--output_dir", "run", "--ordinal")
    sentences, labels = read("few-train.txt")
    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(max_iter=200)).fit(sentences, labels)
    most = max(set(labels), key=labels.count)
    said = {}
    for name, path in (("dev", "few-dev.txt"), ("test", tiny_data["test"])):
        sentences, labels = read(path)
        majority = sum(label == most for label in labels) / len(labels)
        said[name] = f"majority {majority:.3f}, tf-idf + logistic regression {model.score(sentences, labels):.3f}"
    assert said["dev"] != said["test"]
    trained = capsys.readouterr().out.splitlines()
    assert run_llama.main(["--option", "evaluate", "--run", "run"]) == 0
    Path("run/result.json").unlink()  # a run that was stopped: the baselines are found anew
    again = capsys.readouterr().out.splitlines()
    assert run_llama.main(["--option", "evaluate", "--run", "run"]) == 0
    for out in (trained, again, capsys.readouterr().out.splitlines()):
        places = [out.index(f"baseline :: {said['test']}")]
        for name in ("dev", "test"):
            (at,) = (i for i, line in enumerate(out) if re.fullmatch(rf"{name} acc :: \d\.\d{{3}}", line))
            assert out[at + 1] == f"{name} baselines :: {said[name]}"
            places.append(at)
        assert places == sorted(places), "the old line is where it was"
        assert sum(line.startswith("baseline ::") for line in out) == 1
    finetune(arguments, "--epochs", "1", "--folds", "2", "--fold", "0", "--output_dir", "fold")
    fold = capsys.readouterr().out.splitlines()
    assert run_llama.main(["--option", "evaluate", "--run", "fold"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert f"dev baselines :: {said['dev']}" in out, "of the file, as the accuracy, not of the fold"
    tests = [line for line in out if line.startswith("test baselines ::")]
    assert tests == [line for line in fold if line.startswith("test baselines ::")] and len(tests) == 1
    assert tests[0] != f"test baselines :: {said['test']}", "of what the fold was trained on"


def test_predict_answers_each_line_a_blank_one_too(arguments, capsys):
    finetune(arguments, "--epochs", "1", "--output_dir", "run")
    sentences = [s for _, s in tiny_sentences(3, 9)]

    def answers(text):
        Path("in.txt").write_bytes(text.encode())
        capsys.readouterr()
        assert run_llama.main(["--option", "predict", "--run", "run", "--input", "in.txt"]) == 0
        return capsys.readouterr().out.splitlines()

    plain = answers("\n".join(sentences))
    assert len(plain) == 3
    for blank, end in (("", ""), ("  ", "\n"), ("\t", "\r\n")):
        found = answers("\n".join([blank, sentences[0], blank, blank, *sentences[1:], blank, "x"]) + end)
        assert len(found) == 8 and all(len(line.split("\t")) == 3 for line in found)
        assert [found[1], *found[4:6]] == plain


def test_messages_count_one_as_one(arguments, capsys):
    finetune(arguments, "--epochs", "1", "--n_layers", "1", "--output_dir", "run", "--max_sentence_len", "1")
    streams = capsys.readouterr()
    assert ", 1 layer, " in streams.out and "on cpu (1 thread), " in streams.out
    assert "96 of 96 sentences cut to 1 token (100%)\n" in streams.err
    Path("one.txt").write_text("0 ||| good film\n", encoding="utf-8")
    assert run_llama.main(["--option", "evaluate", "--run", "run", "--dev", "one.txt"]) == 0
    assert "1 of 1 sentence cut to 1 token (100%)\n" in capsys.readouterr().err
    Path("in.txt").write_text("good film\n", encoding="utf-8")
    assert run_llama.main(["--option", "predict", "--run", "run", "--input", "in.txt"]) == 0
    assert "1 sentence cut to 1 token\n" in capsys.readouterr().err


@pytest.mark.parametrize("line, words", [
    ("--lr 1e-5", "--lr belongs to --option finetune, lr_find, verify_resume or search: type one of them"),
    ("--max-new-tokens 3", "--max_new_tokens belongs to --option generate: type it"),
    ("--patience 3 --lr 1e-5", "--lr and --patience belong to --option finetune, verify_resume or search: type one of "
                               "them"),
    ("--plan --seeds 2 --lr 1", "--lr, --plan and --seeds belong to --option finetune: type it"),
    ("--lr 1e-3 --input x", "no --option uses --input and --lr together: type --option and the one that you want, see "
                            "--help"),
    ("finetune --lr 1", "unknown option finetune: did you mean --option finetune?"),
    ("--predict", "unknown option --predict: did you mean --option predict?"),
    ("--option finetun", "--option finetun: did you mean --option finetune?"),
    ("--option=evalute", "--option evalute: did you mean --option evaluate?"),
])
def test_a_command_is_never_guessed(arguments, line, words, capsys):
    with pytest.raises(SystemExit) as stop:
        run_llama.main(line.split())
    streams = capsys.readouterr()
    assert stop.value.code == 2 and streams.err == f"run_llama.py: error: {words}\n" and not streams.out


def test_without_any_word_there_is_the_short_help(monkeypatch, capsys):
    said = []
    for argv in ([], ["--help"], None):
        monkeypatch.setattr("sys.argv", ["run_llama.py"])
        with pytest.raises(SystemExit) as stop:
            run_llama.main(argv)
        assert stop.value.code == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2] and "--option COMMAND" in said[0]


def test_each_command_that_is_named_for_an_option_takes_it(capsys):
    """By the parser itself: what a message names uses the option, and what it does not name does not."""
    for f in options():
        if f.name in ("option", "resume"):
            continue
        (named,) = re.findall(rf"^--{f.name} belongs to --option (.*): type", which_command([f.name]))
        users = re.split(", | or ", named)
        assert users == [command for command in COMMANDS
                         if f"--{f.name}: it belongs to another --option" not in no_effect(
                             RunConfig(option=command, given=frozenset([f.name])))]


def test_an_output_file_that_cannot_be_written_is_refused_first(arguments, capsys):
    Path("folder").mkdir()
    assert "it is a folder" in refused(capsys, "--option", "finetune", *arguments, "--dev_out", "folder")


def test_an_error_inside_a_library_keeps_its_traceback(arguments, monkeypatch):
    monkeypatch.setattr(generate, "run", lambda config: int("x"))
    # The call is made by the test, which is no room of ours.
    with pytest.raises(ValueError, match="invalid literal"):
        run_llama.main(["--option", "generate"])


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


# --------------------------------------------------------------------------- the controls of a training


def steps_of(run):
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in read_lines(f"{run}/steps.jsonl")]


def rates_of(run):
    return [step["lr"] for step in steps_of(run)]


def result_of(run):
    return json.loads(Path(f"{run}/result.json").read_text(encoding="utf-8"))


SCHEDULES = {
    "constant": "", "linear": "--min_lr_ratio 0.1", "cosine": "--warmup_ratio 0.3", "linear_cosine": "",
    "cosine_restarts": "--cycles 2 --cycle_mult 2 --cycle_decay 0.5", "step": "--step_size 5",
    "multistep": "--milestones 3,7 --gamma 0.5", "exponential": "--gamma 0.9", "natural_exp": "--decay_rate 0.1",
    "inverse_time": "--decay_rate 0.1", "polynomial": "--power 2", "inverse_sqrt": "--warmup_steps 4",
    "cyclic": "--cycles 2 --cyclic_mode triangular2", "one_cycle": "--pct_start 0.4", "wsd": "--decay_fraction 0.5",
    "plateau": "--plateau_patience 0 --gamma 0.5",
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_schedule_is_what_a_run_follows(arguments, name, capsys):
    options = SCHEDULES[name].split()
    finetune(arguments, "--epochs", "2", "--scheduler", name, *options, "--output_dir", "run")
    config = parse_args(options)
    schedule = make_schedule(name, total_steps=12, steps_per_epoch=6, warmup_steps=warmup_steps(
        parse_args(["--epochs", "2", "--scheduler", name, *options]), 6),
        **{k: getattr(config, k) for k in config.given if not k.startswith("warmup")})
    dev = [json.loads(line)["dev_acc"] for line in read_lines("run/epochs.jsonl")]
    want = [3e-3 * schedule(i, dev[: i // 6]) for i in range(12)]
    assert rates_of("run") == pytest.approx(want, rel=1e-12)
    assert (len(set(want)) > 1 or name in ("constant", "plateau")) and "no effect" not in capsys.readouterr().err


@pytest.mark.parametrize("kind, factor", [("linear", 4.0), ("sqrt", 2.0)])
def test_the_rates_scale_with_the_effective_batch(arguments, kind, factor):
    finetune(arguments, "--epochs", "1", "--scheduler", "constant", "--lr_scaling", kind, "--base_batch_size", "8",
             "--grad_accum", "2", "--output_dir", "run")
    assert rates_of("run") == pytest.approx([factor * 3e-3] * 3)


def test_the_logged_rate_is_the_largest_and_layers_below_have_less(arguments):
    base = [*arguments, "--epochs", "1", "--scheduler", "constant"]
    finetune(base, "--output_dir", "head", "--head_lr", "2e-2")
    assert rates_of("head") == pytest.approx([2e-2] * 6)
    finetune(base, "--output_dir", "decay", "--layerwise_lr_decay", "0.5")
    finetune(base, "--output_dir", "plain")
    assert rates_of("decay") == rates_of("plain") == pytest.approx([3e-3] * 6)
    ratios = [json.loads(read_lines(f"{run}/epochs.jsonl")[0])["update_ratio"] for run in ("decay", "plain")]
    below = [r["llama.layers.0"] / r["llama.layers.1"] for r in ratios]
    assert below[0] == pytest.approx(below[1] / 2, rel=0.2)


def test_checkpointing_changes_no_number(arguments):
    finetune(arguments, "--epochs", "1", "--dropout", "0.1", "--output_dir", "a")
    finetune(arguments, "--epochs", "1", "--dropout", "0.1", "--output_dir", "b", "--grad_checkpoint")
    assert steps_of("a") == steps_of("b")


def test_accumulation_is_one_big_batch(arguments):
    base = [*arguments, "--epochs", "1", "--hidden_dropout_prob", "0", "--dtype", "float32"]
    finetune(base, "--output_dir", "a")
    finetune(base, "--output_dir", "b", "--batch_size", "4", "--grad_accum", "4")
    a, b = steps_of("a"), steps_of("b")
    assert [s["loss"] for s in a] == pytest.approx([s["loss"] for s in b], rel=1e-4)
    assert [s["tokens"] for s in a] == [s["tokens"] for s in b]


def test_the_checks_print_their_lines_and_leave_the_training_as_it_is(arguments, capsys):
    finetune(arguments, "--epochs", "1", "--dropout", "0.1", "--output_dir", "a")
    capsys.readouterr()
    finetune(arguments, "--epochs", "1", "--dropout", "0.1", "--output_dir", "b", "--check_gradients",
             "--overfit_batch", "--auto_batch")
    out = capsys.readouterr().out
    assert re.search(r"^gradients :: one big batch, .* agree to \de-\d\d$|agree to \d\.\de-\d\d$", out, re.M)
    assert re.search(r"^overfit :: one batch, loss \d\.\d{3} to \d\.\d{3}: it can memorise it$", out, re.M)
    assert re.search(r"^batch :: 16 sentences a forward pass, 16 an optimizer step$", out, re.M)
    assert steps_of("a") == steps_of("b")


def test_the_switches_of_pytorch_are_set_and_set_back(arguments):
    import torch

    finetune(arguments, "--epochs", "1", "--output_dir", "a", "--detect_anomaly", "--deterministic")
    assert torch.is_anomaly_enabled() and torch.are_deterministic_algorithms_enabled()
    finetune(arguments, "--epochs", "1", "--output_dir", "b")
    assert not torch.is_anomaly_enabled() and not torch.are_deterministic_algorithms_enabled()
    assert steps_of("a") == steps_of("b")


def test_the_decay_of_every_optimizer_is_decoupled(arguments):
    config = parse_args(["--option", "finetune", *arguments, "--optimizer", "sgd", "--weight_decay", "0.1"])
    run = jobs.build_job(config, inputs_room.load(config, ("train", "dev")), device.choose_device(config))
    assert all(group["decoupled"] for group in run.optimizer.param_groups)


@pytest.mark.parametrize("monitor, best", [("dev_mae", min), ("dev_qwk", max), ("dev_loss", min)])
def test_an_ordinal_run_reports_its_scores_and_survives_saving(arguments, monitor, best, capsys):
    finetune(arguments, "--loss", "ordinal", "--monitor", monitor, "--output_dir", "run", "--epochs", "3")
    out = capsys.readouterr().out
    epochs = [json.loads(line) for line in read_lines("run/epochs.jsonl")]
    assert {"dev_mae", "dev_qwk", "dev_off_by_one"} <= epochs[0].keys()
    result = result_of("run")
    chosen = next(e for e in epochs if e["epoch"] == result["best_epoch"])
    assert chosen[monitor] == best(e[monitor] for e in epochs)
    assert result["dev"][monitor[4:]] == pytest.approx(chosen[monitor])
    assert (f"dev mae :: {result['dev']['mae']:.3f}, qwk :: {result['dev']['qwk']:.3f}, "
            f"off by one :: {result['dev']['off_by_one']:.3f}") in out.splitlines()
    predictions = read_lines("run/dev-predictions.txt")
    assert run_llama.main(["--option", "evaluate", "--run", "run"]) == 0
    assert of_splits(capsys.readouterr().out) == of_splits(out)
    assert read_lines("run/dev-predictions.txt") == predictions
    Path("in.txt").write_text("\n".join(p.partition(" ||| ")[2] for p in predictions), encoding="utf-8")
    assert run_llama.main(["--option", "predict", "--run", "run", "--input", "in.txt"]) == 0
    assert [x[0] for x in capsys.readouterr().out.splitlines()] == [p[0] for p in predictions]


def test_dev_is_never_augmented_and_train_is(arguments, monkeypatch):
    """The rows that the model sees while it evaluates are the files' own; in training they are not."""
    import dataset

    seen = {"train": 0, "eval": 0}
    real = dataset.make_batch

    def watch(split, rows, pad_id, augment=None, seed=()):
        batch = real(split, rows, pad_id, augment, seed)
        own = real(split, rows, pad_id)
        same = batch["tokens"].shape == own["tokens"].shape and bool((batch["tokens"] == own["tokens"]).all())
        seen["train" if augment else "eval"] += 1
        assert same is (augment is None)
        return batch

    monkeypatch.setattr(dataset, "make_batch", watch)
    monkeypatch.setattr(metrics, "make_batch", watch)
    finetune(arguments, "--epochs", "1", "--aug_delete", "0.3", "--aug_swap", "0.2", "--aug_replace", "0.3",
             "--class_weights", "balanced", "--sampler", "balanced", "--r_drop", "1", "--label_smoothing", "0.1")
    assert seen["train"] == 6 and seen["eval"] >= 4


# --------------------------------------------------------------------------- several runs


@pytest.mark.parametrize("options, names", [(["--seeds", "2"], ["seed-1337", "seed-1338"]),
                                            (["--folds", "2"], ["fold-0", "fold-1"])])
def test_several_runs_print_the_mean_and_deviation_of_their_results(arguments, options, names, capsys):
    import statistics

    finetune(arguments, "--epochs", "1", *options, "--output_dir", "runs/all")
    out, summary = capsys.readouterr().out.splitlines(), result_of("runs/all")
    assert sorted(p.name for p in Path("runs/all").iterdir() if p.is_dir()) == names
    for split, line in zip(("dev", "test"), out[-2:], strict=True):
        each = [result_of(f"runs/all/{name}")[split]["acc"] for name in names]
        assert summary[split] == {"acc": each, "mean": statistics.mean(each), "std": statistics.stdev(each)}
        assert line == (f"{split} acc :: {statistics.mean(each):.3f} +- {statistics.stdev(each):.3f} over 2 "
                        f"{options[0][2:]}")
    assert steps_of(f"runs/all/{names[0]}") != steps_of(f"runs/all/{names[1]}")


def test_every_start_in_a_process_begins_with_the_files_weights(arguments):
    import torch
    config = parse_args(["--option", "finetune", *arguments])
    inputs, cpu = inputs_room.load(config, ("train", "dev")), device.choose_device(config)
    first = jobs.build_job(config, inputs, cpu).model
    before = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1)  # as a training does, in place
    torch.testing.assert_close(dict(jobs.build_job(config, inputs, cpu).model.state_dict()), before,
                               rtol=0, atol=0)


def test_a_fold_alone_is_the_fold_among_the_others_so_that_it_can_be_resumed(arguments, capsys):
    finetune(arguments, "--epochs", "1", "--folds", "2", "--output_dir", "all")
    finetune(arguments, "--epochs", "1", "--folds", "2", "--fold", "1", "--output_dir", "one")
    assert steps_of("one") == steps_of("all/fold-1") != steps_of("all/fold-0")
    described = json.loads(Path("all/fold-1/args.json").read_text(encoding="utf-8"))
    assert (described["options"]["folds"], described["options"]["fold"]) == (2, 1)
    assert run_llama.main(["--option", "evaluate", "--run", "one"]) == 0
    assert "it was trained on a part of the dev file" in capsys.readouterr().err
    finetune(arguments, "--epochs", "1", "--seeds", "2", "--output_dir", "seeds")
    finetune(arguments, "--epochs", "1", "--seed", "1338", "--output_dir", "seed")
    assert steps_of("seed") == steps_of("seeds/seed-1338")


# --------------------------------------------------------------------------- contradictions


@pytest.mark.parametrize("options, words", [
    ("--warmup_steps 19", "--warmup_steps 19 is beyond the run's 18 steps, which come from --epochs 3"),
    ("--warmup_epochs 3.5", "--warmup_epochs 3.5 is beyond the run's 18 steps, which come from --epochs 3"),
    ("--scheduler step", "--scheduler step needs --step_size"),
    ("--scheduler multistep", "--scheduler multistep needs --milestones"),
    ("--scheduler exponential", "--scheduler exponential needs --gamma"),
    ("--warmup_kind constant", "--warmup_kind constant needs a --warmup_start"),
    ("--folds 60", "--folds 60: each needs a sentence of every class, and --train and --dev together have 42 of"),
    ("--folds 2 --warmup_steps 13", "--warmup_steps 13 is beyond the run's 12 steps"),  # 63 sentences in a fold
    ("--seeds 2 --warmup_steps 19", "--warmup_steps 19 is beyond the run's 18 steps"),
    ("--option lr_find --warmup_steps 19", "--warmup_steps 19 is beyond the run's 18 steps"),
])
def test_a_contradiction_is_one_line_before_a_run_folder_is_made(arguments, options, words, capsys):
    err = refused(capsys, "--option", "finetune", *arguments, *options.split())
    said = [line for line in err.splitlines() if not line.startswith(("warning: ", "labels :: ", "settings :: "))
            and "no test file" not in line]
    assert words in err and len(said) == 1
    assert not Path("runs").exists()


def test_a_warmup_as_long_as_the_run_is_none(arguments):
    finetune(arguments, "--epochs", "1", "--warmup_steps", "6", "--output_dir", "run")
    assert rates_of("run") == pytest.approx([3e-3 * (i + 1) / 6 for i in range(6)])


def test_an_option_without_effect_is_said_before_the_training(arguments, capsys):
    finetune(arguments, "--epochs", "1", "--milestones", "2,4")
    assert "no effect: --milestones: --scheduler linear does not use it" in capsys.readouterr().err


def test_a_run_with_c_is_the_run_without(arguments, tiny_data, monkeypatch):
    """Every loss, norm and rate of a whole run to float32's rounding, and the same predictions; `--kernels off` is
    obeyed, and so is the size of a model."""
    if fused.library() is None:
        pytest.skip("no C compiler here")
    found, real = [], device.accelerate

    def accelerate(config, model, where):
        is_as_wanted = real(config, model, where)
        found.append(fused.is_accelerated(model))
        return is_as_wanted

    monkeypatch.setattr(device, "accelerate", accelerate)
    updates, run_fused = [], optimizer._run_fused
    monkeypatch.setattr(optimizer, "_run_fused", lambda *arguments: updates.append(1) or run_fused(*arguments))
    arguments += ["--weight_decay", "0", "--hidden_dropout_prob", "0.1"]
    finetune(arguments, "--output_dir", "small")
    monkeypatch.setattr(device, "LARGE", 0)
    finetune(arguments, "--output_dir", "off", "--kernels", "off")
    assert found == [False, False] and not updates
    finetune(arguments, "--output_dir", "on")
    assert found == [False, False, True] and len(updates) == len(read_lines("on/steps.jsonl"))
    compilers = [json.loads(Path(run, "args.json").read_text(encoding="utf-8"))["versions"]["c_compiler"]
                 for run in ("small", "off", "on")]
    assert compilers == ["not used", "not used", fused.compiler()]
    steps = [[json.loads(line) for line in read_lines(f"{run}/steps.jsonl")] for run in ("off", "on")]
    for a, b in zip(*steps, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4) and a["lr"] == b["lr"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    assert steps[0] != steps[1] and read_lines("off/steps.jsonl") != read_lines("small/steps.jsonl")
    assert read_lines("off/dev-predictions.txt") == read_lines("on/dev-predictions.txt")
    for option in (["--option", "evaluate"], ["--option", "predict", "--input", str(tiny_data["dev"])]):
        assert run_llama.main([*option, "--run", "on"]) == 0
    assert found[3:] == [True, True]


@pytest.mark.parametrize("option", ["generate", "prompt"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_where_nothing_is_trained_weights_are_in_the_precision_of_the_products(arguments, monkeypatch, option, dtype):
    room, seen = {"generate": generate, "prompt": prompt}[option], []
    real = room.load_pretrained

    def spy(*words, **more):
        model = real(*words, **more)
        seen.append({str(p.dtype) for p in model.parameters()})
        return model

    monkeypatch.setattr(room, "load_pretrained", spy)
    words = arguments if option == "prompt" else arguments[:2]
    assert run_llama.main(["--option", option, *words, "--device", "cpu", "--dtype", dtype]) == 0
    assert seen == [{f"torch.{dtype}"}]
