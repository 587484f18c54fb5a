"""How long a run takes: the estimate, --max_minutes, and the signs of life while it goes on. No test measures a time:
the clocks are imitations."""

import io
import itertools
import os
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loops import CPU, assert_same, made, make_loop, state_of
from test_resume import lines, main, refused, stop_at

from commands import estimate, one_run
from config import duration, parse_args
from formats import files
from training import bar, clock, logs, trainer
from training.bar import Bar
from training.clock import Clock, Times, steps_that_fit
from training.course import Course, course_of

RUN = "--batch_size 16 --epochs 3 --lr 3e-3 --patience 0 --device cpu --dtype float32".split()


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# --------------------------------------------------------------------------- the course


@given(epochs=st.integers(1, 5), steps_per_epoch=st.integers(1, 9), every=st.floats(0.01, 1), cut=st.integers(1, 50),
       done=st.integers(0, 50))
def test_a_course_counts_the_evaluations_that_a_run_has(epochs, steps_per_epoch, every, cut, done):
    course = Course(min(cut, epochs * steps_per_epoch), steps_per_epoch, every)
    seen = {epoch * steps_per_epoch + mark for epoch in range(epochs) for mark in course.marks()}
    after = {step for step in {*seen, course.steps} if done < step <= course.steps}
    assert course.n_evaluations(min(done, course.steps)) == len(after)
    assert course.epochs == -(-course.steps // steps_per_epoch)
    assert sum(course.end_of(epoch) for epoch in range(course.epochs)) == course.steps


@given(times=st.builds(Times, st.floats(0.01, 9), st.floats(0.01, 99), st.floats(0, 99)), seconds=st.floats(0, 999),
       steps=st.integers(1, 99), steps_per_epoch=st.integers(1, 20), every=st.floats(0.1, 1))
def test_as_many_steps_as_fit_and_no_more(times, seconds, steps, steps_per_epoch, every):
    course = Course(steps, steps_per_epoch, every)
    n = steps_that_fit(times, course, seconds)
    fits = [m for m in range(1, steps + 1) if times.of(Course(m, steps_per_epoch, every)) <= seconds]
    assert n == max(fits, default=0)


# --------------------------------------------------------------------------- the estimate


def measured(times: Times):
    """An imitation of the measuring."""
    return lambda *arguments, **more: estimate.Measured(times, 0)


def test_measuring_leaves_everything_as_it_was(tiny_arguments, tmp_path):
    run, config = made(tiny_arguments, "--dropout", "0.1", "--ema", "0.5")
    run.optimizer.zero_grad(set_to_none=True)
    before = state_of(run)
    found = estimate.measure(run, config, CPU, {"dev": run.task.dev, "test": run.task.dev}, tmp_path)
    assert_same(state_of(run), before)
    assert found.times.step > 0 and found.times.evaluation > 0 and found.times.once > 0
    assert found.state_bytes > 2 * sum(p.numel() for p in run.model.parameters()), "AdamW's two moments"
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_a_pass_is_timed_as_large_as_the_runs_own(monkeypatch):
    """Of a smaller one, what a pass costs whatever its size would count for each token."""
    now, lengths = [0.0], np.array([4, 8, 8, 2])
    warm_up = [5.0]
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: now[0])

    def run(rows):
        now[0] += (warm_up.pop() if warm_up else 0.0) + 1.0 + 0.01 * len(rows) * lengths[rows].max()

    assert estimate._seconds_per_token(run, np.arange(4), lengths) == pytest.approx(1.32 / 32)


def test_a_run_is_the_same_to_the_bit_with_the_estimate_and_without(inputs, monkeypatch):
    asked, real = [], estimate.measure
    monkeypatch.setattr(estimate, "measure", lambda *a, **more: asked.append(1) or real(*a, **more))
    assert main("--option", "finetune", *inputs, *RUN, "--dropout", "0.1", "--output_dir", "without") == 0
    assert not asked, "of a small run nothing is measured"
    monkeypatch.setattr(estimate, "may_be_long", lambda *arguments: True)
    assert main("--option", "finetune", *inputs, *RUN, "--dropout", "0.1", "--output_dir", "with") == 0
    assert asked
    for name in ("steps.jsonl", "epochs.jsonl"):
        assert lines(Path("with") / name) == lines(Path("without") / name)
    for name in ("best/model.safetensors", "dev-predictions.txt"):
        assert (Path("with") / name).read_bytes() == (Path("without") / name).read_bytes()


