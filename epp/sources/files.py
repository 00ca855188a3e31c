"""Endpoints from a file (`--endpoints-file`), read again when it changes: running without Kubernetes, or under any tool that writes files.

    endpoints:
    - name: a
      address: 10.0.0.1
      port: "8000"
      labels: {zone: west}     # optional, as are namespace (default) and metricsPort
      draining: true           # optional: no new requests, those it has are finished

Not here: noticing changes (watched_file), what becomes of endpoints (datastore). Cost: a change is read on the event loop, about 50 ms
for 1 000 endpoints in YAML, 8 ms in JSON.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from epp.aio import Sleep
from epp.config.document import parse
from epp.config.walk import Walk, kind
from epp.datastore import Datastore
from epp.errors import ConfigError, Problem
from epp.sources.static import duplicates, name_fault
from epp.sources.watched_file import INTERVAL_S, WatchedFile
from epp.types import Address, EndpointSpec

_FIELDS = ("name", "namespace", "address", "port", "labels", "metricsPort", "draining")


def parse_endpoints_file(text: str, *, source: str) -> list[EndpointSpec]:
    """The endpoints in this text. Raises ConfigError with every fault."""
    document, faults = parse(text)
    walk = Walk(faults)
    specs: list[EndpointSpec] = []
    paths: list[str] = []
    if document is None and not faults:
        walk.fault("", "is empty; write `endpoints: []` for none")
    elif document is not None:
        fields = walk.mapping(document, "", ("endpoints",))
        if "endpoints" not in fields and isinstance(document, dict):
            walk.fault("endpoints", "is missing")
        for i, item in enumerate(walk.items(fields.get("endpoints"), "endpoints")):
            spec = _endpoint(walk, item, f"endpoints[{i}]")
            if spec is not None:
                specs.append(spec)
                paths.append(f"endpoints[{i}]")
    problems = walk.problems + duplicates(specs, paths)
    if problems:
        raise ConfigError(source, problems)
    return specs


def _endpoint(walk: Walk, item: Any, path: str) -> EndpointSpec | None:
    fields = walk.mapping(item, path, _FIELDS)
    if not isinstance(item, dict):
        return None
    name = walk.text(fields.get("name"), f"{path}.name", required=True)
    namespace = walk.text(fields.get("namespace"), f"{path}.namespace") or "default"
    for field, text in (("name", name), ("namespace", namespace)):
        fault = name_fault(text) if text else ""
        if fault:
            walk.fault(f"{path}.{field}", fault)
    host = _host(walk, fields.get("address"), f"{path}.address")
    port = _port(walk, fields.get("port"), f"{path}.port")
    metrics_port = _port(walk, fields["metricsPort"], f"{path}.metricsPort") if "metricsPort" in fields else None
    labels = _labels(walk, fields.get("labels", {}), f"{path}.labels")
    draining = fields.get("draining", False)
    if not isinstance(draining, bool):
        walk.fault(f"{path}.draining", f"must be true or false, not {kind(draining)}")
        return None
    if not (name and host and port):
        return None
    metrics_address = Address(host, metrics_port) if metrics_port else None
    return EndpointSpec(
        name=name, address=Address(host, port), namespace=namespace, labels=labels, metrics_address=metrics_address, draining=draining
    )


def _host(walk: Walk, value: Any, path: str) -> str:
    text = walk.text(value, path, required=True)
    try:
        return str(ipaddress.ip_address(text)) if text else ""
    except ValueError:
        walk.fault(path, f"{text!r} is not an IP address, written without brackets (the destination header takes no host names)")
        return ""


def _port(walk: Walk, value: Any, path: str) -> int:
    """1 to 65535, as a number or as text; 0 after a fault."""
    if value is None:
        walk.fault(path, "is missing")
        return 0
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(text, str) and text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535:
        return int(text)
    walk.fault(path, f"must be 1 to 65535, not {value!r}" if isinstance(value, int | str) else f"must be a port, not {kind(value)}")
    return 0


def _labels(walk: Walk, value: Any, path: str) -> dict[str, str]:
    if not isinstance(value, dict):
        walk.fault(path, f"must be a mapping, not {kind(value)}")
        return {}
    for key, text in value.items():
        if not (isinstance(key, str) and isinstance(text, str)):
            walk.fault(f"{path}.{key}", f"must be a string, not {kind(text if isinstance(key, str) else key)}; put it in quotes")
    return {key: text for key, text in value.items() if isinstance(key, str) and isinstance(text, str)}


class FileSource(WatchedFile):
    """Keeps a datastore's endpoints as the file says."""

    what: ClassVar[str] = "endpoints"

    def __init__(self, path: Path, datastore: Datastore, *, interval_s: float = INTERVAL_S, sleep: Sleep = asyncio.sleep) -> None:
        super().__init__(path, interval_s=interval_s, sleep=sleep)
        self._datastore = datastore

    def _apply(self, text: str) -> Mapping[str, int]:
        specs = parse_endpoints_file(text, source=str(self._path))
        try:
            self._datastore.apply(specs)
        except ValueError as error:
            raise ConfigError(str(self._path), [Problem("endpoints", str(error))]) from None
        return {"endpoints": len(self._datastore.endpoints)}
