"""formats/weights.py: the three formats equal transformers, and files that lie are refused.

The real model is compared too, where models/smollm2-135m.gguf lies.
"""

import json
import os
import pickle
import shutil
import struct
from functools import lru_cache

import gguf as gguf_package
import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT, refused
from hypothesis import given, settings
from hypothesis import strategies as st

from config import RopeScaling
from formats import gguf_weights, huggingface, tensors, weights
from formats.gguf import read_gguf
from llama import load_pretrained
from tokenizer import Tokenizer

SMOLLM = ROOT / "models" / "smollm2-135m.gguf"


def equals(ours, theirs, atol, ids=None, new_tokens=50):
    """The same logits, and the same greedy tokens as transformers.generate."""
    ids = tiny.tokens(2, 12) if ids is None else ids
    with torch.no_grad():
        torch.testing.assert_close(ours(ids)[0], theirs(ids).logits, rtol=0, atol=atol)
        theirs.generation_config.eos_token_id = None  # go on, as ours does
        want = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens,
                               pad_token_id=0)
    assert torch.equal(ours.generate(ids, new_tokens, temperature=0), want)


# --------------------------------------------------------------------------- the three formats


@pytest.mark.parametrize(("kv_heads", "tied", "theta", "shard"), [
    (2, True, 10000.0, "1GB"), (4, False, 10000.0, "1GB"), (1, False, 500000.0, "30KB"), (2, True, 777.0, "30KB"),
])
def test_a_hugging_face_folder_whole_or_in_shards_equals_transformers(tmp_path, kv_heads, tied, theta, shard):
    theirs = tiny.hf_model(kv_heads, tied, theta)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard == "30KB")
    equals(load_pretrained(tmp_path), theirs, atol=1e-4)


def test_the_older_spelling_of_rope_theta_is_understood(tmp_path):
    theirs = tiny.hf_model(theta=777.0)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    equals(load_pretrained(tmp_path), theirs, atol=1e-4, new_tokens=3)


COMPUTE = {"attention.wq": "attention.compute_query", "attention.wk": "attention.compute_key",
           "attention.wv": "attention.compute_value", "attention.wo": "attention.compute_output"}
PREFIX = {"tok_": "_orig_mod.tok_", "layers.": "_orig_mod.layers.", "norm.weight": "norm.weight"}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("freqs", [False, True])
@pytest.mark.parametrize(("kv_heads", "tied", "names"), [(4, True, {}), (2, False, COMPUTE), (4, True, PREFIX)])
def test_a_llama2c_checkpoint_equals_transformers(tmp_path, kv_heads, tied, names, freqs, legacy):
    theirs = tiny.hf_model(kv_heads, tied)
    saved = tiny.pt_dict(theirs)
    saved["model"] = tiny.renamed(saved["model"], names)
    if freqs:
        saved["model"] |= {"freqs_cos": torch.zeros(64, 4), "freqs_sin": torch.zeros(64, 4)}
    torch.save(saved, tmp_path / "tiny.pt", _use_new_zipfile_serialization=not legacy)
    ours = load_pretrained(tmp_path / "tiny.pt")
    assert ours.config.tie_embeddings == tied
    equals(ours, theirs, atol=1e-4, new_tokens=50 if not legacy else 3)


def through_transformers(path):
    return tiny.transformers().LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name).eval()


@pytest.mark.parametrize(("kind", "kv_heads", "tied", "theta"), [
    ("F32", 4, True, 10000.0), ("F32", 2, False, 777.0), ("F16", 2, True, 10000.0), ("Q8_0", 2, False, 10000.0),
    ("Q4_0", 1, True, 500000.0), ("Q4_1", 2, True, 10000.0), ("Q5_1", 4, False, 10000.0),
])
def test_a_gguf_equals_transformers_loading_of_the_same_file(tmp_path, kind, kv_heads, tied, theta):
    written = tiny.hf_model(kv_heads, tied, theta)
    path = tiny.write_gguf(tmp_path / "tiny.gguf", written, kind)
    ours, theirs = load_pretrained(path), through_transformers(path)
    equals(ours, theirs, atol=1e-4)
    if kind == "F32":
        equals(ours, written, atol=1e-4, new_tokens=3)


