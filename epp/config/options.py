"""The flags of `epp serve` and what they mean. Names and defaults are the reference picker's where the thing exists there."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import Literal

MEBIBYTE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Everything `epp serve` was told. Durations in seconds, sizes in bytes."""

    endpoints: tuple[str, ...] = ()
    endpoints_file: str = ""
    config_file: str = ""
    config_text: str = ""
    bind_address: str = ""
    """Empty: all interfaces."""
    grpc_port: int = 9002
    grpc_health_port: int = 9003
    metrics_port: int = 9090
    transport: Literal["h2", "grpc"] = "h2"
    secure_serving: bool = True
    cert_path: str = ""
    enable_cert_reload: bool = True
    client_ca_file: str = ""
    max_body_bytes: int = 64 * MEBIBYTE
    max_buffered_bytes: int = 1024 * MEBIBYTE
    max_header_count: int = 1_000
    max_streams: int = 10_000
    max_connections: int = 4_096
    keepalive_s: float = 60.0
    decision_timeout_s: float = 60.0
    disable_endpoint_subset_filter: bool = False
    enable_test_headers: bool = False
    unknown_paths: Literal["reject", "route"] = "reject"
    refresh_metrics_interval_s: float = 0.05
    metrics_staleness_threshold_s: float = 2.0
    drain_timeout_s: float = 30.0
    workers: int = 1
    verbosity: int = 2
    zap_encoder: Literal["json", "console"] | None = None


def add_picker_arguments(parser: argparse.ArgumentParser) -> None:
    """What `epp serve` and `epp up` share: which endpoints, and how to choose among them."""
    pool = parser.add_argument_group("endpoints")
    pool.add_argument("--endpoint", action="append", default=[], metavar="[NAME=]HOST:PORT", help="a model server; repeat for more")
    pool.add_argument(
        "--endpoints-file",
        default="",
        metavar="FILE",
        help="YAML or JSON list of model servers, watched: `endpoints: [{name, address, port, labels}]`",
    )
    pool.add_argument(
        "--refresh-metrics-interval",
        type=duration_s,
        default=0.05,
        metavar="DURATION",
        help="how often a busy model server's /metrics is read; an idle one down to once a second (default: 50ms)",
    )
    pool.add_argument(
        "--metrics-staleness-threshold",
        type=duration_s,
        default=2.0,
        metavar="DURATION",
        help="readings older than this do not count in the pool's averages on /metrics (default: 2s)",
    )
    policy = parser.add_argument_group("policy")
    policy.add_argument("--config-file", default="", metavar="FILE", help="EndpointPickerConfig, YAML or JSON")
    policy.add_argument("--config-text", default="", metavar="TEXT", help="the same, inline")
    policy.add_argument(
        "--unknown-paths",
        choices=("reject", "route"),
        default="reject",
        help="paths that no inference engine serves: 404, or routed by load (default: %(default)s)",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-body-bytes",
        type=quantity_bytes,
        default=64 * MEBIBYTE,
        metavar="BYTES",
        help="a longer request body is a 413 (default: 64Mi)",
    )
    limits.add_argument(
        "--max-buffered-bytes",
        type=quantity_bytes,
        default=1024 * MEBIBYTE,
        metavar="BYTES",
        help="request bodies held at once, over all requests; beyond, new ones are a 503 (default: 1Gi)",
    )
    limits.add_argument(
        "--max-header-count", type=positive, default=1_000, metavar="N", help="headers of a request; more are a 431 (default: %(default)s)"
    )
    limits.add_argument(
        "--decision-timeout",
        type=duration_s,
        default=60.0,
        metavar="DURATION",
        help="a request whose body stops coming for so long before the decision is a 408 (default: 60s)",
    )
    limits.add_argument(
        "--max-streams", type=positive, default=10_000, metavar="N", help="requests at a time on one connection (default: %(default)s)"
    )
    limits.add_argument("--max-connections", type=positive, default=4_096, metavar="N", help="connections at a time (default: %(default)s)")
    limits.add_argument(
        "--keepalive",
        type=duration_s,
        default=60.0,
        metavar="DURATION",
        help="silence on a connection before it is pinged, and again before it is closed (default: 60s)",
    )
    logs = parser.add_argument_group("logs")
    logs.add_argument(
        "-v", "--v", dest="verbosity", type=int, default=2, metavar="LEVEL", help="2 information, 4 a line per decision (default: 2)"
    )
    logs.add_argument("--zap-encoder", choices=("json", "console"), default=None, help="default: console on a terminal, else json")


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    add_picker_arguments(parser)
    server = parser.add_argument_group("server")
    server.add_argument("--bind-address", default="", metavar="IP", help="listen on this address only (default: all interfaces)")
    server.add_argument("--grpc-port", type=port, default=9002, metavar="PORT", help="ext_proc (default: %(default)s)")
    server.add_argument("--grpc-health-port", type=port, default=9003, metavar="PORT", help="gRPC health, plaintext (default: %(default)s)")
    server.add_argument("--metrics-port", type=port, default=9090, metavar="PORT", help="/metrics (default: %(default)s)")
    server.add_argument(
        "--secure-serving",
        type=boolean,
        nargs="?",
        const=True,
        default=True,
        metavar="BOOL",
        help="TLS on the ext_proc port (default: true)",
    )
    server.add_argument(
        "--cert-path", default="", metavar="DIR", help="directory with tls.crt and tls.key (default: a self-signed certificate)"
    )
    server.add_argument(
        "--enable-cert-reload",
        type=boolean,
        nargs="?",
        const=True,
        default=True,
        metavar="BOOL",
        help="present a renewed certificate from --cert-path without a restart (default: true)",
    )
    server.add_argument(
        "--client-ca-file", default="", metavar="FILE", help="on the ext_proc port, take only clients with a certificate of this authority"
    )
    server.add_argument(
        "--health-checking",
        type=boolean,
        nargs="?",
        const=True,
        default=True,
        metavar="BOOL",
        help="accepted; health is always served on the ext_proc port too",
    )
    server.add_argument(
        "--transport",
        choices=("h2", "grpc"),
        default="h2",
        help="h2: libnghttp2, a tenth of the CPU; grpc: grpcio, the conservative fallback (default: %(default)s)",
    )
    server.add_argument(
        "--disable-endpoint-subset-filter",
        type=boolean,
        nargs="?",
        const=True,
        default=False,
        metavar="BOOL",
        help="ignore the gateway's subset hint (default: false)",
    )
    server.add_argument(
        "--enable-test-headers",
        type=boolean,
        nargs="?",
        const=True,
        default=False,
        metavar="BOOL",
        help="honour the Gateway API conformance suite's test headers; never in production (default: false)",
    )
    server.add_argument(
        "--drain-timeout",
        type=duration_s,
        default=30.0,
        metavar="DURATION",
        help="after SIGTERM, keep serving this long while health says NOT_SERVING (default: 30s)",
    )
    server.add_argument(
        "--workers", type=int, default=1, metavar="N", help="reserved: one process serves tens of thousands of requests a second"
    )


