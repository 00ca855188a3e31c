"""What flow control is told: bands, limits, times, policies. Out of a configuration's `flowControl` block and its plugins, once.

Not here: the rules (plugins.flow_control, fairness), how a block is read (config.blocks).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

from epp.config import schema
from epp.plugins.base import Plugin
from epp.plugins.flow_control.policies import (
    FcfsOrderingPolicy,
    GlobalStrictFairnessPolicy,
    PriorityThenTimeEvictionOrderPolicy,
    SheddableEvictionFilter,
    StaticUsageLimitPolicy,
)
from epp.plugins.flow_control.tenants import TokenRateLimit
from epp.types import LLMRequest

REQUEST_TTL_MAX_S = 3_600.0
"""Of what a request says about itself."""


class Ordering(Protocol):
    def order(self, request: LLMRequest, received_s: float, queued_s: float, ttl_s: float, /) -> float:
        """The lowest of a flow is next. `ttl_s`: 0 if it may wait for ever."""
        ...


class UsageLimit(Protocol):
    # opens_s(now_s) -> float, optional: when a band that is closed now may be open by itself

    def ceiling(self, position: int, priorities: tuple[int, ...], saturation: float, now_s: float, /) -> float:
        """The band at `position` is served while the saturation is below it."""
        ...


class Identity(Protocol):
    # override: bool, optional: it counts even where the client names a fairness id

    def identify(self, request: LLMRequest, /) -> str:
        """Its fairness id; empty where it has none."""
        ...


class EvictionFilter(Protocol):
    def evictable(self, request: LLMRequest, /) -> bool: ...


class EvictionOrder(Protocol):
    def eviction_order(self, request: LLMRequest, dispatched_s: float, /) -> tuple[float, float]:
        """The lowest gives way first."""
        ...


@dataclass(frozen=True, slots=True)
class BandSettings:
    """Requests of one priority while they queue. A limit of 0 is none."""

    priority: int = 0
    requests_max: int = 5_000
    size_bytes_max: int = 1_000_000_000
    flow_requests_max: int = 0
    """Queued of one fairness id: nobody can fill the band alone."""
    flow_size_bytes_max: int = 0
    ttl_s: float | None = None
    """Longest wait while there are endpoints; None: the common one; 0: no limit."""
    fairness: Plugin = field(default_factory=GlobalStrictFairnessPolicy)
    ordering: Ordering = field(default_factory=FcfsOrderingPolicy)


@dataclass(frozen=True, slots=True)
class Settings:
    """See the module. A limit of 0 is none."""

    requests_max: int = 0
    size_bytes_max: int = 0
    ttl_s: float = 60.0
    """Longest wait while there are endpoints."""
    no_endpoints_ttl_s: float = 60.0
    """Longest wait while there are none."""
    default_band: BandSettings = field(default_factory=BandSettings)
    default_negative_band: BandSettings | None = None
    bands: tuple[BandSettings, ...] = ()
    usage_limit: UsageLimit = field(default_factory=StaticUsageLimitPolicy)
    identities: tuple[Identity, ...] = ()
    """Whose a request is, in this order."""
    token_rate: TokenRateLimit | None = None
    request_ttl_max_s: float = REQUEST_TTL_MAX_S
    waits_for_endpoints: bool = True
    """Whether a request waits where there is nobody, or is told so at once."""
    sheds: bool = False
    """Requests of a priority below zero do not wait: without room they are refused."""
    eviction: bool = False
    eviction_filter: EvictionFilter = field(default_factory=SheddableEvictionFilter)
    eviction_order: EvictionOrder = field(default_factory=PriorityThenTimeEvictionOrderPolicy)

    def band(self, priority: int) -> BandSettings:
        """As configured for this priority, else of the template."""
        for band in self.bands:
            if band.priority == priority:
                return band
        template = self.default_negative_band if priority < 0 and self.default_negative_band is not None else self.default_band
        return replace(template, priority=priority)


def tenancy_of(plugins: Mapping[str, Plugin]) -> dict[str, Any]:
    """The fields of Settings that say who tenants are and what each may have: from plugins alone."""
    identities = tuple(cast("Identity", plugin) for plugin in plugins.values() if hasattr(plugin, "identify"))
    return {"identities": identities, "token_rate": next((p for p in plugins.values() if isinstance(p, TokenRateLimit)), None)}


def settings_of(config: schema.FlowControl, plugins: Mapping[str, Plugin]) -> Settings:
    """`plugins`: by instance name, checked when the configuration was loaded; a policy that is not among them is the built-in one."""
    negative = config.default_negative_priority_band
    evictable = next((p for p in plugins.values() if hasattr(p, "evictable")), SheddableEvictionFilter())
    eviction_order = next((p for p in plugins.values() if hasattr(p, "eviction_order")), PriorityThenTimeEvictionOrderPolicy())
    return Settings(
        requests_max=config.requests_max,
        size_bytes_max=config.bytes_max,
        ttl_s=config.default_request_ttl_s,
        no_endpoints_ttl_s=config.no_endpoint_request_ttl_s,
        default_band=_band(config.default_priority_band, plugins),
        default_negative_band=_band(negative, plugins) if negative is not None else None,
        bands=tuple(_band(band, plugins) for band in config.priority_bands),
        usage_limit=cast("UsageLimit", plugins.get(config.usage_limit_policy) or StaticUsageLimitPolicy()),
        **tenancy_of(plugins),
        eviction=config.enable_eviction,
        eviction_filter=cast("EvictionFilter", evictable),
        eviction_order=cast("EvictionOrder", eviction_order),
    )


def _band(config: schema.PriorityBand, plugins: Mapping[str, Plugin]) -> BandSettings:
    return BandSettings(
        priority=config.priority,
        requests_max=config.requests_max,
        size_bytes_max=config.bytes_max,
        flow_requests_max=getattr(config, "flow_requests_max", 0),
        flow_size_bytes_max=getattr(config, "flow_bytes_max", 0),
        ttl_s=getattr(config, "ttl_s", None),
        fairness=plugins.get(config.fairness_policy) or GlobalStrictFairnessPolicy(),
        ordering=cast("Ordering", plugins.get(config.ordering_policy) or FcfsOrderingPolicy()),
    )
