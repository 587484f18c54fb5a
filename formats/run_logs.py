"""A plain text log, as people keep them, to runs: what is not in it stays unknown."""

import bisect
import math
import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from formats import log_lines
from formats.command_lines import Command
from formats.log_lines import Ended, Final, Heading, Loaded, Majority, NumberedEpoch, Started
from formats.past_run import Claim, Epoch, PastRun, name_of_column, plain

MOST_COLUMN_SETS = 100  # tables with other columns than these have the runs in their rows by name only; each costs time


@dataclass
class _Draft:
    """A run while its lines are read."""

    line: int
    folder: str = ""  # where the run says that it is
    loaded: tuple[Loaded, ...] = ()
    epochs: dict[float, Epoch] = field(default_factory=dict)
    first: float = math.inf  # the lowest epoch, the highest, and the one that was read last
    top: float = -1.0
    last: float = -1.0
    finals: dict[str, list[Final]] = field(default_factory=lambda: {"dev": [], "test": []})
    ended: Ended | None = None
    majority: float | None = None
    claims: list[Claim] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def has_ended(self) -> bool:
        return bool(self.finals["dev"] or self.finals["test"] or self.ended)

    def is_begun_anew_by(self, epoch: Epoch, started: str) -> bool:
        """Does the count of the epochs start again? Not when a line is doubled, when two stand the wrong way round, or
        when a resumed run prints an epoch again. A run that says where it is (`started`: the folder, where such a line
        stands between the two) has one such line: without another, a rollback has taken it back."""
        if started and self.folder and started != self.folder:
            return True
        if self.folder and not started and not self.has_ended() or epoch.number > self.top:
            return False
        first, same = self.first, self.epochs.get(epoch.number)
        if same is None:
            return epoch.number < first and self.last - epoch.number > 2
        is_doubled = same.scores() == epoch.scores()
        if self.has_ended():
            return True
        if epoch.number == self.last:
            return epoch.number == first and not is_doubled
        return epoch.number == first or not is_doubled and epoch.number <= 2 < self.last - epoch.number

    def add(self, epoch: Epoch) -> None:
        old = self.epochs.get(epoch.number)
        if not all(0 <= acc <= 1 or math.isnan(acc) for acc in (epoch.train_acc, epoch.dev_acc)):
            self.notes.append(f"line {epoch.line}: epoch {epoch.number:g} has an accuracy that is not between 0 and 1; "
                              "the line is left out")
            return
        if old and old.scores() != epoch.scores():
            self.notes.append(f"epoch {epoch.number:g} stands there twice: dev acc {old.dev_acc:g} in line {old.line}, "
                              f"{epoch.dev_acc:g} in line {epoch.line}; the later one counts")
        self.epochs[epoch.number] = epoch
        self.first, self.top = min(self.first, epoch.number), max(self.top, epoch.number)
        self.last = epoch.number


    def add_final(self, final: Final) -> None:
        """The last one counts; another one before it is a claim that it contradicts."""
        values = self.finals[final.split]
        if values and values[-1].value != final.value:
            self.claims.append(Claim(values[-1].line, final.split, values[-1].value, 3))
        values.append(final)


@dataclass
class _Section:
    """What stands under a heading: runs and commands in their order."""

    heading: Heading | None
    parts: list[_Draft | Command] = field(default_factory=list)

    def runs(self) -> list[_Draft]:
        return [part for part in self.parts if isinstance(part, _Draft)]

    def commands(self) -> list[Command]:
        return [part for part in self.parts if isinstance(part, Command) and part.starts_a_run]


def read_runs(text: str, name: str) -> list[PastRun]:
    """The runs of a log in their order; [] where there is none. `name`: of the file, for what has no other name."""
    sections, rows = _sections(text)
    runs: list[PastRun] = []
    have_passed_on: set[int] = set()  # the sections whose command belongs to a run below a heading of a lower rank
    for section, above in zip(sections, _sections_above(sections), strict=True):
        inherited = None
        is_of_series = section.heading is not None and section.heading.level == log_lines.SERIES_LEVEL
        if above and section.runs() and above.commands() and not above.runs() and (
                is_of_series or id(above) not in have_passed_on):
            inherited = above.commands()[-1]
            have_passed_on.add(id(above))
        for draft, command in zip(section.runs(), _commands_of_runs(section, inherited), strict=True):
            if draft.epochs:
                runs.append(_finished(draft, command, _name_of(section, above), section.heading, name))
    return _with_tables(_with_names(runs, name), rows)


