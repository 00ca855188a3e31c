"""An ext_proc server as a process of its own, whose memory can be told from its client's: `python -m tests.integration.streams_server`.

Prints its port, then for every line it is sent a line of JSON: what it holds.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
from pathlib import Path

from epp.extproc.h2_policy import H2Limits
from epp.extproc.health import Health
from epp.extproc.server import H2Server
from epp.extproc.session import Session
from tests.builders import core

PAGE_BYTES = 4096


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


async def main() -> None:
    world = core(4)
    server = H2Server(
        health=Health(),
        session_limits=world.limits,
        limits=H2Limits(message_bytes_max=1 << 20),
        clock=world.clock,
        new_session=lambda _authority: Session(world.director, world.limits, world.clock),
    )
    await server.start("127.0.0.1", 0)
    say(str(server.port))
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        gc.collect()
        held = {
            "streams": server.open_streams,
            "charged": world.inflight,
            "requests": sum(series.requests for series in world.metrics._series.values()),
            "rss_bytes": rss_bytes(),
            "asked": line.strip(),
        }
        say(json.dumps(held))
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(main())
