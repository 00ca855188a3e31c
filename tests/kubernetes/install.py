"""Builds a real kube-apiserver, with etcd beside it, for the conformance tests: once, found again the next time.

    KUBE_APISERVER_DIR=$(python tests/kubernetes/install.py) make test-kubernetes

It prints the directory of the programs, and what it does meanwhile to stderr.

On Debian 12: no package index has the program, but Debian's source package `kubernetes` (1.20.2) holds the whole tree with what it depends
on, and builds offline with Debian's Go 1.19. Nothing is installed on the machine and no root is needed: packages are downloaded through
package lists of our own and unpacked beside the sources. It takes 5 to 8 minutes of CPU at the lowest priority, and 2 GB while it is built.
130 MB stay in `$EPP_KUBE_DIR`, or `$XDG_CACHE_HOME/epp-test-kube`, or `~/.cache/epp-test-kube`; removing that directory is the way to start
over. An interrupted build goes on where it was.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

STAMP = "installed.txt"
SAID_CHARS_MAX = 600
"""Of what a program that failed printed last."""
PACKAGES = ("golang-1.19-go", "golang-1.19-src", "golang-github-modern-go-reflect2-dev", "etcd-server")
RECIPE = 1
"""To be counted up where the way of building changes what is built."""
SOURCE, VERSION = "kubernetes", "1.20"
VERSION_PACKAGES = ("component-base", "client-go/pkg")
"""Of the tree, those that hold what `/version` answers."""


class InstallError(Exception):
    """It can't be had on this machine; the message says why."""


def place() -> Path:
    """Where the programs are."""
    chosen = os.environ.get("EPP_KUBE_DIR")
    if chosen:
        return Path(chosen).expanduser().resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "epp-test-kube").expanduser().resolve()


def stamp() -> str:
    """Of what was asked for."""
    return repr((RECIPE, SOURCE, VERSION, PACKAGES))


def is_built() -> bool:
    file = place() / STAMP
    return file.is_file() and file.read_text() == stamp()


def build() -> Path:
    """The directory of `kube-apiserver` and `etcd`, made now if need be."""
    target = place()
    if is_built():
        return target
    work = target / "build"
    work.mkdir(parents=True, exist_ok=True)
    downloads = download(work)
    root, tree = work / "root", work / "go" / "src" / "k8s.io" / "kubernetes"
    say("unpacking")
    for package in downloads.glob("*.deb"):
        run(["dpkg", "-x", str(package), str(root)])
    unpack(downloads, tree)
    mend(tree, root)
    go = Go(work, root, tree)
    say("generating what the source package lacks")
    go.generate()
    say("compiling: minutes")
    go.compile(target / "kube-apiserver")
    shutil.copy2(root / "usr/bin/etcd", target / "etcd")
    shutil.rmtree(work, ignore_errors=True)
    (target / STAMP).write_text(stamp())
    return target


