"""`python -m tests.fuzz.run --inputs N | --seconds N`: bytes from outside, N of them or for so long, into everything that reads them.

With atheris installed (a coverage-guided fuzzer) inputs are grown by what they reach; without, they are seeded mutations of the
seeds. Targets run one after the other, each in a process of its own. An input that finds a bug is written to a file, named at the end:
put it under tests/fuzz/seeds once the bug is mended. Exit code 1 if there was one.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import re
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

LEN_MAX = 8_192
ENGINES = ("atheris", "mutations")
TARGET_NAMES = ("session", "request", "connection")


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=(__doc__ or "").partition("\n")[0])
    amount = parser.add_mutually_exclusive_group(required=True)
    amount.add_argument("--inputs", type=int, default=0, metavar="N", help="over all targets")
    amount.add_argument("--seconds", type=int, default=0, metavar="N", help="over all targets")
    parser.add_argument("--target", choices=TARGET_NAMES, action="append", default=[], help="this one alone; repeat for more")
    parser.add_argument(
        "--engine", choices=ENGINES, default=ENGINES[importlib.util.find_spec("atheris") is None], help="default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the random numbers (default: %(default)s)")
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    targets = args.target or list(TARGET_NAMES)
    inputs, seconds = -(-args.inputs // len(targets)), -(-args.seconds // len(targets))
    if args.in_process:
        return (_atheris if args.engine == "atheris" else _mutations)(targets[0], inputs, seconds, args.seed)
    total, started_s, failed = 0, time.monotonic(), []
    for target in targets:
        say(f"{target}: {args.engine}")
        done, elapsed_s, ok = _apart(target, args.engine, inputs, seconds, args.seed)
        total += done
        say(f"{target}: {done} inputs in {elapsed_s:.1f} s, {done / elapsed_s:.0f} inputs/s")
        if not ok:
            failed.append(target)
    took_s = time.monotonic() - started_s
    say(f"{total} inputs in {took_s:.1f} s, {total / took_s:.0f} inputs/s; {'bugs in ' + ', '.join(failed) if failed else 'no bug found'}")
    return int(bool(failed))


def _apart(target: str, engine: str, inputs: int, seconds: int, seed: int) -> tuple[int, float, bool]:
    """One target in its own process: a fuzzer ends the one it runs in."""
    amount = ["--inputs", str(inputs)] if inputs else ["--seconds", str(seconds)]
    command = [sys.executable, "-m", "tests.fuzz.run", "--in-process", "--target", target, "--engine", engine, "--seed", str(seed), *amount]
    started_s = time.monotonic()
    ran = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False)
    elapsed_s = time.monotonic() - started_s
    counts = re.findall(r"^#(\d+)\s|^Done (\d+) runs|^stat::number_of_executed_units: (\d+)", ran.stdout, re.MULTILINE)
    done = max((int(number) for found in counts for number in found if number), default=0)
    if ran.returncode:
        say(ran.stdout[-6_000:])
    return done, elapsed_s, ran.returncode == 0


def _atheris(target: str, inputs: int, seconds: int, seed: int) -> int:
    import atheris

    with atheris.instrument_imports(include=["epp"]):
        from tests.fuzz import targets
    from tests.fuzz.seeds import FOLDER

    grown, findings = tempfile.mkdtemp(prefix="fuzz-corpus-"), tempfile.mkdtemp(prefix="fuzz-findings-")
    amount = f"-runs={inputs}" if inputs else f"-max_total_time={seconds}"
    known = str(FOLDER / target)
    options = [
        f"-max_len={LEN_MAX}",
        f"-seed={seed}",
        f"-artifact_prefix={findings}/",
        "-print_final_stats=1",
        "-timeout=20",
        "-rss_limit_mb=4096",
    ]
    atheris.Setup([sys.argv[0], grown, known, amount, *options], targets.TARGETS[target])
    with targets.loud():
        atheris.Fuzz()
    return 0


def _mutations(target: str, inputs: int, seconds: int, seed: int) -> int:
    from tests.fuzz import targets
    from tests.fuzz.mutate import mutations
    from tests.fuzz.seeds import load

    feed, deadline_s, done = targets.TARGETS[target], time.monotonic() + seconds, 0
    with targets.loud():
        for data in mutations(load(target), random.Random(seed)):
            if done == inputs if inputs else done % 100 == 0 and time.monotonic() > deadline_s:
                break
            try:
                feed(data)
            except Exception:  # noqa: BLE001 - whatever it is, it is a finding
                with tempfile.NamedTemporaryFile(prefix="fuzz-finding-", delete=False) as found:
                    found.write(data)
                traceback.print_exc()
                say(f"#{done} \nthe input is in {Path(found.name)}")
                return 1
            done += 1
    say(f"Done {done} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
