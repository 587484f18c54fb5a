"""Tiny random models and files for the tests: a transformers Llama, and the same weights as `.pt`, GGUF and folder."""

import json
import random
import struct
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch

from config import LlamaConfig
from llama import Llama

VOCAB, DIM, HIDDEN, HEADS, KV_HEADS, LAYERS, CONTEXT = 96, 32, 64, 4, 2, 3, 64


def transformers():
    """The judge of most tests. Imported late: it takes seconds, and only some tests need it."""
    return pytest.importorskip("transformers", reason="transformers is the judge here, and is not installed")


def llama(**more) -> Llama:
    """A random Llama in evaluation mode, with weights large enough for its logits to differ."""
    torch.manual_seed(more.pop("seed", 0))
    shape = dict(vocab_size=VOCAB, dim=DIM, n_layers=2, n_heads=HEADS, n_kv_heads=KV_HEADS, hidden_dim=HIDDEN,
                 max_seq_len=CONTEXT)
    model = Llama(LlamaConfig(**{**shape, **more}))
    for parameter in model.parameters():
        with torch.no_grad():
            norm = parameter.dim() == 1
            parameter.copy_(torch.rand_like(parameter) + 0.5 if norm else torch.randn_like(parameter) / 4)
    return model.eval()


@lru_cache(maxsize=16)
def hf_model(kv_heads: int = KV_HEADS, tied: bool = True, theta: float = 10000.0, layers: int = LAYERS):
    """A random transformers Llama; its norms are random too, so that a forgotten norm weight is noticed."""
    hf = transformers()
    torch.manual_seed(1)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=DIM, intermediate_size=HIDDEN, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=kv_heads, max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": theta}, rms_norm_eps=1e-4,
        initializer_range=0.25, bos_token_id=1, eos_token_id=None, pad_token_id=None))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    return model.eval()


