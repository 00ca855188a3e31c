"""Is the running picker reachable, healthy and right? Pure: facts in, findings out."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Mapping, Sequence

from cryptography import x509

from epp.config.schema import EndpointPickerConfig
from epp.doctor.engine_facts import EndpointFacts
from epp.doctor.exchange import BUFFERED, Exchange
from epp.doctor.findings import Check, Finding, fail, ok, warn
from epp.doctor.grpc_client import PortFacts
from epp.doctor.http_fetch import Answer
from epp.doctor.picker_facts import Running
from epp.engines.exposition import find_all, labels_of, values
from epp.extproc.health import EXT_PROC_SERVICE, LIVENESS

EXPIRY_WARN_DAYS = 14
LATENCY_WARN_S = 0.05
"""A decision takes under a millisecond; a round trip in a cluster one or two."""
STALE_S = 10.0
"""From here on a reading counts nothing (epp.freshness)."""
SKEW_WARN_S = 5.0
NAMES_SHOWN = 5
MARK = b"llm_d_epp_"
"""In every exposition of a picker, ours and the reference's since v0.9."""


def port_open(port: PortFacts) -> Iterator[Finding]:
    if port.error:
        yield fail(
            f"{port.address} can't be reached: {port.error}",
            "the gateway answers 500 with `ext_proc_error_gRPC_error_14`, or with failure_mode_allow lets requests by unpicked",
            "start the picker (`epp serve`), and look at --grpc-port, --bind-address, the Service and NetworkPolicies",
        )
    elif port.ends_at_once:
        yield warn(
            f"{port.address} hangs up after the TLS handshake: it takes only clients with a certificate it trusts (--client-ca-file)",
            "a gateway without one answers 500 (`CERTIFICATE_REQUIRED`)",
            "give the gateway a client certificate of that authority; for this check, --client-cert-path DIR",
        )
    elif not port.http2:
        yield fail(
            f"{port.address} is open but no HTTP/2 server: "
            + ("TLS, but then no SETTINGS frame" if port.tls else "neither TLS nor plaintext"),
            "the gateway answers 500",
            "is this the ext_proc port (9002)? 9090 is HTTP/1.1 metrics",
        )
    elif port.tls and port.alpn != "h2":
        yield fail(
            f"{port.address} speaks {port.tls_version} but does not agree to h2 by ALPN",
            "gateways that need ALPN fall back to HTTP/1.1 and answer 500",
            "offer h2 in ALPN on the TLS in front of the picker (the picker itself does)",
        )
    else:
        yield ok(f"{port.address} serves HTTP/2 " + (f"with {port.tls_version}, ALPN h2" if port.tls else "in plaintext"))


def certificate(port: PortFacts, now: dt.datetime) -> Iterator[Finding]:
    if not port.tls:
        yield ok("plaintext: there is no certificate")
        return
    try:
        found = x509.load_der_x509_certificate(port.certificate_der)
    except ValueError as error:
        yield fail(f"the certificate can't be read: {error}", "gateways refuse it", "give --cert-path another tls.crt")
        return
    left_days = (found.not_valid_after_utc - now).total_seconds() / 86_400
    renew = "renew tls.crt and tls.key in --cert-path (they are read again by themselves), or leave --cert-path out: gateways do not verify"
    if left_days <= 0:
        yield fail(
            f"the certificate expired {found.not_valid_after_utc:%Y-%m-%d}",
            "gateways that verify answer 500 `CERTIFICATE_VERIFY_FAILED`",
            renew,
        )
    elif left_days <= EXPIRY_WARN_DAYS:
        yield warn(f"the certificate expires in {left_days:.0f} days", "then gateways that verify answer 500", renew)
    if found.not_valid_before_utc > now:
        yield fail(
            f"the certificate is valid only from {found.not_valid_before_utc:%Y-%m-%d %H:%M}",
            "gateways that verify answer 500",
            "set the clocks right, or renew it",
        )


