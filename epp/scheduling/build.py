"""Plugins and the scheduler out of a configuration. Runs once per configuration; nothing here is on the request path."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from epp.config.load import resolve_defaults
from epp.config.schema import EndpointPickerConfig, PluginSpec, SchedulingProfile
from epp.plugins.base import Filter, Picker, Plugin, Producer, Scorer, hook
from epp.plugins.producers.approx_prefix_cache import ApproxPrefixCacheProducer
from epp.plugins.registry import Registry
from epp.plugins.scorers.prefix_cache import PrefixCacheScorer
from epp.scheduling.load_scores import Weighted
from epp.scheduling.pipeline import Profile, Scheduler


@dataclass(frozen=True, slots=True)
class Built:
    """A scheduler and the plugins it runs, by instance name."""

    scheduler: Scheduler
    plugins: Mapping[str, Plugin]

    @property
    def prefix_producers(self) -> list[ApproxPrefixCacheProducer]:
        return [plugin for plugin in self.plugins.values() if isinstance(plugin, ApproxPrefixCacheProducer)]


def build(config: EndpointPickerConfig, registry: Registry, rng: random.Random) -> Built:
    """`config` was checked when it was loaded: what it names exists and fits."""
    config = _with_producers(resolve_defaults(config, registry), registry)
    plugins = {spec.name: registry.build(spec.type, spec.parameters, spec.name) for spec in config.plugins}
    producers = [cast("Producer", plugin) for plugin in plugins.values() if isinstance(plugin, Producer)]
    picked = [found for plugin in plugins.values() if (found := hook(plugin, "picked"))]
    profile = _profile(config.scheduling_profiles[0], plugins)  # single-profile-handler: the loader refuses more than one
    return Built(Scheduler(profile, producers, picked, rng), plugins)


def _with_producers(config: EndpointPickerConfig, registry: Registry) -> EndpointPickerConfig:
    """A scorer that needs prefix matches makes their default producer appear (inventory section 2.1)."""
    classes = [registry.load(spec.type) for spec in config.plugins]
    needed = any(issubclass(cls, PrefixCacheScorer) for cls in classes)
    if not needed or any("producer" in registry.role(spec.type) for spec in config.plugins):
        return config
    name = ApproxPrefixCacheProducer.type
    return EndpointPickerConfig(
        api_version=config.api_version,
        kind=config.kind,
        feature_gates=config.feature_gates,
        plugins=(*config.plugins, PluginSpec(name=name, type=name)),
        scheduling_profiles=config.scheduling_profiles,
    )


def _profile(profile: SchedulingProfile, plugins: Mapping[str, Plugin]) -> Profile:
    members = [(plugins[member.plugin_ref], member.weight) for member in profile.plugins]
    filters = [cast("Filter", plugin) for plugin, _ in members if isinstance(plugin, Filter)]
    scorers = [Weighted(cast("Scorer", plugin), weight) for plugin, weight in members if isinstance(plugin, Scorer)]
    picker = next(cast("Picker", plugin) for plugin, _ in members if isinstance(plugin, Picker))
    return Profile(profile.name, filters, scorers, picker)
