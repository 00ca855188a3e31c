"""Tenants: whose a request is, how many tokens each may have, and who gives way when the queue is full."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
import pytest

from epp.admission.families import flow_families
from epp.admission.rates import OTHERS, Rates
from epp.admission.refusals import DisplacedError, QueueFullError, RateLimitedError
from epp.admission.settings import BandSettings, settings_of
from epp.admission.tenants import FAIRNESS_CHARS_MAX
from epp.config import schema
from epp.errors import EppError
from epp.observe import text
from epp.plugins.base import Finished
from epp.plugins.flow_control.policies import GlobalStrictFairnessPolicy, ProgramAwareFairness, RoundRobinFairnessPolicy
from epp.plugins.flow_control.tenants import ApiKeyIdentity, TokenRateLimit
from epp.types import LLMRequest, Usage
from tests.flow_world import World

KEY = "sk-0123456789abcdef"


def with_headers(**headers: str) -> LLMRequest:
    return LLMRequest(id="r", path="/", headers={name.replace("_", "-"): value for name, value in headers.items()})


# whose a request is


def test_a_key_becomes_a_keyed_hash_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENANT_HASH_KEY", "a secret")
    one, two = (msgspec.convert({"hashKeyEnv": "TENANT_HASH_KEY"}, ApiKeyIdentity) for _ in range(2))
    found = one.identify(with_headers(authorization=f"Bearer {KEY}"))
    assert found.startswith("key-")
    assert len(found) == 20
    assert KEY not in found
    assert two.identify(with_headers(authorization=f"bearer  {KEY} ")) == found, "other replicas say the same"
    assert one.identify(with_headers(x_api_key=KEY)) == found
    assert one.identify(with_headers(authorization="Bearer another")) != found
    monkeypatch.setenv("TENANT_HASH_KEY", "x" * 100)
    assert ApiKeyIdentity(hash_key_env="TENANT_HASH_KEY").identify(with_headers(x_api_key=KEY)) != found
    assert ApiKeyIdentity().identify(with_headers(x_api_key=KEY)) != ApiKeyIdentity().identify(with_headers(x_api_key=KEY))


def test_without_a_key_there_is_no_id() -> None:
    made = ApiKeyIdentity(headers=("X-Key",))
    assert [made.identify(with_headers(**headers)) for headers in ({}, {"authorization": KEY}, {"x_key": "Bearer "})] == ["", "", ""]
    assert made.identify(with_headers(x_key="\udc80\U0001f511")).startswith("key-"), "whatever is a header's value"


def test_a_secret_that_is_not_there_is_a_fault_of_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(msgspec.ValidationError, match="NO_SUCH_KEY is not set"):
        msgspec.convert({"hashKeyEnv": "NO_SUCH_KEY"}, ApiKeyIdentity)
    with pytest.raises(msgspec.ValidationError, match="name at least one"):
        msgspec.convert({"headers": []}, ApiKeyIdentity)


def asked(world: World, name: str = "r", **fields: Any) -> str:
    """The fairness id the request waits under."""
    world.ask(name, **fields)
    return world.requests[name].fairness_id


class BySession:
    """A third party's identity plugin."""

    def identify(self, request: LLMRequest) -> str:
        return request.headers.get("session-id", "")


def test_the_client_s_id_comes_first_unless_a_plugin_overrides_it() -> None:
    by_key, agent = ApiKeyIdentity(), BySession()
    headers = {"authorization": f"Bearer {KEY}", "session-id": "s1"}
    hashed = by_key.identify(with_headers(**headers))
    first = World(identities=(agent, by_key))
    assert asked(first, headers=headers) == "s1"
    assert asked(first, "named", headers=headers, fairness_id="gateway") == "gateway"
    assert asked(first, "none") == ""
    assert asked(World(identities=(by_key, agent)), headers=headers) == hashed
    override = ApiKeyIdentity(override=True)
    world = World(identities=(agent, override))
    assert asked(world, headers=headers, fairness_id="forged") == override.identify(with_headers(**headers))
    assert asked(world, "without", headers={"session-id": "s1"}, fairness_id="named") == "named"


