"""`epp doctor` on Envoy configurations: what `epp up` makes is well, and each thing people get wrong is found, by name."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from epp.doctor import envoy_checks, envoy_cluster_checks
from epp.doctor.envoy_config import EnvoyFacts, addresses, understand
from epp.doctor.exchange import FULL_DUPLEX, Exchange
from epp.doctor.findings import Result, Status, judge
from epp.doctor.grpc_client import HostPort, PortFacts
from epp.envoy import Destination, EnvoyOptions
from epp.envoy.bootstrap import render
from epp.extproc.tls import self_signed
from epp.types import Address

CHECKS = {check.name: check for check in (*envoy_checks.CHECKS, *envoy_cluster_checks.CHECKS)}
PICKER = HostPort("127.0.0.1", 9002)
DESTINATION = "x-gateway-destination-endpoint"
EXT_PROC = "type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor"
PER_ROUTE = "type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExtProcPerRoute"
TLS = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"

Json = dict[str, Any]
Change = Callable[[Json], object]


def bootstrap(**options: Any) -> Json:
    given = {"listen": Address("127.0.0.1", 8080), "endpoints": (Address("10.0.0.5", 8000),), "epp": Address(*PICKER)} | options
    return yaml.safe_load(render(EnvoyOptions(**given)))


def manager(config: Json) -> Json:
    return config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]


def filters(config: Json) -> list[Json]:
    return manager(config)["http_filters"]


def processor(config: Json) -> Json:
    return next(each for each in filters(config) if each["name"].endswith("ext_proc"))["typed_config"]


def host(config: Json) -> Json:
    return manager(config)["route_config"]["virtual_hosts"][0]


def route(config: Json) -> Json:
    return host(config)["routes"][0]


def cluster(config: Json, name: str) -> Json:
    return next(each for each in config["static_resources"]["clusters"] if each["name"] == name)


def exchange(destination: str = "10.0.0.5:8000") -> Exchange:
    return Exchange(
        mode=FULL_DUPLEX, header=destination, metadata=destination, metadata_kind="string_value", body_echoed=True, streamed=True
    )


def port(*, tls: bool = True) -> PortFacts:
    return PortFacts(address=PICKER, tls=tls, alpn="h2" if tls else "", http2=True)


def facts(config: Json) -> EnvoyFacts:
    return understand(config, source="envoy.yaml", target=PICKER)


def said(check: str, config: Json, *, picker_port: PortFacts | None = None, answer: Exchange | None = None) -> list[Result]:
    known = {"envoy": facts(config), "picker_ports": {PICKER: picker_port or port()}, "full_duplex": answer or exchange()}
    return judge(CHECKS[check], known)


def statuses(results: list[Result]) -> set[Status]:
    return {result.finding.status for result in results}


# --- what is well


@pytest.mark.parametrize("destination", Destination)
@pytest.mark.parametrize("response_body", [True, False])
@pytest.mark.parametrize("name", CHECKS)
def test_what_epp_up_makes_is_well(name: str, destination: Destination, response_body: bool) -> None:
    config = bootstrap(destination=destination, response_body=response_body)
    assert statuses(said(name, config)) == {Status.OK}, said(name, config)


def test_a_config_dump_is_read_as_the_file_is() -> None:
    config = bootstrap()
    static = config["static_resources"]
    (listener,) = static["listeners"]
    route_config = manager(config).pop("route_config")
    manager(config)["rds"] = {"route_config_name": route_config["name"]}
    dump = {
        "configs": [
            {
                "@type": "type.googleapis.com/envoy.admin.v3.BootstrapConfigDump",
                "bootstrap": {"node": {"user_agent_build_version": {"version": {"major_number": 1, "minor_number": 38, "patch": 2}}}},
            },
            {"@type": "...ClustersConfigDump", "dynamic_active_clusters": [{"cluster": each} for each in static["clusters"]]},
            {"@type": "...ListenersConfigDump", "dynamic_listeners": [{"name": "x", "active_state": {"listener": listener}}]},
            {"@type": "...RoutesConfigDump", "dynamic_route_configs": [{"route_config": route_config}]},
        ]
    }
    (way,) = facts(dump).ways
    assert facts(dump).version == "1.38.2"
    assert way.where == "gateway/envoy.filters.http.ext_proc"
    assert [pool["name"] for pool in way.pools] == ["pool"]
    assert addresses(way.picker) == [PICKER]
    assert all(statuses(said(name, dump)) == {Status.OK} for name in CHECKS)


def test_camel_case_is_read_too_and_keys_of_maps_stay() -> None:
    def camel(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key if "." in key or key.startswith("@") else "".join(p.title() if n else p for n, p in enumerate(key.split("_"))): camel(
                    item
                )
                for key, item in value.items()
            }
        return [camel(item) for item in value] if isinstance(value, list) else value

    config = bootstrap()
    assert "staticResources" in camel(config)
    assert facts(camel(config)).ways == facts(config).ways


@pytest.mark.parametrize(
    "document", [None, [], "text", {}, {"static_resources": {}}, {"configs": []}, {"static_resources": {"listeners": 7}}]
)
def test_what_is_no_envoy_configuration_is_refused(document: Any) -> None:
    with pytest.raises(ValueError, match=r"Envoy|listener"):
        understand(document, source="x")


def test_nesting_without_end_is_refused() -> None:
    document: Json = {}
    inner = document
    for _ in range(200):
        inner["a"] = {}
        inner = inner["a"]
    with pytest.raises(ValueError, match="nested"):
        understand(document, source="x")


# --- each fault by itself: (what is changed, the check that finds it, how bad, a piece of what it says)


def lb_policy(config: Json) -> Json:
    return cluster(config, "pool")["load_balancing_policy"]["policies"][0]["typed_extension_config"]["typed_config"]


def without_strip(config: Json) -> None:
    filters(config)[:] = [each for each in filters(config) if not each["name"].endswith("header_mutation")]


def second_processor(config: Json) -> None:
    again = copy.deepcopy(next(each for each in filters(config) if each["name"].endswith("ext_proc")))
    filters(config).insert(0, again | {"name": "other"})


def hint(config: Json) -> None:
    processor(config)["metadata_options"]["forwarding_namespaces"]["untyped"] = ["envoy.lb"]
    metadata = [{"metadata_namespace": "envoy.lb.subset_hint", "value": {}}]
    setter = {"@type": "type.googleapis.com/envoy.extensions.filters.http.set_metadata.v3.Config", "metadata": metadata}
    filters(config).insert(0, {"name": "set_metadata", "typed_config": setter})


def mode(**changes: str) -> Change:
    return lambda config: processor(config)["processing_mode"].update(changes)


def health(**changes: Any) -> Change:
    check = {"timeout": "2s", "interval": "2s", "no_traffic_interval": "2s", "grpc_health_check": {}}

    def change(config: Json) -> None:
        merged = {key: value for key, value in (check | changes).items() if value is not None}
        cluster(config, "epp").update(health_checks=[merged], common_lb_config={"healthy_panic_threshold": {"value": 0}})

    return change


FAULTS: list[tuple[str, Change, str, Status, str]] = [
    ("no filter", lambda c: filters(c).pop(1), "envoy-ext-proc", Status.FAIL, "no ext_proc filter"),
    ("after the router", lambda c: filters(c).append(filters(c).pop(1)), "envoy-ext-proc", Status.FAIL, "no router comes after"),
    ("no cluster", lambda c: c["static_resources"]["clusters"].pop(), "envoy-ext-proc", Status.FAIL, "'epp' does not exist"),
    ("headers skipped", mode(request_header_mode="SKIP"), "envoy-request-mode", Status.FAIL, "request_header_mode is SKIP"),
    ("no body", mode(request_body_mode="NONE"), "envoy-request-mode", Status.FAIL, "no prompt"),
    ("body unset", lambda c: processor(c)["processing_mode"].pop("request_body_mode"), "envoy-request-mode", Status.FAIL, "is NONE"),
    ("streamed", mode(request_body_mode="STREAMED"), "envoy-request-mode", Status.FAIL, "is STREAMED"),
    ("no trailers", mode(request_trailer_mode="SKIP"), "envoy-request-mode", Status.FAIL, "request_trailer_mode SKIP"),
    ("grpc mode", mode(request_body_mode="GRPC"), "envoy-request-mode", Status.FAIL, "is GRPC"),
    ("mode by number", lambda c: processor(c)["processing_mode"].update(request_body_mode=1), "envoy-request-mode", Status.FAIL, "is STREAMED"),
    ("response headers skipped", mode(response_header_mode="SKIP"), "envoy-response-mode", Status.WARN, "response_header_mode is SKIP"),
    ("response buffered", mode(response_body_mode="BUFFERED"), "envoy-response-mode", Status.FAIL, "held back"),
    ("response trailers", mode(response_trailer_mode="SKIP"), "envoy-response-mode", Status.FAIL, "response_trailer_mode: SEND"),
    ("time-out", lambda c: (mode(request_body_mode="BUFFERED")(c), processor(c).pop("message_timeout")), "envoy-timeouts", Status.WARN, "0.2 s (the default)"),
    ("time-out given", lambda c: (mode(request_body_mode="BUFFERED")(c), processor(c).update(message_timeout="1s")), "envoy-timeouts", Status.WARN, "is 1 s"),
    ("no idle time-out", lambda c: manager(c).update(stream_idle_timeout="0s"), "envoy-timeouts", Status.WARN, "is off"),
    ("short idle time-out", lambda c: manager(c).update(stream_idle_timeout="15s"), "envoy-timeouts", Status.WARN, "is 15 s"),
    ("route default", lambda c: route(c)["route"].pop("timeout"), "envoy-route-timeout", Status.WARN, "15 s (the default)"),
    ("route short", lambda c: route(c)["route"].update(timeout="30s"), "envoy-route-timeout", Status.WARN, "30 s"),
    ("fail open", lambda c: processor(c).update(failure_mode_allow=True), "envoy-failure-mode", Status.WARN, "envoy#41276"),
    ("not received", lambda c: processor(c)["metadata_options"].pop("receiving_namespaces"), "envoy-metadata", Status.FAIL, "round robin"),
    ("no options", lambda c: processor(c).pop("metadata_options"), "envoy-metadata", Status.FAIL, "receiving_namespaces"),
    ("no hint", hint, "envoy-metadata", Status.FAIL, "envoy.lb.subset_hint"),
    (
        "served untold",
        lambda c: (processor(c).pop("response_attributes"), processor(c)["metadata_options"].pop("forwarding_namespaces")),
        "envoy-metadata",
        Status.WARN,
        "not told who served",
    ),
    ("client header", without_strip, "envoy-client-header", Status.WARN, "no filter before ext_proc"),
    ("header removed late", lambda c: route(c).update(request_headers_to_remove=[DESTINATION]), "envoy-client-header", Status.FAIL, "after ext_proc"),
    ("header removed after", lambda c: filters(c).insert(2, filters(c)[0]), "envoy-client-header", Status.FAIL, "after ext_proc"),
    ("no mutation", lambda c: processor(c).update(mutation_rules={"disallow_all": True}), "envoy-rules", Status.FAIL, "disallow_all"),
    ("no immediate", lambda c: processor(c).update(disable_immediate_response=True), "envoy-rules", Status.FAIL, "become a 500"),
    ("observing", lambda c: processor(c).update(observability_mode=True), "envoy-rules", Status.FAIL, "does not wait"),
    ("two processors", second_processor, "envoy-chain", Status.WARN, "2 ext_proc filters"),
    ("buffer", mode(request_body_mode="BUFFERED"), "envoy-request-size", Status.OK, ""),
    (
        "small buffer",
        lambda c: (mode(request_body_mode="BUFFERED")(c), host(c).pop("request_body_buffer_limit")),
        "envoy-request-size",
        Status.WARN,
        "413",
    ),
    (
        "small message",
        lambda c: processor(c)["grpc_service"]["envoy_grpc"].update(max_receive_message_length=65536),
        "envoy-request-size",
        Status.WARN,
        "gRPC_error_8",
    ),
    ("round robin", lambda c: cluster(c, "pool").pop("load_balancing_policy"), "envoy-destination", Status.FAIL, "nobody listens"),
    ("no source", lambda c: lb_policy(c).pop("override_host_sources"), "envoy-destination", Status.FAIL, "reads neither"),
    ("two sources", lambda c: lb_policy(c)["override_host_sources"].append({"header": DESTINATION}), "envoy-destination", Status.WARN, "tried twice"),
    ("retries", lambda c: route(c)["route"]["retry_policy"].update(retry_on="5xx,connect-failure"), "envoy-retries", Status.WARN, "has 5xx"),
    ("http/1", lambda c: cluster(c, "epp").pop("typed_extension_protocol_options"), "envoy-http2", Status.FAIL, "does not speak HTTP/2"),
    ("no breakers", lambda c: cluster(c, "epp").pop("circuit_breakers"), "envoy-limits", Status.WARN, "max_requests 1024"),
    (
        "breakers of the pool",
        lambda c: cluster(c, "pool")["circuit_breakers"]["thresholds"][0].update(max_pending_requests=10),
        "envoy-limits",
        Status.WARN,
        "max_pending_requests 10",
    ),
    ("health", health(), "envoy-health", Status.OK, ""),
    ("panic", lambda c: (health()(c), cluster(c, "epp").pop("common_lb_config")), "envoy-health", Status.WARN, "50 % (the default)"),
    ("idle probes", health(no_traffic_interval=None), "envoy-health", Status.WARN, "every 60 s"),
    ("tcp probe", health(grpc_health_check=None, tcp_health_check={}), "envoy-health", Status.WARN, "otherwise than by gRPC"),
    ("dns without probes", lambda c: cluster(c, "epp").update(type="STRICT_DNS"), "envoy-health", Status.WARN, "no health check"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "check", "status", "text"), [pytest.param(*fault[1:], id=fault[0]) for fault in FAULTS])
def test_a_fault_is_found(change: Change, check: str, status: Status, text: str) -> None:
    config = bootstrap()
    change(config)
    results = said(check, config)
    worst = [result for result in results if result.finding.status is status]
    assert worst, results
    assert any(text in f"{finding.text} {finding.effect} {finding.change}" for _, finding in worst), results
    if status is not Status.OK:
        assert all(finding.effect and finding.change for _, finding in worst)


ORIGINAL_DST: list[tuple[str, Change, str, Status, str]] = [
    ("no header", lambda c: cluster(c, "pool").pop("original_dst_lb_config"), "envoy-destination", Status.FAIL, "reads no header"),
    (
        "another header",
        lambda c: cluster(c, "pool")["original_dst_lb_config"].pop("http_header_name"),
        "envoy-destination",
        Status.FAIL,
        "x-envoy-original-dst-host",
    ),
    ("fail open", lambda c: processor(c).update(failure_mode_allow=True), "envoy-failure-mode", Status.WARN, "ORIGINAL_DST"),
    ("metadata dropped", lambda c: processor(c)["metadata_options"].pop("receiving_namespaces"), "envoy-metadata", Status.WARN, "the header still counts"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "check", "status", "text"), [pytest.param(*fault[1:], id=fault[0]) for fault in ORIGINAL_DST])
def test_a_fault_with_an_original_destination_is_found(change: Change, check: str, status: Status, text: str) -> None:
    config = bootstrap(destination=Destination.ORIGINAL_DST)
    change(config)
    results = said(check, config)
    assert statuses(results) == {status}
    assert any(text in result.finding.text + result.finding.effect for result in results), results


def test_several_endpoints_are_only_for_a_cluster_that_takes_them() -> None:
    several = exchange("10.0.0.5:8000,10.0.0.6:8000")
    (result,) = said("envoy-fallbacks", bootstrap(destination=Destination.ORIGINAL_DST), answer=several)
    assert result.finding.status is Status.FAIL
    assert "understands one" in result.finding.text
    assert statuses(said("envoy-fallbacks", bootstrap(), answer=several)) == {Status.OK}
    config = bootstrap()
    del route(config)["route"]["retry_policy"]
    (result,) = said("envoy-fallbacks", config, answer=several)
    assert result.finding.status is Status.WARN
    assert "no retry_policy" in result.finding.text


@pytest.mark.parametrize(
    ("cluster_tls", "port_tls", "text"), [(True, False, "WRONG_VERSION_NUMBER"), (False, True, "connection_termination")]
)
def test_tls_on_one_side_alone_is_a_failure(cluster_tls: bool, port_tls: bool, text: str) -> None:
    (result,) = said("envoy-tls", bootstrap(epp_tls=cluster_tls), picker_port=port(tls=port_tls))
    assert result.finding.status is Status.FAIL
    assert text in result.finding.effect
    assert statuses(said("envoy-tls", bootstrap(epp_tls=cluster_tls), picker_port=port(tls=cluster_tls))) == {Status.OK}


def test_a_cluster_that_verifies_does_not_take_a_self_signed_certificate() -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    der = x509.load_pem_x509_certificate(self_signed().certificate).public_bytes(Encoding.DER)
    config = bootstrap()
    context = cluster(config, "epp")["transport_socket"]["typed_config"]["common_tls_context"]
    context["validation_context"] = {"trusted_ca": {"filename": "/ca.crt"}}
    facts_ = PortFacts(address=PICKER, tls=True, alpn="h2", http2=True, certificate_der=der)
    (result,) = said("envoy-tls", config, picker_port=facts_)
    assert result.finding.status is Status.WARN
    assert "CERTIFICATE_VERIFY_FAILED" in result.finding.effect


def test_a_port_that_can_not_be_reached_is_no_agreement() -> None:
    (result,) = said("envoy-tls", bootstrap(), picker_port=PortFacts(address=PICKER, error="refused"))
    assert result.finding.status is Status.SKIPPED
    config = bootstrap()
    cluster(config, "epp").pop("load_assignment")
    (result,) = said("envoy-tls", config)
    assert "does not say where" in result.finding.text


def test_no_fault_is_told_of_two_processors_where_envoy_is_new() -> None:
    config = bootstrap()
    second_processor(config)
    old, new = facts(config), facts(config)
    dumped = {"user_agent_build_version": {"version": {"major_number": 1, "minor_number": 40, "patch": 0}}}
    static = config["static_resources"]
    dump = {
        "configs": [
            {"bootstrap": {"node": dumped}},
            {"static_listeners": [{"listener": each} for each in static["listeners"]]},
            {"static_clusters": [{"cluster": each} for each in static["clusters"]]},
        ]
    }
    new = facts(dump)
    assert (old.version, new.version) == ("", "1.40.0")
    assert statuses(judge(CHECKS["envoy-chain"], {"envoy": new})) == {Status.OK}


# --- overrides by route, as Istio does it


def istio_like() -> Json:
    """The base filter does nothing; the route's weighted clusters have pickers of their own."""
    config = bootstrap()
    real = copy.deepcopy(processor(config))
    processor(config).clear()
    processor(config).update(
        {"@type": EXT_PROC, "failure_mode_allow": True, "processing_mode": {"request_header_mode": "SKIP", "response_header_mode": "SKIP"}}
    )
    overrides = {key: real[key] for key in ("grpc_service", "processing_mode", "metadata_options")} | {"failure_mode_allow": False}
    other = copy.deepcopy(overrides)
    other["grpc_service"]["envoy_grpc"]["cluster_name"] = "epp-2"
    other["processing_mode"]["request_body_mode"] = "BUFFERED"
    name = "envoy.filters.http.ext_proc"
    route(config)["route"] = {
        "timeout": "0s",
        "weighted_clusters": {
            "clusters": [
                {"name": "pool", "weight": 70, "typed_per_filter_config": {name: {"@type": PER_ROUTE, "overrides": overrides}}},
                {"name": "pool", "weight": 30, "typed_per_filter_config": {name: {"@type": PER_ROUTE, "overrides": other}}},
                {"name": "pool", "weight": 0, "typed_per_filter_config": {name: {"@type": PER_ROUTE, "disabled": True}}},
            ]
        },
    }
    second = copy.deepcopy(cluster(config, "epp")) | {"name": "epp-2"}
    config["static_resources"]["clusters"].append(second)
    return config


