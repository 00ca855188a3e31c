"""One publisher's frames, applied to the index in order and in small pieces; and what to do where the order is broken.

Not here: where frames come from (subscriber, central, replay), what numbers say (numbering), the index (prefix.precise).
Invariants: the index is told of every break before it is told of what came after; after `close` it is told nothing, for the slot may be
another endpoint's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

from epp.events.counts import Counts
from epp.events.feed import PIECE_BLOCKS
from epp.events.numbering import Numbering
from epp.events.shared import Shared
from epp.prefix.kv_events import Batch, BlockStored, Event, KvEventError, decode
from epp.prefix.precise import UNNAMED_LOST_BLOCKS, PreciseIndex
from epp.types import Endpoint

BLOCK_TOKENS = 16
"""Assumed of an engine that has not said."""

_log = logging.getLogger("epp.events")


@dataclass(slots=True)
class Told:
    """What was said in the log about one endpoint: each thing once, until it is over."""

    said: set[str] = field(default_factory=set)

    def once(self, what: str) -> bool:
        """Whether this is the first time."""
        if what in self.said:
            return False
        self.said.add(what)
        return True


class Stream:
    """See the module. `take` a frame, then `step` until it is False."""

    def __init__(self, index: PreciseIndex, counts: Counts, endpoint: Endpoint, publisher: str, told: Told) -> None:
        self.numbering = Numbering()
        self.endpoint = endpoint
        self.publisher = publisher
        self.shared: Shared | None = None
        """Where frames are passed on to other pickers."""
        self._index = index
        self._counts = counts
        self._told = told
        self._closed = False
        self._batch: Batch | None = None
        self._pieces: Iterator[Event] | None = None
        self._frames = 0
        self._blocks = 0
        """Stored by those frames."""

    @property
    def busy(self) -> bool:
        """Something is left of what was taken."""
        return self._batch is not None or self._pieces is not None

    def close(self) -> None:
        """The endpoint is gone."""
        self._closed = True
        if self.shared is not None:
            self.shared.close()
        self._batch = self._pieces = None

    def take(self, number: int, payload: bytes, *, share: bool = True) -> None:
        """The next frame. One that can't be read is as good as lost."""
        if self._closed:
            return
        self.numbering.passed(number, payload)
        try:
            self._batch = decode(payload)
        except KvEventError as error:
            self.unreadable(error)
            return
        self._frames += 1
        if share and self.shared is not None:
            self.shared.offer(number, payload, self._batch.time_s)

    def step(self) -> bool:
        """Apply at most `PIECE_BLOCKS` blocks; False if nothing is left of what was taken."""
        if self._pieces is not None:
            piece = next(self._pieces, None)
            if piece is not None:
                self._index.apply(self.endpoint.slot, piece, self.publisher)
                return True
            self._pieces = None
        if self._batch is None:
            return False
        try:
            event = self._batch.read()
        except KvEventError as error:
            self.unreadable(error)
            return True
        if event is None:
            self._counts.skipped.update(self._batch.skipped)
            self._batch = None
            self._look_again()
            return False
        if isinstance(event, BlockStored):
            self._blocks += len(event.hashes)
        if isinstance(event, BlockStored) and len(event.hashes) > PIECE_BLOCKS:
            self._pieces = event.pieces(PIECE_BLOCKS)
        else:
            self._index.apply(self.endpoint.slot, event, self.publisher)
        return True

    def apply(self, event: Event) -> None:
        """One event that came without a frame; small."""
        if not self._closed:
            self._index.apply(self.endpoint.slot, event, self.publisher)
            self._look_again()

    def restarted(self) -> None:
        """The numbers say that it is another process: it has nothing cached."""
        if self._closed:
            return
        self._counts.restarts += 1
        self.numbering.restarted()
        if self.shared is not None:
            self.shared.restarted()
        self._index.restarted(self.endpoint.slot, self.publisher)
        self._told.said.discard("gap")
        _log.info("engine was restarted, by its KV-cache events", extra={"fields": self._fields()})

    def lost(self, frames: int, why: str) -> None:
        """So many frames are missing and can't be had (0: nobody knows): what is known of the endpoint is an approximation."""
        if self._closed:
            return
        self._counts.gaps += 1
        self._counts.frames_lost += frames
        per_frame = self._blocks / self._frames if self._frames else 1.0
        lost_blocks = max(UNNAMED_LOST_BLOCKS, int(min(frames, 1 << 40) * per_frame))
        capacity_tokens = self.endpoint.kv_capacity_tokens
        if capacity_tokens:
            lost_blocks = min(lost_blocks, max(UNNAMED_LOST_BLOCKS, capacity_tokens // BLOCK_TOKENS))
        self._index.gap(self.endpoint.slot, self.publisher, lost_blocks)
        if self._told.once("gap"):
            fields = self._fields() | {"frames": frames, "reason": why}
            _log.warning("KV-cache events were lost: what is cached there is guessed until enough new ones came", extra={"fields": fields})

    def unreadable(self, error: KvEventError) -> None:
        """What it would have said is unknown; one event's loss is not told apart from a frame's."""
        self._counts.malformed += 1
        if self._closed:
            return
        if self._told.once("unreadable"):
            _log.warning("KV-cache events can't be read", extra={"fields": self._fields() | {"reason": str(error)}})
        self._index.gap(self.endpoint.slot, self.publisher)

    def _look_again(self) -> None:
        if "gap" in self._told.said and self._index.trusted(self.endpoint.slot):
            self._told.said.discard("gap")
            _log.info("what is cached there is known again", extra={"fields": self._fields()})

    def _fields(self) -> dict[str, object]:
        return {"endpoint": self.endpoint.name, "address": self.endpoint.destination, "publisher": self.publisher}
