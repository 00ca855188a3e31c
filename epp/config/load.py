"""Text to EndpointPickerConfig, strictly, every fault at once with its path; what is deprecated or has no effect is a warning.

What a plugin type is and which parameters it takes comes from a `Catalogue`, for configuration knows no plugins. Accepts what the
reference picker accepts, down to its lenience (a weight on a plugin that is no scorer means nothing).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from epp.config import blocks
from epp.config.catalogue import Catalogue
from epp.config.defaults import (
    FEATURE_GATES,
    FLOW_CONTROL_GATE,
    KNOWN_GATES,
    LLM_D,
    NAMED_PROFILES,
    default_config,
    resolve_defaults,
    with_profile,
)
from epp.config.document import parse
from epp.config.references import DEFAULT_HANDLER, DEFAULT_ROLES, References
from epp.config.schema import (
    API_VERSION,
    API_VERSIONS,
    DEFAULT_WEIGHT,
    KIND,
    EndpointPickerConfig,
    PluginSpec,
    ProfilePlugin,
    SchedulingProfile,
)
from epp.config.walk import Walk, suggestion
from epp.errors import ConfigError

__all__ = ["FEATURE_GATES", "Catalogue", "default_config", "load", "resolve_defaults"]

OLD_GATES = {"dataLayer": "the data layer is always on", "enableLegacyMetrics": "metrics are always read through the data layer"}
"""Gates of earlier versions and why they mean nothing now."""

_FIELDS = (
    "apiVersion",
    "kind",
    "featureGates",
    "profile",
    "plugins",
    "schedulingProfiles",
    "dataLayer",
    "flowControl",
    "requestHandler",
    "saturationDetector",
    "parser",
)
_BOOLEANS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}

SINGLE_ROLES = ("profile-handler", "token-rate-limit")
"""Roles that one plugin alone can have."""
QUEUEING_ROLES = ("identity", "token-rate-limit")
"""Those that only flow control asks."""


def load(text: str, *, source: str, catalogue: Catalogue, allow_experimental: bool = False) -> EndpointPickerConfig:
    """The configuration as written, with `profile` spelled out, or the default one if `text` says nothing. Raises ConfigError with every
    fault found.

    `allow_experimental`: take alpha plugins too.
    """
    document, faults = parse(text)
    walk = Walk(faults)
    if document is None and not faults:
        return default_config()
    config = EndpointPickerConfig() if document is None else _config(walk, document, catalogue, allow_experimental)
    if walk.problems:
        raise ConfigError(source, walk.problems)
    return config


def _config(walk: Walk, document: Any, catalogue: Catalogue, allow_experimental: bool) -> EndpointPickerConfig:
    fields = walk.mapping(document, "", _FIELDS)
    api_version = walk.text(fields.get("apiVersion"), "apiVersion", required=True)
    if api_version and api_version not in API_VERSIONS:
        walk.fault("apiVersion", f"{api_version!r} is not {' or '.join(API_VERSIONS)}")
    elif api_version and api_version != API_VERSION:
        walk.warn("apiVersion", f"{api_version} is deprecated; write {API_VERSION}")
    kind = walk.text(fields.get("kind"), "kind", required=True)
    if kind and kind != KIND:
        walk.fault("kind", f"{kind!r} is not {KIND}")
    gates = _feature_gates(walk, fields.get("featureGates"))
    plugins = _plugins(walk, fields.get("plugins"), catalogue, allow_experimental, queues=gates.get(FLOW_CONTROL_GATE, True))
    refs = References(walk, plugins, catalogue)
    config = EndpointPickerConfig(
        api_version=api_version,
        kind=kind,
        feature_gates=gates,
        plugins=plugins,
        scheduling_profiles=_profiles(walk, fields.get("schedulingProfiles"), plugins, refs),
        data_layer=blocks.data_layer(walk, fields.get("dataLayer"), refs),
        request_handler=blocks.request_handler(walk, fields.get("requestHandler"), fields.get("parser"), refs),
        flow_control=blocks.flow_control(
            walk, fields.get("flowControl"), fields.get("saturationDetector"), refs, gate=gates.get(FLOW_CONTROL_GATE)
        ),
        warnings=tuple(walk.warnings),
    )
    profile = _named_profile(walk, fields, refs)
    return with_profile(config, profile) if profile else config


def _named_profile(walk: Walk, fields: Mapping[str, Any], refs: References) -> str:
    """The profile to use in place of one that is spelled out; empty if one is."""
    name = walk.text(fields.get("profile"), "profile")
    if name and name not in NAMED_PROFILES:
        walk.fault("profile", f"unknown profile {name!r}{suggestion(name, NAMED_PROFILES)}")
        return ""
    own = refs.configured("filter", "scorer", "picker", "profile-handler", but="detector" if name else "")
    spelled_out = ["schedulingProfiles"] if fields.get("schedulingProfiles") else []
    if not own and not spelled_out:
        profile = name or LLM_D
        _check_free(walk, fields, refs, profile)
        return profile
    others = spelled_out + [each for each in own if refs.roles[each]]
    if name and others:
        walk.fault("profile", f"{name} is a whole profile and can't be combined with {', '.join(others)}; remove one or the other")
    return ""


def _check_free(walk: Walk, fields: Mapping[str, Any], refs: References, profile: str) -> None:
    """Report plugins that have the names the profile's scorers will have."""
    scorers = [type_ for type_, _ in NAMED_PROFILES[profile]]
    plugins = fields.get("plugins")
    for i, item in enumerate(plugins if isinstance(plugins, list) else ()):
        name = item.get("name") if isinstance(item, Mapping) else ""
        if name in scorers and refs.roles.get(name):
            walk.fault(f"plugins[{i}].name", f"{name!r} is the name of a scorer of the profile {profile}; give this plugin another")


