"""Weights in and out: llama2.c `.pt`, GGUF, Hugging Face folders, and our own saved classifiers.

Every reader yields `Weights`: a config, and for each parameter of the Llama a shape and a function that reads it.
Shapes are compared with the model's before anything is allocated, so a file whose header lies costs nothing.
Nothing read from disk is ever executed: tensors come from safetensors, GGUF or torch.load(weights_only=True).
"""

import errno
import json
import math
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Callable, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import LlamaConfig, RunConfig, counted, is_out_of_memory
from data import prepare
from dataset import sha256
from llama import Llama
from tokenizer import TOKENIZER_MODEL, GGUFTensor, Tokenizer, read_gguf

OLDEST_TORCH = (2, 10)


def check_torch() -> None:
    """Raises ValueError for a torch whose weights_only loading is known to be unsafe (CVE-2026-24747)."""
    version = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if version < OLDEST_TORCH:
        raise ValueError(f"torch {torch.__version__} is too old: before 2.10 even weights_only loading can be made to "
                         "corrupt memory; run `pip install -r requirements.txt`")


@dataclass(frozen=True)
class Weights:
    """A file's model: `shapes` and `readers` share their keys, the names of the Llama's parameters."""

    path: Path
    config: LlamaConfig
    shapes: dict[str, tuple[int, ...]]
    readers: dict[str, Callable[[], Tensor]]


# --------------------------------------------------------------------------- which file


@dataclass(frozen=True)
class ModelFiles:
    """The weights and the tokenizer of a run, and a line on what was chosen where nothing was asked for."""

    weights: Path
    tokenizer: Path
    notice: str = ""


def find_model(config: RunConfig) -> ModelFiles:
    """The pretrained weights of a run: what was typed; stories42M.pt where it lies (here, beside the code, in
    models/) with its tokenizer; else smollm2-135m, which is fetched. Raises FileNotFoundError."""
    root, models = Path(__file__).parent, prepare.weights_path("smollm2-135m").parent
    typed, notice = config.pretrained_model_path, ""
    if typed:
        weights = _typed_weights(typed, [Path(), root, models])
    else:
        places = [place / "stories42M.pt" for place in (Path(), root, models)]
        weights = next((p for p in places if p.is_file() and _tokenizer_beside(p, config)), None)
        if weights is None:
            weights = prepare.weights_path("smollm2-135m")
            missing = "stories42M's tokenizer.model" if any(p.is_file() for p in places) else "stories42M.pt"
            notice = (f"{missing} is not here: using smollm2-135m instead; "
                      "`python data/prepare.py stories42M` fetches the weights and their tokenizer (or imports them: "
                      "--from DIR)")
            if not weights.is_file():
                prepare.fetch("smollm2-135m")
    tokenizer = _tokenizer_beside(weights, config)
    if tokenizer is None:
        raise FileNotFoundError(f"{weights}: there is no tokenizer beside it; `python data/prepare.py stories42M` "
                                "fetches the one of the stories models, --tokenizer names another")
    return ModelFiles(weights, tokenizer, notice)


def _typed_weights(typed: str, places: list[Path]) -> Path:
    if typed in prepare.WEIGHTS and not Path(typed).exists():
        path = prepare.weights_path(typed)
        if not path.exists():
            prepare.fetch(typed)
        return path
    for place in places:
        if (place / typed).exists():
            return place / typed
    name = Path(typed).stem
    known = {n.lower(): n for n in prepare.WEIGHTS}.get(name.lower())
    hint = f"`python data/prepare.py {known}` fetches it" if known else (
        f"weights that can be fetched: {', '.join(prepare.WEIGHTS)}")
    raise FileNotFoundError(f"{typed}: there is no such file or folder; {hint}")


def _tokenizer_beside(weights: Path, config: RunConfig) -> Path | None:
    if config.tokenizer:
        return Path(config.tokenizer)
    if weights.suffix == ".gguf":
        return weights
    folder = weights if weights.is_dir() else weights.parent
    models = prepare.weights_path("smollm2-135m").parent
    places = [folder / "tokenizer.json", folder / TOKENIZER_MODEL]
    if not weights.is_dir():
        places += [Path(TOKENIZER_MODEL), Path(__file__).parent / TOKENIZER_MODEL, models / TOKENIZER_MODEL]
    return next((p for p in places if p.is_file()), None)


