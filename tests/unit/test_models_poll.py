"""Which models endpoints serve, by their own lists."""

import asyncio
import json
import random

import pytest

from epp.clock import VirtualClock
from epp.datastore import Datastore
from epp.engines.fetch import FetchError, StatusError, UnreachableError
from epp.engines.models import LIST_BYTES_MAX, MODELS_MAX, NAP_S, ModelsError, ModelsPoller, read_models
from epp.types import Address, Endpoint, EndpointSpec

A = EndpointSpec("a", Address("10.0.0.1", 8000), metrics_address=Address("10.0.0.1", 9100))
B = EndpointSpec("b", Address("10.0.0.2", 8000))
VLLM = (  # as vLLM 0.32 answered, with an adapter
    b'{"object":"list","data":[{"id":"tiny","object":"model","created":1795227301,"owned_by":"vllm","root":"models/tiny","parent":null,'
    b'"max_model_len":2048,"permission":[{"id":"modelperm-a69914a7cfc92b85","object":"model_permission"}]},'
    b'{"id":"sql-lora","object":"model","created":1795227301,"owned_by":"vllm","root":"/models/tiny-sql-lora","parent":"tiny"}]}'
)
LLAMACPP = b'{"object":"list","data":[{"id":"tiny.gguf","object":"model","owned_by":"llamacpp"}],"models":[{"name":"tiny.gguf"}]}'


def listing(*names: str) -> bytes:
    return json.dumps({"object": "list", "data": [{"id": name, "object": "model", "owned_by": "vllm"} for name in names]}).encode()


class Servers:
    """Answers by address; a server that is not told of has no list."""

    def __init__(self) -> None:
        self.answers: dict[str, bytes | Exception] = {}
        self.asked: list[str] = []
        self.while_asked = lambda: None

    async def fetch(self, url: str) -> bytes:
        self.asked.append(url)
        await asyncio.sleep(0)
        self.while_asked()
        answer = self.answers.get(url.removesuffix("/v1/models"), StatusError(404))
        if isinstance(answer, Exception):
            raise answer
        return answer


class Rig:
    def __init__(self, *specs: EndpointSpec) -> None:
        self.datastore = Datastore(VirtualClock())
        self.datastore.apply(specs)
        self.servers = Servers()
        self.naps: list[float] = []
        self.wake = asyncio.Event()
        self.poller = ModelsPoller(self.datastore, self.servers, rng=random.Random(1), sleep=self._sleep)
        self.view = self.poller.view

    async def _sleep(self, seconds: float) -> None:
        self.naps.append(seconds)
        await self.wake.wait()

    def endpoint(self, spec: EndpointSpec) -> Endpoint:
        return self.datastore.endpoints[spec.address]

    async def ask(self, spec: EndpointSpec, answer: bytes | Exception) -> bool:
        self.servers.answers[f"http://{spec.address}"] = answer
        return await self.poller.once(self.endpoint(spec))


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_names_of_base_models_and_adapters() -> None:
    assert read_models(VLLM) == {"tiny", "sql-lora"}


def test_a_name_without_a_tag_is_the_latest() -> None:
    assert read_models(listing("llama3:latest", "qwen:7b")) == {"llama3:latest", "llama3", "qwen:7b"}


def test_an_engine_that_takes_any_name_lists_nothing_that_decides() -> None:
    assert read_models(LLAMACPP) is None


def test_an_empty_list_is_a_list() -> None:
    assert read_models(b'{"data":[]}') == frozenset()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"<html>",
        b"[]",
        b'{"data":null}',
        b'{"models":[]}',
        b'{"data":[{"name":"x"}]}',
        b'{"data":[{"id":7}]}',
        b'\xff{"data":[]}',
        b"[" * 100_000,
    ],
)
def test_anything_else_is_no_list(text: bytes) -> None:
    with pytest.raises(ModelsError):
        read_models(text)


def test_lists_are_bounded() -> None:
    assert len(read_models(listing(*map(str, range(MODELS_MAX)))) or ()) == MODELS_MAX
    with pytest.raises(ModelsError):
        read_models(listing(*map(str, range(MODELS_MAX + 1))))
    with pytest.raises(ModelsError):
        read_models(listing("m") + b" " * LIST_BYTES_MAX)
    assert read_models(listing("m", "", "x" * 10_000)) == {"m"}


async def test_the_engine_is_asked_where_it_serves_not_where_its_metrics_are() -> None:
    rig = Rig(A)
    assert await rig.ask(A, VLLM)
    assert rig.servers.asked == ["http://10.0.0.1:8000/v1/models"]


async def test_who_serves_what() -> None:
    rig = Rig(A, B)
    assert await rig.ask(A, listing("m", "lora"))
    assert await rig.ask(B, listing("m"))
    serves = {(spec.name, model): rig.view.serves(rig.endpoint(spec), model) for spec in (A, B) for model in ("m", "lora", "x")}
    assert serves == {("a", "m"): True, ("a", "lora"): True, ("a", "x"): False, ("b", "m"): True, ("b", "lora"): False, ("b", "x"): False}
    assert [rig.view.known(model) for model in ("m", "lora", "x")] == [True, True, False]
    assert rig.view.models == {"m": 2, "lora": 1}


