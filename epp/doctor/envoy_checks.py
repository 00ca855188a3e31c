"""Does this Envoy call the picker as it must, and show it what it needs? The ext_proc filter and what is around it. Pure.

Where the request then goes: envoy_cluster_checks. Each check looks at every Way and says which one it means.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

from epp.doctor.documents import Json, duration_s, enum, items, message, number
from epp.doctor.envoy_config import BODY_MODES, HEADER_MODES, ROUTER, EnvoyFacts, Way, config_of, type_of
from epp.doctor.findings import Check, Finding, fail, ok, warn
from epp.extproc.codec import DESTINATION, LB_NAMESPACE, SUBSET_NAMESPACE

FULL_DUPLEX = "FULL_DUPLEX_STREAMED"
BUFFER_BYTES_DEFAULT = 1 << 20
BUFFER_BYTES_WANTED = 4 << 20
"""A prompt of a million tokens."""
MESSAGE_TIMEOUT_DEFAULT_S = 0.2
MESSAGE_TIMEOUT_WANTED_S = 5.0
STREAM_IDLE_DEFAULT_S = 300.0
ROUTE_TIMEOUT_DEFAULT_S = 15.0
ROUTE_TIMEOUT_WANTED_S = 60.0
CHAINED_VERSION = (1, 39)
"""From here on two full-duplex filters in one chain work (envoy#41654)."""
_HEADER_MUTATION = "header_mutation"
_ROUTER_NAME = "envoy.filters.http.router"


def each_way(judge: Callable[[Way, EnvoyFacts], Iterator[Finding]]) -> Callable[[EnvoyFacts], Iterator[Finding]]:
    """A check of every way; a finding that is the same for several is said once, with all their names."""

    def run(envoy: EnvoyFacts) -> Iterator[Finding]:
        found: dict[Finding, list[str]] = {}
        for way in envoy.ways:
            for finding in judge(way, envoy):
                found.setdefault(finding, []).append(way.where)
        for finding, where in found.items():
            more = f" and {len(where) - 3} more" if len(where) > 3 else ""
            yield finding._replace(text=f"{', '.join(dict.fromkeys(where[:3]))}{more}: {finding.text}")

    return run


def present(envoy: EnvoyFacts) -> Iterator[Finding]:
    if not envoy.ways:
        yield fail(
            f"{envoy.source} has no ext_proc filter that calls a picker",
            "the picker is never asked: requests are balanced as if it were not there",
            "put envoy.filters.http.ext_proc before the router (`epp envoy-config --endpoint IP:PORT` prints a whole configuration); if it is there, name its cluster: --envoy-cluster",
        )
    for way in envoy.ways:
        if not any(_is_router(each) for each in way.after):
            yield fail(
                f"{way.where}: no router comes after the ext_proc filter",
                "it is never asked",
                "make envoy.filters.http.router the last HTTP filter",
            )
        if way.picker is None and way.picker_cluster_name:
            yield fail(
                f"{way.where}: the cluster {way.picker_cluster_name!r} does not exist",
                "every request is a 500, or passes unpicked with failure_mode_allow",
                f"add a cluster of that name, or correct grpc_service.envoy_grpc.cluster_name ({way.where})",
            )


def _is_router(each: Json) -> bool:
    return type_of(each) == ROUTER or each.get("name") == _ROUTER_NAME


def request_modes(way: Way, _envoy: EnvoyFacts) -> Iterator[Finding]:
    mode = way.request_body_mode
    trailers = enum(way.mode.get("request_trailer_mode"), HEADER_MODES)
    if enum(way.mode.get("request_header_mode"), HEADER_MODES) == "SKIP":
        yield fail(
            "request_header_mode is SKIP", "the picker sees no request: nothing is picked", "processing_mode: {request_header_mode: SEND}"
        )
    if mode == "NONE":
        yield fail(
            "request_body_mode is NONE",
            "the picker sees no prompt and no model: no cache-aware routing, no 404 for unknown models",
            "processing_mode: {request_body_mode: FULL_DUPLEX_STREAMED, request_trailer_mode: SEND}",
        )
    elif mode == "STREAMED":
        yield fail(
            "request_body_mode is STREAMED",
            "Envoy takes the route when the headers are answered, before the picker has read the prompt: the pick is by load alone, or too late",
            "processing_mode: {request_body_mode: FULL_DUPLEX_STREAMED, request_trailer_mode: SEND}",
        )
    elif mode == FULL_DUPLEX and trailers != "SEND":
        yield fail(
            f"request_body_mode is {FULL_DUPLEX}, request_trailer_mode {trailers}",
            "Envoy rejects the configuration: `FULL_DUPLEX_STREAMED ... request_trailer_mode`, or a request with trailers hangs",
            "processing_mode: {request_trailer_mode: SEND}",
        )
    elif mode not in BODY_MODES or mode == "GRPC":
        yield fail(
            f"request_body_mode is {mode}", "Envoy does not implement it", "processing_mode: {request_body_mode: FULL_DUPLEX_STREAMED}"
        )


def request_size(way: Way, _envoy: EnvoyFacts) -> Iterator[Finding]:
    limit = number(message(way.processor, "grpc_service", "envoy_grpc").get("max_receive_message_length"))
    if limit and limit < BUFFER_BYTES_WANTED:
        yield warn(
            f"max_receive_message_length is {limit:g} bytes",
            "an answer that carries a longer body back is a 500 `gRPC_error_8`",
            "remove it: by default there is no limit",
        )
    if way.request_body_mode not in ("BUFFERED", "BUFFERED_PARTIAL"):
        return
    whole = max(
        number(way.listener.get("per_connection_buffer_limit_bytes")) or BUFFER_BYTES_DEFAULT,
        *(number(host.get("request_body_buffer_limit")) or 0 for host in way.hosts or [{}]),
    )
    if whole < BUFFER_BYTES_WANTED:
        effect = (
            "a longer prompt is a 413 before the picker sees it"
            if way.request_body_mode == "BUFFERED"
            else "of longer prompts the picker sees the beginning only"
        )
        yield warn(
            f"{way.request_body_mode} with a buffer of {whole:g} bytes",
            effect,
            f"raise the listener's per_connection_buffer_limit_bytes to {BUFFER_BYTES_WANTED} or more, or use {FULL_DUPLEX}, which has no such limit",
        )


def response_modes(way: Way, _envoy: EnvoyFacts) -> Iterator[Finding]:
    mode = way.response_body_mode
    headers = enum(way.mode.get("response_header_mode"), HEADER_MODES)
    if headers == "SKIP":
        yield warn(
            "response_header_mode is SKIP",
            "the picker does not learn when a request is answered, by whom, and with which status: no outlier ejection",
            "processing_mode: {response_header_mode: SEND}",
        )
    if mode == "BUFFERED":
        yield fail(
            "response_body_mode is BUFFERED",
            "streamed answers are held back until their end, and those over the buffer limit are a 500 `response_payload_too_large`",
            "processing_mode: {response_body_mode: NONE} (or FULL_DUPLEX_STREAMED with response_trailer_mode: SEND, for token counts)",
        )
    elif mode == FULL_DUPLEX and enum(way.mode.get("response_trailer_mode"), HEADER_MODES) != "SEND":
        yield fail(
            f"response_body_mode is {FULL_DUPLEX} without response_trailer_mode: SEND",
            "Envoy rejects the configuration, or gRPC answers hang",
            "processing_mode: {response_trailer_mode: SEND}",
        )
    elif mode in (FULL_DUPLEX, "STREAMED"):
        yield ok(
            f"response_body_mode {mode}: token counts and latencies, for one message each way per streamed chunk; a restart of the picker cuts the answers under way (NONE does not)"
        )
    elif mode == "NONE":
        yield ok("response_body_mode NONE: the cheapest; the picker counts no output tokens")


def timeouts(way: Way, _envoy: EnvoyFacts) -> Iterator[Finding]:
    timeout_s = duration_s(way.processor.get("message_timeout"))
    if way.request_body_mode != FULL_DUPLEX and (MESSAGE_TIMEOUT_DEFAULT_S if timeout_s is None else timeout_s) < MESSAGE_TIMEOUT_WANTED_S:
        yield warn(
            f"message_timeout is {MESSAGE_TIMEOUT_DEFAULT_S if timeout_s is None else timeout_s:g} s"
            + (" (the default)" if timeout_s is None else ""),
            "a request that waits in the picker's queue, or meets a garbage collection, is a 504",
            "message_timeout: 60s (in FULL_DUPLEX_STREAMED it is never applied)",
        )
    idle_s = duration_s(way.manager.get("stream_idle_timeout"))
    if idle_s == 0 and way.request_body_mode == FULL_DUPLEX:
        yield warn(
            "stream_idle_timeout is off",
            "in full-duplex mode it is the only time-out: if the picker hangs, so does every request, for ever",
            "stream_idle_timeout: 600s",
        )
    elif idle_s is not None and 0 < idle_s < ROUTE_TIMEOUT_WANTED_S:
        yield warn(
            f"stream_idle_timeout is {idle_s:g} s",
            "a prompt that prefills or queues longer than that without a byte is a 504 `stream_idle_timeout`",
            f"stream_idle_timeout: {STREAM_IDLE_DEFAULT_S:g}s or more",
        )


def route_timeouts(way: Way, _envoy: EnvoyFacts) -> Iterator[Finding]:
    for route in way.routes:
        if not message(route, "route"):
            continue
        timeout_s = duration_s(message(route, "route").get("timeout"))
        effective_s = ROUTE_TIMEOUT_DEFAULT_S if timeout_s is None else timeout_s
        if 0 < effective_s < ROUTE_TIMEOUT_WANTED_S:
            yield warn(
                f"a route's timeout is {effective_s:g} s" + (" (the default)" if timeout_s is None else ""),
                "answers that take longer are cut: a 504, or a truncated stream",
                "route: {timeout: 0s} (stream_idle_timeout still ends silent ones), or as long as your longest answer",
            )


def failure_mode(way: Way, _envoy: EnvoyFacts) -> Iterator[Finding]:
    if not way.processor.get("failure_mode_allow"):
        return
    if any(enum(pool.get("type"), ("STATIC",)) == "ORIGINAL_DST" for pool in way.pools):
        yield warn(
            "failure_mode_allow with an ORIGINAL_DST cluster",
            "without a picker there is no destination: requests are a 503 all the same",
            "use an override_host cluster to fail open (`epp envoy-config --destination override-host`), or set failure_mode_allow: false",
        )
    elif way.request_body_mode == FULL_DUPLEX:
        yield warn(
            f"failure_mode_allow with {FULL_DUPLEX}",
            "requests with a body fail open only before their first chunk has gone to the picker: most are a 500 when it is down (envoy#41276)",
            "run two pickers with a health check on their cluster and healthy_panic_threshold 0; BUFFERED mode fails open in all cases",
        )


def metadata(way: Way, envoy: EnvoyFacts) -> Iterator[Finding]:
    options = message(way.processor, "metadata_options")
    receiving = _untyped(options, "receiving_namespaces")
    forwarding = _untyped(options, "forwarding_namespaces")
    if LB_NAMESPACE not in receiving:
        reads_metadata = any("override_host" in json.dumps(pool) for pool in way.pools)
        say = fail if reads_metadata else warn
        yield say(
            f"metadata_options.receiving_namespaces does not have {LB_NAMESPACE}",
            "the destination in dynamic metadata is dropped without a word"
            + (": requests go round robin" if reads_metadata else " (the header still counts)"),
            f"metadata_options: {{receiving_namespaces: {{untyped: [{LB_NAMESPACE}]}}}}",
        )
    if SUBSET_NAMESPACE not in forwarding and _hinted(way, envoy):
        yield fail(
            f"metadata_options.forwarding_namespaces does not have {SUBSET_NAMESPACE}, which this configuration sets",
            "the picker does not see the gateway's subset and picks endpoints outside of it",
            f"metadata_options: {{forwarding_namespaces: {{untyped: [{LB_NAMESPACE}, {SUBSET_NAMESPACE}]}}}}",
        )
    attributes = way.processor.get("response_attributes") or []
    if LB_NAMESPACE not in forwarding and "upstream.address" not in attributes:
        yield warn(
            "the picker is not told who served",
            "after a retry it charges the wrong endpoint, and can't eject one that refuses connections",
            f"response_attributes: [upstream.address, response.code_details], or forwarding_namespaces: {{untyped: [{LB_NAMESPACE}]}} with selected_host_key",
        )


def _hinted(way: Way, envoy: EnvoyFacts) -> bool:
    """A filter or a cluster other than ext_proc has to do with subset hints."""
    processors = sum(json.dumps(each.processor).count(SUBSET_NAMESPACE) for each in envoy.ways)
    return envoy.text.count(SUBSET_NAMESPACE) > processors or any(SUBSET_NAMESPACE in json.dumps(each) for each in way.before)


def _untyped(options: Json, name: str) -> list[str]:
    found = message(options, name).get("untyped")
    return [str(each) for each in found] if isinstance(found, list) else []


def header_strip(way: Way, _envoy: EnvoyFacts) -> Iterator[Finding]:
    if not any(_removes_destination(each) for each in way.before):
        yield warn(
            f"no filter before ext_proc removes a client's own {DESTINATION}",
            "where the picker is not asked (another route, failing open) a client chooses the pod its request goes to",
            "envoy.filters.http.header_mutation before ext_proc: mutations: {request_mutations: [{remove: " + DESTINATION + "}]}",
        )
    scopes = [*way.routes, *way.hosts, message(way.manager, "route_config")]
    if any(DESTINATION in (scope.get("request_headers_to_remove") or []) for scope in scopes) or any(
        _removes_destination(each) for each in way.after
    ):
        yield fail(
            f"{DESTINATION} is removed after ext_proc",
            "the picker's own answer is removed: 503 with ORIGINAL_DST",
            "remove it in a filter before ext_proc, not in request_headers_to_remove",
        )


def _removes_destination(each: Json) -> bool:
    if _HEADER_MUTATION not in type_of(each) and _HEADER_MUTATION not in str(each.get("name", "")):
        return False
    mutations = items(message(config_of(each), "mutations"), "request_mutations")
    return any(str(mutation.get("remove", "")).lower() == DESTINATION for mutation in mutations)


def rules(way: Way, _envoy: EnvoyFacts) -> Iterator[Finding]:
    allowed = message(way.processor, "mutation_rules")
    if number(allowed.get("disallow_all")) or allowed.get("disallow_all") is True:
        yield fail(
            "mutation_rules.disallow_all is set", "the destination header is dropped: 503 with ORIGINAL_DST", "remove mutation_rules"
        )
    if way.processor.get("disable_immediate_response"):
        yield fail(
            "disable_immediate_response is set",
            "the picker's own answers (503 no endpoint, 429 shed, 404 no such model) become a 500",
            "remove disable_immediate_response",
        )
    if way.processor.get("observability_mode"):
        yield fail("observability_mode is set", "Envoy does not wait for the picker: nothing is picked", "remove observability_mode")


def chained(way: Way, envoy: EnvoyFacts) -> Iterator[Finding]:
    version = tuple(int(part) for part in envoy.version.split(".")[:2]) if envoy.version else ()
    if way.other_processors and way.response_body_mode == FULL_DUPLEX and (not version or version < CHAINED_VERSION):
        yield warn(
            f"{way.other_processors + 1} ext_proc filters in one chain, this one {FULL_DUPLEX} in both directions"
            + (f", on Envoy {envoy.version}" if version else ""),
            "before Envoy 1.39 two such filters lose the response's body: 200 with nothing in it (envoy#41654)",
            "Envoy 1.39.3 or later, or response_body_mode: NONE for the picker",
        )


CHECKS = (
    Check("envoy-ext-proc", "an ext_proc filter calls the picker, before the router", ("envoy",), present),
    Check("envoy-request-mode", "the picker sees headers, body and trailers of requests", ("envoy",), each_way(request_modes)),
    Check("envoy-request-size", "long prompts reach the picker", ("envoy",), each_way(request_size)),
    Check("envoy-response-mode", "what the picker sees of answers", ("envoy",), each_way(response_modes)),
    Check("envoy-timeouts", "message_timeout and stream_idle_timeout", ("envoy",), each_way(timeouts)),
    Check("envoy-route-timeout", "routes let long answers finish", ("envoy",), each_way(route_timeouts)),
    Check("envoy-failure-mode", "failure_mode_allow does what it seems to", ("envoy",), each_way(failure_mode)),
    Check("envoy-metadata", "metadata namespaces are forwarded and received", ("envoy",), each_way(metadata)),
    Check("envoy-client-header", f"a client's own {DESTINATION} is removed, the picker's is not", ("envoy",), each_way(header_strip)),
    Check("envoy-rules", "nothing forbids the picker's answers", ("envoy",), each_way(rules)),
    Check("envoy-chain", "no second ext_proc filter gets in its way", ("envoy",), each_way(chained)),
)
