"""Answers together what is asked at the same time: one thread computes, and takes what waits."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np

from training import logs

Compute = Callable[[list[str]], np.ndarray]  # texts to their probabilities (N, C)
Job = tuple[list[str], "Future[np.ndarray]"]
NO_LIMIT = 1 << 62


class QueueFull(Exception):
    """More texts wait than may."""


class Stopped(Exception):
    """The service has stopped before these texts were computed."""


class Batcher:
    """`submit` texts from any thread; texts are computed together until they are `at_once` or have
    `characters_at_once` (more where one caller brings more), and `most_waiting` may wait beside them, with
    `most_characters` together: long texts take long. Who cancels the future is not computed any more."""

    def __init__(self, compute: Compute, at_once: int, most_waiting: int, most_characters: int = NO_LIMIT,
                 characters_at_once: int = NO_LIMIT):
        self._compute, self._at_once, self._characters_at_once = compute, at_once, characters_at_once
        self._most_waiting, self._most_characters = most_waiting, most_characters
        self._queue: deque[Job] = deque()
        self._n_waiting = self._n_characters = 0  # of the queue
        self._is_stopping, self._changed = False, threading.Condition()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, texts: Sequence[str]) -> "Future[np.ndarray]":
        """The probabilities (N, C) to come. Raises QueueFull, or Stopped."""
        future: Future[np.ndarray] = Future()
        with self._changed:
            if self._is_stopping:
                raise Stopped
            if not self._has_room(texts):
                for job in [job for job in self._queue if job[1].cancelled()]:
                    self._queue.remove(job)
                    self._count(job[0], -1)
            if not self._has_room(texts):
                raise QueueFull
            self._queue.append((list(texts), future))
            self._count(texts, 1)
            self._changed.notify()
        return future

    def stop(self, seconds: float | None = None) -> bool:
        """Compute what was submitted, for so many seconds at most; what still waits then raises Stopped. Returns
        whether nothing is being computed any more."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        self._thread.join(seconds)
        with self._changed:
            left, self._queue = self._queue, deque()
            self._n_waiting = self._n_characters = 0
        for _, future in left:
            if future.set_running_or_notify_cancel():
                future.set_exception(Stopped())
        return not self._thread.is_alive()

    def _has_room(self, texts: Sequence[str]) -> bool:
        return not self._n_waiting or (self._n_waiting + len(texts) <= self._most_waiting
                                       and self._n_characters + _size(texts) <= self._most_characters)

    def _count(self, texts: Sequence[str], sign: int) -> None:
        self._n_waiting += sign * len(texts)
        self._n_characters += sign * _size(texts)

    def _work(self) -> None:
        while jobs := self._next():
            self._answer(jobs)

    def _next(self) -> list[Job]:
        """What is computed together now; waits for it. None at the end."""
        jobs: list[Job] = []
        n = size = 0
        with self._changed:
            while not jobs:
                while not self._queue and not self._is_stopping:
                    self._changed.wait()
                if not self._queue:
                    return []
                while self._queue and n < self._at_once:
                    texts, future = self._queue[0]
                    if jobs and size + _size(texts) > self._characters_at_once:
                        break
                    self._queue.popleft()
                    self._count(texts, -1)
                    if future.set_running_or_notify_cancel():
                        jobs.append((texts, future))
                        n, size = n + len(texts), size + _size(texts)
        return jobs

    def _answer(self, jobs: list[Job]) -> None:
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


def _size(texts: Sequence[str]) -> int:
    return sum(map(len, texts))
