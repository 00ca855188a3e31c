"""Where Envoy's configuration comes from: a file, or the admin port's /config_dump; and what the ports of the picker's cluster speak."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import yaml

from epp.doctor.envoy_config import EnvoyFacts, addresses, understand
from epp.doctor.grpc_client import HostPort, PortFacts, look_at
from epp.doctor.http_fetch import Http
from epp.doctor.probing import Probe, ProbeError

FILE_BYTES_MAX = 64 << 20
PICKER_ADDRESSES_MAX = 8


class EnvoyProbes:
    """See the module."""

    def __init__(self, http: Http, *, admin_url: str, file: str, cluster: str, target: HostPort | None, client_cert_path: str) -> None:
        self._http = http
        self._admin_url = admin_url.rstrip("/")
        self._file = file
        self._cluster = cluster
        self._target = target
        self._client_cert_path = client_cert_path

    def probes(self) -> list[Probe]:
        return [
            Probe("envoy", "Envoy's configuration", self._configuration),
            Probe("picker_ports", "the ports of the picker's cluster", self._ports, needs=("envoy",)),
        ]

    async def _configuration(self) -> EnvoyFacts:
        if self._file:
            source, text = self._file, await asyncio.to_thread(self._read)
        elif self._admin_url:
            answer = await self._http.get(f"{self._admin_url}/config_dump")
            if answer.status != 200:
                raise ProbeError(f"{answer.url} answers {answer.status}: is it Envoy's admin port?", fault=True)
            source, text = answer.url, answer.body
        else:
            raise ProbeError("give --envoy-admin URL or --envoy-config FILE")
        return await asyncio.to_thread(self._understood, source, text)

    def _read(self) -> bytes:
        try:
            with Path(self._file).open("rb") as file:
                data = file.read(FILE_BYTES_MAX + 1)
        except OSError as error:
            raise ProbeError(f"{self._file}: {error.strerror}", fault=True) from None
        if len(data) > FILE_BYTES_MAX:
            raise ProbeError(f"{self._file} is longer than {FILE_BYTES_MAX} bytes", fault=True)
        return data

    def _understood(self, source: str, text: bytes) -> EnvoyFacts:
        try:
            document = msgspec.json.decode(text) if text.lstrip()[:1] == b"{" else yaml.safe_load(text)
            return understand(document, source=source, target=self._target, cluster=self._cluster)
        except (ValueError, yaml.YAMLError, RecursionError) as error:
            raise ProbeError(f"{source} is not understood: {' '.join(str(error).split())[:200]}", fault=True) from None

    async def _ports(self, envoy: EnvoyFacts) -> dict[HostPort, PortFacts]:
        wanted = dict.fromkeys(address for way in envoy.ways for address in addresses(way.picker))
        return {address: await look_at(address, self._client_cert_path) for address in list(wanted)[:PICKER_ADDRESSES_MAX]}
