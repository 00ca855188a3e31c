"""Time of one decision, by size of the pool and length of the prompt: the product's own director, in this process, no sockets.

What is timed is `Director.route`: reading the body, hashing the prompt, the look-up, filters, scorers, picker, and the charge. Around it
life goes on, untimed: first tokens, ends, scrapes, so that what is kept between decisions is as stale as in production. README.md says
what a decision is not.
"""

import argparse
import gc
import json
import random
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import BenchError, report
from epp.clock import MonotonicClock
from epp.datastore import Datastore, Reading
from epp.decisions import Decisions
from epp.director import Director
from epp.errors import ConfigError
from epp.exchange import Exchange
from epp.observe.metrics import Metrics
from epp.outliers import Outliers
from epp.plugins.registry import Registry
from epp.policy import Policy
from epp.resources import Resources
from epp.types import Address, Endpoint, EndpointSpec, LLMRequest

DESCRIPTION = """\
Time of one decision of the director, from a request's body to the charged endpoint, by endpoints and prompt tokens. Percentiles are of
`--requests` decisions, the least of `--rounds` rounds: noise on a shared machine only ever adds."""

P99_TARGET_US = 1_000.0
"""At 1 000 endpoints with the default profile."""
TARGET_ENDPOINTS = 1_000
IN_FLIGHT_PER_ENDPOINT = 4
SHARED_PROMPTS = 32
TOKEN_CHARS = 4
KEPT_DECISIONS = 64
COLUMNS = (
    report.Column("endpoints", "endpoints"),
    report.Column("prompt_tokens", "prompt tokens"),
    report.Column("p50_us", "p50 us", ".1f"),
    report.Column("p99_us", "p99 us", ".1f"),
    report.Column("hit", "hit", ".2f"),
    report.Column("target_us", "target us", ".0f"),
    report.Column("met", "met"),
)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--endpoints", type=_numbers, default=[16, 256, 1_000], metavar="N,N", help="pool sizes (default: 16,256,1000)")
    parser.add_argument(
        "--prompt-tokens", type=_numbers, default=[1_000, 8_000, 32_000, 128_000], metavar="N,N", help="(default: 1000,8000,32000,128000)"
    )
    parser.add_argument("--requests", type=int, default=1_000, help="decisions a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of which the least counts (default: %(default)s)")
    parser.add_argument("--config", metavar="FILE", help="an EndpointPickerConfig (default: the default profile)")
    parser.add_argument("--no-debug-decisions", action="store_true", help="without keeping the last decisions for `epp explain`")
    parser.add_argument("--json", metavar="FILE", help="write rows, machine and versions here too")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")


def run(args: argparse.Namespace) -> int:
    text = ""
    if args.config:
        try:
            text = Path(args.config).read_text(encoding="utf-8")
        except OSError as error:
            raise BenchError(f"{args.config}: {error.strerror}") from None
    rows = []
    for endpoints in args.endpoints:
        for tokens in args.prompt_tokens:
            try:
                row = measure(endpoints, tokens, text, requests=args.requests, rounds=args.rounds, keep=not args.no_debug_decisions)
            except ConfigError as error:
                raise BenchError(str(error)) from None
            if endpoints == TARGET_ENDPOINTS and not args.config:
                row |= {"target_us": P99_TARGET_US, "met": float(str(row["p99_us"])) < P99_TARGET_US}
            rows.append(row)
            print(f"measured: {endpoints} endpoints, {tokens} tokens: p50 {row['p50_us']:.1f} us", flush=True)
    print()
    print(report.table(rows, COLUMNS))
    if args.json:
        notes = {"requests": args.requests, "rounds": args.rounds, "config": args.config or "default"}
        report.write_json(Path(args.json), report.document(rows, ("msgspec", "xxhash"), notes))
    return int(args.check and any(row.get("met") is False for row in rows))


