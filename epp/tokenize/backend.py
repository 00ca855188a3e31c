"""What finds tokens: the one thing the stage knows of its ways to."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

from epp.tokenize.tokens import Tokens

TIMEOUT, FAILED, FULL, RESTING = "timeout", "failed", "full", "resting"
UNKNOWN_MODEL, UNSUPPORTED, TOO_LONG = "unknown_model", "unsupported", "too_long"
"""Why there are none."""


class Ask(NamedTuple):
    """A prompt to be tokenized."""

    kind: str
    """Of prompts."""
    body: bytes
    model: str
    """As the engine will see it."""
    media: int
    """Pictures, videos and sounds in it."""
    pool: str


class Started(Protocol):
    """Tokenization under way."""

    def abandon(self) -> None:
        """Nobody waits for it any more."""


Done = Callable[[Tokens | str], None]
"""Told the tokens, or why there are none."""


class Backend(Protocol):
    """Finds the tokens of prompts. Lives on the event loop."""

    def timeout_s(self, ask: Ask) -> float:
        """How long the request may wait."""

    def start(self, ask: Ask, done: Done) -> Started | Tokens | str:
        """Under way, known already, or why it is not. `done` is called later, once, unless it is abandoned."""

    def close(self) -> None:
        """It is out of service; what it has under way may end."""
