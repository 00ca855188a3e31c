"""What is compared: a policy and the processes that carry it out, in front of simulated engines of its own.

- our picker, by configuration file: `epp serve` behind a real Envoy;
- round robin: the same Envoy's, without a picker;
- a peer: a router from PyPI, which is gateway and policy in one, in the place of Envoy and picker. Never installed from here. Dynamo's
  `select_service` is a policy alone: `dynamo_shim` is its gateway.

Every side has N engines in a process of their own (engines.py: `epp sim` and a route more), so that no cache remembers another side. All is
on free ports, on loopback where the program has a choice, and stopped by its pid; none outlives this process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import aiohttp

from bench import BenchError
from bench.processes import Child as Program
from bench.processes import quiet_ports
from bench.replay.cells import CONFIGS
from epp.errors import StartError
from epp.sim.options import MODEL_DEFAULT, add_sim_arguments, sim_options
from epp.types import Address

try:
    from epp.demo.processes import Child, Part, watched
    from epp.envoy import EnvoyOptions
    from epp.envoy.supervisor import EnvoyProcess, lifeline
except StartError as error:  # without the [envoy] extra
    raise BenchError(str(error)) from None

LOOPBACK = "127.0.0.1"
MODEL = MODEL_DEFAULT
ROUND_ROBIN = "round-robin"
READY_S = 40.0
POLL_S = 0.2
SCRAPE_MS = 50
SCRAPE_LEAST_MS = 10
TOKENS_PER_CHUNK = 16
_SERVES = re.compile(r'"msg":"serving"')
_GRPC_PORT = re.compile(r'"grpc_port":(\d+)')


class Peer(NamedTuple):
    """How a router from PyPI is started."""

    package: str
    """What `pip install` is given."""
    module: str
    """Run with `python -m` when the named program is a Python; empty if it has a program of its own."""
    policy: str
    ready: str
    arguments: Callable[[int, int, Sequence[str], str], list[str]]
    """(port, port of its metrics, engines, policy)"""
    policies: tuple[str, ...] = ()
    """Those it can have here; none named: whatever the program takes."""
    environment: Mapping[str, str] = {}
    shim: str = ""
    """A module of ours that is its gateway, for one that forwards nothing."""
    note: str = ""
    """What is to be known before it runs."""


_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
"""A simulated model has no tokenizer to be found anywhere."""


def _vllm_router(port: int, metrics: int, engines: Sequence[str], policy: str) -> list[str]:
    listen = ["--host", LOOPBACK, "--port", str(port), "--prometheus-host", LOOPBACK, "--prometheus-port", str(metrics)]
    return [*listen, "--worker-urls", *engines, "--policy", policy]


def _smg(port: int, metrics: int, engines: Sequence[str], policy: str) -> list[str]:
    return ["launch", *_vllm_router(port, metrics, engines, policy)]


def _select_service(port: int, _metrics: int, _engines: Sequence[str], _policy: str) -> list[str]:
    return ["--port", str(port), "--threads", "1"]


PEERS = {
    "vllm-router": Peer("vllm-router", "", "cache_aware", "/health", _vllm_router),
    "smg": Peer("smg", "", "cache_aware", "/readiness", _smg),
    "sglang-router": Peer("sglang-router", "sglang_router.launch_router", "cache_aware", "/health", _vllm_router),
    "dynamo": Peer(
        "--no-deps ai-dynamo ai-dynamo-runtime && pip install pydantic",
        "dynamo.select_service",
        "approximate",
        "/health",
        _select_service,
        policies=("approximate",),
        environment={"DYN_ROUTER_USE_KV_EVENTS": "false"},  # caches are predicted from what was routed: these engines send no events
        shim="bench.live.dynamo_shim",
        note="select_service listens on all interfaces, without authentication, while it runs",
    ),
}


@dataclass(frozen=True, slots=True)
class Side:
    """One policy. `config` is our picker's file, `peer` a router and how it starts; neither is round robin."""

    name: str
    config: Path | None = None
    peer: Peer | None = None
    program: tuple[str, ...] = ()
    peer_policy: str = ""


