"""The model's name put into requests and taken out of responses: every other byte is the client's, and the engine's, own."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epp.parsing.model_name import ModelRestorer, with_model

NAMES = st.one_of(
    st.sampled_from(["m", "org/model", 'a"b', "a\\", "ünïcode", "model", '"model":"x"', "{", "a,b", "x" * 300, "\n", "\x00", "<&>"]),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12),
)
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=10), st.sampled_from(["model", '"model":"m"', '\\"', "}", "]", ","])
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**40), 10**40), st.floats(allow_nan=False, allow_infinity=False), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=12,
)
SPACES = st.sampled_from(["", " ", "\n", "\t \r\n"])


@st.composite
def written(draw: st.DrawFn, value: object) -> str:
    """`value` as JSON text with spacing nobody's encoder would choose."""
    if isinstance(value, dict):
        members = [f"{draw(SPACES)}{json.dumps(k)}{draw(SPACES)}:{draw(SPACES)}{draw(written(v))}{draw(SPACES)}" for k, v in value.items()]
        return "{" + (",".join(members) or draw(SPACES)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(f"{draw(SPACES)}{draw(written(item))}{draw(SPACES)}" for item in value) + "]"
    return json.dumps(value, ensure_ascii=draw(st.booleans()))


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, str, str]:
    """What is before the value of the top-level `model`, that value as written, and what is behind it."""
    before = [(k, v) for k, v in draw(st.dictionaries(TEXTS, VALUES, max_size=4)).items() if k != "model"]
    behind = [(k, v) for k, v in draw(st.dictionaries(TEXTS, VALUES, max_size=4)).items() if k != "model"]
    members = [f"{draw(SPACES)}{json.dumps(k)}{draw(SPACES)}:{draw(SPACES)}{draw(written(v))}{draw(SPACES)}" for k, v in before]
    head = draw(SPACES) + "{" + "".join(member + "," for member in members) + f'{draw(SPACES)}"model"{draw(SPACES)}:{draw(SPACES)}'
    more = [f"{draw(SPACES)}{json.dumps(k)}{draw(SPACES)}:{draw(SPACES)}{draw(written(v))}{draw(SPACES)}" for k, v in behind]
    tail = draw(SPACES) + "".join("," + member for member in more) + "}" + draw(SPACES)
    return head, json.dumps(draw(NAMES), ensure_ascii=draw(st.booleans())), tail


@settings(deadline=None, max_examples=300)
@given(bodies(), NAMES)
def test_only_the_bytes_of_the_top_level_name_change(parts: tuple[str, str, str], target: str) -> None:
    head, name, tail = parts
    body = with_model((head + name + tail).encode(), target)
    assert body.startswith(head.encode())
    assert body.endswith(tail.encode())
    assert json.loads(body[len(head.encode()) : len(body) - len(tail.encode())]) == target
    changed, original = json.loads(body), json.loads(head + name + tail)
    assert list(changed) == list(original)
    assert changed == original | {"model": target}


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(TEXTS, VALUES, max_size=5), NAMES, st.sampled_from([None, True, 0, -3, 1.5e9]), SPACES)
def test_a_body_without_a_name_gets_one_and_keeps_everything_else(
    fields: dict[str, object], target: str, other: object, space: str
) -> None:
    nameless = {k: v for k, v in fields.items() if k != "model"}
    for value in (nameless, fields | {"model": other}):
        body = (space + json.dumps(value) + space).encode()
        changed = with_model(body, target)
        assert json.loads(changed) == value | {"model": target}
        assert json.loads(changed, object_pairs_hook=list) != json.loads(body, object_pairs_hook=list)
        assert len(changed) >= len(body) - len(json.dumps(other))


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(TEXTS, VALUES, max_size=5), NAMES, st.one_of(st.lists(NAMES), st.just({"model": "m"})))
def test_what_is_no_object_or_has_a_model_that_can_be_no_name_is_left_alone(fields: dict[str, object], target: str, other: object) -> None:
    for value in (fields | {"model": other}, [{"model": "m"}], "model", 3):
        body = json.dumps(value).encode()
        assert with_model(body, target) == body


