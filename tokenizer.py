"""One small interface over three kinds of tokenizer: SentencePiece `.model`, `tokenizer.json`, and the one in a GGUF.

The tokenizer of a GGUF stands in the file's header, see `formats/gguf.py`.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from config import InputError, LlamaConfig, counted
from formats.gguf import read_gguf
from formats.memory import is_out_of_memory

# --------------------------------------------------------------------------- the three kinds

TOKENIZER_MODEL = "tokenizer.model"
# Split at digits one by one, then as GPT-2 does (Radford et al. 2019): SmolLM's pre-tokenizer. Others below.
SPLIT_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _gguf_vocabulary(metadata: dict[str, Any], path: Path) -> list[str]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not isinstance(tokens[0], str):  # a list has one type
        raise InputError(f"{path}: the GGUF has no tokenizer in it; name one with --tokenizer")
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
        first: list[Any] = [pre_tokenizers.Digits(individual_digits=True)]
    elif kind == "llama-bpe":
        first = [pre_tokenizers.Split(Regex(SPLIT_LLAMA3), "isolated")]
    elif kind in ("default", "gpt-2"):
        first = []
    else:
        raise InputError(f"{path}: its tokenizer splits words as {kind!r}; known here: smollm, llama-bpe, gpt-2. "
                         "Name a tokenizer.json with --tokenizer")
    backend = Backend(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def from_gguf_spm(metadata: dict[str, Any], path: Path):
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
    """Inside, whatever the `tokenizers` library stumbles over in a file becomes an InputError that names it.

    It raises a bare Exception for what it notices. A panic of its Rust code is a PanicException, which is none: it
    derives from BaseException. (Rust has then written its own lines on stderr.)
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except BaseException as error:
        if is_out_of_memory(error) or not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        raise InputError(f"{path}: {what} ({str(error)[:200] or type(error).__name__}); fetch or copy the file again, "
                         "or name another with --tokenizer") from None


MOST_GROWTH = 10_000  # how many times longer a normaliser may make a text; real ones stay below 10


def _check_growth(path: Path) -> None:
    """Raises InputError for a tokenizer.json whose normaliser (or decoder) lengthens texts without bound: of 60 steps
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
        raise InputError(f"{path}: not a tokenizer.json ({error})") from None
    if too_long:
        raise InputError(f"{path}: its normaliser or decoder makes a text more than {MOST_GROWTH} times as long; no "
                         "tokenizer does that: fetch or copy the file again, or name another with --tokenizer")


class Tokenizer:
    """Text to token numbers and back.

    `tokenizer_model`: a SentencePiece `.model`, a `tokenizer.json`, a `.gguf`, or a folder that holds one of the
    first two; None: `tokenizer.model` in this folder. `max_len` cuts a sentence after that many tokens, the
    begin and end tokens not counted. `add_bos`: what the model saw in front of its texts, as the file says it.
    Attributes: `n_words`, `bos_id`, `eos_id`, `pad_id`, `max_len`, `add_bos`.
    Raises FileNotFoundError for a missing file and InputError for one that is not a tokenizer.
    """

    def __init__(self, max_len: int | None = None, tokenizer_model: str | Path | None = None):
        path = Path(tokenizer_model or TOKENIZER_MODEL)
        if path.is_dir():
            path = next((path / n for n in ("tokenizer.json", TOKENIZER_MODEL) if (path / n).exists()), path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: there is no tokenizer here; fetch the one of the stories models with "
                                    "`python data/prepare.py stories42M`, or name one with --tokenizer")
        self.path, self.max_len = path, max_len
        self._backend: Any = None  # a tokenizers.Tokenizer, or
        self._sentencepiece: Any = None  # a SentencePieceProcessor
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
            raise InputError(f"{self.path}: not a SentencePiece model ({error})") from None
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
                    raise InputError(f"{file}: not a JSON object ({error})") from None
                if not isinstance(found, dict):
                    raise InputError(f"{file}: not a JSON object (found a {type(found).__name__})")
                for key in ("bos_token", "eos_token", "pad_token"):
                    token = found.get(key)
                    token = token.get("content") if isinstance(token, dict) else token
                    if not isinstance(token, str | None):
                        raise InputError(f"{file}: {key} is {found[key]!r:.60}, expected a text")
                if not isinstance(found.get("add_bos_token"), bool | None):
                    raise InputError(f"{file}: add_bos_token is {found['add_bos_token']!r:.60}, expected true or false")
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
        makers = {"gpt2": _from_gguf_bpe, "llama": from_gguf_spm}
        if kind not in makers:
            raise InputError(f"{self.path}: its tokenizer is of the kind {kind!r}; known here: gpt2 and llama. "
                             "Name another with --tokenizer")
        tokens = _gguf_vocabulary(metadata, self.path)
        kinds = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
        numbers = [metadata.get(f"tokenizer.ggml.{name}_token_id", default)
                   for name, default in (("bos", -1), ("eos", -1), ("padding", 0), ("unknown", 0))]
        if not isinstance(kinds, list) or not all(type(i) is int and -1 <= i < len(tokens) for i in numbers):
            raise InputError(f"{self.path}: its tokenizer's token types are not a list, or a special token's number "
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

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where in the text each token of `encode(text, bos=False, eos=False)` begins and ends, in characters; tokens
        that are parts of one character have its place each."""
        if self._sentencepiece is not None:
            found = list(self._sentencepiece.encode(text, return_type="offset_mapping")["offsets"])
            for i in range(len(found) - 2, -1, -1):  # all bytes of a letter but the last have no place of their own
                if found[i][0] == found[i][1]:
                    found[i] = found[i + 1]
            return found[: self.max_len]
        with _faults_named(self.path, "it cannot tokenise the texts"):
            return list(self._backend.encode(text, add_special_tokens=False).offsets)[: self.max_len]

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

    def as_json(self) -> dict[str, Any] | None:
        """What a tokenizer.json of it holds; None for a SentencePiece model."""
        return None if self._backend is None else json.loads(self._backend.to_str())

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


def check_vocabulary(tokenizer: Tokenizer, config: LlamaConfig) -> None:
    """Raises InputError for a tokenizer that knows more words than the embedding has rows, added ones included."""
    if tokenizer.n_words > config.vocab_size:
        raise InputError(f"{tokenizer.path}: the tokenizer numbers {counted(tokenizer.n_words, 'word')}, the model's "
                         f"embedding has only {config.vocab_size} rows; they do not belong together (--tokenizer names "
                         "another)")
