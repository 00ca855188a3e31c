"""One publisher's frames on their way into the index: small pieces, breaks told first, nothing after the endpoint is gone."""

from __future__ import annotations

import logging

import msgspec
import pytest

from epp.events.counts import Counts
from epp.events.feed import PIECE_BLOCKS
from epp.events.stream import Stream, Told
from epp.prefix.kv_events import BlockStored, Event
from epp.prefix.precise import UNNAMED_LOST_BLOCKS, PreciseIndex
from epp.types import Address, Changes, Endpoint, EndpointSpec


class Watched(PreciseIndex):
    """Remembers in what portions it was fed, and what it was told was lost."""

    def __init__(self) -> None:
        super().__init__(1 << 26)
        self.portions: list[int] = []
        self.losses: list[int] = []

    def apply(self, slot: int, event: Event, publisher: str = "") -> None:
        self.portions.append(len(event.hashes) if isinstance(event, BlockStored) else 0)
        super().apply(slot, event, publisher)

    def gap(self, slot: int, publisher: str = "", lost_blocks: int = UNNAMED_LOST_BLOCKS) -> None:
        self.losses.append(lost_blocks)
        super().gap(slot, publisher, lost_blocks)


def made() -> tuple[Watched, Stream, Counts]:
    index, counts = Watched(), Counts()
    endpoint = Endpoint(EndpointSpec("pod-1", Address("10.0.0.1", 8000)), 3, Changes())
    return index, Stream(index, counts, endpoint, "", Told()), counts


def stored(count: int, first: int = 1) -> dict[str, object]:
    names = list(range(first, first + count))
    return {"type": "BlockStored", "block_hashes": names, "token_ids": [name for name in names for _ in range(4)], "block_size": 4}


def frame(*events: dict[str, object]) -> bytes:
    return msgspec.msgpack.encode([1.0, events, 0])


def test_a_large_event_goes_in_piece_by_piece_and_is_one_chain() -> None:
    index, stream, _counts = made()
    count = 3 * PIECE_BLOCKS + 7
    stream.take(0, frame(stored(count), {"type": "AllBlocksCleared"}, stored(2)))
    steps = 0
    while stream.step():
        steps += 1
        if sum(index.portions) == count and 0 not in index.portions:
            assert index.held_blocks(3) == count
    assert index.portions == [PIECE_BLOCKS, PIECE_BLOCKS, PIECE_BLOCKS, 7, 0, 2]
    assert steps >= len(index.portions)
    assert index.held_blocks(3) == 2
    assert index.counts["skipped_parent"] == 0


def test_nothing_is_applied_once_the_endpoint_is_gone() -> None:
    """Its slot may be another's by then."""
    index, stream, counts = made()
    stream.take(0, frame(stored(2 * PIECE_BLOCKS), stored(5, first=9_000)))
    stream.step()
    stream.step()
    portions = list(index.portions)
    index.forget(3)
    stream.close()
    assert not stream.step()
    stream.take(1, frame(stored(1)))
    assert not stream.step()
    stream.restarted()
    stream.lost(5, "whatever")
    stream.apply(BlockStored([1], None, bytes(16), 4))
    stream.take(2, b"\xc1")
    assert index.portions == portions
    assert index.held_blocks(3) == 0
    assert not index.trusted(3)
    assert index.losses == []
    assert (counts.gaps, counts.restarts) == (0, 0)


def test_what_is_lost_is_reckoned_by_what_frames_had_and_by_what_the_cache_holds() -> None:
    index, stream, counts = made()
    stream.take(0, frame(stored(50)))
    while stream.step():
        pass
    stream.lost(10, "a test")
    stream.lost(0, "a test")
    stream.endpoint.kv_capacity_tokens = 16 * 200
    stream.lost(1_000_000_000_000_000_000_000, "a test")
    assert index.losses == [500, UNNAMED_LOST_BLOCKS, 200]
    assert counts.gaps == 3


def test_a_bad_event_is_doubted_and_the_others_of_its_frame_are_applied(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "epp.events")
    index, stream, counts = made()
    bad = {"type": "BlockStored", "block_hashes": [1, 2], "token_ids": [12345, 67890], "block_size": 4}
    stream.take(0, frame(stored(1), bad, {"type": "BlockMoved"}, stored(2, first=10)))
    while stream.step():
        pass
    assert index.portions == [1, 2]
    assert counts.malformed == 1
    assert counts.skipped == {"type": 1}
    assert not index.trusted(3)
    text = caplog.text + str([vars(record) for record in caplog.records])
    assert "can't be read" in text
    assert "12345" not in text, "tokens are prompts"
    assert "67890" not in text
