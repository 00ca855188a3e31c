"""Reading other people's JSON (Envoy's configuration, Kubernetes objects) field by field: what is absent or of another type is empty, never an error."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

Json = dict[str, Any]

DEPTH_MAX = 100
_CAMEL = re.compile(r"(?<=[a-z0-9])([A-Z])")
_IDENTIFIER = re.compile(r"[a-z][A-Za-z0-9]*")


def message(parent: Mapping[str, Any] | None, *path: str) -> Json:
    """The message at the end of the path; empty where anything on the way is not there."""
    found: Any = parent
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else {}


def items(parent: Mapping[str, Any] | None, name: str) -> list[Json]:
    """The messages of a repeated field."""
    found = (parent or {}).get(name)
    return [dict(item) for item in found if isinstance(item, Mapping)] if isinstance(found, list) else []


def enum(value: object, names: Sequence[str]) -> str:
    """An enum by name; unset is the first, a number the one at it."""
    if isinstance(value, int) and not isinstance(value, bool):
        return names[value] if 0 <= value < len(names) else str(value)
    return str(value) if value else names[0]


def duration_s(value: object) -> float | None:
    """`1.5s`; None where unset or unreadable."""
    if isinstance(value, int | float):
        return float(value)
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)s", value) if isinstance(value, str) else None
    return float(match[1]) if match else None


def number(value: object) -> float | None:
    """Of a field or of its wrapper (`{value: 0}`); Envoy prints 64-bit numbers as text."""
    if isinstance(value, Mapping):
        value = value.get("value", 0)
    try:
        return float(value) if isinstance(value, int | float | str) else None
    except ValueError:
        return None


def snake_case(value: Any, depth: int = 0) -> Any:
    """A message of protobuf's JSON with the field names of its .proto; camelCase is read the same. Raises ValueError."""
    if depth > DEPTH_MAX:
        raise ValueError(f"nested deeper than {DEPTH_MAX}")
    if isinstance(value, dict):
        return {_snake_name(str(key)): snake_case(item, depth + 1) for key, item in value.items()}
    return [snake_case(item, depth + 1) for item in value] if isinstance(value, list) else value


def _snake_name(key: str) -> str:
    """A field's name; keys of maps (filter names, metadata namespaces) hold dots or dashes and stay."""
    return _CAMEL.sub(lambda match: f"_{match[1].lower()}", key) if _IDENTIFIER.fullmatch(key) else key