def test_overrides_by_route_are_what_counts() -> None:
    ways = facts(istio_like()).ways
    assert [way.picker_cluster_name for way in ways] == ["epp", "epp-2"]
    assert [way.request_body_mode for way in ways] == ["FULL_DUPLEX_STREAMED", "BUFFERED"]
    assert not any(way.processor.get("failure_mode_allow") for way in ways)
    assert statuses(said("envoy-request-mode", istio_like())) == {Status.OK}


def test_a_filter_that_is_off_is_on_where_a_route_says_something_of_it() -> None:
    config = bootstrap()
    (each,) = (each for each in filters(config) if each["name"].endswith("ext_proc"))
    each["disabled"] = True
    assert facts(config).ways == []
    wrapper = {"@type": "type.googleapis.com/envoy.config.route.v3.FilterConfig", "config": {}}
    route(config)["typed_per_filter_config"] = {each["name"]: wrapper}
    assert len(facts(config).ways) == 1


def test_the_picker_s_filter_is_told_from_another_s() -> None:
    config = bootstrap()
    second_processor(config)
    other = filters(config)[0]["typed_config"]
    other["grpc_service"]["envoy_grpc"]["cluster_name"] = "guardrails"
    away = copy.deepcopy(cluster(config, "epp")) | {"name": "guardrails"}
    away["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]["port_value"] = 5000
    config["static_resources"]["clusters"].append(away)
    assert [way.picker_cluster_name for way in facts(config).ways] == ["epp"]
    assert [way.picker_cluster_name for way in understand(config, source="x").ways] == ["epp"]
    assert [way.picker_cluster_name for way in understand(config, source="x", cluster="guardrails").ways] == ["guardrails"]
    assert understand(config, source="x", cluster="nobody").ways == []


def test_what_several_ways_have_in_common_is_said_once() -> None:
    config = bootstrap(round_robin_listen=None)
    listener = config["static_resources"]["listeners"][0]
    config["static_resources"]["listeners"].append(copy.deepcopy(listener) | {"name": "second"})
    for each in (0, 1):
        found = config["static_resources"]["listeners"][each]["filter_chains"][0]["filters"][0]["typed_config"]
        found["stream_idle_timeout"] = "15s"
    (result,) = said("envoy-timeouts", config)
    assert result.finding.text.startswith("gateway/envoy.filters.http.ext_proc, second/envoy.filters.http.ext_proc: ")


def test_no_finding_holds_the_configuration() -> None:
    """A dump may have secrets in it."""
    config = bootstrap()
    filters(config)[0]["typed_config"]["secret"] = "hunter2"
    config["static_resources"]["secrets"] = [{"name": "key", "generic_secret": {"secret": {"inline_string": "hunter2"}}}]
    mode(request_body_mode="NONE")(config)
    results = [result for name in CHECKS for result in said(name, config)]
    assert len(results) >= len(CHECKS)
    assert "hunter2" in json.dumps(config)
    assert "hunter2" not in repr(results)
