"""Two heads on a Llama: zero-shot prompting, and sentence classification with a choice of pooling."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from config import LlamaConfig
from llama import Llama, load_pretrained
from tokenizer import Tokenizer


def pool(hidden: Tensor, lengths: Tensor, kind: str) -> Tensor:
    """Hidden states (B, T, D) of right-padded sentences to one vector each, (B, D).

    "last": the last real token's, the only one that a causal model lets see the whole sentence; "mean" and "max"
    over the real tokens; "first". By length and not by token, so that the padding token may also be a word.
    """
    if kind == "first":
        return hidden[:, 0]
    if kind == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
    real = (torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None])[:, :, None]
    if kind == "mean":
        return (hidden * real).sum(1) / lengths[:, None]
    if kind == "max":
        return hidden.masked_fill(~real, -torch.inf).amax(1)
    raise ValueError(f"pooling is {kind!r}; it can be last, mean, max or first")


def all_real(input_ids: Tensor) -> Tensor:
    """The lengths (B,) of a batch (B, T) without padding."""
    return torch.full((len(input_ids),), input_ids.shape[1], device=input_ids.device)


class LlamaEmbeddingClassifier(nn.Module):
    """Pooling, dropout and one linear layer on a Llama's last hidden states.

    `config` has `num_labels`, `hidden_dropout_prob`, and if it likes `pooling` (default "last") and `option`
    ("pretrain" freezes the Llama). Without a `llama`, `config.pretrained_model_path` is loaded.
    """

    def __init__(self, config: Any, llama: Llama | None = None):
        super().__init__()
        self.num_labels = config.num_labels
        self.pooling = getattr(config, "pooling", "last")
        self.llama = load_pretrained(config.pretrained_model_path) if llama is None else llama
        self.llama.requires_grad_(getattr(config, "option", "finetune") != "pretrain")
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier_head = nn.Linear(self.llama.config.dim, self.num_labels)
        # Small, so that the first loss is ln(num_labels) whatever the size of the model's hidden states.
        with torch.no_grad():
            self.classifier_head.weight.mul_(0.05)
            self.classifier_head.bias.zero_()

    def forward(self, input_ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Tokens (B, T), padded on the right, and lengths (B,) (None: no padding) to log-probabilities (B, C)."""
        lengths = all_real(input_ids) if lengths is None else lengths
        pooled = pool(self.llama.hidden(input_ids, lengths), lengths, self.pooling)
        return F.log_softmax(self.classifier_head(self.dropout(pooled)).float(), dim=-1)


def empty_classifier(settings: dict[str, Any], path: Path) -> LlamaEmbeddingClassifier:
    """A classifier of the shape that a saved config.json describes, on the device "meta": its weights come from
    `checkpoint.load_state`. Raises ValueError, naming `path`, for settings that cannot be."""
    try:
        with torch.device("meta"):
            llama = Llama(LlamaConfig(**settings["llama"]))
            llama.output = nn.Identity()  # a classifier has no use for the logits of words, and none are saved
            return LlamaEmbeddingClassifier(SimpleNamespace(**settings), llama)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:  # the last: sizes that overflow
        raise ValueError(f"{path}: no saved classifier ({error!r})") from None


class LlamaZeroShotClassifier(nn.Module):
    """The log-probability of each label's name as the continuation of a prompt; nothing is trained.

    Without a `llama`, `config.pretrained_model_path` is loaded.
    """

    def __init__(self, config: Any, tokenizer: Tokenizer, label_names: list[str], llama: Llama | None = None):
        super().__init__()
        self.llama = load_pretrained(config.pretrained_model_path) if llama is None else llama
        self.llama.requires_grad_(False)
        self.label_name_ids = [tokenizer.encode_continuation(name) for name in label_names]
        empty = [name for name, ids in zip(label_names, self.label_name_ids, strict=True) if not ids]
        if empty:
            raise ValueError(f"the label names {empty} have no token; give them names that can be written")

    def forward(self, input_ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Prompts (B, T), padded on the right, and lengths (B,) (None: no padding) to log-probabilities (B, C).

        A name of several tokens is scored token by token, each given the ones before it:
        log p(name | prompt) = sum_i log p(token_i | prompt, token_1 .. token_i-1).
        """
        lengths = all_real(input_ids) if lengths is None else lengths
        rows = torch.arange(len(input_ids), device=input_ids.device)
        after_prompt = self._log_probabilities(input_ids, lengths, [lengths - 1])[0]
        scores = []
        for ids in self.label_name_ids:
            score = after_prompt[:, ids[0]]
            if len(ids) > 1:
                longer = F.pad(input_ids, (0, len(ids) - 1))
                for i, token in enumerate(ids[:-1]):
                    longer[rows, lengths + i] = token
                places = [lengths + i for i in range(len(ids) - 1)]
                parts = self._log_probabilities(longer, lengths + len(ids) - 1, places)
                score = score + sum(part[:, token] for part, token in zip(parts, ids[1:], strict=True))
            scores.append(score)
        return torch.stack(scores, dim=1)

    def _log_probabilities(self, tokens: Tensor, lengths: Tensor, places: list[Tensor]) -> list[Tensor]:
        """log p(next token), (B, V), after each of the places (B,). Only there is the large output layer used."""
        hidden = self.llama.hidden(tokens, lengths)
        rows = torch.arange(len(tokens), device=tokens.device)
        return [F.log_softmax(self.llama.output(hidden[rows, place]).float(), dim=-1) for place in places]
