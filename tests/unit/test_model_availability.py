"""A model nobody has is a 404, and no request goes to an endpoint that lacks its model."""

from __future__ import annotations

import pytest

from epp.director import Exchange
from epp.engines.models import ModelsView
from epp.errors import ModelNotFoundError, NoEndpointsError
from epp.types import LLMRequest
from tests.builders import PATH, Core, chat, core


def route(world: Core, model: str) -> Exchange:
    return world.director.route(LLMRequest(id="r", path=PATH, headers={}), chat(model=model), None, 0.0)


def served(world: Core, *models: set[str] | None) -> ModelsView:
    """The view, `pod-1` serving the first set and so on; None: it does not say."""
    view = ModelsView()
    for number, names in enumerate(models, 1):
        view.record(world.endpoint(number), None if names is None else frozenset(names))
    world.director.candidates.models = view
    return view


def test_a_model_nobody_serves_is_a_404_and_may_have_been_loaded_since() -> None:
    world = core(2)
    served(world, {"a"}, {"a", "lora"})
    missed: list[str] = []
    world.director._model_missed = lambda: missed.append("asked again")
    with pytest.raises(ModelNotFoundError, match="'b' does not exist"):
        route(world, "b")
    assert missed == ["asked again"]
    assert world.errors("b") == {"NotFound": 1}
    assert world.inflight == (0, 0, 0, 0)


def test_who_lacks_the_model_is_never_picked() -> None:
    world = core(3)
    served(world, {"a"}, {"a", "lora"}, {"a"})
    assert {route(world, "lora").decision.endpoint.name for _ in range(10)} == {"pod-2"}
    assert len({route(world, "a").decision.endpoint.name for _ in range(60)}) == 3


def test_one_that_does_not_say_may_serve_anything() -> None:
    world = core(2)
    served(world, {"a"}, None)
    assert {route(world, "b").decision.endpoint.name for _ in range(10)} == {"pod-2"} or world.inflight[0] == 10


def test_adapters_loaded_later_and_endpoints_failing_take_effect_at_once() -> None:
    world = core(2)
    view = served(world, {"a"}, {"a", "lora"})
    assert route(world, "lora").decision.endpoint.name == "pod-2"
    view.record(world.endpoint(1), frozenset({"a", "lora"}))
    assert {route(world, "lora").decision.endpoint.name for _ in range(40)} == {"pod-1", "pod-2"}
    view.record(world.endpoint(2), frozenset({"a"}))
    world.datastore.set_healthy(world.endpoint(1), healthy=False)
    with pytest.raises(NoEndpointsError, match="no endpoint that serves the model 'lora' is ready"):
        route(world, "lora")


def test_a_request_without_a_model_goes_anywhere() -> None:
    world = core(2)
    served(world, {"a"}, {"a"})
    request = LLMRequest(id="r", path="/v1/models", headers={})
    assert world.director.route(request, None, None, 0.0).decision.endpoint.name in {"pod-1", "pod-2"}
