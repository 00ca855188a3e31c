"""Which plugin types there are: the built-in ones, entry points of the group `epp.plugins`, and `module:Class` written as a type.

A type's parameters are the fields of its class; `problems` checks them all and reports every fault, which msgspec alone would not.
Code is imported only when a configuration names it, the built-in plugins' too. Not here: what plugins do (their own files), which are
used (config), how they are put together (scheduling).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

import msgspec

from epp.config.walk import join, kind, suggestion
from epp.errors import Problem
from epp.plugins.base import Plugin, PointwiseScorer, RangeScorer

ENTRY_POINT_GROUP = "epp.plugins"
ROLE_OF_METHOD = {
    "keep": "filter",
    "score": "scorer",
    "pick": "picker",
    "produce": "producer",
    "admit": "admitter",
    "schedule": "profile-handler",
    "disaggregate": "decider",
    "saturation": "detector",
    "parse": "parser",
}
_AT = re.compile(r" - at `\$(?P<at>.*)`$")


# Type -> where its class is. Deprecated names stand here too: a class says in `aliases` which of its names those are.
BUILT_IN: Mapping[str, str] = {
    # filters
    "label-selector-filter": "epp.plugins.filters.label_selector:LabelSelectorFilter",
    "by-label-selector": "epp.plugins.filters.label_selector:LabelSelectorFilter",
    "by-label": "epp.plugins.filters.by_label:ByLabelFilter",
    "decode-filter": "epp.plugins.filters.role:DecodeFilter",
    "prefill-filter": "epp.plugins.filters.role:PrefillFilter",
    "encode-filter": "epp.plugins.filters.role:EncodeFilter",
    "prefix-cache-affinity-filter": "epp.plugins.filters.prefix_cache_affinity:PrefixCacheAffinityFilter",
    "slo-headroom-tier-filter": "epp.plugins.filters.slo_headroom_tier:SloHeadroomTierFilter",
    "header-based-testing-filter": "epp.plugins.filters.header_based_testing:HeaderBasedTestingFilter",
    "session-affinity-filter": "epp.plugins.filters.session_affinity:SessionAffinityFilter",
    "endpoint-attribute-filter": "epp.plugins.filters.endpoint_attribute:EndpointAttributeFilter",
    "topology-affinity-filter": "epp.plugins.filters.topology_affinity:TopologyAffinityFilter",
    "utilization-filter": "epp.plugins.filters.utilization:UtilizationFilter",
    # scorers
    "cost-aware-scorer": "epp.plugins.scorers.cost_aware:CostAwareScorer",
    "queue-scorer": "epp.plugins.scorers.queue:QueueScorer",
    "kv-cache-utilization-scorer": "epp.plugins.scorers.kv_cache_utilization:KvCacheUtilizationScorer",
    "running-requests-size-scorer": "epp.plugins.scorers.running_requests_size:RunningRequestsSizeScorer",
    "lora-affinity-scorer": "epp.plugins.scorers.lora_affinity:LoraAffinityScorer",
    "prefix-cache-scorer": "epp.plugins.scorers.prefix_cache:PrefixCacheScorer",
    "precise-prefix-cache-scorer": "epp.plugins.scorers.precise_prefix_cache:PrecisePrefixCacheScorer",
    "token-load-scorer": "epp.plugins.scorers.token_load:TokenLoadScorer",
    "load-aware-scorer": "epp.plugins.scorers.load_aware:LoadAwareScorer",
    "active-request-scorer": "epp.plugins.scorers.active_request:ActiveRequestScorer",
    "no-hit-lru-scorer": "epp.plugins.scorers.no_hit_lru:NoHitLruScorer",
    "context-length-aware": "epp.plugins.scorers.context_length_aware:ContextLengthAware",
    "latency-scorer": "epp.plugins.scorers.latency:LatencyScorer",
    "session-affinity-scorer": "epp.plugins.scorers.session_affinity:SessionAffinityScorer",
    "header-label-affinity-scorer": "epp.plugins.scorers.header_label_affinity:HeaderLabelAffinityScorer",
    "endpoint-attribute-scorer": "epp.plugins.scorers.endpoint_attribute:EndpointAttributeScorer",
    "topology-affinity-scorer": "epp.plugins.scorers.topology_affinity:TopologyAffinityScorer",
    # pickers
    "max-score-picker": "epp.plugins.pickers.max_score:MaxScorePicker",
    "random-picker": "epp.plugins.pickers.random:RandomPicker",
    "weighted-random-picker": "epp.plugins.pickers.weighted_random:WeightedRandomPicker",
    # profile handlers
    "single-profile-handler": "epp.plugins.profile_handlers.single:SingleProfileHandler",
    "disagg-profile-handler": "epp.plugins.profile_handlers.disagg:DisaggProfileHandler",
    "pd-profile-handler": "epp.plugins.profile_handlers.pd:PdProfileHandler",
    "data-parallel-profile-handler": "epp.plugins.profile_handlers.data_parallel:DataParallelProfileHandler",
    "header-profile-handler": "epp.plugins.profile_handlers.header:HeaderProfileHandler",
    "disagg-headers-handler": "epp.plugins.profile_handlers.headers_handlers:DisaggHeadersHandler",
    "prefill-header-handler": "epp.plugins.profile_handlers.headers_handlers:DisaggHeadersHandler",
    # deciders
    "prefix-based-pd-decider": "epp.plugins.deciders.prefix_based_pd:PrefixBasedPdDecider",
    "always-disagg-pd-decider": "epp.plugins.deciders.always_disagg_pd:AlwaysDisaggPdDecider",
    "always-disagg-multimodal-decider": "epp.plugins.deciders.always_disagg_multimodal:AlwaysDisaggMultimodalDecider",
    # producers
    "approx-prefix-cache-producer": "epp.plugins.producers.approx_prefix_cache:ApproxPrefixCacheProducer",
    "precise-prefix-cache-producer": "epp.plugins.producers.precise_prefix_cache:PrecisePrefixCacheProducer",
    "inflight-load-producer": "epp.plugins.producers.inflight_load:InflightLoadProducer",
    "predicted-latency-producer": "epp.plugins.producers.predicted_latency:PredictedLatencyProducer",
    "token-producer": "epp.plugins.producers.token:TokenProducer",
    "tokenizer": "epp.plugins.producers.token:TokenProducer",
    "session-id-producer": "epp.plugins.producers.session_id:SessionIdProducer",
    "agent-identity": "epp.plugins.producers.agent_identity:AgentIdentity",
    # admitters
    "probabilistic-admitter": "epp.plugins.admitters.probabilistic:ProbabilisticAdmitter",
    "latency-slo-admitter": "epp.plugins.admitters.latency_slo:LatencySloAdmitter",
    # detectors
    "utilization-detector": "epp.plugins.detectors.utilization:UtilizationDetector",
    "concurrency-detector": "epp.plugins.detectors.concurrency:ConcurrencyDetector",
    "predicted-wait-detector": "epp.plugins.detectors.predicted_wait:PredictedWaitDetector",
    # flow control
    "api-key-identity": "epp.plugins.flow_control.tenants:ApiKeyIdentity",
    "token-rate-limit": "epp.plugins.flow_control.tenants:TokenRateLimit",
    "global-strict-fairness-policy": "epp.plugins.flow_control.policies:GlobalStrictFairnessPolicy",
    "round-robin-fairness-policy": "epp.plugins.flow_control.policies:RoundRobinFairnessPolicy",
    "program-aware-fairness": "epp.plugins.flow_control.policies:ProgramAwareFairness",
    "fcfs-ordering-policy": "epp.plugins.flow_control.policies:FcfsOrderingPolicy",
    "edf-ordering-policy": "epp.plugins.flow_control.policies:EdfOrderingPolicy",
    "slo-deadline-ordering-policy": "epp.plugins.flow_control.policies:SloDeadlineOrderingPolicy",
    "static-usage-limit-policy": "epp.plugins.flow_control.policies:StaticUsageLimitPolicy",
    "priority-holdback-policy": "epp.plugins.flow_control.policies:PriorityHoldbackPolicy",
    "soft-reflective-ceiling-policy": "epp.plugins.flow_control.policies:SoftReflectiveCeilingPolicy",
    "sheddable-eviction-filter": "epp.plugins.flow_control.policies:SheddableEvictionFilter",
    "priority-then-time-eviction-order-policy": "epp.plugins.flow_control.policies:PriorityThenTimeEvictionOrderPolicy",
    # data layer
    "metrics-data-source": "epp.plugins.data_layer.metrics_data_source:MetricsDataSource",
    "core-metrics-extractor": "epp.plugins.data_layer.core_metrics_extractor:CoreMetricsExtractor",
    "models-data-source": "epp.plugins.data_layer.models:ModelsDataSource",
    "models-data-extractor": "epp.plugins.data_layer.models:ModelsDataExtractor",
    "dcgm-data-source": "epp.plugins.data_layer.dcgm:DcgmDataSource",
    "dcgm-extractor": "epp.plugins.data_layer.dcgm:DcgmExtractor",
    "k8s-notification-source": "epp.plugins.data_layer.notifications:K8sNotificationSource",
    "endpoint-notification-source": "epp.plugins.data_layer.notifications:EndpointNotificationSource",
    "topology-extractor": "epp.plugins.data_layer.topology_extractor:TopologyExtractor",
    "file-discovery": "epp.plugins.data_layer.file_discovery:FileDiscovery",
    # reporters
    "request-attribute-reporter": "epp.plugins.reporters.request_attribute_reporter:RequestAttributeReporter",
    "destination-endpoint-served-verifier": "epp.plugins.reporters.served_verifier:DestinationEndpointServedVerifier",
    # parsers
    "openai-parser": "epp.parsing.openai:OpenAIParser",
    "anthropic-parser": "epp.parsing.anthropic:AnthropicParser",
    "vllmhttp-parser": "epp.parsing.vllm_http:VllmHttpParser",
    "sglanghttp-parser": "epp.parsing.sglang_http:SglangHttpParser",
    "vllmgrpc-parser": "epp.parsing.vllm_grpc:VllmGrpcParser",
    "vertexai-parser": "epp.parsing.vertexai:VertexAIParser",
    "passthrough-parser": "epp.parsing.passthrough:PassthroughParser",
}


def built_in() -> list[type[Plugin]]:
    """Every built-in class, once."""
    registry = Registry(entry_point_group="")
    return list(dict.fromkeys(registry.load(type_) for type_ in BUILT_IN))


class UnknownPluginError(LookupError):
    """No such plugin type, or what stands behind it is no plugin; says which."""


class Registry:
    """See the module. Satisfies `epp.config.load.Catalogue`."""

    def __init__(self, classes: Iterable[type[Plugin]] = (), *, entry_point_group: str = ENTRY_POINT_GROUP) -> None:
        """`classes`: known besides the built-in ones."""
        self._classes: dict[str, type[Plugin]] = {}
        self._entry_points: dict[str, EntryPoint] | None = None
        self._entry_point_group = entry_point_group
        for cls in classes:
            self.register(cls)

    def register(self, cls: type[Plugin]) -> None:
        """Make a class known by its type and its aliases. Raises ValueError if it is no plugin or a name is taken by another."""
        fault = _class_fault(cls)
        if fault:
            raise ValueError(f"{cls!r} {fault}")
        for name in (cls.type, *cls.aliases):
            taken_by = BUILT_IN.get(name, f"{cls.__module__}:{cls.__qualname__}")
            if taken_by != f"{cls.__module__}:{cls.__qualname__}" or self._classes.setdefault(name, cls) is not cls:
                raise ValueError(f"{name!r} is taken by {self._classes.get(name, taken_by)!r}")

    def types(self) -> Collection[str]:
        return BUILT_IN.keys() | self._classes.keys() | self._found_entry_points().keys()

    def role(self, type: str) -> set[str]:  # noqa: A002 - the field's own name
        try:
            return _roles(self.load(type))
        except UnknownPluginError:
            return set()

    def deprecated(self, type: str) -> str:  # noqa: A002 - the field's own name
        """What to write in place of a deprecated type; empty if it is not."""
        try:
            cls = self.load(type)
        except UnknownPluginError:
            return ""
        return cls.deprecated or (cls.type if type in cls.aliases else "")

    def stability(self, type: str) -> Literal["beta", "alpha"]:  # noqa: A002 - the field's own name
        try:
            return self.load(type).stability
        except UnknownPluginError:
            return "beta"

    def problems(self, type: str, parameters: Mapping[str, Any], path: str) -> list[Problem]:  # noqa: A002 - the field's own name
        try:
            cls = self.load(type)
        except UnknownPluginError as error:
            return [Problem(join(path, "type"), str(error))]
        return _faults(cls, parameters, join(path, "parameters"))

    def build(self, type: str, parameters: Mapping[str, Any], name: str) -> Plugin:  # noqa: A002 - the field's own name
        """One instance. Parameters were checked by `problems`: a fault here raises msgspec.ValidationError."""
        plugin = msgspec.convert(dict(parameters), self.load(type))
        plugin.named(name)
        return plugin

    def load(self, type: str) -> type[Plugin]:  # noqa: A002 - the field's own name
        """The class behind a type. Raises UnknownPluginError."""
        if type in self._classes:
            return self._classes[type]
        found = None if type in BUILT_IN else self._found_entry_points().get(type)
        if found is None and type not in BUILT_IN and ":" not in type:
            raise UnknownPluginError(f"unknown plugin type {type!r}{suggestion(type, self.types())}")
        try:
            cls = found.load() if found is not None else _imported(BUILT_IN.get(type, type))
        except (ImportError, AttributeError, ValueError) as error:
            raise UnknownPluginError(f"{type!r} can't be loaded: {error}") from error
        fault = _class_fault(cls)
        if fault:
            raise UnknownPluginError(f"{type!r} {fault}")
        self._classes[type] = cls
        return self._classes[type]

    def _found_entry_points(self) -> Mapping[str, EntryPoint]:
        if self._entry_points is None:
            self._entry_points = {point.name: point for point in entry_points(group=self._entry_point_group)}
        return self._entry_points


def _imported(type_: str) -> Any:
    module, _, attribute = type_.partition(":")
    return getattr(import_module(module), attribute)


def _roles(cls: type[Plugin]) -> set[str]:
    return {role for method, role in ROLE_OF_METHOD.items() if callable(getattr(cls, method, None))} | set(cls.roles)


def _class_fault(cls: Any) -> str:
    """Why this is no plugin class, or nothing."""
    if not (isinstance(cls, type) and issubclass(cls, Plugin)):
        return "is not a subclass of epp.plugins.base.Plugin"
    if not isinstance(getattr(cls, "type", None), str):
        return "has no `type`"
    roles = _roles(cls)
    if not roles:
        return f"has none of the methods {', '.join(ROLE_OF_METHOD)}, so it is no plugin of any kind"
    for base, method in ((PointwiseScorer, "score_one"), (RangeScorer, "measure")):
        if issubclass(cls, base) and getattr(cls, method) is getattr(base, method):
            return f"is a {base.__name__} without `{method}`"
    if "scorer" in roles and not isinstance(getattr(cls, "per_request", None), bool):
        return "is a scorer without `per_request`"
    return ""


def _faults(cls: type[msgspec.Struct], value: Any, path: str) -> list[Problem]:
    """Every fault of a struct's fields, those of structs in it included; when there is none, what the class itself objects to."""
    if not isinstance(value, Mapping):
        return [Problem(path, f"must be a mapping, not {kind(value)}")]
    fields = {field.encode_name: field for field in msgspec.structs.fields(cls)}
    known = f"; known: {', '.join(sorted(fields))}" if fields else "; it takes no parameters"
    problems = [
        Problem(join(path, name), f"unknown parameter{suggestion(str(name), fields) or known}") for name in value if name not in fields
    ]
    for name, field in fields.items():
        if name not in value:
            if field.required:
                problems.append(Problem(join(path, name), "is missing"))
            continue
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            problems += _faults(field.type, value[name], join(path, name))
            continue
        try:
            msgspec.convert(value[name], field.type)
        except msgspec.ValidationError as error:
            problems.append(_located(error, join(path, name)))
    if not problems:
        try:
            msgspec.convert(dict(value), cls)
        except msgspec.ValidationError as error:
            problems.append(_located(error, path))
    return problems


def _located(error: msgspec.ValidationError, path: str) -> Problem:
    """msgspec names the place inside the value; join it to ours."""
    message = str(error)
    at = _AT.search(message)
    return Problem(path + at["at"], message[: at.start()]) if at else Problem(path, message)
