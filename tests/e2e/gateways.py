"""Envoys set up in many ways: one process, one listener a `Way`, each way with clusters of its own.

What `epp.envoy.bootstrap` makes is the start; a way changes of it what it is about. Beside it, the engines that only these ways need.
"""

from __future__ import annotations

import asyncio
import json
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import betterproto2
import h2.config
import h2.connection
import h2.events
import yaml
from programs import LOOPBACK, POLL_S, START_S, Picker, Program, free_port

from epp.envoy import Destination, EnvoyOptions
from epp.envoy.bootstrap import EPP_CLUSTER, POOL_CLUSTER, SUBSET_NAMESPACE, build_bootstrap
from epp.envoy.supervisor import find_envoy, fitted, lifeline
from epp.types import Address

FULL_DUPLEX = "FULL_DUPLEX_STREAMED"
STREAMED = "STREAMED"
BUFFERED = "BUFFERED"
PARTIAL = "BUFFERED_PARTIAL"
NONE = "NONE"
BUFFER_BYTES = 16 << 20
HTTP2_WINDOW_BYTES_MIN = 65_535
HTTP_FILTER = "envoy.filters.http."
TYPE = "type.googleapis.com/"
PROTOCOL_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"


def free_addresses(count: int) -> list[Address]:
    """No two alike."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return [Address(LOOPBACK, port) for port in ports]


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a listener takes requests to the picker and on to an engine."""

    pickers: tuple[Address, ...]
    """One ext_proc filter each, in this order."""
    endpoints: tuple[Address, ...] = ()
    """What Envoy's cluster holds; none where the destination is read from the header."""
    subset: tuple[Address, ...] = ()
    """The picker may choose among these only; none: among all it knows."""
    destination: Destination = Destination.ORIGINAL_DST
    request: str = FULL_DUPLEX
    response: str = FULL_DUPLEX
    response_trailers: bool = True
    """The picker is shown them. Without, and without response bodies, Envoy ends the picker's stream with the response headers."""
    processor: Mapping[str, Any] = field(default_factory=dict)
    """More fields of the ext_proc filter."""
    picker_cluster: Mapping[str, Any] = field(default_factory=dict)
    """More fields of the cluster the picker is in."""
    picker_tls: bool = False
    buffer_bytes: int = BUFFER_BYTES
    """Envoy's read-ahead, and the largest body it holds: to have it whole, or for a retry."""
    tells_served: bool = True
    """The picker hears which endpoint served a request. Without it, it can't learn from Envoy that one is dead."""
    upgrades: bool = False
    """Websockets are let through."""
    http2_engines: bool = False

    def configuration(self, name: str, listen: Address) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Its listener and its clusters, all named after it."""
        filters, clusters = [], []
        for number, picker in enumerate(self.pickers):
            options = EnvoyOptions(
                listen=listen, endpoints=self.endpoints, epp=picker, epp_tls=self.picker_tls, destination=self.destination
            )
            config = build_bootstrap(fitted(options)).to_dict(casing=betterproto2.Casing.SNAKE)["static_resources"]
            (listener,) = config["listeners"]
            found = {cluster["name"]: cluster for cluster in config["clusters"]}
            manager = _manager(listener)
            (processor,) = (item for item in manager["http_filters"] if item["name"] == HTTP_FILTER + "ext_proc")
            self._change_processor(processor["typed_config"], f"{name}-{EPP_CLUSTER}-{number}")
            filters.append(processor)
            clusters.append(found[EPP_CLUSTER] | {"name": f"{name}-{EPP_CLUSTER}-{number}"} | self.picker_cluster)
        pool = found[POOL_CLUSTER] | {"name": f"{name}-{POOL_CLUSTER}"}
        if self.http2_engines:
            pool["typed_extension_protocol_options"][PROTOCOL_OPTIONS]["explicit_http_config"] = {"http2_protocol_options": {}}
        strip, *_, router = manager["http_filters"]
        manager["http_filters"] = [strip, *self._subset_hint(), *filters, router]
        manager["http2_protocol_options"] = {"initial_stream_window_size": max(self.buffer_bytes, HTTP2_WINDOW_BYTES_MIN)}
        if self.upgrades:
            manager["upgrade_configs"] = [{"upgrade_type": "websocket"}]
        (host,) = manager["route_config"]["virtual_hosts"]
        host["request_body_buffer_limit"] = self.buffer_bytes  # the larger of this and the listener's counts
        host["routes"][0]["route"]["cluster"] = pool["name"]
        return listener | {"name": name, "per_connection_buffer_limit_bytes": self.buffer_bytes}, [pool, *clusters]

    def _change_processor(self, config: dict[str, Any], cluster: str) -> None:
        config["processing_mode"] |= {
            "request_body_mode": self.request,
            "response_body_mode": self.response,
            "response_trailer_mode": "SEND" if self.response_trailers else "SKIP",
        }
        config["grpc_service"]["envoy_grpc"]["cluster_name"] = cluster
        if not self.tells_served:
            del config["response_attributes"]
            config["metadata_options"]["forwarding_namespaces"] = {"untyped": [SUBSET_NAMESPACE]}
        config |= self.processor

    def _subset_hint(self) -> list[dict[str, Any]]:
        if not self.subset:
            return []
        allowed = {"x-gateway-destination-endpoint-subset": [str(address) for address in self.subset]}
        config = {
            "@type": TYPE + "envoy.extensions.filters.http.set_metadata.v3.Config",
            "metadata": [{"metadata_namespace": SUBSET_NAMESPACE, "value": allowed}],
        }
        return [{"name": HTTP_FILTER + "set_metadata", "typed_config": config}]


def _manager(listener: dict[str, Any]) -> dict[str, Any]:
    manager: dict[str, Any] = listener["filter_chains"][0]["filters"][0]["typed_config"]
    return manager


class Envoy(Program):
    """One Envoy with a listener for each of `ways`; `envoy[name]` is where that one listens."""

    def __init__(self, ways: Mapping[str, Way]) -> None:
        self._addresses = dict(zip(ways, free_addresses(len(ways)), strict=True))
        listeners: list[dict[str, Any]] = []
        clusters: list[dict[str, Any]] = []
        for name, way in ways.items():
            listener, its_clusters = way.configuration(name, self._addresses[name])
            listeners.append(listener)
            clusters += its_clusters
        self._directory = tempfile.TemporaryDirectory(prefix="epp-envoy-")
        config = Path(self._directory.name, "envoy.yaml")
        config.write_text(yaml.safe_dump({"static_resources": {"listeners": listeners, "clusters": clusters}}))
        flags = ("--use-dynamic-base-id", "--disable-hot-restart", "--concurrency", "1", "--log-level", "warning")
        super().__init__(command=tuple(lifeline([str(find_envoy()), "-c", str(config), *flags])))

    def __exit__(self, *reason: object) -> None:
        try:
            super().__exit__(*reason)
        finally:
            self._directory.cleanup()

    def __getitem__(self, name: str) -> Address:
        return self._addresses[name]

    def await_ready(self) -> None:
        deadline = time.monotonic() + START_S
        for address in self._addresses.values():
            while True:
                try:
                    socket.create_connection(address, timeout=START_S).close()
                except OSError:
                    assert self.process.poll() is None, f"exit code {self.process.returncode}\n{self!r}"
                    assert time.monotonic() < deadline, f"not listening within {START_S:g} s\n{self!r}"
                    time.sleep(POLL_S)
                else:
                    break


class FilePicker(Picker):
    """`epp serve` with its endpoints in a file, their readings taken from `metrics_from`, and plugins of somebody else's.

    So an endpoint can be thought well while nobody listens there, and an engine of a few lines needs no /metrics.
    """

    def __init__(
        self, endpoints: Sequence[Address], metrics_from: Address, *flags: str, directory: Path, plugins: Mapping[str, str] | None = None
    ) -> None:
        """`plugins`: module -> its source."""
        file = directory / "endpoints.json"
        known = [
            {"name": f"engine-{number}", "address": endpoint.host, "port": str(endpoint.port), "metricsPort": str(metrics_from.port)}
            for number, endpoint in enumerate(endpoints)
        ]
        file.write_text(json.dumps({"endpoints": known}))
        for module, source in (plugins or {}).items():
            (directory / f"{module}.py").write_text(source)
        super().__init__((), "--endpoints-file", str(file), *flags)
        self.arguments = ("env", f"PYTHONPATH={directory}", *self.arguments)


# --- engines that speak something else than a request and its answer


@asynccontextmanager
async def upgrading_engine(address: Address) -> AsyncIterator[None]:
    """Takes every Upgrade and says back, in capitals, whatever it hears."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            if b"upgrade: websocket" not in head.lower():
                writer.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
                return
            writer.write(b"HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\r\n")
            while heard := await reader.read(1 << 16):
                writer.write(heard.upper())
                await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            return
        finally:
            writer.close()

    async with _serving(address, connected):
        yield


