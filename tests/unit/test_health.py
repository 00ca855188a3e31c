"""grpc.health.v1, name by name: what it says without leader election, on the leader and on a follower."""

from __future__ import annotations

import itertools

import pytest

from epp._pb import epp_health_pb2 as pb
from epp.extproc.health import EXT_PROC_SERVICE, LIVENESS, READINESS, SERVICES, Health, check_request, is_serving

SERVING, NOT_SERVING, UNKNOWN = pb.HealthCheckResponse.SERVING, pb.HealthCheckResponse.NOT_SERVING, pb.HealthCheckResponse.SERVICE_UNKNOWN
ROUTING = ("", READINESS, EXT_PROC_SERVICE)
OTHERS = ("inference-extension", "anything")
NAMES = (*ROUTING, LIVENESS, *OTHERS)


class State:
    """What a Health asks about."""

    def __init__(self, *, leading: bool | None = None) -> None:
        self.live = self.protocol = self.plugins = True
        self.health = Health(
            live=lambda: self.live, protocol_matches=lambda: self.protocol, plugins_ready=lambda: self.plugins, leading=leading
        )
        self.health.ready = True

    def statuses(self) -> dict[str, int]:
        return {name: pb.HealthCheckResponse.FromString(self.health.check(check_request(name))).status for name in NAMES}

    def listed(self) -> dict[str, int]:
        return {name: each.status for name, each in pb.HealthListResponse.FromString(self.health.list(b"")).statuses.items()}


def spoil(state: State, what: str) -> None:
    if what in ("live", "protocol", "plugins"):
        setattr(state, what, False)
    elif what == "draining":
        state.health.draining = True
    elif what == "starting":
        state.health.ready = False


@pytest.mark.parametrize("spoiled", ["", "live", "protocol", "plugins", "draining", "starting"])
def test_without_an_election_every_name_is_answered_and_only_routing_names_ask_the_plugins(spoiled: str) -> None:
    state = State()
    spoil(state, spoiled)
    expected = dict.fromkeys(NAMES, NOT_SERVING if spoiled else SERVING)
    if spoiled == "plugins":
        expected |= dict.fromkeys((LIVENESS, *OTHERS), SERVING)
    assert state.statuses() == expected
    assert state.listed() == {name: expected[name] for name in SERVICES}


@pytest.mark.parametrize("spoiled", ["", "live", "protocol", "plugins", "draining", "starting"])
@pytest.mark.parametrize("leading", [True, False])
def test_with_an_election_liveness_is_always_up_and_only_the_leader_is_ready(spoiled: str, leading: bool) -> None:
    state = State(leading=leading)
    spoil(state, spoiled)
    ready = SERVING if leading and not spoiled else NOT_SERVING
    expected = dict.fromkeys(ROUTING, ready) | {LIVENESS: SERVING} | dict.fromkeys(OTHERS, UNKNOWN)
    assert state.statuses() == expected
    assert state.listed() == dict.fromkeys(ROUTING, ready) | {LIVENESS: SERVING}, "a name that is not known is not listed"


def test_a_check_says_what_is_so_now() -> None:
    state = State(leading=False)
    seen = []
    for leading, live in itertools.product((True, False), repeat=2):
        state.health.leading, state.live = leading, live
        seen.append(is_serving(state.health.check(check_request(READINESS))))
        assert state.health.serving(READINESS) is seen[-1]
    assert seen == [True, False, False, False]


def test_a_picker_without_a_pool_to_ask_is_up_when_it_says_so() -> None:
    health = Health()
    assert not any(health.serving(name) for name in NAMES)
    health.ready = True
    assert all(health.serving(name) for name in NAMES)


def test_bytes_that_are_no_request_are_a_value_error() -> None:
    with pytest.raises(ValueError, match="parsing message"):
        Health().check(b"\xff\xff")
