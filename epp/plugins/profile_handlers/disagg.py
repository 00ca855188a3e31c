"""disagg-profile-handler: prefill, encode and decode each on an endpoint of its own.

The engine that decodes is told in request headers who prefills (`x-prefiller-host-port`) and who encodes (`x-encoder-hosts-ports`); a
sidecar beside it fetches their results. Only decode must find an endpoint: without a prefill or encode worker the decode worker does
that part itself.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import ClassVar

import msgspec

from epp.plugins.base import Context, Decider, Outcome, Plugin, RunProfile
from epp.plugins.profile_handlers import (
    ENCODE_HEADER,
    PREFILL_HEADER,
    Decisions,
    count_decision,
    run_decode,
    run_if_any,
)
from epp.plugins.topology import PEER
from epp.types import Decision, Endpoint, LLMRequest

_log = logging.getLogger("epp.plugins")

DECODE_FIRST, PREFILL_FIRST = "decode-first", "prefill-first"
_ORDERS = {"": DECODE_FIRST, "decodefirst": DECODE_FIRST, "decode": DECODE_FIRST, "prefillfirst": PREFILL_FIRST, "prefill": PREFILL_FIRST}


class DisaggProfiles(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename="camel", frozen=True):
    """Stage -> profile; empty: of the stage's own name."""

    decode: str = ""
    prefill: str = ""
    encode: str = ""


class DisaggDeciders(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename="camel", frozen=True):
    """Stage -> the decider that says whether it runs; empty: it does not."""

    prefill: str = ""
    encode: str = ""


class DisaggProfileHandler(Plugin):
    """decode-first: decode, then encode and prefill if their deciders say so. prefill-first: prefill always, decode, then encode.

    While the second of prefill and decode is chosen, the request's attribute `peer-endpoint` is the first one's choice: topology
    affinity. stageOrder; profiles{decode, prefill, encode}: which profile is whose (default: of the same name); deciders{prefill, encode}:
    without one the stage never runs (a prefill decider is for decode-first alone). Deprecated, and not to be mixed with those: decodeProfile,
    prefillProfile, encodeProfile, prefillDeciderPluginName (deciderPluginName), encodeDeciderPluginName.
    """

    type: ClassVar[str] = "disagg-profile-handler"
    own_headers: ClassVar[tuple[str, ...]] = (PREFILL_HEADER, ENCODE_HEADER)

    stage_order: str = DECODE_FIRST
    profiles: DisaggProfiles = DisaggProfiles()
    deciders: DisaggDeciders = DisaggDeciders()
    decode_profile: str = ""
    prefill_profile: str = ""
    encode_profile: str = ""
    prefill_decider_plugin_name: str = ""
    decider_plugin_name: str = ""
    encode_decider_plugin_name: str = ""

    def __post_init__(self) -> None:
        order = _ORDERS.get(self.stage_order.lower().replace("-", "").replace("_", ""))
        if order is None:
            raise ValueError(f"stageOrder: {self.stage_order!r} is neither {DECODE_FIRST} nor {PREFILL_FIRST}")
        profiles = DisaggProfiles(decode=self.decode_profile, prefill=self.prefill_profile, encode=self.encode_profile)
        deciders = DisaggDeciders(
            prefill=self.prefill_decider_plugin_name or self.decider_plugin_name, encode=self.encode_decider_plugin_name
        )
        old = profiles != DisaggProfiles() or deciders != DisaggDeciders()
        if old and (self.profiles != DisaggProfiles() or self.deciders != DisaggDeciders()):
            raise ValueError("write either profiles and deciders or the deprecated fields that stood for them, not both")
        if not old:
            profiles, deciders = self.profiles, self.deciders
        if deciders.prefill and order == PREFILL_FIRST:
            raise ValueError(f"deciders.prefill: prefill always runs where stageOrder is {PREFILL_FIRST}; leave the decider out")
        self.__dict__.update(
            decisions={},
            _prefill_first=order == PREFILL_FIRST,
            _decider_names=deciders,
            _prefill_decider=None,
            _encode_decider=None,
            _decode=profiles.decode or "decode",
            _prefill=profiles.prefill or "prefill",
            _encode=profiles.encode or "encode",
        )

    @property
    def decisions(self) -> Decisions:
        """For the metric `disagg_decision_total`."""
        decisions: Decisions = self.__dict__["decisions"]
        return decisions

    def bind(self, context: Context) -> None:
        names: DisaggDeciders = self.__dict__["_decider_names"]
        if names.prefill:
            self.__dict__["_prefill_decider"] = context.plugin(names.prefill, Decider, parameter="deciders.prefill")
        if names.encode:
            self.__dict__["_encode_decider"] = context.plugin(names.encode, Decider, parameter="deciders.encode")

    def check(self, profiles: Sequence[str]) -> None:
        state = self.__dict__
        if state["_decode"] not in profiles:
            raise ValueError(f"disagg-profile-handler needs a profile {state['_decode']!r} to decode with")
        names: DisaggDeciders = state["_decider_names"]
        for stage, wanted in (("_prefill", state["_prefill_first"] or names.prefill), ("_encode", names.encode)):
            if wanted and state[stage] not in profiles:
                _log.warning("a stage never runs: its profile is not configured", extra={"fields": {"profile": state[stage]}})

    def schedule(self, request: LLMRequest, run: RunProfile, profiles: Sequence[str]) -> Outcome:
        state = self.__dict__
        prefill: Sequence[Endpoint] = ()
        if state["_prefill_first"] and state["_prefill"] in profiles:
            prefill = run_if_any(run, state["_prefill"])
            if prefill:
                request.attributes[PEER] = prefill[0]
        decode = run_decode(run, state["_decode"])
        encode: Sequence[Endpoint] = ()
        decider: Decider | None = state["_encode_decider"]
        if decider is not None and state["_encode"] in profiles and decider.disaggregate(request, decode[0]):
            request.attributes.pop(PEER, None)  # encoders are nobody's neighbours
            encode = run_if_any(run, state["_encode"])
        decider = state["_prefill_decider"]
        if decider is not None and state["_prefill"] in profiles and decider.disaggregate(request, decode[0]):
            request.attributes[PEER] = decode[0]
            prefill = run_if_any(run, state["_prefill"])
        targets, headers = {}, {}
        if prefill:
            targets["prefill"] = prefill[0]
            headers[PREFILL_HEADER] = prefill[0].destination
        if encode:
            targets["encode"] = encode[0]
            headers[ENCODE_HEADER] = ",".join(endpoint.destination for endpoint in encode)
        return Outcome(state["_decode"], decode, targets, headers)

    def picked(self, request: LLMRequest, decision: Decision) -> None:
        count_decision(self.decisions, request, decision)
