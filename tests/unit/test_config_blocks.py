"""The blocks dataLayer, requestHandler and flowControl: what is read, what is a fault, what a warning."""

import pytest

from epp.config.schema import DataLayer, DataLayerSource, FlowControl, PriorityBand, RequestHandler
from tests.shelf import HEAD, faults, loaded

ON = "featureGates: [flowControl]\n"
OFF = "(without effect: the gate flowControl is off)"


def test_a_whole_data_layer() -> None:
    config = loaded(
        HEAD
        + """
plugins: [{type: metrics-data-source}, {name: gpu, type: dcgm-data-source}, {type: dcgm-extractor}, {name: files, type: file-discovery}]
dataLayer:
  injectDefaults: false
  sources:
  - {pluginRef: metrics-data-source, extractors: [{pluginRef: core-metrics-extractor}]}
  - {pluginRef: gpu, extractors: [{pluginRef: dcgm-extractor}]}
  - pluginRef: gpu
  discovery: {pluginRef: files}
  crossReplicaSyncInterval: 1.5s
"""
    )
    assert config.data_layer == DataLayer(
        inject_defaults=False,
        sources=(
            DataLayerSource(plugin_ref="metrics-data-source", extractors=("core-metrics-extractor",)),
            DataLayerSource(plugin_ref="gpu", extractors=("dcgm-extractor",)),
            DataLayerSource(plugin_ref="gpu"),
        ),
        discovery="files",
        cross_replica_sync_interval_s=1.5,
    )


def test_blocks_that_are_not_there_are_their_defaults() -> None:
    for text in ("", "dataLayer:\nflowControl:\nrequestHandler:\n", "dataLayer: {}\nflowControl: {}\nrequestHandler: {parsers: []}\n"):
        config = loaded(HEAD + text)
        assert config.data_layer == DataLayer(
            inject_defaults=True, sources=(), discovery="", peer_discovery="", cross_replica_syncer="", cross_replica_sync_interval_s=0.2
        )
        band = PriorityBand(
            priority=0,
            bytes_max=10**9,
            requests_max=5000,
            fairness_policy="global-strict-fairness-policy",
            ordering_policy="fcfs-ordering-policy",
        )
        assert config.flow_control == FlowControl(
            bytes_max=0,
            requests_max=0,
            default_request_ttl_s=60,
            no_endpoint_request_ttl_s=60,
            default_priority_band=band,
            default_negative_priority_band=None,
            priority_bands=(),
            usage_limit_policy="static-usage-limit-policy",
            saturation_detector="utilization-detector",
            enable_eviction=False,
        )
        assert config.request_handler == RequestHandler(parsers=())
        assert config.warnings == ()


def test_every_fault_of_a_data_layer() -> None:
    assert faults(
        HEAD
        + """
plugins: [{type: queue-scorer}, {name: gpu, type: dcgm-data-source}]
dataLayer:
  injectDefaults: "no"
  source: []
  sources:
  - {pluginRef: queue-scorer, extractors: [{pluginRef: gpu}, {pluginRef: core-metric-extractor}, {}, ~]}
  - {extractors: {}}
  - metrics-data-source
  discovery: {pluginRef: gpu}
  peerDiscovery: {pluginRef: peers}
  crossReplicaSyncerPluginRef: gpu
  crossReplicaSyncInterval: 5
"""
    ) == [
        "dataLayer.source: unknown field; did you mean sources?",
        "dataLayer.crossReplicaSyncerPluginRef: 'gpu' is a data-source, not a cross-replica-syncer",
        "dataLayer.injectDefaults: must be true or false, not a string",
        "dataLayer.sources[0].pluginRef: 'queue-scorer' is a scorer, not a data-source",
        "dataLayer.sources[0].extractors[0].pluginRef: 'gpu' is a data-source, not an extractor",
        "dataLayer.sources[0].extractors[1].pluginRef: no plugin is named 'core-metric-extractor'; did you mean core-metrics-extractor?",
        "dataLayer.sources[0].extractors[2].pluginRef: is missing",
        "dataLayer.sources[0].extractors[3]: must be a mapping, not null",
        "dataLayer.sources[1].pluginRef: is missing",
        "dataLayer.sources[1].extractors: must be a list, not a mapping",
        "dataLayer.sources[2]: must be a mapping, not a string",
        "dataLayer.discovery.pluginRef: 'gpu' is a data-source, not a discovery",
        "dataLayer.peerDiscovery.pluginRef: no plugin is named 'peers'",
        "dataLayer.crossReplicaSyncInterval: must be a duration such as 60s, not a number",
    ]


