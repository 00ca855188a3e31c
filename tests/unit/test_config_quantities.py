"""Durations and quantities, read as Go and Kubernetes read them and written back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epp.config.quantities import INT64_MAX, duration_s, duration_text, quantity, quantity_text


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0), ("+0", 0), ("0s", 0), ("50ms", 0.05), ("1m30s", 90), ("1.5h", 5400), (".5s", 0.5), ("2.s", 2), ("3us", 3e-6), ("3µs", 3e-6),
        ("3\u03bcs", 3e-6), ("7ns", 7e-9), ("-1m", -60), ("+2s", 2), ("1h1m1s1ms", 3661.001), ("0.1ns", 0), ("0.2s", 0.2),
    ],
)  # fmt: skip
def test_durations(text: str, seconds: float) -> None:
    assert duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "s", "1 s", "1d", "1s2", "--1s", "\u0661s", "1S", "00", "1e3s", "9" * 100 + "s", "300000000h"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a duration|too long"):
        duration_s(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"), (0.05, "50ms"), (0.0015, "1.5ms"), (1e-9, "1ns"), (2e-6, "2us"), (1, "1s"), (1.5, "1.5s"), (60, "1m"), (90, "1m30s"),
        (3600, "1h"), (3661.5, "1h1m1.5s"), (7200, "2h"), (-60, "-1m"), (100, "1m40s"), (10, "10s"),
    ],
)  # fmt: skip
def test_durations_are_written_as_users_write_them(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@given(st.integers(-INT64_MAX, INT64_MAX))
def test_a_duration_written_and_read_is_the_same(ns: int) -> None:
    seconds = ns / 10**9
    assert duration_s(duration_text(seconds)) == seconds


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0), ("5000", 5000), ("5k", 5000), ("1G", 10**9), ("1Gi", 1 << 30), ("500M", 5 * 10**8), ("1.5Ki", 1536), ("0.5", 1), ("1500m", 2),
        ("1n", 1), ("1e3", 1000), ("1E3", 1000), ("1E", 10**18), ("12e-1", 2), ("+3", 3), ("-2", -2), (".5k", 500), ("5.", 5),
        ("9Ei", INT64_MAX), ("1e999999999", INT64_MAX), ("1e-999999999", 1), ("0e999999999", 0), ("99999999999999999999", INT64_MAX),
    ],
)  # fmt: skip
def test_quantities(text: str, value: int) -> None:
    assert quantity(text) == value


@pytest.mark.parametrize("text", ["", "k", "1KB", "1ki", "1 G", "1e", "e3", "1Mi2", "\u0663", "0x10", "1_000", "inf", "nan", "1" * 65])
def test_what_is_no_quantity(text: str) -> None:
    with pytest.raises(ValueError, match="is not a quantity"):
        quantity(text)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (10**9, "1G"), (1 << 30, "1Gi"), (64 << 20, "64Mi"), (1500, "1500"), (1024, "1Ki"), (5000, "5k"), (-2000, "-2k"), (7, "7")],
)
def test_quantities_are_written_short(value: int, text: str) -> None:
    assert quantity_text(value) == text


@given(st.integers(-INT64_MAX, INT64_MAX))
def test_a_quantity_written_and_read_is_the_same(value: int) -> None:
    assert quantity(quantity_text(value)) == value


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    for read in (duration_s, quantity):
        try:
            read(text)
        except ValueError as error:
            assert len(str(error)) < 400  # noqa: PT017 - both outcomes are right
