"""Predictions and scores out, each accuracy beside its baselines."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from commands.classification import is_ordinal
from config import InputError, RunConfig
from dataset import Split
from formats import files, tables
from training import logs, metrics
from training.run_folder import FOLDERS, LOCK, LOGS, RESULT, RUN_FILE, RunFolder

# --------------------------------------------------------------------------- before the work


def check_outputs(config: RunConfig) -> None:
    """Raises an error for an output file that cannot be written, is named twice, or is one of a run's own files: before
    the work, not after it."""
    names = ["dev_out", "test_out"]
    if config.option == "generate" and not config.resume:  # a resumed run is checked with its own options
        names = ["generated_sentence_low_temp_out", "generated_sentence_high_temp_out"]
    taken = {Path(getattr(config, n)).resolve(): n for n in ("train", "dev", "test", "label_names", "input")
             if getattr(config, n) and getattr(config, n) != "-"}
    for name in names:
        if not getattr(config, name):
            continue
        path = Path(getattr(config, name)).resolve()
        if path in taken:
            raise InputError(f"--{name} {path}: that is --{taken[path]} too; name another file")
        if own := own_file(path, [Path(folder) for folder in (config.output_dir, config.run, config.resume) if folder]):
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
            if first in (RUN_FILE, *LOGS, RESULT, LOCK, *FOLDERS):
                return f"{folder / first} belongs to the run itself"
    return ""


# --------------------------------------------------------------------------- the baselines


def print_baselines(train: Split | Path | None, splits: Mapping[str, Split],
                    known: Mapping[str, dict] | None = None) -> dict[str, dict[str, float]]:
    """The baselines on the test split (on dev where there is no test), as one line; all of them returned.

    `train`: the training split, or the path of its file, or None where the run has none. `known`: those that the run
    itself found; they are not computed again.
    """
    found = {name: known[name] for name in splits if known and name in known}
    missing = {name: split for name, split in splits.items() if name != "train" and name not in found}
    if missing and train is not None:
        labels, sentences = tables.read_examples(train, None) if isinstance(train, Path) else (
            train.labels, train.sentences)
        found |= metrics.baselines(labels, sentences, missing)
    if not found:
        return {}
    name = "test" if "test" in found else "dev"
    logs.say(f"baseline :: {baselines_text(found[name])}")
    return found


def baselines_text(found: dict[str, float]) -> str:
    """The baselines of one split, as they are printed."""
    return f"majority {found['majority']:.3f}, tf-idf + logistic regression {found['tfidf']:.3f}"


# --------------------------------------------------------------------------- predictions and scores


def report_splits(
    config: RunConfig, splits: Mapping[str, Split], outputs: Mapping[str, Tensor], default_out: Mapping[str, Path],
    names: list[str], baselines: Mapping[str, dict[str, float]],
) -> dict[str, Any]:
    """Print dev and test accuracy, each beside its own baselines, write the predictions, and return the scores with
    their confusion matrices. `outputs`: log-probabilities (N, C) of each split; `names`: of the labels."""
    result = {}
    for name, log_probs in outputs.items():
        split, predicted = splits[name], log_probs.argmax(1).tolist()
        typed = getattr(config, f"{name}_out")
        write_predictions(Path(typed or default_out[name]), predicted, split, bool(typed))
        scores = metrics.score(log_probs, split.labels, is_ordinal(config))
        result[name] = {**scores, "n": len(split),
                        **metrics.confusion(split.labels.tolist(), predicted, len(names))}
        logs.say(f"{name} acc :: {scores['acc']:.3f}")
        if name in baselines:
            logs.say(f"{name} baselines :: {baselines_text(baselines[name])}")
        if is_ordinal(config):
            logs.say("{} mae :: {mae:.3f}, qwk :: {qwk:.3f}, off by one :: {off_by_one:.3f}".format(name, **scores))
    return result


def write_predictions(path: Path, predicted: list[int], split: Split, is_typed: bool) -> None:
    """`label ||| sentence` a line, in the file's order. Only where the path was typed a link is followed."""
    lines = "".join(f"{label} ||| {sentence}\n" for label, sentence in zip(predicted, split.sentences, strict=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, lines, is_typed)
