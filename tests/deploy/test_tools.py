"""That the checks of manifests find what they are for: a validator that lets everything pass would make every other test here pass too."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from tests.deploy import tools
from tests.deploy.references import dangling, picker_faults

POD_SPEC = "spec: {template: {metadata: {labels: {a: b}}, spec: {containers: [{name: c, image: i}]}}, selector: {matchLabels: {a: b}}}"
GOOD = {
    "Kubernetes": f"{{apiVersion: apps/v1, kind: Deployment, metadata: {{name: n}}, {POD_SPEC}}}",
    "a CRD": "apiVersion: inference.networking.k8s.io/v1\nkind: InferencePool\nmetadata: {name: n}\n"
    "spec: {selector: {matchLabels: {a: b}}, targetPorts: [{number: 8000}], endpointPickerRef: {name: e, port: {number: 9002}}}",
    "a third party": "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {name: n}\n"
    "spec: {host: h, trafficPolicy: {tls: {mode: SIMPLE, insecureSkipVerify: true}}}",
}


def objects(text: str) -> list[dict[str, Any]]:
    return tools.documents(text)


@pytest.mark.parametrize("of", GOOD)
def test_what_is_right_has_no_faults(of: str) -> None:
    assert tools.faults(objects(GOOD[of])) == []


@pytest.mark.parametrize(
    ("of", "right", "wrong", "says"),
    [
        ("Kubernetes", "image: i", "imagee: i", "imagee"),
        ("Kubernetes", "name: c", "name: 1", "not of type"),
        ("a CRD", "number: 8000", "number: 0", "minimum"),
        ("a CRD", "targetPorts", "targetPort", "targetPort"),
        ("a CRD", "{name: e, port", "{name: e, prt: 1, port", "prt"),
        ("a third party", "insecureSkipVerify", "insecureSkipVerifi", "/spec/trafficPolicy/tls/insecureSkipVerifi: no such field"),
        ("a third party", "SIMPLE", "SIMPEL", "/spec/trafficPolicy/tls/mode"),
        ("a third party", "host: h", "host: [h]", "/spec/host"),
        ("a third party", "{name: n}", "{name: n, lables: {a: b}}", "/metadata/lables: no such field"),
    ],
)
def test_a_field_that_is_not_there_or_of_another_type_is_a_fault(of: str, right: str, wrong: str, says: str) -> None:
    found = tools.faults(objects(GOOD[of].replace(right, wrong)))
    assert says in "\n".join(found)


def test_fields_of_free_form_are_free() -> None:
    scaled = """
    apiVersion: keda.sh/v1alpha1
    kind: ScaledObject
    metadata: {name: n, labels: {any: label}}
    spec: {scaleTargetRef: {name: d}, triggers: [{type: prometheus, metadata: {any: thing}}]}
    """
    assert tools.faults(objects(scaled)) == []
    assert tools.faults(objects(scaled.replace("type: prometheus", "type: prometheus, query: 1"))) != []


def test_a_kind_that_nobody_knows_is_an_error_not_a_pass() -> None:
    for unknown in (
        "apiVersion: apps/v1\nkind: Deploymant",
        "apiVersion: apps/v2\nkind: Deployment",
        "apiVersion: example.com/v1\nkind: Thing",
    ):
        with pytest.raises(tools.ToolError, match="no schema for"):
            tools.faults(objects(unknown + "\nmetadata: {name: n}"))


def test_a_key_twice_is_an_error() -> None:
    with pytest.raises(yaml.YAMLError, match="twice"):
        tools.documents("a: 1\nb: {c: 1, c: 2}")


@pytest.mark.parametrize(
    ("right", "wrong", "says"),
    [
        ("targetPort: grpc", "targetPort: grcp", "no container port grcp"),
        ("selector:\n    app.kubernetes.io/instance: picker", "selector:\n    app.kubernetes.io/instance: pickr", "selects no picker"),
        ("name: picker-epp\n    port:", "name: picker-ep\n    port:", "no Service picker-ep"),
        ("number: 9002", "number: 9003", "with port 9003"),
        ("serviceAccountName: picker-epp", "serviceAccountName: picker", "no ServiceAccount picker"),
        ("kind: Role\n  name: picker-epp", "kind: Role\n  name: picker", "no Role picker"),
        ("configMap:\n          name: picker-epp", "configMap:\n          name: pickerepp", "no ConfigMap pickerepp"),
        ("mountPath: /config\n          name: config", "mountPath: /config\n          name: cfg", "no volume cfg"),
    ],
)
def test_a_reference_to_nothing_is_found(right: str, wrong: str, says: str) -> None:
    text = yaml.safe_dump_all(tools.kustomize(tools.ROOT / "deploy/kustomize/gateway"), sort_keys=True)
    assert right in text
    assert dangling(objects(text)) == []
    found = "\n".join(dangling(objects(text.replace(right, wrong))))
    assert says in found


@pytest.mark.parametrize(
    ("right", "wrong", "says"),
    [
        ("--grpc-health-port=9003", "--grpc-health-port=9004", "it listens on"),
        ("service: inference-extension", "service: readiness", "asks for"),
        ("terminationGracePeriodSeconds: 130", "terminationGracePeriodSeconds: 40", "killed before it has drained"),
        ("- inferencepools", "- inferencepoolz", "may not get inferencepools"),
        ("- pods", "- pods\n  - secrets", "may get secrets of  for nothing"),
        ("/config/default-plugins.yaml", "/config/other.yaml", "is not in the ConfigMap"),
        ("/config/default-plugins.yaml", "/etc/default-plugins.yaml", "is not mounted"),
        ("profile: cost-aware", "profil: cost-aware", "profil"),
    ],
)
def test_a_picker_that_would_not_start_is_found(right: str, wrong: str, says: str) -> None:
    text = yaml.safe_dump_all(tools.kustomize(tools.ROOT / "deploy/kustomize/gateway"), sort_keys=True)
    assert right in text
    assert picker_faults(objects(text)) == []
    assert says in "\n".join(picker_faults(objects(text.replace(right, wrong))))


def test_arguments_that_the_picker_does_not_know_are_found() -> None:
    text = yaml.safe_dump_all(tools.kustomize(tools.ROOT / "deploy/kustomize/gateway"))
    with pytest.raises(AssertionError, match="poolname"):
        picker_faults(objects(text.replace("--pool-name=", "--poolname=")))
