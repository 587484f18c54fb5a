"""--option export, judged by who reads it: transformers, llama.cpp, and a checkpoint in llama2.c's own layout."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import llamacpp
import pytest
import tiny
import torch
from conftest import tiny_sentences, write_split
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_tokenizer import CORPUS

import lora
import run_llama
from classifier import ClassifierConfig, LlamaEmbeddingClassifier, pool
from commands import export_hf
from config import LORA_TARGETS, Base, InputError, LoraConfig
from formats import files, new_folder
from formats.export_hf import hf_config, hf_weights
from formats.gguf import read_gguf
from formats.peft import read_peft
from formats.weights import read_weights
from llama import Llama, load_pretrained
from minllama import load
from tokenizer import Tokenizer
from training import saved

SCALINGS = {"linear": {"kind": "linear", "factor": 2.5},
            "llama3": {"kind": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                       "original_max_seq_len": 16}}
NAMES = ["bad", "fine", "good"]
ROOT = Path(run_llama.__file__).parent
TEXTS = ["the film is good", "a", "dull and awful, a very long mixed one", "naïve café ☕ 我们 1999", "  great  film "]


@pytest.fixture(scope="module")
def tokenizers(tiny_model, tmp_path_factory) -> dict[str, Tokenizer]:
    """bpe: a tokenizer.json; begin: the same with a begin token in front; spm: SentencePiece, as Llama 2's."""
    import sentencepiece

    begin = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("begin") / "model"))
    (begin / "tokenizer_config.json").write_text(json.dumps(
        {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}), encoding="utf-8")
    path, model = tmp_path_factory.mktemp("spm") / "tokenizer.model", io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=360, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True, minloglevel=2)
    path.write_bytes(model.getvalue())
    return {name: Tokenizer(tokenizer_model=place) for name, place in (
        ("bpe", tiny_model), ("begin", begin), ("spm", path))}


def make_run(folder: Path, tokenizer: Tokenizer, pooling: str = "last", loss: str = "ce", bias: bool = False,
             cut: int | None = None, extra_rows: int = 0, **shape) -> Path:
    """A run's best/ with a random classifier whose classes differ."""
    llama = tiny.llama(vocab_size=tokenizer.n_words + extra_rows, **shape)
    described = ClassifierConfig(3, NAMES, pooling, loss, 0.0, cut, llama.config, bias)
    model = LlamaEmbeddingClassifier(described, llama)
    with torch.no_grad():
        model.classifier_head.weight.mul_(5 if loss == "ordinal" else 40)
        if bias:
            model.classifier_head.bias.copy_(torch.tensor([1.0, -2.0, 0.5]))
    saved.save_classifier(folder / "best", model, tokenizer, described)
    return folder


def export(source: Path, folder: Path, *more: str, code: int = 0) -> Path:
    option = "--run" if (source / "best").is_dir() else "--pretrained_model_path"
    words = ["--option", "export", option, source, "--output_dir", folder, *more]
    assert run_llama.main([str(word) for word in words]) == code
    assert not list(folder.parent.glob(f".{folder.name}*")), "nothing half-written is left"
    return folder


def logits_of(run: Path, texts: list[str]) -> torch.Tensor:
    """Our classifier's, in front of the softmax, each text alone."""
    model, tokenizer = load(run).saved.model, load(run).saved.tokenizer
    limit, rows = load(run).longest + tokenizer.add_bos, []
    for text in texts:
        tokens = torch.tensor([tokenizer.encode(text.strip(), bos=tokenizer.add_bos, eos=False)[:limit]])
        with torch.no_grad():
            hidden = model.llama.hidden(tokens)
            rows.append(model.classifier_head(pool(hidden, torch.tensor([tokens.shape[1]]), model.pooling))[0])
    return torch.stack(rows)


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    read = read_weights(path)
    return {name: reader() for name, reader in read.readers.items()}


