"""What there is to know of model servers, asked one by one from here: their metrics as the picker reads them, and their models."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from epp.datastore import Reading
from epp.doctor.http_fetch import Http, json_of
from epp.doctor.probing import ProbeError
from epp.engines.detect import BUILT_IN, family_for
from epp.engines.family import ReadingError

ENGINES_MAX = 64
"""Engines asked; of a larger pool, the first."""
ENGINES_AT_ONCE = 16
MODELS_MAX = 1_000
_PATHS = tuple(dict.fromkeys(path for family in BUILT_IN.values() for path in family.paths))


@dataclass(slots=True, kw_only=True)
class EngineFacts:
    """One model server, asked from here."""

    name: str
    address: str
    error: str = ""
    """Why its metrics could not be read; empty: they were."""
    family: str = ""
    reading: Reading | None = None
    models: frozenset[str] | None = None
    """None: it does not tell."""
    skew_s: float | None = None


@dataclass(slots=True, kw_only=True)
class EndpointFacts:
    """One endpoint as the picker sees it (`/debug/endpoints`), or as given on the command line."""

    name: str
    address: str
    state: str = ""
    engine: str = ""
    reading_age_s: float | None = None
    known_to_picker: bool = True


async def ask_engines(http: Http, endpoints: Sequence[EndpointFacts]) -> list[EngineFacts]:
    """The first `ENGINES_MAX` of them, several at a time. Raises nothing: what goes wrong is in the facts."""
    turns = asyncio.Semaphore(ENGINES_AT_ONCE)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(_ask(http, endpoint, turns)) for endpoint in endpoints[:ENGINES_MAX]]
    return [task.result() for task in tasks]


async def _ask(http: Http, endpoint: EndpointFacts, turns: asyncio.Semaphore) -> EngineFacts:
    facts = EngineFacts(name=endpoint.name, address=endpoint.address)
    async with turns:
        for path in _PATHS:
            try:
                answer = await http.get(f"http://{endpoint.address}{path}")
            except ProbeError as error:
                facts.error = str(error)
                return facts
            facts.skew_s = answer.skew_s
            family = family_for(endpoint.engine, answer.body) if answer.status == 200 else None
            if family is None:
                facts.error = facts.error or f"{answer.url} answers {answer.status}, nothing any known engine would say"
                continue
            facts.family, facts.error = family.name, ""
            try:
                facts.reading = family.read(answer.body)
            except ReadingError as error:
                facts.error = f"{answer.url}: {error}"
            break
        facts.models = await _models(http, endpoint)
    return facts


async def _models(http: Http, endpoint: EndpointFacts) -> frozenset[str] | None:
    try:
        answer = await http.get(f"http://{endpoint.address}/v1/models")
        return frozenset(str(model["id"]) for model in json_of(answer)["data"][:MODELS_MAX]) if answer.status == 200 else None
    except (ProbeError, KeyError, TypeError):
        return None
