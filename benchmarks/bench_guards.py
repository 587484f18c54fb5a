"""Do the guards leave healthy runs alone, and do they notice and save those that diverge?

    python -m benchmarks.bench_guards [--healthy 200] [--diverging 50] [--only healthy]

Small random models (2 layers of 32 dimensions), data made here. A run is drawn from its number: its data (two classes
that a word decides, with 0 to 20% of the labels flipped and up to 99 of 100 sentences in one class; five ordered ones
where about half can be right, like SST), batch 1 to 80, all schedules, class weights, a balanced sampler, dropout,
R-drop, label smoothing, moving averages, augmentation, four optimizers; for healthy runs also 60 to 1,000 training
sentences and 1 to 20 evaluations an epoch.

Healthy runs have a rate at which such models learn. A false alarm is a rollback, or an end before the last epoch.

Runs that diverge are looked for at rates 10 to 30,000 times larger: those that with --guards off end no better than the
majority class, or with a training loss above that of guessing. Such a run is noticed when the program says so: by a
rollback, or by its diagnosis at the end. It is saved when with --guards on it beats the majority class by more than
chance. Whether a lower rate saves it is tried with --guards off: the rate times 0.1, 0.01 and 0.001, which are those of
the three rollbacks.

Writes benchmarks/results/guards-healthy.json and guards-diverging.json. About 25 minutes each.
"""

import argparse
import contextlib
import io
import json
import math
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

import run_llama
from benchmarks.measure import machine, write
from tests import tiny

SCHEDULES = {
    "constant": [], "linear": [], "cosine": [], "cosine_restarts": ["--cycles", "3"], "linear_cosine": [],
    "step": ["--step_size", "40"], "multistep": ["--milestones", "30,60"], "exponential": ["--gamma", "0.995"],
    "natural_exp": ["--decay_rate", "0.005"], "inverse_time": ["--decay_rate", "0.01"], "polynomial": [],
    "inverse_sqrt": [], "cyclic": ["--cycles", "3"], "one_cycle": [], "wsd": [], "plateau": ["--plateau_patience", "1"],
}
RATES = {"adamw": (5e-4, 5e-3), "sgd": (1e-2, 1e-1), "lion": (1e-4, 6e-4), "adafactor": (5e-4, 5e-3)}
EXTRAS = {"--class_weights": ["balanced"], "--sampler": ["balanced"], "--label_smoothing": ["0.1"], "--r_drop": ["1"],
          "--ema": ["0.99"], "--dropout": ["0.1"], "--aug_delete": ["0.1"], "--pooling": ["mean", "max"],
          "--hidden_dropout_prob": ["0", "0.5", "0.8"], "--monitor": ["dev_loss", "dev_f1"], "--weight_decay": ["0.01"]}
N_DEV = 200


def drawn_run(number: int, healthy: bool) -> dict[str, Any]:
    """What run `number` is: its data and its options."""
    draw = random.Random(number if healthy else 10_000 + number)
    kind, batch = draw.choice(["two", "two", "five"]), draw.choice([1, 2, 4, 8, 8, 16, 32, 80])
    minority = draw.choice([0.5, 0.5, 0.5, 0.2, 0.05, 0.03, 0.01]) if healthy else 0.5
    optimizer = draw.choice(["adamw"] * 5 + ["sgd", "lion", "adafactor"])
    low, high = RATES[optimizer]
    lr = low * (high / low) ** draw.random() if healthy else high * 10 ** draw.uniform(1, 4.5)
    scheduler = draw.choice(list(SCHEDULES))
    words = ["--batch_size", str(batch), "--optimizer", optimizer, "--scheduler", scheduler, *SCHEDULES[scheduler],
             "--seed", str(number), "--epochs", str(2 if batch < 4 else 4)]
    for option, values in EXTRAS.items():
        if draw.random() < 0.2:
            words += [option, draw.choice(values)]
    flipped, n_train = draw.choice([0, 0.02, 0.05, 0.1, 0.2]), 500 if batch < 4 else 1000
    if healthy:
        n_train = draw.choice([60, 150, 300, n_train, n_train, n_train])
        words += draw.choice([[], [], ["--eval_every", "0.3"], ["--eval_every", "0.05"]])
    return {"number": number, "kind": kind, "flipped": flipped, "minority": minority, "n_train": n_train, "lr": lr,
            "words": words}


