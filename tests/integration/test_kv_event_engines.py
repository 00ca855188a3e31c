"""KV-cache events got in other ways than by connecting: engines that connect to us, TensorRT-LLM, which is asked, and simulated engines."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import zmq
from aiohttp import web

from epp.errors import StartError
from epp.events.settings import EVENTS_PORT_LABEL, REPLAY_PORT_LABEL, EventSettings
from epp.prefix.precise import hashes_of, seed
from epp.sim.options import SimOptions
from epp.sim.server import SimServer
from epp.types import Address, EndpointSpec
from tests.kv_streams import (
    QUICK,
    SOON_S,
    Direct,
    Publisher,
    Running,
    Sockets,
    depth,
    recorded,
    running,
    stored,
    until,
)


@pytest.fixture
def context() -> Iterator[Sockets]:
    made = Sockets()
    yield made
    made.close()


# Engines that connect


def bound(**changes: Any) -> EventSettings:
    return EventSettings(subscribe=False, bind="tcp://127.0.0.1:0", **changes)


async def test_engines_that_connect_are_told_apart_by_topic(context: Sockets) -> None:
    frames = recorded("vllm-0.32", "-two-engines")
    topics = sorted({topic for topic, _number, _payload in frames})
    async with running(bound()) as run:
        endpoints = {topic: run.add(int(topic.split(b"@")[1].rpartition(b":")[2]), {}) for topic in topics}
        engines = {topic: Publisher(context, topic=topic) for topic in topics}
        for engine in engines.values():
            engine.connect(run.hub.port)
            assert await engine.subscribed() == b"\x01kv@"
        for topic, number, payload in frames:
            engines[topic].raw([topic, number, payload])
        await until(lambda: run.hub.counts.messages == len(frames) and not len(run.hub._feed))
        for topic, endpoint in endpoints.items():
            assert Direct([frame for frame in frames if frame[0] == topic]).same_as(run.index, endpoint.slot)
            assert run.index.trusted(endpoint.slot)
        assert run.hub.counts.gaps == run.hub.counts.restarts == run.hub.counts.unknown_topics == 0
        assert run.hub.counts.connected == 2


async def test_topics_of_nobody_are_counted_and_the_rest_goes_on(context: Sockets, caplog: pytest.LogCaptureFixture) -> None:
    async with running(bound()) as run:
        endpoint = run.add(8000, {}, name="pod-a")
        engine = Publisher(context, topic=b"kv@pod-a@m")
        engine.connect(run.hub.port)
        await engine.subscribed()
        for number in range(300):
            engine.say(0, stored(1), topic=b"kv@10.0.0.%d@m" % number)
        engine.say(0, stored(1), topic=b"kv@")
        engine.say(0, stored(1), topic=b"kv@\xff\xfe@" + b"x" * 100_000)
        engine.say(0, stored(5))
        await until(lambda: depth(run.index, endpoint.slot, 5) == 1)
        assert run.hub.counts.unknown_topics == 302
        assert run.index.held_blocks(endpoint.slot) == 1
        assert len(caplog.records) == 1
        run.add(8001, {}, name="pod-b")
        engine.say(0, stored(6), topic=b"kv@pod-b@m")
        other = run.datastore.endpoints[Address("127.0.0.1", 8001)]
        await until(lambda: depth(run.index, other.slot, 6) == 1)


async def test_an_engine_that_connects_again_goes_on_where_it_was_and_a_new_one_begins_anew(context: Sockets) -> None:
    async with running(bound()) as run:
        endpoint = run.add(8000, {})
        first = Publisher(context, topic=b"kv@127.0.0.1:8000@m")
        first.connect(run.hub.port)
        await first.subscribed()
        first.say(0, stored(1))
        await until(lambda: depth(run.index, endpoint.slot, 1) == 1)
        await first.again()
        first.connect(run.hub.port)
        await first.subscribed()
        first.say(1, stored(2))
        await until(lambda: depth(run.index, endpoint.slot, 2) == 1)
        assert run.hub.counts.restarts == run.hub.counts.gaps == 0
        await first.again()
        first.connect(run.hub.port)
        await first.subscribed()
        first.say(0, stored(3))
        await until(lambda: depth(run.index, endpoint.slot, 3) == 1)
        assert run.index.held_blocks(endpoint.slot) == 1
        assert run.hub.counts.restarts == 1
        first.say(5, stored(4))
        await until(lambda: run.hub.counts.gaps == 1)


async def test_over_ipv6_too(context: Sockets) -> None:
    try:
        probe = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 here")
    probe.close()
    async with running(EventSettings(subscribe=False, bind="tcp://[::1]:0")) as run:
        run.specs[1] = EndpointSpec("pod-6", Address("::1", 8000))
        run.datastore.apply(run.specs.values())
        endpoint = run.datastore.endpoints[Address("::1", 8000)]
        engine = Publisher(context, topic=b"kv@[::1]:8000@m")
        engine._xpub.connect(f"tcp://[::1]:{run.hub.port}")
        await engine.subscribed()
        engine.say(0, stored(1))
        engine.say(1, stored(2), topic=b"kv@::1@m")
        await until(lambda: depth(run.index, endpoint.slot, 1) == depth(run.index, endpoint.slot, 2) == 1)


async def test_a_host_with_several_endpoints_says_nothing_by_itself(context: Sockets) -> None:
    async with running(bound()) as run:
        run.add(8000, {})
        second = run.add(8001, {})
        engine = Publisher(context)
        engine.connect(run.hub.port)
        await engine.subscribed()
        engine.say(0, stored(1), topic=b"kv@127.0.0.1@m")
        engine.say(0, stored(1), topic=b"kv@127.0.0.1:8001@m")
        await until(lambda: depth(run.index, second.slot, 1) == 1)
        assert run.hub.counts.unknown_topics == 1


async def test_more_connections_than_the_limit_are_refused(context: Sockets) -> None:
    async with running(bound(connections_max=1)) as run:
        engine = Publisher(context)
        engine.connect(run.hub.port)
        await engine.subscribed()
        assert run.hub._central is not None
        reader, writer = await asyncio.open_connection("127.0.0.1", run.hub.port)
        async with asyncio.timeout(SOON_S):
            assert await reader.read() == b""
        writer.close()
        assert run.hub._central._listener.refused_total == 1


async def test_a_port_that_is_taken_is_one_clear_line() -> None:
    async with running(bound()) as run:
        other = Running(EventSettings(subscribe=False, bind=f"tcp://127.0.0.1:{run.hub.port}"))
        with pytest.raises(StartError, match="can't listen for KV-cache events on tcp://127"):
            await other.hub.start()


# TensorRT-LLM


async def test_tensorrt_llm_is_asked_where_its_operator_wants_it() -> None:
    answers: list[Any] = []
    asked: list[str] = []

    async def events(request: web.Request) -> web.Response:
        asked.append(request.path)
        answer = answers.pop(0) if answers else []
        return web.Response(status=answer) if isinstance(answer, int) else web.json_response(answer)

    def said(number: int, **data: Any) -> dict[str, Any]:
        return {"event_id": number, "data": data}

    def block(number: int) -> dict[str, Any]:
        tokens = [{"type": "unique_token", "token_id": number, "token_extra_id": 0}] * 16
        return {"type": "stored_block", "block_hash": number, "tokens": tokens, "cache_level": 0, "priority": 35}

    app = web.Application()
    app.add_routes([web.post("/kv_cache_events", events)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    settings = EventSettings(socket_port=0, trtllm_poll_s=0.005, **QUICK)  # type: ignore[arg-type]
    families = {port: "trtllm-serve"}
    answers += [
        [said(0, type="created", num_blocks_per_cache_level=[8]), said(1, type="stored", parent_hash=None, blocks=[block(1), block(2)])],
        503,
        [said(2, type="removed", block_hashes=[2])],
    ]
    try:
        async with running(settings, engine=lambda endpoint: families.get(endpoint.spec.address.port, "vllm")) as run:
            run.add(1, {EVENTS_PORT_LABEL: "1"})
            endpoint = run.add(port, {})
            await until(lambda: run.hub.counts.zmq_errors["poll"] == 1)
            await until(lambda: depth(run.index, endpoint.slot, 1, 2) == 1 and run.index.held_blocks(endpoint.slot) == 1)
            assert run.index.trusted(endpoint.slot)
            answers.append([said(9, type="stored", parent_hash=1, blocks=[block(3)])])
            await until(lambda: run.hub.counts.gaps == 1)
            assert run.hub.counts.frames_lost == 6
            answers.append([said(0, type="created", num_blocks_per_cache_level=[8])])
            await until(lambda: run.hub.counts.restarts == 1)
            await until(lambda: run.index.trusted(endpoint.slot))
            answers.append({"not": "a list"})
            await until(lambda: run.hub.counts.malformed == 1)
            assert set(asked) == {"/kv_cache_events"}
            assert run.hub.counts.connected == 0
    finally:
        await runner.cleanup()


# Simulated engines


async def test_a_simulated_engine_tells_the_truth_about_its_cache(context: Sockets) -> None:
    """After requests with shared prefixes and evictions, what the index knows is what the engine has; a libzmq subscriber hears it too."""
    import aiohttp

    from epp.sim.engine import EngineProfile

    options = SimOptions(
        model="tiny", time_scale=200.0, profile=EngineProfile(kv_blocks=24, block_tokens=16), kv_events_port=0, kv_events_replay_port=0
    )
    server = SimServer(options)
    await server.start("127.0.0.1", 0)
    assert server.publisher is not None
    subscriber = context.socket(zmq.SUB)
    subscriber.setsockopt(zmq.SUBSCRIBE, b"kv@")
    subscriber.connect(f"tcp://127.0.0.1:{server.publisher.port}")
    await until(lambda: server.publisher is not None and server.publisher.subscribers == 1)
    prompts = [f"{'abcd' * 16 * (1 + number % 3)}{number:04d}{'wxyz' * 40}" for number in range(12)]
    try:
        async with running() as run, aiohttp.ClientSession() as client:
            labels = {EVENTS_PORT_LABEL: str(server.publisher.port), REPLAY_PORT_LABEL: str(server.publisher.replay_port)}
            for place, prompt in enumerate(prompts):
                if place == 6:  # the second half is heard, the first asked for
                    endpoint = run.add(server.port, labels)
                    await until(lambda: server.publisher is not None and server.publisher.subscribers == 2)
                body = {"model": "tiny", "prompt": prompt, "max_tokens": 4}
                async with client.post(f"http://{server.address}/v1/completions", json=body) as answer:
                    assert answer.status == 200
            assert server.engine.cache.evictions_total > 0
            await until(lambda: run.index.held_blocks(endpoint.slot) == server.engine.cache.cached)
            for prompt in prompts:
                text = prompt.encode()
                hashes = hashes_of(text, 16, seed("", "", 16))
                held = server.engine.cache.match(server.engine.submit(text, 1, 0.0).hashes_up_to(len(hashes), 64))
                assert run.index.lookup(hashes, 1 << endpoint.slot).get(endpoint.slot, 0) == len(held)
            assert run.index.trusted(endpoint.slot)
            assert run.hub.counts.gaps == 0
            published = server.publisher.published
            for number in range(published):
                await until(lambda: bool(subscriber.poll(0)))
                topic, seq, _payload = subscriber.recv_multipart()
                assert (topic.decode(), int.from_bytes(seq, "big")) == (f"kv@{server.address}@tiny", number)
            text = "\n".join(json.dumps([family.name, list(map(str, family.values))]) for family in run.hub.families())
            assert "llm_d_epp_kv_cache_events_messages_received_total" in text
    finally:
        await server.stop()
