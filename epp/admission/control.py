"""Flow control: a request passes while what it may use has room; else it waits for its turn, until its time is over, or is told to return.

One object, driven by events and timers, without a task of its own: requests, ends and first tokens of responses, readings, changes of the
pool. Each of them asks for one pump at most per loop iteration; a pump looks at each group of candidates once and lets requests through, the
highest priority first, until everything is full. Nothing polls.

Invariants: every request has exactly one outcome; a wait is woken once, and never from within `begin`; what is queued never exceeds the
limits; a band's requests pass before any of a lower one for the same candidates. Where candidates overlap without being the same, a lower
band may be served by what the higher one may not use, and the scheduler's scores say which endpoint that is.

Not here: order (queues, bands), who may go (gate, saturation), times (deadlines), whose a request is (tenants). Cost (bench flow, 100 000 queued): 5 µs
to queue a request, 7 to 11 to let it through. Limits: those of settings, `DISPATCHES_MAX` a pump, and each part's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf
from typing import Any, Literal, Protocol, cast

from epp.admission.bands import Band, Bands
from epp.admission.deadlines import Deadlines, ttl_given_s
from epp.admission.eviction import GRACE_LEADING_S, GRACE_S, Evictor
from epp.admission.gate import Gate
from epp.admission.ledger import DEFAULT_FLOW, Service
from epp.admission.queues import OVER, QUEUED, SENT, Waiting
from epp.admission.refusals import (
    RETRY_AFTER_MAX_S,
    RETRY_AFTER_MIN_S,
    DisplacedError,
    NoEndpointsWhileQueuedError,
    Outcome,
    QueueFullError,
    QueueTimeoutError,
)
from epp.admission.saturation import EMPTY, USABLE, CandidateSource, Group, Saturation
from epp.admission.series import Counts
from epp.admission.settings import Settings
from epp.admission.state import state_of
from epp.admission.tenants import Tenants
from epp.arrival import Arrival
from epp.clock import Clock
from epp.errors import EppError, ShuttingDownError, shed
from epp.exchange import Exchange
from epp.plugins.base import Detector, Finished
from epp.types import Endpoint, LLMRequest

DISPATCHES_MAX = 256
"""Requests let through in one pump: then others have the event loop."""
FAULT_PAUSE_S = 1.0
"""Before the next pump when one failed."""


class Handle(Protocol):
    def cancel(self) -> None: ...


CallAt = Callable[[float, Callable[[], None]], Handle]
"""Call a function at that time of the clock, soon if it is past; never from within."""


class FlowControl:
    """See the module; how it is wired: the package."""

    def __init__(
        self,
        settings: Settings,
        candidates: CandidateSource,
        clock: Clock,
        call_at: CallAt,
        *,
        detector: Detector,
        pool_name: str = "default",
        evict: Callable[[Exchange], bool] | None = None,
        stages_of: Callable[[LLMRequest], int] | None = None,
    ) -> None:
        """`evict`: ends a running request with EvictedError, later; needed for eviction. `stages_of`: see Saturation."""
        self._clock = clock
        self._call_at = call_at
        self._evict = evict
        self.saturation = Saturation(candidates, detector, stages_of)
        self.counts = Counts(pool_name)
        self.service = Service(clock.now_s())
        self.tenants = Tenants(self.service)
        self.requests = 0
        """Queued."""
        self.size_bytes = 0
        self.evictor: Evictor | None = None
        self._number = 0
        self._pump: tuple[float, Handle] | None = None
        self._expiry: tuple[float, Handle] | None = None
        self._closed = False
        self._passed: LLMRequest | None = None
        """Let through just now, and being decided: the last stage there is."""
        self._done: Callable[[], None] | None = None
        self.settings = settings
        self.bands = Bands(settings, self.service.ledger)
        self._gate = Gate(self.saturation, self.bands, settings.usage_limit)
        self._deadlines = Deadlines(settings.no_endpoints_ttl_s)
        self.use(settings, detector)

    def __repr__(self) -> str:
        return f"<FlowControl queued={self.requests}/{self.size_bytes}B groups={len(self.saturation)} bands={list(self.bands.all)}>"

    def begin(self, arrival: Arrival) -> Waiting | None:
        """None: the request passes, and is routed at once. Raises EppError."""
        now_s = self._clock.now_s()
        request = arrival.request
        given_s = ttl_given_s(request, self.settings.request_ttl_max_s)
        fairness_id = self.tenants.named(request)
        band = self.bands.of(request.priority, now_s)
        series = self.counts.of(request, fairness_id, band.priority)
        if self.tenants.rates is not None:
            try:
                self.tenants.rates.admit(request, now_s)
            except EppError:
                series.ended(Outcome.REJECTED_OTHER, 0.0)
                raise
        group = self.saturation.group(arrival, now_s)
        if (group.state == EMPTY and not self.settings.waits_for_endpoints) or self._gate.passes(band, group, now_s):
            band.drain.add(now_s)
            if group.state == USABLE:
                self._passed = request
                self.service.sent(request, 0.0, now_s)
                self.saturation.passed(request.prompt_tokens, group)
            series.passed(self._clock.now_s() - now_s)
            return None
        refused = self._refused(band, group, request, given_s, now_s)
        if refused is not None:
            outcome, error = refused
            self.tenants.returned(request, now_s)
            series.ended(outcome, 0.0)
            series.entered(outcome, self._clock.now_s() - now_s)
            raise error
        self._number += 1
        ttl_s = given_s if given_s is not None else self._ttl_s(band)
        entry = Waiting(arrival, self._number, now_s, self._left, ttl_s=ttl_s, ttl_given=given_s is not None)
        entry.series = series
        self._queue(entry, band, fairness_id, group)
        series.entered(Outcome.DISPATCHED, self._clock.now_s() - now_s)
        return entry

    def _queue(self, entry: Waiting, band: Band, fairness_id: str, group: Group) -> None:
        arrival, series, now_s = cast("Arrival", entry.arrival), entry.series, entry.queued_s
        entry.order = band.order(arrival.request, arrival.started_s, now_s, entry.ttl_s)
        band.add(entry, fairness_id, group)
        self.requests += 1
        self.size_bytes += entry.size_bytes
        series.queued += 1
        series.size_bytes += entry.size_bytes
        self._deadlines.add(entry, now_s)
        self._watch()
        if entry.backlog.alive == 1:  # what the first one waits for may be a matter of time alone
            self.changed()

    def routed(self, request: LLMRequest, exchange: Exchange | None) -> None:
        """A request that was let through is charged to its endpoint; None: it was refused after all."""
        counted = request is self._passed or self.saturation.settle(request)
        self._passed = None
        if exchange is None:
            self.tenants.returned(request, self._clock.now_s(), sent=counted)
        elif self.evictor is not None:
            self.evictor.track(exchange, self._clock.now_s())
        self.changed()

    def retry_after_s(self) -> int:
        """For a request that is refused and did not wait: when those that do should be gone."""
        now_s = self._clock.now_s()
        return max((band.retry_after_s(now_s) for band in self.bands.all if band.requests), default=RETRY_AFTER_MIN_S)

    def first_token(self, _request: LLMRequest, _endpoint: Endpoint, _ttft_s: float) -> None:
        """The endpoint has work off its hands."""
        self.changed()

    def finished(self, request: LLMRequest, endpoint: Endpoint, outcome: Finished) -> None:
        self.tenants.finished(request, endpoint, outcome, self._clock.now_s())
        if self.evictor is not None:
            self.evictor.gone(request, self._clock.now_s())
        self.changed()

    def changed(self) -> None:
        """Something happened that may let a request through."""
        if self.requests and (self._pump is None or self._pump[0] > self._clock.now_s()):
            self._pump_at(self._clock.now_s())

    def provision(self, priorities: Iterable[int]) -> None:
        """There are objectives of these priorities."""
        self.bands.provision(priorities, self._clock.now_s())

    def use(self, settings: Settings, detector: Detector) -> None:
        """By these rules from now on. What is queued stays, even where it is more than may be now."""
        now_s = self._clock.now_s()
        queued = sorted((entry for band in self.bands.all for backlog in band.backlogs.values() for entry in backlog), key=_number)
        bands = Bands(settings, self.service.ledger)  # raises for what can't be used, before anything is changed
        self.settings = settings
        self.tenants.use(settings.identities, settings.token_rate)
        self.saturation.use(detector)
        drains = {band.priority: band.drain for band in self.bands.all}
        priorities = self.bands.priorities
        self.bands = self._gate.bands = bands
        self._gate.limit = settings.usage_limit
        self.bands.provision(priorities, now_s)
        for band in self.bands.all:
            band.drain = drains.get(band.priority, band.drain)
        self._deadlines = Deadlines(settings.no_endpoints_ttl_s)
        for entry in queued:
            arrival, group = cast("Arrival", entry.arrival), entry.group
            band = self.bands.of(arrival.request.priority, now_s)
            if not entry.ttl_given:
                entry.ttl_s = self._ttl_s(band)
            entry.order = band.order(arrival.request, arrival.started_s, entry.queued_s, entry.ttl_s)
            group.queued -= 1
            band.add(entry, entry.flow.id, group)
            self._deadlines.add(entry, now_s)
        grace_s = GRACE_LEADING_S if getattr(detector, "leads", False) else GRACE_S
        if not settings.eviction or self._evict is None:
            self.evictor = None
        elif self.evictor is None:
            self.evictor = Evictor(settings.eviction_filter, settings.eviction_order, self._evict, grace_s=grace_s)
        else:
            self.evictor.grace_s = grace_s
        self._watch()
        self.changed()

    def close(self, policy: Literal["drain", "reject"], done: Callable[[], None] = lambda: None) -> None:
        """From now on nobody begins to wait: who can't pass is refused. Those who wait do so to their end, or are refused now."""
        self._closed, self._done = True, done
        if policy == "reject":
            for band in self.bands.all:
                for entry in [entry for backlog in band.backlogs.values() for entry in backlog]:
                    if entry.state == QUEUED:
                        self._refuse(entry, Outcome.EVICTED_OTHER, ShuttingDownError("flow controller shutting down"))
        self._drained()

    def state(self) -> dict[str, Any]:
        """What waits where; bounded, nothing of any prompt."""
        return state_of(self, self._clock.now_s())

    def _refused(
        self, band: Band, group: Group, request: LLMRequest, given_s: float | None, now_s: float
    ) -> tuple[Outcome, EppError] | None:
        """Why it can't even wait."""
        if self._closed:
            return Outcome.REJECTED_OTHER, ShuttingDownError("flow controller shutting down")
        if self.settings.sheds and request.priority < 0:
            return Outcome.REJECTED_CAPACITY, shed(self.retry_after_s())
        empty, size_bytes = group.state == EMPTY, request.body_bytes
        if given_s == 0.0:
            if empty:
                return Outcome.REJECTED_NO_ENDPOINTS, NoEndpointsWhileQueuedError("no endpoint is ready", RETRY_AFTER_MAX_S)
            return Outcome.REJECTED_OTHER, QueueTimeoutError("it may not wait, and there is no room", band.retry_after_s(now_s))
        fairness_id = request.fairness_id or DEFAULT_FLOW
        why = self.bands.full(band, fairness_id, size_bytes, self)
        if why and self._displace(band, fairness_id, size_bytes, now_s):
            why = self.bands.full(band, fairness_id, size_bytes, self)
        if not why:
            return None
        self.counts.limit_hits["queue"] += 1
        if empty:
            return Outcome.REJECTED_NO_ENDPOINTS, NoEndpointsWhileQueuedError(f"no endpoint is ready, and {why}", band.retry_after_s(now_s))
        return Outcome.REJECTED_CAPACITY, QueueFullError(f"the queue is full: {why}", band.retry_after_s(now_s))

    def _displace(self, band: Band, fairness_id: str, size_bytes: int, now_s: float) -> bool:
        """Have others give way to a request that finds the queue full. Whether somebody did."""
        victims = self.bands.give_way(band, fairness_id, size_bytes, self)
        for entry in victims:
            self.counts.limit_hits["queue"] += 1
            self._refuse(entry, Outcome.EVICTED_OTHER, DisplacedError(entry.band.retry_after_s(now_s)))
        return bool(victims)

    def _run_pump(self) -> None:
        self._pump = None
        if not self.requests:
            return
        started_s = self._clock.now_s()
        again_s = started_s + FAULT_PAUSE_S  # if it fails: a fault of a plugin's must not have it spin
        try:
            again_s = self._dispatch(started_s)
        finally:
            if self.requests and again_s < inf:
                self._pump_at(again_s)
            self.counts.cycle_s.observe(self._clock.now_s() - started_s)

    def _dispatch(self, now_s: float) -> float:
        """Let through what may be. When to do so again though nothing happened."""
        gate = self._gate
        gate.turn(now_s)
        self._watch()
        left = DISPATCHES_MAX
        for band in self.bands.all:
            while band.requests:
                group = gate.next(band, now_s)
                if group is None:
                    break
                self._send(band.backlogs[group].pop(), now_s)
                left -= 1
                if not left:
                    return now_s
        if not gate.blocked:
            return inf
        again_s = min(gate.opens_s(now_s), self.saturation.lapse_s)
        return again_s if self.evictor is None else min(again_s, gate.reclaim(self.evictor, self.counts.pool_name, now_s))

    def _send(self, entry: Waiting, now_s: float) -> None:
        """It was taken out of its backlog: its turn has come."""
        entry.state = SENT
        arrival = cast("Arrival", entry.arrival)
        entry.arrival = None
        wait_s = now_s - entry.queued_s
        entry.band.drain.add(now_s)
        if entry.group.state == USABLE:
            self.service.sent(arrival.request, wait_s, now_s)
            entry.charge = self.saturation.send(arrival.request, entry.group, now_s)
        self._out(entry, Outcome.DISPATCHED, wait_s)
        arrival.wake()

    def _refuse(self, entry: Waiting, outcome: Outcome, error: EppError) -> None:
        entry.state = OVER
        entry.error = error
        entry.backlog.drop(entry)
        arrival = self._dropped(entry, outcome)
        arrival.wake()

    def _left(self, entry: Waiting) -> None:
        """Its client is gone."""
        if entry.state == QUEUED:
            entry.state = OVER
            entry.backlog.drop(entry)
            self._dropped(entry, Outcome.EVICTED_CONTEXT_CANCELLED)
        elif entry.charge is not None and entry.charge.request is not None:
            self.routed(entry.charge.request, None)

    def _dropped(self, entry: Waiting, outcome: Outcome) -> Arrival:
        """It is served no more."""
        now_s = self._clock.now_s()
        arrival = cast("Arrival", entry.arrival)
        entry.arrival = None
        self.tenants.returned(arrival.request, now_s)
        self._out(entry, outcome, now_s - entry.queued_s)
        return arrival

    def _out(self, entry: Waiting, outcome: Outcome, wait_s: float) -> None:
        """It is queued no more, and its backlog knows."""
        self.requests -= 1
        self.size_bytes -= entry.size_bytes
        entry.series.queued -= 1
        entry.series.size_bytes -= entry.size_bytes
        entry.band.gone(entry)
        self._deadlines.shrink(self.requests)
        entry.series.ended(outcome, wait_s)
        if not self.requests:
            self._drained()

    def _drained(self) -> None:
        if self._closed and not self.requests and self._done is not None:
            done, self._done = self._done, None
            done()

    def _expire(self) -> None:
        now_s = self._clock.now_s()
        self._expiry = None
        for group in self.saturation.queued():
            self.saturation.resolve(group, now_s)
        for entry in self._deadlines.due(now_s):
            retry_s = entry.band.retry_after_s(now_s)
            waited = f"{now_s - entry.queued_s:.3g} s"
            if entry.group.state == EMPTY:
                error: EppError = NoEndpointsWhileQueuedError(f"no endpoint came in {waited}", retry_s)
                self._refuse(entry, Outcome.EVICTED_NO_ENDPOINTS, error)
            else:
                self._refuse(entry, Outcome.EVICTED_TTL, QueueTimeoutError(waited, retry_s))
        self._watch()

    def _watch(self) -> None:
        """Have a timer at the earliest deadline."""
        first_s = self._deadlines.first_s()
        if self._expiry is not None:
            if self._expiry[0] <= first_s < inf:
                return
            self._expiry[1].cancel()
            self._expiry = None
        if first_s < inf:
            self._expiry = first_s, self._call_at(first_s, self._expire)

    def _pump_at(self, when_s: float) -> None:
        if self._pump is not None:
            if self._pump[0] <= when_s:
                return
            self._pump[1].cancel()
        self._pump = when_s, self._call_at(when_s, self._run_pump)

    def _ttl_s(self, band: Band) -> float:
        return self.settings.ttl_s if band.settings.ttl_s is None else band.settings.ttl_s


def _number(entry: Waiting) -> int:
    return entry.number
