"""The pool: which endpoints exist, how loaded each is, which are ready.

Holds the only mutable view of the pool; hands out frozen `Snapshot`s. All changes happen on one event loop between awaits, so no
lock. Not here: who finds endpoints (sources), who reads their metrics (engines), who chooses (scheduling).

Cost per request: none; a snapshot is an attribute read. Membership and health changes rebuild it, O(endpoints).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from epp.clock import Clock
from epp.freshness import trust
from epp.types import Address, Changes, Endpoint, EndpointSpec, Snapshot

ENDPOINTS_MAX = 10_000
"""Limit on the pool's size: an endpoint more is a fault in the source, not a pool."""


NO_ATTRIBUTES: Mapping[str, float] = MappingProxyType({})


class Reading(NamedTuple):
    """What one scrape of an engine said. None: the engine does not expose it, the last value stays."""

    waiting: float | None = None
    running: float | None = None
    kv_usage: float | None = None
    kv_block_tokens: int | None = None
    kv_blocks: int | None = None
    adapters_active: frozenset[str] | None = None
    adapters_waiting: frozenset[str] | None = None
    adapters_max: int | None = None
    started_s: float | None = None
    """When the engine's process started, by its own clock."""
    prefix_queries: float | None = None
    """Prompt tokens looked up in the engine's prefix cache since it started."""
    prefix_hits: float | None = None
    """Of those, found there."""
    attributes: Mapping[str, float] = NO_ATTRIBUTES
    """Custom metrics, by attribute key."""


class Ticket:
    """One request's place in its endpoint's in-flight accounting: released exactly once, however the stream ends."""

    __slots__ = ("_to_the_end", "_tokens", "_untold", "endpoint", "requests")

    def __init__(self, endpoint: Endpoint, tokens: int, *, to_the_end: bool = False, told: bool = True) -> None:
        """`to_the_end`: the tokens weigh on the endpoint until the request is over, for the expected output is among them.
        `told`: the first token will be seen; else, as the answer comes whole, only its end."""
        self.endpoint = endpoint
        self.requests = 1
        self._to_the_end = to_the_end
        self._tokens = tokens
        self._untold = 0 if told else tokens
        if self._untold:
            endpoint.untold_tokens += tokens
        endpoint.inflight_requests += 1
        endpoint.inflight_tokens += tokens
        endpoint.sent_requests += 1
        endpoint.sent_tokens += tokens
        endpoint.picks_total += 1
        endpoint.changes.add(endpoint.slot)

    def first_token(self) -> None:
        """The prefill is done: its tokens weigh on the endpoint no longer."""
        if self._tokens and not self._to_the_end:
            self.endpoint.inflight_tokens -= self._tokens
            self._tokens = 0
            self.endpoint.untold_tokens -= self._untold
            self._untold = 0
            self.endpoint.changes.add(self.endpoint.slot)

    def move(self, endpoint: Endpoint) -> None:
        """Another endpoint served the request (a retry by the gateway): the charge follows it."""
        if endpoint is self.endpoint or not self.requests:
            return
        left = self.endpoint
        left.inflight_requests -= 1
        left.inflight_tokens -= self._tokens
        left.untold_tokens -= self._untold
        left.changes.add(left.slot)
        self.endpoint = endpoint
        endpoint.untold_tokens += self._untold
        endpoint.inflight_requests += 1
        endpoint.inflight_tokens += self._tokens
        endpoint.changes.add(endpoint.slot)

    def release(self) -> None:
        """The request is over. Calling it again does nothing."""
        if self.requests:
            self._to_the_end = False
            self.first_token()
            self.requests = 0
            self.endpoint.inflight_requests -= 1
            self.endpoint.changes.add(self.endpoint.slot)


def _same(spec: EndpointSpec | None, endpoint: Endpoint) -> bool:
    """An address given to another pod is another endpoint: nothing of the old one's load or cache is there."""
    return spec is not None and (spec.name, spec.namespace) == (endpoint.name, endpoint.namespace)


