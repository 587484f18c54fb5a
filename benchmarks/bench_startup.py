"""How long a user waits: `--help`, and from the command to the end of the first training step.

    python -m benchmarks.bench_startup [--rounds 5]

Whole processes, in turn: `run_llama.py --help`; `import torch`, which every run pays; our fine-tuning of SmolLM2-135M
(the model on disk, batch 8) up to the first line of steps.jsonl; and transformers' Llama of that shape, with random
weights, to the end of its first step. Writes benchmarks/results/startup-cpu.json.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.measure import ROOT, machine, need, write

THEIRS = """
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification
model = LlamaForSequenceClassification(LlamaConfig(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    vocab_size=49152, num_labels=5, pad_token_id=0))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
model(input_ids=torch.randint(1, 49152, (8, 18)), labels=torch.zeros(8, dtype=torch.long)).loss.backward()
optimizer.step()
"""


def whole(command: list[str]) -> float:
    """Seconds of a process, from its start to its end."""
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - start


def first_step(train: Path, dev: Path) -> float:
    """Seconds from the command to the first line of steps.jsonl; then the run is killed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "run_llama.py", "--option", "finetune", "--train", str(train), "--dev", str(dev),
             "--pretrained_model_path", "models/smollm2-135m.gguf", "--output_dir", str(out)],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        steps = out / "steps.jsonl"
        while not (steps.exists() and steps.stat().st_size):
            if process.poll() is not None:
                raise SystemExit(f"the run ended with {process.returncode} before its first step")
            time.sleep(0.01)
        spent = time.perf_counter() - start
        process.kill()
        process.wait()
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    name = "sst" if (ROOT / "data" / "sst-train.txt").is_file() else "movies"
    files = [ROOT / "data" / f"{name}-{split}.txt" for split in ("train", "dev")]
    need("models/smollm2-135m.gguf", *(str(file.relative_to(ROOT)) for file in files))
    python = sys.executable
    ways = {"--help": lambda: whole([python, "run_llama.py", "--help"]),
            "import torch": lambda: whole([python, "-c", "import torch"]),
            "ours, first step": lambda: first_step(*files),
            "transformers, first step": lambda: whole([python, "-c", THEIRS])}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(options.rounds + 1):
        for way, do in ways.items():
            spent = do()
            if turn:  # the first fills the disk's cache
                times[way].append(spent)
    for way, found in times.items():
        print(f"{way:25} {median(found):6.2f} s ({min(found):.2f} to {max(found):.2f})")

    write("startup-cpu", {"machine": machine(), "seconds": times,
                          "medians": {way: median(found) for way, found in times.items()}})


if __name__ == "__main__":
    main()
