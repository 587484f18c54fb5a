"""formats/gguf.py: headers that lie are refused, and a large one is read at once."""

import struct
import time

import pytest
import tiny
from conftest import refused

from formats.gguf import read_gguf
from llama import load_pretrained


def u32(x):
    return struct.pack("<I", x)


def u64(x):
    return struct.pack("<Q", x)


ARCHITECTURE = tiny.gguf_pair("general.architecture", 8, tiny.gguf_string("llama"))
HUGE = 2**60
LIES = {
    "n_tensors 2**63": tiny.gguf_bytes(n_tensors=2**63),
    "n_pairs 2**62": tiny.gguf_bytes(n_pairs=2**62),
    "a key of 2**60 bytes": tiny.gguf_bytes((u64(HUGE) + bytes(40),)),
    "a string of 2**60 bytes": tiny.gguf_bytes((tiny.gguf_pair("a", 8, u64(HUGE) + bytes(40)),)),
    "an array of 2**60 numbers": tiny.gguf_bytes((tiny.gguf_pair("a", 9, u32(4) + u64(HUGE)),)),
    "an array of 2**60 strings": tiny.gguf_bytes((tiny.gguf_pair("a", 9, u32(8) + u64(HUGE)),)),
    "an array of 2**64 - 1 bytes": tiny.gguf_bytes((tiny.gguf_pair("a", 9, u32(0) + u64(2**64 - 1)),)),
    "an array of arrays": tiny.gguf_bytes((tiny.gguf_pair("a", 9, (u32(9) + u64(1)) * 50),)),
    "an unknown type": tiny.gguf_bytes((tiny.gguf_pair("a", 13, bytes(8)),)),
    "an array of an unknown type": tiny.gguf_bytes((tiny.gguf_pair("a", 9, u32(77) + u64(1)),)),
    "a key twice": tiny.gguf_bytes((ARCHITECTURE, ARCHITECTURE)),
    "alignment 3": tiny.gguf_bytes((tiny.gguf_pair("general.alignment", 4, u32(3)),)),
    "alignment 0": tiny.gguf_bytes((tiny.gguf_pair("general.alignment", 4, u32(0)),)),
    "alignment as text": tiny.gguf_bytes((tiny.gguf_pair("general.alignment", 8, tiny.gguf_string("32")),)),
    "dimensions that overflow": tiny.gguf_bytes((), (tiny.gguf_tensor("a", (2**32, 2**32 + 1)),)),
    "dimensions whose product is 2**64": tiny.gguf_bytes((), (tiny.gguf_tensor("a", (2**16,) * 4),)),
    "a dimension of 0": tiny.gguf_bytes((), (tiny.gguf_tensor("a", (0, 4)),)),
    "no dimensions": tiny.gguf_bytes((), (tiny.gguf_tensor("a", ()) + bytes(32),)),
    "2**32 - 1 dimensions": tiny.gguf_bytes((), (tiny.gguf_string("a") + u32(2**32 - 1) + bytes(64),)),
    "an unknown quantisation": tiny.gguf_bytes((), (tiny.gguf_tensor("a", (4,), kind=999),)),
    "half a block": tiny.gguf_bytes((), (tiny.gguf_tensor("a", (33,), kind=8),)),
    "a tensor twice": tiny.gguf_bytes((), (tiny.gguf_tensor("a", (4,)), tiny.gguf_tensor("a", (4,), offset=32))),
    "overlapping tensors": tiny.gguf_bytes((), (tiny.gguf_tensor("a", (16,)), tiny.gguf_tensor("b", (4,), offset=32))),
    "an offset beyond the file": tiny.gguf_bytes((), (tiny.gguf_tensor("a", (4,), offset=2**40),)),
    "an offset of 2**64 - 32": tiny.gguf_bytes((), (tiny.gguf_tensor("a", (4,), offset=2**64 - 32),)),
    "an offset between two slots": tiny.gguf_bytes((), (tiny.gguf_tensor("a", (4,), offset=8),)),
    "version 1": tiny.gguf_bytes(version=1),
    "a layer with a number of 5000 digits": tiny.gguf_bytes((ARCHITECTURE,), (
        tiny.gguf_tensor("token_embd.weight", (4, 4)),
        tiny.gguf_tensor(f"blk.{'9' * 5000}.attn_q.weight", (4,), offset=64))),
    "no tensors at all": tiny.gguf_bytes((ARCHITECTURE,)),
    "not GGUF": b"GGML" + bytes(100),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_gguf_header_that_lies_is_refused(tmp_path, lie):
    path = tmp_path / "lie.gguf"
    path.write_bytes(LIES[lie])
    with refused(path):
        load_pretrained(path)
    if "token_embd" not in str(LIES[lie]) and lie != "no tensors at all":  # these are true GGUFs, of no Llama
        with refused(path):
            read_gguf(path)


def test_the_bytes_that_these_lies_are_made_of_are_a_gguf_when_they_do_not_lie(tmp_path):
    path = tmp_path / "true.gguf"
    path.write_bytes(tiny.gguf_bytes((ARCHITECTURE, tiny.gguf_pair("general.alignment", 4, u32(32))), (
        tiny.gguf_tensor("a", (16,)), tiny.gguf_tensor("b", (4, 2), offset=64))))
    metadata, tensors = read_gguf(path)
    assert metadata["general.architecture"] == "llama" and tensors["b"].shape == (2, 4)


def test_the_header_with_a_vocabulary_is_read_at_once(tmp_path):
    """49,152 words, as SmolLM has: the gguf package's reader takes seconds."""
    words = b"".join(tiny.gguf_string(f"word{i}") for i in range(49_152))
    pair = tiny.gguf_pair("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 49_152) + words)
    (tmp_path / "big.gguf").write_bytes(tiny.gguf_bytes((pair,)))
    began = time.perf_counter()
    metadata, _ = read_gguf(tmp_path / "big.gguf")
    assert time.perf_counter() - began < 1 and metadata["tokenizer.ggml.tokens"][-1] == "word49151"
