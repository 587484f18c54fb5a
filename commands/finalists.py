"""The end of a search: the leaders, the best of them again with new seeds, the test set for the winner alone, and the
one command that repeats it."""

import csv
import io
import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from commands import inputs as run_inputs
from commands import job as jobs
from commands import results, scores, trial
from commands import space as spaces
from commands.inputs import Inputs
from commands.search_pages import ABOUT, ENOUGH, TABLE
from commands.study import Trials
from commands.trial import Ground
from config import RunConfig, counted
from formats import files
from training import best as best_folder
from training import logs, metrics, saved
from training.run_folder import RunFolder

LOCK = ".finalists.lock"
LEADERS = 10  # that are shown
FEWEST = 4  # complete trials, for the importance of a parameter to be computed


@dataclass(frozen=True)
class Finalist:
    """A trial that was run again: its options but for seed and folder, its score in the search, the score of each new
    seed, and how many of them failed."""

    number: int
    config: RunConfig
    before: float
    scores: dict[int, float]
    n_failed: int = 0

    @property
    def mean(self) -> float:
        return statistics.mean(self.scores.values())

    def in_words(self) -> str:
        """0.497 +- 0.008"""
        spread = f" +- {statistics.stdev(self.scores.values()):.3f}" if len(self.scores) > 1 else ""
        failed = f" ({counted(self.n_failed, 'more seed')} failed)" if self.n_failed else ""
        return f"{self.mean:.3f}{spread}{failed}"


def ranked(found: list[Any], rises: bool) -> list[Any]:
    """The complete trials, the best first; of equals, the earlier one."""
    complete = [one for one in found if one.state.name == "COMPLETE"]
    return sorted(complete, key=lambda one: (-one.value if rises else one.value, one.number))


def read_about(path: Path) -> dict[str, Any]:
    """A search.json; {} where there is none, or it is damaged."""
    try:
        return files.read_json(path)
    except (OSError, ValueError):
        return {}


def write_table(found: list[Any], trials: Trials, ground: Ground) -> None:
    """trials.csv: a row a trial, by number."""
    names = [one.name for one in trials.plan.space]
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["number", "state", "reason", ground.objective, "evaluations", "seconds", *names, "folder"])
    for one in found:
        about = one.user_attrs
        rows.writerow([one.number, one.state.name.lower(), about.get("reason", ""), about.get("score", ""),
                       about.get("evaluations", ""), about.get("seconds", ""),
                       *(one.params.get(name, "") for name in names), Path(about.get("folder", "")).name])
    files.write_text(trials.folder / TABLE, text.getvalue(), follow=False)


def finish(config: RunConfig, trials: Trials, ground: Ground, whole: Inputs) -> int:
    """All that follows the last trial. `whole`: the inputs with the test split. Returns 0."""
    found = trials.all()
    write_table(found, trials, ground)
    leaders = ranked(found, ground.rises)
    tell(found, leaders, trials, ground)
    if n_others := trials.others():
        logs.notice(f"{counted(n_others, 'trial')} of other processes still "
                    f"{'runs' if n_others == 1 else 'run'}; the process that ends last runs the finalists")
        return 0
    unfinished = [one for one in found if not one.state.is_finished()]
    if unfinished:
        logs.notice(f"{counted(len(unfinished), 'trial')} of a process that was killed is not finished; the same "
                    "command goes on with it")
    if not leaders:
        logs.notice("no trial was trained to its end, so there is nothing to run again")
        return 0
    with files.locked(trials.folder / LOCK) as is_ours:
        if is_ours:
            crown(config, leaders, trials, ground, whole)
        else:
            logs.notice("another process runs the finalists")
    return 0


