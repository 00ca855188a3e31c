"""Scorers that remember: who had the last cold request, what a set of candidates looks like."""

from __future__ import annotations

import pytest

from epp.plugins.topology import PEERS_MAX
from epp.types import Decision, Endpoint, PrefixMatch
from tests.builders import llm_request, pool_of
from tests.contract.situations import Case, ready


def test_no_hit_lru_prefers_whom_a_cold_request_reached_longest_ago() -> None:
    endpoints = pool_of({}, {}, {}, {})
    scorer = ready(Case("no-hit-lru-scorer"))

    def cold(picked: int, **targets: Endpoint) -> list[float]:
        request = llm_request()
        scores = list(scorer.score(request, tuple(endpoints)))
        scorer.picked(request, Decision(endpoints[picked], (), "decode", targets))
        return scores

    assert cold(0) == pytest.approx([1.0, 2 / 3, 1 / 3, 0.0])
    assert cold(2) == pytest.approx([0.0, 1.0, 2 / 3, 1 / 3])  # 1, 2, 3 never used; then 0
    assert cold(0) == pytest.approx([1 / 3, 1.0, 0.0, 2 / 3])  # 1, 3 never used; then 0, 2
    assert cold(1, prefill=endpoints[3]) == pytest.approx([0.0, 1.0, 1 / 3, 2 / 3])  # 1, 3; then 2, 0
    assert cold(1) == pytest.approx([2 / 3, 1 / 3, 1.0, 0.0])  # 2, 0, 1, 3
    warm = llm_request(prefix=PrefixMatch([], [], 100, {0: 64}))
    scorer.score(warm, tuple(endpoints))
    scorer.picked(warm, Decision(endpoints[2], (), "decode"))
    assert cold(0) == pytest.approx([2 / 3, 0.0, 1.0, 1 / 3])  # 2, 0, 3, 1: a warm request changed nothing
    scorer.removed(endpoints[0])
    assert cold(0)[0] == 1.0, "whoever takes its slot was never used"
    retried = llm_request()
    scorer.score(retried, tuple(endpoints))
    scorer.served(retried, endpoints[2])
    assert cold(0)[2] == 0.0


def test_no_hit_lru_remembers_as_many_as_it_may_and_ranks_by_all_it_remembers() -> None:
    endpoints = pool_of({}, {}, {}, {})
    scorer = ready(Case("no-hit-lru-scorer", {"lruSize": 2}))
    for slot in (1, 0, 2, 3):
        request = llm_request()
        scorer.score(request, tuple(endpoints))
        scorer.picked(request, Decision(endpoints[slot], (), "default"))
    # 1 and 0 are forgotten, so never used, and in the pool's order; then 2, 3
    assert list(scorer.score(llm_request(), tuple(endpoints))) == pytest.approx([1.0, 2 / 3, 1 / 3, 0.0])
    # of 0 and 3 alone, 3 has position 1 of those remembered, after one never used: 1 - 2/1, and not below 0
    assert list(scorer.score(llm_request(), (endpoints[0], endpoints[3]))) == [1.0, 0.0]


HERE = {
    "kubernetes.io/hostname": "h1",
    "topology.kubernetes.io/rack": "r1",
    "topology.kubernetes.io/zone": "z1",
    "topology.kubernetes.io/region": "g1",
}


def beside(**other: str) -> dict[str, str]:
    return {label: other.get(label.rpartition("/")[2], value) for label, value in HERE.items()}


def test_topology_scores_by_the_nearest_level_shared_with_the_peer() -> None:
    places = [
        HERE,
        beside(hostname="h2"),
        beside(hostname="h2", rack="r2"),
        beside(hostname="h2", rack="r2", zone="z2"),
        beside(hostname="h2", rack="r2", zone="z2", region="g2"),
        {},
        {"kubernetes.io/hostname": "h1"},
    ]
    endpoints = pool_of(*[{"labels": labels} for labels in places])
    scorer = ready(Case("topology-affinity-scorer"))
    request = llm_request(attributes={"peer-endpoint": endpoints[0]})
    assert list(scorer.score(request, tuple(endpoints))) == [1.0, 0.2, 0.05, 0.02, 0.0, 0.0, 1.0]
    assert list(scorer.score(llm_request(), tuple(endpoints))) == [0.0] * 7
    unnamed = pool_of({"labels": {"kubernetes.io/hostname": ""}}, {"labels": {"kubernetes.io/hostname": ""}})
    assert list(scorer.score(llm_request(attributes={"peer-endpoint": unnamed[0]}), tuple(unnamed))) == [0.0, 0.0]
    nowhere = llm_request(attributes={"peer-endpoint": endpoints[5]})
    assert list(scorer.score(nowhere, tuple(endpoints))) == [0.0] * 7, "no label is no place that two can share"


def test_topology_labels_are_its_own_else_the_extractors() -> None:
    endpoints = pool_of({"labels": {"host": "a", "my-host": "x"}}, {"labels": {"host": "a", "my-host": "y"}})
    request = llm_request(attributes={"peer-endpoint": endpoints[0]})
    extractor = ready(Case("topology-extractor", {"hostname": "host"}))
    scores = ready(Case("topology-affinity-scorer"), others=[extractor]).score(request, endpoints)
    assert list(scores) == [1.0, 1.0]
    own = ready(Case("topology-affinity-scorer", {"hostname": "my-host"}), others=[extractor]).score(request, endpoints)
    assert list(own) == [1.0, 0.0]
    with pytest.raises(ValueError, match="topologyProducerName"):
        ready(Case("topology-affinity-scorer", {"topologyProducerName": "elsewhere"}), others=[extractor])


def test_what_is_kept_for_a_set_of_candidates_is_for_that_set_alone() -> None:
    endpoints = pool_of({"labels": {"tier": "a"}}, {"labels": {"tier": "b"}}, {"labels": {"tier": "a"}})
    by_header = ready(Case("header-label-affinity-scorer"))
    request = llm_request(headers={"x-tier": "a"})
    by_place = ready(Case("topology-affinity-scorer", {"hostname": "tier"}))
    request.attributes["peer-endpoint"] = endpoints[0]
    for scorer in (by_header, by_place):
        everybody, two, turned = tuple(endpoints), tuple(endpoints[1:]), (endpoints[1], endpoints[0])
        for _ in range(2):
            assert list(scorer.score(request, everybody)) == [1.0, 0.0, 1.0]
            assert list(scorer.score(request, two)) == [0.0, 1.0]
            assert list(scorer.score(request, turned)) == [0.0, 1.0]
        in_place = [endpoints[0]]
        assert list(scorer.score(request, in_place)) == [1.0]
        in_place[0] = endpoints[1]
        assert list(scorer.score(request, in_place)) == [0.0], "a list may change, unlike a snapshot's tuple"


def test_the_peers_that_topology_keeps_scores_for_are_bounded() -> None:
    endpoints = tuple(pool_of(*[{"labels": {"host": str(number)}} for number in range(PEERS_MAX + 5)]))
    scorer = ready(Case("topology-affinity-scorer", {"hostname": "host"}))
    for peer in endpoints:
        scores = scorer.score(llm_request(attributes={"peer-endpoint": peer}), endpoints)
        assert (sum(scores), scores[peer.slot]) == (1.0, 1.0)
    assert len(scorer._kept) <= PEERS_MAX
