"""Words for a person: numbers with their nouns, text that a terminal can show, and what a person did wrong."""

import re


def counted(n: int, noun: str) -> str:
    """1 layer, 2 layers: a number and its noun, for messages."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def duration(seconds: float) -> str:
    """45 s, 12 min, 3.5 h: a time for a person."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


# Control characters but tab and line feed, and those that reverse or break a line (Unicode's bidi controls, U+2028/9).
_TERMINAL_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def millions(n: int) -> str:
    """A number of parameters: 49.5M, or 2,880 where that would be 0.0M."""
    return f"{n / 1e6:.1f}M" if n >= 5e4 else f"{n:,}"


def byte_size(n: int) -> str:
    """A number of bytes: 1.25 GiB, or 13.0 MiB where it is below a tenth of one."""
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 / 10 else f"{n / 2**20:.1f} MiB"


def shown(text: object) -> str:
    """Text for a person's terminal: a name or path from a file could hold codes that move the cursor, hide text or
    reverse it, so they are written out, as \\x1b or \\u202e."""
    return _TERMINAL_CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), str(text))


class InputError(ValueError):
    """What a person did wrong: `main` prints it on one line and exits with code 2."""
