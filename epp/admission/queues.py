"""Queued requests in the order in which they are served: within a flow, and among the flows of a band.

A band has one backlog for each set of candidates (saturation.Group), so that what waits for one set never holds what may go to another. A
backlog is a heap, or a heap of flows that are heaps. Requests that left are skipped when they come up, and swept out when they are the
most. Ranks of flows only grow while they wait, which is what lets a stale one be found out at the top. Not here: when (control), how
full (saturation). Cost: O(log n) an operation, about 3 µs at 100 000.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from epp.admission.ledger import Ledger
from epp.arrival import Arrival
from epp.errors import EppError
from epp.plugins.base import Plugin
from epp.plugins.flow_control.policies import GlobalStrictFairnessPolicy, ProgramAwareFairness, RoundRobinFairnessPolicy

if TYPE_CHECKING:
    from collections.abc import Callable

    from epp.admission.bands import Band
    from epp.admission.saturation import Group, Uncharged
    from epp.admission.series import FlowSeries

DEAD_MIN = 64
"""Entries nobody waits for that a heap may always hold."""
FLOW_DEAD_MIN = 8
"""The same, of a flow."""
EXACT_FLOWS_MAX = 8
"""program-aware-fairness weighs up to so many flows anew each time; more, when half of them were served."""

QUEUED, SENT, OVER = range(3)
Rank = tuple[float, int]


class Flow:
    """What one fairness id has queued in one band."""

    __slots__ = ("_entries", "id", "requests", "size_bytes", "turn")

    def __init__(self, fairness_id: str) -> None:
        self.id = fairness_id
        self._entries: list[Waiting] = []
        """As they came, with some that wait no more."""
        self.requests = 0
        self.size_bytes = 0
        self.turn = 0.0
        """The flow with the least is next, where flows take turns."""

    def add(self, entry: Waiting) -> None:
        self.requests += 1
        self.size_bytes += entry.size_bytes
        self._entries.append(entry)

    def gone(self, entry: Waiting) -> None:
        """It is queued no more."""
        self.requests -= 1
        self.size_bytes -= entry.size_bytes
        if len(self._entries) > 2 * self.requests + FLOW_DEAD_MIN:
            self._entries = [each for each in self._entries if each.state == QUEUED]

    def newest(self) -> Iterator[Waiting]:
        """Its requests, the last one first."""
        return (entry for entry in reversed(self._entries) if entry.state == QUEUED)


class Waiting:
    """One request's wait (arrival.Wait). Holds nothing of the request once it is over."""

    __slots__ = (
        "arrival", "backlog", "band", "charge", "error", "flow", "group", "lane", "leave", "number", "order", "queued_s", "series", "size_bytes",
        "state", "ttl_given", "ttl_s",
    )  # fmt: skip

    def __init__(
        self, arrival: Arrival, number: int, queued_s: float, leave: Callable[[Waiting], None], *, ttl_s: float, ttl_given: bool
    ) -> None:
        self.error: EppError | None = None
        self.arrival: Arrival | None = arrival
        self.number = number
        """In order of arrival."""
        self.queued_s = queued_s
        self.size_bytes = arrival.request.body_bytes
        self.ttl_s = ttl_s
        self.ttl_given = ttl_given
        """The request said how long it waits, at most, whatever happens."""
        self.leave = leave
        self.state = QUEUED
        self.order = 0.0
        self.charge: Uncharged | None = None
        self.lane: Lane
        self.backlog: Backlog
        self.band: Band
        self.flow: Flow
        self.group: Group
        self.series: FlowSeries

    def __repr__(self) -> str:
        return f"<Waiting {self.number} {('queued', 'sent', 'over')[self.state]} since {self.queued_s:g}>"

    def cancel(self) -> None:
        self.leave(self)


