"""Log lines as an operator's tools read them."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from epp.observe import logs


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    root, ours = logging.getLogger(), logging.getLogger("epp")
    kept = root.handlers[:], root.level, ours.level
    yield io.StringIO()
    root.handlers[:], root.level, ours.level = kept


log = logging.getLogger("epp.tests")


def test_a_json_line(stream: io.StringIO) -> None:
    logs.setup(stream=stream)
    log.info("endpoint %s", "gone", extra={"fields": {"endpoint": "a\nb", "waiting": 3, "msg": "mine", "at": object}})
    line = stream.getvalue()
    assert line.count("\n") == 1
    found = json.loads(line)
    assert found.pop("ts").endswith("Z")
    assert found == {
        "level": "info", "logger": "epp.tests", "msg": "endpoint gone", "endpoint": "a\nb", "waiting": 3, "msg_": "mine", "at": "<class 'object'>",
    }  # fmt: skip


def test_a_console_line_stays_one_line(stream: io.StringIO) -> None:
    logs.setup(stream=stream, encoder="console")
    log.warning("odd", extra={"fields": {"fairness_id": "x\n2026 INFO forged", "waiting": 3, "none": ""}})
    ts, rest = stream.getvalue().split("  ", 1)
    assert ts.endswith("Z")
    assert rest == 'WARNING  epp.tests  odd  fairness_id="x\\n2026 INFO forged"  waiting=3  none=""\n'


@pytest.mark.parametrize("encoder", ["json", "console"])
def test_an_exception_comes_with_its_traceback(stream: io.StringIO, encoder: str) -> None:
    logs.setup(stream=stream, encoder=encoder)  # type: ignore[arg-type]
    try:
        int("boom")
    except ValueError:
        log.exception("failed")
    assert "ValueError: invalid literal" in stream.getvalue()


def test_a_terminal_gets_the_readable_form(stream: io.StringIO) -> None:
    stream.isatty = lambda: True  # type: ignore[method-assign]
    assert isinstance(logs.setup(stream=stream).formatter, logs.ConsoleFormatter)


@pytest.mark.parametrize(("verbosity", "level"), [(0, "WARNING"), (1, "INFO"), (2, "INFO"), (3, "INFO"), (4, "DEBUG"), (5, "DEBUG")])
def test_verbosity(verbosity: int, level: str, stream: io.StringIO) -> None:
    logs.setup(verbosity=verbosity, stream=stream)
    assert logging.getLevelName(logging.getLogger("epp").level) == level
    logging.getLogger("aiohttp").info("not ours")
    assert stream.getvalue() == ""


def test_setting_up_again_replaces(stream: io.StringIO) -> None:
    logs.setup(stream=io.StringIO())
    logs.setup(stream=stream)
    log.info("once")
    assert stream.getvalue().count("once") == 1


def test_fields_that_are_none_are_left_out(stream: io.StringIO) -> None:
    logs.setup(stream=stream)
    log.info("plain", extra={"fields": "not a mapping"})
    assert set(json.loads(stream.getvalue())) == {"level", "ts", "logger", "msg"}
