"""--endpoints-file: strict, watched, and kept when it goes wrong."""

import asyncio
import json
import logging
import os
from pathlib import Path

import pytest

from epp.clock import VirtualClock
from epp.datastore import Datastore
from epp.errors import ConfigError
from epp.sources.files import FileSource, parse_endpoints_file
from epp.types import Address, EndpointSpec

ONE = 'endpoints: [{name: a, address: 10.0.0.1, port: "8000"}]\n'
TWO = 'endpoints: [{name: a, address: 10.0.0.1, port: "8000"}, {name: b, address: 10.0.0.2, port: 8000}]\n'


def faults(text: str) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        parse_endpoints_file(text, source="pool.yaml")
    return [str(problem) for problem in raised.value.problems]


def test_a_whole_file() -> None:
    text = """
endpoints:
- name: a
  namespace: llm
  address: 2001:db8::1
  port: 8000
  labels: {zone: west}
  metricsPort: "9100"
- {name: b, address: 10.0.0.2, port: "8000"}
"""
    assert parse_endpoints_file(text, source="pool.yaml") == [
        EndpointSpec("a", Address("2001:db8::1", 8000), "llm", {"zone": "west"}, Address("2001:db8::1", 9100)),
        EndpointSpec("b", Address("10.0.0.2", 8000)),
    ]


def test_json() -> None:
    text = json.dumps({"endpoints": [{"name": "a", "address": "10.0.0.1", "port": 8000}]})
    assert parse_endpoints_file(text, source="pool.json") == [EndpointSpec("a", Address("10.0.0.1", 8000))]


def test_no_endpoints_can_be_said() -> None:
    assert parse_endpoints_file("endpoints: []", source="pool.yaml") == []


def test_every_fault_is_reported_at_once() -> None:
    assert faults("""
endpoints:
- {name: a, address: localhost, port: 0}
- {name: b c, address: 10.0.0.1, port: http, label: {}}
- {address: 10.0.0.1, port: 80, labels: {zone: 1, 2: x}}
- {name: d, address: "[::1]", port: true, metricsPort: 70000}
- {name: e, port: [80], labels: [x]}
- 10.0.0.1:80
- {name: f, namespace: "a b", address: 10.0.0.1, port: 80}
- {name: g, address: 10.0.0.1, port: "80"}
- {name: g, address: 10.0.0.2, port: "80"}
more: 1
""") == [
        "more: unknown field; known: endpoints",
        "endpoints[0].address: 'localhost' is not an IP address, written without brackets (the destination header takes no host names)",
        "endpoints[0].port: must be 1 to 65535, not 0",
        "endpoints[1].label: unknown field; did you mean labels?",
        "endpoints[1].name: has blanks or control characters in it",
        "endpoints[1].port: must be 1 to 65535, not 'http'",
        "endpoints[2].name: is missing",
        "endpoints[2].labels.zone: must be a string, not a number; put it in quotes",
        "endpoints[2].labels.2: must be a string, not a number; put it in quotes",
        "endpoints[3].address: '[::1]' is not an IP address, written without brackets (the destination header takes no host names)",
        "endpoints[3].port: must be 1 to 65535, not True",
        "endpoints[3].metricsPort: must be 1 to 65535, not 70000",
        "endpoints[4].address: is missing",
        "endpoints[4].port: must be a port, not a list",
        "endpoints[4].labels: must be a mapping, not a list",
        "endpoints[5]: must be a mapping, not a string",
        "endpoints[6].namespace: has blanks or control characters in it",
        "endpoints[7]: the address 10.0.0.1:80 is given already at endpoints[6]",
        "endpoints[8]: the name 'g' is given already at endpoints[7]",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "is empty; write `endpoints: []` for none"),
        ("{}", "endpoints: is missing"),
        ("- a", "must be a mapping, not a list"),
        ("endpoints: {}", "endpoints: must be a list, not a mapping"),
        ("endpoints: [{name: a, address: 10.0.0.1}]", "endpoints[0].port: is missing"),
    ],
)
def test_files_that_say_nothing(text: str, fault: str) -> None:
    assert faults(text) == [fault]