def is_self_signed(der: bytes) -> bool:
    """Also where it has no name a client could verify."""
    try:
        found = x509.load_der_x509_certificate(der)
    except ValueError:
        return False
    return found.issuer == found.subject


def healthy(services: Mapping[str, str]) -> Iterator[Finding]:
    bad = {name or '""': said for name, said in services.items() if said != "SERVING"}
    if not bad:
        yield ok(f"SERVING by all of {len(services)} names")
    elif services.get(LIVENESS) == "SERVING" and set(bad.values()) == {"NOT_SERVING"}:
        yield fail(
            "the picker lives but is not ready: draining, without a synced pool, or not the leader",
            "Kubernetes takes it out of its Service; an Envoy with a health check sends it nothing: 500 or 503",
            "with --ha-enable-leader-election ask the leader; else look in its log for the pool (`kubectl logs`)",
        )
    elif EXT_PROC_SERVICE in bad and len(bad) == len(services):
        first = next(iter(bad.values()))
        yield fail(
            f"not SERVING: {first}",
            "probes fail: Kubernetes restarts the picker, Envoy's health check ejects it",
            "ask the right port, and look in the picker's log",
        )
    else:
        yield fail(
            "not SERVING by every name: " + ", ".join(f"{name} {said}" for name, said in bad.items()),
            "a probe that asks by one of these names fails",
            f"probe by a name that is served: {', '.join(name for name, said in services.items() if said == 'SERVING' and name) or 'none is'}",
        )


def exchanged(exchange: Exchange) -> Iterator[Finding]:
    """A request's way through the picker, as a gateway sees it."""
    if exchange.silent_after:
        yield from _silent(exchange)
    elif exchange.error:
        yield fail(
            f"the exchange broke off: {exchange.error}",
            "the gateway answers 500 with `ext_proc_error_gRPC_error`",
            "is this an ext_proc server? see the picker's log",
        )
    elif exchange.immediate_status:
        yield _refused(exchange)
    elif exchange.header is None and exchange.metadata is None:
        yield fail(
            "the picker named no destination",
            "the gateway balances by itself, or answers 503 (ORIGINAL_DST)",
            "is this an endpoint picker? another ext_proc server may be listening there",
        )
    else:
        faults = [*_destination(exchange), *_manners(exchange)]
        yield from faults or [ok(f"destination {exchange.header} in header and metadata, body echoed, {exchange.latency_s * 1e3:.1f} ms")]


def _silent(exchange: Exchange) -> Iterator[Finding]:
    if exchange.mode == BUFFERED:
        yield fail(
            f"no answer after {exchange.silent_after}",
            "in BUFFERED mode the gateway sends no body before the headers are answered: every request is a 504 after message_timeout",
            "set request_body_mode: FULL_DUPLEX_STREAMED at the gateway (request_trailer_mode: SEND with it), or use a picker that answers headers at once",
        )
    else:
        yield fail(
            f"no answer after {exchange.silent_after}",
            "in FULL_DUPLEX_STREAMED mode there is no time-out: requests hang until stream_idle_timeout (5 min) and end as 504",
            "look at the picker's CPU and log; is it queueing (flow control, no endpoints)?",
        )


def _refused(exchange: Exchange) -> Finding:
    status, text = exchange.immediate_status, " ".join(exchange.immediate_text.split())
    said = f"the picker refused the sample request: {status} {text}"
    if status == 404:
        return warn(said, "nothing, if no engine serves that model", "give --model NAME, one your engines serve")
    if status == 503:
        return fail(said, "every request is a 503", "are there endpoints, and ready ones? see `picker-endpoints`")
    if status == 429:
        return warn(said, "requests are shed while the pool is saturated", "wait, or add model servers")
    return fail(said, f"requests like it are answered {status}", "see the picker's log")


