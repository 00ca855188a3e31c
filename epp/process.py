"""What a long-running command needs of its process: signals, an event loop, a garbage collector that leaves start-up's objects alone.

Not here: what runs (app), in which order it stops.
"""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Callable, Coroutine
from typing import Self


class Signals:
    """SIGTERM and SIGINT as events: `stop` at the first, `hurry` at the second, and at once for SIGINT."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        self.exit_code = 0

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._received, number)
        return self

    def __exit__(self, *_: object) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    def _received(self, number: signal.Signals) -> None:
        if self.stop.is_set() or number == signal.SIGINT:
            self.hurry.set()
        if number == signal.SIGINT:
            self.exit_code = 130  # what a shell expects of a program ended by Ctrl-C
        self.stop.set()


def run(main: Callable[[], Coroutine[None, None, int]]) -> int:
    """Run a coroutine function on uvloop where it is installed, else on asyncio's loop."""
    try:
        import uvloop  # noqa: PLC0415 - optional
    except ImportError:
        factory = None
    else:
        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main())


def collect_rarely() -> None:
    """What start-up made lives as long as the process: keep the garbage collector from walking it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
