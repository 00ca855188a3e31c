"""The findings as text for people or as JSON for programs, and progress while they are gathered. No judgement here."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

from epp import __version__
from epp.doctor.findings import Check, Result, Status

LINE_CHARS_MAX = 2_000
"""What others say (a server's error text) is cut there."""
_LABELS = {Status.OK: "ok", Status.WARN: "warn", Status.FAIL: "FAIL", Status.SKIPPED: "skipped"}
_WIDTH = max(map(len, _LABELS.values()))


def write_text(results: Sequence[Result], out: TextIO) -> None:
    width = max((len(result.check) for result in results), default=0)
    indent = " " * (_WIDTH + 2 + width + 2)
    skipped: dict[str, list[str]] = {}
    for check, finding in results:
        if finding.status is Status.SKIPPED:
            skipped.setdefault(finding.text, []).append(check)
            continue
        out.write(f"{_LABELS[finding.status]:{_WIDTH}}  {check:{width}}  {_line(finding.text)}\n")
        if finding.effect:
            out.write(f"{indent}users see: {_line(finding.effect)}\n")
        if finding.change:
            out.write(f"{indent}change:    {_line(finding.change)}\n")
    out.writelines(
        f"{_LABELS[Status.SKIPPED]:{_WIDTH}}  {_line(reason)}: {', '.join(dict.fromkeys(checks))}\n" for reason, checks in skipped.items()
    )
    counts = _counts(results)
    said = [f"{counts['ok']} ok", _several(counts["warn"], "warning"), _several(counts["fail"], "failure"), f"{counts['skipped']} skipped"]
    out.write(", ".join(said) + "\n")


def write_json(results: Sequence[Result], out: TextIO) -> None:
    findings = [
        {"check": check, "status": finding.status.value, "text": finding.text, "effect": finding.effect, "change": finding.change}
        for check, finding in results
    ]
    json.dump({"version": __version__, "counts": _counts(results), "findings": findings}, out, indent=2)
    out.write("\n")


def write_list(checks: Sequence[Check], out: TextIO) -> None:
    width = max(len(check.name) for check in checks)
    out.writelines(f"{check.name:{width}}  {check.about}\n" for check in checks)


@contextlib.contextmanager
def progress(out: TextIO) -> Iterator[Callable[[str], None]]:
    """On a terminal one line that says what is being asked, gone at the end; elsewhere nothing."""
    if not out.isatty():
        yield lambda _about: None
        return
    try:
        yield lambda about: print(f"\r\033[Kasking: {about} ...", end="", file=out, flush=True)
    finally:
        print("\r\033[K", end="", file=out, flush=True)


def _counts(results: Sequence[Result]) -> dict[str, int]:
    counts = Counter(result.finding.status for result in results)
    return {status.value: counts[status] for status in Status}


def _several(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _line(text: str) -> str:
    """One line, without control characters: parts of it were said by a server."""
    shown = "".join(char if char.isprintable() else " " for char in text)
    return shown if len(shown) <= LINE_CHARS_MAX else shown[:LINE_CHARS_MAX] + " ..."
