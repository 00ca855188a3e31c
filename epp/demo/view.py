"""What the demo shows: a live table in a terminal, plain lines elsewhere, and the comparison at the end.

Renderables are made by pure functions; `LiveView` and `PlainView` only decide where they go. Times are in seconds of the simulated
world, as in `results.Summary`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import NamedTuple, Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from epp.demo.results import Summary, ratio

PLAIN_INTERVAL_S = 2.0
PLAIN_WIDTH = 120
BAR_WIDTH = 8
PHASE_BAR_WIDTH = 16
"""With these the live table fits 80 columns."""


class EngineRow(NamedTuple):
    """One engine in the phase under way."""

    name: str
    picks: int
    running: int
    waiting: int
    kv_usage: float
    hit_rate: float


class Progress(NamedTuple):
    """A phase under way."""

    phase: str
    elapsed_s: float
    """Of real time."""
    planned: int
    finished: int
    in_flight: int
    errors: int
    ttft_mean_s: float
    hit_rate: float
    engines: Sequence[EngineRow]


class View(Protocol):
    def say(self, text: str) -> None:
        """A line that stays."""
        ...

    def show(self, progress: Progress) -> None:
        """Called several times a second."""
        ...

    def conclude(self, baseline: Summary, picker: Summary, notes: Sequence[str]) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...


class PlainView:
    """Lines only: no cursor movement, no colour."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last: tuple[str, float] = ("", 0.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def show(self, progress: Progress) -> None:
        phase, shown_s = self._last
        if phase == progress.phase and progress.elapsed_s - shown_s < PLAIN_INTERVAL_S:
            return
        self._last = (progress.phase, progress.elapsed_s)
        self.say(f"{progress.elapsed_s:5.1f} s  {progress_line(progress)}")
        for row in progress.engines:
            self.say(
                f"         {row.name}: {row.picks} requests, {row.running} running, {row.waiting} waiting, "
                f"KV {_percent(row.kv_usage)}, hit rate {_percent(row.hit_rate)}"
            )

    def conclude(self, baseline: Summary, picker: Summary, notes: Sequence[str]) -> None:
        self._console.print(comparison(baseline, picker))
        for note in notes:
            self.say(note)


class LiveView:
    """One table that is drawn over and over, under the lines said so far."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        self._live.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def show(self, progress: Progress) -> None:
        self._live.update(picture(progress), refresh=True)

    def conclude(self, baseline: Summary, picker: Summary, notes: Sequence[str]) -> None:
        self._live.stop()
        self._live.console.print(comparison(baseline, picker))
        for note in notes:
            self.say(note)


def make_view(*, plain: bool) -> View:
    console = Console(highlight=False)
    if plain or not console.is_terminal:
        return PlainView(Console(highlight=False, color_system=None, force_terminal=False, width=PLAIN_WIDTH))
    return LiveView(console)


def progress_line(progress: Progress) -> str:
    return (
        f"{progress.phase}: {progress.finished}/{progress.planned} requests, {progress.in_flight} in flight, {progress.errors} errors, "
        f"TTFT mean {_milliseconds(progress.ttft_mean_s)}, hit rate {_percent(progress.hit_rate)}"
    )


def picture(progress: Progress) -> RenderableType:
    """The phase under way: a bar, and a line an engine."""
    head = Table.grid(padding=(0, 2))
    head.add_row(
        Text(progress.phase, style="bold"),
        ProgressBar(total=max(1, progress.planned), completed=progress.finished, width=PHASE_BAR_WIDTH),
        f"{progress.finished}/{progress.planned} requests",
        f"{progress.in_flight} in flight",
        Text(f"{progress.errors} errors", style="bold red" if progress.errors else "dim"),
        f"{progress.elapsed_s:.0f} s",
    )
    table = Table(expand=False)
    table.add_column("engine")
    for title in ("requests", "running", "waiting"):
        table.add_column(title, justify="right", min_width=8)
    table.add_column("KV in use", min_width=BAR_WIDTH + 6)
    table.add_column("prefix hits", min_width=BAR_WIDTH + 6)
    for row in progress.engines:
        waiting = Text(str(row.waiting), style="bold yellow" if row.waiting else "")
        table.add_row(row.name, str(row.picks), str(row.running), waiting, _gauge(row.kv_usage), _gauge(row.hit_rate))
    foot = Text(f"time to first token: mean {_milliseconds(progress.ttft_mean_s)}   prefix hit rate: {_percent(progress.hit_rate)}")
    return Group(head, table, foot)


def comparison(baseline: Summary, picker: Summary) -> Table:
    """Both phases side by side, with how many times better the picker is."""
    table = Table(title="the same requests, two ways")
    table.add_column("")
    table.add_column(baseline.name, justify="right")
    table.add_column(picker.name, justify="right", style="bold")
    table.add_column("ratio", justify="right")

    def row(title: str, text: Callable[[Summary], str], times_better: float = math.nan) -> None:
        table.add_row(title, text(baseline), text(picker), _times(times_better))

    def times(title: str, baseline_s: float, picker_s: float) -> None:
        table.add_row(title, _milliseconds(baseline_s), _milliseconds(picker_s), _times(ratio(baseline_s, picker_s)))

    row("requests", lambda summary: str(summary.requests))
    row("errors", lambda summary: str(summary.errors))
    for key in ("mean", "p50", "p90", "p99"):
        times(f"time to first token, {key}", baseline.ttft_s[key], picker.ttft_s[key])
    for key in ("mean", "p99"):
        times(f"whole answer, {key}", baseline.duration_s[key], picker.duration_s[key])
    row("prefix hit rate", lambda summary: _percent(summary.hit_rate))
    row("prompt tokens computed", lambda summary: f"{summary.computed_tokens:,}", ratio(baseline.computed_tokens, picker.computed_tokens))
    row("requests per engine", lambda summary: " ".join(str(count) for count in summary.per_engine.values()))
    return table


def _gauge(share: float) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    completed = 0.0 if math.isnan(share) else min(1.0, share) * 100
    grid.add_row(ProgressBar(total=100, completed=completed, width=BAR_WIDTH), f"{_percent(share):>5}")
    return grid


def _times(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}x"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share * 100:.0f} %"


def _milliseconds(seconds: float) -> str:
    return "-" if math.isnan(seconds) else f"{seconds * 1000:,.0f} ms"
