"""Exact resume: a run that was stopped, killed or damaged ends where the undisturbed run ends, to the bit."""

import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, exchange
from safetensors import safe_open

import fused
import run_llama
from commands import job as jobs
from commands import lr_find, verify_resume
from config import parse_args
from formats import files
from training import checks, device, logs, metrics, trainer
from training import state as states

posix = pytest.mark.skipif(os.name != "posix", reason="SIGKILL, SIGTERM's handlers and RLIMIT_FSIZE are POSIX's")
forks = pytest.mark.skipif(not sys.platform.startswith("linux"),
                           reason="the processes are forked off one that has torch: safe on Linux only")
KILLS = int(os.environ.get("MINLLAMA_KILLS", "6"))  # the figure that the README gives is that of 20

# Everything that has a state of its own: moments, momentum, moving average, dropout's and the augmentation's random
# numbers, a schedule that looks back, a sampler, evaluations and accumulation inside an epoch.
HARD = ["--batch_size", "8", "--grad_accum", "2", "--epochs", "3", "--lr", "3e-3", "--eval_every", "0.5",
        "--ema", "0.5", "--dropout", "0.1", "--aug_delete", "0.1", "--aug_replace", "0.1", "--scheduler", "plateau",
        "--plateau_patience", "1", "--sampler", "balanced", "--patience", "0", "--keep_state"]


@pytest.fixture(scope="module")
def straight(inputs, tmp_path_factory):
    """The undisturbed run of these options; each is run once."""
    done: dict[tuple[str, ...], Path] = {}

    def get(*options: str) -> Path:
        if options not in done:
            done[options] = tmp_path_factory.mktemp("straight") / "run"
            assert main("--option", "finetune", *inputs, *options, "--output_dir", done[options]) == 0
        return done[options]
    return get


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def main(*argv) -> int:
    """The program in this process: its exit code."""
    try:
        return run_llama.main([str(word) for word in argv])
    except SystemExit as end:
        return end.code


