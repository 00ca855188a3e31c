"""One replica's scheduler on virtual time: continuous batching, chunked prefill, prefix caching, preemption.

It follows vLLM's v1 scheduler where a router can see the difference. Each step computes one token for every decoding sequence and, with
what is left of the step's token budget, prompts in order of arrival; a waiting request is admitted when its whole context fits the KV
cache beside what is running; when decoding runs out of KV the youngest is preempted and computed anew. README.md lists what is not
modelled.

Fast because nothing is done per token: a step with prompts in it is one event, steps that only decode are taken together up to the next
one that changes anything, in closed form. Nothing is random. Cost: about 6 µs an event, 10 events a request.

Not here: who decides which replica (simulation), how much a step takes (profiles).
"""

from __future__ import annotations

import math
from collections import deque
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from bench.replay.adapters import Adapters, AdapterSlots
from bench.replay.cache import KVCache
from bench.replay.job import BLOCK_TOKENS, Job, pairs_of
from bench.replay.profiles import Profile
from bench.replay.promises import Promises

NEVER = math.inf


class Gauges(NamedTuple):
    """What /metrics says."""

    waiting: int
    running: int
    kv_usage: float
    adapters_active: frozenset[str] = frozenset()
    adapters_waiting: frozenset[str] = frozenset()
    kv_tokens: int = 0
    """Of its KV cache; 0: it does not say."""


class Events(NamedTuple):
    """What became true at the end of a step."""

    first_tokens: list[Job]
    finished: list[Job]


