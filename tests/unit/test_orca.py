"""What engines say of their load in a response header."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epp.extproc import codec
from epp.parsing.orca import CHARS_MAX, PushedLoad, parse
from tests.builders import chat, core, llm_request, response_headers


@pytest.mark.parametrize(
    ("value", "load"),
    [
        # as vLLM 0.32 wrote them
        ("TEXT named_metrics.num_requests_waiting=0.0, named_metrics.kv_cache_usage_perc=0.0", PushedLoad(0.0, 0.0)),
        ('JSON {"named_metrics": {"num_requests_waiting": 3.0, "kv_cache_usage_perc": 0.25}}', PushedLoad(3.0, 0.25)),
        # Triton's names
        ('JSON {"kv_cache_utilization": 0.5, "named_metrics": {}}', PushedLoad(None, 0.5)),
        ("named_metrics.kv_cache_utilization=0.75,named_metrics.max_token_capacity=1000", PushedLoad(None, 0.75)),
        ("TEXT named_metrics.kv_cache_usage_perc=1.5", PushedLoad(None, 1.0)),
        ("TEXT named_metrics.num_requests_waiting=nan", None),
        ("TEXT named_metrics.num_requests_waiting=-1", None),
        ("TEXT cpu_utilization=0.3", None),
        ("BIN CgA=", None),
        ("JSON [1]", None),
        ("JSON {", None),
        ("", None),
        ("TEXT num_requests_waiting=1" + " " * CHARS_MAX, None),
    ],
)
def test_a_header_is_read(value: str, load: PushedLoad | None) -> None:
    assert parse(value) == load


@given(st.text())
def test_any_text_is_no_error(value: str) -> None:
    parse(value)
    parse(f"JSON {value}")
    parse(f"TEXT {value}")


def test_a_response_brings_its_engines_load_up_to_date() -> None:
    world = core(1)
    world.read(1, waiting=9.0, kv_usage=0.9)
    exchange = world.director.route(llm_request(), chat(), None, 0.0)
    message = response_headers(
        headers={"endpoint-load-metrics": "TEXT named_metrics.num_requests_waiting=2, named_metrics.kv_cache_usage_perc=0.5"}
    )
    event = codec.decode(message.SerializeToString())
    exchange.response_headers(event.status, event_stream=False, served="", code_details="", load=event.load)
    endpoint = world.endpoint(1)
    assert (endpoint.waiting_estimate, endpoint.kv_usage_estimate) == (2.0, 0.5)
    exchange.finish(complete=True)
