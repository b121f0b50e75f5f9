"""client/_errors.py: one table from HTTP to our classes, which also are what httpx users catch."""

from __future__ import annotations

import inspect
import json
import pickle
from pathlib import Path

import httpx
import pytest

from podflare import errors
from podflare.client import _calls, _errors
from podflare.errors import BY_CODE, ConnectionLost, DaemonUnreachable, DeadlineExceeded, PodflareError

CALL = _calls.get("sbx_1")
FILE_CALL = _calls.download("sbx_1", "/x")
REQUEST = httpx.Request("GET", "http://daemon.test/v1/sandboxes/sbx_1")

HTTPX_ERRORS = sorted(
    (
        value
        for value in vars(httpx).values()
        if inspect.isclass(value) and issubclass(value, Exception) and value is not httpx.CookieConflict
    ),
    key=lambda cls: cls.__name__,
)
"""Everything httpx can raise, except a misuse of its cookie jar, which the SDK does not have."""


def answer(status: int, body: object) -> PodflareError:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = httpx.Response(status, content=content, request=REQUEST)
    return _errors.from_response(CALL, response, content)


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_every_code_becomes_its_class_and_an_http_status_error(code: str) -> None:
    """The `code` of an error body decides the class; httpx users find request and response on it."""
    exc = answer(418, {"error": "the reason", "code": code})
    assert isinstance(exc, BY_CODE[code])
    assert isinstance(exc, httpx.HTTPStatusError)
    assert (exc.response.status_code, exc.request.url) == (418, REQUEST.url)
    assert "the reason" in str(exc) and "sbx_1" in str(exc)
    assert type(exc).__name__ == BY_CODE[code].__name__


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, errors.BadRequest),
        (401, errors.Unauthorized),
        (404, errors.SandboxNotFound),
        (409, errors.Conflict),
        (413, errors.TooLarge),
        (429, errors.QuotaExceeded),
        (501, errors.NotBuilt),
        (503, errors.NoCapacity),
        (500, PodflareError),
    ],
)
def test_a_daemon_without_codes_is_understood_by_status(status: int, expected: type[PodflareError]) -> None:
    """A body with `error` alone, as the hosted service sends it, gives the class of its status."""
    assert type(answer(status, {"error": "why"})).__mro__[1] is expected


@pytest.mark.parametrize("body", [b"", b"<html>", b"[1]", b'{"detail":"Not Found"}', b"\xff\xfe", b"[" * 100_000])
def test_an_answer_that_is_not_podflares_says_so(body: bytes) -> None:
    """A 404 of some other server is not mistaken for a missing sandbox."""
    exc = answer(404, body)
    assert not isinstance(exc, errors.SandboxNotFound)
    assert "HTTP 404" in str(exc) and "podflare daemon?" in str(exc)


def test_unauthorized_says_what_to_do() -> None:
    """A refused key names the argument and the variable."""
    assert "PODFLARE_API_KEY" in str(answer(401, {"error": "invalid api key", "code": "unauthorized"}))


@pytest.mark.parametrize("foreign", HTTPX_ERRORS, ids=lambda cls: cls.__name__)
def test_every_httpx_error_is_translated(foreign: type[Exception]) -> None:
    """No exception class of httpx passes the border as itself, and each stays catchable as itself."""
    assert issubclass(foreign, _errors.FOREIGN)
    if foreign is httpx.HTTPStatusError or issubclass(foreign, httpx.StreamError):
        return  # never raised by a transport; composed with a response above
    exc = foreign("it broke")
    ours = _errors.from_httpx(CALL, exc, request=REQUEST, address="http://daemon.test", explanation="")
    assert isinstance(ours, PodflareError) and isinstance(ours, foreign)
    assert "look-up failed" in str(ours)


@pytest.mark.parametrize(
    ("foreign", "expected"),
    [
        (httpx.ConnectError, DaemonUnreachable),
        (httpx.ConnectTimeout, DaemonUnreachable),
        (httpx.ReadTimeout, DeadlineExceeded),
        (httpx.PoolTimeout, DeadlineExceeded),
        (httpx.ReadError, ConnectionLost),
        (httpx.WriteError, ConnectionLost),
        (httpx.RemoteProtocolError, ConnectionLost),
        (httpx.UnsupportedProtocol, errors.BadRequest),
    ],
)
def test_failed_connections_are_told_apart(foreign: type[Exception], expected: type[PodflareError]) -> None:
    """Not reached, silent, and broken off are three classes: only the first is surely harmless to repeat."""
    exc = _errors.from_httpx(CALL, foreign("x"), request=REQUEST, address="http://daemon.test", explanation="")
    assert isinstance(exc, expected)
    assert exc.request is REQUEST  # type: ignore[attr-defined]  # of the httpx half


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_file_operations_raise_os_errors(code: str) -> None:
    """Whatever goes wrong in upload and download is an IOError, as their users expect."""
    response = httpx.Response(400, request=REQUEST)
    exc = _errors.from_response(FILE_CALL, response, json.dumps({"error": "why", "code": code}).encode())
    assert isinstance(exc, OSError)
    assert str(exc).startswith("download failed: why")


def test_errors_survive_pickling() -> None:
    """An error raised in a worker process arrives in the parent with class, text and response."""
    exc = answer(404, {"error": "gone: idle for 60 s", "code": "sandbox_not_found"})
    copy = pickle.loads(pickle.dumps(exc))
    assert isinstance(copy, errors.SandboxNotFound) and isinstance(copy, httpx.HTTPStatusError)
    assert (str(copy), copy.response.status_code) == (str(exc), 404)


def test_the_explanation_of_a_dead_daemon_replaces_the_guess() -> None:
    """What is known of the daemon's end is the message."""
    exc = _errors.from_httpx(
        CALL, httpx.ReadError("reset"), request=REQUEST, address="unix:/x", explanation="it was killed"
    )
    assert str(exc) == "look-up failed: it was killed [sandbox sbx_1]"


def test_error_tree_in_the_docstring_is_complete() -> None:
    """Each exception class is drawn in the tree of errors.py."""
    drawn = Path(errors.__file__).read_text().partition('"""')[2].partition('"""')[0]
    for cls in BY_CODE.values():
        assert cls.__name__ in drawn
