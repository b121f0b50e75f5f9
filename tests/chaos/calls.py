"""One HTTP connection to a daemon's Unix socket, with a hard limit on each call.  Knows nothing of sandboxes.

Not the SDK: what the daemon answers is looked at as it is.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from podflare.errors import BY_CODE

SLACK_S = 25.0
"""Above the documented limit of a call: the machine is loaded, and the daemon is stopped now and then."""


class Cut(Exception):
    """The connection ended before the answer was complete, or could not be made: the daemon is gone."""


class Violation(Exception):
    """The daemon did what it must never do."""


@dataclass
class Answer:
    """A complete answer."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The stable code of an error."""
        return str(self.json()["code"])

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.body.splitlines() if line]


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("podflare")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Caller:
    """Calls one after the other."""

    def __init__(self, uds: str) -> None:
        self._uds = uds
        self._connection: _Connection | None = None

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def call(self, method: str, path: str, body: Any = None, *, limit_s: float = 1.0) -> Answer:
        """Raises: Cut; Violation if it takes longer than `limit_s` and some slack, or if an error is none of ours."""
        with self._answering(method, path, body, limit_s) as (response, deadline):
            pieces = list(self._pieces(response, deadline))
            answer = Answer(response.status, b"".join(pieces), {k.lower(): v for k, v in response.getheaders()})
        _check(method, path, answer)
        return answer

    def leave(self, method: str, path: str, body: Any, *, limit_s: float) -> bytes:
        """Make a call and go away after the first bytes of its answer, which are returned."""
        try:
            with self._answering(method, path, body, limit_s) as (response, deadline):
                return next(self._pieces(response, deadline), b"")
        finally:
            self.close()

    @contextlib.contextmanager
    def _answering(
        self, method: str, path: str, body: Any, limit_s: float
    ) -> Iterator[tuple[http.client.HTTPResponse, float]]:
        start = time.monotonic()
        deadline = start + limit_s + SLACK_S
        try:
            if self._connection is None:
                self._connection = _Connection(self._uds)
            self._connection.timeout = limit_s + SLACK_S
            if self._connection.sock is not None:
                self._connection.sock.settimeout(limit_s + SLACK_S)
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            self._connection.request(method, path, data)
            yield self._connection.getresponse(), deadline
        except TimeoutError:
            self.close()
            took = time.monotonic() - start
            raise Violation(f"hang: {method} {path} had no end in {took:.1f} s, its limit is {limit_s:g} s") from None
        except (OSError, http.client.HTTPException) as exc:
            self.close()
            raise Cut(f"{method} {path}: {exc!r}") from exc

    def _pieces(self, response: http.client.HTTPResponse, deadline: float) -> Iterator[bytes]:
        if not response.chunked:
            yield response.read()
            return
        while piece := response.read1(1 << 16):
            yield piece
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            if self._connection is not None and self._connection.sock is not None:
                self._connection.sock.settimeout(left)


def _check(method: str, path: str, answer: Answer) -> None:
    """Every answer is a success or one of our errors."""
    if answer.ok:
        return
    try:
        body = answer.json()
        known = BY_CODE[body["code"]]
        told = isinstance(body["error"], str) and known.status == answer.status
    except (ValueError, KeyError, TypeError):
        raise Violation(f"{method} {path}: {answer.status} without an error of ours: {answer.body[:300]!r}") from None
    if not told or body["code"] == "podflare_error":
        raise Violation(f"{method} {path}: {answer.status} {answer.body[:300]!r}")
