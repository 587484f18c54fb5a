"""The model's shape, the run's options, and the argument parser that is made from them.

Nothing here imports torch, so `python run_llama.py --help` answers at once. An option is one field of
`RunConfig`: its default, its help and the values it accepts stand in one place.
"""

import argparse
import difflib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

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
            raise ValueError(f"n_heads {self.n_heads} is no multiple of n_kv_heads {self.n_kv_heads}")
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


POSITIVE = Check(lambda x: 0 < x < math.inf, "above 0")
NOT_NEGATIVE = Check(lambda x: 0 <= x < math.inf, "0 or more")
AT_LEAST_ONE = Check(lambda x: x >= 1, "1 or more")
PROBABILITY = Check(lambda x: 0 <= x < 1, "at least 0 and below 1")


def _option(default: Any, group: str, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"group": group, "help": help, **more})


@dataclass(frozen=True)
class RunConfig:
    """Every option of `run_llama.py`, typed, with its default. None: decided at run time, as the help says."""

    option: str = _option("generate", "What to do", "what to do: generate continues --prefix; prompt asks the "
        "pretrained model without training; finetune trains, then evaluates the best epoch; evaluate and predict "
        "use a saved --run", choices=("generate", "prompt", "finetune", "evaluate", "predict"))
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
    max_sentence_len: int | None = _option(None, "Data", "cut sentences after this many tokens (default: the "
        "model's context)", check=AT_LEAST_ONE)
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
    batch_size: int = _option(8, "Training", "sentences an optimizer step", check=AT_LEAST_ONE)
    lr: float = _option(1e-5, "Training", "learning rate", check=POSITIVE)
    weight_decay: float = _option(0.0, "Training", "AdamW's decoupled weight decay", check=NOT_NEGATIVE)
    train_eval: str = _option("sample", "Training", "train acc is measured on a fixed random sample as large as dev, "
        "or on the full training set", choices=("sample", "full"))
    seed: int = _option(1337, "Training", "the seed of everything random", check=NOT_NEGATIVE)

    use_gpu: bool = _option(False, "Device", "short for --device cuda; without a GPU it warns and uses the CPU")
    device: str | None = _option(None, "Device", "cpu, cuda, cuda:1 or mps (default: cpu)")
    dtype: str = _option("auto", "Device", "precision of the matrix products; auto is bfloat16 where the device is "
        "fast at it", choices=("auto", "float32", "bfloat16"))

    output_dir: str | None = _option(None, "Output", "the run folder (default: runs/<option>-<epochs>-<lr>, with -2, "
        "-3 behind it when it exists)", metavar="DIR")
    overwrite: bool = _option(False, "Output", "replace the run that is in --output_dir")
    dev_out: str | None = _option(None, "Output", "predictions for dev, `label ||| sentence` a line, in the file's "
        "order (default: in the run folder)", metavar="FILE")
    test_out: str | None = _option(None, "Output", "the same for test", metavar="FILE")

    prefix: str = _option(GENERATE_PREFIX, "Generation and prompting", "generate: the text to continue",
        metavar="TEXT")
    max_new_tokens: int = _option(75, "Generation and prompting", "generate: how many tokens", check=AT_LEAST_ONE)
    generated_sentence_low_temp_out: str = _option("generated-sentence-temp-0.txt", "Generation and prompting",
        "generate: the file for the greedy text", metavar="FILE")
    generated_sentence_high_temp_out: str = _option("generated-sentence-temp-1.txt", "Generation and prompting",
        "generate: the file for the text at temperature 1.0", metavar="FILE")
    question: str = _option(QUESTION, "Generation and prompting", "prompt: what follows the sentence; {labels} "
        "stands for the labels' names", metavar="TEXT")

    given: frozenset[str] = field(default=frozenset(), metadata={})  # the options that were typed


def options() -> list:
    """The fields of `RunConfig` that are options of the command line."""
    return [f for f in fields(RunConfig) if f.metadata]


# --------------------------------------------------------------------------- the parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """One line, without the usage of every option in front of it. Exit code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


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
        group = groups.setdefault(meta["group"], None) or parser.add_argument_group(meta["group"])
        groups[meta["group"]] = group
        text = meta["help"].replace("%", "%%")
        if f.type is bool or f.type == "bool":
            group.add_argument(f"--{f.name}", action="store_true", help=text)
            continue
        if f.default is not None and "text to continue" not in text and "{labels}" not in text:
            text += f" (default: {f.default})"
        keywords: dict[str, Any] = {"type": _value_type(str(f.type)), "help": text}
        if "choices" in meta:
            keywords["choices"] = meta["choices"]
        else:
            keywords["metavar"] = meta.get("metavar", keywords["type"].__name__.upper())
        group.add_argument(f"--{f.name}", **keywords)
    return parser


def _underscores(argument: str) -> str:
    """`--label-names=x` to `--label_names=x`; values are left alone."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return "--" + name.replace("-", "_") + equals + value


def parse_args(argv: list[str] | None = None) -> RunConfig:
    """The command line as a `RunConfig`. Bad values print one line to stderr and exit with code 2."""
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    known = [f.name for f in options()]
    namespace, unknown = parser.parse_known_args([_underscores(a) for a in argv])
    if unknown:
        name = unknown[0].partition("=")[0]
        near = difflib.get_close_matches(name.lstrip("-"), known, n=1)
        hint = f"did you mean --{near[0]}?" if near else "see --help"
        parser.error(f"unknown option {name}: {hint}")
    given = vars(namespace)
    for f in options():
        check = f.metadata.get("check")
        if check and f.name in given and not check.holds(given[f.name]):
            parser.error(f"--{f.name} {given[f.name]}: it must be {check.words}")
    return RunConfig(**given, given=frozenset(given))
