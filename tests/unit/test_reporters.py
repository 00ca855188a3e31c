"""Reporters: numbers worked out from token counts, and who served a request."""

from __future__ import annotations

import msgspec
import pytest

from epp.plugins.base import Plugin
from epp.plugins.reporters.request_attribute_reporter import DEPTH_MAX, TOKENS_MAX, RequestAttributeReporter
from epp.plugins.reporters.served_verifier import DestinationEndpointServedVerifier
from epp.types import Usage
from tests.builders import llm_request, pool_of

USAGE = Usage(prompt_tokens=100, completion_tokens=7, cached_tokens=60)


def reporter(expression: str, condition: str | None = None, **key: str) -> RequestAttributeReporter:
    attribute: dict[str, object] = {"key": {"name": "cost", **key}, "expression": expression}
    if condition is not None:
        attribute["condition"] = condition
    return msgspec.convert({"attributes": [attribute]}, RequestAttributeReporter)


def value(expression: str, usage: Usage = USAGE, condition: str | None = None) -> int | None:
    reported = reporter(expression, condition).report(usage)
    if reported is None:
        return None
    namespace, name, found = reported
    assert (namespace, name) == ("envoy.lb", "cost")
    assert type(found) is int
    return found


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("usage.prompt_tokens", 100),
        ("usage.completion_tokens", 7),
        ("usage.total_tokens", 107),
        ("usage.cached_tokens", 60),
        ("usage.prompt_tokens_details.cached_tokens", 60),
        ("usage.prompt_token_details.cached_tokens", 60),
        ("usage.prompt_tokens + usage.completion_tokens\n", 107),
        ("  usage . prompt_tokens  ", 100),
        ("42", 42),
        ("1.9", 1),
        (".5 * 10", 5),
        ("2. * 3", 6),
        ("1 + 2 * 3", 7),
        ("(1 + 2) * 3", 9),
        ("10 - 2 - 3", 5),
        ("100 / 5 / 2", 10),
        ("7 / 2", 3),
        ("-7 / 2 + 10", 7),
        ("7 / 2.0 * 2", 7),
        ("usage.completion_tokens / 2", 3),
        ("usage.completion_tokens / 2 * 2", 7),
        ("-usage.prompt_tokens", -100),
        ("--3", 3),
        ("usage.prompt_tokens > 50 ? 1 : 2", 1),
        ("usage.prompt_tokens > 500 ? 1 : usage.prompt_tokens > 50 ? 2 : 3", 2),
        ("(usage.prompt_tokens > 500 || usage.completion_tokens == 7) && !(1 > 2) ? 4 : 5", 4),
        ("has(usage.prompt_tokens) ? usage.prompt_tokens : 0", 100),
        ("has(usage.reasoning_tokens) ? usage.reasoning_tokens : 8", 8),
        ("has(usage.prompt_tokens_details) && has(usage.prompt_tokens_details.cached_tokens) ? 1 : 2", 1),
        ("int(7.9) + int(usage.completion_tokens / 2)", 10),
        ("double(7) / 2 * 10", 35),
        ("1 < 2 == true ? 1 : 2", 1),
        ("(1 <= 1) != (2 >= 3) ? 1 : 2", 1),
        ("usage.prompt_tokens * 3 - usage.cached_tokens * 2 + usage.completion_tokens * 15", 285),
    ],
)
def test_expressions(expression: str, result: int) -> None:
    assert value(expression) == result


@pytest.mark.parametrize(
    ("expression", "usage"),
    [
        ("0", USAGE),
        ("usage.completion_tokens / 10", USAGE),
        ("usage.completion_tokens", Usage(prompt_tokens=100)),
        ("usage.total_tokens", Usage()),
        ("usage.cached_tokens", Usage(100, 7)),
        ("usage.prompt_tokens + usage.nothing_of_the_kind", USAGE),
        ("usage.prompt_tokens_details", USAGE),
        ("1 / 0", USAGE),
        ("usage.prompt_tokens / 0", USAGE),
        ("usage.prompt_tokens" + " * 999999999999999" * 30, USAGE),
    ],
)
def test_nothing_is_reported_where_there_is_nothing(expression: str, usage: Usage) -> None:
    assert value(expression, usage) is None


