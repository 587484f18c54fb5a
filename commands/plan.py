"""--plan: what a run would do, before it is paid for."""

import time
from pathlib import Path

from torch import Tensor

from commands import job as jobs
from commands import plot
from commands.inputs import Inputs
from config import RunConfig, counted, no_effect
from training import device as devices
from training import logs
from training.checks import untouched
from training.device import Device
from training.task import Job
from training.trainer import Loop


def rates(job: Job, n_steps: int) -> list[float]:
    """The learning rate of each step of the run, the largest of the parameter groups'."""
    top = max(group["lr"] for group in job.optimizer.param_groups)
    return [top * job.schedule(i, []) for i in range(n_steps)]


def show(asked: RunConfig, config: RunConfig, inputs: Inputs, device: Device, n_runs: int) -> int:
    """Print what a run would do, and which options would do nothing; time two of its steps; draw its schedule to
    plan.png. Nothing is trained, and no run's folder is opened: one that is there stays as it is.

    `asked`: the options that were typed; `config`: those of the first of the `n_runs` runs that --seeds or --folds ask
    for.
    """
    folder = Path(config.output_dir or "runs")
    folder.mkdir(parents=True, exist_ok=True)
    job = jobs.build_job(config, inputs, device)
    steps = job.steps_per_epoch * config.epochs
    lr, warmup = rates(job, steps), jobs.warmup_of(config, job.steps_per_epoch)
    n, bytes_each = sum(p.numel() for p in job.model.parameters() if p.requires_grad), 4
    step_seconds, state_bytes = try_steps(job, config, device)
    memory = n * bytes_each * (2 + (1 if config.ema else 0)) + state_bytes
    logs.say(f"plan :: {counted(len(inputs.splits['train']), 'sentence')}, {config.batch_size * config.grad_accum} a "
             f"step ({config.batch_size} x {config.grad_accum}), {counted(job.steps_per_epoch, 'step')} an epoch, "
             f"{steps} in all")
    logs.say(f"plan :: {config.scheduler}, warmup {counted(warmup, 'step')}, lr {lr[0]:.2e} at the start, "
             f"{max(lr):.2e} at the peak, {lr[-1]:.2e} at the end")
    logs.say(f"plan :: {n / 1e6:.1f}M trainable parameters; weights, gradients and {config.optimizer}'s state take "
             f"{memory / 2**30:.2f} GiB; with the longest batch, {devices.peak_memory(device) / 2**30:.2f} GiB were in "
             "use")
    logs.say(f"plan :: about {step_seconds:.2f} s a step on {device}: {step_seconds * job.steps_per_epoch / 60:.1f} "
             f"min an epoch, {step_seconds * steps / 60:.1f} min in all, evaluation not counted")
    if n_runs > 1:
        logs.say(f"plan :: {n_runs} such runs, one after another: {n_runs * step_seconds * steps / 60:.1f} min")
    if config.scheduler == "plateau":
        logs.say(f"plan :: plateau: the rate falls when {config.monitor} gets no better, which nobody knows "
                 "beforehand; the lr above and the picture are those of a run that always does")
    for line in no_effect(asked):
        logs.say(f"plan :: no effect: {line}")
    plot.schedule(lr, f"{config.scheduler}, warmup {warmup} of {steps} steps", folder / "plan.png")
    logs.say(f"plan :: {folder / 'plan.png'}")
    return 0


def try_steps(job: Job, config: RunConfig, device: Device) -> tuple[float, int]:
    """Seconds of an optimizer step, the mean of the first two of the run, and bytes of the optimizer's state.
    Everything is left as it was."""
    loop, seconds = Loop(job, config, device), []
    with untouched(job.model, job.optimizer):
        job.model.train()
        windows = job.task.order(0)
        longest = max(windows, key=lambda rows: len(rows) * loop.lengths[rows].max())
        for rows in [longest, *windows[:2]]:  # the longest warms up, and shows how much memory is needed
            begin = time.perf_counter()
            loop.accumulate(rows)
            job.optimizer.step()
            seconds.append(time.perf_counter() - begin)
        kept = [value for moments in job.optimizer.state.values() for value in moments.values()
                if isinstance(value, Tensor)]
    return sum(seconds[1:]) / len(seconds[1:]), sum(value.numel() * value.element_size() for value in kept)
