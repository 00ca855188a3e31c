"""Plugins and the scheduler out of a configuration. Runs once per configuration; nothing here is on the request path.

A plugin that requires data nobody produces makes that data's default producer appear, and so on for what that one requires; producers
run in the order in which they need one another. A configuration that replaces another keeps the plugins that are written the same in
both, with all they have learned.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any, cast

import msgspec

from epp.clock import Clock
from epp.config.load import resolve_defaults
from epp.config.schema import EndpointPickerConfig, PluginSpec, SchedulingProfile
from epp.errors import ConfigError, Problem
from epp.plugins.base import Context, Detector, EndpointIndex, Filter, Parser, Picker, Plugin, Producer, ProfileHandler, Scorer, hook
from epp.plugins.producers.inflight_load import InflightLoadProducer
from epp.plugins.profile_handlers.single import SingleProfileHandler
from epp.plugins.registry import Registry
from epp.plugins.scorers.precise_prefix_cache import PrecisePrefixCacheScorer
from epp.scheduling.load_scores import Weighted
from epp.scheduling.pipeline import Profile, Scheduler

DEFAULT_PRODUCERS = {
    "prefix-match": "approx-prefix-cache-producer",
    "inflight-load": "inflight-load-producer",
    "latency-prediction": "predicted-latency-producer",
    "tokens": "token-producer",
    "session-id": "session-id-producer",
}
"""Data key -> producer added when something requires the key and nothing configured produces it."""


PRECISE_PRODUCER = "precise-prefix-cache-producer"
NAMES_PRODUCER = "prefixMatchInfoProducerName"


@dataclass(frozen=True, slots=True)
class Built:
    """A scheduler and the plugins it runs, by instance name."""

    config: EndpointPickerConfig
    """Complete: every default filled in."""
    scheduler: Scheduler
    plugins: Mapping[str, Plugin]
    looked_at: Mapping[str, frozenset[str]]
    """Plugin -> the plugins its `bind` asked for; EVERYONE among them: it went through them all."""

    @property
    def indexes(self) -> dict[tuple[str, str], EndpointIndex]:
        """Prefix indexes by plugin name and type."""
        return {
            (plugin.name, plugin.type): index
            for plugin in self.plugins.values()
            if isinstance(index := getattr(plugin, "index", None), EndpointIndex)
        }

    @property
    def stage_decisions(self) -> dict[tuple[str, str], Mapping[tuple[str, str], int]]:
        """What profile handlers that split requests into stages count."""
        return {(p.name, p.type): p.__dict__["decisions"] for p in self.plugins.values() if "decisions" in p.__dict__}

    @property
    def discovery_path(self) -> str:
        """The endpoints file a discovery plugin names, if any."""
        plugin = self.plugins.get(self.config.data_layer.discovery)
        return str(getattr(plugin, "path", "")) if plugin is not None else ""

    def hooks(self, name: str) -> list[Any]:
        return [found for plugin in self.plugins.values() if (found := hook(plugin, name))]

    def parsers(self) -> list[Parser]:
        """The configured ones, in order; empty when the configuration names none."""
        return [cast("Parser", self.plugins[ref]) for ref in self.config.request_handler.parsers]


def build(
    config: EndpointPickerConfig, registry: Registry, rng: random.Random, clock: Clock, *, source: str = "", previous: Built | None = None
) -> Built:
    """`config` was checked when it was loaded: what it names exists and fits. Raises ConfigError for what only plugins can see.

    `previous`: what runs now; its plugins are kept where the new configuration writes them the same.
    """
    config = with_producers(resolve_defaults(config, registry), registry)
    kept = _kept(config, previous) if previous else {}
    plugins = {spec.name: kept.get(spec.name) or registry.build(spec.type, spec.parameters, spec.name) for spec in config.plugins}
    looked_at = {name: previous.looked_at.get(name, frozenset()) for name in kept} if previous else {}
    problems = _bind(config, plugins, looked_at, clock, rng)
    profiles = [_profile(profile, plugins) for profile in config.scheduling_profiles]
    handler = next((plugin for plugin in plugins.values() if isinstance(plugin, ProfileHandler)), None)
    if handler is not None:
        try:
            handler.check([profile.name for profile in profiles])
        except ValueError as error:
            problems.append(Problem("schedulingProfiles", str(error)))
    producers: Sequence[Producer] = ()
    try:
        producers = _ordered(_default_first([plugin for plugin in plugins.values() if isinstance(plugin, Producer)], config))
    except CycleError:
        problems.append(Problem("plugins", "these producers need each other's data in a circle"))
    if problems:
        raise ConfigError(source or "configuration", problems)
    scheduler = Scheduler(
        profiles,
        None if isinstance(handler, SingleProfileHandler) else handler,
        plugins.values(),
        rng,
        producers=producers,
        detector=_detector(config, plugins),
        inflight=next((plugin for plugin in plugins.values() if isinstance(plugin, InflightLoadProducer)), None),
    )
    return Built(config, scheduler, plugins, looked_at)


def with_producers(config: EndpointPickerConfig, registry: Registry) -> EndpointPickerConfig:
    """With the default producer of every data key that is required and not produced (inventory section 2.1)."""
    specs = [*config.plugins, *_old_precise(config, registry)]
    spoken_for = {spec.parameters.get(NAMES_PRODUCER) for spec in specs}
    """Prefix producers that a plugin names are that plugin's: one that names none has another."""
    produced = {key for spec in specs if spec.name not in spoken_for for key in registry.load(spec.type).produces}
    at = 0
    while at < len(specs):
        for key in registry.load(specs[at].type).requires:
            type_ = DEFAULT_PRODUCERS.get(key)
            named = key == "prefix-match" and specs[at].parameters.get(NAMES_PRODUCER)
            if key not in produced and not named and type_ is not None and all(spec.name != type_ for spec in specs):
                specs.append(PluginSpec(name=type_, type=type_))
                produced.update(registry.load(type_).produces)
        at += 1
    return msgspec.structs.replace(config, plugins=tuple(specs))


