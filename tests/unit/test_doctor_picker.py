"""`epp doctor` on a running picker and its engines: every check, with facts that are well and facts that are not."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from epp.config.load import load
from epp.config.schema import EndpointPickerConfig
from epp.datastore import Reading
from epp.doctor import engine_checks, picker_checks
from epp.doctor.engine_facts import EndpointFacts, EngineFacts
from epp.doctor.exchange import BUFFERED, FULL_DUPLEX, Exchange
from epp.doctor.findings import Check, Status, judge
from epp.doctor.grpc_client import HostPort, PortFacts
from epp.doctor.http_fetch import Answer
from epp.doctor.picker_facts import Running
from epp.doctor.probing import Missing
from epp.extproc.health import SERVICES
from epp.plugins.registry import Registry

CHECKS: dict[str, Check] = {check.name: check for check in (*picker_checks.CHECKS, *engine_checks.CHECKS)}
ADDRESS = HostPort("10.0.0.1", 9002)
NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
HEAD = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"
GOOD_METRICS = b"""# TYPE llm_d_epp_ready_endpoints gauge
llm_d_epp_ready_endpoints{name="pool"} 2
# TYPE epp_ejected_endpoints gauge
epp_ejected_endpoints 0
"""


def certificate(days: float, *, start_days: float = -1) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "epp")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    builder = builder.not_valid_before(NOW + dt.timedelta(days=start_days)).not_valid_after(NOW + dt.timedelta(days=days))
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def port(**changes: Any) -> PortFacts:
    return PortFacts(**({"address": ADDRESS, "tls": True, "tls_version": "TLSv1.3", "alpn": "h2", "http2": True} | changes))


def exchange(**changes: Any) -> Exchange:
    good = {
        "mode": FULL_DUPLEX, "header": "10.0.0.5:8000", "header_in": "request_headers", "metadata": "10.0.0.5:8000",
        "metadata_kind": "string_value", "body_echoed": True, "streamed": True, "replies": ["request_headers", "request_body"], "latency_s": 0.001,
    }  # fmt: skip
    return Exchange(**(good | changes))


def endpoint(**changes: Any) -> EndpointFacts:
    return EndpointFacts(**({"name": "a", "address": "10.0.0.5:8000", "state": "healthy", "reading_age_s": 0.1} | changes))


def engine(**changes: Any) -> EngineFacts:
    good = {"name": "a", "address": "10.0.0.5:8000", "family": "vllm", "reading": Reading(kv_block_tokens=16), "models": frozenset({"m"})}
    return EngineFacts(**(good | changes))


def config(plugins: str) -> EndpointPickerConfig:
    return load(f"{HEAD}plugins: {plugins}", source="test", catalogue=Registry())


def metrics(body: bytes = GOOD_METRICS, status: int = 200) -> Answer:
    return Answer("http://10.0.0.1:9090/metrics", status, body, 0.0)


def services(**changes: str) -> dict[str, str]:
    return dict.fromkeys(SERVICES, "SERVING") | changes


NOT_READY = dict.fromkeys(SERVICES, "NOT_SERVING") | {"liveness": "SERVING"}
APPROX = "[{type: approx-prefix-cache-producer, parameters: {blockSizeTokens: %d}}]"
PRECISE = "[{type: precise-prefix-cache-producer, parameters: {tokenProcessorConfig: {blockSizeTokens: %d}}}]"
LIMIT = b'# TYPE epp_limit_hits_total counter\nepp_limit_hits_total{limit="body_bytes_max"} 3\n'
RELOAD = b'# TYPE epp_config_reloads_total counter\nepp_config_reloads_total{outcome="rejected"} 1\n'
ON_A, ON_B = frozenset({"m", "lora-1"}), frozenset({"other"})

SITUATIONS: list[tuple[str, str, tuple[object, ...], Status, str]] = [
    ("open", "picker-port", (port(),), Status.OK, "TLSv1.3, ALPN h2"),
    ("plaintext", "picker-port", (port(tls=False, alpn=""),), Status.OK, "in plaintext"),
    ("refused", "picker-port", (port(error="Connection refused"),), Status.FAIL, "ext_proc_error_gRPC_error_14"),
    ("http/1", "picker-port", (port(tls=False, http2=False),), Status.FAIL, "neither TLS nor plaintext"),
    ("no alpn", "picker-port", (port(alpn=""),), Status.FAIL, "does not agree to h2"),
    ("mtls", "picker-port", (port(ends_at_once=True, http2=False),), Status.WARN, "CERTIFICATE_REQUIRED"),
    ("valid", "picker-certificate", (port(certificate_der=certificate(300)), NOW), Status.OK, "valid"),
    ("no certificate", "picker-certificate", (port(tls=False), NOW), Status.OK, "plaintext"),
    ("expired", "picker-certificate", (port(certificate_der=certificate(-0.5)), NOW), Status.FAIL, "expired 2025-12-31"),
    ("expiring", "picker-certificate", (port(certificate_der=certificate(3)), NOW), Status.WARN, "expires in 3 days"),
    ("not yet", "picker-certificate", (port(certificate_der=certificate(300, start_days=1)), NOW), Status.FAIL, "valid only from"),
    ("garbage", "picker-certificate", (port(certificate_der=b"x"), NOW), Status.FAIL, "can't be read"),
    ("serving", "picker-health", (services(),), Status.OK, "all of 5 names"),
    ("not ready", "picker-health", (NOT_READY,), Status.FAIL, "lives but is not ready"),
    ("unknown name", "picker-health", (services(**{"inference-extension": "gRPC status 5"}),), Status.FAIL, "inference-extension gRPC status 5"),
    ("down", "picker-health-port", (dict.fromkeys(SERVICES, "NOT_SERVING"),), Status.FAIL, "not SERVING: NOT_SERVING"),
    ("good", "picker-exchange", (exchange(),), Status.OK, "10.0.0.5:8000 in header and metadata"),
    ("slow", "picker-exchange", (exchange(latency_s=0.2),), Status.WARN, "200 ms"),
    ("no destination", "picker-exchange", (exchange(header=None, metadata=None),), Status.FAIL, "no destination"),
    ("header alone", "picker-exchange", (exchange(metadata=None, metadata_kind=""),), Status.FAIL, "in metadata not at all"),
    ("metadata is a list", "picker-exchange", (exchange(metadata="", metadata_kind="list_value"),), Status.FAIL, "as list_value"),
    ("metadata alone", "picker-exchange", (exchange(header=None),), Status.FAIL, "in dynamic metadata alone"),
    ("they differ", "picker-exchange", (exchange(metadata="10.0.0.6:8000"),), Status.FAIL, "metadata 10.0.0.6:8000"),
    ("value for raw_value", "picker-exchange", (exchange(raw=False),), Status.FAIL, "raw_value"),
    ("body lost", "picker-exchange", (exchange(body_echoed=False),), Status.FAIL, "did not come back whole"),
    ("body not streamed", "picker-exchange", (exchange(streamed=False),), Status.FAIL, "spurious_message"),
    ("body first", "picker-exchange", (exchange(replies=["request_body"]),), Status.FAIL, "first answer was request_body"),
    ("broken off", "picker-exchange", (exchange(error="gRPC status 12"),), Status.FAIL, "gRPC status 12"),
    ("hangs", "picker-exchange", (exchange(silent_after="the whole body"),), Status.FAIL, "stream_idle_timeout"),
    ("404", "picker-exchange", (exchange(immediate_status=404),), Status.WARN, "--model"),
    ("503", "picker-exchange", (exchange(immediate_status=503),), Status.FAIL, "every request is a 503"),
    ("429", "picker-exchange", (exchange(immediate_status=429),), Status.WARN, "saturated"),
    ("500", "picker-exchange", (exchange(immediate_status=500),), Status.FAIL, "answered 500"),
    ("deadlock", "picker-exchange-buffered", (exchange(mode=BUFFERED, silent_after="the request headers"),), Status.FAIL, "504"),
    ("buffered", "picker-exchange-buffered", (exchange(mode=BUFFERED, streamed=False),), Status.OK, "in header and metadata"),
    ("metrics", "picker-metrics", (metrics(),), Status.OK, "ready endpoints"),
    ("401", "picker-metrics", (metrics(status=401),), Status.WARN, "--metrics-token-file"),
    ("404 metrics", "picker-metrics", (metrics(status=404),), Status.FAIL, "answers 404"),
    ("another's metrics", "picker-metrics", (metrics(b"vllm:x 1\n"),), Status.FAIL, "not with a picker's metrics"),
    ("none ready", "picker-metrics", (metrics(GOOD_METRICS.replace(b"} 2", b"} 0")),), Status.FAIL, "no ready endpoint"),
    ("ejected", "picker-metrics", (metrics(GOOD_METRICS.replace(b"ndpoints 0", b"ndpoints 1")),), Status.WARN, "1 endpoints are left out"),
    ("limit", "picker-metrics", (metrics(GOOD_METRICS + LIMIT),), Status.WARN, "body_bytes_max was hit 3 times"),
    ("reload", "picker-metrics", (metrics(GOOD_METRICS + RELOAD),), Status.WARN, "were rejected"),
    ("endpoints", "picker-endpoints", ([endpoint()],), Status.OK, "healthy"),
    ("no endpoints", "picker-endpoints", ([],), Status.FAIL, "knows no endpoint"),
    ("all failing", "picker-endpoints", ([endpoint(state="failing")],), Status.FAIL, "no endpoint is in service"),
    ("one failing", "picker-endpoints", ([endpoint(), endpoint(name="b", state="ejected")],), Status.WARN, "1 of 2"),
    ("stale", "picker-endpoints", ([endpoint(reading_age_s=60)],), Status.WARN, "no fresh metrics of 1"),
    ("never read", "picker-endpoints", ([endpoint(reading_age_s=None)],), Status.WARN, "no fresh metrics of 1"),
    ("unknown to it", "picker-endpoints", ([endpoint(), endpoint(name="b", state="", known_to_picker=False)],), Status.WARN, "not among"),
    ("no drift", "picker-config", (config(APPROX % 64), Running(plugins={p.name: p.type for p in config(APPROX % 64).plugins})), Status.OK, "runs the plugins"),
    ("drift", "picker-config", (config(APPROX % 64), Running(plugins={"queue-scorer": "queue-scorer"})), Status.WARN, "approx-prefix-cache-producer"),
    ("clocks", "clocks", ({"the picker": 1.0},), Status.OK, "agree"),
    ("skew", "clocks", ({"the picker": -90.0},), Status.WARN, "90 s behind"),
    ("engines", "engine-metrics", ([engine()],), Status.OK, "1 vllm"),
    ("one silent", "engine-metrics", ([engine(), engine(name="b", error="refused")],), Status.WARN, "refused"),
    ("all silent", "engine-metrics", ([engine(error="refused")],), Status.FAIL, "refused"),
    ("blocks", "engine-block-size", ([engine()], config(APPROX % 64)), Status.OK, "alike"),
    ("no block size", "engine-block-size", ([engine(reading=Reading())], config(APPROX % 64)), Status.OK, "do not tell"),
    ("uneven blocks", "engine-block-size", ([engine(reading=Reading(kv_block_tokens=48))], config(APPROX % 64)), Status.WARN, "multiple of 48"),
    ("unlike engines", "engine-block-size", ([engine(), engine(reading=Reading(kv_block_tokens=32))], config(APPROX % 64)), Status.WARN, "different block sizes"),
    ("precise", "engine-block-size", ([engine()], config(PRECISE % 16)), Status.OK, "alike"),
    ("precise, in the engine's own blocks", "engine-block-size", ([engine()], config(PRECISE % 64)), Status.OK, "alike"),
    ("models", "engine-models", ([engine(models=ON_A), engine(models=frozenset({"m"}))],), Status.OK, "m on all 2"),
    ("no model in common", "engine-models", ([engine(models=ON_A), engine(models=ON_B)],), Status.WARN, "no model is on all"),
    ("nothing loaded", "engine-models", ([engine(), engine(name="b", models=frozenset())],), Status.WARN, "no model is loaded on b"),
    ("untold models", "engine-models", ([engine(models=None)],), Status.OK, "do not tell"),
    ("full", "engine-cache", ([engine(reading=Reading(kv_usage=1.0, waiting=3))],), Status.WARN, "KV cache is full"),
    ("not full", "engine-cache", ([engine(reading=Reading(kv_usage=1.0, waiting=0))],), Status.OK, "full"),
]  # fmt: skip


@pytest.mark.parametrize(("check", "values", "status", "text"), [pytest.param(*each[1:], id=f"{each[1]}-{each[0]}") for each in SITUATIONS])
def test_a_check_says_what_is_so(check: str, values: tuple[object, ...], status: Status, text: str) -> None:
    facts = dict(zip(CHECKS[check].needs, values, strict=True))
    findings = [result.finding for result in judge(CHECKS[check], facts)]
    order = [Status.OK, Status.WARN, Status.FAIL]
    assert max(findings, key=lambda finding: order.index(finding.status)).status is status, findings
    assert any(text in f"{f.text} {f.effect} {f.change}" for f in findings if f.status is status), findings
    assert all(bool(f.effect and f.change) == (f.status is not Status.OK) for f in findings), findings


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_has_a_situation_that_is_well_and_one_that_is_not(name: str) -> None:
    same = {"picker-health-port": "picker-health"}
    seen = {status for _, check, _, status, _ in SITUATIONS if check in (name, same.get(name))}
    assert Status.OK in seen
    assert len(seen) > 1


def test_what_is_missing_is_a_reason_to_skip() -> None:
    (result,) = judge(CHECKS["picker-port"], {"port": Missing("give --target")})
    assert (result.finding.status, result.finding.text) == (Status.SKIPPED, "give --target")
