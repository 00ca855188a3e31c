"""What is on its way through each endpoint: its prompts in order, and what a further one would meet there.

A `Lane` is one endpoint as its requests' first tokens and ends show it. `Lanes` has all of them, and keeps a row of numbers for each that is
made again when something happened there; large pools get them in columns, for numpy.

Not here: seconds of work (cost_model), the formula (scorers/cost_aware). Cost: 1 µs for every lane something happened to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import islice
from math import inf
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from epp.plugins.cost_model import CostModel
from epp.types import Changes, Endpoint

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
LOAD_START_S, LOAD_WEIGHT, LOAD_MAX_S = 0.2, 0.1, 60.0
"""What loading a LoRA adapter is taken to take."""
AVERAGED_S, OTHERS_MIN = 0.25, 0.5
"""What others have there is an average over readings of so long, for engines' gauges lag behind by a step or two; less than that is none."""
MEAN_START_S, MEAN_WEIGHT = 0.1, 0.05
"""Of work, in the pool: what one of the others' prompts is taken to take."""
ADAPTERS_MAX = 10_000
"""Names of LoRA adapters that are remembered of an endpoint."""
SLOTS_START = 64

Column = NDArray[np.float64]


Row = tuple[float, float, float, float, float, float, float, float, float, float]
"""What a prompt would meet at an endpoint, in the order of `Columns`' fields."""


class Columns(NamedTuple):
    """Of each endpoint: what its engine has to compute first (the prompt at the head, those behind it), and load."""

    ends_s: Column
    """When the head should be through."""
    overdue_s: Column
    """When it is clear that it was not cached; infinite without a head."""
    missed_s: Column
    """When it is through in that case."""
    queued_s: Column
    """Those behind it take so long."""
    burden: Column
    """What a second of prefill costs there in all."""
    context: Column
    """Prompt tokens in flight."""
    decoding: Column
    """Requests past their first token."""
    used: Column
    """Tokens in the KV cache, and on their way there."""
    room: Column
    """Tokens that still fit; infinite while its size is not known."""
    decode_s: Column
    """From first to last token."""


class Work:
    """One prompt on its way through an endpoint."""

    __slots__ = ("adapter", "context", "done", "loads", "miss_s", "moved", "pairs", "prompt", "seconds", "sent_s", "streamed", "tokens")

    def __init__(
        self, prompt: int, cached: int, lane: Lane, model: CostModel, *, streamed: bool, adapter: str, load_s: float, sent_s: float
    ) -> None:
        self.prompt = prompt
        self.tokens = max(1, prompt - cached)
        """To be computed."""
        self.pairs = self.tokens * (cached + self.tokens / 2)
        self.context = lane.context
        """Tokens decoding there when it was sent."""
        self.adapter = adapter
        """If any; `loads`: it is not there yet."""
        self.loads = load_s > 0.0
        self.seconds = model.prefill_s(self.tokens, self.pairs, lane.context) * lane.slowness + load_s
        self.miss_s = model.prefill_s(prompt, prompt * prompt / 2, lane.context) * lane.slowness + load_s
        """If nothing of it is cached."""
        self.sent_s = sent_s
        self.moved = False
        """The gateway took it to another endpoint than we said, so that its place in the queue is not known."""
        self.streamed = streamed
        """Its first token will be seen."""
        self.done = False


class Lane:
    """One endpoint: its prompts in order, and what was learned of it."""

    __slots__ = (
        "adapters", "context", "decode_s", "endpoint", "last_s", "loaded", "named", "others", "others_waiting", "pending_s", "predicted_s",
        "queue", "queued_tokens", "read_s", "requests", "row", "slot", "slowness", "took_s",
    )  # fmt: skip

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.slot = endpoint.slot
        self.queue: deque[Work] = deque()
        self.pending_s, self.queued_tokens = 0.0, 0
        """Of all of `queue`."""
        self.last_s = 0.0
        """When a first token came last."""
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
        self.row: Row = (0.0, inf, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, inf, 0.0)

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
        unread = min(len(queue), int(endpoint.waiting) + endpoint.sent_requests)
        if 2 * unread > len(queue):
            used += self.queued_tokens - sum(work.tokens for work in islice(queue, len(queue) - unread))
        elif unread:
            used += sum(work.tokens for work in islice(reversed(queue), unread))
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
        while self.queue:
            first = self.queue.popleft()
            self.pending_s -= first.seconds
            self.queued_tokens -= first.tokens
            first.done = True
            if first is work:
                break
        if not self.queue:
            self.pending_s = 0.0
        self.last_s = now_s

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
                ends_s = max(self.last_s, work.sent_s) + work.seconds
                self.last_s = now_s if work.streamed else min(now_s, ends_s)
            self.out(work)


