"""The composition root: builds every object once, runs them in one TaskGroup, stops them in order.

Stopping: SIGTERM turns health NOT_SERVING and keeps serving for `--drain-timeout`, so that gateways stop sending before the door
closes; then the listener closes, streams in flight get `GRACE_S`, everything ends. SIGINT, and a second signal, skip the wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Self

import msgspec
from aiohttp import web

from epp import __version__
from epp.aio import forever
from epp.clock import MonotonicClock
from epp.config.load import load
from epp.config.options import MEBIBYTE, ServeOptions
from epp.config.schema import EndpointPickerConfig, PluginSpec
from epp.datastore import Datastore
from epp.director import Director
from epp.engines.fetch import HttpFetcher
from epp.engines.scraper import Scraper
from epp.engines.vllm import Vllm
from epp.errors import ConfigError, Problem, StartError
from epp.extproc import tls
from epp.extproc.grpc_aio import GrpcServer
from epp.extproc.h2_policy import H2Limits
from epp.extproc.health import Health
from epp.extproc.limits import Limits
from epp.extproc.server import H2Server, listen_problem
from epp.extproc.session import Session
from epp.observe.metrics import Metrics
from epp.plugins.registry import Registry
from epp.scheduling.build import Built, build
from epp.sources.files import FileSource
from epp.sources.static import parse_endpoints
from epp.types import Endpoint

_log = logging.getLogger("epp.app")

GRACE_S = 10.0
"""For streams in flight once the listener is closed."""
FIRST_ROUND_S = 1.5
"""Start-up waits at most this long for a first reading of every endpoint."""
INDEX_TICK_S = 0.1
"""Between slices of forgetting; prompts pay for most of it as they are recorded."""


class Picker:
    """The endpoint picker: everything from the ports to the pool. Raises ConfigError or StartError, never half-starts."""

    def __init__(self, options: ServeOptions, *, fallbacks: int = 0) -> None:
        """`fallbacks`: further endpoints to name after the best one, for a gateway known to take a list."""
        self.options = options
        clock, rng = MonotonicClock(), random.Random()  # noqa: S311 - breaking ties is no secret
        registry = Registry()
        self.built = build(_config(options, registry, fallbacks), registry, rng)
        self.health = Health()
        self.datastore = Datastore(clock)
        self._source: FileSource | None = None
        if options.endpoints_file:
            if options.endpoints:
                raise ConfigError("command line", [Problem("--endpoint", "can't be used together with --endpoints-file")])
            self._source = FileSource(Path(options.endpoints_file), self.datastore)
            self._source.load()
        elif options.endpoints:
            self.datastore.apply(parse_endpoints(options.endpoints))
        else:
            raise ConfigError("command line", [Problem("--endpoint", "at least one, or --endpoints-file, is needed")])
        self._forget_removed(self.built)
        self._fetcher = HttpFetcher()
        self.scraper = Scraper(
            self.datastore, Vllm(), self._fetcher, clock=clock, rng=rng, interval_min_s=options.refresh_metrics_interval_s
        )
        self.metrics = Metrics(
            clock=clock,
            pool=self.datastore,
            indexes={(producer.name, producer.type): producer.index for producer in self.built.prefix_producers},
            polls={"metrics-data-source": self.scraper} | ({"file-discovery": self._source} if self._source else {}),
            staleness_s=options.metrics_staleness_threshold_s,
            build_ref=__version__,
            process=True,
        )
        self.session_limits = Limits(
            options.max_body_bytes,
            options.max_buffered_bytes,
            self._limit_hit,
            header_count_max=options.max_header_count,
            decision_s=options.decision_timeout_s,
        )
        self.director = Director(
            self.datastore,
            self.built.scheduler,
            self.metrics,
            clock,
            unknown_paths_ok=options.unknown_paths == "route",
            subset_filter=not options.disable_endpoint_subset_filter,
            test_headers=options.enable_test_headers,
        )
        limits = H2Limits(
            message_bytes_max=options.max_body_bytes + MEBIBYTE,
            streams_max=options.max_streams,
            connections_max=options.max_connections,
            keepalive_s=options.keepalive_s,
        )

        def new_session() -> Session:
            return Session(self.director, self.session_limits, clock)

        if options.client_ca_file and not options.secure_serving:
            raise ConfigError("command line", [Problem("--client-ca-file", "needs TLS: leave --secure-serving on")])
        pair = (tls.load(options.cert_path) if options.cert_path else tls.self_signed()) if options.secure_serving else None
        self.ext_proc: H2Server | GrpcServer
        if options.transport == "grpc":
            self.ext_proc = GrpcServer(
                new_session=new_session,
                health=self.health,
                message_bytes_max=limits.message_bytes_max,
                streams_max=limits.streams_max,
                clock=clock,
                tls=pair,
                client_ca_file=options.client_ca_file,
            )
        else:
            self.ext_proc = H2Server(
                health=self.health,
                session_limits=self.session_limits,
                limits=limits,
                clock=clock,
                new_session=new_session,
                tls=tls.server_context(pair, client_ca_file=options.client_ca_file) if pair else None,
            )
        self._reloader = None
        if pair is not None and options.cert_path and options.enable_cert_reload:
            self._reloader = tls.Reloader(options.cert_path, pair, self.ext_proc.present)
        self.health_server = H2Server(health=self.health, session_limits=self.session_limits, limits=limits, clock=clock)
        self.metrics_server = _MetricsServer(self.metrics)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Serves for the length of the block, with a first look at the engines before it; a loop that fails ends the block."""
        options = self.options
        host = options.bind_address or None
        failure: StartError | None = None
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._fetcher)
            await self.metrics_server.start(host, options.metrics_port)
            stack.push_async_callback(self.metrics_server.stop)
            await self.health_server.start(host, options.grpc_health_port)
            stack.push_async_callback(self.health_server.stop, 0)
            await self.scraper.first_round(FIRST_ROUND_S)
            await self.ext_proc.start(host, options.grpc_port)
            async with asyncio.TaskGroup() as tasks:
                loops = [self.scraper.run(), self.ext_proc.run(), self.health_server.run(), forever(self._tick, INDEX_TICK_S)]
                if self._source is not None:
                    loops.append(self._source.run())
                if self._reloader is not None:
                    loops.append(forever(self._reloader.once, tls.RELOAD_S))
                running = [tasks.create_task(loop) for loop in loops]
                self.health.ready = True
                _collect_rarely()
                self._log_ready()
                try:
                    yield
                except StartError as error:  # kept out of the task group, which would wrap it
                    failure = error
                finally:
                    await self.ext_proc.stop(GRACE_S)
                    for task in running:
                        task.cancel()
        if failure is not None:
            raise failure

    async def drain(self, hurry: asyncio.Event) -> None:
        """Say NOT_SERVING and go on serving for the drain time, or until told to hurry."""
        self.health.draining = True
        _log.info("draining", extra={"fields": {"seconds": self.options.drain_timeout_s}})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.options.drain_timeout_s):
                await hurry.wait()

    def _tick(self) -> None:
        for producer in self.built.prefix_producers:
            producer.index.tick()

    def _forget_removed(self, built: Built) -> None:
        """A gone endpoint's slot is free again once every index has forgotten it."""
        indexes = [producer.index for producer in built.prefix_producers]

        def removed(endpoint: Endpoint) -> None:
            waiting = len(indexes)
            if not waiting:
                self.datastore.free_slot(endpoint.slot)

            def forgotten(slot: int) -> None:
                nonlocal waiting
                waiting -= 1
                if not waiting:
                    self.datastore.free_slot(slot)

            for index in indexes:
                index.forget(endpoint.slot, forgotten)

        self.datastore.subscribe(removed=removed)

    def _limit_hit(self, name: str) -> None:
        self.metrics.limit_hits[name] += 1

    def _log_ready(self) -> None:
        fields = {
            "version": __version__,
            "transport": self.options.transport,
            "tls": self.options.secure_serving,
            "grpc_port": self.ext_proc.port,
            "grpc_health_port": self.health_server.port,
            "metrics_port": self.metrics_server.port,
            "endpoints": len(self.datastore.endpoints),
            "healthy": len([e for e in self.datastore.endpoints.values() if e.healthy]),
        }
        _log.info("serving", extra={"fields": fields})


