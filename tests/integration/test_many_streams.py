"""Ten thousand requests waiting at once: what one costs, and that nothing is left when they are over.

The server runs in a process of its own, so that its memory is its own; the client speaks HTTP/2 through libnghttp2.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import ngh2
import pytest
from ngh2 import events as h2_events
from ngh2.config import Configuration, Role
from ngh2.enums import Setting

from epp._pb import epp_ext_proc_pb2 as pb
from epp.extproc.grpc_frames import framed
from tests.builders import chat_of, destination_of, echoed, kinds, request_body, request_headers

HOST = "127.0.0.1"
STREAMS, CONNECTIONS = 10_000, 4
BODY = chat_of(1_200)
HELD_BYTES = 1_000
STREAM_BYTES_MAX = 20_000
"""Of a stream that waits, besides its body."""
WAIT_S = 20.0
ROOT = Path(__file__).parents[2]
HEADERS = (
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/envoy.service.ext_proc.v3.ExternalProcessor/Process"),
    (b":authority", b"x"),
    (b"content-type", b"application/grpc"),
    (b"te", b"trailers"),
)
FIRST = framed(request_headers(headers={f"x-header-{n}": "v" * 20 for n in range(10)}).SerializeToString())
FIRST += framed(request_body(BODY[:HELD_BYTES]).SerializeToString())
REST = framed(request_body(BODY[HELD_BYTES:], end_of_stream=True).SerializeToString())


class Client:
    """One connection, driven step by step."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.connection = ngh2.Connection(Role.CLIENT, Configuration())
        self.connection.initiate_connection({Setting.INITIAL_WINDOW_SIZE: 1 << 20})
        self.connection.set_local_window_size(1 << 30)
        self.data: defaultdict[int, bytearray] = defaultdict(bytearray)
        self.ended: set[int] = set()
        self.streams: list[int] = []

    async def flush(self) -> None:
        self._writer.write(self.connection.data_to_send())
        await self._writer.drain()

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while True:
                await self.flush()
                if true():
                    return
                data = await self._reader.read(1 << 18)
                assert data, "the server closed the connection"
                self.connection.receive_data(data)
                for event in self.connection.events():
                    if isinstance(event, h2_events.DataReceived):
                        self.data[event.stream_id] += event.data
                    elif isinstance(event, h2_events.StreamClosed):
                        self.ended.add(event.stream_id)

    async def open(self, count: int, first: bytes = FIRST) -> None:
        for number in range(count):
            stream_id = self.connection.send_request(HEADERS)
            self.streams.append(stream_id)
            self.connection.send_data(stream_id, first)
            if number % 100 == 99:
                await self.until(lambda: True)

    def close(self) -> None:
        self._writer.transport.abort()


