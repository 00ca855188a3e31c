"""What the README shows works as shown."""

import random
import re
import sys
from pathlib import Path

from epp.clock import VirtualClock
from epp.config.load import load
from epp.datastore import Datastore, Ticket
from epp.plugins.registry import Registry
from epp.scheduling.build import build
from epp.types import Address, EndpointSpec, LLMRequest

README = Path(__file__).parents[2] / "README.md"


def _block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)
    assert found
    return found[1]


def test_the_scorer_in_the_readme_decides(tmp_path, monkeypatch):
    code = _block("python")
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith("#")]) <= 15
    (tmp_path / "fewest_tokens.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry()
    built = build(load(_block("yaml"), source="README.md", catalogue=registry), registry, random.Random(1), VirtualClock())
    sys.modules.pop("fewest_tokens", None)

    datastore = Datastore(VirtualClock())
    datastore.apply([EndpointSpec(f"e{port}", Address("10.0.0.1", port)) for port in (1, 2, 3)])
    busy, idle, busier = datastore.ready.endpoints
    Ticket(busy, 10_000)
    Ticket(busier, 20_000)
    request = LLMRequest(id="r", path="/v1/models", headers={})
    assert built.scheduler.schedule(request, datastore.ready).endpoint is idle
    Ticket(idle, 40_000)
    assert built.scheduler.schedule(request, datastore.ready).endpoint is busy
