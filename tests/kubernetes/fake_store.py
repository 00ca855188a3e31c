"""What an API server keeps and answers, without HTTP: objects with resourceVersions, their history, lists at a moment, selectors, schemas.

`test_conformance.py` holds it, through fake_api, to a real server. Left out, and not relied on by what is tested here: admission beyond
the schemas (a namespace need not exist), conversion between versions, CEL rules, field management.

A stored object is never changed, only replaced: lists and events share it. The history is kept whole up to HISTORY_MAX, so that a list at
an earlier resourceVersion is made by undoing what came after.
"""

from __future__ import annotations

import base64
import copy
import json
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import yaml

Object = dict[str, Any]
Matches = Callable[[Object], bool]

CRDS = Path(__file__).parents[1] / "data" / "crds"
HISTORY_MAX = 200_000
"""Events kept; the oldest half is forgotten, as by a compaction, when there are more."""
EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
"""creationTimestamps count seconds from here, one a resourceVersion: they are in order, and the same in every run."""
TOO_OLD_TO_CONTINUE = (
    "The provided continue parameter is too old to display a consistent list result. You can start a new list without the continue "
    "parameter, or use the continue token in this response to retrieve the remainder of the results. Continuing with the provided token "
    "results in an inconsistent list - objects that were created, modified, or deleted between the time the first chunk was returned and "
    "now may show up in the list."
)
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_MICRO_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}(Z|[+-]\d\d:\d\d)")


class StatusError(Exception):
    """An answer that is an error, as the `Status` object of an API server."""

    def __init__(self, code: int, reason: str, message: str, *, details: Object | None = None, token: str = "") -> None:
        super().__init__(message)
        self.code, self.reason, self.message, self.details, self.token = code, reason, message, details, token

    @property
    def retry_after_s(self) -> int | None:
        return (self.details or {}).get("retryAfterSeconds")

    def as_object(self) -> Object:
        metadata = {"continue": self.token} if self.token else {}
        body: Object = {"kind": "Status", "apiVersion": "v1", "metadata": metadata, "status": "Failure", "message": self.message}
        if self.reason:
            body["reason"] = self.reason
        if self.details is not None:
            body["details"] = self.details
        return body | {"code": self.code}


@dataclass(frozen=True, eq=False)
class Kind:
    """One resource of one version of one API group."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True
    schema: Object | None = None
    """Of a CustomResourceDefinition; None: built in."""
    status: bool = False
    """Has a status subresource."""
    create_by_put: bool = False
    graceful: bool = False
    """A delete leaves it there, terminating, while it runs somewhere."""
    stored: bool = True
    """False: a review, answered and forgotten."""

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def full(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural

    @property
    def custom(self) -> bool:
        return self.schema is not None

    def details(self, name: str = "", *, kind: str = "", **more: Any) -> Object:
        group = {"group": self.group} if self.group else {}
        return ({"name": name} if name else {}) | group | {"kind": kind or self.plural} | more

    def invalid(
        self, name: str, field_path: str, message: str, *, reason: str = "FieldValueInvalid", by_plural: bool = False
    ) -> StatusError:
        said = self.plural if by_plural else self.kind
        full = f"{said}.{self.group}" if self.group else said
        causes = [{"reason": reason, "message": message, "field": field_path}]
        return StatusError(
            422, "Invalid", f'{full} "{name}" is invalid: {field_path}: {message}', details=self.details(name, kind=said, causes=causes)
        )

    def not_found(self, name: str) -> StatusError:
        return StatusError(404, "NotFound", f'{self.full} "{name}" not found', details=self.details(name))


def crd_documents() -> list[Object]:
    """The definitions of the kinds the picker reads; objectives and rewrites of the older group are the newer group's under its name."""
    documents = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(CRDS.glob("*.yaml"))]
    for new in [document for document in documents if document["spec"]["group"] == "llm-d.ai"]:
        old = copy.deepcopy(new)
        old["spec"]["group"] = "inference.networking.x-k8s.io"
        old["metadata"] = {"name": f"{new['spec']['names']['plural']}.{old['spec']['group']}"}
        documents.append(old)
    return documents


def custom_kinds(documents: Iterable[Object]) -> Iterator[Kind]:
    for document in documents:
        spec = document["spec"]
        for version in spec["versions"]:
            yield Kind(
                spec["group"], version["name"], spec["names"]["plural"], spec["names"]["kind"], spec["scope"] == "Namespaced",
                schema=version["schema"]["openAPIV3Schema"], status="status" in version.get("subresources", {}),
            )  # fmt: skip


@cache
def crd_kinds() -> tuple[Kind, ...]:
    return tuple(custom_kinds(crd_documents()))


@cache
def _validator(kind: Kind) -> Any:
    return jsonschema.Draft4Validator(kind.schema)


BUILT_IN = (
    Kind("", "v1", "namespaces", "Namespace", namespaced=False, status=True),
    Kind("", "v1", "nodes", "Node", namespaced=False, status=True),
    Kind("", "v1", "pods", "Pod", status=True, graceful=True),
    Kind("", "v1", "services", "Service", status=True),
    Kind("", "v1", "endpoints", "Endpoints"),
    Kind("", "v1", "configmaps", "ConfigMap"),
    Kind("", "v1", "serviceaccounts", "ServiceAccount"),
    Kind("", "v1", "events", "Event"),
    Kind("apps", "v1", "deployments", "Deployment", status=True),
    Kind("discovery.k8s.io", "v1", "endpointslices", "EndpointSlice"),
    Kind("coordination.k8s.io", "v1", "leases", "Lease", create_by_put=True),
    Kind("rbac.authorization.k8s.io", "v1", "roles", "Role"),
    Kind("rbac.authorization.k8s.io", "v1", "rolebindings", "RoleBinding"),
    Kind("rbac.authorization.k8s.io", "v1", "clusterroles", "ClusterRole", namespaced=False),
    Kind("rbac.authorization.k8s.io", "v1", "clusterrolebindings", "ClusterRoleBinding", namespaced=False),
    Kind("apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition", namespaced=False, status=True),
    Kind("authentication.k8s.io", "v1", "tokenreviews", "TokenReview", namespaced=False, stored=False),
    Kind("authorization.k8s.io", "v1", "subjectaccessreviews", "SubjectAccessReview", namespaced=False, stored=False),
    Kind("authorization.k8s.io", "v1", "selfsubjectaccessreviews", "SelfSubjectAccessReview", namespaced=False, stored=False),
)
OTHERS = tuple(
    Kind(group, version, plural, kind, schema={"type": "object", "x-kubernetes-preserve-unknown-fields": True}, status=True)
    for group, version, plural, kind in (
        ("gateway.networking.k8s.io", "v1", "gateways", "Gateway"),
        ("gateway.networking.k8s.io", "v1", "httproutes", "HTTPRoute"),
        ("gateway.networking.k8s.io", "v1", "backendtlspolicies", "BackendTLSPolicy"),
        ("networking.istio.io", "v1", "destinationrules", "DestinationRule"),
    )
)
"""Of gateways, taken as they come: their definitions are not kept here."""


class Entry(NamedTuple):
    """An object as it was stored, and its JSON without the opening of kind and apiVersion that a list of built-in objects leaves out."""

    obj: Object
    opened: bytes
    bare: bytes

    @classmethod
    def of(cls, kind: Kind, obj: Object) -> Entry:
        bare = json.dumps({key: value for key, value in obj.items() if key not in ("kind", "apiVersion")}, separators=(",", ":")).encode()
        opened = f'{{"kind":"{kind.kind}","apiVersion":"{kind.api_version}",'.encode() + bare[1:]
        return cls(obj, opened, opened if kind.custom else bare)


class Event(NamedTuple):
    rv: int
    kind: Kind
    key: tuple[str, str]
    entry: Entry | None
    """None: deleted."""
    before: Entry | None


class Page(NamedTuple):
    rv: int
    entries: list[Entry]
    token: str = ""
    remaining: int | None = None


