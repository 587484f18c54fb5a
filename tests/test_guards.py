"""The guards leave healthy runs alone and save those that diverge; what is said of a run that has ended."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import write_split
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import trim_mean

import run_llama
from training import guards


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    sentences = [s for _, s in tiny.labelled_sentences(random.Random(0), 300)]
    return tiny.write_model(tmp_path_factory.mktemp("model"), sentences)


def finetune(model: Path, folder: Path, rows, dev, *options) -> tuple[int, dict, list[dict]]:
    """A run on these sentences: its exit code, its result and its events."""
    out = folder / f"run-{len(list(folder.iterdir()))}"
    code = run_llama.main([
        "--option", "finetune", "--pretrained_model_path", str(model), "--output_dir", str(out),
        "--train", str(write_split(folder / "train.txt", rows)), "--dev", str(write_split(folder / "dev.txt", dev)),
        "--patience", "0", "--dtype", "float32", *map(str, options)])
    events = [json.loads(line) for line in (out / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return code, json.loads((out / "result.json").read_text(encoding="utf-8")), events


# --------------------------------------------------------------------------- healthy runs


def test_wrong_labels_end_no_run(model, tmp_path):
    """Batches of 8 from sentences that one word decides, 5% of them with the wrong label: a clean batch has a tiny
    loss, and one with a wrong label hundreds of times as much."""
    draw = random.Random(2)
    rows, dev = tiny.labelled_sentences(draw, 400, flipped=0.05), tiny.labelled_sentences(draw, 60)
    code, result, events = finetune(model, tmp_path, rows, dev, "--lr", "6e-3", "--epochs", "3")
    assert (code, result["stopped"], result["rollbacks"], events) == (0, "finished", 0, [])
    assert result["dev"]["acc"] == 1.0


def test_class_weights_with_a_rare_class_end_no_run(model, tmp_path):
    draw = random.Random(3)
    rows, dev = (tiny.labelled_sentences(draw, n, minority=0.05) for n in (400, 100))
    code, result, events = finetune(model, tmp_path, rows, dev, "--lr", "6e-3", "--epochs", "3", "--class_weights",
                                    "balanced")
    assert (code, result["stopped"], result["rollbacks"], events) == (0, "finished", 0, [])
    assert result["dev"]["acc"] > 0.95


def test_always_the_frequent_class_is_no_collapse_at_first(model, tmp_path, capsys):
    """With 97 of 100 sentences in one class, a model answers that class before it learns the other."""
    draw = random.Random(4)
    rows, dev = (tiny.labelled_sentences(draw, n, minority=0.03) for n in (400, 100))
    code, result, events = finetune(model, tmp_path, rows, dev, "--lr", "6e-3", "--epochs", "4", "--warmup_ratio", "0")
    assert (code, result["stopped"], result["rollbacks"], events) == (0, "finished", 0, [])
    assert "collapsed" not in capsys.readouterr().out
    assert result["dev"]["acc"] > 0.98


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 9), st.floats(0, guards.TRIMMED), st.floats(1, 1e9), st.integers(0, 2**32 - 1))
def test_a_minority_of_high_losses_is_no_divergence(classes, part, high, seed):
    """Whatever up to three tenths of the sentences have, when the others are no worse than guessed."""
    draw = np.random.default_rng(seed)
    losses = draw.uniform(0, math.log(classes), guards.REMEMBERED)
    losses[: int(part * guards.REMEMBERED)] = high
    draw.shuffle(losses)
    assert guards.divergence(losses.tolist(), guards.guessing_loss(classes, None), 0) == ""


# --------------------------------------------------------------------------- runs that diverge


def test_the_typical_loss_is_scipys_trimmed_mean():
    losses = np.random.default_rng(0).exponential(size=200)
    lower = np.sort(losses)[:140]
    assert guards.typical(losses.tolist()) == pytest.approx(trim_mean(lower, 0))
    assert guards.typical([1.0]) == 1.0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 90), max_size=60))
def test_the_remembered_losses_are_the_last_steps(sizes):
    steps = [[random.random() for _ in range(size)] for size in sizes]
    recent: list[float] = []
    for losses in steps:
        recent = guards.remember(recent, losses)
    wanted = [x for losses in steps for x in losses[:: max(1, math.ceil(len(losses) / guards.PER_STEP))]]
    assert recent == wanted[-guards.REMEMBERED :]
    assert all(len(losses[:: math.ceil(len(losses) / guards.PER_STEP)]) <= guards.PER_STEP for losses in steps)


def test_most_sentences_far_above_guessing_is_divergence_and_three_steps_that_are_not_finite():
    guessing = guards.guessing_loss(2, None)
    assert guessing == guards.guessing_loss(2, 0.1) == math.log(2) and guards.guessing_loss(2, 3.0) == 3.0
    constant = [0.0, 8.0] * (guards.REMEMBERED // 2)  # always one of two classes, and sure of it
    assert "guessing" in guards.divergence(constant, guessing, 0)
    assert guards.divergence(constant[:-1], guessing, 0) == "", "too few to tell"
    assert guards.divergence([], guessing, 2) == "" and "not finite" in guards.divergence([], guessing, 3)


def test_an_evaluation_is_a_decline_only_where_training_got_worse():
    guessing = math.log(2)
    good = {"dev_acc": 0.9, "dev_loss": 0.3, "train_loss": 0.3}
    bad = {"dev_acc": 0.5, "dev_loss": 0.9, "train_loss": 0.8, "one_class": 1}
    several = {k: v for k, v in bad.items() if k != "one_class"}

    def decline(scores, best, mean_loss=0.6, had_rollback=False):
        columns = {name: value for name, value in scores.items() if name != "one_class"}
        return guards.decline(columns, best, "one_class" in scores, 100, mean_loss, guessing, had_rollback)

    assert decline(bad, good) == "dev acc is 0.500 after 0.900"
    assert decline(bad, {}) == "", "there was nothing better"
    assert decline({**bad, "dev_acc": 0.85}, good) == "", "chance"
    assert decline({**bad, "train_loss": 0.2}, good) == "", "training got no worse"
    assert decline(several, good) == "", "several classes"
    assert decline(bad, {}, 0.9).startswith("the mean loss of the epoch is 0.9, where guessing has 0.693")
    assert decline(several, {}, 0.9) == "" and decline(several, {}, 1.1) != ""
    assert decline({**several, "dev_loss": 0.6}, {}, 1.1) == "", "dev is better than guessing"
    assert decline({**several, "dev_loss": 0.68}, {}, 1.1) != "", "dev is no better"
    assert decline(several, {}, 0.72) == "" and decline(several, {}, 0.72, had_rollback=True) != ""
    assert decline({**several, "dev_loss": 0.6}, {}, 0.72, had_rollback=True) == "", "it learns"
    assert decline(several, {}, 0.69, had_rollback=True) == ""
    assert decline(bad, {}, math.nan, had_rollback=True) == decline(bad, good, math.nan) == "", "too few sentences"
    assert decline({**several, "dev_loss": math.nan}, good) == "the dev loss is not finite"


def test_a_rollback_returns_only_to_a_state_that_is_no_worse_than_guessing():
    guessing = math.log(2)
    assert guards.is_healthy([], guessing, 0) and guards.is_healthy([0.6, 0.8], guessing, 0)
    assert not guards.is_healthy([0.6], guessing, 1)
    assert not guards.is_healthy([0.1] * 9 + [9.0], guessing, 0), "a tenth of the sentences is enough"


def test_a_run_that_diverges_is_said_and_a_lower_rate_saves_it(model, tmp_path, capsys):
    draw = random.Random(5)
    rows, dev = tiny.labelled_sentences(draw, 320), tiny.labelled_sentences(draw, 100)
    options = ["--lr", "3", "--epochs", "3", "--scheduler", "constant"]
    _, off, events = finetune(model, tmp_path, rows, dev, *options, "--guards", "off")
    assert off["dev"]["acc"] < 0.65 and {e["event"] for e in events} == {"spike"} and len(events) <= 5
    capsys.readouterr()
    code, on, events = finetune(model, tmp_path, rows, dev, *options)
    rollbacks = [e["detail"] for e in events if e["event"] == "rollback"]
    assert code == 0 and on["dev"]["acc"] > 0.95 and on["rollbacks"] == len(rollbacks) >= 1
    assert "the learning rate times 0.1" in rollbacks[0] and "rollback" in capsys.readouterr().err


def test_the_diagnosis_is_printed_and_kept(model, tmp_path, capsys):
    draw = random.Random(6)
    rows, dev = tiny.labelled_sentences(draw, 64), tiny.labelled_sentences(draw, 100)
    _, result, _ = finetune(model, tmp_path, rows, dev, "--lr", "1e-7", "--epochs", "1")
    (line,) = result["diagnosis"]
    assert "far too small" in line and f"diagnosis :: {line}\n" in capsys.readouterr().out
    assert torch.get_num_threads() == 1
