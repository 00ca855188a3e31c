"""--config-file, read again when it changes: put in service if it is right, refused, counted and told once if it is not."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from epp.clock import VirtualClock
from epp.datastore import Datastore
from epp.errors import ConfigError
from epp.plugins.registry import Registry
from epp.policy import Policy
from epp.sources.config_file import ConfigFile

HEAD = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"
QUEUE = HEAD + "plugins: [{type: queue-scorer}]\n"
LOAD = HEAD + "plugins: [{type: load-aware-scorer}]\n"
FAULTY = HEAD + "plugins: [{type: queue-scorr}]\n"


class Watched:
    """A file, the policy it feeds and what was counted."""

    def __init__(self, path: Path) -> None:
        clock = VirtualClock()
        self.path = path
        self.policy = Policy(Datastore(clock), Registry(), clock, random.Random(1))
        self.outcomes: Counter[str] = Counter()
        self.source = ConfigFile(path, self.policy.apply, self.outcomes)
        self._changes = 0

    def write(self, text: str | bytes) -> None:
        """In place, at a time of its own."""
        self.path.write_bytes(text.encode() if isinstance(text, str) else text)
        self._changes += 1
        os.utime(self.path, ns=(self._changes, self._changes))

    @property
    def scorers(self) -> list[str]:
        return [name for name in self.policy.built.plugins if name.endswith("-scorer")]


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    made = Watched(tmp_path / "config.yaml")
    made.write(QUEUE)
    made.source.load()
    return made


def test_the_first_load_is_no_reload(watched: Watched) -> None:
    assert watched.scorers == ["queue-scorer"]
    assert not watched.outcomes
    assert not watched.source.once(), "it has not changed"
    assert not watched.outcomes


def test_a_first_load_that_fails_starts_nothing(tmp_path: Path) -> None:
    watched = Watched(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="No such file or directory"):
        watched.source.load()
    watched.write(FAULTY)
    with pytest.raises(ConfigError, match=r"config\.yaml: 1 problem\n  plugins\[0\]\.type: unknown plugin type 'queue-scorr'"):
        watched.source.load()
    assert not watched.outcomes


def test_a_change_takes_effect_and_is_counted(watched: Watched) -> None:
    watched.write(LOAD)
    assert watched.source.once()
    assert watched.scorers == ["load-aware-scorer"]
    watched.write(QUEUE)
    assert watched.source.once()
    assert watched.scorers == ["queue-scorer"]
    assert watched.outcomes == {"applied": 2}


def test_an_atomic_rename_and_a_configmaps_symlink_are_changes(tmp_path: Path) -> None:
    for version, text in (("1", QUEUE), ("2", LOAD)):
        (tmp_path / version).mkdir()
        (tmp_path / version / "config.yaml").write_text(text)
    (tmp_path / "data").symlink_to("1")
    watched = Watched(tmp_path / "data" / "config.yaml")
    watched.source.load()
    (tmp_path / "new").symlink_to("2")
    (tmp_path / "new").replace(tmp_path / "data")
    assert watched.source.once()
    assert watched.scorers == ["load-aware-scorer"]
    (tmp_path / "3").write_text(QUEUE)
    (tmp_path / "3").replace(tmp_path / "2" / "config.yaml")
    assert watched.source.once()
    assert watched.scorers == ["queue-scorer"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (FAULTY, "plugins[0].type: unknown plugin type 'queue-scorr'; did you mean queue-scorer?"),
        ("plugins: [", "line 2, column 1"),
        (b"\xff\xfe", "is not UTF-8"),
        (HEAD + "plugins: [{type: topology-extractor}]", "--allow-experimental-plugins"),
        ("x" * (2 << 20), ""),
    ],
)
def test_a_faulty_change_is_refused_counted_and_told_once(
    text: str | bytes, told: str, watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    before = watched.policy.built
    watched.write(text)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            assert not watched.source.once()
    assert watched.policy.built is before
    assert watched.outcomes == {"rejected": 1}
    (line,) = caplog.records
    assert line.message == "configuration file rejected; keeping the configuration there are"
    assert told in line.fields["problems"]  # type: ignore[attr-defined]
    watched.write(LOAD)
    assert watched.source.once()
    assert watched.outcomes == {"rejected": 1, "applied": 1}


def test_a_file_that_is_gone_leaves_things_as_they_were(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    watched.path.unlink()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert not watched.source.once()
    assert len(caplog.records) == 1
    assert (watched.scorers, watched.outcomes) == (["queue-scorer"], {"rejected": 1})
    watched.write(QUEUE)
    assert watched.source.once(), "the same text, but who knows"


@pytest.mark.parametrize("text", ["", "\n", "# nothing\n"])
def test_a_file_that_became_empty_is_refused(text: str, watched: Watched) -> None:
    watched.write(text)
    assert not watched.source.once()
    assert (watched.scorers, watched.outcomes) == (["queue-scorer"], {"rejected": 1})


async def test_it_is_looked_at_until_cancelled(watched: Watched) -> None:
    waits: list[float] = []
    looked = asyncio.Event()

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            watched.write(LOAD)
        if len(waits) == 3:
            looked.set()
            await asyncio.Event().wait()

    watched.source._sleep = sleep
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(watched.source.run())
        await looked.wait()
        running.cancel()
    assert waits == [1.0] * 3
    assert watched.scorers == ["load-aware-scorer"]
