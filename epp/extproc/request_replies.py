"""The replies to a routed request, in the one legal order for the gateway's body mode (protocol sections 1 and 2).

Not here: when they are sent (session), how they are written (codec).
"""

from __future__ import annotations

from epp.extproc.messages import BodyMode, ContinueBody, ContinueTrailers, Reply, RouteReply, StreamedBody

CHUNK_BYTES_MAX = 62_000
"""Body handed back in pieces of at most this: GKE and others limit a message to 64 KiB (rule 12)."""


def request_replies(route: RouteReply, mode: BodyMode, body: bytes, renamed: bytes | None, pieces: int, *, trailers: bool) -> list[Reply]:
    """`renamed`: the body to send in the place of the `body` that came in `pieces`. `trailers`: they ended it."""
    ended: list[Reply] = [ContinueTrailers(response=False)] if trailers else []
    if mode is BodyMode.FULL_DUPLEX_STREAMED:
        body = body if renamed is None else renamed
        if body:
            route.content_length = len(body)
        return [route, *streamed(body, ends=not trailers), *ended] if pieces else [route, *ended]
    if mode is BodyMode.STREAMED or not pieces:
        if renamed is not None:
            route.remove = (*route.remove, "content-length")
        instead = [None] * pieces if renamed is None else [renamed, *[b""] * (pieces - 1)]
        return [route, *(ContinueBody(response=False, body=piece) for piece in instead), *ended]
    route.in_body, route.body = True, renamed
    if renamed is not None:
        route.content_length = len(renamed)
    return [route]


def streamed(body: bytes, *, ends: bool) -> list[Reply]:
    """`body` in pieces of at most CHUNK_BYTES_MAX; an empty body is one empty piece, for it was received."""
    size = len(body)
    if size <= CHUNK_BYTES_MAX:
        return [StreamedBody(body, end_of_stream=ends, response=False)] if size or ends else []
    view = memoryview(body)
    last = (size - 1) // CHUNK_BYTES_MAX * CHUNK_BYTES_MAX
    return [
        StreamedBody(view[at : at + CHUNK_BYTES_MAX], end_of_stream=ends and at == last, response=False)
        for at in range(0, size, CHUNK_BYTES_MAX)
    ]
