"""An engine family out of the configuration: `engineConfigs[]` of core-metrics-extractor.

A spec is `name` or `name{label=value,...}`, quotes optional. It is taken apart once; a reading is the same byte search as for the
built-in families. Where several series match, requests are summed and the fullest cache counts (the reference picker takes the first).

Cost: that of a built-in family, and its built-in namesake's where there is one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any, NamedTuple

from epp.datastore import NO_ATTRIBUTES, Reading
from epp.engines.detect import BUILT_IN
from epp.engines.exposition import VALUE_MAX, find_all, labels_of
from epp.engines.family import METRICS_PATHS, AsleepError, ReadingError, count, fullest, total
from epp.engines.sglang import by_rank
from epp.engines.vllm import adapters

_SPECS = (
    "queuedRequestsSpec",
    "runningRequestsSpec",
    "kvUsageSpec",
    "loraSpec",
    "cacheInfoSpec",
    "cacheBlockSizeSpec",
    "cacheNumBlocksSpec",
)
_LABEL_NAMES = {"cacheBlockSizeLabelName": "block_size", "cacheNumBlocksLabelName": "num_gpu_blocks"}
_FIELDS = frozenset({"name", "customMetrics", *_SPECS, *_LABEL_NAMES})

_SPEC = re.compile(r"\s*([a-zA-Z_:][a-zA-Z0-9_:]*)\s*(?:\{(.*)\}\s*)?", re.DOTALL)
_MATCHER = re.compile(r'\s*([a-zA-Z_][a-zA-Z0-9_]*)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^",{}\s]+))\s*(?:,|$)')
_LABEL_NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


class Spec(NamedTuple):
    """Series of one metric: those that have all these labels."""

    metric: bytes
    labels: tuple[tuple[str, str], ...] = ()

    @classmethod
    def parse(cls, text: str, field: str) -> Spec:
        """Raises ValueError, naming the field."""
        whole = _SPEC.fullmatch(text)
        if whole is None:
            raise ValueError(f"{field}: {text!r} is not `metric` or `metric{{label=value,...}}`")
        labels, at, inside = [], 0, (whole[2] or "").rstrip()
        while at < len(inside):
            matcher = _MATCHER.match(inside, at)
            if matcher is None:
                raise ValueError(f"{field}: {text!r}: {inside[at:]!r} is not `label=value`")
            value = matcher[3] if matcher[2] is None else re.sub(r"\\(.)", lambda match: "\n" if match[1] == "n" else match[1], matcher[2])
            labels.append((matcher[1], value))
            at = matcher.end()
        return cls(whole[1].encode(), tuple(labels))

    def samples(self, text: bytes) -> list[tuple[bytes, float]]:
        found = find_all(text, self.metric)
        return [sample for sample in found if self._fits(sample[0])] if self.labels else found

    def values(self, text: bytes) -> list[float]:
        """A load of each series; of an SGLang metric, of each data-parallel rank."""
        return self.per_series(self.samples(text))

    def per_series(self, samples: Sequence[tuple[bytes, float]]) -> list[float]:
        if self.metric.startswith(b"sglang:"):
            return by_rank(samples)
        return [value for _, value in samples if 0 <= value <= VALUE_MAX]

    def _fits(self, labels: bytes) -> bool:
        told = labels_of(labels)
        return all(told.get(name) == value for name, value in self.labels)


class CustomFamily:
    """An `epp.engines.family.EngineFamily`.

    Of a built-in family's name: what the configuration does not mention is read as the built-in one does. An empty spec says that the
    engine has no such metric.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """`config`: an entry of `engineConfigs`, its fields spelt as there. Raises ValueError."""
        unknown = sorted(set(config) - _FIELDS)
        if unknown:
            raise ValueError(f"unknown field {unknown[0]!r}; known are {', '.join(sorted(_FIELDS))}")
        self.name = _text(config, "name").strip()
        if not self.name:
            raise ValueError("name: must not be empty")
        self._built_in = BUILT_IN.get(self.name)
        self.paths = self._built_in.paths if self._built_in else METRICS_PATHS
        self._mentioned = frozenset(field for field in _SPECS if config.get(field) is not None)
        self._specs = {field: Spec.parse(text, field) for field in _SPECS if (text := _text(config, field).strip())}
        self._labels = {field: _label_name(config, field) or default for field, default in _LABEL_NAMES.items()}
        self._attributes = _custom_metrics(config.get("customMetrics") or ())
        if not (self._specs or self._attributes or self._built_in):
            raise ValueError(f"{self.name}: names no metric, and there is no built-in engine of that name")

    def read(self, text: bytes) -> Reading:
        found: dict[str, Any] = {}
        self._read_load(text, found)
        self._read_adapters(text, found)
        self._read_cache_size(text, found)
        reading = self._namesake(text)._replace(**found, attributes=self._read_attributes(text))
        if reading.waiting is None and reading.running is None and reading.kv_usage is None and not reading.attributes:
            raise ReadingError(f"none of the metrics configured for {self.name} in the answer")
        return reading

    def _namesake(self, text: bytes) -> Reading:
        """What the built-in family of this name makes of it. Raises AsleepError."""
        if self._built_in is None:
            return Reading()
        try:
            return self._built_in.read(text)
        except AsleepError:
            raise
        except ReadingError:
            return Reading()

    def _values(self, text: bytes, field: str) -> list[float]:
        spec = self._specs.get(field)
        return spec.values(text) if spec else []

    def _read_load(self, text: bytes, found: dict[str, Any]) -> None:
        if "queuedRequestsSpec" in self._mentioned:
            found["waiting"] = total(self._values(text, "queuedRequestsSpec"))
        if "runningRequestsSpec" in self._mentioned:
            found["running"] = total(self._values(text, "runningRequestsSpec"))
        if "kvUsageSpec" in self._mentioned:
            found["kv_usage"] = fullest(self._values(text, "kvUsageSpec"))

    def _read_adapters(self, text: bytes, found: dict[str, Any]) -> None:
        if "loraSpec" in self._mentioned:
            spec = self._specs.get("loraSpec")
            told = adapters(spec.samples(text)) if spec else (None, None, None)
            found["adapters_active"], found["adapters_waiting"], found["adapters_max"] = told

    def _read_cache_size(self, text: bytes, found: dict[str, Any]) -> None:
        """A gauge, where there is one, says more than a label. A label tells the size of the whole server, a gauge that of its series."""
        info = self._specs.get("cacheInfoSpec")
        told = info.samples(text) if info else []
        if self._mentioned & {"cacheInfoSpec", "cacheBlockSizeSpec"}:
            tokens = self._values(text, "cacheBlockSizeSpec") or self._counts(told, "cacheBlockSizeLabelName")
            found["kv_block_tokens"] = int(max(tokens, default=0)) or None
        if self._mentioned & {"cacheInfoSpec", "cacheNumBlocksSpec"}:
            blocks = int(sum(self._values(text, "cacheNumBlocksSpec")))
            found["kv_blocks"] = blocks or int(max(self._counts(told, "cacheNumBlocksLabelName"), default=0)) or None

    def _counts(self, samples: Sequence[tuple[bytes, float]], field: str) -> list[float]:
        return [float(count(labels_of(labels).get(self._labels[field]))) for labels, _ in samples]

    def _read_attributes(self, text: bytes) -> Mapping[str, float]:
        """Of each the first series that is a number: what it measures is not known here, so neither is what a sum would mean."""
        if not self._attributes:
            return NO_ATTRIBUTES
        found = {}
        for key, spec in self._attributes.items():
            value = next((value for _, value in spec.samples(text) if isfinite(value)), None)
            if value is not None:
                found[key] = value
        return found


def _text(config: Mapping[str, Any], field: str) -> str:
    value = config.get(field)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{field}: must be text, not {type(value).__name__}")
    return value or ""


def _label_name(config: Mapping[str, Any], field: str) -> str:
    name = _text(config, field).strip()
    if name and not _LABEL_NAME.fullmatch(name):
        raise ValueError(f"{field}: {name!r} is not the name of a label")
    return name


def _custom_metrics(entries: Any) -> dict[str, Spec]:
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise ValueError("customMetrics: must be a list")  # noqa: TRY004 - every fault of the configuration is a ValueError
    found: dict[str, Spec] = {}
    for number, entry in enumerate(entries):
        where = f"customMetrics[{number}]"
        if not isinstance(entry, Mapping) or set(entry) - {"attributeKey", "metricSpec"}:
            raise ValueError(f"{where}: must be attributeKey and metricSpec")
        key, text = _text(entry, "attributeKey").strip(), _text(entry, "metricSpec").strip()
        if not key or not text:
            raise ValueError(f"{where}: attributeKey and metricSpec must not be empty")
        if key in found:
            raise ValueError(f"{where}: attributeKey {key!r} is there twice")
        found[key] = Spec.parse(text, f"{where}.metricSpec")
    return found
