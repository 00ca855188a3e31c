"""`python -m bench replay`: what a policy does to latency, in virtual time: the product's own scheduling code against the field's.

README.md explains the model, its calibration and its limits. Here is the command alone: options to cells, rows to tables and files.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from bench import BenchError, report
from bench.arguments import number
from bench.replay import flow
from bench.replay.baselines import BASELINES
from bench.replay.cells import Cell, Row, Settings, configured, known, profiles_of, row_of, run_all, workload_of
from bench.replay.job import BLOCK_TOKENS
from bench.replay.kv_events import DELAY_S
from bench.replay.profiles import DEFAULT_PROFILE, PROFILES
from bench.replay.saturation import LOADS, saturation_rate
from bench.replay.scenarios import SCENARIOS
from bench.replay.simulation import Scrapes
from bench.replay.stats import Objective
from bench.replay.tables import plot, plotting, text_of
from epp.datastore import ENDPOINTS_MAX

REPLICAS_MAX = ENDPOINTS_MAX
"""What a pool of the product holds."""

DESCRIPTION = f"""\
Replay a trace or a scenario in virtual time against simulated engines, once for each policy, rate and seed, and compare what requests
see. The product's policies run the product's own code; the others are written from their published formulas.

policies:  {", ".join(known())}
scenarios: {", ".join(SCENARIOS)}
profiles:  {", ".join(PROFILES)}
"""


def configure(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--trace", metavar="FILE", help="a trace in the Mooncake format")
    what.add_argument("--scenario", metavar="NAME[,NAME]", help="synthetic workloads, or `all`")
    what.add_argument("--flow", metavar="NAME[,NAME]", help="what flow control does: tenants, priority, cold-burst, or `all`")
    parser.add_argument(
        "--limit", type=number(int, 1), default=0, metavar="N", help="only the first N requests of the trace (default: all)"
    )
    parser.add_argument(
        "--block-tokens", type=int, default=BLOCK_TOKENS, metavar="N", help="tokens of a block in the trace (default: %(default)s)"
    )
    ticks = parser.add_mutually_exclusive_group()
    ticks.add_argument("--raw", action="store_true", help="the trace's times as they are, ticks and all")
    ticks.add_argument("--jitter", action="store_true", help="requests at random places within their tick (the default)")
    parser.add_argument("--rate", type=_positive, default=[1.0], metavar="X[,X]", help="arrivals so many times as dense (default: 1)")
    parser.add_argument("--saturation", action="store_true", help=f"rates at {_shares()} of where round robin saturates")
    parser.add_argument("--policies", metavar="P[,P]", help="of those above, or NAME=FILE.yaml (default: all)")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 1 to N (default: %(default)s)")
    parser.add_argument("--replicas", type=int, default=8, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--profile",
        default=DEFAULT_PROFILE,
        metavar="NAME[,NAME]",
        help="of a replica; several are dealt out to the replicas in turn (default: %(default)s)",
    )
    parser.add_argument("--speeds", type=_positive, default=[], metavar="X[,X]", help="by replica, of the profile's; 1 for those not named")
    parser.add_argument(
        "--offload-tokens", type=number(int, 0), default=0, metavar="N", help="CPU memory behind each KV cache (default: none)"
    )
    parser.add_argument("--scrape-interval", type=float, default=0.05, metavar="S", help="seconds between scrapes (default: %(default)s)")
    parser.add_argument(
        "--scrape-delay", type=float, default=0.0, metavar="S", help="seconds until a reading is known (default: %(default)s)"
    )
    parser.add_argument("--kv-tokens", type=int, default=0, metavar="N", help="tokens of each KV cache (default: its profile's)")
    parser.add_argument(
        "--event-delay",
        type=float,
        default=DELAY_S,
        metavar="S",
        help="until policies that read KV events know of a block (default: %(default)s)",
    )
    parser.add_argument("--usage", action="store_true", help="answers end with token counts, cached ones included")
    parser.add_argument(
        "--whole", type=_share, default=0.0, metavar="X", help="share of answers not streamed: no policy hears of their first token"
    )
    parser.add_argument("--slo-ttft", type=number(float, 0), default=2.0, metavar="S", help="for goodput (default: %(default)s)")
    parser.add_argument("--slo-tpot", type=number(float, 0), default=0.1, metavar="S", help="for goodput (default: %(default)s)")
    parser.add_argument("--warmup", type=number(float, 0), default=0.0, metavar="S", help="requests of the first S seconds are not counted")
    parser.add_argument("--json", metavar="FILE", help="write rows, machine and versions here too")
    parser.add_argument("--plot", metavar="DIR", help="TTFT p90 and goodput over the rate, PNG and SVG (needs matplotlib)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes (default: all cores)")


def utc_now() -> datetime:
    return datetime.now(UTC)


def run(args: argparse.Namespace, now: Callable[[], datetime] = utc_now) -> int:
    """`now`: nothing but the date in the notes comes from it."""
    settings = _settings(args)
    date = now()
    if args.flow is not None:
        return _flow(args, settings, date)
    workloads = ["trace"] if args.trace is not None else _scenarios(args.scenario)
    policies = policies_of(args.policies or "")
    if args.plot:
        plotting()
    cells = []
    loads: dict[str, object] = {}
    for workload in workloads:
        rates = args.rate
        print(described(settings, workload), flush=True)
        if args.saturation:
            saturated = _saturation(settings, workload)
            loads[workload] = saturated
            rates = [round(load * saturated, 4) for load in LOADS]
            print(
                f"{workload}: round robin saturates at rate {saturated:g}; playing {', '.join(f'{rate:g}' for rate in rates)}", flush=True
            )
        cells += [
            Cell(name, config, workload, rate, seed) for rate in rates for name, config in policies for seed in range(1, args.seeds + 1)
        ]
    rows = run_all(settings, cells, args.jobs, lambda line: print(line, flush=True))
    print()
    print(text_of(rows))
    if args.json:
        report.write_json(Path(args.json), report.document(rows, ("msgspec", "xxhash"), notes_of(settings, loads, date)))
    if args.plot:
        for path in plot(rows, Path(args.plot)):
            print(f"written: {path}")
    return 0


def notes_of(settings: Settings, saturation: Mapping[str, object], date: datetime) -> dict[str, object]:
    """Everything rows depend on beside what they name themselves, the product and its dependencies."""
    kv_tokens = [settings.kv_tokens or profile.kv_tokens for profile in profiles_of(settings)[: len(settings.profile.split(","))]]
    return {
        "date": date.astimezone(UTC).isoformat(timespec="seconds"),
        "replicas": settings.replicas,
        "profile": settings.profile,
        "speeds": list(settings.speeds),
        "trace": Path(settings.trace).name if settings.trace else "",
        "limit": settings.limit,
        "block_tokens": settings.block_tokens,
        "arrivals": ("jittered" if settings.jitter else "raw") if settings.trace else "scenario",
        "scrape_interval_s": settings.scrapes.interval_s,
        "scrape_delay_s": settings.scrapes.delay_s,
        "kv_tokens": kv_tokens if len(kv_tokens) > 1 else kv_tokens[0],
        "offload_tokens": settings.offload_tokens,
        "event_delay_s": settings.event_delay_s,
        "usage": settings.usage,
        "whole": settings.whole,
        "warmup_s": settings.warmup_s,
        "slo_ttft_s": settings.objective.ttft_s,
        "slo_tpot_s": settings.objective.tpot_s,
        "saturation": dict(saturation),
    }


def _flow(args: argparse.Namespace, settings: Settings, date: datetime) -> int:
    foreign = {
        "--plot": args.plot, "--saturation": args.saturation, "--rate": args.rate != [1.0], "--raw": args.raw, "--jitter": args.jitter,
        "--limit": args.limit, "--block-tokens": args.block_tokens != BLOCK_TOKENS,
    }  # fmt: skip
    for flag, given in foreign.items():
        if given:
            raise BenchError(f"{flag} is not for --flow: its loads are the scenarios' own, its figures a table")
    policies = args.policies.split(",") if args.policies else flow.POLICIES
    scenarios = flow.scenarios_of(args.flow)
    rows = flow.play(settings, scenarios, policies, seeds=args.seeds, jobs=args.jobs, progress=lambda line: print(line, flush=True))
    print(f"\n{flow.text_of(rows)}")
    if args.json:
        report.write_json(Path(args.json), report.document(rows, ("msgspec", "xxhash"), notes_of(settings, {}, date)))
    return 0


def described(settings: Settings, name: str) -> str:
    """What is going to be played, in a line."""
    workload = workload_of(settings, name, 1)
    tick_s = float(str(workload.notes.get("tick_s", 0.0)))
    ticks = f", jittered within ticks of {tick_s:g} s" if tick_s else ""
    return f"{name}: {workload.requests} requests, the last comes at {workload.arrivals[-1].at_s:.0f} s{ticks}"


def policies_of(text: str) -> list[tuple[str, str]]:
    """(name, EndpointPickerConfig or nothing for a baseline) of each. Raises BenchError for one nobody knows."""
    found = []
    for part in text.split(",") if text else known():
        name, is_file, path = part.strip().partition("=")
        if is_file:
            try:
                found.append((name, Path(path).read_text(encoding="utf-8")))
            except OSError as error:
                raise BenchError(f"{path}: {error.strerror}") from None
        elif name in BASELINES or configured(name):
            found.append((name, configured(name)))
        else:
            raise BenchError(f"no policy is named {name!r}: {', '.join(known())}, or NAME=FILE.yaml")
    return found


def _settings(args: argparse.Namespace) -> Settings:
    if min(args.replicas, args.seeds, args.jobs) < 1:
        raise BenchError("--replicas, --seeds and --jobs are at least 1")
    if args.replicas > REPLICAS_MAX:
        raise BenchError(f"--replicas {args.replicas}: at most {REPLICAS_MAX}, for that is what a pool of the product holds")
    if args.profile.count(",") >= args.replicas:
        raise BenchError(f"--profile has {args.profile.count(',') + 1} names, --replicas is {args.replicas}: some would not be played")
    if args.policies is not None:
        _different("--policies", [part.partition("=")[0].strip() for part in args.policies.split(",")])
    for flag, text in (("--scenario", args.scenario), ("--flow", args.flow)):
        if text is not None:
            _different(flag, text.split(","))
    _different("--rate", [f"{rate:g}" for rate in args.rate])
    if not (0 < args.scrape_interval < math.inf and 0 <= args.scrape_delay < math.inf):
        raise BenchError("--scrape-interval is above 0, --scrape-delay not below")
    if args.kv_tokens < 0 or not 0 <= args.event_delay < math.inf:
        raise BenchError("--kv-tokens and --event-delay are not below 0")
    settings = Settings(
        replicas=args.replicas,
        profile=args.profile,
        trace=args.trace or "",
        limit=args.limit,
        block_tokens=args.block_tokens,
        jitter=not args.raw,
        scrapes=Scrapes(args.scrape_interval, args.scrape_delay),
        objective=Objective(args.slo_ttft, args.slo_tpot),
        speeds=tuple(args.speeds),
        offload_tokens=args.offload_tokens,
        warmup_s=args.warmup,
        usage=args.usage,
        whole=args.whole,
        event_delay_s=args.event_delay,
        kv_tokens=args.kv_tokens,
    )
    profiles_of(settings)
    return settings


def _different(flag: str, names: Sequence[str]) -> None:
    """What is played twice would count as twice as many seeds."""
    for name in names:
        if not name:
            raise BenchError(f"{flag}: a name is missing")
        if names.count(name) > 1:
            raise BenchError(f"{flag}: {name} is there more than once")


def _scenarios(text: str) -> Sequence[str]:
    names = list(SCENARIOS) if text == "all" else text.split(",")
    for name in names:
        if name not in SCENARIOS:
            raise BenchError(f"no scenario is named {name!r}: {', '.join(SCENARIOS)}")
    return names


def _saturation(settings: Settings, workload: str) -> float:
    def ttft_p90_s(rate: float) -> float:
        row: Row = row_of(settings, Cell("round-robin", "", workload, rate, 1))
        if row["ttft_p90_s"] is None:
            raise BenchError(f"{workload}: round robin has no answer at rate {rate:g}, and so no rate that saturates it; give --rate")
        return float(str(row["ttft_p90_s"]))

    found = saturation_rate(ttft_p90_s)
    if found == float("inf"):
        raise BenchError(f"{workload}: round robin never saturates; give --rate")
    return found


def _shares() -> str:
    return ", ".join(f"{load * 100:.0f}" for load in LOADS) + " %%"


def _share(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 <= found <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share, from 0 to 1")
    return found


def _positive(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers, like 0.6,1") from None
    if not all(0 < each < math.inf for each in found):
        raise argparse.ArgumentTypeError(f"{text!r}: numbers above 0 are needed")
    return found
