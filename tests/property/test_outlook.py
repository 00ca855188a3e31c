"""What flow control would do with a request: always what it then does, and asking leaves it as it was, to the last counter."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from epp.admission import bands, saturation
from epp.admission.outlook import PASSES, REFUSED, WAITS, Outlook, outlook
from epp.admission.queues import QUEUED, Waiting
from epp.admission.rates import CHARGED
from epp.admission.refusals import DisplacedError
from epp.admission.settings import BandSettings
from epp.arrival import Arrival
from epp.errors import EppError
from epp.extproc.answers import immediate
from epp.plugins.flow_control.policies import (
    GlobalStrictFairnessPolicy,
    PriorityHoldbackPolicy,
    ProgramAwareFairness,
    RoundRobinFairnessPolicy,
    SoftReflectiveCeilingPolicy,
    StaticUsageLimitPolicy,
)
from epp.plugins.flow_control.tenants import ApiKeyIdentity, TokenRateLimit
from epp.types import Endpoint, LLMRequest
from tests.flow_world import World
from tests.picture import picture

EVERYTHING = (
    PASSES, WAITS, "BadRequestError", "NoEndpointsWhileQueuedError", "QueueFullError", "QueueTimeoutError", "RateLimitedError",
    "SaturatedError", "ShuttingDownError", "displaces",
)  # fmt: skip
"""What a request may come to."""


class Foreseen(World):
    """Each request is asked about before it comes."""

    verdicts: Counter[str]

    def foresee(self, fields: dict[str, Any]) -> Outlook:
        request = LLMRequest(id="asked", path="/", headers=fields.get("headers", {}))
        for name, value in fields.items():
            if name not in ("headers", "subset"):
                setattr(request, name, value)
        arrival = Arrival(
            request,
            b"",
            fields.get("subset"),
            self.clock.now_s(),
            understood=(None, ""),
            wake=lambda: self.woken.append("asked"),
            stages=(),
        )
        before = picture(self.flow, self.woken)
        found = outlook(self.flow, arrival)
        assert (picture(self.flow, self.woken) == before) is True, "something changed"
        assert CHARGED not in request.attributes
        again = outlook(self.flow, arrival)
        assert (again.verdict, again.about) == (found.verdict, found.about), "asked twice, the same"
        return found

    def attempt(self, name: str, **fields: Any) -> tuple[Waiting | None, EppError | None]:
        try:
            return self.ask(name, **fields), None
        except EppError as error:
            return None, error

    def check(self, name: str, **fields: Any) -> None:
        told = self.foresee(fields)
        self.verdicts[type(told.error).__name__ if told.error is not None else told.verdict] += 1
        self.verdicts["displaces"] += bool(told.about.get("displaces"))
        displaced = self.displaced()
        wait, error = self.attempt(name, **fields)
        if error is not None:
            assert told.verdict == REFUSED
            assert told.error is not None
            assert (type(told.error), told.error.message, told.error.retry_after_s) == (type(error), error.message, error.retry_after_s)
            assert (told.about["status"], told.about["why"]) == (error.http_status, error.message)
            assert str(told.about["retry_after_s"]) == immediate(error, grpc=False).headers.get("retry-after", "None")
            return
        assert told.error is None
        assert told.about["fairness_id"] == (self.requests[name].fairness_id or "default-flow")
        if wait is None:
            assert told.verdict == PASSES
            return
        assert told.verdict == WAITS
        assert told.about["displaces"] == self.displaced() - displaced
        assert told.about["band"] == wait.band.priority
        ahead = told.about["ahead"]
        assert told.about["queued"] == self.flow.requests - 1 + told.about["displaces"]
        assert ahead["band"] >= wait.backlog.alive - 1
        if not told.about["empty"]:
            assert (told.about["ttl_s"] or 0.0) == wait.ttl_s
            assert ahead["higher_bands"] + ahead["band"] or told.about["saturation"] >= told.about["ceiling"]

    def route(self, name: str, endpoint: Endpoint | None = None) -> None:
        if self.pool.endpoints:
            super().route(name, endpoint)
        else:
            self.flow.routed(self.requests[name], None)

    def displaced(self) -> int:
        return sum(isinstance(wait.error, DisplacedError) for wait in self.waits.values())


FAIRNESS = {"strict": GlobalStrictFairnessPolicy, "turns": RoundRobinFairnessPolicy, "least": ProgramAwareFairness}
LIMITS = {
    "full": StaticUsageLimitPolicy,
    "half": lambda: StaticUsageLimitPolicy(threshold=0.5),
    "holdback": lambda: PriorityHoldbackPolicy(min_ceiling=0.2),
    "soft": SoftReflectiveCeilingPolicy,
}
FIELDS = {
    "fairness_id": ("a", "b", "c"),
    "subset": (("pod-1",), ("pod-2",), ("nobody",), ("pod-1", "pod-2")),
    "headers": (
        *({"x-llm-d-request-ttl": ttl} for ttl in ("0", "3s", "soon")),
        *({"authorization": f"Bearer {key}"} for key in "xyz"),
    ),
    "body_bytes": (10, 100, 300),
    "prompt_tokens": (5, 15, 40),
    "target_model": ("unknown", "adapter"),
}
PRIORITIES = (0, 0, 0, 0, 5, 5, 9, -1, -7, 3, 1)
STEPS = (*["ask"] * 12, *["end"] * 3, "leave", *["run"] * 3, "lost", "pool", "objectives")


def made(dice: random.Random, limit: str, *, safe: bool, limited: bool) -> Foreseen:
    fairness = FAIRNESS[dice.choice(sorted(FAIRNESS))]
    world = Foreseen(
        2,
        each=dice.choice((1, 2, 3)),
        default_band=BandSettings(requests_max=5, flow_requests_max=4, fairness=fairness()),
        bands=(BandSettings(priority=5, requests_max=3, size_bytes_max=400, fairness=fairness()),),
        requests_max=8,
        size_bytes_max=dice.choice((500, 2_000)),
        ttl_s=dice.choice((10.0, 0.0)),
        usage_limit=LIMITS[limit](),
        identities=(ApiKeyIdentity(),),
        token_rate=TokenRateLimit(tokens=60, tenants={"a": 20}) if limited else None,
        waits_for_endpoints=not safe,
        sheds=safe,
    )
    world.pool.serving["adapter"] = ["pod-2"]
    if world.flow.tenants.rates is not None:
        world.flow.tenants.rates._tenants_max = 3
    return world


def play(world: Foreseen, dice: random.Random, steps: int) -> None:
    everybody = list(world.pool.endpoints)
    for number in range(steps):
        step = dice.choice(STEPS)
        if step == "ask":
            fields = {name: dice.choice(values) for name, values in FIELDS.items() if dice.random() < 0.25}
            world.check(f"r{number}", priority=dice.choice(PRIORITIES), **fields)
        elif step == "end" and world.where:
            world.end(dice.choice(sorted(world.where)))
        elif step == "leave" and (waiting := [wait for wait in world.waits.values() if wait.state == QUEUED]):
            dice.choice(waiting).cancel()
        elif step == "run":
            world.run(dice.choice((0.0, 0.0, 0.001, 0.02, 1.0, 6.0, 40.0, 700.0)))
        elif step == "lost":  # let through, and never heard of again
            world.timers.run()
        elif step == "pool":
            world.pool.endpoints[:] = everybody if dice.random() < 0.7 else []
            world.flow.changed()
        elif step == "objectives":
            world.flow.provision(dice.sample((7, 4, 2, -3), 2))
    world.flow.close("drain")
    for number in range(5):
        world.check(f"late-{number}", priority=0)


@pytest.mark.parametrize("limit", LIMITS)
def test_it_does_what_it_said_and_asking_changes_nothing(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bands, "BANDS_MAX", 5)
    monkeypatch.setattr(saturation, "GROUPS_MAX", 3)
    happened: Counter[str] = Counter()
    for seed in range(8):
        dice = random.Random(f"{limit} {seed}")
        world = made(dice, limit, safe=seed % 4 == 0, limited=seed % 2 == 0)
        world.verdicts = happened
        play(world, dice, 100)
    assert set(EVERYTHING) <= set(+happened), "not tried"


class Crude:
    """A detector that says how full the pool is, and no more."""

    level_now = 1.0

    def saturation(self, _endpoints: object) -> float:
        return self.level_now


def test_how_full_it_is_can_be_written_even_where_one_more_request_may_be_too_many() -> None:
    detector = Crude()
    world = Foreseen(1, detector=detector)
    world.ask("sent")
    detector.level_now = 0.5
    world.flow.changed()
    world.timers.run()  # it is let through, and charged to nobody yet
    told = world.foresee({})
    assert (told.verdict, told.about["saturation"], told.about["ceiling"]) == (WAITS, 0.5, 1.0)
