"""The programs under test as processes of their own: started, awaited, watched and stopped by pid.

A program's output is kept and shown when anything about it goes wrong. It is told to stop with a signal it can handle, so that it ends
as it does in production (and coverage gets its data); only one that does not end in time is killed, and that fails the test.

Every wait has a deadline. The deadlines are generous, for nothing here measures speed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from epp.types import Address

START_S = 30.0
STOP_S = 30.0
GONE_S = 10.0
POLL_S = 0.02
LOOPBACK = "127.0.0.1"
ECHO_ENGINE = Path(__file__).with_name("echo_engine.py")

_PORTS = range(15_000, 32_000)
"""Below the range a connection's own end is taken from: a port chosen now is not taken by somebody's connection a moment later."""


def free_port() -> int:
    while True:
        port = random.choice(_PORTS)
        with socket.socket() as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            return port


def free_address() -> Address:
    return Address(LOOPBACK, free_port())


class Program:
    """`with Program(...)` runs it for the length of the block. Output goes to a file: nobody has to read it for it to go on."""

    stop_signal = signal.SIGTERM

    def __init__(self, *arguments: str, command: tuple[str, ...] = (sys.executable, "-m", "epp")) -> None:
        self.arguments = (*command, *arguments)
        self._process: subprocess.Popen[bytes] | None = None
        self._out = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the program runs; __exit__ closes it
        self._err = tempfile.TemporaryFile()  # noqa: SIM115 - the same
        self._offspring: dict[int, str] = {}

    def __repr__(self) -> str:
        return f"$ {' '.join(self.arguments)}\n--- stdout\n{self.stdout}\n--- stderr\n{self.stderr}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            self._out.close()
            self._err.close()

    def start(self) -> None:
        self._process = subprocess.Popen(self.arguments, stdin=subprocess.DEVNULL, stdout=self._out, stderr=self._err)
        try:
            self.await_ready()
        except BaseException:  # also a test that is interrupted: no process outlives it
            self._kill()
            raise

    def await_ready(self) -> None:
        """Returns once it serves."""

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "start() first"
        return self._process

    @property
    def stdout(self) -> str:
        return _content(self._out)

    @property
    def stderr(self) -> str:
        return _content(self._err)

    def await_output(self, pattern: str, *, count: int = 1) -> list[re.Match[str]]:
        """The first `count` matches in stdout and stderr, once there are so many."""
        deadline = time.monotonic() + START_S
        while True:
            ended = self.process.poll() is not None
            found = list(re.finditer(pattern, self.stdout + self.stderr, re.MULTILINE))
            if len(found) >= count:
                return found[:count]
            assert not ended, f"exit code {self.process.returncode} before {pattern!r}\n{self!r}"
            assert time.monotonic() < deadline, f"no {pattern!r} within {START_S:g} s\n{self!r}"
            time.sleep(POLL_S)

    def signal(self, number: signal.Signals) -> None:
        self._offspring |= descendants(self.process.pid)
        self.process.send_signal(number)

    def wait(self, timeout_s: float = STOP_S) -> int:
        """The exit code; that nothing of it is left is asserted too."""
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            report = repr(self)
            self._kill()
            raise AssertionError(f"did not end within {timeout_s:g} s\n{report}") from None
        offspring, self._offspring = self._offspring, {}
        await_gone(offspring)
        return code

    def stop(self) -> int:
        """The exit code; what it was if it had ended before."""
        if self._process is None:
            return 0
        if self._process.poll() is None:
            self.signal(self.stop_signal)
        code = self.wait()
        assert "Traceback" not in self.stderr, repr(self)
        return code

    def kill(self) -> None:
        """As a crash does it."""
        self.process.kill()
        self.process.wait()

    def _kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()


class Engines(Program):
    """`count` simulated engines in one process, each on a port of its own (or one, on `port`)."""

    def __init__(self, *flags: str, count: int = 1, port: int = 0) -> None:
        super().__init__("sim", "--count", str(count), "--port", str(port), *flags)
        self.count = count
        self.addresses: tuple[Address, ...] = ()

    def await_ready(self) -> None:
        found = self.await_output(r"^engine listening on http://(\S+)$", count=self.count)
        self.addresses = tuple(Address.parse(match[1]) for match in found)

    @property
    def address(self) -> Address:
        return self.addresses[0]


class EchoEngine(Program):
    """See echo_engine.py."""

    def __init__(self) -> None:
        super().__init__(command=(sys.executable, str(ECHO_ENGINE)))
        self.address = Address(LOOPBACK, 0)

    def await_ready(self) -> None:
        (found,) = self.await_output(r"^listening on (\S+)$")
        self.address = Address.parse(found[1])


class Gateway(Program):
    """`epp up`: the picker and Envoy in front of `endpoints`."""

    def __init__(self, endpoints: tuple[Address, ...], *flags: str) -> None:
        self.address = free_address()
        self.metrics = free_address()
        self.admin = free_address()
        chosen = [part for endpoint in endpoints for part in ("--endpoint", str(endpoint))]
        super().__init__(
            "up", *chosen, "--listen", str(self.address), "--metrics-port", str(self.metrics.port), "--admin-port", str(self.admin.port),
            *flags,
        )  # fmt: skip

    def await_ready(self) -> None:
        self.await_output(rf"^ready: http://{self.address}/v1 in front of \d+ endpoints?")


class Picker(Program):
    """`epp serve` on ports of its own choosing. It does not drain unless a test says so."""

    def __init__(self, endpoints: tuple[Address, ...], *flags: str) -> None:
        chosen = [part for endpoint in endpoints for part in ("--endpoint", str(endpoint))]
        ports = ("--grpc-port", "0", "--grpc-health-port", "0", "--metrics-port", "0")
        super().__init__("serve", *chosen, "--bind-address", LOOPBACK, *ports, "--drain-timeout", "0", *flags)
        self.epp = self.health = self.metrics = Address(LOOPBACK, 0)

    def await_ready(self) -> None:
        (found,) = self.await_output(r'^\{.*"msg":"serving".*\}$')
        line: dict[str, Any] = json.loads(found[0])
        self.epp = Address(LOOPBACK, line["grpc_port"])
        self.health = Address(LOOPBACK, line["grpc_health_port"])
        self.metrics = Address(LOOPBACK, line["metrics_port"])


def _content(file: Any) -> str:
    with contextlib.suppress(ValueError):  # closed: its program has ended
        size = os.fstat(file.fileno()).st_size
        return os.pread(file.fileno(), size, 0).decode(errors="replace")  # the position belongs to the program
    return "(closed)"


def _processes() -> Iterator[tuple[int, int, str, str]]:
    """pid, parent, state and name of every process there is."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                head, _, tail = (entry / "stat").read_text(errors="replace").rpartition(")")
                state, parent = tail.split()[:2]
                yield int(entry.name), int(parent), state, head.partition("(")[2]


def descendants(pid: int) -> dict[int, str]:
    """pid -> name of what this process started, and what that started; without those that ended."""
    children: dict[int, list[tuple[int, str]]] = {}
    for child, parent, state, name in _processes():
        if state != "Z":
            children.setdefault(parent, []).append((child, name))
    found: dict[int, str] = {}
    waiting = [pid]
    while waiting:
        for child, name in children.get(waiting.pop(), ()):
            found[child] = name
            waiting.append(child)
    return found


def await_gone(pids: dict[int, str]) -> None:
    """Asserts that these processes end."""
    deadline = time.monotonic() + GONE_S
    while left := {pid: name for pid, _, state, name in _processes() if pids.get(pid) == name and state != "Z"}:
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(POLL_S)
