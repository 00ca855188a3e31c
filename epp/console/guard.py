"""Who may use the metrics port, where that is asked (`--metrics-endpoint-auth`): every path, from everywhere, before anything is looked at.

As the reference picker's library does it: a bearer token is required, who shows none or a bad one gets 401, who may not (an RBAC rule on
the path as nonResourceURL, with the method in lower case as verb) gets 403. There is no exemption for this machine: in a pod's network
it is the other containers. One departure: `/drain` with the token of `--admin-token-file` needs no review, or that token would be of no use.

Not here: who is allowed (sources.kubernetes.reviews). Cost per request: what the review costs, a look-up where it is remembered.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from http import HTTPStatus

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

DRAIN = "/drain"

Authorize = Callable[[str, str, str], Awaitable[tuple[int, str]]]
"""`authorize(token, verb, path)`: 200, or the status to refuse with and what to say. `token` is empty if none was shown."""


def guard(authorize: Authorize, admin_token: Callable[[], str]) -> Middleware:
    """A middleware that lets pass what `authorize` allows."""

    @web.middleware
    async def ask(request: web.Request, handler: Handler) -> web.StreamResponse:
        token = bearer(request)
        if request.path == DRAIN and same(token, admin_token()):
            return await handler(request)
        status, message = await authorize(token, request.method.lower(), request.path)
        if status == HTTPStatus.OK:
            return await handler(request)
        headers = {"WWW-Authenticate": "Bearer"} if status == HTTPStatus.UNAUTHORIZED else {}
        body = msgspec.json.encode({"error": message})
        return web.Response(body=body, status=status, content_type="application/json", headers=headers)

    return ask


def bearer(request: web.Request) -> str:
    """The token a request shows; empty without one. The scheme's case does not matter (RFC 9110)."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def same(given: str, token: str) -> bool:
    """Whether `given` is this token, in a time that tells nothing of it. An empty token is nobody's."""
    return bool(token) and hmac.compare_digest(given.encode(errors="surrogateescape"), token.encode())
