"""Two heads on a Llama: zero-shot prompting, and sentence classification with a choice of pooling."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from config import POOLINGS, Base, InputError, LlamaConfig, LoraConfig
from llama import Llama, load_pretrained
from tokenizer import Tokenizer


@dataclass(frozen=True)
class ClassifierConfig:
    """What best/config.json holds: all that is needed to build the classifier again and to name its classes.

    `lora`: the adapters, where model.safetensors holds those and the head alone; the rest is in `base`."""

    num_labels: int
    label_names: list[str]
    pooling: str
    loss: str
    hidden_dropout_prob: float
    max_sentence_len: int | None
    llama: LlamaConfig
    head_bias: bool = False
    lora: LoraConfig | None = None
    base: Base | None = None

    def values(self) -> dict[str, Any]:
        """As the JSON object of config.json."""
        return asdict(self)

    @classmethod
    def read(cls, values: dict[str, Any], path: Path) -> "ClassifierConfig":
        """The JSON object of config.json, checked. Raises InputError, naming `path`, for what no classifier has."""
        names, longest = values.get("label_names"), values.get("max_sentence_len")
        if not isinstance(names, list) or not all(isinstance(n, str) and n.isprintable() for n in names) or (
                len(names) < 2 or values.get("num_labels") != len(names)
                or not (longest is None or type(longest) is int and longest > 0)
                or values.get("pooling") not in POOLINGS or values.get("loss", "ce") not in ("ce", "ordinal")
                or type(values.get("head_bias", True)) is not bool):
            raise InputError(f"{path}: not a saved classifier (label_names, num_labels, pooling, loss, "
                             "max_sentence_len or head_bias is odd)")
        try:
            if not 0 < values["llama"]["n_layers"] < 1000:
                raise ValueError(f"n_layers is {values['llama']['n_layers']}")
            adapters, base = values.get("lora"), values.get("base")
            if (adapters is None) != (base is None):
                raise ValueError("an adapter needs its base")
            return cls(len(names), names, values["pooling"], values.get("loss", "ce"), values["hidden_dropout_prob"],
                       longest, LlamaConfig(**values["llama"]), values.get("head_bias", True),  # older ones have it
                       adapters and LoraConfig(**adapters), base and Base(**base))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: not a saved classifier ({error!r})") from None


def pool(hidden: Tensor, lengths: Tensor, kind: str) -> Tensor:
    """Hidden states (B, T, D) of right-padded sentences to one vector each, (B, D).

    "last": the last real token's, the only one that a causal model lets see the whole sentence; "mean" and "max"
    over the real tokens; "first". By length and not by token, so that the padding token may also be a word.
    """
    if kind not in POOLING:
        raise ValueError(f"pooling is {kind!r}; it can be {', '.join(POOLINGS[:-1])} or {POOLINGS[-1]}")
    return POOLING[kind](hidden, lengths)


def _real(hidden: Tensor, lengths: Tensor) -> Tensor:
    """(B, T, 1): is the token a real one, and not padding?"""
    return (torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None])[:, :, None]


POOLING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "last": lambda hidden, lengths: hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1],
    "mean": lambda hidden, lengths: (hidden * _real(hidden, lengths)).sum(1) / lengths[:, None],
    "max": lambda hidden, lengths: hidden.masked_fill(~_real(hidden, lengths), -torch.inf).amax(1),
    "first": lambda hidden, lengths: hidden[:, 0],
}
if POOLING.keys() != {*POOLINGS}:
    raise TypeError("config.POOLINGS and classifier.POOLING do not have the same names")


def all_real(input_ids: Tensor) -> Tensor:
    """The lengths (B,) of a batch (B, T) without padding."""
    return torch.full((len(input_ids),), input_ids.shape[1], device=input_ids.device)


class OrdinalHead(nn.Linear):
    """Vectors (B, D) to log-probabilities (B, C) of classes that have an order: one score and C - 1 rising cuts,
    P(y <= k) = sigmoid(cut_k - score) (McCullagh 1980, proportional odds).

    The cuts begin where all classes are equally likely at score 0; there is no bias, which they would undo.
    """

    def __init__(self, dim: int, n_classes: int):
        super().__init__(dim, 1, bias=False)
        cuts = torch.logit(torch.arange(1, n_classes) / n_classes)
        self.first_cut = nn.Parameter(cuts[:1].clone())
        self.gaps = nn.Parameter(torch.log(torch.expm1(cuts.diff())))  # softplus of them is what is added

    def forward(self, x: Tensor) -> Tensor:
        """log P(y = k) = log(P(y <= k) - P(y <= k - 1))"""
        score, between = super().forward(x), F.softplus(self.gaps)
        cuts = torch.cat((self.first_cut, self.first_cut + between.cumsum(0)))
        edge = score.new_full((len(score), 1), torch.inf)
        upper, lower = torch.cat((cuts - score, edge), 1), torch.cat((-edge, cuts - score), 1)
        # sigmoid(u) - sigmoid(l) = sigmoid(u) sigmoid(-l) (1 - exp(l - u)): no difference of near equals.
        gap = torch.cat((edge, between.expand(len(score), -1), edge), 1)
        return F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(-gap))


class LlamaEmbeddingClassifier(nn.Module):
    """Pooling, dropout and one linear layer on a Llama's last hidden states.

    `config` has `num_labels`, `hidden_dropout_prob`, and if it likes `pooling` (default "last"), `option` ("pretrain"
    freezes the Llama: only the head is trained), `loss`: "ordinal" puts an `OrdinalHead` in place of the linear
    layer, and `head_bias`: has the linear layer a bias (default: none, as Hugging Face's `score`)? Without a `llama`,
    `config.pretrained_model_path` is loaded.
    """

    def __init__(self, config: Any, llama: Llama | None = None):
        super().__init__()
        self.num_labels = config.num_labels
        self.pooling = getattr(config, "pooling", "last")
        self.llama = load_pretrained(config.pretrained_model_path) if llama is None else llama
        self.llama.output = nn.Identity()  # type: ignore[assignment]  # a classifier has no use for the logits of words
        self.llama.requires_grad_(getattr(config, "option", "finetune") != "pretrain")
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.is_ordinal = getattr(config, "loss", "ce") == "ordinal"
        dim = self.llama.config.dim
        self.classifier_head = OrdinalHead(dim, self.num_labels) if self.is_ordinal else (
            nn.Linear(dim, self.num_labels, bias=getattr(config, "head_bias", False)))
        # Small, so that the first loss is ln(num_labels) whatever the size of the model's hidden states.
        with torch.no_grad():
            self.classifier_head.weight.mul_(0.05)
            if self.classifier_head.bias is not None:
                self.classifier_head.bias.zero_()
        self.is_backbone_frozen = False  # then the Llama runs without autograd

    def forward(self, input_ids: Tensor, lengths: Tensor | None = None, below: Tensor | None = None) -> Tensor:
        """Tokens (B, T), padded on the right, and lengths (B,) (None: no padding) to log-probabilities (B, C).
        `below`: what `first_part` gives for them, where it is known already."""
        lengths = all_real(input_ids) if lengths is None else lengths
        if self.is_backbone_frozen:
            pooled = (self.first_part(input_ids, lengths) if below is None else below)[:, 0]
        else:
            pooled = self._pooled(input_ids, lengths, below)
        with torch.autocast(pooled.device.type, enabled=False):  # a bfloat16 logit has three digits
            out = self.classifier_head(self.dropout(pooled.float()))
        return out if self.is_ordinal else F.log_softmax(out, dim=-1)

    def first_part(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """What the frozen part (see `frozen.freeze`) makes of sentences: (B, T, D), which ends behind each one's
        length, or (B, 1, D) where one vector of each is all that follows needs. Without autograd."""
        if self.is_backbone_frozen:
            with torch.no_grad():
                return self._pooled(input_ids, lengths)[:, None]
        return self.llama.first_part(input_ids, lengths, at=self._wanted(lengths))

    def has_one_vector(self) -> bool:
        """Does `first_part` give one vector of each sentence?"""
        is_whole = self.llama.n_frozen == self.llama.config.n_layers
        return self.is_backbone_frozen or is_whole and self.pooling in ("last", "first")

    def _pooled(self, input_ids: Tensor, lengths: Tensor, below: Tensor | None = None) -> Tensor:
        """One vector of each sentence, (B, D)."""
        at = self._wanted(lengths)
        hidden = self.llama.hidden(input_ids, lengths, at=at, below=below)
        return pool(hidden, lengths, self.pooling) if at is None else hidden[:, 0]

    def _wanted(self, lengths: Tensor) -> Tensor | None:
        """Where the one state is that the pooling looks at, (B,), which spares most of the last layer; None: at all."""
        if self.pooling == "last":
            return lengths - 1
        return torch.zeros_like(lengths) if self.pooling == "first" else None


def classification_loss(model: nn.Module, batch: dict[str, Tensor], label_smoothing: float = 0.0,
                        r_drop: float = 0.0) -> Tensor:
    """Each sentence's loss (B,): the cross-entropy of log-probabilities, with what was asked for on top.

    label_smoothing e: (1 - e) of the target on the label, e spread over all classes (Szegedy et al. 2016, section 7).
    r_drop a: the mean of two passes with different dropout, plus a times half their symmetric Kullback-Leibler
    divergence (Liang et al. 2021, arXiv 2106.14448, eq. 4).
    """
    inputs = [batch[name] for name in ("tokens", "lengths", "below") if name in batch]
    passes = [model(*inputs) for _ in range(2 if r_drop else 1)]
    losses = torch.stack([_cross_entropy(p, batch["labels"], label_smoothing) for p in passes]).mean(0)
    if r_drop:
        p, q = passes
        divergence = ((p.exp() - q.exp()) * (p - q)).sum(1)  # KL(p || q) + KL(q || p)
        losses = losses + r_drop * divergence / 2
    return losses


def _cross_entropy(log_probs: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    losses = F.nll_loss(log_probs, labels, reduction="none")
    return losses if not smoothing else (1 - smoothing) * losses - smoothing * log_probs.mean(1)


def empty_classifier(settings: ClassifierConfig, path: Path) -> LlamaEmbeddingClassifier:
    """A classifier of the shape that a saved config.json describes, on the device "meta": it has no weights yet. Raises
    InputError, naming `path`, for settings that cannot be."""
    try:
        with torch.device("meta"):
            return LlamaEmbeddingClassifier(settings, Llama(settings.llama))
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path}: not a saved classifier ({error!r})") from None


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
            raise InputError(f"the label names {empty} have no token; give them names that can be written")

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
        hidden = self.llama.hidden(tokens, lengths).float()
        rows = torch.arange(len(tokens), device=tokens.device)
        with torch.autocast(tokens.device.type, enabled=False):  # in bfloat16, close scores would be equal
            return [F.log_softmax(self._logits(hidden[rows, place]), dim=-1) for place in places]

    def _logits(self, x: Tensor) -> Tensor:
        """x (B, D) float32 to logits (B, V) float32; weights in bfloat16 are widened a part at a time."""
        weight = self.llama.output.weight
        if weight.dtype == torch.float32:
            return self.llama.output(x)
        return torch.cat([F.linear(x, some.float()) for some in weight.split(4096)], dim=-1)


def ask(model: LlamaZeroShotClassifier, sentences: list[np.ndarray], tokenizer: Tokenizer, question: str,
        names: list[str]) -> list[np.ndarray]:
    """The prompts: each tokenised sentence (T,), cut where the model's context leaves no more room, then the question,
    in which {labels} stands for the names. Raises InputError when the question alone is too long."""
    labels = " or ".join(names) if len(names) == 2 else ", ".join(names[:-1]) + ", or " + names[-1]
    asked = tokenizer.encode_continuation(question.replace("{labels}", labels).strip())
    room = model.llama.config.max_seq_len - len(asked) - max(len(ids) for ids in model.label_name_ids)
    if room < 1:
        raise InputError(f"--question: its {len(asked)} tokens leave no room for a sentence in the model's context of "
                         f"{model.llama.config.max_seq_len}")
    return [np.concatenate((tokens[:room], np.asarray(asked, dtype=np.int32))) for tokens in sentences]
