"""The Envoy configuration, checked as the YAML Envoy reads; that Envoy accepts it is checked in integration/test_envoy_supervisor."""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
from typing import Any

import pytest
import yaml

from epp.envoy import Destination, EnvoyOptions, add_envoy_arguments, envoy_options
from epp.envoy.bootstrap import build_bootstrap, render, to_yaml
from epp.types import Address

OPTIONS = EnvoyOptions(
    listen=Address("127.0.0.1", 8080),
    endpoints=(Address("10.0.0.5", 8000), Address("2001:db8::1", 8001)),
    epp=Address("127.0.0.1", 9002),
)


def config(**changes: Any) -> dict[str, Any]:
    return yaml.safe_load(render(dataclasses.replace(OPTIONS, **changes)))


def manager(config: dict[str, Any], listener: int = 0) -> dict[str, Any]:
    return config["static_resources"]["listeners"][listener]["filter_chains"][0]["filters"][0]["typed_config"]


def filters(config: dict[str, Any], listener: int = 0) -> dict[str, dict[str, Any]]:
    return {f["name"].removeprefix("envoy.filters.http."): f["typed_config"] for f in manager(config, listener)["http_filters"]}


def route(config: dict[str, Any], listener: int = 0) -> dict[str, Any]:
    return manager(config, listener)["route_config"]["virtual_hosts"][0]["routes"][0]["route"]


