"""Publishers of KV-cache events made of libzmq's sockets, and hubs that listen to them, for tests over real ZeroMQ.

What is published are recordings, or batches a test makes up. Not here: the index's own truth (tests/unit/test_precise_index.py).
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import zmq

from epp.clock import MonotonicClock
from epp.datastore import Datastore
from epp.events.hub import EventHub
from epp.events.settings import EVENTS_PORT_LABEL, REPLAY_PORT_LABEL, EventSettings
from epp.prefix.kv_events import BlockStored, decode
from epp.prefix.precise import PreciseIndex, hashes_of, seed
from epp.types import Address, Endpoint, EndpointSpec

DATA = Path(__file__).parent / "data" / "kv-events"
SOON_S = 20.0
BUDGET = 1 << 30
END = b"\xff" * 8
Frame = tuple[bytes, bytes, bytes]


def recorded(name: str, which: str = "") -> list[Frame]:
    raw, at, found = (DATA / f"{name}-kv-events{which}.frames.bin").read_bytes(), 0, []
    while at < len(raw):
        _, count = struct.unpack_from(">dI", raw, at)
        at += 12
        frames = []
        for _ in range(count):
            (size,) = struct.unpack_from(">I", raw, at)
            frames.append(raw[at + 4 : at + 4 + size])
            at += 4 + size
        found.append((frames[0], frames[1], frames[2]))
    return found


VLLM = recorded("vllm-0.32")


def stored(*blocks: int, parent: int | None = None) -> bytes:
    """A batch that says so, of blocks of 16 tokens that follow from their names."""
    tokens = [block for block in blocks for _ in range(16)]
    return batch({"type": "BlockStored", "block_hashes": list(blocks), "parent_block_hash": parent, "token_ids": tokens, "block_size": 16})


def batch(*events: dict[str, Any], rank: int = 0) -> bytes:
    return msgspec.msgpack.encode([1.0, list(events), rank])


CLEARED = batch({"type": "AllBlocksCleared"})


def depth(index: PreciseIndex, slot: int, *blocks: int) -> int:
    """How many leading ones of these blocks are known to be there."""
    tokens = b"".join(struct.pack("<16I", *([block] * 16)) for block in blocks)
    return index.lookup(hashes_of(tokens, 16, seed("", "", 16)), 1 << slot).get(slot, 0)


class Direct:
    """An index told every frame as it is, without a socket."""

    def __init__(self, frames: list[Frame]) -> None:
        self.index = PreciseIndex(BUDGET)
        self.chains: list[list[int]] = []
        chain_of: dict[int, list[int]] = {}
        for _topic, _number, payload in frames:
            for event in decode(payload):
                self.index.apply(0, event)
                if not isinstance(event, BlockStored):
                    continue
                before = chain_of.get(event.parent or 0, [])
                start = before[-1] if before else seed(event.lora, event.salt, event.block_tokens)
                chain = before + hashes_of(event.tokens, event.block_tokens, start, dict(enumerate(event.extras)) or None)
                for number, name in enumerate(event.hashes):
                    chain_of[name] = chain[: len(before) + number + 1]
                self.chains.append(chain)

    def same_as(self, index: PreciseIndex, slot: int) -> bool:
        """Whether that index knows the same of the endpoint, block by block of all that ever were."""
        return index.held_blocks(slot) == self.index.held_blocks(0) and all(
            index.lookup(chain, 1 << slot).get(slot, 0) == self.index.lookup(chain, 1).get(0, 0) for chain in self.chains
        )


class Sockets:
    """Of libzmq, closed when the test is over."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._made: list[Any] = []

    def socket(self, kind: int) -> Any:
        self._made.append(self._context.socket(kind))
        return self._made[-1]

    def close(self) -> None:
        for each in self._made:
            each.close(0)
        self._context.term()


