"""What `--emit-endpoint-scores` puts on the wire: every candidate's total, beside the destination."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest

from epp.plugins.base import Plugin
from epp.types import Endpoint, EndpointSpec, LLMRequest
from tests.builders import (
    DESTINATION,
    LLM_D,
    Stream,
    chat,
    core,
    kinds,
    request_body,
    request_headers,
    request_trailers,
    set_headers,
    spec,
)
from tests.spec.wire import (
    AUDIO,
    BUFFERED,
    NONE,
    ONE,
    REQUEST_MODES,
    THREE,
    TWO,
    Modes,
    configuration,
    profile,
    request,
    told,
)

SCORES = f"{DESTINATION}-scores"


class Says(Plugin):
    """A third party's scorer: what it was told to say, by the last number of an endpoint's name."""

    type: ClassVar[str] = "says"
    per_request: ClassVar[bool] = True

    scores: list[float]

    def score(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
        return [self.scores[int(endpoint.name.rpartition("-")[2]) - 1] for endpoint in endpoints]


def says(name: str, *scores: float) -> dict[str, Any]:
    return {"name": name, "type": f"{__name__}:Says", "parameters": {"scores": list(scores)}}


BY_HAND = configuration(says("a", 0.5, 1.0, 0.0), says("b", 0.25, 0.125, 7.0), profiles=[profile("default", a=2, b=4)])
TOTALS = {ONE: 2.0, TWO: 2.5, THREE: 4.0}
"""2 a + 4 b, each of them at most 1."""


@pytest.mark.parametrize("modes", REQUEST_MODES, ids=str)
def test_every_candidate_has_its_total_beside_the_destination(modes: Modes) -> None:
    stream = request(core(3, config=BY_HAND, emit_scores=True), modes=modes)
    assert told(stream.got) == [{"envoy.lb": {DESTINATION: THREE, SCORES: TOTALS}}]
    (route,) = [reply for reply in stream.got if reply.HasField("dynamic_metadata")]
    assert set_headers(route)[DESTINATION] == THREE.encode(), "the destination itself is as ever"
    assert SCORES not in set_headers(route), "engines need not know"


@pytest.mark.parametrize("modes", REQUEST_MODES, ids=str)
def test_scores_are_not_told_unasked(modes: Modes) -> None:
    stream = request(core(3, config=BY_HAND), modes=modes)
    assert told(stream.got) == [{"envoy.lb": {DESTINATION: THREE}}]


def test_requests_without_a_body_to_look_at_have_scores_too() -> None:
    world = core(3, config=BY_HAND, emit_scores=True)
    get = Stream(world.session())
    get.send(request_headers(path="/v1/models", end_of_stream=True, headers={":method": "GET"}))
    upload = Stream(world.session())
    upload.send(request_headers(path=AUDIO), request_body(b"RIFF"))
    trailers = Stream(world.session())
    trailers.send(request_headers(path=""), request_trailers())
    for stream in (get, upload, trailers):
        assert told(stream.got) == [{"envoy.lb": {DESTINATION: THREE, SCORES: TOTALS}}]


def test_trailers_alone_have_scores_where_only_their_reply_can_carry_them() -> None:
    stream = Stream(core(3, config=BY_HAND, emit_scores=True).session())
    stream.send(request_headers(path="", modes=(BUFFERED, NONE)), request_trailers())
    assert told(stream.got) == [{"envoy.lb": {DESTINATION: THREE, SCORES: TOTALS}}]


def test_scores_follow_load_and_cache_and_are_those_an_explanation_shows() -> None:
    world = core(2, config=LLM_D, emit_scores=True)
    world.read(1, kv_usage=0.5)
    world.read(2, kv_usage=0.1, waiting=4.0)
    asked = chat("word " * 2_000)
    first = request(world, asked)
    # queue 2 x (1, 0), KV cache 2 x (0.5, 0.9), nothing cached yet
    assert told(first.got)[0]["envoy.lb"][SCORES] == pytest.approx({ONE: 3.0, TWO: 1.8})
    world.clock.advance(1.0)
    world.read(1, kv_usage=0.5)
    world.read(2, kv_usage=0.1, waiting=4.0)
    again = request(world, asked)
    scores = told(again.got)[0]["envoy.lb"][SCORES]
    assert scores[TWO] == pytest.approx(1.8)
    assert 5.5 < scores[ONE] <= 6.0, "3 more for a prefix that is cached but for its last piece"
    assert world.director._decisions is not None
    (newest, *_) = world.director._decisions.tables(1)
    assert {row["address"]: row["total"] for row in newest["profiles"][0]["endpoints"]} == pytest.approx(scores, abs=1e-6)
    assert told(first.got)[0]["envoy.lb"][SCORES] == pytest.approx({ONE: 3.0, TWO: 1.8}), "what was told stays as it was told"


def test_a_decision_that_is_kept_stays_as_it_was_told() -> None:
    """Totals of load alone are kept from one decision to the next, and change in place where few endpoints did."""
    world = core(9, config=configuration({"type": "kv-cache-utilization-scorer"}), emit_scores=True)
    for first, second in [(0.25, 0.75), (0.5, 0.25)]:
        world.clock.advance(1.0)
        world.read(1, kv_usage=first)
        world.read(2, kv_usage=second)
        request(world)
    assert world.director._decisions is not None
    tables = world.director._decisions.tables(2)
    rows = [{row["address"]: row["total"] for row in table["profiles"][0]["endpoints"]} for table in tables]
    assert [(row[ONE], row[TWO], row[THREE]) for row in rows] == [(0.5, 0.75, 1.0), (0.75, 0.25, 1.0)], "the newest first"


def test_scores_are_told_of_every_request_even_where_no_decision_is_kept() -> None:
    """Explanations are made of one decision in 2 ms at most."""
    world = core(3, config=BY_HAND, emit_scores=True)
    for _ in range(5):
        assert told(request(world).got) == [{"envoy.lb": {DESTINATION: THREE, SCORES: TOTALS}}]
    assert world.director._decisions is not None
    assert len(world.director._decisions) == 1


def test_who_is_no_candidate_has_no_score() -> None:
    labelled = [EndpointSpec(f"pod-{n}", spec(n).address, labels={"tier": "a" if n < 3 else "b"}) for n in (1, 2, 3)]
    by_label = {"type": "by-label-selector", "name": "tier", "parameters": {"matchLabels": {"tier": "a"}}}
    config = configuration(by_label, says("a", 0.5, 1.0, 0.0), profiles=[profile("default", tier=1, a=2)])
    world = core(labelled, config=config, emit_scores=True)
    for _ in range(2):  # a filter of labels runs once for the same candidates
        assert told(request(world).got) == [{"envoy.lb": {DESTINATION: TWO, SCORES: {ONE: 1.0, TWO: 2.0}}}]
    only = request(world, subset=[ONE, THREE])
    assert told(only.got) == [{"envoy.lb": {DESTINATION: ONE, SCORES: {ONE: 1.0}}}]


def test_the_scores_are_those_of_the_profile_that_decided() -> None:
    handler = {"type": "header-profile-handler", "parameters": {"defaultProfile": "left"}}
    profiles = [profile("left", a=1), profile("right", b=1)]
    world = core(2, config=configuration(handler, says("a", 1.0, 0.5), says("b", 0.25, 0.75), profiles=profiles), emit_scores=True)
    assert told(request(world).got) == [{"envoy.lb": {DESTINATION: ONE, SCORES: {ONE: 1.0, TWO: 0.5}}}]
    right = request(world, headers={"epp-profile": "right"})
    assert told(right.got) == [{"envoy.lb": {DESTINATION: TWO, SCORES: {ONE: 0.25, TWO: 0.75}}}]


@pytest.mark.parametrize("order", ["decode-first", "prefill-first"])
def test_of_a_request_in_stages_the_scores_are_those_of_its_decoders(order: str) -> None:
    roles = [
        EndpointSpec(f"pod-{n}", spec(n).address, labels={"llm-d.ai/role": role})
        for n, role in enumerate(("prefill", "decode", "decode"), 1)
    ]
    deciders = {"deciders": {"prefill": "always-disagg-pd-decider"}} if order == "decode-first" else {}
    plugins: list[dict[str, Any]] = [
        {"type": "disagg-profile-handler", "parameters": {"stageOrder": order, **deciders}},
        *({"type": type_} for type_ in ("always-disagg-pd-decider", "prefill-filter", "decode-filter")),
        says("a", 1.0, 0.5, 0.25),
    ]
    profiles = [profile("prefill", **{"prefill-filter": 1, "a": 3}), profile("decode", **{"decode-filter": 1, "a": 2})]
    stream = request(core(roles, config=configuration(*plugins, profiles=profiles), emit_scores=True))
    assert told(stream.got) == [{"envoy.lb": {DESTINATION: TWO, SCORES: {TWO: 1.0, THREE: 0.5}}}]
    assert set_headers(stream.got[0])["x-prefiller-host-port"] == ONE.encode()


def test_scores_have_one_address_each_whatever_the_destination_is() -> None:
    picker = {"type": "max-score-picker", "parameters": {"maxNumOfEndpoints": 2}}
    stream = request(core(3, config=configuration(says("a", 0.5, 1.0, 0.0), picker), emit_scores=True))
    assert told(stream.got) == [{"envoy.lb": {DESTINATION: f"{TWO},{ONE}", SCORES: {ONE: 0.5, TWO: 1.0, THREE: 0.0}}}]
    ranks = [spec(n, host="10.0.0.9", port=8000 + n) for n in (1, 2)]
    config = configuration(says("a", 0.5, 1.0), {"type": "data-parallel-profile-handler"})
    stream = request(core(ranks, config=config, emit_scores=True))
    assert told(stream.got) == [{"envoy.lb": {DESTINATION: "10.0.0.9:8000", SCORES: {"10.0.0.9:8001": 0.5, "10.0.0.9:8002": 1.0}}}]
    six = request(core([spec(1, host="2001:db8::1")], config=configuration(says("a", 0.5)), emit_scores=True))
    assert told(six.got) == [{"envoy.lb": {DESTINATION: "[2001:db8::1]:8000", SCORES: {"[2001:db8::1]:8000": 0.5}}}]


def test_a_score_that_is_no_number_is_told_as_what_it_counted_for() -> None:
    class Odd(Says):
        def score(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
            return [math.nan, math.inf, -math.inf]

    world = core(3, config=BY_HAND, emit_scores=True)
    only = world.built.scheduler._only
    assert only is not None
    only._per_request[0] = only._per_request[0].__class__(Odd(scores=[]), 2.0)
    assert told(request(world).got) == [{"envoy.lb": {DESTINATION: THREE, SCORES: {ONE: 1.0, TWO: 2.0 + 0.5, THREE: 4.0}}}]


def test_a_large_pools_scores_are_all_told() -> None:
    pool = [spec(n, host=f"10.1.{n // 250}.{n % 250}") for n in range(1, 1_001)]
    world = core(pool, config=configuration(says("a", *(n / 1_000 for n in range(1_000)))), emit_scores=True)
    (metadata,) = told(request(world).got)
    assert metadata["envoy.lb"][SCORES] == {each.destination: n / 1_000 for n, each in enumerate(world.datastore.endpoints.values())}
    assert metadata["envoy.lb"][DESTINATION] == "10.1.4.0:8000"


def test_a_refusal_tells_no_scores() -> None:
    for stream in (request(core(0, emit_scores=True)), request(core(2, emit_scores=True), headers={"prefer": "if-available"})):
        assert kinds(stream.got) == ["immediate_response"]
        assert told(stream.got) == []
