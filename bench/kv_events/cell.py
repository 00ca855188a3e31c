"""One size of the pool, measured in a process of its own so that memory is what this index took.

CPU time of this thread, not the clock, is what everything takes: other work on the machine does not count. Decisions and frames meet in virtual
time, on one thread as in the picker: each takes the CPU time it took, whoever is due waits for what runs, frames are fed in pieces and
decisions go first.
"""

import gc
import math
import random
import resource
import struct
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, repeat
from pathlib import Path

from bench.kv_events.workload import BLOCK_TOKENS, Engines
from epp.prefix import kv_events
from epp.prefix.precise import PIECE_BLOCKS, PreciseIndex, hashes_of, seed

TICK_S = 0.05
SEED = 8
_END = object()


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured."""

    endpoints: int
    blocks: int
    steady_blocks: int
    decisions: int
    ingest_blocks_per_s: float
    prompt_tokens: int


def measure(plan: Plan) -> dict[str, object]:
    engines = Engines(plan.endpoints, plan.blocks, SEED)
    index = PreciseIndex(1 << 40, speculative_ttl_s=2.0)
    gc.collect()
    before_bytes = _rss_bytes()
    for endpoint, frame in engines.fill():
        for event in kv_events.decode(frame):
            index.apply(endpoint, event)
    gc.collect()
    taken_bytes = _rss_bytes() - before_bytes - engines.kept_bytes
    row: dict[str, object] = {
        "endpoints": plan.endpoints,
        "blocks": index.blocks,
        "distinct_blocks": len(index),
        "bytes_per_block": taken_bytes / index.blocks,
        "estimate_bytes_per_block": index.bytes_used / index.blocks,
    }
    gc.freeze()
    return row | _speed(plan, engines, index) | _decisions(plan, engines, index)


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _speed(plan: Plan, engines: Engines, index: PreciseIndex) -> dict[str, object]:
    """Frames of full caches, read and applied."""
    frames, stored, removed, number = [], 0, 0, 0
    while stored < plan.steady_blocks:
        frame, more, less = engines.step(number % plan.endpoints)
        frames.append((number % plan.endpoints, frame))
        stored, removed, number = stored + more, removed + less, number + 1
    events, began_ns = 0, time.thread_time_ns()
    for endpoint, frame in frames:
        for event in kv_events.decode(frame):
            index.apply(endpoint, event)
            events += 1
    took_s = (time.thread_time_ns() - began_ns) / 1e9
    return {
        "blocks_per_s_per_core": stored / took_s,
        "removed_blocks_per_s": removed / took_s,
        "events_per_s_per_core": events / took_s,
        "us_per_block": took_s * 1e6 / (stored + removed),
    }


def _decisions(plan: Plan, engines: Engines, index: PreciseIndex) -> dict[str, object]:
    """How long the index keeps a decision: from its being due to the look-up's end, while frames come in."""
    rng = random.Random(SEED)
    mask, start = (1 << plan.endpoints) - 1, seed("", "", BLOCK_TOKENS)
    sizes = tuple(accumulate(repeat(BLOCK_TOKENS, plan.prompt_tokens // BLOCK_TOKENS)))
    document_bytes = [struct.pack(f"<{len(tokens)}I", *tokens) for tokens, _ in engines.documents]
    waiting: deque[Iterator[None]] = deque()
    now_s = frames_s = tick_s = 0.0
    decisions_per_s = plan.ingest_blocks_per_s * BLOCK_TOKENS / plan.prompt_tokens  # as many as make engines store so much
    waited_us: list[float] = []
    served_us: list[float] = []
    pieces_us: list[float] = []
    fed_blocks, busy_s = 0, 0.0
    due_s = rng.expovariate(decisions_per_s)
    while len(waited_us) < plan.decisions:
        while frames_s <= now_s:  # arrivals; making them is not the picker's work
            endpoint = rng.randrange(plan.endpoints)
            frame, more, _ = engines.step(endpoint)
            waiting.append(_pieces(index, endpoint, frame))
            fed_blocks += more
            frames_s += more / plan.ingest_blocks_per_s
        if due_s <= now_s:
            prompt = (rng.choice(document_bytes) + rng.randbytes(4 * plan.prompt_tokens))[: 4 * plan.prompt_tokens]
            began_ns = time.thread_time_ns()
            hashes = hashes_of(prompt, BLOCK_TOKENS, start)
            index.cached(hashes, mask, sizes)
            index.speculate(rng.randrange(plan.endpoints), hashes, now_s)
            took_s = (time.thread_time_ns() - began_ns) / 1e9
            now_s += took_s
            busy_s += took_s
            waited_us.append((now_s - due_s) * 1e6)
            served_us.append(took_s * 1e6)
            due_s += rng.expovariate(decisions_per_s)
        elif tick_s <= now_s or waiting:
            began_ns = time.thread_time_ns()
            if tick_s <= now_s:
                index.tick(now_s)
                tick_s += TICK_S
            elif next(waiting[0], _END) is _END:
                waiting.popleft()
            took_s = (time.thread_time_ns() - began_ns) / 1e9
            now_s += took_s
            busy_s += took_s
            pieces_us.append(took_s * 1e6)
        else:
            now_s = min(due_s, frames_s, tick_s)
    return {
        "decision_p50_us": _quantile(waited_us, 0.5),
        "decision_p99_us": _quantile(waited_us, 0.99),
        "decision_alone_p50_us": _quantile(served_us, 0.5),
        "piece_max_us": max(pieces_us),
        "ingested_blocks_per_s": fed_blocks / now_s,
        "busy": busy_s / now_s,
    }


def _pieces(index: PreciseIndex, endpoint: int, frame: bytes) -> Iterator[None]:
    """One piece a step, as a subscriber feeds them."""
    for piece in kv_events.decode(frame).pieces(PIECE_BLOCKS):
        for event in piece:
            index.apply(endpoint, event)
        yield


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, math.floor(share * len(values)))]
