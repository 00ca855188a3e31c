"""The replay: workloads, the simulation around the engines, the product in it, rows."""

import dataclasses
import json
import math

import pytest

from bench import BenchError
from bench.replay import cells, trace
from bench.replay.baselines import BASELINES
from bench.replay.baselines.load import RoundRobin
from bench.replay.cells import Cell, Settings, configured, play, row_of, run_all
from bench.replay.job import BLOCK_TOKENS, Job
from bench.replay.product import prompt_of
from bench.replay.profiles import profile_of
from bench.replay.scenarios import SCENARIOS, Setting
from bench.replay.simulation import Result, Scrapes, Simulation, Stay, engines_of
from bench.replay.stats import imbalance
from bench.replay.workload import Arrival, Incident, Workload

KEYS = {
    "policy", "rate", "seed", "ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "tpot_p90_s", "e2e_mean_s", "hit_rate", "goodput", "errors",
    "imbalance",
}  # fmt: skip
SMALL = Settings(replicas=4)
PROFILE = profile_of(SMALL.profile)
EPP = configured("epp-223")


@pytest.fixture
def workload(monkeypatch):
    """Puts workloads where scenarios are looked up."""

    def put(made: Workload) -> str:
        monkeypatch.setitem(SCENARIOS, "made", lambda _setting: made)
        return "made"

    return put


