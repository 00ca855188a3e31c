"""The load: many ext_proc streams on a few HTTP/2 connections, as Envoy opens them, and every reply checked.

One exchange: request headers and the whole body; when the destination and the body have come back, the response headers; when they are
answered, chunk after chunk of the response, each sent when the echo of the one before has arrived; then the stream is reset, as Envoy
does (`graceful`: half-closed, and grpc-status 0 awaited). A stream that ends is replaced by the next conversation until the wanted
number is reached. exchange.py says what is checked.

No coroutine per stream: a read of the socket is turned into messages, each advances its stream's state, and all that this gives to send
goes out in one write. The client shares the machine with the server, so it has to be the cheaper one of the two.

`Connection` is what every load has in common; `ClosedConnection` keeps so many streams busy and takes nothing wrong, load/ opens streams
when their time has come and counts what goes wrong.
"""

import abc
import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import ClassVar, Generic, Protocol, Self, TypeVar, cast

import ngh2

from bench import BenchError
from bench.exchange import Exchange, GrpcMessages, Wait
from bench.workload import Workload

READ_BYTES_MAX = 256 * 1024
STREAM_WINDOW_BYTES = 16 * 1024 * 1024  # Envoy's own defaults
CONNECTION_WINDOW_BYTES = 24 * 1024 * 1024
CANCEL = 8
GRPC_HEADERS = (
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/envoy.service.ext_proc.v3.ExternalProcessor/Process"),
    (b":authority", b"epp:9002"),
    (b"te", b"trailers"),
    (b"content-type", b"application/grpc"),
    (b"x-envoy-internal", b"true"),
    (b"x-forwarded-for", b"10.244.1.3"),
)


class StreamState(Protocol):
    """One exchange as a connection drives it."""

    wait: Wait

    @property
    def messages(self) -> GrpcMessages: ...

    def open(self) -> bytes:
        """What to send first."""
        ...

    def advance(self, reply: bytes) -> bytes:
        """Check a reply; what to send because of it, if anything. Raises BenchError if it is wrong."""
        ...


StateT = TypeVar("StateT", bound=StreamState)


@dataclass(slots=True)
class Load:
    """One run: so many exchanges of a workload, over all connections."""

    workload: Workload
    remaining: int
    done: asyncio.Future[None]
    unfinished: int
    destinations: Counter[str] = field(default_factory=Counter)

    def fail(self, error: BenchError) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class Connection(asyncio.BufferedProtocol, Generic[StateT]):
    """One HTTP/2 connection and its streams. What happens to a stream that ends, well or badly, is for the subclass."""

    request_headers: ClassVar[tuple[tuple[bytes, bytes], ...]] = GRPC_HEADERS

    def __init__(self, *, graceful: bool) -> None:
        self._graceful = graceful
        self._buffer = memoryview(bytearray(READ_BYTES_MAX))
        self._exchanges: dict[int, StateT] = {}
        """In the order they were opened in."""
        self._transport: asyncio.Transport | None = None
        self._closing = False
        self.closed = asyncio.Event()
        self._h2 = ngh2.Connection(ngh2.Role.CLIENT)
        self._h2.initiate_connection({ngh2.Setting.ENABLE_PUSH: 0, ngh2.Setting.INITIAL_WINDOW_SIZE: STREAM_WINDOW_BYTES})
        self._h2.set_local_window_size(CONNECTION_WINDOW_BYTES)

    # for the subclass

    @abc.abstractmethod
    def on_finished(self, stream_id: int, exchange: StateT) -> None:
        """An exchange that went as it should; its stream is gone."""

    def on_stream_error(self, stream_id: int, error: BenchError) -> None:
        """An exchange that went wrong. By default the whole connection fails with it."""
        del stream_id
        raise error

    def on_goaway(self, error: BenchError) -> None:
        """The server wants no more streams. By default the connection fails."""
        raise error

    @abc.abstractmethod
    def on_lost(self, error: BenchError) -> None:
        """The connection is of no more use; its exchanges are forgotten."""

    def close(self) -> None:
        self._closing = True
        if self._transport is not None:
            self._transport.close()

    def waiting_for(self) -> Counter[str]:
        return Counter(exchange.wait.value for exchange in self._exchanges.values())

    def open(self, exchange: StateT) -> None:
        """A stream for it; nothing is sent before `flush`."""
        stream_id = self._h2.send_request(self.request_headers)
        self._exchanges[stream_id] = exchange
        self._h2.send_data(stream_id, exchange.open())

    def flush(self) -> None:
        if self._transport is not None and (data := self._h2.data_to_send()):
            self._transport.write(data)

    def reset(self, stream_id: int) -> None:
        """Ends a stream and forgets its exchange."""
        self._exchanges.pop(stream_id, None)
        self._h2.reset_stream(stream_id, CANCEL)

    # asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none by inheritance
        self.flush()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's signature
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        try:
            self._h2.receive_data(self._buffer[:nbytes])
            for event in self._h2.events():
                self._on_event(event)
        except ngh2.NGH2Error as error:
            self._fail(BenchError(f"HTTP/2: {error!r}"))
        except BenchError as error:
            self._fail(error)
        else:
            self.flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()
        if not self._closing:
            self._fail(BenchError(f"the server closed the connection ({exc or 'no error'})"))

    # HTTP/2

    def _fail(self, error: BenchError) -> None:
        self.on_lost(error)
        self._exchanges.clear()
        self.close()

    def _on_event(self, event: ngh2.Event) -> None:
        match event:
            case ngh2.DataReceived(stream_id=stream_id, data=data):
                if (exchange := self._exchanges.get(stream_id)) is not None:
                    self._on_data(stream_id, exchange, data)
            case ngh2.ResponseReceived(stream_id=stream_id, headers=headers):
                if stream_id in self._exchanges and (dict(headers).get(b":status") != b"200" or b"grpc-status" in dict(headers)):
                    self.on_stream_error(stream_id, StreamError(f"the server answered a stream with {dict(headers)}", dict(headers)))
            case ngh2.TrailersReceived(stream_id=stream_id, headers=headers):
                self._on_trailers(stream_id, dict(headers))
            case ngh2.StreamReset(stream_id=stream_id, error_code=code) | ngh2.StreamClosed(stream_id=stream_id, error_code=code):
                if (waiting := self._exchanges.get(stream_id)) is not None:
                    text = f"the server ended a stream that waits for {waiting.wait.value} (error {code})"
                    self.on_stream_error(stream_id, StreamError(text, {}, int(code)))
            case ngh2.GoAwayReceived(error_code=code):
                self.on_goaway(BenchError(f"the server sent GOAWAY (error {code})"))
            case _:
                pass

    def _on_data(self, stream_id: int, exchange: StateT, data: bytes) -> None:
        try:
            for reply in exchange.messages.feed(data):
                if sending := exchange.advance(reply):
                    self._h2.send_data(stream_id, sending)
        except BenchError as error:
            self.on_stream_error(stream_id, error)
            return
        if exchange.wait is Wait.END:
            if not exchange.messages.empty:
                self.on_stream_error(stream_id, BenchError("bytes after the last reply"))
            elif self._graceful:
                self._h2.end_stream(stream_id)
            else:
                self._h2.reset_stream(stream_id, CANCEL)
                self._finish(stream_id)

    def _on_trailers(self, stream_id: int, trailers: dict[bytes, bytes]) -> None:
        if (exchange := self._exchanges.get(stream_id)) is None:
            return
        if exchange.wait is not Wait.END or trailers.get(b"grpc-status") != b"0":
            text = f"the server ended a stream that waits for {exchange.wait.value} with {trailers}"
            self.on_stream_error(stream_id, StreamError(text, trailers))
            return
        self._finish(stream_id)

    def _finish(self, stream_id: int) -> None:
        self.on_finished(stream_id, self._exchanges.pop(stream_id))


