"""A peer that abuses HTTP/2 loses its connection; the others do not notice."""

import asyncio
import contextlib
from collections.abc import Callable

import pytest
from hyperframe import frame as frames

from tests.builders import core
from tests.integration.test_transports import REQUEST, WAIT_S, Peer, eventually, limits, peer_of, serving, upload

RESETS = {"reset_burst": 50, "resets_per_s": 10}


def rapid_resets(peer: Peer) -> bytes:
    flood = b""
    for _ in range(100):
        stream_id, headers = peer.open_bytes()
        flood += headers + peer.reset_bytes(stream_id)
    return flood


def settings_flood(_peer: Peer) -> bytes:
    return frames.SettingsFrame(0, settings={frames.SettingsFrame.MAX_FRAME_SIZE: 16_384}).serialize() * 2_000


def ping_flood(_peer: Peer) -> bytes:
    return frames.PingFrame(0, opaque_data=b"8 bytes.").serialize() * 2_000


def continuation_flood(_peer: Peer) -> bytes:
    return frames.HeadersFrame(1, b"").serialize() + frames.ContinuationFrame(1, b"").serialize() * 100


def header_bomb(peer: Peer) -> bytes:
    """Little on the wire, a lot once decoded: one entry of the dynamic table, named over and over."""
    name, value = b"x-bomb", b"b" * 4_000
    literal = b"\x40" + bytes([len(name)]) + name + b"\x7f" + _varint(len(value) - 127) + value
    stream_id, _ = peer.open_bytes()
    return frames.HeadersFrame(stream_id, literal + b"\xbe" * 10_000, flags=["END_HEADERS", "END_STREAM"]).serialize()


def _varint(number: int) -> bytes:
    out = b""
    while number >= 0x80:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


@pytest.mark.parametrize("attack", [rapid_resets, settings_flood, ping_flood, continuation_flood], ids=lambda attack: attack.__name__)
async def test_a_flood_closes_its_own_connection_only(attack: Callable[[Peer], bytes]) -> None:
    world = core()
    async with serving("h2", world, policy=limits(**RESETS)) as server, peer_of(server) as honest, peer_of(server) as attacker:
        stream_id = honest.open()
        honest.send(stream_id, REQUEST[0])
        attacker.write(attack(attacker))  # one write: what the server answers is not read, so its acknowledgements pile up
        await attacker.until_closed()
        honest.send(stream_id, *REQUEST[1:])
        await honest.until(lambda: len(honest.replies(stream_id)) == 2, "the other peer's answer")
        assert honest.goaways == []
        await eventually(lambda: server.open_streams == 1, "nothing of the attacker's is left")


async def test_headers_that_grow_when_decoded_do_not_get_through() -> None:
    world = core()
    async with serving("h2", world) as server, peer_of(server) as honest, peer_of(server) as attacker:
        attacker.write(header_bomb(attacker))
        await attacker.until(lambda: attacker.closed or bool(attacker.resets) or bool(attacker.goaways), "a refusal")
        assert world.sessions == []
        stream_id = honest.open()
        honest.send(stream_id, *REQUEST)
        await honest.until(lambda: len(honest.replies(stream_id)) == 2, "the other peer's answer")


async def test_a_peer_that_leaves_no_window_is_closed_after_a_while() -> None:
    """Its replies would wait for ever, and what they hold with them."""
    world = core()
    async with serving("h2", world, policy=limits(stall_s=30.0)) as server, peer_of(server) as honest:
        stalled = Peer(server.port)
        await stalled.connect()
        stalled.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frames.SettingsFrame(0).serialize())  # 65 535 bytes of window, never more
        await stalled.until(lambda: stalled.heard, "the server's word that it has our settings")
        stream_id = stalled.open()
        stalled.send(stream_id, *upload(300_000, 50_000))
        await eventually(lambda: world.inflight[0] == 1, "the request is routed, its body waits to be handed back")
        server.check_alive()
        world.clock.advance(29.0)
        server.check_alive()
        assert world.inflight[0] == 1
        world.clock.advance(2.0)
        server.check_alive()
        with contextlib.suppress(ConnectionError):
            await stalled.until_closed()
        await eventually(lambda: world.inflight == (0, 0, 0, 0), "what the peer held is given back")
        stream_id = honest.open()
        honest.send(stream_id, *REQUEST)
        async with asyncio.timeout(WAIT_S):
            await honest.until(lambda: len(honest.replies(stream_id)) == 2, "the other peer's answer")
        await stalled.close()
