"""What frame numbers say, and that turns of reading are short and fair."""

from __future__ import annotations

import random
from array import array

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from epp.clock import VirtualClock
from epp.events.counts import Counts
from epp.events.feed import TURN_S, Feed
from epp.events.numbering import Numbering, Verdict
from epp.events.settings import EVENTS_PORT_LABEL, REPLAY_PORT_LABEL, EventSettings, bind_address, rank_of
from epp.types import Address, Changes, Endpoint, EndpointSpec


def heard(numbering: Numbering, *numbers: int) -> list[Verdict]:
    """Frames that came by the connection; each verdict is acted upon as subscribers do without a replay."""
    verdicts = []
    for number in numbers:
        payload = b"frame %d" % number
        verdict = numbering.judge(number, payload)
        verdicts.append(verdict)
        if verdict is Verdict.RESTARTED:
            numbering.restarted()
        numbering.came(number)
        if verdict is not Verdict.SEEN:
            numbering.passed(number, payload)
    return verdicts


NEXT, SEEN, LOST, RESTARTED = Verdict.NEXT, Verdict.SEEN, Verdict.LOST, Verdict.RESTARTED


@pytest.mark.parametrize(
    ("numbers", "verdicts"),
    [
        ((0, 1, 2), [NEXT, NEXT, NEXT]),
        ((5, 6), [LOST, NEXT]),
        ((0, 3, 4), [NEXT, LOST, NEXT]),
        ((0, 1, 1, 2), [NEXT, NEXT, SEEN, NEXT]),
        ((0, 1, 2, 0, 1), [NEXT, NEXT, NEXT, RESTARTED, NEXT]),
        ((7, 8, 3), [LOST, NEXT, RESTARTED]),
        (((1 << 64) - 1, 0), [LOST, RESTARTED]),
    ],
)
def test_frames_of_one_connection(numbers: tuple[int, ...], verdicts: list[Verdict]) -> None:
    assert heard(Numbering(), *numbers) == verdicts


def test_the_same_number_with_another_content_is_another_process() -> None:
    numbering = Numbering()
    heard(numbering, 0)
    assert numbering.judge(0, b"other") is RESTARTED


def test_another_connection_sends_nothing_twice() -> None:
    numbering = Numbering()
    heard(numbering, 0, 1, 2)
    numbering.connected()
    assert numbering.judge(2, b"frame 2") is RESTARTED
    assert numbering.judge(3, b"frame 3") is NEXT
    assert numbering.judge(5, b"frame 5") is LOST
    assert numbering.lost(5) == 2


def test_a_replay_asks_for_the_last_frame_again_to_see_that_it_is_the_same() -> None:
    numbering = Numbering()
    assert numbering.replay_from == 0
    heard(numbering, 0, 1, 2)
    assert numbering.replay_from == 2
    assert numbering.judge_replayed(2, b"frame 2") is SEEN
    assert numbering.judge_replayed(2, b"other") is RESTARTED
    assert numbering.judge_replayed(1, b"older than asked for") is SEEN
    assert numbering.judge_replayed(3, b"frame 3") is NEXT
    assert numbering.judge_replayed(5, b"frame 5") is LOST


def test_only_what_a_replay_brought_may_come_again() -> None:
    numbering = Numbering()
    heard(numbering, 0, 1, 2)
    numbering.connected()
    for number in (3, 4, 5):
        numbering.passed(number, b"frame %d" % number)
    numbering.replayed(2)
    assert heard(numbering, 4, 5, 6) == [SEEN, SEEN, NEXT]
    numbering.connected()
    numbering.replayed(7)
    assert numbering.judge(3, b"frame 3") is RESTARTED, "a replay that brought nothing covers nothing"


def digests(*numbers: int) -> array[int]:
    return array("Q", (xxhash.xxh3_64_intdigest(b"frame %d" % number) for number in numbers))


