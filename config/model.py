"""The shape of a Llama."""

import math
from dataclasses import dataclass


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
