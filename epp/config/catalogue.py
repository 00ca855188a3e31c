"""What configuration has to know of plugin types, and no more: it imports no plugin."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal, Protocol

from epp.errors import Problem


class Catalogue(Protocol):
    """What there is to configure; `epp.plugins.registry.Registry` is one."""

    def types(self) -> Collection[str]:
        """Names of the known plugin types."""
        ...

    def problems(self, type: str, parameters: Mapping[str, Any], path: str) -> list[Problem]:  # noqa: A002 - the field's own name
        """What is wrong with a plugin of this type and these parameters, written at `path` (`plugins[0]`)."""
        ...

    def role(self, type: str) -> set[str]:  # noqa: A002 - the field's own name
        """Some of `filter`, `scorer`, `picker`, `producer`, `admitter`, `profile-handler`, `decider`, `detector`, `parser`, `data-source`,
        `extractor`, `discovery`, `fairness-policy`, `ordering-policy`, `usage-limit-policy`, ...; empty for a type that can't be had.
        """
        ...

    def deprecated(self, type: str) -> str:  # noqa: A002 - the field's own name
        """What to write in place of a deprecated type; empty if it is not."""
        ...

    def stability(self, type: str) -> Literal["beta", "alpha"]:  # noqa: A002 - the field's own name
        """Alpha plugins have to be allowed."""
        ...
