"""The course of a run: how many optimizer steps, and after which of them it is evaluated.

Nothing here imports torch.
"""

from dataclasses import dataclass

from config import RunConfig
from schedule import run_length


@dataclass(frozen=True)
class Course:
    """`steps` optimizer steps, `steps_per_epoch` to an epoch; the last epoch may be cut short. An evaluation follows
    every `eval_every` part of an epoch, each epoch, and the last step."""

    steps: int
    steps_per_epoch: int
    eval_every: float

    @property
    def epochs(self) -> int:
        """The epochs that are begun."""
        return -(-self.steps // self.steps_per_epoch)

    def marks(self) -> list[int]:
        """After which steps of an epoch there is an evaluation: every `eval_every` of it, and at its end."""
        n = max(1, round(min(self.steps_per_epoch, 1 / self.eval_every)))  # no more than one a step
        return sorted({max(1, round(self.steps_per_epoch * (i + 1) / n)) for i in range(n)})

    def end_of(self, epoch: int) -> int:
        """How many steps this epoch has."""
        return min(self.steps_per_epoch, self.steps - epoch * self.steps_per_epoch)

    def epoch_done(self, epoch: int, window: int, evaluated: int) -> float:
        """The epoch of an evaluation after so many windows and evaluations of it: its number, or where there are
        several in one, how many are done."""
        marks = self.marks()
        if window not in (0, marks[evaluated]):
            return round(epoch + window / self.steps_per_epoch, 3)
        return epoch if len(marks) == 1 else round(epoch + (evaluated + 1) / len(marks), 3)

    def n_evaluations(self, done: int = 0) -> int:
        """How many evaluations follow after `done` steps."""
        marks = self.marks()

        def count(steps: int) -> int:  # the regular ones up to there
            epochs, rest = divmod(steps, self.steps_per_epoch)
            return epochs * len(marks) + sum(mark <= rest for mark in marks)

        last_is_regular = self.steps % self.steps_per_epoch in (0, *marks)
        return count(self.steps) - count(done) + (done < self.steps and not last_is_regular)


def course_of(config: RunConfig, steps_per_epoch: int) -> Course:
    """The course that a run's options ask for: --epochs, which --max_steps only shortens."""
    steps = run_length(config.epochs, steps_per_epoch, config.max_steps)
    return Course(steps, steps_per_epoch, config.eval_every)
