"""Which of several replicas is ready: one Lease, held as client-go's elector holds it, so that the reference picker and this one may share it.

What it guards is readiness, not data: every replica watches, scrapes and answers whoever asks it; the leader alone says it is ready, so
that one prompt-prefix index sees all requests. Two that lead for a while do no harm, none that leads is an outage. Hence:

- Who leads and can't reach the API server (no answer, 5xx, 429, 401) goes on leading, for as long as that lasts. If it is so for all,
  nobody can take the lease; if only for this one, another takes it when it runs out, and both are ready until this one can look again.
- It stops leading when it sees another's name in the lease, after `release`, or when the API server, answering, has for
  `renew_deadline_s` neither let it renew nor shown it whose the lease is (RBAC taken away): others may well be able to take it then.
- A follower takes a lease that nobody holds, or that has not changed for as long as it says it lasts. How long is counted on this
  process's own clock from when the record was last seen to change; the times in the record are another machine's and decide nothing. A
  follower that could not look for `renew_deadline_s` counts anew, for the holder may have been cut off with it.
- Every write is a compare-and-swap on resourceVersion: of those that try at once one succeeds.

Cost: one PUT every `retry_s` from the leader, one GET every 1 to 2.2 times that from each follower.
"""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, NamedTuple

import msgspec

from epp.aio import Sleep
from epp.clock import Clock
from epp.sources.kubernetes.api import UNREADABLE, Api, ApiError, ApiUnreachableError

_log = logging.getLogger("epp.kubernetes.election")

LEASES = "/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
LEASE_S, RENEW_DEADLINE_S, RETRY_S = 15.0, 10.0, 2.0
"""The reference picker's, controller-runtime's defaults."""
JITTER = 1.2
"""A follower looks again after 1 to 1 + JITTER times `retry_s`, as in client-go."""
RELEASED_S = 1
"""What a released lease says it lasts: none of client-go's versions takes 0 for a duration."""
_NOT_REACHED = frozenset((HTTPStatus.UNAUTHORIZED, HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS))
"""Answers that tell of the API server's trouble, not of this lease. 401 among them: who can't be told apart is refused like all others."""


def lease_name(pool_namespace: str, pool_name: str) -> str:
    """The reference picker's."""
    return f"epp-{pool_namespace}-{pool_name}.llm-d.ai"


def replica_identity(pod_name: str, hostname: str) -> str:
    """Who we are in a lease: the pod, whose name stays when its container is restarted, so that a leader resumes at once. Without it
    what client-go makes: a host name, which pods of a host network share, and something random."""
    return pod_name or f"{hostname}_{uuid.uuid4()}"


class _Spec(msgspec.Struct, rename="camel", frozen=True):
    """What an elector reads and writes. Equal records: nothing was renewed in between."""

    holder_identity: str | None = None
    lease_duration_seconds: int | None = None
    acquire_time: str | None = None
    renew_time: str | None = None
    lease_transitions: int | None = None


class _Lease(NamedTuple):
    """One reading of the lease."""

    document: dict[str, Any]
    """All of it, for a PUT must not lose others' labels or fields unknown here."""
    spec: _Spec


