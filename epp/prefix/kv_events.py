"""What engines publish about their KV caches, read into one set of events.

A frame's payload is msgpack: `[time, [event, ...], data-parallel rank]`. Events are arrays with the tag first (vLLM up to 0.23, SGLang up to
0.5.17, llm-d-inference-sim) or maps with `type` (vLLM from 0.24, SGLang from 0.5.20). TensorRT-LLM answers polls with JSON. What a newer
engine adds, trailing or named, is passed over; an event type that is not known is counted.

Not here: sockets and sequence numbers (sources), what the events mean for routing (precise).

Invariants: nothing but KvEventError is raised, whatever the bytes. Memory follows the frame's size, not what the frame says of itself, and
every size has a limit. An event is decoded when it is asked for, so a batch of many costs no stall and one bad event loses nothing else.
Messages name fields and sizes, never tokens, salts or what was in a field.

Cost: 1 µs a frame and 1-2 µs an event, 0.3 µs a block of 16 tokens.
"""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta, Raw

from epp.errors import EppError

FRAME_BYTES_MAX = 16 << 20
"""Of one payload: a million tokens are 3-5 MB."""
EVENTS_MAX = 65_536
"""In one batch."""
HASHES_MAX = 65_536
"""In one event: a prompt of a million tokens in blocks of 16."""
TOKENS_MAX = 2 << 20
"""In one event."""
BLOCK_TOKENS_MAX = 65_536
NAME_CHARS_MAX = 1_024
"""Of a LoRA's name, a salt or a medium."""
EXTRAS_BYTES_MAX = 65_536
"""What is mixed into one event's hashes: names of images."""
EVENT_COSTS_BLOCKS = 8
"""What reading and applying an event costs beside its blocks, in blocks."""
INDEXED_KINDS = frozenset({"full_attention", "mla_attention", "sink_full_attention"})
"""Groups whose blocks say what of a prompt is cached; a sliding window's or a state-space model's do not."""
_MEDIA = {"": "gpu", "cpu_pinned": "cpu", "host": "cpu", "storage": "disk"}


class KvEventError(EppError):
    """A frame or an event that can't be read; says what is wrong with it."""


class BlockStored(NamedTuple):
    """Blocks an engine has now, each the child of the one before."""

    hashes: Sequence[int]
    """The engine's own, opaque."""
    parent: int | None
    tokens: bytes
    """Of all blocks, uint32 little-endian; empty where the engine did not say."""
    block_tokens: int
    medium: str = "gpu"
    lora: str = ""
    salt: str = ""
    """Of the first block, where that has no parent."""
    extras: Sequence[bytes] = ()
    """One a block: what else its hash depends on (images), `b""` where nothing; empty where that is so for all."""
    group: int | None = None
    """Of layers; engines with several publish each group's blocks, under the same hashes."""

    def pieces(self, blocks_max: int) -> Iterator[BlockStored]:
        """The same as several events of at most so many blocks."""
        hashes, step = self.hashes, 4 * self.block_tokens
        if len(hashes) <= blocks_max:
            yield self
            return
        for start in range(0, len(hashes), blocks_max):
            end = start + blocks_max
            yield self._replace(
                hashes=hashes[start:end],
                parent=hashes[start - 1] if start else self.parent,
                tokens=self.tokens[start * step : end * step],
                extras=self.extras[start:end],
            )


class BlockRemoved(NamedTuple):
    """Blocks an engine no longer has, each one copy of it."""

    hashes: Sequence[int]
    medium: str = "gpu"
    """Empty: wherever they are."""
    left: Sequence[int] = ()
    """Copies still there, one number a hash, where the engine says so."""
    group: int | None = None


class AllBlocksCleared(NamedTuple):
    """The engine has nothing cached."""


Event = BlockStored | BlockRemoved | AllBlocksCleared

_Hash = int | bytes
_Hashes = Annotated[list[_Hash], Meta(max_length=HASHES_MAX)]
_Tokens = Annotated[list[int | tuple[int, int]], Meta(max_length=TOKENS_MAX)]
_Name = Annotated[str, Meta(max_length=NAME_CHARS_MAX)]
_Extras = Annotated[list[list[Any] | None], Meta(max_length=HASHES_MAX)]


class _StoredArray(msgspec.Struct, array_like=True, tag="BlockStored", gc=False):
    block_hashes: _Hashes
    parent_block_hash: _Hash | None
    token_ids: _Tokens | None
    block_size: int
    lora_id: int | None = None
    medium: _Name | None = None
    lora_name: _Name | None = None
    extra_keys: _Extras | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: _Name | None = None


class _RemovedArray(msgspec.Struct, array_like=True, tag="BlockRemoved", gc=False):
    block_hashes: _Hashes
    medium: _Name | None = None
    group_idx: int | None = None


class _ClearedArray(msgspec.Struct, array_like=True, tag="AllBlocksCleared", gc=False):
    pass


