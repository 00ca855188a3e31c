"""The centralised mode: engines connect to one port of ours, and the topic of each frame tells whose it is (`kv@<ip>:<port>@<model>`).

A frame belongs to the endpoint of that address, or of that name, or to the only one on that host. Publishers are told apart by endpoint,
model and data-parallel rank; each has numbers of its own. There is nobody to ask for lost frames: the approximate view, until the index
trusts the endpoint again. Not here: what frames do (stream).

Bounded: connections (`connections_max`), publishers of one endpoint (`STREAMS_MAX`), what a connection holds (zmtp), a topic
(`TOPIC_BYTES_MAX`); nothing is kept of a topic that names no endpoint. A publisher that floods is read a step at a time like all others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from epp.datastore import Datastore
from epp.errors import StartError
from epp.events.numbering import Verdict
from epp.events.settings import bind_address
from epp.events.stream import Stream, Told
from epp.events.subscriber import Common, frame_of
from epp.prefix.kv_events import KvEventError, decode
from epp.types import Endpoint
from epp.zmtp.connection import Connection, Listener

STREAMS_MAX = 16
"""Of one endpoint."""
TOPIC_BYTES_MAX = 1_024
"""A longer one is nobody's."""

_log = logging.getLogger("epp.events")


class Central:
    """See the module. `start` it, then `stop`."""

    def __init__(self, common: Common, datastore: Datastore) -> None:
        self._common = common
        self._datastore = datastore
        self._streams: dict[Endpoint, dict[tuple[bytes, int], Stream]] = {}
        self._told: dict[Endpoint, Told] = {}
        self._by_word: dict[str, Endpoint | None] | None = None
        """What a topic may call an endpoint -> the endpoint; None where that is not clear. Made when it is needed."""
        self._self_told = Told()
        settings = common.settings
        self._listener = Listener(
            b"SUB", self._accept, connections_max=settings.connections_max, message_bytes_max=settings.message_bytes_max
        )
        self._unsubscribe: Callable[[], None] = _nothing

    @property
    def port(self) -> int:
        return self._listener.port

    @property
    def publishers(self) -> int:
        return sum(map(len, self._streams.values()))

    async def start(self) -> None:
        """Raises StartError."""
        host, port = bind_address(self._common.settings.bind)
        try:
            await self._listener.start(host, port)
        except (OSError, UnicodeError) as error:  # the latter of a host that can be no name
            reason = getattr(error, "strerror", None) or error
            raise StartError(f"can't listen for KV-cache events on {self._common.settings.bind}: {reason}") from None
        self._unsubscribe = self._datastore.subscribe(added=self._added, removed=self._removed)

    async def stop(self) -> None:
        """Nothing is applied any more."""
        self._unsubscribe()
        for endpoint in list(self._streams):
            self._removed(endpoint)
        await self._listener.stop()

    def stream(self, topic: bytes, rank: int) -> Stream | None:
        """Whose frame this is; None: nobody's."""
        counts = self._common.counts
        endpoint = self._endpoint(topic)
        if endpoint is None:
            counts.unknown_topics += 1
            if self._self_told.once("topic"):
                shown = ascii(topic[:TOPIC_BYTES_MAX].decode(errors="replace"))
                _log.warning("KV-cache events of nobody in the pool", extra={"fields": {"topic": shown}})
            return None
        streams = self._streams.setdefault(endpoint, {})
        model = topic.rpartition(b"@")[2]
        known = streams.get((model, rank))
        if known is not None:  # whichever connection it came by: numbers say whether its process is the same
            return known
        if len(streams) >= STREAMS_MAX:
            counts.skipped["publisher"] += 1
            return None
        publisher = f"{rank}@{model.decode(errors='replace')}"
        stream = Stream(self._common.index, counts, endpoint, publisher, self._told.setdefault(endpoint, Told()))
        streams[model, rank] = stream
        return stream

    def _endpoint(self, topic: bytes) -> Endpoint | None:
        parts = topic.decode(errors="replace").split("@", 2) if len(topic) <= TOPIC_BYTES_MAX else ()
        if len(parts) < 2:
            return None
        if self._by_word is None:
            self._by_word = _by_word(self._datastore.endpoints.values())
        return self._by_word.get(parts[1])

    def _accept(self, connection: Connection) -> Intake:
        return Intake(self, self._common, connection)

    def _added(self, _endpoint: Endpoint) -> None:
        self._by_word = None

    def _removed(self, endpoint: Endpoint) -> None:
        self._by_word = None
        self._told.pop(endpoint, None)
        for stream in self._streams.pop(endpoint, {}).values():
            stream.close()


def _nothing() -> None:
    """Nobody was subscribed to."""


def _by_word(endpoints: Iterable[Endpoint]) -> dict[str, Endpoint | None]:
    """By address; by name and by host where there is but one of it."""
    found: dict[str, Endpoint | None] = {}
    exact = {}
    for endpoint in endpoints:
        exact[endpoint.destination] = endpoint
        host = endpoint.spec.address.host
        for word in {endpoint.name, host, f"[{host}]"}:
            found[word] = None if word in found else endpoint
    return found | exact


class Intake:
    """One engine's connection, as a `Work` of the feed; called with the connection's news."""

    def __init__(self, central: Central, common: Common, connection: Connection) -> None:
        self._central = central
        self._common = common
        self._connection = connection
        self._subscribed = False
        self._stream: Stream | None = None
        """Whose last frame is being applied."""
        self._held: tuple[bytes, int, bytes] | None = None
        """A frame that waits for one of the same publisher that came by another connection and is still being applied."""

    def __call__(self, connection: Connection) -> None:
        if not self._subscribed and connection.ready.done() and not connection.closed:
            self._subscribed = True
            self._common.counts.connected += 1
            connection.send([b"\x01" + self._common.settings.topic_filter.encode()])
        elif connection.closed and self._subscribed:
            self._subscribed = False
            self._common.counts.connected -= 1
        if connection.closed and connection.failed:
            self._common.counts.zmq_errors["receive"] += 1
        self._common.feed.offer(self)

    def step(self) -> bool:
        if self._stream is not None:
            if self._stream.step():
                return True
            self._stream = None
        if self._held is not None:
            held, self._held = self._held, None
            self._judge(*held)
            return True
        taken = self._connection.take()
        if taken is None:
            return False
        if taken:
            self._common.counts.messages += 1
            frame = frame_of(taken)
            if frame is None:
                self._common.counts.malformed += 1
            else:
                self._judge(*frame)
        return True

    def _judge(self, topic: bytes, number: int, payload: bytes) -> None:
        try:
            rank = decode(payload).dp_rank
        except KvEventError:
            rank = 0  # the stream finds out, and says so
        stream = self._central.stream(topic, rank)
        if stream is None:
            return
        if stream.busy:
            self._held, self._stream = (topic, number, payload), stream
            return
        numbering = stream.numbering
        verdict = numbering.judge(number, payload)
        if verdict is Verdict.RESTARTED:
            stream.restarted()
            verdict = numbering.judge(number, payload)
        numbering.came(number)
        if verdict is Verdict.SEEN:
            self._common.counts.frames_seen += 1
            return
        if verdict is Verdict.LOST:
            stream.lost(numbering.lost(number), "engines that connect can't be asked for them")
        stream.take(number, payload)
        self._stream = stream
