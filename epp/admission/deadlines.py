"""When the next queued request has waited long enough.

While there are endpoints each request has its own time: a heap of moments that are never too late, for time starts anew when candidates come
back; when one comes the real one is worked out, and the request put back if it is later. While there are none all of a group have the
same, so it is the group's line, in order of arrival, that is looked at, and only then: a short time without endpoints costs those
that wait for busy ones nothing. Cost: O(log n).
"""

from __future__ import annotations

import heapq
from collections import deque
from math import inf

from epp.admission.queues import QUEUED, Waiting
from epp.admission.saturation import EMPTY, Group
from epp.config.quantities import duration_s
from epp.errors import BadRequestError
from epp.types import LLMRequest

TTL_HEADERS = ("x-llm-d-request-ttl", "x-gateway-request-ttl")
"""How long this request waits at most: `30s`, `1500ms`, or seconds. 0: not at all."""
DEAD_MIN = 64
LOOKS_MAX = 256
"""Requests looked at in one go: then others have the event loop."""


class Deadlines:
    """See the module. `ttl_s` of a request, and this, are 0 where there is no limit."""

    def __init__(self, no_endpoints_ttl_s: float) -> None:
        self._no_endpoints_ttl_s = no_endpoints_ttl_s
        self._heap: list[tuple[float, int, Waiting]] = []
        self._lines: dict[Group, deque[Waiting]] = {}
        """Of each group, as they came; empty where a wait for endpoints has no end."""
        self._in_line = 0

    def __len__(self) -> int:
        """Entries, with those of requests that are no longer queued."""
        return len(self._heap) + self._in_line

    def add(self, entry: Waiting, now_s: float) -> None:
        """In the order in which they came."""
        if entry.ttl_s:
            ends_s = entry.queued_s + entry.ttl_s if entry.ttl_given else self._ends_s(entry, entry.ttl_s)
            heapq.heappush(self._heap, (max(now_s, ends_s), entry.number, entry))
        if self._no_endpoints_ttl_s:
            line = self._lines.get(entry.group)
            if line is None:
                line = self._lines[entry.group] = deque()
            line.append(entry)
            self._in_line += 1

    def first_s(self) -> float:
        heap = self._heap
        while heap and heap[0][2].state != QUEUED:
            heapq.heappop(heap)
        first = heap[0][0] if heap else inf
        for group, line in self._lines.items():
            if group.state == EMPTY:
                head = self._head(line)
                if head is not None:
                    first = min(first, self._ends_s(head, self._no_endpoints_ttl_s))
        return first

    def due(self, now_s: float) -> list[Waiting]:
        """Those whose time is over, up to `LOOKS_MAX` of them: `first_s` says if there are more. They are in here no more."""
        found: dict[int, Waiting] = {}
        heap, looks = self._heap, LOOKS_MAX
        while heap and heap[0][0] <= now_s and looks:
            looks -= 1
            entry = heapq.heappop(heap)[2]
            if entry.state != QUEUED:
                continue
            if entry.ttl_given:
                found[entry.number] = entry
            elif entry.group.state == EMPTY:  # it has all its time again when they come back
                heapq.heappush(heap, (now_s + entry.ttl_s, entry.number, entry))
            elif (ends_s := self._ends_s(entry, entry.ttl_s)) > now_s:
                heapq.heappush(heap, (ends_s, entry.number, entry))
            else:
                found[entry.number] = entry
        for group, line in self._lines.items():
            if group.state == EMPTY:
                while looks and (head := self._head(line)) is not None and self._ends_s(head, self._no_endpoints_ttl_s) <= now_s:
                    looks -= 1
                    found[head.number] = head
                    line.popleft()
                    self._in_line -= 1
        return list(found.values())

    def shrink(self, queued: int) -> None:
        """There are so many queued: the rest is swept out when it is the most."""
        if len(self._heap) > 2 * queued + DEAD_MIN:
            self._heap = [item for item in self._heap if item[2].state == QUEUED]
            heapq.heapify(self._heap)
        if self._in_line > 2 * queued + DEAD_MIN:
            lines = {group: deque(entry for entry in line if entry.state == QUEUED) for group, line in self._lines.items()}
            self._lines = {group: line for group, line in lines.items() if line}
            self._in_line = sum(map(len, self._lines.values()))

    def _head(self, line: deque[Waiting]) -> Waiting | None:
        """Who is queued longest of them."""
        while line and line[0].state != QUEUED:
            line.popleft()
            self._in_line -= 1
        return line[0] if line else None

    @staticmethod
    def _ends_s(entry: Waiting, ttl_s: float) -> float:
        """If its candidates stay as they are, there or not."""
        return max(entry.queued_s, entry.group.since_s) + ttl_s


def ttl_given_s(request: LLMRequest, most_s: float) -> float | None:
    """What the request's headers say, `most_s` where that is longer. Raises BadRequestError."""
    headers = request.headers
    written = headers.get(TTL_HEADERS[0]) or headers.get(TTL_HEADERS[1])
    if not written:
        return None
    try:
        seconds = float(written) if written.isascii() and written.replace(".", "", 1).isdecimal() else duration_s(written)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < inf:
        raise BadRequestError(f"{TTL_HEADERS[0]}: write a time like 30s, 1500ms, or a number of seconds")
    return min(seconds, most_s)
