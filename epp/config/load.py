"""Text to EndpointPickerConfig, strictly, every fault at once with its path; then the defaults for what was left out.

What a plugin type is and which parameters it takes comes from a `Catalogue`, for configuration knows no plugins. Accepts what the
reference picker accepts, down to its lenience (a weight on a plugin that is no scorer means nothing); blocks this version has nothing
to do with are faults, never silently ignored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Protocol

import msgspec

from epp.config.document import parse
from epp.config.schema import (
    API_VERSIONS,
    DEFAULT_WEIGHT,
    KIND,
    EndpointPickerConfig,
    PluginSpec,
    ProfilePlugin,
    SchedulingProfile,
)
from epp.config.walk import Walk, suggestion
from epp.errors import ConfigError, Problem

FEATURE_GATES = {"flowControl": False, "haPopulateNonLeaderDatastore": True}
"""Known gates and their defaults."""
DEFAULT_PROFILE = "default"
DEFAULT_PICKER = "max-score-picker"
DEFAULT_SCORERS = (("queue-scorer", 2.0), ("kv-cache-utilization-scorer", 2.0), ("prefix-cache-scorer", 3.0))
"""Type and weight, when there is no configuration at all."""

_FIELDS = ("apiVersion", "kind", "featureGates", "plugins", "schedulingProfiles")
_LATER = ("dataLayer", "flowControl", "requestHandler", "saturationDetector", "parser")
"""Fields of the reference picker that this version does not act on yet."""
_BOOLEANS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


class Catalogue(Protocol):
    """What there is to configure; `epp.plugins.registry.Registry` is one."""

    def types(self) -> Collection[str]:
        """Names of the known plugin types."""
        ...

    def problems(self, type: str, parameters: Mapping[str, Any], path: str) -> list[Problem]:  # noqa: A002 - the field's own name
        """What is wrong with a plugin of this type and these parameters, written at `path` (`plugins[0]`)."""
        ...

    def role(self, type: str) -> set[str]:  # noqa: A002 - the field's own name
        """Some of `filter`, `scorer`, `picker`, `producer`, `profile-handler`; empty for a type that can't be had."""
        ...


def load(text: str, *, source: str, catalogue: Catalogue) -> EndpointPickerConfig:
    """The configuration as written, or the default one if `text` is empty. Raises ConfigError with every fault found."""
    document, faults = parse(text)
    walk = Walk(faults)
    if document is None and not faults:
        return default_config()
    config = EndpointPickerConfig() if document is None else _config(walk, document, catalogue)
    if walk.problems:
        raise ConfigError(source, walk.problems)
    return config


def default_config() -> EndpointPickerConfig:
    """What runs when nothing is configured."""
    return EndpointPickerConfig(
        feature_gates=dict(FEATURE_GATES),
        plugins=tuple(PluginSpec(name=type_, type=type_) for type_, _ in DEFAULT_SCORERS),
        scheduling_profiles=(
            SchedulingProfile(
                name=DEFAULT_PROFILE, plugins=tuple(ProfilePlugin(plugin_ref=type_, weight=weight) for type_, weight in DEFAULT_SCORERS)
            ),
        ),
    )


def resolve_defaults(config: EndpointPickerConfig, catalogue: Catalogue) -> EndpointPickerConfig:
    """Complete: at least one profile, each with a picker and naming nothing but filters, scorers and pickers that are in `plugins`.

    A producer that a scorer needs is not added here but where plugins are built.
    """
    roles = {plugin.name: catalogue.role(plugin.type) for plugin in config.plugins}
    plugins = list(config.plugins)
    pickers = [plugin.name for plugin in plugins if "picker" in roles[plugin.name]]
    if not pickers:
        pickers = [DEFAULT_PICKER]
        plugins.append(PluginSpec(name=DEFAULT_PICKER, type=DEFAULT_PICKER))
        roles[DEFAULT_PICKER] = {"picker"}
    scheduled = [name for name, its in roles.items() if its & {"filter", "scorer", "picker"}]
    profiles = config.scheduling_profiles or (
        SchedulingProfile(name=DEFAULT_PROFILE, plugins=tuple(ProfilePlugin(plugin_ref=name) for name in scheduled)),
    )
    picker = DEFAULT_PICKER if DEFAULT_PICKER in pickers else pickers[0]
    complete = []
    for profile in profiles:
        members = [member for member in profile.plugins if member.plugin_ref in scheduled]
        if not any("picker" in roles[member.plugin_ref] for member in members):
            members.append(ProfilePlugin(plugin_ref=picker))
        complete.append(SchedulingProfile(name=profile.name, plugins=tuple(members)))
    return msgspec.structs.replace(config, plugins=tuple(plugins), scheduling_profiles=tuple(complete))


def _config(walk: Walk, document: Any, catalogue: Catalogue) -> EndpointPickerConfig:
    fields = walk.mapping(document, "", (*_FIELDS, *_LATER))
    api_version = walk.text(fields.get("apiVersion"), "apiVersion", required=True)
    if api_version and api_version not in API_VERSIONS:
        walk.fault("apiVersion", f"{api_version!r} is not {' or '.join(API_VERSIONS)}")
    kind = walk.text(fields.get("kind"), "kind", required=True)
    if kind and kind != KIND:
        walk.fault("kind", f"{kind!r} is not {KIND}")
    for name in _LATER:
        if fields.get(name):
            walk.fault(name, "not supported by this version yet")
    plugins = _plugins(walk, fields.get("plugins"), catalogue)
    return EndpointPickerConfig(
        api_version=api_version,
        kind=kind,
        feature_gates=_feature_gates(walk, fields.get("featureGates")),
        plugins=plugins,
        scheduling_profiles=_profiles(walk, fields.get("schedulingProfiles"), plugins, catalogue),
    )


