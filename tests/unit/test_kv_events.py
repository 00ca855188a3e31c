"""Reading what engines publish: both forms, what is skipped, and what is refused with which words."""

from __future__ import annotations

import json
import struct
from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from epp.prefix import kv_events, trtllm_events
from epp.prefix.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KvEventError, decode
from tests.kv_replay import RECORDINGS, events, frames

encode = msgspec.msgpack.encode
NAMES = sorted(path.name.removesuffix(".frames.bin") for path in RECORDINGS.glob("*.bin"))


def stored_map(**fields: Any) -> dict[str, Any]:
    said = {"type": "BlockStored", "block_hashes": [11, 12], "parent_block_hash": None, "token_ids": [1, 2, 3, 4], "block_size": 2}
    return said | {"lora_id": None, "medium": "GPU"} | fields


def one(event: Any) -> Any:
    batch = decode(encode([1.5, [event], 3]))
    assert (batch.time_s, batch.dp_rank) == (1.5, 3)
    return batch.read()


def words(event: Any) -> str:
    with pytest.raises(KvEventError) as caught:
        one(event)
    return str(caught.value)


def test_map_and_array_say_the_same() -> None:
    expected = BlockStored([11, 12], 10, struct.pack("<4I", 1, 2, 3, 4), 2, "gpu", "sql", "", (), 0)
    said = stored_map(
        parent_block_hash=10, lora_name="sql", lora_id=1, extra_keys=[["sql"], ["sql"]], group_idx=0, kv_cache_spec_kind="full_attention"
    )
    assert one(said) == expected
    assert one(["BlockStored", [11, 12], 10, [1, 2, 3, 4], 2, 1, "GPU", "sql", [["sql"], ["sql"]], 0, "full_attention", None]) == expected
    assert one({"type": "BlockRemoved", "block_hashes": [1], "medium": None}) == BlockRemoved([1])
    assert one(["BlockRemoved", [1], "CPU_PINNED", 0]) == BlockRemoved([1], "cpu", (), 0)
    assert one({"type": "AllBlocksCleared"}) == one(["AllBlocksCleared"]) == AllBlocksCleared()


@pytest.mark.parametrize("fields", range(5, 13))
def test_arrays_of_every_length_engines_have_had(fields: int) -> None:
    whole = [
        "BlockStored",
        [11, 12],
        10,
        [1, 2, 3, 4],
        2,
        None,
        "GPU",
        None,
        [None, None],
        0,
        "full_attention",
        None,
        "newer",
        {"newer": 1},
    ]
    assert one(whole[:fields])[:6] == ([11, 12], 10, struct.pack("<4I", 1, 2, 3, 4), 2, "gpu", "")


def test_fields_and_types_of_a_newer_engine_are_passed_over_and_counted() -> None:
    assert one(stored_map(locality="LOCAL", session_id="x", more={"deep": [1]})).hashes == [11, 12]
    batch = decode(encode([1.0, [{"type": "BlockMoved", "n": 1}, ["BlockMoved", 1], ["AllBlocksCleared", 7, 8]], 0, "trailing"]))
    assert list(batch) == [AllBlocksCleared()]
    assert batch.skipped == {"type": 2}
    assert decode(encode([1.0, []])).read() is None


@pytest.mark.parametrize("hashes", [[-1, -(1 << 63)], [(1 << 64) - 1, 0]])
def test_hashes_are_opaque_signed_or_not(hashes: list[int]) -> None:
    assert one(stored_map(block_hashes=hashes)).hashes == hashes


def test_of_hashes_in_bytes_the_last_eight_count() -> None:
    said = one(stored_map(block_hashes=[b"\1" * 24 + bytes(range(8)), 5], parent_block_hash=b"\xff" * 32))
    assert said.hashes == [0x0001020304050607, 5]
    assert said.parent == (1 << 64) - 1


