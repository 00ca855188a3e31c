"""Real Envoy processes: that Envoy takes the configuration, does what it says, and never outlives its parent."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import logging
import os
import select
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import h2.connection
import h2.events
import pytest
from aiohttp import ClientSession, web

from epp._pb import epp_ext_proc_pb2 as pb
from epp.envoy import Destination, EnvoyOptions
from epp.envoy.bootstrap import DESTINATION_KEY, SERVED_KEY
from epp.envoy.supervisor import EnvoyProcess, find_envoy, lifeline, log_line
from epp.errors import StartError
from epp.types import Address

pytestmark = pytest.mark.e2e
GONE_S = 10


def free_address() -> Address:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Address(*probe.getsockname())


def make_options(**changes: Any) -> EnvoyOptions:
    options = EnvoyOptions(
        listen=free_address(), endpoints=(Address("127.0.0.1", 9), Address("::1", 9)), epp=free_address(), epp_tls=False, concurrency=1
    )
    return dataclasses.replace(options, **changes)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def files_in(directory: Path) -> list[Path]:
    return list(directory.iterdir())


def fake_envoy(directory: Path, script: str) -> str:
    path = directory / "fake-envoy"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


class Picker:
    """The least ext_proc server: sends every request to `destination` and keeps what Envoy told it of the responses."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.destination = ""
        self.request_headers: list[pb.ProcessingRequest] = []
        self.response_headers: list[pb.ProcessingRequest] = []
        self.response_chunks = 0

    async def process(self, requests: AsyncIterator[pb.ProcessingRequest], _context: object) -> AsyncIterator[pb.ProcessingResponse]:
        async for request in requests:
            kind = request.WhichOneof("request")
            reply = pb.ProcessingResponse()
            if kind == "request_headers":
                self.request_headers.append(request)
                option = reply.request_headers.response.header_mutation.set_headers.add()
                option.header.key, option.header.raw_value = DESTINATION_KEY, self.destination.encode()
                reply.dynamic_metadata.update({"envoy.lb": {DESTINATION_KEY: self.destination}})
            elif kind in {"request_body", "response_body"}:
                self.response_chunks += kind == "response_body"
                part = getattr(request, kind)
                echo = getattr(reply, kind).response.body_mutation.streamed_response
                echo.body, echo.end_of_stream = part.body, part.end_of_stream
            else:
                if kind == "response_headers":
                    self.response_headers.append(request)
                getattr(reply, kind).SetInParent()
            yield reply

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        handler = grpc.stream_stream_rpc_method_handler(
            self.process,
            request_deserializer=pb.ProcessingRequest.FromString,
            response_serializer=pb.ProcessingResponse.SerializeToString,
        )
        service = grpc.method_handlers_generic_handler("envoy.service.ext_proc.v3.ExternalProcessor", {"Process": handler})
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((service,))
        server.add_insecure_port(str(self.address))
        await server.start()
        try:
            yield
        finally:
            await server.stop(None)


@asynccontextmanager
async def engine(name: str) -> AsyncIterator[Address]:
    async def answer(request: web.Request) -> web.Response:
        body = await request.read()
        return web.Response(text=f"{name} {len(body)}", headers={"x-saw-client-pick": request.headers.get(DESTINATION_KEY, "")})

    app = web.Application(client_max_size=1 << 24)
    app.router.add_route("*", "/{tail:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    address = free_address()
    await web.TCPSite(runner, *address).start()
    try:
        yield address
    finally:
        await runner.cleanup()


# --- the configuration


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"epp_tls": True, "response_body": False},
        {"destination": Destination.ORIGINAL_DST},
        {"round_robin_listen": Address("127.0.0.1", 8081), "admin": Address("127.0.0.1", 9901), "access_log": True},
        {"endpoints": ()},
    ],
)
async def test_envoy_accepts_every_configuration(changes: dict[str, Any]) -> None:
    await EnvoyProcess(make_options(**changes)).validate()


async def test_a_refused_configuration_is_reported_in_envoy_s_words() -> None:
    with pytest.raises(StartError, match=r"(?s)Envoy refuses the configuration.*malformed IP address: not-an-ip"):
        await EnvoyProcess(make_options(endpoints=(Address("not-an-ip", 1),))).validate()


