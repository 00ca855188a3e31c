"""How the programs start and stop: one clear line when they can't, nothing lost and nobody left behind when they do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import grpc.aio
import pytest
from http_clients import TIMEOUT_S, Http1, TruncatedError, ask, chat, eventually, scrape
from programs import LOOPBACK, Engines, Gateway, Picker, Program, descendants, free_address, free_port

from epp.envoy import EnvoyOptions
from epp.envoy.supervisor import EnvoyProcess
from epp.extproc.health import EXT_PROC_SERVICE, LIVENESS, check_request, is_serving
from epp.types import Address

pytestmark = pytest.mark.e2e

CHAT = "/v1/chat/completions"
DRAIN_S = 2.0
TOKENS = 500
"""Four seconds of stream: longer than the drain, so that it outlives the listener too."""


@contextlib.asynccontextmanager
async def envoy_before(picker: Picker, engines: Engines) -> AsyncIterator[Address]:
    options = EnvoyOptions(listen=free_address(), endpoints=engines.addresses, epp=picker.epp, epp_tls=True, concurrency=1)
    async with EnvoyProcess(options):
        yield options.listen


async def healthy(address: Address, service: str) -> bool:
    """What grpc.health.v1 says there."""
    async with grpc.aio.insecure_channel(str(address)) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        return is_serving(await check(check_request(service), timeout=TIMEOUT_S))


async def until_draining(picker: Picker) -> None:
    async def draining() -> bool:
        return not await healthy(picker.health, "readiness")

    await eventually(draining, "readiness NOT_SERVING")


# --- stopping


@pytest.mark.parametrize("transport", ["h2", "grpc"])
async def test_sigterm_drains_and_a_stream_in_flight_completes(engines: Engines, transport: str) -> None:
    with Picker(engines.addresses, "--drain-timeout", f"{DRAIN_S:g}s", "--transport", transport) as picker:
        async with envoy_before(picker, engines) as gateway, Http1(gateway) as client, asyncio.timeout(2 * TIMEOUT_S):
            assert await healthy(picker.health, "readiness")
            await client.send("POST", CHAT, chat("A story, please", max_tokens=TOKENS, stream=True))
            assert await client.head() == 200
            pieces = client.pieces()
            body = await anext(pieces)

            picker.signal(signal.SIGTERM)
            await until_draining(picker)
            for service in ("", EXT_PROC_SERVICE, "inference-extension", LIVENESS):
                assert not await healthy(picker.health, service)
            assert (await ask(gateway, CHAT, chat("a new one, while it drains"))).status == 200
            assert picker.process.poll() is None

            async for piece in pieces:
                body += piece
            assert body.endswith(b"data: [DONE]\n\n")
            assert body.count(b"data: ") >= TOKENS
            assert await asyncio.to_thread(picker.wait) == 0


async def test_a_second_signal_ends_the_drain(engines: Engines) -> None:
    with Picker(engines.addresses, "--drain-timeout", "1h") as picker:
        picker.signal(signal.SIGTERM)
        await until_draining(picker)
        picker.signal(signal.SIGTERM)
        assert await asyncio.to_thread(picker.wait) == 0


async def test_sigint_does_not_drain(engines: Engines) -> None:
    with Picker(engines.addresses, "--drain-timeout", "1h") as picker:
        picker.signal(signal.SIGINT)
        assert await asyncio.to_thread(picker.wait) == 130


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
async def test_epp_up_stops_envoy_too(engines: Engines, number: signal.Signals, code: int) -> None:
    with Gateway(engines.addresses) as gateway:
        assert "envoy" in descendants(gateway.process.pid).values()
        assert (await ask(gateway.address, "/v1/models")).status == 200
        gateway.signal(number)
        assert await asyncio.to_thread(gateway.wait) == code  # that nothing of it is left is asserted there
        with pytest.raises(ConnectionError):
            await ask(gateway.address, "/v1/models")


async def test_epp_up_stops_with_a_stream_in_flight(engines: Engines) -> None:
    """It is told to stop by a person: the stream ends with it, and it does not wait for the stream's end, ten times as far."""
    with Gateway(engines.addresses) as gateway:
        async with Http1(gateway.address) as client, asyncio.timeout(TIMEOUT_S):
            await client.send("POST", CHAT, chat("Endless", max_tokens=20_000, stream=True))
            assert await client.head() == 200
            gateway.signal(signal.SIGINT)
            assert await asyncio.to_thread(gateway.wait) == 130
            with pytest.raises(TruncatedError):
                await client.rest()


async def test_epp_up_says_so_when_envoy_dies(engines: Engines) -> None:
    with Gateway(engines.addresses) as gateway:
        (envoy,) = (pid for pid, name in descendants(gateway.process.pid).items() if name == "envoy")
        os.kill(envoy, signal.SIGKILL)
        assert await asyncio.to_thread(gateway.wait) == 1
        assert complaints(gateway)[0] == "epp: Envoy ended by itself"


async def test_envoy_does_not_outlive_a_killed_epp_up(engines: Engines) -> None:
    with Gateway(engines.addresses) as gateway:
        gateway.signal(signal.SIGKILL)
        assert await asyncio.to_thread(gateway.wait) == -signal.SIGKILL


