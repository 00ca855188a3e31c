"""The composition root: builds every object once, runs them in one TaskGroup, stops them in order.

Stopping: SIGTERM turns health NOT_SERVING and keeps serving for `--drain-timeout`, so that gateways stop sending before the door
closes; then the listener closes, streams in flight get `GRACE_S`, everything ends. SIGINT, and a second signal, skip the wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from epp import __version__
from epp.admission.outlook import outlook
from epp.aio import forever
from epp.clock import Clock, MonotonicClock
from epp.cluster import Cluster, needs_cluster, pools_of
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
from epp.extproc.h2_policy import H2Limits
from epp.extproc.health import Health
from epp.extproc.limits import Limits
from epp.extproc.server import H2Server, listen_problem
from epp.extproc.session import Session
from epp.kv_routing import KvRouting
from epp.observe.metrics import Metrics
from epp.outliers import Outliers
from epp.plugins.base import Plugin
from epp.plugins.registry import Registry
from epp.policy import Policy
from epp.pools import Pools
from epp.ports import ext_proc_server, metrics_tls
from epp.process import Signals, collect_rarely
from epp.queueing import Queueing
from epp.sources.config_file import ConfigFile
from epp.sources.files import FileSource
from epp.sources.resources import ResourcesFile
from epp.sources.static import parse_endpoints
from epp.sources.watched_file import WatchedFile
from epp.types import Endpoint

_log = logging.getLogger("epp.app")

GRACE_S = 10.0
"""For streams in flight once the listener is closed."""
FIRST_SYNC_S = 5.0
"""Start-up waits at most this long for the API server; then it serves, NOT_SERVING to health until the pools are known."""
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
        self.datastore = Datastore(clock)
        self.outliers = Outliers(self.datastore, clock)
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
        self.director: Director | None = None
        self._files: list[WatchedFile] = []
        self._read_config(options)
        endpoints_file = options.endpoints_file or self.policy.built.discovery_path
        self.pools = Pools(pools_of(options, rng, named_here=bool(endpoints_file or options.endpoints)))
        self.datastore.serve(self.pools.all[0].name, [pool.name for pool in self.pools] if self.pools.several else ())
        self.resources = self.pools.all[0].resources
        self.metrics.models.always = lambda: self.pools.names_rewritten
        self.health = Health(
            live=lambda: self.pools.live,
            protocol_matches=lambda: all(self.policy.reads(pool.app_protocol) for pool in self.pools),
            plugins_ready=self.policy.plugins_ready,
        )
        self._read_endpoints(options, endpoints_file)
        self.cluster: Cluster | None = None
        if needs_cluster(options, self.pools.all):
            self.cluster = Cluster(options, self.pools.all, self.datastore, clock, rng, leading=self._leading, limit_hit=self._limit_hit)
            self.metrics.cluster = self.cluster.source
            if self.cluster.elector is not None:
                self._leading(leading=False)
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
        if self.metrics.cluster is not None:
            self.metrics.polls |= {"kubernetes": self.metrics.cluster}
        decisions = Decisions(clock, options.debug_decisions) if options.debug_decisions else None
        self.director = Director(
            self.datastore,
            self.policy.built.scheduler,
            self.policy.routes,
            self.metrics,
            clock,
            resources=self.resources,
            pools=self.pools,
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
        self.queueing = Queueing(self.policy, self.datastore, self.director.candidates, clock, rng)
        try:
            self.kv_routing = KvRouting(self.datastore, clock, rng, plugins.values(), engine=self.scraper.engine, limit_hit=self._limit_hit)
        except ValueError as error:
            raise ConfigError("configuration", [Problem("plugins", str(error))]) from None
        self.director.stages = (*self.kv_routing.stages, *self.queueing.stages)
        self.queueing.follow(self.director, self._priorities())
        self.metrics.parts += [self.queueing.families, self.kv_routing.families]
        self._reloaders: list[tls.Reloader] = []
        self._make_servers(options, clock, self.director, decisions)

    def _make_servers(self, options: ServeOptions, clock: Clock, director: Director, decisions: Decisions | None) -> None:
        """The three ports. Raises ConfigError or StartError."""
        if options.admin_token_file and not self._admin_token():
            _log.warning("the admin token can't be read, or is empty: nobody has it", extra={"fields": {"file": options.admin_token_file}})
        limits = H2Limits(
            message_bytes_max=options.max_body_bytes + MEBIBYTE,
            streams_max=options.max_streams,
            connections_max=options.max_connections,
            keepalive_s=options.keepalive_s,
        )

        pools = self.pools

        def new_session(authority: bytes) -> Session:
            pool = pools.of(authority.decode("latin-1")) if pools.several else ""
            return Session(director, self.session_limits, clock, pool)

        self.ext_proc, reloader = ext_proc_server(
            options, health=self.health, limits=limits, session_limits=self.session_limits, clock=clock, new_session=new_session
        )
        self._reloaders += [reloader] if reloader is not None else []
        self.health_server = H2Server(health=self.health, session_limits=self.session_limits, limits=limits, clock=clock)
        if self.queueing.flow is not None:
            director.outlook = partial(outlook, self.queueing.flow)
        reviewer = self.cluster.reviewer if self.cluster is not None else None
        context, reloader = metrics_tls(options)
        self._reloaders += [reloader] if reloader is not None else []
        self.http = HttpServer(
            self.metrics,
            director,
            decisions,
            self._plugins,
            datastore=self.datastore,
            engine=self.scraper.engine,
            debug=options.enable_debug_endpoints,
            admin_token=self._admin_token,
            listen_problem=listen_problem,
            authorize=reviewer.allowed if reviewer is not None else None,
            tls=context,
            tokens=self.kv_routing.tokens.inquire,
        )

    def _read_config(self, options: ServeOptions) -> None:
        """The policy, for the first time. Raises ConfigError."""
        if options.config_file and options.config_text:
            raise ConfigError("command line", [Problem("--config-file", "can't be used together with --config-text")])
        if options.config_file:
            self.metrics.config_reloads.update(applied=0, rejected=0)  # a counter born with its first count hides that one from `increase`
            config = ConfigFile(Path(options.config_file), self.policy.apply, self.metrics.config_reloads)
            config.load()
            if options.config_reload:
                self._files.append(config)
        else:
            self.policy.apply(options.config_text, "--config-text")

    def _read_endpoints(self, options: ServeOptions, endpoints_file: str) -> None:
        """Model servers and resources that flags and files name. Raises ConfigError."""
        if endpoints_file:
            if options.endpoints:
                raise ConfigError("command line", [Problem("--endpoint", "can't be used together with --endpoints-file or file-discovery")])
            self._files.append(FileSource(Path(endpoints_file), self.datastore))
            self._files[-1].load()
        elif options.endpoints:
            self.datastore.apply(parse_endpoints(options.endpoints))
        elif not (options.pool_names or options.endpoint_selector):
            message = "at least one, or --endpoints-file, or in a cluster --pool-name or --endpoint-selector, is needed"
            raise ConfigError("command line", [Problem("--endpoint", message)])
        elif options.pool_names and options.resources_file:
            message = "can't be used together with --pool-name: the cluster has these objects"
            raise ConfigError("command line", [Problem("--resources-file", message)])
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
        self.director.stages = (*self.kv_routing.follow(built.plugins.values()), *self.queueing.stages)
        self.queueing.follow(self.director, self._priorities())
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
            if self.cluster is not None:
                stack.push_async_callback(self.cluster.close)
            await self.http.start(host, options.metrics_port)
            stack.push_async_callback(self.http.stop)
            await self.health_server.start(host, options.grpc_health_port)
            stack.push_async_callback(self.health_server.stop, 0)
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(loop) for loop in self.cluster.watches()] if self.cluster is not None else []
                try:
                    if self.cluster is not None:
                        await self.cluster.first_sync(FIRST_SYNC_S)
                    await self.kv_routing.start()
                    await self.scraper.first_round(FIRST_ROUND_S)
                    await self.ext_proc.start(host, options.grpc_port)
                    running += [tasks.create_task(loop) for loop in self._loops()]
                    self.health.ready = True
                    collect_rarely()
                    self._log_ready()
                    yield
                except StartError as error:  # kept out of the task group, which would wrap it
                    failure = error
                finally:
                    self.health.draining = True  # also after a crash: nobody is to come while the port closes
                    self.session_limits.closing = True
                    await asyncio.gather(self.ext_proc.stop(GRACE_S), self._step_down())
                    for task in running:
                        task.cancel()
        if failure is not None:
            raise failure

    def _loops(self) -> Iterator[Coroutine[Any, Any, None]]:
        yield self.scraper.run()
        yield self.ext_proc.run()
        yield self.health_server.run()
        yield forever(self._tick, TICK_S)
        yield self.kv_routing.run()
        for source in self._files:
            yield source.run()
        if self.options.check_models:
            yield self.models.run()
        for reloader in self._reloaders:
            yield forever(reloader.once, tls.RELOAD_S)
        if self.cluster is not None:
            yield from self.cluster.elections()

    async def drain(self, hurry: asyncio.Event) -> None:
        """Say NOT_SERVING, let another replica lead, and go on serving for the drain time, or until told to hurry."""
        self.health.draining = True
        self.queueing.close(self.options.queued_at_shutdown)
        _log.info("draining", extra={"fields": {"seconds": self.options.drain_timeout_s}})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.options.drain_timeout_s), asyncio.TaskGroup() as tasks:
                stepping_down = tasks.create_task(self._step_down())
                await hurry.wait()
                stepping_down.cancel()

    async def _step_down(self) -> None:
        if self.cluster is not None:
            await self.cluster.step_down()

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
        self.queueing.provision(self._priorities())

    def _leading(self, leading: bool) -> None:
        self.health.leading = leading
        self.metrics.leading = leading

    def _priorities(self) -> set[int]:
        return set().union(*(pool.resources.priorities for pool in self.pools))

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


async def serve(options: ServeOptions) -> int:
    """`epp serve`: the picker alone, until told to stop. Returns the exit code."""
    picker = Picker(options)
    with Signals() as signals:
        async with picker.serving():
            await signals.stop.wait()
            await picker.drain(signals.hurry)
    return signals.exit_code
