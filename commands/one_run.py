"""One fine-tuning run, from its folder to its result.json."""

import hashlib
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import astuple
from typing import Any

import numpy as np
from torch import Tensor

import dataset
import fused
from commands import estimate, results, resume, run_pictures
from commands import job as jobs
from commands.inputs import Inputs
from config import RunConfig, counted, millions, names_in
from formats import files
from training import best as best_folder
from training import calibration, checks, diagnosis, logs, metrics, run_folder, saved, state, trainer
from training.clock import Clock, Times
from training.device import Device
from training.loggers import Final, Loggers, scores_of
from training.run_folder import RunFolder
from training.signals import stoppable
from training.task import Job
from training.trainer import Loop


def train(config: RunConfig, inputs: Inputs, device: Device, series_folder: RunFolder | None = None, n_runs: int = 1,
          deadline: float | None = None, known: Mapping[str, metrics.Baseline] | None = None,
          on_evaluation: Callable[[int, logs.EpochRecord], str] | None = None) -> dict:
    """One run from its folder to its result.json, which is returned. `series_folder`: that of the --seeds or --folds
    that it belongs to, if there is one: what to resume when it is stopped. `n_runs`: how many are left, this one among
    them; 0 where that has been said. `deadline`: when it must be over, on time.monotonic(), see --max_minutes.
    `known`: the baselines, where they have been computed; `on_evaluation`: see `Loop`."""
    begin, before_resume = time.perf_counter(), 0.0
    folder = RunFolder(config.resume) if config.resume else run_folder.open_run(config)
    with folder.lock(), ExitStack() as stack:
        job = jobs.build_job(config, inputs, device)
        clock = Clock(deadline=deadline)
        if deadline is not None:  # they are part of what takes time
            known = compute_baselines(inputs)
        if deadline is not None or n_runs and estimate.may_be_long(job, config, n_runs):
            clock.estimated = measure(job, config, device, inputs, folder)
            if deadline is not None and not config.resume:
                config, job = estimate.fitted(config, job, clock.estimated, deadline)
        with logs.doing("computing the checksums of the files"):
            described = describe(config, inputs, device, job, folder)
        loggers = stack.enter_context(Loggers(folder, names_in(config.logger), described.get("id", "")))
        loop = trainer.Loop(job, config, device, folder, series=series_folder, described=described, clock=clock,
                            loggers=loggers, on_evaluation=on_evaluation)
        if config.resume:
            files.remove_temporary_files(folder.path)
            loop.resume()
            loop.look_at_patience()  # a larger one may have been given, now or before a kill
            described = resume.extend(described, config, folder, loop)
            warn_of_another_machine(described, config, device, job)
            before_resume = loop.progress.seconds
            if clock.deadline is not None:
                clock.deadline -= before_resume
            logs.notice(f"resuming {folder} at step {loop.progress.step}")
        n_parameters = sum(p.numel() for p in loop.parameters)
        logs.say(f"model :: {inputs.weights.path}, {counted(job.task.model.llama.config.n_layers, 'layer')}, "
                 f"{millions(n_parameters)} trainable parameters, {len(inputs.names)} classes")
        logs.say(f"run :: {folder}, on {device}")
        if clock.estimated and n_runs:
            logs.notice(estimate.long_run(clock.estimated, loop.course, loop.progress.step, config, n_runs,
                                          job.task.model.llama.config.n_layers, float(np.median(loop.lengths)), device))
        with stoppable((series_folder or folder).resume_command(config)):
            job.task.keep()
        if loop.saved is None:  # a resumed run has had them, and its micro-batch stays
            check_before(config, loop)
        best = loop.run()

        with logs.doing(f"reading {folder.best}"):
            best_folder.check_best(folder.best, best.get("manifest"))
            saved.load_classifier_state(folder.best, job.model)  # the best weights are what is evaluated
        if config.save_dtype != "float32":  # those of the frozen part too have been rounded
            job.task.forget()
        held_out = {name: split for name, split in inputs.splits.items() if name != "train"}
        with stoppable((series_folder or folder).resume_command(config)):
            with logs.doing(f"evaluating the best weights on {' and '.join(held_out)}"):
                outputs = {name: job.task.predict(split, name) for name, split in held_out.items()}
        job.task.forget()  # another run may follow
        for name in outputs:
            metrics.check_finite(outputs[name], f"{folder}: {name}")
        with logs.doing("computing the baselines"):
            baselines = results.print_baselines(config, inputs.splits["train"], inputs.splits, known)
        found = diagnose(loop, folder, outputs["dev"], inputs, baselines["dev"].majority)
        for line in found:
            logs.say(f"diagnosis :: {line}")
        progress = loop.progress
        stopped = progress.stopped or "finished"
        logs.say(f"best :: epoch {best['epoch']}, counted from 0, of {config.epochs} (chosen by {config.monitor}), "
                 f"stopped: {stopped}")
        default_out = {name: folder.predictions(name) for name in outputs}
        scores = results.report_splits(config, inputs.splits, outputs, default_out, inputs.names, baselines)
        result = {
            "best_epoch": best["epoch"], "best_manifest": best.get("manifest"), **scores,
            "baselines": {name: found.values() for name, found in baselines.items()}, "label_names": inputs.names,
            "calibration": {"dev": reliability_of(outputs["dev"], inputs)},
            "stopped": stopped, "steps": progress.step,
            "skipped_steps": progress.skipped, "last_dev_acc": last_dev_acc(folder),
            "loss_spikes": progress.spikes, "rollbacks": progress.rollbacks, "diagnosis": found,
            "train_seconds": round(loop.seconds(), 2),
            "seconds": round(before_resume + time.perf_counter() - begin, 2),
        }
        loggers.finish(Final(loop.described["options"], scores_of(result), progress.step,
                             results.confident_mistakes(outputs["dev"], inputs.splits["dev"], inputs.names)))
        if config.keep_state:
            state.keep_newest_state(folder.last)
        folder.save_result(result)
        if not config.keep_state:  # behind the result: until it is there, the run can be resumed
            files.remove_folder(folder.last)
        if config.plots == "on":
            run_pictures.draw(folder, result, jobs.about(config, inputs))
    return result


