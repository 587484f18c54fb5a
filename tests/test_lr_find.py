"""The range test, which leaves everything as it was, and what --confirm decides."""

import csv
import json
import math
import random
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import exchange, tiny_sentences, write_split
from hypothesis import given, settings
from hypothesis import strategies as st
from loops import CPU, assert_same, made, state_of

import run_llama
from benchmarks import bench_lr_confirm
from commands import confirm, lr_find
from commands import inputs as inputs_room
from commands import job as jobs
from config import parse_args
from formats import files
from training import trainer
from training.run_folder import RunFolder


def main(*argv):
    return run_llama.main(list(argv))


# --------------------------------------------------------------------------- the curve


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60))
def test_smoothing_is_the_weighted_mean_of_the_past(losses):
    """pandas' ewm(alpha=0.1, adjust=True).mean(): weights 0.9^age, which sum to 1."""
    for i, value in enumerate(lr_find.smooth(losses)):
        weights = 0.9 ** np.arange(i, -1, -1)
        assert value == pytest.approx(np.average(losses[: i + 1], weights=weights), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("middle", [1e-5, 1e-4, 1e-3])
def test_the_steepest_point_of_a_known_curve_is_found(monkeypatch, middle):
    """A logistic curve in log lr is steepest at its middle; behind the end of its fall the loss explodes."""
    monkeypatch.setattr(lr_find, "smooth", list)  # smoothing only shifts it, see below
    rates = np.geomspace(1e-7, 1e-1, 241)
    losses = 1 - 1 / (1 + np.exp(-3 * np.log(rates / middle))) + np.where(rates > 30 * middle, rates / middle, 0)
    low, steepest, high = lr_find.suggestion(list(zip(rates, losses, strict=True)))
    assert steepest == pytest.approx(middle, rel=0.06)  # one step of the grid
    assert low == pytest.approx(steepest / 10)
    assert high == pytest.approx(10 * middle, rel=0.06)  # a third of 30 x middle, where the loss is lowest


def test_smoothing_shifts_the_steepest_point_by_less_than_its_window():
    rates = np.geomspace(1e-7, 1e-1, 241)
    losses = 1 - 1 / (1 + np.exp(-3 * np.log(rates / 1e-4)))
    steepest = lr_find.suggestion(list(zip(rates, losses, strict=True)))[1]
    assert 1e-4 <= steepest <= 1e-4 * 10 ** (6 / 240 * 10)  # 1 / (1 - 0.9) = 10 steps later at most


def test_the_range_never_ends_below_the_steepest_point():
    points = [(10.0 ** (i / 10 - 6), loss) for i, loss in enumerate([1.0] * 20 + [0.5] + [9.0] * 20)]
    low, steepest, high = lr_find.suggestion(points)
    assert low < steepest <= high


# --------------------------------------------------------------------------- the range test


def test_the_rate_grows_exponentially_from_the_first_to_the_last(tiny_arguments, monkeypatch):
    run, config = made(tiny_arguments, "--lr_min", "1e-6", "--lr_max", "1e-3", "--lr_steps", "31")
    used, step = [], run.optimizer.step
    monkeypatch.setattr(run.optimizer, "step", lambda: (used.append(run.optimizer.param_groups[0]["lr"]), step()))
    rates = [lr for lr, _ in lr_find.range_test(run, config, CPU)]
    assert rates[0] == 1e-6 and len(rates) == 31  # two epochs of 6 steps are not enough: it goes on into more
    assert rates == pytest.approx(np.geomspace(1e-6, 1e-3, 31), rel=1e-12)
    assert used == pytest.approx(rates, rel=1e-12)


def test_the_rate_is_that_of_the_option_whatever_is_made_of_it(tiny_arguments, monkeypatch):
    run, config = made(tiny_arguments, "--lr_steps", "10", "--lr_scaling", "linear", "--base_batch_size", "4",
                       "--head_lr", "3e-2")
    used, step = [], run.optimizer.step
    groups = run.optimizer.param_groups
    monkeypatch.setattr(run.optimizer, "step", lambda: (used.append((groups[0]["lr"], groups[-1]["lr"])), step()))
    for (lr, _), (body, head) in zip(lr_find.range_test(run, config, CPU), used, strict=True):
        assert body == pytest.approx(4 * lr) and head == pytest.approx(40 * lr)


@pytest.mark.parametrize("bad, n_points", [(math.nan, 14), (math.inf, 14), (50.0, 15)])
def test_it_ends_when_the_loss_is_not_finite_or_has_exploded(tiny_arguments, bad, n_points):
    run, config = made(tiny_arguments, "--lr_steps", "40", "--lr_max", "1e-4")
    seen = []

    def losses(batch, real=run.task.losses):
        seen.append(1)
        return real(batch) * (bad if len(seen) >= 15 else 1.0)

    exchange(run.task, losses=losses)
    points = lr_find.range_test(run, config, CPU)
    assert len(points) == n_points and len(seen) == 15
    assert all(math.isfinite(loss) for _, loss in points[:14])


def test_training_after_a_range_test_is_that_without_one(tiny_arguments, tmp_path):
    """Weights, optimizer, random states, mode and order; and then a whole training, to the bit."""
    options = ["--dropout", "0.2", "--aug_delete", "0.2", "--lr_max", "1", "--lr_steps", "25"]
    results = []
    for name in ("without", "with"):
        run, config = made(tiny_arguments, *options)
        run.optimizer.zero_grad(set_to_none=True)
        if name == "with":
            before = state_of(run)
            lr_find.range_test(run, config, CPU)
            assert_same(state_of(run), before)
        (tmp_path / name).mkdir()
        trainer.fit(run, config, CPU, RunFolder(tmp_path / name))
        lines = [json.loads(x) for x in (tmp_path / name / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
        results.append((state_of(run), [{k: v for k, v in x.items() if k != "seconds"} for x in lines]))
    assert_same(results[0], results[1])


def test_a_range_test_in_the_middle_of_a_training_leaves_the_optimizers_moments(tiny_arguments, tmp_path):
    run, config = made(tiny_arguments)
    trainer.fit(run, config, CPU, RunFolder(tmp_path))
    run.model.eval()
    before = state_of(run)
    assert before[1]
    lr_find.range_test(run, config, CPU)
    assert_same(state_of(run), before)


# --------------------------------------------------------------------------- lr_find


FIND = ("--option", "lr_find", "--lr_steps", "30", "--lr_min", "1e-4", "--lr_max", "1", "--output_dir", "find")


def test_lr_find_writes_its_curve_and_says_which_command_uses_it(tiny_arguments, capsys):
    assert main(*FIND, *tiny_arguments, "--dev_out", "a file.txt") == 0
    out = capsys.readouterr().out
    assert sorted(p.name for p in Path("find").iterdir()) == [
        ".lock", "lr_find.csv", "lr_find.png", "result.json"]
    with open("find/lr_find.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    points = [(float(row["lr"]), float(row["loss"])) for row in rows]
    assert points[0][0] == 1e-4 and {row["seed"] for row in rows} == {"1337"}
    assert [float(row["smoothed"]) for row in rows] == lr_find.smooth([loss for _, loss in points])
    result = json.loads(Path("find/result.json").read_text(encoding="utf-8"))
    assert (result["low"], result["steepest"], result["high"]) == pytest.approx(lr_find.suggestion(points))
    assert Path("find/lr_find.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert f"lr range :: {result['low']:.1e} to {result['high']:.1e}, steepest {result['steepest']:.1e}\n" in out

    # The command is one that the program understands, with what was given and the rate.
    line = re.sub("^(use it|not confirmed) :: python run_llama.py ", "", out.splitlines()[-1])
    config, asked = parse_args(shlex.split(line)), parse_args([*FIND, *tiny_arguments, "--dev_out", "a file.txt"])
    assert config.option == "finetune" and config.lr == float(f"{result['steepest']:.1e}")
    assert config.given == asked.given - {"lr_steps", "lr_min", "lr_max", "output_dir"}
    same = config.given - {"option", "lr"}
    assert {n: getattr(config, n) for n in same} == {n: getattr(asked, n) for n in same}


def test_repeats_give_an_interval_and_confirm_ranks_by_dev_loss(tiny_arguments, capsys):
    # A warmup longer than an epoch: the short runs squeeze the whole run's schedule, not an epoch's.
    more = ["--lr_repeats", "3", "--confirm", "--warmup_steps", "8", "--head_lr", "6e-3"]
    assert main(*FIND, *tiny_arguments, *more) == 0
    out = capsys.readouterr().out
    result = json.loads(Path("find/result.json").read_text(encoding="utf-8"))
    each = np.array(result["each"])
    assert each.shape == (3, 3) and len(set(each[:, 1])) > 1, "each repeat has its seed"
    assert [result["low"], result["steepest"], result["high"]] == pytest.approx(np.median(each, axis=0))
    assert f"({each[:, 1].min():.1e} to {each[:, 1].max():.1e} over 3 seeds)" in out
    with open("find/lr_find.csv", encoding="utf-8", newline="") as file:
        assert {row["seed"] for row in csv.DictReader(file)} == {"1337", "1338", "1339"}

    losses = [row["dev_loss"] for row in result["confirmed"]]
    rates = sorted(row["lr"] for row in result["confirmed"])
    assert losses == sorted(losses) and len(set(losses)) > 1
    assert rates == pytest.approx(np.geomspace(result["low"] / 10, result["high"], 5))
    assert bool(result["decided"]) != bool(result["undecided"])
    config = used(out)
    assert config.lr == pytest.approx(result["decided"] or result["steepest"], rel=0.05)
    assert config.head_lr == pytest.approx(2 * config.lr, rel=0.1), "it keeps its proportion to the rate"


def used(out):
    """The options of the command that lr_find prints last."""
    return parse_args(shlex.split(out.splitlines()[-1])[5:])  # use it :: python run_llama.py


def test_where_the_labels_mean_nothing_no_rate_is_recommended(tiny_arguments, tiny_data, capsys):
    draw = random.Random(0)
    for split in ("train", "dev"):
        write_split(tiny_data[split], [(draw.randrange(3), sentence) for _, sentence in tiny_sentences(90, 1)])
    assert main(*FIND, *tiny_arguments, "--confirm", "--lr_steps", "20") == 0
    out = capsys.readouterr().out
    result = json.loads(Path("find/result.json").read_text(encoding="utf-8"))
    assert result["decided"] is None and f"confirm :: undecided: {result['undecided']}" in out
    assert out.splitlines()[-1].startswith("not confirmed :: python run_llama.py")
    assert "no rate has learned anything yet that 90 dev sentences can tell from chance" in result["undecided"]
    assert "more --lr_steps, a wider range (--lr_min, --lr_max)" in result["undecided"]
    assert "the range test's steepest rate, which nothing confirms" in out and "confirm :: decided" not in out
    assert used(out).lr == pytest.approx(result["steepest"], rel=0.05)
    assert result["steepest"] != pytest.approx(result["confirmed"][0]["lr"], rel=0.1)


def test_the_one_rate_that_learns_is_found_and_recommended(tiny_arguments, tiny_data, capsys, monkeypatch):
    write_split(tiny_data["dev"], tiny_sentences(120, 5))
    monkeypatch.setattr(lr_find, "suggestion", lambda points: (3e-6, 1e-4, 3e-3))  # 3e-7, ..., 3e-4, 3e-3
    assert main(*FIND, *tiny_arguments, "--confirm", "--epochs", "3", "--scheduler", "constant") == 0
    out = capsys.readouterr().out
    result = json.loads(Path("find/result.json").read_text(encoding="utf-8"))
    assert result["decided"] == pytest.approx(3e-3) and not result["undecided"]
    assert out.count("confirm :: lr 3.0e-03, seed ") == 3, "each of three seeds agrees"
    assert ("confirm :: decided: lr 3.0e-03 has the lowest dev loss with each of 3 seeds, by more than chance; it is "
            "the highest that was tried") in out
    assert used(out).lr == pytest.approx(3e-3)


def test_confirm_decides_where_a_rate_is_right_and_not_where_none_is():
    """A short form of benchmarks/bench_lr_confirm.py, which counts over hundreds of repetitions."""
    assert bench_lr_confirm.is_right("middle", bench_lr_confirm.confirmed("middle", seed=1, steps=30))
    for case in ("noise", "equal"):
        assert [bench_lr_confirm.confirmed(case, seed, steps=20).lr for seed in range(2)] == [None] * 2


# Three classes of 20 sentences; what a model says of them.
LABELS = np.repeat([0, 1, 2], 20)
KNOWS = np.log(np.full((60, 3), 0.1) + 0.7 * np.eye(3)[LABELS])
KNOWS_LITTLE = np.log(np.full((60, 3), 0.3) + 0.1 * np.eye(3)[LABELS])


def noisy(log_probs, scale=0.1, seed=0):
    raw = log_probs + scale * np.random.default_rng(seed).standard_normal(log_probs.shape)
    return raw - np.log(np.exp(raw).sum(1, keepdims=True))


@pytest.mark.parametrize("outputs, best, said", [
    ([noisy(KNOWS), noisy(KNOWS_LITTLE, seed=1), None], 0, ""),
    ([None, noisy(KNOWS), None], 1, ""),
    ([None, None, None], -1, "the training diverged at every rate"),
    ([noisy(KNOWS), noisy(KNOWS, seed=1), noisy(KNOWS_LITTLE)], None, "60 dev sentences do not tell lr"),
    ([noisy(KNOWS), noisy(KNOWS), noisy(KNOWS_LITTLE)], 0, "60 dev sentences do not tell lr 1.0e-03 from lr 1.0e-02"),
    ([noisy(np.zeros((60, 3)), 1), noisy(np.zeros((60, 3)), 1, 1), noisy(KNOWS[::-1], 0.1, 2)], None,
     "no rate has learned anything yet that 60 dev sentences can tell from chance"),
])
def test_what_speaks_against_a_rate(outputs, best, said):
    found, reason = confirm.doubt([1e-3, 1e-2, 1e-1], outputs, LABELS)
    assert (reason.startswith(said) if said else not reason) and found == (found if best is None else best)


def test_a_rate_that_has_learned_the_classes_frequencies_alone_knows_nothing():
    """Its loss is far below that of the others, whose heads begin elsewhere, and it beats chance on no sentence."""
    labels = np.repeat([0, 1, 2], [45, 10, 5])
    frequent = noisy(np.tile(np.log([0.75, 0.17, 0.08]), (60, 1)), 0.01)
    others = [noisy(np.tile(np.log([0.2, 0.4, 0.4]), (60, 1)), 0.01, seed) for seed in (1, 2)]
    assert (confirm._losses(frequent, labels).mean() < confirm._losses(others[0], labels).mean() - 0.5)
    assert confirm.doubt([1e-3, 1e-2, 1e-1], [frequent, *others], labels)[1].startswith("no rate has learned")


def test_chance_is_taken_for_a_difference_as_often_as_it_says():
    """Labels that know nothing of 2,000 models' answers: a test at a level p says yes in a part p of them."""
    draw = np.random.default_rng(0)
    outputs = [noisy(np.zeros((100, 3)), 1, seed) for seed in range(2000)]
    values = []
    for log_probs in outputs:
        labels = draw.integers(3, size=100)
        frequencies = np.bincount(labels, minlength=3) / 100
        values.append(confirm._p_value(-log_probs @ frequencies - confirm._losses(log_probs, labels)))
    for level in (0.01, 0.05, 0.25):
        assert abs(np.mean(np.array(values) < level) - level) < 4 * math.sqrt(level * (1 - level) / 2000)


def test_seeds_that_prefer_different_rates_leave_it_undecided(tiny_arguments, monkeypatch, capsys):
    config = parse_args(["--option", "lr_find", *tiny_arguments, "--seed", "7"])
    at = {1e-3: (KNOWS, KNOWS_LITTLE), 1e-1: (KNOWS_LITTLE, KNOWS)}

    def short_run(make_run, config, device):
        two = next((two for lr, two in at.items() if math.isclose(lr, config.lr)), (np.zeros((60, 3)) - 1,) * 2)
        return noisy(two[config.seed - 7], seed=config.seed), LABELS, 10

    monkeypatch.setattr(confirm, "short_run", short_run)
    found = confirm.confirm(None, config, CPU, 1e-2, 1e-1)
    assert found.lr is None and found.doubt.startswith("with seed 7 lr 1.0e-03 is best, with seed 8 lr 1.0e-01;")
    assert "seed 9" not in capsys.readouterr().out


def test_a_rate_at_which_the_training_diverges_is_ranked_last(tiny_arguments, capsys):
    _, config = made(tiny_arguments)
    inputs = inputs_room.load(config, ("train", "dev"))

    def make_run(changed):
        run = jobs.build_job(changed, inputs, CPU)
        if changed.lr < 3e-3:
            exchange(run.task, losses=lambda batch, real=run.task.losses: real(batch) * math.nan)
        return run

    found = confirm.confirm(make_run, replace(config, lr_steps=10), CPU, 1e-2, 1e-1)  # 1e-3, 3.2e-3, ..., 1e-1
    assert [row["dev_loss"] is None for row in found.rates] == [False] * 4 + [True]
    assert found.rates[-1]["lr"] == pytest.approx(1e-3)
    assert "lr 1.0e-03, seed 1337: it diverged" in capsys.readouterr().out


def test_the_short_runs_of_confirm_go_through_the_whole_runs_schedule(tiny_arguments):
    _, config = made(tiny_arguments, "--epochs", "4", "--lr_steps", "10")
    inputs, seen, made_of, windows = inputs_room.load(config, ("train", "dev")), [], [], []

    def make_run(changed):
        run = jobs.build_job(changed, inputs, CPU)
        exchange(run, schedule=lambda step, history: seen.append(step) or 1.0)
        windows.extend(tuple(rows) for epoch in (0, 1) for rows in run.task.order(epoch))
        real = run.task.make_batch
        exchange(run.task, make_batch=lambda rows, epoch: made_of.append((tuple(rows), epoch)) or real(rows, epoch))
        return run

    confirm.short_run(make_run, config, CPU)
    rows = [row for part, _ in made_of for row in part]
    assert rows == [row for window in windows[:10] for row in window], "the first steps of the run itself"
    assert {epoch for _, epoch in made_of} == {0}, "all of them as one epoch"
    assert seen == [0, 2, 4, 7, 9, 12, 14, 16, 19, 21]  # 10 steps for 4 epochs of 6: two of them have a part
    seen.clear()
    confirm.short_run(make_run, replace(config, lr_steps=50), CPU)
    assert seen == list(range(24)), "never longer than the run itself"


def test_a_range_that_begins_too_high_is_refused_and_leaves_no_folder(tiny_arguments, capsys, monkeypatch):
    monkeypatch.setattr(lr_find, "range_test", lambda *_: [(1e-4, 1.0)] * 3)
    assert main(*FIND, *tiny_arguments) == 2
    assert "--lr_min 0.0001: the loss was finite for 3 steps only" in capsys.readouterr().err
    assert not Path("find").exists()


def test_what_cannot_be_written_leaves_no_folder(tiny_arguments, capsys, monkeypatch):
    def full(path, value):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(files, "write_json", full)
    assert main(*FIND, *tiny_arguments) == 2
    assert "No space left" in capsys.readouterr().err and not Path("find").exists()


def test_a_loss_that_never_falls_is_said(tiny_arguments, capsys, monkeypatch):
    monkeypatch.setattr(lr_find, "range_test", lambda *_: [(10.0 ** (i / 5 - 4), 1.0 + i) for i in range(20)])
    assert main(*FIND, *tiny_arguments) == 0
    assert "the loss never fell" in capsys.readouterr().err


def test_the_command_quotes_what_a_shell_would_read():
    config = parse_args(["--train", "a b$c.txt", "--milestones", "2,3", "--nesterov", "--lr", "1e-3"])
    words = shlex.split(lr_find.command(config, lr="2e-3"))
    assert words[:4] == ["python", "run_llama.py", "--option", "finetune"]
    assert parse_args(words[2:]) == parse_args(
        ["--option", "finetune", "--train", "a b$c.txt", "--milestones", "2,3", "--nesterov", "--lr", "2e-3"])
