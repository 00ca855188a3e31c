"""An API server that says what a test has written down, below the real `Api`: for what no server does on demand, and for virtual time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2

from epp.clock import VirtualClock
from epp.sources.kubernetes.api import Api

NO_FAULTS: tuple[type[Exception], ...] = (httpx2.HTTPError, httpx2.StreamError, OSError)


class Chunks(httpx2.AsyncByteStream):
    """A body that comes in parts. A part may be bytes, a fault to raise, seconds that pass, an event to wait for or something to call."""

    def __init__(self, parts: Sequence[Any], clock: VirtualClock) -> None:
        self._parts = parts
        self._clock = clock

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self._parts:
            if isinstance(part, bytes):
                yield part
            elif isinstance(part, Exception):
                raise part
            elif isinstance(part, int | float):
                self._clock.advance(part)
            elif isinstance(part, asyncio.Event):
                await part.wait()
            else:
                part()


@dataclass
class Answer:
    status: int = 200
    parts: Sequence[Any] = ()
    headers: dict[str, str] = field(default_factory=dict)


class Script(httpx2.AsyncBaseTransport):
    """Gives the answers in their order; `requests` are those that came. Where there is none left the connection is refused."""

    def __init__(self, *answers: Answer | Exception, clock: VirtualClock | None = None) -> None:
        self.clock = clock or VirtualClock(1_000.0)
        self.answers = list(answers)
        self.requests: list[httpx2.Request] = []
        self.api = Api(httpx2.AsyncClient(transport=self, base_url="http://api"), namespace="llm", faults=NO_FAULTS)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        await request.aread()
        self.requests.append(request)
        answer = self.answers.pop(0) if self.answers else httpx2.ConnectError("refused")
        if isinstance(answer, Exception):
            raise answer
        return httpx2.Response(answer.status, headers=answer.headers, stream=Chunks(answer.parts, self.clock))

    @property
    def asked(self) -> list[str]:
        """`list` or `watch` of each request, with the version or the page it names."""
        words = []
        for request in self.requests:
            params = request.url.params
            word = "watch" if "watch" in params else "list"
            words.append(" ".join(filter(None, (word, params.get("resourceVersion"), params.get("continue")))))
        return words


def listing(*items: Any, version: str = "10", next_page: str = "") -> Answer:
    body = {"metadata": {"resourceVersion": version} | ({"continue": next_page} if next_page else {}), "items": list(items)}
    return Answer(parts=[json.dumps(body).encode()])


def status(code: int, reason: str = "", message: str = "", **headers: str) -> Answer:
    body = {"kind": "Status", "code": code, "reason": reason, "message": message}
    return Answer(code, [json.dumps(body).encode()], {name.replace("_", "-"): value for name, value in headers.items()})


def event(type_: str, item: Any) -> bytes:
    return json.dumps({"type": type_, "object": item}).encode() + b"\n"


def bookmark(version: str) -> bytes:
    return event("BOOKMARK", {"kind": "Pod", "metadata": {"resourceVersion": version}})


def expired() -> bytes:
    return event("ERROR", {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"})


def watching(*parts: Any, ends_after_s: float = 300.0) -> Answer:
    """A watch that brings these, lasts that long and is ended by the server."""
    return Answer(parts=[*parts, ends_after_s])


def pod(name: str, version: int | str = 1, **labels: str) -> dict[str, Any]:
    """Ready, at an address made from the number its name ends with."""
    number = int("".join(filter(str.isdigit, name)) or 0)
    return {
        "metadata": {"name": name, "namespace": "llm", "resourceVersion": str(version), "uid": f"uid-{name}", "labels": labels},
        "status": {
            "phase": "Running",
            "podIP": f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}",
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }
