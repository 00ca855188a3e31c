"""What the configuration's data layer says of engines, in the scraper's terms: how to ask, and which metrics mean what.

`metrics-data-source` gives scheme, path and port; `core-metrics-extractor` names engines by a pod label and brings mappings of its own.
Without either, engines are asked where their family has its metrics, and told apart by what they answer. Not here: asking (fetch, scraper).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import msgspec

from epp.engines.access import FetchOptions
from epp.engines.custom import CustomFamily
from epp.engines.detect import engine_label, family_for, family_named
from epp.engines.family import EngineFamily
from epp.plugins.base import Plugin
from epp.plugins.data_layer.core_metrics_extractor import CoreMetricsExtractor
from epp.plugins.data_layer.metrics_data_source import MetricsDataSource
from epp.types import Endpoint

UNKNOWN_LABELS_TOLD_MAX = 100

_log = logging.getLogger(__name__)


def fetch_options(plugins: Mapping[str, Plugin], bearer_token_file: str = "") -> FetchOptions:
    """As the `metrics-data-source` says; its default path means: where the family has it. Raises ValueError."""
    source = next((plugin for plugin in plugins.values() if isinstance(plugin, MetricsDataSource)), None)
    if source is None:
        return FetchOptions(bearer_token_file=bearer_token_file)
    default_path = next(field.default for field in msgspec.structs.fields(MetricsDataSource) if field.name == "path")
    return FetchOptions(
        scheme=source.scheme,
        path="" if source.path == default_path else source.path,
        port=source.port,
        ca_path=source.ca_cert_path,
        insecure_skip_verify=source.insecure_skip_verify,
        client_cert_path=source.client_cert_path,
        client_key_path=source.client_key_path,
        bearer_token_file=bearer_token_file,
    )


def interval_s(plugins: Mapping[str, Plugin], default_s: float) -> float:
    """Between two readings of a busy engine, as the `metrics-data-source` says."""
    source = next((plugin for plugin in plugins.values() if isinstance(plugin, MetricsDataSource)), None)
    return source.interval_s or default_s if source is not None else default_s


class Families:
    """Finds the family of an endpoint, by its label or by what it answers."""

    def __init__(self, plugins: Mapping[str, Plugin]) -> None:
        """Raises ValueError for a mapping that can't be used."""
        extractor = (
            next((plugin for plugin in plugins.values() if isinstance(plugin, CoreMetricsExtractor)), None) or CoreMetricsExtractor()
        )
        self._label_key = extractor.engine_label_key
        self._default = extractor.default_engine
        self._custom: dict[str, EngineFamily] = {}
        for config in extractor.engine_configs:
            self._custom[config.name] = CustomFamily(msgspec.to_builtins(config))
        self._told: set[str] = set()

    def family(self, endpoint: Endpoint, text: bytes) -> EngineFamily | None:
        return family_for(self._label(endpoint), text, self._custom)

    def paths(self, endpoint: Endpoint) -> Iterable[str]:
        """Where an endpoint of this label has its metrics; empty if the label does not tell."""
        label = self._label(endpoint)
        family = family_named(label, self._custom)
        if family is None and label and label not in self._told and len(self._told) < UNKNOWN_LABELS_TOLD_MAX:
            self._told.add(label)
            _log.warning("unknown engine type; told by its metrics instead", extra={"fields": {"endpoint": endpoint.name, "type": label}})
        return family.paths if family is not None else ()

    def _label(self, endpoint: Endpoint) -> str:
        return engine_label(endpoint.labels, self._label_key) or self._default
