"""How fast fine-tuning is, and how much memory it takes: ours and what a user would run instead, in turn.

    python benchmarks/train.py [--sentences 640] [--batch_size 32] [--rounds 3] [--n_layers 30] [--dtype auto]
    python benchmarks/train.py --classic [--sentences 1068] [--batch_size 80] [--rounds 3]

Without --classic: SmolLM2-135M on SST (on movies where SST is not in data/), ours through run_llama.py, against
transformers' Llama in a plain PyTorch loop and in its Trainer, with random weights of the same shape; the same
sentences, tokens, precision, batch and threads. Samples/s from the end of the first step to the end of the last; the
peak memory is the whole process's. With --classic: an epoch with its evaluations of stories42M's shape, ours against
benchmarks/classic.py. Each measurement is a process of its own, one after the other, in turn. Writes
benchmarks/results/train-<device>.json and classic-<device>.json. Needs requirements-dev.txt.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path = [str(ROOT), *(p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent)]


def sentences(n: int) -> dict[str, list[str]]:
    """`label ||| sentence` lines: n of the training split, and n / 8 of dev, drawn at random."""
    import random

    name = "sst" if (ROOT / "data" / "sst-train.txt").is_file() else "movies"
    found = {}
    for split, count in (("train", n), ("dev", max(1, n // 8))):
        lines = (ROOT / "data" / f"{name}-{split}.txt").read_text(encoding="utf-8").splitlines()
        found[split] = random.Random(0).sample(lines, min(count, len(lines)))
    return found


def prepare(folder: Path, n: int, classic: bool) -> None:
    """The files that both sides read: the sentences, and for --classic random weights of stories42M's shape."""
    for split, lines in sentences(n).items():
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if classic:
        import shutil

        import torch

        from benchmarks.classic import Shape
        from config import LlamaConfig
        from llama import Llama

        shape = Shape()
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


def run(command: list[str]) -> tuple[str, float, int]:
    """Run a process: what it printed on stdout, its seconds, and its peak memory in bytes."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, tempfile.TemporaryFile("w+", encoding="utf-8") as error:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=error)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        error.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{error.read()[-3000:]}")
        return out.read(), seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def ours(options: argparse.Namespace, folder: Path) -> dict:
    """run_llama.py, as a user would type it."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place, "run")
        model = folder / "stories42M.pt" if options.classic else ROOT / "models" / "smollm2-135m.gguf"
        command = [sys.executable, "run_llama.py", "--option", "finetune", "--train", str(folder / "train.txt"),
                   "--dev", str(folder / "dev.txt"), "--pretrained_model_path", str(model), "--epochs", "1",
                   "--batch_size", str(options.batch_size), "--dtype", options.dtype, "--device", options.device,
                   "--output_dir", str(out)]
        if not options.classic:
            command += ["--n_layers", str(options.n_layers)]
        _, seconds, peak = run(command + options.ours)
        steps = [json.loads(line) for line in (out / "steps.jsonl").read_text(encoding="utf-8").splitlines()]
        epoch = json.loads((out / "epochs.jsonl").read_text(encoding="utf-8").splitlines()[0])
        result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    n = options.n_train - options.n_train // len(steps)
    spent = steps[-1]["seconds"] - steps[0]["seconds"]
    return {"samples_per_second": n / spent, "tokens_per_second": sum(s["tokens"] for s in steps[1:]) / spent,
            "peak_bytes": result.get("peak_gpu_bytes") or peak, "epoch_seconds": epoch["seconds"],
            "process_seconds": seconds, "steps": len(steps)}


def worker(name: str, options: argparse.Namespace) -> None:
    """Measure the alternative `name` in this process, and print the result as a line of JSON."""
    import torch

    folder = Path(options.folder)
    if options.threads:
        torch.set_num_threads(options.threads)
    examples = {}
    for split in ("train", "dev"):
        lines = (folder / f"{split}.txt").read_text(encoding="utf-8").splitlines()
        examples[split] = [(int(label), text) for label, _, text in (line.partition(" ||| ") for line in lines)]
    from tokenizer import Tokenizer

    if name == "classic":
        from benchmarks import classic

        tokenizer = Tokenizer(tokenizer_model=folder / "tokenizer.model")
        print(json.dumps(classic.epoch(examples["train"], examples["dev"], tokenizer, options.batch_size, 5)))
        return
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = Tokenizer(tokenizer_model=ROOT / "models" / "smollm2-135m.gguf")
    pad = tokenizer.pad_id
    rows = [(label, tokenizer.encode(text, bos=tokenizer.add_bos, eos=False)) for label, text in examples["train"]]
    torch.manual_seed(0)
    # pad_token_id: where the classifier finds a sentence's last token. A tied model has one embedding, as ours.
    model = LlamaForSequenceClassification(LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=options.n_layers, num_attention_heads=9,
        num_key_value_heads=3, vocab_size=49152, max_position_embeddings=2048, num_labels=5, pad_token_id=pad,
        tie_word_embeddings=True)).to(options.device)
    dtype = getattr(torch, options.dtype)
    stamps = (transformers_loop if name == "loop" else transformers_trainer)(model, rows, pad, dtype, options)
    n = len(rows) - len(rows) // len(stamps)
    spent = stamps[-1] - stamps[0]
    gpu = {"peak_bytes": torch.cuda.max_memory_allocated()} if options.device == "cuda" else {}
    print(json.dumps({"samples_per_second": n / spent, "steps": len(stamps), **gpu,
                      "tokens_per_second": sum(len(t) for _, t in rows) * n / len(rows) / spent}))


