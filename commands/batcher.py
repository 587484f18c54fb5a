"""Answers together what is asked at the same time: one thread computes, and takes everything that waits."""

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

from training import logs

Compute = Callable[[list[str]], np.ndarray]  # texts to their probabilities (N, C)


class QueueFull(Exception):
    """More texts wait than may."""


class Batcher:
    """`submit` texts from any thread; `at_once` texts at most are computed together (more where one caller brings
    more), and `most_waiting` may wait beside them, with `most_characters` together: long texts take long."""

    def __init__(self, compute: Compute, at_once: int, most_waiting: int, most_characters: int = 1 << 62):
        self._compute, self._at_once, self._most_waiting = compute, at_once, most_waiting
        self._most_characters, self._n_characters = most_characters, 0
        self._queue: queue.SimpleQueue[tuple[list[str], Future[np.ndarray]] | None] = queue.SimpleQueue()
        self._n_waiting, self._lock = 0, threading.Lock()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, texts: Sequence[str]) -> "Future[np.ndarray]":
        """The probabilities (N, C) to come. Raises QueueFull."""
        with self._lock:
            size = sum(map(len, texts))
            if self._n_waiting and (self._n_waiting + len(texts) > self._most_waiting
                                    or self._n_characters + size > self._most_characters):
                raise QueueFull
            self._n_waiting += len(texts)
            self._n_characters += size
        future: Future[np.ndarray] = Future()
        self._queue.put((list(texts), future))
        return future

    def stop(self, seconds: float | None = None) -> None:
        """Returns when everything that was submitted has been answered, or after so many seconds. Nothing may be
        submitted any more."""
        self._queue.put(None)
        self._thread.join(seconds)

    def _work(self) -> None:
        while (first := self._queue.get()) is not None:
            jobs, n, is_last = [first], len(first[0]), False
            while n < self._at_once and not is_last:
                try:
                    more = self._queue.get_nowait()
                except queue.Empty:
                    break
                if more is None:
                    is_last = True
                else:
                    jobs.append(more)
                    n += len(more[0])
            with self._lock:
                self._n_waiting -= n
                self._n_characters -= sum(len(text) for texts, _ in jobs for text in texts)
            self._answer(jobs)
            if is_last:
                return

    def _answer(self, jobs: list[tuple[list[str], "Future[np.ndarray]"]]) -> None:
        try:
            found = self._compute([text for texts, _ in jobs for text in texts])
        except Exception as error:  # every caller gets it, and the next batch is computed
            logs.notice(f"error: {type(error).__name__}: {error}")
            for _, future in jobs:
                future.set_exception(error)
            return
        start = 0
        for texts, future in jobs:
            future.set_result(found[start : start + len(texts)])
            start += len(texts)
