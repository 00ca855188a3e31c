"""What all sessions together may hold, and how long one may wait. Every field is a flag of `epp serve`."""

from __future__ import annotations

from collections.abc import Callable


class Limits:
    """Shared by every session and transport of a picker; counts what is held right now."""

    __slots__ = ("body_bytes_max", "buffered_bytes", "buffered_bytes_max", "closing", "decision_s", "header_count_max", "hits")

    def __init__(
        self,
        body_bytes_max: int,
        buffered_bytes_max: int,
        hits: Callable[[str], None],
        *,
        header_count_max: int = 1_000,
        decision_s: float = 60.0,
    ) -> None:
        self.body_bytes_max = body_bytes_max
        """Of one request."""
        self.buffered_bytes_max = buffered_bytes_max
        """Over all requests."""
        self.header_count_max = header_count_max
        self.decision_s = decision_s
        """Without a further piece of a request's body for so long, the decision is given up."""
        self.buffered_bytes = 0
        self.closing = False
        """The picker stops: requests that wait for their turn are refused."""
        self.hits = hits
        """Told the name of a limit when it is hit."""
