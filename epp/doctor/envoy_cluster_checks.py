"""The clusters: the picker's (HTTP/2, TLS, health) and the pool's (does the pick decide?). Pure."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from epp.doctor.documents import Json, duration_s, enum, items, message, number
from epp.doctor.envoy_checks import each_way
from epp.doctor.envoy_config import EnvoyFacts, Way, addresses, config_of, type_of
from epp.doctor.exchange import Exchange
from epp.doctor.findings import Check, Finding, fail, ok, skipped, warn
from epp.doctor.grpc_client import HostPort, PortFacts
from epp.doctor.picker_checks import is_self_signed
from epp.extproc.codec import DESTINATION, LB_NAMESPACE
from epp.extproc.health import SERVICES

PROTOCOL_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
TLS_CONTEXT = "envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext"
OVERRIDE_HOST = "envoy.extensions.load_balancing_policies.override_host.v3.OverrideHost"
REQUESTS_DEFAULT = 1_024
"""Envoy's circuit breakers, where a cluster sets none."""
IDLE_PROBE_DEFAULT_S = 60.0
_DISCOVERY = ("STATIC", "STRICT_DNS", "LOGICAL_DNS", "EDS", "ORIGINAL_DST")
_TWICE = frozenset({"5xx", "gateway-error", "reset"})
"""Retry conditions under which an engine may already be at work on the request."""


def destination(way: Way, _envoy: EnvoyFacts) -> Iterator[Finding]:
    """The pool's cluster reads the pick."""
    for pool in way.pools:
        name = pool.get("name", "")
        if _discovery(pool) == "ORIGINAL_DST":
            yield from _original_destination(str(name), pool)
            continue
        policy = _override_host(pool)
        if policy is not None:
            yield from _overriding(str(name), policy)
        elif DESTINATION in json.dumps(message(pool, "lb_subset_config")):
            yield ok(f"cluster {name} chooses by subset")
        else:
            yield fail(
                f"the cluster {name} does not read the picker's choice: its load balancing is {pool.get('lb_policy', 'ROUND_ROBIN')}",
                "requests go anywhere: the picker decides and nobody listens",
                "load_balancing_policy: envoy.load_balancing_policies.override_host with override_host_sources: [{metadata: {key: envoy.lb, path: [{key: "
                + DESTINATION
                + "}]}}], or type: ORIGINAL_DST with original_dst_lb_config: {use_http_header: true, http_header_name: "
                + DESTINATION
                + "}",
            )


def _original_destination(name: str, pool: Json) -> Iterator[Finding]:
    config = message(pool, "original_dst_lb_config")
    header = str(config.get("http_header_name") or "x-envoy-original-dst-host").lower()
    if not config.get("use_http_header") or header != DESTINATION:
        yield fail(
            f"cluster {name} is ORIGINAL_DST and reads " + (f"the header {header}" if config.get("use_http_header") else "no header"),
            "requests are a 503, or go to the address the client connected to",
            f"original_dst_lb_config: {{use_http_header: true, http_header_name: {DESTINATION}}}",
        )


def _overriding(name: str, policy: Json) -> Iterator[Finding]:
    sources = items(policy, "override_host_sources")
    by_metadata = [each for each in sources if _path_of(message(each, "metadata")) == (LB_NAMESPACE, DESTINATION)]
    by_header = [each for each in sources if str(each.get("header", "")).lower() == DESTINATION]
    if not by_metadata and not by_header:
        yield fail(
            f"cluster {name} has override_host, but reads neither {LB_NAMESPACE}/{DESTINATION} nor the header",
            "requests go to its fallback policy, round robin",
            f"override_host_sources: [{{metadata: {{key: {LB_NAMESPACE}, path: [{{key: {DESTINATION}}}]}}}}]",
        )
    if by_metadata and by_header:
        yield warn(
            f"cluster {name} reads the pick from metadata and from the header",
            "the two lists are put together: each endpoint is tried twice before the next",
            "override_host_sources: one source, the metadata",
        )


def _path_of(key: Json) -> tuple[str, str]:
    path = items(key, "path")
    return str(key.get("key", "")), str(path[0].get("key", "")) if path else ""


