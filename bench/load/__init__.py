"""`python -m bench load`: open-loop load for any ext_proc endpoint picker, and how long its decisions take.

Here is the command: options, the table and the JSON. `exchange` is one request, `generator` sends them at their times.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import BenchError, cpu, report
from bench.arguments import number
from bench.load.generator import Generator, Meter, Target, arrivals
from bench.replay.stats import percentile
from bench.workload import MODEL, Asked, Workload

try:
    import uvloop
except ImportError:
    uvloop = None  # type: ignore[assignment]

DESCRIPTION = """\
Send a picker the streams a gateway would, at a rate it cannot slow down, and measure how long decisions take from the time each request
was meant to leave. Any ext_proc picker will do: it needs nothing but its address. One request is one stream: headers and a chat body;
the destination and the body back; response headers, an event a token, the end.

  python -m bench load --target 127.0.0.1:9002 --tls --rps 200 --prompt-tokens 2000 --output-tokens 100 --duration 30 --pid $(pgrep epp)
"""
DISTRIBUTIONS = ("ngh2", "protobuf", "uvloop")
SHARES = (("p50", 0.50), ("p90", 0.90), ("p99", 0.99), ("max", 1.0))
COLUMNS = (
    report.Column("what", "ms"),
    report.Column("mean", "mean", ".3f"),
    *(report.Column(name, name, ".3f") for name, _ in SHARES),
)
LATE_SHARE = 0.2
"""Of the decision's p99: a client later than that is part of what was measured."""


def configure(parser: argparse.ArgumentParser) -> None:
    add: Callable[..., object] = parser.add_argument
    add("--target", required=True, metavar="HOST:PORT", help="where the picker serves ext_proc")
    add("--rps", type=number(float, 0.001), required=True, metavar="R", help="requests a second")
    add(
        "--prompt-tokens",
        type=number(int, 1),
        default=1000,
        metavar="N",
        help="of 4 bytes, half of them one of the shared prefixes (default: %(default)s)",
    )
    add("--output-tokens", type=number(int, 0), default=100, metavar="N", help="events of the streamed answer (default: %(default)s)")
    add(
        "--duration",
        type=number(float, 0.01),
        default=10.0,
        metavar="S",
        help="for which requests are sent and counted (default: %(default)g)",
    )
    add(
        "--warmup",
        type=number(float, 0),
        default=1.0,
        metavar="S",
        help="for which they are sent before and not counted (default: %(default)g)",
    )
    add("--arrivals", choices=("poisson", "even"), default="poisson", help="at random times, or evenly spaced (default: %(default)s)")
    add("--tls", action="store_true", help="TLS; the certificate is not verified, as no gateway does")
    add("--endpoints-subset", default="", metavar="HOST:PORT[,...]", help="the gateway's hint: pick one of these only")
    add("--prefixes", type=number(int, 1), default=32, metavar="N", help="shared prefixes (default: %(default)s)")
    add("--model", default=MODEL, metavar="NAME", help="that requests ask for (default: %(default)s)")
    add("--no-stream", dest="stream", action="store_false", help="answers are one JSON document of --output-tokens words")
    add("--no-response", dest="response", action="store_false", help="end the stream when the body is back, without a response phase")
    add(
        "--connections",
        type=number(int, 1),
        default=2,
        metavar="N",
        help="HTTP/2 connections, as Envoy has one a worker (default: %(default)s)",
    )
    add("--timeout", type=number(float, 0.001), default=10.0, metavar="S", help="for a whole exchange (default: %(default)g)")
    add("--in-flight-max", type=number(int, 1), default=10_000, metavar="N", help="more are counted as not sent (default: %(default)s)")
    add("--seed", type=int, default=1, help="of times and prompts (default: %(default)s)")
    add("--pid", type=number(int, 1), metavar="PID", help="of the target's process, for its CPU, children included")
    add("--json", type=Path, metavar="FILE", help="write the figures, machine and versions here too")


def run(args: argparse.Namespace) -> int:
    target = _target(args.target, tls=args.tls)
    if args.pid:
        cpu.read_tree(args.pid)  # raises BenchError where there is nothing to be read
    subset = tuple(part.strip() for part in args.endpoints_subset.split(",") if part.strip())
    asked = Asked.tokens(args.prompt_tokens, args.output_tokens, model=args.model, subset=subset)
    workload = Workload.of_tokens(
        args.prompt_tokens, args.output_tokens, stream=args.stream, prefixes=args.prefixes, seed=args.seed, asked=asked
    )
    loop_factory = uvloop.new_event_loop if uvloop is not None else None
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        meter, client_cores, usage = runner.run(_measure(args, target, workload))
    row = figures(meter, rps=args.rps)
    row |= {key: getattr(args, key) for key in ("target", "prompt_tokens", "output_tokens", "arrivals", "tls", "seed")}
    row["client_cores"] = round(client_cores, 4)
    if usage is not None:
        cpu_s, wall_s = usage
        row |= {"target_cores": round(cpu_s / wall_s, 4), "target_cpu_us_per_request": round(cpu_s * 1e6 / max(1, len(meter.late_s)), 1)}
    print("\n".join(_summary(row, meter)))
    if args.json is not None:
        report.write_json(args.json, report.document([row], DISTRIBUTIONS, {"examples": meter.examples}))
    if not meter.decision_s:
        raise BenchError(f"no request was answered as it should{_hint(args, meter)}")
    return 0


