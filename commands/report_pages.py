"""A report as Markdown, CSV and one HTML page. What stands in a log is text: no mark in it has a meaning here.

Nothing here imports torch.
"""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from commands.report_pictures import Pictures
from config import shown
from formats.past_run import PastRun
from training import pairs, verdicts
from training.verdicts import Patience, Verdict, gap

TEMPLATE = Path(__file__).with_name("report.html")
LONGEST = 80  # characters of a name or a value in a Markdown table
COMMAND = re.compile(r"(.*?)(python run_llama\.py .*)", re.DOTALL)  # a text that ends with a command
MOST_CARDS, MOST_PAIRS = 200, 50  # on the pages; report.csv has every run


@dataclass(frozen=True)
class Card:
    """One run and what is said of it. `n`: dev sentences."""

    rank: int
    run: PastRun
    verdict: Verdict
    patience: tuple[Patience, ...]
    contradictions: tuple[str, ...]
    n: int


@dataclass(frozen=True)
class Report:
    """Everything that the pages show. `differing`: the options that are not the same in all runs. `between`: what is
    said of the leader and of repeated seeds; `pair_lines`: what each option did; `faults`: what could not be read."""

    cards: tuple[Card, ...]
    differing: tuple[str, ...]
    between: tuple[str, ...]
    pair_lines: tuple[str, ...]
    advice: tuple[str, ...]
    faults: tuple[str, ...]
    assumed: str

    def contradictions(self) -> list[str]:
        return [f"{card.run.name}: {line}" for card in self.cards for line in card.contradictions]


def row(card: Card) -> dict[str, str]:
    """The measured part of a run's row, the same for a run's folder and for its log. What is unknown is empty."""
    run, best = card.run, card.run.best()
    last = run.epochs[-1] if run.epochs else None
    cells = {
        "peak dev": _three(run.peak()), "test": _three(run.test),
        "verdict": card.verdict.words() if card.verdict.name != "none" else "",
        "best epoch": f"{best.number:g}" if best else "", "dev at the end": _three(last.dev_acc if last else run.dev),
        "epochs": str(len(run.epochs)) if run.epochs else "",
        "gap at the peak": f"{gap(best):+.3f}" if best else "", "gap at the end": f"{gap(last):+.3f}" if last else ""}
    for one in card.patience:
        cells[f"patience {one.n} saves"] = str(one.saved)
        cells[f"patience {one.n} misses"] = f"{one.missed:.3f}"
    return cells


def _three(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if abs(value) <= 1 else f"{value:.6g}"


def details(card: Card) -> list[tuple[str, str]]:
    """What the card of a run says below its row: (what, text)."""
    run = card.run
    rows = [("verdict", f"{card.verdict.words()}: {card.verdict.evidence}" if card.verdict.name != "none" else
             f"none: {card.verdict.evidence}")]
    rows += [(f"--patience {one.n}", one.words()) for one in card.patience]
    given = sorted(run.given) if run.known_by == "folder" else sorted(run.options)
    typed = " ".join(f"--{name} {run.options[name]}" for name in given if name in run.options)
    unknown = {"": "unknown: there is no command line with it", "heading": f"{typed} (from its heading; the others are "
               "unknown)", "partly": f"{typed} (typed; the others are unknown)",
               "command": f"{typed} (typed; the others were not given)", "table": typed,
               "folder": f"{typed} (typed; all of them: args.json)"}
    rows.append(("options", unknown[run.known_by]))
    if run.score_column:
        rows.append(("score", f"the column {run.score_column!r}"))
    rows += run.inspected
    rows.append(("from", run.source))
    rows += [("contradiction", line) for line in card.contradictions]
    rows += [("note", note) for note in (*run.notes, verdicts.kept_another(run)) if note]
    return rows


def header(cards: Sequence[Card]) -> list[str]:
    """The columns of the leaderboard: those in which something is known, and of patience where it saves something."""
    rows = [row(card) for card in cards]
    names = list(dict.fromkeys(name for cells in rows for name in cells))
    nothing = ("", "0", "0.000")
    return [name for name in names if any(
        cells.get(name, "") not in (nothing if name.startswith("patience") else ("",)) for cells in rows)]


# --------------------------------------------------------------------------- CSV


def csv_text(report: Report) -> str:
    """A row for each run: what is measured, the options that differ, where it comes from."""
    rows = [row(card) for card in report.cards]
    columns = list(dict.fromkeys(name for cells in rows for name in cells))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["rank", "run", *columns, "n dev", *(f"--{name}" for name in report.differing), "evidence",
                     "from"])
    for card, cells in zip(report.cards, rows, strict=True):
        run = card.run
        options = [pairs.shown_value(run, name) for name in report.differing]
        writer.writerow([card.rank, _inert(run.name), *(cells.get(name, "") for name in columns), card.n,
                         *map(_inert, options), _inert(card.verdict.evidence), _inert(run.source)])
    return out.getvalue()


