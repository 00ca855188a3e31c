"""Fixtures of the tests with a real Prometheus: fetched on first use, see prometheus_package.py."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))  # its programs and clients are used here too

from programs import await_gone, descendants
from prometheus_package import program


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def promtool() -> Path:
    return program("promtool")


@pytest.fixture(scope="session")
def prometheus_program() -> Path:
    return program("prometheus")


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left() -> Iterator[None]:
    before = descendants(os.getpid())
    yield
    after = descendants(os.getpid())
    await_gone({pid: name for pid, name in after.items() if pid not in before})
