"""Requests wait here for their tokens, where a configuration wants exact ones: before they are queued, and before they are decided.

A request never fails for this: without tokens in time it goes on with the estimate, and why is counted. `use` takes a configuration at any
time; what a new one has to load is loaded in a thread, and what was in service stays until then. `run` is what tasks and connections live
in: before it nothing is tokenized. Not here: how tokens are found (local, remote).

Cost: 2 µs for a request with nothing to tokenize, 15 µs for one that waits, besides what finds its tokens.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from epp.arrival import Arrival, Stage
from epp.clock import Clock
from epp.engines.access import FetchOptions
from epp.errors import EppError, StartError
from epp.plugins.base import Plugin
from epp.plugins.producers.token import EngineConfig, Exact, LocalConfig, TokenProducer
from epp.tokenize.backend import FULL, TIMEOUT, TOO_LONG, Ask, Backend, Started
from epp.tokenize.cache import PieceCache
from epp.tokenize.post import Poster
from epp.tokenize.prompts import kind_of
from epp.tokenize.questions import Questions, Render, Tokenize
from epp.tokenize.remote import Remote
from epp.tokenize.tokens import Tokens, put
from epp.types import Endpoint

EXACT, CANCELLED = "exact", "cancelled"
NO_TOKENIZER, NOTHING = "no_tokenizer", "nothing_to_tokenize"
"""Told to those who only ask."""
LIMITS = {TIMEOUT: "tokenize_time", FULL: "tokenize_queue", TOO_LONG: "tokenize_bytes"}
"""Outcome -> the limit that was hit."""

_log = logging.getLogger(__name__)


class Timer(Protocol):
    def cancel(self) -> None: ...


CallLater = Callable[[float, Callable[[], None]], Timer]
Wanted = tuple[Exact, str]
"""How, and the producer's modelName."""


def _call_later(delay_s: float, callback: Callable[[], None]) -> Timer:
    return asyncio.get_running_loop().call_later(delay_s, callback)


