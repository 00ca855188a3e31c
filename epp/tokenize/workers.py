"""A few threads that tokenize, so that the event loop never does.

Threads, not processes: the tokenizer holds no GIL while it works. They are daemons, so that one that is stuck does not keep the picker
from ending. Bounded: `threads`, and `queue_max` jobs that wait for one; a job nobody waits for any more is not begun. Results come back
on the event loop, in its own turn. Not here: what a job does.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from typing import Any, Protocol

_log = logging.getLogger(__name__)


class Job(Protocol):
    """Something to be done in a thread."""

    abandoned: bool
    """Nobody waits for it any more. Set on the event loop, read by the thread."""

    def work(self) -> Any:
        """In a thread."""

    def done(self, result: Any) -> None:
        """On the event loop, unless it is abandoned by then. None: `work` raised."""


class Workers:
    """Started with the first job; `close` ends them."""

    def __init__(self, threads: int, queue_max: int) -> None:
        self._threads_max = threads
        self._queue_max = queue_max
        self._jobs: queue.SimpleQueue[tuple[Job, asyncio.AbstractEventLoop] | None] = queue.SimpleQueue()
        self._threads = 0
        self._ended = False
        self.busy = 0
        """Jobs submitted and not yet done."""

    def submit(self, job: Job) -> bool:
        """On the event loop. False: there are too many already."""
        if self._ended or self.busy >= self._threads_max + self._queue_max:
            return False
        if self._threads < min(self._threads_max, self.busy + 1):
            try:
                threading.Thread(target=self._run, name=f"tokenize-{self._threads + 1}", daemon=True).start()
                self._threads += 1
            except RuntimeError:  # the machine has no more: those there are do it
                if not self._threads:
                    return False
        self.busy += 1
        self._jobs.put((job, asyncio.get_running_loop()))
        return True

    def close(self) -> None:
        """No further jobs; those that wait are not begun."""
        self._ended = True
        for _ in range(self._threads):
            self._jobs.put(None)

    def _run(self) -> None:
        while (taken := self._jobs.get()) is not None:
            job, loop = taken
            result = None
            if not (job.abandoned or self._ended):
                try:
                    result = job.work()
                except BaseException as error:  # noqa: BLE001 - a panic of the tokenizer is no Exception, and must not cost the thread
                    _log.warning("tokenizing failed", extra={"fields": {"error": type(error).__name__}})  # its text may be of the prompt
            try:
                loop.call_soon_threadsafe(self._over, job, result)
            except RuntimeError:  # the loop is closed: the picker has ended
                return

    def _over(self, job: Job, result: Any) -> None:
        self.busy -= 1
        if not job.abandoned:
            job.done(result)
