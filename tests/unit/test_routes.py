"""Which path is read how, and which is not served."""

from __future__ import annotations

import gzip

import pytest

from epp.errors import BadRequestError, NotFoundError
from epp.parsing import routes
from epp.parsing.anthropic import AnthropicParser
from epp.parsing.base import JsonParser
from epp.parsing.openai import OpenAIParser
from epp.parsing.passthrough import PassthroughParser
from epp.parsing.routes import PATH_CHARS_MAX, PATHS_MAX, Routes
from epp.parsing.sglang_http import SglangHttpParser
from epp.parsing.vllm_http import VllmHttpParser
from epp.plugins.base import Parser
from epp.types import LLMRequest
from tests.builders import Stream, chat, core, echoed, kinds, request_body, request_headers

COMPLETION = b'{"model":"m","prompt":"hi there"}'


def parse(path: str, body: bytes | None, *, unknown_paths_ok: bool = False, headers: dict[str, str] | None = None) -> LLMRequest:
    request = LLMRequest(id="r", path=path, headers=headers or {})
    Routes.default(unknown_paths_ok=unknown_paths_ok).parse(request, body)
    return request


def parser_of(path: str, body: bytes | None = None, *parsers: JsonParser) -> str:
    """The type of the parser a request got."""
    made = Routes(parsers, unknown_paths_ok=False) if parsers else Routes.default(unknown_paths_ok=False)
    found = made.parse(LLMRequest(id="r", path=path, headers={}), body)
    assert found is None or isinstance(found, Parser)
    return "" if found is None else found.type


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
    for opaque in (b"", b"not json", b"\0\1", b"[1]", None, b'{"model":"m"}', b"{}"):
        assert parse("", opaque).model == ""
        assert parser_of("", opaque) == ""
    for bad in (b'{"messages":[]}', b'{"messages":', b"{", b'{"token_ids":[]}'):
        with pytest.raises(BadRequestError):
            parse("", bad)


@pytest.mark.parametrize(
    ("body", "parser"),
    [
        (b'{"messages":[1]}', "openai-parser"),
        (b'{"prompt":"x"}', "openai-parser"),
        (b'{"token_ids":[1],"x":{"messages":1}}', "vllmhttp-parser"),
        (b'{"input_ids":[1]}', "sglanghttp-parser"),
        (b'{"input_ids":[1],"messages":[1]}', "openai-parser"),
    ],
)
def test_whose_body_it_is_that_came_without_a_path(body: bytes, parser: str) -> None:
    assert parser_of("", body) == parser
    assert parser_of("", body, AnthropicParser()) == ""
    assert parser_of("", body, AnthropicParser(), PassthroughParser()) == "passthrough-parser"


@pytest.mark.parametrize(
    ("path", "parser", "kind"),
    [
        ("/v1/chat/completions", "openai-parser", "chat"),
        ("/v1/chat/completions/render", "openai-parser", "chat"),
        ("/v1/completions", "openai-parser", "completion"),
        ("/v1/completions/render", "openai-parser", "completion"),
        ("/v1/embeddings", "openai-parser", "embedding"),
        ("/v1/responses", "openai-parser", "response"),
        ("/v1/conversations", "openai-parser", "conversation"),
        ("/v1/images/generations", "openai-parser", "image"),
        ("/v1/messages", "anthropic-parser", "messages"),
        ("/v1/messages/count_tokens", "anthropic-parser", "count"),
        ("/inference/v1/generate", "vllmhttp-parser", "generate"),
        ("/team-a/inference/v1/generate", "vllmhttp-parser", "generate"),
        ("/generate", "sglanghttp-parser", "generate"),
        ("/team-a/generate", "sglanghttp-parser", "generate"),
        ("/vllm.grpc.engine.VllmEngine/Generate", "vllmgrpc-parser", "generate"),
        ("/vllm.grpc.engine.VllmEngine/Embed", "vllmgrpc-parser", "embed"),
        ("/google.cloud.aiplatform.v1beta1.PredictionService/ChatCompletions", "vertexai-parser", "chat"),
        ("/google.cloud.aiplatform.v1.PredictionService/RawPredict", "vertexai-parser", "raw"),
        ("/google.cloud.aiplatform.v1.PredictionService/StreamRawPredict", "vertexai-parser", "raw"),
    ],
)
def test_the_longest_suffix_wins(path: str, parser: str, kind: str) -> None:
    made = Routes.default(unknown_paths_ok=False)
    for _ in range(2):  # the second time from memory
        found, found_kind = made.match(path)
        assert found is not None
        assert (found.type, found_kind) == (parser, kind)  # type: ignore[attr-defined]
        assert made.needs_body(path, {})


