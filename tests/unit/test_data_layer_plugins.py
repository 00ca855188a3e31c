"""Data sources, extractors and discovery as configurations name them: what each takes and what it refuses."""

from __future__ import annotations

import msgspec
import pytest

from epp.plugins.base import Plugin
from epp.plugins.data_layer.core_metrics_extractor import CoreMetricsExtractor
from epp.plugins.data_layer.dcgm import DcgmDataSource, DcgmExtractor
from epp.plugins.data_layer.file_discovery import FileDiscovery
from epp.plugins.data_layer.metrics_data_source import MetricsDataSource
from epp.plugins.data_layer.models import ModelsDataExtractor, ModelsDataSource
from epp.plugins.data_layer.notifications import EndpointNotificationSource, K8sNotificationSource
from epp.plugins.data_layer.topology_extractor import TopologyExtractor

SOURCE, EXTRACTOR, DISCOVERY = ("data-source",), ("extractor",), ("discovery",)

TABLE: list[tuple[type[Plugin], str, tuple[str, ...], str, dict[str, object]]] = [
    # class, type, roles, stability, the parameters it can't do without
    (MetricsDataSource, "metrics-data-source", SOURCE, "beta", {}),
    (CoreMetricsExtractor, "core-metrics-extractor", EXTRACTOR, "beta", {}),
    (ModelsDataSource, "models-data-source", SOURCE, "beta", {}),
    (ModelsDataExtractor, "models-data-extractor", EXTRACTOR, "beta", {}),
    (DcgmDataSource, "dcgm-data-source", SOURCE, "alpha", {}),
    (DcgmExtractor, "dcgm-extractor", EXTRACTOR, "alpha", {}),
    (K8sNotificationSource, "k8s-notification-source", SOURCE, "beta", {"version": "v1", "kind": "Pod"}),
    (EndpointNotificationSource, "endpoint-notification-source", SOURCE, "beta", {}),
    (TopologyExtractor, "topology-extractor", EXTRACTOR, "alpha", {}),
    (FileDiscovery, "file-discovery", DISCOVERY, "beta", {"path": "/etc/endpoints.yaml"}),
]


@pytest.mark.parametrize(("cls", "type_", "roles", "stability", "needed"), TABLE)
def test_what_each_is(*, cls: type[Plugin], type_: str, roles: tuple[str, ...], stability: str, needed: dict[str, object]) -> None:
    made = msgspec.convert(needed, cls)
    assert (made.type, made.roles, made.stability, made.name) == (type_, roles, stability, type_)
    with pytest.raises(msgspec.ValidationError, match="noSuchParameter"):
        msgspec.convert({**needed, "noSuchParameter": 1}, cls)


TLS = {"caCertPath": "/ca.pem", "clientCertPath": "/tls.crt", "clientKeyPath": "/tls.key", "insecureSkipVerify": True}


@pytest.mark.parametrize(
    ("cls", "path", "port"),
    [(MetricsDataSource, "/metrics", 0), (ModelsDataSource, "/v1/models", None), (DcgmDataSource, "/metrics", 9400)],
)
def test_defaults_of_sources(cls: type[MetricsDataSource | ModelsDataSource | DcgmDataSource], path: str, port: int | None) -> None:
    made = msgspec.convert({}, cls)
    assert (made.scheme, made.path, made.insecure_skip_verify, made.interval_s) == ("http", path, False, 0.0)
    assert getattr(made, "port", None) == port


@pytest.mark.parametrize(
    ("cls", "parameters"),
    [
        (MetricsDataSource, {"scheme": "https", "path": "/m", "port": 8001, "interval": "1s", **TLS}),
        (ModelsDataSource, {"scheme": "https", "path": "/m", "interval": "1m30s", **TLS}),
        (DcgmDataSource, {"scheme": "https", "path": "/m", "port": 9401, "useNodeAddress": True, "insecureSkipVerify": True}),
        (K8sNotificationSource, {"group": "apps", "version": "v1", "kind": "Deployment"}),
        (TopologyExtractor, {"hostname": "h", "rack": "r", "zone": "z", "region": "g"}),
        (FileDiscovery, {"path": "/e.yaml", "watchFile": True}),
    ],
)
def test_everything_they_take_is_kept(cls: type[Plugin], parameters: dict[str, object]) -> None:
    made = msgspec.convert(parameters, cls)
    kept = msgspec.to_builtins(made)
    assert {name: kept[name] for name in parameters} == parameters


