"""Open-loop load: exchanges begin at times drawn beforehand, whether or not the picker keeps up, and count from those times.

A picker that stalls for a second is so charged with that second by every request that came in it, not only by the few that were under way
(coordinated omission). Times are kept with a timerfd: the event loop's own timers are a millisecond coarse, more than a decision takes.
How late requests really left is measured too: where that is much of a latency, this client is what was measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import random
import ssl
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import ngh2

from bench import BenchError
from bench.extproc_client import Connection, StreamError
from bench.load.exchange import LoadError, PickExchange
from bench.workload import Workload

RECONNECT_S = 0.2
SWEEP_S = 0.1
CONNECT_S = 10.0
TFD_NONBLOCK = os.O_NONBLOCK
TFD_TIMER_ABSTIME = 1


class Target:
    """Where the picker listens, and how one speaks to it."""

    def __init__(self, host: str, port: int, *, tls: bool = False) -> None:
        self.host = host
        self.port = port
        self.tls: ssl.SSLContext | None = None
        if tls:
            self.tls = ssl.create_default_context()
            self.tls.check_hostname = False  # a picker's own certificate is self-signed, and no gateway verifies it
            self.tls.verify_mode = ssl.CERT_NONE
            self.tls.set_alpn_protocols(["h2"])

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


@dataclass(slots=True)
class Meter:
    """What was seen, without the warm-up."""

    decision_s: list[float] = field(default_factory=list)
    exchange_s: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)
    destinations: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """The first of each kind, in words."""
    first_sent_s: float = 0.0
    last_done_s: float = 0.0

    def done(self, exchange: PickExchange) -> None:
        if exchange.counted:
            self.last_done_s = now_s = time.monotonic()
            self.decision_s.append(exchange.decided_s - exchange.intended_s)
            self.exchange_s.append(now_s - exchange.intended_s)
            self.destinations[exchange.destination] += 1

    def failed(self, exchange: PickExchange, kind: str, text: str) -> None:
        if exchange.counted:
            self.errors[kind] += 1
            self.examples.setdefault(kind, text)


class OpenConnection(Connection[PickExchange]):
    """Opens streams when told; counts what goes wrong and goes on."""

    def __init__(self, target: Target, meter: Meter) -> None:
        super().__init__(graceful=False)
        scheme = b"https" if target.tls else b"http"
        replaced = {b":scheme": scheme, b":authority": str(target).encode()}
        self.request_headers = tuple((name, replaced.get(name, value)) for name, value in self.request_headers)  # type: ignore[misc]  # of this one
        self._meter = meter
        self.usable = True
        self.made_s = time.monotonic()
        self.lost = ""
        """Why it is not usable."""
        self.ended = asyncio.Event()
        """No new stream may be opened; those under way may still finish."""

    @property
    def in_flight(self) -> int:
        return len(self._exchanges)

    def expire(self, before_s: float) -> None:
        """End what should have begun before `before_s` and is not done."""
        late = []
        for stream_id, exchange in self._exchanges.items():
            if exchange.intended_s >= before_s:
                break
            late.append((stream_id, exchange))
        for stream_id, exchange in late:
            self._meter.failed(exchange, "timeout", f"waited for {exchange.wait.value}")
            with contextlib.suppress(ngh2.NGH2Error):  # the connection is ending
                self.reset(stream_id)
        if late:
            self.flush()

    def on_finished(self, stream_id: int, exchange: PickExchange) -> None:
        del stream_id
        self._meter.done(exchange)

    def on_stream_error(self, stream_id: int, error: BenchError) -> None:
        exchange = self._exchanges.pop(stream_id)
        self._meter.failed(exchange, _kind(error), str(error))
        try:
            self.reset(stream_id)
        except ngh2.NGH2Error:  # the server has closed it already
            return

    def open(self, exchange: PickExchange) -> None:
        """As in the base. Raises NGH2Error if the connection is as good as gone, which it has not said yet."""
        try:
            super().open(exchange)
        except ngh2.NGH2Error as error:
            self.usable, self.lost = False, f"HTTP/2: {error!r}"
            self.ended.set()
            raise

    def on_goaway(self, error: BenchError) -> None:
        self.usable, self.lost = False, str(error)
        self.ended.set()

    def on_lost(self, error: BenchError) -> None:
        self.usable, self.lost = False, str(error)
        for exchange in self._exchanges.values():
            self._meter.failed(exchange, "connection lost", str(error))
        self.ended.set()


def _kind(error: BenchError) -> str:
    if isinstance(error, LoadError):
        return error.kind
    if isinstance(error, StreamError):
        if b"grpc-status" in error.headers:
            return f"grpc-status {error.headers[b'grpc-status'].decode()}"
        return f"status {error.headers[b':status'].decode()}" if b":status" in error.headers else f"stream reset {error.code}"
    return "wrong reply"


def arrivals(rps: float, duration_s: float, *, seed: int, even: bool) -> Iterator[float]:
    """Seconds since the start: a Poisson process, or one every 1/rps."""
    rng = random.Random(seed)
    at_s = 0.0
    while at_s < duration_s:
        yield at_s
        at_s += 1 / rps if even else rng.expovariate(rps)


class Timer:
    """Calls back at a monotonic time, to some 50 µs."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = int(self._libc.timerfd_create(time.CLOCK_MONOTONIC, TFD_NONBLOCK))
        if self._fd < 0:
            raise BenchError(f"timerfd_create: {os.strerror(ctypes.get_errno())}")
        self._callback = callback
        self._spec = (ctypes.c_long * 4)()
        asyncio.get_running_loop().add_reader(self._fd, self._fire)

    def set(self, at_s: float) -> None:
        """Replaces what was set; a time that has passed is now."""
        at_ns = max(1, int(at_s * 1e9))
        self._spec[2], self._spec[3] = divmod(at_ns, 1_000_000_000)
        self._libc.timerfd_settime(self._fd, TFD_TIMER_ABSTIME, self._spec, None)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)

    def _fire(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return
        self._callback()


class Generator:
    """One run against one target."""

    def __init__(
        self, target: Target, workload: Workload, *, connections: int, with_response: bool, timeout_s: float, in_flight_max: int
    ) -> None:
        self.meter = Meter()
        self._target = target
        self._workload = workload
        self._with_response = with_response
        self._timeout_s = timeout_s
        self._in_flight_max = in_flight_max
        self._places: list[OpenConnection] = []
        self._connections = connections
        self._draining: list[OpenConnection] = []
        self._turn = 0
        self._times: Iterator[float] = iter(())
        self._next_s = 0.0
        self._counts_from_s = 0.0
        self._sent_all = asyncio.Event()
        self._timer: Timer | None = None

    async def run(self, times: Iterator[float], *, warmup_s: float = 0.0) -> Meter:
        """To the end of the last exchange. Raises BenchError if the target can't be reached at the start."""
        self._places = [await self._connect() for _ in range(self._connections)]
        keepers = [asyncio.create_task(self._keep(place)) for place in range(self._connections)]
        sweeper = asyncio.create_task(self._sweep())
        self._timer = Timer(self._due)
        gc.collect()
        gc.disable()  # its pauses would be the target's latencies
        try:
            self._times = times
            self._start_s = time.monotonic() + 0.05
            self._counts_from_s = self._start_s + warmup_s
            self._advance()
            await self._sent_all.wait()
            while any(connection.in_flight for connection in [*self._places, *self._draining]):  # noqa: ASYNC110 - the sweep ends it
                await asyncio.sleep(0.005)
        finally:
            gc.enable()
            self._timer.close()
            for task in (*keepers, sweeper):
                task.cancel()
            await asyncio.gather(*keepers, sweeper, return_exceptions=True)
            for connection in [*self._places, *self._draining]:
                connection.close()
            for connection in [*self._places, *self._draining]:
                await connection.closed.wait()
        return self.meter

    def _due(self) -> None:
        """Send everything whose time has come, a write a connection."""
        now_s = time.monotonic()
        touched: set[OpenConnection] = set()
        while self._next_s <= now_s and not self._sent_all.is_set():
            self._send(self._next_s, now_s, touched)
            self._advance()
        for connection in touched:
            connection.flush()

    def _advance(self) -> None:
        offset_s = next(self._times, None)
        if offset_s is None:
            self._sent_all.set()
            return
        assert self._timer is not None
        self._next_s = self._start_s + offset_s
        self._timer.set(self._next_s)

    def _send(self, intended_s: float, now_s: float, touched: set[OpenConnection]) -> None:
        counted = intended_s >= self._counts_from_s
        exchange = PickExchange(self._workload, intended_s, with_response=self._with_response, counted=counted)
        if counted:
            self.meter.late_s.append(now_s - intended_s)
            self.meter.first_sent_s = self.meter.first_sent_s or now_s
        if sum(connection.in_flight for connection in self._places) >= self._in_flight_max:
            self.meter.failed(exchange, "not sent", f"{self._in_flight_max} exchanges were under way")
            return
        for _ in self._places:
            self._turn = (self._turn + 1) % len(self._places)
            connection = self._places[self._turn]
            if connection.usable:
                with contextlib.suppress(ngh2.NGH2Error):
                    connection.open(exchange)
                    touched.add(connection)
                    return
        self.meter.failed(exchange, "not connected", f"no connection to the target: {self._places[self._turn].lost}")

    async def _connect(self) -> OpenConnection:
        loop = asyncio.get_running_loop()
        connection = OpenConnection(self._target, self.meter)
        try:
            async with asyncio.timeout(CONNECT_S):
                transport, _ = await loop.create_connection(lambda: connection, self._target.host, self._target.port, ssl=self._target.tls)
        except (OSError, TimeoutError) as error:
            raise BenchError(f"can't connect to {self._target}: {error or 'no answer'}") from None
        if self._target.tls and transport.get_extra_info("ssl_object").selected_alpn_protocol() not in ("h2", None):
            raise BenchError(f"{self._target} does not speak HTTP/2")
        return connection

    async def _keep(self, place: int) -> None:
        while True:
            before = self._places[place]
            await before.ended.wait()
            if time.monotonic() - before.made_s < RECONNECT_S:  # it is not as if nothing but a restart had come between
                await asyncio.sleep(RECONNECT_S)
            try:
                connection = await self._connect()
            except BenchError:
                await asyncio.sleep(RECONNECT_S)
                continue
            self._draining = [old for old in [*self._draining, self._places[place]] if not old.closed.is_set()]
            self._places[place] = connection

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            for connection in [*self._places, *self._draining]:
                connection.expire(time.monotonic() - self._timeout_s)
