"""Plugin types: built in, by entry point, by module:Class; and their parameters."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import msgspec
import pytest

from epp.config.load import default_config, load, resolve_defaults
from epp.errors import ConfigError
from epp.plugins.base import Plugin, PointwiseScorer, RangeScorer
from epp.plugins.profile_handlers.single import SingleProfileHandler
from epp.plugins.registry import BUILT_IN, Registry, UnknownPluginError, built_in
from epp.plugins.scorers.queue import QueueScorer
from epp.types import Endpoint, LLMRequest


class Limits(msgspec.Struct, rename="camel", forbid_unknown_fields=True):
    low_mark: int = 0
    high_mark: int = 9


class RoomyFilter(Plugin):
    type: ClassVar[str] = "roomy-filter"
    aliases: ClassVar[tuple[str, ...]] = ("room-filter",)

    max_share: Annotated[float, msgspec.Meta(ge=0, le=1)]
    zones: tuple[str, ...] = ()
    limits: Limits = msgspec.field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.limits.low_mark > self.limits.high_mark:
            raise ValueError("lowMark is above highMark")

    def keep(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[Endpoint]:
        return endpoints


def faults(parameters: dict[str, object]) -> list[str]:
    return [str(problem) for problem in Registry([RoomyFilter]).problems("roomy-filter", parameters, "plugins[2]")]


def test_the_built_in_types() -> None:
    registry = Registry(entry_point_group="none")
    assert set(registry.types()) == set(BUILT_IN)
    for type_ in BUILT_IN:
        cls = registry.load(type_)
        assert type_ in (cls.type, *cls.aliases), "the table's name is the class's own"
        assert registry.role(type_)
    assert registry.role("queue-scorer") == {"scorer"}
    assert registry.role("max-score-picker") == {"picker"}
    assert registry.role("approx-prefix-cache-producer") == {"producer"}
    assert registry.role("single-profile-handler") == {"profile-handler"}
    assert registry.role("nothing") == set()


@pytest.mark.parametrize("cls", built_in())
def test_every_built_in_type_is_built_without_parameters_or_says_which_it_needs(cls: type[Plugin]) -> None:
    registry = Registry()
    problems = registry.problems(cls.type, {}, "plugins[0]")
    if problems:
        assert all(problem.path.startswith("plugins[0].parameters") for problem in problems)
        return
    plugin = registry.build(cls.type, {}, "mine")
    assert type(plugin) is cls
    assert plugin.name == "mine"


def test_a_deprecated_name_says_what_to_write_instead() -> None:
    registry = Registry()
    assert registry.deprecated("by-label-selector") == "label-selector-filter"
    assert registry.deprecated("queue-scorer") == ""
    assert registry.deprecated("nothing") == ""


def test_the_default_configuration_is_right() -> None:
    registry = Registry()
    config = resolve_defaults(default_config(), registry)
    assert [fault for plugin in config.plugins for fault in registry.problems(plugin.type, plugin.parameters, plugin.name)] == []


def test_build_takes_camel_case_parameters() -> None:
    plugin = Registry([RoomyFilter]).build("room-filter", {"maxShare": 1, "limits": {"lowMark": 2}}, "r")
    assert isinstance(plugin, RoomyFilter)
    assert (plugin.max_share, plugin.limits.low_mark, plugin.limits.high_mark) == (1.0, 2, 9)


def test_all_faults_of_parameters_at_once() -> None:
    assert faults({"maxShar": 1, "zones": ["a", 2], "limits": {"lowMark": "x", "highMrk": 1, "highMark": 1.5}, 3: 4}) == [
        "plugins[2].parameters.maxShar: unknown parameter; did you mean maxShare?",
        "plugins[2].parameters.3: unknown parameter; known: limits, maxShare, zones",
        "plugins[2].parameters.maxShare: is missing",
        "plugins[2].parameters.zones[1]: Expected `str`, got `int`",
        "plugins[2].parameters.limits.highMrk: unknown parameter; did you mean highMark?",
        "plugins[2].parameters.limits.lowMark: Expected `int`, got `str`",
        "plugins[2].parameters.limits.highMark: Expected `int`, got `float`",
    ]


def test_limits_of_a_parameter() -> None:
    assert faults({"maxShare": 2}) == ["plugins[2].parameters.maxShare: Expected `float` <= 1.0"]
    assert faults({"maxShare": 1, "limits": 3}) == ["plugins[2].parameters.limits: must be a mapping, not a number"]


def test_what_the_class_itself_objects_to() -> None:
    assert faults({"maxShare": 1, "limits": {"lowMark": 10}}) == ["plugins[2].parameters: lowMark is above highMark"]


def test_a_type_without_parameters() -> None:
    (problem,) = Registry().problems("single-profile-handler", {"x": 1}, "plugins[0]")
    assert str(problem) == "plugins[0].parameters.x: unknown parameter; it takes no parameters"


def test_an_unknown_type() -> None:
    (problem,) = Registry().problems("queue-scorr", {}, "plugins[0]")
    assert str(problem) == "plugins[0].type: unknown plugin type 'queue-scorr'; did you mean queue-scorer?"
    with pytest.raises(UnknownPluginError):
        Registry().build("nothing", {}, "x")


def test_a_name_can_be_taken_once() -> None:
    class Impostor(SingleProfileHandler):
        type: ClassVar[str] = "queue-scorer"

    registry = Registry()
    registry.register(QueueScorer)  # again: no harm
    with pytest.raises(ValueError, match="'queue-scorer' is taken by"):
        registry.register(Impostor)


def test_only_plugins_can_be_registered() -> None:
    with pytest.raises(ValueError, match="is not a subclass"):
        Registry().register(Limits)  # type: ignore[arg-type]


THIRD_PARTY = """
from typing import ClassVar
from epp.plugins.base import Plugin

