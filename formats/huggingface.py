"""Weights in: a Hugging Face folder of a Llama, or of a model of another name with exactly a Llama's parts."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import InputError, LlamaConfig, RopeScaling
from formats.files import read_json
from formats.tensors import Reader, StoredTensor, Weights, checked_config, stored_in_safetensors

# The model types that compute what a Llama does, and what transformers assumes of each where its config.json is silent.
MODEL_TYPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8},
    "internlm3": {"rms_norm_eps": 1e-5},
    "iquestcoder": {"rms_norm_eps": 1e-5},
    "ernie4_5": {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "head_dim": 128,
                 "num_key_value_heads": 2},
    "helium": {"rms_norm_eps": 1e-8, "rope_theta": 100000.0, "head_dim": 128, "num_key_value_heads": 20},
}
_IN_PAIRS = ("ernie4_5", "helium")  # those that rotate adjacent pairs, as we do; the others rotate halves
_OTHERS = {  # what others have that a Llama has not
    "qwen2": "biases", "qwen3": "norms of queries and keys", "mixtral": "experts", "qwen2_moe": "experts",
    "qwen3_moe": "experts", "deepseek_v3": "experts", "phi3": "queries, keys and values in one matrix",
    "gemma": "another norm, another activation and scaled embeddings", "gemma2": "soft caps and other norms",
    "gemma3_text": "sliding windows, and other norms", "olmo": "another norm", "olmo2": "norms at other places",
    "granite": "factors on its embeddings and residuals", "smollm3": "layers without rotary positions",
    "cohere": "another norm and parallel blocks", "ministral": "sliding windows", "cwm": "sliding windows",
    "seed_oss": "biases", "stablelm": "another norm", "gpt_neox": "another norm, and biases",
    "gpt2": "another norm, and biases", "phi": "another norm, and biases",
}
# What a config.json may switch on beyond a Llama's parts.
_BEYOND = {
    "a bias": ("attention_bias", "mlp_bias", "qkv_bias", "bias", "use_bias", "attention_out_bias"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "a soft cap": ("attn_logit_softcapping", "final_logit_softcapping"),
    "norms of queries and keys": ("qk_norm", "use_qk_norm"),
    "quantisation": ("quantization_config",),
}
HF_NAMES = {  # of a layer's tensors, in the file and here
    "input_layernorm": "attention_norm", "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
}


def read_hf_folder(path: Path) -> Weights:
    """A Hugging Face folder: config.json and safetensors, in one file or in shards.

    Query and key rows that rotate halves are reordered to adjacent pairs. Raises InputError for another model, by the
    name of the part that a Llama has not; FileNotFoundError for a file that is not there.
    """
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise InputError(f"{path}: an adapter of PEFT's, and no model; say --adapter {path}, and with "
                         "--pretrained_model_path where its base lies")
    settings = read_json(path / "config.json")
    config = _read_config(path / "config.json", settings)
    shapes: dict[str, tuple[int, ...]] = {}
    readers: dict[str, Reader] = {}
    left: list[str] = []
    for file in _safetensors_files(path):
        for key, stored in stored_in_safetensors(file).items():
            name = _own_name(key)
            if name is None and _is_beyond(key):
                raise InputError(f"{file}: {key} is not part of the Llama that is supported here ({_part(key)})")
            if name is None and not key.endswith("rotary_emb.inv_freq"):
                left.append(key)
            if name is None or (name == "output.weight" and config.tie_embeddings):
                continue
            stored.check_floating(key)
            if name in shapes:
                raise InputError(f"{file}: {key} is in another file of the folder too, or has two names; fetch or copy "
                                 "the folder again")
            shapes[name], readers[name] = stored.shape, stored.read
            if name.endswith(("wq.weight", "wk.weight")) and settings["model_type"] not in _IN_PAIRS:
                readers[name] = partial(_read_halves, stored, config.head_dim)
    return Weights(path, config, shapes, readers, left=tuple(sorted(left)))


# --------------------------------------------------------------------------- config.json


def _read_config(file: Path, settings: dict[str, Any]) -> LlamaConfig:
    """The shape that a config.json describes. Raises InputError for what is not a Llama's."""
    kind = settings.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        why = f" has {_OTHERS[kind]}; it" if isinstance(kind, str) and kind in _OTHERS else ""
        raise InputError(f"{file}: the model type {kind!r}{why} is not supported here; read are models with exactly a "
                         f"Llama's parts: {', '.join(MODEL_TYPES)}")
    settings = {**MODEL_TYPES[kind], **settings}
    for part, keys in _BEYOND.items():
        for key in keys:
            if settings.get(key):
                raise InputError(f"{file}: {key} is {settings[key]!r}; a Llama with {part} is not supported here")
    if settings.get("hidden_act", "silu") not in ("silu", "swish"):
        raise InputError(f"{file}: the activation (hidden_act) is {settings['hidden_act']!r}; only silu is supported "
                         "here")
    window, context = settings.get("sliding_window"), settings.get("max_position_embeddings", 2048)
    if window is not None and not (type(window) is type(context) is int and window >= context):
        raise InputError(f"{file}: sliding_window is {window!r}; a Llama whose tokens do not see all before them is "
                         "not supported here")
    said: dict[str, Any] = {key: settings[key] for key in ("rope_parameters", "rope_scaling") if settings.get(key)}
    for key, value in said.items():
        if not isinstance(value, dict):
            raise InputError(f"{file}: {key} is {value!r}, expected an object")
    scalings = [_rope_scaling(file, value) for value in said.values()]
    if scalings[1:] not in ([], scalings[:1]):
        raise InputError(f"{file}: rope_parameters and rope_scaling say different things: {said}")
    rope: dict[str, Any] = next(iter(said.values()), {})
    if rope.get("partial_rotary_factor", settings.get("partial_rotary_factor")) not in (None, 1):
        raise InputError(f"{file}: partial_rotary_factor is not 1; only whole heads are supported")
    try:
        return checked_config(
            file, vocab_size=settings["vocab_size"], dim=settings["hidden_size"],
            n_layers=settings["num_hidden_layers"],
            n_heads=settings["num_attention_heads"], n_kv_heads=settings.get("num_key_value_heads"),
            hidden_dim=settings["intermediate_size"], max_seq_len=context,
            layer_norm_eps=settings.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta", settings.get("rope_theta", 10000.0)),
            tie_embeddings=bool(settings.get("tie_word_embeddings", False)), head_dim=settings.get("head_dim"),
            rope_scaling=next(iter(scalings), None), attention=attention_of(settings),
        )
    except KeyError as error:
        raise InputError(f"{file}: {error} is missing") from None


