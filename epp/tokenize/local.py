"""Tokens found here: a model's own tokenizer and chat template, in worker threads.

Models are given as directories, or as a tokenizer.json, with the names they are served by (LoRA adapters have their base's tokenizer). What
is rendered is what vLLM renders; a request it would refuse, with media, or asking for something only it knows is left to the estimate. Not
here: threads (workers), the cache (encoder), the deadline (stage).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from epp.clock import Clock
from epp.config.units import duration_s
from epp.plugins.producers.token import LocalConfig, LocalModel
from epp.tokenize.backend import FAILED, FULL, TIMEOUT, TOO_LONG, UNKNOWN_MODEL, UNSUPPORTED, Ask, Done
from epp.tokenize.cache import PieceCache
from epp.tokenize.conversation import ChatBody, UnsupportedError, messages_of, tools_of, variables_of
from epp.tokenize.encoder import Encoder, TruncationError
from epp.tokenize.prompts import CHAT, GENERATE, TEXT, UNREADABLE, TextBody, decode_chat, decode_text
from epp.tokenize.template import ChatTemplate, RenderError
from epp.tokenize.tokens import Tokens
from epp.tokenize.workers import Workers

ANY_MODEL = "*"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_TOOL_USE, _DEFAULT = "tool_use", "default"


class _GivenUpError(Exception):
    """Its time is over, or nobody waits."""


class Model:
    """One tokenizer with its templates. Raises ValueError that says which file is wrong."""

    def __init__(self, config: LocalModel, cache: PieceCache, scope: bytes, now: Callable[[], datetime] = datetime.now) -> None:
        path = Path(config.path)
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            tokenizer = Tokenizer.from_str(_read(file))
        except Exception as error:
            if isinstance(error, ValueError):
                raise
            raise ValueError(f"{file}: no tokenizer: {error}") from None  # the tokenizer's own errors have no class
        settings = _settings(file.parent)
        variables = {name: text for name in _NAMED if (text := _token(settings.get(name)))}
        sources = {_DEFAULT: _read(Path(config.chat_template))} if config.chat_template else _templates(file.parent, settings)
        try:
            self._templates = {name: ChatTemplate(source, variables, now) for name, source in sources.items()}
        except ValueError as error:
            raise ValueError(f"{config.chat_template or file.parent}: {error}") from None
        likely = "".join([*variables.values(), *sources.values()])
        self._encoder = Encoder(tokenizer, cache, scope, likely)
        self._config = config

    def tokens(self, ask: Ask, chars_max: int, check: Callable[[], None]) -> Tokens:
        """In a worker. Raises UnsupportedError, RenderError, TruncationError, what decoding raises, and what `check` does."""
        if ask.kind == CHAT:
            chat = decode_chat(ask.body)
            return Tokens(self._ids(self._rendered(chat, chars_max, check), chat, check))
        text = decode_text(ask.body)
        texts = text.texts
        if sum(map(len, texts)) > chars_max:
            raise RenderError("too long")
        return Tokens(b"".join([self._ids(each, text, check) for each in texts]))

    def _ids(self, text: str, body: ChatBody | TextBody, check: Callable[[], None]) -> bytes:
        special, tokens, side = body.add_special_tokens, body.truncate_prompt_tokens, body.truncation_side or ""
        ids = self._encoder.encode(text, special=special, check=check)
        if tokens is None:
            return ids
        if tokens < 0 or side not in ("", "left", "right"):
            raise UnsupportedError("a truncation the engine alone knows")
        return self._encoder.kept(ids, tokens, side, special=special)

    def _rendered(self, body: ChatBody, chars_max: int, check: Callable[[], None]) -> str:
        tools = tools_of(body, none_hides=self._config.exclude_tools_when_tool_choice_none)
        template = (self._templates.get(_TOOL_USE) if tools is not None else None) or self._templates.get(_DEFAULT)
        if template is None:
            raise UnsupportedError("no chat template")
        as_parts = {"string": False, "openai": True}.get(self._config.content_format, template.takes_parts)
        messages = messages_of(body, as_parts=as_parts, knows_developers=template.knows_developers)
        variables = variables_of(body, tools, self._config.chat_template_kwargs)
        render = template.render_open if body.continue_final_message else template.render
        return render(messages, variables, chars_max=chars_max, check=check)


class Local:
    """The backend. Raises ValueError for a model that can't be loaded."""

    def __init__(self, config: LocalConfig, clock: Clock, secret: bytes) -> None:
        self.cache = PieceCache(config.cache_bytes_max, secret)
        self._workers = Workers(config.workers, config.queue_max)
        self._clock = clock
        self._timeout_s = duration_s(config.timeout)
        self._bytes_max = config.text_bytes_max
        self._models: dict[str, Model] = {}
        for number, each in enumerate(config.models):
            model = Model(each, self.cache, number.to_bytes(4, "big"))
            for name in (each.name, *each.aliases):
                self._models[name] = model

    def timeout_s(self, ask: Ask) -> float:  # noqa: ARG002 - every prompt has the same time
        return self._timeout_s

    def start(self, ask: Ask, done: Done) -> _Job | str:
        if ask.media or ask.kind not in (CHAT, TEXT, GENERATE):
            return UNSUPPORTED
        model = self._models.get(ask.model) or self._models.get(ANY_MODEL)
        if model is None:
            return UNKNOWN_MODEL
        if len(ask.body) > self._bytes_max:
            return TOO_LONG
        job = _Job(model, ask, done, chars_max=self._bytes_max, clock=self._clock, until_s=self._clock.now_s() + self._timeout_s)
        return job if self._workers.submit(job) else FULL

    def close(self) -> None:
        self._workers.close()


