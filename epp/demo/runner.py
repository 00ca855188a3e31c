"""The order of events of `epp demo`: start, warm up, round robin, reset, picker, compare, stop.

Both phases send the same conversations at the same times through the same Envoy to the same engines, whose prefix caches are empty
at the start of each. A few warm-up requests through both listeners come first, so that neither phase pays for first connections.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import aiohttp
import msgspec

from epp.demo import DemoOptions, demo_options
from epp.demo.client import play, send
from epp.demo.readings import CpuTime, EngineReading, cpu_time, engine_reading, hit_rate, picks, picks_since
from epp.demo.results import Summary, Tally, report, summarise
from epp.demo.workload import CHAT, ChatSession, Conversation, Turn, chat_sessions, read_trace
from epp.engines.fetch import Fetcher, FetchError, HttpFetcher
from epp.errors import ConfigError, Problem, StartError
from epp.sim.options import MODEL_DEFAULT

try:
    from epp.demo.processes import Parts, running
    from epp.demo.view import EngineRow, Progress, View, make_view, progress_line
except ModuleNotFoundError as error:
    raise StartError(f"{error.name} is not installed: pip install 'envoy-endpoint-picker[demo]'") from None

ROUND_ROBIN = "round robin"
PICKER = "picker"
OVERHEAD_S = 6.0
"""Of real time, for starting, warming up and stopping; the two phases share the rest of `--duration`."""
TRACE_TAIL_S = 20.0
"""Of simulated time, kept free for the last answers of a trace."""
CHAT_KV_BLOCKS = 6144
"""Of 16 tokens: an engine can hold the sessions that stay with it, not those of all four."""
TRACE_KV_BLOCKS = 65_536
"""The longest prompts of the Mooncake traces have 126 000 tokens."""
SHOW_INTERVAL_S = 0.25
RESET_S = 5.0
INTERRUPTED = 130
SCHEDSTAT = Path("/proc/self/schedstat")
CROWDED = 1.0
"""Waiting longer for a CPU than having one: whatever else runs on this machine is then in every time that is shown."""


class Meter:
    """What engines and picker say since the start of a phase. A page that can't be had leaves the last reading as it was."""

    def __init__(self, parts: Parts, fetcher: Fetcher) -> None:
        self.parts = parts
        self._fetcher = fetcher
        self._now: dict[str, EngineReading] = dict.fromkeys(parts.engines, EngineReading())
        self._start = self._now
        self._picks: dict[str, int] = {}
        self._picks_start: dict[str, int] = {}

    @property
    def engines(self) -> dict[str, EngineReading]:
        return {name: reading.since(self._start[name]) for name, reading in self._now.items()}

    @property
    def picks(self) -> dict[str, int]:
        return picks_since(self._picks, self._picks_start)

    @property
    def hit_rate(self) -> float:
        return hit_rate(list(self.engines.values()))

    def rows(self, *, picked: bool) -> list[EngineRow]:
        """Requests by the picker's own count where it picked, else by the engine's."""
        counts = self.picks if picked else {name: reading.received for name, reading in self.engines.items()}
        return [
            EngineRow(name, counts.get(name, 0), reading.running, reading.waiting, reading.kv_usage, hit_rate([reading]))
            for name, reading in self.engines.items()
        ]

    async def start(self) -> None:
        await self.read()
        self._start, self._picks_start = dict(self._now), self._picks

    async def read(self) -> None:
        await asyncio.gather(self._read_picker(), *(self._read_engine(name) for name in self.parts.engines))

    async def _read_engine(self, name: str) -> None:
        with suppress(FetchError):
            self._now[name] = engine_reading(await self._fetcher.fetch(f"http://{self.parts.engines[name]}/metrics"))

    async def _read_picker(self) -> None:
        with suppress(FetchError):
            self._picks = picks(await self._fetcher.fetch(f"http://{self.parts.picker_metrics}/metrics"))


class Load(NamedTuple):
    """What to send, and to what."""

    conversations: Sequence[Conversation]
    kv_blocks: int
    title: str

    @property
    def requests(self) -> int:
        return sum(conversation.requests for conversation in self.conversations)


async def run_demo(args: argparse.Namespace) -> int:
    """Exit code: 0, 1 if any request failed, 130 on Ctrl-C or SIGTERM. Nothing it started is left running."""
    options = demo_options(args)
    if options.json and not Path(options.json).parent.is_dir():
        raise ConfigError("command line", [Problem("--json", f"{Path(options.json).parent} is no directory")])
    load = make_load(options)
    with make_view(plain=options.plain) as view, interruptible() as interrupted:
        try:
            return await _run(options, load, view)
        except asyncio.CancelledError:
            if not interrupted.is_set():
                raise
            view.say("interrupted: everything is stopped")
            return INTERRUPTED


def make_load(options: DemoOptions) -> Load:
    phase_s = max(0.0, options.duration_s - OVERHEAD_S) / 2 * options.time_scale
    if options.trace is not None:
        rows = read_trace(options.trace, options.limit)
        fitting = [row for row in rows if row.arrival_s <= max(0.0, phase_s - TRACE_TAIL_S)]
        return Load(fitting, TRACE_KV_BLOCKS, f"{len(fitting)} of the first {len(rows)} requests of {Path(options.trace).name}")
    # the last session to arrive may be a long one; where the time is too short for any, the demo takes longer than it was told
    window_s = max(phase_s - 1.5 * CHAT.session_s, phase_s / 2)
    sessions = chat_sessions(options.seed, window_s, options.concurrency)
    return Load(sessions, CHAT_KV_BLOCKS, f"{len(sessions)} chat sessions on {CHAT.system_prompts} system prompts")


