"""dcgm-data-source and dcgm-extractor: how busy each endpoint's GPUs are, by NVIDIA's DCGM exporter. Accepted, not read yet."""

from __future__ import annotations

import logging
from typing import Annotated, ClassVar, Literal

import msgspec

from epp.config.units import OptionalDuration, duration_s
from epp.plugins.base import Context, Plugin

_log = logging.getLogger(__name__)

Stability = Literal["beta", "alpha"]


class DcgmDataSource(Plugin):
    """Where each endpoint's exporter is: in its pod, or (useNodeAddress) on its node. Accepted and checked; this version does not ask it."""

    type: ClassVar[str] = "dcgm-data-source"
    roles: ClassVar[tuple[str, ...]] = ("data-source",)
    stability: ClassVar[Stability] = "alpha"

    scheme: Literal["http", "https"] = "http"
    path: Annotated[str, msgspec.Meta(min_length=1)] = "/metrics"
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 9400
    insecure_skip_verify: bool = False
    use_node_address: bool = False
    interval: OptionalDuration = ""

    def __post_init__(self) -> None:
        self.__dict__["_interval_s"] = duration_s(self.interval) if self.interval else 0.0

    def bind(self, _context: Context) -> None:
        _log.warning("dcgm-data-source is not read by this version: GPUUtilization is not known of any endpoint")

    @property
    def interval_s(self) -> float:
        """0: not given."""
        seconds: float = self.__dict__["_interval_s"]
        return seconds


class DcgmExtractor(Plugin):
    """Attribute `GPUUtilization` = max over the endpoint's GPUs of DCGM_FI_DEV_GPU_UTIL, / 100. Accepted; see dcgm-data-source."""

    type: ClassVar[str] = "dcgm-extractor"
    roles: ClassVar[tuple[str, ...]] = ("extractor",)
    stability: ClassVar[Stability] = "alpha"
