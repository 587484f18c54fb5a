"""Checks before a run is paid for: is the gradient right, can the model learn one batch, how large a batch fits?"""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from config import InputError
from formats.memory import is_out_of_memory
from schedule import make_schedule
from training import device as devices
from training import state as states
from training import trainer
from training.task import InOneEpoch
from training.trainer import Loop


@contextmanager
def untouched(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Whatever happens inside, weights, gradients, optimizer, random states and mode are afterwards as they were."""
    weights = {name: tensor.detach().clone() for name, tensor in states.trained(model).items()}
    state, was_training = copy.deepcopy(optimizer.state_dict()), model.training
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=cuda):
        try:
            yield
        finally:
            states.load_trained(model, weights)
            optimizer.load_state_dict(state)
            optimizer.zero_grad(set_to_none=True)
            model.train(was_training)


def check_gradients(loop: Loop) -> float:
    """Is the gradient of one big batch that of its micro-batches, with a short last one too? Returns the largest
    difference, relative to the gradient's largest number. In float32, dropout off.

    Raises InputError when it is above 1e-4 (rounding alone stays near 1e-6).
    """
    rows = loop.task.order(0)[0][: 4 * loop.config.batch_size]
    n = len(rows)
    device, micro_batch, gradients = loop.device, loop.progress.micro_batch, []
    frozen = [(p, p.data) for p in loop.model.parameters() if not p.requires_grad]
    with untouched(loop.model, loop.optimizer):
        loop.model.eval()
        for p, data in frozen:
            p.data = data.float()
        loop.device, loop.pass_tokens = replace(device, dtype=torch.float32), sys.maxsize
        try:
            for micro in (n, max(1, n // 4), max(1, n // 2 - 1)):  # whole, even, and with a short last one
                loop.progress.micro_batch = micro
                loop.optimizer.zero_grad(set_to_none=True)
                loop.accumulate(rows)
                gradients.append([p.grad.to_dense().clone() for p in loop.parameters if p.grad is not None])
        finally:
            loop.device, loop.progress.micro_batch, loop.pass_tokens = device, micro_batch, trainer.PASS_TOKENS
            for p, data in frozen:
                p.data = data
    largest = max(float(g.abs().max()) for g in gradients[0])
    difference = max(float((a - b).abs().max()) for other in gradients[1:]
                     for a, b in zip(gradients[0], other, strict=True)) / largest
    if difference > 1e-4:
        raise InputError(f"--check_gradients: micro-batches change the gradient by {difference:.1e} of its largest "
                         "number")
    return difference


def overfit_batch(loop: Loop, steps: int = 100) -> tuple[float, float]:
    """Train on one batch alone: the first and the last loss. A model and a rate that can learn bring it near 0."""
    losses: list[float] = []

    def is_learned(step: int, loss: float) -> bool:
        losses.append(loss)
        return loss < 0.05

    config = replace(loop.config, guards="off", ema=0.0)
    job = replace(loop.job, task=InOneEpoch(loop.task, [loop.task.order(0)[0]] * steps), steps_per_epoch=steps,
                  schedule=make_schedule("constant", total_steps=steps))
    with untouched(loop.model, loop.optimizer):
        trainer.fit(job, config, loop.device, max_steps=steps, evaluate=False, on_step=is_learned)
    return losses[0], losses[-1]


def find_micro_batch(loop: Loop) -> int:
    """The largest micro-batch, a power of two up to the effective batch, that trains on the longest examples.

    A GPU is filled until it refuses. A CPU's memory is not (the system would swap, or kill the run): there a size is
    taken only if twice the last one's growth fits into what is free. Everything is left as it was.
    """
    task, device, longest = loop.task, loop.device, np.argsort(-loop.lengths, kind="stable")
    window, best, grown = max(len(rows) for rows in task.order(0)), 1, 0
    most = window
    if device.is_cpu:  # more tokens are never in one pass there
        most = min(most, max(1, loop.pass_tokens // int(loop.lengths.max())))
    size = 1
    with untouched(loop.model, loop.optimizer):
        loop.model.train()
        while size <= most:
            before, free = devices.peak_memory(device), devices.free_memory(device)
            if device.is_cpu and free is not None and 2 * grown > free:
                break
            try:
                with device.autocast():
                    losses = task.losses(device.put(task.make_batch(longest[:size], 0)))
                losses.mean().backward()
                del losses
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                break
            grown, best = max(grown, devices.peak_memory(device) - before), size
            size = most if size < most < 2 * size else 2 * size
    if device.is_cuda:
        torch.cuda.empty_cache()
    # Where the longest examples fit up to the limit of tokens, more of the shorter ones fit too.
    return window if best == most else best
