"""Weights out, as a GGUF that llama.cpp reads, through the gguf package's writer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType
from gguf.quants import quantize
from torch import Tensor

from config import InputError, LlamaConfig
from formats.gguf_weights import GGUF_NAMES, llama3_divisors

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
        divisors = llama3_divisors(config.head_dim, config.rope_theta, config.rope_scaling)
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
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
