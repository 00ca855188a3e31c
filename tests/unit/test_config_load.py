"""EndpointPickerConfig text in, configuration or every fault out."""

import msgspec
import pytest

from epp.config.load import FEATURE_GATES, default_config, load, resolve_defaults
from epp.config.schema import EndpointPickerConfig, PluginSpec, ProfilePlugin, SchedulingProfile
from epp.errors import ConfigError
from tests.shelf import HEAD, Shelf, faults, loaded


def test_a_whole_configuration() -> None:
    config = loaded(
        HEAD
        + """
featureGates: [flowControl=false, haPopulateNonLeaderDatastore = F]
plugins:
- type: queue-scorer
- {name: cache, type: prefix-cache-scorer, parameters: {size: 3}}
- type: max-score-picker
- type: single-profile-handler
schedulingProfiles:
- name: default
  plugins:
  - pluginRef: queue-scorer
    weight: 2
  - pluginRef: cache
  - pluginRef: max-score-picker
"""
    )
    assert config.feature_gates == {"flowControl": False, "haPopulateNonLeaderDatastore": False}
    assert config.plugin("cache") == PluginSpec(name="cache", type="prefix-cache-scorer", parameters={"size": 3})
    assert config.plugin("queue-scorer") == PluginSpec(name="queue-scorer", type="queue-scorer")
    assert config.plugin("nothing") is None
    (profile,) = config.scheduling_profiles
    assert [(p.plugin_ref, p.weight) for p in profile.plugins] == [("queue-scorer", 2.0), ("cache", 1.0), ("max-score-picker", 1.0)]


def test_json_and_the_deprecated_version_are_accepted() -> None:
    config = loaded('{"apiVersion": "inference.networking.x-k8s.io/v1alpha1", "kind": "EndpointPickerConfig", "plugins": null}')
    assert config.api_version == "inference.networking.x-k8s.io/v1alpha1"
    assert config == msgspec.structs.replace(
        loaded(HEAD), api_version="inference.networking.x-k8s.io/v1alpha1", warnings=config.warnings
    ), "as if nothing but the head were written"
    assert config.warnings == ("apiVersion: inference.networking.x-k8s.io/v1alpha1 is deprecated; write llm-d.ai/v1alpha1",)


@pytest.mark.parametrize("text", ["", "  \n", "# nothing yet\n", "---\n"])
def test_no_configuration_is_the_default_one(text: str) -> None:
    assert loaded(text) == default_config()


def test_the_default_configuration() -> None:
    config = resolve_defaults(default_config(), Shelf())
    assert [(p.plugin_ref, p.weight) for p in config.scheduling_profiles[0].plugins] == [
        ("cost-aware-scorer", 1.0),
        ("max-score-picker", 1.0),
    ]
    assert config.scheduling_profiles[0].name == "default"
    assert config.plugin("max-score-picker") is not None
    assert config.feature_gates == FEATURE_GATES


def test_every_fault_is_reported_at_once() -> None:
    found = faults(
        """
apiVersion: v2
kind: Config
color: red
featureGates: [flowControl=maybe, warp, flowControl, 3, =true]
dataLayer: {sources: {}}
flowControl: {maxBytes: []}
requestHandler: []
plugins:
- name: a
- {type: queue-scorer, parametres: {}}
- {type: queue-scorer, parameters: {sise: 1}}
- {type: queu-scorer}
- 7
- {type: random-picker, parameters: [1]}
- {type: max-score-picker}
- {type: new-filter}
schedulingProfiles:
- plugins:
  - {pluginRef: quue-scorer, weight: -1}
  - {weight: .inf}
  - {pluginRef: queue-scorer, weight: heavy, wait: 1}
- name: x
  plugins: [{pluginRef: random-picker}, {pluginRef: max-score-picker}]
- {name: x, plugins: {}}
"""
    )
    assert found == [
        "color: unknown field; known: apiVersion, dataLayer, featureGates, flowControl, kind, parser, plugins, profile, requestHandler, saturationDetector, schedulingProfiles",
        "apiVersion: 'v2' is not llm-d.ai/v1alpha1 or inference.networking.x-k8s.io/v1alpha1",
        "kind: 'Config' is not EndpointPickerConfig",
        "featureGates[0]: flowControl must be true or false, not 'maybe'",
        "featureGates[1]: unknown feature gate 'warp'; known: flowControl, haPopulateNonLeaderDatastore",
        "featureGates[3]: must be a string, not a number; put it in quotes",
        "featureGates[4]: names no gate",
        "plugins[0].type: is missing",
        "plugins[1].parametres: unknown field; did you mean parameters?",
        "plugins[2]: the name 'queue-scorer' is taken by plugins[1]; give each instance a name of its own",
        "plugins[2].parameters.sise: unknown parameter",
        "plugins[3].type: unknown plugin type 'queu-scorer'; did you mean queue-scorer?",
        "plugins[4]: must be a mapping, not a number",
        "plugins[5].parameters: must be a mapping, not a list",
        "plugins[7].type: new-filter is experimental; start with --allow-experimental-plugins to use it",
        "schedulingProfiles[0].name: is missing",
        "schedulingProfiles[0].plugins[0].pluginRef: no plugin is named 'quue-scorer'; did you mean queue-scorer?",
        "schedulingProfiles[0].plugins[0].weight: must be a finite number, 0 or more, not -1",
        "schedulingProfiles[0].plugins[1].pluginRef: is missing",
        "schedulingProfiles[0].plugins[1].weight: must be a finite number, 0 or more, not inf",
        "schedulingProfiles[0].plugins[2].wait: unknown field; did you mean weight?",
        "schedulingProfiles[0].plugins[2].weight: must be a number, not a string",
        "schedulingProfiles[1].plugins[1].pluginRef: a profile has one picker; random-picker is already this one's",
        "schedulingProfiles[2].name: the name 'x' is taken by schedulingProfiles[1]",
        "schedulingProfiles[2].plugins: must be a list, not a mapping",
        "schedulingProfiles: 3 profiles need a profile handler that chooses between them, and none is configured",
        "dataLayer.sources: must be a list, not a mapping",
        "requestHandler: must be a mapping, not a list",
        "flowControl.maxBytes: must be a quantity such as 5000 or 1Gi, not a list",
    ]


