"""What vLLM makes of a chat request before its template sees it: messages flattened, tool calls as objects, tools and variables.

The same JSON gives the same prompt only if all of this is done alike, down to the order of keys, for templates write some of it out. Facts
are vLLM 0.32's; anything it would refuse, or that only an engine can do (media), is `UnsupportedError`: the estimate stays. Not here: the
template itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

PARTS_MAX = 100_000
"""Messages, parts and tool calls of one request."""
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal", "thinking": "thinking"}
"""`type` of a part -> the field its text is in."""
_MAY_BE_NULL = ("text", "refusal")
_PART_FIELDS = frozenset({
    "audio_embeds", "audio_url", "closed", "data", "file", "image_embeds", "image_pil", "image_url", "input_audio", "name",
    "prompt_cache_breakpoint", "refusal", "text", "thinking", "type", "uuid", "video_embeds", "video_url",
})  # fmt: skip
"""Others stay on a part."""
_BILLING = "x-anthropic-billing-header"
"""Begins a line of Claude Code's system prompt that differs with every request; vLLM leaves it out."""
_NOT_VARIABLES = frozenset({
    "conversation", "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message",
})  # fmt: skip
_UNSET = (None, "auto")


class UnsupportedError(Exception):
    """A request that is not tokenized here. Says nothing of the prompt."""


class ChatBody(msgspec.Struct, gc=False):
    """What of a chat request its prompt is made of."""

    messages: list[dict[str, Any]] = []
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    documents: list[dict[str, str]] | None = None
    reasoning_effort: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    truncate_prompt_tokens: int | None = None
    truncation_side: str | None = None


def messages_of(body: ChatBody, *, as_parts: bool, knows_developers: bool) -> list[dict[str, Any]]:
    """For a template that takes lists of parts (`as_parts`) or texts."""
    if not body.messages:
        raise UnsupportedError("no messages")
    left = [PARTS_MAX]
    found = [_message(message, left, as_parts=as_parts) for message in body.messages]
    if not knows_developers and any(message["role"] == "developer" for message in found):
        found = _with_one_system([_as_system(message) for message in found])
    return found


def tools_of(body: ChatBody, *, none_hides: bool) -> list[dict[str, Any]] | None:
    """`none_hides`: a tool_choice of none leaves the tools out (vLLM's `--exclude-tools-when-tool-choice-none`)."""
    if body.tools is None or (none_hides and body.tool_choice == "none"):
        return None
    if not body.tools:
        raise UnsupportedError("an empty list of tools")
    return [_tool(tool) for tool in body.tools]


