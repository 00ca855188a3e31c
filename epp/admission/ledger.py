"""What each tenant was served, in tokens, fading with time: for policies that go by it, and for the fairness index.

Decay is kept forward: what is added later weighs more, so that nothing has to be touched while it fades, and the order of two tenants
never changes by itself. Bounded: the tenant unseen for longest is forgotten first. Cost: about 0.4 µs an addition.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from math import exp, log

from epp.plugins.flow_control.policies import ProgramAwareFairness
from epp.types import LLMRequest, Usage

DEFAULT_FLOW = "default-flow"
"""Fairness id of requests without one, as the reference picker calls it."""
SERVED_HALF_LIFE_S = 60.0
TENANTS_MAX = 10_000
EXPONENT_MAX = 100.0
"""Of a weight: then all are made small again."""
GRAIN = 0.001
"""A weight is worked out anew when it is off by so much."""
SEEN_S = 1.0
"""How exactly it is known when a tenant was last seen."""


class Tenant:
    """One fairness id."""

    __slots__ = ("requests", "seen_s", "service", "wait_s")

    def __init__(self) -> None:
        self.service = 0.0
        """Tokens, in the ledger's own unit."""
        self.seen_s = 0.0
        self.requests = 0
        self.wait_s = 0.0
        """Of all those requests together."""


class Ledger:
    """See the module."""

    def __init__(
        self,
        half_life_s: float,
        now_s: float,
        *,
        decay_per_s: float = 1.0,
        idle_max_s: float = 3_600.0,
        sweep_s: float = 300.0,
        tenants_max: int = TENANTS_MAX,
    ) -> None:
        """`decay_per_s`: what a second leaves of the service, where there is no half-life (0)."""
        self._growth = log(2) / half_life_s if half_life_s else -log(decay_per_s)
        self._start_s = now_s
        self._weight, self._weighed_s = 1.0, now_s
        self._grain_s = GRAIN / self._growth if self._growth > 0 else 0.0
        self._idle_max_s, self._sweep_s, self._swept_s = idle_max_s, sweep_s, now_s
        self._tenants_max = tenants_max
        self._tenants: OrderedDict[str, Tenant] = OrderedDict()
        self.rebased = 0
        """How often the unit changed: services read before can't be compared with those read after."""

    def __len__(self) -> int:
        return len(self._tenants)

    def fade(self, half_life_s: float, decay_per_s: float, *, idle_max_s: float, sweep_s: float) -> None:
        """From when it was last weighed on like this; what is in it stays."""
        self._idle_max_s, self._sweep_s = idle_max_s, sweep_s
        growth = log(2) / half_life_s if half_life_s else -log(decay_per_s)
        if growth != self._growth:
            self._rebase(exp(-self._growth * (self._weighed_s - self._start_s)), self._weighed_s)
            self._growth, self._weight = growth, 1.0
            self._grain_s = GRAIN / growth if growth > 0 else 0.0

    def service(self, tenant: str) -> float:
        """In the ledger's unit: to be compared with others' alone."""
        found = self._tenants.get(tenant)
        return found.service if found is not None else 0.0

    def tokens(self, now_s: float) -> Iterator[tuple[str, float, Tenant]]:
        """Each tenant, and what is left of its service by now."""
        unit = exp(-self._growth * (now_s - self._start_s))
        for name, tenant in list(self._tenants.items()):
            yield name, tenant.service * unit, tenant

    def add(self, tenant: str, tokens: float, now_s: float) -> Tenant:
        if now_s - self._weighed_s > self._grain_s:
            self._weigh(now_s)
        entry = self._tenants.get(tenant)
        if entry is None or now_s - entry.seen_s > SEEN_S:
            entry = self._seen(tenant, now_s)
        service = entry.service + tokens * self._weight
        entry.service = max(0.0, service)
        return entry

    def sent(self, tenant: str, tokens: float, wait_s: float, now_s: float) -> None:
        """One of its requests was let through after that long."""
        entry = self.add(tenant, tokens, now_s)
        entry.requests += 1
        entry.wait_s += wait_s

    def jain(self, now_s: float, window_s: float) -> float:
        """Jain's index of the service of tenants seen within `window_s`: 1 all alike, 1/n one has it all."""
        values = [tenant.service for tenant in self._tenants.values() if now_s - tenant.seen_s <= window_s]
        top = max(values, default=0.0)
        if not top:
            return 1.0
        parts = [value / top for value in values]
        return sum(parts) ** 2 / (len(parts) * sum(part * part for part in parts))

    def _seen(self, tenant: str, now_s: float) -> Tenant:
        entry = self._tenants.get(tenant)
        if entry is None:
            if len(self._tenants) >= self._tenants_max:
                self._tenants.popitem(last=False)
            entry = self._tenants[tenant] = Tenant()
        else:
            self._tenants.move_to_end(tenant)
        entry.seen_s = now_s
        if now_s - self._swept_s >= self._sweep_s:
            self._swept_s = now_s
            while self._tenants and now_s - next(iter(self._tenants.values())).seen_s > self._idle_max_s:
                self._tenants.popitem(last=False)
        return entry

    def _weigh(self, now_s: float) -> None:
        exponent = self._growth * (now_s - self._start_s)
        if exponent > EXPONENT_MAX:
            self._rebase(exp(-exponent), now_s)
            exponent = 0.0
        self._weight, self._weighed_s = exp(exponent), now_s

    def _rebase(self, unit: float, now_s: float) -> None:
        for tenant in self._tenants.values():
            tenant.service *= unit
        self._start_s = now_s
        self.rebased += 1


