"""--logger: the numbers of a run for other programs too, while it runs: CSV, TensorBoard, wandb and MLflow.

All of them follow the JSONL files (training/logs.py): the same records, the same columns. So, when a run goes on from a
state, the JSONL files are cut to it first, and each logger makes its own follow them: no step is there twice. A logger
that fails is switched off with a warning; the run never notices.

The libraries are imported when they are asked for.
"""

import csv
import io
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
from torch import nn

from config import InputError, RunConfig, names_in
from formats import files
from training import gradients, logs
from training.logs import EpochRecord, Event, StepRecord
from training.run_folder import RunFolder

Row = dict[str, Any]  # a line of a JSONL file
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
WITH_HISTOGRAMS = {"tensorboard", "wandb"}
# Of a histogram's bins, as TensorFlow has them: a tenth wider each, since gradients have all orders of magnitude.
POSITIVE = 1e-12 * 1.1 ** np.arange(774)
EDGES = np.concatenate((-POSITIVE[::-1], [0.0], POSITIVE))
SECONDS = 10.0  # what is written within an epoch can be seen after so long


@dataclass(frozen=True)
class Final:
    """What is known at the end of a run: its options, its scores, as {"dev_acc": 0.41}, after how many steps, and its
    most confident mistakes on dev, a line each."""

    options: dict[str, Any]
    scores: dict[str, float]
    step: int
    mistakes: list[str]


def check_installed(config: RunConfig) -> None:
    """Raises InputError for a --logger whose library is not there."""
    for name in names_in(config.logger):
        if name in PACKAGES and find_spec(PACKAGES[name]) is None:
            raise InputError(f"--logger {name}: the package {PACKAGES[name]} is not installed; "
                             f"pip install {PACKAGES[name]}")


def scores_of(result: dict[str, Any]) -> dict[str, float]:
    """The scores in a run's result.json as {"dev_acc": ..., "test_f1": ..., "best_epoch": ...}."""
    found = {f"{split}_{name}": value for split in ("dev", "test") for name, value in result.get(split, {}).items()
             if name != "n" and type(value) in (int, float)}
    return {**found, "best_epoch": result["best_epoch"]}


def scalars(kind: type, row: Row) -> dict[str, float]:
    """The numbers of a line of a record's file by their names in the loggers: `steps/loss`, `epochs/dev_acc`,
    `epochs/update_ratio/llama.layers.0`."""
    group = Path(logs.FILES[kind]).stem
    found: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= {f"{group}/{name}/{part}": number for part, number in value.items()}
        elif name != "step" and value is not None:
            found[f"{group}/{name}"] = value
    return found


def in_order(steps: list[Row], epochs: list[Row]) -> list[tuple[type, Row]]:
    """The lines of both files in the order in which they were written: a step, and then its evaluation."""
    both = [(StepRecord, row) for row in steps] + [(EpochRecord, row) for row in epochs]
    return sorted(both, key=lambda pair: (pair[1]["step"], pair[0] is EpochRecord))


def as_code(mistakes: list[str]) -> str:
    """Lines as Markdown's code, so that nothing in a sentence is read as Markdown."""
    return "\n".join(f"    {line}" for line in mistakes) or "no mistakes"


# --------------------------------------------------------------------------- all of them


class Logger(Protocol):
    """One of them. Any error means that it is switched off."""

    def start(self, steps: list[Row], epochs: list[Row]) -> None:
        """Go on behind these lines of steps.jsonl and epochs.jsonl; what was logged of later steps is undone."""

    def write(self, kind: type, row: Row, histograms: dict[str, np.ndarray]) -> None:
        """A line of the file of this kind of record; of an evaluation, also numbers by their name whose histogram is
        wanted."""

    def flush(self) -> None:
        """Everything must be on the disk."""

    def finish(self, final: Final) -> None:
        """The run has its scores."""

    def close(self, is_whole: bool) -> None:
        """Nothing follows. `is_whole`: did the run end by itself?"""


