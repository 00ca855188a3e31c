"""InferenceObjective and InferenceModelRewrite objects in a file: strict, watched, and kept when it goes wrong."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import random
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from epp.config.document import DOCUMENT_BYTES_MAX
from epp.errors import ConfigError
from epp.resources import Choice, Limits, Objective, Resources, Rewrite, Rule, Target
from epp.sources.resources import API_VERSION, API_VERSION_OLD, DOCUMENTS_MAX, ResourcesFile, parse_resources

GROUP = "inference.networking.k8s.io"
WHOLE = """
# Source: a chart
---
apiVersion: llm-d.ai/v1alpha2
kind: InferenceObjective
metadata:
  name: food-review
  namespace: llm
  creationTimestamp: null
  labels: {app: x}
  managedFields: [{manager: kubectl}]
spec:
  priority: 10
  poolRef: {group: inference.networking.k8s.io, kind: InferencePool, name: pool}
status:
  conditions: [{type: Ready, status: Unknown}]
---
apiVersion: inference.networking.x-k8s.io/v1alpha2
kind: InferenceModelRewrite
metadata: {name: canary, creationTimestamp: "2025-01-31T12:00:00Z"}
spec:
  poolRef: {name: pool}
  rules:
  - matches:
    - model: {type: Exact, value: chat}
    - model: {value: chat-old}
    targets:
    - {modelRewrite: chat-v1, weight: 90}
    - {modelRewrite: chat-v2, weight: 10}
  - targets: [{modelRewrite: any}]
---
"""
OBJECTIVES = [Objective("food-review", "llm", 10, "pool", "inference.networking.k8s.io")]
REWRITES = [
    Rewrite(
        "canary",
        "default",
        (Rule(("chat", "chat-old"), (Choice("chat-v1", 90), Choice("chat-v2", 10))), Rule((), (Choice("any"),))),
        1738324800.0,
        "pool",
        "inference.networking.k8s.io",
    )
]


def parse(text: str) -> tuple[list[Objective], list[Rewrite]]:
    return parse_resources(text, source="resources.yaml")


def faults(text: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        parse(text)
    return [str(problem) for problem in raised.value.problems]


def objective(name: str = "o", priority: object = 1, *, version: str = API_VERSION, **metadata: object) -> dict[str, object]:
    return {
        "apiVersion": version,
        "kind": "InferenceObjective",
        "metadata": {"name": name, **metadata},
        "spec": {"poolRef": {"name": "pool"}, "priority": priority},
    }


def rewrite(*rules: object, name: str = "r", version: str = API_VERSION, **metadata: object) -> dict[str, object]:
    return {
        "apiVersion": version,
        "kind": "InferenceModelRewrite",
        "metadata": {"name": name, **metadata},
        "spec": {"poolRef": {"name": "pool"}, "rules": list(rules)},
    }


def documents(*objects: object) -> str:
    return yaml.safe_dump_all(objects)


# What is taken


def test_a_whole_file() -> None:
    assert parse(WHOLE) == (OBJECTIVES, REWRITES)


def test_a_list_as_kubectl_get_writes_it() -> None:
    items = [item for item in yaml.safe_load_all(WHOLE) if item]
    listed = {"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": ""}, "items": items}
    for text in (json.dumps(listed), json.dumps(listed, indent=2), yaml.safe_dump(listed), "---\n" + json.dumps(listed)):
        assert parse(text) == (OBJECTIVES, REWRITES)


def test_a_list_of_one_kind_and_a_list_among_documents() -> None:
    listed = {"apiVersion": API_VERSION, "kind": "InferenceObjectiveList", "items": [objective("a"), objective("b")]}
    objectives, rewrites = parse(documents(listed, objective("c")))
    assert ([its.name for its in objectives], rewrites) == (["a", "b", "c"], [])


@pytest.mark.parametrize("text", ["{apiVersion: v1, kind: List, items: []}", "apiVersion: v1\nkind: List\nitems: null\n"])
def test_no_objects_can_be_said(text: str) -> None:
    assert parse(text) == ([], [])


def test_what_is_left_out_has_the_defaults_of_the_schema() -> None:
    (made,), _ = parse("{apiVersion: llm-d.ai/v1alpha2, kind: InferenceObjective, metadata: {name: o}, spec: {poolRef: {name: p}}}")
    assert made == Objective("o", "default", 0, "p", "inference.networking.k8s.io")
    _, (made_,) = parse(
        "{apiVersion: llm-d.ai/v1alpha2, kind: InferenceModelRewrite, metadata: {name: r}, spec: {poolRef: {name: p}, rules: []}}"
    )
    assert made_ == Rewrite("r", "default", (), math.inf, "p", "inference.networking.k8s.io")


def test_the_group_of_a_pool_may_be_empty() -> None:
    (made,), _ = parse(
        '{apiVersion: llm-d.ai/v1alpha2, kind: InferenceObjective, metadata: {name: o}, spec: {poolRef: {name: p, group: ""}}}'
    )
    assert made.pool_group == ""


@pytest.mark.parametrize("priority", [-(2**31), -1, 0, 2**31 - 1])
def test_priorities_of_32_bits(priority: int) -> None:
    assert parse(documents(objective(priority=priority)))[0][0].priority == priority


@pytest.mark.parametrize(
    ("written", "created_s"),
    [
        ('"1970-01-01T00:00:01Z"', 1.0),
        ("1970-01-01T00:00:01Z", 1.0),
        ('"1970-01-01T01:00:01.5+01:00"', 1.5),
        ('"1970-01-01T00:00:00.123456789Z"', 0.123456),
        ("1969-12-31T23:59:59Z", -1.0),
        ("null", math.inf),
    ],
)
def test_times_of_creation(written: str, created_s: float) -> None:
    text = f"""
