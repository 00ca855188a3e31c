"""Metric families as text: our own writer for the plain format, prometheus-client's for OpenMetrics.

Prometheus asks every few seconds and the answer is made on the event loop, so it must be quick: this writer takes about 0.15 ms per
label set of `RequestSeries` with everything in it, prometheus-client's 2.3 ms. Bucket bounds are written as Go programs write them (`le="1"`): queries of
existing dashboards match that text. OpenMetrics demands `1.0`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from math import isfinite

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.utils import floatToGoString

from epp.observe.families import Family

PLAIN_CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})


def plain(family: Family) -> str:
    """The family in text format 0.0.4."""
    name = family.name
    lines = [f"# HELP {name} {family.help}\n# TYPE {name} {family.kind}\n"]
    for values, number in family.values:
        labels = _labels(family.labels, values)
        lines.append(f"{name}{{{labels}}} {_number(number)}\n" if labels else f"{name} {_number(number)}\n")
    for values, cell in family.cells:
        labels = _labels(family.labels, values)
        braces, comma = (f"{{{labels}}}", ",") if labels else ("", "")
        cumulated = list(accumulate(cell.counts))
        head = f"{name}_bucket{{{labels}{comma}le="
        lines += [f'{head}"{bound}"}} {count}\n' for bound, count in zip(_bounds(cell.bounds), cumulated, strict=True)]
        lines.append(f"{name}_sum{braces} {_number(cell.sum)}\n{name}_count{braces} {cumulated[-1]}\n")
    return "".join(lines)


def metric(family: Family) -> Metric:
    """The family as prometheus-client's encoders take it."""
    if family.kind == "histogram":
        histograms = HistogramMetricFamily(family.name, family.help, labels=family.labels)
        for values, cell in family.cells:
            bounds = [*(_canonical(bound) for bound in cell.bounds), "+Inf"]
            histograms.add_metric(values, [(b, float(n)) for b, n in zip(bounds, accumulate(cell.counts), strict=True)], cell.sum)
        return histograms
    numbers = (CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily)(family.name, family.help, labels=family.labels)
    for values, number in family.values:
        numbers.add_metric(values, number)
    return numbers


def _labels(names: Sequence[str], values: Sequence[str]) -> str:
    return ",".join([f'{name}="{value.translate(_ESCAPES)}"' for name, value in zip(names, values, strict=True)])


def _number(number: float) -> str:
    number = float(number)  # an int has no is_integer before Python 3.12
    if number.is_integer():
        return str(int(number))
    return repr(number) if isfinite(number) else _canonical(number)


@lru_cache(maxsize=32)  # one entry a kind of histogram
def _bounds(bounds: tuple[float, ...]) -> tuple[str, ...]:
    return (*(_canonical(bound).removesuffix(".0") for bound in bounds), "+Inf")


def _canonical(bound: float) -> str:
    return str(floatToGoString(bound))  # type: ignore[no-untyped-call]  # prometheus-client leaves this one untyped
