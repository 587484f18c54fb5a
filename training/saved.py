"""A run's best/: a classifier that can predict on another machine, written and loaded again."""

import difflib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

import lora
import tokenizer as tokenizers
from classifier import ClassifierConfig, LlamaEmbeddingClassifier, empty_classifier
from config import Base, InputError
from formats import adapters, files, weights
from llama import load_pretrained
from tokenizer import Tokenizer
from training import best as best_folder
from training import logs
from training.run_folder import RunFolder


def save_classifier(folder: Path, model: nn.Module, tokenizer: Tokenizer, settings: ClassifierConfig,
                    dtype: torch.dtype = torch.float32) -> str:
    """Write model.safetensors with the weights in `dtype` (of a model with adapters, those and the head alone),
    config.json, the tokenizer, and a manifest with the sha256 of each; returns the manifest's own. See
    `training.best.write_best`. Raises OSError, naming the path and the bytes, when the disk is full."""
    state = {k: v.detach().to(dtype).contiguous() for k, v in lora.without_base(model.state_dict()).items()}

    def fill(temporary: Path) -> None:
        safetensors.torch.save_file(state, str(temporary / "model.safetensors"))
        (temporary / "model.safetensors").chmod(0o644)  # the library makes it 0600
        tokenizer.save(temporary)
        text = json.dumps(settings.values(), indent=1) + "\n"
        (temporary / "config.json").write_text(text, encoding="utf-8")

    return best_folder.write_best(folder, fill)


def load_classifier_state(folder: Path, model: nn.Module) -> None:
    """Read the weights of `save_classifier` into a model of the same shape, in place, as float32; the base of one with
    adapters stays as it is. Raises InputError for others."""
    handle = weights.open_safetensors(folder / "model.safetensors")
    own = lora.without_base(model.state_dict())
    held = set(handle.keys())
    wrong = [k for k in own if k not in held or tuple(handle.get_slice(k).get_shape()) != tuple(own[k].shape)]
    if wrong or held - own.keys():
        raise InputError(f"{folder}: model.safetensors and config.json do not belong together ({wrong[:3]})")
    state = {name: handle.get_tensor(name).float() for name in own}
    model.load_state_dict(state, assign=any(tensor.is_meta for tensor in own.values()),
                          strict=len(own) == len(model.state_dict()))


@dataclass(frozen=True)
class SavedRun:
    """A run's classifier, in evaluation mode. `typed`: the path that was given; `home`: the run's folder; they differ
    where its best/ was typed. `best`: where the classifier lies."""

    typed: Path
    home: RunFolder
    best: Path
    model: LlamaEmbeddingClassifier
    tokenizer: Tokenizer
    settings: ClassifierConfig


def load_run(run: str | Path, base: str | Path | None = None) -> SavedRun:
    """The classifier of a finished run's folder, or of its best/, checked. `base`: where the base of a run with
    adapters lies now, if that is not where it lay. Raises InputError or FileNotFoundError with what to do."""
    settings, best = read_settings(run)
    return load_checked(Path(run), settings, best, base)


def load_checked(folder: Path, settings: ClassifierConfig, best: Path, base: str | Path | None = None) -> SavedRun:
    """The classifier of a run whose `read_settings` these are."""
    if settings.base:  # where it lies now
        found = adapters.find_base(settings.base, best, base)
        settings = replace(settings, base=Base(str(found), settings.base.sha256))
    model = on_its_base(settings, best) if settings.lora else empty_classifier(settings, best / "config.json")
    load_classifier_state(best, model)
    tokenizer = Tokenizer(tokenizer_model=best)
    tokenizers.check_vocabulary(tokenizer, model.llama.config)
    return SavedRun(folder, home_of(folder), best, model.eval(), tokenizer, settings)


