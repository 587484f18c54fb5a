"""A tokenizer for other programs: as transformers reads it, and as the metadata of a GGUF."""

import json
from pathlib import Path
from typing import Any

from config import InputError
from tokenizer import SPLIT_LLAMA3, Tokenizer, from_gguf_spm

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
# What the written tokenizer must split as ours does, before anything is exported.
SAMPLES = (
    "a charming film", "It isn't dull, is it? We'll see: 'tis 1999, 12345 and 3.14!", "   three  spaces   inside  ",
    "tabs\tand\nnew lines\n\n\r\n", "Ünïcode naïve café ſtrange ﬁ ½ ²", "我们喜欢这部电影。", "Привет, мир", "مرحبا",
    "नमस्ते दुनिया", "한국어 영화", "👍🏽 😀 e\u0301", "\u00a0 \u3000 odd spaces\u2009", "<unk> [UNK] ▁ ▁▁x", "HTTP://a.b/c_d-e#f",
    "x" * 40, "DON'T Shout!!! ... (really?) [no] {ok}", "a\x00b \x7f \ufeff",
)

# --------------------------------------------------------------------------- transformers


def write_hf(folder: Path, tokenizer: Tokenizer, longest: int) -> int:
    """tokenizer.json and tokenizer_config.json, for which `AutoTokenizer` gives our token numbers, with the begin token
    where ours puts one. `longest`: how many tokens a model sees at most. Returns the number of the padding token.

    Raises InputError for a tokenizer that cannot be said there.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import processors

    content = tokenizer.as_json()
    is_spm = content is None
    backend = from_gguf_spm(spm_metadata(tokenizer.path), tokenizer.path) if content is None else (
        Backend.from_str(json.dumps(content)))
    name_of = backend.id_to_token
    bos = name_of(tokenizer.bos_id) if tokenizer.bos_id >= 0 else None
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A" if tokenizer.add_bos else "$A", pair=f"{bos} $A $B" if tokenizer.add_bos else "$A $B",
        special_tokens=[(bos, tokenizer.bos_id)] if tokenizer.add_bos else [])
    pad = padding(tokenizer, content)
    (folder / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8", newline="\n")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "padding_side": "right", "truncation_side": "right",
        "model_max_length": longest, "clean_up_tokenization_spaces": False, "bos_token": bos,
        "eos_token": name_of(tokenizer.eos_id) if tokenizer.eos_id >= 0 else None, "pad_token": name_of(pad),
        "add_bos_token": tokenizer.add_bos,
        # SentencePiece has no control token in a text: "</s>" is spelt there
        "split_special_tokens": is_spm,
    }
    text = json.dumps({name: value for name, value in settings.items() if value is not None}, indent=1) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    check_same(tokenizer, Tokenizer(tokenizer_model=folder / "tokenizer.json"))
    return pad


def padding(tokenizer: Tokenizer, content: dict[str, Any] | None) -> int:
    """The number of a token that no sentence ends with: transformers pools at the last one that is another. So it is a
    special token, which is in a text only where somebody spells its name (of SentencePiece: never). `content`: of the
    tokenizer.json.

    One whose name says so, else the one that we pad with, else the end token, else any, and the begin token last.
    Raises InputError where there is none.
    """
    names = dict.fromkeys((tokenizer.eos_id, tokenizer.bos_id), "") if content is None else {
        token["id"]: token["content"] for token in content["added_tokens"] if token["special"]}
    names.pop(-1, None)
    if not names:
        raise InputError(f"{tokenizer.path}: this tokenizer has no special token that could fill short sentences up, "
                         "which transformers needs; name a tokenizer.json with one (--tokenizer)")
    return min(names, key=lambda number: (number == tokenizer.bos_id, "pad" not in names[number].lower(),
                                          number != tokenizer.pad_id, number != tokenizer.eos_id, number))


def check_same(ours: Tokenizer, written: Tokenizer) -> None:
    """Raises InputError where the tokenizer that was written splits a text in another way than ours."""
    for text in SAMPLES:
        was, now = (one.encode(text, bos=True, eos=False) for one in (ours, written))
        if was != now:
            raise InputError(f"{ours.path}: this tokenizer cannot be written in that format: {text!r} becomes {now}, "
                             f"and should become {was}")


# --------------------------------------------------------------------------- GGUF


def gguf_metadata(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """The metadata tokenizer.ggml.* of a GGUF whose embedding has `vocab_size` rows. Raises InputError for a tokenizer
    that llama.cpp has no kind for."""
    content = tokenizer.as_json()
    found = spm_metadata(tokenizer.path) if content is None else json_metadata(content, tokenizer.path)
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    more = vocab_size - len(tokens)  # the embedding may have more rows than there are words
    tokens += [f"[PAD{len(tokens) + i}]" for i in range(more)]
    kinds += [UNUSED] * more
    if scores := found.get("tokenizer.ggml.scores"):
        scores += [-10000.0] * more
    found |= {f"tokenizer.ggml.{name}_token_id": number for name, number in (
        ("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)) if number >= 0}
    if kinds[tokenizer.pad_id] == CONTROL:
        found["tokenizer.ggml.padding_token_id"] = tokenizer.pad_id
    found["tokenizer.ggml.add_bos_token"] = tokenizer.add_bos
    found["tokenizer.ggml.add_eos_token"] = False
    return found


def spm_metadata(path: Path) -> dict[str, Any]:
    """Of a SentencePiece .model: the kind `llama`. Raises InputError for one that is not as Llama's are: unigram, text
    that is normalised, symbols of a user."""
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # which makes its classes as it is imported
    said = messages.ModelProto.FromString(path.read_bytes())
    normalizer, fault = said.normalizer_spec, ""
    if said.trainer_spec.model_type != said.trainer_spec.BPE:
        fault = "its pieces are not joined in pairs (it is no BPE)"
    elif normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces or not normalizer.escape_whitespaces:
        fault = f"it changes texts first (rule {normalizer.name!r}, or spaces are removed)"
    elif said.trainer_spec.treat_whitespace_as_suffix:
        fault = "its spaces stand behind the words"
    elif any(piece.type == piece.USER_DEFINED for piece in said.pieces):
        fault = "it has symbols of a user"
    if fault:
        raise InputError(f"{path}: a SentencePiece model of another kind than Llama's: {fault}; it is not exported")
    kinds = {said.SentencePiece.UNKNOWN: UNKNOWN, said.SentencePiece.CONTROL: CONTROL,
             said.SentencePiece.UNUSED: UNUSED, said.SentencePiece.BYTE: BYTE}
    return {"tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": [piece.piece for piece in said.pieces],
            "tokenizer.ggml.scores": [piece.score for piece in said.pieces],
            "tokenizer.ggml.token_type": [kinds.get(piece.type, NORMAL) for piece in said.pieces],
            "tokenizer.ggml.unknown_token_id": SentencePieceProcessor(model_file=str(path)).unk_id(),
            "tokenizer.ggml.add_space_prefix": normalizer.add_dummy_prefix}


def json_metadata(described: dict[str, Any], path: Path) -> dict[str, Any]:
    """Of the contents of a tokenizer.json: the kind `gpt2`, byte-level BPE, or `llama`, BPE on whole characters with
    bytes for unknown ones."""
    model = described["model"]
    if model.get("type", "BPE") != "BPE":
        raise InputError(f"{path}: its tokenizer is of the kind {model.get('type')!r}; a GGUF has byte-level BPE and "
                         "SentencePiece's BPE")
    numbers = {number: token for token, number in model["vocab"].items()}
    kinds = dict.fromkeys(numbers, NORMAL)
    for token in described.get("added_tokens", []):
        numbers[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    found: dict[str, Any] = {}
    if model.get("byte_fallback"):
        kind, pre = "llama", "default"
        for number, token in numbers.items():
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                kinds[number] = BYTE
        unknown = model["vocab"].get(model.get("unk_token"), 0)
        kinds[unknown] = UNKNOWN
        # Of two pairs llama.cpp joins the one whose joined piece has the higher score.
        rank: dict[str, int] = {}
        for i, merge in enumerate(merges):
            rank.setdefault("".join(merge.split(" ", 1)), i)
        found["tokenizer.ggml.scores"] = [-float(rank.get(numbers.get(i, ""), len(merges)))
                                          for i in range(max(numbers) + 1)]
        found["tokenizer.ggml.unknown_token_id"] = unknown
        found["tokenizer.ggml.add_space_prefix"] = has_space_prefix(described, path)
    else:
        kind, pre = "gpt2", kind_of_split(described, path)
        found["tokenizer.ggml.merges"] = merges
    size = range(max(numbers) + 1)
    return {"tokenizer.ggml.model": kind, "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": [numbers.get(i, f"[PAD{i}]") for i in size],
            "tokenizer.ggml.token_type": [kinds.get(i, UNUSED) for i in size], **found}


def kind_of_split(described: dict[str, Any], path: Path) -> str:
    """tokenizer.ggml.pre of a byte-level BPE: how it cuts a text into words before it joins letters."""
    step = described.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", [step])
    shape = [(one.get("type"), one.get("individual_digits"), (one.get("pattern") or {}).get("Regex"),
              one.get("behavior"), one.get("use_regex"), one.get("add_prefix_space")) for one in steps]
    words, plain = ("ByteLevel", None, None, None, True, False), ("ByteLevel", None, None, None, False, False)
    known = {"smollm": [("Digits", True, None, None, None, None), words], "gpt-2": [words],
             "llama-bpe": [("Split", None, SPLIT_LLAMA3, "Isolated", None, None), plain]}
    for name, wanted in known.items():
        if shape == wanted and not described.get("normalizer"):
            return name
    raise InputError(f"{path}: llama.cpp has no name here for how this tokenizer cuts texts into words ({steps}, "
                     f"normalizer {described.get('normalizer')}); known: {', '.join(known)}")


def has_space_prefix(described: dict[str, Any], path: Path) -> bool:
    """Does a BPE on characters put a space in front of each text? Raises InputError for one that changes texts in
    another way than SentencePiece's."""
    step, split = described.get("normalizer") or {}, described.get("pre_tokenizer") or {}
    steps = step.get("normalizers", [step] if step else [])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Prepend", "prepend": "▁"}
    if not split and steps in ([prepend, replace], [replace]):
        return steps[0] == prepend
    if not steps and split.get("type") == "Metaspace" and split.get("replacement") == "▁" and not split.get("split"):
        return split.get("prepend_scheme") != "never"
    raise InputError(f"{path}: this tokenizer changes texts as no SentencePiece does (normalizer {step}, pre_tokenizer "
                     f"{split}); a GGUF cannot say it")
