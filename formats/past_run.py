"""A run that has ended, as a report sees it, whatever it was read from: its folder, a log, a table of experiments."""

import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from config import InputError, options
from config.parser import ALIASES, MEANT

NAMES = {**{f.name: f.name for f in options()}, **ALIASES, **MEANT}  # an option by every name that it is known by
FLAGS = {f.name for f in options() if f.type is bool}  # the options without a value


@dataclass(frozen=True)
class Epoch:
    """One evaluation as it is printed: the loss in nats, accuracies from 0 to 1. `lr` is None where the line has none;
    `line` is its number in the log, 0 in a run folder."""

    number: float
    train_loss: float
    train_acc: float
    dev_acc: float
    lr: float | None = None
    collapsed: bool = False  # the line says that every prediction was one class
    line: int = 0
    dev_loss: float | None = None  # printed lines have none

    def scores(self) -> tuple[str, ...]:
        """What was measured, to tell a doubled line from another one. (As text: a NaN is then equal to itself.)"""
        return tuple(f"{x:g}" for x in (self.train_loss, self.train_acc, self.dev_acc))


@dataclass(frozen=True)
class Claim:
    """What a summary line or a table in a log says of a run. `what`: "best dev", "dev", "test" or "best epoch";
    `decimals`: with how many the value is written."""

    line: int
    what: str
    value: float
    decimals: int


@dataclass(frozen=True)
class PastRun:
    """`options` has each option that is known, as text. `known_by` says how: "folder" and "table" know every option
    that there is, on a "command" line the others were not given, and with "heading", "partly" (a command line in which
    the shell put a value) or "" they are unknown. `heading`: what the heading over a command line says.

    `epochs` stand in the order of their numbers, each once. `dev` and `test` are the accuracies at the end; `score` is
    what a table says, in the column `score_column`. `n_dev`: sentences in dev. `majority`: the most frequent class's
    share of dev. `seconds`: the training's time. `planned`: --epochs. `stopped`: why it ended, where that is said.
    """

    name: str
    source: str
    options: dict[str, str] = field(default_factory=dict)
    known_by: str = ""
    given: frozenset[str] = frozenset()  # the options that were typed
    heading: dict[str, str] = field(default_factory=dict)
    epochs: tuple[Epoch, ...] = ()
    dev: float | None = None
    test: float | None = None
    score: float | None = None
    score_column: str = ""
    said_best: float | None = None
    monitor: str = ""
    planned: int | None = None
    stopped: str = ""
    majority: float | None = None
    n_dev: int | None = None
    seconds: float | None = None
    predictions: Path | None = None  # of dev
    dev_file: Path | None = None
    dev_sha256: str = ""
    n_classes: int | None = None
    reliability: tuple[tuple[float, ...], ...] = ()  # of dev: (low, high, n, confidence, accuracy) of each bin
    claims: tuple[Claim, ...] = ()
    notes: tuple[str, ...] = ()  # what was odd in its log
    inspected: tuple[tuple[str, str], ...] = ()  # what --option inspect said of it: (what, text)

    def best(self) -> Epoch | None:
        """The epoch with the highest dev accuracy: of equal ones the one that the run says it chose, else the first."""
        return self._best

    @cached_property
    def _best(self) -> Epoch | None:
        finite = [e for e in self.epochs if math.isfinite(e.dev_acc)]
        if not finite:
            return None
        peak = max(e.dev_acc for e in finite)
        return next((e for e in finite if e.number == self.said_best and e.dev_acc == peak),
                    next(e for e in finite if e.dev_acc == peak))

    def peak(self) -> float | None:
        """What runs are ranked by: the best dev accuracy, or what the table says."""
        best = self.best()
        return best.dev_acc if best else self.dev if self.dev is not None else self.score


# --------------------------------------------------------------------------- options and numbers as text

# The digits are bounded: a pattern with a number in it then takes time linear in the text, whatever stands behind it.
NUMBER = (r"(?:[-+]?(?:\d{1,40}(?:\.\d{0,40})?|\.\d{1,40})(?:[eE][-+]?\d{1,4})?(?![.,]?\d)|"
          r"[-+]?(?:nan|inf)(?![a-z]))")


def plain(value: object) -> str:
    """An option's value so that equal ones are equal texts: 1e-5, 0.00001 and 1E-05 are all 1e-05."""
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value).strip()
    if re.fullmatch(NUMBER, text) and len(text) < 40:
        number = float(text)
        return f"{number:.12g}" if math.isfinite(number) else text
    return text


def option_name(typed: str) -> str:
    """The name of an option that was typed as `--Hidden-Dropout-Prob` or by what other programs call it; one that is
    not known stays as it is."""
    name = typed.lstrip("-").replace("-", "_")
    return NAMES.get(name) or NAMES.get(name.lower()) or name


def name_of_column(header: str) -> str:
    """The same for a column's title, "Learning rate" or "**lr**"."""
    return option_name("_".join(re.findall(r"\w+", header)))


# --------------------------------------------------------------------------- bytes to text


def decode(raw: bytes, path: Path) -> str:
    """The text of a log or a table: UTF-8 or UTF-16, with or without a byte order mark, else Latin-1, which every text
    of an old Windows can be read as. Raises InputError for a binary file."""
    is_binary = InputError(f"{path}: this is a binary file; expected a log, a table, or the folder of a run")
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return raw.decode("utf-16", errors="replace")
    head = raw[:4096]
    if b"\0" in head:
        for name, zeros in (("utf-16-le", head[1::2]), ("utf-16-be", head[::2])):
            if zeros.count(0) > 0.4 * len(zeros):
                return raw.decode(name, errors="replace")
        raise is_binary
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        controls = sum(byte < 32 and byte not in b"\t\n\r\x08\x0c\x1b" for byte in head)
        if controls > 0.02 * len(head):
            raise is_binary from None
        return raw.decode("latin-1")
