"""What runs when nothing is configured, and what is added to a configuration to make it complete.

Not here: the producers that plugins need, which are added where plugins are built; and what a field that was left out means (schema).
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from epp.config.catalogue import Catalogue
from epp.config.references import DEFAULT_EXTRACTOR, DEFAULT_HANDLER, DEFAULT_PICKER, DEFAULT_ROLES, DEFAULT_SOURCE
from epp.config.schema import DataLayer, DataLayerSource, EndpointPickerConfig, FlowControl, PluginSpec, ProfilePlugin, SchedulingProfile

FLOW_CONTROL_GATE = "flowControl"
FEATURE_GATES = {"haPopulateNonLeaderDatastore": True}
"""Gates and their defaults."""
KNOWN_GATES = (FLOW_CONTROL_GATE, *FEATURE_GATES)
DEFAULT_PROFILE = "default"
COST_AWARE, LLM_D = "cost-aware", "llm-d"
NAMED_PROFILES = {
    COST_AWARE: (("cost-aware-scorer", 1.0),),
    LLM_D: (("queue-scorer", 2.0), ("kv-cache-utilization-scorer", 2.0), ("prefix-cache-scorer", 3.0)),
}
"""What `profile` may say in a configuration: scorers' types and weights. The second is the reference picker's default."""


def default_config() -> EndpointPickerConfig:
    """What runs when nothing is configured."""
    return with_profile(EndpointPickerConfig(feature_gates=dict(FEATURE_GATES)), COST_AWARE)


def with_profile(config: EndpointPickerConfig, name: str) -> EndpointPickerConfig:
    """`config`, which schedules with nothing yet, with one of NAMED_PROFILES."""
    scorers = NAMED_PROFILES[name]
    return msgspec.structs.replace(
        config,
        plugins=(*config.plugins, *(PluginSpec(name=type_, type=type_) for type_, _ in scorers)),
        scheduling_profiles=(
            SchedulingProfile(
                name=DEFAULT_PROFILE, plugins=tuple(ProfilePlugin(plugin_ref=type_, weight=weight) for type_, weight in scorers)
            ),
        ),
    )


def resolve_defaults(config: EndpointPickerConfig, catalogue: Catalogue) -> EndpointPickerConfig:
    """Complete: every plugin that is named is in `plugins`, and so is every default that is needed.

    - at least one profile, each with a picker and naming nothing but filters, scorers and pickers;
    - `single-profile-handler` for one profile without a handler;
    - the saturation detector, and with the gate `flowControl` the policies;
    - `metrics-data-source` with `core-metrics-extractor`, unless there is a metrics source or `injectDefaults` is false.

    Parsers stay empty where none are configured: the reference picker puts four there (openai, anthropic, vllmhttp, passthrough), here the
    program serves all that are built in, which includes those.

    A second time changes nothing.
    """
    plugins = _Plugins(config, catalogue)
    data_layer = _data_layer(config.data_layer, plugins)
    profiles = _profiles(config, plugins)
    if len(profiles) == 1 and not plugins.of_role("profile-handler"):
        plugins.need(DEFAULT_HANDLER)
    plugins.need(config.flow_control.saturation_detector)
    for parser in config.request_handler.parsers:
        plugins.need(parser)
    if config.feature_gates.get(FLOW_CONTROL_GATE):
        for policy in _policies(config.flow_control):
            plugins.need(policy)
    for ref in _data_layer_refs(data_layer):
        plugins.need(ref)
    return msgspec.structs.replace(config, plugins=tuple(plugins.specs), scheduling_profiles=profiles, data_layer=data_layer)


class _Plugins:
    """The plugins so far, with their roles."""

    def __init__(self, config: EndpointPickerConfig, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self.specs = list(config.plugins)
        self.roles = {spec.name: catalogue.role(spec.type) for spec in self.specs}

    def need(self, name: str) -> None:
        """Add what is named but not there: a default or a parser, under the name of its type."""
        if name not in self.roles:
            self.specs.append(PluginSpec(name=name, type=name))
            self.roles[name] = self._catalogue.role(name) | ({DEFAULT_ROLES[name]} if name in DEFAULT_ROLES else set())

    def of_role(self, *wanted: str) -> list[str]:
        return [name for name, roles in self.roles.items() if roles & set(wanted)]

    def type_of(self, name: str) -> str:
        return next((spec.type for spec in self.specs if spec.name == name), name)


def _profiles(config: EndpointPickerConfig, plugins: _Plugins) -> tuple[SchedulingProfile, ...]:
    for profile in config.scheduling_profiles:
        for member in profile.plugins:
            plugins.need(member.plugin_ref)
    if not plugins.of_role("picker"):
        plugins.need(DEFAULT_PICKER)
    scheduled = plugins.of_role("filter", "scorer", "picker")
    pickers = plugins.of_role("picker")
    profiles = config.scheduling_profiles or (
        SchedulingProfile(name=DEFAULT_PROFILE, plugins=tuple(ProfilePlugin(plugin_ref=name) for name in scheduled)),
    )
    picker = DEFAULT_PICKER if DEFAULT_PICKER in pickers else pickers[0]
    complete = []
    for profile in profiles:
        members = [member for member in profile.plugins if member.plugin_ref in scheduled]
        if not any(member.plugin_ref in pickers for member in members):
            members.append(ProfilePlugin(plugin_ref=picker))
        complete.append(SchedulingProfile(name=profile.name, plugins=tuple(members)))
    return tuple(complete)


def _data_layer(data_layer: DataLayer, plugins: _Plugins) -> DataLayer:
    if not data_layer.inject_defaults or any(plugins.type_of(source.plugin_ref) == DEFAULT_SOURCE for source in data_layer.sources):
        return data_layer
    source = DataLayerSource(plugin_ref=DEFAULT_SOURCE, extractors=(DEFAULT_EXTRACTOR,))
    return msgspec.structs.replace(data_layer, sources=(*data_layer.sources, source))


def _data_layer_refs(data_layer: DataLayer) -> Iterator[str]:
    for source in data_layer.sources:
        yield source.plugin_ref
        yield from source.extractors


def _policies(flow_control: FlowControl) -> Iterator[str]:
    yield flow_control.usage_limit_policy
    negative = flow_control.default_negative_priority_band
    for band in (flow_control.default_priority_band, *((negative,) if negative else ()), *flow_control.priority_bands):
        yield band.fairness_policy
        yield band.ordering_policy
