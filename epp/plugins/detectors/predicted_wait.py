"""predicted-wait-detector: how full the pool is, by how long the next request would wait at each endpoint.

The endpoint where it would wait least decides, as it is where a good scheduler sends the request: a pool with one idle endpoint is not full.
Until then it is as full as its endpoints are in the mean, so that a ceiling below 1 keeps that share of the pool for others. What was sent counts
from the moment it is sent, so that a burst can't pass before metrics move. Where a plugin keeps better books (`wait_s(endpoint)`, as
cost-aware-scorer's), those are asked; else the prompt tokens in flight are divided by the prefill rate the endpoint showed. Nobody tells when
the prompt of an answer that comes whole is through: it is taken to be when it should be, not when the answer comes; so is every prompt where
the tokens in flight are more than prompts (addEstimatedOutputTokens). A queue inside the engine (its batch or its KV cache is full) is as long
as it takes requests to end there. The KV cache counts in its last tenth alone: before, it makes nobody wait, and ceilings of lower bands
(holdback) would leave most of it empty.

What is not known holds nobody up. Until an endpoint of the pool has shown how fast it is, a wait is a guess: it counts no more than what was
sent since a reading that said nothing waits there, and not at all for an engine that says nothing.

Not here: who waits (admission). Cost: about 0.8 µs an endpoint each time it is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

import msgspec

from epp.config.units import Duration, duration_s
from epp.plugins.base import Context, Finished, Plugin
from epp.types import Decision, Endpoint, LLMRequest

GAP_WEIGHT = 0.1
"""Of a new sample in the mean time between two ends of requests at one endpoint."""
GAP_MAX_S = 60.0
WAITING_S = 0.05
"""What one waiting request is taken to take at an endpoint nothing ended at yet."""
READING_S = 2.0
"""A reading tells of a guess that it is wrong for so long."""
KV_FREE = 0.9
"""Of the KV cache's threshold: so much of it may be used without counting."""
KEY = "epp.plugins.detectors.predicted_wait"
"""Attribute of a request whose first token nobody will tell of: the endpoints it was sent to, and the prompt tokens each has to compute."""
REQUEST_TOKENS = 16
"""What a request weighs besides its prompt, so that those without one can't pass in any number."""


class Book:
    """What is known of one endpoint, besides what it says itself."""

    __slots__ = ("ended_s", "gap_s", "through_s", "whole_tokens")

    def __init__(self) -> None:
        self.ended_s = -1.0
        """When a request ended here last; negative: there was no work then."""
        self.gap_s = 0.0
        """Between two ends, in the mean."""
        self.whole_tokens = 0
        """Prompt tokens in flight whose first token nobody will tell of."""
        self.through_s = 0.0
        """When the endpoint should be through with those."""


@runtime_checkable
class Waits(Protocol):
    """A plugin that knows how long a prompt would wait."""

    def wait_s(self, endpoint: Endpoint) -> float:
        """Until the endpoint is through with the prompts it has."""
        ...


