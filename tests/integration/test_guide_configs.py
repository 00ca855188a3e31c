"""The configurations of the reference picker's guides and end-to-end tests, written anew (tests/data/configs): each is valid, has the
plugins it names and those it needs, and decides as its guide says.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from epp import cli
from epp.datastore import Reading, Ticket
from epp.resources import Counts, Resources, Target
from epp.sources.resources import ResourcesFile
from epp.types import Address, EndpointSpec
from tests.builders import Core, Stream, chat, core, destination_of, request_body, request_headers, set_headers

DATA = Path(__file__).parents[1] / "data"
CONFIGS = DATA / "configs"
PREFILL, ENCODE, SESSION = "x-prefiller-host-port", "x-encoder-hosts-ports", "x-session-token"
LONG = " ".join(f"word-{number}" for number in range(500))
"""About 1 000 tokens, new to everybody."""
PICTURE = {"type": "image_url", "image_url": {"url": "https://example.test/cat.png"}}
PREFIX = {"approx-prefix-cache-producer": "approx-prefix-cache-producer"}


@dataclass
class Asked:
    """One request's answer to the gateway."""

    destination: str
    headers: Mapping[str, bytes]

    @property
    def pod(self) -> int:
        return pod_at(self.destination)

    @property
    def prefill(self) -> int | None:
        return pod_at(self.headers[PREFILL].decode()) if PREFILL in self.headers else None

    @property
    def encode(self) -> int | None:
        return pod_at(self.headers[ENCODE].decode()) if ENCODE in self.headers else None


def pod_at(destination: str) -> int:
    """The N of `pod-N`, which is at 10.0.0.N."""
    assert destination.startswith("10.0.0.")
    assert destination.endswith(":8000")
    return int(destination.removeprefix("10.0.0.").removesuffix(":8000"))


def ask(world: Core, prompt: str = LONG, *, headers: Mapping[str, str] | None = None, body: bytes | None = None, path: str = "") -> Asked:
    """A request through the protocol; it is left in flight."""
    stream = Stream(world.session())
    stream.send(request_headers(headers=headers, **({"path": path} if path else {})))
    stream.send(request_body(chat(prompt) if body is None else body, end_of_stream=True))
    reply = stream.got[0]
    assert reply.WhichOneof("response") == "request_headers", reply
    return Asked(destination_of(reply), set_headers(reply))


def made_of(name: str, specs: Sequence[EndpointSpec], readings: Mapping[int, Reading]) -> Core:
    world = core(specs, config=text_of(name))
    for number, reading in readings.items():
        world.datastore.record_reading(world.endpoint(number), reading, sent_requests=0, sent_tokens=0)
    return world