def tell(found: list[Any], leaders: list[Any], trials: Trials, ground: Ground) -> None:
    """The leaders, what matters, what pruning saved."""
    states = [one.state.name for one in found]
    failed = [one for one in found if one.state.name == "FAIL"]
    pruned = [one for one in found if one.user_attrs.get("reason") == "pruned"]
    late = states.count("PRUNED") - len(pruned)
    logs.say(f"trials :: {len(found)}: {states.count('COMPLETE')} complete, {len(pruned)} pruned, "
             + (f"{late} ended by --timeout, " if late else "") + f"{len(failed)} failed")
    for one in failed:
        logs.say(f"failed :: trial {one.number}: {one.user_attrs.get('reason', 'unknown')}")
    for one in leaders[:LEADERS]:
        logs.say(f"leader :: trial {one.number}: {ground.objective} {one.value:.3f}, {spaces.in_words(one.params)}")
    if pruned:
        done = sum(one.user_attrs.get("evaluations", 0) for one in pruned)
        planned = sum(one.user_attrs.get("planned", 0) for one in pruned)
        whole = sum(one.user_attrs.get("planned", 0) for one in found)
        logs.say(f"pruned :: {len(pruned)} of {counted(len(found), 'trial')}, after {done} of their "
                 f"{counted(planned, 'evaluation')}: {planned - done} of the search's {whole} were saved")
    found_important = importances(trials) if len(leaders) >= FEWEST else {}
    files.write_json(trials.folder / ABOUT, {**read_about(trials.folder / ABOUT), "importances": found_important})
    for name, value in found_important.items():
        logs.say(f"importance :: {name} {value:.2f}")
    if found_important and len(leaders) < ENOUGH:
        logs.notice(f"importances of {counted(len(leaders), 'complete trial')} say little; of {ENOUGH} and more they "
                    "begin to")


def importances(trials: Trials) -> dict[str, float]:
    """How much of the differences in the score each parameter explains (fANOVA, Hutter et al. 2014), the largest first;
    {} where the trials do not say it. Parameters with a condition, which some trials do not have, are left out."""
    import optuna

    names = [one.name for one in trials.plan.space if not one.conditions]
    try:
        return optuna.importance.get_param_importances(
            trials.study, params=names, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=trials.plan.seed))
    except (ValueError, RuntimeError):  # too few trials, or all have the same score
        return {}


# --------------------------------------------------------------------------- once more, with new seeds


def crown(config: RunConfig, leaders: list[Any], trials: Trials, ground: Ground, whole: Inputs) -> None:
    """Run the best trials again with new seeds, look at the test set for the winner, say what repeats it."""
    best = leaders[0]
    first_new = config.seed + (config.seeds or 1)
    seeds = list(range(first_new, first_new + config.final_seeds))
    again = [run_again(one, seeds, trials, ground) for one in leaders[: config.finalists]]
    runs = [one for one in again if one.scores]
    about: dict[str, Any] = {"trials": len(trials.all()), "best_trial": best.number, "best_score": best.value}
    if runs:
        # One whose seeds have failed may owe its mean to the few that did not, so it comes behind the others.
        runs.sort(key=lambda one: (one.n_failed, -one.mean if ground.rises else one.mean, one.number))
        for one in runs:
            logs.say(f"finalist :: trial {one.number}: {one.before:.3f} in the search, {one.in_words()} with "
                     f"{counted(len(one.scores), 'new seed')}")
        winner = runs[0]
        lucky = next((one for one in runs if one.number == best.number), None)
        if lucky:
            gain = (best.value - lucky.mean) * (1 if ground.rises else -1)
            luck = f"being chosen for its luck had flattered it by {gain:.3f}" if gain > 0 else "it was not flattered"
            logs.say(f"again :: the best trial had {best.value:.3f}; with new seeds {lucky.in_words()}: {luck}")
        pick = max if ground.rises else min
        seed = pick(sorted(winner.scores), key=lambda s: winner.scores[s])
        chosen, folder = replace(winner.config, seed=seed), final_folder(trials, winner.number, seed)
        score = winner.in_words()
        about["finalists"] = [{"trial": one.number, "before": one.before, "scores": one.scores, "mean": one.mean}
                              for one in runs]
    else:
        chosen, score = spaces.configured(ground.config, best.params), f"{best.value:.3f}"
        folder = trials.folder_of(best.number)
        folder = folder if folder.is_dir() else Path(best.user_attrs["folder"])  # begun by another machine
        folder = folder / (f"seed-{config.seed}" if config.seeds else "")
        winner = Finalist(best.number, chosen, best.value, {})
    params = next(one.params for one in leaders if one.number == winner.number)
    logs.say(f"winner :: trial {winner.number}: {ground.objective} {score}, {spaces.in_words(params)}")
    logs.say(f"winner's run :: {folder}")
    compare_with_baselines(winner.mean if winner.scores else best.value, ground)
    chosen = with_test(chosen, config)
    about |= {"winner": winner.number, "winner_run": str(folder), "repeat": trial.command(chosen)}
    known = read_about(trials.folder / ABOUT)
    before = known.get("test") if known.get("winner_run") == str(folder) else None
    if "test" in whole.splits:
        about["test"] = before or look_at_test(chosen, folder, ground, whole)
        if before:
            logs.say(f"test acc :: {before['acc']:.3f}")
    files.write_json(trials.folder / ABOUT, {**known, **about})
    logs.say(f"repeat :: {about['repeat']}")


