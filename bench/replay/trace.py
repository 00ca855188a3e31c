"""Traces in the Mooncake format: one JSON object a line with `timestamp` (ms), `input_length`, `output_length` and `hash_ids`.

`hash_ids` name 512-token prefix blocks: equal ids are equal content, and everything before them is equal too. Times may be quantised (the
conversation trace has 3-second ticks, ten requests on each): raw, that is a train of synchronised bursts; jittered, each request is moved
to a random place within its tick. The two are different workloads, so every result says which it is.

Other block sizes that divide 512 are taken too: a block's id stands for all that is before it, so the id of the last of them in each 512
tokens stands for those.

An id may be any integer or string. Those that are no place among the engines' 62 bits get one, in order of appearance.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import msgspec

from bench import BenchError
from bench.replay.job import BLOCK_TOKENS
from bench.replay.workload import Arrival, Workload

TAIL = 1 << 62
"""Id of a last block the trace names none for: nothing is ever found by it, for it is not full."""
RENAMED = 1 << 63
"""From here on: blocks whose ids in the trace are strings, or no number from 0 to `TAIL`."""
BOM = b"\xef\xbb\xbf"
TICK_MIN_MS = 500
"""Times at least this far apart, mostly shared by several requests, are ticks."""


class _Line(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int | str]


def read(path: Path, limit: int = 0, block_tokens: int = BLOCK_TOKENS) -> Sequence[Arrival]:
    """Raises BenchError that says which line is wrong. `limit`: the first so many requests, 0 is all."""
    if block_tokens < 1 or BLOCK_TOKENS % block_tokens:
        raise BenchError(f"blocks of {block_tokens} tokens: a divisor of {BLOCK_TOKENS} is needed")
    decoder = msgspec.json.Decoder(_Line)
    arrivals: list[Arrival] = []
    renamed: dict[int | str, int] = {}
    number = 0
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                line = text.removeprefix(BOM) if number == 1 else text
                if not line.strip():
                    continue
                arrivals.append(_arrival(decoder.decode(line), renamed, f"{path}:{number}", block_tokens))
                if len(arrivals) == limit:
                    break
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BenchError(f"{path}:{number}: not a Mooncake trace: {error}") from None
    if not arrivals:
        raise BenchError(f"{path}: no requests in it")
    first_s = min(arrival.at_s for arrival in arrivals)
    return sorted((arrival._replace(at_s=arrival.at_s - first_s) for arrival in arrivals), key=lambda arrival: arrival.at_s)


def _arrival(line: _Line, renamed: dict[int | str, int], place: str, block_tokens: int) -> Arrival:
    if line.input_length < 1 or line.output_length < 0:
        raise BenchError(f"{place}: lengths must be at least 1 and 0")
    if len(line.hash_ids) < line.input_length // block_tokens:
        blocks = -(-line.input_length // block_tokens)
        raise BenchError(
            f"{place}: {line.input_length} tokens are {blocks} blocks of {block_tokens}, but hash_ids has {len(line.hash_ids)}: try --block-tokens"
        )
    each = BLOCK_TOKENS // block_tokens
    named = line.hash_ids[each - 1 :: each][: line.input_length // BLOCK_TOKENS]
    ids = [_block(name, renamed) for name in named]
    if line.input_length % BLOCK_TOKENS:  # the tail; a trace may leave it out
        ids.append(_block(line.hash_ids[-1], renamed) if len(line.hash_ids) > len(ids) * each else TAIL | len(ids))
    return Arrival(line.timestamp / 1000, line.input_length, line.output_length, tuple(ids))


def _block(name: int | str, renamed: dict[int | str, int]) -> int:
    if isinstance(name, int) and 0 <= name < TAIL:
        return name
    return renamed.setdefault(name, RENAMED + len(renamed))


def tick_s(arrivals: Sequence[Arrival]) -> float:
    """The grid the times lie on; 0 where they are fine-grained."""
    times_ms = sorted({round(arrival.at_s * 1000) for arrival in arrivals})
    if len(times_ms) < 2 or len(times_ms) * 2 > len(arrivals):
        return 0.0
    gaps_ms = sorted(after - before for before, after in pairwise(times_ms))
    usual_ms = gaps_ms[len(gaps_ms) // 2]
    return usual_ms / 1000 if usual_ms >= TICK_MIN_MS else 0.0


def workload(name: str, arrivals: Sequence[Arrival], *, jitter: bool, seed: int) -> Workload:
    """The trace as one seed replays it."""
    grid_s = tick_s(arrivals) if jitter else 0.0
    if grid_s:
        rng = random.Random(f"jitter {seed}")
        moved = [arrival._replace(at_s=arrival.at_s + rng.random() * grid_s) for arrival in arrivals]
        arrivals = sorted(moved, key=lambda arrival: arrival.at_s)
    return Workload(name, arrivals, notes={"tick_s": grid_s, "jitter": bool(grid_s)})
