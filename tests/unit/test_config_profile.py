"""`profile`: a whole profile by its name, and the one that a configuration without any gets."""

from __future__ import annotations

import io
import json
import os
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml

from epp import cli
from epp.clock import VirtualClock
from epp.config.defaults import COST_AWARE, LLM_D, NAMED_PROFILES
from epp.config.effective import effective, to_yaml
from epp.config.load import default_config, load, resolve_defaults
from epp.config.schema import EndpointPickerConfig
from epp.datastore import Datastore
from epp.plugins.registry import Registry
from epp.policy import Policy
from epp.sources.config_file import ConfigFile
from epp.types import LLMRequest
from tests.builders import PATH, Core, chat, core
from tests.shelf import HEAD, Shelf, faults, loaded

SCORERS = {
    "cost-aware": [("cost-aware-scorer", 1.0)],
    "llm-d": [("queue-scorer", 2.0), ("kv-cache-utilization-scorer", 2.0), ("prefix-cache-scorer", 3.0)],
}
LONG = "tell me about " + "the sea and " * 200


def scheduled(config: EndpointPickerConfig) -> list[tuple[str, float]]:
    """Members of the only profile."""
    (profile,) = resolve_defaults(config, Shelf()).scheduling_profiles
    assert profile.name == "default"
    return [(member.plugin_ref, member.weight) for member in profile.plugins]


def whole(name: str) -> list[tuple[str, float]]:
    return [*SCORERS[name], ("max-score-picker", 1.0)]


# Which profile runs


def test_every_name_is_tried_here() -> None:
    assert NAMED_PROFILES.keys() == SCORERS.keys() == {COST_AWARE, LLM_D}


@pytest.mark.parametrize("name", SCORERS)
def test_a_profile_by_its_name(name: str) -> None:
    config = loaded(HEAD + f"profile: {name}\n")
    assert scheduled(config) == whole(name)
    assert config.warnings == ()
    assert loaded(json.dumps({**yaml.safe_load(HEAD), "profile": name})) == config
    assert resolve_defaults(config, Shelf()).plugin("single-profile-handler") is not None


def test_by_its_name_the_default_is_what_runs_without_a_configuration() -> None:
    assert loaded(HEAD + "profile: cost-aware") == default_config() == loaded("")


@pytest.mark.parametrize("nothing", ["", "profile:", "profile: null", "profile: ''", "plugins: []", "schedulingProfiles: []", "plugins:"])
def test_a_file_that_schedules_with_nothing_gets_the_reference_pickers_default(nothing: str) -> None:
    assert loaded(HEAD + nothing) == loaded(HEAD + "profile: llm-d")


@pytest.mark.parametrize(
    "other",
    [
        "plugins: [{type: approx-prefix-cache-producer, parameters: {size: 3}}]",
        "plugins: [{name: mine, type: openai-parser}]\nrequestHandler: {parsers: [{pluginRef: mine}]}",
        "plugins: [{name: mine, type: metrics-data-source}, {type: dcgm-extractor}]\ndataLayer: {sources: [{pluginRef: mine}]}",
        "featureGates: [flowControl]\nplugins: [{type: edf-ordering-policy}]",
        "flowControl: {maxRequests: 3, saturationDetector: {pluginRef: utilization-detector}}",
        "dataLayer: {injectDefaults: false}",
    ],
)
@pytest.mark.parametrize("name", ["", *SCORERS])
def test_what_schedules_nothing_goes_with_every_profile(name: str, other: str) -> None:
    config = loaded(HEAD + (f"profile: {name}\n" if name else "") + other)
    assert scheduled(config) == whole(name or "llm-d")
    written = {each["type"] for each in yaml.safe_load(other).get("plugins", ())}
    assert written <= {spec.type for spec in config.plugins}


def test_a_detector_is_also_a_filter_but_not_beside_a_profile_that_is_named() -> None:
    detector = "plugins: [{type: concurrency-detector, parameters: {size: 3}}]\nflowControl: {saturationDetector: {pluginRef: concurrency-detector}}\n"
    assert scheduled(loaded(HEAD + detector)) == [("concurrency-detector", 1.0), ("max-score-picker", 1.0)], "as in the reference picker"
    for name in SCORERS:
        config = loaded(HEAD + detector + f"profile: {name}\n")
        assert scheduled(config) == whole(name)
        assert config.flow_control.saturation_detector == "concurrency-detector"