def lines(path: Path) -> list[dict]:
    """A log without its times."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def assert_same_end(run: Path, straight: Path) -> None:
    for log in ("steps.jsonl", "epochs.jsonl"):
        assert lines(run / log) == lines(straight / log), log
    for name in ("best/model.safetensors", "best/config.json", "dev-predictions.txt", "test-predictions.txt"):
        assert (run / name).read_bytes() == (straight / name).read_bytes(), name
    states = [[p.read_bytes() for p in folder.glob("last/*/tensors.safetensors")] for folder in (run, straight)]
    assert states[0] == states[1] and len(states[0]) == 1, "the last weights, moments and random states"
    results = [json.loads((folder / "result.json").read_text(encoding="utf-8")) for folder in (run, straight)]
    for result in results:
        del result["seconds"], result["train_seconds"], result["sha256"]
    assert results[0] == results[1]
    litter = [p for p in run.rglob("*") if p.name.startswith(".") and p.name != ".lock"]
    assert not litter


def stop_at(monkeypatch, steps=(), batches=(), number="SIGTERM") -> None:
    """A real signal in the middle of these optimizer steps, each once, and of these evaluation batches, counted over
    all the processes of a run."""
    steps, seen = set(steps), [0]
    real_step, real_batch = trainer.Loop.accumulate, metrics.make_batch

    def accumulate(self, rows):
        if self.progress.step + 1 in steps:
            steps.remove(self.progress.step + 1)
            signal.raise_signal(getattr(signal, number))
        return real_step(self, rows)

    def make_batch(*arguments):
        seen[0] += 1
        if seen[0] in batches:
            signal.raise_signal(getattr(signal, number))
        return real_batch(*arguments)

    monkeypatch.setattr(trainer.Loop, "accumulate", accumulate)
    monkeypatch.setattr(metrics, "make_batch", make_batch)


def run_and_resume(run: Path, *argv, code: int = 143) -> int:
    """Start, and resume as long as it is stopped; how often it was."""
    stops, ended = 0, main("--option", "finetune", *argv, "--output_dir", run)
    while ended == code:
        stops += 1
        ended = main("--resume", run)
    assert ended == 0
    return stops


# --------------------------------------------------------------------------- exactness


@posix
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion", "adafactor"])
def test_a_run_that_is_stopped_anywhere_ends_as_if_it_had_not_been(inputs, straight, tmp_path, monkeypatch, optimizer):
    """After every step with AdamW, after some with the others: the window before an evaluation, the one behind it, the
    last one; and within evaluations, of which the last two are those at the very end."""
    options = [*HARD, "--optimizer", optimizer, "--lr", "3e-4" if optimizer == "lion" else "3e-3"]
    expected = straight(*options)
    steps = range(1, 19) if optimizer == "adamw" else (1, 6, 18)
    batches = (2, 5, 14, 15, 16, 17, 18) if optimizer == "adamw" else (4,)
    stop_at(monkeypatch, steps, batches)
    assert run_and_resume(tmp_path / "run", *inputs, *options) >= len(steps)
    assert_same_end(tmp_path / "run", expected)


@posix
def test_with_c_too(inputs, tmp_path, monkeypatch):
    """The loops in C, and an embedding that AdamW updates by the rows that have had a gradient: its state has them."""
    monkeypatch.setattr(device, "LARGE", 0)
    if fused.library() is None:
        pytest.skip("no C compiler here")
    assert main("--option", "finetune", *inputs, *HARD, "--output_dir", tmp_path / "straight") == 0
    stop_at(monkeypatch, {2, 9, 17})
    run_and_resume(tmp_path / "run", *inputs, *HARD)
    assert_same_end(tmp_path / "run", tmp_path / "straight")
    (state,) = (tmp_path / "run").glob("last/*/tensors.safetensors")
    with safe_open(state, "pt") as file:
        active = [file.get_tensor(name) for name in file.keys() if name.endswith("active")]
    assert len(active) == 1 and 0 < active[0].sum() < len(active[0])


@posix
def test_early_stopping_and_a_regular_save_go_on_counting(inputs, straight, tmp_path, monkeypatch):
    options = ["--keep_state", "--batch_size", "16", "--epochs", "9", "--lr", "1e-6", "--patience", "2",
               "--save_every", "4",
               "--scheduler", "cosine", "--warmup_steps", "5"]
    expected = straight(*options)
    assert json.loads((expected / "result.json").read_text(encoding="utf-8"))["stopped"] == "patience"
    stop_at(monkeypatch, (4, 5, 6, 12, 13))
    assert run_and_resume(tmp_path / "run", *inputs, *options) == 5
    assert_same_end(tmp_path / "run", expected)


@posix
def test_the_seconds_of_a_resumed_run_go_on_counting(inputs, tmp_path, monkeypatch):
    """Each process's clock begins at 0: here every look at it is a second later than the one before."""
    run = tmp_path / "run"
    stop_at(monkeypatch, (9,))
    for options in (["--option", "finetune", *inputs, *HARD, "--output_dir", run], ["--resume", run]):
        clock = itertools.count()
        monkeypatch.setattr(time, "perf_counter", lambda clock=clock: float(next(clock)))
        main(*options)
    seconds = [json.loads(line)["seconds"] for line in (run / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    assert seconds == sorted(seconds) and len(set(seconds)) == 18
    assert result["seconds"] >= result["train_seconds"] >= seconds[-1] > 2 * seconds[7] > 0


def poison(monkeypatch, bad: range) -> None:
    """A loss that is not a number in these steps, until the first rollback."""
    loops, real = [], jobs.build_job

    def start(*arguments):
        run = real(*arguments)
        losses = run.task.losses
        exchange(run.task, losses=lambda batch: losses(batch) * (
            float("nan") if loops[-1].progress.step + 1 in bad and not loops[-1].progress.rollbacks else 1.0))
        return run

    class Loop(trainer.Loop):
        def __init__(self, *arguments, **more):
            super().__init__(*arguments, **more)
            loops.append(self)

    monkeypatch.setattr(jobs, "build_job", start)
    monkeypatch.setattr(trainer, "Loop", Loop)


@posix
def test_a_stop_around_a_rollback_changes_nothing(inputs, tmp_path, monkeypatch, capsys):
    """The states before the rollback know logs that are longer than those behind it; a kill in between must find them
    as long as it needs them, and a signal's state must not become the one that is rolled back to."""
    options = [*inputs, "--batch_size", "16", "--epochs", "3", "--lr", "3e-3", "--save_every", "2", "--keep_state"]
    poison(monkeypatch, range(9, 99))
    expected = tmp_path / "straight"
    assert main("--option", "finetune", *options, "--output_dir", expected) == 0
    assert [e["event"] for e in lines(expected / "events.jsonl")] == ["skipped"] * 3 + ["rollback"]

    stop_at(monkeypatch, (9, 10, 11))
    real, kills = states.save_state, [1]

    def killed_before_the_rollback_is_saved(last, step, tensors, values, good):
        progress = dict(dict(values["dict"])["progress"]["dict"])
        if progress["rollbacks"] and kills:
            kills.clear()
            raise KeyboardInterrupt
        real(last, step, tensors, values, good)

    monkeypatch.setattr(states, "save_state", killed_before_the_rollback_is_saved)
    run = tmp_path / "run"
    ended = [main("--option", "finetune", *options, "--output_dir", run)]
    while ended[-1] in (130, 143):
        ended.append(main("--resume", run))
    assert ended == [143, 143, 130, 0], "the third one came together with the kill"
    assert_same_end(run, expected)
    assert lines(run / "events.jsonl") == lines(expected / "events.jsonl")
    assert "lines of it are lost" not in capsys.readouterr().err


def test_a_resumed_run_keeps_its_micro_batch(inputs, straight, tmp_path, monkeypatch):
    """--auto_batch measures what is free at that moment: once a run, or the rounding changes."""
    options = [*HARD, "--auto_batch"]
    found = iter((4, 16))
    monkeypatch.setattr(checks, "find_micro_batch", lambda loop: next(found))
    stop_at(monkeypatch, (7,))
    assert run_and_resume(tmp_path / "run", *inputs, *options) == 1
    monkeypatch.undo()
    monkeypatch.setattr(checks, "find_micro_batch", lambda loop: 4)
    assert main("--option", "finetune", *inputs, *options, "--output_dir", tmp_path / "straight") == 0
    assert_same_end(tmp_path / "run", tmp_path / "straight")


# --------------------------------------------------------------------------- signals


@pytest.fixture(autouse=True)
def usual_handlers():
    """The tests may run in the background or under nohup, where ^C and the end of the terminal are ignored."""
    usual = {"SIGINT": signal.default_int_handler, "SIGTERM": signal.SIG_DFL, "SIGHUP": signal.SIG_DFL}
    before = {getattr(signal, n): signal.signal(getattr(signal, n), h) for n, h in usual.items() if hasattr(signal, n)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@posix
@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_a_signal_saves_and_says_how_to_go_on(inputs, straight, tmp_path, monkeypatch, capfd, name, code):
    run = tmp_path / "a run"
    stop_at(monkeypatch, (8,), number=name)
    assert main("--option", "finetune", *inputs, *HARD, "--output_dir", run) == code
    err = capfd.readouterr().err
    assert "stopping after this step" in err
    assert err.splitlines()[-1] == f"stopped; go on with: python run_llama.py --resume '{run}'"
    assert len(lines(run / "steps.jsonl")) == 8, "the step that was going on is finished"
    assert main("--resume", run) == 0
    assert_same_end(run, straight(*HARD))


@posix
def test_the_second_signal_stops_at_once(inputs, straight, tmp_path, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    handlers, real = [], trainer.Loop.accumulate

    def twice(self, rows):
        if self.progress.step == 7:
            signal.raise_signal(signal.SIGINT)
            handlers.append(signal.getsignal(signal.SIGTERM))
            signal.raise_signal(signal.SIGINT)
        return real(self, rows)

    monkeypatch.setattr(trainer.Loop, "accumulate", twice)
    assert main("--option", "finetune", *inputs, *HARD, "--output_dir", "run") == 130
    assert len(lines(Path("run/steps.jsonl"))) == 7 and handlers == [before], "a second SIGTERM would end it, too"
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert main("--resume", "run") == 0
    assert_same_end(Path("run"), straight(*HARD))


@posix
def test_a_signal_that_is_ignored_stays_ignored(inputs, straight, monkeypatch):
    """nohup starts a program like that: the end of the terminal is not to be the end of the run."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop_at(monkeypatch, (3,), number="SIGHUP")
        assert main("--option", "finetune", *inputs, *HARD, "--output_dir", "run") == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert_same_end(Path("run"), straight(*HARD))


# --------------------------------------------------------------------------- damaged states


@pytest.fixture(scope="module")
def stopped(inputs, tmp_path_factory):
    """A run that ended after step 8 of 18, with a state of each step."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, (8,))
        assert main("--option", "finetune", *inputs, *HARD, "--save_every", "1", "--output_dir", run) == 143
    assert [p.name.rpartition("-")[0] for p in states._states(run / "last")] == ["step-8", "step-7"]
    return run


def cut(path: Path, part: float) -> None:
    os.truncate(path, int(path.stat().st_size * part))


def flip(path: Path, part: float) -> None:
    data = bytearray(path.read_bytes())
    at = int((8 * len(data) - 1) * part)
    data[at // 8] ^= 1 << at % 8
    path.write_bytes(data)


DAMAGES = {
    "tensors cut": lambda s: cut(s / "tensors.safetensors", 0.6),
    "tensors with a flipped bit": lambda s: flip(s / "tensors.safetensors", 0.7),
    "values with a flipped bit": lambda s: flip(s / "state.json", 0.4),
    "manifest cut": lambda s: cut(s / "manifest.json", 0.5),
    "no manifest": lambda s: (s / "manifest.json").unlink(),
    "no tensors": lambda s: (s / "tensors.safetensors").unlink(),
}


@posix
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_falls_back_to_the_one_before(stopped, straight, damage, monkeypatch, capsys):
    """... and says so; the run is stopped once more on its way, since a save has to cope with what it finds."""
    run = Path(shutil.copytree(stopped, "run"))
    newest = states._states(run / "last")[0]
    DAMAGES[damage](newest)
    (run / "last/.step-9-9.tmp").mkdir()  # the litter of a killed write: never used, and removed
    (run / "last/.step-9-9.tmp/tensors.safetensors").write_bytes(b"half")
    (run / "best/.tmpAbCdEf").write_bytes(b"half")
    stop_at(monkeypatch, (8,))
    assert main("--resume", run) == 143
    err = capsys.readouterr().err
    assert f"{newest}: " in err and "going back to the state before it" in err and f"resuming {run} at step 7" in err
    faults = [files.fault_of_manifest(state, states.NEEDED) for state in states._states(run / "last")]
    assert faults == [None, None], "two whole ones again"
    assert main("--resume", run) == 0
    assert_same_end(run, straight(*HARD))


def test_no_cut_and_no_flipped_bit_is_ever_loaded(stopped, tmp_path):
    """At 60 places: what is loaded is the newest state as it was, where the damage does not touch it (a flag in its
    manifest), or the one before."""
    draw = random.Random(0)
    newest, before = (files.read_json(s / "state.json") for s in states._states(stopped / "last"))
    n_fallen_back = 0
    for i in range(60):
        last = tmp_path / "last"
        shutil.copytree(stopped / "last", last)
        state = states._states(last)[0]
        name = ("tensors.safetensors", "state.json", "manifest.json")[i % 3]
        (cut if draw.random() < 0.3 else flip)(state / name, draw.random())
        _, values, faults = states.load_state(last)
        n_fallen_back += len(faults)
        assert values == (before if faults else newest) and (faults or name == "manifest.json")
        assert not faults or str(state) in faults[0]
        shutil.rmtree(last)
    assert n_fallen_back > 45


def test_with_every_state_damaged_it_says_so_and_touches_nothing(stopped, capsys):
    run = Path(shutil.copytree(stopped, "run"))
    for state in states._states(run / "last"):
        flip(state / "tensors.safetensors", 0.5)
    assert main("--resume", run) == 2
    err = capsys.readouterr().err
    assert err.count("has changed since it was written (sha256)") == 2 and "no whole state to go on from" in err
    assert "Traceback" not in err
    assert lines(run / "steps.jsonl") == lines(stopped / "steps.jsonl") and len(states._states(run / "last")) == 2


def test_a_run_that_was_killed_before_its_first_state_begins(inputs, straight, tmp_path, monkeypatch, capsys):
    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(states, "save_state", killed)
    assert main("--option", "finetune", *inputs, *HARD, "--output_dir", "run") == 130
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert main("--resume", "run") == 0 and "resuming run at step 0" in capsys.readouterr().err
    assert_same_end(Path("run"), straight(*HARD))


def test_a_log_that_lost_lines_is_not_filled_up_with_zeros(stopped, capsys):
    """A power cut can take lines that were not on the disk yet (the states flush them); so can an editor."""
    run = Path(shutil.copytree(stopped, "run"))
    kept = (run / "steps.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:5]
    (run / "steps.jsonl").write_text("".join(kept), encoding="utf-8")
    assert main("--resume", run) == 0 and "lines of it are lost" in capsys.readouterr().err
    assert [line["step"] for line in lines(run / "steps.jsonl")] == [1, 2, 3, 4, 5, *range(9, 19)]


# --------------------------------------------------------------------------- refusals


def refused(capsys, *argv) -> str:
    capsys.readouterr()
    assert main(*argv) == 2
    err = capsys.readouterr().err
    assert "run_llama.py: error: " in err and "Traceback" not in err
    return err


def test_what_cannot_be_resumed_is_refused_by_name(stopped, straight, inputs, tmp_path, capsys):
    assert "there is no run here" in refused(capsys, "--resume", tmp_path)
    assert "the run is finished" in refused(capsys, "--resume", straight(*HARD))
    err = refused(capsys, "--resume", stopped, "--lr", "0.1", "--epochs", "3", "--dropout", "0.2")
    assert "--lr is 0.003 in the run, 0.1 now" in err and "--dropout is 0.1 in the run, 0.2 now" in err
    assert "--epochs" not in err, "it is the same"

    files = json.loads((stopped / "args.json").read_text(encoding="utf-8"))["files"]
    for name in ("train", "dev", "test", "tokenizer"):
        path = Path(files[name]["path"])
        whole = path.read_bytes()
        try:
            path.write_bytes(whole.replace(b"film", b"fiim", 1) if name != "tokenizer" else whole + b" ")
            assert f"{path} has changed or is gone" in refused(capsys, "--resume", stopped)
            path.unlink()
            assert f"{path} has changed or is gone" in refused(capsys, "--resume", stopped)
        finally:
            path.write_bytes(whole)

    for damage in ("{}", "[]", '{"options": {}', '{"options": {}, "given": [], "device": "", "versions": {}}'):
        (tmp_path / "args.json").write_text(damage, encoding="utf-8")
        assert str(tmp_path / "args.json") in refused(capsys, "--resume", tmp_path)


@posix
def test_a_result_of_another_command_does_not_pass_for_the_runs_own(inputs, straight, capsys, monkeypatch):
    """lr_find leaves its result.json in the folder: neither a resume nor evaluate takes it for that of the run."""
    assert main("--option", "lr_find", *inputs, *HARD, "--lr_steps", "12", "--output_dir", "run") == 0
    found = Path("run/result.json").read_bytes()
    stop_at(monkeypatch, (8,))
    assert main("--option", "finetune", *inputs, *HARD, "--output_dir", "run") == 143
    assert not Path("run/result.json").exists() and Path("run/lr_find.csv").exists()
    Path("run/result.json").write_bytes(found)  # as earlier versions left it
    assert main("--option", "evaluate", "--run", "run") == 0
    assert main("--resume", "run") == 0
    assert_same_end(Path("run"), straight(*HARD))
    assert "the run is finished" in refused(capsys, "--resume", "run")


# --------------------------------------------------------------------------- real processes

SERVER = """
import json, os, sys, traceback
sys.path.insert(0, sys.argv[1])
import sklearn.feature_extraction.text, sklearn.linear_model, sklearn.metrics, torch, tokenizers
import run_llama, classifier, dataset, optimizer, commands.finetune
torch.set_num_threads(1)
torch.optim.SGD([torch.zeros(1)], lr=1.0)  # the first optimizer imports half of torch
for line in sys.stdin:
    ask = json.loads(line)
    pid = os.fork()
    if not pid:
        for number, path, how in ((0, os.devnull, os.O_RDONLY), (1, ask["out"], os.O_WRONLY | os.O_CREAT),
                                  (2, ask["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)):
            os.dup2(os.open(path, how, 0o644), number)
        if ask["limit"]:
            import resource
            resource.setrlimit(resource.RLIMIT_FSIZE, (ask["limit"], ask["limit"]))
        code = 99
        try:
            code = run_llama.main(ask["argv"])
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Programs:
    """Processes of run_llama.py, one at a time, each forked off one that has imported everything already: a start takes
    milliseconds and not seconds."""

    def __init__(self, folder: Path):
        self.out, self.err = folder / "out", folder / "err"
        self.server = subprocess.Popen([sys.executable, "-c", SERVER, str(ROOT)], stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def start(self, *argv, limit: int = 0, out: Path | None = None) -> int:
        """Returns its process id."""
        ask = {"argv": [str(word) for word in argv], "limit": limit, "out": str(out or self.out), "err": str(self.err)}
        self.server.stdin.write(json.dumps(ask) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def wait(self) -> int:
        """Its exit code, negative for a signal. It stays a zombie until here: its id is nobody else's."""
        return int(self.server.stdout.readline())

    def errors(self) -> str:
        return self.err.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    them = Programs(tmp_path_factory.mktemp("programs"))
    yield them
    them.server.stdin.close()
    assert them.server.wait(timeout=60) == 0


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


LONG = [*HARD, "--epochs", str(2 + KILLS // 3), "--save_every", "1"]  # most of its time is spent in saving


@forks
def test_a_run_that_is_killed_at_random_moments_ends_as_if_it_had_not_been(inputs, straight, programs, tmp_path):
    """SIGKILL, at moments that are random in the step and within it, and while it starts. At no time is there a best
    model that does not load, or no whole state."""
    expected, run, draw = straight(*LONG), tmp_path / "run", random.Random(KILLS)
    total, killed = len(lines(expected / "steps.jsonl")), []

    def n_steps() -> int:
        return (run / "steps.jsonl").read_bytes().count(b"\n") if (run / "steps.jsonl").exists() else 0

    for at in sorted(draw.uniform(-0.1 * total, 0.95 * total) for _ in range(KILLS)):
        started = (run / "args.json").exists()
        pid = programs.start(*(["--resume", run] if started else
                               ["--option", "finetune", *inputs, *LONG, "--output_dir", run, "--overwrite"]))
        wait_for(lambda at=at: n_steps() >= at)
        time.sleep(draw.random() * 0.1)
        os.kill(pid, signal.SIGKILL)
        assert programs.wait() == -signal.SIGKILL, programs.errors()
        killed.append(n_steps())
        if (run / "best/model.safetensors").exists():
            with safe_open(run / "best/model.safetensors", "pt") as file:
                assert all(torch.isfinite(file.get_tensor(name)).all() for name in file.keys())
        left = states._states(run / "last")
        faults = [files.fault_of_manifest(state, states.NEEDED) for state in left]
        assert not any(faults) and (left or not killed[-1])
    programs.start("--resume", run)
    assert programs.wait() == 0, programs.errors()
    print(f"killed at steps {killed} of {total}")
    assert_same_end(run, expected)


@forks
def test_a_full_disk_keeps_the_last_good_state_and_names_path_and_bytes(inputs, straight, programs, tmp_path):
    """A real limit on the size of files, which the state before the first step keeps and the one after it does not."""
    run = tmp_path / "run"
    programs.start("--option", "finetune", *inputs, *HARD, "--save_every", "1", "--output_dir", run, limit=300_000)
    assert programs.wait() == 2
    err = programs.errors()
    assert "Traceback" not in err and f"{run}/last/step-1-1: the state could not be written" in err
    assert "File too large" in err and " bytes, " in err and " are free; the last whole state is kept" in err
    assert [p.name for p in (run / "last").iterdir()] == ["step-0-0"]
    assert files.fault_of_manifest(run / "last/step-0-0", states.NEEDED) is None
    programs.start("--resume", run, limit=300_000)
    assert programs.wait() == 2 and [p.name for p in (run / "last").iterdir()] == ["step-0-0"]
    programs.start("--resume", run)
    assert programs.wait() == 0, programs.errors()
    assert_same_end(run, straight(*HARD))


@posix
def test_a_full_disk_keeps_every_other_file_too(tmp_path):
    resource = pytest.importorskip("resource")
    from safetensors.torch import save_file

    def write(values):
        files.write_atomically(tmp_path / "file", lambda temporary: save_file(values, str(temporary)))

    write({"a": torch.ones(10)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match=rf"{tmp_path}/file: it could not be written .*; \d+ bytes are free there"):
            write({"a": torch.zeros(10_000)})
        with open(tmp_path / "log", "ab", buffering=0) as log:
            logs._write_line(log, {"a": "x" * 9_000})
            with pytest.raises(OSError, match=rf"{tmp_path}/log: it could not be written .*; \d+ bytes are free there"):
                logs._write_line(log, {"a": "x" * 9_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with safe_open(tmp_path / "file", "pt") as file:
        assert torch.equal(file.get_tensor("a"), torch.ones(10))
    assert {p.name for p in tmp_path.iterdir()} == {"file", "log"}
    denied = PermissionError(errno.EACCES, "Permission denied")
    assert files.disk_full(tmp_path / "file", denied) is denied, "that is not about room"


@forks
def test_the_second_run_in_a_folder_is_refused_at_once(inputs, programs, tmp_path, capsys):
    run = tmp_path / "run"
    pid = programs.start("--option", "finetune", *inputs, *HARD, "--epochs", "500", "--output_dir", run)
    try:
        wait_for((run / "best").exists)
        begin = time.monotonic()
        assert "another process is training in this folder" in refused(capsys, "--resume", run)
        assert time.monotonic() - begin < 5
        start = ["--option", "finetune", *inputs, *HARD, "--output_dir", run]
        assert "--overwrite" in refused(capsys, *start)
        assert "another process is training" in refused(capsys, *start, "--overwrite")
        assert (run / "best").exists() and (run / "args.json").exists()
    finally:
        os.kill(pid, signal.SIGTERM)
        assert programs.wait() == 143
    assert states._states(run / "last") and "--resume" in programs.errors(), "the first one was not disturbed"


@forks
def test_a_reader_that_leaves_in_the_middle_of_the_training_costs_nothing(inputs, straight, programs, tmp_path):
    """stdout is closed after the second epoch's line, as by `| head -6`."""
    os.mkfifo("pipe")
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    programs.start("--option", "finetune", *inputs, *HARD, "--output_dir", tmp_path / "run", out=tmp_path / "pipe")
    heard = b""
    while heard.count(b"epoch") < 2:
        try:
            heard += os.read(reader, 4096)
        except BlockingIOError:
            time.sleep(0.002)
    os.close(reader)
    assert programs.wait() == 0, programs.errors()
    assert "the reader of the output has left" in programs.errors() and "Traceback" not in programs.errors()
    assert_same_end(tmp_path / "run", straight(*HARD))


@posix
def test_a_pipeline_that_ends_after_its_first_line_still_trains(inputs, straight, tmp_path):
    """The whole program behind a real `| head -1`, stderr too; and the exit code is that of the run."""
    words = [sys.executable, str(ROOT / "run_llama.py"), "--option", "finetune", *inputs, *HARD, "--output_dir", "run"]
    done = subprocess.run(["sh", "-c", '{ "$@" 2>&1; echo $? > code; } | head -1', "sh", *words], capture_output=True,
                          timeout=120)
    assert done.stdout.count(b"\n") == 1 and b"Traceback" not in done.stderr
    assert Path("code").read_text(encoding="utf-8") == "0\n"
    assert_same_end(Path("run"), straight(*HARD))


# --------------------------------------------------------------------------- verify_resume

IMITATION = """
import json, os, pathlib, sys, time
argv = sys.argv[1:]
resumed = "--resume" in argv
run = pathlib.Path(argv[argv.index("--resume" if resumed else "--output_dir") + 1])
for folder in ("best", "last/step-9-1"):
    (run / folder).mkdir(parents=True, exist_ok=True)
(run / "args.json").write_text("{}")
if FAULT == "hangs":
    (run / "pid").write_text(str(os.getpid()))
    time.sleep(60)
print("x" * 200_000, file=sys.stderr)  # more than a pipe holds
with open(run / "steps.jsonl", "a") as log:
    for step in range(sum(1 for _ in open(run / "steps.jsonl")), 20):
        log.write(json.dumps({"step": step, "loss": step + (FAULT == "steps" and resumed), "seconds": time.time()}))
        log.write("\\n")
        log.flush()
        time.sleep(0.02)
(run / "best/model.safetensors").write_text("b" if resumed and FAULT == "weights" else "a")
(run / "last/step-9-1/tensors.safetensors").write_text("b" if resumed and FAULT == "state" else "a")
(run / "result.json").write_text("{}")
sys.exit(5 if FAULT == "crash" else 0)
"""


@pytest.mark.parametrize("fault", ["", "weights", "state", "steps"])
def test_verify_resume_sees_a_resume_that_is_not_exact(fault, tmp_path, capsys):
    """An imitation of the program stands in for one whose resume has a fault."""
    program = tmp_path / "program.py"
    program.write_text(IMITATION.replace("FAULT", repr(fault)), encoding="utf-8")
    assert verify_resume.verify_resume(parse_args([]), tmp_path, program, kills=1) == (1 if fault else 0)
    assert capsys.readouterr().out.count("DIFFERENT") == (1 if fault else 0)
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert [name for name in ("weights", "state", "steps") if not result[f"same_{name}"]] == ([fault] if fault else [])


def test_verify_resume_says_why_the_run_itself_failed(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import sys; print('too bad', file=sys.stderr); sys.exit(2)", encoding="utf-8")
    with pytest.raises(ValueError, match="the run itself failed:\ntoo bad"):
        verify_resume.verify_resume(parse_args([]), tmp_path, program)


def test_verify_resume_hands_on_what_was_typed_but_for_its_own_places(tmp_path):
    program, seen = tmp_path / "program.py", tmp_path / "seen.json"
    program.write_text(f"import json, sys; json.dump(sys.argv[1:], open({str(seen)!r}, 'w')); sys.exit(2)",
                       encoding="utf-8")
    typed = ["--option", "verify_resume", "--lr", "1e-3", "--milestones", "2,3", "--overwrite", "--output_dir", "x",
             "--dev_out", "d.txt"]
    with pytest.raises(ValueError, match="the run itself failed"):
        verify_resume.verify_resume(parse_args(typed), tmp_path, program)
    words = json.loads(seen.read_text(encoding="utf-8"))
    assert words[:3] == ["--option", "finetune", "--keep_state"]
    assert words[-2:] == ["--output_dir", str(tmp_path / "straight")]
    assert parse_args(words).given == {"option", "keep_state", "lr", "milestones", "overwrite", "output_dir"}
    assert (parse_args(words).lr, parse_args(words).milestones) == (1e-3, (2, 3))


def test_verify_resume_kills_after_different_steps_and_says_so_afterwards(tmp_path, capsys, monkeypatch):
    """The first kill comes so late that the run is past the two other steps: those come later then."""
    program, killed, log = tmp_path / "program.py", [], tmp_path / "stopped/steps.jsonl"
    program.write_text(IMITATION.replace("FAULT", "''").replace("20)", "60)"), encoding="utf-8")

    class Draw(random.Random):
        def sample(self, population, k):
            assert (population, k) == (range(1, 60), 3)
            return [6, 5, 7]

    class Watched(subprocess.Popen):
        def kill(self):
            if self.poll() is not None:
                return
            while not killed and log.read_bytes().count(b"\n") < 9:
                time.sleep(0.01)
            super().kill()
            self.wait()
            killed.append((log.read_bytes().count(b"\n"), capsys.readouterr().out))

    monkeypatch.setattr(random, "Random", Draw)
    monkeypatch.setattr(subprocess, "Popen", Watched)
    assert verify_resume.verify_resume(parse_args([]), tmp_path, program) == 0
    reached, said = zip(*killed, strict=True)
    assert len(reached) == 3 and 9 <= reached[0] < reached[1] < reached[2] < 60
    assert "killed" not in said[0], "nothing is said before it has happened"
    lines = "".join([*said, capsys.readouterr().out]).splitlines()
    assert [line for line in lines if "killed" in line] == [f"verify :: killed after step {n} of 60" for n in reached]
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["killed_at"] == list(reached)


def test_verify_resume_proves_nothing_where_nothing_could_be_killed(tmp_path, capsys, monkeypatch):
    class Quick(subprocess.Popen):
        def poll(self):
            return self.wait()

    program = tmp_path / "program.py"
    program.write_text(IMITATION.replace("FAULT", "''"), encoding="utf-8")
    monkeypatch.setattr(subprocess, "Popen", Quick)
    with pytest.raises(ValueError, match="nothing is proved: the run was finished before it could be killed"):
        verify_resume.verify_resume(parse_args([]), tmp_path, program)
    out, err = capsys.readouterr()
    assert "killed after" not in out and "it was finished before it could be killed after step" in err
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["killed_at"] == []


@posix
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_verify_resume_ends_its_child_too(number, tmp_path):
    program, pid = tmp_path / "program.py", tmp_path / "straight/pid"
    program.write_text(IMITATION.replace("FAULT", "'hangs'"), encoding="utf-8")

    def send():
        while not (pid.exists() and pid.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    def fall_through(*_):
        raise TimeoutError("nobody caught the signal")

    before = signal.signal(number, fall_through)
    try:
        threading.Thread(target=send, daemon=True).start()
        with pytest.raises(SystemExit) as end:
            verify_resume.verify_resume(parse_args([]), tmp_path, program)
    finally:
        signal.signal(number, before)
    assert end.value.code == 128 + number
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


@posix
@pytest.mark.parametrize("option", ["verify_resume", "lr_find"])
def test_a_reader_that_leaves_changes_no_exit_code(option, inputs, tmp_path, monkeypatch):
    """`| head -1`: 0 is what verify_resume answers when it has proved something."""
    def work(*arguments):
        folder = arguments[1] if option == "verify_resume" else arguments[3]
        print("one line\n", "another" * 10_000, flush=True)
        (folder / "result.json").write_text("{}", encoding="utf-8")
        return 1

    room = {"verify_resume": verify_resume, "lr_find": lr_find}[option]
    monkeypatch.setattr(room, option, work)
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as out:
        monkeypatch.setattr(sys, "stdout", out)
        code = main("--option", option, *inputs, "--output_dir", tmp_path / "out")
    assert code == (1 if option == "verify_resume" else 0)
    assert (tmp_path / "out/result.json").exists()


@posix
def test_verify_resume_proves_it_on_a_real_run(inputs, tmp_path, capsys, monkeypatch):
    # One kill: each is a start of the whole program.
    monkeypatch.setattr(verify_resume.verify_resume, "__defaults__", (1,))
    assert main("--option", "verify_resume", *inputs, *HARD, "--save_every", "2", "--output_dir", tmp_path / "v") == 0
    out = capsys.readouterr().out
    assert "best weights identical, last state identical, steps.jsonl identical (18 steps)" in out
