"""Where the words of a text are, also in scripts that put no space between them."""

import re

# Chinese and Japanese: each character counts as a word, for no space says where one ends.
_UNSPACED = "\u3005\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
# A word keeps its inner marks (don't, well-made, 4.5); marks between words stand for themselves.
_LETTER = re.compile(r"\w")
_INNER = rf"(?:[^\W{_UNSPACED}]|[\u0300-\u036f])+"
_WORD = re.compile(rf"[{_UNSPACED}]|{_INNER}(?:['’.,-]{_INNER})*|[^\w\s]+")


def spans(text: str) -> list[tuple[int, int]]:
    """Where each word begins and ends in the text, and each row of marks between words."""
    return [match.span() for match in _WORD.finditer(text)]


def count(text: str) -> int:
    """How many words with a letter or a digit in them; marks that stand alone are none."""
    return sum(_LETTER.search(match[0]) is not None for match in _WORD.finditer(text))