class StreamError(BenchError):
    """A stream that the server ended: with what headers, or with what HTTP/2 error."""

    def __init__(self, text: str, headers: dict[bytes, bytes], code: int = 0) -> None:
        super().__init__(text)
        self.headers = headers
        self.code = code


class ClosedConnection(Connection[Exchange]):
    """So many streams at a time, a new one for each that ends; the first thing wrong ends the run."""

    def __init__(self, streams: int, *, graceful: bool) -> None:
        super().__init__(graceful=graceful)
        self._streams_max = streams
        self._load: Load | None = None

    def begin(self, load: Load) -> None:
        if self.closed.is_set():
            load.fail(BenchError("the server has closed the connection"))
            return
        self._load = load
        for _ in range(self._streams_max):
            self._open_next(load)
        self.flush()

    def on_lost(self, error: BenchError) -> None:
        if self._load is not None:
            self._load.fail(error)

    def on_finished(self, stream_id: int, exchange: Exchange) -> None:
        del stream_id, exchange
        load = self._load
        assert load is not None
        load.unfinished -= 1
        if load.remaining:
            self._open_next(load)
        elif not load.unfinished and not load.done.done():
            load.done.set_result(None)

    def _open_next(self, load: Load) -> None:
        if load.remaining:
            load.remaining -= 1
            self.open(Exchange(load.workload, load.destinations))


@dataclass(frozen=True, slots=True)
class LoadResult:
    """What a run looked like from the client."""

    requests: int
    duration_s: float
    client_cpu_s: float
    destinations: Counter[str]

    @property
    def requests_per_s(self) -> float:
        return self.requests / self.duration_s


class Client:
    """Connections to one server, kept between runs as Envoy keeps them."""

    def __init__(self, port: int, *, streams: int = 32, connections: int = 2, graceful: bool = False) -> None:
        if not 1 <= connections <= streams:
            raise BenchError("there must be at least one connection, and not more connections than streams")
        self._port = port
        shares = [streams // connections + (i < streams % connections) for i in range(connections)]
        self._connections = [ClosedConnection(share, graceful=graceful) for share in shares]

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        for connection in self._connections:
            await loop.create_connection(lambda c=connection: c, "127.0.0.1", self._port)  # type: ignore[misc]  # the default binds the loop variable
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for connection in self._connections:
            connection.close()
        for connection in self._connections:
            await connection.closed.wait()

    async def run(self, workload: Workload, requests: int, *, timeout_s: float = 120.0) -> LoadResult:
        """So many exchanges, all streams busy; raises BenchError at the first reply that is wrong or missing."""
        load = Load(workload, requests, asyncio.get_running_loop().create_future(), unfinished=requests)
        started_s, cpu_started_s = time.perf_counter(), time.process_time()
        for connection in self._connections:
            connection.begin(load)
        try:
            async with asyncio.timeout(timeout_s):
                await load.done
        except TimeoutError:
            states = sum((connection.waiting_for() for connection in self._connections), Counter[str]())
            raise BenchError(f"no end after {timeout_s:g} s; streams wait for: {dict(states)}") from None
        return LoadResult(requests, time.perf_counter() - started_s, time.process_time() - cpu_started_s, load.destinations)