def test_the_message_names_source_and_count() -> None:
    with pytest.raises(ConfigError, match=r"^epp.yaml: 2 problems\n  apiVersion: is missing\n  kind: is missing$"):
        load("plugins: []", source="epp.yaml", catalogue=Shelf())


def test_a_document_that_is_no_mapping() -> None:
    assert faults("- a\n") == ["must be a mapping, not a list", "apiVersion: is missing", "kind: is missing"]


def test_two_profile_handlers() -> None:
    found = faults(HEAD + "plugins: [{type: single-profile-handler}, {type: disagg-profile-handler}]")
    assert found == ["plugins[1]: only one profile handler can be configured; the first is plugins[0]"]


def test_two_pickers_without_profiles_would_share_the_default_one() -> None:
    (found,) = faults(HEAD + "plugins: [{type: max-score-picker}, {type: random-picker}]")
    assert found.startswith("schedulingProfiles: missing")


def test_a_taken_name_is_reported_where_it_is_written() -> None:
    (found,) = faults(HEAD + "plugins: [{type: queue-scorer}, {name: queue-scorer, type: prefix-cache-scorer}]")
    assert found.startswith("plugins[1].name: the name 'queue-scorer' is taken")


@pytest.mark.parametrize("weight", ["true", ".nan", "1e999", "9" * 400])
def test_weights_that_are_no_weights(weight: str) -> None:
    (found,) = faults(
        HEAD
        + f"plugins: [{{type: queue-scorer}}]\nschedulingProfiles: [{{name: d, plugins: [{{pluginRef: queue-scorer, weight: {weight}}}]}}]"
    )
    assert found.startswith("schedulingProfiles[0].plugins[0].weight: must be")


def test_a_syntax_error_names_line_and_column() -> None:
    assert faults("plugins:\n- {type: a\nkind: x\n")[0].startswith("line 3, column ")


def test_a_key_written_twice_is_a_fault() -> None:
    found = faults(HEAD + "plugins:\n- type: queue-scorer\n  type: label-filter\nplugins: []\n")
    assert found == ["plugins[0].type: is written twice, on lines 4 and 5", "plugins: is written twice, on lines 3 and 6"]


def test_no_profiles_makes_one_of_all_that_can_be_scheduled() -> None:
    config = loaded(
        HEAD + "plugins: [{type: label-filter}, {type: approx-prefix-cache-producer}, {type: queue-scorer}, {name: r, type: random-picker}]"
    )
    (profile,) = resolve_defaults(config, Shelf()).scheduling_profiles
    assert profile.name == "default"
    assert [p.plugin_ref for p in profile.plugins] == ["label-filter", "queue-scorer", "r"]


def test_a_profile_without_picker_takes_the_one_there_is() -> None:
    config = loaded(HEAD + "plugins: [{type: queue-scorer}, {name: r, type: random-picker}]\nschedulingProfiles: [{name: d}]")
    complete = resolve_defaults(config, Shelf())
    assert complete.plugin("max-score-picker") is None
    assert [p.plugin_ref for p in complete.scheduling_profiles[0].plugins] == ["r"]


