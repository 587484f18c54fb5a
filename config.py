"""The model's shape, the run's options, and the argument parser that is made from them.

Nothing here imports torch, so `python run_llama.py --help` answers at once. An option is one field of
`RunConfig`: its default, its help and the values it accepts stand in one place.
"""

import argparse
import difflib
import errno
import itertools
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any


def counted(n: int, noun: str) -> str:
    """1 layer, 2 layers: a number and its noun, for messages."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


# Control characters but tab and line feed, and those that reverse or break a line (Unicode's bidi controls, U+2028/9).
_TERMINAL_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def shown(text: object) -> str:
    """Text for a person's terminal: a name or path from a file could hold codes that move the cursor, hide text or
    reverse it, so they are written out, as \\x1b or \\u202e."""
    return _TERMINAL_CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), str(text))


def is_out_of_memory(error: BaseException) -> bool:
    """Was there not enough memory (of a GPU, of the machine, or under the limits of `ulimit`), or no room for another
    thread? PyTorch and the libraries say so with many kinds of errors."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # the latter is torch's
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    text = str(error).lower()
    return not isinstance(error, ValueError) and any(words in text for words in (
        "can't allocate memory", "cannot allocate memory", "not enough memory", "paging file", "bad_alloc",
        "bad allocation", "can't start new thread", "thread creation failed"))


# --------------------------------------------------------------------------- the model


@dataclass
class LlamaConfig:
    """The shape of a Llama (Touvron et al. 2023, arXiv 2307.09288).

    `n_kv_heads` below `n_heads` is grouped-query attention; None: as many as `n_heads`. `hidden_dim` None: two
    thirds of 4 * dim, rounded up to `multiple_of`. `attention` is "causal" or "bidirectional".
    """

    vocab_size: int = 32000
    dim: int = 512
    n_layers: int = 8
    n_heads: int = 8
    n_kv_heads: int | None = None
    hidden_dim: int | None = None
    multiple_of: int = 32
    max_seq_len: int = 1024
    layer_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    dropout: float = 0.0
    attention: str = "causal"
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "multiple_of", "max_seq_len"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be an integer, 1 or more")
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        if self.hidden_dim is None:
            hidden = int(2 * (4 * self.dim) / 3)
            self.hidden_dim = self.multiple_of * math.ceil(hidden / self.multiple_of)
        if self.dim % self.n_heads or (self.dim // self.n_heads) % 2:
            raise ValueError(f"dim {self.dim} does not divide into {self.n_heads} heads of an even size")
        if not isinstance(self.n_kv_heads, int) or self.n_kv_heads < 1 or self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        for name, most in (("layer_norm_eps", 1.0), ("rope_theta", 1e15)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value <= most:
                raise ValueError(f"{name} is {value!r}; it must be a number above 0 and at most {most:g}")
            setattr(self, name, float(value))
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}; it must be at least 0 and below 1")
        if self.attention not in ("causal", "bidirectional"):
            raise ValueError(f"attention is {self.attention!r}; it can be causal or bidirectional")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


# --------------------------------------------------------------------------- a run

GENERATE_PREFIX = (
    "I have wanted to see this thriller for a while, and it didn't disappoint. "
    "Keanu Reeves, playing the hero John Wick, is"
)
QUESTION = "Is this movie {labels}? This movie is"


@dataclass(frozen=True)
class Check:
    """A condition on an option's value, and the words that finish the sentence "it must be ..."."""

    holds: Callable[[Any], bool]
    words: str


# The upper limits keep every product of options inside a float32 and an int64.
RATE = Check(lambda x: 0 < x <= 1e6, "above 0 and at most 1e6")
POSITIVE = Check(lambda x: 0 < x <= 1e30, "above 0 and at most 1e30")
NOT_NEGATIVE = Check(lambda x: 0 <= x <= 1e30, "0 or more, and at most 1e30")
AT_LEAST_ONE = Check(lambda x: 1 <= x < 2**31, "1 or more, and below 2^31")
AT_LEAST_TWO = Check(lambda x: x >= 2, "2 or more")
AT_LEAST_TEN = Check(lambda x: x >= 10, "10 or more")
PROBABILITY = Check(lambda x: 0 <= x < 1, "at least 0 and below 1")
INSIDE = Check(lambda x: 0 < x < 1, "above 0 and below 1")
FRACTION = Check(lambda x: 0 < x <= 1, "above 0 and at most 1")
FRACTION_OR_ZERO = Check(lambda x: 0 <= x <= 1, "between 0 and 1")
FINITE_FROM_ONE = Check(lambda x: 1 <= x < math.inf, "1 or more")
RISING = Check(lambda xs: xs[0] > 0 and all(a < b for a, b in itertools.pairwise(xs)),
               "whole numbers from 1, each larger than the one before")

# The names of optimizer.SCHEDULES, which cannot be imported here: that room imports torch.
SCHEDULERS = (
    "constant", "linear", "cosine", "cosine_restarts", "linear_cosine", "step", "multistep", "exponential",
    "natural_exp", "inverse_time", "polynomial", "inverse_sqrt", "cyclic", "one_cycle", "wsd", "plateau",
)


def _integers(text: str) -> tuple[int, ...]:
    """10,25,40 as a tuple; raises ValueError, which argparse reports, for anything else."""
    return tuple(int(part) for part in text.split(","))


_integers.__name__ = "list of whole numbers"  # argparse says: invalid list of whole numbers value


def _option(default: Any, group: str, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"group": group, "help": help, **more})


