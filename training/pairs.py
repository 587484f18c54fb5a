"""Which runs belong together and which are compared: repeated seeds, pairs that differ in one option, the leader."""

import posixpath
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, product
from pathlib import Path

from config import options
from formats import tables
from formats.labels import canonical
from formats.past_run import PastRun
from training import comparisons
from training.comparisons import ALPHA, Difference
from training.run_folder import SPLITS

# Options that change where things are, what is said and what is kept, and not what is learned; and those of others.
WITHOUT_EFFECT = {
    "option", "run", "resume", "output_dir", "overwrite", "dev_out", "test_out", "keep_state", "save_every", "use_gpu",
    "device", "kernels", "deterministic", "plan", "check_gradients", "overfit_batch", "detect_anomaly", "save_dtype",
    "plots", "logger", "auto_batch", "grad_checkpoint", "seeds", "test", "label_names",
    *(f.name for f in options() if "finetune" not in f.metadata["only"])}
NOT_GIVEN = "not given"
ASSUMED_N = 1101  # sentences in the dev set of SST-5, where neither a run nor --n_dev says it
REPEATS = {"seed", "fold", "folds"}  # options that repeat a run, and of which nobody asks what they did
NO_DIFFERENCE = "these are no accuracies, or not on the same dev sentences"
MOST_PAIRS = 2000  # pairs of runs that are compared, at most
RUN_OF_SERIES = re.compile(r"(?:(.*)/)?(?:seed|fold)-\d+(?:-\d+)?(?: \(.*\))?")  # its name in what a series printed


@dataclass(frozen=True)
class Setting:
    """Runs that differ in their seed alone, or are the folds of one cross-validation; most often one run."""

    runs: tuple[PastRun, ...]

    @property
    def name(self) -> str:
        first = self.runs[0].name
        return first if len(self.runs) == 1 else f"{first} and {len(self.runs) - 1} more {self.unit}" if (
            len(self.runs) > 2) else f"{first} and another {self.unit[:-1]}"

    @property
    def unit(self) -> str:
        """What the runs are repeated over."""
        return "folds" if "fold" in self.runs[0].options else "seeds"

    def is_lone_fold(self) -> bool:
        """One fold without the others says nothing of a setting: its dev sentences are its own."""
        return len(self.runs) == 1 and is_fold(self.runs[0])

    def scores(self) -> list[float]:
        return [score for run in self.runs if (score := run.peak()) is not None]

    def mean(self) -> float:
        return statistics.fmean(self.scores())

    def by_seed(self) -> dict[str, float]:
        which = self.unit[:-1]
        return {run.options.get(which, run.name): score for run in self.runs if (score := run.peak()) is not None}


@dataclass(frozen=True)
class Pair:
    """Two settings that differ in one option, and what it did. `p`: after Holm's correction. `difference` is None where
    the scores are no accuracies."""

    option: str
    old: str
    new: str
    first: Setting
    second: Setting
    difference: Difference | None
    p: float

    def is_told_apart(self) -> bool:
        return self.p <= ALPHA

    def words(self, n_pairs: int) -> str:
        change = f"{self.option} {self.old} -> {self.new}: "
        if self.difference is None:
            return f"{change}{self.second.mean() - self.first.mean():+.4g}; nothing is said of chance: {NO_DIFFERENCE}"
        found = self.difference
        corrected = f" after Holm's correction for {n_pairs} pairs" if n_pairs > 1 else ""
        verdict = f"more than chance (p = {self.p:.2g}{corrected})" if self.is_told_apart() else (
            f"not to be told from chance (p = {self.p:.2g}{corrected})")
        return f"{change}dev {found.words()}: {verdict}; {found.how}"


# --------------------------------------------------------------------------- which options differ


def options_of(run: PastRun) -> dict[str, str]:
    return {name: value for name, value in run.options.items() if name not in WITHOUT_EFFECT}


