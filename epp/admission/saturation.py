"""How full what a request may use is, between two looks of the detector too.

Requests are grouped by where they may go (pool, the gateway's subset, the model where not everyone serves it, stages): each group is judged
over its own candidates, so that a full prefill role, subset or model holds nobody else. What was let through and is not charged to an
endpoint yet counts on top of what the detector sees, by what the detector says one more request, and one more prompt token, would add
(`level`); a detector that can't say lets one uncharged request through at a time.

Limits: `GROUPS_MAX` groups, then further ones are judged over their whole pool. Cost: the detector's once per group and pump; a request
that does not wait asks it at most every `REUSE_S`, and adds up what it sent meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from math import inf
from typing import Protocol

from epp.arrival import Arrival
from epp.errors import NoEndpointsError, NotFoundError
from epp.plugins.base import Detector
from epp.types import Endpoint, LLMRequest, Snapshot

GROUPS_MAX = 64
KNOWN_MAX = 1_000
"""Ways to ask (pool, subset, model) whose group is remembered while the pool stays the same."""
REUSE_S = 0.005
"""A level that says there is room is believed so long; one that says there is none is looked at again at once."""
UNCHARGED_MAX_S = 5.0
"""A request that was let through and never routed does not count for longer."""
ROUNDED_UP = 1.0 + 1e-9
"""Six sixths are one, not a little less."""
ROLE_LABEL = "llm-d.ai/role"
PREFILL, DECODE = 1, 2
BOTH = PREFILL | DECODE
STAGES = {
    None: DECODE, "decode": DECODE, "prefill": PREFILL, "encode-prefill": PREFILL,
    "prefill-decode": BOTH, "encode-prefill-decode": BOTH, "both": BOTH,
}  # fmt: skip
"""Role -> the stages it does; those that only encode, or do what nobody knows, say nothing of the pool's load."""
STAGE_NAMES = {PREFILL: "prefill", DECODE: "decode"}

EMPTY, USABLE, PASSING = range(3)
"""Nobody is there; somebody is; whatever is decided is not for flow control to say (no such model, a subset with nobody in it)."""

Key = tuple[str, Sequence[str] | None, str, int]
Level = tuple[float, float, float]
NOBODY = Snapshot.of(())


class CandidateSource(Protocol):
    @property
    def epoch(self) -> object:
        """Unlike before once `of` may find others."""
        ...

    def of(self, subset: Sequence[str] | None, pool: str, model: str) -> Snapshot:
        """Raises NoEndpointsError, ModelNotFoundError."""
        ...


class Group:
    """Requests with the same candidates. The level is that of `at_s`, `charges` what was let through and is not in it."""

    __slots__ = (
        "at_s", "blocked", "charges", "epoch", "key", "looked", "per_request", "per_token", "queued", "saturation", "since_s", "snapshot", "staged_of",
        "stages", "state",
    )  # fmt: skip

    def __init__(self, key: Key, now_s: float) -> None:
        self.key = key
        self.snapshot = NOBODY
        self.epoch: object = None
        """Of the candidates, when the snapshot was taken."""
        self.state = USABLE
        self.since_s = now_s
        """When the state last changed."""
        self.stages: list[tuple[int, Sequence[Endpoint]]] = []
        self.staged_of: Snapshot | None = None
        self.queued = 0
        self.at_s = -inf
        self.saturation = 0.0
        self.per_request = self.per_token = 0.0
        self.charges = 0.0
        """What was let through adds so much."""
        self.looked = self.blocked = 0
        """The pump in which it was looked at, and found closed."""

    @property
    def estimate(self) -> float:
        return self.saturation + self.charges * ROUNDED_UP


class Uncharged:
    """A request that was let through and is not charged to an endpoint; None once it is."""

    __slots__ = ("mask", "request", "sent_s", "tokens")

    def __init__(self, request: LLMRequest, mask: int, sent_s: float) -> None:
        self.request: LLMRequest | None = request
        self.mask = mask
        self.tokens = request.prompt_tokens
        self.sent_s = sent_s