class Lane:
    """Requests of one flow, or of all flows, by the band's ordering policy."""

    __slots__ = ("_heap", "alive", "flow", "version")

    def __init__(self, flow: Flow | None) -> None:
        self.flow = flow
        self.alive = 0
        self.version = 0
        """Of its place among other lanes."""
        self._heap: list[tuple[float, int, Waiting]] = []

    def __iter__(self) -> Iterator[Waiting]:
        return (item[2] for item in self._heap if item[2].state == QUEUED)

    def push(self, entry: Waiting) -> None:
        heapq.heappush(self._heap, (entry.order, entry.number, entry))
        self.alive += 1

    def head(self) -> Waiting:
        """There must be one."""
        heap = self._heap
        while heap[0][2].state != QUEUED:
            heapq.heappop(heap)
        return heap[0][2]

    def pop(self) -> Waiting:
        head = self.head()
        heapq.heappop(self._heap)
        self.alive -= 1
        return head

    def drop(self) -> None:
        """One of its requests is not queued any more."""
        self.alive -= 1
        if len(self._heap) > 2 * self.alive + DEAD_MIN:
            self._heap = [item for item in self._heap if item[2].state == QUEUED]
            heapq.heapify(self._heap)


class Backlog(Protocol):
    """What one band has queued for one set of candidates."""

    @property
    def alive(self) -> int: ...

    def __iter__(self) -> Iterator[Waiting]: ...

    def add(self, entry: Waiting) -> None: ...

    def rank(self) -> Rank:
        """Of its next request among the band's backlogs: the lowest is served. There must be one."""
        ...

    def pop(self) -> Waiting: ...

    def drop(self, entry: Waiting) -> None:
        """It is not queued any more."""
        ...


class Fairness(Protocol):
    """How the flows of one band are told apart."""

    def backlog(self) -> Backlog: ...

    def joined(self, flow: Flow) -> None:
        """It has something queued again."""
        ...

    def weigh(self, backlogs: Iterator[Backlog]) -> None:
        """Before one of them is served."""
        ...


class Strict:
    """global-strict-fairness-policy: flows do not matter."""

    def backlog(self) -> Backlog:
        return StrictBacklog()

    def joined(self, flow: Flow) -> None:
        pass

    def weigh(self, backlogs: Iterator[Backlog]) -> None:
        pass


class StrictBacklog:
    """One lane for all."""

    __slots__ = ("_lane",)

    def __init__(self) -> None:
        self._lane = Lane(None)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._lane)

    @property
    def alive(self) -> int:
        return self._lane.alive

    def add(self, entry: Waiting) -> None:
        entry.lane = self._lane
        self._lane.push(entry)

    def rank(self) -> Rank:
        head = self._lane.head()
        return head.order, head.number

    def pop(self) -> Waiting:
        return self._lane.pop()

    def drop(self, entry: Waiting) -> None:
        entry.lane.drop()


class ByFlow:
    """Fairness that ranks flows. `epoch` changes when all ranks do."""

    epoch = 0

    def backlog(self) -> Backlog:
        return FlowBacklog(self)

    def joined(self, flow: Flow) -> None:
        raise NotImplementedError

    def weigh(self, backlogs: Iterator[Backlog]) -> None:
        raise NotImplementedError

    def rank(self, lane: Lane) -> float:
        """The lowest is next. Grows, if anything, while the lane's head and the epoch stay."""
        raise NotImplementedError

    def served(self, flow: Flow) -> None:
        raise NotImplementedError


class Turns(ByFlow):
    """round-robin-fairness-policy: the flow that was served longest ago; one that comes (again) joins at the end.

    The reference picker goes round in the order of flows' names: who waits how long is the same, who is first is not.
    """

    def __init__(self) -> None:
        self._turn = 0.0

    def joined(self, flow: Flow) -> None:
        self._turn = flow.turn = self._turn + 1.0

    served = joined

    def weigh(self, backlogs: Iterator[Backlog]) -> None:
        pass

    def rank(self, lane: Lane) -> float:
        assert lane.flow is not None
        return lane.flow.turn


