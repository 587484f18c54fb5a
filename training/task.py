"""What is trained: a task brings the batches, their losses, and how the model is scored and saved. A job is a task with
the model, the optimizer and the schedule."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Evaluation:
    """The scores of the model as it is: `train_acc`, `dev_loss`, `dev_acc` and whatever --monitor names. `collapsed`:
    in words, that every prediction is the same; "" where it is not so."""

    scores: dict[str, float]
    collapsed: str = ""


class Task(Protocol):
    """What a model is trained on. `lengths` (N,): the tokens of each training example; `n_classes`: among how many an
    untrained model guesses; `n_dev`: the examples that `evaluate` scores on dev."""

    lengths: np.ndarray
    n_classes: int
    n_dev: int

    def order(self, epoch: int) -> Sequence[np.ndarray]:
        """The rows of each effective batch of an epoch."""

    def make_batch(self, rows: np.ndarray, epoch: int) -> dict[str, Tensor]:
        """A batch of some rows; it is where training examples are augmented. It may have `weights` (B,), which the
        losses are multiplied with before they are averaged; the guards look at the losses without them."""

    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        """Each example's loss (B,)."""

    def evaluate(self) -> Evaluation:
        """The scores of the model as it is."""

    def save_best(self, folder: Path) -> str | None:
        """Keep the model as it is in a folder; returns the sha256 that `best.check_best` compares."""


T = TypeVar("T", bound=Task)


class InOneEpoch:
    """A task of which one epoch has these batches, in this order."""

    def __init__(self, task: Task, batches: Sequence[np.ndarray]):
        self.task, self.batches = task, batches
        self.lengths, self.n_classes, self.n_dev = task.lengths, task.n_classes, task.n_dev
        self.make_batch, self.losses, self.evaluate, self.save_best = (
            task.make_batch, task.losses, task.evaluate, task.save_best)

    def order(self, epoch: int) -> Sequence[np.ndarray]:
        return self.batches


@dataclass(frozen=True)
class Job(Generic[T]):
    """All that a training loop needs. `schedule(step, history)` is a factor on each parameter group's own rate;
    `history` are the values of --monitor so far. `is_trained`: the model begins where a finished run ended."""

    model: nn.Module
    task: T
    optimizer: torch.optim.Optimizer
    schedule: Callable[..., float]
    steps_per_epoch: int
    is_trained: bool = False
