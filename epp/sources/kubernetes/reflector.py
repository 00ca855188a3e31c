"""Keeps a copy of one kind of Kubernetes object: list, watch, and list again when the watch can't go on.

- The list asks for the latest state (no resourceVersion), in pages. A cached answer (resourceVersion=0) would cost the server less, but may
  lie behind what was seen before, and bring back pods that are gone; lists are rare here, and pickers few.
- The watch goes on from the version of the last event or bookmark, also after it broke. It is ended by the server every 5 to 10 minutes,
  by us when nothing comes for longer than bookmarks are apart: a connection that died without a word.
- 410, as an HTTP status or in the stream, a line that is no event, an error nobody knows: list again. Until that list is whole the old
  copy stays, and then it is replaced at once, so that deletions nobody told of are seen.
- Nothing that fails empties the copy, nor do 404s, which a load balancer gives too: a kind that had objects is believed to be gone only
  when it was not found for a while and the server, asked what it has of that group, names others and not this one. A kind of the core is
  never absent.
- Every failure waits twice as long as the one before, up to `DELAY_MAX_S`, a random part less; a watch that held for a while starts anew.

Where there are several versions or groups of a kind, `kinds` names them in order; the first that the server has is used, and the better
ones are looked for again when a watch ends. One that was just installed and is still empty does not take the place of one with objects,
and one with objects is not left for a later because listing it is forbidden all at once.

Whatever else goes wrong, a bug here among it, is logged and tried again: the loss of the API server never stops routing.

Not here: what objects mean (objects), what follows from them (source). `changed` is called for each event that changes the copy, `seen`
whenever the server was heard; both must be cheap and may not wait. Cost: 15 µs a pod listed or changed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Generic, TypeVar

import msgspec

from epp.aio import Sleep
from epp.clock import Clock
from epp.errors import ConfigError
from epp.sources.kubernetes.api import UNREADABLE, Api, ApiError, ApiUnreachableError
from epp.sources.kubernetes.kinds import Kind, read_discovery, read_event, read_page, read_status
from epp.sources.kubernetes.objects import Key, Seen, read_head

PAGE = 500
"""Objects of one answer to a list."""
OBJECTS_MAX = 20_000
LIST_S = 60.0
"""Time limit of one page."""
WATCH_MIN_S, WATCH_MAX_S = 300, 600
SILENCE_S = 100.0
"""Bookmarks come about once a minute."""
RESYNC_S = 3_600.0
"""After that long the copy is listed anew, whatever the watch says."""
STEADY_S = 10.0
"""A watch that lasted that long was no failure."""
DELAY_MIN_S, DELAY_MAX_S = 0.2, 30.0
ABSENT_S = 180.0
"""Between looks for a kind that the server does not have; for one that had objects before, `DELAY_MAX_S`."""
ABSENT_BELIEVED_S = 30.0
"""A kind that had objects may be gone when it was not found for that long: a server that starts does not know all of its kinds at once."""
WATCH_RETRIES = 3
"""A watch a busy server refused that often is not tried again before a list."""
FAULTS_TOLD_MAX = 1_000
"""Faulty objects remembered, so that each version is told once."""

_BUSY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.GATEWAY_TIMEOUT)

_log = logging.getLogger(__name__)

T = TypeVar("T")


def _nothing() -> None:
    pass


class Reflector(Generic[T]):
    """A copy of the objects at `kinds`. `run` keeps it; `step` is one list and one watch, for as long as they go."""

    def __init__(
        self,
        api: Api,
        kinds: Sequence[Kind],
        *,
        clock: Clock,
        sleep: Sleep = asyncio.sleep,
        rng: random.Random,
        params: Mapping[str, str] | None = None,
        changed: Callable[[], None] = _nothing,
        seen: Callable[[], None] = _nothing,
        limit_hit: Callable[[str], None] = lambda _: None,
        namespace: str = "",
        objects_max: int = OBJECTS_MAX,
    ) -> None:
        """`params`: label and field selectors. `limit_hit`: told the name of a limit that was reached. `namespace`: for messages."""
        self.objects: dict[Key, T] = {}
        """Replaced or changed in place, between awaits."""
        self.synced = False
        """It was listed once, or is known to be absent."""
        self.absent = False
        """The server does not have this kind."""
        self.kind = kinds[0]
        """The one in use, or looked for last."""
        self.as_of_s = float("-inf")
        """When the server last said something: a list, the start of a watch, an event, a bookmark."""
        self.listed_by: Mapping[str, str] | None = None
        """The selectors by which the copy was listed."""
        self.events_total = self.relists_total = self.errors_total = 0
        self._api = api
        self._kinds = kinds
        self._clock = clock
        self._sleep = sleep
        self._rng = rng
        self._params = dict(params or {})
        self._changed = changed
        self._seen = seen
        self._limit_hit = limit_hit
        self._namespace = namespace
        self._objects_max = objects_max
        self._version = ""
        """Where the watch goes on; empty: list first."""
        self._listed_at_s = float("-inf")
        self._failures = 0
        """In a row."""
        self._not_found_since_s = float("inf")
        self._lost = False
        """It had objects before it was absent."""
        self._asked = self.kind
        self._told = self._said = ""
        """What was told last; told once."""
        self._faults_told: set[tuple[Key, str]] = set()

    def __repr__(self) -> str:
        return f"<Reflector {self.kind.name} objects={len(self.objects)} synced={self.synced} failures={self._failures}>"

    async def run(self) -> None:
        """Until cancelled; may be run again after that."""
        while True:
            try:
                delay_s = await self.step()
            except Exception:  # noqa: BLE001 - a bug, or an answer nobody thought of, costs a new list, never the process
                _log.exception("watching Kubernetes failed unexpectedly; the last view stays", extra={"fields": {"kind": self._asked.name}})
                self.errors_total += 1
                self._version = ""
                delay_s = self._delay_s()
            if delay_s:
                await self._sleep(delay_s)

    def use(self, params: Mapping[str, str]) -> None:
        """Other selectors from the next step on; the copy stays until it is listed by them. Not while `run` is running."""
        self._params = dict(params)
        self._version = ""
        self._failures = 0

    async def step(self) -> float:
        """List if there is need to, then watch until that ends. Returns how long to wait before the next."""
        started_s = self._clock.now_s()
        try:
            if not self._version:
                await self._relist()
                if self.absent:
                    return self._less_a_part(DELAY_MAX_S if self._lost else ABSENT_S)
                started_s = self._clock.now_s()
            await self._watch()
        except ApiError as error:
            return self._failed(error, started_s)
        except ApiUnreachableError as error:
            return self._failed(error, started_s)
        if self.kind is not self._kinds[0] or self._clock.now_s() - self._listed_at_s >= RESYNC_S:
            self._version = ""
        if self._clock.now_s() - started_s >= STEADY_S:
            self._failures = 0
            return 0.0
        return self._delay_s()  # a server that ends watches at once is not to be asked without end

    async def _relist(self) -> None:
        refused: dict[Kind, ApiError] = {}
        empty: dict[Kind, str] = {}
        for place, kind in enumerate(self._kinds):
            self._asked = kind
            try:
                objects, version = await self._listed(kind)
            except ApiError as error:
                if not await self._passed_over(kind, error):
                    raise
                if error.status == HTTPStatus.FORBIDDEN:
                    refused[kind] = error
                continue
            if not objects and self.objects and self.kind in self._kinds[place + 1 :]:
                empty[kind] = version  # it may have been installed just now
            elif objects or not empty:
                reasons = [self._refused(failure, "list", other) for other, failure in refused.items()]
                reasons += [f"there is nothing in {other.name} yet" for other in empty]
                if reasons:
                    self._say(f"{'; '.join(reasons)}; {kind.name} is used")
                self._take(kind, objects, version)
                return
        if empty:
            kind = next(iter(empty))
            self._take(kind, {}, empty[kind])
        elif refused:
            self._asked = next(iter(refused))
            raise refused[self._asked]
        else:
            self._take(self._kinds[0], {}, "", absent=True)

    async def _passed_over(self, kind: Kind, error: ApiError) -> bool:
        """Whether what the server said of this kind leaves it to the next."""
        held = kind is self.kind and bool(self.objects)
        if error.status == HTTPStatus.FORBIDDEN:  # where the kind is absent, too, if no Role names it
            return not held
        if error.status != HTTPStatus.NOT_FOUND or not kind.version:
            return False
        if not held:
            return True
        self._not_found_since_s = min(self._not_found_since_s, self._clock.now_s())
        if self._clock.now_s() - self._not_found_since_s < ABSENT_BELIEVED_S:
            return False
        try:
            return read_discovery(await self._api.get(f"/apis/{kind.version}", timeout_s=LIST_S)).lacks(kind)
        except (ApiError, ApiUnreachableError, *UNREADABLE):
            return False

    async def _listed(self, kind: Kind) -> tuple[dict[Key, T], str]:
        objects: dict[Key, T] = {}
        params = {**self._params, "limit": str(PAGE)}
        while True:
            try:
                page = read_page(await self._api.get(kind.path, params, timeout_s=LIST_S))
            except UNREADABLE as error:
                raise ApiError(HTTPStatus.BAD_GATEWAY, "NotAList", f"the answer is no list: {error}") from None
            if not page.meta.version:
                raise ApiError(HTTPStatus.BAD_GATEWAY, "NotAList", "the answer has no resourceVersion")
            for raw in page.items or ():
                seen = self._read(kind, raw)
                if seen is not None:
                    objects[seen.key] = seen.value
            if len(objects) > self._objects_max:
                self._limit_hit("kubernetes_objects")
                raise ApiError(
                    HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "TooMany", f"more than {self._objects_max} objects; the view there was stays"
                )
            if not page.meta.next:
                return objects, page.meta.version
            params["continue"] = page.meta.next

    def _take(self, kind: Kind, objects: dict[Key, T], version: str, *, absent: bool = False) -> None:
        old, news = self.objects, not self.synced or kind is not self.kind or absent is not self.absent
        for key, value in objects.items():
            if key in old and old[key] == value:  # what is the same stays the same object: cheap to see
                objects[key] = old[key]
        if absent and not self.absent:
            names = " nor ".join(each.name for each in self._kinds)
            _log.warning("the API server has no %s; they are looked for again every few minutes", names)
        elif kind is not self.kind or (self.absent and not absent):
            _log.info("watching %s", kind.name, extra={"fields": {"namespace": self._namespace}})
        self._lost = absent and (self._lost or bool(old))
        self.kind, self.objects, self._version, self.absent = kind, objects, version, absent
        self.synced, self.listed_by = True, self._params
        self.relists_total += 1
        self._listed_at_s = self._clock.now_s()
        self._not_found_since_s = float("inf")
        self._heard()
        if news or objects != old:
            self._changed()

    async def _watch(self) -> None:
        seconds = self._rng.randint(WATCH_MIN_S, WATCH_MAX_S)
        self._asked = self.kind
        params = {**self._params, "resourceVersion": self._version, "allowWatchBookmarks": "true", "timeoutSeconds": str(seconds)}
        async with self._api.watch(self.kind.path, params, silence_s=SILENCE_S) as lines:
            self._heard()
            self._well()
            async for line in lines:
                if line:
                    self._one(line)

    def _one(self, line: bytes) -> None:
        """One event. Raises ApiError where the watch can't go on."""
        try:
            event = read_event(line)
            if event.type == "ERROR":
                status = read_status(event.object)
                raise ApiError(status.code, status.reason or "Unknown", status.message)
            if event.type == "BOOKMARK":
                self._version = read_head(event.object).version or self._version
                self._heard()
                return
            head = read_head(event.object) if event.type == "DELETED" else None
            seen = head or self._read(self.kind, event.object) or read_head(event.object)
        except UNREADABLE:
            raise ApiError(HTTPStatus.BAD_GATEWAY, "NotAnEvent", "a line of a watch is no event") from None
        self._version = seen.version or self._version
        self.events_total += 1
        self._heard()
        self._put(seen.key, seen.value)

    def _put(self, key: Key, value: T | None) -> None:
        """None: it is gone, or not to be used as it is."""
        if value is None:
            if self.objects.pop(key, None) is not None:
                self._changed()
        elif self.objects.get(key) != value:
            if key not in self.objects and len(self.objects) >= self._objects_max:
                self._limit_hit("kubernetes_objects")
                self._tell(f"more than {self._objects_max} objects; what comes is left out")
                return
            self.objects[key] = value
            self._changed()

    def _read(self, kind: Kind, raw: msgspec.Raw) -> Seen | None:
        """None, and a line of log, for an object with a fault: it is left out, the others are not."""
        try:
            return kind.read(raw)
        except (*UNREADABLE, ConfigError) as error:
            why = "; ".join(map(str, error.problems)) if isinstance(error, ConfigError) else str(error)
        with contextlib.suppress(*UNREADABLE):
            head = read_head(raw)
            if (head.key, head.version) in self._faults_told:
                return None
            if len(self._faults_told) >= FAULTS_TOLD_MAX:
                self._faults_told.clear()
            self._faults_told.add((head.key, head.version))
            _log.warning(
                "an object of Kubernetes can't be used",
                extra={"fields": {"kind": kind.name, "object": "/".join(head.key), "problems": why}},
            )
        return None

    def _heard(self) -> None:
        self.as_of_s = self._clock.now_s()
        self._seen()

    def _failed(self, error: ApiError | ApiUnreachableError, started_s: float) -> float:
        steady = self._clock.now_s() - started_s >= STEADY_S
        if steady:
            self._failures = 0
        retry_after_s = 0.0
        ordinary = steady  # in the life of a watch: a connection that ends, a version too old
        why = str(error)
        if isinstance(error, ApiError):
            ordinary = error.status == HTTPStatus.GONE
            if error.status == HTTPStatus.FORBIDDEN:
                why = self._refused(error, "watch" if self._version else "list", self._asked)
            if error.status not in _BUSY or self._failures >= WATCH_RETRIES:  # also where watching is forbidden and listing is not
                self._version = ""
            retry_after_s = error.retry_after_s or 0.0
        self.errors_total += not ordinary
        if not ordinary:
            self._tell(why)
        return max(self._delay_s(), min(retry_after_s, DELAY_MAX_S))

    def _refused(self, error: ApiError, verb: str, kind: Kind) -> str:
        where = f"in the namespace {self._namespace}" if self._namespace else "in the cluster"
        return f"not allowed to {verb} {kind.name} {where}: a Role must allow get, list and watch on it ({error.message})"

    def _tell(self, why: str) -> None:
        if why != self._told:
            _log.warning(
                "watching Kubernetes fails; the last view stays and it is tried again",
                extra={"fields": {"kind": self._asked.name, "reason": why}},
            )
        self._told = why

    def _say(self, why: str) -> None:
        if why != self._said:
            _log.warning(why)
        self._said = why

    def _well(self) -> None:
        if self._told:
            _log.info("watching Kubernetes works again", extra={"fields": {"kind": self.kind.name}})
        self._told = ""

    def _delay_s(self) -> float:
        delay_s = min(DELAY_MAX_S, DELAY_MIN_S * 2.0 ** min(self._failures, 16))
        self._failures += 1
        return self._less_a_part(delay_s)

    def _less_a_part(self, delay_s: float) -> float:
        return delay_s * (0.5 + self._rng.random() / 2)
