"""A real API server for the conformance tests: one started here from a directory that holds `kube-apiserver` and `etcd`, or one that a
kubeconfig leads to.

No controllers and no kubelet are started: nothing happens but what a test asks for. etcd and the server listen on free ports of 127.0.0.1,
keep everything in a directory of their own, and are stopped by their process ids. About 400 MB and 2 s.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import httpx
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.kubernetes.fake_store import Object, crd_documents

DIR_VARIABLE, KUBECONFIG_VARIABLE = "KUBE_APISERVER_DIR", "TEST_KUBECONFIG"
START_S = 60.0
STOP_S = 10.0
POLL_S = 0.1
ADMIN_TOKEN, USER_TOKEN = "admintoken", "epptoken"
USER = "system:serviceaccount:default:epp"
TOKENS = f"""{ADMIN_TOKEN},admin,1,"system:masters"
{USER_TOKEN},{USER},2,"system:serviceaccounts,system:serviceaccounts:default,system:authenticated"
"""


class StartFailedError(Exception):
    """The server can't be had; the message says why."""


def is_given() -> bool:
    return bool(os.environ.get(DIR_VARIABLE) or os.environ.get(KUBECONFIG_VARIABLE))


@dataclass
class RealApi:
    """`token` is an administrator's; "": the client certificate in `tls` is. `user` may do nothing yet, and asks with `user_token`."""

    url: str
    tls: ssl.SSLContext
    token: str
    user: str
    user_token: str
    kubeconfig: Path
    etcd_url: str = ""
    """"": somebody else's server, whose history can't be compacted here."""
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _place: Path | None = None

    @classmethod
    def given(cls) -> Self:
        """The one that the environment names, with the definitions of the kinds that the tests are about."""
        directory = os.environ.get(DIR_VARIABLE)
        api = cls.start(Path(directory).expanduser()) if directory else cls.at(Path(os.environ[KUBECONFIG_VARIABLE]).expanduser())
        try:
            api.install_definitions()
        except BaseException:
            api.stop()
            raise
        return api

    @classmethod
    def start(cls, directory: Path) -> Self:
        programs = {name: directory / name for name in ("etcd", "kube-apiserver")}
        for program in programs.values():
            if not os.access(program, os.X_OK):
                raise StartFailedError(f"{DIR_VARIABLE}={directory}: there is no program {program.name}")
        place = Path(tempfile.mkdtemp(prefix="epp-kube-"))
        (place / "tokens.csv").write_text(TOKENS, encoding="utf-8")
        _write_keys(place)
        client, peer, port = _free_ports(3)
        etcd_url, url = f"http://127.0.0.1:{client}", f"https://127.0.0.1:{port}"
        api = cls(url, ssl.create_default_context(), ADMIN_TOKEN, USER, USER_TOKEN, place / "kubeconfig", etcd_url, [], place)
        try:
            api._run(
                programs["etcd"], "--data-dir", str(place / "etcd"), "--listen-client-urls", etcd_url, "--advertise-client-urls", etcd_url,
                "--listen-peer-urls", f"http://127.0.0.1:{peer}",
            )  # fmt: skip
            api._run(
                programs["kube-apiserver"], f"--etcd-servers={etcd_url}", "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1",
                f"--secure-port={port}", f"--cert-dir={place / 'certs'}", "--service-cluster-ip-range=10.0.0.0/24",
                "--service-account-issuer=https://kubernetes.default.svc", f"--service-account-key-file={place / 'sa.pub'}",
                f"--service-account-signing-key-file={place / 'sa.key'}", "--api-audiences=https://kubernetes.default.svc",
                f"--token-auth-file={place / 'tokens.csv'}", "--authorization-mode=RBAC", "--disable-admission-plugins=ServiceAccount",
                "--allow-privileged=true", "--endpoint-reconciler-type=none",
            )  # fmt: skip
            api._await_ready(place / "certs" / "apiserver.crt")
        except BaseException:
            api.stop()
            raise
        return api

    @classmethod
    def at(cls, kubeconfig: Path) -> Self:
        """`user` is a service account made for it, in the namespace `default`."""
        config = yaml.safe_load(kubeconfig.read_text(encoding="utf-8"))
        context = _named(config["contexts"], config["current-context"])["context"]
        cluster = _named(config["clusters"], context["cluster"])["cluster"]
        user = _named(config["users"], context["user"])["user"]
        tls = ssl.create_default_context()
        if ca := _text(cluster, "certificate-authority", kubeconfig):
            tls = ssl.create_default_context(cadata=ca)
        if cluster.get("insecure-skip-tls-verify"):
            tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
        if certificate := _text(user, "client-certificate", kubeconfig):
            with tempfile.NamedTemporaryFile("w", suffix=".pem") as both:
                both.write(f"{certificate}\n{_text(user, 'client-key', kubeconfig)}")
                both.flush()
                tls.load_cert_chain(both.name)
        api = cls(cluster["server"], tls, user.get("token", ""), "", "", kubeconfig)
        account = f"epp-conformance-{os.getpid()}"
        with api.client() as client:
            where = "/api/v1/namespaces/default/serviceaccounts"
            client.post(where, json={"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": account}}).raise_for_status()
            body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 3600}}
            answer = client.post(f"{where}/{account}/token", json=body).raise_for_status()
        api.user, api.user_token = f"system:serviceaccount:default:{account}", answer.json()["status"]["token"]
        return api

    def client(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        return httpx.Client(base_url=self.url, verify=self.tls, headers=headers, trust_env=False, timeout=30)

    def install_definitions(self) -> None:
        """What is there already stays as it is."""
        with self.client() as client:
            for document in crd_documents():
                answer = client.post("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", json={**document, "status": {}})
                if answer.status_code not in (201, 409):
                    raise StartFailedError(f"{document['metadata']['name']}: {answer.text}")
                path = _path_of(document["spec"])
                _await(partial(_is_served, client, path), f"{path} is not served")

    def compact(self) -> None:
        """etcd forgets what was before now."""
        with self.client() as client, httpx.Client(trust_env=False) as etcd:
            revision = client.get("/api/v1/namespaces", params={"limit": 1}).json()["metadata"]["resourceVersion"]
            etcd.post(f"{self.etcd_url}/v3/kv/compaction", json={"revision": revision, "physical": True}).raise_for_status()

    def stop(self) -> None:
        if self._place is None:
            with self.client() as client:
                client.delete(f"/api/v1/namespaces/default/serviceaccounts/{self.user.rpartition(':')[2]}")
            return
        for process in reversed(self._processes):
            process.terminate()
        for process in reversed(self._processes):
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self._place, ignore_errors=True)

    def _run(self, program: Path, *arguments: str) -> None:
        assert self._place is not None
        with (self._place / f"{program.name}.log").open("wb") as log:
            self._processes.append(subprocess.Popen([program, *arguments], stdout=log, stderr=subprocess.STDOUT, cwd=self._place))

    def _await_ready(self, certificate: Path) -> None:
        assert self._place is not None

        def ready() -> bool:
            for process in self._processes:
                if process.poll() is not None:
                    program = Path(str(process.args[0])).name  # type: ignore[index]
                    last = (self._place / f"{program}.log").read_text(errors="replace")[-2000:]  # type: ignore[operator]
                    raise StartFailedError(f"{program} ended with {process.returncode}: {last}")
            if not certificate.exists():
                return False
            self.tls = ssl.create_default_context(cafile=certificate)
            try:
                with self.client() as client:
                    return client.get("/readyz").text == "ok"
            except httpx.TransportError:
                return False

        _await(ready, "the API server is not ready")
        self.kubeconfig.write_text(json.dumps(_kubeconfig(self.url, certificate)), encoding="utf-8")


