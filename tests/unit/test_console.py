"""The HTTP port: metrics, the last decisions, the endpoints, what plugins say of themselves, and who is going away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from typing import Any, ClassVar

import aiohttp
import pytest

from epp.console.guard import Authorize
from epp.console.server import DECISIONS_SHOWN_MAX, HttpServer
from epp.datastore import Reading
from epp.decisions import EVERY_S, Decisions
from epp.errors import StartError
from epp.plugins.base import Plugin
from epp.types import Endpoint, LLMRequest
from tests.builders import LLM_D, PATH, Core, chat, core

HEAD = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"
SECRET = "xyzzy-opensesame"


class Page:
    """A client of the port."""

    def __init__(self, server: HttpServer, client: aiohttp.ClientSession) -> None:
        self._url = f"http://127.0.0.1:{server.port}"
        self._client = client

    async def ask(self, path: str, *, method: str = "GET", headers: Mapping[str, str] | None = None) -> tuple[int, str]:
        async with self._client.request(method, self._url + path, headers=headers) as response:
            return response.status, await response.text()

    async def json(self, path: str, *, method: str = "GET", headers: Mapping[str, str] | None = None) -> Any:
        async with self._client.request(method, self._url + path, headers=headers) as response:
            assert response.content_type == "application/json", await response.text()
            return await response.json()


def server_of(world: Core, *, debug: bool = True, kept: int = 8, token: str = "", authorize: Authorize | None = None) -> HttpServer:
    decisions = Decisions(world.clock, kept) if kept else None
    world.director._decisions = decisions
    return HttpServer(
        world.metrics,
        world.director,
        decisions,
        lambda: world.built.plugins.values(),  # noqa: PLW0108 - of the configuration that is in service when asked
        datastore=world.datastore,
        engine=lambda _endpoint: "vllm",
        debug=debug,
        admin_token=lambda: token,
        listen_problem=lambda host, port, error: f"{host}:{port}: {error.strerror}",
        authorize=authorize,
    )


@contextlib.asynccontextmanager
async def page_of(server: HttpServer, *, local: str = "127.0.0.1") -> AsyncIterator[Page]:
    """`local`: the address the client comes from."""
    await server.start("127.0.0.1", 0)
    try:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(local_addr=(local, 0))) as client:
            yield Page(server, client)
    finally:
        await server.stop()


def route(world: Core, number: int, prompt: str = "hello") -> None:
    world.director.route(LLMRequest(id=str(number), path=PATH, headers={":path": PATH}), chat(prompt), None, world.clock.now_s())
    world.clock.advance(EVERY_S)


async def test_metrics() -> None:
    world = core(2)
    route(world, 1)
    async with page_of(server_of(world)) as page:
        status, text = await page.ask("/metrics")
        assert status == 200
        assert text.encode() == world.metrics.exposition()[0]
        assert "llm_d_epp_request_total{" in text


async def test_the_last_decisions_newest_first_and_no_more_than_are_kept() -> None:
    world = core(2)
    server = server_of(world, kept=4)
    for number in range(6):
        route(world, number, prompt=f"{SECRET} {number}")
    async with page_of(server) as page:
        for path, expected in (
            ("/debug/decisions", ["5", "4", "3", "2"]),
            ("/debug/decisions?limit=2", ["5", "4"]),
            ("/debug/decisions?limit=0", []),
            (f"/debug/decisions?limit={DECISIONS_SHOWN_MAX * 10**30}", ["5", "4", "3", "2"]),
        ):
            answer = await page.json(path)
            assert list(answer) == ["decisions"]
            assert [each["request_id"] for each in answer["decisions"]] == expected, path
        assert SECRET not in (await page.ask("/debug/decisions"))[1]


@pytest.mark.parametrize("limit", ["", "-1", "1.5", "many", "%C2%B2", "0x10", "1e3", "+1", "%201", "\x00" * 3 + "1" * 60])
async def test_a_limit_that_is_no_number(limit: str) -> None:
    async with page_of(server_of(core(1))) as page:
        status, text = await page.ask(f"/debug/decisions?limit={limit}")
    assert status == 400
    assert "is not a number" in json.loads(text)["error"]


async def test_without_debug_paths_there_are_metrics_alone() -> None:
    async with page_of(server_of(core(1), debug=False)) as page:
        for path in ("/debug/decisions", "/debug/endpoints", "/debug/plugins/state"):
            assert (await page.ask(path))[0] == 404
        assert (await page.ask("/debug/explain", method="POST"))[0] == 404
        assert (await page.ask("/metrics"))[0] == 200


async def test_decisions_that_are_not_kept_are_a_404_that_says_how_to_keep_them() -> None:
    async with page_of(server_of(core(1), kept=0)) as page:
        status, text = await page.ask("/debug/decisions")
    assert status == 404
    assert "--debug-decisions" in json.loads(text)["error"]


async def test_a_wrong_method_is_a_405() -> None:
    async with page_of(server_of(core(1))) as page:
        assert (await page.ask("/debug/explain"))[0] == 405
        assert (await page.ask("/metrics", method="POST"))[0] == 405


async def test_endpoints_with_what_is_known_of_them() -> None:
    world = core(2, config=LLM_D)
    world.datastore.record_reading(
        world.endpoint(2),
        Reading(waiting=2, running=3, kv_usage=0.25, attributes={"GPUUtilization": 0.5}),
        sent_requests=0,
        sent_tokens=0,
    )
    world.clock.advance(1.5)
    route(world, 1)
    async with page_of(server_of(world)) as page:
        first, second = (await page.json("/debug/endpoints"))["endpoints"]
    assert (first["name"], first["address"], first["reading_age_s"], first["in_flight_requests"]) == ("pod-1", "10.0.0.1:8000", None, 1)
    assert {key: second[key] for key in ("waiting", "running", "kv_usage", "attributes", "picks", "namespace")} == {
        "waiting": 2,
        "running": 3,
        "kv_usage": 0.25,
        "attributes": {"GPUUtilization": 0.5},
        "picks": 0,
        "namespace": "default",
    }
    assert second["reading_age_s"] == pytest.approx(1.5 + EVERY_S)


class Talkative(Plugin):
    """A filter that says how it is."""

    type: ClassVar[str] = "talkative"
    per_request: ClassVar[bool] = True

    def keep(self, _request: LLMRequest, endpoints: tuple[Endpoint, ...]) -> tuple[Endpoint, ...]:
        return endpoints

    def state(self) -> Mapping[str, object]:
        return {"sessions": 3}


async def test_plugins_that_are_in_service_say_how_they_are() -> None:
    world = core(1)
    async with page_of(server_of(world)) as page:
        assert "talkative" not in (await page.json("/debug/plugins/state"))["plugins"]
        world.use(f"{HEAD}plugins: [{{name: mine, type: '{__name__}:Talkative'}}]")
        answer = await page.json("/debug/plugins/state")
    assert answer["plugins"]["mine"] == {"name": "mine", "type": "talkative", "state": {"sessions": 3}}
    assert answer["plugins"]["max-score-picker"]["message"]
    assert datetime.fromisoformat(answer["timestamp"]).tzinfo is not None


async def test_an_endpoint_is_marked_as_going_away_and_back() -> None:
    world = core(2)
    async with page_of(server_of(world)) as page:
        assert (await page.json("/drain")) == {"draining": []}
        for name in ("pod-1", "default/pod-1", "10.0.0.1:8000"):
            answer = await page.json(f"/drain?endpoint={name}", method="POST")
            assert [each["name"] for each in answer["draining"]] == ["pod-1"]
            assert [e.name for e in world.datastore.ready.endpoints] == ["pod-2"]
            assert (await page.json(f"/drain?endpoint={name}", method="DELETE")) == {"draining": []}
            assert len(world.datastore.ready.endpoints) == 2
        for wanted in ("", "?endpoint=", "?endpoint=pod-3", "?endpoint=10.0.0.1"):
            assert (await page.ask(f"/drain{wanted}", method="POST"))[0] == 404


@pytest.mark.parametrize(
    ("token", "sent", "status"),
    [("", None, 403), ("", "Bearer ", 403), ("s3cret", None, 403), ("s3cret", "Bearer wrong", 403), ("s3cret", "Bearer s3cret", 200)],
)
async def test_who_is_not_on_this_machine_needs_the_token(token: str, sent: str | None, status: int) -> None:
    world = core(1)
    async with page_of(server_of(world, token=token), local="127.0.0.2") as page:
        headers = {} if sent is None else {"Authorization": sent}
        assert (await page.ask("/drain?endpoint=pod-1", method="POST", headers=headers))[0] == status
    assert world.endpoint(1).draining is (status == 200)


async def test_a_token_that_is_no_text_is_a_wrong_one() -> None:
    world = core(1)
    server = server_of(world, token="s3cret")
    async with page_of(server):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port, local_addr=("127.0.0.2", 0))
        writer.write(b"POST /drain?endpoint=pod-1 HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer \xff\xfe\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 403 ")
        writer.close()
        await writer.wait_closed()
    assert not world.endpoint(1).draining


# A guarded port


class Rules:
    """Who may do what; and who asked."""

    def __init__(self, *allowed: tuple[str, str, str]) -> None:
        self.allowed = set(allowed)
        self.asked: list[tuple[str, str, str]] = []

    async def __call__(self, token: str, verb: str, path: str) -> tuple[int, str]:
        self.asked.append((token, verb, path))
        if token == "later":
            return 503, "ask again"
        if token not in {known for known, _, _ in self.allowed}:
            return 401, "who are you?"
        return (200, "") if (token, verb, path) in self.allowed else (403, "not you")


EVERYTHING = (
    "/metrics",
    "/debug/decisions",
    "/debug/endpoints",
    "/debug/plugins/state",
    "/drain",
    "/",
    "/nothing",
    "/metrics/",
    "//metrics",
)


@pytest.mark.parametrize("local", ["127.0.0.1", "127.0.0.2"])
async def test_on_a_guarded_port_every_path_is_asked_about_from_everywhere(local: str) -> None:
    rules = Rules(("t", "get", "/metrics"))
    async with page_of(server_of(core(1), authorize=rules), local=local) as page:
        for path in EVERYTHING:
            assert (await page.ask(path))[0] == 401
            assert (await page.ask(path, headers={"Authorization": "Bearer t"}))[0] == (200 if path == "/metrics" else 403)
        assert (await page.ask("/debug/explain", method="POST", headers={"Authorization": "Bearer t"}))[0] == 403
    assert {(verb, path) for _, verb, path in rules.asked} == {("get", path) for path in EVERYTHING} | {("post", "/debug/explain")}


async def test_a_refusal_says_what_is_asked_for() -> None:
    world = core(1)
    async with page_of(server_of(world, authorize=Rules(("t", "get", "/metrics")))) as page:
        for token, status, said, challenge in (
            ("x", 401, "who are you?", "Bearer"),
            ("t", 403, "not you", None),
            ("later", 503, "ask again", None),
        ):
            async with page._client.get(f"{page._url}/debug/endpoints", headers={"Authorization": f"Bearer {token}"}) as response:
                assert (response.status, response.headers.get("WWW-Authenticate")) == (status, challenge)
                assert await response.json() == {"error": said}


@pytest.mark.parametrize(
    ("header", "token"),
    [
        (None, ""),
        ("", ""),
        ("Bearer", ""),
        ("Bearer ", ""),
        ("t", ""),
        ("Basic dDp0", ""),
        ("Bearert", ""),
        ("Bearer t", "t"),
        ("bearer  t ", "t"),
        ("BEARER a b", "a b"),
    ],
)
async def test_what_counts_as_a_token(header: str | None, token: str) -> None:
    rules = Rules()
    async with page_of(server_of(core(1), authorize=rules)) as page:
        assert (await page.ask("/metrics", headers={} if header is None else {"Authorization": header}))[0] == 401
    assert rules.asked == [(token, "get", "/metrics")]


async def test_a_path_is_asked_about_as_it_is_served() -> None:
    """No spelling of a path is served under a rule for another."""
    rules = Rules(("t", "get", "/metrics"))
    server = server_of(core(1), authorize=rules)
    async with page_of(server):
        for target in (
            "/%6detrics",
            "/metrics?a=/b",
            "/debug/../metrics",
            "/debug/endpoints#/metrics",
            "/debug%2fendpoints",
            "http://x/debug/endpoints",
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(f"GET {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\nauthorization: Bearer t\r\n\r\n".encode())
            answer = await reader.read()
            served = answer.startswith(b"HTTP/1.1 200 ")
            assert served is (rules.asked[-1][2] == "/metrics"), target
            assert b'"endpoints"' not in answer
            writer.close()
            await writer.wait_closed()


@pytest.mark.parametrize(
    ("shown", "local", "status"),
    [
        ("s3cret", "127.0.0.2", 200),
        ("s3cret", "127.0.0.1", 200),
        ("operator", "127.0.0.2", 200),
        ("t", "127.0.0.1", 403),
        ("", "127.0.0.1", 401),
    ],
)
async def test_draining_on_a_guarded_port_takes_the_admin_token_or_the_right_to(shown: str, local: str, status: int) -> None:
    world = core(1)
    rules = Rules(("t", "get", "/metrics"), ("operator", "post", "/drain"))
    async with page_of(server_of(world, token="s3cret", authorize=rules), local=local) as page:
        headers = {"Authorization": f"Bearer {shown}"}
        assert (await page.ask("/drain?endpoint=pod-1", method="POST", headers=headers))[0] == status
        assert (await page.ask("/metrics", headers={"Authorization": "Bearer s3cret"}))[0] == 401, "it opens /drain alone"
    assert world.endpoint(1).draining is (status == 200)


async def test_an_admin_token_that_is_not_set_opens_nothing() -> None:
    world = core(1)
    async with page_of(server_of(world, authorize=Rules())) as page:
        assert (await page.ask("/drain?endpoint=pod-1", method="POST", headers={"Authorization": "Bearer "}))[0] == 401
    assert not world.endpoint(1).draining


async def test_a_body_is_not_read_of_who_may_not_ask() -> None:
    world = core(1)
    server = server_of(world, authorize=Rules())
    async with page_of(server):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"POST /debug/explain HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n{")
        assert (await reader.readline()).startswith(b"HTTP/1.1 401 ")
        writer.close()
        await writer.wait_closed()


async def test_a_port_that_is_taken_says_so() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(StartError, match=rf"127\.0\.0\.1:{port}: "):
            await server_of(core(1)).start("127.0.0.1", port)


async def test_bytes_that_are_no_http_are_no_stack_trace_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    server = server_of(core(1))
    async with page_of(server):
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
    assert answer.startswith(b"HTTP/1.")
    assert not [record for record in caplog.records if record.exc_info]