apiVersion: llm-d.ai/v1alpha2
kind: InferenceModelRewrite
metadata: {{name: r, creationTimestamp: {written}}}
spec: {{poolRef: {{name: p}}, rules: []}}
"""
    assert parse(text)[1][0].created_s == pytest.approx(created_s)


@pytest.mark.parametrize("turned", [False, True])
def test_the_newer_group_has_the_say_on_an_object_under_both(turned: bool) -> None:
    both = [objective(priority=1), objective(priority=2, version=API_VERSION_OLD)]
    old_only = objective("old-only", 3, version=API_VERSION_OLD)
    elsewhere = objective(priority=4, version=API_VERSION_OLD, namespace="elsewhere")
    a_rewrite = rewrite(name="o", version=API_VERSION_OLD)
    objectives, rewrites = parse(documents(*(both[::-1] if turned else both), old_only, elsewhere, a_rewrite))
    assert {(its.namespace, its.name): its.priority for its in objectives} == {
        ("default", "o"): 1,
        ("default", "old-only"): 3,
        ("elsewhere", "o"): 4,
    }
    assert [its.name for its in rewrites] == ["o"]


@pytest.mark.parametrize("head", ["", "---\n", "# a\n\n  # b\n---\n", "%YAML 1.1\n---\n", "--- # a\n", "---\n# a\n", "\ufeff", "\n\n"])
def test_what_may_come_before_the_first_document(head: str) -> None:
    text = head + documents(objective("a", True), objective("b", True))
    assert faults(text) == [
        f"document[{i}].spec.priority: must be a whole number from -2147483648 to 2147483647, not a boolean" for i in (0, 1)
    ]


def test_a_divider_within_a_line_is_none() -> None:
    noted = objective("a", annotations={"note": "x --- y\n ---\n", "more": "----"})
    text = yaml.safe_dump(noted, default_style="|")
    assert "\n       ---\n" in text or "\n      ---\n" in text
    assert [its.name for its in parse(documents(noted, objective("b")))[0]] == ["a", "b"]


@pytest.mark.parametrize("divider", ["---\n", "---   \n", "---\r\n", "--- # b\n", "...\n---\n", "---\n---\n# nothing\n---\n"])
def test_dividers(divider: str) -> None:
    assert [its.name for its in parse(documents(objective("a")) + divider + documents(objective("b")) + "---")[0]] == ["a", "b"]


# What is not


def test_every_fault_is_reported_at_once() -> None:
    assert faults("""
