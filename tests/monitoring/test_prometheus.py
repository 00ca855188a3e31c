"""A real Prometheus reads a real picker under traffic: it takes the exposition, and every query of the dashboard and every alert runs.

Three simulated engines, `epp up` with Envoy in front of them, a client, and Prometheus on loopback that scrapes every second. What only a
cluster has (rows and alerts about Kubernetes, the leader) is asked too, but there is nothing to answer.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from http_clients import MODEL, Http1, chat
from programs import LOOPBACK, POLL_S, START_S, Engines, Gateway, Program, free_address

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "deploy/monitoring"
HERE = Path(__file__).parent
CHAT = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
BODY_BYTES_MAX = 100_000
REQUESTS = 30
LONG_S = 90.0
"""For what takes several scrapes."""
CONFIG = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\nprofile: llm-d\n"
REWRITE = """
apiVersion: llm-d.ai/v1alpha2
kind: InferenceModelRewrite
metadata: {name: assistant}
spec:
  poolRef: {name: default}
  rules:
  - matches: [{model: {type: Exact, value: assistant}}]
    targets: [{modelRewrite: sim/llama-8b}]
"""
NOTHING_TO_SHOW = frozenset({"Age of the view", "Events and relists", "Leader", "InferencePool exists", "Disaggregation"})
"""Panels about what is not here: a cluster, prefill apart from decode."""
VARIABLES = {"$__rate_interval": "1m", "$namespace": ".*", "$job": "epp", "$pool": ".*", "$model": ".*"}


class Prometheus(Program):
    """One that reads `target` every second."""

    def __init__(self, program: Path, place: Path, target: str) -> None:
        self.address = free_address()
        scraped = {"job_name": "epp", "static_configs": [{"targets": [target], "labels": {"namespace": "serving"}}]}
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(MONITORING / "rules.yaml")],
            "scrape_configs": [scraped],
        }
        (place / "prometheus.yaml").write_text(yaml.safe_dump(config))
        super().__init__(
            f"--config.file={place / 'prometheus.yaml'}", f"--storage.tsdb.path={place / 'data'}",
            f"--web.listen-address={self.address}", command=(str(program),),
        )  # fmt: skip

    def await_ready(self) -> None:
        self.await_output("Server is ready to receive web requests")

    def ask(self, path: str, **parameters: str) -> Any:
        """`data` of the answer; what is wrong with a query fails the test in Prometheus' own words."""
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=START_S) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            pytest.fail(f"{parameters or path}: {error.read().decode()}")
        assert answer["status"] == "success", answer
        assert not answer.get("warnings"), answer
        return answer["data"]

    def query(self, expression: str) -> list[Any]:
        found = self.ask("query", query=expression)["result"]
        assert isinstance(found, list)
        return found

    def until(self, expression: str, holds: Callable[[list[Any]], bool] = bool) -> list[Any]:
        deadline = time.monotonic() + LONG_S
        while not holds(found := self.query(expression)):
            assert time.monotonic() < deadline, f"{expression}: {found}\n{self!r}"
            time.sleep(POLL_S)
        return found


class World:
    """Engines, gateway and Prometheus, after some traffic."""

    def __init__(self, gateway: Gateway, prometheus: Prometheus) -> None:
        self.gateway = gateway
        self.prometheus = prometheus


async def traffic(gateway: Gateway) -> None:
    """Streams and whole answers, for two names of the model, with common prefixes."""
    async with Http1(gateway.address) as client:
        for number in range(REQUESTS):
            more: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if number % 2 else {}
            body = chat("the same beginning " * 100 + str(number), max_tokens=8, model="assistant" if number % 3 else MODEL, **more)
            answer = await client.request("POST", CHAT, body, JSON)
            assert answer.status == 200, answer


async def refused(gateway: Gateway) -> None:
    """One for its size, one for its model."""
    for body, status in ((b"{" * (BODY_BYTES_MAX + 1), 413), (chat("x", model="unknown"), 404)):
        async with Http1(gateway.address) as client:
            assert (await client.request("POST", CHAT, body, JSON)).status == status


@pytest.fixture(scope="module")
def started(prometheus_program: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, Prometheus, Path]]:
    place = tmp_path_factory.mktemp("prometheus")
    (place / "config.yaml").write_text(CONFIG)
    (place / "resources.yaml").write_text(REWRITE)
    flags = (
        f"--config-file={place / 'config.yaml'}", f"--resources-file={place / 'resources.yaml'}", f"--max-body-bytes={BODY_BYTES_MAX}",
    )  # fmt: skip
    with (
        Engines("--time-scale", "10", count=3) as engines,
        Gateway(engines.addresses, *flags) as gateway,
        Prometheus(prometheus_program, place, f"{LOOPBACK}:{gateway.metrics.port}") as prometheus,
    ):
        yield gateway, prometheus, place


@pytest.fixture(scope="module")
def world(started: tuple[Gateway, Prometheus, Path]) -> World:
    gateway, prometheus, place = started
    asyncio.run(traffic(gateway))
    prometheus.until(f"sum(llm_d_epp_request_total) >= {REQUESTS}")
    asyncio.run(refused(gateway))
    (place / "config.yaml").write_text("plugins: 1")
    prometheus.until("epp_limit_hits_total")
    asyncio.run(traffic(gateway))
    # Rates want two readings; the second counts the second half.
    prometheus.until(f"sum(llm_d_epp_request_total) >= {2 * REQUESTS}")
    prometheus.until('epp_config_reloads_total{outcome="rejected"} > 0')
    prometheus.until("rate(epp_limit_hits_total[1m])")
    prometheus.until("rate(llm_d_epp_request_error_total[1m])", lambda found: len(found) > 1)
    prometheus.until("namespace_job:llm_d_epp_request:rate5m > 0")
    return World(gateway, prometheus)


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load((MONITORING / "rules.yaml").read_text())["groups"] for rule in group["rules"]]


