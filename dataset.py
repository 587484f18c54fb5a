"""`label ||| sentence` files to tokens to length-bucketed batches; the baselines that every result is held against."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from config import RunConfig, counted
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
        line = len(split_lines(raw[: error.start].decode("utf-8-sig")))
        raise ValueError(f"{path}:{line}: the bytes {raw[error.start:error.end]!r} are not UTF-8; save the file as "
                         "UTF-8") from None


def split_lines(text: str) -> list[str]:
    """The lines of a text with the line ends of Unix, Windows or the old Mac, in any mixture. (str.splitlines would
    also cut at characters that a sentence may hold, such as U+2028.)"""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def read_lines(path: str | Path) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, each with its number from 1."""
    return [(number, line) for number, line in enumerate(split_lines(read_text(path)), 1) if line.strip()]


def read_label_names(path: Path | None) -> list[str] | None:
    """The JSON list of the labels' names. None without a path."""
    if path is None:
        return None
    try:
        names = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise error if "UTF-8" in str(error) else ValueError(
            f'{path}: not JSON ({error}); expected a list such as ["bad", "good"]') from None
    if isinstance(names, dict):  # {"0": "bad", "1": "good"}
        names = [names.get(str(i)) for i in range(len(names))]
    if (not isinstance(names, list) or len(names) < 2
            or not all(isinstance(n, str) and n.strip() and n.isprintable() for n in names)
            or len(set(names)) < len(names)):
        raise ValueError(f'{path}: expected a JSON list of two or more different names, such as ["bad", "good"]')
    return names


def read_examples(path: Path, n_labels: int | None, labels_file: Path | None = None) -> tuple[list[int], list[str]]:
    """Labels and sentences of a `label ||| sentence` file, in its order; blank lines are skipped.

    A sentence may hold ` ||| ` again. Raises ValueError that lists the first ten bad lines: no separator, a label
    that is not an integer or not in 0 .. n_labels - 1, an empty sentence; and for a file with no sentence.
    """
    labels, sentences, faults = [], [], []
    for number, line in read_lines(path):
        label, separator, sentence = line.partition(SEPARATOR)
        sentence = sentence.strip()
        fault = None
        if not separator:
            fault = f"no ` ||| ` in {line[:60]!r}; {FORMAT}"
        elif not re.fullmatch(r"[+-]?[0-9]{1,9}", label.strip()):
            fault = f"the label {label.strip()[:30]!r} is not an integer; {FORMAT}"
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
        more = [f"... and {counted(len(faults) - 10, 'more line')} with such a fault"] if len(faults) > 10 else []
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


def check_names(split: Split, n: int, source: Split) -> None:
    """Raises ValueError, with the line, for a label that is none of the n numbers that `number_names(source)` gave."""
    if split.labels.max() >= n:
        line, label = next((number, label) for number, text in read_lines(split.path)
                           if (label := int(text.partition(SEPARATOR)[0])) >= n)
        raise ValueError(f"{split.path}:{line}: the label {label} is out of range; without --label_names the labels "
                         f"are those of {source.path}, 0 to {n - 1}")


def number_names(split: Split) -> list[str]:
    """Names for labels that have none: "0", "1", ... up to the largest label. Raises ValueError for labels that are
    not numbered like that, and for one class alone."""
    classes, top = len(np.unique(split.labels)), int(split.labels.max())
    if classes < 2:
        raise ValueError(f"{split.path}: all labels are {top}; a classifier needs two classes or more")
    if top >= 10 * classes:
        raise ValueError(f"{split.path}: the largest label is {top}, of {classes} different ones; labels are 0, 1, 2, "
                         "..., one for each class")
    return [str(i) for i in range(top + 1)]


def limit(split: Split, n: int, seed: int) -> Split:
    """A random n of the split's rows, in their order; all of them where there are no more."""
    rows = np.random.default_rng(seed).permutation(len(split))[:n]
    return split.take(np.sort(rows))


