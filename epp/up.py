"""`epp up`: the picker and a real Envoy in front of engines that exist, on one machine."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys

from epp.app import Picker
from epp.config.options import ServeOptions, serve_options
from epp.envoy import Destination, EnvoyOptions, envoy_options
from epp.envoy.bootstrap import render
from epp.envoy.supervisor import EnvoyProcess
from epp.errors import ConfigError, Problem, StartError
from epp.process import Signals
from epp.sources.static import parse_endpoints
from epp.types import Address

LOOPBACK = "127.0.0.1"
FALLBACKS = 1
"""Endpoints named after the best one: Envoy retries there when the best does not even take the connection."""


async def up(args: argparse.Namespace) -> int:
    """Until told to stop, or Envoy dies. Returns the exit code."""
    options = dataclasses.replace(
        serve_options(args), bind_address=LOOPBACK, grpc_port=0, grpc_health_port=0, secure_serving=False, drain_timeout_s=0.0
    )
    _check(options, args)
    list_ok = args.destination is Destination.OVERRIDE_HOST
    picker = Picker(options, fallbacks=FALLBACKS if list_ok else 0)
    with Signals() as signals:
        async with picker.serving():
            envoy_settings = _envoy_options(args, picker)
            async with EnvoyProcess(envoy_settings) as envoy:
                print(_welcome(envoy_settings, picker), flush=True)
                stop, died = asyncio.create_task(signals.stop.wait()), asyncio.create_task(envoy.wait())
                try:
                    await asyncio.wait((stop, died), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    stop.cancel()
                    died.cancel()
                if not signals.stop.is_set():
                    raise StartError(f"Envoy ended by itself\n{envoy.last_error}".rstrip())
    return signals.exit_code


async def print_envoy_config(args: argparse.Namespace) -> int:
    """`epp envoy-config`: the bootstrap on standard output."""
    options = serve_options(args)
    _check(options, args)
    try:
        address = Address.parse(args.epp)
    except ValueError as error:
        raise ConfigError("command line", [Problem("--epp", str(error))]) from None
    endpoints = [spec.address for spec in parse_endpoints(options.endpoints)]
    if not endpoints and args.destination is not Destination.ORIGINAL_DST:
        raise ConfigError("command line", [Problem("--endpoint", "at least one is needed, or --destination original-dst")])
    settings = envoy_options(args, endpoints=endpoints, epp=address, epp_tls=False)
    if args.validate:
        await EnvoyProcess(settings).validate()
    sys.stdout.write(render(settings))
    return 0


def _check(options: ServeOptions, args: argparse.Namespace) -> None:
    if options.endpoints_file and args.destination is not Destination.ORIGINAL_DST:
        problem = Problem("--endpoints-file", "its endpoints come and go: use it with --destination original-dst")
        raise ConfigError("command line", [problem])


def _envoy_options(args: argparse.Namespace, picker: Picker) -> EnvoyOptions:
    endpoints = [endpoint.spec.address for endpoint in picker.datastore.endpoints.values()]
    return envoy_options(args, endpoints=endpoints, epp=Address(LOOPBACK, picker.ext_proc.port), epp_tls=False)


def _welcome(settings: EnvoyOptions, picker: Picker) -> str:
    host = LOOPBACK if settings.listen.host in ("0.0.0.0", "::") else settings.listen.host  # noqa: S104 - compared, not bound
    base = f"http://{Address(host, settings.listen.port)}"
    return f"ready: {base}/v1 in front of {len(settings.endpoints)} endpoints; metrics: http://{LOOPBACK}:{picker.http.port}/metrics"
