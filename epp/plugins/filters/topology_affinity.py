"""topology-affinity-filter: near the endpoint that does the other stage of the request, for KV blocks travel between the two.

Computed once per peer and set of candidates and kept; a request costs a look-up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from epp.plugins.base import Context, Plugin
from epp.types import Endpoint, LLMRequest

PEER = "peer-endpoint"
"""Request attribute: the endpoint the profile handler chose for the other stage."""
EXTRACTOR = "topology-extractor"
LEVELS: Mapping[str, str] = {
    "hostname": "kubernetes.io/hostname",
    "rack": "topology.kubernetes.io/rack",
    "zone": "topology.kubernetes.io/zone",
    "region": "topology.kubernetes.io/region",
}
"""Level, nearest first -> the label that tells it."""
NEARER = {"host": 1, "rack": 2, "zone": 3, "region": 4}
"""minAffinity -> how many of `LEVELS` are near enough."""
PEERS_MAX = 64
"""Peers whose neighbours are kept; forgotten all at once."""


class TopologyAffinityFilter(Plugin):
    """Keeps endpoints that share the peer's minAffinity (host, rack, zone or region) or something nearer.

    All stay where there is no peer, or nobody is near enough. hostname, rack, zone, region: the labels that tell them; empty: those of
    the topology-extractor (the one named topologyProducerName, else any), else kubernetes.io/hostname and
    topology.kubernetes.io/rack|zone|region. A level neither has is not shared.
    """

    type: ClassVar[str] = "topology-affinity-filter"
    stability: ClassVar[Literal["beta", "alpha"]] = "alpha"

    min_affinity: Literal["host", "rack", "zone", "region"] = "host"
    hostname: str = ""
    rack: str = ""
    zone: str = ""
    region: str = ""
    topology_producer_name: str = ""

    def __post_init__(self) -> None:
        kept: dict[Endpoint, Sequence[Endpoint]] = {}
        self.__dict__.update(_near=self._labels(None), _of=(), _kept=kept)

    def bind(self, context: Context) -> None:
        wanted = self.topology_producer_name
        extractors = [plugin for plugin in context.plugins.values() if plugin.type == EXTRACTOR and wanted in ("", plugin.name)]
        if wanted and not extractors:
            raise ValueError(f"topologyProducerName: no {EXTRACTOR} is named {wanted!r}")
        self.__dict__["_near"] = self._labels(extractors[0] if extractors else None)

    def keep(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[Endpoint]:
        peer = request.attributes.get(PEER)
        if not isinstance(peer, Endpoint):
            return endpoints
        state = self.__dict__
        kept: dict[Endpoint, Sequence[Endpoint]] = state["_kept"]
        if state["_of"] is not endpoints or not isinstance(endpoints, tuple) or len(kept) >= PEERS_MAX:
            kept.clear()  # a snapshot's tuple is made anew when a label changes
            state["_of"] = endpoints
        if peer not in kept:
            kept[peer] = self._neighbours(peer, endpoints) or endpoints
        return kept[peer]

    def _neighbours(self, peer: Endpoint, endpoints: Sequence[Endpoint]) -> Sequence[Endpoint]:
        labels: Sequence[str] = self.__dict__["_near"]
        shared = [(label, peer.labels[label]) for label in labels if peer.labels.get(label)]
        return [e for e in endpoints if any(e.labels.get(label) == value for label, value in shared)]

    def _labels(self, extractor: Plugin | None) -> Sequence[str]:
        """Of the levels that are near enough."""
        labels = [getattr(self, level) or getattr(extractor, level, "") or label for level, label in LEVELS.items()]
        return labels[: NEARER[self.min_affinity]]
