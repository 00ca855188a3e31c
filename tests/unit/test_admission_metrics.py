"""Flow control's metrics as those who watch take them: of now, without two samples of one name, with the reference picker's labels."""

from __future__ import annotations

from epp.admission.families import flow_families
from epp.admission.settings import BandSettings, Settings
from epp.plugins.flow_control.policies import ProgramAwareFairness
from tests.flow_world import World

SATURATION = "llm_d_epp_flow_control_pool_saturation"
ENQUEUE = "llm_d_epp_flow_control_request_enqueue_duration_seconds"
SERVICE = "llm_d_epp_program_aware_attained_service_tokens"


def values(world: World, name: str) -> dict[tuple[str, ...], float]:
    (family,) = [family for family in flow_families(world.flow, world.clock.now_s()) if family.name == name]
    assert len({labels for labels, _ in family.values}) == len(family.values), "no two samples of one name"
    return dict(family.values)


def test_how_full_the_pool_is_is_of_now_and_not_of_the_last_request() -> None:
    world = World(1, each=2)
    world.ask("a")
    world.ask("b")
    assert world.ask("c") is not None
    assert values(world, SATURATION) == {("default", "decode"): 1.0, ("default", "effective"): 1.0}
    world.waits["c"].cancel()
    world.end("a")
    world.end("b")
    assert values(world, SATURATION) == {("default", "decode"): 0.0, ("default", "effective"): 0.0}
    world.pool.endpoints = []
    assert values(world, SATURATION) == {("default", "effective"): 1.0}, "to every detector nobody is a full pool"


def test_it_is_shown_too_where_every_request_has_a_model_or_a_subset_of_its_own() -> None:
    world = World(2, each=1)
    world.ask("a", subset=("pod-1",))
    assert values(world, SATURATION) == {("default", "decode"): 0.5, ("default", "effective"): 0.5}


def test_a_stage_that_is_gone_is_not_shown_any_more() -> None:
    world = World(2, each=1)
    world.all[0].labels, world.all[1].labels = {"llm-d.ai/role": "prefill"}, {"llm-d.ai/role": "decode"}
    world.ask("a")
    assert {stage for _, stage in values(world, SATURATION)} == {"prefill", "decode", "effective"}
    world.pool.endpoints = world.all[1:]
    assert {stage for _, stage in values(world, SATURATION)} == {"decode", "effective"}


def test_requests_of_no_known_pool_do_not_give_a_pool_two_values() -> None:
    world = World(2, each=1)
    world.ask("a")
    world.ask("b", pool="default")
    world.ask("c", pool="another")
    assert {pool for pool, _ in values(world, SATURATION)} == {"default", "another"}


def test_the_time_of_queueing_has_the_reference_picker_s_labels() -> None:
    world = World(2, each=10)
    for name, model in (("a", "m"), ("b", "n"), ("c", "m")):
        world.ask(name, model=model, target_model=model, fairness_id="t")
    (family,) = [family for family in flow_families(world.flow, world.clock.now_s()) if family.name == ENQUEUE]
    assert family.labels == ("fairness_id", "priority", "outcome")
    assert [(labels, cell.count) for labels, cell in family.cells] == [(("t", "0", "Dispatched"), 3)]


def test_service_is_shown_of_the_policy_in_use() -> None:
    def fair(name: str) -> tuple[BandSettings, ...]:
        policy = ProgramAwareFairness()
        policy.named(name)
        return (BandSettings(fairness=policy),)

    world = World(1, each=10, bands=fair("old"))
    world.ask("a", fairness_id="a", prompt_tokens=10)
    world.flow.use(Settings(bands=fair("new")), world.detector)
    world.ask("b", fairness_id="b", prompt_tokens=20)
    assert values(world, SERVICE) == {("b",): 20.0}
    world.flow.use(Settings(), world.detector)
    assert not [family for family in flow_families(world.flow, world.clock.now_s()) if family.name == SERVICE]