def mended(first: int, last: int, *known: int) -> Numbering:
    """By the shared backend, with the digests of the last ones."""
    numbering = Numbering()
    numbering.connected()
    for number in range(first, last + 1):
        numbering.passed(number, b"frame %d" % number)
    numbering.mended(first, known[0], digests(*known))
    return numbering


def test_what_others_heard_may_come_again_if_it_is_the_same() -> None:
    assert heard(mended(0, 9, *range(5, 10)), 5, 6, 9, 10) == [SEEN, SEEN, SEEN, NEXT]
    assert mended(0, 9, *range(5, 10)).judge(6, b"other") is RESTARTED
    assert mended(0, 9, *range(5, 10)).judge(9, b"other") is RESTARTED
    assert mended(0, 9, *range(5, 10)).judge(2, b"frame 2") is RESTARTED, "published long before we came"


def test_where_others_heard_nothing_either_there_is_nothing_to_compare() -> None:
    numbering = mended(0, 3, *range(4))
    numbering.passed(6, b"frame 6")
    numbering.mended(0, 0, array("Q", [*digests(0, 1, 2, 3), 0, 0, *digests(6)]))
    assert numbering.judge(4, b"whatever") is SEEN
    assert numbering.judge(3, b"whatever") is RESTARTED


def test_what_a_replay_brings_beside_is_the_engines_own() -> None:
    numbering = mended(3, 9, *range(3, 10))
    for number in (10, 11):
        numbering.passed(number, b"frame %d" % number)
    numbering.replayed(9)
    assert heard(numbering, 4, 9, 10, 11, 12) == [SEEN, SEEN, SEEN, SEEN, NEXT]
    assert numbering.judge(3, b"frame 3") is RESTARTED, "it went back"


@given(st.lists(st.integers(0, 30), max_size=60))
def test_whatever_comes_every_frame_that_is_taken_is_the_next_one_or_a_break_was_told(numbers: list[int]) -> None:
    numbering, taken = Numbering(), -1
    for number in numbers:
        verdict = heard(numbering, number)[0]
        if verdict is NEXT:
            assert number == taken + 1
        elif verdict is LOST:
            assert number > taken + 1
        elif verdict is RESTARTED:
            assert number <= taken
        if verdict is not SEEN:
            taken = number


# Turns


class Worker:
    """So many steps to do, each of so many seconds of the clock."""

    def __init__(self, clock: VirtualClock, steps: int, step_s: float) -> None:
        self.clock = clock
        self.left = steps
        self.done = 0
        self._step_s = step_s

    def step(self) -> bool:
        if not self.left:
            return False
        self.left -= 1
        self.done += 1
        self.clock.advance(self._step_s)
        return True


def test_a_turn_is_short_whatever_there_is_to_do() -> None:
    clock = VirtualClock()
    feed = Feed(clock)
    feed.offer(Worker(clock, 1_000_000, 0.1e-3))
    began_s = clock.now_s()
    assert feed.once()
    assert clock.now_s() - began_s <= TURN_S + 0.1e-3


def test_one_that_floods_delays_no_other() -> None:
    clock = VirtualClock()
    feed, flood = Feed(clock), Worker(clock, 1_000_000, 0.1e-3)
    feed.offer(flood)
    others = [Worker(clock, 3, 0.1e-3) for _ in range(20)]
    for each in others:
        feed.offer(each)
        feed.offer(each)
    assert len(feed) == 21
    turns = 0
    while any(each.left for each in others):
        feed.once()
        turns += 1
    assert turns <= 21 * 3 * 0.1e-3 / TURN_S + 1
    assert flood.done <= 4


def test_done_is_done_until_it_is_offered_again() -> None:
    clock = VirtualClock()
    feed, worker = Feed(clock), Worker(clock, 1, 0.0)
    feed.offer(worker)
    assert not feed.once()
    assert len(feed) == 0
    worker.left = 2
    feed.offer(worker)
    assert not feed.once()
    assert worker.done == 3


# Settings


