"""A training loop on a tiny classifier, whose parts a test can exchange; and a job as the program wires it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

import dataset
from classifier import classification_loss
from commands import inputs as inputs_room
from commands import job as jobs
from config import parse_args
from optimizer import AdamW
from training import metrics, trainer
from training.device import Device
from training.run_folder import RunFolder
from training.task import Evaluation, Job

CPU = Device(torch.device("cpu"), torch.float32)


@dataclass
class PlainTask:
    """A task whose parts are given one by one."""

    lengths: np.ndarray
    n_classes: int
    n_dev: int
    order: Callable
    make_batch: Callable
    losses: Callable
    evaluate: Callable
    save_best: Callable


def make_task(parts, config, evaluate=None, save_best=lambda folder: None):
    model, splits, tokenizer = parts
    train = splits["train"]

    def scores():
        on_dev = metrics.score(metrics.predict(model, splits["dev"], tokenizer.pad_id, CPU), splits["dev"].labels)
        return {"train_acc": 0.0, **{f"dev_{k}": v for k, v in on_dev.items()}}

    def evaluation():
        found = (evaluate or scores)()
        return Evaluation(found, found.pop("collapsed", ""))

    return PlainTask(
        train.lengths, 3, len(splits["dev"]), evaluate=evaluation, save_best=save_best,
        make_batch=lambda rows, epoch: dataset.make_batch(train, rows, tokenizer.pad_id),
        losses=lambda batch: classification_loss(model, batch),
        order=lambda epoch: dataset.epoch_order(
            train.lengths, config.batch_size * config.grad_accum, config.seed, epoch))


def make_loop(parts, folder, *options, optimizer=None, schedule=lambda step, history: 1.0, **more):
    config = parse_args(["--max_grad_norm", "0", *options])
    on_step = more.pop("on_step", None)
    optimizer = optimizer or AdamW(parts[0].parameters(), lr=config.lr, eps=1e-8)
    task = make_task(parts, config, **more)
    job = Job(parts[0], task, optimizer, schedule, len(task.order(0)))
    return trainer.Loop(job, config, CPU, folder and RunFolder(folder), on_step=on_step)


# --------------------------------------------------------------------------- a run's own job


def made(arguments, *more):
    """(job, config): a job as the program wires it."""
    config = parse_args(["--option", "lr_find", *arguments, *more])
    return jobs.build_job(config, inputs_room.load(config, ("train", "dev")), CPU), config


def state_of(run):
    """Everything that a later training depends on; none of it a view of what is there now."""
    optimizer = run.optimizer.state_dict()
    groups = [{k: v for k, v in group.items() if k != "name"} for group in optimizer["param_groups"]]
    assert all(p.grad is None for p in run.model.parameters())
    return copy.deepcopy((dict(run.model.state_dict()), optimizer["state"], groups, torch.get_rng_state(),
                          run.model.training, [rows.tolist() for rows in run.task.order(0)]))


def assert_same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)
