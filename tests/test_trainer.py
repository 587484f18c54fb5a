"""The one training loop: its gradients, the best epoch, early stopping, the guards, rollbacks."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from conftest import exchange
from loops import CPU, make_loop
from torch.nn.functional import nll_loss
from torch.utils._python_dispatch import TorchDispatchMode

import dataset
from schedule import make_schedule
from training import gradients, trainer
from training.device import Device
from training.task import Evaluation


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_training_equals_the_loop_that_anyone_would_write(parts, tmp_path, clip):
    """Two epochs end with the weights of a plain loop over the same batches with PyTorch's own parts."""
    model, splits, tokenizer = parts
    model.dropout.p = 0.0
    plain = copy.deepcopy(model)
    options = ["--epochs", "2", "--batch_size", "20", "--lr", "1e-3", "--max_grad_norm", str(clip)]
    loop = make_loop(parts, tmp_path, *options, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    loop.run()

    optimizer, train = torch.optim.SGD(plain.parameters(), lr=0.1), splits["train"]
    for epoch in range(2):
        for rows in dataset.epoch_order(train.lengths, 20, loop.config.seed, epoch):
            batch = dataset.make_batch(train, rows, tokenizer.pad_id)
            optimizer.zero_grad()
            nll_loss(plain(batch["tokens"], batch["lengths"]), batch["labels"]).backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
            optimizer.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n, micro", [(16, 4), (16, 5), (13, 4), (7, 7), (5, 1)])
def test_micro_batches_give_the_gradient_of_the_one_big_batch(parts, tmp_path, n, micro):
    model, splits, tokenizer = parts
    model.dropout.p = 0.0
    batch = dataset.make_batch(splits["train"], np.arange(n), tokenizer.pad_id)
    nll_loss(model(batch["tokens"], batch["lengths"]), batch["labels"]).backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loop = make_loop(parts, tmp_path, "--batch_size", str(micro))
    loop.accumulate(np.arange(n))
    for p, expected in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=0, atol=1e-6)


def test_a_pass_on_a_cpu_has_so_many_tokens_at_most(parts, tmp_path, monkeypatch):
    """And the gradient is that of the whole batch; a GPU gets it in one piece."""
    model, splits, tokenizer = parts
    model.dropout.p = 0.0
    rows = np.arange(13)
    batch = dataset.make_batch(splits["train"], rows, tokenizer.pad_id)
    nll_loss(model(batch["tokens"], batch["lengths"]), batch["labels"]).backward()
    whole = [p.grad.clone() for p in model.parameters()]
    sizes = []
    for most in (1, 40, 10**6):
        monkeypatch.setattr(trainer, "PASS_TOKENS", most)
        model.zero_grad()
        loop = make_loop(parts, tmp_path, "--batch_size", "13")
        exchange(loop.task, losses=lambda b, real=loop.task.losses: sizes.append(b["tokens"].numel())
                            or real(b))
        loop.accumulate(rows)
        for p, expected in zip(model.parameters(), whole, strict=True):
            torch.testing.assert_close(p.grad, expected, rtol=0, atol=1e-6)
        if most == 40:
            assert all(size <= 40 for size in sizes[13:])
    assert len(sizes[:13]) == 13 and sizes[-1] == batch["tokens"].numel()
    monkeypatch.setattr(trainer, "PASS_TOKENS", 40)
    loop.device = Device(torch.device("cuda"), torch.float32)
    assert loop.rows_per_pass(rows) == len(rows)


def test_a_batchs_weights_multiply_each_loss_as_pytorchs_do(parts, tmp_path):
    model, splits, _ = parts
    model.dropout.p = 0.0
    weights, rows = torch.tensor([0.5, 2.0, 3.0]), np.arange(13)
    loop = make_loop(parts, tmp_path, "--batch_size", "13")
    real = loop.task.make_batch

    def make_batch(rows, epoch):
        batch = real(rows, epoch)
        return {**batch, "weights": weights[batch["labels"]]}

    exchange(loop.task, make_batch=make_batch)
    losses, plain = loop.accumulate(rows)
    gradient = model.classifier_head.weight.grad.clone()
    model.zero_grad()
    batch = real(rows, 0)
    log_probs, labels = model(batch["tokens"], batch["lengths"]), batch["labels"]
    want = nll_loss(log_probs, labels, weight=weights, reduction="none")
    want.mean().backward()
    torch.testing.assert_close(losses, want.detach())
    torch.testing.assert_close(plain, nll_loss(log_probs, labels, reduction="none").detach())
    torch.testing.assert_close(gradient, model.classifier_head.weight.grad)


