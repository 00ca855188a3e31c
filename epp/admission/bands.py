"""Priority bands: who belongs where, what each has queued, how fast it drains.

There is always a band 0. A priority without a band gets one of its own, made of the template, up to `BANDS_MAX`; past that it joins the
next lower band on its side of zero, else the next higher one there, so that what may be shed stays so (without any band below zero it joins
the lowest). Bands made so go after `IDLE_MAX_S` without a request, unless there are objectives of their priority: usage limits go by all
bands. Not here: who of a band is next (queues).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from copy import copy
from math import ceil, exp, inf
from typing import Protocol

from epp.admission.crowd import Crowds, Excess
from epp.admission.ledger import Ledger
from epp.admission.queues import Backlog, ByFlow, Flow, Waiting, fairness_of
from epp.admission.refusals import RETRY_AFTER_MAX_S, RETRY_AFTER_MIN_S
from epp.admission.saturation import Group
from epp.admission.settings import BandSettings, Settings
from epp.plugins.flow_control.policies import ProgramAwareFairness
from epp.types import LLMRequest

BANDS_MAX = 64
IDLE_MAX_S = 600.0
SWEEP_S = 60.0
"""Between two looks for idle bands."""
DRAIN_S = 10.0
"""How far back a drain rate looks."""
DRAIN_MIN_S = 1.0
"""The first burst of an idle pool says little of how fast it drains."""
GRAIN_S = 0.01
"""Events so close together count alike."""

Ledgers = Callable[[ProgramAwareFairness], Ledger]

_log = logging.getLogger("epp.flow_control")


class Drain:
    """Events a second, the last ones counting most. Cost: 0.15 µs an event."""

    __slots__ = ("_at_s", "_count", "_since_s")

    def __init__(self) -> None:
        self._count = 0.0
        self._at_s = -inf
        self._since_s = 0.0

    def add(self, now_s: float) -> None:
        if now_s - self._at_s < GRAIN_S:
            self._count += 1.0
            return
        if not self._count:
            self._since_s = now_s
        self._count = self._count * exp((self._at_s - now_s) / DRAIN_S) + 1.0
        self._at_s = now_s

    def per_s(self, now_s: float) -> float:
        if not self._count:
            return 0.0
        seen = 1.0 - exp(-max(DRAIN_MIN_S, now_s - self._since_s) / DRAIN_S)
        return self._count * exp((self._at_s - now_s) / DRAIN_S) / DRAIN_S / seen


class Queued(Protocol):
    """How much waits."""

    requests: int
    size_bytes: int


class Band:
    """Requests of one priority."""

    def __init__(self, settings: BandSettings, ledgers: Ledgers, *, made: bool) -> None:
        self.settings = settings
        self.priority = settings.priority
        self.made = made
        """For a priority that was not configured."""
        self.fairness = fairness_of(settings.fairness, ledgers)
        self.backlogs: dict[Group, Backlog] = {}
        self.flows: dict[str, Flow] = {}
        """Those with anything queued."""
        self.crowds = Crowds(self.flows)
        """Who has most of it."""
        self.requests = 0
        self.size_bytes = 0
        self.drain = Drain()
        self.used_s = 0.0

    def __repr__(self) -> str:
        return f"<Band {self.priority} queued={self.requests}/{self.size_bytes}B flows={len(self.flows)}>"

    def full(self, fairness_id: str, size_bytes: int) -> str:
        """What a request of that size would exceed; empty: nothing."""
        limits, flow = self.settings, self.flows.get(fairness_id)
        if limits.requests_max and self.requests >= limits.requests_max:
            return f"{limits.requests_max} requests of this priority wait"
        if limits.size_bytes_max and self.size_bytes + size_bytes > limits.size_bytes_max:
            return f"{limits.size_bytes_max} bytes of this priority wait"
        queued = (flow.requests, flow.size_bytes) if flow is not None else (0, 0)
        if limits.flow_requests_max and queued[0] >= limits.flow_requests_max:
            return f"{limits.flow_requests_max} requests of this fairness id wait"
        if limits.flow_size_bytes_max and queued[1] + size_bytes > limits.flow_size_bytes_max:
            return f"{limits.flow_size_bytes_max} bytes of this fairness id wait"
        return ""

    def order(self, request: LLMRequest, received_s: float, queued_s: float, ttl_s: float) -> float:
        """By the band's policy; of one that fails, first come, first served: neither a newcomer nor those that wait are lost by it."""
        try:
            found = self.settings.ordering.order(request, received_s, queued_s, ttl_s)
        except Exception:  # noqa: BLE001 - a plugin's; see above
            _log.exception("a plugin's hook failed")
            return queued_s
        return found if found == found else inf  # noqa: PLR0124 - no number is before or after one that is none

    def add(self, entry: Waiting, fairness_id: str, group: Group) -> None:
        flow = self.flows.get(fairness_id)
        if flow is None:
            flow = self.flows[fairness_id] = Flow(fairness_id)
            self.fairness.joined(flow)
        backlog = self.backlogs.get(group)
        if backlog is None:
            backlog = self.backlogs[group] = self.fairness.backlog()
        entry.band, entry.flow, entry.group, entry.backlog = self, flow, group, backlog
        backlog.add(entry)
        flow.add(entry)
        self.crowds.grew(flow)
        self.requests += 1
        self.size_bytes += entry.size_bytes
        group.queued += 1

    def gone(self, entry: Waiting) -> None:
        """It was taken out of its backlog."""
        flow, group = entry.flow, entry.group
        flow.gone(entry)
        if not flow.requests:
            del self.flows[flow.id]
            if not self.flows:
                self.crowds.empty()
        if not entry.backlog.alive:
            del self.backlogs[group]
        self.requests -= 1
        self.size_bytes -= entry.size_bytes
        group.queued -= 1

    def twin(self, groups: Mapping[Group, Group]) -> Band:
        """Another with the same queued, for looking at alone; `groups`: whose backlogs they are there."""
        made = copy(self)
        made.backlogs = {groups.get(group, group): backlog for group, backlog in self.backlogs.items()}
        made.crowds, made.drain = Crowds(self.flows), copy(self.drain)
        return made

    def retry_after_s(self, now_s: float) -> int:
        """When what is queued now should be gone; the most there is to say while nothing leaves."""
        rate = self.drain.per_s(now_s)
        if rate * RETRY_AFTER_MAX_S <= self.requests + 1:
            return RETRY_AFTER_MAX_S
        return max(RETRY_AFTER_MIN_S, ceil((self.requests + 1) / rate))


