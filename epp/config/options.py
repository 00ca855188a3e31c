"""The flags of `epp serve` and what they mean. Names and defaults are the reference picker's where the thing exists there.

Not here: its flags that have no effect in this version (compat_flags).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from epp.config.compat_flags import accept_single_dash, add_compat_arguments, ignored_flags
from epp.config.flag_types import boolean, duration_s, natural, port, positive, quantity_bytes, target_ports, zap_level
from epp.errors import ConfigError, Problem

__all__ = ["MEBIBYTE", "ServeOptions", "add_picker_arguments", "add_serve_arguments", "ignored_flags", "port", "serve_options"]

MEBIBYTE = 1 << 20
POOLS_MAX = 64
"""Pools of one picker."""
_PORTS = ("--grpc-port", "--grpc-health-port", "--metrics-port")
TARGET_PORTS_MAX = 8
"""Ports of one model server, as in an InferencePool."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Everything `epp serve` was told. Durations in seconds, sizes in bytes."""

    endpoints: tuple[str, ...] = ()
    endpoints_file: str = ""
    resources_file: str = ""
    """InferenceObjectives and InferenceModelRewrites."""
    pool_names: tuple[str, ...] = ()
    pool_namespace: str = ""
    """Empty: the environment's NAMESPACE, else `default`."""
    pool_group: str = "inference.networking.k8s.io"
    kubeconfig: str = ""
    """Empty: the pod's service account, else the environment's KUBECONFIG, else ~/.kube/config."""
    kube_context: str = ""
    ha_enable_leader_election: bool = False
    metrics_endpoint_auth: bool | None = None
    """None: where the pool comes from Kubernetes."""
    metrics_cert_dir: str = ""
    metrics_client_ca_file: str = ""
    endpoint_selector: str = ""
    endpoint_target_ports: tuple[int, ...] = ()
    config_file: str = ""
    config_text: str = ""
    config_reload: bool = True
    allow_experimental_plugins: bool = False
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
    emit_endpoint_scores: bool = False
    enable_test_headers: bool = False
    check_models: bool = True
    model_server_token_file: str = ""
    enable_debug_endpoints: bool = True
    admin_token_file: str = ""
    debug_decisions: int = 64
    unknown_paths: Literal["reject", "route"] = "reject"
    refresh_metrics_interval_s: float = 0.05
    metrics_staleness_threshold_s: float = 2.0
    drain_timeout_s: float = 30.0
    queued_at_shutdown: Literal["drain", "reject"] = "drain"
    workers: int = 1
    verbosity: int = 2
    zap_encoder: Literal["json", "console"] | None = None


def add_picker_arguments(parser: argparse.ArgumentParser) -> None:
    """What `epp serve` and `epp up` share: which endpoints, and how to choose among them."""
    _add_endpoints(parser)
    _add_policy(parser)
    _add_limits(parser)
    debugging = parser.add_argument_group("debugging")
    _switch(debugging, "--enable-debug-endpoints", "serve /debug/ (why this endpoint?) on the metrics port", on=True)
    debugging.add_argument(
        "--admin-token-file",
        default="",
        metavar="FILE",
        help="bearer token for POST /drain from other machines (default: only this machine may)",
    )
    debugging.add_argument(
        "--debug-decisions",
        type=natural,
        default=64,
        metavar="N",
        help="how many of the last decisions /debug/decisions shows; 0 keeps none (default: %(default)s)",
    )
    logs = parser.add_argument_group("logs")
    logs.add_argument(
        "-v", "--v", dest="verbosity", type=int, default=2, metavar="LEVEL", help="2 information, 4 a line per decision (default: 2)"
    )
    logs.add_argument(
        "--zap-log-level",
        dest="verbosity",
        type=zap_level,
        default=argparse.SUPPRESS,
        metavar="LEVEL",
        help="the same as the reference picker's logger says it: error, info, debug or a number; the later of the two counts",
    )
    logs.add_argument("--zap-encoder", choices=("json", "console"), default=None, help="default: console on a terminal, else json")


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = f"{parser.prog} [OPTION ...]"  # all of them would be a page before every error
    add_picker_arguments(parser)
    _add_kubernetes(parser)
    _add_server(parser)
    add_compat_arguments(parser)
    accept_single_dash(parser)


def serve_options(args: argparse.Namespace) -> ServeOptions:
    """From the flags of `add_serve_arguments`; those that `epp up` decides for itself may be missing. Raises ConfigError."""
    given = vars(args)
    problems = _clashes(given)
    if problems:
        raise ConfigError("command line", problems)
    names: dict[str, Any] = {
        "endpoints": tuple(args.endpoint),
        "pool_names": tuple(dict.fromkeys(name for name in given.get("pool_names") or () if name)),
        "endpoint_target_ports": tuple(dict.fromkeys(given.get("endpoint_target_ports") or ())),
        "refresh_metrics_interval_s": args.refresh_metrics_interval,
        "metrics_staleness_threshold_s": args.metrics_staleness_threshold,
        "keepalive_s": args.keepalive,
        "decision_timeout_s": args.decision_timeout,
    }
    if "drain_timeout" in given:
        names["drain_timeout_s"] = args.drain_timeout
    same = {name: given[name] for name in ServeOptions.__slots__ if name in given}
    return ServeOptions(**(same | names))


