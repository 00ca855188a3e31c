"""deploy/kustomize: each overlay is what the chart makes of the same choices, built offline, of the schemas, and a picker that starts."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy import tools
from tests.deploy.references import dangling, images, of_kind, picker_faults, pickers, registry_of

KUSTOMIZE = tools.ROOT / "deploy/kustomize"
CHARTS = tools.ROOT / "deploy/helm"
POOL = {"inferencePool": {"name": "model-servers"}, "modelServers": {"matchLabels": {"app": "model-server"}}}
IMAGE = {"registry": "registry.example.com", "tag": "0.1.0"}
OVERLAYS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "gateway": ("epp-gateway", {**POOL, "epp": {"image": IMAGE}}),
    "ha": ("epp-gateway", {**POOL, "epp": {"image": IMAGE, "replicas": 3}}),
    "standalone": ("epp-standalone", {**POOL, "inferencePool": {"create": False}, "epp": {"image": IMAGE}}),
}
"""The chart and the values under `router` that make the same."""
each_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@functools.cache
def built(overlay: str) -> list[dict[str, Any]]:
    return tools.kustomize(KUSTOMIZE / overlay)


def test_every_folder_is_an_overlay_or_the_base() -> None:
    assert {path.parent.name for path in KUSTOMIZE.glob("*/kustomization.yaml")} == {"base", *OVERLAYS}


@each_overlay
def test_objects_are_of_their_schemas(overlay: str) -> None:
    assert tools.faults(built(overlay)) == []


@each_overlay
def test_references_lead_somewhere(overlay: str) -> None:
    assert dangling(built(overlay)) == []


@each_overlay
def test_the_picker_starts_with_what_it_is_given(overlay: str) -> None:
    assert len(pickers(built(overlay))) == 1
    assert picker_faults(built(overlay)) == []
    assert {registry_of(image) for image in images(built(overlay))} <= {"", "registry.example.com"}


@each_overlay
def test_everything_is_in_one_namespace(overlay: str) -> None:
    cluster_wide = {"ClusterRole", "ClusterRoleBinding"}
    assert {item["metadata"].get("namespace") for item in built(overlay) if item["kind"] not in cluster_wide} == {"inference"}
    for binding in of_kind(built(overlay), "RoleBinding", "ClusterRoleBinding"):
        assert {subject["namespace"] for subject in binding["subjects"]} == {"inference"}


@each_overlay
def test_an_overlay_is_what_the_chart_makes(overlay: str, tmp_path: Path) -> None:
    chart, router = OVERLAYS[overlay]
    file = tmp_path / "values.yaml"
    file.write_text(yaml.safe_dump({"router": router}))
    made = tools.documents(tools.helm("template", "picker", CHARTS / chart, "--namespace", "inference", "--values", file))
    assert comparable(built(overlay)) == comparable(made)


def comparable(objects: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Any]:
    """Without what differs for a reason: Helm's own labels, a hash in a name here and in an annotation there, the order of arguments and the like."""
    return {
        (item["kind"], _unhashed(item["metadata"]["name"])): _plain({k: v for k, v in item.items() if k != "metadata"}) for item in objects
    }


def _unhashed(name: str) -> str:
    return re.sub(r"-[a-z0-9]{10}$", "", name)


def _plain(value: Any, key: str = "") -> Any:
    if key == "data":
        return {name: yaml.safe_load(text) for name, text in value.items() if name != "payload-agnostic.yaml"}
    if key == "metadata":  # of a pod template
        return {"labels": {name: label for name, label in value["labels"].items() if name.endswith(("/name", "/instance"))}}
    if isinstance(value, dict):
        return {name: _plain(below, name) for name, below in value.items()}
    if isinstance(value, list):
        plain = [_plain(item) for item in value]
        return sorted(plain, key=str) if key in {"args", "rules", "volumes"} else plain
    return _unhashed(value) if key == "name" and isinstance(value, str) else value
