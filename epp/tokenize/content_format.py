"""What a chat template takes for a message's content: a text, or a list of parts. vLLM tells by the template's own loops, and so must we.

A template takes parts if it loops over some message's `content`: directly, over a variable of that name, or in a macro that is given it.
"""

from __future__ import annotations

from collections.abc import Iterator

from jinja2 import nodes


def takes_parts(template: nodes.Template) -> bool:
    """Where it can't be told: a text."""
    try:
        return any(_over_content(template))
    except (AttributeError, TypeError, RecursionError):  # a template of a shape nobody thought of
        return False


def _over_content(root: nodes.Template) -> Iterator[bool]:
    messages = list(_loop_variables(root, _aliases(root, "messages")))
    in_macros: dict[int, set[str]] = {}
    """Loops of macros, and the macro's parameters that are a message's content."""
    for macro in root.find_all(nodes.Macro):
        given = _content_parameters(root, macro, messages)
        for loop in macro.find_all(nodes.For):
            in_macros.setdefault(id(loop), set()).update(given)
    for loop in root.find_all(nodes.For):
        if any(_is(loop.iter, name, "content") for name in messages):
            yield True
        elif isinstance(loop.iter, nodes.Name):
            named = loop.iter.name
            yield named in in_macros[id(loop)] if id(loop) in in_macros else named == "content"


def _content_parameters(root: nodes.Template, macro: nodes.Macro, messages: list[str]) -> set[str]:
    names = [parameter.name for parameter in macro.args]
    found: set[str] = set()
    for call in root.find_all(nodes.Call):
        if not (isinstance(call.node, nodes.Name) and call.node.name == macro.name):
            continue
        given = [*zip(names, call.args, strict=False), *((each.key, each.value) for each in call.kwargs if each.key in names)]
        found |= {name for name, value in given if any(_is(value, message, "content") for message in messages)}
    return found


def _aliases(root: nodes.Template, variable: str) -> list[str]:
    """The variable, and those it, or a part of it, is assigned to."""
    found = [variable]
    for name in found:
        for assign in root.find_all(nodes.Assign):
            if _is(assign.node, name) and isinstance(assign.target, nodes.Name) and assign.target.name not in found:
                found.append(assign.target.name)
    return found


def _loop_variables(root: nodes.Template, lists: list[str]) -> Iterator[str]:
    for loop in root.find_all(nodes.For):
        if isinstance(loop.target, nodes.Name) and any(_is(loop.iter, name) for name in lists):
            yield loop.target.name


def _is(node: nodes.Node | None, variable: str, key: str = "") -> bool:
    """The variable (its item or attribute `key`), filtered, tested or sliced."""
    while isinstance(node, nodes.Filter | nodes.Test) or (isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)):
        node = node.node
    if key:
        if isinstance(node, nodes.Getitem):
            if not (isinstance(node.arg, nodes.Const) and node.arg.value == key):
                return False
        elif not (isinstance(node, nodes.Getattr) and node.attr == key):
            return False
        node = node.node
    return isinstance(node, nodes.Name) and node.ctx == "load" and node.name == variable