def same_bits(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name


# --------------------------------------------------------------------------- transformers


@pytest.mark.parametrize("words, shape", [
    ("bpe", {}), ("begin", {"tie_embeddings": False, "n_kv_heads": 4}),
    ("bpe", {"head_dim": 12, "rope_scaling": SCALINGS["llama3"]}), ("bpe", {"rope_scaling": SCALINGS["linear"]}),
    ("spm", {"attention": "bidirectional", "cut": 6}), ("bpe", {"rope_theta": 5e5, "n_kv_heads": 1, "extra_rows": 7}),
])
def test_transformers_classifies_with_our_logits(tokenizers, tmp_path, words, shape):
    """In a batch, whose short sentences are padded, and one by one; ... and reads the classes' names."""
    hf = tiny.transformers()
    run = make_run(tmp_path / "run", tokenizers[words], **shape)
    folder = export(run, tmp_path / "out", "--format", "hf")
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    model = hf.AutoModelForSequenceClassification.from_pretrained(folder)
    want = logits_of(run, TEXTS)
    inputs = tokenizer([text.strip() for text in TEXTS], padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, want, rtol=0, atol=1e-4)
        for text, logits in zip(TEXTS, want, strict=True):
            one = tokenizer(text.strip(), truncation=True, return_tensors="pt")
            torch.testing.assert_close(model(**one).logits[0], logits, rtol=0, atol=1e-4)
    assert want.std(0).min() > 0.1, "another sentence would be told from it"
    assert [model.config.id2label[i] for i in range(3)] == NAMES and model.config.label2id["good"] == 2
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer("a")["input_ids"][-1]


@pytest.mark.parametrize("more", [
    {"pooling": "mean", "attention": "bidirectional"}, {"pooling": "max"}, {"pooling": "first", "bias": True},
    {"bias": True}, {"loss": "ordinal"}, {"loss": "ordinal", "pooling": "mean"}, {}], ids=str)
def test_the_lines_of_the_model_card_give_our_probabilities(tokenizers, tmp_path, monkeypatch, capsys, more):
    tiny.transformers()
    run = make_run(tmp_path / "run", tokenizers["bpe"], **more)
    folder = export(run, tmp_path / "out", "--format", "hf")
    (code,) = re.findall(r"```python\n(.+?)```", (folder / "README.md").read_text(encoding="utf-8"), re.S)
    assert len(code.splitlines()) <= 16
    monkeypatch.chdir(folder)
    found: dict = {}
    exec(code, found)
    want = torch.from_numpy(load(run).predict_proba(found["texts"]))
    torch.testing.assert_close(found["probabilities"], want, rtol=0, atol=1e-5)
    assert capsys.readouterr().out.splitlines()[-1] == str(load(run).predict(found["texts"]).tolist())


def test_what_transformers_has_no_word_for_is_no_sequence_classifier(tokenizers, tmp_path):
    """... so that nobody loads it as one and gets another class."""
    run = make_run(tmp_path / "run", tokenizers["bpe"], pooling="mean")
    folder = export(run, tmp_path / "out", "--format", "hf")
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"] == ["LlamaModel"]
    assert "score.weight" not in load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def auto_tokenizers(tokenizers, tmp_path_factory) -> dict:
    hf, found = tiny.transformers(), {}
    for name, tokenizer in tokenizers.items():
        folder = tmp_path_factory.mktemp(name)
        run = make_run(folder / "run", tokenizer)
        found[name] = hf.AutoTokenizer.from_pretrained(export(run, folder / "out"))
    return found


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30) | st.text("the film is godab'▁ \n19é</s>", max_size=30))
def test_every_text_has_the_same_tokens_in_transformers(tokenizers, auto_tokenizers, text):
    for name, tokenizer in tokenizers.items():
        want = tokenizer.encode(text, bos=tokenizer.add_bos, eos=False)
        assert auto_tokenizers[name](text)["input_ids"] == want, name


@pytest.mark.parametrize("words", ["bpe", "begin", "spm"])
def test_control_tokens_in_a_text_are_what_ours_makes_of_them(tokenizers, auto_tokenizers, words):
    for text in ("<s>", "a </s> b", "end</s>", "<unk>"):
        want = tokenizers[words].encode(text, bos=tokenizers[words].add_bos, eos=False)
        assert auto_tokenizers[words](text)["input_ids"] == want


@pytest.mark.parametrize("more, said", [
    ({"model_type": "unigram"}, "it is no BPE"), ({"normalization_rule_name": "nfkc"}, "it changes texts first"),
    ({"user_defined_symbols": ["film"]}, "it has symbols of a user")])
def test_other_sentencepiece_models_are_refused_by_name(tmp_path, capsys, more, said):
    import sentencepiece

    model = io.BytesIO()
    wanted = {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False, **more}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=80,
                                             minloglevel=2, hard_vocab_limit=False, **wanted)
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    run = make_run(tmp_path / "run", Tokenizer(tokenizer_model=tmp_path / "tokenizer.model"))
    for form in ("hf", "gguf"):
        assert not export(run, tmp_path / "out", "--format", form, code=2).exists()
        assert said in capsys.readouterr().err


# --------------------------------------------------------------------------- PEFT

ALL = tuple(LORA_TARGETS)


