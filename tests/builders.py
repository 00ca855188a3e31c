"""What many tests need: a picker's deciding core without sockets, and the messages a gateway sends.

Everything here is the real thing put together; nothing is mocked. Time is virtual, randomness is seeded.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from google.protobuf import json_format

from epp._pb import epp_ext_proc_pb2 as pb
from epp.clock import VirtualClock
from epp.datastore import Datastore, Reading
from epp.decisions import Decisions
from epp.director import Director
from epp.extproc import codec
from epp.extproc.messages import BodyMode
from epp.extproc.session import Limits, Session
from epp.observe.metrics import Metrics
from epp.outliers import Outliers
from epp.plugins.registry import Registry
from epp.policy import Policy
from epp.pools import Pools
from epp.resources import Resources
from epp.scheduling.build import Built
from epp.types import Address, Endpoint, EndpointSpec, LLMRequest

DESTINATION = "x-gateway-destination-endpoint"
PATH = "/v1/chat/completions"
LLM_D = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\nprofile: llm-d\n"
"""For tests that need to know who wins: queue-scorer 2, kv-cache-utilization-scorer 2, prefix-cache-scorer 3."""
FULL_DUPLEX = (BodyMode.FULL_DUPLEX_STREAMED, BodyMode.FULL_DUPLEX_STREAMED)


def spec(number: int, *, host: str = "", port: int = 8000) -> EndpointSpec:
    """The endpoint `pod-<number>`, at 10.0.0.<number> unless told otherwise."""
    return EndpointSpec(name=f"pod-{number}", address=Address(host or f"10.0.0.{number}", port))


def pool_of(*states: Mapping[str, float]) -> list[Endpoint]:
    """Endpoints of one pool, slots from 0 up, each with some of its state set."""
    datastore = Datastore(VirtualClock(1000.0))
    datastore.apply([spec(number + 1) for number in range(len(states))])
    made = list(datastore.endpoints.values())
    for each, state in zip(made, states, strict=True):
        for name, value in state.items():
            setattr(each, name, value)
    return made


def llm_request(**values: object) -> LLMRequest:
    request = LLMRequest(id="r", path=PATH, headers={})
    for name, value in values.items():
        setattr(request, name, value)
    return request


@dataclass
class Core:
    """Pool, scheduler, director and limits, as the composition root puts them together."""

    clock: VirtualClock
    datastore: Datastore
    policy: Policy
    resources: Resources
    outliers: Outliers
    metrics: Metrics
    director: Director
    limits: Limits
    sessions: list[Session] = field(default_factory=list)

    @property
    def built(self) -> Built:
        return self.policy.built

    def use(self, config: str) -> None:
        """Another configuration takes over."""
        self.policy.apply(config, "test")
        self.director.use(self.policy.built.scheduler, self.policy.routes)

    def session(self, _authority: bytes = b"", *, pool: str = "") -> Session:
        made = Session(self.director, self.limits, self.clock, pool)
        self.sessions.append(made)
        return made

    def endpoint(self, number: int) -> Endpoint:
        return next(e for e in self.datastore.endpoints.values() if e.name == f"pod-{number}")

    def read(self, number: int, **reading: float) -> None:
        """A scrape of `pod-<number>` came back."""
        each = self.endpoint(number)
        sent = {"sent_requests": each.sent_requests, "sent_tokens": each.sent_tokens}
        self.datastore.record_reading(each, Reading(**reading), **sent)  # type: ignore[arg-type]

    @property
    def inflight(self) -> tuple[int, int, int, int]:
        """Requests and tokens charged to endpoints, requests counted as running, bytes held: all 0 when nothing is going on."""
        endpoints = self.datastore.endpoints.values()
        return (
            sum(e.inflight_requests for e in endpoints),
            sum(e.inflight_tokens for e in endpoints),
            sum(series.running for series in self.metrics._series.values()),
            self.limits.buffered_bytes,
        )

    def errors(self, model: str) -> dict[str, int]:
        return dict(self.metrics.series(model, model).errors)


def core(
    endpoints: int | Sequence[EndpointSpec] = 1,
    *,
    config: str = "",
    body_bytes_max: int = 64 << 20,
    buffered_bytes_max: int = 1 << 30,
    unknown_paths_ok: bool = False,
    subset_filter: bool = True,
    test_headers: bool = False,
    emit_scores: bool = False,
    pools: Pools | None = None,
) -> Core:
    clock = VirtualClock(1000.0)
    datastore = Datastore(clock, pools=[pool.name for pool in pools] if pools else ())
    datastore.apply([spec(number + 1) for number in range(endpoints)] if isinstance(endpoints, int) else endpoints)
    policy = Policy(datastore, Registry(), clock, random.Random(7), unknown_paths_ok=unknown_paths_ok, allow_experimental=True)
    policy.apply(config, "test")
    resources = Resources(random.Random(8))
    outliers = Outliers(datastore, clock)
    metrics = Metrics(clock=clock, pool=datastore)
    limits = Limits(body_bytes_max, buffered_bytes_max, lambda name: metrics.limit_hits.__setitem__(name, metrics.limit_hits[name] + 1))
    director = Director(
        datastore,
        policy.built.scheduler,
        policy.routes,
        metrics,
        clock,
        resources=resources,
        outliers=outliers,
        pools=pools,
        subset_filter=subset_filter,
        test_headers=test_headers,
        decisions=Decisions(clock, 16),
        emit_scores=emit_scores,
    )
    return Core(clock, datastore, policy, resources, outliers, metrics, director, limits)


# The messages a gateway sends.


def chat(prompt: str = "hello", *, model: str = "m", **fields: object) -> bytes:
    return json.dumps({"model": model, "messages": [{"role": "user", "content": prompt}], **fields}).encode()


def chat_of(size: int) -> bytes:
    """A chat body of exactly `size` bytes, no two places of it alike."""
    empty = len(chat(""))
    text = "".join(f"{number:07x} " for number in range((size - empty) // 8 + 1))
    return chat(text[: size - empty])


def _header_map(headers: Mapping[str, str | bytes]) -> pb.HeaderMap:
    return pb.HeaderMap(
        headers=[pb.HeaderValue(key=key, raw_value=value if isinstance(value, bytes) else value.encode()) for key, value in headers.items()]
    )


def metadata(value: Mapping[str, object]) -> pb.Metadata:
    """`{"namespace": {...}}` as filter metadata."""
    return json_format.ParseDict({"filterMetadata": value}, pb.Metadata())


def request_headers(
    *,
    path: str = PATH,
    end_of_stream: bool = False,
    modes: tuple[BodyMode, BodyMode] | None = FULL_DUPLEX,
    headers: Mapping[str, str | bytes] | None = None,
    filter_metadata: Mapping[str, object] | None = None,
    body_unasked: bool = False,
) -> pb.ProcessingRequest:
    """As Envoy sends them. `modes`: request and response body mode, None for a peer that does not say."""
    everything = {":method": "POST", ":path": path, "content-type": "application/json", "x-request-id": "id-1", **(headers or {})}
    message = pb.ProcessingRequest(request_headers=pb.HttpHeaders(headers=_header_map(everything), end_of_stream=end_of_stream))
    if modes is not None:
        config = pb.ProtocolConfiguration(
            request_body_mode=int(modes[0]),
            response_body_mode=int(modes[1]),
            send_body_without_waiting_for_header_response=body_unasked,
        )
        message.protocol_config.CopyFrom(config)
    if filter_metadata is not None:
        message.metadata_context.CopyFrom(metadata(filter_metadata))
    return message


def request_body(body: bytes = b"", *, end_of_stream: bool = False) -> pb.ProcessingRequest:
    return pb.ProcessingRequest(request_body=pb.HttpBody(body=body, end_of_stream=end_of_stream))


def request_trailers() -> pb.ProcessingRequest:
    return pb.ProcessingRequest(request_trailers=pb.HttpTrailers())


def response_headers(
    status: int = 200,
    *,
    content_type: str = "application/json",
    served: str = "",
    upstream_address: str = "",
    code_details: str = "",
    end_of_stream: bool = False,
    headers: Mapping[str, str] | None = None,
) -> pb.ProcessingRequest:
    sent = _header_map({":status": str(status), "content-type": content_type, **(headers or {})})
    message = pb.ProcessingRequest(response_headers=pb.HttpHeaders(headers=sent, end_of_stream=end_of_stream))
    if served:
        message.metadata_context.CopyFrom(metadata({"envoy.lb": {f"{DESTINATION}-served": served}}))
    attributes = {"upstream.address": upstream_address, "response.code_details": code_details}
    attributes = {name: value for name, value in attributes.items() if value}
    if attributes:
        message.attributes["envoy.filters.http.ext_proc"].update(attributes)
    return message


def response_body(body: bytes = b"", *, end_of_stream: bool = False) -> pb.ProcessingRequest:
    return pb.ProcessingRequest(response_body=pb.HttpBody(body=body, end_of_stream=end_of_stream))


def response_trailers() -> pb.ProcessingRequest:
    return pb.ProcessingRequest(response_trailers=pb.HttpTrailers())


def pieces(body: bytes, size: int) -> list[bytes]:
    return [body[at : at + size] for at in range(0, len(body), size)]


class Stream:
    """One ext_proc stream on the wire's terms, without the wire: serialized requests in, parsed responses out."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.got: list[pb.ProcessingResponse] = []

    def send(self, *messages: pb.ProcessingRequest) -> list[pb.ProcessingResponse]:
        """Replies to these messages; `got` keeps all of them."""
        replies = []
        for message in messages:
            answers = self.session.receive(codec.decode(message.SerializeToString()))
            replies += [pb.ProcessingResponse.FromString(codec.encode(reply)) for reply in answers]
        self.got += replies
        return replies

    def half_close(self) -> list[pb.ProcessingResponse]:
        replies = [pb.ProcessingResponse.FromString(codec.encode(reply)) for reply in self.session.half_closed()]
        self.got += replies
        return replies

    def resume(self) -> list[pb.ProcessingResponse]:
        """Replies to a request that waited, as its transport would ask for them."""
        replies = [pb.ProcessingResponse.FromString(codec.encode(reply)) for reply in self.session.resumed()]
        self.got += replies
        return replies

    def close(self) -> None:
        self.session.closed()


def kinds(responses: Iterable[pb.ProcessingResponse]) -> list[str]:
    return [response.WhichOneof("response") for response in responses]


def set_headers(response: pb.ProcessingResponse) -> dict[str, bytes]:
    """Headers a response sets; from whichever part of it can."""
    kind = response.WhichOneof("response")
    part = getattr(response, kind)
    mutation = part.headers if kind == "immediate_response" else part.response.header_mutation
    return {option.header.key: option.header.raw_value for option in mutation.set_headers}


def echoed(responses: Iterable[pb.ProcessingResponse], kind: str = "request_body") -> bytes:
    """The body handed back."""
    return b"".join(
        getattr(response, kind).response.body_mutation.streamed_response.body
        for response in responses
        if response.WhichOneof("response") == kind
    )


def ends(responses: Iterable[pb.ProcessingResponse], kind: str = "request_body") -> list[bool]:
    """`end_of_stream` of each piece of body handed back."""
    return [
        getattr(response, kind).response.body_mutation.streamed_response.end_of_stream
        for response in responses
        if response.WhichOneof("response") == kind
    ]


def destination_of(response: pb.ProcessingResponse) -> str:
    return set_headers(response)[DESTINATION].decode()
