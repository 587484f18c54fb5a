"""What --option export writes down: the classifier of a run, or pretrained weights, with the tokenizer."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

import lora
import tokenizer as tokenizers
from classifier import ClassifierConfig
from commands import finished, inputs
from config import InputError, LlamaConfig, RunConfig
from formats import files, weights
from llama import load_pretrained
from tokenizer import Tokenizer
from training import logs
from training.saved import SavedRun


@dataclass(frozen=True)
class Exported:
    """`path`: the run, or the file; `weights`: the Llama's parameters by our names, float32, with what adapters there
    are merged into them, and `head` the head's; `settings`: of a run's classifier, None for pretrained weights;
    `adapters`: by their names in the Llama, {} where there are none."""

    path: Path
    config: LlamaConfig
    weights: dict[str, Tensor]
    tokenizer: Tokenizer
    settings: ClassifierConfig | None
    head: dict[str, Tensor]
    adapters: dict[str, Tensor]
    run: SavedRun | None

    @property
    def longest(self) -> int:
        """How many tokens of a text the model sees at most, the begin token counted."""
        cut = self.settings.max_sentence_len if self.settings else None
        limit = self.config.max_seq_len
        return limit if cut is None else min(limit, cut + self.tokenizer.add_bos)


def load(config: RunConfig) -> Exported:
    """What --run or --pretrained_model_path names, all checked. Raises InputError or FileNotFoundError."""
    if not config.run and not config.pretrained_model_path:
        raise InputError("--option export needs --run RUN, the folder of a finished fine-tuning run, or "
                         "--pretrained_model_path PATH")
    return of_run(config) if config.run else of_weights(config)


def of_run(config: RunConfig) -> Exported:
    """The classifier of --run. Raises InputError for adapters that cannot be merged."""
    run = finished.load_run(config)
    merged, state = lora.merge(run.model), run.model.state_dict()

    def below(part: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)}

    adapters = {name: tensor for name, tensor in below("llama.", state).items() if lora.is_adapter(name)}
    return Exported(run.typed, run.settings.llama, below("llama.", merged), run.tokenizer, run.settings,
                    below("classifier_head.", merged), adapters, run)


def of_weights(config: RunConfig) -> Exported:
    """The Llama of --pretrained_model_path with its output layer, and its tokenizer."""
    found = inputs.find_model(config)
    tokenizer = Tokenizer(tokenizer_model=found.tokenizer)
    with logs.doing(f"reading {found.weights}"):
        read = weights.read_weights(found.weights)
    tokenizers.check_vocabulary(tokenizer, read.config)
    if read.head:
        raise InputError(f"{found.weights}: a finished run; export it with --run {config.pretrained_model_path}")
    logs.notice(read.said_of_left())
    weights.check_n_layers(read, config.n_layers)
    llama = load_pretrained(read, config.n_layers, attention=read.config.attention)
    return Exported(found.weights, llama.config, dict(llama.named_parameters()), tokenizer, None, {}, {}, None)


def with_output(model: Exported) -> dict[str, Tensor]:
    """The weights of a language model: with an output layer, which of a classifier with tied embeddings is those. Other
    classifiers have none: it comes from the weights that the run began with, where they still are what they were.
    Raises InputError where it cannot be had."""
    if model.config.tie_embeddings or "output.weight" in model.weights:
        return model.weights
    assert model.run, "pretrained weights have an output layer"
    used = base_of(model.run)
    base = Path(used.get("path", ""))
    fault = "and which weights it began with is not known here (no args.json)"
    if used:
        fault = f"and {base}, from which it could be taken, is gone or has changed"
        if base.exists() and files.sha256(base) == used.get("sha256"):
            read = weights.read_weights(base)
            if not read.head and read.shapes.get("output.weight") == (model.config.vocab_size, model.config.dim):
                return {**model.weights, "output.weight": read.readers["output.weight"]()}
            fault = f"and {base}, with which it began, has none for it either"
    raise InputError(f"{model.path}: this classifier has no output layer, without which there are no words, {fault}; "
                     "take --format hf")


def base_of(run: SavedRun) -> dict[str, str]:
    """`path` and `sha256` of the weights that a run began with; {} where they are not known."""
    if run.settings.base:
        return {"path": run.settings.base.path, "sha256": run.settings.base.sha256}
    return files.read_json(run.home.args).get("files", {}).get("weights", {}) if run.home.has_run() else {}
