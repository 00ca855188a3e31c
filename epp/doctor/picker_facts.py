"""What there is to know of a running picker, and the probes that find it out. What follows from it: picker_checks, engine_checks."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from google.protobuf.message import DecodeError

from epp.config.load import load
from epp.config.schema import EndpointPickerConfig
from epp.doctor import exchange
from epp.doctor.engine_facts import EndpointFacts, EngineFacts, ask_engines
from epp.doctor.exchange import Exchange
from epp.doctor.grpc_client import Connection, GrpcError, HostPort, PortFacts, connected, look_at
from epp.doctor.http_fetch import Answer, Http, read_json
from epp.doctor.probing import Missing, Probe, ProbeError
from epp.errors import ConfigError
from epp.extproc.health import SERVICES, check_request, is_serving
from epp.extproc.server import HEALTH_CHECK
from epp.plugins.registry import Registry

EXCHANGES = 5
"""Of which the median time is told."""


@dataclass(slots=True, kw_only=True)
class Running:
    """The plugins a picker says it runs: name -> type."""

    plugins: Mapping[str, str] = field(default_factory=dict)


class _Row(msgspec.Struct):
    name: str
    address: str
    state: str
    engine: str = ""
    reading_age_s: float | None = None


class _Rows(msgspec.Struct):
    """What `/debug/endpoints` answers, as far as it matters here."""

    endpoints: list[_Row]


class _State(msgspec.Struct):
    type: str = ""


class _States(msgspec.Struct):
    """What `/debug/plugins/state` answers."""

    plugins: dict[str, _State]


class PickerProbes:
    """See the module. `endpoints`: named on the command line, beside those the picker names."""

    def __init__(
        self,
        http: Http,
        *,
        now_s: Callable[[], float],
        target: HostPort | None,
        health: HostPort | None,
        metrics_url: str,
        endpoints: Sequence[tuple[str, HostPort]],
        model: str,
        config_file: str,
        client_cert_path: str,
        allow_experimental: bool,
    ) -> None:
        """`now_s`: monotonic."""
        self._http = http
        self._now_s = now_s
        self._target = target
        self._health = health
        self._base = re.sub(r"/metrics$", "", metrics_url.rstrip("/"))
        self._endpoints = endpoints
        self._model = model
        self._config_file = config_file
        self._client_cert_path = client_cert_path
        self._allow_experimental = allow_experimental

    def probes(self) -> list[Probe]:
        return [
            Probe("port", "the ext_proc port", self._port),
            Probe("health", "health on the ext_proc port", self._health_of, needs=("port",)),
            Probe("health_port", "the health port", self._other_port),
            Probe("other_health", "health on the health port", self._health_of, needs=("health_port",)),
            Probe("metrics", "the picker's /metrics", self._metrics),
            Probe("endpoints", "the picker's endpoints", self._known_endpoints),
            Probe("running", "the picker's plugins", self._running),
            Probe("config", "the configuration file", self._config),
            Probe("engines", "the model servers", self._engines, needs=("endpoints",)),
            Probe("full_duplex", "where a request would go (FULL_DUPLEX_STREAMED)", self._full_duplex, needs=("port",), hopes=("engines",)),
            Probe("buffered", "where a request would go (BUFFERED)", self._buffered, needs=("port",), hopes=("engines",)),
            Probe("clocks", "the clocks", self._clocks, hopes=("metrics", "engines")),
        ]

    async def _port(self) -> PortFacts:
        if self._target is None:
            raise ProbeError("give --target HOST:9002, the picker's ext_proc port")
        return await look_at(self._target, self._client_cert_path)

    async def _other_port(self) -> PortFacts:
        if self._health is None:
            raise ProbeError("give --health HOST:9003, the picker's health port")
        return await look_at(self._health)

    async def _health_of(self, port: PortFacts) -> dict[str, str]:
        """Service -> SERVING, NOT_SERVING or what the call ended with."""
        found = {}
        async with self._connected(port) as connection:
            for service in SERVICES:
                try:
                    serving = is_serving(await connection.unary(HEALTH_CHECK.decode(), check_request(service)))
                    found[service] = "SERVING" if serving else "NOT_SERVING"
                except GrpcError as error:
                    found[service] = str(error)
                except DecodeError:
                    found[service] = "something else than a health status"
        return found

    async def _metrics(self) -> Answer:
        return await self._http.get(f"{self._metrics_base()}/metrics", authorized=True)

    async def _known_endpoints(self) -> list[EndpointFacts]:
        given = [EndpointFacts(name=name, address=str(address), known_to_picker=False) for name, address in self._endpoints]
        if not self._base and given:
            return given
        listed = read_json(await self._http.get(f"{self._metrics_base()}/debug/endpoints", authorized=True), _Rows).endpoints
        known = [
            EndpointFacts(name=row.name, address=row.address, state=row.state, engine=row.engine, reading_age_s=row.reading_age_s)
            for row in listed
        ]
        addresses = {endpoint.address for endpoint in known}
        return known + [endpoint for endpoint in given if endpoint.address not in addresses]

    async def _running(self) -> Running:
        states = read_json(await self._http.get(f"{self._metrics_base()}/debug/plugins/state", authorized=True), _States).plugins
        return Running(plugins={name: about.type for name, about in states.items()})

    async def _config(self) -> EndpointPickerConfig:
        if not self._config_file:
            raise ProbeError("give --config-file FILE, the picker's configuration")
        try:
            text = await asyncio.to_thread(Path(self._config_file).read_text, encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ProbeError(f"{self._config_file} can't be read: {error}", fault=True) from None
        try:
            return load(text, source=self._config_file, catalogue=Registry(), allow_experimental=self._allow_experimental)
        except ConfigError as error:
            raise ProbeError(
                f"`epp check {self._config_file}` finds {len(error.problems)} faults: {error.problems[0]}", fault=True
            ) from None

    async def _engines(self, endpoints: Sequence[EndpointFacts]) -> list[EngineFacts]:
        return await ask_engines(self._http, endpoints)

    async def _full_duplex(self, port: PortFacts, engines: Sequence[EngineFacts] | Missing) -> Exchange:
        """The median of several; the first that goes wrong instead."""
        answers: list[Exchange] = []
        async with self._connected(port) as connection:
            while len(answers) < EXCHANGES:
                answers.append(await exchange.ask(connection, exchange.FULL_DUPLEX, self._model or _some_model(engines), self._now_s))
                if answers[-1].header is None or answers[-1].silent_after or answers[-1].error:
                    return answers[-1]
        return sorted(answers, key=lambda answer: answer.latency_s)[EXCHANGES // 2]

    async def _buffered(self, port: PortFacts, engines: Sequence[EngineFacts] | Missing) -> Exchange:
        async with self._connected(port) as connection:
            return await exchange.ask(connection, exchange.BUFFERED, self._model or _some_model(engines), self._now_s)

    @contextlib.asynccontextmanager
    async def _connected(self, port: PortFacts) -> AsyncIterator[Connection]:
        _must_be_open(port)
        try:
            async with connected(port, self._client_cert_path) as connection:
                yield connection
        except GrpcError as error:
            raise ProbeError(f"{port.address}: {error}", fault=True) from None

    async def _clocks(self, metrics: Answer | Missing, engines: Sequence[EngineFacts] | Missing) -> dict[str, float]:
        """Who -> their clock less ours, where they tell."""
        found = {}
        if isinstance(metrics, Answer) and metrics.skew_s is not None:
            found["the picker"] = metrics.skew_s
        if not isinstance(engines, Missing):
            found |= {f"endpoint {engine.name}": engine.skew_s for engine in engines if engine.skew_s is not None}
        if not found:
            raise ProbeError("nobody told the time: neither the picker's nor an engine's HTTP port could be asked")
        return found

    def _metrics_base(self) -> str:
        if not self._base:
            raise ProbeError("give --metrics URL, the picker's metrics port (http://HOST:9090)")
        return self._base


def _must_be_open(port: PortFacts) -> None:
    if port.error:
        raise ProbeError(f"{port.address} can't be reached: {port.error}", fault=True)
    if port.ends_at_once:
        raise ProbeError(f"{port.address} wants a client certificate: give --client-cert-path DIR")


def _some_model(engines: Sequence[EngineFacts] | Missing) -> str:
    """One that an engine serves, so that the picker does not answer 404."""
    if isinstance(engines, Missing):
        return "epp-doctor"
    return next((min(engine.models) for engine in engines if engine.models), "epp-doctor")
