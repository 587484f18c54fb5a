"""Several runs as one: --run A B C, or the folder of a --seeds or --folds run. Their probabilities are averaged.

The runs need the same label names, in any order; models, tokenizers and lengths may differ.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import dataset
from classifier import ClassifierConfig
from commands import adapted, scores
from commands.finished import base_of, columns_of, warn_of_fixed
from config import InputError, RunConfig, counted, only_run
from dataset import Split
from formats import files
from formats.labels import listed
from minllama import Model
from training import comparisons, logs, metrics, saved, state
from training import device as devices
from training.device import Device
from training.run_folder import RunFolder, asks_for_series, options_in
from training.saved import SavedRun

# --------------------------------------------------------------------------- which runs


@dataclass(frozen=True)
class Member:
    """A run that was named, its files checked. `best`: where its classifier lies; `order` (C,): where each class of the
    first run stands among this run's classes; `base`: of one with adapters, where their base was said to lie."""

    path: str
    settings: ClassifierConfig
    best: Path
    order: list[int]
    base: str | None = None

    def load(self) -> SavedRun:
        with logs.doing(f"reading {self.path}"):
            return saved.load_checked(Path(self.path), self.settings, self.best, self.base)


def expanded(config: RunConfig) -> RunConfig:
    """The options with every run of --run: the folder of a series is its runs. Raises InputError for one that is named
    twice."""
    if not config.run:
        only_run(config)  # which says that it is needed
    runs = tuple(run for typed in config.run or () for run in _runs_in(typed))
    places = [saved.home_of(Path(run)).path.resolve() for run in runs]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise InputError(f"--run {runs[i]}: it is named twice, which would count it twice; name each run once")
    return replace(config, run=runs)


def _runs_in(typed: str) -> list[str]:
    """The runs of a series, or the path itself."""
    folder = RunFolder(typed)
    options = options_in(folder)
    if not asks_for_series(options):
        return [typed]
    folder.check()
    inside = [path for path in folder.path.glob("*-*") if re.fullmatch(r"(seed|fold)-\d+", path.name)
              and RunFolder(path).best.is_dir()]
    if not inside:
        raise InputError(f"{typed}: none of its runs has finished an epoch; go on with them: --resume {typed}")
    finished = [path for path in inside if RunFolder(path).is_finished()]
    asked = int(options.get("seeds") or options.get("folds") or 0)
    if len(finished) != asked:
        logs.warn(f"{typed}: {len(finished)} of {counted(asked, 'run')} are finished, and {len(inside)} are used; "
                  f"--resume {typed} goes on with the others")
    return [str(path) for path in sorted(inside, key=lambda path: int(path.name.partition("-")[2]))]


def members(config: RunConfig) -> list[Member]:
    """Every run of --run, its files checked, before anything is computed. Raises InputError where the label names are
    others than the first run's."""
    found: list[Member] = []
    for path in config.run or ():
        settings, best = saved.read_settings(path)
        names = settings.label_names
        wanted = found[0].settings.label_names if found else names
        if sorted(names) != sorted(wanted):
            raise InputError(f"{path}: its labels are {listed(names)}, and those of {found[0].path} are "
                             f"{listed(wanted)}; the probabilities of several runs are averaged only where the "
                             "label names are the same")
        base = base_of(config) if settings.lora else None
        found.append(Member(path, settings, best, [names.index(name) for name in wanted], base))
    return found


# --------------------------------------------------------------------------- on labelled files


def check_own_files(runs: Sequence[Member]) -> None:
    """Raises InputError where the runs were not scored on the same files, so that one must be named."""
    typed = "name the file that all are scored on: --dev FILE, or --test FILE"
    found = []
    for member in runs:
        home = saved.home_of(Path(member.path))
        if not home.has_run():
            raise InputError(f"{member.path}: what its dev and test files were is not known (no {home.args.name}); "
                             f"{typed}")
        described = state.read_description(home)
        if described["options"].get("folds"):
            test = described["files"].get("test", {}).get("path")
            raise InputError(f"{member.path}: it is one of several --folds, and each has another dev; {typed}"
                             + (f" (their test file: --test {test})" if test else ""))
        used = {name: one.get("sha256") for name, one in described["files"].items()} | described.get("splits", {})
        found.append({name: used.get(name) for name in ("dev", "test")})
        for name in ("dev", "test"):
            if found[-1][name] != found[0][name]:
                raise InputError(f"{member.path} has another {name} file than {runs[0].path}; {typed}")