class _MetricsServer:
    """`/metrics` over HTTP."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        app = web.Application()
        app.router.add_get("/metrics", self._get)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False)
        self.port = 0

    async def start(self, host: str | None, port: int) -> None:
        await self._runner.setup()
        try:
            site = web.TCPSite(self._runner, host, port)
            await site.start()
        except OSError as error:
            await self._runner.cleanup()
            raise StartError(listen_problem(host, port, error)) from None
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _get(self, request: web.Request) -> web.Response:
        body, content_type = self._metrics.exposition(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})


class Signals:
    """SIGTERM and SIGINT as events: `stop` at the first, `hurry` at the second, and at once for SIGINT."""

    def __init__(self) -> None:
        self.stop = asyncio.Event()
        self.hurry = asyncio.Event()
        self.exit_code = 0

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._received, number)
        return self

    def __exit__(self, *_: object) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

    def _received(self, number: signal.Signals) -> None:
        if self.stop.is_set() or number == signal.SIGINT:
            self.hurry.set()
        if number == signal.SIGINT:
            self.exit_code = 130  # what a shell expects of a program ended by Ctrl-C
        self.stop.set()


async def serve(options: ServeOptions) -> int:
    """`epp serve`: the picker alone, until told to stop. Returns the exit code."""
    picker = Picker(options)
    with Signals() as signals:
        async with picker.serving():
            await signals.stop.wait()
            await picker.drain(signals.hurry)
    return 0


def run(main: Callable[[], Coroutine[None, None, int]]) -> int:
    """Run a coroutine function on uvloop where it is installed, else on asyncio's loop."""
    try:
        import uvloop  # noqa: PLC0415 - optional
    except ImportError:
        factory = None
    else:
        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main())


def _config(options: ServeOptions, registry: Registry, fallbacks: int) -> EndpointPickerConfig:
    if options.config_file and options.config_text:
        raise ConfigError("command line", [Problem("--config-file", "can't be used together with --config-text")])
    text, source = options.config_text, "--config-text"
    if options.config_file:
        source = options.config_file
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(source, [Problem("", f"can't be read: {getattr(error, 'strerror', None) or error}")]) from None
    config = load(text, source=source, catalogue=registry)
    if fallbacks and not any("picker" in registry.role(spec.type) for spec in config.plugins):
        picker = PluginSpec(name="max-score-picker", type="max-score-picker", parameters={"maxNumOfEndpoints": 1 + fallbacks})
        config = msgspec.structs.replace(config, plugins=(*config.plugins, picker))
    return config


def _collect_rarely() -> None:
    """What start-up made lives as long as the process: keep the garbage collector from walking it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
