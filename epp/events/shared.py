"""One publisher's frames in the shared backend: which of its streams is this process's, and what of ours is not yet there.

An engine numbers its frames from 0 in every process, and several pickers write what they hear. So an entry's id is `<epoch>-<number + 1>`:
the server refuses what is there already, and an epoch, which is the time of the first frame written (by the engine's clock) or one more than
the epoch before, keeps processes apart. Everybody reads the newest epoch alone. A picker takes it for its own process's where both have a
frame of the same content, or where its frames follow; only one that has just met a process may begin a new epoch, and over one it knows
nothing of only if its frames are later, so one that lags behind can't displace the new process's frames with the old one's. `APPEND` and `READ` decide that on the server, at once with the writing.

Not here: the connection (valkey), what is done with frames that are read (mend).
Bounded: what waits to be written, by the `Budget` all publishers share; over it the oldest go, and are counted. What is in the server: so
many frames or bytes a publisher, and gone some time after the last picker that hears it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

FRAMES_MAX = 10_000
"""Of a publisher in the backend: as many as engines keep for replays."""
BYTES_MAX = 64 << 20
"""The same, in bytes, by the mean of what was written lately."""
FRAME_BYTES_MAX = 256 << 10
"""Longer ones are not shared: a step of 8 192 tokens has 50 KB."""
FRAME_COSTS_BYTES = 200
NUMBER_MAX = 1 << 52
TIME_S_MAX = 1e11
MEAN_OVER_FRAMES = 64

_TOP = """
local function top()
  local last = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
  if not last then return 0, -1 end
  local epoch, number = string.match(last[1], '^(%d+)-(%d+)$')
  epoch, number = tonumber(epoch), tonumber(number) - 1
  if epoch >= 2^53 or number >= 2^53 or number < 0 or #last[2] ~= 2 or last[2][1] ~= 'f' then return nil end
  return epoch, number
end
local function id(epoch, number) return string.format('%.0f-%.0f', epoch, number + 1) end
"""
APPEND = (
    _TOP
    + """
local mine, may_begin, ended, begin = tonumber(ARGV[1]), ARGV[2] == '1', tonumber(ARGV[3]), tonumber(ARGV[4])
local first = tonumber(ARGV[7])
local epoch, number = top()
if not epoch then -- not of our making
  redis.call('DEL', KEYS[1])
  epoch, number = 0, -1
end
local target = mine
if epoch > 0 and mine ~= epoch then
  local same = nil
  if epoch > ended then
    for i = 8, #ARGV do
      if first + i - 8 > number then break end
      local at = id(epoch, first + i - 8)
      local entry = redis.call('XRANGE', KEYS[1], at, at)[1]
      if entry then
        same = entry[2][2] == ARGV[i]
        break
      end
    end
    if same == nil and may_begin and mine == 0 and first > number then same = true end
  end
  if same then
    target = epoch
  elseif mine < epoch then
    if not may_begin or (epoch > ended and begin <= epoch) then return {0, 0} end -- that is the newer process
    target = math.max(begin, epoch + 1, ended + 1)
  end
elseif mine == 0 then
  target = math.max(begin, ended + 1)
end
local added = 0
for i = 8, #ARGV do
  local at = first + i - 8
  if target ~= epoch or at > number then
    redis.call('XADD', KEYS[1], 'MAXLEN', '~', ARGV[5], id(target, at), 'f', ARGV[i])
    added = added + 1
  end
end
redis.call('PEXPIRE', KEYS[1], ARGV[6])
return {string.format('%.0f', target), added}
"""
)
"""Arguments: our epoch (0: not known), may begin one, the epoch that ended, the epoch to begin with, entries and milliseconds kept, the
first frame's number, the frames. Returns the epoch they are in, 0 if that is another process's, and how many were not there before."""
READ = (
    _TOP
    + """
