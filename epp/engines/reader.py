"""One look at one engine: where to ask, of which family the answer is, what it says.

The family found is kept until a reading fails, then found anew: another engine may have taken the address. While unknown, path after
path is asked; when all were in vain, one path a time. Not here: HTTP (fetch), metric names (vllm and its neighbours), when to ask and what
becomes of it (scraper).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from epp.datastore import Reading
from epp.engines.access import FetchOptions
from epp.engines.family import AsleepError, EngineFamily, ReadingError
from epp.engines.fetch import Fetcher, StatusError
from epp.types import Endpoint, EndpointSpec

PATHS = ("/metrics", "/v1/metrics", "/prometheus/metrics")
"""Where the known families have their metrics, the likeliest first."""
UNREAD_BYTES = 60_000
"""What an answer not seen yet is taken for."""
STARTED_SLACK_S = 1.0
"""A process that started so much later than the last one is another process."""


class WithoutMetricsError(Exception):
    """The endpoint answers, but with nothing we can read load from."""


class Source:
    """What is known of one endpoint's metrics."""

    __slots__ = ("bytes", "engine", "family", "path", "prefix_queries", "replaced", "spec", "started_s", "turn", "url", "without")

    def __init__(self) -> None:
        self.family: EngineFamily | None = None
        self.engine = ""
        """The last known family's name."""
        self.bytes = UNREAD_BYTES
        """Of the last answer."""
        self.without = False
        """All paths were in vain."""
        self.replaced = False
        """The last reading was of another engine than the one before, or of the same engine started anew: nothing is cached there."""
        self.path = ""
        """Where the last reading was found."""
        self.url = ""
        """Of `path` at `spec`."""
        self.spec: EndpointSpec | None = None
        self.turn = 0
        self.started_s: float | None = None
        self.prefix_queries: float | None = None

    def compare(self, reading: Reading, family: EngineFamily) -> None:
        """Is it still the engine it was? Its process began later than the one we knew, its counters fell, or it is of another family."""
        started_s, queries = self.started_s, self.prefix_queries
        other = self.engine not in {"", family.name}
        later = started_s is not None and reading.started_s is not None and reading.started_s > started_s + STARTED_SLACK_S
        fell = queries is not None and reading.prefix_queries is not None and reading.prefix_queries < queries
        self.replaced = other or later or fell
        self.engine = family.name
        if reading.started_s is not None:  # the latest: processes that answer in turn are no restart each time
            self.started_s = reading.started_s if started_s is None or other else max(started_s, reading.started_s)
        if reading.prefix_queries is not None:
            self.prefix_queries = reading.prefix_queries


class Reader:
    """Makes Readings of what endpoints answer."""

    def __init__(
        self,
        fetcher: Fetcher,
        families: Callable[[Endpoint, bytes], EngineFamily | None],
        paths: Callable[[Endpoint], Iterable[str]] | None,
        options: FetchOptions,
    ) -> None:
        """`families` finds the family an answer is of; `paths`: where to ask an endpoint first, if its labels tell."""
        self._fetcher = fetcher
        self._families = families
        self._paths = paths or (lambda _endpoint: ())
        self._options = options

    async def read(self, endpoint: Endpoint, source: Source) -> Reading:
        """Raises FetchError, AsleepError, WithoutMetricsError."""
        family = source.family
        if family is not None:
            if source.spec is not endpoint.spec:
                source.spec, source.url = endpoint.spec, self._url(endpoint, source.path)
            try:
                text = await self._fetcher.fetch(source.url)
                source.bytes = len(text)
                reading = family.read(text)
            except AsleepError:
                raise
            except ReadingError:
                source.family = None
            except StatusError as error:
                if not error.nothing_there:
                    raise
                source.family = None
            else:
                source.compare(reading, family)
                return reading
        return await self._find(endpoint, source)

    async def _find(self, endpoint: Endpoint, source: Source) -> Reading:
        """Ask path after path until an answer tells a load."""
        paths = self._candidates(endpoint, source)
        if source.without:
            source.turn += 1
            paths = [paths[source.turn % len(paths)]]
        reasons: list[str] = []
        for path in paths:  # grows on the way
            try:
                text = await self._fetcher.fetch(self._url(endpoint, path))
            except StatusError as error:
                if not error.nothing_there:
                    raise
                reasons.append(f"{path}: {error}")
                continue
            source.bytes = len(text)
            family = self._families(endpoint, text)
            if family is None:
                reasons.append(f"{path}: metrics of no known engine")
                continue
            try:
                reading = family.read(text)
            except AsleepError:
                raise
            except ReadingError as error:
                reasons.append(f"{path}: {error}")
                if not self._options.path:
                    paths += [other for other in family.paths if other not in paths]
                continue
            source.family, source.without = family, False
            source.path, source.spec, source.url = path, endpoint.spec, self._url(endpoint, path)
            source.compare(reading, family)
            return reading
        raise WithoutMetricsError("; ".join(reasons))

    def _candidates(self, endpoint: Endpoint, source: Source) -> list[str]:
        if self._options.path:
            return [self._options.path]
        return [path for path in dict.fromkeys((source.path, *self._paths(endpoint), *PATHS)) if path]

    def _url(self, endpoint: Endpoint, path: str) -> str:
        return self._options.url(endpoint.spec.metrics_address or endpoint.spec.address, path)
