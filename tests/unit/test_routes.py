"""Which path is read how, and which is not served."""

from __future__ import annotations

import gzip

import pytest

from epp.errors import BadRequestError, NotFoundError
from epp.parsing import routes
from epp.types import LLMRequest
from tests.builders import Stream, chat, core, echoed, kinds, request_body, request_headers

COMPLETION = b'{"model":"m","prompt":"hi there"}'


def parse(path: str, body: bytes | None, *, unknown_paths_ok: bool = False, headers: dict[str, str] | None = None) -> LLMRequest:
    request = LLMRequest(id="r", path=path, headers=headers or {})
    routes.parse(request, body, unknown_paths_ok=unknown_paths_ok)
    return request


@pytest.mark.parametrize(
    ("headers", "path"),
    [
        ({":path": "/v1/chat/completions"}, "/v1/chat/completions"),
        ({":path": "/v1/models?x=/v1/chat/completions"}, "/v1/models"),
        ({"x-original-path": "/a?b"}, "/a"),
        ({"x-forwarded-path": "/c"}, "/c"),
        ({":path": "", "x-original-path": "/a"}, "/a"),
        ({":path": "/p", "x-original-path": "/a"}, "/p"),
        ({}, ""),
    ],
)
def test_where_the_path_is_found(headers: dict[str, str], path: str) -> None:
    assert routes.path_of(headers) == path


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/team-a/v1/chat/completions", "/chat/completions"])
def test_chat_by_the_end_of_the_path(path: str) -> None:
    assert parse(path, chat()).model == "m"
    with pytest.raises(BadRequestError, match="valid messages"):
        parse(path, COMPLETION)


@pytest.mark.parametrize("path", ["/v1/completions", "/team-a/v1/completions"])
def test_completions_by_the_end_of_the_path(path: str) -> None:
    request = parse(path, COMPLETION)
    assert (request.model, request.prompt) == ("m", b"hi there")


def test_without_a_path_the_body_tells() -> None:
    assert parse("", chat("x")).prompt_tokens > 0
    assert parse("", COMPLETION).prompt == b"hi there"
    assert parse("", b"  \n" + COMPLETION).prompt == b"hi there"
    for opaque in (b"", b"not json", b"\0\1", b"[1]", None):
        assert parse("", opaque).model == ""
    with pytest.raises(BadRequestError):
        parse("", b'{"messages":[1]}')


@pytest.mark.parametrize(
    "path", ["/v1/embeddings", "/v1/models", "/tokenize", "/v2/models/m/infer", "/health", "/prefix/generate", "/api/chat", "/v1/responses"]
)
def test_what_engines_serve_but_we_do_not_read_is_passed_through_unread(path: str) -> None:
    for body in (b"{", b"\xff", b"", None, chat()):
        request = parse(path, body)
        assert (request.model, request.prompt_tokens) == ("", 0)


@pytest.mark.parametrize("path", ["/", "/nowhere", "/v1x/y", "/favicon.ico"])
def test_a_path_no_engine_serves_is_not_found_unless_told_otherwise(path: str) -> None:
    with pytest.raises(NotFoundError, match="--unknown-paths=route"):
        parse(path, chat())
    assert parse(path, chat(), unknown_paths_ok=True).model == ""


def test_a_long_unknown_path_is_not_sent_back_whole() -> None:
    with pytest.raises(NotFoundError) as caught:
        parse("/" + "x" * 10_000, None)
    assert len(caught.value.message) < 400


def test_a_compressed_body_is_routed_unread_and_whole() -> None:
    world = core()
    stream = Stream(world.session())
    body = gzip.compress(chat())
    stream.send(request_headers(headers={"content-encoding": "gzip"}), request_body(body, end_of_stream=True))
    assert kinds(stream.got) == ["request_headers", "request_body"]
    assert echoed(stream.got) == body
    assert world.metrics.series("", "").requests == 1


def test_a_body_that_says_it_is_not_compressed_is_read() -> None:
    assert parse("/v1/chat/completions", chat(), headers={"content-encoding": "identity"}).model == "m"


def test_a_body_that_was_not_seen_is_not_missed() -> None:
    assert parse("/v1/chat/completions", None).model == ""