@asynccontextmanager
async def grpc_engine(address: Address) -> AsyncIterator[None]:
    """A bidirectional gRPC method: every piece of a body is said back as it comes; `grpc-status: 0` at the end."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        connection.initiate_connection()
        try:
            writer.write(connection.data_to_send())
            while data := await reader.read(1 << 16):
                for event in connection.receive_data(data):
                    if isinstance(event, h2.events.RequestReceived):
                        connection.send_headers(event.stream_id, [(":status", "200"), ("content-type", "application/grpc")])
                    elif isinstance(event, h2.events.DataReceived):
                        connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                        connection.send_data(event.stream_id, event.data)
                    elif isinstance(event, h2.events.StreamEnded):
                        connection.send_headers(event.stream_id, [("grpc-status", "0")], end_stream=True)
                writer.write(connection.data_to_send())
                await writer.drain()
        except OSError:
            return
        finally:
            writer.close()

    async with _serving(address, connected):
        yield


@asynccontextmanager
async def silent_engine(address: Address) -> AsyncIterator[None]:
    """Takes every connection, reads whatever comes, and never answers."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.read(1 << 16):
                pass
        except OSError:
            return
        finally:
            writer.close()

    async with _serving(address, connected):
        yield


@asynccontextmanager
async def _serving(address: Address, connected: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]) -> AsyncIterator[None]:
    server = await asyncio.start_server(connected, *address)
    async with server:
        yield
