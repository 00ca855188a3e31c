"""What endpoints have cached of a prompt: by their engines' word where that can be had, else by what was sent to them.

The machinery of precise-prefix-cache-producer: precise index (what engines say), approximate index (what was sent), and the choice between
them for each endpoint and request. The engine's word needs the prompt's tokens and an endpoint whose view is relied upon (precise). Not here:
where events come from (epp.events), where tokens come from (epp.tokenize).

What is found is what the engine will report as cached: whole blocks, and never the last token, which is computed in any case.

Cost per request: 0.13 µs to hash and 0.04 to look up for each of the engine's blocks, and what the approximate index costs.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from epp.observe.series import Histogram
from epp.prefix.approximate import ApproximatePrefixes
from epp.prefix.columns import walk
from epp.prefix.kv_events import BlockStored, Event
from epp.prefix.precise import TIER_WEIGHTS, UNNAMED_LOST_BLOCKS, Cached, PreciseIndex, hashes_of, seed
from epp.prefix.token_check import TokenCheck
from epp.types import ASKED_ABOUT, TOKEN_BYTES, TOKEN_IDS, TOKEN_MEDIA, Decision, Endpoint, LLMRequest, PrefixMatch, Snapshot, Usage

_log = logging.getLogger("epp.prefix")

TOKENS_MAX = 262_144
"""Of a prompt, no more are hashed: 2 ms in blocks of 16."""
BLOCKS_MAX = 32_768
"""Of a prompt, and for each block size: 5 ms. Engines whose blocks are one token (SGLang's default) are asked about so many tokens."""
LORAS_MAX = 1_024
"""Names kept; of more, those heard of last."""
LOOKUP_S = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 1e-1)


class Span(Protocol):
    """Token ids that stand for a picture, a video or a sound."""

    @property
    def offset(self) -> int: ...
    @property
    def length(self) -> int: ...
    @property
    def content(self) -> bytes:
        """The engine's hash of it."""
        ...


class PreciseMatch(PrefixMatch):
    """What is known of a prompt whose tokens are known. `hashes` and `sizes` are the approximate index's."""

    __slots__ = ("blocks", "engine_mask", "forgotten", "weighted_tokens")

    def __init__(
        self, match: PrefixMatch, matched: dict[int, int], blocks: Sequence[Sequence[int]], engine_mask: int, forgotten: int
    ) -> None:
        super().__init__(match.hashes, match.sizes, match.prompt_tokens, matched)
        self.forgotten = forgotten
        """How many endpoints had gone by then: a slot that was given up later is not the one that was meant."""
        self.blocks = blocks
        """Hashes of the prompt's whole blocks, for each of the engines' block sizes."""
        self.engine_mask = engine_mask
        """Slots for which the engine's word counted."""
        self.weighted_tokens: Mapping[int, float] = matched
        """As `matched_tokens`, each token by what it is worth where it is."""


class WatchedIndex(PreciseIndex):
    """The precise index, and what else there is to learn from what it is told."""

    def __init__(self, budget_bytes: int, *, tier_weights: Mapping[str, float] = TIER_WEIGHTS, speculative_ttl_s: float = 0.0) -> None:
        super().__init__(budget_bytes, tier_weights=tier_weights, speculative_ttl_s=speculative_ttl_s)
        self.loras: dict[str, None] = {}
        """Names of LoRAs that blocks were stored for: requests for other models are the base model's."""
        self.gaps: Counter[int] = Counter()
        """By slot."""

    def apply(self, slot: int, event: Event, publisher: str = "") -> None:
        if isinstance(event, BlockStored) and event.lora and event.lora not in self.loras and event.lora[0] != "\0":  # an id names no model
            if len(self.loras) >= LORAS_MAX:  # one that is still used is heard of again
                del self.loras[next(iter(self.loras))]
            self.loras[event.lora] = None
        super().apply(slot, event, publisher)

    def gap(self, slot: int, publisher: str = "", lost_blocks: int = UNNAMED_LOST_BLOCKS) -> None:
        self.gaps[slot] += 1
        super().gap(slot, publisher, lost_blocks)

    def forget(self, slot: int, then: Callable[[int], None] | None = None) -> None:
        self.gaps.pop(slot, None)
        super().forget(slot, then)

    def stored(self, slot: int, hashes: Sequence[int]) -> int:
        """Leading blocks of `hashes` the endpoint said it has, speculation aside."""
        columns = self._columns
        found = walk(hashes, columns.of(1 << slot, self._views), [masks for masks in columns.masks.values() if masks])
        return found[-1][1] if found else 0