def _feature_gates(walk: Walk, value: Any) -> dict[str, bool]:
    gates = dict(FEATURE_GATES)
    for i, item in enumerate(walk.items(value, "featureGates")):
        path = f"featureGates[{i}]"
        name, equals, setting = walk.text(item, path, required=True).partition("=")
        name, setting = name.strip(), setting.strip().lower()
        if not name:
            continue
        if name not in gates:
            walk.fault(path, f"unknown feature gate {name!r}{suggestion(name, FEATURE_GATES)}")
        elif equals and setting not in _BOOLEANS:
            walk.fault(path, f"{name} must be true or false, not {setting!r}")
        else:
            gates[name] = _BOOLEANS[setting] if equals else True
            if name == "flowControl" and gates[name]:
                walk.fault(path, "flow control is not supported by this version yet")
    return gates


def _plugins(walk: Walk, value: Any, catalogue: Catalogue) -> tuple[PluginSpec, ...]:
    types = catalogue.types()
    names: dict[str, int] = {}
    handlers: list[str] = []
    plugins = []
    for i, item in enumerate(walk.items(value, "plugins")):
        path = f"plugins[{i}]"
        fields = walk.mapping(item, path, ("name", "type", "parameters"))
        type_ = walk.text(fields.get("type"), f"{path}.type", required=isinstance(item, Mapping))
        name = walk.text(fields.get("name"), f"{path}.name") or type_
        parameters = fields.get("parameters", {})
        if not isinstance(parameters, Mapping):
            walk.mapping(parameters, f"{path}.parameters", ())
            parameters = {}
        if not type_:
            continue
        if name in names:
            at = f"{path}.name" if "name" in fields else path
            walk.fault(at, f"the name {name!r} is taken by plugins[{names[name]}]; give each instance a name of its own")
        names.setdefault(name, i)
        if type_ not in types and ":" not in type_:
            walk.fault(f"{path}.type", f"unknown plugin type {type_!r}{suggestion(type_, types)}")
        else:
            walk.problems += catalogue.problems(type_, parameters, path)
            if "profile-handler" in catalogue.role(type_):
                handlers.append(path)
        plugins.append(PluginSpec(name=name, type=type_, parameters=dict(parameters)))
    if len(handlers) > 1:
        walk.fault(handlers[1], f"only one profile handler can be configured; the first is {handlers[0]}")
    return tuple(plugins)


def _profiles(walk: Walk, value: Any, plugins: tuple[PluginSpec, ...], catalogue: Catalogue) -> tuple[SchedulingProfile, ...]:
    roles: dict[str, set[str]] = {}
    for plugin in plugins:
        roles.setdefault(plugin.name, catalogue.role(plugin.type))
    pickers = [name for name, its in roles.items() if "picker" in its]
    items = walk.items(value, "schedulingProfiles")
    if not items and len(pickers) > 1:
        walk.fault("schedulingProfiles", f"missing, and one profile of all plugins would have several pickers: {', '.join(pickers)}")
    if not pickers:
        roles.setdefault(DEFAULT_PICKER, {"picker"})  # it will be added, so it may be named
    names: dict[str, int] = {}
    profiles = []
    for i, item in enumerate(items):
        path = f"schedulingProfiles[{i}]"
        fields = walk.mapping(item, path, ("name", "plugins"))
        name = walk.text(fields.get("name"), f"{path}.name", required=isinstance(item, Mapping))
        if name in names:
            walk.fault(f"{path}.name", f"the name {name!r} is taken by schedulingProfiles[{names[name]}]")
        if name:
            names.setdefault(name, i)
        profiles.append(SchedulingProfile(name=name, plugins=_members(walk, fields.get("plugins"), f"{path}.plugins", roles)))
    if len(items) > 1:
        walk.fault("schedulingProfiles", f"{len(items)} profiles; this version has single-profile-handler only, which takes one")
    return tuple(profiles)


def _members(walk: Walk, value: Any, path: str, roles: Mapping[str, set[str]]) -> tuple[ProfilePlugin, ...]:
    members = []
    picker = ""
    for i, item in enumerate(walk.items(value, path)):
        at = f"{path}[{i}]"
        fields = walk.mapping(item, at, ("pluginRef", "weight"))
        ref = walk.text(fields.get("pluginRef"), f"{at}.pluginRef", required=isinstance(item, Mapping))
        if ref and ref not in roles:
            walk.fault(f"{at}.pluginRef", f"no plugin is named {ref!r}{suggestion(ref, roles)}")
        elif "picker" in roles.get(ref, ()):
            if picker:
                walk.fault(f"{at}.pluginRef", f"a profile has one picker; {picker} is already this one's")
            picker = picker or ref
        weight = walk.number(fields.get("weight"), f"{at}.weight", DEFAULT_WEIGHT)
        members.append(ProfilePlugin(plugin_ref=ref, weight=weight))
    return tuple(members)
