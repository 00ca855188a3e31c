"""What traces lack: a suite of small synthetic workloads, each with one thing in it that some policies are bad at.

All arrivals are Poisson, seeded, for `DURATION_S` (agents: `AGENTS_S`); rates grow with the number of replicas and with the profile's prefill speed, so that
the load stays the same. A prompt is a chain of parts (a system prompt, a document, a question); equal chains share blocks. Rate 1 is
busy but healthy for a good policy on 8 replicas: `--rate` finds where it ends.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from bench.replay.adapters import Adapters
from bench.replay.job import BLOCK_TOKENS
from bench.replay.profiles import Profile
from bench.replay.workload import Arrival, Incident, Workload

DURATION_S = 600.0
AGENTS_S = 3_600.0
"""Closed loops are chaotic: over seeds the standard deviation of a policy's TTFT p90 is 4 to 25 % after ten minutes, 2 to 9 % after an hour."""
REFERENCE_TOKENS_PER_S = 15_928.0
"""Of prefill: the speed the rates below are for."""


class Setting:
    """Who plays where. Everything random in a workload comes from `rng`."""

    def __init__(self, replicas: int, profile: Profile, seed: int) -> None:
        self.replicas = replicas
        self.profile = profile
        self.rng = random.Random(f"scenario {seed}")
        self._blocks: dict[tuple[int, object, int], int] = {}
        self._fresh = 0

    def times(self, per_replica_s: float, start_s: float = 0.0, end_s: float = DURATION_S) -> Iterator[float]:
        """A Poisson process."""
        rate = per_replica_s * self.replicas * self.profile.prefill_tokens_per_s / REFERENCE_TOKENS_PER_S
        at_s = start_s
        while (at_s := at_s + self.rng.expovariate(rate)) < end_s:
            yield at_s

    def blocks(self, *parts: tuple[object, int]) -> tuple[int, tuple[int, ...]]:
        """(tokens, block ids) of a prompt of these (content, tokens), None for content nobody has seen before.

        A block's id stands for all that is before it too. A block in which two parts meet belongs to the later one.
        """
        ids: list[int] = []
        total, parent, filled = 0, -1, 0
        for content, tokens in parts:
            total += tokens
            name: object = content
            if content is None:
                self._fresh += 1
                name = ("fresh", self._fresh)
            whole = total // BLOCK_TOKENS
            for position in range(filled, whole):
                parent = self._blocks.setdefault((parent, name, position), len(self._blocks))
                ids.append(parent)
            filled = whole
        if total > filled * BLOCK_TOKENS:
            ids.append(self._blocks.setdefault((parent, ("tail", total, len(self._blocks)), filled), len(self._blocks)))
        return total, tuple(ids)

    def lognormal(self, median: float, sigma: float, least: int, most: int) -> int:
        return int(min(most, max(least, self.rng.lognormvariate(math.log(median), sigma))))

    def zipf(self, number: int, exponent: float) -> Callable[[], int]:
        """Draws 0 .. number - 1, the lower the likelier."""
        weights = [1 / (rank + 1) ** exponent for rank in range(number)]
        cumulative = [sum(weights[: rank + 1]) for rank in range(number)]
        return lambda: self.rng.choices(range(number), cum_weights=cumulative)[0]


def _workload(name: str, arrivals: Sequence[Arrival], **more: object) -> Workload:
    return replace(Workload(name, sorted(arrivals, key=lambda arrival: arrival.at_s)), **more)  # type: ignore[arg-type]


def shared_prompts(setting: Setting) -> Workload:
    """150 groups, each with a system prompt of 6 144 tokens of its own, and questions of 1 200: all of them fit the pool, not one replica."""
    rng, arrivals = setting.rng, []
    for at_s in setting.times(2.4):
        tokens, blocks = setting.blocks((("group", rng.randrange(150)), 6_144), (None, 1_200))
        arrivals.append(Arrival(at_s, tokens, setting.lognormal(250, 0.4, 16, 1_000), blocks))
    return _workload("shared-prompts", arrivals)


