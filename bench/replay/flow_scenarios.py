"""What flow control is for, each in a workload: tenants of unequal appetite, one tenant that matters more, a burst onto nobody.

Everybody sends the same kind of request, so that who gets what is a matter of flow control alone. Loads are shares of what the pool serves
when it is full (`SERVED_PER_S` a replica, measured by the replay itself: what it serves of an endless queue). Not here: the figures (flow).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from bench.replay.scenarios import Setting
from bench.replay.workload import Arrival, Incident, Workload

DURATION_S = 180.0
PROMPT_TOKENS, OUTPUT_TOKENS = 3_000, 120
"""Medians. Prompts share nothing: what is cached where plays no part."""
SERVED_PER_S = 3.9
"""Requests of that kind a replica of the reference profile serves when it always has some."""
LIGHT, HEAVY, IMPORTANT, BATCH = "light", "heavy", "important", "batch"
PRIORITY = 10
BURST_REQUESTS = 5_000
COLD_S = 20.0
"""Until the first engine of the empty pool is there; then one every `COLD_EVERY_S`."""
COLD_EVERY_S = 2.0


def tenants(setting: Setting) -> Workload:
    """Two tenants at 10:1, the small one with 0.6 of what the pool serves: half of it is its fair share."""
    return _of(setting, "flow-tenants", [(LIGHT, 0, 0.6), (HEAVY, 0, 6.0)])


def overload(setting: Setting) -> Workload:
    """A tenant of high priority with 0.2 of what the pool serves, and one without with 1.8: twice as much as can be served."""
    return _of(setting, "flow-priority", [(IMPORTANT, PRIORITY, 0.2), (BATCH, 0, 1.8)])


def alone(setting: Setting) -> Workload:
    """The tenant of high priority of flow-priority, the same requests at the same times, and nobody else."""
    return _of(setting, "flow-alone", [(IMPORTANT, PRIORITY, 0.2)])


def cold_burst(setting: Setting) -> Workload:
    """5 000 requests in one second, to a pool that has no endpoint yet: scaled to zero, the engines come one after the other."""
    rng, replicas = setting.rng, range(setting.replicas)
    arrivals = [_request(setting, rng.random(), "", 0) for _ in range(BURST_REQUESTS)]
    incidents = tuple(Incident(COLD_S + COLD_EVERY_S * replica, replica, "join") for replica in replicas)
    return Workload("flow-cold-burst", sorted(arrivals, key=_at_s), incidents, absent=frozenset(replicas))


def _of(setting: Setting, name: str, senders: Sequence[tuple[str, int, float]]) -> Workload:
    arrivals = [_request(setting, at_s, tenant, priority) for tenant, priority, share in senders for at_s in _times(setting, share)]
    return Workload(name, sorted(arrivals, key=_at_s))


def _times(setting: Setting, share: float) -> Iterator[float]:
    return setting.times(share * SERVED_PER_S, end_s=DURATION_S)


def _request(setting: Setting, at_s: float, tenant: str, priority: int) -> Arrival:
    tokens, blocks = setting.blocks((None, setting.lognormal(PROMPT_TOKENS, 0.5, 256, 16_000)))
    return Arrival(at_s, tokens, setting.lognormal(OUTPUT_TOKENS, 0.5, 8, 1_000), blocks, tenant=tenant, priority=priority)


def _at_s(arrival: Arrival) -> float:
    return arrival.at_s


FLOW_SCENARIOS: Mapping[str, Callable[[Setting], Workload]] = {
    "tenants": tenants,
    "priority": overload,
    "alone": alone,
    "cold-burst": cold_burst,
}
