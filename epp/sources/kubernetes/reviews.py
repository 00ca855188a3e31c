"""Who may read the metrics port: asks the API server, as the reference picker's library does (TokenReview, then SubjectAccessReview).

A verdict is remembered, for `ALLOWED_S` or `DENIED_S`, under a keyed hash of token, verb and path: the token itself is kept nowhere and
logged nowhere. While the API server can't be reached, what was allowed stands for `STANDS_S` since it was last asked: metrics are wanted
most when something is broken (the reference's library remembers what is allowed for five minutes always). A token that was refused is
allowed by nothing but a new review.

Callers are not trusted: many asking the same at once are one review, and reviews of what is not known as allowed have limits at once
(`AT_ONCE_MAX`) and in rate (`PER_S`, `BURST`); over one the answer is 429. So a flood of made-up tokens is not passed on to the API
server, and it neither pushes out what is remembered of the good ones (allowed and denied have a memory each) nor keeps them from being
reviewed again.

Cost of a remembered verdict: one hash and one look-up, about 3 µs; of another two round trips to the API server.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections import OrderedDict
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, NamedTuple

import msgspec

from epp.clock import Clock
from epp.sources.kubernetes.api import UNREADABLE, Api, ApiError, ApiUnreachableError

_log = logging.getLogger("epp.kubernetes.reviews")

TOKEN_REVIEWS = "/apis/authentication.k8s.io/v1/tokenreviews"  # noqa: S105 - a path
ACCESS_REVIEWS = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
ALLOWED_S = 60.0
DENIED_S = 10.0
STANDS_S = 300.0
"""How long a verdict of allowed stands while no review can be had."""
REMEMBERED_MAX = 1_024
"""Limit on the verdicts of each kind; the oldest goes first."""
AT_ONCE_MAX = 16
"""Limit on reviews under way at once."""
PER_S = 20.0
BURST = 40.0
"""Limits on reviews begun: that many in a second, and that many at once after a pause."""
TOKEN_CHARS_MAX = 16_384
REVIEW_S = 5.0
"""For each of the two answers."""


class Verdict(NamedTuple):
    """What to answer with: 200 to let pass. The message is for the caller, and has neither the token nor who it belongs to."""

    status: int
    message: str = ""


class _User(msgspec.Struct):
    username: str = ""
    uid: str = ""
    groups: list[str] = []
    extra: dict[str, list[str]] = {}


class _TokenStatus(msgspec.Struct):
    authenticated: bool = False
    user: _User | None = None


class _TokenReview(msgspec.Struct):
    status: _TokenStatus


class _AccessStatus(msgspec.Struct):
    allowed: bool = False


class _AccessReview(msgspec.Struct):
    status: _AccessStatus


class _Remembered(NamedTuple):
    verdict: Verdict
    at_s: float


_token_review = msgspec.json.Decoder(_TokenReview).decode
_access_review = msgspec.json.Decoder(_AccessReview).decode

_NO_TOKEN = Verdict(HTTPStatus.UNAUTHORIZED, "needs a bearer token: Authorization: Bearer TOKEN")
_BAD_TOKEN = Verdict(HTTPStatus.UNAUTHORIZED, "the API server does not know this token")
_BUSY = Verdict(HTTPStatus.TOO_MANY_REQUESTS, "too many tokens are being reviewed; try again in a second")
_UNREACHABLE = Verdict(HTTPStatus.SERVICE_UNAVAILABLE, "the Kubernetes API server can't be asked about this token now")
_UNABLE = Verdict(HTTPStatus.INTERNAL_SERVER_ERROR, "the Kubernetes API server refused to review this token; the picker's log says why")
_ALLOWED = Verdict(HTTPStatus.OK)


class Reviewer:
    """See the module. `allowed` has the form the console asks for."""

    def __init__(self, api: Api, clock: Clock, *, limit_hit: Callable[[str], None] | None = None) -> None:
        """`limit_hit` is told `reviews` when one was not made for being one too many."""
        self._api = api
        self._clock = clock
        self._limit_hit = limit_hit or (lambda _name: None)
        self._key = secrets.token_bytes(32)
        self._allowed: OrderedDict[bytes, _Remembered] = OrderedDict()
        self._denied: OrderedDict[bytes, _Remembered] = OrderedDict()
        self._running: dict[bytes, asyncio.Future[Verdict]] = {}
        self._tokens = BURST
        self._filled_s = clock.now_s()
        self._told = ""
        self.reviews_total = 0
        """Begun, remembered ones not counted."""

    async def allowed(self, token: str, verb: str, path: str) -> Verdict:
        """Whether the bearer of `token` may `verb` (an HTTP method in lower case) the nonResourceURL `path`."""
        if not token:
            return _NO_TOKEN
        if len(token) > TOKEN_CHARS_MAX or not (token.isascii() and token.isprintable()):
            return _BAD_TOKEN
        key = hashlib.blake2b(f"{token}\0{verb}\0{path}".encode(errors="surrogateescape"), key=self._key, digest_size=32).digest()
        now_s = self._clock.now_s()
        known = self._allowed.get(key)
        if known is not None and now_s - known.at_s < ALLOWED_S:
            return known.verdict
        refused = self._denied.get(key)
        if refused is not None and now_s - refused.at_s < DENIED_S:
            return refused.verdict
        verdict = await self._shared(key, token, verb, path)
        if verdict is _UNREACHABLE and known is not None and now_s - known.at_s < STANDS_S:
            return known.verdict
        return verdict

    async def _shared(self, key: bytes, token: str, verb: str, path: str) -> Verdict:
        """One review, however many wait for it."""
        while (running := self._running.get(key)) is not None:
            await asyncio.wait((running,))
            if not running.cancelled():
                return running.result()
        if key not in self._allowed and not self._may_begin():
            self._limit_hit("reviews")
            return _BUSY
        self._running[key] = future = asyncio.get_running_loop().create_future()
        try:
            verdict = await self._review(token, verb, path)
            self._remember(key, verdict)
            future.set_result(verdict)
        finally:
            del self._running[key]
            future.cancel()  # without effect on one that has its result; who waits for another begins anew
        return verdict

    def _may_begin(self) -> bool:
        now_s = self._clock.now_s()
        self._tokens = min(BURST, self._tokens + (now_s - self._filled_s) * PER_S)
        self._filled_s = now_s
        if len(self._running) >= AT_ONCE_MAX or self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def _remember(self, key: bytes, verdict: Verdict) -> None:
        if verdict.status == HTTPStatus.OK:
            into = self._allowed
        elif verdict.status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            into = self._denied
            self._allowed.pop(key, None)
        else:
            return
        into.pop(key, None)
        into[key] = _Remembered(verdict, self._clock.now_s())
        while len(into) > REMEMBERED_MAX:
            into.popitem(last=False)

    async def _review(self, token: str, verb: str, path: str) -> Verdict:
        self.reviews_total += 1
        kind = "tokenreviews.authentication.k8s.io"
        try:
            answer = await self._post(TOKEN_REVIEWS, "authentication.k8s.io/v1", "TokenReview", {"token": token})
            status = _token_review(answer).status
            if not status.authenticated or status.user is None or not status.user.username:
                self._well()
                return _BAD_TOKEN
            kind = "subjectaccessreviews.authorization.k8s.io"
            user = status.user
            spec = {
                "user": user.username,
                "uid": user.uid,
                "groups": user.groups,
                "extra": user.extra,
                "nonResourceAttributes": {"path": path, "verb": verb},
            }
            answer = await self._post(ACCESS_REVIEWS, "authorization.k8s.io/v1", "SubjectAccessReview", spec)
            allowed = _access_review(answer).status.allowed
        except ApiUnreachableError as error:
            self._trouble("unreachable", f"the API server can't be reached: {error}")
            return _UNREACHABLE
        except ApiError as error:
            return self._refused(kind, error)
        except UNREADABLE as error:
            self._trouble("unreadable", f"the API server's answer to one of {kind} can't be read: {error}")
            return _UNREACHABLE
        self._well()
        if allowed:
            return _ALLOWED
        return Verdict(
            HTTPStatus.FORBIDDEN, f"this token may not {verb} {path[:200]}: it needs a ClusterRole with that verb on that nonResourceURL"
        )

    async def _post(self, path: str, api_version: str, kind: str, spec: dict[str, Any]) -> bytes:
        body = msgspec.json.encode({"apiVersion": api_version, "kind": kind, "spec": spec})
        return await self._api.post(path, body, timeout_s=REVIEW_S)

    def _refused(self, kind: str, error: ApiError) -> Verdict:
        """The API server answered, with an error."""
        if error.status == HTTPStatus.FORBIDDEN:
            self._trouble(
                kind,
                f"this picker's service account may not create {kind}: bind it to the ClusterRole system:auth-delegator,"
                " or start with --metrics-endpoint-auth=false",
            )
            return _UNABLE
        self._trouble(f"{kind} {error.status}", f"one of {kind} was answered {error.status} {error.reason}")
        return _UNREACHABLE if error.status == HTTPStatus.TOO_MANY_REQUESTS or error.status >= HTTPStatus.INTERNAL_SERVER_ERROR else _UNABLE

    def _trouble(self, what: str, reason: str) -> None:
        """Said once, until a review is answered or something else is wrong."""
        if what != self._told:
            self._told = what
            _log.warning("who may read the metrics port can't be asked", extra={"fields": {"reason": reason}})

    def _well(self) -> None:
        if self._told:
            self._told = ""
            _log.info("who may read the metrics port can be asked again")
