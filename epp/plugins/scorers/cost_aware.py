"""cost-aware-scorer: the endpoint where the first token is predicted to come soonest, with a price on what that does to the others there.

It keeps the prompts sent to each endpoint and not yet answered, in order, and so knows how long a new one would wait (cost_lanes); what a
prompt takes is learned from first-token times, or the times of whole answers (cost_model). Not here: what is cached where (the prefix
producer, which remembers what was sent and so also counts what is still on its way).

Cost: 5 µs at 16 endpoints, 15 at 64 (a loop), 40 at 1 000 (numpy), 0.05 µs more for each that has some of the prompt cached, and what rows
cost that have to be made again (cost_lanes). Amid other work, caches cold, twice that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

import msgspec
import numpy as np

from epp.plugins.base import Context, Finished, Plugin, match_of
from epp.plugins.cost_lanes import DECODE_WEIGHT, Column, Lanes
from epp.plugins.cost_model import CostModel
from epp.plugins.cost_work import Lane, Row, Work
from epp.types import Decision, Endpoint, LLMRequest

NOTHING: Mapping[int, int] = MappingProxyType({})
KEY = "cost-aware-work"
"""Of a request's attributes, with the instance's own end."""
LOOP_MAX = 64
"""Endpoints up to which a loop is faster than numpy."""


class CostAwareScorer(Plugin):
    """1 / (1 + cost), with cost in seconds =
    wait x (1 + doubt) + own x (1 + harm x decoding + crowding x waiting) + spread x overhead x decoding + loading

    wait: until the prompts sent there before are through, or, where that is longer, until the KV cache has room and a slot is free for the
    LoRA adapter. Who lately did most of an idle pool's work is taken to have a wait as well (cost_history). It comes out longer than
    predicted, for not all that was taken for cached is: doubt. own: of the prompt's tokens not cached there and their attention to all before
    them. decoding, waiting: requests there that have their first token, or not yet; /metrics tell of those that others sent. harm is what a
    second of prefill costs each that decodes; crowding keeps long prompts from where many short ones go; spread is what one more neighbour
    costs, in prompt overheads. loading: of the adapter. All learned from first-token times, or where few answers are streamed from the times
    of whole ones; before anything is known, 10 000 tokens a second. Meant to decide alone, with max-score-picker.
    """

    type: ClassVar[str] = "cost-aware-scorer"
    per_request: ClassVar[bool] = True
    in_range: ClassVar[bool] = True
    """1 / (1 + cost), and nothing in cost is below 0: scores need no clamping."""
    requires: ClassVar[tuple[str, ...]] = ("prefix-match",)

    harm: Annotated[float, msgspec.Meta(ge=0)] = 0.11
    crowding: Annotated[float, msgspec.Meta(ge=0)] = 0.25
    spread: Annotated[float, msgspec.Meta(ge=0)] = 0.5
    doubt: Annotated[float, msgspec.Meta(ge=0)] = 0.3
    prefix_match_info_producer_name: str = ""

    def __post_init__(self) -> None:
        model = CostModel()
        lanes = Lanes(model, harm=self.harm, crowding=self.crowding)
        self.__dict__.update(model=model, lanes=lanes, shown=True, key=f"{KEY}/{id(self)}")

    def bind(self, context: Context) -> None:
        self.__dict__["clock"] = context.clock

    def wait_s(self, endpoint: Endpoint) -> float:
        """Until the endpoint is through with the prompts it has."""
        lanes: Lanes = self.__dict__["lanes"]
        lane = lanes.by_slot.get(endpoint.slot)
        if lane is None or not lane.queue:
            return 0.0
        now_s: float = self.__dict__["clock"].now_s()
        return max(0.0, max(lane.last_s, lane.queue[0].sent_s) + lane.pending_s - now_s)

    def score(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
        state = self.__dict__
        lanes: Lanes = state["lanes"]
        model: CostModel = state["model"]
        now_s: float = state["clock"].now_s() if "clock" in state else 0.0
        rows = lanes.now(endpoints, now_s)
        match = match_of(request, self.prefix_match_info_producer_name)
        cached = match.matched_tokens if match is not None else NOTHING
        spread_s, weight = self.spread * model.once_s, 1.0 + self.doubt
        adapter_s = self._adapter_s(request.target_model, rows) if request.target_model in lanes.adapters else None
        if adapter_s is None and len(rows) <= LOOP_MAX:
            return _in_turn(rows, model, request.prompt_tokens, cached, now_s, spread_s=spread_s, weight=weight)
        return _at_once(lanes, request.prompt_tokens, cached, now_s, adapter_s, spread_s=spread_s, weight=weight)

    def picked(self, request: LLMRequest, decision: Decision) -> None:
        """Where a prefill worker computes the prompt, the decode worker has it cached."""
        prefill = decision.targets.get("prefill") if decision.targets else None
        sent = [self._sent(request, decision.endpoint, cached=request.prompt_tokens if prefill else None)]
        if prefill is not None:
            sent.append(self._sent(request, prefill))
        request.attributes[self.__dict__["key"]] = sent

    def served(self, request: LLMRequest, endpoint: Endpoint) -> None:
        """Heard with the answer: when it was sent there is only known to be no earlier than to where we said."""
        sent = request.attributes.get(self.__dict__["key"])
        if not sent:
            return
        lane, work = sent[0]
        self.__dict__["lanes"].over(lane, work, self.__dict__["clock"].now_s())
        sent[0] = self._sent(request, endpoint, cached=request.prompt_tokens if len(sent) > 1 else None)
        sent[0][1].moved, sent[0][1].sent_s = True, work.sent_s

    def first_token(self, request: LLMRequest, endpoint: Endpoint, ttft_s: float) -> None:
        del endpoint, ttft_s
        state = self.__dict__
        sent = request.attributes.get(state["key"])
        if not sent or not request.stream:  # the first piece of a whole answer is its end
            return
        state["shown"] = True
        lanes: Lanes = state["lanes"]
        now_s: float = state["clock"].now_s()
        for lane, work in sent:
            if not work.done:
                lanes.first_token(lane, work, now_s)
        for lane, work in sent[1:]:
            lanes.over(lane, work, now_s)
        del sent[1:]

    def finished(self, request: LLMRequest, endpoint: Endpoint, outcome: Finished) -> None:
        del endpoint
        state = self.__dict__
        sent = request.attributes.pop(state["key"], None)
        if not sent:
            return
        lanes: Lanes = state["lanes"]
        now_s: float = state["clock"].now_s()
        usage = outcome.usage
        if usage is not None and usage.prompt_tokens >= 0 and outcome.status == 200 and not request.stream and len(sent) == 1:
            ((lane, work),) = sent
            lanes.answered(lane, work, max(0, usage.completion_tokens), now_s)
        for lane, work in sent:
            lanes.over(lane, work, now_s)
        if outcome.status == 200 and request.stream:
            if outcome.ttft_s >= 0:
                lane = sent[0][0]
                lane.decode_s += DECODE_WEIGHT * (outcome.duration_s - outcome.ttft_s - lane.decode_s)
            else:
                state["shown"] = False  # the gateway keeps answers to itself

    def removed(self, endpoint: Endpoint) -> None:
        self.__dict__["lanes"].removed(endpoint)

    def state(self) -> dict[str, Any]:
        """What was learned."""
        model: CostModel = self.__dict__["model"]
        lanes: Lanes = self.__dict__["lanes"]
        return {
            "samples": model.samples,
            "tokens_per_s": round(1 / model.by_tokens_s) if model.by_tokens_s else None,
            "overhead_s": model.once_s,
            "adapter_load_s": lanes.load_s if lanes.adapters else None,
            "history_price_s": {slot: round(lane.history_price_s, 3) for slot, lane in lanes.by_slot.items() if lane.history_price_s},
            "slowness": {slot: round(lane.slowness, 2) for slot, lane in lanes.by_slot.items() if lane.slowness != 1.0},
        }

    def _adapter_s(self, adapter: str, rows: Sequence[Row]) -> Sequence[tuple[float, float]] | None:
        """Of each lane, seconds until a slot is free for the adapter and seconds to load it; None where no engine knows it as one."""
        chosen = [row[-1] for row in rows]
        if not any(adapter in lane.named for lane in chosen):
            return None
        load_s = self.__dict__["lanes"].load_s
        return [(lane.slot_s(adapter), 0.0 if adapter in lane.loaded else load_s) for lane in chosen]

    def _sent(self, request: LLMRequest, endpoint: Endpoint, *, cached: int | None = None) -> tuple[Lane, Work]:
        match = match_of(request, self.prefix_match_info_producer_name)
        if cached is None:
            cached = match.matched_tokens.get(endpoint.slot, 0) if match is not None else 0
        state = self.__dict__
        lanes: Lanes = state["lanes"]
        streamed = request.stream and state["shown"]
        return lanes.send(endpoint, request.prompt_tokens, cached, request.target_model, state["clock"].now_s(), streamed=streamed)


def _in_turn(
    rows: Sequence[Row], model: CostModel, prompt: int, cached_tokens: Mapping[int, int], now_s: float, *, spread_s: float, weight: float
) -> list[float]:
    """The formula, endpoint by endpoint, where no adapter has to be loaded: 0.25 µs each.

    `cached_tokens` by slot; `spread_s` for each request that decodes; `weight` of the wait.
    """
    once_s, by_tokens_s, by_pairs_s, by_context_s = model.once_s, model.by_tokens_s, model.by_pairs_s, model.by_context_s
    cached_at = cached_tokens.get
    scores: list[float] = []
    add = scores.append
    cached = -1
    for slot, until_s, wait_s, burden, context, decoding, room, lane in rows:
        if until_s > now_s:
            ends_s = lane.missed_s if lane.overdue_s < now_s else lane.ends_s
            if ends_s > now_s:
                wait_s += ends_s - now_s  # noqa: PLW2901 - the row's is what is behind the one at the head
        has = cached_at(slot, 0)
        if has != cached:  # often the same of one after the other
            cached = has
            tokens = max(1, prompt - cached)
            own_s, by_context = once_s + tokens * (by_tokens_s + by_pairs_s * (prompt - tokens / 2)), tokens * by_context_s
        if tokens > room:
            wait_s = max(wait_s, (tokens - room) / lane.used * lane.decode_s)  # noqa: PLW2901
        add(1.0 / (1.0 + weight * wait_s + (own_s + by_context * context) * burden + spread_s * decoding))
    return scores


def _at_once(
    lanes: Lanes,
    prompt: int,
    cached_tokens: Mapping[int, int],
    now_s: float,
    adapter_s: Sequence[tuple[float, float]] | None,
    *,
    spread_s: float,
    weight: float,
) -> list[float]:
    """The same for all of them, operation by operation."""
    at, model = lanes.columns(), lanes.model
    wait_s = np.where(at.overdue_s < now_s, at.missed_s, at.ends_s)
    wait_s -= now_s
    np.maximum(wait_s, 0.0, out=wait_s)
    wait_s += at.queued_s
    tokens: float | Column = float(max(1, prompt))
    if cached_tokens:
        tokens = _uncached(lanes, len(wait_s), prompt, cached_tokens)
    cost_s = model.by_context_s * at.context
    cost_s += model.by_tokens_s + model.by_pairs_s * (prompt - tokens / 2)
    cost_s *= tokens
    cost_s += model.once_s
    cost_s *= at.burden
    cost_s += spread_s * at.decoding
    short = tokens > at.room
    if short.any():
        np.maximum(wait_s, (tokens - at.room) / at.used * at.decode_s, out=wait_s)
    if adapter_s is not None:
        slots_s, loads_s = np.array(adapter_s).T
        np.maximum(wait_s, slots_s, out=wait_s)
        cost_s += loads_s
    wait_s *= weight
    cost_s += wait_s
    cost_s += 1.0
    scores: list[float] = np.reciprocal(cost_s).tolist()
    return scores


def _uncached(lanes: Lanes, count: int, prompt: int, cached_tokens: Mapping[int, int]) -> Column:
    """Tokens each has to compute."""
    tokens = np.full(count, float(max(1, prompt)))
    cached = len(cached_tokens)
    places = lanes.places(np.fromiter(cached_tokens, np.intp, cached))
    there = places >= 0
    uncached = np.maximum(1.0, prompt - np.fromiter(cached_tokens.values(), np.float64, cached))
    tokens[places[there]] = uncached[there]
    return tokens
