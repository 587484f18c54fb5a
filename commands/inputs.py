"""What a run reads: which files these are, and their contents, all checked before anything is computed."""

import math
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import dataset
import fused
import lora
import tokenizer as tokenizers
from classifier import ClassifierConfig
from commands import splits as run_splits
from config import InputError, RunConfig
from data import hub, prepare
from dataset import Split
from formats import adapters, files, peft, tables, weights
from formats.adapters import Adapter
from formats.weights import Weights
from tokenizer import TOKENIZER_MODEL, Tokenizer
from training import frozen, logs, saved
from training.device import wants_fused

ROOT = Path(__file__).resolve().parent.parent

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


@dataclass(frozen=True)
class ModelFiles:
    """The weights and the tokenizer of a run, and a line on what was chosen where nothing was asked for."""

    weights: Path
    tokenizer: Path
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
    paths: dict[str, Path | None] = dict(prepare.dataset_paths(name))
    if name == "movies" and not all(path.is_file() for path in prepare.dataset_paths(name).values()):
        _fetch("movies")
    for key, value in typed.items():
        path = paths[key] = Path(value) if value else paths[key]
        if path and not path.is_file():
            if key in ("test", "label_names") and not value:
                paths[key] = None  # a data set may come without them
                continue
            known = f"`python data/prepare.py {name}` fetches it" if name in prepare.DATASETS else (
                f"data sets that can be fetched: {', '.join(prepare.DATASETS)}")
            raise FileNotFoundError(f"{path}: there is no such file; {known}")
    return DataFiles(name, **paths, notice=notice)


def _typed_files(typed: dict[str, str | None], splits: list[str]) -> DataFiles:
    """Only what was typed is used, so that no split of another data set slips in beside it."""
    given = {name: Path(path) if path else None for name, path in typed.items()}
    for split in splits:
        path = Path(typed[split] or "")
        if not path.is_file():
            guess = path.name.partition("-")[0]
            fetch = f"`python data/prepare.py {guess}` fetches it" if guess in prepare.DATASETS else "check --" + split
            raise FileNotFoundError(f"{typed[split]}: there is no such file; {fetch}")
    first = Path(typed[splits[0]] or "")
    name = Path(first.name.removesuffix(".gz")).stem.removesuffix("-" + splits[0])
    labels = given["label_names"]
    if labels and not labels.is_file():
        raise FileNotFoundError(f"{typed['label_names']}: there is no such file; check --label_names")
    beside = first.with_name(f"{name}-label-mapping.json")
    if not labels and beside.is_file():
        labels = beside
    return DataFiles(name, given["train"], given["dev"], given["test"], labels)


