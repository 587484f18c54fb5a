"""A run that goes on beyond what was asked for: --resume RUN --epochs 20; and what a finished run keeps for it."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_resume import assert_same_end, lines, main, posix, refused, stop_at

from commands import one_run
from formats import files
from training import state as states
from training.trainer import Loop

BASE = ["--batch_size", "16", "--lr", "3e-3", "--patience", "0", "--dropout", "0.1", "--ema", "0.5", "--keep_state"]
PATIENT = ["--batch_size", "16", "--lr", "1e-6", "--scheduler", "constant", "--epochs", "9", "--keep_state"]


class Kill(BaseException):
    """Ends the program at once, as SIGKILL does."""


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def ran(inputs, tmp_path_factory):
    """ran(options): a copy in the folder `name` of the undisturbed run with these options; each is run once."""
    done: dict[tuple[str, ...], Path] = {}

    def get(name: str, *options: str) -> Path:
        if options not in done:
            done[options] = tmp_path_factory.mktemp("straight") / "run"
            assert main("--option", "finetune", *inputs, *options, "--output_dir", done[options]) == 0
        return Path(shutil.copytree(done[options], name))
    return get


def args_of(run: Path) -> dict:
    return json.loads((run / "args.json").read_text(encoding="utf-8"))


# --------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("scheduler", [
    "constant", "step --step_size 5 --warmup_steps 3", "exponential --gamma 0.9 --warmup_steps 2",
    "plateau --plateau_patience 1 --warmup_steps 2", "inverse_sqrt --warmup_steps 3"])
def test_a_run_with_more_epochs_is_the_one_that_had_them_from_the_start(ran, scheduler, capsys):
    options = [*BASE, "--scheduler", *scheduler.split(), "--eval_every", "0.5"]
    run, expected = ran("run", *options, "--epochs", "2"), ran("long", *options, "--epochs", "3")
    capsys.readouterr()
    assert main("--resume", run, "--epochs", "3") == 0
    assert "schedule" not in capsys.readouterr().err
    assert_same_end(run, expected)
    described = args_of(run)
    assert described["options"] == {**args_of(expected)["options"], "output_dir": described["options"]["output_dir"]}
    assert described["extended"] == [{"option": "epochs", "from": 2, "to": 3, "step": 12}]


def test_where_the_schedule_had_other_rates_it_says_so_and_goes_on_with_the_new_one(ran, capsys):
    options = [*BASE, "--scheduler", "linear", "--warmup_steps", "0"]
    run, expected = ran("run", *options, "--epochs", "2"), ran("long", *options, "--epochs", "3")
    assert main("--resume", run, "--epochs", "3") == 0
    assert ("the linear schedule was laid over 2 epochs: the steps so far had other rates than in a run of 3 epochs; "
            "from here on it is that of 3 epochs\n") in capsys.readouterr().err
    rates = [[line["lr"] for line in lines(folder / "steps.jsonl")] for folder in (run, expected)]
    assert len(rates[0]) == 18 and rates[0][12:] == rates[1][12:] and rates[0][:12] != rates[1][:12]


def test_more_patience_is_as_if_it_had_been_there_from_the_start(ran, capsys):
    run, expected = ran("run", *PATIENT, "--patience", "1"), ran("long", *PATIENT, "--patience", "3")
    assert len(lines(run / "epochs.jsonl")) < len(lines(expected / "epochs.jsonl"))
    capsys.readouterr()
    assert main("--resume", run, "--patience", "3") == 0
    assert "schedule" not in capsys.readouterr().err
    assert_same_end(run, expected)


def test_a_kill_behind_a_larger_patience_does_not_undo_it(ran, monkeypatch, capsys):
    run, expected = ran("run", *PATIENT, "--patience", "1"), ran("long", *PATIENT, "--patience", "3")
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "run", lambda loop: (_ for _ in ()).throw(Kill()))
        with pytest.raises(Kill):
            main("--resume", run, "--patience", "3")
    capsys.readouterr()
    assert main("--resume", run) == 0
    assert capsys.readouterr().out.count("early stop") == 1
    assert_same_end(run, expected)


def test_more_epochs_do_not_undo_the_patience(ran, capsys):
    """Behind its last epoch no patience is asked for; the longer run would have stopped there."""
    options = [*PATIENT[:4], "--scheduler", "constant", "--patience", "2", "--keep_state"]
    run, expected = ran("run", *options, "--epochs", "3"), ran("long", *options, "--epochs", "9")
    assert lines(run / "epochs.jsonl") == lines(expected / "epochs.jsonl")
    assert "nothing more to train; give it a larger --patience" in refused(capsys, "--resume", run, "--epochs", "9")
    assert main("--resume", run, "--epochs", "4", "--patience", "0") == 0 and len(lines(run / "epochs.jsonl")) == 4


@posix
def test_a_run_that_was_stopped_goes_on_longer_too(inputs, ran, monkeypatch):
    options = [*BASE, "--scheduler", "constant"]
    expected = ran("long", *options, "--epochs", "3")
    stop_at(monkeypatch, (4, 9))
    assert main("--option", "finetune", *inputs, *options, "--epochs", "2", "--output_dir", "run") == 143
    assert main("--resume", "run", "--epochs", "3") == 143, "and is stopped again"
    assert main("--resume", "run") == 0
    assert_same_end(Path("run"), expected)


def test_more_steps_end_with_the_weights_of_the_longer_run(ran):
    """8 steps end within an epoch, where the longer run has no evaluation: that one stays in epochs.jsonl."""
    options = [*BASE, "--scheduler", "constant", "--epochs", "3"]
    run, expected = ran("run", *options, "--max_steps", "8"), ran("long", *options)
    assert main("--resume", run, "--max_steps", "99") == 0
    assert lines(run / "steps.jsonl") == lines(expected / "steps.jsonl")
    states_of = [[p.read_bytes() for p in folder.glob("last/*/tensors.safetensors")] for folder in (run, expected)]
    assert states_of[0] == states_of[1] and len(states_of[0]) == 1
    assert [line["step"] for line in lines(run / "epochs.jsonl")] == [6, 8, 12, 18]


def test_a_kill_between_the_result_and_args_json_leaves_a_run_that_goes_on(ran, monkeypatch):
    options = [*BASE, "--scheduler", "constant"]
    run, short, expected = (ran("run", *options, "--epochs", "2"), ran("short", *options, "--epochs", "2"),
                            ran("long", *options, "--epochs", "3"))
    real = files.write_json

    def killed(path, value):
        if path.name == "args.json":
            raise Kill
        real(path, value)

    with monkeypatch.context() as patch, pytest.raises(Kill):
        patch.setattr(files, "write_json", killed)
        main("--resume", run, "--epochs", "3")
    assert not (run / "result.json").exists() and "extended" not in args_of(run)
    again = Path(shutil.copytree(run, "again"))
    assert main("--resume", again) == 0
    assert_same_end(again, short)
    assert main("--resume", run, "--epochs", "3") == 0
    assert_same_end(run, expected)


def test_a_kill_behind_args_json_leaves_the_longer_run(ran, monkeypatch):
    """The states that are there still have the options of the shorter one: that is no edit."""
    options = [*BASE, "--scheduler", "constant"]
    run, expected = ran("run", *options, "--epochs", "2"), ran("long", *options, "--epochs", "3")
    with monkeypatch.context() as patch, pytest.raises(Kill):
        patch.setattr(one_run.Loop, "run", lambda loop: (_ for _ in ()).throw(Kill()))
        main("--resume", run, "--epochs", "3")
    assert main("--resume", run) == 0
    assert_same_end(run, expected)


# --------------------------------------------------------------------------- refusals


def test_what_cannot_go_on_longer_is_refused_by_name(ran, inputs, capsys):
    run = ran("run", *BASE, "--epochs", "2")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert "the run is finished" in refused(capsys, "--resume", run)
    assert "has begun its epoch 2 already" in refused(capsys, "--resume", run, "--epochs", "1")
    assert "has done 12 steps already" in refused(capsys, "--resume", run, "--max_steps", "5")
    assert "with --patience 7 there is nothing more to train" in refused(capsys, "--resume", run, "--patience", "7")
    assert "--lr is 0.003 in the run" in refused(capsys, "--resume", run, "--epochs", "3", "--lr", "0.1")
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}, "and nothing was changed"

    args = args_of(run)
    args["options"]["lr"] = 0.1
    args["extended"] = [{"option": "epochs", "from": 1, "to": 2, "step": 6}]
    (run / "args.json").write_text(json.dumps(args), encoding="utf-8")
    assert "it was changed after the run began: --lr" in refused(capsys, "--resume", run, "--epochs", "3")


def test_a_run_that_has_diverged_does_not_go_on(ran, capsys, monkeypatch):
    run = ran("run", *BASE, "--epochs", "2")
    (state,) = (run / "last").iterdir()
    values = (state / "state.json").read_text(encoding="utf-8")
    (state / "state.json").write_text(values.replace('["stopped", ""]', '["stopped", "diverged"]'), encoding="utf-8")
    assert "the run has diverged" in refused(capsys, "--resume", run, "--epochs", "3")


def test_a_series_does_not_go_on_longer(inputs, capsys):
    assert main("--option", "finetune", *inputs, *BASE[:4], "--epochs", "1", "--seeds", "2", "--output_dir", "s") == 0
    assert "all its runs are finished" in refused(capsys, "--resume", "s", "--epochs", "2")


# --------------------------------------------------------------------------- what a finished run keeps


def test_a_finished_run_keeps_its_state_only_where_it_is_asked_to(ran, capsys):
    options = BASE[:4] + ["--epochs", "1"]
    run, kept = ran("run", *options), ran("kept", *options, "--keep_state")
    assert not (run / "last").exists() and states.has_states(kept / "last")
    err = refused(capsys, "--resume", run, "--epochs", "2")
    assert "not run with --keep_state" in err and f"--pretrained_model_path {run} starts a new run from it" in err
    assert main("--resume", kept, "--epochs", "2") == 0
    assert main("--option", "evaluate", "--run", run) == 0


@pytest.mark.parametrize("moment", ["before", "within"])
def test_a_kill_while_the_state_goes_leaves_a_finished_run(inputs, ran, monkeypatch, capsys, moment):
    """The result is there first; a last/ that was left over, whole or half gone, harms nothing."""
    options = BASE[:4] + ["--epochs", "1"]
    expected, real = ran("straight", *options), files.remove_folder

    def killed(folder):
        if folder.name == "last":
            if moment == "within":
                os.replace(folder, folder.with_name(".last.tmp"))
                next((folder.parent / ".last.tmp").rglob("state.json")).unlink()
            raise Kill
        real(folder)

    monkeypatch.setattr(files, "remove_folder", killed)
    with pytest.raises(Kill):
        main("--option", "finetune", *inputs, *options, "--output_dir", "run")
    monkeypatch.setattr(files, "remove_folder", real)
    run = Path("run")
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert result["dev"] == json.loads((expected / "result.json").read_text(encoding="utf-8"))["dev"]
    assert "the run is finished" in refused(capsys, "--resume", run)
    assert main("--option", "evaluate", "--run", run) == 0
    assert main("--option", "finetune", *inputs, *options, "--output_dir", run, "--overwrite") == 0
    assert not (run / "last").exists() and not (run / ".last.tmp").exists()


def test_best_in_bfloat16_is_half_as_large_and_is_what_was_evaluated(ran, capsys):
    options = BASE[:4] + ["--epochs", "2", "--scheduler", "constant"]
    run, full = ran("run", *options, "--save_dtype", "bfloat16"), ran("full", *options)
    half, whole = (load_file(folder / "best/model.safetensors") for folder in (run, full))
    assert {t.dtype for t in half.values()} == {torch.bfloat16} and {t.dtype for t in whole.values()} == {torch.float32}
    assert all(torch.equal(half[name], whole[name].bfloat16()) for name in whole)
    assert lines(run / "steps.jsonl") == lines(full / "steps.jsonl"), "the training is that of float32"
    dev = {"run": (run / "dev-predictions.txt").read_bytes()}
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert main("--option", "evaluate", "--run", run, "--dev_out", "d.txt") == 0
    assert Path("d.txt").read_bytes() == dev["run"]
    other = json.loads((full / "result.json").read_text(encoding="utf-8"))
    assert result["dev"]["loss"] != other["dev"]["loss"], "what is stored is evaluated, not what was trained"
    assert abs(result["dev"]["loss"] - other["dev"]["loss"]) < 0.05
