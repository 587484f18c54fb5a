"""A finished run as the start of another: its Llama, and its head where the labels are the same."""

from dataclasses import replace
from typing import Any

from classifier import ClassifierConfig, LlamaEmbeddingClassifier
from commands.inputs import Inputs
from config import InputError, RunConfig, counted
from formats.weights import Weights
from training import logs


def has_head(config: RunConfig, weights: Weights) -> bool:
    """Does training begin with the head of a finished run?"""
    return weights.head is not None and not config.new_head


def with_learned(config: RunConfig, inputs: Inputs) -> RunConfig:
    """The options of a training that begins with a finished run: what its head has learned with (pooling, attention,
    loss, bias) is kept where nothing else is typed, and said. Raises InputError for what the head cannot be used with.

    With --new_head only the attention is kept, which is what the Llama has learned with. A resumed run has its own
    options.
    """
    weights, head = inputs.weights, inputs.weights.head
    if config.new_head and not head:
        logs.warn(f"no effect: --new_head: {weights.path} is not a finished run")
    if config.resume or not head:
        return config
    run = ClassifierConfig.read(head.settings, weights.path / "config.json")
    learned: dict[str, Any] = {"attention": run.llama.attention}
    if not config.new_head:
        check_head(config, inputs, run)
        learned |= {"pooling": run.pooling, "loss": run.loss}
        config = replace(config, head_bias=run.head_bias)
    other = [f"--{name} {getattr(config, name)} instead of {value}" for name, value in learned.items()
             if name in config.given and getattr(config, name) != value]
    if other:
        logs.warn(f"{', '.join(other)}: {weights.path} has learned with the latter")
    kept = {name: value for name, value in learned.items() if name not in config.given}
    what = "its Llama, and a new head" if config.new_head else "its Llama and its head"
    words = " ".join(f"--{name} {value}" for name, value in kept.items())
    logs.notice(f"start :: {weights.path}: {what}{words and f'; as in that run: {words}'}")
    return replace(config, **kept, given=config.given | kept.keys())


def check_head(config: RunConfig, inputs: Inputs, run: ClassifierConfig) -> None:
    """Raises InputError where the head of a run is of other labels, another loss or another number of layers."""
    path, fault = inputs.weights.path, ""
    if run.label_names != inputs.names:
        fault = (f"the labels of that run are {run.label_names}, and those of {inputs.files.train} are {inputs.names}; "
                 "give them the same names in the same order (--label_names)")
    elif "loss" in config.given and config.loss != run.loss:
        fault = f"the head of that run has learned with --loss {run.loss}, and --loss is {config.loss}; leave it out"
    elif config.head_bias and not run.head_bias:
        fault = "the head of that run has no bias, and --head_bias asks for one; leave it out"
    elif config.n_layers not in (None, run.llama.n_layers):
        fault = (f"the head of that run has learned on {counted(run.llama.n_layers, 'layer')}, and --n_layers is "
                 f"{config.n_layers}; leave it out")
    if fault:
        raise InputError(f"{path}: {fault}, or take the Llama alone with --new_head")


def load_head(model: LlamaEmbeddingClassifier, weights: Weights) -> None:
    """Read the head of a finished run into a model, in place. Raises InputError for one of another shape."""
    assert weights.head, "only a finished run has a head"
    state = {name: read() for name, read in weights.head.readers.items()}
    own = model.classifier_head.state_dict()
    if {name: tensor.shape for name, tensor in state.items()} != {name: tensor.shape for name, tensor in own.items()}:
        raise InputError(f"{weights.path}: model.safetensors and config.json do not belong together (the head)")
    model.classifier_head.load_state_dict(state)


def warn_of_classifier(weights: Weights) -> None:
    """The Llama of a finished run goes on with a text only as well as it has not forgotten to."""
    if weights.head:
        logs.warn(f"{weights.path} is a finished run: its Llama has learned to classify, with "
                  f"{weights.config.attention} attention, and may have forgotten how to go on with a text")
