"""How fast fine-tuning is, and how much memory it takes: ours and what a user would run instead, in turn.

    python -m benchmarks.bench_train [--steps 8] [--batch_size 32] [--rounds 3] [--n_layers 30] [--dtype auto]
    python -m benchmarks.bench_train --classic [--sentences 1068] [--batch_size 80] [--rounds 3]

Without --classic: SmolLM2-135M on SST (on movies where SST is not in data/), ours through run_llama.py, against
transformers' Llama in a plain PyTorch loop and in its Trainer, with random weights of the same shape; the same
sentences, tokens, precision, batch and threads. The speed is that of the first steps of an epoch over the whole
training split, in real tokens a second from the end of the first step to the end of the last (our batches have
sentences of one length, and a few of them say little about sentences a second), over the mean length of a sentence.
The memory is the whole process's at its largest, training on the longest sentences. With --classic: an epoch with its
evaluations of stories42M's shape, ours over all the data (its batches have sentences of one length only where there
are many to choose from), and benchmarks/classic.py on --sentences of them, its time taken so many times as there are
more; with `--train_eval full` ours also scans the training set. Each measurement is a process of its own, one after
the other, in turn. Writes benchmarks/results/train-<device>.json and
classic-<device>.json. Needs requirements-dev.txt.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from torch.utils.data import DataLoader

from benchmarks import classic
from benchmarks.measure import ROOT, limits, machine, need, ratio, write
from config import LlamaConfig, RunConfig
from llama import Llama
from tokenizer import Tokenizer
from training.device import choose_device


def sentences(n: int | None) -> dict[str, list[str]]:
    """`label ||| sentence` lines: n of the training split (None: all), and n / 8 of dev, drawn at random."""
    name = "sst" if (ROOT / "data" / "sst-train.txt").is_file() else "movies"
    found = {}
    for split, count in (("train", n), ("dev", n and max(1, n // 8))):
        lines = (ROOT / "data" / f"{name}-{split}.txt").read_text(encoding="utf-8").splitlines()
        found[split] = random.Random(0).sample(lines, min(count or len(lines), len(lines)))
    return found


def prepare(folder: Path, n: int | None, for_classic: bool, batch_size: int) -> None:
    """The files that both sides read: the sentences, two batches of the longest ones, and for --classic random weights
    of stories42M's shape."""
    found = sentences(None)
    found |= {"part": sentences(n)["train"], "part-dev": sentences(n)["dev"]}
    found["longest"] = sorted(found["train"], key=lambda line: -len(line.split()))[: 2 * batch_size]
    for split, lines in found.items():
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if for_classic:
        shape = classic.Shape()
        torch.manual_seed(0)
        llama = Llama(LlamaConfig(dim=shape.dim, n_layers=shape.n_layers, n_heads=shape.n_heads,
                                  n_kv_heads=shape.n_heads, hidden_dim=shape.hidden_dim, vocab_size=shape.vocab_size,
                                  max_seq_len=shape.context))
        arguments = {"dim": shape.dim, "n_layers": shape.n_layers, "n_heads": shape.n_heads,
                     "n_kv_heads": shape.n_heads, "vocab_size": shape.vocab_size, "multiple_of": 32,
                     "norm_eps": 1e-5, "max_seq_len": shape.context}
        torch.save({"model": llama.state_dict(), "model_args": arguments}, folder / "stories42M.pt")
        shutil.copy(ROOT / "models" / "tokenizer.model", folder / "tokenizer.model")


# --------------------------------------------------------------------------- one measurement each, in its own process


