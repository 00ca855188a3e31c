"""Asking an engine for frames that were lost: a DEALER socket to the ROUTER beside its publisher.

The question is `["", first number]`; the answers are `["", topic, number, payload]` (vLLM from 0.24) or `["", number, payload]` (before, and
SGLang), in order, then an end with the number -1. Engines answer between two frames they publish, from a buffer of the last 10 000 or so.

Bounded: each answer within `idle_s` of the one before, all within `total_s`; a message by its connection. Not here: when to ask (subscriber).
"""

from __future__ import annotations

import asyncio
from enum import Enum

from epp.events.feed import Feed
from epp.events.numbering import Verdict
from epp.events.stream import Stream
from epp.types import Address
from epp.zmtp.connection import Connection, connect
from epp.zmtp.wire import ZmtpError

END = b"\xff" * 8


class Outcome(Enum):
    COMPLETE = "complete"
    INCOMPLETE = "incomplete"
    """Frames are missing that the engine no longer has."""
    RESTARTED = "restarted"
    """It is not the process that sent the frames we know: nothing was applied, ask again from 0."""
    FAILED = "failed"


class Replay:
    """One question and its answers. The stream is nobody else's meanwhile."""

    def __init__(self, stream: Stream, feed: Feed, *, idle_s: float, total_s: float, connect_s: float, message_bytes_max: int) -> None:
        self.reason = ""
        """Why it failed."""
        self._stream = stream
        self._feed = feed
        self._idle_s = idle_s
        self._total_s = total_s
        self._connect_s = connect_s
        self._message_bytes_max = message_bytes_max
        self._connection: Connection | None = None
        self._outcome: Outcome | None = None
        self._incomplete = False
        self._first: int | None = None
        """Number of the first answer."""
        self._heard = asyncio.Event()

    async def run(self, address: Address) -> Outcome:
        try:
            async with asyncio.timeout(self._total_s):
                return await self._ask(address)
        except TimeoutError:
            self.reason = self.reason or f"not over within {self._total_s:g} s"  # whichever time ran out
        except (OSError, ZmtpError) as error:
            self.reason = str(error) or type(error).__name__
        finally:
            self._outcome = self._outcome or Outcome.FAILED  # whatever still comes is not applied
            if self._first is not None:
                self._stream.numbering.replayed(self._first)
            if self._connection is not None:
                self._connection.close()
        return Outcome.FAILED

    async def _ask(self, address: Address) -> Outcome:
        self.reason = f"no connection within {self._connect_s:g} s"
        self._connection = await connect(
            address.host, address.port, b"DEALER", news=self._news, timeout_s=self._connect_s, message_bytes_max=self._message_bytes_max
        )
        self.reason = ""
        self._connection.send([b"", self._stream.numbering.replay_from.to_bytes(8, "big")])
        while self._outcome is None:
            self._heard.clear()
            try:
                async with asyncio.timeout(self._idle_s):
                    await self._heard.wait()
            except TimeoutError:
                self.reason = f"no answer within {self._idle_s:g} s"
                raise
        return self._outcome

    def step(self) -> bool:
        """A `Work` of the feed."""
        connection = self._connection
        if self._outcome is not None or connection is None:
            return False
        self._heard.set()
        if self._stream.step():
            return True
        taken = connection.take()
        if taken is None:
            if connection.closed:
                self.reason = connection.reason
                self._outcome = Outcome.FAILED
            return False
        if taken:
            self._answer(taken[-2] if len(taken) in {3, 4} else b"", taken[-1])
        return self._outcome is None

    def _news(self, _connection: Connection) -> None:
        self._heard.set()
        self._feed.offer(self)

    def _answer(self, number_bytes: bytes, payload: bytes) -> None:
        stream = self._stream
        if len(number_bytes) != 8:
            self.reason, self._outcome = "an answer that is no frame", Outcome.FAILED
            return
        if number_bytes == END:
            self._outcome = Outcome.INCOMPLETE if self._incomplete else Outcome.COMPLETE
            return
        number = int.from_bytes(number_bytes, "big")
        self._first = number if self._first is None else self._first
        verdict = stream.numbering.judge_replayed(number, payload)
        if verdict is Verdict.RESTARTED:
            self._outcome = Outcome.RESTARTED
        elif verdict is not Verdict.SEEN:
            if verdict is Verdict.LOST:
                self._incomplete = True
                stream.lost(stream.numbering.lost(number), "the engine no longer has all that were asked for")
            stream.take(number, payload)
