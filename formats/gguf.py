"""The header of a GGUF file: its metadata and where its tensors lie.

The `gguf` package's own reader takes seconds for the header of a real model and believes the counts in it. This one
walks the header once and checks every count and size against the file before using it.
"""

import mmap
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from config import InputError


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies. `shape` is in PyTorch's order (rows first); `start` and `nbytes` count from the file's
    first byte; `kind` is a `gguf.GGMLQuantizationType` number."""

    shape: tuple[int, ...]
    kind: int
    start: int
    nbytes: int


_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_Record = tuple[tuple[int, ...], int, int]  # a tensor's shape, kind, and offset in the data


class _Walk:
    """Reads little-endian values from a buffer, front to back, never beyond its end."""

    def __init__(self, buffer: mmap.mmap, path: Path):
        self.buffer, self.path, self.at, self.size = buffer, path, 0, len(buffer)

    def fail(self, what: str) -> InputError:
        return InputError(f"{self.path}: damaged or truncated GGUF: {what} (at byte {self.at} of {self.size}); "
                          "fetch or copy the file again")

    def need(self, nbytes: int, what: str) -> None:
        if nbytes > self.size - self.at:
            raise self.fail(f"{what} wants {nbytes} bytes, {self.size - self.at} are left")

    def number(self, code: str, what: str) -> Any:
        size = struct.calcsize("<" + code)
        self.need(size, what)
        (value,) = struct.unpack_from("<" + code, self.buffer, self.at)
        self.at += size
        return value

    def string(self, what: str) -> str:
        length = self.number("Q", what)
        self.need(length, what)
        raw = self.buffer[self.at : self.at + length]
        self.at += length
        return raw.decode("utf-8", errors="replace")

    def value(self, kind: int, what: str) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind], what)
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            raise self.fail(f"{what} has the unknown type {kind}")
        item, count = self.number("I", what), self.number("Q", what)
        if item == _STRING:
            self.need(8 * count, f"{what}, {count} strings,")
            return [self.string(what) for _ in range(count)]
        if item not in _SCALARS:  # arrays of arrays are allowed by the format and used by nobody
            raise self.fail(f"{what} is an array of the type {item}")
        self.need(count * struct.calcsize("<" + _SCALARS[item]), f"{what}, {count} items,")
        code = f"<{count}{_SCALARS[item]}"
        values = struct.unpack_from(code, self.buffer, self.at)
        self.at += struct.calcsize(code)
        return list(values)


def read_gguf(path: str | Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """The metadata and the tensors' places of a GGUF file, version 2 or 3 (github.com/ggml-org/ggml, docs/gguf.md).

    Raises InputError, naming the field, for a file whose counts, sizes, offsets or names cannot be.
    """
    path = Path(path)
    status = path.stat()
    return _read_gguf(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=2)  # the tokenizer and the weights both want it, and it takes half a second
def _read_gguf(path: Path, changed: int, size: int) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{path}: not a GGUF file (it does not begin with the letters GGUF)")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            return _read_header(_Walk(buffer, path))


def _read_header(walk: _Walk) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    walk.at = 4
    version = walk.number("I", "the version")
    if version not in (2, 3):
        raise InputError(f"{walk.path}: GGUF version {version}; versions 2 and 3 are read here")
    n_tensors, n_pairs = walk.number("Q", "the tensor count"), walk.number("Q", "the metadata count")
    # The smallest records: a pair is a name's length, a type and a byte; a tensor one dimension and a one-byte name.
    walk.need(13 * n_pairs, f"metadata of {n_pairs} entries")
    walk.need(32 * n_tensors, f"a list of {n_tensors} tensors")
    metadata: dict[str, Any] = {}
    for _ in range(n_pairs):
        key = walk.string("a metadata key")
        if key in metadata:
            raise walk.fail(f"the key {key!r} stands there twice")
        metadata[key] = walk.value(walk.number("I", key), key)
    records: dict[str, _Record] = {}
    for _ in range(n_tensors):
        name = walk.string("a tensor's name")
        if name in records:
            raise walk.fail(f"the tensor {name!r} stands there twice")
        n_dims = walk.number("I", name)
        if not 1 <= n_dims <= 4:
            raise walk.fail(f"{name} has {n_dims} dimensions, 1 to 4 are possible")
        dims = [walk.number("Q", name) for _ in range(n_dims)]
        records[name] = (tuple(reversed(dims)), walk.number("I", name), walk.number("Q", name))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise walk.fail(f"general.alignment is {alignment}, which is not a power of two")
    data_start = -(-walk.at // alignment) * alignment
    return metadata, _place_tensors(walk, records, data_start, alignment)


def _place_tensors(
    walk: _Walk, records: dict[str, _Record], data_start: int, alignment: int
) -> dict[str, GGUFTensor]:
    from gguf.constants import GGML_QUANT_SIZES

    block_sizes = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
    tensors = {}
    for name, (shape, kind, offset) in records.items():
        if kind not in block_sizes:
            raise walk.fail(f"{name} has the unknown quantisation {kind}")
        per_block, block_bytes = block_sizes[kind]
        count = 1
        for n in shape:
            count *= n  # Python's integers do not overflow
        if count == 0 or shape[-1] % per_block:
            raise walk.fail(f"{name} has the shape {shape}, its rows are not a multiple of {per_block}")
        nbytes = count // per_block * block_bytes
        if offset % alignment or data_start + offset + nbytes > walk.size:
            raise walk.fail(f"{name} lies at {offset} + {nbytes} bytes, the file has {walk.size - data_start} for data")
        tensors[name] = GGUFTensor(shape, kind, data_start + offset, nbytes)
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start < end:
            raise walk.fail(f"{name} overlaps the tensor before it")
        end = tensor.start + tensor.nbytes
    return tensors
