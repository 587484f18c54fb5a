"""What a search looks through: `--space lr=log:1e-6..1e-3 batch_size=16|32`, read and checked before anything starts.

A part of a space is an option's name and its values, without spaces: `a|b|c` is a choice, `a..b` a range,
`log:a..b` one on a logarithmic scale, `int:a..b` whole numbers. A range may have a step: `0..0.2:0.05`, and a factor on
a logarithmic scale: `log:1e-6..1e-3:x10`. `step_size[scheduler=step]=int:20..200` is there only where another part has
that value. In a file, parts stand on lines, and what follows a # is a comment.

Nothing here imports torch.
"""

import difflib
import math
import random
import re
from collections.abc import Callable
from dataclasses import Field, dataclass, replace
from pathlib import Path
from typing import Any

from config import MEANT, InputError, RunConfig, contradiction, integers, no_effect, options, value_type

MOST_POINTS = 100_000  # of a grid
MOST_CORNERS = 256  # of a space that are tried before the search starts
SWITCH = {"on": True, "true": True, "off": False, "false": False}
# What says which data are read and where things go, or belongs to the search itself.
NOT_SEARCHED = {"option", "run", "dataset", "train", "dev", "test", "label_names", "text_column", "label_column",
                "output_dir", "overwrite", "resume", "keep_state", "plan", "plots", "logger", "dev_out", "test_out",
                "seeds", "folds", "fold", "adapter", "max_minutes", "device", "use_gpu", "monitor", "ordinal",
                # and what changes no result
                "overfit_batch", "check_gradients", "auto_batch", "new_head", "save_every", "kernels"}


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both among them. `step`: the distance of two; None: every number between."""

    low: float
    high: float
    is_log: bool = False
    is_whole: bool = False
    step: float | None = None

    def values(self) -> list[float] | None:
        """All its numbers; None where there are too many to count."""
        step = self.step or (1 if self.is_whole else None)
        if step is None:
            return None
        n = math.floor((self.high - self.low) / step + 1e-9) + 1
        found = [float(f"{self.low + i * step:.12g}") for i in range(min(n, MOST_POINTS + 1))]
        return [int(x) for x in found] if self.is_whole else found


@dataclass(frozen=True)
class Parameter:
    """An option that is searched, with its range or its choices; `conditions`: each another option of the space and
    the values with which this one is there."""

    name: str
    domain: Range | tuple[Any, ...]
    conditions: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    def is_active(self, point: dict[str, Any]) -> bool:
        """Is it there beside the values of the parts before it?"""
        return all(name in point and point[name] in values for name, values in self.conditions)

    def values(self) -> list[Any] | None:
        """All its values; None of a range without a step."""
        return self.domain.values() if isinstance(self.domain, Range) else list(self.domain)


Space = tuple[Parameter, ...]


def read(text_or_file: str) -> str:
    """The text of a --space, which may be the name of a file. Raises InputError for a file that is not there."""
    path = Path(text_or_file)
    try:
        is_file = path.is_file()
    except (OSError, ValueError):  # a text that is too long for a name
        is_file = False
    if not is_file:
        if "=" not in text_or_file:
            raise InputError(f"--space {text_or_file}: there is no such file, and no `=` in it; expected a file, or "
                             "parts such as lr=log:1e-6..1e-3")
        return plain(text_or_file)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"--space {path}: it is not UTF-8 text") from None
    text = plain(" ".join(line.partition("#")[0] for line in lines))
    if not text:
        raise InputError(f"--space {path}: there is nothing in it; expected parts such as lr=log:1e-6..1e-3")
    return text


def plain(text: str) -> str:
    """The parts with one space between, and without the dashes of an option."""
    return " ".join(part.lstrip("-") for part in text.split())


AUTO = re.compile(r"(?:lr|learning_rate)=auto")


def has_auto(text: str) -> bool:
    """Is the interval of the rate that of the range test?"""
    return any(AUTO.fullmatch(part) for part in text.split())


def with_rates(text: str, rates: str) -> str:
    """The parts with this interval where `lr=auto` stands."""
    return " ".join(f"lr={rates}" if AUTO.fullmatch(part) else part for part in text.split())


def parse(text: str) -> Space:
    """The parts of a space, each behind those that it depends on.

    Raises InputError, naming the part, for an option that there is not or that is not searched, for values that the
    option's own check refuses, and for a space that contradicts itself.
    """
    found: dict[str, Parameter] = {}
    for part in text.split():
        one = _part(part)
        if one.name in found:
            raise InputError(f"--space {part}: {one.name} is in the space twice; give all its values in one part")
        found[one.name] = one
    for one in found.values():
        for name, values in one.conditions:
            _check_condition(one, name, values, found)
    ordered: dict[str, Parameter] = {}
    while len(ordered) < len(found):
        ready = [one for one in found.values()
                 if one.name not in ordered and {name for name, _ in one.conditions} <= {*ordered}]
        if not ready:
            names = ", ".join(name for name in found if name not in ordered)
            raise InputError(f"--space: {names} depend on each other in a circle; one must be without a condition")
        ordered |= {one.name: one for one in ready}
    return tuple(ordered.values())


# --------------------------------------------------------------------------- one part


def _part(part: str) -> Parameter:
    match = re.fullmatch(r"([^=\[\]]+)(?:\[([^\]]*)\])?=(.+)", part)
    if not match:
        why = " (a comment can stand in a file only)" if part.startswith("#") else ", without spaces around the `=`"
        raise InputError(f"--space {part}: expected OPTION=VALUES{why}, such as lr=log:1e-6..1e-3, batch_size=16|32, "
                         "or step_size[scheduler=step]=int:20..200")
    name, conditions, values = match[1].replace("-", "_"), match[2], match[3]
    known = _option(name, part)
    one = Parameter(known.name, _domain(known, values, part))
    if conditions is None:
        return one
    found = []
    for condition in conditions.split(","):
        other, _, wanted = condition.partition("=")
        if not wanted:
            raise InputError(f"--space {part}: expected another option's value between the brackets, such as "
                             f"{name}[scheduler=step]")
        field = _option(other.replace("-", "_"), part)
        found.append((field.name, tuple(_value(field, word, part) for word in wanted.split("|"))))
    return replace(one, conditions=tuple(found))


def _option(name: str, part: str) -> Field[Any]:
    """The option that a space names. Raises InputError, with the nearest name, for one that there is not."""
    known = {f.name: f for f in options()}
    name = {"max_length": "max_sentence_len", **MEANT}.get(name, name) if name not in known else name
    searched = [f.name for f in known.values() if "finetune" in f.metadata["only"] and f.name not in NOT_SEARCHED]
    if name not in known:
        near = difflib.get_close_matches(name, [*searched, *MEANT], n=1)
        hint = f"did you mean {near[0]}?" if near else "see --option finetune --help"
        raise InputError(f"--space {part}: there is no option {name}: {hint}")
    if name == "seed":
        raise InputError(f"--space {part}: the best of several seeds is luck; --seeds K gives each trial the mean of K")
    if name not in searched:
        raise InputError(f"--space {part}: {name} cannot be searched: it is no setting of a training run, or says what "
                         "is read and where things go; type --" + name + " beside the search where you need it")
    return known[name]


def _value(field: Field[Any], word: str, part: str) -> Any:
    """One value of an option, as its own check has it. Raises InputError."""
    if field.type is bool:
        if word.lower() not in SWITCH:
            raise InputError(f"--space {part}: {field.name} can be on or off, not {word}")
        return SWITCH[word.lower()]
    read_word = value_type(field)
    try:
        value = read_word(word)
    except ValueError:
        what = "a whole number" if read_word is int else "a number"
        hint = "; several values have | between them, and a range is LOW..HIGH" if re.search(r"\d[],;-]", word) else ""
        raise InputError(f"--space {part}: {word} is not {what}, which {field.name} takes{hint}") from None
    choices, check = field.metadata.get("choices"), field.metadata.get("check")
    if choices and value not in choices:
        near = difflib.get_close_matches(word, choices, n=1)
        raise InputError(f"--space {part}: {field.name} cannot be {word}; it can be {', '.join(choices)}"
                         + (f" (did you mean {near[0]}?)" if near else ""))
    if check and not check.holds(value) or isinstance(value, float) and not math.isfinite(value):
        expected = check.words if check else "a finite number"
        raise InputError(f"--space {part}: {field.name} {word}: it must be {expected}")
    return word if read_word is integers else value  # a list stays text: it is one choice of several


def _domain(field: Field[Any], values: str, part: str) -> Range | tuple[Any, ...]:
    read_word = value_type(field)
    if ".." not in values or read_word not in (int, float):  # a path may have two dots
        words = values.split("|")
        if "" in words:
            raise InputError(f"--space {part}: there is nothing between two | or behind the last one")
        found = tuple(_value(field, word, part) for word in words)
        if len({*found}) < len(found):
            raise InputError(f"--space {part}: a value is there twice")
        return found
    match = re.fullmatch(r"((?:log:|int:)*)([^:|]+?)\.\.([^:|.][^:|]*|\.\d[^:|.]*)(?::(x?)([^:|]+))?", values)
    if not match or "..." in values:
        raise InputError(f"--space {part}: expected LOW..HIGH, log:LOW..HIGH, int:LOW..HIGH, with two dots, and a step "
                         "behind a colon where there is one")
    low, high = (_value(field, word, part) for word in (match[2], match[3]))
    is_log, is_whole = "log:" in match[1], "int:" in match[1] or read_word is int
    if low >= high:
        raise InputError(f"--space {part}: the range is empty: {match[2]} is not below {match[3]}")
    if is_whole and not (float(low).is_integer() and float(high).is_integer()):
        raise InputError(f"--space {part}: int: goes from a whole number to another")
    if is_log and low <= 0:
        raise InputError(f"--space {part}: log: needs a range above 0, and this one begins at {match[2]}")
    if is_whole:
        low, high = int(low), int(high)
    if match[5] is None:
        return Range(low, high, is_log, is_whole)
    return _stepped(Range(low, high, is_log, is_whole), match[4] == "x", match[5], part)


def _stepped(whole: Range, is_factor: bool, word: str, part: str) -> Range | tuple[Any, ...]:
    """A range with a step; of one with a factor, its numbers as choices."""
    try:
        step = float(word)
    except ValueError:
        step = math.nan
    if is_factor != whole.is_log:
        raise InputError(f"--space {part}: a step on a logarithmic scale is a factor, such as log:1e-6..1e-3:x10, and "
                         "elsewhere a distance, such as 0..0.2:0.05")
    if is_factor:
        if not 1 < step < math.inf:
            raise InputError(f"--space {part}: the factor x{word} must be a number above 1")
        n = math.floor(math.log(whole.high / whole.low) / math.log(step) + 1e-9) + 1
        found = [float(f"{whole.low * step ** i:.12g}") for i in range(min(n, MOST_POINTS + 1))]
        return tuple(dict.fromkeys(round(x) for x in found)) if whole.is_whole else tuple(found)
    if not 0 < step <= (whole.high - whole.low) * (1 + 1e-9) or whole.is_whole and not step.is_integer():
        kind = "a whole number" if whole.is_whole else "a number"
        raise InputError(f"--space {part}: the step {word} must be {kind} above 0 that fits into the range")
    n = math.floor((whole.high - whole.low) / step + 1e-9)
    high = float(f"{whole.low + n * step:.12g}")
    return replace(whole, step=int(step), high=int(high)) if whole.is_whole else replace(whole, step=step, high=high)


def _check_condition(one: Parameter, name: str, values: tuple[Any, ...], found: dict[str, Parameter]) -> None:
    label = f"--space {one.name}[{name}={'|'.join(map(str, values))}]"
    if name not in found:
        raise InputError(f"{label}: {name} is not in the space; give it its values there, or leave the condition out")
    if name == one.name:
        raise InputError(f"{label}: it depends on itself")
    other = found[name].domain
    if isinstance(other, Range):
        raise InputError(f"{label}: {name} is a range, and a condition needs a choice, such as {name}=a|b")
    for value in values:
        if value not in other:
            raise InputError(f"{label}: {name} is never {value} in this space; it can be {', '.join(map(str, other))}")


# --------------------------------------------------------------------------- points


def walk(space: Space, choose: Callable[[Parameter], Any]) -> dict[str, Any]:
    """A point of a space: `choose` gives the value of each part that is there."""
    point: dict[str, Any] = {}
    for one in space:
        if one.is_active(point):
            point[one.name] = choose(one)
    return point


def grid(space: Space) -> list[dict[str, Any]]:
    """Every point of a space, each once; the last part changes fastest. Raises InputError for a range without a step,
    and for too many points."""
    points: list[dict[str, Any]] = [{}]
    for one in space:
        values = one.values()
        if values is None:
            raise InputError(f"--method grid: {one.name} is a continuous range; give it a step, such as "
                             f"{one.name}={_with_step(one.domain)}, or another --method")
        points = [{**point, one.name: value} if one.is_active(point) else point
                  for point in points for value in (values if one.is_active(point) else [None])]
        if len(points) > MOST_POINTS:
            raise InputError(f"--method grid: the space has over {MOST_POINTS} points; take larger steps, or another "
                             "--method")
    return points


def _with_step(domain: Any) -> str:
    if domain.is_log:
        return f"log:{domain.low:g}..{domain.high:g}:x{(domain.high / domain.low) ** 0.25:.3g}"
    return f"{domain.low:g}..{domain.high:g}:{(domain.high - domain.low) / 4:g}"


def corners(space: Space) -> list[dict[str, Any]]:
    """Points at the ends of the ranges, with every choice; at most MOST_CORNERS of them."""
    points: list[dict[str, Any]] = [{}]
    for one in space:
        values = [one.domain.low, one.domain.high] if isinstance(one.domain, Range) else list(one.domain)
        points = [{**point, one.name: value} if one.is_active(point) else point
                  for point in points for value in (values if one.is_active(point) else [None])]
        if len(points) > MOST_CORNERS:
            points = random.Random(0).sample(points, MOST_CORNERS)
    return points


def configured(config: RunConfig, point: dict[str, Any]) -> RunConfig:
    """The options of a run at a point, as if they had been typed."""
    kinds = {f.name: value_type(f) for f in options()}
    values: dict[str, Any] = {}
    for name, value in point.items():
        if kinds[name] is integers and isinstance(value, str):
            value = integers(value)
        values[name] = float(value) if kinds[name] is float and not isinstance(value, bool) else value
    return replace(config, **values, given=config.given | values.keys())


def check(space: Space, config: RunConfig) -> list[str]:
    """A line for each part that has no effect in some of the space. Raises InputError for a part that is typed as an
    option too, for points whose options contradict each other, and for a part that has no effect anywhere."""
    for one in space:
        if one.name in config.given:
            raise InputError(f"--{one.name} is typed and is in the space too; leave one of them out")
        if config.adapter and one.name.startswith("lora_") and one.name != "lora_dropout":
            raise InputError(f"--space: {one.name}: --adapter {config.adapter} has its own; leave one of them out")
    run = replace(config, option="finetune")
    effects: dict[str, list[tuple[dict[str, Any], str]]] = {one.name: [] for one in space}
    for point in corners(space):
        at = configured(run, point)
        if fault := contradiction(at):
            raise InputError(f"--space: it contradicts itself at {in_words(point)}: {fault}")
        lines = dict(line.removeprefix("--").split(": ", 1) for line in no_effect(at))
        for name in point:
            effects[name].append((point, lines.get(name, "")))
    notes = []
    for name, found in effects.items():
        if all(why for _, why in found):
            why = found[-1][1] if found else "its condition never holds"
            raise InputError(f"--space: {name} has no effect anywhere in this space: {why}")
        for other in space:
            used = {point[other.name] for point, why in found if not why and other.name in point}
            unused = {point[other.name] for point, why in found if why and other.name in point} - used
            if used and unused and not isinstance(other.domain, Range):
                some = "|".join(str(value) for value in other.domain if value in used)
                notes.append(f"--space: {name} has no effect where {other.name} is {' or '.join(map(str, unused))}; "
                             f"{name}[{other.name}={some}]=... searches it only where it has one")
    return notes


def no_effect_anywhere(space: Space, typed: RunConfig) -> list[str]:
    """A line for each typed option that does nothing at any point of the space."""
    def names(config: RunConfig) -> set[str]:
        return {line.partition(":")[0] for line in no_effect(config)}

    idle = [names(configured(typed, point)) for point in corners(space)]
    return [line for line in no_effect(typed) if all(line.partition(":")[0] in some for some in idle)]


def in_words(point: dict[str, Any]) -> str:
    """A point for a person: lr 3.2e-05, batch_size 16."""
    return ", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
                     for name, value in point.items()) or "its only point"


# --------------------------------------------------------------------------- without --space


def default_space(n_train: int, rate: float, is_ordinal: bool, typed: frozenset[str]) -> str:
    """A space for a classification task of so many training sentences. `rate`: the learning rate that fits the
    model; `typed`: the options that are not searched, since they have been decided."""
    sizes = "8|16|32" if n_train < 2000 else "16|32|64" if n_train < 20_000 else "32|64|128"
    parts = {"lr": f"log:{rate / 10:.1e}..{rate * 4:.1e}", "batch_size": sizes, "hidden_dropout_prob": "0.1|0.3|0.5",
             "warmup_ratio": "0..0.2", "layerwise_lr_decay": "0.7..1", "label_smoothing": "0|0.1"}
    if n_train < 2000:  # where a model learns by heart, the decay has something to hold back
        parts["weight_decay"] = "0|0.01|0.1"
    if is_ordinal:
        parts["loss"] = "ce|ordinal"
        del parts["label_smoothing"]
    found = " ".join(f"{name}={values}" for name, values in parts.items() if name not in typed)
    if not found:
        raise InputError("every option of the default space is typed; say with --space what to search")
    return found