class _Job:
    __slots__ = ("_ask", "_chars_max", "_clock", "_done", "_model", "_until_s", "abandoned")

    def __init__(self, model: Model, ask: Ask, done: Done, *, chars_max: int, clock: Clock, until_s: float) -> None:
        self.abandoned = False
        self._model = model
        self._ask = ask
        self._done = done
        self._chars_max = chars_max
        self._clock = clock
        self._until_s = until_s

    def abandon(self) -> None:
        self.abandoned = True

    def work(self) -> Tokens | str:
        try:
            return self._model.tokens(self._ask, self._chars_max, self._check)
        except _GivenUpError:
            return TIMEOUT
        except (UnsupportedError, TruncationError):
            return UNSUPPORTED
        except (RenderError, *UNREADABLE):
            return FAILED

    def done(self, result: Tokens | str | None) -> None:
        self._done(FAILED if result is None else result)

    def _check(self) -> None:
        if self.abandoned or self._clock.now_s() > self._until_s:
            raise _GivenUpError


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: can't be read: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_read(path)) if path.exists() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    return found if isinstance(found, dict) else {}


def _settings(folder: Path) -> dict[str, Any]:
    """What tokenizer_config.json says, and an older special_tokens_map.json where it says nothing."""
    settings = _json(folder / "tokenizer_config.json")
    return {**_json(folder / "special_tokens_map.json"), **{name: value for name, value in settings.items() if value is not None}}


def _token(given: Any) -> str:
    text = given.get("content") if isinstance(given, dict) else given
    return text if isinstance(text, str) else ""


def _templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """By name; a file of its own wins over what is in a configuration."""
    given = settings.get("chat_template") or _json(folder / "chat_template.json").get("chat_template")
    found: dict[str, str] = {}
    if isinstance(given, str):
        found[_DEFAULT] = given
    elif isinstance(given, list):
        found = {each["name"]: each["template"] for each in given if isinstance(each, dict) and {"name", "template"} <= each.keys()}
    if (file := folder / "chat_template.jinja").exists():
        found[_DEFAULT] = _read(file)
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[file.stem] = _read(file)
    return found
