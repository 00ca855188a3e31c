"""Durations as plugins take them."""

from __future__ import annotations

import msgspec
import pytest

from epp.config.units import Duration, OptionalDuration, duration_s

DURATIONS = [
    ("0", 0.0), ("0s", 0.0), ("50ms", 0.05), ("2s", 2.0), ("1m30s", 90.0), ("1h", 3600.0), ("1.5h", 5400.0), (".5s", 0.5), ("1.s", 1.0),
    ("1h15m30.5s", 4530.5), ("250us", 0.00025), ("250µs", 0.00025), ("10ns", 1e-8), (60_000_000_000, 60.0), (0, 0.0),
]  # fmt: skip


@pytest.mark.parametrize(("written", "seconds"), DURATIONS)
def test_durations(written: str | int, seconds: float) -> None:
    assert duration_s(written) == pytest.approx(seconds)
    assert msgspec.convert(written, Duration) == written


@pytest.mark.parametrize(
    "written", ["", "5", "1.5", "5 m", "m", "-1s", "+1s", "1d", "1m30", "1e3s", "five minutes", "1" * 64 + "s", -1, 1.5, None]
)
def test_what_is_no_duration(written: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(written, Duration)


def test_a_duration_may_be_left_open_where_that_means_something() -> None:
    assert msgspec.convert("", OptionalDuration) == ""
    assert msgspec.convert("5s", OptionalDuration) == "5s"
    for wrong in ("5", "5 s", -1, 1.5, None):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(wrong, OptionalDuration)


def test_too_long_a_duration_is_none() -> None:
    with pytest.raises(ValueError, match="too long"):
        duration_s("300000000h")