def hf_relative(model_type: str = "llama", **more):
    """A random transformers model of a type that computes what a Llama does; `more` of its config."""
    hf = transformers()
    torch.manual_seed(2)
    shape = dict(vocab_size=VOCAB, hidden_size=DIM, intermediate_size=HIDDEN, num_hidden_layers=LAYERS,
                 num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=DIM // HEADS, rms_norm_eps=1e-4,
                 max_position_embeddings=CONTEXT, tie_word_embeddings=False, initializer_range=0.25, bos_token_id=1,
                 eos_token_id=None, pad_token_id=None, rope_parameters={"rope_type": "default", "rope_theta": 777.0})
    model = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(model_type, **{**shape, **more}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    return model.eval()


LINEAR = {"rope_type": "linear", "rope_theta": 777.0, "factor": 4.0}
# Of its four frequencies one stays, one becomes 1 / 8, and two are between.
LLAMA3 = {"rope_type": "llama3", "rope_theta": 30.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 24}


def tokens(*shape: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------- the same weights in other formats


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Halves to adjacent pairs: LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py."""
    return (weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2)
            .reshape(weight.shape))


def in_pairs(model) -> dict[str, torch.Tensor]:
    """A transformers model's weights, its queries and keys in adjacent pairs, under transformers' names."""
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for key in state:
        for name, n in heads.items():
            if name in key:
                state[key] = permute(state[key], n)
    return state


def renamed(state: dict[str, torch.Tensor], names: dict[str, str]) -> dict[str, torch.Tensor]:
    out = {}
    for key, value in state.items():
        for old, new in names.items():
            key = key.replace(old, new)
        out[key] = value
    return out


PT_NAMES = {
    "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output", "model.layers": "layers",
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}
GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.down_proj": "ffn_down",
    "mlp.up_proj": "ffn_up", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}


def pt_dict(model) -> dict:
    """A transformers model as llama2.c's export saves one: always with output.weight, tied or not."""
    c = model.config
    state = renamed(in_pairs(model), PT_NAMES)
    state.setdefault("output.weight", state["tok_embeddings.weight"])
    args = dict(dim=c.hidden_size, n_layers=c.num_hidden_layers, n_heads=c.num_attention_heads,
                n_kv_heads=c.num_key_value_heads, vocab_size=c.vocab_size, multiple_of=4, norm_eps=c.rms_norm_eps,
                max_seq_len=c.max_position_embeddings, dropout=0.0)
    return {"model_args": args, "model": state, "iter_num": 7}


def write_gguf(path: Path, model, kind: str = "F32", change=None, architecture: str = "llama", **numbers) -> Path:
    """A transformers model as GGUF, through the gguf package. Norms stay F32, as llama.cpp leaves them.

    `numbers` replace what the metadata says; `change(writer)` may add to it (a tokenizer).
    """
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    c, writer = model.config, GGUFWriter(path, architecture)
    says = dict(vocab_size=c.vocab_size, context_length=c.max_position_embeddings, embedding_length=c.hidden_size,
                block_count=c.num_hidden_layers, feed_forward_length=c.intermediate_size, head_count=HEADS,
                head_count_kv=c.num_key_value_heads, layer_norm_rms_eps=c.rms_norm_eps,
                rope_freq_base=c.rope_parameters["rope_theta"], rope_dimension_count=c.head_dim)
    if c.head_dim != DIM // HEADS:
        says |= dict(key_length=c.head_dim, value_length=c.head_dim)
    for name, value in {**says, **numbers}.items():
        getattr(writer, f"add_{name}")(value)
    if change:
        change(writer)
    for key, value in renamed(in_pairs(model), GGUF_NAMES).items():
        form = GGMLQuantizationType["F32" if value.dim() == 1 else kind]
        writer.add_tensor(key, quantize(value.numpy().astype(np.float32), form), raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --------------------------------------------------------------------------- a GGUF byte by byte, to write wrong ones


def gguf_string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_pair(key: str, kind: int, value: bytes) -> bytes:
    return gguf_string(key) + struct.pack("<I", kind) + value


def gguf_tensor(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return gguf_string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf_bytes(pairs: tuple = (), tensors: tuple = (), n_pairs: int | None = None, n_tensors: int | None = None,
               data: bytes = bytes(4096), version: int = 3) -> bytes:
    counts = struct.pack("<IQQ", version, len(tensors) if n_tensors is None else n_tensors,
                         len(pairs) if n_pairs is None else n_pairs)
    header = b"GGUF" + counts + b"".join(pairs) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + data


# --------------------------------------------------------------------------- a whole model on disk


def write_model(folder: Path, sentences: list[str], layers: int = 2) -> Path:
    """A Hugging Face folder: a random Llama of dim 32, and a byte-level BPE tokenizer.json trained on
    the sentences."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(exist_ok=True)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    backend.train_from_iterator(sentences, trainer)
    backend.save(str(folder / "tokenizer.json"))
    vocabulary, dim, hidden = backend.get_vocab_size(), 32, 64
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=draw) * 0.05

    state = {"model.embed_tokens.weight": normal(vocabulary, dim) * 10, "model.norm.weight": torch.ones(dim)}
    for i in range(layers):
        for name, shape in {"self_attn.q_proj": (dim, dim), "self_attn.k_proj": (dim // 2, dim),
                            "self_attn.v_proj": (dim // 2, dim), "self_attn.o_proj": (dim, dim),
                            "mlp.gate_proj": (hidden, dim), "mlp.up_proj": (hidden, dim),
                            "mlp.down_proj": (dim, hidden)}.items():
            state[f"model.layers.{i}.{name}.weight"] = normal(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"model.layers.{i}.{name}.weight"] = torch.ones(dim)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llama", "vocab_size": vocabulary, "hidden_size": dim, "intermediate_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True,
    }), encoding="utf-8")
    return folder


# --------------------------------------------------------------------------- labelled sentences

GOOD, BAD = ("good", "great", "charming"), ("bad", "dull", "awful")
FILL = ("the", "film", "is", "a", "very", "long", "and", "mixed", "one")
DEGREES = ("awful", "dull", "plain", "good", "great")


def labelled_sentences(draw: random.Random, n: int, kind: str = "two", flipped: float = 0.0,
                       minority: float = 0.5) -> list[tuple[int, str]]:
    """n labelled sentences. Two classes: one word decides, then `flipped` of the labels are wrong. Five: the label is
    the mean degree of some words, with noise."""
    rows = []
    for _ in range(n):
        words = [draw.choice(FILL) for _ in range(draw.randrange(3, 14))]
        if kind == "two":
            label = int(draw.random() < minority)
            words.insert(draw.randrange(len(words)), draw.choice(GOOD if label else BAD))
            label = 1 - label if draw.random() < flipped else label
        else:
            degrees = [draw.randrange(5) for _ in range(draw.randrange(1, 4))]
            for degree in degrees:
                words.insert(draw.randrange(len(words)), DEGREES[degree])
            label = min(4, max(0, round(sum(degrees) / len(degrees) + draw.gauss(0, 0.8))))
        rows.append((label, " ".join(words)))
    return rows
