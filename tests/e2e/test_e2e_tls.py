"""`epp serve` as it is by default, with a certificate it made itself, behind an Envoy that speaks TLS to it: on both transports."""

from __future__ import annotations

import hashlib
import socket
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from echo_engine import EVENTS
from http_clients import ask, chat
from programs import EchoEngine, Picker, free_address

from epp.envoy import Destination, EnvoyOptions
from epp.envoy.supervisor import EnvoyProcess
from epp.extproc.tls import self_signed
from epp.types import Address

pytestmark = pytest.mark.e2e

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module", params=["h2", "grpc"])
def picker(echo: EchoEngine, request: pytest.FixtureRequest) -> Iterator[Picker]:
    with Picker((echo.address,), "--transport", request.param) as program:
        yield program


@pytest_asyncio.fixture
async def envoy(picker: Picker, echo: EchoEngine) -> AsyncIterator[Address]:
    options = EnvoyOptions(listen=free_address(), endpoints=(echo.address,), epp=picker.epp, epp_tls=True, concurrency=1)
    async with EnvoyProcess(options):
        yield options.listen


async def test_requests_pass_over_tls(envoy: Address) -> None:
    body = chat("x" * 1_000_000)
    said = (await ask(envoy, CHAT, body)).json
    assert said["sha256"] == hashlib.sha256(body).hexdigest()
    assert (await ask(envoy, CHAT + "?say=events", chat("x", stream=True))).body == b"".join(EVENTS)
    assert (await ask(envoy, CHAT, b"{")).json["error"]["code"] == "bad_request"
    assert (await ask(envoy, "/v1/models")).status == 200


async def test_requests_pass_over_tls_to_an_original_destination(picker: Picker) -> None:
    """As Envoy AI Gateway and the llm-d charts set it up: Envoy knows no endpoint."""
    options = EnvoyOptions(
        listen=free_address(), endpoints=(), epp=picker.epp, epp_tls=True, concurrency=1, destination=Destination.ORIGINAL_DST
    )
    async with EnvoyProcess(options):
        assert (await ask(options.listen, CHAT, chat("x"))).json["path"] == CHAT


def test_tls_is_modern_and_offers_http2(picker: Picker) -> None:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with socket.create_connection(picker.epp, timeout=10) as raw, context.wrap_socket(raw) as connection:
        assert connection.selected_alpn_protocol() == "h2"
        assert connection.version() == "TLSv1.3"


async def test_a_gateway_without_tls_gets_an_error_not_a_hang(picker: Picker, echo: EchoEngine) -> None:
    options = EnvoyOptions(listen=free_address(), endpoints=(echo.address,), epp=picker.epp, epp_tls=False, concurrency=1)
    async with EnvoyProcess(options, on_log=lambda _line: None):
        assert (await ask(options.listen, CHAT, chat("x"))).status == 500


async def test_a_given_certificate_is_served(echo: EchoEngine, tmp_path: Path) -> None:
    pair = self_signed()
    (tmp_path / "tls.crt").write_bytes(pair.certificate)
    (tmp_path / "tls.key").write_bytes(pair.key)
    with Picker((echo.address,), "--cert-path", str(tmp_path)) as picker:
        served = ssl.get_server_certificate(picker.epp, timeout=10)
        assert served.strip() == pair.certificate.decode().strip()
        options = EnvoyOptions(listen=free_address(), endpoints=(echo.address,), epp=picker.epp, epp_tls=True, concurrency=1)
        async with EnvoyProcess(options):
            assert (await ask(options.listen, CHAT, chat("x"))).status == 200
