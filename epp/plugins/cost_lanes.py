"""All endpoints of a pool as their requests show them, and what a further prompt would meet at each.

`Lanes` hears what happens to requests and keeps a row of numbers for each endpoint, made again when something happened there; large pools
get them in columns, for numpy. Not here: one endpoint's books (cost_work), seconds of work (cost_model), the formula (scorers/cost_aware).

Cost: 1 to 1.5 µs for every lane something happened to since the last decision, and as much again in columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from math import inf
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from epp.plugins.cost_history import WEIGHED_EVERY_S, weigh
from epp.plugins.cost_model import BATCH, BATCH_EARLY_SAMPLES, CostModel
from epp.plugins.cost_work import ALIKE, ODD, Lane, Row, Work
from epp.types import Changes, Endpoint

GAP_S = 1e-3
"""First tokens closer together than this came out of one step of the engine: the work behind them is one sample."""
SAMPLE_TOKENS_MIN = 64
OVERDUE = 0.5
"""A prompt that took so much longer than predicted was not cached after all: from then on it is taken for one that is not."""
KEPT = 0.995
"""Of an endpoint's seconds taken and predicted, with every sample."""
SLOWNESS_MAX = 20.0
DECODE_WEIGHT = 0.05
LOAD_START_S, LOAD_WEIGHT, LOAD_MAX_S = 0.2, 0.1, 60.0
"""What loading a LoRA adapter is taken to take."""
TOLD_MAX, TOLD_WEIGHT = 0.2, 0.01
"""Where a larger share of the answers is streamed, their first tokens teach all there is to learn."""
TAUGHT_EVERY_S = 0.02
"""Answers of one endpoint that come sooner after another tell nothing new."""
STEP_MIN_S = 2e-4
"""No engine says a token sooner than that after the one before: what counts so many were not one after the other, or it is no count."""
OTHERS_MIN = 0.5
"""Requests of others that are as good as none."""
OTHERS_SHARE = 0.1
"""Of an endpoint's requests: where others have more there, what it computed is not known."""
MEAN_START_S, MEAN_WEIGHT = 0.1, 0.05
"""Of work, in the pool: what one of the others' prompts is taken to take."""
ADAPTERS_MAX = 10_000
"""Names of LoRA adapters that are remembered of an endpoint, and of all together."""
SLOTS_START = 64
NO_HEAD = (0.0, inf, 0.0)

Column = NDArray[np.float64]
Places = NDArray[np.intp]