async def test_start_with_a_refused_configuration_says_so_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    process = EnvoyProcess(make_options(endpoints=(Address("not-an-ip", 1),)))
    with pytest.raises(StartError, match=r"Envoy did not start: .*malformed IP address: not-an-ip"):
        await process.start()
    assert process.pid is not None
    assert not alive(process.pid)
    assert files_in(tmp_path) == []


# --- what the configuration does


async def test_requests_go_where_the_picker_says_and_the_picker_learns_who_served() -> None:
    async with engine("one") as one, engine("two") as two:
        options = make_options(endpoints=(one, two))
        picker = Picker(options.epp)
        async with picker.serving(), EnvoyProcess(options), ClientSession() as session:
            for picked, name in [(one, "one"), (two, "two"), (two, "two")]:
                picker.destination = str(picked)
                spoofed = {DESTINATION_KEY: "192.0.2.1:1", "x-request-id": "kept"}
                async with session.post(f"http://{options.listen}/v1/x", data=io.BytesIO(b"x" * 3_000_000), headers=spoofed) as response:
                    assert (response.status, await response.text()) == (200, f"{name} 3000000")
                    assert response.headers["x-saw-client-pick"] == str(picked)
        sent = {h.key: bytes(h.raw_value) for h in picker.request_headers[-1].request_headers.headers.headers}
        assert DESTINATION_KEY not in sent
        assert sent["x-request-id"] == b"kept"
        last = picker.response_headers[-1]
        assert last.metadata_context.filter_metadata["envoy.lb"][SERVED_KEY] == str(two)
        (attributes,) = last.attributes.values()
        assert attributes["upstream.address"] == str(two)
        assert attributes["response.code_details"] == "via_upstream"
        assert attributes["response.flags"] == 0
        assert picker.response_chunks > 0


async def test_a_list_of_endpoints_falls_back_past_a_dead_one_even_with_a_large_body() -> None:
    dead = free_address()
    async with engine("one") as one:
        options = make_options(endpoints=(dead, one))
        picker = Picker(options.epp)
        picker.destination = f"{dead},{one}"
        post = {"url": f"http://{options.listen}/", "data": io.BytesIO(b"x" * 5_000_000)}
        async with picker.serving(), EnvoyProcess(options), ClientSession() as session, session.post(**post) as response:
            assert (response.status, await response.text()) == (200, "one 5000000")
        assert picker.response_headers[-1].metadata_context.filter_metadata["envoy.lb"][SERVED_KEY] == str(one)


async def test_the_picker_learns_why_nobody_answered() -> None:
    dead = free_address()
    options = make_options(endpoints=(dead,))
    picker = Picker(options.epp)
    picker.destination = str(dead)
    url = f"http://{options.listen}/"
    async with picker.serving(), EnvoyProcess(options), ClientSession() as session, session.get(url) as response:
        assert response.status == 503
    (attributes,) = picker.response_headers[-1].attributes.values()
    assert "remote_connection_failure" in attributes["response.code_details"]
    assert attributes["response.flags"] != 0


async def test_without_response_bodies_the_picker_hears_of_headers_only() -> None:
    async with engine("one") as one:
        options = make_options(endpoints=(one,), response_body=False)
        picker = Picker(options.epp)
        picker.destination = str(one)
        post = {"url": f"http://{options.listen}/", "data": b"abc"}
        async with picker.serving(), EnvoyProcess(options), ClientSession() as session, session.post(**post) as response:
            assert await response.text() == "one 3"
        assert len(picker.response_headers) == 1
        assert picker.response_chunks == 0


async def test_original_dst_reaches_an_endpoint_envoy_was_never_told_of() -> None:
    async with engine("stranger") as stranger:
        options = make_options(endpoints=(), destination=Destination.ORIGINAL_DST)
        picker = Picker(options.epp)
        picker.destination = str(stranger)
        post = {"url": f"http://{options.listen}/", "data": b"abc"}
        async with picker.serving(), EnvoyProcess(options), ClientSession() as session, session.post(**post) as response:
            assert await response.text() == "stranger 3"


