"""The border to HTTP: every failure becomes a class of podflare.errors, by the tables below.

What is raised is also an instance of the httpx class that callers of a bare HTTP client catch
(`HTTPStatusError` with its request and response, `ConnectError`, `ReadTimeout`, ...), and of OSError for file
operations.  The text is the daemon's own.
"""

from __future__ import annotations

import json
from typing import Any

import httpx

from podflare.client._calls import Call
from podflare.errors import (
    BY_CODE,
    BadRequest,
    Conflict,
    ConnectionLost,
    DaemonUnreachable,
    DeadlineExceeded,
    NoCapacity,
    NotBuilt,
    PodflareError,
    ProtocolError,
    QuotaExceeded,
    SandboxNotFound,
    TooLarge,
    Unauthorized,
)

MAX_ERROR_BODY_BYTES = 64 * 1024

_BY_STATUS: dict[int, type[PodflareError]] = {
    400: BadRequest,
    401: Unauthorized,
    403: Unauthorized,
    404: SandboxNotFound,
    409: Conflict,
    413: TooLarge,
    429: QuotaExceeded,
    501: NotBuilt,
    503: NoCapacity,
    504: DeadlineExceeded,
}
"""For daemons that send no `code`."""

_BY_HTTPX: tuple[tuple[type[Exception], type[PodflareError]], ...] = (
    (httpx.ConnectError, DaemonUnreachable),
    (httpx.ConnectTimeout, DaemonUnreachable),
    (httpx.TimeoutException, DeadlineExceeded),
    (httpx.NetworkError, ConnectionLost),
    (httpx.RemoteProtocolError, ConnectionLost),
    (httpx.ProxyError, DaemonUnreachable),
    (httpx.UnsupportedProtocol, BadRequest),
    (httpx.InvalidURL, BadRequest),
    (httpx.LocalProtocolError, BadRequest),
    (httpx.HTTPError, ProtocolError),
    (httpx.StreamError, ConnectionLost),
)
"""First match counts."""

FOREIGN: tuple[type[Exception], ...] = tuple(foreign for foreign, _ in _BY_HTTPX)
"""What `from_httpx` translates."""


_Composition = tuple[type[PodflareError], type[Exception], bool]
_compositions: dict[_Composition, type[PodflareError]] = {}


def _composed(ours: type[PodflareError], foreign: type[Exception], is_file: bool) -> type[PodflareError]:
    """Our class, which also is what callers of a bare HTTP client catch.  It shows and pickles as ours."""
    key = (ours, foreign, is_file)
    if key not in _compositions:
        _compositions[key] = _compose(*key)
    return _compositions[key]


def _compose(ours: type[PodflareError], foreign: type[Exception], is_file: bool) -> type[PodflareError]:
    bases: list[type] = [ours, foreign]
    if is_file and not issubclass(ours, OSError):
        bases.append(OSError)
    body = {
        "__module__": ours.__module__,
        "__qualname__": ours.__qualname__,
        "__doc__": ours.__doc__,
        "__init__": _init,
        "__str__": _text,
        "__reduce__": lambda self: (_rebuilt, (ours, foreign, is_file, str(self), dict(self.__dict__))),
    }
    return type(ours.__name__, tuple(bases), body)


def _init(self: PodflareError, message: str) -> None:
    # The bases' constructors want different arguments; the message and the attributes are all they keep.
    self.args = (message,)


def _text(self: PodflareError) -> str:
    return str(self.args[0]) if self.args else ""


def _rebuilt(
    ours: type[PodflareError], foreign: type[Exception], is_file: bool, message: str, attributes: dict[str, Any]
) -> PodflareError:
    exc = _composed(ours, foreign, is_file)(message)
    exc.__dict__.update(attributes)
    return exc


def _message(call: Call, text: str) -> str:
    where = f" [sandbox {call.sandbox_id}]" if call.sandbox_id and call.sandbox_id not in text else ""
    return f"{call.what} failed: {text}{where}"


def from_response(call: Call, response: httpx.Response, body: bytes) -> PodflareError:
    """The error that a non-2xx answer carries."""
    text, code = _read_error(body)
    ours = BY_CODE.get(code) if code else None
    if ours is None:
        ours = _BY_STATUS.get(response.status_code, PodflareError)
        if not text:
            ours = PodflareError
            text = f"HTTP {response.status_code} without podflare's error body: is the address a podflare daemon?"
    if ours is Unauthorized:
        text += " (pass api_key= or set PODFLARE_API_KEY)"
    return _with_response(call, ours, text, response)


def _with_response(call: Call, ours: type[PodflareError], text: str, response: httpx.Response) -> PodflareError:
    exc = _composed(ours, httpx.HTTPStatusError, call.is_file)(_message(call, text))
    exc.__dict__.update(_request=response.request, response=response)
    return exc


def _read_error(body: bytes) -> tuple[str, str]:
    """`error` and `code` of an error body; "" for what is not there."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return "", ""
    if not isinstance(value, dict):
        return "", ""
    text, code = value.get("error"), value.get("code")
    return (text if isinstance(text, str) else ""), (code if isinstance(code, str) else "")


def from_httpx(
    call: Call, exc: Exception, *, request: httpx.Request | None, address: str, explanation: str
) -> PodflareError:
    """The error for a request that got no complete answer.

    Args:
        explanation: what is known of the daemon's end, "" if nothing.
    """
    ours = next(ours for foreign, ours in _BY_HTTPX if isinstance(exc, foreign))
    reason = str(exc) or type(exc).__name__
    texts = {
        DaemonUnreachable: f"no daemon answers at {address} ({reason}): start `podflare serve` there, or check host=",
        DeadlineExceeded: f"the daemon at {address} sent nothing in time ({type(exc).__name__})",
        ConnectionLost: f"the daemon at {address} broke off ({reason}); whether it was carried out is not known",
    }
    text = explanation or texts.get(ours, f"{reason} (daemon at {address})")
    error = _composed(ours, type(exc), call.is_file)(_message(call, text))
    if isinstance(exc, httpx.HTTPError):
        error.__dict__["_request"] = request
    return error


def ended_here(what: str, sandbox_id: str, how: str) -> PodflareError:
    """The 404 that the daemon would answer for a sandbox that this program has ended, without asking it."""
    text = f"sandbox {sandbox_id} {how}"
    body = json.dumps({"error": text, "code": SandboxNotFound.code}).encode()
    request = httpx.Request("GET", f"http://localhost/v1/sandboxes/{sandbox_id}")
    response = httpx.Response(404, content=body, request=request)
    is_file = what in ("upload", "download")
    call = Call("GET", request.url.path, what, sandbox_id, is_file=is_file)
    return _with_response(call, SandboxNotFound, text, response)


def daemon_ended(what: str, sandbox_id: str, explanation: str) -> PodflareError:
    """For a sandbox whose private daemon is gone, without trying to connect."""
    error = _composed(DaemonUnreachable, httpx.ConnectError, True)(
        f"{what} failed: {explanation} [sandbox {sandbox_id}]"
    )
    error.__dict__["_request"] = httpx.Request("GET", f"http://localhost/v1/sandboxes/{sandbox_id}")
    return error
