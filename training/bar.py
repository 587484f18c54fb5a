"""How far something is: a bar on a terminal, and elsewhere (`> log 2>&1`) a line now and then."""

import math
import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from config import duration
from training import logs

FIRST, EVERY = 10.0, 60.0  # seconds until the first line, and between two


class Bar:
    """A progress bar for `total` steps, `done` of which are done already. Use it as a context manager.

    Where stderr is no terminal it says a line every minute or so. Bars inside another one keep that one's time.
    `left` says how long the rest will take, in seconds; without it, as long as each step took so far.
    """

    def __init__(self, label: str, total: int, done: int = 0, is_kept: bool = True,
                 left: Callable[[], float | None] | None = None):
        self.label, self.total, self.done, self.left = label, total, done, left or self._as_fast_as_so_far
        self.is_kept, self.bar = is_kept, tqdm(disable=True)  # there is none before it is entered
        self.began, self.done_before, self.due = time.monotonic(), done, math.inf

    def __enter__(self) -> "Bar":
        self.bar = tqdm(total=self.total, initial=self.done, desc=self.label, disable=None,
                        leave=self.is_kept and not logs.bars, file=sys.stderr, mininterval=0.5)
        self.began = time.monotonic()
        self.due = self.began + FIRST
        logs.bars.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        logs.bars.remove(self)
        self.bar.close()

    def update(self, line: str, on_bar: str = "") -> None:
        """One step is done. `line`: what is said where there is no bar, without the time that is left; `on_bar`: what
        stands behind the bar."""
        self.done += 1
        if on_bar:
            self.bar.set_postfix_str(on_bar, refresh=False)
        self.bar.update()
        outer = logs.bars[0] if logs.bars else self
        if self.bar.disable and time.monotonic() >= outer.due:
            outer.due = time.monotonic() + EVERY
            left = self.left()
            logs.notice(line + ("" if left is None else f", {duration(left)} left"))

    def go_back(self, done: int) -> None:
        """So many steps are done, and no more."""
        self.done = self.done_before = done
        self.began = time.monotonic()
        self.bar.reset(self.total)
        self.bar.update(done)

    def clear(self) -> None:
        """Make room for a line; the bar comes back with its next step."""
        self.bar.clear()

    def _as_fast_as_so_far(self) -> float | None:
        steps = self.done - self.done_before
        return (time.monotonic() - self.began) / steps * (self.total - self.done) if steps else None
