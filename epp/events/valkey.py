"""The shared backend, a Valkey or Redis server: replicas of the picker tell each other there what they hear of engines.

A replica that starts, or has lost frames, finds them there. Nothing waits for it: requests read the local index; frames are written some
milliseconds later, many at a time, by one task; losing the server is a metric and a line in the log. What is there is believed as what
engines publish is: keep it behind a password and TLS. Not here: whose frames are whose (shared), reading on (mend).

Bounded: `shared.Budget` waits, a slice of `SLICE_BYTES` is on its way, a page of `PAGE_BYTES` comes at a time, each answer within
`timeout_s`. Cost, in CPU: 0.1 ms a slice and in it 20 µs a publisher and 2-5 µs a frame; each replica that hears an engine sends every
frame. Read back, a frame costs half as much again as one heard. In the server it takes 20 bytes more than it has.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import Any

from epp.aio import Sleep
from epp.errors import StartError
from epp.events.settings import BackendSettings
from epp.events.shared import APPEND, FRAME_BYTES_MAX, READ, Budget, Page, Shared, Slice
from epp.observe.families import Family

KEY_PREFIX = "epp:kv-events:1:"
SLICE_BYTES = 256 << 10
SLICE_FRAMES = 1_000
SLICE_PUBLISHERS = 200
PAGE_BYTES = 256 << 10
PAGE_FRAMES = 1_000
_NOT_NOW = ("NoScriptError", "ReadOnlyError", "AuthenticationError", "NoPermissionError", "BusyLoadingError")
"""Answers that concern the server, not one key: connect again."""

_log = logging.getLogger("epp.events")


class Backend:
    """See the module. `start`, then `run` in a task; `read` at any time."""

    def __init__(self, settings: BackendSettings, *, sleep: Sleep, rng: random.Random) -> None:
        self.budget = Budget(settings.queue_bytes_max)
        self.up = False
        self.frames_written = 0
        """That were not there before."""
        self.frames_known = 0
        """That another replica had written."""
        self.frames_read = 0
        self.frames_bad = 0
        """Read, and not usable."""
        self.reads = asyncio.Semaphore(settings.reads_max)
        """Who reads on has one."""
        self.errors: Counter[str] = Counter()
        """By operation: `connect`, `write`, `read`, `touch`."""
        self._settings = settings
        self._sleep = sleep
        self._rng = rng
        self._client: Any = None
        self._failures: tuple[type[Exception], ...] = ()
        self._answered: type[Exception] = Exception
        """An error the server answered with."""
        self._append = self._read = ""
        """Digests of the scripts, as the server knows them."""
        self._publishers: set[Shared] = set()
        self._dirty: deque[Shared] = deque()
        self._queued: set[Shared] = set()
        self._news = asyncio.Event()
        self._tried = asyncio.Event()
        self._said = False

    def start(self) -> None:
        """Raises StartError. Does not connect: that may come later."""
        try:
            import redis.asyncio as client  # noqa: PLC0415 - an optional part
            from redis.asyncio.retry import Retry  # noqa: PLC0415
            from redis.backoff import NoBackoff  # noqa: PLC0415
            from redis.exceptions import RedisError, ResponseError  # noqa: PLC0415
        except ImportError:
            raise StartError("redisConfig and valkeyConfig need the package redis: pip install 'envoy-endpoint-picker[valkey]'") from None
        settings = self._settings
        try:
            pool = client.ConnectionPool.from_url(
                settings.url,
                protocol=2,
                socket_timeout=None,  # ours is around each question: the client's, on Python 3.11, may lose a cancellation
                socket_connect_timeout=settings.timeout_s,
                retry=Retry(NoBackoff(), 0),
                max_connections=settings.reads_max + 2,
            )
            pool.make_connection()  # type: ignore[no-untyped-call]  # finds options that do not exist
        except (ValueError, TypeError, OSError):  # their texts may quote the password
            raise StartError(f"redisConfig or valkeyConfig: not an address that can be used: {settings.shown}") from None
        self._client = client.Redis(connection_pool=pool)
        # A ValueError (an IndexError, a RecursionError...) is the client's own, about an answer it can't read.
        self._failures, self._answered = (RedisError, OSError, ValueError, TypeError, RecursionError), ResponseError

    @property
    def hoped_for(self) -> bool:
        """It answers, or nobody has tried yet."""
        return self.up or not self._tried.is_set()

    def publisher(self, name: str) -> Shared:
        """The frames of the publisher that all replicas call so."""
        made = Shared(KEY_PREFIX + name, self.budget, self._offered)
        self._publishers.add(made)
        return made

    def gone(self, shared: Shared) -> None:
        self._publishers.discard(shared)

    async def run(self) -> None:
        """Until cancelled."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._touch_on(), name="kv events kept in the shared backend")
                await self._write_on()
        finally:
            self.up = False
            await self._client.connection_pool.disconnect()

    async def _write_on(self) -> None:
        settings = self._settings
        backoff_s = settings.backoff_s
        while True:
            if await self.connect():
                backoff_s = settings.backoff_s
            while self.up:
                await self._news.wait()
                await self._sleep(settings.linger_s)  # what comes meanwhile goes with it
                self._news.clear()
                while self.up and await self.once():
                    pass
            await self._sleep(backoff_s * self._rng.uniform(0.5, 1.0))
            backoff_s = min(2 * backoff_s, settings.backoff_max_s)

    async def connect(self) -> bool:
        """Whether it is there."""
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                self._append = await self._client.script_load(APPEND)
                self._read = await self._client.script_load(READ)
        except self._failures as error:
            self._lost("connect", error)
            return False
        finally:
            self._tried.set()
        self.up = True
        if self._said:
            self._said = False
            _log.info("the shared backend of KV-cache events is back", extra={"fields": {"backend": self._settings.shown}})
        self._news.set()
        return True

    # Writing

    async def once(self) -> bool:
        """Write a slice of what waits. True if there is more."""
        slices = self._slices()
        if not slices:
            return False
        pipe = self._client.pipeline(transaction=False)
        for shared, part in slices:
            head, frames = part.arguments[:5], part.arguments[5:]
            pipe.evalsha(self._append, 1, shared.key, *head, int(1_000 * self._settings.kept_s), *frames)
        failure: Exception | None = None
        answers: Sequence[Any] = ()
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                answers = await pipe.execute(raise_on_error=False)
        except self._failures as error:
            failure = error
        except asyncio.CancelledError:
            for shared, part in slices:
                shared.refused(part)
            raise
        failure = failure or next(filter(self._not_now, answers), None)
        if failure is not None:
            for shared, part in reversed(slices):
                shared.unsent(part)
            self._lost("write", failure)
            return False
        for (shared, part), answer in zip(slices, answers, strict=True):
            self._answer(shared, part, answer)
        return bool(self._dirty)

    def _slices(self) -> list[tuple[Shared, Slice]]:
        found: list[tuple[Shared, Slice]] = []
        bytes_left, frames_left = SLICE_BYTES, SLICE_FRAMES
        while self._dirty and bytes_left > 0 and frames_left > 0 and len(found) < SLICE_PUBLISHERS:
            shared = self._dirty.popleft()
            self._queued.discard(shared)
            part = shared.slice(bytes_left, frames_left)
            if part is not None:
                found.append((shared, part))
                bytes_left -= sum(frame.size_bytes for frame in part.frames)
                frames_left -= len(part.frames)
        for shared, _ in found:
            if len(shared):
                self._offered(shared)
        return found

    def _answer(self, shared: Shared, part: Slice, answer: Any) -> None:
        try:
            if isinstance(answer, Exception):
                raise answer
            epoch, added = map(int, answer)
        except (self._answered, TypeError, ValueError) as error:
            self.errors["write"] += 1
            self.budget.frames_dropped += len(part.frames)
            shared.refused(part)
            self._say("the shared backend refuses KV-cache events", type(error).__name__)
            return
        shared.written(part, epoch)
        if epoch:
            self.frames_written += added
            self.frames_known += max(0, len(part.frames) - added)
        else:
            self.budget.frames_dropped += len(part.frames)

    def _offered(self, shared: Shared) -> None:
        if shared not in self._queued:
            self._queued.add(shared)
            self._dirty.append(shared)
            self._news.set()

    async def _touch_on(self) -> None:
        while True:
            await self._sleep(self._settings.kept_s / 4)
            if self.up:
                await self.touch()

    async def touch(self) -> None:
        """What is there of engines that are connected is kept, however little they say."""
        keys = [shared.key for shared in self._publishers if shared.live and shared.epoch]
        for start in range(0, len(keys), SLICE_FRAMES):
            pipe = self._client.pipeline(transaction=False)
            for key in keys[start : start + SLICE_FRAMES]:
                pipe.pexpire(key, int(1_000 * self._settings.kept_s))
            try:
                async with asyncio.timeout(self._settings.timeout_s):
                    await pipe.execute()
            except self._failures as error:
                self._lost("touch", error)
                return

    # Reading

    async def read(self, shared: Shared, first: int, frames_max: int = PAGE_FRAMES) -> Page | None:
        """Frames of the newest process from that number on; None if they can't be had."""
        await self._tried.wait()
        if not self.up:
            return None
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                answer = await self._client.evalsha(self._read, 1, shared.key, shared.ended, first, frames_max, PAGE_BYTES, FRAME_BYTES_MAX)
        except self._failures as error:
            if self._not_now(error):
                self._lost("read", error)
            else:
                self.errors["read"] += 1  # that key's alone: of another type
                self._say("the shared backend refuses KV-cache events", type(error).__name__)
            return None
        try:
            found = [(int(number) - 1, _content(payload)) for number, payload in zip(answer[2::2], answer[3::2], strict=True)]
            return Page(int(answer[0]), int(answer[1]), found)
        except (TypeError, ValueError, IndexError):  # whatever that server is
            self.errors["read"] += 1
            return None

    def _not_now(self, answer: Any) -> bool:
        """Whether it says that nothing works, not only this."""
        return isinstance(answer, Exception) and (not isinstance(answer, self._answered) or type(answer).__name__ in _NOT_NOW)

    def _lost(self, operation: str, error: Exception) -> None:
        self.errors[operation] += 1
        self.up = False
        self._news.set()
        self._say("no shared backend: KV-cache events are not shared with other pickers", type(error).__name__)

    def _say(self, message: str, reason: str) -> None:
        """Once, until it is back; never what a server or an address says of itself."""
        if not self._said:
            self._said = True
            _log.warning(message, extra={"fields": {"backend": self._settings.shown, "reason": reason}})

    def families(self) -> Iterator[Family]:
        prefix = "epp_kv_events_backend_"
        counters = (
            ("frames_written_total", "Frames written to the shared backend.", self.frames_written),
            ("frames_known_total", "Frames sent to the shared backend that another picker had written.", self.frames_known),
            ("frames_dropped_total", "Frames not written to it: too long, over the limit, refused.", self.budget.frames_dropped),
            ("frames_read_total", "Frames taken from the shared backend.", self.frames_read),
            ("frames_bad_total", "Frames read from it that could not be used.", self.frames_bad),
        )
        yield Family(prefix + "up", "Whether the shared backend answers.", "gauge", (), [((), float(self.up))])
        waiting = [((), float(self.budget.bytes_used))]
        yield Family(prefix + "queue_bytes", "Frames that wait to be written to it, in bytes.", "gauge", (), waiting)
        for name, text, value in counters:
            yield Family(prefix + name, text, "counter", (), [((), float(value))])
        errors = [((operation,), float(count)) for operation, count in self.errors.items()]
        yield Family(prefix + "errors_total", "Failures of the shared backend, by operation.", "counter", ("operation",), errors)


def _content(payload: Any) -> bytes:
    """`bytes` makes as many zeros of a number. Raises TypeError."""
    if not isinstance(payload, bytes):
        raise TypeError
    return payload