def _clashes(given: Mapping[str, Any]) -> list[Problem]:
    """Flags that can't be used together, or one without the other."""
    problems = []
    ports = dict.fromkeys(given.get("endpoint_target_ports") or ())
    if len(given.get("pool_names") or ()) > POOLS_MAX:
        problems.append(Problem("--pool-name", f"at most {POOLS_MAX} pools, not {len(given['pool_names'])}"))
    if any(given.get("pool_names") or ()) and given.get("endpoint_selector"):
        problems.append(Problem("--pool-name", "can't be used together with --endpoint-selector"))
    if given.get("endpoint_selector") and not ports:
        problems.append(Problem("--endpoint-selector", "needs --endpoint-target-ports"))
    if len(ports) > TARGET_PORTS_MAX:
        problems.append(Problem("--endpoint-target-ports", f"at most {TARGET_PORTS_MAX} ports, not {len(ports)}"))
    taken: dict[int, str] = {}
    for flag in _PORTS:
        number = given.get(flag.removeprefix("--").replace("-", "_"), 0)
        if number and taken.setdefault(number, flag) != flag:
            problems.append(Problem(flag, f"{number} is taken by {taken[number]}"))
    if given.get("metrics_client_ca_file") and not given.get("metrics_cert_dir"):
        problems.append(Problem("--metrics-client-ca-file", "needs --metrics-cert-dir"))
    if given.get("metrics_cert_dir") and not given.get("metrics_client_ca_file") and given.get("metrics_endpoint_auth") is False:
        problems.append(Problem("--metrics-cert-dir", "needs --metrics-client-ca-file or --metrics-endpoint-auth"))
    return problems


