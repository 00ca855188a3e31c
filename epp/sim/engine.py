"""A model server's scheduler on virtual time: continuous batching, chunked prefill, KV blocks, prefix caching, preemption.

Why: routing is only as good as the load it is tested against. This follows vLLM's v1 scheduler where a router can see the
difference: running requests are served first, each step has a token budget, a waiting request is admitted when its next chunk
fits the KV cache, the youngest is preempted when decoding runs out of blocks, only full blocks are cached, and the last prompt
token is always computed. Not modelled: the attention cost of long contexts, speculative decoding, LoRA, stop tokens (a reply always
runs to its `max_tokens`).

Not here: sockets, asyncio, the wall clock (pacing). Time is handed in and durations are handed out, in seconds of the simulated
hardware. Nothing is random: a reply is a function of the engine's seed and the prompt. Cost: about 1.5 µs per token generated.

Content is bytes, `TOKEN_BYTES` to a token; a generated token is that many ASCII characters, so the bytes a client reads are
exactly the bytes cached, and a next turn that quotes the answer hits.
"""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import xxhash

from epp.sim.kv_cache import KVCache
from epp.sim.kv_event_log import KVEventLog
from epp.types import TOKEN_BYTES

_WORDS = (
    "the and for you can not has its out one two way day new old see now how any use "
    "our all get put set run let ask say try may did had her him his who why yet far "
    "big few low top end key map bit log row tag sum net job box air sun sea ice sky "
    "red tea"
)
VOCABULARY = tuple(f"{word} ".encode() for word in _WORDS.split())
"""Every token an engine can say: `TOKEN_BYTES` long, and in need of no JSON escape."""


