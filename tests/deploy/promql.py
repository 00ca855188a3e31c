"""Which series and labels a PromQL expression names: enough to hold dashboards and rules to an exposition, not a parser.

`uses` finds every selector with its matchers and every grouping. It knows no subqueries over other grammars, and strings with braces are a
fault. Whether an expression is PromQL at all is for a real Prometheus to say (tests/monitoring).
"""

from __future__ import annotations

import re
from typing import NamedTuple

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\s*\{([^{}]*)\}")
_MATCHER = re.compile(r"\s*([a-zA-Z_]\w*)\s*(?:=~|!~|!=|=)\s*\"\"\s*")
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
_RANGE = re.compile(r"\[[^\]]*\]|\boffset\s+\S+")
_NAME = re.compile(r"[a-zA-Z_:][\w:]*(?!\w)(?!\s*\()")
_KEYWORDS = frozenset({"and", "or", "unless", "bool", "group_left", "group_right", "inf", "nan"})


class Uses(NamedTuple):
    """`selectors`: series name -> labels it is matched on. `grouped`: labels that results are grouped or joined by."""

    selectors: dict[str, set[str]]
    grouped: set[str]


def uses(expression: str) -> Uses:
    """Raises ValueError for what it can't read."""
    if any(brace in string for string in _STRING.findall(expression) for brace in "{}"):
        raise ValueError(f"a string with braces: {expression}")
    text = _STRING.sub('""', expression)
    selectors: dict[str, set[str]] = {}
    for name, matchers in _SELECTOR.findall(text):
        labels = selectors.setdefault(name, set())
        for matcher in filter(None, (part.strip() for part in matchers.split(","))):
            found = _MATCHER.fullmatch(matcher)
            if found is None:
                raise ValueError(f"not a matcher: {matcher}")
            labels.add(found[1])
    text = _SELECTOR.sub(" ", text)
    grouped = {label.strip() for group in _GROUPING.findall(text) for label in group.split(",") if label.strip()}
    text = _RANGE.sub(" ", _GROUPING.sub(" ", text))
    text = re.sub(r"(?<![\w:])\d[\w.]*", " ", text)
    for name in _NAME.findall(text):
        if name not in _KEYWORDS:
            selectors.setdefault(name, set())
    if not selectors and "vector(" not in text:
        raise ValueError(f"names no series: {expression}")
    return Uses(selectors, grouped)
