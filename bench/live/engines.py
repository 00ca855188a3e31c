"""Simulated engines as `epp sim` runs them, with one route of vLLM's more: `/v1/completions/render`, the tokens of a prompt.

Why: a peer's cache-aware routing asks the engines for tokens, and goes by load alone where they can't say (vllm-router does). All sides get
these engines; nobody else asks.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import signal
import sys

import msgspec
from aiohttp import web

from epp.sim.options import add_sim_arguments, sim_options
from epp.sim.server import SimServer
from epp.types import TOKEN_BYTES


class _Prompt(msgspec.Struct):
    prompt: str
    model: str = ""


class RenderingServer(SimServer):
    """An engine that tells what it makes of a prompt."""

    def _application(self) -> web.Application:
        app = super()._application()
        app.add_routes([web.post("/v1/completions/render", _render)])
        return app


async def _render(request: web.Request) -> web.Response:
    try:
        asked = msgspec.json.decode(await request.read(), type=_Prompt)
    except msgspec.MsgspecError as error:
        return web.json_response({"error": {"message": str(error), "type": "BadRequestError", "code": 400}}, status=400)
    return web.Response(
        body=msgspec.json.encode([{"token_ids": tokens_of(asked.prompt), "model": asked.model}]), content_type="application/json"
    )


def tokens_of(prompt: str | bytes) -> list[int]:
    """A number of 32 bits for each token, the same for the same text."""
    text = prompt.encode() if isinstance(prompt, str) else prompt
    padded = text + b"\0" * (-len(text) % TOKEN_BYTES)
    return memoryview(padded).cast("I").tolist()


async def _serve(args: argparse.Namespace) -> None:
    options = sim_options(args)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with contextlib.AsyncExitStack() as stack:
        servers = [RenderingServer(dataclasses.replace(options, seed=options.seed + index)) for index in range(options.count)]
        for server, port in zip(servers, options.engine_ports(), strict=True):
            await server.start(options.host, port)
            stack.push_async_callback(server.stop)
        print(json.dumps({"engines": [str(server.address) for server in servers]}), flush=True)
        await stopped.wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.live.engines")
    add_sim_arguments(parser)
    asyncio.run(_serve(parser.parse_args(sys.argv[1:])))
