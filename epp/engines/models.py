"""Which models each endpoint serves, as its own `/v1/models` says: base models and LoRA adapters.

Asked rarely (`INTERVAL_S`, new endpoints at once), over the scraper's connections. An endpoint without such a list, or with one that
decides nothing (llama.cpp takes any name), is unknown: never "no". A list that can't be had keeps its last state for `FAILURES_MAX`
rounds. Not here: what follows from it (director), HTTP (fetch).

Cost per request: `serves` and `known` are a look-up or two, 0.2 µs.
"""

from __future__ import annotations

import asyncio
import logging
import random
import sys
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType

import msgspec

from epp.aio import Sleep
from epp.datastore import Datastore
from epp.engines.access import FetchOptions
from epp.engines.fetch import Fetcher, FetchError, StatusError
from epp.engines.follow import Following
from epp.types import Endpoint

INTERVAL_S = 10.0
NAP_S = 1.0
"""How long a list is left alone even if somebody asks for a model that is on none."""
JITTER = 0.1
FAILURES_MAX = 3
POLLS_PER_S_MAX = 50.0
"""Over all endpoints: a larger pool is asked more rarely."""
AT_ONCE_MAX = 16
"""Endpoints asked at the same time."""
LIST_BYTES_MAX = 1 << 20
MODELS_MAX = 1_000
"""Of one endpoint; a longer list is not taken."""
NAME_CHARS_MAX = 512
"""A longer name is not taken."""
PATH = "/v1/models"
STRICT = frozenset({"vllm", "library"})
"""`owned_by` of engines that refuse a model that is not on their list: vLLM (and what speaks its API) and Ollama. Others (SGLang, TGI,
llama.cpp) answer whatever name a request has, so their lists decide nothing."""
LATEST = ":latest"
"""What Ollama adds to a name without a tag."""

_log = logging.getLogger(__name__)


class _Model(msgspec.Struct):
    id: str
    owned_by: str | None = None


class _List(msgspec.Struct):
    data: list[_Model]


_decode = msgspec.json.Decoder(_List).decode


class ModelsError(Exception):
    """The answer is no list of models."""


def read_models(text: bytes) -> frozenset[str] | None:
    """The names in an OpenAI list; None where it takes other names too. Raises ModelsError; nothing else, whatever the bytes."""
    if len(text) > LIST_BYTES_MAX:
        raise ModelsError(f"more than {LIST_BYTES_MAX} bytes")
    try:
        models = _decode(text).data
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ModelsError(f"no list of models: {error}") from None
    if len(models) > MODELS_MAX:
        raise ModelsError(f"more than {MODELS_MAX} models")
    if any(model.owned_by not in STRICT for model in models):
        return None
    names = {sys.intern(model.id) for model in models if 0 < len(model.id) <= NAME_CHARS_MAX}
    return frozenset(names | {sys.intern(name.removesuffix(LATEST)) for name in names})


class ModelsView:
    """Who serves what, as far as it is known."""

    def __init__(self) -> None:
        self._served: dict[Endpoint, frozenset[str] | None] = {}
        """Every endpoint of the pool; None: unknown."""
        self._counts: Counter[str] = Counter()
        self._unknown = 0
        self.version = 0
        """Another one with every change of what is known."""

    @property
    def models(self) -> Mapping[str, int]:
        """Model -> endpoints that serve it."""
        return MappingProxyType(self._counts)

    def serves(self, endpoint: Endpoint, model: str) -> bool | None:
        """None: unknown."""
        served = self._served.get(endpoint)
        return None if served is None else model in served

    def known(self, model: str) -> bool | None:
        """Whether any endpoint of the pool serves it. None: none that says so, but there are some that say nothing."""
        if model in self._counts:
            return True
        return None if self._unknown or not self._served else False

    def by_all(self, model: str) -> bool:
        """Whether every endpoint of the pool serves it."""
        return self._counts.get(model, 0) == len(self._served)

    def record(self, endpoint: Endpoint, served: frozenset[str] | None) -> None:
        """`None`: it is in the pool, what it serves is unknown."""
        if endpoint in self._served and self._served[endpoint] == served:
            return
        self.forget(endpoint)
        self._served[endpoint] = served
        self.version += 1
        self._unknown += served is None
        self._counts.update(served or ())

    def forget(self, endpoint: Endpoint) -> None:
        """It is gone from the pool."""
        if endpoint not in self._served:
            return
        served = self._served.pop(endpoint)
        self.version += 1
        self._unknown -= served is None
        for model in served or ():
            self._counts[model] -= 1
            if not self._counts[model]:
                del self._counts[model]


