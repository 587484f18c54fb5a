"""Exact resume: everything that changes while training, written so that a kill at any moment loses no more than the
steps since the last save, and that no damage passes for a state.

A state is a folder last/step-<step>-<n>/: the tensors, the other values, and a manifest with sizes and sha256.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from config import InputError, counted
from formats import files, weights
from formats.memory import is_out_of_memory
from training import device as devices
from training.course import Course
from training.device import Device
from training.run_folder import LOGS, RunFolder

STATE, TENSORS = "state.json", "tensors.safetensors"
NEEDED = frozenset({STATE, TENSORS})

# --------------------------------------------------------------------------- what changes while training


@dataclass
class Progress:
    """Everything that changes while training, beside tensors: with them, what an exact resume needs."""

    micro_batch: int
    step: int = 0  # optimizer steps taken, skipped ones included
    epoch: int = 0
    window: int = 0  # windows (effective batches) of this epoch that are done
    evaluated: int = 0  # evaluations of this epoch that are done
    evaluated_at: int = -1  # the step of the last evaluation
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
    """The progress that a state holds. Raises InputError for other fields than this version has, and for values of
    other types."""
    known = {f.name: f.type for f in fields(Progress)}
    if not isinstance(saved, dict) or saved.keys() != known.keys():
        names = saved.keys() if isinstance(saved, dict) else set()
        other = [f"{word} {', '.join(map(str, sorted(some, key=str)))}" for word, some in (
            ("it lacks", known.keys() - names), ("it also has", names - known.keys())) if some]
        raise InputError(f"it is of another version of this program ({'; '.join(other)}); resume with that version, or "
                         "start the run again")
    for name, kind in known.items():
        value = saved[name]
        if not _is_a(value, kind) or name in NEVER_NEGATIVE and value < (name == "micro_batch"):
            raise InputError(f"{name} is {value!r}")
    best = saved["best"]
    if best and not all(_is_a(best.get(name), float) for name in ("epoch", "dev_loss", "dev_acc", "monitor")):
        raise InputError(f"best is {best!r}")
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


@contextmanager
def faults_named(last: Path) -> Iterator[None]:
    """Inside, whatever a state makes stumble that is whole, but not one of this run and this version, becomes an
    InputError that names the folder."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise InputError(f"{last}: the state there is none of this run: {what}") from None


def check_place(progress: Progress, course: Course) -> None:
    """Raises InputError for a place in the run that there is not."""
    marks, step = course.marks(), progress.epoch * course.steps_per_epoch + progress.window
    if progress.step != step or step > course.steps or progress.evaluated >= len(marks) or (
            progress.window > marks[progress.evaluated]):
        raise InputError(f"epoch {progress.epoch}, window {progress.window}, evaluation {progress.evaluated}: a run of "
                         f"{counted(course.steps, 'step')} has no such place")


def check_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Raises InputError for a state of another optimizer: other groups, other settings than the rate, or moments of
    other shapes."""
    def settings(group: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in group.items() if k != "lr"}

    own = optimizer.state_dict()
    if list(map(settings, saved["param_groups"])) != list(map(settings, own["param_groups"])):
        raise InputError("the optimizer's groups or settings are others")
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    for i, moments in saved["state"].items():
        shape = tuple(parameters[i].shape)
        fitting = {(), (1,), shape, shape[:1], shape[:-1], shape[:-2] + shape[-1:]}
        for name, value in moments.items():
            shape_fits = isinstance(value, Tensor) and tuple(value.shape) in fitting
            if not (shape_fits or name == "step" and type(value) in (int, float)):
                raise InputError(f"the optimizer's {name} does not fit its parameter")


def check_logs(state: dict[str, Any]) -> None:
    """Raises InputError for lengths or checksums of other files than the run's logs."""
    if not all(name in LOGS and type(size) is int and size >= 0 for name, size in state["logs"].items()):
        raise InputError(f"logs is {state['logs']!r}; it can have the lengths of {', '.join(LOGS)}")
    if not isinstance(state.get("log_sha256", {}), dict):
        raise InputError("log_sha256 is not the checksums of the logs")


# --------------------------------------------------------------------------- all that a resume keeps


