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
NONE: frozenset[str] = frozenset()


def read(text: bytes) -> Reading:
    return Vllm().read(text)


@pytest.mark.parametrize(
    ("name", "reading"),
    [
        (
            "vllm-0.32-metrics-busy",
            # KV: 48 blocks of the 95 that are not the null block. LoRA: of four series the newest (...3002) lists sql-lora twice.
            Reading(8.0, 4.0, 48 / 95, 32, 96, frozenset({"sql-lora"}), NONE, 2, 1795227176.86, 2695.0, 672.0),
        ),
        ("vllm-0.32-metrics-idle-fresh", Reading(0.0, 0.0, 0.0, 128, 32768, NONE, NONE, None, 1795226674.84, 0.0, 0.0)),
        (
            "vllm-0.32-dp2-metrics",
            # Two engines of 96 blocks, each series says 192. Prefix cache: 605 + 912 tokens looked up, 288 + 576 found.
            Reading(0.0, 0.0, 0.0, 32, 192, NONE, NONE, None, 1795228652.75, 1517.0, 864.0),
        ),
        (
            "vllm-0.23-metrics-idle-after",
            # Five combinations of adapters were seen; the newest (...502.962) is of none.
            Reading(0.0, 0.0, 0.0, 32, 96, NONE, NONE, 2, 1795228389.84, 5409.0, 1696.0),
        ),
    ],
)
def test_recordings(name: str, reading: Reading) -> None:
    assert read((DATA / f"{name}.txt").read_bytes()) == reading


def test_the_recorded_sleep() -> None:
    with pytest.raises(AsleepError):
        read((DATA / "vllm-0.32-metrics-asleep.excerpt.txt").read_bytes())


def test_engines_of_one_server_are_summed_and_the_fullest_cache_counts() -> None:
    text = b"".join(
        b'vllm:num_requests_waiting{engine="%d"} %d\nvllm:num_requests_running{engine="%d"} %d\nvllm:kv_cache_usage_perc{engine="%d"} 0.%d\n'
        % (engine, waiting, engine, running, engine, usage)
        for engine, waiting, running, usage in ((0, 3, 4, 25), (1, 5, 1, 75), (2, 0, 2, 5))
    )
    reading = read(text)
    assert (reading.waiting, reading.running, reading.kv_usage) == (8.0, 7.0, 0.75)


def test_the_old_name_of_cache_usage() -> None:
    assert read(b'vllm:gpu_cache_usage_perc{model_name="m"} 0.25\n').kv_usage == 0.25
    both = b"vllm:gpu_cache_usage_perc 0.25\nvllm:kv_cache_usage_perc 0.5\n"  # 0.11 has both
    assert read(both).kv_usage == 0.5


def test_what_is_not_told_stays_unknown() -> None:
    text = ONE + b'vllm:cache_config_info{block_size="None",num_gpu_blocks="None"} 1\nvllm:kv_cache_usage_perc NaN\n'
    assert read(text) == Reading(waiting=1.0, adapters_active=NONE, adapters_waiting=NONE)


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


def lora(running: str, waiting: str, value: str, limit: str = "4") -> bytes:
    return f'vllm:lora_requests_info{{max_lora="{limit}",running_lora_adapters="{running}",waiting_lora_adapters="{waiting}"}} {value}\n'.encode()


@pytest.mark.parametrize(
    ("series", "active", "waiting", "limit"),
    [
        ([("a,b", "a,b", "2e9"), ("", "", "1e9")], {"a", "b"}, set(), 4),  # both lists always hold the union
        ([("a,b", "a,b", "1e9"), ("", "", "2e9")], set(), set(), 4),
        ([("a", "a", "1.795e9"), ("b", "b", "1.796e+09"), ("c", "c", "1.794e9")], {"b"}, set(), 4),
        ([("a, b", "c ,a", "1")], {"a", "b"}, {"c"}, 4),  # an engine that tells them apart
        ([(",", "", "1")], set(), set(), 4),
    ],
)
def test_the_newest_series_names_the_adapters(series: list[tuple[str, str, str]], active: set[str], waiting: set[str], limit: int) -> None:
    reading = read(ONE + b"".join(lora(*each) for each in series))
    assert (reading.adapters_active, reading.adapters_waiting, reading.adapters_max) == (active, waiting, limit)


@pytest.mark.parametrize("limit", ["", "None", "-1", "0", "2.5", "9" * 40])
def test_a_limit_of_adapters_that_is_none(limit: str) -> None:
    assert read(ONE + lora("a", "a", "1", limit)).adapters_max is None


def test_counters_of_engines_are_summed_and_the_latest_start_counts() -> None:
    text = (
        b'vllm:prefix_cache_queries_total{engine="0"} 100\nvllm:prefix_cache_queries_total{engine="1"} 1e3\n'
        b'vllm:prefix_cache_queries_created{engine="0"} 5e9\n'
        b'vllm:prefix_cache_hits_total{engine="0"} 60.0\nvllm:prefix_cache_hits_total{engine="1"} 0\n'
        b"process_start_time_seconds 1.7e+09\nprocess_start_time_seconds 1.8e+09\n"
    )
    reading = read(ONE + text)
    assert (reading.prefix_queries, reading.prefix_hits, reading.started_s) == (1100.0, 60.0, 1.8e9)


def test_openmetrics() -> None:
    """Counters are announced without `_total`, units and an end follow, and samples carry times and exemplars."""
    text = (
        b"# TYPE vllm:num_requests_waiting gauge\n"
        b"# HELP vllm:num_requests_waiting vllm:num_requests_waiting 99\n"
        b'vllm:num_requests_waiting{model_name="a \\"quoted\\" } {name, \\\\",engine="0"} 3.0 1795227302.5\n'
        b"# TYPE vllm:prefix_cache_queries counter\n"
        b'vllm:prefix_cache_queries_total{engine="0"} 12.0 # {trace_id="x"} 1.0 1795227302.5\n'
        b'vllm:prefix_cache_queries_created{engine="0"} 1.7952272322618601e+09\n'
        b"# TYPE vllm:prefix_cache_hits counter\n"
        b'vllm:prefix_cache_hits_total{engine="0"} 4.0\n'
        b"# EOF\n"
    )
    reading = read(text)
    assert (reading.waiting, reading.prefix_queries, reading.prefix_hits) == (3.0, 12.0, 4.0)
    assert read(text.replace(b"\n", b"\r\n")) == reading


@settings(deadline=None)  # the machine's load is not what is tested
@given(st.binary(), st.binary())
def test_garbage_is_a_reading_or_a_reading_error(left: bytes, right: bytes) -> None:
    try:
        reading = read(left + b"\nvllm:num_requests_running" + right)
    except ReadingError:
        return
    assert reading.running is not None or reading.waiting is not None or reading.kv_usage is not None