@dataclass(frozen=True)
class RunConfig:
    """Every option of `run_llama.py`, typed, with its default. None: decided at run time, as the help says."""

    option: str = _option("generate", "What to do", "what to do: generate continues --prefix; prompt asks the "
        "pretrained model without training; finetune trains, then evaluates the best epoch; evaluate and predict "
        "use a saved --run; lr_find looks for the learning rate; verify_resume kills a run and compares",
        choices=("generate", "prompt", "finetune", "evaluate", "predict", "lr_find", "verify_resume"))
    run: str | None = _option(None, "What to do", "a run folder, for evaluate and predict", metavar="RUN")
    input: str | None = _option(None, "What to do", "predict: a file of sentences, one a line; - is stdin",
        metavar="FILE")

    dataset: str | None = _option(None, "Data", "short for the four paths data/NAME-{train,dev,test}.txt and "
        "data/NAME-label-mapping.json; movies is fetched when it is not there", metavar="NAME")
    train: str | None = _option(None, "Data", "training sentences, `label ||| sentence` a line "
        "(default: data/sst-train.txt where it is, else the data set movies)", metavar="FILE")
    dev: str | None = _option(None, "Data", "development sentences: the best epoch is chosen on them", metavar="FILE")
    test: str | None = _option(None, "Data", "test sentences: looked at once, at the end", metavar="FILE")
    label_names: str | None = _option(None, "Data", "JSON list of the labels' names (default: beside --train, "
        "else the numbers)", metavar="FILE")
    max_sentence_len: int | None = _option(None, "Data", "cut sentences after this many tokens; also "
        "--max_length (default: the model's context)", check=AT_LEAST_ONE)
    train_limit: int | None = _option(None, "Data", "train on a random N of the training sentences", metavar="N",
        check=AT_LEAST_ONE)

    pretrained_model_path: str | None = _option(None, "Model", "a llama2.c .pt, a .gguf, a Hugging Face folder, or a "
        "name that data/prepare.py knows (default: stories42M.pt where it is, else smollm2-135m)", metavar="PATH")
    tokenizer: str | None = _option(None, "Model", "SentencePiece .model, tokenizer.json or .gguf (default: the one "
        "that comes with the weights)", metavar="FILE")
    n_layers: int | None = _option(None, "Model", "use the first K layers of the pretrained stack", metavar="K",
        check=AT_LEAST_ONE)
    attention: str = _option("causal", "Model", "what a token may look at: the ones before it, or all",
        choices=("causal", "bidirectional"))
    pooling: str = _option("last", "Model", "how a sentence's hidden states become one vector",
        choices=("last", "mean", "max", "first"))
    hidden_dropout_prob: float = _option(0.3, "Model", "dropout in front of the classification head", check=PROBABILITY)
    dropout: float = _option(0.0, "Model", "embedding, attention and residual dropout inside the stack",
        check=PROBABILITY)

    epochs: int = _option(10, "Training", "passes over the training sentences", check=AT_LEAST_ONE)
    batch_size: int = _option(8, "Training", "sentences a forward pass; times --grad_accum an optimizer step",
        check=AT_LEAST_ONE)
    grad_accum: int = _option(1, "Training", "forward passes an optimizer step; the loss is the mean over all of them",
        metavar="N", check=AT_LEAST_ONE)
    auto_batch: bool = _option(False, "Training", "find the largest forward pass that fits into memory on the longest "
        "sentences; the effective batch stays")
    grad_checkpoint: bool = _option(False, "Training", "compute activations twice instead of keeping them: less "
        "memory, about a third more time")
    train_eval: str = _option("sample", "Training", "train acc is measured on a fixed random sample as large as dev, "
        "or on the full training set", choices=("sample", "full"))
    seed: int = _option(1337, "Training", "the seed of everything random", check=Check(
        lambda x: 0 <= x < 2**63, "0 or more, and below 2^63"))
    seeds: int | None = _option(None, "Training", "run with N seeds, one after another; mean and standard deviation",
        metavar="N", check=AT_LEAST_TWO)
    folds: int | None = _option(None, "Training", "cross-validate: train and dev together, cut into N", metavar="N",
        check=AT_LEAST_TWO)
    fold: int | None = _option(None, "Training", "of the --folds N, run this one alone: 0 to N-1", metavar="I",
        check=NOT_NEGATIVE)

    optimizer: str = _option("adamw", "Optimizer", "which one", choices=("adamw", "sgd", "lion", "adafactor"))
    lr: float = _option(1e-5, "Optimizer", "learning rate at its peak", check=RATE)
    head_lr: float | None = _option(None, "Optimizer", "the classification head's own rate", check=RATE)
    layerwise_lr_decay: float = _option(1.0, "Optimizer", "each layer's rate is this times that of the layer above",
        check=FRACTION)
    lr_scaling: str | None = _option(None, "Optimizer", "scale the rates with effective batch / --base_batch_size",
        choices=("linear", "sqrt"))
    base_batch_size: int = _option(80, "Optimizer", "the batch that the rate was tuned at", check=AT_LEAST_ONE)
    weight_decay: float = _option(0.0, "Optimizer", "decoupled weight decay, not on norms and biases",
        check=NOT_NEGATIVE)
    decay_all: bool = _option(False, "Optimizer", "decay norms and biases too")
    momentum: float = _option(0.9, "Optimizer", "sgd", check=PROBABILITY)
    nesterov: bool = _option(False, "Optimizer", "sgd")
    max_grad_norm: float = _option(1.0, "Optimizer", "clip the gradient's norm; 0: off", check=NOT_NEGATIVE)
    max_grad_value: float = _option(0.0, "Optimizer", "clip each number of the gradient; 0: off", check=NOT_NEGATIVE)

    scheduler: str = _option("linear", "Schedule", "the rate's way from its peak to the end of the run",
        choices=SCHEDULERS)
    warmup_steps: int | None = _option(None, "Schedule", "optimizer steps in front in which the rate rises",
        check=NOT_NEGATIVE)
    warmup_epochs: float | None = _option(None, "Schedule", "the same in epochs", check=NOT_NEGATIVE)
    warmup_ratio: float | None = _option(None, "Schedule", "the same as a part of the run (default: 0.06, with "
        "constant 0)", check=FRACTION_OR_ZERO)
    warmup_kind: str = _option("linear", "Schedule", "rise steadily, or stay at --warmup_start",
        choices=("linear", "constant"))
    warmup_start: float = _option(0.0, "Schedule", "where the warmup begins, times lr", check=FRACTION_OR_ZERO)
    min_lr_ratio: float | None = _option(None, "Schedule", "the lowest rate, times lr (default: 1e-3 for cosine)",
        check=FRACTION_OR_ZERO)
    schedule_every: str = _option("step", "Schedule", "change the rate each optimizer step, or each epoch",
        choices=("step", "epoch"))
    cycles: int | None = _option(None, "Schedule", "cosine_restarts, cyclic: how many", check=AT_LEAST_ONE)
    cycle_mult: float | None = _option(None, "Schedule", "cosine_restarts: each cycle is that much longer",
        check=FINITE_FROM_ONE)
    cycle_decay: float | None = _option(None, "Schedule", "cosine_restarts: each cycle's peak, times that of the one "
        "before", check=FRACTION)
    cyclic_mode: str | None = _option(None, "Schedule", "cyclic", choices=("triangular", "triangular2"))
    step_size: int | None = _option(None, "Schedule", "step: how long between two cuts", check=AT_LEAST_ONE)
    milestones: tuple[int, ...] | None = _option(None, "Schedule", "multistep: where the cuts are, as 10,25,40",
        parse=_integers, metavar="N,N,...", check=RISING)
    gamma: float | None = _option(None, "Schedule", "step, multistep, exponential, plateau: the factor of a cut",
        check=FRACTION)
    decay_rate: float | None = _option(None, "Schedule", "natural_exp, inverse_time: how fast", check=POSITIVE)
    power: float | None = _option(None, "Schedule", "polynomial", check=POSITIVE)
    pct_start: float | None = _option(None, "Schedule", "one_cycle: the part of the run that rises", check=INSIDE)
    decay_fraction: float | None = _option(None, "Schedule", "wsd: the part of the run that decays", check=FRACTION)
    plateau_patience: int | None = _option(None, "Schedule", "plateau: evaluations without a new best before a cut",
        check=NOT_NEGATIVE)

    loss: str = _option("ce", "Regularisation", "cross-entropy, or a cumulative link for ordered labels",
        choices=("ce", "ordinal"))
    ordinal: bool = _option(False, "Regularisation", "the labels are ordered: report mean absolute error, quadratic "
        "weighted kappa and off-by-one accuracy too")
    label_smoothing: float = _option(0.0, "Regularisation", "this much of each label goes to all classes",
        check=PROBABILITY)
    r_drop: float = _option(0.0, "Regularisation", "weight of the divergence between two passes with different dropout",
        metavar="ALPHA", check=NOT_NEGATIVE)
    ema: float = _option(0.0, "Regularisation", "evaluate and keep a moving average of the weights with this decay",
        metavar="DECAY", check=PROBABILITY)
    class_weights: str | None = _option(None, "Regularisation", "weigh each class's loss by its rarity",
        choices=("balanced",))
    sampler: str | None = _option(None, "Regularisation", "draw each class as often as the others",
        choices=("balanced",))
    aug_delete: float = _option(0.0, "Regularisation", "delete each word of a training sentence with this probability",
        check=PROBABILITY)
    aug_swap: float = _option(0.0, "Regularisation", "swap this part of the words with a neighbour", check=PROBABILITY)
    aug_replace: float = _option(0.0, "Regularisation", "replace each token with this probability by a near "
        "neighbour in the model's own embedding", check=PROBABILITY)

    monitor: str = _option("dev_acc", "Stopping and guards", "what chooses the best evaluation",
        choices=("dev_acc", "dev_f1", "dev_loss", "dev_mae", "dev_qwk"))
    patience: int = _option(5, "Stopping and guards", "stop after N evaluations without a new best; 0: never",
        metavar="N", check=NOT_NEGATIVE)
    min_delta: float = _option(0.0, "Stopping and guards", "what a new best must gain", check=NOT_NEGATIVE)
    eval_every: float = _option(1.0, "Stopping and guards", "evaluate every such part of an epoch", check=FRACTION)
    guards: str = _option("on", "Stopping and guards", "skip steps that are not finite, roll back when the loss "
        "diverges", choices=("on", "off"))
    detect_anomaly: bool = _option(False, "Stopping and guards", "name the operation whose gradient is not a number "
        "(slow)")
    overfit_batch: bool = _option(False, "Stopping and guards", "check first that the model can memorise one batch")
    check_gradients: bool = _option(False, "Stopping and guards", "check first that one big batch, micro-batches and a "
        "short last window give the same gradient")
    save_every: int | None = _option(None, "Stopping and guards", "save the state for a resume every N steps too (each "
        "epoch it is saved anyway)", metavar="N", check=AT_LEAST_ONE)
    resume: str | None = _option(None, "Stopping and guards", "go on with a run that was stopped, or with all the "
        "runs of --seeds or --folds; the options come from its folder", metavar="RUN")
    deterministic: bool = _option(False, "Stopping and guards", "bit-identical runs on a GPU too, a little slower")
    plan: bool = _option(False, "Stopping and guards", "train nothing: print what the run would do, draw its schedule")

    lr_min: float = _option(1e-7, "Range test", "lr_find: the first rate", check=RATE)
    lr_max: float = _option(1e-2, "Range test", "lr_find: the last rate", check=RATE)
    lr_steps: int = _option(100, "Range test", "lr_find: how many steps", check=AT_LEAST_TEN)
    lr_repeats: int = _option(1, "Range test", "lr_find: repeat over N seeds, for an interval", metavar="N",
        check=AT_LEAST_ONE)
    confirm: bool = _option(False, "Range test", "lr_find: train briefly at five rates across the interval, with up to "
        "three seeds, and recommend the best where it can be told from chance")

    use_gpu: bool = _option(False, "Device", "short for --device cuda; without a GPU it warns and uses the CPU")
    device: str | None = _option(None, "Device", "cpu, cuda, cuda:1 or mps (default: cpu)")
    dtype: str = _option("auto", "Device", "precision of the matrix products; auto is bfloat16 where the device is "
        "fast at it", choices=("auto", "float32", "bfloat16"))
    kernels: str = _option("auto", "Device", "auto: on a CPU the norms, positions, SwiGLU and AdamW of a large model "
        "run in C (kernels.c), compiled at the first start; off: all in PyTorch", choices=("auto", "off"))

    output_dir: str | None = _option(None, "Output", "the run folder (default: runs/<option>-<epochs>-<lr>, with -2, "
        "-3 behind it when it exists)", metavar="DIR")
    overwrite: bool = _option(False, "Output", "replace the run that is in --output_dir")
    dev_out: str | None = _option(None, "Output", "predictions for dev, `label ||| sentence` a line, in the file's "
        "order (default: in the run folder; for prompt, here)", metavar="FILE")
    test_out: str | None = _option(None, "Output", "the same for test", metavar="FILE")

    prefix: str = _option(GENERATE_PREFIX, "Generation and prompting", "generate: the text to continue",
        metavar="TEXT", show_default=False)
    max_new_tokens: int = _option(75, "Generation and prompting", "generate: how many tokens", check=AT_LEAST_ONE)
    generated_sentence_low_temp_out: str = _option("generated-sentence-temp-0.txt", "Generation and prompting",
        "generate: the file for the greedy text", metavar="FILE")
    generated_sentence_high_temp_out: str = _option("generated-sentence-temp-1.txt", "Generation and prompting",
        "generate: the file for the text at temperature 1.0", metavar="FILE")
    question: str = _option(QUESTION, "Generation and prompting", "prompt: what follows the sentence; {labels} "
        "stands for the labels' names", metavar="TEXT", show_default=False)

    given: frozenset[str] = field(default=frozenset(), metadata={})  # the options that were typed


