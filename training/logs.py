"""Everything that a run says: lines for a person, and the JSONL files, whose columns are defined here once.

Nothing here imports torch.
"""

import json
import math
import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TextIO

from config import shown
from formats import files

# --------------------------------------------------------------------------- for a person


bars: list[Any] = []  # training.bar.Bar: those that are going on, the outermost first
_LOCK = threading.RLock()  # a line of `doing` comes from another thread, and never into the middle of one


def say(text: str) -> None:
    """A line of results, on stdout."""
    _write(text, sys.stdout)


def notice(text: str) -> None:
    """A line that is not a result, on stderr; "" is no line."""
    if text:
        _write(text, sys.stderr)


_elsewhere: list[TextIO] = []  # `into`: where lines go instead


@contextmanager
def into(path: Path) -> Iterator[None]:
    """Inside, every line goes to the end of this file instead: of one run among many, whose own lines nobody reads as
    they come. One that cannot be written, on a full disk, is dropped, as those on stderr are."""
    with open(path, "a", encoding="utf-8", opener=files.no_follow) as file:
        _elsewhere.append(file)
        try:
            yield
        finally:
            _elsewhere.remove(file)


def _write(text: str, stream: TextIO) -> None:
    with _LOCK:
        if _elsewhere:
            with suppress(OSError):
                print(shown(text), file=_elsewhere[-1], flush=True)
            return
        for bar in bars:
            bar.clear()
        print(shown(text), file=stream, flush=True)


def warn(message: str) -> None:
    """A warning, on stderr."""
    notice(f"warning: {message}")


SILENCE = 2.0  # seconds


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Inside, something is done that may take long: when it takes longer than SILENCE, stderr has a line that says
    what."""
    is_over = False

    def speak() -> None:
        with _LOCK:
            if not is_over:
                notice(f"{what} ...")

    timer = threading.Timer(SILENCE, speak)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with _LOCK:
            is_over = True
        timer.cancel()


# --------------------------------------------------------------------------- the columns


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, a line of steps.jsonl. `lr` is the largest of the parameter groups', `loss` the mean over the
    step's sentences in nats, `grad_norm` the norm before clipping, `seconds` the time in the training loop so far."""

    step: int
    epoch: int
    lr: float
    loss: float
    grad_norm: float
    tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One evaluation, a line of epochs.jsonl. `train_loss` is None where no step since the last evaluation was finite.
    The columns with a default are left out where they are None."""

    epoch: float
    step: int
    train_loss: float | None
    train_acc: float
    dev_loss: float
    dev_acc: float
    dev_f1: float | None = None
    dev_mae: float | None = None
    dev_qwk: float | None = None
    dev_off_by_one: float | None = None
    lr: float
    seconds: float
    update_ratio: dict[str, float] | None = None

    def printed(self) -> str:
        """The printed line of an epoch. People's scripts read it: its format stays."""
        train_loss = math.nan if self.train_loss is None else self.train_loss
        return (f"epoch {self.epoch}: train loss :: {train_loss:.3f}, train acc :: {self.train_acc:.3f}, "
                f"dev acc :: {self.dev_acc:.3f}, lr :: {self.lr:.2e}")


@dataclass(frozen=True)
class Event:
    """Something that the user should know of a step, a line of events.jsonl: a skipped step, a loss spike, a rollback,
    a halved micro-batch."""

    step: int
    event: str
    detail: str


FILES: dict[type, str] = {StepRecord: "steps.jsonl", EpochRecord: "epochs.jsonl", Event: "events.jsonl"}
TABLES: dict[type, str] = {StepRecord: "steps.csv", EpochRecord: "epochs.csv"}  # the same columns, see --logger csv


def columns(record: StepRecord | EpochRecord | Event) -> dict[str, Any]:
    """A record as the JSON object of its line."""
    values = {f.name: getattr(record, f.name) for f in fields(record)}
    optional = {f.name for f in fields(record) if f.default is None}
    return {name: value for name, value in values.items() if value is not None or name not in optional}


# --------------------------------------------------------------------------- the files


class Mirror(Protocol):
    """What follows the JSONL files as they are written: training.loggers.Loggers. It raises no errors."""

    def start(self) -> None:
        """The files hold now what counts: go on from there."""

    def write(self, record: StepRecord | EpochRecord | Event) -> None:
        """A line has been written."""

    def flush(self) -> None:
        """Everything that was written must be on the disk."""


