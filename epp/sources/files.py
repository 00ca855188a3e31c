"""Endpoints from a file (`--endpoints-file`), read again when it changes: running without Kubernetes, or under any tool that writes files.

    endpoints:
    - name: a
      address: 10.0.0.1
      port: "8000"
      labels: {zone: west}     # optional, as are namespace (default) and metricsPort

A change is a change of (mtime, size, inode): an atomic rename and the symlink swap of a Kubernetes ConfigMap are seen like an edit in
place. A file that is gone or wrong keeps the endpoints that were; it is told once, not every second.

Not here: what becomes of endpoints (datastore). Cost: one `stat` a second; a change is read on the event loop, about 50 ms for 1 000
endpoints in YAML, 8 ms in JSON.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
from pathlib import Path
from typing import Any

from epp.aio import Sleep, forever
from epp.config.document import DOCUMENT_BYTES_MAX, parse
from epp.config.walk import Walk, kind
from epp.datastore import Datastore
from epp.errors import ConfigError, Problem
from epp.sources.static import duplicates, name_fault
from epp.types import Address, EndpointSpec

INTERVAL_S = 1.0
PROBLEMS_LOGGED_MAX = 50
"""Problems of a rejected file in its one line of log."""
_FIELDS = ("name", "namespace", "address", "port", "labels", "metricsPort")

_log = logging.getLogger(__name__)

Signature = tuple[int, int, int]


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
    if not (name and host and port):
        return None
    metrics_address = Address(host, metrics_port) if metrics_port else None
    return EndpointSpec(name=name, address=Address(host, port), namespace=namespace, labels=labels, metrics_address=metrics_address)


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


class FileSource:
    """Keeps a datastore's endpoints as the file says."""

    def __init__(self, path: Path, datastore: Datastore, *, interval_s: float = INTERVAL_S, sleep: Sleep = asyncio.sleep) -> None:
        self.poll_errors_total = 0
        self.loads_total = 0
        self._path = path
        self._datastore = datastore
        self._interval_s = interval_s
        self._sleep = sleep
        self._seen: Signature | None = None
        """Of the file as last tried, good or bad; None while it can't be read."""
        self._unreadable = ""
        """Why it could not be read the last time; told once."""

    def load(self) -> None:
        """The first load. Raises ConfigError: starting without knowing a single endpoint helps nobody."""
        try:
            self._load()
        except OSError as error:
            raise ConfigError(str(self._path), [Problem("", error.strerror or str(error))]) from error

    def once(self) -> bool:
        """Load the file again if it changed. True if the endpoints are now as it says."""
        try:
            if _signature(os.stat(self._path)) == self._seen:  # noqa: PTH116 - the cheap call, made every second
                return False
            self._load()
        except OSError as error:
            reason = error.strerror or str(error)
            self._seen = None
            if reason != self._unreadable:
                self._rejected(reason)
            self._unreadable = reason
            return False
        except ConfigError as error:
            told = [str(problem) for problem in error.problems[:PROBLEMS_LOGGED_MAX]]
            left_out = len(error.problems) - len(told)
            self._rejected("; ".join(told) + (f"; and {left_out} more" if left_out else ""))
            return False
        _log.info("endpoints file loaded", extra={"fields": {"file": str(self._path), "endpoints": len(self._datastore.endpoints)}})
        return True

    async def run(self) -> None:
        """Until cancelled."""
        await forever(self.once, self._interval_s, self._sleep)

    def _load(self) -> None:
        with self._path.open("rb") as file:
            self._seen = _signature(os.fstat(file.fileno()))  # of what is read, whatever the name stands for by now
            self._unreadable = ""
            content = file.read(DOCUMENT_BYTES_MAX + 1)
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            raise ConfigError(str(self._path), [Problem("", f"is not UTF-8: {error}")]) from None
        specs = parse_endpoints_file(text, source=str(self._path))
        try:
            self._datastore.apply(specs)
        except ValueError as error:
            raise ConfigError(str(self._path), [Problem("endpoints", str(error))]) from None
        self.loads_total += 1

    def _rejected(self, problems: str) -> None:
        self.poll_errors_total += 1
        _log.warning(
            "endpoints file rejected; keeping the endpoints there are", extra={"fields": {"file": str(self._path), "problems": problems}}
        )


def _signature(status: os.stat_result) -> Signature:
    return status.st_mtime_ns, status.st_size, status.st_ino
