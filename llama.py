"""A Llama from scratch: RMSNorm, rotary positions, grouped-query attention, SwiGLU, a key-value cache, `generate`.

Shapes: B sentences, T tokens, D = config.dim, H heads of size head_dim, K key-value heads, V words.
Rotary positions turn adjacent pairs (Llama 2's own layout); `formats/weights.py` reorders the weights of files that
rotate halves instead.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from config import InputError, LlamaConfig, RopeScaling
from formats.weights import Weights, check_n_layers, read_weights

# --------------------------------------------------------------------------- the operations


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4).

    Computed in float32 whatever the input's precision.
    """
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).type_as(x) * weight


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    """theta^(-2j / head_dim), (head_dim / 2,) float32, in radians a position (Su et al. 2021, arXiv 2104.09864, section
    3.2.2); slower where the model has a `scaling`.

    "llama3" (Grattafiori et al. 2024, arXiv 2407.21783, section 3.2; the numbers are in Llama 3.1's config): f turns
    t = f * original_max_seq_len / 2 pi times within the original context, and becomes f * (s + (1 - s) / factor), where
    s = (t - low) / (high - low), held between 0 and 1.
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    assert scaling.original_max_seq_len and scaling.low_freq_factor and scaling.high_freq_factor
    turns = frequencies * (scaling.original_max_seq_len / (2 * math.pi))
    share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    share = share.clamp(0, 1)
    return frequencies * (share + (1 - share) / scaling.factor)


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # a table first made by `generate` is kept, and training needs it later
def rotary_table(head_dim: int, max_seq_len: int, theta: float, device: torch.device,
                 scaling: RopeScaling | None = None) -> Tensor:
    """exp(i * position * frequency): (max_seq_len, head_dim / 2) complex64; see `rotary_frequencies`."""
    frequencies = rotary_frequencies(head_dim, theta, scaling, device)
    angles = torch.outer(torch.arange(max_seq_len, device=device).float(), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn adjacent pairs of x (B, T, heads, head_dim) by the table's angles: (T, head_dim / 2), or (B, T, ...) where
    each row has positions of its own. Keeps x's type."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table[..., None, :]).flatten(-2).type_as(x)


def apply_rotary_emb(
    query: Tensor, key: Tensor, head_dim: int, max_seq_len: int, theta: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of a query (B, T, H, head_dim) and a key (B, T, K, head_dim), positions from 0.

    Su et al. 2021 (arXiv 2104.09864), eq. 34, on adjacent pairs. Raises ValueError when T is above max_seq_len.
    """
    if query.shape[1] > max_seq_len:
        raise ValueError(f"{query.shape[1]} tokens do not fit into a context of {max_seq_len}")
    table = rotary_table(head_dim, max_seq_len, theta, query.device)[: query.shape[1]]
    return rotate(query, table), rotate(key, table)


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(head_dim)) v (Vaswani et al. 2017, arXiv 1706.03762, eq. 1): a query (B, H, S, head_dim), a
    key and a value (B, K, T, head_dim) to (B, H, S, head_dim). `mask`: True where a query may look.

    Where a gradient will be wanted on a CPU, short sentences are computed in float32, and returned in their own type:
    PyTorch's backward pass for bfloat16 takes several times as long there (docs/measurements.md).
    """
    kind = query.dtype
    is_slow = kind == torch.bfloat16 and query.device.type == "cpu" and key.shape[2] <= SHORT
    if not (is_slow and torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout,
                                              is_causal=is_causal, enable_gqa=True)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=mask,
                                              dropout_p=dropout, is_causal=is_causal, enable_gqa=True).to(kind)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, of two tensors of one shape (Shazeer 2020, arXiv 2002.05202, eq. 5, without biases)."""
    return F.silu(gate) * up


def no_decoder(model: "Llama", caches: list["KVCache"]) -> None:
    """`generate` computes each new token layer by layer."""


@dataclass(frozen=True)
class Operations:
    """The functions that the modules below compute with, through their attribute `ops`.

    `fused.accelerate(model)` gives the modules of one model another object with the same functions. A `decoder` of a
    model in `generate` and its layers' caches is None, or has a method `step(x, position, angles)` that computes all
    layers for one new token.
    """

    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    rotate: Callable[[Tensor, Tensor], Tensor] = rotate
    swiglu: Callable[[Tensor, Tensor], Tensor] = swiglu
    linear: Callable[[Tensor, Tensor], Tensor] = F.linear
    decoder: Callable[["Llama", list["KVCache"]], Any] = no_decoder


