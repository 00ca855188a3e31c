"""What an engine family is: it makes a Reading of a `/metrics` text. And what several of them share.

One server may expose a metric in several series (models, data-parallel ranks): requests are summed, the fullest cache counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from epp.datastore import Reading
from epp.engines.exposition import values

METRICS_PATHS = ("/metrics",)


class ReadingError(Exception):
    """The text says nothing of this engine's load."""


class AsleepError(ReadingError):
    """The engine answers but serves nobody: its load reads zero and requests sent to it hang."""


class EngineFamily(Protocol):
    @property
    def name(self) -> str:
        """The value of the engine-type label."""
        ...

    @property
    def paths(self) -> tuple[str, ...]:
        """Where it answers with its metrics, the likeliest first."""
        ...

    def read(self, text: bytes) -> Reading:
        """The load in this text. Raises ReadingError (AsleepError is one); nothing else, whatever the bytes."""
        ...


class Gauges(NamedTuple):
    """The names of an engine whose load is a gauge each; empty where it has none."""

    waiting: bytes
    running: bytes
    kv_usage: bytes = b""
    kv_block_tokens: bytes = b""
    kv_blocks: bytes = b""

    def read(self, text: bytes) -> Reading:
        """Raises ReadingError where neither requests nor cache use are told."""
        waiting = values(text, self.waiting)
        running = values(text, self.running) if self.running else ()
        usage = values(text, self.kv_usage) if self.kv_usage else ()
        if not (waiting or running or usage):
            raise ReadingError(f"no {self.waiting.decode()} in the answer")
        return Reading(
            waiting=total(waiting),
            running=total(running),
            kv_usage=fullest(usage),
            kv_block_tokens=(int(max(values(text, self.kv_block_tokens), default=0)) or None) if self.kv_block_tokens else None,
            kv_blocks=(int(sum(values(text, self.kv_blocks))) or None) if self.kv_blocks else None,
        )


class Reader(Protocol):
    """All of a family that reading needs."""

    def read(self, text: bytes) -> Reading: ...


def read_first(readers: Iterable[Reader], text: bytes) -> Reading:
    """What the first of them makes of it that finds its metrics there. Raises ReadingError where none does."""
    reason: ReadingError | None = None
    for reader in readers:
        try:
            return reader.read(text)
        except AsleepError:
            raise
        except ReadingError as error:
            reason = reason or error
    raise reason or ReadingError("nobody to read it")


def total(values: Sequence[float]) -> float | None:
    """Requests of all series together; None where there are none."""
    return sum(values) if values else None


def fullest(values: Sequence[float]) -> float | None:
    """The worst of several caches, 0 to 1."""
    return min(1.0, max(values)) if values else None


def count(text: str | None) -> int:
    """A number in a label; 0 where it is none (`None`)."""
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 16 else 0