class RunLogs:
    """The three JSONL files of a run, open for appending. A running sha256 of each says whether it is what was written.

    Use it as a context manager. Raises OSError when a file is a link or a device, and when the disk is full. `mirror`
    is told of each line, and of lines that are cut off.
    """

    def __init__(self, folder: Path, mirror: Mirror | None = None):
        self.mirror = mirror
        self.paths = {name: folder / name for name in FILES.values()}
        self.open: dict[str, BinaryIO] = {}
        self.digests: dict[str, Any] = {}
        self.stack = ExitStack()

    def __enter__(self) -> "RunLogs":
        with ExitStack() as stack:
            for name, path in self.paths.items():
                files.check_plain(path)
                self.open[name] = stack.enter_context(open(path, "ab", buffering=0, opener=files.no_follow))
                self.digests[name] = files.hash_of(path)
            self.stack = stack.pop_all()
        if self.mirror:
            self.mirror.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stack.close()
        self.open = {}

    def write(self, record: StepRecord | EpochRecord | Event) -> None:
        """Append a record's line to its file. A reader sees it at once."""
        name = FILES[type(record)]
        self.digests[name].update(_write_line(self.open[name], columns(record)))
        if self.mirror:
            self.mirror.write(record)

    def flush(self) -> None:
        """Everything is on the disk afterwards: a state must not know of lines that are not."""
        for file in self.open.values():
            os.fsync(file.fileno())
        if self.mirror:
            self.mirror.flush()

    def sizes(self) -> dict[str, int]:
        """The length of each file in bytes."""
        return {name: file.tell() for name, file in self.open.items()}

    def sha256(self, sizes: dict[str, int]) -> dict[str, str]:
        """The checksum of each file; of one that `sizes` names, only of so many first bytes."""
        return {**{name: digest.hexdigest() for name, digest in self.digests.items()},
                **{name: files.hash_of(self.paths[name], size).hexdigest() for name, size in sizes.items()}}

    def check(self, sizes: dict[str, int], known: dict[str, Any]) -> None:
        """Warn when the first bytes of a file, as many as `sizes` says, have not the checksum that is `known`."""
        for name, size in sizes.items():
            path = self.paths[name]
            if known.get(name) is None or not path.exists() or path.stat().st_size < size:
                continue  # `cut` tells of lines that are lost
            if files.hash_of(path, size).hexdigest() != known[name]:
                with open(path, "rb", opener=files.no_follow) as file:
                    bad = [i for i, line in enumerate(file.read(size).splitlines(), 1) if parse_line(line) is None]
                where = f"; the first line that cannot be read is {bad[0]}" if bad else ""
                warn(f"{path}: damaged: its first {size} bytes are not what the run wrote (sha256){where}. They are "
                     "kept as they are; the training does not read them")

    def cut(self, sizes: dict[str, int]) -> None:
        """Shorten the files to these lengths: what follows is of a time that is undone."""
        for name, size in sizes.items():
            path = self.paths[name]
            has = path.stat().st_size if path.exists() else 0
            if has < size:  # truncating would fill the file up with zeros
                warn(f"{path}: it has {has} bytes and had {size}; lines of it are lost")
            elif name in self.open:
                self.open[name].truncate(size)
                self.open[name].seek(size)
                self.digests[name] = files.hash_of(path)
            elif has > size:
                with open(path, "rb+", opener=files.no_follow) as file:
                    file.truncate(size)
        if self.mirror and self.open:
            self.mirror.start()

    def has_lines(self) -> bool:
        """Is there anything in one of the files?"""
        return any(path.exists() and path.stat().st_size for path in self.paths.values())


def _write_line(file: BinaryIO, values: dict[str, Any]) -> bytes:
    """Write one JSON object to an unbuffered file and return its line: a line that failed is not tried again when the
    file is closed. Raises OSError, naming the file and the bytes, when the disk is full."""
    whole = line = (json.dumps(values) + "\n").encode()
    try:
        while line:
            line = line[file.write(line):]
    except OSError as error:
        raise files.disk_full(Path(file.name), error) from None
    return whole


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line; None where it is damaged."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; damaged ones are left out."""
    lines: Iterable[bytes] = path.read_bytes().splitlines() if path.exists() else []
    return [value for line in lines if (value := parse_line(line)) is not None]
