"""How fast LoRA is, and how much memory it takes: ours and peft on transformers, in turn.

    python -m benchmarks.bench_lora [--lora_r 8] [--steps 8] [--batch_size 32] [--rounds 3] [--n_layers 30] [--dora]

SmolLM2-135M on SST (on movies where SST is not in data/): ours through run_llama.py, peft's adapters on transformers'
Llama in a plain PyTorch loop, with random weights of the same shape (or, with --frozen_in_half, its base cast to
bfloat16 as ours is where products are in bfloat16). Adapters beside all seven matrices of each layer, the same rank,
alpha, sentences, tokens, precision, batch and threads. What is measured, and how, is told in bench_train.py: real
tokens a second over the mean length of a sentence, and the whole process's memory at its largest, training on the
longest sentences (on a GPU theirs is the GPU's alone, so the two are not compared there). Also the bytes of best/. Each
measurement is a process of its own, one after the other, in turn. Writes benchmarks/results/lora-<device>.json. Needs
requirements-dev.txt.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch.utils.data import DataLoader

from benchmarks.bench_train import lines_of, mean_tokens, padded, prepare, run
from benchmarks.measure import ROOT, limits, machine, need, ratio, write
from config import RunConfig
from tokenizer import Tokenizer
from training.device import choose_device

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def ours(options: argparse.Namespace, folder: Path, train: str) -> dict:
    """run_llama.py, as a user would type it; killed after the steps that are wanted."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place, "run")
        command = [sys.executable, "run_llama.py", "--option", "finetune", "--train", str(folder / f"{train}.txt"),
                   "--dev", str(folder / "dev.txt"), "--pretrained_model_path",
                   str(ROOT / "models" / "smollm2-135m.gguf"), "--epochs", "1", "--batch_size",
                   str(options.batch_size), "--dtype", options.dtype, "--device", options.device, "--n_layers",
                   str(options.n_layers), "--lora_r", str(options.lora_r), "--output_dir", str(out), *options.ours]
        command += ["--lora_dora"] if options.dora else []
        wanted = 2 if train == "longest" else options.steps
        _, _, peak = run(command, lambda: lines_of(out / "steps.jsonl") >= wanted)
        steps = [json.loads(line) for line in (out / "steps.jsonl").read_text(encoding="utf-8").splitlines()][:wanted]
        spent = steps[-1]["seconds"] - steps[0]["seconds"]
        kept = sum(path.stat().st_size for path in out.glob("last/step-*-0/*"))
        return {"tokens_per_second": sum(s["tokens"] for s in steps[1:]) / spent, "peak_bytes": peak,
                "state_bytes": kept}


def worker(options: argparse.Namespace) -> None:
    """Measure peft in this process, and print the result as a line of JSON."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = Tokenizer(tokenizer_model=ROOT / "models" / "smollm2-135m.gguf")
    pad = tokenizer.pad_id
    lines = (Path(options.folder) / f"{options.split}.txt").read_text(encoding="utf-8").splitlines()
    rows = [(int(label), tokenizer.encode(text, bos=tokenizer.add_bos, eos=False))
            for label, _, text in (line.partition(" ||| ") for line in lines)]
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=options.n_layers, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, max_position_embeddings=2048, num_labels=5, pad_token_id=pad,
        tie_word_embeddings=True))
    dtype = getattr(torch, options.dtype)
    if options.frozen_in_half and dtype == torch.bfloat16:
        model = model.to(dtype)
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=options.lora_r, lora_alpha=2 * options.lora_r,
                                             target_modules=PROJECTIONS, use_dora=options.dora)).to(options.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    loader = DataLoader(rows, options.batch_size, shuffle=True, collate_fn=lambda part: padded(part, pad))
    seen: list[tuple[float, int]] = []
    model.train()
    for batch in loader:
        batch = {k: v.to(options.device) for k, v in batch.items()}
        with torch.autocast(options.device, dtype=dtype, enabled=dtype != torch.float32):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seen.append((time.perf_counter(), int(batch["attention_mask"].sum())))
        if len(seen) == options.steps:
            break
    gpu = {"peak_bytes": torch.cuda.max_memory_allocated()} if options.device == "cuda" else {}
    print(json.dumps({"tokens_per_second": sum(n for _, n in seen[1:]) / (seen[-1][0] - seen[0][0]), **gpu}))


def measure(options: argparse.Namespace) -> None:
    need("models/smollm2-135m.gguf",
         *([] if (ROOT / "data" / "sst-train.txt").is_file() else ["data/movies-train.txt", "data/movies-dev.txt"]))
    device = choose_device(RunConfig(device=options.device, dtype=options.dtype))
    options.dtype = str(device.dtype).removeprefix("torch.")
    found: dict[str, list[dict]] = {"ours": [], "peft": []}

    def one_of(name: str, split: str) -> dict:
        if name == "ours":
            return ours(options, folder, split)
        numbers = ("dtype", "device", "batch_size", "n_layers", "steps", "lora_r")
        same = [f"--{k}={getattr(options, k)}" for k in numbers]
        same += [f"--{k}" for k in ("dora", "frozen_in_half") if getattr(options, k)]
        out, _, peak = run([sys.executable, "-m", "benchmarks.bench_lora", "--worker", "--folder", place,
                            "--split", split, *same])
        return {"peak_bytes": peak, **json.loads(out.splitlines()[-1])}

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder, None, False, options.batch_size)
        memory = {name: one_of(name, "longest")["peak_bytes"] for name in found}
        print("peak memory:", ", ".join(f"{name} {b / 2**30:.2f} GiB" for name, b in memory.items()), flush=True)
        ends = [limits(device.dtype, options.device)]
        for turn in range(options.rounds):
            for name, measured in found.items():
                measured.append(one_of(name, "train"))
                print(f"round {turn + 1}, {name}:", ", ".join(f"{k} {v:.5g}" for k, v in measured[-1].items()),
                      flush=True)
            ends.append(limits(device.dtype, options.device))
        mean_length = mean_tokens(folder)
    speeds = {name: [one["tokens_per_second"] for one in measured] for name, measured in found.items()}
    speed = ratio(speeds["ours"], speeds["peft"])
    more = "" if options.device == "cuda" else f", {memory['ours'] / memory['peft']:.2f} of its peak memory"
    print(f"ours / peft: {speed['of_medians']:.2f} times as fast ({speed['all'][0]:.2f} to "
          f"{speed['all'][-1]:.2f}){more}")
    samples = {name: median(rates) / mean_length for name, rates in speeds.items()}
    print("samples/s:", ", ".join(f"{name} {s:.2f}" for name, s in samples.items()))
    write(f"lora-{options.device}", {
        "machine": machine(options.device), "limits": ends, "dtype": options.dtype, "batch_size": options.batch_size,
        "n_layers": options.n_layers, "steps": options.steps, "lora_r": options.lora_r, "dora": options.dora,
        "frozen_in_half": options.frozen_in_half, "measurements": found, "peak_bytes": memory,
        "samples_per_second": samples, "ratio": speed})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lora_r", type=int, default=8)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--frozen_in_half", action="store_true", help="peft's base in bfloat16 too, as a user may do")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--n_layers", type=int, default=30)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--ours", nargs=argparse.REMAINDER, default=[], help="more options for run_llama.py")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--split", default="train", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
    else:
        measure(options)


if __name__ == "__main__":
    main()
