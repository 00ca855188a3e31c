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
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from pathlib import Path
from typing import Self

from epp import __version__
from epp.aio import forever
from epp.clock import MonotonicClock
from epp.config.options import MEBIBYTE, ServeOptions
from epp.console.server import HttpServer
from epp.datastore import Datastore
from epp.decisions import Decisions
from epp.director import Director
from epp.engines.family import EngineFamily
from epp.engines.fetch import HttpFetcher
from epp.engines.models import ModelsPoller
from epp.engines.scraper import Scraper
from epp.engines.settings import Families, fetch_options, interval_s
from epp.errors import ConfigError, Problem, StartError
from epp.extproc import tls
from epp.extproc.grpc_aio import GrpcServer
from epp.extproc.h2_policy import H2Limits
from epp.extproc.health import Health
from epp.extproc.limits import Limits
from epp.extproc.server import H2Server, listen_problem
from epp.extproc.session import Session
from epp.observe.metrics import Metrics
from epp.outliers import Outliers
from epp.plugins.base import Plugin
from epp.plugins.registry import Registry
from epp.policy import Policy
from epp.resources import Resources
from epp.sources.config_file import ConfigFile
from epp.sources.files import FileSource
from epp.sources.resources import ResourcesFile
from epp.sources.static import parse_endpoints
from epp.sources.watched_file import WatchedFile
from epp.types import Endpoint

_log = logging.getLogger("epp.app")

GRACE_S = 10.0
"""For streams in flight once the listener is closed."""
FIRST_ROUND_S = 1.5
"""Start-up waits at most this long for a first reading of every endpoint."""
TICK_S = 0.1
"""Between slices of forgetting (prompts pay for most of it as they are recorded) and looks at ejected endpoints."""


_SOURCE_TYPES = {"endpoints": "file-discovery"}
"""As the reference picker's metrics call them."""


