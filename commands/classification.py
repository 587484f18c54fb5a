"""Sentence classification as a task: its batches, its losses, and its scores on dev."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import dataset
from classifier import ClassifierConfig, LlamaEmbeddingClassifier, classification_loss
from config import RunConfig, byte_size
from dataset import Split
from tokenizer import Tokenizer
from training import frozen, kept, logs, metrics, saved
from training.device import Device
from training.kept import Activations
from training.task import Evaluation


class ClassificationTask:
    """Trains a classifier on one split and scores it on another; see training.task.Task. `random` draws the training
    sentences that are scored."""

    def __init__(self, config: RunConfig, model: LlamaEmbeddingClassifier, settings: ClassifierConfig,
                 tokenizer: Tokenizer, train: Split, dev: Split, device: Device, random: np.random.Generator):
        self.config, self.model, self.settings, self.tokenizer = config, model, settings, tokenizer
        self.train, self.dev, self.device = train, dev, device
        self.lengths, self.n_classes, self.n_dev = train.lengths, settings.num_labels, len(dev)
        self.sampled_rows = np.arange(len(train))  # of which train acc is measured
        if config.train_eval == "sample" and len(dev) < len(train):
            self.sampled_rows = np.sort(random.permutation(len(train))[: len(dev)])
        self.sample = train.take(self.sampled_rows)
        # What the frozen first part gives for each sentence, once it is computed.
        self.kept: dict[str, Activations] = {}
        self.keeps = model.llama.n_frozen > 0 and not frozen.why_not_kept(config) and (
            config.option != "lr_find" or config.lr_steps * config.batch_size * config.grad_accum >= len(train))
        self.augment = self._augmentation()
        self.weights = None
        if config.class_weights:
            self.weights = torch.tensor(dataset.class_weights(train.labels), dtype=torch.float32)
        self.order = lru_cache(maxsize=2)(self._order)

    def _augmentation(self) -> dataset.Augmentation | None:
        config, keep = self.config, int(self.tokenizer.add_bos)
        if not (config.aug_delete or config.aug_swap or config.aug_replace):
            return None
        near = None
        if config.aug_replace:
            words = np.concatenate([tokens[keep:] for tokens in self.train.tokens])
            near = dataset.near_neighbours(self.model.llama.tok_embeddings.weight, words)
        return dataset.Augmentation(config.aug_delete, config.aug_swap, config.aug_replace, near, keep)

    def _order(self, epoch: int) -> list[np.ndarray]:
        balance = self.train.labels if self.config.sampler else None
        effective_batch = self.config.batch_size * self.config.grad_accum
        return dataset.epoch_order(self.lengths, effective_batch, self.config.seed, epoch, balance)

    def make_batch(self, rows: np.ndarray, epoch: int) -> dict[str, Tensor]:
        batch = dataset.make_batch(self.train, rows, self.tokenizer.pad_id, self.augment, (self.config.seed, epoch))
        if (activations := self.activations("train")) is not None:
            batch["below"] = activations.batch(rows)
        if self.weights is not None:
            batch["weights"] = self.weights[batch["labels"]]
        return batch

    def losses(self, batch: dict[str, Tensor]) -> Tensor:
        return classification_loss(self.model, batch, self.config.label_smoothing, self.config.r_drop)

    def predict(self, split: Split, label: str, rows: np.ndarray | None = None) -> Tensor:
        """Log-probabilities (N, C) of the model as it is, of these rows or of all. `label`: in front of the progress
        bar."""
        own = next((name for name in ("train", "dev") if split is getattr(self, name)), None)
        activations = self.activations(own) if own else None
        if rows is not None:
            split, activations = split.take(rows), activations and activations.take(rows)
        return metrics.predict(self.model, split, self.tokenizer.pad_id, self.device, label, kept=activations)

    def activations(self, name: str) -> Activations | None:
        """What the frozen first part gives for the sentences of train or dev, computed at the first call; None where
        nothing is kept."""
        if self.keeps and name not in self.kept:
            try:
                self.kept[name] = self.first_part(name, self.folder_of_kept())
            except OSError as error:
                logs.warn(f"--freeze: what the frozen part computes cannot be kept ({error}); each epoch computes it "
                          "again")
                self.forget()
                self.keeps = False
        return self.kept.get(name)

    def first_part(self, name: str, folder: Path | None = None, rows: np.ndarray | None = None) -> Activations:
        """What the frozen first part gives for train or dev: see `kept.compute`."""
        return kept.compute(self.model, getattr(self, name), self.tokenizer.pad_id, self.device,
                            f"frozen part of {name}", folder, rows)

    def keep(self) -> None:
        """Compute what the frozen first part gives, where that is kept: before the first step, and not in its time."""
        if self.keeps and (folder := self.folder_of_kept()):
            logs.notice(f"--freeze: what the frozen part computes takes {byte_size(self.bytes_kept())}; it is "
                        f"kept in a file in {folder}, and mapped into memory")
        for name in ("train", "dev"):
            self.activations(name)

    @contextmanager
    def keeping_only(self, rows: dict[str, np.ndarray]) -> Iterator[None]:
        """Inside, what the frozen first part gives is kept of these rows of train and dev alone: to measure how long
        they take."""
        before = self.kept
        if self.keeps:
            self.kept = {name: self.first_part(name, rows=some) for name, some in rows.items()}
        try:
            yield
        finally:
            self.kept = before

    def bytes_kept(self) -> int:
        """The room that all that is kept takes."""
        return kept.bytes_of(self.model, self.train, self.dev) if self.keeps else 0

    def folder_of_kept(self) -> Path | None:
        """Where a file for what is kept would be; None where it stays in memory."""
        if self.bytes_kept() <= kept.BUDGET:
            return None
        folder = Path(self.config.resume or self.config.output_dir or "runs")
        return folder if folder.is_dir() else Path(tempfile.gettempdir())

    def forget(self) -> None:
        """Let go of what was kept; where it is wanted again, it is computed again, with the weights of then."""
        self.kept = {}

    def evaluate(self) -> Evaluation:
        on_train = metrics.score(self.predict(self.train, "train acc", self.sampled_rows), self.sample.labels)
        outputs = self.predict(self.dev, "dev")
        on_dev = metrics.score(outputs, self.dev.labels, is_ordinal(self.config))
        predicted, collapsed = outputs.argmax(1), ""
        if len(self.dev) > 1 and bool((predicted == predicted[0]).all()):
            collapsed = f"every prediction is {self.settings.label_names[int(predicted[0])]}"
        return Evaluation({"train_acc": on_train["acc"], **{f"dev_{k}": v for k, v in on_dev.items()}}, collapsed)

    def save_best(self, folder: Path) -> str:
        return saved.save_classifier(folder, self.model, self.tokenizer, self.settings,
                                     getattr(torch, self.config.save_dtype))


def is_ordinal(config: RunConfig) -> bool:
    """Have the labels an order that the scores are to know of?"""
    return config.ordinal or config.loss == "ordinal" or config.monitor in ("dev_mae", "dev_qwk")