def warn_of_training(runs: Sequence[Member], splits: Mapping[str, Split]) -> None:
    """Warns of a file that is scored and that a run was trained on."""
    digests = {name: files.sha256(split.path) for name, split in splits.items()}
    for member in runs:
        learned = learned_from(saved.home_of(Path(member.path)))
        for name, digest in digests.items():
            if digest in learned:
                logs.warn(f"{splits[name].path}: {member.path} was trained on it, or on a part: this {name} accuracy "
                          "says nothing about other sentences")


def learned_from(home: RunFolder) -> set[str]:
    """The checksums of the files that a run was trained on, or on a part of; empty where that is not known."""
    if not home.has_run():
        return set()
    described = state.read_description(home)
    parts = ("train", "dev") if described["options"].get("folds") else ("train",)
    found = [described["files"].get(part, {}).get("sha256") for part in parts]
    return {digest for digest in (*found, described.get("splits", {}).get("train")) if digest}


def outputs_of(member: Member, config: RunConfig, splits: Mapping[str, Split], device: Device) -> dict[str, Tensor]:
    """The log-probabilities (N, C) of a run for each split, the classes in the first run's order. The run is loaded,
    and gone when this returns."""
    run = member.load()
    devices.accelerate(config, run.model.to(device.where), device)
    outputs = {}
    for name, split in splits.items():
        own = tokenised_for(run, split)
        outputs[name] = metrics.predict(run.model, own, run.tokenizer.pad_id, device, name)
        metrics.check_finite(outputs[name], f"{member.path}: {name}")
    return {name: output[:, member.order] for name, output in outputs.items()}


def tokenised_for(run: SavedRun, split: Split) -> Split:
    """The split with the tokens of another run. Warns of sentences that are cut."""
    context, longest = run.model.llama.config.max_seq_len, run.settings.max_sentence_len
    tokens, n_cut = dataset.tokenize(split.sentences, run.tokenizer, context, longest)
    if n_cut:
        logs.warn(f"{split.path}: {n_cut} of {counted(len(split), 'sentence')} cut to "
                  f"{counted(longest or context, 'token')} for {run.typed}")
    return replace(split, tokens=tokens, n_cut=n_cut)


def averaged(outputs: Sequence[Tensor]) -> Tensor:
    """The logarithm of the mean of several runs' probabilities, from their log-probabilities: (N, C) float32."""
    return (torch.logsumexp(torch.stack(list(outputs)).double(), 0) - np.log(len(outputs))).float()


def is_ordinal(runs: Sequence[Member]) -> bool:
    """Do the classes have an order, in which the first run numbers them: was one of the runs trained with it? Where it
    numbers them otherwise, it is said that there is no error and no kappa."""
    found = next((member for member in runs if member.settings.loss == "ordinal"), None)
    if found is not None and found.order != sorted(found.order):
        logs.notice(f"without mae and qwk: {runs[0].path} has the labels in another order than {found.path}")
        return False
    return found is not None


def say_singles(runs: Sequence[Member], singles: Sequence[Mapping[str, Tensor]], splits: Mapping[str, Split]) -> None:
    """The accuracy of each run alone, a line each, in front of the ensemble's."""
    logs.say(f"ensemble :: {len(runs)} runs, the mean of their probabilities")
    for name, split in splits.items():
        for member, outputs in zip(runs, singles, strict=True):
            right = outputs[name].argmax(1).numpy() == split.labels
            logs.say(f"{name} run :: {right.mean():.3f} {member.path}")


