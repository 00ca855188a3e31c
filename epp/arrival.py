"""A request that was understood and is not yet decided, and what it may wait for: its turn (admission), its tokens (a tokenizer).

Without stages there is no arrival: the director decides at once. Nothing here waits by itself: a stage says it has to, and calls `wake`
when it is over; the session is then resumed by its transport. Not here: the stages, the session.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from epp.errors import EppError
from epp.plugins.base import Parser
from epp.types import LLMRequest

Understood = tuple[Parser | None, str]
"""What there is to know of a body: its parser, and the model to put in place of the body's, if any."""


class Wait(Protocol):
    """One request's wait."""

    error: EppError | None
    """Set before `wake` is called where the request gets no further."""

    def cancel(self) -> None:
        """The client left: `wake` is not called any more. It may come just after `wake` was."""


class Stage(Protocol):
    """Something a request passes before its endpoint is chosen."""

    def begin(self, arrival: Arrival) -> Wait | None:
        """None: it passes at once. Else `arrival.wake` is called later, once, never from within. Raises EppError."""


class Arrival:
    """One request on its way through the stages."""

    __slots__ = ("_passed", "_stages", "_wait", "body", "request", "started_s", "subset", "understood", "wake")

    def __init__(
        self,
        request: LLMRequest,
        body: bytes | None,
        subset: Sequence[str] | None,
        started_s: float,
        *,
        understood: Understood,
        wake: Callable[[], None],
        stages: Sequence[Stage],
    ) -> None:
        self.request = request
        self.body = body
        """None where it can't be seen before the decision."""
        self.subset = subset
        """The gateway's."""
        self.started_s = started_s
        self.understood = understood
        self.wake = wake
        self._stages = stages
        self._passed = 0
        self._wait: Wait | None = None

    def advance(self) -> bool:
        """Pass the stages until one has it wait: True. Raises EppError of the wait that is over, or of a stage."""
        wait, self._wait = self._wait, None
        if wait is not None and wait.error is not None:
            raise wait.error
        while self._passed < len(self._stages):
            stage = self._stages[self._passed]
            self._passed += 1
            self._wait = stage.begin(self)
            if self._wait is not None:
                return True
        return False

    def cancel(self) -> None:
        """The client left."""
        wait, self._wait = self._wait, None
        if wait is not None:
            wait.cancel()
