"""The order of events: which checks, which facts they need, asking, judging, saying it. Here the parts are put together; nothing else knows all of them."""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from epp.doctor import (
    DoctorOptions,
    cluster_access_checks,
    cluster_picker_checks,
    cluster_pool_checks,
    cluster_route_checks,
    doctor_options,
    engine_checks,
    envoy_checks,
    envoy_cluster_checks,
    picker_checks,
    report,
)
from epp.doctor.cluster_facts import ClusterProbes
from epp.doctor.envoy_probes import EnvoyProbes
from epp.doctor.findings import Check, Result, Status, chosen, fail, judge
from epp.doctor.grpc_client import HostPort
from epp.doctor.http_fetch import Http
from epp.doctor.picker_facts import PickerProbes
from epp.doctor.probing import Missing, Probe, gather
from epp.errors import ConfigError, Problem
from epp.sources.kubernetes.api import Api

STANDALONE: tuple[Check, ...] = (*picker_checks.CHECKS, *engine_checks.CHECKS, *envoy_checks.CHECKS, *envoy_cluster_checks.CHECKS)
CLUSTER: tuple[Check, ...] = (
    *cluster_access_checks.CHECKS,
    *cluster_pool_checks.CHECKS,
    *cluster_picker_checks.CHECKS,
    *cluster_route_checks.CHECKS,
)
ENGINE_SHARE = 5
"""Several rounds of engines fit into the time limit of asking them all."""
TOKEN_BYTES_MAX = 1 << 16


async def run_doctor(args: argparse.Namespace) -> int:
    options = doctor_options(args)
    if options.list_checks:
        report.write_list((*STANDALONE, *CLUSTER), sys.stdout)
        return 0
    checks = checks_for(options)
    with report.progress(sys.stderr) as say:
        results = await examine(options, checks, say)
    (report.write_json if options.json else report.write_text)(results, sys.stdout)
    return 1 if any(result.finding.status is Status.FAIL for result in results) else 0


def checks_for(options: DoctorOptions) -> list[Check]:
    """Those of the part that was asked about, less what --only and --skip say. Raises ConfigError for a name nobody has."""
    every = (*STANDALONE, *CLUSTER)
    unknown = [
        Problem(flag, f"no check is called {name!r}; `epp doctor --list` names them")
        for flag, names in (("--only", options.only), ("--skip", options.skip))
        for name in names
        if not chosen(every, [name], [])
    ]
    if unknown:
        raise ConfigError("command line", unknown)
    standalone = any(
        (options.target, options.health, options.metrics, options.endpoints, options.envoy_admin, options.envoy_config, options.config_file)
    )
    asked = (*(STANDALONE if standalone else ()), *(CLUSTER if options.pool_names else ()))
    return chosen(asked, options.only, options.skip)


async def examine(options: DoctorOptions, checks: Sequence[Check], say: Callable[[str], None]) -> list[Result]:
    """Asks what these checks need and returns what they say, in their order. Raises ConfigError and StartError for what can't be started."""
    async with contextlib.AsyncExitStack() as stack:
        probes = standalone_probes(options)
        if options.pool_names:
            api = Api.connect(options.kubeconfig, options.kube_context)
            stack.push_async_callback(api.close)
            probes += cluster_probes(options, api)
        wanted = [name.removesuffix("?") for check in checks for name in check.needs]
        known = {"now": dt.datetime.now(dt.UTC)}
        facts = await gather(probes, wanted, limit_s=options.timeout_s, known=known, progress=say)
    return told(checks, facts)


def told(checks: Sequence[Check], facts: dict[str, object]) -> list[Result]:
    """The checks' findings; a fact that was asked for and could not be had is a failure of the first check that needs it."""
    results: list[Result] = []
    said: set[str] = set()
    for check in checks:
        missing = [facts[name] for name in check.needs if not name.endswith("?")]
        fault = next((each for each in missing if isinstance(each, Missing) and each.fault and each.reason not in said), None)
        if fault is not None:
            said.add(fault.reason)
            finding = fail(fault.reason, "what else depends on it is skipped", "correct what was given, or start what does not answer")
            results.append(Result(check.name, finding))
        else:
            results += judge(check, facts)
    return results


def standalone_probes(options: DoctorOptions) -> list[Probe]:
    """Raises ConfigError for an address that is none."""
    problems: list[Problem] = []
    target = _address("--target", options.target, problems)
    health = _address("--health", options.health, problems)
    endpoints = []
    for text in options.endpoints:
        name, _, address = text.rpartition("=")
        found = _address("--endpoint", address, problems)
        if found is not None:
            endpoints.append((name or str(found), found))
    token = _token(options.metrics_token_file, problems)
    if problems:
        raise ConfigError("command line", problems)
    http = Http(time.time, limit_s=options.timeout_s / ENGINE_SHARE, token=token, ca_file=options.metrics_ca_file)
    picker = PickerProbes(
        http,
        now_s=time.monotonic,
        target=target,
        health=health,
        metrics_url=options.metrics,
        endpoints=endpoints,
        model=options.model,
        config_file=options.config_file,
        client_cert_path=options.client_cert_path,
        allow_experimental=options.allow_experimental_plugins,
    )
    envoy = EnvoyProbes(
        Http(time.time, limit_s=options.timeout_s),
        admin_url=options.envoy_admin,
        file=options.envoy_config,
        cluster=options.envoy_cluster,
        target=target,
        client_cert_path=options.client_cert_path,
    )
    return [*picker.probes(), *envoy.probes()]


def cluster_probes(options: DoctorOptions, api: Api) -> list[Probe]:
    return ClusterProbes(
        api,
        Http(time.time, limit_s=options.timeout_s / ENGINE_SHARE),
        pool_names=options.pool_names,
        namespace=options.pool_namespace or os.environ.get("NAMESPACE") or api.namespace,
        group=options.pool_group,
        service_account=options.service_account,
    ).probes()


def _address(flag: str, text: str, problems: list[Problem]) -> HostPort | None:
    if not text:
        return None
    try:
        return HostPort.parse(text)
    except ValueError as error:
        problems.append(Problem(flag, str(error)))
        return None


def _token(file: str, problems: list[Problem]) -> str:
    if not file:
        return ""
    try:
        with Path(file).open("rb") as opened:
            return opened.read(TOKEN_BYTES_MAX).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        problems.append(Problem("--metrics-token-file", f"{file} can't be read: {getattr(error, 'strerror', '') or 'it is not text'}"))
        return ""
