"""Reads every endpoint's `/metrics`, each at its own pace, and keeps its load and health up to date.

One task per endpoint, so that a slow engine never delays another.

Pace: busy endpoints are asked every `interval_min_s`, idle ones ever less often, down to `INTERVAL_MAX_S`; between two readings our own
accounting carries the truth. Reading the busy ones may take `CORES_MAX` of a core: where it would take more (more than 57 endpoints of
60 KB each), all of them are asked as much less often; for the idle ones, `IDLE_SHARE` of that. A rest is never shorter than the last
answer took: an engine struggling to answer is not asked all the time.

Health: an endpoint nobody listens at, or whose engine sleeps, is failing at once; one that times out or answers with an error after
`FAILURES_MAX` in a row. Failing endpoints are asked ever less often too, so they return quickly; one reading makes them healthy.

An endpoint that answers, but with nothing we can read load from, is healthy and without metrics: routed by our own count of its
requests, asked once a second. One that gave readings before is believed only after `FAILURES_MAX` such answers.

Not here: which family an engine is of (reader), HTTP (fetch), metric names (vllm and its neighbours).
Cost of a scrape of 60 KB: 170 µs of CPU, of which the reading is half.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable

from epp.aio import Sleep
from epp.clock import Clock
from epp.datastore import Datastore
from epp.engines.access import FetchOptions
from epp.engines.family import AsleepError, EngineFamily
from epp.engines.fetch import Fetcher, FetchError, UnreachableError
from epp.engines.follow import Following
from epp.engines.reader import Reader, Source, WithoutMetricsError
from epp.types import Endpoint

INTERVAL_MIN_S = 0.05
"""`--refresh-metrics-interval`."""
INTERVAL_MAX_S = 1.0
FAILURES_MAX = 3
"""Failures in a row after which an endpoint is unhealthy, where one alone proves nothing."""
JITTER = 0.1
"""Share of the interval by which it varies either way, so that scrapes don't fall into step."""
CORES_MAX = 0.2
"""Of one core, for reading the busy endpoints, by the estimate below."""
IDLE_SHARE = 0.25
"""Of that, for the idle ones on top."""
SCRAPE_COST_S = 60e-6
BYTE_COST_S = 1.9e-9
"""CPU of one scrape (174 µs for 60 KB). A slower machine spends more than `CORES_MAX`, in proportion."""
TLS_BYTE_COST_S = 0.8e-9
"""On top, for https."""

_log = logging.getLogger(__name__)


class _Followed:
    """What the scraper keeps for one endpoint."""

    __slots__ = ("busy", "cost_s", "interval_s", "picks_seen", "read", "source", "told")

    def __init__(self, interval_s: float) -> None:
        self.interval_s = interval_s
        """Until the next scrape."""
        self.picks_seen = 0
        self.busy = False
        self.cost_s = 0.0
        """Of one reading, as it counts in the scraper's sums."""
        self.source = Source()
        self.read = False
        """It has given a reading since it was last without metrics."""
        self.told = False


