"""The blocks `dataLayer`, `requestHandler` and `flowControl` of a configuration, read and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from epp.config.references import References
from epp.config.schema import DEFAULT_DETECTOR, DataLayer, DataLayerSource, FlowControl, PriorityBand, RequestHandler
from epp.config.walk import Walk

_DATA_LAYER = (
    "injectDefaults",
    "sources",
    "discovery",
    "peerDiscovery",
    "crossReplicaSyncerPluginRef",
    "crossReplicaSyncInterval",
)
_FLOW_CONTROL = (
    "maxBytes",
    "maxRequests",
    "defaultRequestTTL",
    "noEndpointRequestTTL",
    "defaultPriorityBand",
    "defaultNegativePriorityBand",
    "priorityBands",
    "usageLimitPolicyPluginRef",
    "saturationDetector",
    "enableEviction",
)
_BAND = (
    "priority",
    "maxBytes",
    "maxRequests",
    "maxBytesPerFlow",
    "maxRequestsPerFlow",
    "requestTTL",
    "fairnessPolicyRef",
    "orderingPolicyRef",
)


def data_layer(walk: Walk, value: Any, refs: References) -> DataLayer:
    fields = _block(walk, value, "dataLayer", _DATA_LAYER)
    syncer = walk.text(fields.get("crossReplicaSyncerPluginRef"), "dataLayer.crossReplicaSyncerPluginRef")
    refs.check(syncer, "dataLayer.crossReplicaSyncerPluginRef", "cross-replica-syncer")
    default = DataLayer()
    return DataLayer(
        inject_defaults=walk.boolean(fields.get("injectDefaults"), "dataLayer.injectDefaults", default.inject_defaults),
        sources=tuple(
            _source(walk, item, f"dataLayer.sources[{i}]", refs)
            for i, item in enumerate(walk.items(fields.get("sources"), "dataLayer.sources"))
        ),
        discovery=_optional_ref(walk, fields, "discovery", refs, "discovery"),
        peer_discovery=_optional_ref(walk, fields, "peerDiscovery", refs, "peer-discovery"),
        cross_replica_syncer=syncer,
        cross_replica_sync_interval_s=walk.duration_s(
            fields.get("crossReplicaSyncInterval"), "dataLayer.crossReplicaSyncInterval", default.cross_replica_sync_interval_s
        ),
    )


def request_handler(walk: Walk, value: Any, old_parser: Any, refs: References) -> RequestHandler:
    """`old_parser`: the deprecated top-level field, which counts where the new one is not written."""
    fields = _block(walk, value, "requestHandler", ("parsers",))
    items = walk.items(fields.get("parsers"), "requestHandler.parsers")
    parsers = [_plugin_ref(walk, item, f"requestHandler.parsers[{i}]", refs, "parser") for i, item in enumerate(items)]
    if old_parser is not None:
        walk.warn("parser", f"is deprecated; write requestHandler.parsers{', which counts here' if items else ''}")
        if not items:
            parsers = [_plugin_ref(walk, old_parser, "parser", refs, "parser")]
    return RequestHandler(parsers=tuple(filter(None, parsers)))


def flow_control(walk: Walk, value: Any, old_detector: Any, refs: References, *, gate: bool | None) -> FlowControl:
    """`old_detector`: the deprecated top-level field, which counts where the new one is not written. `gate`: None where it is not written.

    With the gate off the reference picker never looks at policies and bands: what is wrong with them is a warning then, not a fault.
    """
    fields = _block(walk, value, "flowControl", _FLOW_CONTROL)
    default = FlowControl()

    said: list[str] = []

    def unused(path: str, message: str) -> None:
        said.append(path)
        walk.warn(path, f"{message} (without effect: the gate flowControl is off)")

    report = walk.fault if gate else unused
    bands = _bands(walk, fields.get("priorityBands"), refs, report)
    usage_limit = walk.text(fields.get("usageLimitPolicyPluginRef"), "flowControl.usageLimitPolicyPluginRef") or default.usage_limit_policy
    refs.check(usage_limit, "flowControl.usageLimitPolicyPluginRef", "usage-limit-policy", report=report)
    ttl_s = walk.duration_s(fields.get("defaultRequestTTL"), "flowControl.defaultRequestTTL", default.default_request_ttl_s)
    band = _band(walk, fields.get("defaultPriorityBand"), "flowControl.defaultPriorityBand", refs, report)
    negative = None
    if "defaultNegativePriorityBand" in fields:
        negative = _band(walk, fields["defaultNegativePriorityBand"], "flowControl.defaultNegativePriorityBand", refs, report)
    found = FlowControl(
        bytes_max=walk.quantity(fields.get("maxBytes"), "flowControl.maxBytes", default.bytes_max),
        requests_max=walk.quantity(fields.get("maxRequests"), "flowControl.maxRequests", default.requests_max),
        default_request_ttl_s=ttl_s,
        no_endpoint_request_ttl_s=walk.duration_s(fields.get("noEndpointRequestTTL"), "flowControl.noEndpointRequestTTL", ttl_s),
        default_priority_band=band,
        default_negative_priority_band=negative,
        priority_bands=bands,
        usage_limit_policy=usage_limit,
        saturation_detector=_detector(walk, fields.get("saturationDetector"), old_detector, refs),
        enable_eviction=walk.boolean(fields.get("enableEviction"), "flowControl.enableEviction", default.enable_eviction),
    )
    if not (gate or said) and msgspec.structs.replace(found, saturation_detector=default.saturation_detector) != default:
        why = "the gate flowControl is off" if gate is False else "it does with featureGates: [flowControl=true]"
        walk.warn("flowControl", f"nothing of it but saturationDetector has an effect: {why}")
    return found


def _detector(walk: Walk, value: Any, old: Any, refs: References) -> str:
    path = "flowControl.saturationDetector"
    if old is not None:
        walk.warn("saturationDetector", f"is deprecated; write {path}{', which counts here' if value is not None else ''}")
        if value is None:
            path, value = "saturationDetector", old
    fields = _block(walk, value, path, ("pluginRef",))
    ref = walk.text(fields.get("pluginRef", DEFAULT_DETECTOR), f"{path}.pluginRef", required=True)
    refs.check(ref, f"{path}.pluginRef", "detector")
    return ref


def _bands(walk: Walk, value: Any, refs: References, report: Callable[[str, str], None]) -> tuple[PriorityBand, ...]:
    bands: dict[int, tuple[str, PriorityBand]] = {}
    for i, item in enumerate(walk.items(value, "flowControl.priorityBands")):
        path = f"flowControl.priorityBands[{i}]"
        band = _band(walk, item, path, refs, report)
        if band.priority in bands:
            report(f"{path}.priority", f"{band.priority} has a band already, {bands[band.priority][0]}")
        bands.setdefault(band.priority, (path, band))
    return tuple(band for _, band in bands.values())


def _band(walk: Walk, value: Any, path: str, refs: References, report: Callable[[str, str], None]) -> PriorityBand:
    fields = _block(walk, value, path, _BAND)
    default = PriorityBand()
    fairness = walk.text(fields.get("fairnessPolicyRef"), f"{path}.fairnessPolicyRef") or default.fairness_policy
    ordering = walk.text(fields.get("orderingPolicyRef"), f"{path}.orderingPolicyRef") or default.ordering_policy
    refs.check(fairness, f"{path}.fairnessPolicyRef", "fairness-policy", report=report)
    refs.check(ordering, f"{path}.orderingPolicyRef", "ordering-policy", report=report)
    return PriorityBand(
        priority=walk.integer(fields.get("priority"), f"{path}.priority", default.priority),
        bytes_max=walk.quantity(fields.get("maxBytes"), f"{path}.maxBytes", default.bytes_max) or default.bytes_max,
        requests_max=walk.quantity(fields.get("maxRequests"), f"{path}.maxRequests", default.requests_max) or default.requests_max,
        flow_bytes_max=walk.quantity(fields.get("maxBytesPerFlow"), f"{path}.maxBytesPerFlow", 0),
        flow_requests_max=walk.quantity(fields.get("maxRequestsPerFlow"), f"{path}.maxRequestsPerFlow", 0),
        ttl_s=walk.duration_s(fields["requestTTL"], f"{path}.requestTTL", 0.0) if "requestTTL" in fields else None,
        fairness_policy=fairness,
        ordering_policy=ordering,
    )


def _source(walk: Walk, value: Any, path: str, refs: References) -> DataLayerSource:
    fields = walk.mapping(value, path, ("pluginRef", "extractors"))
    ref = walk.text(fields.get("pluginRef"), f"{path}.pluginRef", required=isinstance(value, Mapping))
    refs.check(ref, f"{path}.pluginRef", "data-source")
    items = walk.items(fields.get("extractors"), f"{path}.extractors")
    extractors = [_plugin_ref(walk, item, f"{path}.extractors[{i}]", refs, "extractor") for i, item in enumerate(items)]
    return DataLayerSource(plugin_ref=ref, extractors=tuple(filter(None, extractors)))


def _optional_ref(walk: Walk, fields: Mapping[str, Any], name: str, refs: References, role: str) -> str:
    return _plugin_ref(walk, fields[name], f"dataLayer.{name}", refs, role) if name in fields else ""


def _plugin_ref(walk: Walk, value: Any, path: str, refs: References, role: str) -> str:
    """The name in `{pluginRef: NAME}`."""
    fields = walk.mapping(value, path, ("pluginRef",))
    ref = walk.text(fields.get("pluginRef"), f"{path}.pluginRef", required=isinstance(value, Mapping))
    refs.check(ref, f"{path}.pluginRef", role)
    return ref


def _block(walk: Walk, value: Any, path: str, known: tuple[str, ...]) -> Mapping[str, Any]:
    return {} if value is None else walk.mapping(value, path, known)
