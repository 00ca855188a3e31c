"""What a new configuration, or other objectives, make of flow control's bands and books."""

from __future__ import annotations

from typing import Any

import pytest

from epp.admission.bands import IDLE_MAX_S, SWEEP_S
from epp.admission.ledger import Ledger
from epp.admission.settings import BandSettings, Settings
from epp.plugins.flow_control.policies import EdfOrderingPolicy, PriorityHoldbackPolicy, ProgramAwareFairness
from tests.flow_world import World

# bands


def bands(*priorities: int) -> tuple[BandSettings, ...]:
    return tuple(BandSettings(priority=priority) for priority in priorities)


def go_on(world: World, seconds: float) -> None:
    """Now and then a request of priority 0."""
    for number in range(int(seconds / SWEEP_S) + 1):
        world.clock.advance(SWEEP_S)
        if world.ask(f"{world.clock.now_s()}-{number}") is None:
            world.end(f"{world.clock.now_s()}-{number}")


def test_a_band_that_is_not_configured_any_more_weighs_on_no_ceiling_for_long() -> None:
    policy = PriorityHoldbackPolicy(min_ceiling=0.5)
    world = World(1, each=10, usage_limit=policy, bands=bands(10, 0, -10))
    world.flow.use(Settings(usage_limit=policy, bands=bands(10, 0)), world.detector)
    world.flow.provision([])
    world.all[0].inflight_requests = 6
    assert world.ask("held back by the middle of three") is None
    go_on(world, IDLE_MAX_S)
    assert world.flow.bands.priorities == (10, 0)
    assert world.ask("held back by the lower of two") is not None


def test_a_band_of_an_objective_stays_though_nobody_asks_and_goes_with_it() -> None:
    world = World(1, each=100)
    world.flow.provision([5, -5])
    go_on(world, 3 * IDLE_MAX_S)
    assert world.flow.bands.priorities == (5, 0, -5)
    world.flow.provision([5])
    go_on(world, IDLE_MAX_S)
    assert world.flow.bands.priorities == (5, 0)


def test_a_band_somebody_waits_in_stays() -> None:
    world = World(1, each=1, ttl_s=0.0, no_endpoints_ttl_s=0.0)
    world.ask("running")
    world.ask("r", priority=7)
    go_on(world, 2 * IDLE_MAX_S)
    assert world.flow.bands.priorities == (7, 0)


@pytest.mark.parametrize("template", ["default_band", "default_negative_band"])
def test_what_is_wrong_with_a_template_is_told_before_the_first_request_of_such_a_priority(template: str) -> None:
    settings: dict[str, Any] = {"bands": bands(0), template: BandSettings(fairness=EdfOrderingPolicy())}
    with pytest.raises(ValueError, match="knows no fairness policy of the type edf-ordering-policy"):
        World(**settings)


# what tenants were served


def left(ledger: Ledger, now_s: float) -> dict[str, float]:
    return {name: tokens for name, tokens, _ in ledger.tokens(now_s)}


def test_service_fades_as_the_new_configuration_says_and_none_is_lost() -> None:
    world = World(4, each=4, bands=(BandSettings(fairness=ProgramAwareFairness(las_half_life_seconds=60.0)),))
    start_s = world.clock.now_s()
    world.ask("a", fairness_id="a", prompt_tokens=800)
    world.run(60.0)
    world.ask("b", fairness_id="b", prompt_tokens=800)
    (ledger,) = world.flow.service.of_policies.values()
    assert left(ledger, start_s + 60.0) == pytest.approx({"a": 400.0, "b": 800.0}, rel=0.01)
    world.flow.use(Settings(bands=(BandSettings(fairness=ProgramAwareFairness(las_half_life_seconds=10.0)),)), world.detector)
    assert left(ledger, start_s + 60.0) == pytest.approx({"a": 400.0, "b": 800.0}, rel=0.01)
    assert left(ledger, start_s + 70.0) == pytest.approx({"a": 200.0, "b": 400.0}, rel=0.01)
    world.run(10.0)
    world.ask("c", fairness_id="c", prompt_tokens=400)
    assert ledger.service("c") == pytest.approx(ledger.service("b"), rel=0.01)


def test_the_same_configuration_again_changes_nothing_of_it() -> None:
    ledger = Ledger(60.0, 0.0)
    ledger.add("a", 100, 30.0)
    before = ledger.service("a")
    ledger.fade(60.0, 1.0, idle_max_s=5.0, sweep_s=1.0)
    assert (ledger.service("a"), ledger.rebased) == (before, 0)
    ledger.add("b", 1, 40.0)
    assert list(left(ledger, 40.0)) == ["b"], "what else is new counts"
