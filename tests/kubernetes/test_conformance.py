"""What a client may rely on of an API server, said once: the fake is held to it always, a real server where one is given (README.md).

Where the two differ the real one is right. Seen on Kubernetes 1.20.2; what later versions do otherwise is not asserted.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tests.kubernetes.fake_objects import Object, inference_pool, inference_pool_v1alpha2, lease, objective, pod, rewrite, service
from tests.kubernetes.server import WAIT_S, Server

POOL_V1 = "inference.networking.k8s.io"


def kinds(events: list[Object]) -> list[tuple[str, str]]:
    return [(event["type"], event["object"]["metadata"]["name"]) for event in events]


def names(page: Object) -> list[str]:
    return [item["metadata"]["name"] for item in page["items"]]


def rv_of(obj: Object) -> int:
    return int(obj["metadata"]["resourceVersion"])


def failure(answer: Any) -> tuple[int, str]:
    """Code and reason of a Status, which says the same as HTTP does."""
    body = answer.json()
    assert (body["kind"], body["apiVersion"], body["status"], body["code"]) == ("Status", "v1", "Failure", answer.status_code)
    return body["code"], body.get("reason", "")


# Writing


async def test_an_object_is_created_once(server: Server) -> None:
    pool = inference_pool("llama")
    made = await server.post(pool)
    assert made.status_code == 201
    metadata = made.json()["metadata"]
    assert metadata["generation"] == 1
    assert metadata["namespace"] == server.namespace
    assert metadata["uid"]
    assert metadata["creationTimestamp"].endswith("Z")
    assert made.json()["spec"]["appProtocol"] == "http", "a default of the schema"
    again = await server.post(pool)
    assert failure(again) == (409, "AlreadyExists")
    assert again.json()["message"] == 'inferencepools.inference.networking.k8s.io "llama" already exists'
    assert again.json()["details"] == {"name": "llama", "group": POOL_V1, "kind": "inferencepools"}
    assert (await server.admin.get(server.path(pool))).json()["metadata"] == metadata


@pytest.mark.parametrize(
    "obj",
    [
        inference_pool_v1alpha2("llama"), objective("gold", 5, "llama"), objective("gold", -5, "llama", old=True), objective("gold", None, "llama"),
        rewrite("chat", "llama", [("chat", {"a": 1, "b": 2})]), rewrite("chat", "llama", [("", {"a": 1})], old=True), service("epp"), lease("epp", "a"),
        pod("a", "10.0.0.1"), pod("b", "fd00::1"),
    ],
    ids=lambda obj: f"{obj['kind']} {obj['apiVersion']} {obj['metadata']['name']}",
)  # fmt: skip
async def test_the_kinds_the_picker_reads_are_taken(server: Server, obj: Object) -> None:
    made = await server.create(obj)
    for name, value in obj["spec"].items():
        if not isinstance(value, dict | list):  # those get defaults
            assert made["spec"][name] == value
    assert made["kind"] == obj["kind"]
    assert made["apiVersion"] == obj["apiVersion"]
    assert (await server.admin.get(server.path(obj))).json() == made


async def test_a_default_pool_group_is_filled_in(server: Server) -> None:
    assert (await server.create(objective("gold", 5, "llama")))["spec"]["poolRef"] == {
        "group": POOL_V1, "kind": "InferencePool", "name": "llama",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("pool", "field"),
    [
        (inference_pool("bad", ports=[0]), "spec.targetPorts.number"),
        (inference_pool("bad", ports=[70_000]), "spec.targetPorts.number"),
        (inference_pool("bad", ports=[]), "spec.targetPorts"),
        (inference_pool("bad", ports=range(8000, 8009)), "spec.targetPorts"),
        (inference_pool("bad", {}), "spec.selector.matchLabels"),
        (inference_pool("bad", app_protocol="https"), "spec.appProtocol"),
        (inference_pool_v1alpha2("bad", port=0), "spec.targetPortNumber"),
        (rewrite("bad", "llama", [("m", {"a": 0})]), "spec.rules.targets.weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_what_the_schema_forbids_is_refused(server: Server, pool: Object, field: str) -> None:
    answer = await server.post(pool)
    assert failure(answer) == (422, "Invalid")
    full = f"{pool['kind']}.{pool['apiVersion'].partition('/')[0]}"
    assert answer.json()["message"].startswith(f'{full} "bad" is invalid: {field}')
    assert answer.json()["details"]["causes"][0]["field"] == field


async def test_fields_the_schema_does_not_know_are_dropped(server: Server) -> None:
    pool = inference_pool("llama")
    pool["spec"]["junk"] = 1
    pool["spec"]["endpointPickerRef"]["more"] = {"junk": 1}
    made = await server.create(pool)
    assert "junk" not in made["spec"]
    assert "more" not in made["spec"]["endpointPickerRef"]


async def test_what_is_not_of_the_paths_kind_is_refused(server: Server) -> None:
    where = server.path("inferencepools")
    assert failure(await server.admin.post(where, json={"metadata": {"name": "a"}})) == (400, "BadRequest")
    assert failure(await server.admin.post(where, json=pod("a"))) == (400, "BadRequest")
    assert failure(await server.admin.post(where, content=b"{nojson", headers={"Content-Type": "application/json"})) == (400, "BadRequest")
    other = inference_pool("a", namespace="default")
    answer = await server.admin.post(where, json=other)
    assert failure(answer) == (400, "BadRequest")
    assert answer.json()["message"] == "the namespace of the provided object does not match the namespace sent on the request"
    assert failure(await server.post(inference_pool("Bad_Name"))) == (422, "Invalid")
    versioned = inference_pool("a")
    versioned["metadata"]["resourceVersion"] = "3"
    assert failure(await server.post(versioned)) == (500, "")
    no_containers = pod("a")
    no_containers["spec"]["containers"] = []
    assert failure(await server.post(no_containers)) == (422, "Invalid")


async def test_an_update_needs_the_version_it_changes(server: Server) -> None:
    pool = await server.create(inference_pool("llama"))
    path = server.path(pool)
    changed = json.loads(json.dumps(pool))
    changed["spec"]["targetPorts"] = [{"number": 9000}]
    second = await server.admin.put(path, json=changed)
    assert second.status_code == 200
    assert rv_of(second.json()) > rv_of(pool)
    assert second.json()["metadata"]["generation"] == 2
    stale = await server.admin.put(path, json=changed)
    assert failure(stale) == (409, "Conflict")
    assert "the object has been modified; please apply your changes to the latest version and try again" in stale.json()["message"]
    del changed["metadata"]["resourceVersion"]
    without = await server.admin.put(path, json=changed)
    assert failure(without) == (422, "Invalid")
    assert "metadata.resourceVersion: Invalid value: 0x0: must be specified for an update" in without.json()["message"]
    renamed = json.loads(json.dumps(second.json()))
    renamed["metadata"]["name"] = "other"
    assert failure(await server.admin.put(path, json=renamed)) == (400, "BadRequest")
    assert failure(await server.admin.put(server.path(renamed), json=renamed)) == (409, "Conflict"), "that one is not there"
    del renamed["metadata"]["uid"]
    assert failure(await server.admin.put(server.path(renamed), json=renamed)) == (404, "NotFound")


async def test_an_update_that_changes_nothing_writes_nothing(server: Server) -> None:
    pool = await server.create(inference_pool("llama"))
    async with server.watch("inferencepools", resourceVersion=rv_of(pool)) as events:
        same = await server.admin.put(server.path(pool), json=pool)
        assert same.json()["metadata"]["resourceVersion"] == pool["metadata"]["resourceVersion"]
        await server.create(inference_pool("next"))
        assert kinds([await events.next()]) == [("ADDED", "next")]


async def test_the_status_has_a_way_of_its_own(server: Server) -> None:
    pool = await server.create(inference_pool("llama"))
    parents = [{"parentRef": {"name": "gateway"}}]
    ignored = await server.patch(pool, {"status": {"parents": parents}})
    assert ignored.status_code == 200
    assert not ignored.json().get("status")
    applied = await server.patch(pool, {"status": {"parents": parents}, "spec": {"targetPorts": [{"number": 1}]}}, sub="/status")
    assert applied.json()["status"]["parents"][0]["parentRef"]["name"] == "gateway"
    assert applied.json()["spec"] == pool["spec"]
    assert applied.json()["metadata"]["generation"] == 1
    assert rv_of(applied.json()) > rv_of(pool)
    spec = await server.patch(pool, {"spec": {"targetPorts": [{"number": 8001}]}})
    assert spec.json()["metadata"]["generation"] == 2
    assert spec.json()["status"]["parents"], "a change of the spec leaves the status"
    whole = spec.json() | {"status": {}}
    assert (await server.admin.put(server.path(pool), json=whole)).json()["status"]["parents"]
    latest = (await server.admin.get(server.path(pool))).json()
    emptied = await server.admin.put(server.path(pool) + "/status", json=latest | {"status": {}})
    assert emptied.status_code == 200
    assert not emptied.json().get("status")
    labelled = await server.patch(pool, {"metadata": {"labels": {"a": "b"}}})
    assert labelled.json()["metadata"]["generation"] == 2


async def test_the_last_of_two_appliers_is_told_whose_field_it_is(server: Server) -> None:
    pool = server.here(inference_pool("llama", app_protocol="http"))
    kind = {"Content-Type": "application/apply-patch+yaml"}
    path = server.path(pool)
    made = await server.admin.patch(path, params={"fieldManager": "first"}, content=json.dumps(pool), headers=kind)
    assert made.status_code == 201
    pool["spec"]["appProtocol"] = "kubernetes.io/h2c"
    other = await server.admin.patch(path, params={"fieldManager": "second"}, content=json.dumps(pool), headers=kind)
    assert failure(other) == (409, "Conflict")
    assert '"first"' in other.json()["message"]
    (cause,) = other.json()["details"]["causes"]
    assert (cause["reason"], cause["field"]) == ("FieldManagerConflict", ".spec.appProtocol")
    same = await server.admin.patch(path, params={"fieldManager": "first"}, content=json.dumps(pool), headers=kind)
    assert same.status_code == 200
    assert same.json()["spec"]["appProtocol"] == "kubernetes.io/h2c"


async def test_a_delete_says_what_is_gone(server: Server) -> None:
    pool = await server.create(inference_pool("llama"))
    gone = await server.delete(pool)
    assert gone.status_code == 200
    assert gone.json()["status"] == "Success"
    assert gone.json()["details"]["uid"] == pool["metadata"]["uid"]
    again = await server.delete(pool)
    assert failure(again) == (404, "NotFound")
    assert again.json()["message"] == 'inferencepools.inference.networking.k8s.io "llama" not found'
    assert failure(await server.admin.get(server.path(pool))) == (404, "NotFound")
    back = await server.create(inference_pool("llama"))
    assert back["metadata"]["uid"] != pool["metadata"]["uid"]


async def test_a_collection_is_deleted_by_its_labels(server: Server) -> None:
    for name, of in (("a", "x"), ("b", "y"), ("c", "x")):
        await server.create(lease(name, "me") | {"metadata": {"name": name, "labels": {"of": of}}})
    answer = await server.admin.delete(server.path("leases"), params={"labelSelector": "of=x"})
    assert answer.status_code == 200
    assert names(await server.list("leases")) == ["b"]


async def test_a_pod_lives_without_a_kubelet(server: Server) -> None:
    given = pod("a", "10.0.0.7", node="")
    del given["spec"]["nodeName"]
    posted = await server.post(given)
    assert posted.json()["status"]["phase"] == "Pending"
    assert "podIP" not in posted.json()["status"], "the status of a POST is passed over"
    made = await server.patch(given, {"status": given["status"]}, sub="/status")
    assert made.json()["status"]["podIP"] == "10.0.0.7"
    assert made.json()["status"]["phase"] == "Running"
    async with server.watch("pods", resourceVersion=rv_of(made.json())) as events:
        assert (await server.delete(given)).status_code == 200
        marked, gone = await events.take(2)
    assert kinds([marked, gone]) == [("MODIFIED", "a"), ("DELETED", "a")], "it runs nowhere: nothing to wait for"
    for event in (marked, gone):
        assert event["object"]["metadata"]["deletionTimestamp"]
        assert event["object"]["metadata"]["deletionGracePeriodSeconds"] == 0


async def test_a_pod_on_a_node_terminates_before_it_goes(server: Server) -> None:
    made = await server.create(pod("a", "10.0.0.7", node="node-1"))
    async with server.watch("pods", resourceVersion=rv_of(made)) as events:
        answer = await server.delete(made)
        assert answer.json()["metadata"]["deletionGracePeriodSeconds"] == 30
        terminating = await events.next()
        assert kinds([terminating]) == [("MODIFIED", "a")]
        assert terminating["object"]["metadata"]["deletionTimestamp"]
        assert terminating["object"]["status"]["podIP"] == "10.0.0.7"
        assert failure(await server.post(pod("a"))) == (409, "AlreadyExists"), "its name is taken until it is gone"
        await server.delete(made, gracePeriodSeconds=0)
        assert kinds(await events.take(2)) == [("MODIFIED", "a"), ("DELETED", "a")]
    assert failure(await server.admin.get(server.path(made))) == (404, "NotFound")


async def test_a_finalizer_keeps_an_object(server: Server) -> None:
    pool = inference_pool("llama")
    pool["metadata"]["finalizers"] = ["example.com/held"]
    made = await server.create(pool)
    async with server.watch("inferencepools", resourceVersion=rv_of(made)) as events:
        assert (await server.delete(made)).status_code == 200
        held = await events.next()
        assert kinds([held]) == [("MODIFIED", "llama")]
        assert held["object"]["metadata"]["deletionTimestamp"]
        await server.patch(made, {"metadata": {"finalizers": None}})
        assert kinds([await events.next()]) == [("DELETED", "llama")]


# Lists


async def test_items_of_built_in_kinds_do_not_say_what_they_are(server: Server) -> None:
    await server.create(pod("a"))
    await server.create(inference_pool("llama"))
    pods, pools = await server.list("pods"), await server.list("inferencepools")
    assert (pods["kind"], pods["apiVersion"]) == ("PodList", "v1")
    assert "kind" not in pods["items"][0]
    assert "apiVersion" not in pods["items"][0]
    assert "continue" not in pods["metadata"]
    assert pools["metadata"]["continue"] == "", "of custom kinds it is always there"
    assert (pools["kind"], pools["apiVersion"]) == ("InferencePoolList", "inference.networking.k8s.io/v1")
    assert (pools["items"][0]["kind"], pools["items"][0]["apiVersion"]) == ("InferencePool", "inference.networking.k8s.io/v1")


@pytest.mark.parametrize("of", ["pods", "inferencepools"])
async def test_pages_show_one_moment(server: Server, of: str) -> None:
    make = pod if of == "pods" else inference_pool
    for name in "abcde":
        await server.create(make(name))
    first = await server.list(of, limit=2)
    assert names(first) == ["a", "b"]
    assert first["metadata"]["remainingItemCount"] == 3
    await server.create(make("bb"))
    await server.delete(make("d"), gracePeriodSeconds=0)
    second = await server.list(of, limit=2, **{"continue": first["metadata"]["continue"]})
    assert names(second) == ["c", "d"], "what came and went since is not seen"
    assert second["metadata"]["remainingItemCount"] == 1
    assert second["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
    third = await server.list(of, limit=2, **{"continue": second["metadata"]["continue"]})
    assert names(third) == ["e"]
    assert not third["metadata"].get("continue"), "empty is as good as none"
    assert "remainingItemCount" not in third["metadata"]
    assert names(await server.list(of)) == ["a", "b", "bb", "c", "e"]
    async with server.watch(of, resourceVersion=third["metadata"]["resourceVersion"]) as events:
        assert kinds([await events.next()]) == [("ADDED", "bb")], "what happened between the pages is not lost"


async def test_a_selected_page_does_not_count_what_is_left(server: Server) -> None:
    for name in "abc":
        await server.create(pod(name, labels={"app": "x"}))
    page = await server.list("pods", limit=1, labelSelector="app=x")
    assert page["metadata"]["continue"]
    assert "remainingItemCount" not in page["metadata"]
    rest = await server.list("pods", labelSelector="app=x", **{"continue": page["metadata"]["continue"]})
    assert names(rest) == ["b", "c"]


async def test_a_page_after_a_compaction_is_too_old_and_says_how_to_go_on(server: Server) -> None:
    if server.compact_now is None:
        pytest.skip("the history of this server can't be compacted from here")
    for name in "abc":
        await server.create(inference_pool(name))
    first = await server.list("inferencepools", limit=1)
    await server.create(inference_pool("bb"))
    await server.compact()
    token = first["metadata"]["continue"]
    answer = await server.admin.get(server.path("inferencepools"), params={"limit": 1, "continue": token})
    assert failure(answer) == (410, "Expired")
    assert "The provided continue parameter is too old to display a consistent list result." in answer.json()["message"]
    fresh = answer.json()["metadata"]["continue"]
    assert fresh != token
    rest = await server.list("inferencepools", **{"continue": fresh})
    assert names(rest) == ["b", "bb", "c"], "not the moment of the first page"
    assert int(rest["metadata"]["resourceVersion"]) > int(first["metadata"]["resourceVersion"])


async def test_a_list_at_a_version(server: Server) -> None:
    one = await server.create(inference_pool("one"))
    two = await server.create(inference_pool("two"))
    path = server.path("inferencepools")
    exact = await server.list("inferencepools", resourceVersion=rv_of(one), resourceVersionMatch="Exact")
    assert names(exact) == ["one"]
    assert exact["metadata"]["resourceVersion"] == one["metadata"]["resourceVersion"]
    paged = await server.list("inferencepools", resourceVersion=rv_of(one), limit=5)
    assert names(paged) == ["one"], "with a limit the version is meant exactly"
    later = await server.list("inferencepools", resourceVersion=rv_of(two))
    assert sorted(names(later)) == ["one", "two"], "without one: that or newer"
    assert int(later["metadata"]["resourceVersion"]) >= rv_of(two)
    future = await server.admin.get(path, params={"resourceVersion": str(10**9)})
    assert failure(future) == (504, "Timeout")
    assert future.json()["message"].startswith(f"Timeout: Too large resource version: {10**9}, current: ")
    assert future.json()["details"]["causes"] == [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}]
    assert future.headers["Retry-After"] == "1"
    assert future.json()["details"]["retryAfterSeconds"] == 1


async def test_a_list_from_the_cache_knows_no_pages(server: Server) -> None:
    for name in "abc":
        last = await server.create(inference_pool(name))
    await server.list("inferencepools", resourceVersion=rv_of(last))  # the cache is that far
    page = await server.list("inferencepools", resourceVersion="0", limit=1)
    assert sorted(names(page)) == ["a", "b", "c"]
    assert not page["metadata"].get("continue")


async def test_a_list_at_a_version_that_is_gone(server: Server) -> None:
    if server.compact_now is None:
        pytest.skip("the history of this server can't be compacted from here")
    made = await server.create(inference_pool("one"))
    await server.create(inference_pool("two"))
    await server.compact()
    params = {"resourceVersion": str(rv_of(made)), "resourceVersionMatch": "Exact"}
    answer = await server.admin.get(server.path("inferencepools"), params=params)
    assert failure(answer) == (410, "Expired")
    assert answer.json()["message"] == "The resourceVersion for the provided list is too old."


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"resourceVersion": "abc"}, (500, "")),
        ({"continue": "abc"}, (400, "BadRequest")),
        ({"limit": "x"}, (400, "BadRequest")),
        ({"resourceVersionMatch": "Exact"}, (422, "Invalid")),
        ({"labelSelector": "a b c"}, (400, "BadRequest")),
        ({"fieldSelector": "spec.nothing=1"}, (400, "BadRequest")),
        ({"watch": "true", "resourceVersion": "abc"}, (500, "")),
        ({"watch": "true", "labelSelector": "a b c"}, (400, "BadRequest")),
        ({"watch": "true", "fieldSelector": "spec.nothing=1"}, (400, "BadRequest")),
    ],
    ids=str,
)
@pytest.mark.parametrize("of", ["pods", "inferencepools"])
async def test_parameters_that_make_no_sense(server: Server, of: str, params: dict[str, str], said: tuple[int, str]) -> None:
    assert failure(await server.admin.get(server.path(of), params=params)) == said


@pytest.mark.parametrize(
    ("selector", "found"),
    [
        ("", "abc"),
        ("app=x", "ab"),
        ("app==x", "ab"),
        ("app!=x", "c"),
        ("app=x,role=decode", "a"),
        ("role in (decode,prefill)", "ab"),
        ("role notin (decode)", "bc"),
        ("role", "ab"),
        ("!role", "c"),
        ("app in (x), !none ,role!=prefill", "a"),
        ("app=", ""),
        ("example.com/tier=gold", "c"),
    ],
)
async def test_label_selectors(server: Server, selector: str, found: str) -> None:
    await server.create(pod("a", labels={"app": "x", "role": "decode"}))
    await server.create(pod("b", labels={"app": "x", "role": "prefill"}))
    await server.create(pod("c", labels={"app": "y", "example.com/tier": "gold"}))
    assert "".join(names(await server.list("pods", labelSelector=selector))) == found


async def test_field_selectors(server: Server) -> None:
    for name in "ab":
        await server.create(pod(name))
        await server.create(inference_pool(name))
    for of in ("pods", "inferencepools"):
        assert names(await server.list(of, fieldSelector="metadata.name=a")) == ["a"]
        assert names(await server.list(of, fieldSelector="metadata.name!=a")) == ["b"]
        assert names(await server.list(of, fieldSelector=f"metadata.name=b,metadata.namespace={server.namespace}")) == ["b"]
    assert names(await server.list("pods", fieldSelector="status.phase=Running")) == ["a", "b"]
    assert names(await server.list("pods", fieldSelector="status.phase=Pending")) == []


async def test_all_namespaces_at_once(server: Server) -> None:
    made = await server.create(inference_pool("llama"))
    everywhere = f"/apis/{POOL_V1}/v1/inferencepools"
    answer = await server.admin.get(everywhere, params={"fieldSelector": f"metadata.namespace={server.namespace}"})
    assert names(answer.json()) == ["llama"]
    async with server.watch(everywhere, resourceVersion=rv_of(made), labelSelector="mine") as events:
        await server.relabel(made, mine="yes")
        assert kinds([await events.next()]) == [("ADDED", "llama")]


async def test_a_big_list_comes_compressed(server: Server) -> None:
    padding = {f"padding-{number}": "x" * 60 for number in range(100)}
    await asyncio.gather(*(server.post(pod(f"pod-{number:03}", labels={"app": "x", **padding})) for number in range(30)))
    answer = await server.admin.get(server.path("pods"))
    assert answer.headers["Content-Encoding"] == "gzip"
    assert len(answer.json()["items"]) == 30
    plain = await server.admin.get(server.path("pods"), headers={"Accept-Encoding": "identity"})
    assert "Content-Encoding" not in plain.headers
    assert plain.json()["items"] == answer.json()["items"]


# Watches


@pytest.mark.parametrize("of", ["pods", "inferencepools"])
async def test_a_watch_goes_on_from_a_list(server: Server, of: str) -> None:
    make = pod if of == "pods" else inference_pool
    before = await server.create(make("before"))
    start = await server.rv(of)
    async with server.watch(of, resourceVersion=start) as events:
        assert events.response.headers["Content-Type"] == "application/json"
        made = await server.create(make("a"))
        seen = await events.take(2 if of == "pods" else 1)
        assert kinds(seen)[0] == ("ADDED", "a")
        assert rv_of(seen[-1]["object"]) == rv_of(made)
        assert seen[-1]["object"]["kind"] == made["kind"]
        changed = await server.relabel(before, colour="red")
        event = await events.next()
        assert kinds([event]) == [("MODIFIED", "before")]
        assert event["object"]["metadata"]["resourceVersion"] == changed["metadata"]["resourceVersion"]
        await server.delete(made, gracePeriodSeconds=0)
        gone = (await events.take(2 if of == "pods" else 1))[-1]
    assert kinds([gone]) == [("DELETED", "a")]
    assert gone["object"]["spec"] == made["spec"], "as it was last"
    assert rv_of(gone["object"]) > rv_of(changed), "with the version of its end"


async def test_a_watch_without_a_version_begins_with_what_there_is(server: Server) -> None:
    for name in "ab":
        await server.create(inference_pool(name))
    for params in ({}, {"resourceVersion": "0"}):
        async with server.watch("inferencepools", **params) as events:
            assert sorted(kinds(await events.take(2))) == [("ADDED", "a"), ("ADDED", "b")]
    async with server.watch("inferencepools", labelSelector="!none", fieldSelector="metadata.name=b") as events:
        assert kinds([await events.next()]) == [("ADDED", "b")]


async def test_a_watch_from_an_old_version_tells_what_happened_since(server: Server) -> None:
    first = await server.create(inference_pool("a"))
    await server.relabel(first, colour="red")
    await server.create(inference_pool("b"))
    await server.delete(first)
    async with server.watch("inferencepools", resourceVersion=rv_of(first)) as events:
        seen = await events.take(3)
    assert kinds(seen) == [("MODIFIED", "a"), ("ADDED", "b"), ("DELETED", "a")]
    versions = [rv_of(event["object"]) for event in seen]
    assert versions == sorted(set(versions))


async def test_a_watch_from_a_version_too_old_is_told_so_in_the_stream(server: Server) -> None:
    await server.create(inference_pool("a"))
    async with server.watch("inferencepools", resourceVersion="1") as events:
        (event,) = await events.rest()
    assert event["type"] == "ERROR"
    assert {name: event["object"][name] for name in ("kind", "apiVersion", "status", "reason", "code")} == {
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Expired", "code": 410,
    }  # fmt: skip
    assert event["object"]["message"].startswith("too old resource version: 1 (")


async def test_a_watch_from_the_future_is_silent(server: Server) -> None:
    made = await server.create(inference_pool("a"))
    async with server.watch("inferencepools", resourceVersion=rv_of(made) + 1_000_000, timeoutSeconds=2) as events:
        await server.relabel(made, colour="red")
        assert await events.rest() == []


async def test_a_watch_ends_by_itself_without_a_word(server: Server) -> None:
    made = await server.create(inference_pool("a"))
    async with server.watch("inferencepools", resourceVersion=rv_of(made), timeoutSeconds=1) as events:
        assert await events.rest() == []


async def bookmarks(server: Server, of: str, obj: Object, **params: str) -> list[Object]:
    """Of a watch to which nothing else happens, while objects that it does not select change."""
    async with server.watch(of, resourceVersion=await server.rv(of), labelSelector="nobody=has", timeoutSeconds=4, **params) as events:
        reading = asyncio.create_task(events.rest())
        changes = 0
        while not reading.done():
            changes += 1
            await server.relabel(obj, changes=str(changes))
            await asyncio.wait([reading], timeout=0.002)
        return await reading


@pytest.mark.parametrize("of", ["pods", "inferencepools"])
async def test_bookmarks(server: Server, of: str) -> None:
    last = await server.create(pod("a") if of == "pods" else inference_pool("a"))
    assert await bookmarks(server, of, last) == [], "they were not asked for"
    found: list[Object] = []
    for _ in range(5):  # one that falls before the first change says nothing, and is not sent
        found = found or await bookmarks(server, of, last, allowWatchBookmarks="true")
    assert found
    for event in found:
        assert event["type"] == "BOOKMARK"
        obj = event["object"]
        assert (obj["kind"], obj["apiVersion"]) == (last["kind"], last["apiVersion"])
        assert rv_of(obj) > rv_of(last)
        assert not obj["metadata"].get("name")
        for part in ("spec", "status"):
            assert not any((obj.get(part) or {}).values())
    start = (await server.relabel(last, colour="none"))["metadata"]["resourceVersion"]
    async with server.watch(of, resourceVersion=found[-1]["object"]["metadata"]["resourceVersion"]) as events:
        seen = await events.next()
        while seen["object"]["metadata"]["resourceVersion"] != start:
            seen = await events.next()
        assert kinds([seen]) == [("MODIFIED", "a")], "a bookmark is a place to go on from"


@pytest.mark.parametrize("selector", ["role=decode", "role in (decode,both)", "role,role!=prefill"])
async def test_an_object_enters_and_leaves_a_selected_watch(server: Server, selector: str) -> None:
    made = await server.create(pod("a", labels={"role": "prefill"}))
    async with server.watch("pods", resourceVersion=rv_of(made), labelSelector=selector) as events:
        await server.relabel(made, colour="red")
        entered = await server.relabel(made, role="decode")
        changed = await server.relabel(made, colour="blue")
        left = await server.relabel(made, role="prefill")
        await server.relabel(made, colour="green")
        back = await server.relabel(made, role="decode")
        seen = await events.take(4)
    assert [event["type"] for event in seen] == ["ADDED", "MODIFIED", "DELETED", "ADDED"]
    assert [rv_of(event["object"]) for event in seen] == [rv_of(obj) for obj in (entered, changed, left, back)]
    assert seen[2]["object"]["metadata"]["labels"] == {"role": "decode", "colour": "blue"}, "as it was when it still matched"


async def test_a_watch_of_one_object(server: Server) -> None:
    start = await server.rv("inferencepools")
    async with server.watch("inferencepools", resourceVersion=start, fieldSelector="metadata.name=b") as events:
        for name in "abc":
            await server.create(inference_pool(name))
        made = await server.admin.get(server.path("inferencepools", "b"))
        await server.delete(made.json())
        assert kinds(await events.take(2)) == [("ADDED", "b"), ("DELETED", "b")]


async def test_events_come_in_the_order_of_the_writes(server: Server) -> None:
    start = await server.rv("leases")
    async with server.watch("leases", resourceVersion=start) as events:

        async def life(name: str) -> None:
            made = await server.create(lease(name, "0"))
            for number in range(1, 9):
                await server.patch(made, {"spec": {"holderIdentity": str(number)}})
            await server.delete(made)

        await asyncio.gather(*(life(f"lease-{number}") for number in range(10)))
        seen = await events.take(100)
    versions = [rv_of(event["object"]) for event in seen]
    assert versions == sorted(set(versions))
    for number in range(10):
        mine = [event for event in seen if event["object"]["metadata"]["name"] == f"lease-{number}"]
        assert [event["type"] for event in mine] == ["ADDED", *["MODIFIED"] * 8, "DELETED"]
        assert [event["object"]["spec"]["holderIdentity"] for event in mine] == [*"012345678", "8"]


# Who may do what


async def test_a_token_that_nobody_has(server: Server) -> None:
    answer = await server.client.get(server.path("pods"), headers={"Authorization": "Bearer nobodys"})
    assert failure(answer) == (401, "Unauthorized")


async def test_what_no_role_allows_is_refused_by_name(server: Server) -> None:
    answer = await server.client.get(server.path("pods"))
    assert failure(answer) == (403, "Forbidden")
    where = f'in API group "" in the namespace "{server.namespace}"'
    assert answer.json()["message"] == f'pods is forbidden: User "{server.user}" cannot list resource "pods" {where}'
    assert answer.json()["details"] == {"kind": "pods"}
    watch = await server.client.get(server.path("pods"), params={"watch": "true"})
    assert failure(watch) == (403, "Forbidden")
    assert watch.json()["message"] == f'pods is forbidden: User "{server.user}" cannot watch resource "pods" {where}'
    one = await server.client.get(server.path("inferencepools", "llama"))
    assert one.json()["message"] == (
        f'inferencepools.{POOL_V1} "llama" is forbidden: User "{server.user}" cannot get resource "inferencepools" '
        f'in API group "{POOL_V1}" in the namespace "{server.namespace}"'
    )
    assert one.json()["details"] == {"name": "llama", "group": POOL_V1, "kind": "inferencepools"}
    everywhere = await server.client.get("/api/v1/pods")
    assert everywhere.json()["message"].endswith('cannot list resource "pods" in API group "" at the cluster scope')
    path = await server.client.get("/metrics")
    assert path.json()["message"] == f'forbidden: User "{server.user}" cannot get path "/metrics"'


async def test_a_role_allows_what_it_says(server: Server) -> None:
    subject = {"kind": "ServiceAccount", "namespace": server.user.split(":")[2], "name": server.user.split(":")[3]}
    rbac = "rbac.authorization.k8s.io"
    rules = [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list"]},
        {"apiGroups": [POOL_V1], "resources": ["inferencepools"], "resourceNames": ["llama"], "verbs": ["get"]},
    ]
    made = await server.post({"apiVersion": f"{rbac}/v1", "kind": "Role", "metadata": {"name": "reader"}, "rules": rules})
    assert made.status_code == 201
    reference = {"apiGroup": rbac, "kind": "Role", "name": "reader"}
    binding = {
        "apiVersion": f"{rbac}/v1",
        "kind": "RoleBinding",
        "metadata": {"name": "reader"},
        "roleRef": reference,
        "subjects": [subject],
    }
    assert (await server.post(binding)).status_code == 201
    await server.create(inference_pool("llama"))
    async with asyncio.timeout(WAIT_S):  # a server hears of roles by watches of its own
        answer = await server.client.get(server.path("pods"))
        while answer.status_code != 200:
            answer = await server.client.get(server.path("pods"))
    assert (await server.client.get(server.path("inferencepools", "llama"))).status_code == 200
    assert failure(await server.client.get(server.path("inferencepools", "other"))) == (403, "Forbidden")
    assert failure(await server.client.get(server.path("pods"), params={"watch": "true"})) == (403, "Forbidden")
    for verb, name, allowed in (("list", "", True), ("watch", "", False), ("delete", "", False)):
        about = {"namespace": server.namespace, "verb": verb, "resource": "pods", "name": name}
        body = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "spec": {"resourceAttributes": about}}
        answer = await server.client.post("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", json=body)
        assert answer.status_code == 201
        assert answer.json()["status"]["allowed"] is allowed
    about = {"namespace": server.namespace, "verb": "get", "resource": "inferencepools", "group": POOL_V1, "name": "llama"}
    spec = {"user": server.user, "groups": ["system:authenticated"], "resourceAttributes": about}
    body = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}
    answer = await server.admin.post("/apis/authorization.k8s.io/v1/subjectaccessreviews", json=body)
    assert answer.json()["status"]["allowed"] is True
    account = f"{subject['name']}/{subject['namespace']}"
    assert answer.json()["status"]["reason"] == (
        f'RBAC: allowed by RoleBinding "reader/{server.namespace}" of Role "reader" to ServiceAccount "{account}"'
    )


async def test_a_token_review_says_whose_it_is(server: Server) -> None:
    path = "/apis/authentication.k8s.io/v1/tokenreviews"

    def body(**spec: Any) -> Object:
        return {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": spec}

    known = await server.admin.post(path, json=body(token=server.user_token))
    assert known.status_code == 201
    status = known.json()["status"]
    assert status["authenticated"] is True
    assert status["user"]["username"] == server.user
    assert "system:authenticated" in status["user"]["groups"]
    for unknown in (body(token="nobodys"), body(token=server.user_token, audiences=["another"])):
        answer = await server.admin.post(path, json=unknown)
        assert answer.status_code == 201
        assert not answer.json()["status"].get("authenticated")
        assert answer.json()["status"]["user"] == {}
        assert answer.json()["status"]["error"]
    assert failure(await server.admin.post(path, json=body())) == (400, "BadRequest")
    refused = await server.client.post(path, json=body(token=server.user_token))
    assert failure(refused) == (403, "Forbidden")
    assert refused.json()["message"] == (
        f'tokenreviews.authentication.k8s.io is forbidden: User "{server.user}" cannot create resource "tokenreviews" '
        'in API group "authentication.k8s.io" at the cluster scope'
    )


@pytest.mark.parametrize(
    ("user", "groups", "path", "allowed"),
    [
        ("bob", [], "/metrics", False),
        ("bob", ["system:authenticated"], "/metrics", False),
        ("bob", ["system:authenticated"], "/healthz", True),
        ("bob", [], "/healthz", False),
        ("admin", ["system:masters"], "/metrics", True),
        ("", ["system:masters"], "/metrics", True),
    ],
)
async def test_an_access_review_of_a_path(server: Server, user: str, groups: list[str], path: str, allowed: bool) -> None:
    spec = {"user": user, "groups": groups, "nonResourceAttributes": {"path": path, "verb": "get"}}
    body = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}
    answer = await server.admin.post("/apis/authorization.k8s.io/v1/subjectaccessreviews", json=body)
    assert answer.status_code == 201
    assert answer.json()["status"]["allowed"] is allowed


async def test_an_access_review_of_nobody(server: Server) -> None:
    spec = {"nonResourceAttributes": {"path": "/metrics", "verb": "get"}}
    body = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}
    assert failure(await server.admin.post("/apis/authorization.k8s.io/v1/subjectaccessreviews", json=body)) == (422, "Invalid")


# Leases


async def test_one_of_two_takes_a_lease(server: Server) -> None:
    made = await server.create(lease("epp", "a"))
    taken = [json.loads(json.dumps(made)) for _ in range(2)]
    for obj, holder in zip(taken, "bc", strict=True):
        obj["spec"]["holderIdentity"] = holder
    answers = await asyncio.gather(*(server.admin.put(server.path(made), json=obj) for obj in taken))
    assert sorted(answer.status_code for answer in answers) == [200, 409]
    winner = next(answer.json() for answer in answers if answer.status_code == 200)
    assert (await server.admin.get(server.path(made))).json()["spec"] == winner["spec"]
    lost = next(answer for answer in answers if answer.status_code == 409)
    assert failure(lost) == (409, "Conflict")
    assert failure(await server.post(lease("epp", "d"))) == (409, "AlreadyExists")


async def test_a_lease_is_never_written_without_a_version(server: Server) -> None:
    made = await server.create(lease("epp", "a"))
    blind = server.here(lease("epp", "b"))
    assert failure(await server.admin.put(server.path(made), json=blind)) == (422, "Invalid")
    fresh = server.here(lease("other", "b"))
    put = await server.admin.put(server.path(fresh), json=fresh)
    assert put.status_code == 201, "of leases a PUT creates what is not there"


@pytest.mark.parametrize(
    ("time", "kept"),
    [
        ("2026-11-21T13:17:27.123456Z", "2026-11-21T13:17:27.123456Z"),
        ("2026-11-21T13:17:27.123456+01:00", "2026-11-21T12:17:27.123456Z"),
        ("2026-11-21T13:17:27.000000Z", "2026-11-21T13:17:27.000000Z"),
        (None, None),
        ("2026-11-21T13:17:27Z", "refused"),
        ("2026-11-21T13:17:27.123Z", "refused"),
        ("yesterday", "refused"),
    ],
)
async def test_times_of_a_lease_have_six_digits(server: Server, time: str | None, kept: str | None) -> None:
    obj = lease("epp", "a")
    obj["spec"]["renewTime"] = time
    answer = await server.post(obj)
    if kept == "refused":
        assert failure(answer) == (400, "BadRequest")
    else:
        assert answer.status_code == 201
        assert answer.json()["spec"].get("renewTime") == kept


async def test_a_lease_that_is_given_back(server: Server) -> None:
    made = await server.create(lease("epp", "a"))
    made["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
    back = await server.admin.put(server.path(made), json=made)
    assert back.status_code == 200
    assert back.json()["spec"]["holderIdentity"] == ""
    made = back.json()
    made["spec"]["leaseDurationSeconds"] = 0
    answer = await server.admin.put(server.path(made), json=made)
    assert failure(answer) == (422, "Invalid")
    assert "spec.leaseDurationSeconds: Invalid value: 0: must be greater than 0" in answer.json()["message"]


# What is there


async def test_a_kind_that_is_not_installed(server: Server) -> None:
    for path in (
        f"/apis/nobody.example.com/v1/namespaces/{server.namespace}/things",
        f"/apis/{POOL_V1}/v1/namespaces/{server.namespace}/things",
    ):
        for params in ({}, {"watch": "true"}):
            answer = await server.admin.get(path, params=params)
            assert answer.status_code == 404
            assert answer.headers["Content-Type"].startswith("text/plain")
            assert answer.text == "404 page not found\n"
    built_in = await server.admin.get(f"/api/v1/namespaces/{server.namespace}/things")
    assert failure(built_in) == (404, "NotFound")
    assert built_in.json()["message"] == "the server could not find the requested resource"
    assert failure(await server.admin.put(server.path("pods"), json={})) == (405, "MethodNotAllowed")
    assert failure(await server.admin.get(server.path("pods", "nobody"))) == (404, "NotFound")


async def test_discovery(server: Server) -> None:
    groups = {group["name"]: group for group in (await server.admin.get("/apis")).json()["groups"]}
    assert groups[POOL_V1]["preferredVersion"] == {"groupVersion": f"{POOL_V1}/v1", "version": "v1"}
    assert groups["inference.networking.x-k8s.io"]["versions"][0]["version"] == "v1alpha2"
    one = (await server.admin.get("/apis/coordination.k8s.io")).json()
    assert (one["kind"], one["preferredVersion"]["version"]) == ("APIGroup", "v1")
    resources = (await server.admin.get(f"/apis/{POOL_V1}/v1")).json()
    assert resources["groupVersion"] == f"{POOL_V1}/v1"
    found = {resource["name"]: resource for resource in resources["resources"]}
    assert (found["inferencepools"]["kind"], found["inferencepools"]["namespaced"]) == ("InferencePool", True)
    assert "watch" in found["inferencepools"]["verbs"]
    assert "inferencepools/status" in found
    core = (await server.admin.get("/api/v1")).json()
    assert {"pods", "services", "namespaces"} <= {resource["name"] for resource in core["resources"]}
    assert (await server.admin.get("/api")).json()["versions"] == ["v1"]
    assert (await server.admin.get("/apis/nobody.example.com")).status_code == 404
    assert (await server.admin.get("/version")).json()["gitVersion"].startswith("v1.")
    for path in ("/readyz", "/livez", "/healthz"):
        assert (await server.admin.get(path)).text == "ok"


async def test_answers_say_what_time_it_is(server: Server) -> None:
    assert (await server.admin.get("/version")).headers["Date"].endswith("GMT")