local epoch, number = top()
if not epoch or epoch <= tonumber(ARGV[1]) then return {'0', '-1'} end
local found, size = {string.format('%.0f', epoch), string.format('%.0f', number)}, 0
for _, entry in ipairs(redis.call('XRANGE', KEYS[1], id(epoch, tonumber(ARGV[2])), id(epoch, number), 'COUNT', ARGV[3])) do
  if #entry[2] ~= 2 or entry[2][1] ~= 'f' or #entry[2][2] > tonumber(ARGV[5]) then break end
  size = size + #entry[2][2]
  found[#found + 1] = string.match(entry[1], '-(%d+)$')
  found[#found + 1] = entry[2][2]
  if size >= tonumber(ARGV[4]) then break end
end
return found
"""
)
"""Arguments: the epoch that ended, the first frame's number, entries and bytes at most, bytes of an entry at most. Returns the newest epoch
(0: none), the number of its last frame, then number + 1 and content of one frame after the other."""


class Page(NamedTuple):
    """What was read: some frames of one process, in order."""

    epoch: int
    last: int
    """Number of the last one there."""
    frames: Sequence[tuple[int, bytes]]


class Frame(NamedTuple):
    number: int
    payload: bytes
    time_s: float
    """By the engine's clock."""

    @property
    def size_bytes(self) -> int:
        return len(self.payload) + FRAME_COSTS_BYTES


class Budget:
    """What waits to be written, of all publishers together."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.bytes_used = 0
        self.frames_waiting = 0
        self.frames_dropped = 0

    def take(self, frame: Frame) -> None:
        self.bytes_used += frame.size_bytes
        self.frames_waiting += 1

    def drop(self, frame: Frame) -> None:
        self.bytes_used -= frame.size_bytes
        self.frames_waiting -= 1


class Slice(NamedTuple):
    """Frames on their way: arguments of `APPEND`, and what `Shared` needs to know when it hears of them again."""

    arguments: Sequence[int | str | bytes]
    """But for how long they are kept."""
    frames: Sequence[Frame]
    epoch: int
    process: int


class Shared:
    """See the module. `offer` frames; the writer takes a `slice`, then says what became of it: `written`, `refused` or `unsent`."""

    def __init__(self, key: str, budget: Budget, news: Callable[[Shared], None]) -> None:
        """`news`: there is something to write."""
        self.key = key
        self.epoch = 0
        """This process's; 0: not known."""
        self.ended = 0
        """The newest that is known to be another's, of before."""
        self.live = False
        """Connected to the publisher: what is there is worth keeping."""
        self._may_begin = True
        self._process = 0
        """Which, counted from here: answers of before a restart say nothing of the next."""
        self._budget = budget
        self._news = news
        self._waiting: deque[Frame] = deque()
        self._passed: Frame | None = None
        """The last that went: where the epoch is not known, the one frame others are likely to have."""
        self._mean_bytes = 1_000.0
        self._closed = False

    def __repr__(self) -> str:
        return f"<Shared {self.key} epoch {self.epoch} ended {self.ended} waiting {len(self._waiting)}>"

    def __len__(self) -> int:
        return len(self._waiting)

    def offer(self, number: int, payload: bytes, time_s: float) -> None:
        """A frame that came from the engine."""
        if self._closed:
            return
        budget, frame = self._budget, Frame(number, payload, time_s)
        if len(payload) > FRAME_BYTES_MAX or number > NUMBER_MAX:
            budget.frames_dropped += 1
            return
        while self._waiting and budget.bytes_used + frame.size_bytes > budget.bytes_max:
            budget.drop(self._waiting.popleft())
            budget.frames_dropped += 1
        if budget.bytes_used + frame.size_bytes > budget.bytes_max:
            budget.frames_dropped += 1
            return
        budget.take(frame)
        self._waiting.append(frame)
        self._mean_bytes += (frame.size_bytes - self._mean_bytes) / MEAN_OVER_FRAMES
        self._news(self)

    def restarted(self) -> None:
        """It is another process: what was of the one before is not its."""
        self.ended, self.epoch, self._may_begin = max(self.ended, self.epoch), 0, True
        self._process += 1
        self._clear()

    def met(self, epoch: int) -> None:
        """What was read there is this process's."""
        self.epoch, self._may_begin = epoch, False

    def close(self) -> None:
        self._closed, self.live = True, False
        self._process += 1
        self._clear()

    # The writer's side

    def slice(self, bytes_max: int, frames_max: int) -> Slice | None:
        """Frames that follow one another; None if none wait."""
        if not self._waiting:
            return None
        first, frames, size_bytes = self._waiting[0].number, list[Frame](), 0
        while self._waiting and size_bytes < bytes_max and len(frames) < frames_max:
            if self._waiting[0].number != first + len(frames):
                break
            frames.append(self._waiting.popleft())
            size_bytes += frames[-1].size_bytes
        sent = list(frames)
        if not self.epoch and self._passed is not None and self._passed.number == first - 1:
            sent.insert(0, self._passed)
        time_s = sent[0].time_s
        begin = int(time_s * 1_000) if 0.001 < time_s < TIME_S_MAX else 1
        kept = max(1, min(FRAMES_MAX, int(BYTES_MAX / self._mean_bytes)))
        head = (self.epoch, int(self._may_begin), self.ended, begin, kept, sent[0].number)
        return Slice([*head, *(frame.payload for frame in sent)], frames, self.epoch, self._process)

    def written(self, slice_: Slice, epoch: int) -> None:
        """The frames are there, in that epoch; 0: the newest is another process's, and they are not."""
        self.refused(slice_)
        if slice_.process != self._process:
            return
        self._passed = slice_.frames[-1]
        if epoch:
            self.met(epoch)
        elif self.epoch == slice_.epoch:
            self.ended, self.epoch, self._may_begin = max(self.ended, self.epoch), 0, False

    def refused(self, slice_: Slice) -> None:
        """The frames are given up."""
        for frame in slice_.frames:
            self._budget.drop(frame)

    def unsent(self, slice_: Slice) -> None:
        """The frames go again with the next slice."""
        if slice_.process != self._process:
            self.refused(slice_)
            return
        self._waiting.extendleft(reversed(slice_.frames))
        self._news(self)

    def _clear(self) -> None:
        self._passed = None
        while self._waiting:
            self._budget.drop(self._waiting.popleft())
