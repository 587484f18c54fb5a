"""--logger: the numbers of a run for other programs too, while it runs: CSV, TensorBoard, wandb and MLflow.

All of them follow the JSONL files (training/logs.py): the same records, the same columns. So, when a run goes on from a
state, the JSONL files are cut to it first, and each logger makes its own follow them: no step is there twice. A logger
that fails is switched off with a warning; the run never notices.

The libraries are imported when they are asked for.
"""

import csv
import io
import json
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


def scalars(record: StepRecord | EpochRecord) -> dict[str, float]:
    """The numbers of a record by their names in the loggers: `steps/loss`, `epochs/dev_acc`,
    `epochs/update_ratio/llama.layers.0`."""
    kind = Path(logs.FILES[type(record)]).stem
    found: dict[str, float] = {}
    for name, value in logs.columns(record).items():
        if isinstance(value, dict):
            found |= {f"{kind}/{name}/{part}": number for part, number in value.items()}
        elif name != "step" and value is not None:
            found[f"{kind}/{name}"] = value
    return found


# --------------------------------------------------------------------------- all of them


class Logger(Protocol):
    """One of them. Any error means that it is switched off."""

    def start(self, steps: list[dict[str, Any]], epochs: list[dict[str, Any]]) -> None:
        """Go on behind these lines of steps.jsonl and epochs.jsonl; what was logged of later steps is undone."""

    def write(self, record: StepRecord | EpochRecord, histograms: dict[str, np.ndarray]) -> None:
        """A step or an evaluation; with an evaluation, numbers by their name whose histogram is wanted."""

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
            "csv": lambda: CsvTables(folder.path), "tensorboard": lambda: TensorBoard(folder.loggers)}
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
        self.each(lambda logger: logger.write(record, finite))

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

    def start(self, steps: list[dict[str, Any]], epochs: list[dict[str, Any]]) -> None:
        self.close(is_whole=False)
        for kind, rows in ((StepRecord, steps), (EpochRecord, epochs)):
            text = ",".join(f.name for f in fields(kind)) + "\n" + "".join(_csv_row(kind, row) for row in rows)
            files.write_text(self.paths[kind], text, follow=False)
            self.open[kind] = open(self.paths[kind], "a", encoding="utf-8", newline="", opener=files.no_follow)

    def write(self, record: StepRecord | EpochRecord, histograms: dict[str, np.ndarray]) -> None:
        file = self.open[type(record)]
        file.write(_csv_row(type(record), logs.columns(record)))
        file.flush()

    def flush(self) -> None:
        pass

    def finish(self, final: Final) -> None:
        pass

    def close(self, is_whole: bool) -> None:
        while self.open:
            self.open.popitem()[1].close()


def _csv_row(kind: type, row: dict[str, Any]) -> str:
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

    def start(self, steps: list[dict[str, Any]], epochs: list[dict[str, Any]]) -> None:
        from tensorboardX.proto.event_pb2 import SessionLog

        self.close(is_whole=False)
        files.check_plain(self.folder, is_folder=True)
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
            self.write(StepRecord(**last), {})

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

    def write(self, record: StepRecord | EpochRecord, histograms: dict[str, np.ndarray]) -> None:
        from tensorboardX import summary

        self.scalars(record.step, scalars(record))
        for name, values in histograms.items():
            self.event(record.step, summary=summary.histogram(name, np.clip(values, EDGES[0], EDGES[-1]), EDGES))
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
        code = "\n".join(f"    {line}" for line in final.mistakes)  # as code: nothing in it is read as Markdown
        self.event(final.step, summary=summary.text("mistakes/dev", code or "There is none."))

    def close(self, is_whole: bool) -> None:
        writer, self.writer = self.writer, None
        if writer:
            writer.close()
