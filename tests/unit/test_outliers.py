"""Passive health: who is left out after which failures, for how long, and what brings it back."""

from __future__ import annotations

import logging

import pytest

from epp.clock import VirtualClock
from epp.datastore import Datastore
from epp.exchange import Exchange
from epp.outliers import EJECT_MAX_S, EJECT_S, FAILURES_MAX, PROBE_S, Outliers
from epp.types import Endpoint, LLMRequest
from tests.builders import LLM_D, PATH, chat, core, spec


class Pool:
    """Two endpoints of which one is under suspicion."""

    def __init__(self, count: int = 2) -> None:
        self.clock = VirtualClock(1000.0)
        self.datastore = Datastore(self.clock)
        self.datastore.apply([spec(number + 1) for number in range(count)])
        self.outliers = Outliers(self.datastore, self.clock)
        self.suspect, *self.others = self.datastore.endpoints.values()

    def do(self, steps: str, endpoint: Endpoint | None = None) -> None:
        """`5`: a 5xx; `c`: no connection; `s`: success; `p`: picked; `w`: its time passes; `t`: a tick."""
        endpoint = endpoint or self.suspect
        for step in steps.replace(" ", ""):
            if step == "5":
                self.outliers.failed(endpoint, "status 500")
            elif step == "c":
                self.outliers.failed(endpoint, "connection failed", certain=True)
            elif step == "s":
                self.outliers.succeeded(endpoint)
            elif step == "p":
                self.outliers.probing(endpoint)
            elif step == "w":
                left = self.outliers.state()[endpoint.name]["seconds_left"]
                self.clock.advance(left)
            else:
                assert step == "t"
                self.outliers.tick()

    @property
    def ready(self) -> list[str]:
        return [endpoint.name for endpoint in self.datastore.ready.endpoints]

    @property
    def state(self) -> str:
        return "out" if self.suspect.ejected else "half open" if self.suspect.half_open else "in"


@pytest.mark.parametrize(
    ("steps", "state"),
    [
        ("", "in"),
        ("5", "in"),
        ("5555", "in"),
        ("55555", "out"),
        ("5555 s 5555", "in"),
        ("5555 s 55555", "out"),
        ("c", "out"),
        ("5 c", "out"),
        ("s", "in"),
        # its time out
        ("c t", "out"),
        ("c w t", "half open"),
        ("c w", "out"),
        ("55555 w t", "half open"),
        # of requests sent before
        ("c 5555555", "out"),
        ("c w t 5555555 c", "half open"),
        ("c s", "in"),
        ("c w t s", "in"),
        # the probe
        ("c w t p", "out"),
        ("c w t p t", "out"),
        ("c w t p s", "in"),
        ("c w t p 5", "out"),
        ("c w t p c", "out"),
        ("c w t p 5 w t", "half open"),
        ("c w t p s 5555", "in"),
        ("c w t p s c", "out"),
        # a probe nobody answers
        ("c w t p w t", "half open"),
        ("c w t p w t p s", "in"),
    ],
)
def test_states(steps: str, state: str) -> None:
    pool = Pool()
    pool.do(steps)
    assert pool.state == state
    assert pool.ready == (["pod-2"] if state == "out" else ["pod-1", "pod-2"])
    assert len(pool.outliers) == (state != "in")


def test_so_many_in_a_row() -> None:
    pool = Pool()
    pool.do("5" * (FAILURES_MAX - 1))
    assert pool.state == "in"
    pool.do("5")
    assert (pool.state, pool.outliers.ejections_total) == ("out", 1)


def test_the_time_out_doubles_up_to_a_limit_and_a_success_forgets() -> None:
    pool = Pool()
    lengths = []
    pool.do("c")
    for _ in range(9):
        lengths.append(pool.outliers.state()["pod-1"]["seconds_left"])
        pool.do("w t p 5")
    assert lengths == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    assert (lengths[0], lengths[-1]) == (EJECT_S, EJECT_MAX_S)
    assert pool.outliers.ejections_total == 10
    pool.do("w t p s c")
    assert pool.outliers.state()["pod-1"]["seconds_left"] == EJECT_S


