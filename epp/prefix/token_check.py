"""Whether prompts are cut into tokens as the engines cut them: a wrong tokenizer or chat template finds nothing, and says nothing.

An engine stores what it computed, so a prompt that was answered is in the view of the endpoint that answered. Where that is so of nearly no
prompt of a model, its tokens are not the engine's. Nearly: what was answered may be evicted, and wrong tokens may meet by chance. Not here:
what is done about it (kv_view), the views (precise).

Cost: a look at two blocks per finished request, a few more for the `PENDING_MAX` that are not there yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

WINDOW = 32
"""Answered prompts of a model by which it is judged."""
WRONG_MAX = 1
"""Found of those, at most, where tokens are wrong."""
RIGHT_MIN = 16
"""Found of those, at least, where they are right again."""
WAIT_S = 1.0
"""For the event that says a prompt is there: it is on its way when the answer ends."""
PENDING_MAX = 256
MODELS_MAX = 256
BLOCKS = 2
"""Of a prompt, looked for."""

Stored = Callable[[int, Sequence[int]], int]
"""slot, hashes -> how many of them, from the first, that endpoint said it has; below 0 where it is not relied upon."""


class _Pending(NamedTuple):
    until_s: float
    slot: int
    model: str
    hashes: tuple[int, ...]


class TokenCheck:
    """See the module. `changed(model, wrong)` is called when a judgement changes."""

    def __init__(self, stored: Stored, changed: Callable[[str, bool], None]) -> None:
        self.wrong: set[str] = set()
        """Models whose tokens are not the engines'."""
        self.found_total = 0
        self.missed_total = 0
        self._stored = stored
        self._changed = changed
        self._pending: deque[_Pending] = deque()
        self._seen: dict[str, deque[bool]] = {}

    def answered(self, slot: int, model: str, hashes: Sequence[int], now_s: float) -> None:
        """That endpoint answered a prompt with these blocks."""
        if len(hashes) < BLOCKS:
            return
        pending = _Pending(now_s + WAIT_S, slot, model, tuple(hashes[:BLOCKS]))
        if not self._settled(pending, now_s) and len(self._pending) < PENDING_MAX:
            self._pending.append(pending)

    def tick(self, now_s: float) -> None:
        """Look again for what was not there."""
        for _ in range(len(self._pending)):
            pending = self._pending.popleft()
            if not self._settled(pending, now_s):
                self._pending.append(pending)

    def forget(self, slot: int) -> None:
        """The endpoint is gone: another may be in its slot soon."""
        self._pending = deque(each for each in self._pending if each.slot != slot)

    def _settled(self, pending: _Pending, now_s: float) -> bool:
        stored = self._stored(pending.slot, pending.hashes)
        if stored == BLOCKS or (stored >= 0 and now_s >= pending.until_s):
            self._judge(pending.model, found=stored == BLOCKS)
            return True
        return stored < 0  # an endpoint that is in doubt says nothing

    def _judge(self, model: str, *, found: bool) -> None:
        self.found_total += found
        self.missed_total += not found
        seen = self._seen.get(model)
        if seen is None:
            if len(self._seen) >= MODELS_MAX:  # names come from clients: the ones heard of first are kept
                return
            seen = self._seen[model] = deque(maxlen=WINDOW)
        seen.append(found)
        count = sum(seen)
        if model in self.wrong:
            if count >= RIGHT_MIN:
                self.wrong.discard(model)
                self._changed(model, False)
        elif len(seen) == WINDOW and count <= WRONG_MAX:
            self.wrong.add(model)
            seen.clear()
            self._changed(model, True)
