"""What fails, and what clients see of it: the picker, Envoy, an engine, a client, a plugin, a certificate. README.md has it as a table."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import signal
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from echo_engine import blob
from gateways import BUFFERED, FULL_DUPLEX, NONE, Envoy, FilePicker, Way, free_addresses, silent_engine
from http_clients import TIMEOUT_S, Answer, Http1, TruncatedError, ask, chat, eventually, scrape, until_idle, until_metrics
from programs import EchoEngine, Engines, Picker, free_port

from epp.envoy import Destination
from epp.extproc.tls import KeyPair, self_signed
from epp.types import Address

pytestmark = pytest.mark.e2e

CHAT = "/v1/chat/completions"
INFLIGHT = "llm_d_epp_inflight_requests"
PLAIN = "--secure-serving=false"
MEGABYTE = 1 << 20
TOKENS = 300
"""More than two seconds of stream."""
FROZEN_S = 3.0
BACK_S = 5.0
"""A picker that is back is used after this at the latest: the loaded machine's allowance, it is at once."""
SLOW_BYTES = 24 * MEGABYTE
SMALL_BYTES = 1 << 16
PICKER_GROWTH_BYTES_MAX = 16 * MEGABYTE
"""Of the picker's memory, for an answer larger than that and a client that does not take it."""
DECISION_TIMEOUT_S = 2.0
TRICKLE_S = 0.2
SCORER_S = 0.05
SLOW_SCORER = f"""
import time
from typing import ClassVar
from epp.plugins.base import Plugin

class Slow(Plugin):
    type: ClassVar[str] = "slow"
    per_request: ClassVar[bool] = True

    def score(self, request, endpoints):
        time.sleep({SCORER_S})
        return [1.0] * len(endpoints)
"""
SLOW_CONFIG = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {type: "slow_scorer:Slow", name: slow}
schedulingProfiles:
- name: default
  plugins: [{pluginRef: slow}]
