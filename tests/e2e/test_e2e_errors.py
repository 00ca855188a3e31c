"""What clients get wrong, and what the picker can't do, is told them in OpenAI's shape: through a real Envoy, whole, as JSON."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_clients import TIMEOUT_S, Answer, Http1, Http2, ask, chat, eventually, scrape
from programs import EchoEngine, Gateway

pytestmark = pytest.mark.e2e

CHAT = "/v1/chat/completions"
BODY_BYTES_MAX = 128 << 10
BUFFERED_BYTES_MAX = 192 << 10


@pytest.fixture(scope="module")
def gateway(echo: EchoEngine) -> Iterator[Gateway]:
    with Gateway((echo.address,), "--max-body-bytes", "128Ki", "--max-buffered-bytes", "192Ki") as program:
        yield program


def assert_error(answer: Answer, status: int, code: str, *, kind: str = "invalid_request_error") -> str:
    """The error's message."""
    assert answer.status == status, answer
    assert answer.headers["content-type"] == "application/json"
    error = answer.json["error"]
    assert answer.json == {"error": error}
    assert (error["type"], error["code"]) == (kind, code)
    message = error["message"]
    assert isinstance(message, str)
    assert message
    return message


@pytest.mark.parametrize(
    "body", [b"{", b"not json", b'{"model": "m", "messages": [}', b'{"model": "m", "messages": ' + b"[" * 5000, b'{"model": "\xff"}']
)
async def test_a_body_that_is_no_json_is_400(gateway: Gateway, body: bytes) -> None:
    assert_error(await ask(gateway.address, CHAT, body), 400, "bad_request")


@pytest.mark.parametrize("body", [b'{"messages": [{"role": "user", "content": "x"}]}', b'{"model": "", "messages": [{}]}', b"[1, 2]", b"7"])
async def test_a_body_without_a_model_is_400(gateway: Gateway, body: bytes) -> None:
    assert_error(await ask(gateway.address, CHAT, body), 400, "bad_request")


async def test_the_message_says_what_is_wrong(gateway: Gateway) -> None:
    answer = await ask(gateway.address, CHAT, b'{"messages": [{"role": "user", "content": "x"}]}')
    assert "model" in assert_error(answer, 400, "bad_request")


@pytest.mark.parametrize(("method", "path"), [("GET", "/favicon.ico"), ("POST", "/login"), ("GET", "/"), ("GET", "/?x=/v1/models")])
async def test_a_path_no_engine_serves_is_404(gateway: Gateway, method: str, path: str) -> None:
    answer = await ask(gateway.address, path, b"{}" if method == "POST" else None, method=method)
    assert_error(answer, 404, "not_found")


async def test_a_body_over_the_limit_is_413(gateway: Gateway) -> None:
    message = assert_error(await ask(gateway.address, CHAT, chat("x" * (BODY_BYTES_MAX + 1))), 413, "body_too_large")
    assert str(BODY_BYTES_MAX) in message


async def test_a_body_at_the_limit_passes(gateway: Gateway) -> None:
    body = chat("x" * (BODY_BYTES_MAX - len(chat(""))))
    assert len(body) == BODY_BYTES_MAX
    assert (await ask(gateway.address, CHAT, body)).json["length"] == BODY_BYTES_MAX
    assert_error(await ask(gateway.address, CHAT, body + b" "), 413, "body_too_large")


async def test_a_body_over_the_limit_is_413_while_it_is_still_sent(gateway: Gateway) -> None:
    """The client has not ended its body when it is told."""
    async with Http1(gateway.address) as client, asyncio.timeout(TIMEOUT_S):
        await client.send("POST", CHAT, headers={"transfer-encoding": "chunked"})
        for _ in range(5):
            await client.send_chunk(b"x" * (32 << 10))
        status = await client.head()
        assert_error(Answer(status, client.headers, await client.rest()), 413, "body_too_large")


async def test_a_body_over_the_limit_is_413_over_http2(gateway: Gateway) -> None:
    async with Http2(gateway.address) as client:
        assert_error(await client.request("POST", CHAT, b"x" * (BODY_BYTES_MAX + 1)), 413, "body_too_large")
        assert (await client.request("POST", CHAT, chat("next"))).status == 200  # on the same connection


