"""A cluster's objects, as JSON, and what follows from several of them: which pods a pool has, which Deployment is its picker. Pure.

Plain dicts, not the structs of the watch (sources.kubernetes.objects): a diagnosis reads fields that routing never needs, and must show what is
wrong with an object instead of refusing it.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any, NoReturn

from epp.config.load import default_config, load
from epp.config.options import ServeOptions, add_serve_arguments, serve_options
from epp.config.schema import EndpointPickerConfig
from epp.doctor.documents import Json, items, message
from epp.errors import ConfigError, Problem
from epp.plugins.registry import Registry

GROUP = "inference.networking.k8s.io"
OLD_GROUP = "inference.networking.x-k8s.io"
LLM_D = "llm-d.ai"
EXT_PROC_PORT = 9002
HEALTH_PORT = 9003
FAULTS_SHOWN = 3
ALIKE = 0.8
"""Of labels: from here on one is taken for a misspelling of the other."""
_COMMANDS = frozenset({"epp", "/epp", "/app/epp", "serve", "python", "python3", "-m"})
_PICKER_FLAGS = ("-pool-name", "-endpoint-selector", "-grpc-health-port", "-ha-enable-leader-election")
_PICKER_NAME = re.compile(r"epp|picker|scheduler", re.IGNORECASE)
_VARIABLE = re.compile(r"\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)")


@dataclass(slots=True, kw_only=True)
class PoolFacts:
    """One InferencePool by name, in both API groups."""

    name: str
    namespace: str
    group: str
    """That the picker is told to look in (`--pool-group`)."""
    pool: Json | None = None
    """The object in `group`."""
    other: Json | None = None
    """The one of the same name in the other group."""

    @property
    def spec(self) -> Json:
        return message(self.pool, "spec")

    @property
    def selector(self) -> dict[str, str]:
        """v1: selector.matchLabels; v1alpha2: a flat map."""
        selector = message(self.spec, "selector")
        labels = message(selector, "matchLabels") if "matchLabels" in selector else selector
        return {str(key): str(value) for key, value in labels.items() if not isinstance(value, dict | list)}

    @property
    def ports(self) -> list[int]:
        old = self.spec.get("targetPortNumber")
        return (
            [int(old)]
            if old
            else [int(each["number"]) for each in items(self.spec, "targetPorts") if str(each.get("number", "")).isdigit()]
        )

    @property
    def reference(self) -> Json:
        return message(self.spec, "endpointPickerRef") or message(self.spec, "extensionRef")

    @property
    def reference_port(self) -> int | None:
        reference = self.reference
        port = message(reference, "port").get("number") or reference.get("portNumber")
        return int(port) if port else None


@dataclass(slots=True, kw_only=True)
class PickerFacts:
    """What a pool's endpointPickerRef leads to."""

    pool: PoolFacts
    service: Json | None = None
    port: Json = field(default_factory=dict)
    """The Service's port of that number; empty: it has none."""
    pods: Sequence[Json] = ()
    deployment: Json | None = None
    container: Json = field(default_factory=dict)
    arguments: Sequence[str] = ()
    options: ServeOptions | None = None
    fault: str = ""
    """Why the arguments can't be read."""
    config: EndpointPickerConfig | None = None
    """None: it can't be read from here, or has faults."""
    config_fault: str = ""

    @property
    def where(self) -> str:
        return f"Deployment {name_of(self.deployment)}" if self.deployment else f"pool {self.pool.name}"


def name_of(item: Mapping[str, Any] | None) -> str:
    return str(message(item, "metadata").get("name", ""))


def labels_of(item: Mapping[str, Any] | None) -> dict[str, str]:
    return {key: str(value) for key, value in message(item, "metadata", "labels").items()}


def namespace_of(item: Mapping[str, Any] | None) -> str:
    return str(message(item, "metadata").get("namespace", ""))


def selected(pods: Sequence[Json], labels: Mapping[str, str]) -> list[Json]:
    """No labels select nothing, as in a Service."""
    return [pod for pod in pods if labels and all(labels_of(pod).get(key) == value for key, value in labels.items())]


def ready(pod: Json) -> bool:
    conditions = {str(each.get("type")): each.get("status") for each in items(message(pod, "status"), "conditions")}
    gone = message(pod, "metadata").get("deletionTimestamp") or message(pod, "status").get("phase") in ("Succeeded", "Failed")
    return not gone and conditions.get("Ready") == "True" and bool(message(pod, "status").get("podIP"))


def not_ready_because(pod: Json) -> str:
    """In a few words, as `kubectl get pods` would."""
    if message(pod, "metadata").get("deletionTimestamp"):
        return "terminating"
    for each in items(message(pod, "status"), "containerStatuses"):
        reason = message(each, "state", "waiting").get("reason") or message(each, "state", "terminated").get("reason")
        if reason:
            return str(reason)
    for each in items(message(pod, "status"), "conditions"):
        if each.get("type") in ("PodScheduled", "Ready") and each.get("status") != "True" and each.get("reason"):
            return str(each["reason"])
    return str(message(pod, "status").get("phase") or "not ready")


def near_misses(pods: Sequence[Json], labels: Mapping[str, str], ports: Sequence[int] = ()) -> list[tuple[Json, str, str | None]]:
    """Pods that all but one label fit: (pod, the label, what it has there instead), the likeliest first.

    A selector of one label is missed by every pod there is; then a pod counts that has the label in another spelling, or one of the ports.
    """
    found = []
    for pod in pods:
        has = labels_of(pod)
        wrong = [key for key, value in labels.items() if has.get(key) != value]
        if len(wrong) != 1:
            continue
        (key,) = wrong
        other = key if key in has else _other_spelling(has, key, labels[key])
        likeness = 0.0 if other is None else SequenceMatcher(None, f"{key}={labels[key]}", f"{other}={has[other]}").ratio()
        serves = any(int(each.get("containerPort", 0)) in ports for container in pod_containers(pod) for each in items(container, "ports"))
        if len(labels) > 1 or serves or likeness >= ALIKE:
            found.append((serves, likeness, pod, key, None if other is None else f"{other}={has[other]}"))
    found.sort(key=lambda each: each[:2], reverse=True)
    return [each[2:] for each in found]