def test_a_parent_of_zero_is_none() -> None:
    assert one(stored_map(parent_block_hash=0)).parent is None
    assert one(["BlockStored", [1], 0, [1], 1]).parent is None


@pytest.mark.parametrize(
    ("said", "medium"),
    [(None, "gpu"), ("GPU", "gpu"), ("CPU", "cpu"), ("CPU_PINNED", "cpu"), ("STORAGE", "disk"), ("Disk", "disk"), ("EXTERNAL", "external")],
)
def test_media(said: str | None, medium: str) -> None:
    assert one(stored_map(medium=said)).medium == medium


@pytest.mark.parametrize("kind", ["full_attention", "mla_attention", "sink_full_attention"])
def test_groups_that_are_indexed(kind: str) -> None:
    assert one(stored_map(kv_cache_spec_kind=kind, group_idx=2)).group == 2


@pytest.mark.parametrize("kind", ["sliding_window", "mamba", "cross_attention", "new"])
def test_groups_that_are_not(kind: str) -> None:
    batch = decode(encode([1.0, [stored_map(kv_cache_spec_kind=kind)]]))
    assert batch.read() is None
    assert batch.skipped == {"kind": 1}


def test_salts_and_images_of_both_engines() -> None:
    assert one(stored_map(cache_salt="tenant")).salt == "tenant"
    said = one(stored_map(lora_name="sql", extra_keys=[["sql", ["cat", 0], ["dog", 3], "tenant"], ["sql", ["dog", -1]]]))
    assert (said.lora, said.salt, list(said.extras)) == ("sql", "tenant", [b"cat\0dog", b"dog"])
    later = one(stored_map(parent_block_hash=1, extra_keys=[["tenant"], None]))
    assert later.salt == "", "of the first block only: the others follow from their parent"
    assert one(stored_map(extra_keys=[None, [b"digest", 7]])).extras == [b"", b"digest\x007"]


def test_a_lora_that_has_only_a_number_is_not_the_base_model() -> None:
    assert one(["BlockStored", [1], None, [1], 1, 4, "GPU"]).lora not in ("", "4")


def test_bigrams_are_read_as_their_first_tokens() -> None:
    assert one(stored_map(token_ids=[[1, 2], [2, 3], [3, 4], [4, 5]])).tokens == struct.pack("<4I", 1, 2, 3, 4)


def test_an_offloading_tier_that_names_blocks_only() -> None:
    assert one(stored_map(token_ids=[], block_size=0, medium="CPU")) == BlockStored([11, 12], None, b"", 0, "cpu")


def test_copies_that_are_left() -> None:
    said = {"type": "BlockRemoved", "block_hashes": [1, 2], "medium": "GPU"}
    assert one(said | {"remaining_copy_counts": [0, 1]}).left == [0, 1]
    assert "copy counts" in words(said | {"remaining_copy_counts": [1]})
    assert "copy counts" in words(said | {"remaining_copy_counts": [0, -1]})


def test_pieces_are_the_whole() -> None:
    event = BlockStored((1, 2, 3, 4, 5), 9, bytes(range(40)), 2, extras=(b"a", b"", b"", b"", b"e"))
    pieces = list(event.pieces(2))
    assert [piece.hashes for piece in pieces] == [(1, 2), (3, 4), (5,)]
    assert [piece.parent for piece in pieces] == [9, 2, 4]
    assert b"".join(piece.tokens for piece in pieces) == event.tokens
    assert [extra for piece in pieces for extra in piece.extras] == list(event.extras)
    assert list(event.pieces(5)) == [event]


def test_a_bad_event_loses_nothing_else() -> None:
    batch = decode(encode([1.0, [stored_map(), stored_map(block_size=3), 5, {"type": "AllBlocksCleared"}]]))
    assert isinstance(batch.read(), BlockStored)
    with pytest.raises(KvEventError, match="2 blocks of 3 tokens with 4 tokens"):
        batch.read()
    with pytest.raises(KvEventError, match="neither an array nor a map"):
        batch.read()
    assert batch.read() == AllBlocksCleared()
    assert batch.read() is None