RELATIVES = {
    "head_dim 12": {"head_dim": 12}, "head_dim 4, tied": {"head_dim": 4, "tie_word_embeddings": True},
    "linear": {"rope_parameters": tiny.LINEAR}, "llama3": {"rope_parameters": tiny.LLAMA3},
    "llama3, tied, head_dim 16": {"rope_parameters": tiny.LLAMA3, "tie_word_embeddings": True, "head_dim": 16},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral, a window as wide as the context": {"model_type": "mistral", "sliding_window": tiny.CONTEXT},
    **{name: {"model_type": name} for name in huggingface.MODEL_TYPES if name not in ("llama", "mistral")},
}


@pytest.mark.parametrize("shape", RELATIVES)
def test_every_shape_of_a_llama_under_any_name_equals_transformers(tmp_path, shape):
    theirs = tiny.hf_relative(**RELATIVES[shape])
    theirs.save_pretrained(tmp_path)
    equals(load_pretrained(tmp_path), theirs, atol=1e-4, ids=tiny.tokens(2, 40), new_tokens=20)


@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize("scaling", [tiny.LINEAR, tiny.LLAMA3], ids=lambda scaling: scaling["rope_type"])
def test_the_older_spellings_of_a_rope_scaling_are_understood(tmp_path, scaling, key):
    theirs = tiny.hf_relative(rope_parameters=scaling)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    old = config.pop("rope_parameters")
    config["rope_theta"], config["rope_scaling"] = old.pop("rope_theta"), {key: old.pop("rope_type"), **old}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    equals(load_pretrained(tmp_path), theirs, atol=1e-4, new_tokens=3)


@pytest.mark.parametrize("name", ["LlamaModel", "LlamaForSequenceClassification"])
def test_a_llama_saved_without_its_output_layer_is_read(tmp_path, name):
    """A LlamaModel's tensors have no `model.` in front; a classifier's head is passed over."""
    theirs = getattr(tiny.transformers(), name)(tiny.hf_relative(tie_word_embeddings=True).config).eval()
    theirs.save_pretrained(tmp_path)
    ids = tiny.tokens(2, 12)
    with torch.no_grad():
        want = getattr(theirs, "model", theirs)(ids).last_hidden_state
        torch.testing.assert_close(load_pretrained(tmp_path).hidden(ids), want, rtol=0, atol=1e-4)


def scaled_writer(theirs, context):
    """What llama.cpp's convert_hf_to_gguf.py adds for a scaling."""
    from gguf import RopeScalingType
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    def add(writer):
        rope = theirs.config.rope_parameters
        if rope["rope_type"] == "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "llama3":
            plain, _ = ROPE_INIT_FUNCTIONS["linear"](theirs.config, device="cpu")
            scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](theirs.config, device="cpu")
            writer.add_tensor("rope_freqs.weight", (plain * rope["factor"] / scaled).numpy())
            if context:
                writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    return add


@pytest.mark.parametrize("context", [False, True])
@pytest.mark.parametrize("shape", [{"head_dim": 12}, {"rope_parameters": tiny.LINEAR}, {"rope_parameters": tiny.LLAMA3},
                                   {"rope_parameters": {**tiny.LLAMA3, "original_max_position_embeddings": 8192,
                                                        "rope_theta": 5e5}, "head_dim": 64}], ids=str)
def test_a_gguf_of_every_shape_equals_transformers(tmp_path, shape, context):
    theirs = tiny.hf_relative(**shape)
    path = tiny.write_gguf(tmp_path / "tiny.gguf", theirs, change=scaled_writer(theirs, context))
    ours = load_pretrained(path)
    equals(ours, theirs, atol=1e-4, ids=tiny.tokens(2, 40), new_tokens=3)
    rope = theirs.config.rope_parameters
    if rope["rope_type"] == "llama3":
        length = rope["original_max_position_embeddings"]
        assert ours.config.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, length)


def test_a_gguf_whose_frequencies_are_scaled_in_another_way_is_refused(tmp_path):
    path = tiny.write_gguf(tmp_path / "long.gguf", tiny.hf_model(), change=lambda writer: writer.add_tensor(
        "rope_freqs.weight", np.array([1.0, 1.5, 2.5, 3.0], dtype=np.float32)))
    with refused(path, "rope_freqs.weight"):
        load_pretrained(path)


def same_numbers(model, theirs):
    """Each weight as transformers has it, in the model's precision."""
    want = tiny.renamed(tiny.in_pairs(theirs), tiny.PT_NAMES)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, want[name].to(parameter.dtype)), name


