"""stdout and stderr that may be closed, full, or left by their reader: none of it ends a training run, or passes for
success."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

from training import logs

stdout_is_closed = False  # did the caller close it? `open_streams` sets it


def open_streams() -> None:
    """Give the standard streams that the caller closed (`>&-`) an empty end, or the next file that is opened would get
    their number and the messages."""
    global stdout_is_closed
    stdout_is_closed = sys.stdout is None
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_RDWR)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))


def to_nowhere(stream: Any) -> None:
    """Whatever is still written to this stream is dropped: nobody can read it."""
    handle = os.open(os.devnull, os.O_WRONLY)
    os.dup2(handle, stream.fileno())
    os.close(handle)


class _Stream:
    """A stream whose errors go to `handle(stream, error)`, which raises or goes on. `fault` is the error of a stdout
    that could not be written."""

    def __init__(self, stream: Any, handle: Callable[["_Stream", OSError], None]):
        self.stream, self.handle = stream, handle
        self.fault: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int | None:
        return self._try(self.stream.write, text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, do: Callable, *arguments: Any) -> Any:
        try:
            return do(*arguments)
        except OSError as error:
            self.handle(self, error)
            return None


def _name_fault(stdout: _Stream, error: OSError) -> None:
    """An error of stdout that is not a broken pipe is named."""
    if isinstance(error, BrokenPipeError):
        raise error
    to_nowhere(stdout.stream)  # else Python tries what is left once more at its end
    stdout.fault = OSError(f"standard output could not be written ({error.strerror}); send it to where there is room, "
                           "and run this again")
    raise stdout.fault from None


def _drop(stderr: _Stream, error: OSError) -> None:
    """Messages that stderr does not take are dropped: they end nothing."""
    to_nowhere(stderr.stream)


def _go_on(stream: _Stream, error: OSError) -> None:
    """The reader of the stream may leave."""
    if not isinstance(error, BrokenPipeError):
        raise error
    to_nowhere(stream.stream)
    logs.notice("the reader of the output has left; the run goes on, its folder has everything")


@contextmanager
def _redirected(of_stdout: Callable[[_Stream, OSError], None], of_stderr: Callable[[_Stream, OSError], None]
                ) -> Iterator[None]:
    """Inside, the errors of stdout and stderr go to these."""
    out: Any = _Stream(sys.stdout, of_stdout)
    err: Any = _Stream(sys.stderr, of_stderr)
    with redirect_stdout(out), redirect_stderr(err):
        yield


@contextmanager
def checked_streams() -> Iterator[None]:
    """Inside, stdout and stderr are UTF-8, and their errors are named (stdout) or dropped (stderr)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # a console may speak another encoding
    with _redirected(_name_fault, _drop):
        yield


@contextmanager
def without_readers() -> Iterator[None]:
    """Inside, a closed stdout or stderr (`| head -1`) ends nothing: a training run's results are in its folder."""
    with _redirected(_go_on, _go_on):
        yield
        sys.stdout.flush()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, ^C does nothing: the program is at its end, and one more would only add a traceback."""
    if threading.current_thread() is not threading.main_thread():  # elsewhere Python allows no handlers
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def flush_stdout() -> None:
    """Raises OSError where something that was written to stdout is lost: argparse ignores that."""
    sys.stdout.flush()
    fault = getattr(sys.stdout, "fault", None)
    if fault:
        raise fault from None