@dataclass(frozen=True, slots=True)
class EngineProfile:
    """What the simulated hardware and model can do. The defaults resemble an 8B model on one H100."""

    max_running: int = 16
    """Requests decoded together (vLLM's max_num_seqs)."""
    max_batched_tokens: int = 2048
    """Tokens computed in one step at most; longer prompts are prefilled in chunks."""
    kv_blocks: int = 2048
    """Blocks of KV cache, of which one is vLLM's null block."""
    block_tokens: int = 16
    step_base_s: float = 8e-3
    """A step's fixed cost: reading the weights once."""
    prefill_token_s: float = 60e-6
    decode_request_s: float = 150e-6
    """Added to a step by each request in it."""

    def __post_init__(self) -> None:
        for name, least in (("max_running", 1), ("max_batched_tokens", 1), ("kv_blocks", 2), ("block_tokens", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("prefill_token_s", "decode_request_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, but is {getattr(self, name)}")
        if self.step_base_s <= 0:
            raise ValueError(f"step_base_s must be above 0, not {self.step_base_s}: a step takes time")

    @property
    def context_tokens_max(self) -> int:
        """The longest sequence: one that fills the KV cache alone, so that every accepted request can finish."""
        return (self.kv_blocks - 1) * self.block_tokens


class Sequence:
    """One prompt and its reply, from submission to the end. Changed only by the engine."""

    __slots__ = (
        "admitted_s", "arrival_s", "blocks", "cache_salt", "cached_tokens", "computed_tokens", "content", "finish_reason", "first_token_s",
        "generated_tokens", "hashed_blocks", "hashes", "max_tokens", "prompt_bytes", "prompt_tokens",
    )  # fmt: skip

    def __init__(self, prompt: bytes, reply: bytes, max_tokens: int, cache_salt: str, arrival_s: float) -> None:
        self.cache_salt = cache_salt
        self.content = prompt + reply
        """The reply is known from the start; `generated_tokens` says how much of it has been said."""
        self.prompt_bytes = len(prompt)
        self.prompt_tokens = prompt_tokens_of(prompt)
        self.max_tokens = max_tokens
        self.arrival_s = arrival_s
        self.admitted_s = -1.0
        self.first_token_s = -1.0
        self.generated_tokens = 0
        self.computed_tokens = 0
        """Tokens whose KV is in `blocks`; one behind the last token said."""
        self.cached_tokens = 0
        """Prompt tokens found in the prefix cache at admission."""
        self.blocks: list[int] = []
        self.hashes = [xxhash.xxh3_64_intdigest(cache_salt.encode(errors="surrogatepass"))]
        """Chained: `hashes[i + 1]` names the content of block i and all before it; made as needed."""
        self.hashed_blocks = 0
        """Leading `blocks` known to the prefix cache."""
        self.finish_reason = ""
        """Empty while unfinished, then `length` or `abort`."""

    def __repr__(self) -> str:
        state = self.finish_reason or "open"
        return f"<Sequence {self.prompt_tokens}+{self.generated_tokens}/{self.max_tokens} computed={self.computed_tokens} {state}>"

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.generated_tokens

    def reply(self, start_token: int, end_token: int) -> bytes:
        """The text of reply tokens `start_token` up to `end_token`."""
        return self.content[self.prompt_bytes + start_token * TOKEN_BYTES : self.prompt_bytes + end_token * TOKEN_BYTES]

    def hashes_up_to(self, blocks: int, block_bytes: int) -> list[int]:
        """Content hashes of the first `blocks` blocks."""
        hashes = self.hashes
        while len(hashes) <= blocks:
            start = (len(hashes) - 1) * block_bytes
            hashes.append(xxhash.xxh3_64_intdigest(self.content[start : start + block_bytes], seed=hashes[-1]))
        return hashes[1 : blocks + 1]

    def full_blocks(self, tokens: int, block_bytes: int) -> int:
        """Blocks the first `tokens` tokens fill. A prompt's last token may be short of `TOKEN_BYTES`, which shifts the reply."""
        content_bytes = tokens * TOKEN_BYTES
        if tokens >= self.prompt_tokens:
            content_bytes += self.prompt_bytes - self.prompt_tokens * TOKEN_BYTES
        return content_bytes // block_bytes


def prompt_tokens_of(prompt: bytes) -> int:
    """At least one: an empty prompt still has its begin-of-text token."""
    return max(1, -(-len(prompt) // TOKEN_BYTES))


class Load(NamedTuple):
    """What the engine's gauges say."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0


class Step(NamedTuple):
    """One pass of the model. What it lists is true at `end_s`."""

    duration_s: float
    end_s: float
    emitted: list[Sequence]
    """Each said one more token."""
    finished: list[Sequence]
    """The ones of `emitted` whose token was the last."""
    admitted: list[Sequence]
    """Left the queue for the first time."""
    preempted: list[Sequence]
    prefill_tokens: int
    """Tokens computed that were known before: of prompts, and of what preempted sequences had said."""


class ContextTooLongError(Exception):
    """The prompt and the wanted reply don't fit the context."""

    def __init__(self, prompt_tokens: int, max_tokens: int, context_tokens_max: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.context_tokens_max = context_tokens_max
        super().__init__(f"{prompt_tokens} prompt tokens and {max_tokens} of reply exceed the context of {context_tokens_max}")


class Engine:
    """Call `submit` and `abort` at any time, `step` while `busy`."""

    def __init__(self, profile: EngineProfile, seed: int = 0) -> None:
        self.profile = profile
        self.cache = KVCache(profile.kv_blocks)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """Oldest first."""
        self.events: KVEventLog | None = None
        """Of what happens to the cache, if anybody wants to know: see `log_events`."""
        self._seed = seed
        self._block_bytes = profile.block_tokens * TOKEN_BYTES

    def __repr__(self) -> str:
        return f"<Engine running={len(self.running)} waiting={len(self.waiting)} {self.cache!r}>"

    def log_events(self) -> KVEventLog:
        """From now on."""
        self.events = KVEventLog(self.profile.block_tokens)
        self.cache.evicted = self.events.removed
        return self.events

    def reset_cache(self) -> bool:
        """Forget all cached content; refused (False) while any of it is in use."""
        done = self.cache.reset()
        if done and self.events is not None:
            self.events.cleared()
        return done

    @property
    def busy(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def load(self) -> Load:
        return Load(len(self.running), len(self.waiting), self.cache.usage)

    def submit(self, prompt: bytes, max_tokens: int, now_s: float, cache_salt: str = "") -> Sequence:
        """Queue a prompt. Prompts with different salts share no cache. Raises ContextTooLongError."""
        prompt_tokens = prompt_tokens_of(prompt)
        if prompt_tokens + max_tokens > self.profile.context_tokens_max:
            raise ContextTooLongError(prompt_tokens, max_tokens, self.profile.context_tokens_max)
        sequence = Sequence(prompt, self._reply(prompt, max_tokens), max_tokens, cache_salt, now_s)
        self.waiting.append(sequence)
        return sequence

    def abort(self, sequence: Sequence) -> bool:
        """Drop an unfinished sequence and free its blocks; False if it had finished."""
        if sequence.finish_reason:
            return False
        if sequence in self.running:
            self.running.remove(sequence)
            self.cache.release(sequence.blocks)
        else:
            self.waiting.remove(sequence)
        sequence.finish_reason = "abort"
        return True

    def step(self, now_s: float) -> Step:
        """Run the model once, starting at `now_s`. The engine is left as it will be when the step ends."""
        preempted: list[Sequence] = []
        scheduled, budget = self._schedule_running(preempted)
        admitted: list[Sequence] = []
        if not preempted:  # as vLLM: the victim heads the queue, and there is no room for it yet
            self._admit(scheduled, budget, now_s, admitted)

        prefill_tokens = sum(new for sequence, new in scheduled if new > 1 or not sequence.generated_tokens)
        profile = self.profile
        duration_s = profile.step_base_s + prefill_tokens * profile.prefill_token_s + len(scheduled) * profile.decode_request_s
        end_s = now_s + duration_s
        emitted: list[Sequence] = []
        finished: list[Sequence] = []
        for sequence, new_tokens in scheduled:
            self._advance(sequence, new_tokens)
            if sequence.computed_tokens < sequence.total_tokens:
                continue  # a chunk of the prompt: no token yet
            sequence.generated_tokens += 1
            emitted.append(sequence)
            if sequence.generated_tokens == 1:
                sequence.first_token_s = end_s
            if sequence.generated_tokens == sequence.max_tokens:
                sequence.finish_reason = "length"
                finished.append(sequence)
                self.cache.release(sequence.blocks)
        if finished:
            self.running = [sequence for sequence in self.running if not sequence.finish_reason]
        return Step(duration_s, end_s, emitted, finished, admitted, preempted, prefill_tokens)

    def _schedule_running(self, preempted: list[Sequence]) -> tuple[list[tuple[Sequence, int]], int]:
        """What each running sequence computes next, preempting the youngest where blocks run out; and the budget left over."""
        scheduled: list[tuple[Sequence, int]] = []
        budget = self.profile.max_batched_tokens
        running = self.running
        index = 0
        while index < len(running) and budget:
            sequence = running[index]
            new_tokens = min(sequence.total_tokens - sequence.computed_tokens, budget)
            if self._grow(sequence, new_tokens):
                scheduled.append((sequence, new_tokens))
                budget -= new_tokens
                index += 1
            else:
                victim = running.pop()
                self._preempt(victim)
                preempted.append(victim)
        return scheduled, budget

    def _admit(self, scheduled: list[tuple[Sequence, int]], budget: int, now_s: float, admitted: list[Sequence]) -> None:
        """Let waiting sequences in, in order, while a batch slot, tokens of the budget and KV blocks remain."""
        while self.waiting and budget and len(self.running) < self.profile.max_running:
            sequence = self.waiting[0]
            reusable_blocks = sequence.full_blocks(sequence.total_tokens - 1, self._block_bytes)
            hits = self.cache.match(sequence.hashes_up_to(reusable_blocks, self._block_bytes))
            hit_tokens = len(hits) * self.profile.block_tokens
            new_tokens = min(sequence.total_tokens - hit_tokens, budget)
            if self._blocks_for(hit_tokens + new_tokens) - len(hits) > self.cache.room_beside(hits):
                return
            self.waiting.popleft()
            self.cache.hold(hits)
            sequence.blocks = hits
            sequence.hashed_blocks = len(hits)
            sequence.computed_tokens = hit_tokens
            self._grow(sequence, new_tokens)
            self.running.append(sequence)
            scheduled.append((sequence, new_tokens))
            budget -= new_tokens
            if sequence.admitted_s < 0:  # a preempted one was admitted and counted before
                sequence.admitted_s = now_s
                sequence.cached_tokens = hit_tokens
                admitted.append(sequence)

    def _grow(self, sequence: Sequence, new_tokens: int) -> bool:
        """Blocks for `new_tokens` more; False if the cache has too few."""
        missing = self._blocks_for(sequence.computed_tokens + new_tokens) - len(sequence.blocks)
        if missing <= 0:
            return True
        blocks = self.cache.allocate(missing)
        if blocks is None:
            return False
        sequence.blocks += blocks
        # Known to the cache as soon as scheduled, as in vLLM: requests of one step share a prefix.
        self._remember(sequence, sequence.full_blocks(sequence.computed_tokens + new_tokens, self._block_bytes))
        return True

    def _advance(self, sequence: Sequence, new_tokens: int) -> None:
        sequence.computed_tokens += new_tokens
        full = sequence.full_blocks(sequence.computed_tokens, self._block_bytes)
        if full > sequence.hashed_blocks:
            self._remember(sequence, full)

    def _remember(self, sequence: Sequence, full_blocks: int) -> None:
        hashes = sequence.hashes_up_to(full_blocks, self._block_bytes)
        events = self.events
        for position in range(sequence.hashed_blocks, full_blocks):
            if self.cache.remember(sequence.blocks[position], hashes[position]) and events is not None:
                start = position * self._block_bytes
                parent = hashes[position - 1] if position else None
                events.stored(hashes[position], parent, sequence.content[start : start + self._block_bytes], sequence.cache_salt)
        sequence.hashed_blocks = max(sequence.hashed_blocks, full_blocks)

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue; what it had said stays said and is recomputed, or found in the cache."""
        self.cache.release(sequence.blocks)
        sequence.blocks = []
        sequence.hashed_blocks = 0
        sequence.computed_tokens = 0
        self.waiting.appendleft(sequence)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.profile.block_tokens)

    def _reply(self, prompt: bytes, max_tokens: int) -> bytes:
        key = xxhash.xxh3_64_digest(prompt, seed=self._seed)
        choices = hashlib.shake_128(key).digest(max_tokens)
        return b"".join([VOCABULARY[choice % len(VOCABULARY)] for choice in choices])
