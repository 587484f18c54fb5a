"""What to try next: at most three things, each with its reason and its command; none that the runs speak against."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from formats.past_run import FLAGS, NAMES, PastRun
from training import verdicts
from training.pairs import Leader, Pair
from training.verdicts import Verdict

MOST = 3
SEEDS, FOLDS = 5, 10
WASTED = 0.25  # of all evaluations: below it patience is not worth a line


@dataclass(frozen=True)
class Advice:
    text: str
    command: str

    def words(self) -> str:
        return f"{self.text}: {self.command}"


def advice(runs: Sequence[PastRun], found: Sequence[Verdict], lead: Leader | None, compared: Sequence[Pair],
           ) -> list[Advice]:
    """At most MOST: about the best run, about choosing between runs, about the epochs that were for nothing.
    `found`: the verdict on each run."""
    given: list[Advice] = []
    judged = dict(zip([run.name for run in runs], found, strict=True))
    if lead is not None and lead.setting.runs[0].epochs:
        best = lead.setting.runs[0]
        given += _on_the_best(best, judged[best.name], compared)
    elif lead is None and runs:
        given += _on_the_best(runs[0], found[0], compared)
    if lead is not None and lead.alike:
        given += _on_choosing(lead)
    given += _on_patience(runs)
    return given[:MOST]


def command(run: PastRun, **changes: str | None) -> str:
    """The command of a run with some options changed. Of a run whose options are unknown, what must be added to it."""
    if run.known_by not in ("command", "folder") or not run.given:
        return "its own command with " + " ".join(f"--{k} {v}" for k, v in changes.items() if v is not None)
    kept = {name: run.options[name] for name in sorted(run.given) if name in run.options
            and name not in ("option", "output_dir", "overwrite", "resume", "dev_out", "test_out", "fold")}
    words = ["python", "run_llama.py", "--option", "finetune"]
    for name, value in {**kept, **changes}.items():
        is_flag = name in FLAGS or name not in NAMES.values() and value == "on"  # --plots has a value, which may be off
        if value is not None and not (is_flag and value == "off"):
            words += [f"--{name}"] + ([] if is_flag else [value])
    return shlex.join(words)


def _on_choosing(lead: Leader) -> list[Advice]:
    """More seeds, or more folds of a cross-validation (which has --folds already, and --seeds cannot stand beside)."""
    n, unit = 1 + len(lead.alike), lead.setting.unit
    enough = FOLDS if unit == "folds" else SEEDS
    if all(len(setting.runs) >= enough for setting in (lead.setting, *lead.alike)):
        return []
    which = "the best two" if n == 2 else f"the best {n}"
    changes = {"folds": str(FOLDS)} if unit == "folds" else {"seeds": str(SEEDS), "seed": None}
    return [Advice(f"{which} cannot be told apart ({lead.setting.name} {lead.setting.mean():.3f}, "
                   f"{lead.alike[0].name} {lead.alike[0].mean():.3f}{', ...' if n > 2 else ''}): run "
                   f"{'each' if n <= 3 else 'the likeliest of them'} with --{unit} {enough} before choosing",
                   command(lead.setting.runs[0], **changes))]


def _on_the_best(run: PastRun, found: Verdict, compared: Sequence[Pair]) -> list[Advice]:
    best, last = run.best(), run.epochs[-1] if run.epochs else None
    if best is None or last is None:
        return []
    planned = run.planned or len(run.epochs)
    rate, dropout = (_number(run.options.get(name)) for name in ("lr", "hidden_dropout_prob"))
    if found.name == "still improving" and not _was_worse(compared, "epochs", rises=True):
        longer = max(planned + 5, round(1.5 * planned))
        return [Advice(f"{run.name}: dev peaked at epoch {best.number:g}, its last is {last.number:g}, and it was "
                       "rising: train longer", command(run, epochs=str(longer)))]
    if found.name == "overfitting":
        said = f"{run.name}: training accuracy {last.train_acc:.3f} against {last.dev_acc:.3f} on dev at the end"
        stop = next((p for p in (verdicts.patience(run, n) for n in (3, 5)) if p.saved and not p.missed), None)
        by = f" (--patience {stop.n}, which would have saved {stop.saved} evaluations)" if stop else ""
        if dropout is not None and dropout < 0.7 and not _was_worse(compared, "hidden_dropout_prob", rises=True):
            return [Advice(f"{said}: raise --hidden_dropout_prob ({dropout:g} now), or stop at epoch "
                           f"{best.number:g}{by}", command(run, hidden_dropout_prob=f"{dropout + 0.2:.2g}"))]
        return [Advice(f"{said}: stop at epoch {best.number:g}{by}", command(run, patience=str(stop.n)) if stop else
                       command(run, epochs=f"{int(best.number) + 1}"))]
    if found.name in ("diverged", "unstable") and rate and not _was_worse(compared, "lr", rises=False):
        return [Advice(f"{run.name} is {found.name} ({found.evidence}): lower --lr ({rate:g} now)",
                       command(run, lr=f"{rate / 3:.1e}"))]
    has_learned = last.train_acc >= verdicts.fitted_from(run)  # and nothing that holds on dev: a rate is not what lacks
    if found.name == "underfitting" and rate and not has_learned and not _was_worse(compared, "lr", rises=True):
        return [Advice(f"{run.name}: {found.evidence}: raise --lr ({rate:g} now)", command(run, lr=f"{rate * 3:.1e}"))]
    if found.name in ("diverged", "unstable", "underfitting", "collapsed"):
        return [Advice(f"{run.name} is {found.name} ({found.evidence}): look for its learning rate first",
                       "python run_llama.py --option lr_find --confirm, with the run's data and model")]
    return []


def _was_worse(compared: Sequence[Pair], option: str, rises: bool) -> bool:
    """Do the runs show, by more than chance, that changing an option this way makes it worse?"""
    for pair in compared:
        if pair.option == option and pair.is_told_apart() and pair.difference is not None:
            old, new = _number(pair.old), _number(pair.new)
            if old is not None and new is not None and (pair.difference.value < 0) == ((new > old) == rises):
                return True
    return False


def _on_patience(runs: Sequence[PastRun]) -> list[Advice]:
    """--patience where it would have saved a good part of all evaluations, and no run a visible part of its peak."""
    trained = [run for run in runs if run.epochs]
    total = sum(len(run.epochs) for run in trained)
    for n in (3, 5):
        found = [verdicts.patience(run, n) for run in trained]
        saved, missed = sum(p.saved for p in found), max((p.missed for p in found), default=0.0)
        if total and saved >= WASTED * total and missed <= 0.0005:
            first = trained[max(range(len(found)), key=lambda i: found[i].saved)]
            return [Advice(f"--patience {n} would have saved {saved} of {total} evaluations over all runs, and no run "
                           "would have missed its peak", command(first, patience=str(n)))]
    return []


def _number(value: str | None) -> float | None:
    try:
        return float(value) if value is not None else None
    except ValueError:
        return None