def on_its_base(settings: ClassifierConfig, best: Path) -> LlamaEmbeddingClassifier:
    """A classifier with the weights of its base, and adapters and a head that have no numbers yet (on the device
    "meta"). Raises InputError for a base that is not what the settings describe."""
    assert settings.lora and settings.base
    shape = settings.llama
    llama = load_pretrained(settings.base.path, shape.n_layers, shape.dropout, shape.attention, has_output=False)
    if llama.config != shape:
        raise InputError(f"{best / 'config.json'}: the Llama that it describes is not that of {settings.base.path}")
    with torch.device("meta"):
        model = LlamaEmbeddingClassifier(settings, llama)
        lora.add(llama, settings.lora)
    return model


def read_settings(run: str | Path, option: str = "--run") -> tuple[ClassifierConfig, Path]:
    """What a finished run's classifier is, and the folder that it lies in, checked, without its weights. `option`:
    which named the run. Raises InputError or FileNotFoundError with what to do."""
    best = checked_best(Path(run), option)
    described = best / "config.json"
    return ClassifierConfig.read(files.read_json(described), described), best


def is_run(path: Path) -> bool:
    """Is this the folder of a run, or a run's best/? The folder of a Hugging Face model may have an args.json too."""
    is_named = RunFolder(path).has_run() and not (path / "config.json").is_file()
    return path.is_dir() and (is_named or best_of(path) != path or weights.is_run(path))


def checked_best(folder: Path, option: str) -> Path:
    """Where the classifier of a run is, once its files are what its manifest says. `option`: which named the run.
    Raises InputError or FileNotFoundError with what to do."""
    RunFolder(folder).check()
    best = best_of(folder)
    if not (best / "config.json").is_file():
        raise FileNotFoundError(_where_else(folder, option))
    files.check_tree(best)
    digest, has_manifest = home_of(folder).known_manifest()
    if not best_folder.check_best(best, digest):
        if has_manifest:
            raise InputError(f"{best}: manifest.json, with the checksums, is gone; copy the folder from where it is "
                             "whole, or train again")
        logs.warn(f"{best}: {best_folder.NO_CHECKSUMS}")
    return best


def _where_else(folder: Path, option: str) -> str:
    """The message for a folder without a classifier: which runs are inside it, or have a name like it?"""
    inside = sorted(folder.glob("*/best/config.json"), key=lambda path: (len(path.parts[-3]), path))
    if inside:
        names = [str(path.parent.parent) for path in inside]
        more = f", ... ({len(names)} in all)" if len(names) > 5 else ""
        return f"{folder}: several runs are in this folder; name one of them: {option} {', '.join(names[:5])}{more}"
    return (f"{folder}: there is no saved classifier here (no best/config.json)"
            + (near_run(folder) or "; name the folder of a run that has finished an epoch"))


def home_of(folder: Path) -> RunFolder:
    """The folder of the run; what was typed may be its best/."""
    home = RunFolder(folder)
    return home if home.has_run() or not RunFolder(folder.parent).has_run() else RunFolder(folder.parent)


def best_of(folder: Path) -> Path:
    """Where the classifier of a run is; the folder itself may be a run's best/."""
    best = RunFolder(folder).best
    places = (best, best_folder.previous_best(best))  # the second one where a run was killed just as it changed them
    return next((place for place in places if place.is_dir()), folder)


def near_run(typed: Path) -> str:
    """The end of a message about a folder that is not there: the run whose name is nearest to the one that was typed,
    with numbers compared as numbers (1e-4 is 0.0001)."""
    def plain(name: str) -> str:
        return re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", lambda number: str(float(number[0])), name.lower())

    if typed.exists():
        return ""
    places = [place for place in (typed.parent, Path("runs")) if place.is_dir()]
    runs = {plain(run.name): run for place in places for run in sorted(place.iterdir())
            if RunFolder(run).has_run() or RunFolder(run).best.is_dir()}
    near = difflib.get_close_matches(plain(typed.name), runs, n=1, cutoff=0.8)
    return f"; did you mean {runs[near[0]]}?" if near else ""
