"""A run folder may be damaged, half-replaced, or somebody else's: it is checked before it is trusted.

Nothing outside of it is written, no damage passes silently, and no kill leaves it without a best model.
"""

import hashlib
import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import exchange
from safetensors.torch import load_file, save_file
from test_faults import make_older
from test_resume import assert_same_end, flip, lines, main, refused, stop_at

from commands import job as jobs
from commands import one_run
from config import parse_args
from formats import files
from training import best as best_folder
from training import run_folder
from training import saved as saved_runs
from training import state as states

posix = pytest.mark.skipif(os.name != "posix", reason="signals, links and /dev are POSIX's")
TRAIN = ["--batch_size", "16", "--epochs", "2", "--lr", "3e-3", "--save_every", "2", "--eval_every", "0.5",
         "--patience", "0", "--keep_state"]


class Kill(BaseException):
    """Ends the program at once, as SIGKILL does."""


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> Path:
    """An undisturbed run of 12 steps and 4 evaluations."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main("--option", "finetune", *inputs, *TRAIN, "--output_dir", run) == 0
    return run


@pytest.fixture(scope="module")
def stopped(inputs, tmp_path_factory) -> Path:
    """The same run, stopped after step 8."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, (8,))
        assert main("--option", "finetune", *inputs, *TRAIN, "--output_dir", run) == 143
    return run


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def copy(run: Path, name: str = "run") -> Path:
    shutil.rmtree(name, ignore_errors=True)
    return Path(shutil.copytree(run, name))


def sealed(values: dict) -> dict:
    """The values with the checksum that an attacker would make anew."""
    plain = {k: v for k, v in values.items() if k != "sha256"}
    return {**plain, "sha256": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}


def edit(path: Path, change, seal: bool = True) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(sealed(values) if seal else values), encoding="utf-8")


