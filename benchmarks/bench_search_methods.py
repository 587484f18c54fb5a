"""The methods of --option search on a closed form whose optimum is known.

    python -m benchmarks.bench_search_methods --repeats 30 --evaluations 27

The error of a "run" at its e-th evaluation is error(point) + 0.8 exp(-e / pace(point)), where the error of a
point is its squared distance from the optimum, and better points are not always faster ones. Regret: the smallest error
at the last evaluation of a trial that was not ended before. Each repetition has the same seed for all the methods.
Prints the median regret, the evaluations that were made, and in how many repetitions a method is at least as good as
chance without pruning.
"""

import argparse
import math
import statistics
import warnings
from functools import partial

import optuna

from commands import space as spaces
from commands import study
from commands.study import Plan

SPACE = spaces.parse("lr=log:1e-6..1e-1 hidden_dropout_prob=0..0.9 weight_decay=0..1 optimizer=adamw|lion "
                     "batch_size=16|32|64")
SETTINGS = {"random": "none", "tpe": "none", "gp": "none", "hyperband": "hyperband", "bohb": "hyperband"}


def error(point: dict) -> float:
    """0 at lr 1e-3, dropout 0.3, weight decay 0.5, adamw, 32 sentences."""
    return (((math.log10(point["lr"]) + 3) / 3) ** 2 + (point["hidden_dropout_prob"] - 0.3) ** 2
            + (point["weight_decay"] - 0.5) ** 2 + 0.05 * (point["optimizer"] != "adamw")
            + 0.03 * (point["batch_size"] != 32))


def curve(point: dict, e: int) -> float:
    """The error at the e-th evaluation."""
    pace = 1 + 2 * point["hidden_dropout_prob"] + 0.5 * (point["optimizer"] == "lion")
    return error(point) + 0.8 * math.exp(-e / pace)


def searched(method: str, seed: int, n_trials: int, n_evaluations: int) -> tuple[float, int]:
    """The regret of a search, and how many evaluations it made."""
    plan = Plan(SPACE, method, SETTINGS[method], False, n_trials, n_evaluations, seed)
    done = optuna.create_study(study_name=study.STUDY, direction="minimize", pruner=study.make_pruner(plan))
    n = 0
    for _ in range(n_trials):
        point = study.propose(plan, None, None, done.get_trials())
        done.enqueue_trial(point)
        trial = done.ask()
        spaces.walk(SPACE, partial(study.suggest, trial))
        for e in range(1, n_evaluations + 1):
            n += 1
            trial.report(curve(point, e), e)
            if e < n_evaluations and trial.should_prune():
                done.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            done.tell(trial, curve(point, n_evaluations))
    complete = [one for one in done.trials if one.state == optuna.trial.TrialState.COMPLETE]
    return min(error(one.params) for one in complete), n


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--repeats", type=int, default=30)
    arguments.add_argument("--trials", type=int, default=30)
    arguments.add_argument("--evaluations", type=int, default=9, help="of a trial")
    arguments.add_argument("--seed", type=int, default=0, help="of the first repetition")
    arguments.add_argument("--methods", nargs="+", choices=SETTINGS, default=["random", "tpe", "hyperband", "bohb"])
    asked = arguments.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore")
    seeds = range(asked.seed, asked.seed + asked.repeats)
    found = {method: [searched(method, seed, asked.trials, asked.evaluations) for seed in seeds]
             for method in asked.methods}
    print(f"{asked.trials} trials of {asked.evaluations} evaluations, {asked.repeats} repetitions")
    chance = [regret for regret, _ in found.get("random", [])]
    for method, results in found.items():
        regrets = [regret for regret, _ in results]
        wins = sum(own <= other for own, other in zip(regrets, chance, strict=False))
        print(f"{method:10} median regret {statistics.median(regrets):.4f}, "
              f"{statistics.mean(n for _, n in results):.0f} evaluations, as good as chance or better in {wins}")


if __name__ == "__main__":
    main()
