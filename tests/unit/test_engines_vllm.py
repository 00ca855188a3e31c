"""vLLM's load from recorded and hand-written answers."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epp.datastore import Reading
from epp.engines.family import AsleepError, ReadingError
from epp.engines.vllm import Vllm

DATA = Path(__file__).parent.parent / "data"
ONE = b'vllm:num_requests_waiting{engine="0"} 1\n'


def read(text: bytes) -> Reading:
    return Vllm().read(text)


@pytest.mark.parametrize(
    ("name", "reading"),
    [
        ("vllm-0.32-metrics-busy", Reading(8.0, 4.0, 0.5052631578947369, 32, 96)),
        ("vllm-0.32-metrics-idle-fresh", Reading(0.0, 0.0, 0.0, 128, 32768)),
        ("vllm-0.32-dp2-metrics", Reading(0.0, 0.0, 0.0, 32, 192)),  # two engines of 96 blocks, each series says 192
    ],
)
def test_recordings(name: str, reading: Reading) -> None:
    assert read((DATA / f"{name}.txt").read_bytes()) == reading


def test_engines_of_one_server_are_summed_and_the_fullest_cache_counts() -> None:
    text = b"".join(
        b'vllm:num_requests_waiting{engine="%d"} %d\nvllm:num_requests_running{engine="%d"} %d\nvllm:kv_cache_usage_perc{engine="%d"} 0.%d\n'
        % (engine, waiting, engine, running, engine, usage)
        for engine, waiting, running, usage in ((0, 3, 4, 25), (1, 5, 1, 75), (2, 0, 2, 5))
    )
    assert read(text) == Reading(8.0, 7.0, 0.75, None, None)


def test_the_old_name_of_cache_usage() -> None:
    assert read(b'vllm:gpu_cache_usage_perc{model_name="m"} 0.25\n').kv_usage == 0.25


def test_what_is_not_told_stays_unknown() -> None:
    text = ONE + b'vllm:cache_config_info{block_size="None",num_gpu_blocks="None"} 1\nvllm:kv_cache_usage_perc NaN\n'
    assert read(text) == Reading(1.0, None, None, None, None)


def test_usage_is_a_fraction() -> None:
    assert read(ONE + b"vllm:kv_cache_usage_perc 1.5\n").kv_usage == 1.0
    assert read(ONE + b"vllm:kv_cache_usage_perc -1\n").kv_usage is None


@pytest.mark.parametrize("text", [b"", b"<html>it works</html>", b"python_info 1\n", b"vllm:num_requests_waiting NaN\n"])
def test_no_metrics_of_this_engine(text: bytes) -> None:
    with pytest.raises(ReadingError):
        read(text)


def sleep_state(engine: int, awake: int) -> bytes:
    return b'vllm:engine_sleep_state{engine="%d",sleep_state="awake"} %d\nvllm:engine_sleep_state{engine="%d",sleep_state="discard_all"} 0\n' % (
        engine, awake, engine,
    )  # fmt: skip


def test_a_sleeping_engine_is_no_idle_one() -> None:
    with pytest.raises(AsleepError):
        read(ONE + sleep_state(0, 0))
    assert read(ONE + sleep_state(0, 0) + sleep_state(1, 1)).waiting == 1.0
    assert read(ONE + sleep_state(0, 1)).waiting == 1.0


@settings(deadline=None)  # the machine's load is not what is tested
@given(st.binary(), st.binary())
def test_garbage_is_a_reading_or_a_reading_error(left: bytes, right: bytes) -> None:
    try:
        reading = read(left + b"\nvllm:num_requests_running" + right)
    except ReadingError:
        return
    assert reading.running is not None or reading.waiting is not None or reading.kv_usage is not None
