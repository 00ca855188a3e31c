"""The conformance suite's own headers (protocol reference, section 9): they work behind their flag, and only there."""

from __future__ import annotations

import pytest

from epp._pb import epp_ext_proc_pb2 as pb
from epp.types import EndpointSpec
from tests.builders import (
    Core,
    Stream,
    chat,
    core,
    destination_of,
    kinds,
    request_body,
    request_headers,
    response_headers,
    set_headers,
    spec,
)

SELECTION, SERVED = "test-epp-endpoint-selection", "x-conformance-test-served-endpoint"
RANKS: list[EndpointSpec] = [
    spec(number * 10 + rank, host=f"10.0.0.{number}", port=3000 + 2 * rank) for number in (1, 2) for rank in range(3)
]
"""Two pods with three ranks each, as in the data-parallel test."""


def picked(world: Core, selection: str, *, times: int = 40, get: bool = False) -> set[str]:
    found = set()
    for _ in range(times):
        stream = Stream(world.session())
        if get:
            stream.send(request_headers(path="/v1/models", end_of_stream=True, headers={SELECTION: selection, ":method": "GET"}))
        else:
            stream.send(request_headers(headers={SELECTION: selection}), request_body(chat(), end_of_stream=True))
        found.add(destination_of(stream.got[0]))
    return found


@pytest.mark.parametrize("get", [False, True])
@pytest.mark.parametrize(
    ("selection", "allowed"),
    [
        ("10.0.0.2", {"10.0.0.2:8000"}),
        ("10.0.0.2:8000", {"10.0.0.2:8000"}),
        ("10.0.0.1,10.0.0.3", {"10.0.0.1:8000", "10.0.0.3:8000"}),
        (" 10.0.0.1 , 10.0.0.3:8000 ", {"10.0.0.1:8000", "10.0.0.3:8000"}),
        ("10.9.9.9,10.0.0.1", {"10.0.0.1:8000"}),
    ],
)
def test_the_pick_stays_inside_the_list(selection: str, allowed: set[str], get: bool) -> None:
    assert picked(core(3, test_headers=True), selection, get=get) == allowed


@pytest.mark.parametrize(
    ("selection", "allowed"),
    [
        ("10.0.0.1", {"10.0.0.1:3000", "10.0.0.1:3002", "10.0.0.1:3004"}),
        ("10.0.0.1:3002", {"10.0.0.1:3002"}),
        ("10.0.0.1:3002,10.0.0.2:3004", {"10.0.0.1:3002", "10.0.0.2:3004"}),
        ("10.0.0.1:3002,10.0.0.2", {"10.0.0.1:3002", "10.0.0.2:3000", "10.0.0.2:3002", "10.0.0.2:3004"}),
    ],
)
def test_a_bare_address_allows_all_its_ports_and_one_with_a_port_only_that(selection: str, allowed: set[str]) -> None:
    assert picked(core(RANKS, test_headers=True), selection, times=80) == allowed


@pytest.mark.parametrize("selection", ["10.9.9.9", "10.0.0.1:1", "", "nonsense"])
def test_a_list_that_names_nobody_is_a_503(selection: str) -> None:
    stream = Stream(core(2, test_headers=True).session())
    (reply,) = stream.send(request_headers(headers={SELECTION: selection}), request_body(chat(), end_of_stream=True))
    assert reply.immediate_response.status.code == 503


def test_the_list_counts_for_more_than_the_gateways_subset() -> None:
    world = core(3, test_headers=True)
    stream = Stream(world.session())
    subset = {"envoy.lb.subset_hint": {"x-gateway-destination-endpoint-subset": ["10.0.0.1"]}}
    stream.send(request_headers(headers={SELECTION: "10.0.0.3"}, filter_metadata=subset), request_body(chat(), end_of_stream=True))
    assert destination_of(stream.got[0]) == "10.0.0.3:8000"


def test_without_the_flag_the_list_is_nothing_to_us() -> None:
    assert picked(core(3), "10.0.0.2", times=60) == {f"10.0.0.{number}:8000" for number in (1, 2, 3)}


def answered(world: Core, message: pb.ProcessingRequest) -> pb.ProcessingResponse:
    stream = Stream(world.session())
    stream.send(request_headers(), request_body(chat(), end_of_stream=True))
    (reply,) = stream.send(message)
    assert kinds([reply]) == ["response_headers"]
    return reply


def test_who_served_is_told_to_the_client() -> None:
    reply = answered(core(test_headers=True), response_headers(served="10.0.0.1:8000"))
    assert set_headers(reply) == {SERVED: b"10.0.0.1:8000"}


def test_a_gateway_that_does_not_say_who_served_fails_the_test_readably() -> None:
    assert set_headers(answered(core(test_headers=True), response_headers()))[SERVED].startswith(b"fail: missing")


def test_without_the_flag_a_response_is_left_alone() -> None:
    reply = answered(core(), response_headers(served="10.0.0.1:8000"))
    assert reply == pb.ProcessingResponse(response_headers=pb.HeadersResponse())


def test_a_response_without_a_request_of_ours_is_told_too() -> None:
    """The suite looks at Envoy's own answers as well."""
    (reply,) = Stream(core(test_headers=True).session()).send(response_headers(503))
    assert set_headers(reply)[SERVED].startswith(b"fail")
