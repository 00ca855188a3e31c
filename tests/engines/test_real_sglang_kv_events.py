"""A real SGLang that publishes its KV-cache events, behind Envoy: what the picker predicts to be cached is what SGLang then reports."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import installed
from http_clients import eventually
from install import InstallError, tiny_model
from kv_workload import config, converse, endpoints_file, joined, sums
from pools import counted
from programs import Gateway, free_port
from servers import Sglang

REQUESTS = 60


class TellingSglang(Sglang):
    """It publishes events and says in each answer what was cached."""

    def __init__(self, place: Path, model: Path) -> None:
        super().__init__(place, model)
        self.events, self.replay = free_port(), free_port()
        events = {"publisher": "zmq", "endpoint": f"tcp://*:{self.events}", "replay_endpoint": f"tcp://*:{self.replay}"}
        self.arguments = (*self.arguments, "--enable-cache-report", "--kv-events-config", json.dumps(events))


@pytest.fixture(scope="module")
def model(vllm_place: Path) -> Path:
    """The smallest: nothing here is about time."""
    try:
        return tiny_model(vllm_place / "bin/python", layers=2, hidden=64)
    except InstallError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[TellingSglang]:
    with TellingSglang(installed("sglang"), model) as program:
        yield program


@pytest.fixture(scope="module")
def gateway(engine: TellingSglang, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    file = endpoints_file(tmp_path_factory.mktemp("pool"), [(engine.address, engine.events, engine.replay)])
    flags = ("--endpoints-file", str(file), "--destination", "original-dst", "--zap-encoder", "json", "-v", "4")
    with Gateway((), *flags, "--config-text", config(model)) as program:
        yield program


async def test_what_is_predicted_is_what_sglang_reports(gateway: Gateway, engine: TellingSglang, measured: Callable[[str], None]) -> None:
    async def connected() -> bool:
        return await counted(gateway.metrics, "llm_d_epp_kv_cache_events_active_subscribers") == 1

    await eventually(connected, "a connection to the engine's events")
    answers = await converse(gateway.address, conversations=12, turns=REQUESTS // 12, at_once=1, words=40, system_words=60, seed=8)
    told = joined(gateway, answers)
    assert len(told) == REQUESTS
    assert [each.counted_tokens for each in told] == [each.prompt_tokens for each in told], "the tokens are SGLang's"
    found = sums([(each.predicted, each.reported) for each in told])
    share = sum(each.reported for each in told) / sum(each.prompt_tokens for each in told)
    measured(
        f"SGLang, {engine.pages} pages of {engine.page_tokens}: {share:.0%} of the prompt tokens cached; "
        f"predicted exactly {found.exact:.1%}, precision {found.precision:.3f}, recall {found.recall:.3f}"
    )
    assert share > 0.3
    assert min(found.precision, found.recall) > 0.95
