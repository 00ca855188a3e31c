"""Where endpoints are, by their labels: host, rack, zone, region. What the topology plugins share.

What is near an endpoint is computed once per endpoint and set of candidates, and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Generic, Literal, TypeVar

from epp.plugins.base import Context, Plugin
from epp.types import Endpoint, LLMRequest

PEER = "peer-endpoint"
"""Request attribute: the endpoint the profile handler chose for the other stage."""
EXTRACTOR = "topology-extractor"
LEVELS = {
    "hostname": "kubernetes.io/hostname",
    "rack": "topology.kubernetes.io/rack",
    "zone": "topology.kubernetes.io/zone",
    "region": "topology.kubernetes.io/region",
}
"""Level, nearest first -> the label that tells it."""
PEERS_MAX = 64
"""Peers for whom something is kept; forgotten all at once."""

T = TypeVar("T")


class Topology(Plugin, Generic[T]):
    """Parameters hostname, rack, zone, region: the labels that tell them; empty: those of the topology-extractor, else Kubernetes' own."""

    stability: ClassVar[Literal["beta", "alpha"]] = "alpha"

    hostname: str = ""
    rack: str = ""
    zone: str = ""
    region: str = ""
    topology_producer_name: str = ""

    def __post_init__(self) -> None:
        kept: dict[Endpoint, T] = {}
        self.__dict__.update(_labels=self._labels_of(None), _of=(), _kept=kept)

    def bind(self, context: Context) -> None:
        wanted = self.topology_producer_name
        extractors = [plugin for plugin in context.plugins.values() if plugin.type == EXTRACTOR and wanted in ("", plugin.name)]
        if wanted and not extractors:
            raise ValueError(f"topologyProducerName: no {EXTRACTOR} is named {wanted!r}")
        self.__dict__["_labels"] = self._labels_of(extractors[0] if extractors else None)

    @property
    def labels(self) -> Sequence[str]:
        """One per level, nearest first."""
        labels: Sequence[str] = self.__dict__["_labels"]
        return labels

    def near(self, peer: Endpoint, endpoints: Sequence[Endpoint]) -> T:
        """What is to be kept about these endpoints for this peer."""
        raise NotImplementedError

    def kept_for_peer(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> T | None:
        """`near` of the request's peer; None where it has none."""
        peer = request.attributes.get(PEER)
        if not isinstance(peer, Endpoint):
            return None
        state = self.__dict__
        kept: dict[Endpoint, T] = state["_kept"]
        if state["_of"] is not endpoints or not isinstance(endpoints, tuple) or len(kept) >= PEERS_MAX:
            kept.clear()  # a snapshot's tuple is made anew when a label changes
            state["_of"] = endpoints
        if peer not in kept:
            kept[peer] = self.near(peer, endpoints)
        return kept[peer]

    def _labels_of(self, extractor: Plugin | None) -> Sequence[str]:
        return [getattr(self, level) or getattr(extractor, level, "") or label for level, label in LEVELS.items()]
