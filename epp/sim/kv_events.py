"""What happens to a simulated KV cache, published as vLLM publishes it: ZeroMQ, msgpack, numbered frames, a replay for who missed some.

Why: precise prefix routing is tested against engines that tell the truth about a cache which is simulated exactly. As vLLM from 0.24 on:
a batch a step, events as maps, a removal for each block, and what was cached under a salt names it. A token's id is its four bytes.

Not here: the cache (kv_cache), when a step ends (pacing), the wire (zmtp). Bounded: `REPLAY_FRAMES_MAX` frames are kept; a subscriber that
does not read loses frames, as with any publisher. Cost: 2 µs a block, only if there is a publisher.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import msgspec

from epp.sim.kv_event_log import KVEventLog
from epp.zmtp.connection import Connection, Listener

REPLAY_FRAMES_MAX = 10_000
"""vLLM's default `buffer_steps`."""
SUBSCRIBERS_MAX = 64
SUBSCRIPTIONS_MAX = 64
"""Of one subscriber."""
UNSENT_BYTES_MAX = 8 << 20
REPLAY_BYTES_MAX = 256 << 20
END = b"\xff" * 8


class KVEventPublisher:
    """A PUB socket and, where there is a port for it, a ROUTER beside it."""

    def __init__(self, log: KVEventLog, topic: str) -> None:
        self.published = 0
        """Frames; the next one's number."""
        self.frames_dropped = 0
        """That a subscriber did not take in time."""
        self._log = log
        self._topic = topic.encode()
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=REPLAY_FRAMES_MAX)
        self._subscriptions: dict[Connection, list[bytes]] = {}
        self._pub = Listener(
            b"PUB", self._subscriber, connections_max=SUBSCRIBERS_MAX, message_bytes_max=1 << 16, outbox_bytes_max=2 * UNSENT_BYTES_MAX
        )
        self._router = Listener(
            b"ROUTER", self._asker, connections_max=SUBSCRIBERS_MAX, message_bytes_max=1 << 16, outbox_bytes_max=REPLAY_BYTES_MAX
        )

    @property
    def port(self) -> int:
        return self._pub.port

    @property
    def replay_port(self) -> int:
        return self._router.port

    @property
    def subscribers(self) -> int:
        """That have subscribed to something."""
        return sum(map(bool, self._subscriptions.values()))

    async def start(self, host: str, port: int, replay_port: int | None = None) -> None:
        """Raises OSError."""
        await self._pub.start(host, port)
        if replay_port is not None:
            try:
                await self._router.start(host, replay_port)
            except OSError:
                await self._pub.stop()
                raise

    async def stop(self) -> None:
        await self._pub.stop()
        await self._router.stop()

    def publish(self) -> None:
        """What happened since the last time, if anything did."""
        events = self._log.take()
        if not events:
            return
        payload = msgspec.msgpack.encode([time.time(), events, 0])
        number, self.published = self.published, self.published + 1
        self._kept.append((number, payload))
        for connection, topics in list(self._subscriptions.items()):
            if not any(map(self._topic.startswith, topics)):
                continue
            if connection.unsent_bytes > UNSENT_BYTES_MAX:
                self.frames_dropped += 1
            else:
                connection.send([self._topic, number.to_bytes(8, "big"), payload])

    def _subscriber(self, connection: Connection) -> Callable[[Connection], None]:
        topics = self._subscriptions[connection] = list[bytes]()

        def news(_connection: Connection) -> None:
            while (taken := connection.take()) is not None:
                wish = taken[0] if taken else b""
                if wish[:1] == b"\x01" and len(topics) < SUBSCRIPTIONS_MAX:
                    topics.append(wish[1:])
                elif wish[:1] == b"\x00" and wish[1:] in topics:
                    topics.remove(wish[1:])
            if connection.closed:
                self._subscriptions.pop(connection, None)

        return news

    def _asker(self, connection: Connection) -> Callable[[Connection], None]:
        def news(_connection: Connection) -> None:
            while (taken := connection.take()) is not None:
                if len(taken) == 2 and len(taken[1]) == 8:
                    self._answer(connection, int.from_bytes(taken[1], "big"))

        return news

    def _answer(self, connection: Connection, first: int) -> None:
        for number, payload in self._kept:
            if number >= first:
                connection.send([b"", self._topic, number.to_bytes(8, "big"), payload])
        connection.send([b"", b"", END, b""])
