"""The one place where an error becomes an answer to the client (protocol reference, section 5)."""

from __future__ import annotations

import msgspec

from epp.errors import EppError
from epp.extproc.messages import Immediate

DROPPED_REASON = "x-llm-d-request-dropped-reason"
RETRY_AFTER_S = 1
"""Told with every 429 that knows no better."""
GRPC_STATUS = {400: 3, 401: 16, 403: 7, 404: 5, 408: 4, 412: 9, 413: 8, 429: 8, 431: 8, 500: 13, 503: 14}
"""HTTP status -> gRPC status, for clients that speak gRPC to the gateway."""
GRPC_UNKNOWN = 2


def immediate(error: EppError, *, grpc: bool) -> Immediate:
    """An OpenAI-style JSON error; `grpc`: the client speaks gRPC and gets a status it understands."""
    code = _utf8(error.code)
    body = msgspec.json.encode({"error": {"message": _utf8(error.message), "type": _utf8(error.type), "code": code}})
    headers = {"content-type": "application/json"}
    if error.dropped_reason:
        headers[DROPPED_REASON] = error.dropped_reason
    retry_s = getattr(error, "retry_after_s", 0) or (RETRY_AFTER_S if error.http_status == 429 else 0)
    if retry_s:
        headers["retry-after"] = str(retry_s)
    grpc_status = GRPC_STATUS.get(error.http_status, GRPC_UNKNOWN) if grpc else None
    return Immediate(error.http_status, body, headers, grpc_status=grpc_status, details=f"epp_{code}")


def _utf8(text: str) -> str:
    """An error may be a third party's plugin's: what UTF-8 can't say of it becomes question marks."""
    return text.encode(errors="replace").decode()
