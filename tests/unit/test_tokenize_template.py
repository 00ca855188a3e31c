"""Prompts rendered as engines render them, and what is done to templates and requests that would take too long."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from epp.plugins.producers.token import LocalModel
from epp.tokenize.backend import Ask
from epp.tokenize.cache import PieceCache
from epp.tokenize.conversation import UnsupportedError
from epp.tokenize.local import Model
from epp.tokenize.prompts import CHAT, TEXT
from epp.tokenize.template import ChatTemplate, RenderError
from epp.tokenize.tokens import Tokens

DATA = Path(__file__).parent.parent / "data" / "tokenize"
REQUESTS = {each["name"]: each for each in json.loads((DATA / "requests.json").read_text(encoding="utf-8"))}
RECORDED = json.loads((DATA / "expected.json").read_text(encoding="utf-8"))
ANSWERS = [(template, name, answer) for template, answers in RECORDED["answers"].items() for name, answer in answers.items()]


def nothing() -> None:
    """No limit."""


def model(template: str = "chatml", **fields: Any) -> Model:
    config = LocalModel(name="tiny", path=str(DATA), chat_template=str(DATA / f"{template}.jinja"), **fields)
    return Model(config, PieceCache(1 << 20, b"secret"), b"1", lambda: datetime.fromisoformat(RECORDED["date"]))


def tokens(made: Model, body: dict[str, Any], *, kind: str = CHAT) -> list[int]:
    found = made.tokens(Ask(kind, json.dumps(body).encode(), "tiny", 0, ""), 1 << 20, nothing)
    assert isinstance(found, Tokens)
    return array("I", found.ids).tolist()


@pytest.mark.parametrize(("template", "name", "answer"), ANSWERS, ids=[f"{template}-{name}" for template, name, _ in ANSWERS])
def test_a_prompt_has_the_tokens_the_engine_gave_it(template: str, name: str, answer: list[int] | int) -> None:
    request = REQUESTS[name]
    kind = CHAT if "chat" in request["path"] else TEXT
    made = model("chatml" if template == "text" else template)
    if isinstance(answer, int):  # the engine refused it
        with pytest.raises((UnsupportedError, RenderError)):
            tokens(made, request["body"], kind=kind)
    else:
        assert tokens(made, request["body"], kind=kind) == answer
        assert tokens(made, request["body"], kind=kind) == answer, "from the cache too"


def test_what_was_recorded_is_not_all_refusals() -> None:
    assert len([answer for *_, answer in ANSWERS if isinstance(answer, list)]) >= 80
    assert {template for template, *_ in ANSWERS} == {"chatml", "headers", "inst", "think", "parts", "text"}


@pytest.mark.parametrize(
    "body",
    [
        {"messages": []},
        {"messages": [{"content": "no role"}]},
        {"messages": [{"role": "user", "content": 1}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
        {"messages": [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "x"}}]}]},
        {"messages": [{"role": "user", "content": [{"text": "no type"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "uuid": "1"}]}]},
        {"messages": [{"role": "user", "content": "x"}], "tools": []},
        {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "custom", "function": {"name": "f"}}]},
        {"messages": [{"role": "user", "content": "x"}], "chat_template": "{{ 1 }}"},
        {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        {"messages": [{"role": "user", "content": "x"}], "continue_final_message": True},
        {"messages": [{"role": "user", "content": "x"}], "truncate_prompt_tokens": -1},
        {"messages": [{"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"type": "function", "id": "1", "function": {"name": "f", "arguments": {}}}]}]},
    ],
)
def test_what_an_engine_alone_knows_or_would_refuse_is_left_to_it(body: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError):
        tokens(model(), body)


def test_a_request_has_so_many_parts_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epp.tokenize.conversation.PARTS_MAX", 3)
    parts = [{"type": "text", "text": "x"}]
    assert tokens(model(), {"messages": [{"role": "user", "content": parts * 3}]})
    with pytest.raises(UnsupportedError):
        tokens(model(), {"messages": [{"role": "user", "content": parts * 2}] * 2})


def test_tools_are_left_out_where_the_engine_is_told_to() -> None:
    request = REQUESTS["tools, a call and its result"]["body"] | {"tool_choice": "none"}
    without = {name: value for name, value in request.items() if name != "tools"}
    assert tokens(model("think", exclude_tools_when_tool_choice_none=True), request) == tokens(model("think"), without)
    assert tokens(model("think"), request) != tokens(model("think"), without)


def test_variables_the_engine_was_started_with() -> None:
    asked = {"messages": [{"role": "user", "content": "x"}]}
    made = model("think", chat_template_kwargs={"enable_thinking": False})
    assert tokens(made, asked) == tokens(model("think"), asked | {"chat_template_kwargs": {"enable_thinking": False}})
    assert tokens(made, asked | {"chat_template_kwargs": {"enable_thinking": True}}) == tokens(model("think"), asked)
    assert tokens(made, asked) != tokens(model("think"), asked)


def test_a_configuration_says_what_a_template_takes_where_it_can_not_be_told() -> None:
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]}
    assert tokens(model("parts", content_format="string"), body) != tokens(model("parts"), body)
    assert tokens(model("parts", content_format="openai"), body) == tokens(model("parts"), body)


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", False),
        ("{% for m in messages %}{% for c in m.content %}{{ c }}{% endfor %}{% endfor %}", True),
        ("{% for m in messages[1:] %}{% for c in m['content'] | list %}{{ c }}{% endfor %}{% endfor %}", True),
        ("{% set all = messages %}{% for m in all %}{% for c in m.content %}{{ c }}{% endfor %}{% endfor %}", True),
        ("{% set content = messages[0].content %}{% for c in content %}{{ c }}{% endfor %}", True),
        (
            "{% macro said(x) %}{% for c in x %}{{ c }}{% endfor %}{% endmacro %}{% for m in messages %}{{ said(m.content) }}{% endfor %}",
            True,
        ),
        (
            "{% macro said(x) %}{% for c in x %}{{ c }}{% endfor %}{% endmacro %}{% for m in messages %}{{ said(m.role) }}{% endfor %}",
            False,
        ),
        ("{% macro said(content) %}{% for c in content %}{{ c }}{% endfor %}{% endmacro %}{{ said(messages) }}", False),
        ("{% for m in others %}{% for c in m.content %}{{ c }}{% endfor %}{% endfor %}", False),
        ("{% for a, b in messages %}{% for c in a.content %}{{ c }}{% endfor %}{% endfor %}", False),
    ],
)
def test_whether_a_template_takes_parts_or_a_text(source: str, parts: bool) -> None:
    assert ChatTemplate(source, {}).takes_parts is parts


# Templates: what they may, and for how long


def rendered(source: str, check: Callable[[], None] = nothing, **variables: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(
        variables.pop("messages", [{"role": "user", "content": "hi"}]), variables, chars_max=10_000, check=check
    )


def test_what_templates_have_besides_jinja2_s_own() -> None:
    assert rendered("{{ bos_token }}{{ {'b': '<é&>', 'a': none} | tojson }}") == '<s>{"b": "<é&>", "a": null}'
    assert rendered("{{ [1, 2] | tojson(indent=1) }}") == "[\n 1,\n 2\n]"
    assert rendered("{% generation %}{{ bos_token }}{% endgeneration %}") == "<s>"
    assert rendered("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    made = ChatTemplate("{{ strftime_now('%d %B %Y') }}", {}, lambda: datetime.fromisoformat("2026-02-01"))
    assert made.render([], {}, chars_max=100, check=nothing) == "01 February 2026"
    assert rendered("{{ bos_token }}", bos_token="mine") == "mine", "a request's variable wins, as in Transformers"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ missing.attribute }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[0].__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ 1 / 0 }}",
        "{{ range(10 ** 9) }}",
        "{{ 2 ** (10 ** 9) }}",
        "{{ 'x' * 10 ** 9 }}",
        "{{ [0] * 10 ** 9 }}",
        "{{ 'too long ' * 2000 }}",
        "{% for i in range(9999) %}too long{% endfor %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ messages | tojson(indent='x' * 10 ** 9) }}",
    ],
)
def test_a_template_that_fails_or_does_what_it_may_not_is_given_up(source: str) -> None:
    with pytest.raises(RenderError):
        rendered(source)


def test_why_a_render_failed_says_nothing_of_the_prompt() -> None:
    with pytest.raises(RenderError) as caught:
        rendered("{{ raise_exception(messages[0].content) }}", messages=[{"role": "user", "content": "my secret"}])
    assert "my secret" not in repr(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% set b = messages[0].role %}{% endfor %}",
        "{% for a in range(99999) %}{{ '' }}{% endfor %}",
        "{% macro one(x) %}{% for a in range(99999) %}{{ x.role }}{% endfor %}{% endmacro %}{{ one(messages[0]) }}",
    ],
)
def test_a_template_that_takes_too_long_is_looked_at_meanwhile_and_given_up(source: str) -> None:
    class OverError(Exception):
        pass

    looks = 0

    def check() -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            raise OverError

    with pytest.raises(OverError):
        rendered(source, check)


def test_deeply_nested_arguments_are_no_end_of_the_thread() -> None:
    deep: Any = {}
    for _ in range(5_000):
        deep = {"x": deep}
    with pytest.raises(RenderError):
        rendered("{{ deep | tojson }}", deep=deep)


@pytest.mark.parametrize("source", ["{% for %}", "{{ messages", "{% unknown %}", "{{" + "(" * 10_000])
def test_a_template_that_can_not_be_read_is_an_error_of_the_configuration(source: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="chat template"):
        ChatTemplate(source, {})
    (tmp_path / "bad.jinja").write_text(source)
    with pytest.raises(ValueError, match=r"bad\.jinja"):
        Model(LocalModel(name="m", path=str(DATA), chat_template=str(tmp_path / "bad.jinja")), PieceCache(0, b""), b"")


# Where a model's templates are


def folder(path: Path, settings: dict[str, Any], **templates: str) -> Model:
    """A model's directory with these templates in files of their own."""
    path.mkdir()
    (path / "tokenizer.json").write_bytes((DATA / "tokenizer.json").read_bytes())
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "special_tokens_map.json").write_text('{"bos_token": "[INST]", "eos_token": {"content": "</s>"}}')
    for name, text in templates.items():
        file = path / ("chat_template.jinja" if name == "own" else f"additional_chat_templates/{name}.jinja")
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    return Model(LocalModel(name="m", path=str(path)), PieceCache(0, b""), b"")


