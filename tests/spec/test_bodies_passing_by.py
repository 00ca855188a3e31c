"""A body that the decision does not read is not waited for: the request is routed on its headers, whatever the gateway's mode."""

from __future__ import annotations

import gzip
from collections.abc import Mapping

import pytest

from epp.extproc.messages import BodyMode
from tests.builders import (
    DESTINATION,
    FULL_DUPLEX,
    LLM_D,
    PATH,
    Core,
    Stream,
    chat,
    chat_of,
    core,
    destination_of,
    echoed,
    ends,
    kinds,
    pieces,
    request_body,
    request_headers,
    request_trailers,
    response_body,
    response_headers,
    set_headers,
)

CHUNK_MAX = 62_000
BUFFERED, STREAMED, PARTIAL = BodyMode.BUFFERED, BodyMode.STREAMED, BodyMode.BUFFERED_PARTIAL
UNREAD: list[tuple[str, Mapping[str, str | bytes]]] = [
    ("/v1/audio/transcriptions", {}),
    ("/v1/audio/transcriptions", {"content-type": "multipart/form-data"}),
    (PATH, {"upgrade": "websocket"}),
    (PATH, {"content-encoding": "gzip"}),
]
"""A path that is not parsed, an upload, a connection that turns into another protocol, and text nobody unpacks."""
unread = pytest.mark.parametrize(("path", "headers"), UNREAD, ids=["path", "upload", "upgrade", "gzip"])


def opened(world: Core, path: str, headers: Mapping[str, str | bytes], modes: tuple[BodyMode, BodyMode] | None = FULL_DUPLEX) -> Stream:
    """A stream that was routed by its headers alone."""
    stream = Stream(world.session())
    (route,) = stream.send(request_headers(path=path, headers=headers, modes=modes))
    assert route.WhichOneof("response") == "request_headers"
    assert destination_of(route) == "10.0.0.1:8000"
    assert route.dynamic_metadata["envoy.lb"][DESTINATION] == "10.0.0.1:8000"
    assert "content-length" not in set_headers(route), "it is not ours to say"
    assert world.inflight[0] == 1
    return stream


# FULL_DUPLEX_STREAMED


@unread
def test_full_duplex_echoes_each_piece_at_once(path: str, headers: Mapping[str, str | bytes]) -> None:
    stream = opened(world := core(), path, headers)
    for piece, end in [(b"abc", False), (b"", False), (b"\0" * CHUNK_MAX, False), (b"x", False), (b"", True)]:
        (reply,) = stream.send(request_body(piece, end_of_stream=end))
        assert (echoed([reply]), ends([reply])) == (piece, [end])
    assert world.limits.buffered_bytes == 0, "nothing is held"


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("size", [CHUNK_MAX + 1, 2 * CHUNK_MAX, 1_000_000])
def test_full_duplex_a_large_piece_is_echoed_in_small_ones(size: int, end: bool) -> None:
    piece = chat_of(size)
    stream = opened(core(), "/v1/audio/transcriptions", {})
    came = stream.send(request_body(piece, end_of_stream=end))
    assert echoed(came) == piece
    assert max(len(r.request_body.response.body_mutation.streamed_response.body) for r in came) <= CHUNK_MAX
    assert ends(came) == [False] * (len(came) - 1) + [end]


@unread
def test_full_duplex_trailers_end_it(path: str, headers: Mapping[str, str | bytes]) -> None:
    stream = opened(core(), path, headers)
    came = stream.send(request_body(b"abc"), request_trailers())
    assert kinds(came) == ["request_body", "request_trailers"]
    assert ends(came) == [False]
    assert stream.send(request_body(b"late"), request_body(end_of_stream=True)) == []
    assert stream.half_close() == []


def test_full_duplex_trailers_alone_get_no_body_reply() -> None:
    assert kinds(opened(core(), "/v1/audio/transcriptions", {}).send(request_trailers())) == ["request_trailers"]


def test_full_duplex_nothing_is_echoed_after_the_end() -> None:
    stream = opened(core(), "/v1/audio/transcriptions", {})
    stream.send(request_body(b"x", end_of_stream=True))
    assert stream.send(request_body(b"again", end_of_stream=True), request_body()) == []