@dataclass
class Store:
    """Every method is what one request does, at once."""

    kinds: list[Kind]
    rv: int = 100
    """Of the last write; a server has made objects of its own before anybody asks."""
    compacted_rv: int = 50
    """History up to here is gone: a watch from before it is too old. (A server knows no history of before its start either.)"""
    history: list[Event] = field(default_factory=list)
    forgotten: int = 0
    """Events that are no longer in `history`: an event's number is its place in it plus this."""
    changed: Callable[[Event], None] = lambda _event: None
    _objects: dict[Kind, dict[tuple[str, str], Entry]] = field(default_factory=dict)

    # Kinds

    def kind_of(self, obj: Object) -> Kind:
        for kind in self.kinds:
            if kind.kind == obj.get("kind") and kind.api_version == obj.get("apiVersion"):
                return kind
        raise LookupError(f"no kind {obj.get('kind')} in {obj.get('apiVersion')} here")

    def named(self, name: str) -> Kind:
        """By plural, `plural.group` or kind; the first of several."""
        for kind in self.kinds:
            if name in (kind.plural, kind.full, kind.kind):
                return kind
        raise LookupError(f"no kind {name} here")

    # Reading

    def get(self, kind: Kind, namespace: str, name: str) -> Entry:
        entry = self._of(kind).get((namespace, name))
        if entry is None:
            raise kind.not_found(name)
        return entry

    def all(self, kind: Kind) -> list[Object]:
        return [entry.obj for _, entry in sorted(self._of(kind).items())]

    def list(self, kind: Kind, namespace: str, matches: Matches, params: Mapping[str, str]) -> Page:
        limit, token, rv, match = _number(params, "limit"), params.get("continue", ""), params.get("resourceVersion", ""), params.get(
            "resourceVersionMatch", ""
        )  # fmt: skip
        at = parse_rv(rv)
        if match and not rv:
            raise _bad_options("resourceVersionMatch is forbidden unless resourceVersion is provided")
        if token and match:
            raise _bad_options("resourceVersionMatch is forbidden for continue")
        if token and at:
            raise StatusError(400, "BadRequest", "specifying resource version is not allowed when using continue")
        selected = any(params.get(name) for name in ("labelSelector", "fieldSelector"))
        start = ""
        if token:
            at, start = _read_token(token)
            if 0 <= at < self.compacted_rv:
                raise StatusError(410, "Expired", TOO_OLD_TO_CONTINUE, token=_token(-1, start))
            at = max(at, 0)
        elif at > self.rv:
            details = {"causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}], "retryAfterSeconds": 1}
            raise StatusError(504, "Timeout", f"Timeout: Too large resource version: {at}, current: {self.rv}", details=details)
        elif match == "Exact" or (limit and at and match != "NotOlderThan"):
            if at < self.compacted_rv:
                raise StatusError(410, "Expired", "The resourceVersion for the provided list is too old.")
        else:
            if at or rv == "0":
                limit = 0  # the watch cache answers, and it knows no pages
            at = 0
        found = [
            (_place(key, namespace), entry)
            for key, entry in sorted(self._at(kind, at or self.rv).items())
            if namespace in ("", key[0]) and _place(key, namespace) >= start and matches(entry.obj)
        ]
        page = [entry for _, entry in (found[:limit] if limit else found)]
        if len(page) == len(found):
            return Page(at or self.rv, page)
        # A page of a moment names it; one that follows a token that names none goes on with the state there was when it was read.
        return Page(at or self.rv, page, _token(at or self.rv, found[limit - 1][0] + "\0"), None if selected else len(found) - limit)

    def since(self, rv: int) -> int:
        """The number of the first event after this resourceVersion."""
        low, high = 0, len(self.history)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.history[middle].rv <= rv else (low, middle)
        return low + self.forgotten

    # Writing

    def create(self, kind: Kind, namespace: str, given: Object, *, as_admin: bool = False) -> Entry:
        obj = copy.deepcopy(given)
        metadata = obj.setdefault("metadata", {})
        if not metadata.get("name") and metadata.get("generateName"):
            metadata["name"] = f"{metadata['generateName']}{self.rv + 1:05x}"
        name = metadata.get("name", "")
        if not name:
            raise kind.invalid(name, "metadata.name", "Required value: name or generateName is required", reason="FieldValueRequired")
        if metadata.get("resourceVersion") and not as_admin:
            raise StatusError(500, "", "resourceVersion should not be set on objects to be created")
        if kind.namespaced and metadata.setdefault("namespace", namespace) != namespace:
            raise StatusError(400, "BadRequest", "the namespace of the provided object does not match the namespace sent on the request")
        key = (namespace, name)
        if not as_admin:
            for generated in ("uid", "creationTimestamp", "deletionTimestamp", "generation", "selfLink"):
                metadata.pop(generated, None)
            if kind.status:
                obj.pop("status", None)
        obj = self._checked(kind, name, obj)
        if key in self._of(kind):
            raise StatusError(409, "AlreadyExists", f'{kind.full} "{name}" already exists', details=kind.details(name))
        metadata = obj["metadata"]
        metadata.setdefault("uid", str(uuid.UUID(int=0xE9900000_0000_4000_8000_000000000000 + self.rv + 1)))
        metadata.setdefault("creationTimestamp", moment(self.rv + 1))
        if kind.custom:
            metadata.setdefault("generation", 1)
        if kind.plural == "pods" and not as_admin:
            obj["status"] = {"phase": "Pending", "qosClass": "BestEffort"}
        return self._put(kind, key, obj)

    def update(self, kind: Kind, namespace: str, name: str, given: Object, *, status: bool = False, unconditional: bool = False) -> Entry:
        """A PUT: of all but the status, or, at the subresource, of that alone."""
        obj = copy.deepcopy(given)
        metadata = obj.setdefault("metadata", {})
        if metadata.setdefault("name", name) != name:
            raise StatusError(400, "BadRequest", f"the name of the object ({metadata['name']}) does not match the name on the URL ({name})")
        before = self._of(kind).get((namespace, name))
        there = before.obj["metadata"]["uid"] if before else ""
        if metadata.get("uid", there) != there:
            raise StatusError(
                409,
                "Conflict",
                f'Operation cannot be fulfilled on {kind.full} "{name}": StorageError: invalid object, Code: 4, AdditionalErrorMsg: '
                f"Precondition failed: UID in precondition: {metadata['uid']}, UID in object meta: {there}",
                details=kind.details(name),
            )
        if before is None:
            if not kind.create_by_put or status:
                raise kind.not_found(name)
            metadata.pop("resourceVersion", None)
            return self.create(kind, namespace, obj)
        old = before.obj
        rv = metadata.get("resourceVersion", "")
        if not rv and not unconditional and (kind.custom or kind.create_by_put):
            raise kind.invalid(name, "metadata.resourceVersion", "Invalid value: 0x0: must be specified for an update", by_plural=True)
        if rv and rv != old["metadata"]["resourceVersion"]:
            raise StatusError(
                409,
                "Conflict",
                f'Operation cannot be fulfilled on {kind.full} "{name}": the object has been modified; '
                "please apply your changes to the latest version and try again",
                details=kind.details(name),
            )
        if status:
            obj = {**old, "status": obj.get("status", {})}
        elif kind.status:
            obj = {key: value for key, value in obj.items() if key != "status"} | ({"status": old["status"]} if "status" in old else {})
        kept = {name: old["metadata"][name] for name in _GIVEN_BY_SERVER if name in old["metadata"]}
        changed = {name: value for name, value in obj["metadata"].items() if name not in _GIVEN_BY_SERVER}
        obj["metadata"] = {"name": name, **({"namespace": namespace} if kind.namespaced else {}), **changed, **kept}
        obj = self._checked(kind, name, {"kind": kind.kind, "apiVersion": kind.api_version, **obj})
        return self._replace(kind, (namespace, name), before, obj)

    def patch(self, kind: Kind, namespace: str, name: str, change: Object, *, status: bool = False) -> Entry:
        """A JSON merge patch."""
        obj = merged(copy.deepcopy(self.get(kind, namespace, name).obj), change)
        if "resourceVersion" not in change.get("metadata", {}):
            obj["metadata"].pop("resourceVersion", None)
        return self.update(kind, namespace, name, obj, status=status, unconditional=True)

    def replace(self, kind: Kind, namespace: str, name: str, given: Object) -> Entry:
        """Everything of it, as no client may."""
        before = self.get(kind, namespace, name)
        obj = copy.deepcopy(given)
        old = before.obj["metadata"]
        kept = {part: old[part] for part in ("uid", "creationTimestamp", "generation") if part in old}
        obj["metadata"] = kept | obj["metadata"]
        if kind.namespaced:
            obj["metadata"]["namespace"] = namespace
        return self._replace(kind, (namespace, name), before, self._checked(kind, name, obj))

    def delete(self, kind: Kind, namespace: str, name: str, grace_s: int | None = None, *, force: bool = False) -> tuple[Entry, bool]:
        """The object as it was left, and whether it is gone."""
        entry = self.get(kind, namespace, name)
        obj = copy.deepcopy(entry.obj)
        metadata = obj["metadata"]
        if not force:
            runs = kind.graceful and bool(obj.get("spec", {}).get("nodeName")) and obj["status"].get("phase") not in ("Succeeded", "Failed")
            if runs and grace_s is None:
                grace_s = obj["spec"].get("terminationGracePeriodSeconds", 30)
            wait_s = (grace_s or 0) if runs else 0
            if wait_s or metadata.get("finalizers"):
                if "deletionTimestamp" in metadata:
                    return entry, False
                metadata |= {"deletionTimestamp": moment(self.rv + 1 + wait_s), "deletionGracePeriodSeconds": wait_s}
                return self._put(kind, (namespace, name), obj), False
            if kind.graceful:  # written down before it is carried out: watchers are told twice
                metadata |= {"deletionTimestamp": metadata.get("deletionTimestamp", moment(self.rv + 1)), "deletionGracePeriodSeconds": 0}
                entry = self._put(kind, (namespace, name), obj)
        return self._drop(kind, (namespace, name), entry), True

    def compact(self) -> None:
        self.compacted_rv = self.rv

    # Its parts

    def _of(self, kind: Kind) -> dict[tuple[str, str], Entry]:
        return self._objects.setdefault(kind, {})

    def _at(self, kind: Kind, rv: int) -> dict[tuple[str, str], Entry]:
        objects = dict(self._of(kind))
        for event in reversed(self.history):
            if event.rv <= rv:
                break
            if event.kind is kind:
                if event.before is None:
                    objects.pop(event.key, None)
                else:
                    objects[event.key] = event.before
        return objects

    def _replace(self, kind: Kind, key: tuple[str, str], before: Entry, obj: Object) -> Entry:
        old, metadata = before.obj, obj["metadata"]
        metadata["resourceVersion"] = old["metadata"]["resourceVersion"]
        if obj == old:
            return before  # nothing is written, and nobody is told
        if kind.custom and {**obj, "metadata": 0, "status": 0} != {**old, "metadata": 0, "status": 0}:
            metadata["generation"] = old["metadata"].get("generation", 0) + 1
        if "deletionTimestamp" in metadata and old["metadata"].get("finalizers") and not metadata.get("finalizers"):
            return self._drop(kind, key, Entry.of(kind, obj))
        return self._put(kind, key, obj)

    def _put(self, kind: Kind, key: tuple[str, str], obj: Object) -> Entry:
        self.rv += 1
        obj["metadata"]["resourceVersion"] = str(self.rv)
        entry = Entry.of(kind, obj)
        before = self._of(kind).get(key)
        self._of(kind)[key] = entry
        self._record(Event(self.rv, kind, key, entry, before))
        return entry

    def _drop(self, kind: Kind, key: tuple[str, str], last: Entry) -> Entry:
        self.rv += 1
        before = self._of(kind).pop(key)
        self._record(Event(self.rv, kind, key, None, before))
        return last

    def _record(self, event: Event) -> None:
        self.history.append(event)
        if len(self.history) > HISTORY_MAX:
            gone = HISTORY_MAX // 2
            self.compacted_rv = max(self.compacted_rv, self.history[gone - 1].rv)
            del self.history[:gone]
            self.forgotten += gone
        self.changed(event)

    def _checked(self, kind: Kind, name: str, obj: Object) -> Object:
        free = kind.group.startswith("rbac.")  # of roles: anything that fits into a path
        if not free and (not _NAME.fullmatch(name) or len(name) > 253):
            raise kind.invalid(
                name,
                "metadata.name",
                f'Invalid value: "{name}": a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters',
            )
        if kind.schema is not None:
            return self._by_schema(kind, name, obj)
        if kind.plural == "pods" and not obj.get("spec", {}).get("containers"):
            raise kind.invalid(name, "spec.containers", "Required value", reason="FieldValueRequired")
        if kind.plural == "leases":
            _check_lease(kind, name, obj)
        return obj

    def _by_schema(self, kind: Kind, name: str, obj: Object) -> Object:
        assert kind.schema is not None
        body = {key: value for key, value in obj.items() if key not in ("metadata", "kind", "apiVersion")}
        body = pruned(body, kind.schema)
        for error in _validator(kind).iter_errors(body):
            path = ".".join(str(part) for part in error.absolute_path if isinstance(part, str))
            raise kind.invalid(name, path or "<nil>", f"Invalid value: {json.dumps(error.instance)}: {error.message}")
        return {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": obj["metadata"], **body}


_GIVEN_BY_SERVER = ("uid", "creationTimestamp", "generation", "deletionTimestamp", "deletionGracePeriodSeconds", "resourceVersion")


def moment(rv: int) -> str:
    return (EPOCH + timedelta(seconds=rv)).strftime("%Y-%m-%dT%H:%M:%SZ")


def merged(old: Any, change: Any) -> Any:
    """RFC 7386."""
    if not isinstance(change, dict):
        return copy.deepcopy(change)
    new = dict(old) if isinstance(old, dict) else {}
    for name, value in change.items():
        if value is None:
            new.pop(name, None)
        else:
            new[name] = merged(new.get(name), value)
    return new


def pruned(value: Any, schema: Object) -> Any:
    """Without the fields that the schema doesn't know, and with its defaults."""
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return value
    if isinstance(value, list) and "items" in schema:
        return [pruned(item, schema["items"]) for item in value]
    if not isinstance(value, dict):
        return value
    if isinstance(schema.get("additionalProperties"), dict):
        return {name: pruned(item, schema["additionalProperties"]) for name, item in value.items()}
    properties = schema.get("properties")
    if properties is None:
        return {} if schema.get("type") == "object" and "additionalProperties" not in schema else value
    kept = {name: pruned(item, properties[name]) for name, item in value.items() if name in properties}
    for name, of in properties.items():
        if name not in kept and "default" in of:
            kept[name] = copy.deepcopy(of["default"])
    return kept


def parse_rv(text: str) -> int:
    if text and not text.isdecimal():
        message = f'resourceVersion: Invalid value: "{text}": strconv.ParseUint: parsing "{text}": invalid syntax'
        raise StatusError(500, "", message)
    return int(text or 0)


def _number(params: Mapping[str, str], name: str) -> int:
    text = params.get(name, "")
    try:
        return max(0, int(text or 0))
    except ValueError:
        raise StatusError(400, "BadRequest", f'strconv.ParseInt: parsing "{text}": invalid syntax') from None


def _place(key: tuple[str, str], namespace: str) -> str:
    return key[1] if namespace or not key[0] else f"{key[0]}/{key[1]}"


def _token(rv: int, start: str) -> str:
    text = json.dumps({"v": "meta.k8s.io/v1", "rv": rv, "start": start}, separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).rstrip(b"=").decode()


def _read_token(token: str) -> tuple[int, str]:
    try:
        read = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
        return int(read["rv"]), str(read["start"])
    except (ValueError, KeyError, TypeError):
        raise StatusError(400, "BadRequest", "invalid continue token: continue key is not valid") from None


def _bad_options(message: str) -> StatusError:
    causes = [{"reason": "FieldValueForbidden", "message": f"Forbidden: {message}", "field": "resourceVersionMatch"}]
    said = f'ListOptions.meta.k8s.io "" is invalid: resourceVersionMatch: Forbidden: {message}'
    return StatusError(422, "Invalid", said, details={"group": "meta.k8s.io", "kind": "ListOptions", "causes": causes})


def _check_lease(kind: Kind, name: str, obj: Object) -> None:
    spec = obj.setdefault("spec", {})
    for at in ("acquireTime", "renewTime"):
        text = spec.get(at)
        if text is None:
            continue
        if not _MICRO_TIME.fullmatch(text):
            message = f'Lease in version "v1" cannot be handled as a Lease: parsing time "{text}" as "2006-01-02T15:04:05.000000Z07:00"'
            raise StatusError(400, "BadRequest", message)
        spec[at] = datetime.fromisoformat(text).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    if spec.get("leaseDurationSeconds", 1) <= 0:
        message = f"Invalid value: {spec['leaseDurationSeconds']}: must be greater than 0"
        raise kind.invalid(name, "spec.leaseDurationSeconds", message)
    if spec.get("leaseTransitions", 0) < 0:
        message = f"Invalid value: {spec['leaseTransitions']}: must be greater than or equal to 0"
        raise kind.invalid(name, "spec.leaseTransitions", message)


# Selectors

_SET = re.compile(r"\s*(?P<key>[^\s!=,()]+)\s+(?P<word>in|notin)\s*\(\s*(?P<values>[^()]*)\)\s*")
_EQUAL = re.compile(r"\s*(?P<key>[^\s!=,()]+)\s*(?P<sign>!=|==|=)\s*(?P<value>[^\s!=,()]*)\s*")
_THERE = re.compile(r"\s*(?P<no>!?)\s*(?P<key>[^\s!=,()]+)\s*")


def label_selector(text: str) -> Matches:
    """`a=b,c!=d,e in (f,g),h notin (i),j,!k`"""
    checks: list[Callable[[Mapping[str, str]], bool]] = []
    at = 0
    while at < len(text):
        if found := _SET.match(text, at):
            values = frozenset(value.strip() for value in found["values"].split(","))
            checks.append(_in(found["key"], values, wanted=found["word"] == "in"))
        elif found := _EQUAL.match(text, at):
            checks.append(_in(found["key"], frozenset([found["value"]]), wanted=found["sign"] != "!="))
        elif found := _THERE.match(text, at):
            checks.append(_there(found["key"], wanted=not found["no"]))
        if found is None or (found.end() < len(text) and text[found.end()] != ","):
            said = text[found.end() if found else at :].strip()
            raise StatusError(400, "BadRequest", f"unable to parse requirement: found '{said}', expected: '=', '!=', '==', 'in', notin'")
        at = found.end() + 1

    def matches(obj: Object) -> bool:
        labels = obj["metadata"].get("labels") or {}
        return all(check(labels) for check in checks)

    return matches


def _in(key: str, values: frozenset[str], *, wanted: bool) -> Callable[[Mapping[str, str]], bool]:
    return (lambda labels: labels.get(key) in values) if wanted else (lambda labels: labels.get(key) not in values)


def _there(key: str, *, wanted: bool) -> Callable[[Mapping[str, str]], bool]:
    return lambda labels: (key in labels) is wanted


_POD_FIELDS = ("spec.nodeName", "spec.restartPolicy", "spec.schedulerName", "spec.serviceAccountName", "status.phase", "status.podIP")


def field_selector(kind: Kind, text: str) -> Matches:
    """metadata.name and metadata.namespace of everything, and a few fields more of pods."""
    known = ("metadata.name", "metadata.namespace", *(_POD_FIELDS if kind.plural == "pods" else ()))
    checks: list[tuple[str, str, bool]] = []
    for part in filter(None, text.split(",")):
        path, sign, value = re.split(r"(!=|==|=)", part, maxsplit=1) if "=" in part else (part, "", "")
        if not sign:
            raise StatusError(400, "BadRequest", f"invalid selector: '{text}'; can't understand '{part}'")
        if path not in known:
            raise StatusError(400, "BadRequest", f"field label not supported: {path}")
        checks.append((path, value, sign != "!="))

    def matches(obj: Object) -> bool:
        for path, value, wanted in checks:
            top, name = path.split(".")
            if (obj.get(top, {}).get(name, "") == value) is not wanted:
                return False
        return True

    return matches


def selector(kind: Kind, params: Mapping[str, str]) -> Matches:
    by_label, by_field = label_selector(params.get("labelSelector", "")), field_selector(kind, params.get("fieldSelector", ""))
    return lambda obj: by_label(obj) and by_field(obj)
