"""Real engines as programs: what each needs in its environment and on its command line to run small, on a CPU, with nothing downloaded.

They start one after another (two at once take four times as long on two cores), become ready within `READY_S` or fail the test with what
they printed, and are stopped by pid with all they started.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from install import HERE, PYTHON, site_packages
from programs import LOOPBACK, POLL_S, Program, await_gone, descendants, free_port

from epp.types import Address

READY_S = 180.0
PROBE_S = 10.0
MODEL = "tiny"
CONTEXT_TOKENS = 2_048
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",
}


class Server(Program):
    """An engine that is ready when `ready_path` is a 200."""

    ready_path = "/health"

    def __init__(self, command: tuple[str, ...], environment: Mapping[str, str], *, port: int = 0) -> None:
        settings = (f"{name}={value}" for name, value in environment.items())
        super().__init__(command=("env", *settings, *command))
        self.address = Address(LOOPBACK, port or free_port())
        self.start_s = 0.0
        """How long its last start took."""

    def await_ready(self) -> None:
        begun_s = time.monotonic()
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if fetch(self.address, "GET", self.ready_path)[0] == 200:
                    self.start_s = time.monotonic() - begun_s
                    return
            assert self.process.poll() is None, f"exit code {self.process.returncode}\n{self!r}"
            assert time.monotonic() - begun_s < READY_S, f"not ready within {READY_S:g} s\n{self!r}"
            time.sleep(10 * POLL_S)

    def stop(self) -> int:
        """Its exit code. Engines print tracebacks when they are stopped: not our concern."""
        if self._process is None:
            return 0
        if self._process.poll() is None:
            self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """As the kernel does it to a container that has no memory left: all its processes, without a word."""
        pids = descendants(self.process.pid)
        for pid in (self.process.pid, *pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        await_gone(pids)

    def _kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()


class Vllm(Server):
    """vLLM on one core, with automatic prefix caching: 96 blocks of 32 tokens."""

    blocks = 96
    block_tokens = 32

    def __init__(self, place: Path, model: Path, *, adapters: Mapping[str, Path]) -> None:
        """`adapters`: the LoRA adapters it serves; others can't be loaded."""
        port = free_port()
        chosen = [f"{name}={path}" for name, path in adapters.items()]
        super().__init__(
            (
                str(place / "bin/python"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", MODEL,
                "--host", LOOPBACK, "--port", str(port), "--dtype", "bfloat16", "--enforce-eager",
                "--max-model-len", str(CONTEXT_TOKENS), "--max-num-seqs", "4", "--enable-prefix-caching",
                "--block-size", str(self.block_tokens), "--num-gpu-blocks-override", str(self.blocks),
                "--enable-lora", "--max-loras", "2", "--max-cpu-loras", "2", "--max-lora-rank", "8", "--lora-modules", *chosen,
            ),
            OFFLINE | {
                "VLLM_TARGET_DEVICE": "cpu",
                "VLLM_HOST_IP": LOOPBACK,
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_SERVER_DEV_MODE": "1",
            },
            port=port,
        )  # fmt: skip


class Sglang(Server):
    """SGLang by the path that needs no kernels of its own: 4 096 tokens of cache in pages of 16."""

    ready_path = "/ready"  # its /health generates a token
    pages = 256
    page_tokens = 16

    def __init__(self, place: Path, model: Path) -> None:
        port = free_port()
        super().__init__(
            (
                str(place / "bin/python"), "-m", "sglang.launch_server", "--model-path", str(model), "--served-model-name", MODEL,
                "--host", LOOPBACK, "--port", str(port), "--device", "cpu", "--dtype", "bfloat16", "--attention-backend", "torch_native",
                "--sampling-backend", "pytorch", "--enable-metrics", "--page-size", str(self.page_tokens),
                "--max-total-tokens", str(self.pages * self.page_tokens), "--max-running-requests", "4",
                "--context-length", str(CONTEXT_TOKENS), "--disable-overlap-schedule", "--disable-cuda-graph",
                "--mem-fraction-static", "0.1", "--sleep-on-idle",
            ),
            OFFLINE | {"SGLANG_USE_CPU_ENGINE": "0"},
            port=port,
        )  # fmt: skip


class Triton(Server):
    """Triton with a model that reports what the TensorRT-LLM backend does; `metrics` is a port of its own, as ever with Triton."""

    ready_path = "/v2/models/tensorrt_llm/ready"

    def __init__(self, place: Path) -> None:
        port, grpc_port, metrics_port = (free_port() for _ in range(3))
        self._directory = tempfile.TemporaryDirectory(prefix="epp-triton-")
        server, packages = site_packages(place) / "pytriton/tritonserver", site_packages(place)
        super().__init__(
            (
                str(server / "bin/tritonserver"), "--model-repository", str(self._models()), "--backend-directory",
                str(self._backends(server)), "--http-address", LOOPBACK, "--http-port", str(port), "--grpc-address", LOOPBACK,
                "--grpc-port", str(grpc_port), "--metrics-address", LOOPBACK, "--metrics-port", str(metrics_port),
                "--allow-gpu-metrics", "false", "--metrics-config", "summary_latencies=true",
            ),
            {
                "LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs"),  # without it the model's process hangs on its start
                "PYTHONPATH": str(packages),
                "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
            },
            port=port,
        )  # fmt: skip
        self.metrics = Address(LOOPBACK, metrics_port)

    def __exit__(self, *reason: object) -> None:
        try:
            super().__exit__(*reason)
        finally:
            self._directory.cleanup()

    def report(self, *, waiting: float, active: float, used: float, blocks: float) -> None:
        """From now on its metrics say so."""
        status, answer = fetch(self.address, "POST", "/v2/models/tensorrt_llm/infer", numbers(waiting, active, used, blocks))
        assert status == 200, answer

    def requests_served(self) -> int:
        (model,) = fetched(self.address, "/v2/models/tensorrt_llm/stats")["model_stats"]
        return int(model["inference_stats"]["success"]["count"])

    def _models(self) -> Path:
        models = Path(self._directory.name, "models")
        version = models / "tensorrt_llm/1"
        version.mkdir(parents=True)
        shutil.copy(HERE / "triton_model/config.pbtxt", version.parent)
        shutil.copy(HERE / "triton_model/model.py", version)
        return models

    def _backends(self, server: Path) -> Path:
        """The python backend as Triton looks for it: library, module and the process that runs models, side by side."""
        backend = Path(self._directory.name, "backends/python")
        backend.mkdir(parents=True)
        version = PYTHON.removeprefix("python")
        for file in ("libtriton_python.so", "triton_python_backend_utils.py"):
            (backend / file).symlink_to(server / "backends/python" / file)
        shutil.copy(server / f"python_backend_stubs/{version}/triton_python_backend_stub", backend)
        return backend.parent


