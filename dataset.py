"""`label ||| sentence` files to tokens to length-bucketed batches; the baselines that every result is held against."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from config import RunConfig
from data import prepare
from tokenizer import Tokenizer

SEPARATOR = " ||| "
FORMAT = "expected `label ||| sentence`, for example `3 ||| a charming film`"

# --------------------------------------------------------------------------- which files


@dataclass(frozen=True)
class DataFiles:
    """The files of a run. `notice` says what was chosen where nothing was asked for, and how to choose otherwise."""

    name: str
    train: Path | None
    dev: Path | None
    test: Path | None
    label_names: Path | None
    notice: str = ""


def find_files(config: RunConfig) -> DataFiles:
    """Where a run's sentences are. In this order: the paths that were typed; `--dataset`; SST where it lies in
    data/; the data set movies, which is fetched. Raises FileNotFoundError, naming the command that fetches."""
    typed = {n: getattr(config, n) for n in ("train", "dev", "test", "label_names")}
    splits = [n for n in ("train", "dev", "test") if typed[n]]
    if config.dataset:
        name, notice = config.dataset, ""
    elif splits:
        return _typed_files(typed, splits)
    else:
        sst = prepare.dataset_paths("sst")
        name, notice = "sst", ""
        if not (sst["train"].is_file() and sst["dev"].is_file()):
            name = "movies"
            notice = ("SST is not in data/: using the data set movies instead; "
                      "`python data/prepare.py sst` fetches SST (or imports it: --from DIR)")
    paths = prepare.dataset_paths(name)
    if name == "movies" and not all(path.is_file() for path in paths.values()):
        prepare.fetch("movies")
    for key, value in typed.items():
        paths[key] = Path(value) if value else paths[key]
        if not paths[key].is_file():
            if key in ("test", "label_names") and not value:
                paths[key] = None  # a data set may come without them
                continue
            known = f"`python data/prepare.py {name}` fetches it" if name in prepare.DATASETS else (
                f"data sets that can be fetched: {', '.join(prepare.DATASETS)}")
            raise FileNotFoundError(f"{paths[key]}: there is no such file; {known}")
    return DataFiles(name, **paths, notice=notice)


def _typed_files(typed: dict[str, str | None], splits: list[str]) -> DataFiles:
    """Only what was typed is used, so that no split of another data set slips in beside it."""
    for split in splits:
        if not Path(typed[split]).is_file():
            guess = Path(typed[split]).name.partition("-")[0]
            fetch = f"`python data/prepare.py {guess}` fetches it" if guess in prepare.DATASETS else "check --" + split
            raise FileNotFoundError(f"{typed[split]}: there is no such file; {fetch}")
    first = Path(typed[splits[0]])
    name = first.stem.removesuffix("-" + splits[0])
    labels = typed["label_names"]
    if labels and not Path(labels).is_file():
        raise FileNotFoundError(f"{labels}: there is no such file; check --label_names")
    beside = first.with_name(f"{name}-label-mapping.json")
    if not labels and beside.is_file():
        labels = str(beside)
    return DataFiles(name, *(Path(p) if p else None for p in (typed["train"], typed["dev"], typed["test"], labels)))


# --------------------------------------------------------------------------- reading


def read_text(path: str | Path) -> str:
    """A UTF-8 file, with or without a byte order mark. Raises ValueError, naming the line, for other bytes."""
    return decode(Path(path).read_bytes(), path)


def decode(raw: bytes, path: str | Path) -> str:
    """`read_text` of bytes that are already here; `path` is for the message."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: the bytes {raw[error.start:error.end]!r} are no UTF-8; save the file as "
                         "UTF-8") from None


def read_lines(path: str | Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, each with its number from 1."""
    lines = read_text(path).replace("\r\n", "\n").split("\n")
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def read_label_names(path: Path | None) -> list[str] | None:
    """The JSON list of the labels' names. None without a path."""
    if path is None:
        return None
    try:
        names = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: no JSON ({error.msg}); expected a list such as "
                         '["bad", "good"]') from None
    if isinstance(names, dict):  # {"0": "bad", "1": "good"}
        names = [names.get(str(i)) for i in range(len(names))]
    if not isinstance(names, list) or len(names) < 2 or not all(isinstance(n, str) and n.strip() for n in names):
        raise ValueError(f'{path}: expected a JSON list of two or more names, such as ["bad", "good"]')
    return names


