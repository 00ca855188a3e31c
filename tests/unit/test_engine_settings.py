"""What the configuration's data layer says, in the scraper's terms."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from epp.clock import VirtualClock
from epp.config.load import load
from epp.engines.settings import Families, fetch_options, interval_s
from epp.plugins.base import Plugin
from epp.plugins.registry import Registry
from epp.scheduling.build import build
from tests.builders import pool_of

DATA = Path(__file__).parents[1] / "data"
HEAD = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"
CUSTOM = """
plugins:
- type: metrics-data-source
  parameters: {scheme: https, port: 9100, path: /stats, caCertPath: /ca.pem}
- type: core-metrics-extractor
  parameters:
    engineConfigs:
    - name: ours
      queuedRequestsSpec: our_queue{kind=all}
      runningRequestsSpec: our_running
      customMetrics: [{attributeKey: Heat, metricSpec: our_heat}]
"""


def plugins(text: str = "") -> dict[str, Plugin]:
    registry = Registry()
    config = load(HEAD + text if text else "", source="t", catalogue=registry)
    return dict(build(config, registry, random.Random(1), VirtualClock()).plugins)


def test_without_a_data_layer_engines_are_told_by_what_they_say() -> None:
    found = plugins()
    options, families = fetch_options(found), Families(found)
    assert (options.scheme, options.path, options.port, options.insecure_skip_verify) == ("http", "", 0, False)
    (endpoint,) = pool_of({})
    text = (DATA / "vllm-0.32-metrics-busy.txt").read_bytes()
    family = families.family(endpoint, text)
    assert family is not None
    assert family.name == "vllm"
    assert list(families.paths(endpoint)) == []


def test_a_label_says_which_engine_it_is_and_where_to_ask() -> None:
    families = Families(plugins())
    endpoint = pool_of({"labels": {"llm-d.ai/engine-type": "trtllm-serve"}})[0]  # type: ignore[dict-item]
    assert list(families.paths(endpoint)) == ["/prometheus/metrics"]


def test_an_unknown_label_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    families = Families(plugins())
    endpoint = pool_of({"labels": {"llm-d.ai/engine-type": "warp"}})[0]  # type: ignore[dict-item]
    for _ in range(3):
        assert list(families.paths(endpoint)) == []
    assert caplog.text.count("unknown engine type") == 1


def test_metrics_of_ones_own() -> None:
    found = plugins(CUSTOM)
    options = fetch_options(found, "/token")
    assert (options.scheme, options.path, options.port, options.ca_path, options.bearer_token_file) == (
        "https", "/stats", 9100, "/ca.pem", "/token",
    )  # fmt: skip
    endpoint = pool_of({"labels": {"llm-d.ai/engine-type": "ours"}})[0]  # type: ignore[dict-item]
    family = Families(found).family(endpoint, b"")
    assert family is not None
    reading = family.read(b'our_queue{kind="all"} 3\nour_queue{kind="bad"} 9\nour_running 2\nour_heat 0.5\n')
    assert (reading.waiting, reading.running, dict(reading.attributes)) == (3.0, 2.0, {"Heat": 0.5})


def test_the_sources_interval_goes_before_the_flag() -> None:
    assert interval_s(plugins(), 0.05) == 0.05
    assert interval_s(plugins("plugins: [{type: metrics-data-source, parameters: {interval: 2s}}]"), 0.05) == 2.0
