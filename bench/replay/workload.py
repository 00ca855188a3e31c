"""What is asked of the pool, and what happens to the pool meanwhile. Made by a trace or a scenario, once per seed; a policy never sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from bench.replay.adapters import Adapters


class Arrival(NamedTuple):
    """One request. `blocks` are ids of its 512-token prefix blocks, the last one may be partly filled; equal ids are equal content."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: Sequence[int]
    adapter: str = ""
    turns: tuple[Arrival, ...] = ()
    """Sent one after the other once this one is answered (agents): each one's `at_s` is its pause after the answer before."""
    tenant: str = ""
    """Its fairness id."""
    priority: int = 0
    """Of its objective."""


class Incident(NamedTuple):
    """Something that happens to replica `replica` at `at_s`."""

    at_s: float
    replica: int
    kind: Literal["join", "leave", "down", "up", "speed", "failing"]
    """`join`: a new one becomes part of the pool. `leave`: the pool loses it in an orderly way. `down`: its process dies, connections are
    refused; `up`: it is back, its cache empty. `speed`: it runs at `value` times the profile's speed. `failing`: `value` 1: it answers 500."""
    value: float = 0.0


@dataclass(frozen=True)
class Workload:
    """Arrivals in order of time, and everything about the pool that belongs to the experiment."""

    name: str
    arrivals: Sequence[Arrival]
    incidents: Sequence[Incident] = ()
    absent: frozenset[int] = frozenset()
    """Replicas that are not there at the start."""
    speeds: Sequence[float] = ()
    """By replica; 1 for those not named."""
    adapters: Adapters | None = None
    notes: Mapping[str, object] = field(default_factory=dict)

    def faster(self, rate: float) -> Workload:
        """Arrivals `rate` times as dense; pauses and incidents keep their place in the sequence of arrivals."""
        if rate == 1:
            return self
        return replace(
            self,
            arrivals=[arrival._replace(at_s=arrival.at_s / rate) for arrival in self.arrivals],
            incidents=[incident._replace(at_s=incident.at_s / rate) for incident in self.incidents],
        )

    @property
    def requests(self) -> int:
        return sum(1 + len(arrival.turns) for arrival in self.arrivals)
