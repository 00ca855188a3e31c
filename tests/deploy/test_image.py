"""The image's recipe, without building it: linted, pinned, and started by what manifests of the reference picker say.

Building and running it: tests/cluster/test_image_build.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from epp import cli
from epp.config.options import serve_options

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy/Dockerfile"
LOCK = ROOT / "deploy/image/requirements.txt"
BUILD_LOCK = ROOT / "deploy/image/requirements-build.txt"
EXTRAS = ("kubernetes", "tokenize", "uvloop", "valkey")
"""As deploy/image/lock.sh has them."""
PYTHON = {"python_version": "3.11", "python_full_version": "3.11.2", "sys_platform": "linux", "platform_system": "Linux"}


def instructions() -> list[tuple[str, str]]:
    """(name, arguments) in order, continued lines joined, comments gone."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name.upper(), rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())]


def final_stage() -> dict[str, str]:
    """The last of each instruction after the last FROM."""
    all_ = instructions()
    last = max(index for index, (name, _) in enumerate(all_) if name == "FROM")
    return dict(all_[last:])


def pinned(lock: Path) -> dict[str, Version]:
    return {canonicalize_name(name): Version(version) for name, version in re.findall(r"^([\w.-]+)==(\S+)", lock.read_text(), re.MULTILINE)}


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_hadolint_finds_nothing() -> None:
    command = [Path(sys.executable).parent / "hadolint", "--format", "tty", DOCKERFILE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_base_is_one_named_tag_and_no_registry_is_named() -> None:
    bases = [rest for name, rest in instructions() if name == "ARG" and rest.startswith("BASE=")]
    assert len(bases) == 1
    name, _, tag = bases[0].removeprefix("BASE=").partition(":")
    assert re.fullmatch(r"\d+\.\d+-[\w.-]+", tag), f"{tag!r} says neither version nor variant"
    assert "/" not in name
    assert {rest.partition(" ")[0] for key, rest in instructions() if key == "FROM"} == {"${BASE}"}


def test_it_runs_as_a_number_that_is_not_root_on_the_three_ports() -> None:
    final = final_stage()
    user, group = final["USER"].split(":")
    assert int(user) > 0
    assert int(group) > 0
    served = serve_options(cli.parser().parse_args(["serve"]))
    assert {int(port) for port in final["EXPOSE"].split()} == {served.grpc_port, served.grpc_health_port, served.metrics_port}


def test_what_is_copied_is_there_and_gets_past_dockerignore() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*", "nothing but what is named"
    allowed = [rule.removeprefix("!") for rule in rules if rule.startswith("!")]
    sources = [
        source
        for name, rest in instructions()
        if name in ("COPY", "ADD") and "--from=" not in rest
        for source in rest.split()[:-1]
    ]  # fmt: skip
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(source == rule or fnmatch(source, f"{rule}/*") for rule in allowed), f"{source} is ignored"
    assert [rule for rule in allowed if not any(s == rule or s.startswith(f"{rule}/") for s in sources)] == [], "allowed for nothing"


@pytest.mark.parametrize(
    "given",
    [
        [],  # CMD
        ["--pool-name=vllm-pool", "--pool-namespace=models", "--pool-group=inference.networking.k8s.io", "--zap-encoder=json",
         "--config-file=/config/default-plugins.yaml", "--tracing=false", "--v=1"],
        ["--pool-name", "vllm-pool", "--ha-enable-leader-election", "--grpc-port", "9002", "--grpc-health-port", "9003"],
        ["-pool-name=vllm-pool", "-v=4"],
    ],
)  # fmt: skip
def test_flags_alone_are_those_of_serve(given: list[str]) -> None:
    final = final_stage()
    entrypoint, command = json.loads(final["ENTRYPOINT"]), json.loads(final["CMD"])
    assert entrypoint == ["epp"], "the console script of pyproject.toml"
    assert "epp" in project()["project"]["scripts"]
    args = cli.parser().parse_args(cli.with_command(given or command))
    assert args.command == "serve"
    serve_options(args)


@pytest.mark.parametrize("given", [["sim", "--host", "0.0.0.0"], ["check", "policy.yaml"], ["explain", "--last", "5"]])
def test_other_commands_go_by_their_names(given: list[str]) -> None:
    assert cli.with_command(given) == given
    assert cli.parser().parse_args(cli.with_command(given)).command == given[0]


@pytest.mark.parametrize("flag", ["--version", "--help", "-h"])
def test_the_programs_own_flags_stay_its_own(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.parser().parse_args(cli.with_command([flag]))
    assert ended.value.code == 0
    assert "usage: epp serve" not in capsys.readouterr().out


def test_the_lock_is_what_the_project_asks_for() -> None:
    about = project()
    extras = about["project"]["optional-dependencies"]
    asked = [Requirement(text) for text in (*about["project"]["dependencies"], *(line for extra in EXTRAS for line in extras[extra]))]
    versions = pinned(LOCK)
    faults = [
        f"{each} (pinned: {versions.get(canonicalize_name(each.name))})"
        for each in asked
        if each.marker is None or each.marker.evaluate(PYTHON)
        if (version := versions.get(canonicalize_name(each.name))) is None or version not in each.specifier
    ]
    assert faults == [], "run deploy/image/lock.sh"
    (backend,) = (Requirement(text) for text in about["build-system"]["requires"])
    assert pinned(BUILD_LOCK)[canonicalize_name(backend.name)] in backend.specifier


@pytest.mark.parametrize("lock", [LOCK, BUILD_LOCK], ids=lambda path: path.name)
def test_every_pin_has_hashes_and_no_index_is_named(lock: Path) -> None:
    text = lock.read_text()
    requirements = re.split(r"\n(?=\S)", text.strip())
    assert len(requirements) == len(pinned(lock)) > 0
    for requirement in requirements:
        assert re.fullmatch(r"[\w.-]+==\S+( \\\n    --hash=sha256:[0-9a-f]{64})+", requirement), requirement.partition("\n")[0]


def test_trimming_takes_tests_and_sources_and_leaves_what_can_be_imported(tmp_path: Path) -> None:
    kept = ["a/__init__.py", "a/_fast.so", "a/testing/__init__.py", "a/data/model.json", "tests.py"]
    gone = ["a/tests/test_a.py", "a/core/tests/__init__.py", "a/_fast.pyx", "a/_fast.pxd", "a/include/a.h", "a/__init__.pyi", "a/liba.a"]
    for name in (*kept, *gone):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("12345")
    script = ROOT / "deploy/image/trim.py"
    trim = {"__name__": "trim"}
    exec(compile(script.read_text(), script, "exec"), trim)
    assert trim["trim"](tmp_path) == 5 * len(gone)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)


@pytest.mark.parametrize("found", ["docker", "podman", "buildah"])
def test_the_build_script_takes_the_builder_that_is_there(found: str, tmp_path: Path) -> None:
    for tool in ("dirname", found):
        stub = tmp_path / tool
        stub.write_text(f'#!/bin/sh\nif [ {tool} = dirname ]; then exec /usr/bin/dirname "$@"; fi\necho {tool} "$@"\n')
        stub.chmod(0o755)
    done = subprocess.run(
        ["/bin/sh", ROOT / "deploy/image/build.sh", "epp:1", "--platform", "linux/arm64"],
        env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == (f"{found} build --file deploy/Dockerfile --tag epp:1 --platform linux/arm64 .\n", "")


def test_the_build_script_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "dirname").symlink_to("/usr/bin/dirname")
    command = ["/bin/sh", ROOT / "deploy/image/build.sh", "epp:1"]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert (done.returncode, "none of docker, podman, buildah is on this machine" in done.stderr) == (1, True)