def options() -> list:
    """The fields of `RunConfig` that are options of the command line."""
    return [f for f in fields(RunConfig) if f.metadata]


# --------------------------------------------------------------------------- the parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One line, without the usage of every option in front of it. Exit code 2."""
        self.exit(2, f"{self.prog}: error: {shown(message)}\n")


def _value_type(kind: str) -> type:
    for name, python_type in (("int", int), ("float", float)):
        if name in kind:
            return python_type
    return str


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="run_llama.py",
        description="Fine-tune, evaluate and prompt a LLaMA that you can read.",
        epilog="- and _ are interchangeable in every option. More: README.md",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    for f in options():
        meta = f.metadata
        if meta["group"] not in groups:
            groups[meta["group"]] = parser.add_argument_group(meta["group"])
        group = groups[meta["group"]]
        text = meta["help"].replace("%", "%%")
        if f.type is bool:
            group.add_argument(f"--{f.name}", action="store_true", help=text)
            continue
        if f.default is not None and meta.get("show_default", True):
            text += f" (default: {f.default})"
        keywords: dict[str, Any] = {"type": meta.get("parse", _value_type(str(f.type))), "help": text}
        if "choices" in meta:
            keywords["choices"] = meta["choices"]
        else:
            keywords["metavar"] = meta.get("metavar", keywords["type"].__name__.upper())
        group.add_argument(f"--{f.name}", **keywords)
    return parser


