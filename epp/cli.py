"""argv -> options -> exit code; no logic. Exit codes: 0 done, 1 it failed, 2 wrong usage or configuration, 130 Ctrl-C."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches

from epp import __version__
from epp.config.options import add_picker_arguments, add_serve_arguments, ignored_flags, port, serve_options
from epp.demo import add_demo_arguments
from epp.doctor import DESCRIPTION as DOCTOR
from epp.doctor import add_doctor_arguments
from epp.envoy import add_envoy_arguments
from epp.errors import ConfigError, StartError
from epp.explain import DESCRIPTION as EXPLAIN
from epp.explain import add_explain_arguments
from epp.observe import logs
from epp.offline import add_config_arguments
from epp.sim.options import add_sim_arguments

_OWN_FLAGS = frozenset({"-h", "--help", "--version"})
"""Of `epp` itself, without a command."""
DESCRIPTION = "Which model server should take this prompt? An Envoy ext_proc endpoint picker for LLM inference."


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="epp", description=DESCRIPTION)
    top.add_argument("--version", action="version", version=f"epp {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    serve = commands.add_parser(
        "serve",
        allow_abbrev=False,  # as Go's flags: a later flag would make a prefix ambiguous
        help="the picker alone, for a gateway that exists or a load generator",
        description="Serve ext_proc for an existing gateway. Example: epp serve --endpoint 10.0.0.5:8000 --endpoint 10.0.0.6:8000",
    )
    add_serve_arguments(serve)
    serve.set_defaults(run=_serve, parser=serve)

    up = commands.add_parser(
        "up",
        help="picker and Envoy in front of engines that exist, on this machine",
        description="Start the picker and a real Envoy. Example: epp up --endpoint 127.0.0.1:8000 --endpoint 127.0.0.1:8001 --listen :8080",
    )
    _add_up_arguments(up)
    up.set_defaults(run=_up, parser=up)

    envoy_config = commands.add_parser(
        "envoy-config",
        help="print the Envoy configuration `epp up` would run",
        description="Print (and with --validate check) the Envoy bootstrap for these endpoints.",
    )
    _add_up_arguments(envoy_config)
    envoy_config.add_argument("--epp", default="127.0.0.1:9002", metavar="HOST:PORT",
        help="where the picker serves, in plaintext: epp serve --secure-serving=false (default: %(default)s)")  # fmt: skip
    envoy_config.add_argument("--validate", action="store_true", help="let Envoy check it before it is printed")
    envoy_config.set_defaults(run=_envoy_config, parser=envoy_config)

    explain = commands.add_parser(
        "explain",
        help="why would this request go where?",
        description=EXPLAIN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_explain_arguments(explain)
    explain.set_defaults(run=_explain, parser=explain)

    doctor = commands.add_parser(
        "doctor",
        help="what is wrong with this picker, gateway or cluster?",
        description=DOCTOR,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_doctor_arguments(doctor)
    doctor.set_defaults(run=_doctor, parser=doctor)

    check = commands.add_parser(
        "check", help="is this EndpointPickerConfig right?", description="Check a configuration; every fault is listed with its path."
    )
    add_config_arguments(check, optional=False)
    check.set_defaults(run=_offline("check"), parser=check)

    config = commands.add_parser("config", help="the effective configuration").add_subparsers(dest="what", required=True, metavar="COMMAND")
    shown = config.add_parser(
        "print",
        help="with every default filled in",
        description="Print a configuration as it takes effect: defaults filled in, passwords left out.",
    )
    add_config_arguments(shown, optional=True)
    shown.set_defaults(run=_offline("print_config"), parser=shown)

    plugins = commands.add_parser("plugins", help="what there is to configure").add_subparsers(
        dest="what", required=True, metavar="COMMAND"
    )
    every = plugins.add_parser("list", help="every plugin type")
    every.set_defaults(run=_offline("list_plugins"), parser=every)
    one = plugins.add_parser("show", help="one type: its formula, parameters and defaults")
    one.add_argument("type", metavar="TYPE", help="a plugin type, or MODULE:CLASS")
    one.set_defaults(run=_offline("show_plugin"), parser=one)

    sim = commands.add_parser("sim", help="simulated model servers: vLLM's API and metrics, no GPU", description="Serve simulated engines.")
    add_sim_arguments(sim)
    sim.set_defaults(run=_sim, parser=sim)

    demo = commands.add_parser(
        "demo",
        help="see it work: simulated engines, the picker and Envoy under load",
        description="The whole thing on one machine, in a minute.",
    )
    add_demo_arguments(demo)
    demo.set_defaults(run=_demo, parser=demo)
    return top


def with_command(argv: Sequence[str]) -> Sequence[str]:
    """Flags without a command are those of `epp serve`: manifests of the reference picker give its image nothing else."""
    return ("serve", *argv) if argv and argv[0].startswith("-") and argv[0] not in _OWN_FLAGS else argv


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """Exits with 2, as argparse does, but names the command and what a flag there is none of may have been meant for."""
    args, unknown = parser().parse_known_args(with_command(argv))
    if unknown:
        command: argparse.ArgumentParser = args.parser
        flags = [flag for flag in command._option_string_actions if flag.startswith("--")]  # noqa: SLF001 - there is no public way
        near = get_close_matches(unknown[0].partition("=")[0], flags, n=1)
        command.error(f"unrecognized arguments: {' '.join(unknown)}" + (f"; did you mean {near[0]}?" if near else ""))
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parsed(sys.argv[1:] if argv is None else argv)
    if "verbosity" in args:
        logs.setup(verbosity=args.verbosity, encoder=args.zap_encoder)
    try:
        code = args.run(args)
    except ConfigError as error:
        print(f"epp: {error}", file=sys.stderr)
        return 2
    except StartError as error:
        print(f"epp: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output left: `epp plugins list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    assert isinstance(code, int)
    return code


def _add_up_arguments(command: argparse.ArgumentParser) -> None:
    command.usage = f"{command.prog} [OPTION ...]"  # all of them would be a page before every error
    add_picker_arguments(command)
    add_envoy_arguments(command)
    command.add_argument("--metrics-port", type=port, default=9090, metavar="PORT", help="the picker's /metrics (default: %(default)s)")


def _serve(args: argparse.Namespace) -> int:
    from epp.app import serve
    from epp.process import run

    options = serve_options(args)
    for warning in ignored_flags(args):
        logging.getLogger("epp.config").warning(warning)
    return run(lambda: serve(options))


def _up(args: argparse.Namespace) -> int:
    from epp.process import run
    from epp.up import up

    return run(lambda: up(args))


def _envoy_config(args: argparse.Namespace) -> int:
    from epp.process import run
    from epp.up import print_envoy_config

    return run(lambda: print_envoy_config(args))


def _explain(args: argparse.Namespace) -> int:
    from epp.explain import explain

    return explain(args)


def _doctor(args: argparse.Namespace) -> int:
    from epp.doctor.runner import run_doctor
    from epp.process import run

    return run(lambda: run_doctor(args))


def _offline(command: str) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        from epp import offline

        return int(getattr(offline, command)(args))

    return run


def _sim(args: argparse.Namespace) -> int:
    from epp.process import run
    from epp.sim.options import sim_options
    from epp.sim.server import serve_engines

    options = sim_options(args)
    return run(lambda: serve_engines(options))


def _demo(args: argparse.Namespace) -> int:
    from epp.demo.runner import run_demo
    from epp.process import run

    return run(lambda: run_demo(args))
