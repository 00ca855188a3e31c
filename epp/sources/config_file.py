"""The EndpointPickerConfig from a file (`--config-file`), put in service again when it changes; one with a fault changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import ClassVar

from epp.config.document import parse
from epp.errors import ConfigError, Problem
from epp.sources.watched_file import WatchedFile


class ConfigFile(WatchedFile):
    """`apply(text, source)` puts a configuration in service or raises ConfigError; `outcomes` counts changes applied and rejected."""

    what: ClassVar[str] = "configuration"

    def __init__(self, path: Path, apply: Callable[[str, str], None], outcomes: MutableMapping[str, int]) -> None:
        super().__init__(path)
        self._put_in_service = apply
        self._outcomes = outcomes

    def _apply(self, text: str) -> Mapping[str, int]:
        if self.loads_total and parse(text) == (None, []):  # an editor that truncates first, not a wish for the default
            raise ConfigError(str(self._path), [Problem("", "is empty")])
        self._put_in_service(text, str(self._path))
        if self.loads_total:
            self._outcomes["applied"] = self._outcomes.get("applied", 0) + 1
        return {}

    def _rejected(self, problems: str) -> None:
        self._outcomes["rejected"] = self._outcomes.get("rejected", 0) + 1
        super()._rejected(problems)
