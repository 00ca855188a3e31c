"""What a reference in a configuration (`pluginRef`) may name, and whether that plugin is of the kind wanted.

Defaults need not be in `plugins` to be named, nor need parsers: naming one adds it (defaults), as in the reference picker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from epp.config.catalogue import Catalogue
from epp.config.schema import (
    DEFAULT_DETECTOR,
    DEFAULT_FAIRNESS_POLICY,
    DEFAULT_ORDERING_POLICY,
    DEFAULT_USAGE_LIMIT_POLICY,
    PluginSpec,
)
from epp.config.walk import Walk, suggestion

DEFAULT_PICKER = "max-score-picker"
DEFAULT_HANDLER = "single-profile-handler"
DEFAULT_SOURCE = "metrics-data-source"
DEFAULT_EXTRACTOR = "core-metrics-extractor"

DEFAULT_ROLES = {
    DEFAULT_PICKER: "picker",
    DEFAULT_HANDLER: "profile-handler",
    DEFAULT_DETECTOR: "detector",
    DEFAULT_FAIRNESS_POLICY: "fairness-policy",
    DEFAULT_ORDERING_POLICY: "ordering-policy",
    DEFAULT_USAGE_LIMIT_POLICY: "usage-limit-policy",
    DEFAULT_SOURCE: "data-source",
    DEFAULT_EXTRACTOR: "extractor",
}
"""Types that are added where one is needed and none configured, under their own names."""


ALSO = {"extractor": {"producer"}}
"""Roles that do for another: some producers are told of endpoints by a data source."""


class References:
    """The plugins of one configuration, by name."""

    def __init__(self, walk: Walk, plugins: Sequence[PluginSpec], catalogue: Catalogue) -> None:
        self._walk = walk
        self._catalogue = catalogue
        self.roles: dict[str, set[str]] = {}
        """Name -> roles, of everything that may be named; empty for a plugin whose type can't be had."""
        for plugin in plugins:
            self.roles.setdefault(plugin.name, catalogue.role(plugin.type))
        self._configured = list(self.roles)
        self.pickers = self.named("picker")
        self.handlers = self.named("profile-handler")
        given = {"picker": self.pickers, "profile-handler": self.handlers}
        for type_, role in DEFAULT_ROLES.items():
            if not given.get(role):  # a default of these two comes only where there is no other
                self.roles.setdefault(type_, {role})

    def configured(self, *roles: str, but: str = "") -> list[str]:
        """Names of the plugins that are configured and have any of these roles and not `but`, or whose type can't be had."""
        return [
            name for name in self._configured if not self.roles[name] or (self.roles[name] & set(roles) and but not in self.roles[name])
        ]

    def named(self, role: str) -> list[str]:
        return [name for name, roles in self.roles.items() if role in roles]

    def check(self, name: str, path: str, role: str = "", *, report: Callable[[str, str], None] | None = None) -> None:
        """Report a name that nothing has, or that a plugin of another kind has. An empty name was reported before."""
        report = report or self._walk.fault
        if not name:
            return
        roles = self.roles.get(name)
        if roles is None and role == "parser" and role in self._catalogue.role(name):
            return
        if roles is None:
            known = set(self.named(role) if role else self.roles)
            if role == "parser":
                known.update(type_ for type_ in self._catalogue.types() if role in type_)
            report(path, f"no plugin is named {name!r}{suggestion(name, known)}")
        elif roles and role and not roles & {role, *ALSO.get(role, ())}:
            report(path, f"{name!r} is {' and '.join(_a(its) for its in sorted(roles))}, not {_a(role)}")


def _a(role: str) -> str:
    return f"{'an' if role[0] in 'aeio' else 'a'} {role}"
