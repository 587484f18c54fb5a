"""What each way of training costs and what it gives: full fine-tuning, adapters of four ranks, the head alone, and the
upper layers alone, on the first layers of SmolLM2-135M and movies.

    python -m benchmarks.bench_adapters --cost [--rounds 3]          # in turn, each in a process of its own
    python -m benchmarks.bench_adapters --accuracy [--jobs 2]        # one thread each

Cost: run_llama.py, killed in its first epoch: sentences a second (real tokens a second over the mean length), the
process's memory at its largest, and the bytes of a state in last/, moments included. Accuracy: the rate is chosen on
dev, with a seed of its own, out of RATES; then dev and test of three other seeds with it. Both parts write into
benchmarks/results/adapters-cpu.json.
"""

import argparse
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median, stdev

from benchmarks.bench_train import lines_of, run
from benchmarks.measure import RESULTS, ROOT, limits, machine, need, write
from config import RunConfig
from dataset import load_split
from tokenizer import Tokenizer
from training.device import choose_device

ADAPTERS = {f"LoRA, r {r}": ["--lora_r", str(r)] for r in (8, 16, 32, 64)}
HEAD_LR = "full, a rate for the head"
WAYS = {"full": [], HEAD_LR: ["--head_lr", "4e-3"], **ADAPTERS, "head only": ["--freeze", "backbone"],
        "first:2": ["--freeze", "first:2"], "first:4": ["--freeze", "first:4"]}
RATES = {HEAD_LR: ["5.5e-4"], "head only": ["3e-3", "1e-2", "3e-2"],
         **dict.fromkeys(ADAPTERS, ["5e-4", "1e-3", "2e-3", "4e-3", "8e-3"])}
USUAL = ["3e-4", "5.5e-4", "1e-3"]
SEED_OF_RATES, SEEDS = 11, (1, 2, 3)


def command(options: argparse.Namespace, way: str, lr: str, out: Path) -> list[str]:
    """As a user would type it."""
    return [sys.executable, "run_llama.py", "--option", "finetune", "--dataset", "movies", "--pretrained_model_path",
            "smollm2-135m", "--attention", "bidirectional", "--pooling", "mean", "--hidden_dropout_prob", "0.1",
            "--n_layers", str(options.n_layers), "--batch_size", str(options.batch_size), "--lr", lr,
            "--output_dir", str(out), *WAYS[way]]


def bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def cost(options: argparse.Namespace) -> dict:
    """Of each way: samples a second in each round, memory, and the size of a state."""
    tokenizer = Tokenizer(tokenizer_model=ROOT / "models" / "smollm2-135m.gguf")
    length = load_split(ROOT / "data" / "movies-train.txt", tokenizer, 2048).lengths.mean()
    found: dict[str, dict] = {way: {"samples_per_second": [], "peak_bytes": []} for way in WAYS}
    for turn in range(options.rounds):
        for way, measured in found.items():
            with tempfile.TemporaryDirectory() as place:
                out = Path(place, "run")
                line = [*command(options, way, USUAL[0], out), "--train_limit", "2000", "--epochs", "2", "--save_every",
                        str(options.steps)]
                _, _, peak = run(line, lambda out=out: lines_of(out / "steps.jsonl") > options.steps)
                steps = [json.loads(one) for one in (out / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
                spent = steps[options.steps - 1]["seconds"] - steps[0]["seconds"]
                rate = sum(one["tokens"] for one in steps[1 : options.steps]) / spent / length
                measured["samples_per_second"].append(rate)
                measured["peak_bytes"].append(peak)
                states = [bytes_below(one) for one in (out / "last").iterdir() if one.is_dir()]
                measured["state_bytes"] = max(states)
            print(f"round {turn + 1}, {way}: {rate:.1f} samples/s, {peak / 2**30:.2f} GiB, a state of "
                  f"{measured['state_bytes'] / 2**20:.1f} MiB", flush=True)
    return found


def accuracy(options: argparse.Namespace) -> dict:
    """Of each way: the rate that was best on dev, and what three seeds have with it."""
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(options.jobs) as pool:
        def one(way: str, lr: str, seed: int) -> dict:
            out = Path(place, f"{way}-{lr}-{seed}".replace(" ", "").replace(":", "-"))
            line = [*command(options, way, lr, out), "--epochs", str(options.epochs), "--train_limit",
                    str(options.train_limit), "--seed", str(seed)]
            run(line)
            result = json.loads((out / "result.json").read_text(encoding="utf-8"))
            rates = [[result[split]["acc"], result["baselines"][split]["tfidf"]] for split in ("dev", "test")]
            best = bytes_below(out / "best")
            (out / "best" / "model.safetensors").unlink()
            print(f"{way}, lr {lr}, seed {seed}: dev {rates[0][0]:.4f}, test {rates[1][0]:.4f} (tf-idf "
                  f"{rates[0][1]:.3f}, {rates[1][1]:.3f})", flush=True)
            return {"dev": rates[0][0], "test": rates[1][0], "tfidf": [rates[0][1], rates[1][1]], "best_bytes": best}

        tried = {(way, lr): pool.submit(one, way, lr, SEED_OF_RATES) for way in WAYS for lr in RATES.get(way, USUAL)}
        devs = {way: {lr: tried[way, lr].result()["dev"] for lr in RATES.get(way, USUAL)} for way in WAYS}
        rates = {way: max(found, key=found.__getitem__) for way, found in devs.items()}
        runs = {way: [pool.submit(one, way, lr, seed) for seed in SEEDS] for way, lr in rates.items()}
        return {way: {"lr": rates[way], "dev_of_rates": devs[way], "runs": [done.result() for done in runs[way]]}
                for way in WAYS}


def table(result: dict) -> str:
    """The lines for docs/lora.md."""
    lines = []
    for way in WAYS:
        spent, got = (result.get(part, {}).get(way) for part in ("cost", "accuracy"))
        cells = [way]
        if spent:
            cells += [f"{median(spent['samples_per_second']):.0f}", f"{max(spent['peak_bytes']) / 2**30:.2f}",
                      f"{spent['state_bytes'] / 2**20:.3g}"]
        if got:
            cells += [f"{got['runs'][0]['best_bytes'] / 2**20:.1f}", got["lr"]]
            for split in ("dev", "test"):
                values = [one[split] for one in got["runs"]]
                cells.append(f"{mean(values):.3f} +- {stdev(values):.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--accuracy", action="store_true")
    parser.add_argument("--n_layers", type=int, default=6)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20, help="of a cost, the first not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--train_limit", type=int, default=2000)
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    need("models/smollm2-135m.gguf", "data/movies-train.txt", "data/movies-dev.txt", "data/movies-test.txt")
    path = RESULTS / "adapters-cpu.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    dtype = choose_device(RunConfig(device="cpu")).dtype
    if options.cost:
        before = limits(dtype)
        result |= {"cost": cost(options), "cost_machine": machine(), "cost_limits": [before, limits(dtype)]}
    if options.accuracy:
        os.environ["OMP_NUM_THREADS"] = "1"
        result |= {"accuracy": accuracy(options), "accuracy_machine": machine()}
    print(table(result))
    write("adapters-cpu", {**result, "dtype": str(dtype), "options": vars(options)})


if __name__ == "__main__":
    main()