def compare_with_baselines(score: float, ground: Ground) -> None:
    """What the winner has to beat on dev."""
    known = ground.baselines.get("dev")
    if known is None:
        return
    logs.say(f"dev baselines :: {scores.baselines_text(known)}")
    beaten_by = [name for name, acc in (("the majority class", known.majority), ("TF-IDF", known.tfidf))
                 if score <= acc]
    if ground.objective == "dev_acc" and beaten_by:
        logs.warn(f"the winner is no better on dev than {' and '.join(beaten_by)}")


def with_test(chosen: RunConfig, config: RunConfig) -> RunConfig:
    """A trial's options with the test file that was typed for the search."""
    if "test" not in config.given:
        return chosen
    return replace(chosen, test=config.test, given=chosen.given | {"test"})


def final_folder(trials: Trials, number: int, seed: int) -> Path:
    return trials.folder / f"final-{number:04d}-seed-{seed}"


def run_again(one: Any, seeds: list[int], trials: Trials, ground: Ground) -> Finalist:
    """A trial once more with each of the new seeds. One that fails is said, and has no score."""
    config = spaces.configured(ground.config, one.params)
    found = {}
    for seed in seeds:
        folder = final_folder(trials, one.number, seed)
        outcome = trial.run_trial(one.params, folder, [seed], 0, ground, lambda value, n: False, None)
        if outcome.score is None or math.isnan(outcome.score):
            logs.warn(f"{folder}: {outcome.reason}")
        else:
            found[seed] = outcome.score
    return Finalist(one.number, config, one.value, found, len(seeds) - len(found))


def look_at_test(config: RunConfig, folder: Path, ground: Ground, whole: Inputs) -> dict[str, float]:
    """The scores on the test split of the best weights of a finished run. Prints them beside the baselines, and keeps
    the predictions in the run's folder."""
    trial.free_memory()
    run, split = RunFolder(folder), whole.splits["test"]
    inputs = replace(ground.inputs, splits={**ground.inputs.splits, "test": split})
    job = jobs.build_job(config, inputs, ground.device)
    best_folder.check_best(run.best, run.known_manifest()[0])
    saved.load_classifier_state(run.best, job.model)
    log_probs = job.task.predict(split, "test")
    metrics.check_finite(log_probs, f"{folder}: test")
    with logs.doing("computing the baselines"):
        known = results.find_baselines(config, run_inputs.limit_train(config, inputs).splits["train"], {"test": split})
    found = results.report_splits(config, {"test": split}, {"test": log_probs}, {"test": run.predictions("test")},
                                  inputs.names, known)["test"]
    return {name: value for name, value in found.items() if isinstance(value, float)}
