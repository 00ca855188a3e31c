"""A model's chat template, rendered as Transformers does, within limits.

Templates come with a model and are the operator's; what they are rendered with is the client's. So nothing but JSON gets in, in jinja2's
immutable sandbox, and a render is given up for its time or its length, looked at with every attribute, item and call of the template and
every piece it puts out. Not here: what an engine makes of messages before they are rendered (conversation).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox

from epp.tokenize.content_format import takes_parts

LOOKS = 64
"""Operations of a template between two looks at the time."""
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


class RenderError(Exception):
    """The template can't be rendered with this. Says nothing of the prompt."""


class _Budget(threading.local):
    """Of the render going on in this thread."""

    def __init__(self) -> None:
        self.check: Callable[[], None] = lambda: None
        self.chars_max = 0
        self.left = LOOKS

    def spend(self) -> None:
        self.left -= 1
        if self.left <= 0:
            self.left = LOOKS
            self.check()


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the model said, for training; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own way

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        self.budget = _Budget()

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.budget.spend()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.budget.spend()
        return super().getitem(obj, argument)

    def call(self, context: jinja2.runtime.Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.budget.spend()
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (isinstance(left, int | float) and isinstance(right, int | float) and abs(right) <= LOOKS):
            raise RenderError("too large a power")
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(times, int) and not isinstance(text, int | float) and times * len(text) > self.budget.chars_max:
                    raise RenderError("too long a repetition")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """One template. Used by several threads at once. Raises ValueError if it can't be read."""

    def __init__(self, source: str, variables: Mapping[str, str], now: Callable[[], datetime] = datetime.now) -> None:
        """`variables`: bos_token and the like. `now`: for templates that write the date."""
        self._environment = environment = _Environment()
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: now().strftime(form)
        self.source = source
        self._variables = dict(variables)
        try:
            self._template = environment.from_string(source)
            self.takes_parts = takes_parts(environment.parse(source))
        except (jinja2.TemplateError, RecursionError) as error:
            raise ValueError(f"the chat template can't be read: {error}") from None
        self.knows_developers = "'developer'" in source or '"developer"' in source

    def render(self, messages: list[dict[str, Any]], variables: Mapping[str, Any], *, chars_max: int, check: Callable[[], None]) -> str:
        """`variables`: tools, documents, add_generation_prompt, ...; `check` may raise to give up. Raises RenderError."""
        budget = self._environment.budget
        budget.check, budget.chars_max, budget.left = check, chars_max, LOOKS
        pieces: list[str] = []
        chars = 0
        try:
            for piece in self._template.generate({**self._variables, **variables, "messages": messages}):
                budget.spend()
                chars += len(piece)
                if chars > chars_max:
                    raise RenderError("too long")
                pieces.append(piece)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
            raise RenderError(type(error).__name__) from None  # its text may be of the prompt
        finally:
            budget.check = _nothing
        return "".join(pieces)

    def render_open(
        self, messages: list[dict[str, Any]], variables: Mapping[str, Any], *, chars_max: int, check: Callable[[], None]
    ) -> str:
        """Without the end of the last message, which the model is to continue (`continue_final_message`)."""
        last = messages[-1] if messages else {}
        content = last.get("content")
        if isinstance(content, list):
            at = max((number for number, part in enumerate(content) if "text" in part), default=-1)
            if at < 0:
                raise RenderError("no text to continue")
            final = content[at]["text"]
            marked: Any = [*content[:at], {**content[at], "text": final + _TAG}, *content[at + 1 :]]
        elif isinstance(content, str):
            final, marked = content, content + _TAG
        else:
            raise RenderError("no text to continue")
        text = self.render([*messages[:-1], {**last, "content": marked}], variables, chars_max=chars_max, check=check)
        at = text.rfind(_TAG.strip())
        if at < 0 or final.strip() not in text:
            raise RenderError("the text to continue is not in what was rendered")
        return text[:at] if text.startswith(_TAG, at) else text[:at].rstrip()


def _nothing() -> None:
    """No render is going on."""


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise jinja2.TemplateError(str(message))
