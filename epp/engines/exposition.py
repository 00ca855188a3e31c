"""Single samples out of Prometheus text, by byte search.

Engines answer with 45 to 85 KB of which routing needs a dozen lines; parsing all of it costs milliseconds. This looks for the family's
name and reads the lines that are samples of it. Tolerant of CRLF, blanks, timestamps, samples without labels, any spelling of NaN and
Inf; a HELP or TYPE line or a longer name that starts the same is no sample. A sample whose value is no number is skipped.

Not here: which names an engine uses (its own file). Never raises, whatever the bytes.

Cost: 3 to 10 µs a family in 60 KB: a family is one group of lines (exposition format, "Grouping and sorting"), so the search ends where
the next one's TYPE line is, and begins where its own was the last time. Linear in the text, whatever is in it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

SERIES_MAX = 100_000
"""Samples of one family; what comes after them is not read."""
VALUE_MAX = 1e15
"""A larger count is a fault of the engine's, not a load."""
INDENT_MAX = 64
"""Blanks before a name at the start of a line."""
LABELS_KEPT_MAX = 4096
"""Bytes of a label set that is worth keeping parsed."""

MOVED_MAX = 1024
"""Bytes by which a family may have moved since the last text and still be found at once."""

_QUOTED = rb'"(?:[^"\\\n]++|\\.)*+"'
_SAMPLE = re.compile(rb'(?:[ \t]*\{((?:[^"}\n]++|' + _QUOTED + rb")*+)\})?[ \t]*([^\s{}]++)")
"""After the name: labels without their braces, if any, and the value. Possessive: linear on any input."""
_LABEL = re.compile(rb"(?<![a-zA-Z0-9_])([a-zA-Z_][a-zA-Z0-9_]*+)[ \t]*=[ \t]*(" + _QUOTED + rb")")
_ESCAPE = re.compile(rb"\\(.)")
_last_at: dict[bytes, int] = {}
"""Family -> where its first sample was in the last text that had any: the engines of a pool answer alike."""


def find_all(text: bytes, family: bytes) -> list[tuple[bytes, float]]:
    """Every sample of the family, in order, as (labels without braces, value)."""
    found: list[tuple[bytes, float]] = []
    end, limit, bounded = 0, len(text), False
    last = _last_at.get(family)
    if last is not None:
        end = max(0, text.find(b"# TYPE " + family + b" ", max(0, last - MOVED_MAX), last + MOVED_MAX))
    while (at := text.find(family, end, limit)) != -1:
        end = at + len(family)
        if text[end : end + 1] not in {b"{", b" ", b"\t"} or not _starts_line(text, at):
            continue
        sample = _SAMPLE.match(text, end)
        if sample is None:
            continue
        end = sample.end()
        if not bounded:  # the group's first sample
            bounded = True
            _last_at[family] = at
            next_family = text.find(b"\n# TYPE ", end)
            limit = next_family if next_family != -1 else limit
        try:
            found.append((sample[1] or b"", float(sample[2])))
        except ValueError:
            continue
        if len(found) == SERIES_MAX:
            break
    return found


def values(text: bytes, family: bytes) -> list[float]:
    """What the family's samples say where it can be a load: 0 to VALUE_MAX, neither NaN nor infinite."""
    return [value for _, value in find_all(text, family) if 0 <= value <= VALUE_MAX]


def labels_of(labels: bytes) -> Mapping[str, str]:
    """The label set of a sample, unescaped."""
    return _kept(labels) if len(labels) <= LABELS_KEPT_MAX else _parsed(labels)


def _parsed(labels: bytes) -> Mapping[str, str]:
    return {match[1].decode(): _unescaped(match[2][1:-1]) for match in _LABEL.finditer(labels)}


_kept = lru_cache(maxsize=512)(_parsed)  # the same few label sets come with every scrape; some are 1 KB long


def _starts_line(text: bytes, at: int) -> bool:
    if at == 0 or text[at - 1] == 0x0A:
        return True
    if text[at - 1] not in b" \t\r":
        return False
    before = text[max(0, at - INDENT_MAX) : at].rstrip(b" \t\r")
    return before.endswith(b"\n") or (not before and at < INDENT_MAX)


def _unescaped(value: bytes) -> str:
    if b"\\" in value:
        value = _ESCAPE.sub(lambda match: b"\n" if match[1] == b"n" else match[1], value)
    return value.decode(errors="replace")
