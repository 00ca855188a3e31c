"""Endpoints written on the command line: `10.0.0.1:8000`, `[::1]:8000`, `name=10.0.0.1:8000`."""

from __future__ import annotations

from collections.abc import Sequence

from epp.errors import ConfigError, Problem
from epp.types import Address, EndpointSpec

FLAG = "--endpoint"
NAME_CHARS_MAX = 253
"""As for names in Kubernetes; longer ones have no business in logs and labels."""


def parse_endpoints(values: Sequence[str]) -> list[EndpointSpec]:
    """One spec a value; the name is the address where none is given. Raises ConfigError with every fault."""
    problems: list[Problem] = []
    specs: list[EndpointSpec] = []
    paths: list[str] = []
    for i, value in enumerate(values):
        path = f"[{i}]"
        name, equals, address_text = value.rpartition("=")
        try:
            address = Address.parse(address_text)
        except ValueError as error:
            problems.append(Problem(path, str(error)))
            continue
        fault = name_fault(name) if equals else ""
        if fault:
            problems.append(Problem(path, f"{value!r}: the name {fault}"))
        specs.append(EndpointSpec(name=name or str(address), address=address))
        paths.append(path)
    problems += duplicates(specs, paths)
    if problems:
        raise ConfigError(FLAG, problems)
    return specs


def name_fault(name: str) -> str:
    """What is wrong with an endpoint's name, or nothing."""
    if not name:
        return "is empty"
    if len(name) > NAME_CHARS_MAX:
        return f"is longer than {NAME_CHARS_MAX} characters"
    return "" if name.isprintable() and " " not in name else "has blanks or control characters in it"


def duplicates(specs: Sequence[EndpointSpec], paths: Sequence[str]) -> list[Problem]:
    """Specs that repeat the address or the name of one before them; `paths` says where each was written."""
    problems: list[Problem] = []
    addresses: dict[Address, str] = {}
    names: dict[tuple[str, str], str] = {}
    for spec, path in zip(specs, paths, strict=True):
        first = addresses.setdefault(spec.address, path)
        if first is not path:
            problems.append(Problem(path, f"the address {spec.address} is given already at {first}"))
        first = names.setdefault((spec.namespace, spec.name), path)
        if first is not path:
            problems.append(Problem(path, f"the name {spec.name!r} is given already at {first}"))
    return problems
