"""Fixtures of the end-to-end tests: shared programs, and a guard that none outlives its module."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from programs import EchoEngine, Engines, Gateway, await_gone, descendants


@pytest.fixture(scope="module", autouse=True)
def no_process_is_left() -> Iterator[None]:
    before = descendants(os.getpid())
    yield
    after = descendants(os.getpid())
    await_gone({pid: name for pid, name in after.items() if pid not in before})


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    """Two simulated engines at the speed of the hardware they simulate: a token takes 8 ms."""
    with Engines(count=2) as program:
        yield program


@pytest.fixture(scope="module")
def gateway(engines: Engines) -> Iterator[Gateway]:
    """`epp up` in front of them."""
    with Gateway(engines.addresses) as program:
        yield program


@pytest.fixture(scope="module")
def echo() -> Iterator[EchoEngine]:
    with EchoEngine() as program:
        yield program


@pytest.fixture(scope="module")
def echo_gateway(echo: EchoEngine) -> Iterator[Gateway]:
    """`epp up` in front of the engine that says what it received."""
    with Gateway((echo.address,)) as program:
        yield program