class Bands:
    """See the module."""

    def __init__(self, settings: Settings, ledgers: Ledgers) -> None:
        self._settings = settings
        self._ledgers = ledgers
        self._by_priority: dict[int, Band] = {}
        self._wanted: frozenset[int] = frozenset()
        """Priorities of the objectives there are."""
        self._swept_s = -inf
        self.all: tuple[Band, ...] = ()
        """The highest priority first."""
        self.priorities: tuple[int, ...] = ()
        self.positions: dict[Band, int] = {}
        for band in settings.bands:
            self._by_priority[band.priority] = Band(band, ledgers, made=False)
        self._by_priority.setdefault(0, Band(settings.band(0), ledgers, made=False))
        for template in (settings.default_band, settings.default_negative_band):
            if template is not None:
                fairness_of(template.fairness, ledgers)  # what is wrong with it is told now, not to a request
        self.sort()

    def full(self, band: Band, fairness_id: str, size_bytes: int, queued: Queued) -> str:
        """What a request of that size would exceed; empty: nothing. `queued`: in all bands."""
        limits = self._settings
        if limits.requests_max and queued.requests >= limits.requests_max:
            return f"{limits.requests_max} requests wait"
        if limits.size_bytes_max and queued.size_bytes + size_bytes > limits.size_bytes_max:
            return f"{limits.size_bytes_max} bytes wait"
        return band.full(fairness_id, size_bytes)

    def give_way(self, band: Band, fairness_id: str, size_bytes: int, queued: Queued) -> list[Waiting]:
        """Who goes so that a request of that size can wait in this band; `queued`: in all bands.

        Nobody where it exceeds what its flow may have, or what it would take is more than its due.
        """
        settings = self._settings
        requests = queued.requests + 1 - settings.requests_max if settings.requests_max else 0
        excess_bytes = queued.size_bytes + size_bytes - settings.size_bytes_max if settings.size_bytes_max else 0
        limits, flow = band.settings, band.flows.get(fairness_id)
        own_requests, own_bytes = (flow.requests + 1, flow.size_bytes + size_bytes) if flow is not None else (1, size_bytes)
        if (limits.flow_requests_max and own_requests > limits.flow_requests_max) or (
            limits.flow_size_bytes_max and own_bytes > limits.flow_size_bytes_max
        ):
            return []
        of_band = Excess(
            band.requests + 1 - limits.requests_max if limits.requests_max else 0,
            band.size_bytes + size_bytes - limits.size_bytes_max if limits.size_bytes_max else 0,
            own_requests,
            own_bytes,
        )
        if of_band.requests <= 0 and of_band.size_bytes <= 0:
            lower = next((each for each in reversed(self.all) if each.requests), band)
            if lower.priority < band.priority:
                return lower.crowds.give_way(Excess(requests, excess_bytes, 0, 0), among_equals=False)
        if not isinstance(band.fairness, ByFlow):
            return []
        excess = of_band._replace(requests=max(requests, of_band.requests), size_bytes=max(excess_bytes, of_band.size_bytes))
        return band.crowds.give_way(excess, among_equals=True)

    def twin(self, groups: Mapping[Group, Group]) -> Bands:
        """The same bands, of which others can be made, and old ones forgotten, unknown to this one."""
        made = copy(self)
        vars(made).update(_by_priority={priority: band.twin(groups) for priority, band in self._by_priority.items()})
        made.sort()
        return made

    def provision(self, priorities: Iterable[int], now_s: float) -> None:
        """There are objectives of these priorities: their bands are there before their requests, as usage limits go by all bands."""
        wanted = frozenset(priorities)
        if wanted == self._wanted:
            return
        self._wanted = wanted
        for priority in sorted(self._wanted, reverse=True):
            self.of(priority, now_s)

    def of(self, priority: int, now_s: float) -> Band:
        """Where a request of this priority waits."""
        band = self._by_priority.get(priority)
        if band is None:
            band = self._make(priority, now_s)
        band.used_s = now_s
        if now_s - self._swept_s >= SWEEP_S:
            self._swept_s = now_s
            self._forget(now_s)
        return band

    def _make(self, priority: int, now_s: float) -> Band:
        self._forget(now_s)
        if len(self._by_priority) >= BANDS_MAX:
            return self._nearest(priority)
        band = self._by_priority[priority] = Band(self._settings.band(priority), self._ledgers, made=True)
        self.sort()
        return band

    def _nearest(self, priority: int) -> Band:
        side = [each for each in self.priorities if (each < 0) == (priority < 0)] or list(self.priorities)
        lower = next((each for each in side if each < priority), None)
        return self._by_priority[lower if lower is not None else side[-1]]

    def _forget(self, now_s: float) -> None:
        idle = [
            priority
            for priority, band in self._by_priority.items()
            if band.made and not band.requests and priority not in self._wanted and now_s - band.used_s > IDLE_MAX_S
        ]
        for priority in idle:
            del self._by_priority[priority]
        if idle:
            self.sort()

    def sort(self) -> None:
        self.priorities = tuple(sorted(self._by_priority, reverse=True))
        self.all = tuple(self._by_priority[priority] for priority in self.priorities)
        self.positions = {band: position for position, band in enumerate(self.all)}