def _sections(text: str) -> tuple[list[_Section], list[tuple[int, str]]]:
    """The text cut at its headings, and the rows of the tables in it."""
    sections: list[_Section] = [_Section(None)]
    rows: list[tuple[int, str]] = []
    run_above: _Draft | None = None
    loaded: list[Loaded] = []  # the files that the next run has read; those of a series are for all of its runs
    started = ""  # where the next run is
    for number, line in log_lines.lines_of(text):
        if log_lines.is_row(line):
            rows.append((number, line))
        for said in log_lines.say_of(number, line):
            if isinstance(said, Heading):
                sections.append(_Section(said))
                run_above = None
                if said.level != log_lines.SERIES_LEVEL:
                    loaded, started = [], ""
                continue
            section = sections[-1]
            if isinstance(said, Command):
                section.parts.append(said)
                loaded, started = [], ""
                continue
            if isinstance(said, Loaded):
                is_anew = bool(loaded) and run_above is not None and loaded[0].line < run_above.line
                loaded = [*([] if is_anew else loaded), said]
                continue
            if isinstance(said, Started):
                started = said.folder
                continue
            last = section.parts[-1] if section.parts else None
            draft = last if isinstance(last, _Draft) else None
            if isinstance(said, NumberedEpoch):
                if draft is None or draft.is_begun_anew_by(said.epoch, started):
                    draft = _Draft(number, started, tuple(loaded))
                    section.parts.append(draft)
                    if _level(section) != log_lines.SERIES_LEVEL:
                        loaded = []
                started = ""
                draft.add(said.epoch)
                run_above = draft
            elif isinstance(said, Claim):
                if run_above:  # a command may stand between a run and its summary
                    run_above.claims.append(said)
            elif draft is not None:  # final lines without epochs above them belong to no run that is known
                if isinstance(said, Final):
                    draft.add_final(said)
                elif isinstance(said, Ended):
                    draft.ended = said
                elif isinstance(said, Majority):
                    draft.majority = said.value
    return sections, rows


# --------------------------------------------------------------------------- which command belongs to which run


def _sections_above(sections: list[_Section]) -> list[_Section | None]:
    """For each section the one that it is a part of: the last one before it whose heading is of a higher rank."""
    above: list[_Section | None] = []
    open_sections: list[_Section] = []
    for section in sections:
        while open_sections and _level(open_sections[-1]) >= _level(section):
            open_sections.pop()
        above.append(open_sections[-1] if open_sections else None)
        open_sections.append(section)
    return above


def _level(section: _Section) -> int:
    return section.heading.level if section.heading else 0


def _name_of(section: _Section, above: _Section | None) -> str:
    """What its heading calls it: `seed-1337` of a series with the series' own in front."""
    if section.heading is None:
        return ""
    if section.heading.level == log_lines.SERIES_LEVEL and above and above.heading:
        return f"{above.heading.text}/{section.heading.text}"
    return section.heading.text


def _commands_of_runs(section: _Section, inherited: Command | None) -> list[Command | None]:
    """For each run of a section the command that belongs to it: the one in front, or where a section begins with a run
    and ends with a command, the one behind. The runs behind a loop are all of its command. `inherited`: that of the
    section above, such as the command over a `### Output`; it is for the first run. None where it is not known."""
    parts, runs = section.parts, section.runs()
    if not section.commands():
        return [inherited if inherited and (n == 0 or inherited.is_loop) else None for n in range(len(runs))]
    is_behind = isinstance(parts[0], _Draft) and isinstance(parts[-1], Command) and parts[-1].starts_a_run
    found: list[Command | None] = []
    loop: Command | None = None
    for i, part in enumerate(parts):
        if isinstance(part, Command):
            loop = part if part.is_loop and part.starts_a_run else None
            continue
        beside = i + 1 if is_behind else i - 1
        other = parts[beside] if 0 <= beside < len(parts) else None
        found.append(other if isinstance(other, Command) and other.starts_a_run else loop)
    return found


def _finished(draft: _Draft, command: Command | None, name: str, heading: Heading | None, source: str) -> PastRun:
    named = heading.options if heading else {}
    is_of_series = heading is not None and heading.level == log_lines.SERIES_LEVEL
    typed = command.options if command else {}
    unknown = {name: value for name, value in (command.unknown if command else {}).items() if name not in named}
    options = {**typed, **named} if is_of_series else {**named, **typed}  # the seed of a series is printed by the run
    if is_of_series:
        options = {name: value for name, value in options.items() if name not in ("seeds", "output_dir")}
    notes = list(draft.notes)
    for option, value in unknown.items():
        notes.append(f"--{option} is not known: its command line says {value}")
    numbers = sorted(draft.epochs)
    whole = [n for n in numbers if n == int(n)]
    if whole and len(whole) == len(numbers):
        first, last = int(whole[0]), int(whole[-1])
        missing = last - min(first, 1) + 1 - len(whole)
        if missing > 0:
            notes.append(f"{missing} of the epochs up to {last} {'is' if missing == 1 else 'are'} not in the log")
    for split, values in draft.finals.items():
        if len({one.value for one in values}) > 1:
            said = ", ".join(f"{one.value:g}" for one in values[:5])
            notes.append(f"{split} acc stands there {len(values)} times: {said}; the last one counts")
    ended, is_fold = draft.ended, "fold" in options or "folds" in options
    typed_epochs = options.get("epochs", "")
    planned = ended.planned if ended else int(typed_epochs) if typed_epochs.isdecimal() and (
        len(typed_epochs) < 9) else None
    return PastRun(
        name=name, source=f"{source}:{draft.line}", options=options,
        known_by="partly" if unknown else "command" if command else "heading" if options else "",
        given=frozenset(options), heading={} if is_of_series or not command else named,
        epochs=tuple(draft.epochs[n] for n in numbers),
        dev=draft.finals["dev"][-1].value if draft.finals["dev"] else None,
        test=draft.finals["test"][-1].value if draft.finals["test"] else None,
        said_best=ended.epoch if ended else None, monitor=ended.monitor if ended else options.get("monitor", ""),
        planned=planned, stopped=ended.stopped if ended else "", majority=draft.majority, claims=tuple(draft.claims),
        n_dev=None if is_fold else _n_dev(draft.loaded, options.get("dev", "")), notes=tuple(notes))


