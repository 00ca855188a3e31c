"""topology-affinity-filter: near the endpoint that does the other stage of the request, for KV blocks travel between the two.

Computed once per peer and set of candidates and kept; a request costs a look-up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from epp.plugins.topology import Topology
from epp.types import Endpoint, LLMRequest

NEARER = {"host": 1, "rack": 2, "zone": 3, "region": 4}
"""minAffinity -> how many levels are near enough."""


class TopologyAffinityFilter(Topology[Sequence[Endpoint]]):
    """Keeps endpoints that share the peer's minAffinity (host, rack, zone or region) or something nearer.

    All stay where there is no peer, or nobody is near enough. hostname, rack, zone, region: the labels that tell them; empty: those of
    the topology-extractor (the one named topologyProducerName, else any), else kubernetes.io/hostname and
    topology.kubernetes.io/rack|zone|region. A level neither has is not shared.
    """

    type: ClassVar[str] = "topology-affinity-filter"

    min_affinity: Literal["host", "rack", "zone", "region"] = "host"

    def keep(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[Endpoint]:
        return self.kept_for_peer(request, endpoints) or endpoints

    def near(self, peer: Endpoint, endpoints: Sequence[Endpoint]) -> Sequence[Endpoint]:
        near_enough = self.labels[: NEARER[self.min_affinity]]
        shared = [(label, peer.labels[label]) for label in near_enough if peer.labels.get(label)]
        return [e for e in endpoints if any(e.labels.get(label) == value for label, value in shared)]
