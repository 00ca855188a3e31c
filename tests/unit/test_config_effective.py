"""A configuration written out again: complete, readable, and the same when it is read back."""

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from epp.config.effective import effective, to_yaml
from epp.config.load import SINGLE_ROLES, default_config, load, resolve_defaults
from epp.config.schema import (
    API_VERSION,
    DataLayer,
    DataLayerSource,
    EndpointPickerConfig,
    FlowControl,
    PluginSpec,
    PriorityBand,
    ProfilePlugin,
    RequestHandler,
    SchedulingProfile,
)
from epp.config.secrets import hidden
from tests.shelf import HEAD, ROLES, Shelf, loaded

DEFAULT_YAML = """\
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
featureGates:
- haPopulateNonLeaderDatastore=true
plugins:
- type: cost-aware-scorer
- type: max-score-picker
- type: single-profile-handler
- type: utilization-detector
- type: metrics-data-source
- type: core-metrics-extractor
schedulingProfiles:
- name: default
  plugins:
  - pluginRef: cost-aware-scorer
    weight: 1
  - pluginRef: max-score-picker
dataLayer:
  injectDefaults: true
  sources:
  - pluginRef: metrics-data-source
    extractors:
    - pluginRef: core-metrics-extractor
  crossReplicaSyncInterval: 200ms
flowControl:
  maxBytes: 0
  maxRequests: 0
  defaultRequestTTL: 1m
  noEndpointRequestTTL: 1m
  defaultPriorityBand:
    priority: 0
    maxBytes: 1G
    maxRequests: 5000
    fairnessPolicyRef: global-strict-fairness-policy
    orderingPolicyRef: fcfs-ordering-policy
  usageLimitPolicyPluginRef: static-usage-limit-policy
  saturationDetector:
    pluginRef: utilization-detector
  enableEviction: false
"""


def test_the_default_configuration_in_full() -> None:
    assert to_yaml(default_config(), Shelf()) == DEFAULT_YAML


def test_a_configuration_with_a_bit_of_everything() -> None:
    config = loaded(
        """
apiVersion: inference.networking.x-k8s.io/v1alpha1
kind: EndpointPickerConfig
featureGates: [dataLayer]
plugins:
- {name: q, type: queue-scorer, parameters: {size: 3}}
- {name: files, type: file-discovery}
schedulingProfiles: [{name: only, plugins: [{pluginRef: q, weight: 0.5}]}]
dataLayer: {injectDefaults: false, discovery: {pluginRef: files}}
parser: {pluginRef: openai-parser}
flowControl:
  defaultRequestTTL: 90s
  defaultNegativePriorityBand: {maxBytes: 64Mi}
  priorityBands: [{priority: 5, maxRequests: 10}]
"""
    )
    document = effective(config, Shelf())
    assert document["apiVersion"] == API_VERSION
    assert document["featureGates"] == ["haPopulateNonLeaderDatastore=true"]
    assert document["plugins"][:2] == [
        {"name": "q", "type": "queue-scorer", "parameters": {"size": 3}},
        {"name": "files", "type": "file-discovery"},
    ]
    assert document["schedulingProfiles"][0]["plugins"] == [{"pluginRef": "q", "weight": 0.5}, {"pluginRef": "max-score-picker"}]
    assert document["dataLayer"] == {"injectDefaults": False, "discovery": {"pluginRef": "files"}, "crossReplicaSyncInterval": "200ms"}
    assert document["requestHandler"] == {"parsers": [{"pluginRef": "openai-parser"}]}
    flow_control = document["flowControl"]
    assert (flow_control["defaultRequestTTL"], flow_control["noEndpointRequestTTL"]) == ("1m30s", "1m30s")
    assert flow_control["defaultNegativePriorityBand"]["maxBytes"] == "64Mi"
    assert [(band["priority"], band["maxRequests"], band["maxBytes"]) for band in flow_control["priorityBands"]] == [(5, 10, "1G")]
    (warning,) = loaded(to_yaml(config, Shelf())).warnings
    assert warning.startswith("flowControl: nothing of it"), "which is as true of what was written; nothing is deprecated any more"


def test_shared_values_are_written_out() -> None:
    config = loaded(
        HEAD + "plugins: [{name: a, type: queue-scorer, parameters: &p {size: [1]}}, {name: b, type: queue-scorer, parameters: *p}]"
    )
    text = to_yaml(config, Shelf())
    assert "&" not in text
    assert text.count("size:") == 2


NAMES = st.text(min_size=1, max_size=8).filter(lambda name: name not in ROLES and not name.isspace())
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)
SECONDS = st.integers(0, 10**15).map(lambda ns: ns / 10**9)
COUNTS = st.integers(0, 1 << 62)


