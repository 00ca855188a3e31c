"""What `epp doctor` makes of a cluster's objects, and the checks whose faults no API server would let in; whole runs: kubernetes/test_doctor."""

from __future__ import annotations

from typing import Any

import pytest

from epp.doctor import cluster_access_checks, cluster_pool_checks
from epp.doctor.cluster_facts import LLM_D, ServerFacts, needed
from epp.doctor.cluster_model import (
    PickerFacts,
    PoolFacts,
    arguments,
    name_of,
    near_misses,
    not_ready_because,
    parsed,
    pickers,
    ready,
    selected,
)
from epp.doctor.engine_facts import EngineFacts
from epp.doctor.findings import Status, judge
from epp.errors import ConfigError

CHECKS = {check.name: check for check in (*cluster_access_checks.CHECKS, *cluster_pool_checks.CHECKS)}
GROUP = "inference.networking.k8s.io"

Json = dict[str, Any]


def pod(name: str = "a", port: int = 8000, **labels: str) -> Json:
    ready_ = [{"type": "Ready", "status": "True"}]
    return {
        "metadata": {"name": name, "labels": labels}, "spec": {"containers": [{"ports": [{"containerPort": port}]}]},
        "status": {"podIP": "10.0.0.1", "conditions": ready_},
    }  # fmt: skip


def pool(**spec: Any) -> PoolFacts:
    return PoolFacts(name="pool", namespace="ns", group=GROUP, pool={"metadata": {"name": "pool"}, "spec": spec})


def statuses(check: str, *facts: object) -> list[Status]:
    return [result.finding.status for result in judge(CHECKS[check], dict(zip(CHECKS[check].needs, facts, strict=True)))]


@pytest.mark.parametrize(
    ("labels", "pods", "found"),
    [
        ({"app": "vllm"}, [pod("a", app="vlm", port=1)], ("a", "app", "app=vlm")),
        ({"app": "vllm"}, [pod("a", App="vllm", port=1)], ("a", "app", "App=vllm")),
        ({"app": "vllm"}, [pod("a", application="vllm", port=8000)], ("a", "app", "application=vllm")),
        ({"app": "vllm"}, [pod("epp", app="epp", port=9002)], None),
        ({"app": "vllm"}, [pod("epp", app="epp", port=9002), pod("a", app="sglang")], ("a", "app", "app=sglang")),
        ({"app": "vllm", "model": "m"}, [pod("a", app="vllm", port=1)], ("a", "model", None)),
        ({"app": "vllm", "model": "m"}, [pod("a", port=1)], None),
        ({"app": "vllm"}, [pod("a", app="vllm")], None),
    ],
)
def test_near_misses(labels: dict[str, str], pods: list[Json], found: tuple[str, str, str | None] | None) -> None:
    misses = near_misses(pods, labels, [8000])
    assert [(name_of(each), key, has) for each, key, has in misses[:1]] == ([found] if found else [])


@pytest.mark.parametrize(
    ("container", "words"),
    [
        ({"args": ["--pool-name=x"]}, ["--pool-name=x"]),
        ({"args": ["serve", "--pool-name", "x"]}, ["--pool-name", "x"]),
        ({"command": ["/app/epp"], "args": ["-v", "4"]}, ["-v", "4"]),
        ({"command": ["/usr/bin/python3", "-m", "epp", "serve"], "args": ["--pool-name=x"]}, ["--pool-name=x"]),
        ({"args": ["--pool-namespace=$(NS)", "--x=$(OTHER)"], "env": [{"name": "NS", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}}]},
         ["--pool-namespace=ns", "--x=$(OTHER)"]),
        ({"args": ["--a=$(A)"], "env": [{"name": "A", "value": "b"}]}, ["--a=b"]),
        ({}, []),
    ],
)  # fmt: skip
def test_a_container_s_flags(container: Json, words: list[str]) -> None:
    assert arguments(container, "ns") == words


def test_flags_are_read_by_the_picker_s_own_parser() -> None:
    options = parsed(["-pool-name=a", "--pool-name", "b", "--secure-serving=false", "--tracing=false"])
    assert options.pool_names == ("a", "b")
    assert not options.secure_serving
    for words in (["--no-such-flag"], ["--grpc-port=x"], ["--pool-name=a", "--endpoint-selector=b", "--endpoint-target-ports=1"]):
        with pytest.raises(ConfigError):
            parsed(words)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"metadata": {"deletionTimestamp": "x"}}, "terminating"),
        ({"status": {"containerStatuses": [{"state": {"waiting": {"reason": "CrashLoopBackOff"}}}]}}, "CrashLoopBackOff"),
        ({"status": {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}]}}, "Unschedulable"),
        ({"status": {"phase": "Pending"}}, "Pending"),
        ({"status": {"phase": "Failed", "podIP": "x", "conditions": [{"type": "Ready", "status": "True"}]}}, "Failed"),
        ({}, "not ready"),
    ],
)
def test_why_a_pod_is_not_ready(change: Json, reason: str) -> None:
    assert not ready(change)
    assert not_ready_because(change) == reason