def differing(runs: Sequence[PastRun]) -> list[str]:
    """The options, in the order of their names, whose values are not the same in all runs that say them. Beside a log,
    which has only what was typed, of a run folder only that counts."""
    has_logs = any(run.known_by != "folder" for run in runs)
    values: dict[str, set[str]] = {}
    n_saying: dict[str, int] = {}  # the runs with the option, of those that name all that they have
    says_all = [run.known_by == "command" or run.known_by == "folder" and not has_logs for run in runs]
    for run, says in zip(runs, says_all, strict=True):
        for name, value in options_of(run).items():
            if run.known_by != "folder" or not has_logs or name in run.given:
                values.setdefault(name, set()).add(value)
                n_saying[name] = n_saying.get(name, 0) + says
    return sorted(name for name, each in values.items() if len(each) > 1 or n_saying[name] < sum(says_all))


def shown_value(run: PastRun, option: str) -> str:
    """The value of an option in a run, for a person; an option that was not typed, and one that is not known."""
    if option in run.options:
        return run.options[option]
    return {"command": NOT_GIVEN, "folder": "not set"}.get(run.known_by, "unknown")


def settings(runs: Sequence[PastRun]) -> list[Setting]:
    """The runs that have a score, those that differ in their seed alone, or in their fold, together. Two runs with the
    same seed, or with unknown options, are not repetitions of each other."""
    together: dict[object, list[PastRun]] = {}
    taken: dict[object, set[str]] = {}  # the seeds, or folds, of each
    series = _printed_series(runs)
    for i, run in enumerate(runs):
        if run.peak() is None:
            continue
        own = options_of(run)
        repeated = "fold" if "fold" in own else "seed"
        which = own.pop(repeated, None)
        key: object = series.get(i, (_kind(run), frozenset(own.items())))
        is_known = i in series or run.known_by in ("folder", "command", "table")
        if which is None or not is_known or which in taken.get(key, ()):
            key = i
        together.setdefault(key, []).append(run)
        taken.setdefault(key, set()).add(which or "")
    return [Setting(tuple(members)) for members in together.values()]


def _printed_series(runs: Sequence[PastRun]) -> dict[int, tuple[str, str, int]]:
    """The runs that --seeds or --folds printed into one file, without its command line, by their places: the file, the
    heading above them, and the number of the series there, from 0. A seed or a fold that comes again begins the next.
    """
    found: dict[int, tuple[str, str, int]] = {}
    n_series: dict[tuple[str, str], int] = {}
    seen: dict[tuple[str, str], set[str]] = {}
    in_order = sorted(enumerate(runs), key=lambda pair: min((e.line for e in pair[1].epochs), default=0))
    for i, run in in_order:
        name = RUN_OF_SERIES.fullmatch(run.name)
        if name and run.known_by == "heading" and set(run.options) in ({"seed"}, {"fold"}):
            which = "".join(run.options.values())
            place = (run.source.rpartition(":")[0], name[1] or "")
            if which in seen.setdefault(place, set()):
                seen[place] = set()
                n_series[place] = n_series.get(place, 0) + 1
            seen[place].add(which)
            found[i] = (*place, n_series.get(place, 0))
    return found


def _kind(run: PastRun) -> str:
    """Runs of one kind know their options in the same way; a table's rows have only each other."""
    return f"table {run.source.rpartition(':')[0]}" if run.known_by == "table" else run.known_by


# --------------------------------------------------------------------------- pairs


def pairs(found: Sequence[Setting], n_dev: int | None) -> list[Pair]:
    """What each option did: the pairs of settings that differ in it alone, at most MOST_PAIRS of them, those with the
    smallest p first."""
    compared = [(*pair, compare(pair[3], pair[4], n_dev)) for pair in _differ_in_one(found)]
    corrected = iter(comparisons.holm([difference.p for *_, difference in compared if difference]))
    result = [Pair(*pair, p=next(corrected) if pair[-1] else 1.0) for pair in compared]
    return sorted(result, key=lambda pair: (pair.p, pair.option, pair.old))


