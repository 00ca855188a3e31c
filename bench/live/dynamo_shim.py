"""A gateway in front of engines that asks Dynamo's `select_service` where each request goes; `select_service` itself forwards nothing.

    select_and_reserve -> forward -> prefill_complete at the first piece of the answer -> DELETE of the reservation at the end

A reservation is given back exactly once, whatever happens: the client leaves, the engine refuses or breaks off, `select_service` is slow.
No `output_block`: Dynamo's own router does not track output blocks either, as it comes (`router_track_output_blocks=false`).

`token_ids` are the tokens that the engines count (`bench.live.engines.tokens_of`), so `select_service` sees blocks where they cache blocks.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

import aiohttp
import msgspec
from aiohttp import hdrs, web
from multidict import CIMultiDict, CIMultiDictProxy

from bench.live.engines import tokens_of
from epp.sim.openai import RejectedError, parse_chat, parse_completion
from epp.sim.options import MODEL_DEFAULT

try:
    import uvloop
except ImportError:
    uvloop = None  # type: ignore[assignment]

LOOPBACK = "127.0.0.1"
BODY_BYTES_MAX = 1 << 26
CONNECT_S = 5.0
CALL_S = 10.0
"""For one call of `select_service`."""
DRAIN_S = 5.0
"""At the end, for reservations still to be given back."""
SHUTDOWN_S = 0.1
"""For requests in flight at the end; 0 would be forever to aiohttp."""
_OF_A_HOP = frozenset(
    header.lower()
    for header in (hdrs.CONNECTION, hdrs.CONTENT_LENGTH, hdrs.DATE, hdrs.HOST, hdrs.KEEP_ALIVE, hdrs.SERVER, hdrs.TRANSFER_ENCODING)
)


class NoEngineError(Exception):
    """`select_service` named no engine. It may have booked one all the same, if its answer did not arrive."""

    def __init__(self, message: str, *, may_be_booked: bool = False) -> None:
        super().__init__(message)
        self.may_be_booked = may_be_booked


class _Selection(msgspec.Struct):
    endpoint: str


_T = TypeVar("_T")
_selection = msgspec.json.Decoder(_Selection)


class SelectService:
    """The calls of `select_service` that are needed here. All engines are of one model: names of models play no part."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url
        self._timeout = aiohttp.ClientTimeout(total=CALL_S, sock_connect=CONNECT_S)

    async def register(self, engines: Sequence[str], *, block_tokens: int) -> None:
        """Without `kv_events_endpoints`, which is enough where `select_service` runs with DYN_ROUTER_USE_KV_EVENTS=false."""
        for number, url in enumerate(engines, 1):
            status, text = await self._call(hdrs.METH_POST, "/workers", {"worker_id": number, "endpoint": url, "block_size": block_tokens})
            if status != 201:
                raise NoEngineError(f"select_service did not take the worker {url}: status {status}: {text}")

    async def ready(self) -> bool:
        """At least one engine can be selected."""
        status, _ = await self._call(hdrs.METH_GET, "/ready")
        return status == 200

    async def select_and_reserve(self, selection_id: str, tokens: list[int]) -> str:
        """The URL of the engine. The id is ours, so that a reservation whose answer is lost can be given back."""
        try:
            status, text = await self._call(hdrs.METH_POST, "/select_and_reserve", {"selection_id": selection_id, "token_ids": tokens})
        except aiohttp.ClientConnectorError as error:
            raise NoEngineError(f"select_service: {error}") from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise NoEngineError(f"select_service: {type(error).__name__}: {error}", may_be_booked=True) from error
        if status != 200:
            raise NoEngineError(f"select_service: status {status}: {text}")
        try:
            return _selection.decode(text).endpoint
        except msgspec.MsgspecError as error:
            raise NoEngineError(f"select_service: {error}", may_be_booked=True) from error

    async def prefill_complete(self, selection_id: str) -> None:
        await self._tell(hdrs.METH_POST, f"/reservations/{selection_id}/prefill_complete")

    async def free(self, selection_id: str) -> None:
        await self._tell(hdrs.METH_DELETE, f"/reservations/{selection_id}")

    async def _tell(self, method: str, path: str) -> None:
        """A request in flight can do nothing about it if this fails: it is said, and that is all."""
        try:
            status, text = await self._call(method, path)
        except (aiohttp.ClientError, TimeoutError) as error:
            status, text = 0, f"{type(error).__name__}: {error}"
        if status != 200:
            print(f"select_service: {method} {path}: status {status}: {text}", file=sys.stderr, flush=True)

    async def _call(self, method: str, path: str, body: dict[str, object] | None = None) -> tuple[int, str]:
        data = None if body is None else msgspec.json.encode(body)
        headers = {hdrs.CONTENT_TYPE: "application/json"} if body is not None else None
        async with self._session.request(method, self._url + path, data=data, headers=headers, timeout=self._timeout) as response:
            return response.status, await response.text()


