"""tokenizer.py against sentencepiece, tokenizers and transformers, on tiny tokenizers trained here."""

import io
import json
import re
from types import SimpleNamespace

import pytest
import sentencepiece
import tiny
from conftest import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from config import LlamaConfig
from tokenizer import Tokenizer, check_vocabulary

CORPUS = [
    "the film is a good film and the story is well told", "a bad story, badly told; it isn't a film at all!",
    "in 1999 in 1999 in 1999 in 1999 the hero was 42 years old", "the naïve café of the north",
    "wonderful, wonderful performances",
] * 4
TEXTS = [
    "the good film", "", " ", "a", "   three  spaces  ", "isn't it? 1999, 12345!", "naïve café ☕", "我们 😀 \u200d x",
    "tabs\tand\nnew lines\n\n", "Ünïcode ſtrange ﬁ", "\u00a0 \u3000 odd spaces\u2009",
    "don't DON'T we'll 'tis", "▁ ▁▁x",
]
# Without the names of control tokens, which hypothesis copies from this file: a GGUF's are matched in a text, as
# transformers matches them, and sentencepiece spells them.
CONTROL = ("<s>", "</s>", "<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>")
any_text = (st.text(max_size=40) | st.text("the film is godab'▁ \n19é", max_size=40)).filter(
    lambda text: not any(name in text for name in CONTROL))


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    """A SentencePiece BPE with the settings of Llama 2's: text as it is ("identity": sentencepiece's own default
    would fold odd spaces and letters, which no GGUF and no Llama does), bytes for unknown letters."""
    path, model = tmp_path_factory.mktemp("spm") / "tokenizer.model", io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=360, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, minloglevel=2)
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def judge(spm):
    return sentencepiece.SentencePieceProcessor(model_file=str(spm))


@pytest.fixture(scope="module")
def spm_gguf(judge, tmp_path_factory):
    """The same pieces, scores and types in a GGUF, as llama.cpp's converter writes them."""
    def kind(i):
        return (3 if judge.is_control(i) else 2 if judge.is_unknown(i) else 6 if judge.is_byte(i) else 1)

    def add(writer):
        writer.add_tokenizer_model("llama")
        words = range(judge.vocab_size())
        writer.add_token_list([judge.id_to_piece(i) for i in words])
        writer.add_token_scores([judge.get_score(i) for i in words])
        writer.add_token_types([kind(i) for i in words])
        writer.add_bos_token_id(judge.bos_id())
        writer.add_eos_token_id(judge.eos_id())
        writer.add_unk_token_id(judge.unk_id())

    return tiny.write_gguf(tmp_path_factory.mktemp("gguf") / "spm.gguf", tiny.hf_model(), change=add)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """SmolLM's kind: byte-level BPE, digits one by one. (tokenizers' own object, the folder of its tokenizer.json)"""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    assert backend.token_to_id("Ġ1999")  # so that it shows when digits, from here on, are not split
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    folder = tmp_path_factory.mktemp("bpe")
    backend.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "pad_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special), encoding="utf-8")
    return backend, folder


