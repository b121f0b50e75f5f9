# Generated from _async/connection.py by scripts/unasync.py: change that file, not this one.
"""One daemon, as one holder of credentials talks to it: calls in, bytes and events out.

Knows HTTP and the error border; knows no operations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator

import httpx

from podflare.client import _embedded, _errors, _transport
from podflare.client._calls import Call, EventReader, ResultBuilder
from podflare.client._concurrency import in_thread_sync
from podflare.client._config import READ_TIMEOUT_S, Address
from podflare.client._files import Source
from podflare.client._notices import warn_of_end
from podflare.client._transport import SyncTransport
from podflare.client._types import Event, ExecResult
from podflare.errors import ConnectionLost, PodflareError


class Connection:
    """A lease on the connections to `address`.  Whoever made it closes it."""

    def __init__(
        self,
        address: Address,
        *,
        api_key: str | None = None,
        traceparent: str | None = None,
        read_timeout_s: float = READ_TIMEOUT_S,
        transport: SyncTransport | None = None,
    ) -> None:
        """`transport` replaces the network: it belongs to the caller."""
        self.address = address
        self._fixed = transport
        self._leased: SyncTransport | None = None
        self._generation = -1
        self._timeouts = {"timeout": _transport.timeouts(read_timeout_s)}
        # identity: lines must arrive when they are produced, not when a compressor is full.
        self._headers = {"accept-encoding": "identity", "user-agent": "podflare-python"}
        if api_key is not None:
            self._headers["authorization"] = f"Bearer {api_key}"
        if traceparent is not None:
            self._headers["traceparent"] = traceparent

    def _transport(self) -> SyncTransport:
        if self._fixed is not None:
            return self._fixed
        if self._leased is None or self._generation != _transport.generation():
            self._leased = _transport.acquire_sync(self.address)
            self._generation = _transport.generation()
        return self._leased

    def close(self) -> None:
        """Give the lease back.  Idempotent; a later call takes a new one."""
        leased, self._leased = self._leased, None
        if leased is not None:
            _transport.release_sync(self.address, leased)

    def call(self, call: Call, *, source: Source | None = None, read_timeout_s: float | None = None) -> bytes:
        """The body of the 2xx answer.

        Raises: the PodflareError that the daemon's answer or the failed connection stands for.
        """
        try:
            return self._read(call, self._send(call, source, read_timeout_s))
        except ConnectionLost:
            if not call.repeatable:
                raise
        # A kept connection may be closed by the daemon in the moment it is used again.
        return self._read(call, self._send(call, source, read_timeout_s))

    def run(self, call: Call) -> ExecResult:
        """The whole result of an exec call."""
        reader, builder = EventReader(), ResultBuilder()
        with contextlib.closing(self.stream(call)) as pieces:
            for piece in pieces:
                warn_of_end(builder.add(reader.feed(piece)))
        builder.add(reader.finish())
        return builder.build()

    def events(self, call: Call) -> Generator[Event, None, None]:
        """The events of an exec or replay call, as they come.  Nothing is sent until iterated."""
        reader = EventReader()
        with contextlib.closing(self.stream(call)) as pieces:
            for piece in pieces:
                for event in reader.feed(piece):
                    yield event
        for event in reader.finish():
            yield event

    def stream(self, call: Call) -> Generator[bytes, None, None]:
        """The body of the 2xx answer in pieces, decoded.  Closing the iterator ends the request."""
        response = self._send(call, None, None)
        try:
            yield from response.iter_bytes()
        except _errors.FOREIGN as exc:
            raise self._lost(call, response.request, exc) from exc
        finally:
            response.close()

    def _send(self, call: Call, source: Source | None, read_timeout_s: float | None) -> httpx.Response:
        request = self._request(call, source, read_timeout_s)
        try:
            response = self._transport().handle_request(request)
        except _errors.FOREIGN as exc:
            raise self._lost(call, request, exc) from exc
        response.request = request
        _transport.note_socket_sync(response)
        if response.is_success:
            return response
        raise _errors.from_response(call, response, self._read_error(response))

    def _request(self, call: Call, source: Source | None, read_timeout_s: float | None) -> httpx.Request:
        headers = {**self._headers, **call.headers}
        if call.body is not None:
            headers["content-type"] = "application/json"
        timeouts = self._timeouts
        if read_timeout_s is not None:
            timeouts = {"timeout": _transport.timeouts(read_timeout_s)}
        content = source.pieces_sync() if source is not None else call.body
        try:
            url = self.address.base_url + call.path
            return httpx.Request(call.method, url, headers=headers, content=content, extensions=timeouts)
        except _errors.FOREIGN as exc:
            raise self._failed(call, None, exc, "") from exc

    def _read(self, call: Call, response: httpx.Response) -> bytes:
        try:
            return response.read()
        except _errors.FOREIGN as exc:
            raise self._lost(call, response.request, exc) from exc
        finally:
            response.close()

    def _read_error(self, response: httpx.Response) -> bytes:
        """The start of an error body; what cannot be read of it is left out."""
        body = b""
        try:
            for piece in response.iter_bytes():
                body += piece
                if len(body) > _errors.MAX_ERROR_BODY_BYTES:
                    break
        except _errors.FOREIGN:
            return b""
        finally:
            response.close()
        return body

    def _lost(self, call: Call, request: httpx.Request, exc: Exception) -> PodflareError:
        explanation = ""
        if self.address.embedded:
            explanation = in_thread_sync(_embedded.ending, self.address)
        return self._failed(call, request, exc, explanation)

    def _failed(self, call: Call, request: httpx.Request | None, exc: Exception, explanation: str) -> PodflareError:
        return _errors.from_httpx(call, exc, request=request, address=str(self.address), explanation=explanation)