class PredictedWaitDetector(Plugin):
    """An endpoint's is max(wait / maxWait, how far KV use / kvCacheUtilThreshold is from 0.9 to 1); 1 without endpoints.

    The pool's is the mean, each counted up to 1, and once all of them are full the least.

    wait: that of a plugin that predicts it (waitPluginName, else the first that can), else prompt tokens in flight / the endpoint's prefill
    rate, or the pool's, or initialPrefillTokensPerSecond; at least: requests waiting in the engine x the mean time between two ends there,
    by a reading that is not too old.
    """

    type: ClassVar[str] = "predicted-wait-detector"
    uses: ClassVar[tuple[str, ...]] = ("inflight-load",)
    leads: ClassVar[bool] = True
    """It sees a request end at once, before the engine's metrics do."""

    max_wait: Duration = "250ms"
    kv_cache_util_threshold: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.98
    initial_prefill_tokens_per_second: Annotated[float, msgspec.Meta(gt=0)] = 8_000.0
    wait_plugin_name: str = ""

    def __post_init__(self) -> None:
        max_wait_s = duration_s(self.max_wait)
        if max_wait_s <= 0:
            raise ValueError("maxWait must be above 0")
        self.__dict__.update(max_wait_s=max_wait_s, waits=None, books={}, clock=None, key=f"{KEY}/{id(self)}", shown=True, to_the_end=False)

    def bind(self, context: Context) -> None:
        self.__dict__["clock"] = context.clock
        self.__dict__["to_the_end"] = any(getattr(plugin, "add_estimated_output_tokens", False) for plugin in context.plugins.values())
        if self.wait_plugin_name:
            self.__dict__["waits"] = context.plugin(self.wait_plugin_name, Waits, parameter="waitPluginName")
        else:
            self.__dict__["waits"] = next((p for p in context.plugins.values() if isinstance(p, Waits)), None)

    def picked(self, request: LLMRequest, decision: Decision) -> None:
        """Note a prompt of which nobody will tell when it is through."""
        state = self.__dict__
        if state["waits"] is not None or (request.stream and state["shown"] and not state["to_the_end"]):
            return  # others keep these books, or the first token will tell
        now_s: float = state["clock"].now_s()
        sent = []
        for endpoint in (decision.endpoint, *decision.targets.values()):
            book, tokens = self._book(endpoint), request.uncached_on(endpoint)
            rate = endpoint.capacity.prefill_tokens_per_s or self.initial_prefill_tokens_per_second
            book.whole_tokens += tokens
            book.through_s = max(book.through_s, now_s) + tokens / rate
            sent.append((endpoint, tokens))
        request.attributes[state["key"]] = sent

    def served(self, request: LLMRequest, endpoint: Endpoint) -> None:
        """Another one than that it was sent to."""
        sent = request.attributes.get(self.__dict__["key"])
        if sent:
            first, tokens = sent[0]
            self._settle(first, tokens)
            self._book(endpoint).whole_tokens += tokens
            sent[0] = endpoint, tokens

    def finished(self, request: LLMRequest, endpoint: Endpoint, outcome: Finished) -> None:
        """Learn how often a place comes free while there is work."""
        state = self.__dict__
        for each, tokens in request.attributes.pop(state["key"], ()):
            self._settle(each, tokens)
        if request.stream and outcome.status == 200:
            state["shown"] = outcome.ttft_s >= 0
        books: dict[Endpoint, Book] = state["books"]
        book = books.get(endpoint)
        if book is None:  # it is gone
            return
        now_s: float = state["clock"].now_s()
        if book.ended_s >= 0:
            sample_s = min(GAP_MAX_S, now_s - book.ended_s)
            book.gap_s = sample_s if not book.gap_s else book.gap_s + GAP_WEIGHT * (sample_s - book.gap_s)
        book.ended_s = now_s if endpoint.inflight_requests else -1.0

    def removed(self, endpoint: Endpoint) -> None:
        self.__dict__["books"].pop(endpoint, None)

    def saturation(self, endpoints: Sequence[Endpoint]) -> float:
        return self.level(endpoints)[0]

    def level(self, endpoints: Sequence[Endpoint]) -> tuple[float, float, float]:
        """Saturation, and what one more request, and one more prompt token, adds to it: as the room there is fills up."""
        if not endpoints:
            return 1.0, 0.0, 0.0
        state = self.__dict__
        max_wait_s: float = state["max_wait_s"]
        now_s: float = state["clock"].now_s()
        known = [e.capacity.prefill_tokens_per_s for e in endpoints if e.capacity.prefill_tokens_per_s]
        usual = sum(known) / len(known) if known else self.initial_prefill_tokens_per_second
        lowest, used, room_tokens = float("inf"), 0.0, 0.0
        for endpoint in endpoints:
            rate = endpoint.capacity.prefill_tokens_per_s or usual
            wait_s = self._wait_s(endpoint, rate, now_s, guessed=not known)
            kv = (endpoint.kv_usage_estimate / self.kv_cache_util_threshold - KV_FREE) / (1.0 - KV_FREE)
            full = max(wait_s / max_wait_s, kv)
            lowest = min(lowest, full)
            if full < 1.0:
                used += full
                room_tokens += (1.0 - full) * max_wait_s * rate
            else:
                used += 1.0
        if lowest >= 1.0:
            return lowest, 0.0, 0.0
        saturation = used / len(endpoints)
        by_token = (1.0 - saturation) / room_tokens
        return saturation, REQUEST_TOKENS * by_token, by_token

    def state(self) -> dict[str, Any]:
        """Mean seconds between two ends, by slot."""
        books: dict[Endpoint, Book] = self.__dict__["books"]
        return {"ends_apart_s": {str(endpoint.slot): round(book.gap_s, 4) for endpoint, book in books.items()}}

    def _wait_s(self, endpoint: Endpoint, rate: float, now_s: float, *, guessed: bool) -> float:
        """Of the next request there. `guessed`: nobody showed how fast it is."""
        state = self.__dict__
        waits: Waits | None = state["waits"]
        book = state["books"].get(endpoint) or self._book(endpoint)
        if waits is not None:
            wait_s = waits.wait_s(endpoint)
        else:
            wait_s = max(0, endpoint.inflight_tokens - book.whole_tokens) / rate if not state["to_the_end"] else 0.0
            if book.through_s > now_s:
                wait_s += book.through_s - now_s
        waiting, trusted = endpoint.waiting, endpoint.trusted
        if guessed:
            if not trusted:
                return 0.0
            if not waiting and now_s - endpoint.scraped_at_s <= READING_S:
                return min(wait_s, endpoint.sent_tokens / rate)
        if waiting and trusted:
            return max(wait_s, (waiting + endpoint.sent_requests) * trusted * (book.gap_s or WAITING_S))
        return wait_s

    def _book(self, endpoint: Endpoint) -> Book:
        books: dict[Endpoint, Book] = self.__dict__["books"]
        return books.setdefault(endpoint, Book())

    def _settle(self, endpoint: Endpoint, tokens: int) -> None:
        """They are in flight there no more."""
        books: dict[Endpoint, Book] = self.__dict__["books"]
        book = books.get(endpoint)
        if book is not None:
            book.whole_tokens = max(0, book.whole_tokens - tokens)
