"""models-data-source and models-data-extractor: which models each endpoint serves."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec

from epp.config.units import OptionalDuration, duration_s
from epp.plugins.base import Plugin


class ModelsDataSource(Plugin):
    """The list of models an OpenAI-compatible server gives. Accepted and checked; every endpoint is asked without it (--check-models), at
    http://host:port/v1/models every 10 s, and these parameters change nothing about that.
    """

    type: ClassVar[str] = "models-data-source"
    roles: ClassVar[tuple[str, ...]] = ("data-source",)

    scheme: Literal["http", "https"] = "http"
    path: Annotated[str, msgspec.Meta(min_length=1)] = "/v1/models"
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


class ModelsDataExtractor(Plugin):
    """The ids and parents of the models in that list."""

    type: ClassVar[str] = "models-data-extractor"
    roles: ClassVar[tuple[str, ...]] = ("extractor",)
