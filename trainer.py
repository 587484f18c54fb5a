"""The one training loop and the one evaluation loop, the device and its precision, and the run folder.

Nothing here knows what the task is: a `Task` brings the model, its loss, and how a model is scored and saved.
"""

import copy
import hashlib
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, get_args, get_origin

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import guards
import kernels
from checkpoint import (
    check_best,
    check_plain,
    disk_full,
    has_states,
    join_tensors,
    load_state,
    newest_run,
    read_json,
    remove_other_states,
    remove_previous_best,
    restore_best,
    save_state,
    split_tensors,
    write_json,
)
from config import RunConfig, counted, fault_of, is_out_of_memory, shown
from dataset import Split, length_order, make_batch

# --------------------------------------------------------------------------- the device and its precision


@dataclass(frozen=True)
class Device:
    """Where the tensors are, and the precision of the matrix products there."""

    where: torch.device
    dtype: torch.dtype

    def autocast(self) -> AbstractContextManager:
        """Matrix products in `dtype`, everything that needs it in float32."""
        return torch.autocast(self.where.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def put(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch on the device; from pinned memory and without waiting where that is a GPU."""
        if self.where.type == "cuda":
            return {k: v.pin_memory().to(self.where, non_blocking=True) for k, v in batch.items()}
        return {k: v.to(self.where) for k, v in batch.items()}

    def __str__(self) -> str:
        is_gpu = self.where.type == "cuda"
        name = torch.cuda.get_device_name(self.where) if is_gpu else counted(torch.get_num_threads(), "thread")
        return f"{self.where} ({name}), {str(self.dtype).removeprefix('torch.')}"


def is_fast_at_bfloat16(where: torch.device) -> bool:
    """A GPU with bfloat16 units, or a processor with AVX512_BF16 or AMX; elsewhere it is emulated, and far slower."""
    if where.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if where.type != "cpu":
        return False
    probes = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(probe() for probe in probes if probe)


def choose_device(config: RunConfig) -> Device:
    """What --device, --use_gpu and --dtype ask for. Without a GPU, --use_gpu warns and the CPU is used.

    Raises ValueError for a --device that is not there.
    """
    name = config.device or ("cuda" if config.use_gpu else "cpu")
    if config.use_gpu and not config.device and not torch.cuda.is_available():
        warn("--use_gpu: there is no GPU that this torch can use; running on the CPU")
        name = "cpu"
    try:
        where = torch.device(name)
        torch.zeros(1, device=where)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        where = None
    if where is None or where.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {name}: this torch has no such device here; it can be cpu, cuda, cuda:N or mps")
    fast = is_fast_at_bfloat16(where)
    if config.dtype == "auto":
        return Device(where, torch.bfloat16 if fast else torch.float32)
    if config.dtype == "bfloat16" and not fast and config.option != "generate":  # which multiplies vectors, in C
        warn(f"--dtype bfloat16: {where} only emulates it, which can be a hundred times slower than float32")
    return Device(where, getattr(torch, config.dtype))


def warn(message: str) -> None:
    """A line on stderr, so that stdout keeps to results."""
    print(shown(f"warning: {message}"), file=sys.stderr, flush=True)


# --------------------------------------------------------------------------- signals


class Stop(Exception):
    """A signal asked the run to stop; raised between two steps or two evaluation batches."""


class Signals:
    """While active, SIGINT and SIGTERM (and SIGHUP where there is one) are noted, to be acted on between two steps.
    A second one falls through to the handler that was there before: it stops at once. One that is ignored (nohup's
    SIGHUP) stays ignored."""

    def __init__(self) -> None:
        self.got: int | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        self.got, self.before = None, {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self.before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.got = number
        self._restore()
        with suppress(OSError):  # past sys.stderr: it may be in the middle of a line, and cannot be entered twice
            os.write(2, b"\nstopping after this step (once more: at once)\n")

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        self._restore()
        self.got = None  # it has been acted on

    def check(self) -> None:
        if self.got is not None:
            raise Stop


SIGNALS = Signals()


@contextmanager
def stoppable(folder: Path | None, save: Callable[[], None] = lambda: None,
              config: RunConfig | None = None) -> Iterator[None]:
    """Inside, a signal ends the program between two steps or evaluation batches: `save()`, the command that resumes the
    run in `folder`, with those of the `config`'s options that a resume must be given again, and the exit code that a
    shell gives a signal's end."""
    with SIGNALS:
        try:
            yield
            SIGNALS.check()
        except Stop:
            save()
            resume = f"; go on with: {resume_command(folder, config)}" if folder else ""
            print(shown(f"stopped{resume}"), file=sys.stderr, flush=True)
            raise SystemExit(128 + SIGNALS.got) from None


def resume_command(folder: Path, config: RunConfig | None) -> str:
    """The command that resumes a run. Output files outside the folder are named again, see `outside`."""
    words = ["python", "run_llama.py", "--resume", str(folder)]
    for name in outside(folder, config) if config else ():
        words += [f"--{name}", getattr(config, name)]
    return shlex.join(words)


def outside(folder: Path, config: RunConfig) -> list[str]:
    """Those of --dev_out and --test_out that are not in the run's folder: a run folder may be somebody else's, and only
    what is typed may write elsewhere."""
    inside = folder.resolve()
    return [name for name in ("dev_out", "test_out")
            if getattr(config, name) and inside not in Path(getattr(config, name)).resolve().parents]


# --------------------------------------------------------------------------- the run folder

RUN_FILE = "args.json"
LOGS = ("steps.jsonl", "epochs.jsonl", "events.jsonl")
PREDICTIONS = ("dev-predictions.txt", "test-predictions.txt")
FOLDERS = ("last", "best", ".best.old", ".best.tmp")


def check_run_folder(folder: Path) -> None:
    """Raises OSError where a link, a device or a pipe stands in the place of a file of the run: it may come from
    somebody else, and would lead out of the folder. The folder itself may be a link."""
    for name in (RUN_FILE, *LOGS, "result.json", *PREDICTIONS, ".lock"):
        check_plain(folder / name)
    for name in FOLDERS:
        check_plain(folder / name, is_folder=True)
        check_tree(folder / name)


def check_tree(folder: Path) -> None:
    """`check_plain` of everything in a folder."""
    for place, folders, files in os.walk(folder):
        for name in files:
            check_plain(Path(place, name))
        for name in folders:
            check_plain(Path(place, name), is_folder=True)


def no_follow(path: str, flags: int) -> int:
    """An opener for files of a run folder: it does not follow a link, where the system can be told so."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def open_run(config: RunConfig) -> Path:
    """Make the run's folder and return it.

    The default name is runs/<option>-<epochs>-<lr>, with -2, -3, ... behind it when that exists. An --output_dir
    that holds a run, or a file that this command would write, is refused without --overwrite, and then emptied of
    those. Raises FileExistsError or OSError with what to do.
    """
    try:
        if config.output_dir is None:
            base = Path("runs") / f"{config.option}-{config.epochs}-{config.lr}"
            folder = next(folder for n in itertools.count(1)
                          if _made(folder := base if n == 1 else base.with_name(f"{base.name}-{n}")))
        else:
            folder = Path(config.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}.tmp"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"{config.output_dir or 'runs'}: no run can be written here ({error.strerror}); choose another "
                      "--output_dir") from None
    check_run_folder(folder)
    if any((folder / name).exists() for name in (RUN_FILE, *FOLDERS)):
        if not config.overwrite:
            raise FileExistsError(f"{folder}: there is a run in this folder already; --overwrite replaces it, or "
                                  "choose another --output_dir")
        with lock(folder):
            if asks_for_series(_options_in(folder)):
                for member in sorted(folder.glob("*-*")):
                    if re.fullmatch(r"(seed|fold)-\d+", member.name) and (member / RUN_FILE).is_file():
                        check_run_folder(member)
                        with lock(member):
                            _remove_run(member)
                        with suppress(OSError):  # what else is in it stays
                            (member / ".lock").unlink()
                            member.rmdir()
            _remove_run(folder)
    elif in_the_way := _in_the_way(folder, config.option):
        if not config.overwrite:
            raise FileExistsError(f"{folder / in_the_way}: there is such a file already, and this would replace it; "
                                  "--overwrite allows that, or choose another --output_dir")
    elif config.output_dir is not None:
        with lock(folder):  # what a start left that was killed before its args.json was there
            for path in folder.glob(".*.tmp"):
                if re.fullmatch(rf"\.({re.escape(RUN_FILE)}\.)?\d+\.tmp", path.name):
                    path.unlink(missing_ok=True)
    return folder


def _options_in(folder: Path) -> dict[str, Any]:
    """The options of the run in a folder; {} where they cannot be read."""
    try:
        options = read_json(folder / RUN_FILE).get("options")
    except (OSError, ValueError):
        options = None
    return options if isinstance(options, dict) else {}


def asks_for_series(options: dict[str, Any]) -> bool:
    """Do these options ask for several runs, one after another?"""
    return bool(options.get("seeds") or options.get("folds") and options.get("fold") is None)


def _remove_run(folder: Path) -> None:
    """After a kill in between, this must still be seen to be a run, but not a finished one: result.json goes first,
    args.json last."""
    (folder / "result.json").unlink(missing_ok=True)
    for name in FOLDERS:
        if (folder / name).exists():
            gone = folder / f".{name.strip('.')}.gone.tmp"
            shutil.rmtree(gone, ignore_errors=True)
            os.replace(folder / name, gone)
            shutil.rmtree(gone, ignore_errors=True)
    for name in (*LOGS, *PREDICTIONS, RUN_FILE):
        (folder / name).unlink(missing_ok=True)


def _in_the_way(folder: Path, option: str) -> str:
    """The name of a file that a run of this --option would replace; "" where there is none. The result.json of an
    lr_find makes way for a fine-tuning run: it says nothing that the others do not have."""
    names = {"lr_find": ("result.json", "lr_find.csv", "lr_find.png"), "verify_resume": ("result.json",)}
    for name in names.get(option, ("result.json", *LOGS, *PREDICTIONS)):
        path = folder / name
        if path.exists() and not (name == "result.json" and option == "finetune" and _is_of_lr_find(path)):
            return name
    return ""


def _is_of_lr_find(result: Path) -> bool:
    try:
        return "steepest" in read_json(result)
    except ValueError:
        return False


def _made(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True)
        return True
    except FileExistsError:
        if folder.is_dir():
            return False
        raise


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Only one process works in a run's folder. Raises OSError when another one does; a killed one leaves no lock."""
    check_plain(folder / ".lock")
    with open(folder / ".lock", "a+", encoding="utf-8", opener=no_follow) as file:
        try:
            try:
                import fcntl
            except ImportError:  # Windows
                import msvcrt

                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OSError(f"{folder}: another process is training in this folder; wait for it, or choose another "
                          "--output_dir") from None
        yield


def describe(config: RunConfig, device: Device, files: dict[str, Any]) -> dict[str, Any]:
    """What args.json holds: every option, the versions, the git commit, the device and the data's checksums."""
    from importlib.metadata import version

    options = {k: v for k, v in asdict(config).items() if k != "given"}
    packages = ("torch", "numpy", "scikit-learn", "safetensors", "gguf", "tokenizers", "sentencepiece")
    commit = None
    try:
        here = Path(__file__).parent
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5)
        commit = git.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        pass  # no git, no commit
    return {
        "options": options, "given": sorted(config.given), "files": files, "device": str(device), "git_commit": commit,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages},
                     "c_compiler": kernels.compiler() if kernels.is_on() else "not used"},
        "platform": platform.platform(),
    }


