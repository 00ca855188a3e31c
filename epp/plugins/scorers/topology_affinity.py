"""topology-affinity-scorer: near the endpoint that does the other stage of the request, for KV blocks travel between the two.

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
SCORES: Mapping[str, tuple[str, float]] = {
    "hostname": ("kubernetes.io/hostname", 1.0),
    "rack": ("topology.kubernetes.io/rack", 0.2),
    "zone": ("topology.kubernetes.io/zone", 0.05),
    "region": ("topology.kubernetes.io/region", 0.02),
}
"""Level, nearest first -> the label that tells it, what sharing it scores. Shaped by the bandwidth there is at that level."""
PEERS_MAX = 64
"""Peers whose scores are kept; forgotten all at once."""


class TopologyAffinityScorer(Plugin):
    """1.0 on the peer's host, 0.2 in its rack, 0.05 in its zone, 0.02 in its region, else 0; 0 for all where there is no peer.

    hostname, rack, zone, region: the labels that tell them; empty: those of the topology-extractor (the one named
    topologyProducerName, else any), else kubernetes.io/hostname and topology.kubernetes.io/rack|zone|region. A level neither has
    is not shared.
    """

    type: ClassVar[str] = "topology-affinity-scorer"
    stability: ClassVar[Literal["beta", "alpha"]] = "alpha"
    per_request: ClassVar[bool] = True

    hostname: str = ""
    rack: str = ""
    zone: str = ""
    region: str = ""
    topology_producer_name: str = ""

    def __post_init__(self) -> None:
        kept: dict[Endpoint, Sequence[float]] = {}
        self.__dict__.update(_levels=self._labels(None), _of=(), _kept=kept)

    def bind(self, context: Context) -> None:
        wanted = self.topology_producer_name
        extractors = [plugin for plugin in context.plugins.values() if plugin.type == EXTRACTOR and wanted in ("", plugin.name)]
        if wanted and not extractors:
            raise ValueError(f"topologyProducerName: no {EXTRACTOR} is named {wanted!r}")
        self.__dict__["_levels"] = self._labels(extractors[0] if extractors else None)

    def score(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
        peer = request.attributes.get(PEER)
        if not isinstance(peer, Endpoint):
            return [0.0] * len(endpoints)
        state = self.__dict__
        kept: dict[Endpoint, Sequence[float]] = state["_kept"]
        if state["_of"] is not endpoints or not isinstance(endpoints, tuple) or len(kept) >= PEERS_MAX:
            kept.clear()  # a snapshot's tuple is made anew when a label changes
            state["_of"] = endpoints
        if peer not in kept:
            kept[peer] = self._scores(peer, endpoints)
        return kept[peer]

    def _scores(self, peer: Endpoint, endpoints: Sequence[Endpoint]) -> Sequence[float]:
        levels: Sequence[tuple[str, float]] = self.__dict__["_levels"]
        shared = [(label, peer.labels[label], score) for label, score in levels if peer.labels.get(label)]
        return [next((score for label, value, score in shared if e.labels.get(label) == value), 0.0) for e in endpoints]

    def _labels(self, extractor: Plugin | None) -> Sequence[tuple[str, float]]:
        return [(getattr(self, level) or getattr(extractor, level, "") or label, score) for level, (label, score) in SCORES.items()]