@pytest.fixture(scope="module")
def bpe_gguf(bpe, tmp_path_factory):
    backend, _ = bpe
    model = json.loads(backend.to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].get)

    def add(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(words)
        writer.add_token_types([3 if w.startswith("<|") else 1 for w in words])
        writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(2)
        writer.add_add_bos_token(False)

    return tiny.write_gguf(tmp_path_factory.mktemp("gguf") / "bpe.gguf", tiny.hf_model(), change=add)


def ids(tokenizer, text):
    return tokenizer.encode(text, bos=False, eos=False)


# --------------------------------------------------------------------------- against the judges


def test_a_sentencepiece_model_equals_sentencepiece(spm, judge):
    tokenizer = Tokenizer(tokenizer_model=spm)
    assert tokenizer.n_words == judge.vocab_size() and (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.add_bos
    for text in TEXTS:
        want = judge.encode(text)
        assert tokenizer.encode(text, bos=True, eos=True) == [1, *want, 2]
        assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == judge.decode(want)


def test_a_gguf_of_the_llama_kind_equals_sentencepiece(spm_gguf, judge):
    tokenizer = Tokenizer(tokenizer_model=spm_gguf)
    assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (360, 1, 2, True)

    @settings(max_examples=400, deadline=None)
    @given(any_text)
    def equal(text):
        want = judge.encode(text)
        assert ids(tokenizer, text) == want
        assert tokenizer.decode(want) == judge.decode(want)

    equal()
    for text in TEXTS:
        assert ids(tokenizer, text) == judge.encode(text)


def test_a_gguf_of_the_gpt2_kind_and_a_tokenizer_json_equal_the_tokenizers_library(bpe, bpe_gguf):
    backend, folder = bpe
    from_gguf, from_json = Tokenizer(tokenizer_model=bpe_gguf), Tokenizer(tokenizer_model=folder)
    for tokenizer in (from_gguf, from_json):
        assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (340, 1, 2, 2)
        assert not tokenizer.add_bos

    @settings(max_examples=200, deadline=None)
    @given(any_text)
    def equal(text):
        want = backend.encode(text).ids
        assert ids(from_gguf, text) == want and ids(from_json, text) == want
        assert from_gguf.decode(want) == text and from_json.decode(want) == text

    equal()


def test_a_gguf_of_the_gpt2_kind_equals_transformers(bpe_gguf):
    """But for digits: transformers splits words as GPT-2 does whatever the GGUF says (SmolLM's own vocabulary, which
    has no word of two digits, hides it)."""
    theirs = tiny.transformers().AutoTokenizer.from_pretrained(bpe_gguf.parent, gguf_file=bpe_gguf.name)
    tokenizer = Tokenizer(tokenizer_model=bpe_gguf)
    for text in (text for text in TEXTS if "1" not in text):
        assert ids(tokenizer, text) == theirs(text, add_special_tokens=False)["input_ids"]


# --------------------------------------------------------------------------- the interface


@pytest.fixture(params=["spm", "spm_gguf", "bpe_gguf", "bpe"])
def path(request):
    found = request.getfixturevalue(request.param)
    return found[1] if request.param == "bpe" else found


def test_a_saved_tokenizer_comes_back_as_the_same(path, tmp_path):
    before = Tokenizer(tokenizer_model=path)
    before.save(tmp_path)
    after = Tokenizer(tokenizer_model=tmp_path)
    for name in ("n_words", "bos_id", "eos_id", "pad_id", "add_bos"):
        assert getattr(after, name) == getattr(before, name), name
    for text in TEXTS:
        numbers = before.encode(text, bos=True, eos=True)
        assert after.encode(text, bos=True, eos=True) == numbers and after.decode(numbers) == before.decode(numbers)


def test_many_texts_at_once_are_encoded_as_one_by_one_and_cut_after_max_len(path):
    whole = Tokenizer(tokenizer_model=path)
    for max_len in (1, 4, 1000):
        tokenizer = Tokenizer(max_len, path)
        rows = tokenizer.encode_batch(TEXTS, bos=True, eos=True)
        assert rows == [tokenizer.encode(text, bos=True, eos=True) for text in TEXTS]
        assert rows == [[1, *ids(whole, text)[:max_len], 2] for text in TEXTS]


@settings(max_examples=60, deadline=None)
@given(text=any_text | st.sampled_from(TEXTS))
def test_the_spans_say_where_each_token_is(spm, spm_gguf, bpe, bpe_gguf, text):
    """As many as there are tokens, in the text, never backwards, and no letter is left out; where a token is a whole
    piece of the text, it is the one at its place."""
    for path in (spm, spm_gguf, bpe[1], bpe_gguf):
        tokenizer = Tokenizer(tokenizer_model=path)
        spans, tokens = tokenizer.spans(text), tokenizer.encode(text, bos=False, eos=False)
        assert len(spans) == len(tokens)
        assert all(0 <= begin <= end <= len(text) for begin, end in spans)
        assert [begin for begin, _ in spans] == sorted(begin for begin, _ in spans)
        inside = {i for begin, end in spans for i in range(begin, end)}
        assert {i for i, c in enumerate(text) if c.isalnum()} <= inside
        for (begin, end), token in zip(spans, tokens, strict=True):
            said = tokenizer.decode([token]).strip()
            if said.isalnum() and said.isascii():
                assert said == text[begin:end].strip(" \u2581")


def test_a_continuation_is_what_follows_in_the_whole_sentence(path):
    tokenizer = Tokenizer(tokenizer_model=path)
    for word in ("good", "bad", "wonderful", "naïve", "xyz"):
        whole = ids(tokenizer, f"the film is {word}")
        assert ids(tokenizer, "the film is") + tokenizer.encode_continuation(word) == whole
        assert tokenizer.decode(tokenizer.encode_continuation(word)).strip() == word


# --------------------------------------------------------------------------- files that are refused


@pytest.mark.parametrize("name", ["x.model", "x.json", "x.gguf"])
@pytest.mark.parametrize("content", [b"", b"no tokenizer", b"{}", b"\x00" * 99, b"GGUF"])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        Tokenizer(tokenizer_model=tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_a_missing_tokenizer_is_named(tmp_path):
    for path in (tmp_path, tmp_path / "none.model"):
        with pytest.raises(FileNotFoundError) as caught:
            Tokenizer(tokenizer_model=path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("settings", ["{", "[1]", "3", '{"bos_token": 5}', '{"eos_token": {"content": ["a"]}}',
                                      '{"pad_token": true}', '{"add_bos_token": "yes"}'])
def test_a_tokenizer_config_that_is_no_json_object_is_refused(bpe, tmp_path, settings):
    bpe[0].save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    with pytest.raises(ValueError, match="tokenizer_config.json"):
        Tokenizer(tokenizer_model=tmp_path)


def doubling(steps: int) -> dict:
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    return {"type": "Sequence", "normalizers": steps * [double]}


@pytest.mark.parametrize("part", [
    {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "ab"}},  # panics at every text
    {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a|aa|a*)+(a+)+$"}, "content": "b"}},  # without an end
    {"normalizer": doubling(60)},
    {"normalizer": {"type": "Sequence", "normalizers": [doubling(8), doubling(8), {"type": "NFC"}]}},
    {"normalizer": {"type": "Sequence", "normalizers": 60 * [
        {"type": "Replace", "pattern": {"Regex": "(?<=a)"}, "content": "a"}]}},
    {"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}},
    {"decoder": {"type": "Sequence", "decoders": doubling(60)["normalizers"]}},
    {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "none"}},
    {"normalizer": 3}, {"model": 3}, {"added_tokens": [{"id": -1}]},
], ids=lambda part: json.dumps(part)[:70])
def test_a_hostile_tokenizer_json_is_named_and_ends(bpe, tmp_path, part):
    """The library panics (which is no Exception), raises a bare Exception, or would run for ever."""
    path = tmp_path / "tokenizer.json"
    bpe[0].save(str(path))
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **part}), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        Tokenizer(tokenizer_model=path).encode_batch(["aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa!", "b"], True, True)


def test_the_steps_of_real_normalisers_are_no_growth(bpe, tmp_path):
    """T5's, XLNet's and Llama's: none is refused for the number of its steps."""
    clean = [{"type": "Replace", "pattern": {"String": text}, "content": new} for text, new in (
        ("``", '"'), ("''", '"'), (" ", "▁"), ("\u00a0", " "), ("\t", " "))]
    clean += [{"type": "Replace", "pattern": {"Regex": regex}, "content": new} for regex, new in (
        (" {2,}", "▁"), ("[\r\n]+", " "), ("\\s+", " "), ("^ +", ""), ("(…|\\.\\.\\.)", "..."))]
    steps = [{"type": "Prepend", "prepend": "▁"}, {"type": "NFKC"}, {"type": "Strip", "strip_left": True,
             "strip_right": True}, *clean]
    path = tmp_path / "tokenizer.json"
    bpe[0].save(str(path))
    whole = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**whole, "normalizer": {"type": "Sequence", "normalizers": steps}}), encoding="utf-8")
    assert Tokenizer(tokenizer_model=path).n_words