def test_where_templates_are_looked_for(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}
    with_tools = {**asked, "tools": [{"type": "function", "function": {"name": "f"}}]}
    settings = {"bos_token": "<s>", "chat_template": "{{ bos_token }}"}
    assert tokens(folder(tmp_path / "a", settings), asked) == [1]
    assert tokens(folder(tmp_path / "b", settings, own="{{ eos_token }}"), asked) == [2], "its own file wins"
    assert tokens(folder(tmp_path / "c", {"bos_token": None, "chat_template": "{{ bos_token }}"}), asked) == [8], "the older file"
    named = {"chat_template": [{"name": "default", "template": "{{ bos_token }}"}, {"name": "tool_use", "template": "{{ eos_token }}"}]}
    made = folder(tmp_path / "d", named)
    assert (tokens(made, asked), tokens(made, with_tools)) == ([8], [2])
    made = folder(tmp_path / "e", settings, tool_use="{{ eos_token }}")
    assert (tokens(made, asked), tokens(made, with_tools)) == ([1], [2])
    with pytest.raises(UnsupportedError):
        tokens(folder(tmp_path / "f", {}), asked)
    assert tokens(folder(tmp_path / "g", {}), {"prompt": "</s>"}, kind=TEXT) == [1, 2], "text needs no template"
