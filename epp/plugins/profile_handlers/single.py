"""single-profile-handler: runs the one profile there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from epp.plugins.base import Outcome, Plugin, RunProfile
from epp.types import LLMRequest


class SingleProfileHandler(Plugin):
    """Runs the one profile there is."""

    type: ClassVar[str] = "single-profile-handler"
    own_headers: ClassVar[tuple[str, ...]] = ()

    def check(self, profiles: Sequence[str]) -> None:
        if len(profiles) != 1:
            raise ValueError(f"single-profile-handler runs one profile, not {len(profiles)}")

    def schedule(self, request: LLMRequest, run: RunProfile, profiles: Sequence[str]) -> Outcome:  # noqa: ARG002 - the protocol's
        return Outcome(profiles[0], run(profiles[0]))
