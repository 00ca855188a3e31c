"""What an engine family is: it makes a Reading of a `/metrics` text."""

from __future__ import annotations

from typing import Protocol

from epp.datastore import Reading


class ReadingError(Exception):
    """The text says nothing of this engine's load."""


class AsleepError(ReadingError):
    """The engine answers but serves nobody: its load reads zero and requests sent to it hang."""


class EngineFamily(Protocol):
    name: str

    def read(self, text: bytes) -> Reading:
        """The load in this text. Raises ReadingError; nothing else, whatever the bytes."""
        ...