def test_the_default_picker_may_be_named_without_being_declared() -> None:
    config = loaded(HEAD + "schedulingProfiles: [{name: d, plugins: [{pluginRef: max-score-picker, weight: 9}]}]")
    complete = resolve_defaults(config, Shelf())
    assert complete.plugin("max-score-picker") == PluginSpec(name="max-score-picker", type="max-score-picker")
    assert [p.plugin_ref for p in complete.scheduling_profiles[0].plugins] == ["max-score-picker"]


def test_what_can_not_be_scheduled_is_left_out_of_profiles() -> None:
    config = EndpointPickerConfig(
        plugins=(PluginSpec(name="p", type="approx-prefix-cache-producer"), PluginSpec(name="h", type="single-profile-handler")),
        scheduling_profiles=(SchedulingProfile(name="d", plugins=(ProfilePlugin(plugin_ref="p"), ProfilePlugin(plugin_ref="h"))),),
    )
    assert [p.plugin_ref for p in resolve_defaults(config, Shelf()).scheduling_profiles[0].plugins] == ["max-score-picker"]


def test_resolving_twice_changes_nothing() -> None:
    once = resolve_defaults(default_config(), Shelf())
    assert resolve_defaults(once, Shelf()) == once


ONE_OF_TWO = "schedulingProfiles: [{name: a}, {name: b}]\n"


def test_several_profiles_need_a_handler_that_takes_them() -> None:
    assert len(loaded(HEAD + "plugins: [{type: disagg-profile-handler}]\n" + ONE_OF_TWO).scheduling_profiles) == 2
    assert faults(HEAD + ONE_OF_TWO) == [
        "schedulingProfiles: 2 profiles need a profile handler that chooses between them, and none is configured"
    ]
    assert faults(HEAD + "plugins: [{name: one, type: single-profile-handler}]\n" + ONE_OF_TWO) == [
        "schedulingProfiles: 2 profiles, but one (single-profile-handler) takes one"
    ]


def test_alpha_plugins_have_to_be_allowed() -> None:
    text = HEAD + "plugins: [{type: new-filter}]"
    assert faults(text) == ["plugins[0].type: new-filter is experimental; start with --allow-experimental-plugins to use it"]
    assert loaded(text, allow_experimental=True).plugins == (PluginSpec(name="new-filter", type="new-filter"),)


def test_a_deprecated_plugin_is_a_warning() -> None:
    assert loaded(HEAD + "plugins: [{type: queue-scorer}, {name: x, type: by-label}]").warnings == (
        "plugins[1].type: by-label is deprecated; write label-filter",
    )


def test_gates_of_earlier_versions_are_warnings() -> None:
    config = loaded(HEAD + "featureGates: [dataLayer, enableLegacyMetrics=false]")
    assert config.feature_gates == FEATURE_GATES
    assert [warning.split(" and ")[0] for warning in config.warnings] == [
        "featureGates[0]: dataLayer is deprecated",
        "featureGates[1]: enableLegacyMetrics is deprecated",
    ]


@pytest.mark.parametrize(
    ("gates", "mode"),
    [
        ("[flowControl]", "on"),
        ("[flowControl=true]", "on"),
        ("[flowControl=false]", "off"),
        ("[flowControl, flowControl=false]", "off"),
        ("[]", "safe"),
    ],
)
def test_flow_control_has_a_mode_by_its_gate(gates: str, mode: str) -> None:
    config = loaded(HEAD + f"featureGates: {gates}")
    assert config.flow_control_mode == mode
    assert config.warnings == ()


def test_the_name_of_a_default_is_not_for_another_kind_of_plugin() -> None:
    assert faults(HEAD + "plugins: [{name: max-score-picker, type: queue-scorer}]") == [
        "plugins[0].name: 'max-score-picker' is the name of the default picker; give this plugin another"
    ]
    config = loaded(HEAD + "plugins: [{name: max-score-picker, type: random-picker}]")
    assert resolve_defaults(config, Shelf()).plugin("max-score-picker") == PluginSpec(name="max-score-picker", type="random-picker")


def test_a_class_as_type_is_left_to_the_catalogue() -> None:
    assert loaded(HEAD + "plugins: [{name: mine, type: 'my_module:MyScorer'}]").plugins[0].type == "my_module:MyScorer"


def test_one_token_rate_limit_and_none_without_flow_control() -> None:
    limit = "{type: token-rate-limit, name: NAME, parameters: {size: 100}}"
    two = ", ".join(limit.replace("NAME", name) for name in ("a", "b"))
    assert faults(HEAD + f"plugins: [{two}]") == ["plugins[1]: only one token rate limit can be configured; the first is plugins[0]"]
    off = "featureGates: [flowControl=false]\n"
    assert loaded(HEAD + f"plugins: [{limit}]").warnings == ()
    assert loaded(HEAD + off + f"plugins: [{limit}]").warnings == (
        "plugins[0]: token-rate-limit has no effect: the gate flowControl is off",
    )
