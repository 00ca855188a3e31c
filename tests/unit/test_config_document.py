"""YAML and JSON text, strictly and within limits."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epp.config.document import DOCUMENT_BYTES_MAX, NODES_MAX, parse
from epp.config.walk import Walk, kind

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=6,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=5), JSON_VALUES, max_size=3))
def test_json_objects_are_read_as_json_reads_them(value: dict[str, object]) -> None:
    assert parse(json.dumps(value)) == (value, [])


@settings(deadline=None)
@given(st.text())
def test_any_text_gives_a_document_or_problems(text: str) -> None:
    document, problems = parse(text)
    assert document is None or isinstance(problems, list)


def test_yaml_braces_are_not_json() -> None:
    assert parse("{a: 1, b: [x]}") == ({"a": 1, "b": ["x"]}, [])


def test_broken_json_is_told_with_its_line() -> None:
    document, (problem,) = parse('{"a": 1,\n "b": ]}')
    assert document is None
    assert problem.message.startswith("line 2, column ")


def test_a_key_twice_in_json() -> None:
    document, (problem,) = parse('{"a": {"b": 1, "b": 2}}')
    assert document == {"a": {"b": 2}}
    assert str(problem) == "b: is written twice in one object"


def test_too_large() -> None:
    document, (problem,) = parse("a: " + "x" * DOCUMENT_BYTES_MAX)
    assert document is None
    assert problem.message == "larger than 1048576 bytes"


def test_few_lines_that_stand_for_billions() -> None:
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10))
    document, (problem,) = parse(text)
    assert document is None
    assert problem.message == f"more than {NODES_MAX} values, aliases expanded"


def test_an_alias_used_fairly() -> None:
    assert parse("a: &x {b: 1}\nc: *x\n") == ({"a": {"b": 1}, "c": {"b": 1}}, [])


@pytest.mark.parametrize("text", ["&a [*a]", "[" * 2000 + "]" * 2000, '{"a":' * 20000 + "1" + "}" * 20000, "[" * 100_000])
def test_depth_without_end(text: str) -> None:
    document, problems = parse(text)
    assert document is None
    assert problems


@pytest.mark.parametrize(
    "text", ["a: 2024-13-45", "a: !!python/name:os.system", "a: 1\n---\nb: 2", "a: \x01", "? [1]\n: 2", "a: !color red"]
)
def test_yaml_that_can_not_be_constructed(text: str) -> None:
    document, (problem,) = parse(text)
    assert document is None
    assert problem.message


def test_kinds_are_named_in_the_words_of_yaml() -> None:
    assert [kind(value) for value in (None, True, 1, 1.5, "x", [], {}, b"")] == [
        "null", "a boolean", "a number", "a number", "a string", "a list", "a mapping", "a bytes",
    ]  # fmt: skip


def test_a_key_that_is_no_string_is_unknown() -> None:
    walk = Walk()
    assert walk.mapping({True: 1, "a": 2}, "x", ("a",)) == {"a": 2}
    assert [str(problem) for problem in walk.problems] == ["x.True: unknown field; known: a"]
