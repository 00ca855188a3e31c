"""cost-aware-scorer: the endpoint where the first token is predicted to come soonest, with a price on what that does to the others there.

It keeps the prompts sent to each endpoint and not yet answered, in order, and so knows how long a new one would wait; what a prompt takes
is learned from first-token times (cost_model). Not here: what is cached where (the prefix producer, which remembers what was sent and so
also counts what is still on its way).

Cost: about 0.5 µs an endpoint and request.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import msgspec

from epp.plugins.base import Context, Finished, Plugin, match_of
from epp.plugins.cost_model import CostModel
from epp.types import Decision, Endpoint, LLMRequest

KEY = "cost-aware-work"
"""Of a request's attributes."""
GAP_S = 1e-3
"""First tokens closer together than this came out of one step of the engine: the work behind them is one sample."""
SAMPLE_TOKENS_MIN = 64
OVERDUE = 0.5
"""A prompt that took so much longer than predicted was not cached after all: from then on it is taken for one that is not."""
KEPT, PRIOR_S = 0.995, 20.0
"""Of an endpoint's seconds taken and predicted, with every sample; and how many it starts with."""
ALIKE, SLOWNESS_MAX = 1.3, 20.0
"""An endpoint that takes up to so many times what is predicted, or as little, is like the others."""
DECODE_START_S, DECODE_WEIGHT = 5.0, 0.05
TIGHT = 0.5
"""Below this part of its KV cache an endpoint has room for anything."""


class _Work:
    """One prompt on its way through an endpoint."""

    __slots__ = ("context", "done", "miss_s", "pairs", "prompt", "seconds", "sent_s", "tokens")

    def __init__(self, prompt: int, cached: int, *, context: int, model: CostModel, slowness: float, sent_s: float) -> None:
        self.prompt = prompt
        self.tokens = max(1, prompt - cached)
        """To be computed."""
        self.pairs = self.tokens * (cached + self.tokens / 2)
        self.context = context
        """Tokens decoding there when it was sent."""
        self.seconds = model.prefill_s(self.tokens, self.pairs, context) * slowness
        self.miss_s = model.prefill_s(prompt, prompt * prompt / 2, context) * slowness
        """If nothing of it is cached."""
        self.sent_s = sent_s
        self.done = False