@pytest.mark.parametrize(
    ("condition", "usage", "result"),
    [
        ("has(usage.completion_tokens)", USAGE, 100),
        ("has(usage.completion_tokens)", Usage(prompt_tokens=100), None),
        ("has(usage.prompt_tokens) && has(usage.completion_tokens)", USAGE, 100),
        ("has(usage.completion_tokens) && usage.completion_tokens > 5", Usage(prompt_tokens=100), None),
        ("!has(usage.completion_tokens) || usage.completion_tokens > 5", Usage(prompt_tokens=100), 100),
        ("usage.completion_tokens > 5", Usage(prompt_tokens=100), None),
        ("true", USAGE, 100),
        ("false", USAGE, None),
        ("", USAGE, 100),
        ("  ", USAGE, 100),
    ],
)
def test_conditions(condition: str, usage: Usage, result: int | None) -> None:
    assert value("usage.prompt_tokens", usage, condition) == result


def test_what_is_0_tokens_is_not_what_was_not_reported() -> None:
    assert value("has(usage.cached_tokens) ? 1 : 2", Usage(1, 1, 0)) == 1
    assert value("usage.total_tokens", Usage(prompt_tokens=5)) == 5


def test_a_namespace_of_ones_own() -> None:
    assert reporter("1", namespace="my.filter").report(USAGE) == ("my.filter", "cost", 1)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "length"),
        ("   ", "ends where"),
        ("usage", "a field's name"),
        ("usage.", "a field's name"),
        ("usage.1", "can't be read|a field's name|expected"),
        ("request.size", "a field of usage"),
        ("usage.prompt_tokens +", "ends where"),
        ("(1", r"'\)'"),
        ("1)", "the end"),
        ("1 2", "the end"),
        ("1 ? 2 : 3", "must be a boolean"),
        ("true ? 2", "':'"),
        ("true ? 1 : false", "must be a number"),
        ("true", "must be a number"),
        ("has(usage.prompt_tokens)", "must be a number"),
        ("1 + true", "must be a number"),
        ("1 < 2 < 3 ? 1 : 2", "a side of < must be a number"),
        ("has(1) ? 1 : 2", "a field of usage"),
        ("!1 == 2 ? 1 : 2", "must be a boolean"),
        ("'text'", "can't be read"),
        ("usage['prompt_tokens']", "can't be read"),
        ("__import__('os')", "a field of usage|can't be read"),
        ("size(usage)", "a field of usage"),
        ("1 & 2", "can't be read"),
        ("9" * 16, "too long a number"),
        ("(" * (DEPTH_MAX + 1) + "1" + ")" * (DEPTH_MAX + 1), "too deep"),
        ("1" + "+1" * TOKENS_MAX, "too long"),
        ("1" * 5_000, "length"),
    ],
)
def test_a_fault_in_an_expression_is_a_fault_of_the_configuration(expression: str, message: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=message):
        reporter(expression)


def test_the_longest_expression_there_may_be_can_be_computed() -> None:
    assert value("1" + "+1" * ((TOKENS_MAX - 1) // 2)) == 1 + (TOKENS_MAX - 1) // 2
    assert value("(" * (DEPTH_MAX - 1) + "7" + ")" * (DEPTH_MAX - 1)) == 7


@pytest.mark.parametrize("condition", ["1", "usage.prompt_tokens", "has(", "yes"])
def test_a_condition_is_a_condition(condition: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=r"attributes\[0\].condition"):
        reporter("1", condition)


@pytest.mark.parametrize(
    "attributes",
    [
        [],
        [{"key": {"name": "a"}, "expression": "1"}, {"key": {"name": "b"}, "expression": "1"}],
        [{"key": {"name": ""}, "expression": "1"}],
        [{"key": {}, "expression": "1"}],
        [{"key": {"name": "a"}}],
        [{"key": {"name": "a"}, "expression": "1", "when": "true"}],
        [{"key": {"name": "a", "prefix": "b"}, "expression": "1"}],
    ],
)
def test_there_is_exactly_one_attribute_with_a_name_and_an_expression(attributes: list[object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"attributes": attributes}, RequestAttributeReporter)


def test_who_served_a_request_is_told_in_the_response() -> None:
    (endpoint,) = pool_of({})
    made = msgspec.convert({}, DestinationEndpointServedVerifier)
    assert made.response_headers(llm_request(), endpoint) == {"x-conformance-test-served-endpoint": "10.0.0.1:8000"}


@pytest.mark.parametrize(
    ("cls", "type_"),
    [
        (RequestAttributeReporter, "request-attribute-reporter"),
        (DestinationEndpointServedVerifier, "destination-endpoint-served-verifier"),
    ],
)
def test_both_are_reporters(cls: type[Plugin], type_: str) -> None:
    assert (cls.type, cls.roles, cls.stability) == (type_, ("reporter",), "beta")
