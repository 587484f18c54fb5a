"""Where the trials of a search are kept: an address that Optuna takes, checked and never shown with its password; a
journal that a kill does not break; the lock beside it."""

import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from config import InputError

HEARTBEAT = 60  # seconds between two signs of life, where the storage has them
SQLITE, JOURNAL = b"SQLite format 3\0", b'{"op_code":'  # how files of these kinds begin
PASSWORD = re.compile(r"(?<=://)([^:@/?]*:)([^@]*)(?=@)|([?&][^=&]*(?:pass|pwd|secret|token)[^=&]*=)([^&]*)")


def hidden(text: str) -> str:
    """A storage's address without its password."""
    return PASSWORD.sub(lambda match: f"{match[1] or match[3]}***", text)


@contextmanager
def faults_named(storage: str) -> Iterator[None]:
    """Inside, what a storage does not do becomes an OSError that names it, without its password."""
    import optuna

    try:
        yield
    except InputError:
        raise
    except Exception as error:
        of_storage = isinstance(error, optuna.exceptions.StorageInternalError | ImportError | EOFError) or (
            type(error).__module__.startswith("sqlalchemy"))
        of_journal = "://" not in storage and isinstance(error, ValueError | KeyError)
        if not of_storage and not of_journal:
            raise
        cause = error
        while cause.__cause__ or cause.__context__:
            cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
        said = hidden(str(cause).strip().partition("\n")[0][:300])
        for match in PASSWORD.finditer(storage):
            password = match[2] or match[4]
            if password:
                said = said.replace(password, "***").replace(unquote(password), "***")
        hint = "it cannot be reached, has no room, or is damaged"
        if isinstance(error, ImportError):
            packages = {"postgresql": "psycopg2-binary", "mysql": "pymysql (and write mysql+pymysql://)"}
            scheme = storage.partition(":")[0].partition("+")[0]
            hint = f"install its driver, such as: pip install {packages.get(scheme, 'the one of ' + scheme)}"
        raise OSError(f"--storage {hidden(storage)}: {said}: {hint}") from None


# --------------------------------------------------------------------------- addresses


def check_journal(path: Path) -> None:
    """Raises InputError for a file that is no journal, before anything is written into it."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        begin = file.read(len(SQLITE))
    if begin == SQLITE:
        raise InputError(f"--storage {path}: this is a SQLite file; write sqlite:///{path.as_posix()}")
    if not begin.startswith(JOURNAL[: len(begin)]):
        raise InputError(f"--storage {path}: this file is not the journal of a search; name a new file, or an address "
                         "such as sqlite:///search.db")


def check_address(storage: str) -> None:
    """Raises InputError for an address at which there can be no storage that several processes share."""
    hint = "expected sqlite:///FILE, postgresql://..., mysql://..., or the name of a journal file"
    scheme, has_scheme, rest = storage.partition("://")
    if not has_scheme and re.match(r"\w+:/", storage) and os.name == "posix":
        raise InputError(f"--storage {hidden(storage)}: {hint}")
    if not has_scheme:
        return
    if scheme.partition("+")[0] not in ("sqlite", "postgresql", "mysql", "mariadb"):
        raise InputError(f"--storage {hidden(storage)}: there is no storage of the kind {scheme}; {hint}")
    if scheme.startswith("sqlite"):
        name = rest.partition("?")[0].removeprefix("/")
        if not rest.startswith("/") or name in ("", ":memory:"):
            raise InputError(f"--storage {hidden(storage)}: it names no file; expected three slashes and a file, such "
                             "as sqlite:///search.db")
        return
    from sqlalchemy import make_url

    try:
        make_url(storage)
    except Exception:  # what it says may have the password in it
        raise InputError(f"--storage {hidden(storage)}: this is no address; {hint}") from None


def file_of(storage: str) -> Path | None:
    """The file of a storage that is one; None for one on a server."""
    if "://" not in storage:
        return Path(storage)
    match = re.match(r"sqlite(?:\+\w+)?:///([^?]+)", storage)
    return Path(unquote(match[1])) if match else None


def name_in(storage: str, folder: Path) -> str:
    """What a search's folder calls its storage: a file in it by its name there, so that the folder can be moved; else
    the address, without its password."""
    path = file_of(storage)
    if path is None:
        return hidden(storage)
    path = path.resolve()
    inside = path.is_relative_to(folder.resolve())
    return path.relative_to(folder.resolve()).as_posix() if inside else path.as_posix()


def lock_of(storage: str, folder: Path) -> Path:
    """The file that is locked while a process looks how many trials there are and takes one: beside a storage that is a
    file, so that all who use it meet there. Raises InputError where no such file can be."""
    path = file_of(storage)
    if path is None:
        return folder / ".ask"
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(f"--storage {storage}: expected a file in a folder that there is, or an address such as "
                         "sqlite:///search.db")
    return path.with_name(f"{path.name}.ask")


# --------------------------------------------------------------------------- opened


def open_storage(storage: str) -> Any:
    """The storage of an address, or of a journal's file. Raises OSError for one that cannot be used."""
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalFileSymlinkLock

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", module="optuna")
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)

    class Journal(JournalFileBackend):
        """A journal whose last line is mended where a process was killed while it wrote it: nobody has been told of
        that line, and behind it nothing could be read."""

        def __init__(self, path: str):
            self.path = path
            # Windows makes links for nobody but administrators.
            self.own_lock = (JournalFileSymlinkLock if os.name == "posix" else JournalFileOpenLock)(path)
            super().__init__(path, self.own_lock)
            with locked(self.own_lock):
                mend(Path(path))

        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            lines = "".join(json.dumps(one, separators=(",", ":")) + "\n" for one in logs)
            with locked(self.own_lock):
                mend(Path(self.path))
                with open(self.path, "ab") as file:
                    file.write(lines.encode())
                    file.flush()
                    os.fsync(file.fileno())

    with faults_named(storage):
        if "://" not in storage:
            check_journal(Path(storage))
            return optuna.storages.JournalStorage(Journal(storage))
        more = {"connect_args": {"timeout": 60}} if storage.startswith("sqlite") else {"pool_pre_ping": True}
        return optuna.storages.RDBStorage(storage, engine_kwargs=more, heartbeat_interval=HEARTBEAT)


@contextmanager
def locked(lock: Any) -> Iterator[None]:
    """Inside, a journal's lock is held."""
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def mend(path: Path) -> None:
    """Cut off a last line of a journal that has no end. Call it with the journal's lock held."""
    with open(path, "rb+") as file:
        size = file.seek(0, os.SEEK_END)
        end = size
        while end:
            begin = max(0, end - (1 << 16))
            file.seek(begin)
            at = file.read(end - begin).rfind(b"\n")
            if at >= 0:
                end = begin + at + 1
                break
            end = begin
        if end < size:
            file.truncate(end)
            os.fsync(file.fileno())
