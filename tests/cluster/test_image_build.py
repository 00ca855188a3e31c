"""The image is built and what is in it runs: as nobody in particular, with nothing to write to, from a manifest's arguments alone."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))  # its programs are used here too

from image import IMAGE, Builder, inside
from programs import LOOPBACK, Picker, Program

from epp import __version__
from epp._pb import epp_health_pb2 as pb
from epp.types import Address

pytestmark = pytest.mark.e2e
FILES_BYTES_MAX = 170_000_000
"""Of what we add to the base. Most of it is numpy (55 MB), grpcio, cryptography, uvloop and tokenizers (17, 15, 14 and 12)."""
NOT_IN_IT = frozenset({"betterproto2", "envoy", "envoy_data_plane", "rich"})
"""What `epp up` and `epp demo` need besides."""
EVERY_MODULE = """
import importlib, json, pkgutil, epp
from epp.errors import StartError
missing = {}
for module in pkgutil.walk_packages(epp.__path__, "epp."):
    if module.name != "epp.__main__":
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            missing[module.name] = error.name
        except StartError as error:  # "X is not installed: ..."
            missing[module.name] = str(error).split()[0]
import grpc, hiredis, jinja2, lightkube, numpy, redis.asyncio, tokenizers, uvloop
assert numpy.dot([1.0, 2.0], [3.0, 4.0]) == 11.0
assert tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).encode("a").ids == [0]
print(json.dumps(missing))
"""


class Image:
    def __init__(self, config: dict[str, Any], files: Path) -> None:
        self.config = config
        self.files = files

    def command(self, *arguments: str, given: bool = True) -> tuple[str, ...]:
        """`given`: arguments of the entrypoint, else a command of its own."""
        return inside(self.files, self.config["Env"], self.config["User"], *(self.config["Entrypoint"] if given else ()), *arguments)

    def run(self, *arguments: str, given: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.command(*arguments, given=given), capture_output=True, text=True, check=False, timeout=60)


class ImagePicker(Picker):
    """The image as a pod runs it, on ports of its own choosing."""

    def __init__(self, image: Image, *flags: str) -> None:
        ports = ("--grpc-port=0", "--grpc-health-port=0", "--metrics-port=0", f"--bind-address={LOOPBACK}", "--drain-timeout=0")
        Program.__init__(self, command=image.command(*flags, *ports))
        self.epp = self.health = self.metrics = Address(LOOPBACK, 0)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    builder = Builder(tmp_path_factory.mktemp("image"))
    try:
        builder.build()
        config = json.loads(builder.run("buildah", "inspect", "--type", "image", IMAGE))["OCIv1"]["config"]
        yield Image(config, builder.mounted())
    finally:  # half a gigabyte
        builder.run("buildah", "rm", "--all")
        builder.run("buildah", "rmi", "--all", "--force")


def test_it_says_how_it_is_run(image: Image) -> None:
    assert image.config["User"] == "65532:65532"
    assert set(image.config["ExposedPorts"]) == {"9002/tcp", "9003/tcp", "9090/tcp"}
    assert (image.config["Entrypoint"], image.config["Cmd"]) == (["epp"], ["serve"])


def test_nothing_can_be_written_but_memory(image: Image) -> None:
    done = image.run("sh", "-c", "id -u; touch /x /tmp/x /opt/epp/x; echo in memory > $TMPDIR/x; cat $TMPDIR/x", given=False)
    assert done.stdout.split("\n")[:2] == ["65532", "in memory"]
    assert done.stderr.count("Read-only file system") == 3, done.stderr


def test_a_manifests_flags_start_the_picker_and_it_answers(image: Image) -> None:
    with ImagePicker(image, "--pool-namespace=models", "--zap-encoder=json", "-v=2", "--endpoint=127.0.0.1:1") as picker:
        assert picker.process.args[-1] == "--drain-timeout=0"
        with grpc.insecure_channel(str(picker.health)) as channel:
            check = channel.unary_unary("/grpc.health.v1.Health/Check", response_deserializer=pb.HealthCheckResponse.FromString)
            assert check(pb.HealthCheckRequest(service="inference-extension").SerializeToString(), timeout=30).status == 1
        with urllib.request.urlopen(f"http://{picker.metrics}/metrics", timeout=30) as response:
            assert f'llm_d_epp_info{{commit="",build_ref="{__version__}"}} 1'.encode() in response.read()
        assert '"tls":true' in picker.stdout + picker.stderr
        assert picker.stop() == 0, "SIGTERM reaches it"


def test_other_commands_go_by_their_names(image: Image) -> None:
    assert image.run("--version").stdout.strip() == f"epp {__version__}"
    assert "max-score-picker" in image.run("plugins", "list").stdout
    done = image.run("serve")
    assert (done.returncode, "--endpoint" in done.stderr) == (2, True), done


def test_everything_can_be_imported_but_what_envoy_and_the_demo_need(image: Image) -> None:
    done = image.run("python", "-c", EVERY_MODULE, given=False)
    assert done.returncode == 0, done.stderr
    missing = json.loads(done.stdout)
    assert set(missing.values()) <= NOT_IN_IT, missing


def test_it_is_compiled_trimmed_and_small(image: Image, record_property: Any) -> None:
    ours = image.files / "opt/epp"
    (site_packages,) = ours.glob("lib/python3*/site-packages")
    sources = list((site_packages / "epp").rglob("*.py"))
    assert sources
    assert [path for path in sources if not list(path.parent.glob(f"__pycache__/{path.stem}.cpython-*.pyc"))] == []
    assert not list(site_packages.glob("pip*"))
    assert [path for path in site_packages.rglob("tests") if path.is_dir()] == []
    size_bytes = sum(path.lstat().st_size for path in ours.rglob("*") if not path.is_dir())
    record_property("files_bytes", size_bytes)
    sys.stdout.write(f"{size_bytes / 1e6:.0f} MB in {ours.name}\n")
    assert size_bytes < FILES_BYTES_MAX
