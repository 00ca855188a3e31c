"""What is counted is exposed, under both names, in bounds."""

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import Counter
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from epp.clock import VirtualClock
from epp.datastore import Datastore, Reading, Ticket
from epp.observe.metrics import Metrics
from epp.observe.series import INPUT_TOKENS, LATENCY_S, OUTPUT_TOKENS, REQUEST_BYTES, Histogram
from epp.types import Address, Endpoint, EndpointSpec

MODEL = {"model_name": "m", "target_model_name": "m-v2"}
FLOW = {**MODEL, "fairness_id": "tenant", "priority": "-1"}


def made(**options: Any) -> Metrics:
    return Metrics(clock=VirtualClock(), **options)


def samples(metrics: Metrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text, content_type = metrics.exposition()
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, "exposed twice"
            found[key] = sample.value
    return found


def value(metrics: Metrics, name: str, /, **labels: str) -> float | None:
    return samples(metrics).get((name, frozenset(labels.items())))


@settings(deadline=None)  # the machine's load is not what is tested
@given(st.lists(st.floats(-1, 5000), max_size=50))
def test_a_histogram_counts_each_value_in_the_first_bucket_that_holds_it(values: list[float]) -> None:
    histogram = Histogram(LATENCY_S)
    for each in values:
        histogram.observe(each)
    assert histogram.count == len(values)
    for i, bound in enumerate(LATENCY_S):
        assert sum(histogram.counts[: i + 1]) == sum(each <= bound for each in values)
    assert repr(histogram).startswith(f"<Histogram count={len(values)} ")


def test_bucket_bounds_are_those_dashboards_know() -> None:
    assert REQUEST_BYTES[0] == 64
    assert REQUEST_BYTES[-1] == 1073741824
    assert INPUT_TOKENS[-6:] == (32778, 65536, 131072, 262144, 524288, 1048576)
    assert OUTPUT_TOKENS[-1] == 8192


def test_counts_of_requests_and_their_twins() -> None:
    metrics = made()
    first, second = metrics.series("m", "m-v2", "tenant", -1), metrics.series("m", "m-v2", "other tenant", -1)
    assert metrics.series("m", "m-v2", "tenant", -1) is first
    first.requests += 2
    first.running += 1
    first.errors["NotFound"] += 1
    second.requests += 3
    assert value(metrics, "llm_d_epp_request_total", **FLOW) == 2
    assert value(metrics, "inference_objective_request_total", **MODEL, priority="-1") == 5
    assert value(metrics, "llm_d_epp_request_running", **FLOW) == 1
    assert value(metrics, "inference_objective_running_requests", model_name="m") == 1
    assert value(metrics, "llm_d_epp_request_error_total", **FLOW, error_code="NotFound") == 1
    assert value(metrics, "inference_objective_request_error_total", **MODEL, error_code="NotFound") == 1


@pytest.mark.parametrize(
    ("attribute", "name", "twin", "seen", "bound"),
    [
        ("duration_s", "request_duration_seconds", "inference_objective_request_duration_seconds", 1.1, "1.25"),
        ("request_bytes", "request_size_bytes", "inference_objective_request_sizes", 2_000_000, "2.097152e+06"),
        ("response_bytes", "response_size_bytes", "inference_objective_response_sizes", 32770, "32778"),
        ("input_tokens", "request_input_tokens", "inference_objective_input_tokens", 1000, "1024"),
        ("output_tokens", "request_output_tokens", "inference_objective_output_tokens", 1, "1"),
        ("cached_tokens", "request_cached_tokens", "inference_objective_prompt_cached_tokens", 100_000, "131072"),
        ("ntpot_s", "request_ntpot_seconds", "inference_objective_normalized_time_per_output_token_seconds", 0.0015, "0.002"),
        ("streaming_tpot_s", "request_streaming_tpot_seconds", "inference_objective_request_tpot_seconds", 0.0006, "0.00205"),
        ("streaming_itl_s", "request_streaming_itl_seconds", "", 1.5, "2"),
    ],
)
def test_histograms_of_requests_and_their_twins(attribute: str, name: str, twin: str, seen: float, bound: str) -> None:
    metrics = made()
    for fairness_id in ("tenant", "other tenant"):
        getattr(metrics.series("m", "m-v2", fairness_id, -1), attribute).observe(seen)
    assert value(metrics, f"llm_d_epp_{name}_bucket", **FLOW, le=bound) == 1
    assert value(metrics, f"llm_d_epp_{name}_bucket", **FLOW, le="+Inf") == 1
    assert value(metrics, f"llm_d_epp_{name}_count", **FLOW) == 1
    assert value(metrics, f"llm_d_epp_{name}_sum", **FLOW) == seen
    if twin:
        assert value(metrics, f"{twin}_bucket", **MODEL, le=bound) == 2
        assert value(metrics, f"{twin}_sum", **MODEL) == 2 * seen
    exposed = {name for name, _ in samples(metrics) if name.endswith("_bucket") and not re.search("scheduler|prefix_indexer", name)}
    assert len(exposed) == (2 if twin else 1), "what counted nothing is left out"


def test_time_to_first_token_is_told_by_streaming() -> None:
    metrics = made()
    series = metrics.series("m", "m-v2", "tenant", -1)
    series.ttft_s.observe(3.5)
    series.streaming_ttft_s.observe(0.3)
    assert value(metrics, "llm_d_epp_request_ttft_seconds_sum", **FLOW, streaming="false") == 3.5
    assert value(metrics, "llm_d_epp_request_ttft_seconds_sum", **FLOW, streaming="true") == 0.3
    assert value(metrics, "inference_objective_request_ttft_seconds_count", **MODEL) == 2


def test_help_and_type_lines() -> None:
    text = made().exposition()[0].decode()
    assert "# HELP llm_d_epp_request_total [ALPHA] Total number of processed requests.\n# TYPE llm_d_epp_request_total counter\n" in text
    assert (
        "# HELP inference_objective_request_total [ALPHA] [Deprecated: Use llm_d_epp_request_total] "
        "Counter of inference objective requests broken out for each model and target model.\n" in text
    )
    assert (
        "# HELP inference_extension_scheduler_e2e_duration_seconds [ALPHA] [Deprecated: Use llm_d_epp_scheduler_e2e_duration_seconds] "
        "End-to-end scheduling latency distribution in seconds.\n" in text
    )


def endpoint(name: str, host: str) -> Endpoint:
    datastore = Datastore(VirtualClock())
    datastore.apply([EndpointSpec(name, Address(host, 8000))])
    return datastore.by_destination[f"{host}:8000"]


def test_scheduling() -> None:
    metrics = made(commit="abc", build_ref="v1", indexes={("p", "approx-prefix-cache-producer"): type("Index", (), {"blocks": 42})()})
    metrics.scheduler_duration_s.observe(0.0003)
    metrics.prefix_hit_ratio.observe(0.55)
    metrics.prefix_hit_bytes.observe(0)
    for _ in range(2):
        metrics.picked("m", endpoint("pod-a", "10.0.0.1"))
    metrics.not_picked("m")
    where = {"target_model_name": "m", "namespace": "default", "port": "8000"}
    nowhere = {"target_model_name": "m", "namespace": "", "port": ""}
    assert value(metrics, "llm_d_epp_scheduler_attempts_total", status="success", endpoint_name="pod-a", **where) == 2
    assert value(metrics, "inference_extension_scheduler_attempts_total", status="success", pod_name="pod-a", **where) == 2
    assert value(metrics, "llm_d_epp_scheduler_attempts_total", status="failure", endpoint_name="", **nowhere) == 1
    assert value(metrics, "llm_d_epp_scheduler_e2e_duration_seconds_bucket", le="0.0005") == 1
    assert value(metrics, "inference_extension_scheduler_e2e_duration_seconds_sum") == 0.0003
    assert value(metrics, "llm_d_epp_prefix_indexer_hit_ratio_bucket", le="0.6") == 1
    assert value(metrics, "inference_extension_prefix_indexer_hit_bytes_bucket", le="0") == 1
    names = {"plugin_name": "p", "plugin_type": "approx-prefix-cache-producer"}
    assert value(metrics, "llm_d_epp_prefix_indexer_size", **names) == 42
    assert value(metrics, "inference_extension_prefix_indexer_size", **names) == 42
    assert value(metrics, "llm_d_epp_info", commit="abc", build_ref="v1") == 1


def test_poll_errors() -> None:
    metrics = made(polls={"metrics-data-source": type("Poll", (), {"poll_errors_total": 3})()})
    assert value(metrics, "llm_d_epp_datalayer_poll_errors_total", source_type="metrics-data-source") == 3
    assert value(metrics, "llm_d_inference_scheduler_datalayer_poll_errors_total", source_type="metrics-data-source") == 3


def test_pool_gauges_are_over_fresh_endpoints() -> None:
    clock = VirtualClock()
    pool = Datastore(clock, name="llm")
    pool.apply([EndpointSpec(name, Address(f"10.0.0.{i}", 8000)) for i, name in enumerate("abc")])
    a, b, c = pool.endpoints.values()
    metrics = Metrics(clock=clock, pool=pool)
    assert value(metrics, "llm_d_epp_average_queue_size", name="llm") is None
    assert value(metrics, "llm_d_epp_ready_endpoints", name="llm") == 3
    pool.record_reading(c, Reading(99.0, 99.0, 0.9), sent_requests=0, sent_tokens=0)
    clock.advance(2.5)
    pool.record_reading(a, Reading(1.0, 4.0, 0.333), sent_requests=0, sent_tokens=0)
    pool.record_reading(b, Reading(2.0, 8.0, 0.333), sent_requests=0, sent_tokens=0)
    pool.set_healthy(c, healthy=False)
    Ticket(a, 70)
    assert value(metrics, "llm_d_epp_average_queue_size", name="llm") == 1.5
    assert value(metrics, "inference_pool_average_queue_size", name="llm") == 1.5
    assert value(metrics, "inference_pool_average_kv_cache_utilization", name="llm") == 0.33
    assert value(metrics, "llm_d_epp_average_running_requests", name="llm") == 6
    assert value(metrics, "llm_d_epp_std_dev_running_requests", name="llm") == 2
    assert value(metrics, "llm_d_epp_ready_endpoints", name="llm") == 2
    assert value(metrics, "inference_pool_ready_pods", name="llm") == 2
    assert value(metrics, "llm_d_epp_per_endpoint_queue_size", name="llm", model_server_endpoint="c") == 99
    assert value(metrics, "inference_pool_per_pod_queue_size", name="llm", model_server_pod="b") == 2
    flow = {"endpoint_name": "a", "namespace": "default", "producer_name": "inflight-load-producer", "fairness_id": "", "priority": ""}
    assert value(metrics, "llm_d_epp_inflight_requests", **flow) == 1
    assert value(metrics, "llm_d_epp_inflight_tokens", **flow) == 70


def test_label_values_are_bounded() -> None:
    metrics = made(label_values_max=2, series_max=3)
    cells = [metrics.series(model, "t", fairness_id) for model in "ab" for fairness_id in "xyz"]
    for cell in cells:
        cell.requests += 1
    assert len({id(cell) for cell in cells}) == 4
    labels = {frozenset(labels): count for (name, labels), count in samples(metrics).items() if name == "llm_d_epp_request_total"}
    key = lambda model, target, fairness_id: frozenset(  # noqa: E731 - shorter than the four lines it stands for
        {"model_name": model, "target_model_name": target, "fairness_id": fairness_id, "priority": "0"}.items()
    )
    assert labels == {
        key("a", "t", "x"): 1,
        key("a", "t", "y"): 1,
        key("a", "t", "other"): 1,  # a third fairness id
        key("other", "other", "other"): 3,  # b is a third model name, t being the second; and three series are there
    }
    assert value(metrics, "epp_limit_hits_total", limit="metric_labels") == 4


def test_attempts_are_bounded() -> None:
    metrics = made(attempts_max=2)
    for host in ("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.1"):
        metrics.picked("m", endpoint(host, host))
    counts = {
        dict(labels)["endpoint_name"]: count
        for (name, labels), count in samples(metrics).items()
        if name == "llm_d_epp_scheduler_attempts_total"
    }
    assert counts == {"10.0.0.1": 2, "10.0.0.2": 1, "other": 2}


def test_label_values_are_escaped() -> None:
    metrics = made()
    metrics.series('a"b\\c\nd', "t").requests += 1
    assert value(metrics, "llm_d_epp_request_total", model_name='a"b\\c\nd', target_model_name="t", fairness_id="", priority="0") == 1


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_numbers_that_are_none(number: float) -> None:
    metrics = made()
    metrics.scheduler_duration_s.sum = number
    text = metrics.exposition()[0]
    assert b"scheduler_e2e_duration_seconds_sum " + (b"+Inf" if number > 0 else b"NaN") in text


def test_openmetrics_when_asked_for() -> None:
    metrics = made(pool=Datastore(VirtualClock()))
    metrics.series("m", "t").duration_s.observe(0.5)
    metrics.series("m", "t").requests += 1
    text, content_type = metrics.exposition("application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5")
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    found = {sample.name: sample.value for family in openmetrics_families(text.decode()) for sample in family.samples}
    assert found["llm_d_epp_request_total"] == 1
    assert found["llm_d_epp_request_duration_seconds_sum"] == 0.5
    assert b'le="1.0"' in text


def test_other_text_versions_get_the_plain_format() -> None:
    assert made().exposition("text/plain;version=1.0.0")[1] == "text/plain; version=0.0.4; charset=utf-8"


def test_both_formats_agree() -> None:
    metrics = made(pool=Datastore(VirtualClock()))
    metrics.series("m", "t").duration_s.observe(0.5)
    metrics.picked("t", endpoint("a", "10.0.0.1"))
    plain = {sample.name for family in text_string_to_metric_families(metrics.exposition()[0].decode()) for sample in family.samples}
    collected = {sample.name for family in metrics.collect() for sample in family.samples}
    assert plain == collected


def test_collectors_of_others_come_after_ours() -> None:
    metrics = made(process=True)
    Counter("shop_sales", "Sold.", registry=metrics.registry).inc(2)
    text = metrics.exposition()[0]
    assert text.index(b"shop_sales_total 2") > text.index(b"llm_d_epp_info")
    assert b"process_resident_memory_bytes" in text
    assert b"python_info" in text