def serve_options(args: argparse.Namespace) -> ServeOptions:
    """From the flags of `add_serve_arguments`; those that `epp up` decides for itself may be missing."""
    given = vars(args)
    names = {
        "endpoints": tuple(args.endpoint),
        "refresh_metrics_interval_s": args.refresh_metrics_interval,
        "metrics_staleness_threshold_s": args.metrics_staleness_threshold,
    }
    if "drain_timeout" in given:
        names["drain_timeout_s"] = args.drain_timeout
    names |= {"keepalive_s": args.keepalive, "decision_timeout_s": args.decision_timeout}
    same = {name: given[name] for name in ServeOptions.__slots__ if name in given}
    return ServeOptions(**(same | names))


def port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 0 (any free) to 65535")
    return int(text)


def positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def boolean(text: str) -> bool:
    """As Go's flag package reads one."""
    if text in ("1", "t", "T", "true", "TRUE", "True"):
        return True
    if text in ("0", "f", "F", "false", "FALSE", "False"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is not true or false")


_UNITS_S = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?(?:ns|us|µs|ms|s|m|h))+")
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)")


def duration_s(text: str) -> float:
    """Seconds of a Go duration: `50ms`, `1m30s`, `0`."""
    if text == "0":
        return 0.0
    if not _DURATION.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a duration; write 50ms, 2s or 1m30s")
    return sum(float(number) * _UNITS_S[unit] for number, unit in _DURATION_PART.findall(text))


_QUANTITY = re.compile(r"(\d+)(Ki|Mi|Gi|k|M|G|)B?")
_FACTORS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}


def quantity_bytes(text: str) -> int:
    """Bytes of a Kubernetes quantity: `65536`, `64Mi`, `1G`; at least 1."""
    match = _QUANTITY.fullmatch(text)
    if not match or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 65536, 64Mi or 1G")
    return int(match[1]) * _FACTORS[match[2]]
