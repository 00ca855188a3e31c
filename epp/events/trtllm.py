"""KV-cache events of trtllm-serve: asked for over HTTP (`POST /kv_cache_events`), for it publishes none.

An answer empties the engine's buffer: whoever asks is the only one who knows. So this is off unless the operator says that nobody else
asks. Event ids count up for as long as the process lives: a hole means that the buffer overflowed between two answers, an id that goes back
a new process. Not here: what events say (prefix.trtllm_events).

Bounded: one question at a time, an answer of `message_bytes_max` within `TIMEOUT_S`; events are applied a turn at a time like all others.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

import aiohttp

from epp.events.feed import PIECE_BLOCKS
from epp.events.stream import Stream, Told
from epp.events.subscriber import Common
from epp.prefix.kv_events import BlockStored, Event, KvEventError
from epp.prefix.trtllm_events import Numbered, decode
from epp.types import Endpoint

PATH = "/kv_cache_events"
TIMEOUT_S = 2.0
READ_BYTES = 64 << 10
RANKS_MAX = 16
HEADERS = {"Accept-Encoding": "identity"}

_log = logging.getLogger("epp.events")


class PollError(Exception):
    """No usable answer; says why."""


class TrtLlmPoller:
    """See the module. `follow` it in a task; `stop` when the endpoint goes."""

    def __init__(self, common: Common, endpoint: Endpoint, told: Told, client: aiohttp.ClientSession) -> None:
        self.endpoint = endpoint
        self._common = common
        self._told = told
        self._client = client
        self._streams: dict[int, Stream] = {}
        """By data-parallel rank."""
        self._next: dict[int, int] = {}
        """Rank -> the event id expected."""
        self._stopped = False
        self._events: Iterator[Numbered] | None = None
        self._pieces: Iterator[Event] = iter(())
        self._rank = 0
        self._idle = asyncio.Event()

    async def follow(self) -> None:
        """Until cancelled."""
        settings = self._common.settings
        backoff_s = settings.backoff_s
        while True:
            if await self.once():
                backoff_s = settings.backoff_s
                await self._common.sleep(settings.trtllm_poll_s)
            else:
                await self._common.sleep(max(backoff_s, settings.trtllm_poll_s))
                backoff_s = min(2 * backoff_s, settings.backoff_max_s)

    async def once(self) -> bool:
        """Ask, and have the answer applied. False if there was none."""
        try:
            body = await self._ask()
        except (aiohttp.ClientError, OSError, PollError) as error:  # TimeoutError is an OSError
            self._common.counts.zmq_errors["poll"] += 1
            if self._told.once("poll"):
                fields = {
                    "endpoint": self.endpoint.name,
                    "address": self.endpoint.destination,
                    "reason": str(error) or type(error).__name__,
                }
                _log.warning("no KV-cache events: the engine does not answer", extra={"fields": fields})
            return False
        self._told.said.discard("poll")
        self._common.counts.messages += 1
        self._events = decode(body, self._common.counts.skipped)
        self._idle.clear()
        self._common.feed.offer(self)
        await self._idle.wait()
        return True

    def stop(self) -> None:
        """At once."""
        self._stopped = True
        for stream in self._streams.values():
            stream.close()

    def step(self) -> bool:
        """A `Work` of the feed: one event, or a piece of one."""
        if self._stopped or self._events is None:
            self._idle.set()
            return False
        try:
            for piece in self._pieces:
                self._streams[self._rank].apply(piece)
                return True
            numbered = next(self._events, None)
            if numbered is not None:
                self._begin(numbered)
                return True
        except KvEventError as error:
            for stream in self._streams.values() or [self._stream(0)]:
                stream.unreadable(error)
        self._events = None
        self._idle.set()
        return False

    def _begin(self, numbered: Numbered) -> None:
        rank, number = numbered.rank, numbered.id
        if rank not in self._streams and len(self._streams) >= RANKS_MAX:
            self._common.counts.skipped["publisher"] += 1
            return
        stream, expected = self._stream(rank), self._next.get(rank, 0)
        if number < expected:
            stream.restarted()
            expected = 0
        if number > expected:
            stream.lost(number - expected, "the engine's buffer of events was full, or somebody else asked for them")
        self._next[rank] = number + 1
        self._rank = rank
        self._pieces = (piece for event in numbered.events for piece in _pieces(event))

    def _stream(self, rank: int) -> Stream:
        if rank not in self._streams:
            self._streams[rank] = Stream(self._common.index, self._common.counts, self.endpoint, str(rank) if rank else "", self._told)
        return self._streams[rank]

    async def _ask(self) -> bytes:
        limit = self._common.settings.message_bytes_max
        url = f"http://{self.endpoint.destination}{PATH}"
        async with asyncio.timeout(TIMEOUT_S), self._client.post(url, headers=HEADERS, allow_redirects=False) as answer:
            if answer.status != 200:
                raise PollError(f"HTTP {answer.status}")
            body = bytearray()
            async for part in answer.content.iter_chunked(READ_BYTES):
                body += part
                if len(body) > limit:
                    raise PollError(f"an answer of more than {limit} bytes")
            return bytes(body)


def _pieces(event: Event) -> Iterator[Event]:
    if isinstance(event, BlockStored):
        yield from event.pieces(PIECE_BLOCKS)
    else:
        yield event
