"""Memory and time of loading: how far is the peak above the weights themselves?

    python -m benchmarks.bench_load [--gigabytes 1.5]

Makes a random Llama of about that size in each format (one after the other, in a temporary folder), and loads each in a
process of its own, as float32 and as bfloat16. The peak is the process's largest resident memory (Linux only; pages of
the file that are mapped count too), less what it was before the file was opened, over the size of the weights in the
precision that was asked for. Writes benchmarks/results/load-cpu.json.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors.torch import save_file

from benchmarks.measure import ROOT, machine, write
from config import LlamaConfig
from llama import Llama

LOAD = r"""
import json, re, sys, time
from pathlib import Path
import torch
from formats.weights import read_weights
from llama import load_pretrained
def memory(name):
    return 1024 * int(re.search(name + r":\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: a process starts with its parent's
before, start = memory("VmHWM"), time.perf_counter()
model = load_pretrained(read_weights(sys.argv[1]), dtype=getattr(torch, sys.argv[2]))
spent, size = time.perf_counter() - start, sum(p.nbytes for p in model.parameters())
print(json.dumps({"weights_bytes": size, "peak_bytes": memory("VmHWM") - before, "seconds": spent}))
"""
DIM, HIDDEN, WORDS = 2048, 5632, 32000  # as TinyLlama; the layers make up the size
FROM = {"wq": "self_attn.q_proj", "wk": "self_attn.k_proj", "wv": "self_attn.v_proj", "wo": "self_attn.o_proj",
        "w1": "mlp.gate_proj", "w2": "mlp.down_proj", "w3": "mlp.up_proj", "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm"}
GGUF = {"wq": "attn_q", "wk": "attn_k", "wv": "attn_v", "wo": "attn_output", "w1": "ffn_gate", "w2": "ffn_down",
        "w3": "ffn_up", "attention_norm": "attn_norm", "ffn_norm": "ffn_norm"}


def shape_of(parameters: float) -> LlamaConfig:
    """A Llama of about so many parameters."""
    config = LlamaConfig(WORDS, DIM, 1, 32, 4, HIDDEN, max_seq_len=2048)
    with torch.device("meta"):
        layer = sum(p.numel() for p in Llama(config).layers.parameters())
    return LlamaConfig(WORDS, DIM, max(1, ceil((parameters - WORDS * DIM) / layer)), 32, 4, HIDDEN, max_seq_len=2048)


def named(name: str, names: dict[str, str], layer: str, others: dict[str, str]) -> str:
    """The name of one of our parameters in another format."""
    parts = name.split(".")
    return f"{layer}.{parts[1]}.{names[parts[-2]]}.weight" if parts[0] == "layers" else others[name]


def write_folder(folder: Path, model: Llama, dtype: torch.dtype) -> Path:
    """A Hugging Face folder in two shards; which order the rows of a query are in does not matter here."""
    c = model.config
    folder.mkdir()
    others = {"tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    state = {named(name, FROM, "model.layers", others): p.detach().to(dtype) for name, p in model.named_parameters()}
    names, shards = list(state), {}
    for i, half in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file({name: state[name] for name in half}, folder / file)
        shards |= dict.fromkeys(half, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llama", "vocab_size": c.vocab_size, "hidden_size": c.dim, "intermediate_size": c.hidden_dim,
        "num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads, "num_key_value_heads": c.n_kv_heads,
        "max_position_embeddings": c.max_seq_len, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}), encoding="utf-8")
    return folder


def write_gguf(path: Path, model: Llama, kind: GGMLQuantizationType) -> Path:
    c, writer = model.config, GGUFWriter(path, "llama")
    for name, value in dict(context_length=c.max_seq_len, embedding_length=c.dim, block_count=c.n_layers,
                            feed_forward_length=c.hidden_dim, head_count=c.n_heads, head_count_kv=c.n_kv_heads,
                            layer_norm_rms_eps=1e-5, rope_freq_base=1e4).items():
        getattr(writer, f"add_{name}")(value)
    others = {"tok_embeddings.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
    for name, p in model.named_parameters():
        form = GGMLQuantizationType.F32 if p.dim() == 1 else kind
        values = quantize(p.detach().numpy().astype(np.float32), form)
        writer.add_tensor(named(name, GGUF, "blk", others), values, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_pt(path: Path, model: Llama) -> Path:
    c = model.config
    said = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
    args = {name: getattr(c, name) for name in said}
    torch.save({"model_args": args, "model": {name: p.detach() for name, p in model.named_parameters()}}, path)
    return path


def loaded(path: Path, dtype: str) -> dict[str, Any]:
    """Loaded in a process of its own."""
    done = subprocess.run([sys.executable, "-c", LOAD, str(path), dtype], cwd=ROOT, check=True, capture_output=True,
                          text=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="the formats whose names begin like that")
    parser.add_argument("--gigabytes", type=float, default=1.5, help="of the weights in float32")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = Llama(shape_of(options.gigabytes * 1e9 / 4))
    formats = {
        "folder, float32": lambda at: write_folder(at / "folder", model, torch.float32),
        "folder, bfloat16": lambda at: write_folder(at / "folder", model, torch.bfloat16),
        "GGUF, Q8_0": lambda at: write_gguf(at / "model.gguf", model, GGMLQuantizationType.Q8_0),
        "llama2.c .pt, float32": lambda at: write_pt(at / "model.pt", model),
    }
    found: dict[str, dict[str, Any]] = {}
    for name, make in formats.items():
        if not name.startswith(options.only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = make(Path(folder))
            for dtype in ("float32", "bfloat16"):
                one = found[f"{name} -> {dtype}"] = loaded(path, dtype)
                one["ratio"] = one["peak_bytes"] / one["weights_bytes"]
                print(f"{name:22} -> {dtype:8} {one['weights_bytes'] / 1e9:5.2f} GB of weights, peak "
                      f"{one['peak_bytes'] / 1e9:5.2f} GB: {one['ratio']:.3f} times; {one['seconds']:.1f} s",
                      flush=True)
    if not options.only:
        write("load-cpu", {"machine": machine(), "loads": found})


if __name__ == "__main__":
    main()
