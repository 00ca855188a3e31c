"""A configuration in service exchanged for another: what stays, what goes, and what a faulty one changes (nothing)."""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from epp.clock import VirtualClock
from epp.datastore import Datastore
from epp.errors import ConfigError
from epp.plugins.base import Context, Finished, Plugin
from epp.plugins.registry import Registry
from epp.policy import Policy
from epp.prefix.index import SLICE_BLOCKS
from epp.types import Decision, Endpoint, LLMRequest
from tests.builders import PATH, Core, chat, core, spec

HEAD = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"
LONG = "tell me about " + "the sea and " * 200
DEFAULT = """
plugins: [{type: queue-scorer}, {type: kv-cache-utilization-scorer}, {type: prefix-cache-scorer}]
"""


def config(*plugins: str, head: str = HEAD) -> str:
    return f"{head}plugins:\n" + "".join(f"- {{{plugin}}}\n" for plugin in plugins)


def request_of(headers: Mapping[str, str] | None = None) -> LLMRequest:
    return LLMRequest(id="r", path=PATH, headers={":path": PATH, **(headers or {})})


def cached_on(world: Core, prompt: str = LONG) -> set[str]:
    """Who is thought to have some of the prompt."""
    told = world.director.explain(request_of(), chat(prompt), None)
    return {row["name"] for row in told["profiles"][0]["endpoints"] if row["cached_tokens"]}


def send(world: Core, prompt: str = LONG, to: int = 1) -> None:
    """A request to `pod-<to>`, and its answer."""
    world.director.route(request_of(), chat(prompt), (f"10.0.0.{to}",), 0.0).finish(complete=True)