class Elector:
    """See the module. `leading` is what counts; `on_change` is told when it changes."""

    def __init__(
        self,
        api: Api,
        *,
        name: str,
        namespace: str,
        identity: str,
        clock: Clock,
        sleep: Sleep = asyncio.sleep,
        rng: random.Random,
        lease_s: float = LEASE_S,
        renew_deadline_s: float = RENEW_DEADLINE_S,
        retry_s: float = RETRY_S,
        on_change: Callable[[bool], None] = lambda _leading: None,
        utc_now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`utc_now` is for the times written for people to read. Raises ValueError for times that can't work."""
        if not lease_s > renew_deadline_s > retry_s * JITTER > 0 or lease_s < 1:
            raise ValueError(
                f"a lease of {lease_s:g} s needs a shorter renew deadline, and that more than {JITTER:g} times the time between tries"
            )
        if not identity:
            raise ValueError("an elector needs an identity")
        self.name, self.namespace, self.identity = name, namespace, identity
        self.leading = False
        self.holder = ""
        """Whom the lease was last seen to name; empty for nobody."""
        self.transitions_total = 0
        """How often this replica began or ceased to lead."""
        self.failures_total = 0
        """Tries that got no answer, or were refused."""
        self._api = api
        self._clock, self._sleep, self._rng = clock, sleep, rng
        self._lease_s, self._renew_deadline_s, self._retry_s = lease_s, renew_deadline_s, retry_s
        self._on_change, self._utc_now = on_change, utc_now
        self._leases = LEASES.format(namespace=namespace)
        self._turn = asyncio.Lock()
        self._closed = False
        self._lease: _Lease | None = None
        self._changed_s = clock.now_s()
        """When the record was first seen as it is now."""
        self._looked_s = clock.now_s()
        """When it was last read."""
        self._refused_s: float | None = None
        """Since when every try was refused."""
        self._verb = ""
        self._told = ""
        self._retry_after_s = 0.0

    async def run(self) -> None:
        """Until cancelled or released."""
        while not self._closed:
            try:
                await self.once()
            except Exception:  # noqa: BLE001 - a bug, or an answer nobody thought of: who leads goes on, and the process too
                _log.exception("the lease could not be looked after", extra={"fields": self._about(leading=self.leading)})
                self.failures_total += 1
                self._retry_after_s = self._lease_s
            await self._sleep(self.pause_s())

    def pause_s(self) -> float:
        """Until the next try: longer if the API server asked for it, but not so long that a leader's lease could run out meanwhile, nor
        longer than a lease lasts."""
        if self.leading:
            return max(self._retry_s, min(self._retry_after_s, self._renew_deadline_s / 2))
        return max(self._retry_s * (1.0 + JITTER * self._rng.random()), min(self._retry_after_s, self._lease_s))

    async def once(self) -> None:
        """Renew, take or look. Never raises for what the API server does or fails to do."""
        async with self._turn:
            if self._closed:
                return
            self._retry_after_s = 0.0
            try:
                await self._try()
            except ApiUnreachableError as error:
                self._not_reached(f"the API server can't be reached: {error}")
            except ApiError as error:
                self._retry_after_s = error.retry_after_s or 0.0
                if error.status in _NOT_REACHED or error.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                    self._not_reached(f"the API server answered {error.status} {error.reason}")
                elif error.status == HTTPStatus.CONFLICT:
                    self._refused_s = None  # another was faster; the next look shows who
                else:
                    self._refused(error)
            except UNREADABLE as error:
                self._not_reached(f"the lease can't be read: {error}")
            else:
                self._refused_s = None
                self._well()

    async def release(self) -> None:
        """Give the lease back, that another need not wait for its end, and stop for good. Does its best: what fails is left to run out.

        Cancel `run` first: a try that is under way is waited for.
        """
        async with self._turn:
            self._closed = True
            if self.leading:
                try:
                    async with asyncio.timeout(self._answer_s):
                        await self._give_back()
                except (ApiError, ApiUnreachableError, TimeoutError, *UNREADABLE) as error:
                    _log.warning("the lease could not be released; it runs out", extra={"fields": self._about(reason=str(error))})
                self._lead(leading=False, why="released")

    async def _give_back(self) -> None:
        for lease in (self._lease, None):
            at = lease or await self._get()
            if at is None or at.spec.holder_identity != self.identity:
                return
            now = _micro_time(self._utc_now())
            spec = _Spec("", RELEASED_S, now, now, at.spec.lease_transitions or 0)
            try:
                self._saw(await self._put(at, spec))
            except ApiError as error:
                if error.status != HTTPStatus.CONFLICT:
                    raise
            else:
                return

    async def _try(self) -> None:
        """One round. Raises what the API raises; then only what was seen until there counts."""
        refusal: ApiError | None = None
        if self.leading and self._ours(self._lease):
            assert self._lease is not None
            try:
                self._saw(await self._put(self._lease, self._renewed(self._lease.spec)))
            except ApiError as error:  # changed, gone or forbidden: look, and if it is only changed write once more
                if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR or error.status in _NOT_REACHED:
                    raise
                refusal = None if error.status in (HTTPStatus.CONFLICT, HTTPStatus.NOT_FOUND) else error
            else:
                return
        lease = await self._get()
        if lease is None:
            self._lease, self.holder = None, ""
            self._saw(await self._post())
            self._lead(leading=True, why="nobody held the lease: created it")
            return
        self._saw(lease)
        if self._ours(lease):
            self._refused_s = None
        elif self._held(lease.spec):
            self._lead(leading=False, why="another holds the lease")
            return
        if refusal is not None:
            self._lead(leading=self._ours(lease), why="may not write the lease, which is not ours any more")
            self._verb = "update"
            raise refusal
        why = "resumed" if self._ours(lease) else "took the lease"
        self._saw(await self._put(lease, self._renewed(lease.spec)))
        self._lead(leading=True, why=why)

    def _ours(self, lease: _Lease | None) -> bool:
        return lease is not None and lease.spec.holder_identity == self.identity

    def _held(self, spec: _Spec) -> bool:
        """Whether another holds the lease, as far as can be known here."""
        lasts_s = spec.lease_duration_seconds or self._lease_s
        return bool(spec.holder_identity) and self._clock.now_s() - self._changed_s < lasts_s

    def _saw(self, lease: _Lease) -> None:
        now_s = self._clock.now_s()
        blind = now_s - self._looked_s > self._renew_deadline_s
        if self._lease is None or lease.spec != self._lease.spec or (blind and not self._ours(lease)):
            self._changed_s = now_s
        self._lease = lease
        self._looked_s = now_s
        self.holder = lease.spec.holder_identity or ""

    def _renewed(self, was: _Spec) -> _Spec:
        """The record with us as holder, as client-go writes it: one more transition and a new time of acquisition if it was not ours."""
        now = _micro_time(self._utc_now())
        ours = was.holder_identity == self.identity
        transitions = was.lease_transitions or 0
        return _Spec(
            self.identity, int(self._lease_s), (was.acquire_time if ours else None) or now, now, transitions if ours else transitions + 1
        )

    async def _get(self) -> _Lease | None:
        self._verb = "get"
        try:
            return _lease(await self._api.get(f"{self._leases}/{self.name}", timeout_s=self._answer_s))
        except ApiError as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return None
            raise

    async def _post(self) -> _Lease:
        self._verb = "create"
        spec = self._renewed(_Spec(self.identity))  # the first holder is no transition
        metadata = {"name": self.name, "namespace": self.namespace}
        document = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
        return _lease(await self._api.post(self._leases, msgspec.json.encode(document), timeout_s=self._answer_s))

    async def _put(self, was: _Lease, spec: _Spec) -> _Lease:
        self._verb = "update"
        document = was.document | {"spec": (was.document.get("spec") or {}) | msgspec.to_builtins(spec)}
        return _lease(await self._api.put(f"{self._leases}/{self.name}", msgspec.json.encode(document), timeout_s=self._answer_s))

    @property
    def _answer_s(self) -> float:
        """For one answer: two in a row still leave the deadline."""
        return self._renew_deadline_s / 2

    def _lead(self, *, leading: bool, why: str) -> None:
        if leading == self.leading:
            return
        self.leading = leading
        self.transitions_total += 1
        _log.info("leading" if leading else "leading no more", extra={"fields": self._about(reason=why)})
        self._on_change(leading)

    def _not_reached(self, reason: str) -> None:
        """Nothing was learned about the lease: who leads goes on."""
        self._refused_s = None
        self._trouble("not reached", reason)

    def _refused(self, error: ApiError) -> None:
        now_s = self._clock.now_s()
        if self._refused_s is None:
            self._refused_s = now_s
        if error.status == HTTPStatus.FORBIDDEN:
            reason = f"RBAC: needs the verb {self._verb} on leases.coordination.k8s.io in namespace {self.namespace}"
        else:
            reason = f"the API server answered {error.status} {error.reason} to {self._verb}: {error.message}"
        self._trouble(f"{self._verb} {error.status}", reason)
        if now_s - self._refused_s >= self._renew_deadline_s:
            self._lead(leading=False, why="refused for the whole renew deadline")

    def _trouble(self, what: str, reason: str) -> None:
        """Said once, until it is over or something else is wrong."""
        self.failures_total += 1
        if what != self._told:
            self._told = what
            _log.warning("the lease can't be had or renewed", extra={"fields": self._about(reason=reason, leading=self.leading)})

    def _well(self) -> None:
        if self._told:
            self._told = ""
            _log.info("the lease can be had and renewed again", extra={"fields": self._about(leading=self.leading)})

    def _about(self, **more: object) -> Mapping[str, object]:
        return {"lease": f"{self.namespace}/{self.name}", "identity": self.identity, "holder": self.holder, **more}


def _lease(answer: bytes) -> _Lease:
    """Raises one of UNREADABLE."""
    document = msgspec.json.decode(answer, type=dict[str, Any])
    return _Lease(document, msgspec.convert(document.get("spec") or {}, _Spec))


def _micro_time(at: datetime) -> str:
    """Kubernetes' MicroTime: always six digits."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