@pytest.mark.parametrize("kept", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16])
def test_weights_are_read_in_the_precision_that_is_asked_for(tmp_path, kept, asked, monkeypatch):
    """In pieces that are shorter than a tensor, and do not divide it."""
    monkeypatch.setattr(tensors, "PIECE", 1000)
    theirs = tiny.hf_relative().to(getattr(torch, kept))
    theirs.save_pretrained(tmp_path, max_shard_size="30KB")
    ours = load_pretrained(tmp_path, dtype=asked)
    assert {p.dtype for p in ours.parameters()} == {asked}
    same_numbers(ours, theirs)


@pytest.mark.parametrize("kept", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16])
def test_a_pt_is_read_in_the_precision_that_is_asked_for(tmp_path, kept, asked):
    """Also where a tensor is a part of another, or stored column by column."""
    saved = tiny.pt_dict(tiny.hf_model().to(getattr(torch, kept)))
    tiny.hf_model.cache_clear()
    model = saved["model"]
    whole = torch.stack((model["norm.weight"] * 2, model["norm.weight"]))
    turned = model["layers.1.attention.wo.weight"].T.contiguous()
    saved["model"] |= {"norm.weight": whole[1], "layers.1.attention.wo.weight": turned.T}
    torch.save(saved, tmp_path / "tiny.pt")
    for name, parameter in load_pretrained(tmp_path / "tiny.pt", dtype=asked).named_parameters():
        assert torch.equal(parameter, model[name].to(asked)) and parameter.dtype == asked, name


@pytest.mark.parametrize("form", ["folder", "pt", "gguf", "bin", "q8_0"])
def test_a_file_that_is_written_anew_while_it_is_read_is_refused(tmp_path, form):
    """Not read at the places that the other file's header named."""
    theirs = tiny.hf_model()
    path = tmp_path / f"tiny.{form}"
    if form == "folder":
        theirs.save_pretrained(path)
    elif form == "pt":
        torch.save(tiny.pt_dict(theirs), path)
    else:
        write_bin(path, theirs, 1, True) if form == "bin" else tiny.write_gguf(path, theirs, *(
            ["Q8_0"] if form == "q8_0" else []))
    read = weights.read_weights(path)
    file = path / "model.safetensors" if form == "folder" else path
    shutil.copy(file, tmp_path / "other")
    os.replace(tmp_path / "other", file)
    if form == "pt" and not os.path.exists("/proc/self/maps"):
        return  # there it is the mapping of the earlier file
    with refused(file, "changed"):
        read.readers["layers.0.attention.wq.weight"]()
    with refused(file, "changed"):
        load_pretrained(read)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16])
def test_a_gguf_is_read_in_the_precision_that_is_asked_for(tmp_path, kind, asked, monkeypatch):
    path = tiny.write_gguf(tmp_path / "tiny.gguf", tiny.hf_model(), kind)
    whole = load_pretrained(path)
    monkeypatch.setattr(gguf_weights, "PIECE", 32)  # numbers, which are made to 1,024 blocks
    for name, parameter in load_pretrained(path, dtype=asked).named_parameters():
        assert torch.equal(parameter, whole.get_parameter(name).to(asked)) and parameter.dtype == asked, name


def test_bfloat16_weights_become_float32_and_every_parameter_can_be_trained(tmp_path):
    hf = tiny.transformers()
    tiny.hf_model().save_pretrained(tmp_path / "wide")
    hf.LlamaForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    ours = load_pretrained(tmp_path / "half")
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in ours.parameters()) and not ours.training
    theirs = hf.LlamaForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32).eval()
    equals(ours, theirs, atol=1e-4, new_tokens=3)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("form", ["folder", "pt", "gguf"])
def test_the_first_k_layers_equal_transformers_with_those_layers_only(tmp_path, form, k):
    theirs = tiny.hf_model()
    if form == "folder":
        theirs.save_pretrained(path := tmp_path)
    elif form == "pt":
        torch.save(tiny.pt_dict(theirs), path := tmp_path / "tiny.pt")
    else:
        path = tiny.write_gguf(tmp_path / "tiny.gguf", theirs)
    fewer = tiny.hf_model(layers=k)
    fewer.load_state_dict({n: v for n, v in theirs.state_dict().items() if n in fewer.state_dict()})
    tiny.hf_model.cache_clear()  # `fewer` is no longer what its name in the cache says
    equals(load_pretrained(path, n_layers=k), fewer, atol=1e-4, new_tokens=3)


@pytest.mark.parametrize("n_layers", [0, -1, 4, 10**9])
def test_more_layers_than_the_model_has_or_none_are_refused(tmp_path, n_layers):
    path = tiny.write_gguf(tmp_path / "tiny.gguf", tiny.hf_model())
    with refused(path):
        load_pretrained(path, n_layers=n_layers)


