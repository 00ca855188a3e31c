"""topology-extractor: where each endpoint is."""

from __future__ import annotations

from typing import ClassVar, Literal

from epp.plugins.base import Plugin


class TopologyExtractor(Plugin):
    """Which labels of an endpoint tell its host, rack, zone and region; empty: the usual one of Kubernetes."""

    type: ClassVar[str] = "topology-extractor"
    roles: ClassVar[tuple[str, ...]] = ("extractor",)
    stability: ClassVar[Literal["beta", "alpha"]] = "alpha"

    hostname: str = "kubernetes.io/hostname"
    rack: str = "topology.kubernetes.io/rack"
    zone: str = "topology.kubernetes.io/zone"
    region: str = "topology.kubernetes.io/region"

    def __post_init__(self) -> None:
        self.hostname = self.hostname or "kubernetes.io/hostname"
        self.rack = self.rack or "topology.kubernetes.io/rack"
        self.zone = self.zone or "topology.kubernetes.io/zone"
        self.region = self.region or "topology.kubernetes.io/region"