@pytest.mark.parametrize(("written", "seconds"), [("", 0.0), ("0", 0.0), ("50ms", 0.05), ("1m30s", 90.0), (2_000_000_000, 2.0)])
def test_an_interval_may_be_left_open(written: object, seconds: float) -> None:
    assert msgspec.convert({"interval": written}, MetricsDataSource).interval_s == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("cls", "wrong"),
    [
        (MetricsDataSource, {"scheme": "ftp"}),
        (MetricsDataSource, {"path": ""}),
        (MetricsDataSource, {"port": 65536}),
        (MetricsDataSource, {"port": -1}),
        (MetricsDataSource, {"interval": "often"}),
        (MetricsDataSource, {"interval": "-1s"}),
        (MetricsDataSource, {"clientCertPath": "/tls.crt"}),
        (MetricsDataSource, {"clientKeyPath": "/tls.key"}),
        (ModelsDataSource, {"clientCertPath": "/tls.crt"}),
        (ModelsDataSource, {"port": 1}),
        (DcgmDataSource, {"port": 0}),
        (DcgmDataSource, {"useNodeAddress": "yes"}),
        (K8sNotificationSource, {}),
        (K8sNotificationSource, {"version": "v1"}),
        (K8sNotificationSource, {"version": "", "kind": "Pod"}),
        (FileDiscovery, {}),
        (FileDiscovery, {"path": ""}),
        (TopologyExtractor, {"row": "x"}),
    ],
)
def test_what_they_refuse(cls: type[Plugin], wrong: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(wrong, cls)


def test_labels_of_topology_default_to_those_of_kubernetes() -> None:
    made = msgspec.convert({"zone": "", "rack": "my/rack"}, TopologyExtractor)
    assert (made.hostname, made.rack) == ("kubernetes.io/hostname", "my/rack")
    assert (made.zone, made.region) == ("topology.kubernetes.io/zone", "topology.kubernetes.io/region")


# core-metrics-extractor

MINE: dict[str, object] = {
    "name": "mine",
    "queuedRequestsSpec": "my_requests{state=waiting}",
    "runningRequestsSpec": 'my_requests{state="running", model = "a b"}',
    "kvUsageSpec": "my:kv_usage",
    "loraSpec": "",
    "cacheInfoSpec": "my_cache_info{}",
    "cacheBlockSizeLabelName": "page_size",
    "cacheNumBlocksLabelName": "num_pages",
    "cacheBlockSizeSpec": "my_block_size",
    "cacheNumBlocksSpec": "my_blocks",
    "customMetrics": [{"attributeKey": "temperature", "metricSpec": "my_temperature{unit=celsius,}"}],
}


def test_an_engine_of_ones_own() -> None:
    made = msgspec.convert(
        {"defaultEngine": "mine", "engineConfigs": [MINE, {"name": "vllm"}], "engineLabelKey": "e"}, CoreMetricsExtractor
    )
    mine, vllm = made.engine_configs
    assert (mine.name, mine.queued_requests_spec, mine.cache_num_blocks_label_name) == ("mine", "my_requests{state=waiting}", "num_pages")
    assert [(custom.attribute_key, custom.metric_spec) for custom in mine.custom_metrics] == [
        ("temperature", "my_temperature{unit=celsius,}")
    ]
    assert vllm.kv_usage_spec == ""
    assert made.engine_label_key == "e"


@pytest.mark.parametrize("engine", ["vllm", "sglang", "trtllm-serve", "triton-tensorrt-llm", "triton"])
def test_built_in_engines_may_be_the_default(engine: str) -> None:
    assert msgspec.convert({"defaultEngine": engine}, CoreMetricsExtractor).default_engine == engine


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"defaultEngine": "mine"}, "no engine is named 'mine'"),
        ({"engineConfigs": [{"name": "a"}, {"name": "a"}]}, "a is there twice"),
        ({"engineConfigs": [{"name": ""}]}, r"engineConfigs\[0\].name"),
        ({"engineConfigs": [{}]}, "name"),
        ({"engineConfigs": [{"name": "a", "queueSpec": "x"}]}, "queueSpec"),
        ({"engineConfigs": [{"name": "a", "kvUsageSpec": "1x"}]}, "kvUsageSpec: '1x' is no metric"),
        ({"engineConfigs": [{"name": "a", "loraSpec": "x{y}"}]}, "loraSpec"),
        ({"engineConfigs": [{"name": "a", "loraSpec": "x{y=z"}]}, "loraSpec"),
        ({"engineConfigs": [{"name": "a", "loraSpec": "x y"}]}, "loraSpec"),
        ({"engineConfigs": [{"name": "a", "cacheInfoSpec": "x{y!=z}"}]}, "cacheInfoSpec"),
        ({"engineConfigs": [{"name": "a", "customMetrics": [{"attributeKey": "k"}]}]}, "metricSpec"),
        ({"engineConfigs": [{"name": "a", "customMetrics": [{"attributeKey": "k", "metricSpec": ""}]}]}, "metricSpec"),
        ({"engineConfigs": [{"name": "a", "customMetrics": [{"attributeKey": "", "metricSpec": "x"}]}]}, "attributeKey"),
    ],
)
def test_engines_that_make_no_sense(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert(wrong, CoreMetricsExtractor)
