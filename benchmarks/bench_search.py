"""A search by ours and by transformers' Trainer.hyperparameter_search, in turn, on SmolLM2-135M's first layers.

    python -m benchmarks.bench_search [--rounds 3] [--trials 12] [--n_layers 2] [--sentences 2000] [--epochs 2]

Both have the same pretrained weights, sentences and tokens, the same space (rate, batch, warmup, weight decay),
Optuna's TPE with the same number of trials drawn by chance, its median pruner, an evaluation after each epoch, a causal
model that pools the last token, a linear schedule, the same precision and threads. Each is a process of its own, whose
wall time is measured from its start to its end. Ours does what it does for a user, but for the finalists, which the
other side does not have: each trial keeps its best weights and its report. Theirs keeps nothing. A score of ours is the
best evaluation of a trial, theirs is the last one, as the Trainer has it; beside it stands the best of all evaluations
of all trials, by which both can be compared. Writes benchmarks/results/search-cpu.json. Needs requirements-dev.txt.
"""

import argparse
import csv
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_train import padded, run
from benchmarks.measure import ROOT, limits, machine, need, ratio, write
from config import RunConfig
from tokenizer import Tokenizer
from training.device import choose_device

MODEL = ROOT / "models" / "smollm2-135m.gguf"
SPACE = "lr=log:1e-4..3e-3 batch_size=16|32 warmup_ratio=0..0.2 weight_decay=log:1e-3..1e-1"
BY_CHANCE = 5  # trials, before TPE begins


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """The sentences, and the first layers as a folder that transformers loads."""
    from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

    for split, count in (("train", options.sentences), ("dev", None)):
        lines = (ROOT / "data" / f"movies-{split}.txt").read_text(encoding="utf-8").splitlines()
        part = random.Random(0).sample(lines, min(count or len(lines), len(lines)))
        (folder / f"{split}.txt").write_text("\n".join(part) + "\n", encoding="utf-8")
    whole = AutoModelForCausalLM.from_pretrained(MODEL.parent, gguf_file=MODEL.name, dtype=torch.float32)
    if hasattr(whole.config, "quantization_config"):
        del whole.config.quantization_config  # the weights are not quantised any more, and a Trainer believes it
    whole.config.num_hidden_layers, whole.config.num_labels = options.n_layers, 5
    whole.config.pad_token_id = Tokenizer(tokenizer_model=MODEL).pad_id
    torch.manual_seed(0)
    part_of_it = LlamaForSequenceClassification(whole.config)
    part_of_it.model.load_state_dict(whole.model.state_dict(), strict=False)
    part_of_it.save_pretrained(folder / "model")


# --------------------------------------------------------------------------- a search each, in its own process


