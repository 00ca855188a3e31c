"""A slice of the fuzzing in every test run: the seeds, which begin with every input that ever found a bug, then mutations of them for a
while. `make fuzz` is the whole."""

from __future__ import annotations

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epp.extproc import codec
from epp.extproc.messages import Event
from tests.builders import chat, core, request_body, request_headers, response_body, response_headers
from tests.fuzz import mutate, seeds, targets
from tests.fuzz.targets import RAW, step

SLICE_S = 20.0
INPUTS_MIN = 1_000
"""A target that manages fewer in its share of the time is not fuzzed but stuck."""


@pytest.mark.parametrize("target", targets.TARGETS)
def test_nothing_a_seed_says_is_a_bug(target: str) -> None:
    known = seeds.load(target)
    assert len(known) >= len(seeds.SEEDS[target])
    with targets.loud():
        for data in known:
            targets.TARGETS[target](data)


@pytest.mark.parametrize("target", targets.TARGETS)
def test_the_seeds_are_those_that_are_described(target: str) -> None:
    folder = seeds.FOLDER / target
    stale = [name for name, data in seeds.SEEDS[target].items() if (folder / name).read_bytes() != data]
    assert not stale, "run python -m tests.fuzz.seeds"


@pytest.mark.parametrize("target", targets.TARGETS)
def test_no_mutation_of_a_seed_is_a_bug(target: str) -> None:
    feed, done = targets.TARGETS[target], 0
    deadline_s = time.monotonic() + SLICE_S / len(targets.TARGETS)
    rng = random.Random(1)  # the same inputs every time
    with targets.loud():
        for data in mutate.mutations(seeds.load(target), rng):
            try:
                feed(data)
            except Exception as error:
                raise AssertionError(f"an input of {target}, to be kept under {seeds.FOLDER / target}: {data!r}") from error
            done += 1
            if not done % 50 and time.monotonic() > deadline_s:
                break
    assert done >= INPUTS_MIN


def test_the_inputs_reach_decisions_and_refusals_alike() -> None:
    """A fuzzer that only ever meets the front door finds nothing."""
    targets._world.inputs = 0  # a pool of its own
    with targets.loud():
        for data in seeds.load("session") * 3:
            targets.session(data)
    world = targets._world._core
    assert world is not None
    assert world.metrics.series("m", "m").requests > 10
    assert world.metrics.series("m", "t").requests >= 3
    assert world.metrics.series("m", "m").output_tokens.sum > 0
    assert world.metrics.series("", "").errors["RequestTimeout"] == 3


def test_an_error_that_the_client_would_not_see_is_not_overlooked() -> None:
    """The session turns its own bugs into answers: the harness must tell."""
    world = core()

    class Broken:
        def keep(self, _request: object, _endpoints: object) -> list[object]:
            raise RuntimeError("a plugin's bug")

    world.built.scheduler._only._filters = (Broken(),)
    session = world.session()
    session.receive(codec.decode(request_headers().SerializeToString()))
    with targets.loud(), pytest.raises(AssertionError, match="unexpected error"):
        session.receive(codec.decode(request_body(chat(), end_of_stream=True).SerializeToString()))


VALID = [
    message.SerializeToString()
    for message in (
        request_headers(filter_metadata={"envoy.lb.subset_hint": {"x-gateway-destination-endpoint-subset": ["10.0.0.1", "x"]}}),
        request_body(chat(), end_of_stream=True),
        response_headers(served="10.0.0.2:8000", upstream_address="10.0.0.3:8000", code_details="via_upstream"),
        response_body(b'data: {"usage":{"prompt_tokens":3}}\n\n', end_of_stream=True),
    )
]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A valid message with some of it replaced, left out or repeated."""
    data = draw(st.sampled_from(VALID))
    at, to = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
    return data[:at] + draw(st.one_of(st.binary(max_size=8), st.just(data[at:to] * 2))) + data[to if draw(st.booleans()) else at :]


@settings(deadline=None, max_examples=400)
@given(st.one_of(st.binary(max_size=300), mutated()))
def test_bytes_are_an_event_or_malformed(data: bytes) -> None:
    try:
        event = codec.decode(data)
    except codec.MalformedMessageError:
        return
    assert isinstance(event, Event)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.one_of(st.binary(max_size=100), mutated(), st.sampled_from(VALID)), max_size=8))
def test_messages_are_answered_or_malformed(messages: list[bytes]) -> None:
    with targets.loud():
        targets.session(b"".join(step(RAW, 0, message) for message in messages))
