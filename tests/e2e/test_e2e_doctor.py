"""`epp doctor` and the truth: real pickers, engines and Envoys, set up well and set up wrongly; what it says is what happens."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from gateways import BUFFERED, FULL_DUPLEX, Envoy, Way
from http_clients import ask, chat
from programs import LOOPBACK, START_S, Engines, Gateway, Picker, free_address

from epp.envoy import Destination
from epp.envoy.supervisor import find_envoy
from epp.extproc.tls import self_signed
from epp.types import Address

pytestmark = pytest.mark.e2e

CHAT = "/v1/chat/completions"
PROTOCOL_OPTIONS = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
HTTP1 = {"@type": f"type.googleapis.com/{PROTOCOL_OPTIONS}", "explicit_http_config": {"http_protocol_options": {}}}


class Said(NamedTuple):
    code: int
    findings: dict[str, list[dict[str, str]]]
    out: str

    def status(self, check: str) -> set[str]:
        return {finding["status"] for finding in self.findings[check]}

    def bad(self) -> set[str]:
        return {check for check in self.findings if self.status(check) & {"warn", "fail"}}


def doctor(*flags: str) -> Said:
    command = [sys.executable, "-m", "epp", "doctor", "--json", *flags]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=START_S * 2)
    assert "Traceback" not in ran.stderr, ran.stderr
    findings: dict[str, list[dict[str, str]]] = {}
    for finding in json.loads(ran.stdout)["findings"]:
        findings.setdefault(finding["check"], []).append(finding)
    return Said(ran.returncode, findings, ran.stdout)


@pytest.fixture(scope="module")
def tls_picker(engines: Engines) -> Iterator[Picker]:
    with Picker(engines.addresses) as program:
        yield program


@pytest.fixture(scope="module")
def plain_picker(engines: Engines) -> Iterator[Picker]:
    with Picker(engines.addresses, "--secure-serving=false") as program:
        yield program


def of(picker: Picker) -> list[str]:
    return ["--target", str(picker.epp), "--health", str(picker.health), "--metrics", f"http://{picker.metrics}"]


@pytest.mark.parametrize("transport", ["h2", "grpc"])
@pytest.mark.parametrize("secure", [True, False])
def test_a_picker_that_is_well(engines: Engines, tmp_path: Path, transport: str, secure: bool) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\nplugins: [{type: queue-scorer}, {type: prefix-cache-scorer}]\n"
    )
    with Picker(
        engines.addresses, "--transport", transport, f"--secure-serving={str(secure).lower()}", "--config-file", str(config)
    ) as picker:
        said = doctor(*of(picker), "--config-file", str(config))
    assert said.code == 0, said.out
    assert not said.bad(), said.out
    assert ("TLS" in said.findings["picker-port"][0]["text"]) is secure
    assert {check for check in said.findings if said.status(check) == {"skipped"}} == {
        each for each in said.findings if each.startswith("envoy-")
    }


@pytest.mark.parametrize("flags", [(), ("--destination", "original-dst"), ("--no-response-body",)])
def test_what_epp_up_runs_is_well(engines: Engines, flags: tuple[str, ...]) -> None:
    """Its configuration read from Envoy itself."""
    with Gateway(engines.addresses, *flags) as gateway:
        said = doctor("--envoy-admin", f"http://{gateway.admin}", "--metrics", f"http://{gateway.metrics}")
    assert said.code == 0, said.out
    assert not said.bad(), said.out
    assert "skipped" not in {
        status for check in said.findings if check.startswith("envoy-") and check != "envoy-fallbacks" for status in said.status(check)
    }


def test_a_picker_that_wants_a_client_certificate(engines: Engines, tmp_path: Path) -> None:
    pair = self_signed()
    (tmp_path / "tls.crt").write_bytes(pair.certificate)
    (tmp_path / "tls.key").write_bytes(pair.key)
    with Picker(engines.addresses, "--client-ca-file", str(tmp_path / "tls.crt")) as picker:
        without = doctor("--target", str(picker.epp), "--only", "picker-port,picker-exchange")
        having = doctor(
            "--target",
            str(picker.epp),
            "--only",
            "picker-port,picker-exchange",
            "--client-cert-path",
            str(tmp_path),
            "--model",
            "sim/llama-8b",
        )
    assert without.status("picker-port") == {"warn"}, without.out
    assert "client-cert-path" in without.findings["picker-exchange"][0]["text"]
    assert having.status("picker-port") == having.status("picker-exchange") == {"ok"}, having.out


def test_a_picker_nobody_started_and_one_without_engines() -> None:
    nobody = doctor("--target", str(free_address()), "--metrics", f"http://{free_address()}", "--health", str(free_address()))
    assert nobody.code == 1
    assert nobody.status("picker-port") == nobody.status("picker-metrics") == nobody.status("picker-health-port") == {"fail"}, nobody.out
    with Picker((free_address(),)) as picker:
        dead = doctor(*of(picker))
    assert dead.code == 1
    assert dead.status("engine-metrics") == {"fail"}, dead.out
    assert dead.status("picker-port") == {"ok"}


class Http1Only(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Quiet."""