class Scraper:
    """See the module. `run` it once; endpoints are followed through the datastore from then on."""

    def __init__(
        self,
        datastore: Datastore,
        fetcher: Fetcher,
        *,
        families: Callable[[Endpoint, bytes], EngineFamily | None],
        clock: Clock,
        rng: random.Random,
        paths: Callable[[Endpoint], Iterable[str]] | None = None,
        options: FetchOptions | None = None,
        on_restart: Callable[[Endpoint], None] | None = None,
        interval_min_s: float = INTERVAL_MIN_S,
        interval_max_s: float = INTERVAL_MAX_S,
        failures_max: int = FAILURES_MAX,
        cores_max: float = CORES_MAX,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        """`families` finds the family an answer is of; `paths`: where to ask an endpoint first, if its labels tell.

        `on_restart`: the engine was restarted, or another took its address; what was cached there is gone.
        """
        self.poll_errors_total = 0
        self.polls_total = 0
        self.restarts_total = 0
        self._datastore = datastore
        options = options or FetchOptions()
        self._reader = Reader(fetcher, families, paths, options)
        self._byte_cost_s = BYTE_COST_S + (TLS_BYTE_COST_S if options.scheme == "https" else 0.0)
        self._clock = clock
        self._rng = rng
        self._on_restart = on_restart
        self._interval_min_s = interval_min_s
        self._interval_max_s = max(interval_min_s, interval_max_s)
        self._failures_max = failures_max
        self._cores_max = cores_max
        self._sleep = sleep
        self._busy_cost_s = 0.0
        """Of reading every busy endpoint once."""
        self._idle_cost_s = 0.0
        self._followed: dict[Endpoint, _Followed] = {}
        datastore.subscribe(added=self._added, removed=self._removed)
        self._following = Following(datastore, self._follow, "scrape")

    @property
    def following(self) -> int:
        """Endpoints with a task of their own."""
        return len(self._following)

    @property
    def without_metrics(self) -> int:
        """Endpoints that answer but tell no load."""
        return sum(followed.source.without for followed in self._followed.values())

    @property
    def interval_s(self) -> float:
        """Between two readings of a busy endpoint, as of now."""
        return max(self._interval_min_s, self._busy_cost_s / self._cores_max)

    def engine(self, endpoint: Endpoint) -> str:
        """The family it was last read as; empty while there is none."""
        followed = self._followed.get(endpoint)
        return followed.source.engine if followed is not None and not followed.source.without else ""

    async def run(self) -> None:
        """Until cancelled."""
        await self._following.run()

    async def first_round(self, timeout_s: float) -> int:
        """Ask every endpoint once, all together, so that serving starts with knowledge. Returns how many answered in time."""
        tasks: list[asyncio.Task[bool]] = []
        try:
            async with asyncio.timeout(timeout_s), asyncio.TaskGroup() as group:
                tasks += [group.create_task(self.once(endpoint)) for endpoint in self._datastore.endpoints.values()]
        except TimeoutError:
            _log.warning("some endpoints did not answer the first scrape", extra={"fields": {"timeout_s": timeout_s}})
        return sum(task.result() for task in tasks if not task.cancelled())

    async def once(self, endpoint: Endpoint) -> bool:
        """One scrape, accounted for. True if the endpoint answered."""
        followed = self._followed.get(endpoint) or _Followed(self._interval_min_s)
        sent_requests, sent_tokens = endpoint.sent_requests, endpoint.sent_tokens
        self.polls_total += 1
        try:
            reading = await self._reader.read(endpoint, followed.source)
        except WithoutMetricsError as error:
            return self._answered_without(endpoint, followed, error)
        except (UnreachableError, AsleepError) as error:
            self._failed(endpoint, error, certain=True)
            return False
        except FetchError as error:
            self._failed(endpoint, error, certain=False)
            return False
        followed.read = True
        if followed.source.replaced:
            self._restarted(endpoint)
        self._say_if_back(endpoint)
        self._datastore.record_reading(endpoint, reading, sent_requests=sent_requests, sent_tokens=sent_tokens)
        return True

    def rest_s(self, endpoint: Endpoint, *, answered: bool, took_s: float) -> float:
        """How long to wait before the next scrape of this endpoint; moves its pace."""
        followed = self._followed[endpoint]
        without = followed.source.without
        busy = answered and not without and (endpoint.inflight_requests > 0 or endpoint.picks_total != followed.picks_seen)
        followed.picks_seen = endpoint.picks_total
        self._count(followed, busy=busy)
        longest_s = max(self._interval_max_s, self.interval_s if busy else self._idle_cost_s / (self._cores_max * IDLE_SHARE))
        if busy:
            followed.interval_s = self.interval_s
        elif without:
            followed.interval_s = longest_s
        rest_s = max(followed.interval_s, took_s)
        if not busy:
            followed.interval_s = min(2 * followed.interval_s, longest_s)
        return min(rest_s * self._rng.uniform(1 - JITTER, 1 + JITTER), longest_s)

    async def _follow(self, endpoint: Endpoint) -> None:
        if self._datastore.staleness_s(endpoint) < self._interval_max_s:  # read in the first round, at the same moment as all others
            await self._sleep(self._rng.uniform(0, self._followed[endpoint].interval_s))
        while True:
            asked_s = self._clock.now_s()
            answered = await self.once(endpoint)
            await self._sleep(self.rest_s(endpoint, answered=answered, took_s=self._clock.now_s() - asked_s))

    def _answered_without(self, endpoint: Endpoint, followed: _Followed, error: Exception) -> bool:
        if followed.read and endpoint.scrape_failures + 1 < self._failures_max:
            self._failed(endpoint, error, certain=False)
            return False
        followed.read, followed.source.without = False, True
        if not followed.told:
            followed.told = True
            fields = {"endpoint": endpoint.name, "address": endpoint.destination, "reason": str(error)}
            _log.info("endpoint has no metrics we know: it is routed by our own count of its requests", extra={"fields": fields})
        self._say_if_back(endpoint)
        self._datastore.record_answer(endpoint)
        return True

    def _failed(self, endpoint: Endpoint, error: Exception, *, certain: bool) -> None:
        self.poll_errors_total += 1
        endpoint.scrape_failures += 1
        self._datastore.record_silence(endpoint)
        if endpoint.healthy and (certain or endpoint.scrape_failures >= self._failures_max):
            fields = {"endpoint": endpoint.name, "address": endpoint.destination, "error": str(error), "failures": endpoint.scrape_failures}
            _log.warning("endpoint is failing", extra={"fields": fields})
            self._datastore.set_healthy(endpoint, healthy=False)

    def _restarted(self, endpoint: Endpoint) -> None:
        self.restarts_total += 1
        _log.info(
            "engine was restarted: its cache is empty", extra={"fields": {"endpoint": endpoint.name, "address": endpoint.destination}}
        )
        if self._on_restart is not None:
            self._on_restart(endpoint)

    def _say_if_back(self, endpoint: Endpoint) -> None:
        if not endpoint.healthy:
            _log.info("endpoint is back", extra={"fields": {"endpoint": endpoint.name, "address": endpoint.destination}})

    def _count(self, followed: _Followed, *, busy: bool) -> None:
        """Bring the sums of costs up to date."""
        self._uncount(followed)
        followed.busy = busy
        followed.cost_s = SCRAPE_COST_S + self._byte_cost_s * followed.source.bytes
        if busy:
            self._busy_cost_s += followed.cost_s
        else:
            self._idle_cost_s += followed.cost_s

    def _uncount(self, followed: _Followed) -> None:
        if followed.busy:
            self._busy_cost_s -= followed.cost_s
        else:
            self._idle_cost_s -= followed.cost_s

    def _added(self, endpoint: Endpoint) -> None:
        followed = self._followed[endpoint] = _Followed(self._interval_min_s)
        self._count(followed, busy=False)
        followed.interval_s = max(self._interval_min_s, self._idle_cost_s / self._cores_max)

    def _removed(self, endpoint: Endpoint) -> None:
        self._uncount(self._followed.pop(endpoint))