def measure(job: Job, config: RunConfig, device: Device, inputs: Inputs, folder: RunFolder) -> Times:
    """How long the parts of the run take."""
    with logs.doing("measuring how long a step and an evaluation take"):
        return estimate.measure(job, config, device, inputs.splits, folder.path).times


def compute_baselines(inputs: Inputs) -> dict[str, metrics.Baseline]:
    """Those of every split but train, before the training."""
    train = inputs.splits["train"]
    with logs.doing("computing the baselines"):
        return metrics.baselines(train.labels, train.sentences,
                                 {name: split for name, split in inputs.splits.items() if name != "train"})


# --------------------------------------------------------------------------- args.json


def environment(config: RunConfig, inputs: dict[str, Any], device: Device, job: Job) -> dict[str, Any]:
    """What args.json says of a run of this job on this machine."""
    c_compiler = fused.compiler() if fused.is_accelerated(job.model) else "not used"
    return run_folder.environment(config, str(device), inputs, c_compiler)


def describe(config: RunConfig, inputs: Inputs, device: Device, job: Job, folder: RunFolder) -> dict[str, Any]:
    """The run's args.json: read where the run goes on, else written. Where dev was held out, train and dev are written
    too, as files that --train and --dev read."""
    texts = {name: dataset.as_jsonl(split) for name, split in inputs.held_out.items()}
    if config.resume:
        described = state.read_description(folder)
    else:
        described = environment(config, inputs.checksums(), device, job)
        if texts:
            described["splits"] = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
        described = folder.describe(described)
    for name, text in texts.items():  # behind args.json: without it, a start that was killed would be in the way
        if not (config.resume and folder.split(name).is_file()):
            files.write_text(folder.split(name), text, follow=False)
    return described


def warn_of_another_machine(described: dict[str, Any], config: RunConfig, device: Device, job: Job) -> None:
    """A run that goes on elsewhere may come out otherwise: say so."""
    now = environment(config, {}, device, job)
    if (described["device"], described.get("versions")) != (now["device"], now["versions"]):
        logs.warn("the device or the versions are others than when the run began (see its args.json); its last bits "
                  "may come out otherwise")


# --------------------------------------------------------------------------- before and after the training


def check_before(config: RunConfig, loop: Loop) -> None:
    """--check_gradients, --overfit_batch and --auto_batch: each says what it found, and leaves no trace."""
    if config.check_gradients:
        difference = checks.check_gradients(loop)
        logs.say(f"gradients :: one big batch, micro-batches and a short last one agree to {difference:.1e}")
    if config.overfit_batch:
        first, last = checks.overfit_batch(loop)
        verdict = "it can memorise it" if last < 0.5 * first else (
            "IT CANNOT MEMORISE IT: check the labels, the learning rate and the dropout")
        logs.say(f"overfit :: one batch, loss {first:.3f} to {last:.3f}: {verdict}")
    if config.auto_batch:
        loop.progress.micro_batch = checks.find_micro_batch(loop)
        logs.say(f"batch :: {counted(loop.progress.micro_batch, 'sentence')} a forward pass, "
                 f"{config.batch_size * config.grad_accum} an optimizer step")


def diagnose(loop: Loop, folder: RunFolder, log_probs: Tensor, inputs: Inputs, majority: float) -> list[str]:
    """What is wrong with the run that has just ended; see diagnosis.diagnose. `log_probs` (N, C): of dev; `majority`:
    the accuracy there of the most frequent class of training."""
    progress, labels = loop.progress, inputs.splits["dev"].labels
    known = {"epoch", "train_loss", "train_acc", "dev_loss", "dev_acc"}
    epochs = [line for line in logs.read_log(folder.epochs) if known <= line.keys()]  # others are damaged
    return diagnosis.diagnose(epochs, progress.best["epoch"], log_probs.argmax(1).numpy(), labels, inputs.names,
                              metrics.score(log_probs, labels)["f1"], majority, loop.guessing_loss(),
                              progress.mean_loss, loop.config.lr, progress.rollbacks, progress.stopped)


def reliability_of(log_probs: Tensor, inputs: Inputs) -> list[tuple[float, ...]]:
    """The bins of dev's reliability diagram that have a sentence, for the report: (low, high, n, confidence, accuracy).
    `log_probs` (N, C)."""
    probabilities = log_probs.double().exp().numpy()
    return [astuple(one) for one in calibration.reliability(probabilities, inputs.splits["dev"].labels) if one.n]


def last_dev_acc(folder: RunFolder) -> float | None:
    """The dev accuracy in the last line of a run's epochs.jsonl; None where a divergence left no line."""
    lines = logs.read_log(folder.epochs)
    return lines[-1].get("dev_acc") if lines else None
