"""What pods, pools, objectives and rewrites say, and which endpoints follow from it."""

from __future__ import annotations

import itertools
import json
import logging
from typing import Any

import msgspec
import pytest

from epp.errors import ConfigError
from epp.resources import Choice, Objective, Rewrite, Rule
from epp.sources.kubernetes.endpoints import FAULTS_TOLD_MAX, Membership, PoolView, ports_of
from epp.sources.kubernetes.objects import Pod, PoolObject, Seen, read_head, read_pod, read_pool, read_pool_old, read_resource
from epp.sources.kubernetes.selector import Selector
from epp.types import Address

ONE_PORT = [PoolView("pool", (8000,), None)]
ACTIVE = "llm-d.ai/active-ports"
ACTIVE_OLD = "inference.networking.k8s.io/active-ports"


def raw(document: Any) -> msgspec.Raw:
    return msgspec.Raw(json.dumps(document).encode())


def pod(
    name: str = "a",
    *,
    ip: str | None = "10.0.0.1",
    ready: str = "True",
    phase: str = "Running",
    deleted: bool = False,
    uid: str = "",
    created: str = "2026-01-01T00:00:00Z",
    labels: dict[str, str] | None = None,
    annotations: dict[str, str] | None = None,
    spec: dict[str, Any] | None = None,
) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "name": name,
        "namespace": "llm",
        "uid": uid or f"uid-{name}",
        "resourceVersion": "7",
        "creationTimestamp": created,
        "labels": labels,
        "annotations": annotations,
    }
    if deleted:
        metadata["deletionTimestamp"] = "2026-01-02T00:00:00Z"
    status = {"phase": phase, "conditions": [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": ready}]}
    if ip is not None:
        status["podIP"] = ip
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec or {"containers": [{"name": "engine"}]}, "status": status}


def seen(document: dict[str, Any]) -> tuple[tuple[str, str], Pod]:
    found = read_pod(raw(document))
    return found.key, found.value


def endpoints(*pods: dict[str, Any], pools: list[PoolView] | None = None, membership: Membership | None = None) -> dict[str, str]:
    """name -> address, with `-` before one that drains."""
    membership = membership or Membership()
    membership.update(dict(map(seen, pods)), pools or ONE_PORT)
    return {spec.name: ("-" if spec.draining else "") + str(spec.address) for spec in membership.specs.values()}


class TestPods:
    def test_what_is_read(self) -> None:
        found = read_pod(raw(pod(labels={"app": "vllm"}, annotations={ACTIVE: "8000", "other": "x"})))
        assert found == Seen(
            ("llm", "a"), "7", Pod("llm", "a", "uid-a", "10.0.0.1", {"app": "vllm"}, True, False, 1767225600.0, "8000", frozenset())
        )

    @pytest.mark.parametrize(
        ("document", "ready", "terminating"),
        [
            (pod(), True, False),
            (pod(phase="Pending"), True, False),
            (pod(ready="False"), False, False),
            (pod(ready="Unknown"), False, False),
            (pod(ip=None), False, False),
            (pod(ip=""), False, False),
            (pod(ip="not an address"), False, False),
            (pod(phase="Succeeded"), False, False),
            (pod(phase="Failed"), False, False),
            (pod(deleted=True), False, True),
            (pod(deleted=True, ready="False"), False, True),
            (pod(deleted=True, phase="Failed"), False, False),
            (pod(deleted=True, ip=None), False, False),
        ],
    )
    def test_which_take_requests(self, document: dict[str, Any], ready: bool, terminating: bool) -> None:
        _, value = seen(document)
        assert (value.ready, value.terminating) == (ready, terminating)

    def test_a_pod_just_made_has_hardly_a_field(self) -> None:
        key, value = seen({"metadata": {"name": "a", "namespace": "llm"}, "status": {"conditions": None}})
        assert key == ("llm", "a")
        assert not value.ready
        assert not value.terminating

    def test_an_update_that_changes_nothing_here_is_the_same(self) -> None:
        before, after = pod(), pod()
        after["metadata"] |= {"resourceVersion": "8", "annotations": {"seen-by": "another"}, "managedFields": [{"manager": "kubelet"}]}
        after["status"]["containerStatuses"] = [{"name": "engine", "restartCount": 1}]
        assert seen(before) == seen(after)

    def test_ports_are_read_of_pods_on_the_network_of_their_node_alone(self) -> None:
        spec = {"containers": [{"ports": [{"containerPort": 8000}, {"containerPort": 9}]}, {"ports": None}, {}]}
        assert seen(pod(spec=spec))[1].ports_declared == frozenset()
        assert seen(pod(spec=spec | {"hostNetwork": True}))[1].ports_declared == {8000, 9}

    @pytest.mark.parametrize(
        "document", [{}, {"metadata": {}}, {"metadata": {"name": 1}}, [], {"metadata": {"name": "a", "labels": ["x"]}}]
    )
    def test_what_is_no_pod_is_a_decode_error(self, document: Any) -> None:
        with pytest.raises(msgspec.DecodeError):
            read_pod(raw(document))

    def test_a_head_is_read_of_anything(self) -> None:
        assert read_head(raw({"metadata": {"name": "a", "namespace": "n", "resourceVersion": "3", "labels": 5}, "spec": 1})) == (
            ("n", "a"),
            "3",
            None,
        )


class TestEndpoints:
    def test_one_for_each_port(self) -> None:
        pools = [PoolView("pool", (8000, 8001), None)]
        assert endpoints(pod(), pools=pools) == {"a-rank-0": "10.0.0.1:8000", "a-rank-1": "10.0.0.1:8001"}

    def test_all_of_it(self) -> None:
        membership = Membership()
        assert membership.update(dict([seen(pod(labels={"llm-d.ai/role": "decode"}))]), ONE_PORT)
        (spec,) = membership.specs.values()
        assert spec == ("a-rank-0", Address("10.0.0.1", 8000), "llm", {"llm-d.ai/role": "decode"}, None, False, ("pool",))

    @pytest.mark.parametrize("ip", ["2001:db8::1", "2001:DB8:0:0::1"])
    def test_ipv6(self, ip: str) -> None:
        assert endpoints(pod(ip=ip)) == {"a-rank-0": "[2001:db8::1]:8000"}

    @pytest.mark.parametrize(
        ("annotations", "names"),
        [
            ({ACTIVE: "8001"}, ["a-rank-1"]),
            ({ACTIVE: " 8002 , 8000"}, ["a-rank-0", "a-rank-2"]),
            ({ACTIVE_OLD: "8001"}, ["a-rank-1"]),
            ({ACTIVE: "8000", ACTIVE_OLD: "8001"}, ["a-rank-0"]),
            ({ACTIVE: "8001,9999"}, ["a-rank-1"]),
            ({ACTIVE: "8001,x,-1,70000,,8001.0"}, ["a-rank-1"]),
            ({ACTIVE: ""}, []),
            ({ACTIVE: "none"}, []),
            ({}, ["a-rank-0", "a-rank-1", "a-rank-2"]),
        ],
    )
    def test_an_annotation_narrows_the_ports_and_ranks_keep_their_number(self, annotations: dict[str, str], names: list[str]) -> None:
        found = endpoints(pod(annotations=annotations), pools=[PoolView("pool", (8000, 8001, 8002), None)])
        assert sorted(found) == names

    def test_a_wrong_value_is_told_once(self, caplog: pytest.LogCaptureFixture) -> None:
        membership = Membership()
        for labels in ({"n": str(n)} for n in range(3)):
            endpoints(pod(annotations={ACTIVE: "8000,x,80000"}, labels=labels), membership=membership)
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert record.__dict__["fields"] == {"pod": "llm/a", "values": "x, 80000"}

    def test_what_was_told_is_forgotten_at_a_limit(self) -> None:
        membership = Membership()
        for n in range(FAULTS_TOLD_MAX + 5):
            endpoints(pod(annotations={ACTIVE: f"x{n}"}), membership=membership)
        assert len(membership._told) == 5

    def test_ports_of(self) -> None:
        assert ports_of("1,65535,0,65536,٣,") == (frozenset({1, 65535}), ["0", "65536", "٣"])

    def test_a_pod_that_is_deleted_drains_until_it_is_gone(self) -> None:
        membership = Membership()
        assert endpoints(pod(), membership=membership) == {"a-rank-0": "10.0.0.1:8000"}
        assert endpoints(pod(deleted=True), membership=membership) == {"a-rank-0": "-10.0.0.1:8000"}
        assert endpoints(pod(deleted=True, ready="False"), membership=membership) == {"a-rank-0": "-10.0.0.1:8000"}
        assert endpoints(membership=membership) == {}

    def test_a_terminating_pod_that_was_no_endpoint_does_not_become_one(self) -> None:
        assert endpoints(pod(deleted=True)) == {}

    def test_a_pod_that_is_not_ready_any_more_leaves_and_comes_back(self) -> None:
        membership = Membership()
        for ready, count in (("True", 1), ("False", 0), ("True", 1)):
            assert len(endpoints(pod(ready=ready), membership=membership)) == count

    def test_an_address_given_anew_is_the_new_pods(self) -> None:
        old, new = pod("old", created="2026-01-01T00:00:00Z"), pod("new", created="2026-01-01T01:00:00Z")
        for both in itertools.permutations((old, new)):
            assert endpoints(*both) == {"new-rank-0": "10.0.0.1:8000"}

    def test_a_pod_that_serves_beats_a_newer_one_that_ends(self) -> None:
        membership = Membership()
        endpoints(pod("new", created="2026-01-01T01:00:00Z"), membership=membership)
        ends = pod("new", created="2026-01-01T01:00:00Z", deleted=True)
        for both in itertools.permutations((pod("old"), ends)):
            assert endpoints(*both, membership=membership) == {"old-rank-0": "10.0.0.1:8000"}

    def test_two_of_the_same_age_do_not_take_turns(self) -> None:
        found = {tuple(endpoints(*order).items()) for order in itertools.permutations((pod("a"), pod("b"), pod("c")))}
        assert found == {(("c-rank-0", "10.0.0.1:8000"),)}

    def test_pods_of_one_node_share_its_address(self) -> None:
        def on_node(name: str, port: int, created: str) -> dict[str, Any]:
            return pod(name, created=created, spec={"hostNetwork": True, "containers": [{"ports": [{"containerPort": port}]}]})

        pools = [PoolView("pool", (8000, 8001), None)]
        older, newer = on_node("older", 8000, "2026-01-01T00:00:00Z"), on_node("newer", 8001, "2026-01-01T01:00:00Z")
        for both in itertools.permutations((older, newer)):
            assert endpoints(*both, pools=pools) == {"older-rank-0": "10.0.0.1:8000", "newer-rank-1": "10.0.0.1:8001"}
        older["metadata"]["annotations"], newer["metadata"]["annotations"] = {ACTIVE: "8000"}, {ACTIVE: "8001"}
        assert endpoints(older, newer, pools=pools) == {"older-rank-0": "10.0.0.1:8000", "newer-rank-1": "10.0.0.1:8001"}

    def test_another_pod_under_the_same_name_and_address_is_reported(self) -> None:
        membership = Membership()
        endpoints(pod(uid="1"), membership=membership)
        assert not membership.replaced
        assert membership.update(dict([seen(pod(uid="2"))]), ONE_PORT)
        assert membership.replaced == {Address("10.0.0.1", 8000)}
        assert not membership.update(dict([seen(pod(uid="2"))]), ONE_PORT)
        assert not membership.replaced
        endpoints(pod("b", uid="3"), membership=membership)
        assert not membership.replaced  # by its name the datastore sees that itself

    def test_several_pools(self) -> None:
        pools = [
            PoolView("chat", (8000, 8001), Selector.of_labels({"app": "chat"})),
            PoolView("all", (8001, 8000), Selector.parse("app")),
            PoolView("other", (9000,), Selector.of_labels({"app": "other"})),
            PoolView("both", (9001, 9000), Selector.of_labels({"app": "other"})),
        ]
        membership = Membership()
        membership.update(
            dict(
                [
                    seen(pod("a", labels={"app": "chat"})),
                    seen(pod("b", ip="10.0.0.2", labels={"app": "other"})),
                    seen(pod("c", ip="10.0.0.3")),
                ]
            ),
            pools,
        )
        assert {spec.name: (str(spec.address), spec.pools) for spec in membership.specs.values()} == {
            "a-rank-0": ("10.0.0.1:8000", ("chat", "all")),
            "a-rank-1": ("10.0.0.1:8001", ("chat", "all")),
            "b-rank-0": ("10.0.0.2:8001", ("all",)),
            "b-rank-1": ("10.0.0.2:8000", ("all",)),
            "b-rank-0-9000": ("10.0.0.2:9000", ("other", "both")),
            "b-rank-0-9001": ("10.0.0.2:9001", ("both",)),
        }

    def test_only_what_changed_is_worked_out_anew(self) -> None:
        membership = Membership()
        pods = dict([seen(pod("a")), seen(pod("b", ip="10.0.0.2"))])
        assert membership.update(pods, ONE_PORT)
        before = membership.specs
        assert not membership.update(pods, ONE_PORT)
        pods |= dict([seen(pod("b", ip="10.0.0.2", labels={"x": "y"}))])
        assert membership.update(pods, ONE_PORT)
        kept, changed = Address("10.0.0.1", 8000), Address("10.0.0.2", 8000)
        assert membership.specs[kept] is before[kept]
        assert membership.specs[changed].labels == {"x": "y"}
        assert membership.update(pods, [PoolView("pool", (8001,), None)])
        assert set(membership.specs) == {Address("10.0.0.1", 8001), Address("10.0.0.2", 8001)}


def pool(**spec: Any) -> dict[str, Any]:
    whole = {"selector": {"matchLabels": {"app": "vllm"}}, "targetPorts": [{"number": 8000}]} | spec
    return {"metadata": {"name": "p", "namespace": "llm", "resourceVersion": "5"}, "spec": whole}


class TestPools:
    def test_v1(self) -> None:
        ref = {"group": "", "kind": "Service", "name": "epp", "port": {"number": 9002}, "failureMode": "FailOpen"}
        found = read_pool(
            raw(pool(appProtocol="kubernetes.io/h2c", endpointPickerRef=ref, targetPorts=[{"number": 8000}, {"number": 8001}]))
        )
        selector = Selector.of_labels({"app": "vllm"})
        assert found == (("llm", "p"), "5", PoolObject("llm", "p", selector, (8000, 8001), "kubernetes.io/h2c", "epp", 9002))
        assert read_pool(raw(pool())).value == PoolObject("llm", "p", selector, (8000,))

    def test_v1alpha2(self) -> None:
        spec = {"selector": {"app": "vllm"}, "targetPortNumber": 8000, "extensionRef": {"name": "epp", "portNumber": 9002}}
        found = read_pool_old(raw({"metadata": {"name": "p", "namespace": "llm", "resourceVersion": "5"}, "spec": spec}))
        assert found.value == PoolObject("llm", "p", Selector.of_labels({"app": "vllm"}), (8000,), "", "epp", 9002)

    def test_a_reference_to_something_else_is_no_service(self) -> None:
        assert read_pool(raw(pool(endpointPickerRef={"kind": "Other", "name": "x"}))).value.service == ""

    def test_one_that_is_being_deleted(self) -> None:
        document = pool()
        document["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        assert read_pool(raw(document)).value.terminating

    @pytest.mark.parametrize(
        ("spec", "says"),
        [
            ({"selector": {"matchLabels": {}}}, "spec.selector: names no label"),
            ({"selector": {"matchLabels": {"a b": "x"}}}, "spec.selector: 'a b' is not the name of a label"),
            ({"targetPorts": []}, "spec.targetPorts: must be 1 to 8 ports"),
            ({"targetPorts": [{"number": 0}]}, "spec.targetPorts: must be 1 to 8 ports"),
            ({"targetPorts": [{"number": n} for n in range(1, 10)]}, "spec.targetPorts: must be 1 to 8 ports"),
        ],
    )
    def test_what_a_server_without_a_schema_would_let_through_is_refused(self, spec: dict[str, Any], says: str) -> None:
        with pytest.raises(ConfigError, match="InferencePool llm/p: 1 problem") as raised:
            read_pool(raw(pool(**spec)))
        assert says in str(raised.value)

    @pytest.mark.parametrize("read", [read_pool, read_pool_old])
    def test_what_is_no_pool_is_a_decode_error(self, read: Any) -> None:
        with pytest.raises(msgspec.DecodeError):
            read(raw({"metadata": {"name": "p"}, "spec": {"selector": 1}}))


class TestResources:
    def test_both_kinds_of_both_groups_with_fields_of_the_future(self) -> None:
        for group in ("llm-d.ai", "inference.networking.x-k8s.io"):
            head = {
                "apiVersion": f"{group}/v1alpha2",
                "metadata": {"name": "o", "namespace": "llm", "resourceVersion": "3", "generation": 4},
            }
            spec: dict[str, Any] = {"priority": -5, "poolRef": {"name": "p", "newer": 1}, "newer": {"x": 1}}
            assert read_resource(raw(head | {"kind": "InferenceObjective", "spec": spec, "status": {}})) == (
                ("llm", "o"),
                "3",
                Objective("o", "llm", -5, "p"),
            )
            spec = {"poolRef": {"name": "p"}, "rules": [{"targets": [{"modelRewrite": "m", "weight": 1, "newer": 1}]}]}
            assert read_resource(raw(head | {"kind": "InferenceModelRewrite", "spec": spec})).value == Rewrite(
                "o", "llm", (Rule((), (Choice("m", 1),)),), pool_name="p"
            )

    @pytest.mark.parametrize(
        ("document", "says"),
        [
            (
                {"kind": "InferenceObjective", "spec": {"priority": "high", "poolRef": {"name": "p"}}},
                "spec.priority: must be a whole number",
            ),
            ({"kind": "InferenceObjective", "spec": {}}, "spec.poolRef: is missing"),
            ({"kind": "InferenceModelRewrite", "spec": {"poolRef": {"name": "p"}, "rules": [{}]}}, "spec.rules[0].targets: is missing"),
            ({"kind": "Other"}, "kind: unknown kind 'Other'"),
        ],
    )
    def test_a_fault_is_said_with_its_path(self, document: dict[str, Any], says: str) -> None:
        with pytest.raises(ConfigError) as raised:
            read_resource(raw({"apiVersion": "llm-d.ai/v1alpha2", "metadata": {"name": "o", "namespace": "llm"}} | document))
        assert raised.value.source == "llm/o"
        assert says in [str(problem)[: len(says)] for problem in raised.value.problems]
