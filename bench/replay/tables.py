"""Rows for people: one table for each workload and rate, means over seeds with 95 % intervals, and plots over the rate."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import BenchError, report
from bench.replay.baselines import BASELINES
from bench.replay.stats import by_cell, interval, mean_of, text_of_mean

FIGURES = (
    ("ttft_mean_s", "TTFT mean s", ".3f"),
    ("ttft_p50_s", "p50", ".3f"),
    ("ttft_p90_s", "p90", ".3f"),
    ("ttft_p99_s", "p99", ".2f"),
    ("tpot_p90_s", "TPOT p90 s", ".4f"),
    ("e2e_mean_s", "E2E mean s", ".2f"),
    ("hit_rate", "hit", ".3f"),
    ("goodput", "goodput", ".3f"),
    ("errors", "errors", ".0f"),
    ("rejected", "rejected", ".0f"),
    ("imbalance", "imbalance", ".2f"),
)
COLUMNS = (
    report.Column("policy", "policy"),
    *(report.Column(key, title) for key, title, _ in FIGURES),
    report.Column("against", "p90 / best"),
)
PLOTTED = (("ttft_p90_s", "TTFT p90 (s)", "log"), ("goodput", "goodput", "linear"))


def text_of(rows: Sequence[Mapping[str, object]]) -> str:
    parts: dict[tuple[str, float], list[dict[str, object]]] = {}
    for (workload, policy, rate), cell in by_cell(rows).items():
        line: dict[str, object] = {"policy": policy}
        for key, _, spec in FIGURES:
            line[key] = text_of_mean(cell, key, spec)
        parts.setdefault((workload, rate), []).append(line)
    _against_best(rows, parts)
    seeds = len({row["seed"] for row in rows})
    texts = []
    for (workload, rate), lines in parts.items():
        texts.append(
            f"{workload}, rate {rate:g}, mean{' and 95 % interval' if seeds > 1 else ''} of {seeds} seed{'s' if seeds > 1 else ''}"
        )
        texts.append(report.table(lines, COLUMNS) + "\n")
    return "\n".join(texts)


def _against_best(rows: Sequence[Mapping[str, object]], parts: Mapping[tuple[str, float], Sequence[dict[str, object]]]) -> None:
    """TTFT p90 over that of the best baseline there, seed by seed: all policies see the same arrivals, so this varies less than either.

    The clairvoyant is not a baseline: nobody can have it.
    """
    cells = by_cell(rows)
    for (workload, rate), lines in parts.items():
        able: dict[str, float] = {}
        for policy in (str(line["policy"]) for line in lines if line["policy"] in BASELINES and line["policy"] != "clairvoyant"):
            own = cells[workload, policy, rate]
            mean = mean_of(own, "ttft_p90_s")
            if mean is not None and all(row["ttft_p90_s"] is not None for row in own):  # who answered nobody is not best
                able[policy] = mean.mean
        if not able:
            continue
        best = min(able, key=able.__getitem__)
        of_best = {row["seed"]: float(str(row["ttft_p90_s"])) for row in cells[workload, best, rate]}
        for line in lines:
            own = cells[workload, str(line["policy"]), rate]
            said = [row for row in own if row["ttft_p90_s"] is not None]
            ratios = [float(str(row["ttft_p90_s"])) / of_best[row["seed"]] for row in said if of_best.get(row["seed"])]
            if ratios:
                line["against"] = "best" if line["policy"] == best else interval(ratios).text(".3f")


def plotting() -> tuple[Any, Any]:
    """matplotlib and its pyplot. Raises BenchError where it is not installed: to be known before an hour of figures."""
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
        matplotlib.use("Agg")
        return matplotlib, importlib.import_module("matplotlib.pyplot")
    except ImportError:
        raise BenchError("--plot needs matplotlib: pip install 'envoy-endpoint-picker[bench]'") from None


def plot(rows: Sequence[Mapping[str, object]], folder: Path) -> Sequence[Path]:
    """One PNG and one SVG a workload. Raises BenchError where matplotlib is not installed."""
    matplotlib, pyplot = plotting()
    matplotlib.rcParams["svg.hashsalt"] = "bench"  # the same rows, the same file
    folder.mkdir(parents=True, exist_ok=True)
    cells = by_cell(rows)
    written: list[Path] = []
    for workload in dict.fromkeys(key[0] for key in cells):
        figure, axes = pyplot.subplots(1, len(PLOTTED), figsize=(13, 5), layout="constrained")
        for axis, (key, title, scale) in zip(axes, PLOTTED, strict=True):
            for number, policy in enumerate(dict.fromkeys(key[1] for key in cells if key[0] == workload)):
                means = [(cell[2], mean_of(cells[cell], key)) for cell in sorted(cells) if cell[:2] == (workload, policy)]
                points = [(rate, mean) for rate, mean in means if mean is not None]
                axis.errorbar(
                    [rate for rate, _ in points],
                    [value.mean for _, value in points],
                    yerr=[value.half for _, value in points],
                    label=policy,
                    color=f"C{number % 10}",
                    linestyle=("-", "--", ":")[number // 10 % 3],
                    marker="o",
                    markersize=3,
                    capsize=2,
                )
            axis.set(title=title, xlabel="rate", yscale=scale)
            axis.grid(alpha=0.3)
        axes[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        figure.suptitle(workload)
        for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            path = folder / f"{workload}.{suffix}"
            figure.savefig(path, metadata=metadata, dpi=120)
            written.append(path)
        pyplot.close(figure)
    return written
