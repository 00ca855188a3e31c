"""`python -m bench replay --flow`: what flow control does for tenants, priorities and bursts, with the product's own, in virtual time.

Scenarios: flow_scenarios. Each is played with every configuration in `configs/flow`; a file's first line says what it is. Rows are those of
`bench replay`, with what each tenant got (flow_stats) and, for the tenant of high priority, its TTFT over what it is without the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from bench import BenchError, report
from bench.replay.cells import CONFIGS, Cell, Row, Settings, run_all
from bench.replay.flow_scenarios import BATCH, FLOW_SCENARIOS, HEAVY, IMPORTANT, LIGHT
from bench.replay.stats import by_cell, text_of_mean

ALONE, OVERLOAD = "alone", "priority"
POLICIES = ("off", "default", "utilization", "fair", "holdback")
RATIO = "over_alone"
COLUMNS: Mapping[str, Sequence[tuple[str, str, str]]] = {
    "tenants": (
        ("jain", "Jain", ".3f"),
        (f"{LIGHT}_ttft_p90_s", "light: TTFT p90 s", ".2f"),
        (f"{HEAVY}_ttft_p90_s", "heavy: TTFT p90 s", ".2f"),
        ("served_tokens_per_s", "tokens/s", ".0f"),
        ("rejected", "rejected", ".0f"),
    ),
    OVERLOAD: (
        (f"{IMPORTANT}_ttft_p50_s", "important: TTFT p50 s", ".3f"),
        (f"{IMPORTANT}_ttft_p90_s", "p90", ".3f"),
        (RATIO, "p90 / alone", ".2f"),
        (f"{BATCH}_ttft_p90_s", "batch: TTFT p90 s", ".2f"),
        ("served_tokens_per_s", "tokens/s", ".0f"),
        ("rejected", "rejected", ".0f"),
    ),
    "cold-burst": (
        ("requests", "requests", ".0f"),
        ("errors", "errors", ".0f"),
        ("ttft_p50_s", "TTFT p50 s", ".1f"),
        ("ttft_p90_s", "p90", ".1f"),
        ("elapsed_s", "all answered s", ".0f"),
    ),
}


def play(
    settings: Settings, scenarios: Sequence[str], policies: Sequence[str], *, seeds: int, jobs: int, progress: Callable[[str], None]
) -> list[Row]:
    """One row a scenario, policy and seed; the tenant alone is played for comparison and has rows of its own."""
    wanted = [*([ALONE] if OVERLOAD in scenarios else []), *scenarios]
    cells = [
        Cell(policy, configured(policy), scenario, 1.0, seed)
        for scenario in wanted
        for policy in (policies if scenario != ALONE else ("off",))
        for seed in range(1, seeds + 1)
    ]
    rows = run_all(settings, cells, jobs, progress)
    p90_s = f"{IMPORTANT}_ttft_p90_s"
    alone = {row["seed"]: row.get(p90_s) for row in rows if row["workload"] == ALONE}
    for row in rows:
        if row["workload"] == OVERLOAD:
            own_s, alone_s = row.get(p90_s), alone[row["seed"]]
            row[RATIO] = float(str(own_s)) / float(str(alone_s)) if own_s is not None and alone_s is not None else None
    return rows


def configured(policy: str) -> str:
    """The EndpointPickerConfig of that name."""
    path = CONFIGS / "flow" / f"{policy}.yaml"
    if not path.is_file():
        raise BenchError(f"no flow control is named {policy!r}: {', '.join(POLICIES)}")
    return path.read_text(encoding="utf-8")


def scenarios_of(text: str) -> Sequence[str]:
    """Raises BenchError for one nobody knows."""
    names = list(COLUMNS) if text == "all" else text.split(",")
    for name in names:
        if name not in COLUMNS:
            raise BenchError(f"no flow scenario is named {name!r}: {', '.join(COLUMNS)}, or all")
    return names


def text_of(rows: Sequence[Row]) -> str:
    texts = []
    cells = by_cell(rows)
    for scenario, figures in COLUMNS.items():
        lines = [
            {"policy": policy, **{key: text_of_mean(of_cell, key, spec) for key, _, spec in figures}}
            for (workload, policy, _), of_cell in cells.items()
            if workload == scenario
        ]
        if lines:
            columns = (report.Column("policy", "flow control"), *(report.Column(key, title) for key, title, _ in figures))
            texts.append(f"{scenario}: {(FLOW_SCENARIOS[scenario].__doc__ or '').strip()}\n{report.table(lines, columns)}\n")
    return "\n".join(texts)
