"""Profile handlers: which profiles run, in which order, and what comes of it."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence

import msgspec
import pytest

from epp.clock import VirtualClock
from epp.datastore import Datastore
from epp.errors import BadRequestError, SaturatedError
from epp.plugins.base import Context, Outcome, Plugin, ProfileHandler
from epp.plugins.deciders.always_disagg_multimodal import AlwaysDisaggMultimodalDecider
from epp.plugins.deciders.always_disagg_pd import AlwaysDisaggPdDecider
from epp.plugins.deciders.prefix_based_pd import PrefixBasedPdDecider
from epp.plugins.pickers.max_score import MaxScorePicker
from epp.plugins.profile_handlers import DECISIONS_MAX
from epp.plugins.profile_handlers.data_parallel import DataParallelProfileHandler
from epp.plugins.profile_handlers.disagg import DisaggProfileHandler
from epp.plugins.profile_handlers.header import HeaderProfileHandler
from epp.plugins.profile_handlers.headers_handlers import DisaggHeadersHandler
from epp.plugins.profile_handlers.pd import PdProfileHandler
from epp.plugins.profile_handlers.single import SingleProfileHandler
from epp.types import Decision, Endpoint, LLMRequest
from tests.builders import llm_request, pool_of, spec

PREFILL, ENCODE, DATA_PARALLEL = "x-prefiller-host-port", "x-encoder-hosts-ports", "x-data-parallel-host-port"
D, P, E, E2 = pool_of({}, {}, {}, {})  # 10.0.0.1 to 10.0.0.4
EVERYONE = {"decode": [D], "prefill": [P], "encode": [E, E2]}


class Runs:
    """Profiles that choose what they are told to: nobody is left where the choice is empty."""

    def __init__(self, choices: Mapping[str, Sequence[Endpoint]], request: LLMRequest) -> None:
        self.choices = choices
        self.request = request
        self.ran: list[str] = []
        self.peers: dict[str, Endpoint | None] = {}

    def __call__(self, profile: str) -> Sequence[Endpoint]:
        self.ran.append(profile)
        self.peers[profile] = self.request.attributes.get("peer-endpoint")
        if not self.choices[profile]:
            raise SaturatedError("no endpoints available for the given request")
        return self.choices[profile]


DECIDERS: dict[str, Plugin] = {
    "yes": AlwaysDisaggPdDecider(),
    "media": AlwaysDisaggMultimodalDecider(),
    "never": PrefixBasedPdDecider(),
    "no-decider": MaxScorePicker(),
}


def bound(cls: type[Plugin], parameters: dict[str, object]) -> ProfileHandler:
    made = msgspec.convert(parameters, cls)
    if hasattr(made, "bind"):
        made.bind(Context(VirtualClock(), random.Random(1), DECIDERS))
    assert isinstance(made, ProfileHandler)
    return made


def scheduled(
    cls: type[Plugin], parameters: dict[str, object], choices: Mapping[str, Sequence[Endpoint]], **request: object
) -> tuple[Outcome, Runs]:
    handler = bound(cls, parameters)
    asked = llm_request(**request)
    runs = Runs(choices, asked)
    handler.check(list(choices))
    return handler.schedule(asked, runs, list(choices)), runs


def decided(outcome: Outcome) -> Decision:
    return Decision(outcome.chosen[0], (), outcome.profile, outcome.targets, outcome.headers, outcome.instead)


def at(*addresses: tuple[str, int]) -> list[Endpoint]:
    datastore = Datastore(VirtualClock())
    datastore.apply([spec(number, host=host, port=port) for number, (host, port) in enumerate(addresses)])
    return list(datastore.endpoints.values())


# disagg-profile-handler

BOTH = {"deciders": {"prefill": "yes", "encode": "media"}}


@pytest.mark.parametrize(
    ("parameters", "media", "without", "ran", "targets", "headers", "kind"),
    [
        # decode first
        ({}, 1, (), ["decode"], {}, {}, "decode-only"),
        ({"deciders": {"prefill": "never"}}, 0, (), ["decode"], {}, {}, "decode-only"),
        ({"deciders": {"prefill": "yes"}}, 1, (), ["decode", "prefill"], {"prefill": P}, {PREFILL: "10.0.0.2:8000"}, "prefill-decode"),
        ({"deciders": {"encode": "media"}}, 0, (), ["decode"], {}, {}, "decode-only"),
        (
            {"deciders": {"encode": "media"}}, 2, (), ["decode", "encode"], {"encode": E},
            {ENCODE: "10.0.0.3:8000,10.0.0.4:8000"}, "encode-decode",
        ),
        (
            BOTH, 1, (), ["decode", "encode", "prefill"], {"prefill": P, "encode": E},
            {PREFILL: "10.0.0.2:8000", ENCODE: "10.0.0.3:8000,10.0.0.4:8000"}, "encode-prefill-decode",
        ),
        # nobody is left for a stage: the decode worker does that part itself
        (BOTH, 1, ("prefill",), ["decode", "encode", "prefill"], {"encode": E}, {ENCODE: "10.0.0.3:8000,10.0.0.4:8000"}, "encode-decode"),
        (BOTH, 1, ("encode",), ["decode", "encode", "prefill"], {"prefill": P}, {PREFILL: "10.0.0.2:8000"}, "prefill-decode"),
        (BOTH, 1, ("encode", "prefill"), ["decode", "encode", "prefill"], {}, {}, "decode-only"),
        # prefill first
        ({"stageOrder": "prefill-first"}, 1, (), ["prefill", "decode"], {"prefill": P}, {PREFILL: "10.0.0.2:8000"}, "prefill-decode"),
        ({"stageOrder": "prefill-first"}, 1, ("prefill",), ["prefill", "decode"], {}, {}, "decode-only"),
        (
            {"stageOrder": "prefill-first", "deciders": {"encode": "media"}}, 1, (), ["prefill", "decode", "encode"],
            {"prefill": P, "encode": E}, {PREFILL: "10.0.0.2:8000", ENCODE: "10.0.0.3:8000,10.0.0.4:8000"}, "encode-prefill-decode",
        ),
        (
            {"stageOrder": "prefill-first", "deciders": {"encode": "media"}}, 1, ("prefill",), ["prefill", "decode", "encode"],
            {"encode": E}, {ENCODE: "10.0.0.3:8000,10.0.0.4:8000"}, "encode-decode",
        ),
    ],
)  # fmt: skip
def test_stages(
    *,
    parameters: dict[str, object],
    media: int,
    without: tuple[str, ...],
    ran: list[str],
    targets: dict[str, Endpoint],
    headers: dict[str, str],
    kind: str,
) -> None:
    handler = bound(DisaggProfileHandler, parameters)
    request = llm_request(media=media, target_model="m")
    runs = Runs({name: [] if name in without else choice for name, choice in EVERYONE.items()}, request)
    outcome = handler.schedule(request, runs, list(EVERYONE))
    assert runs.ran == ran
    assert (outcome.profile, list(outcome.chosen), outcome.instead) == ("decode", [D], "")
    assert dict(outcome.targets) == targets
    assert dict(outcome.headers) == headers
    assert isinstance(handler, DisaggProfileHandler)
    assert handler.decisions == {}, "an explanation is not a decision"
    handler.picked(request, decided(outcome))
    assert handler.decisions == {("m", kind): 1}


@pytest.mark.parametrize(
    ("parameters", "ran"), [(BOTH, ["decode"]), ({"stageOrder": "prefill-first", "deciders": {"encode": "media"}}, ["prefill", "decode"])]
)
def test_without_anybody_to_decode_the_request_is_shed(parameters: dict[str, object], ran: list[str]) -> None:
    handler = bound(DisaggProfileHandler, parameters)
    request = llm_request(media=1)
    runs = Runs({**EVERYONE, "decode": []}, request)
    with pytest.raises(SaturatedError, match=r"^failed to find available decode workers$"):
        handler.schedule(request, runs, list(EVERYONE))
    assert runs.ran == ran
    assert isinstance(handler, DisaggProfileHandler)
    assert handler.decisions == {}


def test_the_second_of_prefill_and_decode_sees_where_the_first_one_is() -> None:
    _, runs = scheduled(DisaggProfileHandler, BOTH, EVERYONE, media=1)
    assert runs.peers == {"decode": None, "encode": None, "prefill": D}
    first = {"stageOrder": "prefill-first", "deciders": {"encode": "media"}}
    _, runs = scheduled(DisaggProfileHandler, first, EVERYONE, media=1)
    assert runs.peers == {"prefill": None, "decode": P, "encode": None}
    _, runs = scheduled(DisaggProfileHandler, first, {**EVERYONE, "prefill": []}, media=1)
    assert runs.peers == {"prefill": None, "decode": None, "encode": None}


def test_fallbacks_of_the_decode_profile_are_the_destinations() -> None:
    outcome, _ = scheduled(DisaggProfileHandler, {}, {"decode": [D, P]})
    assert list(outcome.chosen) == [D, P]


@pytest.mark.parametrize(
    "parameters",
    [
        {"profiles": {"decode": "d", "prefill": "p", "encode": "e"}, "deciders": {"prefill": "yes", "encode": "media"}},
        {
            "decodeProfile": "d", "prefillProfile": "p", "encodeProfile": "e", "prefillDeciderPluginName": "yes",
            "encodeDeciderPluginName": "media",
        },
        {"decodeProfile": "d", "prefillProfile": "p", "encodeProfile": "e", "deciderPluginName": "yes", "encodeDeciderPluginName": "media"},
        {
            "decodeProfile": "d", "prefillProfile": "p", "encodeProfile": "e", "prefillDeciderPluginName": "yes",
            "deciderPluginName": "never", "encodeDeciderPluginName": "media",
        },
    ],
)  # fmt: skip
def test_profiles_of_other_names_and_the_deprecated_fields(parameters: dict[str, object]) -> None:
    outcome, runs = scheduled(DisaggProfileHandler, parameters, {"d": [D], "p": [P], "e": [E]}, media=1)
    assert runs.ran == ["d", "e", "p"]
    assert outcome.profile == "d"
    assert dict(outcome.targets) == {"prefill": P, "encode": E}, "by stage, whatever the profile is called"


@pytest.mark.parametrize("order", ["prefill-first", "PrefillFirst", "prefill_first", "prefill"])
def test_spellings_of_the_order(order: str) -> None:
    _, runs = scheduled(DisaggProfileHandler, {"stageOrder": order}, EVERYONE)
    assert runs.ran == ["prefill", "decode"]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"stageOrder": "encode-first"}, "stageOrder"),
        ({"stageOrder": "prefill-first", "deciders": {"prefill": "yes"}}, "deciders.prefill"),
        ({"deciders": {"prefill": "yes"}, "prefillProfile": "p"}, "not both"),
        ({"profiles": {"decode": "d"}, "deciderPluginName": "yes"}, "not both"),
        ({"deciders": {"prefil": "yes"}}, "prefil"),
        ({"profiles": {"fetch": "x"}}, "fetch"),
    ],
)
def test_a_configuration_that_contradicts_itself(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=message):
        msgspec.convert(parameters, DisaggProfileHandler)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"deciders": {"prefill": "nobody"}}, "deciders.prefill: no plugin is named 'nobody'"),
        ({"deciders": {"encode": "no-decider"}}, "deciders.encode: 'no-decider' is no decider"),
    ],
)
def test_a_decider_that_is_none(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bound(DisaggProfileHandler, parameters)


def test_there_must_be_a_profile_to_decode_with() -> None:
    with pytest.raises(ValueError, match="'decode'"):
        bound(DisaggProfileHandler, BOTH).check(["prefill", "encode"])


def test_a_stage_without_its_profile_never_runs_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "epp"):
        outcome, runs = scheduled(DisaggProfileHandler, BOTH, {"decode": [D]}, media=1)
    assert runs.ran == ["decode"]
    assert dict(outcome.targets) == {}
    assert [record.fields["profile"] for record in caplog.records] == ["prefill", "encode"]  # type: ignore[attr-defined]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "epp"):
        bound(DisaggProfileHandler, {}).check(["decode"])
    assert caplog.records == []


def test_addresses_in_headers_have_brackets_where_they_need_them() -> None:
    decode, prefill, one, two = at(("2001:db8::1", 8000), ("2001:db8::2", 8000), ("2001:db8::3", 8000), ("10.0.0.9", 8001))
    outcome, _ = scheduled(DisaggProfileHandler, BOTH, {"decode": [decode], "prefill": [prefill], "encode": [one, two]}, media=1)
    assert dict(outcome.headers) == {PREFILL: "[2001:db8::2]:8000", ENCODE: "[2001:db8::3]:8000,10.0.0.9:8001"}


def test_headers_only_the_picker_may_set() -> None:
    assert DisaggProfileHandler.own_headers == (PREFILL, ENCODE)
    assert PdProfileHandler.own_headers == (PREFILL, DATA_PARALLEL)
    assert DataParallelProfileHandler.own_headers == (DATA_PARALLEL,)
    assert SingleProfileHandler.own_headers == HeaderProfileHandler.own_headers == ()


@pytest.mark.parametrize("cls", [DisaggProfileHandler, PdProfileHandler])
def test_decisions_are_counted_by_model_within_a_bound(cls: type[DisaggProfileHandler | PdProfileHandler]) -> None:
    handler = cls()
    alone, split = Decision(D, (), "decode"), Decision(D, (), "decode", {"prefill": P})
    for model, decision in [("a", split), ("a", split), ("a", alone), ("", split)]:
        handler.picked(llm_request(target_model=model), decision)
    assert handler.decisions == {("a", "prefill-decode"): 2, ("a", "decode-only"): 1, ("unknown", "prefill-decode"): 1}
    for number in range(DECISIONS_MAX):
        handler.picked(llm_request(target_model=f"model-{number}"), alone)
    assert len(handler.decisions) == DECISIONS_MAX + 1
    assert handler.decisions["other", "decode-only"] == 3
    handler.picked(llm_request(target_model="model-0"), alone)
    assert handler.decisions["model-0", "decode-only"] == 2


# pd-profile-handler


@pytest.mark.parametrize(
    ("parameters", "without", "ran", "headers", "instead", "kind"),
    [
        ({"deciderPluginName": "never"}, (), ["decode"], {}, "", "decode-only"),
        ({"deciderPluginName": "yes"}, (), ["decode", "prefill"], {PREFILL: "10.0.0.2:8000"}, "", "prefill-decode"),
        ({"deciderPluginName": "yes"}, ("prefill",), ["decode", "prefill"], {}, "", "decode-only"),
        (
            {"deciderPluginName": "yes", "primaryPort": 9000}, (), ["decode", "prefill"],
            {PREFILL: "10.0.0.2:8000", DATA_PARALLEL: "10.0.0.1:8000"}, "10.0.0.1:9000", "prefill-decode",
        ),
    ],
)  # fmt: skip
def test_the_deprecated_pair_of_stages(
    *, parameters: dict[str, object], without: tuple[str, ...], ran: list[str], headers: dict[str, str], instead: str, kind: str
) -> None:
    handler = bound(PdProfileHandler, parameters)
    assert isinstance(handler, PdProfileHandler)
    request = llm_request(target_model="m")
    runs = Runs({name: [] if name in without else choice for name, choice in EVERYONE.items()}, request)
    outcome = handler.schedule(request, runs, list(EVERYONE))
    assert runs.ran == ran
    assert (list(outcome.chosen), dict(outcome.headers), outcome.instead) == ([D], headers, instead)
    assert dict(outcome.targets) == ({"prefill": P} if PREFILL in headers else {})
    handler.picked(request, decided(outcome))
    assert handler.decisions == {("m", kind): 1}
    assert runs.peers.get("prefill") == (D if "prefill" in ran else None)


def test_the_deprecated_pair_needs_its_decider_and_somebody_to_decode() -> None:
    with pytest.raises(ValueError, match="deciderPluginName: no plugin is named 'prefix-based-pd-decider'"):
        bound(PdProfileHandler, {})
    with pytest.raises(ValueError, match="'d'"):
        bound(PdProfileHandler, {"decodeProfile": "d", "deciderPluginName": "yes"}).check(["decode"])
    with pytest.raises(SaturatedError, match="failed to find available decode workers"):
        scheduled(PdProfileHandler, {"deciderPluginName": "yes"}, {**EVERYONE, "decode": []})


# data-parallel-profile-handler


def test_ranks_behind_one_port() -> None:
    outcome, runs = scheduled(DataParallelProfileHandler, {"primaryPort": 9000}, {"default": [D]})
    assert runs.ran == ["default"]
    assert (outcome.profile, list(outcome.chosen)) == ("default", [D])
    assert dict(outcome.headers) == {DATA_PARALLEL: "10.0.0.1:8000"}
    assert outcome.instead == "10.0.0.1:9000"


def test_ranks_of_one_host_are_one_destination_and_fallbacks_stay() -> None:
    chosen = at(("2001:db8::1", 8001), ("2001:db8::1", 8002), ("10.0.0.9", 8001))
    outcome, _ = scheduled(DataParallelProfileHandler, {}, {"default": chosen})
    assert dict(outcome.headers) == {DATA_PARALLEL: "[2001:db8::1]:8001"}
    assert outcome.instead == "[2001:db8::1]:8000,10.0.0.9:8000"


@pytest.mark.parametrize("cls", [DataParallelProfileHandler, SingleProfileHandler])
@pytest.mark.parametrize("profiles", [[], ["a", "b"]])
def test_handlers_of_one_profile_say_so(cls: type[Plugin], profiles: list[str]) -> None:
    with pytest.raises(ValueError, match="one profile"):
        bound(cls, {}).check(profiles)


@pytest.mark.parametrize("port", [0, 65536, -1])
def test_the_primary_port_is_a_port(port: int) -> None:
    with pytest.raises(msgspec.ValidationError, match="primaryPort"):
        msgspec.convert({"primaryPort": port}, DataParallelProfileHandler)


def test_the_single_profile_runs() -> None:
    outcome, runs = scheduled(SingleProfileHandler, {}, {"p": [D, P]})
    assert (runs.ran, outcome) == (["p"], Outcome("p", [D, P]))


# header-profile-handler


@pytest.mark.parametrize(
    ("parameters", "headers", "ran"),
    [
        ({}, {}, "decode"),
        ({}, {"epp-profile": "prefill"}, "prefill"),
        ({}, {"epp-profile": "  encode "}, "encode"),
        ({}, {"epp-profile": ""}, "decode"),
        ({"defaultProfile": "encode"}, {}, "encode"),
        ({"headerName": "X-Stage"}, {"x-stage": "prefill", "epp-profile": "encode"}, "prefill"),
        ({"headerName": "", "defaultProfile": ""}, {"epp-profile": "prefill"}, "prefill"),
    ],
)
def test_a_header_names_the_profile(parameters: dict[str, object], headers: dict[str, str], ran: str) -> None:
    outcome, runs = scheduled(HeaderProfileHandler, parameters, EVERYONE, headers=headers)
    assert (runs.ran, outcome.profile, list(outcome.chosen)) == ([ran], ran, EVERYONE[ran])


@pytest.mark.parametrize("name", ["Decode", "decode,prefill", "x" * 10_000])
def test_a_name_that_no_profile_has_is_the_clients_fault(name: str) -> None:
    with pytest.raises(BadRequestError, match="epp-profile") as raised:
        scheduled(HeaderProfileHandler, {}, EVERYONE, headers={"epp-profile": name})
    assert len(raised.value.message) < 200


def test_without_the_header_and_without_the_default_profile_the_request_is_refused() -> None:
    with pytest.raises(BadRequestError, match="no header epp-profile"):
        scheduled(HeaderProfileHandler, {"defaultProfile": "other"}, EVERYONE)


def test_where_there_is_one_profile_the_header_does_not_matter() -> None:
    outcome, _ = scheduled(HeaderProfileHandler, {}, {"only": [D]}, headers={"epp-profile": "prefill"})
    assert outcome.profile == "only"


def test_the_header_handler_is_experimental_and_wants_a_profile() -> None:
    assert HeaderProfileHandler.stability == "alpha"
    with pytest.raises(ValueError, match="needs a profile"):
        bound(HeaderProfileHandler, {}).check([])


def test_the_old_headers_handlers_are_accepted_and_do_nothing() -> None:
    made = msgspec.convert({"prefillProfile": "p", "encodeProfile": "e"}, DisaggHeadersHandler)
    assert made.aliases == ("prefill-header-handler",)
    assert not isinstance(made, ProfileHandler)
    with pytest.raises(msgspec.ValidationError, match="decodeProfile"):
        msgspec.convert({"decodeProfile": "d"}, DisaggHeadersHandler)