@contextmanager
def input_errors() -> Iterator[None]:
    """Inside, a ValueError of the lowest floors, which do not know InputError, becomes one: a person caused it."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from None


def _fetch(name: str) -> None:
    """Fetch a data set or weights. Raises InputError for a download that is not what it should be."""
    with input_errors():
        prepare.fetch(name)


def find_model(config: RunConfig, may_fetch: bool = True) -> ModelFiles:
    """The pretrained weights of a run: what was typed; stories42M.pt where it lies (here, beside the code, in
    models/) with its tokenizer; else smollm2-135m, which is fetched where it may be. Raises FileNotFoundError."""
    models = prepare.weights_path("smollm2-135m").parent
    typed, notice = config.pretrained_model_path, ""
    if config.adapter and not typed:
        typed = base_of_adapter(Path(config.adapter))
        if not typed or not Path(typed).exists():
            where = f"its base is {typed}, and nothing lies there" if typed else "it does not name its base"
            is_name = typed and re.fullmatch(r"[\w.-]+/[\w.-]+", typed)
            raise FileNotFoundError(f"--adapter {config.adapter}: {where}; say where it is: --pretrained_model_path "
                                    f"PATH{f', or from the hub {hub.PREFIX}{typed}' if is_name else ''}")
    if typed:
        found = find_weights(typed)
    else:
        places = [place / "stories42M.pt" for place in (Path(), ROOT, models)]
        stories = next((p for p in places if p.is_file() and _tokenizer_beside(p, config)), None)
        found = stories or prepare.weights_path("smollm2-135m")
        if stories is None:
            missing = "stories42M's tokenizer.model" if any(p.is_file() for p in places) else "stories42M.pt"
            notice = (f"{missing} is not here: using smollm2-135m instead; "
                      "`python data/prepare.py stories42M` fetches the weights and their tokenizer (or imports them: "
                      "--from DIR)")
            if not found.is_file():
                if not may_fetch:
                    raise FileNotFoundError(f"{found}: it is not here; `python data/prepare.py smollm2-135m` fetches "
                                            "it, --tokenizer names another")
                _fetch("smollm2-135m")
    tokenizer = _tokenizer_beside(found, config)
    if tokenizer is None:
        raise FileNotFoundError(f"{found}: there is no tokenizer beside it; `python data/prepare.py stories42M` "
                                "fetches the one of the stories models, --tokenizer names another")
    return ModelFiles(found, tokenizer, notice)


def find_weights(typed: str) -> Path:
    """The weights that were typed: a path, from here, from beside the code or in models/, or a name that
    data/prepare.py knows; of a run, its best/. Raises FileNotFoundError with the nearest name."""
    found = _typed_weights(typed, [Path(), ROOT, prepare.weights_path("smollm2-135m").parent])
    return saved.checked_best(found, "--pretrained_model_path") if saved.is_run(found) else found


def _typed_weights(typed: str, places: list[Path]) -> Path:
    if typed.startswith(hub.PREFIX):
        with input_errors():
            return hub.fetch(typed)
    if typed in prepare.WEIGHTS and not Path(typed).exists():
        path = prepare.weights_path(typed)
        if not path.exists():
            _fetch(typed)
        return path
    for place in places:
        if (place / typed).exists():
            return place / typed
    name = Path(typed).stem
    known = {n.lower(): n for n in prepare.WEIGHTS}.get(name.lower())
    hint = f"`python data/prepare.py {known}` fetches it" if known else (
        f"weights that can be fetched: {', '.join(prepare.WEIGHTS)}{saved.near_run(Path(typed))}")
    raise FileNotFoundError(f"{typed}: there is no such file or folder; {hint}")


def _tokenizer_beside(found: Path, config: RunConfig) -> Path | None:
    if config.tokenizer:
        return Path(config.tokenizer)
    if found.suffix == ".gguf":
        return found
    folder = found if found.is_dir() else found.parent
    models = prepare.weights_path("smollm2-135m").parent
    places = [folder / "tokenizer.json", folder / TOKENIZER_MODEL]
    if not found.is_dir():
        places += [Path(TOKENIZER_MODEL), ROOT / TOKENIZER_MODEL, models / TOKENIZER_MODEL]
    return next((p for p in places if p.is_file()), None)


# --------------------------------------------------------------------------- their contents


@dataclass(frozen=True)
class Inputs:
    """What a run reads. `splits`: by the names train, dev and test, those that there are; `names`: of the labels;
    `held_out`: train and dev, whole, where dev was held out of the training file."""

    files: DataFiles
    splits: dict[str, Split]
    names: list[str]
    tokenizer: Tokenizer
    weights: Weights
    held_out: dict[str, Split] = field(default_factory=dict)
    adapter: Adapter | None = None

    def steps_per_epoch(self, config: RunConfig) -> int:
        """Optimizer steps in one pass over the training sentences; a last, short one counts."""
        return -(-len(self.splits["train"]) // (config.batch_size * config.grad_accum))

    @cached_property
    def _checksums(self) -> dict[str, dict[str, str]]:
        used = {n: getattr(self.files, n) for n in ("train", "dev", "test", "label_names")}
        used |= {"weights": self.weights.path, "tokenizer": self.tokenizer.path}
        used["adapter"] = self.adapter and self.adapter.path
        # A file of the hub's cache is a link to one whose name does not tell what it is: its own name stays.
        found = {name: path.parent.resolve() / path.name for name, path in used.items() if path}
        known = {name: {"path": str(path), "sha256": files.sha256(path)} for name, path in found.items()}
        if fetched := hub.origin(self.weights.path):
            known["weights"]["hub"] = fetched
        return known

    def checksums(self) -> dict[str, dict[str, str]]:
        """For the run's args.json: each file that is read, with its whole path and its sha256; of weights from the hub
        their name and commit too. The same files are read once, for all the runs of a series or a search."""
        return {name: {**one} for name, one in self._checksums.items()}


def load(config: RunConfig, need: tuple[str, ...]) -> Inputs:
    """What a run reads, all checked. `need`: the splits that the command cannot do without; dev is held out of train
    where no file was named for it."""
    found = find_files(config)
    for split in need:
        if getattr(found, split) is None and not (split == "dev" and "train" in need):
            raise InputError(f"--{split} is missing: {config.option} needs it beside the files that were given")
    model = find_model(config)
    logs.notice(found.notice)
    logs.notice(model.notice)
    names = tables.read_label_names(found.label_names)
    tokenizer = Tokenizer(tokenizer_model=model.tokenizer)
    with logs.doing(f"reading {model.weights}"):
        read = weights.read_weights(model.weights)
    tokenizers.check_vocabulary(tokenizer, read.config)
    weights.check_n_layers(read, config.n_layers)
    frozen.check_run(config, config.n_layers or read.config.n_layers)
    if config.lora_r and config.lora_r > read.config.dim:
        raise InputError(f"--lora_r {config.lora_r}: no matrix of {model.weights} has a rank above {read.config.dim}; "
                         "take a lower one")
    where = config.device or ("cuda" if config.use_gpu else "cpu")
    if wants_fused(config, where, sum(map(math.prod, read.shapes.values()))):
        threading.Thread(target=fused.library, daemon=True).start()  # compiled while the rest is read
    prompts = config.option == "prompt"
    found_tables = run_splits.read_tables(config, {n: getattr(found, n) for n in ("train", "dev", "test")})
    classes = run_splits.classes_of(config, found_tables, names, found.label_names)
    wanted = {n: table for n, table in found_tables.items() if not (prompts and n == "train")}
    splits = run_splits.tokenise(config, wanted, dict.fromkeys(wanted, classes), tokenizer, read.config.max_seq_len)
    held_out = {}
    if "train" in splits:
        run_splits.check_training(splits, found_tables["train"], classes)
        run_splits.warn_of_copies(splits, bool(config.folds))
        if "dev" not in splits and not config.folds:
            held_out = run_splits.hold_out(splits["train"])
            splits = {**splits, **held_out}
    run_splits.say_without_test(splits)
    return Inputs(found, splits, classes.names, tokenizer, read, held_out, read_adapter(config, read))


def read_adapter(config: RunConfig, base: Weights) -> Adapter | None:
    """--adapter: that of a run of ours, or one of PEFT's, for this base. Raises InputError or FileNotFoundError."""
    if not config.adapter:
        return None
    adapter = _adapter_of(config, base)
    lora.check(adapter, base.config)
    return adapter


