"""PEFT's adapters for a Llama: a folder with adapter_config.json and adapter_model.safetensors.

What PEFT computes otherwise than lora.py is refused by name.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from config import LORA_TARGETS, Base, InputError, LlamaConfig, LoraConfig, counted
from formats.adapters import Adapter
from formats.files import read_json
from formats.huggingface import HF_NAMES, attention_of, to_pairs
from formats.weights import open_safetensors

SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# What --option export writes beside them: what their base cannot know. A config.json would make transformers look for a
# whole model there.
BESIDE = "model_config.json"
PROJECTIONS = {target: theirs.rpartition(".")[2] for target, ours in LORA_TARGETS.items()
               for theirs, name in HF_NAMES.items() if name == ours}  # q_proj, ...: what PEFT calls the targets
_TARGETS = {theirs: ours for ours, theirs in PROJECTIONS.items()}
_PARTS = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_magnitude_vector": "magnitude"}
HEADS = ("score", "classifier")
# Settings that change nothing of what a finished adapter computes, beside those that `read_peft` reads. Any other one
# that is switched on is refused.
_HARMLESS = {"peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision",
             "inference_mode", "target_modules", "exclude_modules", "layers_pattern", "init_lora_weights",
             "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_core", "megatron_config",
             "runtime_config", "qalora_group_size", "ensure_weight_tying", "r", "lora_alpha", "lora_dropout",
             "use_rslora", "use_dora", "modules_to_save", "bias"}
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # of init_lora_weights


def is_peft(path: Path) -> bool:
    """Is this the folder of an adapter of PEFT's?"""
    return (path / SETTINGS).is_file()


def named_base(path: Path) -> str | None:
    """What the adapter says of its base: a path, or a name on the hub."""
    if base := own_base(path):
        return base.path
    found = read_json(path / SETTINGS).get("base_model_name_or_path")
    return found if isinstance(found, str) else None


def own_base(path: Path) -> Base | None:
    """The base, with its sha256, of an adapter that --option export has written."""
    found = read_json(path / BESIDE).get("base") if (path / BESIDE).is_file() else None
    try:
        return Base(**found) if found else None
    except (TypeError, ValueError) as error:
        raise InputError(f"{path / BESIDE}: the base is {found!r:.80} ({error})") from None


def read_peft(path: Path, llama: LlamaConfig, n_layers: int | None = None) -> Adapter:
    """The adapter of a folder for a Llama of this shape, or for its first `n_layers`.

    Rows of a query's and a key's B and magnitude are in halves there; they are reordered to adjacent pairs. Raises
    InputError for what is not computed here, by name.
    """
    settings, file = read_json(path / SETTINGS), path / TENSORS
    _check(settings, path / SETTINGS)
    beside = read_json(path / BESIDE) if (path / BESIDE).is_file() else {}
    said = beside.get("num_hidden_layers")
    n_layers = n_layers or (said if isinstance(said, int) else llama.n_layers)
    handle = open_safetensors(file)
    tensors: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    places: set[tuple[int, str]] = set()
    for key in handle.keys():
        inside = re.fullmatch(r"base_model\.model\.(?:model\.)?layers\.(\d{1,4})\.(?:self_attn|mlp)\.(\w+)\."
                              r"(lora_A|lora_B|lora_magnitude_vector)(?:\.weight)?", key)
        of_head = re.fullmatch(rf"base_model\.model\.(?:{'|'.join(HEADS)})\.(weight|bias)", key)
        if inside and inside[2] in _TARGETS:
            layer, target, part = int(inside[1]), _TARGETS[inside[2]], _PARTS[inside[3]]
            value = handle.get_tensor(key).float().contiguous()
            if target in ("q", "k") and part != "lora_a":
                if len(value) % llama.head_dim:
                    raise InputError(f"{file}: {key}: {len(value)} rows are not whole heads of {llama.head_dim}; is it "
                                     "for another base?")
                value = to_pairs(value, llama.head_dim)
            tensors[f"layers.{layer}.{LORA_TARGETS[target]}.{part}"] = value
            places.add((layer, target))
        elif of_head:
            head[of_head[1]] = handle.get_tensor(key).float()
        else:
            raise InputError(f"{file}: {key} is not part of an adapter that is computed here (those of "
                             f"{', '.join(PROJECTIONS.values())}, and a head called {' or '.join(HEADS)})")
    _check_head(head, llama, file)
    targets = {target for _, target in places}
    if not places or places != {(layer, target) for layer in range(n_layers) for target in targets}:
        n = len({layer for layer, _ in places})
        raise InputError(f"{file}: it has adapters in {counted(n, 'layer')}, and not the same in each of the "
                         f"{n_layers} of the model; is it for another base? (adapters in some layers only are "
                         "not computed here)")
    try:
        config = LoraConfig(settings["r"], settings["lora_alpha"], settings.get("lora_dropout") or 0.0,
                            tuple(targets), bool(settings.get("use_rslora")), bool(settings.get("use_dora")))
    except (KeyError, ValueError) as error:
        raise InputError(f"{path / SETTINGS}: {error}") from None
    return Adapter(path, config, tensors, head, n_layers, own_base(path), attention=attention_of(beside))


def _check(settings: dict[str, Any], path: Path) -> None:
    """Raises InputError for a setting with which PEFT computes something else than lora.py."""
    if settings.get("peft_type") != "LORA":
        raise InputError(f"{path}: the peft_type is {settings.get('peft_type')!r}; only LORA is computed here")
    if settings.get("bias", "none") != "none" or settings.get("lora_bias"):
        raise InputError(f"{path}: it has trained biases (bias, lora_bias); a Llama has none here")
    saved = settings.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise InputError(f"{path}: modules_to_save is {saved!r:.60}, expected a list of names")
    if other := sorted({*saved} - {*HEADS}):
        raise InputError(f"{path}: modules_to_save names {', '.join(other)}; only a head ({' or '.join(HEADS)}) can be "
                         "trained beside an adapter here")
    how = str(settings.get("init_lora_weights"))
    if how.startswith(_CHANGE_THE_BASE):
        raise InputError(f"{path}: init_lora_weights is {how}, which changes the base too; let PEFT convert the "
                         "adapter to a plain one (save_pretrained with path_initial_model_for_weight_conversion)")
    for name, value in settings.items():
        if value and name not in _HARMLESS:
            raise InputError(f"{path}: {name} is {value!r:.60}; this is not computed here")


def _check_head(head: dict[str, Tensor], llama: LlamaConfig, file: Path) -> None:
    """Raises InputError for a head that is no matrix (classes, D), with a bias or without one."""
    shapes = {name: tuple(tensor.shape) for name, tensor in head.items()}
    weight = shapes.get("weight", ())
    if head and not (len(weight) == 2 and weight[0] >= 2 and shapes.get("bias", weight[:1]) == weight[:1]):
        raise InputError(f"{file}: its head is not a matrix of two classes or more, with or without a bias: {shapes}")
    if head and weight[1] != llama.dim:
        raise InputError(f"{file}: its head is for hidden states of {weight[1]} numbers, and the model's have "
                         f"{llama.dim}; is the adapter for another base?")