def _old_precise(config: EndpointPickerConfig, registry: Registry) -> Iterator[PluginSpec]:
    """The producer of an old configuration's precise-prefix-cache-scorer, which was one itself."""
    if any("prefix-match" in registry.load(spec.type).produces for spec in config.plugins):
        return
    for spec in config.plugins:
        parameters = PrecisePrefixCacheScorer.producer_parameters(spec.parameters) if spec.type == PrecisePrefixCacheScorer.type else {}
        if parameters and not registry.problems(PRECISE_PRODUCER, parameters, ""):
            yield PluginSpec(name=PRECISE_PRODUCER, type=PRECISE_PRODUCER, parameters=parameters)
            return


EVERYONE = "*"


class _Watched(Mapping[str, Plugin]):
    """The plugins, as one of them sees them in `bind`; remembers which it asked for."""

    def __init__(self, plugins: Mapping[str, Plugin]) -> None:
        self._plugins = plugins
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Plugin:
        self.asked.add(name)
        return self._plugins[name]

    def __iter__(self) -> Iterator[str]:
        self.asked.add(EVERYONE)
        return iter(self._plugins)

    def __len__(self) -> int:
        return len(self._plugins)


def _kept(config: EndpointPickerConfig, previous: Built) -> dict[str, Plugin]:
    """Plugins that are written as before, and so are all they looked at, and all those looked at, and so on."""
    before = {spec.name: spec for spec in previous.config.plugins}
    now = {spec.name: spec for spec in config.plugins}
    changed = {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}
    while True:
        also = {
            name
            for name, looked_at in previous.looked_at.items()
            if name not in changed and (looked_at & changed or (EVERYONE in looked_at and changed))
        }
        if not also:
            return {name: previous.plugins[name] for name in now if name not in changed}
        changed |= also


def _bind(
    config: EndpointPickerConfig,
    plugins: Mapping[str, Plugin],
    looked_at: dict[str, frozenset[str]],
    clock: Clock,
    rng: random.Random,
) -> list[Problem]:
    """`bind` of each plugin that is not in `looked_at` yet, and what they object to."""
    places = {spec.name: i for i, spec in enumerate(config.plugins)}
    problems = []
    for name, plugin in plugins.items():
        if name in looked_at:
            continue
        watched = _Watched(plugins)
        bind = hook(plugin, "bind")
        if bind is not None:
            try:
                bind(Context(clock, rng, watched))
            except ValueError as error:
                problems.append(Problem(f"plugins[{places[name]}].parameters", str(error)))
        looked_at[name] = frozenset(watched.asked)
    for plugin in plugins.values():
        missing = [key for key in plugin.requires if not any(key in other.produces for other in plugins.values())]
        problems += [Problem(f"plugins[{places[plugin.name]}]", f"needs {key!r}, which no plugin produces") for key in missing]
    return problems


def _default_first(producers: list[Any], config: EndpointPickerConfig) -> list[Any]:
    """The prefix producer whose match plugins get that name none comes first: the one of the default's name, else one that no plugin names."""
    spoken_for = {spec.parameters.get(NAMES_PRODUCER) for spec in config.plugins}
    rank = {producer.name: (producer.name != DEFAULT_PRODUCERS["prefix-match"], producer.name in spoken_for) for producer in producers}
    return sorted(producers, key=lambda producer: rank[producer.name])


def _ordered(producers: Sequence[Producer]) -> list[Producer]:
    """Each after those whose data it requires or uses; otherwise in the configuration's order. Raises CycleError."""
    plugins = [cast("Plugin", producer) for producer in producers]
    makers: dict[str, list[int]] = {}
    for i, plugin in enumerate(plugins):
        for key in plugin.produces:
            makers.setdefault(key, []).append(i)
    graph = {
        i: {maker for key in (*plugin.requires, *plugin.uses) for maker in makers.get(key, ()) if maker != i}
        for i, plugin in enumerate(plugins)
    }
    return [producers[i] for i in TopologicalSorter(graph).static_order()]


def _detector(config: EndpointPickerConfig, plugins: Mapping[str, Plugin]) -> Detector | None:
    named = config.flow_control.saturation_detector
    found = plugins.get(named) if named else next((plugin for plugin in plugins.values() if isinstance(plugin, Detector)), None)
    return found if isinstance(found, Detector) else None


def _profile(profile: SchedulingProfile, plugins: Mapping[str, Plugin]) -> Profile:
    members = [(plugins[member.plugin_ref], member.weight) for member in profile.plugins]
    filters = [cast("Filter", plugin) for plugin, _ in members if isinstance(plugin, Filter)]
    scorers = [Weighted(cast("Scorer", plugin), weight) for plugin, weight in members if isinstance(plugin, Scorer)]
    picker = next(cast("Picker", plugin) for plugin, _ in members if isinstance(plugin, Picker))
    return Profile(profile.name, filters, scorers, picker)