def _differ_in_one(found: Sequence[Setting]) -> list[tuple[str, str, str, Setting, Setting]]:
    """(option, one value, the other, the setting with the one, that with the other). Runs from folders are compared by
    every option, with a log's by those that were typed."""
    result: list[tuple[str, str, str, Setting, Setting]] = []
    seen: set[tuple[int, int]] = set()
    repeated = [setting for setting in found if len(setting.runs) > 1 and setting.unit == "seeds"]
    alone = {setting.runs[0].options.get("seed") for setting in found if len(setting.runs) == 1}
    members = [Setting((run,)) for setting in repeated for run in setting.runs if run.options.get("seed") in alone]
    of_many = {*map(id, members)}  # one run of several stands beside a single run with its seed
    for group in _comparable([*(setting for setting in found if not setting.is_lone_fold()), *members]):
        for option, by_value in _alike_but_for_one(group):
            for old, new in combinations(sorted(by_value, key=_place), 2):
                for a, b in product(by_value[old], by_value[new]):
                    if len(result) == MOST_PAIRS:
                        return result
                    if (id(a), id(b)) not in seen and not {id(a), id(b)} <= of_many:
                        seen |= {(id(a), id(b)), (id(b), id(a))}
                        result.append((option, old or NOT_GIVEN, new or NOT_GIVEN, a, b))
    return result


def _alike_but_for_one(group: Sequence[tuple[Setting, dict[str, str]]],
                       ) -> list[tuple[str, dict[str | None, list[Setting]]]]:
    """For each option, in the order of their names, the settings that are alike in all others, by its value.

    Each option with a value is one bit, and a setting is the sum of its bits: without one of them it is a number that
    is found again in one step, however many options and settings there are.
    """
    values: dict[str, dict[str, int]] = {}
    for _, own in group:
        for option, value in own.items():
            counts = values.setdefault(option, {})
            counts[value] = counts.get(value, 0) + 1
    varying = {option for option, counts in values.items() if counts != {next(iter(counts)): len(group)}}
    bits: dict[tuple[str, str], int] = {}
    alike: dict[tuple[str, int], dict[str | None, list[Setting]]] = {}
    options_at: dict[int, set[str]] = {}  # without which a setting is such a number
    wholes = []
    for setting, own in group:
        pairs_of = [(pair, bits.setdefault(pair, 1 << len(bits))) for pair in own.items() if pair[0] in varying]
        whole = sum(bit for _, bit in pairs_of)
        wholes.append((setting, whole))
        for (option, value), bit in pairs_of:
            if option not in REPEATS:
                alike.setdefault((option, whole - bit), {}).setdefault(value, []).append(setting)
                options_at.setdefault(whole - bit, set()).add(option)
    for setting, whole in wholes:
        for option in options_at.get(whole, ()):
            alike[option, whole].setdefault(None, []).append(setting)
    return [(key[0], by_value) for key, by_value in sorted(alike.items(), key=lambda item: item[0][0])]


def _comparable(found: Sequence[Setting]) -> Iterable[list[tuple[Setting, dict[str, str]]]]:
    """Settings whose options are known in the same way, with those options."""
    kinds: dict[str, list[Setting]] = {}
    for setting in found:
        kinds.setdefault(_kind(setting.runs[0]), []).append(setting)
    for kind, members in kinds.items():
        if kind == "folder" or kind.startswith("table"):
            yield [(setting, _own(setting)) for setting in members]
    if "command" in kinds:
        typed = [(setting, _own(setting)) for setting in kinds["command"]]
        for setting in kinds.get("folder", []):
            given = setting.runs[0].given
            typed.append((setting, {name: value for name, value in _own(setting).items() if name in given}))
        yield typed


def _own(setting: Setting) -> dict[str, str]:
    """A setting's options. The seed is one of them where there is a single run: another seed is a difference too."""
    own = options_of(setting.runs[0])
    if len(setting.runs) > 1:
        own.pop(setting.unit[:-1], None)
    return own