def fold(splits: dict[str, Split], n: int, i: int, seed: int) -> dict[str, Split]:
    """Train and dev together, cut into n parts with their share of every class: part i is dev, the others are train."""
    both = replace(splits["train"], sentences=splits["train"].sentences + splits["dev"].sentences,
                   tokens=splits["train"].tokens + splits["dev"].tokens,
                   labels=np.concatenate((splits["train"].labels, splits["dev"].labels)))
    parts = folds(both.labels, n, seed)
    others = np.sort(np.concatenate([part for k, part in enumerate(parts) if k != i]))
    return {**splits, "train": both.take(others), "dev": both.take(parts[i])}


READ_OF_A_FOLDER = ("config.json", "*.safetensors", "model.safetensors.index.json", "tokenizer*.json",
                    "tokenizer.model")


def sha256(path: Path) -> str:
    """The checksum of a file of any size: the same numbers mean the same contents. Of a model's folder, that of the
    checksums of those files in it that are read."""
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted({file for pattern in READ_OF_A_FOLDER for file in path.glob(pattern) if file.is_file()}):
            digest.update(f"{file.name} {sha256(file)}\n".encode())
        return digest.hexdigest()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# --------------------------------------------------------------------------- batches


def make_batch(
    split: Split, rows: np.ndarray, pad_id: int, augment: Callable | None = None, seed: Sequence[int] = ()
) -> dict[str, torch.Tensor]:
    """One batch: tokens (B, T) int64 padded on the right, lengths (B,), labels (B,), index (B,), the rows.

    Each row that is augmented has random numbers of its own, from (seed, row), so that it does not matter how the rows
    are cut into batches.
    """
    tokens = [split.tokens[i] for i in rows]
    if augment:
        tokens = [augment(t, np.random.default_rng([*seed, i])) for t, i in zip(tokens, rows, strict=True)]
    lengths = np.fromiter((len(t) for t in tokens), dtype=np.int64, count=len(tokens))
    padded = np.full((len(tokens), lengths.max()), pad_id, dtype=np.int64)
    for row, sentence in enumerate(tokens):
        padded[row, : len(sentence)] = sentence
    return {"tokens": torch.from_numpy(padded), "lengths": torch.from_numpy(lengths),
            "labels": torch.from_numpy(split.labels[rows]), "index": torch.as_tensor(rows)}


BUCKET = 50  # batches in a window: wide enough to find neighbours in length, narrow enough to stay random