class Publisher:
    """An engine's publisher: libzmq's sockets, and whatever a test wants it to say. `form` is how many frames a replayed message has."""

    def __init__(self, context: Sockets, *, topic: bytes = b"kv@x", form: int = 4) -> None:
        self.topic = topic
        self.form = form
        self.kept: list[tuple[int, bytes]] = []
        self.asked: list[int] = []
        self.answering = True
        self._context = context
        self._xpub = context.socket(zmq.XPUB)
        self._xpub.setsockopt(zmq.XPUB_VERBOSE, 1)
        self._xpub.setsockopt(zmq.IPV6, 1)
        self._router = context.socket(zmq.ROUTER)
        self.port = self._xpub.bind_to_random_port("tcp://127.0.0.1")
        self.replay_port = self._router.bind_to_random_port("tcp://127.0.0.1")

    def connect(self, port: int) -> None:
        self._xpub.connect(f"tcp://127.0.0.1:{port}")

    def stop(self) -> None:
        self._xpub.close(0)
        self._router.close(0)

    async def again(self) -> None:
        """Another process on the same ports, with nothing to say yet."""
        self.stop()
        self.kept, self.asked = [], []
        self._xpub, self._router = self._context.socket(zmq.XPUB), self._context.socket(zmq.ROUTER)
        self._xpub.setsockopt(zmq.XPUB_VERBOSE, 1)
        await until(lambda: _bound(self._xpub, self.port) and _bound(self._router, self.replay_port))

    async def subscribed(self) -> bytes:
        """Wait for a subscription; what to."""
        message = b""
        while not message.startswith(b"\x01"):  # not the end of another
            await until(lambda: bool(self._xpub.poll(0)))
            message = self._xpub.recv()
        return message

    def say(self, number: int, payload: bytes, *, topic: bytes | None = None, keep: bool = True, send: bool = True) -> None:
        if keep:
            self.kept.append((number, payload))
        if send:
            self._xpub.send_multipart([self.topic if topic is None else topic, number.to_bytes(8, "big"), payload])

    def raw(self, frames: list[bytes]) -> None:
        self._xpub.send_multipart(frames)

    def serve(self) -> None:
        """Answer what was asked, as vLLM does."""
        while self.answering and self._router.poll(0):
            who, _empty, first = self._router.recv_multipart()
            self.asked.append(int.from_bytes(first, "big"))
            topic = [self.topic] if self.form == 4 else []
            for number, payload in self.kept:
                if number >= self.asked[-1]:
                    self._router.send_multipart([who, b"", *topic, number.to_bytes(8, "big"), payload])
            self._router.send_multipart([who, b"", *([b""] if topic else []), END, b""])


def _bound(ours: Any, port: int) -> bool:
    """Whether it listens there now: libzmq lets go of a port a little after its socket was closed."""
    address = f"tcp://127.0.0.1:{port}"
    if ours.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0") == address.encode():
        return True
    try:
        ours.bind(address)
    except zmq.ZMQError:
        return False
    return True


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def until(true: Callable[[], bool], *publishers: Publisher) -> None:
    async with asyncio.timeout(SOON_S):
        while not true():
            for each in publishers:
                each.serve()
            await asyncio.sleep(0.001)


class Running:
    """A hub over endpoints at 127.0.0.1, each with a port of its own for events."""

    def __init__(self, settings: EventSettings, **options: Any) -> None:
        self.datastore = Datastore(MonotonicClock())
        self.index = PreciseIndex(BUDGET)
        self.hub = EventHub(self.datastore, self.index, settings, clock=MonotonicClock(), rng=random.Random(3), **options)
        self.specs: dict[int, EndpointSpec] = {}

    def add(self, port: int, labels: Mapping[str, str], *, name: str = "") -> Endpoint:
        """The endpoint 127.0.0.1:`port`."""
        self.specs[port] = EndpointSpec(name or f"pod-{port}", Address("127.0.0.1", port), labels=labels)
        self.datastore.apply(self.specs.values())
        return self.datastore.endpoints[Address("127.0.0.1", port)]

    def follow(self, publisher: Publisher, port: int = 8000, *, replay: bool = False) -> Endpoint:
        labels = {EVENTS_PORT_LABEL: str(publisher.port)} | ({REPLAY_PORT_LABEL: str(publisher.replay_port)} if replay else {})
        return self.add(port, labels)

    def remove(self, port: int) -> None:
        del self.specs[port]
        self.datastore.apply(self.specs.values())


QUICK = {"backoff_s": 0.01, "backoff_max_s": 0.05, "replay_idle_s": 0.3, "replay_pause_s": 0.01}
PLAIN = EventSettings(socket_port=0, topic_filter="", **QUICK)  # type: ignore[arg-type]


@asynccontextmanager
async def running(settings: EventSettings = PLAIN, **options: Any) -> AsyncIterator[Running]:
    made = Running(settings, **options)
    made.datastore.subscribe(removed=lambda endpoint: made.index.forget(endpoint.slot, made.datastore.free_slot))
    await made.hub.start()
    task = asyncio.create_task(made.hub.run())
    try:
        yield made
    finally:
        task.cancel()
        await asyncio.wait([task])
    assert task.cancelled()
    assert made.hub.counts.connected == 0