# --------------------------------------------------------------------------- the real model


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    """(ours, transformers', transformers' tokenizer), from the one file."""
    if not SMOLLM.is_file():
        pytest.skip(f"{SMOLLM} is not here; `python data/prepare.py smollm2-135m` fetches it")
    hf, patch = tiny.transformers(), pytest.MonkeyPatch()
    for slow in ("GGUFReader", "get_tensor_name_map"):  # called again and again with the same arguments
        patch.setattr(gguf_package, slow, lru_cache(getattr(gguf_package, slow)))
    try:
        alone = tmp_path_factory.mktemp("smollm") / SMOLLM.name  # transformers also reads what lies beside it
        shutil.copy(SMOLLM, alone)
        tokenizer = hf.AutoTokenizer.from_pretrained(alone.parent, gguf_file=alone.name)
        return load_pretrained(SMOLLM), through_transformers(alone), tokenizer
    finally:
        patch.undo()


SENTENCES = [
    "It is a film of 1999, and n't one I'd watch twice .",
    "  two  spaces,\ttabs\nand lines\n\n", "naïve café ☕ 我们 😀",
    "A sly, heartfelt portrait: 12345 reasons to see it!", "x",
]


def test_the_real_model_gives_the_tokens_logits_and_greedy_text_of_transformers(smollm):
    ours, theirs, their_tokenizer = smollm
    tokenizer = Tokenizer(tokenizer_model=SMOLLM)
    for sentence in SENTENCES:
        ids = tokenizer.encode(sentence, bos=False, eos=False)
        assert ids == their_tokenizer(sentence, add_special_tokens=False)["input_ids"]
        row = torch.tensor([ids])
        with torch.no_grad():
            torch.testing.assert_close(ours(row)[0], theirs(row).logits, rtol=0, atol=2e-3)
    prompt = torch.tensor([tokenizer.encode("The movie was", bos=True, eos=False)])
    equals(ours, theirs, atol=2e-3, ids=prompt)