def edit_state(run: Path, change) -> None:
    """Change the newest state's values, by the key, and its manifest with them."""
    state = states._states(run / "last")[0]
    values = json.loads((state / "state.json").read_text(encoding="utf-8"))
    change(values)
    (state / "state.json").write_text(json.dumps(values), encoding="utf-8")
    manifest = json.loads((state / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"]["state.json"] = {"bytes": (state / "state.json").stat().st_size,
                                       "sha256": files.sha256(state / "state.json")}
    (state / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def put(values: dict, key: str, value) -> None:
    """Replace a pair of a nest; None removes it."""
    values["dict"] = [pair for pair in values["dict"] if pair[0] != key]
    if value is not None:
        values["dict"].append([key, value])


def nest(**values) -> dict:
    return {"dict": [[k, v] for k, v in values.items()]}


def part(values: dict, key: str) -> dict:
    return dict(values["dict"])[key]


def one_line(capsys, *argv) -> str:
    """The refusal: a message on one line, exit code 2."""
    err = refused(capsys, *argv)
    return next(line for line in err.splitlines() if "run_llama.py: error: " in line)


EVALUATE = ["--option", "evaluate", "--run", "run"]
PREDICT = ["--option", "predict", "--run", "run", "--input", "some.txt"]


# --------------------------------------------------------------------------- nothing outside is written


@pytest.mark.parametrize("logs", [{"../victim.txt": 3}, {"args.json": 3}, {"steps.jsonl": -1}, {"steps.jsonl": 1.5},
                                  {"steps.jsonl": "3"}, {"steps.jsonl": True}], ids=str)
def test_a_state_can_cut_nothing_but_the_logs(stopped, capsys, logs):
    run = copy(stopped)
    Path("victim.txt").write_text("precious", encoding="utf-8")
    edit_state(run, lambda values: put(values, "logs", nest(**logs)))
    before = (run / "args.json").read_bytes()
    assert "logs is " in one_line(capsys, "--resume", run)
    assert Path("victim.txt").read_text(encoding="utf-8") == "precious" and (run / "args.json").read_bytes() == before


@posix
def test_a_file_outside_is_written_only_when_it_is_typed_again(stopped, finished, inputs, capsys, monkeypatch):
    run, victim = copy(stopped), Path("victim.txt").resolve()
    victim.write_text("precious", encoding="utf-8")
    shutil.rmtree(run / "last")  # its states have the options, too
    (run / "inside").symlink_to(victim.parent)
    for path in (str(victim), "run/../victim.txt", "run/inside/victim.txt"):
        for name in ("dev_out", "test_out"):
            edit(run / "args.json", lambda args, n=name, p=path: args["options"].update(
                {"dev_out": None, "test_out": None, n: p}))
            assert f"type --{name} {path} again" in one_line(capsys, "--resume", "run")
    assert victim.read_text(encoding="utf-8") == "precious"

    stop_at(monkeypatch, (8,))
    outputs = ["--dev_out", str(victim), "--test_out", "own/run's.txt"]
    assert main("--option", "finetune", *inputs, *TRAIN, "--output_dir", "own", *outputs) == 143
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"stopped; go on with: python run_llama.py --resume own --dev_out {victim}"
    assert f"type --dev_out {victim} again" in one_line(capsys, "--resume", "own")
    assert main(*said.split()[-4:]) == 0
    assert victim.read_bytes() == (finished / "dev-predictions.txt").read_bytes()


@posix
@pytest.mark.parametrize("name", ["steps.jsonl", "epochs.jsonl", "events.jsonl", "args.json", "result.json", ".lock",
                                  "dev-predictions.txt", "test-predictions.txt", "last", "best",
                                  "best/model.safetensors", "best/manifest.json", "pipe"])
def test_inside_a_run_folder_no_link_is_followed(stopped, inputs, capsys, name):
    run, victim = copy(stopped), Path("victim")
    Path("some.txt").write_text("good\n", encoding="utf-8")
    if name == "pipe":  # to open one waits for the other end
        (run / "steps.jsonl").unlink()
        os.mkfifo(run / "steps.jsonl")
    else:
        if (run / name).exists():
            (run / name).rename(victim)
        else:
            victim.write_text("precious", encoding="utf-8")
        (run / name).symlink_to(victim.resolve())
    before = {p: p.read_bytes() for p in [victim, *victim.rglob("*")] if p.is_file()}
    said = f"{run / 'steps.jsonl'}: this is not a regular file" if name == "pipe" else (
        f"{run / name}: this is a symbolic link")
    for command in (["--resume", run], EVALUATE, PREDICT,
                    ["--option", "finetune", *inputs, *TRAIN, "--output_dir", run, "--overwrite"]):
        assert said in one_line(capsys, *command), command
    assert before == {p: p.read_bytes() for p in [victim, *victim.rglob("*")] if p.is_file()}


@posix
def test_the_run_folder_itself_may_be_a_link(stopped, finished):
    copy(stopped, "elsewhere")
    Path("run").symlink_to("elsewhere")
    assert main("--resume", "run") == 0 and main(*EVALUATE) == 0
    Path("typed.txt").write_text("", encoding="utf-8")
    Path("link.txt").symlink_to("typed.txt")
    assert main(*EVALUATE, "--dev_out", "link.txt") == 0
    assert Path("link.txt").is_symlink() and Path("typed.txt").read_bytes() == (
        finished / "dev-predictions.txt").read_bytes(), "a link that was typed is the person's own"


# --------------------------------------------------------------------------- best/


def zero(best: Path) -> None:
    save_file({k: torch.zeros_like(v) for k, v in load_file(best / "model.safetensors").items()},
              best / "model.safetensors")


def change_config(best: Path, change) -> None:
    edit(best / "config.json", change, seal=False)


DAMAGES = {
    "a bit of a weight": ("model.safetensors", lambda best: flip(best / "model.safetensors", 0.7)),
    "weights of zero": ("model.safetensors", zero),
    "eps": ("config.json", lambda best: change_config(best, lambda c: c["llama"].update(layer_norm_eps=1e-4))),
    "theta": ("config.json", lambda best: change_config(best, lambda c: c["llama"].update(rope_theta=20000.0))),
    "names in another order": ("config.json", lambda best: change_config(best, lambda c: c["label_names"].reverse())),
    "another tokenizer": ("tokenizer.json", lambda best: flip(best / "tokenizer.json", 0.5)),
    "no tokenizer settings": ("tokenizer_config.json", lambda best: (best / "tokenizer_config.json").unlink()),
    "one more tokenizer": ("tokenizer.model", lambda best: (best / "tokenizer.model").write_bytes(b"")),
    "half a manifest": ("manifest.json", lambda best: os.truncate(best / "manifest.json", 99)),
}


@posix
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_best_model_that_has_changed_is_refused_by_its_file(stopped, capsys, damage):
    run = copy(stopped)
    Path("some.txt").write_text("good\n", encoding="utf-8")
    name, change = DAMAGES[damage]
    change(run / "best")
    for command in (["--resume", run], EVALUATE, PREDICT, [*EVALUATE[:-1], "run/best"]):
        assert f"{run / 'best' / name} " in one_line(capsys, *command), command
    assert not (run / "result.json").exists()


@posix
def test_a_best_model_of_another_run_and_one_without_a_manifest(stopped, finished, capsys):
    run = copy(stopped)
    shutil.rmtree(run / "best")
    shutil.copytree(finished / "best", run / "best")
    digests = [files.sha256(where / "best/manifest.json") for where in (stopped, finished)]
    assert digests[0] != digests[1], "else this would show nothing"
    assert "manifest.json is not that of the run's best evaluation" in one_line(capsys, "--resume", run)
    run = copy(finished)
    make_older(run)
    assert main(*EVALUATE) == 0
    out, err = capsys.readouterr()
    assert err.count("an older version wrote it, without checksums") == 1 and "dev acc ::" in out
    run = copy(stopped)
    (run / "best/manifest.json").unlink()
    assert "manifest.json is gone" in one_line(capsys, "--resume", run)
    for command in (EVALUATE, PREDICT):  # args.json has an id: this version wrote it, and a manifest too
        Path("some.txt").write_text("good\n", encoding="utf-8")
        assert "manifest.json, with the checksums, is gone" in one_line(capsys, *command)
    run = copy(finished)
    shutil.rmtree(run / "best")
    shutil.copytree(stopped / "best", run / "best")  # whole, but not the finished run's
    for command in (EVALUATE, PREDICT, (*EVALUATE[:-1], "run/best")):
        assert "manifest.json is not that of the run's best evaluation" in one_line(capsys, *command)


@posix
def test_a_kill_at_any_rename_of_best_leaves_one_that_loads_and_the_same_end(inputs, finished, capsys, monkeypatch):
    """The third evaluation's: before, between and after the two renames, and before the state that knows of it."""
    n_best = [0]
    real_save, real_replace, real_state = saved_runs.save_classifier, os.replace, states.save_state

    def save(*arguments):
        n_best[0] += 1
        return real_save(*arguments)

    monkeypatch.setattr(saved_runs, "save_classifier", save)
    assert main("--option", "finetune", *inputs, *TRAIN, "--output_dir", "count") == 0
    assert n_best[0] >= 3, "else there is nothing to replace"
    for moment in range(5):
        n_best[0], renames, run = 0, [], Path(f"run-{moment}")

        def replace(source, target, moment=moment, renames=renames):
            is_best = n_best[0] == 3 and "best" in (Path(source).name.strip("."), Path(target).name.strip("."))
            renames.extend([target] * is_best)
            if is_best and moment in (0, 1) and len(renames) == moment + 1:
                raise Kill
            real_replace(source, target)
            if is_best and moment == 2 and len(renames) == 2:
                raise Kill

        def state(*arguments, moment=moment):
            if n_best[0] == 3 and moment == 3:
                raise Kill
            real_state(*arguments)
            if n_best[0] == 3 and moment == 4:
                raise Kill

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            patch.setattr(states, "save_state", state)
            with pytest.raises(Kill):
                main("--option", "finetune", *inputs, *TRAIN, "--output_dir", run)
        n_best[0] = 9
        capsys.readouterr()
        assert main("--option", "evaluate", "--run", run) == 0
        assert "without checksums" not in capsys.readouterr().err
        assert main("--resume", run) == 0
        for name in PREDICTIONS:
            (run / name).write_bytes((finished / name).read_bytes())  # evaluate wrote them in between
        assert_same_end(run, finished)


PREDICTIONS = ("dev-predictions.txt", "test-predictions.txt")


def test_best_goes_back_to_the_one_that_the_state_knows(tmp_path):
    """A resume on another machine might not make the newer one again."""
    for i, name in enumerate((".best.old", "best")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(str(i), encoding="utf-8")
    best_folder.restore_best(tmp_path / "best", files.sha256(tmp_path / ".best.old/manifest.json"))
    assert (tmp_path / "best/manifest.json").read_text(encoding="utf-8") == "0"
    assert os.listdir(tmp_path) == ["best"]


@posix
def test_outputs_that_are_not_finite_are_an_error(inputs, finished, capsys, monkeypatch):
    run = copy(finished)
    Path("some.txt").write_text("good\n", encoding="utf-8")
    weights = load_file(run / "best/model.safetensors")
    weights["llama.norm.weight"][:] = float("nan")
    save_file(weights, run / "best/model.safetensors")
    make_older(run)
    before = (run / "dev-predictions.txt").read_bytes()
    for command in (EVALUATE, PREDICT):
        assert "is not finite (NaN or infinity)" in one_line(capsys, *command)
    assert (run / "dev-predictions.txt").read_bytes() == before

    real = jobs.build_job

    def start(*arguments):
        made = real(*arguments)
        losses = made.task.losses
        exchange(made.task, losses=lambda batch: losses(batch) * float("nan"))
        return made

    monkeypatch.setattr(jobs, "build_job", start)
    err = one_line(capsys, "--option", "finetune", *inputs, *TRAIN, "--guards", "off", "--output_dir", "nan")
    assert "is not finite" in err and not Path("nan/result.json").exists()


# --------------------------------------------------------------------------- args.json


@posix
@pytest.mark.parametrize("name, value", [("lr", 4e-3), ("seed", 1338), ("label_smoothing", 0.1), ("epochs", 3)])
def test_an_option_that_was_edited_is_named(stopped, capsys, name, value):
    for seal in (False, True):  # a careless hand, and one that makes the checksum anew
        run = copy(stopped)
        edit(run / "args.json", lambda args: args["options"].update({name: value}), seal)
        assert f"--{name} is {value}, and was " in one_line(capsys, "--resume", run)
    shutil.rmtree(run / "last")
    edit(run / "args.json", lambda args: args["options"].update({name: value + 1}), seal=False)
    for command in (["--resume", run], EVALUATE):
        assert "it was changed after the run began" in one_line(capsys, *command)


ODD = [("epochs", "3"), ("epochs", 0), ("epochs", 1.5), ("epochs", True), ("lr", "1e-3"), ("lr", -1), ("lr", None),
       ("lr", float("nan")), ("label_smoothing", 9), ("patience", []), ("scheduler", "none"), ("scheduler", 3),
       ("milestones", "10"), ("milestones", []), ("milestones", ["a"]), ("milestones", [3, 2]), ("device", 7),
       ("deterministic", 1), ("folds", 1), ("fold", 3), ("seed", 2**70), ("dropout", {}), ("unknown", 1),
       ("output_dir", ""), ("device", "a\0b")]


@posix
def test_saved_options_go_through_the_parsers_checks(stopped, capsys):
    run = copy(stopped)
    shutil.rmtree(run / "last")
    whole = (run / "args.json").read_bytes()
    for name, value in ODD:
        (run / "args.json").write_bytes(whole)
        edit(run / "args.json", lambda args, n=name, v=value: args["options"].update({n: v}))
        assert f"--{name}" in one_line(capsys, "--resume", run), (name, value)


ODD_ARGS = [
    lambda a: a.pop("options"), lambda a: a.update(options=[]), lambda a: a.pop("given"), lambda a: a.update(given=3),
    lambda a: a.update(given=[1]), lambda a: a.update(device=None), lambda a: a.update(versions=[]),
    lambda a: a.update(files=[]), lambda a: a.update(files={}), lambda a: a["files"].pop("dev"),
    lambda a: a["files"].update(dev="x"), lambda a: a["files"]["dev"].update(path=3),
    lambda a: a["files"]["dev"].update(sha256=3), lambda a: a["files"]["dev"].update(path="a\0b"),
    lambda a: a["files"]["dev"].update(path="/dev/zero"), lambda a: a["files"]["dev"].update(path="."),
    lambda a: a["files"]["label_names"].update(path="/dev/zero"), lambda a: a["files"].pop("weights"),
    lambda a: a["files"].update(weights={"path": "/dev/zero"}), lambda a: a["files"]["train"].update(path="/dev/zero"),
]


@posix
def test_an_odd_description_is_a_message(stopped, capsys):
    run = copy(stopped)
    shutil.rmtree(run / "last")
    edit(run / "args.json", lambda a: a["files"].update(label_names={"path": "names.json"}))
    whole = (run / "args.json").read_bytes()
    for i, change in enumerate(ODD_ARGS):
        (run / "args.json").write_bytes(whole)
        edit(run / "args.json", change)
        assert "args.json" in one_line(capsys, "--resume", run), i
        if i not in (8, 9, 17):  # without dev, the test file is evaluated; the weights are not looked at
            assert "args.json" in one_line(capsys, *EVALUATE), i
    (run / "args.json").write_bytes(whole)
    edit(run / "args.json", lambda a: a["files"].update(weights={"path": "smollm2-135m"}))  # it would be fetched
    assert "smollm2-135m has changed or is gone" in one_line(capsys, "--resume", run)


ODD_RESULTS = [
    "[]", "{", '{"best_epoch": "x"}', '{"best_epoch": 1, "stopped": 3, "dev": {"acc": 1}}',
    '{"best_epoch": 1, "stopped": "x"}', '{"best_epoch": 1, "stopped": "x", "dev": 3}',
    *('{"best_epoch": 1, "stopped": "x", "dev": {"acc": 1}, "baselines": ' + odd + '}' for odd in (
        "3", "[1]", '{"dev": 3}', '{"dev": {}}', '{"dev": {"majority": "x", "tfidf": 1}}')),
]


def test_an_odd_result_is_a_message_and_a_changed_one_is_noticed(finished, capsys):
    run = copy(finished)
    whole = (run / "result.json").read_text(encoding="utf-8")
    for odd in ODD_RESULTS:
        (run / "result.json").write_text(odd, encoding="utf-8")
        assert "result.json" in one_line(capsys, *EVALUATE), odd
    for key in ('"majority": 0.', '"acc": 0.'):
        (run / "result.json").write_text(whole.replace(key, key + "1", 1), encoding="utf-8")
        assert "it was changed after the run wrote it" in one_line(capsys, *EVALUATE)


# --------------------------------------------------------------------------- states


ODD_STATES = {
    "no progress": lambda v: put(v, "progress", None),
    "progress of text": lambda v: put(v, "progress", "x"),
    "step of text": lambda v: put(part(v, "progress"), "step", "x"),
    "step below 0": lambda v: put(part(v, "progress"), "step", -1),
    "window beyond": lambda v: put(part(v, "progress"), "window", 999),
    "epoch beyond": lambda v: put(part(v, "progress"), "epoch", 999),
    "evaluated beyond": lambda v: put(part(v, "progress"), "evaluated", 9),
    "micro-batch of 0": lambda v: put(part(v, "progress"), "micro_batch", 0),
    "recent of text": lambda v: put(part(v, "progress"), "recent", {"list": ["x"]}),
    "best without values": lambda v: put(part(v, "progress"), "best", nest(epoch=1)),
    "no logs": lambda v: put(v, "logs", None),
    "checksums of text": lambda v: put(v, "log_sha256", "x"),
    "no model": lambda v: put(v, "model", None),
    "model of nothing": lambda v: put(v, "model", nest()),
    "tensor that is not there": lambda v: put(v, "model", {"tensor": "nowhere"}),
    "no optimizer": lambda v: put(v, "optimizer", None),
    "optimizer of nothing": lambda v: put(v, "optimizer", nest()),
    "betas of text": lambda v: put(part(part(v, "optimizer"), "param_groups")["list"][0], "betas", "x"),
    "moments of text": lambda v: put(part(part(v, "optimizer"), "state"), 0, nest(exp_avg="x")),
    "random of text": lambda v: put(v, "random", nest(cpu="x")),
    "two kinds": lambda v: v.update(list=[]),
    "no pairs": lambda v: v.update(dict=[1]),
    "nothing": lambda v: v.clear(),
}


@posix
@pytest.mark.parametrize("odd", ODD_STATES)
def test_an_odd_state_is_a_message(stopped, capsys, odd):
    run = copy(stopped)
    shutil.rmtree(states._states(run / "last")[1])
    edit_state(run, ODD_STATES[odd])
    edit(run / "args.json", lambda args: args.pop("id", None))  # an attacker can make them belong together
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(states, "run_of", lambda state: {}, raising=False)
        assert f"{run / 'last'}" in one_line(capsys, "--resume", run)
    assert not (run / "result.json").exists()


@posix
def test_a_state_of_another_version_says_so(stopped, capsys):
    run = copy(stopped)

    def change(values):
        put(part(values, "progress"), "spikes", None)
        put(part(values, "progress"), "spaikes", 1)

    edit_state(run, change)
    err = one_line(capsys, "--resume", run)
    assert "of another version of this program (it lacks spikes; it also has spaikes)" in err


# --------------------------------------------------------------------------- which run, which state, which result


@posix
def test_a_new_run_never_goes_on_from_the_states_of_an_old_one(inputs, stopped, finished, capsys, monkeypatch):
    """Killed before its first state, in a folder where an old run's last/ was left."""
    def killed(*arguments):
        raise Kill

    with monkeypatch.context() as patch:
        patch.setattr(states, "save_state", killed)
        with pytest.raises(Kill):
            main("--option", "finetune", *inputs, *TRAIN, "--output_dir", "run")
    shutil.copytree(stopped / "last", "run/last")
    assert main("--resume", "run") == 0
    err = capsys.readouterr().err
    assert err.count("this state belongs to another run") == 2 and "resuming run at step 0" in err
    assert_same_end(Path("run"), finished)


@posix
def test_a_kill_inside_overwrite_leaves_no_state_beside_a_new_run(inputs, stopped, monkeypatch):
    """At every removal: as long as there is a state, the args.json that it belongs to is there."""
    for moment in range(40):
        run, left = copy(stopped), [moment]

        def killing(real, left=left):
            def do(*arguments, **more):
                if "run" in str(arguments[0]):
                    left[0] -= 1
                    if left[0] < 0:
                        raise Kill
                return real(*arguments, **more)
            return do

        with monkeypatch.context() as patch:
            patch.setattr(run_folder.shutil, "rmtree", killing(shutil.rmtree))
            patch.setattr(Path, "unlink", killing(Path.unlink))
            patch.setattr(os, "replace", killing(os.replace))
            patch.setattr(one_run, "train", lambda config, *_, **__: run_folder.open_run(config) and {"stopped": ""})
            try:
                main("--option", "finetune", *inputs, *TRAIN, "--output_dir", run, "--overwrite")
            except Kill:
                assert (run / "args.json").exists() or not states.has_states(run / "last")
                continue
        assert moment > 5 and not (run / "args.json").exists() and not (run / "last").exists()
        return
    raise AssertionError("it never came to its end")


@posix
def test_lr_find_takes_the_lock_and_a_series_result_is_not_a_runs(inputs, stopped, finished, capsys):
    Path("find").mkdir()
    with run_folder.RunFolder("find").lock():
        err = one_line(capsys, "--option", "lr_find", *inputs, *TRAIN, "--lr_steps", "12", "--output_dir", "find")
        assert "another process is training in this folder" in err
    assert os.listdir("find") == [".lock"]
    run = copy(stopped)
    (run / "result.json").write_text('{"runs": ["seed-1"]}', encoding="utf-8")  # of a series that was here before
    assert main("--resume", run) == 0
    assert_same_end(run, finished)


@posix
def test_a_resume_does_not_ask_for_the_files_of_generate(stopped, finished):
    run = copy(stopped)
    Path("generated-sentence-temp-0.txt").mkdir()  # it could not be written, as in a read-only folder
    assert main("--resume", run) == 0
    assert_same_end(run, finished)


@posix
def test_a_kill_around_the_result_leaves_one_state(stopped, finished, monkeypatch):
    real = run_folder.RunFolder.save_result
    for is_before in (True, False):
        run = copy(stopped)

        def save_result(*arguments, is_before=is_before):
            if not is_before:
                real(*arguments)
            raise Kill

        with monkeypatch.context() as patch:
            patch.setattr(run_folder.RunFolder, "save_result", save_result)
            with pytest.raises(Kill):
                main("--resume", run)
        if is_before:
            assert main("--resume", run) == 0
        assert_same_end(run, finished)


@posix
@pytest.mark.parametrize("name", ["steps.jsonl", "epochs.jsonl"])
def test_a_log_that_was_damaged_before_the_cut_is_said(stopped, finished, capsys, name):
    run = copy(stopped)
    text = (run / name).read_text(encoding="utf-8").splitlines(keepends=True)
    (run / name).write_text("".join([text[0].replace("{", "#", 1), *text[1:]]), encoding="utf-8")
    assert main("--resume", run) == 0
    err = capsys.readouterr().err
    assert f"{run / name}: damaged: its first " in err and "the first line that cannot be read is 1" in err
    assert lines(run / "steps.jsonl" if name == "epochs.jsonl" else run / "epochs.jsonl") == lines(
        finished / ("steps.jsonl" if name == "epochs.jsonl" else "epochs.jsonl"))
    run = copy(stopped)
    digit = text[0].replace('"step": ', '"step": 9', 1)
    (run / name).write_text("".join([digit, *text[1:]])[: len("".join(text))], encoding="utf-8")
    assert main("--resume", run) == 0 and f"{run / name}: damaged" in capsys.readouterr().err
    run = copy(stopped)
    assert main("--resume", run) == 0 and "damaged" not in capsys.readouterr().err


def test_what_generate_wrote_before_stays_until_the_new_text_is_whole(inputs, monkeypatch, capsys):
    Path("low.txt").write_text("old", encoding="utf-8")
    real = os.replace

    def fails(source, target):
        if Path(target).name == "low.txt":
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", fails)
    err = one_line(capsys, "--option", "generate", *inputs[:2], "--max_new_tokens", "3",
                   "--generated_sentence_low_temp_out", "low.txt")
    assert "low.txt" in err and Path("low.txt").read_text(encoding="utf-8") == "old"


# --------------------------------------------------------------------------- what a command may replace, and what not


@pytest.mark.parametrize("own", ["args.json", "steps.jsonl", "events.jsonl", "result.json", ".lock", "best/x.txt",
                                 "best", "last/x.txt", ".best.old/x", "."])
def test_a_typed_output_is_none_of_a_runs_own_files(finished, stopped, inputs, capsys, own):
    run, other = copy(finished), copy(stopped, "other")
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    for where, *command in ((run, *EVALUATE), (other, *EVALUATE), (other, "--resume", other),
                            (other, *EVALUATE[:-1], "other/best"),
                            (Path("new"), "--option", "finetune", *inputs, "--output_dir", "new")):
        for name in ("dev_out", "test_out"):
            err = one_line(capsys, *command, f"--{name}", where / own)
            assert f"--{name}" in err, err
            assert "belongs to the run itself" in err or "is a folder" in err, err
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


def test_a_typed_output_beside_a_runs_own_files_is_written(finished, capsys):
    run = copy(finished)
    for name in ("mine.txt", "dev-predictions.txt", "more/mine.txt"):
        (run / name).unlink(missing_ok=True)
        assert main(*EVALUATE, "--dev_out", run / name) == 0
        assert (run / name).read_bytes() == (finished / "dev-predictions.txt").read_bytes()


def test_evaluating_best_writes_nothing_into_it(finished, capsys):
    run = copy(finished)
    for path in run.glob("*-predictions.txt"):
        path.unlink()
    before = sorted(path.name for path in (run / "best").iterdir())
    assert main(*EVALUATE[:-1], "run/best") == 0
    assert sorted(path.name for path in (run / "best").iterdir()) == before
    assert (run / "dev-predictions.txt").read_bytes() == (finished / "dev-predictions.txt").read_bytes()


LR_FIND = ["--option", "lr_find", "--lr_steps", "12", "--batch_size", "16", "--output_dir", "run"]


@pytest.mark.parametrize("name", ["result.json", "lr_find.csv", "lr_find.png"])
def test_somebody_elses_file_is_replaced_only_when_asked(inputs, capsys, name):
    run = Path("run")
    run.mkdir()
    (run / name).write_text('{"mine": 1}', encoding="utf-8")
    commands = [LR_FIND] + [["--option", "finetune", *TRAIN, "--output_dir", "run"]] * (name == "result.json")
    for command in commands:
        assert "--overwrite allows that" in one_line(capsys, *command, *inputs)
        assert (run / name).read_text(encoding="utf-8") == '{"mine": 1}'
        assert main(*command, *inputs, "--overwrite") == 0
        assert (run / name).read_bytes() != b'{"mine": 1}'
        (run / "result.json").write_text('{"mine": 1}', encoding="utf-8")
        shutil.rmtree(run / "best", ignore_errors=True)


def test_a_second_range_test_that_is_stopped_leaves_the_first_ones_files(inputs, capsys):
    assert main(*LR_FIND, *inputs) == 0
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    assert "--overwrite allows that" in one_line(capsys, *LR_FIND, *inputs)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, (5,))
        assert main(*LR_FIND, *inputs, "--overwrite") == 143
    assert {path.name: path.read_bytes() for path in Path("run").iterdir()} == before
    assert main("--option", "finetune", *TRAIN, *inputs, "--output_dir", "run") == 0, "its result.json makes way"


def test_overwriting_a_series_leaves_none_of_its_runs(inputs, capsys):
    series = ["--option", "finetune", *inputs, "--batch_size", "32", "--epochs", "1", "--output_dir", "run"]
    assert main(*series, "--seeds", "2") == 0
    Path("run/seed-x").mkdir()
    (Path("run/seed-1337") / "notes.txt").write_text("mine", encoding="utf-8")
    assert main(*series, "--overwrite") == 0
    left = {str(path) for path in Path("run").rglob("*") if path.is_file() and path.parts[1].startswith("seed")}
    assert left == {str(Path("run/seed-1337/notes.txt"))} and not Path("run/seed-1338").exists()
    assert Path("run/seed-x").is_dir() and Path("run/best").is_dir()


def test_data_that_has_moved_may_be_named_on_a_resume(stopped, finished, tiny_model, capsys):
    run = copy(stopped)
    described = json.loads((run / "args.json").read_text(encoding="utf-8"))
    options = {"train": "train", "dev": "dev", "test": "test", "tokenizer": "tokenizer",
               "weights": "pretrained_model_path"}
    moved, typed = Path("moved"), []
    moved.mkdir()
    for name, option in options.items():
        path = Path(described["files"][name]["path"])
        copied = (shutil.copytree if path.is_dir() else shutil.copy)(path, moved / path.name)
        described["files"][name]["path"] = str(Path("gone") / path.name)
        typed += [f"--{option}", str(copied)]
    (run / "args.json").write_text(json.dumps(sealed(described)), encoding="utf-8")
    err = one_line(capsys, "--resume", run)
    assert all(f"say --{option} PATH" in err for option in options.values())
    whole = (moved / "toy-dev.txt").read_bytes()
    (moved / "toy-dev.txt").write_bytes(whole.replace(b"film", b"fiim", 1))
    assert "toy-dev.txt has changed or is gone" in one_line(capsys, "--resume", run, *typed)
    (moved / "toy-dev.txt").write_bytes(whole)
    assert main("--resume", run, *typed) == 0
    assert_same_end(run, finished)


def test_a_folder_of_weights_that_has_changed_is_refused(inputs, tiny_model, capsys, monkeypatch):
    model = copy(tiny_model, "model")
    stop_at(monkeypatch, (3,))
    assert main("--option", "finetune", *inputs, *TRAIN, "--pretrained_model_path", model, "--output_dir", "run") == 143
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"@")
    assert "model has changed or is gone" in one_line(capsys, "--resume", "run")


def test_predictions_may_go_elsewhere_on_a_resume(inputs, finished, capsys, monkeypatch):
    stop_at(monkeypatch, (8,))
    assert main("--option", "finetune", *inputs, *TRAIN, "--output_dir", "old", "--dev_out", "old/mine.txt") == 143
    Path("old").rename("new")
    assert "type --dev_out" in one_line(capsys, "--resume", "new")
    assert main("--resume", "new", "--dev_out", "new/mine.txt") == 0
    assert Path("new/mine.txt").read_bytes() == (finished / "dev-predictions.txt").read_bytes()
    assert not Path("old").exists()


def test_evaluate_tells_of_data_that_is_gone_and_of_data_without_a_checksum(finished, capsys):
    run = copy(finished)

    def forget(name, change):
        described = json.loads((finished / "args.json").read_text(encoding="utf-8"))
        change(described["files"][name])
        (run / "args.json").write_text(json.dumps(sealed(described)), encoding="utf-8")

    forget("dev", lambda file: file.pop("sha256"))
    assert main(*EVALUATE) == 0
    err = capsys.readouterr().err
    assert "the run has no checksum of it" in err and "has changed" not in err
    forget("dev", lambda file: file.update(path="gone.txt"))
    assert "gone.txt: the run's dev file is not there any more" in (err := one_line(capsys, *EVALUATE))
    assert "--dev FILE" in err


def test_a_zero_byte_in_a_path_is_a_message(capsys):
    for name in ("run", "dev_out", "train"):
        assert main("--option", "evaluate", f"--{name}", "a\0b") == 2
        assert f"--{name}: there is a zero byte in it" in capsys.readouterr().err


# --------------------------------------------------------------------------- making one


def test_a_default_folder_that_exists_gets_a_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse_args(["--option", "finetune", "--epochs", "3", "--lr", "1e-5"])
    assert [run_folder.open_run(config).path.name for _ in range(3)] == [
        "finetune-3-1e-05", "finetune-3-1e-05-2", "finetune-3-1e-05-3"]


def test_a_folder_with_a_run_is_refused_without_overwrite(tmp_path):
    config = parse_args(["--output_dir", str(tmp_path / "run")])
    folder = run_folder.open_run(config).path
    assert run_folder.open_run(config).path == folder  # still empty
    for name in ("args.json", "result.json"):
        (folder / name).write_text("{}", encoding="utf-8")
    (folder / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(FileExistsError, match="--overwrite"):
        run_folder.open_run(config)
    run_folder.open_run(replace(config, overwrite=True))
    assert {p.name for p in folder.iterdir()} == {"mine.txt", ".lock"}


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    for bad in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="file"):
            run_folder.open_run(parse_args(["--output_dir", str(bad)]))


# --------------------------------------------------------------------------- which code it was


def test_the_code_of_a_run_is_dirty_where_a_tracked_program_differs_from_the_commit(tmp_path):
    def git(*words: str) -> str:
        who = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    (tmp_path / "inside").mkdir()
    if shutil.which("git") is None:
        pytest.skip("there is no git here")
    git("init")
    for name in ("a.py", "b.c", "notes.txt", "inside/c.py"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    git("add", ".")
    git("commit", "-m", "x")
    commit = git("rev-parse", "HEAD").strip()
    (tmp_path / "notes.txt").write_text("y", encoding="utf-8")
    (tmp_path / "new.py").write_text("y", encoding="utf-8")
    assert run_folder.code_state(tmp_path) == (commit, False), "neither notes nor an untracked file are the code"
    assert run_folder.code_state(tmp_path / "inside") == (None, None), "the repository around it is another one"
    for name in ("b.c", "inside/c.py"):
        (tmp_path / name).write_text("y", encoding="utf-8")
        assert run_folder.code_state(tmp_path) == (commit, True), name
        git("checkout", name)


def test_the_code_of_a_run_is_unknown_without_git(tmp_path, monkeypatch):
    assert run_folder.code_state(tmp_path) == (None, None), "no repository"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_folder.code_state(Path(run_folder.ROOT)) == (None, None), "no git"


def test_args_json_says_which_code_it_was(finished):
    described = files.read_json(finished / "args.json")
    assert (described["git_commit"], described["dirty"]) == run_folder.code_state(run_folder.ROOT)