def download(work: Path) -> Path:
    """The packages and the source, through lists of our own: the machine's may name no sources, and are not ours to refresh."""
    for folder in ("lists/partial", "cache/archives/partial", "sources", "downloads"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    written = 0
    for number, (suffix, text) in enumerate(machine_sources()):
        (work / "sources" / f"{number}.{suffix}").write_text(text)
        written += 1
    if not written:
        raise InstallError("no Debian package sources on this machine: neither debian.sources nor sources.list")
    options = {
        "Dir::Etc::sourcelist": "/dev/null",
        "Dir::Etc::sourceparts": work / "sources",
        "Dir::State::lists": work / "lists",
        "Dir::Cache": work / "cache",
    }
    apt = ["apt-get", *(part for name, value in options.items() for part in ("-o", f"{name}={value}"))]
    downloads = work / "downloads"
    if not list(downloads.glob(f"{SOURCE}_{VERSION}*.orig.tar.*")) or len(list(downloads.glob("*.deb"))) < len(PACKAGES):
        say("downloading")
        run([*apt, "update", "-qq"])
        run([*apt, "source", "-qq", "--download-only", SOURCE], downloads)
        run([*apt, "download", "-qq", *PACKAGES], downloads)
    return downloads


def machine_sources() -> Iterable[tuple[str, str]]:
    """The machine's own package sources, asked for source packages too."""
    folder = Path("/etc/apt/sources.list.d")
    for file in sorted(folder.glob("*.sources")):
        text = file.read_text()
        if "debian" in text:
            yield "sources", re.sub(r"(?m)^Types:.*$", "Types: deb deb-src", text)
    lines = []
    for file in [Path("/etc/apt/sources.list"), *sorted(folder.glob("*.list"))]:
        if file.is_file():
            lines += [line for line in file.read_text().splitlines() if re.match(r"deb\s.*debian", line)]
    if lines:
        yield "list", "".join(f"{line}\n{re.sub('^deb', 'deb-src', line)}\n" for line in lines)


def unpack(downloads: Path, tree: Path) -> None:
    archives = list(downloads.glob(f"{SOURCE}_{VERSION}*.orig.tar.*"))
    if len(archives) != 1:
        raise InstallError(f"Debian's source package {SOURCE} is not of version {VERSION} here: Debian 12 has that")
    shutil.rmtree(tree, ignore_errors=True)
    unpacked = tree.with_name("unpacked")
    shutil.rmtree(unpacked, ignore_errors=True)
    unpacked.mkdir(parents=True)
    with tarfile.open(archives[0]) as archive:
        archive.extractall(unpacked, filter="tar")
    (top,) = unpacked.iterdir()
    top.rename(tree)


def mend(tree: Path, root: Path) -> None:
    """What Go 1.18 and later need: a newer reflect2, and a comparison of a reflect.Value that would call every empty text null."""
    old = tree / "vendor/github.com/modern-go/reflect2"
    for file in [*old.glob("*.go"), *old.glob("*.s")]:
        file.unlink()
    new = root / "usr/share/gocode/src/github.com/modern-go/reflect2"
    for file in [*new.glob("*.go"), *new.glob("*.s")]:
        shutil.copy2(file, old)
    file = tree / "vendor/k8s.io/kube-openapi/pkg/validation/validate/type.go"
    text = file.read_text()
    mended = text.replace(
        "if data == nil || reflect.DeepEqual(reflect.Zero(reflect.TypeOf(data)), reflect.ValueOf(data)) {", "if data == nil {"
    )
    if mended == text:
        raise InstallError(f"{file.name} of the source package is not as expected")
    file.write_text(mended)


class Go:
    """Debian's compiler, unpacked, on one tree."""

    def __init__(self, work: Path, root: Path, tree: Path) -> None:
        self._work, self._tree = work, tree
        goroot = root / "usr/lib/go-1.19"
        self._environment = os.environ | {
            "GOROOT": str(goroot), "GOPATH": str(work / "go"), "GOCACHE": str(work / "cache-go"), "GO111MODULE": "off", "GOPROXY": "off",
            "GOFLAGS": "", "CGO_ENABLED": "0", "PATH": f"{goroot / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
        }  # fmt: skip
        self._idly = ["nice", "-n", "19", str(goroot / "bin/go"), "build", "-p", str(os.cpu_count() or 1)]

    def generate(self) -> None:
        """The one generated file that the source package lacks: the OpenAPI definitions of the types marked for it."""
        generator = self._work / "openapi-gen"
        self._run([*self._idly, "-o", str(generator), "./vendor/k8s.io/kube-openapi/cmd/openapi-gen"])
        header = "vendor/k8s.io/code-generator/hack/boilerplate.go.txt"
        command = [str(generator), "-i", ",".join(sorted(set(self._marked()))), "-p", "k8s.io/kubernetes/pkg/generated/openapi"]
        self._run([*command, "-O", "zz_generated.openapi", "-h", header, "-r", str(self._work / "violations.txt")])

    def _marked(self) -> Iterable[str]:
        left_out = ("vendor/k8s.io/code-generator/", "vendor/k8s.io/sample-apiserver/")
        for top in ("pkg", "cmd", "plugin", "vendor/k8s.io"):
            for folder, _, files in os.walk(self._tree / top, followlinks=True):
                at = str(Path(folder).relative_to(self._tree))
                if f"{at}/".startswith(left_out):
                    continue
                sources = (Path(folder, name) for name in files if name.endswith(".go") and not name.endswith("_test.go"))
                if any("+k8s:openapi-gen=" in file.read_text(errors="replace") for file in sources):
                    yield f"k8s.io/kubernetes/{at}"

    def compile(self, program: Path) -> None:
        said = {"gitVersion": "v1.20.2", "gitMajor": "1", "gitMinor": "20"}
        settings = [
            f"-X k8s.io/kubernetes/vendor/k8s.io/{package}/version.{k}={v}" for package in VERSION_PACKAGES for k, v in said.items()
        ]
        self._run([*self._idly, "-ldflags", " ".join(["-s", "-w", *settings]), "-o", str(program), "./cmd/kube-apiserver"])

    def _run(self, command: list[str]) -> None:
        run(command, self._tree, self._environment)


def run(command: list[str], folder: Path | None = None, environment: dict[str, str] | None = None) -> None:
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise InstallError(f"{command[0]}: {error}") from None
    if done.returncode:
        raise InstallError(f"{Path(command[0]).name} failed: {(done.stderr or done.stdout).strip()[-SAID_CHARS_MAX:]}")


def say(text: str) -> None:
    sys.stderr.write(f"kube-apiserver: {text}\n")


def main() -> int:
    try:
        sys.stdout.write(f"{build()}\n")
    except InstallError as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