def read_examples(path: Path, n_labels: int | None, labels_file: Path | None = None) -> tuple[list[int], list[str]]:
    """Labels and sentences of a `label ||| sentence` file, in its order; blank lines are skipped.

    A sentence may hold ` ||| ` again. Raises ValueError that lists the first ten bad lines: no separator, a label
    that is no integer or not in 0 .. n_labels - 1, an empty sentence; and for a file with no sentence.
    """
    labels, sentences, faults = [], [], []
    for number, line in read_lines(path):
        label, separator, sentence = line.partition(SEPARATOR)
        sentence = sentence.strip()
        fault = None
        if not separator:
            fault = f"no ` ||| ` in {line[:60]!r}; {FORMAT}"
        elif not re.fullmatch(r"[+-]?[0-9]{1,9}", label.strip()):
            fault = f"the label {label.strip()[:30]!r} is no integer; {FORMAT}"
        elif int(label) < 0 or (n_labels and int(label) >= n_labels):
            top = f"0 to {n_labels - 1}, one for each name in {labels_file}" if n_labels else "0 or more"
            fault = f"the label {int(label)} is out of range; labels are {top}"
        elif not sentence:
            fault = f"the sentence is empty; {FORMAT}"
        if fault:
            faults.append(f"{path}:{number}: {fault}")
        else:
            labels.append(int(label))
            sentences.append(sentence)
    if faults:
        more = [f"... and {len(faults) - 10} more lines like these"] if len(faults) > 10 else []
        raise ValueError("\n".join(faults[:10] + more))
    if not sentences:
        raise ValueError(f"{path}: there is no sentence in the file; {FORMAT}")
    return labels, sentences


@dataclass(frozen=True)
class Split:
    """One tokenised file. `tokens[i]` is a 1-d int32 array, never empty; `labels` (N,) int64; file order."""

    path: Path
    sentences: list[str]
    tokens: list[np.ndarray]
    labels: np.ndarray
    n_cut: int  # how many sentences were longer than the limit

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each sentence, (N,) int64."""
        return np.fromiter((len(t) for t in self.tokens), dtype=np.int64, count=len(self.tokens))

    def take(self, rows: np.ndarray) -> "Split":
        """The split of these rows, in their order."""
        return replace(self, sentences=[self.sentences[i] for i in rows], tokens=[self.tokens[i] for i in rows],
                       labels=self.labels[rows])


def tokenize(
    sentences: list[str], tokenizer: Tokenizer, context: int, max_sentence_len: int | None = None
) -> tuple[list[np.ndarray], int]:
    """Each sentence's tokens, the begin token in front where the model was trained with one.

    Cut after max_sentence_len tokens (the begin token not counted) or at the model's context. Returns the arrays
    and how many sentences were cut. A sentence without any token becomes the end (or padding) token, so that the
    pooling always has something to look at.
    """
    limit = context if max_sentence_len is None else min(context, max_sentence_len + int(tokenizer.add_bos))
    stand_in = tokenizer.eos_id if tokenizer.eos_id >= 0 else tokenizer.pad_id
    rows = tokenizer.encode_batch(sentences, bos=tokenizer.add_bos, eos=False)
    return [np.asarray(row[:limit] or [stand_in], dtype=np.int32) for row in rows], sum(len(r) > limit for r in rows)


def load_split(
    path: Path, tokenizer: Tokenizer, context: int, max_sentence_len: int | None = None,
    n_labels: int | None = None, labels_file: Path | None = None,
) -> Split:
    """A `label ||| sentence` file, read, checked (see `read_examples`) and tokenised once."""
    labels, sentences = read_examples(path, n_labels, labels_file)
    tokens, n_cut = tokenize(sentences, tokenizer, context, max_sentence_len)
    return Split(path, sentences, tokens, np.asarray(labels, dtype=np.int64), n_cut)


def check_labels(split: Split, train: Split) -> None:
    """Raises ValueError, with the line, for a label that the training sentences do not have."""
    unknown = ~np.isin(split.labels, train.labels)
    if unknown.any():
        label = int(split.labels[unknown.argmax()])
        line = next(n for n, text in read_lines(split.path) if int(text.partition(SEPARATOR)[0]) == label)
        raise ValueError(f"{split.path}:{line}: the label {label} is not in {train.path}, so no model can learn it; "
                         "check both files")


def sha256(path: Path) -> str:
    """The file's checksum, for args.json: the same numbers mean the same data."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# --------------------------------------------------------------------------- batches