@dataclass(frozen=True, slots=True)
class Pool:
    """What all sides have alike."""

    engines: int = 4
    speedup: float = 5.0
    kv_blocks: int = 16_384
    sim_args: tuple[str, ...] = ()
    serve_args: tuple[str, ...] = ()
    envoy_path: str | None = None


def picker_sides(text: str) -> list[Side]:
    """`NAME=FILE.yaml,...`; a name alone is a file of bench/replay/configs."""
    sides = []
    for part in filter(None, text.split(",")):
        name, _, file = part.partition("=")
        path = Path(file) if file else CONFIGS / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(each.stem for each in CONFIGS.glob("*.yaml")))
            raise BenchError(f"--policies {part}: there is no file {path}" + ("" if file else f"; by name there are {known}"))
        sides.append(Side(name, config=path.resolve()))
    return sides


def peer_sides(text: str, say: Callable[[str], None]) -> list[Side]:
    """`NAME[:POLICY][=PROGRAM],...`; one whose program is not there is left out, and `say` is told."""
    sides = []
    for part in filter(None, text.split(",")):
        wanted, _, path = part.partition("=")
        name, _, policy = wanted.partition(":")
        peer = PEERS.get(name)
        if peer is None:
            raise BenchError(f"--peers {part}: known are {', '.join(PEERS)}")
        if peer.policies and policy and policy not in peer.policies:
            raise BenchError(f"--peers {part}: policies of {name} are {', '.join(peer.policies)}")
        program = _program(name, peer, path)
        if program is None:
            say(
                f"skipped: {name} is not here{f' ({path})' if path else ''}; in a venv of its own, pip install {peer.package}, "
                f"then --peers {name}=VENV/bin/{'python' if peer.module else name}"
            )
            continue
        if peer.note:
            say(f"{name}: {peer.note}")
        sides.append(Side(f"{name}:{policy or peer.policy}", peer=peer, program=program, peer_policy=policy or peer.policy))
    return sides


def _program(name: str, peer: Peer, path: str) -> tuple[str, ...] | None:
    if peer.module:
        python = shutil.which(path or sys.executable) or ""
        package = peer.module.partition(".")[0]
        installed = any(Path(python).parent.parent.glob(f"lib/python3*/site-packages/{package}"))
        return (python, "-m", peer.module) if python and installed else None
    beside = Path(sys.executable).parent / name
    found_path = shutil.which(path) if path else shutil.which(str(beside)) or shutil.which(name)
    return (found_path,) if found_path else None


class Front(NamedTuple):
    """A side that is up."""

    url: str
    engines: tuple[Address, ...]


@contextlib.asynccontextmanager
async def running(side: Side, pool: Pool) -> AsyncIterator[Front]:
    """The block is cancelled, and StartError raised, if a part ends before it does."""
    async with contextlib.AsyncExitStack() as stack:
        engines = stack.enter_context(Program(_engine_arguments(pool), announces=True, program=lifeline([sys.executable, "-m"])))
        named = engines.announced["engines"]
        assert isinstance(named, list)
        addresses = tuple(map(Address.parse, named))
        parts: dict[str, Part] = {f"engines' process of {side.name}": _Watched(engines)}
        if side.peer is not None:
            url, programs = await _peer(side, side.peer, addresses, pool, stack)
            parts |= {name: _Watched(program) for name, program in programs.items()}
            async with watched(parts):
                yield Front(url, addresses)
            return
        epp = Address(LOOPBACK, quiet_ports(1)[0])  # round robin: nobody there, and nobody asks
        if side.config is not None:
            picker = Child(f"picker of {side.name}", _serve_arguments(side.config, addresses, pool))
            stack.push_async_callback(picker.stop)
            (ready,) = await picker.start(_SERVES)
            port = _GRPC_PORT.search(ready)
            assert port is not None
            epp = Address(LOOPBACK, int(port[1]))
            parts[picker.name] = picker
        gateway, baseline = (Address(LOOPBACK, port) for port in quiet_ports(2))
        options = EnvoyOptions(
            listen=gateway,
            round_robin_listen=None if side.config else baseline,
            endpoints=addresses,
            epp=epp,
            epp_tls=False,
            concurrency=1,
            envoy_path=pool.envoy_path,
        )
        envoy = EnvoyProcess(options, on_log=lambda _line: None)
        await stack.enter_async_context(envoy)
        parts[f"Envoy of {side.name}"] = envoy
        async with watched(parts):
            yield Front(f"http://{gateway if side.config else baseline}", addresses)