# --------------------------------------------------------------------------- the three formats


def _damaged(path: Path, error: object) -> ValueError:
    return ValueError(f"{path}: damaged or truncated ({error}); fetch or copy the file again")


def _config(path: Path, **values: Any) -> LlamaConfig:
    """A config of what a file says. Raises ValueError for a number of another type, or one that no model can have."""
    for name in ("vocab_size", "dim", "n_layers", "n_heads", "n_kv_heads", "hidden_dim", "max_seq_len"):
        value = values.get(name)
        if name in values and not (type(value) is int and 0 < value < 2**28 or (name, value) == ("n_kv_heads", None)):
            raise ValueError(f"{path}: {name} is {value!r}, expected a whole number above 0")
    try:
        return LlamaConfig(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_pt(path: Path) -> Weights:
    """A llama2.c checkpoint: a dict with `model_args` and `model` (github.com/karpathy/llama2.c).

    Both spellings of the attention's keys, an `_orig_mod.` prefix, and stored freqs_cos / freqs_sin are understood.
    A pickle that would run code is refused, naming what it wants to call.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: refused, {_what_it_calls(path, error)}; ask for the weights as safetensors, or for "
                         "a file with tensors and plain values only") from None
    except Exception as error:  # in a damaged file torch runs into anything: AssertionError, IndexError, ...
        if is_out_of_memory(error):
            raise
        raise _damaged(path, str(error).splitlines()[0] if str(error) else type(error).__name__) from None
    if not isinstance(saved, dict) or not {"model", "model_args"} <= saved.keys():
        raise ValueError(f"{path}: not a llama2.c checkpoint; expected a dict with `model_args` and `model`, found "
                         f"{sorted(map(str, saved))[:5] if isinstance(saved, dict) else type(saved).__name__}")
    if not isinstance(saved["model"], dict) or not isinstance(saved["model_args"], dict):
        raise ValueError(f"{path}: not a llama2.c checkpoint; `model` and `model_args` are not both dicts")
    state: dict[str, Tensor] = {}
    for key, value in saved["model"].items():
        if not isinstance(key, str) or not _is_plain(value):
            raise ValueError(f"{path}: not a llama2.c checkpoint; {key!r} in `model` is not a plain tensor with a name")
        for old, new in (("_orig_mod.", ""), ("compute_query", "wq"), ("compute_key", "wk"), ("compute_value", "wv"),
                         ("compute_output", "wo")):
            key = key.replace(old, new)
        if key not in ("freqs_cos", "freqs_sin") and not key.endswith("rope.freqs"):
            state[key] = value
    wanted = {"tok_embeddings.weight", "layers.0.feed_forward.w1.weight"}
    if not wanted <= state.keys():
        raise ValueError(f"{path}: not a Llama: {sorted(wanted - state.keys())} is missing")
    if any(state[name].dim() != 2 for name in wanted):
        raise ValueError(f"{path}: not a Llama: {sorted(wanted)} are not both of two dimensions")
    args = dict(saved["model_args"])
    args["layer_norm_eps"] = args.pop("norm_eps", args.get("layer_norm_eps", 1e-5))
    args["vocab_size"], args["dim"] = state["tok_embeddings.weight"].shape  # the file's -1 means: as the tensor
    args["hidden_dim"] = state["layers.0.feed_forward.w1.weight"].shape[0]
    output = state.get("output.weight")
    args["tie_embeddings"] = output is None or torch.equal(output, state["tok_embeddings.weight"])
    args["dropout"], args["attention"] = 0.0, "causal"
    config = _config(path, **{f.name: args[f.name] for f in fields(LlamaConfig) if f.name in args})
    if config.tie_embeddings:
        state.pop("output.weight", None)
    return Weights(path, config, {k: tuple(v.shape) for k, v in state.items()},
                   {k: (lambda tensor=v: tensor.to(torch.float32, copy=True)) for k, v in state.items()})


def _is_plain(value: Any) -> bool:
    """A dense tensor of floats with a place of its own for each: not one value that a stride of 0 repeats endlessly."""
    return (isinstance(value, Tensor) and value.layout == torch.strided and value.is_cpu and value.is_floating_point()
            and value.numel() * value.element_size() <= value.untyped_storage().nbytes())


def _is_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _what_it_calls(path: Path, error: Exception) -> str:
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # torch lists them for zip files only; for others its error names the first
        unsafe = re.findall(r"GLOBAL (\S+)", str(error))
    if unsafe:
        return f"its pickle wants to call {', '.join(unsafe)}"
    reason = str(error).partition("\n\nCheck the documentation")[0].strip().splitlines()[-1:]  # behind torch's advice
    return f"not a plain pickle ({''.join(reason)[:100]})"


_GGUF_NAMES = {
    "attn_norm": "attention_norm", "attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv",
    "attn_output": "attention.wo", "ffn_norm": "ffn_norm", "ffn_gate": "feed_forward.w1", "ffn_down": "feed_forward.w2",
    "ffn_up": "feed_forward.w3",
}


def read_gguf_weights(path: Path) -> Weights:
    """A GGUF of the llama architecture, quantised or not. Its query and key rows are in adjacent pairs already."""
    metadata, tensors = read_gguf(path)
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{path}: a GGUF of the architecture {architecture!r}; only llama is read here")

    def value(key: str, default: Any = None) -> Any:
        found = metadata.get("llama." + key, default)
        if not isinstance(found, int | float) or isinstance(found, bool):
            raise ValueError(f"{path}: the GGUF's llama.{key} is {found!r}, expected a number")
        return found

    if metadata.get("llama.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in tensors:
        raise ValueError(f"{path}: its rotary positions are scaled, which is not supported here")
    if "token_embd.weight" not in tensors:
        raise ValueError(f"{path}: not a Llama: token_embd.weight is missing")
    names = {"token_embd.weight": "tok_embeddings.weight", "output_norm.weight": "norm.weight",
             "output.weight": "output.weight"}
    for name in tensors:
        match = re.fullmatch(r"blk\.(\d{1,9})\.(\w+)\.weight", name)
        if match and match[2] in _GGUF_NAMES:
            names[name] = f"layers.{int(match[1])}.{_GGUF_NAMES[match[2]]}.weight"
        elif name.startswith("blk."):
            raise ValueError(f"{path}: {name} is not part of the Llama that is supported here (a bias, or an expert?)")
    found = {names[name]: tensor for name, tensor in tensors.items() if name in names}
    config = _config(
        path, vocab_size=tensors["token_embd.weight"].shape[0], dim=value("embedding_length"),
        n_layers=value("block_count"),
        n_heads=value("attention.head_count"),
        n_kv_heads=value("attention.head_count_kv", value("attention.head_count")),
        hidden_dim=value("feed_forward_length"), max_seq_len=value("context_length"),
        layer_norm_eps=value("attention.layer_norm_rms_epsilon"), rope_theta=value("rope.freq_base", 10000.0),
        tie_embeddings="output.weight" not in tensors,
    )
    if value("rope.dimension_count", config.head_dim) != config.head_dim:
        raise ValueError(f"{path}: it rotates {value('rope.dimension_count')} of {config.head_dim} dimensions; only "
                         "whole heads are supported")
    return Weights(path, config, {k: t.shape for k, t in found.items()},
                   {k: (lambda tensor=t: _dequantise(path, tensor)) for k, t in found.items()})


def _dequantise(path: Path, tensor: GGUFTensor) -> Tensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    raw = np.fromfile(path, dtype=np.uint8, count=tensor.nbytes, offset=tensor.start)
    kind = GGMLQuantizationType(tensor.kind)
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        raw = raw.view(np.float32 if kind == GGMLQuantizationType.F32 else np.float16)
    else:  # the package works 16 rows at a time: long rows of whole blocks are several times as fast as the tensor's
        block_bytes = GGML_QUANT_SIZES[kind][1]
        raw = raw.reshape(-1, math.gcd(tensor.nbytes // block_bytes, 1024) * block_bytes)
    try:
        values = dequantize(raw, kind)
    except NotImplementedError:
        raise ValueError(f"{path}: the quantisation {kind.name} cannot be read; use a Q4_0 to Q8_0, K-quant, F16 or "
                         "F32 file") from None
    return torch.from_numpy(values.reshape(tensor.shape).astype(np.float32, copy=False))


_HF_NAMES = {
    "input_layernorm": "attention_norm", "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
}


def read_hf_folder(path: Path) -> Weights:
    """A Hugging Face folder of a llama: config.json and safetensors, in one file or in shards.

    Its query and key rows rotate halves; they are reordered to adjacent pairs.
    """
    settings = read_json(path / "config.json")
    if settings.get("model_type") != "llama":
        raise ValueError(f"{path / 'config.json'}: the model type is {settings.get('model_type')!r}; only llama is "
                         "read here")
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path / 'config.json'}: rope_parameters is {rope!r}, expected an object")
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise ValueError(f"{path / 'config.json'}: its rotary positions are scaled ({rope}); that is not supported")
    if settings.get("hidden_act", "silu") != "silu" or settings.get("quantization_config"):
        raise ValueError(f"{path / 'config.json'}: only a Llama with silu and without quantisation is supported here")
    for key in ("attention_bias", "mlp_bias"):
        if settings.get(key):
            raise ValueError(f"{path / 'config.json'}: {key} is true; only a Llama without biases is supported here")
    try:
        config = _config(
            path / "config.json", vocab_size=settings["vocab_size"], dim=settings["hidden_size"],
            n_layers=settings["num_hidden_layers"],
            n_heads=settings["num_attention_heads"], n_kv_heads=settings.get("num_key_value_heads"),
            hidden_dim=settings["intermediate_size"], max_seq_len=settings.get("max_position_embeddings", 2048),
            layer_norm_eps=settings.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta", settings.get("rope_theta", 10000.0)),
            tie_embeddings=settings.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise ValueError(f"{path / 'config.json'}: {error} is missing") from None
    if settings.get("head_dim") not in (None, config.head_dim):
        raise ValueError(f"{path / 'config.json'}: head_dim {settings['head_dim']} is not hidden_size / heads "
                         f"({config.head_dim}), which is not supported here")
    shapes, readers = {}, {}
    for file in _safetensors_files(path):
        handle = open_safetensors(file)
        for key in handle.keys():
            name, dtype = _from_hf_name(key), handle.get_slice(key).get_dtype()
            if name is None and key.startswith("model.layers.") and not key.endswith("rotary_emb.inv_freq"):
                raise ValueError(f"{file}: {key} is not part of the Llama that is supported here (a bias, an adapter?)")
            if name is None or (name == "output.weight" and config.tie_embeddings):
                continue
            if dtype not in ("F64", "F32", "F16", "BF16"):
                raise ValueError(f"{file}: {key} has the type {dtype}; only floating-point weights are read here")
            shapes[name] = tuple(handle.get_slice(key).get_shape())
            readers[name] = lambda handle=handle, key=key, name=name: _to_pairs(
                handle.get_tensor(key).to(torch.float32, copy=True), name, config.head_dim)  # not the file's own memory
    return Weights(path, config, shapes, readers)


def _from_hf_name(key: str) -> str | None:
    plain = {"model.embed_tokens.weight": "tok_embeddings.weight", "model.norm.weight": "norm.weight",
             "lm_head.weight": "output.weight"}
    match = re.fullmatch(r"model\.layers\.(\d{1,9})\.(.+)\.weight", key)
    if match and match[2] in _HF_NAMES:
        return f"layers.{int(match[1])}.{_HF_NAMES[match[2]]}.weight"
    return plain.get(key)


def _to_pairs(weight: Tensor, name: str, head_dim: int) -> Tensor:
    """Rows of a query or key in the order (0, h/2, 1, h/2 + 1, ...) inside each head: halves become pairs."""
    if not name.endswith(("wq.weight", "wk.weight")):
        return weight
    heads = weight.view(-1, 2, head_dim // 2, weight.shape[1])
    return heads.transpose(1, 2).reshape(weight.shape)


def _safetensors_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise ValueError(f"{index}: weight_map is not a list of files")
        names = sorted(set(shards.values()))
    for name in names:
        if Path(name).name != name or not (path / name).is_file():
            raise FileNotFoundError(f"{path / Path(name).name}: there is no such file; the folder needs "
                                    "model.safetensors, or the shards that model.safetensors.index.json names")
    return [path / name for name in names]


def open_safetensors(path: Path):
    """A safetensors file, opened without reading its tensors. Raises ValueError for a header that cannot be."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        if is_out_of_memory(error):
            raise
        # The library checks every count and offset against the file's size.
        raise _damaged(path, error) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError, or ValueError with the line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also a number of 5000 digits, or 100,000 brackets
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


# --------------------------------------------------------------------------- loading


def read_weights(path: str | Path) -> Weights:
    """The config and the lazy tensors of a file or folder of any format. Raises FileNotFoundError or ValueError."""
    check_torch()
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file or folder")
    if path.is_dir():
        return read_hf_folder(path)
    with open(path, "rb") as file:
        is_gguf = file.read(4) == b"GGUF"
    return read_gguf_weights(path) if is_gguf or path.suffix == ".gguf" else read_pt(path)


def check_n_layers(weights: Weights, n_layers: int | None) -> None:
    """Raises ValueError for more layers than the file has, and for a file that has others than it says."""
    config = weights.config
    held = {int(m[1]) for name in weights.shapes if (m := re.match(r"layers\.(\d{1,9})\.", name))}
    if config.n_layers != len(held):
        raise ValueError(f"{weights.path}: it says {counted(config.n_layers, 'layer')} and holds {len(held)}")
    if n_layers is not None and not 1 <= n_layers <= config.n_layers:
        raise ValueError(f"--n_layers {n_layers}: {weights.path} has {counted(config.n_layers, 'layer')}")


def load_pretrained(checkpoint: str | Path | Weights, n_layers: int | None = None, dropout: float = 0.0,
                    attention: str = "causal") -> Llama:
    """A Llama in float32, in evaluation mode, with the weights of a file or folder of any format.

    `n_layers`: the first K layers of the stack only (the others are not read). Raises FileNotFoundError, or
    ValueError for a file that is damaged, of another architecture, or that holds other shapes than it says.
    """
    weights = checkpoint if isinstance(checkpoint, Weights) else read_weights(checkpoint)
    check_n_layers(weights, n_layers)
    config = replace(weights.config, n_layers=n_layers or weights.config.n_layers, dropout=dropout, attention=attention)
    with torch.device("meta"):
        model = Llama(config)
    for name, parameter in model.named_parameters():
        if weights.shapes.get(name) != tuple(parameter.shape):
            raise ValueError(f"{weights.path}: {name} has the shape {weights.shapes.get(name)}, the model it describes "
                             f"wants {tuple(parameter.shape)}")
    names = [name for name, _ in model.named_parameters()]
    with ThreadPoolExecutor(min(4, torch.get_num_threads())) as pool:
        state = dict(zip(names, pool.map(lambda name: weights.readers[name]().contiguous(), names), strict=True))
    model.load_state_dict(state, assign=True, strict=False)
    if config.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    model.requires_grad_(True)
    return model.eval()


def check_vocabulary(tokenizer: Tokenizer, config: LlamaConfig) -> None:
    """Raises ValueError for a tokenizer that knows more words than the embedding has rows, added ones included."""
    if tokenizer.n_words > config.vocab_size:
        raise ValueError(f"{tokenizer.path}: the tokenizer numbers {counted(tokenizer.n_words, 'word')}, the model's "
                         f"embedding has only {config.vocab_size} rows; they do not belong together (--tokenizer names "
                         "another)")


# --------------------------------------------------------------------------- our own files


def check_writable(path: Path, option: str) -> None:
    """Raises OSError, naming the option, for a file that could not be written; makes its folder."""
    if path.exists() and not path.is_file() and not path.is_dir():
        return  # a pipe or a device
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "it is a folder; name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".tmp"):  # a name that nobody has
            pass
    except OSError as error:
        raise OSError(f"{option} {path}: it cannot be written ({error.strerror})") from None


def write_atomically(path: Path, write: Callable[[Path], None], follow: bool = True) -> None:
    """Call write(temporary path), flush it to disk and rename it: path is the old file or the new, never half. What a
    symbolic link points to is replaced, not the link; a pipe or a device is written to. With `follow=False`, for a file
    of a run folder, both are refused. Raises OSError, naming the path and the bytes that are free, when the disk is
    full."""
    from safetensors import SafetensorError

    if not follow:
        check_plain(path)
    path = path.parent.resolve() / path.name if not follow else path.resolve()
    if path.exists() and not path.is_file():
        write(path)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)  # else, after a power cut, a state could know of a best model that is not there
    except (OSError, SafetensorError) as error:
        raise disk_full(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def check_plain(path: Path, is_folder: bool = False) -> None:
    """Raises OSError for a path of a run folder that is there and is not what the run makes: a link, which would lead
    out of the folder, a device or a pipe."""
    if path.is_symlink():
        raise OSError(f"{path}: this is a symbolic link, and inside a run folder no link is followed; put the "
                      f"{'folder' if is_folder else 'file'} itself there, or remove the link")
    if path.exists() and not (path.is_dir() if is_folder else path.is_file()):
        raise OSError(f"{path}: this is not a {'folder' if is_folder else 'regular file'}, as a run makes it; move it "
                      "away")


def disk_full(path: Path, error: Exception) -> Exception:
    """What to raise for an error while writing: itself, or where it means that there is no room, an OSError that names
    the path and the bytes."""
    full = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", None))
    if isinstance(error, OSError) and error.errno not in full:
        return error
    free = shutil.disk_usage(path.parent).free
    return OSError(f"{path}: it could not be written ({error}); {free} bytes are free there")


def remove_litter(folder: Path) -> None:
    """Remove what a killed process left half-written: ours are .NAME.tmp, safetensors' .tmpXXXXXX. The lock of the run
    makes them nobody else's."""
    for path in [*folder.glob(".*.tmp"), *folder.glob(".tmp??????")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """A JSON file of a run folder, written atomically."""
    text = json.dumps(value, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), follow=False)


MANIFEST, STATE = "manifest.json", "state.json"
READ_FROM_BEST = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", TOKENIZER_MODEL)


def save_classifier(folder: Path, model: torch.nn.Module, tokenizer: Tokenizer, settings: dict[str, Any]) -> str:
    """A classifier that can predict on another machine: model.safetensors, config.json, the tokenizer, and a manifest
    with the sha256 of each; returns the manifest's own.

    `settings` are the classifier's own (labels, pooling, ...); the Llama's config is added. All is written into a
    folder beside, .best.tmp, which then takes the place of best/; that one becomes .best.old, until
    `remove_previous_best`. So at any moment there is a whole classifier: in best/, or between the two renames in
    .best.old. Raises OSError, naming the path and the bytes, when the disk is full.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary, previous = folder.with_name(f".{folder.name}.tmp"), previous_best(folder)
    state = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file(state, str(temporary / "model.safetensors"))
        (temporary / "model.safetensors").chmod(0o644)  # the library makes it 0600
        tokenizer.save(temporary)
        text = json.dumps({**settings, "llama": asdict(model.llama.config)}, indent=1) + "\n"
        (temporary / "config.json").write_text(text, encoding="utf-8")
        write_manifest(temporary, {})
        digest = sha256(temporary / MANIFEST)
        if folder.exists():
            shutil.rmtree(previous, ignore_errors=True)
            os.replace(folder, previous)
        os.replace(temporary, folder)
        flush_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise disk_full(folder, error) from None
    return digest


def write_manifest(folder: Path, more: dict[str, Any]) -> None:
    """manifest.json, written last: size and sha256, read back, of each file of the folder, and `more`; all flushed."""
    files = {}
    for path in sorted(folder.iterdir()):
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    with open(folder / MANIFEST, "w", encoding="utf-8") as file:
        json.dump({**more, "files": files}, file)
        file.flush()
        os.fsync(file.fileno())


def previous_best(folder: Path) -> Path:
    """Where the classifier in `folder` goes while a new one takes its place."""
    return folder.with_name(f".{folder.name}.old")


def remove_previous_best(best: Path) -> None:
    """Once a state that knows of the new best/ is on the disk, the one before is not needed any more."""
    shutil.rmtree(previous_best(best), ignore_errors=True)


def restore_best(best: Path, digest: str | None) -> None:
    """After a kill: best/ is again the one that the state knows, by its manifest's sha256, where that one is still
    there. A best/ that is newer than the state is made again by the steps that are done again."""
    previous = previous_best(best)
    if previous.is_dir() and manifest_digest(best) != digest and manifest_digest(previous) == digest:
        if best.exists():
            _remove(best)
        os.replace(previous, best)
    if best.exists():
        remove_previous_best(best)


def manifest_digest(folder: Path) -> str | None:
    """The sha256 of a folder's manifest; None where there is none."""
    path = folder / MANIFEST
    return sha256(path) if path.is_file() and not path.is_symlink() else None


def check_best(best: Path, digest: str | None = None) -> bool:
    """Is the classifier in best/ what its manifest says? False for one of an older version, which has no manifest.

    `digest`: the manifest's own sha256, where it is known. Raises ValueError that names the file that has changed.
    """
    while True:
        before = manifest_digest(best)
        fault = None if before is None else _fault(best, {"model.safetensors", "config.json"})
        if before == manifest_digest(best):
            break  # else a run that is still training has put a new one there, just now
    if before is None and digest is None:
        return False
    if not fault and digest is not None and before != digest:
        why = "not that of the run's best evaluation (sha256)" if before else "gone"
        fault = f"{MANIFEST} is {why}"
    if not fault:
        known = read_json(best / MANIFEST)["files"]
        strange = [name for name in READ_FROM_BEST if name not in known and (best / name).exists()]
        fault = f"{strange[0]} is not one of the files that the run has written" if strange else None
    if fault:
        raise ValueError(f"{best}{os.sep}{fault}; copy the folder from where it is whole, or train again")
    return True


def load_classifier_state(folder: Path, model: torch.nn.Module) -> None:
    """Read the weights of `save_classifier` into a model of the same shape, in place."""
    handle = open_safetensors(folder / "model.safetensors")
    own = model.state_dict()
    held = set(handle.keys())
    wrong = [k for k in own if k not in held or tuple(handle.get_slice(k).get_shape()) != tuple(own[k].shape)]
    if wrong or held - own.keys():
        raise ValueError(f"{folder}: model.safetensors and config.json do not belong together ({wrong[:3]})")
    state = {name: handle.get_tensor(name).float() for name in own}
    model.load_state_dict(state, assign=any(tensor.is_meta for tensor in own.values()))


# --------------------------------------------------------------------------- the state of a run, for an exact resume


def split_tensors(value: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """A nest of dicts and lists into the same nest without its tensors, and the tensors by their path.

    A tensor's place holds {"tensor": path}; dict keys become [key, value] pairs, since JSON knows only text keys.
    """
    if isinstance(value, Tensor):
        return {"tensor": path}, {path: value}
    if isinstance(value, dict):
        pairs, tensors = [], {}
        for key, item in value.items():
            plain, found = split_tensors(item, f"{path}.{key}" if path else str(key))
            pairs.append([key, plain])
            tensors |= found
        return {"dict": pairs}, tensors
    if isinstance(value, list | tuple):
        items, tensors = [], {}
        for i, item in enumerate(value):
            plain, found = split_tensors(item, f"{path}.{i}" if path else str(i))
            items.append(plain)
            tensors |= found
        return {"tuple" if isinstance(value, tuple) else "list": items}, tensors
    return value, {}


def join_tensors(plain: Any, tensors: dict[str, Tensor]) -> Any:
    """The nest that `split_tensors` took apart."""
    if not isinstance(plain, dict):
        return plain
    (kind, content), = plain.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: join_tensors(item, tensors) for key, item in content}
    items = [join_tensors(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def flush_folder(folder: Path) -> None:
    """Make a rename in this folder durable; Windows has no such call and does not need it."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def save_state(last: Path, step: int, tensors: dict[str, Tensor], values: dict[str, Any], good: bool) -> None:
    """A state in last/step-<step>-<n>/: tensors, values, and a manifest with sizes and sha256, written last.

    Written into a folder beside, flushed, read back and renamed; then the older states are removed, but for the one
    before and the newest good one (`good`: a state to roll back to). Raises OSError, naming the path and
    the bytes, when the disk is full; the states before stay as they were and the half-written one is removed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    check_plain(last, is_folder=True)
    last.mkdir(parents=True, exist_ok=True)
    remove_litter(last)
    existing = _states(last)
    folder = last / f"step-{step}-{_number(existing[0]) + 1 if existing else 0}"
    temporary = last / f".{folder.name}.tmp"
    wanted = sum(t.numel() * t.element_size() for t in tensors.values())
    try:
        temporary.mkdir()
        plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        save_file(plain, str(temporary / "tensors.safetensors"))
        (temporary / STATE).write_text(json.dumps(values), encoding="utf-8")
        write_manifest(temporary, {"step": step, "good": good})
        os.replace(temporary, folder)
        flush_folder(last)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(last).free
        raise OSError(f"{folder}: the state could not be written ({error}): it takes {wanted} bytes, {free} are free; "
                      "the last whole state is kept") from None
    keep_good = next((s for s in [folder, *existing] if _is_good(s)), None)
    for old in existing[1:]:  # the one before stays too: it is what a damaged newest state falls back to
        if old != keep_good:
            _remove(old)


def _remove(state: Path) -> None:
    """First out of the way, so that a kill in the middle leaves litter and no half state."""
    temporary = state.with_name(f".{state.name}.tmp")
    try:
        os.replace(state, temporary)
    except OSError:
        return  # somebody has it open (Windows); the next save tries again
    shutil.rmtree(temporary, ignore_errors=True)


def _is_good(state: Path) -> bool:
    """Does its manifest, which may be damaged, call it good?"""
    try:
        return read_json(state / MANIFEST).get("good") is True
    except (ValueError, OSError):
        return False


def run_of(state: Path) -> dict[str, Any]:
    """What a state says of the run that it belongs to: `id` and `options`; {} where it says nothing that makes sense,
    as one of an older version."""
    try:
        found = join_tensors(dict(read_json(state / STATE)["dict"])["run"], {})
        return found if isinstance(found, dict) and isinstance(found.get("options"), dict) else {}
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        return {}


def newest_run(last: Path) -> dict[str, Any]:
    """`run_of` of the newest state that can be read; {} where there is none."""
    return next((found for state in _states(last) if (found := run_of(state))), {})


def remove_other_states(last: Path, run_id: str | None) -> list[str]:
    """Remove the whole states that belong to another run than the one with this id, as an old run's beside a new
    args.json; a line for each."""
    lines = []
    for state in _states(last):
        if run_of(state).get("id") != run_id and _fault(state) is None:
            lines.append(f"{state}: this state belongs to another run than args.json does; it is not used")
            _remove(state)
    return lines


def has_states(last: Path) -> bool:
    """Has a state ever been committed here, whole or not?"""
    return bool(_states(last))


def _number(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _states(last: Path) -> list[Path]:
    """The committed states, newest first, damaged ones too."""
    found = [p for p in last.glob("step-*-*") if re.fullmatch(r"step-\d+-\d+", p.name)]
    return sorted(found, key=_number, reverse=True)


def _fault(folder: Path, needed: Set[str] = frozenset({"tensors.safetensors", STATE})) -> str | None:
    """What is wrong with a folder that has a manifest, beginning with the file's name, or None."""
    try:
        files = read_json(folder / MANIFEST)["files"]
        for name, known in files.items():
            path = folder / name
            if Path(name).name != name or path.is_symlink() or not path.is_file():
                return f"{name} is missing, or is not a file"
            if path.stat().st_size != known["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {known['bytes']}"
            if sha256(path) != known["sha256"]:
                return f"{name} has changed since it was written (sha256)"
        return None if needed <= files.keys() else f"{MANIFEST} is not whole"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"{MANIFEST} cannot be read ({error})"


def load_state(last: Path, only_good: bool = False) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """Tensors and values of the newest state that is whole, and a line for each damaged one that was passed over; those
    are removed, so that the next save counts on whole ones only.

    Raises ValueError when there is none.
    """
    faults, damaged = [], []
    for folder in _states(last):
        fault = _fault(folder)
        if fault:
            faults.append(f"{folder}: {fault}; going back to the state before it")
            damaged.append(folder)
        elif not only_good or _is_good(folder):
            handle = open_safetensors(folder / "tensors.safetensors")
            tensors = {k: handle.get_tensor(k).clone() for k in handle.keys()}  # without, they would be the file itself
            for state in damaged:
                _remove(state)
            return tensors, read_json(folder / STATE), faults
    raise ValueError("\n".join([*faults, f"{last}: there is no whole state to go on from; start the run again"]))


def keep_newest_state(last: Path) -> None:
    """Of a finished run, only the newest state stays."""
    for old in _states(last)[1:]:
        shutil.rmtree(old, ignore_errors=True)