def panels() -> list[tuple[str, str, str]]:
    """title, legend, expression"""
    board = json.loads((MONITORING / "dashboard.json").read_text())
    asked = [(panel["title"], target) for panel in board["panels"] for target in panel.get("targets", ())]
    return [(title, target["legendFormat"], filled(target["expr"])) for title, target in asked]


def filled(expression: str) -> str:
    """With the dashboard's variables in it."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, expression
    return expression


def checked(promtool: Path, *arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([promtool, *arguments], input=stdin, capture_output=True, text=True, check=False, timeout=60)


def test_promtool_takes_the_rules_and_their_tests_pass(promtool: Path) -> None:
    done = checked(promtool, "check", "rules", MONITORING / "rules.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules())} rules found" in done.stdout
    done = checked(promtool, "test", "rules", HERE / "rules_test.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("index", [pytest.param(index, id=rule["alert"]) for index, rule in enumerate(rules()) if "alert" in rule])
def test_no_alert_can_go_unnoticed(index: int, promtool: Path, tmp_path: Path) -> None:
    """The rules' tests fail when this alert never fires."""
    changed = yaml.safe_load((MONITORING / "rules.yaml").read_text())
    alerts = [rule for group in changed["groups"] for rule in group["rules"]]
    alerts[index]["expr"] = "vector(0) > 1"
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(changed))
    tests = (HERE / "rules_test.yaml").read_text().replace("../../deploy/monitoring/rules.yaml", "rules.yaml")
    (tmp_path / "rules_test.yaml").write_text(tests)
    assert checked(promtool, "test", "rules", tmp_path / "rules_test.yaml").returncode == 1


def test_promtool_takes_the_scrape_examples(promtool: Path, tmp_path: Path) -> None:
    """Debian's Prometheus is built without the discovery of Kubernetes: of that example the rest is checked, with a token that is there."""
    for name in ("prometheus.yaml", "prometheus-kubernetes.yaml"):
        config = yaml.safe_load((MONITORING / name).read_text())
        for job in config["scrape_configs"]:
            if job.pop("kubernetes_sd_configs", None):
                job["authorization"]["credentials_file"] = str(tmp_path / "token")
        (tmp_path / "token").write_text("")
        (tmp_path / "rules.yaml").write_text((MONITORING / "rules.yaml").read_text())
        (tmp_path / name).write_text(yaml.safe_dump(config))
        done = checked(promtool, "check", "config", tmp_path / name)
        assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_reads_the_picker_without_a_complaint(world: World) -> None:
    (target,) = world.prometheus.ask("targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")
    assert re.findall(r"level=(?:warn|error).*", world.prometheus.stderr) == []


def test_promtool_finds_no_fault_but_in_a_prefix_that_is_given(world: World, promtool: Path) -> None:
    """`llm_d_` is the reference picker's: promtool takes the d for days. Nothing of our own has a fault."""
    with urllib.request.urlopen(f"http://{world.gateway.metrics}/metrics", timeout=START_S) as response:
        text = response.read().decode()
    done = checked(promtool, "check", "metrics", stdin=text)
    complaints = (done.stdout + done.stderr).splitlines()
    assert complaints, "it read it"
    left = [line for line in complaints if not re.fullmatch(r"llm_d_\w+ metric names should not contain abbreviated units", line)]
    assert left == []


@pytest.mark.parametrize(("title", "legend", "expression"), [pytest.param(*panel, id=f"{panel[0]} {panel[1]}") for panel in panels()])
def test_every_panel_shows_something(title: str, legend: str, expression: str, world: World) -> None:
    found = world.prometheus.query(expression)
    if title in NOTHING_TO_SHOW:
        assert found == []
        return
    assert found, expression
    said = set(re.findall(r"\{\{\s*(\w+)\s*\}\}", legend))
    assert [each for each in found if not said - {"namespace", "commit"} <= set(each["metric"])] == [], (
        "the legend has labels without a value"
    )


def test_the_variables_have_values(world: World) -> None:
    board = json.loads((MONITORING / "dashboard.json").read_text())
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            asked = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert asked is not None
            series, label = asked.groups()
            assert world.prometheus.ask(f"label/{label}/values", **{"match[]": filled(series)}), variable["name"]


@pytest.mark.parametrize("rule", [pytest.param(rule, id=rule.get("alert") or rule["record"]) for rule in rules()])
def test_every_rule_runs(rule: dict[str, Any], world: World) -> None:
    found = world.prometheus.query(rule["expr"])
    if "record" in rule:
        assert found, rule["record"]


def test_rules_are_evaluated_and_a_refused_configuration_and_a_limit_fire(world: World) -> None:
    groups = world.prometheus.ask("rules")["groups"]
    assert [(rule["name"], rule["lastError"]) for group in groups for rule in group["rules"] if rule["health"] != "ok"] == []
    firing = world.prometheus.until('ALERTS{alertstate="firing"}', lambda found: len(found) >= 2)
    assert {each["metric"]["alertname"] for each in firing} == {"EppConfigRejected", "EppLimitHit"}
    (limit,) = (each["metric"]["limit"] for each in firing if each["metric"]["alertname"] == "EppLimitHit")
    assert limit == "body_bytes_max"
