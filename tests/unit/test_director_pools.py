"""Requests of several pools through one director: candidates, subsets, models, priorities and rewrites are the pool's own."""

from __future__ import annotations

import json
import random

import pytest

from epp.engines.models import ModelsView
from epp.errors import EppError, ModelNotFoundError, NoEndpointsError
from epp.exchange import Exchange
from epp.pools import Pool, Pools
from epp.resources import Choice, Objective, Resources, Rewrite, Rule
from epp.types import LLMRequest
from tests.builders import PATH, Core, Stream, chat, core, request_body, request_headers, spec


def pool(name: str, *, model: str = "", target: str = "", objective: str = "", priority: int = 0) -> Pool:
    resources = Resources(random.Random(1), pool_name=name)
    rewrites = [Rewrite("r", rules=(Rule((model,), (Choice(target),)),), pool_name=name)] if model else []
    resources.apply([Objective(objective, priority=priority, pool_name=name)] if objective else [], rewrites)
    return Pool(name, resources)


def world(*pools: Pool, shared: bool = False) -> Core:
    """pod-1 and pod-2 in the first pool, pod-3 and pod-4 in the second; `shared`: pod-2 in both."""
    made = Pools(pools or [pool("a"), pool("b")])
    first, second = (each.name for each in made)
    of = {1: (first,), 2: (first, second) if shared else (first,), 3: (second,), 4: (second,)}
    return core([spec(number)._replace(pools=names) for number, names in of.items()], pools=made)


def route(
    there: Core, pool_name: str = "", *, body: bytes | None = None, subset: tuple[str, ...] | None = None, **headers: str
) -> Exchange:
    request = LLMRequest(id="r", path=PATH, headers={name.replace("_", "-"): value for name, value in headers.items()})
    request.pool = pool_name
    return there.director.route(request, chat() if body is None else body, subset, there.clock.now_s())


def chosen(there: Core, pool_name: str = "", *, times: int = 24, subset: tuple[str, ...] | None = None) -> set[str]:
    names = set()
    for number in range(times):
        exchange = route(there, pool_name, body=chat(f"prompt {number} " * 9), subset=subset)
        names.add(exchange.decision.endpoint.name)
        exchange.finish(complete=True)
    return names


def test_a_pool_s_requests_go_to_its_endpoints_only() -> None:
    there = world()
    assert chosen(there, "a") == {"pod-1", "pod-2"}
    assert chosen(there, "b") == {"pod-3", "pod-4"}


def test_where_the_pool_is_not_known_all_endpoints_are_candidates() -> None:
    assert chosen(world(), times=60) == {"pod-1", "pod-2", "pod-3", "pod-4"}


def test_an_endpoint_may_be_in_two_pools() -> None:
    there = world(shared=True)
    assert chosen(there, "a") == {"pod-1", "pod-2"}
    assert chosen(there, "b") == {"pod-2", "pod-3", "pod-4"}


def test_a_pool_whose_endpoints_all_fail_is_used_all_the_same() -> None:
    there = world()
    for number in (1, 2):
        there.datastore.set_healthy(there.endpoint(number), healthy=False)
    assert chosen(there, "a") == {"pod-1", "pod-2"}
    assert chosen(there, "b") == {"pod-3", "pod-4"}


def test_an_empty_pool_is_a_503_of_that_pool_alone() -> None:
    there = core([spec(1)._replace(pools=("a",))], pools=Pools([pool("a"), pool("b")]))
    with pytest.raises(NoEndpointsError, match="no endpoint is ready in the pool b"):
        route(there, "b")
    assert chosen(there, "a") == {"pod-1"}


def test_the_gateway_s_subset_is_looked_for_within_the_pool() -> None:
    there = world()
    both = ("10.0.0.2:8000", "10.0.0.3:8000")
    assert chosen(there, "a", subset=both) == {"pod-2"}
    assert chosen(there, "b", subset=both) == {"pod-3"}
    assert chosen(there, subset=both) == {"pod-2", "pod-3"}
    with pytest.raises(NoEndpointsError, match="subset"):
        route(there, "a", subset=("10.0.0.4:8000",))