def save_description(folder: Path, described: dict[str, Any]) -> dict[str, Any]:
    """args.json, with which the folder is this run's: a result.json that another command (lr_find) left there is
    removed, or it would pass for the run's own. Returns what the file holds: what was described, the run's id, and
    the sha256 of it all."""
    (folder / "result.json").unlink(missing_ok=True)
    described = with_digest({**described, "id": uuid.uuid4().hex})
    write_json(folder / RUN_FILE, described)
    return described


def with_digest(values: dict[str, Any]) -> dict[str, Any]:
    """The same values, and under `sha256` the checksum of them all: a digit that is changed later is noticed."""
    plain = {k: v for k, v in values.items() if k != "sha256"}
    return {**plain, "sha256": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}


def has_changed(values: dict[str, Any]) -> bool:
    """Are these values with a checksum (see `with_digest`) others than it was made of? Those of an older version have
    none."""
    return "sha256" in values and with_digest(values)["sha256"] != values["sha256"]


def read_description(folder: Path) -> dict[str, Any]:
    """args.json: with `options` that the parser would accept too, `given`, `files`, `device` and `versions`.

    Raises ValueError for one that is damaged or was changed, naming the options where the run's states have them.
    """
    check_run_folder(folder)
    path = folder / RUN_FILE
    described = read_json(path)
    options, files = described.get("options"), described.get("files")
    if not isinstance(options, dict) or not isinstance(files, dict) or not {"given", "device"} <= described.keys():
        raise ValueError(f"{path}: this is not what a run writes (no options, files, given and device)")
    before = newest_run(folder / "last")
    known = json.loads(json.dumps(before.get("options", {})))  # tuples become lists
    edited = [f"--{name} is {options.get(name)}, and was {known[name]}" for name in known
              if before.get("id") == described.get("id") and options.get(name) != known[name]]
    if edited or has_changed(described):
        raise ValueError(f"{path}: it was changed after the run began{': ' if edited else ''}{'; '.join(edited)}; "
                         "put it back as it was, or start another run")
    if fault := fault_of(options):
        raise ValueError(f"{path}: {fault}")
    given, versions = described["given"], described.get("versions", {})
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given) or (
            not isinstance(versions, dict) or not isinstance(described["device"], str)):
        raise ValueError(f"{path}: `given`, `device` or `versions` is not what a run writes")
    for name, file in files.items():
        if not isinstance(file, dict) or not isinstance(file.get("path"), str) or "\0" in file["path"] or (
                not isinstance(file.get("sha256", ""), str)):
            raise ValueError(f"{path}: the {name} file is {file!r}, expected its path and its sha256")
        at = Path(file["path"])
        if at.exists() and not at.is_file() and not (at.is_dir() and name in ("weights", "tokenizer")):
            raise ValueError(f"{path}: the {name} file is {at}, which is not a regular file")
    return described


