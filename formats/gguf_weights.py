"""Weights in: a GGUF of the llama architecture, quantised or not."""

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from config import InputError, RopeScaling
from formats.gguf import GGUFTensor, read_gguf
from formats.tensors import (
    FLOATING,
    PIECE,
    Reader,
    StoredTensor,
    Weights,
    check_unchanged,
    checked_config,
    damaged,
    stamp_of,
)

GGUF_NAMES = {  # of a layer's tensors, in the file and here
    "attn_norm": "attention_norm", "attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv",
    "attn_output": "attention.wo", "ffn_norm": "ffn_norm", "ffn_gate": "feed_forward.w1", "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
}


def read_gguf_weights(path: Path) -> Weights:
    """A GGUF of the llama architecture. Its query and key rows are in adjacent pairs already."""
    metadata, tensors = read_gguf(path)
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise InputError(f"{path}: a GGUF of the architecture {architecture!r}; only llama is read here")

    def value(key: str, default: Any = None) -> Any:
        found = metadata.get("llama." + key, default)
        if not isinstance(found, int | float) or isinstance(found, bool):
            raise InputError(f"{path}: the GGUF's llama.{key} is {found!r}, expected a number")
        return found

    if "token_embd.weight" not in tensors:
        raise InputError(f"{path}: not a Llama: token_embd.weight is missing")
    names = {"token_embd.weight": "tok_embeddings.weight", "output_norm.weight": "norm.weight",
             "output.weight": "output.weight"}
    for name in tensors:
        match = re.fullmatch(r"blk\.(\d{1,9})\.(\w+)\.weight", name)
        if match and match[2] in GGUF_NAMES:
            names[name] = f"layers.{int(match[1])}.{GGUF_NAMES[match[2]]}.weight"
        elif name.startswith("blk.") and not name.endswith("rope_freqs.weight"):
            raise InputError(f"{path}: {name} is not part of the Llama that is supported here (a bias, or an expert?)")
    for key in ("expert_count", "attention.sliding_window"):
        if value(key, 0):
            raise InputError(f"{path}: llama.{key} is {value(key)}; only a Llama without experts and without a sliding "
                             "window is supported here")
    found = {names[name]: tensor for name, tensor in tensors.items() if name in names}
    config = checked_config(
        path, vocab_size=tensors["token_embd.weight"].shape[0], dim=value("embedding_length"),
        n_layers=value("block_count"),
        n_heads=value("attention.head_count"),
        n_kv_heads=value("attention.head_count_kv", value("attention.head_count")),
        hidden_dim=value("feed_forward_length"), max_seq_len=value("context_length"),
        layer_norm_eps=value("attention.layer_norm_rms_epsilon"), rope_theta=value("rope.freq_base", 10000.0),
        tie_embeddings="output.weight" not in tensors,
        head_dim=value("attention.key_length") if "llama.attention.key_length" in metadata else None,
        attention="bidirectional" if metadata.get("llama.attention.causal") is False else "causal",
    )
    for key, of in (("rope.dimension_count", "it rotates {} of {} dimensions"),
                    ("attention.value_length", "its values have {} dimensions and its keys {}")):
        if value(key, config.head_dim) != config.head_dim:
            raise InputError(f"{path}: {of.format(value(key), config.head_dim)}; only whole heads are supported")
    config.rope_scaling = _rope_scaling(path, metadata, tensors, config.head_dim, config.rope_theta)
    return Weights(path, config, {k: t.shape for k, t in found.items()},
                   {k: _reader(path, t) for k, t in found.items()})


# --------------------------------------------------------------------------- rotary positions