# What other programs call these options.
OTHER_NAMES = {
    "option": "mode task action command",
    "dataset": "data dataset_name",
    "train": "train_file train_data",
    "dev": "dev_file valid validation validation_file eval_file",
    "test": "test_file predict_file",
    "label_names": "labels label_file",
    "max_sentence_len": "max_len max_seq_len max_seq_length max_sentence_length",
    "train_limit": "max_train_samples",
    "pretrained_model_path": "model model_name model_path model_name_or_path pretrained_model checkpoint",
    "tokenizer": "tokenizer_name tokenizer_path",
    "n_layers": "layers num_layers num_hidden_layers",
    "hidden_dropout_prob": "hidden_dropout classifier_dropout",
    "dropout": "dropout_prob attention_dropout",
    "epochs": "num_epochs n_epochs num_train_epochs max_epochs",
    "batch_size": "bs train_batch_size per_device_train_batch_size",
    "grad_accum": "gradient_accumulation gradient_accumulation_steps accumulation_steps accumulate_grad_batches",
    "grad_checkpoint": "gradient_checkpointing",
    "seed": "random_seed random_state",
    "seeds": "n_seeds num_seeds",
    "folds": "cv kfold k_folds n_folds num_folds",
    "optimizer": "optim",
    "lr": "learning_rate",
    "layerwise_lr_decay": "llrd layer_decay",
    "weight_decay": "wd",
    "max_grad_norm": "grad_clip clip_grad_norm gradient_clip_val",
    "scheduler": "schedule lr_scheduler lr_scheduler_type",
    "warmup_ratio": "warmup warmup_proportion",
    "label_smoothing": "label_smoothing_factor",
    "ema": "ema_decay",
    "monitor": "metric metric_for_best_model",
    "patience": "early_stop early_stopping early_stopping_patience",
    "eval_every": "eval_steps eval_interval",
    "save_every": "save_steps save_interval",
    "resume": "resume_from resume_from_checkpoint",
    "use_gpu": "gpu cuda use_cuda",
    "device": "cpu no_cuda use_cpu",
    "dtype": "bf16 fp16 amp precision",
    "output_dir": "output out_dir save_dir",
    "overwrite": "overwrite_output_dir force",
    "prefix": "prompt_text text",
    "max_new_tokens": "max_tokens",
}
MEANT = {other: name for name, others in OTHER_NAMES.items() for other in others.split()}
ALIASES = {"max_length": "max_sentence_len"}