def write_line(file: BinaryIO, values: dict[str, Any]) -> bytes:
    """One JSON object a line, there for a reader at once, in an unbuffered file: a line that failed is not tried again
    when the file is closed. Returns the line. Raises OSError, naming the file and the bytes, when the disk is full."""
    whole = line = (json.dumps(values) + "\n").encode()
    try:
        while line:
            line = line[file.write(line):]
    except OSError as error:
        raise disk_full(Path(file.name), error) from None
    return whole


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; damaged ones are left out."""
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        found += [value] if isinstance(value, dict) else []
    return found


def hash_of(path: Path, size: int | None = None) -> Any:
    """A running sha256 of a file's first `size` bytes, or of all of it."""
    digest, left = hashlib.sha256(), math.inf if size is None else size
    with open(path, "rb", opener=no_follow) as file:
        while block := file.read(int(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    return digest


# --------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def predict(model: nn.Module, split: Split, pad_id: int, device: Device, label: str = "eval") -> Tensor:
    """The model's output for every row of the split, in the file's order: (N, C) float32 on the CPU.

    Rows are run in the order of their length, with little padding, and put back. The model is left in the mode
    (training or evaluation) that it was in.
    """
    was_training = model.training
    model.eval()
    batches = list(length_order(split.lengths))
    parts = []
    for rows in tqdm(batches, desc=label, leave=False, disable=None, file=sys.stderr):
        SIGNALS.check()
        batch = device.put(make_batch(split, rows, pad_id))
        with device.autocast():
            parts.append(model(batch["tokens"], batch["lengths"]).float())
    model.train(was_training)
    together = torch.cat(parts).cpu()
    result = torch.empty_like(together)
    result[torch.from_numpy(np.concatenate(batches))] = together
    return result


def score(log_probs: Tensor, labels: np.ndarray, ordinal: bool = False) -> dict[str, float]:
    """acc, macro f1 (over the classes that occur in the labels or the predictions) and mean loss of
    log-probabilities (N, C). `ordinal` adds, for classes that have an order, the mean absolute error `mae`, the
    quadratic weighted kappa `qwk` (Cohen 1968) and `off_by_one`, the part that is at most one class off."""
    from sklearn.metrics import f1_score

    predicted = log_probs.argmax(1).numpy()
    result = {
        "loss": float(nn.functional.nll_loss(log_probs, torch.from_numpy(labels))),
        "acc": float((predicted == labels).mean()),
        "f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),
    }
    if ordinal:
        distance = np.abs(predicted - labels)
        # 1 - E|y - p|^2 / E|y - p'|^2, with p' drawn independently of y: no matrix of all pairs of classes is needed.
        y, p, n = labels.astype(np.int64), predicted.astype(np.int64), len(labels)
        by_chance = int(n * ((y @ y) + (p @ p)) - 2 * y.sum() * p.sum())  # n^2 times the expectation, exactly
        kappa = 1 - n * int(distance @ distance) / by_chance if by_chance else 0.0  # all of one class, and rightly so
        result |= {"mae": float(distance.mean()), "qwk": kappa,
                   "off_by_one": float((distance <= 1).mean())}
    return result


# --------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Task:
    """What is trained. `losses(batch)` gives each sentence's loss (B,); `evaluate()` the scores of the model as it is,
    with train_acc, dev_loss, dev_acc and whatever --monitor names; `save_best()` keeps the model as it is, and returns
    the sha256 that `check_best` compares.

    `order(epoch)` are the rows of each effective batch of an epoch; `make_batch(rows, epoch)` makes a batch of some of
    them; it is where training sentences are augmented. A batch may have `weights` (B,), which the losses are multiplied
    with before they are averaged; the guards look at the losses without them.
    """

    model: nn.Module
    train: Split
    make_batch: Callable[[np.ndarray, int], dict[str, Tensor]]
    losses: Callable[[dict[str, Tensor]], Tensor]
    evaluate: Callable[[], dict[str, Any]]
    save_best: Callable[[], str | None]
    class_names: list[str]
    n_dev: int  # sentences that `evaluate` scores on dev
    order: Callable[[int], list[np.ndarray]]


@dataclass
class Progress:
    """Everything that changes while training, beside tensors: with them, what an exact resume needs."""

    micro_batch: int
    step: int = 0  # optimizer steps taken, skipped ones included
    epoch: int = 0
    window: int = 0  # windows (effective batches) of this epoch that are done
    evaluated: int = 0  # evaluations of this epoch that are done
    loss_sum: float = 0.0  # of the sentences since the last evaluation
    epoch_loss_sum: float = 0.0  # of the sentences of this epoch so far, without the batches' weights
    epoch_n_seen: int = 0
    mean_loss: float | None = None  # of the last whole epoch, without the batches' weights
    n_seen: int = 0
    first_loss: float | None = None  # of the first step, for the guards
    recent: list[float] = field(default_factory=list)  # the last sentences' losses, for the guards
    not_finite_in_a_row: int = 0
    skipped: int = 0
    spikes: int = 0  # steps most of whose sentences had a far higher loss than guessing
    is_in_spike: bool = False
    rollbacks: int = 0
    lr_factor: float = 1.0  # smaller after each rollback
    best: dict[str, Any] = field(default_factory=dict)
    since_best: int = 0
    history: list[float] = field(default_factory=list)  # --monitor at each evaluation
    update_ratios: dict[str, float] = field(default_factory=dict)  # of each layer group, at the middle of the epoch
    seconds: float = 0.0  # in the loop, over all the processes of the run
    stopped: str = ""  # why training ended before its last epoch


NEVER_NEGATIVE = ("micro_batch", "step", "epoch", "window", "evaluated", "n_seen", "rollbacks", "since_best")


def progress_of(saved: Any) -> Progress:
    """The progress that a state holds. Raises ValueError for other fields than this version has, and for values of
    other types."""
    known = {f.name: f.type for f in fields(Progress)}
    if not isinstance(saved, dict) or saved.keys() != known.keys():
        names = saved.keys() if isinstance(saved, dict) else set()
        other = [f"{word} {', '.join(map(str, sorted(some, key=str)))}" for word, some in (
            ("it lacks", known.keys() - names), ("it also has", names - known.keys())) if some]
        raise ValueError(f"it is of another version of this program ({'; '.join(other)}); resume with that version, or "
                         "start the run again")
    for name, kind in known.items():
        value = saved[name]
        if not _is_a(value, kind) or name in NEVER_NEGATIVE and value < (name == "micro_batch"):
            raise ValueError(f"{name} is {value!r}")
    best = saved["best"]
    if best and not all(_is_a(best.get(name), float) for name in ("epoch", "dev_loss", "dev_acc", "monitor")):
        raise ValueError(f"best is {best!r}")
    return Progress(**saved)


def _is_a(value: Any, kind: Any) -> bool:
    """Is this value of JSON of the type that a field of Progress has?"""
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_a(item, get_args(kind)[0]) for item in value)
    if get_origin(kind) is dict:
        item = get_args(kind)[1]
        return isinstance(value, dict) and all(item is Any or _is_a(v, item) for v in value.values())
    if kind == float | None:
        return value is None or _is_a(value, float)
    return type(value) in ((int, float) if kind is float else (kind,))


def clip_(parameters: list[nn.Parameter], max_norm: float, max_value: float) -> Tensor:
    """Scale the gradients so that their norm is at most max_norm (Pascanu et al. 2013, arXiv 1211.5063), after clamping
    each number to max_value; 0 switches either off. Returns the norm before scaling, a tensor."""
    gradients = []
    for p in parameters:
        if p.grad is not None and p.grad.is_sparse:
            p.grad = p.grad.coalesce()  # a word's numbers in one place: added, and then clamped
        if p.grad is not None:
            gradients.append(gradient_numbers(p))
    if max_value:
        torch._foreach_clamp_max_(gradients, max_value)
        torch._foreach_clamp_min_(gradients, -max_value)
    norm = nn.utils.get_total_norm(gradients)
    if max_norm and (norm.is_cuda or not norm <= max_norm):  # a GPU is not waited for
        torch._foreach_mul_(gradients, torch.clamp(max_norm / (norm + 1e-6), max=1.0))
    return norm


def gradient_numbers(p: nn.Parameter) -> Tensor:
    """A parameter's gradient; of a sparse one, the rows that there are."""
    return p.grad._values() if p.grad.is_sparse else p.grad


def layer_group(name: str) -> str:
    """`llama.layers.3.attention.wq.weight` to `llama.layers.3`; other names to what stands before the last dot."""
    parts = name.split(".")
    return ".".join(parts[: parts.index("layers") + 2]) if "layers" in parts else name.rpartition(".")[0]


def first_bad_module(task: Task, batch: dict[str, Tensor], device: Device) -> str:
    """The name of the first module whose output is not finite, found by one more forward pass, or "". The random state
    is restored."""
    found: list[str] = []

    def look(name: str) -> Callable:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not found and any(isinstance(t, Tensor) and not torch.isfinite(t).all() for t in tensors):
                found.append(f"the output of {name or type(module).__name__}")
        return hook

    handles = [m.register_forward_hook(look(name)) for name, m in task.model.named_modules() if not any(m.children())]
    try:
        with torch.random.fork_rng(devices=[device.where] if device.where.type == "cuda" else []), torch.no_grad():
            with device.autocast():
                losses = task.losses(batch)
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    return "" if torch.isfinite(losses).all() else "the loss"


PASS_TOKENS = 1024  # in one forward pass on a CPU
RISING = ("dev_acc", "dev_f1", "dev_qwk")  # the monitors of which more is better
RATE_CUT = 0.1  # what the learning rate is multiplied with at each rollback
ROLLBACKS = 3


class Loop:
    """One training run: `run()` trains to the end and returns the best evaluation.

    `schedule(step, history)` is a factor on each parameter group's own rate. `after_step(step, lr, loss)`, if given,
    may return True to end the training (the range test's way out). With `keep_states=False` no state is saved; `quiet`
    prints no epoch lines. `resume_folder`: what to resume after a signal, where it is not `folder` but that of the
    series (of --seeds or --folds) that the run belongs to. `described`: what the run's args.json holds; its id and its
    options are in each state.
    """

    def __init__(
        self, task: Task, optimizer: torch.optim.Optimizer, schedule: Callable[[int, list[float]], float],
        config: RunConfig, device: Device, folder: Path, after_step: Callable[[int, float, float], bool] | None = None,
        keep_states: bool = True, quiet: bool = False, resume_folder: Path | None = None,
        described: dict[str, Any] | None = None,
    ):
        self.task, self.optimizer, self.schedule = task, optimizer, schedule
        self.config, self.device, self.folder = config, device, folder
        self.resume_folder = resume_folder or folder
        self.after_step, self.keep_states, self.quiet = after_step, keep_states, quiet
        self.parameters = [p for p in task.model.parameters() if p.requires_grad]
        self.progress = Progress(micro_batch=config.batch_size)
        self.lengths = task.train.lengths
        self.pass_tokens = PASS_TOKENS
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        self.ema = [p.detach().clone() for p in self.parameters] if config.ema else []
        self.started = time.perf_counter()
        self.saved: tuple | None = None
        self.described = described or {}
        self.logs: dict[str, BinaryIO] = {}
        self.digests: dict[str, Any] = {}  # a running sha256 of each log
        self.bar = tqdm(disable=True)  # `run` has a real one

    # ----------------------------------------------------------------------- the course of a run

    def run(self) -> dict[str, Any]:
        config = self.config
        total = config.epochs * len(self.task.order(0))
        self.bar = tqdm(total=total, initial=self.progress.step, desc="train", disable=None, file=sys.stderr,
                        mininterval=0.5)
        with ExitStack() as stack:
            for name in LOGS:
                check_plain(self.folder / name)
                self.logs[name] = stack.enter_context(open(self.folder / name, "ab", buffering=0, opener=no_follow))
                self.digests[name] = hash_of(self.folder / name)
            stack.enter_context(self.bar)
            stack.enter_context(stoppable(self.resume_folder if self.keep_states else None,
                                          lambda: self.save(good=False), self.config))
            self.save()
            while self.progress.epoch < config.epochs and not self.progress.stopped:
                self.train_epoch()
            if self.keep_states and not self.progress.best:
                self.evaluate(n_marks=1)  # diverged before the first evaluation: the weights of the last good state
        return self.progress.best

    def train_epoch(self) -> None:
        """What is left of the present epoch. Ends early after a rollback, which may have changed the epoch."""
        windows = self.task.order(self.progress.epoch)
        marks = self.evaluation_marks(len(windows))
        rollbacks = self.progress.rollbacks
        while not self.progress.stopped:
            SIGNALS.check()
            if self.progress.window == marks[self.progress.evaluated]:
                self.evaluate(n_marks=len(marks))
                if self.progress.window == 0 or self.progress.rollbacks != rollbacks:
                    return
                continue
            self.step(windows[self.progress.window], measure=self.progress.window == len(windows) // 2)
            if self.progress.rollbacks != rollbacks:
                return
            if self.config.save_every and self.progress.step % self.config.save_every == 0:
                self.save()

    def evaluation_marks(self, n_windows: int) -> list[int]:
        """After which windows of an epoch there is an evaluation: every --eval_every of it, and at its end."""
        n = max(1, round(min(n_windows, 1 / self.config.eval_every)))  # no more than one a window
        return sorted({max(1, round(n_windows * (i + 1) / n)) for i in range(n)})

    # ----------------------------------------------------------------------- one optimizer step

    def step(self, rows: np.ndarray, measure: bool) -> None:
        """One window: gradients of the mean loss of its sentences, checked, clipped, applied, logged.
        `measure` also takes the ratio of update to weight."""
        progress, config = self.progress, self.config
        self.task.model.train()
        lr = self.set_lr()
        losses, plain = self.accumulate(rows)
        norm = clip_(self.parameters, config.max_grad_norm, config.max_grad_value)
        together = torch.cat((torch.stack((losses.mean(), norm)), losses, plain))
        (loss, norm_value), losses, plain = np.split(together.tolist(), (2, 2 + len(rows)))  # one wait for the device
        finite = math.isfinite(loss) and math.isfinite(norm_value)
        if finite or config.guards == "off":
            before = [p.detach().clone() for p in self.parameters] if measure else None
            self.optimizer.step()
            if before:
                progress.update_ratios = self.ratios(before)
            self.update_average()
        else:
            self.event("skipped", f"the {'gradient' if math.isfinite(loss) else 'loss'} is not finite "
                                  f"({self.find_not_finite(rows)})", progress.step + 1)
            progress.skipped += 1
        self.optimizer.zero_grad(set_to_none=True)
        if finite and progress.first_loss is None:
            progress.first_loss = float(plain.mean())
            self.check_first_loss(progress.first_loss)
        progress.step += 1
        progress.window += 1
        if finite:
            self.note_spike(plain)
            progress.loss_sum += math.fsum(losses)
            progress.epoch_loss_sum += math.fsum(plain)
            progress.epoch_n_seen += len(rows)
            progress.n_seen += len(rows)
            progress.recent = guards.remember(progress.recent, plain.tolist())
        progress.not_finite_in_a_row = 0 if finite else progress.not_finite_in_a_row + 1
        self.log("steps.jsonl", {"step": progress.step, "epoch": progress.epoch, "lr": lr, "loss": float(loss),
                                 "grad_norm": float(norm_value), "tokens": int(self.lengths[rows].sum()),
                                 "seconds": round(self.seconds(), 4)})
        self.bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.2e}", refresh=False)
        self.bar.update()
        if self.after_step and self.after_step(progress.step, lr, float(loss)):
            progress.stopped = "after_step"
            return
        if config.guards == "on":
            self.guard()

    def update_average(self) -> None:
        """One step of --ema: average = d average + (1 - d) weights.

        d rises to the decay that was asked for, min(decay, (1 + t) / (10 + t)) at update t = 0, 1, ...: else the
        average of a short run would be mostly the initial weights (TensorFlow's ExponentialMovingAverage, num_updates).
        """
        if self.ema:
            t = self.progress.step
            decay = min(self.config.ema, (1 + t) / (10 + t))
            torch._foreach_lerp_(self.ema, [p.detach() for p in self.parameters], 1 - decay)

    def seconds(self) -> float:
        """Seconds in this loop so far, those before a resume included."""
        return self.progress.seconds + time.perf_counter() - self.started

    def set_lr(self) -> float:
        """Each group's own rate times the schedule's factor; returns the largest, which is what is logged."""
        factor = self.schedule(self.progress.step, self.progress.history) * self.progress.lr_factor
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor
        return max(group["lr"] for group in self.optimizer.param_groups)

    def accumulate(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Gradients of the mean loss over `rows`, in micro-batches; returns the losses (N,) with and without the
        batch's weights, on the device.

        Each micro-batch's sum is divided by the window's size, so that every sentence weighs the same, in a short last
        window and a short last micro-batch too. Out of memory: the window is done again with half the micro-batch and
        the random state that it began with.
        """
        random = self.random_state()
        while True:
            try:
                weighted, plain = [], []
                for micro in np.array_split(rows, self.passes(rows)):
                    batch = self.device.put(self.task.make_batch(micro, self.progress.epoch))
                    with self.device.autocast():
                        losses = self.task.losses(batch)
                    plain.append(losses.detach())
                    if "weights" in batch:
                        losses = losses * batch["weights"]
                    (losses.sum() / len(rows)).backward()
                    weighted.append(losses.detach())
                return torch.cat(weighted), torch.cat(plain)
            except (RuntimeError, MemoryError) as error:
                if self.config.detect_anomaly and "returned nan" in str(error):
                    raise ValueError(f"--detect_anomaly: {error}") from None
                if not is_out_of_memory(error) or self.rows_a_pass(rows) == 1:
                    raise
            # Outside the handler: the error holds the tensors of the pass that failed.
            self.optimizer.zero_grad(set_to_none=True)
            if self.device.where.type == "cuda":
                torch.cuda.empty_cache()
            self.set_random_state(random)
            self.progress.micro_batch = -(-self.rows_a_pass(rows) // 2)
            self.event("out_of_memory", f"the micro-batch is {self.progress.micro_batch} from here on; the effective "
                                        f"batch stays {len(rows)}")

    def passes(self, rows: np.ndarray) -> int:
        """Into how many forward passes a window goes. A CPU is as fast at a thousand tokens as at more, and has the
        activations of those alone in memory; a GPU wants large ones."""
        return -(-len(rows) // self.rows_a_pass(rows))

    def rows_a_pass(self, rows: np.ndarray) -> int:
        most = self.progress.micro_batch
        if self.device.where.type == "cpu":
            most = min(most, max(1, self.pass_tokens // int(self.lengths[rows].max())))
        return min(most, len(rows))

    def ratios(self, before: list[Tensor]) -> dict[str, float]:
        """|update| / |weight| of each layer group over one step; about 1e-3 is healthy (Karpathy's rule of thumb)."""
        sums: dict[str, list[float]] = {}
        names = [name for name, p in self.task.model.named_parameters() if p.requires_grad]
        for name, p, old in zip(names, self.parameters, before, strict=True):
            pair = sums.setdefault(layer_group(name), [0.0, 0.0])
            pair[0] += float((p.detach() - old).float().pow(2).sum())
            pair[1] += float(old.float().pow(2).sum())
        return {name: math.sqrt(update / weight) if weight else 0.0 for name, (update, weight) in sums.items()}

    # ----------------------------------------------------------------------- the guards

    def find_not_finite(self, rows: np.ndarray) -> str:
        """Where a number that is not finite came up in this window: a module, the loss, or a parameter's gradient."""
        try:
            for micro in np.array_split(rows, self.passes(rows)):
                batch = self.device.put(self.task.make_batch(micro, self.progress.epoch))
                if found := first_bad_module(self.task, batch, self.device):
                    return found
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return "there is not enough memory to look where"
        bad = [name for name, p in self.task.model.named_parameters()
               if p.grad is not None and not torch.isfinite(gradient_numbers(p)).all()]
        return f"the gradient of {bad[0]}" if bad else "the gradient"

    def check_first_loss(self, loss: float) -> None:
        """Say so when an untrained head does not begin near guessing."""
        classes = len(self.task.class_names)
        if self.config.loss == "ce" and abs(loss - math.log(classes)) > 0.5:
            warn(f"the first loss is {loss:.3f}; an untrained head should begin near ln({classes}) = "
                 f"{math.log(classes):.3f}")

    def guessing_loss(self) -> float:
        return guards.guessing_loss(len(self.task.class_names), self.progress.first_loss)

    def guard(self) -> None:
        """Roll back when the run has diverged."""
        progress = self.progress
        if why := guards.divergence(progress.recent, self.guessing_loss(), progress.not_finite_in_a_row):
            self.diverged(why)

    def note_spike(self, losses: np.ndarray) -> None:
        """Count a step with a loss spike. The first five are said, of several in a row one. Nothing else follows."""
        progress, was_in_spike = self.progress, self.progress.is_in_spike
        progress.is_in_spike = guards.is_spike(losses.tolist(), self.guessing_loss())
        progress.spikes += progress.is_in_spike
        if progress.is_in_spike and not was_in_spike and progress.spikes <= 5 and not self.quiet:
            self.event("spike", f"the loss of most sentences of this step is {guards.typical(losses.tolist()):.3g} on "
                                f"average; guessing has {self.guessing_loss():.3g}")

    def diverged(self, why: str) -> None:
        """Back to the last good state with a tenth of the rate, ROLLBACKS times; then the training ends there.
        events.jsonl keeps what led here; the other logs are cut last: a kill before finds a state that they reach up
        to."""
        at, keep = self.progress.step, self.progress
        if not self.keep_states:
            keep.stopped = "diverged"
            return
        sizes = dict(self.put_back(only_good=True)[0]["logs"])
        sizes.pop("events.jsonl", None)
        for name in ("rollbacks", "lr_factor", "skipped", "spikes", "seconds", "micro_batch"):
            setattr(self.progress, name, getattr(keep, name))
        if self.progress.best.get("step") != keep.best.get("step"):
            self.progress.best = {}  # best/ is of steps that are undone now: the next evaluation replaces it
        if keep.rollbacks < ROLLBACKS:
            self.progress.rollbacks += 1
            self.progress.lr_factor *= RATE_CUT
            self.event("rollback", f"{why}. Back to step {self.progress.step}, with the learning rate times "
                                   f"{self.progress.lr_factor:g}", at)
        else:
            self.progress.stopped = "diverged"
            self.event("diverged", f"{why}, after {ROLLBACKS} rollbacks. Stopping with the weights of step "
                                   f"{self.progress.step}. Try a far lower --lr, or a longer --warmup_ratio", at)
        self.bar.reset(self.bar.total)
        self.bar.update(self.progress.step)
        self.save(sizes=sizes)
        self.cut_logs(sizes)

    def event(self, kind: str, detail: str, step: int | None = None) -> None:
        """Something that the user should know of a step, by default the last one that is done: a line on stderr and in
        events.jsonl."""
        step = self.progress.step if step is None else step
        self.bar.clear()
        warn(f"step {step}: {kind}: {detail}")
        if self.logs:
            self.log("events.jsonl", {"step": step, "event": kind, "detail": detail})

    def log(self, name: str, values: dict[str, Any]) -> None:
        """A line of one of the logs."""
        self.digests[name].update(write_line(self.logs[name], values))

    # ----------------------------------------------------------------------- evaluation and stopping

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model's weights are their moving average, if there is one."""
        if not self.ema:
            yield
            return
        for p, mean in zip(self.parameters, self.ema, strict=True):
            p.data, mean.data = mean.data, p.data
        try:
            yield
        finally:
            for p, mean in zip(self.parameters, self.ema, strict=True):
                p.data, mean.data = mean.data, p.data

    def evaluate(self, n_marks: int) -> None:
        """The scores, their line in epochs.jsonl and on stdout, the best weights, the patience.

        One after which the run is rolled back is printed, and leaves no line: it is never the best evaluation.
        """
        progress, config = self.progress, self.config
        last = progress.evaluated + 1 == n_marks
        with self.averaged():
            scores = self.task.evaluate()
            epoch = progress.epoch
            if n_marks > 1:
                epoch = round(epoch + (progress.evaluated + 1) / n_marks, 3)
            line = {"epoch": epoch, "step": progress.step,
                    "train_loss": progress.loss_sum / progress.n_seen if progress.n_seen else None, **scores,
                    "lr": max(group["lr"] for group in self.optimizer.param_groups),
                    "seconds": round(self.seconds(), 3)}
            mean_loss = math.nan
            if last and progress.epoch_n_seen >= guards.ENOUGH:
                mean_loss = progress.epoch_loss_sum / progress.epoch_n_seen
            why = guards.decline(line, progress.best, self.task.n_dev, mean_loss, self.guessing_loss(),
                                 had_rollback=0 < progress.rollbacks < ROLLBACKS)
            class_index = line.pop("one_class", None)
            one_class = ""
            if why and class_index is not None:
                one_class = f"every prediction is {self.task.class_names[class_index]}"
            self.bar.clear()
            if not self.quiet:
                print(epoch_line(line) + (f", collapsed: {one_class}" if one_class else ""), flush=True)
            is_rolled_back = bool(why) and config.guards == "on" and not progress.stopped
            value = scores[config.monitor] if config.monitor in RISING else -scores[config.monitor]
            if math.isnan(value) or math.isnan(scores.get("dev_loss", 0.0)):  # of NaN outputs, the accuracy is chance
                value = -math.inf
            best = progress.best.get("monitor")
            is_better = best is None or value > best + config.min_delta
            if not is_rolled_back and (is_better or (value == best and scores["dev_loss"] < progress.best["dev_loss"])):
                digest = self.task.save_best()
                progress.best = {**line, "monitor": value, "manifest": digest}
        if is_rolled_back:  # outside `averaged`, which puts the weights back
            self.diverged(", and ".join(filter(None, (one_class, why))))
            return
        if last:
            line["update_ratio"] = progress.update_ratios
            progress.epoch, progress.window = progress.epoch + 1, 0
            progress.mean_loss = None if math.isnan(mean_loss) else mean_loss
            progress.epoch_loss_sum, progress.epoch_n_seen = 0.0, 0
        progress.evaluated = 0 if last else progress.evaluated + 1
        progress.since_best = 0 if is_better else progress.since_best + 1
        progress.history.append(scores[config.monitor])
        progress.loss_sum, progress.n_seen = 0.0, 0
        self.log("epochs.jsonl", line)
        if config.patience and progress.since_best >= config.patience and progress.epoch < config.epochs:
            progress.stopped = "patience"
            print(f"early stop: no better {config.monitor} in {counted(config.patience, 'evaluation')}", flush=True)
        self.save()

    # ----------------------------------------------------------------------- the state

    def random_state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self.device.where.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device.where)
        if self.device.where.type == "mps":
            state["mps"] = torch.mps.get_rng_state()
        return state

    def set_random_state(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device.where)
        if "mps" in state:
            torch.mps.set_rng_state(state["mps"])

    def save(self, good: bool = True, sizes: dict[str, int] | None = None) -> None:
        """The state of now, unless it has been saved already. Only a regular save of a healthy run is `good`, one to
        roll back to: a signal must not change where that is. `sizes`: of the logs that are about to be cut."""
        stamp = (self.progress.step, len(self.progress.history), self.progress.rollbacks)
        if not self.keep_states or (self.saved == stamp and not sizes):
            return
        for file in self.logs.values():
            os.fsync(file.fileno())  # the state on disk must not know of lines that are not
        values, tensors = split_tensors({
            "model": self.task.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "random": self.random_state(), "ema": self.ema,
            "progress": asdict(replace(self.progress, seconds=self.seconds())),
            "logs": {**{name: file.tell() for name, file in self.logs.items()}, **(sizes or {})},
            "log_sha256": {**{name: digest.hexdigest() for name, digest in self.digests.items()},
                           **{name: hash_of(self.folder / name, size).hexdigest()
                              for name, size in (sizes or {}).items()}},
            "run": {"id": self.described.get("id"), "options": self.described.get("options", {})},
        })
        is_healthy = guards.is_healthy(self.progress.recent, self.guessing_loss(), self.progress.not_finite_in_a_row)
        save_state(self.folder / "last", self.progress.step, tensors, values, good and is_healthy)
        self.saved = stamp
        remove_previous_best(self.folder / "best")

    def load(self) -> None:
        """Put everything back to the newest whole state in last/, and the logs to their length at that time. Of a run
        that was killed before its first state, there is nothing to put back: it begins.

        Raises ValueError where best/ is not the one that the state knows.
        """
        last, best = self.folder / "last", self.folder / "best"
        for line in remove_other_states(last, self.described.get("id")):
            warn(line)
        logs = [self.folder / name for name in LOGS]
        if has_states(last) or any(log.exists() and log.stat().st_size for log in logs):
            state, is_newest = self.put_back()
            if self.progress.best:
                digest = self.progress.best.get("manifest")
                restore_best(best, digest)
                # Of a state that was passed over, best/ may be the own: newer, and made again by the same steps.
                if not check_best(best, digest if is_newest else None):
                    warn(f"{best}: an older version wrote it, without checksums: a damaged file would not be noticed")
            self.check_logs(state)
            self.cut_logs(state["logs"])
            self.started = time.perf_counter()

    def put_back(self, only_good: bool = False) -> tuple[dict[str, Any], bool]:
        """Everything but the logs; returns the state, with the `logs`' lengths, and whether it is the newest one.

        Raises ValueError for a state that is whole, but not one of this run and this version.
        """
        tensors, values, faults = load_state(self.folder / "last", only_good)
        for fault in faults:
            warn(fault)
        try:
            state = join_tensors(values, tensors)
            progress = progress_of(state["progress"])
            if not all(name in LOGS and type(size) is int and size >= 0 for name, size in state["logs"].items()):
                raise ValueError(f"logs is {state['logs']!r}; it can have the lengths of {', '.join(LOGS)}")
            if not isinstance(state.get("log_sha256", {}), dict):
                raise ValueError("log_sha256 is not the checksums of the logs")
            self.check_place(progress)
            self.check_optimizer(state["optimizer"])
            self.task.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            for mean, saved in zip(self.ema, state["ema"], strict=True):
                mean.copy_(saved)
            self.set_random_state(state["random"])
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            what = f"{error} is missing" if isinstance(error, KeyError) else str(error).splitlines()[0]
            raise ValueError(f"{self.folder / 'last'}: the state there is none of this run: {what}") from None
        self.progress = progress
        self.saved = (self.progress.step, len(self.progress.history), self.progress.rollbacks)
        return state, not faults

    def check_place(self, progress: Progress) -> None:
        """Raises ValueError for a place in the run that there is not."""
        epochs = self.config.epochs
        marks = self.evaluation_marks(len(self.task.order(min(progress.epoch, epochs - 1))))
        if progress.epoch > epochs or progress.evaluated >= len(marks) or progress.window > marks[progress.evaluated]:
            raise ValueError(f"epoch {progress.epoch}, window {progress.window}, evaluation {progress.evaluated}: a "
                             f"run of {counted(epochs, 'epoch')} has no such place")

    def check_optimizer(self, saved: dict[str, Any]) -> None:
        """Raises ValueError for a state of another optimizer: other groups, other settings than the rate, or moments of
        other shapes."""
        def settings(group: dict[str, Any]) -> dict[str, Any]:
            return {k: v for k, v in group.items() if k != "lr"}

        own = self.optimizer.state_dict()
        if list(map(settings, saved["param_groups"])) != list(map(settings, own["param_groups"])):
            raise ValueError("the optimizer's groups or settings are others")
        parameters = dict(enumerate(p for group in self.optimizer.param_groups for p in group["params"]))
        for i, moments in saved["state"].items():
            shape = tuple(parameters[i].shape)
            fitting = {(), (1,), shape, shape[:1], shape[:-1], shape[:-2] + shape[-1:]}
            for name, value in moments.items():
                shape_fits = isinstance(value, Tensor) and tuple(value.shape) in fitting
                if not (shape_fits or name == "step" and type(value) in (int, float)):
                    raise ValueError(f"the optimizer's {name} does not fit its parameter")

    def check_logs(self, state: dict[str, Any]) -> None:
        """Say so when what the logs have of the time before the state is not what the run wrote."""
        for name, size in state["logs"].items():
            path, known = self.folder / name, state.get("log_sha256", {}).get(name)
            if known is None or not path.exists() or path.stat().st_size < size:
                continue  # `cut_logs` tells of lines that are lost
            if hash_of(path, size).hexdigest() != known:
                with open(path, "rb", opener=no_follow) as file:
                    bad = [i for i, line in enumerate(file.read(size).splitlines(), 1) if not _is_json(line)]
                where = f"; the first line that cannot be read is {bad[0]}" if bad else ""
                warn(f"{path}: damaged: its first {size} bytes are not what the run wrote (sha256){where}. They are "
                     "kept as they are; the training does not read them")

    def cut_logs(self, sizes: dict[str, int]) -> None:
        """Drop what the logs say of the time behind a state."""
        for name, size in sizes.items():
            path = self.folder / name
            has = path.stat().st_size if path.exists() else 0
            if has < size:  # os.truncate would fill it up with zeros
                warn(f"{path}: it has {has} bytes and had {size}; lines of it are lost")
            elif name in self.logs:
                self.logs[name].truncate(size)
                self.logs[name].seek(size)
                self.digests[name] = hash_of(path)
            elif has > size:
                with open(path, "rb+", opener=no_follow) as file:
                    file.truncate(size)


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


# --------------------------------------------------------------------------- checks before a run


@contextmanager
def untouched(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Whatever happens inside, weights, gradients, optimizer, random states and mode are afterwards as they were."""
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    state, was_training = copy.deepcopy(optimizer.state_dict()), model.training
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=cuda):
        try:
            yield
        finally:
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
            optimizer.zero_grad(set_to_none=True)
            model.train(was_training)


def check_gradients(loop: Loop) -> float:
    """Is the gradient of one big batch that of its micro-batches, with a short last one too? Returns the largest
    difference, relative to the gradient's largest number. In float32, dropout off.

    Raises ValueError when it is above 1e-4 (rounding alone stays near 1e-6).
    """
    task, rows = loop.task, loop.task.order(0)[0][: 4 * loop.config.batch_size]
    n = len(rows)
    device, micro_batch, gradients = loop.device, loop.progress.micro_batch, []
    with untouched(task.model, loop.optimizer):
        task.model.eval()
        loop.device, loop.pass_tokens = replace(device, dtype=torch.float32), sys.maxsize
        try:
            for micro in (n, max(1, n // 4), max(1, n // 2 - 1)):  # whole, even, and with a short last one
                loop.progress.micro_batch = micro
                loop.optimizer.zero_grad(set_to_none=True)
                loop.accumulate(rows)
                gradients.append([p.grad.to_dense().clone() for p in loop.parameters if p.grad is not None])
        finally:
            loop.device, loop.progress.micro_batch, loop.pass_tokens = device, micro_batch, PASS_TOKENS
    largest = max(float(g.abs().max()) for g in gradients[0])
    difference = max(float((a - b).abs().max()) for other in gradients[1:]
                     for a, b in zip(gradients[0], other, strict=True)) / largest
    if difference > 1e-4:
        raise ValueError(f"--check_gradients: micro-batches change the gradient by {difference:.1e} of its largest "
                         "number")
    return difference


def overfit_batch(loop: Loop, steps: int = 100) -> tuple[float, float]:
    """Train on one batch alone: the first and the last loss. A model and a rate that can learn bring it near 0."""
    rows, losses = loop.task.order(0)[0], []

    def after_step(step: int, lr: float, loss: float) -> bool:
        losses.append(loss)
        return step >= steps or loss < 0.05

    config = replace(loop.config, epochs=1, guards="off", ema=0.0, eval_every=1.0, patience=0)
    task = replace(loop.task, order=lambda epoch: [rows] * (steps + 1), save_best=lambda: None)
    with untouched(loop.task.model, loop.optimizer), tempfile.TemporaryDirectory() as folder:
        Loop(task, loop.optimizer, lambda step, history: 1.0, config, loop.device, Path(folder), after_step,
             keep_states=False, quiet=True).run()
    return losses[0], losses[-1]


def memory_limit(device: Device) -> int | None:
    """Bytes that are free for a batch; None where that cannot be told."""
    if device.where.type == "cuda":
        return torch.cuda.mem_get_info(device.where)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def peak_memory(device: Device) -> int:
    """The most bytes that were in use so far: of the GPU, or of the process."""
    if device.where.type == "cuda":
        return torch.cuda.max_memory_allocated(device.where)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def find_micro_batch(loop: Loop) -> int:
    """The largest micro-batch, a power of two up to the effective batch, that trains on the longest sentences.

    A GPU is filled until it refuses. A CPU's memory is not (the system would swap, or kill the run): there a size is
    taken only if twice the last one's growth fits into what is free. Everything is left as it was.
    """
    task, longest = loop.task, np.argsort(-loop.lengths, kind="stable")
    window, best, grown = max(len(rows) for rows in loop.task.order(0)), 1, 0
    most = window
    if loop.device.where.type == "cpu":  # more tokens are never in one pass there
        most = min(most, max(1, loop.pass_tokens // int(loop.lengths.max())))
    size = 1
    with untouched(task.model, loop.optimizer):
        task.model.train()
        while size <= most:
            before, free = peak_memory(loop.device), memory_limit(loop.device)
            if loop.device.where.type == "cpu" and free is not None and 2 * grown > free:
                break
            try:
                with loop.device.autocast():
                    losses = task.losses(loop.device.put(task.make_batch(longest[:size], 0)))
                losses.mean().backward()
                del losses
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                break
            grown, best = max(grown, peak_memory(loop.device) - before), size
            size = most if size < most < 2 * size else 2 * size
    if loop.device.where.type == "cuda":
        torch.cuda.empty_cache()
    return window if best == most else best  # as many tokens as a pass may have fit: of shorter sentences, more


# --------------------------------------------------------------------------- what is printed and written


def epoch_line(line: dict[str, Any]) -> str:
    """The printed line of an epoch. People's scripts read it: its format stays. Without a finite step since the last
    evaluation there is no training loss: nan."""
    train_loss = math.nan if line["train_loss"] is None else line["train_loss"]
    return (f"epoch {line['epoch']}: train loss :: {train_loss:.3f}, train acc :: {line['train_acc']:.3f}, "
            f"dev acc :: {line['dev_acc']:.3f}, lr :: {line['lr']:.2e}")


def save_result(folder: Path, result: dict[str, Any]) -> None:
    """result.json, the last file that a run writes: a folder that has it is a finished run, see `is_finished`. Its own
    checksum is in it: a series takes over the results of its runs."""
    write_json(folder / "result.json", with_digest(result))


def is_finished(folder: Path) -> bool:
    """Has the run in this folder, or the series of --seeds or --folds, written its result? That of another
    command, such as lr_find, does not count, and for a run no series' result."""
    path = folder / "result.json"
    check_plain(path)
    if not path.is_file():
        return False
    options = read_json(folder / RUN_FILE).get("options")
    is_series = isinstance(options, dict) and asks_for_series(options)
    return ("runs" if is_series else "best_epoch") in read_json(path)


def known_manifest(folder: Path) -> tuple[str | None, bool]:
    """The sha256 that a finished run's best/manifest.json has, and whether the run has one at all: an older version
    wrote none."""
    if not (folder / RUN_FILE).is_file():
        return None, False
    digest = read_result(folder).get("best_manifest") if is_finished(folder) else None
    return digest, "id" in read_json(folder / RUN_FILE)


def read_result(folder: Path) -> dict[str, Any]:
    """The result.json of a finished run or series. Raises ValueError for one that was changed, and for one that no run
    writes."""
    path = folder / "result.json"
    result = read_json(path)
    if has_changed(result):
        raise ValueError(f"{path}: it was changed after the run wrote it (sha256); move it away, and resume the run")
    scores = [result[name] for name in ("dev", "test") if name in result]
    if "runs" in result:
        runs = result["runs"]
        is_one = isinstance(runs, list) and runs and all(isinstance(n, str) and Path(n).name == n for n in runs)
    else:
        found = result.get("baselines", {})
        is_one = (isinstance(result.get("stopped"), str)
                  and isinstance(result.get("best_manifest"), str | None)
                  and _is_a(result.get("best_epoch"), float) and "dev" in result
                  and all(isinstance(s, dict) and _is_a(s.get("acc"), float) for s in scores)
                  and isinstance(found, dict) and all(
                      isinstance(f, dict) and all(_is_a(f.get(k), float) for k in ("majority", "tfidf"))
                      for f in found.values()))
    if not is_one:
        raise ValueError(f"{path}: this is not what a run writes; move it away, and resume the run")
    return result