def padded(part: list[tuple[int, list[int]]], pad: int) -> dict:
    """A batch as transformers wants it: padded on the right to the longest."""
    import torch

    longest = max(len(tokens) for _, tokens in part)
    return {"input_ids": torch.tensor([tokens + [pad] * (longest - len(tokens)) for _, tokens in part]),
            "attention_mask": torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for _, t in part]),
            "labels": torch.tensor([label for label, _ in part])}


def transformers_loop(model, rows, pad: int, dtype, options) -> list[float]:
    """The loop of every tutorial: autocast, dynamic padding, torch.optim.AdamW. The time at the end of each step."""
    import torch
    from torch.utils.data import DataLoader

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    loader = DataLoader(rows, options.batch_size, shuffle=True, collate_fn=lambda part: padded(part, pad))
    model.train()
    stamps = []
    for batch in loader:
        batch = {k: v.to(options.device) for k, v in batch.items()}
        with torch.autocast(options.device, dtype=dtype, enabled=dtype != torch.float32):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        stamps.append(time.perf_counter())
    return stamps


def transformers_trainer(model, rows, pad: int, dtype, options) -> list[float]:
    """transformers' Trainer with its defaults; nothing saved or reported. The time at the end of each step."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    stamps = []

    class Stamp(TrainerCallback):
        def on_step_end(self, *_, **__) -> None:
            if options.device == "cuda":
                torch.cuda.synchronize()
            stamps.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, per_device_train_batch_size=options.batch_size, num_train_epochs=1, learning_rate=1e-5,
            bf16=dtype == torch.bfloat16, use_cpu=options.device == "cpu", report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True)
        Trainer(model, arguments, train_dataset=rows, data_collator=lambda part: padded(part, pad),
                callbacks=[Stamp()]).train()
    return stamps


# --------------------------------------------------------------------------- the comparison


def measure(options: argparse.Namespace) -> None:
    import torch

    from benchmarks.measure import limits, machine, ratio, write
    from config import RunConfig
    from trainer import choose_device

    device = choose_device(RunConfig(device=options.device, dtype=options.dtype))
    options.dtype = str(device.dtype).removeprefix("torch.")
    names = ["ours", "classic"] if options.classic else ["ours", "loop", "trainer"]
    names = [n for n in names if n == "ours" or not options.only or n in options.only]
    found: dict[str, list[dict]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder, options.sentences, options.classic)
        options.n_train = len((folder / "train.txt").read_text(encoding="utf-8").splitlines())
        ends = [limits(device.dtype, options.device)]
        for turn in range(options.rounds):
            for name in names:
                if name == "ours":
                    one = ours(options, folder)
                else:
                    out, seconds, peak = run(
                        [sys.executable, __file__, "--worker", name, "--folder", place, "--dtype", options.dtype,
                         "--device", options.device, "--batch_size", str(options.batch_size),
                         "--n_layers", str(options.n_layers)])
                    one = {"peak_bytes": peak, "process_seconds": seconds, **json.loads(out.splitlines()[-1])}
                found[name].append(one)
                print(f"round {turn + 1}, {name:8}", ", ".join(f"{k} {v:.5g}" for k, v in one.items()), flush=True)
        ends.append(limits(device.dtype, options.device))
    result = {"machine": machine(options.device), "limits": ends, "dtype": options.dtype, "sentences": options.n_train,
              "batch_size": options.batch_size, "n_layers": None if options.classic else options.n_layers,
              "measurements": found, "ratios": {}}
    if options.classic:
        for one in found["ours"]:
            one["seconds"] = one["epoch_seconds"]
    for name in names[1:]:
        if options.classic:
            speed = ratio([o["seconds"] for o in found[name]], [o["seconds"] for o in found["ours"]])
        else:
            speed = ratio(*([o["samples_per_second"] for o in found[side]] for side in ("ours", name)))
        memory = ratio([o["peak_bytes"] for o in found["ours"]], [o["peak_bytes"] for o in found[name]])
        result["ratios"][name] = {"speed": speed, "peak_memory": memory}
        print(f"ours / {name}: {speed['of_medians']:.2f} times as fast ({speed['all'][0]:.2f} to "
              f"{speed['all'][-1]:.2f}), {memory['of_medians']:.2f} of its peak memory")
    if not options.classic:
        # 6 FLOP a weight and token (Kaplan et al. 2020, arXiv 2001.08361, section 2.1): embedding and head left out.
        weights = options.n_layers * (2 * 576 * 576 + 2 * 192 * 576 + 3 * 1536 * 576)
        achieved = median(o["tokens_per_second"] for o in found["ours"]) * 6 * weights
        # The machine wanders: against the mean of the rates before and after.
        rate = sum(end["flop_per_second"] for end in ends) / 2
        result["flop_per_second"], result["of_the_matrix_rate"] = achieved, achieved / rate
        print(f"ours: {achieved / 1e9:.1f} GFLOP/s on real tokens, {achieved / rate:.0%} of this machine's "
              f"{rate / 1e9:.0f} GFLOP/s in {options.dtype} matrix products")
    if torch.cuda.is_available() and options.device == "cuda":
        print("H100's peak: 989 TFLOP/s in bfloat16, dense")
    write(f"{'classic' if options.classic else 'train'}-{options.device}", result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", type=int)
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
    parser.add_argument("--threads", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.sentences = options.sentences or (1068 if options.classic else 640)
    options.batch_size = options.batch_size or (80 if options.classic else 32)
    if options.worker:
        worker(options.worker, options)
    else:
        measure(options)


if __name__ == "__main__":
    main()
