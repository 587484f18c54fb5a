"""The one training loop and the one evaluation loop, the device and its precision, and the run folder.

Nothing here knows what the task is: a `Task` brings the model, its loss, and how a model is scored and saved.
"""

import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import write_json
from config import RunConfig
from dataset import Split, epoch_order, length_order, make_batch

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
        name = torch.cuda.get_device_name(self.where) if is_gpu else f"{torch.get_num_threads()} threads"
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
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from None
    if where.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {name}: it can be cpu, cuda, cuda:N or mps")
    fast = is_fast_at_bfloat16(where)
    if config.dtype == "auto":
        return Device(where, torch.bfloat16 if fast else torch.float32)
    if config.dtype == "bfloat16" and not fast:
        warn(f"--dtype bfloat16: {where} only emulates it, which can be a hundred times slower than float32")
    return Device(where, getattr(torch, config.dtype))


def warn(message: str) -> None:
    """A line on stderr, so that stdout keeps to results."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------- the run folder

RUN_FILE = "args.json"


def open_run(config: RunConfig) -> Path:
    """Make the run's folder and return it.

    The default name is runs/<option>-<epochs>-<lr>, with -2, -3, ... behind it when that exists. An --output_dir
    that holds a run is refused without --overwrite, and then emptied of that run's files. Raises FileExistsError or
    OSError with what to do.
    """
    try:
        if config.output_dir is None:
            base = Path("runs") / f"{config.option}-{config.epochs}-{config.lr}"
            for n in range(1, 10_000):
                folder = base if n == 1 else base.with_name(f"{base.name}-{n}")
                try:
                    folder.mkdir(parents=True)
                    return folder
                except FileExistsError:
                    continue
        folder = Path(config.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / RUN_FILE).exists():
            if not config.overwrite:
                raise FileExistsError(f"{folder}: there is a run in this folder already; --overwrite replaces it, or "
                                      "choose another --output_dir")
            for name in (RUN_FILE, "steps.jsonl", "epochs.jsonl", "result.json"):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / "best", ignore_errors=True)
        probe = folder / f".{os.getpid()}.tmp"
        probe.touch()
        probe.unlink()
        return folder
    except FileExistsError as error:
        raise error if error.errno is None else OSError(f"{config.output_dir}: it is a file, no folder; choose another "
                                                        "--output_dir") from None
    except OSError as error:
        raise OSError(f"{config.output_dir or 'runs'}: no run can be written here ({error.strerror}); choose another "
                      "--output_dir") from None


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
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "platform": platform.platform(),
    }


def write_line(file: TextIO, values: dict[str, Any]) -> None:
    """One JSON object a line."""
    file.write(json.dumps(values) + "\n")


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
        batch = device.put(make_batch(split, rows, pad_id))
        with device.autocast():
            parts.append(model(batch["tokens"], batch["lengths"]).float())
    model.train(was_training)
    together = torch.cat(parts).cpu()
    result = torch.empty_like(together)
    result[torch.from_numpy(np.concatenate(batches))] = together
    return result


def score(log_probs: Tensor, labels: np.ndarray) -> dict[str, float]:
    """acc, macro f1 (over the classes that occur in the labels or the predictions) and mean loss of
    log-probabilities (N, C)."""
    from sklearn.metrics import f1_score

    predicted = log_probs.argmax(1).numpy()
    truth = torch.from_numpy(labels)
    return {
        "loss": float(nn.functional.nll_loss(log_probs, truth)),
        "acc": float((predicted == labels).mean()),
        "f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),
    }


# --------------------------------------------------------------------------- training


@dataclass(frozen=True)
class Task:
    """What is trained. `losses(batch)` gives each sentence's loss (B,); `evaluate()` the epoch's scores, with
    train_acc, dev_loss, dev_acc and dev_f1; `save_best()` keeps the model as it is now."""

    model: nn.Module
    train: Split
    pad_id: int
    losses: Callable[[dict[str, Tensor]], Tensor]
    evaluate: Callable[[], dict[str, float]]
    save_best: Callable[[], None]


class _StepLog:
    """steps.jsonl and the progress bar. On a GPU the numbers stay there until `every` steps have passed: reading
    each one would make the processor wait for the GPU at each step."""

    def __init__(self, file: TextIO, bar: tqdm, every: int):
        self.file, self.bar, self.every = file, bar, every
        self.waiting: list[dict[str, Any]] = []

    def add(self, **values: Any) -> None:
        self.waiting.append(values)
        if len(self.waiting) >= self.every:
            self.flush()

    def flush(self) -> None:
        if not self.waiting:
            return
        tensors = torch.stack([torch.stack((v["loss"], v["grad_norm"])) for v in self.waiting]).tolist()
        for values, (loss, norm) in zip(self.waiting, tensors, strict=True):
            write_line(self.file, {**values, "loss": loss, "grad_norm": norm})
        self.file.flush()
        self.bar.set_postfix_str(f"loss {tensors[-1][0]:.3f}, lr {self.waiting[-1]['lr']:.2e}", refresh=False)
        self.bar.update(len(self.waiting))
        self.waiting.clear()


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients together, as a tensor on their device."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def fit(
    task: Task, optimizer: torch.optim.Optimizer, config: RunConfig, device: Device, folder: Path
) -> dict[str, Any]:
    """Train for config.epochs epochs; write steps.jsonl and epochs.jsonl; print a line an epoch; keep the best.

    The best epoch has the highest dev_acc, of equals the lowest dev_loss. Returns its line of epochs.jsonl.
    """
    parameters = [p for p in task.model.parameters() if p.requires_grad]
    lengths = task.train.lengths
    steps_an_epoch = math.ceil(len(task.train) / config.batch_size)
    best: dict[str, Any] = {}
    step, start = 0, time.perf_counter()
    bar = tqdm(total=config.epochs * steps_an_epoch, desc="train", disable=None, file=sys.stderr, mininterval=0.5)
    with (open(folder / "steps.jsonl", "w", encoding="utf-8") as steps_file,
          open(folder / "epochs.jsonl", "w", encoding="utf-8") as epochs_file, bar):
        log = _StepLog(steps_file, bar, every=1 if device.where.type == "cpu" else 50)
        for epoch in range(config.epochs):
            task.model.train()
            epoch_start, total_loss = time.perf_counter(), torch.zeros((), device=device.where, dtype=torch.float64)
            for rows in epoch_order(lengths, config.batch_size, config.seed, epoch):
                batch = device.put(make_batch(task.train, rows, task.pad_id))
                with device.autocast():
                    losses = task.losses(batch)
                loss = losses.mean()
                loss.backward()
                norm = gradient_norm(parameters)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                total_loss += losses.detach().sum()
                step += 1
                log.add(step=step, epoch=epoch, lr=optimizer.param_groups[0]["lr"], loss=loss.detach(), grad_norm=norm,
                        tokens=int(lengths[rows].sum()), seconds=round(time.perf_counter() - start, 4))
            log.flush()
            line = {"epoch": epoch, "train_loss": float(total_loss) / len(task.train), **task.evaluate(),
                    "lr": optimizer.param_groups[0]["lr"], "seconds": round(time.perf_counter() - epoch_start, 3)}
            is_best = not best or (line["dev_acc"], -line["dev_loss"]) > (best["dev_acc"], -best["dev_loss"])
            if is_best:
                best = line
                task.save_best()
            write_line(epochs_file, line)
            epochs_file.flush()
            bar.clear()
            print(epoch_line(line), flush=True)
    return best


def epoch_line(line: dict[str, Any]) -> str:
    """The printed line of an epoch. People's scripts read it: its format stays."""
    return (f"epoch {line['epoch']}: train loss :: {line['train_loss']:.3f}, train acc :: {line['train_acc']:.3f}, "
            f"dev acc :: {line['dev_acc']:.3f}, lr :: {line['lr']:.2e}")


def save_result(folder: Path, result: dict[str, Any]) -> None:
    """result.json, the last file that a run writes: a folder that has it is a finished run."""
    write_json(folder / "result.json", result)
