"""What a check is and what it says. Pure: a check gets facts that were gathered before and does no I/O of its own.

A check yields a finding for each thing that is not as it should be; one that yields nothing found all well. It never sees a fact that
could not be had: it is skipped then, with the reason (probing.Missing). A finding says what is wrong, what its users see of it, and what to
change; it never holds a secret, a prompt or a whole configuration.
"""

from __future__ import annotations

import enum
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from epp.doctor.probing import Missing


class Status(enum.Enum):
    OK = "ok"
    WARN = "warn"
    """It works, but not as well or as safely as it should."""
    FAIL = "fail"
    """Requests fail, or go elsewhere than the picker says."""
    SKIPPED = "skipped"


class Finding(NamedTuple):
    status: Status
    text: str
    """What is so: the fault, or that all is well."""
    effect: str = ""
    """What users see of it."""
    change: str = ""
    """What to do: a command, a flag, or YAML; may have several lines."""


class Check(NamedTuple):
    name: str
    about: str
    """What is looked at; also the text where all is well."""
    needs: tuple[str, ...]
    """Names of facts: the arguments of `run`, in this order. One with a `?` may be missing: `run` gets the Missing."""
    run: Callable[..., Iterable[Finding]]


class Result(NamedTuple):
    check: str
    finding: Finding


def ok(text: str) -> Finding:
    return Finding(Status.OK, text)


def warn(text: str, effect: str, change: str) -> Finding:
    return Finding(Status.WARN, text, effect, change)


def fail(text: str, effect: str, change: str) -> Finding:
    return Finding(Status.FAIL, text, effect, change)


def skipped(reason: str) -> Finding:
    return Finding(Status.SKIPPED, reason)


def chosen(checks: Iterable[Check], only: Sequence[str], skip: Sequence[str]) -> list[Check]:
    """Those whose names fit one of `only` (all, if empty) and none of `skip`; patterns as in a shell."""
    return [check for check in checks if (not only or _fits(check, only)) and not _fits(check, skip)]


def judge(check: Check, facts: Mapping[str, object]) -> list[Result]:
    """What the check says of these facts."""
    values = [facts[name.removesuffix("?")] for name in check.needs]
    missing = next((v for name, v in zip(check.needs, values, strict=True) if isinstance(v, Missing) and not name.endswith("?")), None)
    found = [skipped(missing.reason)] if missing is not None else list(check.run(*values)) or [ok(check.about)]
    return [Result(check.name, finding) for finding in found]


def _fits(check: Check, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(check.name, pattern) for pattern in patterns)
