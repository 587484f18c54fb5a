"""README.md of an exported classifier: what it is, and some lines of Python that use it."""

from classifier import ClassifierConfig

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
CARD = """# A sentence classifier on a Llama

Classes: {classes}. Attention: {attention}. Pooling: {pooling}. Head: {head}.
{notes}
```python
import torch
{imports}

path, texts = ".", ["a charming film", "a dull one"]
{load}
inputs = tokenizer([text.strip() for text in texts], padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
{forward}
print([model.config.id2label[i] for i in probabilities.argmax(1).tolist()])
```

In training texts were stripped of the spaces around them. A text without any token has no class.
"""
ADAPTERS = """
These are the adapters (PEFT's format): they need their base, {base}. Here it is in the folder `base`, as transformers
reads it, which this command writes (of the base's first layers, where the adapters have no more):

```sh
{command}
```

`model_config.json` beside the adapters has what the base cannot know: the labels, the padding token, the
attention, how many layers.
"""


def is_sequence_classifier(settings: ClassifierConfig) -> bool:
    """Does transformers' LlamaForSequenceClassification compute the same? It pools the last token, and its head is a
    matrix."""
    return settings.pooling == "last" and settings.loss == "ce" and not settings.head_bias


def card(settings: ClassifierConfig, base: str | None = None, command: str = "") -> str:
    """The page. `base`: of adapters, what they belong to, in words; `command`: which writes it for transformers."""
    is_whole = is_sequence_classifier(settings)
    auto = "AutoModelForSequenceClassification" if is_whole else "AutoModel"
    imports, notes = [f"from transformers import {auto}, AutoTokenizer"], []
    load = [f"tokenizer, model = AutoTokenizer.from_pretrained(path), {auto}.from_pretrained(path)"]
    if base is not None:
        notes.append(ADAPTERS.format(base=base, command=command))
        imports = ["from peft import PeftModel", f"from transformers import AutoConfig, {auto}, AutoTokenizer"]
        load = ["tokenizer = AutoTokenizer.from_pretrained(path)",
                'config = AutoConfig.from_pretrained(f"{path}/model_config.json")',
                f'model = {auto}.from_pretrained("base", config=config)',
                "model = PeftModel.from_pretrained(model, path)"]
    forward = ["    probabilities = model(**inputs).logits.softmax(1)"]
    if not is_whole:
        notes.append(f"\n`AutoModelForSequenceClassification` does not know {what_is_missing(settings)}, and would "
                     "compute something else.\nSo the head is a file of its own, and these lines pool and apply it:\n")
        imports.insert(0, "from safetensors.torch import load_file")
        load.append('head = load_file(f"{path}/head.safetensors")')
        head = "ordinal" if settings.loss == "ordinal" else "bias" if settings.head_bias else "linear"
        forward = ['    hidden, mask = model(**inputs).last_hidden_state, inputs["attention_mask"]',
                   POOL[settings.pooling], HEAD[head]]
    return CARD.format(classes=", ".join(settings.label_names), attention=settings.llama.attention,
                       pooling=settings.pooling, head=what_head(settings), notes="".join(notes),
                       imports="\n".join(sorted(imports)), load="\n".join(load), forward="\n".join(forward))


def what_head(settings: ClassifierConfig) -> str:
    """The head in words."""
    if settings.loss == "ordinal":
        return "ordinal: one score, and rising cuts between the classes"
    return f"linear, {'with' if settings.head_bias else 'without'} a bias"


def what_is_missing(settings: ClassifierConfig) -> str:
    """What transformers' own classifier does not have, in words."""
    others = [f"{settings.pooling} pooling"] if settings.pooling != "last" else []
    if settings.loss == "ordinal" or settings.head_bias:
        others.append("an ordinal head" if settings.loss == "ordinal" else "a head with a bias")
    return " and ".join(others)
