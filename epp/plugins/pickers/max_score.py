"""max-score-picker: the highest total wins; ties are broken uniformly at random."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar

from epp.plugins.base import Plugin
from epp.types import Endpoint


class MaxScorePicker(Plugin):
    """The highest total; uniform among ties. maxNumOfEndpoints > 1 adds the next best as fallbacks, for gateways that take a list."""

    type: ClassVar[str] = "max-score-picker"

    max_num_of_endpoints: int = 1

    def pick(self, totals: Sequence[float], endpoints: Sequence[Endpoint], rng: random.Random) -> Sequence[Endpoint]:
        wanted = min(max(1, self.max_num_of_endpoints), len(endpoints))
        if wanted == 1:
            best = max(totals)
            first = totals.index(best)
            ties = totals.count(best)
            if ties == 1:
                return (endpoints[first],)
            return (endpoints[rng.choice([i for i, total in enumerate(totals) if total == best])],)
        order = list(range(len(endpoints)))
        rng.shuffle(order)  # then a stable sort: uniform among ties
        order.sort(key=totals.__getitem__, reverse=True)
        return tuple(endpoints[i] for i in order[:wanted])
