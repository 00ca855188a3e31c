"""What endpoints did in the last minutes, as a price: who did most of a pool's work is asked a little less.

Where a pool is idle nothing is under way when a request comes, so whoever has its prefix is the cheapest, every time: a prefix that all share
(a system prompt) gathers all sessions on the engine that had it first, until they push one another out of its cache. So each second spent
on prompts is remembered for minutes, and what an endpoint spent beyond `RATIO` times the others' mean adds `PRICE` of it to the wait there.
A prompt goes elsewhere only where that is more than computing it anew, which then is history there, so that one session alone stays where
it is. No more than `PRICE_MAX_S`: what takes longer to compute anew stays, and no endpoint is left out of a burst for what it did before.
Where a pool is busy waits tell more: with `BUSY` or `LOADED` it is gone. Not here: when it is looked at, and the cost that it is part of
(cost_lanes).

Cost: 0.4 µs an endpoint every `WEIGHED_EVERY_S`, and a row made again (cost_lanes) where the price moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import exp, inf

from epp.plugins.cost_work import ALIKE, Lane

HISTORY_S = 600.0
"""After so long 1/e of it is left: what was computed is cached for about as long where little is going on."""
WEIGHED_EVERY_S = 2.0
PRICE = 0.25
PRICE_MAX_S = 0.5
PRICE_STEP_S = 0.01
"""Smaller changes are none."""
RATIO = 1.25
BUSY, LOADED = 0.3, 2.0
"""Share of the time that the pool spends on prompts, and requests under way at an endpoint, both in the mean."""


def weigh(lanes: Sequence[Lane], now_s: float) -> Iterator[Lane]:
    """Sets `history_price_s` of these, candidates of one request; yields those where it changed.

    Those slower than the fastest are no example to them: that they do less is as it should be.
    """
    if len(lanes) == 1:
        return
    for lane in lanes:
        kept = exp((lane.weighed_s - now_s) / HISTORY_S)
        lane.history_s *= kept
        if lane.weighed_s > -inf:
            lane.observed_s = kept * lane.observed_s + HISTORY_S * (1.0 - kept)
        lane.weighed_s = now_s
    slowness_max = min([lane.slowness for lane in lanes]) * ALIKE
    examples = [lane.history_s for lane in lanes if lane.slowness <= slowness_max]
    total_s, count = sum(examples), len(examples)
    observed_s = sum([lane.observed_s for lane in lanes])
    spent = sum([lane.history_s for lane in lanes]) / observed_s if observed_s else BUSY
    loaded = sum([lane.requests for lane in lanes]) / len(lanes)
    price = PRICE * max(0.0, 1.0 - spent / BUSY) * max(0.0, 1.0 - loaded / LOADED)
    for lane in lanes:
        if lane.slowness > slowness_max:
            others_s = total_s / count
        else:
            others_s = (total_s - lane.history_s) / (count - 1) if count > 1 else lane.history_s
        price_s = min(PRICE_MAX_S, price * max(0.0, lane.history_s - RATIO * others_s))
        moved_s = abs(price_s - lane.history_price_s)
        if moved_s > PRICE_STEP_S or (moved_s and not price_s):
            lane.history_price_s = price_s
            yield lane