def test_a_suffix_of_two_parsers_is_the_first_ones() -> None:
    class Mine(OpenAIParser):
        type = "mine"
        suffixes = {"/completions": "completion", "/mine": "chat"}  # noqa: RUF012 - a class variable by its base

    assert parser_of("/v1/completions", None, Mine(), OpenAIParser()) == "mine"
    assert parser_of("/v1/completions", None, OpenAIParser(), Mine()) == "openai-parser"
    assert parser_of("/v1/chat/completions", None, Mine(), OpenAIParser()) == "openai-parser"
    assert parser_of("/mine", None, Mine(), OpenAIParser()) == "mine"


def test_a_parser_for_any_path_takes_what_is_left() -> None:
    parsers = (PassthroughParser(), OpenAIParser())
    made = Routes(parsers, unknown_paths_ok=False)
    for path in ("/nowhere", "/", "/v1/models"):
        assert parser_of(path, b"\xff", *parsers) == "passthrough-parser"
        assert not made.needs_body(path, {})
    assert parser_of("/v1/completions", COMPLETION, *parsers) == "openai-parser"


def test_one_that_reads_bodies_is_given_them_on_any_path() -> None:
    class Anything(OpenAIParser):
        type = "anything"
        suffixes = {}  # noqa: RUF012 - a class variable by its base

    made = Routes([Anything()], unknown_paths_ok=False)
    assert made.needs_body("/nowhere", {})
    request = LLMRequest(id="r", path="/nowhere", headers={})
    made.parse(request, COMPLETION)
    assert request.prompt == b"hi there"


@pytest.mark.parametrize(
    ("path", "headers", "needed"),
    [
        ("/v1/completions", {}, True),
        ("/v1/completions", {"content-encoding": "identity"}, True),
        ("/v1/completions", {"content-encoding": "gzip"}, False),
        ("/v1/completions", {"upgrade": "websocket"}, False),
        ("", {}, True),
        ("", {"content-encoding": "br"}, False),
        ("/v1/models", {}, False),
        ("/nowhere", {}, False),
    ],
)
def test_whose_body_the_decision_waits_for(path: str, headers: dict[str, str], needed: bool) -> None:
    assert Routes.default(unknown_paths_ok=False).needs_body(path, headers) is needed


def test_without_a_path_nothing_is_waited_for_that_nobody_reads() -> None:
    assert not Routes([PassthroughParser()], unknown_paths_ok=False).needs_body("", {})
    assert not Routes([], unknown_paths_ok=False).needs_body("", {})
    assert Routes([SglangHttpParser(), PassthroughParser()], unknown_paths_ok=False).needs_body("", {})


def test_paths_remembered_are_bounded() -> None:
    made = Routes.default(unknown_paths_ok=True)
    for number in range(3 * PATHS_MAX):
        made.match(f"/{number}/v1/completions")
    assert 0 < len(made._seen) <= PATHS_MAX
    before = len(made._seen)
    long = "/" + "x" * PATH_CHARS_MAX + "/v1/completions"
    assert made.match(long)[1] == "completion"
    assert len(made._seen) == before


@pytest.mark.parametrize(
    "path", ["/v1/models", "/tokenize", "/v2/models/m/infer", "/health", "/api/chat", "/v1/rerank", "/prefix/detokenize"]
)
def test_what_engines_serve_but_we_do_not_read_is_passed_through_unread(path: str) -> None:
    for body in (b"{", b"\xff", b"", None, chat()):
        request = parse(path, body)
        assert (request.model, request.prompt_tokens) == ("", 0)


@pytest.mark.parametrize("path", ["/vllm.grpc.engine.VllmEngine/HealthCheck", "/google.cloud.aiplatform.v1.PredictionService/Predict"])
def test_other_methods_of_the_engines_services_pass(path: str) -> None:
    assert parse(path, b"\0\0\0\0\0").model == ""
    assert parser_of(path) == ""


def test_of_what_was_not_shown_the_parser_is_known_all_the_same() -> None:
    assert parser_of("/v1/completions", None) == "openai-parser"
    with pytest.raises(BadRequestError):
        parser_of("/v1/completions", b"")


@pytest.mark.parametrize("path", ["/", "/nowhere", "/v1x/y", "/favicon.ico"])
def test_a_path_no_engine_serves_is_not_found_unless_told_otherwise(path: str) -> None:
    with pytest.raises(NotFoundError, match="--unknown-paths=route"):
        parse(path, chat())
    with pytest.raises(NotFoundError):
        parser_of(path, chat(), VllmHttpParser())
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
