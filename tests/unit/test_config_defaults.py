"""What is added to a configuration to make it complete."""

from typing import Any

import msgspec
import pytest

from epp.config.load import default_config, resolve_defaults
from epp.config.references import DEFAULT_ROLES
from epp.config.schema import DataLayerSource, EndpointPickerConfig
from epp.plugins.registry import Registry
from tests.shelf import HEAD, Shelf, loaded

METRICS = DataLayerSource(plugin_ref="metrics-data-source", extractors=("core-metrics-extractor",))
ADDED = ["single-profile-handler", "utilization-detector", "metrics-data-source", "core-metrics-extractor"]


def complete(text: str) -> EndpointPickerConfig:
    return resolve_defaults(loaded(HEAD + text), Shelf())


def plugins(text: str) -> list[str]:
    return [spec.name if spec.name == spec.type else f"{spec.name}: {spec.type}" for spec in complete(text).plugins]


def members(text: str) -> list[list[str]]:
    return [[member.plugin_ref for member in profile.plugins] for profile in complete(text).scheduling_profiles]


def test_all_that_runs_when_nothing_is_configured() -> None:
    config = resolve_defaults(default_config(), Shelf())
    assert [spec.name for spec in config.plugins] == ["cost-aware-scorer", "max-score-picker", *ADDED]
    assert config.data_layer.sources == (METRICS,)
    assert config.flow_control.saturation_detector == "utilization-detector"
    assert config.request_handler.parsers == ()
    assert config.warnings == ()


def test_an_empty_configuration_runs_the_reference_pickers_default() -> None:
    assert plugins("") == ["queue-scorer", "kv-cache-utilization-scorer", "prefix-cache-scorer", "max-score-picker", *ADDED]
    assert members("") == [["queue-scorer", "kv-cache-utilization-scorer", "prefix-cache-scorer", "max-score-picker"]]


def test_a_profile_without_members_picks_among_all_alike() -> None:
    assert plugins("schedulingProfiles: [{name: a}]") == ["max-score-picker", *ADDED]
    assert members("schedulingProfiles: [{name: a}]") == [["max-score-picker"]]


def test_one_profile_of_all_plugins_takes_what_was_configured_and_nothing_that_was_added() -> None:
    text = "plugins: [{type: queue-scorer}, {type: label-filter}, {type: openai-parser}, {type: metrics-data-source}]"
    assert members(text) == [["queue-scorer", "label-filter", "max-score-picker"]]
    assert members("plugins: [{type: concurrency-detector}]") == [["concurrency-detector", "max-score-picker"]]  # a filter too


@pytest.mark.parametrize("profiles", ["", "schedulingProfiles: [{name: a}]"])
def test_a_handler_of_ones_own_stays_alone(profiles: str) -> None:
    assert "single-profile-handler" not in plugins("plugins: [{name: h, type: disagg-profile-handler}]\n" + profiles)
    assert plugins("plugins: [{name: h, type: single-profile-handler}]\n" + profiles)[0] == "h: single-profile-handler"


def test_several_profiles_share_a_picker() -> None:
    text = "plugins: [{type: disagg-profile-handler}, {type: queue-scorer}]\nschedulingProfiles: [{name: a}, {name: b, plugins: [{pluginRef: queue-scorer}]}]"
    assert members(text) == [["max-score-picker"], ["queue-scorer", "max-score-picker"]]
    assert "single-profile-handler" not in plugins(text)


def test_the_detector_that_is_named_is_the_only_one() -> None:
    text = "plugins: [{name: sat, type: utilization-detector}]\nflowControl: {saturationDetector: {pluginRef: sat}}"
    assert "utilization-detector" not in plugins(text)
    assert "sat: utilization-detector" in plugins(text)


def test_defaults_that_are_only_named_are_added() -> None:
    text = "schedulingProfiles: [{name: a, plugins: [{pluginRef: utilization-detector}, {pluginRef: max-score-picker}]}]"
    assert members(text) == [["utilization-detector", "max-score-picker"]]
    assert plugins(text).count("utilization-detector") == 1