class Watch:
    def __init__(self, path: Path, *, endpoints_max: int = 10) -> None:
        self.path = path
        self.datastore = Datastore(VirtualClock(), endpoints_max=endpoints_max)
        self.source = FileSource(path, self.datastore)

    def write(self, text: str, *, atomically: bool = False) -> None:
        if atomically:
            new = self.path.with_suffix(".new")
            new.write_text(text)
            new.replace(self.path)
        else:
            self.path.write_text(text)
            os.utime(self.path, ns=(0, os.stat(self.path).st_mtime_ns + 1_000_000))  # noqa: PTH116 - a later write, whatever the file system's clock

    @property
    def names(self) -> list[str]:
        return [endpoint.name for endpoint in self.datastore.endpoints.values()]


@pytest.fixture
def watch(tmp_path: Path) -> Watch:
    watch = Watch(tmp_path / "pool.yaml")
    watch.write(ONE)
    watch.source.load()
    return watch


def test_the_first_load(watch: Watch) -> None:
    assert watch.names == ["a"]
    assert not watch.source.once()
    assert (watch.source.loads_total, watch.source.poll_errors_total) == (1, 0)


@pytest.mark.parametrize("atomically", [True, False])
def test_a_change_is_read(watch: Watch, atomically: bool) -> None:
    a = watch.datastore.endpoints[Address("10.0.0.1", 8000)]
    watch.write(TWO, atomically=atomically)
    assert watch.source.once()
    assert watch.names == ["a", "b"]
    assert watch.datastore.endpoints[Address("10.0.0.1", 8000)] is a
    assert not watch.source.once()


def test_a_config_map_swapping_its_symlink(tmp_path: Path) -> None:
    for name, text in (("..1", ONE), ("..2", TWO)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pool.yaml").write_text(text)
        os.utime(tmp_path / name / "pool.yaml", ns=(0, 0))
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "pool.yaml").symlink_to("..data/pool.yaml")
    watch = Watch(tmp_path / "pool.yaml")
    watch.source.load()
    (tmp_path / "..data_tmp").symlink_to("..2")
    (tmp_path / "..data_tmp").replace(tmp_path / "..data")
    assert watch.source.once()
    assert watch.names == ["a", "b"]


@pytest.mark.parametrize("text", ["", "endpoints: [{name: a}]", "endpoints: [", "endpoints: [" + "1, " * 400_000 + "]"])
def test_a_bad_file_keeps_what_was_and_is_told_once(watch: Watch, text: str, caplog: pytest.LogCaptureFixture) -> None:
    watch.write(text)
    assert [watch.source.once() for _ in range(3)] == [False] * 3
    assert watch.names == ["a"]
    assert watch.source.poll_errors_total == 1
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    watch.write(TWO)
    assert watch.source.once()


def test_all_problems_are_in_the_one_warning(watch: Watch, caplog: pytest.LogCaptureFixture) -> None:
    watch.write("endpoints: [{name: a, address: 10.0.0.1}, {name: b, port: 1}]")
    watch.source.once()
    (record,) = caplog.records
    assert record.__dict__["fields"]["problems"] == "endpoints[0].port: is missing; endpoints[1].address: is missing"
    watch.write("endpoints: [" + "1, " * 60 + "]")
    watch.source.once()
    assert caplog.records[1].__dict__["fields"]["problems"].endswith("; and 10 more")


def test_a_file_that_is_gone_is_told_once_and_read_when_it_is_back(watch: Watch, caplog: pytest.LogCaptureFixture) -> None:
    watch.path.unlink()
    assert [watch.source.once() for _ in range(3)] == [False] * 3
    assert (watch.names, watch.source.poll_errors_total, len(caplog.records)) == (["a"], 1, 1)
    watch.write(ONE)
    assert watch.source.once()
    watch.path.unlink()
    watch.source.once()
    assert watch.source.poll_errors_total == 2


def test_bytes_that_are_no_text(watch: Watch) -> None:
    watch.path.write_bytes(b"endpoints: \xff\xfe")
    assert not watch.source.once()
    assert watch.source.poll_errors_total == 1


def test_more_endpoints_than_the_pool_takes(tmp_path: Path) -> None:
    watch = Watch(tmp_path / "pool.yaml", endpoints_max=1)
    watch.write(TWO)
    with pytest.raises(ConfigError, match="endpoints: 2 endpoints, the limit is 1"):
        watch.source.load()


def test_starting_without_the_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        Watch(tmp_path / "pool.yaml").source.load()


async def test_running_is_once_a_second(watch: Watch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            watch.write(TWO)
        elif len(slept) == 4:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await FileSource(watch.path, watch.datastore, sleep=sleep).run()
    assert slept == [1.0] * 4
    assert watch.names == ["a", "b"]
