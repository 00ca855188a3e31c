"""InferenceObjective and InferenceModelRewrite objects from a file, read again when it changes: what Kubernetes would hand over, without it.

The file is what `kubectl apply -f` takes: documents divided by `---`, or a List of `items`.

    apiVersion: llm-d.ai/v1alpha2            # or inference.networking.x-k8s.io/v1alpha2, its older name
    kind: InferenceModelRewrite
    metadata: {name: canary}
    spec:
      poolRef: {name: pool}
      rules:
      - matches: [{model: {value: chat}}]    # none: every other model
        targets: [{modelRewrite: chat-v1, weight: 90}, {modelRewrite: chat-v2, weight: 10}]

Stricter than an API server where it would store what can never work: a misspelt field, a rule without targets, an empty model name, an
object given twice. `status` and whatever else is in `metadata` are passed over. The same object under both API groups counts once, as
the newer group has it.

An object of an API server (`object_of`) is read alike, but for unknown fields: the server has refused those it does not know.

Not here: noticing changes (watched_file), which rule wins (epp.resources). Cost: a change is read on the event loop, about 20 ms for
100 objects in YAML, 3 ms in JSON.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Collection, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from epp.aio import Sleep
from epp.config.document import DOCUMENT_BYTES_MAX, NODES_MAX, parse
from epp.config.walk import Walk, kind, suggestion
from epp.errors import ConfigError, Problem
from epp.parsing.model_name import CHARS_MAX
from epp.resources import NAMESPACE, POOL_GROUP, Choice, Objective, Resources, Rewrite, Rule
from epp.sources.watched_file import INTERVAL_S, PROBLEMS_LOGGED_MAX, WatchedFile

API_VERSION = "llm-d.ai/v1alpha2"
API_VERSION_OLD = "inference.networking.x-k8s.io/v1alpha2"
OBJECTIVE, REWRITE = "InferenceObjective", "InferenceModelRewrite"
DOCUMENTS_MAX = 10_000
"""Limit on the documents of a file."""
WEIGHT_MAX = 1_000_000
PRIORITY_MIN, PRIORITY_MAX = -(1 << 31), (1 << 31) - 1

_LISTS = {"List": ("v1",), f"{OBJECTIVE}List": (API_VERSION, API_VERSION_OLD), f"{REWRITE}List": (API_VERSION, API_VERSION_OLD)}
_DIVIDER = re.compile(r"^---(?=\s|\Z)", re.MULTILINE)
"""YAML's only meaning of this at the start of a line, even within a block of text."""
_HEAD = re.compile(r"(?:[ \t]*(?:#.*)?\n|%.*\n)*[ \t]*(?:#.*)?")
"""Comments and directives: no document of their own where they are all there is before the first divider."""
_TIME = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)", re.ASCII)


class _Form(NamedTuple):
    """What an API server takes for a name of some sort."""

    pattern: re.Pattern[str]
    chars_max: int
    words: str


