"""Model servers that serve /metrics and nothing else: one process, one port each.

The text has the size and shape of a busy vLLM server's (about 60 KB, 700 lines: its own histograms and counters with their `_created`
twins, the HTTP layer's, the Python process's), so that scraping costs the picker what it costs in production. The values are made up.
Successive scrapes give successive texts, rendered before the first is asked for, so that answering costs this process little.
"""

import argparse
import asyncio
import itertools
import json
import signal
from collections.abc import Iterator, Sequence

from aiohttp import web

DESCRIPTION = """\
Model servers that only serve a vLLM-shaped /metrics text, on as many ports of 127.0.0.1 as asked for. Prints {"ports": [...]} when
ready and runs until SIGTERM or SIGINT. `overhead` starts it by itself."""

VARIANTS = 8  # texts in rotation
MODEL = "meta-llama/Llama-3.1-8B-Instruct"
OWN = f'engine="0",model_name="{MODEL}"'
CACHE_CONFIG = (
    'block_size="16",cache_dtype="auto",enable_prefix_caching="True",engine="0",gpu_memory_utilization="0.92",'
    'kv_cache_memory_bytes="None",num_gpu_blocks="27696",num_cpu_blocks="None",prefix_caching_hash_algo="sha256",'
    'sliding_window="None",swap_space="4.0"'
)
CREATED = "1.7952272322623e+09"

TOKEN_EDGES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0, 20000.0)
QUEUE_EDGES = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
FIRST_TOKEN_EDGES = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
    640.0,
    2560.0,
)
STEP_EDGES = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
HISTOGRAMS = {
    "request_prompt_tokens": TOKEN_EDGES,
    "request_generation_tokens": TOKEN_EDGES,
    "iteration_tokens_total": TOKEN_EDGES,
    "request_max_num_generation_tokens": TOKEN_EDGES,
    "request_params_n": TOKEN_EDGES[:5],
    "request_params_max_tokens": TOKEN_EDGES,
    "time_to_first_token_seconds": FIRST_TOKEN_EDGES,
    "inter_token_latency_seconds": STEP_EDGES,
    "request_time_per_output_token_seconds": STEP_EDGES,
    "e2e_request_latency_seconds": QUEUE_EDGES,
    "request_queue_time_seconds": QUEUE_EDGES,
    "request_inference_time_seconds": QUEUE_EDGES,
    "request_prefill_time_seconds": QUEUE_EDGES,
    "request_decode_time_seconds": QUEUE_EDGES,
    "request_num_preemptions": TOKEN_EDGES[:7],
    "request_prefill_kv_computed_tokens": TOKEN_EDGES,
}
COUNTERS = {
    "prefix_cache_queries": [""],
    "prefix_cache_hits": [""],
    "external_prefix_cache_queries": [""],
    "external_prefix_cache_hits": [""],
    "mm_cache_queries": [""],
    "mm_cache_hits": [""],
    "num_preemptions": [""],
    "prompt_tokens": [""],
    "prompt_tokens_by_source": [f',source="{s}"' for s in ("local_compute", "local_cache_hit", "external_kv_transfer")],
    "prompt_tokens_cached": [""],
    "generation_tokens": [""],
    "request_success": [f',finished_reason="{r}"' for r in ("stop", "length", "abort", "error", "repetition")],
}
HANDLERS = ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/responses", "/v1/models", "/tokenize", "/health", "/version")


def _family(name: str, kind: str, samples: Sequence[str]) -> Iterator[str]:
    yield f"# HELP {name} {name.partition(':')[2] or name} of this server, as the engine describes it."
    yield f"# TYPE {name} {kind}"
    yield from samples


def _histogram(name: str, label_sets: Sequence[str], edges: Sequence[float], count: int) -> Iterator[str]:
    bounds = [*map(str, edges), "+Inf"]
    samples, created = [], []
    for labels in label_sets:
        separator, braced = ("," if labels else ""), (f"{{{labels}}}" if labels else "")
        samples += [
            f'{name}_bucket{{{labels}{separator}le="{bound}"}} {count * (i + 1) // len(bounds):.1f}' for i, bound in enumerate(bounds)
        ]
        samples += [f"{name}_count{braced} {count}.0", f"{name}_sum{braced} {count * 0.7310791015625}"]
        created.append(f"{name}_created{braced} {CREATED}")
    yield from _family(name, "histogram", samples)
    yield from _family(f"{name}_created", "gauge", created)


