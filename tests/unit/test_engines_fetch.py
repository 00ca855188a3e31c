"""Fetching /metrics from real servers that behave and misbehave."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from epp.engines.fetch import FetchError, HttpFetcher, UnreachableError


@asynccontextmanager
async def server(handle: Callable[[web.Request], object]) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_get("/metrics", handle)  # type: ignore[arg-type]
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}/metrics"
    finally:
        await runner.cleanup()


async def test_the_body_is_fetched_over_one_kept_connection() -> None:
    ports, headers = set(), []

    async def handle(request: web.Request) -> web.Response:
        assert request.transport is not None
        ports.add(request.transport.get_extra_info("peername")[1])
        headers.append((request.headers["Accept-Encoding"], request.headers.get("Cookie")))
        response = web.Response(text="up 1\n")
        response.set_cookie("a", "b")
        return response

    async with server(handle) as url, HttpFetcher() as fetcher:
        assert [await fetcher.fetch(url) for _ in range(3)] == [b"up 1\n"] * 3
    assert len(ports) == 1
    assert set(headers) == {("identity", None)}


@pytest.mark.parametrize("status", [302, 404, 500, 503])
async def test_any_status_but_200_is_a_failure(status: int) -> None:
    async def handle(_: web.Request) -> web.Response:
        return web.Response(status=status, headers={"Location": "/elsewhere"} if status == 302 else None)

    async with server(handle) as url, HttpFetcher() as fetcher:
        with pytest.raises(FetchError, match=f"^HTTP {status}$"):
            await fetcher.fetch(url)


async def test_too_much_is_a_failure() -> None:
    async def handle(_: web.Request) -> web.Response:
        return web.Response(body=b"x" * 1001)

    async with server(handle) as url, HttpFetcher(response_bytes_max=1000) as fetcher:
        with pytest.raises(FetchError, match="more than 1000 bytes"):
            await fetcher.fetch(url)


async def test_too_slow_is_a_failure() -> None:
    async def handle(_: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async with server(handle) as url, HttpFetcher(timeout_s=0.02) as fetcher:
        with pytest.raises(FetchError, match=r"no answer within 0\.02 s"):
            await fetcher.fetch(url)


async def test_nobody_there() -> None:
    async def handle(_: web.Request) -> web.Response:
        raise AssertionError

    async with server(handle) as url:
        pass
    async with HttpFetcher() as fetcher:
        with pytest.raises(UnreachableError):
            await fetcher.fetch(url)


async def test_a_server_that_speaks_no_http() -> None:
    async def handle(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")
        writer.close()

    listener = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with listener, HttpFetcher() as fetcher:
        with pytest.raises(FetchError):
            await fetcher.fetch(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/metrics")


async def test_an_answer_cut_short() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nup 1\n")
        writer.close()

    listener = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with listener, HttpFetcher() as fetcher:
        with pytest.raises(FetchError):
            await fetcher.fetch(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/metrics")


async def test_an_answer_without_a_length_ends_with_the_connection() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\n\r\nup 1\n")
        writer.close()

    listener = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with listener, HttpFetcher() as fetcher:
        url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/metrics"
        assert [await fetcher.fetch(url) for _ in range(2)] == [b"up 1\n"] * 2


async def test_a_kept_connection_the_server_closed_is_replaced_and_not_kept() -> None:
    asked = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nup 1\n\r\n0\r\n\r\n")
        if asked == 1:  # the second is asked on this connection, and gets no answer on it
            await reader.readuntil(b"\r\n\r\n")
        writer.close()

    listener = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with listener, HttpFetcher() as fetcher:
        url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/metrics"
        assert [await fetcher.fetch(url) for _ in range(2)] == [b"up 1\n"] * 2
        assert asked == 2
        async with asyncio.timeout(5):
            while fetcher._kept:  # noqa: ASYNC110 - polled with a deadline
                await asyncio.sleep(0.001)


async def test_a_fetcher_is_entered_before_use() -> None:
    with pytest.raises(RuntimeError):
        await HttpFetcher().fetch("http://127.0.0.1:1/metrics")
