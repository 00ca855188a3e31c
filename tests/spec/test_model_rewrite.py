"""A model renamed by the gateway: the engine is asked for its own name, the client is answered with the one it used."""

from __future__ import annotations

import json

import pytest

from epp._pb import epp_ext_proc_pb2 as pb
from epp.extproc.messages import BodyMode
from tests.builders import (
    FULL_DUPLEX,
    Core,
    Stream,
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
    response_trailers,
    set_headers,
)

REWRITE, REWRITE_OLD = "x-llm-d-model-name-rewrite", "x-gateway-model-name-rewrite"
BODY = (
    b'{ "seed":123456789012345678901234567890 ,"messages":[{"role":"user","content":"say \\"model\\":\\"m\\" <&> \xc3\xbc"}],\n'
    b'  "extra":{"model":"m","list":[{"model":"m"}]}, "model" : "m","n":1.0 }'
)
RENAMED = BODY.replace(b'"model" : "m"', b'"model" : "org/target-7b"')
BUFFERED, STREAMED, FULL = BodyMode.BUFFERED, BodyMode.STREAMED, BodyMode.FULL_DUPLEX_STREAMED


def renamed(
    world: Core, *, modes: tuple[BodyMode, BodyMode] | None = FULL_DUPLEX, target: str = "org/target-7b", body: bytes = BODY
) -> Stream:
    """A stream whose request phase is over, its model renamed by the header."""
    stream = Stream(world.session())
    stream.send(request_headers(modes=modes, headers={REWRITE: target}), request_body(body, end_of_stream=True))
    return stream


def removed(reply: pb.ProcessingResponse) -> list[str]:
    return list(getattr(reply, reply.WhichOneof("response")).response.header_mutation.remove_headers)


# The request


@pytest.mark.parametrize("header", [REWRITE, REWRITE_OLD])
def test_the_body_is_spliced_and_nothing_else_of_it_changes(header: str) -> None:
    world = core()
    stream = Stream(world.session())
    stream.send(request_headers(headers={header: "org/target-7b"}), *map(request_body, pieces(BODY, 7)), request_body(end_of_stream=True))
    assert echoed(stream.got) == RENAMED
    assert ends(stream.got) == [True]
    assert set_headers(stream.got[0])["content-length"] == b"%d" % len(RENAMED)
    assert world.metrics.series("m", "org/target-7b").requests == 1


def test_the_newer_header_wins() -> None:
    stream = Stream(core().session())
    headers = {REWRITE_OLD: "old", REWRITE: "new"}
    stream.send(request_headers(headers=headers), request_body(BODY, end_of_stream=True))
    assert json.loads(echoed(stream.got))["model"] == "new"


def test_an_empty_header_and_the_same_name_change_nothing() -> None:
    for target in ("", "m"):
        stream = renamed(core(), target=target)
        assert echoed(stream.got) == BODY
        stream.send(response_headers())
        answer = b'{"model":"m"}'
        assert echoed(stream.send(response_body(answer, end_of_stream=True)), "response_body") == answer


def test_a_large_body_comes_back_in_pieces_with_the_length_it_has_now() -> None:
    body = chat_of(200_000)
    stream = renamed(core(), body=body, target="x" * 500)
    back = echoed(stream.got)
    assert len(back) == 200_000 + 499
    assert json.loads(back) == json.loads(body) | {"model": "x" * 500}
    assert set_headers(stream.got[0])["content-length"] == b"200499"
    assert max(len(r.request_body.response.body_mutation.streamed_response.body) for r in stream.got[1:]) <= 62_000


def test_with_trailers_the_renamed_body_does_not_say_that_it_ends() -> None:
    stream = Stream(core().session())
    stream.send(request_headers(headers={REWRITE: "org/target-7b"}), request_body(BODY), request_trailers())
    assert kinds(stream.got) == ["request_headers", "request_body", "request_trailers"]
    assert (echoed(stream.got), ends(stream.got)) == (RENAMED, [False])


@pytest.mark.parametrize("mode", [BUFFERED, BodyMode.BUFFERED_PARTIAL])
def test_buffered_the_body_reply_carries_the_body_and_its_length(mode: BodyMode) -> None:
    stream = renamed(core(), modes=(mode, BodyMode.NONE))
    first, reply = stream.got
    assert (set_headers(first), removed(first)) == ({}, [])
    assert reply.request_body.response.body_mutation == pb.BodyMutation(body=RENAMED)
    assert set_headers(reply)["content-length"] == b"%d" % len(RENAMED)
    assert destination_of(reply) == "10.0.0.1:8000"
    assert removed(reply) == [REWRITE]


