"""The loops of fused.c as PyTorch functions: on a CPU, what PyTorch does in many passes over memory, in one.

`accelerate(model)` lets a Llama compute with them what they can, and `AdamW(..., fused=True)` its updates. Everything
else goes through plain PyTorch: other devices and types, and all of it where there is no C compiler. The two agree to
rounding (tests/test_fused.py). `library()` compiles with $CC or cc, in a second or more, and keeps the result in the
user's cache folder for the next start.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# --------------------------------------------------------------------------- what the model calls


def accelerate(model: nn.Module) -> bool:
    """Compute in C what it can of a Llama, or of the one inside `model`. Only this model, with the modules that it has
    now, is changed, and none of its weights. Returns False, with nothing changed, where there is no library."""
    if library() is None:
        return False
    for module in model.modules():
        plain = getattr(module, "ops", None)
        if plain is not None and not isinstance(plain, Operations):
            module.ops = Operations(plain)  # type: ignore[assignment]  # PyTorch lets a module have any attribute
    return is_accelerated(model)


def is_accelerated(model: nn.Module) -> bool:
    """Has `accelerate` changed this model, or one inside it?"""
    return any(isinstance(getattr(module, "ops", None), Operations) for module in model.modules())


def supports(*tensors: Tensor) -> bool:
    """Are these on the CPU and of a type that C knows, and is there a library?"""
    return all(t.device.type == "cpu" and t.dtype in (torch.float32, torch.bfloat16) for t in tensors) and (
        library() is not None)


class Operations:
    """The operations of llama.py (`plain`), each in C for the inputs that it fits. Without state, so that a model that
    has one can be copied and pickled."""

    def __init__(self, plain: Any):
        self.plain = plain

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if supports(x) and (x.dtype == torch.float32 or not torch.is_grad_enabled()):
            return RMSNorm.apply(x, weight, eps)
        return self.plain.rms_norm(x, weight, eps)

    def rotate(self, x: Tensor, table: Tensor) -> Tensor:
        if supports(x) and table.shape == (x.shape[1], x.shape[-1] // 2):
            return Rotate.apply(x, table)
        return self.plain.rotate(x, table)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        if supports(gate, up) and gate.dtype == up.dtype:
            return SwiGLU.apply(gate, up)
        return self.plain.swiglu(gate, up)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """For one token, in `generate`, a product is bound by reading the weight."""
        if x.numel() == weight.shape[1] and torch.is_inference_mode_enabled() and x.dtype == weight.dtype and (
                x.numel() % 2 == 0 and supports(x, weight) and weight.is_contiguous()):
            return matvec(weight, x)
        return self.plain.linear(x, weight)

    def decoder(self, llama: Any, caches: list) -> "Decoder | None":
        return Decoder(llama, caches) if Decoder.supports(llama, caches) else None


# --------------------------------------------------------------------------- the loops, with their gradients


def _call(name: str, *arguments: Any) -> None:
    """A function of fused.c, on as many threads as PyTorch has."""
    getattr(library(), name)(*arguments, torch.get_num_threads())


def _is_half(x: Tensor) -> int:
    return int(x.dtype == torch.bfloat16)


class RMSNorm(torch.autograd.Function):
    """x (..., D) to x / sqrt(mean(x^2) + eps) * weight, in the type that autocast's products want."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, dim = x.contiguous(), x.shape[-1]
        low = x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu") and (
            torch.get_autocast_dtype("cpu") == torch.bfloat16)
        y = torch.empty_like(x, dtype=torch.bfloat16 if low else torch.float32)
        roots = torch.empty(x.numel() // dim)
        _call("rms_norm", len(roots), dim, x, _is_half(x), weight.float(), eps, y, _is_half(y), roots)
        ctx.save_for_backward(x, weight, roots)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, roots = ctx.saved_tensors
        gradient, dim = gradient.contiguous(), x.shape[-1]
        dx, dweights = torch.empty_like(x), x.new_zeros(torch.get_num_threads(), dim)
        _call("rms_norm_back", len(roots), dim, x, weight.float(), roots, gradient, _is_half(gradient), dx, dweights)
        return dx, dweights.sum(0).to(weight.dtype), None


class Rotate(torch.autograd.Function):
    """x (B, T, heads, head_dim), its adjacent pairs turned by table (T, head_dim / 2), complex64."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        ctx.table = table
        return _turn(x, table, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _turn(gradient, ctx.table, -1.0), None


def _turn(x: Tensor, table: Tensor, sign: float) -> Tensor:
    x = x.contiguous()
    batch, length, heads, head_dim = x.shape
    y = torch.empty_like(x)
    _call("rotate", batch * length, length, heads, head_dim // 2, x, _is_half(x), table.contiguous(), sign, y)
    return y


class SwiGLU(torch.autograd.Function):
    """silu(a) * b, of two tensors of one shape."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        a, b = a.contiguous(), b.contiguous()
        y = torch.empty_like(a)
        _call("swiglu", a.numel(), a, b, _is_half(a), y)
        ctx.save_for_backward(a, b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        da, db = torch.empty_like(a), torch.empty_like(b)
        _call("swiglu_back", a.numel(), a, b, gradient.contiguous(), _is_half(a), da, db)
        return da, db


def matvec(weight: Tensor, x: Tensor) -> Tensor:
    """weight (N, D) times one vector x (..., D), both of one type; without gradients. D is even."""
    y, wide = x.new_empty(*x.shape[:-1], len(weight)), torch.empty(x.shape[-1])
    _call("matvec", *weight.shape, weight, x.contiguous(), _is_half(x), wide, y)
    return y


class Decoder:
    """All of a Llama's layers for one new token of one row, in C: 200 products of a matrix and a vector, between which
    Python would take longer than the memory takes to give the weights.

    llama: a model in evaluation mode, its weights of one type; caches: its layers' KVCache, of that type too.
    """

    def __init__(self, llama: Any, caches: list):
        config, self.caches = llama.config, caches
        context = caches[0].keys.shape[2]
        self.kept, layers = [], []  # the addresses below are of tensors that somebody must keep
        for layer, cache in zip(llama.layers, caches, strict=True):
            attention, feed_forward = layer.attention, layer.feed_forward
            tensors = [layer.attention_norm.weight.float(), layer.ffn_norm.weight.float(), attention.wq.weight,
                       attention.wk.weight, attention.wv.weight, attention.wo.weight, feed_forward.w1.weight,
                       feed_forward.w2.weight, feed_forward.w3.weight, cache.keys, cache.values]
            self.kept += tensors
            layers.append(_Layer(config.dim, config.hidden_dim, config.n_heads, config.n_kv_heads, config.head_dim,
                                 context, *(t.data_ptr() for t in tensors), config.layer_norm_eps,
                                 _is_half(cache.keys)))
        self.layers = (_Layer * len(layers))(*layers)
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        wide = max(config.dim, q_dim)
        self.scratch = torch.empty(max(wide, config.hidden_dim) + 2 * wide + 2 * kv_dim + config.hidden_dim
                                   + max(config.n_heads * context, config.hidden_dim))

    @staticmethod
    def supports(llama: Any, caches: list) -> bool:
        """Is all of it on the CPU, of one type, in evaluation mode and without hooks?"""
        config, layers = llama.config, list(llama.layers.modules())
        tensors = [caches[0].keys, *(p for p in llama.layers.parameters() if p.dim() > 1)]
        return (supports(*tensors) and len({t.dtype for t in tensors}) == 1
                and all(t.is_contiguous() for t in tensors) and not llama.training
                and not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in layers)
                and config.dim % 2 == config.hidden_dim % 2 == 0)

    def step(self, x: Tensor, position: int, angles: Tensor) -> Tensor:
        """x (1, 1, D), the new token's embedding, to what the last layer makes of it. `angles`: the rotary table's row
        of its position."""
        stream = x.to(torch.float32, copy=True)
        _call("decode", len(self.layers), self.layers, position, angles.contiguous(), stream, self.scratch)
        return stream.to(x.dtype)


# --------------------------------------------------------------------------- the library


class _Tensor:
    """The type of a C argument for which Python gives a tensor, in one piece."""

    @staticmethod
    def from_param(x: Tensor) -> ctypes.c_void_p:
        return ctypes.c_void_p(x.data_ptr())


_INTEGER, _POINTER, _FLAG, _FLOAT = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int, ctypes.c_float
_ADAMW_NUMBERS = [_FLOAT] * 6
_WEIGHTS = ("attention_norm", "ffn_norm", "wq", "wk", "wv", "wo", "w1", "w2", "w3", "keys", "values")


class _Layer(ctypes.Structure):
    """fused.c's `layer`."""

    _fields_ = [*((name, _INTEGER) for name in ("dim", "hidden", "heads", "kv_heads", "head_dim", "context")),
                *((name, _POINTER) for name in _WEIGHTS), ("eps", _FLOAT), ("half", _FLAG)]


_SIGNATURES: dict[str, list] = {
    "adamw": [_INTEGER] + [_POINTER] * 4 + _ADAMW_NUMBERS,
    "adamw_rows": [_INTEGER] * 2 + [_POINTER] * 7 + _ADAMW_NUMBERS,
    "rms_norm": [_INTEGER] * 2 + [_Tensor, _FLAG, _Tensor, _FLOAT, _Tensor, _FLAG, _Tensor, _FLAG],
    "rms_norm_back": [_INTEGER] * 2 + [_Tensor] * 4 + [_FLAG] + [_Tensor] * 2 + [_FLAG],
    "rotate": [_INTEGER] * 4 + [_Tensor, _FLAG, _Tensor, _FLOAT, _Tensor, _FLAG],
    "swiglu": [_INTEGER] + [_Tensor] * 2 + [_FLAG, _Tensor, _FLAG],
    "swiglu_back": [_INTEGER] + [_Tensor] * 3 + [_FLAG] + [_Tensor] * 2 + [_FLAG],
    "decode": [_INTEGER, _POINTER, _INTEGER] + [_Tensor] * 3 + [_FLAG],
    "matvec": [_INTEGER] * 2 + [_Tensor] * 2 + [_FLAG] + [_Tensor] * 2 + [_FLAG],
}
SOURCE = Path(__file__).with_suffix(".c")
_LOCK = threading.Lock()
_FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
# Without fused multiply-adds that are not asked for (-ffp-contract=off) each operation is rounded as IEEE 754 has it:
# how AdamW's work is divided among threads changes no bit. Apple's compiler has no OpenMP, and another's would meet
# PyTorch's in one process: there, all but AdamW runs on one thread.
_THREADS = [["-fopenmp-simd"]] if sys.platform == "darwin" else [["-fopenmp"], ["-fopenmp-simd"]]
_VARIANTS = [["-march=native", *t] for t in _THREADS] + [["-march=native"], []]  # the first one that works


def library() -> ctypes.CDLL | None:
    """The compiled file; None where no C compiler works, and `fault()` then says why."""
    with _LOCK:  # a run compiles beside its loading
        return _compiled()[0]


def fault() -> str:
    """Why there is no library, and what to do about it; "" where there is one."""
    with _LOCK:
        return _compiled()[1]


@functools.cache
def _compiled() -> tuple[ctypes.CDLL | None, str]:
    return _find()


def _find() -> tuple[ctypes.CDLL | None, str]:
    """The library, from the cache or else compiled, and why there is none."""
    try:
        cache, key, command = _cache(), _key(), _compiler()
        if cache and (cached := _from_cache(cache, key)):
            return cached, ""
        temporary, is_certain = Path(tempfile.gettempdir()), True
        if _is_noexec(temporary) and (cache is None or _is_noexec(cache)):
            return None, _noexec(temporary)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            out = Path(folder, "fused.so")
            for more in _VARIANTS:
                try:
                    subprocess.run([*command, *_FLAGS, *more, str(SOURCE), "-o", str(out), "-lm"], check=True,
                                   capture_output=True, timeout=60)
                except subprocess.TimeoutExpired:  # on a busy machine: another day this variant may work
                    is_certain = False
                    continue
                except subprocess.SubprocessError:
                    continue
                kept = _keep(out, cache, key) if cache and is_certain else out
                try:
                    return _load(kept), ""
                except AttributeError:
                    continue
                except OSError as error:
                    if kept == out and (_is_noexec(temporary) or "not permitted" in str(error)):
                        return None, _noexec(temporary)
    except (OSError, ValueError):
        pass
    return None, f"the C compiler `{os.environ.get('CC') or 'cc'}` does not work here ($CC names another)"


def _load(path: Path) -> ctypes.CDLL:
    """Raises OSError or AttributeError for a file that is not the library, or cannot be loaded here."""
    found = ctypes.CDLL(str(path))
    for name, arguments in _SIGNATURES.items():
        getattr(found, name).argtypes, getattr(found, name).restype = arguments, None
    return found


def _noexec(folder: Path) -> str:
    return (f"{folder} is mounted noexec: what is compiled there cannot be loaded (set TMPDIR to a folder on another "
            "file system)")


def _is_noexec(folder: Path) -> bool:
    """Must nothing in that folder be executed? Where the system does not tell: no."""
    try:
        return bool(os.statvfs(folder).f_flag & os.ST_NOEXEC)
    except (AttributeError, OSError):  # Windows, macOS
        return False


# --------------------------------------------------------------------------- the cache
#
# A file of it is called KEY-SHA256.so: the key says what it was made from and for, the sha256 what is in it. What is
# loaded runs with all of the user's rights: so only a file that nobody else can have written is.


def _cache() -> Path | None:
    """The user's folder for compiled files, made if need be; None where there is none that only the user can write."""
    try:
        if os.name == "nt":
            base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local"
        elif sys.platform == "darwin":
            base = Path.home() / "Library/Caches"
        else:
            named = os.environ.get("XDG_CACHE_HOME", "")
            base = named if os.path.isabs(named) else Path.home() / ".cache"  # as the XDG specification wants it
        folder = Path(base, "minllama")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder if _is_ours(folder) else None
    except (OSError, RuntimeError):  # there is no home, or it cannot be written
        return None


def _is_ours(path: Path) -> bool:
    """A file or folder, not a link to one, that is this user's and that nobody else can write."""
    found = os.lstat(path)
    if stat.S_ISLNK(found.st_mode):
        return False
    if os.name == "nt":  # the folder is the user's own there, and modes say nothing
        return True
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _key() -> str:
    """Another source, compiler, set of flags or processor has another key."""
    made_from = [hashlib.sha256(SOURCE.read_bytes()).hexdigest(), _FLAGS, _VARIANTS, _compiler(), compiler(),
                 sys.platform, platform.machine(), _processor()]
    return hashlib.sha256(repr(made_from).encode()).hexdigest()[:32]


def _processor() -> str:
    """What -march=native goes by: the processor's model and, where the system tells, what it can do."""
    try:
        if sys.platform == "darwin":
            asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(asked, capture_output=True, text=True, timeout=10).stdout
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            first = file.read().partition("\n\n")[0].splitlines()
        return "\n".join(line for line in first if "MHz" not in line and "mips" not in line.lower())
    except (OSError, subprocess.SubprocessError):
        return platform.processor()


def _from_cache(cache: Path, key: str) -> ctypes.CDLL | None:
    """The file of that key. One that is damaged, that others can write, or that does not load any more is removed."""
    for path in cache.glob(f"{key}-*.so"):
        with contextlib.suppress(OSError, AttributeError):
            if _is_ours(path) and path.stem == f"{key}-{hashlib.sha256(path.read_bytes()).hexdigest()}":
                return _load(path)
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def _keep(out: Path, cache: Path, key: str) -> Path:
    """A copy of the compiled file in the cache, there at once and whole; the file itself where none can be written."""
    content = out.read_bytes()
    path, part = cache / f"{key}-{hashlib.sha256(content).hexdigest()}.so", None
    try:
        descriptor, part = tempfile.mkstemp(dir=cache)  # of mode 0600
        with open(descriptor, "wb") as file:
            file.write(content)
        os.replace(part, path)
        return path
    except OSError:
        if part:
            with contextlib.suppress(OSError):
                os.unlink(part)
        return out


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CC") or "cc")


def compiler() -> str:
    """The C compiler's name and version: another one may round other bits."""
    try:
        run = subprocess.run([*_compiler(), "--version"], capture_output=True, text=True, timeout=10)
        return run.stdout.partition("\n")[0] or "unknown"
    except (OSError, ValueError, subprocess.SubprocessError):
        return "unknown"
