"""What the demo sends: the same every time, of the length it says, and faults of a trace named by line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from epp.demo.workload import (
    CHAT,
    TRACE_BLOCK_TOKENS,
    ChatSession,
    TraceRow,
    Turn,
    chat_sessions,
    read_trace,
    trace_block,
    trace_prompt,
)
from epp.errors import ConfigError
from epp.types import TOKEN_BYTES

# the first rows of the Mooncake conversation trace (Apache-2.0), the second one shortened
TRACE = """\
{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13]}
{"timestamp": 3000, "input_length": 1100, "output_length": 490, "hash_ids": [0, 14, 15]}

{"timestamp": 1500, "input_length": 512, "output_length": 3, "hash_ids": [0], "extra": true}
"""


def write(directory: Path, text: str) -> str:
    path = directory / "trace.jsonl"
    path.write_text(text)
    return str(path)


# --- chat sessions


def test_the_same_seed_gives_the_same_sessions_and_another_gives_others() -> None:
    assert chat_sessions(1, 30.0, 40) == chat_sessions(1, 30.0, 40)
    assert chat_sessions(1, 30.0, 40) != chat_sessions(2, 30.0, 40)


def test_sessions_have_the_lengths_they_should() -> None:
    sessions = chat_sessions(1, 60.0, 80)
    for session in sessions:
        assert CHAT.system_tokens[0] <= len(session.system) / TOKEN_BYTES <= CHAT.system_tokens[1]
        assert CHAT.turns[0] <= session.requests <= CHAT.turns[1]
        for index, turn in enumerate(session.turns):
            longest = CHAT.message_tokens[1] + (CHAT.pasted_tokens[1] if index == 0 else 0)
            assert CHAT.message_tokens[0] <= len(turn.message) / TOKEN_BYTES <= longest
            assert CHAT.answer_tokens[0] <= turn.answer_tokens <= CHAT.answer_tokens[1]
    assert len({session.system for session in sessions}) == CHAT.system_prompts


def test_sessions_arrive_within_the_window_and_at_the_rate_asked_for() -> None:
    window_s, concurrency = 200.0, 50
    sessions = chat_sessions(3, window_s, concurrency)
    arrivals = [session.arrival_s for session in sessions]
    assert arrivals == sorted(arrivals)
    assert arrivals[0] == 0.0
    assert arrivals[-1] < window_s
    assert len(sessions) == pytest.approx(window_s * concurrency / CHAT.session_s, rel=0.15)


def test_even_no_time_at_all_is_one_session() -> None:
    assert len(chat_sessions(1, 0.0, 40)) == 1


def test_some_system_prompts_are_more_popular_than_others() -> None:
    sessions = chat_sessions(1, 300.0, 80)
    counts = sorted((sum(1 for s in sessions if s.system == text) for text in {s.system for s in sessions}), reverse=True)
    assert counts[0] > 3 * counts[-1]


def test_a_turn_quotes_everything_said_before() -> None:
    session = ChatSession(0.0, "be kind ", (Turn("hello ", 5, 0.0), Turn("and? ", 7, 2.5)))
    first = json.loads(session.request(0, [], "m").body)
    second = json.loads(session.request(1, ["hi "], "m").body)
    assert first["messages"] == [{"role": "system", "content": "be kind "}, {"role": "user", "content": "hello "}]
    assert second["messages"] == [*first["messages"], {"role": "assistant", "content": "hi "}, {"role": "user", "content": "and? "}]
    assert (first["max_tokens"], second["max_tokens"]) == (5, 7)
    assert first["stream"]
    assert first["stream_options"] == {"include_usage": True}
    assert session.request(0, [], "m").path == "/v1/chat/completions"
    assert (session.pause_s(0), session.pause_s(1)) == (0.0, 2.5)


# --- traces


def test_rows_are_replayed_in_order_of_time_from_zero(tmp_path: Path) -> None:
    shifted = TRACE.replace('"timestamp": 0', '"timestamp": 500')
    requests = read_trace(write(tmp_path, shifted), 500)
    assert [request.arrival_s for request in requests] == [0.0, 1.0, 2.5]
    assert [request.row.output_length for request in requests] == [500, 3, 490]
    assert {(request.requests, request.pause_s(0)) for request in requests} == {(1, 0.0)}


def test_the_limit_is_the_first_rows_of_the_file(tmp_path: Path) -> None:
    assert [request.row.output_length for request in read_trace(write(tmp_path, TRACE), 2)] == [500, 490]


def test_a_prompt_is_as_long_as_the_row_says_and_equal_ids_are_equal_text(tmp_path: Path) -> None:
    first, third, second = read_trace(write(tmp_path, TRACE), 3)
    prompts = [json.loads(request.request(0, [], "m").body)["prompt"] for request in (first, second, third)]
    assert [len(prompt) / TOKEN_BYTES for prompt in prompts] == [6758, 1100, 512]
    block = TRACE_BLOCK_TOKENS * TOKEN_BYTES
    assert prompts[0][:block] == prompts[1][:block] == prompts[2] == trace_block(0)
    assert prompts[0][block : block + 400] != prompts[1][block : block + 400]
    assert first.request(0, [], "m").path == "/v1/completions"
    assert json.loads(first.request(0, [], "m").body)["max_tokens"] == 500


def test_the_text_of_a_block_never_changes() -> None:
    assert trace_block(7).startswith("and our sky end log day box use for two ")
    assert len(trace_block(7)) == TRACE_BLOCK_TOKENS * TOKEN_BYTES
    assert trace_block(7) != trace_block(8)
    assert trace_prompt(TraceRow(0, 3, 1, [7])) == trace_block(7)[:12]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("nonsense", "malformed"),
        ('{"timestamp": 0, "input_length": 5, "output_length": 1}', "hash_ids"),
        ('{"timestamp": 0, "input_length": "5", "output_length": 1, "hash_ids": [1]}', "input_length"),
        ('{"timestamp": -1, "input_length": 5, "output_length": 1, "hash_ids": [1]}', "timestamp is negative"),
        ('{"timestamp": 0, "input_length": 0, "output_length": 1, "hash_ids": []}', "at least 1"),
        ('{"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [1]}', "513 is 2 blocks of 512 tokens, but there are 1"),
        ("\udcff", "invalid"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes((TRACE + line + "\n").encode(errors="surrogateescape"))
    with pytest.raises(ConfigError) as caught:
        read_trace(str(path), 500)
    (problem,) = caught.value.problems
    assert problem.path == "line 5"
    assert complaint in problem.message.lower() or complaint in problem.message


def test_all_bad_lines_are_told_at_once_up_to_ten(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read_trace(write(tmp_path, TRACE + "bad\n" * 12), 500)
    assert [problem.path for problem in caught.value.problems] == [f"line {number}" for number in range(5, 15)]


def test_lines_past_the_limit_are_not_read(tmp_path: Path) -> None:
    assert len(read_trace(write(tmp_path, TRACE + "bad\n"), 3)) == 3


@pytest.mark.parametrize(("text", "complaint"), [("", "no request"), (None, "No such file")])
def test_no_trace_at_all_is_told(tmp_path: Path, text: str | None, complaint: str) -> None:
    path = str(tmp_path / "missing.jsonl") if text is None else write(tmp_path, text)
    with pytest.raises(ConfigError, match=complaint):
        read_trace(path, 500)
