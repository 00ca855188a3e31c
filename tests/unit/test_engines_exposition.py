"""Single samples out of Prometheus text."""

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from epp.engines.exposition import INDENT_MAX, LABELS_KEPT_MAX, SERIES_MAX, find_all, labels_of, values

DATA = Path(__file__).parent.parent / "data"
BUSY = (DATA / "vllm-0.32-metrics-busy.txt").read_bytes()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (b"up 1", [(b"", 1.0)]),
        (b"up 1\n", [(b"", 1.0)]),
        (b"up\t1\r\n", [(b"", 1.0)]),
        (b'up{a="1"} 2.5 1700000000000\n', [(b'a="1"', 2.5)]),
        (b"up 1.795e+09\nup 5E-1\nup .5\nup +3\n", [(b"", 1.795e9), (b"", 0.5), (b"", 0.5), (b"", 3.0)]),
        (b'up{a="1"} 2.0 # {trace_id="x"} 1.0 1795227302.5\n# EOF\n', [(b'a="1"', 2.0)]),
        (b"# TYPE up counter\nup_total 1\nup_created 2\nup 3\n", [(b"", 3.0)]),
        (b'up{a="1"} 1\r\nup{a="2"} 2\r\n', [(b'a="1"', 1.0), (b'a="2"', 2.0)]),
        (b"x 1\n \t up 1\n", [(b"", 1.0)]),
        (b"x up 1\n", []),
        (b" up 1\n x up 2\n", [(b"", 1.0)]),
        (b'  up {a="1"}  -3 \n', [(b'a="1"', -3.0)]),
        (b"up{} 4\n", [(b"", 4.0)]),
        (b'up{a="}",b="\\"} 9"} 5\n', [(b'a="}",b="\\"} 9"', 5.0)]),
        (b"up +Inf\nup -Inf\n", [(b"", math.inf), (b"", -math.inf)]),
        (b"# HELP up up 1\n# TYPE up gauge\nup 6\n", [(b"", 6.0)]),
        (b"# HELP x\n # TYPE up gauge\n", []),
        (b"up_by_reason 1\nsup 2\nx:up 3\n", []),
        (b'up{a="1"} many\nup 7\n', [(b"", 7.0)]),
        (b'up{a="1" 1\nup 8\n', [(b"", 8.0)]),
        (b"up\nup 9\n", [(b"", 9.0)]),
        (b"up", []),
        (b"up ", []),
        (b"", []),
    ],
)
def test_samples(text: bytes, found: list[tuple[bytes, float]]) -> None:
    assert find_all(text, b"up") == found


@pytest.mark.parametrize("spelling", [b"NaN", b"Nan", b"nan"])
def test_not_a_number(spelling: bytes) -> None:
    ((labels, value),) = find_all(b"up " + spelling + b"\n", b"up")
    assert labels == b""
    assert math.isnan(value)


def test_a_recording() -> None:
    assert find_all(BUSY, b"vllm:num_requests_waiting") == [(b'engine="0",model_name="tiny"', 8.0)]
    assert find_all(BUSY, b"vllm:num_requests_waiting_by_reason") == [
        (b'engine="0",model_name="tiny",reason="capacity"', 8.0),
        (b'engine="0",model_name="tiny",reason="deferred"', 0.0),
    ]
    ((labels, value),) = find_all(BUSY, b"vllm:cache_config_info")
    assert value == 1.0
    assert (labels_of(labels)["block_size"], labels_of(labels)["num_gpu_blocks"], len(labels_of(labels))) == ("32", "96", 37)


def test_a_family_ends_where_the_next_begins() -> None:
    assert find_all(b"# TYPE up gauge\nup 1\nup 2\n# TYPE other gauge\nother 1\nup 3\n", b"up") == [(b"", 1.0), (b"", 2.0)]
    assert find_all(b"up 1\nother 1\nup 3\n", b"up") == [(b"", 1.0), (b"", 3.0)]  # nothing tells where


