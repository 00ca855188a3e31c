"""Where round robin ends: the rate from which the loads of a comparison are counted.

Round robin is saturated at the lowest rate at which its TTFT p90 is above 10 times what it is at a tenth of the trace's rate, where hardly
anybody waits. Found by bisection, to 2 %, on the first seed's arrivals; every policy is then played at the same shares of that rate.
"""

from __future__ import annotations

from collections.abc import Callable

TIMES = 10.0
LIGHT = 0.1
PRECISION = 0.02
RATE_MAX = 1_000.0
LOADS = (0.60, 0.85, 1.10)


def saturation_rate(ttft_p90_s: Callable[[float], float]) -> float:
    """`ttft_p90_s(rate)` of round robin. Infinite where no rate saturates it."""
    limit_s = TIMES * ttft_p90_s(LIGHT)
    low, high = LIGHT, 1.0
    while ttft_p90_s(high) <= limit_s:
        low, high = high, high * 2
        if high > RATE_MAX:
            return float("inf")
    while high - low > PRECISION * low:
        middle = (low + high) / 2
        if ttft_p90_s(middle) <= limit_s:
            low = middle
        else:
            high = middle
    return round(high, 4)
