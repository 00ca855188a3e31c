"""What an engine says of its load in a response header (ORCA, `endpoint-load-metrics`): fresher than any scrape, and free.

Recorded from vLLM 0.32:

    endpoint-load-metrics: TEXT named_metrics.num_requests_waiting=0.0, named_metrics.kv_cache_usage_perc=0.0
    endpoint-load-metrics: JSON {"named_metrics": {"num_requests_waiting": 0.0, "kv_cache_usage_perc": 0.0}}

Triton with TensorRT-LLM calls the cache `kv_cache_utilization`. Engines send it when the request has the header
`endpoint-load-metrics-format`, and not with streamed answers. Cost: 2 µs, and nothing for responses without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from typing import NamedTuple

import msgspec

HEADER = "endpoint-load-metrics"
CHARS_MAX = 4_096
_WAITING = frozenset({"num_requests_waiting"})
_KV_USAGE = frozenset({"kv_cache_usage_perc", "kv_cache_utilization"})


class PushedLoad(NamedTuple):
    """None: not said."""

    waiting: float | None = None
    kv_usage: float | None = None


class _Report(msgspec.Struct):
    named_metrics: dict[str, float] = {}
    kv_cache_utilization: float | None = None


_decode = msgspec.json.Decoder(_Report).decode


def parse(value: str) -> PushedLoad | None:
    """The load in the header's value; None if there is none in it, whatever it is."""
    if len(value) > CHARS_MAX:
        return None
    form, _, text = value.strip().partition(" ")
    try:
        named = dict(_from_json(text) if form.upper() == "JSON" else _from_text(text if form.upper() == "TEXT" else value))
    except (msgspec.DecodeError, ValueError):
        return None
    found = {name: number for name, number in named.items() if isfinite(number) and number >= 0}
    waiting = next((found[name] for name in _WAITING if name in found), None)
    kv_usage = next((min(1.0, found[name]) for name in _KV_USAGE if name in found), None)
    return None if waiting is None and kv_usage is None else PushedLoad(waiting, kv_usage)


def _from_json(text: str) -> Iterator[tuple[str, float]]:
    report = _decode(text)
    if report.kv_cache_utilization is not None:
        yield "kv_cache_utilization", report.kv_cache_utilization
    yield from report.named_metrics.items()


def _from_text(text: str) -> Iterator[tuple[str, float]]:
    for part in text.split(","):
        name, equals, number = part.strip().partition("=")
        if equals:
            yield name.strip().rpartition(".")[2], float(number)
