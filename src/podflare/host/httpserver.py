"""The HTTP/1.1 server under the app: uvicorn with httptools, without its signal handling and its own texts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import anyio
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from podflare.wire.api import error_body

SHUTDOWN_S = 1
"""Connections whose answers are over are closed at once; this is for clients that do not take theirs."""


HEAD_S = 30.0
"""From the first byte of a request, or from the connection, to the end of its headers."""
MAX_HEAD_BYTES = 256 * 1024
"""Request line and headers.  They are kept before anybody has shown a key, so they have a cap."""


class _Protocol(HttpToolsProtocol):
    """Bounds the time and size of a request's head, which the server below leaves unbounded."""

    _head_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn types it
        super().connection_made(transport)
        self._head_begins()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_ends()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_begins()

    def on_headers_complete(self) -> None:
        self._head_ends()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(f"the request's headers are above {MAX_HEAD_BYTES} bytes")

    def _head_begins(self) -> None:
        self._head_ends()
        self._head_bytes = 0
        self._head_timer = self.loop.call_later(HEAD_S, self._refuse, f"no complete request within {HEAD_S:g} s")

    def _head_ends(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, why: str) -> None:
        self._head_ends()
        if not self.transport.is_closing():
            self.send_400_response(why)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP at all with the error body that every other error has."""
        body = json.dumps(error_body("bad_request", msg)).encode("ascii")
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode("ascii") + b"connection: close\r\n\r\n" + body)
        self.transport.close()


class Server(uvicorn.Server):
    """`accepting` is set once connections are served."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.accepting = anyio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.accepting.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        # The daemon ends its sandboxes first and the server after them; uvicorn would do it the other way round.
        yield


def make_server(app: Any, *, keep_alive_s: int) -> Server:
    """A server for `app`, to be run with `serve(sockets=[...])`."""
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        loop="none",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=keep_alive_s,
        timeout_graceful_shutdown=SHUTDOWN_S,
    )
    return Server(config)
