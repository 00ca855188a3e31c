"""`epp doctor`: checks a picker, its gateway and its cluster for what is usually got wrong, and says what to change. Read-only.

This file holds the flags and imports nothing else of the doctor, so that `epp --help` stays quick. *_facts and envoy_config are what there is
to know and the probes that find it out, *_checks what follows from it (pure), `runner` the order of events, `report` the output.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, field

from epp.config.flag_types import boolean
from epp.errors import ConfigError, Problem

TIMEOUT_S = 10.0
POOLS_MAX = 64
DESCRIPTION = """\
Check a picker, the gateway in front of it, the model servers behind it, or a cluster's InferencePool; say what is wrong, what users
see of it, and what to change. Nothing is changed anywhere; no request reaches a model server.

  epp doctor --target 127.0.0.1:9002 --health 127.0.0.1:9003 --metrics http://127.0.0.1:9090
  epp doctor --target 127.0.0.1:9002 --envoy-admin http://127.0.0.1:9901     the Envoy that runs
  epp doctor --envoy-config envoy.yaml                                       one that does not run yet
  epp doctor --pool-name my-pool --pool-namespace inference                  a cluster, by kubeconfig
  kubectl exec deploy/my-epp -- epp doctor --pool-name my-pool --target 127.0.0.1:9002 --metrics http://127.0.0.1:9090

What is given is checked; what is not given is skipped, with the flag that would help. Each line is a check: ok, warn (it works, but not
as it should), FAIL (requests fail or go elsewhere) or skipped. `epp doctor --list` names all checks.

Exit code: 0 all well or warnings, 1 at least one failure, 2 wrong usage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorOptions:
    """Everything `epp doctor` was told."""

    target: str = ""
    health: str = ""
    metrics: str = ""
    metrics_token_file: str = field(default="", repr=False)
    metrics_ca_file: str = ""
    endpoints: tuple[str, ...] = ()
    model: str = ""
    config_file: str = ""
    allow_experimental_plugins: bool = False
    client_cert_path: str = ""
    envoy_admin: str = ""
    envoy_config: str = ""
    envoy_cluster: str = ""
    pool_names: tuple[str, ...] = ()
    pool_namespace: str = ""
    pool_group: str = "inference.networking.k8s.io"
    kubeconfig: str = ""
    kube_context: str = ""
    service_account: str = ""
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    timeout_s: float = TIMEOUT_S
    json: bool = False
    list_checks: bool = False


def add_doctor_arguments(parser: argparse.ArgumentParser) -> None:
    default = DoctorOptions()
    picker = parser.add_argument_group("a running picker")
    picker.add_argument("--target", default="", metavar="HOST:PORT", help="its ext_proc port (9002)")
    picker.add_argument("--health", default="", metavar="HOST:PORT", help="its health port (9003)")
    picker.add_argument("--metrics", default="", metavar="URL", help="its metrics port (http://HOST:9090)")
    picker.add_argument("--metrics-token-file", default="", metavar="FILE", help="bearer token for the metrics port")
    picker.add_argument("--metrics-ca-file", default="", metavar="FILE", help="authority of the metrics port's certificate (default: verified only when a token is sent)")  # fmt: skip
    picker.add_argument("--client-cert-path", default="", metavar="DIR", help="tls.crt and tls.key, for a picker with --client-ca-file")
    picker.add_argument("--endpoint", action="append", default=[], metavar="[NAME=]HOST:PORT", help="a model server that should be there; repeat for more")  # fmt: skip
    picker.add_argument("--model", default="", metavar="NAME", help="of the sample request (default: one that an engine says it serves)")
    picker.add_argument("--config-file", default="", metavar="FILE", help="its EndpointPickerConfig: compared with what runs, and with the engines")  # fmt: skip
    picker.add_argument("--allow-experimental-plugins", type=boolean, nargs="?", const=True, default=False, metavar="BOOL", help="as the picker was started")  # fmt: skip
    envoy = parser.add_argument_group("the Envoy in front of it")
    source = envoy.add_mutually_exclusive_group()
    source.add_argument("--envoy-admin", default="", metavar="URL", help="its admin port: /config_dump is read")
    source.add_argument("--envoy-config", default="", metavar="FILE", help="its configuration, YAML or JSON; also a saved /config_dump")
    envoy.add_argument("--envoy-cluster", default="", metavar="NAME", help="the cluster the picker is in, where it is not found by --target or port 9002")  # fmt: skip
    cluster = parser.add_argument_group("a Kubernetes cluster", "needs pip install 'envoy-endpoint-picker[kubernetes]'")
    cluster.add_argument("--pool-name", dest="pool_names", action="append", default=[], metavar="NAME", help="the InferencePool; repeat for more")  # fmt: skip
    cluster.add_argument("--pool-namespace", default="", metavar="NAME", help="its namespace (default: the kubeconfig's, else default)")
    cluster.add_argument("--pool-group", default=default.pool_group, metavar="GROUP", help="its API group (default: %(default)s)")
    cluster.add_argument("--kubeconfig", default="", metavar="FILE", help="default: the pod's service account, else $KUBECONFIG, else ~/.kube/config")  # fmt: skip
    cluster.add_argument("--kube-context", default="", metavar="NAME", help="the kubeconfig's context (default: its current one)")
    cluster.add_argument("--service-account", default=None, metavar="[NAMESPACE:]NAME", help="whose rights to check (default: that of the picker's Deployment; empty: your own)")  # fmt: skip
    run = parser.add_argument_group("checks")
    run.add_argument("--only", action="append", default=[], metavar="CHECK,...", help="these checks alone; `envoy-*` for all that start so")
    run.add_argument("--skip", action="append", default=[], metavar="CHECK,...", help="not these")
    run.add_argument("--list", dest="list_checks", action="store_true", help="name all checks and what they look at, and do nothing else")
    run.add_argument("--timeout", type=_seconds, default=TIMEOUT_S, dest="timeout_s", metavar="SECONDS", help="for each thing that is asked (default: %(default)g)")  # fmt: skip
    run.add_argument("--json", action="store_true", help="the findings as JSON")


def doctor_options(args: argparse.Namespace) -> DoctorOptions:
    """Raises ConfigError."""
    given = {name: getattr(args, name) for name in DoctorOptions.__slots__ if name in vars(args)}
    given |= {"endpoints": tuple(args.endpoint), "pool_names": tuple(dict.fromkeys(name for name in args.pool_names if name))}
    given |= {name: tuple(_split(getattr(args, name))) for name in ("only", "skip")}
    given["service_account"] = "-" if args.service_account == "" else args.service_account or ""
    options = DoctorOptions(**given)
    problems = []
    if len(options.pool_names) > POOLS_MAX:
        problems.append(Problem("--pool-name", f"at most {POOLS_MAX} pools, not {len(options.pool_names)}"))
    for flag, url in (("--metrics", options.metrics), ("--envoy-admin", options.envoy_admin)):
        if url and not re.match(r"https?://[^/]", url):
            problems.append(Problem(flag, "is not an http or https address; write http://HOST:PORT"))
    asked = (
        options.target,
        options.health,
        options.metrics,
        options.endpoints,
        options.envoy_admin,
        options.envoy_config,
        options.pool_names,
    )
    if not any(asked) and not options.list_checks:
        problems.append(
            Problem("", "say what to check: --target, --metrics, --envoy-admin, --envoy-config or --pool-name (epp doctor --help)")
        )
    if problems:
        raise ConfigError("command line", problems)
    return options


def _split(texts: list[str]) -> list[str]:
    return [part.strip() for text in texts for part in text.split(",") if part.strip()]


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, above 0 to 3600")
    return seconds
