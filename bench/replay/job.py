"""One request on its way through the simulation. What it asks for never changes; how far it came does."""

from __future__ import annotations

from collections.abc import Sequence

BLOCK_TOKENS = 512
"""Tokens of a prefix block, in traces and in the engines' caches."""


class Job:
    """One request. Changed by the simulation, and below the line by the engine that has it."""

    __slots__ = (
        "adapter", "arrival_s", "blocks", "cached_tokens", "computed", "decoded_from", "error", "finished_s", "first_token_s", "generated", "held",
        "index", "load_tokens", "offered", "output_tokens", "priority", "promised_pairs", "promised_tokens", "prompt_tokens", "replica", "streamed",
        "tenant",
    )  # fmt: skip

    def __init__(
        self, index: int, arrival_s: float, prompt_tokens: int, output_tokens: int, blocks: Sequence[int], *, adapter: str = ""
    ) -> None:
        self.index = index
        self.arrival_s = arrival_s
        self.prompt_tokens = prompt_tokens
        self.output_tokens = max(1, output_tokens)
        self.offered = blocks
        """Ids of all its blocks, the last one may be partly filled: what its bytes are made of."""
        self.blocks = blocks[: prompt_tokens // BLOCK_TOKENS]
        """Ids of its full blocks: what can be cached."""
        self.adapter = adapter
        self.tenant = ""
        self.priority = 0
        self.streamed = True
        """Policies hear of its first token; else the answer comes whole."""
        self.replica = -1
        self.first_token_s = -1.0
        self.finished_s = -1.0
        self.error = ""
        self.cached_tokens = -1
        """Prompt tokens not computed: found in a cache when it was first admitted; -1 before."""
        # the engine's
        self.computed = 0
        """Tokens of the prompt whose KV is there."""
        self.held = 0
        """Leading `blocks` the cache knows to be in use by this job."""
        self.generated = 0
        """Tokens said when it last joined the batch: after a preemption they are part of the prompt."""
        self.decoded_from = 0
        """The engine's count of decode steps when it last began to decode."""
        self.load_tokens = 0
        """To bring back from CPU memory in its first step."""
        self.promised_tokens = 0
        self.promised_pairs = 0.0

    def __repr__(self) -> str:
        state = self.error or ("done" if self.finished_s >= 0 else "open")
        return f"<Job {self.index} at {self.arrival_s:.3f} {self.prompt_tokens}+{self.output_tokens} replica={self.replica} {state}>"

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.arrival_s

    @property
    def e2e_s(self) -> float:
        return self.finished_s - self.arrival_s

    @property
    def tpot_s(self) -> float:
        """Seconds a token after the first; 0 where there is no other."""
        more = self.output_tokens - 1
        return (self.finished_s - self.first_token_s) / more if more else 0.0

    def context(self) -> int:
        """Tokens to have in the KV cache before the next one can be said."""
        return self.prompt_tokens + self.generated


def pairs_of(before: int, tokens: int) -> float:
    """(token, earlier token) pairs when `tokens` tokens are computed after `before` others."""
    return tokens * (before + tokens / 2)