def run(command: list[str], enough=lambda: False) -> tuple[str, float, int]:
    """Run a process, until it ends or `enough()`: what it printed on stdout, its seconds, its peak memory in bytes."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, tempfile.TemporaryFile("w+", encoding="utf-8") as error:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=error)
        done = False
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if not done and enough():
                done = True
                process.kill()
            time.sleep(0.05)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        error.seek(0)
        if process.returncode and not done:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{error.read()[-3000:]}")
        return out.read(), seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def ours(options: argparse.Namespace, folder: Path, train: str) -> dict:
    """run_llama.py, as a user would type it; killed after the steps that are wanted."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place, "run")
        model = folder / "stories42M.pt" if options.classic else ROOT / "models" / "smollm2-135m.gguf"
        command = [sys.executable, "run_llama.py", "--option", "finetune", "--train", str(folder / f"{train}.txt"),
                   "--dev", str(folder / "dev.txt"), "--pretrained_model_path", str(model), "--epochs", "1",
                   "--batch_size", str(options.batch_size), "--dtype", options.dtype, "--device", options.device,
                   "--output_dir", str(out)]
        if options.classic:
            run(command + options.ours)
            epoch = json.loads((out / "epochs.jsonl").read_text(encoding="utf-8").splitlines()[0])
            steps = (out / "steps.jsonl").read_text(encoding="utf-8").splitlines()
            trained = json.loads(steps[-1])["seconds"]
            return {"train_seconds": trained, "evaluation_seconds": epoch["seconds"] - trained,
                    "seconds": epoch["seconds"]}
        command += ["--n_layers", str(options.n_layers), *options.ours]
        wanted = 2 if train == "longest" else options.steps
        _, _, peak = run(command, lambda: lines_of(out / "steps.jsonl") >= wanted)
        steps = [json.loads(line) for line in (out / "steps.jsonl").read_text(encoding="utf-8").splitlines()][:wanted]
        spent = steps[-1]["seconds"] - steps[0]["seconds"]
        return {"tokens_per_second": sum(s["tokens"] for s in steps[1:]) / spent, "peak_bytes": peak}


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def worker(name: str, options: argparse.Namespace) -> None:
    """Measure the alternative `name` in this process, and print the result as a line of JSON."""
    folder = Path(options.folder)
    examples = {}
    for split in ("train", "dev", "part", "part-dev", "longest"):
        lines = (folder / f"{split}.txt").read_text(encoding="utf-8").splitlines()
        examples[split] = [(int(label), text) for label, _, text in (line.partition(" ||| ") for line in lines)]
    if name == "classic":
        tokenizer = Tokenizer(tokenizer_model=folder / "tokenizer.model")
        part = classic.epoch(examples["part"], examples["part-dev"], tokenizer, options.batch_size, 5)
        times = len(examples["train"]) / len(examples["part"])
        print(json.dumps({name: seconds * times for name, seconds in part.items()}))
        return
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForSequenceClassification

    tokenizer = Tokenizer(tokenizer_model=ROOT / "models" / "smollm2-135m.gguf")
    pad = tokenizer.pad_id
    rows = [(label, tokenizer.encode(text, bos=tokenizer.add_bos, eos=False))
            for label, text in examples[options.split]]
    torch.manual_seed(0)
    # pad_token_id: where the classifier finds a sentence's last token. A tied model has one embedding, as ours.
    model = LlamaForSequenceClassification(TheirConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=options.n_layers, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, max_position_embeddings=2048, num_labels=5, pad_token_id=pad,
        tie_word_embeddings=True)).to(options.device)
    dtype = getattr(torch, options.dtype)
    seen: list[tuple[float, int]] = []
    (transformers_loop if name == "loop" else transformers_trainer)(model, rows, pad, dtype, options, seen)
    spent = seen[-1][0] - seen[0][0]
    gpu = {"peak_bytes": torch.cuda.max_memory_allocated()} if options.device == "cuda" else {}
    print(json.dumps({"tokens_per_second": sum(tokens for _, tokens in seen[1:]) / spent, **gpu}))


def padded(part: list[tuple[int, list[int]]], pad: int) -> dict:
    """A batch as transformers wants it: padded on the right to the longest."""
    longest = max(len(tokens) for _, tokens in part)
    return {"input_ids": torch.tensor([tokens + [pad] * (longest - len(tokens)) for _, tokens in part]),
            "attention_mask": torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for _, t in part]),
            "labels": torch.tensor([label for label, _ in part])}


