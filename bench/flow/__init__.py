"""Flow control's own cost: CPU of one request queued and one let through, by requests queued, and memory of each that waits.

The product's own FlowControl, in this process, without sockets: the pool is full, so many requests wait, and then `--requests` further
ones come; and later as many get a place. `dispatch` is a pump that finds much room, its look at the pool shared by many; `dispatch_one` is
one place that comes free: an event, a pump, a look at all endpoints and one request. Not here: what a request costs besides (decide, overhead).
"""

import argparse
import gc
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import report
from bench.arguments import number
from epp.admission.control import FlowControl
from epp.admission.queues import Waiting
from epp.admission.settings import BandSettings, Settings
from epp.arrival import Arrival
from epp.clock import MonotonicClock
from epp.datastore import Datastore
from epp.plugins.base import Plugin
from epp.plugins.detectors.concurrency import ConcurrencyDetector
from epp.plugins.flow_control.policies import (
    EdfOrderingPolicy,
    FcfsOrderingPolicy,
    GlobalStrictFairnessPolicy,
    ProgramAwareFairness,
    RoundRobinFairnessPolicy,
)
from epp.types import Address, EndpointSpec, LLMRequest, Snapshot

DESCRIPTION = """\
CPU of one request queued, and of one let through, with so many queued before it; bytes of memory of each that waits, its own body and
headers not counted. Figures are the least of `--rounds` rounds: noise on a shared machine only ever adds."""

TARGET_US = 15.0
"""For each operation."""
TARGET_QUEUED = 100_000
BODY_BYTES = 4_096
PROMPT_TOKENS = 1_000
POLICIES: dict[str, tuple[Callable[[], Plugin], type[FcfsOrderingPolicy] | type[EdfOrderingPolicy]]] = {
    "strict": (GlobalStrictFairnessPolicy, FcfsOrderingPolicy),
    "round-robin": (RoundRobinFairnessPolicy, FcfsOrderingPolicy),
    "program-aware": (ProgramAwareFairness, FcfsOrderingPolicy),
    "strict-edf": (GlobalStrictFairnessPolicy, EdfOrderingPolicy),
}
COLUMNS = (
    report.Column("policy", "policy"),
    report.Column("op", "op"),
    report.Column("queued", "queued"),
    report.Column("cpu_us", "cpu us", ".2f"),
    report.Column("bytes_per_request", "bytes/request", ".0f"),
    report.Column("target_us", "target us", ".0f"),
    report.Column("met", "met"),
)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--queued", type=_numbers, default=[1_000, 10_000, 100_000], metavar="N,N", help="(default: 1000,10000,100000)")
    parser.add_argument("--policies", type=_policies, default=list(POLICIES), metavar="NAME,NAME", help=f"of {', '.join(POLICIES)}")
    parser.add_argument("--flows", type=number(int, 1), default=100, help="fairness ids (default: %(default)s)")
    parser.add_argument("--endpoints", type=number(int, 1), default=16, help="(default: %(default)s)")
    parser.add_argument("--requests", type=number(int, 1), default=2_000, help="measured a round (default: %(default)s)")
    parser.add_argument("--rounds", type=number(int, 1), default=3, help="rounds of which the least counts (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write rows, machine and versions here too")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")


def run(args: argparse.Namespace) -> int:
    rows = []
    for policy in args.policies:
        for queued in args.queued:
            rows += measure(policy, queued, flows=args.flows, endpoints=args.endpoints, requests=args.requests, rounds=args.rounds)
            print(f"measured: {policy}, {queued} queued", flush=True)
    print()
    print(report.table(rows, COLUMNS))
    if args.json:
        notes = {"flows": args.flows, "endpoints": args.endpoints, "requests": args.requests, "rounds": args.rounds}
        report.write_json(Path(args.json), report.document(rows, ("msgspec",), notes))
    return int(args.check and any(row.get("met") is False for row in rows))