def _feature_gates(walk: Walk, value: Any) -> dict[str, bool]:
    gates = dict(FEATURE_GATES)
    for i, item in enumerate(walk.items(value, "featureGates")):
        path = f"featureGates[{i}]"
        text = walk.text(item, path, required=True)
        name, equals, setting = text.partition("=")
        name, setting = name.strip(), setting.strip().lower()
        if not name:
            if text:
                walk.fault(path, "names no gate")
        elif name not in KNOWN_GATES and name not in OLD_GATES:
            walk.fault(path, f"unknown feature gate {name!r}{suggestion(name, KNOWN_GATES)}")
        elif equals and setting not in _BOOLEANS:
            walk.fault(path, f"{name} must be true or false, not {setting!r}")
        elif name in OLD_GATES:
            walk.warn(path, f"{name} is deprecated and has no effect: {OLD_GATES[name]}; remove it")
        else:
            gates[name] = _BOOLEANS[setting] if equals else True
    return {name: gates[name] for name in KNOWN_GATES if name in gates}


def _plugins(walk: Walk, value: Any, catalogue: Catalogue, allow_experimental: bool, *, queues: bool) -> tuple[PluginSpec, ...]:
    """`queues`: there is flow control, in whatever form."""
    names: dict[str, int] = {}
    of_role: defaultdict[str, list[str]] = defaultdict(list)
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
        spec = PluginSpec(name=name, type=type_, parameters=dict(parameters))
        roles = _plugin_roles(walk, spec, path, catalogue, allow_experimental)
        for role in roles:
            of_role[role].append(path)
        if not queues and not roles.isdisjoint(QUEUEING_ROLES):
            walk.warn(path, f"{type_} has no effect: the gate flowControl is off")
        plugins.append(spec)
    for role in SINGLE_ROLES:
        if len(of_role[role]) > 1:
            walk.fault(of_role[role][1], f"only one {role.replace('-', ' ')} can be configured; the first is {of_role[role][0]}")
    return tuple(plugins)


def _plugin_roles(walk: Walk, spec: PluginSpec, path: str, catalogue: Catalogue, allow_experimental: bool) -> set[str]:
    """The roles of a plugin; what is wrong with its type and parameters is reported."""
    types = catalogue.types()
    if spec.type not in types and ":" not in spec.type:
        walk.fault(f"{path}.type", f"unknown plugin type {spec.type!r}{suggestion(spec.type, types)}")
        return set()
    walk.problems += catalogue.problems(spec.type, spec.parameters, path)
    roles = catalogue.role(spec.type)
    if catalogue.stability(spec.type) == "alpha" and not allow_experimental:
        walk.fault(f"{path}.type", f"{spec.type} is experimental; start with --allow-experimental-plugins to use it")
    current = catalogue.deprecated(spec.type)
    if current:
        walk.warn(f"{path}.type", f"{spec.type} is deprecated; write {current}")
    reserved = DEFAULT_ROLES.get(spec.name)
    if roles and reserved and spec.name != spec.type and reserved not in roles:
        walk.fault(f"{path}.name", f"{spec.name!r} is the name of the default {reserved}; give this plugin another")
    return roles


def _profiles(walk: Walk, value: Any, plugins: tuple[PluginSpec, ...], refs: References) -> tuple[SchedulingProfile, ...]:
    items = walk.items(value, "schedulingProfiles")
    if not items and len(refs.pickers) > 1:
        walk.fault("schedulingProfiles", f"missing, and one profile of all plugins would have several pickers: {', '.join(refs.pickers)}")
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
        profiles.append(SchedulingProfile(name=name, plugins=_members(walk, fields.get("plugins"), f"{path}.plugins", refs)))
    if len(items) > 1 and not refs.handlers:
        walk.fault("schedulingProfiles", f"{len(items)} profiles need a profile handler that chooses between them, and none is configured")
    for spec in plugins if len(items) > 1 else ():
        if spec.type == DEFAULT_HANDLER:
            walk.fault("schedulingProfiles", f"{len(items)} profiles, but {spec.name} ({DEFAULT_HANDLER}) takes one")
    return tuple(profiles)


def _members(walk: Walk, value: Any, path: str, refs: References) -> tuple[ProfilePlugin, ...]:
    members = []
    picker = ""
    for i, item in enumerate(walk.items(value, path)):
        at = f"{path}[{i}]"
        fields = walk.mapping(item, at, ("pluginRef", "weight"))
        ref = walk.text(fields.get("pluginRef"), f"{at}.pluginRef", required=isinstance(item, Mapping))
        refs.check(ref, f"{at}.pluginRef")
        if "picker" in refs.roles.get(ref, ()):
            if picker:
                walk.fault(f"{at}.pluginRef", f"a profile has one picker; {picker} is already this one's")
            picker = picker or ref
        weight = walk.number(fields.get("weight"), f"{at}.weight", DEFAULT_WEIGHT)
        members.append(ProfilePlugin(plugin_ref=ref, weight=weight))
    return tuple(members)
