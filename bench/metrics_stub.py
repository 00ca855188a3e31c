"""Model servers that serve /metrics and /v1/models and nothing else: one process, one port each.

The text is what a busy vLLM 0.32 said (60 KB, 541 samples; tests/data), with its load varied from answer to answer, so that scraping
costs the picker what it costs in production. Everything is made before the first question, and answered by a bare protocol with one
write, so that this process stays the cheaper side: about 15 us an answer on uvloop. It also keeps the time between two questions on
each port: how old a reading gets, as the engine sees it, with nothing asked of the picker.
"""

import argparse
import asyncio
import itertools
import json
import re
import signal
import socket
import time
from array import array
from collections.abc import Iterator
from typing import cast

from bench.processes import ROOT
from bench.workload import MODEL

DESCRIPTION = """\
Model servers that only serve a real vLLM /metrics text and a list of one model, on as many ports of 127.0.0.1 as asked for. Prints
{"ports": [...]} when ready and runs until SIGTERM or SIGINT. `overhead` and `scrape` start it by themselves.

GET /bench/gaps on any port answers the seconds between two questions for /metrics on the same port, of all ports since the last time."""

RECORDING = ROOT / "tests" / "data" / "vllm-0.32-metrics-busy.txt"
VARIANTS = 8  # texts in rotation
SEND_BUFFER_BYTES = 1 << 20  # an answer leaves in one write
GAPS_MAX = 1_000_000


def _with_value(text: bytes, name: bytes, value: float) -> bytes:
    replaced, count = re.subn(rb"(?m)^(%b(?:\{[^}]*\})?) \S+$" % name, rb"\g<1> %r" % value, text)
    assert count, f"{name.decode()} is not in {RECORDING}"
    return replaced


def exposition(serial: int) -> bytes:
    """The text of the `serial`-th answer. Counters stand still: one that fell would be a restart."""
    text = (
        RECORDING.read_bytes()
        .replace(b'block_size="32"', b'block_size="16"')
        .replace(b'model_name="tiny"', f'model_name="{MODEL}"'.encode())
    )
    text = _with_value(text, b"vllm:num_requests_running", 4.0 + serial % 3)
    text = _with_value(text, b"vllm:num_requests_waiting", 0.0 + serial % 2)
    return _with_value(text, b"vllm:kv_cache_usage_perc", round(0.30 + serial / 100, 2))


def _answer(body: bytes, content_type: str = "application/json", status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


class Stub:
    """What all ports answer, and when they were asked."""

    def __init__(self) -> None:
        texts = [_answer(exposition(serial), "text/plain; version=0.0.4; charset=utf-8") for serial in range(VARIANTS)]
        self._texts: Iterator[bytes] = itertools.cycle(texts)
        self._models = _answer(json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]}).encode())
        self._missing = _answer(b"{}", status="404 Not Found")
        self._asked_s: dict[int, float] = {}
        self._gaps_s = array("d")

    def answer(self, head: bytes, port: int) -> bytes:
        if head.startswith(b"GET /metrics "):
            now_s = time.monotonic()
            if port in self._asked_s and len(self._gaps_s) < GAPS_MAX:
                self._gaps_s.append(now_s - self._asked_s[port])
            self._asked_s[port] = now_s
            return next(self._texts)
        if head.startswith(b"GET /v1/models "):
            return self._models
        if head.startswith(b"GET /bench/gaps "):
            gaps_s, self._gaps_s = self._gaps_s, array("d")
            return _answer(json.dumps(gaps_s.tolist()).encode())
        return self._missing


class _Connection(asyncio.Protocol):
    def __init__(self, stub: Stub) -> None:
        self._stub = stub
        self._pending = b""
        self._port = 0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance
        self._port = transport.get_extra_info("sockname")[1]

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        *heads, self._pending = (self._pending + data).split(b"\r\n\r\n")
        for head in heads:
            self._transport.write(self._stub.answer(head, self._port))


class Runner:
    """The listening ports; `cleanup` closes them."""

    def __init__(self, servers: list[asyncio.Server]) -> None:
        self._servers = servers

    async def cleanup(self) -> None:
        for server in self._servers:
            server.close()


async def start(count: int) -> tuple[Runner, list[int]]:
    """Serving on `count` free ports; await `cleanup()` of what is returned first."""
    stub, loop = Stub(), asyncio.get_running_loop()
    servers, ports = [], []
    for _ in range(count):
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)  # accepted sockets take it over
        listener.bind(("127.0.0.1", 0))
        ports.append(listener.getsockname()[1])
        servers.append(await loop.create_server(lambda: _Connection(stub), sock=listener))
    return Runner(servers), ports


async def _serve(count: int) -> None:
    runner, ports = await start(count)
    stopping = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stopping.set)
    print(json.dumps({"ports": ports}), flush=True)
    await stopping.wait()
    await runner.cleanup()


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=16, help="how many servers (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    try:
        import uvloop
    except ImportError:
        asyncio.run(_serve(args.count))
    else:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(args.count))
    return 0