def test_a_producer_may_be_told_of_endpoints() -> None:
    declared = "plugins: [{name: gpu, type: dcgm-data-source}, {name: index, type: approx-prefix-cache-producer}]\n"
    config = loaded(HEAD + declared + "dataLayer: {sources: [{pluginRef: gpu, extractors: [{pluginRef: index}]}]}")
    assert config.data_layer.sources == (DataLayerSource(plugin_ref="gpu", extractors=("index",)),)


def test_a_syncer_that_is_nowhere() -> None:
    assert faults(HEAD + "dataLayer: {crossReplicaSyncerPluginRef: local-syncer}") == [
        "dataLayer.crossReplicaSyncerPluginRef: no plugin is named 'local-syncer'"
    ]


def test_parsers_by_name_and_by_type() -> None:
    config = loaded(
        HEAD
        + "plugins: [{name: mine, type: openai-parser}]\nrequestHandler: {parsers: [{pluginRef: mine}, {pluginRef: passthrough-parser}]}"
    )
    assert config.request_handler.parsers == ("mine", "passthrough-parser")


def test_every_fault_of_parsers() -> None:
    assert faults(
        HEAD
        + """
plugins: [{type: queue-scorer}]
requestHandler:
  parsers: [{pluginRef: queue-scorer}, {pluginRef: openai-parse}, {pluginRef: ''}, {plugin: openai-parser}, ~]
"""
    ) == [
        "requestHandler.parsers[0].pluginRef: 'queue-scorer' is a scorer, not a parser",
        "requestHandler.parsers[1].pluginRef: no plugin is named 'openai-parse'; did you mean openai-parser?",
        "requestHandler.parsers[2].pluginRef: is missing",
        "requestHandler.parsers[3].plugin: unknown field; did you mean pluginRef?",
        "requestHandler.parsers[3].pluginRef: is missing",
        "requestHandler.parsers[4]: must be a mapping, not null",
    ]


def test_the_old_parser_field() -> None:
    config = loaded(HEAD + "parser: {pluginRef: passthrough-parser}")
    assert config.request_handler.parsers == ("passthrough-parser",)
    assert config.warnings == ("parser: is deprecated; write requestHandler.parsers",)


def test_the_new_parsers_field_wins() -> None:
    config = loaded(HEAD + "parser: {pluginRef: gone}\nrequestHandler: {parsers: [{pluginRef: openai-parser}]}")
    assert config.request_handler.parsers == ("openai-parser",)
    assert config.warnings == ("parser: is deprecated; write requestHandler.parsers, which counts here",)


def test_the_old_parser_field_is_checked_where_it_counts() -> None:
    assert faults(HEAD + "parser: {pluginRef: gone}")[0].startswith("parser.pluginRef: no plugin is named 'gone'")


