"""What the frozen first part of a classifier (--freeze) gives for each sentence of a split, computed once and kept: in
memory, or where it is more than BUDGET in a file that is mapped into memory."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from classifier import LlamaEmbeddingClassifier
from dataset import Split, length_order, make_batch
from training.bar import Bar
from training.device import Device
from training.signals import SIGNALS

BUDGET = 2 << 30  # bytes in memory, of all splits of a run together


@dataclass(frozen=True)
class Activations:
    """Of N sentences: `numbers` (all their vectors, D), on the CPU; `starts` (N,), the place of each one's first vector
    there; `counts` (N,), how many it has."""

    numbers: Tensor
    starts: np.ndarray
    counts: np.ndarray

    def take(self, rows: np.ndarray) -> "Activations":
        """Of these sentences, in their order. No number is copied."""
        return replace(self, starts=self.starts[rows], counts=self.counts[rows])

    def batch(self, rows: np.ndarray) -> Tensor:
        """(B, T, D) of these sentences, with zeros behind the shorter ones: no real token sees them."""
        together = self.numbers.new_zeros(len(rows), int(self.counts[rows].max()), self.numbers.shape[1])
        for vectors, start, count in zip(together, self.starts[rows].tolist(), self.counts[rows].tolist(), strict=True):
            vectors[:count] = self.numbers[start : start + count]
        return together


def vectors_of(model: LlamaEmbeddingClassifier, lengths: np.ndarray) -> np.ndarray:
    """How many vectors are kept of sentences of these lengths, (N,)."""
    return np.ones_like(lengths) if model.has_one_vector() else lengths


def bytes_of(model: LlamaEmbeddingClassifier, *splits: Split) -> int:
    """The room that the activations of these splits take together, in float32."""
    return 4 * model.llama.config.dim * sum(int(vectors_of(model, split.lengths).sum()) for split in splits)


def compute(model: LlamaEmbeddingClassifier, split: Split, pad_id: int, device: Device, label: str,
            folder: Path | None = None, rows: np.ndarray | None = None) -> Activations:
    """The activations of every sentence of a split, or of some rows alone. `folder`: they go into a file there, which
    is gone when nobody uses it any more, after a kill too. `label`: in front of the progress bar. Raises OSError where
    the disk is full.

    The batches are those of an evaluation, whatever the run does: so the same bits come out each time on one machine.
    """
    rows = np.arange(len(split)) if rows is None else rows
    batches = [rows[some] for some in length_order(split.lengths[rows])]
    counts = vectors_of(model, split.lengths)
    order, starts = np.concatenate(batches), np.zeros_like(counts)
    starts[order] = np.cumsum(counts[order]) - counts[order]
    numbers, done = torch.empty(0), 0
    with tempfile.TemporaryFile(dir=folder) if folder else nullcontext() as file:
        with in_evaluation(model), Bar(label, len(batches), is_kept=False) as bar:
            for i, some in enumerate(batches, 1):
                SIGNALS.check()
                part = _vectors(model, device.put(make_batch(split, some, pad_id)), device, counts[some])
                if file:  # written in the ordinary way, so that a full disk is an error
                    file.write(part.contiguous().view(torch.uint8).numpy().tobytes())
                else:
                    numbers = numbers if done else part.new_empty(counts[order].sum(), part.shape[1])
                    numbers[done : done + len(part)] = part
                    done += len(part)
                bar.update(f"{label}: batch {i} of {len(batches)}")
        if file:
            file.flush()
            content = np.memmap(file, np.uint8, "c")  # copy on write: PyTorch wants memory that it could write to
            numbers = torch.from_numpy(content).view(part.dtype).view(-1, part.shape[1])
    return Activations(numbers, starts, counts)


def _vectors(model: LlamaEmbeddingClassifier, batch: dict[str, Tensor], device: Device, counts: np.ndarray) -> Tensor:
    """What the first part gives for a batch, without padding: the vectors (n, D) of one sentence behind the other."""
    with torch.no_grad(), device.autocast():
        found = model.first_part(batch["tokens"], batch["lengths"])
    is_kept = torch.arange(found.shape[1]) < torch.from_numpy(counts)[:, None]
    return found[is_kept.to(found.device)].cpu()


@contextmanager
def in_evaluation(model: LlamaEmbeddingClassifier) -> Iterator[None]:
    """Inside, the model is in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