def say_gains(runs: Sequence[Member], singles: Sequence[Mapping[str, Tensor]], together: Mapping[str, Tensor],
              splits: Mapping[str, Split]) -> None:
    """What the ensemble gains over the best single run and over the mean of them, on the same sentences."""
    for name, split in splits.items():
        right = together[name].argmax(1).numpy() == split.labels
        each = np.array([outputs[name].argmax(1).numpy() == split.labels for outputs in singles])  # (runs, N)
        best = int(each.mean(1).argmax())
        paired = metrics.mcnemar(right, each[best])
        gain = comparisons.paired(paired.only_second, paired.only_first, len(split))
        logs.say(f"{name} vs best run :: {scores.gain(gain)}; {runs[best].path} has {each[best].mean():.3f}; right "
                 f"where it is wrong {paired.only_first}, wrong where it is right {paired.only_second}; exact McNemar "
                 f"p {scores.p_text(gain.p)}")
        gain = comparisons.over_sentences((right - each.mean(0)).tolist())
        logs.say(f"{name} vs mean run :: {scores.gain(gain)}; the mean of the runs is {each.mean():.3f}; {gain.how}, "
                 f"p {scores.p_text(gain.p)}")


# --------------------------------------------------------------------------- on texts


class Answering:
    """The runs of --run, which answer texts together. `names`: of the classes; `columns`: those that were typed for the
    first run. Runs that are loaded one by one, where all texts are there, are not in memory together."""

    def __init__(self, config: RunConfig, is_all_there: bool):
        if config.adapter and config.run:
            raise InputError("--run and --adapter: an adapter of PEFT's stands in the place of a run, and a run with "
                             "--lora_r has its own; leave one of them out")
        if config.adapter:
            found = adapted.load(config)
            self.runs = [Member(str(found.typed), found.settings, found.best, [*range(found.settings.num_labels)])]
        else:
            found, self.runs = None, members(expanded(config))
        self.config = config
        self.names = self.runs[0].settings.label_names
        self.columns = columns_of(saved.home_of(Path(self.runs[0].path)))
        self.n_cut: Counter[tuple[str, int]] = Counter()  # texts, by the run and the tokens that it looks at
        self.models: list[Model] = []
        if found:
            self.models = [Model(found, config)]
        elif len(self.runs) == 1 or not is_all_there:
            self.models = [self._model(member) for member in self.runs]
        if not found:
            warn_of_fixed(config, any(member.settings.lora for member in self.runs))

    def answers(self, take: Callable[[], list[str]]) -> Iterator[tuple[list[str], np.ndarray]]:
        """Texts (n) and their probabilities (n, C), until `take` gives no more."""
        if self.models:
            while texts := take():
                each = [self._ask(model, member, texts) for model, member in zip(self.models, self.runs, strict=True)]
                yield texts, each[0] if len(each) == 1 else np.asarray(np.mean(each, axis=0, dtype=np.float64))
            return
        chunks = list(iter(take, []))
        sums = [np.zeros((len(texts), len(self.names))) for texts in chunks]
        for i, member in enumerate(self.runs, 1):
            model = self._model(member)
            with logs.doing(f"predicting with {member.path}, run {i} of {len(self.runs)}"):
                for texts, total in zip(chunks, sums, strict=True):
                    total += self._ask(model, member, texts)
            del model  # before the next one is read
        for texts, total in zip(chunks, sums, strict=True):
            yield texts, total / len(self.runs)

    def _model(self, member: Member) -> Model:
        return Model(member.load(), self.config)

    def _ask(self, model: Model, member: Member, texts: list[str]) -> np.ndarray:
        """The probabilities (n, C), the classes in the first run's order."""
        found = model.answer(texts)
        self.n_cut[member.path, model.longest] += found.n_cut
        return found.probabilities[:, member.order]

    def warn_of_cuts(self, source: str) -> None:
        for (path, longest), n in self.n_cut.items():
            if n:
                logs.warn(f"{source}: {counted(n, 'sentence')} cut to {counted(longest, 'token')}"
                          + (f" for {path}" if len(self.runs) > 1 else ""))
