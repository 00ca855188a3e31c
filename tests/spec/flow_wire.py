"""Flow control over the wire: a picker that has it, its timers in the test's hands, and streams that wait in it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from typing import Any

from epp.queueing import Queueing
from epp.resources import Objective
from tests.builders import Core, Stream, core, set_headers
from tests.flow_world import Cancel, Timers
from tests.spec.wire import answer_of, configuration, request

TTL, FAIRNESS, OBJECTIVE = "x-llm-d-request-ttl", "x-llm-d-inference-fairness-id", "x-llm-d-inference-objective"
REASON = "x-llm-d-request-dropped-reason"
ON = ["flowControl=true"]
ONE_EACH = {"type": "concurrency-detector", "parameters": {"maxConcurrency": 1}}
FAIR = {"type": "round-robin-fairness-policy"}


class VirtualQueueing(Queueing):
    """With timers of the test's."""

    timers: Timers

    def _call_at(self, when_s: float, call: Callable[[], None]) -> Cancel:  # type: ignore[override]
        return self.timers.call_at(when_s, call)


class Queued:
    """A picker with flow control, and streams that wait in it."""

    def __init__(self, world: Core, *, priorities: Mapping[str, int] | None = None) -> None:
        self.world = world
        named = priorities or {}
        world.resources.apply([Objective(name, priority=priority) for name, priority in named.items()], [])
        self.timers = VirtualQueueing.timers = Timers(world.clock)
        self.queueing = VirtualQueueing(world.policy, world.datastore, world.director.candidates, world.clock, random.Random(1))
        world.director.stages = self.queueing.stages
        self.queueing.follow(world.director, named.values())
        assert self.queueing.flow is not None
        self.flow = self.queueing.flow

    def ask(self, body: bytes | None = None, **more: Any) -> Stream:
        """A request up to its routing, or its wait."""
        stream = request(self.world, body, **more)
        if stream.session.unprompted:
            self.wait(stream)
        return stream

    def wait(self, stream: Stream) -> None:
        """Play its transport."""

        def resume() -> None:
            stream.resume()

        def notify() -> None:
            self.timers.call_at(self.world.clock.now_s(), resume)

        stream.session.notify = notify

    def run(self, after_s: float = 0.0) -> None:
        """Time passes, and the event loop turns until nothing is due."""
        self.world.clock.advance(after_s)
        while self.timers.run():
            pass

    @property
    def outcomes(self) -> dict[str, int]:
        return {str(outcome): count for (outcome, _, _), count in self.flow.counts.outcomes.items() if count}


def one_each(*plugins: Mapping[str, Any], **block: Any) -> str:
    """A configuration by which each endpoint takes one request at a time; `block`: of flowControl."""
    block.setdefault("saturationDetector", {"pluginRef": "concurrency-detector"})
    return configuration(ONE_EACH, FAIR, {"type": "queue-scorer"}, *plugins, profiles=PROFILES, featureGates=ON, flowControl=block)


def queued(endpoints: int = 1, *plugins: Mapping[str, Any], priorities: Mapping[str, int] | None = None, **block: Any) -> Queued:
    """Each endpoint takes one request at a time."""
    return Queued(core(endpoints, config=one_each(*plugins, **block)), priorities=priorities)


PROFILES = [{"name": "default", "plugins": [{"pluginRef": "queue-scorer"}]}]


def refused(stream: Stream, status: int, reason: str, code: str) -> int:
    """In the client's words, with the reason and when to come back: that."""
    answer = answer_of(stream)
    assert stream.session.answered
    error = json.loads(answer.body)["error"]
    assert (answer.status.code, error["code"]) == (status, code)
    assert error["type"] == ("rate_limit_error" if status == 429 else "service_unavailable_error")
    headers = set_headers(stream.got[-1])
    assert headers.keys() == {"content-type", REASON, "retry-after"}
    assert headers[REASON] == reason.encode()
    retry_after_s = int(headers["retry-after"])
    assert retry_after_s >= 1
    return retry_after_s
