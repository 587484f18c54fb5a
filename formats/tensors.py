"""What the readers of weights share: `Weights`, tensors that are read when they are wanted, and safetensors."""

import json
import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from config import InputError, LlamaConfig
from formats.memory import is_out_of_memory

# Numbers that are read, and turned into another precision, at a time. Larger pieces leave holes between the tensors,
# which are never given back: a tenth of a model's size.
PIECE = 2**17


class Reader(Protocol):
    """Reads one tensor of a file, in the precision that is asked for; the result is no part of the file's memory."""

    def __call__(self, dtype: torch.dtype = ...) -> Tensor: ...


@dataclass(frozen=True)
class TrainedHead:
    """The head of a finished run: `settings`, the JSON object of its best/config.json, not yet checked; `readers`, by
    the names of the head's own parameters."""

    settings: dict[str, Any]
    readers: dict[str, Reader]


@dataclass(frozen=True)
class Weights:
    """A file's model: `shapes` and `readers` share their keys, the names of the Llama's parameters. `head`: of a
    finished run; `left`: the names of a head's tensors that are not read."""

    path: Path
    config: LlamaConfig
    shapes: dict[str, tuple[int, ...]]
    readers: dict[str, Reader]
    head: TrainedHead | None = None
    left: tuple[str, ...] = ()

    def said_of_left(self) -> str:
        """What is to be said of `left`; "" where it is empty."""
        if not self.left:
            return ""
        more = f" and {len(self.left) - 3} more" if len(self.left) > 3 else ""
        verb = "are" if len(self.left) > 1 else "is"
        return f"{self.path}: {', '.join(self.left[:3])}{more} {verb} not part of a Llama, and left behind"


def damaged(path: Path, error: object) -> InputError:
    return InputError(f"{path}: damaged or truncated ({error}); fetch or copy the file again")


def checked_config(path: Path, **values: Any) -> LlamaConfig:
    """A config of what a file says. Raises InputError for a number of another type, or one that no model can have."""
    for name in ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "max_seq_len", "head_dim"):
        value = values.get(name)
        may_be_none = name in ("n_kv_heads", "head_dim") and value is None
        if name in values and not (may_be_none or type(value) is int and 0 < value < 2**28):
            raise InputError(f"{path}: {name} is {value!r}, expected a whole number above 0")
    try:
        return LlamaConfig(**values)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


# --------------------------------------------------------------------------- tensors in a file


def stamp_of(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is written anew."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def check_unchanged(path: Path, status: os.stat_result, stamp: tuple[int, ...]) -> None:
    """Raises InputError for a file that has been written anew."""
    if stamp_of(status) != stamp:
        raise InputError(f"{path}: it has changed since it was opened; start again")


FLOATING = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor of plain numbers lies: `start` counts bytes from the file's first; `kind` is safetensors' name of
    the type; `stamp` is the file's, when its header was read."""

    path: Path
    shape: tuple[int, ...]
    kind: str
    start: int
    stamp: tuple[int, ...]

    def read(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor in `dtype`, read in pieces, so that it is never in memory twice. Raises InputError for a file that
        has changed since its header was read."""
        stored, values = FLOATING[self.kind], torch.empty(self.shape, dtype=dtype)
        flat, piece = values.view(-1), torch.empty(min(values.numel(), PIECE), dtype=stored)
        with open(self.path, "rb") as file:
            check_unchanged(self.path, os.fstat(file.fileno()), self.stamp)
            file.seek(self.start)
            for at in range(0, len(flat), PIECE):
                target = flat[at : at + PIECE]
                part = target if stored == dtype else piece[: len(target)]
                if file.readinto(part.view(torch.uint8).numpy()) != part.nbytes:  # type: ignore[arg-type]  # it has a buffer
                    raise damaged(self.path, "it has become shorter while it was read")
                if part is not target:
                    target.copy_(part)
        return values

    def check_floating(self, name: str) -> None:
        if self.kind not in FLOATING:
            raise InputError(f"{self.path}: {name} has the type {self.kind}; only floating-point weights are read here")

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * FLOATING[self.kind].itemsize


def open_safetensors(path: Path) -> Any:
    """A safetensors file, opened without reading its tensors. Raises InputError for a header that cannot be."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        if is_out_of_memory(error):
            raise
        # The library checks every count and offset against the file's size.
        raise damaged(path, error) from None


def stored_in_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Where the tensors of a safetensors file lie. Raises as `open_safetensors`.

    The library maps the whole file into memory, and what is read of it there counts a second time beside the weights.
    So it checks the header, and the numbers are read by `StoredTensor`.
    """
    stamp = stamp_of(path.stat()) if path.is_file() else ()
    open_safetensors(path)
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    return {name: StoredTensor(path, tuple(of["shape"]), of["dtype"], 8 + length + of["data_offsets"][0], stamp)
            for name, of in header.items() if name != "__metadata__"}