@pytest.mark.parametrize("name", SCORERS)
def test_the_profile_works_with_a_producer_that_is_configured(name: str) -> None:
    """Its scorers find it, and no second one appears."""
    producer = "plugins: [{name: mine, type: approx-prefix-cache-producer, parameters: {lruCapacityPerServer: 100}}]\n"
    world = core(3, config=HEAD + producer + f"profile: {name}\n")
    assert world.built.indexes.keys() == {("mine", "approx-prefix-cache-producer")}
    sent(world, to=2)
    assert winner(world) == "pod-2"


# Faults


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("llmd", "unknown profile 'llmd'; did you mean llm-d?"),
        ("Cost-Aware", "unknown profile 'Cost-Aware'; did you mean cost-aware?"),
        ("cost-aware-scorer", "unknown profile 'cost-aware-scorer'; did you mean cost-aware?"),
        ("default", "unknown profile 'default'; known: cost-aware, llm-d"),
        ("3", "must be a string, not a number; put it in quotes"),
        ("false", "must be a string, not a boolean; put it in quotes"),
        ("[llm-d]", "must be a string, not a list; put it in quotes"),
        ("{name: llm-d}", "must be a string, not a mapping; put it in quotes"),
    ],
)
def test_a_name_that_is_none(written: str, problem: str) -> None:
    assert faults(HEAD + f"profile: {written}") == [f"profile: {problem}"]
    assert faults(HEAD + f"profile: {written}\nplugins: [{{type: queue-scorer}}]") == [f"profile: {problem}"]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ("schedulingProfiles: [{name: mine}]", "schedulingProfiles"),
        ("plugins: [{type: queue-scorer}]", "queue-scorer"),
        ("plugins: [{type: cost-aware-scorer}]", "cost-aware-scorer"),
        ("plugins: [{name: mine, type: label-filter}]", "mine"),
        ("plugins: [{type: max-score-picker, parameters: {size: 2}}]", "max-score-picker"),
        ("plugins: [{type: single-profile-handler}]", "single-profile-handler"),
        (
            "plugins: [{type: openai-parser}, {type: queue-scorer}, {type: random-picker}]\nschedulingProfiles: [{name: mine}]",
            "schedulingProfiles, queue-scorer, random-picker",
        ),
    ],
)
@pytest.mark.parametrize("name", SCORERS)
def test_a_whole_profile_takes_nothing_beside_it(name: str, other: str, named: str) -> None:
    loaded(HEAD + other)
    found = faults(HEAD + f"profile: {name}\n{other}")
    assert found == [f"profile: {name} is a whole profile and can't be combined with {named}; remove one or the other"]


def test_a_plugin_nobody_knows_is_one_fault() -> None:
    for plugin in ("type: approx-prefix-cache-produzer", "type: queue-scorr, name: queue-scorer"):
        (found,) = faults(HEAD + f"profile: llm-d\nplugins: [{{{plugin}}}]")
        assert found.startswith("plugins[0].type: unknown plugin type")


def test_profile_faults_come_with_the_others() -> None:
    assert faults("profile: llmd\nplugins: 3\nfeatureGates: [warp]") == [
        "apiVersion: is missing",
        "kind: is missing",
        "featureGates[0]: unknown feature gate 'warp'; known: flowControl, haPopulateNonLeaderDatastore",
        "plugins: must be a list, not a number",
        "profile: unknown profile 'llmd'; did you mean llm-d?",
    ]
    assert faults(HEAD + "plugins: {}") == ["plugins: must be a list, not a mapping"]
    assert faults(HEAD + "profile: llm-d\nplugins: [7]") == ["plugins[0]: must be a mapping, not a number"]


@pytest.mark.parametrize("name", ["", *SCORERS])
def test_no_other_plugin_has_the_name_of_one_of_its_scorers(name: str) -> None:
    """Else there were two of that name, and the profile would mean the wrong one."""
    profile = name or "llm-d"
    head = HEAD + (f"profile: {name}\n" if name else "")
    for scorer, _ in SCORERS[profile]:
        plugins = f"plugins: [{{type: openai-parser}}, {{name: {scorer}, type: approx-prefix-cache-producer}}]"
        assert faults(f"{head}{plugins}") == [
            f"plugins[1].name: '{scorer}' is the name of a scorer of the profile {profile}; give this plugin another"
        ]
        (other,) = SCORERS.keys() - {profile}
        loaded(f"{HEAD}profile: {other}\n{plugins}")


# Written out, checked, exchanged


@pytest.mark.parametrize("text", ["", HEAD, *(HEAD + f"profile: {name}\n" for name in SCORERS)])
def test_it_is_written_out_in_full_and_read_back_as_the_same(text: str) -> None:
    for catalogue in (Shelf(), Registry()):
        config = load(text, source="test", catalogue=catalogue)
        written = to_yaml(config, catalogue)
        assert "profile" not in effective(config, catalogue), "spelled out"
        again = load(written, source="written out", catalogue=catalogue)
        assert resolve_defaults(again, catalogue) == resolve_defaults(config, catalogue)
        assert to_yaml(again, catalogue) == written


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(["config", "print", *argv]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


@pytest.mark.parametrize("name", SCORERS)
def test_epp_config_print(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(HEAD + f"profile: {name}\n")
    out = printed(capsys, str(file))
    (profile,) = yaml.safe_load(out)["schedulingProfiles"]
    assert [(each["pluginRef"], each.get("weight")) for each in profile["plugins"]] == [*SCORERS[name], ("max-score-picker", None)]
    monkeypatch.setattr(sys, "stdin", io.StringIO(out))
    assert printed(capsys, "-") == out
    assert (printed(capsys) == out) is (name == "cost-aware")


def test_epp_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "policy.yaml"
    for text, members in [("", 4), ("profile: llm-d", 4), ("profile: cost-aware", 2)]:
        file.write_text(HEAD + text)
        assert cli.main(["check", str(file)]) == 0
        out, err = capsys.readouterr()
        assert (out.partition("profiles: ")[2], err) == (f"default ({members} plugins)\n", "")
    file.write_text(HEAD + "profile: llmd\n")
    assert cli.main(["check", str(file)]) == 2
    assert capsys.readouterr() == ("", f"epp: {file}: 1 problem\n  profile: unknown profile 'llmd'; did you mean llm-d?\n")


def sent(world: Core, to: int) -> None:
    """A request to `pod-<to>`, and its answer."""
    request = LLMRequest(id="r", path=PATH, headers={":path": PATH})
    world.director.route(request, chat(LONG), (f"10.0.0.{to}",), 0.0).finish(complete=True)


def winner(world: Core) -> str:
    told = world.director.explain(LLMRequest(id="r", path=PATH, headers={":path": PATH}), chat(LONG), None)
    return str(told["endpoint"])


def running(world: Core) -> set[str]:
    return {name for name in world.built.plugins if name.endswith("-scorer")}


def test_one_in_the_place_of_the_other_and_what_is_cached_stays_known() -> None:
    named = {name: {type_ for type_, _ in scorers} for name, scorers in SCORERS.items()}
    world = core(8)
    sent(world, to=5)
    for name in ("llm-d", "cost-aware", "llm-d"):
        under_way = world.director.route(LLMRequest(id="r", path=PATH, headers={":path": PATH}), chat("short"), None, 0.0)
        world.use(HEAD + f"profile: {name}\n")
        assert running(world) == named[name]
        under_way.response_headers(200, event_stream=False, served="", code_details="")
        under_way.response_chunk(b"{}")
        under_way.finish(complete=True)
        assert winner(world) == "pod-5"
    assert world.inflight == (0, 0, 0, 0)


def test_the_same_by_another_name_keeps_what_it_learned() -> None:
    world = core(2)
    learned = world.built.plugins["cost-aware-scorer"]
    world.use(HEAD + "profile: cost-aware\n")
    assert world.built.plugins["cost-aware-scorer"] is learned


@pytest.mark.parametrize("name", SCORERS)
def test_a_gateway_that_takes_a_list_gets_one(name: str) -> None:
    clock = VirtualClock()
    policy = Policy(Datastore(clock), Registry(), clock, random.Random(1), fallbacks=2)
    policy.apply(HEAD + f"profile: {name}\n", "test")
    picker = policy.built.plugins["max-score-picker"]
    assert getattr(picker, "max_num_of_endpoints", None) == 3


def test_a_file_that_changes_from_one_to_the_other(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    clock, outcomes = VirtualClock(), Counter[str]()
    policy = Policy(Datastore(clock), Registry(), clock, random.Random(1))
    source = ConfigFile(file, policy.apply, outcomes)

    def write(number: int, text: str) -> None:
        file.write_text(text)
        os.utime(file, ns=(number, number))

    write(1, HEAD + "profile: cost-aware\n")
    source.load()
    assert "cost-aware-scorer" in policy.built.plugins
    write(2, HEAD + "profile: llm-d\n")
    assert source.once()
    assert "cost-aware-scorer" not in policy.built.plugins
    before = policy.built
    write(3, HEAD + "profile: llmd\n")
    source.once()
    assert policy.built is before, "a name that is none changes nothing"
    write(4, HEAD)
    source.once()
    assert policy.built.plugins["queue-scorer"] is before.plugins["queue-scorer"], "llm-d is what this means"
    write(5, HEAD + "profile: cost-aware\n")
    assert source.once()
    assert "cost-aware-scorer" in policy.built.plugins
    assert outcomes == {"applied": 3, "rejected": 1}
