"""The command line as a whole: exit codes, and what is said of flags there are none of. What each command does: its own tests."""

from __future__ import annotations

import subprocess
import sys

import pytest

from epp import cli
from epp.__main__ import main as command


@pytest.mark.parametrize(
    ("argv", "prog", "meant"),
    [
        (["serve", "--endpoints=127.0.0.1:1"], "epp serve", "; did you mean --endpoint?"),
        (["serve", "--grpc-prot", "9"], "epp serve", "; did you mean --grpc-port?"),
        (["-pool-nam=x"], "epp serve", "; did you mean --pool-name?"),
        (["up", "--list", ":1", "x"], "epp up", ""),
        (["config", "print", "a.yaml", "--what"], "epp config print", ""),
        (["plugins", "list", "extra"], "epp plugins list", ""),
    ],
)
def test_an_unknown_flag_is_told_by_its_command(argv: list[str], prog: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(argv)
    assert raised.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith(f"usage: {prog} ")
    assert error.startswith(f"{prog}: error: unrecognized arguments: ")
    assert error.endswith(meant)
    assert ("did you mean" in error) is bool(meant)


@pytest.mark.parametrize("command", ["serve", "up", "envoy-config"])
def test_usage_is_a_line_before_an_error(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--max-streams=none"])
    assert capsys.readouterr().err.count("\n") == 2


@pytest.fixture
def no_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logging stays as the tests have it: a handler put up here would outlive the standard error it writes to."""
    monkeypatch.setattr(cli.logs, "setup", lambda **_: None)


@pytest.mark.usefixtures("no_logs")
def test_an_envoy_with_nobody_behind_it_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["envoy-config"]) == 2
    seen = capsys.readouterr()
    assert seen.out == ""
    assert "--endpoint: at least one is needed" in seen.err


@pytest.mark.usefixtures("no_logs")
def test_an_envoy_that_dials_what_it_is_told_needs_no_endpoints(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("envoy_data_plane")
    assert cli.main(["envoy-config", "--destination=original-dst"]) == 0
    assert "ORIGINAL_DST" in capsys.readouterr().out


def test_ctrl_c_while_a_class_is_made_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11 makes a RuntimeError of whatever comes in `__set_name__`, as while a command's libraries are imported."""

    class Interrupted:
        def __set_name__(self, owner: type, name: str) -> None:
            raise KeyboardInterrupt

    def make(_args: object) -> int:
        type("Made", (), {"field": Interrupted()})
        return 0

    monkeypatch.setattr(cli, "_explain", make)
    monkeypatch.setattr(sys, "argv", ["epp", "explain"])
    assert command() == 130


def test_ctrl_c_while_the_command_is_read_is_no_fault() -> None:
    """A third of a second, at each start."""
    script = """
import sys
class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == "epp.config.options":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
sys.argv = ["epp", "serve"]
import runpy
runpy.run_module("epp", run_name="__main__")
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert (ended.returncode, ended.stderr) == (130, "")


def test_a_runtime_error_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_args: object) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "_explain", fail)
    monkeypatch.setattr(sys, "argv", ["epp", "explain"])
    with pytest.raises(RuntimeError, match="a bug"):
        command()
