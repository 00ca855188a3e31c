"""The OpenAI API as vLLM speaks it: request bodies to prompts, replies and stream events to bytes, byte for byte as vLLM 0.32 writes them.

Why bytes: a stream event is written for every token, so an event is a fixed head and tail around the token's text, made once a
request; no JSON encoder runs per token. Generated text never needs an escape (`engine.VOCABULARY`).

Canonical prompt of a chat: tools, then role and text of each message, then the role of the answer. So the prompt of a conversation
plus its answer is a prefix of the next turn's prompt. Not here: sockets, time, the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import msgspec

VERSION = "0.32.0+sim"
"""Of the vLLM whose API this is."""
MAX_TOKENS_DEFAULT = 16
DONE = b"data: [DONE]\n\n"

_FINGERPRINT = f"vllm-{VERSION}"
_BodyT = TypeVar("_BodyT", "CompletionBody", "ChatBody")


class RejectedError(Exception):
    """A request answered with an error, in OpenAI's shape."""

    def __init__(self, status: int, kind: str, message: str, param: str | None = None) -> None:
        self.status = status
        self.kind = kind
        self.param = param
        super().__init__(message)

    @property
    def body(self) -> bytes:
        return msgspec.json.encode({"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.status}})


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class CompletionBody(msgspec.Struct):
    """Of POST /v1/completions; what is not listed is ignored."""

    prompt: str | list[Any]
    model: str | None = None
    stream: bool | None = None
    max_tokens: int | None = None
    stream_options: StreamOptions | None = None
    cache_salt: str | None = None


class ContentPart(msgspec.Struct):
    text: str | None = None


class Message(msgspec.Struct):
    role: str
    content: str | list[ContentPart] | None = None

    @property
    def text(self) -> str:
        """Images and sounds count nothing."""
        if isinstance(self.content, list):
            return "".join(part.text or "" for part in self.content)
        return self.content or ""


class ChatBody(msgspec.Struct):
    """Of POST /v1/chat/completions; what is not listed is ignored."""

    messages: list[Message]
    model: str | None = None
    stream: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream_options: StreamOptions | None = None
    cache_salt: str | None = None
    tools: msgspec.Raw = msgspec.Raw(b"")


class Job(NamedTuple):
    """A request, understood."""

    chat: bool
    prompts: list[bytes]
    max_tokens: int
    stream: bool
    include_usage: bool
    cache_salt: str


class Usage(NamedTuple):
    """Sums over the parts of a reply."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    created_cache_tokens: int


_completion_decoder = msgspec.json.Decoder(CompletionBody)
_chat_decoder = msgspec.json.Decoder(ChatBody)


def parse_completion(raw: bytes, model: str) -> Job:
    body = _decoded(_completion_decoder, raw, model)
    return _job(body, chat=False, prompts=_prompts(body.prompt), max_tokens=body.max_tokens)


def parse_chat(raw: bytes, model: str) -> Job:
    body = _decoded(_chat_decoder, raw, model)
    if not body.messages:
        raise _bad_request("messages must not be empty", "messages")
    prompt = bytes(body.tools) + chat_text(body.messages) + b"assistant"
    max_tokens = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return _job(body, chat=True, prompts=[prompt], max_tokens=max_tokens)


def chat_text(messages: Sequence[Message]) -> bytes:
    """Canonical: that of the first messages of a conversation is a prefix of that of all."""
    return _utf8("".join(message.role + message.text for message in messages))


def _decoded(decoder: msgspec.json.Decoder[_BodyT], raw: bytes, model: str) -> _BodyT:
    try:
        body = decoder.decode(raw)
    except msgspec.DecodeError as error:
        raise _bad_request(str(error)) from None
    except UnicodeDecodeError:
        raise _bad_request("the body is not UTF-8") from None
    if body.model not in {None, "", model}:
        raise RejectedError(404, "NotFoundError", f"The model `{body.model}` does not exist.", "model")
    return body


def _job(body: CompletionBody | ChatBody, *, chat: bool, prompts: list[bytes], max_tokens: int | None) -> Job:
    if max_tokens is None:
        max_tokens = MAX_TOKENS_DEFAULT
    if max_tokens < 1:
        raise _bad_request(f"max_tokens must be at least 1, got {max_tokens}.", "max_tokens")
    include_usage = bool(body.stream_options and body.stream_options.include_usage)
    return Job(chat, prompts, max_tokens, bool(body.stream), include_usage, body.cache_salt or "")


def _prompts(prompt: str | list[Any]) -> list[bytes]:
    """One for each text or list of token ids."""
    if isinstance(prompt, str):
        return [_utf8(prompt)]
    if prompt and all(isinstance(item, int) for item in prompt):
        return [_token_bytes(prompt)]
    if prompt and all(isinstance(item, str) for item in prompt):
        return [_utf8(item) for item in prompt]
    if prompt and all(isinstance(item, list) and item and all(isinstance(token, int) for token in item) for item in prompt):
        return [_token_bytes(item) for item in prompt]
    raise _bad_request("prompt must be a string, a list of strings, a list of token ids or a list of such lists", "prompt")


def _token_bytes(tokens: list[int]) -> bytes:
    """Little-endian, `TOKEN_BYTES` a token."""
    try:
        return b"".join([token.to_bytes(4, "little") for token in tokens])
    except OverflowError:
        raise _bad_request("a token id must be from 0 to 4294967295", "prompt") from None


def _utf8(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _bad_request(message: str, param: str | None = None) -> RejectedError:
    return RejectedError(400, "BadRequestError", message, param)


class Events:
    """The server-sent events of one reply."""

    __slots__ = ("_after_last", "_after_text", "_before_text", "_chat", "_head")

    def __init__(self, *, chat: bool, reply_id: str, created_s: int, model: str) -> None:
        kind = "chat.completion.chunk" if chat else "text_completion"
        fields = msgspec.json.encode({"id": reply_id, "object": kind, "created": created_s, "model": model})
        self._head = b"data: " + fields[:-1] + b',"choices":['
        self._chat = chat
        if chat:
            self._before_text = b',"delta":{"content":"'
            self._after_text = b'"},"logprobs":null,"finish_reason":null,"token_ids":null}]}\n\n'
            self._after_last = b'"},"logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null}]}\n\n'
        else:
            self._before_text = b',"text":"'
            tail = b'"stop_reason":null,"prompt_token_ids":null,"token_ids":null}]}\n\n'
            self._after_text = b'","logprobs":null,"finish_reason":null,' + tail
            self._after_last = b'","logprobs":null,"finish_reason":"length",' + tail

    def text(self, index: int, text: bytes, *, first: bool, last: bool) -> bytes:
        """One event with `text`; before a chat's first text the event that names the role."""
        after = self._after_last if last else self._after_text
        event = b'%b{"index":%d%b%b%b' % (self._head, index, self._before_text, text, after)
        if first and self._chat:
            role = (
                b'%b{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
                b',"prompt_token_ids":null,"prompt_text":null}\n\n'
            ) % (self._head, index)
            return role + event
        return event

    def usage(self, usage: Usage) -> bytes:
        details = {"cached_tokens": usage.cached_tokens}
        if self._chat:
            details["created_cache_tokens"] = usage.created_cache_tokens
        tail = msgspec.json.encode({"usage": _usage(usage, details), "system_fingerprint": _FINGERPRINT})
        return self._head + b"]," + tail[1:] + b"\n\n"


def reply_body(job: Job, *, reply_id: str, created_s: int, model: str, texts: Sequence[str], usage: Usage) -> bytes:
    """The whole reply of a request that did not ask for a stream."""
    choices: list[dict[str, Any]] = []
    ending: dict[str, Any] = {"logprobs": None, "finish_reason": "length", "stop_reason": None, "token_ids": None}
    for index, text in enumerate(texts):
        if job.chat:
            message = {"role": "assistant", "content": text, "refusal": None, "annotations": None, "audio": None}
            message |= {"function_call": None, "reasoning": None}
            choices.append({"index": index, "message": message, **ending, "routed_experts": None})
        else:
            prompt_echo = {"prompt_logprobs": None, "prompt_token_ids": None, "routed_experts": None}
            choices.append({"index": index, "text": text, **ending, **prompt_echo})
    created = usage.created_cache_tokens if job.chat else None
    details = {"cached_tokens": usage.cached_tokens, "created_cache_tokens": created, "multimodal_tokens": None}
    body: dict[str, Any] = {
        "id": reply_id,
        "object": "chat.completion" if job.chat else "text_completion",
        "created": created_s,
        "model": model,
        "choices": choices,
        "service_tier": None,
        "system_fingerprint": _FINGERPRINT,
        "usage": {**_usage(usage, details), "completion_tokens_details": None},
    }
    if job.chat:
        body |= {"prompt_logprobs": None, "prompt_token_ids": None, "prompt_text": None}
    body |= {"kv_transfer_params": None, "ec_transfer_params": None, "metrics": None}
    return msgspec.json.encode(body)


def _usage(usage: Usage, details: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "completion_tokens": usage.completion_tokens,
        "prompt_tokens_details": details,
    }


def models_body(model: str, created_s: int, context_tokens_max: int) -> bytes:
    card = {"id": model, "object": "model", "created": created_s, "owned_by": "vllm", "root": model, "parent": None}
    return msgspec.json.encode({"object": "list", "data": [{**card, "max_model_len": context_tokens_max}]})
