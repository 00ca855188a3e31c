"""One endpoint as its requests' first tokens and ends show it: its prompts in order, its load, what was learned of it.

`Work` is one prompt on its way, `Lane` the endpoint. Not here: all of them together and what a further prompt meets there (cost_lanes).
Nothing here grows but by requests in flight, and `named`, up to `cost_lanes.ADAPTERS_MAX`. Cost of a request, from `Work` to `leave`: 3 µs;
5 more where its answer comes whole and teaches something.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from math import inf

from epp.plugins.cost_model import CostModel
from epp.types import Endpoint

ALIKE = 1.3
"""An endpoint that takes up to so many times what is predicted, or as little, is like the others."""
ODD = 4.0
"""What takes so many times what is usual there, or as little, counts as if it were that: it has reasons of its own."""
PRIOR_S = 20.0
"""Seconds taken, and as many predicted, that an endpoint starts with."""
DECODE_START_S = 5.0
AVERAGED_S = 0.25
"""What others have there is an average over readings of so long, for engines' gauges lag behind by a step or two."""

NOTHING = 0.0, 0.0


class Work:
    """One prompt on its way through an endpoint."""

    __slots__ = (
        "adapter", "before", "context", "done", "loads", "miss_s", "moved", "pairs", "prompt", "seconds", "sent_s", "streamed", "tokens",
    )  # fmt: skip

    def __init__(
        self, prompt: int, cached: int, lane: Lane, model: CostModel, *, streamed: bool, adapter: str, load_s: float, sent_s: float
    ) -> None:
        self.prompt = prompt
        self.tokens = tokens = max(1, prompt - cached)
        """To be computed."""
        self.pairs = pairs = tokens * (cached + tokens / 2)
        self.context = context = lane.context
        """Tokens decoding there when it was sent."""
        self.adapter = adapter
        """If any; `loads`: it is not there yet."""
        self.loads = load_s > 0.0
        once_s, each_s, by_pairs_s = model.once_s, model.by_tokens_s + model.by_context_s * context, model.by_pairs_s
        slowness = lane.slowness
        self.seconds = (once_s + tokens * each_s + by_pairs_s * pairs) * slowness + load_s  # `CostModel.prefill_s`, twice
        self.miss_s = (once_s + prompt * each_s + by_pairs_s * (prompt * prompt / 2)) * slowness + load_s
        """If nothing of it is cached."""
        self.sent_s = sent_s
        self.moved = False
        """The gateway took it to another endpoint than we said, so that its place in the queue is not known."""
        self.streamed = streamed
        """Its first token will be seen."""
        self.before = lane.computed(sent_s) if not streamed else NOTHING
        """What the lane had computed when it was sent, where its end is to tell what that takes."""
        self.done = False