def _usable(staying: Sequence[Endpoint]) -> Sequence[Endpoint]:
    return [e for e in staying if e.healthy and not e.ejected] or [e for e in staying if not e.ejected] or staying


def _nobody() -> None:
    pass


class Datastore:
    """The endpoints of one pool, or of several, and their load."""

    def __init__(self, clock: Clock, *, name: str = "default", pools: Sequence[str] = (), endpoints_max: int = ENDPOINTS_MAX) -> None:
        self.changes = Changes()
        self.endpoints: dict[Address, Endpoint] = {}
        self.by_destination: dict[str, Endpoint] = {}
        self.serve(name, pools)
        self._clock = clock
        self._endpoints_max = endpoints_max
        self._free_slots: list[int] = []
        self._slots_made = 0
        self.noticed: Callable[[], None] = _nobody
        """Called when a reading came or an endpoint came, went or changed its state: who waits for room looks again."""
        self._added: list[Callable[[Endpoint], None]] = []
        self._removed: list[Callable[[Endpoint], None]] = []

    def serve(self, name: str, pools: Sequence[str] = ()) -> None:
        """What it is called, and the names of the pools its endpoints are in, where there are several. Before there are endpoints."""
        self.name = name
        self.pools = tuple(pools)
        self._ready: Snapshot | None = None
        self._ready_in: dict[str, Snapshot] = {}

    @property
    def ready(self) -> Snapshot:
        """Endpoints that are healthy, not ejected and not draining; all but the draining ones when there are none of those, for then
        any may be the one that works. Made when it is next asked for: a storm of changes costs one."""
        return self._ready or self._refresh()

    @property
    def ready_in(self) -> Mapping[str, Snapshot]:
        """`ready` for each of several pools."""
        if self._ready is None:
            self._refresh()
        return self._ready_in

    def subscribe(
        self, *, added: Callable[[Endpoint], None] | None = None, removed: Callable[[Endpoint], None] | None = None
    ) -> Callable[[], None]:
        """Be told of endpoints that come (those already here are told at once) and go, until what is returned is called."""
        if added:
            self._added = [*self._added, added]
            for endpoint in list(self.endpoints.values()):
                added(endpoint)
        if removed:
            self._removed = [*self._removed, removed]

        def unsubscribe() -> None:
            self._added = [each for each in self._added if each is not added]
            self._removed = [each for each in self._removed if each is not removed]

        return unsubscribe

    def apply(self, specs: Iterable[EndpointSpec]) -> None:
        """Make the pool exactly `specs`. An endpoint that stays keeps its load; a relabelled one keeps its load and slot too.

        Raises ValueError when there are more than the limit; the pool is then unchanged.
        """
        wanted = {spec.address: spec for spec in specs}
        if len(wanted) > self._endpoints_max:
            raise ValueError(f"{len(wanted)} endpoints, the limit is {self._endpoints_max}")
        gone = [endpoint for address, endpoint in self.endpoints.items() if not _same(wanted.get(address), endpoint)]
        for endpoint in gone:
            del self.endpoints[endpoint.spec.address]
            del self.by_destination[endpoint.destination]
        come = []
        for address, spec in wanted.items():
            known = self.endpoints.get(address)
            if known is None:
                endpoint = Endpoint(spec, self._take_slot(), self.changes)
                self.endpoints[address] = endpoint
                self.by_destination[endpoint.destination] = endpoint
                come.append(endpoint)
            elif known.spec is not spec and known.spec != spec:
                known.spec = spec
                known.labels = spec.labels
        self._ready = None
        for endpoint in gone:
            for tell in self._removed:
                tell(endpoint)
        for endpoint in come:
            for tell in self._added:
                tell(endpoint)
        self.noticed()

    def free_slot(self, slot: int) -> None:
        """The slot's last trace is gone from the prefix index: a new endpoint may have it."""
        heapq.heappush(self._free_slots, slot)

    def record_reading(self, endpoint: Endpoint, reading: Reading, *, sent_requests: int, sent_tokens: int) -> None:
        """A scrape came back. `sent_*` are the endpoint's counts when it was asked: what was sent after that is still unread."""
        if reading.waiting is not None:
            endpoint.waiting = reading.waiting
        if reading.running is not None:
            endpoint.running = reading.running
        if reading.kv_usage is not None:
            endpoint.kv_usage = reading.kv_usage
        if reading.kv_blocks and reading.kv_block_tokens:
            endpoint.kv_capacity_tokens = reading.kv_blocks * reading.kv_block_tokens
        if reading.adapters_active is not None:
            endpoint.adapters_active = reading.adapters_active
        if reading.adapters_waiting is not None:
            endpoint.adapters_waiting = reading.adapters_waiting
        if reading.adapters_max is not None:
            endpoint.adapters_max = reading.adapters_max
        if reading.attributes:
            endpoint.attributes.update(reading.attributes)
        endpoint.sent_requests = max(0, endpoint.sent_requests - sent_requests)
        endpoint.sent_tokens = max(0, endpoint.sent_tokens - sent_tokens)
        endpoint.scraped_at_s = self._clock.now_s()
        endpoint.scrape_failures = 0
        endpoint.trusted = 1.0
        self.changes.add(endpoint.slot)
        self.set_healthy(endpoint, healthy=True)
        self.noticed()

    def record_silence(self, endpoint: Endpoint) -> None:
        """A scrape brought no reading: the last one counts less the older it gets."""
        trusted = trust(self.staleness_s(endpoint))
        if endpoint.trusted != trusted:
            endpoint.trusted = trusted
            self.changes.add(endpoint.slot)
        self.noticed()

    def record_answer(self, endpoint: Endpoint) -> None:
        """It answers, but with nothing its load could be read from: our own count is all there is."""
        endpoint.scrape_failures = 0
        if endpoint.trusted:
            endpoint.trusted = 0.0
            self.changes.add(endpoint.slot)
        self.set_healthy(endpoint, healthy=True)
        self.noticed()

    def record_push(self, endpoint: Endpoint, *, waiting: float | None, kv_usage: float | None) -> None:
        """The engine said in a response how busy it is: as of now, so what was sent before is in it."""
        if waiting is not None:
            endpoint.waiting = waiting
            endpoint.sent_requests = 0
        if kv_usage is not None:
            endpoint.kv_usage = kv_usage
            endpoint.sent_tokens = 0
        self.changes.add(endpoint.slot)
        self.noticed()

    def set_healthy(self, endpoint: Endpoint, *, healthy: bool) -> None:
        if endpoint.healthy is not healthy:
            endpoint.healthy = healthy
            self._ready = None
            self.noticed()

    def set_ejected(self, endpoint: Endpoint, *, ejected: bool, half_open: bool = False) -> None:
        endpoint.half_open = half_open
        if endpoint.ejected is not ejected:
            endpoint.ejected = ejected
            self._ready = None
            self.noticed()

    def set_draining(self, endpoint: Endpoint, *, draining: bool) -> None:
        """Mark it, or take the mark away; what its source says of it stays as it is."""
        if endpoint.drain_marked is not draining:
            endpoint.drain_marked = draining
            self._ready = None
            self.noticed()

    def staleness_s(self, endpoint: Endpoint) -> float:
        """Age of the endpoint's last reading; infinite before the first."""
        return self._clock.now_s() - endpoint.scraped_at_s

    def _refresh(self) -> Snapshot:
        staying = [e for e in self.endpoints.values() if not e.draining]
        if self.pools:
            members: dict[str, list[Endpoint]] = {name: [] for name in self.pools}
            for endpoint in staying:
                for name in endpoint.spec.pools:
                    if name in members:
                        members[name].append(endpoint)
            usable = {name: _usable(there) for name, there in members.items()}
            self._ready_in = {name: Snapshot.of(there) for name, there in usable.items()}
            self._ready = Snapshot.of(list(dict.fromkeys(e for there in usable.values() for e in there)))
        else:
            self._ready = Snapshot.of(_usable(staying))
        return self._ready

    def _take_slot(self) -> int:
        if self._free_slots:
            return heapq.heappop(self._free_slots)
        self._slots_made += 1
        return self._slots_made - 1
