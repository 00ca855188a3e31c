"""ZMTP by the byte, and connections that hold no more than they say. That libzmq understands it: tests/integration/test_kv_event_streams.py."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epp.zmtp.connection import Connection, Listener, connect
from epp.zmtp.wire import COMMAND_BYTES_MAX, FRAMES_MAX, GREETING, Wire, ZmtpError, message

SOON_S = 10.0


def command(name: bytes, body: bytes = b"") -> bytes:
    whole = bytes((len(name),)) + name + body
    return bytes((4, len(whole))) + whole


def ready(kind: bytes = b"PUB") -> bytes:
    return command(b"READY", b"\x0bSocket-Type" + len(kind).to_bytes(4, "big") + kind)


def everything(wire: Wire) -> list[Sequence[bytes]]:
    found = []
    while (taken := wire.next()) is not None:
        if taken:
            found.append(taken)
    return found


def met(*, message_bytes_max: int = 1 << 20) -> Wire:
    wire = Wire(b"SUB", message_bytes_max=message_bytes_max)
    wire.feed(GREETING + ready())
    assert everything(wire) == []
    assert wire.ready
    return wire


@given(
    messages=st.lists(st.lists(st.binary(max_size=300), min_size=1, max_size=FRAMES_MAX), max_size=8),
    cuts=st.lists(st.integers(0, 3_000), max_size=12),
)
def test_messages_come_out_as_they_went_in_however_the_bytes_are_cut(messages: list[list[bytes]], cuts: list[int]) -> None:
    data = GREETING + ready() + b"".join(map(message, messages))
    places = sorted({cut for cut in cuts if cut < len(data)} | {0, len(data)})
    wire, found = Wire(b"SUB"), []
    for start, end in itertools.pairwise(places):
        wire.feed(data[start:end])
        found += everything(wire)
    assert found == messages
    assert wire.buffered_bytes == 0


def test_a_large_message_says_how_much_it_needs() -> None:
    wire = met()
    data = message([b"x" * 70_000])
    wire.feed(data[:20])
    assert wire.next() is None
    assert wire.needs_bytes == len(data)


def test_who_we_are_goes_out_and_pings_are_answered() -> None:
    wire = met()
    assert bytes(wire.out) == command(b"READY", b"\x0bSocket-Type\x00\x00\x00\x03SUB")
    wire.out.clear()
    wire.feed(command(b"PING", b"\x00\x64context") + command(b"PONG") + command(b"LATER", b"whatever"))
    assert everything(wire) == []
    assert bytes(wire.out) == command(b"PONG", b"context")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"HTTP/1.1 400", "does not speak ZMTP"),
        (b"\xff" + bytes(8) + b"\x00", "does not speak ZMTP"),
        (b"\xff" + bytes(8) + b"\x7f\x01", "older than 3.0"),
        (GREETING[:12] + b"CURVE".ljust(52, b"\0"), "mechanism 'CURVE'"),
        (GREETING + message([b"x"]), "before READY"),
        (GREETING + command(b"PING"), "does not begin with READY"),
        (GREETING + ready(b"SUB"), "can't talk to a peer of type 'SUB'"),
        (GREETING + command(b"READY", b"\x0bSocket-Type\x00\x00\xff\xffPUB"), "cut short"),
        (GREETING + command(b"ERROR", b"\x07go away"), "'go away'"),
        (GREETING + ready() + b"\x08\x00", "flags 0x08"),
        (GREETING + ready() + b"\x05\x00", "flags 0x05"),
        (GREETING + ready() + b"\x02" + (1 << 62).to_bytes(8, "big"), "at most 1000 are taken"),
        (GREETING + ready() + message([b"x" * 600, b"x" * 600]), "at most 1000 are taken"),
        (GREETING + ready() + message([b""] * (FRAMES_MAX + 1)), "more than 8 frames"),
        (GREETING + ready() + b"\x06" + (COMMAND_BYTES_MAX + 1).to_bytes(8, "big"), "a command of 65537 bytes"),
    ],
)
def test_what_a_peer_may_not_send_is_refused_and_says_why(data: bytes, what: str) -> None:
    wire = Wire(b"SUB", message_bytes_max=1_000)
    wire.feed(data)
    with pytest.raises(ZmtpError, match=what):
        everything(wire)


@given(st.binary(max_size=400), st.booleans())
def test_whatever_comes_raises_nothing_else(data: bytes, greeted: bool) -> None:
    wire = met() if greeted else Wire(b"DEALER")
    wire.feed(data)
    with contextlib.suppress(ZmtpError):
        everything(wire)
    assert wire.buffered_bytes <= len(data)


# Connections: our two ends


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not true():  # noqa: ASYNC110 - polled with a deadline
            await asyncio.sleep(0.001)


async def pair(**limits: int) -> tuple[Listener, Connection, Connection]:
    """A SUB of ours that takes with these limits, and the PUB it is connected to."""
    accepted: list[Connection] = []

    def accept(connection: Connection) -> Callable[[Connection], None]:
        accepted.append(connection)
        return Connection.take

    listener = Listener(b"PUB", accept, connections_max=4, outbox_bytes_max=64 << 20)
    await listener.start("127.0.0.1", 0)
    mine = await connect("127.0.0.1", listener.port, b"SUB", news=lambda _each: None, **limits)
    await until(accepted[0].ready.done)
    return listener, mine, accepted[0]


async def test_what_is_not_taken_waits_with_the_publisher_and_none_is_lost() -> None:
    listener, mine, theirs = await pair(inbox_bytes=64 << 10)
    sent = 400
    for number in range(sent):
        theirs.send([b"kv@", number.to_bytes(8, "big"), b"x" * 50_000])
    await until(lambda: mine._paused)
    assert mine._wire.buffered_bytes <= (64 << 10) + (256 << 10), "one read more than the limit at most"
    assert theirs.unsent_bytes > 0
    numbers = []
    async with asyncio.timeout(SOON_S):
        while len(numbers) < sent:
            taken = mine.take()
            if taken:
                numbers.append(int.from_bytes(taken[1], "big"))
            elif taken is None:
                await asyncio.sleep(0)
            assert mine._wire.buffered_bytes <= (64 << 10) + (256 << 10)
    assert numbers == list(range(sent))
    mine.close()
    await listener.stop()


async def test_a_message_longer_than_the_inbox_comes_whole() -> None:
    listener, mine, theirs = await pair(inbox_bytes=1_000)
    theirs.send([b"y" * 3_000_000])
    taken: list[Sequence[bytes]] = []
    await until(lambda: bool(taken.append(mine.take() or ()) or taken[-1]))
    assert taken[-1] == [b"y" * 3_000_000]
    mine.close()
    await listener.stop()


async def test_what_arrived_before_the_end_can_still_be_taken() -> None:
    listener, mine, theirs = await pair()
    theirs.send([b"last"])
    await until(lambda: mine._wire.buffered_bytes > 0)
    await listener.stop()
    await until(lambda: mine.closed)
    assert [mine.take(), mine.take()] == [[b"last"], None]


async def test_a_peer_that_asks_and_does_not_read_is_dropped() -> None:
    news: list[Connection] = []

    async def deaf(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING + ready())
        try:
            while not writer.transport.is_closing():
                writer.write(command(b"PING", b"\x00\x00" + b"c" * 16) * 1_000)
                await asyncio.sleep(0)
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(deaf, "127.0.0.1", 0, limit=1)
    port = server.sockets[0].getsockname()[1]
    mine = await connect("127.0.0.1", port, b"SUB", news=news.append, outbox_bytes_max=10_000)
    async with asyncio.timeout(SOON_S):
        while not mine.closed:
            mine.take()
            if mine._wire.next() is None:
                await asyncio.sleep(0)
    assert mine.reason == "the peer does not read"
    assert mine.failed
    server.close()
    await server.wait_closed()


async def test_nobody_there_and_nobody_who_speaks() -> None:
    server = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(ConnectionError):
        await connect("127.0.0.1", port, b"SUB", news=lambda _each: None)
    server.close()
    await server.wait_closed()
    with pytest.raises(OSError, match=r"refused|failed"):
        await connect("127.0.0.1", port, b"SUB", news=lambda _each: None)

    gone = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == GREETING
        writer.transport.abort()
        gone.set()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    with pytest.raises(TimeoutError):
        await connect("127.0.0.1", server.sockets[0].getsockname()[1], b"SUB", news=lambda _each: None, timeout_s=0.05)
    await asyncio.wait_for(gone.wait(), SOON_S)
    server.close()