def variables_of(body: ChatBody, tools: list[dict[str, Any]] | None, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What the template is rendered with besides messages. `defaults`: the engine's own (`--default-chat-template-kwargs`)."""
    asked = dict(body.chat_template_kwargs or {})
    if body.chat_template is not None or not asked.keys().isdisjoint(("chat_template", "tokenize")):
        raise UnsupportedError("a template of the request's own")
    if body.reasoning_effort is not None:
        asked.setdefault("enable_thinking", body.reasoning_effort != "none")
    own = {
        "add_generation_prompt": body.add_generation_prompt,
        "continue_final_message": body.continue_final_message,
        "documents": body.documents,
        "reasoning_effort": body.reasoning_effort,
    }
    asked |= {name: value for name, value in own.items() if not _unset(value)}
    merged = {**defaults, **({"tools": tools} if tools is not None else {}), **{k: v for k, v in asked.items() if not _unset(v)}}
    variables = {name: value for name, value in merged.items() if name not in _NOT_VARIABLES}
    for name in ("tools", "documents"):
        variables[name] = merged.get(name)
    variables["add_generation_prompt"] = merged.get("add_generation_prompt", False)
    if merged.get("continue_final_message") and variables["add_generation_prompt"]:
        raise UnsupportedError("both add_generation_prompt and continue_final_message")
    return variables


def _unset(value: Any) -> bool:
    return value in _UNSET


def _message(message: dict[str, Any], left: list[int], *, as_parts: bool) -> dict[str, Any]:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise UnsupportedError("a message without a role")
    parts: Iterable[Any] = content if isinstance(content, list) else () if content is None else (content,)
    if role == "system":
        parts = _without_billing(parts)
    texts = [found for part in parts if (found := _part(part, left, as_parts=as_parts)) is not None]
    made: dict[str, Any] = {"role": role, "content": texts if as_parts else "\n".join(texts)}
    if role == "assistant":
        _add_assistant(made, message, left)
    elif role == "tool":
        if "tool_call_id" in message:
            made["tool_call_id"] = message["tool_call_id"]
        if as_parts and all(part["type"] == "text" for part in texts):
            made["content"] = "\n".join(part["text"] for part in texts)
    for name in ("name", "task"):
        if isinstance(message.get(name), str):
            made[name] = message[name]
    if role == "developer":
        made["tools"] = message.get("tools")
    return made


def _add_assistant(made: dict[str, Any], message: dict[str, Any], left: list[int]) -> None:
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise UnsupportedError("tool calls that are no list")
    if calls:
        _spend(left, len(calls))
        made["tool_calls"] = [_call(call) for call in calls]
    reasoning = message.get("reasoning")
    if reasoning is None:
        reasoning = message.get("reasoning_content")
    if reasoning is not None:
        made["reasoning"] = made["reasoning_content"] = reasoning


def _part(part: Any, left: list[int], *, as_parts: bool) -> Any:
    """None: nothing of it is in the prompt."""
    _spend(left)
    extra: dict[str, Any] = {}
    if isinstance(part, dict):
        kind = part.get("type")
        if kind == "tool_reference" and isinstance(part.get("name"), str):
            return {"type": kind, "name": part["name"]} if as_parts else part["name"]
        if not isinstance(kind, str) or kind not in _TEXTS or part.get("uuid") is not None:
            raise UnsupportedError("a part that is no text")
        text = part.get(_TEXTS[kind])
        if text is None and kind in _MAY_BE_NULL:
            return None
        if as_parts:
            extra = {name: value for name, value in part.items() if name not in _PART_FIELDS}
    else:
        text = part
    if not isinstance(text, str):
        raise UnsupportedError("a part that is no text")
    return {"type": "text", "text": text, **extra} if as_parts else text


def _without_billing(parts: Iterable[Any]) -> Iterable[Any]:
    for part in parts:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not (isinstance(text, str) and text.startswith(_BILLING)):
            yield part
        elif rest := text.partition("\n")[2]:
            yield rest if isinstance(part, str) else {**part, "text": rest}


def _call(call: Any) -> dict[str, Any]:
    """In the order of vLLM's types, the arguments as an object: templates write calls out as JSON."""
    if not (isinstance(call, dict) and call.get("type") == "function" and isinstance(call.get("function"), dict) and "id" in call):
        raise UnsupportedError("a tool call of an unknown kind")
    function = call["function"]
    arguments, name = function.get("arguments"), function.get("name")
    if not (isinstance(arguments, str) and isinstance(name, str)):
        raise UnsupportedError("a tool call of an unknown kind")
    try:
        parsed = json.loads(arguments) if arguments else {}
    except ValueError:
        parsed = {}
    inner = {"arguments": parsed if isinstance(parsed, dict) else {}, "name": name}
    made = {"id": call["id"], "function": inner | {k: v for k, v in function.items() if k not in inner}, "type": "function"}
    return made | {k: v for k, v in call.items() if k not in made}


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """With what vLLM's type has, in its order, and nothing else."""
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UnsupportedError("a tool of an unknown kind")
    deferred = tool.get("defer_loading")
    made = {name: function.get(name) for name in ("name", "description", "parameters")}
    made |= {name: function[name] for name in ("strict", "defer_loading") if function.get(name) is not None}
    if deferred is None:
        return {"type": "function", "function": made}
    made.setdefault("defer_loading", deferred)
    return {"type": "function", "function": made, "defer_loading": deferred}


def _as_system(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] != "developer":
        return message
    return {name: value for name, value in {**message, "role": "system"}.items() if name != "tools"}


def _with_one_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several system messages, or one that is not the first, become one at the beginning."""
    systems = [at for at, message in enumerate(messages) if message["role"] == "system"]
    if systems in ([], [0]):
        return messages
    texts = []
    for at in systems:
        content = messages[at]["content"]
        texts.append(content if isinstance(content, str) else "\n".join(part["text"] for part in content if "text" in part))
    merged = {"role": "system", "content": "\n\n".join(text for text in texts if text)}
    return [merged, *(message for message in messages if message["role"] != "system")]


def _spend(left: list[int], count: int = 1) -> None:
    left[0] -= count
    if left[0] < 0:
        raise UnsupportedError("too many parts")