class Server:
    """The process, and what it says of itself."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self._process = process
        self.port = port

    async def held(self) -> dict[str, object]:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(b"what?\n")
        async with asyncio.timeout(WAIT_S):
            return json.loads(await self._process.stdout.readline())

    async def until(self, **what: object) -> dict[str, object]:
        """Bounded polling: the server reads in its own time."""
        deadline_s = time.monotonic() + WAIT_S
        while True:
            held = await self.held()
            if all(held[name] == value for name, value in what.items()):
                return held
            assert time.monotonic() < deadline_s, f"not within {WAIT_S} s: {what}, but {held}"
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[Server]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.integration.streams_server",
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout
        async with asyncio.timeout(WAIT_S):
            port = int(await process.stdout.readline())
        yield Server(process, port)
    finally:
        assert process.stdin
        process.stdin.close()
        async with asyncio.timeout(WAIT_S):
            await process.wait()


@contextlib.asynccontextmanager
async def clients_of(server: Server, count: int = CONNECTIONS) -> AsyncIterator[list[Client]]:
    made = [Client(*await asyncio.open_connection(HOST, server.port)) for _ in range(count)]
    try:
        for client in made:
            await client.until(lambda: client.connection.remote_settings[Setting.MAX_CONCURRENT_STREAMS] == 10_000)  # noqa: B023 - awaited here
        yield made
    finally:
        for client in made:
            client.close()


def replies(data: bytes) -> list[pb.ProcessingResponse]:
    found, at = [], 0
    while at < len(data):
        end = at + 5 + int.from_bytes(data[at + 1 : at + 5], "big")
        found.append(pb.ProcessingResponse.FromString(data[at + 5 : end]))
        at = end
    return found


async def round_of(server: Server, clients: list[Client], answered: int) -> tuple[int, int]:
    """All streams opened, held, answered, ended. Returns the server's memory with all of them held, and after."""
    for client in clients:
        await client.open(STREAMS // len(clients))
    waiting = await server.until(streams=STREAMS, charged=[0, 0, 0, STREAMS * HELD_BYTES])
    for client in clients:
        for stream_id in client.streams:
            client.connection.send_data(stream_id, REST)
        await client.until(lambda: all(len(client.data[s]) > len(BODY) for s in client.streams))  # noqa: B023 - awaited here
    routed = await server.until(requests=answered + STREAMS)
    assert routed["charged"][0] == STREAMS  # type: ignore[index]
    for client in clients:
        for stream_id in client.streams[:: len(client.streams) // 20]:
            got = replies(bytes(client.data[stream_id]))
            assert kinds(got) == ["request_headers", "request_body"]
            assert destination_of(got[0]).startswith("10.0.0.")
            assert echoed(got) == BODY
        for stream_id in client.streams:
            client.connection.reset_stream(stream_id)
        client.streams.clear()
        client.data.clear()
        await client.flush()
    over = await server.until(streams=0, charged=[0, 0, 0, 0])
    return int(waiting["rss_bytes"]), int(over["rss_bytes"])  # type: ignore[call-overload]


async def test_ten_thousand_streams_wait_are_answered_and_leave_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    async with serving() as server, clients_of(server) as clients:
        empty = int((await server.held())["rss_bytes"])  # type: ignore[call-overload]
        held, after = await round_of(server, clients, 0)
        for_each = (held - empty) / STREAMS
        held_again, after_again = await round_of(server, clients, STREAMS)
        with capsys.disabled():
            sys.stdout.write(
                f"\n{STREAMS} waiting streams: {for_each:.0f} bytes each with {HELD_BYTES} of body; server {empty >> 20} MB before, "
                f"{held >> 20} and {held_again >> 20} MB with them, {after >> 20} and {after_again >> 20} MB after\n"
            )
        assert for_each < STREAM_BYTES_MAX + HELD_BYTES
        assert held_again < held * 1.1 + (8 << 20), "the second ten thousand take the room of the first"
        assert after_again < after * 1.1 + (8 << 20)


async def test_ten_thousand_streams_on_one_connection_lost_at_once_give_everything_back() -> None:
    async with serving() as server:
        async with clients_of(server, 1) as (client,):
            await client.open(STREAMS)
            await server.until(streams=STREAMS, charged=[0, 0, 0, STREAMS * HELD_BYTES])
        await server.until(streams=0, charged=[0, 0, 0, 0])


async def test_a_stream_more_than_the_limit_waits_and_disturbs_nobody() -> None:
    async with serving() as server, clients_of(server, 1) as (client,):
        await client.open(STREAMS + 5)
        await server.until(streams=STREAMS)
        client.connection.reset_stream(client.streams[0])
        client.connection.send_data(client.streams[-1], REST)
        client.connection.send_data(client.streams[1], REST)
        await client.until(lambda: len(client.data[client.streams[1]]) > len(BODY))
        await server.until(streams=STREAMS, requests=1)


async def test_thousands_of_streams_may_end_in_one_read() -> None:
    """A gateway whose clients all leave at once: the server must not look at everything for each of them."""
    count = 5_000
    async with serving() as server, clients_of(server, 1) as (client,):
        await client.open(count)
        await server.until(streams=count)
        for stream_id in client.streams:
            client.connection.end_stream(stream_id)
        started_s = time.monotonic()
        await client.until(lambda: len(client.ended) == count)
        took_s = time.monotonic() - started_s
        await server.until(streams=0, charged=[0, 0, 0, 0])
        assert took_s < 3.0, f"{took_s:.1f} s for {count} streams"