def test_a_selector_of_nothing_selects_nothing() -> None:
    assert selected([pod(app="a")], {}) == []
    assert selected([pod(app="a")], {"app": "a"}) == [pod(app="a")]
    assert statuses("pool-exists", [pool(selector={"matchLabels": {}}, targetPorts=[{"number": 1}])]) == [Status.FAIL]
    assert statuses("pool-exists", [pool(selector={"matchLabels": {"a": "b"}})]) == [Status.FAIL]
    assert statuses("pool-exists", [pool(selector={"matchLabels": {"a": "b"}}, targetPorts=[{"number": 1}])]) == [Status.OK]


def test_both_versions_of_a_pool_are_read() -> None:
    new = pool(
        selector={"matchLabels": {"a": "b"}},
        targetPorts=[{"number": 1}, {"number": 2}],
        endpointPickerRef={"name": "s", "port": {"number": 9}},
    )
    old = pool(selector={"a": "b"}, targetPortNumber=1, extensionRef={"name": "s", "portNumber": 9})
    assert (new.selector, new.ports, new.reference_port) == ({"a": "b"}, [1, 2], 9)
    assert (old.selector, old.ports, old.reference_port) == ({"a": "b"}, [1], 9)
    assert pool().reference_port is None


@pytest.mark.parametrize(
    "junk", [None, 7, "x", [], {}, {"spec": 7}, {"spec": {"selector": [], "targetPorts": 7, "endpointPickerRef": "x"}}]
)
def test_objects_that_are_junk_raise_nothing(junk: Any) -> None:
    facts = PoolFacts(name="pool", namespace="ns", group=GROUP, pool=junk if isinstance(junk, dict) else {})
    found = pickers([facts], [junk] if isinstance(junk, dict) else [], [], [])
    assert [each.pool for each in found] == [facts]
    assert facts.selector == {}
    assert facts.ports == []


@pytest.mark.parametrize(
    ("protocol", "status"), [("", Status.OK), ("http", Status.OK), ("kubernetes.io/h2c", Status.OK), ("grpc", Status.FAIL)]
)
def test_protocols(protocol: str, status: Status) -> None:
    assert statuses("pool-protocol", [PickerFacts(pool=pool(appProtocol=protocol))]) == [status]


@pytest.mark.parametrize(
    ("skew_s", "status"), [(None, Status.SKIPPED), (0.5, Status.OK), (-4.0, Status.OK), (90.0, Status.WARN), (-90.0, Status.WARN)]
)
def test_the_api_server_s_clock(skew_s: float | None, status: Status) -> None:
    assert statuses("cluster-clock", ServerFacts(skew_s=skew_s)) == [status]


@pytest.mark.parametrize(
    ("facts", "status"),
    [
        (ServerFacts(version="v1"), Status.OK),
        (ServerFacts(error="refused"), Status.FAIL),
        (ServerFacts(error="401", status=401), Status.FAIL),
    ],
)
def test_the_api_server(facts: ServerFacts, status: Status) -> None:
    assert statuses("cluster-api", facts) == [status]


def test_engines_that_can_not_be_reached_from_here_are_no_fault_unless_others_can() -> None:
    up, down = EngineFacts(name="a", address="a"), EngineFacts(name="b", address="b", error="refused")
    assert statuses("pool-metrics", [up]) == [Status.OK]
    assert statuses("pool-metrics", [down]) == [Status.OK]
    assert statuses("pool-metrics", [up, down]) == [Status.WARN]


def test_rights_are_needed_only_for_kinds_there_are() -> None:
    bare = {each.resource for each in needed([GROUP], {})}
    assert bare == {"pods", "inferencepools", "leases", "tokenreviews", "subjectaccessreviews"}
    with_objectives = needed([GROUP], {LLM_D: frozenset({"inferenceobjectives"})})
    assert {(each.group, each.verb) for each in with_objectives if each.resource == "inferenceobjectives"} == {
        (LLM_D, "list"),
        (LLM_D, "watch"),
    }
    assert not [each for each in with_objectives if each.verb in ("patch", "delete", "update") and each.resource != "leases"]
