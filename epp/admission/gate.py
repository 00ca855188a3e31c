"""Who may go now: bands, their ceilings, and how full the candidates are, put together.

A turn (one pump) looks at each group of candidates once; a group found closed stays so to its end, for lower bands too, as what is let
through only fills it. Not here: what happens to those who go (control). Cost: the detector's, once a group and turn.
"""

from __future__ import annotations

from math import inf

from epp.admission.bands import Band, Bands
from epp.admission.eviction import Evictor, Need
from epp.admission.saturation import EMPTY, PASSING, REUSE_S, ROUNDED_UP, USABLE, Group, Saturation
from epp.admission.settings import UsageLimit


class Gate:
    """See the module. `bands` and `limit` are exchanged with the configuration."""

    def __init__(self, saturation: Saturation, bands: Bands, limit: UsageLimit) -> None:
        self.saturation = saturation
        self.bands = bands
        self.limit = limit
        self._turn = 0
        self.blocked: list[tuple[Band, Group]] = []
        """Bands with requests queued, and the groups that were full for them this turn."""

    def passes(self, band: Band, group: Group, now_s: float) -> bool:
        """Whether a request that just came goes before all that wait."""
        if group.state != USABLE:
            return group.state == PASSING
        if group.queued:
            for each in self.bands.all:
                if group in each.backlogs:
                    return False
                if each is band:
                    break
        if now_s - group.at_s < REUSE_S:
            usage = group.saturation + group.charges * ROUNDED_UP  # `group.estimate`, and `_open`, without the calls
            if usage < self.limit.ceiling(self.bands.positions[band], self.bands.priorities, usage, now_s):
                return True
        self.saturation.look(group, now_s)
        return self._open(band, group, now_s)

    def turn(self, now_s: float) -> None:
        """Look at everybody anew."""
        self._turn += 1
        self.blocked.clear()
        for group in self.saturation.queued():
            self.saturation.resolve(group, now_s)

    def next(self, band: Band, now_s: float) -> Group | None:
        """Whose backlog in this band is served next; None: there is none this turn."""
        turn, best, lowest = self._turn, None, (inf, 0)
        weighed = False
        for group, backlog in band.backlogs.items():
            if group.blocked == turn:
                continue
            if not self._still_open(band, group, now_s):
                group.blocked = turn
                continue
            if not weighed:
                weighed = True
                band.fairness.weigh(iter(band.backlogs.values()))
            if len(band.backlogs) == 1:
                return group
            rank = backlog.rank()
            if best is None or rank < lowest:
                best, lowest = group, rank
        return best

    def opens_s(self, now_s: float) -> float:
        """When one of the blocked may be open by time alone."""
        opens = getattr(self.limit, "opens_s", None)
        if opens is None or not any(group.estimate < 1.0 for _, group in self.blocked):
            return inf
        found: float = opens(now_s)
        return found

    def reclaim(self, evictor: Evictor, pool_name: str, now_s: float) -> float:
        """Have running requests give way to the blocked. When to ask again though nothing happened."""
        ready_s = evictor.ready_s(now_s)
        if ready_s > now_s:
            return ready_s
        for band, group in self.blocked:
            ceiling = self._ceiling(band, group.saturation, now_s)
            need = Need(band.priority, group.key[0] or pool_name, group.snapshot.mask, group.saturation, ceiling)
            if evictor.reclaim(need, now_s):
                return evictor.ready_s(now_s)
        return inf

    def _still_open(self, band: Band, group: Group, now_s: float) -> bool:
        if group.state != USABLE:
            return group.state != EMPTY
        if group.looked != self._turn:
            group.looked = self._turn
            self.saturation.look(group, now_s)
        if self._open(band, group, now_s):
            return True
        self.blocked.append((band, group))
        return False

    def _open(self, band: Band, group: Group, now_s: float) -> bool:
        usage = group.estimate
        return usage < self._ceiling(band, usage, now_s)

    def _ceiling(self, band: Band, saturation: float, now_s: float) -> float:
        return self.limit.ceiling(self.bands.positions[band], self.bands.priorities, saturation, now_s)
