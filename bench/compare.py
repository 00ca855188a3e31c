"""Two files of `bench replay --json`, side by side: what changed between two versions, two machines or two settings.

Cells are matched by workload, policy and rate. A change is marked when the two 95 % intervals do not overlap: `better` or `WORSE`;
figures that one of them lacks, on any seed, get no verdict. Where the two were not played alike (`notes` and seeds), that is said, and no more.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench import BenchError, report
from bench.replay.stats import Interval, by_cell, mean_of

FINDINGS = ("date", "saturation")
"""Notes that say what came of a run, not how it was played."""

DESCRIPTION = """\
Compare two files written by `bench replay --json`: B against A, cell by cell. `--check 5` makes it an exit code of 1 when a figure of B is
more than 5 % worse than A's, intervals taken into account."""

METRICS = (("ttft_mean_s", 1), ("ttft_p90_s", 1), ("tpot_p90_s", 1), ("e2e_mean_s", 1), ("hit_rate", -1), ("goodput", -1), ("errors", 1))
"""Figure, and whether more of it is worse (1) or better (-1)."""
COLUMNS = (
    report.Column("workload", "workload"),
    report.Column("policy", "policy"),
    report.Column("rate", "rate", "g"),
    report.Column("metric", "metric"),
    report.Column("a", "A"),
    report.Column("b", "B"),
    report.Column("ratio", "B/A", ".3f"),
    report.Column("verdict", ""),
)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A.json")
    parser.add_argument("b", metavar="B.json")
    parser.add_argument("--metrics", default="", metavar="M[,M]", help="of " + ", ".join(name for name, _ in METRICS) + " (default: all)")
    parser.add_argument("--policies", default="", metavar="P[,P]", help="only these")
    parser.add_argument("--changed", action="store_true", help="only what changed")
    parser.add_argument("--check", type=float, metavar="PERCENT", help="exit with 1 if B is worse by more")


def run(args: argparse.Namespace) -> int:
    (rows_a, notes_a), (rows_b, notes_b) = _read(args.a), _read(args.b)
    rows, missing = compared(rows_a, rows_b)
    metrics = set(args.metrics.split(",")) if args.metrics else {name for name, _ in METRICS}
    unknown = metrics - {name for name, _ in METRICS}
    if unknown:
        raise BenchError(f"no metric is named {', '.join(sorted(unknown))}")
    policies = set(args.policies.split(",")) if args.policies else None
    rows = [row for row in rows if row["metric"] in metrics and (policies is None or row["policy"] in policies)]
    shown = [row for row in rows if row["verdict"]] if args.changed else rows
    print(report.table(shown, COLUMNS))
    for line in missing:
        print(line)
    if not rows:
        raise BenchError("the files have no cell in common")
    for line in unlike(notes_a, notes_b) + unlike_seeds(rows_a, rows_b):
        print(line)
    if args.check is None:
        return 0
    return int(any(row["verdict"] == "WORSE" and float(str(row["worse_percent"])) > args.check for row in rows))


def compared(a: Sequence[Mapping[str, object]], b: Sequence[Mapping[str, object]]) -> tuple[list[dict[str, object]], list[str]]:
    """One row a cell and metric both have; and what only one of them has, in words."""
    cells_a, cells_b = by_cell(a), by_cell(b)
    rows: list[dict[str, object]] = []
    for key in (key for key in cells_a if key in cells_b):
        for metric, sign in METRICS:
            before, after = mean_of(cells_a[key], metric), mean_of(cells_b[key], metric)
            if before is None or after is None:
                said = {"a": before and before.text(".4g"), "b": after and after.text(".4g")}
                rows.append({"workload": key[0], "policy": key[1], "rate": key[2], "metric": metric, "verdict": "", **said})
                continue
            ratio = after.mean / before.mean if before.mean else None
            worse = sign * (after.mean - before.mean)
            rows.append({
                "workload": key[0], "policy": key[1], "rate": key[2], "metric": metric,
                "a": before.text(".4g"), "b": after.text(".4g"), "ratio": ratio,
                "verdict": _verdict(before, after, worse) if all(row.get(metric) is not None for row in (*cells_a[key], *cells_b[key])) else "",
                "worse_percent": 100 * worse / before.mean if before.mean else (float("inf") if worse > 0 else 0.0),
            })  # fmt: skip
    missing = [f"only in A: {' '.join(map(str, key))}" for key in cells_a if key not in cells_b]
    missing += [f"only in B: {' '.join(map(str, key))}" for key in cells_b if key not in cells_a]
    return rows, missing


def unlike(a: Mapping[str, object], b: Mapping[str, object]) -> list[str]:
    """How the runs differ by what their files say of them, in words."""
    asked = [name for name in dict.fromkeys((*a, *b)) if name not in FINDINGS]
    lines = [
        f"unlike runs: {name} is {_word(a[name])} in A, {_word(b[name])} in B"
        for name in asked
        if name in a and name in b and a[name] != b[name]
    ]
    for which, own in (("A", a), ("B", b)):
        lacking = [name for name in asked if name not in own]
        if lacking:
            lines.append(f"perhaps unlike runs: {which} does not say {', '.join(lacking)}")
    return lines


def unlike_seeds(a: Sequence[Mapping[str, object]], b: Sequence[Mapping[str, object]]) -> list[str]:
    """The same for the seeds of cells both have: one line for all in which they differ alike."""
    cells_a, cells_b = by_cell(a), by_cell(b)
    seeds = [
        tuple(sorted(_word(row.get("seed")) for row in cells[key]) for cells in (cells_a, cells_b)) for key in cells_a if key in cells_b
    ]
    different = [f"unlike runs: seeds are {' '.join(of_a)} in A, {' '.join(of_b)} in B" for of_a, of_b in seeds if of_a != of_b]
    return list(dict.fromkeys(different))


def _word(value: object) -> str:
    return json.dumps(value)


def _verdict(a: Interval, b: Interval, worse: float) -> str:
    if not _apart(a, b):
        return ""
    return "WORSE" if worse > 0 else "better"


def _apart(a: Interval, b: Interval) -> bool:
    return a.mean != b.mean and abs(a.mean - b.mean) > a.half + b.half


def _read(path: str) -> tuple[Sequence[Mapping[str, object]], Mapping[str, object]]:
    """Rows and notes."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        rows: list[dict[str, object]] = document["rows"]
        notes: dict[str, object] = dict(document.get("notes", {}))
        by_cell(rows)
    except OSError as error:
        raise BenchError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BenchError(f"{path} was not written by bench replay --json") from None
    return rows, notes
