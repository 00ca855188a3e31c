"""Flags of the reference picker that this version accepts without acting on them, so that its Deployments start unchanged.

Nothing is ignored in silence: `ignored_flags` says for each flag that asks for something else than what happens anyway why it has no
effect. A flag that comes to have one moves to options. Not here: the flags that are acted on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

from epp.config.flag_types import boolean, duration_s, message_bytes, natural


class _Inert(NamedTuple):
    flag: str
    why: str
    harmless: tuple[object, ...] = ()
    """Values that ask for what happens anyway."""

    @property
    def dest(self) -> str:
        return self.flag.removeprefix("--").replace("-", "_")


_SWITCHES = (
    _Inert("--tracing", "no traces are emitted", (False,)),
    _Inert("--enable-pprof", "pprof belongs to Go; there is no such page", (False,)),
    _Inert("--enable-grpc-stream-metrics", "the extproc_stream metrics are not collected", (False,)),
    _Inert("--zap-devel", "there is one mode; for lines to read, --zap-encoder=console", (False,)),
    _Inert("--model-server-metrics-https-insecure-skip-verify", "give metrics-data-source the parameter insecureSkipVerify", (True,)),
)
_TEXTS = (
    _Inert("--tls-min-version", "TLS 1.2 is the minimum", ("", "VersionTLS12")),
    _Inert("--tls-cipher-suites", "the cipher suites are OpenSSL's defaults", ("",)),
    _Inert("--zap-stacktrace-level", "stack traces come with every unforeseen error"),
    _Inert("--zap-time-encoding", "times are RFC 3339", ("rfc3339",)),
    _Inert("--model-server-metrics-scheme", "give metrics-data-source the parameter scheme", ("http",)),
    _Inert("--model-server-metrics-path", "give metrics-data-source the parameter path", ("/metrics",)),
)
_REFRESH = _Inert("--refresh-prometheus-metrics-interval", "the pool's averages are computed whenever /metrics is read")
_RECEIVE = _Inert("--grpc-max-recv-msg-size", "a message may be as long as --max-body-bytes", (0,))
_SEND = _Inert("--grpc-max-send-msg-size", "replies are never longer than the body they answer", (0,))
_WORKERS = _Inert("--workers", "there is one process; it serves tens of thousands of requests a second", (1,))
_PORT = _Inert("--model-server-metrics-port", "give metrics-data-source the parameter port", (0,))
_ALL = (*_SWITCHES, *_TEXTS, _REFRESH, _RECEIVE, _SEND, _PORT, _WORKERS)
_TLS_VERSIONS = ("", "VersionTLS10", "VersionTLS11", "VersionTLS12", "VersionTLS13")

REMOVED = (
    "--total-queued-requests-metric",
    "--total-running-requests-metric",
    "--kv-cache-usage-percentage-metric",
    "--lora-info-metric",
    "--cache-info-metric",
)
"""Names of engine metrics, once flags. An error in the reference picker too."""


def add_compat_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "accepted, without effect", "so that the reference picker's arguments work; each says so when it is used"
    )
    for inert in _SWITCHES:
        group.add_argument(inert.flag, type=boolean, nargs="?", const=True, default=argparse.SUPPRESS, metavar="BOOL", help=_help(inert))
    for inert in _TEXTS:
        choices = _TLS_VERSIONS if inert.flag == "--tls-min-version" else None
        group.add_argument(inert.flag, choices=choices, default=argparse.SUPPRESS, metavar="TEXT", help=_help(inert))
    group.add_argument(_REFRESH.flag, type=duration_s, default=argparse.SUPPRESS, metavar="DURATION", help=_help(_REFRESH))
    for inert in (_RECEIVE, _SEND):
        group.add_argument(inert.flag, type=message_bytes, default=argparse.SUPPRESS, metavar="BYTES", help=_help(inert))
    group.add_argument(_PORT.flag, type=natural, default=argparse.SUPPRESS, metavar="PORT", help=_help(_PORT))
    for flag in REMOVED:
        group.add_argument(flag, action=_Removed, default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def ignored_flags(args: argparse.Namespace) -> list[str]:
    """A warning for each flag that was given and is not acted on, unless what it asks for is so anyway."""
    given = vars(args)
    return [f"{inert.flag} has no effect: {inert.why}" for inert in _ALL if inert.dest in given and given[inert.dest] not in inert.harmless]


def accept_single_dash(parser: argparse.ArgumentParser) -> None:
    """Take `-pool-name=x` for `--pool-name=x`, as Go's flag package does and older Deployments write. Call it when all flags are there."""
    flags = parser._option_string_actions  # noqa: SLF001 - the public way would show every flag twice in --help
    for flag, action in list(flags.items()):
        if flag.startswith("--"):
            flags.setdefault(flag.removeprefix("-"), action)


class _Removed(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> NoReturn:
        del namespace, values
        parser.error(f"{option_string} was removed: name metrics in `engineConfigs` of the plugin core-metrics-extractor, in --config-file")


def _help(inert: _Inert) -> str:
    return inert.why.replace("%", "%%")
