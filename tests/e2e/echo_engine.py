"""A model server that says what it received, to prove that nothing was changed on the way. Run as a script; it prints where it listens.

Whatever the path, it answers with the method, the path, the headers, and length and SHA-256 of the body. A query `say=` asks for
something else: `say=events` for `EVENTS`, written piece by piece; `say=bytes&count=N` for `blob(N)`; `say=nothing` for a 204.
"""

from __future__ import annotations

import asyncio
import hashlib
import signal

from aiohttp import web

BODY_BYTES_MAX = 64 << 20
PAUSE_S = 0.003
"""Between two pieces, so that they travel apart."""
METRICS = """\
vllm:num_requests_waiting{engine="0"} 0.0
vllm:num_requests_running{engine="0"} 0.0
vllm:kv_cache_usage_perc{engine="0"} 0.0
"""
USAGE = b'{"id":"x","choices":[],"usage":{"prompt_tokens":11,"completion_tokens":7,"total_tokens":18}}'
EVENTS = (
    b": a comment first\n\n",
    b'data: {"id":"x","choices":[{"delta":{"content":"Gr\xc3',  # a letter of two bytes, cut in half
    b'\xbc\xc3\x9fe"}}]}\n\n',
    b"data: {",
    b'"id":"x","choices":[{"delta":{"content":"' + b"long " * 60_000 + b'"}}]}\r\n\r\n',
    b"\n",
    b'event: odd\nid: 7\ndata: {"id":"x"}\ndata: {"two":"lines"}\n\n',
    b"data: " + USAGE[:30],
    USAGE[30:] + b"\n",
    b"\n",
    b"data: [DONE]\n\n",
)
"""Server-sent events, cut where it hurts."""


def blob(count: int) -> bytes:
    """`count` bytes without a short period, every value among them."""
    return b"".join(hashlib.sha512(index.to_bytes(8, "big")).digest() for index in range(-(-count // 64)))[:count]


async def answer(request: web.Request) -> web.StreamResponse:
    body = await request.read()
    say = request.query.get("say", "")
    if say == "events":
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for piece in EVENTS:
            await response.write(piece)
            await asyncio.sleep(PAUSE_S)
        await response.write_eof()
        return response
    if say == "bytes":
        return web.Response(body=blob(int(request.query["count"])), content_type="application/octet-stream")
    if say == "nothing":
        return web.Response(status=204)
    return web.json_response(
        {
            "method": request.method,
            "path": request.raw_path,
            "headers": [[name.lower(), value] for name, value in request.headers.items()],
            "length": len(body),
            "sha256": hashlib.sha256(body).hexdigest(),
        }
    )


async def sign(request: web.Request, response: web.StreamResponse) -> None:
    """Says who answers, as the simulated engines do."""
    if request.transport is not None:
        host, port = request.transport.get_extra_info("sockname")[:2]
        response.headers["x-inference-endpoint"] = f"{host}:{port}"


async def metrics(_request: web.Request) -> web.Response:
    return web.Response(text=METRICS)


async def main() -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    app = web.Application(client_max_size=BODY_BYTES_MAX)
    app.on_response_prepare.append(sign)
    app.router.add_get("/metrics", metrics)
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        print(f"listening on {host}:{port}", flush=True)  # noqa: T201 - the output its starter waits for
        await stopped.wait()
    finally:
        await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(main())
