"""Who a token belongs to and what RBAC lets them do, for fake_api: roles and bindings are read from its store, as a server does."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tests.kubernetes.fake_store import Object, StatusError, Store

AUDIENCE = "https://kubernetes.default.svc"
_RBAC = "rbac.authorization.k8s.io"


@dataclass(frozen=True)
class User:
    name: str
    groups: tuple[str, ...] = ("system:authenticated",)
    uid: str = ""
    extra: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @classmethod
    def service_account(cls, namespace: str, name: str) -> User:
        groups = ("system:serviceaccounts", f"system:serviceaccounts:{namespace}", "system:authenticated")
        return cls(f"system:serviceaccount:{namespace}:{name}", groups, uid=f"uid-of-{name}")


ADMIN = User("admin", ("system:masters", "system:authenticated"))
ANONYMOUS = User("system:anonymous", ("system:unauthenticated",))


class Attributes(NamedTuple):
    """What is asked for: a verb on a resource, or on a path."""

    verb: str
    group: str = ""
    resource: str = ""
    sub: str = ""
    namespace: str = ""
    name: str = ""
    path: str = ""

    @classmethod
    def of_spec(cls, spec: Object) -> Attributes:
        """Of a review."""
        if "nonResourceAttributes" in spec:
            given = spec["nonResourceAttributes"]
            return cls(given.get("verb", ""), path=given.get("path", ""))
        given = spec.get("resourceAttributes") or {}
        names = ("verb", "group", "resource", "subresource", "namespace", "name")
        return cls(*(given.get(name, "") for name in names))


def forbidden(user: User, asked: Attributes) -> StatusError:
    if asked.path:
        said = f'forbidden: User "{user.name}" cannot {asked.verb} path "{asked.path}"'
        return StatusError(403, "Forbidden", said, details={})
    full = f"{asked.resource}.{asked.group}" if asked.group else asked.resource
    resource = f"{asked.resource}/{asked.sub}" if asked.sub else asked.resource
    named = f' "{asked.name}"' if asked.name else ""
    where = f'in the namespace "{asked.namespace}"' if asked.namespace else "at the cluster scope"
    said = f'{full}{named} is forbidden: User "{user.name}" cannot {asked.verb} resource "{resource}" in API group "{asked.group}" {where}'
    details = ({"name": asked.name} if asked.name else {}) | ({"group": asked.group} if asked.group else {}) | {"kind": asked.resource}
    return StatusError(403, "Forbidden", said, details=details)


def _cluster_role(name: str, groups: Collection[str], rule: Object) -> tuple[Object, Object]:
    reference = {"apiGroup": _RBAC, "kind": "ClusterRole", "name": name}
    subjects = [{"apiGroup": _RBAC, "kind": "Group", "name": group} for group in groups]
    return (
        {"apiVersion": f"{_RBAC}/v1", "kind": "ClusterRole", "metadata": {"name": name}, "rules": [rule]},
        {"apiVersion": f"{_RBAC}/v1", "kind": "ClusterRoleBinding", "metadata": {"name": name}, "roleRef": reference, "subjects": subjects},
    )


_PUBLIC = ["/healthz", "/livez", "/readyz", "/version", "/version/"]
DEFAULT_ROLES = (
    *_cluster_role(
        "system:public-info-viewer", ("system:authenticated", "system:unauthenticated"), {"verbs": ["get"], "nonResourceURLs": _PUBLIC}
    ),
    *_cluster_role(
        "system:discovery",
        ("system:authenticated",),
        {"verbs": ["get"], "nonResourceURLs": [*_PUBLIC, "/api", "/api/*", "/apis", "/apis/*", "/openapi", "/openapi/*"]},
    ),
    *_cluster_role(
        "system:basic-user",
        ("system:authenticated",),
        {"verbs": ["create"], "apiGroups": ["authorization.k8s.io"], "resources": ["selfsubjectaccessreviews", "selfsubjectrulesreviews"]},
    ),
)
"""What a server lets everybody do."""


@dataclass
class Access:
    store: Store
    refused: dict[tuple[str, str], frozenset[str]] = field(default_factory=dict)
    """By resource and namespace ("": all), the verbs that nobody may use."""
    granted: int = 0

    def is_refused(self, asked: Attributes) -> bool:
        full = f"{asked.resource}.{asked.group}"
        for (resource, namespace), verbs in self.refused.items():
            if resource in (asked.resource, full) and namespace in ("", asked.namespace) and verbs & {"*", asked.verb}:
                return True
        return False

    def ruling(self, user: User, asked: Attributes) -> tuple[bool, str]:
        if "system:masters" in user.groups:
            return True, ""
        for binding in self._all("clusterrolebindings"):
            if found := self._by(binding, user, asked):
                return True, f'RBAC: allowed by ClusterRoleBinding "{binding["metadata"]["name"]}" of {found}'
        for binding in self._all("rolebindings"):
            metadata = binding["metadata"]
            if asked.namespace and metadata["namespace"] == asked.namespace and (found := self._by(binding, user, asked)):
                return True, f'RBAC: allowed by RoleBinding "{metadata["name"]}/{metadata["namespace"]}" of {found}'
        return False, ""

    def role_of(
        self, user: str, verbs: Collection[str], *, resources: Collection[str], group: str, namespace: str, paths: Collection[str]
    ) -> tuple[Object, Object]:
        self.granted += 1
        name, kind = f"granted-{self.granted}", "Role" if namespace else "ClusterRole"
        rule: dict[str, Any] = {"verbs": sorted(verbs)}
        rule |= {"nonResourceURLs": sorted(paths)} if paths else {"apiGroups": [group], "resources": sorted(resources)}
        metadata = {"name": name} | ({"namespace": namespace} if namespace else {})
        reference = {"apiGroup": _RBAC, "kind": kind, "name": name}
        subjects = [{"apiGroup": _RBAC, "kind": "User", "name": user}]
        binding = {"apiVersion": f"{_RBAC}/v1", "kind": f"{kind}Binding", "metadata": metadata, "roleRef": reference, "subjects": subjects}
        return {"apiVersion": f"{_RBAC}/v1", "kind": kind, "metadata": metadata, "rules": [rule]}, binding

    def token_status(self, user: User | None, audiences: Collection[str] | None) -> Object:
        if user is None or (audiences and AUDIENCE not in audiences):
            return {"user": {}, "error": "invalid bearer token"}
        who: Object = {"username": user.name, "uid": user.uid, "groups": list(user.groups)}
        if user.extra:
            who["extra"] = {name: list(values) for name, values in user.extra}
        return {"authenticated": True, "user": who, "audiences": [AUDIENCE]}

    def _all(self, plural: str) -> list[Object]:
        return self.store.all(self.store.named(plural))

    def _by(self, binding: Object, user: User, asked: Attributes) -> str:
        """Which role to whom allows it, or nothing."""
        for subject in binding.get("subjects") or ():
            if not _is(subject, user, binding["metadata"].get("namespace", "")):
                continue
            reference = binding["roleRef"]
            namespace = binding["metadata"]["namespace"] if reference["kind"] == "Role" else ""
            for role in self._all("roles" if namespace else "clusterroles"):
                metadata = role["metadata"]
                named = (metadata["name"], metadata.get("namespace", "")) == (reference["name"], namespace)
                if named and any(_allows(rule, asked) for rule in role.get("rules") or ()):
                    place = f"/{subject['namespace']}" if subject.get("namespace") else ""
                    return f'{reference["kind"]} "{reference["name"]}" to {subject["kind"]} "{subject["name"]}{place}"'
        return ""


def _is(subject: Object, user: User, namespace: str) -> bool:
    match subject["kind"]:
        case "User":
            return subject["name"] == user.name
        case "Group":
            return subject["name"] in user.groups
        case _:
            return f"system:serviceaccount:{subject.get('namespace') or namespace}:{subject['name']}" == user.name


def _allows(rule: Object, asked: Attributes) -> bool:
    if not {"*", asked.verb} & set(rule.get("verbs") or ()):
        return False
    if asked.path:
        urls = rule.get("nonResourceURLs") or ()
        return any(url in ("*", asked.path) or (url.endswith("*") and asked.path.startswith(url[:-1])) for url in urls)
    resource = f"{asked.resource}/{asked.sub}" if asked.sub else asked.resource
    names = rule.get("resourceNames") or ()
    return (
        bool({"*", asked.group} & set(rule.get("apiGroups") or ()))
        and bool({"*", resource} & set(rule.get("resources") or ()))
        and (not names or asked.name in names)
    )
