"""Files in general: JSON, writing so that a file is whole or not there, checksums, and folders with a manifest."""

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from config import InputError

# --------------------------------------------------------------------------- JSON


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError, or InputError with the line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also a number of 5000 digits, or 100,000 brackets
        raise InputError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


def write_json(path: Path, value: Any) -> None:
    """A JSON file of a run folder, written atomically."""
    text = json.dumps(value, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), follow=False)


# --------------------------------------------------------------------------- writing


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


def write_atomically(path: Path, write: Callable[[Path], object], follow: bool = True) -> None:
    """Call write(temporary path), flush it to disk and rename it: path is the old file or the new, never half. What a
    symbolic link points to is replaced, not the link; a pipe or a device is written to. With `follow=False`, for a file
    of a run folder, both are refused. Raises OSError, naming the path and the bytes that are free, when the disk is
    full."""
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


def write_text(path: Path, text: str, follow: bool = True) -> None:
    """`write_atomically` of a UTF-8 text with the line ends that are in it."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"), follow)


def flush_folder(folder: Path) -> None:
    """Make a rename in this folder durable; Windows has no such call and does not need it."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def disk_full(path: Path, error: Exception) -> Exception:
    """What to raise for an error while writing: itself, or where it means that there is no room, an OSError that names
    the path and the bytes."""
    full = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", None))
    if isinstance(error, OSError) and error.errno not in full:
        return error
    free = shutil.disk_usage(path.parent).free
    return OSError(f"{path}: it could not be written ({error}); {free} bytes are free there")


def remove_temporary_files(folder: Path) -> None:
    """Remove the temporary files that a killed process left in a run folder: ours are .NAME.tmp, safetensors' are
    .tmpXXXXXX. Call it with the run's lock held, so that no other process is writing one of them."""
    for path in [*folder.glob(".*.tmp"), *folder.glob(".tmp??????")]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


# --------------------------------------------------------------------------- what may stand in a run folder


def check_plain(path: Path, is_folder: bool = False) -> None:
    """Raises OSError for a path of a run folder that is there and is not what the run makes: a link, which would lead
    out of the folder, a device or a pipe."""
    if path.is_symlink():
        raise OSError(f"{path}: this is a symbolic link, and inside a run folder no link is followed; put the "
                      f"{'folder' if is_folder else 'file'} itself there, or remove the link")
    if path.exists() and not (path.is_dir() if is_folder else path.is_file()):
        raise OSError(f"{path}: this is not a {'folder' if is_folder else 'regular file'}, as a run makes it; move it "
                      "away")


def check_tree(folder: Path) -> None:
    """`check_plain` of everything in a folder."""
    for place, folders, files in os.walk(folder):
        for name in files:
            check_plain(Path(place, name))
        for name in folders:
            check_plain(Path(place, name), is_folder=True)


@contextmanager
def locked(path: Path, waits: bool = False) -> Iterator[bool]:
    """Only one process is inside with the same file. Gives whether it is this one; with `waits`, when it is. A process
    that is killed leaves no lock. Raises OSError where a link or a device stands in the file's place."""
    check_plain(path)
    with open(path, "a+", encoding="utf-8", opener=no_follow) as file:
        try:
            try:
                import fcntl
            except ImportError:  # Windows
                import msvcrt

                file.seek(0)
                while True:
                    try:
                        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
                        break
                    except OSError:
                        if not waits:
                            raise
                        time.sleep(0.05)
            else:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
            is_ours = True
        except OSError as error:
            if waits:  # it is not held by another one: there are no locks here
                raise OSError(f"{path}: files cannot be locked there ({error.strerror}); choose a folder on another "
                              "file system") from None
            is_ours = False
        yield is_ours


def no_follow(path: str, flags: int) -> int:
    """An opener for files of a run folder: it does not follow a link, where the system can be told so."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


# --------------------------------------------------------------------------- checksums

READ_OF_A_FOLDER = ("config.json", "adapter_config.json", "*.safetensors", "model.safetensors.index.json",
                    "tokenizer*.json", "tokenizer.model")


def sha256(path: Path) -> str:
    """The checksum of a file of any size: the same numbers mean the same contents. Of a model's folder, that of the
    checksums of those files in it that are read."""
    digest = hashlib.sha256()
    if path.is_dir():
        for one in sorted({one for pattern in READ_OF_A_FOLDER for one in path.glob(pattern) if one.is_file()}):
            digest.update(f"{one.name} {sha256(one)}\n".encode())
        return digest.hexdigest()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_of(path: Path, size: int | None = None) -> Any:
    """A running sha256 of a file's first `size` bytes, or of all of it."""
    digest, left = hashlib.sha256(), math.inf if size is None else size
    with open(path, "rb", opener=no_follow) as file:
        while block := file.read(int(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    return digest


# --------------------------------------------------------------------------- folders with a manifest

MANIFEST = "manifest.json"


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


def manifest_digest(folder: Path) -> str | None:
    """The sha256 of a folder's manifest; None where there is none."""
    path = folder / MANIFEST
    return sha256(path) if path.is_file() and not path.is_symlink() else None


def fault_of_manifest(folder: Path, needed: Set[str]) -> str | None:
    """What is wrong with a folder that has a manifest, beginning with the file's name, or None. The manifest must name
    the files `needed`."""
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


def remove_folder(folder: Path) -> None:
    """Remove a folder; first out of the way, so that a kill in the middle leaves a temporary one and not a half."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        os.replace(folder, temporary)
    except OSError:
        return  # somebody has it open (Windows); the next save tries again
    shutil.rmtree(temporary, ignore_errors=True)
