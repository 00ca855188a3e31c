"""Profile handlers: which profiles run, and what their results mean. Here is what those that split requests into stages share."""

from __future__ import annotations

from collections.abc import Sequence

from epp.errors import SaturatedError
from epp.plugins.base import RunProfile
from epp.types import Address, Decision, Endpoint, LLMRequest

PREFILL_HEADER = "x-prefiller-host-port"
ENCODE_HEADER = "x-encoder-hosts-ports"
DATA_PARALLEL_HEADER = "x-data-parallel-host-port"

DECISIONS_MAX = 4_000
"""Label sets counted: a thousand models, four kinds of decision."""

Decisions = dict[tuple[str, str], int]
"""How often, by model and kind."""
_KINDS = {
    (False, False): "decode-only",
    (False, True): "prefill-decode",
    (True, False): "encode-decode",
    (True, True): "encode-prefill-decode",
}


def count_decision(decisions: Decisions, request: LLMRequest, decision: Decision) -> None:
    """Models are named by clients: past the limit, new ones are `other`."""
    kind = _KINDS["encode" in decision.targets, "prefill" in decision.targets]
    key = (request.target_model or "unknown", kind)
    if key not in decisions and len(decisions) >= DECISIONS_MAX:
        key = ("other", kind)
    decisions[key] = decisions.get(key, 0) + 1


def run_decode(run: RunProfile, profile: str) -> Sequence[Endpoint]:
    """The stage no request can do without."""
    try:
        return run(profile)
    except SaturatedError as error:
        raise SaturatedError("failed to find available decode workers") from error


def run_if_any(run: RunProfile, profile: str) -> Sequence[Endpoint]:
    """A stage a request can do without: empty when nobody is left for it."""
    try:
        return run(profile)
    except SaturatedError:
        return ()


def at_port(endpoints: Sequence[Endpoint], port: int) -> str:
    """The endpoints' hosts at one port, as a destination: ranks of one server become one entry."""
    return ",".join(dict.fromkeys(str(Address(endpoint.spec.address.host, port)) for endpoint in endpoints))
