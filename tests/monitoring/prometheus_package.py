"""Prometheus and promtool: the machine's own, else unpacked from Debian's package, without installing it or starting its service.

    python tests/monitoring/prometheus_package.py

They go to `$EPP_TOOLS_DIR` or `.venv/tools` and are found there the next time. What can't be had ends the tests that want it with an
InstallError: none is skipped, for this is asked for by name (`make test-monitoring`).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
FETCH_S = 300.0
SAID_CHARS_MAX = 300


class InstallError(Exception):
    """Prometheus can't be had on this machine; the message says why."""


def program(name: str) -> Path:
    """`prometheus` or `promtool`. Raises InstallError."""
    own = shutil.which(name)
    if own is not None:
        return Path(own)
    place = Path(os.environ.get("EPP_TOOLS_DIR") or ROOT / ".venv/tools") / "prometheus"
    found = place / "usr/bin" / name
    if not found.is_file():
        _fetch(place)
    if not found.is_file():
        raise InstallError(f"Debian's package prometheus has no {name}")
    return found


def _fetch(place: Path) -> None:
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise InstallError("neither prometheus and promtool on the PATH nor apt-get to fetch them with: install Prometheus 2.42 or newer")
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as directory:  # unpacked whole, then put in its place
        _run(["apt-get", "download", "-o", "APT::Sandbox::User=root", "prometheus"], directory)
        (package,) = Path(directory).glob("prometheus_*.deb")
        _run(["dpkg", "-x", str(package), "unpacked"], directory)
        shutil.rmtree(place, ignore_errors=True)
        Path(directory, "unpacked").rename(place)


def _run(command: list[str], directory: str) -> None:
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False, timeout=FETCH_S)
    except subprocess.TimeoutExpired:
        raise InstallError(f"{command[0]}: no end after {FETCH_S:g} s") from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-SAID_CHARS_MAX:]
        raise InstallError(f"{' '.join(command[:2])} failed (an old package list? apt-get update): {said}")


if __name__ == "__main__":
    sys.stdout.write(f"{program('prometheus')}\n{program('promtool')}\n")
