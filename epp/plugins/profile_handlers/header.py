"""header-profile-handler: a request header names the profile that runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from epp.errors import BadRequestError
from epp.plugins.base import Outcome, Plugin, RunProfile
from epp.types import LLMRequest

SHOWN_CHARS = 64
"""Of a name that no profile has, in the answer."""


class HeaderProfileHandler(Plugin):
    """Runs the profile named by the request header headerName; defaultProfile where there is none, or the only profile there is.

    A name that no profile has is the client's fault: 400. For a coordinator that sends each stage of a request by itself.
    """

    type: ClassVar[str] = "header-profile-handler"
    stability: ClassVar[Literal["beta", "alpha"]] = "alpha"
    own_headers: ClassVar[tuple[str, ...]] = ()

    header_name: str = "EPP-Profile"
    default_profile: str = "decode"

    def __post_init__(self) -> None:
        self.__dict__["_header"] = self.header_name.strip().lower() or "epp-profile"
        self.__dict__["_default"] = self.default_profile.strip() or "decode"

    def check(self, profiles: Sequence[str]) -> None:
        if not profiles:
            raise ValueError("header-profile-handler needs a profile")

    def schedule(self, request: LLMRequest, run: RunProfile, profiles: Sequence[str]) -> Outcome:
        if len(profiles) == 1:
            return Outcome(profiles[0], run(profiles[0]))
        header: str = self.__dict__["_header"]
        wanted = request.headers.get(header, "").strip()
        profile = wanted or self.__dict__["_default"]
        if profile not in profiles:
            if wanted:
                raise BadRequestError(f"header {header}: no scheduling profile is named {wanted[:SHOWN_CHARS]!r}")
            raise BadRequestError(f"the request has no header {header}, and there is no scheduling profile {profile!r}")
        return Outcome(profile, run(profile))