class Columns(NamedTuple):
    """Of each endpoint: what its engine has to compute first (the prompt at the head, those behind it), and load."""

    ends_s: Column
    """When the head should be through."""
    overdue_s: Column
    """When it is clear that it was not cached; infinite without a head."""
    missed_s: Column
    """When it is through in that case."""
    queued_s: Column
    """Those behind it take so long; and what its history adds."""
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
        self.told = 0.0
        """Share of the answers lately whose first token was seen."""
        self.usual = 1.0
        """The slowness of the endpoint in the middle."""
        self._harm, self._crowding = harm, crowding
        self._chosen: list[Lane] = []
        self.positions: dict[int, int] = {}
        """Slot -> place among the endpoints asked for last."""
        self.rows: list[Row] = []
        """Of the endpoints asked for last, in order."""
        self._weighed_s = -inf
        """When the first of those was that was weighed longest ago."""
        self._of: Sequence[Endpoint] = ()
        self._select: slice | Places | None = None
        self._places: Places = np.zeros(0, np.intp)
        """By slot: its place among the endpoints asked for last, -1 for none."""
        self._changes, self._count = Changes(), -1
        self._touched: set[int] = set()
        """Slots whose row may be out of date."""
        self._silent: set[int] = set()
        """Slots at whose head is a prompt of which nobody will tell when it is through."""
        self._silent_s = inf
        """When the first of those should be."""
        self._unwritten: set[int] = set()
        """Slots whose row is not in the columns."""
        self._slots_max = 0
        self._values = np.zeros((len(Columns._fields), SLOTS_START))

    def now(self, endpoints: Sequence[Endpoint], now_s: float) -> list[Row]:
        """These endpoints' rows, in order, as things are now."""
        anew = self._of is not endpoints
        if anew:
            self._chosen = [self.lane(endpoint) for endpoint in endpoints]
            self.positions = {endpoint.slot: position for position, endpoint in enumerate(endpoints)}
            self._of, self._select = endpoints, None
            self._weighed_s = min([lane.weighed_s for lane in self._chosen])
        touched = self._touched
        if now_s - self._weighed_s > WEIGHED_EVERY_S:
            self._weighed_s = now_s
            touched.update([lane.slot for lane in weigh(self._chosen, now_s)])
        changes = endpoints[0].changes
        if changes.count != self._count or changes is not self._changes:
            since = changes.since(self._count) if changes is self._changes else None
            touched.update(self.by_slot if since is None else since)
            self._changes, self._count = changes, changes.count
        if self._silent_s <= now_s:
            self._wake(now_s)
        rows = self.rows
        if touched:
            by_slot, place = self.by_slot.get, self.positions.get
            for slot in touched:
                lane = by_slot(slot)
                if lane is not None:
                    lane.row = row = self._row(lane, now_s)
                    position = place(slot)
                    if position is not None and not anew:
                        rows[position] = row
            self._unwritten |= touched
            touched.clear()
        if anew:
            self.rows = rows = [lane.row for lane in self._chosen]
        return rows

    def _wake(self, now_s: float) -> None:
        """Rows whose silent head should be through by now are out of date."""
        self._silent_s = inf
        for slot in self._silent:
            lane = self.by_slot.get(slot)
            if lane is None:
                continue
            if lane.ends_s <= now_s:
                self._touched.add(slot)
            else:
                self._silent_s = min(self._silent_s, lane.ends_s)

    def columns(self) -> Columns:
        """The rows of the endpoints asked for last."""
        if self._slots_max >= self._values.shape[1]:
            self._values = np.zeros((len(Columns._fields), 2 * self._slots_max))
            self._unwritten.update(self.by_slot)
        cells: Any = self._values.data  # a third of what numpy takes to write a column
        for slot in self._unwritten:
            lane = self.by_slot.get(slot)
            if lane is not None:
                _, _, queued_s, burden, context, decoding, room, _ = lane.row
                head = (lane.ends_s, lane.overdue_s, lane.missed_s) if lane.queue else NO_HEAD
                values = (*head, queued_s, burden, context, decoding, lane.used, room, lane.decode_s)
                for field, value in enumerate(values):
                    cells[field, slot] = value
        self._unwritten.clear()
        if self._select is None:
            slots = list(self.positions)
            in_a_row = slots == list(range(slots[0], slots[0] + len(slots)))
            self._select = slice(slots[0], slots[0] + len(slots)) if in_a_row else np.array(slots)
            self._places = np.full(self._slots_max + 1, -1, np.intp)
            self._places[slots] = range(len(slots))
        return Columns(*self._values[:, self._select])

    def places(self, slots: Places) -> Places:
        """Where these slots are in the columns; -1 for those that are not."""
        if slots.max(initial=0) < len(self._places):
            return self._places[slots]
        return np.array([self.positions.get(slot, -1) for slot in slots.tolist()])

    def lane(self, endpoint: Endpoint) -> Lane:
        """The endpoint's."""
        slot = endpoint.slot
        lane = self.by_slot.get(slot)
        if lane is None or lane.endpoint is not endpoint:
            lane = self.by_slot[slot] = Lane(endpoint)
            self._slots_max = max(self._slots_max, slot)
            self._touched.add(slot)
        return lane

    def send(self, endpoint: Endpoint, prompt: int, cached: int, model_name: str, now_s: float, *, streamed: bool) -> tuple[Lane, Work]:
        """A request went there."""
        lane = self._touch(self.lane(endpoint))
        if not streamed:
            lane.settle(now_s)
        adapter = model_name if model_name in self.adapters else ""
        load_s = self.load_s if adapter and adapter not in lane.loaded else 0.0
        work = Work(prompt, cached, lane, self.model, streamed=streamed, adapter=adapter, load_s=load_s, sent_s=now_s)
        lane.add(work)
        self.mean_s += MEAN_WEIGHT * (work.seconds - self.mean_s)
        return lane, work

    def first_token(self, lane: Lane, work: Work, now_s: float) -> None:
        self._touch(lane)
        self.told += TOLD_WEIGHT * (1.0 - self.told)
        if work.moved:
            lane.out(work)
        else:
            self._learn(lane, work, now_s)
            lane.through(work, now_s)

    def answered(self, lane: Lane, work: Work, tokens: int, now_s: float) -> None:
        """A whole answer of so many tokens came. `over` is still to be told."""
        self._touch(lane)
        self.told -= TOLD_WEIGHT * self.told
        if work.moved:
            return
        lane.settle(now_s)
        if not work.done:
            lane.through(work, now_s)
        if now_s - lane.taught_s < TAUGHT_EVERY_S or self.told > TOLD_MAX:
            return
        if not work.loads and lane.others <= OTHERS_MIN + OTHERS_SHARE * lane.requests:
            self._learn_whole(lane, work, tokens + 1, now_s)

    def over(self, lane: Lane, work: Work, now_s: float) -> None:
        self._touch(lane)
        lane.leave(work, now_s)

    def removed(self, endpoint: Endpoint) -> None:
        lane = self.by_slot.pop(endpoint.slot, None)
        self._silent.discard(endpoint.slot)
        self._of = ()
        if lane is not None and lane.named:
            self.adapters = set()
            for each in self.by_slot.values():
                self._name(each.named)

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
            names = endpoint.adapters_active | endpoint.adapters_waiting
            if not names <= lane.named:
                lane.named |= names
                self._name(names)

    def _name(self, names: AbstractSet[str]) -> None:
        """These are adapters."""
        if len(self.adapters) < ADAPTERS_MAX:
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
        self._compare(lane, min(took_s, ODD * lane.slowness * predicted_s), predicted_s)

    def _learn_whole(self, lane: Lane, work: Work, steps: int, now_s: float) -> None:
        """Its steps, and all prompts computed from its sending to now, took from its sending to now."""
        took_s, (all_tokens, all_pairs) = now_s - work.sent_s, lane.computed(now_s)
        tokens, pairs = all_tokens - work.before[0], all_pairs - work.before[1]
        if took_s < max(GAP_S, steps * STEP_MIN_S) or tokens < SAMPLE_TOKENS_MIN:
            return
        lane.taught_s = now_s
        model, context = self.model, (work.context + lane.context) / 2
        predicted_s = model.answer_s(steps, tokens, pairs, context)
        model.learn_whole(steps, tokens, pairs, context, took_s * self.usual / lane.slowness)
        if model.whole <= BATCH_EARLY_SAMPLES:  # what a step takes may not be known well
            return
        if not model.whole % BATCH:
            ranked = sorted([each.slowness for each in self.by_slot.values()])
            self.usual = ranked[(len(ranked) - 1) // 2]
        slowness = lane.slowness
        self._compare(lane, min(ODD * slowness, max(slowness / ODD, took_s / predicted_s)), 1.0)
        said_s = steps * (model.once_s + model.step_by_context_s * context) * slowness
        lane.decode_s += DECODE_WEIGHT * (min(said_s, took_s) - lane.decode_s)

    @staticmethod
    def _compare(lane: Lane, took_s: float, predicted_s: float) -> None:
        """How fast it is, beside the others."""
        lane.took_s = KEPT * lane.took_s + took_s
        lane.predicted_s = KEPT * lane.predicted_s + predicted_s
        ratio = lane.took_s / lane.predicted_s
        lane.slowness = 1.0 if 1 / ALIKE < ratio < ALIKE else min(SLOWNESS_MAX, max(1 / SLOWNESS_MAX, ratio))

    def _row(self, lane: Lane, now_s: float) -> Row:
        endpoint, queue, slot = lane.endpoint, lane.queue, lane.slot
        if endpoint.scraped_at_s != lane.read_s:
            self._look(lane)
        if self._silent:
            self._silent.discard(slot)
        if queue and not queue[0].streamed:
            self._settle(lane, now_s)
        until_s, queued_s = 0.0, lane.history_price_s
        length = len(queue)
        waiting, decoding = float(length), float(lane.requests - length)
        if length:
            head = queue[0]
            seconds = head.seconds
            began_s = max(lane.last_s, head.sent_s)
            lane.ends_s = ends_s = began_s + seconds
            lane.overdue_s = ends_s + OVERDUE * seconds
            lane.missed_s = began_s + head.miss_s
            until_s = max(ends_s, lane.missed_s)
            if length > 1:
                queued_s += max(lane.pending_s - seconds, 0.0)
        if lane.others > OTHERS_MIN:
            others, others_waiting = self._others(lane)
            waiting += others_waiting
            queued_s += others_waiting * self.mean_s
            decoding += others - others_waiting
        room = inf
        if endpoint.kv_capacity_tokens:
            lane.used = used = lane.kv_used()
            room = endpoint.kv_capacity_tokens - used
        burden = lane.slowness * (1.0 + self._harm * decoding + self._crowding * waiting)
        return slot, until_s, queued_s, burden, lane.context, decoding, room, lane

    def _settle(self, lane: Lane, now_s: float) -> None:
        """Prompts that should be through are; the next one, if silent as well, will be when it should."""
        lane.settle(now_s)
        if lane.queue and not lane.queue[0].streamed:
            head = lane.queue[0]
            self._silent.add(lane.slot)
            self._silent_s = min(self._silent_s, max(lane.last_s, head.sent_s) + head.seconds)

    @staticmethod
    def _others(lane: Lane) -> tuple[float, float]:
        """How many requests of others are there, as far as its reading is to be trusted, and how many of them wait."""
        trusted = lane.endpoint.trusted
        others = lane.others * trusted
        return (others, min(others, max(0.0, lane.others_waiting * trusted))) if others > OTHERS_MIN else (0.0, 0.0)
