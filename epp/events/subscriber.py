"""One publisher of one endpoint: connected to, read, connected to again; lost frames asked for where that is possible.

A connection begins with a replay where the engine offers one, so that what was cached before is known too. Otherwise the first frame tells:
any number but the expected one is a gap (the approximate view, until the index trusts it again) or a restart. Where there is a shared
backend it is asked first, for what other pickers heard. While something is asked for nothing is read from the connection: it waits in the
kernel and with the publisher.

Not here: which endpoints (hub), what frames do (stream), ZeroMQ (zmtp).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass

from epp.aio import Sleep
from epp.clock import Clock
from epp.events.counts import Counts
from epp.events.feed import Feed
from epp.events.mend import Mend
from epp.events.numbering import Verdict
from epp.events.replay import Outcome, Replay
from epp.events.settings import EventSettings
from epp.events.stream import Stream, Told
from epp.events.valkey import Backend
from epp.prefix.precise import PreciseIndex
from epp.types import Address, Endpoint
from epp.zmtp.connection import Connection, connect
from epp.zmtp.wire import ZmtpError

MEND_PAUSES_S = (0.02, 0.05, 0.1, 0.2)
"""Before the shared backend is asked again for a frame that others may be about to write."""
MEND_REST_S = 5.0
"""After it could not help."""

_log = logging.getLogger("epp.events")


@dataclass(frozen=True, slots=True)
class Common:
    """What all publishers share."""

    index: PreciseIndex
    settings: EventSettings
    counts: Counts
    feed: Feed
    clock: Clock
    rng: random.Random
    sleep: Sleep
    replays: asyncio.Semaphore
    backend: Backend | None = None


def frame_of(taken: Sequence[bytes]) -> tuple[bytes, int, bytes] | None:
    """Topic, number and payload of a message, if it is one of ours."""
    if len(taken) != 3 or len(taken[1]) != 8:
        return None
    return taken[0], int.from_bytes(taken[1], "big"), taken[2]


class Subscriber:
    """See the module. `follow` it in a task; `stop` when the endpoint goes."""

    def __init__(self, common: Common, endpoint: Endpoint, rank: int, told: Told) -> None:
        settings = common.settings
        self.endpoint = endpoint
        self.stream = Stream(common.index, common.counts, endpoint, str(rank) if settings.ranks > 1 else "", told)
        backend = common.backend
        self._shared = backend.publisher(settings.publisher_key(endpoint, self.stream.publisher)) if backend is not None else None
        self.stream.shared = self._shared
        self.connected = False
        self._common = common
        self._address = settings.address(endpoint, rank)
        self._replay_address = settings.replay_address(endpoint, rank)
        self._told = told
        self._connection: Connection | None = None
        self._held: tuple[int, bytes] | None = None
        """A frame that waits for those before it."""
        self._asked = False
        """Those were asked for: it waits no longer."""
        self._drained = False
        """The connection is closed and all that came by it is read."""
        self._replaying = False
        self._replay_after_s = self._mend_after_s = float("-inf")
        self._backoff_s = settings.backoff_s
        self._heard = False
        """A frame came by this connection."""
        self._absent_since_s: float | None = None
        self._news = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Subscriber {self.endpoint.name} {self._address} {'connected' if self.connected else 'not connected'}>"

    async def follow(self) -> None:
        """Until cancelled."""
        if self._address is None:
            return
        first = True
        try:
            while True:
                if await self._connect(self._address):
                    if not first:
                        self._common.counts.reconnections += 1
                    first = False
                    await self._listen()
                await self._rest()
        finally:
            self.stop()

    def stop(self) -> None:
        """At once: nothing is applied any more, the endpoint's slot may be another's in a moment."""
        self.stream.close()
        if self._common.backend is not None and self._shared is not None:
            self._common.backend.gone(self._shared)
        self._disconnected()

    def step(self) -> bool:
        """A `Work` of the feed."""
        if self._replaying:
            return False
        if self.stream.step():
            return True
        connection = self._connection
        if self._held is not None:
            if self._asked:
                self._judge_again()
            return self._asked
        if connection is None:
            return False
        taken = connection.take()
        if taken is None:
            if connection.closed:
                self._drained = True
                self._news.set()
            return False
        if taken:
            self._common.counts.messages += 1
            frame = frame_of(taken)
            if frame is None:
                self._common.counts.malformed += 1
            else:
                self._heard = True
                self._judge(frame[1], frame[2])
        return True

    def _judge(self, number: int, payload: bytes) -> None:
        numbering, counts = self.stream.numbering, self._common.counts
        verdict = numbering.judge(number, payload)
        if verdict is Verdict.RESTARTED:
            self.stream.restarted()
            verdict = numbering.judge(number, payload)
        if verdict is Verdict.LOST and (self._may_mend() or self._may_replay()):
            self._held, self._asked = (number, payload), False
            self._news.set()
            return
        numbering.came(number)
        if verdict is Verdict.SEEN:
            counts.frames_seen += 1
            return
        if verdict is Verdict.LOST:
            self.stream.lost(numbering.lost(number), self._why_lost())
        self.stream.take(number, payload)

    def _may_replay(self) -> bool:
        wait_s = self._replay_after_s - self._common.clock.now_s()
        return self._replay_address is not None and wait_s <= self._common.settings.replay_pause_s

    def _may_mend(self) -> bool:
        backend = self._common.backend
        return backend is not None and backend.hoped_for and self._common.clock.now_s() >= self._mend_after_s

    def _why_lost(self) -> str:
        return "the engine has no replay port" if self._replay_address is None else "a replay would come too soon after the last"

    async def _connect(self, address: Address) -> bool:
        common = self._common
        settings = common.settings
        try:
            connection = await connect(
                address.host,
                address.port,
                b"SUB",
                news=self._arrived,
                timeout_s=settings.connect_s,
                message_bytes_max=settings.message_bytes_max,
            )
        except (OSError, ZmtpError) as error:  # TimeoutError is an OSError
            common.counts.zmq_errors["connect"] += 1
            if self._told.once("connect"):
                fields = {"endpoint": self.endpoint.name, "address": str(address), "reason": str(error) or type(error).__name__}
                _log.warning("no KV-cache events: can't connect to their publisher", extra={"fields": fields})
            self._absent()
            return False
        self._told.said.discard("connect")
        connection.send([b"\x01" + settings.topic_filter.encode()])
        self._connection = connection
        self.connected, self._heard, self._drained, self._absent_since_s = True, False, False, None
        common.counts.connected += 1
        if self._shared is not None:
            self._shared.live = True
        self.stream.numbering.connected()
        return True

    async def _listen(self) -> None:
        """Until the connection is closed and all that came by it is read."""
        connection = self._connection
        assert connection is not None
        if self._may_mend() or self._may_replay():
            await self._catch_up()
        self._common.feed.offer(self)
        while True:
            await self._news.wait()
            self._news.clear()
            if self._held is not None and not self._asked:
                await self._catch_up()
            elif self._drained:
                break
        if connection.failed:
            self._common.counts.zmq_errors["receive"] += 1
            if self._told.once("receive"):
                fields = {"endpoint": self.endpoint.name, "address": str(self._address), "reason": connection.reason}
                _log.warning("a publisher of KV-cache events sends what can't be read", extra={"fields": fields})
        self._disconnected()
        self._absent_since_s = self._common.clock.now_s()

    async def _catch_up(self) -> None:
        """Ask for what is missing, then go on with the frame that waited for it."""
        self._replaying = True
        try:
            hole = await self._mend()
            if self._may_replay() and (self._held is None or self._missing()):
                await self._replay()
            if self._missing() or (self._held is None and hole):
                await self._mend_once(holes=True)  # better some of it
        finally:
            self._replaying = False
        self._asked = True
        self._common.feed.offer(self)

    def _missing(self) -> bool:
        """Frames before the one that waits are."""
        return self._held is not None and self.stream.numbering.judge(*self._held) is Verdict.LOST

    async def _mend(self) -> bool:
        """Ask the shared backend; where a frame waits others have the ones before it any moment, if at all. True: it has more after a hole."""
        if not self._may_mend():
            return False
        hole = await self._mend_once()
        for pause_s in MEND_PAUSES_S:
            if not self._missing() or not self._may_mend():
                break
            await self._common.sleep(pause_s)
            hole = await self._mend_once()
        if self._missing():
            self._mend_after_s = self._common.clock.now_s() + MEND_REST_S
        return hole

    async def _mend_once(self, *, holes: bool = False) -> bool:
        common, held = self._common, self._held
        if common.backend is None or self._shared is None or not common.backend.hoped_for:
            return False
        mend = Mend(self.stream, self._shared, common.backend, common.feed, holes=holes)
        async with common.backend.reads:
            await mend.run(held)
        if held is not None and self.stream.numbering.judge(*held) is Verdict.RESTARTED:
            self.stream.restarted()  # what was there was another's
        return mend.hole

    async def _replay(self) -> None:
        """Ask the engine."""
        common, settings, address = self._common, self._common.settings, self._replay_address
        assert address is not None
        wait_s = self._replay_after_s - common.clock.now_s()
        if wait_s > 0:
            await common.sleep(wait_s)
        async with common.replays:
            outcome, reason = await self._ask(address)
            if outcome is Outcome.RESTARTED:
                self.stream.restarted()
                outcome, reason = await self._ask(address)
        common.counts.replays[outcome.value] += 1
        rest_s = settings.replay_pause_s if outcome is Outcome.COMPLETE else settings.replay_rest_s
        self._replay_after_s = common.clock.now_s() + rest_s
        if outcome is Outcome.FAILED:
            common.counts.zmq_errors["replay"] += 1
            if self._told.once("replay"):
                fields = {"endpoint": self.endpoint.name, "address": str(address), "reason": reason}
                _log.warning("lost KV-cache events can't be asked for", extra={"fields": fields})

    def _judge_again(self) -> None:
        """The frame that waited: what is missing now stays so."""
        assert self._held is not None
        (number, payload), self._held = self._held, None
        numbering = self.stream.numbering
        verdict = numbering.judge(number, payload)
        numbering.came(number)
        if verdict is Verdict.LOST:
            why = "the engine did not send them again" if self._replay_address is not None else "no other picker has heard them"
            self.stream.lost(numbering.lost(number), why)
        if verdict in {Verdict.LOST, Verdict.NEXT}:
            self.stream.take(number, payload)

    async def _ask(self, address: Address) -> tuple[Outcome, str]:
        settings = self._common.settings
        replay = Replay(
            self.stream,
            self._common.feed,
            idle_s=settings.replay_idle_s,
            total_s=settings.replay_total_s,
            connect_s=settings.connect_s,
            message_bytes_max=settings.message_bytes_max,
        )
        return await replay.run(address), replay.reason

    async def _rest(self) -> None:
        """Before connecting again: ever longer, as long as no frame comes."""
        settings, rng = self._common.settings, self._common.rng
        if self._heard:
            self._backoff_s, self._heard = settings.backoff_s, False
        await self._common.sleep(self._backoff_s * rng.uniform(0.5, 1.0))
        self._backoff_s = min(2 * self._backoff_s, settings.backoff_max_s)

    def _absent(self) -> None:
        """It can't be reached: after a while what was known is in doubt."""
        since_s = self._absent_since_s
        if since_s is not None and self._common.clock.now_s() - since_s >= self._common.settings.absent_s:
            self._absent_since_s = None
            self.stream.lost(0, "their publisher can't be reached")

    def _arrived(self, _connection: Connection) -> None:
        self._common.feed.offer(self)

    def _disconnected(self) -> None:
        if self.connected:
            self.connected = False
            self._common.counts.connected -= 1
            if self._shared is not None:
                self._shared.live = False
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
