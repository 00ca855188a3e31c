"""Engine families of the configuration."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epp.datastore import Reading
from epp.engines.custom import CustomFamily, Spec
from epp.engines.family import AsleepError, ReadingError

DATA = Path(__file__).parent.parent / "data"
NONE: frozenset[str] = frozenset()
ATOM = {
    "name": "atom",
    "queuedRequestsSpec": "atom:queue{kind=waiting}",
    "runningRequestsSpec": 'atom:queue{kind="running"}',
    "kvUsageSpec": "atom:kv",
    "loraSpec": "atom:lora",
    "cacheInfoSpec": "atom:cache_info",
    "cacheBlockSizeLabelName": "page",
    "cacheNumBlocksLabelName": "pages",
}
ATOM_TEXT = b"""\
atom:queue{kind="waiting",engine="0"} 3
atom:queue{engine="1",kind="waiting"} 4
atom:queue{kind="running",engine="0"} 8
atom:queue{kind="waiting_too"} 100
atom:kv{engine="0"} 0.25
atom:kv{engine="1"} 0.5
atom:lora{max_lora="3",running_lora_adapters="a",waiting_lora_adapters="a,b"} 2
atom:lora{max_lora="3",running_lora_adapters="c",waiting_lora_adapters=""} 1
atom:cache_info{page="32",pages="1000",engine="0"} 1
atom:cache_info{page="32",pages="1000",engine="1"} 1
"""


def read(text: bytes, **config: object) -> Reading:
    return CustomFamily({"name": "atom", **config}).read(text)


def test_everything_configured() -> None:
    # 3 + 4 wait; the fuller cache is half full; the label tells the size of the whole server, so 1000 and not 2000
    expected = Reading(7.0, 8.0, 0.5, 32, 1000, frozenset({"a"}), frozenset({"b"}), 3)
    assert CustomFamily(ATOM).read(ATOM_TEXT) == expected
    assert CustomFamily(ATOM).paths == ("/metrics",)


def test_the_default_mappings_of_the_reference_picker() -> None:
    vllm = CustomFamily(
        {
            "name": "vllm",
            "queuedRequestsSpec": "vllm:num_requests_waiting",
            "runningRequestsSpec": "vllm:num_requests_running",
            "kvUsageSpec": "vllm:kv_cache_usage_perc",
            "loraSpec": "vllm:lora_requests_info",
            "cacheInfoSpec": "vllm:cache_config_info",
        }
    )
    for name in ("busy", "idle-fresh"):
        text = (DATA / f"vllm-0.32-metrics-{name}.txt").read_bytes()
        assert vllm.read(text) == _built_in("vllm", text)
    triton = CustomFamily(
        {
            "name": "triton-tensorrt-llm",
            "queuedRequestsSpec": "nv_trt_llm_request_metrics{request_type=waiting}",
            "runningRequestsSpec": "nv_trt_llm_request_metrics{request_type=scheduled}",
            "kvUsageSpec": "nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=fraction}",
            "cacheBlockSizeSpec": "nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=tokens_per}",
            "cacheNumBlocksSpec": "nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=max}",
        }
    )
    text = (DATA / "triton-2.51-metrics-busy.txt").read_bytes()
    assert triton.read(text) == Reading(7.0, 12.0, 0.3499999940395355, 64, 1000)


def _built_in(name: str, text: bytes) -> Reading:
    return CustomFamily({"name": name}).read(text)


def test_what_is_not_mentioned_is_read_as_the_namesake_does() -> None:
    text = (DATA / "vllm-0.32-metrics-busy.txt").read_bytes()
    family = CustomFamily(
        {"name": "vllm", "queuedRequestsSpec": "vllm:num_requests_waiting_by_reason{reason=deferred}", "runningRequestsSpec": None}
    )
    assert family.read(text) == _built_in("vllm", text)._replace(waiting=0.0)


def test_an_empty_spec_is_a_metric_the_engine_does_not_have() -> None:
    text = (DATA / "vllm-0.32-metrics-busy.txt").read_bytes()
    family = CustomFamily({"name": "vllm", "kvUsageSpec": "", "loraSpec": "", "cacheInfoSpec": " "})
    reading = family.read(text)
    assert (reading.waiting, reading.running, reading.kv_usage, reading.kv_blocks) == (8.0, 4.0, None, None)
    assert (reading.adapters_active, reading.adapters_waiting, reading.adapters_max) == (None, None, None)


def test_a_namesake_keeps_its_path_and_its_sleep() -> None:
    assert CustomFamily({"name": "trtllm-serve", "queuedRequestsSpec": "q"}).paths == ("/prometheus/metrics",)
    text = (DATA / "vllm-0.32-metrics-asleep.excerpt.txt").read_bytes()
    with pytest.raises(AsleepError):
        CustomFamily({"name": "vllm", "queuedRequestsSpec": "q"}).read(text + b"q 1\n")


def test_a_namesake_whose_own_names_are_not_there() -> None:
    assert CustomFamily({"name": "vllm", "queuedRequestsSpec": "q"}).read(b"q 2\n") == Reading(waiting=2.0)


def test_data_parallel_sglang() -> None:
    text = b"".join(
        b'sglang:num_queue_reqs{tp_rank="%d",dp_rank="%d"} %d\n' % (tp, dp, queue) for dp, queue in ((0, 3), (1, 4)) for tp in (0, 1)
    )
    assert read(text, queuedRequestsSpec="sglang:num_queue_reqs").waiting == 7.0


def test_gauges_of_the_cache_size_come_before_labels() -> None:
    text = b'info{block_size="16",num_gpu_blocks="10"} 1\npage 64\npages{rank="0"} 100\npages{rank="1"} 100\nq 0\n'
    labels = read(text, queuedRequestsSpec="q", cacheInfoSpec="info")
    assert (labels.kv_block_tokens, labels.kv_blocks) == (16, 10)
    gauges = read(text, queuedRequestsSpec="q", cacheInfoSpec="info", cacheBlockSizeSpec="page", cacheNumBlocksSpec="pages")
    assert (gauges.kv_block_tokens, gauges.kv_blocks) == (64, 200)
    absent = read(text, queuedRequestsSpec="q", cacheInfoSpec="info", cacheBlockSizeSpec="no", cacheNumBlocksSpec="no")
    assert (absent.kv_block_tokens, absent.kv_blocks) == (16, 10)


def test_custom_metrics_become_attributes() -> None:
    metrics = [
        {"attributeKey": "Temperature", "metricSpec": "temp{gpu=1}"},
        {"attributeKey": "Drift", "metricSpec": "drift"},
        {"attributeKey": "Lost", "metricSpec": "nowhere"},
        {"attributeKey": "Broken", "metricSpec": "broken"},
    ]
    text = b'temp{gpu="0"} 40\ntemp{gpu="1"} 71.5\ntemp{gpu="1"} 99\ndrift NaN\ndrift -2\nbroken +Inf\n'
    reading = read(text, customMetrics=metrics)
    assert reading == Reading(attributes={"Temperature": 71.5, "Drift": -2.0})


@pytest.mark.parametrize("text", [b"", b"q NaN\n", b'q{a="2"} 1\n', b"other 1\n"])
def test_nothing_of_it_in_the_answer(text: bytes) -> None:
    with pytest.raises(ReadingError, match="configured for atom"):
        read(text, queuedRequestsSpec="q{a=1}", customMetrics=[{"attributeKey": "k", "metricSpec": "m"}])


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("up", Spec(b"up")),
        (" up ", Spec(b"up")),
        ("up{}", Spec(b"up")),
        ("vllm:up_total{a=b}", Spec(b"vllm:up_total", (("a", "b"),))),
        ('up { a = "b" , c=d/e.f-1 , }', Spec(b"up", (("a", "b"), ("c", "d/e.f-1")))),
        ('up{a="x,y}\\"\\\\\\n"}', Spec(b"up", (("a", 'x,y}"\\\n'),))),
        ('up{a=""}', Spec(b"up", (("a", ""),))),
    ],
)
def test_specs(text: str, spec: Spec) -> None:
    assert Spec.parse(text, "f") == spec


@pytest.mark.parametrize(
    "text",
    [
        "1up",
        "up{",
        "up}",
        "up{a}",
        "up{a=}",
        "up{=b}",
        "up{a!=b}",
        'up{a=~"b"}',
        'up{a="b}',
        "up{a=b c=d}",
        "up{,}",
        "rate(up[5m])",
        "up 1",
        "{a=b}",
        "ü",
    ],
)
def test_specs_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"^queuedRequestsSpec: "):
        CustomFamily({"name": "atom", "queuedRequestsSpec": text})


def test_labels_are_compared_unescaped_and_in_any_order() -> None:
    text = b'up{z="1",path="C:\\\\x",say="\\"hi\\""} 1\nup{path="C:\\\\y",say="\\"hi\\"",z="1"} 2\nup 4\n'
    assert Spec.parse('up{say="\\"hi\\"",z=1}', "f").values(text) == [1.0, 2.0]
    assert Spec.parse('up{path="C:\\\\y"}', "f").values(text) == [2.0]
    assert Spec.parse("up{z=2}", "f").values(text) == []
    assert Spec.parse("up{z=1,path=elsewhere}", "f").values(text) == []
    assert Spec.parse("up", "f").values(text) == [1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "name: must not be empty"),
        ({"name": " "}, "name: must not be empty"),
        ({"name": 3}, "name: must be text, not int"),
        ({"name": "atom"}, "atom: names no metric, and there is no built-in engine of that name"),
        ({"name": "atom", "queuedRequestsSpec": ""}, "atom: names no metric, and there is no built-in engine of that name"),
        ({"name": "atom", "queuedRequestSpec": "q"}, "unknown field 'queuedRequestSpec'"),
        ({"name": "atom", "kvUsageSpec": 5}, "kvUsageSpec: must be text, not int"),
        ({"name": "atom", "cacheInfoSpec": "i", "cacheBlockSizeLabelName": "a-b"}, "cacheBlockSizeLabelName: 'a-b' is not the name of a label"),
        ({"name": "atom", "customMetrics": "m"}, "customMetrics: must be a list"),
        ({"name": "atom", "customMetrics": [{"key": "m"}]}, "customMetrics[0]: must be attributeKey and metricSpec"),
        ({"name": "atom", "customMetrics": [{"attributeKey": "k", "metricSpec": ""}]}, "customMetrics[0]: attributeKey and metricSpec must not be empty"),
        ({"name": "atom", "customMetrics": [{"metricSpec": "m"}]}, "customMetrics[0]: attributeKey and metricSpec must not be empty"),
        ({"name": "atom", "customMetrics": [{"attributeKey": "k", "metricSpec": "m{"}]}, "customMetrics[0].metricSpec: 'm{' is not"),
        ({"name": "atom", "customMetrics": [{"attributeKey": "k", "metricSpec": "m"}] * 2}, "customMetrics[1]: attributeKey 'k' is there twice"),
    ],
)  # fmt: skip
def test_faults_of_the_configuration(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        CustomFamily(config)
    assert str(raised.value).startswith(message)


@settings(deadline=None)  # the machine's load is not what is tested
@given(st.text(), st.text(max_size=5))
def test_any_text_is_a_spec_or_a_value_error(text: str, value: str) -> None:
    for candidate in (text, f"up{{{text}}}", f'up{{a="{text}",b={value}}}'):
        try:
            spec = Spec.parse(candidate, "f")
        except ValueError:
            continue
        assert spec.metric
