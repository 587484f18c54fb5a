"""^C and SIGTERM end a run between two steps: it saves its state, says how to go on, and exits as a shell expects."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from training import logs

AFTER_STEP = "stopping after this step"


class Stop(Exception):
    """A signal asked the run to stop; raised between two steps or two evaluation batches."""


class Signals:
    """While active, SIGINT and SIGTERM (and SIGHUP where there is one) are noted, to be acted on between two steps.
    A second one falls through to the handler that was there before: it stops at once. One that is ignored (nohup's
    SIGHUP) stays ignored."""

    def __init__(self) -> None:
        self.got: int | None = None
        self.before: dict[int, Any] = {}
        self.words = AFTER_STEP

    def saying(self, words: str) -> "Signals":
        """What the first signal says, this time."""
        self.words = words
        return self

    def __enter__(self) -> "Signals":
        self.got, self.before = None, {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self.before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.got = number
        self._restore()
        with suppress(OSError):  # past sys.stderr: it may be in the middle of a line, and cannot be entered twice
            os.write(2, f"\n{self.words} (once more: at once)\n".encode())

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        self._restore()
        self.got = None  # it has been acted on
        self.words = AFTER_STEP

    def check(self) -> None:
        if self.got is not None:
            raise Stop


SIGNALS = Signals()  # one for the process, as the signals are


@contextmanager
def stoppable(resume: str = "", save: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Inside, a signal ends the program between two steps or evaluation batches: `save()`, then the command `resume`
    is printed (if there is one), and the exit code is the one that a shell gives a signal's end."""
    with SIGNALS:
        try:
            yield
            SIGNALS.check()
        except Stop:
            save()
            logs.notice(f"stopped; go on with: {resume}" if resume else "stopped")
            raise SystemExit(128 + (SIGNALS.got or 0)) from None
