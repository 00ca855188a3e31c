"""Which family an answer is of."""

from pathlib import Path

import pytest

from epp.engines.custom import CustomFamily
from epp.engines.detect import BUILT_IN, engine_label, family_for, family_named

DATA = Path(__file__).parent.parent / "data"
NAMES = ["vllm", "sglang", "trtllm-serve", "triton-tensorrt-llm", "triton", "nim", "tgi", "llamacpp", "dynamo"]
VLLM = b"vllm:num_requests_waiting 1\n"


def name_of(label: str, text: bytes) -> str | None:
    family = family_for(label, text)
    return family.name if family else None


def test_every_label_of_the_protocol_is_known() -> None:
    assert sorted(BUILT_IN) == sorted(NAMES)
    for name in NAMES:
        assert name_of(name, b"") == name


@pytest.mark.parametrize("path", sorted(DATA.glob("*.txt")), ids=lambda path: path.stem)
def test_recordings(path: Path) -> None:
    expected = path.name.split("-", maxsplit=1)[0]
    if expected == "triton" and path.stem != "triton-2.51-metrics-idle":
        expected = "triton-tensorrt-llm"
    assert name_of("", path.read_bytes()) == expected


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (b"# TYPE tgi_queue_size gauge\ntgi_queue_size 0\n", "tgi"),
        (b"trtllm_num_requests_running 0\n", "trtllm-serve"),
        (b"# TYPE num_requests_running gauge\nnum_requests_running 0\n", "nim"),
        (b'[{"gpuMemUsage": 1, "numActiveRequests": 0}]', "trtllm-serve"),  # its /metrics; it is to be asked elsewhere
        (b" \r\n[]", "trtllm-serve"),
        (b"nv_inference_count 1\nvllm:num_requests_running 2\n", "vllm"),  # Triton with vLLM in it
        (b"vllm:num_requests_running 1\ndynamo_component_uptime_seconds 2\n", "dynamo"),
        (b"", None),
        (b"<html>vllm:num_requests_running</html>", None),
        (b"# HELP x of vllm:num_requests_running\nx 1\n", None),
        (b"python_info 1\n", None),
    ],
)
def test_texts(text: bytes, name: str | None) -> None:
    assert name_of("", text) == name


def test_the_label_counts_more_than_the_text() -> None:
    assert name_of("triton", (DATA / "triton-2.51-metrics-busy.txt").read_bytes()) == "triton"


def test_an_unknown_label_is_told_from_the_text() -> None:
    assert family_named("lmdeploy") is None
    assert name_of("lmdeploy", VLLM) == "vllm"
    assert name_of("lmdeploy", b"") is None


@pytest.mark.parametrize(
    ("labels", "engine"),
    [
        ({"llm-d.ai/engine-type": "sglang"}, "sglang"),
        ({"inference.networking.k8s.io/engine-type": "nim"}, "nim"),
        ({"llm-d.ai/engine-type": "sglang", "inference.networking.k8s.io/engine-type": "nim"}, "sglang"),
        ({"llm-d.ai/engine-type": "", "inference.networking.k8s.io/engine-type": "nim"}, "nim"),
        ({"app": "vllm"}, ""),
        ({}, ""),
    ],
)
def test_labels(labels: dict[str, str], engine: str) -> None:
    assert engine_label(labels) == engine


def test_a_label_of_ones_own() -> None:
    assert engine_label({"engine": "tgi", "llm-d.ai/engine-type": "sglang"}, "engine") == "tgi"
    assert engine_label({"llm-d.ai/engine-type": "sglang"}, "engine") == ""


def test_families_of_the_configuration_come_first() -> None:
    atom = CustomFamily({"name": "atom", "queuedRequestsSpec": "atom:waiting"})
    vllm = CustomFamily({"name": "vllm", "queuedRequestsSpec": "my_queue"})
    custom = {family.name: family for family in (atom, vllm)}
    assert family_for("atom", b"", custom) is atom
    assert family_named("vllm", custom) is vllm
    assert family_for("", VLLM, custom) is vllm
    assert family_for("", b"sglang:num_queue_reqs 1\n", custom) is BUILT_IN["sglang"]
