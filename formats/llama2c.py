"""Weights in: what llama2.c writes (github.com/karpathy/llama2.c): its `.pt`, and its `.bin` of version 0 and 1."""

import os
import pickle
import re
import struct
from dataclasses import fields
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import InputError, LlamaConfig
from formats.memory import is_out_of_memory
from formats.tensors import FLOATING, Reader, StoredTensor, Weights, checked_config, damaged, stamp_of

# --------------------------------------------------------------------------- .pt


def read_pt(path: Path) -> Weights:
    """A llama2.c checkpoint: a dict with `model_args` and `model`.

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
        raise damaged(path, str(error).splitlines()[0] if str(error) else type(error).__name__) from None
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
    args["tie_embeddings"] = output is None or _is_same(output, state["tok_embeddings.weight"])
    args["dropout"], args["attention"] = 0.0, "causal"
    config = checked_config(path, **{f.name: args[f.name] for f in fields(LlamaConfig) if f.name in args})
    if config.tie_embeddings:
        state.pop("output.weight", None)
    mapped = _mapped(path)
    return Weights(path, config, {k: tuple(v.shape) for k, v in state.items()},
                   {k: _reader(path, v, mapped) for k, v in state.items()})


def _is_same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (a.data_ptr() == b.data_ptr() or torch.equal(a[:1], b[:1]) and torch.equal(a, b))


def _reader(path: Path, tensor: Tensor, mapped: list[tuple[int, int, int]]) -> Reader:
    """A tensor that torch has mapped into memory is read from the file: what is touched of the mapping would be
    a second copy of the weights. Where that cannot be, as in old files without a zip's layout, it is copied."""
    at = next((offset + tensor.data_ptr() - start for start, end, offset in mapped if start <= tensor.data_ptr() < end),
              None)
    kind = next((name for name, dtype in FLOATING.items() if dtype == tensor.dtype), None)
    if at is None or kind is None or not tensor.is_contiguous():
        return partial(_copy, tensor)
    return StoredTensor(path, tuple(tensor.shape), kind, at, stamp_of(path.stat())).read


def _mapped(path: Path) -> list[tuple[int, int, int]]:
    """Where in memory parts of a file are mapped: the first address, the one behind the last, and the place in the
    file. Empty on systems that do not tell."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    own, found = path.stat(), []
    for line in lines:
        addresses, _, offset, device, inode = line.split()[:5]
        major, _, minor = device.partition(":")
        if int(inode) == own.st_ino and os.makedev(int(major, 16), int(minor, 16)) == own.st_dev:
            start, _, end = addresses.partition("-")
            found.append((int(start, 16), int(end, 16), int(offset, 16)))
    return found


def _copy(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return tensor.to(dtype, copy=True)


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


# --------------------------------------------------------------------------- .bin

_MAGIC = 0x616B3432  # "ak42", with which files of version 1 and later begin
_HEADER = 256  # bytes before the weights of version 1
_LAYER = {"attention_norm": "attention_norm", "wq": "attention.wq", "wk": "attention.wk", "wv": "attention.wv",
          "wo": "attention.wo", "ffn_norm": "ffn_norm", "w1": "feed_forward.w1", "w2": "feed_forward.w2",
          "w3": "feed_forward.w3"}
_ORDER = {  # of the tensors in a file; one of a layer stands for that of each layer, one after the other
    0: ("tok_embeddings", "attention_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3", "norm", "freqs_cos",
        "freqs_sin", "output"),
    1: ("attention_norm", "ffn_norm", "norm", "tok_embeddings", "wq", "wk", "wv", "wo", "w1", "w2", "w3", "output"),
}


def is_bin(path: Path) -> bool:
    """Does a file begin as llama2.c's .bin does? One of version 0 has no mark of its own: it is a file called .bin
    whose first number can be a width, which it cannot in a pickle or a zip file."""
    with open(path, "rb") as file:
        start = file.read(4)
    if len(start) < 4:
        return False
    (first,) = struct.unpack("<i", start)
    return first == _MAGIC or (path.suffix == ".bin" and 0 < first < 2**20)


def read_bin(path: Path) -> Weights:
    """llama2.c's .bin in float32 (legacy_export and version1_export of its export.py). Such files do not say theta and
    eps; llama2.c takes 10000 and 1e-5. Raises InputError for a header that is not what the file's size says."""
    size, stamp = path.stat().st_size, stamp_of(path.stat())
    with open(path, "rb") as file:
        head = file.read(_HEADER)
    version, at, start = 0, 0, 28
    if struct.unpack_from("<i", head)[0] == _MAGIC:
        if len(head) < _HEADER:
            raise damaged(path, f"it ends after {size} bytes")
        (version,), at, start = struct.unpack_from("<i", head, 4), 8, _HEADER
        if version != 1:
            raise InputError(f"{path}: a llama2.c file of version {version}; versions 0 and 1 (float32) are read here")
    if len(head) < 28:
        raise damaged(path, f"it ends after {size} bytes")
    dim, hidden, n_layers, n_heads, n_kv_heads, vocab_size, context = struct.unpack_from("<7i", head, at)
    is_tied = vocab_size > 0 if version == 0 else head[36] != 0
    config = checked_config(path, dim=dim, hidden_dim=hidden, n_layers=n_layers, n_heads=n_heads,
                            n_kv_heads=n_kv_heads, vocab_size=abs(vocab_size) if version == 0 else vocab_size,
                            max_seq_len=context, tie_embeddings=is_tied)
    kv_dim, table = n_kv_heads * config.head_dim, (context, config.head_dim // 2)
    shape = {"tok_embeddings": (config.vocab_size, dim), "output": (config.vocab_size, dim), "norm": (dim,),
             "attention_norm": (dim,), "ffn_norm": (dim,), "wq": (dim, dim), "wk": (kv_dim, dim), "wv": (kv_dim, dim),
             "wo": (dim, dim), "w1": (hidden, dim), "w2": (dim, hidden), "w3": (hidden, dim),
             "freqs_cos": table, "freqs_sin": table}
    order = [part for part in _ORDER[version] if part != "output" or not is_tied]
    want = start + 4 * sum(prod(shape[part]) * (n_layers if part in _LAYER else 1) for part in order)
    if want != size:
        raise damaged(path, f"the model in its header takes {want} bytes, the file has {size}")
    stored: dict[str, StoredTensor] = {}
    for part in order:
        names = [f"layers.{i}.{_LAYER[part]}.weight" for i in range(n_layers)] if part in _LAYER else [f"{part}.weight"]
        for name in names:
            stored[name] = StoredTensor(path, shape[part], "F32", start, stamp)
            start += stored[name].nbytes
    stored = {name: tensor for name, tensor in stored.items() if not name.startswith("freqs_")}
    return Weights(path, config, {name: tensor.shape for name, tensor in stored.items()},
                   {name: tensor.read for name, tensor in stored.items()})
