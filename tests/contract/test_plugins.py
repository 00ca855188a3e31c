"""The contract of every built-in plugin, whatever it is for."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from epp.plugins.base import Plugin
from epp.plugins.registry import BUILT_IN, Registry
from tests.contract.situations import CLASSES, REQUIRED, Case, built, cases, ready

EVERY = list(CLASSES.values())


@pytest.mark.parametrize("type_", BUILT_IN)
def test_every_type_can_be_loaded_and_is_a_name_of_its_class(type_: str) -> None:
    cls = Registry(entry_point_group="").load(type_)
    assert type_ in (cls.type, *cls.aliases)


@pytest.mark.parametrize("cls", EVERY)
def test_a_type_is_a_lower_case_name_that_leads_to_the_class(cls: type[Plugin]) -> None:
    for name in (cls.type, *cls.aliases):
        assert name == name.lower()
        assert name.replace("-", "").isalnum()
        assert Registry(entry_point_group="").load(name) is cls
    assert built(cls.type).name == cls.type


@pytest.mark.parametrize("cls", EVERY)
def test_a_class_says_what_it_does_and_how_far_it_is(cls: type[Plugin]) -> None:
    assert (cls.__doc__ or "").strip()
    assert cls.__doc__ != Plugin.__doc__
    assert cls.stability in ("alpha", "beta")
    for keys in (cls.requires, cls.uses, cls.produces, cls.aliases, cls.roles):
        assert isinstance(keys, tuple)


@pytest.mark.parametrize("cls", EVERY)
def test_unknown_parameters_are_a_problem_that_names_them(cls: type[Plugin]) -> None:
    parameters = {**REQUIRED.get(cls.type, {}), "noSuchParameter": 1}
    (problem,) = Registry().problems(cls.type, parameters, "plugins[3]")
    assert problem.path == "plugins[3].parameters.noSuchParameter"
    with pytest.raises(msgspec.ValidationError, match="noSuchParameter"):
        Registry().build(cls.type, parameters, "x")


def wrong_for(field: msgspec.structs.FieldInfo) -> Any:
    """A value that can't be that field's."""
    for value in ({"not": "this"}, [{"no": [1]}], "nonsense", 1.5, -1):
        try:
            msgspec.convert(value, field.type)
        except msgspec.ValidationError:
            return value
    raise AssertionError(f"{field.encode_name} takes anything")


@pytest.mark.parametrize("cls", EVERY)
def test_parameters_of_a_wrong_type_are_a_problem_each(cls: type[Plugin]) -> None:
    wrong = {field.encode_name: wrong_for(field) for field in msgspec.structs.fields(cls)}
    problems = Registry().problems(cls.type, wrong, "plugins[0]")
    places = {problem.path for problem in problems}
    for name in wrong:
        assert any(place.startswith(f"plugins[0].parameters.{name}") for place in places), name


@pytest.mark.parametrize("type_", REQUIRED)
def test_what_must_be_written_is_missing_by_name(type_: str) -> None:
    missing = {problem.path for problem in Registry().problems(type_, {}, "plugins[0]")}
    assert missing
    assert missing <= {"plugins[0].parameters", *(f"plugins[0].parameters.{name}" for name in REQUIRED[type_])}


@pytest.mark.parametrize("cls", EVERY)
def test_two_instances_share_no_state(cls: type[Plugin]) -> None:
    one, two = built(cls.type), built(cls.type)
    one.named("one")
    assert two.name == cls.type
    for key, value in vars(one).items():
        if isinstance(value, dict | list | set):
            assert value is not vars(two)[key], key


NAMING = {
    "inFlightLoadProducerName": ["active-request-scorer", "concurrency-detector", "token-load-scorer", "utilization-filter"],
    "prefixMatchInfoProducerName": ["latency-scorer", "no-hit-lru-scorer", "prefix-cache-scorer", "token-load-scorer"],
    "latencyPredictionInfoProducerName": ["latency-scorer", "latency-slo-admitter"],
}


@pytest.mark.parametrize(("parameter", "type_"), [(name, type_) for name, types in NAMING.items() for type_ in types])
def test_a_producer_that_is_named_must_be_there_and_be_one(parameter: str, type_: str) -> None:
    with pytest.raises(ValueError, match=f"{parameter}: no plugin is named 'elsewhere'"):
        ready(Case(type_, {**REQUIRED.get(type_, {}), parameter: "elsewhere"}))
    other = built("inflight-load-producer")
    other.named("elsewhere")
    ready(Case(type_, {**REQUIRED.get(type_, {}), parameter: "elsewhere"}), others=[other])
    no_producer = built("max-score-picker")
    no_producer.named("elsewhere")
    with pytest.raises(ValueError, match="is no producer"):
        ready(Case(type_, {**REQUIRED.get(type_, {}), parameter: "elsewhere"}), others=[no_producer])


def test_the_reference_pickers_spellings_of_acronyms_are_ours() -> None:
    assert built("prefix-cache-affinity-filter", maxTTFTPenaltyMs=5, ttftSource="prefillThroughput")
    assert built("latency-scorer", compositeKVWeight=2)
    assert built("precise-prefix-cache-scorer", speculativeTTL="2s", kvEventsConfig={"zmqEndpoint": ""}, tokenProcessorConfig={})
    assert built("no-hit-lru-scorer", prefixPluginType="prefix-cache-scorer", prefixPluginName="p")
    assert built("active-request-scorer", requestTimeout="2m")


def test_cases_are_of_what_has_the_method() -> None:
    assert {case.type for case in cases("pick")} == {"max-score-picker", "random-picker", "weighted-random-picker"}
    assert {case.type for case in cases("saturation")} == {"utilization-detector", "concurrency-detector", "predicted-wait-detector"}
