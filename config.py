"""The model's shape, the run's options, and the argument parser that is made from them.

Nothing here imports torch, so `python run_llama.py --help` answers at once. An option is one field of `RunConfig`: its
default, its help, the values it accepts, the commands that use it and the options it needs stand in one place.
"""

import argparse
import difflib
import itertools
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields
from functools import partial
from typing import Any, NoReturn

import schedule
from schedule import AT_LEAST_ONE, FRACTION, NOT_NEGATIVE, SCHEDULERS, Check, Need


def counted(n: int, noun: str) -> str:
    """1 layer, 2 layers: a number and its noun, for messages."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


# Control characters but tab and line feed, and those that reverse or break a line (Unicode's bidi controls, U+2028/9).
_TERMINAL_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def shown(text: object) -> str:
    """Text for a person's terminal: a name or path from a file could hold codes that move the cursor, hide text or
    reverse it, so they are written out, as \\x1b or \\u202e."""
    return _TERMINAL_CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), str(text))


class InputError(ValueError):
    """What a person did wrong: `main` prints it on one line and exits with code 2."""


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
    n_kv_heads: int = None  # type: ignore[assignment]  # a number from __post_init__ on
    hidden_dim: int = None  # type: ignore[assignment]
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
            self.hidden_dim = self.multiple_of * math.ceil(int(2 * (4 * self.dim) / 3) / self.multiple_of)
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

COMMANDS = ("generate", "prompt", "finetune", "evaluate", "predict", "lr_find", "verify_resume")
FINETUNE = ("finetune",)
WHOLE_RUN = ("finetune", "verify_resume")  # the commands that train to the end
TRAINING = ("finetune", "lr_find", "verify_resume")
PRETRAINED = ("generate", "prompt", *TRAINING)  # those that read pretrained weights
LABELLED = ("prompt", "evaluate", *TRAINING)  # those that read labelled sentences
SCORING = ("prompt", "evaluate", *WHOLE_RUN)  # those that report accuracies
WRITING = ("prompt", "evaluate", "finetune")  # those that write predictions where they are asked to

POOLINGS = ("last", "mean", "max", "first")
OPTIMIZERS = ("adamw", "sgd", "lion", "adafactor")
GENERATE_PREFIX = ("I have wanted to see this thriller for a while, and it didn't disappoint. Keanu Reeves, "
                   "playing the hero John Wick, is")
QUESTION = "Is this movie {labels}? This movie is"

RATE = Check(lambda x: 0 < x <= 1e6, "above 0 and at most 1e6")
AT_LEAST_TWO = Check(lambda x: x >= 2, "2 or more")
PROBABILITY = Check(lambda x: 0 <= x < 1, "at least 0 and below 1")

SGD = Need(lambda c: c.optimizer == "sgd", "--optimizer {optimizer} does not use it")
ONE_RUN = Need(lambda c: not c.seeds and (not c.folds or c.fold is not None),
               "each run has its predictions in its own folder")
SERIES = Need(lambda c: c.option == "finetune" or c.resume,
              "--{name} repeats --option finetune, and --option is {option}")


def _option(group: str, default: Any, help: str, *, only: tuple[str, ...] = TRAINING, common: bool = False,
            needs: Sequence[Need] = (), requires: Need | None = None, one_of: tuple[str, ...] = (), also: str = "",
            **more: Any) -> Any:
    """A field of `RunConfig`. `only`: the commands that use the option; `common`: is it in the short help? Without what
    it `needs` it has no effect; without what it `requires`, or beside another of `one_of`, it is refused. `also`: what
    other programs call it."""
    return field(default=default, metadata={"group": group, "help": help, "only": only, "common": common,
                 "needs": needs, "requires": requires, "one_of": one_of, "also": also, **more})


# A group of the help each, with the commands of those of its options that name none.
_what = partial(_option, "What to do", common=True)
_data = partial(_option, "Data", only=LABELLED, metavar="FILE")
_model, _train, _optimizer, _schedule, _regular, _output = (partial(_option, group) for group in (
    "Model", "Training", "Optimizer", "Schedule", "Regularisation", "Output"))
_stop = partial(_option, "Stopping and guards", only=WHOLE_RUN)
_range = partial(_option, "Range test", only=("lr_find",))
_device = partial(_option, "Device", only=COMMANDS)
_text = partial(_option, "Generation and prompting", only=("generate",), metavar="FILE")


def _with_schedule_options(cls: Any) -> Any:
    """Add a field for each option that schedule.py has, behind --scheduler."""
    types, own = list(cls.__annotations__.items()), schedule.command_line_options()
    at = list(cls.__annotations__).index("scheduler") + 1
    cls.__annotations__ = dict([*types[:at], *((name, o.type) for name, o in own.items()), *types[at:]])
    for name, option in own.items():
        setattr(cls, name, _schedule(**vars(option)))
    return cls


@dataclass(frozen=True)
@_with_schedule_options
class RunConfig:
    """Every option of `run_llama.py`, typed, with its default. None: decided at run time, as the help says."""

    option: str = _what("generate", "generate continues --prefix; prompt asks the pretrained model without training; "
        "finetune trains, then evaluates the best epoch; evaluate and predict use a saved --run; lr_find looks for "
        "the learning rate; verify_resume kills a run and compares", choices=COMMANDS, only=COMMANDS,
        also="mode task command")
    run: str | None = _what(None, "the folder of a finished run", metavar="RUN", only=("evaluate", "predict"))
    input: str | None = _what(None, "a file of sentences, one a line; - is stdin", metavar="FILE", only=("predict",))

    dataset: str | None = _data(None, "short for the four paths data/NAME-{train,dev,test}.txt and "
        "data/NAME-label-mapping.json; movies is fetched when it is not there", metavar="NAME", common=True,
        one_of=("dataset", "train"))
    train: str | None = _data(None, "training sentences, `label ||| sentence` a line (default: data/sst-train.txt "
        "where it is, else the data set movies)", common=True, one_of=("dataset", "train"),
        also="train_file train_data")
    dev: str | None = _data(None, "development sentences: the best epoch is chosen on them", common=True,
        also="dev_file valid validation validation_file eval_file")
    test: str | None = _data(None, "test sentences: looked at once, at the end", common=True, also="predict_file")
    label_names: str | None = _data(None, "JSON list of the labels' names (default: beside --train, else the numbers)")
    max_sentence_len: int | None = _data(None, "cut sentences after this many tokens; also --max_length (default: "
        "the model's context)", metavar="N", check=AT_LEAST_ONE, only=PRETRAINED, also="max_len max_seq_length")
    train_limit: int | None = _data(None, "train on a random N of the training sentences", metavar="N", only=TRAINING,
        check=AT_LEAST_ONE, also="max_train_samples")

    pretrained_model_path: str | None = _model(None, "a llama2.c .pt, a .gguf, a Hugging Face folder, or a name that "
        "data/prepare.py knows (default: stories42M.pt where it is, else smollm2-135m)", metavar="PATH", common=True,
        only=PRETRAINED, also="model model_name model_name_or_path checkpoint")
    tokenizer: str | None = _model(None, "SentencePiece .model, tokenizer.json or .gguf (default: the one that comes "
        "with the weights)", metavar="FILE", only=PRETRAINED)
    n_layers: int | None = _model(None, "use the first K layers of the pretrained stack", metavar="K", only=PRETRAINED,
        check=AT_LEAST_ONE, common=True)
    attention: str = _model("causal", "what a token sees: the ones before it, or all",
        choices=("causal", "bidirectional"))
    pooling: str = _model("last", "how a sentence's hidden states become one vector", choices=POOLINGS)
    hidden_dropout_prob: float = _model(0.3, "dropout in front of the classification head", check=PROBABILITY,
        common=True, also="classifier_dropout")
    dropout: float = _model(0.0, "embedding, attention and residual dropout inside the stack", check=PROBABILITY,
        also="dropout_prob attention_dropout")

    epochs: int = _train(10, "passes over the training set", check=AT_LEAST_ONE, common=True, also="num_train_epochs")
    batch_size: int = _train(8, "sentences a forward pass; times --grad_accum an optimizer step", check=AT_LEAST_ONE,
        common=True, also="bs train_batch_size per_device_train_batch_size")
    grad_accum: int = _train(1, "forward passes an optimizer step; the loss is their mean", check=AT_LEAST_ONE,
        also="gradient_accumulation_steps accumulation_steps accumulate_grad_batches")
    auto_batch: bool = _train(False, "find the largest forward pass that fits into memory on the longest sentences; "
        "the effective batch stays", only=WHOLE_RUN)
    grad_checkpoint: bool = _train(False, "compute activations twice instead of keeping them: less memory, about a "
        "third more time")
    train_eval: str = _train("sample", "train acc is measured on a fixed random sample as large as dev, or on the "
        "full training set", choices=("sample", "full"), only=WHOLE_RUN)
    seed: int = _train(1337, "the seed of everything random", only=("generate", *TRAINING), common=True,
        check=Check(lambda x: 0 <= x < 2**63, "0 or more, and below 2^63"), also="random_seed random_state")
    seeds: int | None = _train(None, "run with N seeds, one after another; mean and standard deviation", metavar="N",
        check=AT_LEAST_TWO, only=FINETUNE, one_of=("seeds", "folds"), requires=SERIES)
    folds: int | None = _train(None, "cross-validate: train and dev together, cut into N", metavar="N", requires=SERIES,
        check=AT_LEAST_TWO, only=FINETUNE, one_of=("seeds", "folds"), also="cv kfold")
    fold: int | None = _train(None, "of the --folds N, run this one alone: 0 to N-1", metavar="I", check=NOT_NEGATIVE,
        only=FINETUNE,
        requires=Need(lambda c: c.fold < (c.folds or 0), "--fold {fold} needs --folds above it, which is {folds}"))

    optimizer: str = _optimizer("adamw", "how gradients become steps; sgd has --momentum", also="optim",
        choices=OPTIMIZERS)
    lr: float = _optimizer(1e-5, "learning rate at its peak", check=RATE, common=True, also="learning_rate")
    head_lr: float | None = _optimizer(None, "the classification head's own rate", check=RATE)
    layerwise_lr_decay: float = _optimizer(1.0, "each layer's rate is this times that of the layer above", also="llrd",
        check=FRACTION)
    lr_scaling: str | None = _optimizer(None, "scale the rates with effective batch / --base_batch_size",
        choices=("linear", "sqrt"))
    base_batch_size: int = _optimizer(80, "the batch that the rate was tuned at", check=AT_LEAST_ONE,
        needs=[Need(lambda c: c.lr_scaling, "it needs --lr_scaling")])
    weight_decay: float = _optimizer(0.0, "decoupled weight decay, not on norms and biases", check=NOT_NEGATIVE,
        also="wd")
    decay_all: bool = _optimizer(False, "decay norms and biases too",
        needs=[Need(lambda c: c.weight_decay, "it needs --weight_decay")])
    momentum: float = _optimizer(0.9, "sgd: the part of a step that goes into the next", check=PROBABILITY, needs=[SGD])
    nesterov: bool = _optimizer(False, "sgd: take the gradient's step after that of the momentum (Nesterov)",
        needs=[SGD], requires=Need(lambda c: c.momentum, "--nesterov needs a --momentum above 0"))
    max_grad_norm: float = _optimizer(1.0, "clip the gradient's norm; 0: off", check=NOT_NEGATIVE,
        also="grad_clip gradient_clip_val")
    max_grad_value: float = _optimizer(0.0, "clip each number of the gradient; 0: off", check=NOT_NEGATIVE)

    # The other options of this group are made from schedule.py.
    scheduler: str = _schedule("linear", "the rate's way from its peak to the end of the run", choices=SCHEDULERS,
        common=True)

    loss: str = _regular("ce", "cross-entropy, or a cumulative link for ordered labels", choices=("ce", "ordinal"))
    ordinal: bool = _regular(False, "the labels are ordered: report mean absolute error, quadratic weighted kappa "
        "and off-by-one accuracy too", only=SCORING)
    label_smoothing: float = _regular(0.0, "this much of each label goes to all classes", check=PROBABILITY)
    r_drop: float = _regular(0.0, "weight of the divergence between two passes with different dropout", metavar="ALPHA",
        check=NOT_NEGATIVE,
        needs=[Need(lambda c: c.dropout or c.hidden_dropout_prob,
            "without --dropout and --hidden_dropout_prob the two passes are the same")])
    ema: float = _regular(0.0, "evaluate and keep a moving average of the weights with this decay", metavar="DECAY",
        check=PROBABILITY, also="ema_decay")
    class_weights: str | None = _regular(None, "weigh each class's loss by its rarity", choices=("balanced",))
    sampler: str | None = _regular(None, "draw each class as often as the others", choices=("balanced",))
    aug_delete: float = _regular(0.0, "delete each word of a sentence with this probability", check=PROBABILITY)
    aug_swap: float = _regular(0.0, "swap this part of the words with a neighbour", check=PROBABILITY)
    aug_replace: float = _regular(0.0, "replace each token with this probability by a near neighbour in the model's "
        "own embedding", check=PROBABILITY)

    monitor: str = _stop("dev_acc", "what chooses the best evaluation", also="metric metric_for_best_model",
        choices=("dev_acc", "dev_f1", "dev_loss", "dev_mae", "dev_qwk"))
    patience: int = _stop(5, "stop after N evaluations without a new best; 0: never", metavar="N", check=NOT_NEGATIVE,
        common=True, also="early_stop early_stopping early_stopping_patience")
    min_delta: float = _stop(0.0, "what a new best must gain", check=NOT_NEGATIVE)
    eval_every: float = _stop(1.0, "evaluate every such part of an epoch", check=FRACTION, also="eval_steps")
    guards: str = _stop("on", "skip steps that are not finite, roll back when the loss diverges", choices=("on", "off"),
        only=TRAINING)
    detect_anomaly: bool = _stop(False, "name the operation whose gradient is not a number (slow)", only=TRAINING)
    overfit_batch: bool = _stop(False, "check first that the model can memorise one batch")
    check_gradients: bool = _stop(False, "check first that one big batch, micro-batches and a short last one give "
        "the same gradient")
    save_every: int | None = _stop(None, "save the state for a resume every N steps too (each epoch it is saved "
        "anyway)", metavar="N", check=AT_LEAST_ONE, also="save_steps save_interval")
    resume: str | None = _stop(None, "go on with a run that was stopped, or with all the runs of --seeds or --folds; "
        "the options come from its folder", metavar="RUN", only=FINETUNE, common=True, also="resume_from_checkpoint",
        requires=Need(lambda c: c.option == "finetune" or "option" not in c.given,
            "--resume goes on with a fine-tuning run, and --option is {option}; leave --option out"))
    deterministic: bool = _stop(False, "bit-identical runs on a GPU too, a little slower", only=TRAINING)
    plan: bool = _stop(False, "train nothing: print what the run would do, draw its schedule", only=FINETUNE,
        common=True,
        requires=Need(lambda c: c.option == "finetune", "--plan is about --option finetune, and --option is {option}"))

    lr_min: float = _range(1e-7, "the first rate", check=RATE,
        requires=Need(lambda c: c.lr_min < c.lr_max, "--lr_min {lr_min:g} must be below --lr_max {lr_max:g}"))
    lr_max: float = _range(1e-2, "the last rate", check=RATE)
    lr_steps: int = _range(100, "how many steps it takes", check=Check(lambda x: x >= 10, "10 or more"))
    lr_repeats: int = _range(1, "repeat over N seeds, for an interval", metavar="N", check=AT_LEAST_ONE)
    confirm: bool = _range(False, "train briefly at five rates across the interval, with up to three seeds, and "
        "recommend the best where it can be told from chance")

    use_gpu: bool = _device(False, "short for --device cuda; without a GPU it warns and uses the CPU", common=True,
        needs=[Need(lambda c: not c.device, "--device decides")], also="cuda")
    device: str | None = _device(None, "cpu, cuda, cuda:1, mps (default: cpu)", common=True, also="cpu no_cuda use_cpu")
    dtype: str = _device("auto", "precision of the matrix products; auto is bfloat16 where the device is fast at it",
        choices=("auto", "float32", "bfloat16"), also="bf16 fp16 amp precision")
    kernels: str = _device("auto", "auto: on a CPU the norms, positions, SwiGLU and AdamW of a large model run in C "
        "(fused.c), compiled at the first start; off: all in PyTorch", choices=("auto", "off"))

    output_dir: str | None = _output(None, "the run folder (default: runs/<option>-<epochs>-<lr>, with -2, -3 behind "
        "it when it exists)", metavar="DIR", common=True, also="save_dir")
    overwrite: bool = _output(False, "replace the run that is in --output_dir", also="overwrite_output_dir force",
        needs=[Need(lambda c: c.output_dir, "it needs --output_dir")])
    dev_out: str | None = _output(None, "predictions for dev, `label ||| sentence` a line, in the file's order "
        "(default: in the run folder; for prompt, here)", metavar="FILE", only=WRITING, needs=[ONE_RUN])
    test_out: str | None = _output(None, "the same for test", metavar="FILE", only=WRITING, needs=[ONE_RUN])

    prefix: str = _text(GENERATE_PREFIX, "the text to continue", metavar="TEXT", show_default=False, common=True,
        also="prompt_text text")
    max_new_tokens: int = _text(75, "how many tokens to generate", metavar="N", check=AT_LEAST_ONE)
    generated_sentence_low_temp_out: str = _text("generated-sentence-temp-0.txt", "the file for the greedy text")
    generated_sentence_high_temp_out: str = _text("generated-sentence-temp-1.txt", "the file for the text drawn at "
        "temperature 1.0")
    question: str = _text(QUESTION, "what follows the sentence; {labels} stands for the labels' names", metavar="TEXT",
        show_default=False, only=("prompt",))

    given: frozenset[str] = field(default=frozenset(), metadata={})  # the options that were typed


def options() -> list[Field[Any]]:
    """The fields of `RunConfig` that are options of the command line."""
    return [f for f in fields(RunConfig) if f.metadata]


def contradiction(c: RunConfig) -> str:
    """What the options have against each other, seen from the options alone; "" when it is nothing."""
    for f in options():
        rivals = [name for name in f.metadata["one_of"] if getattr(c, name) is not None]
        if len(rivals) > 1:
            return f"--{' and --'.join(rivals)} contradict each other; give one"
        need, value = f.metadata["requires"], getattr(c, f.name)
        if need and value is not None and value is not False and not need.holds(c):  # --fold 0 equals False
            return need.said(f.name, c)
    return ""


def no_effect(c: RunConfig) -> list[str]:
    """A line for each option that was given but does nothing in this run, and why."""
    lines = []
    for f in sorted((f for f in options() if f.name in c.given), key=lambda f: f.name):
        if c.option not in f.metadata["only"]:
            lines.append(f"--{f.name}: it belongs to another --option")
        elif missing := [need for need in f.metadata["needs"] if not need.holds(c)]:
            lines.append(f"--{f.name}: {missing[0].said(f.name, c)}")
    return lines


# --------------------------------------------------------------------------- the parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage of every option in front of it. Exit code 2."""
        self.exit(2, f"{self.prog}: error: {shown(message)}\n")


