"""metrics-data-source: where each endpoint's metrics are read, and how."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec

from epp.config.units import OptionalDuration, duration_s
from epp.plugins.base import Plugin


class MetricsDataSource(Plugin):
    """GET scheme://host:port/path of every endpoint, every interval (left open: as --refresh-metrics-interval says).

    port 0: the endpoint's own; path /metrics: where the engine's family has it. For https: caCertPath, clientCertPath with clientKeyPath;
    certificates are verified unless insecureSkipVerify says not to (the reference picker's default is not to).
    """

    type: ClassVar[str] = "metrics-data-source"
    roles: ClassVar[tuple[str, ...]] = ("data-source",)

    scheme: Literal["http", "https"] = "http"
    path: Annotated[str, msgspec.Meta(min_length=1)] = "/metrics"
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    insecure_skip_verify: bool = False
    ca_cert_path: str = ""
    client_cert_path: str = ""
    client_key_path: str = ""
    interval: OptionalDuration = ""

    def __post_init__(self) -> None:
        if bool(self.client_cert_path) != bool(self.client_key_path):
            raise ValueError("clientCertPath and clientKeyPath belong together")
        self.__dict__["_interval_s"] = duration_s(self.interval) if self.interval else 0.0

    @property
    def interval_s(self) -> float:
        """0: not given."""
        seconds: float = self.__dict__["_interval_s"]
        return seconds