class Loggers:
    """Those that a run was asked for. Use it as a context manager. Without a folder there are none."""

    def __init__(self, folder: RunFolder | None = None, names: tuple[str, ...] = (), run_id: str = ""):
        self.folder = folder
        self.active: dict[str, Logger] = {}
        self.gradients: dict[str, np.ndarray] = {}
        for name in names if folder else ():
            self.guarded(name, lambda name=name: self.add(name, run_id))  # type: ignore[misc]

    def add(self, name: str, run_id: str) -> None:
        assert self.folder
        folder = self.folder
        made: dict[str, Callable[[], Logger]] = {
            "csv": lambda: CsvTables(folder.path), "tensorboard": lambda: TensorBoard(folder.loggers),
            "wandb": lambda: Wandb(folder, run_id), "mlflow": lambda: MLflow(folder, run_id)}
        self.active[name] = made[name]()

    def guarded(self, name: str, do: Callable[[], object]) -> None:
        """Do something with a logger, and when it fails, warn and go on without it."""
        try:
            do()
        except Exception as error:  # noqa: BLE001 -- a library's error, of whatever kind, must not end a run
            failed = self.active.pop(name, None)
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            logs.warn(f"--logger {name}: {why}; it is switched off, and the run goes on")
            if failed:
                with suppress(Exception):
                    failed.close(is_whole=False)

    def each(self, do: Callable[[Logger], object]) -> None:
        for name, logger in [*self.active.items()]:
            self.guarded(name, lambda logger=logger: do(logger))  # type: ignore[misc]

    def __enter__(self) -> "Loggers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.each(lambda logger: logger.close(kind is None))
        self.active = {}

    def start(self) -> None:
        if self.active and self.folder:
            self.gradients = {}
            steps, epochs = logs.read_log(self.folder.steps), logs.read_log(self.folder.epochs)
            self.each(lambda logger: logger.start(steps, epochs))

    def take_gradients(self, model: nn.Module) -> None:
        """Keep numbers of the present gradients for the evaluation that follows, see `gradients.sampled`."""
        if self.active.keys() & WITH_HISTOGRAMS:
            try:
                self.gradients = gradients.sampled(model)
            except (RuntimeError, MemoryError):  # no memory for them: there is no histogram this time
                self.gradients = {}

    def write(self, record: StepRecord | EpochRecord | Event) -> None:
        if isinstance(record, Event) or not self.active:
            return
        histograms = {}
        if isinstance(record, EpochRecord):
            histograms = {f"gradients/{name}": values for name, values in self.gradients.items()}
            if record.update_ratio:
                histograms["update_ratio"] = np.array([*record.update_ratio.values()])
            self.gradients = {}
        finite = {name: some for name, values in histograms.items() if len(some := values[np.isfinite(values)])}
        self.each(lambda logger: logger.write(type(record), logs.columns(record), finite))

    def flush(self) -> None:
        self.each(lambda logger: logger.flush())

    def finish(self, final: Final) -> None:
        self.each(lambda logger: logger.finish(final))


# --------------------------------------------------------------------------- csv


class CsvTables:
    """steps.csv and epochs.csv: a row for each line of the JSONL file, a column for each field of its record; an empty
    cell is None, and the update ratios are JSON in theirs."""

    def __init__(self, folder: Path):
        self.paths = {kind: folder / name for kind, name in logs.TABLES.items()}
        self.open: dict[type, TextIO] = {}

    def start(self, steps: list[Row], epochs: list[Row]) -> None:
        self.close(is_whole=False)
        for kind, rows in ((StepRecord, steps), (EpochRecord, epochs)):
            text = ",".join(f.name for f in fields(kind)) + "\n" + "".join(_csv_row(kind, row) for row in rows)
            files.write_text(self.paths[kind], text, follow=False)
            self.open[kind] = open(self.paths[kind], "a", encoding="utf-8", newline="", opener=files.no_follow)

    def write(self, kind: type, row: Row, histograms: dict[str, np.ndarray]) -> None:
        self.open[kind].write(_csv_row(kind, row))
        self.open[kind].flush()

    def flush(self) -> None:
        pass

    def finish(self, final: Final) -> None:
        pass

    def close(self, is_whole: bool) -> None:
        while self.open:
            self.open.popitem()[1].close()


def _csv_row(kind: type, row: Row) -> str:
    text = io.StringIO()
    cells = (row.get(f.name) for f in fields(kind))
    csv.writer(text, lineterminator="\n").writerow(json.dumps(c) if isinstance(c, dict) else c for c in cells)
    return text.getvalue()


# --------------------------------------------------------------------------- TensorBoard