def ours(options: argparse.Namespace, folder: Path, seed: int) -> dict[str, Any]:
    """run_llama.py, as a user would type it."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place, "search")
        _, seconds, peak = run(
            [sys.executable, "run_llama.py", "--option", "search", "--train", str(folder / "train.txt"), "--dev",
             str(folder / "dev.txt"), "--pretrained_model_path", str(MODEL), "--n_layers", str(options.n_layers),
             "--epochs", str(options.epochs), "--patience", "0", "--attention", "causal", "--pooling", "last",
             "--scheduler", "linear", "--hidden_dropout_prob", "0", "--dtype", options.dtype, "--device", "cpu",
             "--space", SPACE, "--trials", str(options.trials), "--finalists", "0", "--seed", str(seed),
             "--output_dir", str(out)])
        with open(out / "trials.csv", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        evaluations = [json.loads(line)["dev_acc"] for path in out.glob("trial-*/epochs.jsonl")
                       for line in path.read_text(encoding="utf-8").splitlines()]
    complete = [float(row["dev_acc"]) for row in rows if row["state"] == "complete"]
    return {"seconds": seconds, "peak_bytes": peak, "score": max(complete), "best_evaluation": max(evaluations),
            "complete": len(complete), "evaluations": len(evaluations)}


def theirs(options: argparse.Namespace, folder: Path, seed: int) -> dict[str, Any]:
    same = [f"--{k}={getattr(options, k)}" for k in ("dtype", "trials", "epochs")]
    out, seconds, peak = run([sys.executable, "-m", "benchmarks.bench_search", "--worker", str(folder), "--seed",
                              str(seed), *same])
    return {"seconds": seconds, "peak_bytes": peak, **json.loads(out.splitlines()[-1])}


def worker(options: argparse.Namespace) -> None:
    """Search with the Trainer in this process, and print the result as a line of JSON."""
    import optuna
    from transformers import LlamaForSequenceClassification, Trainer, TrainingArguments

    folder = Path(options.worker)
    tokenizer = Tokenizer(tokenizer_model=MODEL)
    splits = {}
    for split in ("train", "dev"):
        lines = (folder / f"{split}.txt").read_text(encoding="utf-8").splitlines()
        pairs = (line.split(" ||| ", 1) for line in lines)
        splits[split] = [(int(label), tokenizer.encode(text, bos=tokenizer.add_bos, eos=False))
                         for label, text in pairs]
    evaluations: list[float] = []

    def accuracy(found) -> dict[str, float]:
        evaluations.append(float((found.predictions.argmax(-1) == found.label_ids).mean()))
        return {"acc": evaluations[-1]}

    def space(trial) -> dict[str, Any]:
        return {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 3e-3, log=True),
                "per_device_train_batch_size": trial.suggest_categorical("per_device_train_batch_size", [16, 32]),
                "warmup_steps": trial.suggest_float("warmup_steps", 0, 0.2),
                "weight_decay": trial.suggest_float("weight_decay", 1e-3, 1e-1, log=True)}

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with tempfile.TemporaryDirectory() as place:
        arguments = TrainingArguments(
            place, num_train_epochs=options.epochs, per_device_eval_batch_size=64, eval_strategy="epoch",
            seed=options.seed, bf16=options.dtype == "bfloat16", use_cpu=True, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True)
        trainer = Trainer(
            model_init=lambda: LlamaForSequenceClassification.from_pretrained(folder / "model"), args=arguments,
            train_dataset=splits["train"], eval_dataset=splits["dev"], compute_metrics=accuracy,
            data_collator=lambda part: padded(part, tokenizer.pad_id))
        best = trainer.hyperparameter_search(
            hp_space=space, backend="optuna", n_trials=options.trials, direction="maximize",
            compute_objective=lambda metrics: metrics["eval_acc"],
            sampler=optuna.samplers.TPESampler(seed=options.seed, n_startup_trials=BY_CHANCE, multivariate=True),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1))
    print(json.dumps({"score": best.objective, "best_evaluation": max(evaluations), "evaluations": len(evaluations)}))


# --------------------------------------------------------------------------- the comparison


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("rounds", 3), ("trials", 12), ("n_layers", 2), ("sentences", 2000), ("epochs", 2),
                          ("seed", 1)):
        arguments.add_argument(f"--{name}", type=int, default=default)
    arguments.add_argument("--dtype", default="auto")
    arguments.add_argument("--worker", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.worker:
        worker(options)
        return
    need("models/smollm2-135m.gguf", "data/movies-train.txt", "data/movies-dev.txt")
    device = choose_device(RunConfig(device="cpu", dtype=options.dtype))
    options.dtype = str(device.dtype).removeprefix("torch.")
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "trainer": []}
    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place), options)
        ends = [limits(device.dtype)]
        for turn in range(options.rounds):
            for name, search in (("ours", ours), ("trainer", theirs)):
                found[name].append(search(options, Path(place), options.seed + turn))
                print(f"round {turn + 1}, {name}:", ", ".join(f"{k} {v:.5g}" for k, v in found[name][-1].items()),
                      flush=True)
            ends.append(limits(device.dtype))
    speed = ratio([one["seconds"] for one in found["trainer"]], [one["seconds"] for one in found["ours"]])
    print(f"ours is {speed['of_medians']:.2f} times as fast as the Trainer's search")
    write("search-cpu", {"machine": machine(), "limits": ends, "dtype": options.dtype, "space": SPACE, **{
        k: getattr(options, k) for k in ("trials", "n_layers", "sentences", "epochs", "seed")},
        "measurements": found, "trainer_seconds_over_ours": speed})


if __name__ == "__main__":
    main()
