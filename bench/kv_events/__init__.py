"""What the precise prefix index costs: reading KV-cache events, memory, and the wait of decisions meanwhile."""

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from bench import report
from bench.arguments import number
from bench.kv_events.cell import Plan, measure

DESCRIPTION = """\
KV-cache events as vLLM publishes them (maps, 16 tokens a block, prompts of 1 024 tokens, every removal in an event of its own), read and applied
to the index of the precise prefix producer, in one process and without sockets.

  bytes/block     resident memory over blocks held, a block counted once for each endpoint that has it
  blocks/s        stored blocks per second of one core, with as many removed; decoding included
  decision        hashing a prompt, its look-up among all endpoints and its speculative entries, from when it was due: it waits for the piece of a
                  frame that is just being stored. Virtual time in which everything takes the CPU time it took."""

BLOCKS_TARGET_PER_S = 100_000
COLUMNS = (
    report.Column("endpoints", "endpoints"),
    report.Column("blocks", "blocks", ",d"),
    report.Column("distinct_blocks", "distinct", ",d"),
    report.Column("bytes_per_block", "bytes/block", ".0f"),
    report.Column("estimate_bytes_per_block", "estimate", ".0f"),
    report.Column("blocks_per_s_per_core", "blocks/s", ",.0f"),
    report.Column("events_per_s_per_core", "events/s", ",.0f"),
    report.Column("decision_alone_p50_us", "alone us", ".0f"),
    report.Column("decision_p50_us", "p50 us", ".0f"),
    report.Column("decision_p99_us", "p99 us", ".0f"),
    report.Column("piece_max_us", "longest piece us", ".0f"),
    report.Column("target", "target/s", ",d"),
    report.Column("met", "met"),
)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = """\
examples:
  python -m bench kv-events                            16 and 256 endpoints, a million blocks each: about a minute
  python -m bench kv-events --quick                    does it run at all: seconds, figures are rough
  python -m bench kv-events --ingest 200000            decisions beside four times the events
  python -m bench kv-events --json out.json --check    rows for a machine; exit code 1 below 100 000 blocks/s"""
    parser.add_argument("--endpoints", type=_numbers, default=[16, 256], metavar="N,N", help="pool sizes (default: 16,256)")
    parser.add_argument("--blocks", type=int, default=1_000_000, help="blocks held by all endpoints together (default: %(default)s)")
    parser.add_argument(
        "--ingest", type=number(float, 1), default=50_000.0, metavar="BLOCKS/S", help="stored while decisions are timed (default: 50000)"
    )
    parser.add_argument("--prompt-tokens", type=int, default=8_192, help="of a decision (default: %(default)s)")
    parser.add_argument("--decisions", type=int, default=5_000, help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="50 000 blocks and 500 decisions")
    parser.add_argument("--json", metavar="FILE", help="write rows, machine and versions here too")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")


def run(args: argparse.Namespace) -> int:
    blocks, decisions = (50_000, 500) if args.quick else (args.blocks, args.decisions)
    rows = []
    for endpoints in args.endpoints:
        plan = Plan(endpoints, blocks, max(20_000, blocks // 5), decisions, args.ingest, args.prompt_tokens)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            row = process.submit(measure, plan).result()
        row |= {"target": BLOCKS_TARGET_PER_S, "met": float(str(row["blocks_per_s_per_core"])) >= BLOCKS_TARGET_PER_S}
        rows.append(row)
        print(
            f"measured: {endpoints} endpoints: {row['blocks_per_s_per_core']:,.0f} blocks/s, {row['bytes_per_block']:.0f} bytes a block",
            flush=True,
        )
    print()
    print(report.table(rows, COLUMNS))
    if args.json:
        notes = {"ingest_blocks_per_s": args.ingest, "prompt_tokens": args.prompt_tokens, "decisions": decisions}
        report.write_json(Path(args.json), report.document(rows, ("msgspec", "xxhash"), notes))
    return int(args.check and not all(row["met"] for row in rows))


def _numbers(text: str) -> list[int]:
    found = [int(part) for part in text.split(",") if part.strip().isdigit() and int(part)]
    if len(found) != text.count(",") + 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers above 0")
    return found
