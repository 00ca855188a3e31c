"""CPU of one request through the whole picker, beside the least a gRPC server can do, in the same run.

All servers run at the same time and the load visits them in turn, round after round and case after case; of the rounds the minimum
counts, because noise on a shared machine only ever adds. README.md says what is measured and what is not.
"""

import argparse
import asyncio
import contextlib
import math
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench import BenchError, cpu, report
from bench.extproc_client import Client, LoadResult
from bench.processes import Child, free_ports
from bench.workload import Workload

DESCRIPTION = """\
CPU time per request of `epp serve` (16 endpoints, scraping them) and of a bare ext_proc echo on grpc.aio, which parses nothing and picks
nothing. Both run side by side; the same client visits them in turn, checking every reply. Figures are the minimum over the rounds.
A ratio below 1 means that the whole picker costs less than a stock gRPC server costs for moving the same bytes."""

RATIO_TARGETS = {1: 0.20, 16: 0.30, 128: 0.75}  # by prompt size in KB, for an answer in one chunk
CHUNK_RATIO_TARGET = 0.25
ENDPOINTS = 16
START_S = 20.0
SETTLE_S = 0.03  # for what a server still does after the last reply, such as taking note of resets
DISTRIBUTIONS = ("ngh2", "grpcio", "protobuf", "msgspec", "xxhash", "aiohttp", "uvloop")
COLUMNS = (
    report.Column("prompt_kb", "prompt KB"),
    report.Column("chunks", "chunks"),
    report.Column("cpu_us", "CPU us", ".1f"),
    report.Column("echo_cpu_us", "echo us", ".1f"),
    report.Column("ratio", "ratio", ".3f"),
    report.Column("ratio_median", "median", ".3f"),
    report.Column("target", "target", ".2f"),
    report.Column("met", "met"),
    report.Column("requests_per_s", "req/s", ".0f"),
    report.Column("chunk_cpu_us", "us/chunk", ".1f"),
    report.Column("echo_chunk_cpu_us", "echo us/chunk", ".1f"),
    report.Column("chunk_ratio", "ratio", ".3f"),
    report.Column("chunk_target", "target", ".2f"),
    report.Column("chunk_met", "met"),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One server's round of one case."""

    cpu_us: float  # of the server's process tree, per request
    requests_per_s: float
    client_cpu_us: float


@dataclass(slots=True)
class Case:
    """One prompt size with one number of chunks, and what was measured of it; index 0 the picker, 1 the echo."""

    prompt_kb: int
    chunks: int
    requests: list[int] = field(default_factory=lambda: [0, 0])
    samples: tuple[list[Sample], list[Sample]] = field(default_factory=lambda: ([], []))

    def least_us(self, server: int) -> float:
        return min(sample.cpu_us for sample in self.samples[server])

    def most_per_s(self, server: int) -> float:
        return max(sample.requests_per_s for sample in self.samples[server])


@dataclass(frozen=True, slots=True)
class Server:
    """A running server and the connections to it."""

    name: str
    child: Child
    client: Client

    async def measure(self, workload: Workload, requests: int) -> tuple[Sample, LoadResult]:
        before = cpu.read_tree(self.child.pid)
        result = await self.client.run(workload, requests)
        await asyncio.sleep(SETTLE_S)
        usage = cpu.read_tree(self.child.pid).since(before)
        if usage.threads_ended:
            _progress(f"{self.name}: {usage.threads_ended} threads ended during the round, what they used in it is lost")
        return Sample(usage.cpu_ns / 1e3 / requests, result.requests_per_s, result.client_cpu_s * 1e6 / requests), result


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# The figures


def rows(cases: Sequence[Case]) -> list[dict[str, object]]:
    """One row a case; the cost of a chunk is told on the cases with the more chunks, against the case with the fewest."""
    return [_row(case) | _chunk_figures(case, cases) for case in cases]


def _row(case: Case) -> dict[str, object]:
    ratio = case.least_us(0) / case.least_us(1)
    row: dict[str, object] = {
        "prompt_kb": case.prompt_kb,
        "chunks": case.chunks,
        "cpu_us": round(case.least_us(0), 2),
        "echo_cpu_us": round(case.least_us(1), 2),
        "ratio": round(ratio, 4),
        "ratio_median": round(statistics.median(mine.cpu_us / echo.cpu_us for mine, echo in zip(*case.samples, strict=True)), 4),
        "requests_per_s": round(case.most_per_s(0), 1),
        "echo_requests_per_s": round(case.most_per_s(1), 1),
        "client_cpu_us": round(min(sample.client_cpu_us for sample in case.samples[0]), 2),
        "requests": case.requests[0],
        "echo_requests": case.requests[1],
    }
    if case.chunks == 1 and case.prompt_kb in RATIO_TARGETS:
        target = RATIO_TARGETS[case.prompt_kb]
        row |= {"target": target, "met": ratio <= target}
    return row


def _chunk_figures(case: Case, cases: Sequence[Case]) -> dict[str, object]:
    base = min((other for other in cases if other.prompt_kb == case.prompt_kb), key=lambda other: other.chunks)
    more = case.chunks - base.chunks
    if not more:
        return {}
    mine, echo = ((case.least_us(server) - base.least_us(server)) / more for server in (0, 1))
    if echo <= 0:  # a handful of requests in a noisy moment
        return {"chunk_cpu_us": round(mine, 3), "echo_chunk_cpu_us": round(echo, 3)}
    ratio = mine / echo
    return {
        "chunk_cpu_us": round(mine, 3),
        "echo_chunk_cpu_us": round(echo, 3),
        "chunk_ratio": round(ratio, 4),
        "chunk_target": CHUNK_RATIO_TARGET,
        "chunk_met": ratio <= CHUNK_RATIO_TARGET,
    }


def missed(measured: Sequence[report.Row]) -> int:
    return sum(row.get(key) is False for row in measured for key in ("met", "chunk_met"))


# The servers


async def _until_answers(child: Child, port: int) -> None:
    """Wait until a whole exchange succeeds: listening, and its endpoints known."""
    workload, give_up_s, last = Workload(1, 1), time.monotonic() + START_S, ""
    while time.monotonic() < give_up_s:
        child.check()
        try:
            async with Client(port, streams=1, connections=1) as client:
                await client.run(workload, 1, timeout_s=5.0)
        except (BenchError, OSError) as error:
            last = str(error)
            await asyncio.sleep(0.1)
        else:
            return
    raise BenchError(f"the server on port {port} does not answer after {START_S:g} s: {last}\n{child.log_tail()}")


def _serve_arguments(args: argparse.Namespace, endpoint_ports: Sequence[int], ports: Sequence[int]) -> list[str]:
    arguments = ["epp", "serve"]
    for port in endpoint_ports:
        arguments += ["--endpoint", f"127.0.0.1:{port}"]
    for flag, port in zip(("--grpc-port", "--grpc-health-port", "--metrics-port"), ports, strict=True):
        arguments += [flag, str(port)]
    return [*arguments, "--secure-serving=false", "--transport", args.transport, *shlex.split(args.serve_args)]


def _echo(args: argparse.Namespace, stack: contextlib.ExitStack) -> tuple[Child, int]:
    child = stack.enter_context(Child(["bench", "echo", "--loop", args.echo_loop], announces=True))
    port = child.announced["port"]
    assert isinstance(port, int)
    return child, port


def _picker(args: argparse.Namespace, stack: contextlib.ExitStack) -> tuple[Child, int]:
    if args.baseline_only:
        return _echo(args, stack)
    stub = stack.enter_context(Child(["bench", "metrics-stub", "--count", str(ENDPOINTS)], announces=True))
    endpoint_ports = stub.announced["ports"]
    assert isinstance(endpoint_ports, list)
    ports = free_ports(3)
    return stack.enter_context(Child(_serve_arguments(args, endpoint_ports, ports))), ports[0]


@contextlib.asynccontextmanager
async def _servers(args: argparse.Namespace) -> AsyncIterator[list[Server]]:
    with contextlib.ExitStack() as stack:
        _progress("starting the picker, its endpoints and the echo")
        started = [("serve", *_picker(args, stack)), ("echo", *_echo(args, stack))]
        async with contextlib.AsyncExitStack() as clients:
            servers = []
            for name, child, port in started:
                await _until_answers(child, port)
                client = Client(port, streams=args.streams, connections=args.connections, graceful=args.graceful)
                servers.append(Server(name, child, await clients.enter_async_context(client)))
            yield servers


# The run


async def _idle_ms_per_s(server: Server, seconds: float) -> float:
    """What the picker uses while nobody asks it anything: scraping, its timers."""
    before, started_s = cpu.read_tree(server.child.pid), time.perf_counter()
    await asyncio.sleep(seconds)
    return cpu.read_tree(server.child.pid).since(before).cpu_ns / 1e6 / (time.perf_counter() - started_s)


async def _warm_up(args: argparse.Namespace, servers: Sequence[Server], case: Case, workload: Workload) -> None:
    """Fill caches, and learn how many requests make a round long enough to measure."""
    for i, server in enumerate(servers):
        await server.client.run(workload, args.streams * 2)
        sample, _ = await server.measure(workload, args.streams * (8 if case.chunks == 1 and not args.quick else 2))
        wanted = args.requests or math.ceil(args.round_cpu_s * 1e6 / sample.cpu_us)
        case.requests[i] = math.ceil(max(wanted, args.streams) / args.streams) * args.streams


async def _measure(args: argparse.Namespace) -> tuple[list[Case], dict[str, object]]:
    cases = [Case(prompt_kb, chunks) for prompt_kb in args.prompt_kb for chunks in args.chunks]
    _progress("making the prompts")
    workloads = [Workload(case.prompt_kb, case.chunks) for case in cases]
    destinations: Counter[str] = Counter()
    async with _servers(args) as servers:
        for case, workload in zip(cases, workloads, strict=True):
            await _warm_up(args, servers, case, workload)
            _progress(f"warm: {case.prompt_kb} KB, {case.chunks} chunks; {case.requests[0]} + {case.requests[1]} requests a round")
        idle = await _idle_ms_per_s(servers[0], args.idle_s)
        for turn in range(args.rounds):
            for case, workload in zip(cases, workloads, strict=True):
                for i, server in enumerate(servers):
                    server.child.check()
                    sample, result = await server.measure(workload, case.requests[i])
                    case.samples[i].append(sample)
                    if i == 0:
                        destinations += result.destinations
                mine, echo = case.samples[0][-1], case.samples[1][-1]
                _progress(
                    f"round {turn + 1}/{args.rounds}  {case.prompt_kb:4} KB {case.chunks:4} chunks"
                    f"  serve {mine.cpu_us:8.1f} us  echo {echo.cpu_us:8.1f} us  client {mine.client_cpu_us:7.1f} us"
                )
    picker = (
        "the echo itself (--baseline-only)" if args.baseline_only else f"epp serve, {ENDPOINTS} endpoints, --transport {args.transport}"
    )
    share = max(destinations.values()) / destinations.total()
    notes: dict[str, object] = {
        "serve": picker,
        "serve_args": args.serve_args,
        "idle_cpu_ms_per_s": round(idle, 2),
        "endpoints_chosen": len(destinations),
        "largest_share": round(share, 3),
        "echo_loop": args.echo_loop,
        "rounds": args.rounds,
        "streams": args.streams,
        "connections": args.connections,
        "stream_end": "half-close" if args.graceful else "RST_STREAM",
    }
    return cases, notes


def _summary(measured: Sequence[report.Row], notes: report.Row) -> Iterator[str]:
    yield report.table(measured, COLUMNS)
    yield ""
    yield f"serve is {notes['serve']}; it used {notes['idle_cpu_ms_per_s']} ms of CPU per second without any request (scraping; contained above)."
    yield f"It chose {notes['endpoints_chosen']} endpoints, the most favoured for {float(str(notes['largest_share'])):.0%} of the requests."
    yield f"Minimum of {notes['rounds']} rounds; {notes['streams']} streams on {notes['connections']} connections, ended by {notes['stream_end']}."
    yield f"Targets missed: {missed(measured)}."


def _numbers(text: str) -> list[int]:
    return sorted({_positive(part) for part in text.split(",")})


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def configure(parser: argparse.ArgumentParser) -> None:
    add: Callable[..., object] = parser.add_argument
    add("--prompt-kb", type=_numbers, default=[1, 16, 128], metavar="N,N", help="sizes of the chat body in KB (default: 1,16,128)")
    add("--chunks", type=_numbers, default=[1, 100], metavar="N,N", help="response body messages (default: 1,100)")
    add("--rounds", type=_positive, help="rounds of which the minimum counts (default: 9)")
    add("--requests", type=_positive, help="requests a round (default: as many as --round-cpu-s needs, found in the warm-up)")
    add("--round-cpu-s", type=float, default=0.55, metavar="S", help="server CPU seconds a round should last (default: %(default)s)")
    add("--idle-s", type=float, help="seconds to watch the picker without requests (default: 4)")
    add("--streams", type=_positive, default=32, help="exchanges at a time (default: %(default)s)")
    add("--connections", type=_positive, default=2, help="HTTP/2 connections they share (default: %(default)s)")
    add("--graceful", action="store_true", help="end streams by half-closing, not by RST_STREAM as Envoy does")
    add("--transport", choices=("h2", "grpc"), default="h2", help="the picker's transport (default: %(default)s)")
    add("--serve-args", default="", metavar="'...'", help="further arguments of `epp serve`, as one word")
    add(
        "--echo-loop",
        choices=("asyncio", "uvloop", "auto"),
        default="asyncio",
        help="the echo's event loop: the one grpc.aio runs on by itself, or the picker's rule, uvloop where installed (default: %(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="write rows, machine and versions here too")
    add("--check", action="store_true", help="exit with 1 if a target is missed")
    add("--quick", action="store_true", help="two rounds of few requests: shows that it works, measures little")
    add("--baseline-only", action="store_true", help=argparse.SUPPRESS)  # the echo on both sides: how far the ratio strays from 1


def run(args: argparse.Namespace) -> int:
    args.rounds = args.rounds or (2 if args.quick else 9)
    args.requests = args.requests or (64 if args.quick else None)
    if args.idle_s is None:
        args.idle_s = 0.5 if args.quick else 4.0
    cases, notes = asyncio.run(_measure(args))
    measured = rows(cases)
    print("\n".join(_summary(measured, notes)))
    if args.json is not None:
        report.write_json(args.json, report.document(measured, DISTRIBUTIONS, notes))
    return 1 if args.check and missed(measured) else 0
