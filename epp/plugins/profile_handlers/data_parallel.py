"""data-parallel-profile-handler: ranks of a server that all listen behind one port."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import msgspec

from epp.plugins.base import Outcome, Plugin, RunProfile
from epp.plugins.profile_handlers import DATA_PARALLEL_HEADER, at_port
from epp.types import LLMRequest


class DataParallelProfileHandler(Plugin):
    """Runs the one profile there is; the gateway is sent to primaryPort of the chosen host.

    The chosen rank's own address goes into the header `x-data-parallel-host-port`, for the sidecar that listens on primaryPort.
    """

    type: ClassVar[str] = "data-parallel-profile-handler"
    own_headers: ClassVar[tuple[str, ...]] = (DATA_PARALLEL_HEADER,)

    primary_port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 8000

    def check(self, profiles: Sequence[str]) -> None:
        if len(profiles) != 1:
            raise ValueError(f"data-parallel-profile-handler runs one profile, not {len(profiles)}")

    def schedule(self, request: LLMRequest, run: RunProfile, profiles: Sequence[str]) -> Outcome:  # noqa: ARG002 - the protocol's
        chosen = run(profiles[0])
        headers = {DATA_PARALLEL_HEADER: chosen[0].destination}
        return Outcome(profiles[0], chosen, headers=headers, instead=at_port(chosen, self.primary_port))
