"""The field's policies, each written from its published formula: what the product is measured against.

Every one sees what a picker can see and no more: its own in-flight accounting, scraped readings where the policy reads them, an
approximate prefix index fed by what it routed. `clairvoyant` alone looks into the engines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bench.replay.baselines import affinity, clairvoyant, costs, llmd, load
from bench.replay.baselines.base import Baseline

BASELINES: Mapping[str, Callable[[], Baseline]] = {
    "random": load.RandomChoice,
    "round-robin": load.RoundRobin,
    "least-request": load.LeastRequest,
    "llm-d": llmd.LlmDDefault,
    "llm-d-optimized": llmd.LlmDOptimized,
    "sglang": affinity.SglangCacheAware,
    "aibrix": affinity.AibrixPrefixCache,
    "preble": affinity.Preble,
    "dynamo": costs.Dynamo,
    "dynamo-4": costs.Dynamo4,
    "lmetric": costs.LMetric,
    "lpwl": costs.LeastPrefillWorkLeft,
    "clairvoyant": clairvoyant.Clairvoyant,
}