def agents(setting: Setting) -> Workload:
    """Agents: a shared system prompt of 3 072 tokens, a long context each (median 24k), 6 to 20 short turns, each after a tool's pause.

    A turn's prompt is everything before it and 1 000 new tokens; it is sent when the turn before is answered and the tool is done.
    """
    rng, arrivals = setting.rng, []
    for number, at_s in enumerate(setting.times(0.02, end_s=AGENTS_S)):
        parts: list[tuple[object, int]] = [("system", 3_072), (("context", number), setting.lognormal(24_000, 0.6, 4_096, 90_000))]
        turns = []
        for turn in range(rng.randint(6, 20)):
            output = setting.lognormal(300, 0.6, 16, 1_500)
            tokens, blocks = setting.blocks(*parts, ((number, turn), 1_000))
            turns.append(Arrival(rng.expovariate(1 / 8), tokens, output, blocks))
            parts.append(((number, turn), 1_000 + output))
        first, *rest = turns
        arrivals.append(first._replace(at_s=at_s, turns=tuple(rest)))
    return _workload("agents", arrivals)


def paced_agents(setting: Setting) -> Workload:
    """Agents on a schedule, so slow that nobody else is served at most arrivals: a system prompt of 4 096 tokens, 15 turns two minutes apart.

    Their prompts fit the pool's caches, not one replica's: who counts what is under way alone gives all to whoever had the system prompt first.
    """
    rng, arrivals = setting.rng, []
    for number, at_s in enumerate(setting.times(0.004, end_s=AGENTS_S)):
        parts: list[tuple[object, int]] = [("system", 4_096)]
        turns = []
        for turn in range(15):
            output = setting.lognormal(60, 0.6, 8, 400)
            tokens, blocks = setting.blocks(*parts, ((number, turn), 1_024))
            turns.append(Arrival(rng.uniform(108, 132), tokens, output, blocks))
            parts.append(((number, turn), 1_024 + output))
        first, *rest = turns
        arrivals.append(first._replace(at_s=at_s, turns=tuple(rest)))
    return _workload("paced-agents", arrivals)


def bursts(setting: Setting) -> Workload:
    """A quiet stream, and every 20 s within half a second five requests a replica that share a prefix of 4 096 tokens."""
    rng, arrivals = setting.rng, []
    for at_s in setting.times(0.5):
        tokens, blocks = setting.blocks((("base", rng.randrange(20)), 2_048), (None, setting.lognormal(3_000, 0.8, 64, 30_000)))
        arrivals.append(Arrival(at_s, tokens, setting.lognormal(250, 0.6, 8, 1_500), blocks))
    for number in range(int(DURATION_S / 20)):
        for _ in range(5 * setting.replicas):
            tokens, blocks = setting.blocks((("burst", number), 4_096), (None, setting.lognormal(1_500, 0.6, 64, 8_000)))
            arrivals.append(Arrival(20 * number + 10 + rng.random() / 2, tokens, setting.lognormal(150, 0.6, 8, 1_000), blocks))
    return _workload("bursts", arrivals)


def rag(setting: Setting) -> Workload:
    """A system prompt, three of 300 documents by popularity (Zipf 1.0; 2 to 6k tokens each), a question: the first document decides."""
    rng, arrivals = setting.rng, []
    lengths = [rng.randrange(2_048, 6_145, BLOCK_TOKENS) for _ in range(300)]
    draw = setting.zipf(300, 1.0)
    for at_s in setting.times(0.8):
        chosen: list[int] = []
        while len(chosen) < 3:
            document = draw()
            if document not in chosen:
                chosen.append(document)
        parts = [(("document", document), lengths[document]) for document in chosen]
        tokens, blocks = setting.blocks(("system", 512), *parts, (None, 300))
        arrivals.append(Arrival(at_s, tokens, setting.lognormal(250, 0.5, 16, 1_000), blocks))
    return _workload("rag", arrivals)


def lora(setting: Setting) -> Workload:
    """24 LoRA adapters by popularity (Zipf 0.8), 4 at once on a replica, 0.3 s to load one; each has a prompt of 1 536 tokens of its own."""
    arrivals = []
    draw = setting.zipf(24, 0.8)
    for at_s in setting.times(0.9):
        adapter = draw()
        tokens, blocks = setting.blocks((("adapter", adapter), 1_536), (None, setting.lognormal(2_000, 0.7, 64, 12_000)))
        arrivals.append(Arrival(at_s, tokens, setting.lognormal(200, 0.5, 8, 1_000), blocks, f"adapter-{adapter}"))
    return _workload("lora", arrivals, adapters=Adapters())


