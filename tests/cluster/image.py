"""Building the image without a daemon or a registry, and running what is in it as Kubernetes would: not root, nothing to write to.

buildah builds; the base is `$EPP_IMAGE_BASE`, a name buildah knows or can pull, else a Debian with Python by debootstrap, made once
(`$EPP_TOOLS_DIR` or `.venv/tools`). The image's files are run in a mount namespace of their own, the root bound read-only; the program
keeps the process it was started as, so that signals reach it. All of that needs root. What can't be had is an ImageError.
"""

from __future__ import annotations

import os
import shlex
import shutil
import ssl
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEP_S = 900.0
SAID_CHARS_MAX = 2_000
PROGRAMS = ("buildah", "unshare", "chroot", "mount")
BASE_PACKAGES = "python3,python3-venv,ca-certificates"
IMAGE = "localhost/epp:test"


class ImageError(Exception):
    """The image can't be built on this machine; the message says why."""


class Builder:
    """buildah with a storage of its own in `place`."""

    def __init__(self, place: Path) -> None:
        missing = [name for name in PROGRAMS if shutil.which(name) is None]
        if missing:
            raise ImageError(f"not on this machine: {', '.join(missing)} (Debian: apt-get install buildah util-linux coreutils)")
        if os.geteuid() != 0:
            raise ImageError("building without a daemon and binding a root read-only are root's")
        self.place = place
        storage = place / "storage.conf"
        storage.write_text(f'[storage]\ndriver = "vfs"\ngraphroot = "{place / "storage"}"\nrunroot = "{place / "run"}"\n')
        self.env = {**os.environ, "CONTAINERS_STORAGE_CONF": str(storage), "STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot"}
        self.env.pop("BUILDAH_FORMAT", None)

    def run(self, *command: str | Path, cwd: Path = ROOT) -> str:
        try:
            done = subprocess.run(command, cwd=cwd, env=self.env, capture_output=True, text=True, check=False, timeout=STEP_S)
        except subprocess.TimeoutExpired:
            raise ImageError(f"{command[0]}: no end after {STEP_S:g} s") from None
        if done.returncode:
            said = (done.stdout + done.stderr)[-SAID_CHARS_MAX:]
            raise ImageError(f"{shlex.join(map(str, command))} failed:\n{said}")
        return done.stdout.strip()

    def base(self) -> str:
        """The name of the image to build on."""
        chosen = os.environ.get("EPP_IMAGE_BASE")
        if chosen:
            return chosen
        files = Path(os.environ.get("EPP_TOOLS_DIR") or ROOT / ".venv/tools") / "image-base"
        if not files.is_dir():
            if shutil.which("debootstrap") is None:
                raise ImageError("no base: name one in EPP_IMAGE_BASE, or apt-get install debootstrap")
            made = files.with_name(f"{files.name}.unfinished")
            shutil.rmtree(made, ignore_errors=True)
            files.parent.mkdir(parents=True, exist_ok=True)
            alone = ("unshare", "--mount", "--pid", "--fork", "--kill-child")  # what it mounts and starts ends with it, however it ends
            self.run(*alone, "debootstrap", "--variant=minbase", f"--include={BASE_PACKAGES}", "bookworm", made)
            for waste in ("var/cache/apt/archives", "var/lib/apt/lists"):
                shutil.rmtree(made / waste)
            made.rename(files)
        # The authorities this machine trusts: its package index may be one of theirs.
        trusted = ssl.get_default_verify_paths().cafile or "/etc/ssl/certs/ca-certificates.crt"
        shutil.copyfile(os.environ.get("PIP_CERT") or trusted, files / "etc/ssl/certs/ca-certificates.crt")
        recipe = self.place / "base.Dockerfile"
        recipe.write_text(f"FROM scratch\nCOPY {files.name} /\n")
        self.run("buildah", "build", "--file", recipe, "--tag", "localhost/base:test", ".", cwd=files.parent)
        return "localhost/base:test"

    def build(self) -> None:
        """As deploy/image/build.sh does it for everybody."""
        settings = {"cert": "/etc/ssl/certs/ca-certificates.crt", "index-url": os.environ.get("PIP_INDEX_URL", "")}
        pip = self.place / "pip.conf"
        pip.write_text("[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items() if value))
        base = self.base()
        pull = "--pull" if os.environ.get("EPP_IMAGE_BASE") else "--pull-never"
        self.env["BUILDER"] = "buildah"
        self.run(ROOT / "deploy/image/build.sh", IMAGE, pull, "--build-arg", f"BASE={base}", "--secret", f"id=pip.conf,src={pip}")

    def mounted(self) -> Path:
        """The image's files."""
        return Path(self.run("buildah", "mount", self.run("buildah", "from", "--pull-never", IMAGE)))


def inside(files: Path, environment: list[str], user: str, *command: str) -> tuple[str, ...]:
    """The command that runs `command` in these files: root read-only, /dev/shm as a container has it."""
    at = shlex.quote(str(files))
    script = (
        f"set -e; mount --bind {at} {at}; mount -o remount,bind,ro {at}; mount --rbind /dev {at}/dev; mount --rbind /proc {at}/proc; "
        f'mount -t tmpfs -o mode=1777 shm {at}/dev/shm; exec chroot --userspec={user} --groups= {at} /usr/bin/env -i "$@"'
    )
    return ("unshare", "--mount", "sh", "-c", script, "sh", *environment, *command)
