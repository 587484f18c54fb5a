"""best/, the folder with a run's best model: at any moment there is a whole one, and its manifest says whether it is
what was written."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from config import InputError
from formats import files

READ_FROM_BEST = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def write_best(folder: Path, fill: Callable[[Path], None]) -> str:
    """`fill` a folder beside, .best.tmp, add a manifest with the sha256 of each of its files, and let it take the place
    of best/. That one becomes .best.old, until `remove_previous_best`. So at any moment there is a whole model: in
    best/, or between the two renames in .best.old. Returns the manifest's own sha256.

    Raises OSError, naming the path and the bytes, when the disk is full.
    """
    temporary, previous = folder.with_name(f".{folder.name}.tmp"), previous_best(folder)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        fill(temporary)
        files.write_manifest(temporary, {})
        digest = files.sha256(temporary / files.MANIFEST)
        if folder.exists():
            shutil.rmtree(previous, ignore_errors=True)
            os.replace(folder, previous)
        os.replace(temporary, folder)
        files.flush_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise files.disk_full(folder, error) from None
    return digest


def previous_best(folder: Path) -> Path:
    """Where the model in `folder` goes while a new one takes its place."""
    return folder.with_name(f".{folder.name}.old")


def remove_previous_best(best: Path) -> None:
    """Once a state that knows of the new best/ is on the disk, the one before is not needed any more."""
    shutil.rmtree(previous_best(best), ignore_errors=True)


def restore_best(best: Path, digest: str | None) -> None:
    """After a kill: best/ is again the one that the state knows, by its manifest's sha256, where that one is still
    there. A best/ that is newer than the state is made again by the steps that are done again."""
    previous = previous_best(best)
    if previous.is_dir() and files.manifest_digest(best) != digest and files.manifest_digest(previous) == digest:
        if best.exists():
            files.remove_folder(best)
        os.replace(previous, best)
    if best.exists():
        remove_previous_best(best)


def check_best(best: Path, digest: str | None = None) -> bool:
    """Is the model in best/ what its manifest says? False for one of an older version, which has no manifest.

    `digest`: the manifest's own sha256, where it is known. Raises InputError that names the file that has changed.
    """
    while True:
        before = files.manifest_digest(best)
        fault = None if before is None else files.fault_of_manifest(best, {"model.safetensors", "config.json"})
        if before == files.manifest_digest(best):
            break  # else a run that is still training has put a new one there, just now
    if before is None and digest is None:
        return False
    if not fault and digest is not None and before != digest:
        why = "not that of the run's best evaluation (sha256)" if before else "gone"
        fault = f"{files.MANIFEST} is {why}"
    if not fault:
        known = files.read_json(best / files.MANIFEST)["files"]
        strange = [name for name in READ_FROM_BEST if name not in known and (best / name).exists()]
        fault = f"{strange[0]} is not one of the files that the run has written" if strange else None
    if fault:
        raise InputError(f"{best}{os.sep}{fault}; copy the folder from where it is whole, or train again")
    return True


NO_CHECKSUMS = "an older version wrote it, without checksums: a damaged file would not be noticed"