def _engine_lines(serial: int) -> Iterator[str]:
    running, waiting = 4 + serial % 3, serial % 2
    gauges = {
        "num_requests_running": [f"{{{OWN}}} {running}.0"],
        "num_requests_waiting": [f"{{{OWN}}} {waiting}.0"],
        "num_requests_waiting_by_reason": [f'{{{OWN},reason="{r}"}} {n}.0' for r, n in (("capacity", waiting), ("deferred", 0))],
        "engine_sleep_state": [
            f'{{{OWN},sleep_state="{s}"}} {n}.0' for s, n in (("awake", 1), ("weights_offloaded", 0), ("discard_all", 0))
        ],
        "kv_cache_usage_perc": [f"{{{OWN}}} {0.30 + serial / 100}"],
        "lora_requests_info": [f'{{max_lora="0",running_lora_adapters="",waiting_lora_adapters=""}} {CREATED}'],
        "cache_config_info": [f"{{{CACHE_CONFIG}}} 1.0"],
    }
    for name, samples in gauges.items():
        yield from _family(f"vllm:{name}", "gauge", [f"vllm:{name}{sample}" for sample in samples])
    for name, variants in COUNTERS.items():
        totals = [f"vllm:{name}_total{{{OWN}{extra}}} {26950 + 17 * serial}.0" for extra in variants]
        yield from _family(f"vllm:{name}_total", "counter", totals)
        yield from _family(f"vllm:{name}_created", "gauge", [f"vllm:{name}_created{{{OWN}{extra}}} {CREATED}" for extra in variants])
    for name, edges in HISTOGRAMS.items():
        yield from _histogram(f"vllm:{name}", [OWN], edges, 900 + serial)


def _http_lines(serial: int) -> Iterator[str]:
    totals = [f'http_requests_total{{handler="{h}",method="POST",status="{s}xx"}} {70 + serial}.0' for h in HANDLERS for s in (2, 4)]
    yield from _family("http_requests_total", "counter", totals)
    for kind in ("request", "response"):
        name = f"http_{kind}_size_bytes"
        sums = [f'{name}_{part}{{handler="{h}"}} {900 + serial}.0' for h in HANDLERS for part in ("count", "sum")]
        yield from _family(name, "summary", sums)
    yield from _histogram("http_request_duration_highr_seconds", [""], FIRST_TOKEN_EDGES, 180 + serial)
    handlers = [f'handler="{handler}",method="POST"' for handler in HANDLERS]
    yield from _histogram("http_request_duration_seconds", handlers, [0.1, 0.5, 1.0], 90 + serial)


def _process_lines(serial: int) -> Iterator[str]:
    for name in ("objects_collected", "objects_uncollectable", "collections"):
        full = f"python_gc_{name}_total"
        yield from _family(full, "counter", [f'{full}{{generation="{g}"}} {1543 >> g}.0' for g in range(3)])
    for name, value in (("virtual_memory_bytes", "2.022612992e+09"), ("resident_memory_bytes", "6.48220672e+08"), ("open_fds", "46.0")):
        yield from _family(f"process_{name}", "gauge", [f"process_{name} {value}"])
    yield from _family("process_cpu_seconds_total", "counter", [f"process_cpu_seconds_total {12 + serial}.27"])


def exposition(serial: int) -> bytes:
    """The text of the `serial`-th scrape."""
    return ("\n".join([*_process_lines(serial), *_engine_lines(serial), *_http_lines(serial)]) + "\n").encode()


async def start(count: int) -> tuple[web.AppRunner, list[int]]:
    """Serving on `count` free ports; await `cleanup()` of what is returned first."""
    texts = [exposition(serial) for serial in range(VARIANTS)]
    serials = itertools.count()

    async def metrics(_request: web.Request) -> web.Response:
        return web.Response(body=texts[next(serials) % VARIANTS], content_type="text/plain", charset="utf-8")

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    for _ in range(count):
        await web.TCPSite(runner, "127.0.0.1", 0).start()
    return runner, [address[1] for address in runner.addresses]


async def _serve(count: int) -> None:
    runner, ports = await start(count)
    stopping = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stopping.set)
    print(json.dumps({"ports": ports}), flush=True)
    await stopping.wait()
    await runner.cleanup()


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=16, help="how many servers (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    asyncio.run(_serve(args.count))
    return 0
