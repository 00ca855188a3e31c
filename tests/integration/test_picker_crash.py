"""What a background task that fails does to the rest: nobody is sent to a picker whose port is closing."""

from __future__ import annotations

import asyncio

import pytest

from epp.app import Picker
from epp.config.options import ServeOptions


class Broken:
    """A source with a bug."""

    what = "broken"
    poll_errors_total = 0

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def run(self) -> None:
        await self.go.wait()
        raise RuntimeError("a bug")


async def test_health_is_down_before_the_port_closes() -> None:
    options = ServeOptions(
        endpoints=("127.0.0.1:1",), bind_address="127.0.0.1", grpc_port=0, grpc_health_port=0, metrics_port=0, secure_serving=False
    )
    picker = Picker(options)
    source = Broken()
    picker._files.append(source)  # type: ignore[arg-type]
    seen: list[bool] = []
    stop = picker.ext_proc.stop

    async def watched(grace_s: float) -> None:
        seen.append(picker.health.serving("readiness"))
        await stop(grace_s)

    picker.ext_proc.stop = watched  # type: ignore[method-assign]

    async def serve() -> None:
        async with picker.serving():
            assert picker.health.serving("readiness")
            source.go.set()
            await asyncio.Event().wait()

    with pytest.raises(BaseExceptionGroup) as raised:
        await asyncio.wait_for(serve(), 30)
    assert raised.group_contains(RuntimeError, match="a bug")
    assert seen == [False]
