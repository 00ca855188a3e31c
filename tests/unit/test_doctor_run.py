"""The doctor's flags, its order of events, its probes' time limits and its output."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import sys
from collections.abc import AsyncIterator
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


@pytest.mark.parametrize("url", ["http://[::1", "http://x:y", "http://a..b:1", "http://x:99999"])
async def test_an_address_that_is_none_is_no_answer(url: str) -> None:
    with pytest.raises(ProbeError, match="can't be read"):
        await Http(lambda: 0.0, limit_s=5).get(url)


# --- ports and servers that are something else


@contextlib.asynccontextmanager
async def answering(answer: bytes | None, *, body: bytes = b"") -> AsyncIterator[str]:
    """A TCP server: hangs up at once, or says this to whatever comes; `body`: of an HTTP answer."""
    if body:
        answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (
            len(body),
            body,
        )

    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            if answer is not None and await reader.read(1 << 16):
                writer.write(answer)
                await writer.drain()
        writer.close()

    async with await asyncio.start_server(behave, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def findings(*argv: str) -> dict[str, list[Finding]]:
    chosen_ = options(*argv)
    found: dict[str, list[Finding]] = {}
    for check, finding in await examine(chosen_, checks_for(chosen_), lambda _about: None):
        found.setdefault(check, []).append(finding)
    return found


SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
OTHERS = {
    "hangs up": None,
    "HTTP/1.1": b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    "HTTP/2, then noise": SETTINGS + b"\x00\x00\x05\x01\x04\x00\x00\x00\x01hello",
    "SMTP": b"220 mail.example.com ESMTP ready\r\n",
}


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("answer", OTHERS.values(), ids=OTHERS)
def test_a_port_that_is_no_picker_s_is_a_failure(answer: bytes | None, loop: str) -> None:
    async def ask() -> dict[str, list[Finding]]:
        async with answering(answer) as address:
            return await findings("--target", address, "--health", address)

    with asyncio.Runner(loop_factory=pytest.importorskip("uvloop").new_event_loop if loop == "uvloop" else None) as runner:
        found = runner.run(ask())
    for check in ("picker-health", "picker-health-port", "picker-exchange", "picker-exchange-buffered"):
        assert [finding.status for finding in found[check]] == [Status.FAIL]
    assert "not SERVING: the connection was" in found["picker-health-port"][0].text


async def test_a_host_that_can_not_be_one_is_a_failure() -> None:
    found = await findings("--target", "a..b:9002")
    assert "a..b:9002 can't be reached" in found["picker-port"][0].text


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b"[]",
        b"null",
        b'{"endpoints": null, "plugins": null}',
        b'{"endpoints": [null], "plugins": {"a": null}}',
        b'{"endpoints": [{"name": "a", "address": "x"}], "plugins": []}',
        b'{"endpoints": [{"name": "a", "address": "x", "state": "healthy", "reading_age_s": "z"}], "plugins": {"a": {"type": 1}}}',
        b'{"endpoints": "\xff", "plugins": "\xff"}',
        b"[" * 30_000,
    ],
)
async def test_a_metrics_port_that_is_none(body: bytes, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n")
    async with answering(b"", body=body) as address:
        found = await findings("--metrics", f"http://{address}", "--config-file", str(file))
    assert found["picker-metrics"][0].status is Status.FAIL
    for check, path in (("picker-endpoints", "/debug/endpoints"), ("picker-config", "/debug/plugins/state")):
        (finding,) = found[check]
        assert finding.status is Status.SKIPPED
        assert finding.text == f"http://{address}{path} answers with something else than expected: this is no picker's metrics port"


async def test_an_endpoint_of_a_picker_that_has_no_address() -> None:
    rows = {"endpoints": [{"name": "a", "address": "[::1", "state": "healthy", "reading_age_s": None}]}
    async with answering(b"", body=json.dumps(rows).encode()) as address:
        found = await findings("--metrics", f"http://{address}")
    assert "an address that is none can't be read" in found["engine-metrics"][0].text


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
