"""The parts under test as processes of their own: engines, picker, Envoy, each told to use any free port.

They start in the order of who needs whom and stop in the reverse order. None outlives this process (envoy.supervisor.lifeline), and
one that ends by itself ends the demo with what it said last.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from epp.demo import DemoOptions
from epp.envoy import EnvoyOptions
from epp.envoy.supervisor import EnvoyProcess, end, lifeline
from epp.errors import StartError
from epp.types import Address

LOOPBACK = "127.0.0.1"
READY_S = 20.0
STOP_GRACE_S = 3.0
LINES_KEPT = 20
LINE_BYTES_MAX = 1 << 16
REPORTED_LINES = 8
TOKENS_PER_CHUNK = 16
"""Of a streamed answer: the demo is about first tokens, and small chunks would make CPU the bottleneck."""

_ENVOY_PORTS = range(20_000, 32_000)
"""Below the range the system takes a connection's own end from: free now is still free a moment later."""

_ENGINE_LISTENS = re.compile(r"listening on http://(\S+)")
_PICKER_SERVES = re.compile(r'"msg":"serving"')
_GRPC_PORT = re.compile(r'"grpc_port":(\d+)')
_METRICS_PORT = re.compile(r'"metrics_port":(\d+)')


class Parts(NamedTuple):
    """Everything up and where it is."""

    engines: dict[str, Address]
    """Name, as the picker knows it -> address."""
    picker_metrics: Address
    through_picker: Address
    through_round_robin: Address


class Part(Protocol):
    """Something that runs until it is stopped."""

    @property
    def last_error(self) -> str: ...

    async def wait(self) -> int:
        """Its exit status, once it has ended."""
        ...


class Child:
    """`python -m epp ...` as a child process; what it prints is kept for the last words and to find out when it is ready."""

    def __init__(self, name: str, arguments: Sequence[str]) -> None:
        self.name = name
        self._command = [sys.executable, "-m", "epp", *arguments]
        self._lines: deque[str] = deque(maxlen=LINES_KEPT)
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"<Child {self.name} pid={self._process.pid if self._process else None}>"

    @property
    def last_error(self) -> str:
        return "\n".join(list(self._lines)[-REPORTED_LINES:])

    async def start(self, ready: re.Pattern[str], count: int = 1) -> list[str]:
        """Returns the first `count` lines `ready` is found in. Raises StartError if the child ends or takes too long before."""
        self._process = await asyncio.create_subprocess_exec(
            *lifeline(self._command),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=LINE_BYTES_MAX,
            start_new_session=True,  # Ctrl-C in a terminal is for the demo, which stops its parts in order
        )
        try:
            async with asyncio.timeout(READY_S):
                found = await self._until(self._process, ready, count)
        except TimeoutError:
            await end(self._process, 0)
            raise StartError(f"the {self.name} was not ready within {READY_S:g} s\n{self.last_error}".rstrip()) from None
        except BaseException:  # also when cancelled: what was started must not outlive this
            await end(self._process, 0)
            raise
        self._reader = asyncio.create_task(self._read(self._process))
        return found

    async def wait(self) -> int:
        """Its exit status, once it has ended."""
        assert self._process is not None
        return await self._process.wait()

    async def stop(self) -> None:
        if self._process is not None and self._reader is not None:
            await end(self._process, STOP_GRACE_S)
            await self._reader

    async def _until(self, process: asyncio.subprocess.Process, ready: re.Pattern[str], count: int) -> list[str]:
        found: list[str] = []
        while len(found) < count:
            line = await self._line(process)
            if line is None:
                raise StartError(f"the {self.name} ended at once\n{self.last_error}".rstrip())
            if ready.search(line):
                found.append(line)
        return found

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        while await self._line(process) is not None:
            pass

    async def _line(self, process: asyncio.subprocess.Process) -> str | None:
        assert process.stdout is not None
        while True:
            try:
                raw = await process.stdout.readline()
            except ValueError:  # longer than LINE_BYTES_MAX: dropped
                continue
            if not raw:
                return None
            self._lines.append(raw.decode(errors="replace").rstrip())
            return self._lines[-1]


