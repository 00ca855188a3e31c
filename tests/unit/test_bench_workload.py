"""The prompts and messages of the load, and the stand-in model servers."""

import json

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bench import metrics_stub
from bench.exchange import GrpcMessages
from bench.workload import MESSAGE_BODY_BYTES_MAX, Workload
from epp._pb import epp_ext_proc_pb2 as pb


def _messages(conversation):
    return [pb.ProcessingRequest.FromString(message) for message in GrpcMessages().feed(conversation.request)]


@pytest.mark.parametrize("prompt_kb", [1, 16, 64, 128])
@pytest.mark.parametrize("chunks", [1, 3])
def test_a_conversation_is_what_envoy_sends(prompt_kb, chunks):
    workload = Workload(prompt_kb, chunks, prefixes=2)
    for serial in range(3):
        conversation = workload.next_conversation()
        first, *bodies = _messages(conversation)
        assert first.request_headers.headers.headers[2].raw_value == b"POST"
        assert len(first.request_headers.headers.headers) == 15
        assert first.protocol_config.request_body_mode == pb.FULL_DUPLEX_STREAMED
        assert b"".join(message.request_body.body for message in bodies) == conversation.body
        assert [message.request_body.end_of_stream for message in bodies] == [False] * (len(bodies) - 1) + [True]
        assert bodies[-1].request_body.body == b""
        assert max(len(message.request_body.body) for message in bodies) <= MESSAGE_BODY_BYTES_MAX
        assert len(conversation.body) == prompt_kb * 1024
        request = json.loads(conversation.body)
        assert request["stream"] is (chunks > 1)
        assert request["messages"][1]["content"].startswith(f"{serial:016d}")


def test_half_of_a_prompt_is_shared_and_the_rest_is_new():
    workload = Workload(16, 1, prefixes=2)
    first, other, again = (json.loads(workload.next_conversation().body)["messages"] for _ in range(3))
    assert first[0] == again[0] != other[0]
    assert first[1] != again[1]
    assert 0.45 < len(first[0]["content"]) / (16 * 1024) < 0.55


def test_cases_do_not_share_prompts():
    first, other = (json.loads(Workload(1, chunks, prefixes=1).next_conversation().body) for chunks in (1, 100))
    assert first["messages"][0] != other["messages"][0]


def test_a_prompt_too_small_for_its_frame_is_refused():
    with pytest.raises(ValueError, match="does not hold"):
        Workload(0, 1)


def test_one_chunk_is_a_json_answer_with_usage():
    whole, end = Workload(1, 1, prefixes=1).response
    assert json.loads(whole.body)["usage"]["prompt_tokens"] == 241
    assert (whole.last, end.body, end.last) == (False, b"", True)


def test_many_chunks_are_server_sent_events():
    *events, end = Workload(1, 100, prefixes=1).response
    assert len(events) == 100
    assert 150 < sum(len(event.body) for event in events) / 100 < 260
    assert all(event.body.startswith(b"data: {") and event.body.endswith(b"}\n\n") for event in events[:-1])
    last, done = events[-1].body.split(b"\n\n")[:2]
    assert json.loads(last.removeprefix(b"data: "))["usage"]["completion_tokens"] == 99
    assert done == b"data: [DONE]"
    assert end.last


def test_the_metrics_text_has_the_size_and_names_of_a_real_one():
    text = metrics_stub.exposition(3).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert 55_000 < len(text) < 75_000
    assert families["vllm:num_requests_running"].samples[0].value == 4.0
    assert families["vllm:kv_cache_usage_perc"].samples[0].value == pytest.approx(0.33)
    assert families["vllm:cache_config_info"].samples[0].labels["block_size"] == "16"
    assert families["vllm:time_to_first_token_seconds"].type == "histogram"
    assert text.count("# TYPE") == len({line for line in text.splitlines() if line.startswith("# TYPE")})


async def test_every_port_of_the_stub_serves_metrics_that_change():
    runner, ports = await metrics_stub.start(3)
    try:
        async with aiohttp.ClientSession() as session:
            texts = []
            for port in ports:
                async with session.get(f"http://127.0.0.1:{port}/metrics") as response:
                    assert response.content_type == "text/plain"
                    texts.append(await response.text())
    finally:
        await runner.cleanup()
    assert len(set(ports)) == len(set(texts)) == 3
