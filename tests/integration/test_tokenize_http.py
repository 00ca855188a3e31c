"""Engines that tokenize, over HTTP: what is asked, and every way an answer may fail to come."""

from __future__ import annotations

import asyncio
import contextlib
import json
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
from aiohttp import web

from epp.arrival import Arrival
from epp.clock import MonotonicClock
from epp.engines.access import FetchOptions
from epp.plugins.producers.token import TokenProducer
from epp.tokenize.post import NotThereError, Poster, PostError, RefusedError
from epp.tokenize.stage import TokenStage
from epp.types import Address, Endpoint
from tests.builders import chat, core, llm_request, pool_of

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextlib.asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[int]:
    app = web.Application(client_max_size=1 << 22)
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    assert site._server is not None
    try:
        yield site._server.sockets[0].getsockname()[1]
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def posting(options: FetchOptions | None = None, connections_max: int = 4) -> AsyncIterator[Poster]:
    poster = Poster(options or FetchOptions(), connections_max)
    try:
        yield poster
    finally:
        await poster.close()


async def test_a_body_goes_there_and_an_answer_comes_back(tmp_path: Path) -> None:
    seen: list[tuple[str, str, str | None, bytes]] = []
    token = tmp_path / "token"
    token.write_text("secret\n")

    async def answer(request: web.Request) -> web.Response:
        seen.append((request.method, request.path, request.headers.get("Authorization"), await request.read()))
        return web.json_response({"tokens": [1]})

    async with serving(answer) as port, posting(FetchOptions(bearer_token_file=str(token))) as poster:
        body = b"x" * 300_000
        assert await poster.post(f"http://127.0.0.1:{port}/tokenize", body, 10) == b'{"tokens": [1]}'
        assert seen == [("POST", "/tokenize", "Bearer secret", body)]


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, RefusedError),
        (422, RefusedError),
        (302, NotThereError),
        (401, NotThereError),
        (404, NotThereError),
        (405, NotThereError),
        (501, NotThereError),
        (204, PostError),
        (429, PostError),
        (500, PostError),
        (503, PostError),
    ],
)
async def test_what_a_status_means(status: int, error: type[PostError]) -> None:
    async def answer(_request: web.Request) -> web.Response:
        return web.Response(status=status, headers={"Location": "http://127.0.0.1:1/elsewhere"})

    async with serving(answer) as port, posting() as poster:
        with pytest.raises(PostError) as caught:
            await poster.post(f"http://127.0.0.1:{port}/tokenize", b"{}", 10)
        assert type(caught.value) is error


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"error": {"message": "The model `x` does not exist.", "type": "NotFoundError", "param": "model", "code": 404}}, RefusedError),
        ({"object": "error", "message": "The model `x` does not exist.", "type": "NotFoundError", "code": 404}, RefusedError),
        ({"detail": "Not Found"}, NotThereError),
        ({"error": {"message": "Not Found", "type": "Not Found", "param": None, "code": 404}}, NotThereError),
    ],
)
async def test_a_model_that_is_not_there_is_no_path_that_is_not_there(body: dict[str, object], error: type[PostError]) -> None:
    """Else whoever asks for a model nobody has, or a LoRA this engine has not, costs all others their tokens for a minute."""

    async def answer(_request: web.Request) -> web.Response:
        return web.json_response(body, status=404)

    async with serving(answer) as port, posting() as poster:
        with pytest.raises(PostError) as caught:
            await poster.post(f"http://127.0.0.1:{port}/tokenize", b"{}", 10)
        assert type(caught.value) is error


async def test_out_of_service_it_asks_nobody_and_opens_nothing() -> None:
    async def answer(_request: web.Request) -> web.Response:
        return web.Response()

    async with serving(answer) as port:
        for used in (False, True):
            async with posting() as poster:
                if used:
                    await poster.post(f"http://127.0.0.1:{port}/", b"{}", 10)
                await poster.close()
                with pytest.raises(PostError, match="out of service"):
                    await poster.post(f"http://127.0.0.1:{port}/", b"{}", 10)


async def test_an_answer_has_so_many_bytes_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epp.tokenize.post.ANSWER_BYTES_MAX", 1_000)

    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=bytes(int(request.query["size"])))

    async with serving(answer) as port, posting() as poster:
        assert len(await poster.post(f"http://127.0.0.1:{port}/?size=1000", b"{}", 10)) == 1_000
        with pytest.raises(PostError, match="more than 1000 bytes"):
            await poster.post(f"http://127.0.0.1:{port}/?size=1001", b"{}", 10)


async def test_nobody_there_or_nobody_who_answers_is_a_failure_that_is_told() -> None:
    over = asyncio.Event()

    async def silence(_request: web.Request) -> web.Response:
        await over.wait()
        return web.Response()

    async def hang_up(request: web.Request) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async with serving(silence) as port, posting(connections_max=1) as poster:
        with pytest.raises(PostError, match="in time"):
            await poster.post(f"http://127.0.0.1:{port}/", b"{}", 0.01)
        over.set()
        assert await poster.post(f"http://127.0.0.1:{port}/", b"{}", 10) == b"", "its connection was given up"
    async with serving(hang_up) as port, posting() as poster:
        with pytest.raises(PostError):
            await poster.post(f"http://127.0.0.1:{port}/", b"{}", 10)
    async with posting() as poster:
        with pytest.raises(PostError):
            await poster.post(f"http://127.0.0.1:{port}/", b"{}", 10)


@pytest.mark.parametrize("parameters", [{"engine": {}}, {"vllm": {"url": ""}, "modelName": "base"}])
async def test_a_request_waits_for_the_engine_s_answer_and_connections_end_with_the_stage(parameters: dict[str, dict[str, str]]) -> None:
    asked: list[tuple[str, str]] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append((request.path, json.loads(await request.read())["model"]))
        return web.json_response({"tokens": [1, 2, 3], "token_ids": [1, 2, 3]})

    async with serving(answer) as port:
        (endpoint,) = pool_of({})
        endpoint.spec = endpoint.spec._replace(address=Address("127.0.0.1", port))
        if "vllm" in parameters:
            parameters = {**parameters, "vllm": {"url": f"http://127.0.0.1:{port}"}}

        def ready(_pool: str) -> list[Endpoint]:
            return [endpoint]

        stage = TokenStage(MonotonicClock(), ready)
        stage.use([msgspec.convert(parameters, TokenProducer)])
        async with asyncio.TaskGroup() as tasks:
            life = tasks.create_task(stage.run())
            await asyncio.sleep(0)
            woken, request, body = asyncio.Event(), llm_request(path="/v1/chat/completions"), chat("hi")
            understood = core().director._understood(request, body)
            arrival = Arrival(request, body, None, 0.0, understood=understood, wake=woken.set, stages=())
            assert stage.begin(arrival) is not None
            async with asyncio.timeout(10):
                await woken.wait()
            assert array("I", request.attributes["tokens"]).tolist() == [1, 2, 3]
            assert request.prompt_tokens == 3
            assert stage.begin(arrival) is None, "the same again is known"
            assert stage.outcomes == {"exact": 2}
            life.cancel()
        assert asked == [("/tokenize", "m") if "engine" in parameters else ("/v1/chat/completions/render", "base")]