class Lane:
    """One endpoint: its prompts in order, and what was learned of it."""

    __slots__ = ("context", "decode_s", "last_s", "pending_s", "predicted_s", "queue", "requests", "slowness", "took_s")

    def __init__(self) -> None:
        self.queue: deque[_Work] = deque()
        self.pending_s = 0.0
        """Of all of `queue`."""
        self.last_s = 0.0
        """When a first token came last."""
        self.context = 0
        """Prompt tokens of all requests in flight: what its KV cache holds at least."""
        self.requests = 0
        self.decode_s = DECODE_START_S
        """From first to last token, of its requests."""
        self.took_s = self.predicted_s = PRIOR_S
        self.slowness = 1.0
        """Times what the model says."""

    def wait_s(self, now_s: float) -> float:
        """Until the prompts there are through."""
        head = self.queue[0]
        took_s = now_s - max(self.last_s, head.sent_s)
        left_s = head.seconds - took_s
        if left_s < -OVERDUE * head.seconds:
            left_s = head.miss_s - took_s
        return max(left_s, 0.0) + max(self.pending_s - head.seconds, 0.0)

    def room_s(self, endpoint: Endpoint, tokens: int) -> float:
        """Until its KV cache has room for `tokens` more: requests end at the rate they take up room."""
        used = endpoint.kv_usage * endpoint.trusted * endpoint.kv_capacity_tokens
        unread = min(len(self.queue), int(endpoint.waiting) + endpoint.sent_requests)
        for i in range(1, unread + 1):  # those at the end have no room yet
            used += self.queue[-i].tokens
        used = max(used, self.context)
        lacking = used + tokens - endpoint.kv_capacity_tokens
        return lacking / used * self.decode_s if lacking > 0 and used else 0.0

    def add(self, work: _Work) -> None:
        self.queue.append(work)
        self.pending_s += work.seconds
        self.context += work.prompt
        self.requests += 1

    def through(self, work: _Work, now_s: float) -> None:
        """Its first token came, so it is computed, and so are those sent before it: engines take prompts in order."""
        while self.queue:
            first = self.queue.popleft()
            self.pending_s -= first.seconds
            first.done = True
            if first is work:
                break
        if not self.queue:
            self.pending_s = 0.0
        self.last_s = now_s

    def leave(self, work: _Work) -> None:
        """Its request is over."""
        self.requests -= 1
        self.context -= work.prompt
        if not work.done:
            work.done = True
            self.queue.remove(work)
            self.pending_s = self.pending_s - work.seconds if self.queue else 0.0

    def learn(self, model: CostModel, work: _Work, now_s: float) -> None:
        """The work up to `work` took from when the endpoint began with it to now."""
        took_s = now_s - max(self.last_s, self.queue[0].sent_s)
        if took_s < GAP_S:
            return
        count, tokens, pairs = 0, 0, 0.0
        for each in self.queue:
            count += 1
            tokens += each.tokens
            pairs += each.pairs
            if each is work:
                break
        if tokens < SAMPLE_TOKENS_MIN:
            return
        predicted_s = model.prefill_s(tokens, pairs, work.context)
        model.learn(count, tokens, pairs, work.context, took_s)
        self.took_s = KEPT * self.took_s + took_s
        self.predicted_s = KEPT * self.predicted_s + predicted_s
        ratio = self.took_s / self.predicted_s
        self.slowness = 1.0 if 1 / ALIKE < ratio < ALIKE else min(SLOWNESS_MAX, max(1 / SLOWNESS_MAX, ratio))