def _destination(exchange: Exchange) -> Iterator[Finding]:
    if exchange.header is None:
        yield fail(
            f"the destination {exchange.metadata} is in dynamic metadata alone",
            "ORIGINAL_DST clusters, agentgateway and NGINX Gateway Fabric read the header: 503",
            "use a picker that sets header and metadata",
        )
    elif exchange.metadata is None or exchange.metadata_kind != "string_value":
        kind = f"as {exchange.metadata_kind}" if exchange.metadata is not None else "not at all"
        yield fail(
            f"the destination {exchange.header} is in the header, in metadata {kind}",
            "Istio, GKE and Envoy's override_host read metadata, a string: they fall back to round robin without a word",
            "use a picker that sets header and metadata",
        )
    elif exchange.header != exchange.metadata:
        yield fail(
            f"header says {exchange.header}, metadata {exchange.metadata}",
            "which one serves depends on the gateway",
            "use a picker that sets both alike",
        )
    if exchange.header is not None and not exchange.raw:
        yield fail(
            "the header's value is in `value`, not in `raw_value`", "Envoy sets an empty header: 503 UH", "use a picker that sets raw_value"
        )
    if not exchange.body_echoed:
        yield fail(
            "the request's body did not come back whole",
            "in FULL_DUPLEX_STREAMED mode what is not sent back is lost: the model server gets an empty or truncated body",
            "use a picker that supports the mode, or set request_body_mode: BUFFERED",
        )


def _manners(exchange: Exchange) -> Iterator[Finding]:
    replies = exchange.replies or []
    if exchange.mode != BUFFERED and not exchange.streamed and exchange.body_echoed:
        yield fail(
            "the body came back as a plain body, not as streamed_response",
            "Envoy answers 500 `spurious_message`",
            "use a picker that supports FULL_DUPLEX_STREAMED",
        )
    if replies and replies[0] != "request_headers":
        yield fail(f"the first answer was {replies[0]}", "Envoy answers 500 `spurious_message`", "use a picker that answers headers first")
    if exchange.latency_s > LATENCY_WARN_S:
        yield warn(
            f"the decision took {exchange.latency_s * 1e3:.0f} ms",
            "time to first token grows by as much",
            "run this beside the gateway; if it stays so, look at the picker's CPU limit (throttling) and at `llm_d_epp_scheduler_e2e_duration_seconds`",
        )


def metrics(answer: Answer) -> Iterator[Finding]:
    if answer.status in (401, 403):
        yield warn(
            f"{answer.url} answers {answer.status}: it wants a token (--metrics-endpoint-auth)",
            "Prometheus gets the same without one",
            "give --metrics-token-file FILE here, `authorization.credentials` in the ServiceMonitor, and let its account `get` the nonResourceURL /metrics",
        )
    elif answer.status != 200 or MARK not in answer.body:
        yield fail(
            f"{answer.url} answers {answer.status}, and not with a picker's metrics",
            "dashboards, alerts and autoscalers that use them are blind",
            "is this the picker's --metrics-port (9090)?",
        )
    else:
        yield from _counted(answer.body)


def _counted(text: bytes) -> Iterator[Finding]:
    ready = values(text, b"llm_d_epp_ready_endpoints")
    if ready and not sum(ready):
        yield fail("no ready endpoint", "every request is a 503", "see `picker-endpoints`, and the model servers' own readiness")
    ejected = sum(values(text, b"epp_ejected_endpoints"))
    if ejected:
        yield warn(
            f"{ejected:g} endpoints are left out because requests to them failed",
            "the others carry their load",
            "see which: `/debug/endpoints`, state `ejected`; then that model server's log",
        )
    hits = {labels_of(labels).get("limit", ""): value for labels, value in find_all(text, b"epp_limit_hits_total") if value > 0}
    for name, count in hits.items():
        yield warn(
            f"the limit {name} was hit {count:g} times since the start",
            "requests were refused or labels folded",
            f"raise it if this is wanted: `epp serve --help`, {name}",
        )
    rejected = sum(value for labels, value in find_all(text, b"epp_config_reloads_total") if labels_of(labels).get("outcome") == "rejected")
    if rejected:
        yield warn(
            f"{rejected:g} changes of the configuration file were rejected",
            "the picker runs an older configuration than the file holds",
            "`epp check FILE` lists what is wrong with it",
        )


