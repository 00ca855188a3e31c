"""What files say takes effect while requests run, through a real Envoy: the policy, the names of models; and sessions stay where they are."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from http_clients import MODEL, TIMEOUT_S, Answer, Http1, TruncatedError, ask, chat, eventually, scrape, until_idle, until_metrics
from programs import Engines, Gateway

pytestmark = pytest.mark.e2e

CHAT = "/v1/chat/completions"
CONCURRENCY = 8
TIME_SCALE = "4"
"""A token takes 2 ms, and a little more with company."""
TIERS = ("gold", "silver")
HEAD = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"
ANYWHERE = f"""{HEAD}
plugins: [{{type: random-picker}}]
"""
GOLD_ONLY = f"""{HEAD}
plugins:
- {{type: label-selector-filter, parameters: {{matchLabels: {{tier: gold}}}}}}
- type: queue-scorer
"""
AS_THE_HEADER_SAYS = f"""{HEAD}
plugins:
- {{type: header-label-affinity-scorer, parameters: {{headerName: x-tier, labelKey: tier}}}}
- type: queue-scorer
schedulingProfiles:
- name: by-header
  plugins: [{{pluginRef: header-label-affinity-scorer, weight: 10}}, {{pluginRef: queue-scorer, weight: 1}}]
"""
FAULTY = f"{HEAD}plugins: [{{type: queue-scorr}}, {{type: random-picker, parameters: {{maxNum: 1}}}}]\n"
SESSIONS = f"{HEAD}plugins: [{{type: session-affinity-filter}}, {{type: random-picker}}]\n"
RESOURCES = Path(__file__).parents[1] / "data" / "resources.yaml"


@dataclass
class Files:
    """What the picker was told to read."""

    config: Path
    resources: Path

    @staticmethod
    def replace(path: Path, text: str) -> None:
        """At once, as an editor that cares or a ConfigMap does."""
        new = path.with_suffix(".new")
        new.write_text(text)
        new.replace(path)


@pytest.fixture(scope="module")
def two() -> Iterator[Engines]:
    with Engines("--time-scale", TIME_SCALE, count=2) as program:
        yield program


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("told")
    made = Files(folder / "config.yaml", folder / "resources.yaml")
    made.config.write_text(ANYWHERE)
    made.resources.write_text(RESOURCES.read_text())
    return made


@pytest.fixture(scope="module")
def told(two: Engines, files: Files) -> Iterator[Gateway]:
    """A gateway whose picker reads all of it from files. The first engine is gold, the second silver."""
    endpoints = [
        {"name": tier, "address": address.host, "port": address.port, "labels": {"tier": tier}}
        for tier, address in zip(TIERS, two.addresses, strict=True)
    ]
    pool = files.config.with_name("endpoints.json")
    pool.write_text(json.dumps({"endpoints": endpoints}))
    flags = ("--destination", "original-dst", "--endpoints-file", str(pool))
    with Gateway((), *flags, "--config-file", str(files.config), "--resources-file", str(files.resources)) as program:
        yield program


@dataclass
class Outcome:
    started_s: float
    status: int = 0
    engine: str = ""
    whole: bool = False
    over: bool = False


@dataclass
class Load:
    """Clients that never rest, until told to; half of them stream, all of them ask for silver."""

    gateway: Gateway
    outcomes: list[Outcome] = field(default_factory=list)
    _stopping: bool = False

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Load]:
        async with asyncio.TaskGroup() as clients:
            for number in range(CONCURRENCY):
                clients.create_task(self._client(number))
            try:
                yield self
            finally:
                self._stopping = True

    async def _client(self, number: int) -> None:
        turn = 0
        while not self._stopping:
            with contextlib.suppress(TruncatedError):  # its outcome says so
                async with Http1(self.gateway.address) as client:
                    while not self._stopping:
                        turn += 1
                        await self._request(client, f"Client {number} asks for the {turn}th time", stream=number % 2 == 0)

    async def _request(self, client: Http1, text: str, *, stream: bool) -> None:
        outcome = Outcome(time.monotonic())
        self.outcomes.append(outcome)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await client.send("POST", CHAT, chat(text, max_tokens=20, stream=stream), {"x-tier": "silver"})
                outcome.status = await client.head()
                outcome.engine = client.headers.get("x-inference-endpoint", "")
                outcome.whole = bool(await client.rest())
        finally:
            outcome.over = True

    @property
    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.over and not (outcome.status == 200 and outcome.whole)]

    async def next(self, count: int) -> Counter[str]:
        """Engine -> requests, of the next ones that begin now."""
        since_s = time.monotonic()
        served: Counter[str] = Counter()

        async def reached() -> bool:
            nonlocal served
            served = Counter(outcome.engine for outcome in self.outcomes if outcome.over and outcome.started_s >= since_s)
            return served.total() >= count

        await eventually(reached, f"{count} requests")
        return served


async def reloaded(gateway: Gateway, **counts: int) -> None:
    for outcome, count in counts.items():
        await until_metrics(
            gateway.metrics,
            lambda now, outcome=outcome, count=count: now.sum("epp_config_reloads_total", outcome=outcome) == count,
            f"{count} {outcome}",
        )


async def test_the_policy_is_exchanged_under_load_and_no_request_fails(told: Gateway, two: Engines, files: Files) -> None:
    gold, silver = map(str, two.addresses)
    async with Load(told).running() as load:
        assert set(await load.next(100)) == {gold, silver}

        files.replace(files.config, GOLD_ONLY)
        await reloaded(told, applied=1)
        assert set(await load.next(100)) == {gold}

        files.replace(files.config, FAULTY)
        await reloaded(told, applied=1, rejected=1)
        assert set(await load.next(100)) == {gold}, "a faulty file changes nothing"

        files.replace(files.config, AS_THE_HEADER_SAYS)
        await reloaded(told, applied=2)
        assert set(await load.next(100)) == {silver}

        files.replace(files.config, ANYWHERE)
        await reloaded(told, applied=3, rejected=1)
        assert set(await load.next(100)) == {gold, silver}
    assert load.failed == []
    assert len(load.outcomes) >= 500
    await until_idle(told.metrics)
    (line,) = re.findall(r"^.*configuration file rejected.*$", told.stderr, re.MULTILINE)
    assert "queue-scorr" in line
    assert "plugins[1].parameters.maxNum" in line, "every fault is in it"
    assert "Traceback" not in told.stderr


# Sessions


async def pinned(gateway: Gateway, headers: Mapping[str, str], count: int = 12) -> tuple[set[str], Answer]:
    """Who answers so many requests with these headers, and the last answer."""
    answers = [await ask(gateway.address, CHAT, chat(f"turn {turn}"), headers) for turn in range(count)]
    assert {answer.status for answer in answers} == {200}
    return {answer.engine for answer in answers}, answers[-1]


async def test_a_session_stays_where_it_began_and_a_forged_token_means_nothing(told: Gateway, two: Engines, files: Files) -> None:
    both = set(map(str, two.addresses))
    applied = int((await scrape(told.metrics)).sum("epp_config_reloads_total", outcome="applied"))
    files.replace(files.config, SESSIONS)
    await reloaded(told, applied=applied + 1)
    everywhere, _ = await pinned(told, {}, 40)
    assert everywhere == both
    for _ in range(2):
        first = await ask(told.address, CHAT, chat("begin"))
        token = first.headers["x-session-token"]
        engines, last = await pinned(told, {"x-session-token": token})
        assert engines == {first.engine}
        assert last.headers["x-session-token"] == token
    forged, signature = token.split(".")
    for wrong in (forged, f"{forged}.", f"{forged}.{signature[::-1]}", "x" * 4000, token.swapcase()):
        engines, _ = await pinned(told, {"x-session-token": wrong}, 40)
        assert engines == both, wrong[:60]


# Model names


async def models(gateway: Gateway, model: str) -> tuple[int, set[str]]:
    """The status of an answer, and the models it and a streamed one name."""
    whole = await ask(gateway.address, CHAT, chat("Who are you?", model=model))
    streamed = await ask(gateway.address, CHAT, chat("Who are you?", model=model, stream=True, max_tokens=8))
    assert whole.status == streamed.status
    named = {whole.json.get("model", "")}
    for line in streamed.body.decode().splitlines():
        if line.startswith("data: {"):
            named.add(json.loads(line.removeprefix("data: "))["model"])
    return whole.status, named


async def test_the_engine_sees_the_target_model_and_the_client_its_own(told: Gateway, files: Files) -> None:
    assert await models(told, "assistant") == (200, {"assistant"}), "the engine knows nobody of that name"
    assert await models(told, MODEL) == (200, {MODEL})
    samples = await scrape(told.metrics)
    assert samples.sum("llm_d_epp_model_rewrite_decisions_total", model_rewrite_name="assistant", target_model=MODEL) == 2
    assert samples.sum("llm_d_epp_request_total", model_name="assistant", target_model_name=MODEL) == 2

    changed = RESOURCES.read_text().replace("value: assistant", "value: helper")
    assert changed != RESOURCES.read_text()
    files.replace(files.resources, changed)

    async def renamed() -> bool:
        return (await ask(told.address, CHAT, chat("Who are you?", model="helper"))).status == 200

    await eventually(renamed, "the new name")
    assert await models(told, "helper") == (200, {"helper"})
    assert (await ask(told.address, CHAT, chat("Who are you?", model="assistant"))).status == 404, "by the engine"

    files.replace(files.resources, changed.replace("targets", "target"))
    await asyncio.to_thread(told.await_output, "resources file rejected")
    assert await models(told, "helper") == (200, {"helper"}), "a faulty file changes nothing"
