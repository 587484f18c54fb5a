"""--option report: finished runs, logs and tables compared; what is chance is said to be. No torch.

The pages go to --output_dir, or to runs/report, where the next report replaces them.
"""

import gc
import statistics
from collections.abc import Sequence
from pathlib import Path

from commands import past_runs, report_pages, report_pictures, search_pages
from commands.report_pages import Card, Report
from config import InputError, RunConfig, counted, no_effect
from formats import files
from formats.past_run import PastRun
from training import advice, comparisons, logs, pairs, verdicts
from training.contradictions import contradictions
from training.copies import copies
from training.pairs import Leader, Setting

PATIENCES = (3, 5)
SHOWN = 20  # runs, pairs and other lines of a kind on stdout
PAGES = ("report.md", "report.csv", "report.html")


def run(config: RunConfig) -> int:
    gc.disable()  # everything that is read is kept to the end: to look for garbage in it takes a seventh of the time
    try:
        return write(config)
    finally:
        gc.enable()


def write(config: RunConfig) -> int:
    """Read the runs, write the pages, and tell what they say."""
    if not config.run:
        raise InputError("--option report needs --run RUN [RUN ...]: run folders, folders of them, logs, or tables")
    folder = Path(config.output_dir or Path("runs") / "report")
    for line in no_effect(config):
        logs.warn(f"no effect: {line}")
    found = past_runs.read(config.run, config.score)
    if not found.runs:
        raise InputError("\n".join([*found.faults, "no run could be read"]))
    for fault in found.faults:
        logs.warn(fault)
    for name in PAGES:
        files.check_writable(folder / name, "--output_dir")
    report = make_report(found.runs, found.faults, config.n_dev)
    texts = {"report.md": report_pages.markdown(report), "report.csv": report_pages.csv_text(report)}
    try:
        texts["report.html"] = report_pages.html(report, report_pictures.draw([card.run for card in report.cards]))
    except ImportError as error:
        (folder / "report.html").unlink(missing_ok=True)  # that of an earlier report
        logs.warn(f"report.html is not written: {error}; `pip install jinja2` mends that")
    for name, text in texts.items():
        files.write_text(folder / name, _encodable(text), follow=False)
    tell(report)
    for name in texts:
        logs.say(f"report :: {folder / name}")
    write_searches(config.run, folder)
    return 0


def write_searches(paths: Sequence[str], folder: Path) -> None:
    """search.html of the search whose folder is among these paths; of several, the first."""
    for path in [Path(path) for path in paths if search_pages.is_search(Path(path))][:1]:
        try:
            logs.say(f"report :: {search_pages.write(path, folder)}")
        except (InputError, OSError) as error:
            logs.warn(str(error))


def _encodable(text: str) -> str:
    """A text that UTF-8 can hold: the name of a folder may have bytes in it that are none, and JSON half a character;
    each is a question mark."""
    return text.encode("utf-8", "replace").decode("utf-8")


def make_report(runs: Sequence[PastRun], faults: Sequence[str], n_dev: int | None) -> Report:
    """Everything that is said of these runs."""
    ranked = sorted(runs, key=lambda one: -(score if (score := one.peak()) is not None else -1e9))
    sizes = [pairs.size_of(one, n_dev) for one in ranked]
    judged = [verdicts.verdict(one, n) for one, n in zip(ranked, sizes, strict=True)]
    cards = tuple(
        Card(rank, one, judgement, tuple(verdicts.patience(one, n) for n in PATIENCES) if one.epochs else (),
             tuple(contradictions(one)), size)
        for rank, (one, judgement, size) in enumerate(zip(ranked, judged, sizes, strict=True), 1))
    doubled = copies(ranked)
    is_copy = {id(run) for run, _ in doubled}
    found = pairs.settings([one for one in ranked if id(one) not in is_copy])
    leaders = [lead for group in pairs.on_the_same_sentences(found) if (lead := pairs.leader(group, n_dev))]
    compared = pairs.pairs(found, n_dev)
    n_pairs = sum(pair.difference is not None for pair in compared)
    pair_lines = [f"{pair.words(n_pairs)} ({pair.first.name}; {pair.second.name})" for pair in compared]
    if len(compared) == pairs.MOST_PAIRS:
        pair_lines.append(f"there are more pairs; the first {pairs.MOST_PAIRS} were compared")
    given = advice.advice(ranked, judged, leaders[0] if leaders else None, compared)
    n_assumed = sum(one.n_dev is None and bool(one.epochs) for one in ranked) if n_dev is None else 0
    assumed = (f"How many dev sentences the accuracies of {counted(n_assumed, 'run')} are of is not said: "
               f"{pairs.ASSUMED_N:,} are assumed, as in SST-5 (--n_dev N says it)" if n_assumed else "")
    between = [line for lead in leaders for line in _on_leader(lead, len(leaders) > 1)] + _on_seeds(found, n_dev)
    if doubled:
        names = ", ".join(f"{run.name} (as {of.name})" for run, of in doubled[:10])
        more = f" and {len(doubled) - 10} more" if len(doubled) > 10 else ""
        between.append(f"the same run over again, and compared once: {names}{more}")
    return Report(cards, tuple(pairs.differing(ranked)) if len(ranked) > 1 else (), tuple(between), tuple(pair_lines),
                  tuple(one.words() for one in given), tuple(faults), assumed)