def written(path, requests):
    """So many requests in 3-second ticks, three families of prefixes."""
    lines = []
    for number in range(requests):
        family, length = number % 3, 2_000 + 37 * (number % 60)
        ids = [family * 1_000 + place if place < 3 else 10_000 + number * 100 + place for place in range(-(-length // 512))]
        lines.append({"timestamp": number // 6 * 3_000, "input_length": length, "output_length": 20 + number % 60, "hash_ids": ids})
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


@pytest.fixture
def trace_file(tmp_path):
    return written(tmp_path / "trace.jsonl", 60)


def chats(count: int, gap_s: float = 0.4) -> Workload:
    """Two turns each, the second one 20 s later."""
    arrivals = []
    for number in range(count):
        blocks = tuple(range(100 * number, 100 * number + 12))
        arrivals.append(Arrival(number * gap_s, 3_000, 60, blocks[:6]))
        arrivals.append(Arrival(number * gap_s + 20, 6_000, 60, blocks))
    return Workload("made", sorted(arrivals, key=lambda arrival: arrival.at_s))


# traces


def test_a_trace_is_read(trace_file):
    arrivals = trace.read(trace_file)
    assert (len(arrivals), len(trace.read(trace_file, 7))) == (60, 7)
    assert arrivals[7] == Arrival(3.0, 2_259, 27, (1_000, 1_001, 1_002, 10_703, 10_704))


def test_ticks_are_found_and_spread(trace_file):
    arrivals = trace.read(trace_file)
    assert trace.tick_s(arrivals) == 3.0
    raw = trace.workload("trace", arrivals, jitter=False, seed=1)
    jittered = [trace.workload("trace", arrivals, jitter=True, seed=seed) for seed in (1, 1, 2)]
    assert raw.arrivals == arrivals
    assert jittered[0].arrivals == jittered[1].arrivals != jittered[2].arrivals
    ticks = sorted(math.floor(arrival.at_s / 3.0) * 3.0 for arrival in jittered[0].arrivals)
    assert ticks == [arrival.at_s for arrival in arrivals]
    assert len({arrival.at_s for arrival in jittered[0].arrivals}) == 60


def test_fine_times_are_left_alone():
    arrivals = [Arrival(0.31 * number, 100, 1, (number,)) for number in range(50)]
    assert trace.tick_s(arrivals) == 0.0
    assert trace.workload("trace", arrivals, jitter=True, seed=1).arrivals == arrivals


def test_smaller_blocks_are_put_together(tmp_path):
    path = tmp_path / "small.jsonl"
    path.write_text(json.dumps({"timestamp": 5, "input_length": 1_100, "output_length": 0, "hash_ids": list(range(5))}))
    (arrival,) = trace.read(path, block_tokens=256)
    assert arrival == Arrival(0.0, 1_100, 0, (1, 3, 4))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"timestamp": 0, "input_length": 1024, "output_length": 1, "hash_ids": [1]}', "2 blocks of 512"),
        ('{"timestamp": 0, "input_length": 0, "output_length": 1, "hash_ids": []}', "at least 1"),
        ('{"timestamp": 0, "input_length": 1}', "not a Mooncake trace"),
        ("hello", "not a Mooncake trace"),
        ("", "no requests"),
    ],
)
def test_a_trace_that_is_none_is_refused(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(BenchError, match=message):
        trace.read(path)


def test_the_line_that_is_wrong_is_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'\n{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": []}\n\n{"hash_ids": ["\xff"]}\n')
    with pytest.raises(BenchError, match=r"bad\.jsonl:4: not a Mooncake trace"):
        trace.read(path)


def test_a_byte_order_mark_is_no_part_of_a_trace(tmp_path, trace_file):
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + trace_file.read_bytes())
    assert trace.read(path) == trace.read(trace_file)


def test_any_integer_or_string_is_an_id(tmp_path, trace_file):
    """Whatever they are called, equal blocks are equal and others are not; those of 62 bits keep their names."""
    names = {0: 1 << 70, 1: -1, 2: "0", 1_000: "f00d" * 16, 1_001: 1 << 62, 1_002: (1 << 63) + 1}
    path = tmp_path / "named.jsonl"
    lines = [json.loads(line) for line in trace_file.read_text().splitlines()]
    path.write_text("\n".join(json.dumps(line | {"hash_ids": [names.get(each, each) for each in line["hash_ids"]]}) for line in lines))
    plain, named = trace.read(trace_file), trace.read(path)
    pairs = {pair for a, b in zip(plain, named, strict=True) for pair in zip(a.blocks, b.blocks, strict=True)}
    assert len(pairs) == len({old for old, _ in pairs}) == len({new for _, new in pairs})
    assert {old for old, new in pairs if old != new} == set(names)
    settings = dataclasses.replace(SMALL, trace=str(path))
    assert row_of(settings, Cell("x", EPP, "trace", 1.0, 1)) | {"policy": ""} == row_of(
        dataclasses.replace(settings, trace=str(trace_file)), Cell("x", EPP, "trace", 1.0, 1)
    ) | {"policy": ""}


def test_prompts_share_bytes_where_they_share_blocks():
    a, b = Job(1, 0.0, 1_300, 1, (7, 8, 9)), Job(2, 0.0, 1_300, 1, (7, 8, 10))
    assert len(prompt_of(a)) == 1_300 * 4
    assert prompt_of(a)[: 1_024 * 4] == prompt_of(b)[: 1_024 * 4]
    assert prompt_of(a)[1_024 * 4 :][:8] != prompt_of(b)[1_024 * 4 :][:8]


# scenarios


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "made"])
def test_a_scenario_is_a_workload(name):
    made, again, other = (SCENARIOS[name](Setting(8, PROFILE, seed)) for seed in (1, 1, 2))
    assert made == again != other
    assert SCENARIOS[name].__doc__
    everyone = [each for arrival in made.arrivals for each in (arrival, *arrival.turns)]
    assert 500 < len(everyone) == made.requests
    assert [arrival.at_s for arrival in made.arrivals] == sorted(arrival.at_s for arrival in made.arrivals)
    before: dict[int, int] = {}
    for each in everyone:
        assert len(each.blocks) == -(-each.prompt_tokens // BLOCK_TOKENS)
        assert each.prompt_tokens + each.output_tokens < PROFILE.kv_tokens
        for parent, block in zip((-1, *each.blocks), each.blocks, strict=False):
            assert before.setdefault(block, parent) == parent  # a block stands for all that is before it
    assert all(0 <= incident.replica < 8 for incident in made.incidents)


def test_load_grows_with_the_pool():
    few, many = (len(SCENARIOS["rag"](Setting(replicas, PROFILE, 1)).arrivals) for replicas in (4, 16))
    assert many == pytest.approx(4 * few, rel=0.15)


# the simulation


def test_round_robin_on_an_idle_pool_is_the_closed_form(workload):
    name = workload(Workload("made", [Arrival(30.0 * number, 2_000, 5, tuple(range(9 * number, 9 * number + 4))) for number in range(12)]))
    result = play(SMALL, Cell("round-robin", "", name, 1.0, 1))
    assert [job.replica for job in result.jobs] == [0, 1, 2, 3] * 3
    ttft_s = PROFILE.step_base_s + PROFILE.sequence_s + 2_000 * PROFILE.prefill_token_s + 2_000 * 1_000 * PROFILE.attention_pair_s
    assert [job.ttft_s for job in result.jobs] == pytest.approx([ttft_s] * 12)


@pytest.mark.parametrize("policy", [*BASELINES, "epp-223", "epp-optimized"])
def test_every_request_ends_once(policy, workload):
    name = workload(
        dataclasses.replace(chats(40), incidents=(Incident(5.0, 1, "down"), Incident(9.0, 1, "up"), Incident(12.0, 2, "failing", 1.0)))
    )
    row = row_of(SMALL, Cell(policy, configured(policy), name, 1.0, 1))
    assert row["requests"] == 80
    assert int(str(row["errors"])) < 50
    result = play(SMALL, Cell(policy, configured(policy), name, 1.0, 1))
    assert all((job.finished_s >= job.first_token_s > job.arrival_s) != bool(job.error) for job in result.jobs)
    assert {job.error for job in result.jobs} <= {"", "lost", "refused", "status 500"}
    assert all(engine.cache.used == 0 for engine in result.engines)


def test_a_row_has_its_keys_and_only_depends_on_its_cell(trace_file):
    settings = dataclasses.replace(SMALL, trace=str(trace_file))
    work = [
        Cell(policy, configured(policy), "trace", rate, seed) for policy in ("lmetric", "epp-223") for rate in (1.0, 4.0) for seed in (1, 2)
    ]
    alone = [row_of(settings, cell) for cell in work]
    together = run_all(settings, work, 2, lambda _line: None)
    assert json.dumps(alone) == json.dumps(together) == json.dumps([row_of(settings, cell) for cell in work])
    assert set(alone[0]) >= KEYS
    assert len({json.dumps(row) for row in alone}) == len(work)


@pytest.mark.parametrize("scrapes", [Scrapes(0.05), Scrapes(1.0), Scrapes(0.5, 0.2), Scrapes(0.1, 2.0)])
@pytest.mark.parametrize("policy", ["llm-d", "epp-223"])
def test_leaving_out_scrapes_nobody_sees_changes_nothing(policy, scrapes, workload):
    settings = dataclasses.replace(SMALL, scrapes=scrapes)
    sparse = row_of(settings, Cell(policy, configured(policy), workload(chats(60, 0.15)), 1.0, 1))
    nothing = (Incident(0.0, 0, "speed", 1.0),)  # makes the simulation take them all
    dense = row_of(settings, Cell(policy, configured(policy), workload(dataclasses.replace(chats(60, 0.15), incidents=nothing)), 1.0, 1))
    assert dense == sparse


def test_old_scrapes_hurt_who_lives_by_them(trace_file):
    settings = dataclasses.replace(SMALL, trace=str(trace_file), replicas=8)
    old = dataclasses.replace(settings, scrapes=Scrapes(30.0))
    cell = Cell("llm-d", "", "trace", 20.0, 1)
    assert row_of(old, cell)["ttft_mean_s"] > 1.5 * row_of(settings, cell)["ttft_mean_s"]
    cell = dataclasses.replace(cell, policy="lmetric")
    assert row_of(old, cell)["ttft_mean_s"] == row_of(settings, cell)["ttft_mean_s"]


def test_the_clairvoyant_is_not_beaten():
    settings = dataclasses.replace(SMALL, replicas=2)
    ttft_s = {name: float(str(row_of(settings, Cell(name, "", "rag", 1.0, 1))["ttft_mean_s"])) for name in BASELINES}
    assert min(ttft_s, key=ttft_s.__getitem__) == "clairvoyant", ttft_s


def test_an_agents_next_turn_comes_after_the_answer(workload):
    turns = (Arrival(2.0, 2_000, 10, (1, 2, 3, 4)), Arrival(3.0, 3_000, 10, (1, 2, 3, 4, 5, 6)))
    name = workload(Workload("made", [Arrival(0.0, 1_000, 100, (1, 2), turns=turns), Arrival(0.5, 500, 1, (9,))]))
    first, other, second, third = play(SMALL, Cell("llm-d", "", name, 1.0, 1)).jobs
    assert (first.prompt_tokens, other.prompt_tokens, second.prompt_tokens, third.prompt_tokens) == (1_000, 500, 2_000, 3_000)
    assert second.arrival_s == pytest.approx(first.finished_s + 2.0)
    assert third.arrival_s == pytest.approx(second.finished_s + 3.0)
    assert third.cached_tokens == 1_536


def test_a_replica_that_joins_gets_work_and_one_that_leaves_gets_none(workload):
    incidents = (Incident(10.0, 3, "join"), Incident(20.0, 0, "leave"))
    made = dataclasses.replace(chats(60), incidents=incidents, absent=frozenset({3}))
    for policy in ("round-robin", "epp-223"):
        jobs = play(SMALL, Cell(policy, configured(policy), workload(made), 1.0, 1)).jobs
        assert {job.replica for job in jobs if job.arrival_s < 10} == {0, 1, 2}
        assert {job.replica for job in jobs if 10 <= job.arrival_s < 20} == {0, 1, 2, 3}
        assert {job.replica for job in jobs if job.arrival_s >= 20} == {1, 2, 3}
        assert not any(job.error for job in jobs)


def test_the_product_stops_sending_to_a_replica_that_fails(workload):
    name = workload(dataclasses.replace(chats(100, 0.2), incidents=(Incident(5.0, 2, "failing", 1.0),)))
    product, blind = (row_of(SMALL, Cell(policy, configured(policy), name, 1.0, 1)) for policy in ("epp-223", "least-request"))
    assert 5 <= int(str(product["errors"])) < 0.3 * int(str(blind["errors"]))


def test_what_does_not_fit_any_cache_is_an_error(workload):
    name = workload(Workload("made", [Arrival(0.0, PROFILE.kv_tokens, 10, tuple(range(601)))]))
    row = row_of(SMALL, Cell("round-robin", "", name, 1.0, 1))
    assert (row["errors"], row["rejected"], row["goodput"]) == (1, 1, 0.0)


def test_what_never_ends_is_an_error():
    made = Workload("made", [Arrival(0.0, 100, 10, (1,))], speeds=(1e-9,))
    engines = engines_of(PROFILE, 1, made)
    policy = RoundRobin()
    policy.bind(PROFILE, engines, None)
    (job,) = Simulation(made, engines, policy, Scrapes(), [0.0]).run().jobs
    assert job.error == "unfinished"


def test_requests_are_refused_while_there_is_no_pool(workload):
    name = workload(dataclasses.replace(chats(3), absent=frozenset(range(4))))
    for policy in ("round-robin", "epp-223"):
        assert row_of(SMALL, Cell(policy, configured(policy), name, 1.0, 1))["rejected"] == 6


def test_the_product_releases_what_it_charged(workload, monkeypatch):
    made = []
    product = cells.ProductPolicy
    monkeypatch.setattr(cells, "ProductPolicy", lambda *args, **more: made.append(product(*args, **more)) or made[-1])
    incidents = (Incident(5.0, 1, "down"), Incident(9.0, 1, "up"))
    play(SMALL, Cell("x", EPP, workload(dataclasses.replace(chats(40), incidents=incidents)), 1.0, 1))
    endpoints = made[0]._datastore.endpoints.values()
    assert [(each.inflight_requests, each.inflight_tokens) for each in endpoints] == [(0, 0)] * 4
    assert sum(each.picks_total for each in endpoints) == 80


# imbalance


def result(held, present, arrivals=(0.0,)):
    jobs = [Job(number, at_s, 100, 1, ()) for number, at_s in enumerate(arrivals)]
    return Result(jobs, (), 0.0, 0, [Stay(*stay) for stay in held], [Stay(*stay) for stay in present])


ALWAYS = [(replica, 0.0, math.inf) for replica in range(4)]


@pytest.mark.parametrize(
    ("held", "present", "expected"),
    [
        ([(0, 5.0, 12.0), (0, 100.0, 230.0)], ALWAYS, math.sqrt(3)),  # all on one
        ([(replica, 5.0, 17.0) for replica in range(4)] * 3, ALWAYS, 0.0),  # all alike
        ([(replica, 15.0 * replica, 15.0 * replica + 15.0) for replica in range(4)], ALWAYS, 0.0),  # one after the other is alike
        ([(replica, 60.0 * replica, 60.0 * replica + 60.0) for replica in range(4)], ALWAYS, math.sqrt(3)),  # in turns of minutes is not
        # minutes of 4 and 1 request-minutes: deviations sqrt(3) and sqrt(3)/4 over means 1 and 1/4; then alike for one of four minutes
        ([(0, 0.0, 60.0)] * 4 + [(0, 60.0, 120.0)], ALWAYS, math.sqrt(3)),
        ([(0, 0.0, 60.0)] * 4 + [(replica, 60.0, 120.0) for replica in range(4)], ALWAYS, math.sqrt(3) / 2),
        # not there: who is down for the minute, and who joins in the middle of it
        ([(0, 0.0, 60.0)], [(0, 0.0, math.inf), (1, 60.0, math.inf)], 0.0),
        ([(0, 0.0, 60.0), (1, 30.0, 60.0)], [(0, 0.0, math.inf), (1, 30.0, math.inf)], 0.0),
        # its own half minute counts half: 1 and 0 requests in flight, weights 2/3 and 1/3
        ([(0, 0.0, 60.0)], [(0, 0.0, math.inf), (1, 30.0, math.inf)], math.sqrt(2 / 9) / (2 / 3)),
        # what a replica still has when it is taken out of the pool does not count
        ([(0, 0.0, 60.0), (1, 0.0, 60.0)], [(0, 0.0, math.inf), (1, 0.0, 30.0)], 0.0),
        ([(0, 0.0, math.inf), (1, 0.0, 60.0)], ALWAYS[:2], 0.0),  # never ends: until the last thing happens
        ([], ALWAYS, None),
        ([(0, 0.0, 60.0)], [(1, 0.0, math.inf)], None),
    ],
)
def test_imbalance_by_hand(held, present, expected):
    assert imbalance(result(held, present)) == (None if expected is None else pytest.approx(expected, abs=1e-9))


def test_imbalance_leaves_out_the_warm_up():
    held = [(0, 0.0, 60.0), (0, 60.0, 120.0), (1, 60.0, 120.0)]
    warm = result(held, ALWAYS[:2], (0.0, 60.0, 60.0))
    assert imbalance(warm, 30.0) == pytest.approx(0.0)
    assert imbalance(warm) == pytest.approx(0.5 / 1.5)
    assert imbalance(warm, 61.0) is None


class ToOne(RoundRobin):
    def choose(self, job, candidates, matched, now_s):
        return candidates[0]


@pytest.mark.parametrize(("policy", "expected"), [(ToOne, math.sqrt(3)), (RoundRobin, 0.0)])
def test_an_idle_pool_of_which_one_replica_does_everything_is_out_of_balance(policy, expected, workload, monkeypatch):
    """At no arrival is anything under way."""
    monkeypatch.setitem(BASELINES, "made", policy)
    name = workload(Workload("made", [Arrival(15.0 * number, 2_000, 5, tuple(range(9 * number, 9 * number + 4))) for number in range(20)]))
    row = row_of(SMALL, Cell("made", "", name, 1.0, 1))
    assert (row["imbalance"], row["busy_cv"]) == pytest.approx((expected, expected), abs=1e-6)


def test_replicas_are_held_to_their_share_while_they_are_there(workload):
    incidents = (
        Incident(5.0, 1, "down"),
        Incident(9.0, 1, "up"),
        Incident(12.0, 0, "leave"),
        Incident(13.0, 3, "join"),
        Incident(14.0, 2, "speed", 0.5),
    )
    found = play(
        SMALL, Cell("least-request", "", workload(dataclasses.replace(chats(80, 0.2), incidents=incidents, absent=frozenset({3}))), 1.0, 1)
    )
    assert sorted(found.present) == [
        (0, 0.0, 12.0), (1, 0.0, 5.0), (1, 9.0, math.inf), (2, 0.0, math.inf), (3, 13.0, math.inf)
    ]  # fmt: skip
    lost = [job for job in found.jobs if job.error == "lost"]
    assert lost
    assert len(found.held) == len([job for job in found.jobs if job.error in {"", "lost"}])
    assert {stay for stay in found.held if stay.to_s == 5.0} == {(1, job.arrival_s, 5.0) for job in lost}


# replicas that differ


def test_replicas_have_profiles_in_turn(workload, monkeypatch):
    """Speed and KV cache are each engine's own; so is what the product reads of it, and what a baseline remembers of it."""
    names = ("qwen3-32b-2xh100", "llama-8b-h100")
    settings = dataclasses.replace(SMALL, profile=",".join(names))
    name = workload(Workload("made", [Arrival(30.0 * number, 2_000, 5, tuple(range(9 * number, 9 * number + 4))) for number in range(4)]))
    found = play(settings, Cell("round-robin", "", name, 1.0, 1))
    profiles = [profile_of(names[replica % 2]) for replica in range(4)]
    assert [job.ttft_s for job in found.jobs] == pytest.approx([
        each.step_base_s + each.sequence_s + 2_000 * each.prefill_token_s + 2_000 * 1_000 * each.attention_pair_s for each in profiles
    ])  # fmt: skip
    assert [engine.cache.capacity for engine in found.engines] == [307_328, 381_000] * 2

    made = []
    product = cells.ProductPolicy
    monkeypatch.setattr(cells, "ProductPolicy", lambda *args, **more: made.append(product(*args, **more)) or made[-1])
    play(settings, Cell("x", EPP, name, 1.0, 1))
    assert [made[0]._endpoints[replica].kv_capacity_tokens for replica in range(4)] == [307_328, 380_992] * 2  # in blocks of 16

    for policy, remembered in (("lmetric", [600, 744]), ("llm-d", [2_401, 2_976]), ("sglang", [3_000, 3_000])):
        baseline = BASELINES[policy]()
        baseline.bind(profiles[0], found.engines, None)
        for replica in (0, 1):
            baseline.index.record(replica, range(3_000))
        assert [baseline.index.matched(range(3_000), (0, 1))[replica] // BLOCK_TOKENS for replica in (0, 1)] == remembered


def test_load_goes_by_the_profiles_of_all():
    def arrivals(profile):
        return len(cells.workload_of(dataclasses.replace(SMALL, profile=profile), "rag", 1).arrivals)

    slow, fast, mixed = map(arrivals, ("qwen3-32b-2xh100", "llama-8b-h100", "qwen3-32b-2xh100,llama-8b-h100"))
    assert mixed == pytest.approx((slow + fast) / 2, rel=0.1)