def _rope_scaling(path: Path, metadata: dict[str, Any], tensors: dict[str, GGUFTensor], head_dim: int,
                  theta: float) -> RopeScaling | None:
    """The scaling of rotary positions; None where there is none. Raises InputError for one that is not supported."""
    kind = metadata.get("llama.rope.scaling.type", "linear")
    factor = metadata.get("llama.rope.scaling.factor", metadata.get("llama.rope.scale_linear", 1.0))
    if kind not in ("none", "linear"):
        raise InputError(f"{path}: the rope scaling {kind!r}, which is not supported here; linear and llama3 are")
    try:
        scaling = RopeScaling("linear", factor) if kind == "linear" and factor not in (0, 1) else None
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None
    divisors = next((t for name, t in tensors.items() if name.endswith("rope_freqs.weight")), None)
    if divisors is None:
        return scaling
    if divisors.shape != (head_dim // 2,) or scaling:
        raise InputError(f"{path}: rope_freqs.weight has the shape {divisors.shape}, expected {(head_dim // 2,)}, and "
                         "no linear rope scaling beside it")
    context = metadata.get("llama.rope.scaling.original_context_length")
    return _llama3(path, _reader(path, divisors)(torch.float32).double().tolist(), head_dim, theta, context)


def _llama3(path: Path, divisors: list[float], head_dim: int, theta: float, context: Any) -> RopeScaling:
    """The llama3 scaling that divides the frequencies by `divisors`, which is what llama.cpp keeps of one.

    Its numbers are those of all published models, 1 and 4, and `context`, or 8192, or what one of the divisors tells:
    a frequency that turns t times within the context is divided by 1 / (s + (1 - s) / factor), with s = (t - 1) / 3.
    Raises InputError where these are not the divisors.
    """
    factor, low, high = max(divisors), 1.0, 4.0
    frequencies = [theta ** (-2 * j / head_dim) for j in range(head_dim // 2)]
    contexts = [context] if context is not None else [8192]
    for frequency, divisor in zip(frequencies, divisors, strict=True):
        if 1 < divisor < factor:
            share = (1 / divisor - 1 / factor) / (1 - 1 / factor)
            contexts.append(round(2 * math.pi * (low + share * (high - low)) / frequency))
    for length in contexts:
        try:
            scaling = RopeScaling("llama3", factor, low, high, length)
        except ValueError:
            continue
        if np.allclose(divisors, llama3_divisors(head_dim, theta, scaling), rtol=1e-3, atol=0):
            return scaling
    raise InputError(f"{path}: rope_freqs.weight is not that of llama3 (low_freq_factor 1, high_freq_factor 4); no "
                     "other scaling of single frequencies is supported here")


def llama3_divisors(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """What llama.cpp keeps of the scaling llama3: of each pair of a head what its frequency is divided by, (head_dim /
    2,). One that turns t times within the first context is divided by 1 / (s + (1 - s) / factor), where s goes from 0
    at t = low_freq_factor to 1 at high_freq_factor."""
    low, high, context = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_seq_len
    assert low and high and context
    turns = context * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)
    share = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / (share + (1 - share) / scaling.factor)


# --------------------------------------------------------------------------- tensors


def _reader(path: Path, tensor: GGUFTensor) -> Reader:
    kind = GGMLQuantizationType(tensor.kind).name
    if kind in FLOATING:
        return StoredTensor(path, tensor.shape, kind, tensor.start, stamp_of(path.stat())).read
    return partial(_dequantise, path, tensor, stamp_of(path.stat()))


def _dequantise(path: Path, tensor: GGUFTensor, stamp: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """A quantised tensor in `dtype`, a piece after the other, so that it is never in memory twice. Raises InputError
    for a file that has changed since its header was read."""
    check_unchanged(path, path.stat(), stamp)
    kind = GGMLQuantizationType(tensor.kind)
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    values = torch.empty(tensor.shape, dtype=dtype)
    flat, n_blocks, step = values.view(-1), tensor.nbytes // block_bytes, max(1024, PIECE // per_block)
    for at in range(0, n_blocks, step):
        blocks = min(step, n_blocks - at)
        raw = np.fromfile(path, dtype=np.uint8, count=blocks * block_bytes, offset=tensor.start + at * block_bytes)
        if len(raw) != blocks * block_bytes:
            raise damaged(path, "it has become shorter while it was read")
        # The package works 16 rows at a time: long rows of whole blocks are several times as fast as the tensor's own.
        raw = raw.reshape(-1, math.gcd(blocks, 1024) * block_bytes)
        try:
            piece = dequantize(raw, kind)
        except NotImplementedError:
            raise InputError(f"{path}: the quantisation {kind.name} cannot be read; use a Q4_0 to Q8_0, K-quant, F16 "
                             "or F32 file") from None
        flat[at * per_block : (at + blocks) * per_block] = torch.from_numpy(piece.reshape(-1))
    return values