def test_a_whole_flow_control() -> None:
    config = loaded(
        HEAD
        + ON
        + """
plugins: [{type: round-robin-fairness-policy}, {name: edf, type: edf-ordering-policy}, {name: hold, type: priority-holdback-policy},
  {name: sat, type: concurrency-detector}]
flowControl:
  maxBytes: 2Gi
  maxRequests: 10k
  defaultRequestTTL: 30s
  noEndpointRequestTTL: 10m
  defaultPriorityBand: {priority: 7, maxRequests: 100}
  defaultNegativePriorityBand: {maxBytes: 1e6}
  priorityBands:
  - {priority: 10, maxBytes: 500M, maxRequests: "20", fairnessPolicyRef: round-robin-fairness-policy, orderingPolicyRef: edf}
  - {priority: -1, maxBytes: 0, maxRequests: 1.0}
  usageLimitPolicyPluginRef: hold
  saturationDetector: {pluginRef: sat}
  enableEviction: true
"""
    )
    assert config.flow_control == FlowControl(
        bytes_max=2 << 30,
        requests_max=10_000,
        default_request_ttl_s=30,
        no_endpoint_request_ttl_s=600,
        default_priority_band=PriorityBand(priority=7, requests_max=100),
        default_negative_priority_band=PriorityBand(bytes_max=10**6),
        priority_bands=(
            PriorityBand(
                priority=10,
                bytes_max=5 * 10**8,
                requests_max=20,
                fairness_policy="round-robin-fairness-policy",
                ordering_policy="edf",
            ),
            PriorityBand(priority=-1, bytes_max=10**9, requests_max=1),
        ),
        usage_limit_policy="hold",
        saturation_detector="sat",
        enable_eviction=True,
    )


@pytest.mark.parametrize(
    ("written", "default_s", "no_endpoint_s"),
    [
        ("", 60, 60), ("defaultRequestTTL: 5s", 5, 5), ("defaultRequestTTL: 0s", 0, 0), ("noEndpointRequestTTL: 5m", 60, 300),
        ("defaultRequestTTL: 5s, noEndpointRequestTTL: 0s", 5, 0),
    ],
)  # fmt: skip
def test_the_wait_for_endpoints_follows_the_other(written: str, default_s: float, no_endpoint_s: float) -> None:
    flow_control = loaded(HEAD + f"flowControl: {{{written}}}").flow_control
    assert (flow_control.default_request_ttl_s, flow_control.no_endpoint_request_ttl_s) == (default_s, no_endpoint_s)


BROKEN = """
plugins: [{type: queue-scorer}, {type: fcfs-ordering-policy}]
flowControl:
  priorityBands:
  - {priority: 1, fairnessPolicyRef: fcfs-ordering-policy, orderingPolicyRef: fcfs}
  - {priority: 1}
  defaultNegativePriorityBand: {fairnessPolicyRef: nobody}
  usageLimitPolicyPluginRef: queue-scorer
"""
BROKEN_FAULTS = [
    "flowControl.priorityBands[0].fairnessPolicyRef: 'fcfs-ordering-policy' is an ordering-policy, not a fairness-policy",
    "flowControl.priorityBands[0].orderingPolicyRef: no plugin is named 'fcfs'; known: fcfs-ordering-policy",
    "flowControl.priorityBands[1].priority: 1 has a band already, flowControl.priorityBands[0]",
    "flowControl.usageLimitPolicyPluginRef: 'queue-scorer' is a scorer, not a usage-limit-policy",
    "flowControl.defaultNegativePriorityBand.fairnessPolicyRef: no plugin is named 'nobody'; known: global-strict-fairness-policy",
]


def test_policies_and_bands_are_checked_when_they_are_used() -> None:
    assert faults(HEAD + ON + BROKEN) == BROKEN_FAULTS


def test_policies_and_bands_nobody_uses_are_warnings() -> None:
    assert len(loaded(HEAD + BROKEN).warnings) == len(BROKEN_FAULTS)
    assert all(warning.endswith(OFF) for warning in loaded(HEAD + BROKEN).warnings)


UNREAD = "flowControl: nothing of it but saturationDetector has an effect: "


@pytest.mark.parametrize(
    ("gate", "warnings"),
    [
        ("", [f"{UNREAD}it does with featureGates: [flowControl=true]"]),
        ("featureGates: [flowControl=false]", [f"{UNREAD}the gate flowControl is off"]),
        ("featureGates: [flowControl]", []),
    ],
)
def test_a_block_that_is_not_read_is_said(gate: str, warnings: list[str]) -> None:
    assert list(loaded(f"{HEAD}\n{gate}\nflowControl: {{maxRequests: 100, enableEviction: true}}\n").warnings) == warnings


