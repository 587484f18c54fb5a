"""A finished run, or an adapter, as the start of another run: its Llama, and its head where the labels are the same."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from classifier import ClassifierConfig, LlamaEmbeddingClassifier
from commands.inputs import Inputs
from config import InputError, RunConfig, counted, lora_config
from formats.adapters import Adapter
from formats.weights import Weights
from training import logs


def learned(inputs: Inputs) -> ClassifierConfig | None:
    """The classifier whose head a training can begin with: of the adapter, or of the finished run; None: there is no
    head. PEFT's heads take the last token, and their classes have no names."""
    adapter, head = inputs.adapter, inputs.weights.head
    if adapter and adapter.settings:
        return ClassifierConfig.read(adapter.settings, adapter.path / "config.json")
    if adapter and adapter.head:
        n = len(adapter.head["weight"])
        names = inputs.names if len(inputs.names) == n else [str(i) for i in range(n)]
        shape = replace(inputs.weights.config, n_layers=adapter.n_layers, attention=adapter.attention)
        return ClassifierConfig(n, names, "last", "ce", 0.0, None, shape, "bias" in adapter.head)
    return None if adapter or not head else ClassifierConfig.read(head.settings, inputs.weights.path / "config.json")


def has_head(config: RunConfig, inputs: Inputs) -> bool:
    """Does training begin with the head of a finished run, or of an adapter?"""
    return not config.new_head and learned(inputs) is not None


def with_learned(config: RunConfig, inputs: Inputs) -> RunConfig:
    """The options of a training that begins with a finished run or an adapter: what its head has learned with (pooling,
    attention, loss, bias) is kept where nothing else is typed, and said. Raises InputError for what the head cannot be
    used with.

    With --new_head only the attention is kept, which is what the Llama has learned with. A resumed run has its own
    options.
    """
    path = inputs.adapter.path if inputs.adapter else inputs.weights.path
    run = learned(inputs)
    if config.new_head and not run:
        logs.warn(f"no effect: --new_head: {path} is not a finished run")
    if config.resume:
        return config
    logs.notice(inputs.weights.said_of_left())
    if inputs.adapter:
        config = with_adapter(config, inputs.adapter)
    trained = inputs.adapter.attention if inputs.adapter else inputs.weights.config.attention
    if not run and trained == "causal":  # as all pretrained weights, which may be trained otherwise
        return config
    fixed: dict[str, Any] = {"attention": trained}
    if run and not config.new_head:
        check_head(config, inputs, run)
        fixed |= {"pooling": run.pooling, "loss": run.loss}
        config = replace(config, head_bias=run.head_bias)
    other = [f"--{name} {getattr(config, name)} instead of {value}" for name, value in fixed.items()
             if name in config.given and getattr(config, name) != value]
    if other:
        logs.warn(f"{', '.join(other)}: {path} has learned with the latter")
    kept = {name: value for name, value in fixed.items() if name not in config.given}
    part = "adapter" if inputs.adapter else "Llama"
    what = f"its {part} and its head" if run and not config.new_head else f"its {part}, and a new head"
    words = " ".join(f"--{name} {value}" for name, value in kept.items())
    is_pefts = inputs.adapter and not inputs.adapter.settings
    how = "as in that run" if run and not is_pefts else "as it says"
    logs.notice(f"start :: {path}: {what}{words and f'; {how}: {words}'}")
    return replace(config, **kept, given=config.given | kept.keys())


def with_adapter(config: RunConfig, adapter: Adapter) -> RunConfig:
    """The options with the adapter's own rank, scale, targets, kind and number of layers. Raises InputError where
    others were typed; the dropout may be another one."""
    own = adapter.config
    wanted: dict[str, Any] = {"lora_r": own.r, "lora_alpha": own.alpha, "lora_targets": ",".join(own.targets),
                              "lora_rs": own.rs, "lora_dora": own.dora, "n_layers": adapter.n_layers}
    typed = lora_config(replace(config, lora_r=config.lora_r or own.r))
    assert typed
    fields = {"lora_r": "r", "lora_alpha": "alpha", "lora_targets": "targets", "lora_rs": "rs", "lora_dora": "dora"}
    wrong = [f"--{name} {getattr(config, name)} (it has {wanted[name]})" for name, field in fields.items()
             if name in config.given and getattr(typed, field) != getattr(own, field)]
    if config.n_layers not in (None, adapter.n_layers):
        wrong.append(f"--n_layers {config.n_layers} (it has {adapter.n_layers})")
    if wrong:
        raise InputError(f"--adapter {adapter.path}: the adapter is of another kind than {', '.join(wrong)}; leave "
                         "that out, or begin with a new adapter")
    if "lora_dropout" not in config.given:
        wanted["lora_dropout"] = own.dropout
    return replace(config, **wanted, given=config.given | wanted.keys())


def check_head(config: RunConfig, inputs: Inputs, run: ClassifierConfig) -> None:
    """Raises InputError where the head of a run is of other labels, another loss or another number of layers."""
    path, fault = inputs.adapter.path if inputs.adapter else inputs.weights.path, ""
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
        raise InputError(f"{path}: {fault}, or take the {'adapter' if inputs.adapter else 'Llama'} alone with "
                         "--new_head")


def load_head(model: LlamaEmbeddingClassifier, inputs: Inputs) -> None:
    """Read the head of a finished run, or of an adapter, into a model, in place. Raises InputError for one of another
    shape."""
    state: dict[str, Tensor]
    if inputs.adapter:
        path, state = inputs.adapter.path, inputs.adapter.head
    else:
        assert inputs.weights.head, "only a finished run has a head"
        path, state = inputs.weights.path, {name: read() for name, read in inputs.weights.head.readers.items()}
    own = model.classifier_head.state_dict()
    if {name: tensor.shape for name, tensor in state.items()} != {name: tensor.shape for name, tensor in own.items()}:
        raise InputError(f"{path}: model.safetensors and config.json do not belong together (the head)")
    model.classifier_head.load_state_dict(state)


def warn_of_classifier(weights: Weights) -> None:
    """The Llama of a finished run goes on with a text only as well as it has not forgotten to."""
    if weights.head:
        logs.warn(f"{weights.path} is a finished run: its Llama has learned to classify, with "
                  f"{weights.config.attention} attention, and may have forgotten how to go on with a text")