def bad_spm(judge, **what):
    def add(writer):
        n = judge.vocab_size()
        says = dict(tokenizer_model="llama", token_list=[judge.id_to_piece(i) for i in range(n)],
                    token_scores=[0.0] * n, token_types=[1] * n)
        for name, value in {**says, **what}.items():
            getattr(writer, f"add_{name}")(value)
    return add


@pytest.mark.parametrize("what", [
    dict(token_scores=[0.5]), dict(token_types=[1]), dict(unk_token_id=10**6), dict(bos_token_id=10**6),
    dict(eos_token_id=2**32 - 1), dict(tokenizer_model="bert"), dict(tokenizer_model="gpt2", token_merges=["a"]),
    dict(tokenizer_model="gpt2", token_merges=["no such"]), dict(tokenizer_model="gpt2", tokenizer_pre="qwen2"),
], ids=str)
def test_a_gguf_whose_tokenizer_cannot_be_is_refused(judge, tmp_path, what):
    path = tiny.write_gguf(tmp_path / "bad.gguf", tiny.hf_model(), change=bad_spm(judge, **what))
    with pytest.raises(ValueError) as caught:
        Tokenizer(tokenizer_model=path)
    assert str(path) in str(caught.value)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes_in_a_tokenizer_are_refused_or_harmless(tmp_path_factory, spm_gguf, bpe_gguf, flips):
    for source in (spm_gguf, bpe_gguf):
        path, damaged = tmp_path_factory.getbasetemp() / "flipped.gguf", bytearray(source.read_bytes())
        for where, mask in flips:
            damaged[int(where * damaged.index(b"output_norm.weight"))] ^= mask
        path.write_bytes(damaged)
        try:
            Tokenizer(tokenizer_model=path)
        except ValueError as error:
            assert str(path) in str(error)


def test_a_tokenizer_with_more_words_than_the_embedding_is_refused():
    tokenizer = SimpleNamespace(n_words=97, path="some/tokenizer.json")
    with refused("some/tokenizer.json", "97 words.* 96"):
        check_vocabulary(tokenizer, LlamaConfig(vocab_size=96))
    check_vocabulary(tokenizer, LlamaConfig(vocab_size=97))