def _on_leader(lead: Leader, is_one_of_many: bool) -> list[str]:
    best = lead.setting
    of = f" of those on {pairs.dev_words(best)}" if is_one_of_many else ""
    lines = [f"the best{of} is {best.name}, {best.mean():.3f}"]
    if lead.alike:
        names = ", ".join(f"{one.name} ({one.mean():.3f})" for one in lead.alike[:10])
        more = f" and {len(lead.alike) - 10} more" if len(lead.alike) > 10 else ""
        lines.append(f"not to be told from it (Tukey's range test, 95%): {names}{more}")
    if lead.n_behind:
        lines.append(f"behind it by more than chance: {counted(lead.n_behind, 'other')}")
    return lines


def _on_seeds(found: Sequence[Setting], n_dev: int | None) -> list[str]:
    """Mean and deviation of each setting with several seeds, and what so many of them could have shown."""
    lines = []
    for setting in found:
        scores = setting.scores()
        if len(scores) > 1:
            spread = statistics.stdev(scores)
            shown = comparisons.smallest_shown(scores, pairs.size_of(setting.runs[0], n_dev))
            lines.append(f"{setting.name}: {setting.mean():.3f} +- {spread:.3f} over {len(scores)} {setting.unit}; so "
                         f"many can show a difference of {shown:.3f} or more between two settings")
    return lines


def _score_columns(report: Report) -> list[str]:
    """For each table, which of its columns the runs are ranked by."""
    return list(dict.fromkeys(f"{card.run.source.rpartition(':')[0]}: the column {card.run.score_column!r} (--score)"
                              for card in report.cards if card.run.score_column))


def tell(report: Report) -> None:
    """The summary on stdout."""
    logs.say(f"report :: {counted(len(report.cards), 'run')}")
    width = min(40, max(len(card.run.name) for card in report.cards))
    for card in report.cards[:SHOWN]:
        cells = report_pages.row(card)
        what = "score" if card.run.score is not None else "dev"
        said = [f"{what} {cells['peak dev'] or '-'}"
                + (f" (epoch {cells['best epoch']})" if cells["best epoch"] else ""),
                f"test {cells['test']}" if cells["test"] else "",
                f"gap {cells['gap at the peak']}" if cells["gap at the peak"] else "",
                f"{cells['gap at the end']} at the end" if card.run.epochs and card.run.epochs[-1] != card.run.best()
                else "", cells["verdict"]]
        logs.say(f"{card.rank:4} {card.run.name[:40]:{width}}  {', '.join(filter(None, said))}")
    if len(report.cards) > SHOWN:
        logs.say(f"     and {len(report.cards) - SHOWN} more: report.csv")
    for title, lines in (("score", _score_columns(report)), ("runs", report.between),
                         ("option", report.pair_lines), ("try", report.advice),
                         ("contradiction", report.contradictions()), ("assumed", [report.assumed])):
        for line in [line for line in lines if line][:SHOWN]:
            logs.say(f"{title} :: {line}")
        if len(lines) > SHOWN:
            logs.say(f"{title} :: and {len(lines) - SHOWN} more: report.md")