"""
REQUESTERS = 8


@dataclass
class Requesters:
    """Clients that ask without rest, each on one connection, and check what the engine got."""

    gateway: Address
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    _stopping: bool = False

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Requesters]:
        async with asyncio.TaskGroup() as clients:
            for number in range(REQUESTERS):
                clients.create_task(self._client(number))
            try:
                yield self
            finally:
                self._stopping = True

    async def _client(self, number: int) -> None:
        turn = 0
        while not self._stopping:
            try:
                async with Http1(self.gateway) as client:
                    while not self._stopping:
                        turn += 1
                        body = chat(f"{number} asks for the {turn}th time. " * 50)
                        answer = await client.request("POST", CHAT, body)
                        self.statuses[answer.status] += 1
                        if answer.status != 200:
                            self.wrong.append(repr(answer))
                        elif answer.json["sha256"] != hashlib.sha256(body).hexdigest():
                            self.wrong.append("another body")
            except TruncatedError as error:
                self.wrong.append(str(error))

    async def more(self, count: int) -> None:
        """Until so many more were served."""
        wanted = self.statuses[200] + count
        await eventually(lambda: asyncio.sleep(0, self.statuses[200] >= wanted), f"{count} more requests served")


@contextlib.asynccontextmanager
async def streaming(gateway: Address, *, tokens: int = TOKENS) -> AsyncIterator[tuple[Http1, Any]]:
    """A stream of which the first piece is here: its client, and the pieces to come."""
    async with Http1(gateway) as client, asyncio.timeout(TIMEOUT_S):
        await client.send("POST", CHAT, chat("A long story", max_tokens=tokens, stream=True))
        assert await client.head() == 200
        pieces = client.pieces()
        await anext(pieces)
        yield client, pieces


async def rest(pieces: Any) -> bytes:
    return b"".join([piece async for piece in pieces])


def assert_received(answer: Answer, body: bytes) -> None:
    assert answer.status == 200, answer
    assert (answer.json["length"], answer.json["sha256"]) == (len(body), hashlib.sha256(body).hexdigest())


def resident_bytes(pid: int) -> int:
    found = re.search(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


# --- the picker


@pytest.fixture
def picker_port() -> int:
    return free_port()


def listed(picker: Address, engines: tuple[Address, ...], **fields: Any) -> Way:
    """As Envoy knows the endpoints itself, and can do without the picker if it is let."""
    return Way(pickers=(picker,), endpoints=engines, destination=Destination.OVERRIDE_HOST, **fields)


async def test_a_picker_that_is_killed_and_back(engines: Engines, picker_port: int) -> None:
    flags = (PLAIN, "--grpc-port", str(picker_port))
    is_open = {"failure_mode_allow": True}
    with Picker(engines.addresses, *flags) as first, contextlib.ExitStack() as later:
        ways = {
            "closed": listed(first.epp, engines.addresses),
            "closed, request only": listed(first.epp, engines.addresses, response=NONE, response_trailers=False),
            "closed, response trailers": listed(first.epp, engines.addresses, response=NONE),
            "open": listed(first.epp, engines.addresses, processor=is_open),
            "open, buffered": listed(
                first.epp, engines.addresses, request=BUFFERED, response=NONE, response_trailers=False, processor=is_open
            ),
            "open, by header": Way(pickers=(first.epp,), processor=is_open),
        }
        envoy = later.enter_context(Envoy(ways))
        for name in ways:
            assert (await ask(envoy[name], CHAT, chat("x"))).status == 200

        async with (
            streaming(envoy["closed"]) as (_, watched),
            streaming(envoy["open"]) as (_, watched_open),
            streaming(envoy["closed, response trailers"]) as (_, watched_end),
            streaming(envoy["closed, request only"]) as (_, unwatched),
            Http1(envoy["closed"]) as uploading,
        ):
            await uploading.send("POST", CHAT, headers={"content-length": "1000"})
            await uploading.send_raw(b"x" * 500)
            await until_metrics(first.metrics, lambda now: now.sum(INFLIGHT) == 3, "those whose end it sees are in flight")

            first.kill()
            for pieces in (watched, watched_open, watched_end):
                with pytest.raises(TruncatedError):
                    await rest(pieces)
            assert (await rest(unwatched)).endswith(b"data: [DONE]\n\n")
            assert await uploading.head() == 500

        told = {name: await both(envoy[name]) for name in ways}
        assert told == {
            "closed": (500, 500),
            "closed, request only": (500, 500),
            "closed, response trailers": (500, 500),
            "open": (200, 500),  # what was handed over is lost with the picker
            "open, buffered": (200, 200),
            "open, by header": (503, 500),  # nobody says where to
        }

        second = later.enter_context(Picker(engines.addresses, *flags))
        back_s = time.monotonic()
        for name in ways:

            async def served(gateway: Address = envoy[name]) -> bool:
                return await both(gateway) == (200, 200)

            await eventually(served, f"{name}: requests are served again")
        assert time.monotonic() - back_s < BACK_S
        await until_idle(second.metrics)


async def both(gateway: Address) -> tuple[int, int]:
    """What a GET and a POST are answered."""
    return (await ask(gateway, "/v1/models")).status, (await ask(gateway, CHAT, chat("x"))).status


async def test_a_picker_that_freezes_delays_and_loses_nothing(echo: EchoEngine, engines: Engines) -> None:
    with Picker((echo.address, *engines.addresses), PLAIN) as picker:
        ways = {
            "echo": Way(pickers=(picker.epp,), subset=(echo.address,)),
            "stream": Way(pickers=(picker.epp,), subset=engines.addresses),
        }
        bodies = [chat(f"{number} " * 20_000) for number in range(REQUESTERS)]
        with Envoy(ways) as envoy:
            async with streaming(envoy["stream"]) as (_, pieces):
                picker.process.send_signal(signal.SIGSTOP)
                try:
                    asked = [asyncio.create_task(ask(envoy["echo"], CHAT, body)) for body in bodies]
                    done, _ = await asyncio.wait(asked, timeout=FROZEN_S, return_when=asyncio.FIRST_COMPLETED)
                    assert not done, done
                finally:
                    picker.process.send_signal(signal.SIGCONT)
                for body, answer in zip(bodies, await asyncio.gather(*asked), strict=True):
                    assert_received(answer, body)
                assert (await rest(pieces)).endswith(b"data: [DONE]\n\n")
        await until_idle(picker.metrics)


async def test_a_slow_plugin_delays_everybody_and_fails_nobody(echo: EchoEngine, tmp_path: Path) -> None:
    flags = (PLAIN, "--config-text", SLOW_CONFIG)
    with FilePicker((echo.address,), echo.address, *flags, directory=tmp_path, plugins={"slow_scorer": SLOW_SCORER}) as picker:
        with Envoy({"way": Way(pickers=(picker.epp,))}) as envoy:
            bodies = [chat(f"{number} " * 1_000) for number in range(3 * REQUESTERS)]
            started_s = time.monotonic()
            answers = await asyncio.gather(*(ask(envoy["way"], CHAT, body) for body in bodies))
            assert time.monotonic() - started_s >= SCORER_S * len(bodies)
            for body, answer in zip(bodies, answers, strict=True):
                assert_received(answer, body)
        await until_idle(picker.metrics)


async def test_one_of_two_pickers_drains_and_no_request_fails(echo: EchoEngine) -> None:
    """Envoy's health checks see NOT_SERVING and turn to the other one before the door closes."""
    with Picker((echo.address,), PLAIN, "--drain-timeout", "3s") as one, Picker((echo.address,), PLAIN) as two:
        way = Way(pickers=(one.epp,), picker_cluster=health_checked(one.epp, two.epp))
        with Envoy({"way": way}) as envoy:
            async with Requesters(envoy["way"]).running() as load:
                for picker in (one, two):
                    await until_metrics(picker.metrics, lambda now: now.sum("llm_d_epp_request_total") >= 20, "both at work")
                one.signal(signal.SIGTERM)
                assert await asyncio.to_thread(one.wait) == 0
                await load.more(50)
            assert load.wrong == []
        await until_idle(two.metrics)


