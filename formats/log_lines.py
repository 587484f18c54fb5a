"""What one line of a log says: a heading, a command, an epoch, a final accuracy, a summary, a row of a table.

Everything takes time linear in the text. Nothing is guessed: what does not look like what a run prints is prose.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from formats.command_lines import Command, command_of, options_in, program_in
from formats.past_run import NUMBER, Claim, Epoch, plain

LONGEST = 20_000  # characters of a line that are looked at for a command, a heading or a summary
SERIES_LEVEL = 7  # the rank of `seed-1337:`, below every heading of Markdown


@dataclass(frozen=True)
class Heading:
    """### Try 3: `level` is the number of signs, 7 for the `seed-1337:` of a series."""

    level: int
    text: str
    options: dict[str, str]


@dataclass(frozen=True)
class Final:
    """`dev acc :: 0.435` at the end of a run. `split`: "dev" or "test"."""

    line: int
    split: str
    value: float


@dataclass(frozen=True)
class Ended:
    """`best :: epoch 2, counted from 0, of 10 (chosen by dev_acc), stopped: patience`; older versions leave out the
    words between the commas."""

    epoch: float
    planned: int
    monitor: str
    stopped: str


@dataclass(frozen=True)
class Majority:
    """`dev baselines :: majority 0.364, ...`"""

    value: float


@dataclass(frozen=True)
class Loaded:
    """`load 1101 data from data/sst-dev.txt`; of a dev that was held out `dev :: 105 of 1061 sentences of ...`, without
    a path ("")."""

    line: int
    path: str
    n: int


@dataclass(frozen=True)
class Started:
    """`run :: runs/a, on cpu`, which a run prints when it begins or goes on."""

    folder: str


@dataclass(frozen=True)
class NumberedEpoch:
    epoch: Epoch


Said = Heading | Command | Final | Ended | Majority | Claim | Loaded | Started | NumberedEpoch

# A number as it is printed, or as a spreadsheet writes it: 0.41, 0,41, 41%
MEASURED = r"[-+]?\d{1,20},\d{1,20}(?:[eE][-+]?\d{1,4})?(?![.,]?\d)|" + NUMBER
SHARE = rf"(?:{MEASURED})(?:\s?%)?"
EPOCH = re.compile(
    rf"epoch\s{{0,3}}(\d{{1,9}}(?:\.\d{{1,9}})?)\s{{0,3}}:\s{{0,3}}train loss\s{{0,3}}::\s{{0,3}}({MEASURED}),\s{{0,3}}"
    rf"train acc\s{{0,3}}::\s{{0,3}}({SHARE}),\s{{0,3}}dev acc\s{{0,3}}::\s{{0,3}}({SHARE})"
    rf"(?:,\s{{0,3}}lr\s{{0,3}}::\s{{0,3}}({MEASURED}))?(, collapsed: )?", re.IGNORECASE)
FINAL = re.compile(rf"(?:^|(?<=\]))\s*(dev|test) acc\s{{0,3}}::\s{{0,3}}({SHARE})"
                   r"(?![\d.,]{0,40}\s{0,3}%?\s{0,3}(?:\+-|±|\+/-))", re.IGNORECASE)
ENDED = re.compile(r"best :: epoch ([\d.]{1,20})(?:, counted from 0,)? of (\d{1,9}) \(chosen by (\w{1,20})\), "
                   r"stopped: ([\w -]{1,60})")
LOADED = re.compile(r"load (\d{1,9}) data from (\S.{0,500})")
HELD_OUT = re.compile(r"dev :: (\d{1,9}) of \d{1,9} sentences of .{1,500} held out")
STARTED = re.compile(r"run :: (\S.{0,500}), on \S")
MAJORITY = re.compile(rf"dev baselines :: majority ({SHARE})")
SERIES = re.compile(r"(seed|fold)-(\d{1,19}):")
# What a summary says: `best dev accuracy: 0.435`, `test acc = 40.8%`, `best epoch 7`. Only a line that begins so, and
# what follows at once, speaks of the run above it: within a sentence such words may be about any run.
BEFORE_CLAIM = re.compile(r"[^\w\n]{0,20}(?:\d{1,3}[.)]\s)?(?:(?:final|results?|summary|overall)[\s:*_]{1,5})?",
                          re.IGNORECASE)
BETWEEN_CLAIMS = re.compile(r"[\s,;/|()*_`]{0,10}(?:(?:and|with|at)\s)?", re.IGNORECASE)
CLAIM = re.compile(
    r"(?<![\w/-])(?:(best|peak|highest|max)\s)?(dev|test)\s(?:set\s)?acc(?:uracy)?(?![a-z])[\s:=*|`]{1,8}"
    r"(?:(?:is|was|of)[\s*`]{1,4})?(\d{0,3}[.,]?\d{1,9}(?!\d))(\s?%)?", re.IGNORECASE)
CLAIMED_EPOCH = re.compile(
    r"(?<![\w-])best\sepoch[\s:=*|`]{1,8}(?:(?:is|was)[\s*`]{1,4})?(\d{1,6}(?:\.\d{1,4})?)(?!\d)", re.IGNORECASE)


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """The lines of a text with their numbers from 1, each part of one that a progress bar has written over on its own;
    a command that goes on with \\, ^ or ` is one line."""
    joined, first = "", 0
    if "\x1b" in text:
        text = re.sub(r"\x1b\[[0-9;]{0,20}[A-Za-z]", "", text)  # colours, and the cursor moves of a progress bar
    for number, whole in enumerate(text.replace("\r\n", "\n").replace("\r\r", "\r").split("\n"), 1):
        for part in whole.split("\r"):
            line = part.replace("\ufeff", "").rstrip()
            goes_on = line.endswith(("\\", " ^", " `")) and len(joined) < LONGEST
            if goes_on and (joined or program_in(line) is not None):
                first, joined = first or number, f"{joined}{line[:-1]} "
                continue
            if joined:
                yield first, joined + line
                first, joined = 0, ""
            elif line:
                yield number, line
    if joined:
        yield first, joined


