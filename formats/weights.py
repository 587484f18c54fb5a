"""Weights in, the door: llama2.c's files, GGUF, Hugging Face folders, and what a finished run has left.

Every reader yields `Weights`: a config, and for each parameter of the Llama a shape and a function that reads it.
Shapes are compared with the model's before anything is allocated, so a file whose header lies costs nothing.
Nothing read from disk is ever executed: tensors come from safetensors, GGUF, llama2.c's .bin or
torch.load(weights_only=True).
"""

import re
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import Base, InputError, LlamaConfig, LoraConfig, counted
from formats import adapters
from formats.files import read_json
from formats.gguf_weights import read_gguf_weights
from formats.huggingface import read_hf_folder
from formats.llama2c import is_bin, read_bin, read_pt
from formats.tensors import (
    Reader,
    TrainedHead,
    Weights,
    checked_config,
    open_safetensors,
    stored_in_safetensors,
)

__all__ = ["FORMATS", "TrainedHead", "Weights", "check_n_layers", "check_torch", "is_run", "open_safetensors",
           "read_run", "read_weights"]
OLDEST_TORCH = (2, 10)


def check_torch() -> None:
    """Raises InputError for a torch whose weights_only loading is known to be unsafe (CVE-2026-24747)."""
    version = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if version < OLDEST_TORCH:
        raise InputError(f"torch {torch.__version__} is too old: before 2.10 even weights_only loading can be made to "
                         "corrupt memory; run `pip install -r requirements.txt`")


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
    readers: dict[str, dict[str, Reader]] = {"llama": {}, "classifier_head": {}}
    for key, stored in stored_in_safetensors(file).items():
        part, _, name = key.partition(".")
        if part not in readers:
            raise InputError(f"{file}: {key} is not part of a saved classifier")
        stored.check_floating(key)
        readers[part][name] = stored.read
        if part == "llama":
            shapes[name] = stored.shape
    run = Weights(path, checked_config(path / "config.json", **llama), shapes, readers["llama"],
                  TrainedHead(settings, readers["classifier_head"]))
    return _on_its_base(run, settings) if settings.get("lora") else run


def _on_its_base(run: Weights, settings: dict[str, Any]) -> Weights:
    """The Llama of a run with adapters: the weights of its base, the adapters merged into them as they are read."""
    try:
        lora, base = LoraConfig(**settings["lora"]), Base(**settings["base"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{run.path / 'config.json'}: not a saved adapter ({error!r})") from None
    below = read_weights(adapters.find_base(base, run.path, advice=adapters.PUT_IT_BACK))

    def merged(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        magnitude = f"{name}.magnitude"
        try:
            return adapters.merged(name, below.readers[f"{name}.weight"](), run.readers[f"{name}.lora_a"](),
                                   run.readers[f"{name}.lora_b"](), lora.scale,
                                   run.readers[magnitude]() if magnitude in run.readers else None).to(dtype)
        except (RuntimeError, KeyError) as error:
            raise InputError(f"{run.path}: the adapter of {name} does not fit its base ({error})") from None

    kept = {name: shape for name, shape in below.shapes.items()
            if not (layer := re.match(r"layers\.(\d{1,9})\.", name)) or int(layer[1]) < run.config.n_layers}
    adapted = {name.rpartition(".")[0] for name in run.shapes}
    readers = {name: partial(merged, part) if (part := name.removesuffix(".weight")) in adapted else below.readers[name]
               for name in kept}
    return replace(run, shapes=kept, readers=readers)


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
    (is_bin, read_bin),
    (Path.is_file, read_pt),
)


def read_weights(path: str | Path) -> Weights:
    """The config and the lazy tensors of a file or folder of any format. Raises FileNotFoundError or InputError."""
    check_torch()
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    for recognises, read in FORMATS:
        if recognises(path):
            return read(path)
    raise InputError(f"{path}: this is not a regular file or folder")


def check_n_layers(weights: Weights, n_layers: int | None) -> None:
    """Raises InputError for more layers than the file has, and for a file that has others than it says."""
    config = weights.config
    held = {int(m[1]) for name in weights.shapes if (m := re.match(r"layers\.(\d{1,9})\.", name))}
    if config.n_layers != len(held):
        raise InputError(f"{weights.path}: it says {counted(config.n_layers, 'layer')} and holds {len(held)}")
    if n_layers is not None and not 1 <= n_layers <= config.n_layers:
        raise InputError(f"--n_layers {n_layers}: {weights.path} has {counted(config.n_layers, 'layer')}")
