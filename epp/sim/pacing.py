"""An engine in real time: each step takes as long as it should, divided by the time scale.

Why not a task that sleeps: timers fire late, a millisecond is a common step at a high scale, and lateness must not add up. Steps are
due on an absolute schedule kept by `loop.call_at`; one that fires late is followed by a shorter wait. An idle engine has no timer.

Not here: HTTP (server). Simulated time is the loop's clock times the scale, so durations are right and nothing needs an origin.
Invariants: the results of a step are told when it ends, never before; a finished or aborted sequence is forgotten. Cost: one timer
a step, under 1 µs a token, one wake-up for each `wake_tokens` tokens of a request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from collections.abc import Sequence as Many

from epp.sim.engine import Engine, Load, Sequence, Step
from epp.sim.exposition import EngineMetrics

LAG_FORGIVEN_S = 0.5
"""A process that falls further behind its schedule than this starts a new one, instead of racing to catch up."""

WAKE_AT_END = 0
"""`wake_tokens` of a request that is told nothing before it has finished."""


class Part:
    """One sequence of a reply, as far as the client may know of it."""

    __slots__ = ("known_tokens", "reply", "sent_tokens", "sequence")

    def __init__(self, reply: Reply, sequence: Sequence) -> None:
        self.reply = reply
        self.sequence = sequence
        self.known_tokens = 0
        """Said by the engine in steps that have ended."""
        self.sent_tokens = 0

    @property
    def finished(self) -> bool:
        """The last token is known."""
        return self.known_tokens == self.sequence.max_tokens

    def take(self) -> bytes:
        """The text not sent yet."""
        text = self.sequence.reply(self.sent_tokens, self.known_tokens)
        self.sent_tokens = self.known_tokens
        return text


class Reply:
    """What one HTTP request waits for: one part for each of its prompts."""

    __slots__ = ("_news", "parts", "unfinished", "wake_tokens")

    def __init__(self, wake_tokens: int) -> None:
        self.parts: list[Part] = []
        self.unfinished = 0
        self.wake_tokens = wake_tokens
        self._news = asyncio.Event()

    async def news(self) -> None:
        """Wait for the first token, then for `wake_tokens` more of a part, or for a part's end."""
        await self._news.wait()
        self._news.clear()

    def wake(self) -> None:
        self._news.set()


class Pacer:
    """Runs one engine. Use from one event loop; `close` when done."""

    def __init__(self, engine: Engine, metrics: EngineMetrics, time_scale: float, stepped: Callable[[], None] = lambda: None) -> None:
        """`stepped` is called when a step has ended, before what it brought is told."""
        if time_scale <= 0:
            raise ValueError(f"time_scale must be above 0, not {time_scale}")
        self.engine = engine
        self.metrics = metrics
        self._scale = time_scale
        self._stepped = stepped
        self._loop = asyncio.get_running_loop()
        self._parts: dict[Sequence, Part] = {}
        self._step: Step | None = None
        """Under way."""
        self._arrived: set[Sequence] = set()
        """Since it began."""
        self._due_s = 0.0
        """When it ends, by the loop's clock."""
        self._timer: asyncio.TimerHandle | None = None
        self._frozen = False

    @property
    def idle(self) -> bool:
        """Nothing scheduled: costs nothing."""
        return self._timer is None

    def submit(self, prompts: Many[bytes], max_tokens: int, cache_salt: str, wake_tokens: int) -> Reply:
        """All the prompts or none. Raises ContextTooLongError."""
        reply = Reply(wake_tokens)
        now_s = self._loop.time() * self._scale
        try:
            for prompt in prompts:
                part = Part(reply, self.engine.submit(prompt, max_tokens, now_s, cache_salt))
                reply.parts.append(part)
                self._parts[part.sequence] = part
                self._arrived.add(part.sequence)
        except BaseException:
            for part in reply.parts:
                self._forget(part)
            raise
        reply.unfinished = len(reply.parts)
        if self._step is None and not self._frozen:
            self._due_s = self._loop.time()
            self._begin()
        return reply

    def abort(self, reply: Reply) -> None:
        """The client has gone: free what is unfinished. Nothing happens to a finished reply."""
        for part in reply.parts:
            if self._forget(part):
                self.metrics.record_abort(self._load)

    def freeze(self, frozen: bool) -> None:
        """Stop time for this engine, as a hung model does: requests are taken in and nothing comes out."""
        if frozen == self._frozen:
            return
        self._frozen = frozen
        if frozen:
            self._cancel_timer()
        elif self._step is not None:
            self._due_s = self._loop.time()
            self._end()
        elif self.engine.busy:
            self._due_s = self._loop.time()
            self._begin()

    def close(self) -> None:
        self._frozen = True
        self._cancel_timer()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _forget(self, part: Part) -> bool:
        """False if there was nothing left to abort."""
        self._arrived.discard(part.sequence)
        return self._parts.pop(part.sequence, None) is not None and self.engine.abort(part.sequence)

    @property
    def _load(self) -> Load:
        """As vLLM publishes it: a request that arrived during the step under way is in no gauge before the next one ends."""
        load = self.engine.load
        return load._replace(waiting=load.waiting - len(self._arrived))

    def _begin(self) -> None:
        self._arrived.clear()
        self._step = step = self.engine.step(self._due_s * self._scale)
        self._due_s += step.duration_s / self._scale
        self._timer = self._loop.call_at(self._due_s, self._end)

    def _end(self) -> None:
        """Tell what the step brought and begin the next."""
        step, self._step, self._timer = self._step, None, None
        assert step is not None
        self.metrics.record_step(step, self._load)
        self._stepped()
        self._tell(step)
        if self.engine.busy:
            now_s = self._loop.time()
            if now_s - self._due_s > LAG_FORGIVEN_S:
                self._due_s = now_s
            self._begin()

    def _tell(self, step: Step) -> None:
        parts = self._parts
        for sequence in step.emitted:
            part = parts.get(sequence)
            if part is None:
                continue  # aborted while the step was under way
            part.known_tokens += 1
            reply = part.reply
            if reply.wake_tokens != WAKE_AT_END and (part.known_tokens == 1 or part.known_tokens - part.sent_tokens >= reply.wake_tokens):
                reply.wake()
        for sequence in step.finished:
            part = parts.pop(sequence, None)
            if part is not None:
                part.reply.unfinished -= 1
                if part.reply.wake_tokens != WAKE_AT_END or not part.reply.unfinished:
                    part.reply.wake()