async def test_an_endpoint_without_a_list_is_never_a_no() -> None:
    rig = Rig(A, B)
    assert await rig.ask(A, listing("m"))
    for answer in (StatusError(404), StatusError(401), LLAMACPP):
        assert not await rig.ask(B, answer)
        assert rig.view.serves(rig.endpoint(B), "x") is None
        assert (rig.view.known("m"), rig.view.known("x")) == (True, None)
    assert rig.poller.poll_errors_total == 0


def test_before_the_first_answer_nothing_is_known() -> None:
    rig = Rig(A)
    assert rig.view.serves(rig.endpoint(A), "m") is None
    assert rig.view.known("m") is None
    assert Rig().view.known("m") is None


async def test_adapters_come_and_go() -> None:
    rig = Rig(A)
    for names in (["m"], ["m", "lora"], ["m"]):
        await rig.ask(A, listing(*names))
        assert rig.view.known("lora") is ("lora" in names)
    assert rig.view.models == {"m": 1}


@pytest.mark.parametrize("failure", [FetchError("no answer within 1 s"), UnreachableError("refused"), StatusError(503), b"<html>"])
async def test_the_last_list_holds_for_three_failures(failure: Exception | bytes) -> None:
    rig = Rig(A)
    await rig.ask(A, listing("m"))
    seen = []
    for answer in (failure, failure, listing("m"), failure, failure, failure):
        known = await rig.ask(A, answer)
        seen.append((known, rig.view.serves(rig.endpoint(A), "m")))
    assert seen == [(True, True)] * 5 + [(False, None)]
    assert rig.poller.poll_errors_total == 5


async def test_new_endpoints_are_asked_at_once_all_others_every_ten_seconds() -> None:
    rig = Rig(A)
    running = asyncio.create_task(rig.poller.run())
    await turns()
    assert rig.servers.asked == ["http://10.0.0.1:8000/v1/models"]
    rig.datastore.apply([A, B])
    await turns()
    assert rig.servers.asked[1:] == ["http://10.0.0.2:8000/v1/models"]
    assert rig.naps == [NAP_S, NAP_S]
    rig.wake.set()
    for _ in range(20):
        await turns()
    polls = len(rig.servers.asked) - 2
    assert polls > 10
    assert max(rig.naps) <= NAP_S
    assert 8.0 <= sum(rig.naps) / polls <= 12.0
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_a_model_nobody_serves_makes_everybody_be_asked_again_soon() -> None:
    rig = Rig(A)
    running = asyncio.create_task(rig.poller.run())
    await turns()
    assert len(rig.servers.asked) == 1
    rig.poller.hurry()
    rig.wake.set()
    await asyncio.sleep(0)
    rig.wake.clear()
    await turns()
    assert (len(rig.servers.asked), sum(rig.naps[:1])) == (2, NAP_S)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


@pytest.mark.parametrize("owner", ["sglang", "llamacpp", "org/model", None])
def test_the_list_of_an_engine_that_takes_any_name_decides_nothing(owner: str | None) -> None:
    assert read_models(json.dumps({"data": [{"id": "m", "owned_by": owner}]}).encode()) is None


async def test_a_large_pool_is_not_asked_all_together() -> None:
    rig = Rig(*(EndpointSpec(f"p{i}", Address(f"10.1.0.{i + 1}", 8000)) for i in range(100)))
    most = 0
    inside: set[int] = set()

    class Counting(Servers):
        async def fetch(self, url: str) -> bytes:
            nonlocal most
            inside.add(id(url))
            most = max(most, len(inside))
            await asyncio.sleep(0)
            inside.remove(id(url))
            return listing("m")

    rig.poller._fetcher = Counting()
    await asyncio.gather(*(rig.poller.once(endpoint) for endpoint in rig.datastore.endpoints.values()))
    assert 1 < most <= 16
    assert rig.view.models == {"m": 100}


async def test_endpoints_that_go_leave_nothing() -> None:
    rig = Rig(A, B)
    await rig.ask(A, listing("m"))
    await rig.ask(B, FetchError("late"))
    a = rig.endpoint(A)
    rig.datastore.apply([B])
    assert rig.view.serves(a, "m") is None
    assert rig.view.models == {}
    rig.datastore.apply([])
    assert (rig.view._served, rig.view._unknown, rig.poller._failures) == ({}, 0, {})


async def test_an_endpoint_that_goes_while_it_is_asked_leaves_nothing() -> None:
    rig = Rig(A)
    endpoint = rig.endpoint(A)
    for answer in (listing("m"), FetchError("late")):
        rig.datastore.apply([A])
        rig.servers.while_asked = lambda: rig.datastore.apply([])
        rig.servers.answers[f"http://{A.address}"] = answer
        assert not await rig.poller.once(endpoint)
    assert (rig.view._served, rig.view.models, rig.poller._failures) == ({}, {}, {})
