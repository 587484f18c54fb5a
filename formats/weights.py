"""Weights in: llama2.c `.pt`, GGUF, Hugging Face folders, and what a finished run has left.

Every reader yields `Weights`: a config, and for each parameter of the Llama a shape and a function that reads it.
Shapes are compared with the model's before anything is allocated, so a file whose header lies costs nothing.
Nothing read from disk is ever executed: tensors come from safetensors, GGUF or torch.load(weights_only=True).
"""

import math
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from safetensors import SafetensorError, safe_open
from torch import Tensor

from config import Base, InputError, LlamaConfig, LoraConfig, counted
from formats import adapters
from formats.files import read_json
from formats.gguf import GGUFTensor, read_gguf
from formats.memory import is_out_of_memory

OLDEST_TORCH = (2, 10)


def check_torch() -> None:
    """Raises InputError for a torch whose weights_only loading is known to be unsafe (CVE-2026-24747)."""
    version = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if version < OLDEST_TORCH:
        raise InputError(f"torch {torch.__version__} is too old: before 2.10 even weights_only loading can be made to "
                         "corrupt memory; run `pip install -r requirements.txt`")


@dataclass(frozen=True)
class TrainedHead:
    """The head of a finished run: `settings`, the JSON object of its best/config.json, not yet checked; `readers`, by
    the names of the head's own parameters."""

    settings: dict[str, Any]
    readers: dict[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class Weights:
    """A file's model: `shapes` and `readers` share their keys, the names of the Llama's parameters. `head`: of a
    finished run."""

    path: Path
    config: LlamaConfig
    shapes: dict[str, tuple[int, ...]]
    readers: dict[str, Callable[[], Tensor]]
    head: TrainedHead | None = None


# --------------------------------------------------------------------------- what the formats share


def _damaged(path: Path, error: object) -> InputError:
    return InputError(f"{path}: damaged or truncated ({error}); fetch or copy the file again")


def _config(path: Path, **values: Any) -> LlamaConfig:
    """A config of what a file says. Raises InputError for a number of another type, or one that no model can have."""
    for name in ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "max_seq_len"):
        value = values.get(name)
        if name in values and not (type(value) is int and 0 < value < 2**28 or (name, value) == ("n_kv_heads", None)):
            raise InputError(f"{path}: {name} is {value!r}, expected a whole number above 0")
    try:
        return LlamaConfig(**values)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


# --------------------------------------------------------------------------- llama2.c