def text_of(name: str) -> str:
    return (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")


def pods(*labels: Mapping[str, str]) -> list[EndpointSpec]:
    return [EndpointSpec(f"pod-{i}", Address(f"10.0.0.{i}", 8000), labels=each) for i, each in enumerate(labels, 1)]


def role(name: str, rack: str = "") -> dict[str, str]:
    return {"llm-d.ai/role": name} | ({"topology.kubernetes.io/rack": rack} if rack else {})


# Pools. Three equal servers of which the second is the idlest; and two decode servers (one says so), two that prefill and one that encodes.
EQUAL = pods({}, {}, {})
EQUAL_LOADS = {1: Reading(waiting=3, kv_usage=0.2), 2: Reading(waiting=0, kv_usage=0.1), 3: Reading(waiting=100, kv_usage=1.0)}
ROLES = pods(role("decode", "r1"), {}, role("prefill", "r2"), role("prefill", "r1"), role("encode"))
ROLE_LOADS = {
    1: Reading(waiting=1, kv_usage=0.2),
    2: Reading(waiting=4, kv_usage=0.1),
    3: Reading(waiting=2, kv_usage=0.2),
    4: Reading(waiting=5, kv_usage=0.7),
}


@dataclass(frozen=True)
class Guide:
    """What one configuration is to do."""

    plugins: Mapping[str, str]
    """Name -> type of what must be there, beside what the file itself names."""
    decides: Callable[[str], None]
    warned_of: Sequence[str] = field(default=())
    """Paths of what is deprecated or without effect."""
    experimental: Sequence[str] = field(default=())
    """Alpha plugins in it."""


def idlest(name: str) -> None:
    """The second server has the shortest queue and the emptiest KV cache; a prompt seen before goes where it was in spite of that."""
    world = made_of(name, EQUAL, EQUAL_LOADS)
    assert ask(world).pod == 2
    world.datastore.record_reading(world.endpoint(2), Reading(waiting=3, kv_usage=0.2), sent_requests=1, sent_tokens=1000)
    world.datastore.record_reading(world.endpoint(1), Reading(waiting=2, kv_usage=0.2), sent_requests=0, sent_tokens=0)
    assert ask(world).pod == 2, "it has the prompt, and pod-1's queue is not much shorter"
    assert ask(world, "another question").pod == 1


def spread(name: str) -> None:
    """Equal servers: cold prompts go round, and each comes back to where it was."""
    world = made_of(name, EQUAL, {})
    cold = [ask(world, f"{number} {LONG}").pod for number in range(3)]
    assert cold == [1, 2, 3]
    for reading in range(1, 4):
        world.datastore.record_reading(world.endpoint(reading), Reading(), sent_requests=1, sent_tokens=1000)
    assert [ask(world, f"{number} {LONG}").pod for number in (1, 0, 2, 2)] == [2, 1, 3, 3]


def predicted(name: str) -> None:
    """Before anything is learned: drawn by KV use and queue; the third server has the worst of both, so it is never drawn."""
    world = made_of(name, EQUAL, EQUAL_LOADS)
    drawn = {ask(world, f"{number} {LONG}").pod for number in range(60)}
    assert drawn == {1, 2}
    again = {ask(world, f"7 {LONG}").pod for _ in range(10)}
    assert len(again) == 1, "the strict affinity filter keeps to the one that has the whole prompt"


def sessions(name: str) -> None:
    """Any path, any body: the server with nothing in flight; a client with a token stays where it was, idle or not."""
    world = made_of(name, EQUAL, EQUAL_LOADS)
    Ticket(world.endpoint(1), 0)
    Ticket(world.endpoint(3), 0)
    upload = b"\x00 not JSON"
    assert ask(world, body=upload, path="/upload").pod == 2
    Ticket(world.endpoint(2), 0)
    plugin = world.built.plugins["session-affinity-scorer"]
    token = plugin.response_headers(None, world.endpoint(2))[SESSION]  # type: ignore[attr-defined]
    assert ask(world, body=upload, path="/upload", headers={SESSION: token}).pod == 2
    assert ask(world, body=upload, path="/upload", headers={SESSION: token + "x"}).pod in (1, 3)


def stages(name: str, *, short_ones: bool) -> None:
    """Decode on the one with less in flight, prefill on the one with the shorter queue. `short_ones`: short prompts are prefilled too."""
    world = made_of(name, ROLES, ROLE_LOADS)
    for _ in range(3):
        Ticket(world.endpoint(2), 0)
    found = ask(world)
    assert (found.pod, found.prefill, found.encode) == (1, 3, None)
    assert ask(world, "short").prefill == (3 if short_ones else None)
    assert world.endpoint(3).inflight_requests >= 1, "its share of the work is charged"


def long_prompts_elsewhere(name: str) -> None:
    """New tokens are prefilled by a prefill server; the same prompt again goes to the same decode server, alone."""
    world = made_of(name, ROLES, {})
    first = ask(world)
    assert first.pod in (1, 2)
    assert first.prefill in (3, 4)
    again = ask(world)
    assert again.pod == first.pod
    assert again.prefill is None, "nothing of it is new to the decode server"
    assert ask(world, "hi").prefill is None, "too short"
    world.datastore.apply([each for each in ROLES if each.name in ("pod-1", "pod-5")])
    alone = ask(world, f"now {LONG}")
    assert (alone.pod, alone.prefill) == (1, None), "without a prefill server the decode server does it"


def same_rack(name: str) -> None:
    """pod-1 decodes, for its queue is shorter; pod-4 stands in its rack and prefills though pod-3's queue is shorter."""
    world = made_of(name, ROLES, ROLE_LOADS)
    found = ask(world)
    assert (found.pod, found.prefill) == (1, 4)


def pictures_too(name: str) -> None:
    world = made_of(name, ROLES, {})
    text = ask(world)
    assert (text.pod in (1, 2), text.prefill in (3, 4), text.encode) == (True, True, None)
    picture = chat(LONG + "?", messages=[{"role": "user", "content": [PICTURE, {"type": "text", "text": f"What is this? {LONG}"}]}])
    found = ask(world, body=picture)
    assert (found.pod in (1, 2), found.prefill in (3, 4), found.encode) == (True, True, 5)


def decoders_alone(name: str) -> None:
    world = made_of(name, ROLES, {})
    found = ask(world)
    assert found.pod in (1, 2)
    assert {ask(world).pod for _ in range(5)} == {found.pod}, "the same prompt goes to the same server"
    assert (found.prefill, found.encode) == (None, None)


def idle_gpus(name: str) -> None:
    """pod-1's GPUs are overloaded, pod-2's half busy; pod-3 to 5 don't decode. With all overloaded nobody is left out."""
    world = made_of(name, ROLES, {1: Reading(attributes={"GPUUtilization": 0.9}), 2: Reading(attributes={"GPUUtilization": 0.5})})
    assert {ask(world, str(number)).pod for number in range(5)} == {2}
    world.datastore.record_reading(world.endpoint(2), Reading(attributes={"GPUUtilization": 0.95}), sent_requests=0, sent_tokens=0)
    assert {ask(world, str(number)).pod for number in range(5)} == {1}


GROUP, HEADERS_HANDLER = "apiVersion", "plugins[0].type"
TOKENS = {"token-producer": "token-producer"}
GUIDES = {
    "optimized-baseline": Guide(PREFIX, spread),
    "tiered-prefix-cache-cpu": Guide(TOKENS, idlest, warned_of=[GROUP]),
    "pd-disaggregation": Guide(PREFIX, lambda name: stages(name, short_ones=True), warned_of=[HEADERS_HANDLER]),
    "wide-ep-lws": Guide(PREFIX, lambda name: stages(name, short_ones=True), warned_of=[GROUP, "plugins[1].type"]),
    "wide-ep-lws-experimental-dp-aware": Guide(
        PREFIX | {"max-score-picker": "max-score-picker"}, lambda name: stages(name, short_ones=False), warned_of=["plugins[1].type"]
    ),
    "flow-control": Guide(PREFIX | {"static-usage-limit-policy": "static-usage-limit-policy"}, idlest),
    "predicted-latency-slo": Guide(PREFIX | {"inflight-load-producer": "inflight-load-producer"}, predicted),
    "payload-agnostic": Guide({"inflight-load-producer": "inflight-load-producer"}, sessions),
    "e2e-simple": Guide({}, decoders_alone),
    "e2e-deprecated-pd": Guide(
        {},
        long_prompts_elsewhere,
        warned_of=[GROUP, "plugins[0].type", "plugins[1].type", "plugins[2].type", "plugins[7].type", "parser", "saturationDetector"],
    ),
    "e2e-pd": Guide({}, long_prompts_elsewhere),
    "e2e-pd-topology": Guide({}, same_rack, experimental=["topology-extractor", "topology-affinity-filter", "topology-affinity-scorer"]),
    "e2e-epd": Guide({}, pictures_too),
    "e2e-decode-only": Guide({}, decoders_alone),
    "e2e-gpu-util": Guide({}, idle_gpus, experimental=["dcgm-data-source", "dcgm-extractor"]),
}


def test_there_is_a_test_of_every_file() -> None:
    assert set(GUIDES) == {path.stem for path in CONFIGS.glob("*.yaml")}
    groups = {line for name in GUIDES for line in text_of(name).splitlines() if line.startswith("apiVersion")}
    assert groups == {"apiVersion: llm-d.ai/v1alpha1", "apiVersion: inference.networking.x-k8s.io/v1alpha1"}


@pytest.mark.parametrize("name", GUIDES)
def test_it_is_valid(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    guide, path = GUIDES[name], str(CONFIGS / f"{name}.yaml")
    code = cli.main(["check", path])
    seen = capsys.readouterr()
    if guide.experimental:
        assert code == 2
        assert [line.split(": ")[1].split()[0] for line in seen.err.splitlines()[1:]] == list(guide.experimental)
        code = cli.main(["check", "--allow-experimental-plugins", path])
        seen = capsys.readouterr()
    assert code == 0
    assert "valid: " in seen.out
    assert [line.removeprefix(f"{path}: warning: ").split(":")[0] for line in seen.err.splitlines()] == list(guide.warned_of)


@pytest.mark.parametrize("name", GUIDES)
def test_what_it_names_and_needs_is_there(name: str) -> None:
    world = core(1, config=text_of(name))
    written = {spec.name: spec.type for spec in world.built.config.plugins}
    there = {plugin.name: plugin.type for plugin in world.built.plugins.values()}
    aliases = {"tokenizer": "token-producer", "prefill-header-handler": "disagg-headers-handler"}
    assert there == {name: aliases.get(type_, type_) for name, type_ in written.items()}
    assert there.items() >= GUIDES[name].plugins.items()
    assert there.items() >= {"metrics-data-source": "metrics-data-source", "core-metrics-extractor": "core-metrics-extractor"}.items()


def test_two_tiers_have_two_producers() -> None:
    """The scorer that names no producer means approx-prefix-cache-producer, which appears though another producer is configured."""
    world = core(1, config=text_of("tiered-prefix-cache-cpu"))
    assert set(world.built.indexes) == {(name, "approx-prefix-cache-producer") for name in (*PREFIX, "cpu-prefix-cache-producer")}


@pytest.mark.parametrize("name", GUIDES)
def test_it_decides_as_it_should(name: str) -> None:
    GUIDES[name].decides(name)


@pytest.mark.parametrize("name", GUIDES)
def test_it_survives_the_loss_of_every_endpoint(name: str) -> None:
    world = made_of(name, ROLES, ROLE_LOADS)
    ask(world)
    world.datastore.apply([])
    stream = Stream(world.session())
    stream.send(request_headers(), request_body(chat(LONG), end_of_stream=True))
    assert stream.got[0].immediate_response.status.code == 503
    world.datastore.apply(ROLES)
    assert ask(world).pod in (1, 2, 3, 4, 5)


def test_the_resources_beside_them() -> None:
    resources = Resources(random.Random(1), pool_name="llama", pool_group="inference.networking.k8s.io")
    ResourcesFile(DATA / "resources.yaml", resources).load()
    assert resources.counts == Counts(objectives=2, rewrites=1, rules=1)
    assert [resources.priority(name) for name in ("interactive", "overnight", "nobody")] == [10, -10, 0]
    assert resources.target("assistant") == Target("sim/llama-8b", "assistant")
    assert resources.target("other") is None