def _underscores(argument: str) -> str:
    """`--label-names=x` to `--label_names=x`; values are left alone."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    name = name.replace("-", "_")
    return "--" + ALIASES.get(name, name) + equals + value


def parse_args(argv: list[str] | None = None) -> RunConfig:
    """The command line as a `RunConfig`. Bad values print one line to stderr and exit with code 2."""
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    known = [f.name for f in options()]
    namespace, unknown = parser.parse_known_args([_underscores(a) for a in argv])
    if unknown:
        name = unknown[0].partition("=")[0]
        meant = MEANT.get(name.lstrip("-").replace("-", "_"))
        near = [meant] if meant else difflib.get_close_matches(name.lstrip("-"), [*known, *ALIASES], n=1)
        hint = f"did you mean --{near[0]}?" if near else "see --help"
        parser.error(f"unknown option {name}: {hint}")
    given = vars(namespace)
    for name, value in given.items():
        if value == "" and name != "prefix":
            parser.error(f"--{name} is empty")
        try:
            str(value).encode("utf-8")
        except UnicodeEncodeError:
            parser.error(f"--{name}: these bytes are not UTF-8")
        if "\0" in str(value):
            parser.error(f"--{name}: there is a zero byte in it")
    for f in options():
        check = f.metadata.get("check")
        if check and f.name in given and not check.holds(given[f.name]):
            value = given[f.name]
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            parser.error(f"--{f.name} {text}: it must be {check.words}")
    config = RunConfig(**given, given=frozenset(given))
    if fault := contradiction(config):
        parser.error(fault)
    return config


def contradiction(c: RunConfig) -> str:
    """What two of the given options have against each other, seen from the options alone; "" when it is nothing."""
    warmups = [n for n in ("warmup_steps", "warmup_epochs", "warmup_ratio") if getattr(c, n) is not None]
    several = "seeds" if c.seeds else "folds"
    faults = {
        "--seeds and --folds contradict each other; give one": c.seeds and c.folds,
        f"--resume goes on with a fine-tuning run, and --option is {c.option}; leave --option out":
            c.resume and "option" in c.given and c.option != "finetune",
        f"--plan is about --option finetune, and --option is {c.option}": c.plan and c.option != "finetune",
        f"--{several} repeats --option finetune, and --option is {c.option}":
            (c.seeds or c.folds) and c.option != "finetune" and not c.resume,
        f"--fold {c.fold} needs --folds above it, which is {c.folds or 'not given'}":
            c.fold is not None and c.fold >= (c.folds or 0),
        f"--{' and --'.join(warmups)} contradict each other; give one": len(warmups) > 1,
        "--dataset and --train contradict each other; give one": c.dataset and c.train,
        "--nesterov needs a --momentum above 0": c.nesterov and not c.momentum,
        f"--lr_min {c.lr_min:g} must be below --lr_max {c.lr_max:g}": c.lr_min >= c.lr_max,
    }
    return next((fault for fault, holds in faults.items() if holds), "")


def fault_of(saved: dict[str, Any]) -> str:
    """What is wrong with the options of a saved run, by the checks that typed ones go through; "" when it is nothing.
    Options that are newer than the run are not there."""
    known = {f.name: f for f in options()}
    for name, value in saved.items():
        if name not in known:
            return f"this version has no --{name}"
        f = known[name]
        if value is None and f.default is None:
            continue
        kind = bool if f.type is bool else list if "parse" in f.metadata else _value_type(str(f.type))
        is_right = type(value) in ((int, float) if kind is float else (kind,))
        if kind is list:
            is_right = is_right and value and all(type(item) is int for item in value)
        if not is_right:
            return f"--{name} is {value!r}, expected {'a ' if kind is not int else 'an '}{kind.__name__}"
        choices, check = f.metadata.get("choices"), f.metadata.get("check")
        if choices and value not in choices:
            return f"--{name} is {value!r}; it can be {', '.join(choices)}"
        if check and not check.holds(value):
            return f"--{name} is {value!r}; it must be {check.words}"
        if kind is str and (not value and name != "prefix" or "\0" in value):
            return f"--{name} is {value!r}"
    return ""