def test_parsers_that_are_only_named_are_added() -> None:
    text = "plugins: [{name: mine, type: openai-parser}]\nrequestHandler: {parsers: [{pluginRef: passthrough-parser}, {pluginRef: mine}]}"
    assert plugins(text)[-3:] == ["passthrough-parser", "metrics-data-source", "core-metrics-extractor"]
    assert complete(text).request_handler.parsers == ("passthrough-parser", "mine")


def test_policies_come_with_the_gate() -> None:
    block = """
plugins: [{name: edf, type: edf-ordering-policy}]
flowControl: {priorityBands: [{priority: 1, orderingPolicyRef: edf}]}
"""
    policies = ["static-usage-limit-policy", "global-strict-fairness-policy", "fcfs-ordering-policy"]
    assert [name for name in plugins("featureGates: [flowControl]" + block) if name in policies] == policies
    assert not [name for name in plugins(block) if name in policies]


def test_policies_of_every_band_are_added() -> None:
    text = """
featureGates: [flowControl]
plugins: [{name: edf, type: edf-ordering-policy}, {name: rr, type: round-robin-fairness-policy}]
flowControl:
  defaultPriorityBand: {orderingPolicyRef: edf, fairnessPolicyRef: rr}
  defaultNegativePriorityBand: {orderingPolicyRef: edf}
"""
    assert "global-strict-fairness-policy" in plugins(text)  # the negative band's
    assert "fcfs-ordering-policy" not in plugins(text)


@pytest.mark.parametrize(
    ("written", "sources"),
    [
        ("", [METRICS]),
        ("dataLayer: {}", [METRICS]),
        ("dataLayer: {injectDefaults: true, sources: []}", [METRICS]),
        ("dataLayer: {injectDefaults: false}", []),
        ("dataLayer: {sources: [{pluginRef: gpu}]}", [DataLayerSource(plugin_ref="gpu"), METRICS]),
        ("dataLayer: {sources: [{pluginRef: mine}]}", [DataLayerSource(plugin_ref="mine")]),
        ("dataLayer: {sources: [{pluginRef: metrics-data-source}]}", [DataLayerSource(plugin_ref="metrics-data-source")]),
    ],
)
def test_the_metrics_source(written: str, sources: list[DataLayerSource]) -> None:
    declared = "plugins: [{name: gpu, type: dcgm-data-source}, {name: mine, type: metrics-data-source}]\n"
    config = complete(declared + written)
    assert list(config.data_layer.sources) == sources
    named = {name for source in sources for name in (source.plugin_ref, *source.extractors)}
    assert {spec.name for spec in config.plugins} >= named
    assert ("core-metrics-extractor" in {spec.name for spec in config.plugins}) == ("core-metrics-extractor" in named)


def test_a_metrics_source_that_is_configured_keeps_its_parameters() -> None:
    config = complete("plugins: [{type: metrics-data-source, parameters: {size: 9}}]")
    assert [spec.parameters for spec in config.plugins if spec.type == "metrics-data-source"] == [{"size": 9}]
    assert config.data_layer.sources == (METRICS,)


def test_what_was_written_stays() -> None:
    config = loaded(
        HEAD + "featureGates: [haPopulateNonLeaderDatastore=false]\nparser: {pluginRef: openai-parser}\nflowControl: {maxBytes: 1}"
    )
    completed = resolve_defaults(config, Shelf())
    kept: dict[str, Any] = {name: getattr(config, name) for name in ("api_version", "kind", "feature_gates", "flow_control", "warnings")}
    assert msgspec.structs.replace(completed, **kept) == completed


def test_every_default_is_built_in_and_of_its_kind() -> None:
    registry = Registry(entry_point_group="")
    assert {type_: role in registry.role(type_) for type_, role in DEFAULT_ROLES.items()} == dict.fromkeys(DEFAULT_ROLES, True)
    assert all(registry.problems(type_, {}, "") == [] for type_ in DEFAULT_ROLES)
    assert not [type_ for type_ in DEFAULT_ROLES if registry.deprecated(type_) or registry.stability(type_) == "alpha"]