class ModelsPoller:
    """See the module. `run` it once; endpoints are followed through the datastore from then on."""

    def __init__(
        self,
        datastore: Datastore,
        fetcher: Fetcher,
        *,
        rng: random.Random,
        options: FetchOptions | None = None,
        interval_s: float = INTERVAL_S,
        failures_max: int = FAILURES_MAX,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        """`options`: scheme, path and port; the engine's own address where they say nothing."""
        self.view = ModelsView()
        self.poll_errors_total = 0
        """Answers that should have been a list and are none; engines without lists do not count."""
        self._fetcher = fetcher
        self._rng = rng
        self._options = options or FetchOptions()
        self._interval_s = interval_s
        self._failures_max = failures_max
        self._sleep = sleep
        self._hurries = 0
        self._failures: Counter[Endpoint] = Counter()
        self._at_once = asyncio.Semaphore(AT_ONCE_MAX)
        self._datastore = datastore
        datastore.subscribe(added=self._added, removed=self._removed)
        self._following = Following(datastore, self._follow, "models of")

    async def run(self) -> None:
        """Until cancelled."""
        await self._following.run()

    async def once(self, endpoint: Endpoint) -> bool:
        """Ask one endpoint. True if what it serves is known now."""
        served: frozenset[str] | None = None
        error: Exception | None = None
        try:
            async with self._at_once:
                served = read_models(await self._fetcher.fetch(self._options.url(endpoint.spec.address, self._options.path or PATH)))
        except (FetchError, ModelsError) as caught:
            error = caught
        if self._datastore.endpoints.get(endpoint.spec.address) is not endpoint:  # it went while it was asked
            return False
        if error is None or (isinstance(error, StatusError) and error.nothing_there):
            self._failures.pop(endpoint, None)
            self.view.record(endpoint, served)
        else:
            self._failed(endpoint, error)
        return self.view.serves(endpoint, "") is not None

    def hurry(self) -> None:
        """A model nobody serves was asked for; it may have been loaded since the lists were read: read them again within `NAP_S`."""
        self._hurries += 1

    async def _follow(self, endpoint: Endpoint) -> None:
        while True:
            hurries = self._hurries
            await self.once(endpoint)
            interval_s = max(self._interval_s, len(self._following) / POLLS_PER_S_MAX) * self._rng.uniform(1 - JITTER, 1 + JITTER)
            rested_s = 0.0
            while rested_s < interval_s and (self._hurries == hurries or rested_s < NAP_S):
                nap_s = min(NAP_S, interval_s - rested_s)
                await self._sleep(nap_s)
                rested_s += nap_s

    def _failed(self, endpoint: Endpoint, error: Exception) -> None:
        self.poll_errors_total += 1
        self._failures[endpoint] += 1
        if self._failures[endpoint] >= self._failures_max:
            self.view.record(endpoint, None)
        _log.debug("no list of models", extra={"fields": {"endpoint": endpoint.name, "reason": str(error)}})

    def _added(self, endpoint: Endpoint) -> None:
        self.view.record(endpoint, None)

    def _removed(self, endpoint: Endpoint) -> None:
        self._failures.pop(endpoint, None)
        self.view.forget(endpoint)
