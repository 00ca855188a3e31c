"""Commands that start nothing: `epp check`, `epp config print`, `epp plugins`."""

from __future__ import annotations

import argparse
import inspect
import random
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec

from epp.clock import MonotonicClock
from epp.config import effective
from epp.config.load import load
from epp.config.secrets import hidden
from epp.config.units import Duration, OptionalDuration
from epp.config.walk import suggestion
from epp.datastore import Datastore
from epp.errors import ConfigError, Problem, StartError
from epp.kv_routing import KvRouting
from epp.plugins.base import Plugin
from epp.plugins.registry import Registry, UnknownPluginError
from epp.scheduling.build import Built, build

_LIMITS = (("ge", "at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))
_MODULE = re.compile(r"\b(?:\w+\.)+(?=\w)")
_WORDS: dict[type, str] = {NoneType: "null"}
_FLOW_CONTROL = {
    "safe": "Flow control has its safe form, for the gate flowControl is not written (docs/flow-control.md)",
    "off": "Flow control is off, by the gate flowControl",
}


def add_config_arguments(parser: argparse.ArgumentParser, *, optional: bool) -> None:
    more = " (default: what runs without a configuration)" if optional else ""
    parser.add_argument("file", nargs="?" if optional else "+", metavar="FILE", help=f"an EndpointPickerConfig, - for standard input{more}")
    parser.add_argument("--allow-experimental-plugins", action="store_true", help="as the picker will be started")


def check(args: argparse.Namespace) -> int:
    """Say what is in each file, or everything that is wrong with it. Nothing is started."""
    code = 0
    for file in args.file:
        try:
            built, source = _built(file, allow_experimental=args.allow_experimental_plugins)
        except ConfigError as error:
            print(f"epp: {error}", file=sys.stderr)
            code = 2
            continue
        config = built.config
        for warning in (*config.warnings, *_missing_here(built)):
            print(f"{source}: warning: {warning}", file=sys.stderr)
        profiles = ", ".join(f"{profile.name} ({len(profile.plugins)} plugins)" for profile in config.scheduling_profiles)
        print(f"{source}: valid: {len(config.plugins)} plugins; profiles: {profiles}")
    return code


def print_config(args: argparse.Namespace) -> int:
    """The effective configuration: defaults and automatic producers filled in, passwords left out; and which form flow control has."""
    built, _ = _built(args.file, allow_experimental=args.allow_experimental_plugins)
    form = _FLOW_CONTROL.get(built.config.flow_control_mode)
    if form:
        sys.stdout.write(f"# {form}: of the block flowControl only saturationDetector has an effect, on what is shed\n")
    plugins = tuple(msgspec.structs.replace(spec, parameters=hidden(spec.parameters)) for spec in built.config.plugins)
    sys.stdout.write(effective.to_yaml(msgspec.structs.replace(built.config, plugins=plugins), Registry()))
    return 0


def list_plugins(_args: argparse.Namespace) -> int:
    registry = Registry()
    types = sorted(registry.types())
    width = max(map(len, types))
    for type_ in types:
        cls = registry.load(type_)
        replacement = registry.deprecated(type_)
        about = f"deprecated: use {replacement}" if replacement else _first_line(cls)
        mark = " (alpha)" if cls.stability == "alpha" else ""
        print(f"{type_:{width}}  {'+'.join(sorted(registry.role(type_))):15}  {about}{mark}")
    return 0


def show_plugin(args: argparse.Namespace) -> int:
    registry = Registry()
    if args.type not in registry.types() and ":" not in args.type:
        raise ConfigError("command line", [Problem("TYPE", f"unknown plugin type {args.type!r}{suggestion(args.type, registry.types())}")])
    with _told("command line", "TYPE"):
        registry.load(args.type)
    sys.stdout.write("\n".join(_about(registry, args.type)) + "\n")
    return 0


def _about(registry: Registry, type_: str) -> Iterator[str]:
    cls = registry.load(type_)
    yield f"{type_}  ({', '.join(sorted(registry.role(type_)))}{', alpha' if cls.stability == 'alpha' else ''})"
    replacement = registry.deprecated(type_)
    if replacement:
        yield f"deprecated: use {replacement}"
    yield ""
    yield inspect.getdoc(cls) or ""
    module = inspect.getdoc(inspect.getmodule(cls))
    if module:
        yield ""
        yield module
    yield ""
    yield "parameters:" if msgspec.structs.fields(cls) else "parameters: none"
    yield from _parameters(cls, "  ")
    for label, keys in (("requires", cls.requires), ("uses", cls.uses), ("produces", cls.produces)):
        if keys:
            yield f"{label}: {', '.join(keys)}"


def _parameters(cls: type[msgspec.Struct], indent: str) -> Iterator[str]:
    for field in msgspec.structs.fields(cls):
        yield f"{indent}{field.encode_name}: {_type_name(field.type)}{_default(field)}"
        for inner in _structs(field.type):
            yield from _parameters(inner, f"{indent}  ")


def _structs(of: Any) -> Iterator[type[msgspec.Struct]]:
    """The structs a value of this type is made of."""
    if isinstance(of, type) and issubclass(of, msgspec.Struct):
        yield of
    elif get_origin(of) is not Literal:
        for inner in get_args(of):
            yield from _structs(inner)


def _first_line(cls: type[Plugin]) -> str:
    text = inspect.getdoc(cls) or ""
    return " ".join(text.split("\n\n")[0].split())


def _type_name(of: Any) -> str:
    """`Annotated[float, Meta(ge=0, le=1)]` as people write it: `float, at least 0, at most 1`."""
    if of in (Duration, OptionalDuration):
        return "duration"
    if get_origin(of) is Annotated:
        inner, *notes = get_args(of)
        limits = [f"{word} {value:g}" for note in notes for name, word in _LIMITS if (value := getattr(note, name, None)) is not None]
        return ", ".join([_type_name(inner), *limits])
    origin, inner_types = get_origin(of), get_args(of)
    if origin is dict:
        return "dict[" + ", ".join(map(_type_name, inner_types)) + "]"
    if origin is Literal:
        return " | ".join(str(value) or '""' for value in inner_types)
    if origin in (Union, UnionType):
        return " | ".join(map(_type_name, inner_types))
    if origin in (tuple, list):
        return f"list of {_type_name(inner_types[0])}"
    if isinstance(of, type) and not inner_types:
        return _WORDS.get(of) or ("mapping" if issubclass(of, msgspec.Struct) else of.__name__)
    return _MODULE.sub("", str(of))


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return " (required)"
    value = field.default_factory() if field.default is msgspec.NODEFAULT and callable(field.default_factory) else field.default
    if isinstance(value, msgspec.Struct):  # what is in it says so itself
        return ""
    return f" = {msgspec.json.encode(msgspec.to_builtins(value)).decode()}"


def _built(file: str | None, *, allow_experimental: bool) -> tuple[Built, str]:
    text, source = "", file or "default configuration"
    if file == "-":
        text, source = sys.stdin.read(), "standard input"
    elif file:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(source, [Problem("", f"can't be read: {getattr(error, 'strerror', None) or error}")]) from None
        if not text.strip():
            raise ConfigError(source, [Problem("", "is empty")])
    registry = Registry()
    with _told(source, "plugins"):
        config = load(text, source=source, catalogue=registry, allow_experimental=allow_experimental)
        return build(config, registry, random.Random(0), MonotonicClock(), source=source), source  # noqa: S311 - nothing is drawn


def _missing_here(built: Built) -> Iterator[str]:
    """Files and packages it needs that this machine lacks: where the picker runs they may be there."""
    clock = MonotonicClock()
    try:
        KvRouting(Datastore(clock), clock, random.Random(0), built.plugins.values())  # noqa: S311 - nothing is drawn
    except (ValueError, StartError) as error:
        yield f"plugins: a picker would not start here: {error}"


@contextmanager
def _told(source: str, path: str) -> Iterator[None]:
    """What code of others' making does when it is imported or made, as a fault that says where, and not as a stack of ours."""
    try:
        yield
    except ConfigError:
        raise
    except UnknownPluginError as error:
        raise ConfigError(source, [Problem(path, str(error))]) from None
    except Exception as error:
        *_, last = traceback.extract_tb(error.__traceback__)
        message = f"one can't be made: {type(error).__name__}: {error} ({last.filename}:{last.lineno})"
        raise ConfigError(source, [Problem(path, message)]) from error
