"""The product as a policy: its own pool, configuration, director and exchanges, driven as its server and its scraper drive them.

Nothing of it is rebuilt here. A request comes with its bytes (each trace block's id spelled out in 2 048 bytes, so that its own hashing
finds what is shared) and its true length in tokens; the length of the answer is not told. Readings arrive when a scrape would bring them,
with the counts of what was sent before it was asked.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Iterator

from bench.replay.engine import Gauges
from bench.replay.job import BLOCK_TOKENS, Job
from bench.replay.policy import RejectedError
from bench.replay.profiles import Profile
from epp.clock import VirtualClock
from epp.datastore import Datastore, Reading
from epp.director import Director
from epp.errors import EppError
from epp.exchange import Exchange
from epp.observe.metrics import Metrics
from epp.outliers import Outliers
from epp.plugins.registry import Registry
from epp.policy import Policy
from epp.resources import Resources
from epp.types import TOKEN_BYTES, Address, Endpoint, EndpointSpec, LLMRequest

PATH = "/v1/chat/completions"
MODEL = "model"
KV_BLOCK_TOKENS = 16
START_S = 1_000.0
"""The clock's time at 0: clocks never start there in production."""
TICK_S = 0.1
REFUSED = "upstream_reset_before_response_started{connection_failure}"
LOST = "upstream_reset_before_response_started{connection_termination}"
CHUNK = b'data: {"choices":[{"index":0,"delta":{"content":"x"}}]}\n\n'
ID_BYTES = 8


class ProductPolicy:
    """See the module. One configuration in service."""

    scrapes = True

    def __init__(
        self, config: str, source: str, profile: Profile, rng: random.Random, *, adapters_max: int = 0, usage: bool = False
    ) -> None:
        """`usage`: answers end with token counts, as when clients ask for them (`stream_options.include_usage`)."""
        self._profile = profile
        self._adapters_max = adapters_max
        self._usage = usage
        self._clock = VirtualClock(START_S)
        self._datastore = Datastore(self._clock)
        self._policy = Policy(self._datastore, Registry(), self._clock, rng, allow_experimental=True)
        self._policy.apply(config, source)
        self._outliers = Outliers(self._datastore, self._clock)
        self._resources = Resources(rng)
        self._director = Director(
            self._datastore,
            self._policy.built.scheduler,
            self._policy.routes,
            Metrics(clock=self._clock),
            self._clock,
            resources=self._resources,
            outliers=self._outliers,
        )
        self._endpoints: dict[int, Endpoint] = {}
        self._replica_of: dict[Address, int] = {}
        self._exchanges: dict[Job, Exchange] = {}
        self._ticked_s = START_S
        self._headers = {":path": PATH, ":method": "POST", "content-type": "application/json"}

    def joined(self, replica: int, now_s: float) -> None:
        self._at(now_s)
        self._replica_of[_address(replica)] = replica
        self._pool()
        self._endpoints[replica] = self._datastore.endpoints[_address(replica)]

    def left(self, replica: int, now_s: float) -> None:
        self._at(now_s)
        del self._replica_of[_address(replica)], self._endpoints[replica]
        self._pool()

    def asked(self, replica: int, now_s: float) -> object:
        del now_s
        endpoint = self._endpoints[replica]
        return endpoint, endpoint.sent_requests, endpoint.sent_tokens

    def read(self, replica: int, gauges: Gauges | None, asked: object, now_s: float) -> None:
        assert isinstance(asked, tuple)
        asked_of, sent_requests, sent_tokens = asked
        endpoint = self._endpoints.get(replica)
        if endpoint is None or endpoint is not asked_of:
            return
        self._at(now_s)
        if gauges is None:
            endpoint.scrape_failures += 1
            self._datastore.set_healthy(endpoint, healthy=False)  # a refused connection is certain
            return
        reading = Reading(
            waiting=gauges.waiting,
            running=gauges.running,
            kv_usage=gauges.kv_usage,
            kv_block_tokens=KV_BLOCK_TOKENS,
            kv_blocks=(gauges.kv_tokens or self._profile.kv_tokens) // KV_BLOCK_TOKENS,
        )
        if self._adapters_max:
            reading = reading._replace(
                adapters_active=gauges.adapters_active, adapters_waiting=gauges.adapters_waiting, adapters_max=self._adapters_max
            )
        self._datastore.record_reading(endpoint, reading, sent_requests=sent_requests, sent_tokens=sent_tokens)

    def route(self, job: Job, now_s: float) -> int:
        self._at(now_s)
        self._tick()
        try:
            exchange = self._director.route(self.request_of(job), None, None, self._clock.now_s())
        except EppError as error:
            raise RejectedError from error
        self._exchanges[job] = exchange
        return self._replica_of[exchange.decision.endpoint.spec.address]

    def _tick(self) -> None:
        if self._clock.now_s() - self._ticked_s >= TICK_S:
            self._ticked_s = self._clock.now_s()
            self._policy.tick()
            self._outliers.tick()

    def request_of(self, job: Job) -> LLMRequest:
        """As it is once it is understood."""
        request = LLMRequest(id=str(job.index), path=PATH, headers=self._headers)
        request.model = request.target_model = job.adapter or MODEL
        request.stream = job.streamed
        request.prompt = prompt_of(job)
        request.prompt_tokens = job.prompt_tokens
        return request

    def first_token(self, job: Job, now_s: float) -> None:
        self._at(now_s)
        exchange = self._exchanges[job]
        exchange.response_headers(200, event_stream=True, served="", code_details="via_upstream")
        exchange.response_chunk(CHUNK)

    def finished(self, job: Job, now_s: float) -> None:
        self._at(now_s)
        exchange = self._exchanges.pop(job)
        if not job.error:
            if not job.streamed:
                exchange.response_headers(200, event_stream=False, served="", code_details="via_upstream")
                exchange.response_chunk(b"{%s}" % _usage(job))
            elif self._usage:
                exchange.response_chunk(b'data: {"choices":[],%s}\n\ndata: [DONE]\n\n' % _usage(job))
            exchange.finish(complete=True)
        elif job.first_token_s >= 0 and job.streamed:  # it broke off
            exchange.finish(complete=False)
        else:
            status, details = (500, "via_upstream") if job.error == "status 500" else (503, REFUSED if job.error == "refused" else LOST)
            if job.error == "status 400":
                status, details = 400, "via_upstream"
            exchange.response_headers(status, event_stream=False, served="", code_details=details)
            exchange.finish(complete=True)

    def _at(self, now_s: float) -> None:
        self._clock.advance(now_s + START_S - self._clock.now_s())

    def _pool(self) -> None:
        self._datastore.apply([EndpointSpec(f"replica-{replica}", address) for address, replica in self._replica_of.items()])


def _address(replica: int) -> Address:
    return Address(f"10.0.{replica >> 8}.{replica & 255}", 8000)


def prompt_of(job: Job) -> bytes:
    """Bytes that are equal where the blocks are, and nowhere else."""
    repeats = BLOCK_TOKENS * TOKEN_BYTES // ID_BYTES
    whole = b"".join([block.to_bytes(ID_BYTES, "little") * repeats for block in job.offered])
    return whole[: job.prompt_tokens * TOKEN_BYTES]


def _usage(job: Job) -> bytes:
    cached = max(0, job.cached_tokens)
    counts = f'"prompt_tokens":{job.prompt_tokens},"completion_tokens":{job.output_tokens}'
    return f'"usage":{{{counts},"prompt_tokens_details":{{"cached_tokens":{cached}}}}}'.encode()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What the product logs of ejections and configurations is not the bench's output."""
    logger = logging.getLogger("epp")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