def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(parts, tmp_path, capsys):
    model, _, _ = parts
    initial = copy.deepcopy(model.state_dict())

    def train(options, limit, folder):
        model.load_state_dict(initial)
        torch.manual_seed(3)
        (tmp_path / folder).mkdir()
        loop = make_loop(parts, tmp_path / folder, "--epochs", "1", "--lr", "1e-3", *options)
        real = loop.task.make_batch

        def make_batch(rows, epoch):
            if len(rows) > limit:
                raise torch.OutOfMemoryError("no room")
            return real(rows, epoch)

        exchange(loop.task, make_batch=make_batch)
        loop.run()
        return loop, [p.detach().clone() for p in model.parameters()]

    loop, tight = train(["--batch_size", "24"], 7, "tight")
    assert loop.progress.micro_batch == 6 and "out_of_memory" in capsys.readouterr().err
    _, small = train(["--batch_size", "6", "--grad_accum", "4"], 99, "small")
    for a, b in zip(tight, small, strict=True):
        assert torch.equal(a, b)  # dropout's random numbers too: the window began anew from its random state


def test_the_best_epoch_is_the_highest_accuracy_then_the_lowest_loss(parts, tmp_path, capsys):
    scores = iter([(0.5, 1.0), (0.6, 0.9), (0.6, 0.8), (0.6, 0.85), (0.4, 0.1)])
    saved = []

    def evaluate():
        acc, loss = next(scores)
        return {"train_acc": 0.25, "dev_loss": loss, "dev_acc": acc, "dev_f1": acc}

    loop = make_loop(parts, tmp_path, "--epochs", "5", "--batch_size", "96", evaluate=evaluate,
                     save_best=lambda folder: saved.append(1))
    assert loop.run()["epoch"] == 2 and len(saved) == 3
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert len(lines) == 5
    assert lines[1].endswith("train acc :: 0.250, dev acc :: 0.600, lr :: 1.00e-05")
    assert [e["epoch"] for e in read_jsonl(tmp_path / "epochs.jsonl")] == list(range(5))
    steps = read_jsonl(tmp_path / "steps.jsonl")
    assert [s["step"] for s in steps] == [1, 2, 3, 4, 5]
    assert set(steps[0]) == {"step", "epoch", "lr", "loss", "grad_norm", "tokens", "seconds"}
    assert all(s["tokens"] == parts[1]["train"].lengths.sum() for s in steps)


@pytest.mark.parametrize("monitor, values, best, n_run", [
    ("dev_acc", [0.1, 0.3, 0.2, 0.2, 0.9], 1, 4),  # patience 2 ends it before the last
    ("dev_loss", [0.9, 0.4, 0.5, 0.6, 0.1], 1, 4),
    ("dev_f1", [0.1, 0.2, 0.3, 0.4, 0.5], 4, 5),
])
def test_early_stopping_counts_evaluations_without_a_new_best(parts, tmp_path, monitor, values, best, n_run):
    left = iter(values)
    loop = make_loop(parts, tmp_path, "--epochs", "5", "--batch_size", "96", "--patience", "2", "--monitor", monitor,
                     evaluate=lambda: {"train_acc": 0.0, "dev_loss": 1.0, "dev_acc": 0.0, monitor: next(left)})
    assert loop.run()["epoch"] == best
    assert len(loop.progress.history) == n_run and (loop.progress.stopped == "patience") == (n_run == 4)


def test_evaluations_inside_an_epoch_stand_at_their_part_of_it(parts, tmp_path):
    loop = make_loop(parts, tmp_path, "--epochs", "2", "--batch_size", "10", "--eval_every", "0.5")
    loop.run()
    lines = read_jsonl(tmp_path / "epochs.jsonl")
    assert [line["epoch"] for line in lines] == [0.5, 1.0, 1.5, 2.0]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]