def fallbacks(envoy: EnvoyFacts, exchange: Exchange) -> Iterator[Finding]:
    """A comma list of endpoints, against what each pool's cluster makes of it."""
    several = "," in (exchange.header or exchange.metadata or "")
    for way in envoy.ways:
        for pool in way.pools:
            name = pool.get("name", "")
            if several and _override_host(pool) is None:
                yield fail(
                    f"{way.where}: the picker names several endpoints ({exchange.header or exchange.metadata}), cluster {name} understands one",
                    "every request is a 503 (ORIGINAL_DST: `UH`)",
                    "let the picker send one endpoint (max-score-picker: maxNumOfEndpoints: 1), or use an override_host cluster",
                )
    if several:
        for way in envoy.ways:
            if any(_override_host(pool) is not None for pool in way.pools) and not any(_retries(way)):
                yield warn(
                    f"{way.where}: the picker names fallback endpoints, the route has no retry_policy",
                    "they are never used: an endpoint that refuses connections is a 503",
                    'route: {retry_policy: {retry_on: "connect-failure,refused-stream,reset-before-request", num_retries: 2}}',
                )


def retries(way: Way, _envoy: EnvoyFacts) -> Iterator[Finding]:
    for policy in _retries(way):
        conditions = {each.strip() for each in str(policy.get("retry_on", "")).split(",")}
        if conditions & _TWICE:
            yield warn(
                f"retry_on has {', '.join(sorted(conditions & _TWICE))}",
                "a request an engine already works on is sent again: long prompts are computed twice, when the pool is least able to",
                "retry_on: connect-failure,refused-stream,reset-before-request",
            )


def _retries(way: Way) -> Iterator[Json]:
    for scope in [*(message(route, "route") for route in way.routes), *way.hosts]:
        if "retry_policy" in scope:
            yield message(scope, "retry_policy")


def http2(way: Way, _envoy: EnvoyFacts) -> Iterator[Finding]:
    if way.picker is None:
        return
    options = message(way.picker, "typed_extension_protocol_options", PROTOCOL_OPTIONS)
    has = "http2_protocol_options" in message(options, "explicit_http_config") or "http2_protocol_options" in way.picker
    if not has and "auto_config" not in options:
        yield fail(
            f"cluster {way.picker_cluster_name} does not speak HTTP/2",
            "gRPC needs it: every request is a 500 (`protocol error`, `connection_termination`)",
            f"typed_extension_protocol_options: {{{PROTOCOL_OPTIONS}: {{explicit_http_config: {{http2_protocol_options: {{}}}}}}}} "
            "(in Kubernetes: the Service port's appProtocol: http2 or kubernetes.io/h2c)",
        )
    if "auto_config" in options and _tls(way.picker) is None:
        yield fail(
            f"cluster {way.picker_cluster_name} has auto_config without TLS",
            "without ALPN Envoy falls back to HTTP/1.1: 500",
            "explicit_http_config: {http2_protocol_options: {}}",
        )


def tls(envoy: EnvoyFacts, ports: Mapping[HostPort, PortFacts]) -> Iterator[Finding]:
    """The cluster's side of the connection against what the port really speaks."""
    for way in envoy.ways:
        context = _tls(way.picker)
        if not addresses(way.picker):
            yield skipped(f"{way.where}: the configuration does not say where its cluster {way.picker_cluster_name} is")
        for address in addresses(way.picker):
            port = ports.get(address)
            if port is None or port.error:
                yield skipped(f"{way.where}: {address} can't be reached from here{f': {port.error}' if port else ''}")
                continue
            if context is not None and not port.tls:
                yield fail(
                    f"{way.where}: cluster {way.picker_cluster_name} speaks TLS, {address} plaintext",
                    "every request is a 500: `WRONG_VERSION_NUMBER` in response code details",
                    "start the picker with --secure-serving (the default), or remove the cluster's transport_socket",
                )
            elif context is None and port.tls:
                yield fail(
                    f"{way.where}: cluster {way.picker_cluster_name} speaks plaintext, {address} TLS",
                    "every request is a 500: `connection_termination` in response code details",
                    "start the picker with --secure-serving=false, or give the cluster a transport_socket: {name: envoy.transport_sockets.tls, typed_config: "
                    '{"@type": type.googleapis.com/' + TLS_CONTEXT + ", common_tls_context: {validation_context: {}}}}",
                )
            elif context is not None and _verifies(context) and is_self_signed(port.certificate_der):
                yield warn(
                    f"{way.where}: cluster {way.picker_cluster_name} verifies certificates, {address} presents a self-signed one",
                    "500 `CERTIFICATE_VERIFY_FAILED`, unless that very certificate is its trusted_ca",
                    "give the picker a certificate of that authority (--cert-path DIR), or validation_context: {}",
                )


def _tls(cluster: Json | None) -> Json | None:
    socket = message(cluster, "transport_socket")
    return config_of(socket) if type_of(socket) == TLS_CONTEXT or "tls" in str(socket.get("name", "")) else None


