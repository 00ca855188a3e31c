"""What decides: a configuration's plugins in service, exchanged without a restart.

`apply` builds a configuration and, if nothing is wrong with it, puts it in the place of the one before between two requests: plugins that
are written the same in both stay, with all they have learned; requests under way end with the plugins they began with. A configuration
with a fault changes nothing. Not here: where the text comes from (sources), what a decision is (director).

A gone endpoint's slot is given out again once every prefix index, also one just taken out of service, has forgotten it.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

import msgspec

from epp.clock import Clock
from epp.config.load import load
from epp.config.schema import EndpointPickerConfig, PluginSpec
from epp.datastore import Datastore
from epp.errors import ConfigError, Problem
from epp.parsing.routes import Routes
from epp.plugins.base import EndpointIndex, hook
from epp.plugins.registry import Registry
from epp.scheduling.build import Built, build
from epp.types import Endpoint

_log = logging.getLogger("epp.policy")


class Policy:
    """See the module. `apply` first, then `built` and `routes` are what is in service."""

    built: Built
    routes: Routes

    def __init__(
        self,
        datastore: Datastore,
        registry: Registry,
        clock: Clock,
        rng: random.Random,
        *,
        unknown_paths_ok: bool = False,
        allow_experimental: bool = False,
        fallbacks: int = 0,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """`fallbacks`: further endpoints to name, for a gateway known to take a list. `changed` is called after every exchange."""
        self._datastore = datastore
        self._registry = registry
        self._clock = clock
        self._rng = rng
        self._unknown_paths_ok = unknown_paths_ok
        self._allow_experimental = allow_experimental
        self._fallbacks = fallbacks
        self._changed = changed
        self._in_service = False
        self._ready: list[Callable[[], bool]] = []
        self._leaving: list[EndpointIndex] = []
        """Indexes of plugins no longer in service that still have blocks of gone endpoints to forget."""
        self._warned: set[str] = set()
        datastore.subscribe(removed=self._removed)

    def apply(self, text: str, source: str) -> None:
        """Put this EndpointPickerConfig in service; the default one if `text` is empty. Raises ConfigError with every fault."""
        before = self.built if self._in_service else None
        try:
            config = load(text, source=source, catalogue=self._registry, allow_experimental=self._allow_experimental)
            built = build(self._with_fallbacks(config), self._registry, self._rng, self._clock, source=source, previous=before)
        except ConfigError:
            raise
        except Exception as error:
            _log.exception("a plugin can't be made", extra={"fields": {"source": source}})  # of others' making: what runs goes on
            raise ConfigError(source, [Problem("plugins", f"one can't be made: {type(error).__name__}: {error}")]) from error
        for warning in built.config.warnings:
            if warning not in self._warned:  # once, not with every reload
                self._warned.add(warning)
                _log.warning(warning, extra={"fields": {"source": source}})
        self.built = built
        self._ready = built.hooks("ready")
        parsers = built.parsers()
        if parsers:
            self.routes = Routes(parsers, unknown_paths_ok=self._unknown_paths_ok)
        else:
            self.routes = Routes.default(unknown_paths_ok=self._unknown_paths_ok)
        if before is None:
            self._in_service = True
            self._datastore.subscribe(added=self._added)
        else:
            self._exchanged(before, built)
        self._changed()

    def plugins_ready(self) -> bool:
        """Whether every plugin that has a say in it (hook `ready`) is ready for requests; one that fails to say is not."""
        for ready in self._ready:
            try:
                if not ready():
                    return False
            except Exception:  # noqa: BLE001 - see above
                _log.exception("a plugin's hook failed")
                return False
        return True

    def reads(self, app_protocol: str) -> bool:
        """Whether some parser reads requests of pools with this `appProtocol`; empty: not said."""
        return not app_protocol or app_protocol in self.routes.protocols

    def tick(self) -> None:
        """A slice of forgetting; call it from a periodic loop."""
        for index in self.built.indexes.values():
            index.tick()
        if self._leaving:
            self._leaving = [index for index in self._leaving if index.tick()]

    def restarted(self, endpoint: Endpoint) -> None:
        """The engine there was started anew: nothing is cached."""
        for index in self.built.indexes.values():
            index.reset(endpoint.slot)

    def _exchanged(self, before: Built, now: Built) -> None:
        """Tell new plugins of the endpoints there are, and see the old indexes off."""
        known = set(map(id, before.plugins.values()))
        for plugin in now.plugins.values():
            added = hook(plugin, "added")
            if id(plugin) not in known and added is not None:
                for endpoint in self._datastore.endpoints.values():
                    _tell(added, endpoint)
        staying = set(map(id, now.indexes.values()))
        self._leaving += [index for index in before.indexes.values() if id(index) not in staying]

    def _added(self, endpoint: Endpoint) -> None:
        for added in self.built.hooks("added"):
            _tell(added, endpoint)

    def _removed(self, endpoint: Endpoint) -> None:
        for removed in self.built.hooks("removed"):
            _tell(removed, endpoint)
        indexes = list(self.built.indexes.values())
        waiting = len(indexes)
        if not waiting:
            self._datastore.free_slot(endpoint.slot)

        def forgotten(slot: int) -> None:
            nonlocal waiting
            waiting -= 1
            if not waiting:
                self._datastore.free_slot(slot)

        for index in indexes:
            index.forget(endpoint.slot, forgotten)

    def _with_fallbacks(self, config: EndpointPickerConfig) -> EndpointPickerConfig:
        if not self._fallbacks or any("picker" in self._registry.role(spec.type) for spec in config.plugins):
            return config
        picker = PluginSpec(name="max-score-picker", type="max-score-picker", parameters={"maxNumOfEndpoints": 1 + self._fallbacks})
        return msgspec.structs.replace(config, plugins=(*config.plugins, picker))


def _tell(listener: Callable[[Endpoint], object], endpoint: Endpoint) -> None:
    """A plugin that fails to listen must not keep endpoints from coming and going."""
    try:
        listener(endpoint)
    except Exception:  # noqa: BLE001 - see above
        _log.exception("a plugin's hook failed")
