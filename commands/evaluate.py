"""--option evaluate: a saved run on its own dev and test files, or on those that are given."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from commands import inputs, results
from commands.finished import load_run
from commands.inputs import DataFiles
from config import InputError, RunConfig
from formats import files, tables
from training import device as devices
from training import logs, metrics, state
from training.saved import SavedRun
from training.streams import without_readers


@without_readers()
def run(config: RunConfig) -> int:
    results.check_outputs(config)
    saved = load_run(config)
    names = saved.settings.label_names
    config = replace(config, max_sentence_len=saved.settings.max_sentence_len, loss=saved.settings.loss)
    is_own = not config.given & {"dataset", "train", "dev", "test"}
    known: dict[str, Any] = {}
    if is_own:
        used, known = own_files(saved)
    else:
        used = inputs.find_files(config)
        own_names = tables.read_label_names(used.label_names)
        if own_names and own_names != names:
            logs.warn(f"{used.label_names} names the labels {own_names}, the run {names}")
    splits = inputs.load_splits(config, used, len(names), saved.best / "config.json", saved.tokenizer,
                                saved.model.llama.config.max_seq_len)
    if not splits:
        raise InputError("there is neither a --dev nor a --test file to evaluate")
    baselines = results.print_baselines(used.train if used.train and used.train.is_file() else None, splits, known)
    device = devices.choose_device(config)
    devices.accelerate(config, saved.model.to(device.where), device)
    outputs = {name: metrics.predict(saved.model, split, saved.tokenizer.pad_id, device, name)
               for name, split in splits.items()}
    for name in outputs:
        metrics.check_finite(outputs[name], f"{saved.typed}: {name}")
    default_out = {name: saved.home.predictions(name if is_own else f"{used.name}-{name}") for name in outputs}
    results.report_splits(config, splits, outputs, default_out, names, baselines)
    return 0


def own_files(saved: SavedRun) -> tuple[DataFiles, dict[str, Any]]:
    """The files that the run itself used, and the baselines that it found on the same sentences."""
    described = state.read_description(saved.home)
    used = described["files"]
    paths = {name: Path(used[name]["path"]) if name in used else None for name in ("train", "dev", "test",
                                                                                  "label_names")}
    known = dict(saved.home.read_result().get("baselines", {})) if saved.home.is_finished() else {}
    if described["options"].get("folds"):
        known.pop("dev", None)  # that was the fold's
        logs.warn(f"{saved.typed}: the run is one of several --folds: it was trained on a part of the dev file")
    for name in ("dev", "test"):
        path = paths[name]
        if path is None:
            continue
        if not path.is_file():
            raise FileNotFoundError(f"{path}: the run's {name} file is not there any more; where it has moved to, say "
                                    "--dev FILE, or --test FILE")
        if files.sha256(path) != used[name].get("sha256"):
            known.pop(name, None)
            logs.warn(f"{path}: the file has changed since the run" if "sha256" in used[name] else
                      f"{path}: the run has no checksum of it: it may have changed since")
    return DataFiles(saved.home.path.name, paths["train"], paths["dev"], paths["test"], paths["label_names"]), known
