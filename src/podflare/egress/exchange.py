"""HTTP/1.1 requests of one client connection, each sent on to where a `Course` says, bodies streamed.

Knows neither policies nor secrets.  Both sides are hostile: what is passed on is what h11 understood, written anew.
"""

from __future__ import annotations

from typing import Protocol

import anyio
import h11
from anyio.abc import ByteStream

from podflare.egress.journal import printable
from podflare.egress.streams import CHUNK, SILENCE_S, join

MAX_HEAD_BYTES = 64 * 1024
"""Of a request's or an answer's line and headers."""
KEEP_ALIVE_S = 120.0
_DRAIN_S = 1.0
_STREAM_ERRORS = (OSError, anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError)
"""How a stream fails; a TimeoutError is an OSError."""
_ERRORS = (*_STREAM_ERRORS, h11.RemoteProtocolError, h11.LocalProtocolError)


class Denied(Exception):
    """The request is not sent on.  The text is for the client."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Course(Protocol):
    """Where the requests of one connection go."""

    async def open(self, request: h11.Request) -> tuple[h11.Request, ByteStream]:
        """What to send for `request`, and where to.  The stream stays the course's.  Raises: Denied."""

    def answered(self, headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """The headers of an answer as the client may see them."""

    async def done(self, *, reusable: bool) -> None:
        """The request and its answer are over; the stream may be used for another one, or not."""


class Exchange:
    """One client connection, which stays the caller's."""

    def __init__(self, client: ByteStream, course: Course) -> None:
        self._client = client
        self._course = course
        self._down = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)

    async def run(self) -> tuple[h11.Request, bytes] | None:
        """Serve until the client ends, or breaks HTTP.

        Returns: a CONNECT request and the bytes after it, for the caller to deal with; else None.
        """
        try:
            while True:
                with anyio.fail_after(KEEP_ALIVE_S):
                    event = await _next(self._down, self._client)
                if not isinstance(event, h11.Request):
                    return None
                if event.method == b"CONNECT":
                    return event, bytes(self._down.trailing_data[0])
                if not await self._one(event):
                    return None
                self._down.start_next_cycle()
        except (h11.RemoteProtocolError, h11.LocalProtocolError) as error:
            await self.refuse(getattr(error, "error_status_hint", 400), f"this is not HTTP/1.1: {error}")
        except _STREAM_ERRORS:
            pass  # the client is gone
        return None

    async def refuse(self, status: int, text: str) -> None:
        """Answer with an error of our own, if it is still time for one; the connection ends after it."""
        if self._down.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        body = text.encode("ascii", "replace") + b"\n"
        headers = [("Content-Type", "text/plain"), ("Content-Length", str(len(body))), ("Connection", "close")]
        try:
            # In the status line too, which is all that many programs show.
            reason = f"podflare egress: {printable(text)}".encode("ascii")
            data = self._down.send(h11.Response(status_code=status, headers=headers, reason=reason)) or b""
            data += self._down.send(h11.Data(data=body)) or b""
            data += self._down.send(h11.EndOfMessage()) or b""
            await self._client.send(data)
            # A close with bytes unread would be a reset, which can overtake the answer.
            await self._client.send_eof()
            with anyio.move_on_after(_DRAIN_S):
                while True:
                    await self._client.receive(CHUNK)
        except (*_ERRORS, NotImplementedError):
            pass  # who does not want the answer does not get it

    async def _one(self, request: h11.Request) -> bool:
        """One request and its answer.  Returns whether another one may follow."""
        try:
            sent, upstream = await self._course.open(request)
        except Denied as denied:
            await self.refuse(denied.status, str(denied))
            return False
        up = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD_BYTES)
        failure: Exception | None = None
        switched = False
        try:
            async with anyio.create_task_group() as group:
                try:
                    await upstream.send(up.send(sent) or b"")
                    group.start_soon(self._upload, up, upstream, group.cancel_scope)
                    switched = await self._download(up, upstream)
                except _ERRORS as error:
                    failure = error
                group.cancel_scope.cancel()
            if switched:
                await self._switch(up, upstream)
        finally:
            whole = up.our_state is h11.DONE and up.their_state is h11.DONE and not up.trailing_data[0]
            with anyio.CancelScope(shield=True):
                await self._course.done(reusable=whole and failure is None)
        if failure is not None:
            await self.refuse(502, f"the other side failed: {_failure(failure)}")
        return self._down.our_state is h11.DONE and self._down.their_state is h11.DONE

    async def _upload(self, up: h11.Connection, upstream: ByteStream, scope: anyio.CancelScope) -> None:
        while True:
            try:
                event = await _next(self._down, self._client)
            except _ERRORS:
                scope.cancel()  # the client is gone: the answer, too, is for nobody
                return
            try:
                if isinstance(event, h11.Data):
                    await upstream.send(up.send(h11.Data(data=event.data)) or b"")
                elif isinstance(event, h11.EndOfMessage):
                    await upstream.send(up.send(h11.EndOfMessage(headers=event.headers)) or b"")
                    return
                else:
                    scope.cancel()
                    return
            except _ERRORS:
                return  # it may have answered already; reading that tells

    async def _download(self, up: h11.Connection, upstream: ByteStream) -> bool:
        """Returns whether both sides go on with another protocol."""
        while True:
            event = await _next(up, upstream)
            if isinstance(event, h11.InformationalResponse):
                if event.status_code == 101 or self._down.their_http_version == b"1.1":
                    await self._client.send(self._down.send(event) or b"")
                if event.status_code == 101:
                    return True
            elif isinstance(event, h11.Response):
                headers = self._course.answered(list(event.headers.raw_items()))
                answer = h11.Response(status_code=event.status_code, headers=headers, reason=event.reason)
                await self._client.send(self._down.send(answer) or b"")
            elif isinstance(event, h11.Data):
                await self._client.send(self._down.send(h11.Data(data=event.data)) or b"")
            elif isinstance(event, h11.EndOfMessage):
                await self._client.send(self._down.send(h11.EndOfMessage(headers=event.headers)) or b"")
                return False
            else:
                raise ConnectionError("it closed the connection without an answer")

    async def _switch(self, up: h11.Connection, upstream: ByteStream) -> None:
        try:
            await self._client.send(bytes(up.trailing_data[0]))
            await upstream.send(bytes(self._down.trailing_data[0]))
            await join(self._client, upstream)
        except _STREAM_ERRORS:
            pass  # an end like another


def _failure(error: Exception) -> str:
    """In our words: the library's quote what came, in which a secret may be."""
    if isinstance(error, (h11.RemoteProtocolError, h11.LocalProtocolError)):
        return "it does not speak HTTP/1.1"
    return str(error) or type(error).__name__


async def _next(connection: h11.Connection, stream: ByteStream) -> h11.Event | type[h11.PAUSED]:
    while True:
        event = connection.next_event()
        if event is not h11.NEED_DATA:
            return event  # type: ignore[return-value]  # NEED_DATA is excluded
        with anyio.fail_after(SILENCE_S):
            try:
                data = await stream.receive(CHUNK)
            except anyio.EndOfStream:
                data = b""
        connection.receive_data(data)
