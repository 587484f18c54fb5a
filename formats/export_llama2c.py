"""Weights out, as a llama2.c checkpoint (github.com/karpathy/llama2.c): a .pt that `export.py` and `sample.py` there
read."""

from pathlib import Path

import torch
from torch import Tensor

from config import InputError, LlamaConfig


def write_pt(path: Path, weights: dict[str, Tensor], config: LlamaConfig) -> None:
    """Write `model_args` and `model`, with exactly the names that llama2.c has. Raises InputError, naming it, for what
    it has no word for: its model rotates with theta 10000, is causal, and has one matrix for words in and out. Raises
    OSError where the file cannot be written."""
    fault = ""
    if config.rope_theta != 10000.0:
        fault = f"rotates with theta 10000, and this model with {config.rope_theta:g}"
    elif config.rope_scaling:
        fault = f"scales no rotary positions, and this one does ({config.rope_scaling.kind})"
    elif config.head_dim * config.n_heads != config.dim:
        fault = f"has heads of dim / n_heads, and this model of {config.head_dim}"
    elif config.attention != "causal":
        fault = f"has causal attention, and this model {config.attention}"
    elif not config.tie_embeddings:
        fault = "has one matrix for words in and out, and this model two"
    if fault:
        raise InputError(f"--format llama2c: llama2.c's model {fault}; it would compute something else without a word. "
                         "Take --format hf or gguf")
    arguments = {"dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads,
                 "n_kv_heads": config.n_kv_heads, "vocab_size": config.vocab_size, "hidden_dim": config.hidden_dim,
                 "multiple_of": config.multiple_of, "norm_eps": config.layer_norm_eps,
                 "max_seq_len": config.max_seq_len, "dropout": 0.0}
    state = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    state["output.weight"] = state["tok_embeddings.weight"]  # its own checkpoints hold both; stored once
    try:
        torch.save({"model_args": arguments, "model": state}, path)
    except RuntimeError as error:  # which is how torch says that a disk is full
        raise OSError(str(error).splitlines()[0]) from None