class CostAwareScorer(Plugin):
    """1 / (1 + cost), with cost in seconds = wait + own x (1 + harm x decoding) + spread x overhead x decoding + room

    wait: until the prompts sent there before are through. own: of the prompt's tokens not cached there and their attention to all before
    them. decoding: requests there that have their first token; harm is what a second of prefill costs each of them, spread what one more
    neighbour costs in prompt overheads. room: beyond the wait, until the KV cache has room. All learned from first-token times; before
    anything is known, 10 000 tokens a second. Meant to decide alone, with max-score-picker.
    """

    type: ClassVar[str] = "cost-aware-scorer"
    per_request: ClassVar[bool] = True
    requires: ClassVar[tuple[str, ...]] = ("prefix-match",)

    harm: Annotated[float, msgspec.Meta(ge=0)] = 0.03
    spread: Annotated[float, msgspec.Meta(ge=0)] = 0.5
    prefix_match_info_producer_name: str = ""

    def __post_init__(self) -> None:
        lanes: dict[int, Lane] = {}
        self.__dict__.update(model=CostModel(), lanes=lanes, of=(), in_order=[])

    def bind(self, context: Context) -> None:
        self.__dict__["clock"] = context.clock

    def score(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
        state = self.__dict__
        if state["of"] is not endpoints:
            state["of"], state["in_order"] = endpoints, [self._lane(endpoint) for endpoint in endpoints]
        model: CostModel = state["model"]
        now_s: float = state["clock"].now_s() if "clock" in state else 0.0
        prompt = request.prompt_tokens
        match = match_of(request, self.prefix_match_info_producer_name)
        matched: Mapping[int, int] = match.matched_tokens if match is not None else {}
        once_s, by_tokens_s, by_context_s = model.once_s, model.by_tokens_s, model.by_context_s
        miss_pairs_s = model.by_pairs_s * prompt * prompt / 2
        harm, spread_s = self.harm, self.spread * once_s
        scores: list[float] = []
        for endpoint, lane in zip(endpoints, state["in_order"], strict=True):
            cached = matched.get(endpoint.slot, 0) if matched else 0
            if cached:
                tokens = max(1, prompt - cached)
                pairs_s = model.by_pairs_s * tokens * (cached + tokens / 2)
            else:
                tokens, pairs_s = prompt, miss_pairs_s
            own_s = (once_s + tokens * (by_tokens_s + by_context_s * lane.context) + pairs_s) * lane.slowness
            queue = lane.queue
            if lane.requests:
                decoding = lane.requests - len(queue)
                wait_s = lane.wait_s(now_s) if queue else 0.0
                cost_s = wait_s + own_s * (1.0 + harm * decoding) + spread_s * decoding
            else:
                wait_s, cost_s = 0.0, own_s
            capacity = endpoint.kv_capacity_tokens
            if capacity and (lane.context + prompt > TIGHT * capacity or endpoint.kv_usage > TIGHT):
                cost_s += max(0.0, lane.room_s(endpoint, tokens) - wait_s)
            scores.append(1.0 / (1.0 + cost_s))
        return scores

    def picked(self, request: LLMRequest, decision: Decision) -> None:
        self._sent(request, decision.endpoint)

    def served(self, request: LLMRequest, endpoint: Endpoint) -> None:
        self._over(request)
        self._sent(request, endpoint)

    def first_token(self, request: LLMRequest, endpoint: Endpoint, ttft_s: float) -> None:
        del endpoint, ttft_s
        found = request.attributes.get(KEY)
        if found is None or not request.stream:  # the first piece of a whole answer is its end
            return
        lane: Lane = found[0]
        work: _Work = found[1]
        if not work.done:
            now_s: float = self.__dict__["clock"].now_s()
            lane.learn(self.__dict__["model"], work, now_s)
            lane.through(work, now_s)

    def finished(self, request: LLMRequest, endpoint: Endpoint, outcome: Finished) -> None:
        del endpoint
        lane = self._over(request)
        if lane is not None and outcome.status == 200 and outcome.ttft_s >= 0 and request.stream:
            lane.decode_s += DECODE_WEIGHT * (outcome.duration_s - outcome.ttft_s - lane.decode_s)

    def removed(self, endpoint: Endpoint) -> None:
        self.__dict__["lanes"].pop(endpoint.slot, None)
        self.__dict__["of"] = ()

    def state(self) -> dict[str, Any]:
        """What was learned."""
        model: CostModel = self.__dict__["model"]
        lanes: dict[int, Lane] = self.__dict__["lanes"]
        return {
            "samples": model.samples,
            "tokens_per_s": round(1 / model.by_tokens_s) if model.by_tokens_s else None,
            "overhead_s": model.once_s,
            "slowness": {slot: round(lane.slowness, 2) for slot, lane in lanes.items() if lane.slowness != 1.0},
        }

    def _lane(self, endpoint: Endpoint) -> Lane:
        lanes: dict[int, Lane] = self.__dict__["lanes"]
        lane = lanes.get(endpoint.slot)
        if lane is None:
            lane = lanes[endpoint.slot] = Lane()
        return lane

    def _sent(self, request: LLMRequest, endpoint: Endpoint) -> None:
        lane = self._lane(endpoint)
        match = match_of(request, self.prefix_match_info_producer_name)
        cached = match.matched_tokens.get(endpoint.slot, 0) if match is not None else 0
        state = self.__dict__
        now_s: float = state["clock"].now_s()
        work = _Work(request.prompt_tokens, cached, context=lane.context, model=state["model"], slowness=lane.slowness, sent_s=now_s)
        lane.add(work)
        request.attributes[KEY] = (lane, work)

    def _over(self, request: LLMRequest) -> Lane | None:
        found = request.attributes.pop(KEY, None)
        if found is None:
            return None
        lane: Lane = found[0]
        lane.leave(found[1])
        return lane
