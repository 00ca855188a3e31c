"""What work costs, learned from first-token times: seconds of prefill by tokens and attended pairs, one model for a pool.

    seconds = a x uncached tokens + b x (token, earlier token) pairs + c x uncached tokens x decode context

fitted by least squares with forgetting over service times: from when an endpoint began with a request (its arrival, or the first token of
the one before it) to its first token. The pairs are what makes long prompts cost more than their length; the decode context, tokens of the
sequences decoding beside it, is what they take from it. Each endpoint has a factor of its own (`Lane.slowness`), so that a pool of unlike
machines is seen as such. Nothing to calibrate: until there are `SAMPLES_MIN` samples only the proportions count, which decide as well.

Cost: 4 µs a sample.
"""

from __future__ import annotations

START_S = (0.0, 1e-4, 0.0, 0.0)
"""Before anything is known: 10 000 tokens a second."""
SAMPLES_MIN = 16
FORGET = 0.998
"""Of what was learned, kept with every sample: about 500 samples count."""
RIDGE = 1e-6
TOKENS_UNIT, PAIRS_UNIT, CONTEXT_UNIT = 1e3, 1e6, 1e5
"""Features are counted in these, so that they are of one size."""
FEATURES = 4


class CostModel:
    """See the module."""

    __slots__ = ("_moments", "_right", "by_context_s", "by_pairs_s", "by_tokens_s", "once_s", "samples")

    def __init__(self) -> None:
        self.once_s, self.by_tokens_s, self.by_pairs_s, self.by_context_s = START_S
        self.samples = 0
        self._moments = [[RIDGE * (i == j) for j in range(FEATURES)] for i in range(FEATURES)]
        self._right = [0.0] * FEATURES

    def prefill_s(self, tokens: float, pairs: float, context: float) -> float:
        return self.once_s + tokens * (self.by_tokens_s + self.by_context_s * context) + self.by_pairs_s * pairs

    def learn(self, count: int, tokens: float, pairs: float, context: float, seconds: float) -> None:
        """`seconds` of service went into `count` prompts of that work in all, at an endpoint of usual speed."""
        weight = 1.0 / max(seconds, 1e-2)
        features = (float(count), tokens / TOKENS_UNIT, pairs / PAIRS_UNIT, tokens / TOKENS_UNIT * context / CONTEXT_UNIT)
        for i, feature in enumerate(features):
            row, weighted = self._moments[i], weight * feature
            self._right[i] = FORGET * self._right[i] + weighted * seconds
            for j in range(FEATURES):
                row[j] = FORGET * row[j] + weighted * features[j]
        self.samples += 1
        if self.samples >= SAMPLES_MIN:
            self._solve()

    def _solve(self) -> None:
        """Least squares with every coefficient at least 0: the lowest below is taken out, and it is solved again."""
        kept = list(range(FEATURES))
        while kept:
            found = _solved([[self._moments[i][j] for j in kept] for i in kept], [self._right[i] for i in kept])
            lowest = min(range(len(kept)), key=found.__getitem__)
            if found[lowest] >= 0.0:
                values = dict(zip(kept, found, strict=True))
                if values.get(1, 0.0) <= 0.0:
                    return
                self.once_s = values.get(0, 0.0)
                self.by_tokens_s = values[1] / TOKENS_UNIT
                self.by_pairs_s = values.get(2, 0.0) / PAIRS_UNIT
                self.by_context_s = values.get(3, 0.0) / TOKENS_UNIT / CONTEXT_UNIT
                return
            del kept[lowest]


def _solved(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gauss's elimination with pivots."""
    n = len(right)
    rows = [[*matrix[i], right[i]] for i in range(n)]
    for i in range(n):
        pivot = max(range(i, n), key=lambda k: abs(rows[k][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for k in range(i + 1, n):
            share = rows[k][i] / rows[i][i] if rows[i][i] else 0.0
            rows[k] = [value - share * above for value, above in zip(rows[k], rows[i], strict=True)]
    found = [0.0] * n
    for i in reversed(range(n)):
        rest = rows[i][n] - sum(rows[i][k] * found[k] for k in range(i + 1, n))
        found[i] = rest / rows[i][i] if rows[i][i] else 0.0
    return found