def _n_dev(loaded: Iterable[Loaded], typed: str) -> int | None:
    """How many sentences were read from the dev file: the one that was typed, or that is called so."""
    for one in loaded:
        path = _same_way(one.path)
        words = re.findall(r"[a-z]+", path.lower().rpartition("/")[2])
        is_called_so = not typed and {"dev", "val", "valid", "validation"} & {*words}
        if not one.path or typed and path == _same_way(typed) or is_called_so:
            return one.n or None
    return None


def _same_way(path: str) -> str:
    """A path as it is written everywhere: ./a.txt is a.txt, and data\\a.txt is data/a.txt."""
    return posixpath.normpath(path.replace("\\", "/"))


def _with_names(runs: list[PastRun], name: str) -> list[PastRun]:
    """Each run with a name of its own: its heading's, else the file's, with -2, -3 behind one that is taken."""
    taken: set[str] = set()
    counts: dict[str, int] = {}
    named = []
    for run in runs:
        base = run.name or name
        own = base
        while own in taken:
            counts[base] = counts.get(base, 1) + 1
            own = f"{base}-{counts[base]}"
        taken.add(own)
        named.append(run if own == run.name else replace(run, name=own))
    return named


# --------------------------------------------------------------------------- tables in the text


def _with_tables(runs: list[PastRun], rows: list[tuple[int, str]]) -> list[PastRun]:
    """What the tables of a log say of its runs, as claims of these. A row is about the run that it names, or about the
    only one with its options; a table of one row without any is about the run above it."""
    claims: list[list[Claim]] = [[] for _ in runs]
    starts = [min(epoch.line for epoch in run.epochs) for run in runs]
    by_name = {run.name.casefold(): i for i, run in enumerate(runs)}
    known = {name for run in runs for name in run.options}
    by_options: dict[tuple[str, ...], dict[tuple[str | None, ...], list[int]]] = {}
    for table in _tables(rows):
        for line, row in table:
            if not (found := _claims_of_row(line, row)):
                continue
            in_order = [by_name[cell.casefold()] for cell in row.values() if cell.casefold() in by_name]
            first = next(iter(row.values()), "").casefold()
            named = {by_name[first]} if first in by_name else {*in_order}  # a run may be called as a value is: `1e-5`
            cells = {name_of_column(header): plain(cell) for header, cell in row.items()}
            columns = tuple(sorted(cells.keys() & known))
            if columns not in by_options and len(by_options) < MOST_COLUMN_SETS:
                by_options[columns] = {}
                for i, run in enumerate(runs):
                    by_options[columns].setdefault(tuple(run.options.get(c) for c in columns), []).append(i)
            alike = by_options.get(columns, {}).get(tuple(cells[c] for c in columns), []) if columns else []
            if not named and not columns and len(table) == 1:
                alike = [bisect.bisect(starts, line) - 1]
            which = next(iter(named)) if len(named) == 1 else alike[0] if not named and len(alike) == 1 else -1
            if which >= 0 and starts[which] < line:
                claims[which] += found
    return [replace(run, claims=run.claims + tuple(more)) if more else run
            for run, more in zip(runs, claims, strict=True)]


def _tables(rows: Iterable[tuple[int, str]]) -> list[list[tuple[int, dict[str, str]]]]:
    """Rows of Markdown to tables: for each row its line and its cells by their column."""
    tables: list[list[tuple[int, dict[str, str]]]] = []
    header: list[str] = []
    before: tuple[int, list[str]] = (-2, [])
    for number, line in rows:
        cells = log_lines.cells_of(line)
        if log_lines.is_ruler(cells) and before[0] == number - 1:
            header = before[1]
            tables.append([])
        elif header and before[0] == number - 1:
            tables[-1].append((number, dict(zip(header, cells, strict=False))))
        else:
            header = []
        before = (number, cells)
    return [table for table in tables if table]


def _claims_of_row(line: int, row: dict[str, str]) -> list[Claim]:
    claims = []
    for header, cell in row.items():
        words = header.casefold().replace("_", " ").split()
        is_best = bool({"best", "peak", "highest", "max"} & set(words))
        if "epoch" in words and is_best:
            if cell.isdecimal() and len(cell) < 9:
                claims.append(Claim(line, "best epoch", float(cell), 0))
        elif split := next((s for s in ("dev", "test") if s in words and "loss" not in words), None):
            if claim := log_lines.accuracy_claim(line, split, cell, is_best):
                claims.append(claim)
    return claims