def test_of_a_block_that_says_what_is_so_anyway_nothing_is_said() -> None:
    for block in ("{defaultRequestTTL: 60s, enableEviction: false}", "{saturationDetector: {pluginRef: utilization-detector}}"):
        assert loaded(f"{HEAD}\nflowControl: {block}\n").warnings == ()


def test_values_are_checked_either_way() -> None:
    assert faults(
        HEAD
        + """
flowControl:
  maxBytes: 1GB
  maxRequests: -5
  defaultRequestTTL: -1s
  noEndpointRequestTTL: 1:30
  defaultPriorityBand: [1]
  enableEviction: 1
  priorityBands: [{priority: high}, {priority: 1.5, maxBytes: true}, {priority: 99999999999999999999, maxRequests: "-1"}]
"""
    ) == [
        "flowControl.priorityBands[0].priority: must be a whole number, not a string",
        "flowControl.priorityBands[1].priority: must be a whole number, not 1.5",
        "flowControl.priorityBands[1].maxBytes: must be a quantity such as 5000 or 1Gi, not a boolean",
        "flowControl.priorityBands[2].priority: must be a whole number of at most 64 bits",
        "flowControl.priorityBands[2].maxRequests: can't be negative",
        "flowControl.defaultRequestTTL: can't be negative, as -1s is",
        "flowControl.defaultPriorityBand: must be a mapping, not a list",
        "flowControl.maxBytes: '1GB' is not a quantity; write 5000, 64Mi or 1G",
        "flowControl.maxRequests: can't be negative",
        "flowControl.noEndpointRequestTTL: must be a duration such as 60s, not a number",
        "flowControl.enableEviction: must be true or false, not a number",
    ]


def test_the_old_saturation_detector_field() -> None:
    config = loaded(HEAD + "plugins: [{type: concurrency-detector}]\nsaturationDetector: {pluginRef: concurrency-detector}")
    assert config.flow_control.saturation_detector == "concurrency-detector"
    assert config.warnings == ("saturationDetector: is deprecated; write flowControl.saturationDetector",)


def test_the_new_saturation_detector_field_wins() -> None:
    config = loaded(HEAD + "saturationDetector: {pluginRef: gone}\nflowControl: {saturationDetector: {pluginRef: utilization-detector}}")
    assert config.flow_control.saturation_detector == "utilization-detector"
    assert config.warnings == ("saturationDetector: is deprecated; write flowControl.saturationDetector, which counts here",)


@pytest.mark.parametrize(
    ("written", "fault"),
    [
        ("flowControl: {saturationDetector: {pluginRef: ''}}", "flowControl.saturationDetector.pluginRef: is missing"),
        ("flowControl: {saturationDetector: {pluginRef: queue-scorer}}", "flowControl.saturationDetector.pluginRef: 'queue-scorer' is a scorer, not a detector"),
        ("flowControl: {saturationDetector: {pluginRef: utilisation-detector}}", "flowControl.saturationDetector.pluginRef: no plugin is named 'utilisation-detector'; did you mean utilization-detector?"),
        ("saturationDetector: {pluginRef: nothing}", "saturationDetector.pluginRef: no plugin is named 'nothing'; known: utilization-detector"),
        ("saturationDetector: utilization-detector", "saturationDetector: must be a mapping, not a string"),
    ],
)  # fmt: skip
def test_a_saturation_detector_that_is_none(written: str, fault: str) -> None:
    assert faults(HEAD + "plugins: [{type: queue-scorer}]\n" + written) == [fault]


def test_a_saturation_detector_without_a_name_is_the_default() -> None:
    assert loaded(HEAD + "flowControl: {saturationDetector: {}}").flow_control.saturation_detector == "utilization-detector"


def test_a_plugin_of_unknown_type_is_reported_once() -> None:
    assert len(faults(HEAD + "plugins: [{name: sat, type: satellite}]\nflowControl: {saturationDetector: {pluginRef: sat}}")) == 1