class Bench:
    """Runs drawn by their number, in a temporary folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        sentences = [text for _, text in tiny.labelled_sentences(random.Random(0), 400, "five")]
        self.model = tiny.write_model(folder / "model", sentences)

    def run(self, drawn: dict[str, Any], guards: str, rate: float = 1.0) -> dict[str, Any]:
        """Train it at `rate` times its learning rate: how it ended and what was said."""
        draw, files = random.Random(drawn["number"]), {}
        for split, n in (("train", drawn["n_train"]), ("dev", N_DEV)):
            rows = tiny.labelled_sentences(draw, n, drawn["kind"], drawn["flipped"], drawn["minority"])
            rows[:2] = [(0, "dull"), (1, "good")]  # both classes are there
            files[split] = self.folder / f"{split}.txt"
            files[split].write_text("".join(f"{label} ||| {text}\n" for label, text in rows), encoding="utf-8")
        out = self.folder / "run"
        shutil.rmtree(out, ignore_errors=True)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = run_llama.main(
                ["--option", "finetune", "--pretrained_model_path", str(self.model), "--kernels", "off", "--train",
                 str(files["train"]), "--dev", str(files["dev"]), "--output_dir", str(out), "--patience", "0",
                 "--dtype", "float32", "--lr", f"{drawn['lr'] * rate:.3g}", "--guards", guards, *drawn["words"]])
        if code == 2 and guards == "off":  # its weights are not finite, so there is no result
            return {"code": 2, "stopped": "not finite", "rollbacks": 0, "diagnosis": [], "acc": 0.0, "last_acc": 0.0,
                    "majority": None, "train_loss": None, "beats_majority": False, "last_beats": False,
                    "is_worse_than_guessing": True}
        if code not in (0, 3):
            raise SystemExit(f"run {drawn} ended with {code}")
        result = json.loads((out / "result.json").read_text(encoding="utf-8"))
        last = json.loads((out / "epochs.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        majority = result["baselines"]["dev"]["majority"]
        classes = 2 if drawn["kind"] == "two" else 5
        return {"code": code, "stopped": result["stopped"], "rollbacks": result["rollbacks"],
                "diagnosis": result["diagnosis"], "acc": result["dev"]["acc"], "last_acc": last["dev_acc"],
                "majority": majority, "train_loss": last["train_loss"],
                "beats_majority": beats(result["dev"]["acc"], majority), "last_beats": beats(last["dev_acc"], majority),
                "is_worse_than_guessing": last["train_loss"] is None or last["train_loss"] > 1.15 * math.log(classes)}


def beats(acc: float, majority: float) -> bool:
    """Is the accuracy above the majority class's by more than chance (two standard errors)?"""
    return acc - majority > 2 * math.sqrt(majority * (1 - majority) / N_DEV)


def healthy_runs(bench: Bench, n: int) -> dict[str, Any]:
    """Each once with guards; the ones that were touched once more without."""
    runs = []
    for number in range(n):
        drawn = drawn_run(number, healthy=True)
        on = bench.run(drawn, "on")
        is_touched = on["rollbacks"] > 0 or on["stopped"] != "finished"
        runs.append({**drawn, "on": on, "off": bench.run(drawn, "off") if is_touched else None})
    touched = [run for run in runs if run["off"]]
    counts = {"runs": n, "rolled back": sum(run["on"]["rollbacks"] > 0 for run in runs),
              "ended early": sum(run["on"]["stopped"] != "finished" for run in runs),
              "worse than without guards": sum(run["off"]["acc"] - run["on"]["acc"] > 0.1 for run in touched),
              "above the majority class": sum(run["on"]["beats_majority"] for run in runs)}
    return {"counts": counts, "touched": touched}


def diverging_runs(bench: Bench, n: int) -> dict[str, Any]:
    """The first n candidates that diverge without guards, then with them, and at lower rates without."""
    runs, number = [], 0
    while len(runs) < n:
        drawn = drawn_run(number, healthy=False)
        number += 1
        off = bench.run(drawn, "off")
        if off["last_beats"] and not off["is_worse_than_guessing"]:
            continue
        on = bench.run(drawn, "on")
        lower = [bench.run(drawn, "off", rate) for rate in (0.1, 0.01, 0.001)]
        runs.append({**drawn, "off": off, "on": on, "lower": lower,
                     "is_noticed": on["rollbacks"] > 0 or bool(on["diagnosis"]),
                     "lower_rate_saves": any(run["beats_majority"] for run in lower)})
    savable = [run for run in runs if run["lower_rate_saves"]]
    counts = {"candidates": number, "diverging": n, "noticed": sum(run["is_noticed"] for run in runs),
              "rolled back": sum(run["on"]["rollbacks"] > 0 for run in runs), "savable": len(savable),
              "saved": sum(run["on"]["beats_majority"] for run in savable),
              "above the majority class without guards": sum(run["off"]["beats_majority"] for run in runs),
              "above the majority class with guards": sum(run["on"]["beats_majority"] for run in runs)}
    missed = [run for run in runs if not run["is_noticed"] or (run in savable and not run["on"]["beats_majority"])]
    return {"counts": counts, "missed": missed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--healthy", type=int, default=200, metavar="N")
    parser.add_argument("--diverging", type=int, default=50, metavar="N")
    parser.add_argument("--only", choices=("healthy", "diverging"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parts = {"healthy": healthy_runs, "diverging": diverging_runs}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for name in [arguments.only] if arguments.only else parts:
            result = parts[name](bench, getattr(arguments, name))
            for what, count in result["counts"].items():
                print(f"{name}: {what}: {count}", flush=True)
            write(f"guards-{name}", {"machine": machine(), **result})


if __name__ == "__main__":
    main()