def test_dequantised_values_are_those_of_the_gguf_package(tmp_path):
    """Rows are regrouped before they are handed to the package: the values must be those of the plain call."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    values = np.random.default_rng(0).normal(size=(37, 96)).astype(np.float32)
    for kind in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_1):
        raw = quantize(values, kind)
        path = tmp_path / "one.gguf"
        path.write_bytes(tiny.gguf_bytes((), (tiny.gguf_tensor("a", (96, 37), int(kind)),), data=raw.tobytes()))
        tensor = read_gguf(path)[1]["a"]
        found = gguf_weights._dequantise(path, tensor, tensors.stamp_of(path.stat()))
        assert np.array_equal(found.numpy(), dequantize(raw, kind))


# --------------------------------------------------------------------------- files that are refused


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    return tiny.write_gguf(tmp_path_factory.mktemp("gguf") / "whole.gguf", tiny.hf_model()).read_bytes()


def test_a_gguf_cut_anywhere_is_refused(tmp_path, gguf):
    path = tmp_path / "cut.gguf"
    for cut in [*range(0, 64), *range(64, len(gguf) - 32, 997), len(gguf) - 33]:
        path.write_bytes(gguf[:cut])
        with refused(path):
            load_pretrained(path)


def test_an_hf_folder_whose_safetensors_is_cut_anywhere_is_refused(tmp_path):
    tiny.hf_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for cut in [*range(0, 16), *range(16, len(whole), 4999), len(whole) - 1]:
        file.write_bytes(whole[:cut])
        with refused(tmp_path):
            load_pretrained(tmp_path)


def test_a_pt_cut_anywhere_is_refused(tmp_path):
    torch.save(tiny.pt_dict(tiny.hf_model()), tmp_path / "whole.pt")
    whole, path = (tmp_path / "whole.pt").read_bytes(), tmp_path / "cut.pt"
    for cut in [0, 1, 3, 4, 5, 100, *range(1000, len(whole), 9973), len(whole) - 1]:
        path.write_bytes(whole[:cut])
        with refused(path):
            load_pretrained(path)


@pytest.mark.parametrize("numbers", [
    dict(block_count=10**9), dict(block_count=2), dict(block_count=0), dict(embedding_length=2**31),
    dict(embedding_length=64), dict(feed_forward_length=2**31), dict(feed_forward_length=65), dict(head_count=0),
    dict(head_count=3), dict(head_count_kv=4), dict(head_count_kv=0), dict(head_count=16, head_count_kv=8),
    dict(rope_dimension_count=4), dict(context_length=0), dict(layer_norm_rms_eps=float("nan")),
    dict(layer_norm_rms_eps=-1.0), dict(rope_freq_base=0.0), dict(rope_freq_base=float("inf")),
    dict(head_count=[4, 4, 4]), dict(feed_forward_length=[64, 64, 64]), dict(key_length=7), dict(key_length=12),
    dict(value_length=4), dict(expert_count=8), dict(sliding_window=16), dict(rope_scaling_factor=float("nan")),
], ids=str)
def test_a_gguf_that_promises_another_model_than_it_holds_is_refused(tmp_path, numbers):
    path = tiny.write_gguf(tmp_path / "other.gguf", tiny.hf_model(), **numbers)
    with refused(path):
        load_pretrained(path)


def test_a_gguf_of_another_architecture_or_with_scaled_positions_is_refused(tmp_path):
    path = tiny.write_gguf(tmp_path / "qwen.gguf", tiny.hf_model(), architecture="qwen2")
    with refused(path, "qwen2"):
        load_pretrained(path)
    from gguf import RopeScalingType

    path = tiny.write_gguf(tmp_path / "yarn.gguf", tiny.hf_model(), rope_scaling_type=RopeScalingType.YARN)
    with refused(path, "'yarn'"):
        load_pretrained(path)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_bytes_in_a_gguf_header_are_refused_or_harmless(tmp_path_factory, gguf, flips):
    path = tmp_path_factory.getbasetemp() / "flipped.gguf"
    header, damaged = gguf.index(b"output_norm.weight"), bytearray(gguf)
    for where, mask in flips:
        damaged[int(where * header)] ^= mask
    path.write_bytes(damaged)
    try:
        load_pretrained(path)
    except ValueError as error:
        assert str(path) in str(error)


def safetensors_with(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + bytes(64)


@pytest.mark.parametrize("content", [
    safetensors_with(b"{}", 2**63), safetensors_with(b"{}", 2**64 - 1), safetensors_with(b"{" * 100_000),
    safetensors_with(b"no json"),
    safetensors_with(b'{"a": {"dtype": "F32", "shape": [4611686018427387904, 16], "data_offsets": [0, 64]}}'),
    safetensors_with(b'{"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 18446744073709551615]}}'),
    safetensors_with(b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 64]}}'),
], ids=["2**63", "2**64-1", "nested", "no json", "overflow", "offset", "size"])
def test_a_safetensors_header_that_lies_is_refused(tmp_path, content):
    tiny.hf_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with refused(tmp_path):
        load_pretrained(tmp_path)


class Payload:
    """Unpickled, it runs a command that leaves a file behind."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain pickle"])
def test_a_pt_with_code_in_it_is_refused_by_the_name_of_what_it_calls_and_nothing_runs(tmp_path, form):
    path, marker = tmp_path / "evil.pt", tmp_path / "it-ran"
    evil = {"model_args": {}, "model": Payload(marker)}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps(evil, protocol=2))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=form == "zip")
    with refused(path, r"wants to call .*(posix|nt)\.system"):
        load_pretrained(path)
    assert not marker.exists()
    if form == "plain pickle":  # the payload is a real one
        pickle.loads(path.read_bytes())
        assert marker.exists()


def without(key):
    def change(saved):
        del saved[key]
    return change


def weight(**new):
    return lambda saved: saved["model"].update({k.replace("__", "."): v for k, v in new.items()})


def says(**new):
    return lambda saved: saved["model_args"].update(new)


EMBEDDING = "tok_embeddings__weight"
PT_FAULTS = {
    "no model_args": without("model_args"), "no model": without("model"),
    "the model a list": lambda saved: saved.update(model=[1, 2]),
    "the arguments a list": lambda saved: saved.update(model_args=[1, 2]),
    "a number for a key": lambda saved: saved["model"].update({3: torch.zeros(2)}),
    "a number for a tensor": weight(norm__weight=3), "text for the embedding": weight(**{EMBEDDING: "x"}),
    "an embedding of one dimension": weight(**{EMBEDDING: torch.zeros(9)}),
    "an embedding of three": weight(**{EMBEDDING: torch.zeros(9, 2, 2)}),
    "fewer words": weight(**{EMBEDDING: torch.zeros(9, 32)}),
    "a number for w1": weight(layers__0__feed_forward__w1__weight=1),
    "a scalar for w1": weight(layers__0__feed_forward__w1__weight=torch.tensor(1.0)),
    "10**9 layers": says(n_layers=10**9), "text for layers": says(n_layers="3"), "no heads": says(n_heads=0),
    "None for heads": says(n_heads=None), "text for kv heads": says(n_kv_heads="2"), "text for eps": says(norm_eps="x"),
    "None for eps": says(norm_eps=None), "a context of 0": says(max_seq_len=0), "text for theta": says(rope_theta="x"),
    "one value repeated": weight(**{EMBEDDING: torch.zeros(1, 32).expand(10**9, 32)}),
    "a sparse tensor": weight(norm__weight=torch.ones(32).to_sparse()),
}


