"""--format hf and peft: folders for Hugging Face's transformers, and for PEFT beside it.

A classifier that pools the last token with a linear head without a bias is a LlamaForSequenceClassification. Another
one is a LlamaModel, its head in head.safetensors, and a README.md that says how to pool.
"""

import json
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
from config import InputError
from formats import export_hf, export_peft, files, peft


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
    write_around(folder, model, "LlamaForSequenceClassification" if has_score else "LlamaModel")
    if not has_score:
        save_file(plain_head(model.head, settings), folder / "head.safetensors")
    tensors = export_peft.peft_tensors(model.adapters, model.head if has_score else None, model.config)
    save_file({name: tensor.detach() for name, tensor in tensors.items()}, folder / peft.TENSORS,
              metadata={"format": "pt"})
    base = Path(settings.base.path)
    is_for_hf = (base / "config.json").is_file() and "model_type" in files.read_json(base / "config.json")
    described = export_peft.peft_config(settings.lora, str(base) if is_for_hf else None, has_score)
    (folder / peft.SETTINGS).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(settings, base.name), encoding="utf-8", newline="\n")
    of_base = str(base) if is_for_hf else (f"its base; --option export --pretrained_model_path {base} --format hf "
                                           "writes that one")
    return f"PEFT (PeftModel.from_pretrained, on {of_base})"


def write_around(folder: Path, model: Exported, architecture: str) -> None:
    """config.json and the tokenizer."""
    pad = export_tokenizer.write_hf(folder, model.tokenizer, model.longest)
    values: dict[str, Any] = {**export_hf.hf_config(model.config, architecture), "pad_token_id": pad}
    values |= {f"{name}_token_id": number if number >= 0 else None for name, number in (
        ("bos", model.tokenizer.bos_id), ("eos", model.tokenizer.eos_id))}
    if model.settings:
        names = model.settings.label_names
        values |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)},
                   "problem_type": "single_label_classification"}
    (folder / "config.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def plain_head(head: dict[str, Tensor], settings: ClassifierConfig) -> dict[str, Tensor]:
    """`weight` (C, D), with `bias` (C,) where there is one; of an ordinal head `weight` (1, D) and `cuts` (C - 1,)."""
    if settings.loss == "ordinal":
        steps = torch.cat((head["first_cut"], F.softplus(head["gaps"])))
        return {"weight": head["weight"].contiguous(), "cuts": steps.cumsum(0)}
    return {name: tensor.detach().contiguous() for name, tensor in head.items()}
