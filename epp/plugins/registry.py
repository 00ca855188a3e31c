"""Which plugin types there are: the built-in ones, entry points of the group `epp.plugins`, and `module:Class` written as a type.

A type's parameters are the fields of its class; `problems` checks them all and reports every fault, which msgspec alone would not.
Third-party code is imported only when a configuration names it. Not here: what plugins do (their own files), which are used (config),
how they are put together (scheduling).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, ClassVar

import msgspec

from epp.config.walk import join, kind, suggestion
from epp.errors import Problem
from epp.plugins.base import Plugin, PointwiseScorer, RangeScorer
from epp.plugins.pickers.max_score import MaxScorePicker
from epp.plugins.producers.approx_prefix_cache import ApproxPrefixCacheProducer
from epp.plugins.scorers.kv_cache_utilization import KvCacheUtilizationScorer
from epp.plugins.scorers.prefix_cache import PrefixCacheScorer
from epp.plugins.scorers.queue import QueueScorer
from epp.plugins.scorers.running_requests_size import RunningRequestsSizeScorer

ENTRY_POINT_GROUP = "epp.plugins"
ROLE_OF_METHOD = {"keep": "filter", "score": "scorer", "pick": "picker", "produce": "producer"}
_AT = re.compile(r" - at `\$(?P<at>.*)`$")


class SingleProfileHandler(Plugin):
    """Runs the one profile there is. Nothing to do for it: known because configurations name it."""

    type: ClassVar[str] = "single-profile-handler"


BUILT_IN: tuple[type[Plugin], ...] = (
    QueueScorer,
    KvCacheUtilizationScorer,
    RunningRequestsSizeScorer,
    PrefixCacheScorer,
    MaxScorePicker,
    ApproxPrefixCacheProducer,
    SingleProfileHandler,
)


class UnknownPluginError(LookupError):
    """No such plugin type, or what stands behind it is no plugin; says which."""


class Registry:
    """See the module. Satisfies `epp.config.load.Catalogue`."""

    def __init__(self, classes: Iterable[type[Plugin]] = BUILT_IN, *, entry_point_group: str = ENTRY_POINT_GROUP) -> None:
        self._classes: dict[str, type[Plugin]] = {}
        self._entry_points: dict[str, EntryPoint] | None = None
        self._entry_point_group = entry_point_group
        for cls in classes:
            self.register(cls)

    def register(self, cls: type[Plugin]) -> None:
        """Make a class known by its type and its aliases. Raises ValueError if it is no plugin or a name is taken by another."""
        fault = _class_fault(cls)
        if fault:
            raise ValueError(f"{cls!r} {fault}")
        for name in (cls.type, *cls.aliases):
            if self._classes.setdefault(name, cls) is not cls:
                raise ValueError(f"{name!r} is taken by {self._classes[name]!r}")

    def types(self) -> Collection[str]:
        return self._classes.keys() | self._found_entry_points().keys()

    def role(self, type: str) -> set[str]:  # noqa: A002 - the field's own name
        try:
            return _roles(self.load(type))
        except UnknownPluginError:
            return set()

    def problems(self, type: str, parameters: Mapping[str, Any], path: str) -> list[Problem]:  # noqa: A002 - the field's own name
        try:
            cls = self.load(type)
        except UnknownPluginError as error:
            return [Problem(join(path, "type"), str(error))]
        return _faults(cls, parameters, join(path, "parameters"))

    def build(self, type: str, parameters: Mapping[str, Any], name: str) -> Plugin:  # noqa: A002 - the field's own name
        """One instance. Parameters were checked by `problems`: a fault here raises msgspec.ValidationError."""
        plugin = msgspec.convert(dict(parameters), self.load(type))
        plugin.named(name)
        return plugin

    def load(self, type: str) -> type[Plugin]:  # noqa: A002 - the field's own name
        """The class behind a type. Raises UnknownPluginError."""
        if type in self._classes:
            return self._classes[type]
        found = self._found_entry_points().get(type)
        if found is None and ":" not in type:
            raise UnknownPluginError(f"unknown plugin type {type!r}{suggestion(type, self.types())}")
        try:
            cls = found.load() if found is not None else _imported(type)
        except (ImportError, AttributeError, ValueError) as error:
            raise UnknownPluginError(f"{type!r} can't be loaded: {error}") from error
        fault = _class_fault(cls)
        if fault:
            raise UnknownPluginError(f"{type!r} {fault}")
        self._classes[type] = cls
        return self._classes[type]

    def _found_entry_points(self) -> Mapping[str, EntryPoint]:
        if self._entry_points is None:
            self._entry_points = {point.name: point for point in entry_points(group=self._entry_point_group)}
        return self._entry_points


def _imported(type_: str) -> Any:
    module, _, attribute = type_.partition(":")
    return getattr(import_module(module), attribute)


def _roles(cls: type[Plugin]) -> set[str]:
    roles = {role for method, role in ROLE_OF_METHOD.items() if callable(getattr(cls, method, None))}
    return roles | {"profile-handler"} if issubclass(cls, SingleProfileHandler) else roles


def _class_fault(cls: Any) -> str:
    """Why this is no plugin class, or nothing."""
    if not (isinstance(cls, type) and issubclass(cls, Plugin)):
        return "is not a subclass of epp.plugins.base.Plugin"
    if not isinstance(getattr(cls, "type", None), str):
        return "has no `type`"
    roles = _roles(cls)
    if not roles:
        return f"has none of the methods {', '.join(ROLE_OF_METHOD)}, so it is neither filter, scorer, picker nor producer"
    for base, method in ((PointwiseScorer, "score_one"), (RangeScorer, "measure")):
        if issubclass(cls, base) and getattr(cls, method) is getattr(base, method):
            return f"is a {base.__name__} without `{method}`"
    if "scorer" in roles and not isinstance(getattr(cls, "per_request", None), bool):
        return "is a scorer without `per_request`"
    return ""


def _faults(cls: type[msgspec.Struct], value: Any, path: str) -> list[Problem]:
    """Every fault of a struct's fields, those of structs in it included; when there is none, what the class itself objects to."""
    if not isinstance(value, Mapping):
        return [Problem(path, f"must be a mapping, not {kind(value)}")]
    fields = {field.encode_name: field for field in msgspec.structs.fields(cls)}
    known = f"; known: {', '.join(sorted(fields))}" if fields else "; it takes no parameters"
    problems = [
        Problem(join(path, name), f"unknown parameter{suggestion(str(name), fields) or known}") for name in value if name not in fields
    ]
    for name, field in fields.items():
        if name not in value:
            if field.required:
                problems.append(Problem(join(path, name), "is missing"))
            continue
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            problems += _faults(field.type, value[name], join(path, name))
            continue
        try:
            msgspec.convert(value[name], field.type)
        except msgspec.ValidationError as error:
            problems.append(_located(error, join(path, name)))
    if not problems:
        try:
            msgspec.convert(dict(value), cls)
        except msgspec.ValidationError as error:
            problems.append(_located(error, path))
    return problems


def _located(error: msgspec.ValidationError, path: str) -> Problem:
    """msgspec names the place inside the value; join it to ours."""
    message = str(error)
    at = _AT.search(message)
    return Problem(path + at["at"], message[: at.start()]) if at else Problem(path, message)
