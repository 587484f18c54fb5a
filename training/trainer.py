"""The one training loop. Fine-tuning, the range test and the checks before a run all go through it.

Nothing here knows what the task is: a `Task` brings the batches, their losses, and how the model is scored and saved.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import InputError, RunConfig, counted
from formats.memory import is_out_of_memory
from training import best as best_folder
from training import device as devices
from training import gradients, guards, logs, state
from training.average import MovingAverage
from training.bar import Bar
from training.clock import Clock
from training.course import Course, course_of
from training.device import Device
from training.loggers import Loggers
from training.run_folder import RunFolder
from training.signals import SIGNALS, stoppable
from training.state import Progress
from training.task import Job

PASS_TOKENS = 1024  # in one forward pass on a CPU
MORE_IS_BETTER = ("dev_acc", "dev_f1", "dev_qwk")  # of the monitors
RATE_CUT = 0.1  # what the learning rate is multiplied with at each rollback
ROLLBACKS = 3


def fit(job: Job, config: RunConfig, device: Device, folder: RunFolder | None = None, *, max_steps: int | None = None,
        evaluate: bool = True, on_step: Callable[[int, float], bool] | None = None) -> "Loop":
    """Train a job to the end, see `Loop`."""
    loop = Loop(job, config, device, folder, max_steps=max_steps, evaluate=evaluate, on_step=on_step)
    loop.run()
    return loop


class Loop:
    """One training run: `run()` trains to the end and returns the best evaluation.

    Without a `folder` nothing is written. `max_steps` ends the training after so many optimizer steps, whatever
    --epochs says; `on_step(step, loss)` ends it when it returns True. With `evaluate=False` there are no evaluations,
    no epoch lines, and no best model. `series`: the folder of the --seeds or --folds that the run belongs to, which is
    what a stopped run is resumed by. `described`: what the run's args.json holds; its id and its options are in each
    state. `clock`: how long it may take, see --max_minutes. `loggers`: those of --logger.
    `on_evaluation(n, record)` is told of the n-th evaluation, counted from 1, and says why the training stops there, or
    "".
    """

    def __init__(
        self, job: Job, config: RunConfig, device: Device, folder: RunFolder | None = None, *,
        max_steps: int | None = None, evaluate: bool = True, on_step: Callable[[int, float], bool] | None = None,
        series: RunFolder | None = None, described: dict[str, Any] | None = None, clock: Clock | None = None,
        loggers: Loggers | None = None, on_evaluation: Callable[[int, logs.EpochRecord], str] | None = None,
    ):
        self.job, self.model, self.task, self.optimizer = job, job.model, job.task, job.optimizer
        self.config, self.device, self.folder = config, device, folder
        self.evaluates, self.on_step, self.on_evaluation = evaluate, on_step, on_evaluation
        self.series = series or folder
        self.course = course_of(config, job.steps_per_epoch) if max_steps is None else Course(
            max_steps, job.steps_per_epoch, config.eval_every)
        self.parameters = [p for p in job.model.parameters() if p.requires_grad]
        self.progress = Progress(micro_batch=config.batch_size)
        self.lengths = self.task.lengths
        self.pass_tokens = PASS_TOKENS
        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.average = MovingAverage(self.parameters, config.ema)
        self.started = time.perf_counter()
        self.saved: tuple | None = None
        self.described = described or {}
        self.clock, self.loggers = clock or Clock(), loggers or Loggers()
        self.logs = logs.RunLogs(folder.path, self.loggers) if folder else None
        self.bar = self.new_bar()

    # ----------------------------------------------------------------------- the course of a run

    def run(self) -> dict[str, Any]:
        self.bar = self.new_bar()
        with ExitStack() as stack:
            if self.logs:
                stack.enter_context(self.logs)
            stack.enter_context(self.bar)
            resume = self.series.resume_command(self.config) if self.series else ""
            stack.enter_context(stoppable(resume, lambda: self.save(is_good=False)))
            self.save()
            while not self.is_at_end() and not self.progress.stopped:
                self.train_epoch()
            if self.folder and not self.progress.best:
                self.evaluate()  # diverged before the first evaluation: the weights of the last good state
        return self.progress.best

    def is_at_end(self) -> bool:
        """Are all its steps done, and evaluated?"""
        progress = self.progress
        return progress.step >= self.course.steps and (not self.evaluates or progress.evaluated_at == progress.step)

    def new_bar(self) -> Bar:
        return Bar("train", self.course.steps, self.progress.step,
                   left=lambda: self.clock.left(self.course, self.progress.step))

    def train_epoch(self) -> None:
        """What is left of the present epoch. Ends early after a rollback, which may have changed the epoch."""
        windows, progress = self.task.order(self.progress.epoch), self.progress
        marks, end = self.course.marks(), self.course.end_of(progress.epoch)
        rollbacks = progress.rollbacks
        while not self.progress.stopped:
            SIGNALS.check()
            progress = self.progress
            is_late = self.evaluates and progress.step > 0 and self.clock.is_late()
            if is_late and progress.evaluated_at == progress.step:
                self.stop_in_time()
                return
            if is_late or progress.window in (marks[progress.evaluated], end):
                if self.evaluates:
                    with self.clock.measured(self.clock.evaluations):
                        self.evaluate()
                else:
                    self.next_mark()
                if self.is_at_end() or self.progress.window == 0 or self.progress.rollbacks != rollbacks:
                    return
                continue
            with self.clock.measured(self.clock.steps):
                self.step(windows[progress.window], measure=progress.window == end // 2)
                if self.progress.rollbacks != rollbacks:
                    return
                if self.config.save_every and self.progress.step % self.config.save_every == 0:
                    self.save()

    def stop_in_time(self) -> None:
        """End the training here: one more step, and --max_minutes would not be kept."""
        self.progress.stopped = "time"
        logs.notice(f"--max_minutes: this machine is slower than it was in the beginning; stopping after step "
                    f"{self.progress.step} of {self.course.steps}")

    def next_mark(self) -> None:
        """Go on to the next part of the epoch, or to the next epoch; behind a step between two marks, stay."""
        progress, marks = self.progress, self.course.marks()
        progress.evaluated_at = progress.step
        if progress.window != marks[progress.evaluated]:
            return
        progress.evaluated += 1
        if progress.evaluated == len(marks):
            progress.epoch, progress.window, progress.evaluated = progress.epoch + 1, 0, 0
            progress.epoch_loss_sum, progress.epoch_n_seen = 0.0, 0

    # ----------------------------------------------------------------------- one optimizer step

    def step(self, rows: np.ndarray, measure: bool) -> None:
        """One window: gradients of the mean loss of its examples, checked, clipped, applied, logged.
        `measure` also takes the ratio of update to weight."""
        progress, config = self.progress, self.config
        self.model.train()
        lr = self.set_lr()
        weighted, unweighted = self.accumulate(rows)
        norm = gradients.clip_(self.parameters, config.max_grad_norm, config.max_grad_value)
        if progress.window + 1 in (self.course.marks()[progress.evaluated], self.course.end_of(progress.epoch)):
            self.loggers.take_gradients(self.model)  # an evaluation follows
        together = torch.cat((torch.stack((weighted.mean(), norm)), weighted, unweighted))
        (loss, norm_value), losses, plain = np.split(together.tolist(), (2, 2 + len(rows)))  # one wait for the device
        finite = math.isfinite(loss) and math.isfinite(norm_value)
        if finite or config.guards == "off":
            before = [p.detach().clone() for p in self.parameters] if measure else None
            self.optimizer.step()
            if before:
                progress.update_ratios = gradients.update_ratios(self.model, before)
            self.average.update(progress.step)
        else:
            where = gradients.find_not_finite(self.model, self.device, self.task.losses, self.micro_batches(rows))
            what = "gradient" if math.isfinite(loss) else "loss"
            self.event("skipped", f"the {what} is not finite ({where})", progress.step + 1)
            progress.skipped += 1
        self.optimizer.zero_grad(set_to_none=True)
        if finite and progress.first_loss is None:
            progress.first_loss = float(plain.mean())
            self.check_first_loss(progress.first_loss)
        progress.step += 1
        progress.window += 1
        if finite:
            self.note_spike(plain)
            progress.loss_sum += math.fsum(losses)
            progress.epoch_loss_sum += math.fsum(plain)
            progress.epoch_n_seen += len(rows)
            progress.n_seen += len(rows)
            progress.recent = guards.remember(progress.recent, plain.tolist())
        progress.not_finite_in_a_row = 0 if finite else progress.not_finite_in_a_row + 1
        self.log(logs.StepRecord(progress.step, progress.epoch, lr, float(loss), float(norm_value),
                                 int(self.lengths[rows].sum()), round(self.seconds(), 4)))
        now = f"loss {loss:.3f}, lr {lr:.2e}"
        self.bar.update(f"step {progress.step} of {self.course.steps} (epoch {progress.epoch}), {now}", now)
        is_enough = self.on_step and self.on_step(progress.step, float(loss))
        if config.guards == "on" and (why := guards.divergence(progress.recent, self.guessing_loss(),
                                                               progress.not_finite_in_a_row)):
            self.diverged(why)
        if is_enough and not self.progress.stopped:
            self.progress.stopped = "enough"

    def seconds(self) -> float:
        """Seconds in this loop so far, those before a resume included."""
        return self.progress.seconds + time.perf_counter() - self.started

    def set_lr(self) -> float:
        """Each group's own rate times the schedule's factor; returns the largest, which is what is logged."""
        factor = self.job.schedule(self.progress.step, self.progress.history) * self.progress.lr_factor
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor
        return max(group["lr"] for group in self.optimizer.param_groups)

    def accumulate(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Gradients of the mean loss over `rows`, in micro-batches; returns the losses (N,) with and without the
        batch's weights, on the device.

        Each micro-batch's sum is divided by the window's size, so that every example weighs the same, in a short last
        window and a short last micro-batch too. Out of memory: the window is done again with half the micro-batch and
        the random state that it began with.
        """
        random = devices.random_state(self.device)
        while True:
            try:
                weighted, plain = [], []
                for batch in self.micro_batches(rows):
                    with self.device.autocast():
                        losses = self.task.losses(batch)
                    plain.append(losses.detach())
                    if "weights" in batch:
                        losses = losses * batch["weights"]
                    (losses.sum() / len(rows)).backward()
                    weighted.append(losses.detach())
                return torch.cat(weighted), torch.cat(plain)
            except (RuntimeError, MemoryError) as error:
                if self.config.detect_anomaly and "returned nan" in str(error):
                    raise InputError(f"--detect_anomaly: {error}") from None
                if not is_out_of_memory(error) or self.rows_per_pass(rows) == 1:
                    raise
            # Outside the handler: the error holds the tensors of the pass that failed.
            self.optimizer.zero_grad(set_to_none=True)
            if self.device.is_cuda:
                torch.cuda.empty_cache()
            devices.set_random_state(self.device, random)
            self.progress.micro_batch = -(-self.rows_per_pass(rows) // 2)
            self.event("out_of_memory", f"the micro-batch is {self.progress.micro_batch} from here on; the effective "
                                        f"batch stays {len(rows)}")

    def micro_batches(self, rows: np.ndarray) -> Iterator[dict[str, Tensor]]:
        """The batches of a window's forward passes, on the device. A CPU is as fast at a thousand tokens as at more,
        and has the activations of those alone in memory; a GPU wants large ones."""
        for micro in np.array_split(rows, -(-len(rows) // self.rows_per_pass(rows))):
            yield self.device.put(self.task.make_batch(micro, self.progress.epoch))

    def rows_per_pass(self, rows: np.ndarray) -> int:
        most = self.progress.micro_batch
        if self.device.is_cpu:
            most = min(most, max(1, self.pass_tokens // int(self.lengths[rows].max())))
        return min(most, len(rows))

    # ----------------------------------------------------------------------- the guards

    def check_first_loss(self, loss: float) -> None:
        """Say so when an untrained head does not begin near guessing."""
        n = self.task.n_classes
        if self.config.loss == "ce" and not self.job.is_trained and abs(loss - math.log(n)) > 0.5:
            logs.warn(f"the first loss is {loss:.3f}; an untrained head should begin near ln({n}) = {math.log(n):.3f}")

    def guessing_loss(self) -> float:
        return guards.guessing_loss(self.task.n_classes, self.progress.first_loss)

    def note_spike(self, losses: np.ndarray) -> None:
        """Count a step with a loss spike. The first five are said, of several in a row one. Nothing else follows."""
        progress, was_in_spike = self.progress, self.progress.is_in_spike
        progress.is_in_spike = guards.is_spike(losses.tolist(), self.guessing_loss())
        progress.spikes += progress.is_in_spike
        if progress.is_in_spike and not was_in_spike and progress.spikes <= 5 and self.evaluates:
            self.event("spike", f"the loss of most sentences of this step is {guards.typical(losses.tolist()):.3g} on "
                                f"average; guessing has {self.guessing_loss():.3g}")

    def diverged(self, why: str) -> None:
        """Back to the last good state with a tenth of the rate, ROLLBACKS times; then the training ends there.
        events.jsonl keeps what led here. The other logs are cut after the state is saved: if the run is killed in
        between, each state that is on the disk still finds its whole logs."""
        at, keep = self.progress.step, self.progress
        if not self.folder or not self.logs:
            keep.stopped = "diverged"
            return
        sizes = dict(self.restore(only_good=True)[0]["logs"])
        sizes.pop("events.jsonl", None)
        for name in ("rollbacks", "lr_factor", "skipped", "spikes", "seconds", "micro_batch"):
            setattr(self.progress, name, getattr(keep, name))
        if self.progress.best.get("step") != keep.best.get("step"):
            self.progress.best = {}  # best/ is of steps that are undone now: the next evaluation replaces it
        if keep.rollbacks < ROLLBACKS:
            self.progress.rollbacks += 1
            self.progress.lr_factor *= RATE_CUT
            self.event("rollback", f"{why}. Back to step {self.progress.step}, with the learning rate times "
                                   f"{self.progress.lr_factor:g}", at)
        else:
            self.progress.stopped = "diverged"
            self.event("diverged", f"{why}, after {ROLLBACKS} rollbacks. Stopping with the weights of step "
                                   f"{self.progress.step}. Try a far lower --lr, or a longer --warmup_ratio", at)
        self.bar.go_back(self.progress.step)
        self.save(sizes=sizes)
        self.logs.cut(sizes)

    def event(self, kind: str, detail: str, step: int | None = None) -> None:
        """Something that the user should know of a step, by default the last one that is done: a line on stderr and in
        events.jsonl."""
        step = self.progress.step if step is None else step
        logs.warn(f"step {step}: {kind}: {detail}")
        self.log(logs.Event(step, kind, detail))

    def log(self, record: logs.StepRecord | logs.EpochRecord | logs.Event) -> None:
        if self.logs and self.logs.open:
            self.logs.write(record)

    # ----------------------------------------------------------------------- evaluation and stopping

    def evaluate(self) -> None:
        """The scores, their line in epochs.jsonl and on stdout, the best weights, the patience.

        One after which the run is rolled back is printed, and leaves no line: it is never the best evaluation.
        """
        progress, config = self.progress, self.config
        is_last = progress.window == self.course.end_of(progress.epoch)  # of its epoch
        with self.average.in_place():
            found = self.task.evaluate()
            scores = found.scores
            record = logs.EpochRecord(
                epoch=self.course.epoch_done(progress.epoch, progress.window, progress.evaluated),
                step=progress.step, **scores, seconds=round(self.seconds(), 3),
                train_loss=progress.loss_sum / progress.n_seen if progress.n_seen else None,
                lr=max(group["lr"] for group in self.optimizer.param_groups))
            mean_loss = math.nan
            if is_last and progress.epoch_n_seen >= guards.ENOUGH:
                mean_loss = progress.epoch_loss_sum / progress.epoch_n_seen
            why = guards.decline(logs.columns(record), progress.best, bool(found.collapsed), self.task.n_dev, mean_loss,
                                 self.guessing_loss(), had_rollback=0 < progress.rollbacks < ROLLBACKS)
            collapsed = found.collapsed if why else ""
            logs.say(record.printed() + (f", collapsed: {collapsed}" if collapsed else ""))
            is_rolled_back = bool(why) and config.guards == "on" and not progress.stopped
            is_better = not is_rolled_back and self.keep_if_best(record, scores)
        if is_rolled_back:  # outside `in_place`, which puts the weights back
            self.diverged(", and ".join(filter(None, (collapsed, why))))
            return
        if is_last:
            record = replace(record, update_ratio=progress.update_ratios)
            progress.mean_loss = None if math.isnan(mean_loss) else mean_loss
        self.next_mark()
        progress.since_best = 0 if is_better else progress.since_best + 1
        progress.history.append(scores[config.monitor])
        progress.loss_sum, progress.n_seen = 0.0, 0
        self.log(record)
        self.look_at_patience()
        why = self.on_evaluation(len(progress.history), record) if self.on_evaluation else ""
        if not progress.stopped and not self.is_at_end():
            progress.stopped = why
        self.save()

    def look_at_patience(self) -> None:
        """Stop where --patience is at its end; go on where a larger one was given."""
        progress, config = self.progress, self.config
        if progress.stopped in ("", "patience"):
            progress.stopped = ""
            if config.patience and progress.since_best >= config.patience and not self.is_at_end():
                progress.stopped = "patience"
                logs.say(f"early stop: no better {config.monitor} in {counted(config.patience, 'evaluation')}")

    def keep_if_best(self, record: logs.EpochRecord, scores: dict[str, float]) -> bool:
        """Save the model when it is the best so far; of equals by --monitor, the one with the lower dev loss. Returns
        whether it is better by more than --min_delta, for the patience."""
        best, monitor = self.progress.best, self.config.monitor
        value = scores[monitor] if monitor in MORE_IS_BETTER else -scores[monitor]
        if math.isnan(value) or math.isnan(record.dev_loss):  # of NaN outputs, the accuracy is chance
            value = -math.inf
        before = best.get("monitor")
        is_better = before is None or value > before + self.config.min_delta
        if is_better or (value == before and record.dev_loss < best["dev_loss"]):
            digest = None
            if self.folder:
                with logs.doing(f"saving {self.folder.best}"):
                    digest = self.task.save_best(self.folder.best)
            self.progress.best = {**logs.columns(record), "monitor": value, "manifest": digest}
        return is_better

    # ----------------------------------------------------------------------- the state

    def save(self, is_good: bool = True, sizes: dict[str, int] | None = None) -> None:
        """The state of now, unless it has been saved already. Only a regular save of a healthy run is `is_good`, one to
        roll back to: a signal must not change where that is. `sizes`: of the logs that are about to be cut."""
        stamp = (self.progress.step, len(self.progress.history), self.progress.rollbacks)
        if not self.folder or not self.logs or (self.saved == stamp and not sizes):
            return
        self.logs.flush()
        values, tensors = state.split_tensors(state.collect(
            self.model, self.optimizer, self.device, self.average.values,
            replace(self.progress, seconds=self.seconds()), {**self.logs.sizes(), **(sizes or {})},
            self.logs.sha256(sizes or {}), self.described))
        is_healthy = guards.is_healthy(self.progress.recent, self.guessing_loss(), self.progress.not_finite_in_a_row)
        with logs.doing(f"saving {self.folder.last}"):
            state.save_state(self.folder.last, self.progress.step, tensors, values, is_good and is_healthy)
        self.saved = stamp
        best_folder.remove_previous_best(self.folder.best)

    def resume(self) -> None:
        """Restore everything from the newest whole state in last/, and the logs to their length at that time. Of a run
        that was killed before its first state, there is nothing to restore: it begins.

        Raises InputError where best/ is not the one that the state knows.
        """
        assert self.folder and self.logs, "only a run with a folder can be resumed"
        last, best = self.folder.last, self.folder.best
        for line in state.remove_other_states(last, self.described.get("id")):
            logs.warn(line)
        if state.has_states(last) or self.logs.has_lines():
            saved, is_newest = self.restore()
            if self.progress.best:
                digest = self.progress.best.get("manifest")
                best_folder.restore_best(best, digest)
                # Of a state that was passed over, best/ may be the own: newer, and made again by the same steps.
                if not best_folder.check_best(best, digest if is_newest else None):
                    logs.warn(f"{best}: {best_folder.NO_CHECKSUMS}")
            self.logs.check(saved["logs"], saved.get("log_sha256", {}))
            self.logs.cut(saved["logs"])
            self.started = time.perf_counter()

    def restore(self, only_good: bool = False) -> tuple[dict[str, Any], bool]:
        """Everything but the logs; returns the state, with the `logs`' lengths, and whether it is the newest one.
        Raises InputError for a state that is whole, but not one of this run and this version."""
        assert self.folder, "only a run with a folder has states"
        tensors, values, faults = state.load_state(self.folder.last, only_good)
        for fault in faults:
            logs.warn(fault)
        with state.faults_named(self.folder.last):
            saved = state.join_tensors(values, tensors)
            progress = state.progress_of(saved["progress"])
            state.check_logs(saved)
            state.check_place(progress, self.course)
            state.check_optimizer(self.optimizer, saved["optimizer"])
            state.restore(saved, self.model, self.optimizer, self.device, self.average.values)
        self.progress = progress
        self.saved = (progress.step, len(progress.history), progress.rollbacks)
        return saved, not faults