def say_of(number: int, line: str) -> list[Said]:
    """What a line says, in its order; [] for prose. The rows of tables are read together, in `run_logs`."""
    if "::" in line:
        said = list(_measured(number, line))
        if said:
            return said
    line = line[:LONGEST]
    if loaded := LOADED.match(line):
        return [Loaded(number, loaded[2].strip(), int(loaded[1]))]
    if (command := command_of(line)) is not None:
        return [command]
    if heading := heading_of(line):
        return [heading]
    return list(_claims(number, line))


def _measured(number: int, line: str) -> Iterator[Said]:
    """What a run itself prints. A progress bar may stand in front of it, on the same line."""
    end = 0
    for found in EPOCH.finditer(line):
        end = found.end()
        at, loss, train, dev, lr, collapsed = found.groups()
        yield NumberedEpoch(Epoch(float(at), _value(loss), _value(train), _value(dev), _value(lr) if lr else None,
                                  bool(collapsed), number))
    rest = line[end:]
    if ended := ENDED.search(rest):
        at, planned, monitor, stopped = ended.groups()
        if at.count(".") <= 1 and at.strip("."):
            yield Ended(float(at), int(planned), monitor, stopped.strip())
    if begun := STARTED.match(rest):
        yield Started(begun[1])
    if held_out := HELD_OUT.match(rest):
        yield Loaded(number, "", int(held_out[1]))
    if share := MAJORITY.search(rest):
        yield Majority(_value(share[1]))
    for final in FINAL.finditer(rest):
        value = _value(final[2])
        if 0 <= value <= 1:
            yield Final(number, final[1].lower(), value)


def _value(text: str) -> float:
    """The number in a text that MEASURED or SHARE has found; 41% is 0.41."""
    number = float(text.rstrip("% ").replace(",", "."))
    return number / 100 if text.endswith("%") else number


def heading_of(line: str) -> Heading | None:
    """A Markdown heading, or the line `seed-1337:` with which a series announces a run."""
    if "#" not in line[:10] and not line.endswith(":"):
        return None
    if found := re.match(r"\s{0,3}(#{1,6})\s+(\S.*)", line):
        text = found[2].strip().rstrip("#").strip(" *_`") or found[2].strip()
        return Heading(len(found[1]), text[:200], options_in(text[:1000]))
    if found := SERIES.fullmatch(line.strip()):
        own = {"seed": plain(found[2])} if found[1] == "seed" else {"fold": plain(found[2])}
        return Heading(SERIES_LEVEL, f"{found[1]}-{found[2]}", own)
    return None


# --------------------------------------------------------------------------- summaries


def _claims(number: int, line: str) -> Iterator[Claim]:
    lower = line.lower()
    if "acc" not in lower and "best" not in lower or is_row(line) or "+-" in line or "±" in line:  # a mean of several
        return
    at = _behind(BEFORE_CLAIM, line, 0)
    while found := CLAIM.match(line, at) or CLAIMED_EPOCH.match(line, at):
        if found.re is CLAIMED_EPOCH:
            yield Claim(number, "best epoch", float(found[1]), 0)
        elif claim := accuracy_claim(number, found[2], found[3] + (found[4] or ""), bool(found[1])):
            yield claim
        at = _behind(BETWEEN_CLAIMS, line, found.end())


def _behind(pattern: re.Pattern[str], line: str, at: int) -> int:
    found = pattern.match(line, at)
    return found.end() if found else at


def accuracy_claim(number: int, split: str, text: str, is_best: bool = False) -> Claim | None:
    """An accuracy from a person's text: 0.408, 0,408, 40.8%, **0.408**. None where it is none."""
    digits = re.search(r"\d+\.\d+|\.\d+|\d+", re.sub(r"(?<=\d),(?=\d)", ".", text))
    if not digits:
        return None
    value, decimals = float(digits[0]), len(digits[0].partition(".")[2])
    if "%" in text or value > 1:
        value, decimals = value / 100, decimals + 2
    if not 0 <= value <= 1 or decimals < 2 or "%" not in text and 0 < value < 0.1 and digits[0][0] not in "0.":
        return None  # 1.435 is no accuracy, though 43.5 is one
    what = "test" if split.lower() == "test" else "best dev" if is_best else "dev"
    return Claim(number, what, value, decimals)


def is_row(line: str) -> bool:
    """Is this a row of a Markdown table?"""
    return line.count("|") >= 2 and line.lstrip().startswith("|")


def cells_of(line: str) -> list[str]:
    """The cells of a row of a Markdown table, each `bare`."""
    inner = line.strip()
    inner = inner[1:] if inner.startswith("|") else inner
    inner = inner[:-1] if inner.endswith("|") else inner
    return [bare(cell) for cell in inner.split("|")]


def bare(cell: str) -> str:
    """A cell without bold marks and code marks."""
    return cell.replace("**", "").replace("__", "").strip(" `*")


def is_ruler(cells: list[str]) -> bool:
    """Is this the line |---|:--:| under a table's header?"""
    return bool(cells) and all(re.fullmatch(r":?-+:?", cell.replace(" ", "")) for cell in cells)
