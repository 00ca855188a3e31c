"""Label selectors: what kubectl takes is taken, with its meaning; what it refuses is refused with a reason."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epp.sources.kubernetes.selector import CHARS_MAX, REQUIREMENTS_MAX, VALUES_MAX, Requirement, Selector

LABELS = {"app": "vllm", "zone": "a", "llm-d.ai/role": "decode", "gpus": "8", "empty": ""}


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("app=vllm", True),
        ("app==vllm", True),
        (" app = vllm , zone = a ", True),
        ("app=vllm,zone=b", False),
        ("app!=vllm", False),
        ("app!=other", True),
        ("absent!=x", True),
        ("absent=x", False),
        ("zone in (a, b)", True),
        ("zone in (b,c)", False),
        ("zone notin (b,c)", True),
        ("zone notin (a)", False),
        ("absent notin (a)", True),
        ("absent in (a)", False),
        ("app", True),
        ("absent", False),
        ("!absent", True),
        ("! app", False),
        ("llm-d.ai/role=decode", True),
        ("llm-d.ai/role in (prefill,decode),app", True),
        ("gpus>7", True),
        ("gpus>8", False),
        ("gpus<9", True),
        ("zone>1", False),
        ("absent<1", False),
        ("empty=", True),
        ("empty==", True),
        ("app=", False),
        ("empty in ()", True),
        ("empty in (,x)", True),
        ("app,empty=,zone", True),
        ("in in (in)", False),
    ],
)
def test_it_means_what_it_means_to_the_api_server(text: str, matches: bool) -> None:
    selector = Selector.parse(text)
    assert selector.matches(LABELS) is matches
    assert Selector.parse(str(selector)) == selector


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty or ends with a comma"),
        ("  ", "is empty or ends with a comma"),
        ("app=vllm,", "is empty or ends with a comma"),
        (",app", "',' is not the name of a label"),
        ("!", "a label is missing at the end"),
        ("app vllm", "unknown operator 'vllm' after 'app'"),
        ("app=vllm zone=a", "expected ',' after 'app=vllm', not 'zone'"),
        ("zone in a", "expected '(' after 'zone', not 'a'"),
        ("zone in (a", "expected ',' after 'a', not the end"),
        ("zone in (a b)", "expected ',' after 'a', not 'b'"),
        ("zone in", "expected '(' after 'zone', not the end"),
        ("-app=x", "'-app' is not the name of a label"),
        ("UP/app=x", "'UP/app' is not the name of a label"),
        ("/app=x", "'/app' is not the name of a label"),
        ("a/b/c=x", "'a/b/c' is not the name of a label"),
        (f"{'a' * 64}=x", "is not the name of a label"),
        (f"app={'a' * 64}", "can't be a label's value"),
        ("app=-x", "'-x' can't be a label's value"),
        ("app=a$b", "'a$b' can't be a label's value"),
        ("gpus>many", "'gpus': > needs a whole number, not 'many'"),
        ("gpus>", "'gpus': > needs a whole number, not ''"),
        (",".join(f"k{n}" for n in range(REQUIREMENTS_MAX + 1)), f"more than {REQUIREMENTS_MAX} requirements"),
        (f"k in ({','.join(f'v{n}' for n in range(VALUES_MAX + 1))})", f"more than {VALUES_MAX} values"),
        ("a" * (CHARS_MAX + 1), f"is longer than {CHARS_MAX} characters"),
    ],
)
def test_what_is_wrong_is_said(text: str, says: str) -> None:
    with pytest.raises(ValueError) as raised:
        Selector.parse(text)
    assert says in str(raised.value)


def test_the_labels_of_a_pool_are_a_selector_too() -> None:
    selector = Selector.of_labels({"zone": "a", "app": "vllm"})
    assert str(selector) == "app=vllm,zone=a"
    assert selector.matches(LABELS)
    assert not selector.matches({"app": "vllm"})
    with pytest.raises(ValueError, match="'a b' can't be a label's value"):
        Selector.of_labels({"app": "a b"})
    with pytest.raises(ValueError, match="more than 64 requirements"):
        Selector.of_labels({f"k{n}": "v" for n in range(65)})


NAMES = st.from_regex(r"\A[a-z]([a-z0-9.]{0,8}[a-z0-9])?\Z")


@given(
    st.lists(
        st.one_of(
            st.builds(Requirement, NAMES, st.sampled_from(["exists", "absent"]), st.just(frozenset())),
            st.builds(
                Requirement, NAMES, st.sampled_from(["in", "notin"]), st.frozensets(st.one_of(NAMES, st.just("")), min_size=1, max_size=4)
            ),
            st.builds(Requirement, NAMES, st.sampled_from(["<", ">"]), st.integers(-99, 99).map(lambda n: frozenset((str(n),)))),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_what_is_written_is_read_again(requirements: list[Requirement]) -> None:
    selector = Selector(tuple(requirements))
    assert Selector.parse(str(selector)) == selector


@given(st.text("ab=!<>,() in1", max_size=30))
def test_any_text_is_a_selector_or_a_value_error(text: str) -> None:
    try:
        selector = Selector.parse(text)
    except ValueError:
        return
    assert selector.requirements
