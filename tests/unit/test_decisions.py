"""The last decisions: bounded, newest first, as they were when they were made, and not a word of any prompt in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from epp.clock import VirtualClock
from epp.decisions import ENDPOINTS_SHOWN_MAX, EVERY_S, REMOVED_SHOWN_MAX, Decisions
from epp.errors import EppError
from epp.scheduling.load_scores import Column
from epp.scheduling.pipeline import ProfileTrace
from epp.types import Decision, LLMRequest, PrefixMatch
from tests.builders import PATH, Core, chat, core, llm_request, pool_of, spec

HEAD = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"
SECRET = "xyzzy-opensesame"


def request_of(**values: object) -> LLMRequest:
    return LLMRequest(id=str(values.pop("id", "r")), path=str(values.pop("path", PATH)), headers={":path": PATH, **values})  # type: ignore[dict-item]


def decided(world: Core, body: bytes, **values: object) -> None:
    """A request, decided or refused; the next one is far enough from it to be kept too."""
    try:
        world.director.route(request_of(**values), body, None, world.clock.now_s())
    except EppError:
        pass
    finally:
        world.clock.advance(EVERY_S)


def tables_of(world: Core, count: int = 100) -> list[dict[str, Any]]:
    decisions = world.director._decisions
    assert decisions is not None
    return decisions.tables(count)


def test_the_newest_come_first_and_the_oldest_go() -> None:
    clock = VirtualClock(50.0)
    decisions = Decisions(clock, 3)
    (endpoint,) = pool_of({})
    for number in range(5):
        decisions.add(llm_request(id=str(number), model="m"), (), Decision(endpoint, (), "default"))
        clock.advance(1.0)
    assert len(decisions) == 3
    assert [(each["request_id"], each["age_s"]) for each in decisions.tables(9)] == [("4", 1.0), ("3", 2.0), ("2", 3.0)]
    assert [each["request_id"] for each in decisions.tables(1)] == ["4"]
    assert decisions.tables(0) == []


def test_one_is_kept_every_so_often() -> None:
    clock = VirtualClock(50.0)
    decisions = Decisions(clock, 100)
    (endpoint,) = pool_of({})
    for _ in range(100):
        if decisions.due():
            decisions.add(llm_request(), (), Decision(endpoint, (), "default"))
        clock.advance(EVERY_S / 8)
    assert 100 // 8 <= len(decisions) <= 100 // 8 + 1


def test_what_a_table_says() -> None:
    first, second, third = pool_of({}, {}, {})
    request = llm_request(id="7", model="asked", target_model="got", prompt_tokens=128, priority=-2)
    request.prefix = PrefixMatch([1, 2], [64, 128], 128, {second.slot: 64})
    columns = [Column("queue-scorer", 2.0, [0.5, 0.25]), Column("prefix-cache-scorer", 3.0, {second.slot: 0.5})]
    trace = ProfileTrace("decode", [("gold", [third])], [first, second], columns, [1.0, 2.0], [second])
    decisions = Decisions(VirtualClock(), 1)
    decisions.add(request, [trace], Decision(second, (first,), "decode", {"prefill": third}))
    (table,) = decisions.tables(1)
    assert table == {
        "age_s": 0.0,
        "request_id": "7",
        "path": PATH,
        "model": "asked",
        "target_model": "got",
        "prompt_tokens": 128,
        "priority": -2,
        "endpoint": "pod-2",
        "destination": "10.0.0.2:8000,10.0.0.1:8000",
        "profile": "decode",
        "targets": {"prefill": "pod-3"},
        "profiles": [
            {
                "profile": "decode",
                "filters": [{"filter": "gold", "removed": ["pod-3"], "removed_count": 1}],
                "scorers": [{"name": "queue-scorer", "weight": 2.0}, {"name": "prefix-cache-scorer", "weight": 3.0}],
                "endpoints": [
                    row("pod-2", "10.0.0.2:8000", {"queue-scorer": 0.25, "prefix-cache-scorer": 0.5}, 2.0, cached_tokens=64, picked=True),
                    row("pod-1", "10.0.0.1:8000", {"queue-scorer": 0.5, "prefix-cache-scorer": 0.0}, 1.0),
                ],
                "endpoints_count": 2,
            }
        ],
    }


def row(name: str, address: str, scores: Mapping[str, float], total: float, **more: object) -> dict[str, object]:
    return {"name": name, "address": address, "scores": scores, "total": total, "cached_tokens": 0, "picked": False} | more


def test_it_is_as_it_was_when_it_was_decided() -> None:
    world = core(2)
    world.read(1, waiting=5.0)
    decided(world, chat("first"))
    before = tables_of(world)
    world.read(1, waiting=0.0, kv_usage=0.9)
    world.read(2, waiting=50.0, kv_usage=0.1)
    decided(world, chat("second"))
    world.use(f"{HEAD}plugins: [{{type: random-picker}}]")
    world.datastore.apply([spec(2), spec(9)])  # slots are given out again
    decided(world, chat("third"))
    newest, _, oldest = tables_of(world)
    assert {**oldest, "age_s": 0.0} == {**before[0], "age_s": 0.0}
    assert [each["name"] for each in newest["profiles"][0]["endpoints"]] in (["pod-2", "pod-9"], ["pod-9", "pod-2"])


def test_a_table_of_a_large_pool_is_cut() -> None:
    endpoints = pool_of(*[{}] * 200)
    totals = [float(number) for number in range(100)]
    trace = ProfileTrace("default", [("f", endpoints[100:])], endpoints[:100], [Column("s", 1.0, totals)], totals, [endpoints[3]])
    decisions = Decisions(VirtualClock(), 1)
    decisions.add(llm_request(), [trace], Decision(endpoints[3], (), "default"))
    ((profile,),) = [each["profiles"] for each in decisions.tables(1)]
    names = [each["name"] for each in profile["endpoints"]]
    assert names == [f"pod-{number}" for number in range(100, 100 - ENDPOINTS_SHOWN_MAX, -1)] + ["pod-4"]
    assert profile["endpoints"][-1]["picked"]
    assert profile["endpoints_count"] == 100
    assert (len(profile["filters"][0]["removed"]), profile["filters"][0]["removed_count"]) == (REMOVED_SHOWN_MAX, 100)


@pytest.mark.parametrize(
    "body",
    [
        chat(SECRET),
        chat("x", tools=[{"type": "function", "function": {"name": SECRET}}], user=SECRET, metadata={"a": SECRET}),
        json.dumps({"model": "m", "messages": [{"role": "system", "content": [{"type": "text", "text": SECRET}]}]}).encode(),
        json.dumps({"model": "m", "messages": [{"role": "user", "content": {SECRET: SECRET}}]}).encode(),
        json.dumps({"model": "m", "messages": SECRET}).encode(),
        json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": SECRET, "cache_salt": SECRET}).encode(),
        json.dumps({"model": {"x": SECRET}, "messages": []}).encode(),
        chat(SECRET)[:-9],
        SECRET.encode(),
        b"\xff" + SECRET.encode(),
    ],
)
def test_there_is_not_a_word_of_the_prompt_in_it(body: bytes) -> None:
    world = core(2)
    decided(world, body, authorization=f"Bearer {SECRET}", cookie=SECRET)
    world.datastore.apply([])
    decided(world, body, authorization=f"Bearer {SECRET}", cookie=SECRET)
    found = tables_of(world)
    assert len(found) == 2
    assert SECRET not in json.dumps(found)
    assert found[0]["error"], "refused: nobody is there"


def test_a_refusal_is_kept_with_its_reason_and_how_far_it_came() -> None:
    world = core(2, config=f"{HEAD}plugins: [{{type: prefill-filter}}]")
    decided(world, chat(), id="1")
    decided(world, b"{", id="2")
    second, first = tables_of(world)
    assert (first["request_id"], first["endpoint"], first["error"]) == ("1", None, "no endpoints available for the given request")
    assert first["profiles"][0]["filters"][0]["removed"] == ["pod-1", "pod-2"]
    assert (second["request_id"], second["profiles"], second["model"]) == ("2", [], "")
    assert "not valid JSON" in second["error"]