def make_lora_run(folder: Path, tokenizer: Tokenizer, lora_config: LoraConfig, pooling: str = "last",
                  base_layers: int = 3, **shape) -> Path:
    """A run with random adapters, on the base in folder/base, a Hugging Face folder of more layers."""
    base = tiny.llama(vocab_size=tokenizer.n_words, n_layers=base_layers, **shape)
    path = pretrained(folder / "base", base, tokenizer)
    llama = load_pretrained(path, 2, attention=shape.get("attention", "causal"), has_output=False)
    described = ClassifierConfig(3, NAMES, pooling, "ce", 0.0, None, llama.config, False, lora_config,
                                 Base(str(path), files.sha256(path)))
    model = LlamaEmbeddingClassifier(described, llama)
    lora.add(llama, lora_config)
    torch.manual_seed(3)
    with torch.no_grad():
        model.classifier_head.weight.mul_(40)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                parameter.normal_(std=0.1)
            elif name.endswith("magnitude"):
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    saved.save_classifier(folder / "run" / "best", model, tokenizer, described)
    return folder / "run"


PEFT_CASES = [
    ("all", LoraConfig(4, 8, targets=ALL), {}),
    ("dora", LoraConfig(4, 8, targets=ALL, dora=True), {"n_kv_heads": 4, "tie_embeddings": False}),
    ("rs", LoraConfig(8, 5.5, 0.1, ("q", "v"), rs=True), {"attention": "bidirectional"}),
    ("dora of q and k", LoraConfig(2, 4, targets=("q", "k"), rs=True, dora=True), {}),
    ("mean", LoraConfig(4, 8, targets=("k", "down")), {"pooling": "mean", "attention": "bidirectional"}),
]


