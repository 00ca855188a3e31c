"""When the next queued request has waited long enough: a heap of times that are never too late.

A request's time starts anew when its candidates vanish or come back, so what is kept is the earliest moment it can end; when that comes
the real one is worked out, and the request put back if it is later. Cost: O(log n); at most one further look in the shorter of both times.
"""

from __future__ import annotations

import heapq
from math import inf

from epp.admission.queues import QUEUED, Waiting
from epp.admission.saturation import EMPTY
from epp.config.quantities import duration_s
from epp.errors import BadRequestError
from epp.types import LLMRequest

TTL_HEADERS = ("x-llm-d-request-ttl", "x-gateway-request-ttl")
"""How long this request waits at most: `30s`, `1500ms`, or seconds. 0: not at all."""
REQUEST_TTL_MAX_S = 3_600.0
DEAD_MIN = 64


class Deadlines:
    """See the module. `ttl_s` of a request, and this, are 0 where there is no limit."""

    def __init__(self, no_endpoints_ttl_s: float) -> None:
        self._no_endpoints_ttl_s = no_endpoints_ttl_s
        self._heap: list[tuple[float, int, Waiting]] = []

    def __len__(self) -> int:
        """With those that are no longer queued."""
        return len(self._heap)

    def add(self, entry: Waiting, now_s: float) -> None:
        soonest = self._soonest_s(entry, now_s)
        if soonest < inf:
            heapq.heappush(self._heap, (soonest, entry.number, entry))

    def first_s(self) -> float:
        heap = self._heap
        while heap and heap[0][2].state != QUEUED:
            heapq.heappop(heap)
        return heap[0][0] if heap else inf

    def due(self, now_s: float) -> list[Waiting]:
        """Those whose time is over. They are in here no more."""
        found = []
        while self.first_s() <= now_s:
            entry = heapq.heappop(self._heap)[2]
            ends_s = self.ends_s(entry)
            if ends_s <= now_s:
                found.append(entry)
            else:
                again_s = min(ends_s, self._soonest_s(entry, now_s))
                if again_s < inf:
                    heapq.heappush(self._heap, (again_s, entry.number, entry))
        return found

    def ends_s(self, entry: Waiting) -> float:
        """By what is known now."""
        given_s = entry.queued_s + entry.ttl_s if entry.ttl_given else inf
        ttl_s = self._no_endpoints_ttl_s if entry.group.state == EMPTY else 0.0 if entry.ttl_given else entry.ttl_s
        since_s = max(entry.queued_s, entry.group.since_s)
        return min(given_s, since_s + ttl_s if ttl_s else inf)

    def shrink(self, queued: int) -> None:
        """There are so many queued: the rest is swept out when it is the most."""
        if len(self._heap) > 2 * queued + DEAD_MIN:
            self._heap = [item for item in self._heap if item[2].state == QUEUED]
            heapq.heapify(self._heap)

    def _soonest_s(self, entry: Waiting, now_s: float) -> float:
        """It can't end before, whatever becomes of its candidates."""
        times = [ttl_s for ttl_s in (entry.ttl_s, self._no_endpoints_ttl_s) if ttl_s]
        soonest = now_s + min(times, default=inf)
        return min(soonest, max(now_s, entry.queued_s + entry.ttl_s)) if entry.ttl_given else soonest


def ttl_given_s(request: LLMRequest) -> float | None:
    """What the request's headers say. Raises BadRequestError."""
    headers = request.headers
    written = headers.get(TTL_HEADERS[0]) or headers.get(TTL_HEADERS[1])
    if not written:
        return None
    try:
        seconds = float(written) if written.isascii() and written.replace(".", "", 1).isdecimal() else duration_s(written)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < inf:
        raise BadRequestError(f"{TTL_HEADERS[0]}: write a time like 30s, 1500ms, or a number of seconds")
    return min(seconds, REQUEST_TTL_MAX_S)