def test_the_wrong_port() -> None:
    """As the metrics port is: HTTP/1.1, which answers HTTP/2's first bytes with an error."""
    with http.server.ThreadingHTTPServer((LOOPBACK, 0), Http1Only) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            said = doctor("--target", f"{LOOPBACK}:{server.server_address[1]}", "--only", "picker-port")
        finally:
            server.shutdown()
            thread.join()
    assert said.status("picker-port") == {"fail"}
    assert "is this the ext_proc port" in said.findings["picker-port"][0]["change"]


# --- Envoys set up wrongly: the doctor's word, and what a request meets


class Wrong(NamedTuple):
    """A fault and what it does."""

    way: dict[str, Any]
    check: str
    status: int | None
    """Of a request; None: not a matter of its status."""
    secure: bool = False
    body: bytes = chat("hello")


WRONG: dict[str, Wrong] = {
    "plaintext to a TLS port": Wrong({"picker_tls": False}, "envoy-tls", 500, secure=True),
    "TLS to a plaintext port": Wrong({"picker_tls": True}, "envoy-tls", 500),
    "HTTP/1.1 to the picker": Wrong(
        {"picker_cluster": {"typed_extension_protocol_options": {PROTOCOL_OPTIONS: HTTP1}}}, "envoy-http2", 500
    ),
    "a small buffer": Wrong(
        {"request": BUFFERED, "response": "NONE", "buffer_bytes": 65_536}, "envoy-request-size", 413, body=chat("x" * 200_000)
    ),
    "no mutations": Wrong({"processor": {"mutation_rules": {"disallow_all": True}}}, "envoy-rules", 503),
    "no immediate responses": Wrong(
        {"processor": {"disable_immediate_response": True}}, "envoy-rules", 500, body=chat("x", model="nobody's")
    ),
    "no body": Wrong({"request": "NONE", "response": "NONE"}, "envoy-request-mode", None),
    "streamed": Wrong({"request": "STREAMED", "response": "NONE"}, "envoy-request-mode", None),
    "metadata not received": Wrong(
        {"destination": Destination.OVERRIDE_HOST, "processor": {"metadata_options": {"forwarding_namespaces": {"untyped": ["envoy.lb"]}}}},
        "envoy-metadata",
        None,
    ),
}


def only_listener(directory: Path, name: str) -> Path:
    """Envoy's configuration with this listener alone."""
    static = yaml.safe_load((directory / "envoy.yaml").read_text())["static_resources"]
    static["listeners"] = [each for each in static["listeners"] if each["name"] == name]
    file = directory / "one.yaml"
    file.write_text(yaml.safe_dump({"static_resources": static}))
    return file


