"""CPU that reading the engines' metrics costs the picker, and how old readings get, by size of the pool.

A real `epp serve` reads stand-in model servers that give back a recorded vLLM text of 60 KB. README.md says what is measured and what is
not.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import shlex
import statistics
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

from bench import BenchError, cpu, report
from bench.processes import Child, free_ports
from bench.workload import MODEL
from epp._pb import epp_ext_proc_pb2 as pb

DESCRIPTION = """\
Cores that `epp serve` uses for reading the /metrics of so many model servers, and the age of a reading at the moment a decision uses it.
Idle: nobody asks the picker anything. Busy: every endpoint has a request in flight (a held ext_proc stream, sent there by the gateway's
subset hint), so that all of them are read at the pace of a loaded pool; requests as such cost nothing here, see `overhead` for those."""

CORES_TARGET = 0.25  # of a busy pool, whatever its size
TEXT_KB = 60
PORTS_PER_STUB = 250
START_S = 30.0
SETTLE_S = {"idle": 5.0, "busy": 2.0}  # until every endpoint has found its pace
REPLY_S = 10.0
PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
DESTINATION_HEADER = "x-gateway-destination-endpoint"
SUBSET_NAMESPACE, SUBSET = "envoy.lb.subset_hint", "x-gateway-destination-endpoint-subset"
DISTRIBUTIONS = ("ngh2", "httptools", "uvloop", "protobuf", "msgspec")
COLUMNS = (
    report.Column("endpoints", "endpoints"),
    report.Column("state", "state"),
    report.Column("cores", "cores", ".3f"),
    report.Column("scrapes_per_s", "scrapes/s", ".0f"),
    report.Column("scrape_cpu_us", "us/scrape", ".0f"),
    report.Column("age_p50_s", "age p50 s", ".3f"),
    report.Column("age_p99_s", "age p99 s", ".3f"),
    report.Column("target_cores", "target", ".2f"),
    report.Column("met", "met"),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One pool in one state."""

    endpoints: int
    state: str
    cores: float
    seconds: float
    gaps_s: Sequence[float]  # between two questions to the same endpoint
    stub_cores: float


def age_quantile_s(gaps_s: Sequence[float], quantile: float) -> float:
    """The age of a reading at a moment that knows nothing of scrapes, as decisions are: of a gap of g it is anything from 0 to g."""
    gaps, total, below_s = sorted(gaps_s), math.fsum(gaps_s), 0.0
    for number, gap_s in enumerate(gaps):
        longer = len(gaps) - number
        if below_s + longer * gap_s >= quantile * total:
            return (quantile * total - below_s) / longer
        below_s += gap_s
    return gaps[-1] if gaps else math.nan


def row(sample: Sample) -> dict[str, object]:
    per_s = len(sample.gaps_s) / sample.seconds
    found: dict[str, object] = {
        "endpoints": sample.endpoints,
        "state": sample.state,
        "cores": round(sample.cores, 4),
        "scrapes_per_s": round(per_s, 1),
        "scrape_cpu_us": round(sample.cores / per_s * 1e6, 1) if per_s else None,
        "gap_median_s": round(statistics.median(sample.gaps_s), 4) if sample.gaps_s else None,
        "age_p50_s": round(age_quantile_s(sample.gaps_s, 0.5), 4) if sample.gaps_s else None,
        "age_p99_s": round(age_quantile_s(sample.gaps_s, 0.99), 4) if sample.gaps_s else None,
        "stub_cores": round(sample.stub_cores, 4),
    }
    if sample.state == "busy":
        found |= {"target_cores": CORES_TARGET, "met": sample.cores <= CORES_TARGET}
    return found


def missed(rows: Sequence[report.Row]) -> int:
    return sum(each.get("met") is False for each in rows)


# The picker and its pool