class Lane:
    """One endpoint: its prompts in order, and what was learned of it."""

    __slots__ = (
        "adapters", "context", "decode_s", "endpoint", "ends_s", "history_price_s", "history_s", "last_s", "loaded", "missed_s", "named",
        "observed_s", "others", "others_waiting", "overdue_s", "pending_s", "predicted_s", "queue", "queued_tokens", "read_s", "requests", "row",
        "slot", "slowness", "taught_s", "through_pairs", "through_tokens", "took_s", "used", "weighed_s",
    )  # fmt: skip

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.slot = endpoint.slot
        self.queue: deque[Work] = deque()
        self.pending_s, self.queued_tokens = 0.0, 0
        """Of all of `queue`."""
        self.last_s = 0.0
        """When a first token came last."""
        self.history_s, self.observed_s, self.history_price_s, self.weighed_s = 0.0, 0.0, 0.0, -inf
        """Seconds spent on prompts, of so many in all, both fading; what they add to the wait of one more; when they were looked at last
        (cost_history)."""
        self.through_tokens, self.through_pairs = 0.0, 0.0
        """Of all prompts it is through with, or was when their clients left."""
        self.taught_s = -inf
        """When a whole answer taught something last."""
        self.context = 0
        """Prompt tokens of all requests in flight: what its KV cache holds at least."""
        self.requests = 0
        self.others = self.others_waiting = 0.0
        """Requests there that we did not send, and those of them that wait: another picker's, or ours from before a restart."""
        self.read_s = -inf
        """When the reading was taken that they were last told from."""
        self.adapters: dict[str, int] = {}
        """LoRA adapters of the requests in flight, and how many each has."""
        self.loaded: dict[str, None] = {}
        """Adapters that are loaded, as far as we sent requests for them; the least recently used first."""
        self.named: set[str] = set()
        """What its engine has called LoRA adapters."""
        self.decode_s = DECODE_START_S
        """From first to last token, of its requests."""
        self.took_s = self.predicted_s = PRIOR_S
        self.slowness = 1.0
        """Times what the model says."""
        # what a prompt would meet here: made with the row, from all of the above
        self.ends_s = self.overdue_s = self.missed_s = 0.0
        """When the prompt at the head, or the last there was, should be through; when it is clear that it was not cached; when it is
        through in that case."""
        self.used = 1.0
        """Tokens in the KV cache, and on their way there."""
        self.row: Row = (self.slot, 0.0, 0.0, 1.0, 0.0, 0.0, inf, self)

    def look(self) -> None:
        """Compare a new reading with what we know of. Before each change to it, so that both are of the same moment."""
        endpoint = self.endpoint
        weight = min(1.0, (endpoint.scraped_at_s - self.read_s) / AVERAGED_S)
        self.read_s = endpoint.scraped_at_s
        unread = endpoint.sent_requests
        self.others += weight * (endpoint.waiting + endpoint.running - max(0, self.requests - unread) - self.others)
        self.others_waiting += weight * (endpoint.waiting - max(0, len(self.queue) - unread) - self.others_waiting)

    def kv_used(self) -> float:
        """Tokens its KV cache holds, and those that have no room there yet."""
        endpoint = self.endpoint
        used = endpoint.kv_usage * endpoint.trusted * endpoint.kv_capacity_tokens
        queue = self.queue
        if queue:
            length = len(queue)
            unread = int(endpoint.waiting) + endpoint.sent_requests
            if unread >= length:
                used += self.queued_tokens
            elif 2 * unread > length:
                used += self.queued_tokens - sum([work.tokens for work in islice(queue, length - unread)])
            elif unread:
                used += sum([work.tokens for work in islice(reversed(queue), unread)])
        return max(used, self.context, 1.0)

    def slot_s(self, adapter: str) -> float:
        """Until one more LoRA adapter can run there: as many as do end as is too much, each with the last of its requests."""
        lacking = len(self.adapters) + 1 - self.endpoint.adapters_max
        if adapter in self.adapters or lacking <= 0 or not self.endpoint.adapters_max:
            return 0.0
        ends_per_s = sum(1.0 / (self.decode_s * (1.0 + 0.5 * (count - 1))) for count in self.adapters.values())
        return lacking / ends_per_s if ends_per_s else 0.0

    def add(self, work: Work) -> None:
        self.queue.append(work)
        self.pending_s += work.seconds
        self.queued_tokens += work.tokens
        self.context += work.prompt
        self.requests += 1
        if work.adapter:
            self.adapters[work.adapter] = self.adapters.get(work.adapter, 0) + 1
            self.loaded.pop(work.adapter, None)
            self.loaded[work.adapter] = None
            idle = [each for each in self.loaded if each not in self.adapters]
            for each in idle[: max(0, len(self.loaded) - self.endpoint.adapters_max)]:
                del self.loaded[each]

    def through(self, work: Work, now_s: float) -> None:
        """Its first token came, so it is computed, and so are those sent before it: engines take prompts in order."""
        took_s, seconds = now_s - max(self.last_s, self.queue[0].sent_s), 0.0
        while self.queue:
            first = self.queue.popleft()
            seconds += first.seconds
            self.pending_s -= first.seconds
            self.queued_tokens -= first.tokens
            self.through_tokens += first.tokens
            self.through_pairs += first.pairs
            first.done = True
            if first is work:
                break
        if not self.queue:
            self.pending_s = 0.0
        self.last_s = now_s
        self.history_s += min(took_s, ODD * seconds)

    def computed(self, now_s: float) -> tuple[float, float]:
        """Tokens and pairs it ever computed: of the prompt at the head as much as there was time for."""
        if not self.queue:
            return self.through_tokens, self.through_pairs
        head = self.queue[0]
        part = min(1.0, max(0.0, now_s - max(self.last_s, head.sent_s)) / head.seconds)
        return self.through_tokens + part * head.tokens, self.through_pairs + part * head.pairs

    def settle(self, now_s: float) -> None:
        """Nobody tells when the prompt of an answer that comes whole is through: it is taken to be when it should be."""
        while self.queue and not self.queue[0].streamed:
            head = self.queue[0]
            ends_s = max(self.last_s, head.sent_s) + head.seconds
            if ends_s > now_s:
                break
            self.through(head, ends_s)

    def out(self, work: Work) -> None:
        """It is not in the queue any more, and those before it are."""
        work.done = True
        self.queue.remove(work)
        self.queued_tokens -= work.tokens
        self.pending_s = self.pending_s - work.seconds if self.queue else 0.0

    def leave(self, work: Work, now_s: float) -> None:
        """Its request is over."""
        self.requests -= 1
        self.context -= work.prompt
        if work.adapter:
            self.adapters[work.adapter] -= 1
            if not self.adapters[work.adapter]:
                del self.adapters[work.adapter]
        if not work.done:
            if work is self.queue[0]:  # the engine goes on with the next
                self.through_tokens, self.through_pairs = self.computed(now_s)
                ends_s = max(self.last_s, work.sent_s) + work.seconds
                self.last_s = now_s if work.streamed else min(now_s, ends_s)
            self.out(work)


Row = tuple[int, float, float, float, float, float, float, Lane]
"""What a prompt meets at an endpoint, whatever it is: slot; until when the one at the head may keep it waiting, 0 without one (the lane's
`ends_s`, `overdue_s` and `missed_s` tell more); seconds of those behind that, and what its history adds; what a second of prefill costs there in
all; prompt tokens in flight; requests past their first token; KV-cache tokens that still fit, infinite while its size is not known; the
lane."""