async def test_the_baseline_listener_needs_no_picker_and_takes_turns() -> None:
    async with engine("one") as one, engine("two") as two:
        options = make_options(endpoints=(one, two), round_robin_listen=free_address())
        async with EnvoyProcess(options), ClientSession() as session:
            served = []
            for _ in range(4):
                async with session.get(f"http://{options.round_robin_listen}/") as response:
                    served.append(await response.text())
            assert sorted(served) == ["one 0", "one 0", "two 0", "two 0"]
            async with session.get(f"http://{options.listen}/") as response:
                assert response.status == 500  # fails closed without a picker


async def test_http2_without_tls_by_prior_knowledge() -> None:
    async with engine("one") as one:
        options = make_options(endpoints=(one,), round_robin_listen=free_address())
        assert options.round_robin_listen is not None
        async with EnvoyProcess(options):
            reader, writer = await asyncio.open_connection(*options.round_robin_listen)
            client = h2.connection.H2Connection()
            client.initiate_connection()
            headers = [(":method", "GET"), (":scheme", "http"), (":authority", "x"), (":path", "/")]
            client.send_headers(1, headers, end_stream=True)
            writer.write(client.data_to_send())
            events: list[h2.events.Event] = []
            while not any(isinstance(event, h2.events.StreamEnded) for event in events):
                events += client.receive_data(await reader.read(65536))
            writer.close()
    assert b"".join(event.data for event in events if isinstance(event, h2.events.DataReceived)) == b"one 0"


# --- the process


async def test_start_and_stop_leave_no_process_and_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    process = EnvoyProcess(make_options(round_robin_listen=free_address(), admin=free_address()))
    assert "not started" in repr(process)
    await process.stop()  # nothing to stop
    async with process:
        pid = process.pid
        assert pid is not None
        assert f"pid={pid}" in repr(process)
        assert files_in(tmp_path) == []
        async with ClientSession() as session, session.get(f"http://{process.options.admin}/ready") as response:
            assert response.status == 200
    assert not alive(pid)
    assert "exited" in repr(process)
    await process.stop()


async def test_a_port_in_use_is_one_clear_line_and_envoy_is_not_started() -> None:
    async with EnvoyProcess(make_options()) as first:
        second = EnvoyProcess(make_options(listen=first.options.listen))
        with pytest.raises(StartError) as caught:
            await second.start()
        assert str(caught.value) == f"Envoy can't listen on {first.options.listen}: Address already in use"
        assert second.pid is None


async def test_wait_notices_that_envoy_died() -> None:
    async with EnvoyProcess(make_options()) as process:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        async with asyncio.timeout(GONE_S):
            assert await process.wait() == -signal.SIGKILL


async def test_wait_needs_a_start() -> None:
    with pytest.raises(RuntimeError, match="start"):
        await EnvoyProcess(make_options()).wait()


async def test_what_envoy_logs_is_passed_on() -> None:
    lines: list[str] = []
    async with EnvoyProcess(make_options(log_level="info"), on_log=lines.append):
        pass
    assert any("starting main dispatch loop" in line for line in lines)


