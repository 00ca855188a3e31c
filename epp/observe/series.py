"""The cells requests are counted in: plain ints and lists, no locks, no label look-ups.

Not here: names, HELP texts and text formats (families, metrics). All cells are changed on one event loop.

Cost: `Histogram.observe` is one bisection and two additions, 0.1 to 0.2 µs; a counter is an attribute `+= 1`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict

LATENCY_S = (
    0.005, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 45, 60, 120, 180, 240, 300, 360, 480,
    600, 900, 1200, 1800, 2700, 3600,
)  # fmt: skip
REQUEST_BYTES = tuple(64 << i for i in range(25))
RESPONSE_BYTES = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32778, 65536)
"""32778 is the reference picker's own value; dashboards know it."""
INPUT_TOKENS = (*RESPONSE_BYTES, 131072, 262144, 524288, 1048576)
OUTPUT_TOKENS = RESPONSE_BYTES[:12]
NTPOT_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
TPOT_S = (0.0005, 0.00205, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.125, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 2)
ITL_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2)
SCHEDULER_S = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
HIT_RATIO = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
HIT_BYTES = (0, *(16 << i for i in range(13)))


class Histogram:
    """Counts per bucket, not cumulated; the last is what exceeds every bound."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def __repr__(self) -> str:
        return f"<Histogram count={self.count} sum={self.sum:g}>"

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        return sum(self.counts)

    def add(self, other: Histogram) -> None:
        """Take in another histogram of the same bounds."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum


class RequestSeries:
    """Everything counted per (model, target model, fairness id, priority). About 4 KB each."""

    __slots__ = (
        "cached_tokens", "duration_s", "errors", "input_tokens", "ntpot_s", "output_tokens", "request_bytes", "requests",
        "response_bytes", "running", "streaming_itl_s", "streaming_tpot_s", "streaming_ttft_s", "ttft_s",
    )  # fmt: skip

    def __init__(self) -> None:
        self.requests = 0
        self.running = 0
        self.errors: defaultdict[str, int] = defaultdict(int)
        """error code name -> requests answered with it."""
        self.duration_s = Histogram(LATENCY_S)
        self.request_bytes = Histogram(REQUEST_BYTES)
        self.response_bytes = Histogram(RESPONSE_BYTES)
        self.input_tokens = Histogram(INPUT_TOKENS)
        self.output_tokens = Histogram(OUTPUT_TOKENS)
        self.cached_tokens = Histogram(INPUT_TOKENS)
        self.ttft_s = Histogram(LATENCY_S)
        """Time to first token of requests that did not stream: their whole duration."""
        self.streaming_ttft_s = Histogram(LATENCY_S)
        self.streaming_itl_s = Histogram(ITL_S)
        """Time between two response chunks."""
        self.streaming_tpot_s = Histogram(TPOT_S)
        """(duration - time to first token) / (output tokens - 1)."""
        self.ntpot_s = Histogram(NTPOT_S)
        """duration / output tokens."""