def test_a_batch_in_pieces_of_about_the_same_cost() -> None:
    large = stored_map(block_hashes=list(range(100)), token_ids=list(range(200)))
    small = {"type": "BlockRemoved", "block_hashes": [1], "medium": "GPU"}
    batch = decode(encode([1.0, [large, *[small] * 10, 5, stored_map(block_size=3), {"type": "AllBlocksCleared"}, {"type": "?"}]]))
    pieces = list(batch.pieces(40))
    costs = [sum(kv_events.EVENT_COSTS_BLOCKS + len(getattr(event, "hashes", ())) for event in piece) for piece in pieces]
    assert all(40 <= cost <= 40 + 40 + kv_events.EVENT_COSTS_BLOCKS for cost in costs[:-1])
    assert [len(event.hashes) for piece in pieces for event in piece if isinstance(event, BlockStored)] == [40, 40, 20]
    assert sum(isinstance(event, BlockRemoved) for piece in pieces for event in piece) == 10
    assert pieces[-1][-1] == AllBlocksCleared()
    assert batch.skipped == {"unreadable": 2, "type": 1}
    assert "neither" in batch.fault
    many = decode(encode([1.0, [small] * 100]))
    assert [len(piece) for piece in many.pieces(5 * (kv_events.EVENT_COSTS_BLOCKS + 1))] == [5] * 20


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"token_ids": [1, 2, 3]}, "with 3 tokens"),
        ({"block_size": 0}, "of 0 tokens"),
        ({"block_size": -2}, "of -2 tokens"),
        ({"block_hashes": []}, "0 blocks"),
        ({"token_ids": [1, 2, 3, -4]}, "32-bit"),
        ({"token_ids": [1, 2, 3, 1 << 32]}, "32-bit"),
        ({"token_ids": [1, 2, 3, [4, 5]]}, "32-bit"),
        ({"token_ids": [[4, 5], 1, 2, 3]}, "32-bit"),
        ({"token_ids": [1, 2, 3, "secret"]}, "token_ids"),
        ({"block_hashes": ["secret"]}, "block_hashes"),
        ({"block_hashes": [1 << 63, None]}, "block_hashes"),
        ({"lora_name": "x" * 2_000}, "lora_name"),
        ({"cache_salt": "secret" * 2_000}, "cache_salt"),
        ({"medium": 5}, "medium"),
        ({"extra_keys": [["a"]]}, "extra keys of 1 blocks for 2"),
        ({"extra_keys": [["secret" * 2_000], None]}, "salt of more than"),
        ({"extra_keys": [None, ["secret" * 20_000]]}, "extra keys of more than"),
        ({"extra_keys": [[{"secret": 1}], None]}, "extra key of type dict"),
        ({"extra_keys": [[[]], None]}, "extra key of type list"),
        ({"block_hashes": [1] * 70_000}, "length <= 65536"),
    ],
)
def test_what_is_wrong_is_said_without_what_was_there(fields: dict[str, Any], said: str) -> None:
    text = words(stored_map(**fields))
    assert said in text
    assert "secret" not in text
    assert len(text) < 300


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (b"", "truncated"),
        (b"\xc1", "malformed|MessagePack"),
        (b"\x93\xcb", "truncated"),
        (encode({"ts": 1}), "array"),
        (encode([1.0, 5]), "array"),
        (encode(["x", []]), "float"),
        (encode([1.0, [], "x"]), "int"),
        (encode([1.0]), "at least length 2"),
        (b"\x92\xcb" + bytes(8) + b"\xdd\xff\xff\xff\xff", "length <= 65536"),
        (b"\x92\xcb" + bytes(8) + b"\xdc\xff\xff\x01", "truncated"),
        (b"\x92\xcb" + bytes(8) + b"\x91" * 50_000, "nested too deeply"),
        (encode([1.0, [None] * 70_000]), "length <= 65536"),
    ],
)
def test_frames_that_are_no_batch(payload: bytes, said: str) -> None:
    with pytest.raises(KvEventError, match=said):
        decode(payload)