@pytest.mark.parametrize("fault", PT_FAULTS)
def test_a_pt_that_is_no_llama2c_checkpoint_is_refused(tmp_path, fault):
    saved = tiny.pt_dict(tiny.hf_model())
    PT_FAULTS[fault](saved)
    path = tmp_path / "other.pt"
    torch.save(saved, path)
    with refused(path):
        load_pretrained(path)


# --------------------------------------------------------------------------- llama2.c's .bin


def write_bin(path, theirs, version, is_tied):
    """As legacy_export and version1_export of llama2.c's export.py write a model."""
    c, state = theirs.config, tiny.pt_dict(theirs)["model"]
    layers = range(c.num_hidden_layers)
    numbers = [c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads,
               c.vocab_size, c.max_position_embeddings]

    def of_layers(*names):
        return [state[f"layers.{i}.{name}.weight"] for name in names for i in layers]

    attention = of_layers(*(f"attention.w{x}" for x in "qkvo"))
    feed_forward = of_layers(*(f"feed_forward.w{i}" for i in (1, 2, 3)))
    if version == 0:
        head = struct.pack("<7i", *numbers[:5], numbers[5] if is_tied else -numbers[5], numbers[6])
        tables = [torch.full((c.max_position_embeddings, c.hidden_size // c.num_attention_heads // 2), 9.0)] * 2
        parts = [state["tok_embeddings.weight"], *of_layers("attention_norm"), *attention, *of_layers("ffn_norm"),
                 *feed_forward, state["norm.weight"], *tables]
    else:
        head = (struct.pack("<Ii7iB", 0x616B3432, version, *numbers, is_tied)).ljust(256, b"\0")
        parts = [*of_layers("attention_norm"), *of_layers("ffn_norm"), state["norm.weight"],
                 state["tok_embeddings.weight"], *attention, *feed_forward]
    parts += [] if is_tied else [state["output.weight"]]
    path.write_bytes(head + b"".join(part.numpy().astype("<f4").tobytes() for part in parts))
    return path


@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_llama2c_bin_equals_transformers(tmp_path, version, tied, kv_heads):
    theirs = tiny.hf_model(kv_heads, tied)
    path = write_bin(tmp_path / "tiny.bin", theirs, version, tied)
    ours = load_pretrained(path)
    same_numbers(ours, theirs)
    assert ours.config.tie_embeddings == tied and ours.config.max_seq_len == tiny.CONTEXT
    ours.config.layer_norm_eps = theirs.config.rms_norm_eps  # which the file does not say: 1e-5
    for module in ours.modules():
        module.eps = theirs.config.rms_norm_eps
    equals(ours, theirs, atol=1e-4, new_tokens=3)


@pytest.mark.parametrize("version", [0, 1])
def test_a_llama2c_bin_cut_anywhere_or_longer_is_refused(tmp_path, version):
    path = write_bin(tmp_path / "tiny.bin", tiny.hf_model(), version, True)
    whole = path.read_bytes()
    for cut in [*range(0, 40), 255, 256, 257, *range(1000, len(whole), 9973), len(whole) - 1]:
        path.write_bytes(whole[:cut])
        with refused(path):
            load_pretrained(path)
    path.write_bytes(whole + b"\0")
    with refused(path, "bytes"):
        load_pretrained(path)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.one_of(st.integers(-2**31, 2**31 - 1), st.integers(-2, 200))),
                min_size=1, max_size=3), st.sampled_from([0, 1]))
