"""Going through a document and noting every fault with its path, instead of stopping at the first; and what only deserves a warning.

Each method returns something usable even after a fault, so that the walk goes on.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from typing import Any

from epp.config import quantities
from epp.errors import Problem


class Walk:
    def __init__(self, problems: list[Problem] | None = None) -> None:
        self.problems: list[Problem] = list(problems or ())
        self.warnings: list[str] = []

    def fault(self, path: str, message: str) -> None:
        self.problems.append(Problem(path, message))

    def warn(self, path: str, message: str) -> None:
        self.warnings.append(str(Problem(path, message)))

    def mapping(self, value: Any, path: str, known: Collection[str]) -> Mapping[str, Any]:
        """The mapping's known fields that are set; anything else in it is a fault."""
        if not isinstance(value, Mapping):
            self.fault(path, f"must be a mapping, not {kind(value)}")
            return {}
        fields = {}
        for key, item in value.items():
            if not isinstance(key, str) or key not in known:
                self.fault(join(path, key), f"unknown field{suggestion(str(key), known)}")
            elif item is not None:
                fields[key] = item
        return fields

    def items(self, value: Any, path: str) -> list[Any]:
        """The list; an absent one is empty."""
        if value is None:
            return []
        if not isinstance(value, list):
            self.fault(path, f"must be a list, not {kind(value)}")
            return []
        return value

    def text(self, value: Any, path: str, *, required: bool = False) -> str:
        if value is None or value == "":
            if required:
                self.fault(path, "is missing")
            return ""
        if not isinstance(value, str):
            self.fault(path, f"must be a string, not {kind(value)}; put it in quotes")
            return ""
        return value

    def number(self, value: Any, path: str, default: float) -> float:
        """A finite number, 0 or more."""
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fault(path, f"must be a number, not {kind(value)}")
            return default
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number) or number < 0:
            self.fault(path, f"must be a finite number, 0 or more, not {number:g}")
            return default
        return number

    def integer(self, value: Any, path: str, default: int) -> int:
        """A whole number of 64 bits; `1.0` is one too."""
        if value is None:
            return default
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            self.fault(path, f"must be a whole number, not {value if isinstance(value, float) else kind(value)}")
            return default
        if abs(value) > quantities.INT64_MAX:
            self.fault(path, "must be a whole number of at most 64 bits")
            return default
        return value

    def boolean(self, value: Any, path: str, default: bool) -> bool:
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fault(path, f"must be true or false, not {kind(value)}")
            return default
        return value

    def duration_s(self, value: Any, path: str, default: float) -> float:
        """Seconds, 0 or more, of a Go duration."""
        if value is None:
            return default
        if not isinstance(value, str):
            self.fault(path, f"must be a duration such as 60s, not {kind(value)}")
            return default
        try:
            seconds = quantities.duration_s(value)
        except ValueError as error:
            self.fault(path, str(error))
            return default
        if seconds < 0:
            self.fault(path, f"can't be negative, as {value} is")
            return default
        return seconds

    def quantity(self, value: Any, path: str, default: int) -> int:
        """A Kubernetes quantity, 0 or more, as a whole number; written as a string or a number."""
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            self.fault(path, f"must be a quantity such as 5000 or 1Gi, not {kind(value)}")
            return default
        try:
            number = min(value, quantities.INT64_MAX) if isinstance(value, int) else quantities.quantity(str(value))
        except ValueError as error:
            self.fault(path, str(error))
            return default
        if number < 0:
            self.fault(path, "can't be negative")
            return default
        return number


def join(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)


def suggestion(name: str, known: Collection[str]) -> str:
    """`; did you mean ...?`, or which names there are when none is near."""
    near = difflib.get_close_matches(name, sorted(known), n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; known: {', '.join(sorted(known))}" if known else ""


def kind(value: Any) -> str:
    """What a value is, in the words of YAML."""
    if value is None:
        return "null"
    for types, word in (
        ((bool,), "a boolean"),
        ((int, float), "a number"),
        ((str,), "a string"),
        ((list,), "a list"),
        ((Mapping,), "a mapping"),
    ):
        if isinstance(value, types):
            return word
    return f"a {type(value).__name__}"