def hot_prefix(setting: Setting) -> Workload:
    """One prefix of 8 192 tokens is in half of all prompts, more than one replica can serve; from half time on it is another one."""
    rng, arrivals = setting.rng, []
    for at_s in setting.times(2.0):
        if rng.random() < 0.5:
            parts: list[tuple[object, int]] = [(("hot", at_s > DURATION_S / 2), 8_192), (None, setting.lognormal(1_200, 0.6, 64, 8_000))]
        else:
            parts = [(("group", rng.randrange(60)), 2_048), (None, setting.lognormal(2_500, 0.8, 64, 20_000))]
        tokens, blocks = setting.blocks(*parts)
        arrivals.append(Arrival(at_s, tokens, setting.lognormal(200, 0.6, 8, 1_000), blocks))
    return _workload("hot-prefix", arrivals)


def conversations(setting: Setting, per_replica_s: float) -> list[Arrival]:
    """Chats of 1 to 8 turns, each turn's prompt everything before it; turns come when they come, answered or not."""
    rng, arrivals = setting.rng, []
    for number, at_s in enumerate(setting.times(per_replica_s, end_s=DURATION_S)):
        when_s = at_s
        parts: list[tuple[object, int]] = [(("system", rng.randrange(12)), 1_024)]
        for turn in range(min(8, 1 + int(rng.expovariate(1 / 2.5)))):
            asked, output = setting.lognormal(2_200, 1.0, 32, 40_000), setting.lognormal(300, 0.6, 8, 1_500)
            tokens, blocks = setting.blocks(*parts, ((number, turn), asked))
            arrivals.append(Arrival(when_s, tokens, output, blocks))
            parts.append(((number, turn), asked + output))
            when_s += 10 + rng.expovariate(1 / 25)
    return [arrival for arrival in arrivals if arrival.at_s < DURATION_S]


def mixed_speeds(setting: Setting) -> Workload:
    """Chats on a pool of which a quarter runs at 0.5 and a quarter at 0.35 of the speed."""
    count = setting.replicas
    speeds = [1.0 if 2 * place < count else 0.5 if 4 * place < 3 * count else 0.35 for place in range(count)]
    return _workload("mixed-speeds", conversations(setting, 0.24 * sum(speeds) / count), speeds=speeds)


def cold_start(setting: Setting) -> Workload:
    """Chats; a replica with an empty cache joins after a third of the time. Everything is new to it, and it is idle."""
    last = setting.replicas - 1
    return _workload(
        "cold-start", conversations(setting, 0.24), incidents=(Incident(DURATION_S / 3, last, "join"),), absent=frozenset({last})
    )


def replica_loss(setting: Setting) -> Workload:
    """Chats; a replica dies after a third of the time and stays in the pool, refusing connections, until 30 s later it is taken out."""
    incidents = (Incident(DURATION_S / 3, 0, "down"), Incident(DURATION_S / 3 + 30, 0, "leave"))
    return _workload("replica-loss", conversations(setting, 0.22), incidents=incidents)


def restart(setting: Setting) -> Workload:
    """Chats; one replica after the other restarts, 60 s apart, is away for 20 s and comes back with an empty cache."""
    incidents = []
    for number in range(min(setting.replicas - 1, int(DURATION_S / 60) - 1)):
        at_s = 60.0 * (number + 1)
        incidents += [Incident(at_s, number, "down"), Incident(at_s + 20, number, "up")]
    return _workload("restart", conversations(setting, 0.22), incidents=incidents)


def slow_replica(setting: Setting) -> Workload:
    """Chats; one replica runs at 0.3 of its speed for the middle third (heat, a noisy neighbour) and says so nowhere."""
    incidents = (Incident(DURATION_S / 3, 0, "speed", 0.3), Incident(2 * DURATION_S / 3, 0, "speed", 1.0))
    return _workload("slow-replica", conversations(setting, 0.22), incidents=incidents)


def failing_replica(setting: Setting) -> Workload:
    """Chats; one replica answers 500 at once for 60 s, its metrics those of an idle one: a black hole for whoever looks at load alone."""
    incidents = (Incident(DURATION_S / 3, 0, "failing", 1.0), Incident(DURATION_S / 3 + 60, 0, "failing", 0.0))
    return _workload("failing-replica", conversations(setting, 0.22), incidents=incidents)


SCENARIOS: Mapping[str, Callable[[Setting], Workload]] = {
    "shared-prompts": shared_prompts,
    "agents": agents,
    "paced-agents": paced_agents,
    "bursts": bursts,
    "rag": rag,
    "lora": lora,
    "hot-prefix": hot_prefix,
    "mixed-speeds": mixed_speeds,
    "cold-start": cold_start,
    "replica-loss": replica_loss,
    "restart": restart,
    "slow-replica": slow_replica,
    "failing-replica": failing_replica,
}