class Saturation:
    """See the module."""

    def __init__(self, candidates: CandidateSource, detector: Detector, stages_of: Callable[[LLMRequest], int] | None = None) -> None:
        """`stages_of`: which of PREFILL and DECODE a request needs; without it, all there are."""
        self._candidates = candidates
        self._stages_of = stages_of
        self._groups: dict[Key, Group] = {}
        self._known: dict[Key, Group] = {}
        """By what was asked, not by what it came to."""
        self._epoch: object = None
        self._uncharged: dict[LLMRequest, Uncharged] = {}
        """In the order in which they were let through."""
        self._sums: dict[int, list[int]] = {}
        """mask of candidates -> uncharged requests and prompt tokens."""
        self.by_stage: dict[tuple[str, str], float] = {}
        """(pool, stage) -> saturation of the whole pool, when last looked at: by a request that may go to all of it, or `survey`."""
        self.groups_overflowed = 0
        self.lapsed = 0
        """Uncharged requests nothing was heard of."""
        self.use(detector)

    def use(self, detector: Detector) -> None:
        """Ask this one from now on."""
        self.detector = detector
        self._level: Callable[[Sequence[Endpoint]], Level] | None = getattr(detector, "level", None)
        for group in self._groups.values():
            group.at_s = -inf

    def group(self, arrival: Arrival, now_s: float) -> Group:
        """Whose candidates are those of the request."""
        request = arrival.request
        epoch = self._candidates.epoch
        if epoch != self._epoch:
            self._epoch = epoch
            self._known.clear()
        asked = (request.pool, arrival.subset, request.target_model, self._stages_of(request) if self._stages_of is not None else BOTH)
        group = self._known.get(asked)
        if group is None or group.epoch != epoch:
            group = self._find(asked, now_s)
            if len(self._known) >= KNOWN_MAX:
                self._known.clear()
            self._known[asked] = group
        return group

    def queued(self) -> list[Group]:
        """Groups with anything queued."""
        return [group for group in self._groups.values() if group.queued]

    def resolve(self, group: Group, now_s: float) -> None:
        """Who its candidates are now. A detector that looks at a request's own candidates sees the pool change at once."""
        epoch = self._candidates.epoch
        if epoch == group.epoch:
            return
        group.epoch = epoch
        pool, subset, model, _ = group.key
        state = USABLE
        try:
            snapshot = self._candidates.of(subset, pool, model)
        except NoEndpointsError:
            snapshot = NOBODY
            state = PASSING if subset is not None and self._anyone(pool) else EMPTY
        except NotFoundError:
            snapshot, state = NOBODY, PASSING
        if snapshot is not group.snapshot:
            group.snapshot = snapshot
            group.at_s = -inf
        if state != group.state:
            group.state, group.since_s = state, now_s

    def look(self, group: Group, now_s: float) -> None:
        """Ask the detector."""
        snapshot = group.snapshot
        if group.staged_of is not snapshot:
            group.staged_of, group.stages = snapshot, _staged(snapshot.endpoints, group.key[3])
        highest = per_request = per_token = 0.0
        shown = group.key[1] is None and not group.key[2]
        for stage, endpoints in group.stages:
            saturation, by_request, by_token = self._level(endpoints) if self._level is not None else self._crude(endpoints)
            highest, per_request, per_token = max(highest, saturation), max(per_request, by_request), max(per_token, by_token)
            if shown:
                self.by_stage[group.key[0], STAGE_NAMES[stage]] = saturation
        if shown:
            self.by_stage[group.key[0], "effective"] = highest
        group.at_s = now_s
        group.saturation, group.per_request, group.per_token = highest, per_request, per_token
        self._lapse(now_s)
        group.charges = 0.0
        for mask, (requests, tokens) in self._sums.items():
            if mask & snapshot.mask:
                group.charges += requests * per_request + tokens * per_token

    def passed(self, tokens: int, group: Group) -> None:
        """A prompt of so many goes to one of the group's candidates, and is charged before anything else happens: it counts until the next
        look."""
        mask = group.snapshot.mask
        for each in self._groups.values():
            if each.snapshot.mask & mask:
                each.charges += each.per_request + tokens * each.per_token

    def survey(self) -> None:
        """Look at every pool that was asked for, whoever looked last: for those who watch."""
        pools = {key[0] for key in self._groups} | {pool for pool, _ in self.by_stage}
        self.by_stage.clear()
        for pool in pools:
            try:
                endpoints = self._candidates.of(None, pool, "").endpoints
            except NoEndpointsError:
                self.by_stage[pool, "effective"] = self.detector.saturation(())
                continue
            for stage, members in _staged(endpoints, BOTH):
                self.by_stage[pool, STAGE_NAMES[stage]] = self.detector.saturation(members)
            self.by_stage[pool, "effective"] = max(level for (name, _), level in self.by_stage.items() if name == pool)

    def send(self, request: LLMRequest, group: Group, now_s: float) -> Uncharged:
        """It goes to one of the group's candidates: count it until `settle`."""
        mask, tokens = group.snapshot.mask, request.prompt_tokens
        charge = self._uncharged[request] = Uncharged(request, mask, now_s)
        sums = self._sums.get(mask)
        if sums is None:
            sums = self._sums[mask] = [0, 0]
        sums[0] += 1
        sums[1] += tokens
        self.passed(tokens, group)
        return charge

    def settle(self, request: LLMRequest) -> bool:
        """It was charged, or goes nowhere. Whether it counted."""
        found = self._uncharged.pop(request, None)
        if found is None:
            return False
        found.request = None
        sums = self._sums[found.mask]
        sums[0] -= 1
        sums[1] -= found.tokens
        if not sums[0]:
            del self._sums[found.mask]
        return True

    def twin(self) -> tuple[Saturation, Mapping[Group, Group]]:
        """One that knows the same, of which this one learns nothing; and each of its groups by the one it stands for."""
        groups = {group: copy(group) for group in self._groups.values()}
        made = copy(self)
        vars(made).update(
            _groups={key: groups[group] for key, group in self._groups.items()},
            _known={asked: groups[group] for asked, group in self._known.items() if group in groups},
            _uncharged={request: copy(charge) for request, charge in self._uncharged.items()},
            _sums={mask: list(sums) for mask, sums in self._sums.items()},
            by_stage=dict(self.by_stage),
        )
        return made, groups

    @property
    def detector_name(self) -> str:
        return str(getattr(self.detector, "name", type(self.detector).__name__))

    def endpoints(self) -> Sequence[Endpoint]:
        """All there are, of every pool that was asked for."""
        snapshots = {id(group.snapshot): group.snapshot for group in self._groups.values()}
        return list(dict.fromkeys(endpoint for snapshot in snapshots.values() for endpoint in snapshot.endpoints))

    @property
    def lapse_s(self) -> float:
        """When the oldest uncharged request counts no more."""
        return next((each.sent_s for each in self._uncharged.values()), inf) + UNCHARGED_MAX_S

    def __len__(self) -> int:
        return len(self._groups)

    def _lapse(self, now_s: float) -> None:
        while self.lapse_s <= now_s:
            self.settle(next(iter(self._uncharged)))
            self.lapsed += 1

    def _crude(self, endpoints: Sequence[Endpoint]) -> Level:
        """Of a detector that says no more than how full it is: one uncharged request is enough."""
        return self.detector.saturation(endpoints), inf, 0.0

    def _find(self, asked: Key, now_s: float) -> Group:
        pool, subset, model, needs = asked
        if model:
            try:
                if self._candidates.of(subset, pool, model) is self._candidates.of(subset, pool, ""):
                    model = ""
            except (NoEndpointsError, NotFoundError):
                pass  # a group of its own then: `resolve` finds out why
        key = (pool, subset, model, needs)
        group = self._groups.get(key)
        if group is None:
            group = self._make(key, now_s)
        self.resolve(group, now_s)
        return group

    def _make(self, key: Key, now_s: float) -> Group:
        if len(self._groups) >= GROUPS_MAX:
            self._known.clear()
            idle = [each for each, group in self._groups.items() if not group.queued]
            for each in idle:
                del self._groups[each]
            if not idle:
                self.groups_overflowed += 1
                key = (key[0], None, "", BOTH)
                if key in self._groups:
                    return self._groups[key]
        group = self._groups[key] = Group(key, now_s)
        return group

    def _anyone(self, pool: str) -> bool:
        try:
            self._candidates.of(None, pool, "")
        except NoEndpointsError:
            return False
        return True


def _staged(endpoints: Sequence[Endpoint], needs: int) -> list[tuple[int, Sequence[Endpoint]]]:
    """Stage -> those that do it, of the stages needed; all of them where no role says so."""
    if all(ROLE_LABEL not in endpoint.labels for endpoint in endpoints):
        return [(DECODE, endpoints)]
    found: list[tuple[int, Sequence[Endpoint]]] = []
    for stage in (PREFILL, DECODE):
        members = [e for e in endpoints if STAGES.get(e.labels.get(ROLE_LABEL), 0) & stage]
        if stage & needs and members:
            found.append((stage, members))
    return found or [(DECODE, endpoints)]