def test_a_frame_that_is_too_large_is_not_looked_at() -> None:
    with pytest.raises(KvEventError, match="at most"):
        decode(bytes(kv_events.FRAME_BYTES_MAX + 1))


def everything(payload: bytes) -> int:
    """Read a frame to its end, whatever is in it; KvEventError is the only thing that may come out."""
    try:
        batch = decode(payload)
    except KvEventError:
        return 0
    while True:
        try:
            event = batch.read()
        except KvEventError:
            continue
        if event is None:
            return sum(batch.skipped.values())
        if isinstance(event, BlockStored) and event.tokens:
            assert len(event.tokens) == 4 * event.block_tokens * len(event.hashes)


junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)
keys = st.sampled_from([*list(kv_events._StoredMap.__struct_fields__), "remaining_copy_counts", "new"])
near = st.builds(
    lambda tag, fields: {"type": tag} | fields,
    st.sampled_from(["BlockStored", "BlockRemoved", "AllBlocksCleared", "?"]),
    st.dictionaries(keys, junk, max_size=8),
)
arrays = st.builds(
    lambda tag, rest: [tag, *rest], st.sampled_from(["BlockStored", "BlockRemoved", "AllBlocksCleared", "?"]), st.lists(junk, max_size=12)
)


@settings(deadline=None, max_examples=400)
@given(st.lists(near | arrays | junk, max_size=4))
def test_anything_that_is_msgpack_is_an_event_or_an_error(said: list[Any]) -> None:
    everything(encode([1.0, said, 0]))


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_recorded_frames_with_bytes_changed_cut_or_added(data: st.DataObject) -> None:
    payloads = [payload for _, _, payload in frames(data.draw(st.sampled_from(NAMES)))]
    payload = bytearray(data.draw(st.sampled_from(payloads)))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(payload) - 1))
        payload[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=5))
        if not payload:
            break
    everything(bytes(payload))


@settings(deadline=None, max_examples=200)
@given(st.binary(max_size=200))
@example(b"\x92\xcb" + bytes(8) + b"\x91\x81\xa4type\xa1\xff")
@example(b"\x92\xcb" + bytes(8) + b"\x91\x91\xa1\xff")
def test_any_bytes(payload: bytes) -> None:
    everything(payload)


@pytest.mark.parametrize("name", NAMES)
def test_recordings_are_read_to_the_last_event(name: str) -> None:
    for _, _, payload in frames(name):
        batch = decode(payload)
        read = list(batch)
        said = events(payload)
        assert [type(event).__name__ for event in read] == [event["type"] for event in said]
        for event, raw in zip(read, said, strict=True):
            if isinstance(event, BlockStored):
                assert struct.unpack(f"<{len(event.tokens) // 4}I", event.tokens) == tuple(raw["token_ids"])
        assert not batch.skipped


# TensorRT-LLM


def block(name: int, *tokens: int, level: int = 0) -> dict[str, Any]:
    spelled = [{"type": "unique_token", "token_id": token, "token_extra_id": 0} for token in tokens]
    return {"type": "stored_block", "block_hash": name, "tokens": spelled, "cache_level": level, "priority": 35}


def polled(*data: dict[str, Any], skipped: Counter[str] | None = None) -> list[Any]:
    body = msgspec.json.encode([{"event_id": number, "window_size": 64, "data": each} for number, each in enumerate(data)])
    return [event for numbered in trtllm_events.decode(body, Counter() if skipped is None else skipped) for event in numbered.events]