class Engine:
    """`submit` at any time; `advance` exactly at `next_s`, the end of what it is doing; infinite while idle."""

    __slots__ = (
        "_adapters", "_chunks", "_context", "_decoding", "_jump", "_order", "_pace", "_prefilling", "_start_s", "_steps", "busy_s",
        "cache", "failing", "next_s", "preemptions", "prefilled_tokens", "profile", "promises", "running", "speed", "up", "waiting",
    )  # fmt: skip

    def __init__(
        self, profile: Profile, *, speed: float = 1.0, offload_tokens: int = 0, adapters: Adapters | None = None, promises: bool = False
    ) -> None:
        """`speed`: 0.5 takes twice as long for everything. `promises`: keep what a clairvoyant wants to know of the queue."""
        self.profile = profile
        self.speed = speed
        self.cache = KVCache(profile.kv_tokens, offload_tokens)
        self.waiting: deque[Job] = deque()
        self.running: dict[Job, None] = {}
        """In the batch, oldest first; those still computing their prompt too."""
        self.promises = Promises() if promises else None
        self.up = True
        self.failing = False
        """It answers, but with an error."""
        self.next_s = NEVER
        self.busy_s = 0.0
        self.preemptions = 0
        self.prefilled_tokens = 0
        self._adapters = AdapterSlots(adapters) if adapters else None
        self._prefilling: list[Job] = []
        """Those of `running` whose prompt is not computed yet, oldest first."""
        self._decoding: list[tuple[int, int, Job]] = []
        """Heap of (the decode step after which it is done, order, job)."""
        self._order = 0
        self._context = 0
        """Tokens of context of all that decode."""
        self._steps = 0
        """Decode steps since the engine started."""
        # the step, or the run of decode steps, that ends at `next_s`
        self._chunks: list[tuple[Job, int]] = []
        self._jump = 0
        self._start_s = 0.0
        self._pace = speed
        """`speed` when it was planned."""

    # what others see

    def gauges(self, now_s: float) -> Gauges:
        """As of `now_s`, which is before `next_s`."""
        cache, count = self.cache, len(self._decoding)
        used = cache.used
        if self._jump > 1:
            used += count * max(0, self._steps_by(now_s) - 1)
        active = waiting = frozenset[str]()
        if self._adapters is not None:
            active = frozenset(job.adapter for job in self.running if job.adapter)
            waiting = frozenset(job.adapter for job in self.waiting if job.adapter)
        return Gauges(len(self.waiting), len(self.running), min(1.0, used / cache.capacity), active, waiting, cache.capacity)

    @property
    def decoding(self) -> int:
        """Sequences past their first token."""
        return len(self._decoding)

    @property
    def overhead_s(self) -> float:
        """A step's time but for prompt tokens."""
        profile = self.profile
        count = len(self._decoding)
        return (profile.step_base_s + count * profile.sequence_s + self._context * profile.kv_token_s) / self._pace

    def step_left_s(self, now_s: float) -> float:
        """Of the step under way, of those that only decode the one under way."""
        if self._jump == 1:
            return self.next_s - now_s
        return self._start_s + self._decode_s(self._steps_by(now_s)) - now_s

    def prefill_left(self) -> tuple[int, float]:
        """Prompt tokens and attention pairs of running requests that are not being computed yet."""
        tokens, pairs = 0, 0.0
        for job in self._prefilling:
            doing = next((chunk for each, chunk in self._chunks if each is job), 0)
            left = job.context() - job.computed - doing
            tokens += left
            pairs += pairs_of(job.computed + doing, left)
        return tokens, pairs

    def finishing(self) -> list[tuple[int, int]]:
        """(decode steps from now, tokens it holds alone) of every decoding request, first to finish first."""
        return [
            (at - self._steps, job.context() + self._steps - job.decoded_from - job.held * BLOCK_TOKENS)
            for at, _, job in sorted(self._decoding)
        ]

    def adapter_s(self, adapter: str) -> float:
        """Until it could run here."""
        if self._adapters is None:
            return 0.0
        left = ((job, job.output_tokens - job.generated - self._steps + job.decoded_from) for job in self.running)
        return self._adapters.wait_s(adapter, left, self.overhead_s)

    # what happens to it

    def submit(self, job: Job, now_s: float) -> None:
        """Queue it. It must fit the KV cache alone."""
        self.waiting.append(job)
        if self.promises is not None:
            self.promises.add(job, self.cache)
        if self.next_s == NEVER:
            self._plan(now_s)
        elif self._jump > 1:
            self._cut(now_s)

    def advance(self) -> Events:
        """What is being done is done; go on with the next."""
        now_s = self.next_s
        self.busy_s += now_s - self._start_s
        first_tokens: list[Job] = []
        finished: list[Job] = []
        decoding = self._decoding
        if decoding:
            steps, count = self._jump, len(decoding)
            self._steps += steps
            self._context += steps * count
            self.cache.used += steps * count
            while decoding and decoding[0][0] <= self._steps:
                finished.append(self._done(heappop(decoding)[2], now_s))
        for job, chunk in self._chunks:
            self._computed(job, chunk, now_s, first_tokens, finished)
        self.cache.evict()
        self._plan(now_s)
        return Events(first_tokens, finished)

    def stop(self) -> list[Job]:
        """The process dies: what it had is lost, and returned."""
        lost = [*self.running, *self.waiting]
        self.running.clear()
        self.waiting.clear()
        self._prefilling.clear()
        self._decoding.clear()
        self._chunks = []
        if self._adapters is not None:
            self._adapters.clear()
        self._context = self._jump = 0
        self.cache.clear()
        self.next_s = NEVER
        self.up = False
        if self.promises is not None:
            self.promises = Promises()
        return lost

    # the scheduler

    def _plan(self, now_s: float) -> None:
        """Begin the next step, or the next run of steps that only decode."""
        decoding, cache, profile = self._decoding, self.cache, self.profile
        self._pace = self.speed
        room_found = False
        while decoding and cache.used + len(decoding) > cache.capacity:
            self._preempt()
            room_found = True
        count = len(decoding)
        chunks: list[tuple[Job, int]] = []
        self._chunks = chunks
        self._start_s = now_s
        budget = profile.batch_tokens - count
        for job in self._prefilling:
            if budget <= 0:
                break
            budget = self._chunk(job, budget)
        extra_s = self._admit(budget) if self.waiting and budget > 0 and not room_found else 0.0
        self._jump = 1
        if chunks:
            work_s = profile.step_base_s + (count + len(chunks)) * profile.sequence_s + self._context * profile.kv_token_s
            for job, chunk in chunks:
                work_s += chunk * profile.prefill_token_s + pairs_of(job.computed, chunk) * profile.attention_pair_s
            self.next_s = now_s + (work_s + extra_s) / self._pace
        elif count:
            self._jump = max(1, min(decoding[0][0] - self._steps, (cache.capacity - cache.used) // count))
            self.next_s = now_s + self._decode_s(self._jump)
        else:
            self.next_s = NEVER

    def _chunk(self, job: Job, budget: int) -> int:
        chunk = min(budget, job.context() - job.computed)
        self._chunks.append((job, chunk))
        return budget - chunk

    def _admit(self, budget: int) -> float:
        """Take in whom there is room for, in order. Seconds that adds to the step besides the work."""
        extra_s, room, running_max = 0.0, len(self._decoding), self.profile.running_max
        waiting, skipped = self.waiting, []
        while waiting and budget > 0 and len(self.running) < running_max:
            job = waiting[0]
            if self._adapters is not None and not self._adapters.fits(job.adapter, self.running):
                skipped.append(waiting.popleft())  # others need not wait for that
                continue
            if not self.cache.admit(job, room):
                break
            waiting.popleft()
            extra_s += self._admitted(job)
            budget = self._chunk(job, budget)
        waiting.extendleft(reversed(skipped))
        return extra_s

    def _admitted(self, job: Job) -> float:
        """Seconds its admission adds to the step."""
        self.running[job] = None
        self._prefilling.append(job)
        job.decoded_from = self._steps
        if self.promises is not None:
            self.promises.begun(job)
        if job.cached_tokens < 0:
            job.cached_tokens = job.computed
        extra_s = job.load_tokens * self.profile.offload_token_s
        if self._adapters is not None:
            extra_s += self._adapters.admit(job.adapter, self.running)
        return extra_s

    def _computed(self, job: Job, chunk: int, now_s: float, first_tokens: list[Job], finished: list[Job]) -> None:
        job.computed += chunk
        self.prefilled_tokens += chunk
        self.cache.register(job)
        context = job.context()
        if job.computed < context:
            return
        self._prefilling.remove(job)
        if self.promises is not None:
            self.promises.done(job)
        if job.first_token_s < 0:
            job.first_token_s = now_s
            first_tokens.append(job)
        left = job.output_tokens - job.generated - 1  # the end of a prefill says a token, also after a preemption
        job.decoded_from = self._steps
        if not left:
            finished.append(self._done(job, now_s))
            return
        self._context += context
        self._order += 1
        heappush(self._decoding, (self._steps + left, self._order, job))

    def _done(self, job: Job, now_s: float) -> Job:
        decoded = self._steps - job.decoded_from
        context = job.context() + decoded
        if decoded:
            self._context -= context
        self.cache.release(job, context)
        del self.running[job]
        job.finished_s = now_s
        return job

    def _preempt(self) -> None:
        """The youngest gives back its KV and is computed anew, with what it has said, before anybody else is admitted."""
        job = next(reversed(self.running))
        del self.running[job]
        if job in self._prefilling:
            self._prefilling.remove(job)
            self.cache.release(job, job.context())
            if self.promises is not None:
                self.promises.done(job)
        else:
            decoded = self._steps - job.decoded_from
            context = job.context() + decoded
            self._context -= context
            self._decoding[:] = [entry for entry in self._decoding if entry[2] is not job]
            heapify(self._decoding)
            self.cache.release(job, context)
            job.generated += decoded + 1
        self.waiting.appendleft(job)
        self.preemptions += 1
        if self.promises is not None:
            self.promises.add(job, self.cache)

    # decoding in closed form

    def _decode_s(self, steps: int) -> float:
        """Each step's context is longer than the one before by a token for each sequence."""
        count = len(self._decoding)
        growth_s = self.profile.kv_token_s / self._pace * count
        return steps * self.overhead_s + growth_s * steps * (steps - 1) / 2

    def _steps_by(self, now_s: float) -> int:
        """Steps of this run of them that are over, or under way, at `now_s`: at least one."""
        past_s = now_s - self._start_s
        a = self.profile.kv_token_s / self._pace * len(self._decoding) / 2
        b = self.overhead_s - a
        steps = math.ceil(2 * past_s / (b + math.sqrt(b * b + 4 * a * past_s))) if past_s > 0 else 1
        return max(1, min(self._jump, steps))

    def _cut(self, now_s: float) -> None:
        """Somebody came: stop after the step under way."""
        self._jump = self._steps_by(now_s)
        self.next_s = max(now_s, self._start_s + self._decode_s(self._jump))
