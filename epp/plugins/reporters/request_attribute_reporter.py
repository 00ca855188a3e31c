"""request-attribute-reporter: a number worked out from a response's token counts, for the gateway's rate limits and bills.

The expression is CEL, as much of it as token counts need; it is compiled once, and a fault in it is a fault of the configuration. Not
here: putting the number into the gateway's dynamic metadata. Cost: 1-3 µs at the end of each response.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from math import nan
from typing import Annotated, Any, ClassVar, NamedTuple, NoReturn

import msgspec

from epp.plugins.base import Plugin
from epp.types import Usage

EXPRESSION_CHARS_MAX = 4_096
TOKENS_MAX = 300
DEPTH_MAX = 30
"""Of brackets and conditions within one another."""
DIGITS_MAX = 15
"""Of a number."""

NonEmpty = Annotated[str, msgspec.Meta(min_length=1, max_length=EXPRESSION_CHARS_MAX)]


class AttributeKey(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename="camel", frozen=True):
    """Where the number goes: a key in a namespace of the dynamic metadata."""

    name: NonEmpty
    namespace: str = ""


class Attribute(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename="camel", frozen=True):
    key: AttributeKey
    expression: NonEmpty
    condition: Annotated[str, msgspec.Meta(max_length=EXPRESSION_CHARS_MAX)] = ""


class RequestAttributeReporter(Plugin):
    """Reports attributes[0].expression as attributes[0].key{namespace: envoy.lb, name}, if attributes[0].condition holds.

    CEL over `usage`: its fields prompt_tokens, completion_tokens, total_tokens, cached_tokens and prompt_tokens_details.cached_tokens;
    numbers; + - * / and brackets; < <= > >= == !=; && || !; a ? b : c; has(), int(), double(). A fraction is cut off. Nothing is reported
    when the result is 0 or when it needs a field the engine did not report. Exactly one attribute.
    """

    type: ClassVar[str] = "request-attribute-reporter"
    roles: ClassVar[tuple[str, ...]] = ("reporter",)

    attributes: Annotated[tuple[Attribute, ...], msgspec.Meta(min_length=1, max_length=1)]

    def __post_init__(self) -> None:
        attribute = self.attributes[0]
        try:
            self.__dict__["_expression"] = compiled(attribute.expression, kind="number")
        except ValueError as error:
            raise ValueError(f"attributes[0].expression: {error}") from None
        try:
            self.__dict__["_condition"] = compiled(attribute.condition, kind="boolean") if attribute.condition.strip() else None
        except ValueError as error:
            raise ValueError(f"attributes[0].condition: {error}") from None

    def report(self, usage: Usage) -> tuple[str, str, int] | None:
        """Namespace, name and value, if there is anything to report."""
        fields = _fields(usage)
        condition = self.__dict__["_condition"]
        try:
            if condition is not None and not condition(fields):
                return None
            value = int(self.__dict__["_expression"](fields))
        except (LookupError, ArithmeticError, ValueError):  # a field that was not reported; a division by 0; no finite number
            return None
        if not value:
            return None
        key = self.attributes[0].key
        return key.namespace or "envoy.lb", key.name, value


Fields = Mapping[str, float]
Compute = Callable[[Fields], Any]


def _fields(usage: Usage) -> dict[str, float]:
    """What was reported, as CEL sees numbers in JSON: doubles."""
    fields: dict[str, float] = {}
    if usage.prompt_tokens >= 0:
        fields["prompt_tokens"] = float(usage.prompt_tokens)
    if usage.completion_tokens >= 0:
        fields["completion_tokens"] = float(usage.completion_tokens)
    if usage.prompt_tokens >= 0 or usage.completion_tokens >= 0:
        fields["total_tokens"] = float(max(0, usage.prompt_tokens) + max(0, usage.completion_tokens))
    if usage.cached_tokens >= 0:
        fields["cached_tokens"] = float(usage.cached_tokens)
        for name in ("prompt_token_details", "prompt_tokens_details"):
            fields[name] = nan  # there, but no number
            fields[f"{name}.cached_tokens"] = float(usage.cached_tokens)
    return fields


class _Node(NamedTuple):
    """A part of an expression: what kind of value it has, and how to get it."""

    kind: str
    compute: Compute


_TOKEN = re.compile(r"\s*(?:(?P<number>\d+\.\d*|\.\d+|\d+)|(?P<name>[A-Za-z_]\w*)|(?P<sign>&&|\|\||[<>=!]=|[-+*/()<>!?:.]))")

_COMPARE: Mapping[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}


def _divided(left: float, right: float) -> float:
    """Whole numbers are divided as whole numbers, towards 0, as CEL does."""
    if isinstance(left, int) and isinstance(right, int):
        quotient = abs(left) // abs(right)
        return quotient if (left < 0) == (right < 0) else -quotient
    return left / right


def _with_one(function: Callable[[Any], Any], inner: Compute) -> Compute:
    return lambda fields: function(inner(fields))


def _with_two(function: Callable[[Any, Any], Any], left: Compute, right: Compute) -> Compute:
    return lambda fields: function(left(fields), right(fields))


def _either(left: Compute, right: Compute) -> Compute:
    return lambda fields: left(fields) or right(fields)


def _both(left: Compute, right: Compute) -> Compute:
    return lambda fields: left(fields) and right(fields)


def compiled(text: str, *, kind: str) -> Compute:
    """The expression as a function of the fields. Raises ValueError that says what is wrong with it."""
    return _Parser(text).whole(kind)


class _Parser:
    """Recursive descent, one method for each rank of operators, loosest first."""

    def __init__(self, text: str) -> None:
        self._tokens: list[str] = []
        at, end = 0, len(text.rstrip())
        while at < end:
            found = _TOKEN.match(text, at)
            if found is None:
                raise ValueError(f"can't be read from {text[at:].strip()[:20]!r}")
            self._tokens.append(found[0].strip())
            at = found.end()
        if len(self._tokens) > TOKENS_MAX:
            raise ValueError(f"is too long: more than {TOKENS_MAX} parts")
        self._at = 0
        self._depth = 0

    def whole(self, kind: str) -> Compute:
        node = self._ternary()
        if self._peek():
            self._fault("the end")
        return self._of(node, kind, "the whole")

    def _peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self, *wanted: str) -> str:
        """The next token if it is one of those, else nothing."""
        token = self._peek()
        if token and token in wanted:
            self._at += 1
            return token
        return ""

    def _expect(self, token: str) -> None:
        if not self._take(token):
            self._fault(repr(token))

    def _fault(self, wanted: str) -> NoReturn:
        raise ValueError(f"expected {wanted}, not {self._peek()!r}" if self._peek() else f"ends where {wanted} should follow")

    @staticmethod
    def _of(node: _Node, kind: str, what: str) -> Compute:
        if node.kind != kind:
            raise ValueError(f"{what} must be a {kind}, not a {node.kind}")
        return node.compute

    def _ternary(self) -> _Node:
        self._depth += 1
        if self._depth > DEPTH_MAX:
            raise ValueError("goes too deep")
        node = self._or()
        if self._take("?"):
            condition = self._of(node, "boolean", "what stands before ?")
            then = self._ternary()
            self._expect(":")
            other = self._ternary()
            first, second = then.compute, self._of(other, then.kind, "what stands after :")
            node = _Node(then.kind, lambda fields: first(fields) if condition(fields) else second(fields))
        self._depth -= 1
        return node

    def _or(self) -> _Node:
        node = self._and()
        while self._take("||"):
            node = _Node("boolean", _either(self._of(node, "boolean", "a side of ||"), self._of(self._and(), "boolean", "a side of ||")))
        return node

    def _and(self) -> _Node:
        node = self._relation()
        while self._take("&&"):
            node = _Node("boolean", _both(self._of(node, "boolean", "a side of &&"), self._of(self._relation(), "boolean", "a side of &&")))
        return node

    def _relation(self) -> _Node:
        node = self._sum()
        while sign := self._take(*_COMPARE):
            kind = node.kind if sign in ("==", "!=") else "number"
            left, right = self._of(node, kind, f"a side of {sign}"), self._of(self._sum(), kind, f"a side of {sign}")
            node = _Node("boolean", _with_two(_COMPARE[sign], left, right))
        return node

    def _sum(self) -> _Node:
        node = self._product()
        while sign := self._take("+", "-"):
            left, right = self._of(node, "number", f"a side of {sign}"), self._of(self._product(), "number", f"a side of {sign}")
            node = _Node("number", _with_two(operator.add if sign == "+" else operator.sub, left, right))
        return node

    def _product(self) -> _Node:
        node = self._unary()
        while sign := self._take("*", "/"):
            left, right = self._of(node, "number", f"a side of {sign}"), self._of(self._unary(), "number", f"a side of {sign}")
            node = _Node("number", _with_two(operator.mul if sign == "*" else _divided, left, right))
        return node

    def _unary(self) -> _Node:
        signs = []
        while sign := self._take("-", "!"):
            signs.append(sign)
        node = self._primary()
        for sign in reversed(signs):
            kind = "number" if sign == "-" else "boolean"
            inner = self._of(node, kind, f"what follows {sign}")
            node = _Node(kind, _with_one(operator.neg if sign == "-" else operator.not_, inner))
        return node

    def _primary(self) -> _Node:
        if self._take("("):
            node = self._ternary()
            self._expect(")")
            return node
        text = self._peek()
        if text.replace(".", "", 1).isdigit():
            self._at += 1
            if len(text) > DIGITS_MAX:
                raise ValueError(f"{text[:DIGITS_MAX]}... is too long a number")
            number = float(text) if "." in text else int(text)
            return _Node("number", lambda _fields: number)
        if self._take("true", "false"):
            value = text == "true"
            return _Node("boolean", lambda _fields: value)
        if self._take("has"):
            self._expect("(")
            field = self._field()
            self._expect(")")
            return _Node("boolean", lambda fields: field in fields)
        if self._take("int", "double"):
            self._expect("(")
            inner = self._of(self._ternary(), "number", f"what {text}() takes")
            self._expect(")")
            return _Node("number", _with_one(int if text == "int" else float, inner))
        return _Node("number", operator.itemgetter(self._field()))

    def _field(self) -> str:
        """`usage.name` or `usage.name.name`, without the `usage`."""
        if not self._take("usage"):
            self._fault("a number, a field of usage or (")
        path = []
        while self._take("."):
            name = self._peek()
            if not name.isidentifier():
                self._fault("a field's name")
            self._at += 1
            path.append(name)
        if not path:
            self._fault("'.' and a field's name")
        return ".".join(path)