def clusters(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {c["name"]: c for c in config["static_resources"]["clusters"]}


def addresses(cluster: dict[str, Any]) -> list[tuple[str, int]]:
    members = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    sockets = [m["endpoint"]["address"]["socket_address"] for m in members]
    return [(s["address"], s["port_value"]) for s in sockets]


def test_a_client_s_destination_header_is_removed_before_anything_else() -> None:
    made = filters(config())
    assert list(made) == ["header_mutation", "ext_proc", "router"]
    assert made["header_mutation"]["mutations"]["request_mutations"] == [{"remove": "x-gateway-destination-endpoint"}]


def test_the_picker_sees_everything_full_duplex_and_may_name_the_endpoint() -> None:
    processor = filters(config())["ext_proc"]
    assert processor["processing_mode"] == {
        "request_header_mode": "SEND",
        "request_body_mode": "FULL_DUPLEX_STREAMED",
        "request_trailer_mode": "SEND",
        "response_header_mode": "SEND",
        "response_body_mode": "FULL_DUPLEX_STREAMED",
        "response_trailer_mode": "SEND",
    }
    assert "envoy.lb" in processor["metadata_options"]["receiving_namespaces"]["untyped"]
    assert "envoy.lb.subset_hint" in processor["metadata_options"]["forwarding_namespaces"]["untyped"]
    assert processor["response_attributes"] == ["upstream.address", "response.code_details", "response.flags"]
    assert processor["message_timeout"] == "1000s"
    assert not processor.get("failure_mode_allow", False)


def test_without_response_bodies_nothing_of_a_response_but_its_headers_is_sent() -> None:
    mode = filters(config(response_body=False))["ext_proc"]["processing_mode"]
    assert (mode["response_header_mode"], mode["response_trailer_mode"]) == ("SEND", "SKIP")
    assert mode.get("response_body_mode", "NONE") == "NONE"
    assert mode["request_body_mode"] == "FULL_DUPLEX_STREAMED"


def test_override_host_reads_one_source_reports_the_server_and_falls_back() -> None:
    made = config()
    pool = clusters(made)["pool"]
    assert addresses(pool) == [("10.0.0.5", 8000), ("2001:db8::1", 8001)]
    policy = pool["load_balancing_policy"]["policies"][0]["typed_extension_config"]["typed_config"]
    assert policy["override_host_sources"] == [{"metadata": {"key": "envoy.lb", "path": [{"key": "x-gateway-destination-endpoint"}]}}]
    assert policy["selected_host_key"] == {"key": "envoy.lb", "path": [{"key": "x-gateway-destination-endpoint-served"}]}
    assert policy["fallback_policy"]["policies"][0]["typed_extension_config"]["name"] == "envoy.load_balancing_policies.round_robin"
    assert route(made)["retry_policy"] == {"retry_on": "connect-failure,refused-stream,reset-before-request", "num_retries": 2}


def test_original_dst_dials_the_header_and_does_not_retry() -> None:
    made = config(destination=Destination.ORIGINAL_DST)
    pool = clusters(made)["pool"]
    assert (pool["type"], pool["lb_policy"]) == ("ORIGINAL_DST", "CLUSTER_PROVIDED")
    assert pool["original_dst_lb_config"] == {"use_http_header": True, "http_header_name": "x-gateway-destination-endpoint"}
    assert "retry_policy" not in route(made)


def test_the_baseline_listener_has_the_same_members_and_no_picker() -> None:
    made = config(round_robin_listen=Address("127.0.0.1", 8081))
    assert list(filters(made, 1)) == ["router"]
    baseline = clusters(made)[route(made, 1)["cluster"]]
    assert addresses(baseline) == addresses(clusters(made)["pool"])
    assert baseline["load_balancing_policy"]["policies"][0]["typed_extension_config"]["name"] == "envoy.load_balancing_policies.round_robin"
    assert len(config()["static_resources"]["listeners"]) == 1


@pytest.mark.parametrize("tls", [True, False])
def test_the_picker_is_spoken_to_in_http2_with_or_without_tls(tls: bool) -> None:
    epp = clusters(config(epp_tls=tls))["epp"]
    assert addresses(epp) == [("127.0.0.1", 9002)]
    (protocol,) = epp["typed_extension_protocol_options"].values()
    assert "http2_protocol_options" in protocol["explicit_http_config"]
    if tls:
        context = epp["transport_socket"]["typed_config"]["common_tls_context"]
        assert context == {"validation_context": {}, "alpn_protocols": ["h2"]}  # nothing is verified
    else:
        assert "transport_socket" not in epp


def test_long_answers_are_not_cut_and_limits_do_not_bite_before_the_picker() -> None:
    made = config()
    assert route(made)["timeout"] == "0s"
    assert manager(made)["stream_idle_timeout"] == "3600s"
    for cluster in clusters(made).values():
        (thresholds,) = cluster["circuit_breakers"]["thresholds"]
        assert min(thresholds.values()) >= 1_000_000
        assert set(thresholds) == {"max_connections", "max_pending_requests", "max_requests", "max_retries"}


def test_idle_connections_are_dropped_before_the_engine_drops_them() -> None:
    (protocol,) = clusters(config())["pool"]["typed_extension_protocol_options"].values()
    assert protocol["common_http_protocol_options"]["idle_timeout"] == "4s"


def test_admin_and_access_log_only_on_request() -> None:
    assert "admin" not in config()
    assert "access_log" not in manager(config())
    made = config(admin=Address("127.0.0.1", 9901), access_log=True)
    assert made["admin"]["address"]["socket_address"] == {"address": "127.0.0.1", "port_value": 9901}
    text = manager(made)["access_log"][0]["typed_config"]["log_format"]["text_format_source"]["inline_string"]
    assert all(field in text for field in ("%RESPONSE_CODE%", "%RESPONSE_CODE_DETAILS%", "%UPSTREAM_HOST%"))
    assert text.endswith("\n")


def test_the_text_is_readable_yaml_with_envoy_s_field_names() -> None:
    text = to_yaml(build_bootstrap(OPTIONS))
    assert "'@type': type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor" in text
    assert "static_resources:" in text
    assert text == render(OPTIONS)


# --- flags


def parse(*argv: str) -> EnvoyOptions:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_envoy_arguments(parser)
    return envoy_options(parser.parse_args(argv), endpoints=OPTIONS.endpoints, epp=OPTIONS.epp, epp_tls=False)


def test_flags_default_to_a_public_gateway_on_8080() -> None:
    options = parse()
    assert options.listen == Address("0.0.0.0", 8080)
    assert options.endpoints == OPTIONS.endpoints
    assert (options.epp, options.epp_tls) == (OPTIONS.epp, False)
    assert (options.response_body, options.destination) == (True, Destination.OVERRIDE_HOST)
    assert options.admin is None
    assert options.concurrency is None


def test_every_flag_reaches_the_options() -> None:
    options = parse(
        *("--listen", "[::1]:80", "--no-response-body", "--destination", "original-dst", "--admin-port", "9901", "--access-log"),
        *("--envoy-concurrency", "2", "--envoy-log-level", "info", "--envoy-path", "/opt/envoy"),
    )
    assert options.listen == Address("::1", 80)
    assert not options.response_body
    assert options.destination is Destination.ORIGINAL_DST
    assert options.admin == Address("127.0.0.1", 9901)
    assert options.access_log
    assert (options.concurrency, options.log_level, options.envoy_path) == (2, "info", "/opt/envoy")


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (("--listen", "8080"), "HOST:PORT"),
        (("--listen", "localhost:8080"), "not an IP address"),
        (("--listen", ":0"), "1 to 65535"),
        (("--admin-port", "0"), "not a port"),
        (("--envoy-concurrency", "0"), "at least 1"),
        (("--destination", "round-robin"), "invalid"),
    ],
)
def test_a_wrong_flag_says_what_is_wrong(argv: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(argparse.ArgumentError, match=complaint):
        parse(*argv)


def test_the_flags_need_nothing_of_the_optional_extra() -> None:
    script = "import sys; sys.modules['envoy_data_plane'] = sys.modules['envoy'] = None; import epp.envoy"
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
