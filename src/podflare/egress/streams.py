"""Connected sockets as streams, for what looks into connections; those that are only carried are `relay`'s."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping
from typing import Any

import anyio
from anyio.abc import ByteStream

from podflare.egress.journal import Entry

CHUNK = 64 * 1024
SILENCE_S = 600.0
"""Of either side, within a request: a language model may think for minutes before its first byte."""


class SocketStream(ByteStream):
    """A socket of its own.  Every wait ends after SILENCE_S with TimeoutError."""

    def __init__(self, sock: socket.socket, first: bytes = b"") -> None:
        """`first`: what was read from the socket already."""
        self._socket = sock
        self._first = first
        self._loop = asyncio.get_running_loop()

    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        if self._first:
            first, self._first = self._first[:max_bytes], self._first[max_bytes:]
            return first
        with anyio.fail_after(SILENCE_S):
            try:
                data = await self._loop.sock_recv(self._socket, max_bytes)
            except OSError as error:
                raise anyio.BrokenResourceError(str(error)) from error
        if not data:
            raise anyio.EndOfStream
        return data

    async def send(self, item: bytes) -> None:
        with anyio.fail_after(SILENCE_S):
            try:
                await self._loop.sock_sendall(self._socket, item)
            except OSError as error:
                raise anyio.BrokenResourceError(str(error)) from error

    async def send_eof(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise anyio.BrokenResourceError(str(error)) from error

    async def aclose(self) -> None:
        self._socket.close()

    @property
    def extra_attributes(self) -> Mapping[Any, Callable[[], Any]]:
        return {}


class Counted(ByteStream):
    """A stream to the outside whose bytes are counted in the journal."""

    def __init__(self, stream: ByteStream, entry: Entry) -> None:
        self._stream = stream
        self._entry = entry

    async def receive(self, max_bytes: int = CHUNK) -> bytes:
        data = await self._stream.receive(max_bytes)
        self._entry.count_in(len(data))
        return data

    async def send(self, item: bytes) -> None:
        await self._stream.send(item)
        self._entry.count_out(len(item))

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()


async def join(left: ByteStream, right: ByteStream) -> None:
    """Carry bytes both ways until one side ends or fails; both stay the caller's."""
    async with anyio.create_task_group() as group:

        async def carry(source: ByteStream, sink: ByteStream) -> None:
            try:
                async for data in source:
                    await sink.send(data)
            except (OSError, anyio.BrokenResourceError, anyio.ClosedResourceError):
                pass  # an end like another
            group.cancel_scope.cancel()

        group.start_soon(carry, left, right)
        group.start_soon(carry, right, left)
