"""How a request's time in flow control ends, and what those are told who get no further.

Statuses and drop reasons are the reference picker's (inventory 3.7). `retry_after_s`: what the header `retry-after` should say.
"""

from __future__ import annotations

from enum import StrEnum
from math import ceil

from epp.errors import EppError, NoEndpointsError, SaturatedError

RETRY_AFTER_MIN_S, RETRY_AFTER_MAX_S = 1, 60


class Outcome(StrEnum):
    """Of one request, exactly one: values of the metrics' label `outcome`."""

    DISPATCHED = "Dispatched"
    REJECTED_CAPACITY = "RejectedCapacity"
    REJECTED_NO_ENDPOINTS = "RejectedNoEndpoints"
    REJECTED_OTHER = "RejectedOther"
    EVICTED_TTL = "EvictedTTL"
    EVICTED_NO_ENDPOINTS = "EvictedNoEndpoints"
    EVICTED_CONTEXT_CANCELLED = "EvictedContextCancelled"
    EVICTED_OTHER = "EvictedOther"

    __hash__ = str.__hash__
    """Enum's own is a Python function."""


class QueueFullError(SaturatedError):
    """No room to wait: of its flow, its band, or at all."""

    code = "queue_full"

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DisplacedError(EppError):
    """It gave its place in a full queue to a request of a flow that has less queued, or of a higher priority."""

    http_status = 429
    code_name = "ResourceExhausted"
    type = "rate_limit_error"
    code = "queue_pressure"
    dropped_reason = "evicted-queue-pressure"

    def __init__(self, retry_after_s: int) -> None:
        super().__init__("the queue is full, and others with less in it come first")
        self.retry_after_s = retry_after_s


class RateLimitedError(EppError):
    """Its tenant has had the tokens it may have."""

    http_status = 429
    code_name = "ResourceExhausted"
    type = "rate_limit_error"
    code = "token_rate_exceeded"
    dropped_reason = "rejected-rate-limited"

    def __init__(self, limit_tokens: int, window_s: float, free_s: float) -> None:
        super().__init__(f"more than {limit_tokens} tokens in {window_s:g} s")
        self.retry_after_s = max(RETRY_AFTER_MIN_S, ceil(free_s))


class QueueTimeoutError(EppError):
    """It waited as long as it may."""

    http_status = 429
    code_name = "ResourceExhausted"
    type = "rate_limit_error"
    code = "queue_timeout"
    dropped_reason = "rejected-ttl-expired"

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(f"request timed out in queue: {message}")
        self.retry_after_s = retry_after_s


class NoEndpointsWhileQueuedError(NoEndpointsError):
    """The pool is empty, and there is no room, or no time, to wait for an endpoint."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class EvictedError(EppError):
    """It was running and gave way to requests of higher priority."""

    http_status = 429
    code_name = "ResourceExhausted"
    type = "rate_limit_error"
    code = "evicted"
    dropped_reason = "evicted"

    def __init__(self, retry_after_s: int = RETRY_AFTER_MIN_S) -> None:
        super().__init__("request evicted by flow control")
        self.retry_after_s = retry_after_s
