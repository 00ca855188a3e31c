"""What the demo sends: chat sessions made up from a seed, or the requests of a recorded trace. Pure; no sockets, no clock.

Both are conversations: an arrival time, then requests one after the other, each after the answer to the last and a pause. Times are in
seconds of the simulated world. The same seed or trace gives the same conversations, so both phases of the demo send the same load;
only the answers that a session quotes back come from the engines.

All text is made of words of `TOKEN_BYTES` bytes, a token each to the simulated engines, so lengths in tokens are exact.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec

from epp.errors import ConfigError, Problem
from epp.sim.engine import VOCABULARY
from epp.types import TOKEN_BYTES

TRACE_BLOCK_TOKENS = 512
"""Of the Mooncake format: each hash id names this many tokens, the last of a row as many as are left."""
TRACE_PROBLEMS_SHOWN = 10
TRACE_BLOCKS_KEPT = 16_384
"""Texts of trace blocks kept in memory, 2 KiB each."""

_WORDS = tuple(word.decode() for word in VOCABULARY)


class Request(NamedTuple):
    path: str
    body: bytes


class Conversation(Protocol):
    """What `client` plays."""

    @property
    def arrival_s(self) -> float: ...

    @property
    def requests(self) -> int: ...

    def pause_s(self, index: int) -> float:
        """Between the answer before request `index` and that request; 0 for the first."""
        ...

    def request(self, index: int, answers: Sequence[str], model: str) -> Request:
        """`answers`: to all requests before this one."""
        ...


class Turn(NamedTuple):
    message: str
    answer_tokens: int
    think_s: float
    """Time the user takes to read the last answer and write this message."""


@dataclass(frozen=True, slots=True)
class ChatSession:
    """A user's chat with an assistant whose system prompt many share."""

    arrival_s: float
    system: str
    turns: tuple[Turn, ...]

    @property
    def requests(self) -> int:
        return len(self.turns)

    def pause_s(self, index: int) -> float:
        return self.turns[index].think_s if index else 0.0

    def request(self, index: int, answers: Sequence[str], model: str) -> Request:
        messages = [{"role": "system", "content": self.system}]
        for turn, answer in zip(self.turns[:index], answers, strict=True):
            messages.append({"role": "user", "content": turn.message})
            messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": self.turns[index].message})
        body = {"model": model, "messages": messages, "max_tokens": self.turns[index].answer_tokens}
        return Request("/v1/chat/completions", _streaming(body))


class ChatShape(NamedTuple):
    """The distribution sessions are drawn from: lengths in tokens, uniform between the bounds."""

    system_prompts: int = 8
    system_tokens: tuple[int, int] = (1500, 3000)
    turns: tuple[int, int] = (4, 6)
    message_tokens: tuple[int, int] = (60, 300)
    pasted_tokens: tuple[int, int] = (400, 1200)
    """Added to the first message of some: a document to talk about."""
    pasted_share: float = 0.7
    answer_tokens: tuple[int, int] = (40, 120)
    think_s: tuple[float, float] = (1.0, 6.0)
    session_s: float = 19.0
    """About how long a session lasts when nothing is slow; with `concurrency` it gives the rate at which sessions arrive."""


CHAT = ChatShape()


def chat_sessions(seed: int, window_s: float, concurrency: int, shape: ChatShape = CHAT) -> list[ChatSession]:
    """Sessions arriving at random (a Poisson process) within the window, `concurrency` of them under way at once on average.

    At least one, whatever the window. The system prompts are not equally popular: the second half as often as the first, the third
    a third as often, and so on.
    """
    rng = random.Random(seed)  # noqa: S311 - a workload, no secret
    systems = [_text(rng, rng.randint(*shape.system_tokens)) for _ in range(shape.system_prompts)]
    popularity = [1 / rank for rank in range(1, shape.system_prompts + 1)]
    sessions: list[ChatSession] = []
    arrival_s = 0.0
    while not sessions or arrival_s < window_s:
        (system,) = rng.choices(systems, popularity)
        turns = tuple(_turn(rng, index, shape) for index in range(rng.randint(*shape.turns)))
        sessions.append(ChatSession(arrival_s, system, turns))
        arrival_s += rng.expovariate(concurrency / shape.session_s)
    return sessions


