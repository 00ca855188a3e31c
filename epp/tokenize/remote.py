"""Tokens found elsewhere: an engine of the pool is asked at `/tokenize`, or a vLLM server at its `/render` paths.

Once per request; the same body asked again comes from a cache. A server that fails `FAILURES_MAX` times in a row, or has no such path, is
left alone for a while, so that requests don't wait for what won't come; one request more than `inFlightMax` does not wait either. Not here:
what is asked (questions), HTTP (post), the deadline (stage).

Cost on the event loop: 0.5 ms a request, and 40 ns a token to read the answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Protocol

import msgspec

from epp.clock import Clock
from epp.tokenize.backend import FAILED, FULL, RESTING, UNSUPPORTED, Ask, Done
from epp.tokenize.cache import PieceCache
from epp.tokenize.post import NotThereError, PostError, RefusedError
from epp.tokenize.questions import Question, Questions
from epp.tokenize.tokens import Tokens

FAILURES_MAX = 3
"""In a row; then a server rests."""
REST_S = 5.0
NOT_THERE_S = 60.0
"""For a path a server has not."""
PATHS_MAX = 10_000
"""Paths of servers whose failures are remembered."""
_SCOPE = b"remote"

Spawn = Callable[[Callable[[], Coroutine[Any, Any, None]]], asyncio.Task[None]]
"""Not given a coroutine: a task that is cancelled before it began would never await it."""


class Client(Protocol):
    """`epp.tokenize.post.Poster` is one."""

    async def post(self, url: str, body: bytes, timeout_s: float) -> bytes:
        """The answer's body. Raises PostError."""
        ...


class _Health:
    __slots__ = ("failures", "rests_until_s")

    def __init__(self) -> None:
        self.failures = 0
        self.rests_until_s = float("-inf")


class Remote:
    """The backend, for either kind of question."""

    def __init__(self, questions: Questions, client: Client, clock: Clock, spawn: Spawn, *, in_flight_max: int, cache: PieceCache) -> None:
        self.cache = cache
        self.in_flight = 0
        self._questions = questions
        self._client = client
        self._clock = clock
        self._spawn = spawn
        self._in_flight_max = in_flight_max
        self._health: dict[str, _Health] = {}

    def timeout_s(self, ask: Ask) -> float:
        return self._questions.timeout_s(ask)

    def start(self, ask: Ask, done: Done) -> _Job | Tokens | str:
        try:
            question = self._questions.about(ask, self._rested)
        except (msgspec.DecodeError, ValueError, RecursionError):
            return UNSUPPORTED
        if isinstance(question, str):
            return question
        key = self.cache.key(_SCOPE, f"{ask.pool}\0{question.path}\0".encode() + question.body)  # pools may call other models the same
        known = None if ask.media else self.cache.get(key)
        if known is not None:
            return Tokens(known)
        if not self._rested(question.url):
            return RESTING
        if self.in_flight >= self._in_flight_max:
            return FULL
        self.in_flight += 1
        job = _Job(done)
        until_s = self._clock.now_s() + self.timeout_s(ask)  # by the time the request waits: its task begins a moment later
        job.task = self._spawn(partial(self._ask, job, question, key, self.timeout_s(ask), until_s))
        job.task.add_done_callback(self._landed)
        return job

    def close(self) -> None:
        """Nothing of its own to end."""

    def _rested(self, url: str) -> bool:
        health = self._health.get(url)
        return health is None or health.rests_until_s <= self._clock.now_s()

    async def _ask(self, job: _Job, question: Question, key: bytes, timeout_s: float, until_s: float) -> None:
        result: Tokens | str = FAILED
        try:
            result = question.read(await self._client.post(question.url, question.body, timeout_s))
            self._health.pop(question.url, None)
            if not result.media:
                self.cache.put(key, result.ids)
        except RefusedError:
            result = UNSUPPORTED
            self._health.pop(question.url, None)
        except NotThereError:
            self._failed(question.url, NOT_THERE_S, failures=FAILURES_MAX)
        except (PostError, msgspec.DecodeError, ValueError, OverflowError, RecursionError):
            self._failed(question.url, REST_S)
        except asyncio.CancelledError:
            if self._clock.now_s() >= until_s:  # it was not the client who left
                self._failed(question.url, REST_S)
            raise
        if not job.abandoned:
            job.done(result)

    def _landed(self, _task: asyncio.Task[None]) -> None:
        self.in_flight -= 1

    def _failed(self, url: str, rest_s: float, failures: int = 1) -> None:
        if url not in self._health and len(self._health) >= PATHS_MAX:
            self._health.clear()
        health = self._health.setdefault(url, _Health())
        health.failures += failures
        if health.failures >= FAILURES_MAX:
            health.rests_until_s = self._clock.now_s() + rest_s


class _Job:
    __slots__ = ("abandoned", "done", "task")

    def __init__(self, done: Done) -> None:
        self.abandoned = False
        self.done = done
        self.task: asyncio.Task[None] | None = None

    def abandon(self) -> None:
        self.abandoned = True
        if self.task is not None:
            self.task.cancel()