def test_before_a_long_run_it_says_how_long_and_what_makes_it_shorter(inputs, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "may_be_long", lambda *arguments: True)
    for step, said in ((32.0, False), (60.0, True)):  # 18 steps and 3 evaluations
        monkeypatch.setattr(estimate, "measure", measured(Times(step, 5.0, 9.0)))
        assert main("--option", "finetune", *inputs, *RUN, "--output_dir", "run", "--overwrite") == 0
        err = capsys.readouterr().err
        assert ("this run will take about 18 min (3 epochs of 6 min, evaluation counted); --epochs 1 or --max_minutes "
                "10 make it shorter\n" in err) == said
        assert ("will take" in err) == said
    assert main("--option", "finetune", *inputs, *RUN, "--seeds", "2", "--output_dir", "series") == 0
    err = capsys.readouterr().err
    assert err.count("will take") == 1 and "these runs will take about 37 min (2 of 18 min, evaluation counted)" in err


@pytest.mark.parametrize("words, times, more, wanted", [
    ("--epochs 9", Times(10, 1, 1), {"n_layers": 30}, "--n_layers 4, --epochs 3 or --max_minutes 10 make"),
    ("--epochs 1", Times(700, 1, 1), {}, "take about 12 min (evaluation counted); --max_minutes 10 makes"),
    ("--epochs 9 --eval_every 0.1", Times(5, 90, 1), {}, "--epochs 3, --eval_every 1 or --max_minutes 10 make"),
    ("--epochs 9 --train_eval full", Times(5, 90, 1), {}, "--epochs 3, --train_eval sample or --max_minutes 10 make"),
    ("--epochs 2", Times(400, 9, 1), {"tokens": 500}, "--max_sentence_len 128, --epochs 1 or --max_minutes 10 make"),
    ("--epochs 2", Times(900, 9, 1), {"done": 1}, "what is left of this run will take about "),
    ("--epochs 2", Times(4, 9, 1), {}, ""),
])
def test_it_names_what_really_helps(words, times, more, wanted):
    config = parse_args(["--option", "finetune", *words.split()])
    course = course_of(config, 1 if times.step > 100 else 20)
    given = {"done": 0, "n_runs": 1, "n_layers": 2, "tokens": 20.0, **more}
    line = estimate.long_run(times, course, config=config, device=CPU, **given)
    assert wanted in line and bool(line) == bool(wanted)


# --------------------------------------------------------------------------- --max_minutes


def test_max_minutes_is_so_many_steps_and_the_schedule_over_them(inputs, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "measure", measured(Times(10.0, 20.0, 30.0)))
    monkeypatch.setattr(clock, "START_AND_END", 0.0)
    monkeypatch.setattr(estimate, "MARGIN", 0.0)
    monkeypatch.setattr(clock.Clock, "is_late", lambda self: False)
    minutes = (8 * 10 + 2 * 20 + 30 + 5 + 20 + 30) / 60 + 0.5  # the last evaluation and the end may take twice as long
    monkeypatch.setattr(clock.time, "monotonic", lambda: clock.command_began + 30)
    assert main("--option", "finetune", *inputs, *RUN, "--max_minutes", minutes, "--output_dir", "run") == 0
    err = capsys.readouterr().err
    assert f"--max_minutes {minutes:g}: 8 of 18 steps fit (1.3 of 3 epochs); the schedule is laid over them\n" in err
    assert main("--option", "finetune", *inputs, *RUN, "--max_steps", "8", "--output_dir", "same") == 0
    assert lines(Path("run/steps.jsonl")) == lines(Path("same/steps.jsonl"))
    assert files.read_json(Path("run/args.json"))["options"]["max_steps"] == 8
    assert [row["step"] for row in lines(Path("run/epochs.jsonl"))] == [6, 8]

    assert main("--option", "finetune", *inputs, *RUN, "--max_minutes", 99, "--output_dir", "all") == 0
    assert "steps fit" not in capsys.readouterr().err and len(lines(Path("all/steps.jsonl"))) == 18
    assert "it takes 2.4 at least" in refused(capsys, "--option", "finetune", *inputs, *RUN, "--max_minutes", 1)


