"""pd-profile-handler: prefill and decode on endpoints of their own; the deprecated forerunner of disagg-profile-handler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import msgspec

from epp.plugins.base import Context, Decider, Outcome, Plugin, RunProfile
from epp.plugins.profile_handlers import (
    DATA_PARALLEL_HEADER,
    PREFILL_HEADER,
    Decisions,
    at_port,
    count_decision,
    run_decode,
    run_if_any,
)
from epp.plugins.topology import PEER
from epp.types import Decision, Endpoint, LLMRequest


class PdProfileHandler(Plugin):
    """Decode, then prefill if the decider says so.

    deciderPluginName must be configured. primaryPort (0: off): the gateway is sent to that port of the chosen host, and the rank behind it
    is named in `x-data-parallel-host-port`. prefixPluginType, prefixPluginName and prefixMatchInfoProducerName are accepted and unused.
    """

    type: ClassVar[str] = "pd-profile-handler"
    deprecated: ClassVar[str] = "disagg-profile-handler"
    own_headers: ClassVar[tuple[str, ...]] = (PREFILL_HEADER, DATA_PARALLEL_HEADER)

    decode_profile: str = "decode"
    prefill_profile: str = "prefill"
    decider_plugin_name: Annotated[str, msgspec.Meta(min_length=1)] = "prefix-based-pd-decider"
    primary_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    prefix_plugin_type: str = ""
    prefix_plugin_name: str = ""
    prefix_match_info_producer_name: str = ""

    def __post_init__(self) -> None:
        self.__dict__["decisions"] = {}

    @property
    def decisions(self) -> Decisions:
        """For the metric `disagg_decision_total`."""
        decisions: Decisions = self.__dict__["decisions"]
        return decisions

    def bind(self, context: Context) -> None:
        self.__dict__["_decider"] = context.plugin(self.decider_plugin_name, Decider, parameter="deciderPluginName")

    def check(self, profiles: Sequence[str]) -> None:
        if self.decode_profile not in profiles:
            raise ValueError(f"pd-profile-handler needs a profile {self.decode_profile!r} to decode with")

    def schedule(self, request: LLMRequest, run: RunProfile, profiles: Sequence[str]) -> Outcome:
        decode = run_decode(run, self.decode_profile)
        prefill: Sequence[Endpoint] = ()
        decider: Decider = self.__dict__["_decider"]
        if self.prefill_profile in profiles and decider.disaggregate(request, decode[0]):
            request.attributes[PEER] = decode[0]
            prefill = run_if_any(run, self.prefill_profile)
        targets, headers, instead = {}, {}, ""
        if prefill:
            targets["prefill"] = prefill[0]
            headers[PREFILL_HEADER] = prefill[0].destination
        if self.primary_port:
            headers[DATA_PARALLEL_HEADER] = decode[0].destination
            instead = at_port(decode, self.primary_port)
        return Outcome(self.decode_profile, decode, targets, headers, instead)

    def picked(self, request: LLMRequest, decision: Decision) -> None:
        count_decision(self.decisions, request, decision)
