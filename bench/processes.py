"""Servers under measurement, as child processes: started, waited for, and stopped by their own pid."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from bench import BenchError

ROOT = Path(__file__).resolve().parent.parent
STOP_S = 10.0
LOG_BYTES_SHOWN = 4000
QUIET_PORTS = range(20_000, 32_000)


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def quiet_ports(count: int) -> list[int]:
    """Free ports below the range that the system takes a connection's own end from: free now is still free a moment later."""
    with contextlib.ExitStack() as stack:
        found: list[int] = []
        for port in random.sample(QUIET_PORTS, len(QUIET_PORTS)):
            probe = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                found.append(port)
            if len(found) == count:
                return found
    raise BenchError(f"no {count} free ports in {QUIET_PORTS[0]} to {QUIET_PORTS[-1]}")


class Child:
    """`python -m ...` of this checkout, or another `program`; its output goes to a file that is shown if it fails."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        announces: bool = False,
        program: Sequence[str] = (sys.executable, "-m"),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._arguments = [*program, *arguments]
        self._shown = " ".join([Path(program[-1]).name, *arguments[:2]] if program[-1] != "-m" else arguments[:3])
        self._environment = {**os.environ, **(environment or {})}
        self._announces = announces
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self._process: subprocess.Popen[bytes] | None = None
        self.announced: dict[str, object] = {}

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def check(self) -> None:
        """Raise, with the end of its output, if it has ended."""
        assert self._process is not None
        if (code := self._process.poll()) is not None:
            raise BenchError(f"{self._shown} ... ended with code {code}:\n{self.log_tail()}")

    def log_tail(self) -> str:
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - LOG_BYTES_SHOWN))
        return self._log.read().decode(errors="replace").strip()

    def __enter__(self) -> Self:
        stdout = subprocess.PIPE if self._announces else self._log
        self._process = subprocess.Popen(
            self._arguments, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=stdout, stderr=self._log, env=self._environment
        )
        if self._process.stdout is not None:
            line = self._process.stdout.readline()
            if not line:
                self._process.wait()
                try:
                    self.check()
                finally:
                    self._close()
            self.announced = json.loads(line)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._close()

    def _close(self) -> None:
        if self._process is not None and self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()
