"""Low-rank adapters out, in PEFT's format: adapter_config.json and adapter_model.safetensors."""

from typing import Any

from torch import Tensor

from config import LlamaConfig, LoraConfig
from formats.export_hf import hf_name, to_halves
from formats.peft import PROJECTIONS

_PARTS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


def peft_tensors(tensors: dict[str, Tensor], head: dict[str, Tensor] | None, config: LlamaConfig) -> dict[str, Tensor]:
    """Adapters by our names, `layers.0.attention.wq.lora_a`, and the head under PEFT's. Rows of a query's and a key's B
    and magnitude go back to halves. `head` None: it is kept elsewhere, and the adapters are those of an AutoModel, in
    whose names a word is missing."""
    found = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        rows = tensor if part == "lora_a" else to_halves(tensor, module, config.head_dim)
        place = hf_name(module) if head is not None else hf_name(module).removeprefix("model.")
        found[f"base_model.model.{place}.{_PARTS[part]}"] = rows.float().contiguous()
    for name, tensor in (head or {}).items():
        found[f"base_model.model.score.{name}"] = tensor.float().contiguous()
    return found


def peft_config(config: LoraConfig, base: str | None, has_score: bool) -> dict[str, Any]:
    """adapter_config.json. `base`: where PEFT finds the base; `has_score`: is the head in the adapter's file?"""
    alpha = int(config.alpha) if config.alpha.is_integer() else config.alpha
    return {"peft_type": "LORA", "task_type": "SEQ_CLS" if has_score else "FEATURE_EXTRACTION",
            "base_model_name_or_path": base, "r": config.r, "lora_alpha": alpha, "lora_dropout": config.dropout,
            "target_modules": [PROJECTIONS[target] for target in config.targets], "use_rslora": config.rs,
            "use_dora": config.dora, "bias": "none", "modules_to_save": ["score"] if has_score else None,
            "fan_in_fan_out": False, "inference_mode": True}