def _add_endpoints(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("endpoints")
    group.add_argument("--endpoint", action="append", default=[], metavar="[NAME=]HOST:PORT", help="a model server; repeat for more")
    group.add_argument(
        "--endpoints-file",
        default="",
        metavar="FILE",
        help="YAML or JSON list of model servers, watched: `endpoints: [{name, address, port, labels}]`",
    )
    group.add_argument(
        "--model-server-token-file",
        default="",
        metavar="FILE",
        help="bearer token sent when model servers are asked for metrics and models; read again when it changes",
    )
    group.add_argument(
        "--refresh-metrics-interval",
        type=duration_s,
        default=0.05,
        metavar="DURATION",
        help="how often a busy model server's /metrics is read; an idle one down to once a second (default: 50ms)",
    )
    group.add_argument(
        "--metrics-staleness-threshold",
        type=duration_s,
        default=2.0,
        metavar="DURATION",
        help="readings older than this do not count in the pool's averages on /metrics (default: 2s)",
    )


def _add_policy(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("policy")
    group.add_argument(
        "--config-file", default="", metavar="FILE", help="EndpointPickerConfig, YAML or JSON (default: the profile cost-aware)"
    )
    group.add_argument("--config-text", default="", metavar="TEXT", help="the same, inline")
    _switch(group, "--config-reload", "put a changed --config-file in service without a restart; one with a fault changes nothing", on=True)
    _switch(group, "--allow-experimental-plugins", "take plugins that may still change (alpha) too")
    group.add_argument(
        "--resources-file",
        default="",
        metavar="FILE",
        help="YAML with InferenceObjective and InferenceModelRewrite objects, watched: priorities and model names without Kubernetes",
    )
    _switch(group, "--emit-endpoint-scores", "tell the gateway every candidate's score, in x-gateway-destination-endpoint-scores metadata")
    _switch(group, "--disable-endpoint-subset-filter", "ignore the gateway's subset hint")
    _switch(group, "--check-models", "ask engines which models they have: 404 for one that none has, and never to one without it", on=True)
    group.add_argument(
        "--unknown-paths",
        choices=("reject", "route"),
        default="reject",
        help="paths that no inference engine serves: 404, or routed by load (default: %(default)s)",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--max-body-bytes",
        type=quantity_bytes,
        default=64 * MEBIBYTE,
        metavar="BYTES",
        help="a longer request body is a 413 (default: 64Mi)",
    )
    group.add_argument(
        "--max-buffered-bytes",
        type=quantity_bytes,
        default=1024 * MEBIBYTE,
        metavar="BYTES",
        help="request bodies held at once, over all requests; beyond, new ones are a 503 (default: 1Gi)",
    )
    group.add_argument(
        "--max-header-count", type=positive, default=1_000, metavar="N", help="headers of a request; more are a 431 (default: %(default)s)"
    )
    group.add_argument(
        "--decision-timeout",
        type=duration_s,
        default=60.0,
        metavar="DURATION",
        help="a request whose body stops coming for so long before the decision is a 408 (default: 60s)",
    )
    group.add_argument(
        "--max-streams", type=positive, default=10_000, metavar="N", help="requests at a time on one connection (default: %(default)s)"
    )
    group.add_argument("--max-connections", type=positive, default=4_096, metavar="N", help="connections at a time (default: %(default)s)")
    group.add_argument(
        "--keepalive",
        type=duration_s,
        default=60.0,
        metavar="DURATION",
        help="silence on a connection before it is pinged, and again before it is closed (default: 60s)",
    )


def _add_kubernetes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Kubernetes", "model servers found in a cluster, in the place of --endpoint")
    group.add_argument(
        "--pool-name",
        dest="pool_names",
        action="append",
        default=[],
        metavar="NAME",
        help="the InferencePool whose model servers to choose among; repeat to serve several pools with one picker",
    )
    group.add_argument("--pool-namespace", default="", metavar="NAME", help="its namespace (default: $NAMESPACE, else default)")
    group.add_argument("--pool-group", default="inference.networking.k8s.io", metavar="GROUP", help="its API group (default: %(default)s)")
    group.add_argument(
        "--endpoint-selector", default="", metavar="SELECTOR", help="model servers by pod labels, without a pool: app=vllm,env in (a,b)"
    )
    group.add_argument(
        "--endpoint-target-ports",
        action="extend",
        type=target_ports,
        default=argparse.SUPPRESS,
        metavar="PORT,...",
        help=f"the selected pods' ports, each an endpoint of its own; up to {TARGET_PORTS_MAX}",
    )
    group.add_argument(
        "--kubeconfig",
        default="",
        metavar="FILE",
        help="how to reach the API server (default: the pod's service account, else $KUBECONFIG, else ~/.kube/config)",
    )
    group.add_argument("--kube-context", default="", metavar="NAME", help="the kubeconfig's context (default: its current one)")
    _switch(
        group,
        "--ha-enable-leader-election",
        "with several replicas only the holder of a Lease says it is ready; all keep the pool in view and answer who asks",
    )


def _add_server(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--bind-address", default="", metavar="IP", help="listen on this address only (default: all interfaces)")
    group.add_argument("--grpc-port", type=port, default=9002, metavar="PORT", help="ext_proc (default: %(default)s)")
    group.add_argument("--grpc-health-port", type=port, default=9003, metavar="PORT", help="gRPC health, plaintext (default: %(default)s)")
    group.add_argument("--metrics-port", type=port, default=9090, metavar="PORT", help="/metrics and /debug/ (default: %(default)s)")
    _switch(group, "--secure-serving", "TLS on the ext_proc port", on=True)
    group.add_argument(
        "--cert-path", default="", metavar="DIR", help="directory with tls.crt and tls.key (default: a self-signed certificate)"
    )
    _switch(group, "--enable-cert-reload", "present a renewed certificate from --cert-path without a restart", on=True)
    group.add_argument(
        "--client-ca-file", default="", metavar="FILE", help="on the ext_proc port, take only clients with a certificate of this authority"
    )
    group.add_argument(
        "--metrics-endpoint-auth",
        type=boolean,
        nargs="?",
        const=True,
        default=None,
        metavar="BOOL",
        help="on the metrics port, ask the API server who the bearer token is and whether it may read (default: true in a cluster)",
    )
    group.add_argument(
        "--metrics-cert-dir",
        default="",
        metavar="DIR",
        help="TLS on the metrics port: directory with tls.crt and tls.key (default: plain HTTP)",
    )
    group.add_argument(
        "--metrics-client-ca-file",
        default="",
        metavar="FILE",
        help="on the metrics port, take only clients with a certificate of this authority; needs --metrics-cert-dir",
    )
    _switch(group, "--health-checking", "accepted; health is always served on the ext_proc port too", on=True)
    group.add_argument(
        "--transport",
        choices=("h2", "grpc"),
        default="h2",
        help="h2: libnghttp2, a tenth of the CPU; grpc: grpcio, the conservative fallback (default: %(default)s)",
    )
    _switch(group, "--enable-test-headers", "honour the Gateway API conformance suite's test headers; never in production")
    group.add_argument(
        "--drain-timeout",
        type=duration_s,
        default=30.0,
        metavar="DURATION",
        help="after SIGTERM, keep serving this long while health says NOT_SERVING (default: 30s)",
    )
    group.add_argument(
        "--queued-at-shutdown",
        choices=("drain", "reject"),
        default="drain",
        help="after SIGTERM, requests in flow control's queues: drain, they wait for their turn within the drain timeout; reject, they are "
        "answered 503 at once (default: %(default)s)",
    )
    group.add_argument(
        "--workers", type=int, default=1, metavar="N", help="reserved: one process serves tens of thousands of requests a second"
    )


def _switch(group: argparse._ArgumentGroup, flag: str, text: str, *, on: bool = False) -> None:
    """A boolean as Go's flags have them: `--flag`, `--flag=false`."""
    group.add_argument(flag, type=boolean, nargs="?", const=True, default=on, metavar="BOOL", help=f"{text} (default: {str(on).lower()})")
