"""May the picker see what it must, and is it there? API server, kinds, RBAC. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from epp.doctor.cluster_facts import ELECTION, METRICS_AUTH, Access, ServerFacts
from epp.doctor.cluster_model import GROUP, LLM_D, OLD_GROUP, PickerFacts
from epp.doctor.findings import Check, Finding, fail, ok, skipped, warn
from epp.doctor.probing import Missing

SKEW_WARN_S = 5.0
OBJECTIVES = ("inferenceobjectives", "inferencemodelrewrites")


def server(facts: ServerFacts) -> Iterator[Finding]:
    if facts.status in (401, 403):
        yield fail(
            f"the API server refuses us: {facts.error}",
            "the picker started with these credentials never knows its pool: NOT_SERVING",
            "renew them (`kubectl auth whoami` with the same --kubeconfig and --kube-context)",
        )
    elif facts.error:
        yield fail(
            f"the API server can't be asked: {facts.error}",
            "a picker that starts now never becomes ready; one that runs keeps its last view",
            "see --kubeconfig and --kube-context; in a pod, whether a NetworkPolicy lets it out to the API server",
        )
    else:
        yield ok(f"the API server answers: {facts.version}")


def clock(facts: ServerFacts) -> Iterator[Finding]:
    if facts.skew_s is None:
        yield skipped("the API server does not tell its time")
    elif abs(facts.skew_s) > SKEW_WARN_S:
        yield warn(
            f"the API server's clock is {abs(facts.skew_s):.0f} s {'ahead of' if facts.skew_s > 0 else 'behind'} this machine's",
            "tokens and certificates expire early or late; a Lease looks stale to people, logs do not line up",
            "run NTP (chrony) on the nodes and here",
        )


def kinds(facts: Mapping[str, frozenset[str]]) -> Iterator[Finding]:
    current = "inferencepools" in facts.get(f"{GROUP}/v1", ())
    old = "inferencepools" in facts.get(f"{OLD_GROUP}/v1alpha2", ())
    if not current and not old:
        yield fail(
            "the cluster has no InferencePool kind",
            "there is no pool to watch: the picker stays NOT_SERVING, and gateways reject HTTPRoutes that name one",
            "install the CRDs of the Gateway API Inference Extension (kubectl apply -f its manifests.yaml), or run without a pool: --endpoint-selector",
        )
    elif not current:
        yield warn(
            f"InferencePool exists in {OLD_GROUP}/v1alpha2 alone",
            "gateways of today (Istio 1.28, GKE, Envoy AI Gateway, agentgateway) read inference.networking.k8s.io/v1",
            f"install the v1 CRDs and move the pool; until then start the picker with --pool-group={OLD_GROUP}",
        )
    absent = [plural for plural in OBJECTIVES if not any(plural in facts.get(f"{group}/v1alpha2", ()) for group in (LLM_D, OLD_GROUP))]
    if absent:
        yield ok(f"no {' and no '.join(absent)} kind: every request has priority 0 and keeps its model's name")


def rbac(answers: Sequence[Access], pickers: Sequence[PickerFacts] | Missing) -> Iterator[Finding]:
    refused: dict[tuple[str, str, bool, str, str], list[str]] = {}
    for each in answers:
        needed = each.needed
        if not each.allowed and _matters(needed.when, pickers):
            refused.setdefault((needed.group, needed.resource, needed.namespaced, needed.why, each.subject), []).append(needed.verb)
    for (group, resource, namespaced, why, subject), verbs in refused.items():
        who = f"the service account {subject}" if subject else "the account you run this with"
        what = f"{resource}.{group}" if group else resource
        rule = f'{{apiGroups: ["{group}"], resources: [{resource}], verbs: [{", ".join(verbs)}]}}'
        say = warn if verbs == ["get"] and resource != "leases" else fail
        yield say(
            f"{who} may not {', '.join(verbs)} {what}, {why}",
            _without(resource),
            f"add to the picker's {'Role' if namespaced else 'ClusterRole'}: rules: [{rule}]",
        )
    if answers and not refused:
        subject = answers[0].subject
        yield ok(f"{f'the service account {subject}' if subject else 'this account'} may do all that the picker needs")


def _matters(flag: str, pickers: Sequence[PickerFacts] | Missing) -> bool:
    """What only a flag makes necessary counts where a picker has it; where its arguments are unknown, it does not."""
    if not flag:
        return True
    known = [] if isinstance(pickers, Missing) else [picker.options for picker in pickers if picker.options is not None]
    if flag == ELECTION:
        return any(options.ha_enable_leader_election for options in known)
    assert flag == METRICS_AUTH
    return any(options.metrics_endpoint_auth is not False for options in known)


def _without(resource: str) -> str:
    return {
        "pods": "it never knows an endpoint: NOT_SERVING, or 503 for every request",
        "inferencepools": "it never knows its pool: NOT_SERVING",
        "inferenceobjectives": "priorities are ignored: every request counts as priority 0",
        "inferencemodelrewrites": "models are not rewritten: 404 where the engines do not know the alias",
        "leases": "no replica becomes the leader: none is ready",
    }.get(resource, "/metrics answers 403 or 500 to Prometheus")


CHECKS = (
    Check("cluster-api", "the API server answers", ("server",), server),
    Check("cluster-clock", "the API server's clock agrees with ours", ("server",), clock),
    Check("cluster-kinds", "the InferencePool kind is installed", ("kinds",), kinds),
    Check("cluster-rbac", "the picker's account may do what the picker needs", ("access", "pickers?"), rbac),
)