def test_tensorrt_llm() -> None:
    skipped: Counter[str] = Counter()
    said = polled(
        {"type": "created", "num_blocks_per_cache_level": [9, 9]},
        {"type": "stored", "parent_hash": 7, "blocks": [block(1, 1, 2), block(2, 3, 4), block(3, 5, 6, level=1), block(4, 7)]},
        {"type": "stored", "parent_hash": None, "blocks": []},
        {"type": "removed", "block_hashes": [1, 2]},
        {"type": "updated", "block_hash": 3, "cache_level": {"type": "event_diff", "old_value": 1, "new_value": 0}, "priority": None},
        {"type": "updated", "block_hash": 3, "priority": {"type": "event_diff", "old_value": 1, "new_value": 0}},
        {"type": "evaporated"},
        skipped=skipped,
    )
    assert said == [
        AllBlocksCleared(),
        BlockStored([1, 2], 7, struct.pack("<4I", 1, 2, 3, 4), 2, "gpu", group=64),
        BlockStored([3], 2, struct.pack("<2I", 5, 6), 2, "cpu", group=64),
        BlockRemoved([1, 2], "", group=64),
        BlockStored((3,), None, b"", 0, "gpu", group=64),
        BlockRemoved((3,), "cpu", group=64),
    ]
    assert skipped == {"type": 1}
    body = b'[{"event_id": 5, "attention_dp_rank": 1, "data": {"type": "removed", "block_hashes": []}}]'
    assert [event[:2] for event in trtllm_events.decode(body, Counter())] == [(5, 1)]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[1]",
        b'[{"event_id": 1}]',
        b'[{"event_id": 1, "data": {"type": "stored"}}]',
        b'[{"event_id":1,"data":' + b"[" * 5_000,
        b"\xff",
    ],
)
def test_what_tensorrt_llm_does_not_say(body: bytes) -> None:
    with pytest.raises(KvEventError, match="TensorRT-LLM"):
        list(trtllm_events.decode(body, Counter()))


@pytest.mark.parametrize(
    ("field", "value"), [("event_id", 1 << 63), ("event_id", -1), ("attention_dp_rank", -1), ("attention_dp_rank", 1 << 70)]
)
def test_numbers_of_tensorrt_llm_that_can_not_be(field: str, value: int) -> None:
    """JSON's have no limit: one of a thousand digits would be counted as so many lost, and no metric could say that."""
    event = {"event_id": 1, "data": {"type": "removed", "block_hashes": []}} | {field: value}
    with pytest.raises(KvEventError, match=field):
        list(trtllm_events.decode(json.dumps([event]).encode(), Counter()))


def test_hashes_of_tensorrt_llm_have_64_bits() -> None:
    huge = 5 + (1 << 9_000)
    for event in polled(
        {"type": "stored", "parent_hash": huge, "blocks": [block(huge, 1, 2)]},
        {"type": "removed", "block_hashes": [huge]},
        {"type": "updated", "block_hash": huge, "cache_level": {"old_value": 0, "new_value": 1}},
    ):
        assert isinstance(event, BlockStored | BlockRemoved)
        assert list(event.hashes) == [5]
        if isinstance(event, BlockStored):
            assert event.parent in (5, None)


def test_tensorrt_llm_limits() -> None:
    with pytest.raises(KvEventError, match="at most"):
        list(trtllm_events.decode(bytes(kv_events.FRAME_BYTES_MAX + 1), Counter()))
    with pytest.raises(KvEventError, match="32-bit"):
        polled({"type": "stored", "parent_hash": None, "blocks": [block(1, -1)]})


def test_a_removal_that_does_not_say_from_where() -> None:
    from epp.prefix.precise import PreciseIndex

    index = PreciseIndex(1 << 20)
    for event in polled({"type": "stored", "parent_hash": None, "blocks": [block(1, 1, 2), block(2, 3, 4, level=1)]}):
        index.apply(0, event)
    assert index.held_blocks(0) == 2
    for event in polled({"type": "removed", "block_hashes": [1, 2]}):
        index.apply(0, event)
    assert index.held_blocks(0) == len(index) == 0
    assert not index.counts["removed_unknown"]