class Lanes:
    """See the module. `harm` and `crowding` are the scorer's."""

    def __init__(self, model: CostModel, *, harm: float, crowding: float) -> None:
        self.model = model
        self.by_slot: dict[int, Lane] = {}
        self.adapters: set[str] = set()
        """Names that any engine has called so."""
        self.load_s = LOAD_START_S
        """To load an adapter."""
        self.mean_s = MEAN_START_S
        """Seconds of work of a request."""
        self._harm, self._crowding = harm, crowding
        self.positions: dict[int, int] = {}
        """Slot -> place among the endpoints asked for last."""
        self._of: Sequence[Endpoint] = ()
        self._chosen: list[Lane] = []
        self._select: slice | NDArray[np.intp] | None = None
        self._changes, self._count = Changes(), -1
        self._touched: set[int] = set()
        """Slots whose row may be out of date."""
        self._silent: set[int] = set()
        """Slots at whose head is a prompt of which nobody will tell when it is through."""
        self._unwritten: set[int] = set()
        """Slots whose row is not in the columns."""
        self._values = np.zeros((len(Columns._fields), SLOTS_START))

    def now(self, endpoints: Sequence[Endpoint], now_s: float) -> list[Lane]:
        """These endpoints' lanes, in order, their rows as things are now."""
        if self._of is not endpoints:
            self._chosen = [self.lane(endpoint) for endpoint in endpoints]
            self.positions = {endpoint.slot: position for position, endpoint in enumerate(endpoints)}
            self._of, self._select = endpoints, None
        changes = endpoints[0].changes
        if changes is not self._changes or changes.count != self._count:
            since = changes.since(self._count) if changes is self._changes else None
            self._touched.update(self.by_slot if since is None else since)
            self._changes, self._count = changes, changes.count
        for slot in self._silent:
            lane = self.by_slot.get(slot)
            if lane is not None and lane.row[0] <= now_s:
                self._touched.add(slot)
        if self._touched:
            for slot in self._touched:
                lane = self.by_slot.get(slot)
                if lane is not None:
                    lane.row = self._row(lane, now_s)
            self._unwritten |= self._touched
            self._touched.clear()
        return self._chosen

    def columns(self) -> Columns:
        """The rows of the endpoints asked for last."""
        most = max(self.by_slot, default=0)
        if most >= self._values.shape[1]:
            self._values = np.zeros((len(Columns._fields), 2 * most))
            self._unwritten.update(self.by_slot)
        for slot in self._unwritten:
            lane = self.by_slot.get(slot)
            if lane is not None:
                self._values[:, slot] = lane.row
        self._unwritten.clear()
        if self._select is None:
            slots = list(self.positions)
            in_a_row = slots == list(range(slots[0], slots[0] + len(slots)))
            self._select = slice(slots[0], slots[0] + len(slots)) if in_a_row else np.array(slots)
        return Columns(*self._values[:, self._select])

    def lane(self, endpoint: Endpoint) -> Lane:
        """The endpoint's."""
        slot = endpoint.slot
        lane = self.by_slot.get(slot)
        if lane is None or lane.endpoint is not endpoint:
            lane = self.by_slot[slot] = Lane(endpoint)
            self._touched.add(slot)
        return lane

    def send(self, endpoint: Endpoint, prompt: int, cached: int, model_name: str, now_s: float, *, streamed: bool) -> tuple[Lane, Work]:
        """A request went there."""
        lane = self._touch(self.lane(endpoint))
        adapter = model_name if model_name in self.adapters else ""
        load_s = self.load_s if adapter and adapter not in lane.loaded else 0.0
        work = Work(prompt, cached, lane, self.model, streamed=streamed, adapter=adapter, load_s=load_s, sent_s=now_s)
        lane.add(work)
        self.mean_s += MEAN_WEIGHT * (work.seconds - self.mean_s)
        return lane, work

    def first_token(self, lane: Lane, work: Work, now_s: float) -> None:
        self._touch(lane)
        if work.moved:
            lane.out(work)
        else:
            self._learn(lane, work, now_s)
            lane.through(work, now_s)

    def over(self, lane: Lane, work: Work, now_s: float) -> None:
        self._touch(lane)
        lane.leave(work, now_s)

    def removed(self, endpoint: Endpoint) -> None:
        self.by_slot.pop(endpoint.slot, None)
        self._of = ()

    def _touch(self, lane: Lane) -> Lane:
        """It is about to be changed."""
        self._touched.add(lane.slot)
        if lane.endpoint.scraped_at_s != lane.read_s:
            self._look(lane)
        return lane

    def _look(self, lane: Lane) -> None:
        """There is a new reading."""
        lane.look()
        endpoint = lane.endpoint
        if endpoint.adapters_max and len(lane.named) < ADAPTERS_MAX:
            for names in (endpoint.adapters_active, endpoint.adapters_waiting):
                lane.named |= names
                self.adapters |= names

    def _learn(self, lane: Lane, work: Work, now_s: float) -> None:
        """The work up to `work` took from when the endpoint began with it to now."""
        took_s = now_s - max(lane.last_s, lane.queue[0].sent_s)
        if took_s < GAP_S:
            return
        count, tokens, pairs, loads = 0, 0, 0.0, 0
        for each in lane.queue:
            count += 1
            tokens += each.tokens
            pairs += each.pairs
            loads += each.loads
            if each is work:
                break
        if tokens < SAMPLE_TOKENS_MIN:
            return
        predicted_s = self.model.prefill_s(tokens, pairs, work.context)
        if loads:
            load_s = (took_s - predicted_s * lane.slowness) / loads
            self.load_s += LOAD_WEIGHT * (min(LOAD_MAX_S, max(0.0, load_s)) - self.load_s)
            return
        self.model.learn(count, tokens, pairs, work.context, took_s)
        lane.took_s = KEPT * lane.took_s + took_s
        lane.predicted_s = KEPT * lane.predicted_s + predicted_s
        ratio = lane.took_s / lane.predicted_s
        lane.slowness = 1.0 if 1 / ALIKE < ratio < ALIKE else min(SLOWNESS_MAX, max(1 / SLOWNESS_MAX, ratio))

    def _row(self, lane: Lane, now_s: float) -> Row:
        queue, endpoint = lane.queue, lane.endpoint
        if endpoint.scraped_at_s != lane.read_s:
            self._look(lane)
        self._silent.discard(lane.slot)
        if queue and not queue[0].streamed:
            lane.settle(now_s)
            if queue and not queue[0].streamed:
                self._silent.add(lane.slot)
        ends_s = missed_s = queued_s = 0.0
        overdue_s = inf
        if queue:
            head = queue[0]
            began_s = max(lane.last_s, head.sent_s)
            ends_s = began_s + head.seconds
            overdue_s = ends_s + OVERDUE * head.seconds
            missed_s = began_s + head.miss_s
            queued_s = max(lane.pending_s - head.seconds, 0.0)
        decoding, waiting = float(lane.requests - len(queue)), float(len(queue))
        others = lane.others * endpoint.trusted
        if others > OTHERS_MIN:
            others_waiting = min(others, max(0.0, lane.others_waiting * endpoint.trusted))
            waiting += others_waiting
            queued_s += others_waiting * self.mean_s
            decoding += others - others_waiting
        burden = lane.slowness * (1.0 + self._harm * decoding + self._crowding * waiting)
        capacity = endpoint.kv_capacity_tokens
        used = lane.kv_used() if capacity else 1.0
        room = capacity - used if capacity else inf
        return ends_s, overdue_s, missed_s, queued_s, burden, lane.context, decoding, used, room, lane.decode_s
