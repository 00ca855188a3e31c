"""EndpointPickerConfig as data, once it has been found right. How text becomes this: load."""

from __future__ import annotations

from typing import Any

import msgspec

API_VERSION = "llm-d.ai/v1alpha1"
API_VERSIONS = (API_VERSION, "inference.networking.x-k8s.io/v1alpha1")
"""The second is deprecated and means the same."""
KIND = "EndpointPickerConfig"
DEFAULT_WEIGHT = 1.0


class PluginSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One instance of a plugin. `name` is its type where none was given."""

    name: str
    type: str
    parameters: dict[str, Any] = {}


class ProfilePlugin(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A profile's use of a plugin. `weight` counts for scorers alone; on others it is accepted and means nothing."""

    plugin_ref: str
    weight: float = DEFAULT_WEIGHT


class SchedulingProfile(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    plugins: tuple[ProfilePlugin, ...] = ()


class EndpointPickerConfig(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    api_version: str = API_VERSION
    kind: str = KIND
    feature_gates: dict[str, bool] = {}
    """Every known gate, with its value."""
    plugins: tuple[PluginSpec, ...] = ()
    scheduling_profiles: tuple[SchedulingProfile, ...] = ()

    def plugin(self, name: str) -> PluginSpec | None:
        return next((plugin for plugin in self.plugins if plugin.name == name), None)
