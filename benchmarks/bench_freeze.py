"""What an epoch costs where the first layers are frozen, on SmolLM2-135M's first layers and movies, in turn:

    python -m benchmarks.bench_freeze [--layers 6] [--frozen 4] [--sentences 800] [--rounds 7] [--threads N] [--cpu]

full        everything is trained
computed    --freeze first:K, the frozen layers computed at each pass
kept        --freeze first:K as it is: what they give for a sentence is computed once
remaining   what no program can do without: forward, backward and update of the remaining layers, in a bare loop over
            batches that lie in memory, padded, before the clock starts; dev and a sample of train scored like that too

An epoch has its evaluation in it, and nothing is written to the disk. Prints each one's median, and the ratios of
rounds that stood next to each other; writes benchmarks/results/freeze.json. On a busy machine the seconds wander, and
--cpu counts those of the processor instead.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.measure import machine, need, ratio, write
from commands import inputs as run_inputs
from commands import job as jobs
from config import counted, parse_args
from dataset import length_order
from training import device as devices
from training import gradients, logs
from training.trainer import Loop

MODEL, TRAIN, DEV = "models/smollm2-135m.gguf", "data/movies-train.txt", "data/movies-dev.txt"


def made(options: argparse.Namespace, *more: str) -> tuple[Any, Any, Any]:
    """A job, its options and its device."""
    config = parse_args([
        "--option", "finetune", "--pretrained_model_path", MODEL, "--train", TRAIN, "--dev", DEV, "--n_layers",
        str(options.layers), "--train_limit", str(options.sentences), "--batch_size", "32", "--lr", "1e-5", "--pooling",
        "mean", "--attention", "bidirectional", "--hidden_dropout_prob", "0.1", "--epochs", str(options.rounds + 1),
        "--scheduler", "constant", "--patience", "0", "--device", "cpu", *more])
    read = run_inputs.limit_train(config, run_inputs.load(config, need=("train", "dev")))
    dev = read.splits["dev"]
    read.splits["dev"] = dev.take(np.arange(min(len(dev), options.sentences // 4)))
    device = devices.choose_device(config)
    return jobs.build_job(config, read, device), config, device


def epoch_of(options: argparse.Namespace, *more: str, keeps: bool = True) -> tuple[Callable[[], None], Any]:
    """What trains the next epoch of a run, as the program does; and the run's job."""
    job, config, device = made(options, *more)
    job.task.keeps = job.task.keeps and keeps
    return Loop(job, config, device).train_epoch, job


def remaining(options: argparse.Namespace) -> Callable[[], None]:
    """An epoch of the remaining layers alone."""
    job, config, device = made(options, "--freeze", f"first:{options.frozen}")
    loop, task, model = Loop(job, config, device), job.task, job.model
    train = [[*loop.micro_batches(rows)] for rows in task.order(0)]
    dev, sample = task.activations("dev"), task.activations("train").take(task.sampled_rows)
    score = [(split, kept.batch(rows), rows) for split, kept in ((task.dev, dev), (task.sample, sample))
             for rows in length_order(split.lengths)]
    lengths = [torch.from_numpy(split.lengths[rows]) for split, _, rows in score]
    tokens = [torch.zeros(below.shape[:2], dtype=torch.long) for _, below, _ in score]  # nobody looks at them

    def epoch() -> None:
        model.train()
        for window in train:
            n = sum(len(batch["labels"]) for batch in window)
            for batch in window:
                with device.autocast():
                    losses = task.losses(batch)
                (losses.sum() / n).backward()
            gradients.clip_(loop.parameters, config.max_grad_norm, 0.0)
            job.optimizer.step()
            job.optimizer.zero_grad(set_to_none=True)
        model.eval()
        with torch.inference_mode(), device.autocast():
            for some, length, (_, below, _) in zip(tokens, lengths, score, strict=True):
                model(some, length, below)

    return epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--frozen", type=int, default=4)
    parser.add_argument("--sentences", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=7, help="epochs of each, after one that does not count")
    parser.add_argument("--threads", type=int, help="default: PyTorch's")
    parser.add_argument("--cpu", action="store_true", help="the processor's seconds instead of the clock's")
    options = parser.parse_args()
    clock = time.process_time if options.cpu else time.perf_counter

    def seconds(do: Callable[[], Any]) -> float:
        began = clock()
        do()
        return clock() - began

    need(MODEL, TRAIN, DEV)
    if options.threads:
        torch.set_num_threads(options.threads)
    freeze = ("--freeze", f"first:{options.frozen}")
    with tempfile.TemporaryDirectory() as folder, logs.into(Path(folder) / "said.log"):
        full, job = epoch_of(options)
        computed, _ = epoch_of(options, *freeze, keeps=False)
        kept, job = epoch_of(options, *freeze)
        once = seconds(job.task.keep)
        variants = {"full": full, "computed": computed, "kept": kept, "remaining": remaining(options)}
        times: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(1 + options.rounds):
            for name, epoch in variants.items():
                times[name].append(seconds(epoch))
        trained = sum(p.numel() for p in job.model.parameters() if p.requires_grad)
    times = {name: found[1:] for name, found in times.items()}
    print(f"{counted(options.sentences, 'sentence')}, {options.layers} layers of which {options.frozen} are frozen, "
          f"{trained / 1e6:.1f}M trained; {counted(torch.get_num_threads(), 'thread')}; the frozen part, once: "
          f"{once:.2f} s, {job.task.bytes_kept() / 2**20:.0f} MiB")
    result = {"machine": machine(), **vars(options), "once_seconds": once, "bytes_kept": job.task.bytes_kept(),
              "epochs": {}}
    for name, found in times.items():
        against = ratio(times["kept"], found)
        low, high = against["quartiles"]
        print(f"{name:10} {median(found):7.2f} s an epoch ({min(found):.2f} to {max(found):.2f})   kept / it "
              f"{against['of_medians']:.2f}, of neighbours {against['median_of_pairs']:.2f} ({low:.2f} to {high:.2f})")
        result["epochs"][name] = {"median_seconds": median(found), "kept_over_it": against, "seconds": found}
    write("freeze", result)


if __name__ == "__main__":
    main()
