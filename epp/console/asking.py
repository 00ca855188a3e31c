"""One question of `/debug/explain`: the request passes the tokenizer as it would, then what would become of it is worked out.

It waits for its tokens and for nothing else: flow control is asked what it would do (admission.outlook). Nothing is charged, counted as
traffic or remembered, but tokens that were found may be cached, by the picker and by whoever found them. Who leaves is waited for no longer.
Not here: the decision (director), tokens (tokenize).

Limits: `TOKENS_WAIT_S` a question, `WAITING_MAX` questions waiting at once; what they stop goes on with the estimate, and says so.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from epp.arrival import Arrival, Wait
from epp.director import Director
from epp.errors import EppError
from epp.types import TOKEN_IDS, LLMRequest

TOKENS_WAIT_S = 8.0
"""A tokenizer's own timeout is usually far shorter; `epp explain` waits for 10 s."""
WAITING_MAX = 4
"""Questions that wait for tokens: the tokenizer is there for requests."""

NO_TOKENIZER, EXACT, LATE, CROWDED = "no_tokenizer", "exact", "late", "crowded"
WHY = {
    NO_TOKENIZER: "no tokenizer is configured",
    "nothing_to_tokenize": "the tokenizer has nothing to do with such a request",
    "timeout": "the tokenizer did not answer within its timeout",
    "failed": "the tokenizer failed",
    "full": "the tokenizer has too much to do",
    "resting": "the tokenizer failed too often and is left alone for a while",
    "unknown_model": "no tokenizer is configured for this model",
    "unsupported": "the tokenizer can't do this request",
    "too_long": "the prompt is longer than what is tokenized",
    LATE: f"there were none in the {TOKENS_WAIT_S:g} s a question may take",
    CROWDED: f"{WAITING_MAX} other questions wait for theirs",
}
"""Outcome (of the tokenizer, as its metrics call it; the last two are ours) -> what it means."""

AskTokens = Callable[[Arrival, Callable[[str], None]], Wait | None]
"""`epp.tokenize.stage.TokenStage.inquire`: as a Stage's `begin`, and the outcome is told."""


class Asking:
    """See the module."""

    def __init__(self, director: Director, tokens: AskTokens | None, *, wait_s: float = TOKENS_WAIT_S) -> None:
        self._director = director
        self._tokens = tokens
        self._wait_s = wait_s
        self.waiting = 0

    async def explain(self, request: LLMRequest, body: bytes | None, subset: Sequence[str] | None) -> dict[str, Any]:
        """Raises what plugins raise."""
        tokens = _Tokens(self._tokens, NO_TOKENIZER)
        if self.waiting >= WAITING_MAX:
            tokens = _Tokens(None, CROWDED)
        woken = asyncio.Event()
        inquiry = self._director.inquire(request, body, subset, stages=(tokens,), wake=woken.set)
        understood, sent = inquiry.error is None, TOKEN_IDS in request.attributes
        try:
            if inquiry.advance():
                await self._until(woken)
                if woken.is_set():
                    inquiry.advance()
                else:
                    tokens.outcome = LATE
        except EppError as error:
            inquiry.error = error
        finally:
            inquiry.cancel()
        answer = self._director.explained(inquiry)
        if understood:
            answer["tokens"] = _about(request, EXACT if sent else tokens.outcome, "client" if sent else "tokenizer")
        return answer

    async def _until(self, woken: asyncio.Event) -> None:
        """It is set, or it took too long."""
        self.waiting += 1
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._wait_s):
                    await woken.wait()
        finally:
            self.waiting -= 1


class _Tokens:
    """The tokenizer as the stage of one question."""

    def __init__(self, ask: AskTokens | None, outcome: str) -> None:
        """`outcome`: where nobody is asked."""
        self._ask = ask
        self.outcome = outcome

    def begin(self, arrival: Arrival) -> Wait | None:
        return self._ask(arrival, self._told) if self._ask is not None else None

    def _told(self, outcome: str) -> None:
        self.outcome = outcome


def _about(request: LLMRequest, outcome: str, source: str) -> dict[str, Any]:
    """Where its tokens are from, and for how many endpoints the engines' own word of what they have cached counted; no token."""
    about: dict[str, Any] = {"source": source, "outcome": outcome, "why": ""}
    if outcome != EXACT:
        about.update(source="estimate" if request.prompt_tokens else "none", why=WHY.get(outcome, outcome))
    believed = getattr(request.prefix, "engine_mask", None)
    if believed is not None:
        about["engines_believed"] = believed.bit_count()
    return about