@pytest.mark.parametrize("modes", [FULL_DUPLEX, None])
def test_full_duplex_a_half_close_ends_the_body_once(modes: tuple[BodyMode, BodyMode] | None) -> None:
    stream = opened(world := core(), "/v1/audio/transcriptions", {}, modes)
    stream.send(request_body(b"abc"))
    came = stream.half_close()
    assert (echoed(came), ends(came)) == (b"", [True])
    assert stream.half_close() == []
    stream.close()
    assert stream.half_close() == []
    assert world.inflight == (0, 0, 0, 0)


def test_a_closed_stream_says_nothing_though_its_body_never_ended() -> None:
    stream = opened(core(), "/v1/audio/transcriptions", {})
    stream.send(request_body(b"abc"))
    stream.close()
    assert stream.half_close() == []
    assert stream.send(request_body(b"more", end_of_stream=True)) == []


def test_a_body_passing_by_may_be_longer_than_any_limit() -> None:
    stream = opened(world := core(body_bytes_max=1_000, buffered_bytes_max=2_000), "/v1/audio/transcriptions", {})
    for _ in range(50):
        assert echoed(stream.send(request_body(b"x" * 10_000))) == b"x" * 10_000
    assert world.metrics.limit_hits == {}


def test_both_directions_of_an_upgraded_connection_pass_side_by_side() -> None:
    """The realtime API: the upstream answers 101 and then both speak at will."""
    stream = opened(core(), "/v1/realtime", {"upgrade": "websocket"})
    assert echoed(stream.send(request_body(b""))) == b"", "Envoy sends an empty piece first and waits for it"
    assert kinds(stream.send(response_headers(101))) == ["response_headers"]
    for number in range(3):
        said, heard = b"ping%d" % number, b"pong%d" % number
        assert echoed(stream.send(request_body(said))) == said
        assert echoed(stream.send(response_body(heard)), "response_body") == heard


def test_a_response_that_ends_early_does_not_stop_the_upload() -> None:
    world = core()
    stream = opened(world, "/v1/audio/transcriptions", {})
    stream.send(request_body(b"abc"), response_headers(413), response_body(b"too large", end_of_stream=True))
    assert world.inflight == (0, 0, 0, 0)
    assert echoed(stream.send(request_body(b"rest", end_of_stream=True))) == b"rest"


# BUFFERED and BUFFERED_PARTIAL


@unread
@pytest.mark.parametrize("mode", [BUFFERED, PARTIAL])
@pytest.mark.parametrize("end", [False, True])
def test_buffered_is_decided_in_the_headers_reply(path: str, headers: Mapping[str, str | bytes], mode: BodyMode, end: bool) -> None:
    stream = opened(world := core(), path, headers, (mode, BodyMode.NONE))
    (reply,) = stream.send(request_body(gzip.compress(chat()), end_of_stream=end))
    assert reply.WhichOneof("response") == "request_body"
    assert not reply.request_body.HasField("response"), "the body stays as it is"
    assert not reply.HasField("dynamic_metadata")
    assert world.inflight[0] == 1
    if not end:
        assert kinds(stream.send(request_trailers())) == ["request_trailers"]
    assert stream.send(request_body(b"again", end_of_stream=True)) == []


# STREAMED


@unread
@pytest.mark.parametrize("unasked", [False, True])
def test_streamed_gets_one_plain_reply_a_piece(path: str, headers: Mapping[str, str | bytes], unasked: bool) -> None:
    stream = Stream(core().session())
    (route,) = stream.send(request_headers(path=path, headers=headers, modes=(STREAMED, BodyMode.NONE), body_unasked=unasked))
    assert destination_of(route) == "10.0.0.1:8000"
    for piece in (b"abc", b"", b"x" * 200_000):
        (reply,) = stream.send(request_body(piece))
        assert reply.WhichOneof("response") == "request_body"
        assert not reply.request_body.HasField("response")
    assert kinds(stream.send(request_trailers())) == ["request_trailers"]


# What the decision still rests on