apiVersion: llm-d.ai/v1alpha1
kind: InferenceObjective
metadata: {name: o}
spec: {poolRef: {name: p}, priorty: 1}
---
apiVersion: llm-d.ai/v1alpha2
kind: InferenceModelRewrite
metadata: {name: Canary_1, namespace: a.b, creationTimestamp: yesterday}
specs: {}
spec:
  poolRef: {group: "Group!", kind: "-", namespace: x}
  rules:
  - matches: [{model: {type: Prefix, value: ""}}, {header: x}, chat, {model: chat}]
    targets: [{modelRewrite: a, weight: 0}, {modelRewrite: b, weight: 1000001}, {model: c, weight: "1"}, d]
  - matches: {}
  - {targets: []}
  - {target: x, targets: {}}
  - x
---
kind: InferenceObjectiv
metadata: {}
---
apiVersion: v1
kind: List
items:
- {apiVersion: llm-d.ai/v1alpha2, kind: InferenceObjective, metadata: [], spec: {priority: 1.5}}
- {apiVersion: llm-d.ai/v1alpha2, kind: InferenceModelRewrite, metadata: {name: 1}, spec: {poolRef: {}}}
- {apiVersion: llm-d.ai/v1alpha2, kind: InferenceModelRewrite, metadata: {name: r}}
- {apiVersion: v1, kind: List, items: []}
- pool
---
just text
""") == [
        "document[0].apiVersion: 'llm-d.ai/v1alpha1' is not llm-d.ai/v1alpha2 or inference.networking.x-k8s.io/v1alpha2",
        "document[0].spec.priorty: unknown field; did you mean priority?",
        "document[1].specs: unknown field; did you mean spec?",
        "document[1].metadata.name: must be letters a-z, digits, - and ., with a letter or digit at both ends and beside each .; at most 253 characters",
        "document[1].metadata.namespace: must be letters a-z, digits and -, with a letter or digit at both ends; at most 63 characters",
        "document[1].metadata.creationTimestamp: must be a time like 2026-01-31T12:00:00Z, not 'yesterday'",
        "document[1].spec.poolRef.namespace: unknown field; did you mean name?",
        "document[1].spec.poolRef.group: must be letters a-z, digits, - and ., with a letter or digit at both ends and beside each .; at most 253 characters",
        "document[1].spec.poolRef.kind: must be letters, digits and -, with a letter first and no - last; at most 63 characters",
        "document[1].spec.poolRef.name: is missing",
        "document[1].spec.rules[0].matches[0].model.type: 'Prefix' is not Exact",
        "document[1].spec.rules[0].matches[0].model.value: is missing",
        "document[1].spec.rules[0].matches[1].header: unknown field; known: model",
        "document[1].spec.rules[0].matches[1].model: is missing",
        "document[1].spec.rules[0].matches[2]: must be a mapping, not a string",
        "document[1].spec.rules[0].matches[3].model: must be a mapping, not a string",
        "document[1].spec.rules[0].targets[0].weight: must be a whole number from 1 to 1000000, not 0",
        "document[1].spec.rules[0].targets[1].weight: must be a whole number from 1 to 1000000, not 1000001",
        "document[1].spec.rules[0].targets[2].model: unknown field; known: modelRewrite, weight",
        "document[1].spec.rules[0].targets[2].weight: must be a whole number from 1 to 1000000, not '1'",
        "document[1].spec.rules[0].targets[2].modelRewrite: is missing",
        "document[1].spec.rules[0].targets[3]: must be a mapping, not a string",
        "document[1].spec.rules[1].matches: must be a list, not a mapping",
        "document[1].spec.rules[1].targets: is missing; a rule needs one target or more",
        "document[1].spec.rules[2].targets: is missing; a rule needs one target or more",
        "document[1].spec.rules[3].target: unknown field; did you mean targets?",
        "document[1].spec.rules[3].targets: must be a list, not a mapping",
        "document[1].spec.rules[4]: must be a mapping, not a string",
        "document[2].apiVersion: is missing",
        "document[2].kind: unknown kind 'InferenceObjectiv'; did you mean InferenceObjective?",
        "document[3].items[0].metadata: must be a mapping, not a list",
        "document[3].items[0].spec.poolRef: is missing",
        "document[3].items[0].spec.priority: must be a whole number from -2147483648 to 2147483647, not 1.5",
        "document[3].items[1].metadata.name: must be a string, not a number; put it in quotes",
        "document[3].items[1].spec.poolRef.name: is missing",
        "document[3].items[1].spec.rules: is missing; write [] for none",
        "document[3].items[2].spec: is missing",
        "document[3].items[3].kind: a list can't be in a list",
        "document[3].items[4]: must be a mapping, not a string",
        "document[4]: must be a mapping, not a string",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "is empty; write `{apiVersion: v1, kind: List, items: []}` for no objects"),
        ("# a\n---\n---\n", "is empty; write `{apiVersion: v1, kind: List, items: []}` for no objects"),
        ("x" * (DOCUMENT_BYTES_MAX + 1), "larger than 1048576 bytes"),
        ("---\n" * (DOCUMENTS_MAX + 1), "10001 documents, the limit is 10000"),
        ("{apiVersion: v2, kind: List, items: []}", "document[0].apiVersion: 'v2' is not v1"),
        ("{apiVersion: v1, kind: List, item: []}", "document[0].item: unknown field; did you mean items?"),
        ("{apiVersion: v1, kind: List, items: {}}", "document[0].items: must be a list, not a mapping"),
    ],
)
def test_files_that_say_nothing(text: str, fault: str) -> None:
    assert faults(text) == [fault]


@pytest.mark.parametrize(
    "created", ["2025-01-31", "2025-01-31T12:00:00", "2025-02-31T12:00:00Z", "2025-W05-5T12:00:00Z", "20250131T120000Z"]
)
def test_times_that_are_none(created: str) -> None:
    (fault,) = faults(documents(rewrite(creationTimestamp=created)))
    assert fault == f"document[0].metadata.creationTimestamp: must be a time like 2026-01-31T12:00:00Z, not {created!r}"


@pytest.mark.parametrize("created", ["2025-01-31", "2025-01-31 12:00:00", "7", "[]"])
def test_times_without_quotes_that_are_none(created: str) -> None:
    text = documents(rewrite(creationTimestamp="WHEN")).replace("WHEN", created)
    (fault,) = faults(text)
    assert fault.startswith("document[0].metadata.creationTimestamp: must be a time like 2026-01-31T12:00:00Z, not ")


def test_a_name_longer_than_a_model_may_have() -> None:
    long = "m" * 513
    assert faults(documents(rewrite({"matches": [{"model": {"value": long}}], "targets": [{"modelRewrite": long}]}))) == [
        "document[0].spec.rules[0].matches[0].model.value: is longer than 512 characters",
        "document[0].spec.rules[0].targets[0].modelRewrite: is longer than 512 characters",
    ]


@pytest.mark.parametrize(("chars", "told"), [(253, []), (254, ["document[0].spec.poolRef.name: is longer than 253 characters"])])
def test_how_long_the_name_of_a_pool_may_be(chars: int, told: list[str]) -> None:
    made = objective(priority="1")
    made["spec"] = {"poolRef": {"name": "p" * chars}, "priority": "1"}
    assert faults(documents(made))[:-1] == told


def test_an_object_given_twice() -> None:
    twice = {"apiVersion": "v1", "kind": "List", "items": [objective("a"), objective("a", 2)]}
    old = objective("a", version=API_VERSION_OLD)
    assert faults(documents(objective("a"), old, rewrite(name="a"), twice, old)) == [
        "document[3].items[0]: default/a is given already at document[0]",
        "document[3].items[1]: default/a is given already at document[0]",
        "document[4]: default/a is given already at document[1]",
    ]


def test_faults_of_the_text_are_told_with_the_line_in_the_file() -> None:
    found = faults("""# a comment