def _await(done: Any, complaint: str) -> None:
    until = time.monotonic() + START_S
    while not done():
        if time.monotonic() > until:
            raise StartFailedError(f"{complaint} after {START_S:g} s")
        time.sleep(POLL_S)


def _is_served(client: httpx.Client, path: str) -> bool:
    return client.get(path).status_code == 200


def _path_of(spec: Object) -> str:
    return f"/apis/{spec['group']}/{spec['versions'][0]['name']}/{spec['names']['plural']}"


def _kubeconfig(url: str, certificate: Path) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "admin",
        "clusters": [{"name": "real", "cluster": {"server": url, "certificate-authority": str(certificate)}}],
        "users": [{"name": name, "user": {"token": token}} for name, token in (("admin", ADMIN_TOKEN), ("epp", USER_TOKEN))],
        "contexts": [{"name": name, "context": {"cluster": "real", "user": name, "namespace": "default"}} for name in ("admin", "epp")],
    }


def _named(entries: list[Object], name: str) -> Object:
    return next(entry for entry in entries if entry["name"] == name)


def _text(entry: Object, name: str, kubeconfig: Path) -> str:
    """Of a file that is named, or of what is in the kubeconfig itself."""
    if f"{name}-data" in entry:
        return base64.b64decode(entry[f"{name}-data"]).decode()
    return (kubeconfig.parent / entry[name]).read_text(encoding="utf-8") if name in entry else ""


def _write_keys(place: Path) -> None:
    key = rsa.generate_private_key(65537, 2048)
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption())
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    (place / "sa.key").write_bytes(private)
    (place / "sa.pub").write_bytes(public)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
