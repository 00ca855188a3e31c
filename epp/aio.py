"""The one shape of background loop: a tested `once`, and this around it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

Sleep = Callable[[float], Awaitable[object]]
"""`asyncio.sleep`, or a test's own."""


async def forever(once: Callable[[], object], interval_s: float, sleep: Sleep = asyncio.sleep) -> None:
    """Call `once` every `interval_s` until cancelled. What `once` raises ends the loop: it must handle what it expects."""
    while True:
        await sleep(interval_s)
        once()