def collate(tokens: list[np.ndarray], labels: np.ndarray, index: np.ndarray, pad_id: int) -> dict[str, torch.Tensor]:
    """One batch: tokens (B, T) int64 padded on the right, lengths (B,), labels (B,), index (B,) rows of the file."""
    lengths = np.fromiter((len(t) for t in tokens), dtype=np.int64, count=len(tokens))
    padded = np.full((len(tokens), lengths.max()), pad_id, dtype=np.int64)
    for row, sentence in enumerate(tokens):
        padded[row, : len(sentence)] = sentence
    arrays = {"tokens": padded, "lengths": lengths, "labels": labels, "index": index}
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def make_batch(split: Split, rows: np.ndarray, pad_id: int) -> dict[str, torch.Tensor]:
    """The batch of these rows of the split; see `collate`."""
    return collate([split.tokens[i] for i in rows], split.labels[rows], np.asarray(rows), pad_id)


BUCKET = 50  # batches in a window: wide enough to find neighbours in length, narrow enough to stay random


def epoch_order(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The rows of each batch of one epoch, every row once; a pure function of (lengths, batch_size, seed, epoch).

    The rows are shuffled, sorted by length inside windows of BUCKET batches, cut into batches and the batches are
    shuffled: little padding, and still another order each epoch. N rows make ceil(N / batch_size) batches whose
    sizes differ by one at most, so that a last, short batch does not weigh its sentences more than the others.
    """
    random = np.random.default_rng([seed, epoch])
    rows = random.permutation(len(lengths))
    n_batches = -(-len(rows) // batch_size)
    batches = []
    for window in np.array_split(np.arange(n_batches), -(-n_batches // BUCKET)):
        # The rows of these batches: the same cuts as array_split of all rows would make.
        start, end = (-(-len(rows) * int(edge) // n_batches) for edge in (window[0], window[-1] + 1))
        part = rows[start:end]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += np.array_split(part, len(window))
    return [batches[i] for i in random.permutation(len(batches))]


EVAL_TOKENS = 4096  # padded tokens in an evaluation batch: no gradients are kept, so it can be large


def length_order(lengths: np.ndarray, max_tokens: int = EVAL_TOKENS) -> Iterator[np.ndarray]:
    """Rows for evaluation, longest first, in batches of at most max_tokens padded tokens (one row at least)."""
    rows = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(rows):
        size = max(1, max_tokens // int(lengths[rows[start]]))
        yield rows[start : start + size]
        start += size


# --------------------------------------------------------------------------- baselines


def baselines(
    labels: Sequence[int], sentences: list[str], tests: dict[str, Split]
) -> dict[str, dict[str, float]]:
    """What costs nothing: the accuracy of the training labels' majority, and of TF-IDF with logistic regression.

    Words and word pairs, scikit-learn's defaults otherwise. Returns {name of the split: {"majority": accuracy,
    "tfidf": accuracy}}.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    majority = np.bincount(labels).argmax()
    vectorizer = TfidfVectorizer(ngram_range=(1, 2))
    features = vectorizer.fit_transform(sentences)
    words = LogisticRegression(max_iter=200).fit(features, labels) if len(set(labels)) > 1 else None
    result = {}
    for name, split in tests.items():
        predicted = words.predict(vectorizer.transform(split.sentences)) if words else majority
        result[name] = {"majority": float((split.labels == majority).mean()),
                        "tfidf": float((split.labels == predicted).mean())}
    return result