def read_pt(path: Path) -> Weights:
    """A llama2.c checkpoint: a dict with `model_args` and `model` (github.com/karpathy/llama2.c).

    Both spellings of the attention's keys, an `_orig_mod.` prefix, and stored freqs_cos / freqs_sin are understood.
    A pickle that would run code is refused, naming what it wants to call.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        raise InputError(f"{path}: refused, {_what_it_calls(path, error)}; ask for the weights as safetensors, or for "
                         "a file with tensors and plain values only") from None
    except Exception as error:  # in a damaged file torch runs into anything: AssertionError, IndexError, ...
        if is_out_of_memory(error):
            raise
        raise _damaged(path, str(error).splitlines()[0] if str(error) else type(error).__name__) from None
    if not isinstance(saved, dict) or not {"model", "model_args"} <= saved.keys():
        raise InputError(f"{path}: not a llama2.c checkpoint; expected a dict with `model_args` and `model`, found "
                         f"{sorted(map(str, saved))[:5] if isinstance(saved, dict) else type(saved).__name__}")
    if not isinstance(saved["model"], dict) or not isinstance(saved["model_args"], dict):
        raise InputError(f"{path}: not a llama2.c checkpoint; `model` and `model_args` are not both dicts")
    state: dict[str, Tensor] = {}
    for key, value in saved["model"].items():
        if not isinstance(key, str) or not _is_plain(value):
            raise InputError(f"{path}: not a llama2.c checkpoint; {key!r} in `model` is not a plain tensor with a name")
        for old, new in (("_orig_mod.", ""), ("compute_query", "wq"), ("compute_key", "wk"), ("compute_value", "wv"),
                         ("compute_output", "wo")):
            key = key.replace(old, new)
        if key not in ("freqs_cos", "freqs_sin") and not key.endswith("rope.freqs"):
            state[key] = value
    wanted = {"tok_embeddings.weight", "layers.0.feed_forward.w1.weight"}
    if not wanted <= state.keys():
        raise InputError(f"{path}: not a Llama: {sorted(wanted - state.keys())} is missing")
    if any(state[name].dim() != 2 for name in wanted):
        raise InputError(f"{path}: not a Llama: {sorted(wanted)} are not both of two dimensions")
    args = dict(saved["model_args"])
    args["layer_norm_eps"] = args.pop("norm_eps", args.get("layer_norm_eps", 1e-5))
    args["vocab_size"], args["dim"] = state["tok_embeddings.weight"].shape  # the file's -1 means: as the tensor
    args["hidden_dim"] = state["layers.0.feed_forward.w1.weight"].shape[0]
    output = state.get("output.weight")
    args["tie_embeddings"] = output is None or torch.equal(output, state["tok_embeddings.weight"])
    args["dropout"], args["attention"] = 0.0, "causal"
    config = _config(path, **{f.name: args[f.name] for f in fields(LlamaConfig) if f.name in args})
    if config.tie_embeddings:
        state.pop("output.weight", None)
    return Weights(path, config, {k: tuple(v.shape) for k, v in state.items()},
                   {k: partial(v.to, torch.float32, copy=True) for k, v in state.items()})


def _is_plain(value: Any) -> bool:
    """A dense tensor of floats with a place of its own for each: not one value that a stride of 0 repeats endlessly."""
    return (isinstance(value, Tensor) and value.layout == torch.strided and value.is_cpu and value.is_floating_point()
            and value.numel() * value.element_size() <= value.untyped_storage().nbytes())


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _what_it_calls(path: Path, error: Exception) -> str:
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # torch lists them for zip files only; for others its error names the first
        unsafe = re.findall(r"GLOBAL (\S+)", str(error))
    if unsafe:
        return f"its pickle wants to call {', '.join(unsafe)}"
    reason = str(error).partition("\n\nCheck the documentation")[0].strip().splitlines()[-1:]  # behind torch's advice
    return f"not a plain pickle ({''.join(reason)[:100]})"


# --------------------------------------------------------------------------- GGUF

GGUF_NAMES = {  # of a layer's tensors, in the file and here
    "attn_norm": "attention_norm", "attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv",
    "attn_output": "attention.wo", "ffn_norm": "ffn_norm", "ffn_gate": "feed_forward.w1", "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
}


def read_gguf_weights(path: Path) -> Weights:
    """A GGUF of the llama architecture, quantised or not. Its query and key rows are in adjacent pairs already."""
    metadata, tensors = read_gguf(path)
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise InputError(f"{path}: a GGUF of the architecture {architecture!r}; only llama is read here")

    def value(key: str, default: Any = None) -> Any:
        found = metadata.get("llama." + key, default)
        if not isinstance(found, int | float) or isinstance(found, bool):
            raise InputError(f"{path}: the GGUF's llama.{key} is {found!r}, expected a number")
        return found

    if metadata.get("llama.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in tensors:
        raise InputError(f"{path}: its rotary positions are scaled, which is not supported here")
    if "token_embd.weight" not in tensors:
        raise InputError(f"{path}: not a Llama: token_embd.weight is missing")
    names = {"token_embd.weight": "tok_embeddings.weight", "output_norm.weight": "norm.weight",
             "output.weight": "output.weight"}
    for name in tensors:
        match = re.fullmatch(r"blk\.(\d{1,9})\.(\w+)\.weight", name)
        if match and match[2] in GGUF_NAMES:
            names[name] = f"layers.{int(match[1])}.{GGUF_NAMES[match[2]]}.weight"
        elif name.startswith("blk."):
            raise InputError(f"{path}: {name} is not part of the Llama that is supported here (a bias, or an expert?)")
    found = {names[name]: tensor for name, tensor in tensors.items() if name in names}
    config = _config(
        path, vocab_size=tensors["token_embd.weight"].shape[0], dim=value("embedding_length"),
        n_layers=value("block_count"),
        n_heads=value("attention.head_count"),
        n_kv_heads=value("attention.head_count_kv", value("attention.head_count")),
        hidden_dim=value("feed_forward_length"), max_seq_len=value("context_length"),
        layer_norm_eps=value("attention.layer_norm_rms_epsilon"), rope_theta=value("rope.freq_base", 10000.0),
        tie_embeddings="output.weight" not in tensors,
    )
    if value("rope.dimension_count", config.head_dim) != config.head_dim:
        raise InputError(f"{path}: it rotates {value('rope.dimension_count')} of {config.head_dim} dimensions; only "
                         "whole heads are supported")
    return Weights(path, config, {k: t.shape for k, t in found.items()},
                   {k: partial(_dequantise, path, t) for k, t in found.items()})


def _dequantise(path: Path, tensor: GGUFTensor) -> Tensor:
    raw = np.fromfile(path, dtype=np.uint8, count=tensor.nbytes, offset=tensor.start)
    kind = GGMLQuantizationType(tensor.kind)
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        raw = raw.view(np.float32 if kind == GGMLQuantizationType.F32 else np.float16)
    else:  # the package works 16 rows at a time: long rows of whole blocks are several times as fast as the tensor's
        block_bytes = GGML_QUANT_SIZES[kind][1]
        raw = raw.reshape(-1, math.gcd(tensor.nbytes // block_bytes, 1024) * block_bytes)
    try:
        values = dequantize(raw, kind)
    except NotImplementedError:
        raise InputError(f"{path}: the quantisation {kind.name} cannot be read; use a Q4_0 to Q8_0, K-quant, F16 or "
                         "F32 file") from None
    return torch.from_numpy(values.reshape(tensor.shape).astype(np.float32, copy=False))


# --------------------------------------------------------------------------- a Hugging Face folder

HF_NAMES = {  # of a layer's tensors, in the file and here
    "input_layernorm": "attention_norm", "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
}


def read_hf_folder(path: Path) -> Weights:
    """A Hugging Face folder of a llama: config.json and safetensors, in one file or in shards.

    Its query and key rows rotate halves; they are reordered to adjacent pairs.
    """
    settings = read_json(path / "config.json")
    if settings.get("model_type") != "llama":
        raise InputError(f"{path / 'config.json'}: the model type is {settings.get('model_type')!r}; only llama is "
                         "read here")
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{path / 'config.json'}: rope_parameters is {rope!r}, expected an object")
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise InputError(f"{path / 'config.json'}: its rotary positions are scaled ({rope}); that is not supported")
    if settings.get("hidden_act", "silu") != "silu" or settings.get("quantization_config"):
        raise InputError(f"{path / 'config.json'}: only a Llama with silu and without quantisation is supported here")
    for key in ("attention_bias", "mlp_bias"):
        if settings.get(key):
            raise InputError(f"{path / 'config.json'}: {key} is true; only a Llama without biases is supported here")
    try:
        config = _config(
            path / "config.json", vocab_size=settings["vocab_size"], dim=settings["hidden_size"],
            n_layers=settings["num_hidden_layers"],
            n_heads=settings["num_attention_heads"], n_kv_heads=settings.get("num_key_value_heads"),
            hidden_dim=settings["intermediate_size"], max_seq_len=settings.get("max_position_embeddings", 2048),
            layer_norm_eps=settings.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta", settings.get("rope_theta", 10000.0)),
            tie_embeddings=settings.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise InputError(f"{path / 'config.json'}: {error} is missing") from None
    if settings.get("head_dim") not in (None, config.head_dim):
        raise InputError(f"{path / 'config.json'}: head_dim {settings['head_dim']} is not hidden_size / heads "
                         f"({config.head_dim}), which is not supported here")
    shapes: dict[str, tuple[int, ...]] = {}
    readers: dict[str, Callable[[], Tensor]] = {}
    for file in _safetensors_files(path):
        handle = open_safetensors(file)
        for key in handle.keys():
            name, dtype = _from_hf_name(key), handle.get_slice(key).get_dtype()
            if name is None and key.startswith("model.layers.") and not key.endswith("rotary_emb.inv_freq"):
                raise InputError(f"{file}: {key} is not part of the Llama that is supported here (a bias, an adapter?)")
            if name is None or (name == "output.weight" and config.tie_embeddings):
                continue
            _check_floating(file, key, dtype)
            shapes[name] = tuple(handle.get_slice(key).get_shape())
            readers[name] = partial(_read_hf_tensor, handle, key, name, config.head_dim)
    return Weights(path, config, shapes, readers)


def _check_floating(file: Path, key: str, dtype: str) -> None:
    if dtype not in ("F64", "F32", "F16", "BF16"):
        raise InputError(f"{file}: {key} has the type {dtype}; only floating-point weights are read here")


def _from_hf_name(key: str) -> str | None:
    plain = {"model.embed_tokens.weight": "tok_embeddings.weight", "model.norm.weight": "norm.weight",
             "lm_head.weight": "output.weight"}
    match = re.fullmatch(r"model\.layers\.(\d{1,9})\.(.+)\.weight", key)
    if match and match[2] in HF_NAMES:
        return f"layers.{int(match[1])}.{HF_NAMES[match[2]]}.weight"
    return plain.get(key)


def _read_hf_tensor(handle: Any, key: str, name: str, head_dim: int) -> Tensor:
    """The tensor `key` of an open safetensors file as the parameter `name`: a float32 copy, not the file's memory."""
    return _to_pairs(_read_float32(handle, key), name, head_dim)