class Shim:
    """The gateway. Calls that must not delay an answer, or must outlive its handler, are tasks of their own."""

    def __init__(self, session: aiohttp.ClientSession, service: SelectService) -> None:
        self._session = session
        self._service = service
        self._tasks: set[asyncio.Task[Any]] = set()

    def application(self) -> web.Application:
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        app.add_routes([
            web.get("/health", self._health),
            web.post("/v1/completions", self._forward),
            web.post("/v1/chat/completions", self._forward),
        ])  # fmt: skip
        return app

    async def drained(self) -> None:
        """What is to be given back has been, or there was no time for it."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=DRAIN_S)

    async def _health(self, _request: web.Request) -> web.Response:
        try:
            ready = await self._service.ready()
        except (aiohttp.ClientError, TimeoutError):
            ready = False
        return web.Response(status=200 if ready else 503)

    async def _forward(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        parse = parse_chat if request.path.startswith("/v1/chat/") else parse_completion
        try:
            tokens = tokens_of(b"".join(parse(body, MODEL_DEFAULT).prompts))
        except RejectedError as error:
            return _failed(error.status, str(error))
        selection_id = uuid.uuid4().hex
        # A task of its own: a client that leaves meanwhile must not leave a booking behind of which nobody knows.
        selecting = self._start(self._service.select_and_reserve(selection_id, tokens))
        told: list[asyncio.Task[None]] = []
        over = asyncio.Event()
        self._start(self._free(selection_id, over, selecting, told))
        response: web.StreamResponse | None = None
        try:
            endpoint = await asyncio.shield(selecting)
            async with self._session.post(endpoint + request.path_qs, data=body, headers=_passed(request.headers)) as answer:
                response = web.StreamResponse(status=answer.status, headers=_passed(answer.headers))
                await response.prepare(request)
                async for piece in answer.content.iter_any():
                    if not told and answer.status == 200:
                        told.append(self._start(self._service.prefill_complete(selection_id)))
                    await response.write(piece)
                await response.write_eof()
        except NoEngineError as error:
            return _failed(503, str(error))
        except (aiohttp.ClientError, TimeoutError) as error:
            if response is None:
                return _failed(502, f"{type(error).__name__}: {error}")
            if request.transport is not None:
                request.transport.abort()  # half an answer must not look like a whole one
        finally:
            over.set()
        assert response is not None
        return response

    async def _free(self, selection_id: str, over: asyncio.Event, selecting: asyncio.Task[str], told: Sequence[asyncio.Task[None]]) -> None:
        """After the request and all other calls of its reservation; the only place that gives one back."""
        await over.wait()
        try:
            await selecting
        except NoEngineError as error:
            if not error.may_be_booked:
                return
        await asyncio.gather(*told)
        await self._service.free(selection_id)

    def _start(self, call: Coroutine[Any, Any, _T]) -> asyncio.Task[_T]:
        task = asyncio.create_task(call)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _passed(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in _OF_A_HOP)


def _failed(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message, "type": "Shim", "code": status}}, status=status)


@contextlib.asynccontextmanager
async def serving(select_url: str, port: int = 0) -> AsyncIterator[tuple[SelectService, int]]:
    """A gateway on loopback, and its port."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
        auto_decompress=False,
    ) as session:
        service = SelectService(session, select_url)
        shim = Shim(session, service)
        # handler_cancellation: a client that leaves ends its request at the engine too, as it does behind other gateways.
        runner = web.AppRunner(shim.application(), handler_cancellation=True, access_log=None, shutdown_timeout=SHUTDOWN_S)
        await runner.setup()
        try:
            site = web.TCPSite(runner, LOOPBACK, port)
            await site.start()
            yield service, runner.addresses[0][1]
        finally:
            await runner.cleanup()
            await shim.drained()


async def _serve(args: argparse.Namespace) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with serving(args.select_url, args.port) as (service, _):
        await service.register(args.engines, block_tokens=args.block_tokens)
        await stopped.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.live.dynamo_shim")
    parser.add_argument("--port", type=int, required=True, metavar="N")
    parser.add_argument("--select-url", required=True, metavar="URL", help="of a running select_service")
    parser.add_argument("--block-tokens", type=int, required=True, metavar="N", help="tokens of a block in the engines' caches")
    parser.add_argument("engines", nargs="+", metavar="ENGINE", help="URL of an engine")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop if uvloop is not None else None) as runner:
        runner.run(_serve(parser.parse_args(sys.argv[1:])))