def _place(value: str | None) -> tuple[int, float, str]:
    """The order of an option's values: not given, numbers, words."""
    if value is None:
        return 0, 0.0, ""
    try:
        return 1, float(value), ""
    except ValueError:
        return 2, 0.0, value


# --------------------------------------------------------------------------- which dev sentences


def is_fold(run: PastRun) -> bool:
    return "fold" in run.options or "folds" in run.options


def dev_of(run: PastRun) -> str:
    """What a run's dev sentences are known by where there is no checksum: the dev file that was typed, or the training
    file that they were held out of; of folds how they were cut. "" where it is not known."""
    typed = {name: posixpath.normpath(run.options[name].replace("\\", "/")) for name in ("train", "dev")
             if name in run.options}
    known = typed.get("dev", "")
    if not known and "dataset" in run.options:
        known = f"data/{run.options['dataset']}-dev.txt"
    elif not known and run.known_by in ("command", "folder"):
        known = f"held out of {typed['train']}" if "train" in typed else "the data that --train has by default"
    if not is_fold(run):
        return known
    if run.known_by not in ("command", "folder"):
        return f"the folds of {run.source.rpartition(':')[0]} {run.name.rpartition('/')[0]}".strip()
    cut = [run.options.get(name, NOT_GIVEN) for name in ("folds", "seed")]
    return f"{cut[0]} folds (seed {cut[1]}) of {typed.get('train', '')} and {known}"


def are_on_others(first: PastRun, second: PastRun) -> bool:
    """Is it known that two runs' accuracies are of different dev sentences?"""
    if first.dev_sha256 and second.dev_sha256:
        return first.dev_sha256 != second.dev_sha256
    names, sizes = {dev_of(first), dev_of(second)} - {""}, {n_of(first), n_of(second)} - {None}
    return len(names) > 1 or len(sizes) > 1 or is_fold(first) != is_fold(second)


def n_of(run: PastRun) -> int | None:
    """How many dev sentences a run says that it has; None of a fold, for the folds of one cut differ by one."""
    return None if is_fold(run) else run.n_dev


def on_the_same_sentences(found: Sequence[Setting]) -> list[list[Setting]]:
    """The settings by their dev sentences, the largest group first; without folds that stand alone. A run whose dev
    file is not known belongs to the others where these have one, and as many sentences."""
    found = [setting for setting in found if not setting.is_lone_fold()]
    runs = [setting.runs[0] for setting in found]
    checksums: dict[str, set[str]] = {}  # by what was typed for it
    for run in runs:
        if run.dev_sha256:
            checksums.setdefault(dev_of(run), set()).add(run.dev_sha256)
    names = [run.dev_sha256 or (next(iter(known)) if len(known := checksums.get(dev_of(run), set())) == 1 else
                                dev_of(run)) for run in runs]
    only = next(iter({*names} - {""}), "") if len({*names} - {""}) == 1 else ""
    names = [name or ("" if is_fold(run) else only) for name, run in zip(names, runs, strict=True)]
    sizes: dict[str, set[int]] = {}
    for name, run in zip(names, runs, strict=True):
        sizes.setdefault(name, set()).update({n} if (n := n_of(run)) else ())
    groups: dict[tuple[str, int], list[Setting]] = {}
    for name, setting in zip(names, found, strict=True):
        n = n_of(setting.runs[0]) or 0
        groups.setdefault((name, n if len(sizes[name]) > 1 else 0), []).append(setting)
    return sorted(groups.values(), key=len, reverse=True)


def dev_words(setting: Setting) -> str:
    """The dev sentences of a setting, for a person."""
    run = setting.runs[0]
    known = f"the dev file {run.dev_file}" if run.dev_file else dev_of(run) or run.dev_sha256[:24]
    return known or (f"{run.n_dev:,} dev sentences" if run.n_dev else "a dev file that is not known")


