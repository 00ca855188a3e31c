"""A file read again when it changes: the part that is the same whatever the file is about.

A change is a change of (mtime, size, inode): an atomic rename and the symlink swap of a Kubernetes ConfigMap are seen like an edit in
place. A file that is gone or wrong leaves things as they were; it is told once, not every second.

Not here: what the text means (files, resources). Cost: one `stat` a second; a change is read on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from epp.aio import Sleep, forever
from epp.config.document import DOCUMENT_BYTES_MAX
from epp.errors import ConfigError, Problem

INTERVAL_S = 1.0
PROBLEMS_LOGGED_MAX = 50
"""Problems of a rejected file in its one line of log."""

_log = logging.getLogger(__name__)

Signature = tuple[int, int, int]


class WatchedFile(ABC):
    """Keeps something as a file says. `what` is the something's name in the log."""

    what: ClassVar[str]

    def __init__(self, path: Path, *, interval_s: float = INTERVAL_S, sleep: Sleep = asyncio.sleep) -> None:
        self.poll_errors_total = 0
        self.loads_total = 0
        self._path = path
        self._interval_s = interval_s
        self._sleep = sleep
        self._seen: Signature | None = None
        """Of the file as last tried, good or bad; None while it can't be read."""
        self._unreadable = ""
        """Why it could not be read the last time; told once."""

    @abstractmethod
    def _apply(self, text: str) -> Mapping[str, int]:
        """Make things as `text` says; how many of what, for the log. Raises ConfigError, and then has changed nothing."""

    def load(self) -> None:
        """The first load. Raises ConfigError: starting without what the file says helps nobody."""
        try:
            self._load()
        except OSError as error:
            raise ConfigError(str(self._path), [Problem("", error.strerror or str(error))]) from error

    def once(self) -> bool:
        """Load the file again if it changed. True if things are now as it says."""
        try:
            if _signature(os.stat(self._path)) == self._seen:  # noqa: PTH116 - the cheap call, made every second
                return False
            counts = self._load()
        except OSError as error:
            reason = error.strerror or str(error)
            self._seen = None
            if reason != self._unreadable:
                self._rejected(reason)
            self._unreadable = reason
            return False
        except ConfigError as error:
            told = [str(problem) for problem in error.problems[:PROBLEMS_LOGGED_MAX]]
            left_out = len(error.problems) - len(told)
            self._rejected("; ".join(told) + (f"; and {left_out} more" if left_out else ""))
            return False
        _log.info("%s file loaded", self.what, extra={"fields": {"file": str(self._path), **counts}})
        return True

    async def run(self) -> None:
        """Until cancelled."""
        await forever(self.once, self._interval_s, self._sleep)

    def _load(self) -> Mapping[str, int]:
        with self._path.open("rb") as file:
            self._seen = _signature(os.fstat(file.fileno()))  # of what is read, whatever the name stands for by now
            self._unreadable = ""
            content = file.read(DOCUMENT_BYTES_MAX + 1)
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise ConfigError(str(self._path), [Problem("", f"is not UTF-8: {error}")]) from None
        counts = self._apply(text)
        self.loads_total += 1
        return counts

    def _rejected(self, problems: str) -> None:
        self.poll_errors_total += 1
        _log.warning(
            "%s file rejected; keeping the %s there are",
            self.what,
            self.what,
            extra={"fields": {"file": str(self._path), "problems": problems}},
        )


def _signature(status: os.stat_result) -> Signature:
    return status.st_mtime_ns, status.st_size, status.st_ino