class TokenStage:
    """See the module; a Stage of arrivals."""

    def __init__(
        self,
        clock: Clock,
        endpoints: Callable[[str], Sequence[Endpoint]],
        *,
        limit_hit: Callable[[str], None] = lambda _name: None,
        waited: Callable[[float], None] = lambda _seconds: None,
        call_later: CallLater = _call_later,
    ) -> None:
        """`endpoints`: those that are ready in the pool of that name. `waited` is told how long each request was held."""
        self._clock = clock
        self._endpoints = endpoints
        self._limit_hit = limit_hit
        self._waited = waited
        self._call_later = call_later
        self._secret = secrets.token_bytes(32)
        self._tasks: asyncio.TaskGroup | None = None
        self._wanted: Wanted | None = None
        self._in_service: Wanted | None = None
        self._backend: Backend | None = None
        self._poster: Poster | None = None
        self.waiting = 0
        self.outcomes: Counter[str] = Counter()
        """`exact`, `cancelled`, or why the estimate stayed."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Itself, if there is anything to do."""
        return (self,) if self._wanted is not None else ()

    def use(self, plugins: Iterable[Plugin]) -> None:
        """The first token-producer that wants exact tokens counts. Before `run`, raises ValueError and StartError for what can't
        be used, and changes nothing; while it runs, that is said in the log, and what was in service stays.
        """
        wanted = [(each.exact, each.model_name) for each in plugins if isinstance(each, TokenProducer) and each.exact is not None]
        if len(wanted) > 1:
            _log.warning("more than one token-producer wants exact tokens: the first one counts")
        first = wanted[0] if wanted else None
        if first == self._wanted:
            return
        if self._tasks is None:
            self._take(*self._made(first))
            self._wanted = self._in_service = first
        else:
            self._wanted = first
            self._spawn(partial(self._change, first))

    async def run(self) -> None:
        """Until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                await asyncio.Event().wait()
        finally:
            self._tasks = None
            poster = self._take(None, None)
            if poster is not None:
                await poster.close()

    def begin(self, arrival: Arrival) -> _Wait | None:
        return self._begin(arrival, self)

    def inquire(self, arrival: Arrival, told: Callable[[str], None]) -> _Wait | None:
        """As `begin`, for a request that is only asked about: nothing is counted, but a cache of tokens may be filled.

        `told`: the outcome, once, before the wait is over, or before this returns None.
        """
        if self._backend is None or self._tasks is None:
            told(NO_TOKENIZER)
            return None
        return self._begin(arrival, _Inquired(told))

    def _begin(self, arrival: Arrival, book: TokenStage | _Inquired) -> _Wait | None:
        """`book`: who notes what becomes of it."""
        backend = self._backend
        if backend is None or self._tasks is None:
            return None
        kind = kind_of(arrival)
        if not kind or arrival.body is None:
            book.passed()
            return None
        request = arrival.request
        ask = Ask(kind, arrival.body, request.target_model or request.model, request.media, request.pool)
        wait = _Wait(book, arrival)
        started = backend.start(ask, wait.finish)
        if isinstance(started, str | Tokens):
            book.settle(arrival, started)
            return None
        book.began()
        wait.begun(started, self._clock.now_s(), self._call_later(backend.timeout_s(ask), wait.expire))
        return wait

    def state(self) -> Mapping[str, Any]:
        """For a debugging page: nothing of any prompt."""
        cache: PieceCache | None = getattr(self._backend, "cache", None)
        held = {} if cache is None else {"cache_bytes": cache.bytes, "cache_hits": cache.hits_total, "cache_misses": cache.misses_total}
        return {"waiting": self.waiting, "outcomes": dict(self.outcomes), **held}

    # What waits calls these.

    def passed(self) -> None:
        """Nothing to tokenize."""

    def began(self) -> None:
        self.waiting += 1

    def left(self) -> None:
        self.outcomes[CANCELLED] += 1

    def settle(self, arrival: Arrival, result: Tokens | str) -> None:
        if isinstance(result, Tokens):
            put(arrival.request, result)
            result = EXACT
        elif result in LIMITS:
            self._limit_hit(LIMITS[result])
        self.outcomes[result] += 1

    def over(self, begun_s: float) -> None:
        self.waiting -= 1
        self._waited(self._clock.now_s() - begun_s)

    async def _change(self, wanted: Wanted | None) -> None:
        try:
            made = await asyncio.to_thread(self._made, wanted)
        except (ValueError, StartError) as error:
            if wanted is self._wanted:
                self._wanted = self._in_service  # asked for again, it is tried again
            _log.warning("the new tokenizers can't be used; the old ones stay", extra={"fields": {"reason": str(error)}})
            return
        if wanted is self._wanted:  # no newer configuration came meanwhile
            old, self._in_service = self._take(*made), wanted
            if old is not None:
                await old.close()

    def _take(self, backend: Backend | None, poster: Poster | None) -> Poster | None:
        """The poster before."""
        if self._backend is not None:
            self._backend.close()
        self._backend = backend
        old, self._poster = self._poster, poster
        return old

    def _made(self, wanted: Wanted | None) -> tuple[Backend | None, Poster | None]:
        if wanted is None:
            return None, None
        exact, model_name = wanted
        if isinstance(exact, LocalConfig):
            return self._local(exact), None
        questions: Questions
        if isinstance(exact, EngineConfig):
            questions = Tokenize(exact, self._endpoints)
            options = FetchOptions(
                scheme=exact.scheme,
                ca_path=exact.ca_cert_path,
                insecure_skip_verify=exact.insecure_skip_verify,
                bearer_token_file=exact.bearer_token_file,
            )
        else:
            questions = Render(exact, model_name)
            options = FetchOptions(
                scheme=exact.url.partition(":")[0],
                ca_path=exact.ca_cert_path,
                insecure_skip_verify=exact.insecure_skip_verify,
                client_cert_path=exact.client_cert_path,
                client_key_path=exact.client_key_path,
            )
        poster = Poster(options, exact.in_flight_max)
        cache = PieceCache(exact.cache_bytes_max, self._secret)
        return Remote(questions, poster, self._clock, self._spawn, in_flight_max=exact.in_flight_max, cache=cache), poster

    def _local(self, exact: LocalConfig) -> Backend:
        try:
            from epp.tokenize.local import Local  # noqa: PLC0415 - an optional part
        except ImportError as error:
            raise ValueError(
                f"token-producer: local needs the package's extra `tokenize`: pip install 'envoy-endpoint-picker[tokenize]' ({error.name} is not installed)"
            ) from None
        try:
            return Local(exact, self._clock, self._secret)
        except ValueError as error:
            raise ValueError(f"token-producer: local: {error}") from None

    def _spawn(self, work: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
        assert self._tasks is not None
        return self._tasks.create_task(_guarded(work))


async def _guarded(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """A fault in here costs one request its exact tokens, not the picker its life."""
    try:
        await work()
    except Exception as error:  # noqa: BLE001 - see above
        _log.error("tokenizing failed", extra={"fields": {"error": type(error).__name__}})


class _Inquired:
    """In the stage's place for a request that is only asked about: tells, and counts nothing."""

    def __init__(self, told: Callable[[str], None]) -> None:
        self._told = told

    def passed(self) -> None:
        self._told(NOTHING)

    def settle(self, arrival: Arrival, result: Tokens | str) -> None:
        if isinstance(result, Tokens):
            put(arrival.request, result)
            result = EXACT
        self._told(result)

    def began(self) -> None: ...

    def left(self) -> None: ...

    def over(self, begun_s: float) -> None: ...


class _Wait:
    """One request's wait."""

    __slots__ = ("_arrival", "_begun_s", "_book", "_over", "_started", "_timer", "error")

    def __init__(self, book: TokenStage | _Inquired, arrival: Arrival) -> None:
        self.error: EppError | None = None
        self._book = book
        self._arrival = arrival
        self._over = False
        self._begun_s = 0.0
        self._started: Started | None = None
        self._timer: Timer | None = None

    def begun(self, started: Started, now_s: float, timer: Timer) -> None:
        self._started, self._begun_s, self._timer = started, now_s, timer

    def finish(self, result: Tokens | str) -> None:
        """Called by what finds the tokens."""
        if self._end():
            self._book.settle(self._arrival, result)
            self._arrival.wake()

    def expire(self) -> None:
        if self._end():
            self._abandon()
            self._book.settle(self._arrival, TIMEOUT)
            self._arrival.wake()

    def cancel(self) -> None:
        if self._end():
            self._abandon()
            self._book.left()

    def _end(self) -> bool:
        if self._over:
            return False
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
        self._book.over(self._begun_s)
        return True

    def _abandon(self) -> None:
        if self._started is not None:
            self._started.abandon()