def test_hostile_numbers_in_the_header_of_a_bin_are_refused(tmp_path_factory, numbers, version):
    """Or they describe the same bytes in another way; nothing is allocated before that is known."""
    path = write_bin(tmp_path_factory.getbasetemp() / "hostile.bin", tiny.hf_model(), version, True)
    content = bytearray(path.read_bytes())
    for at, value in numbers:
        struct.pack_into("<i", content, 4 * at + (8 if version else 0), value)
    path.write_bytes(content)
    try:
        model = load_pretrained(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert sum(p.nbytes for p in model.parameters()) <= len(content)


def test_a_llama2c_bin_of_version_2_is_refused_by_its_number(tmp_path):
    path = write_bin(tmp_path / "q8.bin", tiny.hf_model(), 2, True)
    with refused(path, "version 2"):
        load_pretrained(path)


def test_a_pickle_called_bin_is_still_a_pickle(tmp_path):
    torch.save(tiny.pt_dict(tiny.hf_model()), tmp_path / "new.bin")
    torch.save(tiny.pt_dict(tiny.hf_model()), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for name in ("new.bin", "old.bin"):
        same_numbers(load_pretrained(tmp_path / name), tiny.hf_model())


# --------------------------------------------------------------------------- a .pt that is another's


def test_a_pt_that_holds_no_dict_is_refused(tmp_path):
    torch.save([1, 2, 3], tmp_path / "list.pt")
    with refused(tmp_path / "list.pt", "model_args"):
        load_pretrained(tmp_path / "list.pt")


CONFIG_FAULTS = [
    b"{", b"", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"vocab_size": ' + b"9" * 5000 + b"}",
    {"model_type": "qwen2"}, {"model_type": None}, {"attention_bias": True}, {"head_dim": 99},
    {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, {"rope_parameters": [1]}, {"rope_parameters": "x"},
    {"rope_parameters": {"rope_type": "default", "rope_theta": None}}, {"num_hidden_layers": 10**9},
    *({key: value} for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                               "intermediate_size", "max_position_embeddings", "rms_norm_eps")
      for value in ("8", None, 0, -4, 2**62, [8], {}, True, 1.5)
      if (key, value) not in (("max_position_embeddings", 2**62), ("rms_norm_eps", 0), ("rms_norm_eps", 2**62),
                              ("rms_norm_eps", 1.5))),
    {"num_key_value_heads": "2"}, {"num_key_value_heads": 0}, {"num_key_value_heads": 3},
]


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    tiny.hf_model().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fault", CONFIG_FAULTS, ids=lambda fault: str(fault)[:50])
def test_a_config_json_that_cannot_be_is_refused(hf_folder, tmp_path, fault):
    shutil.copy(hf_folder / "model.safetensors", tmp_path)
    config = json.loads((hf_folder / "config.json").read_text(encoding="utf-8"))
    content = fault if isinstance(fault, bytes) else json.dumps({**config, **fault}).encode()
    (tmp_path / "config.json").write_bytes(content)
    with refused(tmp_path):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(("change", "words"), [
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn'"),
    ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope scaling 'dynamic'"),
    ({"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}}, "rope scaling 'longrope'"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    ({"rope_parameters": {"rope_type": "linear"}}, "factor"), ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"hidden_act": "gelu"}, "activation"), ({"attention_bias": True}, "a bias"), ({"mlp_bias": True}, "a bias"),
    ({"sliding_window": 32}, "sliding_window"),
    ({"sliding_window": 32, "use_sliding_window": False}, "sliding_window"), ({"num_local_experts": 8}, "experts"),
    ({"final_logit_softcapping": 30.0}, "a soft cap"), ({"use_qk_norm": True}, "norms of queries and keys"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantisation"), ({"model_type": "qwen2"}, "biases"),
    ({"model_type": "mixtral"}, "experts"), ({"model_type": "qwen3"}, "norms of queries"),
    ({"model_type": "gemma2"}, "soft caps"), ({"model_type": "olmo"}, "another norm"),
    ({"model_type": ["llama"]}, "llama"),
    ({"model_type": "mistral"}, "sliding_window is 4096"), ({"head_dim": 7}, "head_dim"), ({"head_dim": 12}, "wq"),
], ids=str)
def test_what_a_llama_has_not_is_refused_by_name(hf_folder, tmp_path, change, words):
    shutil.copy(hf_folder / "model.safetensors", tmp_path)
    config = json.loads((hf_folder / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = 8192  # so that a window of 4096 cuts something off
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}), encoding="utf-8")
    with refused(tmp_path, words):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(("key", "words"), [
    ("model.layers.0.self_attn.q_proj.bias", "a bias"), ("model.layers.0.self_attn.q_norm.weight", "a norm of queries"),
    ("model.layers.0.mlp.experts.0.up_proj.weight", "an expert"), ("lm_head.bias", "a bias"),
    ("model.layers.0.self_attn.q_proj.lora_A.weight", "an adapter"), ("model.norm.bias", "a bias"),
    ("model.layers.0.pre_feedforward_layernorm.weight", "another norm"),
])
def test_a_tensor_that_a_llama_has_not_is_refused_by_name(hf_folder, tmp_path, key, words):
    from safetensors.torch import load_file, save_file

    shutil.copy(hf_folder / "config.json", tmp_path)
    save_file({**load_file(hf_folder / "model.safetensors"), key: torch.zeros(4)}, tmp_path / "model.safetensors")
    with refused(tmp_path, words):
        load_pretrained(tmp_path)


def test_a_missing_shard_and_one_outside_the_folder_are_named(tmp_path):
    tiny.hf_relative().save_pretrained(tmp_path / "folder", max_shard_size="30KB")
    shards = sorted((tmp_path / "folder").glob("*.safetensors"))
    shards[1].rename(tmp_path / "moved.safetensors")
    with refused(shards[1], "there is no such file"):
        load_pretrained(tmp_path / "folder")
    index = tmp_path / "folder" / "model.safetensors.index.json"
    for outside in ("../moved.safetensors", str(tmp_path / "moved.safetensors"), "..\\moved.safetensors", ".."):
        text = json.loads(index.read_text(encoding="utf-8"))
        text["weight_map"]["model.norm.weight"] = outside
        (index).write_text(json.dumps(text), encoding="utf-8")
        with refused(index, "outside the folder"):
            load_pretrained(tmp_path / "folder")


def test_rope_parameters_and_rope_scaling_that_disagree_are_refused(hf_folder, tmp_path):
    """transformers reads both, and which one counts depends on its version."""
    shutil.copy(hf_folder / "model.safetensors", tmp_path)
    described = json.loads((hf_folder / "config.json").read_text(encoding="utf-8"))
    described["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    for scaling, said in (({"rope_type": "yarn", "factor": 4.0}, "the rope scaling 'yarn'"),
                          ({"type": "linear", "factor": 4.0}, "say different things"), ([4], "expected an object")):
        (tmp_path / "config.json").write_text(json.dumps({**described, "rope_scaling": scaling}), encoding="utf-8")
        with refused(tmp_path, said):
            load_pretrained(tmp_path)
    both = {"rope_type": "linear", "factor": 4.0}
    described |= {"rope_parameters": {**both, "rope_theta": 10000.0}, "rope_scaling": both}
    (tmp_path / "config.json").write_text(json.dumps(described), encoding="utf-8")
    assert load_pretrained(tmp_path).config.rope_scaling.factor == 4


def test_an_adapter_in_the_place_of_a_model_is_named(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with refused(tmp_path, "an adapter of PEFT's"):
        load_pretrained(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny.hf_relative().save_pretrained(tmp_path / "folder", max_shard_size="30KB")
    one, *_, other = sorted((tmp_path / "folder").glob("*.safetensors"))
    first, last = load_file(one), load_file(other)
    name = next(iter(first))
    save_file({**last, name: first[name] + 1}, other)
    with refused(other, f"{name} is in another file of the folder too"):
        load_pretrained(tmp_path / "folder")


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                                 "intermediate_size", "model_type"])
def test_a_config_json_without_a_key_is_refused(hf_folder, tmp_path, key):
    shutil.copy(hf_folder / "model.safetensors", tmp_path)
    config = json.loads((hf_folder / "config.json").read_text(encoding="utf-8"))
    del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with refused(tmp_path):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": None}, {"weight_map": {"a": 3}}, {"weight_map": {"a": [1]}},
                                   {"weight_map": {}}, {"weight_map": {"a": "../model.safetensors"}},
                                   {"weight_map": {"a": "missing.safetensors"}}], ids=str)
def test_an_index_of_shards_that_cannot_be_is_refused(hf_folder, tmp_path, index):
    shutil.copytree(hf_folder, tmp_path / "folder")
    (tmp_path / "folder" / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with refused(tmp_path / "folder"):
        load_pretrained(tmp_path / "folder")


def test_what_is_not_there_is_named(tmp_path):
    for path in (tmp_path / "none.pt", tmp_path / "none.gguf", tmp_path):
        with pytest.raises(FileNotFoundError) as caught:
            weights.read_weights(path)
        assert str(path) in str(caught.value)