class Predictions:
    """Cached tokens predicted by the engine's word, against those it reported afterwards."""

    __slots__ = ("exact", "over", "over_tokens", "under", "under_tokens")

    def __init__(self) -> None:
        self.exact = self.over = self.under = 0
        self.over_tokens = self.under_tokens = 0

    def add(self, predicted: int, reported: int) -> None:
        if predicted == reported:
            self.exact += 1
        elif predicted > reported:
            self.over += 1
            self.over_tokens += predicted - reported
        else:
            self.under += 1
            self.under_tokens += reported - predicted


class KvView:
    """See the module. To whoever gives out slots (plugins.base.EndpointIndex) it is both indexes."""

    def __init__(self, precise: WatchedIndex, approximate: ApproximatePrefixes, now_s: Callable[[], float]) -> None:
        self.precise = precise
        self.lookups = 0
        self.approximated = 0
        """Requests without tokens, or with wrong ones: no engine's word counted."""
        self.blocks_found = 0
        """Of the endpoint that had most, in all look-ups."""
        self.lookup_s = Histogram(LOOKUP_S)
        self.predictions = Predictions()
        self.check = TokenCheck(self._stored, self._judged)
        self.mismatches = 0
        """Times the tokens of a model turned out to be wrong."""
        self._approximate = approximate
        self._now_s = now_s
        self._forgotten = 0
        """Endpoints that went."""
        self._forgotten_at: dict[int, int] = {}
        """Slot -> how many they were when its endpoint had gone."""

    # Requests

    def match(self, name: str, request: LLMRequest, candidates: Snapshot) -> None:
        """Put what the candidates have of the prompt on the request, as `name`'s; for plugins that name no producer, the first one's."""
        tokens = tokens_of(request)
        wrong = request.target_model in self.check.wrong
        trusted = self.precise.trusted_mask & candidates.mask if tokens and not wrong else 0
        counted = ASKED_ABOUT not in request.attributes
        self.approximated += counted and (not tokens or wrong)
        is_first = request.prefix is None
        rest = Snapshot(candidates.endpoints, candidates.mask & ~trusted, candidates.by_slot) if trusted else candidates
        self._approximate.match(name, request, rest)
        match = request.attributes.get(name)
        if match is None or not tokens:
            return
        started_s = self._now_s()
        blocks = self._blocks(request, tokens)
        found = PreciseMatch(match, match.matched_tokens, list(blocks.values()), trusted, self._forgotten)
        if trusted:
            deepest = self._look_up(found, blocks, trusted, len(tokens) // TOKEN_BYTES)
            self.lookups += counted
            self.blocks_found += counted * deepest
        request.attributes[name] = found
        if is_first:
            request.prefix = found
        if counted:
            self.lookup_s.observe(self._now_s() - started_s)

    def picked(self, name: str, request: LLMRequest, decision: Decision) -> None:
        """Whoever decodes the prompt will hold it, and whoever prefills it."""
        self.served(name, request, decision.endpoint)
        if decision.targets:
            prefill = decision.targets.get("prefill")
            if prefill is not None:
                self.served(name, request, prefill)

    def served(self, name: str, request: LLMRequest, endpoint: Endpoint) -> None:
        """The endpoint was sent the prompt."""
        self._approximate.served(name, request, endpoint)
        match = request.attributes.get(name)
        if isinstance(match, PreciseMatch):
            now_s = self._now_s()
            for hashes in match.blocks:
                self.precise.speculate(endpoint.slot, hashes, now_s)

    def answered(self, name: str, request: LLMRequest, endpoint: Endpoint, usage: Usage | None) -> None:
        """The endpoint answered, in full: what was predicted of it can be looked at."""
        self._approximate.answered(name, request, endpoint)
        match, slot = request.attributes.get(name), endpoint.slot
        if not isinstance(match, PreciseMatch) or self._forgotten_at.get(slot, 0) > match.forgotten:  # it went meanwhile
            return
        if match.engine_mask >> slot & 1 and usage is not None and usage.cached_tokens >= 0:
            self.predictions.add(match.matched_tokens.get(slot, 0), usage.cached_tokens)
        if len(match.blocks) == 1:
            self.check.answered(slot, request.target_model, match.blocks[0], self._now_s())

    # As an index of slots

    @property
    def blocks(self) -> int:
        return self.precise.blocks + self._approximate.index.blocks

    def __len__(self) -> int:
        return len(self.precise) + len(self._approximate.index)

    def held_blocks(self, slot: int) -> int:
        return self.precise.held_blocks(slot) + self._approximate.index.held_blocks(slot)

    def reset(self, slot: int) -> None:
        self.precise.reset(slot)
        self._approximate.index.reset(slot)

    def forget(self, slot: int, then: Callable[[int], None] | None = None) -> None:
        self._forgotten += 1
        self._forgotten_at[slot] = self._forgotten
        self.check.forget(slot)
        self.precise.forget(slot)  # at once; the other one takes its time
        self._approximate.index.forget(slot, then)

    def tick(self) -> int:
        now_s = self._now_s()
        self.check.tick(now_s)
        return self.precise.tick(now_s) + self._approximate.index.tick()

    def state(self, names: Mapping[int, str], shown_max: int) -> dict[str, Any]:
        """`names`: slot -> endpoint."""
        index, predictions = self.precise, self.predictions
        shown = list(names.items())[:shown_max]
        return {
            "endpoints": [
                {"name": name, "trusted": index.trusted(slot), "blocks": index.held_blocks(slot), "gaps": index.gaps[slot]}
                for slot, name in shown
            ],
            "blocks": index.blocks,
            "bytes": index.bytes_used,
            "budget_bytes": index.budget_bytes,
            "block_tokens": list(index.block_sizes),
            "events": dict(index.counts),
            "predictions": {each: getattr(predictions, each) for each in predictions.__slots__},
            "prompts_found": self.check.found_total,
            "prompts_missed": self.check.missed_total,
            "models_with_wrong_tokens": len(self.check.wrong),
            "approximate": self._approximate.state(),
        }

    def _blocks(self, request: LLMRequest, tokens: bytes) -> dict[int, list[int]]:
        """Tokens a block -> hashes of the prompt's whole blocks."""
        lora = request.target_model if request.target_model in self.precise.loras else ""
        salt, all_of_it = request.cache_salt, memoryview(tokens)
        media = request.attributes.get(TOKEN_MEDIA, ())
        found = {}
        for size in self.precise.block_sizes:
            part = all_of_it[: min(TOKENS_MAX, BLOCKS_MAX * size) * TOKEN_BYTES]
            found[size] = hashes_of(part, size, seed(lora, salt, size), _extras(media, size))
        return found

    def _look_up(self, match: PreciseMatch, blocks: Mapping[int, list[int]], trusted: int, tokens: int) -> int:
        """Blocks of the endpoint that has most."""
        deepest = 0
        for size, hashes in blocks.items():
            usable = hashes[: (tokens - 1) // size]
            cached = self.precise.cached(usable, trusted, range(size, size * len(usable) + 1, size))
            if not cached.tokens:
                continue
            _add(match, cached)
            deepest = max(deepest, max(cached.tokens.values()) // size)
        return deepest

    def _stored(self, slot: int, hashes: Sequence[int]) -> int:
        return self.precise.stored(slot, hashes) if self.precise.trusted(slot) else -1

    def _judged(self, model: str, wrong: bool) -> None:
        self.mismatches += wrong
        if wrong:
            _log.warning(
                "prompts are cut into other tokens than the engines': what engines have cached can't be found, and is guessed. "
                "Check the tokenizer's path and the chat template",
                extra={"fields": {"model": model}},
            )
        else:
            _log.info("prompts are cut into the engines' tokens again", extra={"fields": {"model": model}})


def tokens_of(request: LLMRequest) -> bytes:
    """The prompt's token ids; none where they are not known, or do not tell all (pictures)."""
    if request.media and not request.attributes.get(TOKEN_MEDIA):
        return b""
    tokens: bytes = request.attributes.get(TOKEN_IDS, b"")
    return tokens


def _extras(media: Sequence[Span], block_tokens: int) -> dict[int, bytes]:
    """Block -> the pictures in it, by the engine's name for them."""
    found: dict[int, bytes] = {}
    for span in media:
        for block in range(span.offset // block_tokens, (span.offset + max(1, span.length) - 1) // block_tokens + 1):
            found[block] = found[block] + b"\0" + span.content if block in found else span.content
    return found


def _add(match: PreciseMatch, cached: Cached) -> None:
    """What engines of one block size have."""
    if match.weighted_tokens is match.matched_tokens and cached.weighted_tokens != cached.tokens:
        match.weighted_tokens = dict(match.matched_tokens)
    if isinstance(match.weighted_tokens, dict) and match.weighted_tokens is not match.matched_tokens:
        match.weighted_tokens.update(cached.weighted_tokens)
    match.matched_tokens.update(cached.tokens)