---
{apiVersion: v1, kind: List, items: []}
---
kind: x
spec: [
---
kind: List
apiVersion: v1
kind: List
""")
    assert found[0].startswith("document[1]: line 7, column 1: ")
    assert found[1:] == ["document[2].kind: is written twice, on lines 8 and 10"]


def test_a_file_of_broken_documents_only_is_not_read_to_its_end() -> None:
    found = faults("---\n[\n" * 9_000)
    assert len(found) == 51
    assert found[49].startswith("document[49]: line 101, ")
    assert found[50] == "document[50]: can't be read either; looked no further"


def test_documents_within_their_limits_that_are_too_much_together() -> None:
    some = "a: &a [x, x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a, *a]\nc: [*b, *b, *b, *b, *b, *b, *b, *b, *b, *b]\n"
    found = faults(("---\n" + some) * 1000)
    assert found[-1].endswith(": with the documents before, more than 200000 values, aliases expanded")
    assert 150 <= int(found[-1].partition("[")[2].partition("]")[0]) <= 200, "a document has about 1 200 values"


WORDS = [
    "apiVersion", "kind", "metadata", "name", "namespace", "creationTimestamp", "spec", "poolRef", "group", "priority", "rules", "matches", "model",
    "type", "value", "targets", "modelRewrite", "weight", "items", "InferenceObjective", "InferenceModelRewrite", "List", "Exact", API_VERSION, "v1",
]  # fmt: skip
YAML_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.dates() | st.datetimes() | st.sampled_from(WORDS) | st.binary(max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | st.integers(), inner, max_size=5),
    max_leaves=20,
)
OBJECTS = st.builds(
    lambda kind, metadata, spec: {"apiVersion": API_VERSION, "kind": kind, "metadata": metadata, "spec": spec},
    st.sampled_from(["InferenceObjective", "InferenceModelRewrite"]),
    st.fixed_dictionaries({"name": YAML_VALUES}, optional={"namespace": YAML_VALUES, "creationTimestamp": YAML_VALUES}),
    st.fixed_dictionaries({"poolRef": YAML_VALUES}, optional={"priority": YAML_VALUES, "rules": st.lists(YAML_VALUES, max_size=2)}),
)


@settings(deadline=None, max_examples=200)
@given(st.lists(OBJECTS | YAML_VALUES.filter(lambda value: value is not None), min_size=1, max_size=3))
def test_every_fault_of_any_documents_has_its_path(values: list[object]) -> None:
    problems = []
    try:
        parse(documents(*values))
    except ConfigError as error:
        problems = error.problems
    assert all(problem.path.startswith("document[") for problem in problems)


@settings(deadline=None, max_examples=200)
@given(st.text(st.sampled_from("-\n {}[]:#%&*a.|\"'\ufeff\r\t"), max_size=60))
def test_no_text_is_taken_for_objects_that_are_none(text: str) -> None:
    assert faults(text)


NAMES = st.from_regex(r"[a-z]([-a-z0-9]{0,5}[a-z0-9])?", fullmatch=True)
MODELS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
RULES = st.builds(
    Rule,
    st.lists(MODELS, max_size=3).map(tuple),
    st.lists(st.builds(Choice, MODELS, st.none() | st.integers(1, 1_000_000)), min_size=1, max_size=3).map(tuple),
)


def written(its: Rewrite) -> dict[str, object]:
    rules = [
        {
            "matches": [{"model": {"value": model}} for model in rule.models],
            "targets": [{"modelRewrite": choice.model} | ({"weight": choice.weight} if choice.weight else {}) for choice in rule.choices],
        }
        for rule in its.rules
    ]
    return rewrite(*rules, name=its.name, namespace=its.namespace)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.builds(Rewrite, NAMES, NAMES, st.lists(RULES, max_size=3).map(tuple), st.just(math.inf), st.just("pool"), st.just(GROUP)),
        max_size=4,
        unique_by=lambda its: (its.namespace, its.name),
    ),
    st.booleans(),
)
def test_what_is_written_is_what_is_read(rewrites: list[Rewrite], as_json: bool) -> None:
    objects = [written(its) for its in rewrites]
    listed = {"apiVersion": "v1", "kind": "List", "items": objects}
    text = json.dumps(listed) if as_json or not objects else documents(*objects)
    assert parse(text) == ([], rewrites)


# The file


class Watch:
    def __init__(self, path: Path, *, limits: Limits | None = None) -> None:
        self.path = path
        self.resources = Resources(random.Random(1), pool_name="pool", pool_group="inference.networking.k8s.io", limits=limits)
        self.source = ResourcesFile(path, self.resources)

    def write(self, text: str, *, atomically: bool = False) -> None:
        if atomically:
            new = self.path.with_suffix(".new")
            new.write_text(text)
            new.replace(self.path)
        else:
            self.path.write_text(text)
            os.utime(self.path, ns=(0, os.stat(self.path).st_mtime_ns + 1_000_000))  # noqa: PTH116 - a later write, whatever the file system's clock


@pytest.fixture
def watch(tmp_path: Path) -> Watch:
    watch = Watch(tmp_path / "resources.yaml")
    watch.write(documents(objective("chat", 5), rewrite({"targets": [{"modelRewrite": "old"}]})))
    watch.source.load()
    return watch


def test_the_first_load(watch: Watch) -> None:
    assert (watch.resources.priority("chat"), watch.resources.target("m")) == (5, Target("old", "r"))
    assert not watch.source.once()
    assert (watch.source.loads_total, watch.source.poll_errors_total) == (1, 0)


@pytest.mark.parametrize("atomically", [True, False])
def test_a_change_takes_effect(watch: Watch, atomically: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    elsewhere = objective("elsewhere")
    elsewhere["spec"] = {"poolRef": {"name": "another"}}
    watch.write(documents(objective("chat", -5), elsewhere, rewrite({"targets": [{"modelRewrite": "new"}]})), atomically=atomically)
    assert watch.source.once()
    assert (watch.resources.priority("chat"), watch.resources.target("m")) == (-5, Target("new", "r"))
    (record,) = caplog.records
    assert record.getMessage() == "resources file loaded"
    assert record.__dict__["fields"] == {"file": str(watch.path), "objectives": 1, "rewrites": 1, "rules": 1, "other_pools": 1}
    assert not watch.source.once()


@pytest.mark.parametrize("text", ["", "kind: InferenceObjective", "[", "---\n" * (DOCUMENTS_MAX + 1), "#" * 2 * DOCUMENT_BYTES_MAX])
def test_a_bad_file_keeps_what_was_and_is_told_once(watch: Watch, text: str, caplog: pytest.LogCaptureFixture) -> None:
    watch.write(text)
    assert [watch.source.once() for _ in range(3)] == [False] * 3
    assert (watch.resources.priority("chat"), watch.resources.target("m")) == (5, Target("old", "r"))
    assert watch.source.poll_errors_total == 1
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, "resources file rejected; keeping the resources there are")
    ]
    watch.write(documents(objective("chat", 6)))
    assert watch.source.once()
    assert (watch.resources.priority("chat"), watch.resources.target("m")) == (6, None)


def test_one_bad_object_keeps_all_that_was(watch: Watch) -> None:
    watch.write(documents(objective("chat", 6), rewrite({"targets": [{"modelRewrite": "new", "weight": 0}]})))
    assert not watch.source.once()
    assert (watch.resources.priority("chat"), watch.resources.target("m")) == (5, Target("old", "r"))


def test_a_file_that_is_gone_is_told_once_and_read_when_it_is_back(watch: Watch, caplog: pytest.LogCaptureFixture) -> None:
    watch.path.unlink()
    assert [watch.source.once() for _ in range(3)] == [False] * 3
    assert (watch.resources.priority("chat"), watch.source.poll_errors_total, len(caplog.records)) == (5, 1, 1)
    watch.write(documents(objective("chat", 6)))
    assert watch.source.once()
    assert watch.resources.priority("chat") == 6


def test_more_than_the_tables_take(tmp_path: Path) -> None:
    watch = Watch(tmp_path / "resources.yaml", limits=Limits(objects=1))
    watch.write(documents(objective("a"), objective("b")))
    with pytest.raises(ConfigError, match="2 objects, the limit is 1"):
        watch.source.load()


def test_starting_without_the_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        Watch(tmp_path / "resources.yaml").source.load()


async def test_running_is_once_a_second(watch: Watch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            watch.write(documents(objective("chat", 6)))
        elif len(slept) == 4:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await ResourcesFile(watch.path, watch.resources, sleep=sleep).run()
    assert slept == [1.0] * 4
    assert watch.resources.priority("chat") == 6
