"""The simulated servers over real HTTP, and their pacing on a virtual event loop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import selectors
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from epp.errors import ConfigError, StartError
from epp.sim.engine import Engine, EngineProfile
from epp.sim.exposition import EngineMetrics
from epp.sim.pacing import LAG_FORGIVEN_S, WAKE_AT_END, Pacer
from epp.sim.server import SimOptions, SimServer, add_sim_arguments, running_engines, serve_engines, sim_options

FAST = SimOptions(model="tiny", time_scale=100.0)
SLOW = SimOptions(model="tiny", time_scale=1.0)
"""Slow enough that 2000 tokens are not over before a test has looked."""

# As vLLM 0.32 sent them.
RECORDED_CHAT_STREAM = """\
data: {"id":"chatcmpl-bf75a0ccc4e9dc98","object":"chat.completion.chunk","created":1795227461,"model":"tiny","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}],"prompt_token_ids":null,"prompt_text":null}

data: {"id":"chatcmpl-bf75a0ccc4e9dc98","object":"chat.completion.chunk","created":1795227461,"model":"tiny","choices":[{"index":0,"delta":{"content":"on"},"logprobs":null,"finish_reason":null,"token_ids":null}]}

data: {"id":"chatcmpl-bf75a0ccc4e9dc98","object":"chat.completion.chunk","created":1795227461,"model":"tiny","choices":[{"index":0,"delta":{"content":" '<"},"logprobs":null,"finish_reason":null,"token_ids":null}]}

data: {"id":"chatcmpl-bf75a0ccc4e9dc98","object":"chat.completion.chunk","created":1795227461,"model":"tiny","choices":[{"index":0,"delta":{"content":"pa"},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null}]}

data: {"id":"chatcmpl-bf75a0ccc4e9dc98","object":"chat.completion.chunk","created":1795227461,"model":"tiny","choices":[],"usage":{"prompt_tokens":14,"total_tokens":17,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":0,"created_cache_tokens":0}},"system_fingerprint":"vllm-0.32.0-60f5a610"}

data: [DONE]

"""
RECORDED_COMPLETION_STREAM = """\
data: {"id":"cmpl-98b2c0933a65677a","object":"text_completion","created":1795227461,"model":"tiny","choices":[{"index":0,"text":"E","logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]}

data: {"id":"cmpl-98b2c0933a65677a","object":"text_completion","created":1795227461,"model":"tiny","choices":[{"index":0,"text":"ys","logprobs":null,"finish_reason":null,"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]}

data: {"id":"cmpl-98b2c0933a65677a","object":"text_completion","created":1795227461,"model":"tiny","choices":[{"index":0,"text":"ffe","logprobs":null,"finish_reason":"length","stop_reason":null,"prompt_token_ids":null,"token_ids":null}]}

data: {"id":"cmpl-98b2c0933a65677a","object":"text_completion","created":1795227461,"model":"tiny","choices":[],"usage":{"prompt_tokens":3,"total_tokens":6,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":0}},"system_fingerprint":"vllm-0.32.0-60f5a610"}

data: [DONE]

"""
RECORDED_COMPLETION = '{"id":"cmpl-bf5d899100cc5570","object":"text_completion","created":1795227300,"model":"tiny","choices":[{"index":0,"text":"bjal","logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null,"prompt_logprobs":null,"prompt_token_ids":null,"routed_experts":null}],"service_tier":null,"system_fingerprint":"vllm-0.32.0-60f5a610","usage":{"prompt_tokens":163,"total_tokens":171,"completion_tokens":8,"prompt_tokens_details":{"cached_tokens":0,"created_cache_tokens":null,"multimodal_tokens":null},"completion_tokens_details":null},"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}'
RECORDED_CHAT = '{"id":"chatcmpl-be6bfa4da3f8da8b","object":"chat.completion","created":1795227300,"model":"tiny","choices":[{"index":0,"message":{"role":"assistant","content":"abs","refusal":null,"annotations":null,"audio":null,"function_call":null,"reasoning":null},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null,"routed_experts":null}],"service_tier":null,"system_fingerprint":"vllm-0.32.0-60f5a610","usage":{"prompt_tokens":171,"total_tokens":179,"completion_tokens":8,"prompt_tokens_details":{"cached_tokens":0,"created_cache_tokens":160,"multimodal_tokens":null},"completion_tokens_details":null},"prompt_logprobs":null,"prompt_token_ids":null,"prompt_text":null,"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}'


class Client:
    """One server and a session to talk to it."""

    def __init__(self, server: SimServer, session: aiohttp.ClientSession) -> None:
        self.server = server
        self.session = session

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.session.post(path, data=data) as response:
            assert response.headers["x-inference-endpoint"] == f"127.0.0.1:{self.server.port}"
            return response.status, await response.json()

    async def ok(self, path: str, body: Any) -> Any:
        status, answer = await self.post(path, body)
        assert status == 200, answer
        return answer

    async def stream(self, path: str, body: dict[str, Any]) -> str:
        async with self.session.post(path, json={**body, "stream": True}) as response:
            assert response.status == 200
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            return (await response.read()).decode()

    async def samples(self) -> dict[str, float]:
        """Each sample of the metrics page under `name` or `name{reason}`."""
        async with self.session.get("/metrics") as response:
            assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
            page = await response.text()
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                assert sample.labels["engine"] == "0"
                detail = sample.labels.get("finished_reason") or sample.labels.get("sleep_state") or sample.labels.get("le")
                found[sample.name + (f"{{{detail}}}" if detail else "")] = sample.value
        return found


Start = Callable[[SimOptions], Awaitable[Client]]


@pytest_asyncio.fixture(loop_scope="function")
async def start() -> AsyncIterator[Start]:
    async with contextlib.AsyncExitStack() as stack:

        async def started(options: SimOptions) -> Client:
            server = SimServer(options)
            await server.start("127.0.0.1", 0)
            stack.push_async_callback(server.stop)
            session = await stack.enter_async_context(aiohttp.ClientSession(f"http://{server.address}"))
            return Client(server, session)

        yield started


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - the other side of a socket sets no event
            await asyncio.sleep(0.002)


def events(stream: str) -> list[dict[str, Any]]:
    assert stream.endswith("\n\ndata: [DONE]\n\n")
    lines = stream.removesuffix("data: [DONE]\n\n").split("\n\n")
    assert lines.pop() == ""
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def shape(value: Any) -> Any:
    """Keys, in order, and where a value must not differ, the value."""
    if isinstance(value, dict):
        return [(key, shape(inner)) for key, inner in value.items()]
    if isinstance(value, list):
        return [shape(inner) for inner in value]
    return value if value is None or value in {"length", "assistant", "tiny", "text_completion"} else type(value)


class TestReplies:
    @pytest.mark.parametrize(
        ("path", "body", "recorded"),
        [
            ("/v1/completions", {"prompt": "x" * 12}, RECORDED_COMPLETION_STREAM),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}, RECORDED_CHAT_STREAM),
        ],
    )
    async def test_stream_is_shaped_as_recorded(self, start: Start, path: str, body: dict[str, Any], recorded: str) -> None:
        client = await start(FAST)
        body = {**body, "model": "tiny", "max_tokens": 3, "stream_options": {"include_usage": True}, "no such field": 1}
        got = await client.stream(path, body)
        assert shape(events(got)) == shape(events(recorded))
        assert got.count("data: ") == recorded.count("data: ")
        assert {event["id"] for event in events(got)} == {events(got)[0]["id"]}

    @pytest.mark.parametrize(
        ("path", "body", "recorded"),
        [
            ("/v1/completions", {"prompt": "x" * 12}, RECORDED_COMPLETION),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}, RECORDED_CHAT),
        ],
    )
    async def test_whole_reply_is_shaped_as_recorded(self, start: Start, path: str, body: dict[str, Any], recorded: str) -> None:
        client = await start(FAST)
        got = await client.ok(path, {**body, "model": "tiny", "max_tokens": 8})
        assert shape(got) == shape(json.loads(recorded))

    async def test_streamed_and_whole_text_are_the_same(self, start: Start) -> None:
        client = await start(FAST)
        body = {"prompt": "Once upon a time", "max_tokens": 25}
        whole = (await client.ok("/v1/completions", body))["choices"][0]["text"]
        streamed = [event["choices"][0]["text"] for event in events(await client.stream("/v1/completions", body))]
        assert "".join(streamed) == whole
        assert len(streamed) == 25
        assert len(whole) == 100

    async def test_no_usage_event_unless_asked(self, start: Start) -> None:
        client = await start(FAST)
        assert all(event["choices"] for event in events(await client.stream("/v1/completions", {"prompt": "x"})))

    async def test_second_turn_hits_what_the_first_computed(self, start: Start) -> None:
        client = await start(FAST)
        messages = [{"role": "system", "content": "You are terse. " * 20}, {"role": "user", "content": "What is a KV cache?"}]
        first = await client.ok("/v1/chat/completions", {"messages": messages, "max_tokens": 40})
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        said = first["choices"][0]["message"]["content"]
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "And a block?"}]
        second = await client.ok("/v1/chat/completions", {"messages": messages, "max_tokens": 1})
        computed_bytes = len("system" + "You are terse. " * 20 + "user" + "What is a KV cache?" + "assistant") + 39 * 4
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == computed_bytes // 64 * 16
        assert computed_bytes // 64 > len(messages[0]["content"]) // 64  # deeper than the system prompt

    async def test_content_parts_and_tools_are_part_of_the_prompt(self, start: Start) -> None:
        client = await start(FAST)
        parts = [{"type": "text", "text": "a" * 40}, {"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "b" * 40}]
        body = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": None}], "max_completion_tokens": 2}
        plain = await client.ok("/v1/chat/completions", body)
        assert plain["usage"] | {"prompt_tokens_details": 0} == {
            "prompt_tokens": (len("user") + 80 + len("assistant") * 2 + 3) // 4,
            "completion_tokens": 2,
            "total_tokens": 28,
            "prompt_tokens_details": 0,
            "completion_tokens_details": None,
        }
        tools = [{"type": "function"}]
        with_tools = await client.ok("/v1/chat/completions", {**body, "tools": tools})
        assert with_tools["usage"]["prompt_tokens"] == (102 + len(json.dumps(tools)) + 3) // 4

    async def test_a_batch_of_prompts_is_a_choice_each_and_usage_sums(self, start: Start) -> None:
        client = await start(FAST)
        body = {"prompt": ["one!", "two!two!"], "max_tokens": 5}
        whole = await client.ok("/v1/completions", body)
        assert [choice["index"] for choice in whole["choices"]] == [0, 1]
        assert (whole["usage"]["prompt_tokens"], whole["usage"]["completion_tokens"]) == (3, 10)
        texts = {0: "", 1: ""}
        for event in events(await client.stream("/v1/completions", body)):
            texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
        assert [texts[0], texts[1]] == [choice["text"] for choice in whole["choices"]]

    async def test_token_ids_are_counted_and_cached_exactly(self, start: Start) -> None:
        client = await start(FAST)
        tokens = list(range(1000, 1040))
        assert (await client.ok("/v1/completions", {"prompt": tokens}))["usage"]["prompt_tokens"] == 40
        again = await client.ok("/v1/completions", {"prompt": [tokens, [1, 2]]})
        assert again["usage"]["prompt_tokens"] == 42
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 32

    async def test_tokens_per_chunk_coalesces_all_but_the_first(self, start: Start) -> None:
        client = await start(SimOptions(time_scale=1.0, tokens_per_chunk=4, profile=EngineProfile(step_base_s=2e-3)))
        stream = events(await client.stream("/v1/completions", {"prompt": "x", "max_tokens": 10}))
        lengths = [len(event["choices"][0]["text"]) // 4 for event in stream]
        assert lengths[0] == 1
        assert sum(lengths) == 10
        assert all(length >= 4 for length in lengths[1:-1])
        assert len(lengths) <= 4

    async def test_request_id_names_the_reply(self, start: Start) -> None:
        client = await start(FAST)
        async with client.session.post("/v1/completions", json={"prompt": "x"}, headers={"x-request-id": 'abc-"1"'}) as response:
            assert (await response.json())["id"] == 'cmpl-abc-"1"'


class TestErrors:
    @pytest.mark.parametrize(
        ("path", "body"),
        [
            ("/v1/completions", b"{"),
            ("/v1/completions", b"\xff\xfe"),
            ("/v1/completions", b'{"prompt": "\xff"}'),
            ("/v1/completions", {"model": "tiny"}),
            ("/v1/completions", {"prompt": []}),
            ("/v1/completions", {"prompt": ["a", 1]}),
            ("/v1/completions", {"prompt": [-1]}),
            ("/v1/completions", {"prompt": "x", "max_tokens": 0}),
            ("/v1/completions", {"prompt": "x", "max_tokens": "many"}),
            ("/v1/chat/completions", {"messages": []}),
            ("/v1/chat/completions", {"messages": [{"content": "no role"}]}),
        ],
    )
    async def test_bad_request(self, start: Start, path: str, body: Any) -> None:
        client = await start(FAST)
        status, answer = await client.post(path, body)
        assert status == 400
        assert (answer["error"]["type"], answer["error"]["code"]) == ("BadRequestError", 400)
        assert answer["error"]["message"]
        assert not client.server.engine.busy

    async def test_unknown_model(self, start: Start) -> None:
        client = await start(FAST)
        assert await client.post("/v1/completions", {"model": "nope", "prompt": "x"}) == (
            404,
            {"error": {"message": "The model `nope` does not exist.", "type": "NotFoundError", "param": "model", "code": 404}},
        )

    async def test_too_long_prompt_or_reply(self, start: Start) -> None:
        client = await start(SimOptions(profile=EngineProfile(kv_blocks=5)))
        status, answer = await client.post("/v1/completions", {"prompt": "word" * 65, "max_tokens": 1})
        assert status == 400
        assert "maximum context length is 64 tokens. However, your prompt contains at least 65 input tokens" in answer["error"]["message"]
        status, answer = await client.post("/v1/completions", {"prompt": ["x", "word" * 60], "max_tokens": 5})
        assert status == 400
        assert "you requested 5 output tokens" in answer["error"]["message"]
        assert not client.server.engine.busy  # not even the prompt that fitted


class TestOtherRoutes:
    async def test_models_version_health(self, start: Start) -> None:
        client = await start(FAST)
        async with client.session.get("/v1/models") as response:
            (card,) = (await response.json())["data"]
        assert (card["id"], card["object"], card["max_model_len"]) == ("tiny", "model", 2047 * 16)
        async with client.session.get("/version") as response:
            assert (await response.json())["version"].startswith("0.32.0")
        async with client.session.get("/health") as response:
            assert (response.status, await response.read()) == (200, b"")

    async def test_reset_prefix_cache(self, start: Start) -> None:
        client = await start(FAST)
        body = {"prompt": "word" * 64, "max_tokens": 1}
        await client.ok("/v1/completions", body)
        assert (await client.ok("/v1/completions", body))["usage"]["prompt_tokens_details"]["cached_tokens"] == 48
        assert await client.ok("/reset_prefix_cache", b"") == {"success": True}
        assert (await client.ok("/v1/completions", body))["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


class TestMetrics:
    async def test_counts_after_two_requests(self, start: Start) -> None:
        client = await start(FAST)
        body = {"prompt": "word" * 40, "max_tokens": 6}
        await client.ok("/v1/completions", body)
        await client.ok("/v1/completions", body)
        samples = await client.samples()
        expected = {
            "vllm:num_requests_running": 0,
            "vllm:num_requests_waiting": 0,
            "vllm:kv_cache_usage_perc": 0,
            "vllm:prefix_cache_queries_total": 80,
            "vllm:prefix_cache_hits_total": 32,
            "vllm:prompt_tokens_total": 80,
            "vllm:generation_tokens_total": 12,
            "vllm:num_preemptions_total": 0,
            "vllm:request_success_total{length}": 2,
            "vllm:request_success_total{stop}": 0,
            "vllm:request_success_total{abort}": 0,
            "vllm:engine_sleep_state{awake}": 1,
            "vllm:time_to_first_token_seconds_count": 2,
            "vllm:time_to_first_token_seconds_bucket{+Inf}": 2,
            "vllm:time_to_first_token_seconds_bucket{0.005}": 0,
            "vllm:e2e_request_latency_seconds_count": 2,
            "vllm:request_queue_time_seconds_count": 2,
        }
        assert {name: samples[name] for name in expected} == expected

    async def test_gauges_while_busy(self, start: Start) -> None:
        client = await start(SimOptions(model='a "model"', profile=EngineProfile(max_running=2, kv_blocks=2048)))
        replies = [asyncio.ensure_future(client.ok("/v1/completions", {"prompt": "word" * 32, "max_tokens": 2000})) for _ in range(3)]
        await eventually(lambda: client.server.metrics.load.waiting == 1)
        samples = await client.samples()
        assert (samples["vllm:num_requests_running"], samples["vllm:num_requests_waiting"]) == (2, 1)
        assert 0 < samples["vllm:kv_cache_usage_perc"] < 0.01
        for reply in replies:
            reply.cancel()
        await asyncio.gather(*replies, return_exceptions=True)
        await eventually(lambda: client.server.metrics.finished["abort"] == 3)
        assert (await client.samples())["vllm:kv_cache_usage_perc"] == 0

    async def test_cache_config_info(self, start: Start) -> None:
        client = await start(SimOptions(model="tiny", profile=EngineProfile(kv_blocks=300, block_tokens=32)))
        async with client.session.get("/metrics") as response:
            page = await response.text()
        (info,) = [family for family in text_string_to_metric_families(page) if family.name == "vllm:cache_config_info"]
        assert info.samples[0].labels["block_size"] == "32"
        assert info.samples[0].labels["num_gpu_blocks"] == "300"
        assert 'vllm:num_requests_running{engine="0",model_name="tiny"} 0.0\n' in page  # label order and number format as recorded
        assert 'vllm:time_to_first_token_seconds_bucket{engine="0",le="0.001",model_name="tiny"} 0.0\n' in page


class TestDisconnect:
    @pytest.mark.parametrize("stream", [True, False])
    async def test_frees_the_request(self, start: Start, stream: bool) -> None:
        client = await start(SLOW)
        engine = client.server.engine
        async with aiohttp.ClientSession(f"http://{client.server.address}") as leaving:
            request = asyncio.ensure_future(leaving.post("/v1/completions", json={"prompt": "x", "max_tokens": 2000, "stream": stream}))
            await eventually(lambda: bool(engine.running))
            if stream:
                response = await request
                await response.content.readany()
                response.close()
            else:
                request.cancel()
                await asyncio.gather(request, return_exceptions=True)
        await eventually(lambda: not engine.busy)
        assert engine.cache.used == 0
        samples = await client.samples()
        assert samples["vllm:request_success_total{abort}"] == 1
        assert samples["vllm:num_requests_running"] == 0
        await eventually(lambda: client.server.idle)


class TestFaults:
    async def test_error_503(self, start: Start) -> None:
        client = await start(FAST)
        assert await client.ok("/admin/fail", {"mode": "error-503"}) == {"mode": "error-503"}
        status, answer = await client.post("/v1/completions", {"prompt": "x"})
        assert (status, answer["error"]["code"]) == (503, 503)
        async with client.session.get("/health") as response:
            assert response.status == 503
        await client.ok("/admin/fail", {"mode": "ok"})
        await client.ok("/v1/completions", {"prompt": "x"})

    async def test_refuse_metrics(self, start: Start) -> None:
        client = await start(FAST)
        client.server.fail("refuse-metrics")
        with pytest.raises(aiohttp.ClientConnectionError):
            await client.session.get("/metrics")
        await client.ok("/v1/completions", {"prompt": "x"})
        client.server.fail("ok")
        assert await client.samples()

    async def test_hang_metrics_goes_on_when_over(self, start: Start) -> None:
        client = await start(FAST)
        client.server.fail("hang-metrics")
        scrape = asyncio.ensure_future(client.samples())
        await client.ok("/v1/completions", {"prompt": "x"})
        assert not scrape.done()
        client.server.fail("ok")
        assert await scrape

    async def test_hang_freezes_streams_and_new_requests(self, start: Start) -> None:
        client = await start(SLOW)
        streaming = asyncio.ensure_future(client.stream("/v1/completions", {"prompt": "x", "max_tokens": 30}))
        await eventually(lambda: bool(client.server.engine.running))
        client.server.fail("hang")
        client.server.fail("hang")  # twice is as good as once
        queued = asyncio.ensure_future(client.ok("/v1/completions", {"prompt": "y"}))
        await eventually(lambda: bool(client.server.engine.waiting))
        assert client.server.idle
        await client.samples()  # still answers
        assert not streaming.done()
        client.server.fail("ok")
        assert len(events(await streaming)) == 30
        assert (await queued)["usage"]["completion_tokens"] == 16

    async def test_hang_of_an_idle_engine(self, start: Start) -> None:
        client = await start(FAST)
        client.server.fail("hang")
        queued = asyncio.ensure_future(client.ok("/v1/completions", {"prompt": "y"}))
        await eventually(lambda: client.server.engine.busy)
        client.server.fail("ok")
        await queued

    async def test_stop_drops_hung_requests(self, start: Start) -> None:
        client = await start(FAST)
        client.server.fail("hang")
        queued = asyncio.ensure_future(client.ok("/v1/completions", {"prompt": "y"}))
        await eventually(lambda: client.server.engine.busy)
        await client.server.stop()
        with pytest.raises(aiohttp.ClientConnectionError):
            await queued
        assert not client.server.engine.busy

    @pytest.mark.parametrize("body", [b"{", {"mode": "explode"}, {}])
    async def test_unknown_fault(self, start: Start, body: Any) -> None:
        client = await start(FAST)
        status, answer = await client.post("/admin/fail", body)
        assert (status, answer["error"]["code"]) == (400, 400)
        assert client.server.fault == "ok"


class VirtualLoop(asyncio.SelectorEventLoop):
    """Time moves only by waiting, and every timer fires `late_s` late."""

    def __init__(self, late_s: float) -> None:
        super().__init__(_LateSelector(self))
        self.now_s = 100.0
        self.late_s = late_s

    def time(self) -> float:
        return self.now_s


class _LateSelector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout:
            self._loop.now_s += timeout + self._loop.late_s
        return super().select(0)


def paced(late_s: float, time_scale: float, tokens: int, scenario: Callable[[Pacer], Awaitable[None]] | None = None) -> float:
    """Virtual seconds it takes to say `tokens` tokens."""

    async def run() -> float:
        engine = Engine(EngineProfile(prefill_token_s=0.0, decode_request_s=0.0, step_base_s=0.010))
        pacer = Pacer(engine, EngineMetrics(engine.profile, "m"), time_scale)
        assert pacer.idle
        start_s = loop.time()
        if scenario:
            await scenario(pacer)
        reply = pacer.submit([b"hello"], tokens, "", WAKE_AT_END)
        await reply.news()
        assert pacer.idle
        assert reply.parts[0].finished
        return loop.time() - start_s

    loop = VirtualLoop(late_s)
    try:
        return loop.run_until_complete(run())
    finally:
        loop.close()


class TestPacing:
    @pytest.mark.parametrize(("time_scale", "expected_s"), [(1.0, 10.0), (10.0, 1.0), (0.5, 20.0)])
    def test_time_is_scaled(self, time_scale: float, expected_s: float) -> None:
        assert paced(0.0, time_scale, 1000) == pytest.approx(expected_s, rel=1e-6)

    def test_lateness_does_not_add_up(self) -> None:
        assert 10.0 <= paced(0.004, 1.0, 1000) <= 10.005

    def test_results_are_told_when_the_step_ends(self) -> None:
        async def scenario(pacer: Pacer) -> None:
            reply = pacer.submit([b"hello"], 2, "", 1)
            assert pacer.engine.running[0].generated_tokens == 1  # the engine is ahead
            assert (reply.parts[0].known_tokens, pacer.metrics.generation_tokens) == (0, 0)
            await reply.news()
            assert (reply.parts[0].known_tokens, pacer.metrics.generation_tokens) == (1, 1)
            await reply.news()
            assert reply.parts[0].finished

        assert paced(0.0, 1.0, 10, scenario) == pytest.approx(0.020 + 0.100)

    def test_a_long_stall_is_forgiven(self) -> None:
        async def scenario(pacer: Pacer) -> None:
            reply = pacer.submit([b"hello"], 2, "", 1)
            loop = asyncio.get_running_loop()
            assert isinstance(loop, VirtualLoop)
            loop.now_s += LAG_FORGIVEN_S + 1.0  # the process was suspended
            await reply.news()
            stalled_s = loop.time()
            await reply.news()
            assert loop.time() - stalled_s == pytest.approx(0.010)  # a whole step, not a race

        paced(0.0, 1.0, 1, scenario)

    def test_an_abort_during_a_step_is_forgotten(self) -> None:
        async def scenario(pacer: Pacer) -> None:
            reply = pacer.submit([b"hello"], 2, "", 1)
            pacer.abort(reply)
            pacer.abort(reply)
            assert pacer.metrics.finished["abort"] == 1

        assert paced(0.0, 1.0, 5, scenario) == pytest.approx(0.060)  # queued behind the step that was under way

    def test_gauges_lag_a_step_behind_arrivals_and_never_behind_aborts(self) -> None:
        async def scenario(pacer: Pacer) -> None:
            first = pacer.submit([b"hello"], 9, "", 1)
            late = pacer.submit([b"a", b"b"], 9, "", 1)
            assert pacer.metrics.load == (0, 0, 0.0)
            await first.news()
            assert pacer.metrics.load[:2] == (1, 0)
            await late.news()
            assert pacer.metrics.load[:2] == (3, 0)
            pacer.abort(late)
            assert pacer.metrics.load[:2] == (1, 0)
            await first.news()
            assert pacer.metrics.load[:2] == (1, 0)
            pacer.abort(first)
            await asyncio.sleep(1)
            assert pacer.metrics.load == (0, 0, 0.0)

        paced(0.0, 1.0, 1, scenario)

    async def test_time_must_move(self) -> None:
        engine = Engine(EngineProfile())
        with pytest.raises(ValueError, match="time_scale"):
            Pacer(engine, EngineMetrics(engine.profile, "m"), 0.0)


class TestServeEngines:
    async def test_runs_until_sigterm_and_says_where(self, capsys: pytest.CaptureFixture[str]) -> None:
        serving = asyncio.ensure_future(serve_engines(SimOptions(port=0, count=2, model="tiny", time_scale=100.0)))
        lines: list[str] = []

        def both_listen() -> bool:
            lines.extend(capsys.readouterr().out.splitlines())
            return len(lines) == 2

        await eventually(both_listen)
        urls = [line.removeprefix("engine listening on ") for line in lines]
        texts = []
        async with aiohttp.ClientSession() as session:
            for url in urls:
                async with session.post(f"{url}/v1/completions", json={"prompt": "x"}) as response:
                    assert url == f"http://{response.headers['x-inference-endpoint']}"
                    texts.append((await response.json())["choices"][0]["text"])
        assert texts[0] != texts[1]  # each engine has its own seed
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(5):
            assert await serving == 0

    async def test_ctrl_c_is_exit_code_130(self, capsys: pytest.CaptureFixture[str]) -> None:
        serving = asyncio.ensure_future(serve_engines(SimOptions(port=0, model="tiny")))
        await eventually(lambda: "listening" in capsys.readouterr().out)
        os.kill(os.getpid(), signal.SIGINT)
        async with asyncio.timeout(5):
            assert await serving == 130

    async def test_a_port_in_use_is_one_clear_line_and_leaves_nothing_running(self) -> None:
        async with running_engines(SimOptions(port=0)) as (holder,):
            with pytest.raises(StartError, match=f"^port {holder.port} on 127.0.0.1 is in use: [^\n]+$"):
                await serve_engines(SimOptions(ports=(0, holder.port)))

    async def test_an_address_of_another_machine(self) -> None:
        with pytest.raises(StartError, match=r"^can't listen on 192\.0\.2\.1 port 0: "):
            await SimServer().start("192.0.2.1", 0)

    async def test_stop_before_start(self) -> None:
        server = SimServer()
        await server.stop()
        assert server.idle

    def test_ports(self) -> None:
        assert SimOptions(port=8000, count=3).engine_ports() == (8000, 8001, 8002)
        assert SimOptions(port=0, count=2).engine_ports() == (0, 0)
        assert SimOptions(ports=(1, 5)).engine_ports() == (1, 5)


class TestArguments:
    def parse(self, *argv: str) -> SimOptions:
        parser = argparse.ArgumentParser()
        add_sim_arguments(parser)
        return sim_options(parser.parse_args(argv))

    def test_none_given_is_the_default(self) -> None:
        assert self.parse() == SimOptions()

    def test_every_flag_arrives(self) -> None:
        flags = (
            "--host 127.0.0.2 --port 9 --count 2 --model m --time-scale 2.5 --tokens-per-chunk 3 --max-running 4 --max-batched-tokens 5 "
            "--kv-blocks 6 --block-tokens 7 --step-base-ms 8 --prefill-token-us 9 --decode-request-us 10 --seed 11"
        )
        assert self.parse(*flags.split()) == SimOptions(
            host="127.0.0.2", port=9, count=2, model="m", time_scale=2.5, tokens_per_chunk=3, seed=11,
            profile=EngineProfile(
                max_running=4, max_batched_tokens=5, kv_blocks=6, block_tokens=7, step_base_s=0.008, prefill_token_s=9e-6, decode_request_s=1e-5
            ),
        )  # fmt: skip

    def test_ports_of_all_engines_must_fit(self) -> None:
        with pytest.raises(ConfigError) as raised:
            self.parse("--count=3", "--port=65534", "--kv-events-port=65535", "--kv-events-replay-port=65533")
        assert [str(problem) for problem in raised.value.problems] == [
            "--port: 65534 for 3 engines goes beyond 65535",
            "--kv-events-port: 65535 for 3 engines goes beyond 65535",
        ]
        assert self.parse("--count=3", "--port=0", "--kv-events-port=0").engine_ports() == (0, 0, 0)

    @pytest.mark.parametrize(
        "flags", ["--count 0", "--kv-blocks 1", "--time-scale 0", "--time-scale nan", "--prefill-token-us -1", "--max-running some"]
    )
    def test_nonsense_is_refused(self, flags: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            self.parse(*flags.split())
        assert flags.split(maxsplit=1)[0] in capsys.readouterr().err


async def test_bytes_that_are_no_http_are_no_stack_trace_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    server = SimServer()
    await server.start("127.0.0.1", 0)
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
    finally:
        await server.stop()
    assert answer.startswith(b"HTTP/1.")
    assert not [record for record in caplog.records if record.exc_info]
