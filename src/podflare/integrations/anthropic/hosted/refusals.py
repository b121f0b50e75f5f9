"""Errors as the Messages API words them: our exceptions to a status and a body."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from podflare.errors import (
    BadRequest,
    Conflict,
    DeadlineExceeded,
    FileMissing,
    Forbidden,
    NoCapacity,
    NotBuilt,
    PodflareError,
    QuotaExceeded,
    SandboxNotFound,
    TooLarge,
    Unauthorized,
)

_TABLE: tuple[tuple[type[PodflareError], int, str], ...] = (
    (FileMissing, 404, "not_found_error"),
    (SandboxNotFound, 404, "not_found_error"),
    (TooLarge, 413, "request_too_large"),
    (Unauthorized, 401, "authentication_error"),
    (Forbidden, 403, "permission_error"),
    (QuotaExceeded, 429, "rate_limit_error"),
    (NoCapacity, 529, "overloaded_error"),
    (DeadlineExceeded, 504, "timeout_error"),
    (Conflict, 409, "invalid_request_error"),
    (NotBuilt, 400, "invalid_request_error"),
    (BadRequest, 400, "invalid_request_error"),
)


def classified(error: Exception) -> tuple[int, str]:
    """HTTP status and `error.type` for an exception."""
    for kind, status, name in _TABLE:
        if isinstance(error, kind):
            return status, name
    return 500, "api_error"


def body(error: Mapping[str, Any], request_id: str) -> dict[str, Any]:
    """The body of an error answer around its `error` object."""
    return {"type": "error", "error": dict(error), "request_id": request_id}


RETRIES = 2
"""Of a sampling after the first: what was run before it would be lost."""
_MAX_WAIT_S = 30.0


def retry_after_s(attempt: int, status: int | None, retry_after: str | None) -> float | None:
    """Seconds to wait before sampling again; None: give up.  `status` is None if there was no answer at all."""
    if attempt >= RETRIES or not (status is None or status in (408, 409, 429) or status >= 500):
        return None
    try:
        asked = float(retry_after) if retry_after is not None else 0.0
    except ValueError:
        asked = 0.0
    wait_s = asked if asked > 0 else 0.5 * 2**attempt
    return wait_s if wait_s <= _MAX_WAIT_S else None
