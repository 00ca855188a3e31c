"""`python -m bench COMMAND`.

A command is a module of this package with `DESCRIPTION`, `configure(parser)` and `run(args) -> exit code`. Only the module of the
named command is imported, so that a server started from here carries nothing of the others.
"""

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence

from bench import BenchError

COMMANDS = {
    "decide": "time of one decision, by endpoints and prompt tokens, in this process",
    "overhead": "CPU of one request through `epp serve`, beside a bare gRPC echo server in the same run",
    "kv-events": "reading engines' KV-cache events: blocks a second, memory, and decisions meanwhile",
    "scrape": "CPU of reading the engines' metrics, and the age of readings, by endpoints",
    "replay": "what policies do to latency, in virtual time: the product's own scheduling against the field's",
    "compare": "two files of replay, side by side",
    "load": "open-loop load for any ext_proc picker: how long decisions take, at a rate it cannot slow down",
    "flow": "flow control: CPU of one request queued and let through, and memory of one that waits, by requests queued",
    "live": "what policies do to latency, with real processes: simulated engines behind Envoy and the picker, and other routers",
    "echo": "the baseline by itself: an ext_proc server on grpc.aio that echoes and picks nothing",
    "metrics-stub": "model servers that only serve /metrics, for the picker to scrape",
}
EPILOG = """\
examples:
  python -m bench overhead                               the whole table, about two minutes
  python -m bench overhead --quick                       does it run at all: seconds, figures are rough
  python -m bench overhead --json out.json --check       for a machine: rows in a file, exit code 1 if a target is missed
  python -m bench overhead --prompt-kb 16 --chunks 1     one case only
  python -m bench COMMAND --help                         every option of a command

exit code: 0 measured; 1 measured, and --check found a missed target; 2 could not be measured
"""


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure the endpoint picker.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == chosen:
            module = importlib.import_module(f"bench.{name.replace('-', '_')}")
            command.description = module.DESCRIPTION
            module.configure(command)
            command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str]) -> int:
    try:
        args = _parser(argv[0] if argv else None).parse_args(argv)
        code: int = args.run(args)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: leave no server behind
    sys.exit(main(sys.argv[1:]))