async def _measure(args: argparse.Namespace, target: Target, workload: Workload) -> tuple[Meter, float, tuple[float, float] | None]:
    generator = Generator(
        target,
        workload,
        connections=args.connections,
        with_response=args.response,
        timeout_s=args.timeout,
        in_flight_max=args.in_flight_max,
    )
    warm: list[tuple[float, cpu.Reading | None, float]] = []

    def mark() -> None:
        warm.append((time.monotonic(), cpu.read_tree(args.pid) if args.pid else None, time.process_time()))

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, signal.raise_signal, signal.SIGINT)  # uvloop has no other way to end by it
    loop.call_later(args.warmup + 0.05, mark)
    times = arrivals(args.rps, args.warmup + args.duration, seed=args.seed, even=args.arrivals == "even")
    meter = await generator.run(times, warmup_s=args.warmup)
    if not warm:
        raise BenchError("nothing was sent after the warm-up: a longer --duration is needed")
    start_s, before, client_start_s = warm[0]
    wall_s = time.monotonic() - start_s
    client_cores = (time.process_time() - client_start_s) / wall_s
    if before is None:
        return meter, client_cores, None
    return meter, client_cores, (cpu.read_tree(args.pid).since(before).cpu_ns / 1e9, wall_s)


def _hint(args: argparse.Namespace, meter: Meter) -> str:
    """What is usually wrong."""
    if "not connected" in meter.errors and not args.tls:
        return ": does the target want --tls?"
    if "immediate 404" in meter.errors:
        return f": do its endpoints serve the model {args.model}? --model names another"
    return ""


def _target(text: str, *, tls: bool) -> Target:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise BenchError(f"--target {text}: HOST:PORT is needed")
    return Target(host.strip("[]"), int(port), tls=tls)


def figures(meter: Meter, *, rps: float) -> dict[str, object]:
    """One row."""
    wall_s = meter.last_done_s - meter.first_sent_s
    row: dict[str, object] = {
        "rps_wanted": rps,
        "rps": round(len(meter.exchange_s) / wall_s, 2) if wall_s > 0 else 0.0,
        "requests": len(meter.late_s),
        "answered": len(meter.exchange_s),
        "errors": sum(meter.errors.values()),
        "errors_by_kind": dict(meter.errors),
        "picks": dict(meter.destinations.most_common()),
    }
    for name, values in (("decision", meter.decision_s), ("exchange", meter.exchange_s), ("late", meter.late_s)):
        ascending = sorted(values)
        row[f"{name}_mean_ms"] = round(math.fsum(ascending) / len(ascending) * 1e3, 4) if ascending else None
        for share_name, share in SHARES:
            row[f"{name}_{share_name}_ms"] = round(percentile(ascending, share) * 1e3, 4) if ascending else None
    return row


def _summary(row: dict[str, object], meter: Meter) -> Sequence[str]:
    titles = {"decision": "decision (headers sent -> destination)", "exchange": "whole exchange", "late": "sent late by"}
    lines = []
    for name, title in titles.items():
        lines.append({"what": title, **{key: row[f"{name}_{key}_ms"] for key in ("mean", *(share for share, _ in SHARES))}})
    sizes = f"{row['prompt_tokens']}+{row['output_tokens']} tokens"
    head = f"{row['target']}: {row['requests']} requests of {sizes}, {row['rps']}/s of {row['rps_wanted']:g}/s, {row['errors']} errors"
    text = [head, report.table(lines, COLUMNS)]
    if "target_cores" in row:
        text.append(f"CPU of the target: {row['target_cores']:.3f} cores, {row['target_cpu_us_per_request']} us a request")
    text.append(f"CPU of this client: {row['client_cores']:.3f} cores")
    picks = ", ".join(f"{name} {count}" for name, count in meter.destinations.most_common())
    text.append(f"picks: {picks or 'none'}")
    text += [f"error: {count} x {kind}: {meter.examples[kind]}" for kind, count in meter.errors.most_common()]
    late, decision = row["late_p99_ms"], row["decision_p99_ms"]
    if isinstance(late, float) and isinstance(decision, float) and late > LATE_SHARE * decision:
        text.append("note: the client itself was late by much of these latencies; give it a quieter machine or a lower --rps")
    return text
