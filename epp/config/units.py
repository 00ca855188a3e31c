"""Durations as parameters of plugins: types that msgspec checks, so that a fault is reported with its place among all others.

How durations are read: quantities.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from epp.config import quantities

DURATION_PATTERN = r"^(?:0|(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:ns|us|µs|μs|ms|s|m|h))+)$"

Duration = Annotated[str, msgspec.Meta(pattern=DURATION_PATTERN, max_length=quantities.TEXT_CHARS_MAX)] | Annotated[int, msgspec.Meta(ge=0)]
"""`5m`, `1m30s`, `0`; a bare number is nanoseconds, as Go writes durations in JSON. Not negative."""
OptionalDuration = (
    Annotated[str, msgspec.Meta(pattern=rf"{DURATION_PATTERN}|^$", max_length=quantities.TEXT_CHARS_MAX)]
    | Annotated[int, msgspec.Meta(ge=0)]
)
"""A Duration, or empty where it was left open."""


def duration_s(written: str | int) -> float:
    """Seconds. Raises ValueError for what is no duration, or too long a one."""
    return written / 10**9 if isinstance(written, int) else quantities.duration_s(written)
