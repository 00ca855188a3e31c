"""Fixtures of the tests against real engines: installed on first use, skipped with the reason where they can't be had."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))  # its programs and clients are used here too

from install import HIDDEN, LAYERS, InstallError, environment, llama_server, tiny_gguf, tiny_model
from programs import await_gone, descendants
from servers import LlamaProgram, Sglang, Vllm

Engine = TypeVar("Engine", Vllm, Sglang)
figures: list[str] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.e2e)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if figures:
        terminalreporter.section("measured")
        for line in figures:
            terminalreporter.write_line(line)


def installed(engine: str) -> Path:
    try:
        return environment(engine)
    except InstallError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def measured() -> Callable[[str], None]:
    """Says a figure in the summary of the run."""
    return figures.append


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left() -> Iterator[None]:
    before = descendants(os.getpid())
    yield
    after = descendants(os.getpid())
    await_gone({pid: name for pid, name in after.items() if pid not in before})


@pytest.fixture(scope="session")
def vllm_place() -> Path:
    return installed("vllm")


@pytest.fixture(scope="session")
def model(vllm_place: Path) -> Path:
    try:
        return tiny_model(vllm_place / "bin/python", layers=LAYERS, hidden=HIDDEN)
    except InstallError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def llama_program() -> LlamaProgram:
    """llama.cpp's server as it was built here, else the machine's own."""
    chosen, model = os.environ.get("LLAMA_SERVER", ""), os.environ.get("LLAMA_MODEL", "")
    try:
        return LlamaProgram(llama_server(), tiny_gguf(layers=LAYERS, hidden=HIDDEN))
    except InstallError as error:
        if not chosen:
            pytest.skip(f"{error} (7 to 12 minutes), or name one in LLAMA_SERVER")
    try:
        return LlamaProgram(Path(chosen), Path(model) if model else tiny_gguf(layers=LAYERS, hidden=HIDDEN))
    except InstallError as error:
        pytest.skip(str(error))


def started(engine: Engine, name: str) -> Iterator[Engine]:
    with engine:
        figures.append(f"{name} ready in {engine.start_s:.0f} s")
        yield engine


@pytest.fixture(scope="session")
def vllm_a(vllm_place: Path, model: Path) -> Iterator[Vllm]:
    """Serves the model and both adapters."""
    adapters = {name: model.with_name(f"{model.name}-{name}") for name in ("sql", "chat")}
    yield from started(Vllm(vllm_place, model, adapters=adapters), "vLLM A")


@pytest.fixture(scope="session")
def sglang(model: Path) -> Iterator[Sglang]:
    yield from started(Sglang(installed("sglang"), model), "SGLang")