def measure(policy: str, queued: int, *, flows: int, endpoints: int, requests: int, rounds: int) -> list[dict[str, object]]:
    """A row for each operation."""
    bytes_each = memory(policy, queued, flows=flows, endpoints=endpoints)
    world = World(policy, flows=flows, endpoints=endpoints)
    world.enqueue(world.arrivals(queued))
    least: dict[str, float] = {}
    gc.collect()
    gc.freeze()
    gc.disable()  # what is measured makes no cycles; a pass over a frozen world would be somebody else's cost
    try:
        for _ in range(rounds):
            coming = world.arrivals(requests)
            took = {
                "enqueue": world.enqueue(coming),
                "dispatch": world.dispatch(requests // 2),
                "dispatch_one": world.dispatch_singly(requests),
            }
            world.enqueue(world.arrivals(queued - world.flow.requests))
            for op, cpu_us in took.items():
                least[op] = min(cpu_us, least.get(op, cpu_us))
    finally:
        gc.enable()
        gc.unfreeze()
    rows: list[dict[str, object]] = []
    for op, cpu_us in least.items():
        row: dict[str, object] = {"policy": policy, "op": op, "queued": queued, "cpu_us": cpu_us, "bytes_per_request": bytes_each}
        if queued == TARGET_QUEUED and op != "dispatch_one":
            row |= {"target_us": TARGET_US, "met": cpu_us <= TARGET_US}
        rows.append(row)
    return rows


def memory(policy: str, queued: int, *, flows: int, endpoints: int) -> float:
    """Bytes that flow control holds for each request that waits."""
    world = World(policy, flows=flows, endpoints=endpoints)
    coming = world.arrivals(queued)
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        world.enqueue(coming)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return (after - before) / queued


class Pool:
    """Every request may go to the same endpoints."""

    epoch = 0

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def of(self, _subset: Sequence[str] | None, _pool: str, _model: str) -> Snapshot:
        return self._snapshot


class Timer:
    """Nothing to cancel: the bench runs what is due itself."""

    def cancel(self) -> None:
        pass


class World:
    """A full pool and its flow control."""

    def __init__(self, policy: str, *, flows: int, endpoints: int) -> None:
        self.clock = MonotonicClock()
        datastore = Datastore(self.clock)
        datastore.apply([EndpointSpec(f"pod-{i}", Address(f"10.0.{i >> 8}.{i & 255}", 8000)) for i in range(1, endpoints + 1)])
        self._all = list(datastore.endpoints.values())
        for endpoint in self._all:
            endpoint.healthy = True
        self._detector = ConcurrencyDetector(max_concurrency=1_000)
        fairness, ordering = POLICIES[policy]
        band = BandSettings(requests_max=0, size_bytes_max=0, fairness=fairness(), ordering=ordering())
        self._due: list[Callable[[], None]] = []
        self.flow = FlowControl(
            Settings(default_band=band, bands=(band,), ttl_s=3_600.0, no_endpoints_ttl_s=3_600.0),
            Pool(Snapshot.of(self._all)),
            self.clock,
            self._call_at,
            detector=self._detector,
        )
        self._flows = [f"tenant-{number}" for number in range(flows)]
        self._sent: list[LLMRequest] = []
        self._entries: list[Waiting | None] = []
        self._serial = 0
        self._fill()

    def arrivals(self, count: int) -> list[Arrival]:
        return [self._arrival() for _ in range(max(0, count))]

    def enqueue(self, arrivals: list[Arrival]) -> float:
        """CPU microseconds each."""
        begin = self.flow.begin
        entries: list[Waiting | None] = [None] * len(arrivals)
        before_ns = time.thread_time_ns()
        for place, arrival in enumerate(arrivals):
            entries[place] = begin(arrival)
        took_ns = time.thread_time_ns() - before_ns
        assert all(entry is not None for entry in entries), "the pool is full"
        self._pumps()
        return took_ns / 1_000 / max(1, len(arrivals))

    def dispatch(self, count: int) -> float:
        """So many find room at once: CPU microseconds each."""
        self._free(count)
        before_ns = time.thread_time_ns()
        self.flow.changed()
        self._pumps()
        took_ns = time.thread_time_ns() - before_ns
        return took_ns / 1_000 / self._route(count)

    def dispatch_singly(self, count: int) -> float:
        """Places come free one by one: CPU microseconds each."""
        took_ns = 0
        for _ in range(count):
            self._free(1)
            before_ns = time.thread_time_ns()
            self.flow.changed()
            self._pumps()
            took_ns += time.thread_time_ns() - before_ns
            self._route(1)
        return took_ns / 1_000 / count

    def _arrival(self) -> Arrival:
        self._serial += 1
        request = LLMRequest(id=str(self._serial), path="/v1/chat/completions", headers={})
        request.fairness_id = self._flows[self._serial % len(self._flows)]
        request.model = request.target_model = "m"
        request.body_bytes, request.prompt_tokens = BODY_BYTES, PROMPT_TOKENS
        return Arrival(request, b"", None, self.clock.now_s(), understood=(None, ""), wake=lambda: self._sent.append(request), stages=())

    def _fill(self) -> None:
        for endpoint in self._all:
            endpoint.inflight_requests = self._detector.max_concurrency

    def _free(self, count: int) -> None:
        """Room for so many."""
        self._all[0].inflight_requests -= count

    def _route(self, count: int) -> int:
        """What the director does for those let through, and the pool is full again."""
        sent, self._sent = self._sent, []
        assert len(sent) == count, (len(sent), count)
        for request in sent:
            self.flow.routed(request, None)
        self._fill()
        self._pumps()
        return len(sent)

    def _call_at(self, when_s: float, call: Callable[[], None]) -> Timer:
        if when_s <= self.clock.now_s():
            self._due.append(call)
        return Timer()

    def _pumps(self) -> None:
        while self._due:
            due, self._due = self._due, []
            for call in due:
                call()


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers of at least 1 are needed, like 1000,10000")
    return found


def _policies(text: str) -> list[str]:
    found = text.split(",")
    unknown = [name for name in found if name not in POLICIES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(POLICIES)}")
    return found
