"""An API server for tests, in process: what clients of Kubernetes see of one, and the faults that they must live through.

    async with FakeApi() as api:
        api.create(pod("a", "10.0.0.1"))
        ...  # a client at api.url

The server and its client share an event loop: the methods of an administrator (`create`, `delete`, `cut_watches`, ...) take effect at once,
and `await api.until(lambda: api.watching("pods"))` waits for the client without a pause. `test_conformance.py` holds it to a real server
of Kubernetes 1.20. Where it is not like one: plain HTTP/1.1, namespaces are not asked for, nobody collects garbage, a list at a future
resourceVersion is refused without the wait of three seconds, and `create` as an administrator takes the status too, in one event.

Limits: what fake_store keeps, REQUESTS_MAX requests remembered, BODY_BYTES_MAX of a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any, NamedTuple, Self

import yaml
from aiohttp import web

from tests.kubernetes.fake_access import ADMIN, ANONYMOUS, DEFAULT_ROLES, Access, Attributes, User, forbidden
from tests.kubernetes.fake_objects import inference_pool, inference_pool_v1alpha2, lease, objective, pod, rewrite, service
from tests.kubernetes.fake_store import (
    BUILT_IN,
    OTHERS,
    Entry,
    Event,
    Kind,
    Matches,
    Object,
    StatusError,
    Store,
    crd_kinds,
    merged,
    parse_rv,
    selector,
)

__all__ = [
    "FakeApi", "Kind", "User", "inference_pool", "inference_pool_v1alpha2", "lease", "objective", "pod", "rewrite", "service",
]  # fmt: skip

REQUESTS_MAX = 100_000
BODY_BYTES_MAX = 3 << 20
GZIP_FROM_BYTES = 128 << 10
TIMEOUT_S = 1800.0
BOOKMARK_EVERY_S = 60.0
BOOKMARK_BEFORE_END_S = 2.0
VERSION = {"major": "1", "minor": "20", "gitVersion": "v1.20.2", "platform": "linux/amd64"}


class Request(NamedTuple):
    method: str
    path: str
    params: dict[str, str]


@dataclass
class Fault:
    """What happens to the next requests instead of an answer, or to their answer."""

    times: int
    status: int
    path: str
    method: str
    watch: bool | None
    retry_after_s: float | None
    reason: str
    message: str
    done: bool

    def fits(self, request: Request) -> bool:
        watch = request.params.get("watch") in ("1", "true")
        return self.times > 0 and request.path.startswith(self.path) and self.method in ("", request.method) and self.watch in (None, watch)


@dataclass(eq=False)
class Watcher:
    kind: Kind
    namespace: str
    matches: Matches
    after_rv: int
    """Events up to this one are not for it: it asked from a later resourceVersion."""
    cursor: int
    bookmarks: bool
    path: str
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    out: deque[bytes] = field(default_factory=deque)
    end: str = ""
    """"clean" or "abort": the stream ends so, after what is in `out`."""


@dataclass(frozen=True)
class Target:
    """What a path names."""

    kind: Kind
    namespace: str
    name: str
    sub: str


class FakeApi:
    """`without`: kinds (`plural.group`) that are not installed. `tokens`: who may ask, by bearer token; None: anybody, as an administrator.
    `rbac`: users other than of system:masters may do what roles in the store allow them, else everything. `second_s`: how long a second of
    timeoutSeconds and of the bookmarks takes."""

    def __init__(
        self,
        *,
        without: Collection[str] = (),
        tokens: Mapping[str, User | str] | None = None,
        rbac: bool = False,
        kinds: Iterable[Kind] = (),
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        second_s: float = 1.0,
    ) -> None:
        self._installed = [*BUILT_IN, *crd_kinds(), *OTHERS, *kinds]
        self.store = Store([kind for kind in self._installed if kind.full not in without])
        self.store.changed = self._changed
        self.access = Access(self.store)
        self.tokens: dict[str, User] = {}
        self.guarded, self.rbac = tokens is not None, rbac
        for token, user in (tokens or {}).items():
            self.add_token(token, user)
        self.requests: deque[Request] = deque(maxlen=REQUESTS_MAX)
        self.clock_skew_s = 0.0
        """Of the Date in every answer."""
        self._sleep = sleep
        self._second_s = second_s
        self._faults: list[Fault] = []
        self._watchers: set[Watcher] = set()
        self._list_delay_s = 0.0
        self._voice, self._lists = asyncio.Event(), asyncio.Event()
        self._voice.set()
        self._lists.set()
        self._waiting: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self._owners: dict[tuple[Kind, str, str], dict[str, str]] = {}
        self._runner: web.AppRunner | None = None
        self._port = 0
        for role in DEFAULT_ROLES:
            self.create(copy.deepcopy(role))
        self.store.compact()

    # Life

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listens: on the port it had before, if it was stopped."""
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.01)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
        await site.start()
        self._port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Connections are cut, and new ones refused; what is stored stays."""
        runner, self._runner = self._runner, None
        if runner is None:
            return
        self._voice.set()
        self._lists.set()
        self.cut_watches(abort=True)
        await runner.cleanup()

    # As an administrator

    def create(self, obj: Object) -> Object:
        """Status included. Without a namespace: in `default`."""
        kind = self.store.kind_of(obj)
        namespace = obj.get("metadata", {}).get("namespace") or "default" if kind.namespaced else ""
        return copy.deepcopy(self.store.create(kind, namespace, obj, as_admin=True).obj)

    def update(self, obj: Object) -> Object:
        """The whole object as given, its status too; a resourceVersion in it is passed over."""
        kind = self.store.kind_of(obj)
        namespace = obj["metadata"].get("namespace") or "default" if kind.namespaced else ""
        return copy.deepcopy(self.store.replace(kind, namespace, obj["metadata"]["name"], obj).obj)

    def patch(self, kind: str, namespace: str, name: str, change: Object) -> Object:
        """A merge patch, of the status too."""
        of = self.store.named(kind)
        obj = merged(self.get(kind, namespace, name), change)
        return copy.deepcopy(self.store.replace(of, namespace, name, obj).obj)

    def patch_status(self, obj: Object) -> Object:
        """The status of this object, whole; nothing else of it."""
        kind = self.store.kind_of(obj)
        namespace = obj["metadata"].get("namespace") or "default" if kind.namespaced else ""
        old = self.store.get(kind, namespace, obj["metadata"]["name"]).obj
        return self.update({**old, "status": obj["status"]})

    def delete(self, kind: str, namespace: str, name: str) -> None:
        """Gone at once, whatever finalizers or a grace period would say."""
        self.store.delete(self.store.named(kind), namespace, name, force=True)

    def terminate(self, kind: str, namespace: str, name: str, *, grace_s: int = 30) -> Object:
        """As `kubectl delete` of a running pod leaves it: there, with a deletionTimestamp."""
        metadata = {"deletionTimestamp": "2026-11-21T13:31:09Z", "deletionGracePeriodSeconds": grace_s}
        return self.patch(kind, namespace, name, {"metadata": metadata})

    def set_ready(self, namespace: str, name: str, ready: bool) -> Object:
        conditions = [{"type": "Ready", "status": "True" if ready else "False"}]
        return self.patch("pods", namespace, name, {"status": {"conditions": conditions}})

    def get(self, kind: str, namespace: str, name: str) -> Object:
        return copy.deepcopy(self.store.get(self.store.named(kind), namespace, name).obj)

    def objects(self, kind: str) -> list[Object]:
        return copy.deepcopy(self.store.all(self.store.named(kind)))

    @property
    def rv(self) -> int:
        return self.store.rv

    def install(self, full: str) -> None:
        """The kind (`plural.group`) is there from now on."""
        self.store.kinds += [kind for kind in self._installed if kind.full == full and kind not in self.store.kinds]

    def uninstall(self, full: str) -> None:
        """The kind is gone with its objects; its watches end."""
        for kind in [kind for kind in self.store.kinds if kind.full == full]:
            for obj in self.store.all(kind):
                self.store.delete(kind, obj["metadata"].get("namespace", ""), obj["metadata"]["name"], force=True)
            self.store.kinds.remove(kind)
            for watcher in self._watchers:
                if watcher.kind is kind:
                    self._end(watcher, "clean")

    def add_token(self, token: str, user: User | str) -> None:
        self.tokens[token] = user if isinstance(user, User) else User(user, ("system:authenticated",))

    def grant(
        self, user: str, verbs: Collection[str], *, resources: Collection[str] = (), group: str = "", namespace: str = "", paths: Collection[str] = ()
    ) -> None:  # fmt: skip
        """A role and its binding; in all namespaces when none is given."""
        for obj in self.access.role_of(user, verbs, resources=resources, group=group, namespace=namespace, paths=paths):
            self.create(obj)

    # Faults

    def fail(
        self, times: int = 1, status: int = 503, path: str = "", retry_after_s: float | None = None, *, method: str = "",
        watch: bool | None = None, reason: str = "", message: str = "", done: bool = False,
    ) -> None:  # fmt: skip
        """The next requests whose path starts so are answered with an error; status 0: the connection is reset. `watch`: only watches, or
        only others. `done`: the request is carried out all the same."""
        self._faults.append(Fault(times, status, path, method, watch, retry_after_s, reason, message, done))

    def cut_watches(self, *, abort: bool = False, kind: str = "", half_line: bool = False) -> int:
        """Every open watch (of this kind) ends, as at its timeoutSeconds; `abort`: by a reset; `half_line`: in the middle of an event.
        The number of them is returned."""
        found = self._of_kind(kind)
        for watcher in found:
            if half_line:
                self._send(watcher, b'{"type":"MODIFIED","object":{"kind":"' + watcher.kind.kind.encode() + b'","apiVer')
            self._end(watcher, "abort" if abort else "clean")
        return len(found)

    def send_raw(self, data: bytes, *, kind: str = "") -> None:
        """Into every open watch, as it is: a line that is no event, or a part of one."""
        for watcher in self._of_kind(kind):
            self._send(watcher, data)

    def send_error(
        self, status: int = 410, *, reason: str = "Expired", message: str = "too old resource version: 1 (2)", kind: str = ""
    ) -> None:
        """An ERROR event within every open watch, after which it ends."""
        for watcher in self._of_kind(kind):
            self._send(watcher, _line("ERROR", json.dumps(StatusError(status, reason, message).as_object()).encode()))
            self._end(watcher, "clean")

    def bookmark_now(self, *, kind: str = "") -> None:
        for watcher in self._of_kind(kind):
            if watcher.bookmarks:
                self._send(watcher, self._bookmark(watcher))

    def compact(self) -> None:
        """Watches from before now are too old, and so are continue tokens; open watches go on."""
        self.store.compact()

    def delay_lists(self, seconds: float) -> None:
        self._list_delay_s = seconds

    def hold_lists(self) -> None:
        """Lists are taken and not answered until `release_lists`; what they answer is what there was when they were asked."""
        self._lists.clear()

    def release_lists(self) -> None:
        self._lists.set()

    def silence(self, silent: bool = True) -> None:
        """Requests are taken and nothing is answered, also on open watches; until it is called with False."""
        if silent:
            self._voice.clear()
            return
        self._voice.set()
        for watcher in self._watchers:
            watcher.wake.set()

    def refuse(self, plural: str, verbs: Collection[str] = ("*",), *, namespace: str = "") -> None:
        """403 for these verbs on a resource (`plural` or `plural.group`), as RBAC would say it; no verbs: allowed again."""
        self.access.refused[plural, namespace] = frozenset(verbs)

    # For tests to wait by

    def watching(self, kind: str = "") -> int:
        """Open watches."""
        return len(self._of_kind(kind))

    def asked(self, path: str = "", method: str = "", *, watch: bool | None = None) -> int:
        """Requests whose path starts so."""
        fault = Fault(1, 0, path, method, watch, None, "", "", done=False)
        return sum(fault.fits(request) for request in self.requests)

    async def until(self, condition: Callable[[], bool], *, timeout_s: float = 20.0) -> None:
        """Looks again after every request, and whenever a watch starts or ends."""
        if condition():
            return
        entry = (condition, asyncio.get_running_loop().create_future())
        self._waiting.append(entry)
        try:
            await asyncio.wait_for(entry[1], timeout_s)
        finally:
            with contextlib.suppress(ValueError):
                self._waiting.remove(entry)

    def _look(self) -> None:
        for entry in [entry for entry in self._waiting if entry[0]()]:
            self._waiting.remove(entry)
            if not entry[1].done():
                entry[1].set_result(None)

    # Requests

    async def _handle(self, http: web.Request) -> web.StreamResponse:
        request = Request(http.method, http.path, dict(http.query))
        self.requests.append(request)
        self._look()
        try:
            fault = next((fault for fault in self._faults if fault.fits(request)), None)
            if fault is None:
                return await self._answer(http, request)
            fault.times -= 1
            if fault.done:
                await self._answer(http, request)
            return await self._faulty(http, fault)
        except StatusError as error:
            return self._error(error)
        finally:
            self._look()

    async def _faulty(self, http: web.Request, fault: Fault) -> web.StreamResponse:
        await self._voice.wait()
        if not fault.status:
            _reset(http)
            return web.Response()
        reason = fault.reason or {429: "TooManyRequests", 503: "ServiceUnavailable", 500: "InternalError"}.get(fault.status, "")
        response = self._error(StatusError(fault.status, reason, fault.message or "the server is not able to answer now", details={}))
        if fault.retry_after_s is not None:
            response.headers["Retry-After"] = f"{fault.retry_after_s:g}"
        return response

    async def _answer(self, http: web.Request, request: Request) -> web.StreamResponse:
        await self._voice.wait()
        user = self._user(http)
        target = self._target(request.path)
        watch = request.params.get("watch") in ("1", "true")
        verb = _verb(request.method, target, watch=watch)
        self._authorize(user, target, verb, request.path)
        if target is None:
            return self._path(request.path)
        match verb:
            case "watch":
                return await self._watch(http, target, request.params)
            case "list":
                return await self._list(http, target, request.params)
        body = await self._body(http, target.kind)
        await self._voice.wait()
        status, answer = self._do(verb, target, body, http, user)
        return self._json(status, answer)

    def _user(self, http: web.Request) -> User:
        if not self.guarded:
            return ADMIN
        scheme, _, token = http.headers.get("Authorization", "").partition(" ")
        if not scheme:
            return ANONYMOUS
        if scheme.lower() != "bearer" or token.strip() not in self.tokens:
            raise StatusError(401, "Unauthorized", "Unauthorized")
        return self.tokens[token.strip()]

    def _authorize(self, user: User, target: Target | None, verb: str, path: str) -> None:
        if target is None:
            attributes = Attributes(verb, path=path)
        else:
            attributes = Attributes(verb, target.kind.group, target.kind.plural, target.sub, target.namespace, target.name)
        if not self._allowed(user, attributes):
            raise forbidden(user, attributes)

    def _allowed(self, user: User, attributes: Attributes) -> bool:
        if self.access.is_refused(attributes):
            return False
        return not self.guarded or (not self.rbac and user is not ANONYMOUS) or self.access.ruling(user, attributes)[0]

    def _target(self, path: str) -> Target | None:
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "v1"]:
            group, version, rest = "", "v1", parts[2:]
        elif parts[0] == "apis" and len(parts) > 3:
            group, version, rest = parts[1], parts[2], parts[3:]
        else:
            return None
        if not rest:
            return None
        namespace = ""
        if rest[0] == "namespaces" and len(rest) > 2 and rest[2] not in ("status", "finalize"):
            namespace, rest = rest[1], rest[2:]
        plural, name, sub = (*rest, "", "")[:3]
        here = [kind for kind in self.store.kinds if (kind.group, kind.version) == (group, version)]
        for kind in here:
            if kind.plural == plural and kind.namespaced >= bool(namespace):
                if len(rest) > 3 or (sub and not (sub == "status" and kind.status)):
                    break
                return Target(kind, namespace, name, sub)
        if here and not here[0].custom:
            raise StatusError(404, "NotFound", "the server could not find the requested resource", details={})
        return None

    def _path(self, path: str) -> web.Response:
        """What is no resource: who is there, and is it well?"""
        if path in ("/healthz", "/livez", "/readyz"):
            return web.Response(text="ok", headers=self._headers())
        if path == "/version":
            return self._json(200, VERSION)
        found = self._discovery(path.rstrip("/"))
        if found is None:
            return web.Response(status=404, text="404 page not found\n", headers=self._headers())
        return self._json(200, found)

    def _discovery(self, path: str) -> Object | None:
        groups: dict[str, list[str]] = {}
        for kind in self.store.kinds:
            if kind.group and kind.version not in groups.setdefault(kind.group, []):
                groups[kind.group].append(kind.version)
        if path == "/api":
            addresses = [{"clientCIDR": "0.0.0.0/0", "serverAddress": f"127.0.0.1:{self._port}"}]
            return {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": addresses}
        if path == "/apis":
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group(name, versions) for name, versions in groups.items()]}
        parts = path.strip("/").split("/")
        if parts[0] == "apis" and len(parts) == 2 and parts[1] in groups:
            return {"kind": "APIGroup", "apiVersion": "v1", **_group(parts[1], groups[parts[1]])}
        if parts[0] not in ("api", "apis"):
            return None
        version = "/".join(parts[1:])
        found = [resource for kind in self.store.kinds if kind.api_version == version for resource in _resources(kind)]
        if not found:
            return None
        return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": found}

    async def _body(self, http: web.Request, kind: Kind) -> Object:
        text = await http.read()
        if not text:
            return {}
        try:
            body = yaml.safe_load(text) if "yaml" in http.content_type else json.loads(text)
        except (ValueError, yaml.YAMLError):
            body = None
        if not isinstance(body, dict):
            said = f"the object provided is unrecognized (must be of type {kind.kind}): couldn't get version/kind; json parse error"
            raise StatusError(400, "BadRequest", said)
        return body

    def _do(self, verb: str, target: Target, body: Object, http: web.Request, user: User) -> tuple[int, Entry | Object]:
        kind, namespace, name = target.kind, target.namespace, target.name
        match verb:
            case "get":
                return 200, self.store.get(kind, namespace, name)
            case "create" if not name:
                body = _typed(kind, body)
                if not kind.stored:
                    return 201, self._review(kind, body, user)
                return 201, self.store.create(kind, namespace, body)
            case "update" if name:
                there = any(obj["metadata"]["name"] == name for obj in self.store.all(kind)) if kind.create_by_put else True
                entry = self.store.update(kind, namespace, name, _typed(kind, body), status=target.sub == "status")
                return (200 if there else 201), entry
            case "patch" if name:
                return self._patch(target, body, http)
            case "delete":
                given = http.query.get("gracePeriodSeconds", body.get("gracePeriodSeconds"))
                entry, gone = self.store.delete(kind, namespace, name, None if given is None else int(given))
                if not gone or kind.graceful:
                    return 200, entry
                uid = entry.obj["metadata"]["uid"]
                return 200, {
                    "kind": "Status",
                    "apiVersion": "v1",
                    "metadata": {},
                    "status": "Success",
                    "details": kind.details(name, uid=uid),
                }
            case "deletecollection":
                page = self.store.list(kind, namespace, selector(kind, http.query), {})
                for entry in page.entries:
                    self.store.delete(kind, entry.obj["metadata"].get("namespace", ""), entry.obj["metadata"]["name"], 0)
                return 200, json.loads(_list_json(kind, str(page.rv), page.entries, {}))
        raise StatusError(405, "MethodNotAllowed", "the server does not allow this method on the requested resource", details={})

    def _patch(self, target: Target, body: Object, http: web.Request) -> tuple[int, Entry]:
        kind, namespace, name = target.kind, target.namespace, target.name
        status = target.sub == "status"
        if http.content_type == "application/apply-patch+yaml":
            return self._apply(target, body, http.query)
        if http.content_type not in ("application/merge-patch+json", "application/strategic-merge-patch+json"):
            taken = "application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml"
            said = f"the body of the request was in an unknown format - accepted media types include: {taken}"
            raise StatusError(415, "UnsupportedMediaType", said)
        if kind.custom and "strategic" in http.content_type:
            said = "the body of the request was in an unknown format - accepted media types include: application/merge-patch+json"
            raise StatusError(415, "UnsupportedMediaType", said)
        return 200, self.store.patch(kind, namespace, name, body, status=status)

    def _apply(self, target: Target, body: Object, params: Mapping[str, str]) -> tuple[int, Entry]:
        """Server-side apply, as far as saying that another manager owns a field; lists have one owner."""
        manager = params.get("fieldManager", "")
        if not manager:
            raise StatusError(422, "Invalid", "fieldManager: Required value: is required for apply patch")
        kind, key = target.kind, (target.kind, target.namespace, target.name)
        leaves = dict(_leaves({part: value for part, value in body.items() if part not in ("apiVersion", "kind", "metadata")}))
        try:
            old = self.store.get(kind, target.namespace, target.name).obj
        except StatusError:
            self._owners[key] = dict.fromkeys(leaves, manager)
            return 201, self.store.create(kind, target.namespace, body)
        owners, there = self._owners.setdefault(key, {}), dict(_leaves(old))
        taken = [at for at, value in leaves.items() if there.get(at) != value and owners.get(at, manager) != manager]
        if taken and params.get("force") != "true":
            causes = [
                {"reason": "FieldManagerConflict", "message": f'conflict with "{owners[at]}" using {kind.api_version}', "field": at}
                for at in taken
            ]
            said = f'Apply failed with {len(taken)} conflict{"s" * (len(taken) > 1)}: conflict with "{owners[taken[0]]}": {taken[0]}'
            raise StatusError(409, "Conflict", said, details={"causes": causes})
        owners.update(dict.fromkeys(leaves, manager))
        return 200, self.store.patch(kind, target.namespace, target.name, merged({}, body))

    def _review(self, kind: Kind, body: Object, user: User) -> Object:
        spec = body.get("spec") or {}
        answer: Object = {"kind": kind.kind, "apiVersion": kind.api_version, "metadata": {"creationTimestamp": None}, "spec": spec}
        if kind.kind == "TokenReview":
            if not spec.get("token"):
                raise StatusError(400, "BadRequest", "token is required for TokenReview in authentication")
            return answer | {"status": self.access.token_status(self.tokens.get(spec["token"]), spec.get("audiences"))}
        about = user
        if kind.kind == "SubjectAccessReview":
            if not spec.get("user") and not spec.get("groups"):
                said = 'Invalid value: "": at least one of user or group must be specified'
                raise StatusError(422, "Invalid", f'.authorization.k8s.io "" is invalid: spec.user: {said}')
            about = User(spec.get("user", ""), tuple(spec.get("groups") or ()))
        attributes = Attributes.of_spec(spec)
        if kind.kind == "SelfSubjectAccessReview":
            allowed, why = self._allowed(user, attributes), ""
        else:
            allowed, why = self.access.ruling(about, attributes)
        return answer | {"status": {"allowed": allowed} | ({"reason": why} if why else {})}

    # Lists and watches

    async def _list(self, http: web.Request, target: Target, params: Mapping[str, str]) -> web.StreamResponse:
        kind = target.kind
        page = self.store.list(kind, target.namespace, selector(kind, params), params)
        if self._list_delay_s:
            await self._sleep(self._list_delay_s)
        await self._lists.wait()
        await self._voice.wait()
        more: Object = {"continue": page.token} if page.token or kind.custom else {}
        if page.remaining is not None:
            more["remainingItemCount"] = page.remaining
        body = _list_json(kind, str(page.rv), page.entries, more)
        response = web.Response(body=body, content_type="application/json", headers=self._headers())
        if len(body) > GZIP_FROM_BYTES and "gzip" in http.headers.get("Accept-Encoding", ""):
            response.enable_compression(web.ContentCoding.gzip)
        return response

    async def _watch(self, http: web.Request, target: Target, params: Mapping[str, str]) -> web.StreamResponse:
        kind, rv = target.kind, parse_rv(params.get("resourceVersion", ""))
        matches = selector(kind, params)
        loop, begun_rv = asyncio.get_running_loop(), max(rv, self.store.rv)
        watcher = Watcher(
            kind, target.namespace, matches, rv, self.store.since(rv or self.store.rv), params.get("allowWatchBookmarks") in ("1", "true"), http.path
        )  # fmt: skip
        if not rv:
            page = self.store.list(kind, target.namespace, matches, {})
            watcher.out.extend(_line("ADDED", entry.opened) for entry in page.entries)
        elif rv < self.store.compacted_rv:
            old = StatusError(410, "Expired", f"too old resource version: {rv} ({self.store.compacted_rv})")
            watcher.out.append(_line("ERROR", json.dumps(old.as_object(), separators=(",", ":")).encode()))
            watcher.end = "clean"
        end_at_s = loop.time() + (float(params.get("timeoutSeconds") or 0) or TIMEOUT_S) * self._second_s
        before_end_s = end_at_s - BOOKMARK_BEFORE_END_S * self._second_s
        bookmark_at_s = min(loop.time() + BOOKMARK_EVERY_S * self._second_s, before_end_s)
        response = web.StreamResponse(headers=self._headers() | {"Content-Type": "application/json", "Cache-Control": "no-cache, private"})
        response.enable_chunked_encoding()
        await response.prepare(http)
        self._watchers.add(watcher)
        self._look()
        try:
            while True:
                watcher.wake.clear()
                if lines := self._lines(watcher):
                    await response.write(lines)
                    continue
                if watcher.end and self._voice.is_set():
                    break
                wait_s = (min(bookmark_at_s, end_at_s) if watcher.bookmarks else end_at_s) - loop.time()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(watcher.wake.wait(), max(0.0, wait_s))
                if watcher.bookmarks and loop.time() >= bookmark_at_s:
                    if self.store.rv > begun_rv:  # else it would say nothing new
                        self._send(watcher, self._bookmark(watcher))
                    later_s = loop.time() + BOOKMARK_EVERY_S * self._second_s
                    bookmark_at_s = min(later_s, before_end_s) if loop.time() < before_end_s else end_at_s + 1
                if loop.time() >= end_at_s:
                    self._end(watcher, watcher.end or "clean")
        except ConnectionError:  # the client went away
            return response
        finally:
            self._watchers.discard(watcher)
            self._look()
        if watcher.end == "abort":
            _reset(http)
            return response
        with contextlib.suppress(ConnectionError):
            await response.write_eof()
        return response

    def _lines(self, watcher: Watcher) -> bytes:
        """What is to be sent now."""
        if not self._voice.is_set():
            return b""
        self._pull(watcher)
        lines = b"".join(watcher.out)
        watcher.out.clear()
        return lines

    def _pull(self, watcher: Watcher) -> None:
        """Its events so far come before whatever else is sent."""
        at = watcher.cursor - self.store.forgotten
        if watcher.end or at < 0:  # too slow for the history there is: a server drops it
            watcher.end = watcher.end or "clean"
            return
        for event in self.store.history[at:]:
            if event.kind is watcher.kind and event.rv > watcher.after_rv and watcher.namespace in ("", event.key[0]):
                watcher.out.extend(_event_lines(event, watcher.matches))
        watcher.cursor = self.store.forgotten + len(self.store.history)

    def _send(self, watcher: Watcher, data: bytes) -> None:
        self._pull(watcher)
        watcher.out.append(data)
        watcher.wake.set()

    def _bookmark(self, watcher: Watcher) -> bytes:
        kind = watcher.kind
        obj = {
            "kind": kind.kind,
            "apiVersion": kind.api_version,
            "metadata": {"resourceVersion": str(self.store.rv), "creationTimestamp": None},
        }
        if kind.plural == "pods":  # what Go writes of an empty one
            obj |= {"spec": {"containers": None}, "status": {}}
        return _line("BOOKMARK", json.dumps(obj, separators=(",", ":")).encode())

    def _of_kind(self, kind: str) -> list[Watcher]:
        return [watcher for watcher in self._watchers if kind in ("", watcher.kind.plural, watcher.kind.full, watcher.kind.kind)]

    def _end(self, watcher: Watcher, how: str) -> None:
        self._pull(watcher)
        watcher.end = how
        watcher.wake.set()

    def _changed(self, event: Event) -> None:
        for watcher in self._watchers:
            if watcher.kind is event.kind:
                watcher.wake.set()

    # Answers

    def _headers(self) -> dict[str, str]:
        return {"Date": format_datetime(datetime.now(UTC) + timedelta(seconds=self.clock_skew_s), usegmt=True)}

    def _json(self, status: int, answer: Entry | Object) -> web.Response:
        body = answer.opened if isinstance(answer, Entry) else json.dumps(answer).encode()
        return web.Response(status=status, body=body, content_type="application/json", headers=self._headers())

    def _error(self, error: StatusError) -> web.Response:
        response = self._json(error.code, error.as_object())
        if error.retry_after_s is not None:
            response.headers["Retry-After"] = str(error.retry_after_s)
        return response


def _reset(http: web.Request) -> None:
    """The client sees no end of the connection but an error."""
    if http.transport is None:
        return
    if (one := http.transport.get_extra_info("socket")) is not None:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    http.transport.abort()


def _verb(method: str, target: Target | None, *, watch: bool) -> str:
    if target is None:
        return method.lower()
    if method == "GET":
        return "get" if target.name else "watch" if watch else "list"
    if method == "DELETE" and not target.name:
        return "deletecollection"
    return {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}.get(method, method.lower())


def _typed(kind: Kind, body: Object) -> Object:
    """What was sent is of the kind the path is about."""
    said = (body.get("apiVersion"), body.get("kind"))
    if said == (None, None) and not kind.custom:
        return {"kind": kind.kind, "apiVersion": kind.api_version, **body}
    if said != (kind.api_version, kind.kind):
        message = f'{said[1]} in version "{said[0]}" cannot be handled as a {kind.kind}'
        raise StatusError(400, "BadRequest", message)
    return body


def _leaves(value: Any, at: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _leaves(item, f"{at}.{name}")
    else:
        yield at, value


def _line(of: str, obj: bytes) -> bytes:
    return b'{"type":"' + of.encode() + b'","object":' + obj + b"}\n"


def _event_lines(event: Event, matches: Matches) -> list[bytes]:
    """An object that stops matching a selector is deleted for that watcher, and one that starts is added. Deleted is what there was before,
    with the resourceVersion of its end."""
    before = event.before is not None and matches(event.before.obj)
    if event.entry is not None and matches(event.entry.obj):
        return [_line("MODIFIED" if before else "ADDED", event.entry.opened)]
    if not before:
        return []
    assert event.before is not None
    last = event.before.obj
    entry = Entry.of(event.kind, {**last, "metadata": {**last["metadata"], "resourceVersion": str(event.rv)}})
    return [_line("DELETED", entry.opened)]


def _list_json(kind: Kind, rv: str, entries: list[Entry], more: Object) -> bytes:
    head = json.dumps({"kind": f"{kind.kind}List", "apiVersion": kind.api_version, "metadata": {"resourceVersion": rv, **more}, "items": 0})
    return head[:-2].encode() + b"[" + b",".join(entry.bare for entry in entries) + b"]}"


def _group(name: str, versions: list[str]) -> Object:
    found = [{"groupVersion": f"{name}/{version}", "version": version} for version in versions]
    return {"name": name, "versions": found, "preferredVersion": found[0]}


def _resources(kind: Kind) -> Iterable[Object]:
    verbs = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"] if kind.stored else ["create"]
    yield {
        "name": kind.plural,
        "singularName": kind.kind.lower() if kind.custom else "",
        "namespaced": kind.namespaced,
        "kind": kind.kind,
        "verbs": verbs,
    }
    if kind.status:
        yield {
            "name": f"{kind.plural}/status",
            "singularName": "",
            "namespaced": kind.namespaced,
            "kind": kind.kind,
            "verbs": ["get", "patch", "update"],
        }