@pytest.mark.parametrize("name, config, shape", PEFT_CASES, ids=[case[0] for case in PEFT_CASES])
def test_peft_classifies_with_our_probabilities(tokenizers, tmp_path, monkeypatch, capsys, name, config, shape):
    """... by the lines of the model card, on the base as --format hf writes it."""
    pytest.importorskip("peft", reason="peft is the judge here, and is not installed")
    run = make_lora_run(tmp_path, tokenizers["bpe"], config, **shape)
    folder = export(run, tmp_path / "out", "--format", "peft")
    export(tmp_path / "base", folder / "base", "--format", "hf")
    page = (folder / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.+?)```", page, re.S)
    command = f"--option export --pretrained_model_path {tmp_path / 'base'} --n_layers 2 --format hf --output_dir base"
    assert command in page
    monkeypatch.chdir(folder)
    found: dict = {}
    exec(code, found)
    want = logits_of(run, found["texts"])
    torch.testing.assert_close(found["probabilities"], want.softmax(1), rtol=0, atol=1e-5)
    if name != "mean":
        with torch.no_grad():
            logits = found["model"](**found["inputs"]).logits
        torch.testing.assert_close(logits, want, rtol=0, atol=1e-4)
    with monkeypatch.context() as patch:  # without the adapters it would be another model
        patch.setattr(lora.LoRALinear, "forward", lambda self, x: self.ops.linear(x, self.weight))
        assert (logits_of(run, found["texts"]) - want).abs().max() > 0.05


def test_the_folder_names_the_base_that_peft_loads_by_itself(tokenizers, tmp_path):
    """... through transformers alone, with our logits."""
    peft = pytest.importorskip("peft", reason="peft is the judge here, and is not installed")
    run = make_lora_run(tmp_path, tokenizers["bpe"], LoraConfig(4, 8, targets=ALL), base_layers=2)
    folder = export(run, tmp_path / "out", "--format", "peft")
    assert peft.PeftConfig.from_pretrained(folder).base_model_name_or_path == str(tmp_path / "base")
    assert "score" in peft.PeftConfig.from_pretrained(folder).modules_to_save
    model = tiny.transformers().AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    inputs = tiny.transformers().AutoTokenizer.from_pretrained(folder)(TEXTS[0], return_tensors="pt")
    torch.testing.assert_close(model(**inputs).logits, logits_of(run, TEXTS[:1]), rtol=0, atol=1e-4)


def test_a_base_from_the_hub_has_its_name_there(tokenizers, tmp_path):
    run = make_lora_run(tmp_path, tokenizers["bpe"], LoraConfig(4, 8, targets=ALL), base_layers=2)
    moved = tmp_path / "models--some--model/snapshots" / ("a1" * 20)
    moved.parent.mkdir(parents=True)
    shutil.move(tmp_path / "base", moved)
    words = ["--option", "export", "--run", run, "--pretrained_model_path", moved, "--format", "peft"]
    assert run_llama.main([str(word) for word in [*words, "--output_dir", tmp_path / "out"]]) == 0
    found = json.loads((tmp_path / "out/adapter_config.json").read_text(encoding="utf-8"))
    assert (found["base_model_name_or_path"], found["revision"]) == ("some/model", "a1" * 20)


def test_an_exported_adapter_on_another_file_is_warned_of(tokenizers, tmp_path, capsys):
    run = make_lora_run(tmp_path, tokenizers["bpe"], LoraConfig(4, 8, targets=ALL))
    folder = export(run, tmp_path / "out", "--format", "peft")
    (tmp_path / "texts.txt").write_text("a film", encoding="utf-8")
    other = shutil.copytree(tmp_path / "base", tmp_path / "other")
    (other / "tokenizer_other.json").write_text("{}", encoding="utf-8")
    for base, is_other in ((tmp_path / "base", False), (other, True)):
        capsys.readouterr()
        words = ["--option", "predict", "--adapter", folder, "--pretrained_model_path", base, "--input"]
        assert run_llama.main([str(word) for word in [*words, tmp_path / "texts.txt"]]) == 0
        assert ("is not the file or folder that it was trained on" in capsys.readouterr().err) == is_other


@pytest.mark.parametrize("shape", [{"base_layers": 3}, {"base_layers": 2, "attention": "bidirectional"}], ids=str)
def test_a_base_with_which_peft_would_compute_something_else_is_not_named(tokenizers, tmp_path, shape):
    run = make_lora_run(tmp_path, tokenizers["bpe"], LoraConfig(4, 8, targets=ALL), **shape)
    base = tmp_path / "base/config.json"  # as a model of the hub, which says nothing of attention
    described = {**json.loads(base.read_text(encoding="utf-8")), "is_causal": True}
    base.write_text(json.dumps(described), encoding="utf-8")
    settings = run / "best/config.json"
    own = json.loads(settings.read_text(encoding="utf-8"))
    own["base"]["sha256"] = files.sha256(tmp_path / "base")
    settings.write_text(json.dumps(own), encoding="utf-8")
    (run / "best/manifest.json").unlink()
    folder = export(run, tmp_path / "out", "--format", "peft")
    found = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert found["base_model_name_or_path"] is None


@pytest.mark.parametrize("name, config, shape", PEFT_CASES[:4], ids=[case[0] for case in PEFT_CASES[:4]])
def test_an_adapter_comes_back_with_every_bit(tokenizers, tmp_path, name, config, shape):
    """Ours, to PEFT's, to ours: the adapters, their settings and the head."""
    run = make_lora_run(tmp_path, tokenizers["bpe"], config, **shape)
    folder = export(run, tmp_path / "out", "--format", "peft")
    again = read_peft(folder, load(run).saved.settings.llama)
    state = load_file(run / "best/model.safetensors")
    same_bits(again.tensors, {n[6:]: t for n, t in state.items() if n.startswith("llama.")})
    same_bits(again.head, {"weight": state["classifier_head.weight"]})
    assert again.config == config


def test_predict_takes_the_adapter_back_with_its_attention_and_layers(tokenizers, tmp_path, capsys):
    """... which stand in the config.json beside it: the base says others."""
    run = make_lora_run(tmp_path, tokenizers["bpe"], LoraConfig(4, 8, targets=ALL), attention="bidirectional")
    folder = export(run, tmp_path / "out", "--format", "peft")
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    capsys.readouterr()
    words = ["--option", "predict", "--adapter", folder, "--input", tmp_path / "texts.txt", "--output_format", "jsonl"]
    assert run_llama.main([str(word) for word in words]) == 0
    found = [json.loads(line)["probabilities"] for line in capsys.readouterr().out.splitlines()]
    assert list(found[0]) == NAMES
    torch.testing.assert_close(torch.tensor([[*one.values()] for one in found]),
                               torch.from_numpy(load(run).predict_proba(TEXTS)), rtol=0, atol=2e-5)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("form", ["hf", "peft", "gguf"])
def test_training_goes_on_with_the_attention_that_is_said(tokenizers, tmp_path, form, attention, capsys):
    """Nobody types it again."""
    make = make_run if form != "peft" else partial(make_lora_run, lora_config=LoraConfig(4, 8))
    folder = export(make(tmp_path, tokenizers["bpe"], attention=attention), tmp_path / "out", "--format", form)
    write_split(tmp_path / "train.txt", tiny_sentences(20, 3))
    words = ["--pretrained_model_path", folder / "model.gguf" if form == "gguf" else folder]
    words = ["--adapter", folder] if form == "peft" else words
    words += ["--option", "finetune", "--train", tmp_path / "train.txt", "--dev", tmp_path / "train.txt"]
    words += ["--output_dir", tmp_path / "later", "--epochs", "1", "--lr", "1e-3", "--device", "cpu"]
    capsys.readouterr()
    assert run_llama.main([str(word) for word in words]) == 0
    described = json.loads((tmp_path / "later/args.json").read_text(encoding="utf-8"))
    said = capsys.readouterr().err
    start = next((line for line in said.splitlines() if line.startswith("start :: ")), "")
    assert described["options"]["attention"] == attention
    assert (f"--attention {attention}" in start) == (form == "peft" or attention == "bidirectional")
    assert ("score.weight is not part of a Llama, and left behind" in said) == (form == "hf")


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_a_run_with_adapters_is_exported_merged(tokenizers, tmp_path, form):
    config = LoraConfig(4, 8, targets=ALL, dora=True)
    run = make_lora_run(tmp_path, tokenizers["bpe"], config)
    more = ["--gguf_type", "f32"] if form == "gguf" else []
    folder = export(run, tmp_path / "out", "--format", form, *more)
    llama = load_pretrained(folder if form == "hf" else folder / "model.gguf", has_output=False)
    model, tokens = load(run).saved.model.llama, torch.randint(2, 90, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(llama.hidden(tokens), model.hidden(tokens), rtol=0, atol=1e-4)
    if form == "hf":
        classifier = tiny.transformers().AutoModelForSequenceClassification.from_pretrained(folder)
        inputs = tiny.transformers().AutoTokenizer.from_pretrained(folder)(TEXTS[0], return_tensors="pt")
        torch.testing.assert_close(classifier(**inputs).logits, logits_of(run, TEXTS[:1]), rtol=0, atol=1e-4)


def test_adapters_that_are_not_finite_are_not_merged(tokenizers, tmp_path, capsys):
    run = make_lora_run(tmp_path, tokenizers["bpe"], LoraConfig(4, 8, targets=("v",)))
    state = load_file(run / "best/model.safetensors")
    state["llama.layers.1.attention.wv.lora_b"][3, 2] = float("nan")
    save_file(state, run / "best/model.safetensors")
    (run / "best/manifest.json").unlink()
    assert not export(run, tmp_path / "out", code=2).exists()
    assert "numbers that are not finite" in capsys.readouterr().err


# --------------------------------------------------------------------------- llama.cpp


# How far log-probabilities may be from those of the exact weights: of float32 by rounding; of the others by what they
# leave out, which in so small a model is a lot.
@pytest.mark.parametrize("kind, near", [("f32", 1e-4), ("f16", 0.03), ("bf16", 0.2), ("q8_0", 0.6)])
@pytest.mark.parametrize("words, shape", [("bpe", {}), ("spm", {"tie_embeddings": False, "rope_theta": 5e4})])
def test_llama_cpp_goes_on_with_our_tokens(tokenizers, tmp_path, kind, near, words, shape):
    """Each token is our likeliest one after those before it, or within what the kind leaves out; and so are the
    log-probabilities of the five likeliest."""
    check_goes_on(tokenizers[words], tmp_path, kind, near, shape)


@pytest.mark.parametrize("shape", [{"rope_scaling": SCALINGS["linear"]}, {"rope_scaling": SCALINGS["llama3"]},
                                   {"head_dim": 12, "n_kv_heads": 1}], ids=str)
def test_llama_cpp_knows_the_other_shapes(tokenizers, tmp_path, shape):
    check_goes_on(tokenizers["bpe"], tmp_path, "f32", 1e-4, shape)


def check_goes_on(tokenizer: Tokenizer, tmp_path: Path, kind: str, near: float, shape: dict) -> None:
    llama = tiny.llama(vocab_size=tokenizer.n_words, **{"n_layers": 3, **shape})
    source = pretrained(tmp_path / "model", llama, tokenizer)
    folder = export(source, tmp_path / "out", "--format", "gguf", "--gguf_type", kind)
    judge = llamacpp.Judge(folder / "model.gguf", 64)
    differences: list[float] = []
    for text in ("the film", "a very long"):
        start = tokenizer.encode(text, bos=tokenizer.add_bos, eos=False)
        assert judge.tokens(text) == start
        found, tops = judge.continued(start, 12)
        with torch.no_grad():
            steps = llama(torch.tensor([start + found]))[0][0, len(start) - 1:].log_softmax(-1)
        for step, token in enumerate(found):
            assert steps[step].max() - steps[step][token] < (2 * near if kind != "f32" else 1e-6)
        for step, top in tops.items():
            differences += [abs(steps[step][token] - logprob).item() for token, logprob in top.items()]
    assert max(differences) < near and len(differences) > 30
    assert kind == "f32" or max(differences) > 1e-4, "another kind would be told from float32"


def pretrained(folder: Path, llama: Llama, tokenizer: Tokenizer) -> Path:
    """A Hugging Face folder of a Llama, with its tokenizer as it is."""
    folder.mkdir()
    save_file(hf_weights({n: p.detach() for n, p in llama.named_parameters()}, llama.config),
              folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(hf_config(llama.config, "LlamaForCausalLM")), encoding="utf-8")
    tokenizer.save(folder)
    return folder


@pytest.mark.parametrize("words", ["bpe", "begin", "spm"])
def test_llama_cpp_and_we_read_the_tokenizer_in_a_gguf(tokenizers, tmp_path, words):
    tokenizer = tokenizers[words]
    run = make_run(tmp_path / "run", tokenizer, extra_rows=5)
    file = export(run, tmp_path / "out", "--format", "gguf") / "model.gguf"
    judge, ours = llamacpp.Judge(file, 64), Tokenizer(tokenizer_model=file)
    for text in [*TEXTS, *(sentence for _, sentence in tiny_sentences(10, 3)), "tabs\tand\nnew lines", "don't 12345"]:
        want = tokenizer.encode(text, bos=tokenizer.add_bos, eos=False)
        assert judge.tokens(text) == want
        assert ours.encode(text, bos=ours.add_bos, eos=False) == want


def test_a_gguf_says_that_attention_is_bidirectional(tokenizers, tmp_path):
    for attention, want in (("causal", None), ("bidirectional", False)):
        run = make_run(tmp_path / attention, tokenizers["bpe"], attention=attention)
        file = export(run, tmp_path / f"{attention}-out", "--format", "gguf") / "model.gguf"
        assert read_gguf(file)[0].get("llama.attention.causal") is want


# --------------------------------------------------------------------------- llama2.c


def test_a_checkpoint_has_llama2_cs_layout(tokenizers, tmp_path):
    """The names and numbers that its `export.py` reads: those of the checkpoint that the tests make from transformers,
    and nothing that its ModelArgs would stumble over."""
    hf = tiny.hf_model()
    source = tmp_path / "model"
    hf.save_pretrained(source)
    make = Tokenizer(tokenizer_model=tokenizers["bpe"].path)
    (source / "tokenizer.json").write_text(json.dumps(small(make)), encoding="utf-8")
    file = export(source, tmp_path / "out", "--format", "llama2c") / "model.pt"
    found, want = torch.load(file, weights_only=True), tiny.pt_dict(hf)
    same_bits(found["model"], want["model"])
    known = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "hidden_dim", "multiple_of", "norm_eps",
             "max_seq_len", "dropout"}
    assert found["model_args"].keys() == known
    assert {n: found["model_args"][n] for n in want["model_args"]} | {"multiple_of": 4} == want["model_args"]


def small(tokenizer: Tokenizer) -> dict:
    """Its tokenizer.json with the first 96 words alone, which the transformers model of the tests has rows for."""
    content = tokenizer.as_json()
    content["model"]["vocab"] = {w: i for w, i in content["model"]["vocab"].items() if i < tiny.VOCAB}
    content["model"]["merges"] = []
    return content


@pytest.mark.parametrize("shape, said", [
    ({"rope_theta": 5e4}, "rotates with theta 10000"), ({"attention": "bidirectional"}, "has causal attention"),
    ({"tie_embeddings": False}, "has one matrix for words in and out"),
    ({"head_dim": 12}, "has heads of dim / n_heads"),
    ({"rope_scaling": SCALINGS["linear"]}, "scales no rotary positions")])
def test_what_llama2_c_has_no_word_for_is_refused(tokenizers, tmp_path, capsys, shape, said):
    run = make_run(tmp_path / "run", tokenizers["bpe"], **shape)
    assert not export(run, tmp_path / "out", "--format", "llama2c", code=2).exists()
    assert said in capsys.readouterr().err


# --------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("form, file", [("hf", ""), ("gguf", "model.gguf"), ("llama2c", "model.pt")])
@pytest.mark.parametrize("words, shape", [
    ("bpe", {}), ("spm", {}), ("begin", {"tie_embeddings": False}),
    ("bpe", {"head_dim": 12, "rope_scaling": SCALINGS["llama3"]}), ("bpe", {"rope_scaling": SCALINGS["linear"]})])
def test_there_and_back_every_bit_is_the_same(tokenizers, tmp_path, form, file, words, shape):
    """A model that we have read, once exported, is the same model, with the same tokenizer."""
    if form == "llama2c" and shape:
        return  # refused: see above
    llama = tiny.llama(vocab_size=tokenizers[words].n_words, **shape)
    source = pretrained(tmp_path / "model", llama, tokenizers[words])
    folder = export(source, tmp_path / "out", "--format", form, *(["--gguf_type", "f32"] if form == "gguf" else []))
    same_bits(weights_of(folder / file), {n: p.detach() for n, p in llama.named_parameters()})
    found = read_weights(folder / file).config
    if form == "gguf":  # which holds these two in float32
        found = replace(found, layer_norm_eps=round(found.layer_norm_eps, 9))
    assert found == llama.config
    again = Tokenizer(tokenizer_model=folder / file if file.endswith(".gguf") else folder)
    for text in TEXTS:
        assert again.encode(text, again.add_bos, False) == tokenizers[words].encode(text, again.add_bos, False)


@pytest.mark.parametrize("form, file", [("hf", ""), ("gguf", "model.gguf"), ("llama2c", "model.pt")])
def test_the_llama_of_a_run_comes_back_too(tokenizers, tmp_path, form, file):
    run = make_run(tmp_path / "run", tokenizers["bpe"])
    folder = export(run, tmp_path / "out", "--format", form, *(["--gguf_type", "f32"] if form == "gguf" else []))
    state = load_file(run / "best/model.safetensors")
    same_bits(weights_of(folder / file), {n[6:]: t for n, t in state.items() if n.startswith("llama.")})


# --------------------------------------------------------------------------- a model without output layer


def test_an_output_layer_that_a_run_has_lost_comes_from_its_base(tokenizers, tmp_path, capsys):
    base = tiny.llama(vocab_size=tokenizers["bpe"].n_words, tie_embeddings=False, seed=5)
    source = pretrained(tmp_path / "base", base, tokenizers["bpe"])
    run = make_run(tmp_path / "run", tokenizers["bpe"], tie_embeddings=False)
    assert not export(run, tmp_path / "out", "--format", "gguf", code=2).exists()
    assert "has no output layer" in capsys.readouterr().err
    described = {"files": {"weights": {"path": str(source), "sha256": files.sha256(source)}}}
    (run / "args.json").write_text(json.dumps(described), encoding="utf-8")
    file = export(run, tmp_path / "out", "--format", "gguf", "--gguf_type", "f32") / "model.gguf"
    state = load_file(run / "best/model.safetensors")
    same_bits(weights_of(file), {"output.weight": base.output.weight.detach(),
                                 **{n[6:]: t for n, t in state.items() if n.startswith("llama.")}})
    (source / "model.safetensors").write_bytes(b"another one")
    export(run, tmp_path / "again", "--format", "gguf", code=2)
    assert "is gone or has changed" in capsys.readouterr().err


# --------------------------------------------------------------------------- bad input, and what is half-written


def test_a_folder_that_holds_something_is_refused(tokenizers, tmp_path, capsys, monkeypatch):
    run, folder = make_run(tmp_path / "run", tokenizers["bpe"]), tmp_path / "out"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine", encoding="utf-8")
    export(run, folder, code=2)
    assert "there is something in this folder (mine.txt)" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    (folder / "mine.txt").unlink()
    assert (export(run, folder) / "config.json").is_file(), "an empty one is taken"
    (tmp_path / "file").write_text("", encoding="utf-8")
    export(run, tmp_path / "file", code=2)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    export(run, Path("."), code=2)
    assert Path.cwd().is_dir() and "the folder that you are in" in capsys.readouterr().err


def test_two_exports_into_one_folder_leave_one_of_them_whole(tmp_path):
    begun, barrier, said = tmp_path / "out", threading.Barrier(2), []

    def fill(path: Path, name: str) -> None:
        for part in ("a", "b"):
            barrier.wait(10)
            (path / part).write_text(name, encoding="utf-8")

    def write(name: str) -> None:
        try:
            new_folder.write_folder(begun, lambda path: fill(path, name), "--output_dir")
        except (OSError, InputError) as error:
            said.append(str(error))

    threads = [threading.Thread(target=write, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({path.read_text(encoding="utf-8") for path in begun.iterdir()}) == 1 and len(said) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="there is no limit on the size of files here")
@pytest.mark.parametrize("form", ["hf", "peft", "gguf", "llama2c"])
@pytest.mark.parametrize("limit", [1000, 20000])
def test_a_file_that_cannot_be_written_is_an_error_with_its_place(tokenizers, tmp_path, form, limit):
    """A limit on the size of files is as a full disk."""
    import resource

    run = (make_lora_run(tmp_path, tokenizers["bpe"], LoraConfig(4, 8, targets=ALL)) if form == "peft"
           else make_run(tmp_path, tokenizers["bpe"]))
    command = [sys.executable, str(ROOT / "run_llama.py"), "--option", "export", "--run", str(run), "--format", form,
               "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", preexec_fn=lambda: (
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))))
    assert done.returncode == 2 and "could not be written" in done.stderr and str(tmp_path / "out") in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("form", ["hf", "gguf", "llama2c"])
def test_pretrained_weights_keep_their_attention(tokenizers, tmp_path, form, capsys):
    """... or are refused where it cannot be said."""
    source = pretrained(tmp_path / "model", tiny.llama(vocab_size=tokenizers["bpe"].n_words), tokenizers["bpe"])
    described = {**json.loads((source / "config.json").read_text(encoding="utf-8")), "is_causal": False}
    (source / "config.json").write_text(json.dumps(described), encoding="utf-8")
    folder = export(source, tmp_path / "out", "--format", form, code=2 if form == "llama2c" else 0)
    if form == "llama2c":
        assert "has causal attention" in capsys.readouterr().err
    else:
        found = read_weights(folder / "model.gguf" if form == "gguf" else folder)
        assert found.config.attention == "bidirectional"


def test_the_first_layers_are_exported_alone(tokenizers, tmp_path):
    """... which is the base of adapters on them."""
    source = pretrained(tmp_path / "model", tiny.llama(vocab_size=tokenizers["bpe"].n_words, n_layers=3),
                        tokenizers["bpe"])
    found = weights_of(export(source, tmp_path / "out", "--n_layers", "2"))
    same_bits(found, {name: tensor for name, tensor in weights_of(source).items() if "layers.2" not in name})


def test_a_base_that_has_moved_gives_the_output_layer_and_is_named(tokenizers, tmp_path):
    run = make_lora_run(tmp_path, tokenizers["bpe"], LoraConfig(4, 8, targets=("q",)), base_layers=2,
                        tie_embeddings=False)
    moved = shutil.move(tmp_path / "base", tmp_path / "moved")
    words = ["--option", "export", "--run", run, "--pretrained_model_path", moved]
    for form in ("gguf", "peft"):
        line = [*words, "--format", form, "--output_dir", tmp_path / form]
        assert run_llama.main([str(word) for word in line]) == 0
    settings = json.loads((tmp_path / "peft/adapter_config.json").read_text(encoding="utf-8"))
    assert settings["base_model_name_or_path"] == str(moved)
    assert "output.weight" in weights_of(tmp_path / "gguf/model.gguf")


@pytest.mark.parametrize("words, said", [
    (["--run", "RUN"], "--option export needs --output_dir DIR"),
    (["--output_dir", "out"], "--option export needs --run RUN"),
    (["--run", "RUN", "--format", "peft", "--output_dir", "out"], "has no adapters (it was not trained with --lora_r)"),
    (["--pretrained_model_path", "RUN", "--output_dir", "out"], "a finished run; export it with --run"),
])
def test_what_is_missing_is_named(tokenizers, tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "RUN", tokenizers["bpe"])
    assert run_llama.main(["--option", "export", *words]) == 2
    assert said in capsys.readouterr().err and not Path("out").exists()


def test_an_export_that_fails_in_the_middle_leaves_nothing(tokenizers, tmp_path, monkeypatch):
    """... and has not the name before it is whole: a kill leaves nothing that looks like an export."""
    run, has_name = make_run(tmp_path / "run", tokenizers["bpe"]), []

    def full(state, path, **more):
        path.write_bytes(b"half")
        has_name.append((tmp_path / "out").exists())
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(export_hf, "save_file", full)
    assert not export(run, tmp_path / "out", code=2).exists() and has_name == [False]


def test_numbers_that_a_kind_cannot_hold_are_refused(tokenizers, tmp_path, capsys):
    llama = tiny.llama(vocab_size=tokenizers["bpe"].n_words, dim=24, n_heads=2, hidden_dim=32)
    with torch.no_grad():
        llama.tok_embeddings.weight[0, 0] = 1e6
    source = pretrained(tmp_path / "model", llama, tokenizers["bpe"])
    for kind, said in (("f16", "float16 ends at 65504"), ("q8_0", "there are 32 in a block")):
        assert not export(source, tmp_path / "out", "--format", "gguf", "--gguf_type", kind, code=2).exists()
        assert said in capsys.readouterr().err
    export(source, tmp_path / "out", "--format", "gguf", "--gguf_type", "bf16")


def test_the_tokenizer_that_was_typed_is_exported(tokenizers, tmp_path, tiny_model):
    llama = tiny.llama(vocab_size=400)
    source = pretrained(tmp_path / "model", llama, tokenizers["bpe"])
    folder = export(source, tmp_path / "out", "--tokenizer", str(tokenizers["spm"].path))
    again = Tokenizer(tokenizer_model=folder)
    assert again.encode("the film", False, False) == tokenizers["spm"].encode("the film", False, False)
    assert load_pretrained(folder).config.vocab_size == 400