def test_it_is_routed_by_load() -> None:
    world = core(3, config=LLM_D)
    for number, waiting in enumerate([5.0, 0.0, 9.0], 1):
        world.read(number, waiting=waiting)
    stream = Stream(world.session())
    (route,) = stream.send(request_headers(path="/v1/audio/transcriptions"))
    assert destination_of(route) == "10.0.0.2:8000"


@pytest.mark.parametrize("mode", [BodyMode.FULL_DUPLEX_STREAMED, BUFFERED, STREAMED, PARTIAL, BodyMode.NONE])
def test_an_unknown_path_is_refused_on_its_headers_in_every_mode(mode: BodyMode) -> None:
    (reply,) = Stream(core().session()).send(request_headers(path="/nowhere", modes=(mode, BodyMode.NONE)))
    assert reply.immediate_response.status.code == 404


def test_a_body_that_says_it_is_not_encoded_is_read() -> None:
    stream = Stream(core().session())
    assert stream.send(request_headers(headers={"content-encoding": "identity"})) == []


# A body that is read, in the modes between buffered and full duplex


def test_streamed_unasked_the_decision_waits_for_the_body_and_its_trailers() -> None:
    world = core()
    stream = Stream(world.session())
    body = chat_of(5_000)
    parts = pieces(body, 2_000)
    assert stream.send(request_headers(modes=(STREAMED, STREAMED), body_unasked=True), *map(request_body, parts)) == []
    assert world.limits.buffered_bytes == 5_000
    came = stream.send(request_trailers())
    assert kinds(came) == ["request_headers", *["request_body"] * len(parts), "request_trailers"]
    assert not any(reply.request_body.HasField("response") for reply in came[1:-1])
    assert world.metrics.series("m", "m").requests == 1, "decided on the body"
    assert world.limits.buffered_bytes == 0


def test_streamed_unasked_a_refusal_is_one_answer() -> None:
    stream = Stream(core().session())
    came = stream.send(
        request_headers(modes=(STREAMED, STREAMED), body_unasked=True), request_body(b"{"), request_body(b"", end_of_stream=True)
    )
    assert kinds(came) == ["immediate_response"]
    assert stream.session.answered


def test_streamed_the_models_name_is_not_known_and_the_request_is_routed_all_the_same() -> None:
    world = core()
    stream = Stream(world.session())
    stream.send(request_headers(modes=(STREAMED, BodyMode.NONE)), request_body(b"{"), request_body(b"not json", end_of_stream=True))
    assert kinds(stream.got) == ["request_headers", "request_body", "request_body"]
    assert world.metrics.series("", "").requests == 1


@pytest.mark.parametrize("body", [chat_of(5_000)[:4_000], b"{", b"\0\xff", b""])
def test_buffered_partial_a_cut_body_is_not_read_as_if_it_were_whole(body: bytes) -> None:
    """What is cut is never valid JSON: no client must be told that its request is not."""
    world = core()
    stream = Stream(world.session())
    stream.send(request_headers(modes=(PARTIAL, BodyMode.NONE)))
    (reply,) = stream.send(request_body(body))
    assert destination_of(reply) == "10.0.0.1:8000"
    assert world.metrics.series("", "").requests == 1
    assert stream.send(request_body(b"the rest goes on by itself", end_of_stream=True)) == []


def test_buffered_partial_a_whole_body_is_read() -> None:
    world = core()
    stream = Stream(world.session())
    stream.send(request_headers(modes=(PARTIAL, BodyMode.NONE)))
    (reply,) = stream.send(request_body(chat(), end_of_stream=True))
    assert destination_of(reply) == "10.0.0.1:8000"
    assert world.metrics.series("m", "m").requests == 1
    refused = Stream(world.session())
    refused.send(request_headers(modes=(PARTIAL, BodyMode.NONE)))
    (reply,) = refused.send(request_body(b"{", end_of_stream=True))
    assert reply.immediate_response.status.code == 400


def test_none_a_body_that_comes_all_the_same_is_ignored() -> None:
    stream = Stream(core().session())
    stream.send(request_headers(modes=(BodyMode.NONE, BodyMode.NONE)))
    assert stream.send(request_body(chat(), end_of_stream=True)) == []