class Service:
    """All ledgers of one flow control: of tokens served, and those of policies, in which an output token counts twice.

    A prompt counts when its request is let through, or a burst would all be of the tenant that had least; the rest when it ends.
    """

    def __init__(self, now_s: float) -> None:
        self.tokens = Ledger(SERVED_HALF_LIFE_S, now_s)
        self.of_policies: dict[str, Ledger] = {}
        """By the policy's name: kept over changes of configuration."""
        self._now_s = now_s

    def ledger(self, policy: ProgramAwareFairness) -> Ledger:
        found = self.of_policies.get(policy.name)
        idle_max_s, sweep_s = policy.eviction_ttl_seconds, policy.eviction_sweep_seconds
        half_life_s, decay_per_s = policy.las_half_life_seconds, policy.las_decay_factor
        if found is None:
            found = self.of_policies[policy.name] = Ledger(
                half_life_s, self._now_s, decay_per_s=decay_per_s, idle_max_s=idle_max_s, sweep_s=sweep_s
            )
        else:
            found.fade(half_life_s, decay_per_s, idle_max_s=idle_max_s, sweep_s=sweep_s)
        return found

    def sent(self, request: LLMRequest, wait_s: float, now_s: float) -> None:
        """It was let through after that long."""
        tenant = request.fairness_id or DEFAULT_FLOW
        self.tokens.sent(tenant, request.prompt_tokens, wait_s, now_s)
        for ledger in self.of_policies.values():
            ledger.sent(tenant, request.prompt_tokens, wait_s, now_s)

    def returned(self, request: LLMRequest, now_s: float) -> None:
        """It was not served after all."""
        for ledger in (self.tokens, *self.of_policies.values()):
            ledger.add(request.fairness_id or DEFAULT_FLOW, -request.prompt_tokens, now_s)

    def finished(self, request: LLMRequest, usage: Usage, now_s: float) -> None:
        """What its prompt and its answer really were."""
        tenant = request.fairness_id or DEFAULT_FLOW
        prompt = usage.prompt_tokens - request.prompt_tokens if usage.prompt_tokens >= 0 else 0
        completion = max(0, usage.completion_tokens)
        self.tokens.add(tenant, prompt + completion, now_s)
        for ledger in self.of_policies.values():
            ledger.add(tenant, prompt + 2 * completion, now_s)
