"""Predictions and scores out, each accuracy beside its baselines."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from commands import scores
from commands import splits as run_splits
from commands.classification import is_ordinal
from config import InputError, RunConfig
from dataset import Split
from formats import files
from training import logs, metrics, mistakes
from training.metrics import Baseline
from training.run_folder import FOLDERS, LOCK, LOGS, PICTURES, RESULT, RUN_FILE, SPLITS, TABLES, RunFolder

LINE_ENDS = re.compile(r"[\r\n]+")

# --------------------------------------------------------------------------- before the work


def check_outputs(config: RunConfig) -> None:
    """Raises an error for an output file that cannot be written, is named twice, or is one of a run's own files: before
    the work, not after it."""
    names = ["dev_out", "test_out"]
    if config.option == "generate" and not config.resume:  # a resumed run is checked with its own options
        names = ["generated_sentence_low_temp_out", "generated_sentence_high_temp_out"]
    taken = {Path(getattr(config, n)).resolve(): n for n in ("train", "dev", "test", "label_names", "input")
             if getattr(config, n) and getattr(config, n) != "-"}
    read = dict(taken)
    for option in ("pretrained_model_path", "tokenizer"):
        if typed := getattr(config, option):
            read[Path(typed).resolve()] = option
    for path, name in read.items():  # --overwrite would remove it before it is read
        folder = Path(config.output_dir or "").resolve()
        is_start = name == "pretrained_model_path" and folder in (path, *path.parents) and RunFolder(folder).has_run()
        if config.overwrite and config.output_dir and (is_start or own_file(path, [folder])):
            raise InputError(f"--{name} {path}: --overwrite would remove it with the run in {config.output_dir}; copy "
                             "it first, or choose another --output_dir")
    for name in names:
        if not getattr(config, name):
            continue
        path = Path(getattr(config, name)).resolve()
        if path in taken:
            raise InputError(f"--{name} {path}: that is --{taken[path]} too; name another file")
        if own := own_file(path, [
                Path(folder) for folder in (config.output_dir, *(config.run or ()), config.resume) if folder]):
            raise InputError(f"--{name} {path}: {own}; name another file")
        taken[path] = name
        files.check_writable(path, f"--{name}")


def own_file(path: Path, folders: list[Path]) -> str:
    """What a run has under this resolved path, which predictions must not replace; "" where it is nothing. `folders`:
    of runs, there already or about to be made; every other folder above the path that holds a run counts too."""
    above = [folder for folder in path.parents if RunFolder(folder).has_run()]
    for folder in {*(folder.resolve() for folder in folders), *above}:
        if path == folder or path in folder.parents:
            return "that is a folder, which the run is in"
        if folder in path.parents:
            first = path.relative_to(folder).parts[0]
            if first in (RUN_FILE, *LOGS, *TABLES, RESULT, LOCK, *SPLITS, *PICTURES, *FOLDERS):
                return f"{folder / first} belongs to the run itself"
    return ""


# --------------------------------------------------------------------------- the baselines


def print_baselines(config: RunConfig, train: Split | Path | None, splits: Mapping[str, Split],
                    known: Mapping[str, Baseline] | None = None) -> dict[str, Baseline]:
    """The baselines on the test split (on dev where there is no test), as one line; all of them returned.

    `train`: the training split, or the path of its file, or None where the run has none. `known`: those that are not
    computed again.
    """
    found = {name: known[name] for name in splits if known and name in known}
    missing = {name: split for name, split in splits.items() if name != "train" and name not in found}
    if missing and train is not None:
        found |= find_baselines(config, train, missing)
    if not found:
        return {}
    name = "test" if "test" in found else "dev"
    logs.say(f"baseline :: {scores.baselines_text(found[name])}")
    return found


def find_baselines(config: RunConfig, train: Split | Path, splits: Mapping[str, Split]) -> dict[str, Baseline]:
    """The baselines of each split, learned from a training split or its file."""
    labels, sentences = run_splits.read_like(config, train, next(iter(splits.values()))) if isinstance(
        train, Path) else (train.labels, train.sentences)
    return metrics.baselines(labels, sentences, splits)


# --------------------------------------------------------------------------- predictions and scores


def report_splits(
    config: RunConfig, splits: Mapping[str, Split], outputs: Mapping[str, Tensor], default_out: Mapping[str, Path],
    names: list[str], baselines: Mapping[str, Baseline], with_tables: bool = False,
) -> dict[str, Any]:
    """Print dev and test accuracy, each beside its own baselines, write the predictions, and return the scores with
    their confusion matrices. `outputs`: log-probabilities (N, C) of each split; `names`: of the labels; `with_tables`:
    print macro-F1, the scores of each class and what is confused, too."""
    result = {}
    for name, log_probs in outputs.items():
        split, predicted = splits[name], log_probs.argmax(1).numpy()
        typed = getattr(config, f"{name}_out")
        path = Path(typed or default_out[name])
        write_predictions(path, predicted.tolist(), split, bool(typed))
        found = metrics.score(log_probs, split.labels, is_ordinal(config))
        confusion = metrics.confusion(split.labels.tolist(), predicted.tolist(), len(names))
        result[name] = {**found, "n": len(split), **confusion}
        logs.say(f"{name} acc :: {found['acc']:.3f}")
        if name in baselines:
            logs.say(f"{name} baselines :: {scores.baselines_text(baselines[name])}")
            by_words = baselines[name].predicted
            if by_words is not None:
                paired = metrics.mcnemar(predicted == split.labels, by_words == split.labels)
                result[name]["vs_tfidf"] = asdict(paired)
                logs.say(f"{name} vs tf-idf :: {scores.comparison(paired, len(split))}")
        if is_ordinal(config):
            logs.say("{} mae :: {mae:.3f}, qwk :: {qwk:.3f}, off by one :: {off_by_one:.3f}".format(name, **found))
        if with_tables:
            logs.say(f"{name} macro-F1 :: {found['f1']:.3f}")
            print_tables(name, split.labels, predicted, names, confusion)
        logs.say(f"{name} predictions :: {path}")
    return result


def print_tables(name: str, labels: np.ndarray, predicted: np.ndarray, names: list[str],
                 confusion: Mapping[str, list]) -> None:
    """The scores of each class of a split, and the confusion matrix, or of many classes the pairs that are confused
    most. `labels` and `predicted`: (N,)."""
    by_class = metrics.per_class(labels, predicted, len(names))
    sections = {"classes": ("", scores.class_table(by_class, names))}
    if len(names) <= scores.MATRIX_CLASSES:
        sections["confusion"] = ("a row for each true class, a column for each prediction",
                                 scores.matrix(confusion["confusion_matrix"], names))
    elif pairs := metrics.most_confused(labels, predicted, scores.PAIRS):
        sections["confused most"] = ("", scores.confused_pairs(pairs, by_class.n, names))
    for title, (text, lines) in sections.items():
        logs.say("\n  ".join([f"{name} {title} :: {text}".rstrip(), *lines]))


def confident_mistakes(log_probs: Tensor, split: Split, names: list[str], most: int = 20) -> list[str]:
    """A line for each of the most confident mistakes on a split, the most confident first: the probability, what was
    predicted, what it is, the sentence. `log_probs`: (N, C)."""
    confidence, predicted = (found.numpy() for found in log_probs.max(1))
    return [f"{math.exp(confidence[i]):.3f} {names[predicted[i]]}, is {names[split.labels[i]]}: "
            f"{LINE_ENDS.sub(' ', split.sentences[i])}"
            for i in mistakes.surest_mistakes(log_probs.numpy(), split.labels, most)]


def write_predictions(path: Path, predicted: list[int], split: Split, is_typed: bool) -> None:
    """`label ||| sentence` a line, in the file's order, with the label as the file writes it; line ends inside of a
    sentence become spaces. Only where the path was typed a link is followed."""
    lines = "".join(f"{split.written[label]} ||| {LINE_ENDS.sub(' ', sentence)}\n"
                    for label, sentence in zip(predicted, split.sentences, strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, lines, is_typed)
