"""What the demo shows, recorded from rich's console."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from epp.demo.results import Distribution, Summary
from epp.demo.view import EngineRow, LiveView, PlainView, Progress, comparison, make_view, picture

ROWS = (EngineRow("engine-1", 12, 3, 0, 0.41, 0.875), EngineRow("engine-2", 7, 1, 4, 1.0, math.nan))


def progress(phase: str = "picker", elapsed_s: float = 1.0, errors: int = 0) -> Progress:
    return Progress(phase, elapsed_s, 40, 19, 4, errors, 0.312, 0.875, ROWS)


def summary(name: str, scale: float) -> Summary:
    times = Distribution.of([0.1 * scale, 0.2 * scale])
    return Summary(name, 2, 0, 0, 1.0, times, times, 1000, 100, 20, 0.1, {"engine-1": 1, "engine-2": 1}, {}, [])


def console(*, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=120, force_terminal=terminal, color_system="standard" if terminal else None, record=True)


def text_of(made: Console) -> str:
    assert isinstance(made.file, io.StringIO)
    return made.file.getvalue()


def test_the_live_picture_has_a_line_an_engine() -> None:
    made = console()
    made.print(picture(progress(errors=2)))
    text = text_of(made)
    assert "19/40 requests" in text
    assert "2 errors" in text
    assert "312 ms" in text
    first, second = (line for line in text.splitlines() if "engine-" in line)
    assert first.replace("│", " ").split()[:4] == ["engine-1", "12", "3", "0"]
    assert "41 %" in first
    assert "88 %" in first
    assert "100 %" in second
    assert second.rstrip(" │").endswith("-")  # nothing was looked up yet


def test_the_comparison_shows_ratios() -> None:
    made = console()
    made.print(comparison(summary("round robin", 4.0), summary("picker", 1.0)))
    lines = text_of(made).splitlines()
    (mean,) = (line for line in lines if "first token, mean" in line)
    assert [cell.strip() for cell in mean.split("│")[1:-1]] == ["time to first token, mean", "600 ms", "150 ms", "4.00x"]
    assert any("prefix hit rate" in line and "10 %" in line for line in lines)
    assert any("requests per engine" in line and "1 1" in line for line in lines)


def test_a_comparison_without_a_measurement_has_dashes() -> None:
    nothing = Summary("picker", 0, 0, 0, 0.0, Distribution.of([]), Distribution.of([]), 0, 0, 0, math.nan, {}, {}, [])
    made = console()
    made.print(comparison(summary("round robin", 1.0), nothing))
    (mean,) = (line for line in text_of(made).splitlines() if "first token, mean" in line)
    assert [cell.strip() for cell in mean.split("│")[2:-1]] == ["150 ms", "-", ""]


def test_plain_lines_have_no_control_characters_and_come_every_two_seconds() -> None:
    made = console()
    with PlainView(made) as view:
        view.say("starting [1/3] ...")
        for phase, elapsed_s in [("round robin", 0.0), ("round robin", 0.5), ("round robin", 2.1), ("picker", 0.0), ("picker", 1.9)]:
            view.show(progress(phase, elapsed_s))
        view.conclude(summary("round robin", 4.0), summary("picker", 1.0), ["a note"])
    text = text_of(made)
    assert "\x1b" not in text
    assert "starting [1/3] ..." in text
    assert text.count("round robin: 19/40 requests, 4 in flight, 0 errors, TTFT mean 312 ms, hit rate 88 %") == 2
    assert text.count("picker: 19/40") == 1
    assert "engine-2: 7 requests, 1 running, 4 waiting, KV 100 %, hit rate -" in text
    assert text.rstrip().endswith("a note")


def test_the_live_view_redraws_and_leaves_the_comparison() -> None:
    made = console(terminal=True)
    with LiveView(made) as view:
        view.say("starting ...")
        view.show(progress())
        view.show(progress(elapsed_s=1.5))
        view.conclude(summary("round robin", 4.0), summary("picker", 1.0), ["a note"])
    text = text_of(made)
    assert "\x1b[2K" in text  # drawn over
    assert "starting ..." in text
    assert text.rindex("4.00x") > text.rindex("19/40")
    assert "a note" in text


@pytest.mark.parametrize("plain", [True, False])
def test_what_is_no_terminal_gets_plain_lines(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(make_view(plain=plain), PlainView)  # pytest captures the output


def test_a_terminal_gets_the_live_view_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert isinstance(make_view(plain=False), LiveView)
    assert isinstance(make_view(plain=True), PlainView)
