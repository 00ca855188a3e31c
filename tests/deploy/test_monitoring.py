"""What dashboard and alerts ask for is what the picker says.

The exposition is a real picker's, put together as `epp serve` does it and fed real ext_proc messages; what comes from a cluster is there
without one. Against a real Prometheus: tests/monitoring.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from promql import uses

from epp.app import Picker
from epp.cli import parser
from epp.clock import MonotonicClock
from epp.config.options import serve_options
from epp.datastore import Reading
from epp.extproc.session import Session
from epp.pools import Pool
from epp.resources import Resources
from tests.builders import Stream, chat, request_body, request_headers, response_body, response_headers

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "deploy/monitoring"
RULES_TEST = ROOT / "tests/monitoring/rules_test.yaml"
TARGET_LABELS = frozenset({"namespace", "job", "instance", "pod"})
"""Given by the scrape."""
PROMETHEUS_OWN = {"up": frozenset(), "ALERTS": frozenset({"alertname", "alertstate", "severity"})}
ENDPOINTS = """
endpoints:
- {name: d, address: 10.0.0.1, port: 8000, labels: {llm-d.ai/role: decode}}
- {name: p, address: 10.0.0.2, port: 8000, labels: {llm-d.ai/role: prefill}}
"""
REWRITE = """
apiVersion: llm-d.ai/v1alpha2
kind: InferenceModelRewrite
metadata: {name: assistant}
spec:
  poolRef: {name: default}
  rules:
  - matches: [{model: {type: Exact, value: assistant}}]
    targets: [{modelRewrite: m}]
"""
STREAMED = (b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n', b'data: {"choices":[{"delta":{"content":"b"}}]}\n\n')
USAGE = (
    b'data: {"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":4}}}\n\n'
    b"data: [DONE]\n\n"
)


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, frozenset[str]]:
    """Sample name -> labels, of a picker in which everything there is to count has happened once."""
    place = tmp_path_factory.mktemp("picker")
    config = place / "config.yaml"
    config.write_text((ROOT / "tests/data/configs/e2e-pd.yaml").read_text())
    (place / "endpoints.yaml").write_text(ENDPOINTS)
    (place / "resources.yaml").write_text(REWRITE)
    flags = [
        f"--config-file={config}", f"--endpoints-file={place / 'endpoints.yaml'}", f"--resources-file={place / 'resources.yaml'}",
        "--secure-serving=false", "--max-body-bytes=1000", "--check-models=false", "--allow-experimental-plugins",
    ]  # fmt: skip
    picker = Picker(serve_options(parser().parse_args(["serve", *flags])))
    for endpoint in picker.datastore.endpoints.values():
        picker.datastore.record_reading(endpoint, Reading(waiting=1.0, running=1.0, kv_usage=0.5), sent_requests=0, sent_tokens=0)
    # One that streams, one refused for its size.
    answered = stream(picker)
    answered.send(request_headers(), request_body(chat("hello", model="assistant", stream=True), end_of_stream=True))
    answered.send(response_headers(content_type="text/event-stream"), *(response_body(chunk) for chunk in STREAMED))
    answered.send(response_body(USAGE, end_of_stream=True))
    answered.close()
    refused = stream(picker)
    refused.send(request_headers(), request_body(chat("x" * 2_000), end_of_stream=True))
    refused.close()
    config.write_text("plugins: 1")
    for source in picker._files:
        source.once()
    # What a cluster adds.
    pool = Pool("pool", Resources(picker.policy._rng))
    pool.exists = pool.synced = True
    picker.metrics.cluster = SimpleNamespace(pools=[pool], events_total=1, relists_total=1)
    picker.metrics.leading = True
    text, _ = picker.metrics.exposition()
    labels: dict[str, frozenset[str]] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels[sample.name] = labels.get(sample.name, frozenset()) | set(sample.labels)
    return labels


def stream(picker: Picker) -> Stream:
    assert picker.director is not None
    return Stream(Session(picker.director, picker.session_limits, MonotonicClock()))


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    found = json.loads((MONITORING / "dashboard.json").read_text())
    assert isinstance(found, dict)
    return found


def panels() -> Iterator[dict[str, Any]]:
    """Without the rows."""
    yield from (panel for panel in dashboard()["panels"] if panel["type"] != "row")


def queries() -> list[tuple[str, str]]:
    """(where, expression) of the dashboard's panels and variables, and of the rules."""
    found = [(f"panel {panel['title']}", target["expr"]) for panel in panels() for target in panel["targets"]]
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            asked = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert asked is not None, variable["query"]
            found.append((f"variable {variable['name']}", f"count by ({asked[2]}) ({asked[1]})"))
    return [*found, *((f"rule {rule.get('alert') or rule['record']}", rule["expr"]) for rule in rules())]


@pytest.mark.parametrize("expression", [pytest.param(expression, id=where) for where, expression in queries()])
def test_every_query_names_what_the_picker_exposes(expression: str, exposed: dict[str, frozenset[str]]) -> None:
    recorded = {rule["record"]: frozenset(uses(rule["expr"]).grouped - {"le"}) for rule in rules() if "record" in rule}
    known = {**exposed, **PROMETHEUS_OWN, **recorded}
    found = uses(expression)
    assert sorted(set(found.selectors) - set(known)) == [], "no such series"
    for name, labels in found.selectors.items():
        assert sorted(labels - known[name] - TARGET_LABELS) == [], f"{name} has no such label"
    anywhere = frozenset[str]().union(*(known[name] for name in found.selectors))
    assert sorted(found.grouped - anywhere - TARGET_LABELS) == [], "no series of it has such a label"


