"""The HTTP/1.1 server under the app: uvicorn with httptools, without its signal handling and its own texts."""

from __future__ import annotations

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


class _Protocol(HttpToolsProtocol):
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