def test_requests_wait_in_the_flow_of_their_key() -> None:
    by_key = ApiKeyIdentity()
    world = World(1, each=1, identities=(by_key,), bands=(BandSettings(fairness=RoundRobinFairnessPolicy()),))
    world.ask("running")
    for name, key in (("a1", "a"), ("a2", "a"), ("b1", "b")):
        world.ask(name, headers={"x-api-key": key})
    assert len(world.flow.bands.all[0].flows) == 2
    world.end("running")
    assert world.run() == ["a1"]
    world.end("a1")
    assert world.run() == ["b1"], "keys take turns"
    shown = "".join(text.plain(family) for family in flow_families(world.flow, world.clock.now_s()))
    assert by_key.identify(with_headers(x_api_key="a")) in shown
    assert "x-api-key" not in shown


class Broken:
    def identify(self, request: LLMRequest) -> str:
        raise RuntimeError(request.id)


class Long:
    def identify(self, _request: LLMRequest) -> str:
        return "x" * 1_000


def test_a_plugin_that_fails_refuses_nobody(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        assert asked(World(identities=(Broken(), Long()))) == "x" * FAIRNESS_CHARS_MAX
    assert [record.name for record in caplog.records] == ["epp.flow_control"]


def test_plugins_of_a_configuration_are_found() -> None:
    by_key, limit = ApiKeyIdentity(), TokenRateLimit(tokens=5)
    found = settings_of(schema.FlowControl(), {"fcfs": GlobalStrictFairnessPolicy(), "key": by_key, "limit": limit})
    assert (found.identities, found.token_rate) == ((by_key,), limit)
    assert settings_of(schema.FlowControl(), {}).token_rate is None


# tokens a window


def limited(tokens: int = 1_000, **more: Any) -> World:
    return World(4, each=100, token_rate=TokenRateLimit(tokens=tokens, **more))


def refused(world: World, name: str, **fields: Any) -> EppError:
    with pytest.raises(EppError) as raised:
        world.ask(name, **fields)
    return raised.value


def test_prompts_count_when_they_come_and_answers_when_they_end() -> None:
    world = limited()
    world.ask("a", fairness_id="t", prompt_tokens=400)
    world.ask("b", fairness_id="t", prompt_tokens=400)
    error = refused(world, "c", fairness_id="t", prompt_tokens=400)
    assert isinstance(error, RateLimitedError)
    assert (error.http_status, error.dropped_reason) == (429, "rejected-rate-limited")
    assert error.retry_after_s == 61, "its slot of a second, and the window"
    assert world.ask("c2", fairness_id="t", prompt_tokens=200) is None, "what fits passes"
    assert world.ask("d", fairness_id="other", prompt_tokens=400) is None
    world.end("c2", Usage(prompt_tokens=150, completion_tokens=20))
    rates = world.flow.tenants.rates
    assert rates is not None
    assert rates.used("t", world.clock.now_s()) == 400 + 400 + 150 + 20
    assert world.outcomes() == {"Dispatched": 4, "RejectedOther": 1}


def test_who_comes_back_when_told_to_is_served() -> None:
    world = limited(window="10s")
    for number in range(10):
        world.ask(f"r{number}", fairness_id="t", prompt_tokens=100)
        world.clock.advance(0.37)
    for prompt_tokens in (100, 350, 1_000, 50_000):
        error = refused(world, "late", fairness_id="t", prompt_tokens=prompt_tokens)
        world.clock.advance(error.retry_after_s)
        world.ask(f"late-{prompt_tokens}", fairness_id="t", prompt_tokens=prompt_tokens)
        world.clock.advance(0.1)


def test_a_request_larger_than_the_limit_is_served_alone() -> None:
    world = limited(tokens=100)
    assert world.ask("large", fairness_id="t", prompt_tokens=5_000) is None
    assert refused(world, "more", fairness_id="t", prompt_tokens=1).http_status == 429


def test_tenants_have_limits_of_their_own() -> None:
    world = limited(tokens=10, tenants={"gold": 1_000, "default-flow": 20})
    for fairness_id, fits in (("gold", 1_000), ("", 20), ("anybody", 10)):
        world.ask(f"{fairness_id}-1", fairness_id=fairness_id, prompt_tokens=fits - 1)
        assert refused(world, f"{fairness_id}-2", fairness_id=fairness_id, prompt_tokens=2).http_status == 429
        assert world.ask(f"{fairness_id}-3", fairness_id=fairness_id, prompt_tokens=1) is None


def used(world: World, tenant: str = "t") -> int:
    assert world.flow.tenants.rates is not None
    return world.flow.tenants.rates.used(tenant, world.clock.now_s())


def test_what_is_not_served_is_given_back() -> None:
    world = World(1, each=1, token_rate=TokenRateLimit(tokens=1_000), bands=(BandSettings(requests_max=1),))
    world.ask("running", fairness_id="t", prompt_tokens=100)
    world.ask("leaves", fairness_id="t", prompt_tokens=100)
    refused(world, "no room", fairness_id="t", prompt_tokens=100)
    assert used(world) == 200
    world.waits["leaves"].cancel()
    assert used(world) == 100
    world.ask("expires", fairness_id="t", prompt_tokens=100, headers={"x-llm-d-request-ttl": "1s"})
    world.run(1.1)
    assert world.waits["expires"].error is not None
    assert used(world) == 100
    world.ask("undecided", fairness_id="t", prompt_tokens=100)
    world.end("running")
    world.timers.run()
    world.flow.routed(world.requests["undecided"], None)
    world.flow.routed(world.requests["undecided"], None)
    assert used(world) == 100


def test_an_error_of_the_engine_costs_nothing() -> None:
    world = limited()
    world.ask("fails", fairness_id="t", prompt_tokens=100)
    world.flow.finished(world.requests["fails"], world.all[0], Finished(503, -1.0, 0.1, None, 0))
    assert used(world) == 0
    assert [round(left) for _, left, _ in world.flow.service.tokens.tokens(world.clock.now_s())] == [0]


@pytest.mark.parametrize(
    ("fields", "step_s", "tokens"),
    [({"stream": True}, 0.05, 41), ({"stream": True, "max_output_tokens": 10}, 0.05, 10), ({"stream": True}, 0.0, 0), ({}, 0.05, 0)],
)
def test_a_stream_that_does_not_say_its_cost_is_counted_by_time(fields: dict[str, Any], step_s: float, tokens: int) -> None:
    world = limited()
    world.ask("r", fairness_id="t", prompt_tokens=100, **fields)
    endpoint = world.all[0]
    endpoint.capacity.step_s = step_s
    world.flow.finished(world.requests["r"], endpoint, Finished(0, 0.5, 2.51, None, 0))
    assert used(world) == 100 + tokens


def test_a_new_configuration_keeps_what_was_counted_in_a_window_as_long() -> None:
    world = limited()
    world.ask("r", fairness_id="t", prompt_tokens=500)
    for limit, counted in ((TokenRateLimit(tokens=100), 500), (TokenRateLimit(tokens=100, window="10s"), 0), (None, -1)):
        world.flow.tenants.use((), limit)
        rates = world.flow.tenants.rates
        assert (rates.used("t", world.clock.now_s()) if rates is not None else -1) == counted


def test_tenants_past_the_limit_share_one() -> None:
    rates = Rates(TokenRateLimit(tokens=100), tenants_max=3)

    def admit(tenant: str, tokens: int, now_s: float) -> None:
        request = LLMRequest(id="r", path="/", headers={})
        request.fairness_id, request.prompt_tokens = tenant, tokens
        rates.admit(request, now_s)

    for tenant in "abc":
        admit(tenant, 10, 0.0)
    admit("d", 60, 1.0)
    with pytest.raises(RateLimitedError):
        admit("e", 60, 1.0)
    assert (rates.used(OTHERS, 1.0), rates.shared, len(rates)) == (60, 2, 4)
    admit("f", 60, 62.0)
    assert rates.used("f", 62.0) == 60, "a place came free"
    assert len(rates) <= 4


# who gives way


def crowded(**settings: Any) -> World:
    """One running, and a queue that `flood` filled."""
    world = World(1, each=1, **settings)
    world.ask("running")
    for number in range(4):
        world.ask(f"flood{number}", fairness_id="flood", body_bytes=100)
    return world


@pytest.mark.parametrize("fairness", [RoundRobinFairnessPolicy(), ProgramAwareFairness()])
@pytest.mark.parametrize("where", ["band", "all"])
def test_the_newest_of_the_flow_with_most_gives_way(fairness: Any, where: str) -> None:
    limits: dict[str, Any] = {"requests_max": 4} if where == "all" else {}
    world = crowded(bands=(BandSettings(fairness=fairness, requests_max=4 if where == "band" else 0),), **limits)
    assert world.ask("small", fairness_id="small") is not None
    error = world.waits["flood3"].error
    assert isinstance(error, DisplacedError)
    assert (error.http_status, error.dropped_reason) == (429, "evicted-queue-pressure")
    assert 1 <= error.retry_after_s <= 60
    assert world.woken == ["flood3"]
    assert world.ask("small2", fairness_id="small") is not None
    assert world.flow.requests == 4
    with pytest.raises(QueueFullError):
        world.ask("small3", fairness_id="small")
    with pytest.raises(QueueFullError):
        world.ask("flood9", fairness_id="flood")
    assert world.outcomes() == {"Dispatched": 1, "EvictedOther": 2, "RejectedCapacity": 2}


def test_where_flows_do_not_matter_nobody_gives_way() -> None:
    world = crowded(bands=(BandSettings(requests_max=4),))
    with pytest.raises(QueueFullError):
        world.ask("small", fairness_id="small")


def test_a_lower_band_gives_way_where_all_are_full() -> None:
    world = crowded(requests_max=4)
    assert world.ask("urgent", priority=5) is not None
    assert isinstance(world.waits["flood3"].error, DisplacedError)
    with pytest.raises(QueueFullError):
        world.ask("lower", priority=-1)
    world.end("running")
    assert world.run()[-1] == "urgent"


def test_a_full_band_takes_nothing_from_a_lower_one() -> None:
    world = World(1, each=1, requests_max=100, bands=(BandSettings(priority=5, requests_max=1), BandSettings()))
    world.ask("running")
    world.ask("low")
    world.ask("high", priority=5)
    with pytest.raises(QueueFullError):
        world.ask("high2", priority=5)
    assert world.woken == []


def test_bytes_too() -> None:
    world = crowded(bands=(BandSettings(fairness=RoundRobinFairnessPolicy(), size_bytes_max=400),))
    assert world.ask("small", fairness_id="small", body_bytes=150) is not None
    assert world.woken == ["flood3", "flood2"]
    with pytest.raises(QueueFullError):
        world.ask("large", fairness_id="large", body_bytes=300)
    assert world.woken == ["flood3", "flood2"], "nobody goes in vain"


def test_a_flow_s_own_limit_is_nobody_else_s_matter() -> None:
    world = crowded(bands=(BandSettings(fairness=RoundRobinFairnessPolicy(), requests_max=5, flow_requests_max=4),))
    world.ask("small", fairness_id="small")
    with pytest.raises(QueueFullError):
        world.ask("flood9", fairness_id="flood")
    assert world.woken == []


def test_who_has_most_is_known_after_any_coming_and_going() -> None:
    world = World(1, each=1, bands=(BandSettings(fairness=RoundRobinFairnessPolicy(), requests_max=30),))
    world.ask("running")
    for number in range(30):
        world.ask(f"a{number}", fairness_id="a")
    for number in range(200):
        tenant = "bcdef"[number % 5]
        try:
            world.ask(f"{tenant}{number}", fairness_id=tenant)
        except QueueFullError:
            continue
        if number % 7 == 0:
            world.waits[f"{tenant}{number}"].cancel()
    counts = sorted(flow.requests for flow in world.flow.bands.all[0].flows.values())
    assert sum(counts) in (29, 30)
    assert counts[-1] - counts[0] <= 2, "all alike"