def measure(endpoints: int, tokens: int, config: str, *, requests: int, rounds: int, keep: bool) -> dict[str, object]:
    """One cell of the table."""
    rng = random.Random(endpoints * 1_000_003 + tokens)
    world = World(endpoints, config, rng, keep=keep)
    bodies = Bodies(tokens, rng)
    for _ in range(min(requests, 4 * endpoints)):  # a pool in full swing: everyone has work and something cached
        world.decide(bodies.next())
    percentiles = []
    gc.collect()
    gc.freeze()
    try:
        for _ in range(rounds):
            took_us = sorted(world.decide(bodies.next()) for _ in range(requests))
            percentiles.append((took_us[len(took_us) // 2], took_us[min(len(took_us) - 1, len(took_us) * 99 // 100)]))
    finally:
        gc.unfreeze()
    return {
        "endpoints": endpoints,
        "prompt_tokens": tokens,
        "p50_us": min(p50 for p50, _ in percentiles),
        "p99_us": min(p99 for _, p99 in percentiles),
        "hit": statistics.fmean(world.hits) if world.hits else 0.0,
    }


class Bodies:
    """Chat bodies of that many tokens: half a shared system prompt, half new."""

    def __init__(self, tokens: int, rng: random.Random) -> None:
        chars = tokens * TOKEN_CHARS
        self._rng = rng
        self._shared = [json.dumps(f"{rng.getrandbits(64):016x} " * (chars // 2 // 17)) for _ in range(SHARED_PROMPTS)]
        self._own_chars = chars - len(self._shared[0])

    def next(self) -> bytes:
        own = f"{self._rng.getrandbits(64):016x} " * (self._own_chars // 17 + 1)
        system = self._rng.choice(self._shared)
        messages = f'[{{"role":"system","content":{system}}},{{"role":"user","content":"{own}"}}]'
        return f'{{"model":"m","messages":{messages},"max_tokens":256,"stream":true}}'.encode()


class World:
    """A pool, its policy and its director; `decide` routes one request and lets the world go on."""

    def __init__(self, endpoints: int, config: str, rng: random.Random, *, keep: bool) -> None:
        clock = MonotonicClock()
        self._rng = rng
        self._datastore = Datastore(clock)
        self._policy = Policy(self._datastore, Registry(), clock, rng, allow_experimental=True)
        self._policy.apply(config, "--config")
        self._datastore.apply(
            [EndpointSpec(f"pod-{i}", Address(f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}", 8000)) for i in range(1, endpoints + 1)]
        )
        self._director = Director(
            self._datastore,
            self._policy.built.scheduler,
            self._policy.routes,
            Metrics(clock=clock),
            clock,
            resources=Resources(rng),
            outliers=Outliers(self._datastore, clock),
            decisions=Decisions(clock, KEPT_DECISIONS) if keep else None,
        )
        self._clock = clock
        self._running: deque[Exchange] = deque()
        self._running_max = endpoints * IN_FLIGHT_PER_ENDPOINT
        self._all = list(self._datastore.endpoints.values())
        self._serial = 0
        self.hits: list[float] = []
        for endpoint in self._all:
            self._scrape(endpoint)

    def decide(self, body: bytes) -> float:
        """Microseconds the decision took."""
        self._serial += 1
        headers = {
            ":path": "/v1/chat/completions",
            ":method": "POST",
            "content-type": "application/json",
            "x-request-id": str(self._serial),
        }
        request = LLMRequest(id=str(self._serial), path="/v1/chat/completions", headers=headers)
        started_s = self._clock.now_s()
        now: Callable[[], int] = time.perf_counter_ns
        before_ns = now()
        exchange = self._director.route(request, body, None, started_s)
        took_us = (now() - before_ns) / 1_000
        if request.prefix is not None and request.prompt_tokens:
            cached = request.prefix.matched_tokens.get(exchange.decision.endpoint.slot, 0)
            self.hits.append(cached / request.prompt_tokens)
        self._go_on(exchange)
        return took_us

    def _go_on(self, exchange: Exchange) -> None:
        exchange.response_headers(200, event_stream=True, served="", code_details="")
        exchange.response_chunk(b"data: {}\n\n")
        self._running.append(exchange)
        if len(self._running) > self._running_max:
            self._running.popleft().finish(complete=True)
        self._scrape(self._rng.choice(self._all))
        self._policy.tick()

    def _scrape(self, endpoint: Endpoint) -> None:
        rng = self._rng
        reading = Reading(
            waiting=float(rng.randrange(4)), running=float(rng.randrange(32)), kv_usage=rng.random(), kv_block_tokens=16, kv_blocks=20_000
        )
        sent_requests, sent_tokens = endpoint.sent_requests, endpoint.sent_tokens
        self._datastore.record_reading(endpoint, reading, sent_requests=sent_requests, sent_tokens=sent_tokens)


def _numbers(text: str) -> Sequence[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers, like 16,256") from None
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: numbers of at least 1 are needed")
    return found
