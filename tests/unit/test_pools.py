"""Several pools behind one picker: which one a request is for, and what follows from it."""

import random

import pytest

from epp.pools import AUTHORITIES_MAX, Pool, Pools
from epp.resources import Choice, Objective, Resources, Rewrite, Rule


def pool(name: str, service: str = "", *, models: dict[str, str] | None = None, priorities: dict[str, int] | None = None) -> Pool:
    resources = Resources(random.Random(1), pool_name=name)
    rules = [Rule((model,) if model else (), (Choice(target),)) for model, target in (models or {}).items()]
    objectives = [Objective(objective, priority=priority, pool_name=name) for objective, priority in (priorities or {}).items()]
    resources.apply(objectives, [Rewrite(f"{name}-rewrite", rules=tuple(rules), pool_name=name)] if rules else [])
    made = Pool(name, resources)
    made.service, made.exists, made.synced = service, True, True
    return made


@pytest.mark.parametrize(
    ("authority", "name"),
    [
        ("llama-epp:9002", "llama"),
        ("llama-epp.prod.svc.cluster.local:9002", "llama"),
        ("outbound|9002||qwen-epp.prod.svc.cluster.local", "qwen"),
        ("QWEN-EPP.prod:9002", "qwen"),
        ("envoy_qwen_cluster", "qwen"),  # by the pool's own name
        ("inferencepool/prod/llama/ext_proc", "llama"),
        ("llama-epp-2.prod:9002", ""),  # another Service whose name begins alike
        ("epp:9002", ""),
        ("", ""),
    ],
)
def test_the_stream_s_authority_names_the_pool_s_service(authority: str, name: str) -> None:
    assert Pools([pool("llama", "llama-epp"), pool("qwen", "qwen-epp")]).of(authority) == name


@pytest.mark.parametrize("authority", ["", "[::1]:9002", "10.0.0.1:9002", "::"])
def test_an_authority_without_a_name_is_not_the_pool_without_a_service(authority: str) -> None:
    assert Pools([pool("llama", "llama-epp"), pool("qwen", "")]).of(authority) == ""


def test_pools_that_share_a_service_are_not_told_apart_by_it() -> None:
    assert Pools([pool("llama", "epp"), pool("qwen", "epp")]).of("epp.prod:9002") == ""


def test_an_authority_that_names_two_pools_tells_nothing() -> None:
    assert Pools([pool("llama", "a"), pool("qwen", "b")]).of("a.b:9002") == ""


def test_a_single_pool_needs_no_telling() -> None:
    pools = Pools([pool("llama", "llama-epp")])
    assert not pools.several
    assert pools.of("llama-epp:9002") == ""


def test_a_service_that_changes_is_noticed() -> None:
    llama, qwen = pool("llama", "a"), pool("qwen", "b")
    pools = Pools([llama, qwen])
    assert pools.of("a:9002") == "llama"
    llama.service, qwen.service = "c", "a"
    assert pools.of("a:9002") == "qwen"


def test_authorities_are_remembered_up_to_a_limit() -> None:
    pools = Pools([pool("llama", "llama-epp"), pool("qwen", "qwen-epp")])
    for number in range(3 * AUTHORITIES_MAX):
        assert pools.of(f"llama-epp.ns-{number}") == "llama"
    assert len(pools._told) <= AUTHORITIES_MAX


def test_a_model_that_one_pool_s_rewrites_are_for_tells_the_pool() -> None:
    pools = Pools([pool("llama", models={"chat": "llama-3", "both": "x"}), pool("qwen", models={"code": "qwen-2", "both": "y"})])
    assert [pools.of_model(model) for model in ("chat", "code", "both", "other")] == ["llama", "qwen", "", ""]
    target = pools.target("llama", "both")
    assert target is not None
    assert target.model == "x"
    assert pools.target("", "both") is None


def test_a_rule_for_every_model_does_not_take_other_pools_requests() -> None:
    pools = Pools([pool("llama", models={"": "llama-3"}), pool("qwen", models={"code": "qwen-2"})])
    assert pools.of_model("anything") == ""
    assert pools.target("", "anything") is None
    target = pools.target("llama", "anything")
    assert target is not None
    assert target.model == "llama-3"


def test_priorities_are_the_pool_s_or_the_first_that_knows_the_name() -> None:
    pools = Pools([pool("llama", priorities={"high": 5}), pool("qwen", priorities={"high": 9, "low": -1})])
    assert [pools.priority(name, "high") for name in ("llama", "qwen", "")] == [5, 9, 5]
    assert [pools.priority(name, "low") for name in ("llama", "qwen", "")] == [0, -1, -1]
    assert pools.priority("", "none") == 0


def test_live_is_every_pool_looked_for_and_one_there() -> None:
    llama, qwen = pool("llama"), pool("qwen")
    pools = Pools([llama, qwen])
    assert pools.live
    qwen.exists = False
    assert pools.live
    qwen.synced = False
    assert not pools.live
    qwen.synced, llama.exists = True, False
    assert not pools.live
