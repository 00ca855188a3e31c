"""YAML or JSON text to plain values, strictly: a key written twice is a fault, not a silent choice of the last.

Bounded against hostile or accidental size: bytes of text, and nodes once aliases are expanded. Not here: what the values should be
(walk, load).

Cost: none per request. About 60 ms for 100 KB of YAML with libyaml, 2 ms for JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import yaml

from epp.errors import Problem

DOCUMENT_BYTES_MAX = 1 << 20
"""Limit on a configuration's text: 1 MiB."""
NODES_MAX = 200_000
"""Limit on values in a document, aliases expanded: a few lines of YAML can stand for billions."""
DEPTH_MAX = 64
"""Limit on nesting. libyaml's composer recurses in C, where too deep is a crash and no exception: so it is looked at first."""

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def parse(text: str) -> tuple[Any, list[Problem]]:
    """The document, None if empty, and what is wrong with its text. After a fault in the syntax or a limit the document is None."""
    try:
        size_bytes = len(text.encode())
    except UnicodeEncodeError:
        return None, [Problem("", "is not UTF-8")]
    if size_bytes > DOCUMENT_BYTES_MAX:
        return None, [Problem("", f"larger than {DOCUMENT_BYTES_MAX} bytes")]
    problems: list[Problem] = []
    try:
        if text.lstrip().startswith("{"):
            try:
                return _whole(json.loads(text, object_pairs_hook=lambda pairs: _object(pairs, problems)), text), problems
            except json.JSONDecodeError:
                problems.clear()  # YAML's own braces; if it is broken JSON, YAML's message has the line too
        return _yaml(text, problems), problems
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        return None, [Problem("", f"{where}{error.problem or error.context}")]
    except yaml.YAMLError as error:
        return None, [Problem("", str(error))]
    except ValueError as error:  # what the YAML constructor lets through: an impossible date, say
        return None, [Problem("", str(error))]
    except RecursionError:
        return None, [Problem("", "nested too deeply")]


def _whole(document: Any, text: str) -> Any:
    """JSON can escape half a surrogate pair, a string nothing can print. Raises ValueError."""
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(document, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a string has half of a surrogate pair (\\ud800 to \\udfff)") from None
    return document


def _object(pairs: list[tuple[str, Any]], problems: list[Problem]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        problems += [Problem(name, "is written twice in one object") for name in found if names.count(name) > 1]
    return found


def _yaml(text: str, problems: list[Problem]) -> Any:
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH_MAX:
            problems.append(Problem("", f"nested more than {DEPTH_MAX} deep"))
            return None
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        for count, duplicate in enumerate(_nodes(node, "")):
            if count >= NODES_MAX:
                problems.append(Problem("", f"more than {NODES_MAX} values, aliases expanded"))
                return None
            if duplicate is not None:
                problems.append(duplicate)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _nodes(node: yaml.Node, path: str) -> Iterator[Problem | None]:
    """Every node under this one, as the Problem it has or None."""
    yield None
    if isinstance(node, yaml.SequenceNode):
        for i, child in enumerate(node.value):
            yield from _nodes(child, f"{path}[{i}]")
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, child in node.value:
            name = str(key.value)
            at = f"{path}.{name}" if path else name
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and name in seen:
                yield Problem(at, f"is written twice, on lines {seen[name]} and {line}")
            seen[name] = line
            yield from _nodes(child, at)
