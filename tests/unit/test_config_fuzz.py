"""Any document at all is loaded or refused with ConfigError; what is loaded can be completed, written out and loaded again."""

import json
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from epp.config.defaults import NAMED_PROFILES
from epp.config.document import parse
from epp.config.effective import to_yaml
from epp.config.load import load, resolve_defaults
from epp.errors import ConfigError
from tests.shelf import HEAD, ROLES, Shelf

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(sorted(ROLES))
    | st.sampled_from(["1Gi", "5k", "60s", "-1s", "flowControl", "flowControl=true", "dataLayer", "llm-d.ai/v1alpha1", "1e99999999999"])
)
FIELDS = [
    "apiVersion", "kind", "featureGates", "profile", "plugins", "schedulingProfiles", "dataLayer", "flowControl", "requestHandler",
    "saturationDetector", "parser", "name", "type", "parameters", "size", "pluginRef", "weight", "sources", "extractors", "discovery",
    "peerDiscovery", "crossReplicaSyncerPluginRef", "crossReplicaSyncInterval", "injectDefaults", "parsers", "maxBytes", "maxRequests",
    "defaultRequestTTL", "noEndpointRequestTTL", "defaultPriorityBand", "defaultNegativePriorityBand", "priorityBands", "priority",
    "fairnessPolicyRef", "orderingPolicyRef", "usageLimitPolicyPluginRef", "enableEviction",
]  # fmt: skip
ANY = st.recursive(
    SCALARS,
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=4), children, max_size=5),
    max_leaves=12,
)
NAMES = st.text(min_size=1, max_size=4) | SCALARS
REF = st.fixed_dictionaries({"pluginRef": st.sampled_from(sorted(ROLES)) | ANY})
BAND = st.fixed_dictionaries(
    {}, optional={"priority": ANY, "maxBytes": ANY, "maxRequests": ANY, "fairnessPolicyRef": SCALARS, "orderingPolicyRef": SCALARS}
)
SHAPED = st.fixed_dictionaries(
    {"apiVersion": st.just("llm-d.ai/v1alpha1"), "kind": st.just("EndpointPickerConfig")},
    optional={
        "featureGates": st.lists(SCALARS, max_size=3),
        "profile": st.sampled_from([*NAMED_PROFILES, "", None]) | SCALARS,
        "plugins": st.lists(st.fixed_dictionaries({"type": st.sampled_from(sorted(ROLES)), "name": NAMES}), max_size=4) | st.lists(ANY),
        "schedulingProfiles": st.lists(st.fixed_dictionaries({"name": NAMES}, optional={"plugins": st.lists(REF)}), max_size=2),
        "dataLayer": st.fixed_dictionaries(
            {}, optional={"sources": st.lists(REF, max_size=2), "discovery": REF, "injectDefaults": SCALARS}
        ),
        "requestHandler": st.fixed_dictionaries({"parsers": st.lists(REF, max_size=2)}),
        "parser": REF,
        "saturationDetector": REF | ANY,
        "flowControl": st.fixed_dictionaries(
            {},
            optional={
                "maxBytes": SCALARS,
                "defaultRequestTTL": SCALARS,
                "noEndpointRequestTTL": SCALARS,
                "defaultPriorityBand": BAND,
                "defaultNegativePriorityBand": BAND,
                "priorityBands": st.lists(BAND, max_size=3),
                "usageLimitPolicyPluginRef": SCALARS,
                "saturationDetector": REF,
            },
        ),
    },
)


def try_it(text: str) -> None:
    try:
        config = load(text, source="fuzz", catalogue=Shelf(), allow_experimental=True)
    except ConfigError:
        return
    complete = resolve_defaults(config, Shelf())
    assert resolve_defaults(complete, Shelf()) == complete
    written = to_yaml(config, Shelf())
    assert to_yaml(load(written, source="again", catalogue=Shelf(), allow_experimental=True), Shelf()) == written


@settings(deadline=None, max_examples=200)
@given(SHAPED)
def test_documents_of_about_the_right_shape(document: dict[str, Any]) -> None:
    try_it(yaml.safe_dump(document))


@settings(deadline=None)
@given(ANY)
def test_documents_of_any_shape(document: Any) -> None:
    try_it(json.dumps(document))
    try_it(yaml.safe_dump(document))


@settings(deadline=None)
@given(st.text())
def test_any_text(text: str) -> None:
    try_it(text)
    try_it(HEAD + text)


def test_half_a_surrogate_pair() -> None:
    for text in ('{"kind": "\\ud800"}', "kind: \udcff", '{"kind": "\udcff"}'):
        document, (problem,) = parse(text)
        assert document is None
        assert "UTF-8" in problem.message or "surrogate" in problem.message
    assert parse('{"kind": "\\ud83d\\ude00"}') == ({"kind": "\U0001f600"}, [])