class LeastAttained(ByFlow):
    """program-aware-fairness. A request's prompt is charged when it is sent, else a burst would all be of one flow.

    score = a (1 - norm(service)) + b norm(wait of the head): as norms are linear, the order is that of a service/range + b since/range.
    """

    def __init__(self, policy: ProgramAwareFairness, ledger: Ledger) -> None:
        self.ledger = ledger
        self._policy = policy
        self._service_weight = self._wait_weight = 0.0
        self._left = 0
        """Flows served before all are weighed anew."""
        self._rebased = 0

    def joined(self, flow: Flow) -> None:
        pass

    def served(self, flow: Flow) -> None:
        del flow
        self._left -= 1

    def weigh(self, backlogs: Iterator[Backlog]) -> None:
        if self._left > 0 and self._rebased == self.ledger.rebased:
            return
        lanes = [lane for backlog in backlogs if isinstance(backlog, FlowBacklog) for lane in backlog.lanes()]
        services = [self.ledger.service(lane.flow.id) for lane in lanes if lane.flow is not None]
        since = [lane.head().queued_s for lane in lanes]
        services_range, since_range = max(services) - min(services), max(since) - min(since)
        self._service_weight = self._policy.las_weight_service / services_range if services_range else 0.0
        self._wait_weight = self._policy.las_weight_head_wait / since_range if since_range else 0.0
        self._left, self._rebased = len(lanes) // 2 if len(lanes) > EXACT_FLOWS_MAX else 0, self.ledger.rebased
        self.epoch += 1

    def rank(self, lane: Lane) -> float:
        assert lane.flow is not None
        return self._service_weight * self.ledger.service(lane.flow.id) + self._wait_weight * lane.head().queued_s


class FlowBacklog:
    """A lane for each flow, and a heap of lanes."""

    __slots__ = ("_epoch", "_fairness", "_lanes", "_made", "_order", "alive")

    def __init__(self, fairness: ByFlow) -> None:
        self._fairness = fairness
        self._lanes: dict[str, Lane] = {}
        self._order: list[tuple[float, int, int, Lane]] = []
        """rank, number (no two alike), version, lane."""
        self._made = 0
        self._epoch = fairness.epoch
        self.alive = 0

    def __iter__(self) -> Iterator[Waiting]:
        return (entry for lane in self._lanes.values() for entry in lane)

    def lanes(self) -> Iterator[Lane]:
        return iter(self._lanes.values())

    def add(self, entry: Waiting) -> None:
        lane = self._lanes.get(entry.flow.id)
        new = lane is None
        if lane is None:
            lane = self._lanes[entry.flow.id] = Lane(entry.flow)
        entry.lane = lane
        lane.push(entry)
        self.alive += 1
        if new:
            self._place(lane)

    def rank(self) -> Rank:
        if self._epoch != self._fairness.epoch:
            self._epoch = self._fairness.epoch
            self._rebuild()
        order, rank_of = self._order, self._fairness.rank
        while True:
            rank, number, version, lane = order[0]
            if not lane.alive or version != lane.version:
                heapq.heappop(order)
                continue
            now = rank_of(lane)
            if now <= rank:
                return rank, number
            heapq.heapreplace(order, (now, number, version, lane))

    def pop(self) -> Waiting:
        self.rank()
        lane = self._order[0][3]
        entry = lane.pop()
        self.alive -= 1
        self._fairness.served(entry.flow)
        heapq.heappop(self._order)
        if lane.alive:
            self._place(lane)
        else:
            del self._lanes[entry.flow.id]
        return entry

    def drop(self, entry: Waiting) -> None:
        lane = entry.lane
        lane.drop()
        self.alive -= 1
        if not lane.alive:
            del self._lanes[entry.flow.id]
        else:
            self._place(lane)  # its next request may rank before the one that left
        if len(self._order) > 2 * len(self._lanes) + DEAD_MIN:
            self._rebuild()

    def _place(self, lane: Lane) -> None:
        lane.version += 1
        self._made += 1
        heapq.heappush(self._order, (self._fairness.rank(lane), self._made, lane.version, lane))

    def _rebuild(self) -> None:
        self._order = []
        for lane in self._lanes.values():
            self._place(lane)


def fairness_of(policy: Plugin, ledgers: Callable[[ProgramAwareFairness], Ledger]) -> Fairness:
    """Raises ValueError for a policy whose rule is not known here."""
    if isinstance(policy, GlobalStrictFairnessPolicy):
        return Strict()
    if isinstance(policy, RoundRobinFairnessPolicy):
        return Turns()
    if isinstance(policy, ProgramAwareFairness):
        return LeastAttained(policy, ledgers(policy))
    raise ValueError(f"{policy.name}: flow control knows no fairness policy of the type {policy.type}")
