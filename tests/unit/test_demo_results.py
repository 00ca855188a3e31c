"""Adding up outcomes, reading metrics pages, comparing phases."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest

from epp.demo.readings import EngineReading, engine_reading, hit_rate, picks, picks_since
from epp.demo.results import ERRORS_KEPT, Distribution, Outcome, Summary, Tally, percentile, ratio, report, summarise

DATA = Path(__file__).parent.parent / "data"


def summary(name: str = "picker", ttft_s: tuple[float, ...] = (0.1, 0.2), errors: int = 0) -> Summary:
    tally = Tally(requests_planned=len(ttft_s) + errors)
    for value in ttft_s:
        tally.add(Outcome(ttft_s=value, duration_s=2 * value, prompt_tokens=100, cached_tokens=75, answer_tokens=10))
    for number in range(errors):
        tally.add(Outcome(error=f"HTTP 503: {number}"))
    return summarise(name, tally, time_scale=10, wall_s=1.0, hit_rate=0.75, per_engine={"engine-1": 2}, picks={"engine-1": 2})


# --- statistics


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(value) for value in range(1, 101)]
    assert [percentile(values, percent) for percent in (0, 1, 50, 90, 99, 100)] == [1, 1, 50, 90, 99, 100]
    assert percentile([7.0], 99) == 7.0
    assert math.isnan(percentile([], 50))


def test_a_distribution_is_scaled_and_needs_no_order() -> None:
    made = Distribution.of([3.0, 1.0, 2.0], scale=10)
    assert made == {"mean": pytest.approx(statistics.fmean([10, 20, 30])), "p50": 20, "p90": 30, "p99": 30}
    assert all(math.isnan(value) for value in Distribution.of([]).values())


def test_a_tally_counts_failures_apart_and_keeps_the_first() -> None:
    tally = Tally(requests_planned=10)
    tally.sent = 9
    tally.add(Outcome(ttft_s=0.1, duration_s=0.5, prompt_tokens=100, cached_tokens=60, answer_tokens=7))
    for number in range(ERRORS_KEPT + 2):
        tally.add(Outcome(ttft_s=9.0, error=f"error {number}"))
    assert (tally.finished, tally.errors_total, tally.in_flight) == (ERRORS_KEPT + 3, ERRORS_KEPT + 2, 9 - ERRORS_KEPT - 3)
    assert tally.first_errors == [f"error {number}" for number in range(ERRORS_KEPT)]
    assert (tally.ttft_s, tally.prompt_tokens, tally.cached_tokens, tally.answer_tokens) == ([0.1], 100, 60, 7)


def test_a_summary_is_in_simulated_seconds() -> None:
    made = summary(errors=1)
    assert made.ttft_s["mean"] == pytest.approx(1.5)
    assert made.duration_s["p99"] == pytest.approx(4.0)
    assert (made.requests, made.errors, made.computed_tokens) == (3, 1, 50)


def test_ratios_say_how_many_times_less_and_nothing_where_there_is_nothing() -> None:
    assert ratio(3.0, 1.5) == 2.0
    assert math.isnan(ratio(3.0, 0.0))
    assert math.isnan(ratio(math.nan, 1.0))


def test_a_report_is_plain_json_without_nan() -> None:
    made = report(summary("round robin", (0.4, 0.6)), summary("picker", ()), {"seed": 1})
    text = json.dumps(made, allow_nan=False)
    assert json.loads(text)["phases"]["round robin"]["ttft_s"]["mean"] == pytest.approx(5.0)
    assert json.loads(text)["phases"]["picker"]["ttft_s"]["mean"] is None
    assert json.loads(text)["round_robin_over_picker"]["ttft_s_mean"] is None
    made = report(summary("round robin", (0.4, 0.6)), summary("picker", (0.1,)), {"seed": 1})
    assert made["round_robin_over_picker"]["ttft_s_mean"] == pytest.approx(5.0)  # type: ignore[index]


# --- pages


def test_a_page_of_vllm_is_read() -> None:
    reading = engine_reading((DATA / "vllm-0.32-metrics-busy.txt").read_bytes())
    assert reading == EngineReading(
        running=4, waiting=8, kv_usage=pytest.approx(0.505, abs=1e-3), finished=9, queried_tokens=2695, hit_tokens=672
    )
    assert reading.received == 21


def test_a_reading_counts_from_another_on() -> None:
    start = EngineReading(running=4, finished=9, queried_tokens=2695, hit_tokens=672)
    later = EngineReading(running=1, waiting=2, finished=19, queried_tokens=3695, hit_tokens=1572)
    assert later.since(start) == EngineReading(running=1, waiting=2, finished=10, queried_tokens=1000, hit_tokens=900)


def test_a_page_of_something_else_is_an_empty_reading() -> None:
    assert engine_reading(b"<html>") == EngineReading()
    assert math.isnan(hit_rate([EngineReading(), EngineReading()]))
    assert hit_rate([EngineReading(queried_tokens=100, hit_tokens=50), EngineReading(queried_tokens=300, hit_tokens=250)]) == 0.75


def test_picks_are_the_successful_attempts_by_endpoint() -> None:
    family = "llm_d_epp_scheduler_attempts_total"
    page = f"""\
# TYPE {family} counter
{family}{{status="success",target_model_name="a",endpoint_name="engine-1",namespace="default",port="8000"}} 3.0
{family}{{status="success",target_model_name="b",endpoint_name="engine-1",namespace="default",port="8000"}} 2.0
{family}{{status="success",target_model_name="a",endpoint_name="engine-2",namespace="default",port="8001"}} 4.0
{family}{{status="failure",target_model_name="a",endpoint_name="",namespace="",port=""}} 9.0
inference_extension_scheduler_attempts_total{{status="success",target_model_name="a",pod_name="engine-1",namespace="default",port="8000"}} 5.0
"""
    assert picks(page.encode()) == {"engine-1": 5, "engine-2": 4}
    assert picks_since({"engine-1": 5, "engine-2": 4}, {"engine-1": 5}) == {"engine-1": 0, "engine-2": 4}