def test_the_logged_rate_is_the_schedules_closed_form(parts, tmp_path):
    loop = make_loop(parts, tmp_path, "--epochs", "3", "--batch_size", "10", "--lr", "3e-4",
                     schedule=make_schedule("cosine", total_steps=30, steps_per_epoch=10, warmup_steps=4))
    loop.run()
    for i, line in enumerate(read_jsonl(tmp_path / "steps.jsonl")):
        expected = (i + 1) / 4 if i < 4 else 1e-3 + (1 - 1e-3) * (1 + math.cos(math.pi * (i - 4) / 26)) / 2
        assert line["lr"] == pytest.approx(3e-4 * expected, rel=1e-12)


def test_the_moving_average_is_what_is_evaluated_and_the_raw_weights_go_on(parts, tmp_path):
    model, _, _ = parts
    seen = []

    def evaluate():
        seen.append(model.classifier_head.weight.detach().clone())
        return {"train_acc": 0.0, "dev_loss": 1.0, "dev_acc": 0.0}

    mean = model.classifier_head.weight.detach().clone()
    raw = []  # at update t = 0, 1, ... the decay is min(0.7, (1 + t) / (10 + t)): 1/10, 2/11, 3/12, 4/13
    loop = make_loop(parts, tmp_path, "--epochs", "1", "--batch_size", "24", "--lr", "1e-2", "--ema", "0.7",
                     evaluate=evaluate, on_step=lambda *_: raw.append(model.classifier_head.weight.detach().clone()))
    loop.run()
    for decay, weight in zip((1 / 10, 2 / 11, 3 / 12, 4 / 13), raw, strict=True):
        mean = decay * mean + (1 - decay) * weight
    torch.testing.assert_close(seen[0], mean)
    assert torch.equal(model.classifier_head.weight, raw[-1]) and not torch.equal(raw[-1], seen[0])


def test_the_update_ratio_is_logged_for_each_layer(parts, tmp_path):
    model, _, _ = parts
    weights = [model.llama.layers[1].feed_forward.w1.weight.detach().clone()]
    for p in model.parameters():
        p.requires_grad_(p is model.llama.layers[1].feed_forward.w1.weight)
    loop = make_loop(parts, tmp_path, "--epochs", "1", "--batch_size", "24", "--lr", "1e-2", on_step=lambda *_:
                     weights.append(model.llama.layers[1].feed_forward.w1.weight.detach().clone()))
    loop.run()
    ratios = read_jsonl(tmp_path / "epochs.jsonl")[0]["update_ratio"]
    expected = float((weights[3] - weights[2]).norm() / weights[2].norm())  # the third of four steps: the middle
    assert ratios == {"llama.layers.1": pytest.approx(expected, rel=1e-5)}


# --------------------------------------------------------------------------- the guards


def poison(loop, steps):
    """Make the loss of these steps (from 1) not a number."""
    real = loop.task.losses
    exchange(loop.task, losses=lambda batch: real(batch) * (
        math.nan if loop.progress.step + 1 in steps else 1.0))


def test_a_loss_that_is_not_finite_skips_the_step(parts, tmp_path, capsys):
    model, _, _ = parts
    weights = []
    loop = make_loop(parts, tmp_path, "--epochs", "1", "--batch_size", "24", "--lr", "1e-3",
                     on_step=lambda *_: weights.append(model.classifier_head.weight.detach().clone()))
    poison(loop, {2})
    loop.run()
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    assert loop.progress.skipped == 1 and "the loss is not finite (the loss)" in capsys.readouterr().err
    assert read_jsonl(tmp_path / "events.jsonl")[0]["event"] == "skipped"
    assert math.isfinite(read_jsonl(tmp_path / "epochs.jsonl")[0]["train_loss"])


def test_the_first_module_whose_output_is_not_finite_is_named(parts, tmp_path, capsys):
    model, _, _ = parts
    with torch.no_grad():
        model.llama.layers[1].feed_forward.w3.weight[0, 0] = math.inf
    make_loop(parts, tmp_path, "--epochs", "1", "--batch_size", "96").run()
    assert "the output of llama.layers.1.feed_forward.w3" in capsys.readouterr().err