def test_envoy_is_killed_when_its_parent_is(tmp_path: Path) -> None:
    script = """
import asyncio
from tests_options import options
from epp.envoy.supervisor import EnvoyProcess

async def main():
    async with EnvoyProcess(options) as process:
        print(process.pid, flush=True)
        await process.wait()

asyncio.run(main())
"""
    listen, epp = free_address(), free_address()
    (tmp_path / "tests_options.py").write_text(
        "from epp.envoy import EnvoyOptions\nfrom epp.types import Address\n"
        f"options = EnvoyOptions(listen=Address{tuple(listen)}, endpoints=(), epp=Address{tuple(epp)}, concurrency=1)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment, text=True) as parent:
        assert parent.stdout is not None
        envoy = int(parent.stdout.readline())
        handle = os.pidfd_open(envoy)
        try:
            parent.kill()
            readable, _, _ = select.select([handle], [], [], GONE_S)
        finally:
            os.close(handle)
    assert readable, "Envoy outlived its parent"


def test_a_parent_already_gone_starts_nothing(tmp_path: Path) -> None:
    command = lifeline(["/usr/bin/touch", str(tmp_path / "started")])
    command[command.index(str(os.getpid()))] = "1"  # as if this process had died between fork and prctl
    subprocess.run(command, check=True)
    assert files_in(tmp_path) == []


# --- binaries that misbehave


async def test_a_binary_that_dies_is_reported_with_its_last_words(tmp_path: Path) -> None:
    path = fake_envoy(tmp_path, "echo 'info starting' >&2; echo 'critical out of files' >&2; exit 3")
    with pytest.raises(StartError, match="Envoy did not start: out of files"):
        await EnvoyProcess(make_options(envoy_path=path)).start()


async def test_a_binary_that_dies_silently_is_reported_with_its_exit_status(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="Envoy did not start: exit 3"):
        await EnvoyProcess(make_options(envoy_path=fake_envoy(tmp_path, "exit 3"))).start()


async def test_a_binary_that_never_listens_is_stopped(tmp_path: Path) -> None:
    process = EnvoyProcess(make_options(envoy_path=fake_envoy(tmp_path, "exec tail -f /dev/null")), start_s=0.2)
    with pytest.raises(StartError, match=r"Envoy did not start within 0\.2 s"):
        await process.start()
    assert process.pid is not None
    assert not alive(process.pid)


async def test_a_cancelled_start_leaves_nothing(tmp_path: Path) -> None:
    seen = asyncio.Event()
    path = fake_envoy(tmp_path, "echo 'info up' >&2; exec tail -f /dev/null")
    process = EnvoyProcess(make_options(envoy_path=path), on_log=lambda _line: seen.set())
    async with asyncio.TaskGroup() as group:
        starting = group.create_task(process.start())
        await seen.wait()
        starting.cancel()
    assert process.pid is not None
    assert not alive(process.pid)


async def test_a_deaf_binary_is_killed_after_the_grace(tmp_path: Path) -> None:
    ready = asyncio.Event()
    path = fake_envoy(tmp_path, "trap '' TERM; echo 'info deaf' >&2; while :; do read line < /dev/zero; done")
    process = EnvoyProcess(make_options(envoy_path=path), on_log=lambda _line: ready.set(), start_s=GONE_S)

    async def refuse_to_start() -> None:
        with pytest.raises(StartError):
            await process.start()

    async with asyncio.TaskGroup() as group:
        group.create_task(refuse_to_start())
        await ready.wait()
        await process.stop(grace_s=0.05)
    assert await process.wait() == -signal.SIGKILL


# --- finding it


def test_a_named_binary_must_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartError, match=r"--envoy-path"):
        find_envoy(str(tmp_path / "missing"))
    with pytest.raises(StartError, match="not an executable"):
        find_envoy(str(tmp_path))
    monkeypatch.setenv("ENVOY_PATH", str(tmp_path / "missing"))
    with pytest.raises(StartError, match=r"\$ENVOY_PATH"):
        find_envoy()
    monkeypatch.setenv("ENVOY_PATH", fake_envoy(tmp_path, "exit"))
    assert find_envoy() == tmp_path / "fake-envoy"


def test_without_the_extra_the_path_is_searched_and_then_the_remedy_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENVOY_PATH", raising=False)
    assert find_envoy().name == "envoy"
    monkeypatch.setitem(sys.modules, "envoy", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StartError, match=r"pip install 'envoy-endpoint-picker\[envoy\]'"):
        find_envoy()
    found = tmp_path / "envoy"
    Path(fake_envoy(tmp_path, "exit")).rename(found)
    assert find_envoy() == found


def test_envoy_s_levels_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "epp.envoy")
    for line in ("warning slow", "critical broken", "trace detail", "  at frame 3"):
        log_line(line)
    assert [(r.levelno, r.getMessage()) for r in caplog.records] == [
        (logging.WARNING, "slow"),
        (logging.CRITICAL, "broken"),
        (logging.DEBUG, "detail"),
        (logging.WARNING, "  at frame 3"),
    ]