class Listening(Plugin):
    """Tells `heard` of everything; a filter that keeps all."""

    type: ClassVar[str] = "listening"
    per_request: ClassVar[bool] = True
    heard: ClassVar[list[tuple[object, ...]]] = []

    label: str = ""

    def keep(self, _request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[Endpoint]:
        return endpoints

    def bind(self, _context: Context) -> None:
        self.heard.append((self.label, "bind"))

    def added(self, endpoint: Endpoint) -> None:
        self.heard.append((self.label, "added", endpoint.name))

    def removed(self, endpoint: Endpoint) -> None:
        self.heard.append((self.label, "removed", endpoint.name))

    def picked(self, _request: LLMRequest, decision: Decision) -> None:
        self.heard.append((self.label, "picked", decision.endpoint.name))

    def response_headers(self, _request: LLMRequest, _endpoint: Endpoint) -> Mapping[str, str]:
        return {"x-by": self.label}

    def first_token(self, _request: LLMRequest, endpoint: Endpoint, _ttft_s: float) -> None:
        self.heard.append((self.label, "first token", endpoint.name))

    def finished(self, _request: LLMRequest, endpoint: Endpoint, outcome: Finished) -> None:
        self.heard.append((self.label, "finished", endpoint.name, outcome.status))


class Bad(Plugin):
    """Fails wherever it is told to."""

    type: ClassVar[str] = "bad"
    per_request: ClassVar[bool] = True

    at: str = ""

    def keep(self, _request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[Endpoint]:
        return endpoints

    def bind(self, _context: Context) -> None:
        if self.at == "bind":
            raise RuntimeError("a plugin's bug")

    def added(self, _endpoint: Endpoint) -> None:
        if self.at == "added":
            raise RuntimeError("a plugin's bug")

    def removed(self, _endpoint: Endpoint) -> None:
        if self.at == "removed":
            raise RuntimeError("a plugin's bug")


LISTENING, BAD = f"type: '{__name__}:Listening'", f"type: '{__name__}:Bad'"


@pytest.fixture
def heard() -> list[tuple[object, ...]]:
    Listening.heard.clear()
    return Listening.heard


# What stays


def test_plugins_written_the_same_stay_and_others_are_exchanged() -> None:
    world = core(2, config=config("type: queue-scorer", "type: load-aware-scorer", "name: mine, type: no-hit-lru-scorer"))
    before = dict(world.built.plugins)
    world.use(
        config("type: load-aware-scorer, parameters: {threshold: 7}", "name: mine, type: no-hit-lru-scorer", "type: lora-affinity-scorer")
    )
    now = world.built.plugins
    assert now["mine"] is before["mine"]
    assert now["approx-prefix-cache-producer"] is before["approx-prefix-cache-producer"], "not written, and needed by both"
    assert now["load-aware-scorer"] is not before["load-aware-scorer"]
    assert "queue-scorer" not in now
    assert "lora-affinity-scorer" in now


def test_a_name_given_to_another_type_is_another_plugin() -> None:
    world = core(1, config=config("name: mine, type: queue-scorer"))
    world.use(config("name: mine, type: load-aware-scorer"))
    assert world.built.plugins["mine"].type == "load-aware-scorer"


def test_what_an_index_has_learned_outlives_every_exchange_that_keeps_it() -> None:
    world = core(3, config=HEAD + DEFAULT)
    send(world, to=2)
    assert cached_on(world) == {"pod-2"}
    for weight in (1, 5):
        profile = f"schedulingProfiles: [{{name: p{weight}, plugins: [{{pluginRef: prefix-cache-scorer, weight: {weight}}}]}}]"
        world.use(config("type: prefix-cache-scorer", "type: random-picker") + profile)
        assert cached_on(world) == {"pod-2"}
    world.use(HEAD + DEFAULT)
    assert cached_on(world) == {"pod-2"}


def test_an_index_that_is_written_otherwise_begins_anew() -> None:
    world = core(2, config=HEAD + DEFAULT)
    send(world, to=2)
    world.use(config("type: prefix-cache-scorer", "type: approx-prefix-cache-producer, parameters: {lruCapacityPerServer: 100}"))
    assert cached_on(world) == set()
    send(world, to=1)
    assert cached_on(world) == {"pod-1"}


def test_session_tokens_stay_valid() -> None:
    affinity = "type: session-affinity-scorer"
    world = core(3, config=config(affinity))
    exchange = world.director.route(request_of(), chat(), ("10.0.0.3",), 0.0)
    token = exchange.added_headers()["x-session-token"]
    world.use(config(affinity, "type: queue-scorer"))
    again = world.director.route(request_of({"x-session-token": token}), chat(), None, 0.0)
    assert again.decision.endpoint.name == "pod-3"


def test_a_stage_handler_is_made_anew_with_the_deciders_of_its_configuration() -> None:
    handler = "type: disagg-profile-handler, parameters: {deciders: {prefill: decider}}"
    profiles = "schedulingProfiles: [{name: decode, plugins: [{pluginRef: decode-filter}]}, {name: prefill}]"
    filters = ("type: decode-filter",)
    world = core(2, config=config(handler, *filters, "name: decider, type: always-disagg-pd-decider") + profiles)
    assert world.director.route(request_of(), chat(LONG), None, 0.0).decision.targets
    world.use(config(handler, *filters, "name: decider, type: prefix-based-pd-decider") + profiles)
    assert not world.director.route(request_of(), chat(LONG), None, 0.0).decision.targets, "nonCachedTokens 0: never"


def test_a_plugin_that_looked_at_another_is_made_anew_with_it() -> None:
    labels = ({"node": "n1", "machine": "m1"}, {"node": "n1", "machine": "m2"}, {"node": "n2", "machine": "m1"})
    world = core([spec(number)._replace(labels=each) for number, each in enumerate(labels, 1)])
    for label, neighbour in (("node", "pod-2"), ("machine", "pod-3")):
        world.use(config("type: topology-affinity-filter", f"type: topology-extractor, parameters: {{hostname: {label}}}"))
        request = request_of()
        request.attributes["peer-endpoint"] = world.endpoint(1)
        near = world.built.plugins["topology-affinity-filter"].keep(request, world.datastore.ready.endpoints)  # type: ignore[attr-defined]
        assert [e.name for e in near] == ["pod-1", neighbour]


def test_what_a_kept_plugin_names_must_still_be_there() -> None:
    scorer = "type: prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: mine}"
    world = core(1, config=config(scorer, "name: mine, type: approx-prefix-cache-producer"))
    with pytest.raises(ConfigError, match="no plugin is named 'mine'"):
        world.use(config(scorer, "name: yours, type: approx-prefix-cache-producer"))


# Faults


@pytest.mark.parametrize(
    "faulty",
    [
        "plugins: [",
        config("type: queue-scorr"),
        config("type: queue-scorer, parameters: {a: 1}"),
        config("type: prefix-cache-scorer, parameters: {prefixMatchInfoProducerName: nobody}"),
        config("type: disagg-profile-handler") + "schedulingProfiles: [{name: prefill}]",
        config(f"{BAD}, parameters: {{at: bind}}"),
        config("type: 'no.such.module:Class'"),
        "x" * (2 << 20),
    ],
)
def test_a_faulty_configuration_changes_nothing(faulty: str, heard: list[tuple[object, ...]]) -> None:
    world = core(2, config=config("type: prefix-cache-scorer", LISTENING))
    send(world, to=2)
    before, routes, told = world.built, world.policy.routes, list(heard)
    with pytest.raises(ConfigError):
        world.use(faulty)
    assert (world.built, world.policy.routes, heard) == (before, routes, told)
    assert cached_on(world) == {"pod-2"}
    send(world)
    world.datastore.apply([spec(1)])
    assert heard[len(told) :][-1] == ("", "removed", "pod-2")


def test_every_fault_is_told() -> None:
    world = core(1)
    with pytest.raises(ConfigError) as raised:
        world.use(config("type: queue-scorr", "type: kv-cache-utilization-scorer, parameters: {a: 1}"))
    assert [problem.path for problem in raised.value.problems] == ["plugins[0].type", "plugins[1].parameters.a"]


def test_a_plugin_that_fails_while_it_is_made_is_a_fault(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="RuntimeError: a plugin's bug"):
        core(1, config=config(f"{BAD}, parameters: {{at: bind}}"))
    world = core(1)
    with pytest.raises(ConfigError, match="RuntimeError: a plugin's bug"):
        world.use(config(f"{BAD}, parameters: {{at: bind}}"))
    assert "a plugin can't be made" in caplog.text


@pytest.mark.parametrize("at", ["added", "removed"])
def test_a_hook_that_fails_keeps_no_endpoint_from_coming_and_going(at: str, caplog: pytest.LogCaptureFixture) -> None:
    world = core(2)
    world.use(config(f"{BAD}, parameters: {{at: {at}}}", "type: prefix-cache-scorer"))
    world.datastore.apply([spec(2), spec(3)])
    world.policy.tick()
    assert [e.name for e in world.datastore.ready.endpoints] == ["pod-2", "pod-3"]
    send(world, to=3)
    assert "a plugin's hook failed" in caplog.text


# Requests under way, and hooks


def test_requests_under_way_end_with_the_plugins_they_began_with(heard: list[tuple[object, ...]]) -> None:
    world = core(1, config=config(f"name: a, {LISTENING}, parameters: {{label: a}}", "type: prefix-cache-scorer"))
    old = world.director.route(request_of(), chat(LONG), None, 0.0)
    world.use(config(f"name: b, {LISTENING}, parameters: {{label: b}}"))
    new = world.director.route(request_of(), chat(LONG), None, 0.0)
    heard.clear()
    for exchange, by in ((old, "a"), (new, "b")):
        exchange.response_headers(200, event_stream=False, served="", code_details="")
        assert exchange.added_headers() == {"x-by": by}
        exchange.response_chunk(b"{}")
        exchange.finish(complete=True)
        assert heard == [(by, "first token", "pod-1"), (by, "finished", "pod-1", 200)]
        heard.clear()
    assert world.inflight == (0, 0, 0, 0)


def test_who_is_told_of_endpoints(heard: list[tuple[object, ...]]) -> None:
    a, b = (f"name: {name}, {LISTENING}, parameters: {{label: {name}}}" for name in "ab")
    world = core(2, config=config(a))
    assert heard == [("a", "bind"), ("a", "added", "pod-1"), ("a", "added", "pod-2")]
    heard.clear()
    world.use(config(a, b))
    assert heard == [("b", "bind"), ("b", "added", "pod-1"), ("b", "added", "pod-2")], "a knows them"
    heard.clear()
    world.datastore.apply([spec(2), spec(3)])
    assert Counter(heard) == Counter((x, *what) for x in "ab" for what in (("removed", "pod-1"), ("added", "pod-3")))
    heard.clear()
    world.use(config(b))
    world.datastore.apply([spec(2)])
    assert heard == [("b", "removed", "pod-3")], "a is out of service"


def test_the_next_request_is_decided_by_the_new_configuration() -> None:
    world = core(2, config=config("type: queue-scorer"))
    world.read(1, waiting=0.0, kv_usage=0.9)
    world.read(2, waiting=9.0, kv_usage=0.1)
    assert world.director.route(request_of(), chat(), None, 0.0).decision.endpoint.name == "pod-1"
    world.use(config("type: kv-cache-utilization-scorer"))
    assert world.director.route(request_of(), chat(), None, 0.0).decision.endpoint.name == "pod-2"


def test_parsers_are_exchanged_too() -> None:
    world = core(1)
    assert world.director.needs_body(PATH, {})
    world.use(config("type: passthrough-parser") + "requestHandler: {parsers: [{pluginRef: passthrough-parser}]}")
    assert not world.director.needs_body(PATH, {})
    world.use("")
    assert world.director.needs_body(PATH, {})


def test_whoever_wants_to_know_is_told_after_every_exchange() -> None:
    clock = VirtualClock()
    seen: list[set[str]] = []
    policy: Policy = Policy(Datastore(clock), Registry(), clock, random.Random(1), changed=lambda: seen.append(set(policy.built.plugins)))
    policy.apply(config("type: queue-scorer"), "test")
    with pytest.raises(ConfigError):
        policy.apply("plugins: 3", "test")
    policy.apply(config("type: load-aware-scorer"), "test")
    assert ["queue-scorer" in each for each in seen] == [True, False]


def test_fallbacks_are_named_where_the_configuration_names_no_picker() -> None:
    clock = VirtualClock()
    policy = Policy(Datastore(clock), Registry(), clock, random.Random(1), fallbacks=2)

    def pickers() -> dict[str, object]:
        found = [plugin for plugin in policy.built.plugins.values() if plugin.type.endswith("-picker")]
        return {plugin.type: getattr(plugin, "max_num_of_endpoints", None) for plugin in found}

    policy.apply("", "test")
    assert pickers() == {"max-score-picker": 3}
    policy.apply(config("type: random-picker"), "test")
    assert pickers() == {"random-picker": 1}


# Slots


def slot_of(world: Core, number: int) -> int:
    return world.endpoint(number).slot


def tick_until(world: Core, ticks: int) -> None:
    for _ in range(ticks):
        world.policy.tick()


def fill(world: Core, blocks: int, to: int) -> None:
    """So many blocks of prompts nobody else has."""
    index = next(iter(world.policy.built.indexes.values()))
    hashes = list(range(to << 40, (to << 40) + blocks))
    index.record(slot_of(world, to), hashes, range(64, 64 * blocks + 64, 64))


def test_a_slot_is_free_again_once_every_index_forgot() -> None:
    both = config("type: prefix-cache-scorer", "name: a, type: approx-prefix-cache-producer", "name: b, type: approx-prefix-cache-producer")
    world = core(2, config=both)
    send(world, to=1)
    gone = slot_of(world, 1)
    world.datastore.apply([spec(2), spec(3)])
    assert slot_of(world, 3) != gone, "not yet"
    world.policy.tick()
    world.datastore.apply([spec(2), spec(3), spec(4)])
    assert slot_of(world, 4) == gone
    assert cached_on(world) == set()


def test_a_slot_is_free_at_once_where_nothing_is_remembered() -> None:
    world = core(2, config=config("type: queue-scorer"))
    gone = slot_of(world, 1)
    world.datastore.apply([spec(2)])
    world.datastore.apply([spec(2), spec(3)])
    assert slot_of(world, 3) == gone


def test_a_large_memory_is_forgotten_slice_by_slice() -> None:
    world = core(2)
    fill(world, 3 * SLICE_BLOCKS, to=1)
    gone = slot_of(world, 1)
    world.datastore.apply([spec(2)])
    tick_until(world, 2)
    world.datastore.apply([spec(2), spec(3)])
    assert slot_of(world, 3) != gone
    tick_until(world, 2)
    world.datastore.apply([spec(2), spec(3), spec(4)])
    assert slot_of(world, 4) == gone


@pytest.mark.parametrize("blocks", [0, 1, SLICE_BLOCKS, 3 * SLICE_BLOCKS])
def test_an_index_that_left_service_still_gives_slots_back(blocks: int) -> None:
    world = core(2)
    index = next(iter(world.policy.built.indexes.values()))
    index.set_capacity_tokens(slot_of(world, 1), 1_000_000)
    if blocks:
        fill(world, blocks, to=1)
    gone = slot_of(world, 1)
    world.datastore.apply([spec(2)])
    world.use(config("type: queue-scorer"))
    tick_until(world, 5)
    world.datastore.apply([spec(2), spec(3)])
    assert slot_of(world, 3) == gone
    assert not world.policy._leaving, "and is let go of"


def test_an_index_that_left_service_and_came_back_has_nothing_of_the_old_owner_of_a_slot() -> None:
    world = core(2)
    send(world, to=1)
    world.use(config("type: queue-scorer"))
    world.datastore.apply([spec(2)])
    world.datastore.apply([spec(2), spec(3)])
    world.use("")
    assert slot_of(world, 3) == 0, "nobody had to forget anything"
    assert cached_on(world) == set()


def test_an_engine_that_was_started_anew_has_nothing_cached() -> None:
    world = core(2)
    send(world, to=1)
    world.policy.restarted(world.endpoint(1))
    assert cached_on(world) == set()
    tick_until(world, 1)
    send(world, to=1)
    assert cached_on(world) == {"pod-1"}


# Warnings


def test_a_warning_is_logged_once(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    old = config(
        "type: by-label, parameters: {label: a, allowsNoLabel: true}", head=HEAD.replace("llm-d.ai", "inference.networking.x-k8s.io")
    )
    with caplog.at_level(logging.WARNING, "epp.policy"):
        world = core(1, config=old)
        for number in range(3):
            world.use(old + f"# {number}\n")
        assert [record.message.partition(" is deprecated")[0] for record in caplog.records] == [
            "apiVersion: inference.networking.x-k8s.io/v1alpha1",
            "plugins[0].type: by-label",
        ]
        world.use(old + "- {type: tokenizer}\n")
        assert [record.message for record in caplog.records][2:] == ["plugins[1].type: tokenizer is deprecated; write token-producer"]


def test_json_is_a_configuration_too() -> None:
    world = core(1)
    document = {"apiVersion": "llm-d.ai/v1alpha1", "kind": "EndpointPickerConfig", "plugins": [{"type": "load-aware-scorer"}]}
    world.use(json.dumps(document))
    assert "load-aware-scorer" in world.built.plugins