class Stubs:
    """The model servers, in processes of their own."""

    def __init__(self, children: Sequence[Child]) -> None:
        self._children = children
        self._ports = [_ports(child) for child in children]

    @property
    def ports(self) -> list[int]:
        return list(itertools.chain.from_iterable(self._ports))

    def gaps_s(self) -> list[float]:
        """Since the last time they were asked for."""
        gaps: list[float] = []
        for ports in self._ports:
            with urllib.request.urlopen(f"http://127.0.0.1:{ports[0]}/bench/gaps", timeout=REPLY_S) as answer:
                gaps += json.load(answer)
        return gaps

    def cpu(self) -> list[cpu.Reading]:
        return [cpu.read_tree(child.pid) for child in self._children]


def _ports(child: Child) -> list[int]:
    ports = child.announced["ports"]
    assert isinstance(ports, list)
    return ports


def _messages(destination: str) -> tuple[bytes, bytes]:
    """The headers and the whole body of a request that may go to this endpoint only."""
    headers = {":path": "/v1/chat/completions", ":method": "POST", "content-type": "application/json", "x-request-id": destination}
    message = pb.ProcessingRequest(
        request_headers=pb.HttpHeaders(
            headers=pb.HeaderMap(headers=[pb.HeaderValue(key=key, raw_value=value.encode()) for key, value in headers.items()])
        ),
        protocol_config=pb.ProtocolConfiguration(request_body_mode=pb.FULL_DUPLEX_STREAMED, response_body_mode=pb.FULL_DUPLEX_STREAMED),
    )
    message.metadata_context.filter_metadata[SUBSET_NAMESPACE].update({SUBSET: [destination]})
    content = {"model": MODEL, "messages": [{"role": "user", "content": f"hold {destination}"}]}
    body = pb.ProcessingRequest(request_body=pb.HttpBody(body=json.dumps(content).encode(), end_of_stream=True))
    return message.SerializeToString(), body.SerializeToString()


def _destination(reply: bytes) -> str:
    message = pb.ProcessingResponse.FromString(reply)
    if message.HasField("immediate_response"):
        return f"a refusal: {message.immediate_response.body.decode(errors='replace')}"
    options = message.request_headers.response.header_mutation.set_headers
    return next((option.header.raw_value.decode() for option in options if option.header.key == DESTINATION_HEADER), "nowhere")


async def hold(channel: grpc.aio.Channel, destination: str) -> grpc.aio.StreamStreamCall[bytes, bytes]:
    """A request in flight at this endpoint, until the call is cancelled."""
    call = channel.stream_stream(PROCESS)()
    for message in _messages(destination):
        await call.write(message)
    reply = await asyncio.wait_for(call.read(), REPLY_S)
    if not isinstance(reply, bytes) or (chosen := _destination(reply)) != destination:
        raise BenchError(f"a request that may go to {destination} only went to {chosen if isinstance(reply, bytes) else 'nowhere'}")
    return call