def test_a_moment_too_early_is_too_early() -> None:
    pool = Pool()
    pool.do("c")
    pool.clock.advance(EJECT_S - 0.001)
    pool.do("t")
    assert pool.state == "out"
    pool.clock.advance(0.001)
    pool.do("t")
    assert pool.state == "half open"


def test_a_probe_may_take_its_time() -> None:
    pool = Pool()
    pool.do("c w t p")
    assert pool.outliers.state()["pod-1"] == {"failures": 1, "ejected": True, "half_open": False, "seconds_left": PROBE_S}
    pool.clock.advance(PROBE_S - 1)
    pool.do("t")
    assert pool.state == "out"


def test_failures_of_one_are_nothing_to_another() -> None:
    pool = Pool(3)
    pool.do("555")
    pool.do("5555", pool.others[0])
    pool.do("5")
    assert pool.ready == ["pod-1", "pod-2", "pod-3"]
    pool.do("5")
    assert pool.ready == ["pod-2", "pod-3"]


def test_when_all_are_out_none_is() -> None:
    pool = Pool(3)
    for endpoint in pool.datastore.endpoints.values():
        pool.do("c", endpoint)
    assert pool.ready == ["pod-1", "pod-2", "pod-3"]
    assert len(pool.outliers) == 3
    pool.do("s", pool.others[0])
    assert pool.ready == ["pod-2"]


def test_a_half_open_one_is_better_than_those_that_are_out() -> None:
    pool = Pool()
    pool.do("c")
    pool.do("w t")
    pool.do("c", pool.others[0])
    assert pool.ready == ["pod-1"]


def test_an_endpoint_that_is_gone_is_forgotten() -> None:
    pool = Pool()
    pool.do("c")
    gone = pool.suspect
    pool.datastore.apply([spec(2)])
    assert (len(pool.outliers), pool.outliers.state()) == (0, {})
    pool.do("c s t", gone)
    assert (len(pool.outliers), pool.outliers.state(), pool.ready) == (0, {}, ["pod-2"])
    pool.datastore.apply([spec(1), spec(2)])
    assert pool.ready == ["pod-2", "pod-1"], "back at the same address it is another"


def test_what_is_told(caplog: pytest.LogCaptureFixture) -> None:
    pool = Pool()
    with caplog.at_level(logging.INFO, "epp.outliers"):
        pool.do("5555 s c 555 w t p s s 5")
    assert [record.message for record in caplog.records] == ["endpoint is ejected", "endpoint is back"]
    assert caplog.records[0].fields == {  # type: ignore[attr-defined]
        "endpoint": "pod-1",
        "address": "10.0.0.1:8000",
        "reason": "connection failed",
        "seconds": 1.0,
    }
    assert pool.outliers.state() == {"pod-1": {"failures": 1, "ejected": False, "half_open": False, "seconds_left": 0.0}}


def test_only_one_request_tries_a_half_open_endpoint() -> None:
    world = core(2, config=LLM_D)
    world.outliers.failed(world.endpoint(1), "connection failed", certain=True)
    world.clock.advance(EJECT_S)
    world.outliers.tick()
    world.read(2, waiting=50.0)

    def send(number: int) -> Exchange:
        return world.director.route(LLMRequest(id="r", path=PATH, headers={}), chat(str(number)), None, 0.0)

    first, *others = [send(number) for number in range(6)]
    assert [each.decision.endpoint.name for each in (first, *others)] == ["pod-1"] + ["pod-2"] * 5
    first.response_headers(200, event_stream=False, served="", code_details="")
    assert [send(number).decision.endpoint.name for number in range(6, 9)] == ["pod-1"] * 3, "it answered"


def test_a_new_process_starts_without_the_old_ones_failures() -> None:
    world = core(2)
    endpoint = world.endpoint(1)
    world.outliers.failed(endpoint, "connection failed", certain=True)
    assert endpoint.ejected
    world.outliers.restarted(endpoint)
    assert (endpoint.ejected, endpoint.half_open, len(world.outliers)) == (False, False, 0)
    world.outliers.restarted(world.endpoint(2))  # nothing to forget