def transformers_loop(model, rows, pad: int, dtype, options, seen: list) -> None:
    """The loop of every tutorial: autocast, dynamic padding, torch.optim.AdamW. seen: (the time at the end of a step,
    its real tokens)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    loader = DataLoader(rows, options.batch_size, shuffle=True, collate_fn=lambda part: padded(part, pad))
    model.train()
    for batch in loader:
        batch = {k: v.to(options.device) for k, v in batch.items()}
        with torch.autocast(options.device, dtype=dtype, enabled=dtype != torch.float32):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seen.append((time.perf_counter(), int(batch["attention_mask"].sum())))
        if len(seen) == options.steps:
            return


def transformers_trainer(model, rows, pad: int, dtype, options, seen: list) -> None:
    """transformers' Trainer with its defaults; nothing saved or reported."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    tokens = []  # of the batches in their order; the Trainer fetches ahead

    def collate(part: list) -> dict:
        tokens.append(sum(len(sentence) for _, sentence in part))
        return padded(part, pad)

    class Stamp(TrainerCallback):
        def on_step_end(self, *_, **__) -> None:
            if options.device == "cuda":
                torch.cuda.synchronize()
            seen.append((time.perf_counter(), tokens[len(seen)]))

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=options.batch_size, learning_rate=1e-5,
            max_steps=min(options.steps, -(-len(rows) // options.batch_size)),
            bf16=dtype == torch.bfloat16, use_cpu=options.device == "cpu", report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True)
        Trainer(model, arguments, train_dataset=rows, data_collator=collate,
                callbacks=[Stamp()]).train()


# --------------------------------------------------------------------------- the comparison


def measure(options: argparse.Namespace) -> None:
    need("models/smollm2-135m.gguf", *(["models/tokenizer.model"] if options.classic else []),
         *([] if (ROOT / "data" / "sst-train.txt").is_file() else ["data/movies-train.txt", "data/movies-dev.txt"]))
    device = choose_device(RunConfig(device=options.device, dtype=options.dtype))
    options.dtype = str(device.dtype).removeprefix("torch.")
    names = ["ours", "classic"] if options.classic else ["ours", "loop", "trainer"]
    names = [n for n in names if n == "ours" or not options.only or n in options.only]
    found: dict[str, list[dict]] = {name: [] for name in names}
    memory: dict[str, int] = {}

    def one_of(name: str, split: str) -> dict:
        if name == "ours":
            return ours(options, folder, split)
        same = (f"--{k}={getattr(options, k)}" for k in ("dtype", "device", "batch_size", "n_layers", "steps"))
        out, _, peak = run([sys.executable, "-m", "benchmarks.bench_train", "--worker", name, "--folder", place,
                            "--split", split, *same])
        return {"peak_bytes": peak, **json.loads(out.splitlines()[-1])}

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder, options.sentences, options.classic, options.batch_size)
        if not options.classic:
            memory = {name: one_of(name, "longest")["peak_bytes"] for name in names}
            if options.device == "cuda":
                memory["ours"] = 0  # of the process, where theirs is of the GPU: not to be compared
            print("peak memory:", ", ".join(f"{name} {b / 2**30:.2f} GiB" for name, b in memory.items()), flush=True)
        ends = [limits(device.dtype, options.device)]
        for turn in range(options.rounds):
            for name in names:
                found[name].append(one_of(name, "train"))
                print(f"round {turn + 1}, {name}:", ", ".join(f"{k} {v:.5g}" for k, v in found[name][-1].items()),
                      flush=True)
            ends.append(limits(device.dtype, options.device))
        mean_length = mean_tokens(folder)
    result = {"machine": machine(options.device), "limits": ends, "dtype": options.dtype,
              "batch_size": options.batch_size, "sentences": options.sentences, "measurements": found, "ratios": {}}
    for name in names[1:]:
        sides = ("ours", name)
        if options.classic:
            speed = ratio(*([o["seconds"] for o in found[side]] for side in reversed(sides)))
            more = ""
        else:
            speed = ratio(*([o["tokens_per_second"] for o in found[side]] for side in sides))
            more = f", {memory['ours'] / memory[name]:.2f} of its peak memory"
        result["ratios"][name] = speed
        print(f"ours / {name}: {speed['of_medians']:.2f} times as fast ({speed['all'][0]:.2f} to "
              f"{speed['all'][-1]:.2f}){more}")
    if not options.classic:
        # 6 FLOP a weight and token (Kaplan et al. 2020, arXiv 2001.08361, section 2.1): embedding and head left out.
        # Of the last layer ours computes all tokens' keys and values, and the rest for one token a sentence.
        keys, rest = 2 * 192 * 576, 2 * 576 * 576 + 3 * 1536 * 576
        weights = (options.n_layers - 1) * (keys + rest) + keys + rest / mean_length
        speeds = {name: median(o["tokens_per_second"] for o in measured) for name, measured in found.items()}
        rate = median(end["flop_per_second"] for end in ends)  # the machine wanders: measured between the rounds
        achieved = 6 * weights * speeds["ours"]
        result |= {"n_layers": options.n_layers, "steps": options.steps, "peak_bytes": memory,
                   "samples_per_second": {name: speed / mean_length for name, speed in speeds.items()},
                   "flop_per_second": achieved, "of_the_matrix_rate": achieved / rate}
        print("samples/s:", ", ".join(f"{name} {s:.2f}" for name, s in result["samples_per_second"].items()))
        print(f"ours: {achieved / 1e9:.1f} GFLOP/s on real tokens, {achieved / rate:.0%} of this machine's "
              f"{rate / 1e9:.0f} GFLOP/s in {options.dtype} matrix products")
    write(f"{'classic' if options.classic else 'train'}-{options.device}", result)


def mean_tokens(folder: Path) -> float:
    """The mean length of a training sentence, in SmolLM2's tokens."""
    tokenizer = Tokenizer(tokenizer_model=ROOT / "models" / "smollm2-135m.gguf")
    lines = (folder / "train.txt").read_text(encoding="utf-8").splitlines()
    texts = [line.partition(" ||| ")[2] for line in lines]
    return sum(len(tokenizer.encode(text, bos=tokenizer.add_bos, eos=False)) for text in texts) / len(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", type=int, help="of the training split; default: all, with --classic 1068")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--n_layers", type=int, default=30)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--classic", action="store_true", help="against the classic teaching loop")
    parser.add_argument("--only", nargs="*", choices=("loop", "trainer", "classic"), help="these alternatives only")
    parser.add_argument("--ours", nargs=argparse.REMAINDER, default=[], help="more options for run_llama.py")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    parser.add_argument("--split", default="train", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.classic:
        options.sentences = options.sentences or 1068
    options.batch_size = options.batch_size or (80 if options.classic else 32)
    if options.worker:
        worker(options.worker, options)
    else:
        measure(options)


if __name__ == "__main__":
    main()