class _StoredMap(msgspec.Struct, tag="BlockStored", gc=False):
    block_hashes: _Hashes
    block_size: int
    parent_block_hash: _Hash | None = None
    token_ids: _Tokens | None = None
    lora_id: int | None = None
    medium: _Name | None = None
    lora_name: _Name | None = None
    extra_keys: _Extras | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: _Name | None = None
    cache_salt: _Name | None = None


class _RemovedMap(msgspec.Struct, tag="BlockRemoved", gc=False):
    block_hashes: _Hashes
    medium: _Name | None = None
    group_idx: int | None = None
    remaining_copy_counts: Annotated[list[int], Meta(max_length=HASHES_MAX)] | None = None


class _ClearedMap(msgspec.Struct, tag="AllBlocksCleared", gc=False):
    pass


class _TagArray(msgspec.Struct, array_like=True, gc=False):
    type: str


class _TagMap(msgspec.Struct, gc=False):
    type: str


class _Envelope(msgspec.Struct, array_like=True, gc=False):
    time_s: float
    events: Annotated[list[Raw], Meta(max_length=EVENTS_MAX)]
    dp_rank: int | None = None


_KNOWN = frozenset({"BlockStored", "BlockRemoved", "AllBlocksCleared"})
_envelope = msgspec.msgpack.Decoder(_Envelope)
_arrays = msgspec.msgpack.Decoder(_StoredArray | _RemovedArray | _ClearedArray)
_maps = msgspec.msgpack.Decoder(_StoredMap | _RemovedMap | _ClearedMap)
_array_tag = msgspec.msgpack.Decoder(_TagArray)
_map_tag = msgspec.msgpack.Decoder(_TagMap)


class Batch:
    """What was in one frame. `read` gives the events one by one, `pieces` some at a time; `skipped` counts those not given, by reason."""

    __slots__ = ("_raws", "dp_rank", "fault", "skipped", "time_s")

    def __init__(self, envelope: _Envelope) -> None:
        self.time_s = envelope.time_s
        self.dp_rank = envelope.dp_rank or 0
        self.skipped: Counter[str] = Counter()
        self.fault = ""
        """What was wrong with the first event that `pieces` could not read: as after a lost frame, something is lacking."""
        self._raws = iter(envelope.events)

    def read(self) -> Event | None:
        """The next event, or None after the last. A KvEventError is that event's alone: read on."""
        for raw in self._raws:
            event = _event(raw, self.skipped)
            if event is not None:
                return event
        return None

    def pieces(self, blocks_max: int) -> Iterator[list[Event]]:
        """What is left, in lists that cost about as much as so many blocks; for a loop that has other things to do in between.

        Events that can't be read are passed over and counted as `unreadable`.
        """
        piece: list[Event] = []
        room = blocks_max
        while True:
            try:
                event = self.read()
            except KvEventError as error:
                self.skipped["unreadable"] += 1
                self.fault = self.fault or str(error)
                continue
            if event is None:
                break
            for part in event.pieces(blocks_max) if isinstance(event, BlockStored) else (event,):
                piece.append(part)
                room -= EVENT_COSTS_BLOCKS + (0 if isinstance(part, AllBlocksCleared) else len(part.hashes))
                if room <= 0:
                    yield piece
                    piece, room = [], blocks_max
        if piece:
            yield piece

    def __iter__(self) -> Iterator[Event]:
        """All that is left; stops at the first event that can't be read."""
        while (event := self.read()) is not None:
            yield event


def decode(payload: bytes | memoryview) -> Batch:
    """One frame's payload. Raises KvEventError."""
    size_bytes = len(payload)
    if size_bytes > FRAME_BYTES_MAX:
        raise KvEventError(f"a frame of {size_bytes} bytes; at most {FRAME_BYTES_MAX} are read")
    try:
        return Batch(_envelope.decode(payload))
    except (msgspec.MsgspecError, RecursionError, UnicodeError, OverflowError) as error:
        raise KvEventError(f"not a batch of KV events: {_what(error)}") from None


def _event(raw: Raw, skipped: Counter[str]) -> Event | None:
    """One event, or None for one that is skipped and counted."""
    data = memoryview(raw)
    first = data[0]
    try:
        if 0x90 <= first <= 0x9F or first in (0xDC, 0xDD):
            if _array_tag.decode(data).type not in _KNOWN:
                skipped["type"] += 1
                return None
            return _understood(_arrays.decode(data), skipped)
        if 0x80 <= first <= 0x8F or first in (0xDE, 0xDF):
            return _from_map(data, skipped)
    except (msgspec.MsgspecError, RecursionError, UnicodeError, OverflowError, TypeError) as error:
        raise KvEventError(f"a KV event that can't be read: {_what(error)}") from None
    raise KvEventError("a KV event that is neither an array nor a map")


def _from_map(data: memoryview, skipped: Counter[str]) -> Event | None:
    try:
        return _understood(_maps.decode(data), skipped)
    except msgspec.ValidationError:
        if _map_tag.decode(data).type in _KNOWN:
            raise
    skipped["type"] += 1
    return None