_SUBDOMAIN = _Form(
    re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"),
    253,
    "letters a-z, digits, - and ., with a letter or digit at both ends and beside each .",
)
_LABEL = _Form(re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"), 63, "letters a-z, digits and -, with a letter or digit at both ends")
_KIND = _Form(re.compile(r"[a-zA-Z]([-a-zA-Z0-9]*[a-zA-Z0-9])?"), 63, "letters, digits and -, with a letter first and no - last")


class _Key(NamedTuple):
    kind: str
    namespace: str
    name: str
    old: bool
    """Under the older API group."""


_NO_KEY = _Key("", "", "", old=False)


class _Stored(Walk):
    """Of objects an API server has checked: what is unknown here is of a newer version, as for any client of Kubernetes."""

    def mapping(self, value: Any, path: str, known: Collection[str]) -> Mapping[str, Any]:
        if isinstance(value, Mapping):
            value = {key: item for key, item in value.items() if key in known}
        return super().mapping(value, path, known)


class _Found(NamedTuple):
    item: Objective | Rewrite
    path: str


def parse_resources(text: str, *, source: str) -> tuple[list[Objective], list[Rewrite]]:
    """The objects in this text, in its order. Raises ConfigError with every fault."""
    walk = Walk()
    found: dict[_Key, _Found] = {}
    written = 0
    for document, path in _documents(walk, text):
        written += 1
        for item, at in _objects(walk, document, path):
            key, made = _object(walk, item, at)
            if made is None or not all(key[:3]):
                continue
            known = found.setdefault(key, _Found(made, at))
            if known.path != at:
                walk.fault(at, f"{key.namespace}/{key.name} is given already at {known.path}")
    if not written and not walk.problems:
        walk.fault("", "is empty; write `{apiVersion: v1, kind: List, items: []}` for no objects")
    if walk.problems:
        raise ConfigError(source, walk.problems)
    items = [its.item for key, its in found.items() if not (key.old and key._replace(old=False) in found)]
    return [item for item in items if isinstance(item, Objective)], [item for item in items if isinstance(item, Rewrite)]


def object_of(item: Any, *, source: str) -> Objective | Rewrite:
    """One object as an API server stores it. Raises ConfigError with every fault."""
    walk = _Stored()
    _, made = _object(walk, item, "")
    if walk.problems or made is None:
        raise ConfigError(source, [Problem(problem.path.removeprefix("."), problem.message) for problem in walk.problems])
    return made


def _parts(walk: Walk, text: str) -> list[tuple[int, str]]:
    """Where each document begins, and its text."""
    if len(text.encode(errors="replace")) > DOCUMENT_BYTES_MAX:
        walk.fault("", f"larger than {DOCUMENT_BYTES_MAX} bytes")
        return []
    starts = [match.start() for match in _DIVIDER.finditer(text)]
    if not (starts and _HEAD.fullmatch(text, 0, starts[0])):
        starts.insert(0, 0)
    if len(starts) > DOCUMENTS_MAX:
        walk.fault("", f"{len(starts)} documents, the limit is {DOCUMENTS_MAX}")
        return []
    return [(start, text[start:end]) for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def _documents(walk: Walk, text: str) -> Iterator[tuple[Any, str]]:
    """Each document that is not empty, and its path. Faults of the text are noted with their line in the file."""
    nodes_left = NODES_MAX
    for i, (start, part) in enumerate(_parts(walk, text)):
        path = f"document[{i}]"
        document, faults = parse(part)
        if faults and len(walk.problems) >= PROBLEMS_LOGGED_MAX:
            walk.fault(path, "can't be read either; looked no further")
            return
        if faults and start:  # once more, with its lines counted from the start of the file
            faults = parse("\n" * text.count("\n", 0, start) + part)[1]
        for fault in faults:
            walk.fault(path + ("." if fault.path and not fault.path.startswith("[") else "") + fault.path, fault.message)
        if document is None:
            continue
        nodes_left -= _nodes(document, nodes_left)
        if nodes_left < 0:
            walk.fault(path, f"with the documents before, more than {NODES_MAX} values, aliases expanded")
            return
        yield document, path


def _nodes(document: Any, enough: int) -> int:
    """How many values there are in it; stops counting past `enough`."""
    count = 0
    rest = [document]
    while rest and count <= enough:
        value = rest.pop()
        count += 1
        if isinstance(value, dict):
            rest.extend(value.values())
        elif isinstance(value, list):
            rest.extend(value)
    return count


def _objects(walk: Walk, document: Any, path: str) -> Iterator[tuple[Any, str]]:
    """The document, or what is in it if it is a List."""
    versions = _LISTS.get(str(document.get("kind"))) if isinstance(document, Mapping) else None
    if versions is None:
        yield document, path
        return
    fields = walk.mapping(document, path, ("apiVersion", "kind", "metadata", "items"))
    _one_of(walk, fields.get("apiVersion"), f"{path}.apiVersion", versions)
    for i, item in enumerate(walk.items(fields.get("items"), f"{path}.items")):
        if isinstance(item, Mapping) and str(item.get("kind")) in _LISTS:
            walk.fault(f"{path}.items[{i}].kind", "a list can't be in a list")
        else:
            yield item, f"{path}.items[{i}]"


def _object(walk: Walk, item: Any, path: str) -> tuple[_Key, Objective | Rewrite | None]:
    """What it is and says; nothing, or empty names, after a fault."""
    fields = walk.mapping(item, path, ("apiVersion", "kind", "metadata", "spec", "status"))
    if not isinstance(item, Mapping):
        return _NO_KEY, None
    version = _one_of(walk, fields.get("apiVersion"), f"{path}.apiVersion", (API_VERSION, API_VERSION_OLD))
    kind_ = walk.text(fields.get("kind"), f"{path}.kind", required=True)
    if kind_ and kind_ not in (OBJECTIVE, REWRITE):
        walk.fault(f"{path}.kind", f"unknown kind {kind_!r}{suggestion(kind_, (OBJECTIVE, REWRITE, 'List'))}")
    if kind_ not in (OBJECTIVE, REWRITE):
        return _NO_KEY, None
    name, namespace, created_s = _metadata(walk, fields.get("metadata"), f"{path}.metadata")
    key = _Key(kind_, namespace, name, old=version == API_VERSION_OLD)
    spec = _mapping(walk, fields.get("spec"), f"{path}.spec", ("poolRef", "priority" if kind_ == OBJECTIVE else "rules"))
    if spec is None:
        return key, None
    pool_name, pool_group = _pool(walk, spec.get("poolRef"), f"{path}.spec.poolRef")
    if kind_ == OBJECTIVE:
        priority = _whole(walk, spec.get("priority", 0), f"{path}.spec.priority", PRIORITY_MIN, PRIORITY_MAX)
        return key, Objective(name, namespace, priority, pool_name, pool_group)
    return key, Rewrite(name, namespace, _rules(walk, spec, f"{path}.spec.rules"), created_s, pool_name, pool_group)


def _metadata(walk: Walk, value: Any, path: str) -> tuple[str, str, float]:
    """Name, namespace (both empty after a fault) and the time of creation."""
    if value is not None and not isinstance(value, Mapping):
        walk.fault(path, f"must be a mapping, not {kind(value)}")
        return "", "", math.inf
    fields: Mapping[str, Any] = value or {}
    name = walk.text(fields.get("name"), f"{path}.name", required=True)
    name = _like(walk, name, f"{path}.name", _SUBDOMAIN)
    namespace = walk.text(fields.get("namespace"), f"{path}.namespace") or NAMESPACE
    namespace = _like(walk, namespace, f"{path}.namespace", _LABEL)
    return name, namespace, _created_s(walk, fields.get("creationTimestamp"), f"{path}.creationTimestamp")


def _created_s(walk: Walk, value: Any, path: str) -> float:
    if value is None:
        return math.inf
    moment = value if isinstance(value, datetime) else None  # as YAML reads a time without quotes
    if isinstance(value, str) and _TIME.fullmatch(value):
        try:
            moment = datetime.fromisoformat(value.upper())
        except ValueError:  # the 31st of February
            moment = None
    if moment is None or moment.tzinfo is None:
        walk.fault(path, f"must be a time like 2026-01-31T12:00:00Z, not {_shown(value)}")
        return math.inf
    return moment.timestamp()


def _pool(walk: Walk, value: Any, path: str) -> tuple[str, str]:
    fields = _mapping(walk, value, path, ("group", "kind", "name"))
    if fields is None:
        return "", ""
    group = POOL_GROUP
    if "group" in fields:
        group = walk.text(fields["group"], f"{path}.group")
        group = _like(walk, group, f"{path}.group", _SUBDOMAIN)
    if "kind" in fields:
        kind_ = walk.text(fields["kind"], f"{path}.kind", required=True)
        _like(walk, kind_, f"{path}.kind", _KIND)
    name = walk.text(fields.get("name"), f"{path}.name", required=True)
    if len(name) > 253:
        walk.fault(f"{path}.name", "is longer than 253 characters")
    return name, group


def _rules(walk: Walk, spec: Mapping[str, Any], path: str) -> tuple[Rule, ...]:
    if "rules" not in spec:
        walk.fault(path, "is missing; write [] for none")
    rules = []
    for i, item in enumerate(walk.items(spec.get("rules"), path)):
        at = f"{path}[{i}]"
        fields = walk.mapping(item, at, ("matches", "targets"))
        matches = walk.items(fields.get("matches"), f"{at}.matches")
        targets = walk.items(fields.get("targets"), f"{at}.targets")
        if isinstance(item, Mapping) and fields.get("targets", []) == []:
            walk.fault(f"{at}.targets", "is missing; a rule needs one target or more")
        rules.append(
            Rule(
                tuple(_match(walk, match, f"{at}.matches[{j}]") for j, match in enumerate(matches)),
                tuple(_target(walk, target, f"{at}.targets[{j}]") for j, target in enumerate(targets)),
            )
        )
    return tuple(rules)


def _match(walk: Walk, item: Any, path: str) -> str:
    fields = walk.mapping(item, path, ("model",))
    if not isinstance(item, Mapping):
        return ""
    model = _mapping(walk, fields.get("model"), f"{path}.model", ("type", "value"))
    if model is None:
        return ""
    if "type" in model:
        _one_of(walk, model["type"], f"{path}.model.type", ("Exact",))
    return _model(walk, model.get("value"), f"{path}.model.value")


def _target(walk: Walk, item: Any, path: str) -> Choice:
    fields = walk.mapping(item, path, ("modelRewrite", "weight"))
    if not isinstance(item, Mapping):
        return Choice("")
    weight = _whole(walk, fields["weight"], f"{path}.weight", 1, WEIGHT_MAX) if "weight" in fields else None
    return Choice(_model(walk, fields.get("modelRewrite"), f"{path}.modelRewrite"), weight)


def _model(walk: Walk, value: Any, path: str) -> str:
    model = walk.text(value, path, required=True)
    if len(model) > CHARS_MAX:
        walk.fault(path, f"is longer than {CHARS_MAX} characters")
    return model


def _mapping(walk: Walk, value: Any, path: str, known: Collection[str]) -> Mapping[str, Any] | None:
    """A mapping that has to be there; None, and a fault, if there is none."""
    if value is None:
        walk.fault(path, "is missing")
        return None
    fields = walk.mapping(value, path, known)
    return fields if isinstance(value, Mapping) else None


def _one_of(walk: Walk, value: Any, path: str, allowed: Collection[str]) -> str:
    """The text if it is one of these, else empty, and a fault."""
    text = walk.text(value, path, required=True)
    if not text or text in allowed:
        return text
    walk.fault(path, f"{text!r} is not {' or '.join(allowed)}")
    return ""


def _like(walk: Walk, text: str, path: str, form: _Form) -> str:
    """The text if it is empty or fits, else empty, and a fault."""
    if not text or (len(text) <= form.chars_max and form.pattern.fullmatch(text)):
        return text
    walk.fault(path, f"must be {form.words}; at most {form.chars_max} characters")
    return ""


def _whole(walk: Walk, value: Any, path: str, lowest: int, highest: int) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and lowest <= value <= highest:
        return value
    walk.fault(path, f"must be a whole number from {lowest} to {highest}, not {_shown(value)}")
    return 0


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else kind(value)


class ResourcesFile(WatchedFile):
    """Keeps the tables of objectives and rewrites as the file says."""

    what: ClassVar[str] = "resources"

    def __init__(self, path: Path, resources: Resources, *, interval_s: float = INTERVAL_S, sleep: Sleep = asyncio.sleep) -> None:
        super().__init__(path, interval_s=interval_s, sleep=sleep)
        self._resources = resources

    def _apply(self, text: str) -> Mapping[str, int]:
        objectives, rewrites = parse_resources(text, source=str(self._path))
        try:
            self._resources.apply(objectives, rewrites)
        except ValueError as error:
            raise ConfigError(str(self._path), [Problem("", str(error))]) from None
        return self._resources.counts._asdict()