def health_checked(*pickers: Address) -> dict[str, Any]:
    members = [{"endpoint": {"address": {"socket_address": {"address": address.host, "port_value": address.port}}}} for address in pickers]
    check = {"timeout": "2s", "interval": "0.2s", "no_traffic_interval": "0.2s", "unhealthy_threshold": 1, "healthy_threshold": 1}
    return {
        "load_assignment": {"cluster_name": "pickers", "endpoints": [{"lb_endpoints": members}]},
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "health_checks": [check | {"grpc_health_check": {"service_name": "envoy.service.ext_proc.v3.ExternalProcessor"}}],
    }


# --- engines


async def test_an_engine_that_dies_mid_stream_cuts_its_streams_only(engines: Engines) -> None:
    with Engines() as mortal, Picker((mortal.address, *engines.addresses), PLAIN) as picker:
        everyone = (mortal.address, *engines.addresses)
        ways = {
            "mortal": Way(pickers=(picker.epp,), subset=(mortal.address,)),
            "others": Way(pickers=(picker.epp,), subset=engines.addresses),
            "all": listed(picker.epp, everyone),
        }
        with Envoy(ways) as envoy:
            async with streaming(envoy["mortal"]) as (_, cut), streaming(envoy["others"]) as (_, whole):
                mortal.kill()
                with pytest.raises(TruncatedError):
                    await rest(cut)
                answers = await asyncio.gather(*(ask(envoy["all"], CHAT, chat(f"{number}")) for number in range(REQUESTERS)))
                assert {answer.status for answer in answers} == {200}
                assert (await rest(whole)).endswith(b"data: [DONE]\n\n")
            assert (await ask(envoy["mortal"], CHAT, chat("x"))).status == 503
        await until_idle(picker.metrics)


async def test_an_engine_that_never_answers_keeps_nothing_once_its_client_is_gone(echo: EchoEngine, tmp_path: Path) -> None:
    (silent,) = free_addresses(1)
    with FilePicker((silent,), echo.address, PLAIN, directory=tmp_path) as picker, Envoy({"way": Way(pickers=(picker.epp,))}) as envoy:
        async with silent_engine(silent):
            for body in (chat("hello?"), chat("hello? " * 50_000)):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.5):
                        await ask(envoy["way"], CHAT, body)
                await until_idle(picker.metrics)
            async with Http1(envoy["way"]) as client:
                await client.send("POST", CHAT, chat("hello?"))
                await until_metrics(picker.metrics, lambda now: now.sum(INFLIGHT) == 1, "one is in flight")
            await until_idle(picker.metrics)


# --- Envoy


async def test_an_envoy_that_is_killed_leaves_nothing_behind_and_its_successor_works(engines: Engines) -> None:
    with Picker(engines.addresses, PLAIN) as picker, Envoy({"way": Way(pickers=(picker.epp,))}) as envoy:
        async with streaming(envoy["way"], tokens=5_000) as (_, one), streaming(envoy["way"], tokens=5_000) as (_, two):
            await until_metrics(picker.metrics, lambda now: now.sum(INFLIGHT) == 2, "two are in flight")
            envoy.kill()
            for pieces in (one, two):
                with pytest.raises(TruncatedError):
                    await rest(pieces)
        await until_idle(picker.metrics)
        envoy.start()
        assert await both(envoy["way"]) == (200, 200)
        await until_idle(picker.metrics)


def write(pair: KeyPair, directory: Path) -> None:
    """One file after the other: for a moment they don't fit together."""
    (directory / "tls.crt").write_bytes(pair.certificate)
    (directory / "tls.key").write_bytes(pair.key)


@pytest.mark.parametrize("transport", ["h2", "grpc"])
async def test_a_certificate_is_renewed_under_load(echo: EchoEngine, tmp_path: Path, transport: str) -> None:
    old, new = self_signed(), self_signed()
    write(old, tmp_path)
    with Picker((echo.address,), "--cert-path", str(tmp_path), "--transport", transport) as picker:
        ways = {name: Way(pickers=(picker.epp,), picker_tls=True) for name in ("before", "after")}

        async def presented(pair: KeyPair) -> bool:
            served = await asyncio.to_thread(ssl.get_server_certificate, picker.epp, timeout=TIMEOUT_S)
            return served.strip() == pair.certificate.decode().strip()

        with Envoy(ways) as envoy:
            async with Requesters(envoy["before"]).running() as load:
                await load.more(50)
                assert await presented(old)
                write(new, tmp_path)
                await eventually(lambda: presented(new), "new connections see the new certificate")
                assert_received(await ask(envoy["after"], CHAT, chat("x")), chat("x"))  # Envoy's own first connection since
                await load.more(50)
            assert load.wrong == []
        await until_idle(picker.metrics)


