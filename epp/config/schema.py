"""EndpointPickerConfig as data, once it has been found right. How text becomes this: load.

Durations are seconds, sizes bytes; a reference to a plugin is its instance name. Field defaults are what a missing field means.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

API_VERSION = "llm-d.ai/v1alpha1"
API_VERSIONS = (API_VERSION, "inference.networking.x-k8s.io/v1alpha1")
"""The second is deprecated and means the same."""
KIND = "EndpointPickerConfig"
DEFAULT_WEIGHT = 1.0

DEFAULT_DETECTOR = "utilization-detector"
DEFAULT_FAIRNESS_POLICY = "global-strict-fairness-policy"
DEFAULT_ORDERING_POLICY = "fcfs-ordering-policy"
DEFAULT_USAGE_LIMIT_POLICY = "static-usage-limit-policy"


class PluginSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One instance of a plugin. `name` is its type where none was given."""

    name: str
    type: str
    parameters: dict[str, Any] = {}


class ProfilePlugin(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A profile's use of a plugin. `weight` counts for scorers alone; on others it is accepted and means nothing."""

    plugin_ref: str
    weight: float = DEFAULT_WEIGHT


class SchedulingProfile(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    plugins: tuple[ProfilePlugin, ...] = ()


class DataLayerSource(msgspec.Struct, frozen=True, kw_only=True):
    """A data source and the extractors that get what it reads."""

    plugin_ref: str
    extractors: tuple[str, ...] = ()


class DataLayer(msgspec.Struct, frozen=True, kw_only=True):
    """Where endpoints and what is known of them come from."""

    inject_defaults: bool = True
    """Add the default metrics source and extractor if no metrics source is named."""
    sources: tuple[DataLayerSource, ...] = ()
    discovery: str = ""
    """The plugin that finds endpoints in Kubernetes' place."""
    peer_discovery: str = ""
    cross_replica_syncer: str = ""
    cross_replica_sync_interval_s: float = 0.2


class PriorityBand(msgspec.Struct, frozen=True, kw_only=True):
    """Requests of one priority while they queue: how many, and who goes first."""

    priority: int = 0
    bytes_max: int = 1_000_000_000
    requests_max: int = 5_000
    flow_bytes_max: int = 0
    """Queued of one fairness id; 0: no limit."""
    flow_requests_max: int = 0
    ttl_s: float | None = None
    """Longest wait while there are endpoints; None: the common one; 0: no limit."""
    fairness_policy: str = DEFAULT_FAIRNESS_POLICY
    ordering_policy: str = DEFAULT_ORDERING_POLICY


class FlowControl(msgspec.Struct, frozen=True, kw_only=True):
    """Queueing under saturation. All of it but the detector needs the gate `flowControl`."""

    bytes_max: int = 0
    """Of queued requests, over all bands; 0: no limit."""
    requests_max: int = 0
    """Queued, over all bands; 0: no limit."""
    default_request_ttl_s: float = 60.0
    """Longest wait while there are endpoints; 0: no limit."""
    no_endpoint_request_ttl_s: float = 60.0
    """Longest wait while there are none; 0: no limit. Where it is not written it follows the one above."""
    default_priority_band: PriorityBand = PriorityBand()
    """Template for priorities without a band of their own."""
    default_negative_priority_band: PriorityBand | None = None
    """The same for priorities below 0; None: as the others."""
    priority_bands: tuple[PriorityBand, ...] = ()
    usage_limit_policy: str = DEFAULT_USAGE_LIMIT_POLICY
    saturation_detector: str = DEFAULT_DETECTOR
    """Says how full the pool is; used without flow control too, to shed requests of negative priority."""
    enable_eviction: bool = False


class RequestHandler(msgspec.Struct, frozen=True, kw_only=True):
    parsers: tuple[str, ...] = ()
    """In order of preference; empty: all that are built in."""


class EndpointPickerConfig(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    api_version: str = API_VERSION
    kind: str = KIND
    feature_gates: dict[str, bool] = {}
    """Every known gate with its value; `flowControl` only where it is written."""
    plugins: tuple[PluginSpec, ...] = ()
    scheduling_profiles: tuple[SchedulingProfile, ...] = ()
    data_layer: DataLayer = DataLayer()
    flow_control: FlowControl = FlowControl()
    request_handler: RequestHandler = RequestHandler()
    warnings: tuple[str, ...] = ()
    """What is accepted but should be written otherwise, or has no effect; each with its path. Said once, by whoever loads."""

    @property
    def flow_control_mode(self) -> Literal["safe", "on", "off"]:
        """By the gate. Where it is not written: on, by our own count alone, whatever `flow_control` says."""
        on = self.feature_gates.get("flowControl")
        return "safe" if on is None else "on" if on else "off"

    def plugin(self, name: str) -> PluginSpec | None:
        return next((plugin for plugin in self.plugins if plugin.name == name), None)
