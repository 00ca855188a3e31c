"""The doctor's flags, its order of events, its probes' time limits and its output."""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import sys
from pathlib import Path

import pytest
from aiohttp import web

from epp import cli
from epp.doctor import DoctorOptions, add_doctor_arguments, doctor_options, report
from epp.doctor.findings import Check, Finding, Result, Status, chosen, fail, ok, skipped
from epp.doctor.grpc_client import HostPort
from epp.doctor.http_fetch import Http, json_of, shown
from epp.doctor.probing import Missing, Probe, ProbeError, gather
from epp.doctor.runner import CLUSTER, STANDALONE, checks_for, examine, told
from epp.errors import ConfigError


def options(*argv: str) -> DoctorOptions:
    parser = argparse.ArgumentParser()
    add_doctor_arguments(parser)
    return doctor_options(parser.parse_args(list(argv)))


# --- flags


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ((), "say what to check"),
        (("--config-file", "x"), "say what to check"),
        (("--metrics", "host:9090"), "http or https"),
        (("--envoy-admin", "file:///etc/passwd"), "http or https"),
        ([part for n in range(70) for part in ("--pool-name", f"p{n}")], "at most 64 pools"),
    ],
)
def test_flags_that_make_no_sense(argv: tuple[str, ...], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        options(*argv)


@pytest.mark.parametrize("argv", [("--only", "no-such-check"), ("--skip", "picker-prt")])
def test_a_check_nobody_has_is_wrong_usage(argv: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="no check is called"):
        checks_for(options("--target", "a:1", *argv))


@pytest.mark.parametrize("address", ["x", "x:0", "x:99999", ":9002", "::1:9002", "a:b"])
async def test_an_address_that_is_none_is_wrong_usage(address: str) -> None:
    chosen_ = options("--target", address)
    with pytest.raises(ConfigError, match="HOST:PORT"):
        await examine(chosen_, checks_for(chosen_), lambda _about: None)


@pytest.mark.parametrize(("text", "address"), [("a.b:1", ("a.b", 1)), ("[::1]:80", ("::1", 80)), ("10.0.0.1:9002", ("10.0.0.1", 9002))])
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert HostPort.parse(text) == address
    assert str(HostPort.parse(text)) == text


def test_only_what_is_asked_about_is_checked() -> None:
    assert {check.name for check in checks_for(options("--target", "a:1"))} == {check.name for check in STANDALONE}
    assert {check.name for check in checks_for(options("--pool-name", "a"))} == {check.name for check in CLUSTER}
    both = checks_for(options("--pool-name", "a", "--metrics", "http://a", "--only", "pool-*,clocks", "--skip", "pool-pods"))
    assert {check.name for check in both} == {c.name for c in CLUSTER if c.name.startswith("pool-") and c.name != "pool-pods"} | {"clocks"}


def test_no_two_checks_have_one_name_and_each_says_what_it_is_about() -> None:
    every = (*STANDALONE, *CLUSTER)
    assert len({check.name for check in every}) == len(every)
    assert all(check.about and check.needs for check in every)


def test_help_and_list_teach(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(STANDALONE) + len(CLUSTER)
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--help"])
    text = capsys.readouterr().out
    for word in ("--target", "--envoy-admin", "--pool-name", "Exit code", "Nothing is changed"):
        assert word in text
    assert cli.main(["doctor"]) == 2
    assert cli.main(["doctor", "--target", "a:1", "--only", "x"]) == 2


def test_its_parts_are_not_imported_for_help() -> None:
    import subprocess

    code = "import sys, epp.cli; epp.cli.parser(); print([m for m in sys.modules if m.startswith('epp.doctor.') or m == 'epp.sources.kubernetes.api'])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


# --- gathering


async def one() -> int:
    return 1


async def plus_one(value: int) -> int:
    return value + 1


async def hoping(value: int | Missing) -> str:
    return "missing" if isinstance(value, Missing) else str(value)


async def failing() -> int:
    raise ProbeError("not given")


async def hanging() -> int:
    await asyncio.Event().wait()
    return 1


async def broken() -> int:
    raise ZeroDivisionError


PROBES = [
    Probe("one", "one", one), Probe("two", "two", plus_one, needs=("one",)), Probe("failing", "failing", failing), Probe("hanging", "hanging", hanging),
    Probe("after", "after", plus_one, needs=("failing",)), Probe("hoping", "hoping", hoping, hopes=("failing",)), Probe("broken", "broken", broken),
]  # fmt: skip


async def facts(*wanted: str) -> dict[str, object]:
    return await gather(PROBES, wanted, limit_s=0.01, known={}, progress=lambda _about: None)


async def test_only_what_is_needed_is_asked_each_once_and_in_order() -> None:
    asked: list[str] = []
    found = await gather(PROBES, ["two", "two", "hoping"], limit_s=1, known={}, progress=asked.append)
    assert found == {"one": 1, "two": 2, "failing": Missing("not given"), "hoping": "missing"}
    assert asked == ["one", "two", "failing", "hoping"]
    assert await gather(PROBES, ["two"], limit_s=1, known={"one": 5}, progress=asked.append) == {"one": 5, "two": 6}


async def test_what_can_not_be_had_is_missing_and_so_is_what_needs_it() -> None:
    assert await facts("after") == {"failing": Missing("not given"), "after": Missing("not given")}
    assert await facts("hanging") == {"hanging": Missing("no answer within 0.01 s from hanging", fault=True)}


async def test_a_bug_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        await facts("broken")


def test_a_fact_that_was_asked_for_and_is_not_there_is_one_failure() -> None:
    checks = [Check(name, "about", ("x",), lambda _x: ()) for name in "abc"]
    assert [(r.check, r.finding.status) for r in told(checks, {"x": Missing("gone", fault=True)})] == [
        ("a", Status.FAIL), ("b", Status.SKIPPED), ("c", Status.SKIPPED),
    ]  # fmt: skip
    assert [r.finding for r in told(checks, {"x": Missing("not given")})] == [skipped("not given")] * 3
    assert [r.finding for r in told(checks, {"x": 1})] == [ok("about")] * 3


def test_patterns() -> None:
    checks = [Check(name, "", (), lambda: ()) for name in ("a-1", "a-2", "b")]
    assert [check.name for check in chosen(checks, [], [])] == ["a-1", "a-2", "b"]
    assert [check.name for check in chosen(checks, ["a-*"], ["a-2"])] == ["a-1"]


# --- HTTP


async def test_tokens_go_where_they_are_meant_to_and_nowhere_else() -> None:
    seen: list[str | None] = []

    async def answer(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization"))
        if request.path == "/away":
            raise web.HTTPFound("/elsewhere")
        return web.json_response({"a": 1}, status=200 if request.path == "/" else 403)

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    http = Http(lambda: 0.0, limit_s=5, token="s3cret")
    try:
        found = await http.get(url + "/")
        assert json_of(found) == {"a": 1}
        assert found.skew_s is not None
        assert found.skew_s > 1e9
        assert (await http.get(url + "/", authorized=True)).status == 200
        assert (await http.get(url + "/away", authorized=True)).status == 302
        with pytest.raises(ProbeError, match="--metrics-token-file"):
            json_of(await http.get(url + "/refused"))
    finally:
        await runner.cleanup()
    assert seen == [None, "Bearer s3cret", "Bearer s3cret", None]


async def test_an_address_is_shown_without_its_password() -> None:
    assert shown("http://me:pw@host:1/metrics?token=x") == "http://host:1/metrics"
    with pytest.raises(ProbeError) as caught:
        await Http(lambda: 0.0, limit_s=1).get("http://me:hunter2@127.0.0.1:1/metrics")
    assert "hunter2" not in str(caught.value)
    assert caught.value.fault


def test_a_token_file_that_is_not_there_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--metrics", "http://127.0.0.1:1", "--metrics-token-file", str(tmp_path / "none")]) == 2
    assert "can't be read" in capsys.readouterr().err


# --- files given


@pytest.mark.parametrize("text", ["", "nothing: here", "[1, 2", '{"configs": []}', "\x00", "&a [*a]"])
def test_an_envoy_file_that_is_none_is_one_failure(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "envoy.yaml"
    file.write_text(text)
    assert cli.main(["doctor", "--envoy-config", str(file), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["counts"]["fail"] == 1
    assert any("is not understood" in finding["text"] for finding in said["findings"])


def test_a_configuration_with_faults_is_one_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("kind: EndpointPickerConfig\n")
    assert cli.main(["doctor", "--target", "127.0.0.1:1", "--config-file", str(file), "--only", "picker-config", "--json"]) == 1
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert "apiVersion" in finding["text"]


# --- output

RESULTS = [
    Result("a", ok("fine")), Result("bb", fail("bad\x1b[31m\nline", "effect", "change")), Result("c", Finding(Status.WARN, "so", "so", "so")),
    Result("d", skipped("why")), Result("e", skipped("why")),
]  # fmt: skip


def test_text() -> None:
    out = io.StringIO()
    report.write_text(RESULTS, out)
    assert out.getvalue().splitlines() == [
        "ok       a   fine",
        "FAIL     bb  bad [31m line",
        "             users see: effect",
        "             change:    change",
        "warn     c   so",
        "             users see: so",
        "             change:    so",
        "skipped  why: d, e",
        "1 ok, 1 warning, 1 failure, 2 skipped",
    ]


def test_json() -> None:
    out = io.StringIO()
    report.write_json(RESULTS, out)
    said = json.loads(out.getvalue())
    assert said["counts"] == {"ok": 1, "warn": 1, "fail": 1, "skipped": 2}
    assert said["findings"][1] == {"check": "bb", "status": "fail", "text": "bad\x1b[31m\nline", "effect": "effect", "change": "change"}


def test_long_texts_are_cut() -> None:
    out = io.StringIO()
    report.write_text([Result("a", ok("x" * 100_000))], out)
    assert len(out.getvalue()) < report.LINE_CHARS_MAX + 100


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_for_terminals() -> None:
    for out, shown_ in ((io.StringIO(), False), (Terminal(), True)):
        with report.progress(out) as say:
            say("the port")
        assert ("asking: the port" in out.getvalue()) is shown_
        assert out.getvalue().endswith("\x1b[K") is shown_