def trained(model: nn.Module) -> dict[str, Tensor]:
    """What training changes of a model's `state_dict`: all but the frozen parameters, which are read again where they
    come from."""
    frozen = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def load_trained(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put what `trained` gave back in its place. Raises InputError for another model's."""
    if tensors.keys() != trained(model).keys():
        raise InputError(f"the weights are another model's ({sorted(tensors.keys() ^ trained(model).keys())[:3]})")
    model.load_state_dict(tensors, strict=False)


def collect(model: nn.Module, optimizer: torch.optim.Optimizer, device: Device, ema: list[Tensor], progress: Progress,
            log_sizes: dict[str, int], log_sha256: dict[str, str], described: dict[str, Any]) -> dict[str, Any]:
    """Everything that changes while training. `ema`: the moving average of the weights, or []; `log_sizes` and
    `log_sha256`: of the logs up to here; `described`: the run's args.json, so that no other run takes the state for
    its own."""
    return {
        "model": trained(model), "optimizer": optimizer.state_dict(), "random": devices.random_state(device),
        "ema": ema, "progress": asdict(progress), "logs": log_sizes, "log_sha256": log_sha256,
        "run": {"id": described.get("id"), "options": described.get("options", {})},
    }


def restore(saved: dict[str, Any], model: nn.Module, optimizer: torch.optim.Optimizer, device: Device,
            ema: list[Tensor]) -> None:
    """Put what `collect` gave back in its place; the progress and the logs are the loop's."""
    load_trained(model, saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    for mean, old in zip(ema, saved["ema"], strict=True):
        mean.copy_(old)
    devices.set_random_state(device, saved["random"])


# --------------------------------------------------------------------------- tensors and values apart


def split_tensors(value: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """A nest of dicts and lists into the same nest without its tensors, and the tensors by their path.

    A tensor's place holds {"tensor": path}; dict keys become [key, value] pairs, since JSON knows only text keys.
    """
    if isinstance(value, Tensor):
        return {"tensor": path}, {path: value}
    if isinstance(value, dict):
        pairs: list[list[Any]] = []
        tensors: dict[str, Tensor] = {}
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


# --------------------------------------------------------------------------- on the disk


def save_state(last: Path, step: int, tensors: dict[str, Tensor], values: dict[str, Any], good: bool) -> None:
    """A state in last/step-<step>-<n>/: tensors, values, and a manifest with sizes and sha256, written last.

    Written into a folder beside, flushed, read back and renamed; then the older states are removed, but for the one
    before and the newest good one (`good`: a state to roll back to). Raises OSError, naming the path and
    the bytes, when the disk is full; the states before stay as they were and the half-written one is removed.
    """
    files.check_plain(last, is_folder=True)
    last.mkdir(parents=True, exist_ok=True)
    files.remove_temporary_files(last)
    existing = _states(last)
    folder = last / f"step-{step}-{_number(existing[0]) + 1 if existing else 0}"
    temporary = last / f".{folder.name}.tmp"
    wanted = sum(t.numel() * t.element_size() for t in tensors.values())
    try:
        temporary.mkdir()
        plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        safetensors.torch.save_file(plain, str(temporary / TENSORS))
        (temporary / STATE).write_text(json.dumps(values), encoding="utf-8")
        files.write_manifest(temporary, {"step": step, "good": good})
        os.replace(temporary, folder)
        files.flush_folder(last)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        free = shutil.disk_usage(last).free
        raise OSError(f"{folder}: the state could not be written ({error}): it takes {wanted} bytes, {free} are free; "
                      "the last whole state is kept") from None
    keep_good = next((s for s in [folder, *existing] if _is_good(s)), None)
    for old in existing[1:]:  # the one before stays too: it is what a damaged newest state falls back to
        if old != keep_good:
            files.remove_folder(old)


def _is_good(state: Path) -> bool:
    """Does its manifest, which may be damaged, call it good?"""
    try:
        return files.read_json(state / files.MANIFEST).get("good") is True
    except (ValueError, OSError):
        return False


def run_of(state: Path) -> dict[str, Any]:
    """What a state says of the run that it belongs to: `id` and `options`; {} where it says nothing that makes sense,
    as one of an older version."""
    try:
        found = join_tensors(dict(files.read_json(state / STATE)["dict"])["run"], {})
        return found if isinstance(found, dict) and isinstance(found.get("options"), dict) else {}
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        return {}


def newest_run(last: Path) -> dict[str, Any]:
    """`run_of` of the newest state that can be read; {} where there is none."""
    return next((found for state in _states(last) if (found := run_of(state))), {})


def newest_progress(last: Path) -> Progress | None:
    """How far the newest state that can be read is; None where there is none."""
    for state in _states(last):
        with suppress(ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
            return progress_of(join_tensors(dict(files.read_json(state / STATE)["dict"])["progress"], {}))
    return None


def remove_other_states(last: Path, run_id: str | None) -> list[str]:
    """Remove the whole states that belong to another run than the one with this id, as an old run's beside a new
    args.json; a line for each."""
    lines = []
    for state in _states(last):
        if run_of(state).get("id") != run_id and files.fault_of_manifest(state, NEEDED) is None:
            lines.append(f"{state}: this state belongs to another run than args.json does; it is not used")
            files.remove_folder(state)
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


def load_state(last: Path, only_good: bool = False) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """Tensors and values of the newest state that is whole, and a line for each damaged one that was passed over; those
    are removed, so that the next save counts on whole ones only.

    Raises InputError when there is none.
    """
    faults, damaged = [], []
    for folder in _states(last):
        fault = files.fault_of_manifest(folder, NEEDED)
        if fault:
            faults.append(f"{folder}: {fault}; going back to the state before it")
            damaged.append(folder)
        elif not only_good or _is_good(folder):
            handle = weights.open_safetensors(folder / TENSORS)
            tensors = {k: handle.get_tensor(k).clone() for k in handle.keys()}  # without, they would be the file itself
            for state in damaged:
                files.remove_folder(state)
            return tensors, files.read_json(folder / STATE), faults
    raise InputError("\n".join([*faults, f"{last}: there is no whole state to go on from; start the run again"]))


def keep_newest_state(last: Path) -> None:
    """Of a finished run with --keep_state, only the newest state stays."""
    for old in _states(last)[1:]:
        shutil.rmtree(old, ignore_errors=True)


def read_description(folder: RunFolder) -> dict[str, Any]:
    """The run's args.json, checked; an option that was changed is named where the run's states know it."""
    folder.check()  # before anything in it is followed
    return folder.description(newest_run(folder.last))
