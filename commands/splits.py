"""The splits of a run: its files read, their labels as classes, tokenised; dev held out where nobody names a file for
it; and what a person should know of the data, said once, before anything is computed."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

import dataset
from config import InputError, RunConfig, counted
from dataset import Split
from formats import holdout, tables
from formats import labels as class_labels
from formats.columns import Usual
from formats.labels import Classes
from formats.tables import Table
from tokenizer import Tokenizer
from training import logs
from training.run_folder import SPLITS

# --------------------------------------------------------------------------- read


def columns_of(config: RunConfig, path: Path) -> tuple[str | None, str | None]:
    """The columns of texts and labels that were typed; the files of a run folder have names that are found."""
    return (None, None) if path.name in SPLITS else (config.text_column, config.label_column)


def read_tables(config: RunConfig, paths: Mapping[str, Path | None], usual: Usual = (None, None)) -> dict[str, Table]:
    """The files that there are, by the split's name. Says what was found out of each, and warns of damaged texts.
    `usual`: the columns that are taken where none was typed and a file has them."""
    found = {}
    for name, path in paths.items():
        if path is None:
            continue
        with logs.doing(f"reading {path}"):
            found[name] = table = tables.read_table(path, *columns_of(config, path), usual=usual)
        typed = [f"--{option}" for option in ("text_column", "label_column") if getattr(config, option)]
        if table.is_plain and typed and path.name not in SPLITS:
            logs.warn(f"{path} has {table.description}, and no columns: {' and '.join(typed)} has no effect there")
        if not table.is_plain or table.encoding != "utf-8":
            logs.notice(f"{path}: {table.description}")
        long = [text.count("\n") + 1 for text in table.texts if "\n" in text]
        if long and table.description.startswith("CSV"):
            logs.notice(f"{path}: {len(long)} of {counted(len(table.texts), 'text')} have several lines, up to "
                        f"{max(long)}; if that is not meant, a double quote in the file has no partner")
        if n := sum("\ufffd" in text for text in table.texts):
            logs.warn(f"{path}: {n} of {counted(len(table.texts), 'sentence')} with the replacement character U+FFFD: "
                      "they were once read in a wrong encoding, and what stood there is lost")
    return found


def tokenise(config: RunConfig, found: Mapping[str, Table], classes: Mapping[str, Classes], tokenizer: Tokenizer,
             context: int) -> dict[str, Split]:
    """The tables as splits, by name, each with its classes. Warns of sentences that are cut."""
    splits = {}
    for name, table in found.items():
        with logs.doing(f"tokenizing {table.path}"):
            splits[name] = split = dataset.split_of(table, classes[name], tokenizer, context, config.max_sentence_len)
        share = 100 * split.n_cut / len(split)
        in_words = f"{share:.0f}%" if share >= 10 else f"{share:.2g}%"
        if split.n_cut:
            logs.warn(f"{table.path}: {split.n_cut} of {counted(len(split), 'sentence')} cut to "
                      f"{counted(config.max_sentence_len or context, 'token')} ({in_words})")
        logs.say(f"load {len(split)} data from {table.path}")
    return splits


def say_without_test(splits: Mapping[str, Split]) -> None:
    if "test" not in splits:
        logs.notice("there is no test file: only dev is evaluated")


def read_like(config: RunConfig, path: Path, split: Split) -> tuple[list[int], list[str]]:
    """Labels and sentences of another file with the classes of a split."""
    table = tables.read_table(path, *columns_of(config, path))
    assert split.classes is not None
    return class_labels.named(split.classes.names, table, split.classes.source).numbers(table), table.texts


# --------------------------------------------------------------------------- checked


def classes_of(config: RunConfig, found: Mapping[str, Table], names: list[str] | None, labels_file: Path | None
               ) -> Classes:
    """The classes of a run: those with the names, else those that occur in its training file (dev's where it has none).
    """
    first = found.get("train") or found["dev"]
    if names:
        return class_labels.named(names, first, labels_file or first.path)
    classes = class_labels.learned(first)
    if config.option == "prompt":  # which learns nothing
        return replace(classes, is_learned=False, why="as in")
    return classes


def check_training(splits: Mapping[str, Split], train: Table, classes: Classes) -> None:
    """Says how many sentences each class has, and what is strange about them. Raises InputError for a held-out label
    that training does not have."""
    for name, split in splits.items():
        if name != "train":
            dataset.check_labels(split, splits["train"])
    labels = splits["train"].labels.tolist()
    logs.notice(class_labels.summary(classes, labels))
    n = len(set(labels))
    if not classes.is_learned and len(classes.names) >= 10 * n:
        logs.warn(f"{classes.source} has {len(classes.names)} names, of which {train.path} has only {n}; is it the "
                  "right file?")
    for strange in (class_labels.stray(classes, labels, train), class_labels.same_but_for_case(classes)):
        if strange:
            logs.warn(strange)


def warn_of_copies(splits: Mapping[str, Split], has_folds: bool) -> None:
    """Warns of a dev or test that is the training data, or shares sentences with it; with --folds, which cut train and
    dev anew, of copies among those."""
    train = splits["train"]
    known: set[str] = set()
    if has_folds:
        together = [holdout.folded(s) for name in ("train", "dev") if name in splits for s in splits[name].sentences]
        if n := len(together) - len(set(together)):
            logs.warn(f"{n} of {counted(len(together), 'sentence')} are copies of others; they may be on both sides of "
                      "a fold, whose accuracy is then too high")
    for name, split in splits.items():
        if split is train or has_folds and name == "dev":
            continue
        if split.sentences == train.sentences and np.array_equal(split.labels, train.labels):
            logs.warn(f"{name} is the training file, or has the same sentences: it says nothing about others")
            continue
        known = known or set(map(holdout.folded, train.sentences))
        if n := holdout.n_copies(split.sentences, known):
            logs.warn(f"{n} of {counted(len(split), f'{name} sentence')} are in the training file too")


# --------------------------------------------------------------------------- held out


def hold_out(train: Split) -> dict[str, Split]:
    """Train and dev, where a tenth of the training sentences becomes dev; see `held_out_rows`."""
    is_out = held_out_rows(train.path, train.sentences, train.labels.tolist())
    return {"train": train.take(np.flatnonzero(~is_out)), "dev": train.take(np.flatnonzero(is_out))}


def held_out_rows(path: Path, sentences: Sequence[str], labels: Sequence[int]) -> np.ndarray:
    """Which of the N sentences of a training file become dev, (N,) bool; see `holdout.held_out`. Says how many they
    are. Raises InputError for too few of them."""
    is_out = holdout.held_out(sentences, labels)
    if len(sentences) < holdout.FEWEST or not is_out.any():
        raise InputError(f"{path}: {counted(len(sentences), 'sentence')} of which none can be held out for dev; "
                         "name a file with --dev")
    logs.say(f"dev :: {int(is_out.sum())} of {len(sentences)} sentences of {path} held out (the same ones each time, "
             "by a hash of the text); --dev FILE names others")
    return is_out