@contextmanager
def interruptible() -> Iterator[asyncio.Event]:
    """SIGINT and SIGTERM cancel the calling task, once, and set the event; further ones do not disturb the cleaning up."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    received = asyncio.Event()

    def interrupt() -> None:
        if not received.is_set():
            received.set()
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    try:
        yield received
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def _run(options: DemoOptions, load: Load, view: View) -> int:
    view.say(
        f"{load.title}: {load.requests} requests, once in round robin and once through the picker, "
        f"to {options.engines} simulated engines at {options.time_scale:g} times the speed of the hardware they simulate"
    )
    async with running(options, kv_blocks=load.kv_blocks, say=view.say) as parts, HttpFetcher() as fetcher:
        meter = Meter(parts, fetcher)
        view.say("warming up ...")
        await _warm_up(parts)
        before = _cpu_time()
        summaries: list[Summary] = []
        for name in (ROUND_ROBIN, PICKER):
            await _reset_caches(parts)
            summaries.append(await _phase(name, options, load, meter, view))
        after = _cpu_time()
    baseline, picker = summaries
    crowded = after.crowded(before) if after is not None and before is not None else 0.0
    view.conclude(baseline, picker, make_notes(options, summaries, crowded))
    if options.json:
        settings = {**asdict(options), "workload": load.title, "kv_blocks": load.kv_blocks}
        text = json.dumps(report(baseline, picker, settings), indent=2) + "\n"
        try:
            await asyncio.to_thread(Path(options.json).write_text, text, encoding="utf-8")
        except OSError as error:
            raise StartError(f"{options.json} can't be written: {error.strerror}") from None
    return 1 if any(summary.errors for summary in summaries) else 0


def _cpu_time() -> CpuTime | None:
    """Of this process, which is one of four that share the machine; None where the system does not say."""
    try:
        return cpu_time(SCHEDSTAT.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def make_notes(options: DemoOptions, summaries: Sequence[Summary], crowded: float) -> list[str]:
    """What to know of the figures. `crowded`: how many times as long as it ran this process waited for a CPU."""
    scale = f"{options.time_scale:g}"
    notes = [f"Times: as the client saw them through Envoy, times {scale}; so gateway and picker count {scale} times as well."]
    if crowded > CROWDED:
        notes.append(
            f"This machine was busy: the client waited {crowded:.1f} times as long for a CPU as it had one. The times are those of the "
            "machine as much as of the picker; run it again when less runs beside it."
        )
    for summary in summaries:
        if summary.errors:
            notes.append(f"{summary.name}: {summary.errors} failed and {summary.not_sent} were not sent for it; the first:")
            notes += [f"  {text}" for text in summary.first_errors]
    return notes


async def _warm_up(parts: Parts) -> None:
    """A request for each engine through both listeners: connections exist, and a part that does not work is found out here."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session:
        for address in (parts.through_round_robin, parts.through_picker):
            for number, _ in enumerate(parts.engines):
                greeting = ChatSession(0.0, "", (Turn(f"warm up {number}", 1, 0.0),))
                outcome = await send(session, f"http://{address}", greeting.request(0, (), MODEL_DEFAULT))
                if outcome.error:
                    raise StartError(f"a first request through Envoy failed: {outcome.error}")


async def _reset_caches(parts: Parts) -> None:
    """Every engine forgets every prefix. An engine refuses while a request holds blocks, as after a client that gave up."""
    try:
        async with aiohttp.ClientSession() as session, asyncio.timeout(RESET_S):
            for address in parts.engines.values():
                await _reset_cache(session, f"http://{address}/reset_prefix_cache")
    except TimeoutError:
        raise StartError(f"an engine did not reset its prefix cache within {RESET_S:g} s") from None


async def _reset_cache(session: aiohttp.ClientSession, url: str) -> None:
    while True:
        async with session.post(url) as response:
            if msgspec.json.decode(await response.read())["success"]:
                return
        await asyncio.sleep(SHOW_INTERVAL_S)


async def _phase(name: str, options: DemoOptions, load: Load, meter: Meter, view: View) -> Summary:
    loop = asyncio.get_running_loop()
    tally = Tally(load.requests)
    address = meter.parts.through_picker if name == PICKER else meter.parts.through_round_robin
    await meter.start()
    start_s = loop.time()

    def progress() -> Progress:
        ttft_mean_s = math.fsum(tally.ttft_s) / len(tally.ttft_s) * options.time_scale if tally.ttft_s else math.nan
        rows = meter.rows(picked=name == PICKER)
        elapsed_s = loop.time() - start_s
        return Progress(
            name, elapsed_s, load.requests, tally.finished, tally.in_flight, tally.errors_total, ttft_mean_s, meter.hit_rate, rows
        )

    async with _watching(meter, view, progress):
        await play(f"http://{address}", load.conversations, tally, model=MODEL_DEFAULT, time_scale=options.time_scale)
    wall_s = loop.time() - start_s
    await meter.read()
    view.say(f"{wall_s:5.1f} s  {progress_line(progress())}")
    return summarise(
        name,
        tally,
        time_scale=options.time_scale,
        wall_s=wall_s,
        hit_rate=meter.hit_rate,
        per_engine={engine: reading.finished for engine, reading in meter.engines.items()},
        picks=meter.picks if name == PICKER else {},
    )


@asynccontextmanager
async def _watching(meter: Meter, view: View, progress: Callable[[], Progress]) -> AsyncIterator[None]:
    """Reads and shows, over and over, for the length of the block."""

    async def watch() -> None:
        while True:
            await meter.read()
            view.show(progress())
            await asyncio.sleep(SHOW_INTERVAL_S)

    async with asyncio.TaskGroup() as group:
        watcher = group.create_task(watch())
        yield
        watcher.cancel()