class TensorBoard:
    """An events file, written through tensorboardX: through its record writer, since the thread of its SummaryWriter
    keeps errors for itself and then waits for ever. `tensorboard --logdir runs` shows the run.

    When a run goes on, a new file begins with the step from which on TensorBoard forgets what the older ones have.
    What is said once, at the end, has a file of its own, which is removed when the run goes on after all.
    """

    FINAL = ".final"  # the end of that file's name

    def __init__(self, folder: Path):
        import tensorboardX.record_writer  # noqa: F401 -- is it there?

        self.folder = folder
        self.writer: Any = None
        self.flushed = time.monotonic()

    def start(self, steps: list[Row], epochs: list[Row]) -> None:
        from tensorboardX.proto.event_pb2 import SessionLog

        self.close(is_whole=False)
        self.folder.mkdir(exist_ok=True)
        for path in self.folder.glob(f"events.out.tfevents.*{self.FINAL}"):
            path.unlink()
        is_new = not any(self.folder.glob("events.out.tfevents.*"))
        self.begin_file()
        if is_new:
            return
        last = steps[-1] if steps else {"step": 0}
        is_evaluated = bool(epochs) and epochs[-1]["step"] == last["step"]
        # Where the last step's evaluation is still to come, an older one of it may be there: it goes, and so its step.
        self.event(last["step"] + is_evaluated, session_log=SessionLog(status=SessionLog.START))
        if steps and not is_evaluated:
            self.write(StepRecord, last, {})

    def begin_file(self, suffix: str = "") -> None:
        from tensorboardX.event_file_writer import EventsWriter

        n = len([*self.folder.glob("events.out.tfevents.*")])  # two files of one second must not have one name
        self.writer = EventsWriter(str(self.folder / "events"), f".{n}{suffix}")

    def event(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event as EventProto

        self.writer.write_event(EventProto(wall_time=time.time(), step=step, **content))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        self.event(step, summary=Summary(value=[
            Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]))

    def write(self, kind: type, row: Row, histograms: dict[str, np.ndarray]) -> None:
        from tensorboardX import summary

        self.scalars(row["step"], scalars(kind, row))
        for name, values in histograms.items():
            self.event(row["step"], summary=summary.histogram(name, np.clip(values, EDGES[0], EDGES[-1]), EDGES))
        if time.monotonic() - self.flushed > SECONDS:
            self.flush()

    def flush(self) -> None:
        if self.writer:
            self.writer.flush()
        self.flushed = time.monotonic()

    def finish(self, final: Final) -> None:
        from tensorboardX import summary

        self.close(is_whole=True)
        self.begin_file(self.FINAL)
        scores = {f"final/{name}": value for name, value in final.scores.items()}
        values = {name: value if isinstance(value, bool | int | float | str) else str(value)
                  for name, value in final.options.items() if value is not None}
        for part in summary.hparams(values, scores):
            self.event(0, summary=part)
        self.scalars(final.step, scores)
        self.event(final.step, summary=summary.text("mistakes/dev", as_code(final.mistakes)))

    def close(self, is_whole: bool) -> None:
        writer, self.writer = self.writer, None
        if writer:
            writer.close()


# --------------------------------------------------------------------------- wandb


class Wandb:
    """A run of Weights & Biases, offline: loggers/wandb/offline-run-*, for `wandb sync`. What is in its memory when the
    process is killed is lost, and there is no going back in it: a run that goes on is written anew from the JSONL
    files, under the same id."""

    def __init__(self, folder: RunFolder, run_id: str):
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self.wandb, self.folder, self.id = wandb, folder, run_id
        self.run: Any = None

    def start(self, steps: list[Row], epochs: list[Row]) -> None:
        self.close(is_whole=False)
        self.folder.loggers.mkdir(exist_ok=True)
        for old in self.folder.loggers.glob(f"wandb/offline-run-*-{self.id}"):
            shutil.rmtree(old)
        self.run = self.wandb.init(
            project="minllama", name=str(self.folder), id=self.id, resume="allow", mode="offline",
            dir=str(self.folder.loggers), settings=self.wandb.Settings(
                console="off", silent=True, symlink=False, disable_git=True, disable_code=True, x_disable_stats=True))
        for kind, row in in_order(steps, epochs):
            self.write(kind, row, {})

    def write(self, kind: type, row: Row, histograms: dict[str, np.ndarray]) -> None:
        pictures = {name: self.wandb.Histogram(values) for name, values in histograms.items()}
        self.run.log({**scalars(kind, row), **pictures}, step=row["step"])

    def flush(self) -> None:
        pass  # it has no such call

    def finish(self, final: Final) -> None:
        self.run.config.update(final.options, allow_val_change=True)
        self.run.log({"mistakes/dev": self.wandb.Table(["mistake"], [[line] for line in final.mistakes])},
                     step=final.step)
        self.run.summary.update({f"final/{name}": value for name, value in final.scores.items()})

    def close(self, is_whole: bool) -> None:
        run, self.run = self.run, None
        if run:
            run.finish(exit_code=0 if is_whole else 1)


# --------------------------------------------------------------------------- MLflow


class MLflow:
    """A run of MLflow in loggers/mlflow.db, for `mlflow ui`. A run that goes on keeps its id, unless later steps than
    it goes on from are there already: then it is deleted, and a new one has what the JSONL files have."""

    AT_ONCE = 1000  # metrics, and no more: MLflow's limit

    def __init__(self, folder: RunFolder, run_id: str):
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        folder.loggers.mkdir(exist_ok=True)
        place = folder.loggers.resolve()
        self.mlflow, self.name, self.tag = mlflow, str(folder), run_id
        self.client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{(place / 'mlflow.db').as_posix()}")
        known = self.client.get_experiment_by_name("minllama")
        self.experiment = known.experiment_id if known else self.client.create_experiment(
            "minllama", artifact_location=(place / "mlflow").as_uri())
        self.run = ""
        self.waiting: list[Any] = []  # metrics: a step alone would take as long as a hundred

    def start(self, steps: list[Row], epochs: list[Row]) -> None:
        self.waiting = []
        there: dict[type, set[int]] = {StepRecord: {row["step"] for row in steps},
                                       EpochRecord: {row["step"] for row in epochs}}
        known: dict[type, set[int]] = {StepRecord: set(), EpochRecord: set()}
        self.run = ""
        for run in self.client.search_runs([self.experiment], f"tags.minllama = '{self.tag}'"):
            known = {kind: {metric.step for metric in self.client.get_metric_history(run.info.run_id, name)}
                     for kind, name in ((StepRecord, "steps/loss"), (EpochRecord, "epochs/dev_loss"))}
            self.run = run.info.run_id
        if self.run and any(known[kind] - there[kind] for kind in known):
            self.client.delete_run(self.run)
            self.run, known = "", {StepRecord: set(), EpochRecord: set()}
        if self.run:
            self.client.update_run(self.run, "RUNNING")
        else:
            self.run = self.client.create_run(self.experiment, tags={"minllama": self.tag},
                                              run_name=self.name).info.run_id
        for kind, row in in_order(steps, epochs):
            if row["step"] not in known[kind]:
                self.write(kind, row, {})
        self.flush()

    def write(self, kind: type, row: Row, histograms: dict[str, np.ndarray]) -> None:
        self.add(scalars(kind, row), row["step"])
        if len(self.waiting) >= self.AT_ONCE:
            self.flush()

    def add(self, values: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self.waiting += [self.mlflow.entities.Metric(name, value, now, step) for name, value in values.items()]

    def flush(self) -> None:
        while self.waiting:
            self.client.log_batch(self.run, metrics=self.waiting[: self.AT_ONCE])
            del self.waiting[: self.AT_ONCE]

    def finish(self, final: Final) -> None:
        self.add({f"final/{name}": value for name, value in final.scores.items()}, final.step)
        self.flush()
        known = self.client.get_run(self.run).data.params
        for name, value in final.options.items():
            if value is not None and name not in known:
                self.client.log_param(self.run, name, value)
            elif name in known and str(value) != known[name]:  # of a run that went on for longer: a param stays
                self.client.set_tag(self.run, f"{name}.now", str(value))
        # The run's description, and no file: where files go stands in the database, which may be somebody else's.
        self.client.set_tag(self.run, "mlflow.note.content", as_code(final.mistakes)[:5000])

    def close(self, is_whole: bool) -> None:
        if self.run:
            self.flush()
            self.client.set_terminated(self.run, "FINISHED" if is_whole else "KILLED")
