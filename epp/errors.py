"""Every error the picker can answer with: one tree.

Each class carries its HTTP status, the OpenAI `type` and `code` of the answer, the code name the `error_code` metric label uses
(the reference picker's names) and, where a request was dropped on purpose, the drop reason. They become an ImmediateResponse in
one place, `extproc.session`. Messages are shown to clients: never put a prompt, a token or a secret in one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


class EppError(Exception):
    """Base of all. An error nobody foresaw is answered as this one: 500."""

    http_status: ClassVar[int] = 500
    code_name: ClassVar[str] = "Internal"
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    dropped_reason: ClassVar[str] = ""
    retry_after_s: int = 0
    """What the header retry-after says; 0: nothing of its own."""

    @property
    def message(self) -> str:
        return str(self)


class BadRequestError(EppError):
    """The client's request can't be understood."""

    http_status = 400
    code_name = "BadRequest"
    type = "invalid_request_error"
    code = "bad_request"


class GatewayError(EppError):
    """The gateway is configured in a way the picker can't work with; says what to change there."""

    code = "gateway_misconfigured"


class NotFoundError(EppError):
    """A path no inference engine serves, or (later) a model nobody has."""

    http_status = 404
    code_name = "NotFound"
    type = "invalid_request_error"
    code = "not_found"


class ModelNotFoundError(NotFoundError):
    """Every endpoint says which models it serves, and none serves this one."""

    code = "model_not_found"


class BodyTooLargeError(BadRequestError):
    """The request body passed `--max-body-bytes`."""

    http_status = 413
    code_name = "PayloadTooLarge"
    code = "body_too_large"


class TooManyHeadersError(BadRequestError):
    """The request has more headers than `--max-header-count`."""

    http_status = 431
    code_name = "RequestHeaderFieldsTooLarge"
    code = "too_many_headers"


class DecisionTimeoutError(BadRequestError):
    """The request's body stopped coming for `--decision-timeout`."""

    http_status = 408
    code_name = "RequestTimeout"
    code = "decision_timeout"


class NoEndpointsError(EppError):
    """No ready endpoint, or none in the subset the gateway asked for."""

    http_status = 503
    code_name = "ServiceUnavailable"
    type = "service_unavailable_error"
    code = "no_endpoints"
    dropped_reason = "rejected-no-endpoints"


class PreconditionFailedError(EppError):
    """The client asked to be served only where its prompt's prefix is cached (`Prefer: if-available`); where it would go it is not known to be."""

    http_status = 412
    code_name = "PreconditionFailed"
    type = "invalid_request_error"
    code = "prefix_not_cached"


class BuffersFullError(EppError):
    """The picker holds as many request bodies as `--max-buffered-bytes` allows."""

    http_status = 503
    code_name = "ServiceUnavailable"
    type = "service_unavailable_error"
    code = "buffers_full"
    dropped_reason = "rejected-saturated"


class SaturatedError(EppError):
    """Every candidate was filtered out."""

    http_status = 429
    code_name = "ResourceExhausted"
    type = "rate_limit_error"
    code = "saturated"
    dropped_reason = "rejected-saturated"


def shed(retry_after_s: int = 0) -> SaturatedError:
    """For a request that may be refused while the pool is full, and is. 0: nobody knows when to come back."""
    error = SaturatedError("system saturated, sheddable request dropped")
    error.retry_after_s = retry_after_s
    return error


class ShuttingDownError(EppError):
    """The picker stopped taking requests."""

    http_status = 503
    code_name = "ServiceUnavailable"
    type = "service_unavailable_error"
    code = "shutting_down"
    dropped_reason = "rejected-shutting-down"


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault in a configuration: where (`schedulingProfiles[0].plugins[1].weight`) and what to change."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class ConfigError(Exception):
    """A configuration that can't be used; carries every fault found, not just the first. Exit code 2."""

    def __init__(self, source: str, problems: list[Problem]) -> None:
        self.source = source
        self.problems = problems
        super().__init__(f"{source}: {len(problems)} problem{'s' if len(problems) != 1 else ''}\n" + "\n".join(f"  {p}" for p in problems))


class StartError(Exception):
    """The program can't start (a port in use, a missing file): one clear line, exit code 1."""
