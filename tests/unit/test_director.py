"""A request's way to its endpoint and back: errors, what is counted, subsets, who really served, and endpoints found dead."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import ClassVar

import pytest

from epp.director import Exchange
from epp.errors import BadRequestError, EppError, NoEndpointsError, NotFoundError
from epp.extproc.messages import Immediate, RequestBody, RequestHeaders
from epp.outliers import EJECT_S, HANG_S
from epp.plugins.base import Plugin
from epp.types import Decision, Endpoint, LLMRequest, Snapshot
from tests.builders import PATH, Core, Stream, chat, core, request_body, request_headers, response_body, response_headers, spec

HEAD = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"
CONNECTION_FAILURE = "upstream_reset_before_response_started{connection_failure|delayed_connect_error:_Connection_refused}"
SSE_USAGE = b'data: {"usage":{"prompt_tokens":40,"completion_tokens":5,"prompt_tokens_details":{"cached_tokens":8}}}\n\n'


def route(world: Core, body: bytes | None = None, *, path: str = PATH, subset: tuple[str, ...] | None = None) -> Exchange:
    request = LLMRequest(id="r", path=path, headers={})
    return world.director.route(request, chat() if body is None else body, subset, world.clock.now_s())


def answer(exchange: Exchange, status: int = 200, *, event_stream: bool = False, served: str = "", code_details: str = "") -> None:
    exchange.response_headers(status, event_stream=event_stream, served=served, code_details=code_details)


def count(world: Core, name: str) -> int:
    """Observations of a histogram over all series."""
    return sum(getattr(series, name).count for series in world.metrics._series.values())


# Errors


@pytest.mark.parametrize(
    ("path", "body", "error", "code"),
    [
        (PATH, b"{", BadRequestError, "BadRequest"),
        (PATH, b'{"messages":[1]}', BadRequestError, "BadRequest"),
        ("/nowhere", b"", NotFoundError, "NotFound"),
    ],
)
def test_a_request_that_can_not_be_understood_is_counted_and_charges_nobody(
    path: str, body: bytes, error: type[EppError], code: str
) -> None:
    world = core()
    with pytest.raises(error):
        route(world, body, path=path)
    assert world.errors("") == {code: 1}
    assert world.inflight == (0, 0, 0, 0)
    assert b'inference_extension_scheduler_attempts_total{status="failure"' in world.metrics.exposition()[0]


def test_no_endpoint_is_an_error_of_that_model() -> None:
    world = core(0)
    with pytest.raises(NoEndpointsError, match="no endpoint is ready"):
        route(world)
    assert world.errors("m") == {"ServiceUnavailable": 1}
    assert world.metrics.series("m", "m").requests == 1


def raising(_request: LLMRequest, _decision: Decision) -> None:
    raise RuntimeError("a plugin's bug")


def test_a_hook_that_fails_is_logged_and_the_request_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    world = core()
    world.built.scheduler.picked = (*world.built.scheduler.picked, raising)
    exchange = route(world)
    exchange.finish(complete=False)
    assert world.inflight == (0, 0, 0, 0)
    assert "a plugin's hook failed" in caplog.text


class FailingProducer(Plugin):
    """A producer with a bug."""

    type: ClassVar[str] = "failing-producer"

    def produce(self, request: LLMRequest, candidates: Snapshot) -> None:
        raise RuntimeError("a producer's bug")


class FailingScorer(Plugin):
    """A scorer with a bug."""

    type: ClassVar[str] = "failing-scorer"
    per_request: ClassVar[bool] = True

    def score(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
        raise RuntimeError("a scorer's bug")


def test_a_producer_that_fails_costs_its_data_alone(caplog: pytest.LogCaptureFixture) -> None:
    world = core(config=f"{HEAD}plugins: [{{type: '{__name__}:FailingProducer'}}]")
    route(world).finish(complete=False)
    assert "a data producer failed" in caplog.text


def test_a_scorers_bug_is_a_500_and_leaves_nothing_charged() -> None:
    world = core(config=f"{HEAD}plugins: [{{type: '{__name__}:FailingScorer'}}]")
    session = world.session()
    session.receive(RequestHeaders({":path": PATH}, end_of_stream=False))
    (reply,) = session.receive(RequestBody(chat(), True))
    assert isinstance(reply, Immediate)
    assert reply.status == 500
    assert b"bug" not in reply.body, "what went wrong inside is for the log"
    session.closed()
    assert world.inflight == (0, 0, 0, 0)


# What is counted


def test_a_streamed_answer_is_measured() -> None:
    world = core()
    series = world.metrics.series("m", "m")
    exchange = route(world, chat(stream=True))
    assert (series.requests, series.running) == (1, 1)
    world.clock.advance(0.5)
    answer(exchange, event_stream=True)
    exchange.response_chunk(b"data: 1\n\n")
    for _ in range(4):
        world.clock.advance(0.1)
        exchange.response_chunk(b"data: 2\n\n")
    exchange.response_chunk(SSE_USAGE)
    exchange.finish(complete=True)
    assert series.running == 0
    assert (series.streaming_ttft_s.count, series.streaming_ttft_s.sum) == (1, pytest.approx(0.5))
    assert (series.streaming_itl_s.count, series.streaming_itl_s.sum) == (5, pytest.approx(0.4))
    assert (series.duration_s.count, series.duration_s.sum) == (1, pytest.approx(0.9))
    assert series.streaming_tpot_s.sum == pytest.approx(0.4 / 4)
    assert series.ntpot_s.sum == pytest.approx(0.9 / 5)
    assert (series.input_tokens.sum, series.output_tokens.sum, series.cached_tokens.sum) == (40, 5, 8)
    assert series.response_bytes.sum == 5 * 9 + len(SSE_USAGE)
    assert series.request_bytes.sum == len(chat(stream=True))
    assert (series.ttft_s.count, dict(series.errors)) == (0, {})


def test_an_answer_that_is_not_streamed_has_one_time_to_first_token_and_no_time_between() -> None:
    world = core()
    series = world.metrics.series("m", "m")
    exchange = route(world)
    world.clock.advance(2.0)
    answer(exchange)
    exchange.response_chunk(b'{"usage":{"prompt_tokens":40,')
    exchange.response_chunk(b'"completion_tokens":5}}')
    exchange.finish(complete=True)
    assert (series.ttft_s.count, series.ttft_s.sum) == (1, pytest.approx(2.0))
    assert (series.streaming_ttft_s.count, series.streaming_itl_s.count, series.streaming_tpot_s.count) == (0, 0, 0)
    assert (series.input_tokens.sum, series.output_tokens.sum, series.cached_tokens.count) == (40, 5, 0)


@pytest.mark.parametrize(
    ("status", "complete", "errors"),
    [(200, True, {}), (500, True, {"ModelServerError": 1}), (429, True, {"ModelServerError": 1}), (200, False, {"ClientDisconnected": 1})],
)
def test_how_a_request_ended_is_counted_once(status: int, complete: bool, errors: dict[str, int]) -> None:
    world = core()
    exchange = route(world)
    answer(exchange, status)
    exchange.response_chunk(b"{}")
    exchange.finish(complete=complete)
    exchange.finish(complete=not complete)
    exchange.response_chunk(b"late")
    answer(exchange, 500, served="10.0.0.9:1", code_details=CONNECTION_FAILURE)
    assert world.errors("m") == errors
    assert world.inflight == (0, 0, 0, 0)
    assert count(world, "duration_s") == (status == 200 and complete)
    assert world.endpoint(1).healthy


@pytest.mark.parametrize("usage", [b"9" * 400, b"-5", b"0", b'"x"', b"null"])
def test_no_count_an_engine_reports_breaks_the_end_of_a_response(usage: bytes) -> None:
    world = core()
    exchange = route(world, chat(stream=True))
    answer(exchange)
    exchange.response_chunk(b'{"usage":{"prompt_tokens":' + usage + b',"completion_tokens":' + usage + b"}}")
    exchange.finish(complete=True)
    assert world.inflight == (0, 0, 0, 0)
    world.metrics.exposition()


def test_the_prefill_weighs_until_the_first_token() -> None:
    world = core()
    stream = Stream(world.session())
    stream.send(request_headers(), request_body(chat("x" * 4_000), end_of_stream=True))
    endpoint = world.endpoint(1)
    assert endpoint.inflight_tokens > 1_000
    for message in (response_headers(), response_body(b"")):
        stream.send(message)
        assert endpoint.inflight_tokens > 1_000, "neither headers nor an empty chunk are a token"
    stream.send(response_body(b"a"))
    assert (endpoint.inflight_requests, endpoint.inflight_tokens) == (1, 0)


def test_only_uncached_tokens_are_charged() -> None:
    world = core()
    first = route(world, chat("x" * 40_000))
    whole = world.endpoint(1).inflight_tokens
    first.finish(complete=True)
    again = route(world, chat("x" * 40_000))
    assert 0 < world.endpoint(1).inflight_tokens < whole / 20
    again.finish(complete=True)
    assert world.metrics.prefix_hit_ratio.count == 2
    assert world.metrics.prefix_hit_ratio.sum > 0.9


def test_every_pick_is_an_attempt_of_that_endpoint() -> None:
    world = core()
    for _ in range(3):
        route(world).finish(complete=True)
    text = world.metrics.exposition()[0].decode()
    lines = [line for line in text.splitlines() if "scheduler_attempts_total{" in line and 'status="success"' in line]
    assert lines
    assert all('"pod-1"' in line and line.endswith((" 3", " 3.0")) for line in lines)
    assert world.metrics.scheduler_duration_s.count == 3


# Subsets


def test_a_subset_is_ignored_where_the_filter_is_off() -> None:
    world = core(2, subset_filter=False)
    assert route(world, subset=("10.9.9.9",)).decision.endpoint.name in {"pod-1", "pod-2"}


def test_within_a_subset_the_healthy_come_first_and_a_failing_one_is_better_than_none() -> None:
    world = core(3)
    world.datastore.set_healthy(world.endpoint(1), healthy=False)
    for _ in range(10):
        assert route(world, subset=("10.0.0.1", "10.0.0.2")).decision.endpoint.name == "pod-2"
    assert route(world, subset=("10.0.0.1",)).decision.endpoint.name == "pod-1"


def test_an_endpoint_that_left_is_not_in_any_subset() -> None:
    world = core(2)
    world.datastore.apply([spec(2)])
    with pytest.raises(NoEndpointsError, match="subset"):
        route(world, subset=("10.0.0.1",))
    assert world.errors("m") == {"ServiceUnavailable": 1}


# Who served, and who did not


def test_an_endpoint_the_gateway_could_not_reach_is_avoided_until_one_request_has_tried_it_again() -> None:
    world = core(2)
    exchange = route(world)
    chosen = exchange.decision.endpoint
    answer(exchange, 503, code_details=CONNECTION_FAILURE)
    exchange.finish(complete=True)
    assert chosen.ejected
    for _ in range(10):
        assert route(world).decision.endpoint is not chosen
    world.clock.advance(EJECT_S)
    world.outliers.tick()
    probe = next(exchange for _ in range(100) if (exchange := route(world)).decision.endpoint is chosen)
    assert all(route(world).decision.endpoint is not chosen for _ in range(20)), "one request tries it"
    answer(probe, 200)
    assert chosen in {route(world).decision.endpoint for _ in range(100)}


@pytest.mark.parametrize(
    ("status", "details", "in_service"),
    [
        (503, CONNECTION_FAILURE, False),
        (503, "upstream_reset_before_response_started{connection_termination}", False),
        (503, "upstream_reset_before_response_started{connection_timeout}", False),
        (503, "upstream_reset_before_response_started{remote_connection_failure|x}", False),
        (503, "upstream_reset_before_response_started{remote_reset}", True),
        (503, "upstream_reset_before_response_started{overflow}", True),
        (503, "via_upstream", True),
        (503, "", True),
        (503, "no_healthy_upstream", True),
        (429, CONNECTION_FAILURE, True),
        (200, "via_upstream", True),
    ],
)
def test_one_failure_to_connect_ejects_and_nothing_else_does_at_once(status: int, details: str, in_service: bool) -> None:
    world = core(2)
    exchange = route(world)
    answer(exchange, status, code_details=details)
    exchange.finish(complete=True)
    assert exchange.decision.endpoint.ejected is not in_service


LIST_CONFIG = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins: [{type: queue-scorer}, {type: prefix-cache-scorer}, {type: max-score-picker, parameters: {maxNumOfEndpoints: 2}}]
"""


