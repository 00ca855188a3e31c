"""What every family promises: a sane reading or a ReadingError, whatever the bytes, in time that grows with them and no faster."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epp.datastore import Reading
from epp.engines import dynamo, llamacpp, nim, sglang, tgi, triton, trtllm_serve, vllm
from epp.engines.custom import CustomFamily
from epp.engines.detect import BUILT_IN, family_for
from epp.engines.family import EngineFamily, ReadingError

DATA = Path(__file__).parent.parent / "data"
CUSTOM = CustomFamily(
    {
        "name": "atom",
        "queuedRequestsSpec": "vllm:num_requests_waiting{engine=0}",
        "kvUsageSpec": "sglang:token_usage",
        "loraSpec": "vllm:lora_requests_info",
        "cacheInfoSpec": "vllm:cache_config_info",
        "cacheNumBlocksSpec": "sglang:num_pages",
        "customMetrics": [{"attributeKey": "queue", "metricSpec": "tgi_queue_size"}],
    }
)
FAMILIES: dict[str, EngineFamily] = {**BUILT_IN, "atom": CUSTOM}
METRICS = [
    *(vllm.WAITING, vllm.RUNNING, vllm.KV_USAGE, vllm.KV_USAGE_OLD, vllm.CACHE_CONFIG, vllm.SLEEP_STATE, vllm.LORA, vllm.PREFIX_QUERIES),
    *(vllm.STARTED, sglang.WAITING, sglang.KV_USAGE, sglang.PAGES, sglang.PAGE_TOKENS, sglang.CACHE_CONFIG, sglang.PREFIX_HITS),
    *(triton.REQUESTS, triton.KV_BLOCKS, triton.PENDING, llamacpp.COMPUTED, llamacpp.CACHED, dynamo.INFLIGHT, dynamo.FRONTEND_QUEUED),
    *(dynamo.FRONTEND_INFLIGHT, *llamacpp.GAUGES[:3], *tgi.GAUGES[:2], *nim.GAUGES[:3], *trtllm_serve.GAUGES, *dynamo.TRTLLM[:3]),
]
LABELS = [
    b"",
    b'{engine="0"}',
    b'{sleep_state="awake"}',
    b'{max_lora="x",running_lora_adapters="a,b",waiting_lora_adapters=","}',
    b'{block_size="32",num_gpu_blocks="99999999999999999999"}',
    b'{page_size="0",num_pages="-1",dp_rank="1"}',
    b'{request_type="active"}',
    b'{kv_cache_block_type="used"}',
    b'{kv_cache_block_type="max",model="\\"m\\\\"}',
    b'{a="}',
    b"{a}",
]
VALUES = [
    b"0",
    b"1",
    b"4.5e3",
    b"-7",
    b"NaN",
    b"Nan",
    b"+Inf",
    b"-Inf",
    b"1e308",
    b"1e999",
    b"1e15",
    b"1e-300",
    b"many",
    b"0x10",
    b"1_000",
    b"",
    b"\xff",
]
ENDS = [b"\n", b"\r\n", b" 1795227302000\n", b" # {} 1\n", b"", b"\0\n"]
LINES = st.builds(
    lambda *parts: b"".join(parts),
    st.sampled_from([b"", b"", b"", b" ", b"# HELP ", b"x"]),
    st.sampled_from(METRICS),
    st.sampled_from(LABELS),
    st.sampled_from([b" ", b" ", b"\t", b""]),
    st.sampled_from(VALUES),
    st.sampled_from(ENDS),
)


def sane(family: EngineFamily, text: bytes) -> Reading | None:
    try:
        reading = family.read(text)
    except ReadingError:
        return None
    for value in (reading.waiting, reading.running, reading.prefix_queries, reading.prefix_hits, reading.started_s):
        assert value is None or (value >= 0 and math.isfinite(value))
    assert reading.kv_usage is None or 0 <= reading.kv_usage <= 1
    for size in (reading.kv_block_tokens, reading.kv_blocks, reading.adapters_max):
        assert size is None or (type(size) is int and size > 0)
    assert all(map(math.isfinite, reading.attributes.values()))
    assert (reading.waiting, reading.running, reading.kv_usage) != (None, None, None) or reading.attributes
    return reading


@settings(deadline=None)  # the machine's load is not what is tested
@given(st.lists(LINES, max_size=30).map(b"".join))
def test_any_lines(text: bytes) -> None:
    for family in FAMILIES.values():
        sane(family, text)
    family_for("", text)


@settings(deadline=None)  # the machine's load is not what is tested
@given(st.binary(max_size=300), st.sampled_from(METRICS), st.binary(max_size=300))
def test_any_bytes(left: bytes, metric: bytes, right: bytes) -> None:
    for family in FAMILIES.values():
        sane(family, left + b"\n" + metric + right)


@pytest.mark.parametrize("path", sorted(DATA.glob("*.txt")), ids=lambda path: path.stem)
def test_truncated_recordings(path: Path) -> None:
    """Cut anywhere, an answer says what it says up to there, or nothing."""
    whole = path.read_bytes()
    family = family_for("", whole)
    assert family is not None
    for end in range(0, len(whole), max(1, len(whole) // 200)):
        sane(family, whole[:end])


@pytest.mark.parametrize("path", sorted(DATA.glob("*.txt")), ids=lambda path: path.stem)
def test_line_ends_indents_and_times_make_no_difference(path: Path) -> None:
    whole = path.read_bytes()
    family = family_for("", whole)
    assert family is not None
    samples = [line for line in whole.splitlines() if not line.startswith(b"#")]

    def outcome(text: bytes) -> Reading | str:
        try:
            return family.read(text)
        except ReadingError as error:
            return str(error)

    expected = outcome(whole)
    assert outcome(whole.replace(b"\n", b"\r\n")) == expected
    assert outcome(b"\n".join(samples)) == expected  # no HELP, no TYPE, no last line end
    assert outcome(b"".join(b" \t" + line + b" 1795227302000\n" for line in samples)) == expected
    assert outcome(whole + b"# EOF\n") == expected


def seconds(family: EngineFamily, text: bytes) -> float:
    started_s = time.process_time()
    sane(family, text)
    return time.process_time() - started_s


HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "series of one family": lambda metric: metric + b'{engine="0"} 1\n',
    "series with other labels": lambda metric: metric + b'{running_lora_adapters="a"} 1\n',
    "no line ends": lambda metric: b" " + metric + b" 1",
    "only in help": lambda metric: b"# HELP x " + metric + b" 1\n# TYPE " + metric + b" gauge\n",
    "labels that never end": lambda metric: metric + b'{a="',
    "longer names": lambda metric: b"\n" + metric + b"_by_reason 1",
    "no value": lambda metric: b"\n" + metric + b"{} {",
}


@pytest.mark.parametrize("name", sorted(FAMILIES))
@pytest.mark.parametrize("shape", sorted(HOSTILE))
def test_hostile_texts_take_linear_time(shape: str, name: str) -> None:
    """1 MB and more of it: 0.3 s at most here, minutes where every line looks at all the others."""
    piece = b"".join(HOSTILE[shape](metric) for metric in METRICS)
    assert seconds(FAMILIES[name], piece * ((1 << 20) // len(piece))) < 5


def test_labels_that_are_one_long_name() -> None:
    text = b"vllm:engine_sleep_state{" + b"a" * (1 << 20) + b'} 1\nvllm:num_requests_running{a="' + b'\\"' * (1 << 20) + b'"} 1\n'
    assert seconds(BUILT_IN["vllm"], text) < 5


def test_fifty_megabytes() -> None:
    """The fetcher takes no more than 8."""
    busy = (DATA / "vllm-0.32-metrics-busy.txt").read_bytes()
    text = busy * (50_000_000 // len(busy))
    assert seconds(BUILT_IN["vllm"], text) < 5
    nothing = b"# HELP of vllm:num_requests_waiting\nup 1\n" * 1_250_000
    assert seconds(BUILT_IN["dynamo"], nothing) < 20  # looks for everybody's names
    series = b'vllm:num_requests_waiting{engine="0"} 1\n' * 1_250_000
    assert seconds(BUILT_IN["vllm"], series) < 20
