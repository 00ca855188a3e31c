"""What work costs, learned from first-token times: seconds of prefill by tokens and attended pairs, one model for a pool.

    seconds = a + b x uncached tokens + c x (token, earlier token) pairs + d x uncached tokens x decode context

fitted by least squares with forgetting over service times: from when an endpoint began with a request (its arrival, or the first token of
the one before it) to its first token. The pairs are what makes long prompts cost more than their length; the decode context, tokens of the
sequences decoding beside it, is what they take from it. Each endpoint has a factor of its own (`Lane.slowness`), so that a pool of unlike
machines is seen as such. Nothing to calibrate: until there are `SAMPLES_MIN` samples only the proportions count, which decide as well.

Answers that come whole tell as much, for from their sending to their end the engine is never idle: it takes a step for every token it says
(and one for the first), and computes whatever prompts it has. Then, with one equation more for the same a, b and c,

    seconds = (a + e x context) x (tokens said + 1) + b x uncached tokens + c x pairs, of all that was computed there meanwhile, + f

where f is what an answer takes beside: nobody else waits for that, and where all answers are alike it is what is left in doubt.

Cost: 1.7 µs a sample in the mean: 0.4, and 80 to 140 µs every 64th (early on every 16th) time, for the least squares.
"""

from __future__ import annotations

import numpy as np

START_S = (0.0, 1e-4, 0.0, 0.0)
"""Before anything is known: 10 000 tokens a second."""
SAMPLES_MIN = 16
BATCH, BATCH_EARLY_SAMPLES = 64, 256
"""Samples that are worked in at once; as long as there are few, `SAMPLES_MIN` of them."""
FORGET = 0.998
"""Of what was learned, kept with every sample: about 500 samples count."""
RIDGE = 1e-6
TOKENS_UNIT, PAIRS_UNIT, CONTEXT_UNIT = 1e3, 1e6, 1e5
"""Features are counted in these, so that they are of one size."""
BESIDE_UNIT = 1e-2
"""Larger than the others: what could be any of them is taken for this."""
FEATURES, STREAMED_FEATURES = 6, 4
TOWARDS = np.array([0.0, START_S[1] * TOKENS_UNIT, 0.0, 0.0, 0.0, 0.0])
"""What samples leave open, where all are alike, stays as it was in the beginning."""


class CostModel:
    """See the module."""

    __slots__ = (
        "_fresh", "_moments", "_right", "beside_s", "by_context_s", "by_pairs_s", "by_tokens_s", "once_s", "samples", "step_by_context_s", "whole",
    )  # fmt: skip

    def __init__(self) -> None:
        self.once_s, self.by_tokens_s, self.by_pairs_s, self.by_context_s = START_S
        self.step_by_context_s = self.beside_s = 0.0
        self.samples = 0
        self.whole = 0
        """Those of them that were whole answers."""
        self._moments = np.zeros((FEATURES, FEATURES))
        self._right = np.zeros(FEATURES)
        self._fresh: list[tuple[float, ...]] = []
        """Samples not worked in yet: weighted features, then the weighted seconds."""

    def prefill_s(self, tokens: float, pairs: float, context: float) -> float:
        return self.once_s + tokens * (self.by_tokens_s + self.by_context_s * context) + self.by_pairs_s * pairs

    def answer_s(self, steps: int, tokens: float, pairs: float, context: float) -> float:
        """An answer of so many steps, from when it was sent, while the endpoint computed that of prompts, its own included."""
        said_s = steps * (self.once_s + self.step_by_context_s * context) + self.beside_s
        return said_s + tokens * self.by_tokens_s + self.by_pairs_s * pairs

    def learn(self, count: int, tokens: float, pairs: float, context: float, seconds: float) -> None:
        """`seconds` of service went into `count` prompts of that work in all, at an endpoint of usual speed."""
        weight = max(seconds, 1e-2) ** -0.5
        thousands = weight * tokens / TOKENS_UNIT
        self._add(weight * count, thousands, weight * pairs / PAIRS_UNIT, thousands * context / CONTEXT_UNIT, 0.0, 0.0, weight * seconds)

    def learn_whole(self, steps: int, tokens: float, pairs: float, context: float, seconds: float) -> None:
        """That, as in `answer_s`, took `seconds` at an endpoint of usual speed."""
        self.whole += 1
        weight = max(seconds, 1e-2) ** -0.5
        said = weight * steps
        self._add(
            said, weight * tokens / TOKENS_UNIT, weight * pairs / PAIRS_UNIT, 0.0, said * context / CONTEXT_UNIT, weight / BESIDE_UNIT,
            weight * seconds,
        )  # fmt: skip

    def _add(self, *sample: float) -> None:
        self._fresh.append(sample)
        self.samples += 1
        if len(self._fresh) >= (SAMPLES_MIN if self.samples <= BATCH_EARLY_SAMPLES else BATCH):
            self._solve()

    def _solve(self) -> None:
        """Least squares with every coefficient at least 0: the lowest below is taken out, and it is solved again."""
        fresh = np.array(self._fresh)
        self._fresh.clear()
        features, seconds = fresh[:, :FEATURES], fresh[:, FEATURES]
        kept_before = FORGET ** len(fresh)
        self._moments = kept_before * self._moments + features.T @ features
        self._right = kept_before * self._right + features.T @ seconds
        moments, right = self._moments + RIDGE * np.eye(FEATURES), self._right + RIDGE * TOWARDS
        kept = list(range(FEATURES if self.whole else STREAMED_FEATURES))
        while kept:
            found = np.linalg.lstsq(moments[np.ix_(kept, kept)], right[kept], rcond=None)[0]
            lowest = int(found.argmin())
            if found[lowest] >= 0.0:
                values = dict(zip(kept, found.tolist(), strict=True))
                if values.get(1, 0.0) <= 0.0:
                    return
                self.once_s = values.get(0, 0.0)
                self.by_tokens_s = values[1] / TOKENS_UNIT
                self.by_pairs_s = values.get(2, 0.0) / PAIRS_UNIT
                self.by_context_s = values.get(3, 0.0) / TOKENS_UNIT / CONTEXT_UNIT
                self.step_by_context_s = values.get(4, 0.0) / CONTEXT_UNIT
                self.beside_s = values.get(5, 0.0) / BESIDE_UNIT
                return
            del kept[lowest]