# --------------------------------------------------------------------------- one difference


def size_of(run: PastRun, n_dev: int | None) -> int:
    """How many dev sentences a run's accuracy is of: what the run says, else --n_dev, else ASSUMED_N."""
    return run.n_dev or n_dev or ASSUMED_N


def compare(first: Setting, second: Setting, n_dev: int | None) -> Difference | None:
    """By their seeds where both have several, sentence by sentence where both have left predictions for the same file,
    else by the two accuracies alone. None where a score is no accuracy, and where it is known that the dev sentences
    are different ones."""
    if are_on_others(first.runs[0], second.runs[0]):
        return None
    if not all(0 <= score <= 1 for score in first.scores() + second.scores()):
        return None
    if len(first.scores()) > 1 and len(second.scores()) > 1:
        return comparisons.over_seeds(first.by_seed(), second.by_seed(), first.unit)
    a, b = _same_seed(first, second)
    if a.dev_sha256 and a.dev_sha256 == b.dev_sha256:
        is_right, other = which_are_right(a), which_are_right(b)
        if is_right and other and len(is_right) == len(other):
            only_a = sum(x and not y for x, y in zip(is_right, other, strict=True))
            only_b = sum(y and not x for x, y in zip(is_right, other, strict=True))
            return comparisons.paired(only_a, only_b, len(is_right))
    return comparisons.independent(a.peak() or 0.0, b.peak() or 0.0, size_of(a, n_dev), size_of(b, n_dev))


def _same_seed(first: Setting, second: Setting) -> tuple[PastRun, PastRun]:
    """A run of each, with the same seed where there is one."""
    for a in first.runs:
        for b in second.runs:
            if a.options.get("seed") == b.options.get("seed"):
                return a, b
    return first.runs[0], second.runs[0]


def which_are_right(run: PastRun) -> tuple[bool, ...]:
    """For each dev sentence whether the run predicts its label; () where its predictions or its dev file are gone, or
    do not give the accuracy that the run says."""
    if run.predictions is None or run.dev_file is None or run.dev is None:
        return ()
    columns = run.options.get("text_column"), run.options.get("label_column")
    predicted, labels = _labels(run.predictions), _labels(run.dev_file, *columns)
    if not labels or len(predicted) != len(labels):
        return ()
    is_right = tuple(a == b for a, b in zip(predicted, labels, strict=True))
    return is_right if abs(sum(is_right) / len(is_right) - run.dev) < 0.0006 else ()


@cache
def _labels(path: Path, text_column: str | None = None, label_column: str | None = None) -> tuple[str, ...]:
    """The labels of a file of sentences in any format that a run reads; () where they cannot be read."""
    try:
        if path.name in SPLITS:  # whose columns are called so
            text_column = label_column = None
        return tuple(map(canonical, tables.read_table(path, text_column, label_column).labels or ()))
    except (OSError, ValueError):
        return ()


# --------------------------------------------------------------------------- the leader


@dataclass(frozen=True)
class Leader:
    """The best setting, those that cannot be told from it, the best first, and how many others can."""

    setting: Setting
    alike: tuple[Setting, ...]
    n_behind: int


def leader(found: Sequence[Setting], n_dev: int | None) -> Leader | None:
    """The setting with the best score, and which ones cannot be told from it. The best of many is best by chance too:
    Tukey's range test takes that into account."""
    if not found:
        return None
    best = max(found, key=lambda setting: setting.mean())
    limit = comparisons.critical_p(len(found))
    alike, n_behind = [], 0
    for other in found:
        difference = compare(other, best, n_dev) if other is not best else None
        if difference is not None:
            is_behind = difference.p <= limit and difference.value > 0  # sentence by sentence it may be the other way
            alike += [] if is_behind else [other]
            n_behind += is_behind
    return Leader(best, tuple(sorted(alike, key=lambda setting: -setting.mean())), n_behind)
