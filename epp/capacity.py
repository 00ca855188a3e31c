"""How fast an endpoint is, learned from what it did: no constant to calibrate, and a pool of unlike machines is seen as such.

Prefill: a request's first token came after the endpoint had worked through the uncached tokens that were in flight there when it was sent,
its own included; work / time is a sample of its rate, and the upper quartile of the last `SAMPLES` stands for it, for a prefill interrupted
by decoding says little of what the machine can do (the work / TTFT idea: SMetric in vLLM's router). Decode: the mean time between tokens
of a finished request, as a moving average.

Cost: 0.3 µs a first token, a sort of 64 numbers every eighth.
"""

from __future__ import annotations

from collections import deque

SAMPLES = 64
SAMPLES_MIN = 4
"""Before so many samples a rate is unknown: 0."""
RESORT_EVERY = 8
WORK_TOKENS_MIN = 256
"""Less work is all overhead and says nothing of the rate."""
QUANTILE = 0.75
STEP_WEIGHT = 0.1
"""Of a new sample in the moving average of step times."""


class Capacity:
    """One endpoint's. 0 where nothing is known yet."""

    __slots__ = ("_count", "_samples", "prefill_tokens_per_s", "step_s")

    def __init__(self) -> None:
        self.prefill_tokens_per_s = 0.0
        self.step_s = 0.0
        """Seconds between two tokens of one request."""
        self._samples: deque[float] = deque(maxlen=SAMPLES)
        self._count = 0

    def __repr__(self) -> str:
        return f"<Capacity prefill={self.prefill_tokens_per_s:.0f} tokens/s step={self.step_s * 1e3:.1f} ms>"

    def first_token(self, work_tokens: int, ttft_s: float) -> None:
        """A first token came `ttft_s` after its request was sent behind and with that much work."""
        if work_tokens < WORK_TOKENS_MIN or ttft_s <= 0:
            return
        self._samples.append(work_tokens / ttft_s)
        self._count += 1
        if self._count % RESORT_EVERY == 0 or SAMPLES_MIN <= self._count < RESORT_EVERY:
            ranked = sorted(self._samples)
            self.prefill_tokens_per_s = ranked[int(QUANTILE * (len(ranked) - 1))]

    def finished(self, tokens: int, seconds: float) -> None:
        """A request got `tokens` more tokens in `seconds` after its first."""
        if tokens < 1 or seconds <= 0:
            return
        step_s = seconds / tokens
        self.step_s = step_s if not self.step_s else self.step_s + STEP_WEIGHT * (step_s - self.step_s)