def test_the_decay_of_the_average_ends_at_the_one_that_was_asked_for(parts, tmp_path):
    loop = make_loop(parts, tmp_path, "--ema", "0.3", "--lr", "1e-2")
    mean, weight = loop.average.values[0].clone(), loop.parameters[0].detach()
    loop.progress.step = 90
    weight.add_(1.0)
    loop.average.update(90)
    torch.testing.assert_close(loop.average.values[0], 0.3 * mean + 0.7 * weight)


def test_three_bad_steps_roll_back_and_cut_the_rate_three_times_then_stop(parts, tmp_path):
    loop = make_loop(parts, tmp_path, "--epochs", "3", "--batch_size", "10", "--lr", "1e-3")
    poison(loop, set(range(13, 100)))
    after_epoch = []
    real_evaluate = loop.task.evaluate

    def evaluate():
        after_epoch.append([p.detach().clone() for p in loop.parameters])
        return real_evaluate()

    exchange(loop.task, evaluate=evaluate)
    best = loop.run()
    events = [e["event"] for e in read_jsonl(tmp_path / "events.jsonl")]
    assert events.count("rollback") == 3 and events[-1] == "diverged"
    assert loop.progress.stopped == "diverged" and loop.progress.lr_factor == pytest.approx(1e-3)
    assert best["epoch"] == 0, "the epoch before the trouble is the best one"
    for p, good in zip(loop.parameters, after_epoch[0], strict=True):
        assert torch.equal(p, good), "it ends with the weights of the last good state"
    assert [s["step"] for s in read_jsonl(tmp_path / "steps.jsonl")] == list(range(1, 11)), "and their log"


def test_a_loss_above_its_start_for_long_is_divergence(parts, tmp_path):
    loop = make_loop(parts, tmp_path, "--epochs", "30", "--batch_size", "10", "--patience", "0",
                     optimizer=torch.optim.SGD(parts[0].parameters(), lr=30.0))
    loop.run()
    assert loop.progress.rollbacks > 0
    assert all(torch.isfinite(p).all() for p in loop.parameters)


def test_with_the_guards_off_nothing_is_rolled_back(parts, tmp_path):
    loop = make_loop(parts, tmp_path, "--epochs", "1", "--batch_size", "10", "--guards", "off")
    poison(loop, {2, 3, 4, 5})
    loop.run()
    assert loop.progress.rollbacks == 0 and loop.progress.step == 10


def test_a_spike_is_counted_and_of_several_in_a_row_one_is_said(parts, tmp_path):
    loop = make_loop(parts, tmp_path, "--epochs", "3", "--batch_size", "10")
    real = loop.task.losses
    exchange(loop.task, losses=lambda batch: real(batch) * (
        3.0 if loop.progress.step + 1 in (20, 21, 25) else 1.0))
    loop.run()
    assert loop.progress.spikes == 3
    assert [(e["event"], e["step"]) for e in read_jsonl(tmp_path / "events.jsonl")] == [("spike", 20), ("spike", 25)]


def test_a_rollback_lowers_the_rate_of_every_step_behind_it(parts, tmp_path):
    """The same batches in the same order at the same rate would be no other try."""
    loop = make_loop(parts, tmp_path, "--epochs", "2", "--batch_size", "10", "--lr", "1e-3")
    tried = []
    real = loop.task.losses

    def losses(batch):
        tried.append((loop.progress.step, loop.optimizer.param_groups[0]["lr"]))
        return real(batch) * (math.nan if loop.progress.step in (12, 13, 14) and not loop.progress.rollbacks else 1.0)

    exchange(loop.task, losses=losses)
    loop.run()
    behind = dict(tried[-10:])
    assert loop.progress.rollbacks == 1 and list(behind) == list(range(10, 20))
    assert all(lr == pytest.approx(1e-4) for lr in behind.values()) and dict(tried[:10])[9] == 1e-3


