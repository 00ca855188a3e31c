"""A stream whose peer does not read, or whose body stops coming, is its own trouble: the others on its connection go on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import ngh2
import pytest
from ngh2.config import Configuration, Role
from ngh2.enums import Setting

from epp.extproc.grpc_aio import GrpcServer
from epp.extproc.grpc_frames import framed
from epp.extproc.server import H2Server
from tests.builders import core, echoed, request_body, request_headers
from tests.integration.test_many_streams import HEADERS, Client, replies
from tests.integration.test_transports import HOST, TRANSPORTS, Server, connections, eventually, limits, peer_of, serving

PIECE = 10_000
OPENING = framed(request_headers(path="/v1/audio/transcriptions").SerializeToString())
UPLOAD = framed(request_body(b"x" * PIECE).SerializeToString())
"""Passes by, so it comes back at once."""


@contextlib.asynccontextmanager
async def reader(server: Server, *, window: int = 1 << 20) -> AsyncIterator[Client]:
    """A client whose streams let so much in until it says otherwise."""
    client = Client(*await asyncio.open_connection(HOST, server.port))
    client.connection = ngh2.Connection(Role.CLIENT, Configuration(auto_window_update=False))
    client.connection.initiate_connection({Setting.INITIAL_WINDOW_SIZE: window})
    client.connection.set_local_window_size(1 << 30)
    try:
        await client.until(lambda: client.connection.remote_settings[Setting.MAX_CONCURRENT_STREAMS] >= 100)
        yield client
    finally:
        client.close()
        await settled()


async def test_a_stream_with_too_much_unread_gets_no_more_window_and_the_others_go_on() -> None:
    world = core()
    queued_max, window = 64 << 10, 256 << 10
    policy = limits(stream_queued_bytes_max=queued_max, stream_window_bytes=window)
    async with serving("h2", world, policy=policy) as server, reader(server, window=0) as client:
        connection = client.connection
        stuck = connection.send_request(HEADERS)
        connection.send_data(stuck, OPENING)
        for _ in range(100):  # 1 MB, four times what a stream may have on the way
            connection.send_data(stuck, UPLOAD)
        for _ in range(4):
            other = connection.send_request(HEADERS)
            await client.flush()
            connection.set_local_window_size(1 << 24, stream_id=other)
            connection.send_data(other, OPENING + UPLOAD * 60)
            await client.until(lambda: len(client.data[other]) > 60 * PIECE)  # noqa: B023 - awaited here
            assert echoed(replies(bytes(client.data[other]))) == b"x" * (60 * PIECE)
        sent = 100 * len(UPLOAD) + len(OPENING) - connection.queued_body_size(stuck)
        assert queued_max < sent <= queued_max + window + 2 * len(UPLOAD), "it may send what may wait and the window, no more"
        assert connection.stream_remote_window_size(stuck) < len(UPLOAD)
        assert not client.data[stuck]

        connection.set_local_window_size(1 << 24, stream_id=stuck)
        async with asyncio.timeout(5):  # nothing else comes on the connection that could wake it
            await client.until(lambda: len(client.data[stuck]) > 100 * PIECE)
        assert echoed(replies(bytes(client.data[stuck]))) == b"x" * (100 * PIECE)
        assert connection.stream_remote_window_size(stuck) > window // 2, "it has its window again"
        client.close()
        await eventually(lambda: world.inflight == (0, 0, 0, 0), "everything given back")


def opened(client: Client, count: int) -> list[int]:
    """Requests whose bodies are still to come."""
    streams = [client.connection.send_request(HEADERS) for _ in range(count)]
    for stream_id in streams:
        client.connection.send_data(stream_id, framed(request_headers().SerializeToString()))
    return streams


def told(client: Client, stream_id: int) -> list[int]:
    """The statuses of immediate responses that came on a stream."""
    return [reply.immediate_response.status.code for reply in replies(bytes(client.data[stream_id]))]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_requests_whose_bodies_stop_are_given_up_and_told(transport: str) -> None:
    world = core()
    async with serving(transport, world) as server, reader(server) as client:
        streams = opened(client, 3)
        await client.flush()
        await eventually(lambda: len(world.sessions) == 3, "all of them arrived")
        await settled()
        world.clock.advance(world.limits.decision_s)
        await checked(server)
        await client.until(lambda: all(client.data[s] for s in streams))
        assert [told(client, s) for s in streams] == [[408]] * 3
        for stream_id in streams:
            with contextlib.suppress(ngh2.NGH2Error):  # h2 ended them already
                client.connection.reset_stream(stream_id)
        await client.flush()
        await eventually(lambda: world.inflight == (0, 0, 0, 0) and server.open_streams == 0, "everything given back")
        assert world.errors("") == {"RequestTimeout": 3}


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_one_that_does_not_read_its_408_keeps_nobody_else_from_theirs(transport: str) -> None:
    world = core()
    async with serving(transport, world) as server, reader(server, window=0) as deaf, reader(server) as client:
        opened(deaf, 3)
        await deaf.flush()
        await eventually(lambda: len(world.sessions) == 3, "they are open")
        (waiting,) = opened(client, 1)
        await client.flush()
        await eventually(lambda: len(world.sessions) == 4, "this one too")
        await settled()
        world.clock.advance(world.limits.decision_s)
        await checked(server)
        await client.until(lambda: bool(client.data[waiting]))
        assert told(client, waiting) == [408]
        assert all(session.answered for session in world.sessions)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_calls_cancelled_as_they_are_given_up_do_not_stop_the_watch(transport: str) -> None:
    world = core()
    async with serving(transport, world) as server:
        for number in range(1, 11):
            async with reader(server) as client:
                streams = opened(client, 10)
                await client.flush()
                await eventually(lambda: len(world.sessions) == number * 10, "all of them are open")  # noqa: B023 - awaited here
                await settled()
                for stream_id in streams:
                    client.connection.reset_stream(stream_id)
                await client.flush()
                world.clock.advance(world.limits.decision_s)
                for _ in range(3):
                    await checked(server)
                await eventually(lambda: server.open_streams == 0, "they are gone")
        assert world.inflight == (0, 0, 0, 0)


async def test_a_peer_that_answers_pings_lives_though_it_is_asked_less_often_than_it_may_be_silent() -> None:
    """`--keepalive 3s`, and a look every 5 s."""
    world = core()
    async with serving("h2", world, policy=limits(keepalive_s=3)) as server, peer_of(server) as peer:
        assert isinstance(server, H2Server)
        for pings in range(1, 5):
            world.clock.advance(5)
            server.check_alive()
            if pings % 2:
                await peer.until(lambda: peer.pings == (pings + 1) // 2, "a PING")  # noqa: B023 - awaited here
                await eventually(lambda: next(iter(connections(server)))._vigil._last_read_s == world.clock.now_s(), "its answer")
            assert connections(server), "it answered, so it lives"


async def settled() -> None:
    """Lets transports and tasks that were told something get to it."""
    for _ in range(5):
        await asyncio.sleep(0.005)


async def checked(server: Server) -> None:
    """What the server's loop does every few seconds; it may not take long, for everyone waits for it."""
    async with asyncio.timeout(3):
        if isinstance(server, H2Server):
            server.check_alive()
        else:
            assert isinstance(server, GrpcServer)
            await server.check_alive()
