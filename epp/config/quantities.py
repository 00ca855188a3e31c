"""Durations and quantities as users write them: `50ms`, `1m30s` as Go reads them, `64Mi`, `500M`, `5k` as Kubernetes does; and back.

Reading raises ValueError with a message for the user. Writing and reading again gives the same value. Cost: none per request.
"""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from math import ceil

INT64_MAX = (1 << 63) - 1
"""Kubernetes and Go hold both in 64 bits: a larger quantity counts as this, a longer duration is refused."""
TEXT_CHARS_MAX = 64

_UNITS_NS = {"ns": 1, "us": 10**3, "µs": 10**3, "μs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_NUMBER = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)"
_PART = re.compile(rf"({_NUMBER})(ns|us|µs|μs|ms|s|m|h)")
_DURATION = re.compile(rf"([+-]?)((?:{_PART.pattern})+)")

_FACTORS = {
    "": Fraction(1), "n": Fraction(1, 10**9), "u": Fraction(1, 10**6), "m": Fraction(1, 10**3),
    **{suffix: Fraction(1000 ** (i + 1)) for i, suffix in enumerate("kMGTPE")},
    **{f"{suffix}i": Fraction(1024 ** (i + 1)) for i, suffix in enumerate("KMGTPE")},
}  # fmt: skip
_QUANTITY = re.compile(rf"([+-]?)({_NUMBER})(?:([KMGTPE]i|[numkMGTPE]?)|[eE]([+-]?[0-9]+))")
_EXPONENT_MAX = 2 * TEXT_CHARS_MAX
"""Beyond it a number that short is 0 or too large anyway; a power of ten of that size is never computed."""


def duration_s(text: str) -> float:
    """Seconds of a Go duration: `50ms`, `1m30s`, `0`. May be negative."""
    bare = text.lstrip("+-")
    if bare == "0" and len(text) <= 2:
        return 0.0
    match = _DURATION.fullmatch(text) if len(text) <= TEXT_CHARS_MAX else None
    if not match:
        raise ValueError(f"{_shown(text)} is not a duration; write 50ms, 2s or 1m30s")
    ns = sum(int(Fraction(number) * _UNITS_NS[unit]) for number, unit in _PART.findall(match[2]))
    if ns > INT64_MAX:
        raise ValueError(f"{_shown(text)} is too long, the limit is about 292 years")
    return (-ns if match[1] == "-" else ns) / 10**9  # of two integers, so correctly rounded


def duration_text(seconds: float) -> str:
    """As `duration_s` reads it: `200ms`, `1m30s`, `1h`."""
    ns = min(int(Decimal(repr(abs(seconds))) * 10**9), INT64_MAX)
    sign = "-" if seconds < 0 and ns else ""
    if ns < 10**9:
        unit = next((unit for unit in ("ms", "us", "ns") if ns >= _UNITS_NS[unit]), "s")
        return f"{sign}{_plain(Decimal(ns) / _UNITS_NS[unit])}{unit}"
    minutes, rest = divmod(ns, _UNITS_NS["m"])
    hours, minutes = divmod(minutes, 60)
    parts = [f"{hours}h" if hours else "", f"{minutes}m" if minutes else "", f"{_plain(Decimal(rest) / 10**9)}s" if rest else ""]
    return sign + "".join(parts)


def quantity(text: str) -> int:
    """A Kubernetes quantity as a whole number, rounded up: `65536`, `64Mi`, `1G`, `1.5k`, `1e3`. May be negative."""
    match = _QUANTITY.fullmatch(text) if len(text) <= TEXT_CHARS_MAX else None
    if not match:
        raise ValueError(f"{_shown(text)} is not a quantity; write 5000, 64Mi or 1G")
    sign, number, suffix, exponent = match.groups()
    factor = Fraction(10) ** max(-_EXPONENT_MAX, min(int(exponent), _EXPONENT_MAX)) if exponent else _FACTORS[suffix]
    value = min(ceil(Fraction(number) * factor), INT64_MAX)
    return -value if sign == "-" else value


def quantity_text(value: int) -> str:
    """The shortest of the ways `quantity` reads: `1G`, `64Mi`, `1500`."""
    found = [str(value)]
    for suffix, factor in _FACTORS.items():
        if value and factor > 1 and value % factor == 0:
            found.append(f"{value // factor}{suffix}")
    return min(found, key=len)


def _plain(number: Decimal) -> str:
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _shown(text: str) -> str:
    return repr(text if len(text) <= TEXT_CHARS_MAX else f"{text[:TEXT_CHARS_MAX]}...")
