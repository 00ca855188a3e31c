"""Everything there is of some objects, so that two looks at them can be compared: whether something changed nothing at all."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from enum import Enum
from functools import cache
from types import FunctionType, MethodType
from typing import Any

from tests.flow_world import Pool

ATOMS = (str, bytes, int, float, type(None), Enum, type, FunctionType)


def picture(*roots: object, leave_out: tuple[type, ...] = ()) -> list[object]:
    """Everything that can be reached from there, value by value, objects by the order in which they are come across."""
    return list(_parts([*roots], leave_out))


def _parts(todo: list[object], leave_out: tuple[type, ...]) -> Iterator[object]:
    seen: dict[int, tuple[int, object]] = {}
    while todo:
        each = todo.pop()
        if isinstance(each, ATOMS):
            yield each if isinstance(each, str | bytes | int | float | None) else id(each)
            continue
        if isinstance(each, leave_out):
            continue
        if id(each) in seen:
            yield "seen", seen[id(each)][0]
            continue
        seen[id(each)] = len(seen), each  # kept, so that no other object takes its identity
        inner = _inner(each)
        yield type(each), len(inner)
        todo += inner


def _inner(of: Any) -> list[object]:
    if isinstance(of, MethodType):
        return [of.__self__, of.__func__]
    if isinstance(of, Pool):  # a snapshot it is asked for it keeps, as candidates do
        return [of.endpoints, of.serving]
    if isinstance(of, Mapping):
        return [part for pair in of.items() for part in pair]
    inner = list(of) if isinstance(of, list | tuple | set | frozenset | deque) else []
    inner += [getattr(of, name) for name in _slots(type(of)) if hasattr(of, name)]
    return [*inner, *(part for pair in vars(of).items() for part in pair)] if hasattr(of, "__dict__") else inner


@cache
def _slots(kind: type) -> tuple[str, ...]:
    return tuple(name for each in kind.__mro__ for name in getattr(each, "__slots__", ()))
