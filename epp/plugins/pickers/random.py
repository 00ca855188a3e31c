"""random-picker: any endpoint, uniformly; totals don't matter."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar

from epp.plugins.base import Plugin
from epp.types import Endpoint


class RandomPicker(Plugin):
    """Any endpoint with the same chance. maxNumOfEndpoints > 1 adds as many others as fallbacks, for gateways that take a list."""

    type: ClassVar[str] = "random-picker"

    max_num_of_endpoints: int = 1

    def pick(self, _totals: Sequence[float], endpoints: Sequence[Endpoint], rng: random.Random) -> Sequence[Endpoint]:
        wanted = min(max(1, self.max_num_of_endpoints), len(endpoints))
        if wanted == 1:
            return (rng.choice(endpoints),)
        return rng.sample(endpoints, wanted)
