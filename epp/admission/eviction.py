"""Which running requests give way to queued ones of higher priority: the policy; the deed is `evict`, handed in. Off by default.

Stop and wait: what is needed is worked out from how full the blocked band's candidates are, at most `REVOCATIONS_MAX` requests are told
to go, and nothing more is done until each of them has ended (or `CONFIRM_S` is over) and the detector has had `grace_s` to see it. Only
requests on the blocked band's candidates are taken: others would free nothing there. Inventory 5.6.

Cost: 1 µs a request while eviction is on; a look at all that run when somebody has to give way. Limits: as many entries as requests run.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable
from math import ceil, inf
from typing import NamedTuple

from epp.admission.series import REVOCATION_S
from epp.admission.settings import EvictionFilter, EvictionOrder
from epp.exchange import Exchange
from epp.observe.series import Histogram
from epp.types import LLMRequest

REVOCATIONS_MAX = 2
CONFIRM_S = 10.0
GRACE_LEADING_S = 0.01
"""For a detector that counts for itself (`leads`): it sees a stream end at once."""
GRACE_S = 1.5
"""For one that reads metrics: the longest interval between readings, and what an engine takes to free its memory."""
LOOKS_MAX = 64
"""Running requests looked at to find one on the right endpoints."""
DEAD_MIN = 64

Running = tuple[tuple[float, float], int, Exchange]
"""Order, number, and whose it is."""


class Need(NamedTuple):
    """A band that has requests queued and is blocked."""

    priority: int
    pool: str
    mask: int
    """Of the endpoints they may use."""
    saturation: float
    ceiling: float


class Evictor:
    """See the module."""

    def __init__(self, rule: EvictionFilter, order: EvictionOrder, evict: Callable[[Exchange], bool], *, grace_s: float) -> None:
        """`evict` ends a request with EvictedError and says whether it could; its end is told by `gone`, not from within."""
        self._filter, self._order, self._evict = rule, order, evict
        self.grace_s = grace_s
        self._running: dict[LLMRequest, Exchange] = {}
        self._evictable: set[LLMRequest] = set()
        self._heap: list[Running] = []
        self._number = 0
        self._issued: dict[LLMRequest, tuple[float, float]] = {}
        """Told to go: when, and what that should free."""
        self._cooling: list[tuple[float, float]] = []
        """Gone: since when that counts, and what it frees."""
        self.issued: defaultdict[tuple[int, str], int] = defaultdict(int)
        """(priority of the band in need, pool) -> requests told to go."""
        self.confirmed = self.timed_out = 0
        self.target = 0.0
        """Saturation above the ceiling, when last worked out."""
        self.confirmation_s = Histogram(REVOCATION_S)

    def __len__(self) -> int:
        return len(self._running)

    @property
    def pending(self) -> float:
        """Saturation that is on its way out."""
        return sum(credit for _, credit in self._issued.values()) + sum(credit for _, credit in self._cooling)

    def track(self, exchange: Exchange, now_s: float) -> None:
        """It was charged to an endpoint."""
        request = exchange.request
        self._running[request] = exchange
        if self._filter.evictable(request):
            self._number += 1
            self._evictable.add(request)
            heapq.heappush(self._heap, (self._order.eviction_order(request, now_s), -self._number, exchange))

    def gone(self, request: LLMRequest, now_s: float) -> None:
        """Its stream ended."""
        self._running.pop(request, None)
        self._evictable.discard(request)
        issued = self._issued.pop(request, None)
        if issued is not None:
            self.confirmed += 1
            self.confirmation_s.observe(now_s - issued[0])
            self._cooling.append((now_s + self.grace_s, issued[1]))
        if len(self._heap) > 2 * len(self._evictable) + DEAD_MIN:
            self._heap = [item for item in self._heap if item[2].request in self._evictable]
            heapq.heapify(self._heap)

    def ready_s(self, now_s: float) -> float:
        """When something may be done again; infinite if that takes an event. Gives up on those that do not end."""
        for request, (since_s, credit) in list(self._issued.items()):
            if now_s - since_s >= CONFIRM_S:
                del self._issued[request]
                self.timed_out += 1
                self._cooling.append((now_s + self.grace_s, credit))
        self._cooling = [each for each in self._cooling if each[0] > now_s]
        if self._issued:
            return min(since_s for since_s, _ in self._issued.values()) + CONFIRM_S
        return max((until_s for until_s, _ in self._cooling), default=-inf)

    def reclaim(self, need: Need, now_s: float) -> int:
        """How many were told to go. Only where `ready_s` is past."""
        if not (0 < need.ceiling <= need.saturation and self._evictable):
            return 0
        self.target = need.saturation - need.ceiling
        credit = need.saturation / max(1, sum(need.mask >> each.decision.endpoint.slot & 1 for each in self._running.values()))
        victims = self._victims(need, min(REVOCATIONS_MAX, max(1, ceil(self.target / credit))))
        done = 0
        for victim in victims:
            request = victim.request
            self._evictable.discard(request)
            if self._evict(victim):
                self._issued[request] = now_s, credit
                self.issued[need.priority, need.pool] += 1
                done += 1
        return done

    def _victims(self, need: Need, wanted: int) -> list[Exchange]:
        found: list[Exchange] = []
        passed: list[Running] = []
        while self._heap and len(found) < wanted and len(passed) < LOOKS_MAX:
            item = heapq.heappop(self._heap)
            exchange = item[2]
            if exchange.request not in self._evictable:
                continue
            if exchange.request.priority < need.priority and need.mask >> exchange.decision.endpoint.slot & 1:
                found.append(exchange)
            else:
                passed.append(item)
        for item in passed:
            heapq.heappush(self._heap, item)
        return found