PLAIN = Operations()
SHORT = 128  # tokens; see `attend`

# --------------------------------------------------------------------------- the modules


class RMSNorm(nn.Module):
    """Each vector scaled to a root mean square of 1, then by a learned weight: see `rms_norm`."""

    ops = PLAIN

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)


class Linear(nn.Linear):
    """A matrix product without a bias."""

    ops = PLAIN

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.linear(x, self.weight)


class KVCache:
    """One layer's keys and values of the tokens seen so far: two tensors (B, K, max_seq_len, head_dim)."""

    def __init__(self, batch: int, length: int, config: LlamaConfig, dtype: torch.dtype, device: torch.device):
        shape = (2, batch, config.n_kv_heads, length, config.head_dim)
        self.keys, self.values = torch.zeros(shape, dtype=dtype, device=device)

    def add(self, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, K, T, head_dim) from position `start` on; return all up to here."""
        end = start + keys.shape[2]
        self.keys[:, :, start:end], self.values[:, :, start:end] = keys, values
        return self.keys[:, :, :end], self.values[:, :, :end]


def take(x: Tensor, at: Tensor) -> Tensor:
    """Of each row of x (B, T, D) the position at (B,): (B, 1, D)."""
    return x[torch.arange(len(x), device=x.device), at][:, None]


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245) with rotary positions, no biases."""

    ops = PLAIN

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.wq = Linear(config.dim, q_dim)
        self.wk = Linear(config.dim, kv_dim)
        self.wv = Linear(config.dim, kv_dim)
        self.wo = Linear(q_dim, config.dim)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None = None, cache: KVCache | None = None,
                start: int = 0, at: Tensor | None = None) -> Tensor:
        """x (B, T, D) to (B, T, D), or with `at` (B,) to (B, 1, D), what comes out at that position of each row.

        `mask` (B, 1, 1, T), True at the tokens that may be seen, is needed with `at` and for the bidirectional kind
        only: with padding on the right, no real token of a causal model ever sees any."""
        batch, length, _ = x.shape
        heads = (batch, length, -1, self.config.head_dim)
        key = self.ops.rotate(self.wk(x).view(heads), table).transpose(1, 2)
        value = self.wv(x).view(heads).transpose(1, 2)
        if at is not None:
            x, table, length = take(x, at), table[at][:, None], 1
        query = self.ops.rotate(self.wq(x).view(batch, length, -1, self.config.head_dim), table).transpose(1, 2)
        if cache is not None:
            key, value = cache.add(start, key, value)
        causal = self.config.attention == "causal" and length > 1  # one token may look at all that came before it
        out = attend(query, key, value, mask, causal, self.config.dropout if self.training else 0.0)
        return self.resid_dropout(self.wo(out.transpose(1, 2).reshape(batch, length, -1)))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x) (Shazeer 2020, arXiv 2002.05202, eq. 6, without biases)."""

    ops = PLAIN

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.w1 = Linear(config.dim, config.hidden_dim)
        self.w2 = Linear(config.hidden_dim, config.dim)
        self.w3 = Linear(config.dim, config.hidden_dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.w2(self.ops.swiglu(self.w1(x), self.w3(x))))


class LlamaLayer(nn.Module):
    """Attention and feed-forward, each behind its norm and added to what came in."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.layer_norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.layer_norm_eps)

    def forward(self, x: Tensor, table: Tensor, mask: Tensor | None = None, cache: KVCache | None = None,
                start: int = 0, at: Tensor | None = None) -> Tensor:
        """As `Attention.forward`."""
        stream = x if at is None else take(x, at)
        x = stream + self.attention(self.attention_norm(x), table, mask, cache, start, at)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama(nn.Module):
    """The stack. `hidden` gives the last hidden states, `forward` the logits too, `generate` goes on writing.

    New weights are drawn as GPT-2's are: normal(0, 0.02), the two projections back into the residual stream
    scaled by 1 / sqrt(2 * n_layers) (Radford et al. 2019, section 2.3).
    """

    ops = PLAIN

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.grad_checkpoint = False  # keep no activations inside a layer, compute them again (Chen et al. 2016)
        self.n_frozen = 0  # so many of the first layers, and the embeddings below them, run without autograd
        # An empty weight: drawn below once, and not at all where only the shape is wanted (the device "meta").
        empty = torch.empty(config.vocab_size, config.dim)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim, _weight=empty)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(LlamaLayer(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.layer_norm_eps)
        self.output = Linear(config.dim, config.vocab_size)
        if config.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and not parameter.is_meta:
                into_stream = name.endswith(("wo.weight", "w2.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * config.n_layers) ** 0.5 if into_stream else 0.02)

    def hidden(self, tokens: Tensor, lengths: Tensor | None = None, caches: list[KVCache] | None = None,
               start: int = 0, at: Tensor | None = None, below: Tensor | None = None) -> Tensor:
        """tokens (B, T) int64, padded on the right, to hidden states (B, T, D) after the last norm.

        `lengths` (B,), the number of real tokens, matters to bidirectional attention only (None: all are real).
        With `caches`, the tokens stand at positions start, start + 1, ... (where start > 0, one token alone). With
        `at` (B,), only the states at these positions are wanted, (B, 1, D): the last layer computes keys and values
        for all tokens and the rest, nine tenths of its work, for those alone. `below`: what `first_part` gives for the
        same tokens, where it is known already. Raises InputError beyond max_seq_len.
        """
        if below is None:
            below = self.first_part(tokens, lengths, caches, start, at)
        layers = range(self.n_frozen, len(self.layers))
        x = self._through(layers, below, tokens.shape[1], lengths, caches, start, at)
        with torch.autocast(tokens.device.type, enabled=False):  # no product follows that wants fewer bits
            return self.norm(x)

    def first_part(self, tokens: Tensor, lengths: Tensor | None = None, caches: list[KVCache] | None = None,
                   start: int = 0, at: Tensor | None = None) -> Tensor:
        """As `hidden`, but what comes out of the embeddings and the first `n_frozen` layers: (B, T, D); with `at`,
        where these are all layers, (B, 1, D). Without autograd where there are such layers."""
        end = start + tokens.shape[1]
        if end > self.config.max_seq_len:
            raise InputError(f"{end} tokens do not fit into the model's context of {self.config.max_seq_len}; "
                             "cut them with --max_sentence_len")
        if start and tokens.shape[1] > 1:
            raise ValueError("behind the first window of a cache there is one token at a time")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.n_frozen):
            x = self.dropout(self.tok_embeddings(tokens))
            if torch.is_autocast_enabled(tokens.device.type):
                x = x.float()  # what the layers add up stays in float32 where frozen embeddings are in bfloat16
            return self._through(range(self.n_frozen), x, tokens.shape[1], lengths, caches, start, at)

    def _through(self, layers: range, x: Tensor, length: int, lengths: Tensor | None, caches: list[KVCache] | None,
                 start: int, at: Tensor | None) -> Tensor:
        """What these layers make of x (B, T, D), where T is `length`; see `hidden`."""
        end = start + length
        table = self.angles(end, x.device)
        mask = None
        if lengths is not None and self.config.attention == "bidirectional":
            mask = (torch.arange(end, device=x.device) < lengths[:, None])[:, None, None, :]
        for i in layers:
            layer, only = self.layers[i], at if i + 1 == len(self.layers) else None
            if only is not None and self.config.attention == "causal":
                mask = (torch.arange(end, device=x.device) <= start + only[:, None])[:, None, None, :]
            arguments = (x, table[start:end], mask, caches[i] if caches else None, start, only)
            if self.grad_checkpoint and self.training and torch.is_grad_enabled():
                x = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x = layer(*arguments)
        return x

    def angles(self, end: int, device: torch.device) -> Tensor:
        """The rotary table of `end` positions or more: of the next 1,024, and not of the whole context, which may be a
        million."""
        reach = min(self.config.max_seq_len, -(-end // 1024) * 1024)
        return rotary_table(self.config.head_dim, reach, self.config.rope_theta, device, self.config.rope_scaling)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """tokens (B, T) to logits (B, T, V) and hidden states (B, T, D)."""
        hidden = self.hidden(tokens, lengths)
        return self.output(hidden), hidden

    @torch.inference_mode()
    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0) -> Tensor:
        """Continue idx (B, T) int64, all of one length, to (B, T + max_new_tokens).

        temperature 0 takes the most likely token; above 0 samples from softmax(logits / temperature). Keys and
        values are cached; beyond the context only the last max_seq_len tokens are seen. Raises ValueError for a
        negative temperature, an empty idx, a bidirectional model, or logits that are not finite.
        """
        if temperature < 0 or idx.shape[1] == 0 or self.config.attention != "causal":
            raise ValueError("generate wants a temperature of 0 or more, at least one token, and causal attention")
        context = self.config.max_seq_len
        caches, decoder, seen = None, None, 0
        for _ in range(max_new_tokens):
            if caches is None or idx.shape[1] > context:
                # At the start, and at each step beyond the context, where every token's position has changed.
                window = idx[:, -context:]
                length = min(context, window.shape[1] + max_new_tokens)
                project = self.layers[0].get_submodule("attention.wk")
                precision = project(self.tok_embeddings(idx[:, :0])).dtype  # autocast's, if on
                caches = [KVCache(len(idx), length, self.config, precision, idx.device) for _ in self.layers]
                plain = {LlamaLayer, Attention, FeedForward, RMSNorm, Linear, nn.Dropout, nn.ModuleList}
                decodes = len(idx) == 1 and idx.shape[1] < context and (
                    {type(module) for module in self.layers.modules()} <= plain)  # no adapters
                decoder = self.ops.decoder(self, caches) if decodes else None
                seen = 0
            else:
                window = idx[:, seen:]
            if decoder and window.shape[1] == 1:
                x = decoder.step(self.tok_embeddings(window), seen, self.angles(seen + 1, idx.device)[seen])
                last = self.norm(x)[:, -1]
            else:
                last = self.hidden(window, caches=caches, start=seen)[:, -1]
            seen += window.shape[1]
            logits = self.output(last)
            if not torch.isfinite(logits).all():
                raise InputError("the model's output is not finite: the weights hold numbers that are not, or that are "
                                 "far too large; fetch or copy the file again")
            if temperature == 0:
                following = logits.argmax(-1, keepdim=True)
            else:
                following = torch.multinomial(F.softmax(logits.float() / temperature, -1), 1)
            idx = torch.cat((idx, following), dim=1)
        return idx


def load_pretrained(path: str | Path | Weights, n_layers: int | None = None, dropout: float = 0.0,
                    attention: str = "causal", has_output: bool = True, dtype: torch.dtype = torch.float32,
                    norm_dtype: torch.dtype | None = None) -> Llama:
    """A Llama in evaluation mode, with the weights of a file or folder of any format.

    `dtype`: of the weights in memory, where they are once, however the file holds them. What is trained is in float32.
    `norm_dtype`: of the norms, where they are to have another one.
    `n_layers`: the first K layers of the stack only (the others are not read). `has_output`: with the layer that gives
    the logits of words, which a classifier has no use for. Raises FileNotFoundError, or InputError for a file that is
    damaged, of another architecture, that holds other shapes than it says, or that lacks the output layer.
    """
    weights = path if isinstance(path, Weights) else read_weights(path)
    check_n_layers(weights, n_layers)
    config = replace(weights.config, n_layers=n_layers or weights.config.n_layers, dropout=dropout, attention=attention)
    with torch.device("meta"):
        model = Llama(config)
    if not has_output:
        model.output = nn.Identity()  # type: ignore[assignment]
    elif weights.head and not config.tie_embeddings:
        raise InputError(f"{weights.path}: a finished run of this model has no output layer, without which there are "
                         "no words; take the pretrained weights")
    for name, parameter in model.named_parameters():
        if weights.shapes.get(name) != tuple(parameter.shape):
            raise InputError(f"{weights.path}: {name} has the shape {weights.shapes.get(name)}, the model it describes "
                             f"wants {tuple(parameter.shape)}")
    dtypes = {name: norm_dtype or dtype if p.dim() == 1 else dtype for name, p in model.named_parameters()}
    names = [*dtypes]
    with ThreadPoolExecutor(min(4, torch.get_num_threads())) as pool:
        state = dict(zip(names, pool.map(lambda name: weights.readers[name](dtypes[name]).contiguous(), names),
                         strict=True))
    model.load_state_dict(state, assign=True, strict=False)
    if has_output and config.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    model.requires_grad_(True)
    return model.eval()
