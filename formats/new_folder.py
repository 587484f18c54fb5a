"""A new folder that is whole or not there."""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from config import InputError
from formats import files


def check_new(folder: Path, option: str) -> None:
    """Raises InputError for a folder that is there and holds something, or whose place something else has."""
    if folder.resolve() == Path.cwd():
        raise InputError(f"{option} {folder}: this is the folder that you are in; name one that is new or empty")
    if folder.is_symlink() or folder.exists() and not folder.is_dir():
        raise InputError(f"{option} {folder}: this is not a folder; name one that is new or empty")
    held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if held:
        more = f", ... ({len(held)} in all)" if len(held) > 3 else ""
        raise InputError(f"{option} {folder}: there is something in this folder ({', '.join(held[:3])}{more}), and "
                         "nothing is replaced; name one that is new or empty")


def write_folder(folder: Path, fill: Callable[[Path], None], option: str) -> None:
    """`fill` a folder beside, .NAME.*.tmp, flush its files to disk and rename it: a half-written one never has the
    name.

    Raises InputError as `check_new`, and OSError, naming the path and the bytes that are free, when the disk is full.
    """
    check_new(folder, option)
    folder = folder.absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
    except OSError as error:
        raise OSError(error.errno, f"no folder can be made there ({error.strerror})", str(folder)) from None
    try:
        temporary.chmod(0o755)
        fill(temporary)
        for path in sorted(temporary.iterdir()):
            path.chmod(0o644)  # safetensors makes its files 0600
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        check_new(folder, option)  # somebody else may have been quicker
        if folder.exists():
            folder.rmdir()  # it is empty, and Windows renames onto no folder
        os.replace(temporary, folder)
        files.flush_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:  # as NumPy and torch say it
            error = OSError(errno.ENOSPC, str(error))
        raise files.disk_full(folder, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