def _other_spelling(has: Mapping[str, str], key: str, value: str) -> str | None:
    plain = key.lower().replace("_", "-")
    alike = [each for each in has if each.lower().replace("_", "-") == plain]
    return next(iter([*alike, *(each for each, its in has.items() if its == value)]), None)


def pod_containers(workload_or_pod: Json) -> list[Json]:
    spec = message(workload_or_pod, "spec")
    return items(message(spec, "template", "spec") or spec, "containers")


def pickers(
    pools: Sequence[PoolFacts],
    services: Sequence[Json],
    pods: Sequence[Json],
    deployments: Sequence[Json],
    config_maps: Sequence[Json] = (),
) -> list[PickerFacts]:
    """For each pool that exists."""
    found = [_picker(pool, services, pods, deployments) for pool in pools if pool.pool is not None]
    for each in found:
        if each.options is not None:
            _read_config(each, each.options, config_maps)
    return found


def _read_config(facts: PickerFacts, options: ServeOptions, config_maps: Sequence[Json]) -> None:
    text = options.config_text or (_mounted(facts, options.config_file, config_maps) if options.config_file else "")
    if text is None:
        return
    try:
        found = load(text, source="configuration", catalogue=Registry(), allow_experimental=options.allow_experimental_plugins)
    except ConfigError as error:
        facts.config_fault = "; ".join(map(str, error.problems[:FAULTS_SHOWN]))
    else:
        facts.config = found if text else default_config()


def _mounted(facts: PickerFacts, path: str, config_maps: Sequence[Json]) -> str | None:
    """The file's text, out of the ConfigMap that is mounted there; None: not from a ConfigMap, or not to be read."""
    volumes = {
        str(each.get("name")): message(each, "configMap")
        for each in items(message(facts.deployment, "spec", "template", "spec"), "volumes")
    }
    for mount in items(facts.container, "volumeMounts"):
        directory = str(mount.get("mountPath", "")).rstrip("/")
        config_map = next((each for each in config_maps if name_of(each) == volumes.get(str(mount.get("name")), {}).get("name")), None)
        key = (
            path.removeprefix(f"{directory}/")
            if path.startswith(f"{directory}/")
            else str(mount.get("subPath", ""))
            if path == directory
            else ""
        )
        if key and config_map is not None:
            renamed = {str(each.get("path")): str(each.get("key")) for each in items(volumes[str(mount.get("name"))], "items")}
            key = renamed.get(key, key)
            return str(message(config_map, "data").get(key, "")) or None
    return None


def _picker(pool: PoolFacts, services: Sequence[Json], pods: Sequence[Json], deployments: Sequence[Json]) -> PickerFacts:
    facts = PickerFacts(pool=pool)
    facts.service = next((each for each in services if name_of(each) == pool.reference.get("name")), None)
    if facts.service is None:
        return facts
    wanted = pool.reference_port or EXT_PROC_PORT
    spec = message(facts.service, "spec")
    facts.port = next((each for each in items(spec, "ports") if each.get("port") == wanted), {})
    selector = {str(key): str(value) for key, value in message(spec, "selector").items()}
    facts.pods = selected(pods, selector)
    for deployment in deployments:
        labels = message(deployment, "spec", "template", "metadata", "labels")
        if selector and all(labels.get(key) == value for key, value in selector.items()):
            facts.deployment = deployment
            facts.container = _picker_container(deployment)
            facts.arguments = arguments(facts.container, pool.namespace)
            try:
                facts.options = parsed(facts.arguments)
            except ConfigError as error:
                facts.fault = "; ".join(map(str, error.problems))
            break
    return facts


def _picker_container(deployment: Json) -> Json:
    """The one with a picker's flags, else with a picker's name; else the first."""
    containers = pod_containers(deployment)
    by_flag = [each for each in containers if any(mark in str(word) for word in _words(each) for mark in _PICKER_FLAGS)]
    by_name = [each for each in containers if _PICKER_NAME.search(str(each.get("name", "")))]
    return next(iter([*by_flag, *by_name, *containers]), {})


def _words(container: Json) -> list[Any]:
    return [*(container.get("command") or []), *(container.get("args") or [])]


def arguments(container: Json, namespace: str) -> list[str]:
    """The picker's flags: without the program before them, $(NAME) replaced where the value is known."""
    words = [str(word) for word in _words(container)]
    at = next(
        (index for index, word in enumerate(words) if word not in _COMMANDS and not word.endswith(("/epp", "/python", "/python3"))),
        len(words),
    )
    env = {str(each.get("name")): _value(each, namespace) for each in items(container, "env")}
    return [_VARIABLE.sub(lambda match: env.get(match[1]) or match[0], word) for word in words[at:]]


def _value(variable: Json, namespace: str) -> str:
    path = message(variable, "valueFrom", "fieldRef").get("fieldPath")
    return namespace if path == "metadata.namespace" else str(variable.get("value") or "")


def parsed(words: Sequence[str]) -> ServeOptions:
    """By the parser of `epp serve` itself. Raises ConfigError."""
    parser = _Parser(prog="epp serve", add_help=False)
    add_serve_arguments(parser)
    return serve_options(parser.parse_args(list(words)))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError("args", [Problem("", message)])
