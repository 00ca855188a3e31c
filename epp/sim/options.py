"""What to simulate, and the flags of `epp sim` that say so. Not here: running it (server).

Every flag's help says what turning it changes, so that `epp sim --help` is enough to build a pool with a given bottleneck.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from epp.errors import ConfigError, Problem
from epp.sim.engine import EngineProfile

PORT_MAX = 65_535
MODEL_DEFAULT = "sim/llama-8b"


@dataclass(frozen=True, slots=True)
class SimOptions:
    """What to run: `count` engines on consecutive ports, or one on each of `ports`."""

    host: str = "127.0.0.1"
    port: int = 8000
    """Of the first engine; 0 lets the system choose each."""
    count: int = 1
    ports: tuple[int, ...] = ()
    model: str = MODEL_DEFAULT
    time_scale: float = 1.0
    """How many times faster than the simulated hardware."""
    tokens_per_chunk: int = 1
    """Tokens in one stream event; the first token never waits."""
    seed: int = 0
    """Of the first engine; the next ones count up from it, so that each has its own replies."""
    profile: EngineProfile = field(default_factory=EngineProfile)
    kv_events_port: int | None = None
    """Of the first engine's publisher of KV-cache events; 0 lets the system choose; None: they publish none."""
    kv_events_replay_port: int | None = None
    """Where missed ones can be asked for, likewise."""
    kv_events_topic: str = ""
    """Empty: `kv@ADDRESS@MODEL`."""

    def engine_ports(self) -> tuple[int, ...]:
        return self.ports or tuple(self.port + offset if self.port else 0 for offset in range(self.count))


def add_sim_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `epp sim`."""
    options = SimOptions()
    profile = options.profile
    add = parser.add_argument
    add("--host", default=options.host, help="IP address to listen on (default %(default)s)")
    add(
        "--port",
        type=_whole(0),
        default=options.port,
        help="port of the first engine, the others follow; 0: any free (default %(default)s)",
    )
    add("--count", type=_whole(1), default=options.count, help="engines, all in this process (default %(default)s)")
    add("--model", default=options.model, help="the model's name, as clients must send it (default %(default)s)")
    add("--time-scale", type=_above_zero, default=options.time_scale, metavar="X",
        help="run X times faster than the simulated hardware; 10 makes an 8 ms step 0.8 ms (default %(default)s)")  # fmt: skip
    add("--tokens-per-chunk", type=_whole(1), default=options.tokens_per_chunk, metavar="N",
        help="tokens in one streamed event; more saves CPU at a high time scale, the first token never waits (default %(default)s)")  # fmt: skip
    add("--max-running", type=_whole(1), default=profile.max_running, metavar="N",
        help="requests decoded together; more than that wait (vLLM's --max-num-seqs; default %(default)s)")  # fmt: skip
    add("--max-batched-tokens", type=_whole(1), default=profile.max_batched_tokens, metavar="N",
        help="tokens computed in one step; a longer prompt is prefilled in chunks (default %(default)s)")  # fmt: skip
    add("--kv-blocks", type=_whole(2), default=profile.kv_blocks, metavar="N",
        help="blocks of KV cache, shared by running requests and cached prefixes (vLLM's num_gpu_blocks; default %(default)s)")  # fmt: skip
    add("--block-tokens", type=_whole(1), default=profile.block_tokens, metavar="N",
        help="tokens in a block; only full blocks are cached (vLLM's --block-size; default %(default)s)")  # fmt: skip
    add("--step-base-ms", type=_above_zero, default=profile.step_base_s * 1e3, metavar="MS",
        help="time of an empty step, so of one token when alone (default %(default)g)")  # fmt: skip
    add("--prefill-token-us", type=_not_negative, default=profile.prefill_token_s * 1e6, metavar="US",
        help="time a step takes longer for each uncached prompt token (default %(default)g)")  # fmt: skip
    add("--decode-request-us", type=_not_negative, default=profile.decode_request_s * 1e6, metavar="US",
        help="time a step takes longer for each request in it (default %(default)g)")  # fmt: skip
    add("--kv-events-port", type=_whole(0), metavar="PORT",
        help="publish what happens to the KV cache (ZeroMQ, as vLLM does), the first engine at this port and the others at those that follow; "
             "0: any free (default: nothing is published)")  # fmt: skip
    add("--kv-events-replay-port", type=_whole(0), metavar="PORT",
        help="answer questions for missed events here, the other engines at the ports that follow (default: nowhere)")  # fmt: skip
    add("--kv-events-topic", default=options.kv_events_topic, metavar="TOPIC",
        help="what every event is published under (default: kv@ADDRESS@MODEL of the engine)")  # fmt: skip
    add("--seed", type=_whole(0), default=options.seed, help="replies are a function of the prompt and this (default %(default)s)")


def sim_options(args: argparse.Namespace) -> SimOptions:
    """From the flags of `add_sim_arguments`. Raises ConfigError."""
    profile = EngineProfile(
        max_running=args.max_running,
        max_batched_tokens=args.max_batched_tokens,
        kv_blocks=args.kv_blocks,
        block_tokens=args.block_tokens,
        step_base_s=args.step_base_ms / 1e3,
        prefill_token_s=args.prefill_token_us / 1e6,
        decode_request_s=args.decode_request_us / 1e6,
    )
    names = ("host", "port", "count", "model", "time_scale", "tokens_per_chunk", "seed",
             "kv_events_port", "kv_events_replay_port", "kv_events_topic")  # fmt: skip
    fields: dict[str, Any] = {name: getattr(args, name) for name in names}
    problems = [
        Problem(f"--{name.replace('_', '-')}", f"{first} for {args.count} engines goes beyond {PORT_MAX}")
        for name in ("port", "kv_events_port", "kv_events_replay_port")
        if (first := fields[name]) and first + args.count - 1 > PORT_MAX
    ]
    if problems:
        raise ConfigError("command line", problems)
    return SimOptions(**fields, profile=profile)


def _whole(minimum: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is below {minimum}")
        return value

    return number


def _above_zero(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _not_negative(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value
