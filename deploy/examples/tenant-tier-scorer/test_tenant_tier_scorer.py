"""The example decides as its README says, through the picker's own scheduling."""

import random
from pathlib import Path

import pytest
from tenant_tier_scorer import TenantTierScorer

from epp.clock import VirtualClock
from epp.config.load import load
from epp.datastore import Datastore
from epp.plugins.registry import Registry
from epp.scheduling.build import build
from epp.types import Address, EndpointSpec, LLMRequest

CONFIG = Path(__file__).with_name("epp.yaml").read_text()


def _request(**headers: str) -> LLMRequest:
    return LLMRequest(id="r", path="/v1/completions", headers=headers)


def _pool() -> Datastore:
    datastore = Datastore(VirtualClock())
    datastore.apply(
        EndpointSpec(f"{tier}-{i}", Address(f"10.0.{i}.{n}", 8000), labels={"tier": tier})
        for n, tier in enumerate(("gold", "silver"), 1)
        for i in (1, 2)
    )
    return datastore


@pytest.mark.parametrize("tier", ["gold", "silver"])
def test_a_tenant_is_served_by_its_own_tier(tier: str) -> None:
    registry = Registry([TenantTierScorer])
    built = build(load(CONFIG, source="epp.yaml", catalogue=registry), registry, random.Random(1), VirtualClock())
    request = _request(**{"x-tenant-tier": tier})
    assert {built.scheduler.schedule(request, _pool().ready).endpoint.labels["tier"] for _ in range(20)} == {tier}


def test_without_the_header_nobody_is_preferred() -> None:
    endpoints = _pool().ready.endpoints
    assert TenantTierScorer().score(_request(), endpoints) == [1.0] * 4
    assert TenantTierScorer(other_tier=0.2).score(_request(**{"x-tenant-tier": "gold"}), endpoints) == [1.0, 1.0, 0.2, 0.2]
