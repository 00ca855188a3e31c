"""Gathering facts: each probe asks one thing, within a time limit, and hands on what it learned or why it could not.

Only what the chosen checks need is asked, in the order of the list, one after the other: a check-up must not be a load. Nothing is changed
anywhere. Not here: what is asked (picker_probes, envoy_probes, cluster_probes), what follows from it (the checks).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import NamedTuple


class Missing(NamedTuple):
    """In place of a fact."""

    reason: str
    fault: bool = False
    """It was asked for and should have been there: a finding of its own, not only a reason to skip."""


class ProbeError(Exception):
    """The fact can't be had; says why. `fault`: see Missing."""

    def __init__(self, reason: str, *, fault: bool = False) -> None:
        super().__init__(reason)
        self.fault = fault


class Probe(NamedTuple):
    name: str
    """Of the fact it finds."""
    about: str
    """What is being asked, as progress: `asking the ext_proc port`."""
    run: Callable[..., Awaitable[object]]
    needs: tuple[str, ...] = ()
    """Names of facts found before: its arguments. One of them missing, this is too."""
    hopes: tuple[str, ...] = ()
    """The same, but they may be missing: `run` gets the Missing."""


async def gather(
    probes: Sequence[Probe], wanted: Iterable[str], *, limit_s: float, known: Mapping[str, object], progress: Callable[[str], None]
) -> dict[str, object]:
    """The wanted facts and all that they are made of, on top of those known already."""
    by_name = {probe.name: probe for probe in probes}
    needed: set[str] = set()
    waiting = list(wanted)
    while waiting:
        name = waiting.pop()
        if name in by_name and name not in needed:
            needed.add(name)
            waiting += by_name[name].needs + by_name[name].hopes
    facts = dict(known)
    for probe in probes:
        if probe.name in needed and probe.name not in facts:
            facts[probe.name] = await _ask(probe, facts, limit_s, progress)
    return facts


async def _ask(probe: Probe, facts: Mapping[str, object], limit_s: float, progress: Callable[[str], None]) -> object:
    values = [facts[name] for name in probe.needs]
    missing = next((value for value in values if isinstance(value, Missing)), None)
    if missing is not None:
        return missing
    progress(probe.about)
    try:
        async with asyncio.timeout(limit_s):
            return await probe.run(*values, *(facts[name] for name in probe.hopes))
    except TimeoutError:
        return Missing(f"no answer within {limit_s:g} s from {probe.about}", fault=True)
    except ProbeError as error:
        return Missing(str(error), error.fault)
