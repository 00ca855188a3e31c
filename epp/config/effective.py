"""A configuration written out again with every default filled in: what really runs, and a start for one's own file.

What comes out is an EndpointPickerConfig that loads as the same thing; deprecated fields come out in their current form.
"""

from __future__ import annotations

from typing import Any

import yaml

from epp.config import quantities
from epp.config.catalogue import Catalogue
from epp.config.defaults import resolve_defaults
from epp.config.schema import API_VERSION, DataLayer, EndpointPickerConfig, FlowControl, PluginSpec, PriorityBand, SchedulingProfile


def effective(config: EndpointPickerConfig, catalogue: Catalogue) -> dict[str, Any]:
    """The document, complete: `resolve_defaults` and every field that has a value."""
    config = resolve_defaults(config, catalogue)
    scorers = {spec.name for spec in config.plugins if "scorer" in catalogue.role(spec.type)}
    document: dict[str, Any] = {
        "apiVersion": API_VERSION,
        "kind": config.kind,
        "featureGates": [f"{name}={str(on).lower()}" for name, on in config.feature_gates.items()],
        "plugins": [_plugin(spec) for spec in config.plugins],
        "schedulingProfiles": [_profile(profile, scorers) for profile in config.scheduling_profiles],
        "dataLayer": _data_layer(config.data_layer),
    }
    if config.request_handler.parsers:
        document["requestHandler"] = {"parsers": [{"pluginRef": ref} for ref in config.request_handler.parsers]}
    return document | {"flowControl": _flow_control(config.flow_control)}


def to_yaml(config: EndpointPickerConfig, catalogue: Catalogue) -> str:
    return yaml.dump(effective(config, catalogue), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - PyYAML's own signature
        """Write values that happen to be the same object out in full: an anchor would puzzle the reader."""
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """PyYAML's plain style loses some line breaks and control characters: those are escaped."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _text)


def _plugin(spec: PluginSpec) -> dict[str, Any]:
    document: dict[str, Any] = {} if spec.name == spec.type else {"name": spec.name}
    document["type"] = spec.type
    if spec.parameters:
        document["parameters"] = spec.parameters
    return document


def _profile(profile: SchedulingProfile, scorers: set[str]) -> dict[str, Any]:
    members = []
    for member in profile.plugins:
        weight = int(member.weight) if member.weight.is_integer() else member.weight
        members.append({"pluginRef": member.plugin_ref} | ({"weight": weight} if member.plugin_ref in scorers else {}))
    return {"name": profile.name, "plugins": members}


def _data_layer(data_layer: DataLayer) -> dict[str, Any]:
    document: dict[str, Any] = {"injectDefaults": data_layer.inject_defaults}
    if data_layer.sources:
        document["sources"] = [
            {"pluginRef": source.plugin_ref, "extractors": [{"pluginRef": ref} for ref in source.extractors]}
            for source in data_layer.sources
        ]
    if data_layer.discovery:
        document["discovery"] = {"pluginRef": data_layer.discovery}
    if data_layer.peer_discovery:
        document["peerDiscovery"] = {"pluginRef": data_layer.peer_discovery}
    if data_layer.cross_replica_syncer:
        document["crossReplicaSyncerPluginRef"] = data_layer.cross_replica_syncer
    return document | {"crossReplicaSyncInterval": quantities.duration_text(data_layer.cross_replica_sync_interval_s)}


def _flow_control(flow_control: FlowControl) -> dict[str, Any]:
    document: dict[str, Any] = {
        "maxBytes": _bytes(flow_control.bytes_max),
        "maxRequests": flow_control.requests_max,
        "defaultRequestTTL": quantities.duration_text(flow_control.default_request_ttl_s),
        "noEndpointRequestTTL": quantities.duration_text(flow_control.no_endpoint_request_ttl_s),
        "defaultPriorityBand": _band(flow_control.default_priority_band),
    }
    if flow_control.default_negative_priority_band is not None:
        document["defaultNegativePriorityBand"] = _band(flow_control.default_negative_priority_band)
    if flow_control.priority_bands:
        document["priorityBands"] = [_band(band) for band in flow_control.priority_bands]
    return document | {
        "usageLimitPolicyPluginRef": flow_control.usage_limit_policy,
        "saturationDetector": {"pluginRef": flow_control.saturation_detector},
        "enableEviction": flow_control.enable_eviction,
    }


def _band(band: PriorityBand) -> dict[str, Any]:
    return (
        {
            "priority": band.priority,
            "maxBytes": _bytes(band.bytes_max),
            "maxRequests": band.requests_max,
            "fairnessPolicyRef": band.fairness_policy,
            "orderingPolicyRef": band.ordering_policy,
        }
        | ({"maxBytesPerFlow": _bytes(band.flow_bytes_max)} if band.flow_bytes_max else {})
        | ({"maxRequestsPerFlow": band.flow_requests_max} if band.flow_requests_max else {})
        | ({"requestTTL": quantities.duration_text(band.ttl_s)} if band.ttl_s is not None else {})
    )


def _bytes(count: int) -> int | str:
    text = quantities.quantity_text(count)
    return count if text == str(count) else text
