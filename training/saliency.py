"""Which words tip a decision: gradient times input, and what happens when the word is deleted.

The decision is the margin between the two likeliest classes, log p(first) - log p(second). A positive number says that
a word speaks for the first class, a negative one that it speaks for the second.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import dataset
from classifier import LlamaEmbeddingClassifier
from dataset import Split
from formats import words
from tokenizer import Tokenizer
from training import metrics
from training.device import Device

MOST_UNITS = 64  # of a longer sentence, neighbouring words are looked at together: each costs a forward pass


@dataclass(frozen=True)
class Decision:
    """What tips the decision on one sentence between the classes `first` and `second`. Of each of the U words (or of
    neighbouring words together), in their order: `units`; `gradient` (U,), see `gradient_times_input`; `deletion` (U,),
    how much of the margin is lost without the word. `log_probs` (C,). `is_cut`: is the end of the text not looked at?
    """

    text: str
    first: int
    second: int
    log_probs: np.ndarray
    units: tuple[str, ...]
    gradient: np.ndarray
    deletion: np.ndarray
    is_cut: bool

    @property
    def margin(self) -> float:
        return float(self.log_probs[self.first] - self.log_probs[self.second])

    @property
    def agreement(self) -> float | None:
        """Spearman's rank correlation of the two measures over the words, from -1 to 1; None for fewer than three
        words, and where one of them is the same for all."""
        from scipy.stats import rankdata

        if len(self.units) < 3:
            return None
        a, b = rankdata(self.gradient), rankdata(self.deletion)
        if a.std() == 0 or b.std() == 0:
            return None
        return float(np.corrcoef(a, b)[0, 1])

    @property
    def is_same_word(self) -> bool:
        """Do both measures name the same word as the one that matters most?"""
        return bool(len(self.units)) and bool(np.abs(self.gradient).argmax() == np.abs(self.deletion).argmax())


def decisions(model: LlamaEmbeddingClassifier, tokenizer: Tokenizer, texts: Sequence[str], device: Device,
              context: int, max_sentence_len: int | None) -> list[Decision]:
    """What tips the decision on each text. The model is on the device already, and in evaluation mode."""
    limit = min(context - int(tokenizer.add_bos), max_sentence_len or context)
    found = []
    for text in texts:
        text = text.strip()
        seen = tokenizer.spans(text)
        is_cut = len(seen) > limit
        if is_cut:
            text = text[:max(end for _, end in seen[:limit])]
            seen = tokenizer.spans(text)[:limit]
        units, unit_of = units_of(text, seen)
        tokens, _ = dataset.tokenize([text], tokenizer, context, max_sentence_len)
        log_probs, by_token = gradient_times_input(model, tokens[0], device)
        order = np.argsort(-log_probs, kind="stable")
        first, second = int(order[0]), int(order[1])
        by_token = by_token[len(by_token) - len(seen):]  # without the begin token
        gradient = np.zeros(len(units))
        for value, unit in zip(by_token, unit_of, strict=False):
            if unit is not None:
                gradient[unit] += value
        shorter = [without(text, *unit) for unit in units]
        margins = margins_of(model, tokenizer, shorter, device, context, max_sentence_len, first, second)
        margin = log_probs[first] - log_probs[second]
        found.append(Decision(text, first, second, log_probs, tuple(text[a:b] for a, b in units), gradient,
                              margin - margins, is_cut))
    return found


def gradient_times_input(model: LlamaEmbeddingClassifier, tokens: np.ndarray, device: Device) -> tuple[
        np.ndarray, np.ndarray]:
    """Of one sentence's tokens (T,): log-probabilities (C,), and for each token the dot product (T,) of its embedding
    with the gradient of the margin there (Shrikumar et al. 2016, arXiv 1605.01713, section 3.2).

    It is what the margin would lose with an embedding of 0 in the token's place, if the model were linear.
    """
    kept: list[Tensor] = []

    def keep(module: torch.nn.Module, given: tuple, out: Tensor) -> Tensor:
        kept.append(out.detach().requires_grad_())
        return kept[-1]

    batch = torch.from_numpy(tokens.astype(np.int64))[None].to(device.where)
    with torch.enable_grad():
        handle = model.llama.tok_embeddings.register_forward_hook(keep)
        try:
            log_probs = model(batch, torch.tensor([len(tokens)], device=batch.device)).float()[0]
        finally:
            handle.remove()
        top = log_probs.topk(2).values
        (gradient,) = torch.autograd.grad(top[0] - top[1], kept)
    products = (gradient.float() * kept[0].detach().float()).sum(-1)[0]
    return log_probs.detach().cpu().numpy().astype(np.float64), products.cpu().numpy().astype(np.float64)


def margins_of(model: LlamaEmbeddingClassifier, tokenizer: Tokenizer, texts: list[str], device: Device, context: int,
               max_sentence_len: int | None, first: int, second: int) -> np.ndarray:
    """log p(first) - log p(second) of each text, (N,)."""
    if not texts:
        return np.zeros(0)
    tokens, n_cut = dataset.tokenize(texts, tokenizer, context, max_sentence_len)
    split = Split(Path(), texts, tokens, np.zeros(len(texts), dtype=np.int64), n_cut)
    found = metrics.predict(model, split, tokenizer.pad_id, device, None).numpy().astype(np.float64)
    return found[:, first] - found[:, second]


# --------------------------------------------------------------------------- words and tokens


def units_of(text: str, token_spans: Sequence[tuple[int, int]], most: int = MOST_UNITS) -> tuple[
        list[tuple[int, int]], list[int | None]]:
    """The units of a text as (begin, end), and the unit of each token (None for one of space alone).

    A unit is a word, or a character of a script without spaces. Words that share a token are one unit, for a token's
    gradient cannot be divided; of more units than `most`, neighbours are put together.
    """
    found = words.spans(text)
    is_joined = [False] * len(found)  # is the word one unit with the word in front of it?
    for several in _overlapping(found, token_spans):
        for word in several[1:]:
            is_joined[word] = True
    joined: list[tuple[int, int]] = []
    for (begin, end), is_one in zip(found, is_joined, strict=True):
        if is_one:
            begin, _ = joined.pop()
        joined.append((begin, end))
    size = -(-len(joined) // most) or 1
    units = [(joined[i][0], joined[i:i + size][-1][1]) for i in range(0, len(joined), size)]
    return units, [several[0] if several else None for several in _overlapping(units, token_spans)]


def _overlapping(places: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[list[int]]:
    """For each span the places, in rising order, that share a character with it."""
    ends = [end for _, end in places]
    found = []
    for begin, end in spans:
        first = last = bisect_right(ends, begin)
        while last < len(places) and places[last][0] < end:
            last += 1
        found.append(list(range(first, last)))
    return found


def without(text: str, begin: int, end: int) -> str:
    """The text without the characters from begin to end, and without the space that would then be double."""
    before, after = text[:begin], text[end:]
    return f"{before.rstrip()} {after.lstrip()}".strip() if before[-1:].isspace() and (
        after[:1].isspace() or not after) else (before + after).strip()