def _understood(
    event: _StoredArray | _StoredMap | _RemovedArray | _RemovedMap | _ClearedArray | _ClearedMap, skipped: Counter[str]
) -> Event | None:
    if isinstance(event, (_StoredArray, _StoredMap)):
        return _stored(event, skipped)
    if isinstance(event, (_RemovedArray, _RemovedMap)):
        left = (event.remaining_copy_counts if isinstance(event, _RemovedMap) else None) or ()
        if left and (len(left) != len(event.block_hashes) or min(left) < 0):
            raise KvEventError(f"{len(left)} copy counts for {len(event.block_hashes)} removed blocks, or one below 0")
        return BlockRemoved(_hashes(event.block_hashes), _medium(event.medium), left, event.group_idx)
    return AllBlocksCleared()


def _stored(event: _StoredArray | _StoredMap, skipped: Counter[str]) -> BlockStored | None:
    kind = event.kv_cache_spec_kind
    if kind is not None and kind.lower() not in INDEXED_KINDS:
        skipped["kind"] += 1
        return None
    hashes, tokens, block_tokens = _hashes(event.block_hashes), event.token_ids, event.block_size
    if not tokens:  # an offloading tier that names blocks only: those may be known
        block_tokens = max(0, block_tokens)
    elif not 0 < block_tokens <= BLOCK_TOKENS_MAX or len(tokens) != len(hashes) * block_tokens:
        raise KvEventError(f"{len(hashes)} blocks of {block_tokens} tokens with {len(tokens)} tokens")
    parent = event.parent_block_hash
    lora = event.lora_name or (f"\0{event.lora_id}" if event.lora_id is not None else "")  # an id names no model a request could ask for
    salt = (event.cache_salt if isinstance(event, _StoredMap) else None) or ""
    extras: Sequence[bytes] = ()
    if event.extra_keys and any(event.extra_keys):
        found, extras = _extras(event.extra_keys, event.lora_name, len(hashes))
        salt = salt or (found if not parent else "")
    return BlockStored(
        hashes, _number(parent) or None, packed(tokens), block_tokens, _medium(event.medium), lora, salt, extras, event.group_idx
    )


def _extras(keys: Sequence[Sequence[Any] | None], lora: str | None, count: int) -> tuple[str, Sequence[bytes]]:
    """The salt, and what else each block's hash depends on: of `[LoRA name, [image, offset]..., salt, digest...]` the images and digests.

    Offsets are left out: what they say is in the tokens, and engines count them differently.
    """
    if len(keys) != count:
        raise KvEventError(f"extra keys of {len(keys)} blocks for {count} blocks")
    salt, parts, size_bytes = "", [], 0
    for number, block in enumerate(keys):
        named: list[bytes] = []
        for place, key in enumerate(block or ()):
            if place == 0 and lora is not None and key == lora:
                continue
            if isinstance(key, str) and number == 0 and not salt:
                salt = key[: NAME_CHARS_MAX + 1]
            else:
                named.append(_name(key[0] if isinstance(key, list) and key else key))
        parts.append(b"\0".join(named))
        size_bytes += len(parts[-1])
        if size_bytes > EXTRAS_BYTES_MAX:
            raise KvEventError(f"extra keys of more than {EXTRAS_BYTES_MAX} bytes")
    if len(salt) > NAME_CHARS_MAX:
        raise KvEventError(f"a salt of more than {NAME_CHARS_MAX} characters")
    return salt, parts if any(parts) else ()


def _name(key: Any) -> bytes:
    if isinstance(key, str):
        return key.encode()
    if isinstance(key, bytes):
        return key
    if isinstance(key, int):
        return b"%d" % key
    raise KvEventError(f"an extra key of type {type(key).__name__}")


def packed(tokens: Sequence[int | tuple[int, int]] | None) -> bytes:
    """As uint32 little-endian. SGLang with EAGLE publishes each token with the one after it."""
    if not tokens:
        return b""
    paired = isinstance(tokens[0], tuple)
    try:
        numbers = array("I", [token[0] for token in tokens] if paired else tokens)  # type: ignore[index, type-var]
    except (OverflowError, TypeError):  # of mixed ones too
        raise KvEventError("a token that is no 32-bit number") from None
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()


def _hashes(values: Sequence[_Hash]) -> Sequence[int]:
    for value in values:
        if type(value) is not int:
            return [_number(each) for each in values]
    return values  # type: ignore[return-value]


def _number(value: _Hash | None) -> int:
    """As an opaque number; signed and unsigned stay what they are, an engine is consistent."""
    if value is None:
        return 0
    return value if isinstance(value, int) else int.from_bytes(value[-8:], "big")


def _medium(value: str | None) -> str:
    if value is None or value == "GPU":
        return "gpu"
    value = value.lower()
    return _MEDIA.get(value, value)


def _what(error: Exception) -> str:
    """msgspec says where and which type, not what was there, except where a tag is unknown."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    text = str(error)
    return "not valid" if "Invalid value" in text else text[:200]
