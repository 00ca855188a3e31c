"""How much a peer may send: window is given back for what was taken in, but not to a stream whose replies its peer does not read."""

from __future__ import annotations

from collections.abc import Container

import ngh2

from epp.extproc.h2_policy import H2Limits


class Intake:
    """Of one connection."""

    __slots__ = ("_limits", "held")

    def __init__(self, limits: H2Limits) -> None:
        self._limits = limits
        self.held: list[tuple[int, int]] = []
        """Bytes taken in and their stream, window for which was not given back yet."""

    def give_back(self, connection: ngh2.Connection, streams: Container[int]) -> None:
        limits = self._limits
        unread_bytes = connection.queued_body_size()
        if unread_bytes > limits.queued_bytes_max:
            return
        held, self.held = self.held, []
        for count, stream_id in held:
            stalled = unread_bytes and stream_id in streams
            if stalled and connection.queued_body_size(stream_id) > limits.stream_queued_bytes_max:
                self.held.append((count, stream_id))
            else:
                connection.acknowledge_received_data(count, stream_id)