def test_buffered_trailers_without_any_body_carry_the_destination_as_metadata() -> None:
    """The headers were answered before and nothing else is left to say it in."""
    stream = Stream(core().session())
    stream.send(request_headers(path="", modes=(BUFFERED, BodyMode.NONE)))
    (reply,) = stream.send(request_trailers())
    assert reply.WhichOneof("response") == "request_trailers"
    assert reply.dynamic_metadata["envoy.lb"][DESTINATION] == "10.0.0.1:8000"
    stream.close()


# mode_override


@pytest.mark.parametrize("request_mode", [BUFFERED, PARTIAL])
@pytest.mark.parametrize("response_mode", [BUFFERED, PARTIAL])
def test_a_buffered_response_is_asked_not_to_be_sent_for_it_would_hold_back_the_first_token(
    request_mode: BodyMode, response_mode: BodyMode
) -> None:
    (reply,) = Stream(core().session()).send(request_headers(modes=(request_mode, response_mode)))
    assert reply.WhichOneof("response") == "request_headers"
    assert not reply.request_headers.HasField("response")
    override = reply.mode_override
    assert (override.request_body_mode, override.response_body_mode) == (request_mode, BodyMode.NONE)
    assert override.response_header_mode == override.SEND, "who served is still of interest"


@pytest.mark.parametrize(
    "modes",
    [
        (BUFFERED, BodyMode.NONE),
        (BUFFERED, STREAMED),
        (BUFFERED, BodyMode.FULL_DUPLEX_STREAMED),
        (BodyMode.FULL_DUPLEX_STREAMED, BUFFERED),
        FULL_DUPLEX,
        None,
    ],
)
def test_no_mode_is_overridden_without_need_nor_in_full_duplex_where_it_is_ignored(modes: tuple[BodyMode, BodyMode] | None) -> None:
    stream = Stream(core().session())
    stream.send(request_headers(modes=modes), request_body(chat(), end_of_stream=True))
    assert stream.got
    assert not any(reply.HasField("mode_override") for reply in stream.got)


@pytest.mark.parametrize("request_mode", [BUFFERED, PARTIAL, STREAMED, BodyMode.NONE])
def test_a_buffered_response_is_not_wanted_either_where_the_request_is_routed_on_its_headers(request_mode: BodyMode) -> None:
    """`/v1/realtime` streams its answers as chats do."""
    (reply,) = Stream(core().session()).send(request_headers(path="/v1/realtime", modes=(request_mode, BUFFERED)))
    assert destination_of(reply) == "10.0.0.1:8000"
    override = reply.mode_override
    assert reply.HasField("mode_override")
    assert (override.request_body_mode, override.response_body_mode) == (request_mode, BodyMode.NONE)


@pytest.mark.parametrize("header", ["x-llm-d-model-name-rewrite", "x-gateway-model-name-rewrite"])
def test_a_response_whose_model_is_to_be_renamed_is_wanted(header: str) -> None:
    (reply,) = Stream(core().session()).send(request_headers(modes=(BUFFERED, BUFFERED), headers={header: "other"}))
    assert not reply.HasField("mode_override")


def test_the_mode_is_overridden_once_and_only_in_the_reply_to_the_headers() -> None:
    stream = Stream(core().session())
    stream.send(request_headers(modes=(BUFFERED, BUFFERED)), request_body(chat(), end_of_stream=True), response_headers())
    assert [reply.HasField("mode_override") for reply in stream.got] == [True, False, False]


def test_a_gateway_that_overrides_no_mode_is_answered_as_if_it_had_not_been_asked() -> None:
    world = core()
    stream = Stream(world.session())
    stream.send(request_headers(modes=(BUFFERED, BUFFERED)), request_body(chat(), end_of_stream=True), response_headers())
    (reply,) = stream.send(response_body(b'{"usage":{"prompt_tokens":3,"completion_tokens":4}}', end_of_stream=True))
    assert reply.WhichOneof("response") == "response_body"
    assert world.metrics.series("m", "m").output_tokens.sum == 4
    stream.close()
    assert (world.inflight, world.errors("m")) == ((0, 0, 0, 0), {})