@pytest.mark.parametrize(("config", "ours_ejected"), [(LIST_CONFIG, True), ("", False)])
def test_when_another_served_the_charge_and_the_prefix_move_with_it(config: str, ours_ejected: bool) -> None:
    """Only a gateway that went along our list says by it that the first did not take the request."""
    world = core(2, config=config)
    exchange = route(world, chat("x" * 4_000))
    ours = exchange.decision.endpoint
    (other,) = [e for e in world.datastore.endpoints.values() if e is not ours]
    answer(exchange, served=other.destination)
    assert (ours.inflight_requests, ours.inflight_tokens) == (0, 0)
    assert other.inflight_requests == 1
    assert other.inflight_tokens > 1_000
    assert (ours.ejected, other.ejected) == (ours_ejected, False)
    (index,) = world.built.indexes.values()
    assert index.held_blocks(other.slot) == len(exchange.request.prefix.hashes) > 0
    exchange.response_chunk(b"a")
    exchange.finish(complete=True)
    assert world.inflight == (0, 0, 0, 0)


def test_an_endpoint_that_left_the_pool_meanwhile_gives_its_charge_back() -> None:
    world = core(2)
    exchange = route(world)
    ours = exchange.decision.endpoint
    world.datastore.apply([spec(3)])
    answer(exchange, served="10.0.0.3:8000")
    assert (ours.inflight_requests, world.endpoint(3).inflight_requests) == (0, 1)
    exchange.finish(complete=False)
    assert world.inflight == (0, 0, 0, 0)