def test_a_family_of_too_many_series() -> None:
    text = b"up 1\n" * (SERIES_MAX + 5)
    assert len(find_all(text, b"up")) == SERIES_MAX


def test_an_indent_no_exporter_writes() -> None:
    assert find_all(b"x 1\n" + b" " * (INDENT_MAX - 1) + b"up 1\n", b"up") == [(b"", 1.0)]
    assert find_all(b"x 1\n" + b" " * INDENT_MAX + b"up 1\n", b"up") == []
    assert find_all(b" " * (INDENT_MAX - 1) + b"up 1\n", b"up") == [(b"", 1.0)]
    assert find_all(b" " * INDENT_MAX + b"up 1\n", b"up") == []


def test_values_that_can_be_a_load() -> None:
    assert values(b"up 1\nup NaN\nup -1\nup +Inf\nup 1e15\nup 1.1e15\nup 0\nup -0\n", b"up") == [1.0, 1e15, 0.0, 0.0]


def test_labels_are_unescaped() -> None:
    labels = labels_of(b'path="C:\\\\x\\n\\"y\\"", n = "2",')
    assert labels == {"path": 'C:\\x\n"y"', "n": "2"}


def test_a_name_inside_a_value_is_no_label() -> None:
    assert labels_of(b'a="1,block_size=",block_size="7"') == {"a": "1,block_size=", "block_size": "7"}


NAMES = st.sampled_from(["vllm:num", "vllm:num_waiting", "vllm:num_waiting_by_reason", "num", "vllm:n"])
LABELS = st.dictionaries(st.sampled_from(["engine", "model_name", "reason"]), st.text(st.characters(exclude_categories=["Cs"])), max_size=3)


@settings(deadline=None)  # the machine's load is not what is tested
@given(
    st.lists(st.tuples(NAMES, st.lists(st.tuples(LABELS, st.floats()), max_size=4)), max_size=5, unique_by=lambda family: family[0]), NAMES
)
def test_agrees_with_the_full_parser(families: list[tuple[str, list[tuple[dict[str, str], float]]]], wanted: str) -> None:
    class Families:
        def collect(self) -> list[GaugeMetricFamily]:
            made = []
            for name, samples in families:
                family = GaugeMetricFamily(name, f'of {wanted} {{engine="0"}} 5\n{wanted} 6')
                for labels, value in samples:
                    family.add_sample(name, labels, value)
                made.append(family)
            return made

    registry = CollectorRegistry()
    registry.register(Families())
    text = generate_latest(registry)
    expected = [
        (sample.labels, sample.value)
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if sample.name == wanted
    ]
    found = [(dict(labels_of(labels)), value) for labels, value in find_all(text, wanted.encode())]
    assert len(found) == len(expected)
    for (labels, value), (expected_labels, expected_value) in zip(found, expected, strict=True):
        assert labels == expected_labels
        assert value == expected_value or (math.isnan(value) and math.isnan(expected_value))


@settings(deadline=None)  # the machine's load is not what is tested
@given(st.lists(st.sampled_from([b"up", b"{", b"}", b'"', b"\\", b" ", b"\n", b"\r", b"=", b",", b"1", b"#", b"a", b"\xff"]), max_size=60))
def test_any_bytes_are_survived(pieces: list[bytes]) -> None:
    for labels, _ in find_all(b"".join(pieces), b"up"):
        labels_of(labels)


def test_long_label_sets_are_parsed_but_not_kept() -> None:
    long = b'a="' + b"x" * LABELS_KEPT_MAX + b'"'
    assert labels_of(long) == {"a": "x" * LABELS_KEPT_MAX}
    assert labels_of(long) is not labels_of(long)
    assert labels_of(b'a="x"') is labels_of(b'a="x"')


def test_hostile_labels_take_linear_time() -> None:
    assert labels_of(b"a" * 1_000_000) == {}
    assert labels_of(b'a="1' * 200_000) == {"a": "1a="}
    assert find_all(b"up{" + b'a="' * 200_000 + b"\n", b"up") == []
    assert find_all(b"up{" + b"a" * 1_000_000, b"up") == []