def epoch_order(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int, balance: np.ndarray | None = None
) -> list[np.ndarray]:
    """The rows of each batch of one epoch, every row once; a pure function of its arguments.

    The rows are shuffled, sorted by length inside windows of BUCKET batches, cut into batches and the batches are
    shuffled: little padding, and still another order each epoch. N rows make ceil(N / batch_size) batches whose
    sizes differ by one at most, so that a last, short batch does not weigh its sentences more than the others.

    `balance`, the labels (N,): N rows are drawn instead, with replacement, each class equally often on average.
    """
    random = np.random.default_rng([seed, epoch])
    rows = random.permutation(len(lengths))
    if balance is not None:
        rows = random.choice(len(lengths), size=len(lengths), p=class_weights(balance)[balance] / len(lengths))
    n_batches = -(-len(rows) // batch_size)
    batches = []
    for window in np.array_split(np.arange(n_batches), -(-n_batches // BUCKET)):
        # The rows of these batches: the same cuts as array_split of all rows would make.
        start, end = (-(-len(rows) * int(edge) // n_batches) for edge in (window[0], window[-1] + 1))
        part = rows[start:end]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += np.array_split(part, len(window))
    return [batches[i] for i in random.permutation(len(batches))]


def class_weights(labels: np.ndarray) -> np.ndarray:
    """N / (classes * count) of each class that occurs, 0 for the others (King and Zeng 2001; scikit-learn's
    "balanced"). Their mean over the sentences is 1."""
    counts = np.bincount(labels)
    return np.divide(len(labels), (counts > 0).sum() * counts, out=np.zeros(len(counts)), where=counts > 0)


def folds(labels: np.ndarray, n: int, seed: int) -> list[np.ndarray]:
    """The rows 0 .. N - 1 cut at random into n parts of one size, each with its share of every class.

    Raises ValueError for a class that has fewer rows than there are parts: some of them would go without it."""
    from sklearn.model_selection import StratifiedKFold

    counts = np.bincount(labels)
    rare = min(np.flatnonzero(counts), key=lambda label: counts[label])
    if counts[rare] < n:
        raise ValueError(f"--folds {n}: each needs a sentence of every class, and --train and --dev together have "
                         f"{counts[rare]} of class {rare}")
    if seed >= 2**32:  # scikit-learn takes no larger one
        seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    cut = StratifiedKFold(n, shuffle=True, random_state=seed)
    return [rows for _, rows in cut.split(np.zeros(len(labels)), labels)]


# --------------------------------------------------------------------------- augmentation


@dataclass(frozen=True)
class Augmentation:
    """Random changes to a training sentence's tokens (after Wei and Zou 2019, arXiv 1901.11196): each is deleted with
    probability `delete`; `swap` of them change places with the next; each is replaced with probability `replace` by
    one of its `neighbours` (V, k). The first `keep` tokens (the begin token) stay, and at least one of the others."""

    delete: float
    swap: float
    replace: float
    neighbours: np.ndarray | None
    keep: int

    def __call__(self, tokens: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Another version of one sentence (T,)."""
        start, rest = tokens[: self.keep], tokens[self.keep :].copy()
        if self.replace and self.neighbours is not None:
            chosen = random.random(len(rest)) < self.replace
            pick = random.integers(0, self.neighbours.shape[1], len(rest))
            rest[chosen] = self.neighbours[rest[chosen], pick[chosen]]
        for place in np.flatnonzero(random.random(max(0, len(rest) - 1)) < self.swap):
            rest[[place, place + 1]] = rest[[place + 1, place]]
        kept = random.random(len(rest)) >= self.delete
        if len(rest) and not kept.any():
            kept[random.integers(len(rest))] = True
        return np.concatenate((start, rest[kept]))


def near_neighbours(embedding: torch.Tensor, tokens: np.ndarray, k: int = 5) -> np.ndarray:
    """For each word of the vocabulary its k nearest by cosine in the embedding (V, D), itself left out, among the
    `tokens` that occur; (V, k) int32. Words that do not occur stand for themselves."""
    occurring = torch.from_numpy(np.unique(tokens)).long()
    k = min(k, len(occurring) - 1)
    result = np.tile(np.arange(len(embedding), dtype=np.int32)[:, None], (1, max(k, 1)))
    if k < 1:
        return result
    vectors = torch.nn.functional.normalize(embedding.detach().float().cpu()[occurring], dim=1)
    for start in range(0, len(occurring), 1024):
        part = vectors[start : start + 1024] @ vectors.T
        part[torch.arange(len(part)), torch.arange(start, start + len(part))] = -torch.inf
        result[occurring[start : start + 1024].numpy()] = occurring[part.topk(k).indices].numpy()
    return result


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
    vectorizer, words = TfidfVectorizer(ngram_range=(1, 2)), None
    if len(set(labels)) > 1:
        try:
            words = LogisticRegression(max_iter=200).fit(vectorizer.fit_transform(sentences), labels)
        except ValueError:  # no sentence has a word of two letters: there is nothing to learn from words
            words = None
    result = {}
    for name, split in tests.items():
        predicted = words.predict(vectorizer.transform(split.sentences)) if words else majority
        result[name] = {"majority": float((split.labels == majority).mean()),
                        "tfidf": float((split.labels == predicted).mean())}
    return result