@contextlib.asynccontextmanager
async def in_flight(port: int, destinations: Sequence[str]) -> AsyncIterator[None]:
    """One request in flight at each of them."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        calls = [await hold(channel, destination) for destination in destinations]
        try:
            yield
        finally:
            for call in calls:
                call.cancel()


async def _until_answers(child: Child, port: int, destination: str) -> None:
    give_up_s = time.monotonic() + START_S
    while True:
        child.check()
        try:
            async with in_flight(port, [destination]):
                return
        except (TimeoutError, grpc.aio.AioRpcError) as error:
            if time.monotonic() > give_up_s:
                raise BenchError(f"the picker does not answer after {START_S:g} s: {error}\n{child.log_tail()}") from None
            await asyncio.sleep(0.1)


def serve_arguments(endpoint_ports: Sequence[int], ports: Sequence[int], serve_args: str) -> list[str]:
    arguments = ["epp", "serve", "--secure-serving=false", "--drain-timeout=0s"]
    for port in endpoint_ports:
        arguments += ["--endpoint", f"127.0.0.1:{port}"]
    for flag, port in zip(("--grpc-port", "--grpc-health-port", "--metrics-port"), ports, strict=True):
        arguments += [flag, str(port)]
    return [*arguments, *shlex.split(serve_args)]


# The run


async def _watch(child: Child, stubs: Stubs, count: int, state: str, args: argparse.Namespace) -> Sample:
    await asyncio.sleep(min(SETTLE_S[state], 2 * args.seconds))
    stubs.gaps_s()
    started_s, before, stubs_before = time.perf_counter(), cpu.read_tree(child.pid), stubs.cpu()
    await asyncio.sleep(args.seconds)
    child.check()
    seconds = time.perf_counter() - started_s
    used = cpu.read_tree(child.pid).since(before)
    stubs_used_ns = sum(now.since(then).cpu_ns for now, then in zip(stubs.cpu(), stubs_before, strict=True))
    sample = Sample(count, state, used.cpu_ns / 1e9 / seconds, seconds, stubs.gaps_s(), stubs_used_ns / 1e9 / seconds)
    if state == "busy" and not sample.gaps_s:
        raise BenchError(f"no endpoint was asked twice in {seconds:.1f} s\n{child.log_tail()}")
    print(f"{count:5} endpoints {state}: {sample.cores:.3f} cores", file=sys.stderr, flush=True)
    return sample


async def _pool(count: int, args: argparse.Namespace) -> list[Sample]:
    with contextlib.ExitStack() as stack:
        sizes = [min(PORTS_PER_STUB, count - at) for at in range(0, count, PORTS_PER_STUB)]
        stubs = Stubs([stack.enter_context(Child(["bench", "metrics-stub", "--count", str(size)], announces=True)) for size in sizes])
        ports = free_ports(3)
        picker = stack.enter_context(Child(serve_arguments(stubs.ports, ports, args.serve_args)))
        destinations = [f"127.0.0.1:{port}" for port in stubs.ports]
        await _until_answers(picker, ports[0], destinations[0])
        samples = [await _watch(picker, stubs, count, "idle", args)]
        async with in_flight(ports[0], destinations):
            samples.append(await _watch(picker, stubs, count, "busy", args))
        return samples


async def _measure(args: argparse.Namespace) -> list[Sample]:
    return [sample for count in args.endpoints for sample in await _pool(count, args)]


def _summary(rows: Sequence[report.Row], notes: Mapping[str, object]) -> Iterator[str]:
    yield report.table(rows, COLUMNS)
    yield ""
    yield f"Answers of {TEXT_KB} KB; {notes['seconds']} s each. Busy: one request in flight at every endpoint, nothing else."
    yield f"Age: of a reading when a decision uses it, by the time between two questions. Target: at most {CORES_TARGET} core for a busy pool."
    yield f"Targets missed: {missed(rows)}."


def _numbers(text: str) -> list[int]:
    numbers = sorted({int(part) for part in text.split(",")})
    if numbers[0] < 1:
        raise ValueError(text)
    return numbers


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--endpoints", type=_numbers, default=[10, 100, 500], metavar="N,N", help="pool sizes (default: 10,100,500)")
    parser.add_argument("--seconds", type=float, default=8.0, metavar="S", help="to watch each pool, idle and busy (default: %(default)s)")
    parser.add_argument("--serve-args", default="", metavar="'...'", help="further arguments of `epp serve`, as one word")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write rows, machine and versions here too")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")


def run(args: argparse.Namespace) -> int:
    rows = [row(sample) for sample in asyncio.run(_measure(args))]
    notes = {"seconds": args.seconds, "serve_args": args.serve_args, "text_kb": TEXT_KB}
    print("\n".join(_summary(rows, notes)))
    if args.json is not None:
        report.write_json(args.json, report.document(rows, DISTRIBUTIONS, notes))
    return 1 if args.check and missed(rows) else 0
