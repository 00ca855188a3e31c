"""SGLang's load from a recorded and from hand-written answers."""

from pathlib import Path

import pytest

from epp.datastore import Reading
from epp.engines.family import ReadingError
from epp.engines.sglang import Sglang

DATA = Path(__file__).parent.parent / "data"


def read(text: bytes) -> Reading:
    return Sglang().read(text)


def series(metric: str, value: float, **labels: str) -> bytes:
    inside = ",".join(f'{name}="{label}"' for name, label in labels.items())
    return f"sglang:{metric}{{{inside}}} {value}\n".encode()


def test_a_recording() -> None:
    # num_queue_reqs 4, num_running_reqs 4, token_usage 0.31 (1280 of 4096 tokens, rounded); 256 pages of 16 = 4096 tokens.
    # Prompts: 2386 tokens of finished requests, 752 of them found in the cache.
    expected = Reading(waiting=4.0, running=4.0, kv_usage=0.31, kv_block_tokens=16, kv_blocks=256, prefix_queries=2386.0, prefix_hits=752.0)
    assert read((DATA / "sglang-0.5.23-metrics-busy.txt").read_bytes()) == expected


def test_data_parallel_ranks_are_summed_and_the_fullest_cache_counts() -> None:
    text = b"".join(
        series("num_queue_reqs", queue, tp_rank="0", dp_rank=rank)
        + series("num_running_reqs", running, dp_rank=rank, tp_rank="0")
        + series("token_usage", usage, tp_rank="0", dp_rank=rank)
        + series("page_size", 64, tp_rank="0", dp_rank=rank)
        + series("num_pages", 1000, tp_rank="0", dp_rank=rank)
        for rank, queue, running, usage in (("0", 3, 8, 0.25), ("1", 5, 7, 0.75))
    )
    # 3 + 5 wait, 8 + 7 run; each rank has 1000 pages of its own
    assert read(text) == Reading(waiting=8.0, running=15.0, kv_usage=0.75, kv_block_tokens=64, kv_blocks=2000)


def test_tensor_and_pipeline_ranks_are_not_summed() -> None:
    """--enable-metrics-for-all-schedulers: 2 data-parallel ranks of 2 tensor times 2 pipeline ranks each."""
    text = b"".join(
        series(metric, value, dp_rank=dp, moe_ep_rank=tp, pp_rank=pp, tp_rank=tp)
        for metric, by_rank in (
            ("num_queue_reqs", {"0": 3, "1": 5}),
            ("num_running_reqs", {"0": 8, "1": 7}),
            ("page_size", {"0": 16, "1": 16}),
            ("num_pages", {"0": 256, "1": 256}),
        )
        for dp, value in by_rank.items()
        for tp in "01"
        for pp in "01"
    )
    assert read(text) == Reading(waiting=8.0, running=15.0, kv_block_tokens=16, kv_blocks=512)


def test_a_rank_that_lags_behind_its_fellow() -> None:
    text = series("num_queue_reqs", 3, tp_rank="0") + series("num_queue_reqs", 4, tp_rank="1")
    assert read(text).waiting == 4.0


def test_dp_attention_numbers_its_ranks_twice() -> None:
    """Each data-parallel rank is a tensor rank, too."""
    text = series("num_queue_reqs", 3, tp_rank="0", dp_rank="0") + series("num_queue_reqs", 4, tp_rank="4", dp_rank="1")
    assert read(text).waiting == 7.0


def test_priorities_are_parts_of_the_whole() -> None:
    text = b"".join(series("num_queue_reqs", value, priority=priority, tp_rank="0") for priority, value in (("", 5), ("1", 2), ("10", 3)))
    assert read(text).waiting == 5.0


def test_the_old_cache_config() -> None:
    """Before 0.5.12, and what the reference picker's older mapping expects."""
    text = series("num_queue_reqs", 1)
    text += series("cache_config_info", 1, page_size="16", num_pages="100", dp_rank="0", tp_rank="0")
    text += series("cache_config_info", 1, page_size="16", num_pages="100", dp_rank="0", tp_rank="1")
    text += series("cache_config_info", 1, page_size="16", num_pages="200", dp_rank="1", tp_rank="0")
    reading = read(text)
    assert (reading.kv_block_tokens, reading.kv_blocks) == (16, 300)


def test_prompt_tokens_of_all_kinds_of_requests_are_summed() -> None:
    text = series("num_queue_reqs", 0)
    text += series("prompt_tokens_total", 100, is_streaming="false") + series("prompt_tokens_total", 50, is_streaming="true")
    text += series("cached_tokens_total", 30, cache_source="device") + series("cached_tokens_total", 20, cache_source="host")
    assert (read(text).prefix_queries, read(text).prefix_hits) == (150.0, 50.0)


def test_nothing_was_found_in_the_cache_yet() -> None:
    """The counter of hits appears with the first one."""
    reading = read(series("num_queue_reqs", 0) + series("prompt_tokens_total", 12))
    assert (reading.prefix_queries, reading.prefix_hits) == (12.0, None)


@pytest.mark.parametrize(
    "text", [b"", b"vllm:num_requests_waiting 1\n", b"sglang:num_queue_reqs NaN\n", b"sglang:num_queue_reqs_total 1\n"]
)
def test_no_metrics_of_this_engine(text: bytes) -> None:
    with pytest.raises(ReadingError):
        read(text)
