"""Who gives way when the queue is full: the newest requests of the flow that has most of it queued.

Fairness in who is served is none if a tenant that floods also fills the queue: whoever comes then finds no room to wait in. So a request of
a flow with less takes the place of one of the flow with most (longest queue drop), and where all bands together are full, of one of a lower
band. Within a band only where its policy tells flows apart: global-strict-fairness-policy does not.

Not here: what the displaced are told (control). Cost: nothing until the queue is full, then O(log flows) a request.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from epp.admission.queues import Flow, Waiting

DISPLACED_MAX = 16
"""Requests that give way to one: a body as large as more of them is refused."""
STALE_MIN = 64


class Excess(NamedTuple):
    """By what a newcomer is too much. Its flow would have `flow_requests` and `flow_size_bytes` queued with it."""

    requests: int
    size_bytes: int
    flow_requests: int
    flow_size_bytes: int


class Crowd:
    """Flows of one band by what they have queued; looked at from the top, where what is out of date is put right."""

    def __init__(self, flows: Mapping[str, Flow], measure: Callable[[Flow], int]) -> None:
        self._flows = flows
        self.measure = measure
        self._heap: list[tuple[int, str]] = []
        self._rebuild()

    def grew(self, flow: Flow) -> None:
        heapq.heappush(self._heap, (-self.measure(flow), flow.id))
        if len(self._heap) > 4 * len(self._flows) + STALE_MIN:
            self._rebuild()

    def most(self) -> Flow | None:
        heap = self._heap
        while heap:
            noted, fairness_id = heap[0]
            flow = self._flows.get(fairness_id)
            if flow is None:
                heapq.heappop(heap)
            elif self.measure(flow) == -noted:
                return flow
            else:
                heapq.heapreplace(heap, (-self.measure(flow), fairness_id))
        return None

    def _rebuild(self) -> None:
        self._heap = [(-self.measure(flow), flow.id) for flow in self._flows.values()]
        heapq.heapify(self._heap)


class Crowds:
    """Of one band: by requests and by bytes, kept since somebody asked and until nobody waits."""

    def __init__(self, flows: Mapping[str, Flow]) -> None:
        self._flows = flows
        self._by: dict[bool, Crowd] = {}

    def grew(self, flow: Flow) -> None:
        for crowd in self._by.values():
            crowd.grew(flow)

    def empty(self) -> None:
        self._by.clear()

    def give_way(self, excess: Excess, *, among_equals: bool) -> list[Waiting]:
        """Who goes so that the newcomer fits; nobody where it does not then, or where (`among_equals`) its flow would have more than theirs."""
        by_requests = excess.requests > 0
        crowd = self._by.get(by_requests)
        if crowd is None:
            crowd = self._by[by_requests] = Crowd(self._flows, _requests if by_requests else _size_bytes)
        most = crowd.most()
        if most is None:
            return []
        if among_equals:
            requests, size_bytes = most.requests - max(0, excess.requests), most.size_bytes - max(0, excess.size_bytes)
            if (requests < excess.flow_requests) if by_requests else (size_bytes < excess.flow_size_bytes):
                return []
        return _newest(most.newest(), excess)


def _newest(entries: Iterable[Waiting], excess: Excess) -> list[Waiting]:
    found: list[Waiting] = []
    requests, size_bytes = excess.requests, excess.size_bytes
    for entry in entries:
        found.append(entry)
        requests -= 1
        size_bytes -= entry.size_bytes
        if requests <= 0 and size_bytes <= 0:
            return found
        if len(found) == DISPLACED_MAX:
            break
    return []


def _requests(flow: Flow) -> int:
    return flow.requests


def _size_bytes(flow: Flow) -> int:
    return flow.size_bytes