# --- clients


@pytest.mark.parametrize("response", [FULL_DUPLEX, NONE])
async def test_a_client_that_reads_slowly_delays_nobody_and_fills_no_memory(echo: EchoEngine, response: str) -> None:
    expected = blob(SLOW_BYTES)
    with (
        Picker((echo.address,), PLAIN) as picker,
        Envoy({"way": Way(pickers=(picker.epp,), response=response, buffer_bytes=MEGABYTE)}) as envoy,
    ):
        gateway = envoy["way"]
        assert_received(await ask(gateway, CHAT, chat("x")), chat("x"))
        before_bytes = largest_bytes = resident_bytes(picker.process.pid)
        async with slow_reader(gateway) as client, asyncio.timeout(2 * TIMEOUT_S):
            await client.send("GET", f"/v1/files?say=bytes&count={SLOW_BYTES}")
            assert await client.head() == 200
            received, pieces = bytearray(), in_small_pieces(client)
            async with Requesters(gateway).running() as load:
                for _ in range(20):
                    await load.more(10)
                    received += await anext(pieces)
                    largest_bytes = max(largest_bytes, resident_bytes(picker.process.pid))
            assert load.wrong == []
            assert len(received) < SLOW_BYTES // 2, "the client was not slow"
            async for piece in pieces:
                received += piece
                largest_bytes = max(largest_bytes, resident_bytes(picker.process.pid))
        assert received == expected
        assert largest_bytes - before_bytes < PICKER_GROWTH_BYTES_MAX
        await until_idle(picker.metrics)


@contextlib.asynccontextmanager
async def slow_reader(gateway: Address) -> AsyncIterator[Http1]:
    """A client whose own buffers hold next to nothing."""
    client = Http1(gateway)
    client._reader, client._writer = await asyncio.open_connection(*gateway, limit=1 << 14)
    try:
        yield client
    finally:
        await client.close()


async def in_small_pieces(client: Http1) -> AsyncIterator[bytes]:
    """Its answer, read no faster than asked for."""
    chunked = "content-length" not in client.headers
    size = await next_chunk(client) if chunked else int(client.headers["content-length"])
    while size:
        while size:
            piece = await client._reader.read(min(size, SMALL_BYTES))
            assert piece, f"it ended {size} bytes early"
            size -= len(piece)
            yield piece
        if chunked:
            await client._reader.readexactly(2)
            size = await next_chunk(client)


async def next_chunk(client: Http1) -> int:
    return int(await client._reader.readuntil(b"\r\n"), 16)


async def test_an_upload_that_stops_is_408_and_one_that_trickles_is_not(echo: EchoEngine) -> None:
    body = chat("drop by drop")
    with Picker((echo.address,), PLAIN, "--decision-timeout", f"{DECISION_TIMEOUT_S:g}s") as picker:
        with Envoy({"way": Way(pickers=(picker.epp,))}) as envoy:

            async def stopping() -> None:
                async with Http1(envoy["way"]) as client, asyncio.timeout(TIMEOUT_S):
                    await client.send("POST", CHAT, headers={"content-length": str(len(body))})
                    await client.send_raw(body[:-1])
                    assert await client.head() == 408
                    assert b"request body" in await client.rest()

            async def trickling() -> None:
                async with Http1(envoy["way"]) as client, asyncio.timeout(TIMEOUT_S):
                    await client.send("POST", CHAT, headers={"content-length": str(len(body))})
                    started_s, sent = time.monotonic(), 0
                    while time.monotonic() - started_s < 3 * DECISION_TIMEOUT_S:
                        await client.send_raw(body[sent : sent + 1])
                        sent += 1
                        await asyncio.sleep(TRICKLE_S)  # the pace of the upload is what is tested
                    await client.send_raw(body[sent:])
                    status = await client.head()
                    assert_received(Answer(status, client.headers, await client.rest()), body)

            async with asyncio.TaskGroup() as uploads:
                uploads.create_task(stopping())
                uploads.create_task(trickling())
        samples = await until_idle(picker.metrics)
        assert samples.sum("llm_d_epp_request_total") == 1, "the one that stopped was never decided"
        assert (await scrape(picker.metrics)).sum(INFLIGHT) == 0
