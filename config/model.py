"""The shape of a Llama, and of the adapters on it."""

import math
from dataclasses import dataclass
from typing import Any

ROPE_KINDS = {  # of a rotary scaling, each with the numbers that it has
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"),
}


@dataclass(frozen=True)
class RopeScaling:
    """How the rotary frequencies of a model were stretched for a longer context than it was first trained on.

    `kind` "linear" divides all frequencies by `factor` (Chen et al. 2023, arXiv 2306.15595). "llama3" (Llama 3.1)
    keeps those that turn `high_freq_factor` times or more within `original_max_seq_len` positions, divides those that
    turn `low_freq_factor` times or less by `factor`, and takes something between for the others: see
    `llama.rotary_frequencies`. Raises ValueError for another kind, or numbers that no model can have.
    """

    kind: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_seq_len: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ValueError(f"rope scaling {self.kind!r}; it can be {' or '.join(ROPE_KINDS)}")
        for name in ROPE_KINDS["llama3"]:
            value = getattr(self, name)
            if name not in ROPE_KINDS[self.kind]:
                if value is not None:
                    raise ValueError(f"rope scaling {self.kind} has no {name}")
            elif type(value) not in (int, float) or not 0 < value <= 2**28:
                raise ValueError(f"{name} of the rope scaling {self.kind} is {value!r}; it must be a number above 0")
            elif name != "original_max_seq_len":
                object.__setattr__(self, name, float(value))
        if self.kind == "llama3":
            assert self.low_freq_factor and self.high_freq_factor
            if not isinstance(self.original_max_seq_len, int):
                raise ValueError(f"original_max_seq_len is {self.original_max_seq_len!r}; it must be a whole number")
            if self.low_freq_factor >= self.high_freq_factor:
                raise ValueError(f"low_freq_factor {self.low_freq_factor} of the rope scaling is not below "
                                 f"high_freq_factor {self.high_freq_factor}")


@dataclass
class LlamaConfig:
    """The shape of a Llama (Touvron et al. 2023, arXiv 2307.09288).

    `n_kv_heads` below `n_heads` is grouped-query attention; None: as many as `n_heads`. `hidden_dim` None: two
    thirds of 4 * dim, rounded up to `multiple_of`. `attention` is "causal" or "bidirectional". `head_dim` None: dim /
    n_heads, as in most models. `rope_scaling` may be given as the JSON object of a `RopeScaling`.
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
    head_dim: int = None  # type: ignore[assignment]
    rope_scaling: RopeScaling | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "n_layers", "n_heads", "multiple_of", "max_seq_len"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be an integer, 1 or more")
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        if self.hidden_dim is None:
            self.hidden_dim = self.multiple_of * math.ceil(int(2 * (4 * self.dim) / 3) / self.multiple_of)
        if self.head_dim is None:
            if self.dim % self.n_heads or (self.dim // self.n_heads) % 2:
                raise ValueError(f"dim {self.dim} does not divide into {self.n_heads} heads of an even size")
            self.head_dim = self.dim // self.n_heads
        elif type(self.head_dim) is not int or self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim!r}; it must be an even number, 2 or more")
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
        self.rope_scaling = _rope_scaling(self.rope_scaling)


def _rope_scaling(value: Any) -> RopeScaling | None:
    """A rope scaling, or none, from its JSON object. Raises ValueError for what is neither."""
    if value is None or isinstance(value, RopeScaling):
        return value
    try:
        return RopeScaling(**value)
    except TypeError:
        raise ValueError(f"rope_scaling is {value!r}, which is not what it should be") from None


LORA_TARGETS = {  # of each layer: the matrix's name in --lora_targets, and here
    "q": "attention.wq", "k": "attention.wk", "v": "attention.wv", "o": "attention.wo",
    "gate": "feed_forward.w1", "up": "feed_forward.w3", "down": "feed_forward.w2",
}


@dataclass(frozen=True)
class Base:
    """The pretrained weights that an adapter was trained on: a file or a folder, and `formats.files.sha256` of it."""

    path: str
    sha256: str

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not isinstance(self.sha256, str):
            raise ValueError(f"the base is {self.path!r} with the sha256 {self.sha256!r}; both must be texts")


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (`lora.py`). `r`: their rank; `alpha`: with it, the scale of what they add; `dropout`: on their
    input; `targets`: the names in LORA_TARGETS of the matrices that get one; `rs`: the scale is alpha / sqrt(r) instead
    of alpha / r; `dora`: each output's magnitude is learned apart from its direction."""

    r: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = tuple(LORA_TARGETS)
    rs: bool = False
    dora: bool = False

    def __post_init__(self) -> None:
        if type(self.r) is not int or self.r < 1:
            raise ValueError(f"r is {self.r!r}; the rank must be a whole number, 1 or more")
        if type(self.alpha) not in (int, float) or not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha!r}; it must be a number above 0")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout!r}; it must be at least 0 and below 1")
        if type(self.rs) is not bool or type(self.dora) is not bool:
            raise ValueError(f"rs is {self.rs!r} and dora {self.dora!r}; both are true or false")
        if not isinstance(self.targets, list | tuple) or not self.targets or not {*self.targets} <= {*LORA_TARGETS}:
            raise ValueError(f"targets is {self.targets!r}; it can be {', '.join(LORA_TARGETS)}")
        # In one order, however they were written; JSON has lists.
        object.__setattr__(self, "targets", tuple(name for name in LORA_TARGETS if name in self.targets))
        object.__setattr__(self, "alpha", float(self.alpha))
        object.__setattr__(self, "dropout", float(self.dropout))

    @property
    def scale(self) -> float:
        """alpha / r (Hu et al. 2021, section 4.1), or alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732, eq. 7)."""
        return self.alpha / (math.sqrt(self.r) if self.rs else self.r)
