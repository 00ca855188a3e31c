"""How much a reading is still worth: estimates of load fade from what the engine said to what we count ourselves.

An engine that stops answering keeps its last reading, and a queue of long ago would repel or attract requests for ever. Up to `FRESH_S`
a reading counts fully (an idle engine is asked once a second only); from `STALE_S` on nothing but our own count is left. Pure, no clock.
"""

from __future__ import annotations

FRESH_S = 2.0
STALE_S = 10.0


def trust(age_s: float, fresh_s: float = FRESH_S, stale_s: float = STALE_S) -> float:
    """1 for a fresh reading, 0 for a stale one or none at all (infinite age), a straight line between."""
    if age_s <= fresh_s:
        return 1.0
    if age_s >= stale_s:
        return 0.0
    return (stale_s - age_s) / (stale_s - fresh_s)


def faded(read: float, counted: float, trusted: float) -> float:
    """trusted * read + (1 - trusted) * counted: what the engine said and what we count ourselves, both brought up to now."""
    return counted + trusted * (read - counted)