def _adapter_of(config: RunConfig, base: Weights) -> Adapter:
    assert config.adapter
    if peft.is_peft(Path(config.adapter)):
        found = peft.read_peft(Path(config.adapter), base.config, config.n_layers)
        if found.base and files.sha256(base.path) != found.base.sha256:  # the same weights may be in another format
            logs.warn(f"--adapter {config.adapter}: {base.path} is not the file or folder that it was trained on, "
                      f"{found.base.path} (sha256); with other weights the adapter is noise")
        weights.check_n_layers(base, found.n_layers)
        return found
    settings, best = _run_with_adapters(Path(config.adapter))
    if not settings.lora or not settings.base:
        raise InputError(f"--adapter {config.adapter}: this run has no adapters; begin with its weights: "
                         f"--pretrained_model_path {config.adapter}")
    adapters.find_base(settings.base, best, base.path)
    handle = weights.open_safetensors(best / "model.safetensors")
    tensors = {name: handle.get_tensor(name).float() for name in handle.keys()}
    parts = {part: {name.removeprefix(part): tensor for name, tensor in tensors.items() if name.startswith(part)}
             for part in ("llama.", "classifier_head.")}
    return Adapter(best, settings.lora, parts["llama."], parts["classifier_head."], settings.llama.n_layers,
                   settings.base, settings.values(), settings.llama.attention)


def base_of_adapter(folder: Path) -> str | None:
    """The base that an adapter names; None where nothing lies there."""
    if peft.is_peft(folder):
        return peft.named_base(folder)
    settings, _ = _run_with_adapters(folder)
    return settings.base.path if settings.base else None


def _run_with_adapters(folder: Path) -> tuple[ClassifierConfig, Path]:
    """What a run's classifier is, and where it lies. Raises InputError for a folder that is no run."""
    if not saved.is_run(folder) and not weights.is_run(folder):
        raise InputError(f"--adapter {folder}: there is no adapter here, neither one of PEFT's (adapter_config.json) "
                         "nor a finished run with --lora_r")
    return saved.read_settings(folder, "--adapter")


def limit_train(config: RunConfig, inputs: Inputs) -> Inputs:
    """The inputs with the training sentences that --train_limit and --seed choose; all of them without a limit."""
    if not config.train_limit:
        return inputs
    train = dataset.limit(inputs.splits["train"], config.train_limit, config.seed)
    missing = sorted(set(inputs.splits["train"].labels.tolist()) - set(train.labels.tolist()))
    if missing:
        named = ", ".join(inputs.names[label] for label in missing)
        logs.warn(f"--train_limit {config.train_limit} with seed {config.seed} leaves no training sentence of: {named}")
    return replace(inputs, splits={**inputs.splits, "train": train})