@pytest.mark.parametrize("name", WRONG)
async def test_what_the_doctor_says_is_what_happens(name: str, engines: Engines, tls_picker: Picker, plain_picker: Picker) -> None:
    wrong = WRONG[name]
    picker = tls_picker if wrong.secure else plain_picker
    right = Way(pickers=(picker.epp,), endpoints=engines.addresses, picker_tls=wrong.secure)
    with Envoy(
        {
            "wrong": Way(**{"pickers": (picker.epp,), "endpoints": engines.addresses, "picker_tls": wrong.secure, **wrong.way}),
            "right": right,
        }
    ) as envoy:
        file = only_listener(Path(envoy._directory.name), "wrong")
        said = doctor("--target", str(picker.epp), "--envoy-config", str(file), "--model", "sim/llama-8b")
        assert said.status(wrong.check) & {"warn", "fail"}, said.out
        assert said.code == (1 if any("fail" in said.status(check) for check in said.findings) else 0)
        if wrong.status is not None:
            assert (await ask(envoy["wrong"], CHAT, wrong.body)).status == wrong.status
        assert (await ask(envoy["right"], CHAT, chat("hello"))).status == 200
        if name == "metadata not received":
            served = {(await ask(envoy["wrong"], CHAT, chat("the same prompt"))).engine for _ in range(8)}
            assert len(served) == 2, "round robin: nobody listens to the picker"


def test_two_endpoints_for_a_cluster_that_takes_one(engines: Engines, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"
        "plugins: [{type: queue-scorer}, {type: max-score-picker, parameters: {maxNumOfEndpoints: 2}}]\n"
        "schedulingProfiles: [{name: default, plugins: [{pluginRef: queue-scorer}, {pluginRef: max-score-picker}]}]\n"
    )
    with Picker(engines.addresses, "--secure-serving=false", "--config-file", str(config)) as picker:
        file = tmp_path / "envoy.yaml"
        for destination, status in (("original-dst", "fail"), ("override-host", "ok")):
            flags = [part for address in engines.addresses for part in ("--endpoint", str(address))]
            made = subprocess.run(
                [sys.executable, "-m", "epp", "envoy-config", *flags, "--epp", str(picker.epp), "--destination", destination],
                capture_output=True,
                text=True,
                check=True,
            )
            file.write_text(made.stdout)
            said = doctor("--target", str(picker.epp), "--envoy-config", str(file), "--model", "sim/llama-8b", "--only", "envoy-fallbacks")
            assert said.status("envoy-fallbacks") == {status}, said.out


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "accepted"),
    [
        pytest.param(lambda mode: mode.update(request_trailer_mode="SKIP"), False, id="no request trailers"),
        pytest.param(lambda mode: mode.update(response_trailer_mode="SKIP"), False, id="no response trailers"),
        pytest.param(lambda mode: mode, True, id="as it is"),
    ],
)
def test_envoy_itself_refuses_full_duplex_without_trailers(change: Change, accepted: bool, tmp_path: Path) -> None:
    """The doctor says so: `envoy-request-mode`, `envoy-response-mode`."""
    way = Way(pickers=(Address(LOOPBACK, 9002),), endpoints=(Address(LOOPBACK, 8000),), request=FULL_DUPLEX, response=FULL_DUPLEX)
    listener, clusters = way.configuration("x", Address(LOOPBACK, 8080))
    filters = listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
    change(next(each for each in filters if each["name"].endswith("ext_proc"))["typed_config"]["processing_mode"])
    file = tmp_path / "envoy.yaml"
    file.write_text(yaml.safe_dump({"static_resources": {"listeners": [listener], "clusters": clusters}}))
    validated = subprocess.run(
        [str(find_envoy()), "--mode", "validate", "-c", str(file)], capture_output=True, check=False, timeout=START_S
    )
    assert (validated.returncode == 0) is accepted
    said = doctor("--envoy-config", str(file), "--only", "envoy-request-mode,envoy-response-mode")
    assert (said.code == 0) is accepted
