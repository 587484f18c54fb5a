"""The one place that wires a run: model, task, optimizer and schedule from its options and inputs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import fused
import lora
import schedule
from classifier import ClassifierConfig, LlamaEmbeddingClassifier
from commands import start
from commands.classification import ClassificationTask
from commands.inputs import Inputs, input_errors
from config import Base, RunConfig, counted, lora_config
from llama import load_pretrained
from optimizer import OPTIMIZERS, parameter_groups
from training import device as devices
from training import frozen, logs
from training.device import Device
from training.task import Job
from training.trainer import MORE_IS_BETTER


def build_job(config: RunConfig, inputs: Inputs, device: Device) -> Job[ClassificationTask]:
    """All that a training loop needs. The same seed gives the same job."""
    devices.set_switches(config)
    random = np.random.default_rng(config.seed)
    torch.manual_seed(config.seed)
    with logs.doing(f"reading {inputs.weights.path}"):
        low = device.dtype if config.lora_r else torch.float32  # what is not trained needs no more digits than are used
        llama = load_pretrained(inputs.weights, config.n_layers, config.dropout, config.attention, has_output=False,
                                dtype=low, norm_dtype=torch.float32)
    llama.grad_checkpoint = config.grad_checkpoint
    settings = ClassifierConfig(len(inputs.names), inputs.names, config.pooling, config.loss,
                                config.hidden_dropout_prob, config.max_sentence_len, llama.config, config.head_bias)
    if adapters := lora_config(config):
        settings = replace(settings, lora=adapters, base=Base(**inputs.checksums()["weights"]))
    model = LlamaEmbeddingClassifier(settings, llama)
    if adapters:
        lora.add(llama, adapters)
    if inputs.adapter:
        lora.load(llama, inputs.adapter)
    is_trained = start.has_head(config, inputs)
    if is_trained:
        start.load_head(model, inputs)
    frozen.freeze(model, config.freeze)
    model.to(device.where)
    with logs.doing("compiling fused.c"):
        is_as_fast_as_asked = devices.accelerate(config, model, device)
    if not is_as_fast_as_asked:
        logs.warn(f"{fused.fault()}: norms, positions, SwiGLU and AdamW run in PyTorch, which is slower "
                  "(--kernels off stops this warning)")
    # AdamW without decay is the same for a gradient that has only the batch's words in it, and has far less to read.
    llama.tok_embeddings.sparse = (fused.is_accelerated(model) and fused.supports(llama.tok_embeddings.weight)
                                   and config.optimizer == "adamw" and not config.weight_decay)
    task = ClassificationTask(config, model, settings, inputs.tokenizer, inputs.splits["train"], inputs.splits["dev"],
                              device, random)
    steps = len(task.order(0))
    return Job(model, task, build_optimizer(config, model), schedule_of(config, steps), steps, is_trained)


def build_optimizer(config: RunConfig, model: LlamaEmbeddingClassifier) -> torch.optim.Optimizer:
    """The optimizer of a run with its parameter groups. Raises InputError for options that no optimizer can have."""
    effective_batch = config.batch_size * config.grad_accum
    more: dict[str, Any] = {}
    if config.optimizer == "adamw":
        more = {"fused": fused.is_accelerated(model)}
    if config.optimizer == "sgd":
        more = {"momentum": config.momentum, "nesterov": config.nesterov, "decoupled": True}
    with input_errors():
        scale = 1.0
        if config.lr_scaling:
            scale = schedule.lr_scale(config.lr_scaling, effective_batch, config.base_batch_size)
        groups = parameter_groups(model, config.lr * scale, config.weight_decay, config.layerwise_lr_decay,
                                  config.head_lr and config.head_lr * scale, config.decay_all)
        return OPTIMIZERS[config.optimizer](groups, lr=config.lr * scale, **more)


def schedule_of(config: RunConfig, steps_per_epoch: int) -> Callable[..., float]:
    """The schedule of a run. Raises InputError, naming the options, where none can be."""
    with input_errors():
        return schedule.from_options(config, steps_per_epoch, config.monitor in MORE_IS_BETTER)


def warmup_of(config: RunConfig, steps_per_epoch: int) -> int:
    """The warmup of a run in optimizer steps. Raises InputError for one that is longer than the run."""
    with input_errors():
        return schedule.warmup_steps(config, steps_per_epoch)


def about(config: RunConfig, inputs: Inputs) -> str:
    """What a picture's title says of a run: "movies-train.txt, 30 layers"."""
    train = inputs.files.train
    layers = counted(config.n_layers or inputs.weights.config.n_layers, "layer")
    return f"{train.name}, {layers}" if train else layers