def _verifies(context: Json) -> bool:
    common = message(context, "common_tls_context")
    validation = message(common, "validation_context") or message(common, "combined_validation_context", "default_validation_context")
    sources = (
        "trusted_ca",
        "match_typed_subject_alt_names",
        "match_subject_alt_names",
        "verify_certificate_hash",
        "verify_certificate_spki",
    )
    return any(validation.get(name) for name in sources) and not validation.get("trust_chain_verification")


def health(way: Way, _envoy: EnvoyFacts) -> Iterator[Finding]:
    if way.picker is None:
        return
    name = way.picker_cluster_name
    checks = items(way.picker, "health_checks")
    panic = message(way.picker, "common_lb_config").get("healthy_panic_threshold")
    if not checks:
        if len(addresses(way.picker)) > 1 or _discovery(way.picker) in ("STRICT_DNS", "EDS"):
            yield warn(
                f"cluster {name} has no health check",
                "a picker that drains or hangs gets requests until its endpoint is gone: 500s during rollouts",
                f"health_checks: [{{timeout: 2s, interval: 2s, no_traffic_interval: 2s, unhealthy_threshold: 2, healthy_threshold: 1, grpc_health_check: {{service_name: {SERVICES[-1]}}}}}]",
            )
        return
    if panic is None or number(panic) != 0:
        yield warn(
            f"cluster {name} has health checks, its healthy_panic_threshold is {'50 % (the default)' if panic is None else number(panic)}",
            "when all pickers are NOT_SERVING, or half of two, Envoy sends requests to them all the same",
            "common_lb_config: {healthy_panic_threshold: {value: 0}}",
        )
    for check in checks:
        idle_s = duration_s(check.get("no_traffic_interval"))
        if idle_s is None or idle_s >= IDLE_PROBE_DEFAULT_S:
            yield warn(
                f"cluster {name} probes every {IDLE_PROBE_DEFAULT_S if idle_s is None else idle_s:g} s while there is no traffic",
                "the first requests after a quiet time meet a dead picker",
                "no_traffic_interval: 2s",
            )
        if "grpc_health_check" not in check:
            yield warn(
                f"cluster {name} probes otherwise than by gRPC health",
                "an open port is taken for a ready picker",
                f"grpc_health_check: {{service_name: {SERVICES[-1]}}}",
            )


def limits(way: Way, _envoy: EnvoyFacts) -> Iterator[Finding]:
    """Envoy's circuit breakers: an ext_proc stream lasts as long as its request, so 1 024 is soon reached."""
    for cluster in ([way.picker] if way.picker is not None else []) + list(way.pools):
        thresholds = items(message(cluster, "circuit_breakers"), "thresholds")
        default = next((each for each in thresholds if enum(each.get("priority"), ("DEFAULT", "HIGH")) == "DEFAULT"), {})
        low = [
            f"{name} {int(value)}"
            for name in ("max_requests", "max_pending_requests")
            if (value := _limit(default, name)) <= REQUESTS_DEFAULT
        ]
        if low:
            picker = cluster is way.picker
            yield warn(
                f"cluster {cluster.get('name', '')} has circuit breakers at {', '.join(low)}",
                "of more requests at once, the rest is a "
                + ("500" if picker else "503 `upstream_max_requests`/`overflow`")
                + ": the picker can't queue them",
                "circuit_breakers: {thresholds: [{max_connections: 1000000, max_pending_requests: 1000000, max_requests: 1000000, max_retries: 1000000}]}",
            )


def _limit(thresholds: Json, name: str) -> float:
    value = number(thresholds.get(name))
    return REQUESTS_DEFAULT if value is None else value


def _discovery(cluster: Json) -> str:
    return enum(cluster.get("type"), _DISCOVERY)


def _override_host(pool: Json) -> Json | None:
    for policy in items(message(pool, "load_balancing_policy"), "policies"):
        extension = message(policy, "typed_extension_config")
        if type_of(extension) == OVERRIDE_HOST:
            return config_of(extension)
    return None


CHECKS = (
    Check("envoy-destination", "the pool's cluster goes where the picker says", ("envoy",), each_way(destination)),
    Check("envoy-fallbacks", "lists of endpoints are understood, and retried", ("envoy", "full_duplex"), fallbacks),
    Check("envoy-retries", "retries do not repeat work", ("envoy",), each_way(retries)),
    Check("envoy-http2", "the picker's cluster speaks HTTP/2", ("envoy",), each_way(http2)),
    Check("envoy-tls", "the picker's cluster and its port agree about TLS", ("envoy", "picker_ports"), tls),
    Check("envoy-health", "the picker's cluster is health-checked, and believed", ("envoy",), each_way(health)),
    Check("envoy-limits", "circuit breakers let the picker decide who waits", ("envoy",), each_way(limits)),
)
