"""The end of a search: the leaders, the best of them again with new seeds, the test set for the winner alone, and the
one command that repeats it."""

import csv
import io
import math
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from commands import job as jobs
from commands import results, trial
from commands import space as spaces
from commands.inputs import Inputs
from commands.study import Trials
from commands.trial import Ground
from config import RunConfig, counted
from formats import files
from training import best as best_folder
from training import logs, metrics, saved
from training.run_folder import RunFolder

TABLE, ABOUT, LOCK = "trials.csv", "search.json", ".finalists.lock"
LEADERS = 10  # that are shown
ENOUGH = 20  # trials, for the importance of a parameter to say something


@dataclass(frozen=True)
class Finalist:
    """A trial that was run again: its options but for seed and folder, its score in the search, and the score of each
    new seed."""

    number: int
    config: RunConfig
    before: float
    scores: dict[int, float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.scores.values())

    def in_words(self) -> str:
        """0.497 +- 0.008"""
        spread = f" +- {statistics.stdev(self.scores.values()):.3f}" if len(self.scores) > 1 else ""
        return f"{self.mean:.3f}{spread}"


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
    running = [one for one in found if one.state.name in ("RUNNING", "WAITING")]
    if running:
        logs.notice(f"{counted(len(running), 'trial')} of other processes still run; the one that ends last runs the "
                    "finalists")
        return 0
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
    logs.say(f"trials :: {len(found)}: {states.count('COMPLETE')} complete, {states.count('PRUNED')} pruned, "
             f"{len(failed)} failed")
    for one in failed:
        logs.say(f"failed :: trial {one.number}: {one.user_attrs.get('reason', 'unknown')}")
    for one in leaders[:LEADERS]:
        logs.say(f"leader :: trial {one.number}: {ground.objective} {one.value:.3f}, {spaces.in_words(one.params)}")
    pruned = [one for one in found if one.state.name == "PRUNED"]
    if pruned:
        done = sum(one.user_attrs.get("evaluations", 0) for one in pruned)
        planned = len(pruned) * trials.plan.n_evaluations
        logs.say(f"pruned :: {len(pruned)} of {counted(len(found), 'trial')}: {done} of their "
                 f"{counted(planned, 'evaluation')} were made, {planned - done} were saved")
    found_important = importances(trials)
    files.write_json(trials.folder / ABOUT, {**read_about(trials.folder / ABOUT), "importances": found_important})
    for name, value in found_important.items():
        logs.say(f"importance :: {name} {value:.2f}")
    if 1 < len(leaders) < ENOUGH:
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
        runs.sort(key=lambda one: (-one.mean if ground.rises else one.mean, one.number))
        for one in runs:
            logs.say(f"finalist :: trial {one.number}: {one.before:.3f} in the search, {one.in_words()} with "
                     f"{counted(len(one.scores), 'new seed')}")
        winner = runs[0]
        lucky = next((one for one in runs if one.number == best.number), None)
        if lucky:
            logs.say(f"flattered :: the best trial had {best.value:.3f}; again with new seeds {lucky.in_words()}")
        pick = max if ground.rises else min
        seed = pick(sorted(winner.scores), key=lambda s: winner.scores[s])
        chosen, folder = replace(winner.config, seed=seed), final_folder(trials, winner.number, seed)
        score = winner.in_words()
        about["finalists"] = [{"trial": one.number, "before": one.before, "scores": one.scores, "mean": one.mean}
                              for one in runs]
    else:
        chosen, score = spaces.configured(ground.config, best.params), f"{best.value:.3f}"
        folder = Path(best.user_attrs["folder"]) / (f"seed-{config.seed}" if config.seeds else "")
        winner = Finalist(best.number, chosen, best.value, {})
    params = next(one.params for one in leaders if one.number == winner.number)
    logs.say(f"winner :: trial {winner.number}: {ground.objective} {score}, {spaces.in_words(params)}")
    logs.say(f"winner's run :: {folder}")
    chosen = with_test(chosen, config)
    about |= {"winner": winner.number, "winner_run": str(folder), "repeat": trial.command(chosen)}
    known = read_about(trials.folder / ABOUT)
    before = known.get("test") if known.get("winner_run") == str(folder) else None
    if "test" in whole.splits:
        about["test"] = before or look_at_test(chosen, folder, ground, whole)
        logs.say(f"test acc :: {about['test']['acc']:.3f}")
    files.write_json(trials.folder / ABOUT, {**known, **about})
    logs.say(f"repeat :: {about['repeat']}")


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
    scores = {}
    for seed in seeds:
        folder = final_folder(trials, one.number, seed)
        outcome = trial.run_trial(one.params, folder, [seed], 0, ground, lambda value, n: False, None)
        if outcome.score is None or math.isnan(outcome.score):
            logs.warn(f"{folder}: {outcome.reason}")
        else:
            scores[seed] = outcome.score
    return Finalist(one.number, config, one.value, scores)


def look_at_test(config: RunConfig, folder: Path, ground: Ground, whole: Inputs) -> dict[str, float]:
    """The scores on the test split of the best weights of a finished run."""
    run = RunFolder(folder)
    inputs = replace(ground.inputs, splits={**ground.inputs.splits, "test": whole.splits["test"]})
    job = jobs.build_job(config, inputs, ground.device)
    best_folder.check_best(run.best, run.known_manifest()[0])
    saved.load_classifier_state(run.best, job.model)
    split = whole.splits["test"]
    log_probs = job.task.predict(split, "test")
    metrics.check_finite(log_probs, f"{folder}: test")
    results.print_baselines(config, ground.inputs.splits["train"], {"test": split})
    return metrics.score(log_probs, split.labels, results.is_ordinal(config))
