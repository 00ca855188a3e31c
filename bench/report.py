"""Rows of a measurement, as an aligned table for people and as one JSON document for machines."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import epp

Row = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Column:
    """One column: the row's key, the title over it, and how a value is written (a format spec)."""

    key: str
    title: str
    spec: str = ""

    def cell(self, row: Row) -> str:
        value = row.get(self.key)
        if value is None:
            return "-"
        if isinstance(value, bool):
            return "PASS" if value else "MISS"
        return format(value, self.spec)


def table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Right-aligned columns, one line a row; an absent value is `-`, a bool PASS or MISS."""
    lines = [[column.title for column in columns], *([column.cell(row) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def machine(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, object]:
    """What figures depend on beside the code."""
    names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    }


def versions(distributions: Sequence[str]) -> dict[str, str]:
    """The picker's version and those of the named distributions that are installed."""
    found = {"epp": epp.__version__}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def document(rows: Sequence[Row], distributions: Sequence[str], notes: Row) -> dict[str, object]:
    """What `--json` writes."""
    return {"rows": [dict(row) for row in rows], "machine": machine(), "versions": versions(distributions), "notes": dict(notes)}


def write_json(path: Path, content: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