@pytest.mark.parametrize(
    ("body", "changed"),
    [
        (b'{"model":"m"}', b'{"model":"t"}'),
        (b'{ "a" : {"model":"m"} , "model" : "m" }', b'{ "a" : {"model":"m"} , "model" : "t" }'),
        (b'{"a":[{"model":"m"},"model"],"b":"model","model":"m","c":{"model":"m"}}', b'{"a":[{"model":"m"},"model"],"b":"model","model":"t","c":{"model":"m"}}'),
        (b'{"seed":12345678901234567890123,"model":"m","x":1e400}', b'{"seed":12345678901234567890123,"model":"t","x":1e400}'),
        (b'{"a":"\\"model\\":\\"m\\"","model":"m"}', b'{"a":"\\"model\\":\\"m\\"","model":"t"}'),
        (b'{"a":"\\\\","model":"m\\\\\\"","b":"m"}', b'{"a":"\\\\","model":"t","b":"m"}'),
        (b'{"z":1,"model":"m","a":2}', b'{"z":1,"model":"t","a":2}'),
    ],
)  # fmt: skip
def test_bodies_as_clients_write_them(body: bytes, changed: bytes) -> None:
    assert with_model(body, "t") == changed


@pytest.mark.parametrize("body", [b'{"model":"a","model":"b"}', b'{"model":"a","x":1,"model":"b","y":{"model":"b"}}'])
def test_a_name_given_twice_is_changed_where_it_counts(body: bytes) -> None:
    """JSON readers take the last: so does the engine."""
    assert json.loads(with_model(body, "t"))["model"] == "t"


def test_a_key_written_with_escapes_is_the_same_key() -> None:
    body = b'{"mod\\u0065l":"m"}'
    assert json.loads(body) == {"model": "m"}
    assert json.loads(with_model(body, "t")) == {"model": "t"}


def restored(parts: Sequence[bytes], target: str, model: str) -> list[bytes]:
    restorer = ModelRestorer(target, model)
    return [restorer.feed(part, last=number == len(parts) - 1) for number, part in enumerate(parts)]


def replaced(text: bytes, target: str, model: str) -> bytes:
    """The whole answer at once."""
    for colon in (":", ": "):
        old, new = (f'"model"{colon}{json.dumps(name, ensure_ascii=False)}' for name in (target, model))
        text = text.replace(old.encode(), new.encode())
    return text


ANSWERS = st.lists(
    st.one_of(
        st.sampled_from(
            ['{"id":"x","model":"t","n":1}', '{"model": "t"}', '"model":', '"model": "', '"mod', '"t"', '"', 't"', "el", ":", 'data: {"model":"t"}\n\n', '{"model":"tt"}']
        ),
        TEXTS,
    ),
    max_size=8,
).map("".join)  # fmt: skip


@settings(deadline=None, max_examples=400)
@given(ANSWERS, st.sampled_from(["t", "tt", "model", "ü"]), st.sampled_from(["m", "a much longer name", "é", "q"]), st.data())
def test_however_an_answer_is_cut_the_name_is_restored_in_all_of_it(answer: str, target: str, model: str, data: st.DataObject) -> None:
    text = answer.replace('"t"', json.dumps(target, ensure_ascii=False)).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    out = restored(parts, target, model)
    assert b"".join(out) == replaced(text, target, model)
    held = 0
    for part, came in zip(parts, out, strict=True):
        held += len(part) - len(came)
        grown = abs(len(model.encode()) - len(target.encode())) * (text.count(target.encode()) + 1)
        assert held <= len(f'"model": "{target}"'.encode()) + grown, "no more is held than what may be the beginning of the name"


def test_what_can_not_become_the_name_goes_out_at_once() -> None:
    restorer = ModelRestorer("target", "mine")
    assert restorer.feed(b'data: {"content":"a"}\n\n', last=False) == b'data: {"content":"a"}\n\n'
    assert restorer.feed(b'data: {"mo', last=False) == b"data: {"
    assert restorer.feed(b"nkey", last=False) == b'"monkey'
    assert restorer.feed(b'"model":"targe', last=False) == b""
    assert restorer.feed(b"", last=True) == b'"model":"targe'
