"""What the fake does on purpose: the faults that tests of clients order, each seen by a plain HTTP client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import pytest

from tests.kubernetes.fake_api import FakeApi, Kind, User, inference_pool, lease, objective, pod

PODS = "/api/v1/namespaces/default/pods"
POOLS = "/apis/inference.networking.k8s.io/v1/namespaces/default/inferencepools"
LEASES = "/apis/coordination.k8s.io/v1/namespaces/default/leases"
SSAR = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"


class Watch:
    """Lines of a stream, and how it ended: "clean", or the error of the client."""

    def __init__(self, client: httpx.AsyncClient, path: str, **params: Any) -> None:
        self.lines: list[str] = []
        self.end = ""
        self.task = asyncio.create_task(self._run(client, path, {"watch": "true", **params}))

    async def _run(self, client: httpx.AsyncClient, path: str, params: dict[str, Any]) -> None:
        try:
            async with client.stream("GET", path, params=params) as response:
                async for line in response.aiter_lines():
                    self.lines.append(line)
            self.end = "clean"
        except httpx.TransportError as error:
            self.end = type(error).__name__

    @property
    def types(self) -> list[str]:
        return [json.loads(line)["type"] for line in self.lines]


@pytest.fixture
async def api() -> AsyncIterator[FakeApi]:
    async with FakeApi() as fake:
        yield fake


@pytest.fixture
async def client(api: FakeApi) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=api.url, trust_env=False) as one:
        yield one


async def begun(api: FakeApi, client: httpx.AsyncClient, path: str = PODS, **params: Any) -> Watch:
    watch = Watch(client, path, **{"resourceVersion": api.rv} | params)
    await api.until(lambda: api.watching() > 0)
    return watch


async def test_the_next_requests_fail_as_ordered(api: FakeApi, client: httpx.AsyncClient) -> None:
    api.fail(2, 429, PODS, retry_after_s=7)
    api.fail(1, 503, method="POST")
    for _ in range(2):
        answer = await client.get(PODS)
        assert (answer.status_code, answer.headers["Retry-After"], answer.json()["reason"]) == (429, "7", "TooManyRequests")
    assert (await client.get(PODS)).status_code == 200
    assert (await client.post(LEASES, json=lease("a", "me"))).status_code == 503
    assert (await client.post(LEASES, json=lease("a", "me"))).status_code == 201
    assert api.asked(PODS) == 3
    assert [request.method for request in api.requests] == ["GET", "GET", "GET", "POST", "POST"]


async def test_a_fault_of_watches_alone(api: FakeApi, client: httpx.AsyncClient) -> None:
    api.fail(1, 410, watch=True, reason="Expired")
    assert (await client.get(PODS)).status_code == 200
    assert (await client.get(PODS, params={"watch": "true"})).status_code == 410


async def test_a_reset_before_and_after_the_request_is_carried_out(api: FakeApi, client: httpx.AsyncClient) -> None:
    for done in (False, True):
        api.fail(1, 0, method="POST", done=done)
        with pytest.raises(httpx.TransportError):
            await client.post(LEASES, json=lease("a", "me"))
        assert [obj["metadata"]["name"] for obj in api.objects("leases")] == ["a"] * done


@pytest.mark.parametrize(("abort", "end"), [(False, "clean"), (True, "ReadError")])
async def test_a_cut_stream_has_said_what_happened_before(api: FakeApi, client: httpx.AsyncClient, abort: bool, end: str) -> None:
    watch = await begun(api, client)
    api.create(pod("a"))
    await api.until(lambda: api.watching("pods") == 1)
    assert api.cut_watches(kind="leases") == 0
    assert api.cut_watches(abort=abort) == 1
    await watch.task
    assert watch.end == end
    if not abort:  # a reset may overtake what was written
        assert watch.types == ["ADDED"]


async def test_half_an_event_and_lines_that_are_none(api: FakeApi, client: httpx.AsyncClient) -> None:
    watch = await begun(api, client)
    api.create(pod("a"))
    api.send_raw(b"\n<html>busy</html>\n")
    api.cut_watches(half_line=True)
    await watch.task
    assert json.loads(watch.lines[0])["type"] == "ADDED"
    assert watch.lines[1:3] == ["", "<html>busy</html>"]
    assert watch.lines[3].startswith('{"type":"MODIFIED"')
    with pytest.raises(ValueError):
        json.loads(watch.lines[3])


async def test_an_error_within_a_stream_ends_it(api: FakeApi, client: httpx.AsyncClient) -> None:
    watch = await begun(api, client)
    api.send_error(500, reason="InternalError", message="etcd has no leader")
    await watch.task
    assert watch.types == ["ERROR"]
    assert json.loads(watch.lines[0])["object"]["code"] == 500


async def test_a_bookmark_comes_after_the_events_it_stands_for(api: FakeApi, client: httpx.AsyncClient) -> None:
    watch = await begun(api, client, allowWatchBookmarks="true")
    api.create(pod("a"))
    api.bookmark_now()
    api.create(pod("b"))
    api.cut_watches()
    await watch.task
    assert watch.types == ["ADDED", "BOOKMARK", "ADDED"]
    versions = [int(json.loads(line)["object"]["metadata"]["resourceVersion"]) for line in watch.lines]
    assert versions[0] == versions[1] < versions[2]


async def test_an_open_watch_outlives_a_compaction(api: FakeApi, client: httpx.AsyncClient) -> None:
    watch = await begun(api, client)
    old = api.rv
    api.create(pod("a"))
    api.compact()
    api.create(pod("b"))
    api.cut_watches()
    await watch.task
    assert watch.types == ["ADDED", "ADDED"]
    late = Watch(client, PODS, resourceVersion=old)
    await late.task
    assert late.types == ["ERROR"]


async def test_silence_takes_requests_and_answers_them_when_it_is_over(api: FakeApi, client: httpx.AsyncClient) -> None:
    watch = await begun(api, client)
    api.silence()
    api.create(pod("a"))
    asked = asyncio.create_task(client.get(PODS))
    await api.until(lambda: api.asked(PODS, watch=False) == 1)
    assert not asked.done()
    assert watch.lines == []
    api.silence(False)
    assert (await asked).status_code == 200
    api.cut_watches()
    await watch.task
    assert watch.types == ["ADDED"]


async def test_a_slow_list_shows_what_there_was_when_it_was_asked(api: FakeApi, client: httpx.AsyncClient) -> None:
    api.create(pod("a"))
    api.hold_lists()
    asked = asyncio.create_task(client.get(PODS))
    await api.until(lambda: api.asked(PODS) == 1)
    one = await client.get(f"{PODS}/a")  # others are answered; and the list, asked for before, was made by now
    assert one.status_code == 200
    api.create(pod("b"))
    api.release_lists()
    page = (await asked).json()
    assert len(page["items"]) == 1
    assert int(page["metadata"]["resourceVersion"]) < api.rv


async def test_lists_take_as_long_as_ordered() -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async with FakeApi(sleep=sleep) as api, httpx.AsyncClient(base_url=api.url, trust_env=False) as client:
        api.delay_lists(4.0)
        await client.get(PODS)
        await client.get(f"{PODS}/a")
    assert slept == [4.0]


async def test_a_stopped_server_refuses_and_comes_back_at_its_port(api: FakeApi, client: httpx.AsyncClient) -> None:
    api.create(pod("a"))
    watch = await begun(api, client)
    url = api.url
    await api.stop()
    await watch.task
    assert watch.end not in ("", "clean")
    async with httpx.AsyncClient(base_url=url, trust_env=False) as another:
        with pytest.raises(httpx.ConnectError):
            await another.get(PODS)
    await api.start()
    assert api.url == url
    async with httpx.AsyncClient(base_url=url, trust_env=False) as another:
        assert len((await another.get(PODS)).json()["items"]) == 1


async def test_refused_verbs(api: FakeApi, client: httpx.AsyncClient) -> None:
    api.refuse("pods", {"watch"})
    api.refuse("inferencepools.inference.networking.k8s.io", namespace="default")
    assert (await client.get(PODS)).status_code == 200
    answer = await client.get(PODS, params={"watch": "true"})
    assert answer.status_code == 403
    assert 'cannot watch resource "pods" in API group "" in the namespace "default"' in answer.json()["message"]
    assert (await client.get(POOLS)).status_code == 403
    assert (await client.get(POOLS.replace("default", "other"))).status_code == 200
    for verb, allowed in (("watch", False), ("list", True)):
        spec = {"resourceAttributes": {"namespace": "default", "verb": verb, "resource": "pods"}}
        body = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "spec": spec}
        assert (await client.post(SSAR, json=body)).json()["status"]["allowed"] is allowed
    api.refuse("pods", ())
    async with client.stream("GET", PODS, params={"watch": "true"}) as response:
        assert response.status_code == 200


async def test_kinds_come_and_go() -> None:
    full = "inferencepools.inference.networking.k8s.io"
    extra = Kind("example.com", "v1", "things", "Thing", schema={"type": "object"})
    async with FakeApi(without={full}, kinds=[extra]) as api, httpx.AsyncClient(base_url=api.url, trust_env=False) as client:
        assert (await client.get("/apis/example.com/v1/things")).status_code == 200
        assert (await client.get(POOLS)).text == "404 page not found\n"
        api.install(full)
        api.create(inference_pool("llama"))
        watch = await begun(api, client, POOLS)
        api.uninstall(full)
        await watch.task
        assert (watch.types, watch.end) == (["DELETED"], "clean")
        assert (await client.get(POOLS)).status_code == 404


async def test_an_administrator_in_python(api: FakeApi, client: httpx.AsyncClient) -> None:
    made = api.create(pod("a", "10.0.0.9", ready=False))
    assert made["status"]["podIP"] == "10.0.0.9"
    assert api.set_ready("default", "a", True)["status"]["conditions"] == [{"type": "Ready", "status": "True"}]
    assert api.patch_status(made | {"status": {"phase": "Failed"}})["status"] == {"phase": "Failed"}
    changed = api.update(pod("a", "10.0.0.10", labels={"other": "label"}))
    assert changed["metadata"]["labels"] == {"other": "label"}
    assert changed["metadata"]["uid"] == made["metadata"]["uid"]
    assert changed["status"]["podIP"] == "10.0.0.10"
    assert "deletionTimestamp" in api.terminate("pods", "default", "a")["metadata"]
    made["metadata"]["labels"]["app"] = "mine"
    assert api.get("pods", "default", "a")["metadata"]["labels"] == {"other": "label"}, "what was handed out is a copy"
    api.delete("Pod", "default", "a")
    assert api.objects("pods") == []
    with pytest.raises(LookupError):
        api.create({"apiVersion": "v1", "kind": "Nothing", "metadata": {"name": "a"}})
    old = api.create(objective("gold", 3, "llama", old=True))
    assert old["apiVersion"].startswith("inference.networking.x-k8s.io/")
    assert api.objects("inferenceobjectives.llm-d.ai") == []
    assert len(api.objects("inferenceobjectives.inference.networking.x-k8s.io")) == 1


async def test_tokens_and_grants() -> None:
    async with FakeApi(tokens={"good": "alice", "root": User("root", ("system:masters",))}, rbac=True) as api:
        asking = {name: {"Authorization": f"Bearer {name}"} for name in ("good", "root", "bad")}
        async with httpx.AsyncClient(base_url=api.url, trust_env=False) as client:
            assert (await client.get(PODS, headers=asking["root"])).status_code == 200
            assert (await client.get(PODS, headers=asking["bad"])).status_code == 401
            assert 'User "system:anonymous"' in (await client.get(PODS)).json()["message"]
            assert (await client.get(PODS, headers=asking["good"])).status_code == 403
            api.grant("alice", {"list"}, resources={"pods"}, namespace="default")
            api.grant("alice", {"get"}, paths={"/metrics"})
            assert (await client.get(PODS, headers=asking["good"])).status_code == 200
            assert (await client.get(PODS.replace("default", "other"), headers=asking["good"])).status_code == 403
            spec = {"user": "alice", "nonResourceAttributes": {"path": "/metrics", "verb": "get"}}
            body = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}
            answer = await client.post("/apis/authorization.k8s.io/v1/subjectaccessreviews", json=body, headers=asking["root"])
            assert answer.json()["status"]["allowed"] is True


async def test_a_clock_that_is_wrong(api: FakeApi, client: httpx.AsyncClient) -> None:
    api.clock_skew_s = -86_400.0
    said = parsedate_to_datetime((await client.get("/version")).headers["Date"])
    assert 86_000 < (datetime.now(UTC) - said).total_seconds() < 87_000
