"""--option search: a trial is the run that one types by hand; what is stopped or killed goes on and comes out the same;
the total is exact; the end is honest. The judges are the program itself without a search, Optuna driven plainly, and
counting."""

import csv
import gc
import json
import math
import os
import random
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import weakref
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from conftest import ROOT, tiny_sentences, write_split
from test_resume import lines, main

from commands import finalists, one_run, search_pages, study, trial
from commands import job as jobs
from commands import space as spaces
from formats import files
from training import metrics

posix = pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX's")
SPACE = "lr=log:1e-4..3e-2 batch_size=8|16|32"
SIZE = ["--epochs", "2", "--patience", "0", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def search(inputs, *more, space=SPACE) -> int:
    return main("--option", "search", *inputs, *SIZE, *(["--space", space] if space else []), *more)


def table(folder) -> list[dict]:
    """trials.csv without its times."""
    with open(Path(folder) / "trials.csv", encoding="utf-8", newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def about(folder) -> dict:
    return json.loads((Path(folder) / "search.json").read_text(encoding="utf-8"))


def result(folder) -> dict:
    return json.loads((Path(folder) / "result.json").read_text(encoding="utf-8"))


def kept(storage: str) -> list[optuna.trial.FrozenTrial]:
    """The trials, as Optuna itself reads them."""
    return optuna.load_study(study_name="minllama", storage=storage).trials


@pytest.fixture(scope="module")
def searched(inputs, tmp_path_factory) -> tuple[Path, str]:
    """An undisturbed search of six trials, and what it printed."""
    folder = tmp_path_factory.mktemp("searched")
    done = subprocess.run(
        [sys.executable, str(ROOT / "run_llama.py"), "--option", "search", *inputs, *SIZE, "--space", SPACE, "--trials",
         "6", "--method", "tpe", "--finalists", "2", "--final_seeds", "2", "--output_dir", "all"],
        cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "all", done.stdout


# --------------------------------------------------------------------------- a trial is an ordinary run


def by_hand(folder: Path) -> list[str]:
    """The options that the args.json of a run says were typed."""
    described = json.loads((folder / "args.json").read_text(encoding="utf-8"))
    return [word for name in described["given"] if name != "output_dir"
            for word in (f"--{name}", str(described["options"][name]))]


@pytest.mark.parametrize("name", ["trial-0000", "trial-0004"])
def test_a_trial_is_the_run_that_one_types_by_hand(searched, name):
    """To the bit, the fifth trial of a process as the first one."""
    folder, _ = searched
    assert main(*by_hand(folder / name), "--output_dir", "hand") == 0
    for log in ("steps.jsonl", "epochs.jsonl"):
        assert lines(Path("hand") / log) == lines(folder / name / log)
    for file in ("best/model.safetensors", "best/config.json", "dev-predictions.txt"):
        assert (Path("hand") / file).read_bytes() == (folder / name / file).read_bytes(), file
    ours, theirs = (json.loads((at / "args.json").read_text(encoding="utf-8")) for at in (folder / name, Path("hand")))
    for at in (ours, theirs):
        at["options"].pop("output_dir")
    assert ours["options"] == theirs["options"] and ours["files"] == theirs["files"]


def test_the_printed_command_repeats_the_winner(searched):
    folder, said = searched
    (command,) = [line.removeprefix("repeat :: ") for line in said.splitlines() if line.startswith("repeat :: ")]
    assert main(*shlex.split(command)[2:], "--output_dir", "hand") == 0
    winner = folder.parent / about(folder)["winner_run"]
    assert lines(Path("hand/epochs.jsonl")) == lines(winner / "epochs.jsonl")
    assert result("hand")["test"]["acc"] == about(folder)["test"]["acc"]
    assert f"test acc :: {result('hand')['test']['acc']:.3f}" in said.splitlines()


def test_no_trial_and_no_finalist_looks_at_the_test_split(searched):
    folder, said = searched
    runs = sorted(path.parent for path in folder.glob("*/result.json"))
    assert len(runs) == 6 + 2 * 2
    winner = Path(about(folder)["winner_run"]).name
    for run in runs:
        assert "test" not in result(run) and (run / "test-predictions.txt").exists() == (run.name == winner)
    assert said.count("test acc ::") == 1


def test_test_is_looked_at_once_however_often_a_search_is_started(inputs, monkeypatch, capsys):
    seen, real = [], metrics.predict

    def predict(model, split, pad_id, device, label="eval", *more, **named):
        seen.append(label)
        return real(model, split, pad_id, device, label, *more, **named)

    monkeypatch.setattr(metrics, "predict", predict)
    words = ("--trials", "2", "--finalists", "1", "--final_seeds", "2", "--method", "random")
    assert search(inputs, *words) == search(inputs, *words) == 0
    assert seen.count("test") == 1 and capsys.readouterr().out.count("test acc ::") == 2


def test_the_scores_are_those_of_the_runs(searched):
    folder, said = searched
    assert [row["number"] for row in table(folder)] == [str(i) for i in range(6)]
    for row in table(folder):
        accs = [line["dev_acc"] for line in lines(folder / row["folder"] / "epochs.jsonl")]
        assert float(row["dev_acc"]) == max(accs) and int(row["evaluations"]) == len(accs)
        assert f"trial {row['number']} :: dev_acc {max(accs):.3f}" in said
    complete = [row for row in table(folder) if row["state"] == "complete"]
    best = max(complete, key=lambda row: (float(row["dev_acc"]), -int(row["number"])))
    known = about(folder)
    assert str(known["best_trial"]) == best["number"]
    again = next(one for one in known["finalists"] if one["trial"] == known["best_trial"])
    means = []
    for seed, score in again["scores"].items():
        run = folder / f"final-{known['best_trial']:04d}-seed-{seed}"
        assert int(seed) in (1338, 1339) and score == max(line["dev_acc"] for line in lines(run / "epochs.jsonl"))
        means.append(score)
    assert again["mean"] == pytest.approx(sum(means) / 2)
    gain = float(best["dev_acc"]) - again["mean"]
    assert "dev baselines :: majority" in said
    assert (f"again :: the best trial had {float(best['dev_acc']):.3f}; with new seeds {again['mean']:.3f} +- ") in said
    assert (f"flattered it by {gain:.3f}" if gain > 0 else "it was not flattered") in said


def test_the_report_reads_the_folder_of_a_search(searched, capsys):
    folder, _ = searched
    assert main("--option", "report", "--run", folder, "--output_dir", "report") == 0
    said = capsys.readouterr().out
    assert "report :: 10 runs" in said and f"report :: {Path('report/search.html')}" in said
    page = Path("report/search.html").read_text(encoding="utf-8")
    for title, text in (("History", ""), ("Parallel coordinates", ""), ("Slices", ""), (
            "Importance", "<p>Importances of 6 complete trials say little; of 20 and more they begin to.</p>\n")):
        n = table(folder)
        text = text.replace("6", str(sum(row["state"] == "complete" for row in n)))
        assert f"<h2>{title}</h2>\n{text}<figure><svg role" in page
    known = about(folder)
    for one in known["finalists"]:
        assert f"<tr><td>{one['trial']}</td><td>{one['before']:.3f}</td><td>{one['mean']:.3f}</td>" in page
    assert f"<dd>{known['test']['acc']:.3f}</dd>" in page and f"<dd>{known['winner']}</dd>" in page
    for row in table(folder):
        assert f"<td>{row['lr']}</td>" in page and f"<td>{row['dev_acc']}</td>" in page


def test_a_page_of_a_damaged_search_is_no_page(searched, capsys):
    folder, _ = searched
    shutil.copytree(folder, "copy")
    Path("copy/trials.csv").write_text("number,state\n1,complete\n", encoding="utf-8")
    assert main("--option", "report", "--run", "copy", "--output_dir", "report") == 0
    assert "trials.csv: this is not what a search writes" in capsys.readouterr().err
    assert not Path("report/search.html").exists()


def test_places_on_an_axis():
    assert search_pages.positions(["1", "", "3", "2"])[0] == pytest.approx([0, math.nan, 1, 0.5], nan_ok=True)
    assert search_pages.positions(["1e-6", "1e-4", "1e-2"])[0] == pytest.approx([0, 0.5, 1])
    assert search_pages.positions(["0", "0.001", "0.5"], is_log=False)[0] == pytest.approx([0, 0.002, 1])
    assert search_pages.positions(["0.001", "0.25", "0.5"], is_log=False)[0] == pytest.approx([0, 0.5, 1], abs=2e-3)
    assert search_pages.positions(["1", "2", "4"], is_log=True)[0] == pytest.approx([0, 0.5, 1])
    assert [text for _, text in search_pages.positions(["1", "2", "3", "100", "50"], is_log=False)[1]] == [
        "1", "50", "100"], "no text on another"
    assert search_pages.positions(["sgd", "adamw", ""]) == (pytest.approx([1, 0, math.nan], nan_ok=True),
                                                            [(0.0, "adamw"), (1.0, "sgd")])


# --------------------------------------------------------------------------- the options


def test_method_grid_visits_each_point_once(inputs):
    space = "lr=1e-3|1e-2 scheduler=cosine|step step_size[scheduler=step]=int:2..4:2"
    words = ("--method", "grid", "--finalists", "0", "--epochs", "1")
    assert search(inputs, *words, space=space) == 0
    points = [(row["lr"], row["scheduler"], row["step_size"]) for row in table("runs/search")]
    assert points == [(lr, *rest) for lr in ("0.001", "0.01")
                      for rest in (("cosine", ""), ("step", "2"), ("step", "4"))], "in the order of the space"
    assert search(inputs, *words, space=space) == 0 and len(table("runs/search")) == 6, "there is nothing left"


def test_space_is_what_is_tried(inputs):
    Path("my.space").write_text("lr=2e-3|3e-3  # two rates\nlabel_smoothing=0.1\n", encoding="utf-8")
    assert search(inputs, "--trials", "5", "--finalists", "0", "--epochs", "1", space="my.space") == 0
    assert {(row["lr"], row["label_smoothing"]) for row in table("runs/search")} == {("0.002", "0.1"), ("0.003", "0.1")}
    assert len(table("runs/search")) == 2, "two points are tried once each"
    options = json.loads(Path("runs/search/trial-0001/args.json").read_text(encoding="utf-8"))["options"]
    assert options["label_smoothing"] == 0.1 and str(options["lr"]) == table("runs/search")[1]["lr"]


def test_trials_is_a_total_over_all_starts(inputs, capsys):
    for n, there in ((2, 2), (3, 3), (3, 3)):
        assert search(inputs, "--trials", n, "--finalists", "0", "--method", "random", "--epochs", "1") == 0
        assert len(table("runs/search")) == len(kept("sqlite:///runs/search/search.db")) == there
    assert capsys.readouterr().out.count("trial 2 ::") == 1


def test_timeout_ends_the_trial_at_its_next_evaluation(inputs, monkeypatch, capsys):
    """The second trial finds the time over at its first evaluation; no third one begins."""
    real, now = trial.run_trial, time.monotonic

    def run_trial(*arguments):
        if arguments[1].name == "trial-0001":
            monkeypatch.setattr(time, "monotonic", lambda: now() + 10_000)
        return real(*arguments)

    monkeypatch.setattr(trial, "run_trial", run_trial)
    assert search(inputs, "--trials", "5", "--timeout", "9000", "--finalists", "0", "--method", "random") == 0
    assert [(row["state"], row["reason"], row["evaluations"]) for row in table("runs/search")] == [
        ("complete", "finished", "2"), ("pruned", "timeout", "1")]
    assert result("runs/search/trial-0001")["stopped"] == "timeout"
    said = capsys.readouterr().out
    assert "trials :: 2: 1 complete, 0 pruned, 1 ended by --timeout, 0 failed" in said and "pruned ::" not in said


PRUNERS = {"median": lambda: optuna.pruners.MedianPruner(5, 1),
           "halving": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
           "hyperband": lambda: optuna.pruners.HyperbandPruner(1, 4, 3)}


@pytest.mark.parametrize("prune", [*PRUNERS, "none"])
def test_prune_ends_the_trials_that_optuna_ends(inputs, prune):
    """Optuna, driven plainly with the numbers of the runs' logs, must end the same trials at the same evaluation."""
    assert search(inputs, "--trials", "10", "--prune", prune, "--finalists", "0", "--method", "random", "--epochs",
                  "4") == 0
    plain = optuna.create_study(study_name="minllama", direction="maximize",
                                pruner=PRUNERS[prune]() if prune != "none" else optuna.pruners.NopPruner())
    ended = []
    for row in table("runs/search"):
        asked, is_pruned = plain.ask(), False
        accs = [line["dev_acc"] for line in lines(Path("runs/search") / row["folder"] / "epochs.jsonl")]
        for n, acc in enumerate(accs, 1):
            assert not is_pruned, "it went on where Optuna ends it"
            asked.report(acc, n)
            is_pruned = asked.should_prune() and n < 4
        assert (row["state"] == "pruned") == is_pruned == (len(accs) < 4), row
        assert result(Path("runs/search") / row["folder"])["stopped"] == ("pruned" if is_pruned else "finished")
        ended.append(is_pruned)
        plain.tell(asked, None if is_pruned else max(accs),
                   optuna.trial.TrialState.PRUNED if is_pruned else optuna.trial.TrialState.COMPLETE)
    assert any(ended) == (prune != "none")


def test_objective_decides_and_is_the_monitor(inputs):
    assert search(inputs, "--trials", "3", "--objective", "dev_loss", "--finalists", "1", "--final_seeds", "1") == 0
    rows = table("runs/search")
    for row in rows:
        assert float(row["dev_loss"]) == min(
            line["dev_loss"] for line in lines(Path("runs/search") / row["folder"] / "epochs.jsonl"))
    assert about("runs/search")["best_trial"] == min(range(3), key=lambda i: float(rows[i]["dev_loss"]))
    options = json.loads(Path("runs/search/trial-0000/args.json").read_text(encoding="utf-8"))["options"]
    assert options["monitor"] == "dev_loss"


@pytest.mark.parametrize("storage", ["sqlite:///elsewhere.db", "trials.journal"])
def test_storage_is_where_the_trials_are(inputs, storage):
    words = ("--trials", "2", "--method", "random", "--finalists", "0", "--epochs", "1", "--storage", storage)
    assert search(inputs, *words, "--output_dir", "one") == 0 and not Path("one/search.db").exists()
    there = kept(storage) if "://" in storage else kept(
        optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(storage)))
    assert [one.params["lr"] for one in there] == [float(row["lr"]) for row in table("one")]
    assert search(inputs, *words, "--output_dir", "two") == 0 and len(table("two")) == 2, "it is the same search"
    assert not [*Path("two").glob("trial-*")]


def test_finalists_and_final_seeds_say_what_runs_again(inputs):
    assert search(inputs, "--trials", "3", "--method", "random", "--finalists", "2", "--final_seeds", "3", "--epochs",
                  "1", "--prune", "none") == 0
    ranked = sorted(table("runs/search"), key=lambda row: (-float(row["dev_acc"]), int(row["number"])))
    assert {path.name for path in Path("runs/search").glob("final-*")} == {
        f"final-{int(row['number']):04d}-seed-{seed}" for row in ranked[:2] for seed in (1338, 1339, 1340)}


def test_seeds_give_a_trial_the_mean_of_its_runs(inputs):
    assert search(inputs, "--trials", "2", "--method", "random", "--seeds", "2", "--finalists", "1", "--final_seeds",
                  "1", "--prune", "none") == 0
    for row in table("runs/search"):
        best = [max(line["dev_acc"] for line in lines(
            Path("runs/search") / row["folder"] / f"seed-{seed}" / "epochs.jsonl")) for seed in (1337, 1338)]
        assert float(row["dev_acc"]) == pytest.approx(sum(best) / 2) and row["evaluations"] == "4"
    assert [path.name[-9:] for path in Path("runs/search").glob("final-*")] == ["seed-1339"], "a new one"


def test_without_a_space_there_is_one_for_the_data(inputs, capsys):
    assert search(inputs, "--trials", "1", "--finalists", "0", "--epochs", "1", "--batch_size", "16", space=None) == 0
    said = capsys.readouterr().err
    assert "space :: lr=log:" in said and "batch_size=" not in said.partition("space :: ")[2].partition("\n")[0]


def test_lr_auto_takes_the_interval_of_the_range_test(inputs, capsys):
    """That of lr_find with the same options, and it stays when the search goes on."""
    words = ("--finalists", "0", "--epochs", "1", "--attention", "causal", "--method", "random")
    for n in (1, 2):
        assert search(inputs, "--trials", n, *words, space="lr=auto batch_size=16|32") == 0
    text = about("runs/search")["space"]
    assert main("--option", "lr_find", *inputs, *SIZE, "--attention", "causal", "--output_dir", "range") == 0
    low, high = (f"{result('range')[name]:.1e}" for name in ("low", "high"))
    assert text == f"lr=log:{low}..{high} batch_size=16|32" and len(table("runs/search")) == 2


# --------------------------------------------------------------------------- stopped, killed, side by side


def start(inputs, *more, **how) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run_llama.py"), "--option", "search", *map(str, inputs), *SIZE, "--space", SPACE,
         *map(str, more)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)


@posix
def test_a_killed_search_goes_on_as_the_one_that_was_not(searched, inputs):
    """Killed in the middle of trials, at moments that are drawn; the table and the end are those of the undisturbed
    search."""
    words = ("--trials", "6", "--method", "tpe", "--finalists", "2", "--final_seeds", "2", "--output_dir", "all")
    draw = random.Random(3)
    for n in (1, 3, 5, 7):  # of the runs, six trials and four of the finalists
        one = start(inputs, *words)
        while len([*Path("all").glob("*/epochs.jsonl")]) < n and one.poll() is None:
            time.sleep(0.02)
        time.sleep(draw.random() * 0.3)
        one.kill()
        one.communicate()
    one = start(inputs, *words)
    said, errors = one.communicate()
    assert one.returncode == 0, errors
    folder, expected = searched
    assert table("all") == table(folder)
    assert len(kept("sqlite:///all/search.db")) == 6
    ends = [[line for line in text.splitlines() if line.startswith(("leader", "finalist", "winner ::", "test acc"))]
            for text in (said, expected)]
    assert ends[0] == ends[1] and len(ends[0]) > 4
    for run in Path(folder).glob("*/epochs.jsonl"):
        assert lines(Path("all") / run.parent.name / "epochs.jsonl") == lines(run)


@posix
def test_a_signal_stops_the_trial_and_says_how_the_search_goes_on(inputs, capfd, monkeypatch):
    real = trial.run_trial

    def run_trial(*arguments):
        if arguments[1].name == "trial-0001":
            original = one_run.train

            def train(*more, **named):
                monkeypatch.setattr(one_run, "train", original)
                report = named["on_evaluation"]

                def on_evaluation(n, record):
                    signal.raise_signal(signal.SIGTERM)
                    return report(n, record)
                return original(*more, **{**named, "on_evaluation": on_evaluation})
            monkeypatch.setattr(one_run, "train", train)
        return real(*arguments)

    monkeypatch.setattr(trial, "run_trial", run_trial)
    words = ("--trials", "3", "--method", "random", "--prune", "none", "--finalists", "0")
    assert search(inputs, *words) == 143
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("stopped; the search goes on with: python run_llama.py --option search ")
    monkeypatch.setattr(trial, "run_trial", real)
    assert main(*shlex.split(last)[shlex.split(last).index("run_llama.py") + 1:]) == 0
    assert "resuming" in Path("runs/search/trial-0001/trial.log").read_text(encoding="utf-8")
    assert [(row["state"], row["evaluations"]) for row in table("runs/search")] == [("complete", "2")] * 3


@pytest.mark.parametrize("storage", ["", "trials.journal"])
def test_processes_on_one_storage_make_the_total_exactly(inputs, storage):
    """Three processes, seven trials: none lost, none doubled, and one of them runs the finalists."""
    words = ["--trials", "7", "--finalists", "1", "--final_seeds", "1", "--output_dir", "all"]
    words += ["--storage", storage] if storage else []
    processes = [start(inputs, *words) for _ in range(3)]
    said = [one.communicate() for one in processes]
    assert [one.returncode for one in processes] == [0] * 3, said
    assert sorted(path.name for path in Path("all").glob("trial-*")) == [f"trial-{i:04d}" for i in range(7)]
    tried = [line.split()[1] for out, _ in said for line in out.splitlines() if line.startswith("trial ")]
    assert sorted(tried) == [str(i) for i in range(7)]
    assert [row["state"] in ("complete", "pruned") for row in table("all")] == [True] * 7
    assert len([*Path("all").glob("final-*")]) == 1


def opened(folder, *, n_trials=4, space="lr=1e-4|1e-3|1e-2", method="random") -> study.Trials:
    """A search's trials, as a process of it sees them."""
    Path(folder).mkdir(exist_ok=True)
    plan = study.Plan(spaces.parse(space), method, "none", True, n_trials, 1, 0, {"space": space})
    return study.Trials(plan, "sqlite:///shared.db", Path(folder))


def test_two_processes_never_draw_one_point(tmp_path, monkeypatch):
    one, other = opened("a", method="grid"), opened("b", method="grid")
    was_free = []

    def suggest(*arguments, real=study.suggest):
        with files.locked(one.lock) as is_free:  # then the other process could draw here, and not know this point
            was_free.append(is_free)
        return real(*arguments)

    monkeypatch.setattr(study, "suggest", suggest)
    with one.take() as first, other.take() as second, one.take() as third:
        assert sorted(taken[1]["lr"] for taken in (first, second, third)) == [1e-4, 1e-3, 1e-2]
        assert one.others() == 3
    assert len(was_free) == 3 and not any(was_free)


def test_a_kill_between_drawing_a_trial_and_taking_it_loses_nothing(tmp_path, monkeypatch):
    trials = opened("a")
    with monkeypatch.context() as patch:
        patch.setattr(study.Trials, "_begin", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt), trials.take():
            pass
    assert [one.state.name for one in kept("sqlite:///shared.db")] == ["RUNNING"] and trials.others() == 0
    with trials.take() as taken:
        assert taken[0].number == 0


def test_a_dead_trial_does_not_keep_the_search_from_its_end(inputs, monkeypatch, capsys):
    words = ("--trials", "3", "--method", "random", "--prune", "none", "--finalists", "1", "--final_seeds", "1")
    with monkeypatch.context() as patch:
        failing(patch, [1], KeyboardInterrupt())
        assert search(inputs, *words) != 0
    assert search(inputs, *words, "--timeout", "0.001") == 0
    said = capsys.readouterr()
    assert "1 trial of a process that was killed is not finished" in said.err and "winner :: trial 0" in said.out
    assert search(inputs, *words) == 0 and [row["state"] for row in table("runs/search")] == ["complete"] * 3


def test_a_trial_that_ends_while_its_lock_is_tried_is_not_taken_up(tmp_path, monkeypatch):
    plan = study.Plan(spaces.parse("lr=1e-4..1e-3"), "random", "none", True, 3, 1, 0, {"space": "x"})
    trials, real = study.Trials(plan, "sqlite:///x.db", tmp_path), files.locked
    with trials.take() as taken:
        first = taken[0]
    assert first.number == 0

    @contextmanager
    def locked(path, waits=False):
        if path.name == study.WORKED_ON and not waits:
            trials.tell(first, "complete", 0.5)
        with real(path, waits) as is_ours:
            yield is_ours

    monkeypatch.setattr(files, "locked", locked)
    with trials.take() as taken:
        assert taken[0].number == 1
    assert [one.state.name for one in trials.all()] == ["COMPLETE", "RUNNING"]


def test_an_option_that_no_trial_has_is_in_no_trial(inputs, capsys):
    assert search(inputs, "--trials", "1", "--finalists", "0", "--epochs", "1", "--max_minutes", "9") == 0
    assert "no effect: --max_minutes: it belongs to another --option" in capsys.readouterr().err
    assert json.loads(Path("runs/search/trial-0000/args.json").read_text(encoding="utf-8"))["options"][
        "max_minutes"] is None


def test_a_trial_of_a_machine_that_is_gone_is_taken_up(inputs):
    """Its folder is not here, and there has been no sign of life: it begins anew, under its number."""
    words = ("--trials", "2", "--method", "random", "--prune", "none", "--finalists", "0", "--epochs", "1")
    assert search(inputs, *words) == 0
    before = table("runs/search")
    with sqlite3.connect("runs/search/search.db") as database:
        database.execute("update trials set state = 'RUNNING', datetime_complete = null where number = 1")
        database.execute("delete from trial_values where trial_id = 2")
        database.execute("update trial_user_attributes set value_json = '\"/nowhere/trial-0001\"' "
                         "where trial_id = 2 and key = 'folder'")
        database.execute("update trial_heartbeats set heartbeat = '2001-01-01 00:00:00'")
    Path("runs/search/trial-0001").rename("gone")
    assert search(inputs, *words) == 0
    assert table("runs/search") == before and Path("runs/search/trial-0001/result.json").is_file()


def test_a_journal_whose_last_line_is_torn_is_mended(inputs):
    words = ("--method", "random", "--finalists", "0", "--epochs", "1", "--storage", "trials.journal")
    assert search(inputs, "--trials", "1", *words) == 0
    whole = Path("trials.journal").read_bytes()
    Path("trials.journal").write_bytes(whole + b'{"op_code":4,"worker_id":"abc')
    assert search(inputs, "--trials", "2", *words) == 0
    assert len(table("runs/search")) == 2
    assert Path("trials.journal").read_bytes().startswith(whole)
    for line in Path("trials.journal").read_bytes().splitlines():
        json.loads(line)


def test_the_model_of_a_trial_is_gone_before_the_next_one(inputs, monkeypatch):
    built, alive = [], []

    def build_job(*arguments, real=jobs.build_job):
        alive.append(sum(model() is not None for model in built))
        job = real(*arguments)
        built.append(weakref.ref(job.model))
        return job

    def train(config, *more, real=one_run.train, **named):
        job = jobs.build_job(config, *more)
        if "trial-0001" in config.output_dir:
            raise ZeroDivisionError(f"an error that holds {job.model}")
        del job
        return real(config, *more, **named)

    monkeypatch.setattr(jobs, "build_job", build_job)
    monkeypatch.setattr(one_run, "train", train)
    gc.disable()  # as between two collections of a long run
    try:
        assert search(inputs, "--trials", "4", "--method", "random", "--finalists", "0") == 0
    finally:
        gc.enable()
    firsts = [alive[i] for i in (0, 2, 3, 5, 7)]  # one that does not fail builds its job twice here
    assert len(alive) == 8 and firsts == [0] * 5, "of four trials, and of the test split for the winner"


# --------------------------------------------------------------------------- what fails


def failing(monkeypatch, numbers, error) -> None:
    real = one_run.train

    def train(config, *more, **named):
        if any(f"trial-{n:04d}" in config.output_dir for n in numbers):
            raise error
        return real(config, *more, **named)

    monkeypatch.setattr(one_run, "train", train)


@pytest.mark.parametrize("error, reason", [
    (MemoryError("no room for 9 GB"), "out of memory: no room for 9 GB"),
    (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero")])
def test_a_trial_that_fails_is_recorded_and_the_search_goes_on(inputs, monkeypatch, capsys, error, reason):
    failing(monkeypatch, [0, 2], error)
    assert search(inputs, "--trials", "4", "--method", "random", "--finalists", "1", "--final_seeds", "1") == 0
    assert [(row["state"], row["reason"]) for row in table("runs/search")] == [
        ("fail", reason), ("complete", "finished"), ("fail", reason), ("complete", "finished")]
    assert f"failed :: trial 2: {reason}" in capsys.readouterr().out


def test_a_trial_that_diverges_is_recorded_as_such(inputs):
    assert search(inputs, "--method", "grid", "--finalists", "0", "--epochs", "30", "--optimizer", "sgd",
                  "--max_grad_norm", "0", space="lr=1e-3|1e6") == 0
    assert [(row["state"], row["reason"]) for row in table("runs/search")] == [
        ("complete", "finished"), ("fail", "diverged")]


def test_three_failures_of_the_first_three_end_the_search(inputs, monkeypatch, capsys):
    failing(monkeypatch, [0, 1, 2], ZeroDivisionError("division by zero"))
    with pytest.raises(ZeroDivisionError):
        search(inputs, "--trials", "8", "--method", "random")
    assert "the first 3 trials have failed, so the search ends: trial 0: ZeroDivisionError" in capsys.readouterr().err
    assert len(kept("sqlite:///runs/search/search.db")) == 3


def test_a_full_disk_ends_the_search_and_loses_nothing(inputs, monkeypatch, capsys):
    words = ("--trials", "3", "--method", "random", "--prune", "none", "--finalists", "0")
    with monkeypatch.context() as patch:
        failing(patch, [1], OSError(28, "No space left on device", "trial-0001/last"))
        assert search(inputs, *words) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [one.state.name for one in kept("sqlite:///runs/search/search.db")] == ["COMPLETE", "RUNNING"]
    assert search(inputs, *words) == 0
    assert [row["state"] for row in table("runs/search")] == ["complete"] * 3


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("change, words", [
    (["--space", "lr=log:1e-4..1e-2"], "the space is lr=log:1e-4..3e-2 batch_size=8|16|32 there"),
    (["--objective", "dev_loss"], "the objective is dev_acc there, dev_loss here"),
    (["--train", "OTHER"], "another search: the file train is another one; name"),
    (["--label_smoothing", "0.1"], "another search: --label_smoothing is not typed there, 0.1 here; name"),
    (["--epochs", "3"], "another search: --epochs is 1 there, 3 here; name"),
])
def test_a_storage_of_another_search_is_refused_by_name(inputs, capsys, change, words):
    base = ("--trials", "1", "--method", "random", "--finalists", "0", "--epochs", "1")
    assert search(inputs, *base) == 0
    before = Path("runs/search/search.db").read_bytes()
    other = write_split(Path("other-train.txt"), tiny_sentences(60, 9))
    changed = [str(other) if word == "OTHER" else word for word in change]
    assert search(inputs, *base, *changed) == 2
    said = capsys.readouterr().err
    assert "it belongs to another search" in said and words in said
    assert Path("runs/search/search.db").read_bytes() == before


@pytest.mark.parametrize("storage, words", [
    ("sqlite:////nowhere/at/all/search.db", "expected a file in a folder that there is"),
    ("postgresql://me:s3cret%21@127.0.0.1:1/x", "postgresql://me:***@127.0.0.1:1/x"),
    ("nosuch://x", "there is no storage of the kind nosuch"),
    ("postgresql://me:s3cr/et@127.0.0.1:1/x", "postgresql://me:***@127.0.0.1:1/x"),
    ("postgresql://127.0.0.1:1/x?user=me&password=s3cret", "postgresql://127.0.0.1:1/x?user=me&password=***"),
    ("postgresql://me:s3cret@127.0.0.1:abc/x", "postgresql://me:***@127.0.0.1:abc/x: this is no address"),
    ("sqlite://", "it names no file"),
    ("sqlite:///", "it names no file"),
    ("sqlite:///:memory:", "it names no file"),
    ("sqlite://x.db", "it names no file"),
    ("sqlite://me:s3cret@x.db", "sqlite://me:***@x.db: it names no file"),
    ("nowhere/at/all.journal", "expected a file in a folder that there is"),
])
def test_a_storage_that_cannot_be_reached_is_one_message_without_its_password(inputs, capsys, storage, words):
    assert search(inputs, "--trials", "1", "--storage", storage) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(said) == 1 and words in said[0] and "s3cr" not in said[0]


@pytest.mark.parametrize("content", [b"this is no storage\n" * 300, b"no line at all", b'{"a": 1}\n[2'])
@pytest.mark.parametrize("name, storage", [("x.db", "sqlite:///x.db"), ("x.journal", "x.journal")])
def test_a_file_that_is_no_storage_is_one_message_and_stays_as_it_is(inputs, capsys, name, storage, content):
    Path(name).write_bytes(content)
    assert search(inputs, "--trials", "1", "--storage", storage) == 2
    assert f"--storage {storage}: " in capsys.readouterr().err and Path(name).read_bytes() == content


def test_a_sqlite_file_is_no_journal_and_the_message_says_how_to_name_it(inputs, capsys):
    sqlite3.connect("own.db").execute("create table x (y)").connection.close()
    before = Path("own.db").read_bytes()
    assert search(inputs, "--trials", "1", "--storage", "own.db") == 2
    assert "write sqlite:///own.db" in capsys.readouterr().err and Path("own.db").read_bytes() == before


def test_the_trials_of_another_storage_are_not_taken_over(inputs, capsys):
    base = ("--trials", "1", "--method", "random", "--finalists", "0", "--epochs", "1")
    assert search(inputs, *base, "--storage", "a.journal") == 0
    assert search(inputs, *base, "--storage", "sqlite:///b.db") == 2
    assert "its trials are those of the storage" in capsys.readouterr().err and not Path("b.db").exists()


def test_a_folder_of_any_name_has_its_storage_in_it(inputs):
    base = ("--trials", "1", "--method", "random", "--finalists", "0", "--epochs", "1")
    assert search(inputs, *base, "--output_dir", "q?a %41#") == 0
    assert Path("q?a %41#/search.db").is_file() and len([*Path().iterdir()]) == 1
    Path("q?a %41#").rename("moved")
    assert search(inputs, *base, "--output_dir", "moved") == 0
    assert len(table("moved")) == 1


@pytest.mark.parametrize("more, words", [
    (["--space", "lrr=1|2"], "did you mean lr?"),
    (["--method", "grid"], "lr is a continuous range"),
    (["--method", "bohb", "--prune", "median"], "--method bohb prunes by hyperband"),
    (["--lr", "1e-3"], "--lr is typed and is in the space too"),
    (["--space", "n_layers=1|9"], "--n_layers 9: "),
    (["--space", "warmup_steps=1|1000"], "there is no run at warmup_steps 1000"),
    (["--objective", "dev_qwk", "--monitor", "dev_acc"], "needs --ordinal"),
    (["--seed", str(2**63 - 2)], "the seeds behind it are needed too"),
    (["--space", "lr=auto", "--method", "grid"], "lr=auto is a continuous range"),
])
def test_a_search_that_cannot_be_is_refused_before_anything_is_written(inputs, capsys, more, words):
    assert search(inputs, *more) == 2
    assert words in capsys.readouterr().err and not Path("runs").exists()


def test_the_folder_of_a_run_is_refused(inputs, capsys):
    Path("run").mkdir()
    Path("run/args.json").write_text("{}", encoding="utf-8")
    assert search(inputs, "--output_dir", "run") == 2
    assert "there is a run in this folder" in capsys.readouterr().err


# --------------------------------------------------------------------------- on a closed form


def drawn(method: str, seed: int, n: int, n_trials: int) -> optuna.Study:
    """The first n of so many trials; the value is the distance from the optimum, at lr 1e-3, dropout 0.3, decay 0.5."""
    space = spaces.parse("lr=log:1e-6..1e-1 hidden_dropout_prob=0..0.9 weight_decay=0..1")
    plan = study.Plan(space, method, "none", False, n_trials, 1, seed)
    done = optuna.create_study(direction="minimize")
    for _ in range(n):
        point = study.propose(plan, None, None, done.get_trials())
        value = ((math.log10(point["lr"]) + 3) / 5) ** 2 + (point["hidden_dropout_prob"] - 0.3) ** 2 + (
            point["weight_decay"] - 0.5) ** 2
        done.enqueue_trial(point)
        asked = done.ask()
        assert spaces.walk(space, partial(study.suggest, asked)) == point
        done.tell(asked, value)
    return done


def regret(method: str, seed: int, n: int = 30) -> float:
    """How far the best of n points is from the optimum."""
    return drawn(method, seed, n, n).best_value


def test_tpe_finds_an_optimum_better_than_chance():
    """Paired over seeds; benchmarks/bench_search_methods.py has 30 of them."""
    pairs = [(regret("tpe", seed), regret("random", seed)) for seed in range(6)]
    assert sum(tpe < chance for tpe, chance in pairs) >= 5, pairs


def test_gp_finds_an_optimum_better_than_tpe():
    """With so few trials and a smooth function a Gaussian process is by far the best, so one seed is enough."""
    assert regret("gp", 1, 14) < 0.2 * min(regret("tpe", 1, 14), regret("random", 1, 14))


def test_the_points_depend_on_the_seed_and_the_trials_alone():
    assert regret("tpe", 1, 14) == regret("tpe", 1, 14) != regret("tpe", 2, 14)


def test_a_search_that_is_extended_is_the_longer_one():
    def points(n_trials: int) -> list[dict]:
        return [one.params for one in drawn("tpe", 0, 12, n_trials).trials]

    assert points(12) == points(100)


def test_a_finalist_whose_seeds_have_failed_comes_behind_the_others(inputs, monkeypatch, capsys):
    real = one_run.train

    def train(config, *more, **named):
        if "final-0000-seed-1339" in config.output_dir:
            raise ZeroDivisionError("division by zero")
        return real(config, *more, **named)

    monkeypatch.setattr(one_run, "train", train)
    assert search(inputs, "--trials", "2", "--method", "random", "--prune", "none", "--finalists", "2",
                  "--final_seeds", "2") == 0
    said = capsys.readouterr().out
    assert "winner :: trial 1" in said and "(1 more seed failed)" in said


@pytest.mark.parametrize("score, objective, warning", [
    (0.5, "dev_acc", ""), (0.4, "dev_acc", "no better on dev than TF-IDF"),
    (0.2, "dev_acc", "no better on dev than the majority class and TF-IDF"), (0.2, "dev_loss", "")])
def test_the_winner_stands_beside_what_costs_nothing(capsys, score, objective, warning):
    ground = SimpleNamespace(baselines={"dev": metrics.Baseline(0.3, 0.4)}, objective=objective)
    finalists.compare_with_baselines(score, ground)
    said = capsys.readouterr()
    assert said.out == "dev baselines :: majority 0.300, tf-idf + logistic regression 0.400\n"
    assert (warning in said.err) if warning else not said.err


def test_what_pruning_saved_counts_the_evaluations_of_each_trial(inputs, monkeypatch, capsys):
    monkeypatch.setattr(study.Trials, "report", lambda self, asked, value, n: n >= 2 and asked.number > 0)
    assert search(inputs, "--method", "grid", "--prune", "median", "--finalists", "0",
                  space="eval_every=1|0.5|0.25 lr=1e-3") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("pruned")]
    # Two epochs of three steps: 2 evaluations, 4, and 6 (no four in an epoch of three steps).
    assert said == ["pruned :: 2 of 3 trials, after 4 of their 10 evaluations: 6 of the search's 12 were saved"]


def test_a_password_is_hidden_in_all_that_is_said():
    assert study.hidden("mysql+pymysql://me:secret@host:3306/x") == "mysql+pymysql://me:***@host:3306/x"
    assert study.hidden("sqlite:///search.db") == "sqlite:///search.db"
