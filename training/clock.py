"""The time that a run takes: as it was estimated, then as it is measured; and when it must be over.

Nothing here imports torch.
"""

import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from config import RunConfig
from training.course import Course

START_AND_END = 1.5  # seconds, of Python itself
RESERVE = 1.5  # what must follow is taken to last so many times as long
command_began = time.monotonic()  # `begin_command` sets it


def begin_command() -> None:
    """The command that runs in this process begins now."""
    global command_began
    command_began = time.monotonic()


def deadline_of(config: RunConfig) -> float | None:
    """When --max_minutes are over, on time.monotonic(); a little before, for the start and the end of the process."""
    return None if config.max_minutes is None else command_began + 60 * config.max_minutes - START_AND_END


@dataclass(frozen=True)
class Times:
    """Seconds of an optimizer step; of an evaluation, the states saved behind it included; and of what comes once: the
    first state, the best weights read again, the predictions for dev and test."""

    step: float
    evaluation: float
    once: float

    def of(self, course: Course, done: int = 0) -> float:
        """Seconds of a run of this course from step `done` on."""
        return (course.steps - done) * self.step + course.n_evaluations(done) * self.evaluation + self.once


@dataclass
class Clock:
    """What is known of a run's time. `estimated`: before it began; `deadline`: when it must be over, on
    time.monotonic(). The last steps and evaluations are measured."""

    estimated: Times | None = None
    deadline: float | None = None
    steps: deque[float] = field(default_factory=lambda: deque(maxlen=50))
    evaluations: deque[float] = field(default_factory=lambda: deque(maxlen=10))

    @contextmanager
    def measured(self, kind: deque[float]) -> Iterator[None]:
        """Inside, one step or one evaluation happens."""
        began = time.monotonic()
        yield
        kind.append(time.monotonic() - began)

    def left(self, course: Course, done: int) -> float | None:
        """About how many seconds follow after so many steps; None where nothing is known."""
        if not self.steps:
            return self.estimated.of(course, done) if self.estimated else None
        step = sum(self.steps) / len(self.steps)
        evaluation = self.estimated.evaluation if self.estimated else 0.0
        if self.evaluations:
            evaluation = sum(self.evaluations) / len(self.evaluations)
        return Times(step, evaluation, self.estimated.once if self.estimated else 0.0).of(course, done)

    def is_late(self) -> bool:
        """Would one more step, and all that must follow it, end behind the deadline? Where the machine is slower than
        it was, everything that follows is taken to be slower too."""
        if self.deadline is None or not self.estimated:
            return False
        expected, recent = self.estimated, list(self.steps)[-10:]
        ratios = [statistics.median(found) / usual for found, usual in (
            (recent, expected.step), (self.evaluations, expected.evaluation)) if found]
        slower = max([1.0, *ratios])
        step, evaluation = max([expected.step, *recent]), max([slower * expected.evaluation, *self.evaluations])
        return time.monotonic() + RESERVE * (step + evaluation + slower * expected.once) > self.deadline


def steps_that_fit(times: Times, course: Course, seconds: float) -> int:
    """How many steps of a course fit into these seconds, with the evaluations and all that comes once; 0 where not even
    one does."""
    few, many = 0, course.steps
    while few < many:
        middle = (few + many + 1) // 2
        shorter = Course(middle, course.steps_per_epoch, course.eval_every)
        few, many = (middle, many) if times.of(shorter) <= seconds else (few, middle - 1)
    return few