@pytest.fixture
def slow(monkeypatch):
    """A machine on which each step takes `slow.step` seconds, on a clock of its own."""
    class Slow:
        now, step = 0.0, 1.0

    real = trainer.Loop.accumulate

    def accumulate(self, rows):
        Slow.now += Slow.step
        return real(self, rows)

    monkeypatch.setattr(clock.time, "monotonic", lambda: Slow.now)
    monkeypatch.setattr(trainer.Loop, "accumulate", accumulate)
    return Slow


def test_a_slower_machine_stops_in_time_with_the_best_weights_evaluated(inputs, slow, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "measure", measured(Times(1.0, 2.0, 3.0)))
    slow.step = 4.0
    assert main("--option", "finetune", *inputs, *RUN, "--max_minutes", "1.1", "--output_dir", "run") == 0
    out, err = capsys.readouterr()
    result = files.read_json(Path("run/result.json"))
    steps = len(lines(Path("run/steps.jsonl")))
    # 64.5 seconds; one more step, an evaluation and an end that are four times as slow: 4 + 8 + 12, and a reserve.
    assert result["stopped"] == "time" and steps == result["steps"] == 8
    assert 4 * steps + clock.RESERVE * 24 > 64.5 >= 4 * (steps - 1) + clock.RESERVE * 24
    assert [row["step"] for row in lines(Path("run/epochs.jsonl"))] == [6, 8]
    assert f"stopping after step {steps} of 18" in err and "dev acc :: " in out
    assert files.read_json(Path("run/best/manifest.json")) and result["best_epoch"] in (0, 1.333)


def test_at_least_one_step_and_one_evaluation_happen_on_the_slowest_machine(inputs, slow, monkeypatch):
    monkeypatch.setattr(estimate, "measure", measured(Times(1.0, 2.0, 3.0)))
    slow.step = 1000.0
    assert main("--option", "finetune", *inputs, *RUN, "--max_minutes", "1", "--output_dir", "run") == 0
    assert [row["step"] for row in lines(Path("run/epochs.jsonl"))] == [1]


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_a_resume_keeps_the_schedule_and_counts_the_time_before(inputs, slow, monkeypatch):
    """5 steps of 4 seconds are done; the clock of the second process begins anew."""
    monkeypatch.setattr(estimate, "measure", measured(Times(1.0, 2.0, 3.0)))
    ticks = [0.0]
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: slow.now + ticks[0])
    slow.step = 4.0
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Loop, "accumulate", trainer.Loop.accumulate)
        stop_at(patch, (5,))
        assert main("--option", "finetune", *inputs, *RUN, "--max_minutes", "1.1", "--output_dir", "run") == 143
    assert len(lines(Path("run/steps.jsonl"))) == 5
    assert main("--resume", "run") == 0
    result = files.read_json(Path("run/result.json"))
    assert result["stopped"] == "time" and result["steps"] == 8, "as without the stop"


def test_the_minutes_of_a_series_are_those_of_all_its_runs(inputs, slow, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "measure", measured(Times(1.0, 2.0, 3.0)))
    monkeypatch.setattr(clock, "START_AND_END", 0.0)
    ended = []
    real = one_run.train

    def train(*arguments, **more):
        result = real(*arguments, **more)
        slow.now += 5  # its end
        ended.append((slow.now, result["steps"]))
        return result

    monkeypatch.setattr(one_run, "train", train)
    assert main("--option", "finetune", *inputs, *RUN, "--max_minutes", "1", "--seeds", "3", "--output_dir", "s") == 0
    assert len(ended) == 3 and ended[-1][0] <= 60 and all(steps >= 6 for _, steps in ended)
    assert main("--option", "finetune", *inputs, *RUN, "--max_minutes", "1", "--output_dir", "one") == 0
    assert ended[-1][1] == 18, "one alone has room for all"


# --------------------------------------------------------------------------- signs of life


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def minutes(monkeypatch):
    """time.monotonic goes on by 4 seconds with every look of a bar at it."""
    ticks = itertools.count(0.0, 4.0)
    monkeypatch.setattr(bar.time, "monotonic", lambda: next(ticks))


def test_without_a_terminal_a_line_comes_after_ten_seconds_and_then_every_minute(minutes, capsys):
    with Bar("dev", 100) as shown:
        for i in range(1, 101):
            shown.update(f"dev: batch {i} of 100")
    said = capsys.readouterr().err.splitlines()
    found = [re.fullmatch(r"dev: batch (\d+) of 100, \d+ (s|min) left", line) for line in said]
    # 4 seconds a look: after 12, and then with the three looks of a line every 14 batches.
    assert [int(match[1]) for match in found] == [*range(3, 100, 14)]


