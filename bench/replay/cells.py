"""One cell: one policy, one workload, one rate, one seed, in one process; many of them on all cores.

What is random in a cell comes from its seed and its names alone, so that a cell gives the same row alone, in any company and in any
order; all policies see the same arrivals and the same scrape phases.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from bench import BenchError
from bench.replay import scenarios, trace
from bench.replay.baselines import BASELINES
from bench.replay.flow_product import MARK, FlowProduct
from bench.replay.flow_scenarios import FLOW_SCENARIOS
from bench.replay.flow_stats import flow_figures
from bench.replay.job import BLOCK_TOKENS
from bench.replay.kv_events import DELAY_S, PreciseProduct
from bench.replay.policy import RoutingPolicy
from bench.replay.product import ProductPolicy, quiet
from bench.replay.profiles import Profile, profile_of
from bench.replay.simulation import Result, Scrapes, Simulation, engines_of
from bench.replay.stats import Objective, figures
from bench.replay.workload import Arrival, Workload
from epp.errors import ConfigError

CONFIGS = Path(__file__).parent / "configs"
PRECISE = "precise-prefix-cache-producer"
"""A configuration that names it hears of the engines' blocks."""
Row = dict[str, object]


@dataclass(frozen=True)
class Settings:
    """What all cells of a run share."""

    replicas: int = 8
    profile: str = "qwen3-32b-2xh100"
    """Of each replica; several, with commas, are dealt out to the replicas in turn."""
    trace: str = ""
    limit: int = 0
    block_tokens: int = BLOCK_TOKENS
    jitter: bool = True
    scrapes: Scrapes = field(default_factory=Scrapes)
    objective: Objective = field(default_factory=Objective)
    speeds: Sequence[float] = ()
    offload_tokens: int = 0
    warmup_s: float = 0.0
    usage: bool = False
    whole: float = 0.0
    event_delay_s: float = DELAY_S
    kv_tokens: int = 0
    """Of each replica's KV cache; 0: the profile's."""


@dataclass(frozen=True)
class Cell:
    policy: str
    config: str
    """EndpointPickerConfig of a policy of the product; empty for a baseline."""
    workload: str
    """Of a scenario; `trace` for the trace."""
    rate: float
    seed: int


def configured(name: str) -> str:
    """The EndpointPickerConfig of a policy of the product that comes with the bench; empty if there is none of that name."""
    path = CONFIGS / f"{name}.yaml"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def known() -> Sequence[str]:
    """Names of policies, the product's first."""
    return [*sorted(path.stem for path in CONFIGS.glob("*.yaml")), *BASELINES]


@cache
def _arrivals(path: str, limit: int, block_tokens: int) -> Sequence[Arrival]:
    return trace.read(Path(path), limit, block_tokens)


def workload_of(settings: Settings, name: str, seed: int) -> Workload:
    if name != "trace":
        make = scenarios.SCENARIOS.get(name) or FLOW_SCENARIOS[name]
        return make(scenarios.Setting(settings.replicas, _typical(profiles_of(settings)), seed))
    arrivals = _arrivals(settings.trace, settings.limit, settings.block_tokens)
    return trace.workload("trace", arrivals, jitter=settings.jitter, seed=seed)


def profiles_of(settings: Settings) -> Sequence[Profile]:
    """Of each replica. Raises BenchError with the names there are."""
    named = [profile_of(name) for name in settings.profile.split(",")]
    return [named[replica % len(named)] for replica in range(settings.replicas)]


def _typical(profiles: Sequence[Profile]) -> Profile:
    """One as fast at prefill as they are on average, for that is what a scenario's load goes by."""
    first = profiles[0]
    if len(set(profiles)) == 1:
        return first
    step_s = first.batch_tokens / statistics.fmean(profile.prefill_tokens_per_s for profile in profiles)
    token_s = (step_s - first.step_base_s - first.sequence_s) / first.batch_tokens
    return replace(first, name="typical", prefill_token_s=token_s, kv_tokens=min(profile.kv_tokens for profile in profiles))