def _to_pairs(weight: Tensor, name: str, head_dim: int) -> Tensor:
    """Rows of a query or key in the order (0, h/2, 1, h/2 + 1, ...) inside each head: halves become pairs."""
    if not name.endswith(("wq.weight", "wk.weight")):
        return weight
    heads = weight.view(-1, 2, head_dim // 2, weight.shape[1])
    return heads.transpose(1, 2).reshape(weight.shape)


def _safetensors_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise InputError(f"{index}: weight_map is not a list of files")
        names = sorted(set(shards.values()))
    for name in names:
        if Path(name).name != name or not (path / name).is_file():
            raise FileNotFoundError(f"{path / Path(name).name}: there is no such file; the folder needs "
                                    "model.safetensors, or the shards that model.safetensors.index.json names")
    return [path / name for name in names]


def open_safetensors(path: Path) -> Any:
    """A safetensors file, opened without reading its tensors. Raises InputError for a header that cannot be."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        if is_out_of_memory(error):
            raise
        # The library checks every count and offset against the file's size.
        raise _damaged(path, error) from None


# --------------------------------------------------------------------------- a finished run


def is_run(path: Path) -> bool:
    """Is this the best/ of a run? Its config.json has the Llama's shape, and a Hugging Face one a `model_type`."""
    if not (path / "config.json").is_file():
        return False
    settings = read_json(path / "config.json")
    return "llama" in settings and "model_type" not in settings


def read_run(path: Path) -> Weights:
    """The best/ of a finished run: its Llama under `llama.`, in our own order, and its head under `classifier_head.`.

    A classifier has no output layer: of a Llama whose embeddings are tied it is there all the same, of others not.
    """
    settings, file = read_json(path / "config.json"), path / "model.safetensors"
    llama = settings["llama"]
    if not isinstance(llama, dict) or not llama.keys() <= {f.name for f in fields(LlamaConfig)}:
        raise InputError(f"{path / 'config.json'}: `llama` is not the shape of a Llama")
    shapes: dict[str, tuple[int, ...]] = {}
    readers: dict[str, dict[str, Callable[[], Tensor]]] = {"llama": {}, "classifier_head": {}}
    handle = open_safetensors(file)
    for key in handle.keys():
        part, _, name = key.partition(".")
        if part not in readers:
            raise InputError(f"{file}: {key} is not part of a saved classifier")
        _check_floating(file, key, handle.get_slice(key).get_dtype())
        readers[part][name] = partial(_read_float32, handle, key)
        if part == "llama":
            shapes[name] = tuple(handle.get_slice(key).get_shape())
    run = Weights(path, _config(path / "config.json", **llama), shapes, readers["llama"],
                  TrainedHead(settings, readers["classifier_head"]))
    return _on_its_base(run) if settings.get("lora") else run


def _on_its_base(run: Weights) -> Weights:
    """The Llama of a run with adapters: the weights of its base, the adapters merged into them as they are read."""
    assert run.head
    try:
        lora, base = LoraConfig(**run.head.settings["lora"]), Base(**run.head.settings["base"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{run.path / 'config.json'}: not a saved adapter ({error!r})") from None
    below = read_weights(adapters.find_base(base, run.path))

    def read(name: str) -> Tensor:
        magnitude = f"{name}.magnitude"
        try:
            return adapters.merged(name, below.readers[f"{name}.weight"](), run.readers[f"{name}.lora_a"](),
                                   run.readers[f"{name}.lora_b"](), lora.scale,
                                   run.readers[magnitude]() if magnitude in run.readers else None)
        except (RuntimeError, KeyError) as error:
            raise InputError(f"{run.path}: the adapter of {name} does not fit its base ({error})") from None

    kept = {name: shape for name, shape in below.shapes.items()
            if not (layer := re.match(r"layers\.(\d+)\.", name)) or int(layer[1]) < run.config.n_layers}
    adapted = {name.rpartition(".")[0] for name in run.shapes}
    readers = {name: partial(read, name.removesuffix(".weight")) if name.removesuffix(".weight") in adapted
               else below.readers[name] for name in kept}
    return replace(run, shapes=kept, readers=readers)


def _read_float32(handle: Any, key: str) -> Tensor:
    """A tensor of an open safetensors file: a float32 copy, not the file's memory."""
    return handle.get_tensor(key).to(torch.float32, copy=True)


# --------------------------------------------------------------------------- any format


def _is_gguf(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF" or path.suffix == ".gguf"


# How each format is recognised, and its reader. The first that recognises a path reads it, so the last one, which takes
# any file, stays last.
FORMATS: tuple[tuple[Callable[[Path], bool], Callable[[Path], Weights]], ...] = (
    (is_run, read_run),
    (Path.is_dir, read_hf_folder),
    (_is_gguf, read_gguf_weights),
    (Path.is_file, read_pt),
)


def read_weights(path: str | Path) -> Weights:
    """The config and the lazy tensors of a file or folder of any format. Raises FileNotFoundError or InputError."""
    check_torch()
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    return next(read for recognises, read in FORMATS if recognises(path))(path)


def check_n_layers(weights: Weights, n_layers: int | None) -> None:
    """Raises InputError for more layers than the file has, and for a file that has others than it says."""
    config = weights.config
    held = {int(m[1]) for name in weights.shapes if (m := re.match(r"layers\.(\d{1,9})\.", name))}
    if config.n_layers != len(held):
        raise InputError(f"{weights.path}: it says {counted(config.n_layers, 'layer')} and holds {len(held)}")
    if n_layers is not None and not 1 <= n_layers <= config.n_layers:
        raise InputError(f"--n_layers {n_layers}: {weights.path} has {counted(config.n_layers, 'layer')}")
