"""Two real vLLMs that publish their KV-cache events, behind Envoy: what the picker predicts to be cached is what vLLM then reports."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from http_clients import eventually
from install import InstallError, tiny_model
from kv_workload import Told, approximated, config, converse, endpoints_file, joined, sums
from pools import completed, counted, user
from programs import Gateway, free_port
from servers import MODEL, Vllm, fetched

REQUESTS = 200


class TellingVllm(Vllm):
    """Without LoRA; it publishes events and says in each answer what was cached."""

    def __init__(self, place: Path, model: Path, *, blocks: int) -> None:
        super().__init__(place, model, adapters={})
        self.blocks = blocks
        self.events, self.replay = free_port(), free_port()
        endpoints = {"endpoint": f"tcp://*:{self.events}", "replay_endpoint": f"tcp://*:{self.replay}"}
        events = {"enable_kv_cache_events": True, "publisher": "zmq", "topic": f"kv@{self.address}@{MODEL}"} | endpoints
        kept = self.arguments[: self.arguments.index("--enable-lora")]
        blocks_at = kept.index("--num-gpu-blocks-override") + 1
        kept = (*kept[:blocks_at], str(blocks), *kept[blocks_at + 1 :])
        self.arguments = (*kept, "--enable-prompt-tokens-details", "--kv-events-config", json.dumps(events))


Pair = tuple[TellingVllm, TellingVllm]


@pytest.fixture(scope="module")
def model(vllm_place: Path) -> Path:
    """The smallest: nothing here is about time."""
    try:
        return tiny_model(vllm_place / "bin/python", layers=2, hidden=64)
    except InstallError as error:
        pytest.skip(str(error))


def running(place: Path, model: Path, blocks: int) -> Iterator[Pair]:
    with TellingVllm(place, model, blocks=blocks) as one, TellingVllm(place, model, blocks=blocks) as two:
        yield one, two


@pytest.fixture(scope="module", params=[1_000, 80], ids=["roomy", "tight"])
def engines(request: pytest.FixtureRequest, vllm_place: Path, model: Path) -> Iterator[Pair]:
    yield from running(vllm_place, model, request.param)


@pytest.fixture(scope="module")
def gateway(engines: Pair, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    file = endpoints_file(tmp_path_factory.mktemp("pool"), [(each.address, each.events, each.replay) for each in engines])
    flags = ("--endpoints-file", str(file), "--destination", "original-dst", "--zap-encoder", "json", "-v", "4")
    with Gateway((), *flags, "--config-text", config(model)) as program:
        yield program


async def until_known(gateway: Gateway, engines: Pair) -> None:
    """An engine that has told nothing is guessed at: each is asked something, past the gateway."""

    async def connected() -> bool:
        return await counted(gateway.metrics, "llm_d_epp_kv_cache_events_active_subscribers") == 2

    async def known() -> bool:
        return await counted(gateway.metrics, "epp_kv_events_untrusted_endpoints") == 0

    await eventually(connected, "a connection to each engine's events")
    for engine in engines:
        assert (await completed(engine.address, [user("a block or two, please: " * 20)])).status == 200
    await eventually(known, "both are known by their events")


async def test_what_is_predicted_is_what_vllm_reports(gateway: Gateway, engines: Pair, measured: Callable[[str], None]) -> None:
    await until_known(gateway, engines)
    tight = engines[0].blocks < 100
    answers = await converse(
        gateway.address, conversations=40, turns=REQUESTS // 40, at_once=3, words=40, system_words=60 if tight else 150, seed=8
    )
    told: list[Told] = joined(gateway, answers)
    assert len(told) == REQUESTS
    assert {each.endpoint for each in told} == {str(each.address) for each in engines}, "both are used"
    assert [each.counted_tokens for each in told] == [each.prompt_tokens for each in told], "the tokens are vLLM's"
    ours = sums([(each.predicted, each.reported) for each in told])
    capacity_tokens = engines[0].blocks * engines[0].block_tokens
    theirs = sums(approximated(told, engines[0].address, capacity_tokens=capacity_tokens))
    share = sum(each.reported for each in told) / sum(each.prompt_tokens for each in told)
    measured(
        f"vLLM, {engines[0].blocks} blocks of {engines[0].block_tokens}: {share:.0%} of {sum(each.prompt_tokens for each in told)} prompt tokens cached; "
        f"predicted exactly {ours.exact:.1%}, precision {ours.precision:.3f}, recall {ours.recall:.3f}; "
        f"approximate index: {theirs.exact:.1%}, {theirs.precision:.3f}, {theirs.recall:.3f}"
    )
    if tight:
        assert min(ours.precision, ours.recall) > 0.95
        assert share < 0.9, "blocks were evicted"
    else:
        assert ours.exact >= 0.99
    state = fetched(gateway.metrics, "/debug/plugins/state")
    assert json.dumps(state)
    assert await counted(gateway.metrics, "epp_kv_index_token_mismatches_total") == 0
    assert await counted(gateway.metrics, "epp_kv_index_approximated_total") == 0
