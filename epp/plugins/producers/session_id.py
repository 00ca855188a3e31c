"""session-id-producer: which session a request belongs to, by a header or a cookie."""

from __future__ import annotations

from typing import ClassVar

from epp.plugins.base import Plugin
from epp.types import LLMRequest, Snapshot

DEFAULT_HEADER = "x-session-id"


class SessionIdProducer(Plugin):
    """Puts the value of the header headerName, or of the cookie cookieName, on the request as `session-id`.

    Neither given: the header x-session-id. Several such producers: the first that finds one decides; each also keeps its own under its
    name.
    """

    type: ClassVar[str] = "session-id-producer"
    produces: ClassVar[tuple[str, ...]] = ("session-id",)

    header_name: str = ""
    cookie_name: str = ""

    def __post_init__(self) -> None:
        header, cookie = self.header_name.strip().lower(), self.cookie_name.strip()
        if header and cookie:
            raise ValueError("write either headerName or cookieName")
        self.__dict__["_cookie"] = cookie
        self.__dict__["_header"] = "cookie" if cookie else header or DEFAULT_HEADER

    def produce(self, request: LLMRequest, candidates: Snapshot) -> None:  # noqa: ARG002 - the protocol's
        state = self.__dict__
        found = request.headers.get(state["_header"], "")
        if found and state["_cookie"]:
            found = _cookie(found, state["_cookie"])
        found = found.strip()
        if found:
            request.attributes[self.name] = found
            request.attributes.setdefault("session-id", found)


def _cookie(header: str, name: str) -> str:
    """The value of that cookie; the first one where there are several, as browsers order them."""
    for pair in header.split(";"):
        key, equals, value = pair.strip().partition("=")
        if equals and key == name:
            return value
    return ""