class Nearest(Plugin):
    type: ClassVar[str] = "nearest-scorer"
    per_request: ClassVar[bool] = False
    reach: int = 1
    def score(self, request, endpoints):
        return [1.0 for _ in endpoints]

class Idle(Plugin):
    type: ClassVar[str] = "idle"

class Vague(Plugin):
    type: ClassVar[str] = "vague"
    def score(self, request, endpoints):
        return []

class Nameless(Plugin):
    def pick(self, totals, endpoints, rng):
        return endpoints

NUMBER = 7
"""


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "shop_plugins.py").write_text(THIRD_PARTY)
    (tmp_path / "shop_broken.py").write_text("raise ValueError('no GPU')\n")
    info = tmp_path / "shop-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shop\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[epp.plugins]\nnearest-scorer = shop_plugins:Nearest\ngone-scorer = shop_plugins:Gone\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("shop_plugins", None)


@pytest.mark.usefixtures("third_party")
def test_entry_points_are_known_by_name_and_imported_when_used() -> None:
    registry = Registry()
    assert {"nearest-scorer", "gone-scorer"} <= set(registry.types())
    assert "shop_plugins" not in sys.modules
    assert registry.role("nearest-scorer") == {"scorer"}
    assert registry.build("nearest-scorer", {"reach": 3}, "n").name == "n"
    (problem,) = registry.problems("gone-scorer", {}, "plugins[0]")
    assert str(problem).startswith("plugins[0].type: 'gone-scorer' can't be loaded: ")


@pytest.mark.usefixtures("third_party")
def test_module_and_class_as_a_type() -> None:
    registry = Registry()
    config = load(
        "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\nplugins: [{name: n, type: 'shop_plugins:Nearest', parameters: {reach: 2}}]",
        source="test",
        catalogue=registry,
    )
    assert [p.plugin_ref for p in resolve_defaults(config, registry).scheduling_profiles[0].plugins] == ["n", "max-score-picker"]


@pytest.mark.usefixtures("third_party")
def test_classes_that_are_no_plugins_are_faults() -> None:
    text = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\nplugins:\n" + "".join(
        f"- type: '{type_}'\n"
        for type_ in (
            "shop_plugins:Idle", "shop_plugins:Vague", "shop_plugins:Nameless", "shop_plugins:NUMBER", "shop_plugins:Gone",
            "no_such_module:X", "shop_broken:X", ":X", "shop_plugins:",
        )
    )  # fmt: skip
    with pytest.raises(ConfigError) as raised:
        load(text, source="test", catalogue=Registry())
    found = [str(problem) for problem in raised.value.problems]
    assert [fault.split(": ", 1)[0] for fault in found] == [f"plugins[{i}].type" for i in range(9)]
    assert "has none of the methods keep, score, pick, produce" in found[0]
    assert "is a scorer without `per_request`" in found[1]
    assert "has no `type`" in found[2]
    assert "is not a subclass of epp.plugins.base.Plugin" in found[3]
    assert all("can't be loaded" in fault for fault in found[4:])
    assert "no GPU" in found[6]


@pytest.mark.usefixtures("third_party")
def test_a_fault_in_third_party_parameters() -> None:
    (problem,) = Registry().problems("shop_plugins:Nearest", {"reech": 2}, "plugins[0]")
    assert str(problem) == "plugins[0].parameters.reech: unknown parameter; did you mean reach?"


def test_a_scorer_that_leaves_out_its_one_method_is_a_fault_of_the_configuration_not_of_every_request() -> None:
    class Forgetful(PointwiseScorer):
        type = "forgetful-scorer"

    class AlsoForgetful(RangeScorer):
        type = "also-forgetful-scorer"

    with pytest.raises(ValueError, match="is a PointwiseScorer without `score_one`"):
        Registry([Forgetful])
    with pytest.raises(ValueError, match="is a RangeScorer without `measure`"):
        Registry([AlsoForgetful])