@contextlib.asynccontextmanager
async def running(options: DemoOptions, *, kv_blocks: int, say: Callable[[str], None]) -> AsyncIterator[Parts]:
    """Starts all of it; the block is cancelled, and StartError raised, if a part ends before the block does."""
    async with contextlib.AsyncExitStack() as stack:
        say(f"starting {options.engines} simulated engines ...")
        engines = Child("engines' process", _sim_arguments(options, kv_blocks))
        stack.push_async_callback(engines.stop)
        lines = await engines.start(_ENGINE_LISTENS, options.engines)
        addresses = [Address.parse(match[1]) for line in lines if (match := _ENGINE_LISTENS.search(line))]
        named = {f"engine-{number}": address for number, address in enumerate(addresses, 1)}

        say("starting the picker ...")
        picker = Child("picker", _serve_arguments(options, named))
        stack.push_async_callback(picker.stop)
        (ready,) = await picker.start(_PICKER_SERVES)

        say("starting Envoy ...")
        gateway, baseline = _free_addresses(2)
        envoy = EnvoyProcess(
            EnvoyOptions(
                listen=gateway,
                round_robin_listen=baseline,
                endpoints=tuple(addresses),
                epp=Address(LOOPBACK, _port(_GRPC_PORT, ready)),
                epp_tls=False,
                concurrency=1,  # leaves a core to the rest on small machines, and makes round robin one turn for all
                envoy_path=options.envoy_path,
            ),
            on_log=lambda _line: None,
        )
        await stack.enter_async_context(envoy)

        parts = Parts(named, Address(LOOPBACK, _port(_METRICS_PORT, ready)), gateway, baseline)
        async with watched({engines.name: engines, picker.name: picker, "Envoy process": envoy}):
            yield parts


@contextlib.asynccontextmanager
async def watched(parts: Mapping[str, Part]) -> AsyncIterator[None]:
    """Cancels the block, and raises StartError, if one of the parts ends before the block does."""
    try:
        async with asyncio.TaskGroup() as group:
            watchers = [group.create_task(_must_not_end(name, part)) for name, part in parts.items()]
            yield
            for watcher in watchers:
                watcher.cancel()
    except BaseExceptionGroup as failed:
        if len(failed.exceptions) == 1:  # the block's own error, or the first part to end
            raise failed.exceptions[0] from None
        raise


async def _must_not_end(name: str, part: Part) -> None:
    status = await part.wait()
    raise StartError(f"the {name} ended by itself (exit {status})\n{part.last_error}".rstrip())


def _sim_arguments(options: DemoOptions, kv_blocks: int) -> list[str]:
    flags = {
        "--host": LOOPBACK,
        "--port": 0,
        "--count": options.engines,
        "--time-scale": options.time_scale,
        "--tokens-per-chunk": TOKENS_PER_CHUNK,
        "--kv-blocks": kv_blocks,
        "--seed": abs(options.seed),
    }
    return ["sim", *(f"{flag}={value}" for flag, value in flags.items())]


def _serve_arguments(options: DemoOptions, engines: dict[str, Address]) -> list[str]:
    ports = [f"--{port}-port=0" for port in ("grpc", "grpc-health", "metrics")]
    endpoints = [f"--endpoint={name}={address}" for name, address in engines.items()]
    rest = [f"--bind-address={LOOPBACK}", "--secure-serving=false", f"--transport={options.transport}", "--drain-timeout=0"]
    return ["serve", *endpoints, *ports, *rest, "--zap-encoder=json"]


def _port(pattern: re.Pattern[str], line: str) -> int:
    match = pattern.search(line)
    if match is None:
        raise StartError(f"the picker did not say its ports: {line}")
    return int(match[1])


def _free_addresses(count: int) -> list[Address]:
    """Envoy must be told its ports: two that nobody listens on, held together here so that they differ."""
    with contextlib.ExitStack() as stack:
        found: list[Address] = []
        for port in random.sample(_ENVOY_PORTS, len(_ENVOY_PORTS)):
            probe = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                probe.bind((LOOPBACK, port))
                found.append(Address(LOOPBACK, port))
            if len(found) == count:
                return found
    raise StartError(f"no {count} free ports in {_ENVOY_PORTS[0]} to {_ENVOY_PORTS[-1]}")
