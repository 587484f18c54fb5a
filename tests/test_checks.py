"""The checks before a run."""

import numpy as np
import pytest
import torch
from conftest import exchange
from loops import make_loop

from training import checks, device, trainer


def state_of(loop):
    return [t.clone() for t in [*loop.model.state_dict().values(), torch.get_rng_state()]]


def test_check_gradients_compares_the_whole_batch_with_its_parts(parts, tmp_path, monkeypatch):
    """On a CPU too, where a pass has so many tokens at most."""
    monkeypatch.setattr(trainer, "PASS_TOKENS", 1)
    loop, sizes = make_loop(parts, tmp_path, "--batch_size", "12"), []
    exchange(loop.task, losses=lambda b, real=loop.task.losses: sizes.append(len(b["labels"])) or real(b))
    checks.check_gradients(loop)
    n = len(loop.task.order(0)[0])
    assert sizes[0] == n and sum(sizes) == 3 * n and len(sizes) > 3 and loop.rows_per_pass(np.arange(5)) == 1


@pytest.mark.parametrize("check", [checks.check_gradients, checks.overfit_batch, checks.find_micro_batch])
def test_a_check_leaves_no_trace(parts, tmp_path, check):
    loop = make_loop(parts, tmp_path, "--batch_size", "8", "--lr", "1e-2")
    before = state_of(loop)
    check(loop)
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(loop), strict=True))
    assert not loop.optimizer.state and all(p.grad is None for p in loop.parameters)
    assert not (tmp_path / "steps.jsonl").exists()


def test_the_gradient_check_sees_a_loss_that_depends_on_the_micro_batch(parts, tmp_path):
    loop = make_loop(parts, tmp_path, "--batch_size", "8")
    assert checks.check_gradients(loop) < 1e-5
    real = loop.task.losses
    exchange(loop.task, losses=lambda batch: real(batch) * len(batch["labels"]))
    with pytest.raises(ValueError, match="micro-batches change the gradient"):
        checks.check_gradients(loop)


def test_auto_batch_on_a_cpu_does_not_hold_short_sentences_to_what_the_longest_allow(parts, tmp_path, monkeypatch):
    """A pass takes so many tokens there; the longest sentence must not set how many short ones that are."""
    longest = int(parts[1]["train"].lengths.max())
    monkeypatch.setattr(trainer, "PASS_TOKENS", 4 * longest)
    loop = make_loop(parts, tmp_path, "--batch_size", "48")
    loop.progress.micro_batch = checks.find_micro_batch(loop)
    short = np.argsort(loop.lengths)[:12]
    assert loop.rows_per_pass(short) == min(12, 4 * longest // int(loop.lengths[short].max())) > 4
    monkeypatch.setattr(device, "free_memory", lambda device: 0)
    sizes = iter(range(0, 99 << 20, 1 << 20))
    monkeypatch.setattr(device, "peak_memory", lambda device: next(sizes))
    assert checks.find_micro_batch(loop) < 4, "where memory ends it, that is what counts"


def test_one_batch_can_be_memorised(parts, tmp_path):
    first, last = checks.overfit_batch(make_loop(parts, tmp_path, "--batch_size", "8", "--lr", "1e-2"))
    assert first > 0.8 and last < 0.3 * first