def endpoints(known: Sequence[EndpointFacts]) -> Iterator[Finding]:
    if not known:
        yield fail(
            "the picker knows no endpoint",
            "every request is a 503",
            "name some (--endpoint, --endpoints-file), or see that the pool's selector matches Ready pods",
        )
        return
    strange = [each for each in known if not each.known_to_picker]
    if strange and len(strange) < len(known):
        yield warn(
            f"not among the picker's endpoints: {_names(strange)}",
            "they get no requests",
            "add them to --endpoint or to the --endpoints-file, or label their pods as the pool's selector says",
        )
    ours = [each for each in known if each.known_to_picker]
    bad = [each for each in ours if each.state != "healthy"]
    if ours and not [each for each in ours if each.state in ("healthy", "half-open")]:
        yield fail(f"no endpoint is in service: {_names(bad)}", "requests are a 503 or go to failing engines", "see `engine-metrics`")
    elif bad:
        yield warn(
            f"{len(bad)} of {len(ours)} endpoints are not healthy: {_names(bad)}", "the others carry their load", "see `engine-metrics`"
        )
    old = [each for each in ours if each.reading_age_s is None or each.reading_age_s > STALE_S]
    if old:
        yield warn(
            f"no fresh metrics of {len(old)} endpoints: {_names(old)}",
            "they are routed to by the picker's own count alone: no queue, no cache use",
            "see `engine-metrics`; the picker asks at the endpoint's port, or at `metrics-data-source`'s `port` and `path`",
        )


def _names(which: Sequence[EndpointFacts]) -> str:
    said = [f"{each.name} ({each.address}{', ' + each.state if each.state else ''})" for each in which[:NAMES_SHOWN]]
    return ", ".join(said) + (f" and {len(which) - NAMES_SHOWN} more" if len(which) > NAMES_SHOWN else "")


def config_drift(config: EndpointPickerConfig, running: Running) -> Iterator[Finding]:
    wanted = {plugin.name: plugin.type for plugin in config.plugins}
    absent = sorted(name for name, type_ in wanted.items() if running.plugins.get(name) != type_)
    if absent:
        yield warn(
            f"the file has plugins the picker does not run: {', '.join(absent[:NAMES_SHOWN])}",
            "requests are routed by another configuration than the file's",
            "does --config-file name this file? was the change rejected (`epp check FILE`), or is --config-reload off?",
        )


def clocks(skews: Mapping[str, float]) -> Iterator[Finding]:
    for who, skew_s in sorted(skews.items(), key=lambda item: -abs(item[1]))[:NAMES_SHOWN]:
        if abs(skew_s) > SKEW_WARN_S:
            yield warn(
                f"the clock of {who} is {abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} this machine's",
                "leases, certificates and tokens expire early or late; logs and traces do not line up",
                "run NTP (chrony) on both",
            )


CHECKS = (
    Check("picker-port", "the ext_proc port is open, HTTP/2, TLS or plaintext", ("port",), port_open),
    Check("picker-certificate", "the certificate is valid, and for a while yet", ("port", "now"), certificate),
    Check("picker-health", "gRPC health on the ext_proc port, by every name probes use", ("health",), healthy),
    Check("picker-health-port", "the same on the health port", ("other_health",), healthy),
    Check(
        "picker-exchange", "a sample request gets a destination in header and metadata (FULL_DUPLEX_STREAMED)", ("full_duplex",), exchanged
    ),
    Check("picker-exchange-buffered", "the same in BUFFERED mode", ("buffered",), exchanged),
    Check("picker-metrics", "the picker's metrics: ready endpoints, limits, rejected configurations", ("metrics",), metrics),
    Check("picker-endpoints", "the picker's endpoints are healthy and freshly read", ("endpoints",), endpoints),
    Check("picker-config", "the picker runs the plugins of the configuration file", ("config", "running"), config_drift),
    Check("clocks", "the clocks agree", ("clocks",), clocks),
)
