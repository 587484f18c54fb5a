"""One small interface over three kinds of tokenizer: SentencePiece `.model`, `tokenizer.json`, and the one in a GGUF.

The tokenizer of a GGUF lies in the file's header, so the header is read here, and `checkpoint.py` finds the
tensors with the same function. The `gguf` package's own reader takes seconds for that header and believes the
counts in it; this one walks it once and checks every count and size against the file before using it.
"""

import json
import mmap
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from config import is_out_of_memory

# --------------------------------------------------------------------------- the header of a GGUF


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


class _Walk:
    """Reads little-endian values from a buffer, front to back, never beyond its end."""

    def __init__(self, buffer: mmap.mmap, path: Path):
        self.buffer, self.path, self.at, self.size = buffer, path, 0, len(buffer)

    def fail(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: damaged or truncated GGUF: {what} (at byte {self.at} of {self.size}); "
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

    Raises ValueError, naming the field, for a file whose counts, sizes, offsets or names cannot be.
    """
    path = Path(path)
    status = path.stat()
    return _read_gguf(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=2)  # the tokenizer and the weights both want it, and it takes half a second
def _read_gguf(path: Path, changed: int, size: int) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path}: not a GGUF file (it does not begin with the letters GGUF)")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
            return _read_header(_Walk(buffer, path))


def _read_header(walk: _Walk) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    walk.at = 4
    version = walk.number("I", "the version")
    if version not in (2, 3):
        raise ValueError(f"{walk.path}: GGUF version {version}; versions 2 and 3 are read here")
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
    records: dict[str, tuple] = {}
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


def _place_tensors(walk: _Walk, records: dict[str, tuple], data_start: int, alignment: int) -> dict[str, GGUFTensor]:
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


# --------------------------------------------------------------------------- the three kinds

TOKENIZER_MODEL = "tokenizer.model"
# Split at digits one by one, then as GPT-2 does (Radford et al. 2019): SmolLM's pre-tokenizer. Others below.
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _gguf_vocabulary(metadata: dict[str, Any], path: Path) -> list[str]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):  # a list has one type
        raise ValueError(f"{path}: the GGUF has no tokenizer in it; name one with --tokenizer")
    return tokens


def _from_gguf_bpe(metadata: dict[str, Any], path: Path):
    """A byte-level BPE (tokenizer.ggml.model = gpt2) as a `tokenizers.Tokenizer`."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    tokens = _gguf_vocabulary(metadata, path)
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    kind = metadata.get("tokenizer.ggml.pre", "default")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "llama-bpe")
    if kind == "smollm":
        first = [pre_tokenizers.Digits(individual_digits=True)]
    elif kind == "llama-bpe":
        first = [pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated")]
    elif kind in ("default", "gpt-2"):
        first = []
    else:
        raise ValueError(f"{path}: its tokenizer splits words as {kind!r}; known here: smollm, llama-bpe, gpt-2. "
                         "Name a tokenizer.json with --tokenizer")
    backend = Backend(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _from_gguf_spm(metadata: dict[str, Any], path: Path):
    """A SentencePiece BPE (tokenizer.ggml.model = llama) as a `tokenizers.Tokenizer`.

    SentencePiece joins the adjacent pair whose joined piece has the best score, so every split of a piece into
    two pieces is a merge, ranked by the piece's score.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers

    tokens = _gguf_vocabulary(metadata, path)
    scores = metadata.get("tokenizer.ggml.scores", [0.0] * len(tokens))
    kinds = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    ranked = []
    for i, token in enumerate(tokens):
        if kinds[i] == 1:  # normal pieces only: not the bytes, not the control tokens
            splits = ((token[:k], token[k:]) for k in range(1, len(token)))
            ranked += [(-scores[i], i, pair) for pair in splits if pair[0] in vocabulary and pair[1] in vocabulary]
    ranked.sort()
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    backend = Backend(models.BPE(vocabulary, [pair for *_, pair in ranked], unk_token=unknown, fuse_unk=True,
                                 byte_fallback=True))
    prepend = [normalizers.Prepend("▁")] if metadata.get("tokenizer.ggml.add_space_prefix", True) else []
    backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         *([decoders.Strip(" ", 1, 0)] if prepend else [])])
    return backend


@contextmanager
def _faults_named(path: Path, what: str) -> Iterator[None]:
    """Inside, whatever the `tokenizers` library stumbles over in a file becomes a ValueError that names it.

    It raises a bare Exception for what it notices. A panic of its Rust code is a PanicException, which is none: it
    derives from BaseException. (Rust has then written its own lines on stderr.)
    """
    try:
        yield
    except (ValueError, MemoryError):
        raise
    except BaseException as error:
        if is_out_of_memory(error) or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise ValueError(f"{path}: {what} ({str(error)[:200] or type(error).__name__}); fetch or copy the file again, "
                         "or name another with --tokenizer") from None


MOST_GROWTH = 10_000  # how many times longer a normaliser may make a text; real ones stay below 10


def _check_growth(path: Path) -> None:
    """Raises ValueError for a tokenizer.json whose normaliser (or decoder) lengthens texts without bound: of 60 steps
    that each double every letter the library would never come back, and loading alone can run them. (The library's
    regular expressions have a limit of their own, beyond which they panic.)"""

    def growth(step: Any) -> float:
        if not isinstance(step, dict):
            return 1.0
        total = 1.0
        for steps in (step.get("normalizers"), step.get("decoders")):
            for inner in steps if isinstance(steps, list) else ():
                total *= growth(inner)
        pattern, content = step.get("pattern"), step.get("content")
        if isinstance(content, str) and isinstance(pattern, dict):  # Replace
            text, regex = pattern.get("String"), pattern.get("Regex")
            may_match_nothing = isinstance(regex, str) and any(c in regex for c in "(*?^$|{\\")  # and so only insert
            total *= max(1.0, (len(content) + (content != "" and may_match_nothing))
                         / (len(text) if isinstance(text, str) and text else 1))
        if isinstance(step.get("prepend"), str):  # Prepend
            total *= max(1, len(step["prepend"]))
        return total

    try:
        file = json.loads(path.read_text(encoding="utf-8"))
        parts = [file.get("normalizer"), file.get("decoder")] if isinstance(file, dict) else []
        too_long = any(growth(part) > MOST_GROWTH for part in parts)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a tokenizer.json ({error})") from None
    if too_long:
        raise ValueError(f"{path}: its normaliser or decoder makes a text more than {MOST_GROWTH} times as long; no "
                         "tokenizer does that: fetch or copy the file again, or name another with --tokenizer")


class Tokenizer:
    """Text to token numbers and back.

    `tokenizer_model`: a SentencePiece `.model`, a `tokenizer.json`, a `.gguf`, or a folder that holds one of the
    first two; None: `tokenizer.model` in this folder. `max_len` cuts a sentence after that many tokens, the
    begin and end tokens not counted. `add_bos`: what the model saw in front of its texts, as the file says it.
    Attributes: `n_words`, `bos_id`, `eos_id`, `pad_id`, `max_len`, `add_bos`.
    Raises FileNotFoundError for a missing file and ValueError for one that is not a tokenizer.
    """

    def __init__(self, max_len: int | None = None, tokenizer_model: str | Path | None = None):
        path = Path(tokenizer_model or TOKENIZER_MODEL)
        if path.is_dir():
            path = next((path / n for n in ("tokenizer.json", TOKENIZER_MODEL) if (path / n).exists()), path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no tokenizer here; fetch the one of the stories models with "
                                    "`python data/prepare.py stories42M`, or name one with --tokenizer")
        self.path, self.max_len = path, max_len
        self._backend = self._sentencepiece = None
        if path.suffix == ".json":
            self._load_json()
        elif path.suffix == ".gguf":
            self._load_gguf()
        else:
            self._load_sentencepiece()

    def _load_sentencepiece(self) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._sentencepiece = SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{self.path}: not a SentencePiece model ({error})") from None
        self.n_words = self._sentencepiece.vocab_size()
        self.bos_id, self.eos_id = self._sentencepiece.bos_id(), self._sentencepiece.eos_id()
        self.pad_id = max(self._sentencepiece.piece_to_id("<0x00>"), 0)
        self.add_bos = self.bos_id >= 0

    def _load_json(self) -> None:
        from tokenizers import Tokenizer as Backend

        _check_growth(self.path)
        with _faults_named(self.path, "not a tokenizer.json"):
            self._backend = Backend.from_file(str(self.path))
            self._backend.no_padding()
            self._backend.no_truncation()
            self.n_words = max(self._backend.get_vocab().values(), default=-1) + 1  # numbers may be left out
        settings = self._json_settings()
        self.bos_id, self.eos_id = (self._special(settings.get(name), name) for name in ("bos_token", "eos_token"))
        self.pad_id = max(self._special(settings.get("pad_token"), "pad_token"), 0)
        # Without a setting: does the file's own template put the begin token in front?
        with _faults_named(self.path, "it cannot tokenise a text"):
            template = self._backend.encode("a").ids[:1] == [self.bos_id]
        self.add_bos = bool(settings.get("add_bos_token", template)) and self.bos_id >= 0

    def _json_settings(self) -> dict[str, Any]:
        """tokenizer_config.json and special_tokens_map.json, beside tokenizer.json, where there are any."""
        settings: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            file = self.path.with_name(name)
            if file.is_file():
                try:
                    found = json.loads(file.read_text(encoding="utf-8"))
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{file}: not a JSON object ({error})") from None
                if not isinstance(found, dict):
                    raise ValueError(f"{file}: not a JSON object (found a {type(found).__name__})")
                for key in ("bos_token", "eos_token", "pad_token"):
                    token = found.get(key)
                    token = token.get("content") if isinstance(token, dict) else token
                    if not isinstance(token, str | None):
                        raise ValueError(f"{file}: {key} is {found[key]!r:.60}, expected a text")
                if not isinstance(found.get("add_bos_token"), bool | None):
                    raise ValueError(f"{file}: add_bos_token is {found['add_bos_token']!r:.60}, expected true or false")
                settings.update(found)
        return settings

    def _special(self, token: Any, name: str) -> int:
        """The number of a special token, given as text or as {"content": text}; by its usual names; or -1."""
        token = token.get("content") if isinstance(token, dict) else token
        usual = {"bos_token": ("<s>", "<|begin_of_text|>", "<|im_start|>"),
                 "eos_token": ("</s>", "<|end_of_text|>", "<|im_end|>", "<|endoftext|>")}.get(name, ())
        for text in (token,) if token else usual:
            number = self._backend.token_to_id(text)
            if number is not None:
                return number
        return -1

    def _load_gguf(self) -> None:
        from tokenizers import AddedToken

        metadata, _ = read_gguf(self.path)
        kind = metadata.get("tokenizer.ggml.model")
        makers = {"gpt2": _from_gguf_bpe, "llama": _from_gguf_spm}
        if kind not in makers:
            raise ValueError(f"{self.path}: its tokenizer is of the kind {kind!r}; known here: gpt2 and llama. "
                             "Name another with --tokenizer")
        tokens = _gguf_vocabulary(metadata, self.path)
        kinds = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
        numbers = [metadata.get(f"tokenizer.ggml.{name}_token_id", default)
                   for name, default in (("bos", -1), ("eos", -1), ("padding", 0), ("unknown", 0))]
        if not isinstance(kinds, list) or not all(type(i) is int and -1 <= i < len(tokens) for i in numbers):
            raise ValueError(f"{self.path}: its tokenizer's token types are not a list, or a special token's number "
                             f"is not among its {len(tokens)} tokens: {numbers}")
        with _faults_named(self.path, "its tokenizer cannot be built"):  # merges that are not text, too few scores, ...
            self._backend = makers[kind](metadata, self.path)
            self._backend.add_special_tokens([AddedToken(t, special=True, normalized=False)
                                              for t, k in zip(tokens, kinds, strict=False) if k == 3])
        self.n_words = len(tokens)
        self.bos_id, self.eos_id, self.pad_id, _ = numbers
        self.add_bos = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama") and self.bos_id >= 0

    # ----------------------------------------------------------------------- use

    def encode(self, s: str, bos: bool, eos: bool) -> list[int]:
        """The token numbers of one text, cut after `max_len`, with the begin and end tokens that are asked for."""
        return self.encode_batch([s], bos, eos)[0]

    def encode_batch(self, texts: list[str], bos: bool, eos: bool) -> list[list[int]]:
        """`encode` of many texts at once, in their order; several times as fast. A model that has no begin (or
        end) token gets none."""
        if self._sentencepiece is not None:
            rows = self._sentencepiece.encode(texts)
        else:
            with _faults_named(self.path, "it cannot tokenise the texts"):
                rows = [e.ids for e in self._backend.encode_batch(texts, add_special_tokens=False)]
        before = [self.bos_id] if bos and self.bos_id >= 0 else []
        after = [self.eos_id] if eos and self.eos_id >= 0 else []
        return [before + row[: self.max_len] + after for row in rows]

    def encode_continuation(self, text: str) -> list[int]:
        """The tokens of `text` as a sentence's next word: " good" in a byte-level BPE, "▁good" in SentencePiece."""
        start, whole = self.encode_batch(["is", f"is {text}"], bos=False, eos=False)
        return whole[len(start):]

    def decode(self, t: list[int]) -> str:
        """The text of token numbers; begin, end and other control tokens are left out."""
        t = [i for i in t if i < self.n_words]  # an embedding may have more rows than there are words
        if self._sentencepiece is not None:
            return self._sentencepiece.decode(t)
        with _faults_named(self.path, "it cannot put the text together"):
            return self._backend.decode(t, skip_special_tokens=True)

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer into a folder, so that `Tokenizer(tokenizer_model=folder)` is this one again."""
        folder = Path(folder)
        if self._sentencepiece is not None:
            shutil.copyfile(self.path, folder / TOKENIZER_MODEL)
            return
        self._backend.save(str(folder / "tokenizer.json"))
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        settings = {n: self._backend.id_to_token(i) for n, i in names.items() if i >= 0}
        settings["add_bos_token"] = bool(self.add_bos)
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