async def test_a_restarted_picker_is_used_at_once(engines: Engines) -> None:
    """Envoy finds it again on the same port: a rollout of one replica is a moment of 500s, not an outage."""
    port = ("--grpc-port", str(free_port()))
    with Picker(engines.addresses, *port) as first:
        async with envoy_before(first, engines) as gateway:
            assert (await ask(gateway, "/v1/models")).status == 200
            assert await asyncio.to_thread(first.stop) == 0
            assert (await ask(gateway, "/v1/models")).status == 500
            with Picker(engines.addresses, *port):

                async def served() -> bool:
                    return (await ask(gateway, "/v1/models")).status == 200

                await eventually(served, "requests are served again")


# --- not starting


class Refusal(Program):
    """A command that is expected to end by itself, with a complaint."""

    def await_ready(self) -> None:
        self.code = self.wait()


LOG_LINE = re.compile(r"\{|[IWEF]\d{4} ")
"""Ours, or one of grpcio's own."""


def complaints(program: Program) -> list[str]:
    """What it says that is no line of log."""
    return [line for line in program.stderr.splitlines() if line and not LOG_LINE.match(line)]


@pytest.fixture
def taken() -> Iterator[int]:
    """A port somebody listens on."""
    with socket.socket() as somebody:
        somebody.bind((LOOPBACK, 0))
        somebody.listen()
        yield somebody.getsockname()[1]


@dataclass(frozen=True)
class Command:
    """A command line with room for a port."""

    command: str
    port_flag: str
    more: tuple[str, ...] = ()

    def arguments(self, endpoint: Address, port: int) -> list[str]:
        flags = {"--endpoint": str(endpoint)}
        if self.command == "serve":
            flags |= {"--bind-address": LOOPBACK, "--grpc-port": "0", "--grpc-health-port": "0", "--metrics-port": "0"}
        else:
            flags |= {"--listen": str(free_address()), "--metrics-port": "0"}
        flags[self.port_flag] = f"{LOOPBACK}:{port}" if self.port_flag == "--listen" else str(port)
        return [self.command, *(part for flag in flags.items() for part in flag), *self.more]


@pytest.mark.parametrize(
    "command",
    [
        Command("serve", "--grpc-port"),
        Command("serve", "--grpc-port", ("--transport", "grpc")),
        Command("serve", "--grpc-health-port"),
        Command("serve", "--metrics-port"),
        Command("up", "--metrics-port"),
        Command("up", "--listen"),
        Command("up", "--admin-port"),
    ],
    ids=lambda command: " ".join((command.command, command.port_flag, *command.more)),
)
def test_a_port_in_use_is_one_clear_line(engines: Engines, taken: int, command: Command) -> None:
    with Refusal(*command.arguments(engines.address, taken)) as program:
        assert program.code == 1, program
        (line,) = complaints(program)
        assert line.startswith("epp: ")
        assert str(taken) in line
        assert "in use" in line


CONFIG = """
apiVersion: inference.networking.x-k8s.io/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: queue-scorerr
- type: prefix-cache-scorer
  parameters: {nonsense: 1}
schedulingProfiles:
- name: default
  plugins:
  - pluginRef: missing
  - pluginRef: prefix-cache-scorer
    weight: heavy
surprise: true
"""
PROBLEM_PATHS = (
    "plugins[0].type",
    "plugins[1].parameters.nonsense",
    "schedulingProfiles[0].plugins[0].pluginRef",
    "schedulingProfiles[0].plugins[1].weight",
    "surprise",
)


@pytest.mark.parametrize("command", ["serve", "up"])
def test_a_wrong_configuration_is_told_with_every_problem_and_its_path(command: str) -> None:
    with Refusal(command, "--endpoint", "127.0.0.1:9", "--config-text", CONFIG) as program:
        assert program.code == 2, program
        first, *problems = complaints(program)
        assert first == f"epp: --config-text: {len(PROBLEM_PATHS)} problems"
        assert sorted(problem.strip().partition(": ")[0] for problem in problems) == sorted(PROBLEM_PATHS)
        assert all(problem.partition(": ")[2] for problem in problems)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["serve"], "--endpoint"),
        (["up", "--endpoint", "localhost:8000"], "localhost"),
        (["up", "--endpoint", "127.0.0.1:1", "--endpoint", "127.0.0.1:1"], "127.0.0.1:1"),
        (["serve", "--endpoint", "127.0.0.1:1", "--drain-timeout", "soon"], "soon"),
        (["serve", "--endpoint", "127.0.0.1:1", "--config-file", "/does/not/exist"], "/does/not/exist"),
        (["serve", "--endpoints-file", "/does/not/exist"], "/does/not/exist"),
        (["serve", "--endpoint", "127.0.0.1:1", "--endpoints-file", "/does/not/exist"], "--endpoints-file"),
        (["frobnicate"], "frobnicate"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_wrong_command_line_names_what_is_wrong(flags: list[str], said: str) -> None:
    with Refusal(*flags) as program:
        assert program.code == 2, program
        assert said in program.stderr


def test_a_missing_certificate_is_one_clear_line(engines: Engines) -> None:
    with Refusal("serve", "--endpoint", str(engines.address), "--cert-path", "/does/not/exist") as program:
        assert program.code == 1, program
        (line,) = complaints(program)
        assert "/does/not/exist" in line


async def test_a_wrong_endpoint_does_not_stop_the_start(engines: Engines) -> None:
    """Engines come up after the picker all the time."""
    nobody = free_address()
    with Picker((engines.address, nobody)) as picker:
        samples = await scrape(picker.metrics)
        assert samples.sum("llm_d_epp_ready_endpoints") == 1
