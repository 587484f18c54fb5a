"""Which sentences are held out for dev where nobody names a dev file, and which are copies of others."""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from functools import cache

import numpy as np

HELD_OUT = 0.1  # of the texts
FEWEST = 10  # sentences, of which some can be held out
SPACE = re.compile(r"\s+")
MARK = re.compile(r"(?<!\d)[^\w\s]|[^\w\s](?!\d)|_")


def folded(text: str) -> str:
    """A text without what makes no difference between copies: case, the width of letters (NFKC), spaces."""
    if text.isascii():
        return " ".join(text.lower().split())
    return SPACE.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


def without_marks(text: str) -> str:
    """A text without what makes no difference between near copies: case, width, all spaces, punctuation. Marks between
    digits stay (4.5 is not 45), and so do symbols, such as smileys; of nothing but marks they all stay."""
    plain = folded(text)
    kept = MARK.sub(lambda match: "" if _is_mark(match[0]) else match[0], plain)
    return "".join(kept.split()) or plain


@cache
def _is_mark(character: str) -> bool:
    kind = unicodedata.category(character)
    return kind[0] == "P" or kind == "Sk"


def fraction(text: str) -> float:
    """Where a text's sha256 lies between 0 and 1: as good as random, and the same on every machine and every day."""
    return int.from_bytes(hashlib.sha256(folded(text).encode("utf-8", "replace")).digest()[:8], "big") / 2**64


def held_out(texts: Sequence[str], labels: Sequence[int]) -> np.ndarray:
    """Which of the N texts are held out for dev: about a tenth of every class, (N,) bool.

    A text is held out where its hash falls below a tenth. So it stays where it is when others are added, and all its
    copies stay on its side, those with another label too. Then a class of two texts or more that has none in dev gives
    the one with the smallest hash, and a class that has none left in train takes back the one with the largest.
    """
    places = np.array([fraction(text) for text in texts])
    classes = np.asarray(labels)
    is_out = places < HELD_OUT
    for label in np.unique(classes):
        of_class = places[classes == label]
        if not is_out[classes == label].any() and len(np.unique(of_class)) > 1:
            is_out |= places == of_class.min()
    for label in np.unique(classes):
        if is_out[classes == label].all():
            is_out &= places != places[classes == label].max()
    return is_out


def n_copies(texts: Sequence[str], others: set[str]) -> int:
    """How many of these texts are copies of others, which are `folded`."""
    return sum(folded(text) in others for text in texts)