def play(settings: Settings, cell: Cell) -> Result:
    """Raises ConfigError for a configuration that is not one."""
    profiles = profiles_of(settings)
    if settings.kv_tokens:
        profiles = [replace(profile, kv_tokens=settings.kv_tokens) for profile in profiles]
    profile = profiles[0]
    workload = workload_of(settings, cell.workload, cell.seed).faster(cell.rate)
    if settings.speeds:
        workload = replace(workload, speeds=tuple(settings.speeds))
    engines = engines_of(
        profiles, settings.replicas, workload, offload_tokens=settings.offload_tokens, promises=cell.policy == "clairvoyant"
    )
    rng = random.Random(f"{cell.policy} {cell.workload} {cell.rate} {cell.seed}")
    policy: RoutingPolicy
    if cell.config:
        slots = workload.adapters.slots if workload.adapters else 0
        if PRECISE in cell.config:
            policy = PreciseProduct(
                cell.config, cell.policy, profile, rng, engines, delay_s=settings.event_delay_s, adapters_max=slots, usage=settings.usage
            )
        elif MARK in cell.config:
            policy = FlowProduct(cell.config, cell.policy, profile, rng, adapters_max=slots, usage=settings.usage)
        else:
            policy = ProductPolicy(cell.config, cell.policy, profile, rng, adapters_max=slots, usage=settings.usage)
    else:
        policy = baseline = BASELINES[cell.policy]()
        baseline.bind(profile, engines, rng)
    phases_rng = random.Random(f"phases {cell.seed}")
    phases = [phases_rng.random() for _ in engines]
    return Simulation(workload, engines, policy, settings.scrapes, phases, whole=settings.whole).run()


def row_of(settings: Settings, cell: Cell) -> Row:
    result = play(settings, cell)
    named: Row = {"workload": cell.workload, "policy": cell.policy, "rate": cell.rate, "seed": cell.seed}
    more = flow_figures(result) if cell.workload in FLOW_SCENARIOS else {}
    return named | figures(result, settings.objective, settings.warmup_s) | more


def run_all(settings: Settings, cells: Sequence[Cell], jobs: int, progress: Callable[[str], None]) -> list[Row]:
    """One row a cell, in the cells' order. Raises BenchError where one can't be played."""
    rows: dict[int, Row] = {}
    started_s = time.monotonic()
    for done, (position, row, took_s) in enumerate(_results(settings, cells, jobs), 1):
        rows[position] = row
        cell = cells[position]
        mean_s, p90_s = row["ttft_mean_s"], row["ttft_p90_s"]
        ttft = "nobody answered" if mean_s is None else f"TTFT mean {mean_s:.3f} s, p90 {p90_s:.3f} s"
        progress(
            f"[{done}/{len(cells)}] {cell.workload} {cell.policy} rate {cell.rate:g} seed {cell.seed}: {ttft}, "
            f"errors {row['errors']} ({took_s:.1f} s CPU, {time.monotonic() - started_s:.0f} s in all)"
        )
    return [rows[position] for position in range(len(cells))]


def _results(settings: Settings, cells: Sequence[Cell], jobs: int) -> Iterator[tuple[int, Row, float]]:
    work = [(settings, position, cell) for position, cell in enumerate(cells)]
    jobs = min(jobs, len(cells))
    if jobs <= 1:
        yield from map(_one, work)
        return
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    with context.Pool(jobs, initializer=_worker) as pool:
        yield from pool.imap_unordered(_one, work)


def _worker() -> None:
    """Signals are the parent's business: Ctrl-C ends the pool from there, and its end must not look like one."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _one(work: tuple[Settings, int, Cell]) -> tuple[int, Row, float]:
    settings, position, cell = work
    before_s = time.process_time()
    try:
        with quiet():
            row = row_of(settings, cell)
    except ConfigError as error:
        raise BenchError(f"policy {cell.policy}: {error}") from None
    return position, row, time.process_time() - before_s
