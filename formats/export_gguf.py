"""Weights out, as a GGUF that llama.cpp reads, through the gguf package's writer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType
from gguf.quants import quantize
from torch import Tensor

from config import InputError, LlamaConfig, RopeScaling
from formats.gguf_weights import GGUF_NAMES

FILE_TYPES = {"f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16, "bf16": LlamaFileType.MOSTLY_BF16,
              "q8_0": LlamaFileType.MOSTLY_Q8_0}
_NAMES = {**{ours: theirs for theirs, ours in GGUF_NAMES.items()}, "tok_embeddings": "token_embd",
          "norm": "output_norm"}
F16_MAX = 65504.0


def gguf_name(name: str) -> str:
    """The parameter `layers.0.attention.wq.weight` as `blk.0.attn_q.weight`."""
    module = name.removesuffix(".weight")
    if module.startswith("layers."):
        _, layer, inner = module.split(".", 2)
        return f"blk.{layer}.{_NAMES[inner]}.weight"
    return f"{_NAMES.get(module, module)}.weight"


def write_gguf(path: Path, weights: dict[str, Tensor], config: LlamaConfig, vocabulary: dict[str, Any], kind: str,
               name: str) -> None:
    """Write a Llama with its tokenizer. `vocabulary`: the metadata tokenizer.ggml.*; `kind`: of the matrices, a key of
    FILE_TYPES; `name`: general.name. Norms stay float32, as llama.cpp's own converter leaves them. Rows of queries and
    keys are in adjacent pairs there too.

    Raises InputError for a matrix that the kind cannot hold: rows that are no whole blocks, numbers beyond float16.
    """
    writer = GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.layer_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    if config.head_dim * config.n_heads != config.dim:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if config.rope_scaling and config.rope_scaling.kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)
    elif config.rope_scaling:
        assert config.rope_scaling.original_max_seq_len, "llama3 has one"
        writer.add_rope_scaling_orig_ctx_len(config.rope_scaling.original_max_seq_len)
        writer.add_tensor("rope_freqs.weight", llama3_divisors(config, config.rope_scaling))
    if config.attention == "bidirectional":
        writer.add_causal_attention(False)
    writer.add_file_type(FILE_TYPES[kind])
    adders: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
    for key, value in vocabulary.items():
        adders[type(value)](key, value)
    form = GGMLQuantizationType[kind.upper()]
    for our_name, tensor in weights.items():
        own = GGMLQuantizationType.F32 if tensor.dim() == 1 else form
        values = tensor.detach().numpy()
        check_fits(our_name, values, own)
        writer.add_tensor(gguf_name(our_name), quantize(values, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_fits(name: str, values: np.ndarray, form: GGMLQuantizationType) -> None:
    """Raises InputError where numbers would be lost."""
    if form == GGMLQuantizationType.Q8_0 and values.shape[-1] % 32:
        raise InputError(f"--gguf_type q8_0: a row of {name} has {values.shape[-1]} numbers, and there are 32 in a "
                         "block; take f16, bf16 or f32")
    largest = np.abs(values).max()
    if not np.isfinite(largest):
        raise InputError(f"{name} holds numbers that are not finite; nothing is exported")
    if form == GGMLQuantizationType.F16 and largest > F16_MAX:
        raise InputError(f"--gguf_type f16: {name} has numbers up to {largest:.3g}, and float16 ends at {F16_MAX:g}; "
                         "take bf16 or f32")



def llama3_divisors(config: LlamaConfig, scaling: RopeScaling) -> np.ndarray:
    """What llama.cpp keeps of the scaling llama3: of each pair of a head what its frequency is divided by, (head_dim /
    2,) float32. One that turns t times within the first context is divided by 1 / (s + (1 - s) / factor), where s goes
    from 0 at t = low_freq_factor to 1 at high_freq_factor."""
    low, high, context = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_seq_len
    assert low and high and context
    turns = context * config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim) / (2 * np.pi)
    share = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / (share + (1 - share) / scaling.factor)).astype(np.float32)