def served(there: Core, **models: set[str] | None) -> None:
    view = ModelsView()
    for endpoint in there.datastore.endpoints.values():
        names = models[endpoint.name.replace("-", "_")]
        view.record(endpoint, None if names is None else frozenset(names))
    there.director.candidates.models = view


def test_engines_that_say_their_models_tell_the_pool() -> None:
    there = world()
    served(there, pod_1={"llama"}, pod_2={"llama"}, pod_3={"qwen"}, pod_4={"qwen"})
    for model, names in (("llama", {"pod-1", "pod-2"}), ("qwen", {"pod-3", "pod-4"})) * 2:
        assert {route(there, body=chat(model=model)).decision.endpoint.name for _ in range(20)} <= names


def test_another_pool_s_model_is_not_this_one_s() -> None:
    there = world()
    served(there, pod_1={"llama"}, pod_2={"llama"}, pod_3={"qwen"}, pod_4={"qwen"})
    with pytest.raises(ModelNotFoundError, match="no endpoint of the pool a serves it"):
        route(there, "a", body=chat(model="qwen"))
    there.datastore.set_ejected(there.endpoint(1), ejected=True)
    served(there, pod_1={"llama", "lora"}, pod_2={"llama"}, pod_3={"qwen"}, pod_4={"qwen"})
    with pytest.raises(NoEndpointsError, match="ready"):  # it exists, its endpoint is out
        route(there, "a", body=chat(model="lora"))


def test_what_serves_a_model_is_forgotten_when_the_pool_changes() -> None:
    there = world()
    served(there, pod_1={"llama"}, pod_2={"llama"}, pod_3={"qwen"}, pod_4={"qwen"})
    assert {route(there, "a", body=chat(model="llama")).decision.endpoint.name for _ in range(20)} == {"pod-1", "pod-2"}
    there.datastore.set_draining(there.endpoint(1), draining=True)
    assert {route(there, "a", body=chat(model="llama")).decision.endpoint.name for _ in range(20)} == {"pod-2"}


def test_a_rewrite_tells_the_pool_and_is_the_pool_s_own() -> None:
    there = world(pool("a", model="chat", target="llama-3"), pool("b", model="code", target="qwen-2"))
    exchange = route(there, body=chat(model="code"))
    assert json.loads(exchange.body or b"")["model"] == "qwen-2"
    assert exchange.decision.endpoint.name in {"pod-3", "pod-4"}
    untouched = route(there, "a", body=chat(model="code"))
    assert untouched.body is None
    assert untouched.decision.endpoint.name in {"pod-1", "pod-2"}


def test_priorities_are_the_pool_s() -> None:
    there = world(pool("a", objective="batch", priority=5), pool("b", objective="batch", priority=7))
    for name, priority in (("a", 5), ("b", 7)):
        assert route(there, name, x_llm_d_inference_objective="batch").request.priority == priority


def test_a_pool_that_its_rewrite_tells_has_its_own_priorities() -> None:
    first, second = pool("a", objective="batch", priority=5), pool("b", model="code", target="qwen-2")
    exchange = route(world(first, second), body=chat(model="code"), x_llm_d_inference_objective="batch")
    assert exchange.request.pool == "b"
    assert exchange.request.priority == 0


def test_a_stream_carries_its_pool_through_the_session() -> None:
    there = world()
    stream = Stream(there.session(pool="b"))
    stream.send(request_headers(), request_body(chat(), end_of_stream=True))
    assert sum(there.endpoint(number).picks_total for number in (3, 4)) == 1


def test_each_pool_has_its_own_gauges() -> None:
    there = world(shared=True)
    there.datastore.set_ejected(there.endpoint(1), ejected=True)
    text = there.metrics.exposition()[0].decode()
    assert 'llm_d_epp_ready_endpoints{name="a"} 1\n' in text
    assert 'llm_d_epp_ready_endpoints{name="b"} 3\n' in text
    assert text.count('llm_d_epp_inflight_requests{endpoint_name="pod-2"') == 1


def test_a_refusal_is_counted_without_a_pool_too() -> None:
    with pytest.raises(EppError):
        route(world(), "a", body=b"{")
