"""--format hf and peft: folders for Hugging Face's transformers, and for PEFT beside it.

A classifier that pools the last token with a linear head without a bias is a LlamaForSequenceClassification. Another
one is a LlamaModel, its head in head.safetensors, and a README.md that says how to pool.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from classifier import ClassifierConfig
from commands import export_tokenizer
from commands.exported import Exported
from commands.model_card import card, is_sequence_classifier
from config import InputError, LlamaConfig
from data import hub
from formats import export_hf, export_peft, peft, weights


def write(folder: Path, model: Exported) -> str:
    """Fill the folder for transformers; adapters are merged into the weights. Returns what loads it, in words."""
    settings, state = model.settings, export_hf.hf_weights(model.weights, model.config)
    if settings is None:
        write_around(folder, model, "LlamaForCausalLM")
        loader = "AutoModelForCausalLM"
    elif is_sequence_classifier(settings):
        state["score.weight"] = model.head["weight"]
        write_around(folder, model, "LlamaForSequenceClassification")
        loader = "AutoModelForSequenceClassification"
    else:
        save_file(plain_head(model.head, settings), folder / "head.safetensors")
        write_around(folder, model, "LlamaModel")
        loader = "AutoModel, with the head in head.safetensors: README.md says how"
    if settings:
        (folder / "README.md").write_text(card(settings), encoding="utf-8", newline="\n")
    save_file({name: tensor.detach().contiguous() for name, tensor in state.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})
    return f"transformers ({loader})"


def write_peft(folder: Path, model: Exported) -> str:
    """Fill the folder for PEFT. Returns what loads it, in words. Raises InputError for a run without adapters."""
    settings = model.settings
    if not settings or not settings.lora or not settings.base:
        raise InputError(f"--format peft: {model.path} has no adapters (it was not trained with --lora_r); take "
                         "--format hf")
    has_score = is_sequence_classifier(settings)
    write_around(folder, model, "LlamaForSequenceClassification" if has_score else "LlamaModel", peft.BESIDE)
    if not has_score:
        save_file(plain_head(model.head, settings), folder / "head.safetensors")
    tensors = export_peft.peft_tensors(model.adapters, model.head if has_score else None, model.config)
    save_file({name: tensor.detach() for name, tensor in tensors.items()}, folder / peft.TENSORS,
              metadata={"format": "pt"})
    base = Path(settings.base.path)
    of_run = weights.is_run(base)
    own = weights.read_weights(base).config
    name, revision = (None, None) if of_run else named_base(base, own, settings.llama)
    described = export_peft.peft_config(settings.lora, name, has_score) | {"revision": revision}
    (folder / peft.SETTINGS).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    fewer = "" if of_run or own.n_layers == settings.llama.n_layers else f" --n_layers {settings.llama.n_layers}"
    command = (f"python run_llama.py --option export {'--run' if of_run else '--pretrained_model_path'} {base}{fewer} "
               "--format hf --output_dir base")
    page = card(settings, f"{base} (sha256 {settings.base.sha256})", command)
    (folder / "README.md").write_text(page, encoding="utf-8", newline="\n")
    of_base = name or f"its base, which `{command}` writes"
    return f"PEFT (PeftModel.from_pretrained, on {of_base})"


def named_base(base: Path, own: LlamaConfig, trained: LlamaConfig) -> tuple[str | None, str | None]:
    """What PEFT may load as the base by itself, and its revision: a Hugging Face folder, or its name on the hub. `own`:
    the base's shape, `trained`: that of the run. (None, None) for a base of another format, and where PEFT would
    compute something else: the run has other layers or another attention."""
    if not base.is_dir() or (own.n_layers, own.attention) != (trained.n_layers, trained.attention):
        return None, None
    if fetched := hub.origin(base):
        name, _, revision = fetched.removeprefix(hub.PREFIX).partition("@")
        return name, revision
    return str(base), None


def write_around(folder: Path, model: Exported, architecture: str, name: str = "config.json") -> None:
    """The config of transformers, in a file of that name, and the tokenizer."""
    pad = export_tokenizer.write_hf(folder, model.tokenizer, model.longest)
    values: dict[str, Any] = {**export_hf.hf_config(model.config, architecture), "pad_token_id": pad}
    values |= {f"{name}_token_id": number if number >= 0 else None for name, number in (
        ("bos", model.tokenizer.bos_id), ("eos", model.tokenizer.eos_id))}
    if model.settings:
        names = model.settings.label_names
        values |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)},
                   "problem_type": "single_label_classification"}
        values |= {"base": asdict(model.settings.base)} if name == peft.BESIDE and model.settings.base else {}
    (folder / name).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def plain_head(head: dict[str, Tensor], settings: ClassifierConfig) -> dict[str, Tensor]:
    """`weight` (C, D), with `bias` (C,) where there is one; of an ordinal head `weight` (1, D) and `cuts` (C - 1,)."""
    if settings.loss == "ordinal":
        steps = torch.cat((head["first_cut"], F.softplus(head["gaps"])))
        return {"weight": head["weight"].contiguous(), "cuts": steps.cumsum(0)}
    return {name: tensor.detach().contiguous() for name, tensor in head.items()}
