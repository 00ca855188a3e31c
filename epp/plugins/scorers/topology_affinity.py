"""topology-affinity-scorer: near the endpoint that does the other stage of the request, for KV blocks travel between the two.

Computed once per peer and set of candidates and kept; a request costs a look-up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from epp.plugins.topology import Topology
from epp.types import Endpoint, LLMRequest

SCORES = (1.0, 0.2, 0.05, 0.02)
"""Of sharing a level, nearest first. Shaped by the bandwidth there is at that level."""


class TopologyAffinityScorer(Topology[Sequence[float]]):
    """1.0 on the peer's host, 0.2 in its rack, 0.05 in its zone, 0.02 in its region, else 0; 0 for all where there is no peer.

    hostname, rack, zone, region: the labels that tell them; empty: those of the topology-extractor (the one named
    topologyProducerName, else any), else kubernetes.io/hostname and topology.kubernetes.io/rack|zone|region. A level neither has
    is not shared.
    """

    type: ClassVar[str] = "topology-affinity-scorer"
    per_request: ClassVar[bool] = True

    def score(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
        return self.kept_for_peer(request, endpoints) or [0.0] * len(endpoints)

    def near(self, peer: Endpoint, endpoints: Sequence[Endpoint]) -> Sequence[float]:
        levels = zip(self.labels, SCORES, strict=True)
        shared = [(label, peer.labels[label], score) for label, score in levels if peer.labels.get(label)]
        return [next((score for label, value, score in shared if e.labels.get(label) == value), 0.0) for e in endpoints]