class LlamaProgram(NamedTuple):
    """llama.cpp's server and a GGUF for it."""

    binary: Path
    model: Path


class LlamaServer(Server):
    """llama.cpp's server on one core: metrics without labels, and as its cache the slots and what was in them before."""

    slots = 4

    def __init__(self, program: LlamaProgram, *flags: str, metrics: bool = True) -> None:
        """`metrics`: its /metrics is off unless asked for."""
        port = free_port()
        super().__init__(
            (
                str(program.binary), "--model", str(program.model), "--alias", MODEL, "--host", LOOPBACK, "--port", str(port),
                "--ctx-size", str(self.slots * CONTEXT_TOKENS), "--parallel", str(self.slots), "--threads", "1", "--threads-batch", "1",
                "--slots", *(("--metrics",) if metrics else ()), *flags,
            ),
            {},
            port=port,
        )  # fmt: skip


def numbers(*values: float) -> bytes:
    """The body of an inference request to the model in Triton."""
    return json.dumps({"inputs": [{"name": "NUMBERS", "shape": [len(values)], "datatype": "FP32", "data": values}]}).encode()


def fetch(address: Address, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """One exchange, without an event loop. Raises OSError or HTTPException."""
    connection = http.client.HTTPConnection(*address, timeout=PROBE_S)
    try:
        connection.request(method, path, body, {"content-type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def fetched(address: Address, path: str) -> Any:
    """The JSON there."""
    status, body = fetch(address, "GET", path)
    assert status == 200, body
    return json.loads(body)
