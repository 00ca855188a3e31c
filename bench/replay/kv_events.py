"""What simulated engines would publish of their KV caches, and the product with its precise index fed by it.

The engines' caches tell of every block they begin or cease to hold, at the very instant; the product hears of it `delay_s` later, as through
a socket. Its own producer, index and scorers do the rest: nothing of them is rebuilt here. A request brings its tokens, as after a tokenizer:
the same bytes that are its prompt. Not modelled: lost frames (tests), what tokenizing costs.

Cost: 0.5 µs for each block stored or evicted, and what the index takes.
"""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

from bench.replay.engine import NEVER, Engine
from bench.replay.job import BLOCK_TOKENS, Job
from bench.replay.product import ID_BYTES, ProductPolicy
from bench.replay.profiles import Profile
from epp.plugins.producers.precise_prefix_cache import PrecisePrefixCacheProducer
from epp.prefix.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from epp.types import TOKEN_BYTES, TOKEN_IDS, LLMRequest

DELAY_S = 0.01
"""An engine publishes after each of its steps; the way from there, and our reading it, takes a few ms."""
REPEATS = BLOCK_TOKENS * TOKEN_BYTES // ID_BYTES

Tell = Callable[[int, bool], None]
"""Block, and whether it is held now."""


class _Refs(dict[int, int]):
    """A cache's blocks."""

    def __init__(self, tell: Tell, cleared: Callable[[], None]) -> None:
        super().__init__()
        self._tell = tell
        self._cleared = cleared

    def __setitem__(self, block: int, count: int) -> None:
        if block not in self:
            self._tell(block, True)
        super().__setitem__(block, count)

    def __delitem__(self, block: int) -> None:
        super().__delitem__(block)
        self._tell(block, False)

    def clear(self) -> None:
        super().clear()
        self._cleared()


class _Tier(OrderedDict[int, None]):
    """Blocks in CPU memory."""

    def __init__(self, tell: Tell) -> None:
        super().__init__()
        self._tell = tell

    def __setitem__(self, block: int, value: None) -> None:
        if block not in self:
            self._tell(block, True)
        super().__setitem__(block, value)

    def popitem(self, last: bool = True) -> tuple[int, None]:
        item = super().popitem(last=last)
        self._tell(item[0], False)
        return item


class PreciseProduct(ProductPolicy):
    """The product with events. The configuration must have a precise-prefix-cache-producer."""

    def __init__(
        self,
        config: str,
        source: str,
        profile: Profile,
        rng: random.Random,
        engines: Sequence[Engine],
        *,
        delay_s: float = DELAY_S,
        adapters_max: int = 0,
        usage: bool = False,
    ) -> None:
        super().__init__(config, source, profile, rng, adapters_max=adapters_max, usage=usage)
        self._producer = next(p for p in self._policy.built.plugins.values() if isinstance(p, PrecisePrefixCacheProducer))
        self._delay_s = delay_s
        self._published: deque[tuple[float, int, Event]] = deque()
        """When it is known, replica, event: engines step in the order of time."""
        self._parents: dict[int, int | None] = {}
        """A block's id says all that is before it, too."""
        self._adapter_of: dict[int, str] = {}
        self._now_s = 0.0
        for replica, engine in enumerate(engines):
            self._listen(replica, engine)

    def left(self, replica: int, now_s: float) -> None:
        super().left(replica, now_s)
        self._published = deque(each for each in self._published if each[1] != replica)

    def request_of(self, job: Job) -> LLMRequest:
        request = super().request_of(job)
        request.attributes[TOKEN_IDS] = request.prompt
        before: int | None = None
        for block in job.blocks:
            self._parents[block] = before
            self._adapter_of[block] = job.adapter
            before = block
        return request

    def _at(self, now_s: float) -> None:
        super()._at(now_s)
        self._now_s = now_s
        index = self._producer.index.precise
        while self._published and self._published[0][0] <= now_s:
            _, replica, event = self._published.popleft()
            endpoint = self._endpoints.get(replica)
            if endpoint is not None:
                index.apply(endpoint.slot, event)

    def _listen(self, replica: int, engine: Engine) -> None:
        def publish(event: Event) -> None:
            happened_s = engine.next_s if engine.next_s != NEVER else self._now_s  # the end of its step, or an arrival in its idleness
            self._published.append((happened_s + self._delay_s, replica, event))

        def tell_of(medium: str) -> Tell:
            def tell(block: int, held: bool) -> None:
                publish(self._stored(block, medium) if held else BlockRemoved((block,), medium))

            return tell

        engine.cache.refs = _Refs(tell_of("gpu"), lambda: publish(AllBlocksCleared()))
        engine.cache.tier = _Tier(tell_of("cpu"))

    def _stored(self, block: int, medium: str) -> BlockStored:
        tokens = block.to_bytes(ID_BYTES, "little") * REPEATS
        return BlockStored((block,), self._parents[block], tokens, BLOCK_TOKENS, medium, self._adapter_of[block])
