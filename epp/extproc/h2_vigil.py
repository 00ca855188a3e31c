"""When a connection is given up: a peer that never spoke, that no longer answers a ping, or that takes no reply."""

from __future__ import annotations

from enum import Enum, auto

from epp.extproc.h2_policy import H2Limits


class Verdict(Enum):
    ALIVE = auto()
    PING = auto()
    """Silent for long: ask."""
    GONE = auto()
    STALLED = auto()
    """It takes no reply."""


class Vigil:
    """Over one connection. `heard` with every read, `look` every few seconds."""

    __slots__ = ("_heard", "_last_read_s", "_limits", "_pinged_s", "_stalled_s")

    def __init__(self, limits: H2Limits, now_s: float) -> None:
        self._limits = limits
        self._last_read_s = now_s
        self._heard = False
        self._pinged_s = 0.0
        self._stalled_s = 0.0

    def heard(self, now_s: float) -> None:
        self._last_read_s = now_s
        self._heard = True

    def look(self, now_s: float, *, reading: bool, closing: bool) -> Verdict:
        """`reading`: the peer takes our replies. `closing`: it is only to take the last bytes."""
        limits = self._limits
        if not reading:
            self._stalled_s = self._stalled_s or now_s
            return Verdict.STALLED if now_s - self._stalled_s > limits.stall_s else Verdict.ALIVE
        self._stalled_s = 0.0
        if closing:
            return Verdict.ALIVE
        silence_s = now_s - self._last_read_s
        if not self._heard:
            return Verdict.GONE if silence_s > limits.handshake_s else Verdict.ALIVE
        if silence_s < limits.keepalive_s or 0 < self._pinged_s <= self._last_read_s:
            self._pinged_s = 0.0
            return Verdict.ALIVE
        if not self._pinged_s:
            self._pinged_s = now_s
            return Verdict.PING
        return Verdict.GONE if now_s - self._pinged_s > limits.keepalive_s else Verdict.ALIVE