def _inert(text: str) -> str:
    """A cell that no spreadsheet takes for a formula."""
    text = shown(text).replace("\n", " ")
    is_number = re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", text)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t") and not is_number else text


# --------------------------------------------------------------------------- Markdown


def markdown(report: Report) -> str:
    """The report as Markdown, which reads as plain text too."""
    cards = report.cards[:MOST_CARDS]
    columns = header(report.cards)
    lines = ["# Report", "", _md(report.assumed), ""] if report.assumed else ["# Report", ""]
    lines += ["## Runs", "", *_md_table(["", "run", *columns], [
        [str(card.rank), card.run.name, *(row(card).get(name, "") for name in columns)] for card in cards])]
    if len(report.cards) > len(cards):
        lines += ["", f"The other {len(report.cards) - len(cards)} runs are in report.csv."]
    for title, texts in (("Between runs", report.between), ("What each option did", report.pair_lines[:MOST_PAIRS]),
                         ("What to try next", report.advice), ("Contradictions", report.contradictions()),
                         ("What could not be read", report.faults)):
        if texts:
            lines += ["", f"## {title}", "", *(f"- {_md_with_code(text)}" for text in texts)]
    if len(report.pair_lines) > MOST_PAIRS:
        lines += ["", f"{len(report.pair_lines) - MOST_PAIRS} more pairs are told apart less."]
    if report.differing:
        lines += ["", "## Options that differ", "", *_md_table(["run", *report.differing], [
            [card.run.name, *(pairs.shown_value(card.run, name) for name in report.differing)] for card in cards])]
    lines += ["", "## Each run"]
    for card in cards:
        lines += ["", f"### {card.rank}. {_md(_short(card.run.name))}", "",
                  *(f"- {_md(what)}: {_md(text)}" for what, text in details(card))]
    return "\n".join(lines) + "\n"


def _md_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(map(_md, columns))} |", "|" + "---|" * len(columns),
            *(f"| {' | '.join(_md(_short(cell)) for cell in cells)} |" for cells in rows)]


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST - 1]}…"


def _md(text: str) -> str:
    """Text in which no mark of Markdown and no tag has a meaning."""
    plain = shown(text).replace("\n", " ").replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*\[\]|~]|(?<!\w)_|_(?!\w))", r"\\\1", plain)


def _md_with_code(text: str) -> str:
    """A text with the command at its end as code. One with a backtick in it stays text."""
    found = COMMAND.fullmatch(text)
    if not found or "`" in text or "\n" in text:
        return _md(text)
    return f"{_md(found[1])}`{shown(found[2])}`"


# --------------------------------------------------------------------------- HTML


def html(report: Report, pictures: Pictures | None = None) -> str:
    """The report as one page that needs no network and no script. The SVGs of the pictures are put in as they are: this
    program has drawn them itself; everything else is escaped."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup, escape

    def with_code(text: str) -> Markup:
        """Escaped, with the command at the end as code that breaks between its options, and not inside of one."""
        plain = shown(text)
        found = COMMAND.fullmatch(plain)
        before, command = (found[1], found[2]) if found else (plain, "")
        words = [Markup("<span>{}</span>").format(word) for word in re.split(r" (?=--)", command) if word]
        return escape(before) + (Markup("<code>{}</code>").format(Markup(" ").join(words)) if words else "")

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"shown": shown, "with_code": with_code}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    pictures = pictures or Pictures()
    columns = header(report.cards)
    cards = report.cards[:MOST_CARDS]
    return template.render(
        report=report, columns=columns, n_more=len(report.cards) - len(cards),
        rows=[(card, [row(card).get(name, "") for name in columns]) for card in cards],
        options=[(card, [pairs.shown_value(card.run, name) for name in report.differing]) for card in cards],
        cards=[(card, details(card)) for card in cards], pair_lines=report.pair_lines[:MOST_PAIRS],
        n_more_pairs=max(0, len(report.pair_lines) - MOST_PAIRS),
        pictures=pictures, names={card.rank: card.run.name for card in report.cards}, svg=Markup)