def test_the_log_tells_a_decision_but_never_the_prompt(caplog: pytest.LogCaptureFixture) -> None:
    world = core()
    with caplog.at_level(logging.DEBUG, "epp.decision"):
        route(world, chat("my secret"))
        with pytest.raises(BadRequestError):
            route(world, b'{"model":"m","messages":"my secret"}')
    routed, rejected = caplog.records
    assert routed.fields["endpoint"] == "10.0.0.1:8000"  # type: ignore[attr-defined]
    assert rejected.fields["status"] == 400  # type: ignore[attr-defined]
    assert not any("secret" in str(record.__dict__) for record in caplog.records)


def test_what_the_gateway_answers_itself_says_nothing_good_of_an_endpoint() -> None:
    world = core(1)
    world.outliers.failed(world.endpoint(1), "status 500")
    exchange = route(world)
    answer(exchange, 413, code_details="request_payload_too_large")
    exchange.finish(complete=True)
    assert world.outliers.state()["pod-1"]["failures"] == 1
    exchange = route(world)
    answer(exchange, 404, code_details="via_upstream")
    exchange.finish(complete=True)
    assert world.outliers.state() == {}


def test_a_long_upload_is_no_endpoint_that_hangs() -> None:
    world = core(1)
    for waited_s, failures in ((HANG_S - 1, 0), (HANG_S, 1)):
        started_s = world.clock.now_s()
        world.clock.advance(100.0)  # its body came slowly
        request = LLMRequest(id="r", path=PATH, headers={})
        exchange = world.director.route(request, chat(), None, started_s)
        world.clock.advance(waited_s)
        exchange.finish(complete=False)
        assert sum(each["failures"] for each in world.outliers.state().values()) == failures


def test_stages_that_requests_ran_in_are_counted() -> None:
    config = (
        f"{HEAD}plugins: [{{type: disagg-profile-handler, parameters: {{deciders: {{prefill: always-disagg-pd-decider}}}}}},"
        " {type: always-disagg-pd-decider}, {type: decode-filter}, {type: prefill-filter}]\n"
        "schedulingProfiles: [{name: decode, plugins: [{pluginRef: decode-filter}]}, {name: prefill, plugins: [{pluginRef: prefill-filter}]}]\n"
    )
    decode, prefill = spec(1), spec(2)._replace(labels={"llm-d.ai/role": "prefill"})
    world = core([decode, prefill], config=config)
    world.metrics.stage_decisions = world.built.stage_decisions
    exchange = route(world)
    assert exchange.decision.headers == {"x-prefiller-host-port": "10.0.0.2:8000"}
    text = world.metrics.exposition()[0].decode()
    assert 'llm_d_epp_disagg_decision_total{plugin_name="disagg-profile-handler"' in text
    assert 'model_name="m",decision_type="prefill-decode"} 1' in text
    exchange.finish(complete=True)
    assert world.inflight == (0, 0, 0, 0)