def test_buffered_without_a_rename_the_length_is_left_alone() -> None:
    stream = Stream(core().session())
    _, reply = stream.send(request_headers(modes=(BUFFERED, BodyMode.NONE)), request_body(BODY, end_of_stream=True))
    assert "content-length" not in set_headers(reply)
    assert not reply.request_body.response.HasField("body_mutation")


def test_a_body_cut_by_the_gateway_is_left_as_it_is() -> None:
    stream = Stream(core().session())
    stream.send(request_headers(modes=(BodyMode.BUFFERED_PARTIAL, BodyMode.NONE), headers={REWRITE: "t"}))
    (reply,) = stream.send(request_body(BODY[:-20]))
    assert not reply.request_body.response.HasField("body_mutation")
    assert "content-length" not in set_headers(reply)


def test_streamed_the_first_piece_carries_the_new_body_and_the_others_are_emptied() -> None:
    stream = Stream(core().session())
    parts = pieces(BODY, 60)
    stream.send(request_headers(modes=(STREAMED, BodyMode.NONE), body_unasked=True, headers={REWRITE: "org/target-7b"}))
    stream.send(*map(request_body, parts[:-1]), request_body(parts[-1], end_of_stream=True))
    route, first, *rest = stream.got
    assert removed(route) == [REWRITE, "content-length"], "the length is only known now: the upstream gets it chunked"
    assert "content-length" not in set_headers(route)
    assert first.request_body.response.body_mutation == pb.BodyMutation(body=RENAMED)
    assert len(rest) == len(parts) - 1
    assert all(reply.request_body.response.body_mutation == pb.BodyMutation(clear_body=True) for reply in rest)


OWN = {
    REWRITE: "t",
    REWRITE_OLD: "t",
    "x-llm-d-inference-objective": "o",
    "x-gateway-inference-objective": "o",
    "x-llm-d-inference-fairness-id": "f",
    "x-gateway-inference-fairness-id": "f",
}


@pytest.mark.parametrize("mode", [FULL, BUFFERED, STREAMED, BodyMode.NONE, BodyMode.BUFFERED_PARTIAL])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/audio/transcriptions"])
def test_headers_meant_for_the_picker_do_not_reach_the_engine(mode: BodyMode, path: str) -> None:
    stream = Stream(core().session())
    stream.send(request_headers(path=path, modes=(mode, BodyMode.NONE), headers={**OWN, "x-mine": "kept"}))
    if mode is not BodyMode.NONE:
        stream.send(request_body(b'{"model":"m","prompt":"x"}', end_of_stream=True))
    gone = [name for reply in stream.got for name in removed(reply) if name != "content-length"]
    assert sorted(gone) == sorted(OWN)


def test_headers_meant_for_the_picker_are_removed_from_a_get_too() -> None:
    stream = Stream(core().session())
    (reply,) = stream.send(request_headers(path="/v1/models", end_of_stream=True, headers=OWN))
    assert sorted(removed(reply)) == sorted(OWN)


def test_a_target_name_longer_than_any_models_is_refused_as_the_clients_is() -> None:
    """It is kept as a metric label like the other, and a client may set the header where no gateway removes it."""
    stream = renamed(core(), target="t" * 513)
    assert kinds(stream.got) == ["immediate_response"]
    assert stream.got[0].immediate_response.status.code == 400


@pytest.mark.parametrize("key", [b"a\\n\xff", b"\xff", b"\\ud800", b"mode\\u006c\xff", b"\\x"])
def test_a_body_with_a_key_that_is_no_text_is_no_bug_of_ours_and_leaves_nothing_charged(key: bytes) -> None:
    """What is not read need not be valid: that is for the engine to say."""
    world = core()
    stream = renamed(world, body=b'{"' + key + b'":"x","model":"m","messages":[{}]}')
    if stream.got[0].WhichOneof("response") == "immediate_response":
        assert stream.got[0].immediate_response.status.code == 400
    else:
        assert echoed(stream.got) == b'{"' + key + b'":"x","model":"org/target-7b","messages":[{}]}'
    stream.close()
    assert world.inflight == (0, 0, 0, 0)


# The response

ANSWER = (
    b'{"id":"1","model":"org/target-7b","choices":[{"message":{"content":"the model: \\"org/target-7b\\""}}],"usage":{"prompt_tokens":3}}'
)
RESTORED = ANSWER.replace(b'"model":"org/target-7b"', b'"model":"m"')


@pytest.mark.parametrize("answer", [ANSWER, ANSWER.replace(b'"model":"', b'"model": "')], ids=["compact", "with a blank"])
def test_the_name_is_restored_wherever_the_answer_is_cut(answer: bytes) -> None:
    expected = answer.replace(b'"org/target-7b","choices"', b'"m","choices"')
    assert expected != answer
    for cut in range(len(answer) + 1):
        world = core()
        stream = renamed(world)
        stream.send(response_headers())
        came = stream.send(response_body(answer[:cut]), response_body(answer[cut:]), response_body(end_of_stream=True))
        assert echoed(came, "response_body") == expected
        assert ends(came, "response_body") == [False, False, True], "one reply a chunk, with its own end"
        series = world.metrics.series("m", "org/target-7b")
        assert (series.input_tokens.sum, series.response_bytes.sum) == (3, len(answer)), "learnt from what the engine said"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13, 21, 40])