def test_what_a_legend_or_an_alert_says_is_a_label_of_its_result() -> None:
    said = [
        (target["expr"], re.findall(r"\{\{\s*(\w+)\s*\}\}", target["legendFormat"])) for panel in panels() for target in panel["targets"]
    ]  # fmt: skip
    said += [
        (rule["expr"], re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values()))) for rule in rules() if "alert" in rule
    ]  # fmt: skip
    grouped_anew = re.compile(r"\s*(?:sum|max|min|avg|count|topk|histogram_quantile|clamp_max)\b")
    wrong = [
        (expression, label)
        for expression, labels in said
        for label in labels
        if grouped_anew.match(expression) and label not in uses(expression).grouped
    ]
    assert wrong == []
    assert sum(len(labels) for _, labels in said) > 50


def test_a_query_of_nothing_that_is_exposed_would_be_found(exposed: dict[str, frozenset[str]]) -> None:
    found = uses('sum by (pool) (rate(llm_d_epp_requests_total{job=~"$job", model="m"}[5m] offset 1m)) > 0.5 and on (job) up')
    assert found.selectors == {"llm_d_epp_requests_total": {"job", "model"}, "up": set()}
    assert found.grouped == {"pool", "job"}
    assert "llm_d_epp_requests_total" not in exposed
    assert {"error_code", "priority"} <= exposed["llm_d_epp_request_error_total"]
    for wrong in ('a{b="{"}', "a{b}", "1 + 1"):
        with pytest.raises(ValueError, match=r"braces|matcher|no series"):
            uses(wrong)


def test_names_of_alerts_and_records_are_unique_and_alerts_say_what_to_do() -> None:
    names = [rule.get("alert") or rule["record"] for rule in rules()]
    assert len(names) == len(set(names))
    for rule in rules():
        if "alert" in rule:
            assert re.fullmatch(r"Epp[A-Z]\w+", rule["alert"])
            assert rule["labels"]["severity"] in {"critical", "warning", "info"}
            assert set(rule["annotations"]) == {"summary", "description", "runbook"}, rule["alert"]
            assert all(len(text) > 20 for text in rule["annotations"].values()), rule["alert"]
        else:
            level = "_".join(sorted(uses(rule["expr"]).grouped - {"le"}, key=["namespace", "job", "model_name"].index))
            assert rule["record"].startswith(f"{level}:llm_d_epp_"), "level:metric:operations"


def test_every_rule_is_seen_to_work() -> None:
    tests = RULES_TEST.read_text()
    named = {rule.get("alert") or rule["record"] for rule in rules()}
    assert {name for name in named if not re.search(rf"\b{name}\b", tests)} == set()


def test_every_limit_that_can_be_hit_is_in_the_runbook() -> None:
    counted = re.compile(r"""\b_?(?:hits|limit_hit)\("(\w+)"\)|\blimit_hits\["(\w+)"\]""")
    names = {name for file in (ROOT / "epp").rglob("*.py") for pair in counted.findall(file.read_text()) for name in pair if name}
    assert "metric_labels" in names
    (runbook,) = (rule["annotations"]["runbook"] for rule in rules() if rule.get("alert") == "EppLimitHit")
    assert sorted(name for name in names if not re.search(rf"\b{name}\b", runbook)) == []


def test_the_dashboard_is_whole() -> None:
    about = dashboard()
    everything = about["panels"]
    ids = [panel["id"] for panel in everything]
    assert len(ids) == len(set(ids))
    assert about["id"] is None, "an id is its owner's Grafana's"
    variables = {variable["name"] for variable in about["templating"]["list"]}
    asked = set(re.findall(r"\$\{?(\w+)", json.dumps([everything, about["templating"]]))) - {"__rate_interval", "__all"}
    assert asked == variables
    for panel in panels():
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
        assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
    titles = [panel["title"] for panel in panels()]
    assert len(titles) == len(set(titles))


def test_no_panel_lies_on_another() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_scrape_examples_name_the_rules_and_give_the_labels_queries_need() -> None:
    for name in ("prometheus.yaml", "prometheus-kubernetes.yaml"):
        config = yaml.safe_load((MONITORING / name).read_text())
        assert [(MONITORING / file).exists() for file in config["rule_files"]] == [True]
        (job,) = config["scrape_configs"]
        given = {label for each in job.get("static_configs", ()) for label in each["labels"]}
        given |= {rule["target_label"] for rule in job.get("relabel_configs", ()) if "target_label" in rule}
        assert "namespace" in given


def test_the_readmes_way_to_a_prometheus_rule_gives_one() -> None:
    """What its shell line does: the rules, two spaces in, under `spec:`."""
    readme = (MONITORING / "README.md").read_text()
    head = re.search(r"printf '(apiVersion: monitoring.coreos.com.*?)';", readme)
    assert head is not None
    assert "sed 's/^/  /' rules.yaml" in readme
    indented = re.sub(r"^", "  ", (MONITORING / "rules.yaml").read_text(), flags=re.MULTILINE)
    made = yaml.safe_load(head[1].replace("\\n", "\n") + indented)
    assert made["kind"] == "PrometheusRule"
    assert made["spec"]["groups"] == yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"]
