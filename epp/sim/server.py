"""Simulated model servers over HTTP: one aiohttp application an engine, any number of engines in one process.

Why: the demo, the benches and the fault tests need servers that answer as vLLM does, are slow where it is slow, and fail on command.
Not here: how an engine schedules (engine), how it keeps time (pacing), what bodies look like (openai), the metrics page (exposition).

Faults (`POST /admin/fail {"mode": ...}`, no part of vLLM):
`error-503` answers inference and /health with 503; `hang` freezes the engine (everything else answers, as when vLLM is paused);
`refuse-metrics` drops the connection of a scrape; `hang-metrics` never answers one; `ok` ends them all.

Cost: about 20 µs of CPU a streamed token, or 7 µs with 16 tokens to an event, engine and socket write included.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Final

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage

from epp.errors import StartError
from epp.sim import exposition, openai
from epp.sim.engine import ContextTooLongError, Engine
from epp.sim.kv_events import KVEventPublisher
from epp.sim.options import SimOptions, add_sim_arguments, sim_options
from epp.sim.pacing import WAKE_AT_END, Pacer, Reply
from epp.types import Address

__all__ = ["FAULTS", "SimOptions", "SimServer", "add_sim_arguments", "running_engines", "serve_engines", "sim_options"]

_http_log = logging.getLogger("epp.sim.http")
_http_log.addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], BadHttpMessage)))
"""As the picker's metrics port: no stack for every client that speaks something else."""

BODY_BYTES_MAX = 64 * 1024 * 1024
"""A request body; vLLM has no limit, a test process should."""
FAULTS: Final = ("ok", "refuse-metrics", "error-503", "hang", "hang-metrics")
INTERRUPTED = 130
"""What a shell expects of a program ended by Ctrl-C."""
_DRAIN_S = 0.05
"""How long `stop` lets open requests finish: a model server that is told to stop does not wait for its clients."""


class _FaultBody(msgspec.Struct):
    mode: str


