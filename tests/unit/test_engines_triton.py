"""Triton's load, with and without TensorRT-LLM, from recorded and hand-written answers."""

from pathlib import Path

import pytest

from epp.datastore import Reading
from epp.engines.family import ReadingError
from epp.engines.triton import Triton, TritonTensorRtLlm

DATA = Path(__file__).parent.parent / "data"


def requests(kind: str, value: object, model: str = "tensorrt_llm") -> bytes:
    return f'nv_trt_llm_request_metrics{{model="{model}",request_type="{kind}",version="1"}} {value}\n'.encode()


def blocks(kind: str, value: object, model: str = "tensorrt_llm") -> bytes:
    return f'nv_trt_llm_kv_cache_block_metrics{{kv_cache_block_type="{kind}",model="{model}",version="1"}} {value}\n'.encode()


def read(text: bytes) -> Reading:
    return TritonTensorRtLlm().read(text)


@pytest.mark.parametrize("name", ["triton-2.51-with-trtllm-names.SYNTHETIC-VALUES", "triton-2.51-metrics-busy"])
def test_recordings(name: str) -> None:
    # waiting 7, scheduled 12, fraction 0.35 as a float32; 1000 blocks of 64 tokens
    expected = Reading(waiting=7.0, running=12.0, kv_usage=0.3499999940395355, kv_block_tokens=64, kv_blocks=1000)
    assert read((DATA / f"{name}.txt").read_bytes()) == expected


@pytest.mark.parametrize(("name", "waiting"), [("triton-2.51-metrics-idle", 0.0), ("triton-2.51-metrics-busy", 13.0)])
def test_recordings_without_tensorrt_llm(name: str, waiting: float) -> None:
    # busy: 13 requests of `toy` are pending and none of `tensorrt_llm`. How many run is not told: exec_count only ever grows.
    assert Triton().read((DATA / f"{name}.txt").read_bytes()) == Reading(waiting=waiting)


@pytest.mark.parametrize(
    ("active", "scheduled", "waiting"),
    [(10, 4, 6.0), (4, 4, 0.0), (0, 1, 0.0), ("Nan", 4, None), (5, "Nan", 5.0)],
)
def test_backends_that_do_not_tell_what_waits(active: object, scheduled: object, waiting: float | None) -> None:
    text = requests("context", 1) + requests("scheduled", scheduled) + requests("max", 512) + requests("active", active)
    assert read(text).waiting == waiting


@pytest.mark.parametrize(("used", "most", "usage"), [(350, 1000, 0.35), (6239, 6239, 1.0), (1, 0, None), ("Nan", 10, None), (20, 10, 1.0)])
def test_backends_that_do_not_tell_the_fraction(used: object, most: object, usage: float | None) -> None:
    text = requests("waiting", 0) + blocks("tokens_per", 64) + blocks("used", used) + blocks("free", 1) + blocks("max", most)
    assert read(text).kv_usage == usage


def test_models_of_one_server() -> None:
    text = requests("waiting", 3, "a") + requests("scheduled", 4, "a") + requests("active", 9, "b") + requests("scheduled", 4, "b")
    text += blocks("fraction", 0.25, "a") + blocks("used", 90, "b") + blocks("max", 100, "b") + blocks("max", 50, "a")
    text += blocks("tokens_per", 64, "a") + blocks("tokens_per", 32, "b")
    # waiting 3 + (9 - 4); running 4 + 4; the fuller of 0.25 and 90/100; 50*64 + 100*32 = 6400 tokens = 100 blocks of 64
    assert read(text) == Reading(waiting=8.0, running=8.0, kv_usage=0.9, kv_block_tokens=64, kv_blocks=100)


def test_the_size_is_unknown_without_tokens_a_block() -> None:
    reading = read(requests("waiting", 0) + blocks("max", 100))
    assert (reading.kv_block_tokens, reading.kv_blocks) == (None, None)


@pytest.mark.parametrize("text", [b"", requests("max", 512), blocks("max", 10), requests("waiting", "Nan")])
def test_no_load_of_tensorrt_llm(text: bytes) -> None:
    with pytest.raises(ReadingError):
        read(text)


def test_no_load_of_triton() -> None:
    with pytest.raises(ReadingError):
        Triton().read(b'nv_inference_exec_count{model="toy",version="1"} 5\n')
