"""A catalogue of plugin types for tests of configuration, which is to know no plugins."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import pytest

from epp.config.load import load
from epp.config.schema import EndpointPickerConfig
from epp.errors import ConfigError, Problem

ROLES: dict[str, set[str]] = {
    "cost-aware-scorer": {"scorer"},
    "queue-scorer": {"scorer"},
    "kv-cache-utilization-scorer": {"scorer"},
    "prefix-cache-scorer": {"scorer"},
    "label-filter": {"filter"},
    "by-label": {"filter"},
    "new-filter": {"filter"},
    "max-score-picker": {"picker"},
    "random-picker": {"picker"},
    "approx-prefix-cache-producer": {"producer"},
    "single-profile-handler": {"profile-handler"},
    "disagg-profile-handler": {"profile-handler"},
    "utilization-detector": {"detector", "filter"},
    "concurrency-detector": {"detector", "filter"},
    "openai-parser": {"parser"},
    "passthrough-parser": {"parser"},
    "metrics-data-source": {"data-source"},
    "dcgm-data-source": {"data-source"},
    "core-metrics-extractor": {"extractor"},
    "dcgm-extractor": {"extractor"},
    "file-discovery": {"discovery"},
    "global-strict-fairness-policy": {"fairness-policy"},
    "round-robin-fairness-policy": {"fairness-policy"},
    "fcfs-ordering-policy": {"ordering-policy"},
    "edf-ordering-policy": {"ordering-policy"},
    "static-usage-limit-policy": {"usage-limit-policy"},
    "priority-holdback-policy": {"usage-limit-policy"},
    "token-rate-limit": {"token-rate-limit"},
}


class Shelf:
    """Types whose only parameter is `size`. `by-label` is deprecated, `new-filter` alpha."""

    def types(self) -> Collection[str]:
        return ROLES

    def problems(self, type: str, parameters: Mapping[str, Any], path: str) -> list[Problem]:  # noqa: A002
        return [Problem(f"{path}.parameters.{name}", "unknown parameter") for name in parameters if name != "size"]

    def role(self, type: str) -> set[str]:  # noqa: A002
        return ROLES.get(type, set())

    def deprecated(self, type: str) -> str:  # noqa: A002
        return "label-filter" if type == "by-label" else ""

    def stability(self, type: str) -> Literal["beta", "alpha"]:  # noqa: A002
        return "alpha" if type == "new-filter" else "beta"


HEAD = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"


def loaded(text: str, *, allow_experimental: bool = False) -> EndpointPickerConfig:
    return load(text, source="test", catalogue=Shelf(), allow_experimental=allow_experimental)


def faults(text: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        loaded(text)
    return [str(problem) for problem in raised.value.problems]
