"""Weights out, as Hugging Face's libraries have them: names, the order of rows, and config.json."""

import re
from typing import Any

from torch import Tensor

from config import LlamaConfig
from formats.huggingface import HF_NAMES

_NAMES = {**{ours: theirs for theirs, ours in HF_NAMES.items()}, "tok_embeddings": "embed_tokens"}


def hf_name(name: str) -> str:
    """The module `layers.0.attention.wq` as `model.layers.0.self_attn.q_proj`; of a parameter without its last word."""
    if name == "output":
        return "lm_head"
    match = re.fullmatch(r"(layers\.\d+\.)(.+)", name)
    before, module = match.groups() if match else ("", name)
    return f"model.{before}{_NAMES.get(module, module)}"


def to_halves(tensor: Tensor, name: str, head_dim: int) -> Tensor:
    """The rows of a query's or key's matrix (or what has one number or one row for each of them), in the order
    (0, 2, 4, ..., 1, 3, 5, ...) inside each head: adjacent pairs become halves, as Hugging Face rotates them."""
    if not name.endswith(("attention.wq", "attention.wk")):
        return tensor
    heads = tensor.view(-1, head_dim // 2, 2, *tensor.shape[1:])
    return heads.transpose(1, 2).reshape(tensor.shape)


def hf_weights(weights: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """The parameters of a Llama under transformers' names, contiguous, q and k rows in halves."""
    found = {}
    for name, tensor in weights.items():
        module = name.removesuffix(".weight")
        found[f"{hf_name(module)}.weight"] = to_halves(tensor, module, config.head_dim).contiguous()
    return found


def hf_config(config: LlamaConfig, architecture: str) -> dict[str, Any]:
    """The config.json of a Llama. `architecture`: the class of transformers that the weights are of."""
    values: dict[str, Any] = {
        "architectures": [architecture], "model_type": "llama", "dtype": "float32",
        "vocab_size": config.vocab_size, "hidden_size": config.dim, "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads, "head_dim": config.head_dim,
        "max_position_embeddings": config.max_seq_len, "rms_norm_eps": config.layer_norm_eps,
        "rope_theta": config.rope_theta,  # and rope_scaling are read by transformers 4; rope_parameters by 5
        "rope_parameters": hf_rope(config),
        "tie_word_embeddings": config.tie_embeddings, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "attention_dropout": 0.0,
    }
    if config.rope_scaling:
        values["rope_scaling"] = values["rope_parameters"]
    if config.attention == "bidirectional":
        values["is_causal"] = False
    return values


def hf_rope(config: LlamaConfig) -> dict[str, Any]:
    """`rope_parameters`: how fast the rotary positions turn."""
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if scaling := config.rope_scaling:
        found |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            found |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor,
                      "original_max_position_embeddings": scaling.original_max_seq_len}
    return found
