"""--option evaluate: a saved run, or several as one, on their own dev and test files or on those that are given."""

from dataclasses import replace
from pathlib import Path

from commands import ensemble, inputs, results
from commands import splits as run_splits
from commands.finished import columns_of, warn_of_fixed
from commands.inputs import DataFiles
from config import InputError, RunConfig
from dataset import Split
from formats import files, labels, tables
from training import device as devices
from training import logs, metrics, state
from training.metrics import Baseline
from training.run_folder import RUN_FILE
from training.saved import SavedRun
from training.streams import without_readers


@without_readers()
def run(config: RunConfig) -> int:
    config = ensemble.expanded(config)
    results.check_outputs(config)
    runs = ensemble.members(config)
    is_own = not config.given & {"dataset", "train", "dev", "test"}
    if len(runs) > 1 and is_own:
        ensemble.check_own_files(runs)
    saved = runs[0].load()
    warn_of_fixed(config, any(member.settings.lora for member in runs))
    names = saved.settings.label_names
    config = replace(config, max_sentence_len=saved.settings.max_sentence_len, loss=saved.settings.loss)
    known: dict[str, Baseline] = {}
    text_column, label_column = columns = columns_of(saved.home)
    of_run = replace(config, text_column=text_column, label_column=label_column)
    if is_own:
        config = of_run
        used, known = own_files(saved)
    else:
        used = inputs.find_files(config)
        own_names = tables.read_label_names(used.label_names)
        if own_names and own_names != names:
            logs.warn(f"{used.label_names} names the labels {own_names}, the run {names}")
    found = run_splits.read_tables(config, {"dev": used.dev, "test": used.test}, columns)
    classes = {name: labels.named(names, table, saved.best / "config.json") for name, table in found.items()}
    if not is_own and own_names and own_names != names and sorted(own_names) == sorted(names):
        if numbered := [name for name in classes if classes[name].are_numbers]:
            raise InputError(f"{found[numbered[0]].path} has numbers for labels, in the order of {used.label_names} "
                             f"({own_names}); the run has them in another order ({names}): write the names instead")
    splits = run_splits.tokenise(config, found, classes, saved.tokenizer, saved.model.llama.config.max_seq_len)
    run_splits.say_without_test(splits)
    if not splits:
        raise InputError("there is neither a --dev nor a --test file to evaluate")
    train = used.train if used.train and used.train.is_file() else None
    if known:
        known = with_predictions(config, saved, splits, known)
    elif not is_own and train is None:
        train, why = training_file(saved)
        logs.notice(why and f"without baselines: {why}")
        config = of_run  # whatever the columns of the other files are called
    baselines = results.print_baselines(config, train, splits, known)
    device = devices.choose_device(config)
    devices.accelerate(config, saved.model.to(device.where), device)
    outputs = {name: metrics.predict(saved.model, split, saved.tokenizer.pad_id, device, name)
               for name, split in splits.items()}
    for name in outputs:
        metrics.check_finite(outputs[name], f"{saved.typed}: {name}")
    default_out = {name: saved.home.predictions(name if is_own else f"{used.name}-{name}") for name in outputs}
    if len(runs) == 1:
        results.report_splits(config, splits, outputs, default_out, names, baselines, with_tables=True)
        return 0
    del saved  # its memory is the next run's
    singles = [outputs] + [ensemble.outputs_of(member, config, splits, device) for member in runs[1:]]
    together = {name: ensemble.averaged([one[name] for one in singles]) for name in splits}
    default_out = {name: Path(f"ensemble-{name}-predictions.txt") for name in splits}  # in none of the runs' folders
    ensemble.warn_of_training(runs, splits)
    ensemble.say_singles(runs, singles, splits)
    config = replace(config, loss="ordinal" if ensemble.is_ordinal(runs) else "ce")  # whichever run comes first
    results.report_splits(config, splits, together, default_out, names, baselines, with_tables=True)
    ensemble.say_gains(runs, singles, together, splits)
    return 0


def own_files(saved: SavedRun) -> tuple[DataFiles, dict[str, Baseline]]:
    """The files that the run itself used, and the baselines that it found on the same sentences."""
    described = state.read_description(saved.home)
    used = described["files"]
    paths = {name: Path(used[name]["path"]) if name in used else None for name in ("train", "dev", "test",
                                                                                  "label_names")}
    found = saved.home.read_result().get("baselines", {}) if saved.home.is_finished() else {}
    known = {name: Baseline(one["majority"], one["tfidf"]) for name, one in found.items()}
    if described["options"].get("folds"):
        known.pop("dev", None)  # that was the fold's
        logs.warn(f"{saved.typed}: the run is one of several --folds: it was trained on a part of the dev file")
    digests = {name: used[name].get("sha256") for name in paths if name in used} | described.get("splits", {})
    for name in described.get("splits", {}):  # dev was held out of the training file
        paths[name] = saved.home.split(name)
    for name in ("dev", "test"):
        path = paths[name]
        if path is None:
            continue
        if not path.is_file():
            raise FileNotFoundError(f"{path}: the run's {name} file is not there any more; where it has moved to, say "
                                    "--dev FILE, or --test FILE")
        if files.sha256(path) != digests[name]:
            known.pop(name, None)
            logs.warn(f"{path}: the file has changed since the run" if digests[name] else
                      f"{path}: the run has no checksum of it: it may have changed since")
    return DataFiles(saved.home.path.name, paths["train"], paths["dev"], paths["test"], paths["label_names"]), known


def training_file(saved: SavedRun) -> tuple[Path | None, str]:
    """The file of the sentences that the run was trained on, or None and why there is none."""
    if not saved.home.has_run():
        return None, f"what {saved.typed} was trained on is not known (no {RUN_FILE})"
    described = state.read_description(saved.home)
    options, train = described["options"], described["files"].get("train", {})
    if options.get("folds") or options.get("train_limit"):
        return None, f"the run was trained on a part of {train.get('path')}"
    if "train" in described.get("splits", {}):  # dev was held out of the file
        own = saved.home.split("train")
        is_same = own.is_file() and files.sha256(own) == described["splits"]["train"]
        return (own, "") if is_same else (None, f"{own} has changed or is gone")
    path = Path(train.get("path", ""))
    if not path.is_file():
        return None, f"the run's training file {path} is not there any more"
    if files.sha256(path) != train.get("sha256"):
        return None, f"the run's training file {path} has changed"
    return path, ""


def with_predictions(config: RunConfig, saved: SavedRun, splits: dict[str, Split],
                     known: dict[str, Baseline]) -> dict[str, Baseline]:
    """The known baselines with what TF-IDF predicts, learned again where that gives the same; else it is said why not.
    """
    train, why = training_file(saved)
    if train is not None:
        again = results.find_baselines(config, train, {name: splits[name] for name in known if name in splits})
        if all(again[name].values() == known[name].values() for name in again):
            return {**known, **again}
        why = f"learned again from {train}, tf-idf has another accuracy than in the run"
    logs.notice(f"not compared with tf-idf sentence by sentence: {why}")
    return known