class SimServer:
    """One engine behind vLLM's HTTP API. `start` it once, inside an event loop."""

    def __init__(self, options: SimOptions | None = None) -> None:
        self._options = options or SimOptions()
        self.engine = Engine(self._options.profile, self._options.seed)
        self.metrics = exposition.EngineMetrics(self._options.profile, self._options.model)
        self.fault = "ok"
        self.address = Address("", 0)
        """Known once started."""
        self.publisher: KVEventPublisher | None = None
        """Of KV-cache events, once started, if there is to be one."""
        self._runner: web.AppRunner | None = None
        self._pacer: Pacer | None = None
        self._fault_changed = asyncio.Event()
        self._replies_total = 0
        self._created_s = 0

    def __repr__(self) -> str:
        return f"<SimServer {self.address} fault={self.fault} {self.engine!r}>"

    @property
    def port(self) -> int:
        return self.address.port

    @property
    def idle(self) -> bool:
        """No step is under way or planned."""
        return self._pacer is None or self._pacer.idle

    async def start(self, host: str, port: int) -> None:
        """Listen; port 0 lets the system choose. Raises StartError if the port can't be had."""
        self._pacer = Pacer(self.engine, self.metrics, self._options.time_scale, self._publish)
        self._created_s = int(time.time())
        runner = web.AppRunner(self._application(), access_log=None, logger=_http_log, handler_cancellation=True, shutdown_timeout=_DRAIN_S)
        await runner.setup()
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            await runner.cleanup()
            if error.errno == errno.EADDRINUSE:
                raise StartError(f"port {port} on {host} is in use: stop what listens there or choose another with --port") from None
            raise StartError(f"can't listen on {host} port {port}: {error.strerror}") from None
        self._runner = runner
        self.address = Address(host, runner.addresses[0][1])
        options = self._options
        if options.kv_events_port is not None:
            topic = options.kv_events_topic or f"kv@{self.address}@{options.model}"
            self.publisher = KVEventPublisher(self.engine.log_events(), topic)
            try:
                await self.publisher.start(host, options.kv_events_port, options.kv_events_replay_port)
            except OSError as error:
                await self.stop()
                raise StartError(f"can't publish KV-cache events on {host} port {options.kv_events_port}: {error.strerror}") from None

    async def stop(self) -> None:
        """Drop every request and stop listening."""
        if self.publisher is not None:
            await self.publisher.stop()
        if self._pacer is not None:
            self._pacer.close()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    def fail(self, mode: str) -> None:
        """Misbehave from now on, one of FAULTS. Requests held up by the fault before go on."""
        if mode not in FAULTS:
            raise ValueError(f"no fault {mode!r}; choose one of {', '.join(FAULTS)}")
        self.fault = mode
        self._fault_changed.set()
        self._fault_changed = asyncio.Event()
        if self._pacer is not None:
            self._pacer.freeze(mode == "hang")

    def _publish(self) -> None:
        if self.publisher is not None:
            self.publisher.publish()

    def _application(self) -> web.Application:
        app = web.Application(client_max_size=BODY_BYTES_MAX)
        app.on_response_prepare.append(self._sign)
        app.add_routes([
            web.post("/v1/completions", _answering(self._completions)),
            web.post("/v1/chat/completions", _answering(self._chat)),
            web.get("/v1/models", self._models),
            web.get("/health", self._health),
            web.get("/metrics", self._metrics_page),
            web.get("/version", self._version),
            web.post("/reset_prefix_cache", self._reset_prefix_cache),
            web.post("/admin/fail", _answering(self._admin_fail)),
        ])  # fmt: skip
        return app

    async def _sign(self, _request: web.Request, response: web.StreamResponse) -> None:
        response.headers["x-inference-endpoint"] = str(self.address)

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        return await self._infer(request, openai.parse_completion(await request.read(), self._options.model))

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._infer(request, openai.parse_chat(await request.read(), self._options.model))

    async def _infer(self, request: web.Request, job: openai.Job) -> web.StreamResponse:
        assert self._pacer is not None
        if self.fault == "error-503":
            raise openai.RejectedError(503, "Service Unavailable", "The engine is failing on request (/admin/fail).")
        wake_tokens = self._options.tokens_per_chunk if job.stream else WAKE_AT_END
        try:
            reply = self._pacer.submit(job.prompts, job.max_tokens, job.cache_salt, wake_tokens)
        except ContextTooLongError as error:
            raise _too_long(error) from None
        self._replies_total += 1
        given_id = request.headers.get("x-request-id") or f"{self.port:x}-{self._replies_total:x}"
        reply_id = f"{'chatcmpl' if job.chat else 'cmpl'}-{given_id}"
        try:
            if job.stream:
                return await self._stream(request, job, reply, reply_id)
            await reply.news()
        finally:
            self._pacer.abort(reply)
        texts = [part.take().decode() for part in reply.parts]
        body = openai.reply_body(
            job, reply_id=reply_id, created_s=int(time.time()), model=self._options.model, texts=texts, usage=self._usage(reply)
        )
        return web.Response(body=body, content_type="application/json")

    async def _stream(self, request: web.Request, job: openai.Job, reply: Reply, reply_id: str) -> web.StreamResponse:
        events = openai.Events(chat=job.chat, reply_id=reply_id, created_s=int(time.time()), model=self._options.model)
        response = web.StreamResponse(headers={"content-type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        while True:
            await reply.news()
            written = b""
            for index, part in enumerate(reply.parts):
                if part.known_tokens > part.sent_tokens:
                    first = part.sent_tokens == 0
                    written += events.text(index, part.take(), first=first, last=part.finished)
            if not reply.unfinished:
                break
            await response.write(written)
        if job.include_usage:
            written += events.usage(self._usage(reply))
        await response.write_eof(written + openai.DONE)
        return response

    def _usage(self, reply: Reply) -> openai.Usage:
        sequences = [part.sequence for part in reply.parts]
        block_tokens = self._options.profile.block_tokens
        return openai.Usage(
            prompt_tokens=sum(sequence.prompt_tokens for sequence in sequences),
            completion_tokens=sum(sequence.generated_tokens for sequence in sequences),
            cached_tokens=sum(sequence.cached_tokens for sequence in sequences),
            created_cache_tokens=sum(
                sequence.prompt_tokens // block_tokens * block_tokens - sequence.cached_tokens for sequence in sequences
            ),
        )  # fmt: skip

    async def _models(self, _request: web.Request) -> web.Response:
        body = openai.models_body(self._options.model, self._created_s, self._options.profile.context_tokens_max)
        return web.Response(body=body, content_type="application/json")

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response(status=503 if self.fault == "error-503" else 200)

    async def _metrics_page(self, request: web.Request) -> web.Response:
        while self.fault == "hang-metrics":
            await self._fault_changed.wait()
        if self.fault == "refuse-metrics" and request.transport is not None:
            request.transport.abort()
        return web.Response(text=self.metrics.text(), headers={"content-type": exposition.CONTENT_TYPE})

    async def _version(self, _request: web.Request) -> web.Response:
        return web.json_response({"version": openai.VERSION})

    async def _reset_prefix_cache(self, _request: web.Request) -> web.Response:
        done = self.engine.reset_cache()
        if self.idle:  # else with the step under way, as vLLM does
            self._publish()
        return web.json_response({"success": done})

    async def _admin_fail(self, request: web.Request) -> web.Response:
        try:
            self.fail(msgspec.json.decode(await request.read(), type=_FaultBody).mode)
        except (msgspec.DecodeError, ValueError) as error:
            raise openai.RejectedError(400, "BadRequestError", str(error), "mode") from None
        return web.json_response({"mode": self.fault})


def _answering(handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """Answers what `handler` rejects."""

    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except openai.RejectedError as error:
            return web.Response(status=error.status, body=error.body, content_type="application/json")

    return answer


def _too_long(error: ContextTooLongError) -> openai.RejectedError:
    limit, prompt = error.context_tokens_max, error.prompt_tokens
    if prompt > limit:
        message = (
            f"This model's maximum context length is {limit} tokens. However, your prompt contains at least {prompt} input tokens, which "
            f"exceeds this limit even without any output tokens. Please reduce the length of the input prompt. "
            f"(parameter=input_tokens, value={prompt})"
        )
    else:
        message = (
            f"This model's maximum context length is {limit} tokens. However, you requested {error.max_tokens} output tokens and your "
            f"prompt contains at least {prompt} input tokens, for a total of at least {prompt + error.max_tokens} tokens. Please reduce "
            f"the length of the input prompt or the number of requested output tokens. (parameter=input_tokens, value={prompt})"
        )
    return openai.RejectedError(400, "BadRequestError", message, "input_tokens")


def _nth(port: int | None, index: int) -> int | None:
    return port + index if port else port


@contextlib.asynccontextmanager
async def running_engines(options: SimOptions) -> AsyncIterator[list[SimServer]]:
    """All the engines, listening; stopped on the way out. Raises StartError if one can't start, and then none runs."""
    async with contextlib.AsyncExitStack() as stack:
        servers: list[SimServer] = []
        for index, port in enumerate(options.engine_ports()):
            server = SimServer(
                replace(
                    options,
                    seed=options.seed + index,
                    kv_events_port=_nth(options.kv_events_port, index),
                    kv_events_replay_port=_nth(options.kv_events_replay_port, index),
                )
            )
            await server.start(options.host, port)
            stack.push_async_callback(server.stop)
            servers.append(server)
        yield servers


async def serve_engines(options: SimOptions) -> int:
    """Run the engines until cancelled, or until SIGTERM or SIGINT; says where each listens. Returns the exit code: 130 for SIGINT."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[int] = loop.create_future()

    def stop(code: int) -> None:
        if not stopped.done():
            stopped.set_result(code)

    async with running_engines(options) as servers:
        loop.add_signal_handler(signal.SIGTERM, stop, 0)
        loop.add_signal_handler(signal.SIGINT, stop, INTERRUPTED)
        try:
            for server in servers:
                print(f"engine listening on http://{server.address}", flush=True)  # noqa: T201 - the command's output, awaited by who starts it
            return await stopped
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
