"""What clients send arrives, and what engines answer comes back: through a real Envoy and the picker, byte for byte."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from itertools import pairwise

import pytest
from echo_engine import EVENTS, blob
from http_clients import MODEL, TIMEOUT_S, Answer, Http1, Http2, ask, chat, scrape, until_idle, until_metrics
from programs import EchoEngine, Engines, Gateway

from epp.types import Address

pytestmark = pytest.mark.e2e

CHAT = "/v1/chat/completions"
BIG_BYTES = 5 << 20
INFLIGHT = "llm_d_epp_inflight_requests"


def big_chat() -> bytes:
    """A chat request of a little over `BIG_BYTES`, without repetition."""
    return chat("".join(hashlib.sha256(b"%d" % index).hexdigest() for index in range(BIG_BYTES // 64)))


def assert_echoed(answer: Answer, body: bytes, method: str = "POST", path: str = CHAT) -> dict[str, str]:
    """That the engine got exactly this; returns the headers it got."""
    assert answer.status == 200, answer
    said = answer.json
    assert (said["method"], said["path"]) == (method, path)
    assert said["length"] == len(body)
    assert said["sha256"] == hashlib.sha256(body).hexdigest()
    headers: dict[str, str] = dict(said["headers"])
    return headers


# --- what comes back


async def test_a_chat_is_answered_by_an_engine(gateway: Gateway, engines: Engines) -> None:
    answer = await ask(gateway.address, CHAT, chat("Hello", max_tokens=5))
    assert answer.status == 200, answer
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.engine in map(str, engines.addresses)
    said = answer.json
    assert said["object"] == "chat.completion"
    assert said["usage"]["completion_tokens"] == 5
    assert len(said["choices"][0]["message"]["content"]) == 5 * 4


async def test_a_stream_arrives_as_the_engine_sends_it(gateway: Gateway) -> None:
    body = chat("Tell me more. " * 300, max_tokens=30, stream=True, stream_options={"include_usage": True})
    headers = {"x-request-id": "same-for-both"}
    first = await ask(gateway.address, CHAT, body, headers)
    engine = Address.parse(first.engine)
    direct = await ask(engine, CHAT, body, headers)  # its prompt is cached by now
    through = await ask(gateway.address, CHAT, body, headers)
    assert through.engine == first.engine, "the engine that has the prompt cached was passed over"
    assert through.headers["content-type"] == direct.headers["content-type"]
    created = re.compile(rb'"created":\d+')
    assert len(created.findall(direct.body)) > 30
    assert created.sub(b"", through.body) == created.sub(b"", direct.body)
    events = through.body.split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    assert json.loads(events[-3].removeprefix(b"data: "))["usage"]["completion_tokens"] == 30


@pytest.mark.parametrize("client_type", [Http1, Http2])
async def test_events_cut_anywhere_arrive_byte_for_byte(echo_gateway: Gateway, client_type: type[Http1 | Http2]) -> None:
    async with client_type(echo_gateway.address) as client:
        answer = await client.request("POST", CHAT + "?say=events", chat("x", stream=True))
    assert answer.status == 200
    assert answer.body == b"".join(EVENTS)


async def test_a_streamed_token_is_not_held_back(gateway: Gateway) -> None:
    """The first token is here while the engine still works on the rest: four seconds of it."""
    async with Http1(gateway.address) as client, asyncio.timeout(TIMEOUT_S):
        await client.send("POST", CHAT, chat("Take your time", max_tokens=500, stream=True))
        assert await client.head() == 200
        pieces = client.pieces()
        assert (await anext(pieces)).startswith(b"data: ")
        engine = await scrape(Address.parse(client.headers["x-inference-endpoint"]))
        assert engine.sum("vllm:num_requests_running") == 1
        await pieces.aclose()


async def test_usage_cut_in_two_is_still_counted(echo_gateway: Gateway) -> None:
    before = await scrape(echo_gateway.metrics)
    await ask(echo_gateway.address, CHAT + "?say=events", chat("x", stream=True))
    name = "llm_d_epp_request_output_tokens_sum"
    await until_metrics(echo_gateway.metrics, lambda now: now.sum(name) - before.sum(name) == 7, "7 more tokens out")


@pytest.mark.parametrize("client_type", [Http1, Http2])
async def test_a_large_answer_arrives_byte_for_byte(echo_gateway: Gateway, client_type: type[Http1 | Http2]) -> None:
    async with client_type(echo_gateway.address) as client:
        answer = await client.request("GET", f"/v1/files?say=bytes&count={BIG_BYTES}")
    assert answer.status == 200
    assert answer.body == blob(BIG_BYTES)


async def test_an_answer_without_a_body_stays_without(echo_gateway: Gateway) -> None:
    async with Http1(echo_gateway.address) as client:
        for _ in range(2):  # the second tells whether the first left anything behind
            answer = await client.request("POST", CHAT + "?say=nothing", chat("x"))
            assert (answer.status, answer.body) == (204, b"")


async def test_models_are_listed(gateway: Gateway) -> None:
    answer = await ask(gateway.address, "/v1/models")
    assert answer.status == 200
    assert [model["id"] for model in answer.json["data"]] == [MODEL]


# --- what arrives


async def test_five_megabytes_with_a_length_arrive_byte_for_byte(echo_gateway: Gateway) -> None:
    body = big_chat()
    headers = assert_echoed(await ask(echo_gateway.address, CHAT, body, {"content-type": "application/json"}), body)
    assert headers["content-type"] == "application/json"


async def test_five_megabytes_in_chunks_arrive_byte_for_byte(echo_gateway: Gateway) -> None:
    body = big_chat()
    cuts = [0, 1, 70_000, 70_001, 2_000_000, len(body)]
    async with Http1(echo_gateway.address) as client:
        answer = await client.request("POST", CHAT, chunks=[body[start:end] for start, end in pairwise(cuts)])
    assert_echoed(answer, body)


async def test_five_megabytes_over_http2_arrive_byte_for_byte(echo_gateway: Gateway) -> None:
    body = big_chat()
    async with Http2(echo_gateway.address) as client:
        assert_echoed(await client.request("POST", CHAT, body), body)


async def test_a_body_with_trailers_arrives_byte_for_byte(echo: EchoEngine) -> None:
    body = big_chat()
    with Gateway((echo.address,), "--destination", "original-dst") as gateway:
        async with Http2(gateway.address) as client:
            assert_echoed(await client.request("POST", CHAT, body, trailers=True), body)


@pytest.mark.xfail(strict=True, reason="Envoy 1.40 hands a body on twice if trailers end it and its route has a retry policy")
async def test_a_body_with_trailers_arrives_byte_for_byte_where_envoy_may_retry(echo_gateway: Gateway) -> None:
    body = big_chat()
    async with Http2(echo_gateway.address) as client:
        assert_echoed(await client.request("POST", CHAT, body, trailers=True), body)


async def test_a_client_that_asks_before_it_sends_is_told_to_go_on(echo_gateway: Gateway) -> None:
    """`Expect: 100-continue`, as curl does with a large body."""
    body = big_chat()
    async with Http1(echo_gateway.address) as client, asyncio.timeout(TIMEOUT_S):
        await client.send("POST", CHAT, headers={"content-length": str(len(body)), "expect": "100-continue"})
        assert await client.informational() == 100
        await client.send_raw(body)
        status = await client.head()
        assert_echoed(Answer(status, client.headers, await client.rest()), body)


async def test_a_body_that_trickles_in_arrives_whole(echo_gateway: Gateway) -> None:
    body = chat("drop by drop")
    async with Http1(echo_gateway.address) as client, asyncio.timeout(TIMEOUT_S):
        await client.send("POST", CHAT, headers={"transfer-encoding": "chunked"})
        for index in range(len(body)):
            await client.send_chunk(body[index : index + 1])
        await client.send_raw(b"0\r\n\r\n")
        status = await client.head()
        assert_echoed(Answer(status, client.headers, await client.rest()), body)


async def test_a_body_nobody_understands_arrives_byte_for_byte(echo_gateway: Gateway) -> None:
    body = bytes(range(256)) * 1000
    assert_echoed(await ask(echo_gateway.address, "/v1/audio/transcriptions", body), body, path="/v1/audio/transcriptions")


async def test_an_empty_chunked_body_arrives_empty(echo_gateway: Gateway) -> None:
    async with Http1(echo_gateway.address) as client, asyncio.timeout(TIMEOUT_S):
        await client.send("POST", "/v1/audio/transcriptions", headers={"transfer-encoding": "chunked"})
        await client.send_raw(b"0\r\n\r\n")
        status = await client.head()
        assert_echoed(Answer(status, client.headers, await client.rest()), b"", path="/v1/audio/transcriptions")


@pytest.mark.parametrize("client_type", [Http1, Http2])
async def test_a_get_keeps_its_query(echo_gateway: Gateway, client_type: type[Http1 | Http2]) -> None:
    path = "/v1/responses/resp_1?after=%C3%BC&stream=a+b"
    async with client_type(echo_gateway.address) as client:
        assert_echoed(await client.request("GET", path), b"", method="GET", path=path)


async def test_a_head_is_answered_without_a_body(echo_gateway: Gateway) -> None:
    async with Http1(echo_gateway.address) as client:
        answer = await client.request("HEAD", "/v1/models")
        assert answer.status == 200
        assert_echoed(await client.request("GET", "/v1/models"), b"", method="GET", path="/v1/models")  # nothing of a body was left behind


async def test_every_request_has_an_id_and_a_client_s_own_is_kept(echo_gateway: Gateway) -> None:
    body = chat("x")
    own = assert_echoed(await ask(echo_gateway.address, CHAT, body, {"x-request-id": "mine"}), body)
    made = assert_echoed(await ask(echo_gateway.address, CHAT, body), body)
    assert own["x-request-id"] == "mine"
    assert len(made["x-request-id"]) == 36


async def test_an_engine_s_rejection_reaches_the_client(gateway: Gateway) -> None:
    answer = await ask(gateway.address, CHAT, chat("x", max_tokens=-1))
    assert answer.status == 400
    assert answer.engine


async def test_a_model_no_engine_has_is_a_404_of_the_pickers(gateway: Gateway) -> None:
    answer = await ask(gateway.address, CHAT, chat("x", model="no/such-model"))
    assert answer.status == 404
    assert not answer.engine
    assert answer.json["error"]["code"] == "model_not_found"
    assert "no/such-model" in answer.json["error"]["message"]


async def test_without_response_bodies_a_stream_is_whole_and_no_error_is_counted(engines: Engines) -> None:
    """`--no-response-body`: Envoy ends the picker's stream with the response headers, which is nobody's error."""
    with Gateway(engines.addresses, "--no-response-body") as gateway:
        answer = await ask(gateway.address, CHAT, chat("Tell me", max_tokens=50, stream=True))
        assert answer.body.endswith(b"data: [DONE]\n\n")
        assert (await ask(gateway.address, CHAT, chat("x"))).status == 200
        samples = await until_idle(gateway.metrics)
        assert samples.sum("llm_d_epp_request_total") == 2
        assert samples.sum("llm_d_epp_request_error_total") == 0


# --- clients that leave


async def test_a_client_that_leaves_mid_stream_frees_its_engine_and_its_place(gateway: Gateway) -> None:
    async with Http1(gateway.address) as client, asyncio.timeout(TIMEOUT_S):
        await client.send("POST", CHAT, chat("A long story", max_tokens=20_000, stream=True))
        assert await client.head() == 200
        await anext(client.pieces())
        engine = Address.parse(client.headers["x-inference-endpoint"])
        aborted = (await scrape(engine)).sum("vllm:request_success_total", finished_reason="abort")
        assert (await scrape(gateway.metrics)).sum(INFLIGHT) == 1
    await until_idle(gateway.metrics)
    left = await until_metrics(engine, lambda now: now.sum("vllm:num_requests_running") == 0, "the engine has stopped working on it")
    assert left.sum("vllm:request_success_total", finished_reason="abort") == aborted + 1


async def test_a_client_that_leaves_before_the_first_token_frees_its_engine_and_its_place(gateway: Gateway) -> None:
    before = await scrape(gateway.metrics)
    async with Http1(gateway.address) as client:
        await client.send("POST", CHAT, chat("All at once", max_tokens=20_000))
        await until_metrics(gateway.metrics, lambda now: now.sum(INFLIGHT) == 1, "the request is in flight")
    after = await until_idle(gateway.metrics)
    for engine in engines_of(gateway):
        await until_metrics(engine, lambda now: now.sum("vllm:num_requests_running") == 0, "the engine has stopped working on it")
    name = "llm_d_epp_request_error_total"
    assert after.sum(name, error_code="ClientDisconnected") - before.sum(name, error_code="ClientDisconnected") == 1


async def test_a_client_that_leaves_mid_upload_leaves_nothing_behind(gateway: Gateway) -> None:
    before = await scrape(gateway.metrics)
    async with Http1(gateway.address) as client:
        await client.send("POST", CHAT, headers={"content-length": "1000000"})
        await client.send_raw(b"x" * 500_000)
    answer = await ask(gateway.address, CHAT, chat("next"))
    assert answer.status == 200
    after = await until_idle(gateway.metrics)
    assert after.sum("llm_d_epp_request_total") - before.sum("llm_d_epp_request_total") == 1


async def test_a_cancelled_http2_stream_takes_no_other_with_it(gateway: Gateway) -> None:
    async with Http2(gateway.address) as client:
        cancelled = await client.start("POST", CHAT, chat("This one goes", max_tokens=20_000, stream=True))
        kept = await client.start("POST", CHAT, chat("This one stays", max_tokens=50, stream=True))
        await client.until_body(cancelled)
        await client.cancel(cancelled)
        answer = await client.until_ended(kept)
    assert answer.body.endswith(b"data: [DONE]\n\n")
    await until_idle(gateway.metrics)


def engines_of(gateway: Gateway) -> list[Address]:
    """The engines behind it."""
    flags = gateway.arguments
    return [Address.parse(flags[index + 1]) for index, flag in enumerate(flags) if flag == "--endpoint"]