def attention_of(settings: dict[str, Any]) -> str:
    """What a token sees of the others, as transformers' config.json says it."""
    return "bidirectional" if settings.get("is_causal") is False else "causal"


def _rope_scaling(file: Path, rope: dict[str, Any]) -> RopeScaling | None:
    """`rope_parameters`, or in older files `rope_scaling`, which may say `type` for `rope_type`."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    numbers: dict[str, Any] = {"factor": rope.get("factor")}
    if kind == "default":
        return None
    if kind == "llama3":
        numbers |= {"low_freq_factor": rope.get("low_freq_factor"), "high_freq_factor": rope.get("high_freq_factor"),
                    "original_max_seq_len": rope.get("original_max_position_embeddings")}
    elif kind != "linear":
        raise InputError(f"{file}: the rope scaling {kind!r} is not supported here; linear and llama3 are")
    try:
        return RopeScaling(kind, **numbers)
    except ValueError as error:
        raise InputError(f"{file}: {error}") from None


# --------------------------------------------------------------------------- tensors


def _own_name(key: str) -> str | None:
    """Our name of a tensor; None for one that is not a Llama's. A model without a head has no `model.` in front."""
    if key == "lm_head.weight":
        return "output.weight"
    key = key.removeprefix("model.")
    match = re.fullmatch(r"layers\.(\d{1,9})\.(.+)\.weight", key)
    if match and match[2] in HF_NAMES:
        return f"layers.{int(match[1])}.{HF_NAMES[match[2]]}.weight"
    return {"embed_tokens.weight": "tok_embeddings.weight", "norm.weight": "norm.weight"}.get(key)


def _is_beyond(key: str) -> bool:
    """Does a tensor that we do not know belong to the Llama? A classifier's head and old files' tables do not."""
    return key.startswith(("model.", "layers.", "norm.", "lm_head.")) and not key.endswith("rotary_emb.inv_freq")


def _part(key: str) -> str:
    """In words, what a tensor is that a Llama has not."""
    for part, words in (("lora_", "an adapter"), (".bias", "a bias"), ("expert", "an expert"),
                        ("q_norm", "a norm of queries"), ("k_norm", "a norm of keys"), ("norm", "another norm")):
        if part in key:
            return words
    return "an unknown part"


def _read_halves(stored: StoredTensor, head_dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return to_pairs(stored.read(dtype), head_dim)


def to_pairs(rows: Tensor, head_dim: int) -> Tensor:
    """Rows (out, ...) of a query or key in the order (0, h/2, 1, h/2 + 1, ...) inside each head: halves become
    pairs."""
    heads = rows.view(-1, 2, head_dim // 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)


def _safetensors_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
            raise InputError(f"{index}: weight_map is not a list of files")
        names = sorted(set(shards.values()))
        for name in names:
            if Path(name).name != name or "\\" in name or name == "..":
                raise InputError(f"{index}: it names the file {name!r}, which is outside the folder")
            if not (path / name).is_file():
                raise FileNotFoundError(f"{path / name}: there is no such file; {index.name} names it as one of "
                                        f"{len(names)} shards: fetch or copy the whole folder again")
    elif not (path / names[0]).is_file():
        raise FileNotFoundError(f"{path / names[0]}: there is no such file; the folder needs it, or the shards that "
                                "model.safetensors.index.json names")
    return [path / name for name in names]
