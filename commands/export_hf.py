"""--format hf: a folder for Hugging Face's transformers.

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
from formats import export_hf

# How hidden states (B, T, D) become `pooled` (B, D), given the `mask` (B, T) of the real tokens.
POOL = {
    "last": "pooled = hidden[range(len(hidden)), mask.sum(1) - 1]",
    "first": "pooled = hidden[:, 0]",
    "mean": "pooled = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)",
    "max": 'pooled = hidden.masked_fill(mask[:, :, None] == 0, float("-inf")).amax(1)',
}
# How they become `probabilities` (B, C).
HEAD = {
    "linear": 'probabilities = (pooled @ head["weight"].T).softmax(1)',
    "bias": 'probabilities = (pooled @ head["weight"].T + head["bias"]).softmax(1)',
    "ordinal": 'at_most = torch.sigmoid(head["cuts"] - pooled @ head["weight"].T)  # P(class <= k), (B, C - 1)\n'
               "at_most = torch.nn.functional.pad(at_most, (1, 0))\n"
               "probabilities = torch.diff(at_most, append=torch.ones(len(pooled), 1))",
}
BEGIN = """# A sentence classifier on a Llama

Classes: {classes}. Attention: {attention}. Pooling: {pooling}. Head: {head}.
"""
SEQUENCE_CLASSIFIER = """
```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

path, texts = ".", ["a charming film", "a dull one"]
tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForSequenceClassification.from_pretrained(path)
inputs = tokenizer([text.strip() for text in texts], padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    probabilities = model(**inputs).logits.softmax(1)
print([model.config.id2label[i] for i in probabilities.argmax(1).tolist()])
```
"""
LLAMA_AND_HEAD = """
`AutoModelForSequenceClassification` does not know {others}, and would compute something else.
So the head is a file of its own, and these lines pool and apply it:

```python
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

path, texts = ".", ["a charming film", "a dull one"]
tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path)
head = load_file(f"{{path}}/head.safetensors")
inputs = tokenizer([text.strip() for text in texts], padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"]
{pool}
{head}
print([model.config.id2label[i] for i in probabilities.argmax(1).tolist()])
```
"""
END = """
In training texts were stripped of the spaces around them. A text without any token has no class.
"""


def write(folder: Path, model: Exported) -> str:
    """Fill the folder. Returns what loads it, in words."""
    pad = export_tokenizer.write_hf(folder, model.tokenizer, model.longest)
    settings, state = model.settings, export_hf.hf_weights(model.weights, model.config)
    if settings is None:
        kind = "LlamaForCausalLM"
    elif is_sequence_classifier(settings):
        kind = "LlamaForSequenceClassification"
        state["score.weight"] = model.head["weight"]
    else:
        kind = "LlamaModel"
        save_file(plain_head(model.head, settings), folder / "head.safetensors")
    save_file({name: tensor.detach().contiguous() for name, tensor in state.items()}, folder / "model.safetensors",
              metadata={"format": "pt"})
    values: dict[str, Any] = {**export_hf.hf_config(model.config, kind), "pad_token_id": pad}
    values |= {f"{name}_token_id": number if number >= 0 else None for name, number in (
        ("bos", model.tokenizer.bos_id), ("eos", model.tokenizer.eos_id))}
    if settings:
        values |= {"id2label": dict(enumerate(settings.label_names)), "problem_type": "single_label_classification",
                   "label2id": {name: i for i, name in enumerate(settings.label_names)}}
        (folder / "README.md").write_text(card(settings, kind), encoding="utf-8", newline="\n")
    (folder / "config.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return {"LlamaForCausalLM": "AutoModelForCausalLM", "LlamaModel": "AutoModel, with the head in head.safetensors "
            "(README.md says how)"}.get(kind, "AutoModelForSequenceClassification")


def is_sequence_classifier(settings: ClassifierConfig) -> bool:
    """Does transformers' LlamaForSequenceClassification compute the same? It pools the last token, and its head is a
    matrix."""
    return settings.pooling == "last" and settings.loss == "ce" and not settings.head_bias


def plain_head(head: dict[str, Tensor], settings: ClassifierConfig) -> dict[str, Tensor]:
    """`weight` (C, D), with `bias` (C,) where there is one; of an ordinal head `weight` (1, D) and `cuts` (C - 1,)."""
    if settings.loss == "ordinal":
        steps = torch.cat((head["first_cut"], F.softplus(head["gaps"])))
        return {"weight": head["weight"].contiguous(), "cuts": steps.cumsum(0)}
    return {name: tensor.detach().contiguous() for name, tensor in head.items()}


def card(settings: ClassifierConfig, kind: str) -> str:
    """README.md: what this is, and some lines that use it."""
    begin = BEGIN.format(classes=", ".join(settings.label_names), attention=settings.llama.attention,
                         pooling=settings.pooling, head=what_head(settings))
    if kind != "LlamaModel":
        return begin + SEQUENCE_CLASSIFIER + END
    others = [f"{settings.pooling} pooling"] if settings.pooling != "last" else []
    if settings.loss == "ordinal" or settings.head_bias:
        others.append("an ordinal head" if settings.loss == "ordinal" else "a head with a bias")
    head = HEAD["ordinal" if settings.loss == "ordinal" else "bias" if settings.head_bias else "linear"]
    return begin + LLAMA_AND_HEAD.format(others=" and ".join(others), pool=POOL[settings.pooling], head=head) + END


def what_head(settings: ClassifierConfig) -> str:
    """The head in words."""
    if settings.loss == "ordinal":
        return "ordinal: one score, and rising cuts between the classes"
    return f"linear, {'with' if settings.head_bias else 'without'} a bias"