def integers(text: str) -> tuple[int, ...]:
    """10,25,40 as a tuple; raises ValueError, which argparse reports, for anything else."""
    return tuple(int(part) for part in text.split(","))


integers.__name__ = "list of whole numbers"  # argparse says: invalid list of whole numbers value


def value_type(f: Field[Any]) -> Callable[[str], Any]:
    """What reads the option's value."""
    types: dict[str, Callable[[str], Any]] = {"tuple": integers, "int": int, "float": float}
    return next((read for name, read in types.items() if name in str(f.type)), str)


def make_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of every option. Its help has those that the command uses; without one, those used most."""
    parser = _Parser(
        prog="run_llama.py", usage=f"python run_llama.py --option {command or 'COMMAND'} [options]",
        description="Fine-tune, evaluate and prompt a LLaMA that you can read. "
        + (f"All that --option {command} uses:" if command else "What people use most:"),
        epilog=("" if command else "All that a command uses: python run_llama.py --option COMMAND --help, such as "
                "--option finetune --help. ") + "- and _ are interchangeable in every option. More: README.md",
        argument_default=argparse.SUPPRESS, allow_abbrev=False)
    groups = {name: parser.add_argument_group(name) for name in dict.fromkeys(f.metadata["group"] for f in options())}
    for f in options():
        meta, text = f.metadata, f.metadata["help"].replace("%", "%%")
        keywords: dict[str, Any] = {"action": "store_true"}
        if f.type is not bool:
            read, choices = value_type(f), meta.get("choices") or None
            keywords = {"type": read, "choices": choices}
            if not choices:
                keywords["metavar"] = meta.get("metavar") or read.__name__.upper()
            if f.default is not None and meta.get("show_default", True):
                text += f" (default: {f.default})"
        if not command and "finetune" not in meta["only"]:
            text = f"{', '.join(meta['only'])}: {text}"
        is_shown = command in meta["only"] if command else meta["common"]
        groups[meta["group"]].add_argument(f"--{f.name}", help=text if is_shown else argparse.SUPPRESS, **keywords)
    return parser


MEANT = {other: f.name for f in options() for other in f.metadata["also"].split()}  # what other programs call them
ALIASES = {"max_length": "max_sentence_len"}


def _underscores(argument: str) -> str:
    """`--label-names=x` to `--label_names=x`; values are left alone."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    name = name.replace("-", "_")
    return "--" + ALIASES.get(name, name) + equals + value


def _command_in(words: list[str]) -> str | None:
    """The value of --option, which may stand behind --help; None where there is none that we know."""
    values = [after for word, after in itertools.pairwise(words) if word == "--option"]
    values += [word.partition("=")[2] for word in words if word.startswith("--option=")]
    return next((value for value in values if value in COMMANDS), None)


def parse_args(argv: list[str] | None = None) -> RunConfig:
    """The command line as a `RunConfig`. Bad values print one line to stderr and exit with code 2."""
    argv = sys.argv[1:] if argv is None else argv
    words = [_underscores(a) for a in argv]
    parser = make_parser(_command_in(words) if {"-h", "--help"} & {*words} else None)
    namespace, unknown = parser.parse_known_args(words)
    if unknown:
        name = unknown[0].partition("=")[0]
        meant = MEANT.get(name.lstrip("-").replace("-", "_"))
        known = [*(f.name for f in options()), *ALIASES]
        near = [meant] if meant else difflib.get_close_matches(name.lstrip("-"), known, n=1)
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
