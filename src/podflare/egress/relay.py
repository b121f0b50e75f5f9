"""Carries the bytes of two connected sockets, as they come, until both directions have ended."""

from __future__ import annotations

import asyncio
import socket
import struct

import anyio

from podflare.egress.journal import Entry

CHUNK = 128 * 1024
IDLE_S = 3600.0
"""Without a byte in either direction; a dead other side is found by keepalive before."""
HALF_CLOSED_IDLE_S = 300.0
_WATCH_S = 5.0
_RESET = struct.pack("ii", 1, 0)


async def relay(inside: socket.socket, outside: socket.socket, entry: Entry, first: bytes = b"") -> None:
    """Carry until both directions have ended, one has failed, or nothing comes any more; closes both sockets.

    A failure of one side, and a cancellation, is a reset to the other, an end of file an end of file.  What was read
    and could not be sent yet is at most CHUNK for each direction.

    Args:
        first: what was read from the inside already.
    """
    loop = asyncio.get_running_loop()
    last = loop.time()
    ended = 0
    whole = False

    async def carry(source: socket.socket, sink: socket.socket, data: bytes, *, out: bool) -> None:
        nonlocal last, ended
        try:
            while True:
                if data:
                    await loop.sock_sendall(sink, data)
                    last = loop.time()
                    if out:
                        entry.count_out(len(data))
                    else:
                        entry.count_in(len(data))
                    # Neither call waits while bytes can be had: others come first now and then.
                    await asyncio.sleep(0)
                data = await loop.sock_recv(source, CHUNK)
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    ended += 1
                    break
        except OSError:
            group.cancel_scope.cancel()
        if ended == 2:
            group.cancel_scope.cancel()  # the watch, too

    async def watch() -> None:
        while True:
            await asyncio.sleep(_WATCH_S)
            if loop.time() - last > (HALF_CLOSED_IDLE_S if ended else IDLE_S):
                group.cancel_scope.cancel()

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(watch)
            group.start_soon(lambda: carry(inside, outside, first, out=True))
            group.start_soon(lambda: carry(outside, inside, b"", out=False))
        whole = ended == 2
    finally:
        for sock in (inside, outside):
            if not whole:
                reset(sock)
            else:
                sock.close()


def reset(sock: socket.socket) -> None:
    """Close so that the other side sees an error rather than an end."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    except OSError:
        pass  # it is as closed as it can be
    sock.close()