def _turn(rng: random.Random, index: int, shape: ChatShape) -> Turn:
    tokens = rng.randint(*shape.message_tokens)
    if index == 0 and rng.random() < shape.pasted_share:
        tokens += rng.randint(*shape.pasted_tokens)
    return Turn(_text(rng, tokens), rng.randint(*shape.answer_tokens), rng.uniform(*shape.think_s))


def _text(rng: random.Random, tokens: int) -> str:
    return "".join(rng.choices(_WORDS, k=tokens))


def _streaming(body: dict[str, object]) -> bytes:
    return msgspec.json.encode({**body, "stream": True, "stream_options": {"include_usage": True}})


# --- traces


class TraceRow(msgspec.Struct, frozen=True):
    """A line of a Mooncake trace; what else is on it is ignored."""

    timestamp: float
    """Milliseconds since the trace began."""
    input_length: int
    output_length: int
    hash_ids: list[int]

    def fault(self) -> str:
        """What is wrong with it; empty if nothing is."""
        if self.timestamp < 0:
            return "timestamp is negative"
        if self.input_length < 1 or self.output_length < 1:
            return "input_length and output_length must be at least 1"
        blocks = -(-self.input_length // TRACE_BLOCK_TOKENS)
        if len(self.hash_ids) != blocks:
            return f"input_length {self.input_length} is {blocks} blocks of {TRACE_BLOCK_TOKENS} tokens, but there are {len(self.hash_ids)} hash_ids"
        return ""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One row, replayed: a conversation of one request."""

    row: TraceRow

    @property
    def arrival_s(self) -> float:
        return self.row.timestamp / 1000

    @property
    def requests(self) -> int:
        return 1

    def pause_s(self, _index: int) -> float:
        return 0.0

    def request(self, _index: int, _answers: Sequence[str], model: str) -> Request:
        body = {"model": model, "prompt": trace_prompt(self.row), "max_tokens": self.row.output_length}
        return Request("/v1/completions", _streaming(body))


def read_trace(path: str, limit: int) -> list[TraceRequest]:
    """The first `limit` rows in order of time, the first one at 0. Raises ConfigError with the number of each bad line."""
    problems: list[Problem] = []
    rows: list[TraceRow] = []
    decoder = msgspec.json.Decoder(TraceRow)
    try:
        with Path(path).open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if len(rows) == limit or len(problems) == TRACE_PROBLEMS_SHOWN:
                    break
                if not line.strip():
                    continue
                try:
                    row = decoder.decode(line)
                    fault = row.fault()
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    fault = str(error)
                if fault:
                    problems.append(Problem(f"line {number}", fault))
                else:
                    rows.append(row)
    except OSError as error:
        raise ConfigError(path, [Problem("", f"can't be read: {error.strerror}")]) from None
    if not rows and not problems:
        problems.append(Problem("", "there is no request in it"))
    if problems:
        raise ConfigError(path, problems)
    rows.sort(key=lambda row: row.timestamp)
    start = rows[0].timestamp
    return [TraceRequest(msgspec.structs.replace(row, timestamp=row.timestamp - start)) for row in rows]


def trace_prompt(row: TraceRow) -> str:
    """Text of exactly `input_length` tokens in which equal hash ids are equal text."""
    text = "".join(map(trace_block, row.hash_ids))
    return text[: row.input_length * TOKEN_BYTES]


@functools.lru_cache(maxsize=TRACE_BLOCKS_KEPT)
def trace_block(hash_id: int) -> str:
    """A function of the id alone: the same in every run and process."""
    choices = hashlib.shake_128(str(hash_id).encode()).digest(TRACE_BLOCK_TOKENS)
    return "".join([_WORDS[choice % len(_WORDS)] for choice in choices])
