"""What getting the events came to, as numbers, and as metric families under the reference picker's names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from epp.observe.families import Family, Labelled, Name, with_twin

_OWN = "epp_kv_events_"


def _name(name: str, text: str) -> Name:
    return Name(f"kv_cache_events_{name}", text, f"kvcache_kvevents_{name}")


SUBSCRIBERS = _name("active_subscribers", "Publishers of KV-cache events that are connected.")
RECONNECTIONS = _name("subscriber_reconnections_total", "Connections made again to publishers of KV-cache events.")
MESSAGES = _name("messages_received_total", "Messages of KV-cache events received.")
ZMQ_ERRORS = _name("zmq_errors_total", "Errors on ZeroMQ sockets, by operation.")
QUEUE_DEPTH = _name("pool_queue_depth", "Publishers whose messages wait to be read.")
CAPACITY = _name("pool_capacity", "Publishers whose messages can wait.")
STORES_SKIPPED = _name("stores_skipped_total", "Stored blocks that were not indexed, by reason.")
REMOVALS_SKIPPED = _name("removals_skipped_total", "Removed blocks that were not indexed, by reason.")


class Counts:
    """One for all publishers. Nothing in it grows with what they send: keys are our own words."""

    def __init__(self) -> None:
        self.messages = 0
        self.connected = 0
        """Publishers we are connected to now."""
        self.reconnections = 0
        self.zmq_errors: Counter[str] = Counter()
        """By operation: `connect`, `receive`, `accept`, `replay`, `poll`."""
        self.malformed = 0
        """Frames, or events in them, that could not be read."""
        self.skipped: Counter[str] = Counter()
        """Events that are not for the index, by reason."""
        self.frames_lost = 0
        self.frames_seen = 0
        """That came a second time."""
        self.gaps = 0
        """Times that an endpoint fell back to the approximate view."""
        self.replays: Counter[str] = Counter()
        """By outcome: `complete`, `incomplete`, `restarted`, `failed`."""
        self.restarts = 0
        self.unknown_topics = 0
        """Frames whose topic names no endpoint."""

    def families(self, *, pending: int, capacity: int, untrusted: int, index: Mapping[str, int]) -> Iterator[Family]:
        """`index`: what the index made of the events (its `counts`)."""
        yield from with_twin(SUBSCRIBERS, "gauge", (), [((), float(self.connected))])
        yield from with_twin(RECONNECTIONS, "counter", (), [((), float(self.reconnections))])
        yield from with_twin(MESSAGES, "counter", (), [((), float(self.messages))])
        yield from with_twin(ZMQ_ERRORS, "counter", ("operation",), _labelled(self.zmq_errors))
        yield from with_twin(QUEUE_DEPTH, "gauge", (), [((), float(pending))])
        yield from with_twin(CAPACITY, "gauge", (), [((), float(capacity))])
        stores = {name.removeprefix("skipped_"): count for name, count in index.items() if name.startswith("skipped_")}
        stores |= {name: count + stores.get(name, 0) for name, count in self.skipped.items()}
        removals = {name.removeprefix("removed_"): count for name, count in index.items() if name.startswith("removed_")}
        for family, counts in ((STORES_SKIPPED, stores), (REMOVALS_SKIPPED, removals)):
            rows = [(("", reason), float(count)) for reason, count in counts.items()]
            yield from with_twin(family, "counter", ("cache_kind", "reason"), rows)
        yield _counter(_OWN + "frames_lost_total", "Frames missing in publishers' numbers.", self.frames_lost)
        yield _counter(_OWN + "gaps_total", "Times an endpoint fell back to the approximate view.", self.gaps)
        yield Family(_OWN + "replays_total", "Replays of lost frames, by outcome.", "counter", ("outcome",), _labelled(self.replays))
        yield _counter(_OWN + "restarts_total", "Engines seen, by their frames' numbers, to have started anew.", self.restarts)
        yield _counter(_OWN + "malformed_total", "Frames and events that could not be read.", self.malformed)
        yield _counter(_OWN + "unknown_topics_total", "Frames whose topic names no endpoint.", self.unknown_topics)
        yield _gauge(_OWN + "untrusted_endpoints", "Endpoints whose cache is not known from events.", untrusted)


def _counter(name: str, text: str, value: float) -> Family:
    return Family(name, text, "counter", (), [((), float(value))])


def _gauge(name: str, text: str, value: float) -> Family:
    return Family(name, text, "gauge", (), [((), float(value))])


def _labelled(values: Mapping[str, int]) -> list[Labelled]:
    return [((key,), float(count)) for key, count in values.items()]