class Picker:
    """The endpoint picker: everything from the ports to the pool. Raises ConfigError or StartError, never half-starts."""

    def __init__(self, options: ServeOptions, *, fallbacks: int = 0) -> None:
        """`fallbacks`: further endpoints to name after the best one, for a gateway known to take a list."""
        self.options = options
        clock, rng = MonotonicClock(), random.Random()  # noqa: S311 - breaking ties is no secret
        self.health = Health()
        self.datastore = Datastore(clock)
        self.outliers = Outliers(self.datastore, clock)
        self.resources = Resources(rng, pool_name=options.pool_name, pool_group=options.pool_group if options.pool_name else "")
        self.policy = Policy(
            self.datastore,
            Registry(),
            clock,
            rng,
            unknown_paths_ok=options.unknown_paths == "route",
            allow_experimental=options.allow_experimental_plugins,
            fallbacks=fallbacks,
            changed=self._policy_changed,
        )
        self.metrics = Metrics(
            clock=clock, pool=self.datastore, staleness_s=options.metrics_staleness_threshold_s, build_ref=__version__, process=True
        )
        self.metrics.outliers = self.outliers
        self.metrics.models.always = lambda: self.resources.names_rewritten
        self.director: Director | None = None
        self._files: list[WatchedFile] = []
        self._read_files(options)
        plugins = self.policy.built.plugins
        try:
            self._fetching, self._families = fetch_options(plugins, options.model_server_token_file), Families(plugins)
            self._fetcher = HttpFetcher(self._fetching, limit_hit=self._limit_hit)
            self.scraper = Scraper(
                self.datastore,
                self._fetcher,
                families=self._family,
                paths=self._metrics_paths,
                options=self._fetching,
                clock=clock,
                rng=rng,
                on_restart=self._restarted,
                interval_min_s=interval_s(plugins, options.refresh_metrics_interval_s),
            )
        except ValueError as error:
            raise ConfigError("configuration", [Problem("plugins", str(error))]) from None
        self.metrics.scraper = self.scraper
        self.models = ModelsPoller(self.datastore, self._fetcher, rng=rng)
        self.metrics.polls = {"metrics-data-source": self.scraper} | {_SOURCE_TYPES.get(each.what, each.what): each for each in self._files}
        decisions = Decisions(clock, options.debug_decisions) if options.debug_decisions else None
        self.director = Director(
            self.datastore,
            self.policy.built.scheduler,
            self.policy.routes,
            self.metrics,
            clock,
            resources=self.resources,
            outliers=self.outliers,
            subset_filter=not options.disable_endpoint_subset_filter,
            test_headers=options.enable_test_headers,
            decisions=decisions,
            emit_scores=options.emit_endpoint_scores,
            models=self.models.view if options.check_models else None,
            model_missed=self.models.hurry,
        )
        self.session_limits = Limits(
            options.max_body_bytes,
            options.max_buffered_bytes,
            self._limit_hit,
            header_count_max=options.max_header_count,
            decision_s=options.decision_timeout_s,
        )
        limits = H2Limits(
            message_bytes_max=options.max_body_bytes + MEBIBYTE,
            streams_max=options.max_streams,
            connections_max=options.max_connections,
            keepalive_s=options.keepalive_s,
        )

        director = self.director

        def new_session() -> Session:
            return Session(director, self.session_limits, clock)

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
        self.http = HttpServer(
            self.metrics,
            self.director,
            decisions,
            self._plugins,
            datastore=self.datastore,
            engine=self.scraper.engine,
            debug=options.enable_debug_endpoints,
            admin_token=self._admin_token,
            listen_problem=listen_problem,
        )

    def _read_files(self, options: ServeOptions) -> None:
        """Everything that comes from a file, for the first time. Raises ConfigError."""
        if options.config_file and options.config_text:
            raise ConfigError("command line", [Problem("--config-file", "can't be used together with --config-text")])
        if options.config_file:
            config = ConfigFile(Path(options.config_file), self.policy.apply, self.metrics.config_reloads)
            config.load()
            if options.config_reload:
                self._files.append(config)
        else:
            self.policy.apply(options.config_text, "--config-text")
        endpoints_file = options.endpoints_file or self.policy.built.discovery_path
        if endpoints_file:
            if options.endpoints:
                raise ConfigError("command line", [Problem("--endpoint", "can't be used together with --endpoints-file or file-discovery")])
            self._files.append(FileSource(Path(endpoints_file), self.datastore))
            self._files[-1].load()
        elif options.endpoints:
            self.datastore.apply(parse_endpoints(options.endpoints))
        elif options.pool_name or options.endpoint_selector:
            flag = "--pool-name" if options.pool_name else "--endpoint-selector"
            message = "watching Kubernetes is not supported by this version yet; name the endpoints with --endpoint or --endpoints-file"
            raise ConfigError("command line", [Problem(flag, message)])
        else:
            raise ConfigError("command line", [Problem("--endpoint", "at least one, or --endpoints-file, is needed")])
        if options.resources_file:
            self._files.append(ResourcesFile(Path(options.resources_file), self.resources))
            self._files[-1].load()

    def _policy_changed(self) -> None:
        built = self.policy.built
        self.metrics.indexes = built.indexes
        self.metrics.stage_decisions = built.stage_decisions
        if self.director is None:
            return
        self.director.use(built.scheduler, self.policy.routes)
        try:
            self._families = Families(built.plugins)
            changed = fetch_options(built.plugins, self.options.model_server_token_file) != self._fetching
        except ValueError as error:
            _log.warning("the new data layer can't be used; the old one stays", extra={"fields": {"reason": str(error)}})
            return
        if changed:
            _log.warning("where and how engines' metrics are read changes with the next start only")

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Serves for the length of the block, with a first look at the engines before it; a loop that fails ends the block."""
        options = self.options
        host = options.bind_address or None
        failure: StartError | None = None
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._fetcher)
            await self.http.start(host, options.metrics_port)
            stack.push_async_callback(self.http.stop)
            await self.health_server.start(host, options.grpc_health_port)
            stack.push_async_callback(self.health_server.stop, 0)
            await self.scraper.first_round(FIRST_ROUND_S)
            await self.ext_proc.start(host, options.grpc_port)
            async with asyncio.TaskGroup() as tasks:
                loops = [self.scraper.run(), self.ext_proc.run(), self.health_server.run(), forever(self._tick, TICK_S)]
                loops += [source.run() for source in self._files]
                if options.check_models:
                    loops.append(self.models.run())
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

    def _admin_token(self) -> str:
        path = self.options.admin_token_file
        try:
            return Path(path).read_text(encoding="utf-8").strip() if path else ""
        except (OSError, UnicodeDecodeError):
            return ""

    def _family(self, endpoint: Endpoint, text: bytes) -> EngineFamily | None:
        return self._families.family(endpoint, text)

    def _metrics_paths(self, endpoint: Endpoint) -> Iterable[str]:
        return self._families.paths(endpoint)

    def _restarted(self, endpoint: Endpoint) -> None:
        self.policy.restarted(endpoint)
        self.outliers.restarted(endpoint)

    def _plugins(self) -> Iterable[Plugin]:
        return self.policy.built.plugins.values()

    def _tick(self) -> None:
        self.policy.tick()
        self.outliers.tick()

    def _limit_hit(self, name: str) -> None:
        self.metrics.limit_hits[name] += 1

    def _log_ready(self) -> None:
        fields = {
            "version": __version__,
            "transport": self.options.transport,
            "tls": self.options.secure_serving,
            "grpc_port": self.ext_proc.port,
            "grpc_health_port": self.health_server.port,
            "metrics_port": self.http.port,
            "endpoints": len(self.datastore.endpoints),
            "healthy": len([e for e in self.datastore.endpoints.values() if e.healthy]),
        }
        _log.info("serving", extra={"fields": fields})


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


def _collect_rarely() -> None:
    """What start-up made lives as long as the process: keep the garbage collector from walking it again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