def test_the_name_is_restored_in_every_event(size: int) -> None:
    events = b"".join(b'data: {"id":"%d","model":"org/target-7b","choices":[]}\n\n' % number for number in range(5)) + b"data: [DONE]\n\n"
    stream = renamed(core())
    stream.send(response_headers(content_type="text/event-stream"))
    came = stream.send(*map(response_body, pieces(events, size)), response_body(end_of_stream=True))
    assert echoed(came, "response_body") == events.replace(b"org/target-7b", b"m")
    assert len(came) == len(pieces(events, size)) + 1


def test_an_event_that_is_whole_goes_out_whole() -> None:
    event = b'data: {"model":"org/target-7b","choices":[]}\n\n'
    stream = renamed(core())
    stream.send(response_headers(content_type="text/event-stream"))
    for _ in range(3):
        assert echoed(stream.send(response_body(event)), "response_body") == event.replace(b"org/target-7b", b"m")


def test_what_was_held_goes_out_before_the_trailers() -> None:
    world = core()
    stream = renamed(world)
    stream.send(response_headers())
    came = stream.send(response_body(b'abc"model":"org/target'), response_trailers())
    assert kinds(came) == ["response_body", "response_body", "response_trailers"]
    assert echoed(came, "response_body") == b'abc"model":"org/target'
    assert ends(came, "response_body") == [False, False]
    stream.close()
    assert world.inflight == (0, 0, 0, 0)


def test_nothing_held_is_no_further_piece_before_the_trailers() -> None:
    stream = renamed(core())
    stream.send(response_headers(), response_body(ANSWER))
    assert kinds(stream.send(response_trailers())) == ["response_trailers"]
    assert echoed(stream.got, "response_body") == RESTORED


def test_a_buffered_response_is_replaced_and_one_without_the_name_kept() -> None:
    stream = renamed(core(), modes=(BUFFERED, BUFFERED))
    stream.send(response_headers())
    (reply,) = stream.send(response_body(ANSWER, end_of_stream=True))
    assert reply.response_body.response.body_mutation == pb.BodyMutation(body=RESTORED)
    other = renamed(core(), modes=(BUFFERED, BUFFERED))
    other.send(response_headers(500))
    (reply,) = other.send(response_body(b"no", end_of_stream=True))
    assert not reply.response_body.response.HasField("body_mutation")


def test_a_buffered_response_before_trailers_holds_nothing_back() -> None:
    stream = renamed(core(), modes=(BUFFERED, BUFFERED))
    stream.send(response_headers())
    body = ANSWER + b'"model":"org'
    replies = stream.send(response_body(body), response_trailers())
    assert kinds(replies) == ["response_body", "response_trailers"]
    assert replies[0].response_body.response.body_mutation.body == RESTORED + b'"model":"org'


def test_a_streamed_response_is_restored_chunk_by_chunk() -> None:
    stream = renamed(core(), modes=(FULL, STREAMED))
    stream.send(response_headers())
    whole, half, rest = stream.send(
        response_body(ANSWER), response_body(b'"model":"org'), response_body(b'/target-7b"', end_of_stream=True)
    )
    assert whole.response_body.response.body_mutation.body == RESTORED
    for reply in (half, rest):
        assert not reply.response_body.response.HasField("body_mutation"), "a piece answered on its own can't wait for the next"


@pytest.mark.parametrize("modes", [FULL_DUPLEX, (FULL, BUFFERED), (FULL, STREAMED)])
def test_the_responses_length_is_no_longer_told_where_its_body_may_change(modes: tuple[BodyMode, BodyMode]) -> None:
    stream = renamed(core(), modes=modes)
    (reply,) = stream.send(response_headers())
    assert removed(reply) == ["content-length"]
    plain = Stream(core().session())
    plain.send(request_headers(modes=modes), request_body(BODY, end_of_stream=True))
    (reply,) = plain.send(response_headers())
    assert removed(reply) == []


@pytest.mark.parametrize(
    ("modes", "end_of_stream"), [((FULL, BodyMode.NONE), False), (FULL_DUPLEX, True)], ids=["a body we are not shown", "no body"]
)
def test_the_length_of_a_response_whose_body_can_not_change_stays(modes: tuple[BodyMode, BodyMode], end_of_stream: bool) -> None:
    (reply,) = renamed(core(), modes=modes).send(response_headers(end_of_stream=end_of_stream))
    assert removed(reply) == []
