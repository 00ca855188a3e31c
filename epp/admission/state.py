"""What waits where, as JSON, for people: `/debug`. Not here: metrics (families)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from epp.admission.control import FlowControl


def state_of(flow: FlowControl, now_s: float) -> dict[str, Any]:
    """Bounded, nothing of any prompt."""
    return {
        "queued": flow.requests,
        "queued_bytes": flow.size_bytes,
        "bands": [
            {"priority": b.priority, "queued": b.requests, "flows": len(b.flows), "drain_per_s": round(b.drain.per_s(now_s), 3)}
            for b in flow.bands.all
        ],
        "groups": [
            {
                "pool": g.key[0],
                "model": g.key[2],
                "endpoints": len(g.snapshot.endpoints),
                "queued": g.queued,
                "saturation": g.saturation,
            }
            for g in flow.saturation.queued()
        ],
    }