class _Watched:
    """A program as `watched` wants it."""

    def __init__(self, program: Program) -> None:
        self._program = program

    @property
    def last_error(self) -> str:
        return self._program.log_tail()

    async def wait(self) -> int:
        while (code := self._program.returncode) is None:  # noqa: ASYNC110 - a child of subprocess tells nobody
            await asyncio.sleep(POLL_S)
        return code


def _engine_arguments(pool: Pool) -> list[str]:
    flags = {
        "--host": LOOPBACK,
        "--port": 0,
        "--count": pool.engines,
        "--time-scale": pool.speedup,
        "--tokens-per-chunk": TOKENS_PER_CHUNK,
        "--kv-blocks": pool.kv_blocks,
    }
    return ["bench.live.engines", *(f"{flag}={value}" for flag, value in flags.items()), *pool.sim_args]


def _serve_arguments(config: Path, engines: Sequence[Address], pool: Pool) -> list[str]:
    """Scrapes are as much faster as everything else is, as far as that goes."""
    scrape_ms = max(SCRAPE_LEAST_MS, round(SCRAPE_MS / pool.speedup))
    return [
        "serve",
        f"--config-file={config}",
        *(f"--endpoint=engine-{number}={address}" for number, address in enumerate(engines, 1)),
        *(f"--{port}-port=0" for port in ("grpc", "grpc-health", "metrics")),
        f"--bind-address={LOOPBACK}",
        "--secure-serving=false",
        "--drain-timeout=0",
        "--zap-encoder=json",
        f"--refresh-metrics-interval={scrape_ms}ms",
        *pool.serve_args,
    ]


def _block_tokens(pool: Pool) -> int:
    """Of the engines, which may have been told by `--sim-args`."""
    parser = argparse.ArgumentParser()
    add_sim_arguments(parser)
    return sim_options(parser.parse_args(_engine_arguments(pool)[1:])).profile.block_tokens


async def _peer(
    side: Side, peer: Peer, engines: Sequence[Address], pool: Pool, stack: contextlib.AsyncExitStack
) -> tuple[str, dict[str, Program]]:
    """Where it is to be reached, and its programs by name."""
    port, metrics, gateway = quiet_ports(3)
    urls = [f"http://{address}" for address in engines]
    url = f"http://{LOOPBACK}:{port}"
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
        arguments = peer.arguments(port, metrics, urls, side.peer_policy)
        environment = {**_OFFLINE, **peer.environment}
        program = stack.enter_context(Program(arguments, program=lifeline(side.program), environment=environment))
        await _until_ready(session, url + peer.ready, program)
        if not peer.shim:
            return url, {side.name: program}
        arguments = [peer.shim, f"--port={gateway}", f"--select-url={url}", f"--block-tokens={_block_tokens(pool)}", *urls]
        shim = stack.enter_context(Program(arguments, program=lifeline([sys.executable, "-m"])))
        url = f"http://{LOOPBACK}:{gateway}"
        await _until_ready(session, f"{url}/health", shim)
        return url, {side.name: program, f"gateway of {side.name}": shim}


async def _until_ready(session: aiohttp.ClientSession, url: str, child: Program) -> None:
    loop = asyncio.get_running_loop()
    give_up_s = loop.time() + READY_S
    last = ""
    while loop.time() < give_up_s:
        child.check()
        try:
            async with session.get(url) as response:
                if response.status == 200:
                    return
                last = f"status {response.status}"
        except (aiohttp.ClientError, TimeoutError) as error:
            last = f"{type(error).__name__}: {error}"
        await asyncio.sleep(POLL_S)
    raise BenchError(f"{url} was not ready within {READY_S:g} s ({last})\n{child.log_tail()}")