def endpoint(name: str, **labels: str) -> Endpoint:
    return Endpoint(EndpointSpec(name, Address("10.0.0.1", 8000), labels=labels), 0, Changes())


@pytest.mark.parametrize(
    ("name", "rank"), [("a", 0), ("a-rank-0", 0), ("a-rank-3", 3), ("a-rank-3-8003", 3), ("a-rank-x", 0), ("rank-2", 0)]
)
def test_the_rank_is_in_the_name(name: str, rank: int) -> None:
    assert rank_of(endpoint(name)) == rank
    settings = EventSettings(replay_port=6557)
    assert settings.address(endpoint(name), 0) == Address("10.0.0.1", 5557 + rank)
    assert settings.replay_address(endpoint(name), 1) == Address("10.0.0.1", 6557 + rank + 1)


def test_an_endpoint_may_have_ports_of_its_own_or_none() -> None:
    own = Endpoint(EndpointSpec("a-rank-2", Address("::1", 1), labels={EVENTS_PORT_LABEL: "7000", REPLAY_PORT_LABEL: "7100"}), 0, Changes())
    assert EventSettings().address(own, 1) == Address("::1", 7001)
    assert EventSettings().replay_address(own, 0) == Address("::1", 7100)
    odd = Endpoint(EndpointSpec("a", Address("::1", 1), labels={EVENTS_PORT_LABEL: "000001" + "0" * 5_000}), 0, Changes())
    assert EventSettings().address(odd, 0) == Address("::1", 5557), "no port: as if nothing was said"
    assert EventSettings(socket_port=0).address(endpoint("a"), 0) is None
    assert EventSettings().replay_address(endpoint("a"), 0) is None
    bad = Endpoint(EndpointSpec("a", Address("::1", 1), labels={EVENTS_PORT_LABEL: "99999999999"}), 0, Changes())
    assert EventSettings().address(bad, 0) == Address("::1", 5557)


@pytest.mark.parametrize(
    ("text", "address"),
    [("tcp://*:5557", (None, 5557)), ("tcp://0.0.0.0:1", ("0.0.0.0", 1)), ("tcp://[::1]:0", ("::1", 0)), ("tcp://[::]:9", ("::", 9))],
)
def test_where_to_listen(text: str, address: tuple[str | None, int]) -> None:
    assert bind_address(text) == address


@pytest.mark.parametrize("text", ["5557", "tcp://*", "ipc:///tmp/x", "tcp://*:70000", "tcp://*:1/x", "tcp://[::1:2"])
def test_what_is_no_place_to_listen_says_so(text: str) -> None:
    with pytest.raises(ValueError, match="not an address to listen on"):
        EventSettings(bind=text)


@pytest.mark.parametrize("wrong", [{"socket_port": 65_535, "ranks": 2}, {"replay_port": -1}, {"ranks": 0}, {"replays_max": 0}])
def test_wrong_settings_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="|".join(wrong)):
        EventSettings(**wrong)  # type: ignore[arg-type]


def test_counts_under_the_names_dashboards_know() -> None:
    counts = Counts()
    rng = random.Random(1)
    counts.messages = rng.randrange(1_000)
    counts.zmq_errors["connect"] = 3
    counts.skipped["kind"] = 2
    index = {"stored": 9, "skipped_parent": 4, "removed_unknown": 5, "removed": 6}
    families = {each.name: each for each in counts.families(pending=1, capacity=2, untrusted=3, index=index)}
    prefix = "llm_d_epp_kv_cache_events_"
    assert families[prefix + "messages_received_total"].values == [((), float(counts.messages))]
    assert families[prefix + "zmq_errors_total"].values == [(("connect",), 3.0)]
    assert dict(families[prefix + "stores_skipped_total"].values) == {("", "parent"): 4.0, ("", "kind"): 2.0}
    assert dict(families[prefix + "removals_skipped_total"].values) == {("", "unknown"): 5.0}
    assert families[prefix + "pool_queue_depth"].values == [((), 1.0)]
    assert len(families) == len({name.lower() for name in families})