def test_a_rollback_keeps_the_micro_batch_that_fits(parts, tmp_path):
    loop = make_loop(parts, tmp_path, "--epochs", "2", "--batch_size", "10", "--lr", "1e-3")
    poison(loop, {14, 15, 16})
    real = loop.task.make_batch

    def make_batch(rows, epoch):
        if len(rows) > 5 and loop.progress.step == 11:
            raise torch.OutOfMemoryError("no room")
        if loop.progress.rollbacks:
            poison(loop, set())
        return real(rows, epoch)

    exchange(loop.task, make_batch=make_batch)
    loop.run()
    assert loop.progress.rollbacks >= 1 and loop.progress.micro_batch == 5


def test_looking_for_what_is_not_finite_takes_micro_batches_and_survives_without_memory(parts, tmp_path):
    """It used to send the whole window through one pass, outside the handling of out of memory."""
    loop = make_loop(parts, tmp_path, "--epochs", "1", "--batch_size", "4", "--grad_accum", "6", "--lr", "1e-3")
    sizes, real = [], loop.task.losses
    exchange(loop.task, losses=lambda batch: sizes.append(len(batch["labels"])) or real(batch) * math.nan)
    loop.run()
    assert max(sizes) == 4 and loop.progress.skipped > 0

    def no_room(batch):
        raise torch.OutOfMemoryError("no room")

    exchange(loop.task, losses=no_room)
    batches = loop.micro_batches(np.arange(8))
    assert gradients.find_not_finite(loop.model, CPU, no_room, batches) == "there is not enough memory to look where"


def test_the_weights_are_kept_when_the_monitored_score_is_not_a_number(parts, tmp_path):
    saved, left = [], iter([math.nan, 0.5, math.nan])
    loop = make_loop(parts, tmp_path, "--epochs", "3", "--batch_size", "96", "--monitor", "dev_loss",
                     "--guards", "off",
                     evaluate=lambda: {"train_acc": 0.0, "dev_loss": next(left), "dev_acc": 0.0},
                     save_best=lambda folder: saved.append(1))
    assert loop.run()["epoch"] == 1 and len(saved) == 2


def test_without_a_finite_step_there_is_no_training_loss(parts, tmp_path, capsys):
    loop = make_loop(parts, tmp_path, "--epochs", "2", "--batch_size", "24")
    poison(loop, set(range(1, 99)))
    assert loop.run()["train_loss"] is None
    assert "train loss :: nan," in capsys.readouterr().out


def test_an_overfitting_run_has_no_spikes(parts, tmp_path):
    """Its losses differ by a factor of a hundred from batch to batch, and all of them are small."""
    loop = make_loop(parts, tmp_path, "--epochs", "3", "--batch_size", "10")
    scale, real = iter([0.01, 0.011, 0.009, 0.5] * 9), loop.task.losses
    exchange(loop.task, losses=lambda batch: real(batch) * next(scale))
    loop.run()
    assert loop.progress.spikes == 0 and not read_jsonl(tmp_path / "events.jsonl")


def test_a_collapse_is_rolled_back_and_the_class_is_named(parts, tmp_path, capsys):
    """Two good evaluations, then one in which every prediction is one class; guards off, it is only said."""
    good = {"train_acc": 0.9, "dev_loss": 0.3, "dev_acc": 0.9}
    bad = {"train_acc": 0.3, "dev_loss": 1.2, "dev_acc": 0.3, "collapsed": "every prediction is good"}
    for guards, folder, n_lines in (("on", "on", 4), ("off", "off", 4)):
        (tmp_path / folder).mkdir()
        left = iter([good, good, bad, good, good] if guards == "on" else [good, good, bad, good])
        loop = make_loop(parts, tmp_path / folder, "--epochs", "4", "--batch_size", "48", "--guards", guards,
                         evaluate=lambda left=left: dict(next(left)))
        real = loop.task.losses
        exchange(loop.task, losses=lambda batch, loop=loop, real=real: real(batch) * (
            0.9 if loop.progress.step in (4, 5) else 0.5))
        loop.run()
        out, err = capsys.readouterr()
        assert out.count("collapsed: every prediction is good") == 1
        assert len(read_jsonl(tmp_path / folder / "epochs.jsonl")) == n_lines
        assert loop.progress.rollbacks == (1 if guards == "on" else 0)
        assert ("every prediction is good, and dev acc is 0.300 after 0.900" in err) == (guards == "on")


