"""The model's name in bodies: put the target's into a request, the client's back into its response.

Only the name's bytes change: a request keeps the order of its keys, its spacing and its large numbers, for nothing is parsed and
written anew. A response is never held: of a chunk that ends inside what may be the name, just that end waits for the next one.
"""

from __future__ import annotations

import re

import msgspec

from epp.errors import BadRequestError

CHARS_MAX = 512
"""Names are kept as metric labels."""

_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_TOKEN = re.compile(rb'\[(?:[^\[\]{}"]++|' + _STRING + rb")*+\]|" + _STRING + rb"|[{}\[\]]", re.DOTALL)
"""What tells where in a JSON text we are: flat arrays (token ids: one step for all of them), strings, brackets. Possessive: linear."""
_COLON = re.compile(rb"\s*:")
_LITERAL = re.compile(rb"\s*:\s*(null|true|false|-?[0-9][0-9.eE+-]*)")
_OBJECT = re.compile(rb"\s*\{\s*(\}?)")
_KEY = b'"model"'
_ESCAPE = re.compile(rb"\\u00([0-7][0-9a-fA-F])")
"""How a letter of the key may be written too; nothing here is decoded, for a key need not be valid text."""


def checked(model: str) -> str:
    """`model` itself. Raises BadRequestError for what is too long to be a name."""
    if len(model) > CHARS_MAX:
        raise BadRequestError(f"the model's name is longer than {CHARS_MAX} characters")
    return model


def with_model(body: bytes, model: str) -> bytes:
    """`body`, a JSON object, with `model` as the value of its top-level `model`, which is put first where there is none.

    Unchanged if that is an object or an array, or the body none: the engine says what is wrong with it.
    """
    wanted = msgspec.json.encode(model)
    parts: list[bytes] = []
    done = depth = 0
    is_model = False
    key_end = -1
    """Of the last top-level `model`."""
    for match in _TOKEN.finditer(body):
        token = match[0]
        first = token[:1]
        if first == b'"':
            if depth == 1 and _COLON.match(body, match.end()):
                is_model = token == _KEY or (b"\\" in token and _ESCAPE.sub(_letter, token) == _KEY)
                key_end = match.end() if is_model else key_end
            elif depth == 1 and is_model:  # a key given twice is changed twice: decoders differ in which one they take
                parts += (body[done : match.start()], wanted)
                done = match.end()
        elif first in b"{[":
            is_model = False
            depth += len(token) == 1  # a flat array is over already
        else:
            depth -= 1
    if not parts:
        return _inserted(body, wanted, key_end)
    return b"".join((*parts, body[done:]))


def _inserted(body: bytes, wanted: bytes, key_end: int) -> bytes:
    """With a model for a body that has none, or null, or a number."""
    if key_end >= 0:
        literal = _LITERAL.match(body, key_end)
        return body[: literal.start(1)] + wanted + body[literal.end(1) :] if literal else body
    start = _OBJECT.match(body)
    if start is None:
        return body
    comma = b"" if start[1] else b","
    at = start.start(1) if start[1] else start.end()
    return b"".join((body[:at], _KEY, b":", wanted, comma, body[at:]))


def _letter(escape: re.Match[bytes]) -> bytes:
    return bytes.fromhex(escape[1].decode())


class ModelRestorer:
    """Gives a response's chunks back with the name the client used. `target` is what the engine calls the model."""

    __slots__ = ("_held", "_names")

    def __init__(self, target: str, model: str) -> None:
        written, wanted = msgspec.json.encode(target), msgspec.json.encode(model)
        self._names = [(_KEY + colon + written, _KEY + colon + wanted) for colon in (b":", b": ")]
        """As engines write it, compact or with a blank."""
        self._held = b""

    def feed(self, chunk: bytes, *, last: bool) -> bytes:
        """What may go out now: all but an end that could be the beginning of the name; everything if `last`."""
        text = self._held + chunk if self._held else chunk
        for written, wanted in self._names:
            text = text.replace(written, wanted)
        self._held = b""
        if not last:
            held = max(_overlap(text, written) for written, _ in self._names)
            if held:
                self._held = text[-held:]
                return text[:-held]
        return text


def _overlap(text: bytes, name: bytes) -> int:
    """Length of the longest end of `text` that is a beginning of `name`, shorter than all of it."""
    longest = min(len(text), len(name) - 1)
    at = text.find(name[:1], len(text) - longest)
    while at >= 0:
        if name.startswith(text[at:]):
            return len(text) - at
        at = text.find(name[:1], at + 1)
    return 0
