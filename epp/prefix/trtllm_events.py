"""What TensorRT-LLM says about its KV cache, as the events of kv_events.

`POST /kv_cache_events` of trtllm-serve answers a JSON list and forgets what it answered. Known from its source, not recorded. An event:
`{"event_id": n, "attention_dp_rank": r, "data": {"type": "created" | "stored" | "removed" | "updated", ...}}`; cache level 0 is the GPU, 1 the host's
memory. A removal does not say from where, a block moves from one level to another by `updated`; what it moved to is not told with its tokens,
so a block is announced there by name. Not here: asking, and which ids came before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta, Raw

from epp.prefix.kv_events import (
    BLOCK_TOKENS_MAX,
    EVENTS_MAX,
    FRAME_BYTES_MAX,
    HASHES_MAX,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    Event,
    KvEventError,
    packed,
)

LEVELS = ("gpu", "cpu", "disk")
ID_MAX = (1 << 63) - 1
RANK_MAX = 65_535
_U64 = (1 << 64) - 1
"""Hashes have 64 bits; JSON's numbers have no limit."""


class Numbered(NamedTuple):
    """What one event of TensorRT-LLM comes to."""

    id: int
    rank: int
    events: tuple[Event, ...]


class _Token(msgspec.Struct, gc=False):
    token_id: int


class _Block(msgspec.Struct, gc=False):
    block_hash: int
    tokens: Annotated[list[_Token], Meta(max_length=BLOCK_TOKENS_MAX)]
    cache_level: int = 0


class _Stored(msgspec.Struct, tag_field="type", tag="stored", gc=False):
    blocks: Annotated[list[_Block], Meta(max_length=HASHES_MAX)]
    parent_hash: int | None = None


class _Removed(msgspec.Struct, tag_field="type", tag="removed", gc=False):
    block_hashes: Annotated[list[int], Meta(max_length=HASHES_MAX)]


class _Diff(msgspec.Struct, gc=False):
    old_value: int
    new_value: int


class _Updated(msgspec.Struct, tag_field="type", tag="updated", gc=False):
    block_hash: int
    cache_level: _Diff | None = None


class _Created(msgspec.Struct, tag_field="type", tag="created", gc=False):
    pass


class _Tagged(msgspec.Struct, gc=False):
    type: str


class _Event(msgspec.Struct, gc=False):
    event_id: Annotated[int, Meta(ge=0, le=ID_MAX)]
    data: Raw
    attention_dp_rank: Annotated[int, Meta(ge=0, le=RANK_MAX)] | None = None
    window_size: int | None = None
    """Layers of another attention window have blocks of their own: a group."""


_events = msgspec.json.Decoder(Annotated[list[_Event], Meta(max_length=EVENTS_MAX)])
_data = msgspec.json.Decoder(_Stored | _Removed | _Updated | _Created)
_tag = msgspec.json.Decoder(_Tagged)
_KNOWN = frozenset({"stored", "removed", "updated", "created"})


def decode(body: bytes, skipped: Counter[str]) -> Iterator[Numbered]:
    """The events of one answer, decoded as they are asked for; unknown types are counted in `skipped`. Raises KvEventError.

    A `created` comes when the cache was made: nothing is in it.
    """
    if len(body) > FRAME_BYTES_MAX:
        raise KvEventError(f"an answer of {len(body)} bytes; at most {FRAME_BYTES_MAX} are read")
    try:
        for event in _events.decode(body):
            known = _tag.decode(event.data).type in _KNOWN
            if not known:
                skipped["type"] += 1
            events = tuple(_understood(_data.decode(event.data), event.window_size)) if known else ()
            yield Numbered(event.event_id, event.attention_dp_rank or 0, events)
    except (msgspec.MsgspecError, RecursionError, UnicodeError, OverflowError) as error:
        what = (
            str(error)[:200] if isinstance(error, msgspec.ValidationError) and "Invalid value" not in str(error) else type(error).__name__
        )
        raise KvEventError(f"not TensorRT-LLM's KV-cache events: {what}") from None


def _understood(data: Any, window: int | None) -> Iterator[Event]:
    if isinstance(data, _Stored):
        yield from _stored(data, window)
    elif isinstance(data, _Removed):
        yield BlockRemoved([each & _U64 for each in data.block_hashes], "", group=window)
    elif isinstance(data, _Updated):
        if data.cache_level is not None:
            names = (data.block_hash & _U64,)
            yield BlockStored(names, None, b"", 0, _level(data.cache_level.new_value), group=window)
            yield BlockRemoved(names, _level(data.cache_level.old_value), group=window)
    else:
        yield AllBlocksCleared()


def _stored(data: _Stored, window: int | None) -> Iterator[BlockStored]:
    """Runs of blocks of the same size in the same level; a last block that is not full, as TensorRT-LLM publishes some, is left out."""
    parent, run = None if data.parent_hash is None else data.parent_hash & _U64, list[_Block]()
    full = max((len(block.tokens) for block in data.blocks), default=0)
    for block in data.blocks:
        if len(block.tokens) < full:
            break
        if run and block.cache_level != run[0].cache_level:
            yield _run(parent, run, full, window)
            parent, run = run[-1].block_hash & _U64, []
        run.append(block)
    if run and full:
        yield _run(parent, run, full, window)


def _run(parent: int | None, run: list[_Block], block_tokens: int, window: int | None) -> BlockStored:
    tokens = packed([token.token_id for block in run for token in block.tokens])
    return BlockStored([block.block_hash & _U64 for block in run], parent, tokens, block_tokens, _level(run[0].cache_level), group=window)


def _level(number: int) -> str:
    return LEVELS[number] if 0 <= number < len(LEVELS) else f"level {number}"
