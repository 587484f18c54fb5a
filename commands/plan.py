"""--plan: what a run would do, before it is paid for."""

import time
from pathlib import Path

import numpy as np

from commands import estimate, plot, rate_pictures
from commands import job as jobs
from commands.classification import ClassificationTask
from commands.inputs import Inputs
from config import RunConfig, byte_size, counted, lora_config, millions, no_effect
from training import clock, frozen, kept, logs
from training import device as devices
from training.course import course_of
from training.device import Device
from training.task import Job


def rates(job: Job, n_steps: int) -> list[float]:
    """The learning rate of each step of the run, the largest of the parameter groups'."""
    top = max(group["lr"] for group in job.optimizer.param_groups)
    return [top * job.schedule(i, []) for i in range(n_steps)]


def what_is_kept(config: RunConfig, job: Job[ClassificationTask]) -> str:
    """Where what the frozen first part computes is kept, and how much it is; "" where there is no such part."""
    task, budget = job.task, byte_size(kept.BUDGET)
    if why := frozen.why_not_kept(config):
        return f"; each epoch computes what they give, since {why}"
    if not task.keeps:
        return ""
    folder = task.folder_of_kept()
    where = f"in a file in {folder}, mapped into memory, since it is more than {budget}" if folder else (
        f"in memory (up to {budget})")
    size = byte_size(task.bytes_kept())
    return f"; what they give for train and dev is computed once and takes {size}, kept {where}"


def show(asked: RunConfig, config: RunConfig, inputs: Inputs, device: Device, n_runs: int) -> int:
    """Print what a run would do, and which options would do nothing; time some of its steps; draw its schedule to
    plan.png, or where that is there to plan-2.png. Nothing is trained, and no run's folder is opened: one that is there
    stays as it is.

    `asked`: the options that were typed; `config`: those of the first of the `n_runs` runs that --seeds or --folds ask
    for.
    """
    folder = Path(config.output_dir or "runs")
    folder.mkdir(parents=True, exist_ok=True)
    job = jobs.build_job(config, inputs, device)
    measured = estimate.measure(job, config, device, inputs.splits, folder, with_longest=True)
    deadline = clock.deadline_of(config)
    if deadline is not None:
        now = time.monotonic()
        config, job = estimate.fitted(config, job, measured.times, now + (deadline - now) / n_runs)
    course, times = course_of(config, job.steps_per_epoch), measured.times
    steps = course.steps
    lr, warmup = rates(job, steps), jobs.warmup_of(config, job.steps_per_epoch)
    parameters = list(job.model.parameters())
    n, bytes_each = sum(p.numel() for p in parameters if p.requires_grad), 4
    weights = sum(p.numel() * p.element_size() for p in parameters)
    memory = weights + n * bytes_each * (1 + (1 if config.ema else 0)) + measured.state_bytes
    logs.say(f"plan :: {counted(len(inputs.splits['train']), 'sentence')}, {config.batch_size * config.grad_accum} a "
             f"step ({config.batch_size} x {config.grad_accum}), {counted(job.steps_per_epoch, 'step')} an epoch, "
             f"{steps} in all")
    logs.say(f"plan :: {config.scheduler}, warmup {counted(warmup, 'step')}, lr {lr[0]:.2e} at the start, "
             f"{max(lr):.2e} at the peak, {lr[-1]:.2e} at the end")
    logs.say(f"plan :: {millions(n)} trainable parameters; weights, gradients and {config.optimizer}'s state take "
             f"{byte_size(memory)}; with the longest batch, {devices.peak_memory(device) / 2**30:.2f} GiB were in "
             "use")
    if adapters := lora_config(config):
        n_base, state = sum(p.numel() for p in parameters) - n, n * bytes_each + measured.state_bytes
        where = ", ".join(adapters.targets)
        logs.say(f"plan :: adapters of rank {adapters.r}, times {adapters.scale:g}, beside {where} of each layer; "
                 f"{millions(n_base)} parameters stay as they are; a saved state takes {byte_size(state)}")
    if config.freeze != "none":
        n_frozen = sum(p.numel() for module in frozen.part(job.task.model, config.freeze) for p in module.parameters())
        logs.say(f"plan :: frozen: {frozen.in_words(config.freeze)}, {millions(n_frozen)} parameters"
                 f"{what_is_kept(config, job)}")
    minutes = times.of(course) / 60
    logs.say(f"plan :: about {times.step:.2f} s a step on {device}: {minutes * job.steps_per_epoch / steps:.1f} min an "
             f"epoch, {minutes:.1f} min in all, evaluation counted ({course.n_evaluations()} of "
             f"{times.evaluation:.1f} s)")
    if n_runs > 1:
        logs.say(f"plan :: {n_runs} such runs, one after another: {n_runs * minutes:.1f} min")
    middle, most = np.percentile(job.task.lengths, (50, 95), method="higher").tolist()
    logs.say(f"plan :: sentences have {counted(middle, 'token')} (median), {most} (95%), {job.task.lengths.max()} at "
             "most")
    if config.scheduler == "plateau":
        logs.say(f"plan :: plateau: the rate falls when {config.monitor} gets no better, which nobody knows "
                 "beforehand; the lr above and the picture are those of a run that always does")
    for line in no_effect(asked):
        logs.say(f"plan :: no effect: {line}")
    path = rate_pictures.free_path(folder / "plan.png")
    with plot.drawing():
        title = f"{config.scheduler}, warmup {warmup} of {steps} steps: {jobs.about(config, inputs)}"
        plot.save(rate_pictures.schedule(lr, job.steps_per_epoch, title), path)
    logs.say(f"plan :: {path}")
    return 0
