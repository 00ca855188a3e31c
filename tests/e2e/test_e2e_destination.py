"""Nobody outside chooses an endpoint: a client's own destination header never decides, however it is written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from http_clients import Http1, Http2, chat
from programs import LOOPBACK, EchoEngine, Gateway

from epp.types import Address

pytestmark = pytest.mark.e2e

NAME = "x-gateway-destination-endpoint"
SPELLINGS = (
    {NAME: "{decoy}"},
    {NAME.title(): "{decoy}"},
    {NAME: "{decoy},{decoy}", f"{NAME}-served": "{decoy}"},
    {f"{NAME}-subset": "{decoy}"},
    {"x-envoy-original-dst-host": "{decoy}", "x-forwarded-host": "{decoy}"},
)


class Decoy:
    """A server no request may reach; it keeps what it got instead of answering."""

    def __init__(self) -> None:
        self.address = Address(LOOPBACK, 0)
        self.connections = 0
        self.received = b""

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        received = await reader.read(1 << 16)
        self.received += received
        writer.close()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Decoy]:
        async with await asyncio.start_server(self._connected, LOOPBACK, 0) as server:
            self.address = Address(*server.sockets[0].getsockname()[:2])
            yield self


@pytest.fixture(scope="module", params=["override-host", "original-dst"])
def gateway(echo: EchoEngine, request: pytest.FixtureRequest) -> Iterator[Gateway]:
    with Gateway((echo.address,), "--destination", request.param) as program:
        yield program


@pytest.mark.parametrize("spelling", SPELLINGS)
async def test_a_client_s_own_destination_never_decides(gateway: Gateway, spelling: dict[str, str]) -> None:
    async with Decoy().serving() as decoy:
        headers = {name: value.format(decoy=decoy.address) for name, value in spelling.items()}
        async with Http1(gateway.address) as client:
            answers = [
                await client.request("POST", "/v1/chat/completions", chat("x"), headers),
                await client.request("GET", "/v1/models", headers=headers),
            ]
        async with Http2(gateway.address) as http2:
            lower = {name.lower(): value for name, value in headers.items()}
            answers.append(await http2.request("POST", "/v1/chat/completions", chat("x"), lower))
        for answer in answers:
            assert answer.status == 200, answer
            received = [value for name, value in answer.json["headers"] if name == NAME]
            assert str(decoy.address) not in received
        assert decoy.connections == 0


async def test_a_destination_written_twice_never_decides(gateway: Gateway) -> None:
    async with Decoy().serving() as decoy, Http1(gateway.address) as client, asyncio.timeout(30):
        await client.send_raw(
            f"GET /v1/models HTTP/1.1\r\nhost: x\r\n{NAME}: {decoy.address}\r\n{NAME.upper()}: {decoy.address}\r\n\r\n".encode()
        )
        assert await client.head() == 200
        assert str(decoy.address).encode() not in await client.rest()
        assert decoy.connections == 0


async def test_the_decoy_would_notice(echo: EchoEngine) -> None:
    """The proof above is worth something: a gateway that dials the decoy is seen."""
    async with Decoy().serving() as decoy:
        with Gateway((decoy.address,), "--destination", "original-dst") as gateway:
            async with Http1(gateway.address) as client:
                answer = await client.request("GET", "/v1/models")
            assert answer.status == 503
            assert b"GET /v1/models " in decoy.received  # beside the picker's own GET /metrics
