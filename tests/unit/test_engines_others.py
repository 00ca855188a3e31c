"""The load of trtllm-serve, NIM, TGI, llama.cpp and Dynamo, from recorded and hand-written answers."""

from pathlib import Path

import pytest

from epp.datastore import Reading
from epp.engines.detect import BUILT_IN
from epp.engines.dynamo import Dynamo
from epp.engines.family import AsleepError, ReadingError
from epp.engines.llamacpp import LlamaCpp
from epp.engines.nim import Nim
from epp.engines.tgi import Tgi
from epp.engines.trtllm_serve import TrtLlmServe

DATA = Path(__file__).parent.parent / "data"
NONE: frozenset[str] = frozenset()

TRTLLM = b"""\
# HELP trtllm_num_requests_running Number of requests currently running
# TYPE trtllm_num_requests_running gauge
trtllm_num_requests_running{engine_type="pytorch",model_name="m"} 5.0
# TYPE trtllm_num_requests_waiting gauge
trtllm_num_requests_waiting{engine_type="pytorch",model_name="m"} 2.0
# TYPE trtllm_max_num_active_requests gauge
trtllm_max_num_active_requests{engine_type="pytorch",model_name="m"} 64.0
# TYPE trtllm_kv_cache_utilization gauge
trtllm_kv_cache_utilization{engine_type="pytorch",model_name="m"} 0.125
# TYPE trtllm_kv_cache_max_blocks gauge
trtllm_kv_cache_max_blocks{engine_type="pytorch",model_name="m"} 4096.0
# TYPE trtllm_kv_cache_tokens_per_block gauge
trtllm_kv_cache_tokens_per_block{engine_type="pytorch",model_name="m"} 32.0
"""


def recorded(name: str) -> bytes:
    return (DATA / f"{name}.txt").read_bytes()


def test_where_they_answer() -> None:
    special = {name: family.paths for name, family in BUILT_IN.items() if family.paths != ("/metrics",)}
    assert special == {"nim": ("/v1/metrics", "/metrics"), "trtllm-serve": ("/prometheus/metrics",)}


def test_trtllm_serve() -> None:
    assert TrtLlmServe().read(TRTLLM) == Reading(waiting=2.0, running=5.0, kv_usage=0.125, kv_block_tokens=32, kv_blocks=4096)


def test_trtllm_serve_says_json_at_the_other_path() -> None:
    with pytest.raises(ReadingError):
        TrtLlmServe().read(b'[{"numActiveRequests": 1, "numQueuedRequests": 2}]')


@pytest.mark.parametrize(
    ("text", "reading"),
    [
        (
            b'num_requests_running{m="m"} 3.0\nnum_requests_waiting{m="m"} 1.0\nnum_request_max{m="m"} 9\ngpu_cache_usage_perc{m="m"} 0.5\n',
            Reading(waiting=1.0, running=3.0, kv_usage=0.5),
        ),
        (TRTLLM, Reading(waiting=2.0, running=5.0, kv_usage=0.125, kv_block_tokens=32, kv_blocks=4096)),
        (
            recorded("triton-2.51-with-trtllm-names.SYNTHETIC-VALUES"),
            Reading(waiting=7.0, running=12.0, kv_usage=0.3499999940395355, kv_block_tokens=64, kv_blocks=1000),
        ),
        (
            b'vllm:num_requests_running{model_name="m"} 3.0\n',
            Reading(running=3.0, adapters_active=NONE, adapters_waiting=NONE),
        ),
    ],
    ids=["own names", "trtllm", "triton", "vllm"],
)
def test_nim(text: bytes, reading: Reading) -> None:
    assert Nim().read(text) == reading


def test_nim_asleep() -> None:
    with pytest.raises(AsleepError):
        Nim().read(recorded("vllm-0.32-metrics-asleep.excerpt"))


def test_nim_without_metrics() -> None:
    with pytest.raises(ReadingError, match="num_requests_waiting"):
        Nim().read(b"total_num_requests_running 1\n")


def test_tgi() -> None:
    text = b"# TYPE tgi_batch_current_size gauge\ntgi_batch_current_size 12\n# TYPE tgi_queue_size gauge\ntgi_queue_size 3\ntgi_request_count 99\n"
    assert Tgi().read(text) == Reading(waiting=3.0, running=12.0)


def test_llamacpp() -> None:
    # 4 deferred, 4 processing; prompts: 473 tokens computed and 900 found in the slots' caches = 1373 looked up
    assert LlamaCpp().read(recorded("llamacpp-b11434-metrics-busy")) == Reading(
        waiting=4.0, running=4.0, prefix_queries=1373.0, prefix_hits=900.0
    )


def test_llamacpp_of_old() -> None:
    text = b"llamacpp:kv_cache_usage_ratio 0.25\nllamacpp:requests_processing 1\nllamacpp:requests_deferred 0\nllamacpp:prompt_tokens_total 7\n"
    assert LlamaCpp().read(text) == Reading(waiting=0.0, running=1.0, kv_usage=0.25)


@pytest.mark.parametrize(
    ("name", "reading"),
    [
        # 10 in flight: 4 run and 6 wait
        ("worker1-busy", Reading(6.0, 4.0, 0.2109375, adapters_active=NONE, adapters_waiting=NONE)),
        ("mocker-sglang-busy", Reading(0.0, 4.0)),
        ("mocker-trtllm-busy", Reading(0.0, 4.0, 0.03125)),
        # no engine's names yet; 0 in flight at `generate`
        ("worker-idle", Reading(0.0, 0.0, 0.0)),
        # 24 in flight, 16 of them queued
        ("frontend-busy.excerpt", Reading(16.0, 8.0)),
    ],
)
def test_dynamo(name: str, reading: Reading) -> None:
    assert Dynamo().read(recorded(f"dynamo-1.6.1-{name}")) == reading


def inflight(endpoint: str, value: int) -> bytes:
    return b'dynamo_component_inflight_requests{dynamo_component="backend",dynamo_endpoint="%s"} %d\n' % (endpoint.encode(), value)


def test_dynamo_without_an_engines_names() -> None:
    assert Dynamo().read(inflight("worker_kv_query", 2) + inflight("generate", 5)) == Reading(waiting=0.0, running=5.0)
    assert Dynamo().read(inflight("chat", 2) + inflight("embed", 1)) == Reading(waiting=0.0, running=3.0)


def test_dynamo_with_trtllm_serves_names() -> None:
    assert Dynamo().read(inflight("generate", 7) + TRTLLM).waiting == 2.0


def test_dynamo_without_metrics() -> None:
    with pytest.raises(ReadingError):
        Dynamo().read(b"dynamo_frontend_inflight_requests 3\n")