def test_a_long_run_says_where_it_is(inputs, minutes, capsys):
    assert main("--option", "finetune", *inputs, *RUN, "--output_dir", "run") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    form = r"step \d+ of 18 \(epoch \d\), loss \d\.\d{3}, lr \d\.\d\de-\d\d, \d+ (s|min) left"
    assert said and all(re.fullmatch(form, line) for line in said)
    steps = {row["step"]: row for row in lines(Path("run/steps.jsonl"))}
    for line in said:
        row = steps[int(line.split()[1])]
        assert f"(epoch {row['epoch']}), loss {row['loss']:.3f}, lr {row['lr']:.2e}, " in line


def test_a_bar_inside_another_keeps_its_time(minutes, capsys):
    """An evaluation inside the training does not begin to count anew."""
    with Bar("train", 3) as outer:
        outer.due = 1e9
        with Bar("dev", 50) as inner:
            for _ in range(50):
                inner.update("dev")
    assert capsys.readouterr().err == ""


def test_on_a_terminal_there_is_a_bar_and_a_line_stands_alone(monkeypatch, minutes):
    err = Terminal()
    monkeypatch.setattr(sys, "stderr", err)
    with Bar("train", 9) as shown:
        shown.update("step 1", "loss 1.0")
        logs.notice("a line")
        shown.update("step 2", "loss 2.0")
    assert "train: " in err.getvalue() and "step 1" not in err.getvalue() and "\ra line\n" in err.getvalue()


def test_a_loop_that_is_not_run_shows_nothing(parts, monkeypatch):
    err = Terminal()
    monkeypatch.setattr(sys, "stderr", err)
    make_loop(parts, None).step(make_loop(parts, None).task.order(0)[0], measure=False)
    assert "train" not in err.getvalue()


def test_what_takes_long_is_said_and_what_is_fast_is_not(monkeypatch, capsys):
    said = threading.Event()
    real = logs.notice
    monkeypatch.setattr(logs, "notice", lambda text: real(text) or said.set())
    with logs.doing("something fast"):
        pass
    monkeypatch.setattr(logs, "SILENCE", 0.001)
    with logs.doing("reading models/x.gguf"):
        assert said.wait(30)
    assert capsys.readouterr().err == "reading models/x.gguf ...\n"


def test_what_is_over_is_not_said_any_more(monkeypatch, capsys):
    """The timer may go off just as the work ends."""
    timers = []

    class Timer:
        def __init__(self, seconds, speak):
            timers.append(speak)

        def start(self):
            pass

        cancel = start

    monkeypatch.setattr(threading, "Timer", Timer)
    with logs.doing("x"):
        pass
    timers[0]()
    with pytest.raises(KeyError), logs.doing("y"):
        raise KeyError
    timers[1]()
    assert capsys.readouterr().err == ""


def test_each_slow_part_says_what_it_is(inputs, monkeypatch, capsys):
    done, real = [], logs.doing
    monkeypatch.setattr(logs, "doing", lambda what: done.append(what) or real(what))
    assert main("--option", "finetune", *inputs, *RUN, "--output_dir", "run") == 0
    for what in ("loading the program", f"reading {inputs[1]}", "tokenizing", "compiling fused.c",
                 "computing the checksums", "saving run/last", "saving run/best", "reading run/best",
                 "evaluating the best weights on dev and test", "computing the baselines"):
        assert any(line.startswith(what) for line in done), what
    assert " ...\n" not in capsys.readouterr().err, "nothing is said of what is fast"


@pytest.mark.parametrize("seconds, said", [(0.4, "0 s"), (45, "45 s"), (89, "89 s"), (720, "12 min"), (5399, "90 min"),
                                           (12600, "3.5 h")])
def test_a_duration_is_said_in_its_own_unit(seconds, said):
    assert duration(seconds) == said


def test_the_time_that_is_left_counts_evaluations():
    course, known = Course(100, 10, 1.0), Clock(Times(1.0, 7.0, 3.0))
    assert Clock().left(course, 0) is None and known.left(course, 0) == 100 + 70 + 3
    known.steps.extend([2.0, 4.0])
    assert known.left(course, 95) == 5 * 3.0 + 7.0 + 3.0
    known.evaluations.append(20.0)
    assert known.left(course, 95) == 5 * 3.0 + 20.0 + 3.0