async def test_more_bodies_than_the_picker_may_hold_are_503(gateway: Gateway) -> None:
    """Two clients that upload slowly have the buffers; the third is told to come again, and may when they are gone."""
    body = chat("x" * (BODY_BYTES_MAX // 2))
    before = await scrape(gateway.metrics)
    async with Http1(gateway.address) as first, Http1(gateway.address) as second:
        for client in (first, second):
            await client.send("POST", CHAT, headers={"transfer-encoding": "chunked"})
            await client.send_chunk(b"x" * (BUFFERED_BYTES_MAX // 2 - 1))
        answer = await until_status(gateway, body, 503)
        assert_error(answer, 503, "buffers_full", kind="service_unavailable_error")
        assert answer.headers["x-llm-d-request-dropped-reason"] == "rejected-saturated"
        after = await scrape(gateway.metrics)
        name = "epp_limit_hits_total"
        assert after.sum(name, limit="buffered_bytes_max") > before.sum(name, limit="buffered_bytes_max")
    assert (await until_status(gateway, body, 200)).json["length"] == len(body)


async def until_status(gateway: Gateway, body: bytes, status: int) -> Answer:
    answer = await ask(gateway.address, CHAT, body)

    async def ask_again() -> bool:
        nonlocal answer
        answer = await ask(gateway.address, CHAT, body)
        return answer.status == status

    await eventually(ask_again, f"status {status}")
    return answer


async def test_a_header_that_is_not_utf8_is_400(gateway: Gateway) -> None:
    async with Http1(gateway.address) as client, asyncio.timeout(TIMEOUT_S):
        await client.send_raw(b"GET /v1/models HTTP/1.1\r\nhost: x\r\nx-name: caf\xe9\r\n\r\n")
        status = await client.head()
        message = assert_error(Answer(status, client.headers, await client.rest()), 400, "bad_request")
    assert "x-name" in message


async def test_a_header_in_utf8_passes(gateway: Gateway) -> None:
    async with Http1(gateway.address) as client, asyncio.timeout(TIMEOUT_S):
        await client.send_raw("GET /v1/models HTTP/1.1\r\nhost: x\r\nx-name: café\r\n\r\n".encode())
        assert await client.head() == 200
        await client.rest()


async def test_fifty_kilobytes_of_headers_pass(gateway: Gateway) -> None:
    headers = {f"x-much-{index}": "x" * 600 for index in range(80)}
    received = dict((await ask(gateway.address, "/v1/models", headers=headers)).json["headers"])
    assert headers.items() <= received.items()


async def test_a_connection_goes_on_after_an_error(gateway: Gateway) -> None:
    async with Http1(gateway.address) as client:
        assert_error(await client.request("GET", "/nowhere"), 404, "not_found")
        assert (await client.request("POST", CHAT, chat("x"))).status == 200
    async with Http2(gateway.address) as http2:  # on HTTP/1.1, Envoy closes where it answers a request with a body itself
        assert_error(await http2.request("POST", CHAT, b"{"), 400, "bad_request")
        assert (await http2.request("POST", CHAT, chat("x"))).status == 200


async def test_errors_are_counted_and_none_stays_in_flight(gateway: Gateway) -> None:
    before = await scrape(gateway.metrics)
    await ask(gateway.address, CHAT, b"{")
    await ask(gateway.address, "/nowhere")
    after = await scrape(gateway.metrics)
    name = "llm_d_epp_request_error_total"
    for code in ("BadRequest", "NotFound"):
        assert after.sum(name, error_code=code) - before.sum(name, error_code=code) == 1
    assert after.sum("llm_d_epp_inflight_requests") == 0
    assert after.sum("llm_d_epp_request_running") == 0


async def test_a_pool_without_endpoints_is_503_until_one_comes(echo: EchoEngine, tmp_path: Path) -> None:
    file = tmp_path / "endpoints.yaml"
    file.write_text("endpoints: []\n")
    with Gateway((), "--endpoints-file", str(file), "--destination", "original-dst") as gateway:
        answer = await ask(gateway.address, CHAT, chat("x"))
        assert_error(answer, 503, "no_endpoints", kind="service_unavailable_error")
        assert answer.headers["x-llm-d-request-dropped-reason"] == "rejected-no-endpoints"
        file.write_text(f"endpoints:\n- {{name: a, address: {echo.address.host}, port: {echo.address.port}}}\n")
        assert (await until_status(gateway, chat("x"), 200)).json["path"] == CHAT
