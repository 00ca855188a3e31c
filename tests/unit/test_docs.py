"""What README.md and docs/ show works as shown: files load, answers and series have the names they are told by."""

from __future__ import annotations

import random
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest
import yaml

from epp.admission import refusals
from epp.admission.settings import settings_of
from epp.app import Picker
from epp.clock import MonotonicClock, VirtualClock
from epp.config.load import load
from epp.config.options import ServeOptions
from epp.datastore import Datastore
from epp.errors import EppError, SaturatedError, ShuttingDownError
from epp.extproc.session import Session
from epp.plugins.detectors.predicted_wait import PredictedWaitDetector
from epp.plugins.flow_control.policies import RoundRobinFairnessPolicy
from epp.plugins.flow_control.tenants import ApiKeyIdentity
from epp.plugins.registry import Registry
from epp.resources import Resources
from epp.scheduling.build import Built, build
from epp.sources.files import FileSource
from epp.sources.resources import ResourcesFile
from tests.builders import Stream, chat, request_body, request_headers

ROOT = Path(__file__).parents[2]
README, DOCS = ROOT / "README.md", ROOT / "docs"
TOKENIZER = ROOT / "tests/data/tokenize"


def shown(page: Path, language: str) -> list[str]:
    found = re.finditer(rf"^( *)```{language}\n(.*?)^\1```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [dedent(each[2]) for each in found]


FILES = [
    pytest.param(page.name, text, id=f"{page.stem}-{number}")
    for page in (README, *sorted(DOCS.glob("*.md")))
    for number, text in enumerate(shown(page, "yaml"))
]


def built_of(text: str, name: str) -> Built:
    registry = Registry()
    config = load(text, source=name, catalogue=registry)
    assert config.warnings == ()
    return build(config, registry, random.Random(1), VirtualClock())


@pytest.fixture
def own_scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The README's module, where its configuration looks for it."""
    (tmp_path / "fewest_tokens.py").write_text(shown(README, "python")[0])
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("fewest_tokens", None)


@pytest.mark.usefixtures("own_scorer")
@pytest.mark.parametrize(("page", "text"), FILES)
def test_every_file_that_is_shown_can_be_loaded(page: str, text: str, tmp_path: Path) -> None:
    file = tmp_path / "shown.yaml"
    file.write_text(text)
    documents = list(yaml.safe_load_all(text))
    if documents[0].get("kind") == "EndpointPickerConfig":
        built_of(text, page)
    elif "endpoints" in documents[0]:
        datastore = Datastore(VirtualClock())
        FileSource(file, datastore).load()
        assert len(datastore.endpoints) == len(documents[0]["endpoints"])
    else:
        resources = Resources(random.Random(1))
        ResourcesFile(file, resources).load()
        assert resources.counts.objectives == len(documents)


def test_pages_with_files() -> None:
    """A page whose fences are written otherwise would be passed over in silence."""
    fences = {page.name: page.read_text().count("```yaml") for page in (README, *DOCS.glob("*.md"))}
    counted = {name: len([each for each in FILES if each.values[0] == name]) for name in fences}
    assert counted == fences
    assert counted["flow-control.md"] == 2
    assert counted["precise-prefix.md"] == 2


def test_flow_control_is_configured_as_its_page_says() -> None:
    built = built_of(shown(DOCS / "flow-control.md", "yaml")[0], "flow-control.md")
    settings = settings_of(built.config.flow_control, built.plugins)
    assert built.config.flow_control_mode == "on"
    assert isinstance(built.scheduler.detector, PredictedWaitDetector)
    assert [(band.priority, band.ttl_s) for band in settings.bands] == [(10, 5.0), (-1, 600.0)]
    assert isinstance(settings.band(3).fairness, RoundRobinFairnessPolicy), "a priority without a band: the template's"
    assert (settings.ttl_s, settings.no_endpoints_ttl_s, settings.eviction) == (30.0, 300.0, True)
    (identity,) = settings.identities
    assert isinstance(identity, ApiKeyIdentity)
    assert settings.token_rate is not None
    assert (settings.token_rate.limit("batch-team"), settings.token_rate.limit("somebody")) == (20_000, 200_000)


def test_every_answer_of_flow_control_is_on_its_page() -> None:
    text = (DOCS / "flow-control.md").read_text(encoding="utf-8")
    told = set(re.findall(r"^\| (\d+) \| `(\w+)` \| (?:`([\w-]+)`)? *\|", text, re.MULTILINE))
    own = [each for each in vars(refusals).values() if isinstance(each, type) and issubclass(each, EppError) and each.dropped_reason]
    wanted = {(str(each.http_status), each.code, each.dropped_reason) for each in (*own, SaturatedError, ShuttingDownError)}
    assert told == wanted | {("400", "bad_request", "")}


@pytest.mark.parametrize("page", ["flow-control", "precise-prefix"])
async def test_every_series_on_the_page_is_exposed(page: str, tmp_path: Path) -> None:
    path = DOCS / f"{page}.md"
    for each in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / each, tmp_path)
    shutil.copy(TOKENIZER / "chatml.jinja", tmp_path / "chat_template.jinja")
    config = shown(path, "yaml")[0].replace("/models/qwen3-8b", str(tmp_path))
    picker = Picker(ServeOptions(endpoints=("10.0.0.1:8000",), config_text=config, secure_serving=False, check_models=False))
    await picker.kv_routing.start()
    assert picker.director is not None
    stream = Stream(Session(picker.director, picker.session_limits, MonotonicClock()))
    stream.send(request_headers(), request_body(chat("hello"), end_of_stream=True))
    stream.close()
    exposed = set(re.findall(r"^# TYPE (\S+) ", picker.metrics.exposition()[0].decode(), re.MULTILINE))
    named = set(re.findall(r"`((?:llm_d_epp|epp)_\w+)`", path.read_text(encoding="utf-8")))
    assert len(named) >= 7
    assert named - exposed == set()
