"""Tokens of each tenant in the last minute, or whatever the window is: who has had too many does not even wait.

A window slides in `SLOTS` steps and is never shorter than configured: a slot counts until its end is a window ago. A prompt counts when its
request comes, so that a burst can't pass before it ends, and is given back if the request is not served; what prompt and answer really were
is put right at the end. Not here: who the tenant is (control), what fairness makes of service (ledger).

Limits: `TENANTS_MAX`; while so many have a say in their windows further ones share one limit. Cost: 1 µs a request, about 1 KB a busy tenant.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from copy import copy
from math import floor

from epp.admission.ledger import DEFAULT_FLOW
from epp.admission.refusals import RateLimitedError
from epp.plugins.flow_control.tenants import TokenRateLimit
from epp.types import LLMRequest, Usage

SLOTS = 60
TENANTS_MAX = 10_000
ROUNDING = 1e-6
"""Of a slot: who comes when told to is not to be too early by a rounding error."""
OTHERS = "(others)"
"""Tenants there is no place for."""
CHARGED = "epp.admission.rates"
"""Attribute of a request that is counted: the tenant and the slot."""


class Window:
    """What one tenant had, by slot, the oldest first."""

    __slots__ = ("slots", "used")

    def __init__(self) -> None:
        self.slots: deque[list[int]] = deque()
        """[slot, tokens], at most SLOTS + 2 of them."""
        self.used = 0

    def twin(self) -> Window:
        made = Window()
        made.slots, made.used = deque(map(list, self.slots)), self.used
        return made

    def slide(self, oldest: int) -> None:
        """Slots before that one count no more."""
        while self.slots and self.slots[0][0] < oldest:
            self.used -= self.slots.popleft()[1]

    def add(self, slot: int, tokens: int) -> None:
        """To the slot it is now."""
        if self.slots and self.slots[-1][0] >= slot:
            self.slots[-1][1] += tokens
        else:
            self.slots.append([slot, tokens])
        self.used += tokens


class Rates:
    """See the module."""

    def __init__(self, limit: TokenRateLimit, tenants_max: int = TENANTS_MAX) -> None:
        self.limit = limit
        self.window_s = limit.window_s
        self._slot_s = self.window_s / SLOTS
        self._tenants_max = tenants_max
        self._windows: OrderedDict[str, Window] = OrderedDict()
        self.refused = 0
        self.shared = 0
        """Requests of tenants there was no place for."""

    def __len__(self) -> int:
        return len(self._windows)

    def twin(self, tenant: str) -> Rates:
        """Another, to find out what would become of one request of that tenant's; what it may touch is its own."""
        windows = OrderedDict(self._windows)
        for name in {tenant, OTHERS, next(iter(windows), tenant)} & windows.keys():
            windows[name] = windows[name].twin()
        made = copy(self)
        vars(made).update(_windows=windows)
        return made

    def used(self, tenant: str, now_s: float) -> int:
        window = self._windows.get(tenant)
        if window is None:
            return 0
        window.slide(self._oldest(now_s))
        return window.used

    def admit(self, request: LLMRequest, now_s: float) -> None:
        """Count its prompt. Raises RateLimitedError."""
        tenant, window = self._window(request.fairness_id or DEFAULT_FLOW, now_s)
        limit, tokens = self.limit.limit(tenant), max(1, request.prompt_tokens)
        if window.used > 0 and window.used + tokens > limit:
            self.refused += 1
            raise RateLimitedError(limit, self.window_s, self._free_s(window, limit - tokens, now_s))
        slot = int(now_s / self._slot_s)
        window.add(slot, tokens)
        request.attributes[CHARGED] = tenant, slot, tokens

    def returned(self, request: LLMRequest, now_s: float) -> None:
        """It is not served after all."""
        charged = request.attributes.pop(CHARGED, None)
        if charged is not None:
            tenant, slot, tokens = charged
            self._put_right(tenant, slot, -tokens, now_s)

    def finished(self, request: LLMRequest, usage: Usage | None, now_s: float) -> None:
        charged = request.attributes.pop(CHARGED, None)
        if charged is None or usage is None:
            return
        tenant, slot, tokens = charged
        if usage.prompt_tokens >= 0:
            self._put_right(tenant, slot, usage.prompt_tokens - tokens, now_s)
        if usage.completion_tokens > 0:
            _, window = self._window(tenant, now_s)
            window.add(int(now_s / self._slot_s), usage.completion_tokens)

    def _put_right(self, tenant: str, slot: int, tokens: int, now_s: float) -> None:
        """Where it was counted, if that counts still."""
        window = self._windows.get(tenant)
        if window is None or slot < self._oldest(now_s):
            return
        for each in window.slots:
            if each[0] == slot:
                each[1] += tokens
                window.used += tokens
                return

    def _free_s(self, window: Window, most: int, now_s: float) -> float:
        """Until no more than that is used, or nothing."""
        left = window.used
        for slot, tokens in window.slots:
            left -= tokens
            if left <= max(0, most):
                return (slot + 1) * self._slot_s + self.window_s - now_s
        return self.window_s

    def _oldest(self, now_s: float) -> int:
        """The first slot that counts: its end is not a window ago."""
        return floor((now_s - self.window_s) / self._slot_s + ROUNDING)

    def _window(self, tenant: str, now_s: float) -> tuple[str, Window]:
        windows, oldest = self._windows, self._oldest(now_s)
        window = windows.get(tenant)
        if window is None:
            if len(windows) >= self._tenants_max and not self._forget(oldest):
                self.shared += 1
                tenant = OTHERS
                window = windows.get(OTHERS)
            if window is None:
                window = windows[tenant] = Window()
        windows.move_to_end(tenant)
        window.slide(oldest)
        return tenant, window

    def _forget(self, oldest: int) -> bool:
        """Of the tenant that was seen last of all, if its window is empty."""
        name, window = next(iter(self._windows.items()))
        window.slide(oldest)
        if window.used > 0:
            return False
        del self._windows[name]
        return True