@pytest.mark.parametrize("second_half, rollbacks", [(0.5, 0), (1.8, 3)])
def test_a_bad_part_of_an_epoch_is_no_decline_and_a_bad_epoch_is(parts, tmp_path, second_half, rollbacks):
    loop = make_loop(parts, tmp_path, "--epochs", "1", "--batch_size", "24", "--eval_every", "0.5")
    real = loop.task.losses
    exchange(loop.task, losses=lambda batch: real(batch) * (
        1.0 if loop.progress.step == 0 else 1.8 if loop.progress.step < 2 else second_half))
    loop.run()
    assert loop.progress.rollbacks == rollbacks


def test_an_evaluation_that_is_not_finite_is_rolled_back_and_never_the_best(parts, tmp_path):
    """The accuracy of NaN outputs is the share of the first class, which may be the highest."""
    left = iter([(math.nan, 0.9), (0.5, 0.4), (0.5, 0.3)])

    def evaluate():
        loss, acc = next(left)
        return {"train_acc": 0.0, "dev_loss": loss, "dev_acc": acc}

    loop = make_loop(parts, tmp_path, "--epochs", "2", "--batch_size", "96", evaluate=evaluate)
    assert loop.run()["dev_acc"] == 0.4 and loop.progress.rollbacks == 1


def test_a_rollback_from_an_evaluation_restores_the_weights_and_their_average_where_they_belong(parts, tmp_path):
    """The evaluation is of the average, whose tensors are exchanged with the weights' meanwhile."""
    bad = {"train_acc": 0.3, "dev_loss": math.nan, "dev_acc": 0.3}
    loop = make_loop(parts, tmp_path, "--epochs", "2", "--batch_size", "24", "--ema", "0.9", "--lr", "1e-2")
    real, seen = loop.task.evaluate, []
    exchange(loop.task, evaluate=lambda: seen.append(1) or (Evaluation(bad) if len(seen) == 2 else real()))
    good, step = {}, loop.step

    def watched(rows, measure):
        if loop.progress.step == 4 and not good:
            good.update(weights=[p.detach().clone() for p in loop.parameters],
                        mean=[m.clone() for m in loop.average.values])
        elif loop.progress.step == 4:
            assert all(map(torch.equal, loop.parameters, good["weights"]))
            assert all(map(torch.equal, loop.average.values, good["mean"]))
            good["again"] = True
        step(rows, measure)

    loop.step = watched
    loop.run()
    assert good["again"] and loop.progress.rollbacks == 1


def test_the_best_evaluation_is_none_of_a_future_that_was_discarded(parts, tmp_path):
    """Two good epochs, of which the second state is not one to return to; then three steps that are not finite."""
    left = iter([0.5, 0.9, 0.6, 0.55])
    loop = make_loop(parts, tmp_path, "--epochs", "3", "--batch_size", "96",
                     evaluate=lambda: {"train_acc": 0.0, "dev_loss": 1.0, "dev_acc": next(left)})
    real_save, real_step = loop.save, loop.step
    loop.save = lambda is_good=True, sizes=None: real_save(is_good and loop.progress.step < 2, sizes)
    loop.step = lambda rows, measure: (
        real_step(rows, measure) if loop.progress.step != 2 or loop.progress.rollbacks else loop.diverged("a test"))
    best = loop.run()
    assert (best["dev_acc"], best["epoch"]) == (0.6, 1) and loop.progress.rollbacks == 1
    assert [line["dev_acc"] for line in read_jsonl(tmp_path / "epochs.jsonl")] == [0.5, 0.6, 0.55]


class NoDoubles(TorchDispatchMode):
    """Apple's GPUs have no float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert not (isinstance(out, torch.Tensor) and out.dtype == torch.float64), f"{func} makes a float64"
        return out


def test_a_step_and_an_evaluation_need_no_double_precision(parts, tmp_path):
    loop = make_loop(parts, tmp_path, "--epochs", "1", "--batch_size", "24", "--ema", "0.9", "--max_grad_value", "1")
    with NoDoubles():
        loop.run()
    assert loop.progress.step == 4