@st.composite
def configurations(draw: st.DrawFn) -> EndpointPickerConfig:
    """Configurations that are right, of any content."""
    specs = []
    for type_ in draw(
        st.lists(st.sampled_from([type_ for type_ in sorted(ROLES) if ROLES[type_].isdisjoint(SINGLE_ROLES) and type_ != "new-filter"]))
    ):
        name = draw(NAMES)
        if name not in [spec.name for spec in specs]:
            specs.append(PluginSpec(name=name, type=type_, parameters=draw(st.just({}) | VALUES.map(lambda value: {"size": value}))))

    def of(role: str, default: str = "") -> str:
        return draw(st.sampled_from([spec.name for spec in specs if role in ROLES[spec.type]] + [default]))

    def band(priority: int) -> PriorityBand:
        return PriorityBand(
            priority=priority,
            bytes_max=draw(COUNTS) or 1,
            requests_max=draw(COUNTS) or 1,
            fairness_policy=of("fairness-policy", "global-strict-fairness-policy"),
            ordering_policy=of("ordering-policy", "fcfs-ordering-policy"),
        )

    pickers = [spec.name for spec in specs if "picker" in ROLES[spec.type]]
    others = [spec.name for spec in specs if spec.name not in pickers]
    chosen = draw(st.lists(st.sampled_from(others))) if others else []
    chosen += [draw(st.sampled_from(pickers))] if pickers and draw(st.booleans()) else []
    weights = st.floats(0, 1e300, allow_nan=False)
    profile = SchedulingProfile(name=draw(NAMES), plugins=tuple(ProfilePlugin(plugin_ref=ref, weight=draw(weights)) for ref in chosen))
    sources = tuple(
        DataLayerSource(plugin_ref=ref, extractors=tuple(filter(None, [of("extractor")]))) for ref in {of("data-source")} - {""}
    )
    return EndpointPickerConfig(
        feature_gates={"flowControl": draw(st.booleans()), "haPopulateNonLeaderDatastore": draw(st.booleans())},
        plugins=tuple(specs),
        scheduling_profiles=(profile,),
        data_layer=DataLayer(
            inject_defaults=draw(st.booleans()), sources=sources, discovery=of("discovery"), cross_replica_sync_interval_s=draw(SECONDS)
        ),
        request_handler=RequestHandler(parsers=tuple({of("parser"), of("parser")} - {""})),
        flow_control=FlowControl(
            bytes_max=draw(COUNTS),
            requests_max=draw(COUNTS),
            default_request_ttl_s=draw(SECONDS),
            no_endpoint_request_ttl_s=draw(SECONDS),
            default_priority_band=band(draw(st.integers(-5, 5))),
            default_negative_priority_band=band(0) if draw(st.booleans()) else None,
            priority_bands=tuple(band(priority) for priority in draw(st.sets(st.integers(-(1 << 62), 1 << 62), max_size=3))),
            usage_limit_policy=of("usage-limit-policy", "static-usage-limit-policy"),
            saturation_detector=of("detector", "utilization-detector"),
            enable_eviction=draw(st.booleans()),
        ),
    )


def meant(config: EndpointPickerConfig) -> dict[str, Any]:
    """Everything but what was only said, with the weights that count."""
    complete = resolve_defaults(config, Shelf())
    scorers = {spec.name for spec in complete.plugins if "scorer" in ROLES[spec.type]}
    return {
        "gates": complete.feature_gates,
        "plugins": complete.plugins,
        "profiles": [
            (profile.name, [(m.plugin_ref, m.weight if m.plugin_ref in scorers else None) for m in profile.plugins])
            for profile in complete.scheduling_profiles
        ],
        "blocks": (complete.data_layer, complete.request_handler, complete.flow_control),
    }


@settings(deadline=None)
@given(configurations())
def test_what_is_written_out_is_read_back_as_the_same(config: EndpointPickerConfig) -> None:
    text = to_yaml(config, Shelf())
    again = load(text, source="written out", catalogue=Shelf())
    assert meant(again) == meant(config)
    assert to_yaml(again, Shelf()) == text
    assert yaml.safe_load(text) == effective(config, Shelf())


# What is not shown


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("address", "redis://user:pw@10.0.0.9:6379/0", "redis://***@10.0.0.9:6379/0"),
        ("address", "rediss://:p@w@[::1]:6379", "rediss://***@[::1]:6379"),
        ("address", "redis://10.0.0.9:6379?db=1&password=pw&x=y", "redis://10.0.0.9:6379?db=1&password=***&x=y"),
        ("address", "user:pw@10.0.0.9:6379", "***@10.0.0.9:6379"),
        ("address", "10.0.0.9:6379", "10.0.0.9:6379"),
        ("url", "https://10.0.0.9:8000/a@b", "https://10.0.0.9:8000/a@b"),
        ("anything", "see http://token@host/", "see http://***@host/"),
        ("anything", "a:b@c", "a:b@c"),
        ("redisPassword", "pw", "***"),
        ("password", "", ""),
        ("apiKey", "pw", "***"),
        ("client_secret", ["pw", "pw"], ["***", "***"]),
        ("secret", {"a": [1, "pw", None], "b": ""}, {"a": ["***", "***", None], "b": ""}),
        ("bearerTokenFile", "/run/secrets/token", "/run/secrets/token"),
        ("blockSizeTokens", 16, 16),
    ],
)
def test_passwords_are_told_by_their_field_or_their_place(field: str, value: object, shown: object) -> None:
    assert hidden({"list": [{field: value}]}) == {"list": [{field: shown}]}
